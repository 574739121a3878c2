"""Tables as text: one column of strings, or conversations through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns of whole conversations, and columns that make one: (prompt, more of the prompt, answer).
CONVERSATIONS = ("messages", "conversations")
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("question", "", "answer"),
)
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of the roles


@dataclass(frozen=True)
class Table:
    """Columns by name, read when they are asked for.

    where:  the table in an error.
    column: name -> the values, one a row, None where there is none.
    has_sure_names: False if the names may be a first row.
    """

    where: str
    names: list[str]
    column: Callable[[str], Iterable[object]]
    has_sure_names: bool = True


def texts_of(
    table: Table, column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """The text of each row; rows without one are left out.

    That is the column `column`; or "text"; or a conversation: "messages" (or "conversations"), a
    list of {"role", "content"}, or an instruction and its output; or the only column with strings.
    A conversation goes through the tokenizer's chat template. Without a template its contents are
    joined by blank lines.

    Raises ValueError naming the table, its columns, and the row that is no text.
    """
    if not table.names:
        return []
    name = column if column is not None else _column_of(table)
    if column is not None and column not in table.names:
        raise ValueError(f"{table.where} has no column {column!r}, its columns are {_list(table)}")
    if name is None:
        return [_rendered(talk, table, row, tokenizer) for row, talk in _pairs(table)]
    found = []
    for row, value in enumerate(table.column(name), 1):
        if isinstance(value, list) and value:
            found.append(_rendered(value, table, row, tokenizer))
        elif isinstance(value, str):
            found.append(value)
        elif value is not None and value != []:
            kind = type(value).__name__
            raise ValueError(
                f"{table.where}, row {row}: column {name!r} must be a string, got {kind}; the "
                f"columns are {_list(table)}"
            )
    return found


def _column_of(table: Table) -> str | None:
    """The column to read; None if it is a pair of columns."""
    for name in ("text", *CONVERSATIONS):
        if name in table.names:
            return name
    if _pair_of(table) is not None:
        return None
    strings = [name for name in table.names if isinstance(_first(table.column(name)), str)]
    if len(strings) == 1 and table.has_sure_names:
        return strings[0]
    only = ", or only one with strings" if table.has_sure_names else ""
    raise ValueError(
        f"{table.where} must have a column 'text', or a conversation (messages, or instruction "
        f"and output){only}, got {_list(table)}: name one with column={table.names[0]!r}"
    )


def _pair_of(table: Table) -> tuple[str, str, str] | None:
    return next((p for p in PAIRS if p[0] in table.names and p[2] in table.names), None)


def _pairs(table: Table) -> Iterator[tuple[int, list[dict]]]:
    """(row number, its conversation) of each row that has an instruction."""
    prompt, more, answer = _pair_of(table) or ("", "", "")
    extra = table.column(more) if more in table.names else None
    columns = [table.column(prompt), table.column(answer)]
    rows = zip(*columns, *([extra] if extra is not None else []), strict=True)
    for number, (asked, answered, *rest) in enumerate(rows, 1):
        if asked is None and answered is None:
            continue
        content = "\n\n".join(str(part) for part in (asked, *rest) if part not in (None, ""))
        yield (
            number,
            [
                {"role": "user", "content": content},
                {"role": "assistant", "content": "" if answered is None else str(answered)},
            ],
        )


def _rendered(talk: list, table: Table, row: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """One conversation as text."""
    messages = []
    for message in talk:
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise ValueError(f"{table.where}, row {row}: a message must be an object, got {kind}")
        role, content = (message.get(a, message.get(b)) for a, b in _KEYS)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"{table.where}, row {row}: a message must have a role and a content of text, got "
                f"{sorted(message)}"
            )
        messages.append({**message, "role": SPEAKERS.get(role, role), "content": content})
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages)
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"{table.where}, row {row}: the tokenizer's chat template refuses it: {error}"
        ) from error


_KEYS = (("role", "from"), ("content", "value"))


def _first(values: Iterable[object]) -> object:
    return next((value for value in values if value is not None), None)


def _list(table: Table) -> str:
    return ", ".join(table.names)
