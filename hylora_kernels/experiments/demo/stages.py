"""The demo's data: its settings, a Stage for each model it measures, and the report of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hylora_kernels.evaluation.breadth import BreadthReport, format_ratio
from hylora_kernels.machine.info import Environment
from hylora_kernels.model import load as models
from hylora_kernels.support.console import format_bytes, format_ppl, format_seconds, table
from hylora_kernels.support.report import Report

if TYPE_CHECKING:
    from rich.console import Group

PROMPT = "The old man sat down by the window and looked at the river. He"
KINDS = (  # of work, in the table of seconds
    *("self text", "calibration", "factorization", "refit", "recovery", "evaluation", "speed"),
    "other",
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers.

    model, train:  as load_model and token_blocks take them.
    texts:         to measure on, as breadth() takes them: the first is of the kind of `train`.
    samples:       calibration blocks of `train`, with which the mix has half as many of the model's
                   own text and a quarter of the standard library.
    target_mb: megabytes of the file of the model in mixed bits.
    steps, deep_steps: recovery steps at keep 0.8 (and of the control), and at 0.6.
    length:        tokens in a block.
    blocks:        the first blocks of each text give its perplexity.
    recovery_blocks: the first blocks of the first text give the recovery curves, five evaluations
                   each.
    dtype:         "auto" is bfloat16 where the device multiplies it fast, else float32.
    """

    model: str = models.DEMO_MODEL
    train: str | list[str] = "brown"
    texts: Mapping[str, str | list[str]] | Sequence[str] = (
        *("brown", "python-docs", "code", "moby-dick", "self"),
    )
    samples: int = 16
    target_mb: float = 80.0
    steps: int = 20
    deep_steps: int = 40
    lora_rank: int = 64
    control_rank: int = 16
    rank_multiple: int = 16
    length: int = 512
    blocks: int = 4
    recovery_blocks: int = 2
    new_tokens: int = 48
    prompt: str = PROMPT
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Stage(Report):
    """One measured model, a row of the table.

    target:        the keep asked for, 1 for an uncompressed model.
    keep, removed, params_linear: of the linears, adapters merged, biases excluded.
    bytes_total:   parameters and buffers in memory.
    trainable:     adapter parameters trained in this stage, before merging.
    ppl:           on the first text. breadth: on all texts, beside the dense model's.
    predicted_loss: by the singular values, before the refit, in nats a token; None if not known.
    spent:         seconds by kind of work (KINDS); together `seconds`.
    optimized:     whether the speeds are of a model laid out by optimize_for_inference.
    sample:        the prompt, continued.
    losses:        of the training blocks, one a step, nats a token: KL from the dense model, of the
                   control cross-entropy.
    held_out:      [step, loss over the first recovery_blocks of test] pairs, nats a token.
    ranks:         {"path", "rank", "full_rank"} of every compressed layer, adapters included; a
                   layer left dense has its full rank.
    """

    name: str
    target: float
    keep: float
    removed: float
    params_linear: int
    params_total: int
    bytes_total: int
    trainable: int
    ppl: float
    breadth: BreadthReport | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    seconds: float
    spent: dict[str, float]
    predicted_loss: float | None = None
    optimized: bool = False
    sample: str | None = None
    losses: list[float] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    ranks: list[dict] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """The stage of what to_dict() gave."""
        breadth = values["breadth"] and BreadthReport.from_dict(values["breadth"])
        return cls(**values | {"breadth": breadth})

    @property
    def label(self) -> str:
        return stage_label(self.name, self.target)


def stage_label(name: str, target: float) -> str:
    """For instance "HyLoRA 0.8"; an uncompressed model has its name only."""
    return name if target == 1 else f"{name} {target:g}"


def mean_ratio(stage: Stage) -> float | None:
    """The geometric mean over the texts of perplexity / dense; None where it was not measured."""
    return stage.breadth.geometric_mean if stage.breadth else None


# heading -> the cell of a stage, in words. The terminal shows all of them; the page shows those of
# MAIN_COLUMNS first, and the rest in a second table.
COLUMNS: dict[str, Callable[[Stage], str]] = {
    "stage": lambda stage: stage.label,
    "perplexity": lambda stage: format_ppl(stage.ppl),
    "mean ratio": lambda stage: format_ratio(mean_ratio(stage)),
    "memory": lambda stage: format_bytes(stage.bytes_total),
    "keep": lambda stage: f"{stage.keep:.3f}",
    "removed": lambda stage: f"{stage.removed:.3f}",
    "prefill tok/s": lambda stage: _whole(stage.prefill_tok_s),
    "decode tok/s": lambda stage: _whole(stage.decode_tok_s),
    "linears": lambda stage: _millions(stage.params_linear),
    "all": lambda stage: _millions(stage.params_total),
    "trained": lambda stage: _millions(stage.trainable) if stage.trainable else "-",
    "seconds": lambda stage: _whole(stage.seconds),
}
HEADINGS = tuple(COLUMNS)
MAIN_COLUMNS, OTHER_COLUMNS = HEADINGS[:8], (HEADINGS[0], *HEADINGS[8:])


@dataclass(frozen=True)
class DemoReport(Report):
    """seconds: of all stages together, also of those measured in an earlier run."""

    stages: list[Stage]
    model: dict
    data: dict
    environment: Environment
    seconds: float

    def stage(self, label: str) -> Stage:
        """The stage of that label; KeyError if there is none."""
        return {stage.label: stage for stage in self.stages}[label]

    def cells(self, headings: tuple[str, ...] = HEADINGS) -> list[list[str]]:
        """A row for each stage."""
        return [[COLUMNS[heading](stage) for heading in headings] for stage in self.stages]

    def breadth_table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows): the perplexities on all texts and, in brackets, over the dense
        model's."""
        names = [text["name"] for text in self.data["texts"]]
        rows = []
        for stage in self.stages:
            if stage.breadth is not None:
                cells = [
                    f"{format_ppl(text.ppl)} ({format_ratio(text.ratio)})"
                    for text in stage.breadth.texts
                ]
                mean, worst = stage.breadth.geometric_mean, stage.breadth.worst or ""
                rows.append([stage.label, *cells, format_ratio(mean), worst])
        return ["stage", *names, "mean ratio", "worst"], rows

    def seconds_table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows): seconds by stage and kind of work, and all together in the last row."""
        by_stage = [[stage.spent.get(kind, 0.0) for kind in KINDS] for stage in self.stages]
        sums = [sum(column) for column in zip(*by_stage, strict=True)]
        labels = [*(stage.label for stage in self.stages), "all"]
        rows = [
            [label, *map(_some, [*seconds, sum(seconds)])]
            for label, seconds in zip(labels, [*by_stage, sums], strict=True)
        ]
        return ["stage", *KINDS, "all"], rows

    def predictions(self) -> list[tuple[str, float, float]]:
        """(label, predicted loss, measured loss) of the untrained stages, in nats a token over the
        dense model's; measured as the mean over the texts."""
        return [
            (stage.label, stage.predicted_loss, math.log(ratio))
            for stage in self.stages
            if not stage.trainable
            and stage.predicted_loss is not None
            and (ratio := mean_ratio(stage)) is not None
        ]

    def render(self) -> Group:
        """Rich tables: the stages, the texts, the seconds."""
        from rich.console import Group

        return Group(
            table(self.model["name"], HEADINGS, self.cells()),
            table("perplexity (over the dense model's) by text", *self.breadth_table()),
            table(f"seconds by kind, {format_seconds(self.seconds)}", *self.seconds_table()),
        )


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"


def _some(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 0.5 else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
