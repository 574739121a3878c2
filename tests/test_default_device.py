"""Everything works whatever torch's default device is; "meta" stands for a GPU here."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.compressing import assert_same, compressed
from helpers.mixtures import mixture

from hylora_kernels import (
    add_adapters,
    analyze_spectrum,
    evaluate,
    finetune,
    load_pretrained,
    merge_adapters,
    optimize_for_inference,
    restore_from_inference,
    save_pretrained,
)

IDS = tiny.tokens(6, 12)


def models(name: str):
    """The same model twice."""
    return [tiny.llama() if name == "llama" else mixture(name) for _ in range(2)]


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {"form": "pivoted"}),
        ("llama", {"form": "pair", "init": "classic", "factorizer": "randomized"}),
        ("llama", {"method": "svd", "ranks": "uniform"}),
        ("mixtral", {"refit": False}),
    ],
)
def test_compress(name, options, tmp_path):
    one, other = models(name)
    expected, _ = compressed(one, ids=IDS, **options)
    with torch.device("meta"):
        model, _ = compressed(other, ids=IDS, **options)
        save_pretrained(model, tmp_path)
        loaded = load_pretrained(tmp_path)
    assert_same(model, expected)
    assert_same(loaded, expected)


def test_adapters_training_and_inference(tmp_path):
    results = []
    for device in ("cpu", "meta"):
        model, dense = tiny.llama(), tiny.llama()
        with torch.device(device):
            add_adapters(model, 4, seed=1)
            finetune(model, IDS, steps=2, batch=2, length=12, merge=False, progress=False)
            merge_adapters(model)
            optimize_for_inference(model.eval())
            restore_from_inference(model)
            analyze_spectrum(dense, calibration=IDS, progress=False)
            report = evaluate(model, IDS, length=12, progress=False)
        results.append(report.perplexity)
    assert results[0] == results[1]
