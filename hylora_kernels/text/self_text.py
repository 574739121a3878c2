"""Text that a model writes itself: half of it raw, half as conversations.

For a model whose training data nobody has, its own text says what it was trained on. The method is
that of data-free quantization (LLM-QAT, arXiv:2305.17888) for raw text, and Magpie's
(arXiv:2406.08464) for conversations: behind the header of the user's turn the model writes the
question, too.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.inference.decoder import Decoder
from hylora_kernels.inference.optimize import optimized_for_inference
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import context_length, end_tokens
from hylora_kernels.model.modules import eval_mode, is_offloaded, model_fingerprint
from hylora_kernels.support.cache import (
    cache_dir,
    cache_root,
    kept_if_possible,
    load_tensors,
    save_tensors,
)
from hylora_kernels.support.console import note
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.text.blocks import tokenizer_rules
from hylora_kernels.text.writer import Vocabulary, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("calibration", "recovery", "test")
# Blocks that are written at once. A step on a GPU waits for the weights, and more rows cost little.
# A CPU computes: of SmolLM2 in float32 a core writes 103, 150 and 165 tokens a second at 8, 16 and
# 32 rows, and a caller mostly wants about 10 blocks.
ROWS_ON_CPU = 16
ROWS = 32


def self_blocks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int = 512,
    part: str = "calibration",
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Token ids [count, length], int64, on the CPU, that the model writes at temperature 1.

    length: at most the model's context; a longer one is cut to it, which a line on stderr says.
    part:   "calibration", "recovery" or "test": three texts that have nothing in common.

    Even blocks are raw: a word at random, what the model writes after it, and after the end of a
    text another word at random. Odd blocks are conversations by the tokenizer's chat template,
    questions and answers; without a template all blocks are raw.

    Block i is the same for every `count`. Blocks are written in batches, of 16 on a CPU and of 32
    elsewhere, and each batch is cached under the fingerprint of the model and its tokenizer; an
    interrupted call goes on behind the last finished batch. Nothing is cached of an offloaded
    model. The model is left as it was, and so is torch's random state.

    Raises ValueError naming an argument out of its range, FloatingPointError if the model's logits
    are not finite.

        self_blocks(model, tokenizer, count=64)
    """
    check_model(model, "generate")
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps it; steps are a Decoder's.
    if tokenizer is None:
        raise ValueError("tokenizer must be given, got None")
    for name, value, least in (("count", count, 1), ("length", length, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    context = context_length(model)
    if context is not None and length > context:
        note(
            f"self: blocks of {context} tokens, the model's context, where {length} were asked for"
        )
        length = context
    stream = Stream(model, tokenizer, length, part, seed)
    return torch.cat(list(stream.batches(-(-count // stream.rows), progress)))[:count]


class Stream:
    """The blocks of one model, length, part and seed, in batches of `rows` that the cache keeps."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        part: str,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.rows = ROWS_ON_CPU if input_device(model).type == "cpu" else ROWS
        self.draws: dict[str, Any] = {"part": part, "seed": seed}
        self._decoder: Decoder | None = None
        self.files = None if is_offloaded(model) else f"self-{self._fingerprint()}"

    def _fingerprint(self) -> str:
        return fingerprint(
            model=model_fingerprint(self.model),
            tokenizer=tokenizer_rules(self.tokenizer),
            template=str(getattr(self.tokenizer, "chat_template", None)),
            ends=end_tokens(self.model, self.tokenizer),
            length=self.length,
            rows=self.rows,
            **self.draws,
        )

    def batches(self, count: int, progress: bool) -> Iterator[Tensor]:
        """The first `count` batches, int64 [rows, length] each, found or written."""
        found = [self._find(number) for number in range(count)]
        missing = sum(ids is None for ids in found)
        bar = tqdm(
            desc="the model's own text",
            total=missing * self.rows * self.length,
            unit=" tokens",
            unit_scale=True,
            disable=not progress or not missing,
            leave=False,
        )
        with bar, eval_mode(self.model), contextlib.ExitStack() as self._undo:
            vocabulary = Vocabulary.of(self.model, self.tokenizer, self.length) if missing else None
            for number, ids in enumerate(found):
                if ids is None:
                    assert vocabulary is not None
                    ids = self._write(number, vocabulary, bar)
                    self._keep(number, ids)
                yield ids

    def _new_decoder(self) -> Decoder:
        """Of the model packed for inference, until all is written, where a step is one call of C++
        then."""
        in_one_place = not any(hasattr(module, "_hf_hook") for module in self.model.modules())
        if in_one_place and input_device(self.model).type == "cpu":
            with contextlib.ExitStack() as undo, contextlib.suppress(RuntimeError):
                # Some models write to their weights, which raises (RWKV).
                undo.enter_context(optimized_for_inference(self.model))
                decoder = Decoder(self.model, self.rows, self.length)
                if decoder.runtime == "cpu":
                    self._undo.push(undo.pop_all())
                    return decoder
        return Decoder(self.model, self.rows, self.length)

    def _find(self, number: int) -> Tensor | None:
        if self.files is None:
            return None
        file = cache_root() / "tokens" / self.files / f"{number}.safetensors"
        tensors = load_tensors(file, f"{self.files}/{number}")
        return None if tensors is None else tensors["ids"].long()

    def _keep(self, number: int, ids: Tensor) -> None:
        if self.files is not None:
            with kept_if_possible("the model's own text"):
                file = cache_dir("tokens", self.files) / f"{number}.safetensors"
                save_tensors(file, {"ids": ids.int()}, f"{self.files}/{number}")

    def _write(self, number: int, vocabulary: Vocabulary, bar: tqdm) -> Tensor:
        """Batch `number`, always of `rows` blocks: products of fewer rows round in another way, and
        one rounding can change all tokens after it."""
        begun = bar.n
        try:
            if self._decoder is None:
                self._decoder = self._new_decoder()
            return self._blocks(number, vocabulary, bar, self._decoder.prefill, self._decoder.step)
        except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # Some models can't be called with the cache that transformers makes for them (BLT).
            reason = f"{type(error).__name__}: {error}"
            note(f"self: written without a key-value cache, which takes long; with it {reason}")
            bar.update(begun - bar.n)
            again = self._reads_all_again()
            return self._blocks(number, vocabulary, bar, again, again)

    def _reads_all_again(self) -> Callable[[Tensor], Tensor]:
        """Tokens [rows], or the first ones [rows, 1] -> logits [rows, words] behind all so far."""
        takes_use_cache = "use_cache" in inspect.signature(self.model.forward).parameters
        options = {"use_cache": False} if takes_use_cache else {}
        ids = torch.empty(self.rows, 0, dtype=torch.int64, device=input_device(self.model))

        def again(tokens: Tensor) -> Tensor:
            nonlocal ids
            ids = torch.cat((ids, tokens.view(self.rows, 1)), 1)
            return self.model(input_ids=ids, **options).logits[:, -1]

        return again

    @torch.no_grad()
    def _blocks(
        self,
        number: int,
        vocabulary: Vocabulary,
        bar: tqdm,
        begin: Callable[[Tensor], Tensor],
        step: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """begin: the first tokens [rows, 1], and step: those of one place [rows], to the logits
        [rows, words] of the tokens after them."""
        device = input_device(self.model)
        generator = torch.Generator(device)
        generator.manual_seed(int(fingerprint(batch=number, **self.draws)[:15], 16))
        writer = Writer(vocabulary, self.rows, generator)
        bar.update(self.rows)
        written = [writer.first[:, 0]]
        logits = begin(writer.first.to(device))
        while True:
            written.append(writer.next(logits))
            bar.update(self.rows)
            if len(written) == self.length:
                return torch.stack(written, 1)
            logits = step(written[-1].to(device))
