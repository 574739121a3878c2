"""Functions of triton's interpreter are replaced for the modules beside this one: safely or not at
all.

They hang on names that triton doesn't promise to keep. A function is only ever replaced by one with
the same arguments, so a triton whose interpreter has moved says so instead of passing every test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator

import triton
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


@contextlib.contextmanager
def replaced(owner, **functions: Callable) -> Iterator[None]:
    """Put `functions` in the place of owner's own of the same name, as long as the `with` lasts.

    Raises RuntimeError where owner has no such function or it takes other arguments.
    """
    before = {name: vars(owner).get(name) for name in functions}
    for name, new in functions.items():
        if before[name] is None or _arguments(before[name]) != _arguments(new):
            raise RuntimeError(
                f"triton {triton.__version__}: {owner.__name__}.{name}{_arguments(new)} is gone or "
                "takes other arguments: bring tests/triton_interpreter up to this interpreter"
            )
    for name, new in functions.items():
        setattr(owner, name, new)
    try:
        yield
    finally:
        for name, old in before.items():
            setattr(owner, name, old)


def _arguments(function: Callable) -> list[tuple]:
    """Name and kind: [("self", POSITIONAL_OR_KEYWORD), ...]."""
    return [(a.name, a.kind.name) for a in inspect.signature(function).parameters.values()]


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise a kernel's own error, not the InterpreterError that every jit function wraps it in."""
    try:
        yield
    except InterpreterError as error:
        inner: BaseException = error
        while isinstance(inner, InterpreterError) and inner.__cause__ is not None:
            inner = inner.__cause__
        raise inner from None


def linear(place: tuple[int, int, int], grid: tuple[int, int, int]) -> int:
    """The number of the program at `place`, counted as the interpreter runs them."""
    return (place[0] * grid[1] + place[1]) * grid[2] + place[2]


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """The interpreter in a third of its time, without work that it repeats for nothing.

    It replaces all of triton.language at every call of a jit function, also where one kernel calls
    another and that is done already, and it checks every sum of integers for overflow.
    """
    stock = interpreter._patch_lang
    options = interpreter.interpreter_builder.options
    done: set[int] = set()  # modules whose view of triton.language has been replaced

    def _patch_lang(fn):
        if id(fn.__globals__) in done:
            return interpreter._LangPatchScope()
        outermost = not done
        scope = stock(fn)
        done.add(id(fn.__globals__))
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        return scope

    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        with replaced(interpreter, _patch_lang=_patch_lang):
            yield
    finally:
        interpreter.interpreter_builder.options = options
