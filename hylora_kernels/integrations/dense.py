"""A compressed model as a plain one of transformers, for every program that reads no other."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hylora_kernels.layers.experts import stack_of
from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.model.modules import empty_weights
from hylora_kernels.model.saving import COMPRESSED, unwrapped
from hylora_kernels.model.slots import Slot, slots_of


@torch.no_grad()
def dense_copy(model: nn.Module) -> PreTrainedModel:
    """A model of transformers' own modules that computes the same, in eval() and on its device.

    Each weight W = U SVh + alpha B A is made of float64 products and rounded once to the layer's
    dtype; codes become the numbers that they stand for. What isn't compressed is shared with
    `model`. A head that the config ties to the embedding is untied if the two have come to differ.

    Raises TypeError for a model that is none of transformers, ValueError for one that is packed for
    inference, or for a parameter that its class has no place for.

        dense_copy(load_pretrained("small")).save_pretrained("plain")
    """
    model = unwrapped(model)
    refuse_packed(model)
    weights = _dense_weights(model)
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = _empty(type(model), config)
    if not _ties_hold(plain, weights):
        config.tie_word_embeddings = False
        plain = _empty(type(model), config)
    slots = slots_of(plain)
    for name, tensor in weights.items():
        if name not in slots:
            raise ValueError(f"model: {name!r} has no place in a plain {type(model).__name__}")
        slots[name].set(_as_stored(tensor, slots[name]))
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval().to(model.device)


def _empty(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with empty_weights():
        plain = kind._from_config(config)
    plain.tie_weights()
    return plain


def _dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """name in a plain model's state_dict -> tensor; a linear's weight is [N, K]."""
    found: dict[str, Tensor] = {}
    inside = ()  # of the compressed layer that was met last
    for path, module in model.named_modules(remove_duplicate=False):
        if inside and path.startswith(inside):
            continue
        prefix = f"{path}." if path else ""
        own = {**module._parameters, **module._buffers}
        kept = {n: t for n, t in own.items() if n not in module._non_persistent_buffers_set}
        if isinstance(module, COMPRESSED):
            inside = (prefix,)
            kept = {"weight": module.weight.clone(), "bias": own.get("bias")}
        name = prefix.replace(".stock.", ".")  # ExpertLinears keeps the rest of its module there
        found |= {f"{name}{n}": t.detach() for n, t in kept.items() if t is not None}
    return _with_stacks(found)


def _with_stacks(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the linears of experts as one tensor [E, N, K] for each stack."""
    stacks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name in list(found):
        path, _, kind = name.rpartition(".")
        stack = stack_of(path)
        if stack is not None:
            whole = stack if kind == "weight" else f"{stack}_{kind}"
            stacks[whole][int(path.rpartition(".")[2])] = found.pop(name)
    return found | {n: torch.stack([e[i] for i in sorted(e)]) for n, e in stacks.items()}


def _ties_hold(plain: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether tensors that the plain model shares have the same numbers."""
    first: dict[int, Tensor] = {}
    for name, slot in slots_of(plain).items():
        if name in weights and slot.kind == "parameter":
            twin = first.setdefault(id(slot.tensor), weights[name])
            if not torch.equal(twin, weights[name]):
                return False
    return True


def _as_stored(tensor: Tensor, slot: Slot) -> Tensor:
    """A weight as its module stores it: some keep [K, N]."""
    module, shape = slot.module, slot.tensor.shape
    is_square = tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2]
    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    if tensor.shape != shape or (is_square and transposed and slot.name != "bias"):
        tensor = tensor.mT.contiguous()
    if tensor.shape != shape:
        raise ValueError(f"model: {slot.name} must be {list(shape)}, got {list(tensor.shape)}")
    return tensor
