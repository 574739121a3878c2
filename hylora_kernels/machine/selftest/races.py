"""Races show by repetition: the same call has to give the same bits, however often, beside whatever
else, and from a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from hylora_kernels.weights import Needs, Saved, Weights


class Race(Exception):
    """Two runs of one call gave different bits."""


def run(room, call, needs=None) -> list[Tensor]:
    """y and the gradients that the call has (needs: of x, A, B, bias; by default all), by a room's
    own functions: no autograd between the launches."""
    x, *factors, dy = call
    weights = Weights(*factors)
    has_adapter = weights.A is not None
    needs = needs or Needs(True, has_adapter, has_adapter, weights.bias is not None)
    y, h_a = room.forward(x, weights)
    grads = room.backward(dy, Saved(x, h_a), weights, needs)
    return [y, *(grad for grad in grads if grad is not None)]


def races(room, calls, repeats: int, forced: bool) -> None:
    """Two calls of the same shape, in turns, `repeats` times each; on a GPU also on two streams at
    once, and as CUDA graphs, alone and on two streams.

    forced: the launch is, so that a graph has to give the bits that a plain call gives. Else
    another may be chosen for a graph, and the first replay says what the others have to give.
    Raises Race.
    """
    expected = [run(room, call) for call in calls]
    differ = []
    for _ in range(repeats):
        differ += [_differ(run(room, c), e) for c, e in zip(calls, expected, strict=True)]
    _require(differ, f"one of {repeats} repetitions gave other bits")
    if calls[0].x.is_cuda:
        _on_two_streams(room, calls, expected, repeats)
        _in_a_graph(room, calls, expected, repeats, forced)


def _on_two_streams(room, calls, expected, repeats: int) -> None:
    here, differ = torch.cuda.current_stream(), []
    streams = [torch.cuda.Stream() for _ in calls]
    for stream in streams:
        stream.wait_stream(here)
    for _ in range(repeats):
        for stream, call, wanted in zip(streams, calls, expected, strict=True):
            with torch.cuda.stream(stream):
                differ.append(_differ(run(room, call), wanted))
    for stream in streams:
        here.wait_stream(stream)
    _require(differ, f"one of {repeats} repetitions on two streams at once gave other bits")


def _in_a_graph(room, calls, expected, repeats: int, forced: bool) -> None:
    """One graph whose inputs are exchanged in place between replays; two graphs at once."""
    static = _copy(calls[0])
    graph, results = _captured(room, static)
    for turn in range(2 * repeats):
        which = turn % 2
        for target, source in zip(static, calls[which], strict=True):
            if isinstance(target, Tensor):
                target.copy_(source)
        graph.replay()
        if not forced and turn < 2:
            _require_near(results, expected[which])
            expected[which] = [result.clone() for result in results]
        words = f"replay {turn + 1} of a CUDA graph gave other bits"
        _require([_differ(results, expected[which])], words)

    here, differ = torch.cuda.current_stream(), []
    graphs = [_captured(room, call, times=5) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    for stream in streams:
        stream.wait_stream(here)
    for _ in range(repeats):
        for stream, (replayed, found), wanted in zip(streams, graphs, expected, strict=True):
            with torch.cuda.stream(stream):
                replayed.replay()
                differ.append(_differ(found, wanted))
    for stream in streams:
        here.wait_stream(stream)
    _require(differ, f"one of {repeats} replays of two CUDA graphs at once gave other bits")


def _captured(room, call, times: int = 1):
    """A CUDA graph of `times` runs in a row, and the results of the last.

    Captured on a stream of its own: cuBLAS has one workspace a stream, which a graph goes on using,
    so that two graphs captured on one stream may not be replayed at once.
    """
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # what is made once has to be made before
        run(room, call)
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        for _ in range(times):
            results = run(room, call)
    return graph, results


def _copy(call):
    """The same call on tensors of its own, strides kept."""
    return type(call)(*(t.clone() if isinstance(t, Tensor) else t for t in call))


def _differ(got: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Whether any number differs, a bool left on the device, so that nothing waits for it."""
    return torch.stack([(a != b).any() for a, b in zip(got, expected, strict=True)]).any()


def _require(differ: list[Tensor], words: str) -> None:
    if bool(torch.stack(differ).any()):
        raise Race(words)


def _require_near(got: list[Tensor], expected: list[Tensor]) -> None:
    """Raise Race unless a graph's results are those of plain calls up to rounding."""
    for result, wanted in zip(got, expected, strict=True):
        error = float((result.double() - wanted.double()).norm())
        if not error <= 2e-2 * float(wanted.double().norm()) + 1e-6:
            raise Race(f"a CUDA graph computes something else: off by {error:.3g}")
