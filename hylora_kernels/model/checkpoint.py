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

import copy
import json
import os
import re
import tempfile
import weakref
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.model.skeleton import Slot, build, missing_from, slots_of
from hylora_kernels.model.tensorfile import CheckpointError, Entry, TensorFile, checksum
from hylora_kernels.support.devices import resolve_device, resolve_dtype
from hylora_kernels.support.storage import require_disk, write_json

Model = TypeVar("Model", bound=nn.Module)

METHOD = "hylora"
FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


# ------------------------------------------------------------------------------------------ saving


def save_pretrained(
    model: nn.Module,
    dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a compressed (or any other) causal language model to the folder `dir`.

    tokenizer:      saved beside the model, or None.
    state_dict:     tensors to write instead of model.state_dict(), with its names and shapes.
    max_shard_size: the largest file of weights, in bytes or as "5GB".

    The files of an existing folder are replaced one by one, config.json last; then the weight files
    of an earlier save are removed. Raises TypeError or ValueError, before anything is written, for
    a model that load_pretrained could not rebuild from its config.

        save_pretrained(model, "small", tokenizer)
        model = load_pretrained("small")
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model.
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    target = Path(dir)
    if target.exists() and not target.is_dir():
        raise ValueError(f"dir {str(target)!r} is a file, not a folder")
    config = _saved_config(model)
    tensors = _tensors_to_save(model, config, state_dict)
    target.mkdir(parents=True, exist_ok=True)
    require_disk(target, sum(t.nbytes for t in tensors.values()), f"saving to {target}")
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as holder:
        new = Path(holder)
        config["quantization_config"]["checksums"] = _write_weights(tensors, new, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if model.can_generate():
            model.generation_config.save_pretrained(new)
        write_json(new / CONFIG, config)
        written = sorted(file.relative_to(new) for file in new.rglob("*") if file.is_file())
        for name in sorted(written, key=lambda name: name == Path(CONFIG)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, target / name)
    for file in target.iterdir():
        if WEIGHT_FILES.fullmatch(file.name) and Path(file.name) not in written:
            file.unlink()


def _saved_config(model: PreTrainedModel) -> dict:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    saved = json.loads(config.to_json_string())
    layers = {p: m for p, m in model.named_modules() if isinstance(m, SVDLoRALinear)}
    modules = {path: _describe(layer) for path, layer in layers.items()}
    # An older entry (that of a GGUF file, for example) no longer describes how weights are stored.
    saved["quantization_config"] = {"quant_method": METHOD, "format": FORMAT, "modules": modules}
    if getattr(model, "hylora_linears", None) is not None:
        saved["quantization_config"]["linears"] = list(model.hylora_linears)
    return saved


def _describe(layer: SVDLoRALinear) -> dict:
    names = ("rank", "lora_rank", "alpha", "form")
    dropout = {"lora_dropout": layer.lora_dropout} if layer.lora_dropout else {}
    return {name: getattr(layer, name) for name in names} | {"group": None} | dropout


def _tensors_to_save(model, config: dict, state_dict: dict | None) -> dict[str, Tensor]:
    """name -> tensor; of tied tensors only one, if the model that `config` builds ties them too.

    A buffer that a model makes for itself is saved only if a new model makes another one: after
    model.to(torch.bfloat16), for example, the rotary frequencies are rounded.
    """
    empty = build(config)
    if type(empty) is not type(model):
        raise ValueError(f"model: its class is not the {type(empty).__name__} of transformers")
    rebuilt = slots_of(empty)
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    for name, slot in slots_of(model).items():
        if slot.kind == "made" and name in rebuilt and not _same(slot.tensor, rebuilt[name].tensor):
            tensors[name] = slot.tensor
    first = {}
    for name, tensor in list(tensors.items()):
        if tensor.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device: there is nothing to save")
        wanted = rebuilt[name].tensor if name in rebuilt else None
        if wanted is None or _kind(tensor) != _kind(wanted):
            described = "nothing" if wanted is None else _kind(wanted)
            raise ValueError(
                f"model: {name!r} is {_kind(tensor)}, but {described} in the "
                f"{config['architectures'][0]} that its config describes, so it couldn't be loaded"
            )
        twin = first.setdefault(id(wanted), tensor)
        if twin is not tensor and (twin.data_ptr() == tensor.data_ptr() or _same(twin, tensor)):
            del tensors[name]
    missing = missing_from(rebuilt, tensors)
    if missing:
        raise ValueError(f"model: {missing[0]!r} is missing from it, though its config asks for it")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _kind(tensor: Tensor) -> str:
    return f"{'floating' if tensor.is_floating_point() else tensor.dtype} {list(tensor.shape)}"


def _same(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and not a.is_meta and checksum(a.cpu()) == checksum(b.cpu())


def _write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_size) -> dict:
    """Write the tensors to files in `folder`; returns their checksums {file: {tensor: crc32}}."""
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    checksums, files = {}, split.filename_to_tensors.items()
    for file, names in tqdm(files, desc="saving", unit="file", delay=2):
        shard, storages = {}, set()
        for name in names:
            tensor = tensors[name].cpu().contiguous()
            storage = tensor.untyped_storage()
            # The format has no shared memory: a tensor that shares its storage is copied.
            if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            storages.add(storage.data_ptr())
            shard[name] = tensor
        save_file(shard, folder / file, metadata={"format": "pt"})
        checksums[file] = {name: checksum(tensor) for name, tensor in shard.items()}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)
    return checksums


# ----------------------------------------------------------------------------------------- loading


def load_pretrained(
    dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    verify: bool = True,
) -> PreTrainedModel:
    """The model that save_pretrained wrote to the folder `dir`, bit for bit, in eval().

    device: "cpu", "cuda:1", ...; "auto" is a GPU if there is one.
    dtype:  all weights are cast to it; None keeps the dtype of each tensor.
    verify: compare the checksum of every tensor.

    Memory: the model and one tensor more. Raises CheckpointError naming the file, and the tensor if
    there is one, if anything is missing, cut off, altered, or of another shape or version.
    """
    folder, device, dtype = Path(dir), resolve_device(device), resolve_dtype(dtype)
    config = _read_config(folder)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    model = build(config, source=folder / CONFIG)
    slots = slots_of(model)
    files = _open_weights(folder, config, slots)
    known = config["quantization_config"]["checksums"] if verify else {}
    reads = [(file, name) for file in files for name in file.entries]
    loaded = {name for _, name in reads}
    tied: dict[int, list[str]] = {}
    for name, slot in slots.items():
        tied.setdefault(id(slot.tensor), []).append(name)
    for file, name in tqdm(reads, desc=f"loading {folder.name}", unit="tensor", delay=2):
        tensor = file.read(name, known.get(file.path.name, {}).get(name))
        slot = slots[name]
        if isinstance(slot.module, SVDLoRALinear) and slot.name == "pivots":
            _check_pivots(tensor, slot.module.out_features, file.path, name)
        castable = tensor.is_floating_point() and slot.kind != "made"
        value = slot.set(tensor.to(device, dtype if castable else None))
        for twin in tied[id(slot.tensor)]:
            if twin not in loaded:  # Tied tensors are saved once.
                setattr(slots[twin].module, slots[twin].name, value)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    if "linears" in config["quantization_config"]:
        model.hylora_linears = config["quantization_config"]["linears"]
        unknown = set(model.hylora_linears) - {path for path, _ in model.named_modules()}
        if unknown:
            raise CheckpointError(f"{folder / CONFIG}: linears names no module: {min(unknown)!r}")
    return save_in_hylora_format(freeze_all_but_adapters(model.to(device).eval()))


def layer_shapes(dir: str | Path) -> tuple[list[tuple[int, int, int, int]], list[str]]:
    """([(K, N, r, ra), ...], forms) of the SVDLoRALinears of a saved model, each of them once.

    Reads config.json and the headers of the weight files. Raises CheckpointError as load_pretrained
    does, and if there are no low-rank layers.
    """
    folder = Path(dir)
    ours = _read_config(folder)["quantization_config"]
    files = [TensorFile(folder / name) for name in _weight_names(folder, ours["checksums"])]
    sizes = {name: entry.shape for file in files for name, entry in file.entries.items()}
    found = {}
    for path, module in ours["modules"].items():
        try:
            (rank, K), others, form = sizes[f"{path}.SVh"], sizes[f"{path}.U"][0], module["form"]
        except KeyError as error:
            raise CheckpointError(f"{folder}: {error} is missing for {path!r}") from error
        lora_rank = sizes.get(f"{path}.A", (0,))[0]
        N = others + (rank if form == "pivoted" else 0)
        if others:  # Without other rows the layer is a dense matrix, one product on any backend.
            found.setdefault((K, N, rank, lora_rank), form)
    if not found:
        raise CheckpointError(f"{folder}: there are no low-rank layers in it")
    return list(found), sorted(set(found.values()))


def _read_config(folder: Path) -> dict:
    """config.json, with our entry in it checked."""
    path = folder / CONFIG
    if folder.is_file():
        kind = "a pickle" if folder.suffix in PICKLES else "a file"
        raise CheckpointError(f"{folder}: is {kind}; load_pretrained reads a folder of safetensors")
    if not path.is_file():
        raise CheckpointError(f"{path}: not found, so there is no checkpoint")
    config = _read_json(path)
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


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: corrupted: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: corrupted: {type(found).__name__} instead of an object")
    return found


def _open_weights(folder: Path, config: dict, slots: dict[str, Slot]) -> list[TensorFile]:
    """The weight files, checked to hold all tensors that the model needs and no others."""
    names = _weight_names(folder, config["quantization_config"]["checksums"])
    pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
    if pickles and not any((folder / name).exists() for name in names):
        raise CheckpointError(
            f"{folder / pickles[0]}: pickles are not read, since loading one runs the code in it; "
            f"{names[0]} is missing"
        )
    files = [TensorFile(folder / name) for name in names]
    found: dict[str, Path] = {}
    for file in files:
        for name, entry in file.entries.items():
            _check_entry(name, entry, slots.get(name), file.path)
            if name in found:
                raise CheckpointError(f"{file.path}: tensor {name!r} is also in {found[name].name}")
            found[name] = file.path
    missing = missing_from(slots, found)
    if missing:
        places = ", ".join(str(file.path) for file in files)
        raise CheckpointError(f"{places}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    return files


def _weight_names(folder: Path, checksums: dict) -> list[str]:
    if checksums:
        return [Path(name).name for name in sorted(checksums)]
    # Another tool wrote it: the format does not require checksums.
    index = folder / INDEX
    return sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]


def _check_entry(name: str, entry: Entry, slot: Slot | None, path: Path) -> None:
    if slot is None:
        raise CheckpointError(f"{path}: unexpected tensor {name!r}: the model has none")
    if entry.shape != slot.tensor.shape:
        wanted, found = list(slot.tensor.shape), list(entry.shape)
        raise CheckpointError(f"{path}: tensor {name!r} must have shape {wanted}, has {found}")
    floating = slot.tensor.is_floating_point()
    if entry.dtype.is_floating_point != floating or not (
        floating or entry.dtype == slot.tensor.dtype
    ):
        wanted = "a floating dtype" if floating else slot.tensor.dtype
        raise CheckpointError(f"{path}: tensor {name!r} must have {wanted}, has {entry.dtype}")


def _check_pivots(pivots: Tensor, out_features: int, path: Path, name: str) -> None:
    if (pivots < 0).any() or (pivots >= out_features).any() or (pivots.diff() <= 0).any():
        raise CheckpointError(
            f"{path}: tensor {name!r} must be strictly ascending within [0, {out_features})"
        )


# -------------------------------------------------------------------- transformers' own way to save


def save_in_hylora_format(model: Model) -> Model:
    """Make transformers' own model.save_pretrained(folder) write this format; returns the model."""
    vars(model)["save_pretrained"] = _Save(model)
    return model


class _Save:
    """model.save_pretrained of a model that is saved in this format.

    The reference to the model is weak, so `del model` frees the weights at once. A deep copy or a
    pickle of the model has its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __reduce__(self):
        return _Save, (self.model(),)

    def __call__(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        push_to_hub=False,
        max_shard_size="5GB",
        safe_serialization=True,
        save_function=None,
        **others,
    ) -> None:
        """The arguments of transformers; ValueError for one that this format can't honour."""
        if push_to_hub:
            raise ValueError("push_to_hub=True is not supported: save, then upload the folder")
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; only safetensors are")
        refused = [name for name, value in others.items() if value is not None]
        if refused:
            raise ValueError(f"{refused[0]} is not supported when saving a compressed model")
        if is_main_process:
            save_pretrained(
                self.model(),
                save_directory,
                state_dict=state_dict,
                max_shard_size=max_shard_size,
            )
