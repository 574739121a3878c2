"""compress(): calibrate, whiten and factorize, quantise, allocate, refit, replace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.bit_candidates import TABLE_BLOCKS, BitCandidates
from hylora_kernels.compression.bits import BitBudget
from hylora_kernels.compression.budget import Budget
from hylora_kernels.compression.by_block import gather_by_block, without_text
from hylora_kernels.compression.calibration import Statistics, gather_in_passes
from hylora_kernels.compression.chain import record
from hylora_kernels.compression.embedding import embedding_target, holders, replace_embedding
from hylora_kernels.compression.factors import factor_bytes
from hylora_kernels.compression.inputs import calibration_blocks, load_model_and_tokenizer
from hylora_kernels.compression.options import AS_IS, FACTOR_BITS, CompressOptions
from hylora_kernels.compression.rank_candidates import RankCandidates, rank_curves
from hylora_kernels.compression.ranks import DENSE, Choice, Curve, adapter_rank, allocate
from hylora_kernels.compression.refit import refit_blocks, refit_bytes
from hylora_kernels.compression.replace import replace_linear, replace_table
from hylora_kernels.compression.report import CompressReport, LayerReport
from hylora_kernels.compression.tokens import TokenSums, TokenWork, token_statistics
from hylora_kernels.compression.workspace import Refits, Refitted, open_workspace
from hylora_kernels.layers.experts import restack, settle, unstack
from hylora_kernels.model.by_block import hold, is_by_block
from hylora_kernels.model.check import require_finite
from hylora_kernels.model.coverage import (
    body_parameters,
    skipped_parameters,
    warn_if_little,
)
from hylora_kernels.model.loss import mean_loss
from hylora_kernels.model.modules import freeze_all_but_adapters, keep_unscaled
from hylora_kernels.model.saving import refuse_unsavable, save_in_hylora_format
from hylora_kernels.model.structure import Target, discover
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.options import reported_options, takes_options
from hylora_kernels.support.processes import (
    ALONE,
    Processes,
    free_memory_of_each,
    together,
)
from hylora_kernels.support.storage import require_disk
from hylora_kernels.support.timing import timed, timed_steps


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

    Under torchrun, or in an initialised process group, all processes make this call, with the same
    model: each reads its share of the text and factorizes its share of the layers, and all end with
    the same compressed model. Of a lost process LostProcess names the rank.

    Example:
        model, report = compress(
            "my-org/my-model", keep=0.8, calibration="my.txt", samples=8, length=64
        )
        report.keep, report.layers[0].rank
    """
    if isinstance(model_or_id, nn.Module) and is_by_block(model_or_id):
        raise ValueError(
            "model_or_id must be in memory, but its blocks are in files: compress_to_folder() takes"
            " it"
        )
    with together() as processes, Compression(model_or_id, options, processes) as run:
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

    processes: share the work; each has a Compression of the same model and options.
    """

    def __init__(
        self,
        model_or_id: nn.Module | str | Path,
        options: CompressOptions,
        processes: Processes = ALONE,
    ):
        if processes.size > 1 and options.target_time is not None:
            raise ValueError(
                "target_time is a share of the time that one process takes with all threads:"
                " run it without torchrun"
            )
        if not processes.is_first:
            options = replace(options, progress=False)
        self.options, self.processes = options, processes
        seconds: dict[str, float] = {}
        with contextlib.ExitStack() as undo, timed(seconds, "load"):
            self.model, self.tokenizer = load_model_and_tokenizer(model_or_id, options)
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
            # Feasibility depends on costs only, so any singular values do here.
            any_values = {t: torch.ones(min(t.shape), device="cpu") for t in self.targets}
            ranks = rank_curves(any_values, self.embedding, options) if options.low_rank else []
            self.bits = BitBudget(self.model, self.structure, options, ranks)
            self.budget = Budget(self.model, self.targets, options.form)
            self.keep = 1.0
            if not options.is_priced:
                self.keep = self.budget.keep(options, lambda k: allocate(ranks, k, options.ranks))
            self.ids, sources, self.tokenizer = calibration_blocks(
                self.model, self.tokenizer, options, processes
            )
            if options.refit:  # A chain that can't be run is refused before the long work, too.
                assert self.ids is not None, "a refit reads text"
                record(self.model, self.structure.blocks, self.ids[:2, :64])
            self.workspace = open_workspace(
                self.model, self.structure, self.ids, options, processes
            )
            self.rank_candidates = RankCandidates(
                *(self.model, self.structure.targets, self.embedding, self.workspace),
                options,
                processes,
            )
            codes = self.workspace.codes(options.rounding)
            self.bit_candidates = BitCandidates(self.model, self.bits, codes, options, processes)
            self._undo, self._stacks = undo.pop_all(), stacks
        selected = [*self.structure.paths, *self._vocabulary_modules()]
        self.report = CompressReport(
            options=reported_options(options) | ({} if options.is_priced else {"keep": self.keep}),
            calibration_tokens=0 if self.ids is None else self.ids.numel(),
            dense_parameters=self.budget.linears,
            model_dense_parameters=sum(p.numel() for p in self.model.parameters()),
            body_parameters=body_parameters(self.model),
            skipped=skipped_parameters(self.model, selected, self.structure.skipped),
            seconds=seconds,
            sources=sources,
        )
        warn_if_little(
            self.report.dense_parameters, self.report.body_parameters, self.report.skipped
        )

    def __enter__(self) -> Compression:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        self._undo.close()
        if kind is None:
            self.processes.wait("replacing")  # Others may still read the workspace.
        self.workspace.close()

    def calibrate(self) -> Iterator[Statistics]:
        """Yield the statistics of the groups without factors or codes in the workspace, one pass
        over the text at a time, as many as max_memory requires, or, of a model whose blocks are in
        files, one block, which is in memory meanwhile. They are freed before the next ones. What
        embedding and output head lack is made from the first pass, if it has gradients."""
        options = self.options
        if options.bits is not None:
            self.bit_candidates.require_disk()
        wanted = self.processes.agreed(
            {
                group.leader.path
                for group in self.structure.groups
                if self.rank_candidates.missing(group.targets)
                or any(map(self.bit_candidates.missing, group.targets))
            }
        )
        missing = [group for group in self.structure.groups if group.leader.path in wanted]
        token_work = self._token_work()
        if not missing or options.method != "two_sided":
            for work in token_work:
                self._read_tokens(work)
            token_work = []
        if not missing:
            return
        targets = [target for group in missing for target in group.targets]
        needed = sum(factor_bytes(target.shape) for target in targets) if options.low_rank else 0
        if options.refit:  # What is refitted is a part of what is kept, in float32.
            needed += int(4 * self.keep * self.report.dense_parameters)
        require_disk(self.workspace.folder, needed, "factors")
        require_finite(self.model)
        if options.method == "svd":
            yield from without_text(self.structure, missing)
            return
        assert self.ids is not None, "every method but svd reads text"
        with_gradients = options.method == "two_sided"
        memory = options.max_memory or free_memory_of_each(self.model, self.processes) // 2
        sums = [TokenSums(self.model, work.step) for work in token_work]
        how = (missing, with_gradients, memory, options.progress, sums, self.processes)
        if is_by_block(self.model):
            states = self.workspace.states()
            runs = gather_by_block(self.model, self.structure, self.ids, states, *how)
        else:
            runs = gather_in_passes(self.model, self.ids, *how)
        for statistics in timed_steps(self.report.seconds, "calibrate", runs):
            yield statistics
            statistics.clear()  # The caller's loop variable would keep them during what follows.
        for work, found in zip(token_work, sums, strict=True):
            with timed(self.report.seconds, work.stage):
                work.use(found.finish())

    def _token_work(self) -> list[TokenWork]:
        """The embedding's factors and the tables' codes, where they are not in the workspace."""
        work, embedding = [], self.embedding
        no_factors, no_codes = self.processes.agreed(
            (
                embedding is not None and bool(self.rank_candidates.missing([embedding])),
                any(map(self.bit_candidates.missing, self.bits.tables)),
            )
        )
        if embedding is not None and no_factors:
            use = partial(self.rank_candidates.factorize_embedding, embedding)
            work.append(TokenWork(1, "factorize", use))
        if no_codes:
            step = 1 if self.ids is None else -(-len(self.ids) // TABLE_BLOCKS)
            work.append(TokenWork(step, "quantise", self.bit_candidates.quantize_tables))
        return work

    def _read_tokens(self, work: TokenWork) -> None:
        """Do it by a pass over the text of its own."""
        statistics, seconds = None, self.report.seconds
        if self.ids is not None:
            with timed(seconds, "calibrate"):
                ids = self.ids[:: work.step]
                statistics = token_statistics(
                    self.model, ids, self.options.progress, self.processes
                )
        with timed(seconds, work.stage):
            work.use(statistics)

    def factorize(self, statistics: Statistics) -> None:
        """Whiten and factorize the linears of `statistics`; the workspace gets their Factors.
        Without low_rank there is nothing to do."""
        if self.options.low_rank:
            with timed(self.report.seconds, "factorize"):
                self.rank_candidates.factorize(statistics)

    def quantize(self, statistics: Statistics) -> None:
        """Quantise the linears of `statistics` in the widths that the budget may choose; the
        workspace gets their codes."""
        if self.options.widths:
            with timed(self.report.seconds, "quantise"):
                self.bit_candidates.quantize(statistics)

    @cached_property
    def curves(self) -> list[Curve]:
        """The candidates of every matrix, once all are factorized and quantised."""
        curves, unreached = self.rank_candidates.curves()
        if self.options.is_priced:
            errors, others = self.bit_candidates.errors()
            curves = self.bits.curves(errors, {c.path: c for c in curves})
            unreached = list(dict.fromkeys([*unreached, *others]))
        self.report.unreached = unreached
        return curves

    def allocate(self, keep: float | None = None) -> dict[str, Choice]:
        """path -> the total rank R = r + ra of each matrix, 0 for one left dense, and its bits.

        keep: None: that of the options. Where candidates have a price there is none.
        """
        return self.processes.agreed(self._allocated(keep), "allocating")

    def _allocated(self, keep: float | None) -> dict[str, Choice]:
        if self.options.is_priced:
            return self.bits.allocate(self.curves)
        ranks = allocate(self.curves, self.keep if keep is None else keep, self.options.ranks)
        bits = AS_IS if self.options.bits is None else FACTOR_BITS
        return {path: Choice(rank, bits) for path, rank in ranks.items()} | self.bits.fixed()

    def refit(self, choices: dict[str, Choice]) -> Mapping[str, Tensor]:
        """path -> refitted U float32 [N, R], or weight [N, K] of a linear left dense; {} with
        refit=False. They are read from the workspace when they are asked for."""
        options, blocks = self.options, self.structure.blocks
        if not options.refit:
            return {}
        ids, ranks, store = self._refits(choices)
        with timed(self.report.seconds, "refit"):
            missing = self.processes.agreed(
                {block.path for block in blocks if store.find(block.path) is None}
            )
            if missing:
                needed = refit_bytes((b for b in blocks if b.path in missing), ranks)
                require_disk(self.workspace.folder, needed, "refitted blocks")

                def done(path: str) -> dict[str, Tensor] | None:
                    return None if path in missing else store.load(path)

                # With fewer sequences than processes all run all of them.
                processes = self.processes if len(ids) >= self.processes.size else ALONE
                load = self.workspace.load
                for block, matrices in refit_blocks(
                    self.model, blocks, ids, load, ranks, done, options.progress, processes
                ):
                    if block in missing and self.processes.is_first:
                        store.save(block, matrices)
            self.processes.see((store.path(path) for path in missing), "refitting")
        return Refitted(store, blocks)

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

    def replace(
        self,
        choices: dict[str, Choice],
        refitted: Mapping[str, Tensor],
        write: Callable[[str], None] | None = None,
    ) -> None:
        """Put the chosen layers into the model, freeze all but the adapters, end the report.

        write: called with the path of each block that is finished, while it is in memory; where the
               blocks are in files, it has to store it (saving.saved_by_block).
        """
        model = self.model
        self.report.dense_loss = self._measured_loss("dense")
        if self.bits.times is not None:
            self.report.timing = self.bits.times.compare(choices)
        with timed(self.report.seconds, "replace"):
            self.report.layers, self.report.tables = self._put(choices, refitted, write)
        self._undo.pop_all()
        settle(model, self._stacks, self.structure.paths)
        earlier = getattr(model, "hylora_linears", None) or []  # Of another part.
        vars(model)["hylora_linears"] = list(dict.fromkeys([*earlier, *self.structure.paths]))
        save_in_hylora_format(freeze_all_but_adapters(model))
        self.report.count(model)
        self.report.model_dense_bytes = self.budget.dense.bytes
        self.report.model_bytes = self._bytes(choices)
        self.report.loss = self._measured_loss("compressed")
        if self.report.timing is not None:
            self.bits.times.measure(self.report.timing)

    def _measured_loss(self, label: str) -> float | None:
        """The model's loss on the end of the text, which the refit has not read unless it read all;
        None without text, or with measure=0."""
        if self.ids is None or not self.options.measure:
            return None
        ids = self.ids[-self.options.measure :]
        self.report.measured_blocks = len(ids)
        with timed(self.report.seconds, "measure"):
            own, loss = ids[self.processes.part(len(ids))], 0.0
            if len(own):
                loss = mean_loss(self.model, own, self.options.progress, f"loss, {label}")
            return self.processes.total([loss * (len(own) / len(ids))], "measuring")[0]

    def _bytes(self, choices: dict[str, Choice]) -> int:
        """Of the file of weights, adapters as the option `count` says."""
        if self.options.bits is None and self.options.target_time is None:  # Costs in parameters.
            return self.budget.size(self.curves, choices).bytes
        return self.bits.total(choices)

    @contextlib.contextmanager
    def trial(
        self, choices: dict[str, Choice], refitted: Mapping[str, Tensor]
    ) -> Iterator[nn.Module]:
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
        self,
        choices: dict[str, Choice],
        refitted: Mapping[str, Tensor],
        write: Callable[[str], None] | None = None,
    ) -> tuple[list[LayerReport], list[LayerReport]]:
        """Put the chosen layers into the model -> CompressReport.layers, .tables."""
        blocks = {t.path: block for block in self.structure.blocks for t in block.targets}
        hidden, reports = not self.options.progress, []
        bar = tqdm(self.structure.targets, desc="replacing", disable=hidden, leave=False)
        for block, targets in groupby(enumerate(bar), lambda item: blocks.get(item[1].path)):
            with hold(nn.Module() if block is None else block.module):
                reports += [self._put_one(i, t, choices, refitted) for i, t in targets]
                if block is not None and write is not None:
                    write(block.path)
        method = self.options.method
        if (target := self.embedding) is not None:
            factors, rank = self.workspace.load(target.path), choices[target.path].rank
            reports.append(replace_embedding(self.model, target, factors, rank, method))
        tables = []
        for target in self.bits.tables:
            choice, in_nats = choices[target.path], method == "two_sided"
            codes = self.bit_candidates.matrix(target, choice)
            tables.append(replace_table(self.model, target, choice, codes, in_nats))
        self.bits.explain([*reports, *tables], self.curves, self.bit_candidates.codes)
        return reports, tables

    def _put_one(
        self,
        index: int,
        target: Target,
        choices: dict[str, Choice],
        refitted: Mapping[str, Tensor],
    ) -> LayerReport:
        return replace_linear(
            self.model,
            target,
            self.workspace.load(target.path) if self.options.low_rank else None,
            choices[target.path],
            refitted.get(target.path),
            self.bit_candidates.matrix(target, choices[target.path]),
            self.options,
            self.options.seed + index,
        )

    def _vocabulary_modules(self) -> dict[str, nn.Module]:
        """path -> the dense embedding and output head that are replaced."""
        targets = [*([self.embedding] if self.embedding else []), *self.bits.tables]
        paths = [path for t in targets for path in holders(self.model, t.module.weight)]
        return {path: self.model.get_submodule(path) for path in paths}
