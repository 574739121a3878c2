"""The table of keeps, ranks and adapters: its cells, its files, and taking it up again."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from helpers import tiny
from helpers.words import word_tokenizer

from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.experiments import sweep as sweeping
from hylora_kernels.experiments.options import SweepOptions
from hylora_kernels.support.console import show

IDS = tiny.tokens(6, 24)
OPTIONS = {"data": IDS, "calibration": IDS, "rank_multiple": 4, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return sweeping.sweep(model, folder, (0.9, 0.6), (0, 4), **OPTIONS), folder


def test_sweep_takes_a_model_and_its_options():
    model, *arguments = inspect.signature(sweeping.sweep).parameters.values()
    assert model.name == "model" and model.default is inspect.Parameter.empty
    assert arguments == list(inspect.signature(SweepOptions).parameters.values())
    assert [a.name for a in arguments[:4]] == ["output_dir", "keep", "lora_rank", "rank"]


def test_a_cell_passes_on_all_options_of_compress_that_a_sweep_has():
    names = {field.name for field in dataclasses.fields(CompressOptions)}
    own = {"keep", "lora_rank", "calibration", "samples", "length", "tokenizer", "device", "dtype"}
    own |= {"split", "column", "trust_remote_code", "target_params", "target_mb", "target_time"}
    own |= {"low_rank", "embedding_bits"}  # A grid of keeps has low-rank layers.
    own |= {"measure"}  # A cell is measured on held-out text.
    assert SweepOptions("out").for_compress().keys() == names - own


@pytest.mark.parametrize("grid", [{"keep": ()}, {"lora_rank": ()}, {"rank": ()}])
def test_an_empty_grid_is_refused(grid):
    with pytest.raises(ValueError, match=r"keep \(or rank\) and lora_rank must each have"):
        SweepOptions("out", **grid)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"keep": (0.8, 2.0)}, r"keep must be in \(0, 1\], got 2.0"),
        ({"keep": (0.8, float("nan"))}, r"keep must be in \(0, 1\], got nan"),
        ({"lora_rank": (4, -1)}, "lora_rank must be an int of at least 0, got -1"),
        ({"rank": (4, 0)}, "rank must be ints of at least 1, got 0"),
        ({"method": "svd", "refit": True}, "refit needs method"),
    ],
)
def test_a_cell_that_can_not_be_is_refused_before_the_first(grid, message):
    with pytest.raises(ValueError, match=message):
        SweepOptions("out", **grid)


def test_every_combination_is_a_cell_within_its_budget(made):
    report, _ = made
    asked = [(cell.keep_asked, cell.lora_rank) for cell in report.cells]
    assert asked == [(0.9, 0), (0.9, 4), (0.6, 0), (0.6, 4)]
    for cell in report.cells:
        assert cell.kept <= cell.keep_asked and cell.removed == 1 - cell.kept
        assert cell.params_linear == round(cell.kept * report.dense.params_linear)
        assert (cell.trainable > 0) == (cell.lora_rank > 0)
        assert cell.params_as_is >= cell.params_total
    assert report.dense.kept == 1 and report.tokens == 6 * 23


def test_the_given_model_is_left_as_it_is(made, model):
    assert not any("SVD" in type(m).__name__ for m in model.modules())
    assert made[0].dense.ppl == perplexity(model, IDS, progress=False).ppl


def test_it_is_written_and_shown(made, capsys):
    report, folder = made
    assert json.loads((folder / "sweep.json").read_text()) == report.to_dict()
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "cells").iterdir())) == 5
    show(report.render())
    shown = capsys.readouterr().out
    assert "removed" in shown and "dense" in shown and "0.9" in shown


def test_a_second_run_is_read_from_the_files(made, model, monkeypatch):
    report, folder = made
    monkeypatch.setattr(sweeping, "compress", None)
    assert sweeping.sweep(model, folder, (0.9, 0.6), (0, 4), **OPTIONS) == report


def test_a_missing_cell_is_made_again_the_same(made, model):
    _, folder = made
    before = {file: file.read_text() for file in (folder / "cells").iterdir()}
    lost = next(f for f, text in before.items() if '"keep_asked": 0.6' in text)
    lost.unlink()
    sweeping.sweep(model, folder, (0.9, 0.6), (0, 4), **OPTIONS)
    old, new = json.loads(before[lost]), json.loads(lost.read_text())
    assert {**old, "seconds": 0} == {**new, "seconds": 0}
    untouched = {f: t for f, t in before.items() if f != lost}
    assert {f: f.read_text() for f in untouched} == untouched


@pytest.mark.parametrize("change", [{"seed": 1}, {"form": "pair"}, {"data": tiny.tokens(4, 24)}])
def test_other_options_are_other_cells(made, model, change, monkeypatch):
    _, folder = made

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "_cell", stop)
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(model, folder, (0.9, 0.6), (0, 4), **(OPTIONS | change))


def test_plain_ranks_and_recovery(model, tmp_path):
    options = {**OPTIONS, "ranks": "global", "steps": 2, "form": "pair"}
    report = sweeping.sweep(model, tmp_path, rank=(4, 8), lora_rank=(0, 2), **options)
    assert [(c.rank, c.lora_rank, c.steps) for c in report.cells] == [
        (4, 0, 0),
        (4, 2, 2),
        (8, 0, 0),
        (8, 2, 2),
    ]
    assert report.cells[0].params_linear == report.cells[1].params_linear
    assert report.cells[0].params_linear < report.cells[2].params_linear
    # q, o [32, 32], k, v [16, 32], gate, up [48, 32], down [32, 48]; two blocks
    assert report.cells[0].params_linear == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)


def test_a_model_by_its_name_and_without_calibration(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    report = sweeping.sweep(
        str(tmp_path / "model"), tmp_path / "out", (0.8,), (0,),
        data=IDS, method="svd", rank_multiple=4, dtype="float32", progress=False,
    )  # fmt: skip
    assert report.cells[0].ppl > 1 and torch.isfinite(torch.tensor(report.cells[0].ppl))


def test_several_texts_have_ratios_their_mean_and_the_worst(model, tmp_path, capsys):
    texts = {"prose": IDS, "code": tiny.tokens(3, 24, seed=5)}
    report = sweeping.sweep(model, tmp_path, (0.7, 0.4), (0,), texts=texts, **OPTIONS)
    assert report.dense.breadth.geometric_mean is None
    for cell in report.cells:
        for text, dense, ids in zip(
            cell.breadth.texts, report.dense.breadth.texts, texts.values(), strict=True
        ):
            assert dense.ppl == perplexity(model, ids, progress=False).ppl
            assert text.ratio == pytest.approx(text.ppl / dense.ppl)
        ratios = {text.name: text.ratio for text in cell.breadth.texts}
        product = ratios["prose"] * ratios["code"]
        assert cell.breadth.geometric_mean == pytest.approx(product**0.5)
        assert ratios[cell.breadth.worst] == max(ratios.values())
        assert cell.ppl == cell.breadth.texts[0].ppl
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["cells"][1]["breadth"]["worst"] == report.cells[1].breadth.worst
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    show(report.render())
    shown = capsys.readouterr().out
    for text in ("prose", "code", "geometric", "worst"):
        assert text in shown
    with pytest.raises(ValueError, match="test goes with data, and texts are given"):
        SweepOptions("out", texts=texts, test=IDS)


def test_recovery_that_keeps_has_the_dense_model_as_teacher(model, tmp_path, monkeypatch):
    given = []
    finetune = sweeping.finetune

    def watched(student, ids, **options):
        assert isinstance(options["teacher"](), type(model)) and options["objective"] == "keep"
        given.append(finetune(student, ids, **options))

    monkeypatch.setattr(sweeping, "finetune", watched)
    options = {**OPTIONS, "steps": 2, "objective": "keep"}
    report = sweeping.sweep(model, tmp_path, (0.8,), (0, 4), **options)
    assert [cell.steps for cell in report.cells] == [0, 2]
    assert [found.options["distill"] for found in given] == [1.0] and given[0].teacher


# --------------------------------------------------------------------- text to train and to test on

WORDS = " ".join(f"w{i}" for i in range(1, 41))


def texts_of(model, data, **options):
    """The blocks that a sweep with training reads: "test", "calibration" and "training"."""
    options = {**OPTIONS, "length": 3, "steps": 9, "tokenizer": word_tokenizer(), **options}
    read = sweeping._texts(model, model, None, SweepOptions("out", **options | {"data": data}))
    return {**vars(read), "test": next(iter(read.test.values()))}


def test_a_mix_leaves_out_what_is_tested_on(model, tmp_path):
    """Each token stands once in the text."""
    (tmp_path / "a.txt").write_text(WORDS)
    mix = [(tmp_path / "a.txt", 9), (IDS[:, :3] % 3, 2)]
    read = texts_of(model, "brown", calibration=mix, test=str(tmp_path / "a.txt"), steps=0)
    assert [part.blocks for part in read["sources"]] == [9, 2]
    tested = set(read["test"].flatten().tolist())
    assert tested and not set(read["calibration"].flatten().tolist()) & tested


@pytest.mark.parametrize("kind", ["file", "list", "ids"])
def test_no_token_is_trained_and_tested_on(kind, model, tmp_path):
    """Each token stands once in the text."""
    (tmp_path / "a[1].txt").write_text(WORDS)
    ids = torch.arange(1, 41).view(-1, 4)
    data = {"file": tmp_path / "a[1].txt", "list": [WORDS], "ids": ids}[kind]
    read = texts_of(model, data, calibration=[(data, 9)] if kind == "file" else IDS % 40)
    trained, tested = (set(read[name].flatten().tolist()) for name in ("training", "test"))
    assert trained and tested and not trained & tested
    if kind == "file":
        assert not set(read["calibration"].flatten().tolist()) & tested


def test_another_text_to_test_on_is_read_whole(model, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.txt").write_text(WORDS)
    options = {"calibration": IDS % 40, "limit": 99}
    read = texts_of(model, tmp_path / "a.txt", test=tmp_path / "b.txt", **options)
    assert read["test"].shape == (13, 3)
    ids = IDS % 40
    assert texts_of(model, ids, test=ids + 1, **options)["test"].tolist() == (ids + 1).tolist()


def test_one_block_can_not_be_trained_and_tested_on(model):
    with pytest.raises(ValueError, match=r"1 block .* of which none can be held out: give test"):
        texts_of(model, IDS[:1] % 40)


def test_every_text_is_checked_before_the_first_cell(model):
    with pytest.raises(ValueError, match=r"token ids in \[0, 96\)"):
        texts_of(model, IDS, calibration=IDS + 90, tokenizer=None)
    with pytest.raises(ValueError, match="at most 64, the model's context, got 65"):
        texts_of(model, IDS, calibration=tiny.tokens(2, 65), tokenizer=None)
