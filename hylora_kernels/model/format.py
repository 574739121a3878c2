"""The format of saved models: config.json, safetensors, the tokenizer. Never a pickle.

config.json is the one that transformers writes, plus

    "quantization_config": {
        "quant_method": "hylora",
        "format": 2,
        "modules": {path: {"rank", "lora_rank", "alpha", "form", "group"[, "lora_dropout"][, "bits"]
            }},
        "linears": paths of all linears in the budget, those left dense included; may be absent,
        "tied": {weight: the weight that it is one tensor with, stored once}; may be absent,
        "checksums": {file: {tensor: crc32 of its bytes, 8 hex digits}},
        "files": all files of the model; the next save may replace and remove these
    }

A low-rank embedding's entry in modules has "rank" alone. The weights are named as in
model.state_dict(): <path>.SVh, .U, .A, .B, .bias, .pivots.

"bits" is {matrix: bits} of the matrices that are stored as codes (weights.QuantizedMatrix): SVh, U
or both of a layer; a quantised embedding's entry has it alone, with its one `matrix`. In the place
of such a matrix, <path>.SVh for example, stand uint8 <path>.SVh.codes, .scales (the bytes of its
float16 numbers, little-endian) and, under 8 bits, .zeros, and .empty of shape [0], of the dtype
that the layer computes in. An older reader refuses "bits" by name, so the format's number stays.

There is one tensor more, of shape [0], named <the first of modules>.weight, or as the stack if all
are experts: a loader that doesn't know the format would make up the weights of such linears, and
stops at the shape of this one. Format 1 has neither it nor "files".
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedConfig

from hylora_kernels.layers.experts import stack_of
from hylora_kernels.model.files import (
    CheckpointError,
    check_folder,
    plain_name,
    read_json,
    reading,
    shown,
)
from hylora_kernels.model.tensorfile import TensorFile

METHOD = "hylora"
FORMAT = 2
READABLE = (1, 2)
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# The names of the weights in this format, and any file that may hold weights. A training's state
# holds none: each process of a Trainer writes its own, perhaps before the first saves the model.
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ANY_WEIGHTS = re.compile(
    r"(?!(rng_state(_\d+)?|optimizer|scheduler|scaler|training_args)\.(bin|pt|pth)$)"
    r".*\.(safetensors|gguf|h5|msgpack|bin|pt|pth|ckpt|index\.json)"
)
# Files that a format 1 save may have written besides its weights.
FORMAT_1_FILES = {
    *(CONFIG, GENERATION_CONFIG, INDEX, "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
}


def guard_of(ours: dict) -> str | None:
    """The name of the tensor of shape [0] for an entry `ours` of config.json; None where a loader
    that doesn't know the format finds every weight."""
    replaced = [f"{path}.weight" for path in ours["modules"] if stack_of(path) is None]
    # An expert that stayed dense has left its stack, too.
    stacks = [stack_of(path) for path in (*ours["modules"], *ours.get("linears", ()))]
    return next(filter(None, (*replaced, *stacks)), None)


def decoded(config: dict) -> dict:
    """A config as it stands in JSON, which has no infinity, in Python's values."""
    decode = getattr(PreTrainedConfig, "_decode_special_floats", None)  # transformers >= 5
    return config if decode is None else decode(config)


def own_files(folder: Path) -> set[str] | None:
    """The files that save_pretrained wrote to `folder`, empty where there is no model.

    None if the folder's config.json is that of another program's model. Raises CheckpointError for
    one that the system can't read: it may be anybody's.
    """
    if not (folder / CONFIG).exists():
        return set()
    try:
        config = read_json(folder / CONFIG, unique=False)
        ours = config.get("quantization_config") or {}
        if ours.get("quant_method") != METHOD:
            return None
        if "files" in ours:
            names = {str(name) for name in ours["files"]}
        else:
            names = FORMAT_1_FILES | {str(name) for name in ours.get("checksums") or (WEIGHTS,)}
        # The list may be a stranger's, and the next save removes what stands in it.
        home = folder.resolve()
        return {name for name in names if (folder / name).parent.resolve().is_relative_to(home)}
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        return set()  # it describes no model


def read_config(folder: Path) -> dict:
    """config.json, with our entry in it checked, of a folder whose files are fit to be read."""
    path = folder / CONFIG
    if folder.is_file():
        kind = "a pickle" if folder.suffix in PICKLES else "a file"
        raise CheckpointError(f"{folder}: is {kind}; load_pretrained reads a folder of safetensors")
    if not path.exists():
        raise CheckpointError(f"{path}: not found, so there is no checkpoint")
    check_folder(folder)
    config = read_json(path)
    ours = config.get("quantization_config")
    method = ours.get("quant_method") if isinstance(ours, dict) else None
    if method != METHOD:
        raise CheckpointError(
            f"{path}: quant_method is {shown(method)}, not {METHOD!r}: hylora_kernels didn't "
            "save it; load_model opens other models"
        )
    check_entry(ours, path)
    with reading(path, "no config comes of it"):
        return decoded(config)


def check_entry(ours: dict, path: str | Path) -> None:
    """Raise CheckpointError naming `path` and the field if config.json's entry `ours` can't be
    read; an absent modules or checksums becomes an empty one."""
    if type(ours.get("format")) is not int or ours["format"] not in READABLE:
        found = shown(ours.get("format"))
        raise CheckpointError(f"{path}: format is {found}, supported are 1 and {FORMAT}")
    for name in ("modules", "checksums"):
        listed = ours.setdefault(name, {})
        if not isinstance(listed, dict) or not all(isinstance(v, dict) for v in listed.values()):
            raise CheckpointError(
                f"{path}: {name} must be an object of objects, got {shown(listed)}"
            )
    tied = ours.get("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise CheckpointError(f"{path}: tied must be an object of names, got {shown(tied)}")
    linears = ours.get("linears", [])
    if not isinstance(linears, list) or not all(isinstance(item, str) for item in linears):
        raise CheckpointError(f"{path}: linears must be a list of paths, got {shown(linears)}")


def read_index(folder: Path) -> dict[str, str]:
    """tensor -> file, as the index says; {} for a folder that needs none."""
    path = folder / INDEX
    if (folder / WEIGHTS).exists() or not path.exists():
        return {}
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: weight_map must be an object, got {shown(listed)}")
    return {name: plain_name(file, path, "a file in weight_map") for name, file in listed.items()}


def open_weights(folder: Path, checksums: dict | None = None) -> list[TensorFile]:
    """The headers of the files of weights: those with checksums, or as transformers finds them.

    Raises CheckpointError for a name that leads out of the folder, for a tensor that is in two
    files, and for one that is not in the file where the index puts it.
    """
    if checksums:
        listed = {}
        names = {plain_name(name, folder / CONFIG, "a name in checksums") for name in checksums}
    else:
        listed = read_index(folder)
        names = set(listed.values()) or {WEIGHTS}
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if pickles and not any((folder / name).exists() for name in names):
        raise CheckpointError(
            f"{pickles[0]}: pickles are not read, since loading one runs the code in it; there is "
            f"no file named {min(names)}"
        )
    files = [TensorFile(folder / name) for name in sorted(names)]
    found: dict[str, str] = {}
    for file in files:
        for name in file.entries:
            if name in found:
                raise CheckpointError(f"{file.path}: tensor {shown(name)} is also in {found[name]}")
            found[name] = file.path.name
    for name, file in listed.items():
        if found.get(name) != file:
            raise CheckpointError(f"{folder / file}: tensor {shown(name)} is missing")
    return files
