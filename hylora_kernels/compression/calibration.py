"""Statistics of a model on calibration text: Gram matrices of inputs and of output gradients,
gathered in passes.

G = sum x x^T over a linear's inputs, C = sum g g^T over the gradients of the summed next-token loss
at its outputs. Two-sided whitening by both is published as GFWSVD (arXiv:2505.17974); by G alone it
is SVD-LLM's (arXiv:2403.07378).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.model.loss import has_plain_head, token_loss
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.model.structure import Group, as_matrix


@dataclass
class Statistics:
    """inputs: G float32 [K, K] by the first path of each group; gradients: C float32 [N, N] by
    path, or empty."""

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def gram(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m], b [..., n] -> a^T b [m, n], float32.

    bfloat16 operands are multiplied as they are and summed in float32: exact products, at the speed
    of the low-precision units ("medium" lets torch round float32 operands to bfloat16, which
    changes nothing for these).
    """
    exact_in_bfloat16 = a.dtype == b.dtype == torch.bfloat16
    a, b = (t.flatten(0, -2).float() for t in (a, b))
    with matmul_precision("medium" if exact_in_bfloat16 else "highest"):
        return a.T @ b


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def passes(
    model: nn.Module, groups: list[Group], with_gradients: bool, max_memory: int
) -> list[list[Group]]:
    """Split the groups into runs whose float32 statistics fit into max_memory bytes (a single group
    always runs)."""
    runs: list[list[Group]] = []
    held = max_memory + 1
    for group in groups:
        size = statistics_bytes(model, group, with_gradients)
        if held + size > max_memory:
            runs.append([])
            held = 0
        runs[-1].append(group)
        held += size
    return runs


def statistics_bytes(model: nn.Module, group: Group, with_gradients: bool) -> int:
    shapes = [as_matrix(model.get_submodule(path)).shape for path in group.paths]
    return 4 * (shapes[0][1] ** 2 + (sum(n * n for n, _ in shapes) if with_gradients else 0))


def gather(
    model: nn.Module,
    ids: Tensor,
    groups: list[Group],
    with_gradients: bool,
    progress: bool = True,
    label: str = "",
) -> Statistics:
    """ids int64 [n, L] -> the statistics of `groups` over all n L tokens, one sequence at a time.

    The model runs as it is: its dtype, its device, eval mode. Raises FloatingPointError naming the
    layer that was the first to get inputs (in a forward) or gradients (in a backward) that are not
    finite.
    """
    device = next(model.parameters()).device
    has_plain_head(model, ids[:1].to(device))  # asked now, so that its probe isn't counted below
    statistics, hooks = Statistics({}, {}), []
    for group in groups:
        hooks.append(
            model.get_submodule(group.paths[0]).register_forward_pre_hook(
                _see_input(statistics, group)
            )
        )
        if with_gradients:
            for path in group.paths:
                hooks.append(
                    model.get_submodule(path).register_forward_hook(_see_output(statistics, path))
                )
    if with_gradients:  # gradients only flow if something below the linears asks for one
        embeddings = model.get_input_embeddings()
        hooks.append(
            embeddings.register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        )
    within_base = {id(module) for module in model.base_model.modules()}
    leaders = (model.get_submodule(group.paths[0]) for group in groups)
    forward = model.base_model if all(id(m) in within_base for m in leaders) else model
    try:
        with _frozen(model), torch.set_grad_enabled(with_gradients):
            for row in tqdm(
                ids.split(1),
                desc=label or "calibrating",
                unit="seq",
                disable=not progress,
                leave=False,
            ):
                if with_gradients:
                    loss, _ = token_loss(model, row.to(device))
                    loss.backward()
                else:
                    forward(input_ids=row.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    _require_finite(groups, statistics)
    return statistics


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """eval mode and no parameter gradients inside; everything as before afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def _see_input(statistics: Statistics, group: Group):
    key = group.paths[0]

    def hook(_module, args):
        x = args[0].detach()
        _add(statistics.inputs, key, gram(x, x))

    return hook


def _see_output(statistics: Statistics, path: str):
    def on_gradient(gradient):
        _add(statistics.gradients, path, gram(gradient, gradient))

    def hook(_module, _args, output):
        output.register_hook(on_gradient)

    return hook


def _add(sums: dict[str, Tensor], key: str, term: Tensor) -> None:
    if key in sums:
        sums[key] += term
    else:
        sums[key] = term


def _require_finite(groups: list[Group], statistics: Statistics) -> None:
    for group in groups:
        if not _finite(statistics.inputs[group.paths[0]]):
            raise FloatingPointError(
                f"layer {group.paths[0]}: its inputs on the calibration text are not finite"
            )
    for group in reversed(groups):
        for path in reversed(group.paths):
            if path in statistics.gradients and not _finite(statistics.gradients[path]):
                raise FloatingPointError(
                    f"layer {path}: its output gradients on the calibration text are not finite"
                )


def _finite(gram_matrix: Tensor) -> bool:
    """Whether all rows that went into a Gram matrix were finite: any that wasn't shows on the
    diagonal."""
    return bool(gram_matrix.diagonal().isfinite().all())
