"""Saving compressed models (model/format.py says what is written)."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import weakref
from pathlib import Path
from typing import TypeVar

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.format import CONFIG, FORMAT, INDEX, METHOD, WEIGHT_FILES
from hylora_kernels.model.skeleton import build, missing_from, slots_of
from hylora_kernels.model.tensorfile import checksum
from hylora_kernels.support.storage import require_disk, write_json

Model = TypeVar("Model", bound=nn.Module)


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
