"""compress(): calibrate, whiten and factorize, quantise, allocate, refit, replace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression import calibration
from hylora_kernels.compression.bits import BitBudget
from hylora_kernels.compression.budget import Budget
from hylora_kernels.compression.calibration import Statistics
from hylora_kernels.compression.chain import record
from hylora_kernels.compression.embedding import (
    embedding_curve,
    embedding_target,
    factorize_embedding,
    holders,
    replace_embedding,
)
from hylora_kernels.compression.factors import factor_bytes
from hylora_kernels.compression.options import FACTOR_BITS, CompressOptions
from hylora_kernels.compression.ranks import DENSE, Choice, Curve, adapter_rank, allocate, curve
from hylora_kernels.compression.refit import refit_blocks, refit_bytes
from hylora_kernels.compression.replace import replace_linear, replace_table
from hylora_kernels.compression.report import CompressReport, LayerReport
from hylora_kernels.compression.whiten import factorize_whitened
from hylora_kernels.compression.workspace import Refits, open_workspace
from hylora_kernels.layers.experts import own_weights, restack, unstack
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.coverage import (
    body_parameters,
    skipped_parameters,
    warn_if_little,
)
from hylora_kernels.model.load import load_model, tokenizer_of
from hylora_kernels.model.loss import mean_loss
from hylora_kernels.model.modules import freeze_all_but_adapters, keep_unscaled
from hylora_kernels.model.saving import refuse_unsavable, save_in_hylora_format
from hylora_kernels.model.structure import Target, discover
from hylora_kernels.support.devices import resolve_device, resolve_dtype
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.options import reported_options, takes_options
from hylora_kernels.support.storage import require_disk
from hylora_kernels.support.timing import timed
from hylora_kernels.text.mix import Part, mixed_blocks
from hylora_kernels.text.sources import texts_in
from hylora_kernels.weights import QuantizedMatrix


@takes_options(CompressOptions)
def compress(
    model_or_id: nn.Module | str | Path, options: CompressOptions
) -> tuple[nn.Module, CompressReport]:
    """Replace the linears of a causal language model by SVDLoRALinear, in place, and their matrices
    by codes of few bits where `bits` says so.

    model_or_id: a transformers causal LM, or a hub id or folder to load.

    Returns the same model, in eval() with all but the adapters frozen, and a report. Raises
    ValueError naming the argument (and the smallest feasible keep where the budget can't be met),
    FloatingPointError naming the layer whose weights, activations or gradients are not finite.
    CompressOptions gives the sources of the methods.

        model, report = compress(model, keep=0.8, calibration="brown")
        model, report = compress(model, target_mb=80, bits="auto")
    """
    with Compression(model_or_id, options) as run:
        for statistics in run.calibrate():
            run.factorize(statistics)
            run.quantize(statistics)
        choices = run.allocate()
        refitted = run.refit(choices)
        run.replace(choices, refitted)
    return run.model, run.report


class Compression:
    """One compression of one model, step by step, in a `with` that closes its workspace.

    The constructor loads the model and checks everything, before the long work; it raises what
    compress() raises. Until replace() the model is not changed, except that it is in eval() and on
    the device and in the dtype of the options. Factors and refitted blocks are stored in the
    workspace, from which an interrupted run and one with other options read them.
    """

    def __init__(self, model_or_id: nn.Module | str | Path, options: CompressOptions):
        self.options = options
        seconds: dict[str, float] = {}
        with contextlib.ExitStack() as undo, timed(seconds, "load"):
            self.model, self.tokenizer = _load(model_or_id, options)
            keep_unscaled(self.model)
            # Now, not after hours of work.
            refuse_unsavable(self.model, warn_if_modified=isinstance(model_or_id, nn.Module))
            stacks, reasons = unstack(self.model)
            undo.callback(restack, self.model, stacks)
            self.structure = discover(
                self.model, options.include, options.exclude, low_rank_too=not options.low_rank
            )
            self.structure.skipped.update(reasons)
            if not self.structure.groups:
                raise ValueError(
                    "model has no linear that can be compressed; left alone:"
                    f" {self.structure.skipped}"
                )
            wanted = options.embedding_rank is not None
            self.embedding = embedding_target(self.model) if wanted else None
            self.targets = [*self.structure.targets, *([self.embedding] if self.embedding else [])]
            self.bits = None
            if options.bits is not None:
                self.bits = BitBudget(self.model, self.structure, options)
            self.budget = Budget(self.model, self.targets, options.form)
            # Fail early: feasibility depends on costs only, so any singular values will do here.
            any_values = {t: torch.ones(min(t.shape), device="cpu") for t in self.targets}
            self.keep = 1.0
            if not options.chooses_bits:
                self.keep = self.budget.keep(options, partial(self._ranks, any_values))
            self.ids: Tensor | None = None
            sources: list[Part] = []
            if options.method != "svd":
                self.ids, sources = self._text()
            if options.refit:  # A chain that can't be run is refused before the long work, too.
                assert self.ids is not None, "a refit reads text"
                record(self.model, self.structure.blocks, self.ids[:2, :64])
            self.workspace = open_workspace(self.model, self.structure, self.ids, options)
            self.codes = self.workspace.codes(options.rounding)
            self._undo, self._stacks = undo.pop_all(), stacks
        self.report = CompressReport(
            options=reported_options(options)
            | ({} if options.chooses_bits else {"keep": self.keep}),
            calibration_tokens=0 if self.ids is None else self.ids.numel(),
            dense_parameters=self.budget.linears,
            model_dense_parameters=sum(p.numel() for p in self.model.parameters()),
            body_parameters=body_parameters(self.model),
            skipped=skipped_parameters(self.model, self._selected(), self.structure.skipped),
            seconds=seconds,
            sources=sources,
        )
        warn_if_little(
            self.report.dense_parameters, self.report.body_parameters, self.report.skipped
        )

    def __enter__(self) -> Compression:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._undo.close()
        self.workspace.close()

    def calibrate(self) -> Iterator[Statistics]:
        """Yield the statistics of the groups without factors or codes in the workspace, one pass
        over the text at a time, as many as max_memory requires. They are freed before the next
        pass."""
        options = self.options
        missing = [g for g in self.structure.groups if not all(map(self._is_done, g.targets))]
        self._factorize_embedding()
        if self.bits is not None:
            self.bits.require_disk(self.codes)
            with timed(self.report.seconds, "quantise"):
                self.bits.quantize_tables(self.ids, self.codes, options.progress)
        if not missing:
            return
        targets = [target for group in missing for target in group.targets]
        needed = sum(factor_bytes(target.shape) for target in targets) if options.low_rank else 0
        if options.refit:  # What is refitted is a part of what is kept, in float32.
            needed += int(4 * self.keep * self.report.dense_parameters)
        require_disk(self.workspace.folder, needed, "factors")
        _require_finite(self.model)
        if options.method == "svd":
            yield Statistics(missing)
            return
        assert self.ids is not None, "every method but svd reads text"
        with_gradients = options.method == "two_sided"
        memory = options.max_memory or _free_memory(self.model) // 2
        runs = calibration.passes(missing, with_gradients, memory)
        for index, groups in enumerate(runs, 1):
            label = "calibrating" + (f", pass {index} of {len(runs)}" if len(runs) > 1 else "")
            with timed(self.report.seconds, "calibrate"):
                statistics = calibration.gather(
                    self.model, self.ids, groups, with_gradients, options.progress, label
                )
            yield statistics
            statistics.clear()  # The caller's loop variable would keep them during the next pass.

    def _is_done(self, target: Target) -> bool:
        """True if the workspace has all that a pass makes of a linear."""
        is_cut = not self.options.low_rank or self.workspace.has(target.path)
        return is_cut and not (self.bits and self.bits.missing(target, self.codes))

    def factorize(self, statistics: Statistics) -> None:
        """Whiten and factorize the linears of `statistics`; the workspace gets their Factors.
        Without low_rank there is nothing to do."""
        options = self.options
        if not options.low_rank:
            return
        linears = [
            (group.leader, target)
            for group in statistics.groups
            for target in group.targets
            if not self.workspace.has(target.path)
        ]
        hidden = not options.progress
        with timed(self.report.seconds, "factorize"):
            for leader, target in tqdm(
                linears, desc="factorizing", unit="layer", disable=hidden, leave=False
            ):
                factors = factorize_whitened(
                    target.path,
                    target.matrix,
                    statistics.inputs.get(leader.path),
                    statistics.gradients.get(target.path),
                    options.factorizer,
                    options.seed,
                )
                factors.S.mul_(statistics.nats(leader.path) ** 0.5)
                self.workspace.save(target.path, factors)

    def quantize(self, statistics: Statistics) -> None:
        """Quantise the linears of `statistics` in the widths that the budget may choose; the
        workspace gets their codes."""
        if self.bits is not None and self.options.widths:
            with timed(self.report.seconds, "quantise"):
                self.bits.quantize(statistics, self.codes, self.options.progress)

    def _factorize_embedding(self) -> None:
        target, o = self.embedding, self.options
        if target is None or self.workspace.has(target.path):
            return
        require_disk(self.workspace.folder, factor_bytes(target.shape), "the embedding's factors")
        with timed(self.report.seconds, "calibrate"):
            factors = factorize_embedding(self.model, target, self.ids, o.method, o.progress)
        self.workspace.save(target.path, factors)

    def singular_values(self, target: Target) -> Tensor:
        """S float32 [min(N, K)] of a factorized linear, in the whitened norm, falling."""
        return self.workspace.singular_values(target.path)

    @cached_property
    def curves(self) -> list[Curve]:
        """The candidates of every matrix, once all are factorized and quantised."""
        ranks = self._curves(self._importance()) if self.options.low_rank else []
        if self.bits is None or not self.options.chooses_bits:
            return ranks
        errors, unreached = self.bits.errors(self.codes)
        self.report.unreached = list(dict.fromkeys([*self.report.unreached, *unreached]))
        return self.bits.curves(errors, {c.path: c for c in ranks})

    def allocate(self, keep: float | None = None) -> dict[str, Choice]:
        """path -> the total rank R = r + ra of each matrix, 0 for one left dense, and its bits.

        keep: None: that of the options. Where bits are chosen there is none.
        """
        if self.bits is not None and self.options.chooses_bits:
            return self.bits.allocate(self.curves)
        ranks = allocate(self.curves, self.keep if keep is None else keep, self.options.ranks)
        if self.bits is None:
            return {path: Choice(rank) for path, rank in ranks.items()}
        return {p: Choice(rank, FACTOR_BITS) for p, rank in ranks.items()} | self.bits.fixed()

    def refit(self, choices: dict[str, Choice]) -> dict[str, Tensor]:
        """path -> refitted U float32 [N, R], or weight [N, K] of a linear left dense; {} with
        refit=False."""
        options, blocks = self.options, self.structure.blocks
        if not options.refit:
            return {}
        ids, ranks, store = self._refits(choices)
        found = {block.path: store.find(block.path) for block in blocks}
        done = {path: matrices for path, matrices in found.items() if matrices is not None}
        with timed(self.report.seconds, "refit"):
            if len(done) < len(blocks):
                missing = (b for b in blocks if b.path not in done)
                require_disk(self.workspace.folder, refit_bytes(missing, ranks), "refitted blocks")
                load = self.workspace.load
                for block, matrices in refit_blocks(
                    self.model, blocks, ids, load, ranks, done, options.progress
                ):
                    if block not in done:
                        store.save(block, matrices)
                        done[block] = store.load(block)
        return {path: matrix for matrices in done.values() for path, matrix in matrices.items()}

    def forget_refit(self, choices: dict[str, Choice]) -> None:
        """Delete the refitted matrices of these ranks from the workspace."""
        if self.options.refit:
            self._refits(choices)[2].clear()

    def _refits(self, choices: dict[str, Choice]) -> tuple[Tensor, dict[str, int], Refits]:
        """(token ids of the refit, the ranks that are refitted, their files)."""
        assert self.ids is not None, "a refit reads text"
        o = self.options
        ids = self.ids[: o.refit_samples]
        ranks = {target.path: choices[target.path].rank for target in self.targets}
        if o.init == "classic":  # The adapter's part of the rank starts at zero.
            ranks = {p: R and R - adapter_rank(R, o.lora_rank) for p, R in ranks.items()}
        return ids, ranks, self.workspace.refits(fingerprint(ids=ids, ranks=ranks))

    def replace(self, choices: dict[str, Choice], refitted: dict[str, Tensor]) -> None:
        """Put the chosen layers into the model, freeze all but the adapters, end the report."""
        model = self.model
        self.report.dense_loss = self._measured_loss("dense")
        with timed(self.report.seconds, "replace"):
            self.report.layers, self.report.tables = self._put(choices, refitted)
        self._undo.pop_all()
        _settle_experts(model, self._stacks, self.structure.paths)
        earlier = getattr(model, "hylora_linears", None) or []  # Of another part.
        vars(model)["hylora_linears"] = list(dict.fromkeys([*earlier, *self.structure.paths]))
        save_in_hylora_format(freeze_all_but_adapters(model))
        self.report.count(model)
        self.report.model_dense_bytes = self.budget.dense.bytes
        self.report.model_bytes = self._bytes(choices)
        self.report.loss = self._measured_loss("compressed")

    def _measured_loss(self, label: str) -> float | None:
        """The model's loss on the end of the text, which the refit has not read unless it read all;
        None without text, or with measure=0."""
        if self.ids is None or not self.options.measure:
            return None
        ids = self.ids[-self.options.measure :]
        self.report.measured_blocks = len(ids)
        with timed(self.report.seconds, "measure"):
            return mean_loss(self.model, ids, self.options.progress, f"loss, {label}")

    def _bytes(self, choices: dict[str, Choice]) -> int:
        """Of the file of weights, adapters as the option `count` says."""
        if self.bits is None:
            return self.budget.size(self.curves, choices).bytes
        return self.bits.total(choices)

    @contextlib.contextmanager
    def trial(self, choices: dict[str, Choice], refitted: dict[str, Tensor]) -> Iterator[nn.Module]:
        """The model with its chosen layers; after the block it has its own linears again.

        Memory: the dense linears stay beside the low-rank ones, so 1 + keep times the linears.
        """
        vocabulary = self._vocabulary_modules()
        dense = {  # Of a refitted linear that stays dense the weight is written.
            target.path: target.matrix.clone()
            for target in self.structure.targets
            if choices[target.path].rank == DENSE and target.path in refitted
        }
        try:
            self._put(choices, refitted)
            yield self.model
        finally:
            for target in self.structure.targets:
                if target.path in dense:
                    target.matrix.copy_(dense[target.path])
                self.model.set_submodule(target.path, target.module)
            for path, module in vocabulary.items():
                self.model.set_submodule(path, module)

    @torch.no_grad()
    def _put(
        self, choices: dict[str, Choice], refitted: dict[str, Tensor]
    ) -> tuple[list[LayerReport], list[LayerReport]]:
        """Put the chosen layers into the model -> CompressReport.layers, .tables."""
        targets, hidden = self.structure.targets, not self.options.progress
        bar = tqdm(targets, desc="replacing", disable=hidden, leave=False)
        reports = [
            replace_linear(
                self.model,
                target,
                self.workspace.load(target.path) if self.options.low_rank else None,
                choices[target.path],
                refitted.get(target.path),
                self._codes_of(target, choices[target.path]),
                self.options,
                self.options.seed + index,
            )
            for index, target in enumerate(bar)
        ]
        method = self.options.method
        if (target := self.embedding) is not None:
            factors, rank = self.workspace.load(target.path), choices[target.path].rank
            reports.append(replace_embedding(self.model, target, factors, rank, method))
        tables = []
        if self.bits is not None:
            for target in self.bits.tables:
                choice, in_nats = choices[target.path], method == "two_sided"
                codes = self._codes_of(target, choice)
                tables.append(replace_table(self.model, target, choice, codes, in_nats))
            self.bits.explain([*reports, *tables], self.curves, self.codes)
        return reports, tables

    def _codes_of(self, target: Target, choice: Choice) -> QuantizedMatrix | None:
        """The codes of a matrix in the workspace, None for one that gets others or none."""
        if self.bits is None or choice.rank or choice.bits not in self.bits.widths(target):
            return None
        return self.codes.matrix(target.path, choice.bits)

    def _vocabulary_modules(self) -> dict[str, nn.Module]:
        """path -> the dense embedding and output head that are replaced."""
        tables = self.bits.tables if self.bits else []
        targets = [*([self.embedding] if self.embedding else []), *tables]
        paths = [path for t in targets for path in holders(self.model, t.module.weight)]
        return {path: self.model.get_submodule(path) for path in paths}

    def _selected(self) -> list[str]:
        return [*self.structure.paths, *self._vocabulary_modules()]

    def _importance(self) -> dict[Target, Tensor]:
        """The singular values that ranks are chosen by. Calibration says nothing of an expert that
        no token reached: it gets those of the least of its siblings, and so about its rank."""
        found = {target: self.singular_values(target) for target in self.targets}
        if self.options.method == "svd":
            return found
        siblings: dict[str, list[Target]] = {}
        for target in found:
            if target.routed:
                siblings.setdefault(target.path.rpartition(".")[0], []).append(target)
        for targets in siblings.values():
            unreached = [t for t in targets if not self.workspace.reached(t.path)]
            reached = [found[t] for t in targets if t not in unreached]
            for target in unreached if reached else ():
                found[target] = min(reached, key=torch.linalg.vector_norm)
            self.report.unreached += [target.path for target in unreached]
        return found

    def _ranks(self, singular_values: dict[Target, Tensor], keep: float) -> dict[str, int]:
        return allocate(self._curves(singular_values), keep, self.options.ranks)

    def _curves(self, singular_values: dict[Target, Tensor]) -> list[Curve]:
        o = self.options
        shared = o.form, o.rank_multiple, o.lora_rank, o.count
        return [
            embedding_curve(t, S, o.embedding_rank, o.rank_multiple)
            if t is self.embedding
            else curve(t.path, t.shape, S, *shared)
            for t, S in singular_values.items()
        ]

    def _text(self) -> tuple[Tensor, list[Part]]:
        o = self.options
        read = not all(isinstance(text, Tensor) for text in texts_in(o.calibration))
        if read and self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.model)
        ids, parts = mixed_blocks(
            o.calibration,
            self.model,
            self.tokenizer,
            o.length,
            split=o.split,
            seed=o.seed,
            progress=o.progress,
            column=o.column,
            blocks=o.samples,
        )
        check_blocks(self.model, ids)
        return ids, parts


def _load(model_or_id: nn.Module | str | Path, options: CompressOptions) -> tuple[nn.Module, Any]:
    """(the model in eval(), its tokenizer or None)."""
    if not isinstance(model_or_id, str | Path):
        check_model(model_or_id, "replace", "model_or_id")
        device = None if options.device is None else resolve_device(options.device)
        model = model_or_id.to(device=device, dtype=resolve_dtype(options.dtype))
        return model.eval(), options.tokenizer
    model, tokenizer = load_model(
        model_or_id,
        options.device or "auto",
        options.dtype or "auto",
        trust_remote_code=options.trust_remote_code,
    )
    check_model(model, "replace", "model_or_id")
    return model.eval(), options.tokenizer or tokenizer


def _settle_experts(model: nn.Module, stacks: dict[str, nn.Module], selected: list[str]) -> None:
    """Put back the stacks of which nothing is selected; the others' weights leave their stack."""
    for path, stock in stacks.items():
        if any(target.startswith(f"{path}.") for target in selected):
            own_weights(model.get_submodule(path))
        else:
            model.set_submodule(path, stock)


def _require_finite(model: nn.Module) -> None:
    # All parameters, before the text is read: a bad one would be blamed on a later layer.
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            path, _, kind = name.rpartition(".")
            raise FloatingPointError(f"layer {path}: its {kind} is not finite")


def _free_memory(model: nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
