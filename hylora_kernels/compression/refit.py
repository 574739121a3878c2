"""Closed-form refit of U, block by block, against the compressed prefix.

The compressed ("student") stream x_s drifts from the dense one x_t. With V the whitened rows of
SVh, each linear's U becomes the ridge solution that maps x_s to what the dense layer made of x_t,
plus, where the layer writes into the residual stream, what that stream has lost so far:

    T = W sum(x_t x_s^T) + sum((h_dense - h_student) x_s^T)       U <- (T V^T + m U0) (V sum(x_s
    x_s^T) V^T + m I)^-1

with m = 4 times the mean diagonal of V sum(x_s x_s^T) V^T. The strong ridge is what makes it pay:
with a small one and no residual term perplexity gets worse (SmolLM2-135M at keep 0.6: 133 instead
of 93), with these 84.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hylora_kernels.compression.calibration import gram
from hylora_kernels.compression.whiten import Factors
from hylora_kernels.layers.factorize import wide
from hylora_kernels.model.structure import Structure, as_matrix

RIDGE = 4.0  # of the mean diagonal, for a factored layer
DENSE_RIDGE = 1e-3  # the same, for a layer that stays dense: its W is refitted whole
BATCH = 4  # sequences a forward


class _Stop(Exception):
    """Ends a forward early; not an error."""


@dataclass
class _Watch:
    """What one forward of a block saw: inputs by group leader, outputs of the residual writers."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Calls:
    """How the model calls its blocks: hidden states [n, L, d] before the first, and the other
    arguments by batch size."""

    hidden: Tensor
    arguments: dict[tuple[str, int], tuple[tuple, dict]]


@torch.no_grad()
def refit(
    model: nn.Module,
    structure: Structure,
    ids: Tensor,
    load_factors,
    ranks: dict[str, int],
    done: dict[str, dict[str, Tensor]],
    progress: bool = True,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield, block by block, (block path, path -> refitted U float32 [N, R], or W [N, K] for a
    layer left dense).

    ids int64 [n, L]; load_factors(path) -> Factors; ranks: total rank by path, 0 for dense; done:
    results of an earlier, interrupted run, taken as they are. The model itself is not changed.
    Memory: two streams of hidden states and one block's inputs over all n L tokens. Raises
            ValueError where the blocks are no plain chain.
    """
    if not structure.blocks:
        raise ValueError("refit needs a model with a list of blocks, got none: refit=False")
    calls = _record_calls(model, structure.blocks, ids)
    dense_stream, student_stream = calls.hidden, calls.hidden.clone()
    by_block = {
        block: [g for g in structure.groups if g.block == block] for block in structure.blocks
    }
    for block in tqdm(
        structure.blocks, desc="refitting", unit="block", disable=not progress, leave=False
    ):
        dense = model.get_submodule(block)
        student = copy.deepcopy(dense)
        groups = by_block[block]
        if block in done:
            fitted = done[block]
            for path, matrix in fitted.items():
                _write(student, block, path, _product(path, matrix, load_factors, ranks))
            dense_stream = _forward(dense, block, dense_stream, calls)
        else:
            fitted, dense_stream = _refit_block(
                dense,
                student,
                block,
                groups,
                dense_stream,
                student_stream,
                calls,
                load_factors,
                ranks,
            )
        yield block, fitted
        student_stream = _forward(student, block, student_stream, calls)


def _refit_block(
    dense, student, block, groups, dense_stream, student_stream, calls, load_factors, ranks
):
    """-> (path -> refitted matrix, the dense stream behind the block); the student's weights are
    written on the way."""
    writers = _residual_writers(dense, block, groups, dense_stream, calls)
    targets = [
        _watched(dense, block, groups, writers, batch, calls) for batch in dense_stream.split(BATCH)
    ]
    fitted: dict[str, Tensor] = {}
    for group in groups:
        leader, cross, own, residual = group.paths[0], 0, 0, 0
        earlier = writers[: writers.index(leader)] if leader in writers else []
        for hidden, hidden_dense, (target, _) in zip(
            student_stream.split(BATCH), dense_stream.split(BATCH), targets, strict=True
        ):
            seen, _ = _watched(student, block, groups, writers, hidden, calls, stop_at=leader)
            x_s, x_t = seen.inputs[leader], target.inputs[leader]
            cross, own = cross + gram(x_t, x_s), own + gram(x_s, x_s)
            if leader in writers:
                lost = hidden_dense - hidden
                for writer in earlier:
                    lost = lost + target.outputs[writer] - seen.outputs[writer]
                residual = residual + gram(lost, x_s)
        for path in group.paths:
            W = wide(as_matrix(dense.get_submodule(path.removeprefix(block + "."))))
            moved = W @ wide(cross) + (wide(residual) if leader in writers else 0)
            fitted[path] = _solve(path, W, moved, wide(own), load_factors, ranks)
            _write(student, block, path, _product(path, fitted[path], load_factors, ranks))
    return fitted, torch.cat([output for _, output in targets])


def _solve(path, W, moved, own, load_factors, ranks) -> Tensor:
    if not (moved.isfinite().all() and own.isfinite().all()):
        raise FloatingPointError(f"layer {path}: its inputs in the compressed model are not finite")
    rank = ranks[path]
    if not rank:
        ridge = DENSE_RIDGE * own.diagonal().mean()
        return _ridge_solve(moved, W, own, ridge).float()
    factors: Factors = load_factors(path)
    U, S, SVh = (wide(t).to(own.device) for t in (factors.U, factors.S, factors.SVh))
    S = S[:rank].clamp_min(1e-30)
    U, V = U[:, :rank] * S, SVh[:rank] / S[:, None]
    inner = V @ own @ V.T
    return (_ridge_solve(moved @ V.T, U, inner, RIDGE * inner.diagonal().mean()) / S).float()


def _ridge_solve(moved: Tensor, prior: Tensor, own: Tensor, ridge: Tensor) -> Tensor:
    """(moved + ridge prior) (own + ridge I)^-1 for a symmetric positive own; prior where nothing
    was ever seen."""
    if not ridge > 0:
        return prior
    L = torch.linalg.cholesky(own + ridge * torch.eye(len(own)).to(own))
    return torch.cholesky_solve((moved + ridge * prior).T, L).T


def _product(path, matrix, load_factors, ranks) -> Tensor:
    if not ranks[path]:
        return matrix
    matrix = wide(matrix)
    return matrix @ wide(load_factors(path).SVh[: ranks[path]]).to(matrix.device)


def _write(block_module: nn.Module, block: str, path: str, W: Tensor) -> None:
    linear = block_module.get_submodule(path.removeprefix(block + "."))
    linear.weight.copy_((W.T if isinstance(linear, Conv1D) else W).to(linear.weight))


# -------------------------------------------------------------------------------- running one block


def _record_calls(model: nn.Module, blocks: list[str], ids: Tensor) -> _Calls:
    """Run the model up to its first block on every batch, and once whole to see each block's other
    arguments."""
    device, hidden, arguments = next(model.parameters()).device, [], {}
    stop_at = blocks[0]
    inputs, outputs = {}, {}

    def before(block):
        def hook(_module, args, kwargs):
            x, rest, named = _split_call(args, kwargs)
            arguments[block, len(x)] = rest, named
            inputs[block] = x
            if block == stop_at:
                raise _Stop

        return hook

    def after(block):
        def hook(_module, _args, output):
            outputs[block] = _first(output)

        return hook

    modules = {block: model.get_submodule(block) for block in blocks}
    hooks = [m.register_forward_pre_hook(before(b), with_kwargs=True) for b, m in modules.items()]
    hooks += [m.register_forward_hook(after(b)) for b, m in modules.items()]
    try:
        batches = ids.split(BATCH)
        for batch in batches:
            try:
                model.base_model(input_ids=batch.to(device), use_cache=False)
            except _Stop:
                hidden.append(inputs[blocks[0]])
        stop_at = None
        for size in {len(batch) for batch in batches}:
            model.base_model(input_ids=ids[:size].to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for block, following in pairwise(blocks):
        if block not in outputs or not torch.equal(outputs[block], inputs[following]):
            raise ValueError(
                f"refit needs blocks that feed each other, but {following} doesn't read {block}:"
                " set refit=False"
            )
    return _Calls(torch.cat(hidden), arguments)


def _split_call(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def _first(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _call(module: nn.Module, block: str, hidden: Tensor, calls: _Calls) -> Tensor:
    rest, named = calls.arguments[block, len(hidden)]
    return _first(module(hidden, *rest, **named))


def _forward(module: nn.Module, block: str, stream: Tensor, calls: _Calls) -> Tensor:
    return torch.cat([_call(module, block, batch, calls) for batch in stream.split(BATCH)])


def _watched(
    module, block, groups, writers, hidden, calls, stop_at=None
) -> tuple[_Watch, Tensor | None]:
    """One forward of a block's module -> (what it saw, its output); with stop_at it ends where that
    linear is reached."""
    seen, hooks = _Watch(), []

    def see_input(path):
        def hook(_module, args):
            if stop_at in (None, path):
                seen.inputs[path] = args[0]
            if path == stop_at:
                raise _Stop

        return hook

    def see_output(path):
        def hook(_module, _args, output):
            seen.outputs[path] = output.reshape(
                hidden.shape
            )  # OPT flattens the batch for its fc layers

        return hook

    for group in groups:
        path = group.paths[0]
        hooks.append(_child(module, block, path).register_forward_pre_hook(see_input(path)))
    for path in writers:
        hooks.append(_child(module, block, path).register_forward_hook(see_output(path)))
    try:
        return seen, _call(module, block, hidden, calls)
    except _Stop:
        return seen, None
    finally:
        for hook in hooks:
            hook.remove()


def _child(module: nn.Module, block: str, path: str) -> nn.Module:
    return module.get_submodule(path.removeprefix(block + "."))


def _residual_writers(module, block, groups, stream, calls) -> list[str]:
    """The linears whose outputs, added to the block's input, make its output: the ones that write
    into the residual.

    Candidates have an input of their own and as many outputs as the stream is wide. Held against
    the numbers of one
    batch: where input plus their outputs isn't the block's output (norms or scales behind them),
           there are none.
    """
    width = stream.shape[-1]
    alone = [g.paths[0] for g in groups if len(g.paths) == 1]
    candidates = [
        path for path in alone if as_matrix(_child(module, block, path)).shape[0] == width
    ]
    hidden = stream[:BATCH]
    seen, output = _watched(module, block, groups, candidates, hidden, calls)
    rebuilt = hidden + sum(seen.outputs[path] for path in candidates)
    error = (rebuilt - output).float().norm() / output.float().norm()
    return candidates if error < 0.02 else []
