"""A dense layer's codes of each width over the same layer in a float dtype, packed for the CPU: few
rows out of memory, with the share of its read bandwidth, and many rows. One line for each.

    OMP_NUM_THREADS=1 python benchmarks/quantized.py [--dtype bfloat16] [--shape 2048x5632]
        [--rows 1,4,16,128] [--bits 4,8]
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from layers import FEW_ROWS, close
from limits import cycled_bytes, measure
from timing import interleave, keep_freed_memory

from hylora_kernels import backends, reference
from hylora_kernels.weights import PLANES, Weights

SHAPES = ("1536x576", "2048x2048", "1536x8960")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.replace("x", ",").split(",")]


def dense(matrix) -> Weights:
    N = matrix.shape[0]
    return Weights(matrix, torch.empty(0, N), pivots=torch.arange(N, dtype=torch.int32))


def quantised(K: int, N: int, bits: int) -> Weights:
    groups = -(-K // 64)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    zeros = None if bits == 8 else torch.randint(0, 2**bits, (N, groups), dtype=torch.uint8)
    scales = torch.rand(N, groups) / 2**bits / K**0.5
    return dense(reference.quantized(codes, scales, zeros, bits))


def copies(packed, M: int) -> list:
    """As many as it takes to read each of them from memory, for few rows."""
    name = "panels" if hasattr(packed, "panels") else "layer"
    tensor = getattr(packed, name)
    count = max(1, cycled_bytes("DRAM") // tensor.nbytes) if M <= FEW_ROWS else 1
    return [packed, *(dataclasses.replace(packed, **{name: tensor.clone()}) for _ in range(count))]


def compare(K: int, N: int, M: int, widths: list[int], dtype: torch.dtype, read: float) -> None:
    x = torch.randn(M, K).to(dtype)
    W = torch.randn(N, K) / K**0.5
    layers = {"plain": (backends.pack(dense(W.to(dtype)), dtype), W.to(dtype))}
    for bits in widths:
        weights = quantised(K, N, bits)
        exact = reference.dequantize(weights.SVh)
        layers[f"{bits} bits"] = backends.pack(weights, dtype), exact
    rivals, sizes = {}, {}
    for name, (packed, exact) in layers.items():
        close(packed.forward(x, None), x.double() @ exact.double().T, name)
        rivals[name] = [lambda p=p: p.forward(x, None) for p in copies(packed, M)]
        sizes[name] = packed.tensors[0].nbytes
    times = interleave(rivals, budget=2.0)
    for name in rivals:
        seconds = times.median(name)
        share = f" {100 * sizes[name] / seconds / read:3.0f} % of reading" if M <= FEW_ROWS else ""
        print(
            f"{K}x{N} M = {M:3} {name:7}: {1e6 * seconds:8.1f} us, {times.ratio('plain', name):.2f}"
            f" times as fast as {dtype}{share}",
            flush=True,
        )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", action="append", help=f"KxN, by default {', '.join(SHAPES)}")
    parser.add_argument("--rows", default="1,4,16,128")
    parser.add_argument("--bits", default=",".join(map(str, PLANES)))
    given = parser.parse_args()
    keep_freed_memory()
    limits = measure(torch.get_num_threads())
    print(limits.line())
    for shape in given.shape or SHAPES:
        for M in numbers(given.rows):
            dtype = getattr(torch, given.dtype)
            compare(*numbers(shape), M, numbers(given.bits), dtype, limits.read["DRAM"])


if __name__ == "__main__":
    main()
