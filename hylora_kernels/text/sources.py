"""Sources of text, and the part of each that is held out for tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from torch import Tensor

from hylora_kernels.text.brown import brown_text
from hylora_kernels.text.files import LISTED, TEXTS, find_file, kind_of, read_file
from hylora_kernels.text.moby_dick import moby_dick_text
from hylora_kernels.text.rows import Table, texts_of
from hylora_kernels.text.stdlib import code_text, stdlib_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What token_blocks reads, or SELF; and several of them with a number of blocks each, None for the
# usual number.
Source: TypeAlias = Tensor | list[str] | str | Path
Mix: TypeAlias = list[tuple[Source, int | None]]

SELF, STDLIB = "self", "stdlib"  # SELF: the text that a model writes by itself.
# name -> the text of a split. "python-docs" has no splits of its own.
SPLIT_TEXTS: dict[str, Callable[[str], str]] = {
    "brown": brown_text,
    STDLIB: stdlib_text,
    "code": code_text,
    "moby-dick": moby_dick_text,
}
NAMED = ("brown", "python-docs", STDLIB, "code", "moby-dick")
KINDS = f"{', '.join(NAMED)}, {LISTED}, or a hub data set (name or name:config)"
HELD_OUT = 0.1  # The share of a text without splits of its own, at its end, that is for tests.
PARTS = {"train": f"first {1 - HELD_OUT:.0%}", "test": f"last {HELD_OUT:.0%}", "all": "whole"}
HUB_SECONDS = 10.0


def read_text(
    data: list[str] | tuple[str, ...] | str | os.PathLike,
    split: str,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The texts of `data` joined by blank lines; token_blocks says what the arguments may be.

    tokenizer: for the chat template of conversations.

    Raises ValueError or TypeError naming `data` for a source that can't be read.
    """
    if column is not None and not may_have_columns(data):
        raise ValueError(
            f"column={column!r} goes with a table, and data {shown(data)} has no columns"
        )
    if isinstance(data, list | tuple):
        for i, text in enumerate(data):
            if not isinstance(text, str):
                raise TypeError(f"data[{i}] must be a str, got {type(text).__name__}")
        return _joined(data)
    if not isinstance(data, str | os.PathLike):
        raise TypeError(
            "data must be a tensor of token ids, a list of str, a name or a path, "
            f"got {type(data).__name__}"
        )
    if data == SELF:
        raise ValueError(
            f"data {SELF!r} is the text that a model writes: it goes where a mix of texts is read"
        )
    if data in SPLIT_TEXTS:
        return SPLIT_TEXTS[str(data)](split)
    if data == "python-docs":
        return part_of(python_docs_text(), split, data)
    path = find_file(data)
    found = _hub_table(str(data), split) if path is None else read_file(path)
    text = _joined(texts_of(found, column, tokenizer)) if isinstance(found, Table) else found
    return text if path is None else part_of(text, split, path)


def part_of(text: str, split: str, data: object) -> str:
    """The part of a text without splits of its own: "train" is all but the last tenth, "test" the
    last tenth, "all" both.

    The cut depends on the text alone, so that no other block length, tokenizer or command makes
    the parts overlap. It is after a blank line, else a line, else a word, if one ends soon enough.
    """
    check_split(split, data)
    if split == "all":
        return text
    cut = round(len(text) * (1 - HELD_OUT))
    latest = (cut + len(text)) // 2
    ends = (text.find(mark, cut, latest) + len(mark) for mark in ("\n\n", "\n", " "))
    cut = next((end for end in ends if end > cut), cut)
    return text[:cut] if split == "train" else text[cut:]


def check_split(split: str, data: object) -> None:
    """Raise ValueError for a part that no text without splits of its own has."""
    if split not in PARTS:
        raise ValueError(
            f"split must be {', '.join(map(repr, PARTS))} for data {shown(data)}, got {split!r}"
        )


def shown(data: object) -> str:
    """A text in an error: its name or path, or the type of one without a name, in quotes."""
    return repr(str(data) if isinstance(data, str | Path) else type(data).__name__)


def has_splits(data: object) -> bool:
    """True if the text comes with a part for training and one for tests."""
    if not isinstance(data, str) or data in ("python-docs", SELF):
        return False
    return data in SPLIT_TEXTS or find_file(data) is None


def source_name(data: object, split: str) -> str:
    """A text and the part of it, in a report: "my.txt, last 10%", "brown, test"; the type of `data`
    if it is no name, since then all of it is read; "self" as it is."""
    if not isinstance(data, str | Path):
        return type(data).__name__
    if data == SELF:
        return SELF
    return f"{data}, {split if has_splits(data) else PARTS.get(split, split)}"


def held_out(test: object, data: object, *others: object) -> tuple[Any, str]:
    """(text, split) to test a model on that reads `data` and `others`.

    Without `test` that is the part of `data` that is held out; else `test` whole, or the part of it
    that is for tests if it has one or is read. others: texts and mixes.
    """
    if test is None:
        return data, "test"
    is_read = any(is_same(test, text) for other in (data, *others) for text in texts_in(other))
    return test, "test" if is_read or has_splits(test) else "all"


def is_mix(data: object) -> TypeGuard[Mix]:
    """True for a list with (source, blocks) pairs in it; check_mix says if it has nothing else."""
    return isinstance(data, list | tuple) and any(isinstance(one, list | tuple) for one in data)


def texts_in(data: object) -> list[object]:
    """The sources of a mix, or `data` alone."""
    return [entry[0] for entry in data] if is_mix(data) else [data]


def is_same(text: object, other: object) -> bool:
    """True for the same object, name or file, however its path is spelled."""
    if text is other:
        return True
    if not all(isinstance(one, str | os.PathLike) for one in (text, other)):
        return False
    paths = [None if one in (*NAMED, SELF) else find_file(one) for one in (text, other)]  # type: ignore
    if all(path is not None and path.exists() for path in paths):
        return os.path.samefile(*paths)  # type: ignore[arg-type]
    return text == other


def may_have_columns(data: object) -> bool:
    """True for a file with a table and for what can only be a hub data set."""
    if not isinstance(data, str | os.PathLike) or data in (*NAMED, SELF):
        return False
    path = find_file(data)
    return path is None or kind_of(path)[0] not in TEXTS


def _joined(texts: list[str] | tuple[str, ...]) -> str:
    # Half a surrogate pair, which JSON can spell, is no character and no tokenizer takes it.
    return "\n\n".join(texts).encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _hub_table(data: str, split: str) -> Table:
    """A hub data set; from the local cache alone if the hub doesn't answer."""
    import datasets

    name, _, config = data.partition(":")
    try:
        with _offline_unless_hub_answers(name):
            found = datasets.load_dataset(
                name, config or None, split=split, trust_remote_code=False
            )
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"data {data!r} is neither {' nor '.join(NAMED)}, nor a file here, nor a hub id with "
            f"split {split!r} that could be had: {error}"
        ) from error
    return Table(f"data {data!r}", found.column_names, found.__getitem__)


@contextmanager
def _offline_unless_hub_answers(name: str) -> Iterator[None]:
    """One question to the hub decides: `datasets` repeats each request that fails for 25 s."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError

    before = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        pass  # It answered; load_dataset says what is wrong.
    except ValueError:
        raise  # No such id can be.
    except Exception:  # Whatever the client's transport raises without a network.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def python_docs_text() -> str:
    """The language reference that CPython contains (pydoc_data.topics), topics in order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ModuleNotFoundError(
            "'python-docs' needs the module pydoc_data of the standard library, which this Python "
            "comes without"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))
