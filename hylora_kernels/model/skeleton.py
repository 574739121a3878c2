"""A model as its config describes it, without weights yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.layers.experts import unstack_for
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear
from hylora_kernels.model.files import CheckpointError, reading, shown
from hylora_kernels.model.limits import MAX_BUFFERS, check_config, few_parameters, unusual_fields
from hylora_kernels.model.modules import empty_weights
from hylora_kernels.model.slots import Slot, slots_of
from hylora_kernels.model.tensorfile import TensorFile


def blueprint(config: dict, source: str | Path, files: Sequence[TensorFile]) -> PreTrainedModel:
    """The model of a saved config with names and shapes only: all its tensors are on meta.

    Raises CheckpointError naming `source`, the config's file, if there is no such model, or if the
    files of weights show that it can't be theirs, before it takes time or memory.
    """
    check_config(config, source)
    with torch.device("meta"), few_parameters(sum(len(file.entries) for file in files), source):
        model = build(config, source)
    made = sum(slot.tensor.nbytes for slot in slots_of(model).values() if slot.kind == "made")
    if made > MAX_BUFFERS:
        raise CheckpointError(
            f"{source}: the model makes buffers of {made} bytes, more than the limit of "
            f"{MAX_BUFFERS}"
        )
    return model


def check_made_buffers(model: nn.Module, source: str | Path) -> None:
    """Raise CheckpointError for a buffer that the model makes of NaN or infinity, as the rotary
    frequencies are where the config's rope_theta is zero or negative. -inf is that of masks."""
    for name, slot in slots_of(model).items():
        floating = slot.kind == "made" and slot.tensor.is_floating_point()
        if floating and not (slot.tensor < torch.inf).all():  # NaN is not less than infinity
            raise CheckpointError(f"{source}: the model makes a buffer {name} that is not finite")


def build(config: dict, source: str | Path = "model") -> PreTrainedModel:
    """The model of a saved config, its parameters on the meta device, the buffers it makes real."""
    config = dict(config)
    ours = config.pop("quantization_config")
    model_class = model_class_of(config, source)
    what = f"no {model_class.__name__} comes of it"
    # Under torch.device("meta") the rotary frequencies and masks would be lost: no file has them.
    with (
        reading(source, what, lambda: unusual_fields(config, model_class.config_class)),
        empty_weights(),
    ):
        model = model_class._from_config(model_class.config_class.from_dict(config))
    model.tie_weights()
    put_empty_layers(model, ours, source)
    return model


def put_empty_layers(model: PreTrainedModel, ours: dict, source: str | Path) -> None:
    """Put the layers that config.json's entry `ours` describes in the place of the model's own,
    their parameters on the meta device and tied as it says.

    Raises CheckpointError naming `source` and the field."""
    with reading(source, "modules and linears"):
        unstack_for(model, {*ours["modules"], *ours.get("linears", ())})
    for path, spec in ours["modules"].items():
        with reading(source, f"modules[{shown(path)}]"):
            model.set_submodule(path, empty_layer(model.get_submodule(path), spec))
    slots, tied = slots_of(model), ours.get("tied", {})
    for name, other in tied.items():
        with reading(source, f"tied[{shown(name)}]"):
            tie(slots[name], slots[other])
    # transformers' own lists of such names: tie_weights() fails for a weight that is gone.
    gone = {f"{path}.weight" for path in ours["modules"]}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, attribute) or {}
        kept = {name: other for name, other in known.items() if not {name, other} & gone}
        setattr(model, attribute, kept | tied)


def tie(slot: Slot, other: Slot) -> None:
    """Let the one place hold the other's tensor. Raises ValueError if it can't."""
    if slot.kind != "parameter" or slot.tensor.shape != other.tensor.shape:
        raise ValueError(f"{list(slot.tensor.shape)} can't be {list(other.tensor.shape)}")
    setattr(slot.module, slot.name, other.tensor)


def model_class_of(config: dict, source: str | Path) -> type[PreTrainedModel]:
    """The class that `config` names, from transformers or registered with its AutoModels."""
    names, kind = config.get("architectures"), config.get("model_type")
    name = names[0] if isinstance(names, list) and names else None
    known = [getattr(transformers, str(name), None)]
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        known.insert(0, AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[kind], None))
    for found in known:
        named = isinstance(found, type) and found.__name__ == name
        if named and issubclass(found, PreTrainedModel):
            return found
    raise CheckpointError(f"{source}: transformers knows no model class {shown(name)}")


def empty_layer(module: nn.Module, spec: dict) -> nn.Module:
    """The layer for the linear or embedding `module` that an entry of config.json's modules
    describes, on the meta device. Raises TypeError or ValueError if there is none."""
    empty = _empty_embedding if isinstance(module, nn.Embedding) else _empty_linear
    return empty(module, **spec)


def _empty_embedding(
    embedding: nn.Embedding, *, rank=None, bits=None
) -> LowRankEmbedding | QuantizedEmbedding:
    sizes = embedding.num_embeddings, embedding.embedding_dim
    if bits is None:
        return LowRankEmbedding(*sizes, rank, device="meta")
    if rank is not None:
        raise ValueError("an embedding has either rank or bits")
    return QuantizedEmbedding(*sizes, bits, device="meta")


def _empty_linear(
    linear: nn.Module, *, rank, lora_rank, alpha, form, group=None, lora_dropout=0.0, bits=None
) -> SVDLoRALinear:
    if isinstance(linear, Conv1D):
        in_features, out_features = linear.weight.shape
    elif isinstance(linear, nn.Linear):
        in_features, out_features = linear.in_features, linear.out_features
    else:
        raise TypeError(f"{type(linear).__name__} is no linear layer")
    if group is not None:
        raise ValueError(f"group must be null, got {group!r}")
    bias, sizes = linear.bias is not None, (in_features, out_features, rank, lora_rank)
    if bits is None:
        return SVDLoRALinear(*sizes, bias, alpha, lora_dropout, form, device="meta")
    return QuantizedLinear(*sizes, bias, alpha, lora_dropout, form, device="meta", bits=bits)
