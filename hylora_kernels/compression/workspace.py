"""The files of a compression: finished work, so that an interrupted one continues and a second one
is quick.

There is one folder in the cache for each combination of weights, calibration tokens, method and
factorizer. It holds the full-rank factors of each layer, which serve every keep, form and adapter
rank, and one folder for each set of ranks, with the refitted blocks. All files are safetensors, and
each is whole or absent.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hylora_kernels.compression.factors import Factors
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.model.structure import Structure
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.storage import atomic_path, cache_dir


def open_workspace(
    model: nn.Module, structure: Structure, ids: Tensor | None, options: CompressOptions
) -> Workspace:
    """The workspace of these weights, calibration tokens (int64 [n, L] or None) and options."""
    key = fingerprint(
        model=model,
        ids="none" if ids is None else ids,
        method=options.method,
        factorizer=options.factorizer,
        config={k: v for k, v in model.config.to_dict().items() if not k.startswith("_")},
        seed=options.seed if options.factorizer == "randomized" else 0,
        groups=[group.paths for group in structure.groups],
    )
    return Workspace(key, options.cache)


class Workspace:
    """The folder of one factorization, a file of Factors for each layer.

    cache: True puts it in the package's cache, a path into that folder; False makes a temporary
           folder, which close() removes.
    """

    def __init__(self, key: str, cache: bool | str | Path = True):
        self.temporary = not cache
        if self.temporary:
            self.folder = Path(tempfile.mkdtemp(prefix="hylora-", dir=cache_dir("temporary")))
        elif cache is True:
            self.folder = cache_dir("compress", key)
        else:
            self.folder = Path(cache) / key
        self.folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        if self.temporary:
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
        """The refitted blocks of one set of ranks and tokens, which `key` stands for."""
        return Refits(self.folder / f"refit-{key}")

    def _file(self, path: str) -> Path:
        return self.folder / f"{path}.safetensors"


class Refits:
    """The finished blocks of one refit, a file of matrices (by the path of the linear) for each."""

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
