"""What `make bench` times, once and untimed on small layers: the calls are right, and a run of a
test becomes a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import baselines
import ours
import report
from layers import Case, Shape, check, random_factors


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("ra", "form"), [(0, "pair"), (8, "pair"), (0, "pivoted")])
def test_all_sides_compute_the_same(dtype, ra, form):
    if ours.missing():
        pytest.skip(ours.missing())
    case = Case(Shape(64, 96, 24, ra), dtype, 3, "one copy", 1)
    x, factors = case.x(), random_factors(case.shape, case.torch_dtype, form)
    sides = {"packed": ours.packed(x, factors, case.regime), "op": ours.op(x, factors)}
    if form == "pair":
        names = ("b", "d") if ra == 0 else ("a", "b", "d")
        sides |= baselines.rivals(x, case.shape, factors, case.regime, names)
    for name, calls in sides.items():
        check(calls[0](), x, factors, name)


def test_the_table_of_models_layers():
    def result(M, regime, rival, ratio):
        return {"K": 960, "N": 2560, "r": 416, "dtype": "bf16", "M": M, "regime": regime,
                "threads": 1, "times_faster_than": {"b": 2.0, rival: ratio},
                "percent_of_limit": 84.6}  # fmt: skip

    shown = report.models_table([result(1, "DRAM", "d", 1.004), result(200, "L3", "d", 0.95)])
    assert shown.splitlines()[0] == "| layer | threads | over | M = 1, DRAM | M = 200 |"
    cells = "| 960 to 2560 r416 bf16 | 1 | (d) oneDNN | 1.00 85 % | 0.95 |"
    assert shown.splitlines()[2] == cells
    assert "(b) two products | 2.00 85 %" in report.models_table([result(1, "L3", "b", 2.0)])
    assert report.models_table([]) == ""
