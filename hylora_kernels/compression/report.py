"""The report of compress()."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from hylora_kernels.model.coverage import Skipped, skipped_table
from hylora_kernels.support.console import kept_table
from hylora_kernels.support.report import Report
from hylora_kernels.text.mix import Part, calibrated_on

if TYPE_CHECKING:
    from rich.console import Group


@dataclass
class LayerReport:
    """One linear W [N, K].

    rank:         R = r + ra, the adapter's lora_rank included; 0 for a layer left dense.
    parameters:   of the factors with the adapter merged; parameters_as_is with a separate adapter.
    lost_energy:  the share of sum S^2 that was dropped, S in the whitened norm.
    largest_coefficient: the largest absolute value in U of the pivoted form; 0 of the pair form.
    damping:      shares of the mean diagonal added to the Gram matrices of inputs and gradients.
    """

    path: str
    out_features: int
    in_features: int
    rank: int
    lora_rank: int
    parameters: int
    parameters_as_is: int
    lost_energy: float
    largest_coefficient: float
    damping: tuple[float, float]


@dataclass
class CompressReport(Report):
    """The result of compress() in numbers.

    parameters:       of the selected linears without biases, adapters merged (as deployed);
                      *_as_is counts separate adapters, dense_* the model before, model_* the whole
                      model. keep and removed are shares of the dense count.
    body_parameters:  of the dense model without embeddings and output head.
    skipped:          name -> size and reason of each parameter of two or more dimensions that was
                      left alone.
    unreached:        paths of the experts' linears that no calibration token was routed to: they
                      are cut by a plain SVD, to about the rank of the least of their siblings.
    sources:          the texts that were read, and the blocks and tokens of each; none for method
                      "svd".
    seconds:          by stage: load, calibrate, factorize, refit, replace.
    peak_rss:         the largest resident memory of the process so far, bytes.
    """

    options: dict
    calibration_tokens: int
    dense_parameters: int
    parameters: int = 0
    parameters_as_is: int = 0
    keep: float = 1.0
    removed: float = 0.0
    keep_as_is: float = 1.0
    model_dense_parameters: int = 0
    body_parameters: int = 0
    model_parameters: int = 0
    model_parameters_as_is: int = 0
    model_keep: float = 1.0
    model_removed: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss: int = 0
    sources: list[Part] = field(default_factory=list)

    def render(self) -> Group:
        """Rich tables: parameters kept and removed, and what was left alone."""
        from rich.console import Group

        counts = {
            "linears": (self.dense_parameters, self.parameters, self.parameters_as_is),
            "whole model": (
                self.model_dense_parameters,
                self.model_parameters,
                self.model_parameters_as_is,
            ),
        }
        parts: list[Any] = [kept_table(counts), skipped_table(self.skipped)]
        if self.unreached:
            some = ", ".join(self.unreached[:4]) + (", ..." if len(self.unreached) > 4 else "")
            parts.append(f"no calibration token reached {len(self.unreached)} linears: {some}")
        return Group(*parts)

    def text_line(self) -> str:
        """The texts that were read, with the blocks and tokens of each; "" for method "svd"."""
        return calibrated_on(self.sources)

    def count(self, model: nn.Module) -> None:
        """Fill in the totals, from `layers` and the compressed model."""
        self.parameters = sum(layer.parameters for layer in self.layers)
        self.parameters_as_is = sum(layer.parameters_as_is for layer in self.layers)
        self.keep = self.parameters / self.dense_parameters
        self.keep_as_is = self.parameters_as_is / self.dense_parameters
        self.model_parameters_as_is = sum(p.numel() for p in model.parameters())
        merging_saves = self.parameters_as_is - self.parameters
        self.model_parameters = self.model_parameters_as_is - merging_saves
        self.model_keep = self.model_parameters / self.model_dense_parameters
        self.removed, self.model_removed = 1 - self.keep, 1 - self.model_keep
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes, macOS bytes.
        self.peak_rss = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
