"""The files of a compression: finished work, so that an interrupted one continues and a second one
is quick.

There is one folder in the cache for each combination of weights, calibration tokens, method and
factorizer. It holds the full-rank factors of each layer, which serve every keep, form and adapter
rank, one folder for each set of ranks, with the refitted blocks, and one for each way of rounding,
with the quantised matrices. All files are safetensors with
a checksum. A file is read by its name alone and counts only if it is whole; another is made again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hylora_kernels.compression.factors import Factors
from hylora_kernels.compression.gptq import DAMPING
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.whiten import GRADIENT_DAMPING, INPUT_DAMPING
from hylora_kernels.model.modules import model_fingerprint
from hylora_kernels.model.structure import Block, Structure
from hylora_kernels.support.cache import Files, cache_dir
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.processes import ALONE, Processes
from hylora_kernels.weights import QuantizedMatrix


def open_workspace(
    model: nn.Module,
    structure: Structure,
    ids: Tensor | None,
    options: CompressOptions,
    processes: Processes = ALONE,
) -> Workspace:
    """The workspace of these weights, calibration tokens (int64 [n, L] or None) and options.

    All processes have one. Raises ValueError if they have different models or tokens, OSError if
    one doesn't see the folder of the first.
    """
    key = fingerprint(
        model=model_fingerprint(model),
        ids="none" if ids is None else ids,
        method=options.method,
        factorizer=options.factorizer,
        damping=(INPUT_DAMPING, GRADIENT_DAMPING),
        units="S^2 in nats a token",
        seed=options.seed if options.factorizer == "randomized" else 0,
        groups=[group.paths for group in structure.groups],
    )
    if processes.agreed(key) != key:
        raise ValueError(
            f"the process of rank {processes.rank} has another model or other calibration tokens"
            " than the first one"
        )
    made = Workspace(key, options.cache) if processes.is_first else None
    folder = processes.agreed(made and made.folder.absolute(), "opening the workspace")
    processes.require_shared(folder)
    return made or Workspace(key, folder=folder)


class Refits(Files):
    """The finished blocks of one refit, a file of matrices (by the path of the linear) for each."""

    def done(self, blocks: Sequence[Block]) -> set[str]:
        """Paths of the blocks that are here and whole, for which each file is read."""
        return {block.path for block in blocks if self.find(block.path) is not None}


class Refitted(Mapping[str, Tensor]):
    """path of a linear -> its refitted matrix, of blocks that are all in `refits`. Files are read
    when asked for, and the last block is kept."""

    def __init__(self, refits: Refits, blocks: Sequence[Block]):
        self._block_of = {
            target.path: block.path
            for block in blocks
            for target in block.targets
            if not target.routed
        }
        self._refits, self._last = refits, ("", dict[str, Tensor]())

    def __getitem__(self, path: str) -> Tensor:
        block = self._block_of[path]
        if self._last[0] != block:
            self._last = ("", {})  # Freed before the next block is read.
            self._last = (block, self._refits.load(block))
        return self._last[1][path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._block_of)

    def __len__(self) -> int:
        return len(self._block_of)


class Codes(Files):
    """The quantised matrices, a file for each width of each, with what it loses."""

    def __init__(self, folder: Path, name: str):
        super().__init__(folder, name)
        self._whole: dict[str, bool] = {}

    def has(self, path: str, bits: int) -> bool:
        """True if a width is here and whole, for which the file is read once."""
        part = _width(path, bits)
        if part not in self._whole:
            self._whole[part] = self.find(part) is not None
        return self._whole[part]

    def store(
        self, path: str, bits: int, matrix: QuantizedMatrix | None, error: float, reached: bool
    ) -> None:
        """matrix: None for a low-rank layer, whose factors are rounded when it is replaced.
        reached: False where all inputs were zero on the calibration text."""
        numbers = {"reached": int(reached), "k": 0 if matrix is None else matrix.k}
        tensors = {name: torch.tensor(n, device="cpu") for name, n in numbers.items()}
        tensors["error"] = torch.tensor(error, dtype=torch.float64, device="cpu")
        for name in ("codes", "scales", "zeros") if matrix is not None else ():
            if (tensor := getattr(matrix, name)) is not None:
                tensors[name] = tensor
        self.save(_width(path, bits), tensors)
        self._whole[_width(path, bits)] = True

    def receive(self, widths: Sequence[tuple[str, int]], processes: Processes) -> None:
        """Wait for the matrices of these paths and bits, of which each process has stored its
        share."""
        parts = [_width(path, bits) for path, bits in widths]
        processes.see(map(self.path, parts), "quantising")
        self._whole.update(dict.fromkeys(parts, True))

    def matrix(self, path: str, bits: int) -> QuantizedMatrix | None:
        """The matrix of a width that is here; raises OSError if it is no longer."""
        t = self.load(_width(path, bits))
        if "codes" not in t:
            return None
        return QuantizedMatrix(t["codes"], t["scales"], t.get("zeros"), bits, int(t["k"]))

    def error(self, path: str, bits: int) -> tuple[float, bool]:
        """(what the width loses, whether the calibration text reached the layer)."""
        with safe_open(self.path(_width(path, bits)), "pt") as file:
            return float(file.get_tensor("error")), bool(file.get_tensor("reached"))


def _width(path: str, bits: int) -> str:
    return f"{path}-{bits}"


class Workspace:
    """The folder of one factorization, a file of Factors for each layer.

    key:    stands for all that the factors depend on.
    cache:  True puts it in the package's cache, a path into that folder; False makes a temporary
            folder, which close() removes.
    folder: one that another process has made, and removes.

    Raises OSError if the folder can't be made.
    """

    def __init__(self, key: str, cache: bool | str | Path = True, folder: Path | None = None):
        self.key, self.temporary = key, not cache
        if folder is not None:
            self.folder = folder
        elif self.temporary:
            self.folder = _temporary_folder()
        elif cache is True:
            self.folder = cache_dir("compress", key)
        else:
            self.folder = Path(cache) / key
            self.folder.mkdir(parents=True, exist_ok=True)
        self._files = Files(self.folder, key)
        self._whole: dict[str, bool] = {}

    def close(self) -> None:
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, path: str) -> bool:
        """True if the factors of a layer are here and whole, for which the file is read once."""
        if path not in self._whole:
            self._whole[path] = self._files.find(path) is not None
        return self._whole[path]

    def save(self, path: str, factors: Factors) -> None:
        tensors = {
            "U": factors.U,
            "S": factors.S,
            "SVh": factors.SVh,
            "damping": torch.tensor(factors.damping, device="cpu"),
        }
        self._files.save(path, tensors)
        self._whole[path] = True

    def receive(self, paths: Sequence[str], processes: Processes) -> None:
        """Wait for the factors of these layers, of which each process has stored its share."""
        processes.see((self._files.path(path) for path in paths), "factorizing")
        self._whole.update(dict.fromkeys(paths, True))

    def load(self, path: str) -> Factors:
        """The factors of a layer that are here; raises OSError if they are no longer."""
        tensors = self._files.load(path)
        return Factors(
            tensors["U"], tensors["S"], tensors["SVh"], tuple(tensors["damping"].tolist())
        )

    def singular_values(self, path: str) -> Tensor:
        return self._read(path, "S")

    def reached(self, path: str) -> bool:
        """False for a layer whose inputs were all zero, or none, on the calibration text."""
        return bool(self._read(path, "damping")[0] > 0)

    def _read(self, path: str, name: str) -> Tensor:
        with safe_open(self._files.path(path), "pt") as file:
            return file.get_tensor(name)

    def codes(self, rounding: str) -> Codes:
        """The quantised matrices of one way of rounding."""
        name = f"codes-{rounding}-{DAMPING}"
        return Codes(self.folder / name, f"{self._files.name}/{name}")

    def states(self) -> Files:
        """Hidden states of the calibration text on their way through the model (by_block.py)."""
        return Files(self.folder / "states", f"{self._files.name}/states")

    def refits(self, key: str) -> Refits:
        """The refitted blocks of one set of ranks and tokens, which `key` stands for."""
        return Refits(self.folder / f"refit-{key}", f"{self._files.name}/{key}")


def _temporary_folder() -> Path:
    """A new folder in the cache; in the system's folder for temporary files, which tends to be the
    smaller one, where the cache can't be written."""
    try:
        return Path(tempfile.mkdtemp(prefix="hylora-", dir=cache_dir("temporary")))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hylora-"))
