"""Changes to a model's folder as a stranger or an accident might make them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]

CONTENTS = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "a string": b'"x"',
    "NaN": b"NaN",
    "deep lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a long number": b'{"a": ' + b"9" * 5_000 + b"}",
    "binary": bytes(range(256)),
    "zeros": bytes(100),
}
VALUES = (
    *(None, True, "x", "", -1, 0, 10**9, 10**30, 1.5, float("nan"), float("inf")),
    *([], [1], {}, {"a": 1}, "../x", "/etc/passwd"),
)


def rewritten(name: str) -> Iterator[tuple[str, Change]]:
    """The file `name` with other contents."""
    for what, content in CONTENTS.items():
        yield what, lambda folder, content=content: (folder / name).write_bytes(content)

    def encoded(encode: Callable[[bytes], bytes]) -> Change:
        return lambda folder: (folder / name).write_bytes(encode((folder / name).read_bytes()))

    yield "truncated", encoded(lambda whole: whole[: len(whole) // 2])
    yield "a byte order mark", encoded(lambda whole: b"\xef\xbb\xbf" + whole)
    yield "UTF-16", encoded(lambda whole: whole.decode().encode("utf-16"))


def replaced(name: str) -> Iterator[tuple[str, Change]]:
    """Something else than a file in the place of `name`."""

    def socket_at(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)

    kinds: dict[str, Callable[[Path], object]] = {
        "a folder": Path.mkdir,
        "a FIFO": os.mkfifo,
        "a socket": socket_at,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a dead link": lambda path: path.symlink_to("nowhere"),
    }
    for what, make in kinds.items():

        def change(folder: Path, make: Callable[[Path], object] = make) -> None:
            (folder / name).unlink()
            make(folder / name)

        yield what, change


def with_fields(name: str, *paths: tuple[str, ...]) -> Iterator[tuple[str, Change]]:
    """The JSON file `name` with each field of `paths` set to each of VALUES, or left out."""
    for path in paths:
        for value in VALUES:
            yield f"{'.'.join(path)} = {value!r}", _set(name, path, value)


def edited(name: str, edit: Callable[[Any], object]) -> Change:
    """The JSON file `name` after edit(its object)."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        edit(whole)
        (folder / name).write_text(json.dumps(whole))

    return change


def _set(name: str, path: tuple[str, ...], value: object) -> Change:
    def edit(whole: Any) -> None:
        for key in path[:-1]:
            whole = whole[key]
        whole[path[-1]] = value

    return edited(name, edit)


def header_edited(edit: Callable[[Any], object]) -> Change:
    """model.safetensors with another header before the same data."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        found = edit(header)
        text = found if isinstance(found, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])

    return change
