"""The texts that compress() reads: several sources that add up, the model's own among them."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from helpers import tiny
from helpers.compressing import SMALL, assert_same
from helpers.mixtures import mixture
from helpers.words import text_of, word_tokenizer
from helpers.zoo import zoo_model

from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.spectrum import analyze_spectrum
from hylora_kernels.text import self_text
from hylora_kernels.text.mix import Part, mixed_blocks
from hylora_kernels.text.sources import SPLIT_TEXTS

IDS = tiny.tokens(8, 8, words=41)
TEXT = [text_of(*range(1, 41)) for _ in range(3)]
OPTIONS = SMALL | {"tokenizer": word_tokenizer(), "length": 8, "samples": 4, "cache": False}
calibration = importlib.import_module("hylora_kernels.compression.calibration")


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """A small standard library: 200 times word 40."""
    train = {"train": text_of(*[40] * 200)}
    monkeypatch.setitem(SPLIT_TEXTS, "stdlib", train.__getitem__)


@pytest.fixture
def read(monkeypatch):
    """The token ids of each calibration."""
    seen, gather = [], calibration.gather

    def gathering(model, ids, *arguments):
        seen.append(ids)
        return gather(model, ids, *arguments)

    monkeypatch.setattr(calibration, "gather", gathering)
    return seen


@pytest.fixture
def written(monkeypatch):
    """The batches of text that a model wrote."""
    seen, write = [], self_text.Stream._write

    def writing(stream, number, *arguments):
        seen.append(number)
        return write(stream, number, *arguments)

    monkeypatch.setattr(self_text.Stream, "_write", writing)
    return seen


@pytest.mark.parametrize(
    ("calibration", "sources"),
    [
        (None, [Part("self", 2, 16, 2), Part("stdlib, train", 1, 8, 1)]),
        (TEXT, [Part("list", 4, 32, 4), Part("self", 2, 16, 2), Part("stdlib, train", 1, 8, 1)]),
        ([(TEXT, 99), ("self", 3)], [Part("list", 14, 112, 99), Part("self", 3, 24, 3)]),
        ([(TEXT, None)], [Part("list", 4, 32, 4)]),
        ([(IDS, 5), (TEXT, 1)], [Part("Tensor", 5, 40, 5), Part("list", 1, 8, 1)]),
        (IDS, [Part("Tensor", 4, 32, 4)]),
    ],
)
def test_the_report_says_what_was_read(calibration, sources, read):
    model, options = zoo_model("llama"), OPTIONS | {"seed": 5}
    wanted, _ = mixed_blocks(
        calibration, copy.deepcopy(model), OPTIONS["tokenizer"], 8, seed=5, blocks=4, progress=False
    )
    model, report = compress(model, 0.7, calibration, **options)
    assert report.sources == sources
    assert report.calibration_tokens == sum(part.tokens for part in sources)
    (ids,) = read
    assert torch.equal(ids, wanted)  # What the dense model writes.
    assert report.text_line().count(" tokens in ") == len(sources)


def test_the_first_blocks_which_the_refit_reads_hold_all_sources(read):
    compress(zoo_model("llama"), 0.7, [(TEXT, 8), (IDS % 20, 4), ("stdlib", 2)], **OPTIONS)
    (ids,) = read
    first = ids[: OPTIONS["refit_samples"]]
    assert {bool((row == 40).all()) for row in first} == {True, False}
    assert {bool((row < 20).all()) for row in first} == {True, False}


def test_the_plain_svd_reads_and_writes_nothing(written):
    mix = [("self", 4), ("none.txt", 2)]
    _, report = compress(zoo_model("llama"), 0.7, mix, method="svd", **OPTIONS)
    assert written == [] and report.sources == [] and report.text_line() == ""


def test_a_repeated_compression_reads_the_same_text_and_finds_its_factors(tmp_path, read, written):
    models = []
    for seed in (0, 0, 1):
        options = OPTIONS | {"cache": tmp_path / "factors", "seed": seed}
        models.append(compress(zoo_model("llama", seed=11), 0.7, TEXT, **options)[0])
    assert_same(*models[:2])
    assert written == [0, 0]  # Once for each seed.
    assert len(read) == 2


def test_nothing_is_written_for_a_budget_that_can_not_be_met(written):
    with pytest.raises(ValueError, match="keep"):
        compress(zoo_model("llama", seed=12), 1e-4, TEXT, **OPTIONS)
    assert written == []


def test_a_context_shorter_than_a_block_is_refused(written):
    model = zoo_model("llama", seed=13)
    model.config.max_position_embeddings = 6
    with pytest.raises(ValueError, match="length must be at most 6, the model's context, got 8"):
        compress(model, 0.7, **OPTIONS)
    assert written == []


@pytest.mark.parametrize(
    "model",
    [mixture("mixtral"), zoo_model("gpt2"), zoo_model("gemma3")],
    ids=["moe", "gpt2", "gemma3"],
)
def test_every_kind_of_model_writes_its_own_text(model):
    _, report = compress(model, 0.9, TEXT, **OPTIONS | {"rank_multiple": 1})
    assert [part.blocks for part in report.sources] == [4, 2, 1]


def test_a_model_without_a_tokenizer_takes_token_ids_alone():
    options = {name: value for name, value in OPTIONS.items() if name != "tokenizer"}
    compress(zoo_model("llama"), 0.9, [(IDS, 4)], **options)
    for calibration in (None, TEXT, [(IDS, 4), ("self", 2)]):
        with pytest.raises(ValueError, match="tokenizer must be given"):
            compress(zoo_model("llama"), 0.9, calibration, **options)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([("self", 0)], ValueError, r"calibration\[0\] must have an int of at least 1, or None"),
        ([("self", 2), TEXT[0]], TypeError, r"calibration\[1\] must be \(source, blocks\)"),
        ([("self", 2), ("self", 3)], ValueError, r"calibration\[1\] is 'self' again"),
    ],
)
def test_a_mix_that_is_none_is_refused_before_a_model_is_loaded(calibration, error, message):
    with pytest.raises(error, match=message):
        CompressOptions(calibration=calibration)
    with pytest.raises(error, match=message):
        compress("no-such/model", calibration=calibration)


def test_a_spectrum_is_measured_on_a_mix_too(read):
    options = {
        name: OPTIONS[name] for name in ("samples", "length", "tokenizer", "progress", "cache")
    }
    analyze_spectrum(zoo_model("llama"), "whitened", **options)
    analyze_spectrum(zoo_model("llama"), "whitened", [(TEXT, 3), ("self", 2)], **options)
    assert [len(ids) for ids in read] == [3, 5]
