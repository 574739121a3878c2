"""Local text files. Every path is taken literally and opened here, never handed to a library that
reads patterns in it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hylora_kernels.text.rows import Table

# ending -> the reader of a file's bytes
TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")
JSONS = (".jsonl", ".ndjson", ".json")
SEPARATED = {".csv": ",", ".tsv": "\t"}
FILES = (*TEXTS, *JSONS, *SEPARATED, ".parquet")
LISTED = "a .txt, .md, .jsonl, .json, .csv, .tsv or .parquet file, also with .gz behind"
# Endings of files that are certainly meant as files, so that no hub is asked for them.
OTHERS = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".pdf", ".docx", ".html")


def find_file(data: str | os.PathLike) -> Path | None:
    """The path that `data` means, whether or not it exists; None if it can be a hub id only."""
    path = Path(data)
    if os.path.exists(path) or isinstance(data, os.PathLike):
        return path
    if data.startswith("~"):
        return Path(os.path.expanduser(data))
    looks_local = data.startswith((".", "/")) or "\\" in data or data.count("/") > 1
    return path if looks_local or path.suffix.lower() in (*FILES, *OTHERS) else None


def kind_of(path: Path) -> tuple[str, bool]:
    """(the ending in lower case, without .gz; whether there was a .gz)."""
    *others, last = ["", *path.suffixes]
    is_gzip = last.lower() == ".gz"
    return (others[-1] if is_gzip else last).lower(), is_gzip


def read_file(path: Path) -> str | Table:
    """The text of a file, or its table.

    Raises ValueError naming the file, and the line where there is one.
    """
    where = f"data {str(path)!r}"
    if not path.is_file():
        what = "does not exist"
        if path.exists():
            what = "is a folder" if path.is_dir() else "is no regular file"
        raise ValueError(f"{where} {what}; give {LISTED}")
    ending, is_gzip = kind_of(path)
    if ending not in FILES:
        raise ValueError(f"{where} must be {LISTED}, got {''.join(path.suffixes[-2:])!r}")
    raw = path.read_bytes()
    if is_gzip:
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{where} is no whole gzip file: {error}") from error
    if ending == ".parquet":
        return _parquet(raw, where)
    text = _decoded(raw, where)
    if ending in TEXTS:
        return text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        return Table(where, [], lambda name: [])
    if ending in SEPARATED:
        return _separated(text, SEPARATED[ending], where)
    return _json(text, where)


def _decoded(raw: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte order mark."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{where} is not UTF-8 text but UTF-16: convert it first")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}, in "
            f"line {line}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{where} is no text: it has a NUL character in line {line}")
    return text


def _json(text: str, where: str) -> Table:
    """The objects of JSON lines, of one array, or one after another; all keys are columns."""
    decoder, rows, start = json.JSONDecoder(), [], 0
    text = text.rstrip()
    try:
        while start < len(text):
            while text[start].isspace():
                start += 1
            row, start = decoder.raw_decode(text, start)
            rows.append(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} can't be read as JSON: {error}") from error
    if len(rows) == 1 and isinstance(rows[0], list):
        (rows,) = rows
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{where} must hold JSON objects, row {number} is of type {kind}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(where, names, lambda name: [row.get(name) for row in rows])


def _separated(text: str, separator: str, where: str) -> Table:
    """A table with a header. A row of another width is refused: it would be read shifted."""
    limit = csv.field_size_limit(len(text) + 1)  # A field may be a whole book.
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header, rows = next(reader), []
        for row in reader:
            if row and len(row) != len(header):
                raise csv.Error(f"{len(row)} fields, where the header has {len(header)}")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"{where} can't be read as a table: line {reader.line_num}: {error}"
        ) from error
    finally:
        csv.field_size_limit(limit)
    rows = [row for row in rows if row]
    # The only column with strings is not taken: a file without a header would lose its first row.
    return Table(
        where, header, lambda name: [row[header.index(name)] for row in rows], has_sure_names=False
    )


def _parquet(raw: bytes, where: str) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table: Any = parquet.ParquetFile(pyarrow.BufferReader(raw)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{where} can't be read as parquet: {error}") from error

    def column(name: str) -> Iterable[object]:
        return table[name].to_pylist()

    return Table(where, table.column_names, column)
