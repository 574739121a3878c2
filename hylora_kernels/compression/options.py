"""The options of compress(): names, types, defaults, choices and help, each said here once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from hylora_kernels.compression.workload import Workload
from hylora_kernels.layers.factors import FORMS
from hylora_kernels.support.options import check_options, option, option_of
from hylora_kernels.text.blocks import BLOCKS
from hylora_kernels.text.mix import check_mix
from hylora_kernels.text.options import TextOptions
from hylora_kernels.text.sources import Mix, Source, is_mix
from hylora_kernels.weights import PLANES

METHODS = ("two_sided", "whitened", "svd")
POLICIES = ("global", "uniform", "energy")
INITS = ("next", "classic")
FACTORIZERS = ("gram", "exact", "randomized")
COUNTS = ("merged", "as_is")
BUDGETS = ("keep", "target_params", "target_mb", "target_time")
KEEP = 0.8
ROUNDINGS = ("gptq", "rtn")
AS_IS = 16  # The bits of a matrix that is not quantised, of any dtype.
BITS = (*PLANES, AS_IS)
FACTOR_BITS = 8  # Of low-rank factors. In fewer bits they lose more than a dense matrix does.
AUTO = "auto"


@dataclass(frozen=True)
class CompressOptions:
    """All arguments of compress() but the model, checked.

    keep:        counts the selected linears' parameters without biases, adapters included; met
                 from below. One of it, target_params, target_mb and target_time may be given.
    target_params: parameters of the whole model, embeddings included, a tied one once.
    target_mb:   bytes of the whole model's file of weights in the dtype that it has, in units of
                 1e6. Both targets are met from below and count adapters as `count` says.
    target_time: "decode:0.5": a decoded token in at most half the time that the dense model's
                 matrices take; "prefill:512:0.6": a prompt of 512 tokens in 0.6 of it. Predicted by
                 the rates of this machine (evaluation.rates.rates_of) and met from below; attention
                 and norms are not counted.
    bits:        None quantises nothing. 8 beside keep or target_params: the factors, the linears
                 left dense and the embedding get 8 bits each, behind the refit. "auto" beside
                 target_mb or target_time: rank and bits (2 to 6, 8, 16) of each linear and the bits
                 of embedding and output head are chosen together. A number alone is a budget of its
                 own, the mean width of the linears' codes over the weights that they have now,
                 scales aside; embedding and head have embedding_bits then; 8, which keep may have
                 been forgotten beside, needs low_rank=False. 16 stands for a matrix as it is.
                 Where bits are chosen there is no refit, and a low-rank layer has 16 or 8.
    low_rank:    False: each linear stays as it is but for its bits, low-rank layers of a model that
                 was compressed before, too.
    embedding_bits: of the embedding, and of an output head, tied or not. None: 8, or what the
                 budget of target_mb chooses.
    rounding:    "gptq" (arXiv:2210.17323) or "rtn", to nearest: compression.quantize.quantize.
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
    target_time: str | None = option(
        None,
        "In place of keep: the share of the dense model's time for a token, decode:0.5, or for a"
        " prompt of 512, prefill:512:0.6, as predicted for this machine.",
        keyword=True,
    )
    bits: float | str | None = option(
        None,
        "Bits of the weights: 8 beside keep; auto beside target_mb or target_time, the best for"
        " each matrix; any other number, or 8 without low-rank layers, is a budget of its own, a"
        " mean over the linears.",
        keyword=True,
    )
    low_rank: bool = option(
        True, "Low-rank layers, or bits alone, which leave every rank as it is.", keyword=True
    )
    embedding_bits: int | None = option(
        None,
        "Bits of embedding and output head, with bits. By default 8, or as target_mb allows.",
        keyword=True,
    )
    rounding: str = option(
        "gptq",
        "Rounding to less than 16 bits: with feedback of each column's error, or to nearest.",
        choices=ROUNDINGS,
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

    @property
    def chooses_bits(self) -> bool:
        """True where the budget is spent on bits, too."""
        return self.bits is not None and self.keep is None and self.target_params is None

    @property
    def is_priced(self) -> bool:
        """True where candidates have prices in bytes, bits or time, and no keep is spent."""
        return self.chooses_bits or self.target_time is not None

    @property
    def workload(self) -> Workload:
        """What target_time says."""
        return Workload.parse(self.target_time)

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits below 16 that a dense linear may get."""
        if not self.chooses_bits:
            return ()
        if isinstance(self.bits, str) or self.ranks != "uniform":
            return tuple(PLANES)
        return () if self.bits == AS_IS else (int(self.bits or 0),)

    @property
    def embedding_widths(self) -> tuple[int, ...]:
        """The bits that embedding and output head may get."""
        if self.embedding_bits is not None:
            return (self.embedding_bits,)
        return BITS if self.bits == AUTO else (FACTOR_BITS,)

    def __post_init__(self) -> None:
        check_options(self)
        if is_mix(self.calibration):
            check_mix(self.calibration, "calibration")
        self._check_budget()
        self._check_bits()
        if self.refit is None:
            refit = self.method != "svd" and self.low_rank and not self.chooses_bits
            object.__setattr__(self, "refit", refit)
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
        if not given and self.bits is None:
            object.__setattr__(self, "keep", KEEP)
        if self.target_time is not None:
            given.pop("target_time")
            self._check_time()
        for name, value in given.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if name == "keep" and not 0 < value <= 1:
                raise ValueError(f"keep must be in (0, 1], got {value}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
            if name != "keep":
                check_policy(name, self.ranks)

    def _check_time(self) -> None:
        object.__setattr__(self, "target_time", str(Workload.parse(self.target_time)))
        check_policy("target_time", self.ranks)
        if self.ranks not in ("global", "uniform"):
            raise ValueError(
                f"ranks must be 'global' or 'uniform' with target_time, got {self.ranks!r}"
            )
        if self.embedding_rank is not None:
            raise ValueError("embedding_rank goes without target_time: a pair there has no rate")

    def _check_bits(self) -> None:
        bits, embedding = self.bits, self.embedding_bits
        if embedding is not None and (type(embedding) is not int or embedding not in BITS):
            raise ValueError(f"embedding_bits must be one of {BITS}, got {embedding!r}")
        if bits is None:
            if not self.low_rank or embedding is not None:
                name = "embedding_bits" if self.low_rank else "low_rank=False"
                raise ValueError(f"{name} needs bits, got None")
            return
        if bits != AUTO and (isinstance(bits, str | bool) or not isinstance(bits, int | float)):
            raise TypeError(f"bits must be a number, 'auto' or None, got {bits!r}")
        if self.embedding_rank is not None:
            raise ValueError("embedding_rank goes without bits: a quantised embedding has no rank")
        if (bits == AUTO) != (self.target_mb is not None or self.target_time is not None):
            raise ValueError(
                f"bits={bits!r} and {self._budget_words()}: 'auto' goes with target_mb or"
                " target_time, and these with 'auto'"
            )
        if self.chooses_bits:
            self._check_chosen_bits()
        elif bits != FACTOR_BITS or not self.low_rank:
            raise ValueError(
                f"bits={bits} and {self._budget_words()}: low-rank layers have {FACTOR_BITS} bits;"
                " other bits go alone, as a mean, or with target_mb, as 'auto'"
            )

    def _check_chosen_bits(self) -> None:
        bits, uniform = self.bits, self.ranks == "uniform"
        check_policy("bits", self.ranks)
        if self.ranks not in ("global", "uniform"):
            raise ValueError(f"ranks must be 'global' or 'uniform' with bits, got {self.ranks!r}")
        if not isinstance(bits, str | None) and not min(BITS) <= bits <= AS_IS:
            raise ValueError(f"bits must be in {min(BITS)}..{AS_IS}, got {bits}")
        if bits == FACTOR_BITS and self.low_rank:
            raise ValueError(
                f"bits={bits} says too little: give keep={KEEP} too, for low-rank layers in"
                f" {FACTOR_BITS} bits, or low_rank=False, for a mean of {FACTOR_BITS} bits alone"
            )
        if uniform and (bits not in BITS or self.low_rank):
            raise ValueError(
                f"bits must be one of {BITS} where all linears get the same (ranks='uniform', which"
                f" needs low_rank=False), got bits={bits!r} and low_rank={self.low_rank}"
            )
        if self.refit:
            raise ValueError("refit=True goes without a choice of bits: leave it, or give keep")

    def _budget_words(self) -> str:
        given = [f"{n}={getattr(self, n)}" for n in BUDGETS if getattr(self, n) is not None]
        return given[0] if given else "no budget beside it"


@dataclass(frozen=True)
class QuantizeOptions:
    """All arguments of quantize_model() but the model, checked; CompressOptions says the same more
    fully.

    bits:    without uniform the mean over the linears, or over the numbers that low-rank ones have.
    uniform: gives every linear these very bits, and compares methods of rounding.

    Raises the errors of CompressOptions.
    """

    target_mb: float | None = option(None, "MB of the whole model's file, at most.")
    target_time: str | None = option(
        None,
        "In place of target_mb: the share of the dense model's time for a token, such as"
        " decode:0.5, as predicted for this machine.",
        keyword=True,
    )
    bits: float | None = option(
        None,
        "In place of target_mb: mean bits of the linears' weights. By default 4.",
        keyword=True,
    )
    uniform: bool = option(False, "Give each linear the same bits.", keyword=True)
    embedding_bits: int | None = option_of(CompressOptions, "embedding_bits")
    rounding: str = option_of(CompressOptions, "rounding")
    calibration: Source | Mix | None = option_of(CompressOptions, "calibration")
    method: str = option_of(
        CompressOptions,
        "method",
        help="Norm of the errors: by inputs and output gradients, by inputs, or plain.",
    )
    include: list[str] | None = option_of(CompressOptions, "include")
    exclude: list[str] | None = option_of(CompressOptions, "exclude")
    trust_remote_code: bool = option_of(CompressOptions, "trust_remote_code")
    split: str = option_of(CompressOptions, "split")
    column: str | None = option_of(CompressOptions, "column")
    samples: int = option_of(CompressOptions, "samples")
    length: int = option_of(CompressOptions, "length")
    measure: int = option_of(CompressOptions, "measure")
    max_memory: int | None = option_of(CompressOptions, "max_memory")
    tokenizer: object = option_of(CompressOptions, "tokenizer")
    device: str | torch.device | None = option_of(CompressOptions, "device")
    dtype: str | torch.dtype | None = option_of(CompressOptions, "dtype")
    cache: bool | str | Path = option_of(CompressOptions, "cache")
    seed: int = option_of(CompressOptions, "seed")
    progress: bool = option_of(CompressOptions, "progress")

    def __post_init__(self) -> None:
        check_one({name: getattr(self, name) for name in ("target_mb", "target_time", "bits")})
        CompressOptions(**self.for_compress())

    def for_compress(self) -> dict[str, Any]:
        """The arguments of compress()."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        uniform = given.pop("uniform")
        if self.bits is None:
            given["bits"] = 4 if self.target_mb is None and self.target_time is None else AUTO
        return given | {"low_rank": False, "ranks": "uniform" if uniform else "global"}


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
