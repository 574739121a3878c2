"""Saving compressed models (model/format.py says what is written)."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear
from hylora_kernels.model.by_block import stored_blocks
from hylora_kernels.model.format import (
    ANY_WEIGHTS,
    CONFIG,
    FORMAT,
    GENERATION_CONFIG,
    INDEX,
    METHOD,
    WEIGHT_FILES,
    decoded,
    guard_of,
    own_files,
)
from hylora_kernels.model.modules import forget_ties_of_factors
from hylora_kernels.model.skeleton import build
from hylora_kernels.model.slots import missing_from, slots_of
from hylora_kernels.model.tensorfile import TensorFile, checksum
from hylora_kernels.support.processes import ALONE, Processes
from hylora_kernels.support.staging import current, discard, exclusive, files_in, replacement
from hylora_kernels.support.storage import require_disk, write_json, write_text

COMPRESSED = (SVDLoRALinear, LowRankEmbedding, QuantizedEmbedding)
REST = ""  # The shard of what is in no block.
MARK = "in_hylora_format"  # an attribute of models whose own save_pretrained writes this format
Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger(__name__)


def save_pretrained(
    model: nn.Module,
    dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a compressed (or any other) causal language model to the folder `dir`.

    model:          also wrapped by torch.compile or DistributedDataParallel. If it is sharded
                    (fully_shard, tensor parallel), all processes make this call, and the first
                    one gathers the tensors and writes.
    tokenizer:      saved beside the model, or None.
    state_dict:     tensors to write instead of model.state_dict(), with its names and shapes.
    max_shard_size: the largest file of weights, in bytes or as "5GB".
    overwrite:      replace files that this function didn't write, too. A model that another program
                    saved is never overwritten.

    A model that this function saved there is replaced: a process killed at any moment leaves the
    old one or the new one. Files of others stay. Raises TypeError or ValueError, before anything is
    written, for a model that load_pretrained could not rebuild from its config, or a folder with
    another model in it.

    Example:
        model = load_pretrained("my-folder")
        save_pretrained(model, "another-folder", tokenizer)
    """
    model, target = unwrapped(model), Path(dir)
    given = (target, tokenizer, max_shard_size, overwrite)
    if state_dict is not None or not is_sharded(model):
        _save(model, model.state_dict() if state_dict is None else state_dict, *given)
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict, failure = get_model_state_dict(model, options=options), [""]
    try:
        if distributed.get_rank() == 0:
            _save(model, state_dict, *given)
    except BaseException as error:
        failure = [f"{type(error).__name__}: {error}"]
        raise
    finally:  # The others wait here: the files are there, or all raise.
        distributed.broadcast_object_list(failure)
    if failure[0]:
        raise RuntimeError(f"the first process could not save the model: {failure[0]}")


def refuse_foreign_files(
    dir: str | Path, overwrite: bool = False, names: Collection[str] = (CONFIG,)
) -> None:
    """Raise ValueError if a save to the folder `dir` would harm files that this package didn't
    write.

    names: the files of the save. With `overwrite` they may be any but those of another program's
           model.
    """
    folder = Path(dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"dir {str(folder)!r} is a file, not a folder")
    ours = own_files(current(folder))
    if ours is None:
        raise ValueError(
            f"dir {str(folder)!r} holds a model that hylora_kernels didn't save, which is never "
            "overwritten: delete it first, or give another folder"
        )
    if overwrite or not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir()} | {n for n in names if (folder / n).exists()}
    for name in sorted(found - ours):
        harmed = (name in names, ANY_WEIGHTS.fullmatch(name))
        if all(harmed) if ours else any(harmed):
            raise ValueError(
                f"dir {str(folder)!r} holds {name}, which hylora_kernels didn't write: give "
                "another folder, or overwrite=True"
            )


def refuse_unsavable(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    warn_if_modified: bool = False,
) -> None:
    """Raise TypeError or ValueError if save_pretrained could not save `model` and `tokenizer`.

    warn_if_modified: log a warning only, if a model of this class can be saved, but not one whose
                      modules were exchanged as in this one.
    """
    model = unwrapped(model)
    config = saved_config(model)
    empty = rebuilt_empty(model, config)
    with tempfile.TemporaryDirectory() as folder:
        _write_other_files(model, tokenizer, Path(folder))
    try:
        _tensors_to_save(model, config, model.state_dict(), empty, stored_blocks(model))
    except ValueError as error:
        if not warn_if_modified:
            raise
        _log.warning("this model can be used, but not saved: %s", error)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model in the wrappers of torch.compile and DistributedDataParallel.

    Raises TypeError if it is none of transformers.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module" if isinstance(model, wrappers) else "_orig_mod", None)
        if inner is None:
            raise TypeError(
                f"model must be a transformers PreTrainedModel, got {type(model).__name__}"
            )
        model = inner
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def saved_by_block(
    model: nn.Module,
    dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
    processes: Processes = ALONE,
) -> Iterator[Callable[[str], None]]:
    """save_pretrained() of a model whose blocks are in files (model/by_block.py), each block a
    shard.

    Yields a function of a block's path, which writes it: to be called while a changed block is in
    memory as it shall be saved, and from then on it is read from there. The folder changes when the
    `with` ends, all at once; if it raises, it stays as it was. Of several `processes`, all of which
    see the folder, the first one writes.
    """
    model, target = unwrapped(model), Path(dir)
    blocks = stored_blocks(model)
    shards = dict(zip((REST, *blocks), _shard_names(len(blocks) + 1), strict=True))
    checksums: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}

    def write_file(new: Path, shard: str, tensors: dict[str, Tensor]) -> None:
        checksums[shard] = _write_file(tensors, new / shard)
        sizes[shard] = sum(tensor.nbytes for tensor in tensors.values())

    def read_from(folder: Path, path: str) -> None:
        file = TensorFile(folder / shards[path])
        names = (name.removeprefix(f"{path}.") for name in file.entries)
        blocks[path].is_stored_in({name: (file, f"{path}.{name}") for name in names})

    def writer(new: Path) -> Callable[[str], None]:
        def write(path: str) -> None:
            if processes.is_first:
                tensors = blocks[path].module.state_dict(prefix=f"{path}.")
                write_file(new, shards[path], tensors)
            processes.wait(f"writing {path}")
            written.add(path)
            read_from(new, path)

        return write

    def write_unchanged(write: Callable[[str], None]) -> None:
        for path, block in blocks.items():
            if path not in written:
                with block.held():
                    write(path)

    written: set[str] = set()
    if processes.is_first:
        with _replaced(target, overwrite) as new:
            yield (write := writer(processes.agreed(new.absolute(), "writing")))
            write_unchanged(write)
            config = saved_config(model)
            tensors = _tensors_to_save(
                model, config, model.state_dict(), rebuilt_empty(model, config), blocks
            )
            write_file(new, shards[REST], {n: t for n, t in tensors.items() if not t.is_meta})
            weight_map = {name: shard for shard, names in checksums.items() for name in names}
            metadata = {"total_size": sum(sizes.values())}
            write_json(new / INDEX, {"metadata": metadata, "weight_map": weight_map})
            _write_the_rest(model, tokenizer, new, target, config, checksums, overwrite)
    else:
        yield (write := writer(processes.agreed(Path(), "writing")))
        write_unchanged(write)
    processes.wait("writing")
    for path in blocks:
        read_from(target, path)


def _save(model, state_dict, target: Path, tokenizer, max_shard_size, overwrite: bool) -> None:
    config = saved_config(model)
    tensors = _tensors_to_save(model, config, state_dict, rebuilt_empty(model, config))
    needed = sum(t.nbytes for t in tensors.values())
    with _replaced(target, overwrite, needed) as new:
        checksums = _write_weights(tensors, new, max_shard_size)
        _write_the_rest(model, tokenizer, new, target, config, checksums, overwrite)


@contextmanager
def _replaced(target: Path, overwrite: bool, needed: int = 0) -> Iterator[Path]:
    """A new folder, whose files replace those of `target` when the `with` ends."""
    if not target.is_dir():
        refuse_foreign_files(target)
        target.mkdir(parents=True, exist_ok=True)
    with exclusive(target):
        refuse_foreign_files(target, overwrite)
        require_disk(target, needed, f"saving to {target}")
        with replacement(target, last=CONFIG) as new:
            yield new


def _write_the_rest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    new: Path,
    target: Path,
    config: dict,
    checksums: dict[str, dict[str, str]],
    overwrite: bool,
) -> None:
    """Write all but the weights to the folder `new`, and list what they make obsolete."""
    ours = config["quantization_config"]
    ours["checksums"] = checksums
    _write_other_files(model, tokenizer, new)
    ours["files"] = sorted([*files_in(new), CONFIG])
    write_text(new / CONFIG, json.dumps(config, indent=2) + "\n")
    refuse_foreign_files(target, overwrite, ours["files"])
    obsolete = own_files(target) or set()
    if overwrite:
        obsolete |= set(filter(WEIGHT_FILES.fullmatch, os.listdir(target)))
    discard(new, obsolete - set(ours["files"]))


def saved_config(model: PreTrainedModel) -> dict:
    """What config.json will say, as transformers writes it; no checksums and files yet."""
    config = copy.deepcopy(model.config)
    config.architectures = [_class_of(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    saved = json.loads(config.to_json_string())
    layers = {p: m for p, m in model.named_modules() if isinstance(m, COMPRESSED)}
    modules = {path: _describe(layer) for path, layer in layers.items()}
    # An older entry (that of a GGUF file, for example) no longer describes how weights are stored.
    saved["quantization_config"] = {"quant_method": METHOD, "format": FORMAT, "modules": modules}
    if getattr(model, "hylora_linears", None) is not None:
        saved["quantization_config"]["linears"] = list(model.hylora_linears)
    tied = _tied(layers)
    if tied:
        saved["quantization_config"]["tied"] = tied
    return saved


def _tied(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """name -> the first name of the same Parameter, of those that several layers share."""
    first: dict[int, str] = {}
    names = {f"{path}.{n}": p for path, m in layers.items() for n, p in m.named_parameters()}
    found = {name: first.setdefault(id(parameter), name) for name, parameter in names.items()}
    return {name: source for name, source in found.items() if source != name}


def _class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The model's class; fully_shard gives each module a class of its own, derived from its."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def _describe(layer: SVDLoRALinear | LowRankEmbedding | QuantizedEmbedding) -> dict:
    if isinstance(layer, LowRankEmbedding):
        return {"rank": layer.rank}
    if isinstance(layer, QuantizedEmbedding):
        return {"bits": layer.bits}
    names = ("rank", "lora_rank", "alpha", "form")
    dropout = {"lora_dropout": layer.lora_dropout} if layer.lora_dropout else {}
    bits = {"bits": layer.bits} if isinstance(layer, QuantizedLinear) else {}
    return {name: getattr(layer, name) for name in names} | {"group": None} | dropout | bits


def rebuilt_empty(model: PreTrainedModel, config: dict) -> PreTrainedModel:
    """The empty model that load_pretrained would fill."""
    with torch.device("cpu"):  # whatever the default device is
        empty = build(decoded(config))
    if type(empty) is not _class_of(model):
        raise ValueError(f"model: its class is not the {type(empty).__name__} of transformers")
    return empty


def _tensors_to_save(
    model, config: dict, state_dict: dict, empty, in_files: Collection[str] = ()
) -> dict[str, Tensor]:
    """name -> tensor; of tied tensors only one, if the model rebuilt from `config` ties them too.

    in_files: paths of blocks whose tensors may be on the meta device.

    A buffer that a model makes for itself is saved only if a new model makes another one: after
    model.to(torch.bfloat16), for example, the rotary frequencies are rounded.
    """
    rebuilt = slots_of(empty)
    tensors = dict(state_dict)
    for name, slot in slots_of(model).items():
        if slot.kind == "made" and name in rebuilt and not _same(slot.tensor, rebuilt[name].tensor):
            tensors[name] = slot.tensor
    first = {}
    for name, tensor in list(tensors.items()):
        if tensor.is_meta and not name.startswith(tuple(f"{path}." for path in in_files)):
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
    guard = guard_of(config["quantization_config"])
    tensors |= {guard: torch.empty(0, device="cpu")} if guard else {}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _write_other_files(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Write the tokenizer and the generation config to `folder`."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_CONFIG)


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
        checksums[file] = _write_file({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)
    return checksums


def _write_file(tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Write one file of weights; returns {tensor: crc32}."""
    shard, storages = {}, set()
    for name, given in tensors.items():
        tensor = given.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # The format has no shared memory: a tensor that shares its storage is copied.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(storage.data_ptr())
        shard[name] = tensor
    save_file(shard, path, metadata={"format": "pt"})
    return {name: checksum(tensor) for name, tensor in shard.items()}


def _shard_names(count: int) -> list[str]:
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def save_in_hylora_format(model: Model) -> Model:
    """Make transformers' own model.save_pretrained(folder) write this format, and its tie_weights()
    know what is tied; returns the model."""
    vars(model)[MARK] = True
    forget_ties_of_factors(model)
    return model


def is_in_hylora_format(model: nn.Module) -> bool:
    """Whether transformers' model.save_pretrained(folder) is to write this format."""
    return MARK in vars(model) or any(isinstance(m, COMPRESSED) for m in model.modules())
