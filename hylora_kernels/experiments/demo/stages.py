"""The demo's data: its settings, a Stage for each model it measures, and the report of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hylora_kernels.machine.info import Environment
from hylora_kernels.model import load as models
from hylora_kernels.support.console import format_bytes, format_ppl, table
from hylora_kernels.support.report import Report

PROMPT = "The old man sat down by the window and looked at the river. He"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers.

    model, train, test, out_of_domain: as load_model and token_blocks take them.
    samples:       calibration blocks.
    steps, deep_steps: recovery steps at keep 0.8 (and of the control), and at 0.6.
    length:        tokens in a block.
    blocks, other_blocks: the first blocks of test and of out_of_domain give the perplexities.
    recovery_blocks: the first blocks of test give the recovery curves, five evaluations each.
    dtype:         "auto" is bfloat16 where the device multiplies it fast, else float32.
    """

    model: str = models.DEMO_MODEL
    train: str | list[str] = "brown"
    test: str | list[str] = "brown"
    out_of_domain: str | list[str] = "python-docs"
    samples: int = 48
    steps: int = 30
    deep_steps: int = 50
    lora_rank: int = 64
    control_rank: int = 16
    rank_multiple: int = 16
    length: int = 512
    blocks: int = 16
    other_blocks: int = 8
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
    bytes_total:   parameters and buffers in memory; of int8 as it would be stored.
    trainable:     adapter parameters trained in this stage, before merging.
    optimized:     whether the speeds are of a model laid out by optimize_for_inference.
    sample:        the prompt, continued.
    losses:        of the training blocks, one a step, nats a token.
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
    ppl_out_of_domain: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    seconds: float
    optimized: bool = False
    sample: str | None = None
    losses: list[float] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    ranks: list[dict] = field(default_factory=list)

    @property
    def label(self) -> str:
        return stage_label(self.name, self.target)


def stage_label(name: str, target: float) -> str:
    """For instance "HyLoRA 0.8"; an uncompressed model has its name only."""
    return name if target == 1 else f"{name} {target:g}"


# heading -> the cell of a stage, in words. The terminal shows all of them; the page shows those of
# MAIN_COLUMNS first, and the rest in a second table.
COLUMNS: dict[str, Callable[[Stage], str]] = {
    "stage": lambda stage: stage.label,
    "perplexity": lambda stage: format_ppl(stage.ppl),
    "out of domain": lambda stage: format_ppl(stage.ppl_out_of_domain),
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

    def render(self):
        """A rich table."""
        return table(self.model["name"], HEADINGS, self.cells())


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
