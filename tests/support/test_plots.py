"""Pictures: files of the right kind, the same each time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from hylora_kernels.support import plots

PLOTS = {
    "loss": lambda path: plots.loss_plot({"a": [3.0, 2.5, 2.0], "b": [3.0]}, path, "title"),
    "spectrum": lambda path: plots.spectrum_plot({"q": [3.0, 2.0, 0.0], "k": [1.0]}, path),
    "sweep": lambda path: plots.sweep_plot({"r 0": [(0.8, 50), (0.6, 1e5)]}, path, dense=45.0),
    "one point": lambda path: plots.sweep_plot({"r 0": [(0.8, 50)]}, path),
    "frontier": lambda path: plots.frontier_plot(
        [(0.1, 1e300), (0.8, 1.2), (0.9, 1.05), (1.0, 1.0)], [(0.85, 1.09, 1.2)], 1.1, path
    ),
    "nothing measured": lambda path: plots.frontier_plot([(0.9, 2.0), (1.0, 1.0)], [], 1.1, path),
    "bars": lambda path: bars(path),
    "heat map": lambda path: heatmap(path),
    "beyond": lambda path: beyond(path),
}


def bars(path, limit=100.0):
    near = plots.Bar("a <b> & c", 20.0, "20", plots.BLUE)
    far = plots.Bar("far", 2e7, "2e+07", plots.ROSE)
    with plots.figure(path, 4.8, 2) as drawing:
        plots.draw_bars(drawing.add_subplot(), [near, far], reference=10.0, limit=limit)


def heatmap(path):
    with plots.figure(path, 4.8, 2) as drawing:
        mesh = plots.draw_heatmap(
            drawing.add_subplot(), {"q": {0: 0.1, 1: 0.5}, "k": {0: 1.0, 1: 0.2}}
        )
        drawing.colorbar(mesh)


def beyond(path):
    with plots.figure(path, 4.8, 4) as drawing:
        axes = drawing.add_subplot()
        plots.draw_lines(axes, [plots.Line([1, 2], [40, 90], "near", plots.BLUE, "o")])
        plots.scale_log(axes)
        plots.draw_beyond(axes, [(1.5, "far: 2e+07", plots.ROSE)])


@pytest.mark.parametrize("name, ending", [*((name, "png") for name in PLOTS), ("loss", "svg")])
def test_plots_write_a_picture_and_nothing_else(name, ending, tmp_path):
    path = tmp_path / "pictures" / f"one.{ending}"
    PLOTS[name](path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    begins = b"\x89PNG" if ending == "png" else b"<?xml"
    assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("name", ["runs/$$", "$x_", r"\frac{", "\udcff", "a\x1b\0b"])
def test_the_users_text_is_drawn_as_it_is(name, ending, tmp_path):
    """matplotlib reads text between dollars as a formula; a path may hold any character."""
    path, points = tmp_path / f"one.{ending}", [(0.8, 50.0), (0.6, 1e5)]
    plots.sweep_plot({name: points, "b": points}, path, dense=45.0, title=name)
    plots.loss_plot({name: [3.0, 2.5], "b": [3.0]}, path, name)
    plots.spectrum_plot({name: [3.0, 2.0, 1e-6], "k": [1.0]}, path, name)
    if ending == "svg":
        texts = [element.text for element in ElementTree.parse(path).iter() if element.text]
        drawn = re.sub(r"[\x00-\x1f\ud800-\udfff]", "\ufffd", name)
        assert texts.count(drawn) == 2  # the title and the legend
        assert {"1", "0.1", "1e-06"} <= set(texts)  # the ticks, no formulas


def test_an_embedded_picture_names_no_address_and_repeats_exactly(tmp_path):
    for folder in ("a", "b"):
        bars(tmp_path / folder / "bars.svg")
    first, second = (plots.embedded_svg(tmp_path / f / "bars.svg", "a < b") for f in ("a", "b"))
    assert first == second
    assert first.startswith("<svg ") and first.rstrip().endswith("</svg>")
    assert "http" not in first and "a &lt;b&gt; &amp; c" in first and "currentColor" in first
    assert 'role="img"><title>a &lt; b</title>' in first
    assert not re.search(r"<svg[^>]* (width|height)=", first)


def test_embedded_pictures_share_no_id(tmp_path):
    ids = []
    for name, draw in (("bars", bars), ("heat map", heatmap), ("beyond", beyond)):
        draw(tmp_path / f"{name}.svg")
        ids += re.findall(r' id="([^"]*)"', plots.embedded_svg(tmp_path / f"{name}.svg", name))
    assert ids and len(ids) == len(set(ids))


def test_texts_beyond_the_break_do_not_cover_one_another(tmp_path):
    far = [(1.9, f"stage {n}: {n}e+02", plots.ROSE) for n in (9, 4, 2)]
    with plots.figure(tmp_path / "one.png", 4.8, 4) as drawing:
        axes = drawing.add_subplot()
        plots.draw_lines(axes, [plots.Line([1, 2], [40, 90], "near", plots.BLUE, "o")])
        plots.scale_log(axes)
        plots.draw_beyond(axes, far)
    boxes = [text.get_window_extent() for text in axes.texts]
    lines = axes.lines[0].get_window_extent()
    assert [text.get_text() for text in axes.texts] == [text for _, text, _ in far]
    for above, below in zip(boxes, [*boxes[1:], lines], strict=True):
        assert above.y0 > below.y1


def test_a_bar_beyond_the_limit_is_broken_and_leaves_the_others_their_length(tmp_path):
    lengths = {}
    for limit in (100.0, 1e9):
        with plots.figure(tmp_path / "bars.png", 4.8, 2) as drawing:
            axes = drawing.add_subplot()
            values = [20.0, 40.0, 2e7]
            row = [plots.Bar(f"{v:g}", v, f"{v:g}", plots.BLUE) for v in values]
            plots.draw_bars(axes, row, limit=limit)
            share = 1 / axes.get_xlim()[1]
            lengths[limit] = [patch.get_width() * share for patch in axes.patches]
    assert len(lengths[100.0]) == 4 and len(lengths[1e9]) == 3  # the broken one is two pieces
    assert lengths[100.0][0] > 0.3 and lengths[1e9][0] < 1e-5


@pytest.mark.parametrize("colour", plots.COLOURS)
@pytest.mark.parametrize("page", ["#ffffff", "#14181d"])
def test_colours_stand_out_from_light_and_dark_pages(colour, page):
    """3 to 1 is what WCAG asks of graphics."""
    low, high = sorted(map(luminance, (colour, page)))
    assert (high + 0.05) / (low + 0.05) >= 3


def luminance(colour):
    """WCAG's relative luminance of "#rrggbb"."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
