"""Local files: paths taken literally, every format, and damaged files named with their line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from helpers.words import word_tokenizer

from hylora_kernels.text.sources import read_text

AWKWARD = [
    "x[1].jsonl", "x*.jsonl", "x?.jsonl", "x{a,b}.jsonl", "$HOME.jsonl", "${x}.jsonl", "x y.jsonl",
    "x,y.jsonl", "-x.jsonl", "größe.jsonl", "~x.jsonl", "~.jsonl", ".x.jsonl", "_x.jsonl",
    "a\\b.jsonl", "a'b.jsonl", "x::y.jsonl", "%41.jsonl", "x.TXT.JsonL", "a\nb.jsonl", "x#1.jsonl",
]  # fmt: skip


def whole(path, **options) -> str:
    return read_text(path, "all", **options)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "txt"])
def test_a_path_is_taken_literally(name, suffix, tmp_path, monkeypatch):
    """With files beside it that a pattern of this name would match."""
    import pandas

    name = f"{name[:-5]}{suffix}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("x", "x1")

    def write(name: str, text: str) -> None:
        frame = pandas.DataFrame({"text": [text]})
        if suffix == "jsonl":
            Path(name).write_text(json.dumps({"text": text}))
        elif suffix == "txt":
            Path(name).write_text(text)
        else:
            frame.to_csv(name) if suffix == "csv" else frame.to_parquet(name)

    for other in ("x1", "xa", "x", "A", "b", "xx1"):
        write(f"{other}.{suffix}", "another")
    write(name, "right")
    assert whole(name) == whole(Path(name)) == whole(str(tmp_path / name)) == "right"
    os.unlink(name)
    with pytest.raises(ValueError, match="does not exist"):
        whole(f"./{name}")


def test_a_tilde_is_the_home_only_if_there_is_no_such_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert whole("~/a.txt") == "at home"
    with pytest.raises(ValueError, match=r"~no-such-user/a\.txt' does not exist"):
        whole("~no-such-user/a.txt")


FORMATS = {
    "a.txt": b"one\n\ntwo",
    "a.text": b"one\r\n\r\ntwo",
    "A.TXT": b"\xef\xbb\xbfone\r\rtwo",
    "a.md": b"one\n\ntwo",
    "a.JSONL": b'{"text": "one"}\n\n{"text": null}\n{"n": 1}\n{"text": "two"}',
    "b.jsonl": b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n',
    "c.ndjson": b'{"text": "one", "m": "x"}\n{"text": "two"}\n',
    "a.json": b'[{"text": "one"}, {"text": "two"}]',
    "b.json": b'{"text": "one"}\n{"text": "two"}',
    "c.json": b'\n[\n {"body": "one"},\n {"body": "two"}\n]\n',
    "a.csv": b"n,text\n1,one\n\n2,two\n",
    "b.csv": b'\xef\xbb\xbftext\r\none\r\n"two"\r\n',
    "a.tsv": b"text\tn\none\t1\ntwo\t2\n",
    "a.txt.gz": gzip.compress(b"one\n\ntwo"),
    "a.JSONL.GZ": gzip.compress(b'{"text": "one"}\n{"text": "two"}'),
    "a.b.csv.gz": gzip.compress(b"text\none\ntwo\n"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert whole(tmp_path / name) == "one\n\ntwo"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz"])
@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_a_text_without_words(name, content, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert whole(tmp_path / name).strip() == ""


def test_one_huge_line(tmp_path):
    text = "word " * 400_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n')
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert whole(tmp_path / name) == text


def test_half_a_surrogate_pair_becomes_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}')
    text = whole(tmp_path / "a.jsonl")
    assert text.startswith("a") and text.endswith(" b \U0001f600") and text.encode()


BROKEN = {
    "a.txt": (b"one\ntwo\ncaf\xe9", r"a\.txt' is not UTF-8 .*0xe9 at offset 11, in line 3"),
    "b.txt": ("one".encode("utf-16"), "UTF-16"),
    "c.txt": (b"one\nt\0wo", "NUL character in line 2"),
    "a.jsonl": (b'{"text": "one"}\n{"text": }', "JSON: .*line 2 column 10"),
    "b.jsonl": (b'{"text": "one"}\n{"text": "tw', "JSON: .*line 2 column 10"),
    "c.jsonl": (b'"one"\n"two"', "must hold JSON objects, row 1 is of type str"),
    "d.jsonl": (b"[[" * 100_000, "can't be read as JSON"),
    "h.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "JSON: .*limit"),
    "e.jsonl": (b'{"text": "one"}\n{"text": 5}', r"row 2: column 'text' must be a string, got int"),
    "f.jsonl": (b'{"a": 1, "b": "x", "c": "y"}', r"'text', or .*got a, b, c: name one with column"),
    "g.json": (b'{"data": [{"text": "x"}]}', "must have a column 'text'.*got data"),
    "a.csv": (b"text\none, two\n", "line 2: 2 fields, where the header has 1"),
    "b.csv": (b'text\n"one\n', "can't be read as a table: line 2"),
    "c.csv": (b"first line\nsecond line\n", r"must have a column 'text'.*got first line"),
    "d.csv": (b"text,n\none,1\ntwo\n", "line 3: 1 fields"),
    "a.parquet": (b"PAR1 no", r"a\.parquet' can't be read as parquet"),
    "a.txt.gz": (gzip.compress(b"one" * 1000)[:-12], r"a\.txt\.gz' is no whole gzip file"),
    "b.txt.gz": (b"one", "is no whole gzip file"),
    "c.gz": (gzip.compress(b"one"), r"must be a \.txt, .* got '\.gz'"),
    "a.txt.zst": (b"x", r"must be a \.txt, .* got '\.txt\.zst'"),
    "a.xz": (b"x", r"got '\.xz'"),
    "README": (b"x", "must be a .* got ''"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        whole(tmp_path / name)
    assert name in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt' is no regular file"):
        whole(tmp_path / "a.txt")


# ------------------------------------------------------------------------------------------- tables

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]
ROWS = {
    "messages": [{"messages": TALK, "id": "a"}, {"messages": None}, {"messages": []}],
    "conversations": [{"conversations": SHARED, "id": "a"}],
    "instruction": [{"instruction": "Hi", "input": "", "output": "Yes?", "id": "a"}],
    "prompt": [{"prompt": "Hi", "completion": "Yes?"}, {"prompt": None, "completion": None}],
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def json_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ROWS)
def test_conversations_go_through_the_chat_template(kind, tmp_path):
    path = json_lines(tmp_path / "a.jsonl", ROWS[kind])
    tokenizer = word_tokenizer()
    assert whole(path, tokenizer=tokenizer) == "Hi\n\nYes?"
    tokenizer.chat_template = TEMPLATE
    assert whole(path, tokenizer=tokenizer) == "<user>Hi<assistant>Yes?"


def test_an_instructions_input_follows_it(tmp_path):
    rows = [{"instruction": "Add", "input": "1 and 2", "output": "3"}]
    assert whole(json_lines(tmp_path / "a.jsonl", rows)) == "Add\n\n1 and 2\n\n3"


def test_conversations_in_parquet(tmp_path):
    import pandas

    pandas.DataFrame({"messages": [TALK, TALK]}).to_parquet(tmp_path / "a.parquet")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    once = "<user>Hi<assistant>Yes?"
    assert whole(tmp_path / "a.parquet", tokenizer=tokenizer) == f"{once}\n\n{once}"


def test_a_named_column(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", [{"a": "x", "b": "y", "m": TALK, "n": 1}])
    assert whole(path, column="b") == "y"
    assert whole(path, column="m") == "Hi\n\nYes?"
    (tmp_path / "a.csv").write_text("a,b\nx,y\n")
    assert whole(tmp_path / "a.csv", column="b") == "y"
    with pytest.raises(ValueError, match="has no column 'c', its columns are a, b, m, n"):
        whole(path, column="c")
    with pytest.raises(ValueError, match="row 1: column 'n' must be a string, got int"):
        whole(path, column="n")
    (tmp_path / "a.txt").write_text("x")
    for data in (tmp_path / "a.txt", ["x"], "python-docs"):
        with pytest.raises(ValueError, match="column='b' goes with a table"):
            whole(data, column="b")


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (["Hi"], "row 1: a message must be an object, got str"),
        ([{"role": "user"}], r"a role and a content of text, got \['role'\]"),
        ([{"role": "user", "content": 3}], "a role and a content of text"),
    ],
)
def test_a_message_that_is_none_is_refused(talk, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        whole(json_lines(tmp_path / "a.jsonl", [{"messages": talk}]))


def test_a_template_that_refuses_a_row_is_named(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", [{"messages": TALK}])
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"a\.jsonl', row 1: .*refuses it: roles must alternate"):
        whole(path, tokenizer=tokenizer)
