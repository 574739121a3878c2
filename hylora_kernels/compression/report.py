"""The report of compress()."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hylora_kernels.compression.options import AS_IS, AUTO
from hylora_kernels.model.coverage import Skipped, skipped_table
from hylora_kernels.model.modules import parameter_count
from hylora_kernels.model.structure import depth_of, layer_type
from hylora_kernels.support.console import format_bytes, format_short, kept_table, table
from hylora_kernels.support.plots import budget_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.mix import Part, calibrated_on

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass
class Candidate:
    """What a layer could become: total rank (0: dense), bits, its cost in the budget's currency
    (bytes, bits or nanoseconds), the predicted increase of the loss."""

    rank: int
    bits: int
    cost: int
    predicted_loss: float


@dataclass
class Timing:
    """Under a budget of time: what a model takes for `rows` rows of x, 1 for a decoded token, more
    for a prompt, on a device.

    dense_seconds, seconds: predicted of the matrices, before and after, adapters as the option
                            `count` says.
    dense_tok_s, tok_s:     measured tokens per second of the whole model, packed for inference, its
                            adapters separate, before and after; None where not_measured says why.
    """

    rows: int
    device: str
    dense_seconds: float
    seconds: float
    dense_tok_s: float | None = None
    tok_s: float | None = None
    not_measured: str = ""

    @property
    def share(self) -> float:
        """The predicted time over that of the dense model."""
        return self.seconds / self.dense_seconds

    def line(self) -> str:
        what = "a token" if self.rows == 1 else f"a prompt of {self.rows}"
        shown = [format_short(seconds) for seconds in (self.dense_seconds, self.seconds)]
        parts = [f"{self.share:.2f} of the dense model's predicted ({' to '.join(shown)})"]
        if self.tok_s and self.dense_tok_s:
            parts.append(
                f"{self.dense_tok_s / self.tok_s:.2f} measured ({self.dense_tok_s:.4g} to"
                f" {self.tok_s:.4g} tokens/s of the whole model)"
            )
        elif self.not_measured:
            parts.append(f"not measured: {self.not_measured}")
        return f"time of {what} in the matrices: {', '.join(parts)}"


@dataclass
class LayerReport:
    """One linear W [N, K].

    rank:         R = r + ra, the adapter's lora_rank included; 0 for a layer left dense.
    parameters:   of the factors with the adapter merged; parameters_as_is with a separate adapter.
    lost_energy:  the share of sum S^2 that was dropped, S in the whitened norm.
    largest_coefficient: the largest absolute value in U of the pivoted form; 0 of the pair form.
    damping:      shares of the mean diagonal added to the Gram matrices of inputs and gradients.
    predicted_loss: the sum of the dropped S^2 and, where bits were chosen, what rounding adds, in
                  nats a token; None unless the method is "two_sided", the only one with that unit.
    bits:         of the frozen matrices, 16 as they are.
    candidates:   where they have a price, the next cheaper candidate, the chosen one and the next
                  dearer one: what each costs says why.
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
    predicted_loss: float | None = None
    bits: int = AS_IS
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def kept_rank(self) -> float:
        """rank as a share of the full one."""
        full = min(self.out_features, self.in_features)
        return (self.rank or full) / full


@dataclass
class CompressReport(Report):
    """The result of compress() in numbers.

    parameters:       of the selected linears without biases, adapters merged (as deployed);
                      *_as_is counts separate adapters, dense_* the model before, model_* the whole
                      model. keep and removed are shares of the dense count.
    body_parameters:  of the dense model without embeddings and output head.
    tables:           the embedding and the output head, where bits were chosen for them; they do
                      not count in parameters and keep.
    skipped:          name -> size and reason of each parameter of two or more dimensions that was
                      left alone.
    unreached:        paths of the experts' linears that no calibration token was routed to: they
                      are cut by a plain SVD, to about the rank of the least of their siblings.
    sources:          the texts that were read, and the blocks and tokens of each; none for method
                      "svd".
    predicted_loss:   the increase of the loss by all cuts, in nats a token: the sum over `layers`
                      and `tables`, before the refit, which lowers it. None unless the method is
                      "two_sided".
    dense_loss, loss: before and after, in nats a token, on the last `measured_blocks` blocks of the
                      calibration text; None where none was measured. The statistics have seen
                      these blocks, the refit only where it read them all.
    model_dense_bytes, model_bytes: of the file of weights, before and after, adapters as the
                      option `count` says.
    timing:           predicted and measured times under a budget of time; else None.
    seconds:          by stage: load, calibrate, factorize, refit, replace, measure.
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
    tables: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss: int = 0
    sources: list[Part] = field(default_factory=list)
    predicted_loss: float | None = None
    dense_loss: float | None = None
    loss: float | None = None
    measured_blocks: int = 0
    model_dense_bytes: int = 0
    model_bytes: int = 0
    timing: Timing | None = None

    def render(self) -> Group:
        """Rich tables: parameters kept and removed, layer types, what was left alone; the loss."""
        from rich.console import Group

        counts = {
            "linears": (self.dense_parameters, self.parameters, self.parameters_as_is),
            "whole model": (
                self.model_dense_parameters,
                self.model_parameters,
                self.model_parameters_as_is,
            ),
        }
        parts: list[Any] = [kept_table(counts)]
        quantised = self._is_quantised
        if not quantised or any(layer.rank for layer in self.layers):
            parts.append(self._types_table())
        parts += [self._bits_table()] if quantised else []
        parts.append(skipped_table(self.skipped))
        time_line = self.timing.line() if self.timing else ""
        lines = (self.size_line(), time_line, self.loss_line(), self.price_line())
        parts += [line for line in lines if line]
        if self.unreached:
            some = ", ".join(self.unreached[:4]) + (", ..." if len(self.unreached) > 4 else "")
            parts.append(f"no calibration token reached {len(self.unreached)} linears: {some}")
        return Group(*parts)

    def size_line(self) -> str:
        """The file of weights before and after; "" until the model is compressed."""
        if not self.model_bytes:
            return ""
        counted = "merged" if self.options["count"] == "merged" else "separate"
        adapters = f" with adapters {counted}" if self.options.get("low_rank", True) else ""
        return (
            f"file of weights: {format_bytes(self.model_dense_bytes)} dense, "
            f"{format_bytes(self.model_bytes)}{adapters}"
        )

    def loss_line(self) -> str:
        """The predicted and the measured increase of the loss; "" where there is neither."""
        parts = []
        if self.predicted_loss is not None:
            refitted = " without the refit" if self.options.get("refit") else ""
            parts.append(f"{self.predicted_loss:+.4f} predicted{refitted}")
        if self.dense_loss is not None and self.loss is not None:
            parts.append(
                f"{self.loss - self.dense_loss:+.4f} measured ({self.dense_loss:.4f} to "
                f"{self.loss:.4f} on the last {self.measured_blocks} blocks of calibration text)"
            )
        return f"loss in nats a token: {', '.join(parts)}" if parts else ""

    def price_line(self) -> str:
        """The step that the budget stops before; "" where candidates have no price."""
        steps = []
        for layer in (*self.layers, *self.tables):
            at = [(c.rank, c.bits) for c in layer.candidates]
            if at and at[-1] != (layer.rank, layer.bits):
                now, dearer = layer.candidates[-2:]
                saved, cost = now.predicted_loss - dearer.predicted_loss, dearer.cost - now.cost
                steps.append((saved / cost, saved, cost, layer, dearer))
        if not steps:
            return ""
        _, saved, cost, layer, dearer = max(steps, key=lambda step: step[0])
        kind, paid = "size", format_bytes(cost / (1 if self.options["bits"] == AUTO else 8))
        if self.timing is not None:
            kind, paid = "time", format_short(cost / 1e9)
        return (
            f"why not more: {layer.path} in {_words(dearer.rank, dearer.bits)} would save the most"
            f" for its {kind}, {saved:.2g} for {paid} more than in"
            f" {_words(layer.rank, layer.bits)}"
        )

    def plot(self, path: str | Path) -> None:
        """Draw the predicted loss, the ranks and the bits by depth and layer type."""
        losses: dict[str, dict[int, float]] = {}
        ranks: dict[str, dict[int, list[float]]] = {}
        bits: dict[str, dict[int, list[float]]] = {}
        for layer in self.layers:
            kind, depth = layer_type(layer.path), depth_of(layer.path)
            if depth is None:  # An output head stands in no block.
                continue
            ranks.setdefault(kind, {}).setdefault(depth, []).append(layer.kept_rank)
            bits.setdefault(kind, {}).setdefault(depth, []).append(layer.bits)
            if layer.predicted_loss is not None:
                by_depth = losses.setdefault(kind, {})
                by_depth[depth] = by_depth.get(depth, 0.0) + layer.predicted_loss
        title = f"keep {self.keep:.3f} (removed {self.removed:.3f})"
        quantised = self._is_quantised
        if quantised:
            title = f"{format_bytes(self.model_bytes)} of {format_bytes(self.model_dense_bytes)}"
        if self.timing is not None:
            title = f"{self.timing.share:.2f} of the time, {title}"
        shown = not quantised or any(layer.rank for layer in self.layers)
        budget_plot(
            losses, _means(ranks) if shown else {}, path, title, _means(bits) if quantised else {}
        )

    def _types_table(self) -> Table:
        by_type: dict[tuple[str, int, int], list[LayerReport]] = {}
        for layer in self.layers:
            kind = layer_type(layer.path), layer.out_features, layer.in_features
            by_type.setdefault(kind, []).append(layer)
        rows: list[list[object]] = []
        for (name, N, K), layers in by_type.items():
            ranks = [layer.rank or min(N, K) for layer in layers]
            losses = [layer.predicted_loss for layer in layers if layer.predicted_loss is not None]
            rows.append(
                [
                    name,
                    len(layers),
                    f"{N} x {K}",
                    f"{sum(ranks) / len(ranks):.0f} ({min(ranks)} to {max(ranks)})",
                    sum(layer.rank == 0 for layer in layers),
                    f"{sum(layer.parameters for layer in layers) / (len(layers) * N * K):.4f}",
                    sum(losses) if losses else None,
                ]
            )
        columns = ["type", "layers", "N x K", "rank", "dense", "kept", "predicted loss"]
        return table("by layer type; rank: mean (lowest to highest)", columns, rows)

    @property
    def _is_quantised(self) -> bool:
        return any(layer.bits != AS_IS for layer in (*self.layers, *self.tables))

    def _bits_table(self) -> Table:
        by_type: dict[str, list[LayerReport]] = {}
        for layer in (*self.layers, *self.tables):
            by_type.setdefault(layer_type(layer.path), []).append(layer)
        widths = sorted({layer.bits for layer in (*self.layers, *self.tables)})
        rows: list[list[object]] = []
        for name, layers in by_type.items():
            weights = sum(layer.parameters for layer in layers)
            losses = [layer.predicted_loss for layer in layers if layer.predicted_loss is not None]
            rows.append(
                [
                    name,
                    *(sum(layer.bits == bits for layer in layers) or None for bits in widths),
                    f"{sum(layer.bits * layer.parameters for layer in layers) / weights:.2f}",
                    sum(losses) if losses else None,
                ]
            )
        columns = ["type", *(f"{bits} bits" for bits in widths), "mean", "predicted loss"]
        return table("matrices by bits (16: as they are)", columns, rows)

    def text_line(self) -> str:
        """The texts that were read, with the blocks and tokens of each; "" for method "svd"."""
        return calibrated_on(self.sources)

    def count(self, model: nn.Module) -> None:
        """Fill in the totals, from `layers` and the compressed model."""
        self.parameters = sum(layer.parameters for layer in self.layers)
        self.parameters_as_is = sum(layer.parameters_as_is for layer in self.layers)
        losses = [layer.predicted_loss for layer in (*self.layers, *self.tables)]
        self.predicted_loss = None if None in losses else sum(filter(None, losses))
        self.keep = self.parameters / self.dense_parameters
        self.keep_as_is = self.parameters_as_is / self.dense_parameters
        self.model_parameters_as_is = parameter_count(model)
        merging_saves = self.parameters_as_is - self.parameters
        self.model_parameters = self.model_parameters_as_is - merging_saves
        self.model_keep = self.model_parameters / self.model_dense_parameters
        self.removed, self.model_removed = 1 - self.keep, 1 - self.model_keep
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes, macOS bytes.
        self.peak_rss = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _words(rank: int, bits: int) -> str:
    return f"{bits} bits" if rank == 0 else f"rank {rank}, {bits} bits"


def _means(rows: dict[str, dict[int, list[float]]]) -> dict[str, dict[int, float]]:
    return {
        kind: {depth: sum(values) / len(values) for depth, values in by_depth.items()}
        for kind, by_depth in rows.items()
    }
