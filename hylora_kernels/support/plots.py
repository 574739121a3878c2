"""Pictures. Each takes plain numbers and a path, whose ending (.png, .svg) is the format."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hylora_kernels.support.console import format_ppl
from hylora_kernels.support.storage import atomic_path

# One ink for lines and letters, so that a page can exchange it for its own (embedded_svg does).
INK = "#1f2933"


COLOURS = ("#2f6fb0", "#d1622b", "#3a8f5c", "#8a5fb0", "#b03a5b", "#6b7280", "#a8862a", "#2a9aa8")


def loss_plot(curves: Mapping[str, Sequence[float]], path: str | Path, title: str = "") -> None:
    """curves: name -> the loss of every step from the first, nats a token; thick: running mean."""
    with _figure(path, 6.4, 3.6) as figure:
        axes = figure.add_subplot()
        for (name, losses), colour in zip(curves.items(), _colours(), strict=False):
            steps = range(1, len(losses) + 1)
            axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, _running_mean(losses), color=colour, linewidth=2, label=name)
        axes.set(title=title, xlabel="step", ylabel="loss (nats a token)")
        _legend(axes, len(curves))


def spectrum_plot(
    spectra: Mapping[str, Sequence[float]], path: str | Path, title: str = ""
) -> None:
    """spectra: layer type -> its singular values, falling; left how they fall, right their energy.

    Both over the share of the full rank, so that types of different sizes can be compared.
    """
    with _figure(path, 9.6, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        for (name, values), colour in zip(spectra.items(), _colours(), strict=False):
            values = [float(v) for v in values]
            ranks = [(i + 1) / len(values) for i in range(len(values))]
            largest, energy = values[0] or 1.0, _cumulated([v * v for v in values])
            left.plot(ranks, [v / largest for v in values], color=colour, label=name)
            right.plot(ranks, [e / (energy[-1] or 1.0) for e in energy], color=colour, label=name)
        left.set(title=title, yscale="log", ylabel="singular value / largest")
        right.set(ylabel="energy kept", ylim=(0, 1.02))
        for share in (0.9, 0.95, 0.99):
            right.axhline(share, color=INK, alpha=0.25, linewidth=0.8, linestyle="--")
        for axes in (left, right):
            axes.set(xlabel="rank / full rank", xlim=(0, 1))
        _legend(right, len(spectra))


def sweep_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    xlabel: str = "keep",
    dense: float | None = None,
    title: str = "",
) -> None:
    """series: name -> (x, perplexity) points; dense: the untouched model's perplexity, a line."""
    with _figure(path, 6.4, 4.0) as figure:
        axes = figure.add_subplot()
        for (name, points), colour in zip(series.items(), _colours(), strict=False):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, color=colour, marker="o", markersize=5, label=name)
        if dense is not None:
            _dense_line(axes, dense)
        axes.set(title=title, xlabel=xlabel, ylabel="perplexity")
        _log_perplexity(axes)
        _legend(axes, len(series))


def stages_plot(stages: Sequence[Mapping], path: str | Path, title: str = "") -> None:
    """stages: {"name", "keep", "ppl", "bytes_total"} in order, the first one dense.

    Left the perplexity of every stage as bars on a log axis, right perplexity over bytes, without
    the stages beyond four times dense, which would flatten the rest.
    """
    dense, values = stages[0]["ppl"], [stage["ppl"] for stage in stages]
    with _figure(path, 11.0, 0.36 * len(stages) + 1.4) as figure:
        bars, frontier = figure.subplots(1, 2, width_ratios=(1, 1))
        for place, (stage, value) in enumerate(zip(stages, values, strict=True)):
            colour = _stage_colour(stage["name"])
            bars.barh(place, value, color=colour, height=0.68)
            _label(bars, format_ppl(value), (value, place))
            if value <= 4 * dense:
                frontier.plot(stage["bytes_total"] / 1e6, value, "o", color=colour, markersize=7)
                point = (stage["bytes_total"] / 1e6, value)
                _label(frontier, stage_label(stage), point, offset=(0, 8), ha="center")
        bars.set_yticks(range(len(stages)), [stage_label(stage) for stage in stages])
        bars.tick_params(axis="y", length=0)
        bars.invert_yaxis()
        bars.set(xscale="log", xlabel="perplexity", xlim=(min(values) / 2, max(values) * 8))
        bars.axvline(dense, color=INK, linewidth=1, linestyle="--", alpha=0.7)
        bars.set_title(title, loc="left")
        frontier.set(xlabel="MB in memory", ylabel="perplexity")
        frontier.margins(x=0.3, y=0.12)  # room for the labels
        frontier.axhline(dense, color=INK, linewidth=1, linestyle="--", alpha=0.4)
        _log_perplexity(frontier)


def stage_label(stage: Mapping) -> str:
    """For instance "HyLoRA 0.8", by the keep that was asked for ("target") where that is known."""
    keep = stage.get("target", stage["keep"])
    return stage["name"] if keep == 1 else f"{stage['name']} {keep:g}"


def embedded_svg(path: str | Path) -> str:
    """An .svg written here, as an element to put into an HTML page: no prolog, no metadata, no
    address, as wide as the page allows, and drawn in the page's own text colour."""
    text = Path(path).read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(INK, "currentColor")


@contextlib.contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator:
    """A matplotlib figure of width x height inches, written to `path` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "font.family": "sans-serif",
        "font.size": 9,
        "legend.frameon": False,
        "svg.fonttype": "none",  # letters stay letters: smaller, and in the page's own font
        "svg.hashsalt": Path(path).name,  # ids that repeat, yet differ between a page's pictures
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    is_svg = Path(path).suffix == ".svg"
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            metadata = {"Date": None} if is_svg else None
            figure.savefig(temporary, dpi=160, transparent=is_svg, metadata=metadata)


def _colours() -> Iterator[str]:
    return itertools.cycle(COLOURS)


def _stage_colour(name: str) -> str:
    """Untouched grey, the recovered models green, what is only compressed blue."""
    if name.startswith("dense"):
        return COLOURS[5]
    return COLOURS[2] if name == "HyLoRA" else COLOURS[0]


def _label(axes, text: str, at: tuple[float, float], offset=(6, 0), ha="left") -> None:
    axes.annotate(text, at, offset, textcoords="offset points", ha=ha, va="center", fontsize=8)


def _legend(axes, count: int) -> None:
    if count > 1:
        axes.legend(fontsize=8)


def _dense_line(axes, ppl: float) -> None:
    axes.axhline(ppl, color=INK, linewidth=1, linestyle="--", alpha=0.7)
    corner = (1, ppl)
    axes.annotate(
        f"dense {format_ppl(ppl)}",
        corner,
        (0, 3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


def _log_perplexity(axes) -> None:
    """A log axis whose ticks are perplexities to read (50, 100), not powers (10^2)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if high < 10 * low else (1, 2, 5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _running_mean(values: Sequence[float]) -> list[float]:
    """Over a tenth of the steps, ending at each."""
    window = max(1, len(values) // 10)
    totals = [0.0, *_cumulated(values)]
    starts = [max(0, end - window) for end in range(1, len(totals))]
    return [(totals[i + 1] - totals[s]) / (i + 1 - s) for i, s in enumerate(starts)]


def _cumulated(values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(values))
