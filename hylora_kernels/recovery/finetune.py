"""finetune(): train adapters or factors of a compressed model; hashes prove that no more moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters, renew_adapters
from hylora_kernels.model.check import check_model
from hylora_kernels.model.modules import (
    freeze_all_but_adapters,
    model_fingerprint,
    parameter_count,
)
from hylora_kernels.recovery.blocks import training_blocks
from hylora_kernels.recovery.blockwise import BlockFit, BlockRun
from hylora_kernels.recovery.factors import balanced_factors, starting_tensors
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.recovery.recipe import Recipe, frozen_hash
from hylora_kernels.recovery.run import Run, taken_rows, training_mode
from hylora_kernels.recovery.shard import require_processes, sharded
from hylora_kernels.recovery.teacher import Teacher, load_teacher, run_teacher, set_aside
from hylora_kernels.support.console import format_bytes, format_seconds, table
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.options import takes_options
from hylora_kernels.support.plots import loss_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.mix import Part

LORA_RANK = 64  # Of a merged model's new adapters; that of compress().

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class FinetuneReport(Report):
    """The result of finetune().

    steps:     updates that the model holds.
    tokens:    tokens trained on, by all processes, in the steps done.
    seconds:   time of the steps alone, in all sessions of a resumed run.
    first_loss, last_loss: of `losses`, NaN if no step was done.
    lr:        peak learning rate.
    trainable, total: parameters during training.
    base_hash: sha256 of everything frozen, the same before and after.
    stopped:   "", or the reason why training ended early.
    sources:   the texts, and the blocks and tokens of each.
    teacher:   name of the teacher, "" without one. teacher_bytes: of its states on disk, for the
               blocks of this process: predictions x d x bytes of its dtype. teacher_seconds: that
               it ran in this session.
    options:   the recipe.
    losses:    mean loss of each step in nats a token: of cross-entropy and KL by their shares. With
               scope "block" of each block's steps in turn, in the unit of `fits`.
    fits:      with scope "block" each block's error before and after; steps and tokens are
               then those of each block, and teacher_seconds those of the dense blocks.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_loss: float
    last_loss: float
    lr: float
    trainable: int
    total: int
    base_hash: str
    stopped: str
    sources: list[Part]
    teacher: str
    teacher_bytes: int
    teacher_seconds: float
    options: dict[str, object]
    losses: list[float]
    fits: list[BlockFit] = field(default_factory=list)

    def render(self) -> Table:
        """A rich table."""
        rows: list[tuple[str, object]] = [
            ("trained", f"{self.trainable:,} of {self.total:,} parameters"),
            ("steps", self.steps),
            ("tokens", self.tokens),
            ("time", format_seconds(self.seconds)),
            ("tokens/s", round(self.tokens_per_second)),
            ("learning rate", self.lr),
            ("loss", f"{self.first_loss:.3f} to {self.last_loss:.3f}"),
        ]
        if self.fits:
            rows.append(("dense blocks", format_seconds(self.teacher_seconds)))
        elif self.teacher:
            states = f"{format_bytes(self.teacher_bytes)} on disk"
            rows.append(("teacher", f"{self.teacher}, {format_seconds(self.teacher_seconds)}"))
            rows.append(("teacher's states", states))
        for fit in self.fits:
            rows.append((fit.path, f"{fit.before:.4f} to {fit.after:.4f}"))
        if self.stopped:
            rows.append(("stopped", self.stopped))
        return table(f"trained on {self.text}", ("", "value"), rows)

    @property
    def text(self) -> str:
        """The names of the sources."""
        return "; ".join(part.name for part in self.sources)


@takes_options(FinetuneOptions)
def finetune(model: nn.Module, options: FinetuneOptions) -> FinetuneReport:
    """Train the compressed layers of `model`, in place, on its device.

    objective "adapt" is next-token cross-entropy on a text. "keep" is KL(teacher || model) from the
    dense model on the text, on text that the dense model writes, and on "stdlib", in 4 : 2 : 1 as
    in calibration: it keeps what the text lacks. The teacher runs before training, over the blocks
    that the steps will take. What its output head reads is stored in the cache, predictions x d
    numbers in its dtype, and in training the head alone is in memory, or the model's own where that
    is the same. A model whose logits are more than its head's product (capped or scaled ones) is
    stored as logits, words / d times as large. One that was given by name is freed before the first
    step.

    train "adapters" is A and B of every SVDLoRALinear. "factors" is the factors themselves, and the
    norms' weights at ten times the rate. A layer of rank R, its adapter merged, becomes U sqrt(S)
    [N, R] and sqrt(S) Vh [R, K], which plain products apply, and plain factors again in the end:
    size and form are those of the merged layer. Linears left dense, embeddings, biases and factors
    that several modules share stay frozen; experts' compressed layers learn as all others. An
    exception puts the old layers back. Memory beside these: 20 bytes a number (weight, gradient,
    two moments, last good value), 2.0 GB for 98 million. A checkpoint takes 12 bytes a number.

    AdamW (betas 0.9 and 0.95, no weight decay) updates float32 copies. The blocks are taken in a
    seeded permutation, over and over. Only the adapters' dropout acts. Afterwards the model is in
    eval() and all but the adapters is frozen. If a loss or gradient is not finite, training ends
    with the last weights that gave a finite loss, and report.stopped says so.

    Under torchrun or `accelerate launch` each process holds the whole model and takes its share of
    the blocks; the first one alone prints and writes. With shard=True each process holds its part
    of the frozen weights of the blocks while it trains (recovery.shard). The model, and a teacher
    that is loaded here, may then come in the CPU's memory, whole in each process, and go to the GPU
    in parts; afterwards the model is whole again where it was.

    With train "adapters" a merged model gets new ones first, of its last singular components,
    lora_rank of them (model.adapters.renew_adapters): it has as many parameters when they are
    merged.

    scope "block" trains one block after the other, `steps` updates each, to give the states that
    the dense model has behind it, from those that the trained blocks before it make
    (recovery.blockwise). Gradients, moments and activations are those of one block; the dense model
    stays in memory, its blocks only if it was loaded whole. In one process. The blocks that are
    done are in the cache, and a run that was stopped takes them from there.

    Raises ValueError for a dense model without adapters or factors, an argument out of its range,
    or a checkpoint of another run (naming the field); RuntimeError if anything frozen changed.

    Example:
        model = load_pretrained("my-folder")
        report = finetune(model, "my.txt", tokenizer=tokenizer, steps=2, length=64)
        report.first_loss, report.last_loss
    """
    check_model(model, "train")
    by_factors = options.train == "factors"
    is_merged = not by_factors and _is_merged(model, options.lora_rank)
    to_train = starting_tensors if by_factors else adapter_parameters
    if not is_merged:
        to_train(model)  # raises if there is nothing
    accelerator = Accelerator(mixed_precision="no")
    if options.shard:
        require_processes(accelerator.num_processes)
    if options.scope == "block":
        return _by_block(model, options, accelerator, to_train, is_merged)
    blocks, sources, teacher = _prepare(model, options, accelerator)
    if is_merged:
        renew_adapters(model, options.lora_rank or LORA_RANK, options.seed)
    freeze_all_but_adapters(model)
    start = to_train(model)
    key = teacher.key if teacher else ""
    recipe = Recipe.of(options, model, start, blocks, key, accelerator.num_processes)
    shown = options.progress and accelerator.is_main_process
    prepared = balanced_factors(model, shown) if by_factors else nullcontext(start)
    with prepared as trained, training_mode(model, trained, options.gradient_checkpointing):
        total = parameter_count(model)
        with _placed(model, trained.values(), options, accelerator):
            run = Run(model, trained, blocks, recipe, options, accelerator, teacher)
            if options.resume:
                run.load()
            stopped = run.train()
        if frozen_hash(model, trained.values()) != recipe.base:
            raise RuntimeError("the frozen base changed in training: its hash is another one now")
        if options.merge and not by_factors:
            merge_adapters(model, requantize=False)
    if run.folder is not None and run.losses:
        loss_plot({"training": run.losses}, run.folder / "loss.png")
    accelerator.wait_for_everyone()  # The first process has written the files.
    return _report(run, stopped, total, sources)


def _by_block(
    model: nn.Module,
    options: FinetuneOptions,
    accelerator: Accelerator,
    to_train: Callable[[nn.Module], Mapping[str, Tensor]],
    is_merged: bool,
) -> FinetuneReport:
    """finetune() with scope "block"."""
    if accelerator.num_processes > 1:
        raise ValueError("scope='block' trains in one process, without torchrun")
    dense = load_teacher(options.teacher, model, input_device(model))
    blocks, sources = training_blocks(model, dense, options, 1, options.progress)
    if is_merged:
        renew_adapters(model, options.lora_rank or LORA_RANK, options.seed)
    freeze_all_but_adapters(model)
    key = model_fingerprint(dense)
    recipe = Recipe.of(options, model, to_train(model), blocks, key, 1)
    total = parameter_count(model)
    run = BlockRun(model, dense, blocks, recipe, options)
    stopped = run.train()
    freeze_all_but_adapters(model).eval()
    tokens = recipe.steps * recipe.blocks_per_step * recipe.length
    return FinetuneReport(
        steps=recipe.steps,
        tokens=tokens,
        seconds=run.seconds,
        tokens_per_second=tokens / run.seconds,
        first_loss=run.losses[0] if run.losses else math.nan,
        last_loss=run.losses[-1] if run.losses else math.nan,
        lr=recipe.lr,
        trainable=run.trainable,
        total=total,
        base_hash=recipe.base,
        stopped=stopped,
        sources=sources,
        teacher=getattr(dense, "name_or_path", "") or type(dense).__name__,
        teacher_bytes=0,
        teacher_seconds=run.dense_seconds,
        options=asdict(recipe),
        losses=run.losses,
        fits=run.fits,
    )


def _is_merged(model: nn.Module, lora_rank: int | None) -> bool:
    """True if the model is compressed and none of its layers has an adapter. Raises ValueError for
    a lora_rank that another model would ignore."""
    layers = [layer for layer in model.modules() if isinstance(layer, SVDLoRALinear)]
    if layers and not any(layer.lora_rank for layer in layers):
        return True
    if layers and lora_rank is not None:
        rank = max(layer.lora_rank for layer in layers)
        raise ValueError(
            f"lora_rank={lora_rank} is for a merged model, and this one has adapters of rank "
            f"{rank}: they are trained as they are"
        )
    return False


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """path.A and path.B -> the parameter, of every SVDLoRALinear that has an adapter.

    Raises ValueError if no layer has one.
    """
    adapters: dict[str, nn.Parameter] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, SVDLoRALinear) and layer.A is not None:
            adapters |= {f"{path}.A": layer.A, f"{path}.B": layer.B}
    if not adapters:
        raise ValueError(
            "model is dense and has no adapters to train: compress() it first, or give it some "
            "with add_adapters(model, lora_rank=64)"
        )
    return adapters


def _prepare(
    model: nn.Module, options: FinetuneOptions, accelerator: Accelerator
) -> tuple[Tensor, list[Part], Teacher | None]:
    """(the token blocks, int64 [n, L]; what each source gave; the teacher with its states of the
    blocks that this process takes). A teacher that is loaded for this is freed at the end."""
    given, device = options.teacher, input_device(model)
    with nullcontext() if given is None or isinstance(given, nn.Module) else set_aside(model):
        return _with_teacher(model, options, accelerator, device)


def _with_teacher(
    model: nn.Module, options: FinetuneOptions, accelerator: Accelerator, device: torch.device
) -> tuple[Tensor, list[Part], Teacher | None]:
    """_prepare(), whose local variables are the last references to a teacher that is loaded.

    device: of the training.
    """
    dense = None if options.teacher is None else load_teacher(options.teacher, model, device)
    shown, processes = options.progress and accelerator.is_main_process, accelerator.num_processes
    with accelerator.main_process_first():  # The others find the text that it wrote in the cache.
        blocks, sources = training_blocks(model, dense, options, processes, shown)
    if dense is None or not options.distill:
        return blocks, sources, None
    own = blocks[taken_rows(options, len(blocks), accelerator).unique()]
    if options.shard:
        device = accelerator.device
    divided = options.shard and dense is not options.teacher
    return blocks, sources, run_teacher(dense, model, own, device, shown, divided)


def _placed(
    model: nn.Module, trained: Iterable[Tensor], options: FinetuneOptions, accelerator: Accelerator
) -> AbstractContextManager[None]:
    return sharded(model, accelerator.device, trained) if options.shard else nullcontext()


def _report(run: Run, stopped: str, total: int, sources: list[Part]) -> FinetuneReport:
    tokens = len(run.losses) * run.recipe.blocks_per_step * run.recipe.length
    return FinetuneReport(
        steps=run.good_steps,
        tokens=tokens,
        seconds=run.seconds,
        tokens_per_second=tokens / run.seconds,
        first_loss=run.losses[0] if run.losses else math.nan,
        last_loss=run.losses[-1] if run.losses else math.nan,
        lr=run.recipe.lr,
        trainable=sum(p.numel() for p in run.parameters),
        total=total,
        base_hash=run.recipe.base,
        stopped=stopped,
        sources=sources,
        teacher=run.teacher.name if run.teacher else "",
        teacher_bytes=run.teacher.nbytes if run.teacher else 0,
        teacher_seconds=run.teacher.seconds if run.teacher else 0.0,
        options=asdict(run.recipe),
        losses=run.losses,
    )
