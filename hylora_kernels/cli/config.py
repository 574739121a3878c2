"""`--config run.yaml`: a command's options read from a file, and written beside its results.

A key is an option as the command line spells it, without its dashes (lora-rank or lora_rank), or an
argument (model, out); `command`, if there, is the command that the file is for. A value is what the
command line would get: a number, a text, true or false, a list for several. The command line wins.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hylora_kernels.support.storage import write_text

if TYPE_CHECKING:
    from yaml.nodes import MappingNode

NAME = "run.yaml"
COMMAND = "command"
NOT_IN_FILES = ("help", "debug", "config")


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's options; typer calls it before it reads
    them.

    Raises typer.BadParameter naming the file and the key for what can't be read, is unknown, stands
    there twice or is no value of its option.
    """
    if path is None or context.resilient_parsing:
        return path
    parameters = _by_key(context)
    defaults: dict[str, Any] = {}
    for key, value in _read(path):
        if key == COMMAND:
            if value != _verb_of(context):
                raise _bad(path, f"is for the command {value!r}, not {_verb_of(context)!r}")
            continue
        parameter = parameters.get(key.replace("-", "_"))
        if parameter is None:
            raise _bad(path, f"{_verb_of(context)} has no option {key!r}{_near(key, parameters)}")
        if parameter.name in defaults:
            raise _bad(path, f"{key!r} stands there twice")
        if value is not None:
            defaults[parameter.name] = _as_given(parameter, key, value, path)
    context.default_map = defaults
    return path


def write_config(context: typer.Context, given: Mapping[str, Any]) -> None:
    """Write all options of a finished command, `given` by name, beside its result.

    That is run.yaml in the folder --out, or NAME.run.yaml beside the file NAME of --out or --json.
    Without either nothing is written.
    """
    import yaml

    results = [given.get(name) for name in ("out", "json_path")]
    result = next((r for r in results if r is not None and r.exists()), None)
    if result is None:
        return
    values: dict[str, Any] = {COMMAND: _verb_of(context)}
    for key, parameter in _by_key(context, every=False).items():
        value = given.get(parameter.name)
        if value is not None:
            values[key] = _plain(value)
    path = result / NAME if result.is_dir() else result.with_name(f"{result.stem}.{NAME}")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(path, f"# hylora {_verb_of(context)} --config {path.name}\n{text}")


def _verb_of(context: typer.Context) -> str:
    """The command's name, that of its group in front: "compress", "adapter export"."""
    group = context.parent
    inside = group is not None and group.parent is not None
    return f"{group.info_name} {context.info_name}" if inside else str(context.info_name)


def _by_key(context: typer.Context, every: bool = True) -> dict[str, Any]:
    """key -> parameter: every spelling with underscores, or the first as --help has it."""
    found = {}
    for parameter in context.command.params:
        if parameter.name in NOT_IN_FILES:
            continue
        is_option = parameter.param_type_name == "option"
        keys = [word.lstrip("-") for word in parameter.opts] if is_option else [parameter.name]
        for key in keys if every else keys[:1]:
            found[key.replace("-", "_") if every else key] = parameter
    return found


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The pairs of a YAML mapping; a key that stands there twice comes twice."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        node: MappingNode | None = yaml.compose(text, Loader=yaml.SafeLoader)  # type: ignore[assignment]
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _bad(path, f"can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or node is None:
        raise _bad(path, "must be a YAML mapping of options to values")
    for key, _ in node.value:
        yield str(key.value), values.get(key.value)


def _as_given(parameter: Any, key: str, value: Any, path: Path) -> Any:
    """The value as the command line gives it: true or false of a flag, else text, or several."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise _bad(path, f"{key!r} must be true or false, got {value!r}")
        return value
    several = [_text(one) for one in (value if isinstance(value, list) else [value])]
    if getattr(parameter, "multiple", False) or parameter.nargs != 1:
        return several
    return ",".join(several)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    return value if isinstance(value, bool | int | float) else str(value)


def _near(key: str, parameters: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), parameters, 3)
    return f"; near ones: {', '.join(name.replace('_', '-') for name in near)}" if near else ""


def _bad(path: Path, words: str) -> typer.BadParameter:
    return typer.BadParameter(f"{path} {words}", param_hint="--config")
