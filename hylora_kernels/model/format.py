"""The format of saved models: config.json, safetensors, the tokenizer. Never a pickle.

config.json is the one that transformers writes, plus

    "quantization_config": {
        "quant_method": "hylora",
        "format": 2,
        "modules": {path: {"rank", "lora_rank", "alpha", "form", "group"[, "lora_dropout"]}},
        "linears": paths of all linears in the budget, those left dense included; may be absent,
        "checksums": {file: {tensor: crc32 of its bytes, 8 hex digits}},
        "files": all files of the model; the next save may replace and remove these
    }

and the weights are named as in model.state_dict(): <path>.SVh, .U, .A, .B, .bias, .pivots. There is
one tensor more, of shape [0], named <the first of modules>.weight: a loader that doesn't know the
format would make up the weights of such linears, and stops at the shape of this one. Format 1 has
neither it nor "files".
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import PreTrainedConfig

from hylora_kernels.model.tensorfile import CheckpointError

METHOD = "hylora"
FORMAT = 2
READABLE = (1, 2)
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# The names of the weights in this format, and any file that may hold weights.
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ANY_WEIGHTS = re.compile(r".*\.(safetensors|gguf|h5|msgpack|bin|pt|pth|ckpt|index\.json)")
# Files that a format 1 save may have written besides its weights.
FORMAT_1_FILES = {
    *(CONFIG, GENERATION_CONFIG, INDEX, "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
}


def guard_of(modules: dict) -> str | None:
    """The name of the tensor of shape [0]; None for a model without compressed linears."""
    return f"{next(iter(modules))}.weight" if modules else None


def decoded(config: dict) -> dict:
    """A config as it stands in JSON, which has no infinity, in Python's values."""
    decode = getattr(PreTrainedConfig, "_decode_special_floats", None)  # transformers >= 5
    return config if decode is None else decode(config)


def own_files(folder: Path) -> set[str] | None:
    """The files that save_pretrained wrote to `folder`, empty where there is no model.

    None if the folder's config.json is that of another program's model.
    """
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        ours = config.get("quantization_config") or {}
        if ours.get("quant_method") != METHOD:
            return None
        if "files" in ours:
            return {str(name) for name in ours["files"]}
        return FORMAT_1_FILES | {str(name) for name in ours.get("checksums") or (WEIGHTS,)}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return set()  # no config.json, or one that describes no model


def read_config(folder: Path) -> dict:
    """config.json, with our entry in it checked."""
    path = folder / CONFIG
    if folder.is_file():
        kind = "a pickle" if folder.suffix in PICKLES else "a file"
        raise CheckpointError(f"{folder}: is {kind}; load_pretrained reads a folder of safetensors")
    if not path.is_file():
        raise CheckpointError(f"{path}: not found, so there is no checkpoint")
    config = read_json(path)
    ours = config.get("quantization_config")
    method = ours.get("quant_method") if isinstance(ours, dict) else None
    if method != METHOD:
        raise CheckpointError(
            f"{path}: quant_method is {method!r}, not {METHOD!r}: hylora_kernels didn't "
            "save it; load_model opens other models"
        )
    if ours.get("format") not in READABLE:
        raise CheckpointError(
            f"{path}: format is {ours.get('format')!r}, supported are 1 and {FORMAT}"
        )
    for name in ("modules", "checksums"):
        listed = ours.setdefault(name, {})
        if not isinstance(listed, dict) or not all(isinstance(v, dict) for v in listed.values()):
            raise CheckpointError(f"{path}: {name} must be an object of objects, got {listed!r}")
    linears = ours.get("linears", [])
    if not isinstance(linears, list) or not all(isinstance(item, str) for item in linears):
        raise CheckpointError(f"{path}: linears must be a list of paths, got {linears!r}")
    return decoded(config)


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: corrupted: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: corrupted: {type(found).__name__} instead of an object")
    return found


def weight_names(folder: Path, checksums: dict) -> list[str]:
    if checksums:
        return [Path(name).name for name in sorted(checksums)]
    # Another tool wrote it: the format does not require checksums.
    index = folder / INDEX
    return sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
