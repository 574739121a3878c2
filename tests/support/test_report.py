"""Reports: as data, in words, as tables, as pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hylora_kernels.support import report


@dataclass(frozen=True)
class Inner:
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Outer(report.Report):
    inner: Inner
    layers: dict = field(default_factory=dict)
    path: Path = Path("runs") / "x"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tensor: torch.Tensor = field(default_factory=lambda: torch.tensor([1.5, 2.0]))
    count: np.int64 = field(default_factory=lambda: np.int64(3))
    worst: float = math.inf
    nothing: None = None


def test_a_nested_report_becomes_plain_json(tmp_path):
    made = Outer(Inner((1, 2)), {"a": Inner((3,), torch.float32), 7: {2, 1}})
    wanted = {
        "inner": {"ranks": [1, 2], "dtype": "bfloat16"},
        "layers": {"a": {"ranks": [3], "dtype": "float32"}, "7": [1, 2]},
        "path": str(Path("runs/x")),
        "device": "cpu",
        "tensor": [1.5, 2.0],
        "count": 3,
        "worst": "Infinity",
        "nothing": None,
    }
    assert made.to_dict() == wanted
    assert json.loads(made.to_json()) == wanted
    saved = made.save(tmp_path / "deep" / "report.json")
    assert json.loads(saved.read_text()) == wanted
    assert [p.name for p in saved.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "value, word", [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_what_json_has_no_number_for_reads_back_as_the_same_float(value, word):
    assert report.plain(value) == word
    assert repr(float(word)) == repr(value)


@pytest.mark.parametrize(
    "value", [torch.tensor(2), np.float32(0.5), torch.tensor(True), np.bool_(False), True, 3]
)
def test_single_values_stay_single(value):
    got = report.plain(value)
    assert got == value and type(got) in (int, float, bool)


def test_what_is_no_data_is_refused():
    with pytest.raises(TypeError, match=r"a report can't hold a Linear"):
        report.plain({"layer": nn.Linear(2, 2)})


def test_words():
    assert [report.format_bytes(n) for n in (0, 999, 1000, 269_030_000, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "269.0 MB",
        "2.5 TB",
    ]
    assert [report.format_count(n) for n in (7, 1234, 134_515_008, 1.1e9)] == [
        "7",
        "1.23 k",
        "134.52 M",
        "1.10 B",
    ]
    assert [report.format_ppl(p) for p in (None, 45.281, 128.44, 1.4e7)] == [
        "-",
        "45.28",
        "128.4",
        "1.4e+07",
    ]
    assert [report.format_seconds(s) for s in (2.04, 75.2, 3725)] == [
        "2.0 s",
        "1 min 15 s",
        "1 h 02 min",
    ]
    assert report.kept_removed(0.8) == "keep 0.800 (removed 0.200)"


def test_the_parameter_line_counts_a_tied_weight_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(10, 2))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    line = report.report_lines(model)
    assert line == "trainable 22 / total 62 parameters (35.48 %)"


def test_a_table_shows_every_cell_and_takes_brackets_literally(capsys):
    rows = [["[bold]x[/nonsense]", 1234567, 0.123456, None], ["y", 2, 1.4e7, True]]
    report.show(report.table("a [title]", ["name", "count", "share", "more"], rows))
    shown = capsys.readouterr().out
    for text in ("[bold]x[/nonsense]", "1,234,567", "0.1235", "-", "1.4e+07", "True", "a [title]"):
        assert text in shown
    report.show("plain [red]line[/red]")
    assert capsys.readouterr().out == "plain [red]line[/red]\n"


STAGES = [
    {"name": "dense", "keep": 1.0, "ppl": 44.8, "bytes_total": 269_000_000},
    {"name": "plain SVD", "keep": 0.78, "target": 0.8, "ppl": 1.4e7, "bytes_total": 226_000_000},
    {"name": "HyLoRA", "keep": 0.7998, "target": 0.8, "ppl": 44.6, "bytes_total": 226_000_000},
]
PLOTS = {
    "loss": lambda path: report.loss_plot({"a": [3.0, 2.5, 2.0], "b": [3.0]}, path, "title"),
    "spectrum": lambda path: report.spectrum_plot({"q": [3.0, 2.0, 0.0], "k": [1.0]}, path),
    "sweep": lambda path: report.sweep_plot({"r 0": [(0.8, 50), (0.6, 1e5)]}, path, dense=45.0),
    "one point": lambda path: report.sweep_plot({"r 0": [(0.8, 50)]}, path),
    "stages": lambda path: report.stages_plot(STAGES, path),
}


@pytest.mark.parametrize("name, ending", [*((name, "png") for name in PLOTS), ("loss", "svg")])
def test_plots_write_a_picture_and_nothing_else(name, ending, tmp_path):
    path = tmp_path / "pictures" / f"one.{ending}"
    PLOTS[name](path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    begins = b"\x89PNG" if ending == "png" else b"<?xml"
    assert path.read_bytes().startswith(begins)


def test_an_embedded_picture_names_no_address_and_repeats_exactly(tmp_path):
    for folder in ("a", "b"):
        PLOTS["stages"](tmp_path / folder / "stages.svg")
    first, second = (report.embedded_svg(tmp_path / f / "stages.svg") for f in ("a", "b"))
    assert first == second
    assert first.startswith("<svg ") and first.rstrip().endswith("</svg>")
    assert "http" not in first and "plain SVD 0.8" in first and "currentColor" in first


def test_a_stage_is_named_by_the_keep_it_was_asked_for():
    assert [report.stage_label(stage) for stage in STAGES] == [
        "dense",
        "plain SVD 0.8",
        "HyLoRA 0.8",
    ]
