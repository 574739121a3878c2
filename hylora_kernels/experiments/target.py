"""compress_to_ratio(): the smallest keep whose perplexity stays within a ratio to the dense one's.

The singular values predict what a keep costs; a few keeps are measured to correct the prediction.
All are cut from one calibration: a measurement costs an allocation, a refit, the replacement of the
linears, and the perplexities.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.compress import Compression
from hylora_kernels.compression.options import BUDGETS, KEEP
from hylora_kernels.compression.ranks import least_keep
from hylora_kernels.compression.report import CompressReport
from hylora_kernels.evaluation.breadth import (
    BreadthReport,
    breadth,
    format_ratio,
    text_blocks,
)
from hylora_kernels.experiments.options import TargetOptions
from hylora_kernels.support.console import format_bytes, note, table
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.options import reported_options, takes_options
from hylora_kernels.support.plots import frontier_plot
from hylora_kernels.support.report import Report

if TYPE_CHECKING:
    from rich.table import Table

STEPS = 1000  # Keeps are searched in thousandths.
# A keep that leaves less of the allowed loss unused is small enough. The predicted loss of
# SmolLM2-135M goes as (1 - keep)^2.06 (0.185 nats at 0.8, 0.77 at 0.6), so that at a ratio of 1.1
# this is 0.004 of keep.
SLACK = 0.05
CURVE = 24  # Keeps at which the prediction is drawn.


@dataclass(frozen=True)
class Point(Report):
    """One keep, measured.

    keep, kept: the share of the linears' parameters that was asked for, and that stays.
    predicted:  ratio to the dense model's perplexity by the singular values, without the refit.
    ratio:      the geometric mean of the texts' ratios. texts: name -> ratio. worst: the name of
                the largest.
    parameters, bytes: of the whole model, counted as the option `count` says.
    """

    keep: float
    kept: float
    predicted: float
    ratio: float
    worst: str
    texts: dict[str, float]
    parameters: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Frontier(Report):
    """The size of a model against its quality.

    target_ratio: the ratio that was asked for.
    dense:        name of a text -> perplexity of the dense model.
    chosen:       the smallest measured keep within the target; None if there is none below 1.
    note:         a sentence on the end of the search; "" if it ended at the target.
    points:       what was measured, by falling keep.
    predicted:    (keep, predicted ratio) of more keeps.
    """

    target_ratio: float
    dense: dict[str, float]
    chosen: float | None
    note: str
    points: list[Point] = field(default_factory=list)
    predicted: list[tuple[float, float]] = field(default_factory=list)

    def render(self) -> Table:
        """A rich table, the largest model first; the chosen one is marked."""
        rows = [
            (
                f"{point.keep:.3f}{' *' if point.keep == self.chosen else ''}",
                format_ratio(point.predicted),
                f"{point.ratio:.3f}",
                f"{point.worst} {format_ratio(point.texts[point.worst])}",
                point.parameters,
                format_bytes(point.bytes),
            )
            for point in self.points
        ]
        columns = ("keep", "predicted", "measured", "worst text", "parameters", "file")
        title = f"perplexity / dense, geometric mean over {', '.join(self.dense)}"
        return table(f"{title}; target {self.target_ratio:g}, * chosen", columns, rows)

    def plot(self, path: str | Path) -> None:
        """Draw prediction, measurements and the worst text's over keep."""
        measured = [(p.keep, p.ratio, p.texts[p.worst]) for p in self.points]
        title = f"smallest keep within {self.target_ratio:g}: {self.chosen or 'none'}"
        frontier_plot(self.predicted, measured, self.target_ratio, path, title)


@takes_options(TargetOptions)
def compress_to_ratio(
    model_or_id: nn.Module | str | Path, options: TargetOptions
) -> tuple[nn.Module, CompressReport, Frontier]:
    """compress() with the smallest keep that stays within a ratio to the dense model's perplexity,
    the geometric mean over several texts, untrained.

    model_or_id: as compress() takes it.

    Returns what compress() returns, and the frontier, which output_dir has as frontier.png and,
    point by point, in frontier/: an interrupted search goes on where it stopped. The dense linears
    stay in memory during a measurement beside the low-rank ones; the model is loaded once.

    Raises the errors of compress() and breadth(), ValueError if no measured keep is within the
    ratio.

        model, report, frontier = compress_to_ratio("my-org/my-model", target_ratio=1.1,
                                                    output_dir="small")
    """
    folder = Path(options.output_dir)
    with Compression(model_or_id, options) as run:
        texts = text_blocks(
            run.model,
            options.texts_or_default(),
            run.tokenizer,
            options.length,
            options.limit,
            progress=options.progress,
            column=options.column,
        )
        trials = _Trials(run, options, texts)
        for statistics in run.calibrate():
            run.factorize(statistics)
        chosen = search(
            trials.predict,
            trials.measure,
            math.log(options.target_ratio),
            trials.lowest,
            options.evaluations,
        )
        frontier = trials.frontier(chosen)
        frontier.plot(folder / "frontier.png")
        if chosen is None:
            raise ValueError(f"target_ratio={options.target_ratio:g}: {frontier.note}")
        ranks = run.allocate(chosen)
        run.replace(ranks, run.refit(ranks))
        run.report.options["keep"] = chosen
        for keep in trials.points.keys() - {chosen}:
            run.forget_refit(run.allocate(keep))
    return run.model, run.report, frontier


# -------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class _Mark:
    """A keep, and what it costs, in nats a token."""

    keep: float
    predicted: float
    measured: float


def search(
    predict: Callable[[float], float],
    measure: Callable[[float], float],
    allowed: float,
    lowest: float,
    evaluations: int,
) -> float | None:
    """The smallest keep found, in thousandths, whose measured cost is at most `allowed`; None if
    none below 1 was.

    predict, measure: keep -> its cost in nats a token; both fall as keep grows. At most
                      `evaluations` keeps are measured.
    lowest:           the smallest feasible keep.

    The search works on predicted cost, which measured cost is nearly proportional to. The dense
    model costs nothing in both. It starts where the prediction meets `allowed`, goes on where the
    prediction, corrected by measured / predicted, meets it, and then, between a keep that is within
    and one that is beyond, by the secant.
    """
    within, beyond = _Mark(1.0, 0.0, 0.0), None
    for left in range(evaluations, 0, -1):
        # The last one must be within, if none was.
        aim = allowed * (0.75 if left == 1 and within.keep == 1 else 1 - SLACK / 2)
        keep = _keep_of(_next_cost(within, beyond, aim), predict, within, beyond, lowest)
        if keep is None:
            break
        mark = _Mark(keep, predict(keep), measure(keep))
        if mark.measured > allowed:
            beyond = mark
        else:
            within = mark
            if mark.measured >= allowed * (1 - SLACK):
                break
    return within.keep if within.keep < 1 else None


def _next_cost(within: _Mark, beyond: _Mark | None, aim: float) -> float:
    """The predicted cost to measure next."""
    if beyond is not None:
        share = (aim - within.measured) / (beyond.measured - within.measured)
        share = min(max(share, 0.1), 0.9)  # Each measurement narrows the interval.
        return within.predicted + share * (beyond.predicted - within.predicted)
    if within.keep == 1:
        return aim
    return within.predicted * min(aim / max(within.measured, 1e-9), 4.0)


def _keep_of(
    cost: float,
    predict: Callable[[float], float],
    within: _Mark,
    beyond: _Mark | None,
    lowest: float,
) -> float | None:
    """The smallest keep between the two whose predicted cost is at most `cost`; None if nothing is
    left between them."""
    first = math.ceil(lowest * STEPS) if beyond is None else round(beyond.keep * STEPS) + 1
    keeps = [step / STEPS for step in range(first, round(within.keep * STEPS))]
    place = bisect_left(keeps, -cost, key=lambda keep: -predict(keep))
    return keeps[min(place, len(keeps) - 1)] if keeps else None


# ------------------------------------------------------------------------------- what is measured


class _Trials:
    """The measurements of one compression, each a file in `folder`.

    texts: name -> token ids [n, L].
    """

    def __init__(self, run: Compression, options: TargetOptions, texts: dict[str, Tensor]):
        self.run, self.options, self.texts = run, options, texts
        self.folder = Path(options.output_dir) / "frontier"
        self.points: dict[float, Point] = {}
        decisive = reported_options(options)
        for name in (*BUDGETS, "target_ratio", "evaluations"):
            decisive.pop(name)
        self.key = fingerprint(
            weights_and_text=run.workspace.key,
            options=decisive,
            version=importlib.metadata.version("hylora-kernels"),
            **{f"text {name}": ids for name, ids in texts.items()},
        )
        self.dense = self._dense()
        self.predict = cache(lambda keep: self.unit * self._dropped(keep))

    @cached_property
    def lowest(self) -> float:
        """The smallest feasible keep."""
        return least_keep(self.run.curves, self.options.ranks)

    @cached_property
    def unit(self) -> float:
        """Nats a token for each unit of S^2. Only two-sided whitening knows them: of other methods
        the first guess is that the default keep meets the target."""
        if self.options.method == "two_sided":
            return 1.0
        dropped = self._dropped(max(KEEP, self.lowest))
        return math.log(self.options.target_ratio) / max(dropped, 1e-300)

    def measure(self, keep: float) -> float:
        """The cost of a keep in nats a token: the mean over the texts."""
        ranks = self.run.allocate(keep)
        name = fingerprint(key=self.key, ranks=ranks)
        stored = self._stored(name, lambda: self._point(keep, ranks))
        # The same ranks may have been measured for another keep and another target.
        point = replace(Point(**stored), keep=keep, predicted=_ratio(self.predict(keep)))
        self.points[keep] = point
        if self.options.progress:
            note(f"keep {keep:.3f}: predicted {point.predicted:.3f}, measured {point.ratio:.3f}")
        return math.log(point.ratio)

    def _point(self, keep: float, ranks: dict[str, int]) -> Point:
        start, run = time.perf_counter(), self.run
        with run.trial(ranks, run.refit(ranks)) as model:
            found = self._breadth(model, self.dense)
        assert found.geometric_mean is not None and found.worst is not None
        if found.geometric_mean > self.options.target_ratio:
            run.forget_refit(ranks)
        size, dense = run.budget.size(run.curves, ranks), run.budget.dense
        return Point(
            keep=keep,
            kept=1 - (dense.parameters - size.parameters) / run.budget.linears,
            predicted=_ratio(self.predict(keep)),
            ratio=found.geometric_mean,
            worst=found.worst,
            texts={text.name: text.ratio or math.nan for text in found.texts},
            parameters=size.parameters,
            bytes=size.bytes,
            seconds=time.perf_counter() - start,
        )

    def frontier(self, chosen: float | None) -> Frontier:
        """All that was measured, with the prediction between."""
        lowest, hidden = self.lowest, not self.options.progress
        shares = [i / CURVE for i in range(CURVE + 1)]
        keeps = [lowest * (1 - share) + share for share in shares]
        bar = tqdm(keeps, desc="predicting", disable=hidden, leave=False)
        points = [self.points[keep] for keep in sorted(self.points, reverse=True)]
        return Frontier(
            self.options.target_ratio,
            {text.name: text.ppl for text in self.dense.texts},
            chosen,
            self._note(chosen),
            points,
            [(keep, _ratio(self.predict(keep))) for keep in bar],
        )

    def _note(self, chosen: float | None) -> str:
        if chosen == math.ceil(self.lowest * STEPS) / STEPS:
            return (
                "the smallest feasible keep meets the target; a smaller rank_multiple allows less"
            )
        if chosen is not None:
            return ""
        if not self.points:
            return f"no keep below 1 is feasible with rank_multiple={self.options.rank_multiple}"
        nearest = min(self.points.values(), key=lambda point: point.ratio)
        return (
            f"no keep below 1 was found within it in {len(self.points)} evaluations; the nearest,"
            f" keep={nearest.keep:.3f}, has {nearest.ratio:.4f}"
        )

    def _dropped(self, keep: float) -> float:
        """The sum of the squared singular values that a keep drops."""
        ranks = self.run.allocate(keep)
        return sum(c.error(ranks[c.path].rank) for c in self.run.curves)

    def _dense(self) -> BreadthReport:
        stored = self._stored(f"{self.key}-dense", lambda: self._breadth(self.run.model, None))
        return BreadthReport.from_dict(stored)

    def _breadth(self, model: nn.Module, dense: BreadthReport | None) -> BreadthReport:
        progress = self.options.progress
        return breadth(model, self.texts, dense, limit=None, progress=progress)

    def _stored(self, name: str, measure: Callable[[], Report]) -> dict[str, Any]:
        """The fields of a report, which is measured unless its file is there."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            measure().save(file)
        return json.loads(file.read_text(encoding="utf-8"))


def _ratio(nats: float) -> float:
    """exp(nats), which a prediction may be too large for."""
    return math.exp(min(nats, 700.0))
