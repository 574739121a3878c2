"""tie_embeddings(): one matrix for the input embedding and the output head of an untied model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.compression.tokens import tied_matrix, token_statistics
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks, probe_ids
from hylora_kernels.model.load import tokenizer_for
from hylora_kernels.model.modules import empty_weights
from hylora_kernels.support.console import format_bytes, format_ppl, kept_removed, table
from hylora_kernels.support.report import Report
from hylora_kernels.support.timing import timed
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.mix import Part, mixed_blocks
from hylora_kernels.text.sources import (
    SELF,
    STDLIB,
    Mix,
    Source,
    held_out,
    is_same,
    may_have_columns,
    source_name,
    texts_in,
)

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class TieReport(Report):
    """The result of tie_embeddings(): the whole model, untied and tied.

    sources:        the texts behind the statistics.
    predicted_loss: nats a token that tying adds, to second order. It is far from small in most
                    models: the start asks for training.
    test, tokens:   the text behind both perplexities, and its predictions.
    seconds:        by stage: statistics, perplexity.
    """

    vocabulary: int
    width: int
    untied_parameters: int
    tied_parameters: int
    untied_bytes: int
    tied_bytes: int
    untied_ppl: float
    tied_ppl: float
    predicted_loss: float
    sources: list[Part]
    test: str
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)

    def render(self) -> Table:
        keep = self.tied_parameters / self.untied_parameters
        rows: list[tuple[object, ...]] = [
            ("parameters", self.untied_parameters, f"{self.tied_parameters:,}"),
            ("of the model", "", kept_removed(keep)),
            ("in memory", format_bytes(self.untied_bytes), format_bytes(self.tied_bytes)),
            ("perplexity", format_ppl(self.untied_ppl), format_ppl(self.tied_ppl)),
            ("predicted loss, nats a token", "", f"+{self.predicted_loss:.4g}"),
        ]
        title = (
            f"one matrix {self.vocabulary:,} x {self.width} for embedding and output head; "
            f"{self.tokens:,} tokens of {self.test}"
        )
        return table(title, ("", "untied", "tied"), rows)


def tie_embeddings(
    model: nn.Module,
    calibration: Source | Mix | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    samples: int = 32,
    length: int = 512,
    split: str = "train",
    column: str | None = None,
    test: Source | None = None,
    limit: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> TieReport:
    """Give an untied causal language model one matrix for embedding and output head; in place.

    With E the embedding and H the head, the matrix T minimises the increase of the loss to second
    order,

        sum over tokens v of  n_v (T_v - E_v) C (T_v - E_v)^T + c_v (T_v - H_v) G (T_v - H_v)^T

    n_v counts a token, C and G are Gram matrices [d, d] of gradients at the embedding and of hidden
    states, c_v sums squared gradients at the logit (compression/tokens.py). It is a start for
    training, not an equivalent: where E and H differ, as they do in most untied models, perplexity
    rises, and the report says by how much.

    calibration, samples, length, split, column: the text, as for compress().
    test:  a text to measure perplexity on, before and after, in at most `limit` blocks; by default
           the part that is held out of the first text of `calibration` (token ids and lists have
           none: all of it), of "stdlib" if that is the model's own.

    config.tie_word_embeddings becomes True, so that a saved model is tied when it is loaded. The
    other parameters and all requires_grad stay. After an error or an interruption the model is as
    it was. Raises ValueError for a model that is tied already, has no output head, a bias in it,
    another shape there, or a class whose saved models can't be tied.

    Example:
        report = tie_embeddings(model, "my.txt", tokenizer, samples=8, length=64)
    """
    check_model(model, "replace")
    _check_untied(model)
    first = texts_in(calibration)[0]
    text, part = held_out(test, STDLIB if first is None or is_same(first, SELF) else first)
    tokenizer = tokenizer_for(model, tokenizer, (text, *texts_in(calibration)))
    ids, sources = mixed_blocks(
        calibration,
        model,
        tokenizer,
        length,
        split=split,
        seed=seed,
        progress=progress,
        column=column,
        blocks=samples,
    )
    column = column if may_have_columns(text) else None
    blocks = token_blocks(text, tokenizer, length, part, limit, None, progress, column)
    check_blocks(model, ids)
    check_blocks(model, blocks)
    seconds: dict[str, float] = {}
    untied = _size(model)
    with timed(seconds, "perplexity"):
        before = perplexity(model, blocks, progress=progress)
    with timed(seconds, "statistics"):
        T, predicted = _start(model, ids, progress)
    with _all_or_nothing(model), timed(seconds, "perplexity"):
        embedding = model.get_input_embeddings()
        E = embedding.weight
        embedding.weight = nn.Parameter(T.to(E.dtype), requires_grad=E.requires_grad)
        _declare_tied(model.config)
        model.tie_weights()
        after = perplexity(model, blocks, progress=progress)
    tied = _size(model)
    return TieReport(
        vocabulary=T.shape[0],
        width=T.shape[1],
        untied_parameters=untied[0],
        tied_parameters=tied[0],
        untied_bytes=untied[1],
        tied_bytes=tied[1],
        untied_ppl=before.ppl,
        tied_ppl=after.ppl,
        predicted_loss=predicted,
        sources=sources,
        test=source_name(text, part),
        tokens=after.tokens,
        seconds=seconds,
    )


def _start(model: nn.Module, ids: Tensor, progress: bool) -> tuple[Tensor, float]:
    """(T float32 [V, d], the predicted increase of the loss in nats a token)."""
    terms = token_statistics(model, ids, progress).damped()
    E = model.get_input_embeddings().weight.detach()
    H = model.get_output_embeddings().weight.detach()
    T = tied_matrix(E, H, terms)
    return T, terms.nats(terms.embedding.error(E, T) + terms.head.error(H, T))


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """A block that raises leaves the embedding, the head and the config as they were."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    E, H = embedding.weight, head.weight
    said = [(c, getattr(c, "tie_word_embeddings", False)) for c in _configs(model.config)]
    try:
        yield
    except BaseException:
        embedding.weight, head.weight = E, H
        for config, flag in said:
            config.tie_word_embeddings = flag
        raise


def _size(model: nn.Module) -> tuple[int, int]:
    """(parameters, their bytes), a tied one once."""
    return sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())


def _configs(config: Any) -> list[Any]:
    """The config, and that of the text model if it is one inside."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _declare_tied(config: Any) -> None:
    for one in _configs(config):
        one.tie_word_embeddings = True


@torch.no_grad()
def _check_untied(model: nn.Module) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module, kind in (
        ("input embedding", embedding, nn.Embedding),
        ("output head", head, nn.Linear),
    ):
        if not isinstance(module, kind):
            got = "none" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"model must have an nn.{kind.__name__} as {name}, got {got}")
    E, H = embedding.weight, head.weight
    if E is H or E.data_ptr() == H.data_ptr():
        raise ValueError("model must be untied, but its embedding and output head share a matrix")
    if E.shape != H.shape:
        raise ValueError(
            "model must have an embedding and an output head of one shape, got "
            f"{list(E.shape)} and {list(H.shape)}"
        )
    if E.dtype != H.dtype or E.device != H.device:
        raise ValueError(
            "model must have its embedding and output head in one dtype on one device, got "
            f"{E.dtype} on {E.device} and {H.dtype} on {H.device}"
        )
    if head.bias is not None:
        raise ValueError("model must have an output head without bias, got one with a bias")
    ids = probe_ids(model)
    if not torch.equal(embedding(ids), E[ids]):
        raise ValueError(
            f"model must have an embedding that gives rows of its matrix, but a "
            f"{type(embedding).__name__} changes them"
        )
    config = copy.deepcopy(model.config)
    _declare_tied(config)
    with empty_weights():
        again = type(model)._from_config(config)
    again.tie_weights()
    if again.get_input_embeddings().weight is not again.get_output_embeddings().weight:
        raise ValueError(
            f"model must be of a class that can tie its embeddings, but a {type(model).__name__} "
            "doesn't when it is loaded"
        )
