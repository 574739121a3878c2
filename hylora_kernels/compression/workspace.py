"""Where a compression keeps what it has finished, so that an interrupted one goes on and a second
one is quick.

One folder under the cache per (model weights, calibration tokens, method and its options): the
full-rank factors of each layer, which serve every keep, form and adapter rank; below it one folder
per set of ranks, with each refitted block. Everything is safetensors, each file whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hylora_kernels.compression.whiten import Factors
from hylora_kernels.support.storage import atomic_path, cache_dir

LAYOUT = 1  # raised whenever the files' meaning or the algorithm's numbers change


class Workspace:
    """The folder of one factorization; `keep_files=False` makes a temporary one that close()
    removes."""

    def __init__(self, key: str, keep_files: bool = True, parent: Path | None = None):
        self.keep_files = keep_files
        if keep_files:
            self.folder = parent / key if parent else cache_dir("compress", key)
        else:
            self.folder = Path(tempfile.mkdtemp(prefix="hylora-", dir=cache_dir("temporary")))
        self.folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        if not self.keep_files:
            shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, path: str) -> bool:
        return self._file(path).exists()

    def save(self, path: str, factors: Factors) -> None:
        tensors = {
            "U": factors.U,
            "S": factors.S,
            "SVh": factors.SVh,
            "damping": torch.tensor(factors.damping),
        }
        _save(self._file(path), tensors)

    def load(self, path: str) -> Factors:
        tensors = load_file(self._file(path))
        return Factors(
            tensors["U"], tensors["S"], tensors["SVh"], tuple(tensors["damping"].tolist())
        )

    def singular_values(self, path: str) -> Tensor:
        with safe_open(self._file(path), "pt") as file:
            return file.get_tensor("S")

    def refits(self, key: str) -> Refits:
        return Refits(self.folder / f"refit-{key}")

    def _file(self, path: str) -> Path:
        return self.folder / f"{path}.safetensors"


class Refits:
    """The finished blocks of one refit: block path -> linear path -> matrix."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def save(self, block: str, matrices: dict[str, Tensor]) -> None:
        _save(
            self.folder / f"{block}.safetensors",
            {path: m.contiguous().cpu() for path, m in matrices.items()},
        )

    def load(self) -> dict[str, dict[str, Tensor]]:
        return {
            file.name.removesuffix(".safetensors"): load_file(file)
            for file in self.folder.glob("*.safetensors")
        }


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


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(file) as temporary:
        save_file(tensors, temporary)
