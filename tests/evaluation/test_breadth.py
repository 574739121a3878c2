"""Several texts beside the dense model: ratios, their mean, what is kept, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
from helpers import tiny

from hylora_kernels.evaluation.breadth import breadth
from hylora_kernels.evaluation.perplexity import perplexity

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


def test_a_dense_model_measured_before_is_not_measured_again(pair):
    model, dense = pair
    before = breadth(dense, TEXTS, **QUIET)
    report = breadth(model, TEXTS, before, **QUIET)
    assert report.texts == breadth(model, TEXTS, dense, **QUIET).texts
    assert report.dense == "the dense model"
    with pytest.raises(ValueError, match=r"dense was measured on \['prose', 'code'\], not on \['p"):
        breadth(model, {"prose": TEXTS["prose"]}, before, **QUIET)
