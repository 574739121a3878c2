"""Hashes of tensors, modules and options, by which finished work is found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

LAYOUT = 1  # raised whenever the files' meaning or the algorithm's numbers change


def fingerprint(**parts) -> str:
    """A short hash of JSON-able options and tensors; modules count by their parameters' names and
    bytes."""
    digest = hashlib.sha256(f"layout {LAYOUT}".encode())
    for name, part in sorted(parts.items()):
        digest.update(name.encode())
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(key.encode())
                _update(digest, tensor)
        elif isinstance(part, Tensor):
            _update(digest, part)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:20]


def _update(digest, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_hash(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """sha256 over names, dtypes, shapes and bytes, and `text`."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
