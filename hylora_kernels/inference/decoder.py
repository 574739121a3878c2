"""Decoder: tokens of one or several sequences, one step after another."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from hylora_kernels.inference import cuda_graph
from hylora_kernels.inference.cuda_graph import CudaGraphs
from hylora_kernels.inference.modules import Modules
from hylora_kernels.inference.native import Changed, Native
from hylora_kernels.inference.watch import NotRecognised
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_context, check_ids, context_length
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.support.devices import input_device

_log = logging.getLogger(__name__)
MAX_BATCH = 64


class Decoder:
    """Decodes up to `batch` sequences of a causal language model together.

    batch:  most sequences, 1 to 64.
    length: most tokens of a sequence, prompt and new ones together; None: the model's context.
            Memory for keys and values grows with the tokens, 256 at first and then twice as many
            each time, and never beyond `length`.
    compiled: on a GPU with Triton, torch.compile fuses what lies between the linears of a step
            before its graph is captured: 15 to 20 s once for each size of batch and cache.
            Elsewhere without effect.

    A model without a context has no limit, if `length` is None.

    runtime says how a step is computed, and `reason` why not otherwise:
        "cpu"           all blocks, the head and the likeliest token in one call of C++. For a
                        model that optimize_for_inference has packed, if its blocks are of the
                        common form: RMSNorm or LayerNorm, grouped attention with rotary
                        embeddings, a gated or plain MLP. They are recognised by what they
                        compute, and held against the model's own modules.
        "cuda graph"    a GPU replays all of the model's modules at once, over a static cache.
        "transformers"  by the model's own modules. Any model, on any device.

    The weights stay the model's: two decoders of one model share them. A model that is moved or
    restored goes on as it then is; a parameter that is changed counts from the next prompt on. (A
    head that optimize_for_inference has left plain, as its weight is that of an unusual embedding,
    is packed once more for the steps.) The model must be in eval mode while tokens are made.
    Raises TypeError or ValueError for a model that can't generate, or an argument out of its range.

    Example:
        decoder = Decoder(model, batch=2)
        logits = decoder.prefill(torch.tensor([[5, 6, 7], [8, 9, 10]]))  # [2, words]
        for _ in range(4):
            logits = decoder.step(decoder.likeliest)
    """

    def __init__(
        self, model: nn.Module, batch: int = 1, length: int | None = None, compiled: bool = False
    ) -> None:
        check_model(model, "generate")
        if not isinstance(batch, int) or not 1 <= batch <= MAX_BATCH:
            raise ValueError(f"batch must be an int from 1 to {MAX_BATCH}, got {batch!r}")
        if not isinstance(compiled, bool):
            raise ValueError(f"compiled must be True or False, got {compiled!r}")
        if length is not None:
            if not isinstance(length, int) or length < 1:
                raise ValueError(f"length must be a positive int or None, got {length!r}")
            check_context(model, length)
        self.model, self.batch, self.compiled = model, batch, compiled
        self.length = context_length(model) if length is None else length
        self._runtime = self._best_runtime()
        self.reset()

    def __reduce__(self):
        """A copy, of any kind, has a runtime of its own and no sequences."""
        return Decoder, (self.model, self.batch, self.length, self.compiled)

    @property
    def runtime(self) -> str:
        """How a step is computed."""
        return self._runtime.name

    @property
    def tokens(self) -> int:
        """How many tokens each sequence has so far, padding included."""
        return self._tokens

    @property
    def likeliest(self) -> Tensor:
        """int64 [n]: the likeliest token after each sequence, the first of equals."""
        if self._logits is None:
            raise RuntimeError("prefill(ids) must come before a step")
        known = getattr(self._runtime, "likeliest", None)
        return self._logits.argmax(-1) if known is None else known

    def reset(self) -> None:
        """Forget all sequences."""
        self._runtime.reset()
        self._tokens = 0
        self._logits: Tensor | None = None

    @torch.no_grad()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Begin new sequences with these prompts; what was there before is forgotten.

        ids:            int64 [n, L], 1 <= n <= batch. Shorter prompts are padded on the left.
        attention_mask: [n, L], 0 where ids are padding; None: there is none.
        Returns logits [n, words] of the token after each prompt, in the model's dtype.

        Raises ValueError for a mask that is not padding on the left, ids that are no tokens of the
        model, or more of them than `length`.
        """
        mask = _checked_mask(ids, attention_mask)
        if not 1 <= len(ids) <= self.batch:
            raise ValueError(f"ids must have 1 to {self.batch} rows, the batch, got {len(ids)}")
        check_ids(self.model, ids, "ids")
        self._check_length(ids.shape[1], "ids have")
        device = input_device(self.model)
        self.reset()
        ids, mask = ids.to(device, torch.int64), mask.to(device)
        if self._is_outdated:
            self._runtime = self._best_runtime()
        try:
            self._logits = self._runtime.prefill(ids, mask)
        except Changed:
            self._runtime = self._best_runtime()
            self._logits = self._runtime.prefill(ids, mask)
        self._tokens = ids.shape[1]
        return self._logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence: int64 [n] -> logits [n, words] of the token after it.

        Raises ValueError for tokens of another shape, and for one more than `length` allows.
        """
        if self._logits is None:
            raise RuntimeError("prefill(ids) must come before a step")
        shape = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        if shape != [len(self._logits)]:
            n = len(self._logits)
            raise ValueError(f"tokens must be [{n}], one a sequence, got {shape}")
        is_known = tokens is self._runtime.likeliest
        # On a GPU the question would wait for the step before.
        if not is_known and tokens.device.type == "cpu":
            check_ids(self.model, tokens, "tokens")
        self._check_length(self._tokens + 1, "a step leads to")
        return self._step(tokens.to(self._logits.device, torch.int64))

    @torch.no_grad()
    def _step(self, tokens: Tensor) -> Tensor:
        """step() of tokens that are known to be fit: the model's own are."""
        try:
            self._logits = self._runtime.step(tokens)
        except Changed as change:
            assert isinstance(self._runtime, Native)
            self._fall_back(str(change))
            self._runtime, self._is_outdated = self._runtime.as_modules(), True
            self._logits = self._runtime.step(tokens)
        self._tokens += 1
        return self._logits

    def stream(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        ends: Collection[int] = (),
    ) -> Iterator[Tensor]:
        """Yield the next token of each sequence, int64 [n], up to max_new_tokens times.

        temperature: 0 takes the likeliest token; above 0, tokens are drawn by torch's random state.
        top_p:       draw from the likeliest tokens that together have this probability.
        ends:        tokens that end a sequence. A sequence that has ended repeats its end, and when
                     all have, the iterator does.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        check_sampling(temperature, top_p)
        self._check_length(ids.shape[-1] + max_new_tokens, "ids and max_new_tokens are")
        shape_logits = _shaping(temperature, top_p)
        with eval_mode(self.model):
            logits = self.prefill(ids, attention_mask)
            stops, ended, last = frozenset(ends), [False], ids[:, -1]
            for count in range(1, max_new_tokens + 1):
                tokens = self.likeliest if shape_logits is None else _drawn(shape_logits(logits))
                if any(ended):
                    tokens = torch.where(torch.tensor(ended, device=tokens.device), last, tokens)
                yield tokens
                if stops:  # On a GPU the question waits for the step.
                    ended = [token in stops for token in tokens.tolist()]
                if count == max_new_tokens or all(ended):
                    return
                last, logits = tokens, self._step(tokens)

    def _best_runtime(self) -> CudaGraphs | Modules:
        """What computes the steps; sets `reason`."""
        self.reason, self._is_outdated = "", False
        with eval_mode(self.model):
            if input_device(self.model).type == "cuda":
                reason = cuda_graph.why_not(self.model)
                if not reason:
                    compiled = self.compiled and has_triton()
                    if self.compiled and not compiled:
                        _log.warning("Decoder: compiled=True needs Triton: steps stay as they are")
                    return CudaGraphs(self.model, compiled=compiled)
            else:
                try:
                    return Native(self.model, self.batch, self.length)
                except NotRecognised as error:
                    reason = str(error)
        self._fall_back(reason)
        return Modules(self.model)

    def _fall_back(self, reason: str) -> None:
        self.reason = reason
        _log.info("Decoder: by the model's own modules: %s", reason)

    def _check_length(self, tokens: int, what: str) -> None:
        if self.length is not None and tokens > self.length:
            raise ValueError(
                f"{what} {tokens} tokens, but length, the decoder's limit, is {self.length}"
            )


def _checked_mask(ids: Tensor, mask: Tensor | None) -> Tensor:
    """int64 [n, L]: the mask, or ones."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or 0 in ids.shape:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids must be token ids [n >= 1, L >= 1], got {got}")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.int64)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be {list(ids.shape)} as ids, got {list(mask.shape)}")
    mask = (mask != 0).long()
    if not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
        raise ValueError(
            "attention_mask must be zeros on the left and then ones in each row: pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return mask


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ValueError unless tokens can be drawn so."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be 0 (greedy) or positive and finite, got {temperature}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _shaping(temperature: float, top_p: float):
    """logits [n, words] -> those that tokens are drawn from; None at temperature 0."""
    if not temperature:
        return None
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return lambda logits: processors(None, logits.float())


def _drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]
