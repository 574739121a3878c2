"""analyze_spectrum(): how the singular values of a model's linears fall, by layer type, and what
ranks would cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.compression.factors import factorize_model, open_workspace
from hylora_kernels.compression.options import METHODS
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.load import tokenizer_of
from hylora_kernels.model.structure import as_matrix, discover
from hylora_kernels.support.console import table
from hylora_kernels.support.plots import spectrum_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import token_blocks

if TYPE_CHECKING:
    from rich.table import Table

SHARES = (0.9, 0.95, 0.99, 0.999)
RANKS = (16, 32, 64, 128, 256, 512, 1024)
LORA_RANKS = (8, 16, 32, 64)


@dataclass
class TypeSpectrum:
    """One layer type, averaged over its layers of one shape N x K.

    singular_values [min(N, K)]: root mean square over the layers. energy_at: rank -> mean share of
    sum S^2 kept.
    rank_for: share of the energy -> mean rank needed. break_even: the rank at which a pair is as
              large as the dense matrix;
    the pivoted form is smaller at every rank below min(N, K). lora_parameters: lora_rank ->
    parameters of one adapter.
    """

    name: str
    out_features: int
    in_features: int
    layers: int
    singular_values: list[float]
    energy_at: dict[int, float]
    rank_for: dict[str, float]
    break_even: float
    lora_parameters: dict[int, int]


@dataclass
class SpectrumReport(Report):
    """method: which norm the singular values are of ("svd": the plain weights'). types: one entry
    per layer type."""

    method: str
    types: list[TypeSpectrum]
    skipped: dict[str, str]

    def render(self) -> Table:
        shares = [f"rank for {share:.1%}".replace(".0%", "%") for share in SHARES]
        ranks = [rank for rank in RANKS if any(rank in t.energy_at for t in self.types)]
        columns = [
            "type", "layers", "N x K", *(f"energy at {r}" for r in ranks), *shares,
            "break-even", "LoRA r16",
        ]  # fmt: skip
        rows = [
            [
                t.name,
                t.layers,
                f"{t.out_features} x {t.in_features}",
                *(f"{t.energy_at[r]:.3f}" if r in t.energy_at else "" for r in ranks),
                *(f"{rank:.0f}" for rank in t.rank_for.values()),
                f"{t.break_even:.0f}",
                f"{t.lora_parameters[16]:,}",
            ]
            for t in self.types
        ]
        return table(f"singular spectra ({self.method})", columns, rows)

    def plot(self, path: str | Path) -> None:
        spectra = {
            f"{t.name} {t.out_features}x{t.in_features}": t.singular_values for t in self.types
        }
        spectrum_plot(spectra, path, f"singular values ({self.method})")


def analyze_spectrum(
    model: nn.Module,
    method: str = "svd",
    calibration: Tensor | list[str] | str | Path = "brown",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    samples: int = 128,
    length: int = 512,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache: bool | str | Path = True,
    seed: int = 0,
    progress: bool = True,
) -> SpectrumReport:
    """Singular spectra of a dense model's target linears (structure.select's rules), by layer type
    and shape.

    method "svd" looks at the weights alone; "whitened" and "two_sided" at the norms compress()
    truncates in, for which `calibration` is read as compress() reads it. Factors come from and go
    to compress()'s cache.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    structure = discover(model, include, exclude)
    if not structure.groups or any(
        isinstance(model.get_submodule(p), SVDLoRALinear) for p in structure.paths
    ):
        raise ValueError(
            f"model must be dense and have linears, got {type(model).__name__} with"
            f" {structure.paths[:2]}"
        )
    ids = None
    if method != "svd":
        if not isinstance(calibration, Tensor):
            tokenizer = tokenizer or tokenizer_of(model)
        ids = token_blocks(calibration, tokenizer, length, split="train", limit=samples, seed=seed)
    workspace = open_workspace(model, structure, ids, method, cache=cache)
    try:
        factorize_model(model, structure, ids, method, workspace, progress=progress)
        by_type: dict[tuple, list[Tensor]] = {}
        for path in structure.paths:
            shape = tuple(as_matrix(model.get_submodule(path)).shape)
            by_type.setdefault((_type_of(path), *shape), []).append(
                workspace.singular_values(path).double()
            )
    finally:
        workspace.close()
    types = [_summary(*kind, torch.stack(spectra)) for kind, spectra in by_type.items()]
    return SpectrumReport(method, types, structure.skipped)


def _type_of(path: str) -> str:
    """The path with its numbers taken out from the left: model.layers.3.mlp.up_proj ->
    mlp.up_proj."""
    return re.split(r"(?:^|\.)\d+\.", path)[-1]


def _summary(name: str, N: int, K: int, S: Tensor) -> TypeSpectrum:
    squares = S**2
    # 0 / 0: of a weight of zeros any rank keeps all
    kept = (squares.cumsum(1) / squares.sum(1, keepdim=True)).nan_to_num(1.0)
    full = S.shape[1]
    return TypeSpectrum(
        name,
        N,
        K,
        len(S),
        squares.mean(0).sqrt().tolist(),
        {rank: float(kept[:, rank - 1].mean()) for rank in RANKS if rank < full},
        # rounding may leave the last entry a hair under a share of one
        {
            f"{share:g}": float(((kept < share).sum(1) + 1).clamp_max(full).double().mean())
            for share in SHARES
        },
        N * K / (N + K),
        {rank: rank * (N + K) for rank in LORA_RANKS},
    )
