"""Compressions that the tests share among processes."""

from __future__ import annotations

from pathlib import Path

from helpers.compressing import IDS, SMALL
from helpers.mixtures import mixture
from helpers.zoo import zoo_model

from hylora_kernels.compression.compress import compress

# name -> (architecture, options). There are 6 sequences, and 1 for a process that is left without.
CASES = {
    "plain": ("qwen2", {"keep": 0.7}),
    "passes": ("qwen2", {"keep": 0.7, "max_memory": 90_000, "cache": False}),
    "embedding": ("llama", {"keep": 0.7, "embedding_rank": 16, "form": "pair"}),
    "inputs alone": ("llama", {"keep": 0.7, "method": "whitened", "refit": False}),
    "no text": ("llama", {"keep": 0.7, "method": "svd"}),
    "ranks and bits": ("qwen2", {"target_mb": 0.1, "bits": "auto"}),
    "bits": ("qwen2", {"bits": 4.5, "low_rank": False}),
    "one sequence": ("llama", {"keep": 0.7, "samples": 1, "refit": False}),
    "experts": ("mixtral", {"keep": 0.8, "refit": False}),
}


def compressed_case(name: str, folder: Path, **more):
    """(the model, its report); folder: of the cache."""
    kind, options = CASES[name]
    model = mixture(kind) if kind == "mixtral" else zoo_model(kind)
    if options.get("method") != "svd":
        options = {"calibration": IDS[: options.get("samples", len(IDS))]} | options
    return compress(model, **{"cache": folder / name.replace(" ", "-")} | SMALL | options | more)
