"""Texts from files, the hub, Brown and Python's manual."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers.words import text_of, word_tokenizer

from hylora_kernels.text import sources
from hylora_kernels.text.blocks import token_blocks


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


# ---------------------------------------------------------------------------------- files and hubs


def test_local_files(tokenizer, tmp_path):
    import pandas

    texts = [text_of(1, 2, 3), text_of(4, 5, 6)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    lines = "".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines)
    pandas.DataFrame({"n": [1, 2], "body": texts}).to_parquet(tmp_path / "a.parquet")
    wanted = token_blocks(texts, tokenizer, length=5)
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        for path in (tmp_path / name, str(tmp_path / name)):
            assert torch.equal(token_blocks(path, tokenizer, length=5, split="all"), wanted), name


def test_bad_files(tokenizer, tmp_path):
    (tmp_path / "two.jsonl").write_text('{"a": "x", "b": "y", "n": 1}\n')
    (tmp_path / "numbers.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.doc").write_text("text\nx\n")
    cases = {
        "two.jsonl": "must have a column 'text', or .*, or only one with strings, got a, b, n",
        "numbers.jsonl": "only one with strings, got n",
        "broken.jsonl": r"broken\.jsonl' can't be read as JSON: .* line 1 column 2",
        "broken.parquet": r"broken\.parquet' can't be read as parquet",
        "latin.txt": r"latin\.txt' is not UTF-8 text: byte 0xe9 at offset 3, in line 1",
        "a.doc": r"must be a \.txt, .*\.parquet file, also with \.gz behind, got '\.doc'",
        "nowhere.txt": r"nowhere\.txt' does not exist",
        "": r"is a folder; give a \.txt, ",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            token_blocks(tmp_path / name, tokenizer)


def test_hub_id(tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split, trust_remote_code):
        assert trust_remote_code is False  # datasets before 4 run a repository's script
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"title": ["a", "b"], "text": ["w1 w2", None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert token_blocks("some/name:part", tokenizer, length=2).tolist() == [[1, 2]]
    assert token_blocks("name", tokenizer, length=2, split="test").tolist() == [[1, 2]]
    assert asked == [("some/name", "part", "train"), ("name", None, "test")]


def test_hub_id_that_can_not_be_had(tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    kinds = " nor ".join(sources.NAMED)
    with pytest.raises(ValueError, match=f"data 'bronw' is neither {kinds}, nor a fi"):
        token_blocks("bronw", tokenizer)


def test_python_docs(tokenizer):
    text = sources.python_docs_text()
    assert len(text) > 100_000
    assert 'The "assert" statement' in text
    assert text == sources.python_docs_text()
    assert token_blocks("python-docs", tokenizer, length=64, limit=2).shape == (2, 64)


def test_python_docs_without_the_module(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="'python-docs' needs the module pydoc_data"):
        token_blocks("python-docs", tokenizer)


# ------------------------------------------------------------------------------ the held-out part


def words(n: int, separator: str = " ") -> str:
    return separator.join(f"w{i % 40 + 1}" for i in range(n))


@pytest.mark.parametrize("separator", [" ", "\n", "\n\n", ""])
@pytest.mark.parametrize("n", [0, 1, 2, 9, 100, 1000])
def test_the_parts_are_a_whole_text_and_share_nothing(separator, n):
    text = words(n, separator)
    train, test = (sources.part_of(text, split, "x") for split in ("train", "test"))
    assert train + test == sources.part_of(text, "all", "x") == text
    if n >= 100:
        assert 0.04 * len(text) < len(test) <= 0.11 * len(text)
        assert train.endswith(separator)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_no_block_of_any_length_is_in_both_parts(suffix, tokenizer, tmp_path):
    """Tokens 1, 2, ... stand once each, so a token in both parts would be an overlap."""
    path = tmp_path / f"a.{suffix}"
    texts = [text_of(*range(i, i + 4)) for i in range(1, 41, 4)]
    rows = [{"text": text} for text in texts]
    if suffix == "txt":
        path.write_text("\n\n".join(texts))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    seen = {split: set() for split in ("train", "test")}
    for split, found in seen.items():
        for length in (2, 3):
            found |= set(token_blocks(path, tokenizer, length, split).flatten().tolist()) - {0}
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


def test_a_held_out_part_that_is_too_short_says_how_short(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    message = r"data has 9 tokens, less than one block of 64, in .*a\.txt, last 10%: take length="
    with pytest.raises(ValueError, match=message):
        token_blocks(tmp_path / "a.txt", tokenizer, 64, "test")
    assert token_blocks(tmp_path / "a.txt", tokenizer, None, "test").shape == (1, 9)
    assert token_blocks(tmp_path / "a.txt", tokenizer, None, "test", longest=4).shape == (2, 4)


@pytest.mark.parametrize("split", ["dev", "", "train[:10%]"])
def test_a_part_that_a_text_has_not_is_refused(split, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    for data in (tmp_path / "a.txt", "python-docs", [words(9)], torch.ones(2, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match="split must be 'train', 'test', 'all' for data"):
            token_blocks(data, tokenizer, 4, split)


def test_the_part_stands_in_the_name(tmp_path):
    path = tmp_path / "a.txt"
    assert sources.source_name(path, "test") == f"{path}, last 10%"
    assert sources.source_name("nowhere.txt", "train") == "nowhere.txt, first 90%"
    assert sources.source_name("python-docs", "all") == "python-docs, whole"
    assert sources.source_name("brown", "test") == "brown, test"
    assert sources.source_name("org/name:part", "dev") == "org/name:part, dev"
    assert sources.source_name(["a"], "test") == "list"


def test_what_is_tested_on(tmp_path):
    assert sources.held_out(None, "a.txt") == ("a.txt", "test")
    assert sources.held_out("a.txt", "a.txt") == ("a.txt", "test")
    assert sources.held_out("b.txt", "a.txt") == ("b.txt", "all")
    assert sources.held_out("b.txt", "a.txt", "b.txt") == ("b.txt", "test")
    assert sources.held_out("brown", "a.txt") == ("brown", "test")
    assert sources.held_out("org/name", "a.txt") == ("org/name", "test")
    assert sources.held_out("python-docs", "brown") == ("python-docs", "all")
    assert sources.held_out("python-docs", "python-docs") == ("python-docs", "test")
    assert sources.held_out(["b"], ["a"]) == (["b"], "all")
    ids = torch.ones(2, 4)
    assert sources.held_out(ids, ids)[1] == sources.held_out(None, ids)[1] == "test"
    assert sources.held_out(ids, ids + 1)[1] == sources.held_out(ids, "brown")[1] == "all"


def test_a_file_under_another_name_is_not_tested_on_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    for name in ("./a.txt", str(tmp_path / "a.txt"), tmp_path / "a.txt", "b.txt"):
        assert sources.held_out(name, "a.txt") == (name, "test")
        assert sources.held_out(name, "brown", "a.txt") == (name, "test")


def test_fewer_blocks_than_asked_for_are_said_in_a_line(tokenizer, capsys):
    token_blocks([words(30)], tokenizer, 4, limit=128)
    assert capsys.readouterr().err == "list: 7 blocks of 4 tokens, where 128 were asked for\n"
    token_blocks([words(30)], tokenizer, 4, limit=7)
    assert capsys.readouterr().err == ""


def test_a_hub_data_set_without_a_network_fails_at_once(tokenizer, monkeypatch):
    """`datasets` alone repeats its requests for 25 seconds."""
    import datasets
    import huggingface_hub

    def no_network(self, name, timeout):
        raise OSError("no network")

    offline = []

    def load_dataset(*arguments, **options):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"nor a hub id .* could be had: Couldn't reach it"):
        token_blocks("org/name", tokenizer)
    assert offline == [True] and datasets.config.HF_HUB_OFFLINE is False
