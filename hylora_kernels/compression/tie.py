"""tie_embeddings(): one matrix for the input embedding and the output head of an untied model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.compression.tokens import tied_matrix, token_statistics
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks, probe_ids
from hylora_kernels.model.load import tokenizer_of
from hylora_kernels.model.modules import empty_weights
from hylora_kernels.support.console import format_bytes, format_ppl, kept_removed, table
from hylora_kernels.support.report import Report
from hylora_kernels.support.timing import timed
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.sources import held_out, source_name

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class TieReport(Report):
    """The result of tie_embeddings(): the whole model, untied and tied.

    predicted_loss: nats a token that tying adds, to second order. It is far from small in most
                    models: the start asks for training.
    test, tokens:   the text behind both perplexities, and its predictions.
    seconds:        by stage: statistics, solve, perplexity.
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
    calibration: str
    calibration_tokens: int
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
    calibration: Tensor | list[str] | str | Path = "brown",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    samples: int = 32,
    length: int = 512,
    split: str = "train",
    column: str | None = None,
    test: Tensor | list[str] | str | Path | None = None,
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

    calibration, split, column: as for text.blocks.token_blocks; `samples` blocks of `length`
           tokens.
    test:  a text to measure perplexity on, before and after, in at most `limit` blocks; by default
           the part of `calibration` that is held out (token ids and lists have none: all of it).

    config.tie_word_embeddings becomes True, so that a saved model is tied when it is loaded. The
    other parameters and all requires_grad stay. After an error or an interruption the model is as
    it was. Raises ValueError for a model that is tied already, has no output head, a bias in it,
    another shape there, or a class whose saved models can't be tied.

        report = tie_embeddings(model, "my.txt", tokenizer)
    """
    check_model(model, "replace")
    _check_untied(model)
    if tokenizer is None and not (isinstance(calibration, Tensor) and _is_ids(test)):
        tokenizer = tokenizer_of(model)
    text, part = held_out(test, calibration)
    ids = token_blocks(calibration, tokenizer, length, split, samples, seed, progress, column)
    blocks = token_blocks(text, tokenizer, length, part, limit, None, progress)
    check_blocks(model, ids)
    check_blocks(model, blocks)
    seconds: dict[str, float] = {}
    untied = _size(model)
    with timed(seconds, "perplexity"):
        before = perplexity(model, blocks, progress=progress)
    with timed(seconds, "statistics"):
        terms = token_statistics(model, ids, progress).damped()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    E, H = embedding.weight, head.weight
    with timed(seconds, "solve"):
        T = tied_matrix(E.detach(), H.detach(), terms)
        errors = terms.embedding.error(E.detach(), T) + terms.head.error(H.detach(), T)
    declared = _declare_tied(model.config)
    try:
        embedding.weight = nn.Parameter(T.to(E.dtype), requires_grad=E.requires_grad)
        model.tie_weights()
        with timed(seconds, "perplexity"):
            after = perplexity(model, blocks, progress=progress)
    except BaseException:
        embedding.weight, head.weight = E, H
        for config, flag in declared:
            config.tie_word_embeddings = flag
        raise
    tied = _size(model)
    return TieReport(
        vocabulary=E.shape[0],
        width=E.shape[1],
        untied_parameters=untied[0],
        tied_parameters=tied[0],
        untied_bytes=untied[1],
        tied_bytes=tied[1],
        untied_ppl=before.ppl,
        tied_ppl=after.ppl,
        predicted_loss=terms.nats(errors),
        calibration=source_name(calibration, split),
        calibration_tokens=ids.numel(),
        test=source_name(text, part),
        tokens=after.tokens,
        seconds=seconds,
    )


def _is_ids(test: Any) -> bool:
    return test is None or isinstance(test, Tensor)


def _size(model: nn.Module) -> tuple[int, int]:
    """(parameters, their bytes), a tied one once."""
    return sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())


def _declare_tied(config: Any) -> list[tuple[Any, bool]]:
    """Say tied in the config, and in that of the text model if it is one inside; returns what they
    said."""
    configs = {id(c): c for c in (config, config.get_text_config())}.values()
    said = [(c, getattr(c, "tie_word_embeddings", False)) for c in configs]
    for c in configs:
        c.tie_word_embeddings = True
    return said


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
