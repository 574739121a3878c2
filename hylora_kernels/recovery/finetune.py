"""Recovery: train the adapters of a compressed model, all else frozen, which a hash proves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.load import tokenizer_of
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.recovery.recipe import Recipe
from hylora_kernels.recovery.run import Run, frozen_hash, training_mode
from hylora_kernels.support.hashing import tensor_hash
from hylora_kernels.support.plots import loss_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.sources import source_name


@dataclass
class FinetuneReport(Report):
    """What finetune() did.

    steps:     the updates that are in the adapters.
    losses:    of every step, in nats a token; with distillation the mixed loss.
    first_loss, last_loss: the first and last of them, NaN if there are none.
    seconds:   of the steps alone, all sessions of a resumed run together.
    trainable, total: parameters while training.
    base_hash: sha256 of all that was frozen, the same before and after.
    stopped:   "", or why training ended early.
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
    data: str
    options: dict
    losses: list[float]


def finetune(
    model: nn.Module,
    data: Tensor | list[str] | str | Path = "brown",
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int = 60,
    lr: float | None = None,
    warmup: int | None = None,
    length: int = 512,
    batch: int = 1,
    accumulate: int = 1,
    clip: float = 1.0,
    chunk: int = 64,
    distill: float = 0.0,
    teacher: nn.Module | None = None,
    merge: bool = True,
    gradient_checkpointing: bool = False,
    output_dir: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[int], object] | None = None,
) -> FinetuneReport:
    """Train A and B of every SVDLoRALinear on the next token, in place, where the model stands.

    data, tokenizer: as for data.token_blocks, the tokenizer by default the model's own; a
                LongTensor [n, L] brings its own length. The blocks are walked in a seeded
                permutation, round and round.
    batch, accumulate: a step takes batch * accumulate blocks, `batch` at a time (and that in every
                process under `accelerate launch`).
    lr, warmup: by default 1e-3 up to 60 steps, 3e-4 beyond; 10 steps, or a quarter of under 40.
                After the warm-up a cosine takes the rate down to a tenth over the steps there are.
    clip:       the largest norm of the gradient; math.inf for none.
    chunk:      rows of logits made at a time: see loss.token_loss.
    distill:    the share of the loss that is cross-entropy against `teacher`'s distribution.
    merge:      fold the adapters into the base at the end; else they stay, in their own dtype.
    output_dir: takes log.jsonl (a line a step), loss.png and checkpoint/, written at the end and
                every `save_every` steps (None: every minute) and taken up again with resume=True.
    on_step:    called with the number of steps done, before the first step (0, or where a resumed
                run goes on) and after each, in every process; `model` then has those adapters. It
                may evaluate the model, must leave it as it was, and takes no part in `seconds`.

    AdamW (0.9, 0.95) without weight decay on float32 masters of A and B. Of all dropouts only the
    adapters' acts. Afterwards the model is in eval(), with all but the adapters frozen. A loss or
    gradient that is not finite ends training with the last adapters that gave a finite loss, and
    report.stopped says so.

    Raises ValueError for a model without adapters, an argument that can't be, a checkpoint that is
    another run's (naming the field); RuntimeError if anything frozen changed.
    """
    refuse_packed(model)
    adapters = adapter_parameters(model)
    _check_counts(steps, warmup, batch, accumulate, chunk, save_every)
    lr = (1e-3 if steps <= 60 else 3e-4) if lr is None else lr
    warmup = min(10, steps // 4) if warmup is None else warmup
    _check_numbers(lr, clip, output_dir, save_every)
    _check_teacher(model, teacher, distill)
    accelerator = Accelerator(mixed_precision="no")
    needed = steps * batch * accumulate * accelerator.num_processes
    limit = None if isinstance(data, Tensor) else needed
    if tokenizer is None and not isinstance(data, Tensor):
        tokenizer = tokenizer_of(model)
    blocks = token_blocks(data, tokenizer, length, "train", limit, seed, progress)
    check_blocks(model, blocks)
    freeze_all_but_adapters(model)
    recipe = Recipe(
        steps=steps,
        lr=lr,
        warmup=warmup,
        length=blocks.shape[1],
        batch=batch,
        accumulate=accumulate,
        clip=clip,
        chunk=chunk,
        distill=distill,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        processes=accelerator.num_processes,
        data=tensor_hash([("blocks", blocks)]),
        teacher=frozen_hash(teacher) if distill else "",
        adapters=tensor_hash(adapters.items()),
        base=frozen_hash(model),
    )
    total = sum(p.numel() for p in model.parameters())
    folder = None if output_dir is None else Path(output_dir)
    with training_mode(model, adapters, gradient_checkpointing):
        run = Run(model, adapters, blocks, recipe, accelerator, teacher, folder)
        if resume:
            run.load()
        stopped = run.train(save_every, progress, on_step)
        if frozen_hash(model) != recipe.base:
            raise RuntimeError("the frozen base changed in training: its hash is another one now")
        if merge:
            merge_adapters(model)
    if run.folder is not None and run.losses:
        loss_plot({"training": run.losses}, run.folder / "loss.png")
    return _report(run, stopped, total, source_name(data))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> A or B, of every SVDLoRALinear; ValueError if there is none."""
    adapters = {}
    for path, layer in model.named_modules():
        if isinstance(layer, SVDLoRALinear) and layer.A is not None:
            adapters |= {f"{path}.A": layer.A, f"{path}.B": layer.B}
    if not adapters:
        raise ValueError(
            "model has no adapters to train: compress it with compress(..., lora_rank=64), or give "
            "a dense model some with add_adapters(model, lora_rank=64)"
        )
    return adapters


def _report(run: Run, stopped: str, total: int, data: str) -> FinetuneReport:
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
        data=data,
        options=asdict(run.recipe),
        losses=run.losses,
    )


def _check_counts(steps, warmup, batch, accumulate, chunk, save_every) -> None:
    counts = {"steps": steps, "batch": batch, "accumulate": accumulate, "chunk": chunk}
    optional = {"warmup": warmup, "save_every": save_every}
    counts |= {name: value for name, value in optional.items() if value is not None}
    for name, value in counts.items():
        least = 0 if name == "warmup" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if warmup is not None and warmup > steps:
        raise ValueError(f"warmup must be at most steps={steps}, got {warmup}")


def _check_numbers(lr, clip, output_dir, save_every) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not clip > 0:
        raise ValueError(f"clip must be positive (math.inf for no clipping), got {clip}")
    if save_every is not None and output_dir is None:
        raise ValueError(f"save_every={save_every} needs an output_dir to save to")


def _check_teacher(model, teacher, distill) -> None:
    if not 0 <= distill <= 1:
        raise ValueError(f"distill must be in [0, 1], got {distill}")
    if (distill > 0) != (teacher is not None):
        given = "no teacher" if teacher is None else "a teacher"
        raise ValueError(f"distill > 0 goes with a teacher, got distill={distill} and {given}")
    if teacher is None:
        return
    if teacher is model:
        raise ValueError("teacher must be another model than the one that is trained")
    ours, theirs = (m.get_output_embeddings().weight for m in (model, teacher))
    if theirs.shape[0] != ours.shape[0]:
        raise ValueError(f"teacher must know the model's {ours.shape[0]} tokens, not {len(theirs)}")
    if theirs.device != ours.device:
        raise ValueError(f"teacher must be on the model's {ours.device}, not {theirs.device}")
    teacher.eval()
