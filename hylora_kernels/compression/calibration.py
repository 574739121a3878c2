"""Statistics of a model on calibration text: Gram matrices of inputs and of output gradients.

G = sum x x^T over the inputs of a linear, C = sum g g^T over the gradients of the summed next-token
loss at its outputs. Whitening by both is GFWSVD (arXiv:2505.17974), by G alone SVD-LLM
(arXiv:2403.07378). They are gathered in passes over the text, each for as many groups of linears as
fit in memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from hylora_kernels.layers.factorize import add_symmetric, fill_lower
from hylora_kernels.model.loss import body_of, token_loss
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.model.structure import Group
from hylora_kernels.support.processes import ALONE, Processes

STAGE = "calibrating"  # In the error of a lost process.

_log = logging.getLogger(__name__)


@dataclass
class Statistics:
    """What one pass found about `groups`.

    inputs:      G float32 [K, K] by the path of each group's leader; empty for method "svd".
    gradients:   C float32 [N, N] by path; empty where no gradients were asked for.
    tokens:      the tokens that G sums over, by the path of each group's leader; an expert sees
                 those that are routed to it.
    predictions: the next-token losses that were summed, of n blocks of L tokens n (L - 1).
    """

    groups: list[Group]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    predictions: int = 0

    def nats(self, leader: str) -> float:
        """The increase of the mean loss, in nats a token, for each unit of S^2 that is dropped from
        a linear of the group; 1 without gradients, which alone give S^2 a unit.

        A change E of the weight adds 1/2 sum_t (g_t^T E x_t)^2 to the summed loss (the Fisher
        information for the Hessian, each token on its own). With x and g independent (as in K-FAC,
        arXiv:1503.05671) that is 1/2 tr(E^T C E G) / tokens = S^2 / (2 tokens), and the mean is
        over `predictions`.
        """
        if not self.gradients:
            return 1.0
        return 0.5 / (max(self.tokens[leader], 1) * self.predictions)

    def add_others(self, processes: Processes) -> None:
        """Add the sums of the other processes, which have read other sequences."""
        if processes.size == 1:
            return
        with_gradients = processes.total([len(self.gradients)], STAGE)[0] > 0
        wanted = [(self.inputs, g.leader.path, g.leader.shape[1], g) for g in self.groups]
        if with_gradients:
            targets = [(target, g) for g in self.groups for target in g.targets]
            wanted += [(self.gradients, t.path, t.shape[0], g) for t, g in targets]
        seen = processes.total((path in sums for sums, path, _, _ in wanted), STAGE)
        for (sums, path, n, group), times in zip(wanted, seen, strict=True):
            if times and path not in sums:
                sums[path] = torch.zeros(n, n, device=group.leader.matrix.device)
        processes.add((s[path] for s, path, _, _ in wanted if path in s), STAGE)
        leaders = [group.leader.path for group in self.groups]
        counts = (self.predictions, *(self.tokens.get(path, 0) for path in leaders))
        self.predictions, *tokens = map(int, processes.total(counts, STAGE))
        self.tokens.update(zip(leaders, tokens, strict=True))

    def clear(self) -> None:
        """Free the Gram matrices."""
        self.inputs.clear()
        self.gradients.clear()


class Observer(Protocol):
    """Something else that sees a pass over the text, by hooks of its own."""

    def front_hooks(self) -> list[RemovableHandle]:
        """In front of the blocks."""

    def tail_hooks(self) -> list[RemovableHandle]:
        """Behind the blocks."""

    def begin(self, index: int, ids: Tensor) -> None:
        """Sequence `index`, int64 [1, L], is the next one."""

    def add_others(self, processes: Processes) -> None:
        """Add what the other processes have seen."""


def gram(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m], b [..., n] -> a^T b [m, n], float32."""
    with _exact_products(a, b):
        return a.flatten(0, -2).float().T @ b.flatten(0, -2).float()


def add_gram(total: Tensor | None, a: Tensor) -> Tensor:
    """a [..., n] -> total + a^T a [n, n], float32, its upper triangle alone; total itself where one
    is given."""
    rows = a.flatten(0, -2).float()
    with _exact_products(a, a):
        return add_symmetric(total, rows, rows)


def _exact_products(a: Tensor, b: Tensor):
    """bfloat16 operands run on the low-precision units, with exact products and float32 sums:
    "medium" lets torch round float32 operands to bfloat16, which changes nothing for these."""
    exact_in_bfloat16 = a.dtype == b.dtype == torch.bfloat16
    return matmul_precision("medium" if exact_in_bfloat16 else "highest")


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gather_in_passes(
    model: nn.Module,
    ids: Tensor,
    groups: list[Group],
    with_gradients: bool,
    max_memory: int,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    processes: Processes = ALONE,
) -> Iterator[Statistics]:
    """Yield the statistics of `groups`, one pass over the text at a time, as many as max_memory
    requires. The observers see the first pass."""
    runs = passes(groups, with_gradients, max_memory)
    for index, part in enumerate(runs, 1):
        label = "calibrating" + (f", pass {index} of {len(runs)}" if len(runs) > 1 else "")
        yield gather(model, ids, part, with_gradients, progress, label, observers, processes)
        observers = ()


def passes(groups: list[Group], with_gradients: bool, max_memory: int) -> list[list[Group]]:
    """Split the groups into runs whose float32 statistics fit into max_memory bytes; a run has one
    group at least."""
    runs: list[list[Group]] = []
    used = max_memory + 1
    for group in groups:
        size = statistics_bytes(group, with_gradients)
        if used + size > max_memory:
            runs.append([])
            used = 0
        runs[-1].append(group)
        used += size
    return runs


def statistics_bytes(group: Group, with_gradients: bool) -> int:
    K = group.leader.shape[1]
    outputs = (target.shape[0] for target in group.targets) if with_gradients else ()
    return 4 * (K * K + sum(N * N for N in outputs))


def gather(
    model: nn.Module,
    ids: Tensor,
    groups: list[Group],
    with_gradients: bool,
    progress: bool = True,
    label: str = "",
    observers: Sequence[Observer] = (),
    processes: Processes = ALONE,
) -> Statistics:
    """ids int64 [n, L] -> the statistics of `groups` over all n L tokens, one sequence at a time.

    observers: see the same forwards, and the same backwards if there are gradients.
    processes: each reads every size-th sequence, and all have the sums over all.

    The model runs in eval mode, in its own dtype and on its device, and is left as it was. Raises
    FloatingPointError naming the first layer, in the order of the forward, whose inputs are not
    finite, or the first in the order of the backward whose output gradients are not.
    """
    device = next(model.parameters()).device
    body = body_of(model, ids[:1].to(device))  # Its probe must not count below.
    statistics = Statistics(groups)
    within_body = set() if body is None else set(body.modules())
    all_within = all(group.leader.module in within_body for group in groups)
    forward = body if body is not None and all_within else model
    own = range(len(ids))[processes.part(len(ids))]
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(watching(statistics, with_gradients))
        if with_gradients:
            hooks.enter_context(gradients_from(model))
        for observer in observers:
            hooks.enter_context(removed([*observer.front_hooks(), *observer.tail_hooks()]))
        with frozen(model), torch.set_grad_enabled(with_gradients):
            bar = tqdm(
                own,
                desc=label or "calibrating",
                unit="seq",
                disable=not progress,
                leave=False,
            )
            for index in bar:
                row = ids[index : index + 1]
                for observer in observers:
                    observer.begin(index, row)
                if with_gradients:
                    loss, predictions = token_loss(model, row.to(device))
                    loss.backward()
                    statistics.predictions += predictions
                else:
                    forward(input_ids=row.to(device), use_cache=False)
    statistics.add_others(processes)
    for observer in observers:
        observer.add_others(processes)
    return finished(statistics, with_gradients, device)


@contextlib.contextmanager
def watching(statistics: Statistics, with_gradients: bool) -> Iterator[None]:
    """Add what the linears of the statistics' groups see inside to the sums, of which finished()
    makes whole ones."""
    hooks = []
    for group in statistics.groups:
        hook = _see_input(statistics, group.leader.path)
        hooks.append(group.leader.module.register_forward_pre_hook(hook))
        for target in group.targets if with_gradients else ():
            hook = _see_output(statistics, target.path)
            hooks.append(target.module.register_forward_hook(hook))
    with removed(hooks):
        yield


def finished(statistics: Statistics, with_gradients: bool, device: torch.device) -> Statistics:
    """The same statistics, their sums whole matrices. Raises FloatingPointError as gather()."""
    if with_gradients:
        _warn_of_missing_gradients(statistics)
    for group in statistics.groups:
        statistics.tokens.setdefault(group.leader.path, 0)
        _finish(statistics.inputs, group.leader.path, group.leader.shape[1], device)
        for target in group.targets if with_gradients else ():
            _finish(statistics.gradients, target.path, target.shape[0], device)
    _require_finite(statistics)
    return statistics


@contextlib.contextmanager
def gradients_from(model: nn.Module) -> Iterator[None]:
    """Inside, the embedding's output asks for a gradient, without which none would flow."""

    # The clone is no leaf, so that a model may scale it in place (CTRL).
    def embedded(_module, _args, output):
        return output.detach().requires_grad_().clone()

    with removed([model.get_input_embeddings().register_forward_hook(embedded)]):
        yield


@contextlib.contextmanager
def removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """The hooks are removed when the `with` ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """eval mode and no parameter gradients inside; everything as before afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def _see_input(statistics: Statistics, path: str):
    sums, tokens = statistics.inputs, statistics.tokens

    def hook(_module, args):
        x = args[0].detach()
        sums[path] = add_gram(sums.get(path), x)
        tokens[path] = tokens.get(path, 0) + x.shape[:-1].numel()

    return hook


def _see_output(statistics: Statistics, path: str):
    sums = statistics.gradients

    def on_gradient(gradient):
        sums[path] = add_gram(sums.get(path), gradient)

    def hook(_module, _args, output):
        if output.requires_grad:  # Else the model calls the linear under no_grad.
            output.register_hook(on_gradient)

    return hook


def _warn_of_missing_gradients(statistics: Statistics) -> None:
    """Name the linears that have seen inputs and no gradient, as the indexer of a sparse attention,
    which the loss does not depend on smoothly."""
    missing = [
        path
        for group in statistics.groups
        for path in group.paths
        if group.leader.path in statistics.inputs and path not in statistics.gradients
    ]
    if missing:
        _log.warning(
            "no gradient of the loss reaches %d linears (%s): the budget leaves them the least "
            "rank; exclude= keeps them dense",
            len(missing),
            ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""),
        )


def _finish(sums: dict[str, Tensor], path: str, n: int, device: torch.device) -> None:
    """Make a whole Gram matrix of an upper triangle, or of nothing: an expert that no token was
    routed to has seen nothing."""
    sums[path] = fill_lower(sums[path]) if path in sums else torch.zeros(n, n, device=device)


def _require_finite(statistics: Statistics) -> None:
    for group in statistics.groups:
        if not _finite(statistics.inputs[group.leader.path]):
            raise FloatingPointError(
                f"layer {group.leader.path}: its inputs on the calibration text are not finite"
            )
    for group in reversed(statistics.groups):
        for path in reversed(group.paths):
            if path in statistics.gradients and not _finite(statistics.gradients[path]):
                raise FloatingPointError(
                    f"layer {path}: its output gradients on the calibration text are not finite"
                )


def _finite(gram_matrix: Tensor) -> bool:
    """True if all rows that went into a Gram matrix were finite: the diagonal shows any other."""
    return bool(gram_matrix.diagonal().isfinite().all())
