"""The demo's pictures. A method has one colour and one marker in all of them.

Those of the page are WIDTH inches wide: 340 px wide, as on a phone, their letters are 10 px high.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hylora_kernels.evaluation.breadth import format_ratio
from hylora_kernels.experiments.demo.stages import DemoReport, Stage, mean_ratio
from hylora_kernels.model.structure import depth_of
from hylora_kernels.support import plots
from hylora_kernels.support.console import format_ppl
from hylora_kernels.support.plots import Bar, Line

WIDTH = 4.8
LIMIT = 4  # times the dense model's perplexity; a larger one is drawn beyond a broken axis
STYLES = {  # name -> (colour, marker)
    "dense": (plots.GREY, "s"),
    "dense, optimised": (plots.GREY, "s"),
    "dense int8": (plots.OCHRE, "D"),
    "4 bits, to nearest": (plots.OCHRE, "v"),
    "4 bits, GPTQ": (plots.OCHRE, "^"),
    "HyLoRA bits": (plots.GREEN, "D"),
    "plain SVD": (plots.ROSE, "^"),
    "whitened SVD": (plots.PURPLE, "v"),
    "two-sided SVD": (plots.BLUE, "P"),
    "two-sided SVD, pivoted": (plots.TEAL, "X"),
    "HyLoRA": (plots.GREEN, "o"),
    "HyLoRA, one text": (plots.GREEN, "o"),
    "HyLoRA, then int8": (plots.GREEN, "s"),
    "dense + LoRA (control)": (plots.ORANGE, "p"),
    "dense + LoRA, then bits": (plots.ORANGE, "D"),
}


@dataclass(frozen=True)
class Picture:
    """svg: an element of the page, whose title says in words what it shows."""

    heading: str
    caption: str
    svg: str


def png(report: DemoReport, path: Path) -> None:
    """Perplexity by stage, and the mean ratio over all texts, side by side."""
    with plots.figure(path, 2.2 * WIDTH, _rows_height(len(report.stages)) + 0.6) as drawing:
        left, right = drawing.subplots(1, 2)
        _perplexity_bars(left, report)
        names = [text["name"] for text in report.data["texts"]]
        left.set_title(f"Perplexity of {report.model['name']} on {names[0]}", loc="left")
        _ratio_bars(right, report)
        right.set_title(f"Perplexity / dense over {', '.join(names)}", loc="left")


def pictures(report: DemoReport) -> list[Picture]:
    """The pictures of the page, in its order."""
    dense, blocks = report.stages[0], report.data["recovery_blocks"]
    rows = _rows_height(len(report.stages))
    compressed = [stage for stage in report.stages if stage.name == "HyLoRA" and stage.ranks]
    drawn = [
        _picture(
            "Perplexity by stage",
            f"Shorter is better; the mark on each bar is the dense model ({format_ppl(dense.ppl)})."
            f" A bar beyond {LIMIT} times that is broken.",
            _values(report, lambda stage: format_ppl(stage.ppl)),
            rows,
            lambda drawing: _perplexity_bars(drawing.add_subplot(), report),
        ),
        _picture(
            "Breadth: perplexity over the dense model's",
            "The geometric mean over all texts, and the worst of them; shorter is better, the mark "
            "on each bar is the dense model. A model loses what its calibration text is not about.",
            _values(report, _ratio_words),
            _rows_height(sum(stage.breadth is not None for stage in report.stages)),
            lambda drawing: _ratio_bars(drawing.add_subplot(), report),
        ),
        _picture(
            "Tokens per second by stage",
            "Longer is better. Left a prompt at once (prefill), right one token after the other "
            "(decode); the mark on each bar is the dense model as transformers runs it.",
            _values(report, _speeds),
            rows,
            lambda drawing: _speed_bars(drawing.subplots(1, 2), report),
        ),
        _picture(
            "Perplexity over memory",
            "Lower and further left is better; a line joins the same method at two keeps.",
            _values(report, lambda stage: f"{stage.bytes_total / 1e6:.0f} MB"),
            4.6,
            lambda drawing: _perplexity_over_memory(drawing.add_subplot(), report),
        ),
        _picture(
            "Recovery, on held-out text",
            f"Loss over the first {blocks} test blocks while only the adapters are trained. The "
            "control is the dense model with adapters: its fall is adaptation to the text alone.",
            _values(report, _first_and_last),
            4.2,
            lambda drawing: _recovery(drawing.add_subplot(), report),
        ),
    ]
    if compressed:
        drawn.append(
            _picture(
                "Ranks by depth and layer type",
                "The share of the full rank that the global budget gave each layer, adapters "
                "included; across: the blocks from input to output.",
                "The table of ranks below has the figures.",
                1.9 * len(compressed) + 0.8,
                lambda drawing: _ranks(drawing, compressed),
            )
        )
    return drawn


def _picture(heading, caption, words, height, draw: Callable) -> Picture:
    with tempfile.TemporaryDirectory() as temporary:
        name = re.sub(r"\W+", "-", heading.lower())
        path = Path(temporary) / f"{name}.svg"
        with plots.figure(path, WIDTH, height) as drawing:
            draw(drawing)
        return Picture(heading, caption, plots.embedded_svg(path, f"{heading}. {words}"))


def rank_table(report: DemoReport) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): of each layer type the full rank, and the HyLoRA stages' mean rank and, in
    brackets, lowest to highest."""
    stages = [stage for stage in report.stages if stage.name == "HyLoRA" and stage.ranks]
    rows: dict[tuple, list[str]] = {}
    for stage in stages:
        by_type: dict[tuple, list[int]] = {}
        for layer in stage.ranks:
            key = (_kind(layer["path"]), layer["full_rank"])
            by_type.setdefault(key, []).append(layer["rank"])
        for key, ranks in by_type.items():
            mean = sum(ranks) / len(ranks)
            rows.setdefault(key, []).append(f"{mean:.0f} ({min(ranks)} to {max(ranks)})")
    headings = ["layer type", "full rank", *(stage.label for stage in stages)]
    return headings, [[name, str(full), *cells] for (name, full), cells in rows.items()]


# ------------------------------------------------------------------------------------ what is drawn


def _perplexity_bars(axes, report: DemoReport) -> None:
    bars = [_bar(stage, stage.ppl, format_ppl(stage.ppl)) for stage in report.stages]
    dense = report.stages[0].ppl
    plots.draw_bars(axes, bars, reference=dense, limit=LIMIT * dense)


def _ratio_bars(axes, report: DemoReport) -> None:
    bars = []
    for stage in report.stages:
        if stage.breadth is not None:
            bars.append(_bar(stage, stage.breadth.geometric_mean, _ratio_words(stage)))
    plots.draw_bars(axes, bars, reference=1.0, limit=plots.LONGEST_RATIO)


def _speed_bars(panels, report: DemoReport) -> None:
    timed = [stage for stage in report.stages if stage.decode_tok_s is not None]
    for axes, speed in zip(panels, ("prefill_tok_s", "decode_tok_s"), strict=True):
        values = [getattr(stage, speed) for stage in timed]
        bars = [_bar(s, value, f"{value:.0f}") for s, value in zip(timed, values, strict=True)]
        plots.draw_bars(axes, bars, reference=values[0], labels=axes is panels[0])
        axes.set_title(speed.split("_")[0], loc="left")


def _perplexity_over_memory(axes, report: DemoReport) -> None:
    dense = report.stages[0].ppl
    stages = [stage for stage in report.stages if stage.name != "dense, optimised"]
    inside = [stage for stage in stages if stage.ppl <= LIMIT * dense]
    for name in dict.fromkeys(stage.name for stage in inside):
        points = [(s.bytes_total / 1e6, s.ppl) for s in inside if s.name == name]
        colour, marker = STYLES[name]
        xs, ys = zip(*sorted(points), strict=True)
        plots.draw_lines(axes, [Line(xs, ys, name, colour, marker)])
    axes.set(xlabel="MB in memory", ylabel="perplexity")
    axes.margins(x=0.08, y=0.08)
    plots.draw_reference(axes, dense)
    plots.scale_log(axes)
    beyond = [
        (s.bytes_total / 1e6, f"{s.label}: {format_ppl(s.ppl)}", STYLES[s.name][0])
        for s in sorted(stages, key=lambda stage: -stage.ppl)
        if s not in inside
    ]
    if beyond:
        plots.draw_beyond(axes, beyond)
    plots.draw_legend(axes)


def _recovery(axes, report: DemoReport) -> None:
    lines = []
    for stage in report.stages:
        if stage.held_out:
            colour, marker = STYLES[stage.name]
            xs, ys = zip(*stage.held_out, strict=True)
            lines.append(Line(xs, ys, stage.label, colour, marker, dashed=0 < stage.target < 0.7))
    plots.draw_lines(axes, lines)
    axes.set(xlabel="step", ylabel="held-out loss (nats a token)")
    plots.draw_legend(axes)


def _ranks(drawing, stages: list[Stage]) -> None:
    panels = drawing.subplots(len(stages), 1, squeeze=False)[:, 0]
    for axes, stage in zip(panels, stages, strict=True):
        shares: dict[str, dict[int, float]] = {}
        for layer in stage.ranks:
            row = shares.setdefault(_kind(layer["path"]), {})
            row[depth_of(layer["path"]) or 0] = layer["rank"] / layer["full_rank"]
        mesh = plots.draw_heatmap(axes, shares)
        axes.set_title(stage.label, loc="left")
    panels[-1].set_xlabel("block")
    drawing.colorbar(mesh, ax=list(panels), location="bottom", label="rank / full rank", aspect=40)


# ---------------------------------------------------------------------------------------- helpers


def _bar(stage: Stage, value: float, text: str) -> Bar:
    return Bar(stage.label, value, text, STYLES[stage.name][0])


def _rows_height(count: int) -> float:
    return 0.44 * count + 0.4


def _kind(path: str) -> str:
    """The type of a layer in the width of a page: model.layers.3.mlp.up_proj -> up_proj."""
    return path.rpartition(".")[2]


def _values(report: DemoReport, words: Callable[[Stage], str]) -> str:
    """The stages' values in words: "dense 44.81; dense int8 44.84"."""
    found = ((stage.label, words(stage)) for stage in report.stages)
    return "; ".join(f"{label} {value}" for label, value in found if value)


def _ratio_words(stage: Stage) -> str:
    """For instance "1.12 (code 1.30)"; "" where not measured."""
    if stage.breadth is None:
        return ""
    worst = max(stage.breadth.texts, key=lambda text: text.ratio)
    return f"{format_ratio(mean_ratio(stage))} ({worst.name} {format_ratio(worst.ratio)})"


def _speeds(stage: Stage) -> str:
    if stage.decode_tok_s is None:
        return ""
    return f"{stage.prefill_tok_s:.0f} and {stage.decode_tok_s:.0f}"


def _first_and_last(stage: Stage) -> str:
    if not stage.held_out:
        return ""
    return f"from {stage.held_out[0][1]:.3f} to {stage.held_out[-1][1]:.3f}"
