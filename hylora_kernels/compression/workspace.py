"""Where a compression keeps what it has finished, so that an interrupted one goes on and a second
one is quick.

One folder under the cache per (model weights, calibration tokens, method and its options): the
full-rank factors of each layer, which serve every keep, form and adapter rank; below it one folder
per set of ranks, with each refitted block. Everything is safetensors, each file whole or absent.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hylora_kernels.compression.whiten import Factors
from hylora_kernels.support.storage import atomic_path, cache_dir


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


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(file) as temporary:
        save_file(tensors, temporary)
