"""The codes of a model's matrices: kept when interrupted, and those of experts nothing reached."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import tiny
from helpers.compressing import Interrupted, assert_same, interrupt_after, logits
from helpers.mixtures import mixture

from hylora_kernels.compression.quantize_model import quantize_model
from hylora_kernels.compression.workspace import Codes

IDS = tiny.tokens(4, 16)
QUICK = {"samples": 2, "measure": 0, "progress": False, "cache": False}


def test_experts_that_no_token_reaches_are_no_cheaper_than_their_siblings():
    model = mixture("mixtral")
    options = QUICK | {"calibration": IDS[:1, :4] % 31, "samples": 1}
    _, report = quantize_model(model, bits=4.5, **options)
    assert report.unreached
    least = {}
    for layer in report.layers:
        stack = layer.path.rpartition(".")[0]
        if "experts" in stack and layer.path not in report.unreached:
            least[stack] = min(least.get(stack, 16), layer.bits)
    for layer in report.layers:
        if layer.path in report.unreached and layer.path.rpartition(".")[0] in least:
            assert layer.bits >= least[layer.path.rpartition(".")[0]]


def test_one_pass_serves_linears_and_tables(tmp_path, monkeypatch):
    passes = []
    for name, module in (("gather", "calibration"), ("token_statistics", "compress")):
        place = importlib.import_module(f"hylora_kernels.compression.{module}")
        work = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *a, n=name, work=work: (passes.append(n), work(*a))[1]
        )
    options = QUICK | {"bits": 3.5, "calibration": tiny.tokens(18, 8), "samples": 18}
    options |= {"cache": tmp_path}
    whole, report = quantize_model(tiny.llama(), **options)
    assert passes == ["gather"]
    for file in tmp_path.rglob("codes-*/*embed_tokens*"):
        file.unlink()
    again, other = quantize_model(tiny.llama(), **options)
    assert passes == ["gather", "token_statistics"]
    assert_same(again, whole)
    assert report.tables == other.tables and report.tables[0].predicted_loss > 0


def test_interrupted_between_candidates(tmp_path, monkeypatch):
    options = QUICK | {"bits": 3.5, "calibration": IDS[:2], "cache": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, Codes, 20)
        quantize_model(tiny.llama(), **options)
    assert len(list(tmp_path.rglob("codes-*/*.safetensors"))) == 20
    resumed, report = quantize_model(tiny.llama(), **options)
    whole, other = quantize_model(tiny.llama(), **options | {"cache": False})
    assert_same(resumed, whole)
    assert report.layers == other.layers and report.tables == other.tables
    again, _ = quantize_model(
        tiny.llama(), **options | {"bits": 5}
    )  # It reads the same candidates.
    assert not torch.equal(logits(again, IDS), logits(whole, IDS))
