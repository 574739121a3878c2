"""The demonstration's stages: what is made of the dense model, and how each of them is measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.compress import compress
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.evaluation.speed import throughput
from hylora_kernels.inference.generate import generate
from hylora_kernels.machine.info import Environment
from hylora_kernels.model import load as models
from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.model.checkpoint import save_pretrained
from hylora_kernels.recovery.finetune import FinetuneReport, finetune
from hylora_kernels.support.console import format_bytes, format_ppl, report_lines, table
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.plots import stage_label
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import token_blocks

PROMPT = "The old man sat down by the window and looked at the river. He"
GROUP = 64  # weights that share one scale in the int8 row


@dataclass(frozen=True)
class Settings:
    """What decides the numbers. model, train, test, out_of_domain: as load_model and token_blocks
    take them; the first `blocks` blocks of `length` tokens of test are evaluated on, and the first
    `other_blocks` of out_of_domain."""

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
    new_tokens: int = 48
    prompt: str = PROMPT
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Stage(Report):
    """One row. target: the keep asked for; keep, removed, params_linear: what came, of the linears,
    merged, biases excluded. bytes_total: parameters and buffers in memory; of int8 as it would be
    stored. trainable: what this stage trained, before merging. sample: the prompt continued."""

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
    optimized: bool = False  # for its speed
    sample: str | None = None
    losses: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return stage_label({"name": self.name, "keep": self.target})

    def cells(self) -> tuple[str, ...]:
        """In words, one for each of HEADINGS."""
        speeds = (self.prefill_tok_s, self.decode_tok_s)
        return (
            self.label,
            f"{self.keep:.3f}",
            f"{self.removed:.3f}",
            f"{self.params_linear / 1e6:.2f} M",
            f"{self.params_total / 1e6:.2f} M",
            format_bytes(self.bytes_total),
            f"{self.trainable / 1e6:.2f} M" if self.trainable else "-",
            format_ppl(self.ppl),
            format_ppl(self.ppl_out_of_domain),
            *("-" if speed is None else f"{speed:.0f}" for speed in speeds),
            f"{self.seconds:.0f}",
        )


HEADINGS = (
    ("stage", "keep", "removed", "linears", "all", "memory", "trained", "perplexity")
    + ("out of domain", "prefill tok/s", "decode tok/s", "seconds")
)  # fmt: skip


@dataclass(frozen=True)
class DemoReport(Report):
    """seconds: of all stages together, also of those measured in an earlier run."""

    stages: list[Stage]
    model: dict
    data: dict
    environment: Environment
    seconds: float

    def render(self):
        """A rich table."""
        rows = [stage.cells() for stage in self.stages]
        return table(self.model["name"], HEADINGS, rows)


@dataclass
class Made:
    """A stage's model; size_bytes where the tensors in memory aren't what would be stored."""

    model: nn.Module
    recovery: FinetuneReport | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A stage before it is made. make(bench, recipe) -> Made."""

    name: str
    target: float
    make: Callable[[Bench, Recipe], Made]
    out_of_domain: bool = False
    speed: bool = True
    sample: bool = False

    @property
    def label(self) -> str:
        return stage_label({"name": self.name, "keep": self.target})


@dataclass
class Bench:
    """What all stages share: the settings, the folder, the texts as blocks of tokens."""

    settings: Settings
    folder: Path
    progress: bool

    def __post_init__(self):
        s = self.settings
        _, self.tokenizer = self.load()
        self.test = token_blocks(s.test, self.tokenizer, s.length, "test", s.blocks)
        self.other = token_blocks(s.out_of_domain, self.tokenizer, s.length, "test", s.other_blocks)

    def load(self):
        return models.load_model(self.settings.model, self.settings.device, "bfloat16")

    def dense(self) -> nn.Module:
        return self.load()[0]

    def saved(self, target: float) -> Path:
        """Where the recovered model of that keep is saved."""
        return self.folder / f"hylora-{target:g}"

    def say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)

    def key(self) -> str:
        """Changes with anything that the numbers depend on, this package's own code included."""
        texts = {"test": self.test, "other": self.other}
        return fingerprint(
            model=self.dense(), settings=asdict(self.settings), code=_code(), **texts
        )


@functools.cache
def _code() -> dict[str, str]:
    """This package's source, as it was when it was asked for first."""
    package = Path(__file__).parents[2]
    return {str(p.relative_to(package)): p.read_text() for p in sorted(package.rglob("*.py"))}


# ---------------------------------------------------------------------------------------- recipes


def _dense(bench: Bench, recipe: Recipe) -> Made:
    return Made(bench.dense())


def _int8(bench: Bench, recipe: Recipe) -> Made:
    """Every matrix, embedding included, rounded to 8 bits in place; the same tied one only once."""
    model, size = bench.dense(), 0
    for parameter in model.parameters():
        if parameter.dim() == 2:
            rounded, count = round_to_int8(parameter.detach())
            parameter.data, size = rounded, size + count
        else:
            size += parameter.numel() * parameter.element_size()
    return Made(model, size_bytes=size + sum(b.numel() * b.element_size() for b in model.buffers()))


def round_to_int8(weight: Tensor) -> tuple[Tensor, int]:
    """weight [N, K] -> (what int8 makes of it, in its own dtype; the bytes it takes as int8).

    Round to nearest, symmetric, one float16 scale for each GROUP weights along K.
    """
    N, K = weight.shape
    groups = F.pad(weight.float(), (0, -K % GROUP)).view(N, -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half().float().clamp_min(1e-8)
    rounded = (groups / scales).round().clamp(-127, 127) * scales
    return rounded.view(N, -1)[:, :K].to(weight.dtype), N * K + 2 * scales.numel()


def _compressed(**options) -> Callable[[Bench, Recipe], Made]:
    return lambda bench, recipe: Made(_compress(bench, recipe, **options))


def _compress(bench: Bench, recipe: Recipe, **options) -> nn.Module:
    s = bench.settings
    model, _ = compress(
        bench.dense(),
        keep=recipe.target,
        calibration=s.train,
        tokenizer=bench.tokenizer,
        length=s.length,
        seed=s.seed,
        progress=bench.progress,
        **({"samples": s.samples, "rank_multiple": s.rank_multiple} | options),
    )
    return model


def _hylora(bench: Bench, recipe: Recipe) -> Made:
    s = bench.settings
    model = _compress(bench, recipe, **REFITTED, lora_rank=s.lora_rank)
    steps = s.steps if recipe.target > 0.7 else s.deep_steps
    recovery = _recover(bench, recipe, model, steps)
    save_pretrained(model, bench.saved(recipe.target), bench.tokenizer)
    return Made(model, recovery)


def _control(bench: Bench, recipe: Recipe) -> Made:
    s = bench.settings
    model = add_adapters(bench.dense(), lora_rank=s.control_rank, seed=s.seed)
    return Made(model, _recover(bench, recipe, model, s.steps))


def _recover(bench: Bench, recipe: Recipe, model: nn.Module, steps: int) -> FinetuneReport:
    s = bench.settings
    report = finetune(
        model,
        s.train,
        bench.tokenizer,
        steps=steps,
        length=s.length,
        output_dir=bench.folder / "training" / recipe.label,
        seed=s.seed,
        progress=bench.progress,
    )
    if report.stopped:
        raise FloatingPointError(f"{recipe.label}: {report.stopped}")
    return report


PAIR = {"form": "pair", "lora_rank": 0, "refit": False}
# Rounded down to multiples of 16 layer by layer, equal keeps of 0.8 would come to 0.77 in all.
UNIFORM = {"ranks": "uniform", "rank_multiple": 1}
REFITTED = {"method": "two_sided", "ranks": "global", "form": "pivoted", "refit": True}

_pair = _compressed(method="two_sided", ranks="global", **PAIR)
_pivoted = _compressed(**REFITTED, lora_rank=0)
RECIPES = (
    Recipe("dense", 1.0, _dense, out_of_domain=True, sample=True),
    Recipe("dense int8", 1.0, _int8, speed=False),
    Recipe("plain SVD", 0.8, _compressed(method="svd", **UNIFORM, **PAIR), sample=True),
    Recipe("whitened SVD", 0.8, _compressed(method="whitened", **UNIFORM, **PAIR)),
    Recipe("two-sided SVD", 0.8, _pair),
    Recipe("two-sided SVD", 0.6, _pair),
    Recipe("two-sided SVD, pivoted", 0.8, _pivoted, out_of_domain=True),
    Recipe("two-sided SVD, pivoted", 0.6, _pivoted, out_of_domain=True),
    Recipe("HyLoRA", 0.8, _hylora, out_of_domain=True, sample=True),
    Recipe("HyLoRA", 0.6, _hylora, out_of_domain=True, sample=True),
    Recipe("dense + LoRA (control)", 1.0, _control, out_of_domain=True),
)


def measure(bench: Bench, recipe: Recipe) -> Stage:
    start, s = time.perf_counter(), bench.settings
    made = recipe.make(bench, recipe)
    model, size = made.model, model_size(made.model)
    # As each would be used: a dense model as transformers runs it, a compressed one optimised.
    speed = throughput(model, optimize=recipe.target < 1) if recipe.speed else None
    other = (
        perplexity(model, bench.other, progress=bench.progress) if recipe.out_of_domain else None
    )
    sample = None
    if recipe.sample:
        sample = generate(model, bench.tokenizer, s.prompt, max_new_tokens=s.new_tokens)
    bench.say(report_lines(model))
    return Stage(
        name=recipe.name,
        target=recipe.target,
        keep=size.linears.keep_merged,
        removed=size.linears.removed_merged,
        params_linear=size.linears.merged,
        params_total=size.parameters,
        bytes_total=made.size_bytes or size.resident_bytes,
        trainable=made.recovery.trainable if made.recovery else 0,
        ppl=perplexity(model, bench.test, progress=bench.progress).ppl,
        ppl_out_of_domain=other.ppl if other else None,
        prefill_tok_s=speed.prefill_tok_s if speed else None,
        decode_tok_s=speed.decode_tok_s if speed else None,
        seconds=time.perf_counter() - start,
        optimized=bool(speed and speed.optimized),
        sample=sample,
        losses=made.recovery.losses if made.recovery else [],
    )
