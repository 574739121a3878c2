"""The options of compress(): names, types, defaults, choices and help, each said here once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hylora_kernels.layers.factors import FORMS
from hylora_kernels.support.options import check_options, option, option_of
from hylora_kernels.text.blocks import BLOCKS
from hylora_kernels.text.mix import check_mix
from hylora_kernels.text.options import TextOptions
from hylora_kernels.text.sources import Mix, Source, is_mix

METHODS = ("two_sided", "whitened", "svd")
POLICIES = ("global", "uniform", "energy")
INITS = ("next", "classic")
FACTORIZERS = ("gram", "exact", "randomized")
COUNTS = ("merged", "as_is")
BUDGETS = ("keep", "target_params", "target_mb")
KEEP = 0.8


@dataclass(frozen=True)
class CompressOptions:
    """All arguments of compress() but the model, checked.

    keep:        counts the selected linears' parameters without biases, adapters included; met
                 from below. One of it, target_params and target_mb may be given.
    target_params: parameters of the whole model, embeddings included, a tied one once.
    target_mb:   bytes of the whole model's file of weights in the dtype that it has, in units of
                 1e6. Both targets are met from below and count adapters as `count` says.
    calibration: a list of (source, blocks) is read as it is: blocks of `length` tokens, drawn by
                 `seed`. A source is a list of texts, a name, a file, a data set, token ids, as
                 text.blocks.token_blocks says (of split and column, too), or "self", the text that
                 the model writes. One such text alone is read with "self" and "stdlib", in blocks
                 4 : 2 : 1, so that the model keeps what the text is not about; None is these two.
                 int64 token ids [n, L], "self" or "stdlib" are read alone (text.mix.default_mix).
                 Method "svd" reads nothing.
    method:      "two_sided" whitens by inputs and output gradients (GFWSVD, arXiv:2505.17974, here
                 with one budget for all layers), "whitened" by inputs (SVD-LLM, arXiv:2403.07378),
                 "svd" not at all.
    ranks:       compression.ranks.allocate says what a policy and a dict mean.
    init:        "next" takes the adapter's rank from the next singular components, "classic" starts
                 the adapter at zero. Layers that stay dense get no adapter.
    form:        "pivoted" (PIFA, arXiv:2501.19090) or "pair" (the plain formula).
    count:       "merged" budgets for adapters folded in, "as_is" for separate ones.
    embedding_rank: the input embedding, and an output head tied to it, become one low-rank pair in
                 the same norm: "auto" at the rank that the budget gives it, which keep then counts
                 it in; an int at that rank, counted the same. None leaves both as they are.
    max_memory:  bytes; the model runs over the text again for each part of the statistics that
                 fits.
    cache:       True: in the package's cache; a path: in that folder; False: nowhere.

    Raises ValueError or TypeError naming the argument, what was given and what is allowed.
    """

    keep: float | None = option(
        None, "Fraction of the linears' parameters that stays. 0.8 unless a target is given."
    )
    target_params: float | None = option(
        None,
        "In place of keep: parameters of the whole model, at most, adapters as count says.",
        keyword=True,
    )
    target_mb: float | None = option(
        None,
        "In place of keep: MB of the whole model's file, at most, adapters as count says.",
        keyword=True,
    )
    calibration: Source | Mix | None = option_of(TextOptions, "calibration")
    method: str = option(
        "two_sided",
        "Norm of the truncation: by inputs and output gradients, by inputs, or plain.",
        choices=METHODS,
    )
    ranks: str | dict[str, int | float] = option(
        "global",
        "Division of the budget among the layers: global, uniform, energy, or the keep (a fraction)"
        " or rank (a whole number) of all layers whose path matches a pattern.",
    )
    lora_rank: int = option(64, "Rank of the adapters, inside the budget; 0: none.", least=0)
    init: str = option(
        "next", "Adapters start from the next singular components, or at zero.", choices=INITS
    )
    form: str = option("pivoted", "Layout of the factors; pivoted is smaller.", choices=FORMS)
    factorizer: str = option("gram", "Algorithm of the SVD.", choices=FACTORIZERS)
    refit: bool | None = option(
        None, "Refit U in closed form. By default for all methods but svd, which can't."
    )
    rank_multiple: int = option(16, "Ranks are multiples of this.", least=1)
    embedding_rank: int | str | None = option(
        None,
        "Also factorize the embedding, with a head tied to it, inside the budget: its rank, or "
        "auto.",
        keyword=True,
    )
    include: list[str] | None = option(
        None, "Only linears whose path contains a match of this regular expression.", reported=False
    )
    exclude: list[str] | None = option(
        None, "No linears whose path contains a match of this regular expression.", reported=False
    )
    count: str = option(
        "merged", "The budget counts the adapters merged, or as they are.", choices=COUNTS
    )
    trust_remote_code: bool = option(
        False,
        "Run the Python files that come with a model whose classes transformers lacks. They may do "
        "anything.",
        reported=False,
    )
    split: str = option_of(TextOptions, "split")
    column: str | None = option_of(TextOptions, "column")
    samples: int = option(
        BLOCKS,
        "Blocks of the calibration text; half as many of self and a quarter of stdlib.",
        least=1,
    )
    length: int = option(512, "Tokens in a block.", least=2)
    refit_samples: int = option(32, "Blocks of calibration text that the refit reads.", least=1)
    measure: int = option(
        8,
        "Blocks at the end of the calibration text on which the loss is measured before and after,"
        " to stand beside the predicted one; 0: none.",
        least=0,
        reported=False,
    )
    max_memory: int | None = option(
        None,
        "Bytes of calibration statistics in memory. By default half of what is free.",
        reported=False,
    )
    tokenizer: object = option(None, "By default the model's own.", reported=False)
    device: str | torch.device | None = option(None, "Device to move the model to.", reported=False)
    dtype: str | torch.dtype | None = option(None, "Dtype to convert the model to.", reported=False)
    cache: bool | str | Path = option(True, "Keep and reuse finished work.", reported=False)
    seed: int = option(0, "Seed of every random choice.")
    progress: bool = option(True, "Show progress bars.", reported=False)

    def __post_init__(self) -> None:
        if self.refit is None:
            object.__setattr__(self, "refit", self.method != "svd")
        check_options(self)
        if is_mix(self.calibration):
            check_mix(self.calibration, "calibration")
        self._check_budget()
        rank = self.embedding_rank
        is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        if rank is not None and rank != "auto" and not is_rank:
            raise ValueError(
                f"embedding_rank must be an int of at least 1, 'auto' or None, got {rank!r}"
            )
        if self.refit and self.method == "svd":
            raise ValueError(
                "refit needs method 'two_sided' or 'whitened', got 'svd': set refit=False"
            )

    def _check_budget(self) -> None:
        """Exactly one of keep and the targets is set after this; keep is 0.8 where none was."""
        budgets = {name: getattr(self, name) for name in BUDGETS}
        check_one(budgets)
        given = {name: value for name, value in budgets.items() if value is not None}
        if not given:
            object.__setattr__(self, "keep", KEEP)
        for name, value in given.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if name == "keep" and not 0 < value <= 1:
                raise ValueError(f"keep must be in (0, 1], got {value}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
            if name != "keep":
                check_policy(name, self.ranks)


def check_one(budgets: Mapping[str, object]) -> None:
    """Raise ValueError if more than one of these arguments, name -> value, is not None."""
    given = [f"{name}={value}" for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"only one budget may be given, got {' and '.join(given)}")


def check_policy(name: str, ranks: str | dict[str, int | float]) -> None:
    """Raise ValueError if `ranks` has budgets of its own beside the one that `name` gives."""
    if isinstance(ranks, dict):
        raise ValueError(
            f"{name} needs a policy for all linears, one of {POLICIES}, got ranks={ranks}, whose"
            " patterns have budgets of their own: give keep"
        )
