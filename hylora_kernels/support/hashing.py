"""Hashes of tensors, modules and options, by which finished work is found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

LAYOUT = 2  # raise it when the meaning of cached files or the algorithm's numbers change


def fingerprint(**parts: object) -> str:
    """20 hex digits that change with any part: the name of a cached result.

    A part is a tensor, an iterator of named tensors (names, dtypes, shapes, bytes count), a module
    (its state_dict and its other buffers, in the same way) or anything that json.dumps takes; other
    values count by their str().
    """
    digest = hashlib.sha256(f"layout {LAYOUT}".encode())
    for name, part in sorted(parts.items()):
        digest.update(name.encode())
        if isinstance(part, nn.Module):
            part = iter(all_tensors(part).items())
        if isinstance(part, Iterator):
            for key, tensor in part:
                digest.update(f"{key}{_kind(tensor)}".encode())
                digest.update(tensor_bytes(tensor))
        elif isinstance(part, Tensor):
            digest.update(_kind(part).encode())
            digest.update(tensor_bytes(part))
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:20]


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's state_dict, and its buffers that no checkpoint holds, such as rotary
    frequencies, which change results too."""
    return module.state_dict() | dict(module.named_buffers())


def tensor_hash(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """sha256, 64 hex digits, over `text` and each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {_kind(tensor)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major: its own memory if contiguous on the CPU, else a copy."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
