"""Text as blocks of tokens, which are cached for long texts."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from hylora_kernels.support.cache import (
    cache_dir,
    cache_root,
    kept_if_possible,
    load_tensors,
    save_tensors,
)
from hylora_kernels.support.console import note
from hylora_kernels.text.sources import HELD_OUT, check_split, read_text, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCKS = 128  # Of a text, for a calibration that is not told how many.
PIECE = 8_000_000  # Characters that are tokenized at once.
CACHED_FROM = 500_000  # Characters: the tokens of longer texts, half a second's work, are cached.


def token_blocks(
    data: Tensor | list[str] | str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int | None = 512,
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    column: str | None = None,
    longest: int = 2048,
    last: bool = False,
) -> Tensor:
    """Contiguous blocks of tokens [n, length], int64, on the CPU.

    data:      token ids [n, L], which are the blocks, of any L; or a list of texts, a name
               (text.sources.NAMED), a file (text.files.LISTED), or a hub id "name" or
               "name:config". A path is taken literally. text.rows.texts_of says what is read of a
               table.
    tokenizer: needed unless `data` is token ids. No BOS or other special token is added.
    length:    tokens of a block; None: `longest`, or fewer if the text has fewer.
    split:     "train" or "test" of "brown"; these or "all" of "stdlib" and "code", whose modules
               for tests are text.stdlib.TEST_MODULES; any split of a hub id. Of a file and of
               "python-docs" "train" is all but the last tenth, "test" the last tenth, "all" both. A
               list of texts and token ids are read whole.
    limit:     the largest number of blocks: the first ones or, with a `seed`, the first ones of a
               permutation. If there are fewer, a line on stderr says so, if `progress`.
    column:    of a table.
    last:      take the last `limit` blocks, in place of the first: both have none in common, unless
               there are too few, which a line on stderr says.

    The texts are joined by blank lines, tokenized and cut; a remainder shorter than `length` is
    dropped. Raises ValueError or TypeError naming the argument, and the number of tokens if they
    are less than one block.

        token_blocks("brown", tokenizer, length=512, split="test", limit=16)
    """
    for name, value, least in (("length", length, 2), ("limit", limit, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"seed must be an int or None, got {seed!r}")
    if isinstance(data, Tensor | list | tuple):
        check_split(split, data)
    if isinstance(data, Tensor):
        blocks = _checked_ids(data, tokenizer)
    else:
        if tokenizer is None:
            raise ValueError("tokenizer must be given unless data is a tensor of token ids")
        wanted = limit * length if limit is not None and length and seed is None else None
        ids = _tokenize(read_text(data, split, column, tokenizer), tokenizer, wanted, progress)
        length = max(2, min(longest, len(ids))) if length is None else length
        if len(ids) < length:
            shorter = f"take length={len(ids)} or " if len(ids) > 1 else "take "
            raise ValueError(
                f"data has {len(ids)} tokens, less than one block of {length}, in "
                f"{source_name(data, split)}: {shorter}a longer text"
            )
        blocks = ids[: len(ids) // length * length].view(-1, length)
    n, L = blocks.shape
    if limit is None:
        return blocks
    if progress and limit > n:
        note(f"{source_name(data, split)}: {n} blocks of {L} tokens, where {limit} were asked for")
    elif progress and last and limit + BLOCKS > n:
        note(
            f"{source_name(data, split)}: {n} blocks of {L} tokens are too few for {limit} that a "
            f"calibration on {BLOCKS} has not read"
        )
    if limit >= n:
        return blocks
    if seed is None:
        return (blocks[n - limit :] if last else blocks[:limit]).clone()
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(n, generator=generator, device="cpu")
    return blocks[chosen[n - limit :] if last else chosen[:limit]]


def hold_out(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """blocks [n >= 2, L] -> (all but the last tenth, the last tenth: at least one block).

    For a list of texts and token ids, which have no part for tests. Raises ValueError for n < 2.
    """
    n = len(blocks)
    if n < 2:
        raise ValueError(
            f"data has {n} block of {blocks.shape[1]} tokens, of which none can be held out: give "
            "test, or a longer text"
        )
    cut = n - max(1, round(n * HELD_OUT))
    return blocks[:cut], blocks[cut:]


def _checked_ids(ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"data must be int64 token ids, got {ids.dtype}")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"data must be token ids [n >= 1, L >= 2], got shape {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    most = len(tokenizer) if tokenizer is not None else high + 1
    if low < 0 or high >= most:
        raise ValueError(f"data must be token ids in [0, {most}), got {low} to {high}")
    return ids.to("cpu", torch.int64)


def _tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase, wanted: int | None, progress: bool
) -> Tensor:
    """The tokens of `text`: all, or at least the first `wanted`."""
    if len(text) < CACHED_FROM:
        return _encode(text, tokenizer)
    name = _fingerprint(text, tokenizer)
    kept = load_tensors(cache_root() / "tokens" / f"{name}.safetensors", name)
    if kept is not None:
        return kept["ids"].long()
    pieces, ids, count = _pieces(text), [], 0
    for piece in tqdm(pieces, "tokenizing", unit="piece", disable=not progress or len(pieces) < 2):
        ids.append(_encode(piece, tokenizer))
        count += len(ids[-1])
        if wanted is not None and count >= wanted and len(ids) < len(pieces):
            return torch.cat(ids)
    found = torch.cat(ids)
    with kept_if_possible("tokens"):
        save_tensors(cache_dir("tokens") / f"{name}.safetensors", {"ids": found.int()}, name)
    return found


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # verbose=False: no warning that the text is longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _pieces(text: str) -> list[str]:
    """`text` cut after blank lines into pieces of about PIECE characters."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = text.find("\n\n", start + PIECE)
        if end < 0:
            break
        pieces.append(text[start : end + 2])
        start = end + 2
    return [*pieces, text[start:]]


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that the tokens of a text depend on, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    # A slow tokenizer's rules stand in its arguments; a fast one is told to split special tokens
    # (or not) at each call.
    options = tokenizer.init_kwargs | {"split": tokenizer.split_special_tokens}
    options.pop("name_or_path", None)  # A copy beside a compressed model gives the same tokens.
    return rules + json.dumps(options, sort_keys=True, default=str)


def _fingerprint(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    rules = tokenizer_rules(tokenizer)
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {PIECE} {rules}".encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
