"""Pictures: files of the right kind, the same each time."""

from __future__ import annotations

import pytest

from hylora_kernels.support import plots

STAGES = [
    {"name": "dense", "keep": 1.0, "ppl": 44.8, "bytes_total": 269_000_000},
    {"name": "plain SVD", "keep": 0.78, "target": 0.8, "ppl": 1.4e7, "bytes_total": 226_000_000},
    {"name": "HyLoRA", "keep": 0.7998, "target": 0.8, "ppl": 44.6, "bytes_total": 226_000_000},
]
PLOTS = {
    "loss": lambda path: plots.loss_plot({"a": [3.0, 2.5, 2.0], "b": [3.0]}, path, "title"),
    "spectrum": lambda path: plots.spectrum_plot({"q": [3.0, 2.0, 0.0], "k": [1.0]}, path),
    "sweep": lambda path: plots.sweep_plot({"r 0": [(0.8, 50), (0.6, 1e5)]}, path, dense=45.0),
    "one point": lambda path: plots.sweep_plot({"r 0": [(0.8, 50)]}, path),
    "stages": lambda path: plots.stages_plot(STAGES, path),
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
    first, second = (plots.embedded_svg(tmp_path / f / "stages.svg") for f in ("a", "b"))
    assert first == second
    assert first.startswith("<svg ") and first.rstrip().endswith("</svg>")
    assert "http" not in first and "plain SVD 0.8" in first and "currentColor" in first


def test_a_stage_is_named_by_the_keep_it_was_asked_for():
    assert [plots.stage_label(stage) for stage in STAGES] == [
        "dense",
        "plain SVD 0.8",
        "HyLoRA 0.8",
    ]
