"""A tokenizer whose tokens are words, and texts of its words."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(1, 41)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; 0 is an unknown word or a blank line."""
    vocab = {word: i for i, word in enumerate(["?", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", model_max_length=8)


def text_of(*ids: int) -> str:
    """The words of these token ids."""
    return " ".join(WORDS[i - 1] for i in ids)
