"""The factors of every target linear of a model, from the cache or made anew: what compress() and
analyze both start from."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression import calibration
from hylora_kernels.compression.whiten import factorize_whitened
from hylora_kernels.compression.workspace import Workspace
from hylora_kernels.model.structure import Structure, as_matrix
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.storage import require_disk
from hylora_kernels.support.timing import timed


def open_workspace(
    model: nn.Module,
    structure: Structure,
    ids: Tensor | None,
    method: str,
    factorizer: str = "gram",
    seed: int = 0,
    cache: bool | str | Path = True,
) -> Workspace:
    """The workspace that belongs to these weights, these tokens, this method."""
    key = fingerprint(
        model=model,
        ids="none" if ids is None else ids,
        method=method,
        factorizer=factorizer,
        config={k: v for k, v in model.config.to_dict().items() if not k.startswith("_")},
        seed=seed if factorizer == "randomized" else 0,
        groups=[group.paths for group in structure.groups],
    )
    return Workspace(key, bool(cache), Path(cache) if isinstance(cache, str | Path) else None)


def factorize_model(
    model: nn.Module,
    structure: Structure,
    ids: Tensor | None,
    method: str,
    workspace: Workspace,
    factorizer: str = "gram",
    max_memory: int | None = None,
    seed: int = 0,
    seconds: dict[str, float] | None = None,
    progress: bool = True,
) -> None:
    """Fill the workspace with the layers' factors, in as many passes over the text as max_memory
    (bytes) asks for.

    Finished layers are kept as they are. `seconds` gains what "calibrate" and "factorize" took.
    Raises FloatingPointError naming the layer whose weights, inputs or gradients are not finite.
    """
    seconds = {} if seconds is None else seconds
    missing = [g for g in structure.groups if not all(workspace.has(path) for path in g.paths)]
    if not missing:
        return
    require_disk(
        workspace.folder,
        sum(_factor_bytes(model, path) for g in missing for path in g.paths),
        "factors",
    )
    _require_finite(model)
    with_gradients = method == "two_sided"
    runs = [missing]
    if method != "svd":
        runs = calibration.passes(
            model, missing, with_gradients, max_memory or _free_memory(model) // 2
        )
    for index, run in enumerate(runs):
        statistics = calibration.Statistics({}, {})
        if method != "svd":
            label = (
                "calibrating" if len(runs) == 1 else f"calibrating, pass {index + 1} of {len(runs)}"
            )
            with timed(seconds, "calibrate"):
                statistics = calibration.gather(model, ids, run, with_gradients, progress, label)
        with timed(seconds, "factorize"):
            layers = [(g.paths[0], p) for g in run for p in g.paths if not workspace.has(p)]
            for leader, path in tqdm(
                layers, desc="factorizing", unit="layer", disable=not progress, leave=False
            ):
                factors = factorize_whitened(
                    path,
                    as_matrix(model.get_submodule(path)),
                    statistics.inputs.get(leader),
                    statistics.gradients.get(path),
                    factorizer,
                    seed,
                )
                workspace.save(path, factors)


def _require_finite(model: nn.Module) -> None:
    # All parameters, before the text is read: what one spoils would be blamed on a later layer.
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            path, _, kind = name.rpartition(".")
            raise FloatingPointError(f"layer {path}: its {kind} is not finite")


def _factor_bytes(model: nn.Module, path: str) -> int:
    N, K = as_matrix(model.get_submodule(path)).shape
    return 4 * min(N, K) * (N + K + 1)


def _free_memory(model: nn.Module) -> int:
    device = next(model.parameters()).device
    return (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
