"""Mixes of texts: what one text stands for, how the blocks lie, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.words import text_of, word_tokenizer

from hylora_kernels.text import self_text, stdlib
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.mix import Part, calibrated_on, default_mix, interleave, mixed_blocks
from hylora_kernels.text.sources import SPLIT_TEXTS, held_out, is_mix, texts_in

IDS = tiny.tokens(30, 6, words=41)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture
def library(monkeypatch):
    """A small standard library: 200 times word 40."""
    train = {"train": text_of(*[40] * 200)}
    monkeypatch.setitem(SPLIT_TEXTS, "stdlib", train.__getitem__)


# ----------------------------------------------------------------------- what one text stands for


def test_a_users_text_is_read_with_the_models_own_and_the_standard_library():
    others = [("self", 64), ("stdlib", 32)]
    for text in ("a.txt", "brown", "code", ["one", "two"]):
        assert default_mix(text) == [(text, 128), *others]
    assert default_mix() == others
    assert default_mix("a.txt", 1) == [("a.txt", 1), ("self", 1), ("stdlib", 1)]


def test_what_is_not_broadened():
    assert default_mix(IDS, 7) == [(IDS, 7)]
    assert default_mix("self", 7) == [("self", 7)] and default_mix("stdlib", 7) == [("stdlib", 7)]
    assert default_mix([("a.txt", 5)]) == [("a.txt", 5)]


def test_a_source_without_a_number_gets_the_usual_one():
    asked = [("a.txt", None), ("self", None), (["x"], 3), ("stdlib", None)]
    assert default_mix(asked, 8) == [("a.txt", 8), ("self", 4), (["x"], 3), ("stdlib", 2)]


# ------------------------------------------------------------------------------ how the blocks lie


@pytest.mark.parametrize("counts", [(8, 4, 2), (128, 64, 32), (1, 9), (5, 5), (3,), (2, 7, 1, 1)])
def test_any_prefix_holds_all_sources_in_proportion(counts):
    sources = [
        torch.full((n, 2), i) * 1000 + torch.arange(n)[:, None] for i, n in enumerate(counts)
    ]
    found = interleave(sources)
    assert found.shape == (sum(counts), 2)
    for i, n in enumerate(counts):
        rows = found[:, 0] // 1000 == i
        assert torch.equal(found[rows], sources[i])  # in their order
        for length in range(1, len(found) + 1):
            share = length * n / sum(counts)
            assert abs(int(rows[:length].sum()) - share) <= 1 + 0.5 * len(counts) / 2


def test_one_source_is_what_token_blocks_gives(tokenizer, model):
    text = [text_of(*range(1, 41), *range(1, 41))]
    for source, count in ((text, 5), (text, 99), (IDS, 7), (IDS, 99)):
        mix = [(source, count)]
        ids, parts = mixed_blocks(mix, model, tokenizer, 4, seed=3, progress=False)
        assert torch.equal(ids, token_blocks(source, tokenizer, 4, "train", count, 3))
        assert parts == [Part(type(source).__name__, len(ids), ids.numel(), count)]


def test_each_part_says_its_name_blocks_and_tokens(tokenizer, model, library, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text_of(*range(1, 41)) + " w1")
    ids, parts = mixed_blocks(path, model, tokenizer, 6, blocks=8, progress=False)
    assert parts == [
        Part(f"{path}, first 90%", 6, 36, 8),
        Part("self", 4, 24, 4),
        Part("stdlib, train", 2, 12, 2),
    ]
    assert ids.shape == (12, 6) and ids.dtype == torch.int64
    assert calibrated_on(parts) == (
        f"calibrated on {path}, first 90%: 36 tokens in 6 blocks of 8 asked for; "
        "self: 24 tokens in 4 blocks; stdlib, train: 12 tokens in 2 blocks"
    )
    assert calibrated_on([]) == ""


def test_calibration_and_recovery_share_no_block(tokenizer, model, capsys):
    ids = torch.arange(1, 41)[:, None].repeat(5, 6)
    ids[:, 1] = torch.arange(200) // 40
    seen = {}
    for part in ("calibration", "recovery"):
        found, _ = mixed_blocks([(ids, 70), ("self", 5)], model, tokenizer, 6, part)
        seen[part] = {tuple(row) for row in found.tolist()}
        assert len(seen[part]) == 75
    assert not seen["calibration"] & seen["recovery"]
    assert "too few" not in capsys.readouterr().err


def test_a_text_too_short_for_both_parts_says_so(tokenizer, capsys):
    mixed_blocks([(IDS, 20)], None, tokenizer, 6, "recovery")
    assert capsys.readouterr().err == (
        "Tensor: 30 blocks of 6 tokens are too few for 20 that a calibration on 128 has not read\n"
    )


def test_the_models_own_text_is_its_cached_stream(tokenizer, model):
    ids, _ = mixed_blocks([("self", 3)], model, tokenizer, 8, "recovery", seed=4, progress=False)
    own = self_text.self_blocks(model, tokenizer, 3, 8, "recovery", 4, progress=False)
    assert torch.equal(ids, own)


def test_the_library_beside_a_text_is_read_in_its_part_for_training(tokenizer, model, monkeypatch):
    read = []
    monkeypatch.setitem(
        SPLIT_TEXTS, "stdlib", lambda split: read.append(split) or text_of(*range(1, 20))
    )
    text = [text_of(*range(1, 20))]
    for mix in ([(text, 1), ("stdlib", 1)], [("stdlib", 1)]):
        mixed_blocks(mix, model, tokenizer, 4, split="all", progress=False)
    assert read == ["train", "all"]


def test_a_column_is_of_the_tables(tokenizer, model, library, tmp_path):
    (tmp_path / "a.csv").write_text(f"x,y\n{text_of(*range(1, 30))},no\n")
    mix = [(tmp_path / "a.csv", 2), ("stdlib", 1)]
    _, parts = mixed_blocks(mix, model, tokenizer, 4, column="x", progress=False)
    assert [part.blocks for part in parts] == [2, 1]
    with pytest.raises(ValueError, match="column='x' goes with a table, and data 'stdlib' has no"):
        mixed_blocks([("stdlib", 1)], model, tokenizer, 4, column="x")


# ------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("mix", "error", "message"),
    [
        (
            [("a.txt", 0)],
            ValueError,
            r"data\[0\] must have an int of at least 1, or None, .*got 0 f",
        ),
        ([("self", 2), ("a.txt", "3")], ValueError, r"data\[1\] .*got '3' for 'a.txt'"),
        ([("self", True)], ValueError, r"data\[0\] must have an int .*got True for 'self'"),
        ([("a.txt", 2.0)], ValueError, "got 2.0 for 'a.txt'"),
        ([("self", 3), "a.txt"], TypeError, r"data\[1\] must be \(source, blocks\), .*got 'a.txt'"),
        ([("self", 3, 4)], TypeError, r"data\[0\] must be \(source, blocks\)"),
        ([("self", 3), ("a.txt", 2), ("./a.txt", 2)], ValueError, r"data\[2\] is './a.txt' again"),
        ([("self", 3), ("self", None)], ValueError, r"data\[1\] is 'self' again"),
        ([("none.txt", 3)], ValueError, "data 'none.txt' does not exist"),
        (
            [(7, 3)],
            TypeError,
            "data must be a tensor of token ids, a list of str, a name or a path",
        ),
        (
            [(IDS, 3), ("self", 2)],
            ValueError,
            "self has blocks of 4 tokens, and Tensor of 6: a mix",
        ),
    ],
)
def test_a_mix_that_is_none_is_refused(
    mix, error, message, model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(text_of(*range(1, 30)))
    with pytest.raises(error, match=message):
        mixed_blocks(mix, model, tokenizer, 4, progress=False)


def test_the_models_own_text_needs_a_model_and_its_context(model, tokenizer):
    for given in ((None, tokenizer), (model, None)):
        with pytest.raises(ValueError, match="'self' is text that a model writes: give the model"):
            mixed_blocks("self", *given, 4)
    with pytest.raises(ValueError, match="length must be at most 64, the model's context, got 65"):
        mixed_blocks("self", model, tokenizer, 65)
    with pytest.raises(ValueError, match="data 'self' is the text that a model writes"):
        token_blocks("self", tokenizer)
    with pytest.raises(ValueError, match=r"part must be one of .*got 'test'"):
        mixed_blocks([(IDS, 3)], model, tokenizer, part="test")


def test_nothing_is_written_where_a_text_can_not_be_read(model, tokenizer, monkeypatch):
    monkeypatch.setattr(self_text, "self_blocks", lambda *_: pytest.fail("the model wrote"))
    with pytest.raises(ValueError, match=r"data 'none\.txt' does not exist"):
        mixed_blocks([("self", 64), ("none.txt", 2)], model, tokenizer, 4)


def test_a_model_that_can_not_write_is_calibrated_on_the_rest(
    model, tokenizer, library, monkeypatch, capsys
):
    monkeypatch.setattr(self_text, "self_blocks", lambda *_: [][0])
    text = [text_of(*range(1, 41))]
    ids, parts = mixed_blocks(text, model, tokenizer, 4, blocks=4, seed=99, progress=False)
    assert [part.name for part in parts] == ["list", "stdlib, train"] and len(ids) == 5
    said = "self: left out, since the model can't write: IndexError: list index out of range\n"
    assert capsys.readouterr().err == said
    for asked in ("self", [(text, 2), ("self", 2)]):
        with pytest.raises(IndexError):
            mixed_blocks(asked, model, tokenizer, 4, seed=99, progress=False)


def test_logits_that_are_not_finite_are_not_passed_over(tokenizer):
    broken = tiny.llama()
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        mixed_blocks([text_of(*range(1, 41))], broken, tokenizer, 4, progress=False)


# --------------------------------------------------------------------------------- tests and mixes


def test_a_text_in_the_mix_is_tested_in_its_part_for_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    mix = [("./a.txt", 3), ("self", 2), ("python-docs", 1)]
    for test in ("a.txt", tmp_path / "a.txt", "python-docs"):
        assert held_out(test, "brown", mix) == (test, "test")
        assert held_out(test, mix) == (test, "test")
        assert held_out(test, "brown", [("code", 3)]) == (test, "all")
    assert held_out(IDS, "brown", [(IDS, 3)]) == (IDS, "test")
    assert is_mix(mix) and not is_mix(["a", "b"]) and not is_mix("a.txt") and not is_mix([])
    assert texts_in(mix) == ["./a.txt", "self", "python-docs"] and texts_in("a.txt") == ["a.txt"]


def test_the_library_for_tests_is_in_no_mix():
    assert not set(stdlib.stdlib_text("train").split("\n\n")) & {
        part for part in stdlib.stdlib_text("test").split("\n\n") if len(part) > 200
    }
