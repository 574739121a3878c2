"""The running Python's standard library as text: "stdlib" is documentation and code, "code" is code
alone. It is there wherever the package runs, without a network.

The text is that of this Python: another version has another text.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import pkgutil
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Held out for tests, as whole modules: all of "code"'s and "stdlib"'s part for tests is theirs.
TEST_MODULES = (
    *("bisect", "calendar", "fractions", "heapq"),
    *("queue", "sched", "shelve", "textwrap"),
)
# pydoc_data holds the text "python-docs". encodings is tables of characters, the others are tests
# or applications in old code.
LEFT_OUT = {"pydoc_data", "encodings", "test", "tests", "idle_test", "idlelib", "lib2to3"}
# "stdlib" takes this many characters of each module's documentation and of its code, so that no
# large module outweighs others: together 0.9 million, about 400 blocks of 512 tokens.
EXCERPT = 1500
# Characters of a module that are parsed for its documentation: the whole library takes 5 s.
PARSED = 6000
TOP_LEVEL = re.compile(r"^(?:class|def|async def|@)", re.MULTILINE)
LEAST_DOCSTRING = 200  # Characters: shorter ones are no prose.


@functools.cache
def stdlib_text(split: str) -> str:
    """Docstrings and code of each module, EXCERPT characters of both, modules in order.

    split: "train", all modules but TEST_MODULES; "test", these; or "all".

    Raises ValueError for another split, ModuleNotFoundError if this Python comes without sources.
    """
    parts: list[str] = []
    for source in _sources(split, "stdlib"):
        parts += _docstrings(source), _from_the_middle(source)
    return "\n\n".join(part for part in parts if part)


@functools.cache
def code_text(split: str) -> str:
    """The whole source of each module, as stdlib_text takes and raises."""
    return "\n\n".join(_sources(split, "code"))


def _sources(split: str, name: str) -> list[str]:
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all' for {name!r}, got {split!r}")
    roots = _roots()
    found = []
    for module, spec in _modules(roots):
        if split == "all" or (split == "test") == (module in TEST_MODULES):
            source = _source_of(module, spec)
            if source.strip():
                found.append(source)
    if not found:
        which = f"those of {', '.join(TEST_MODULES)}" if split == "test" else "none"
        raise ModuleNotFoundError(
            f"{name!r} needs the sources of Python's standard library, and this Python has "
            f"{'not ' if split == 'test' else ''}{which} in {' or '.join(roots)}: give another text"
        )
    return found


def _roots() -> list[str]:
    """The folder of the standard library, and the archive that it may be in instead."""
    archive = "python{}{}.zip".format(*sys.version_info)
    zipped = [path for path in sys.path if Path(path).name == archive and Path(path).is_file()]
    return [sysconfig.get_path("stdlib"), *zipped]


def _modules(
    paths: list[str], package: str = ""
) -> Iterator[tuple[str, importlib.machinery.ModuleSpec]]:
    """(name, spec) of each public module, in order; none is imported."""
    for finder, name, is_package in pkgutil.iter_modules(paths, package):
        last = name.rpartition(".")[2]
        if last.startswith("_") or last in LEFT_OUT:
            continue
        if not package and name not in sys.stdlib_module_names:
            continue
        spec = finder.find_spec(name, None)
        if spec is None:
            continue
        yield name, spec
        if is_package:
            yield from _modules(list(spec.submodule_search_locations or ()), f"{name}.")


def _source_of(module: str, spec: importlib.machinery.ModuleSpec) -> str:
    """The source of a module, "" for one in C or without its source."""
    try:
        return getattr(spec.loader, "get_source", lambda name: None)(module) or ""
    except (ImportError, OSError, SyntaxError):
        return ""


def _docstrings(source: str) -> str:
    """The first docstrings of some length, EXCERPT characters or one docstring."""
    later = TOP_LEVEL.search(source, PARSED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of escapes in strings, which a later Python refuses.
        try:
            tree = ast.parse(source[: later.start()] if later else source)
        except SyntaxError:  # The line that looked like a definition is part of a string.
            return ""
    found, size = [], 0
    for text in _documented(tree):
        if len(text) >= LEAST_DOCSTRING and size < EXCERPT:
            found.append(_cut(text))
            size += len(found[-1])
    return "\n\n".join(found)


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """The docstrings of a module, a class and its methods, a function, "" where there is none."""
    yield ast.get_docstring(node) or ""
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef):
            yield from _documented(inner)


def _from_the_middle(source: str) -> str:
    """EXCERPT characters of whole lines: a module's start is a licence, its docstring and
    imports."""
    if len(source) <= EXCERPT:
        return source
    return _cut(source[source.find("\n", (len(source) - EXCERPT) // 2) + 1 :])


def _cut(text: str) -> str:
    """The first EXCERPT characters, in whole lines."""
    return text if len(text) <= EXCERPT else text[: text.rfind("\n", 0, EXCERPT)]
