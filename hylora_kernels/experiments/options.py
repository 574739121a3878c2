"""The options of sweep() and compress_to_ratio(): their own, and those of compress()."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hylora_kernels.compression.options import BUDGETS, CompressOptions, check_one, check_policy
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.support.options import check_options, option, option_of
from hylora_kernels.text.options import TextOptions
from hylora_kernels.text.sources import KINDS, NAMED, SELF, Mix, Source, texts_in


@dataclass(frozen=True, kw_only=True)
class CellOptions:
    """The arguments of compress() that are the same in every cell."""

    bits: float | str | None = option_of(
        CompressOptions, "bits", help="8: factors, dense linears and embedding in 8 bits."
    )
    rounding: str = option_of(CompressOptions, "rounding")
    method: str = option_of(CompressOptions, "method")
    ranks: str | dict[str, int | float] = option_of(CompressOptions, "ranks")
    init: str = option_of(CompressOptions, "init")
    form: str = option_of(CompressOptions, "form")
    factorizer: str = option_of(CompressOptions, "factorizer")
    refit: bool | None = option_of(CompressOptions, "refit")
    rank_multiple: int = option_of(CompressOptions, "rank_multiple")
    embedding_rank: int | str | None = option_of(CompressOptions, "embedding_rank")
    include: list[str] | None = option_of(CompressOptions, "include", reported=True)
    exclude: list[str] | None = option_of(CompressOptions, "exclude", reported=True)
    count: str = option_of(CompressOptions, "count")
    refit_samples: int = option_of(CompressOptions, "refit_samples")
    max_memory: int | None = option_of(CompressOptions, "max_memory")
    cache: bool | str | Path = option_of(CompressOptions, "cache")
    seed: int = option_of(CompressOptions, "seed")
    progress: bool = option_of(CompressOptions, "progress")

    def for_compress(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(CellOptions)}


@dataclass(frozen=True)
class SweepOptions(CellOptions):
    """All arguments of sweep() but the model, checked.

    output_dir: gets cells/*.json, sweep.json and sweep.png. A cell is read from its file if
                everything that decides it is the same: weights, tokens, options, the package's
                version.
    rank:       total ranks r + ra of every layer; replaces `keep`.
    data:       the cells are trained on its train split and evaluated on its test split. Of a list
                or token ids the last tenth of the blocks is held out if there are steps to train.
    test:       a text to evaluate on in place of that part.
    objective:  of the steps; "keep" takes the dense model as the teacher of each cell.

    Raises ValueError naming the argument, what was given and what is allowed.
    """

    output_dir: str | Path = option(MISSING, "Folder of the cells, the table and the picture.")
    keep: Sequence[float] = option(
        (0.9, 0.8, 0.6), "Fractions of the linears' parameters that stay.", reported=False
    )
    lora_rank: Sequence[int] = option(
        (0, 16, 64), "Ranks of the adapters, inside the budget; 0: none.", reported=False
    )
    rank: Sequence[int] | None = option(
        None, "Total ranks of all linears, in place of keep.", reported=False
    )
    data: Source = option_of(
        TextOptions, "data", help=f"Text to train and, on a part held out, to test on: {KINDS}."
    )
    test: Source | None = option_of(TextOptions, "test")
    texts: Mapping[str, Source] | Sequence[Source] | None = option(
        None, "Several texts to test on in place of one, self among them.", reported=False
    )
    column: str | None = option_of(TextOptions, "column")
    calibration: Source | Mix | None = option_of(CompressOptions, "calibration")
    trust_remote_code: bool = option_of(CompressOptions, "trust_remote_code")
    tokenizer: object = option_of(CompressOptions, "tokenizer")
    length: int = option_of(CompressOptions, "length", reported=False)
    samples: int = option_of(CompressOptions, "samples")
    limit: int | None = option(16, "Most blocks of a text to evaluate on.", least=1, reported=False)
    steps: int = option(0, "Recovery steps of a cell with adapters; 0: none.", least=0)
    objective: str = option_of(FinetuneOptions, "objective")
    device: str | torch.device = option("auto", "Device to load the model to.", reported=False)
    dtype: str | torch.dtype = option("auto", "Dtype to load the model in.", reported=False)
    revision: str | None = option(None, "Revision of a hub id.", reported=False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.texts is not None and self.test is not None:
            raise ValueError("test goes with data, and texts are given: add it to them")
        if not self.lora_rank or not (self.keep if self.rank is None else self.rank):
            raise ValueError("keep (or rank) and lora_rank must each have at least one value")
        # Each cell's options are checked before the first cell's work.
        for keep, lora_rank in product(self.keep if self.rank is None else (1.0,), self.lora_rank):
            CompressOptions(**self.for_compress(), keep=keep, lora_rank=lora_rank)
        for rank in self.rank or ():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank must be ints of at least 1, got {rank!r}")


@dataclass(frozen=True, kw_only=True)
class TargetOptions(CompressOptions):
    """All arguments of compress_to_ratio() but the model, checked: those of compress(), of which
    target_ratio takes the place of keep, target_params and target_mb, and its own.

    output_dir: gets frontier/*.json and frontier.png. A point is read from its file if everything
                that decides it is the same: weights, tokens, options, the package's version.
    texts:      as breadth() takes them; of each the held-out part is measured. By default the
                user's text in `calibration`, or Brown, and three more.
    """

    target_ratio: float = option(
        1.1, "Find the smallest keep whose perplexity is at most this multiple of the dense one's."
    )
    output_dir: str | Path = option(
        MISSING, "Folder of the points and the picture.", reported=False
    )
    texts: Mapping[str, Source] | Sequence[Source] | None = option(
        None,
        "Texts whose geometric mean of ratios must meet target_ratio; by default the calibration "
        "text (or brown), python-docs, code and self.",
        reported=False,
    )
    limit: int = option(8, "Most blocks of each text to measure on.", least=1)
    evaluations: int = option(5, "Most keeps to measure.", least=1)

    def __post_init__(self) -> None:
        budgets = {name: getattr(self, name) for name in BUDGETS}
        check_one(budgets | {"target_ratio": self.target_ratio})
        check_policy("target_ratio", self.ranks)
        ratio = self.target_ratio
        if not isinstance(ratio, int | float) or not 1 < ratio < math.inf:
            raise ValueError(
                f"target_ratio must be a finite number above 1, the dense model's, got {ratio!r}"
            )
        object.__setattr__(self, "keep", 1.0)  # The most that a point of the search may keep.
        super().__post_init__()

    def texts_or_default(self) -> Mapping[str, Source] | Sequence[Source]:
        """`texts`, or the default ones."""
        if self.texts is not None:
            return self.texts
        read = [s for s in texts_in(self.calibration) if isinstance(s, str | Path)]
        own = [source for source in read if source not in (*NAMED, SELF)]
        return [*dict.fromkeys([*(own or ["brown"]), "python-docs", "code", SELF])]
