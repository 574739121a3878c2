"""generate(): the text that continues a prompt, streamed as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from hylora_kernels.inference.decoder import Decoder, check_sampling
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_ids, context_length, end_tokens
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.seeding import forked_rng, seed_rng


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat: bool = False,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
) -> str:
    """The text that continues `prompt`: max_new_tokens tokens, or fewer if the model ends the text.

    temperature: 0 takes the likeliest token; above 0, tokens are sampled by `seed`.
    top_p:       sample from the likeliest tokens that together have this probability.
    chat:        put the prompt, as a user's message, into the tokenizer's chat template.
    stream:      called with each piece of text as soon as no later token can change it; the pieces
                 together are the result.

    Steps are a Decoder's where it computes them whole, and transformers' generate elsewhere. Of the
    model's own generation settings only its end-of-text tokens count, and the tokenizer's is
    one too. The caller's random state is left unchanged.

    Raises ValueError for an empty prompt, a prompt beyond the model's context, an argument out of
    its range, a missing tokenizer or one without a chat template.

    Example:
        text = generate(model, tokenizer, "Once upon a time", max_new_tokens=8)
    """
    check_model(model, "generate")
    _check(tokenizer, prompt, max_new_tokens, temperature, top_p, chat)
    ids = _encode(tokenizer, prompt, chat)
    if not ids.numel():
        raise ValueError(f"prompt must have at least one token, got none of {prompt!r}")
    check_ids(model, ids, "prompt")
    context = context_length(model)
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"prompt has {ids.shape[1]} tokens, which with max_new_tokens={max_new_tokens} "
            f"is beyond the model's context of {context}"
        )
    device = input_device(model)
    ends = end_tokens(model, tokenizer)
    pieces = _Pieces(tokenizer, stream)
    decoder = Decoder(model, length=ids.shape[1] + max_new_tokens)
    with eval_mode(model), forked_rng(device):
        seed_rng(device, seed)
        if decoder.runtime == "transformers":
            _by_transformers(
                *(model, tokenizer, ids.to(device), pieces),
                *(max_new_tokens, temperature, top_p, ends),
            )
        else:
            pieces.put(ids)
            for token in decoder.stream(ids, None, max_new_tokens, temperature, top_p, ends):
                pieces.put(token)
            pieces.end()
    return "".join(pieces.texts)


def _by_transformers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    pieces: _Pieces,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: list[int],
) -> None:
    """transformers' generate with every setting given: it knows what each architecture needs."""
    padding = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        streamer=pieces,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if temperature else None,
        top_k=0 if temperature else None,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        # One prompt needs no padding, but without a token for it transformers warns.
        pad_token_id=next(iter([*padding, *ends]), None),
    )


class _Pieces(BaseStreamer):
    """Turns tokens into pieces of text, each as soon as no later token can change it.

    A character may take several tokens. They are decoded together with the piece before them:
    some tokenizers drop the leading space of a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], object] | None
    ) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.has_prompt = False  # put() gets the prompt first
        self.before = self.sent = 0  # tokens[before:sent] are the last piece

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, or the next token ids of any shape."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.tokens += value.flatten().tolist()
        text = self._decode(self.before, None)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._send(text)

    def end(self) -> None:
        """Send the rest, even if its last character is not complete."""
        self._send(self._decode(self.before, None))

    def _send(self, text: str) -> None:
        piece = text[len(self._decode(self.before, self.sent)) :]
        self.before, self.sent = self.sent, len(self.tokens)
        if piece:
            self.texts.append(piece)
            if self.stream is not None:
                self.stream(piece)

    def _decode(self, start: int, stop: int | None) -> str:
        # One list of tokens decodes to one str; its annotation is that of many lists as well.
        return self.tokenizer.decode(  # type: ignore[return-value]
            self.tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids int64 [1, n]."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids


def _check(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    chat: bool,
) -> None:
    if tokenizer is None:
        raise ValueError("tokenizer must be given to generate text, got None")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt must be a text that is not empty, got {prompt!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_sampling(temperature, top_p)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat needs a tokenizer with a chat template, which this one lacks")
