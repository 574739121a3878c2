"""The demo's recipes: how each stage's model is made from the dense one."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.quantize_model import quantize_model
from hylora_kernels.compression.report import CompressReport
from hylora_kernels.evaluation.breadth import TextQuality
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.experiments.demo.stages import Settings, stage_label
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model import load as models
from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.saving import save_pretrained
from hylora_kernels.recovery.blocks import training_mix
from hylora_kernels.recovery.finetune import FinetuneReport, finetune
from hylora_kernels.support.devices import fast_dtype, resolve_device
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.storage import write_text
from hylora_kernels.support.timing import timed
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.mix import Part, default_mix, mixed_blocks
from hylora_kernels.text.self_text import self_blocks
from hylora_kernels.text.sources import SELF, held_out

# Steps of compress() -> the demo's kinds of work.
SPENT = {"calibrate": "calibration", "factorize": "factorization", "refit": "refit"}


@dataclass
class Setup:
    """All that the stages share: the settings, the output folder, the texts as blocks of tokens."""

    settings: Settings
    folder: Path
    progress: bool
    spent: dict[str, float] = field(default_factory=dict)  # seconds of the stage at work, by kind
    expected: dict[str, TextQuality] = field(default_factory=dict)  # the dense model, by text
    control: nn.Module | None = None  # the dense model, adapted to the training text

    def __post_init__(self):
        _, self.tokenizer = self._load()
        self.given = {name: self._blocks(text) for name, text in self._texts() if text != SELF}

    def dense(self) -> nn.Module:
        """The dense model, loaded anew."""
        return self._load()[0]

    def _load(self):
        s = self.settings
        dtype = fast_dtype(resolve_device(s.device)) if s.dtype == "auto" else s.dtype
        return models.load_model(s.model, s.device, dtype)

    def _texts(self) -> list[tuple[str, str | list[str]]]:
        texts = self.settings.texts
        return list(texts.items()) if isinstance(texts, Mapping) else [(t, t) for t in texts]

    def _blocks(self, text: str | list[str]) -> Tensor:
        """Blocks to measure on, of a part that is not trained on."""
        s = self.settings
        data, split = held_out(text, s.train)
        return token_blocks(data, self.tokenizer, s.length, split, s.blocks)

    @functools.cached_property
    def texts(self) -> dict[str, Tensor]:
        """name -> blocks to measure on."""
        return {
            name: self.own_text("test", self.settings.blocks, seed=0)
            if text == SELF
            else self.given[name]
            for name, text in self._texts()
        }

    @property
    def first(self) -> str:
        """The name of the first text."""
        return self._texts()[0][0]

    def own_text(self, part: str, count: int, seed: int | None = None) -> Tensor:
        """The dense model's own text; the cache has it from then on."""
        s = self.settings
        seed = s.seed if seed is None else seed
        with timed(self.spent, "self text"):
            return self_blocks(
                self.dense(), self.tokenizer, count, s.length, part, seed, self.progress
            )

    @functools.cached_property
    def mix(self) -> tuple[Tensor, list[Part]]:
        """The calibration text, and what each source gave."""
        mix = default_mix(self.settings.train, self.settings.samples)
        for source, count in mix:
            if source == SELF:
                self.own_text("calibration", count)
        return self._mixed(mix)

    @functools.cached_property
    def alone(self) -> tuple[Tensor, list[Part]]:
        """As many blocks of the training text alone."""
        return self._mixed([(self.settings.train, len(self.mix[0]))])

    def _mixed(self, mix: list) -> tuple[Tensor, list[Part]]:
        s = self.settings
        return mixed_blocks(
            mix, self.dense(), self.tokenizer, s.length, seed=s.seed, progress=self.progress
        )

    def saved(self, target: float) -> Path:
        """The folder of the recovered model of that keep."""
        return self.folder / f"hylora-{target:g}"

    def training(self, label: str) -> Path:
        """The folder of that stage's training run."""
        return self.folder / "training" / label

    def say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)

    def key(self) -> str:
        """Changes with anything that the numbers depend on, this package's own code included."""
        texts = {f"text {name}": ids for name, ids in self.given.items()}
        settings = asdict(self.settings)
        return fingerprint(model=self.dense(), settings=settings, code=_source_code(), **texts)


@functools.cache
def _source_code() -> dict[str, str]:
    """This package's source files, as they were at the first call."""
    package = Path(__file__).parents[2]
    return {str(p.relative_to(package)): p.read_text() for p in sorted(package.rglob("*.py"))}


@dataclass
class StageModel:
    """A stage's model, and how it came to be.

    recovery, held_out: of a trained model. ranks, predicted_loss: of a compressed one. See Stage.
    """

    model: nn.Module
    recovery: FinetuneReport | None = None
    held_out: list[list[float]] = field(default_factory=list)
    ranks: list[dict] = field(default_factory=list)
    predicted_loss: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A stage before it is measured: make(setup, recipe) -> StageModel, and what to measure of it.

    breadth:  measure it on all texts, not on the first one alone.
    optimize: measure it laid out by optimize_for_inference, perplexity included.
    """

    name: str
    target: float
    make: Callable[[Setup, Recipe], StageModel]
    breadth: bool = False
    speed: bool = True
    sample: bool = False
    optimize: bool = False

    @property
    def label(self) -> str:
        return stage_label(self.name, self.target)


# ----------------------------------------------------------------------------- uncompressed models


def _dense(setup: Setup, recipe: Recipe) -> StageModel:
    return StageModel(setup.dense())


# ------------------------------------------------------------------------------- compressed models


def _compressed(**options) -> Callable[[Setup, Recipe], StageModel]:
    return lambda setup, recipe: _compress(setup, recipe, **options)


def _compress(setup: Setup, recipe: Recipe, alone: bool = False, **options) -> StageModel:
    """alone: calibrated on the training text alone."""
    given = {"keep": recipe.target, "rank_multiple": setup.settings.rank_multiple} | options
    model, report = compress(setup.dense(), **_common(setup, options["method"], alone), **given)
    _count_seconds(setup, report)
    ranks = []
    for layer in report.layers:
        full = min(layer.out_features, layer.in_features)
        ranks.append({"path": layer.path, "rank": layer.rank or full, "full_rank": full})
    return StageModel(model, ranks=ranks, predicted_loss=report.predicted_loss)


def _common(setup: Setup, method: str, alone: bool = False) -> dict[str, Any]:
    """Options that all compressions share; method "svd" reads no text."""
    s = setup.settings
    # Each stage is measured on held-out text.
    common = {"tokenizer": setup.tokenizer, "length": s.length, "seed": s.seed, "measure": 0}
    common["progress"] = setup.progress
    if method != "svd":
        ids, _ = setup.alone if alone else setup.mix
        common |= {"calibration": ids, "samples": len(ids)}
    return common


def _count_seconds(setup: Setup, report: CompressReport) -> None:
    for step, kind in SPENT.items():
        setup.spent[kind] = setup.spent.get(kind, 0.0) + report.seconds.get(step, 0.0)


# --------------------------------------------------------------------------------- quantised models


def _quantized(**options) -> Callable[[Setup, Recipe], StageModel]:
    return lambda setup, recipe: _quantize(setup, setup.dense(), **options)


def _quantize(setup: Setup, model: nn.Module, method: str = "two_sided", **options) -> StageModel:
    model, report = quantize_model(model, method=method, **_common(setup, method), **options)
    _count_seconds(setup, report)
    # Without text the metric knows no losses.
    return StageModel(model, predicted_loss=None if method == "svd" else report.predicted_loss)


def _bits(setup: Setup, recipe: Recipe) -> StageModel:
    """Ranks and bits under one budget. Its pass over the mix makes the factors and the codes that
    the later stages read from the cache: two more passes would take a fifth of the demo."""
    budget = {"keep": None, "target_mb": setup.settings.target_mb, "bits": "auto"}
    made = _compress(setup, recipe, method="two_sided", lora_rank=0, **budget)
    return StageModel(made.model, predicted_loss=made.predicted_loss)


def _recovered_int8(setup: Setup, recipe: Recipe) -> StageModel:
    """The recovered model, which an earlier stage saved."""
    return _quantize(setup, load_pretrained(setup.saved(recipe.target)), **INT8)


def _control_bits(setup: Setup, recipe: Recipe) -> StageModel:
    """The control's model in bits: to adapt first costs nothing in bytes."""
    if setup.control is None:  # An earlier run has trained it.
        _control(setup, CONTROL)
    model, setup.control = setup.control, None
    assert model is not None
    for path, layer in list(model.named_modules()):
        if isinstance(layer, SVDLoRALinear):
            model.set_submodule(path, layer.to_linear())
    return _quantize(setup, model, target_mb=setup.settings.target_mb)


# --------------------------------------------------------------------------------- recovered models


def _hylora(setup: Setup, recipe: Recipe) -> StageModel:
    made = _recovered(setup, recipe)
    save_pretrained(made.model, setup.saved(recipe.target), setup.tokenizer)
    return made


def _hylora_alone(setup: Setup, recipe: Recipe) -> StageModel:
    return _recovered(setup, recipe, alone=True)


def _recovered(setup: Setup, recipe: Recipe, alone: bool = False) -> StageModel:
    s = setup.settings
    made = _compress(setup, recipe, alone, **REFITTED, lora_rank=s.lora_rank)
    steps = s.steps if recipe.target > 0.7 else s.deep_steps
    for source, count in training_mix(s.train, "keep", steps):
        if source == SELF:
            setup.own_text("recovery", count)
    _recover(setup, recipe, made, steps, objective="keep", teacher=setup.dense)
    return made


def _control(setup: Setup, recipe: Recipe) -> StageModel:
    """The dense model with adapters trained as long: its gain is adaptation to the text alone."""
    s = setup.settings
    made = StageModel(add_adapters(setup.dense(), lora_rank=s.control_rank, seed=s.seed))
    _recover(setup, recipe, made, s.steps)
    setup.control = made.model
    return made


def _recover(setup: Setup, recipe: Recipe, made: StageModel, steps: int, **objective) -> None:
    """Train made.model's adapters and merge them; fills made.recovery and made.held_out."""
    s, folder = setup.settings, setup.training(recipe.label)
    held_out = setup.given[setup.first][: s.recovery_blocks]
    curve, start = HeldOutCurve(made.model, held_out, steps, folder), time.perf_counter()
    made.recovery = finetune(
        made.model,
        s.train,
        setup.tokenizer,
        steps=steps,
        length=s.length,
        output_dir=folder,
        seed=s.seed,
        progress=setup.progress,
        on_step=curve.on_step,
        **objective,
    )
    if made.recovery.stopped:
        raise FloatingPointError(f"{recipe.label}: {made.recovery.stopped}")
    setup.spent["evaluation"] = setup.spent.get("evaluation", 0.0) + curve.seconds
    setup.spent["recovery"] = time.perf_counter() - start - curve.seconds
    made.held_out = curve.points()


class HeldOutCurve:
    """The loss over held-out blocks before training, at a quarter, half and three quarters of the
    steps, and at the end; in a file, so that a resumed run has the points of its first session."""

    def __init__(self, model: nn.Module, blocks: Tensor, steps: int, folder: Path):
        self.model, self.blocks = model, blocks
        self.steps = {round(quarter * steps / 4) for quarter in range(5)}
        self.file = folder / "held_out.json"
        self.seconds = 0.0  # of this session's evaluations

    def on_step(self, step: int) -> None:
        if step in self.steps:
            start = time.perf_counter()
            loss = perplexity(self.model, self.blocks, progress=False).nll
            self.seconds += time.perf_counter() - start
            write_text(self.file, json.dumps(dict(self.points()) | {step: loss}))

    def points(self) -> list[list[float]]:
        """[step, loss in nats a token], in the order of the steps."""
        found = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}
        return sorted([int(step), loss] for step, loss in found.items())


# ------------------------------------------------------------------------------------- the recipes

PAIR = {"form": "pair", "lora_rank": 0, "refit": False}
# Rounded down to multiples of 16 layer by layer, equal keeps of 0.8 would come to 0.77 in all.
UNIFORM = {"ranks": "uniform", "rank_multiple": 1}
REFITTED = {"method": "two_sided", "ranks": "global", "form": "pivoted", "refit": True}

INT8 = {"method": "svd", "bits": 8, "uniform": True, "rounding": "rtn"}

_pair = _compressed(method="two_sided", ranks="global", **PAIR)
_pivoted = _compressed(**REFITTED, lora_rank=0)
CONTROL = Recipe("dense + LoRA (control)", 1.0, _control, breadth=True)
RECIPES = (
    Recipe("dense", 1.0, _dense, breadth=True, sample=True),
    Recipe("dense, optimised", 1.0, _dense, optimize=True),
    Recipe("dense int8", 1.0, _quantized(**INT8), optimize=True),
    Recipe("4 bits, to nearest", 1.0, _quantized(**INT8 | {"bits": 4}), speed=False),
    Recipe("HyLoRA bits", 1.0, _bits, breadth=True, sample=True, optimize=True),
    Recipe("4 bits, GPTQ", 1.0, _quantized(bits=4, uniform=True), speed=False),
    Recipe("plain SVD", 0.8, _compressed(method="svd", **UNIFORM, **PAIR), sample=True),
    Recipe("whitened SVD", 0.8, _compressed(method="whitened", **UNIFORM, **PAIR)),
    Recipe("two-sided SVD", 0.8, _pair),
    Recipe("two-sided SVD", 0.6, _pair),
    Recipe("two-sided SVD, pivoted", 0.8, _pivoted, breadth=True),
    Recipe("two-sided SVD, pivoted", 0.6, _pivoted, breadth=True),
    Recipe("HyLoRA", 0.8, _hylora, breadth=True, sample=True),
    Recipe("HyLoRA", 0.6, _hylora, breadth=True, sample=True),
    Recipe("HyLoRA, one text", 0.8, _hylora_alone, breadth=True, speed=False),
    Recipe("HyLoRA, then int8", 0.8, _recovered_int8, breadth=True, optimize=True),
    CONTROL,
    Recipe("dense + LoRA, then bits", 1.0, _control_bits, breadth=True, speed=False),
)
