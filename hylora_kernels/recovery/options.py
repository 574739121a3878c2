"""The options of finetune(): names, types, defaults, limits and help, each written here once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hylora_kernels.support.options import check_options, option, option_of
from hylora_kernels.text.options import TextOptions
from hylora_kernels.text.sources import KINDS, SELF, Mix, Source, texts_in

OBJECTIVES = ("adapt", "keep")
TRAINED = ("adapters", "factors")
SCOPES = ("model", "block")
# 2e-4 diverges: SmolLM2-135M at keep 0.8, KL 0.45 instead of 0.18 after 60 steps of 512 tokens.
FACTORS_LR = 3e-5
BLOCK_LR = 1e-4  # Between those of factors and of adapters; not tuned on a real model.
KEEP_LR = 2e-4  # Of adapters: at 1e-3 the KL rises from 0.20 to 0.24 in the first 30 steps.
GivenTeacher = nn.Module | str | Path | Callable[[], nn.Module]


@dataclass(frozen=True)
class FinetuneOptions:
    """All arguments of finetune() but the model, checked; lr and warmup are filled in.

    data, tokenizer, split, column: as for text.mix.mixed_blocks: a source or a list of (source,
                 blocks); a LongTensor [n, L] brings its own length L.
    lr, warmup:  after the warm-up the rate falls on a cosine to lr / 10 at the last step.
    chunk:       see model.loss.token_loss.
    objective:   "adapt" to the text, or "keep" what the dense model knows of any text. It sets the
                 default of distill, and of the data (recovery.finetune says how).
    train:       "adapters", or "factors" (recovery.finetune says how). It sets the default of lr,
                 which is the factors'; the norms' is ten times as high. By default "factors" to
                 keep, unless lora_rank, merge=False or shard ask for adapters.
    distill:     0 is next-token cross-entropy alone, 1 KL(teacher || model) alone.
    teacher:     a causal LM with the same vocabulary: a module, a hub id or folder, or a function
                 that loads it. It runs before training (recovery.teacher); one that is loaded here
                 is freed before the first step.
    output_dir:  gets log.jsonl (a line a step), loss.png and checkpoint/training.safetensors.
    on_step:     called in every process before the first step (with 0, or with the number of steps
                 that a resumed run has done) and after each step; the model then is as
                 those left it. It may evaluate the model and must leave it as it was (with train
                 "factors" it can't be saved there). Its time does not count in the report's
                 `seconds`.

    Raises ValueError naming the argument, what was given and what is allowed.
    """

    data: Source | Mix = option_of(
        TextOptions, "data", help=f"Text to train on: {KINDS}, or {SELF}: text of the teacher."
    )
    tokenizer: object = option(None, "By default the model's own.", reported=False)
    steps: int = option(60, "Updates.", least=1)
    lr: float | None = option(
        None,
        "Peak learning rate. By default 1e-3 up to 60 steps, 3e-4 for more; 2e-4 of adapters to "
        "keep; 3e-5 of factors; 1e-4 block by block.",
    )
    warmup: int | None = option(
        None,
        "Steps of linear warm-up. By default 10, or a quarter of fewer than 40 steps.",
        least=0,
    )
    length: int = option(512, "Tokens in a block.")
    batch: int = option(1, "Blocks in one forward.", least=1)
    accumulate: int = option(
        1, "Forwards in one step, which takes batch * accumulate blocks in each process.", least=1
    )
    clip: float = option(1.0, "Largest norm of the gradient; inf: no clipping.")
    chunk: int = option(128, "Tokens that the output head takes at a time.", least=1)
    objective: str = option(
        "adapt",
        "Aim: adapt to the text, by next-token cross-entropy; or keep the dense model's breadth, "
        "by KL from the teacher, on the mix of texts that calibration reads.",
        choices=OBJECTIVES,
    )
    train: str | None = option(
        None,
        "What learns: the adapters, or the factors themselves and the weights of the norms, which "
        "recovers more and takes more memory. By default the adapters to adapt, the factors to "
        "keep.",
        choices=TRAINED,
    )
    scope: str = option(
        "model",
        "What is trained at once: the model, on its predictions; or block after block, on the "
        "states that the dense model has behind it, in the memory of one block's gradients. "
        "Each block gets `steps` updates then.",
        choices=SCOPES,
    )
    distill: float | None = option(
        None,
        "Share of the KL from the teacher in the loss, beside the cross-entropy. By default 0 to "
        "adapt, 1 to keep.",
    )
    teacher: GivenTeacher | None = option(
        None,
        "Dense model that the compressed one came from: hub id, folder or smollm2-135m.",
        reported=False,
    )
    merge: bool = option(
        True,
        "Fold the adapters into the base at the end. A base of codes keeps them: rounded again, it "
        "would lose them in part.",
        reported=False,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward: less memory, more time."
    )
    shard: bool = option(
        False,
        "Divide the frozen base among the processes of torchrun (FSDP2), for one larger than a "
        "GPU. Adapters alone are trained then.",
        reported=False,
    )
    output_dir: str | Path | None = option(
        None, "Folder of the log, the loss curve and the checkpoint.", reported=False
    )
    save_every: int | None = option(
        None, "Steps between checkpoints. By default one a minute.", least=1, reported=False
    )
    resume: bool = option(True, "Continue from the checkpoint, if there is one.", reported=False)
    seed: int = option(0, "Seed of the order of the data and of the dropout.")
    progress: bool = option(True, "Show progress bars.", reported=False)
    on_step: Callable[[int], object] | None = option(
        None, "Called with the number of steps done.", reported=False
    )
    lora_rank: int | None = option(
        None,
        "Rank of the new adapters that a merged model gets. By default 64.",
        least=1,
        reported=False,
    )
    split: str = option_of(TextOptions, "split")
    column: str | None = option_of(TextOptions, "column")

    def __post_init__(self) -> None:
        check_options(self)
        if self.train is None:
            is_asked = self.lora_rank is not None or not self.merge or self.shard
            of_adapters = self.objective == "adapt" or is_asked
            object.__setattr__(self, "train", "adapters" if of_adapters else "factors")
        if self.lr is None:
            object.__setattr__(self, "lr", self._usual_lr())
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(10, self.steps // 4))
        if self.warmup > self.steps:
            raise ValueError(f"warmup must be at most steps={self.steps}, got {self.warmup}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive (math.inf for no clipping), got {self.clip}")
        if self.distill is None:
            object.__setattr__(self, "distill", float(self.objective == "keep"))
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must be in [0, 1], got {self.distill}")
        self._check_teacher()
        self._check_scope()
        if self.train == "factors" and not self.merge:
            raise ValueError(
                "merge=False keeps adapters beside the base, but train=factors leaves none: it "
                "always writes plain factors"
            )
        if self.train == "factors" and self.lora_rank is not None:
            raise ValueError(
                f"lora_rank={self.lora_rank} is for new adapters, but train=factors makes none"
            )
        if self.train == "factors" and self.shard:
            raise ValueError(
                "shard=True divides what is frozen, but train=factors leaves next to nothing frozen"
            )
        if self.save_every is not None and self.output_dir is None:
            raise ValueError(f"save_every={self.save_every} needs an output_dir to save to")

    def _usual_lr(self) -> float:
        if self.scope == "block":
            return BLOCK_LR
        if self.train == "factors":
            return FACTORS_LR
        if self.objective == "keep":
            return KEEP_LR
        return 1e-3 if self.steps <= 60 else 3e-4

    def _check_scope(self) -> None:
        """Raise ValueError for what does not go with training block by block."""
        if self.scope == "model":
            return
        if self.objective != "keep" or self.distill != 1:
            raise ValueError(
                "scope='block' matches the dense model's states: it goes with objective='keep' and "
                f"distill=1, got {self.objective!r} and distill={self.distill}"
            )
        for name in ("shard", "gradient_checkpointing"):
            if getattr(self, name):
                raise ValueError(f"{name}=True is for scope='model': a block at a time is small")

    def _check_teacher(self) -> None:
        """Raise ValueError unless there is a teacher where one is needed, and only there."""
        is_given, keep = self.teacher is not None, self.objective == "keep"
        writes = any(isinstance(text, str) and text == SELF for text in texts_in(self.data))
        if not is_given and keep:
            raise ValueError(
                "objective 'keep' needs teacher=MODEL, the dense model that the compressed one "
                "came from: a hub id, folder or module, got none"
            )
        if is_given != (self.distill > 0) and not (is_given and (keep or writes)):
            given = "a teacher" if is_given else "no teacher"
            raise ValueError(
                f"distill > 0 goes with a teacher, got distill={self.distill} and {given}"
            )
        if writes and not is_given:
            raise ValueError(f"data {SELF!r} is what the teacher writes, got no teacher")
