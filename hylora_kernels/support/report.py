"""Reports: every public function that measures something returns a dataclass that is a Report, and
a Report can be written as JSON."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hylora_kernels.support.storage import write_text


class Report:
    """A mixin for dataclasses that may hold other Reports: to_dict(), to_json() and save().

    str() and print() give render(), a rich table; by default of the fields that are one value.
    """

    def render(self) -> Any:
        """A rich table."""
        from hylora_kernels.support.console import table

        return table(type(self).__name__, ("", "value"), list(_values(plain(self))))

    def __str__(self) -> str:
        from hylora_kernels.support.console import as_text

        return as_text(self.render())

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON's own types, converted as plain() does."""
        return plain(self)

    def to_json(self) -> str:
        """to_dict() as JSON text, indented by two."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write to_json() to `path`, atomically; returns the path."""
        write_text(path, self.to_json() + "\n")
        return Path(path)


def plain(value: object) -> Any:
    """`value` in JSON's own types.

    Dataclasses become dicts, tensors and tuples lists, sets sorted lists, enums their values;
    paths, dtypes and devices become strings. JSON has no word for floats that are not finite: they
    become "NaN", "Infinity" and "-Infinity", which float() reads back.

    Raises TypeError for anything else, so that no report says `<object at 0x...>`.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _word_of(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Path | torch.device):
        return str(value)
    if hasattr(value, "tolist"):  # tensors, and numpy's arrays and numbers
        return plain(value.tolist())
    raise TypeError(f"a report can't hold a {type(value).__name__}: {value!r}")


def _values(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of all fields that are one value, those of reports inside too."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield prefix + name, value


def _word_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
