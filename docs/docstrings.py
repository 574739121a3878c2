"""Our docstrings as Markdown, for the API page: a Griffe extension.

A docstring lists arguments as `name: text`, aligned, and ends with an indented example. Markdown
would run the lines together.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

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
    """Rewrites each docstring by as_markdown."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
