"""transformers: PreTrainedModel.save_pretrained writes our format for a model with our layers.

The class's own method is the one to extend: it is also called on the class, by subclasses through
super(), and on models into which layers were put by hand. transformers' own code would write
tensors without a description of their layers, which nobody could load.

This module is imported right after transformers.modeling_utils, in the middle of transformers' own
import. Functions import what needs more of it.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from transformers.modeling_utils import PreTrainedModel

_write_theirs = PreTrainedModel.save_pretrained
_signature = inspect.signature(_write_theirs)


@wraps(_write_theirs)
def _save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    from hylora_kernels.model.saving import is_in_hylora_format

    # transformers' own PEFT adapters (model.add_adapter) are saved alone, without the model.
    only_adapters = getattr(self, "_hf_peft_config_loaded", False)
    if only_adapters or not is_in_hylora_format(self):
        _write_theirs(self, *args, **kwargs)
        return
    given = _signature.bind(self, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    del given["self"]
    _write_ours(self, **given)


def _write_ours(
    model: PreTrainedModel,
    save_directory: str,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    save_function: Any = None,
    **others: Any,
) -> None:
    """The arguments of transformers; ValueError for one that this format can't honour."""
    from hylora_kernels.model.saving import is_sharded, save_pretrained

    if push_to_hub:
        raise ValueError("push_to_hub=True is not supported: save, then upload the folder")
    if not safe_serialization:
        raise ValueError("safe_serialization=False would write a pickle; only safetensors are")
    for name, value in others.items():
        known = _signature.parameters.get(name)
        if value is not None and (known is None or value != known.default):
            raise ValueError(f"{name} is not supported when saving a compressed model")
    # The parts of a sharded model are gathered by all processes, and written by the first.
    if is_main_process or (state_dict is None and is_sharded(model)):
        save_pretrained(model, save_directory, state_dict=state_dict, max_shard_size=max_shard_size)


PreTrainedModel.save_pretrained = _save_pretrained  # type: ignore[method-assign]
