"""Draws the tokens of a text that a model writes, and forces those that are not its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels.model.context import end_tokens, vocabulary_size
from hylora_kernels.support.console import note
from hylora_kernels.text.turns import Turns, turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # Words that are drawn from at once: about the root of a large vocabulary.


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model's own text.

    words:   tokens that are drawn are below it. An embedding may have rows that are no words, and a
             tokenizer words that the embedding lacks.
    plain:   those that a text may begin with: none with a meaning of its own.
    start:   in front of every text, if the tokenizer puts a token there.
    ends:    end a text, or a turn.
    turns:   None if there is no conversation: without a chat template, with one that does not take
             plain questions and answers or uses tokens that the model lacks, and if it leaves less
             than half a block for contents.
    """

    words: int
    plain: list[int]
    start: list[int]
    ends: set[int]
    turns: Turns | None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int) -> Vocabulary:
        """For blocks of `length` tokens. A chat template that is no use is said on stderr."""
        words = min(len(tokenizer), vocabulary_size(model))
        ends = {*tokenizer.all_special_ids, *end_tokens(model, tokenizer)}
        plain = {i for i in tokenizer.get_vocab().values() if i < words} - ends
        start = [i for i in start_of_text(tokenizer) if i < words]
        turns = turns_of(tokenizer)
        if turns is not None and not turns.fit(words, length):
            turns = None
        if turns is None and getattr(tokenizer, "chat_template", None):
            note(f"self: all raw, since {length} tokens hold no conversation of the chat template")
        return cls(words, sorted(plain) or list(range(words)), start, ends, turns)


class Writer:
    """Chooses the next token of each row.

    Even rows are raw text; odd ones are conversations, if there are any.

    first: int64 [rows, 1], the tokens that the rows begin with.
    """

    def __init__(self, vocabulary: Vocabulary, rows: int, generator: torch.Generator) -> None:
        self.words, self.plain = vocabulary.words, vocabulary.plain
        self.generator, self.tokens = generator, 1
        start, ends, turns = vocabulary.start, vocabulary.ends, vocabulary.turns
        self.rows = [
            RawText(start, ends, self._any_word)
            if turns is None or row % 2 == 0
            else Conversation(turns, ends)
            for row in range(rows)
        ]
        self.first = torch.tensor([[row.next(None)] for row in self.rows], device="cpu")

    def _any_word(self) -> int:
        device = self.generator.device
        chosen = torch.randint(len(self.plain), (1,), generator=self.generator, device=device)
        return self.plain[int(chosen)]

    def next(self, logits: Tensor) -> Tensor:
        """[rows, words] -> the next token of each row, int64 [rows], on the CPU."""
        probabilities = logits[:, : self.words].float().softmax(-1)
        # One logit that is not finite makes all of its row NaN; -inf alone is a probability of 0.
        if not probabilities[:, 0].isfinite().all():
            raise FloatingPointError(
                f"the model's logits are not finite behind {self.tokens} tokens of the text that it"
                " writes"
            )
        drawn = draw(probabilities, self.generator).tolist()
        self.tokens += 1
        pairs = zip(self.rows, drawn, strict=True)
        return torch.tensor([row.next(token) for row, token in pairs], device="cpu")


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """[rows, words], of any sum -> a word for each row [rows], in two steps: a chunk of words, and
    a word in it.

    multinomial draws a random number for each word: 44 ms for 32 rows of 49152 words on one core,
    where all else that a step does with them takes 10 ms.
    """
    words = probabilities.shape[1]
    chunks = F.pad(probabilities, (0, -words % CHUNK)).unflatten(1, (-1, CHUNK))
    chunk = torch.multinomial(chunks.sum(-1), 1, generator=generator)
    inside = chunks.take_along_dim(chunk[..., None], dim=1)[:, 0]
    word = torch.multinomial(inside, 1, generator=generator)
    return (chunk * CHUNK + word)[:, 0]


class RawText:
    """A text from a word at random on; at its end another one begins.

    start:    tokens in front of a text.
    ends:     tokens that end it.
    any_word: draws a token at random.
    """

    def __init__(self, start: list[int], ends: set[int], any_word: Callable[[], int]) -> None:
        self.start, self.ends, self.any_word = start, ends, any_word
        self.forced = deque([*start, any_word()])

    def next(self, drawn: int | None) -> int:
        """The next token, where the model has drawn `drawn`."""
        if self.forced:
            return self.forced.popleft()
        assert drawn is not None
        if drawn in self.ends:
            self.forced.extend([*self.start, self.any_word()])
        return drawn


class Conversation:
    """Questions and answers; the model ends each turn, and the header of the next is forced.

    ends: tokens that end a turn, besides those that follow it in `turns`.
    """

    def __init__(self, turns: Turns, ends: set[int]) -> None:
        self.turns, self.ends = turns, ends
        self.forced = deque(turns.opening)
        self.speaker = 0
        self.written: list[int] = []  # in this turn

    def next(self, drawn: int | None) -> int:
        """The next token, where the model has drawn `drawn`."""
        if self.forced:
            return self.forced.popleft()
        assert drawn is not None
        after = self.turns.after[self.speaker]
        self.written.append(drawn)
        if drawn in self.ends:
            # Another end than the template's, such as that of a text, is replaced by it.
            known = after.index(drawn) + 1 if drawn in after else 0
        elif self.written[-len(after) :] == after:  # A template without special tokens.
            known = len(after)
        else:
            return drawn
        self.forced.extend(after[known:])
        self.speaker, self.written = 1 - self.speaker, []
        return drawn if known else self.forced.popleft()


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts in front of every text, if it does."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    has_one = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ids[:1] if has_one else []
