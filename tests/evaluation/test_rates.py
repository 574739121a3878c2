"""Rates: what is measured, what is fitted, and the table that keeps them."""

from __future__ import annotations

import json

import pytest
import torch

from hylora_kernels.evaluation import rates
from hylora_kernels.evaluation.rates import KINDS, Rate, Rates, rates_of, rates_path

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Layers of milliseconds, three sweeps, a cache of its own."""
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "SIZES", ((64, 96, 16), (128, 128, 32), (192, 256, 64)))
    monkeypatch.setattr(rates, "_cache_bytes", lambda device: 0)
    monkeypatch.setattr(rates, "SWEEPS", 4)


def by_the_formula(monkeypatch, latency=1e-6, per_weight=1e-9):
    """Every kind takes what a line says, and the call from Python 5 us more; returns the calls."""
    asked = []

    def measured(runs, device, label, progress):
        asked.append((label, len(next(iter(runs.values())))))
        return {
            (kind, s): 5e-6
            + (0 if s == rates.CALL else latency + per_weight * rates._weights(kind[0], s))
            for kind, s in runs
        }

    monkeypatch.setattr(rates, "_in_turns", measured)
    monkeypatch.setattr(rates, "_layer", lambda *kind: torch.nn.Linear(2, 2))
    return asked


def test_every_kind_is_measured_and_kept(small):
    found = rates_of(CPU, [torch.float32], [1, 24], progress=False)
    assert [(r.form, r.bits, r.rows) for r in found.rates] == [
        (*kind, rows) for rows in (1, 24) for kind in KINDS
    ]
    assert all(rate.per_weight > 0 <= rate.latency for rate in found.rates)
    path = rates_path("cpu")
    assert path.parent.name == "tuned" and path.name.startswith("rates-of-")
    assert json.loads(path.read_text())["rates"][0]["dtype"] == "float32"
    shown = str(found)
    assert "pivoted" in shown and "GB/s" in shown


def test_a_line_is_found_again_without_pythons_share(small, monkeypatch):
    by_the_formula(monkeypatch)
    found = rates_of(CPU, [torch.bfloat16], [1], progress=False)
    for rate in found.rates:
        assert rate.latency == pytest.approx(1e-6, rel=1e-3)
        assert rate.per_weight == pytest.approx(1e-9, rel=1e-3) and rate.off < 1e-3
    four = next(rate for rate in found.rates if rate.bits == 4)
    assert four.bytes_per_second() == pytest.approx((4 + 20 / 64) / 8 * 1e9, rel=1e-3)
    by_the_formula(monkeypatch, latency=-1e-6)  # Of noise: no layer takes less than nothing.
    found = rates_of(CPU, [torch.bfloat16], [1], progress=False, again=True)
    assert all(rate.latency == 0 < rate.per_weight for rate in found.rates)


def test_only_what_is_missing_is_measured(small, monkeypatch):
    asked = by_the_formula(monkeypatch)
    rates_of(CPU, [torch.float32], [1], progress=False)
    rates_of(CPU, [torch.float32], [0.25, 1], progress=False)
    assert [label for label, _ in asked] == ["rates, float32, 1 row"]
    rates_of(CPU, [torch.float32], [1, 700], progress=False)
    rates_of(CPU, [torch.float32], [512], progress=False)
    assert asked[1:] == [("rates, float32, 512 rows", 1)]  # The weights of one copy are enough.
    found = rates_of(CPU, [torch.bfloat16], [1], progress=False, again=True)
    assert {(r.dtype, r.rows) for r in found.rates} == {
        ("float32", 1), ("float32", 512), ("bfloat16", 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"version": "', '"version": "0.0'),
        lambda text: text.replace('"latency": ', '"latency": -'),
    ],
)
def test_a_table_that_cannot_be_read_is_measured_again(small, monkeypatch, damage):
    asked = by_the_formula(monkeypatch)
    before = rates_of(CPU, [torch.float32], [1], progress=False)
    path = rates_path("cpu")
    path.write_text(damage(path.read_text()))
    again = rates_of(CPU, [torch.float32], [1], progress=False)
    assert again.rates == before.rates and len(asked) == 2


def test_threads_have_tables_of_their_own(monkeypatch):
    names = set()
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        names.add(rates_path("cpu").name)
    monkeypatch.setenv("HYLORA_BACKEND", "eager")
    names.add(rates_path("cpu").name)
    assert len(names) == 3 and any(name.endswith("-2-threads.json") for name in names)


def test_seconds_of_a_layer():
    kept = [Rate("float32", "dense", 4, rows, 1e-5, rows * 1e-9, 0.0) for rows in (1, 512)]
    table = Rates("toy", kept, "1")
    one = table.seconds(torch.float32, "dense", 4, 1000, 1)
    assert one == pytest.approx(1.1e-5)
    assert table.seconds(torch.float32, "dense", 4, 1000, 0.25) == pytest.approx(one / 4)
    many = table.seconds(torch.float32, "dense", 4, 1000, 512)
    assert table.seconds(torch.float32, "dense", 4, 1000, 1024) == pytest.approx(2 * many)
    with pytest.raises(KeyError):
        table.seconds(torch.float32, "pair", 4, 1000, 1)
