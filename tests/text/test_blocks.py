"""Tokens in blocks; long texts in pieces, whose tokens are cached."""

from __future__ import annotations

import pytest
import torch
from helpers.words import text_of, word_tokenizer
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hylora_kernels.support.cache import cache_dir
from hylora_kernels.text import blocks
from hylora_kernels.text.blocks import token_blocks


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


# -------------------------------------------------------------------------------- blocks of tokens


def test_blocks_are_contiguous_and_drop_the_remainder(tokenizer):
    found = token_blocks([text_of(*range(1, 12))], tokenizer, length=4)
    assert found.dtype == torch.int64
    assert found.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_texts_are_joined_by_a_blank_line(tokenizer):
    blank = "w3\n\nw4"  # One unknown word.
    assert token_blocks(["w1 w2 w3", "w4 w5 w6"], tokenizer, length=5).tolist() == [[1, 2, 0, 5, 6]]
    assert token_blocks([f"w1 w2 {blank} w5 w6"], tokenizer, length=5).tolist() == [[1, 2, 0, 5, 6]]


def test_limit_takes_the_first_and_a_seed_draws(tokenizer):
    text = [text_of(*(list(range(1, 41)) * 5))]
    everything = token_blocks(text, tokenizer, length=10)
    assert len(everything) == 20
    assert torch.equal(token_blocks(text, tokenizer, length=10, limit=3), everything[:3])
    everything = token_blocks([text_of(*range(1, 41))], tokenizer, length=4)
    drawn = [
        token_blocks([text_of(*range(1, 41))], tokenizer, length=4, limit=6, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    rows = {tuple(row) for row in everything.tolist()}
    assert len({tuple(row) for row in drawn[0].tolist()} & rows) == 6
    assert torch.equal(
        token_blocks([text_of(*range(1, 41))], tokenizer, length=4, limit=99, seed=0), everything
    )


def test_no_special_tokens_are_added(tokenizer):
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    assert adding("w5 w6")["input_ids"] == [1, 5, 6]
    assert token_blocks(["w5 w6"], adding, length=2).tolist() == [[5, 6]]


def test_token_ids_are_taken_as_they_are(tokenizer):
    ids = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert torch.equal(token_blocks(ids), ids.long())
    assert torch.equal(token_blocks(ids, tokenizer, length=512, limit=2), ids[:2].long())
    assert token_blocks(ids, limit=2, seed=3).shape == (2, 4)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(3, 4), TypeError, r"data must be int64 token ids, got torch\.float32"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"\[n >= 1, L >= 2\], got shape \[4\]"),
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, r"got shape \[0, 4\]"),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError, r"got shape \[4, 1\]"),
        (torch.tensor([[1, 41]]), ValueError, r"token ids in \[0, 41\), got 1 to 41"),
        (torch.tensor([[-1, 2]]), ValueError, r"token ids in \[0, 41\), got -1 to 2"),
    ],
)
def test_bad_token_ids(tokenizer, ids, error, message):
    with pytest.raises(error, match=message):
        token_blocks(ids, tokenizer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"length": 1}, ValueError, "length must be an int of at least 2, got 1"),
        ({"length": 2.5}, ValueError, r"length must be an int of at least 2, got 2\.5"),
        ({"limit": 0}, ValueError, "limit must be an int of at least 1, got 0"),
        ({"seed": "a"}, ValueError, "seed must be an int or None, got 'a'"),
        ({"length": 4}, ValueError, "data has 3 tokens, less than one block of 4"),
        ({"data": []}, ValueError, "data has 0 tokens"),
        ({"data": ["a", 5]}, TypeError, r"data\[1\] must be a str, got int"),
        ({"data": 5}, TypeError, "data must be a tensor of token ids, a list of str, a name or a"),
        ({"data": "brown", "split": "dev"}, ValueError, "split must be 'train' or 'test' for 'bro"),
        ({"tokenizer": None}, ValueError, "tokenizer must be given unless data is a tensor"),
    ],
)
def test_bad_arguments(tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        token_blocks(**{"data": ["w1 w2 w3"], "tokenizer": tokenizer, "length": 2} | arguments)


# -------------------------------------------------------------------- long texts: pieces and cache


@pytest.fixture
def all_texts_are_long(monkeypatch, tmp_path):
    """Every text is cut into pieces and its tokens are kept, in a cache that is empty at first."""
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(blocks, "CACHED_FROM", 10)


def test_long_text_is_tokenized_once_and_kept(tokenizer, monkeypatch, all_texts_are_long):
    text = [text_of(*range(1, 41)) + " kept"]
    wanted = token_blocks(text, tokenizer, length=4, limit=1)  # All of it is one piece.
    (kept,) = cache_dir("tokens").glob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_encode", lambda *_: pytest.fail("tokenized again"))
        first = token_blocks(text, tokenizer, length=4)
    assert len(first) == 10
    assert torch.equal(first[:1], wanted)
    kept.write_bytes(kept.read_bytes()[:50])
    assert torch.equal(token_blocks(text, tokenizer, length=4), first)
    assert len(kept.read_bytes()) > 50


def test_damaged_tokens_are_made_again(tokenizer, all_texts_are_long, capsys):
    text = [text_of(*range(1, 41))]
    first = token_blocks(text, tokenizer, length=4)
    (kept,) = cache_dir("tokens").glob("*.safetensors")
    whole = kept.read_bytes()
    other = {"ids": torch.zeros(40, dtype=torch.int32)}
    for damage in (whole[:-4], whole[:-1] + b"\7", bytes(len(whole)), save(other)):
        kept.write_bytes(damage)
        capsys.readouterr()
        assert torch.equal(token_blocks(text, tokenizer, length=4), first)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{kept} in the cache is damaged and made again")
        assert kept.read_bytes() == whole


def test_tokens_need_no_cache_that_can_be_written(
    tokenizer, all_texts_are_long, monkeypatch, capsys, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "file"))
    assert len(token_blocks([text_of(*range(1, 41))], tokenizer, length=4)) == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokens not kept: ") and "HYLORA_CACHE" in line


def test_the_tokenizers_options_are_in_the_key(tokenizer, all_texts_are_long, monkeypatch):
    text = text_of(*range(1, 41))
    names = {blocks._fingerprint(text, tokenizer)}
    monkeypatch.setattr(tokenizer, "split_special_tokens", True)
    names.add(blocks._fingerprint(text, tokenizer))
    monkeypatch.setitem(tokenizer.init_kwargs, "do_lower_case", True)
    names.add(blocks._fingerprint(text, tokenizer))
    names.add(blocks._fingerprint(text + " ", tokenizer))
    assert len(names) == 4


def test_another_tokenizer_or_text_has_its_own_tokens(tokenizer, all_texts_are_long):
    swapped = Tokenizer(models.WordLevel({"?": 0, "w2": 1, "w1": 2}, unk_token="?"))
    swapped.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    other = PreTrainedTokenizerFast(tokenizer_object=swapped, unk_token="?")
    text = ["w1 w2 w1 w2 w1"]
    assert token_blocks(text, tokenizer, length=5).tolist() == [[1, 2, 1, 2, 1]]
    assert token_blocks(text, other, length=5).tolist() == [[2, 1, 2, 1, 2]]
    assert token_blocks(["w2 w2 w1 w2 w1"], tokenizer, length=5).tolist() == [[2, 2, 1, 2, 1]]


def test_pieces_end_at_blank_lines_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(blocks, "PIECE", 20)
    for text in ("", "short", "a" * 50, "\n\n".join(["b" * 30] * 4), "c" * 21 + "\n\n" + "d" * 5):
        assert "".join(blocks._pieces(text)) == text
    pieces = blocks._pieces("\n\n".join(["b" * 30] * 4))
    assert [len(piece) for piece in pieces] == [32, 32, 32, 30]


def test_only_the_pieces_needed_are_tokenized(tokenizer, monkeypatch, all_texts_are_long):
    monkeypatch.setattr(blocks, "PIECE", 20)
    texts = [text_of(*range(1, 11))] * 5 + ["the end"]
    seen = []
    encode = blocks._encode
    monkeypatch.setattr(blocks, "_encode", lambda text, tok: seen.append(text) or encode(text, tok))
    first = token_blocks(texts, tokenizer, length=4, limit=3, progress=False)
    assert len(seen) == 2
    whole = token_blocks(texts, tokenizer, length=4, progress=False)
    assert len(seen) == 2 + 6
    assert torch.equal(first, whole[:3])


def test_a_seed_draws_from_all_pieces(tokenizer, monkeypatch, all_texts_are_long):
    monkeypatch.setattr(blocks, "PIECE", 20)
    texts = [text_of(*range(1, 11))] * 5 + ["the end of it"]
    whole = token_blocks(texts, tokenizer, length=4, progress=False)
    monkeypatch.setattr(blocks, "cache_dir", lambda part: cache_dir("tokens", "drawn"))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    drawn = token_blocks(texts, tokenizer, length=4, limit=3, seed=0, progress=False)
    assert torch.equal(drawn, whole[order[:3]])
