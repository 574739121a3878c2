"""The demo's recipes: how each stage's model is made from the dense one."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.compress import compress
from hylora_kernels.evaluation.breadth import TextQuality
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.experiments.demo.stages import Settings, stage_label
from hylora_kernels.model import load as models
from hylora_kernels.model.adapters import add_adapters
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
GROUP = 64  # weights that share one scale in the int8 stage


@dataclass
class Setup:
    """All that the stages share: the settings, the output folder, the texts as blocks of tokens."""

    settings: Settings
    folder: Path
    progress: bool
    spent: dict[str, float] = field(default_factory=dict)  # seconds of the stage at work, by kind
    expected: dict[str, TextQuality] = field(default_factory=dict)  # the dense model, by text

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

    size_bytes: where the tensors in memory aren't what would be stored, else None.
    recovery, held_out: of a trained model. ranks, predicted_loss: of a compressed one. See Stage.
    """

    model: nn.Module
    size_bytes: int | None = None
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


def _int8(setup: Setup, recipe: Recipe) -> StageModel:
    """Every matrix, embedding included, rounded to 8 bits in place; a tied one once."""
    model, size = setup.dense(), 0
    for parameter in model.parameters():
        if parameter.dim() == 2:
            rounded, count = round_to_int8(parameter.detach())
            parameter.data, size = rounded, size + count
        else:
            size += parameter.nbytes
    return StageModel(model, size_bytes=size + sum(b.nbytes for b in model.buffers()))


def round_to_int8(weight: Tensor) -> tuple[Tensor, int]:
    """weight [N, K] -> (its values after rounding to int8, in its own dtype; the bytes as int8).

    Round to nearest, symmetric, one float16 scale for each GROUP weights along K.
    """
    N, K = weight.shape
    groups = F.pad(weight.float(), (0, -K % GROUP)).view(N, -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half().float().clamp_min(1e-8)
    rounded = (groups / scales).round().clamp(-127, 127) * scales
    return rounded.view(N, -1)[:, :K].to(weight.dtype), N * K + 2 * scales.numel()


# ------------------------------------------------------------------------------- compressed models


def _compressed(**options) -> Callable[[Setup, Recipe], StageModel]:
    return lambda setup, recipe: _compress(setup, recipe, **options)


def _compress(setup: Setup, recipe: Recipe, alone: bool = False, **options) -> StageModel:
    """alone: calibrated on the training text alone."""
    s, text = setup.settings, {}
    if options["method"] != "svd":
        ids, _ = setup.alone if alone else setup.mix
        text = {"calibration": ids, "samples": len(ids)}
    model, report = compress(
        setup.dense(),
        keep=recipe.target,
        tokenizer=setup.tokenizer,
        length=s.length,
        seed=s.seed,
        measure=0,  # Each stage is measured on held-out text.
        progress=setup.progress,
        **({"rank_multiple": s.rank_multiple} | text | options),
    )
    for step, kind in SPENT.items():
        setup.spent[kind] = setup.spent.get(kind, 0.0) + report.seconds.get(step, 0.0)
    ranks = []
    for layer in report.layers:
        full = min(layer.out_features, layer.in_features)
        ranks.append({"path": layer.path, "rank": layer.rank or full, "full_rank": full})
    return StageModel(model, ranks=ranks, predicted_loss=report.predicted_loss)


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

_pair = _compressed(method="two_sided", ranks="global", **PAIR)
_pivoted = _compressed(**REFITTED, lora_rank=0)
RECIPES = (
    Recipe("dense", 1.0, _dense, breadth=True, sample=True),
    Recipe("dense, optimised", 1.0, _dense, optimize=True),
    Recipe("dense int8", 1.0, _int8, speed=False),
    Recipe("plain SVD", 0.8, _compressed(method="svd", **UNIFORM, **PAIR), sample=True),
    Recipe("whitened SVD", 0.8, _compressed(method="whitened", **UNIFORM, **PAIR)),
    Recipe("two-sided SVD", 0.8, _pair),
    Recipe("two-sided SVD", 0.6, _pair),
    Recipe("two-sided SVD, pivoted", 0.8, _pivoted, breadth=True),
    Recipe("two-sided SVD, pivoted", 0.6, _pivoted, breadth=True),
    Recipe("HyLoRA", 0.8, _hylora, breadth=True, sample=True),
    Recipe("HyLoRA", 0.6, _hylora, breadth=True, sample=True),
    Recipe("HyLoRA, one text", 0.8, _hylora_alone, breadth=True, speed=False),
    Recipe("dense + LoRA (control)", 1.0, _control, breadth=True),
)
