"""transformers: AutoModelForCausalLM.from_pretrained, and all that calls it, reads our folders.

This module is imported right after transformers.quantizers.auto, in the middle of transformers' own
import. Functions import what needs a PreTrainedModel.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hylora_kernels.layers.quantized import QuantizedFactor
from hylora_kernels.model.format import METHOD, check_entry, guard_of, open_weights
from hylora_kernels.model.tensorfile import TensorFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hylora_kernels.model.slots import Slot

SOURCE = "quantization_config"


@register_quantization_config(METHOD)
class HyLoRAConfig(QuantizationConfigMixin):
    """The entry "quantization_config" of a saved model's config.json (model/format.py)."""

    def __init__(self, **entry: Any) -> None:
        """entry: all of its fields. Raises CheckpointError naming one that can't be read."""
        entry["quant_method"] = METHOD
        check_entry(entry, SOURCE)
        vars(self).update(entry)


@register_quantizer(METHOD)
class HyLoRAQuantizer(HfQuantizer):
    """Gives transformers' loader the layers that it is to fill, and checks what it filled in.

    The model is then the one that load_pretrained returns, bit for bit, and bears no mark of being
    quantised: it can be cast, trained, compiled and saved like any other. Raises CheckpointError
    naming file and tensor, as load_pretrained does.
    """

    requires_calibration = True  # A dense model becomes one of ours by compress(), not by loading.
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        return []  # Our files have the names of model.state_dict().

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **others: Any,
    ) -> None:
        from hylora_kernels.model.checkpoint import check_weights
        from hylora_kernels.model.skeleton import put_empty_layers, tie
        from hylora_kernels.model.slots import slots_of

        _refuse_another_class(model)
        ours = vars(self.quantization_config)
        slots = slots_of(model)
        for name, source in model.all_tied_weights_keys.items():
            tie(slots[name], slots[source])
        put_empty_layers(model, ours, SOURCE)
        self.files: list[TensorFile] = []
        if checkpoint_files:  # None if from_pretrained was given a state_dict.
            self.files = open_weights(Path(checkpoint_files[0]).parent, ours["checksums"])
            check_weights(self.files, model, guard_of(ours))
            for module in model.modules():  # Every tensor is there: nothing is to be made up.
                module._is_hf_initialized = True
        # Tensors that no module of transformers' model takes: the guard, buffers saved beside it.
        apart = {name for file in self.files for name in file.entries} - set(model.state_dict())
        ignored = model._keys_to_ignore_on_load_unexpected
        kind = set if isinstance(ignored, set) else list  # It is a list in transformers 5.0.
        ignored = kind([*(ignored or ()), *(f"^{re.escape(name)}$" for name in apart)])
        model._keys_to_ignore_on_load_unexpected = ignored

    def postprocess_model(self, model: PreTrainedModel, **others: Any) -> PreTrainedModel:
        from hylora_kernels.model.checkpoint import finished

        ours = vars(self.quantization_config)
        self.remove_quantization_config(model)
        _refuse_offloaded_codes(model)
        _complete(model, self.files, ours["checksums"])
        return finished(model, ours, SOURCE)


def _refuse_another_class(model: PreTrainedModel) -> None:
    saved = model.config.architectures or []
    if type(model).__name__ not in saved:
        raise ValueError(
            f"the folder holds a {' or '.join(saved)}, which a {type(model).__name__} can't be "
            "loaded from: load it by AutoModelForCausalLM, and take its parts"
        )


def _complete(model: PreTrainedModel, files: list[TensorFile], checksums: dict) -> None:
    """Put into the model what transformers' loader leaves out, and check the rest.

    Left out are buffers that a model makes for itself, all dtypes but one of a checkpoint that has
    several, and the other names of tensors that layers share. Offloaded weights stay unchecked.
    """
    from hylora_kernels.model.checkpoint import check_pivots
    from hylora_kernels.model.saving import rebuilt_empty, saved_config
    from hylora_kernels.model.slots import slots_of

    slots, empty = slots_of(model), slots_of(rebuilt_empty(model, saved_config(model)))
    for name, slot in empty.items():
        if slot.kind == "made" and _is_whole(slots[name].tensor):
            slots[name].set(slot.tensor.to(slots[name].tensor.device))
    dtypes = {name: entry.dtype for file in files for name, entry in file.entries.items()}
    asked, saved = model.config.dtype, model.dtype
    saved = next((dtypes[n] for n in slots if n in dtypes and dtypes[n].is_floating_point), saved)
    for file in files:
        known = checksums.get(file.path.name, {})
        for name, stored in file.entries.items():
            slot = slots.get(name)
            if slot is None or not _is_whole(slot.tensor):
                continue
            castable = stored.dtype.is_floating_point and slot.kind != "made"
            dtype = asked if castable and asked != saved else stored.dtype
            if slot.kind == "made" or slot.tensor.dtype != dtype:
                tensor = file.read(name, known.get(name))
                slot.set(tensor.to(slot.tensor.device, dtype))
            elif dtype == stored.dtype and name in known:
                file.check(name, slot.tensor.detach().cpu(), known[name])
            check_pivots(slot.tensor, slot, file.path, name)
    _share(slots, empty, dtypes)


def _share(slots: dict[str, Slot], empty: dict[str, Slot], loaded: Collection[str]) -> None:
    """Let names that are one tensor in the `empty` model be one in the model with these slots."""
    first = {id(empty[name].tensor): slots[name] for name in empty if name in loaded}
    for name, slot in empty.items():
        source = first.get(id(slot.tensor))
        if source is not None and name not in loaded:
            setattr(slots[name].module, slots[name].name, getattr(source.module, source.name))


def _is_whole(tensor: Tensor) -> bool:
    """False for a tensor that is offloaded, or of which this process holds a part."""
    from torch.distributed.tensor import DTensor

    return not tensor.is_meta and not isinstance(tensor, DTensor)


def _refuse_offloaded_codes(model: PreTrainedModel) -> None:
    """Raise ValueError if codes are offloaded: accelerate brings back what a module's own forward
    reads, and the codes' holder has no forward."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedFactor) and module.codes.is_meta:
            raise ValueError(f"device_map offloads {path}: quantised layers must be in memory")
