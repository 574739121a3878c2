"""The row operations of a decoder block over torch's, as two Markdown tables.

    python benchmarks/row_ops.py [--threads 2] [--quick]

Attention of one query is over torch's scaled_dot_product_attention. 30 caches take turns, as those
of a model's layers do, so that keys and values come from the cache level that fits them. Both sides
pay for the call of an op, 2 to 8 us, which the decoder's step doesn't.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Times, interleave, keep_freed_memory

from hylora_kernels.backends.cpu import rows
from hylora_kernels.backends.cpu.library import LEVEL

LAYERS = 30
# Model -> heads, KV heads, head size, width, MLP width.
MODELS = {
    "SmolLM2-135M": (9, 3, 64, 576, 1536),
    "Qwen2.5-0.5B": (14, 2, 64, 896, 4864),
    "Llama-3.2-1B": (32, 8, 64, 2048, 8192),
    "Gemma-2-2B": (8, 4, 256, 2304, 9216),
}
KEYS = (128, 256, 1024, 4096)


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    if not got.is_floating_point():
        assert torch.equal(got, wanted)
        return
    error = (got.double() - wanted.double()).abs().max()
    assert error <= 8 * torch.finfo(got.dtype).eps * max(1, float(wanted.abs().max())), float(error)


def attention(model: str, keys: int, dtype: torch.dtype, budget: float) -> Times:
    heads, kv_heads, size, *_ = MODELS[model]
    q = torch.randn(1, 1, heads, size).to(dtype)
    caches = [torch.randn(2, 1, kv_heads, keys, size).to(dtype) for _ in range(LAYERS)]
    pieces = 1 if torch.get_num_threads() == 1 else torch.get_num_threads()

    def ours(k, v):
        return rows.attention(q, k, v, keys, scale=size**-0.5, pieces=pieces)

    def torch_s(k, v):
        query = q.transpose(1, 2)
        return F.scaled_dot_product_attention(query, k, v, enable_gqa=True).transpose(1, 2)

    check(ours(*caches[0]), torch_s(*caches[0]))
    sides = {"ours": ours, "torch": torch_s}
    return interleave(
        {name: [lambda f=f, c=c: f(*c) for c in caches] for name, f in sides.items()}, budget
    )


def others(model: str, dtype: torch.dtype, budget: float) -> dict[str, Times]:
    """One row of each of the other operations; torch's as transformers writes them."""
    heads, _, size, width, mlp = MODELS[model]
    x, residual = torch.randn(1, width).to(dtype), torch.randn(1, width).to(dtype)
    weight, gate, up = torch.rand(width), *torch.randn(2, 1, mlp).to(dtype)
    q, y = torch.randn(1, 1, heads, size).to(dtype), torch.empty(1, 1, heads, size, dtype=dtype)
    cos, sin = torch.rand(2, 1, size // 2)
    cos2, sin2 = (torch.cat((t, t), -1).to(dtype)[None, None] for t in (cos, sin))
    positions, logits = torch.zeros(1, 1, dtype=torch.int64), torch.randn(1, 49152).to(dtype)
    typed = weight.to(dtype)

    def torch_norm():
        total = (x + residual).float()
        normal = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)
        return typed * normal.to(dtype)

    def torch_rotary():
        a, b = q.chunk(2, -1)
        return q * cos2 + torch.cat((-b, a), -1) * sin2

    def our_rotary():
        rows.rotary(q, y, cos, sin, positions)
        return y

    options = dict(eps=1e-6, rounds_first=True, residual=residual)
    pairs = {
        "residual + RMSNorm": (lambda: rows.norm(x, weight, **options)[0], torch_norm),
        "rotary": (our_rotary, torch_rotary),
        "silu(gate) up": (lambda: rows.activation(gate, "silu", up), lambda: F.silu(gate) * up),
        "argmax of 49152": (lambda: rows.argmax(logits), lambda: logits.argmax(-1)),
    }
    times = {}
    for name, (ours, torch_s) in pairs.items():
        check(ours(), torch_s())
        times[name] = interleave({"ours": [ours] * 50, "torch": [torch_s] * 50}, budget)
    return times


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or '?'} cores"


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="SmolLM2 only, short measurements")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    budget = 0.1 if options.quick else 0.5
    models = list(MODELS)[: 1 if options.quick else None]
    print(f"{processor()}, level {LEVEL}, {options.threads} threads, torch {torch.__version__}\n")
    row(
        "attention of one query",
        "keys",
        "fp32 us",
        "GB/s",
        "torch us",
        "bf16 us",
        "GB/s",
        "torch us",
    )
    row(*["---"] * 8)
    with torch.inference_mode():
        for model in models:
            for keys in KEYS:
                cells: list[object] = [model, keys]
                for dtype in (torch.float32, torch.bfloat16):
                    times = attention(model, keys, dtype, budget)
                    _, kv_heads, size, *_ = MODELS[model]
                    read = 2 * kv_heads * keys * size * dtype.itemsize
                    ours = times.median("ours")
                    cells += [f"{1e6 * ours:.1f}", f"{read / ours / 1e9:.1f}"]
                    cells += [f"{1e6 * ours * times.ratio('torch', 'ours'):.1f}"]
                row(*cells)
        print()
        row("one row", "operation", "fp32 us", "torch us", "bf16 us", "torch us")
        row(*["---"] * 6)
        for model in models:
            measured = [others(model, dtype, budget) for dtype in (torch.float32, torch.bfloat16)]
            for name in measured[0]:
                cells = [model, name]
                for times in measured:
                    ours = times[name].median("ours")
                    cells += [f"{1e6 * ours:.1f}"]
                    cells += [f"{1e6 * ours * times[name].ratio('torch', 'ours'):.1f}"]
                row(*cells)


if __name__ == "__main__":
    main()
