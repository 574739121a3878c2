"""analyze_spectrum(): singular values of a model's linears by layer type, and the cost of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.compression.compress import Compression
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.model.check import check_model
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.model.structure import layer_type
from hylora_kernels.support.console import table
from hylora_kernels.support.plots import spectrum_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import BLOCKS
from hylora_kernels.text.sources import Mix, Source

if TYPE_CHECKING:
    from rich.table import Table

SHARES = (0.9, 0.95, 0.99, 0.999)
RANKS = (16, 32, 64, 128, 256, 512, 1024)
LORA_RANKS = (8, 16, 32, 64)


@dataclass
class TypeSpectrum:
    """One layer type, averaged over its layers of one shape N x K.

    singular_values: [min(N, K)], root mean square over the layers.
    energy_at:       rank -> mean share of sum S^2 kept.
    rank_for:        share of the energy -> mean rank needed.
    break_even:      the rank at which a pair is as large as the dense matrix; the pivoted form is
                     smaller at every rank below min(N, K).
    lora_parameters: lora_rank -> parameters of one adapter.
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
    """method: the norm of the singular values ("svd": of the plain weights). types: one entry for
    each layer type and shape. skipped: path of a linear left alone -> the reason."""

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
    calibration: Source | Mix | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    samples: int = BLOCKS,
    length: int = 512,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache: bool | str | Path = True,
    seed: int = 0,
    progress: bool = True,
    split: str = "train",
    column: str | None = None,
) -> SpectrumReport:
    """Singular values of the linears that compress() would replace, by layer type and shape.

    method: "svd" measures the weights alone, "whitened" and "two_sided" the norms that compress()
            truncates in. The other arguments are those of CompressOptions.

    The model is not changed. Factors are read from and written to compress()'s cache. Raises the
    errors of compress().

    Example:
        report = analyze_spectrum(model)
        print(report)
    """
    options = CompressOptions(
        keep=1.0,
        calibration=calibration,
        method=method,
        refit=False,
        include=include,
        exclude=exclude,
        samples=samples,
        length=length,
        tokenizer=tokenizer,
        cache=cache,
        seed=seed,
        progress=progress,
        split=split,
        column=column,
    )
    check_model(model, "replace")
    by_type: dict[tuple[str, int, int], list[Tensor]] = {}
    with eval_mode(model), Compression(model, options) as run:
        for statistics in run.calibrate():
            run.factorize(statistics)
        for target in run.structure.targets:
            kind = layer_type(target.path), *target.shape
            by_type.setdefault(kind, []).append(run.workspace.singular_values(target.path).double())
    types = [_summary(*kind, torch.stack(spectra)) for kind, spectra in by_type.items()]
    return SpectrumReport(method, types, run.structure.skipped)


def _summary(name: str, N: int, K: int, S: Tensor) -> TypeSpectrum:
    squares = S**2
    # 0 / 0: any rank keeps all of a weight of zeros.
    kept = (squares.cumsum(1) / squares.sum(1, keepdim=True)).nan_to_num(1.0)
    full = S.shape[1]
    return TypeSpectrum(
        name,
        N,
        K,
        len(S),
        squares.mean(0).sqrt().tolist(),
        {rank: float(kept[:, rank - 1].mean()) for rank in RANKS if rank < full},
        # Rounding may leave the last entry slightly below one.
        {
            f"{share:g}": float(((kept < share).sum(1) + 1).clamp_max(full).double().mean())
            for share in SHARES
        },
        N * K / (N + K),
        {rank: rank * (N + K) for rank in LORA_RANKS},
    )
