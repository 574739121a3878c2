"""Command line options: the library's, built from its dataclasses, and those of the commands."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

import dataclasses
import functools
import inspect
import json
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hylora_kernels.support.options import check_option, describe_option
from hylora_kernels.text.files import find_file
from hylora_kernels.text.sources import KINDS, Mix, Source

Argument, Option = typer.Argument, typer.Option


Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="Hub id, folder, .gguf file, or smollm2-135m (the model of the demo).",
    ),
]
CompressedModel = Annotated[
    str, Argument(metavar="DIR", help="Folder of a model that `hylora compress` wrote.")
]
Out = Annotated[
    Path,
    Option(help="Folder to write to. It must be new, empty, or of a model that hylora wrote."),
]
Overwrite = Annotated[
    bool,
    Option(
        "--overwrite",
        help="Write to --out even if other files are there. Another program's model stays.",
    ),
]
Device = Annotated[str, Option(help="auto, cpu, cuda or mps; auto: cuda, else mps, else cpu.")]
Dtype = Annotated[
    str, Option(help="auto, bfloat16, float16 or float32; auto: the checkpoint's own.")
]
Revision = Annotated[
    str | None, Option(help="Branch, tag or commit of MODEL, if that is a hub id.")
]
Tokenizer = Annotated[
    str | None, Option(help="Hub id or folder of another tokenizer than the model's own.")
]
TrustRemoteCode = Annotated[
    bool,
    Option(
        "--trust-remote-code",
        help="Run the Python files that come with the model, which may do anything.",
    ),
]
Seed = Annotated[int, Option(help="Seed of every random choice.")]
Json = Annotated[
    Path | None,
    Option("--json", help="Also write the report to this file, as JSON; - is stdout, alone there."),
]
Text = Annotated[str, Option(help=f"Text to measure on: {KINDS}.")]
Optimize = Annotated[
    bool,
    Option(
        "--optimize/--no-optimize",
        help="On a CPU, pack the weights for its instruction set first.",
    ),
]


# Flags with another spelling than --name/--no-name, and second names.
FLAGS = {
    "gradient_checkpointing": ["--gradient-checkpointing"],
    "resume": ["--resume/--restart"],
    "calibration": ["--calibration", "--data"],
    "target_mb": ["--target-mb", "--bytes"],
    "target_time": ["--target-time", "--time"],
    "trust_remote_code": ["--trust-remote-code"],
}


@dataclasses.dataclass(frozen=True)
class Syntax:
    """A field on the command line: its type there, a sentence for its help, and the function that
    reads what typer gives, unless it gives None."""

    type: Any
    hint: str = ""
    read: Callable[[Any], Any] = lambda value: value


def library_options(
    source: type, *, only: Sequence[str] = (), without: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command whose parameter `options` stands for the library's options.

    On the command line each field of the dataclass `source` is an option, with the field's name,
    default, choices and help. The command gets a dict, name -> value, in the library's types.
    All its other parameters are its own. only, without: the fields to take, or to leave out.

    When the command runs it raises ValueError naming an option whose text can't be read or whose
    value is not allowed.

    Example:
        @library_options(CompressOptions, without=("progress",))
        def compress(model: Model, *, options: dict[str, Any], json_path: Json = None) -> None: ...
    """
    hints = typing.get_type_hints(source)
    fields = {
        field.name: field
        for field in dataclasses.fields(source)
        if field.name not in without and (not only or field.name in only)
    }
    syntax = {name: _syntax(name, hints[name]) for name in fields}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in fields}
            for name, value in options.items():
                if value is not None:
                    options[name] = syntax[name].read(value)
                check_option(fields[name], options[name])
            command(**given, options=options)

        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "options":
                parameters += [_parameter(fields, name, syntax[name]) for name in fields]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        return with_parameters(run, parameters)

    return decorate


def with_parameters(
    function: Callable[..., None], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """The same function, with the signature that typer reads."""
    typed: Any = function
    typed.__signature__ = inspect.Signature(parameters)
    typed.__annotations__ = {p.name: p.annotation for p in parameters}
    return typed


def _parameter(
    fields: dict[str, dataclasses.Field], name: str, syntax: Syntax
) -> inspect.Parameter:
    """The field `name` as a parameter that typer reads."""
    field = fields[name]
    default = field.default
    if isinstance(default, str) and syntax.type == list[str] | None:
        default = [default]
    if isinstance(default, tuple):
        default = ",".join(f"{value:g}" for value in default)
    words = [flag for flag in FLAGS.get(name, []) if flag[2:] not in fields.keys() - {name}]
    text = f"{describe_option(field)} {syntax.hint}".strip()
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[syntax.type, Option(*words, help=text)],
    )


def _syntax(name: str, hint: Any) -> Syntax:
    """How a field of this name and type is written on the command line."""
    kinds = typing.get_args(hint) or (hint,)
    numbers = [typing.get_args(kind)[0] for kind in (*kinds, hint) if _is_sequence(kind)]
    optional = type(None) in kinds

    def maybe(kind: Any) -> Any:
        return kind | None if optional else kind

    if name in QUANTITIES:
        hint, read = QUANTITIES[name]
        return Syntax(str | None, hint, functools.partial(read, option=name))
    if name == "texts":
        return Syntax(list[str] | None, SEVERAL, read_texts)
    if Mix in kinds:
        return Syntax(list[str] | None, f"{SEVERAL} NAME:BLOCKS takes so many blocks.", read_mix)
    if any(kind is dict or typing.get_origin(kind) is dict for kind in kinds):
        return Syntax(str, 'Patterns as JSON: {"mlp": 0.5, "q_proj": 64}.', read_ranks)
    if numbers:
        read = functools.partial(read_numbers, kind=numbers[0], option=name)
        return Syntax(maybe(str), "Several with commas between.", read)
    if bool in kinds:
        return Syntax(maybe(bool))
    if str in kinds:
        return Syntax(maybe(str))
    if list[str] in kinds:
        return Syntax(list[str] | None, "Repeatable.", lambda values: values or None)
    return Syntax(hint)


def _is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) is Sequence


def read_ranks(text: str) -> str | dict:
    """The name of a policy as it is; a JSON object as a dict."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--ranks is no valid JSON: {error}") from error


def read_numbers(text: str, kind: type, option: str) -> list:
    """ "16,64" -> [16, 64], each of type `kind`."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"{_flag(option)} must be {words} with commas between, got {text!r}"
        ) from None


SEVERAL = "Several with commas between, or repeated."


def read_texts(values: list[str]) -> list[str] | None:
    """["brown,self", "a,b.txt"] -> ["brown", "self", "a,b.txt"] if there is a file a,b.txt. None
    for none."""
    return [name for value in values for name in _names(value)] or None


def read_mix(values: list[str]) -> Source | Mix | None:
    """["a.txt,self:64"] -> [("a.txt", None), ("self", 64)]; one name without a number as it is."""
    mix: Mix = [_with_blocks(name) for name in read_texts(values) or []]
    if len(mix) == 1 and mix[0][1] is None:
        return mix[0][0]
    return mix or None


def _names(text: str) -> Iterator[str]:
    """The names between commas; that of a file which exists may have some itself."""
    pieces = text.split(",")
    while pieces:
        names = ((n, ",".join(pieces[:n])) for n in range(len(pieces), 1, -1))
        count, name = next((found for found in names if _exists(found[1])), (1, pieces[0]))
        yield name.strip()
        del pieces[:count]


def _with_blocks(text: str) -> tuple[str, int | None]:
    """ "self:64" -> ("self", 64); "self", or a file of that very name, -> (text, None)."""
    name, _, blocks = text.rpartition(":")
    is_counted = name and blocks.isdecimal() and not os.path.exists(text)
    return (name, int(blocks)) if is_counted else (text, None)


def _exists(text: str) -> bool:
    path = find_file(_with_blocks(text)[0])
    return path is not None and path.exists()


def read_shapes(text: str, option: str) -> list[tuple[int, int, int, int]]:
    """ "2048x5632x768x32,..." -> [(K, N, r, ra), ...]."""
    shapes = [tuple(read_numbers(p.replace("x", ","), int, option)) for p in text.split(",")]
    for K, N, r, ra in (shape if len(shape) == 4 else (0, 0, 0, 0) for shape in shapes):
        if not (1 <= r < min(K, N) and 0 <= ra < min(K, N)):
            raise ValueError(
                f"{_flag(option)} must be KxNxrxra with commas between, the ranks below K and N, "
                f"e.g. 2048x5632x768x32, got {text!r}"
            )
    return shapes


BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def read_size(text: str, option: str) -> int:
    """ "4GB" -> 4_000_000_000; "4GiB" -> 2**32 bytes."""
    return int(_in_units(text, option, BYTES, "a size such as 4GB or 512MB"))


def read_megabytes(text: str, option: str) -> float:
    """ "80MB" or "80" -> 80.0; "0.5GB" -> 500.0."""
    units = {unit: size / 10**6 for unit, size in BYTES.items()} | {"": 1}
    return _in_units(text, option, units, "a size such as 80MB or 0.5GB")


def read_count(text: str, option: str) -> int:
    """ "100M" -> 100_000_000; "1.5B" -> 1_500_000_000."""
    return int(_in_units(text, option, COUNTS, "a number such as 100M or 1.5B"))


def read_rank(text: str, option: str) -> int | str:
    """ "256" -> 256; "auto" as it is."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise ValueError(f"{_flag(option)} must be a whole number or auto, got {text!r}") from None


def read_bits(text: str, option: str) -> float | str:
    """ "4.2" -> 4.2; "8" -> 8; "auto" as it is."""
    try:
        return text if text == "auto" else int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"{_flag(option)} must be a number or auto, got {text!r}") from None


def _in_units(text: str, option: str, units: dict[str, float], allowed: str) -> float:
    """The number that `text` begins with, times the unit that it ends with."""
    lower = text.strip().lower()
    number = lower.rstrip("bikmgt ")
    try:
        return float(number) * units[lower[len(number) :].strip()]
    except (ValueError, KeyError):
        raise ValueError(f"{_flag(option)} must be {allowed}, got {text!r}") from None


# Options that may be written with a unit: a sentence for their help, and what reads them.
QUANTITIES: dict[str, tuple[str, Callable[..., float | str]]] = {
    "bits": ("For example 4.2 or 8.", read_bits),
    "embedding_rank": ("For example 256.", read_rank),
    "max_memory": ("For example 4GB.", read_size),
    "memory": ("For example 24GB.", read_size),
    "target_mb": ("For example 80MB.", read_megabytes),
    "target_params": ("For example 100M.", read_count),
}


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def refuse_foreign_folder(
    out: Path, source: str, mark: str | None = None, overwrite: bool | None = None
) -> None:
    """Raise ValueError if writing to `out` could damage something that no `hylora` command wrote.

    `out` must be new, an empty folder, that of a model which this package saved, or one with the
    file `mark`. It must not be `source`, the folder of the model that is read.
    overwrite: other files are no objection, unless they are another program's model; None in a
               command without --overwrite.
    """
    from hylora_kernels.model.format import own_files
    from hylora_kernels.model.saving import refuse_foreign_files
    from hylora_kernels.support.staging import current, is_leftover

    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if source and Path(source).exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the folder of the model that is read; give another")
    refuse_foreign_files(out, bool(overwrite))
    ours = own_files(current(out)) or (mark is not None and (out / mark).exists())
    if not (ours or overwrite) and not all(is_leftover(path.name) for path in out.iterdir()):
        way_out = "" if overwrite is None else ", or --overwrite"
        raise ValueError(
            f"--out {out} has files in it that are no model's; give another folder{way_out}"
        )
