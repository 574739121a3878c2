"""The options of a public function, each said once: a frozen dataclass of `option` fields.

The dataclass is the only list of names, types, defaults, choices and help texts. The function's
signature (`takes_options`) and the command line are built from it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Fields = ParamSpec("Fields")
Subject = TypeVar("Subject")
Options = TypeVar("Options")
Result = TypeVar("Result")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: int | None = None,
    reported: bool = True,
    keyword: bool = False,
) -> Any:
    """A field of an options dataclass.

    default:  dataclasses.MISSING for a field that must be given.
    choices:  the values it may have. least: the smallest int it may be. `check_options` holds both.
    reported: False leaves it out of `reported_options`: it does not decide the result, or has no
              JSON form.
    keyword:  it is given by name only, so that it can stand between fields given by place.
    """
    metadata = {"help": help, "choices": choices, "least": least, "reported": reported}
    by_name: Any = keyword or dataclasses.MISSING  # as the class has it
    return dataclasses.field(default=default, metadata=metadata, kw_only=by_name)


def option_of(options: type, name: str, **changes: Any) -> Any:
    """A field of another options dataclass: the same default and metadata, but for `changes`."""
    (field,) = (field for field in dataclasses.fields(options) if field.name == name)
    return dataclasses.field(default=field.default, metadata={**field.metadata, **changes})


def check_options(options: Any) -> None:
    """check_option() of every field of an options dataclass."""
    for field in dataclasses.fields(options):
        check_option(field, getattr(options, field.name))


def check_option(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError naming the field if the value is none of its choices, below its least or
    beyond 64 bits.

    None is allowed if it is the default.
    """
    if value is None and field.default is None:
        return
    choices, least = field.metadata["choices"], field.metadata["least"]
    if choices is not None and value not in choices:
        raise ValueError(f"{field.name} must be one of {choices}, got {value!r}")
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{field.name} must be an int of 64 bits, got {value}")
    if least is not None and not (is_int and value >= least):
        raise ValueError(f"{field.name} must be an int of at least {least}, got {value!r}")


def describe_option(field: dataclasses.Field[Any]) -> str:
    """The field's help, with its choices."""
    choices = field.metadata["choices"]
    listed = f" One of: {', '.join(choices)}." if choices else ""
    return f"{field.metadata['help']}{listed}"


def reported_options(options: Any) -> dict[str, Any]:
    """name -> value of the fields that decide the result, for a report."""
    fields = [field for field in dataclasses.fields(options) if field.metadata["reported"]]
    return {field.name: getattr(options, field.name) for field in fields}


def takes_options(
    options: Callable[Fields, Options],
) -> Callable[
    [Callable[[Subject, Options], Result]], Callable[Concatenate[Subject, Fields], Result]
]:
    """Decorate function(subject, options) to be called as function(subject, keep=0.8, ...).

    The fields of the dataclass `options` become the function's arguments, for type checkers as for
    inspect.signature, and their help texts end its docstring.
    """
    make: Any = options
    fields = inspect.signature(make).parameters.values()

    def decorate(
        function: Callable[[Subject, Options], Result],
    ) -> Callable[Concatenate[Subject, Fields], Result]:
        plain = inspect.signature(function)
        subject = next(iter(plain.parameters.values()))
        signature = plain.replace(parameters=[subject, *fields])

        def call(*args: Any, **kwargs: Any) -> Result:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            return function(given.pop(subject.name), make(**given))

        helps = (f"    {f.name}: {describe_option(f)}" for f in dataclasses.fields(make))
        described: Any = functools.wraps(function)(call)
        described.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n" + "\n".join(helps)
        described.__signature__ = signature
        return described

    return decorate
