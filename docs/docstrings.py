"""Our docstrings as Markdown, for the API page: a Griffe extension.

A docstring lists arguments as `name: text`, aligned, and ends with an indented example. Markdown
would run the lines together.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

from griffe import Extension, Function, Parameter, ParameterKind, Parameters

# "name:" or "A, B:", and what is on the line after it. "Raises ...:" and prose have spaces.
ITEM = re.compile(r"(?P<indent> *)(?P<names>[\w-]+(?:, [\w-]+)*): +(?P<text>\S.*)")


def as_markdown(docstring: str) -> str:
    """The docstring with lists of arguments as Markdown lists and its example as a block."""
    lines, inside = [], False
    for line in docstring.splitlines():
        if line.strip() in ("Example:", "Options:"):
            lines += ["", f"**{line.strip()[:-1]}**", ""]
            inside = False
            continue
        item = ITEM.fullmatch(line)
        if item and len(item["indent"]) in (0, 4):
            names = ", ".join(f"`{name}`" for name in item["names"].split(", "))
            lines += [*([] if inside else [""]), f"- {names}: {item['text']}"]
            inside = True
        elif inside and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)


class Docstrings(Extension):
    """Rewrites each docstring by as_markdown. A function whose options come from a dataclass
    (support.options.takes_options) gets them as arguments and in its docstring, as when imported.
    """

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if isinstance(obj, Function) and any(
            str(decorator.value).startswith("takes_options(") for decorator in obj.decorators
        ):
            _as_imported(obj)
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def _as_imported(function: Function) -> None:
    found = getattr(import_module(function.module.path), function.name)
    assert function.docstring is not None
    function.docstring.value = inspect.getdoc(found) or ""
    parameters = []
    for one in inspect.signature(found).parameters.values():
        default = None if one.default is one.empty else repr(one.default)
        kind = ParameterKind(one.kind.description)
        parameters.append(
            Parameter(one.name, annotation=str(one.annotation), kind=kind, default=default)
        )
    function.parameters = Parameters(*parameters)
