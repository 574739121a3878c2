"""Pictures: lines, bars and heat maps, drawn one way everywhere.

`figure` opens a picture, the draw_* functions fill its axes, and the *_plot functions are whole
pictures. The ending of a path (.png, .svg) is the format.
"""

from __future__ import annotations

import contextlib
import html
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hylora_kernels.support.console import format_ppl
from hylora_kernels.support.storage import atomic_path

# The colour of lines and letters. A page replaces it by its own text colour (embedded_svg).
INK = "#1f2933"

# Each has a contrast of at least 3 against white and against a dark page (tests/support).
GREY, OCHRE, ROSE, PURPLE = "#7a828c", "#a8862a", "#c2476b", "#8f66b8"
BLUE, TEAL, GREEN, ORANGE = "#2f7fc1", "#1f93a0", "#2f9460", "#d1622b"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, ROSE, GREY, OCHRE, TEAL)

# A path may hold them, but neither the font engine (surrogates) nor XML (control characters) does.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

LONGEST_RATIO = 4.0  # A ratio of perplexities beyond it is a broken bar.
FONT_SIZE = (
    10.5  # points, of every letter: a picture 4.8 inches wide shows them 10 px high at 340 px
)


@dataclass(frozen=True)
class Line:
    """Points joined by a line; a line without a label is not in the legend."""

    xs: Sequence[float]
    ys: Sequence[float]
    label: str | None
    colour: str
    marker: str = ""
    dashed: bool = False
    width: float = 1.5
    opacity: float = 1.0


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of length `value`, with a label above it and a text at its end."""

    label: str
    value: float
    text: str
    colour: str


# ---------------------------------------------------------------------------------- whole pictures


def loss_plot(curves: Mapping[str, Sequence[float]], path: str | Path, title: str = "") -> None:
    """curves: name -> the loss of every step from the first, nats a token; thick: running mean."""
    with figure(path, 6.4, 3.6) as drawing:
        axes = drawing.add_subplot()
        for (name, losses), colour in zip(curves.items(), _colours(), strict=False):
            steps = range(1, len(losses) + 1)
            smooth = Line(steps, _running_mean(losses), name, colour, width=2)
            draw_lines(axes, [Line(steps, losses, None, colour, opacity=0.3, width=1), smooth])
        axes.set(title=title, xlabel="step", ylabel="loss (nats a token)")
        draw_legend(axes)


def spectrum_plot(
    spectra: Mapping[str, Sequence[float]], path: str | Path, title: str = ""
) -> None:
    """spectra: layer type -> its singular values, falling; left how they fall, right their energy.

    Both over the share of the full rank, so that types of different sizes can be compared.
    """
    with figure(path, 9.6, 4.4) as drawing:
        left, right = drawing.subplots(1, 2)
        for (name, values), colour in zip(spectra.items(), _colours(), strict=False):
            values = [float(v) for v in values]
            shares = [(i + 1) / len(values) for i in range(len(values))]
            largest, energy = values[0] or 1.0, _cumulated([v * v for v in values])
            draw_lines(left, [Line(shares, [v / largest for v in values], name, colour)])
            kept = [e / (energy[-1] or 1.0) for e in energy]
            draw_lines(right, [Line(shares, kept, name, colour)])
        left.set(title=title, ylabel="singular value / largest")
        scale_log(left)
        right.set(ylabel="energy kept", ylim=(0, 1.02))
        for share in (0.9, 0.95, 0.99):
            draw_reference(right, share)
        for axes in (left, right):
            axes.set(xlabel="rank / full rank", xlim=(0, 1))
        draw_legend(right, columns=3)


def budget_plot(
    losses: Mapping[str, Mapping[int, float]],
    ranks: Mapping[str, Mapping[int, float]],
    path: str | Path,
    title: str = "",
    bits: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """losses: layer type -> block -> predicted increase of the loss, nats a token; left, the blocks
    from input to output. ranks: the same of rank / full rank; bits: of bits; right. Each may be
    empty."""
    maps = [("rank / full rank", ranks, 1.0), ("bits", bits or {}, 16.0)]
    maps = [(label, rows, most) for label, rows, most in maps if rows]
    count = len(maps) + bool(losses)
    with figure(path, 1.6 + 4 * count, 0.3 * max(len(rows) for _, rows, _ in maps) + 3) as drawing:
        panels = list(drawing.subplots(1, count, squeeze=False)[0])
        if losses:
            draw_stacks(panels[0], losses)
            panels[0].set(ylabel="predicted loss (nats a token)")
            draw_legend(panels[0], columns=3)
        for panel, (label, rows, most) in zip(panels[-len(maps) :], maps, strict=True):
            mesh = draw_heatmap(panel, rows, most)
            drawing.colorbar(mesh, ax=panel, label=label)
        for panel in panels:
            panel.set_xlabel("block")
        panels[0].set_title(title)


def sweep_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    xlabel: str = "keep",
    dense: float | None = None,
    title: str = "",
    ylabel: str = "perplexity",
    dashed: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """series: name -> (x, y) points; dashed: as many more, in the same colours. dense: the y of the
    untouched model, a line."""
    with figure(path, 6.4, 4.4) as drawing:
        axes = drawing.add_subplot()
        for lines in (series, dashed or {}):
            for (name, points), colour in zip(lines.items(), _colours(), strict=False):
                xs, ys = zip(*sorted(points), strict=True)
                line = Line(xs, ys, name, colour, marker="o", dashed=lines is dashed)
                draw_lines(axes, [line])
        if dense is not None:
            draw_reference(axes, dense, f"dense {format_ppl(dense)}")
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        scale_log(axes)
        draw_legend(axes)


def ratio_plot(
    texts: Mapping[str, tuple[float, float]], mean: float, path: str | Path, title: str = ""
) -> None:
    """texts: name -> (ratio to the dense model's perplexity, perplexity), a bar each, and a bar of
    their geometric mean; the dense model, 1, is marked."""
    bars = [
        Bar(name, ratio, f"{ratio:.2f} ({format_ppl(ppl)})", BLUE)
        for name, (ratio, ppl) in texts.items()
    ]
    bars.append(Bar("geometric mean", mean, f"{mean:.2f}", ORANGE))
    with figure(path, 6.4, 0.44 * len(bars) + 0.9) as drawing:
        axes = drawing.add_subplot()
        draw_bars(axes, bars, reference=1.0, limit=LONGEST_RATIO)
        axes.set_title(title, loc="left")


def frontier_plot(
    predicted: Sequence[tuple[float, float]],
    measured: Sequence[tuple[float, float, float]],
    target: float,
    path: str | Path,
    title: str = "",
) -> None:
    """Ratios to the dense model's perplexity over keep.

    predicted: (keep, ratio). measured: (keep, geometric mean of the texts' ratios, the worst one).
    A prediction far above all that was measured is cut off.
    """
    highest = 1.5 * max([target, *(worst for _, _, worst in measured)])
    shown = [(keep, ratio) for keep, ratio in predicted if ratio <= highest]
    series = [("predicted", shown, GREY, "")]
    series.append(("measured", [point[:2] for point in measured], BLUE, "o"))
    series.append(("the worst text", [point[::2] for point in measured], ORANGE, "^"))
    with figure(path, 6.4, 4.4) as drawing:
        axes = drawing.add_subplot()
        for label, points, colour, marker in series:
            if points:
                xs, ys = zip(*sorted(points), strict=True)
                draw_lines(axes, [Line(xs, ys, label, colour, marker, dashed=not marker)])
        draw_reference(axes, target, f"target {target:g}")
        axes.set(title=title, xlabel="keep", ylabel="perplexity / dense")
        scale_log(axes)
        draw_legend(axes, columns=3)


# ------------------------------------------------------------------------------- parts of a picture


@contextlib.contextmanager
def figure(path: str | Path, width: float, height: float) -> Iterator:
    """A matplotlib figure of width x height inches, written to `path` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    style = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.labelsize": FONT_SIZE,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlesize": FONT_SIZE,
        "font.family": "sans-serif",
        "font.size": FONT_SIZE,
        "legend.fontsize": FONT_SIZE,
        "legend.frameon": False,
        "svg.fonttype": "none",  # letters stay letters: smaller, and in the page's own font
        "svg.hashsalt": Path(path).name,  # ids that repeat, yet differ between a page's pictures
        "text.color": INK,
        "text.parse_math": False,  # a $ in the name of a model is a $
        "xtick.color": INK,
        "xtick.labelsize": FONT_SIZE,
        "ytick.color": INK,
        "ytick.labelsize": FONT_SIZE,
    }
    is_svg = Path(path).suffix == ".svg"
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing
        for text in drawing.findobj(Text):
            text.set_text(UNPRINTABLE.sub("\ufffd", text.get_text()))
        with atomic_path(path) as temporary:
            metadata = {"Date": None} if is_svg else None
            drawing.savefig(temporary, dpi=160, transparent=is_svg, metadata=metadata)


def draw_lines(axes, lines: Sequence[Line]) -> None:
    for line in lines:
        axes.plot(
            line.xs,
            line.ys,
            label=line.label,
            color=line.colour,
            marker=line.marker,
            markersize=6,
            linestyle="--" if line.dashed else "-",
            linewidth=line.width,
            alpha=line.opacity,
        )


def draw_bars(
    axes,
    bars: Sequence[Bar],
    reference: float | None = None,
    limit: float = math.inf,
    labels: bool = True,
) -> None:
    """Horizontal bars from zero, the first on top, without an axis.

    reference: a value that is marked on every bar.
    limit:     a longer bar is broken, and ends a little beyond the longest of the others.
    """
    longest = max((bar.value for bar in bars if bar.value <= limit), default=1.0)
    for row, bar in enumerate(bars):
        end = bar.value if bar.value <= limit else 1.16 * longest
        pieces = [(0, end)] if bar.value <= limit else [(0, longest), (1.05 * longest, end)]
        for start, stop in pieces:
            axes.barh(row, stop - start, height=0.38, left=start, color=bar.colour)
        if bar.value > limit:
            _draw_break(axes, row, longest)
        if reference is not None:
            axes.plot([reference] * 2, [row - 0.19, row + 0.19], color=INK, linewidth=1.5)
        _annotate(axes, bar.text, (max(end, reference or 0), row), (5, 0), va="center")
        if labels:
            _annotate(axes, bar.label, (0, row - 0.21), (0, 1), va="bottom")
    axes.set(xlim=(0, 1.36 * longest), ylim=(len(bars) - 0.6, -0.85))
    axes.set_axis_off()


def draw_stacks(axes, rows: Mapping[str, Mapping[int, float]]) -> None:
    """rows: label -> place -> value >= 0; at each place a bar, the rows one upon the other."""
    tops: dict[int, float] = {}
    for (label, row), colour in zip(rows.items(), _colours(), strict=False):
        bottoms = [tops.get(place, 0.0) for place in row]
        axes.bar(list(row), list(row.values()), 0.85, bottoms, label=label, color=colour)
        tops |= {place: tops.get(place, 0.0) + value for place, value in row.items()}


def draw_reference(axes, value: float, label: str = "") -> None:
    """A dashed horizontal line, its label over the right end."""
    axes.axhline(value, color=INK, linewidth=1, linestyle="--", alpha=0.5)
    if label:
        at = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        _annotate(axes, label, (1, value), (0, 2), **at)


def draw_heatmap(axes, rows: Mapping[str, Mapping[int, float]], most: float = 1.0):
    """rows: label -> column -> value in [0, most], the first row on top; returns what a colour bar
    needs."""
    width = 1 + max((column for row in rows.values() for column in row), default=0)
    values = [[row.get(column, math.nan) for column in range(width)] for row in rows.values()]
    no_seams = {"edgecolors": "face", "linewidth": 0.3}
    mesh = axes.pcolormesh(values, cmap="viridis", vmin=0, vmax=most, **no_seams)
    axes.set_yticks([place + 0.5 for place in range(len(rows))], list(rows))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def draw_legend(axes, columns: int = 2) -> None:
    """Below the picture; of a single line there is none."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def scale_log(axes) -> None:
    """A log y axis of the lines that are drawn, its ticks numbers to read (50), not powers (10^2).

    matplotlib writes powers as mathtext, which `figure` switches off.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.dataLim.intervaly
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if high < 10 * low else (1, 2, 5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def draw_beyond(axes, points: Sequence[tuple[float, str, str]]) -> None:
    """Points above the plot's values, (x, text, colour): arrows beyond a break in the y axis, the
    first on top and each in a row of its own, so that no text covers another.

    The y axis is logarithmic and has all other points already.
    """
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    share = 0.1 + 0.07 * len(points)  # of the axis, above the break
    axes.set_ylim(low, high * (high / low) ** (share / (1 - share)))
    axes.set_yticks(ticks)
    axes.spines.left.set_bounds(low, high)
    for middle in (0.0, 0.024):
        ys = [1 - share + middle + slope for slope in (-0.012, 0.012)]
        place = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([-0.02, 0.02], ys, color=INK, linewidth=1, **place)
    at = axes.get_xaxis_transform()  # x in data, y as a share of the axis
    for row, (x, text, colour) in enumerate(points):
        y = 0.95 - 0.07 * row
        axes.plot(x, y, marker="^", markersize=7, color=colour, transform=at)
        _annotate(axes, text, (x, y), (-7, 0), xycoords=at, ha="right", va="center")


# ------------------------------------------------------------------------------------ in a web page


def embedded_svg(path: str | Path, title: str) -> str:
    """An .svg written here, as an element of an HTML page.

    It has no prolog, no metadata, no address and no id that nothing refers to, is as wide as the
    page allows, is drawn in the page's own text colour, and is read out as `title`.
    """
    text = Path(path).read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    text = f'{opening} role="img"><title>{html.escape(title)}</title>{rest}'
    return text.replace(INK, "currentColor")


# ------------------------------------------------------------------------------------------ helpers


def _colours() -> Iterator[str]:
    return itertools.cycle(COLOURS)


def _annotate(axes, text: str, at: tuple[float, float], offset: tuple[float, float], **where):
    note = axes.annotate(text, at, offset, textcoords="offset points", **where)
    note.set_in_layout(False)  # a long label must not narrow the plot


def _draw_break(axes, row: int, longest: float) -> None:
    """Two slanted strokes in the gap of a broken bar."""
    for share in (1.015, 1.035):
        xs = [(share - 0.008) * longest, (share + 0.008) * longest]
        axes.plot(xs, [row + 0.28, row - 0.28], color=INK, linewidth=1)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Over a tenth of the steps, ending at each."""
    window = max(1, len(values) // 10)
    totals = [0.0, *_cumulated(values)]
    starts = [max(0, end - window) for end in range(1, len(totals))]
    return [(totals[i + 1] - totals[s]) / (i + 1 - s) for i, s in enumerate(starts)]


def _cumulated(values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(values))
