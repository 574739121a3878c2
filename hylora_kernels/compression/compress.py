"""compress(): calibrate, whiten and factorize, allocate ranks, refit, replace."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.factors import factorize_model, open_workspace
from hylora_kernels.compression.ranks import DENSE, adapter_rank, allocate, curve
from hylora_kernels.compression.refit import refit as refit_blocks
from hylora_kernels.compression.replace import build_layer
from hylora_kernels.compression.whiten import METHODS
from hylora_kernels.layers.linear import FORMS, SVDLoRALinear
from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.model.checkpoint import adopt
from hylora_kernels.model.load import load_model, tokenizer_of
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.model.structure import Structure, as_matrix, discover
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.report import Report
from hylora_kernels.support.timing import timed
from hylora_kernels.text.blocks import token_blocks

FACTORIZERS = ("gram", "exact", "randomized")


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


@dataclass(frozen=True)
class Options:
    """The options of compress() that decide its result, checked once."""

    keep: float
    method: str
    ranks: str | dict
    lora_rank: int
    init: str
    form: str
    factorizer: str
    refit: bool
    rank_multiple: int
    count: str
    samples: int
    length: int
    refit_samples: int
    seed: int

    def __post_init__(self):
        for name, allowed in (
            ("method", METHODS),
            ("form", FORMS),
            ("factorizer", FACTORIZERS),
            ("init", ("next", "classic")),
            ("count", ("merged", "as_is")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in (
            ("lora_rank", 0),
            ("rank_multiple", 1),
            ("samples", 1),
            ("length", 2),
            ("refit_samples", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if not isinstance(self.keep, int | float) or isinstance(self.keep, bool):
            raise TypeError(f"keep must be a number, got {type(self.keep).__name__}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")
        if self.refit and self.method == "svd":
            raise ValueError(
                "refit needs method 'two_sided' or 'whitened', got 'svd': set refit=False"
            )


def compress(
    model_or_id: nn.Module | str | Path,
    keep: float = 0.8,
    calibration: Tensor | list[str] | str = "brown",
    method: str = "two_sided",
    ranks: str | dict = "global",
    lora_rank: int = 64,
    init: str = "next",
    form: str = "pivoted",
    factorizer: str = "gram",
    refit: bool | None = None,
    rank_multiple: int = 16,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    count: str = "merged",
    samples: int = 128,
    length: int = 512,
    refit_samples: int = 32,
    max_memory: int | None = None,
    tokenizer=None,
    device=None,
    dtype=None,
    cache: bool | str | Path = True,
    seed: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, CompressReport]:
    """Replace the linears of a causal LM by SVDLoRALinear; in place, the same model in eval(), all
    but the adapters frozen, and a report.

    model_or_id:   a transformers causal LM, or a hub id / local folder to load.
    keep:          the fraction of the selected linears' parameters that stays, adapters included;
                   met from below.
    calibration:   int64 token ids [n, L]; or texts, a file, a data set, of which `samples` blocks
                   of `length` tokens are drawn by `seed`. Not read by method "svd".
    method:        "two_sided" whitening by inputs and output gradients (GFWSVD, arXiv:2505.17974,
                   with a global budget), "whitened" by inputs (SVD-LLM, arXiv:2403.07378), "svd"
                   plain.
    ranks:         "global", "uniform", "energy" or a dict: see compression.ranks.allocate.
    lora_rank:     the adapter's share of each layer's rank; init "next" takes it from the next
                   singular components, "classic" starts it at zero. Layers that stay dense get
                   none.
    form:          "pivoted" (PIFA, arXiv:2501.19090) or "pair".
    refit:         closed-form refit of U against the compressed prefix on the first `refit_samples`
                   blocks; by default for all methods but "svd".
    count:         "merged" budgets for adapters folded in, "as_is" for separate ones.
    max_memory:    bytes that statistics may hold at once; the model is run over the text again for
                   each part that fits.
                   Default: half of what is free.
    cache:         True: finished work is kept in the package's cache and reused; a path: there;
                   False: nowhere.

    Raises ValueError naming the argument (and the smallest feasible keep where the budget can't be
    met), FloatingPointError naming the layer where weights, activations or gradients are not
    finite.
    """
    refit = method != "svd" if refit is None else refit
    options = Options(
        keep, method, ranks, lora_rank, init, form, factorizer, refit, rank_multiple, count,
        samples, length, refit_samples, seed,
    )  # fmt: skip
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model, tokenizer = _model(model_or_id, tokenizer, device, dtype)
        structure = _structure(model, include, exclude)
        # What can't be met is refused before the long work: no budget hangs on the spectra.
        _allocate(model, structure, options, lambda path: torch.ones(min(_shape(model, path))))
        ids = _calibration_ids(calibration, tokenizer, model, options)
        report = _report_before(model, structure, options, ids)
        workspace = open_workspace(model, structure, ids, method, factorizer, seed, cache)
    report.seconds = seconds
    try:
        factorize_model(
            model,
            structure,
            ids,
            method,
            workspace,
            factorizer,
            max_memory,
            seed,
            seconds,
            progress,
        )
        chosen = _allocate(model, structure, options, workspace.singular_values)
        refitted = (
            _refit(model, structure, ids, options, workspace, chosen, seconds, progress)
            if refit
            else {}
        )
        with timed(seconds, "replace"):
            _replace(model, structure, options, workspace, chosen, refitted, report, progress)
    finally:
        workspace.close()
    model.hylora_linears = structure.paths
    adopt(freeze_all_but_adapters(model))
    _report_after(model, report)
    return model.eval(), report


def _model(model_or_id, tokenizer, device, dtype):
    if isinstance(model_or_id, nn.Module):
        model = model_or_id.to(device=device, dtype=dtype)
    else:
        model, found = load_model(model_or_id, device or "auto", dtype or "auto")
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


def _calibration_ids(calibration, tokenizer, model, options: Options) -> Tensor | None:
    if options.method == "svd":
        return None
    if not isinstance(calibration, Tensor):
        tokenizer = tokenizer or tokenizer_of(model)
    ids = token_blocks(
        calibration,
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


def _replace(model, structure, options, workspace, chosen, refitted, report, progress) -> None:
    for index, path in enumerate(
        tqdm(structure.paths, desc="replacing", disable=not progress, leave=False)
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
        asdict(options), 0 if ids is None else ids.numel(), dense, skipped=structure.skipped
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
