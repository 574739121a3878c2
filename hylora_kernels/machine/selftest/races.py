"""Races show by repetition: a call must give the same bits each time, beside other calls and from
a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from hylora_kernels.weights import Needs, Saved, Weights


class Race(Exception):
    """Two runs of one call gave different bits."""


def run(backend, call, needs=None) -> list[Tensor]:
    """y and the gradients of a call by a backend's own functions, without autograd in between.

    needs: the gradients wanted; by default all that the call has.
    """
    x, *factors, dy = call
    weights = Weights(*factors)
    has_adapter = weights.A is not None
    needs = needs or Needs(True, has_adapter, has_adapter, weights.bias is not None)
    y, h_a = backend.forward(x, weights)
    grads = backend.backward(dy, Saved(x, h_a), weights, needs)
    return [y, *(grad for grad in grads if grad is not None)]


def races(backend, calls, repeats: int, forced: bool) -> None:
    """Raise Race unless two calls of the same shape give the same bits in every repetition.

    They run in turns, `repeats` times each; on a GPU also on two streams at once, and as CUDA
    graphs, alone and on two streams. forced: a launch is forced, so a graph must give the bits of a
    plain call. Otherwise a graph may get another launch, and its first replay sets the bits.
    """
    expected = [run(backend, call) for call in calls]
    differ = []
    for _ in range(repeats):
        differ += [_differ(run(backend, c), e) for c, e in zip(calls, expected, strict=True)]
    _require(differ, f"one of {repeats} repetitions gave other bits")
    if calls[0].x.is_cuda:
        _on_two_streams(backend, calls, expected, repeats)
        _in_a_graph(backend, calls, expected, repeats, forced)


def _on_two_streams(backend, calls, expected, repeats: int) -> None:
    here, differ = torch.cuda.current_stream(), []
    streams = [torch.cuda.Stream() for _ in calls]
    for stream in streams:
        stream.wait_stream(here)
    for _ in range(repeats):
        for stream, call, wanted in zip(streams, calls, expected, strict=True):
            with torch.cuda.stream(stream):
                differ.append(_differ(run(backend, call), wanted))
    for stream in streams:
        here.wait_stream(stream)
    _require(differ, f"one of {repeats} repetitions on two streams at once gave other bits")


def _in_a_graph(backend, calls, expected, repeats: int, forced: bool) -> None:
    """One graph whose inputs change in place between replays, then two graphs at once."""
    static = _copy(calls[0])
    graph, results = _captured(backend, static)
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
    graphs = [_captured(backend, call, times=5) for call in calls]
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


def _captured(backend, call, times: int = 1):
    """A CUDA graph of `times` runs in a row, and the results of the last.

    Each graph is captured on a stream of its own. cuBLAS has one workspace a stream, and a graph
    goes on using it, so two graphs captured on one stream may not be replayed at once.
    """
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # compiles and allocates what can't be made during capture
        run(backend, call)
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        for _ in range(times):
            results = run(backend, call)
    return graph, results


def _copy(call):
    """A copy of the call, strides kept."""
    return type(call)(*(t.clone() if isinstance(t, Tensor) else t for t in call))


def _differ(got: list[Tensor], expected: list[Tensor]) -> Tensor:
    """True if any number differs, as a tensor on the device, so that nothing waits for it."""
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
