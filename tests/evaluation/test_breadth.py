"""Several texts beside the dense model: ratios, their mean, what is kept, and what is refused."""

from __future__ import annotations

import json
import math
import sys
import weakref

import pytest
import torch
from helpers import tiny

from hylora_kernels.evaluation.breadth import BreadthReport, breadth
from hylora_kernels.evaluation.evaluate import evaluate
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.layers.linear import SVDLoRALinear

measuring = sys.modules["hylora_kernels.evaluation.breadth"]
QUIET = {"progress": False}
TEXTS = {"prose": tiny.tokens(3, 16), "code": tiny.tokens(5, 12, seed=1)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pair():
    """A compressed model and its dense one."""
    return tiny.adapted(tiny.llama()), tiny.llama()


def test_ratios_their_geometric_mean_and_the_worst(pair):
    model, dense = pair
    report = breadth(model, TEXTS, dense, **QUIET)
    ratios = []
    for text, ids in zip(report.texts, TEXTS.values(), strict=True):
        ours, theirs = (perplexity(m, ids, **QUIET).ppl for m in (model, dense))
        assert (text.ppl, text.dense_ppl) == (ours, theirs)
        assert text.ratio == pytest.approx(ours / theirs)
        ratios.append(ours / theirs)
    assert [(t.name, t.tokens) for t in report.texts] == [("prose", 45), ("code", 55)]
    assert report.geometric_mean == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    assert report.worst == max(report.texts, key=lambda text: text.ratio).name
    assert json.loads(report.to_json())["texts"][1]["ratio"] == report.texts[1].ratio


def test_a_text_of_its_own_is_written_by_the_dense_model(pair, monkeypatch):
    model, dense = pair
    asked = []

    def write(writer, tokenizer, count, length, part, progress):
        asked.append((writer, count, length, part))
        return tiny.tokens(count, length, seed=3)

    monkeypatch.setattr(measuring, "self_blocks", write)
    words = tiny.tokenizer("a b")
    report = breadth(model, ["self"], dense, words, length=10, limit=2, **QUIET)
    assert asked == [(dense, 2, 10, "test")]
    assert (report.texts[0].name, report.texts[0].tokens) == ("self", 18)
    breadth(dense, ["self"], None, words, length=10, limit=None, **QUIET)
    assert asked[1] == (dense, 8, 10, "test")
    with pytest.raises(ValueError, match=r"this model is compressed: give the dense model with de"):
        breadth(model, ["self"], None, words, **QUIET)


@pytest.mark.parametrize("way", ["module", "folder"])
def test_the_dense_models_perplexities_are_kept(pair, way, tmp_path, monkeypatch):
    model, dense = pair
    dense.save_pretrained(tmp_path / "dense")
    given = dense if way == "module" else tmp_path / "dense"
    first = breadth(model, TEXTS, given, **QUIET)
    measured = []

    def counted(model, blocks, batch, progress, text):
        measured.append(text)
        return perplexity(model, blocks, batch, progress, text)

    monkeypatch.setattr(measuring, "perplexity", counted)
    assert breadth(model, TEXTS, given, **QUIET) == first
    assert measured == ["prose", "code"]  # of the compressed model alone
    breadth(model, TEXTS | {"code": TEXTS["code"] + 1}, given, **QUIET)
    assert measured[2:] == ["dense, code", "prose", "code"]
    dense.model.embed_tokens.weight.data[0] += 1
    breadth(model, TEXTS, dense, **QUIET)
    assert measured[5:] == ["dense, prose", "dense, code", "prose", "code"]


def test_a_change_of_alpha_is_another_model(pair):
    """alpha stands in no state_dict."""
    base = tiny.adapted(tiny.llama())
    first = breadth(pair[0], TEXTS, base, **QUIET)
    for module in base.modules():
        if isinstance(module, SVDLoRALinear):
            module.B.data += 1
            module.alpha = 0.0
    second = breadth(pair[0], TEXTS, base, **QUIET)
    for module in base.modules():
        if isinstance(module, SVDLoRALinear):
            module.alpha = 0.5
    third = breadth(pair[0], TEXTS, base, **QUIET)
    found = {report.texts[0].dense_ppl for report in (first, second, third)}
    assert len(found) == 3


def test_an_offloaded_dense_model_is_measured_and_not_kept(pair, tmp_path):
    from accelerate import cpu_offload

    model, dense = pair
    want = breadth(model, TEXTS, dense, **QUIET).texts
    offloaded = cpu_offload(tiny.llama(), execution_device="cpu")
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    kept = sorted((tmp_path / "cache" / "perplexity").iterdir())
    found = breadth(model, TEXTS, offloaded, **QUIET).texts
    assert [text.dense_ppl for text in found] == pytest.approx([text.dense_ppl for text in want])
    assert sorted((tmp_path / "cache" / "perplexity").iterdir()) == kept


def test_a_dense_model_that_was_loaded_is_gone_before_the_other_is_measured(pair, monkeypatch):
    model, _ = pair
    loaded, gone = [], []

    def load(name, device, dtype):
        copy = tiny.llama(dtype)
        loaded.append((weakref.ref(copy), name, device, dtype))
        return copy, None

    def watched(measured, *arguments):
        if measured is model:
            gone.append(loaded[0][0]() is None)
        return perplexity(measured, *arguments)

    monkeypatch.setattr(measuring, "load_model", load)
    monkeypatch.setattr(measuring, "perplexity", watched)
    report = breadth(model, TEXTS, "my-org/dense", **QUIET)
    assert gone == [True, True] and report.dense == "my-org/dense"
    assert loaded[0][1:] == ("my-org/dense", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("broken", ["this", "dense"])
def test_a_loss_that_is_not_finite_names_text_and_block(pair, broken):
    model, dense = pair
    texts = {name: ids % 95 for name, ids in TEXTS.items()}
    texts["code"][3, 2] = 95
    (model if broken == "this" else dense).model.embed_tokens.weight.data[95] = math.nan
    where = "perplexity, code" if broken == "this" else "perplexity, dense, code"
    with pytest.raises(FloatingPointError, match=f"{where}: the loss of block 3 is nan"):
        breadth(model, texts, dense, **QUIET)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts must be at least one source"),
        ("brown", "texts must be a list of sources, or a dict of named ones, got 'brown'"),
        (["brown", "brown"], "texts must differ, got 'brown' twice"),
        (
            {"a": tiny.tokens(2, 65)},
            r"texts\['a'\]: length must be at most 64, the model's context, got 65",
        ),
        ({"a": tiny.tokens(2, 8) + 90}, r"token ids in \[0, 96\)"),
    ],
)
def test_texts_that_are_refused(pair, texts, message):
    with pytest.raises((ValueError, TypeError), match=message):
        breadth(*pair[:1], texts, **QUIET)


def test_a_dense_model_of_other_words_is_refused(pair):
    with pytest.raises(ValueError, match="dense must know the model's 96 tokens, not 80"):
        breadth(pair[0], {"a": tiny.tokens(2, 8) % 80}, tiny.llama(vocab_size=80), **QUIET)


def test_without_a_dense_model_there_are_no_ratios(pair, tmp_path):
    report = breadth(pair[0], TEXTS, **QUIET)
    assert {(t.dense_ppl, t.ratio) for t in report.texts} == {(None, None)}
    assert (report.geometric_mean, report.worst, report.dense) == (None, None, None)
    assert "geometric mean" not in str(report) and "prose" in str(report)
    with pytest.raises(ValueError, match="dense must be given"):
        report.plot(tmp_path / "a.png")


def test_table_and_picture(pair, tmp_path):
    report = breadth(pair[0], TEXTS, pair[1], **QUIET)
    assert BreadthReport.from_dict(json.loads(report.to_json())) == report
    shown = str(report)
    for text in ("prose", "code", "geometric mean", "worst: ", f"{report.geometric_mean:.2f}"):
        assert text in shown
    report.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_measures_several_texts(pair):
    model, dense = pair
    report = evaluate(model, texts=TEXTS, dense=dense, limit=2, speed=False, **QUIET)
    assert report.breadth == breadth(model, TEXTS, dense, limit=2, **QUIET)
    assert report.perplexity == report.breadth.texts[0] and report.data == "Tensor"
    alone = evaluate(model, TEXTS["code"], dense=dense, speed=False, **QUIET)
    (text,) = alone.breadth.texts
    assert text.ratio == pytest.approx(report.breadth.texts[1].ratio, rel=0.5)
    assert text.tokens == 55 and "geometric mean" in str(alone) and "linears" in str(alone)
    for name in ("data", "test"):
        with pytest.raises(ValueError, match=f"{name} must be left out where texts are given, got"):
            evaluate(model, texts=TEXTS, **{name: TEXTS["code"]}, **QUIET)


def test_a_dense_model_measured_before_is_not_measured_again(pair):
    model, dense = pair
    before = breadth(dense, TEXTS, **QUIET)
    report = breadth(model, TEXTS, before, **QUIET)
    assert report.texts == breadth(model, TEXTS, dense, **QUIET).texts
    assert report.dense == "the dense model"
    with pytest.raises(ValueError, match=r"dense was measured on \['prose', 'code'\], not on \['p"):
        breadth(model, {"prose": TEXTS["prose"]}, before, **QUIET)
