"""compress(): calibrate, whiten and factorize, allocate ranks, refit, replace."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.factors import factorize_model, open_workspace
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.ranks import DENSE, adapter_rank, allocate, curve
from hylora_kernels.compression.refit import refit as refit_blocks
from hylora_kernels.compression.replace import build_layer
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.model.checkpoint import adopt
from hylora_kernels.model.load import load_model, tokenizer_of
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.model.structure import Structure, as_matrix, discover
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.options import reported_options, takes_options
from hylora_kernels.support.report import Report
from hylora_kernels.support.timing import timed
from hylora_kernels.text.blocks import token_blocks


@dataclass
class LayerReport:
    """One layer: N, K, total rank R = r + ra (0: left dense), its parameters, and what the ranks
    dropped.

    lost_energy: the share of sum S^2 dropped. largest_coefficient: of the pivoted form's U, 0
                 elsewhere. damping: shares
    of the mean diagonal added to the Gram matrices of inputs and gradients.
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
    """What compress() did. Parameters count the selected linears without biases; keep and removed
    are of those.

    `parameters` counts adapters merged (as deployed), `parameters_as_is` as held now; model_* count
    the whole model.
    peak_rss: the process's largest resident memory so far, bytes. seconds by stage.
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
    model_parameters: int = 0
    model_parameters_as_is: int = 0
    model_keep: float = 1.0
    model_removed: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss: int = 0


@takes_options(CompressOptions)
def compress(
    model_or_id: nn.Module | str | Path, options: CompressOptions
) -> tuple[nn.Module, CompressReport]:
    """Replace the linears of a causal LM by SVDLoRALinear; in place, the same model in eval(), all
    but the adapters frozen, and a report.

    model_or_id: a transformers causal LM, or a hub id / local folder to load.

    Raises ValueError naming the argument (and the smallest feasible keep where the budget can't be
    met), FloatingPointError naming the layer where weights, activations or gradients are not
    finite.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model, tokenizer = _model(model_or_id, options)
        structure = _structure(model, options.include, options.exclude)
        # What can't be met is refused before the long work: no budget hangs on the spectra.
        _allocate(model, structure, options, lambda path: torch.ones(min(_shape(model, path))))
        ids = _calibration_ids(tokenizer, model, options)
        report = _report_before(model, structure, options, ids)
        workspace = open_workspace(
            model, structure, ids, options.method, options.factorizer, options.seed, options.cache
        )
    report.seconds = seconds
    try:
        factorize_model(
            model,
            structure,
            ids,
            options.method,
            workspace,
            options.factorizer,
            options.max_memory,
            options.seed,
            seconds,
            options.progress,
        )
        chosen = _allocate(model, structure, options, workspace.singular_values)
        refitted = (
            _refit(model, structure, ids, options, workspace, chosen, seconds, options.progress)
            if options.refit
            else {}
        )
        with timed(seconds, "replace"):
            _replace(model, structure, options, workspace, chosen, refitted, report)
    finally:
        workspace.close()
    model.hylora_linears = structure.paths
    adopt(freeze_all_but_adapters(model))
    _report_after(model, report)
    return model.eval(), report


def _model(model_or_id, options: CompressOptions):
    tokenizer = options.tokenizer
    if isinstance(model_or_id, nn.Module):
        model = model_or_id.to(device=options.device, dtype=options.dtype)
    else:
        model, found = load_model(model_or_id, options.device or "auto", options.dtype or "auto")
        tokenizer = tokenizer or found
    return model.eval(), tokenizer


def _structure(model, include, exclude) -> Structure:
    refuse_packed(model)
    structure = discover(model, include, exclude)
    if not structure.groups:
        raise ValueError(
            f"model has no linear that can be compressed; left alone: {structure.skipped}"
        )
    for path in structure.paths:
        if isinstance(model.get_submodule(path), SVDLoRALinear):
            raise ValueError(
                f"model must be dense, but its layer {path} has been compressed already"
            )
    return structure


def _calibration_ids(tokenizer, model, options: CompressOptions) -> Tensor | None:
    if options.method == "svd":
        return None
    if not isinstance(options.calibration, Tensor):
        tokenizer = tokenizer or tokenizer_of(model)
    ids = token_blocks(
        options.calibration,
        tokenizer,
        options.length,
        split="train",
        limit=options.samples,
        seed=options.seed,
    )
    words, most = model.get_input_embeddings().num_embeddings, int(ids.max())
    if most >= words:
        raise ValueError(f"calibration must be token ids below {words}, the model's, got {most}")
    return ids


def _shape(model, path) -> tuple[int, int]:
    return tuple(as_matrix(model.get_submodule(path)).shape)


def _allocate(model, structure, options, singular_values) -> dict[str, int]:
    curves = [
        curve(
            path,
            _shape(model, path),
            singular_values(path),
            options.form,
            options.rank_multiple,
            options.lora_rank,
            options.count,
        )
        for path in structure.paths
    ]
    return allocate(curves, options.keep, options.ranks)


def _refit(
    model, structure, ids, options, workspace, chosen, seconds, progress
) -> dict[str, Tensor]:
    """path -> refitted U, or the refitted weight of a layer left dense."""
    few = ids[: options.refit_samples]
    if options.init == "classic":  # what the adapter takes of the rank starts at zero
        chosen = {
            path: rank and rank - adapter_rank(rank, options.lora_rank)
            for path, rank in chosen.items()
        }
    store = workspace.refits(fingerprint(ids=few, ranks=chosen))
    done = store.load()
    with timed(seconds, "refit"):
        if len(done) < len(structure.blocks):
            for block, matrices in refit_blocks(
                model, structure, few, workspace.load, chosen, done, progress
            ):
                if block not in done:
                    store.save(block, matrices)
            done = store.load()
    return {path: matrix for matrices in done.values() for path, matrix in matrices.items()}


def _replace(model, structure, options, workspace, chosen, refitted, report) -> None:
    for index, path in enumerate(
        tqdm(structure.paths, desc="replacing", disable=not options.progress, leave=False)
    ):
        linear, total = model.get_submodule(path), chosen[path]
        N, K = as_matrix(linear).shape
        factors = workspace.load(path)
        layer = LayerReport(path, N, K, total, 0, N * K, N * K, 0.0, 0.0, factors.damping)
        if total == DENSE:
            if path in refitted:
                with torch.no_grad():
                    as_matrix(linear).copy_(refitted[path])
        else:
            layer.lora_rank = adapter_rank(total, options.lora_rank)
            new = build_layer(
                linear, factors, total - layer.lora_rank, layer.lora_rank, U=refitted.get(path),
                form=options.form, init=options.init, seed=options.seed + index,
            )  # fmt: skip
            model.set_submodule(path, new)
            kept = new.rank if options.init == "classic" else total
            squares = factors.S.double() ** 2
            layer.lost_energy = float(squares[kept:].sum() / squares.sum().clamp_min(1e-300))
            layer.parameters, layer.parameters_as_is = (
                new.parameter_count(),
                new.parameter_count(merged=False),
            )
            if options.form == "pivoted" and new.U.numel():
                layer.largest_coefficient = float(new.U.abs().max())
        report.layers.append(layer)


def _report_before(model, structure, options, ids) -> CompressReport:
    dense = sum(as_matrix(model.get_submodule(path)).numel() for path in structure.paths)
    report = CompressReport(
        reported_options(options),
        0 if ids is None else ids.numel(),
        dense,
        skipped=structure.skipped,
    )
    report.model_dense_parameters = sum(p.numel() for p in model.parameters())
    return report


def _report_after(model, report: CompressReport) -> None:
    report.parameters = sum(layer.parameters for layer in report.layers)
    report.parameters_as_is = sum(layer.parameters_as_is for layer in report.layers)
    report.keep = report.parameters / report.dense_parameters
    report.keep_as_is = report.parameters_as_is / report.dense_parameters
    report.model_parameters_as_is = sum(p.numel() for p in model.parameters())
    report.model_parameters = (
        report.model_parameters_as_is - report.parameters_as_is + report.parameters
    )
    report.model_keep = report.model_parameters / report.model_dense_parameters
    report.removed, report.model_removed = 1 - report.keep, 1 - report.model_keep
    # Linux counts kilobytes, macOS bytes.
    report.peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
