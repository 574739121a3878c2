"""Loading the checkpoints of compressed models (model/format.py says how they are written)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.files import CheckpointError, reading, shown
from hylora_kernels.model.format import (
    CONFIG,
    GENERATION_CONFIG,
    guard_of,
    open_weights,
    read_config,
)
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.model.saving import save_in_hylora_format
from hylora_kernels.model.skeleton import blueprint, build, check_made_buffers
from hylora_kernels.model.slots import Slot, missing_from, slots_of
from hylora_kernels.model.tensorfile import Entry, TensorFile
from hylora_kernels.support.devices import resolve_device, resolve_dtype
from hylora_kernels.support.staging import current

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

    Example:
        model = load_pretrained("my-folder", dtype="bfloat16")
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    folder = current(Path(dir))
    config = read_config(folder)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    files = open_weights(folder, config["quantization_config"]["checksums"])
    guard = guard_of(config["quantization_config"])
    check_weights(files, blueprint(config, folder / CONFIG, files), guard)
    with torch.device("cpu"):  # whatever the default device is
        model = build(config, folder / CONFIG)
    check_made_buffers(model, folder / CONFIG)
    slots = slots_of(model)
    known = config["quantization_config"]["checksums"] if verify else {}
    reads = [(file, name) for file in files for name in file.entries if name in slots]
    loaded = {name for _, name in reads}
    tied: dict[int, list[str]] = {}
    for name, slot in slots.items():
        tied.setdefault(id(slot.tensor), []).append(name)
    for file, name in tqdm(reads, desc=f"loading {Path(dir).name}", unit="tensor", delay=2):
        tensor = file.read(name, known.get(file.path.name, {}).get(name))
        slot = slots[name]
        check_pivots(tensor, slot, file.path, name)
        castable = tensor.is_floating_point() and slot.kind != "made"
        value = slot.set(tensor.to(device, dtype if castable else None))
        for twin in tied[id(slot.tensor)]:
            if twin not in loaded:  # Tied tensors are saved once.
                setattr(slots[twin].module, slots[twin].name, value)
    if (folder / GENERATION_CONFIG).is_file():
        with reading(folder / GENERATION_CONFIG, "no GenerationConfig comes of it"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(dir)
    return finished(model.to(device).eval(), config["quantization_config"], folder / CONFIG)


def finished(model: PreTrainedModel, ours: dict, source: str | Path) -> PreTrainedModel:
    """The model, all its tensors loaded: its linears listed as in config.json's entry `ours`, all
    but adapters frozen, saved in this format.

    Raises CheckpointError naming `source`, the config's file."""
    if "linears" in ours:
        model.hylora_linears = ours["linears"]
        unknown = set(model.hylora_linears) - {path for path, _ in model.named_modules()}
        if unknown:
            absent = shown(min(unknown))
            raise CheckpointError(f"{source}: linears names no module: {absent}")
    return save_in_hylora_format(freeze_all_but_adapters(model))


def layer_shapes(dir: str | Path) -> tuple[list[tuple[int, int, int, int]], list[str]]:
    """([(K, N, r, ra), ...], forms) of the SVDLoRALinears of a saved model, each of them once; not
    of those that are stored as codes.

    Reads config.json and the headers of the weight files. Raises CheckpointError as load_pretrained
    does, and if there are no low-rank layers.
    """
    folder = current(Path(dir))
    ours = read_config(folder)["quantization_config"]
    files = open_weights(folder, ours["checksums"])
    sizes = {name: entry.shape for file in files for name, entry in file.entries.items()}
    found = {}
    sizes |= {name: sizes[other] for name, other in ours.get("tied", {}).items() if other in sizes}
    for path, module in ours["modules"].items():
        if "form" not in module or "bits" in module:  # an embedding, which reads rows; codes
            continue
        try:
            (rank, K), others, form = sizes[f"{path}.SVh"], sizes[f"{path}.U"][0], module["form"]
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"{folder}: no layer at {shown(path)}: {error}") from error
        lora_rank = sizes.get(f"{path}.A", (0,))[0]
        N = others + (rank if form == "pivoted" else 0)
        if others:  # Without other rows the layer is a dense matrix, one product on any backend.
            found.setdefault((K, N, rank, lora_rank), form)
    if not found:
        raise CheckpointError(f"{folder}: there are no low-rank layers in it")
    return list(found), sorted(set(found.values()))


def check_weights(files: list[TensorFile], model: PreTrainedModel, guard: str | None) -> None:
    """Raise CheckpointError unless the files hold the tensors that the model needs and no more.

    guard: the name of the tensor that stops other loaders.
    """
    slots = slots_of(model)
    found: list[str] = []
    for file in files:
        for name, entry in file.entries.items():
            if name == guard and name not in slots and entry.shape == (0,):
                continue
            _check_entry(name, entry, slots.get(name), file.path)
            found.append(name)
    missing = missing_from(slots, found)
    if missing:
        places = ", ".join(str(file.path) for file in files)
        raise CheckpointError(f"{places}: tensor {missing[0]!r} is missing ({len(missing)} in all)")


def _check_entry(name: str, entry: Entry, slot: Slot | None, path: Path) -> None:
    if slot is None:
        raise CheckpointError(f"{path}: unexpected tensor {shown(name)}: the model has none")
    if entry.shape != slot.tensor.shape:
        wanted, found = list(slot.tensor.shape), list(entry.shape)
        raise CheckpointError(f"{path}: tensor {name!r} must have shape {wanted}, has {found}")
    floating = slot.tensor.is_floating_point()
    if entry.dtype not in (FLOATS if floating else (slot.tensor.dtype,)):
        wanted = "a floating dtype" if floating else slot.tensor.dtype
        raise CheckpointError(f"{path}: tensor {name!r} must have {wanted}, has {entry.dtype}")


def check_pivots(pivots: Tensor, slot: Slot, path: Path, name: str) -> None:
    """Raise CheckpointError if the tensor `name` of the file holds pivots that no layer has."""
    if not isinstance(slot.module, SVDLoRALinear) or slot.name != "pivots":
        return
    out_features = slot.module.out_features
    if (pivots < 0).any() or (pivots >= out_features).any() or (pivots.diff() <= 0).any():
        raise CheckpointError(
            f"{path}: tensor {name!r} must be strictly ascending within [0, {out_features})"
        )
