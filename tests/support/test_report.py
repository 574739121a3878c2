"""Reports as JSON."""

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


def test_a_printed_report_is_a_table(capsys):
    print(Outer(Inner((1, 2)), {"a": Inner((3,), torch.float32)}))
    shown = capsys.readouterr().out
    for text in (
        "Outer",
        "inner.dtype",
        "bfloat16",
        "layers.a.dtype",
        "worst",
        "Infinity",
        "count",
    ):
        assert text in shown
    assert "\x1b" not in shown and "Inner(" not in shown
    assert repr(Outer(Inner((1,)))).startswith("Outer(inner=Inner(ranks=(1,)")
