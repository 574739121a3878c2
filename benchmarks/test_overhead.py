"""The cost of one call beside its work, on a layer so small that its work takes no time."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from layers import Shape, random_factors
from timing import interleave

from hylora_kernels import SVDLoRALinear, backends, optimize_for_inference, svd_lora_linear
from hylora_kernels.backends.cpu import panels

TINY = Shape(K=32, N=32, r=16, ra=16)


def test_overhead(benchmark, backend, with_threads, quick):
    if backend != "cpu":
        pytest.skip(f"the calls are those of backend 'cpu', got {backend!r}")
    with_threads(1)
    x, factors = torch.randn(1, TINY.K), random_factors(TINY, torch.float32)
    SVh, U, A, B, bias, alpha, _ = factors
    packed = backends.BACKENDS[backend].pack(factors)
    layer = SVDLoRALinear.from_factors(*factors).eval()
    weights = [panels.pack_matrix(t) for t in (SVh, A, U, B)]
    layer_op = functools.partial(torch.ops.hylora.cpu_layer.default, x, *weights, bias, None)
    pack_forward = backends.BACKENDS[backend].forward_packed
    optimised = optimize_for_inference(SVDLoRALinear.from_factors(*factors).eval())
    calls = {
        "F.linear": lambda: F.linear(x, SVh),
        "F.linear twice": lambda: F.linear(F.linear(x, SVh), U, bias),
        "our C++ op, 6 tensors": lambda: layer_op(TINY.r, TINY.ra, TINY.N, alpha, False, False, 0),
        "our C++ op, packed layer": lambda: pack_forward(x, packed, bias),
        "svd_lora_linear (eager)": lambda: svd_lora_linear(x, *factors),
        "SVDLoRALinear (eager)": lambda: layer(x),
        "SVDLoRALinear, optimised": lambda: optimised(x),
    }
    with torch.inference_mode():
        times = interleave({k: [c] * 50 for k, c in calls.items()}, 0.3 if quick else 1.0)
    seconds = {name: times.median(name) for name in calls}
    benchmark.extra_info.update(suite="overhead", seconds=seconds)
    print("\none call: " + ", ".join(f"{k} {1e6 * s:.1f} µs" for k, s in seconds.items()), end="")
    benchmark.pedantic(calls["our C++ op, packed layer"], rounds=5)
