"""Values derived from tensors, kept from call to call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

Value = TypeVar("Value")


class KeptWhileUnwritten(Generic[Value]):
    """Values kept while the tensors that they were made of live and nobody writes to them.

    The first of the tensors is the key. The version counter tells a write, but not one through
    `.data`, a NumPy array or another process, and an inference tensor has none. `fingerprint` is
    therefore compared at each use: a function of all of a tensor's numbers. `compares_copies`
    compares the tensor itself with a copy: any tensor on the CPU, elsewhere inference tensors only,
    since a GPU has to be waited for. Without it inference tensors keep nothing.

    Single operations are atomic: two threads that find nothing both make the value, and either one
    stays.
    """

    def __init__(
        self, compares_copies: bool = False, fingerprint: Callable[[Tensor], int] | None = None
    ):
        self._entries = WeakTensorKeyDictionary()
        self._compares_copies, self._fingerprint = compares_copies, fingerprint

    def get(self, *tensors: Tensor) -> Value | None:
        """The value made of these very tensors, None where it is missing or out of date."""
        entry = self._entries.get(tensors[0])
        return None if entry is None or not self._is_fresh(entry, tensors) else entry.value

    def get_unchecked(self, tensor: Tensor) -> Value | None:
        """The value last kept for the key, without looking for writes."""
        entry = self._entries.get(tensor)
        return None if entry is None else entry.value

    def keep(self, value: Value, *tensors: Tensor) -> None:
        if not self._compares_copies and any(t.is_inference() for t in tensors):
            return
        self._entries[tensors[0]] = _Entry(
            value,
            tuple(TensorWeakRef(t) for t in tensors[1:]),
            tuple(map(_stamp, tensors)),
            tuple(t.clone() if isinstance(t, Tensor) else t for t in self._compared(tensors)),
        )

    def forget(self, tensor: Tensor) -> None:
        """Drop the value kept for the key."""
        self._entries.pop(tensor, None)

    def __contains__(self, tensor: Tensor) -> bool:
        """True where a value is kept for the key, up to date or not."""
        return tensor in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _is_fresh(self, entry: _Entry[Value], tensors: tuple[Tensor, ...]) -> bool:
        same_tensors = all(ref() is t for ref, t in zip(entry.others, tensors[1:], strict=True))
        if not same_tensors or entry.stamps != tuple(map(_stamp, tensors)):
            return False
        compared = zip(self._compared(tensors), entry.compared, strict=True)
        return all(
            torch.equal(now, then) if isinstance(now, Tensor) else now == then
            for now, then in compared
        )

    def _compared(self, tensors: tuple[Tensor, ...]) -> list[Tensor | int | None]:
        """For each tensor, itself or its fingerprint, to be compared with what it was."""
        if self._compares_copies:
            return [t if t.is_cpu or t.is_inference() else None for t in tensors]
        return [self._fingerprint(t) if self._fingerprint else None for t in tensors]


def outside_graph_pools(make: Callable[[], Value], device: torch.device) -> Value:
    """make() for tensors that outlive the call, allocated in a thread of their own on a GPU.

    torch.compile warms up a CUDA graph with all that its thread allocates in the graph's memory
    pool, and refuses what stays there (torch 2.11: "tensor(s) in the cudagraph pool not tracked as
    outputs").
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def on_the_same_stream() -> Value:
        with torch.no_grad(), torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as one_thread:
        return one_thread.submit(on_the_same_stream).result()


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Value]):
    value: Value
    others: tuple[TensorWeakRef, ...]
    stamps: tuple[tuple, ...]
    compared: tuple[Tensor | int | None, ...]


def _stamp(tensor: Tensor) -> tuple:
    """Values that change with a write to the tensor or with an exchange of its memory."""
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
