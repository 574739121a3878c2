"""Loading a dense model from a folder: transformers does, its report is read and obeyed."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from hylora_kernels.model.files import CheckpointError, reading, shown
from hylora_kernels.model.format import CONFIG, open_weights
from hylora_kernels.model.limits import check_config, few_parameters, unusual_fields
from hylora_kernels.model.skeleton import check_made_buffers

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
    entries = [entry for file in open_weights(folder) for entry in file.entries.values()]
    if not trust_remote_code:
        held = sum(math.prod(entry.shape) for entry in entries)
        if config.get("quantization_config"):
            held = NUMBERS_IN_A_BYTE * sum(entry.length for entry in entries)
        check_size(loaded, path, len(entries), held)
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
    check_made_buffers(model, path)
    return model


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
