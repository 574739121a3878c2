"""benchmarks/gpu_quantized.py on a CPU, its kernels in Triton's interpreter: every part runs,
checks and comes into the tables. Times mean nothing here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_layers
import gpu_models
import gpu_quantized
import gpu_results

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: benchmarks/gpu.sh"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed"),
]
WIDTHS = [f"{bits} bits" for bits in gpu_quantized.BITS]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    def in_turns(contest, rounds):
        assert all(calls == 2 for _, calls in contest.values()), "a matrix and a copy of it"
        return {name: 1e-6 for name in contest}

    monkeypatch.setattr(gpu_layers, "graph_of", lambda calls: [call() for call in calls])
    monkeypatch.setattr(gpu_layers, "in_turns", in_turns)
    monkeypatch.setattr(gpu_quantized, "MOST_COPIES", 2)
    properties = SimpleNamespace(L2_cache_size=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    torch.manual_seed(0)
    sizes, device = gpu_models.TINY, torch.device("cpu")
    return gpu_quantized.QuantizedBench("tiny", sizes, device, 1e18, tmp_path)


def test_a_model_decodes_in_each_width(bench, tmp_path):
    bench.run()
    assert bench.failures == []
    rows = json.loads((tmp_path / "models.json").read_text())
    assert [(row["mode"], row["candidate"]) for row in rows] == [
        (mode, name) for mode in ("runtime", "runtime compiled") for name in ("dense", *WIDTHS)
    ]


def test_each_matrix_is_checked_and_in_the_table(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_quantized, "layer_shapes", lambda name: [(128, 48)])
    gpu_quantized.measure_matrices(bench, "tiny", (1, 65))
    assert bench.failures == []
    rows = json.loads((tmp_path / "quantized.json").read_text())
    assert [(row["M"], row["candidate"]) for row in rows] == [
        (M, name) for M in (1, 65) for name in ("bf16", *WIDTHS)
    ]
    assert "| 128 to 48, M = 65 | 1.0 (1.00; " in gpu_results.render(tmp_path)


def test_a_wrong_product_is_a_failure(bench, monkeypatch):
    monkeypatch.setattr(gpu_quantized, "layer_shapes", lambda name: [(64, 16)])
    right = gpu_quantized.packed.PackedQuantizedLayer.forward
    monkeypatch.setattr(
        gpu_quantized.packed.PackedQuantizedLayer, "forward", lambda *given: 1.1 * right(*given)
    )
    gpu_quantized.measure_matrices(bench, "tiny", (1,))
    (failure,) = bench.failures
    assert "4 bits, 64 to 16, M = 1 is wrong: relative error 1.0e-01" in failure


def test_layer_shapes():
    assert gpu_quantized.layer_shapes("llama-3.2-1b") == [
        *((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048))
    ]
