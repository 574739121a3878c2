"""The replacement of a model's linears by low-rank layers: the only step that changes the model."""

from __future__ import annotations

from torch import Tensor, nn

from hylora_kernels.compression.factors import Factors
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.ranks import DENSE, adapter_rank
from hylora_kernels.compression.report import LayerReport
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.structure import Target


def replace_linear(
    model: nn.Module,
    target: Target,
    factors: Factors,
    rank: int,
    refitted: Tensor | None,
    options: CompressOptions,
    seed: int,
) -> LayerReport:
    """Put an SVDLoRALinear in the place of `target`, unless its rank is DENSE.

    rank:     r + ra: the first r components of the factors are the base, the next ra the adapter.

    refitted: float32, U [N, rank] ([N, r] under init="classic") instead of the factors' own, or the
              weight [N, K] of a linear left dense; None where nothing was refitted.
    seed:     of a classic adapter.
    """
    N, K = target.shape
    in_nats = options.method == "two_sided"
    report = LayerReport(target.path, N, K, rank, 0, N * K, N * K, 0.0, 0.0, factors.damping)
    if rank == DENSE:
        report.predicted_loss = 0.0 if in_nats else None
        if refitted is not None:
            target.matrix.copy_(refitted)
        return report
    linear, report.lora_rank = target.module, adapter_rank(rank, options.lora_rank)
    layer = SVDLoRALinear.from_product(
        factors.U[:, :rank] if refitted is None else refitted,
        factors.SVh[:rank],
        rank - report.lora_rank,
        report.lora_rank,
        bias=linear.bias,
        dtype=linear.weight.dtype,
        form=options.form,
        init=options.init,
        seed=seed,
    )
    layer.to(linear.weight.device).train(linear.training)
    model.set_submodule(target.path, layer)
    at_start = layer.rank if options.init == "classic" else rank
    report.lost_energy = factors.lost_energy(at_start)
    report.predicted_loss = factors.dropped(at_start) if in_nats else None
    report.parameters = layer.parameter_count()
    report.parameters_as_is = layer.parameter_count(merged=False)
    if options.form == "pivoted" and layer.U.numel():
        report.largest_coefficient = float(layer.U.abs().max())
    return report
