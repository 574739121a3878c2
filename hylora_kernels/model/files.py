"""Reading the files of a model's folder, which may be a stranger's: every fault names the file.

A folder is data. Nothing in it is run, nothing that its files name is read outside of it, and no
file costs more memory than its own limit allows. Symbolic links are followed wherever they lead, as
the hub's cache is made of them: a link shows its maker nothing, and runs nothing.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Bytes of a JSON file or of a safetensors header; the header of a model with 140,000 tensors takes
# 18 MB. Parsed, the worst JSON takes 20 times its bytes.
MAX_JSON = 2**25
# Bytes of another file that is read into memory whole; the largest vocabularies take 35 MB.
MAX_FILE = 2**28

# The files that transformers looks for in a folder: their endings, and those of them that are read
# into memory whole, JSON objects apart.
ENDINGS = (".bpe", ".jinja", ".json", ".model", ".safetensors", ".tiktoken", ".txt")
WHOLE = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
)
OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "processor_config.json"),
)


class CheckpointError(ValueError):
    """A model's folder that can't be read; the message names the file and the field or tensor."""


@contextmanager
def reading(
    path: str | Path | Callable[[], Path], what: str, hint: Callable[[], str] = str
) -> Iterator[None]:
    """Whatever a library raises while it reads `path` becomes a CheckpointError that names it.

    path: may be a function that looks for the file at fault. what: what couldn't be done. hint:
    more for the end of the message. Functions are called only when there is an error.

    Any exception will do: from altered files transformers raises a dozen types, of which its
    documents name three, and the parsers written in Rust panic with a BaseException.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        words = " ".join(str(error).split())[:1000]
        if not isinstance(error, (ValueError, TypeError, AttributeError, OSError)):
            words = f"{type(error).__name__}: {words}"  # "KeyError: 'x'", where "'x'" says nothing
        place = path() if callable(path) else path
        raise CheckpointError(f"{place}: {what}: {words}{hint()}") from error


def require_file(path: Path, limit: float = float("inf")) -> int:
    """The size of the file in bytes; CheckpointError if it is none, or larger than `limit`.

    Opening a FIFO would wait for its writer, and a device may never end.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: can't be read: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "device")
        raise CheckpointError(f"{path}: is a {kind}, not a file")
    if found.st_size > limit:
        raise CheckpointError(f"{path}: has {found.st_size} bytes, more than the limit of {limit}")
    return found.st_size


def read_json(path: Path, unique: bool = True) -> dict[str, Any]:
    """The JSON object in the file. unique: refuse names that stand twice in one object."""
    require_file(path, MAX_JSON)
    try:
        return parse_json(path.read_bytes(), unique)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: corrupted: {error}") from error


def parse_json(data: bytes, unique: bool = True) -> dict[str, Any]:
    """The JSON object of `data`, in UTF-8; ValueError for anything else."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} instead of an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} stands twice in an object")
    return found


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160  # the names of tensors take up to 80


def shown(value: object) -> str:
    """A value of a stranger's file, short and without control characters, for an error."""
    return _SHORT.repr(value)


def is_plain(name: object) -> bool:
    """Whether `name` is that of a file in the same folder, not a path."""
    plain = isinstance(name, str) and name not in ("", "..") and "\0" not in name
    return plain and Path(str(name)).name == name


def plain_name(name: object, path: Path, field: str) -> str:
    """`name`, checked to be that of a file in the folder of `path`, whose `field` gives it."""
    if not isinstance(name, str) or not is_plain(name):
        raise CheckpointError(f"{path}: {field} must name a file in this folder, got {shown(name)}")
    return name


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all(value: Any, kind: type) -> bool:
    """Whether the value, or each in the list, is of this type; a bool is no int."""
    return all(type(one) is kind for one in (value if isinstance(value, list) else [value]))


# The fields of JSON files whose values transformers takes as they are: their names, the values
# allowed beside null, and a test for them.
FIELDS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "generation_config.json": {
        r".*_token_id": ("a token id or a list of them", lambda v: _all(v, int)),
        r"(do_sample|use_cache|output_\w+)": ("true or false", lambda v: type(v) is bool),
        r"(temperature|top_[kp]|m(ax|in)_(new_tokens|length)|num_beams|repetition_penalty)": (
            "a finite number",
            lambda v: type(v) in (int, float) and math.isfinite(v),
        ),
    },
    "tokenizer_config.json": {
        r"model_max_length": ("a number", lambda v: type(v) in (int, float) and v == v),
        r"(tokenizer_class|backend|(padding|truncation)_side)": ("a string", _is_text),
        r"chat_template": ("a template or named templates", lambda v: _is_text(v) or _all(v, dict)),
        r".*_files": ("names of files in this folder", lambda v: all(map(is_plain, v))),
    },
}


def check_folder(folder: Path) -> None:
    """Raise CheckpointError for a file that transformers might open and must not, or would misread.

    FIFOs, devices, folders and dead links in the place of files, files beyond their limit, JSON
    that is no object or has a field of another kind.
    """
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.suffix in ENDINGS:
            whole = path.name in WHOLE or path.suffix == ".jinja"
            require_file(path, MAX_FILE if whole else float("inf"))
        if path.name in OBJECTS:
            for name, value in read_json(path, unique=False).items():
                for pattern, (allowed, fits) in FIELDS.get(path.name, {}).items():
                    if value is not None and re.fullmatch(pattern, name) and not fits(value):
                        raise CheckpointError(
                            f"{path}: {shown(name)} must be {allowed}, got {shown(value)}"
                        )
