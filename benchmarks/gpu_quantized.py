"""Quantised matrices on a GPU: 4 and 8 bits over bfloat16, one matrix and a whole model's decoding.

    python benchmarks/gpu_quantized.py llama-3.2-1b [--seconds 80] [--out runs/gpu]
    python benchmarks/gpu_quantized.py tiny          the same code on a CPU, in seconds

One matrix: replays of a CUDA graph that goes round copies larger than L2, torch's product of the
bfloat16 matrix in turns with ours of the codes; quantized.json is rewritten after every row.
Decoding: gpu_decode.py's, in our runtime, with all linears, the embedding and the head in codes;
models.json takes the rows, as model "NAME, quantised". Codes and weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_layers
import torch
import torch.nn.functional as F
from gpu_compressed import DTYPE, SHAPES, sharing_copy
from gpu_decode import DecodeBench
from gpu_models import TINY, Bench, Sizes
from torch import Tensor, nn

from hylora_kernels import optimize_for_inference, reference
from hylora_kernels.backends.triton.quantized import packed
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear, dense_weights
from hylora_kernels.model.structure import linears
from hylora_kernels.support.storage import write_json
from hylora_kernels.weights import GROUP, QuantizedMatrix

BITS = (4, 8)
ROWS = (1, 8, 16, 64, 2048)
MOST_COPIES = 32


def random_matrix(n: int, k: int, bits: int, device: torch.device) -> QuantizedMatrix:
    """Random codes; k is a multiple of 64. Outputs are about 1."""
    groups = k // GROUP

    def codes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=device)

    scales = torch.full((n, groups), 2 / 2**bits / k**0.5, dtype=torch.float16, device=device)
    zeros = None if bits == 8 else codes(-(-n * groups // GROUP), 8 * bits)
    return QuantizedMatrix(codes(n, groups, 8 * bits), scales, zeros, bits, k)


# --------------------------------------------------------------------------------------- one matrix


def layer_shapes(name: str) -> list[tuple[int, int]]:
    """(K, N) of a decoder's linears that differ."""
    hidden, inner, _, heads, kv_heads, _, _ = SHAPES[name]
    keys = hidden // heads * kv_heads
    return [(hidden, hidden), (hidden, keys), (hidden, inner), (inner, hidden)]


def copies(matrix: Tensor | packed.PackedQuantizedLayer, device: torch.device) -> list:
    """The matrix and copies of it, together larger than L2 three times, or MOST_COPIES."""
    L2 = torch.cuda.get_device_properties(device).L2_cache_size
    is_plain = isinstance(matrix, Tensor)
    size = matrix.nbytes if is_plain else sum(t.nbytes for t in matrix.tensors)
    more = min(MOST_COPIES, 3 * L2 // size + 1) - 1
    return [matrix, *(matrix.clone() if is_plain else copied(matrix) for _ in range(more))]


def copied(layer: packed.PackedQuantizedLayer) -> packed.PackedQuantizedLayer:
    W = layer.SVh
    tensors = {n: getattr(W, n) for n in ("words", "scales", "zeros")}
    clones = {n: None if t is None else t.clone() for n, t in tensors.items()}
    return dataclasses.replace(layer, SVh=dataclasses.replace(W, **clones))


def measure_matrix(K: int, N: int, M: int, device: torch.device) -> list[dict]:
    """A row for bfloat16 and for each width: seconds a call, and times as fast as bfloat16."""
    x = torch.randn(M, K, device=device).to(DTYPE)
    calls: dict[str, list[Callable]] = {}
    bytes_: dict[str, int] = {}
    for bits in BITS:
        matrix = random_matrix(N, K, bits, device)
        layer = packed.pack(dense_weights(matrix, dtype=DTYPE), DTYPE)
        W = reference.dequantize(matrix, DTYPE)
        check(f"{bits} bits, {K} to {N}, M = {M}", layer.forward(x, None), F.linear(x, W))
        if not calls:
            calls["bf16"] = [functools.partial(F.linear, x, w) for w in copies(W, device)]
            bytes_["bf16"] = W.nbytes
        name = f"{bits} bits"
        calls[name] = [functools.partial(one.forward, x, None) for one in copies(layer, device)]
        bytes_[name] = sum(t.nbytes for t in layer.tensors)
    contest = {name: (gpu_layers.graph_of(made), len(made)) for name, made in calls.items()}
    times = gpu_layers.in_turns(contest, rounds=9)
    return [
        {
            **{"K": K, "N": N, "M": M, "candidate": name, "seconds": seconds},
            "times_faster_than_bf16": times["bf16"] / seconds,
            "bytes_per_second": bytes_[name] / seconds,
        }
        for name, seconds in times.items()
    ]


def check(what: str, y: Tensor, expected: Tensor) -> None:
    """FloatingPointError from a relative error of 2 % on."""
    error = float((y - expected).float().norm() / expected.float().norm())
    if not error < 2e-2:
        raise FloatingPointError(f"{what} is wrong: relative error {error:.1e}")


def measure_matrices(bench: Bench, name: str, rows: tuple[int, ...]) -> None:
    found: list[dict] = []
    for K, N in layer_shapes(name):
        for M in rows:
            words = f"{K} to {N}, M = {M}"
            made = bench.attempt(words, 3, measure_matrix, K, N, M, bench.device)
            found += made or []
            write_json(bench.path.with_name("quantized.json"), found)
            for row in made or ():
                speed = row["times_faster_than_bf16"]
                us, rate = 1e6 * row["seconds"], row["bytes_per_second"] / 1e12
                bench.say(f"{words}, {row['candidate']}: {us:.1f} us, {speed:.2f}, {rate:.2f} TB/s")


# ------------------------------------------------------------------------------------- whole models


def quantised(dense: nn.Module, bits: int) -> nn.Module:
    """The dense model with random codes in the place of its linears, embedding and tied head."""
    model = sharing_copy(dense)
    for path, linear in linears(model).items():
        matrix = random_matrix(*linear.weight.shape, bits, dense.device)
        weights = dense_weights(matrix, linear.bias, DTYPE)
        model.set_submodule(path, QuantizedLinear.from_weights(weights, dtype=DTYPE))
    if dense.config.tie_word_embeddings:
        matrix = random_matrix(*dense.get_input_embeddings().weight.shape, bits, dense.device)
        embedding, head = QuantizedEmbedding.tied_pair(matrix, dtype=DTYPE)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
    return model.requires_grad_(False).eval()


class QuantizedBench(DecodeBench):
    """Decoding in our runtime: bfloat16 and each width."""

    def run(self) -> None:
        models = self.attempt("building", 0, self.models)
        for batch in self.sizes.batches if models else ():
            self.attempt(f"runtime, batch {batch}", 10, self.in_runtime, models, batch)
        if models:
            batch = self.sizes.batches[0]
            self.attempt("compiled", 60, self.in_runtime, models, batch, True)

    def models(self) -> dict[str, nn.Module]:
        found = {"dense": self.dense}
        for bits in BITS:
            model = quantised(self.dense, bits)
            layer, (path, *_) = linears(model), linears(model)
            x = torch.randn(3, layer[path].in_features, device=self.device).to(DTYPE)
            with torch.no_grad():
                expected = layer[path](x)
                optimize_for_inference(model)
                check(f"{path} at {bits} bits", model.get_submodule(path)(x), expected)
            found[f"{bits} bits"] = model
        return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=1e9, help="no part is begun after them")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    given = parser.parse_args(words)
    on_gpu = torch.cuda.is_available()
    if given.model != "tiny" and not on_gpu:
        sys.exit("benchmarks/gpu_quantized.py needs a GPU for any model but tiny: no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    sizes = Sizes(batches=(1, 8), seconds=1.0) if on_gpu else TINY
    bench = QuantizedBench(given.model, sizes, device, time.monotonic() + given.seconds, given.out)
    bench.name = f"{given.model}, quantised"
    bench.run()
    if on_gpu:
        measure_matrices(bench, given.model, ROWS)
    if bench.failures:
        sys.exit(f"parts that failed: {len(bench.failures)}, the first: {bench.failures[0]}")


if __name__ == "__main__":
    main()
