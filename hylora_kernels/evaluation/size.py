"""True size: parameters, buffers and bytes in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import PackedLinear, PackedModule, packed_states
from hylora_kernels.layers.packed_parameter import PackedParameter
from hylora_kernels.model.format import WEIGHTS, own_files, read_index
from hylora_kernels.model.modules import base_of, parameter_count
from hylora_kernels.model.structure import linears
from hylora_kernels.support.report import Report
from hylora_kernels.support.staging import current


@dataclass
class Kept(Report):
    """Parameters of the dense model, as they are now, and with the adapters merged.

    keep_*, removed_*: fractions of `dense` that stay and that are gone; they sum to 1.
    """

    dense: int
    as_is: int
    merged: int
    keep_as_is: float
    removed_as_is: float
    keep_merged: float
    removed_merged: float


@dataclass
class ModelSize(Report):
    """Numbers of elements, and bytes. A tied weight counts once; pivots are buffers. A quantised
    matrix counts as the weights that its codes stand for, and in bytes as codes, scales and zeros.

    resident_bytes: of the whole storages of all parameters and buffers.
    file_bytes:     of the .safetensors files that the folder's model is loaded from; None without
                    a folder.
    linears:        the weights that compression chooses from, without biases; those left dense
                    count too.
    model:          all parameters.
    """

    parameters: int
    buffers: int
    trainable: int
    parameter_bytes: int
    buffer_bytes: int
    trainable_bytes: int
    resident_bytes: int
    file_bytes: int | None
    linears: Kept
    model: Kept


def model_size(model: nn.Module, path: str | Path | None = None) -> ModelSize:
    """Count the parameters and buffers of a causal language model.

    path: folder whose .safetensors files are counted too, each weight once.

    A layer packed for inference counts with the number of parameters that it was packed from, and
    with the bytes that it takes now.

    Raises ValueError if the folder has no .safetensors files.
    """
    packed = packed_states(model)
    panels = {id(tensor) for state in packed for tensor in state.tensors}
    parameters = [p for p in model.parameters() if not isinstance(p, PackedParameter)]
    all_buffers = list(model.buffers())
    buffers = [b for b in all_buffers if id(b) not in panels]
    trainable = [p for p in parameters if p.requires_grad]
    total = parameter_count(model)
    targets = linears(model).values()
    dense = sum(_count(layer, "dense") for layer in targets)
    as_is = sum(_count(layer, "as is") for layer in targets)
    merged = sum(_count(layer, "merged") for layer in targets)
    twice = _counted_twice(targets)
    as_is, merged = as_is - twice, merged - twice
    return ModelSize(
        parameters=total,
        buffers=sum(b.numel() for b in buffers),
        trainable=sum(p.numel() for p in trainable),
        parameter_bytes=sum(p.nbytes for p in parameters) + sum(state.nbytes for state in packed),
        buffer_bytes=sum(b.nbytes for b in buffers),
        trainable_bytes=sum(p.nbytes for p in trainable),
        resident_bytes=_storage_bytes(parameters + all_buffers),
        file_bytes=None if path is None else _file_bytes(Path(path)),
        linears=_kept(dense, as_is, merged),
        model=_kept(total - as_is + dense + _embedding_saves(model), total, total - as_is + merged),
    )


def _counted_twice(layers: Iterable[nn.Module]) -> int:
    """Parameters of bases that an earlier layer holds too."""
    seen: set[int] = set()
    twice = 0
    for layer in layers:
        if isinstance(layer, SVDLoRALinear) and not isinstance(layer, PackedModule):
            base, _ = base_of(layer)
            twice += layer.SVh.numel() if base in seen else 0
            seen.add(base)
    return twice


def _embedding_saves(model: nn.Module) -> int:
    """The parameters by which low-rank embeddings are smaller than dense ones."""
    found = (m for m in model.modules() if isinstance(m, LowRankEmbedding))
    return sum(m.num_embeddings * m.embedding_dim - m.parameter_count() for m in found)


def _count(layer: nn.Module, state: Literal["dense", "as is", "merged"]) -> int:
    """Parameters of a linear's weight in that state."""
    if isinstance(layer, PackedLinear):
        return layer.packed_state.count
    if not isinstance(layer, SVDLoRALinear):
        return layer.weight.numel()
    if state == "dense":
        return layer.in_features * layer.out_features
    return layer.parameter_count(merged=state == "merged")


def _kept(dense: int, as_is: int, merged: int) -> Kept:
    keep_as_is, keep_merged = as_is / max(dense, 1), merged / max(dense, 1)
    return Kept(dense, as_is, merged, keep_as_is, 1 - keep_as_is, keep_merged, 1 - keep_merged)


def _storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages. Meta tensors have none: they count with their own size."""
    storages = {}
    for tensor in chain.from_iterable(map(_plain_parts, tensors)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a subclass such as torchao's keeps its codes and scales in, or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))


def _file_bytes(folder: Path) -> int:
    """Bytes of the files that the model is loaded from: a folder may hold its weights twice, as in
    a consolidated.safetensors beside the shards of the index."""
    folder = current(folder)
    names = {name for name in own_files(folder) or () if (folder / name).is_file()}
    names = names or set(read_index(folder).values())
    if not names:
        whole = folder / WEIGHTS
        names = {file.name for file in ([whole] if whole.is_file() else folder.glob("*"))}
    sizes = [(folder / name).stat().st_size for name in names if name.endswith(".safetensors")]
    if not sizes:
        raise ValueError(f"path must be a folder with .safetensors files, got {folder}")
    return sum(sizes)
