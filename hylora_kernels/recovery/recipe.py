"""Everything that the trained parameters depend on, and the learning rate that follows from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.modules import base_of
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.support.hashing import tensor_hash
from hylora_kernels.support.options import reported_options


@dataclass(frozen=True)
class Recipe:
    """The options that decide the result, and hashes of its inputs.

    Runs of the same recipe give the same bits, and a checkpoint is resumed by its own recipe only.

    processes: of `accelerate launch`.
    data, teacher, base, trained: hashes of the token blocks in the order in which they are taken,
               of the teacher ("" without one), of all frozen tensors, and of all others before the
               first step.
    """

    steps: int
    lr: float
    warmup: int
    length: int
    batch: int
    accumulate: int
    clip: float
    chunk: int
    objective: str
    train: str
    scope: str
    distill: float
    gradient_checkpointing: bool
    seed: int
    processes: int
    data: str
    teacher: str
    base: str
    trained: str

    @classmethod
    def of(
        cls,
        options: FinetuneOptions,
        model: nn.Module,
        trained: Mapping[str, Tensor],
        blocks: Tensor,
        teacher: str,
        processes: int,
    ) -> Recipe:
        """The recipe of a run on `blocks`, int64 [n, L], that starts from these tensors of `model`.

        teacher: its key, "" without one.
        """
        return cls(
            **reported_options(dataclasses.replace(options, length=blocks.shape[1])),
            processes=processes,
            data=tensor_hash([("blocks", blocks)]),
            teacher=teacher,
            base=frozen_hash(model, trained.values()),
            trained=tensor_hash(trained.items()),
        )

    def learning_rate(self, step: int) -> float:
        """The rate of step 1..steps: a linear warm-up to lr, then a cosine down to lr / 10."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    @property
    def blocks_per_step(self) -> int:
        return self.batch * self.accumulate * self.processes


def frozen_hash(model: nn.Module, trained: Iterable[Tensor] | None = None) -> str:
    """sha256 of the model's state_dict without `trained`, by default A and B of all layers, and of
    alpha and dropout of each layer whose base is frozen."""
    named = model.named_modules()
    layers = {path: layer for path, layer in named if isinstance(layer, SVDLoRALinear)}
    if trained is None:
        trained = [p for layer in layers.values() for p in (layer.A, layer.B) if p is not None]
    seen = {id(tensor) for tensor in trained}
    layers = {path: layer for path, layer in layers.items() if base_of(layer)[0] not in seen}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            tensors[name] = tensor
            seen.add(id(tensor))  # a tied weight is hashed once
    scales = [f"{path} {layer.alpha} {layer.lora_dropout}\n" for path, layer in layers.items()]
    return tensor_hash(tensors.items(), "".join(scales))
