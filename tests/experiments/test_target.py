"""The smallest keep within a ratio to the dense model's perplexity: the search, the real path."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.compressing import assert_same, logits
from helpers.zoo import tokens, trained

from hylora_kernels.compression.compress import Compression, compress
from hylora_kernels.evaluation.breadth import breadth
from hylora_kernels.experiments import target as targeting
from hylora_kernels.experiments.options import TargetOptions
from hylora_kernels.experiments.target import compress_to_ratio, search
from hylora_kernels.support.console import as_text

# ------------------------------------------------------------------------------------- the search

ALLOWED = math.log(1.1)


def searched(measured, predicted=lambda keep: 2 * (1 - keep) ** 1.6, lowest=0.05, evaluations=5):
    """(the keep found, what was measured on the way)."""
    seen = []

    def measure(keep):
        seen.append(keep)
        return measured(keep)

    return search(predicted, measure, ALLOWED, lowest, evaluations), seen


@pytest.mark.parametrize("factor", [0.2, 0.5, 0.97, 1.0, 1.6, 4.0])
@pytest.mark.parametrize("power", [1.0, 1.6, 2.5])
@pytest.mark.parametrize("bend", [0.0, 1.0])
def test_a_cost_near_the_prediction_is_met_in_few_evaluations(factor, power, bend):
    def measured(keep):
        return factor * (2 * (1 - keep) ** power + bend * (1 - keep) ** 4)

    found, seen = searched(measured, lambda keep: 2 * (1 - keep) ** power)
    assert len(seen) == len(set(seen)) <= 5
    assert found in seen and measured(found) <= ALLOWED
    smallest = next(step / 1000 for step in range(1000) if measured(step / 1000) <= ALLOWED)
    assert found - smallest <= 0.01


def test_an_exact_prediction_needs_one_evaluation():
    found, seen = searched(lambda keep: 2 * (1 - keep) ** 1.6)
    assert seen == [found]


def test_the_last_evaluation_aims_lower_if_none_was_within():
    found, seen = searched(lambda keep: 2.5 * (2 * (1 - keep) ** 1.6), evaluations=2)
    assert len(seen) == 2 and found == seen[1]


def test_the_smallest_feasible_keep_is_tried_and_may_do():
    found, seen = searched(lambda keep: 0.001 * (1 - keep), lowest=0.2071)
    assert found == seen[-1] == 0.208 and len(seen) <= 5


def test_a_cost_that_no_keep_meets():
    assert searched(lambda keep: 1.0) == (None, searched(lambda keep: 1.0)[1])
    assert searched(lambda keep: 1.0, lowest=1.0) == (None, [])


def test_steps_in_the_cost_end_the_search():
    """Ranks come in multiples: many keeps have the same."""

    def steps(keep):
        return 2 * (1 - math.floor(keep * 8) / 8) ** 1.6

    found, seen = searched(steps, steps)
    assert found in seen and steps(found) <= ALLOWED < steps(found - 0.126) and len(seen) <= 5


# ----------------------------------------------------------------------------------- the real path

IDS = tokens(24, 16, seed=77)
TEXTS = {"first": tokens(8, 16, seed=5), "second": tokens(8, 16, seed=6)}
SMALL = {"rank_multiple": 1, "lora_rank": 4, "refit_samples": 8, "progress": False}


def found(folder, model=None, **options):
    given = {"target_ratio": 1.3, "texts": TEXTS, "cache": folder / "cache", "calibration": IDS}
    return compress_to_ratio(
        trained("llama") if model is None else model,
        output_dir=folder / "out",
        **given | SMALL | options,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    return folder, *found(folder)


def test_the_chosen_model_is_within_the_ratio(made):
    _, model, report, frontier = made
    measured = breadth(model, TEXTS, trained("llama"), progress=False)
    assert 1 < measured.geometric_mean <= 1.3
    (point,) = [point for point in frontier.points if point.keep == frontier.chosen]
    assert point.ratio == pytest.approx(measured.geometric_mean, rel=1e-6)
    assert (point.worst, point.texts[point.worst]) == (
        measured.worst, pytest.approx(max(t.ratio for t in measured.texts), rel=1e-6),
    )  # fmt: skip
    assert report.options["keep"] == frontier.chosen and report.options["target_ratio"] == 1.3
    assert point.parameters == report.model_parameters and point.kept == pytest.approx(report.keep)
    smaller = [p for p in frontier.points if p.keep < frontier.chosen]
    assert all(p.ratio > 1.3 for p in smaller) and 1 <= len(frontier.points) <= 5


def test_it_is_the_model_that_compress_makes_of_that_keep(made):
    folder, model, _, frontier = made
    options = {"calibration": IDS, "cache": folder / "cache", **SMALL}
    want, _ = compress(trained("llama"), frontier.chosen, **options)
    assert_same(model, want)


def test_the_frontier_is_a_table_a_picture_and_a_dict(made):
    folder, _, _, frontier = made
    shown = as_text(frontier.render())
    for point in frontier.points:
        assert f"{point.keep:.3f}" in shown and f"{point.ratio:.3f}" in shown
        assert f"{point.parameters:,}" in shown and point.worst in shown
    assert f"{frontier.chosen:.3f} *" in shown and "1.3" in shown
    assert (folder / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    keeps, ratios = zip(*frontier.predicted, strict=True)
    assert list(keeps) == sorted(keeps) and ratios[-1] == 1.0
    assert json.loads(frontier.to_json())["chosen"] == frontier.chosen
    assert frontier.dense.keys() == TEXTS.keys()


def test_a_second_search_measures_nothing(made, monkeypatch):
    folder, model, _, frontier = made
    monkeypatch.setattr(targeting, "breadth", None)
    again, _, same = found(folder)
    assert_same(again, model)
    assert same == frontier


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch, made):
    measure, measured = targeting.breadth, []

    def stops(*arguments, **options):
        if len(measured) == 2:  # The dense model, and one keep.
            raise KeyboardInterrupt
        measured.append(arguments)
        return measure(*arguments, **options)

    monkeypatch.setattr(targeting, "breadth", stops)
    model = trained("llama")
    before = logits(model, IDS)
    with pytest.raises(KeyboardInterrupt):
        found(tmp_path, model, target_ratio=1.05)
    assert torch.equal(logits(model, IDS), before)
    files = {file: file.read_text() for file in (tmp_path / "out" / "frontier").iterdir()}
    assert len(files) == 2
    monkeypatch.setattr(targeting, "breadth", measure)
    monkeypatch.setattr(Compression, "factorize", None)
    _, _, frontier = found(tmp_path, target_ratio=1.05)
    assert {file: file.read_text() for file in files} == files
    assert frontier.chosen > made[-1].chosen


def test_a_keep_beyond_the_ratio_leaves_no_refit_in_the_cache(made):
    folder, *_ = made
    refits = list((folder / "cache").rglob("refit-*"))
    assert len(refits) == 1


@pytest.mark.parametrize("method", ["whitened", "svd"])
def test_singular_values_without_a_unit_serve_too(method, tmp_path):
    _, _, frontier = found(tmp_path, method=method)
    (point,) = [point for point in frontier.points if point.keep == frontier.chosen]
    assert point.ratio <= 1.3


def test_a_ratio_that_no_keep_meets_is_said_and_the_frontier_is_kept(tmp_path):
    model = trained("llama")
    before = logits(model, IDS)
    message = r"target_ratio=1.0001: no keep below 1 .* in 1 evaluations; the nearest, keep=0\.\d"
    with pytest.raises(ValueError, match=message):
        found(tmp_path, model, target_ratio=1.0001, evaluations=1, method="svd")
    assert torch.equal(logits(model, IDS), before)
    assert (tmp_path / "out" / "frontier.png").is_file()


def test_a_ratio_that_the_smallest_keep_meets_is_said(tmp_path):
    _, _, frontier = found(tmp_path, target_ratio=1e6, rank_multiple=8)
    assert frontier.note.startswith("the smallest feasible keep meets the target")
    assert frontier.chosen == min(point.keep for point in frontier.points)
    with pytest.raises(ValueError, match="can't be met: the smallest feasible keep"):
        compress(trained("llama"), frontier.chosen - 0.002, IDS, rank_multiple=8, cache=False)


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0.8}, "only one budget may be given, got keep=0.8 and target_ratio=1.1"),
        ({"target_mb": 80}, "got target_mb=80 and target_ratio=1.1"),
        ({"target_ratio": 1.0}, "target_ratio must be a finite number above 1, .*got 1.0"),
        ({"target_ratio": "1.1"}, "target_ratio must be a finite number above 1, .*got '1.1'"),
        ({"ranks": {"mlp": 0.5}}, "target_ratio needs a policy for all linears"),
        ({"evaluations": 0}, "evaluations must be an int of at least 1, got 0"),
        ({"limit": 0}, "limit must be an int of at least 1, got 0"),
    ],
)
def test_options_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        TargetOptions(output_dir="out", **given)


@pytest.mark.parametrize(
    ("calibration", "first"),
    [
        ("my.txt", ["my.txt"]),
        ("brown", ["brown"]),
        ([("a.txt", 8), ("self", 4), ("b.txt", None)], ["a.txt", "b.txt"]),
        (IDS, ["brown"]),
    ],
)
def test_the_texts_are_the_users_and_three_more(calibration, first):
    options = TargetOptions(output_dir="out", calibration=calibration)
    assert options.texts_or_default() == [*first, "python-docs", "code", "self"]
    assert TargetOptions(output_dir="out", texts=["brown"]).texts_or_default() == ["brown"]
