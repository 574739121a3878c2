"""Loading a dense model from a folder: transformers does, its report is read and obeyed."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hylora_kernels.model.by_block import BLOCKS, StoredBlock
from hylora_kernels.model.files import CheckpointError, reading, shown
from hylora_kernels.model.format import CONFIG, GENERATION_CONFIG, open_weights
from hylora_kernels.model.limits import check_config, few_parameters, unusual_fields
from hylora_kernels.model.modules import empty_weights
from hylora_kernels.model.skeleton import check_made_buffers
from hylora_kernels.model.slots import Slot, slots_of
from hylora_kernels.model.structure import block_list, linears
from hylora_kernels.model.tensorfile import TensorFile

# Numbers that a config may describe beyond those in the files: what is missing stands in the report
# of transformers, which comes when all is made.
MORE_THAN_HELD = 2**26
NUMBERS_IN_A_BYTE = 8
NAMES_SHOWN = 5
ESCAPES = re.compile(r"\x1b\[[0-9;]*m|[-+|]{2,}")  # colours, and the lines of tables


def load_dense(
    folder: Path, config: dict[str, Any], dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of a folder whose config.json is `config`, on the CPU.

    dtype: None is the checkpoint's own. trust_remote_code: run the folder's Python files.

    Raises CheckpointError naming the tensors that the files lack, that have another shape than the
    model's, or that belong to one of its modules which has no place for them. transformers would
    fill the gaps with random numbers.
    """
    loaded, trust = _checked_config(folder, config, trust_remote_code)
    with (
        _logged() as words,
        reading(folder, "no model comes of it", lambda: " ".join(words)[:2000]),
    ):
        model, report = auto_class(loaded).from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **trust,
        )
    require_complete(model, report, folder)
    check_made_buffers(model, folder / CONFIG)
    return model


def empty_dense(
    folder: Path, config: dict[str, Any], dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The same model, its parameters on the meta device, the buffers it makes real; in the dtype of
    the checkpoint, that of its first tensor of floats, if dtype is None."""
    loaded, trust = _checked_config(folder, config, trust_remote_code)
    if dtype is None and (dtype := getattr(loaded, "dtype", None)) is None:
        entries = (entry for file in open_weights(folder) for entry in file.entries.values())
        dtype = next((e.dtype for e in entries if e.dtype.is_floating_point), torch.float32)
    with reading(folder, "no model comes of it"), empty_weights():
        model = auto_class(loaded).from_config(
            loaded, dtype=dtype, trust_remote_code=trust["trust_remote_code"]
        )
    model.tie_weights()
    return model


def load_by_block(
    folder: Path,
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The dense model of a folder, all but its blocks in memory, in eval().

    dtype: None is the checkpoint's own. Raises CheckpointError as load_dense() does, and for a
    model of which files have tensors under other names (experts, apart from their stack).
    """
    path = folder / CONFIG
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: a quantised model can't be read block by block")
    files = open_weights(folder)
    model = empty_dense(folder, config, dtype, trust_remote_code)
    stored = {name: file for file in files for name in file.entries}
    blocks = block_list(model, linears(model))
    if not blocks:
        raise CheckpointError(f"{path}: the model has no list of decoder blocks to read one by one")
    slots = {name: slot for name, slot in slots_of(model).items() if slot.kind != "made"}
    try:
        require_complete(model, _report(slots, stored), folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; block by block, tensors are read by the names that the model gives them,"
            " which transformers changes for some models while it loads them whole"
        ) from None
    tied: dict[int, Tensor] = {}
    for name, slot in slots.items():
        if name in stored and not name.startswith(tuple(f"{block}." for block in blocks)):
            floating = slot.tensor.is_floating_point()
            tensor = stored[name].read(name).to(device, slot.tensor.dtype if floating else None)
            tied[id(slot.tensor)] = slot.set(tensor)
    for slot in slots.values():
        if id(slot.tensor) in tied:
            setattr(slot.module, slot.name, tied[id(slot.tensor)])
    for slot in slots_of(model).values():
        if slot.kind == "made":
            slot.set(slot.tensor.to(device))
    check_made_buffers(model, path)
    vars(model)[BLOCKS] = {
        block: StoredBlock(
            model.get_submodule(block),
            {
                name.removeprefix(f"{block}."): (stored[name], name)
                for name in slots
                if name.startswith(f"{block}.")
            },
            device,
            model.dtype,
        )
        for block in blocks
    }
    if (folder / GENERATION_CONFIG).is_file():
        with reading(folder / GENERATION_CONFIG, "no GenerationConfig comes of it"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model.eval()


def _report(slots: Mapping[str, Slot], stored: Mapping[str, TensorFile]) -> dict[str, Any]:
    """What transformers' report says of a model that it has loaded itself."""
    by_tensor: dict[int, list[str]] = {}
    for name, slot in slots.items():
        by_tensor.setdefault(id(slot.tensor), []).append(name)
    missing = [names[0] for names in by_tensor.values() if not any(n in stored for n in names)]
    mismatched = [
        (name, stored[name].entries[name].shape, tuple(slot.tensor.shape))
        for name, slot in slots.items()
        if name in stored and stored[name].entries[name].shape != tuple(slot.tensor.shape)
    ]
    unexpected = [name for name in stored if name not in slots]
    return {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": unexpected}


def _checked_config(
    folder: Path, config: dict[str, Any], trust_remote_code: bool
) -> tuple[PretrainedConfig, dict[str, bool]]:
    """(transformers' config of a folder whose config.json is `config`, its arguments of trust)."""
    path = folder / CONFIG
    trust = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if not trust_remote_code:
        check_config(config, path)
        refuse_code(folder, config)
    kind = str(config.get("model_type"))
    # The mapping is lazy: its get() finds nothing.
    usual = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401
    with reading(path, "no config comes of it", lambda: unusual_fields(config, usual)):
        loaded = AutoConfig.from_pretrained(folder, **trust)
    if not trust_remote_code:
        entries = [entry for file in open_weights(folder) for entry in file.entries.values()]
        held = sum(math.prod(entry.shape) for entry in entries)
        if config.get("quantization_config"):
            held = NUMBERS_IN_A_BYTE * sum(entry.length for entry in entries)
        check_size(loaded, path, len(entries), held)
    return loaded, trust


class _Words(logging.Handler):
    """Keeps the words of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words += ESCAPES.sub(" ", record.getMessage()).split()


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The warnings of transformers while it loads: its errors refer to "the above report"."""
    handler = _Words()
    logger = logging.getLogger("transformers.modeling_utils")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield handler.words
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


def auto_class(config: PretrainedConfig) -> type:
    """The class of transformers that makes the model: most vision-language models, whose text tower
    is a causal language model, are no AutoModelForCausalLM."""
    kind = type(config)
    if kind in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    in_pictures = kind in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if in_pictures else AutoModelForCausalLM


def refuse_code(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError for a folder that is no model without code or files from elsewhere."""
    kind = config.get("model_type")
    if "auto_map" in config and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise CheckpointError(
            f"{folder / CONFIG}: model_type {shown(kind)} is defined by code that auto_map names, "
            f"{shown(config['auto_map'])}; it is run only with trust_remote_code=True"
        )
    # With peft installed, transformers would load them as well, and lose its report on the model.
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: adapters of PEFT are not loaded; merge them into "
            "the model first (merge_and_unload), or remove the file"
        )


def check_size(config: Any, path: Path, tensors: int, held: int) -> None:
    """Raise CheckpointError if a config of transformers describes a much larger model than the
    weights, which are so many tensors of `held` numbers. path: where the config comes from.
    """
    described = copy.deepcopy(config)
    if hasattr(described, "quantization_config"):
        del described.quantization_config
    with (
        reading(path, "no model comes of it", lambda: unusual_fields(vars(config), type(config))),
        torch.device("meta"),
        few_parameters(tensors, path),
    ):
        empty = auto_class(described).from_config(described, trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in empty.parameters())
    if wanted > 2 * held + MORE_THAN_HELD:
        raise CheckpointError(
            f"{path}: describes a model of {wanted:,} numbers, but the weights hold {held:,}"
        )


def require_complete(model: nn.Module, report: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError for what transformers' report calls missing, mismatched, unexpected."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {_listed(missing)} missing from the weights")
    wrong = [
        f"{name} (it has {list(found)}, the model {list(wanted)})"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    if wrong:
        raise CheckpointError(f"{folder}: {_listed(wrong)} of another shape than {CONFIG} says")
    homeless = [name for name in sorted(report["unexpected_keys"]) if _belongs(name, model)]
    if homeless:
        raise CheckpointError(
            f"{folder}: {_listed(homeless)} without a place in the {type(model).__name__} of "
            f"{CONFIG}, so the weights are another model's"
        )


def _belongs(name: str, model: nn.Module) -> bool:
    """Whether the tensor is part of a module that has weights and no modules in it, or of a layer
    beyond those in a list.

    Such is the bias of a linear that has none here, the scale of a quantised weight, or the second
    half of the layers: without it the model computes something else. Tensors of other parts (a
    vision tower, the heads of another task) are left out by design.
    """
    module = model
    for part in name.split(".")[:-1]:
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    return isinstance(module, nn.ModuleList) or bool(module._parameters and not module._modules)


def _listed(names: Sequence[str]) -> str:
    """ "tensor a is", "tensors a, b are"."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    shortened = ", ".join(name[:200] for name in names[:NAMES_SHOWN])
    return f"tensor{'s' * (len(names) > 1)} {shortened}{more} {'are' if len(names) > 1 else 'is'}"
