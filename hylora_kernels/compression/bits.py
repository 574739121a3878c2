"""Bits: what a model's matrices become where a budget is spent on rank and bits.

The candidates of a linear are the dense matrix in each width (bit_candidates.py) and, with
low_rank, each rank in 16 and in 8 bits. All errors have the unit of the rank curves, so one
Lagrangian (ranks.spend) divides the budget, whose currency (currency.py) prices the candidates in
bytes, bits or time. Embedding and output head, the tables, have candidates in bits alone.

A low-rank layer in 8 bits is taken to lose what the rank drops and what the dense matrix loses in 8
bits. Factors in fewer bits are no candidates: on SmolLM2-135M they win in 0 to 7 of 35 matrices, at
140 to 60 MB, and cut the predicted error by 1.4 %.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from hylora_kernels.compression.costs import Costs, as_is
from hylora_kernels.compression.currency import in_bits, in_bytes, in_time
from hylora_kernels.compression.embedding import embedding_target, holders
from hylora_kernels.compression.options import AS_IS, AUTO, FACTOR_BITS, CompressOptions
from hylora_kernels.compression.ranks import DENSE, Choice, Curve, Infeasible, choose
from hylora_kernels.compression.report import Candidate, LayerReport
from hylora_kernels.compression.times import Times
from hylora_kernels.compression.workspace import Codes
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.structure import Structure, Target


class BitBudget:
    """The choice of bits, and of ranks beside them, for one model.

    tables:  the embedding, and an output head with a weight of its own; none without bits.
    targets: linears and tables.
    times:   of a budget of time, else None.

    ranks: the candidates in rank, with any falling errors.

    The constructor raises ValueError naming the argument for a budget that can't be met or that the
    model as it is meets.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        options: CompressOptions,
        ranks: Sequence[Curve] = (),
    ):
        self.options, self.linears = options, structure.targets
        self.tables = tables_of(model, structure, options)
        self.targets = (*self.linears, *self.tables)
        self.costs = Costs(model, self.linears, self.tables, options)
        self.times = None
        self._priced = self.targets if options.bits == AUTO else tuple(self.linears)
        if options.target_time is not None:
            self.times = Times(model, self._priced, options)
            self.currency = in_time(self.times, options)
        elif options.chooses_bits:
            self.currency = (in_bytes if options.bits == AUTO else in_bits)(self.costs, options)
        if options.is_priced:
            self._check_feasible({c.path: c for c in ranks})

    def widths(self, target: Target) -> Sequence[int]:
        """The bits below 16 in which a matrix is a candidate."""
        o = self.options
        if target in self.tables:
            return [b for b in o.embedding_widths if b != AS_IS]
        if isinstance(target.module, SVDLoRALinear):
            return [b for b in o.widths if b == FACTOR_BITS]
        return o.widths

    def curves(
        self, errors: Mapping[str, Mapping[int, float]], ranks: Mapping[str, Curve]
    ) -> list[Curve]:
        """The candidates of every matrix.

        errors: path -> bits -> what the dense matrix loses. ranks: path -> the candidates in rank.
        """
        return [self._curve(t, errors[t.path], ranks.get(t.path)) for t in self._priced]

    def allocate(self, curves: Sequence[Curve]) -> dict[str, Choice]:
        """path -> what the matrix becomes, embedding and output head included."""
        chosen = choose([*curves], self.currency.share(curves), str(self.options.ranks))
        found = {c.path: c.choice(i) for c, i in zip(curves, chosen, strict=True)}
        return self.fixed() | found

    def fixed(self) -> dict[str, Choice]:
        """path -> the bits of embedding and output head where no budget chooses them."""
        bits = self.options.embedding_widths[0]
        return {t.path: Choice(DENSE, bits) for t in self.tables}

    def total(self, choices: Mapping[str, Choice]) -> int:
        """Bytes of the saved model's weights, at most."""
        return self.costs.total({t: choices[t.path] for t in self.targets})

    def explain(
        self, reports: Sequence[LayerReport], curves: Sequence[Curve], codes: Codes
    ) -> None:
        """Add to the reports what rounding loses, and the neighbours of each choice."""
        by_path = {c.path: c for c in curves} if self.options.is_priced else {}
        fixed = {t.path: t for t in self.tables if t.path not in by_path}
        for report in reports:
            in_nats = report.predicted_loss is not None
            if report.path in fixed and report.bits != AS_IS and in_nats:
                report.predicted_loss = codes.error(report.path, report.bits)[0]
            if (found := by_path.get(report.path)) is None:
                continue
            chosen = next(
                i for i in range(len(found.ranks)) if found.choice(i) == (report.rank, report.bits)
            )
            if in_nats and self.options.chooses_bits:
                report.predicted_loss = float(found.errors[chosen])
            report.candidates = [
                Candidate(*found.choice(i), int(found.costs[i]), float(found.errors[i]))
                for i in range(max(chosen - 1, 0), min(chosen + 2, len(found.ranks)))
            ]

    def _curve(self, target: Target, errors: Mapping[int, float], ranks: Curve | None) -> Curve:
        own = as_is(target)
        found = [(Choice(own.rank, bits), lost) for bits, lost in errors.items()]
        if AS_IS in self.options.embedding_widths or target not in self.tables:
            found.append((own, 0.0))
        if ranks is not None:
            cut = [(int(r), e) for r, e in zip(ranks.ranks, ranks.errors, strict=True) if r]
            found += [(Choice(rank), lost) for rank, lost in cut]
            if (in_8_bits := errors.get(FACTOR_BITS)) is not None:
                found += [(Choice(rank, FACTOR_BITS), lost + in_8_bits) for rank, lost in cut]
        price = self.currency.price
        front: list[tuple[int, float, Choice]] = []
        for cost, lost, choice in sorted((price(target, c), lost, c) for c, lost in found):
            if not front or lost < front[-1][1]:
                front.append((cost, lost, choice))
        costs, losses, choices = zip(*front, strict=True)
        return Curve(
            target.path,
            self.currency.whole(target),
            np.array([c.rank for c in choices]),
            np.array(costs),
            np.array(losses),
            max(losses),
            lambda rank: price(target, Choice(rank)),
            np.array([c.bits for c in choices]),
        )

    def _check_feasible(self, ranks: Mapping[str, Curve]) -> None:
        """Feasibility depends on costs only, so any falling errors will do here."""
        any_errors = {t.path: {bits: 1 / bits for bits in self.widths(t)} for t in self._priced}
        curves, currency = self.curves(any_errors, ranks), self.currency
        argument, wanted = currency.argument, currency.show(currency.wanted)
        if currency.share(curves) >= 1 and self.options.bits in (None, AUTO):
            raise ValueError(
                f"{argument}={wanted} is at or above the dense model, which has"
                f" {currency.show(currency.given(1.0, curves))}: nothing would be compressed"
            )
        try:
            choose(curves, currency.share(curves), str(self.options.ranks))
        except Infeasible as least:
            smallest = math.ceil(currency.given(least.smallest, curves) * 100) / 100
            raise ValueError(
                f"{argument}={wanted} can't be met: the least possible is"
                f" {currency.show(smallest)}, of the model's {currency.dense(curves)}"
            ) from None


def tables_of(model: nn.Module, structure: Structure, options: CompressOptions) -> list[Target]:
    """The input embedding, and an output head with a weight of its own, that can be quantised.

    Those that `exclude` matches or that are among the linears already are left out; without bits
    all are. Raises ValueError if embedding_bits asks for an embedding that codes can't replace.
    """
    found: list[Target] = []
    if options.bits is None:
        return found
    try:
        found.append(embedding_target(model, "embedding_bits"))
    except ValueError:
        if options.embedding_bits not in (None, AS_IS):
            raise
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and len(places := holders(model, head.weight)) == 1:
        found.append(Target(places[0], head, (head.out_features, head.in_features)))
    return [
        target
        for target in found
        if target.path not in structure.paths
        and not any(re.search(pattern, target.path) for pattern in options.exclude or ())
    ]
