"""Reading a safetensors file one tensor at a time, with errors that name the file and the tensor.

The library safetensors maps the file into memory and returns views: the mapped pages count as this
process's memory until the file is closed, and its errors do not name the tensor. Here each tensor
is read into memory of its own, and its checksum is computed from there. Files are written by the
library.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hylora_kernels.model.files import (
    MAX_JSON,
    CheckpointError,
    parse_json,
    require_file,
    shown,
)
from hylora_kernels.support.hashing import tensor_bytes

MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # Not in checkpoints of this package, but in dense ones.
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def checksum(tensor: Tensor) -> str:
    """The crc32 of a CPU tensor's bytes, 8 hex digits. It finds accidents, not forgery."""
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, whose bytes are file[start : start + length]."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    length: int


class TensorFile:
    """The header of a safetensors file, checked against the file's length.

    entries: name of a tensor -> Entry, in the order of their bytes.

    Raises CheckpointError for a file that is missing, truncated or corrupted, and for a header of
    more than MAX_JSON bytes.
    """

    def __init__(self, path: Path):
        self.path = path
        size = require_file(path)
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > size - 8:
                    raise CheckpointError(
                        f"{path}: truncated: {size} bytes, less than its header takes"
                    )
                if length > MAX_JSON:
                    raise CheckpointError(
                        f"{path}: its header has {length} bytes, more than the limit of {MAX_JSON}"
                    )
                header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
        try:
            listed = parse_json(header)
            listed.pop("__metadata__", None)
            entries = {name: self._entry(8 + length, **entry) for name, entry in listed.items()}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path}: corrupted header: {error}") from error
        # An empty tensor starts at the same byte as the next one, and comes first.
        order = sorted(entries.items(), key=lambda item: (item[1].start, item[1].length))
        self.entries = dict(order)
        self._check_layout(8 + length, size)

    @staticmethod
    def _entry(begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
        first, last = data_offsets
        sizes = (*shape, first, last)
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
            raise ValueError(
                f"shape {shown(shape)} or data_offsets {shown(data_offsets)} is no list of sizes"
            )
        return Entry(DTYPES[dtype], tuple(shape), begin + first, last - first)

    def _check_layout(self, position: int, size: int) -> None:
        for name, entry in self.entries.items():
            wanted = math.prod(entry.shape) * entry.dtype.itemsize
            if entry.start != position or entry.length != wanted:
                raise CheckpointError(
                    f"{self.path}: corrupted header: tensor {shown(name)} takes {wanted} bytes "
                    f"from {position}, not {entry.length} from {entry.start}"
                )
            position += entry.length
            if position > size:
                raise CheckpointError(
                    f"{self.path}: truncated at byte {size}, in tensor {shown(name)}"
                )
        if position != size:
            raise CheckpointError(f"{self.path}: {size - position} bytes after the last tensor")

    def read(self, name: str, expected: str | None = None) -> Tensor:
        """The tensor `name`, in CPU memory of its own.

        Raises CheckpointError if its checksum is not `expected`.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        data = tensor_bytes(tensor)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(data) != entry.length:
                raise CheckpointError(f"{self.path}: truncated: tensor {shown(name)} is cut off")
        if expected is not None:
            self.check(name, tensor, expected)
        return tensor

    def check(self, name: str, tensor: Tensor, expected: str) -> None:
        """Raise CheckpointError if the checksum of `tensor`, read as `name`, is not `expected`."""
        if checksum(tensor) != expected:
            raise CheckpointError(
                f"{self.path}: corrupted: tensor {shown(name)} doesn't have its checksum in "
                "config.json"
            )
