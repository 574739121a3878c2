"""Layers of codes of each width over the same layer in a float dtype, packed for the CPU: few rows
out of memory, with the share of its read bandwidth, and many rows. A line for each number of rows.

    python benchmarks/quantized.py [--threads 1,2] [--dtype bfloat16] [--shape 2048x5632]
        [--form pair] [--rows 1,4,16,128] [--bits 4,8]

Factors of the pair and of the pivoted form are both quantised; ranks are those at keep 0.6.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from layers import FEW_ROWS, close, kept_rank
from limits import cycled_bytes, measure
from timing import interleave, keep_freed_memory

from hylora_kernels import backends, reference
from hylora_kernels.weights import PLANES, QuantizedMatrix, Weights

SHAPES = ("1536x8960", "2048x2048", "576x1536", "896x4864")
FORMS = ("dense", "pair", "pivoted")
DTYPES = ("bfloat16", "float32")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.replace("x", ",").split(",")]


def random_codes(N: int, K: int, bits: int) -> QuantizedMatrix:
    """Of numbers of mean 0 and variance 1 / K."""
    groups, middle = -(-K // 64), 2 ** (bits - 1)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    zeros = None if bits == 8 else torch.full((N, groups), middle, dtype=torch.uint8)
    scales = (0.5 + torch.rand(N, groups)) * (3 / K) ** 0.5 / middle
    return reference.quantized(codes, scales, zeros, bits)


def quantised(K: int, N: int, form: str, bits: int) -> Weights:
    if form == "dense":
        pivots = torch.arange(N, dtype=torch.int32)
        return Weights(random_codes(N, K, bits), torch.empty(0, N), pivots=pivots)
    rank, pivots, others = kept_rank(K, N, 0.6, form), None, N
    if form == "pivoted":
        pivots = torch.randperm(N)[:rank].sort().values.int()
        others -= rank
    return Weights(random_codes(rank, K, bits), random_codes(others, rank, bits), pivots=pivots)


def dequantised(weights: Weights, dtype: torch.dtype) -> Weights:
    matrices = (
        (reference.dequantize(W, torch.float64) if isinstance(W, QuantizedMatrix) else W).to(dtype)
        for W in (weights.SVh, weights.U)
    )
    return Weights(*matrices, pivots=weights.pivots)


def copies(packed, M: int) -> list:
    """As many as it takes to read each of them from memory, for few rows."""
    name = "panels" if hasattr(packed, "panels") else "layer"
    if M > FEW_ROWS or not hasattr(packed, name):
        return [packed]
    tensor = getattr(packed, name)
    count = max(1, cycled_bytes("DRAM") // tensor.nbytes)
    return [packed, *(dataclasses.replace(packed, **{name: tensor.clone()}) for _ in range(count))]


def pack_rivals(K: int, N: int, form: str, widths: list[int], dtype: torch.dtype) -> dict:
    """Name -> the packed layer and its weights in float64. The first is plain: the numbers of the
    first width."""
    layers = {}
    for bits in widths:
        weights = quantised(K, N, form, bits)
        exact = dequantised(weights, torch.float64)
        if not layers:
            plain = dequantised(weights, dtype)
            layers["plain"] = backends.pack(plain, dtype), exact
        layers[f"{bits} bits"] = backends.pack(weights, dtype), exact
    return layers


def compare(layers: dict, x: torch.Tensor, read: float) -> str:
    """A line of ratios."""
    M = len(x)
    rivals = {}
    for name, (packed, exact) in layers.items():
        some = x[-16:] if M > 16 else x
        expected = reference.forward(some.double(), exact)[0]
        close(packed.forward(x, None)[-len(some) :], expected, name)
        rivals[name] = [lambda p=p: p.forward(x, None) for p in copies(packed, M)]
    times = interleave(rivals, budget=0.4 * len(rivals))
    words = [f"{1e6 * times.median('plain'):9.0f} us"]
    for name, (packed, _) in layers.items():
        share = packed.tensors[0].nbytes / times.median(name) / read
        of_reading = f" {100 * share:3.0f} %" if M <= FEW_ROWS else ""
        if name == "plain":
            words[0] += of_reading
        else:
            words.append(f"{name}: {times.ratio('plain', name):.2f}{of_reading}")
    return ", ".join(words)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", action="append", help=f"KxN, by default {', '.join(SHAPES)}")
    parser.add_argument("--form", action="append", choices=FORMS)
    parser.add_argument("--rows", default="1,4,16,128,512,2048")
    parser.add_argument("--bits", default=",".join(map(str, PLANES)))
    parser.add_argument("--threads", default="1,2")
    given = parser.parse_args()
    keep_freed_memory()
    print("Times as fast as the plain layer, and, of few rows, the share of the read bandwidth.")
    for threads in numbers(given.threads):
        torch.set_num_threads(threads)
        limits = measure(threads)
        print(limits.line(), flush=True)
        for shape in given.shape or SHAPES:
            for form in given.form or FORMS:
                for name in given.dtype or DTYPES:
                    dtype = getattr(torch, name)
                    layers = pack_rivals(*numbers(shape), form, numbers(given.bits), dtype)
                    for M in numbers(given.rows):
                        x = torch.randn(M, numbers(shape)[0]).to(dtype)
                        line = compare(layers, x, limits.read["DRAM"])
                        print(f"{shape} {form} {name} {threads}T M = {M:4}: {line}", flush=True)


if __name__ == "__main__":
    main()
