"""The workspace: an interrupted compression continues, and finished work serves later ones."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from helpers.compressing import (
    IDS,
    SMALL,
    Interrupted,
    assert_same,
    compressed,
    interrupt_after,
)
from helpers.zoo import paths_of, tokens, zoo_model

from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.workspace import Refits, Workspace
from hylora_kernels.support.cache import cache_dir


@pytest.fixture
def calls(monkeypatch):
    """The work that was done: layers factorized, blocks refitted, passes over the text."""
    counts = {"layers": [], "blocks": [], "passes": 0}
    calibration = importlib.import_module("hylora_kernels.compression.calibration")
    candidates = importlib.import_module("hylora_kernels.compression.rank_candidates")
    refit = importlib.import_module("hylora_kernels.compression.refit")
    factorize, refit_block = candidates.factorize_whitened, refit._refit_block
    gather = calibration.gather

    def factorizing(path, *args):
        counts["layers"].append(path)
        return factorize(path, *args)

    def refitting(block, *args):
        counts["blocks"].append(block.path)
        return refit_block(block, *args)

    def gathering(*args):
        counts["passes"] += 1
        return gather(*args)

    monkeypatch.setattr(candidates, "factorize_whitened", factorizing)
    monkeypatch.setattr(refit, "_refit_block", refitting)
    monkeypatch.setattr(calibration, "gather", gathering)
    return counts


PATHS = [path for group in paths_of("qwen2") for path in group]


@functools.cache
def uninterrupted():
    return compressed(zoo_model("qwen2"))


@pytest.mark.parametrize(("done", "max_memory"), [(0, None), (9, None), (1, 1), (20, 1)])
def test_interrupted_while_factorizing(done, max_memory, tmp_path, monkeypatch, calls):
    options = {"cache": tmp_path, "max_memory": max_memory}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, Workspace, done)
        compressed(zoo_model("qwen2"), **options)
    calls["layers"].clear()
    resumed, report = compressed(zoo_model("qwen2"), **options)
    assert calls["layers"] == PATHS[done:]
    whole, other = uninterrupted()
    assert_same(resumed, whole)
    assert report.layers == other.layers


@pytest.mark.parametrize("done", [0, 1, 2])
def test_interrupted_while_refitting(done, tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, Refits, done)
        compressed(zoo_model("qwen2"), cache=tmp_path)
    calls["blocks"].clear()
    calls["layers"].clear()
    resumed, report = compressed(zoo_model("qwen2"), cache=tmp_path)
    assert calls["layers"] == []
    assert calls["blocks"] == [f"model.layers.{i}" for i in range(done, 3)]
    whole, other = uninterrupted()
    assert_same(resumed, whole)
    assert report.layers == other.layers


def test_an_interrupted_model_is_untouched(tmp_path, monkeypatch):
    model = zoo_model("qwen2")
    interrupt_after(monkeypatch, Refits, 1)
    with pytest.raises(Interrupted):
        compressed(model, cache=tmp_path)
    assert_same(model, zoo_model("qwen2"))


@pytest.mark.parametrize(
    "change",
    [
        {"keep": 0.5},
        {"form": "pair"},
        {"lora_rank": 0},
        {"ranks": "uniform"},
        {"init": "classic"},
        {"count": "as_is"},
        {"refit_samples": 3},
    ],
)
def test_the_factors_serve_other_options(change, tmp_path, calls):
    compressed(zoo_model("llama"), cache=tmp_path)
    calls["layers"].clear()
    calls["passes"] = 0
    again, _ = compressed(zoo_model("llama"), **{"cache": tmp_path} | change)
    assert calls["layers"] == [] and calls["passes"] == 0
    assert_same(again, compressed(zoo_model("llama"), **change)[0])


def change_a_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3


def change_the_config(model):
    model.config.rope_theta = 5.0


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"method": "whitened"}, None),
        ({"ids": tokens(6, 12, seed=3)}, None),
        ({"factorizer": "exact"}, None),
        ({"exclude": ["up_proj"]}, None),
        ({"dtype": torch.bfloat16}, None),
        ({}, change_a_weight),
        ({}, change_the_config),
    ],
)
def test_the_factors_of_something_else_are_not_taken(options, change, tmp_path, calls):
    compressed(zoo_model("llama"), cache=tmp_path)
    calls["layers"].clear()
    model = zoo_model("llama")
    if change:
        change(model)
    compressed(model, **{"cache": tmp_path} | options)
    assert len(calls["layers"]) == (12 if "exclude" in options else 14)


def files(folder):
    return {file for file in folder.rglob("*") if file.is_file()}


def test_without_a_cache_nothing_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path))  # Other tests use the session's.
    cache_dir("temporary")
    before = files(cache_dir())
    compressed(zoo_model("llama"))
    assert files(cache_dir()) == before
    interrupt_after(monkeypatch, Workspace, 3)
    with pytest.raises(Interrupted):
        compressed(zoo_model("llama"))
    assert files(cache_dir()) == before
    assert not [folder for folder in cache_dir("temporary").iterdir() if folder.is_dir()]


def test_the_cache_is_the_package_s_own_by_default(monkeypatch, tmp_path, calls):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path))
    compress(zoo_model("llama"), 0.7, IDS, **SMALL)
    assert len(files(cache_dir("compress"))) >= 14 and len(calls["layers"]) == 14
    compress(zoo_model("llama"), 0.7, IDS, **SMALL)
    assert len(calls["layers"]) == 14
