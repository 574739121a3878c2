"""The measured limits, and the rates of torch's own products beside them."""

from __future__ import annotations

from dataclasses import asdict

import torch
from limits import torch_products


def test_limits(benchmark, threads, limits, with_threads):
    with_threads(threads)
    found, products = limits(threads), torch_products(threads)
    benchmark.extra_info.update(suite="limits", torch_products=products, **asdict(found))
    words = ", ".join(f"{name} {rate / 1e12:.3f}" for name, rate in products.items())
    print(f"\n{found.line()}; torch.mm of 1024: {words} TFLOP/s", end="")
    a, b = torch.randn(2, 1024, 1024, dtype=torch.bfloat16)
    benchmark.pedantic(torch.mm, (a, b), rounds=3)
