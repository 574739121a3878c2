"""Checkpoints of compressed models: config.json, safetensors, the tokenizer. Never a pickle.

config.json is the one that transformers writes, plus

    "quantization_config": {
        "quant_method": "hylora",
        "format": 1,
        "modules": {path: {"rank", "lora_rank", "alpha", "form", "group"[, "lora_dropout"]}},
        "linears": paths of all linears in the budget, those left dense included; may be absent,
        "checksums": {file: {tensor: crc32 of its bytes, 8 hex digits}}
    }

and the weights are named as in model.state_dict(): <path>.SVh, .U, .A, .B, .bias, .pivots.
config.json is written last, and its checksums list the files that belong to it, so a save that was
cut off is noticed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from hylora_kernels.model.tensorfile import CheckpointError

METHOD = "hylora"
FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


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
    if ours.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {ours.get('format')!r}, supported is {FORMAT}")
    for name in ("modules", "checksums"):
        listed = ours.setdefault(name, {})
        if not isinstance(listed, dict) or not all(isinstance(v, dict) for v in listed.values()):
            raise CheckpointError(f"{path}: {name} must be an object of objects, got {listed!r}")
    linears = ours.get("linears", [])
    if not isinstance(linears, list) or not all(isinstance(item, str) for item in linears):
        raise CheckpointError(f"{path}: linears must be a list of paths, got {linears!r}")
    return config


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
