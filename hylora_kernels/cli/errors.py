"""Errors as one line in the words of the command line."""

import re
from collections.abc import Iterable
from typing import Any

from safetensors import SafetensorError

# Errors with a cause outside this program: bad arguments and files, a full disk, a missing package,
# a model that can't be loaded, numbers that are not finite, a machine that computes wrongly. They
# are printed in one line. Any other error is a bug and shows its traceback.
SPOKEN = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
# These say little without their type; torch, safetensors and readers of files raise them.
NAMED = (SafetensorError, RuntimeError, MemoryError, OverflowError, EOFError, IndexError)
EXPECTED = (*SPOKEN, *NAMED, StopIteration)

# The library's arguments that have another name on the command line.
OTHER_NAMES = {"name_or_path": "model", "blocks": "data", "output_dir": "out", "dir": "out"}


def one_line(error: BaseException, parameters: Iterable[Any]) -> str:
    """The message of an expected error; parameters: of the command, as click has them."""
    words = " ".join(str(error).split())
    if not isinstance(error, SPOKEN) or not words:
        name = type(error).__name__
        words = f"{name}: {words}" if words else name
        words = f"{words} (--debug shows where)"
    return in_flags(words, flags_of(parameters))


def flags_of(parameters: Iterable[Any]) -> dict[str, tuple[str, str]]:
    """name -> (the words for a parameter, those for its opposite or ""), as in
    {"refit": ("--refit", "--no-refit"), "model": ("MODEL", "")}."""
    flags = {}
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            metavar = parameter.metavar or parameter.name.upper()
            flags[parameter.name] = metavar.removesuffix("..."), ""
        else:
            flags[parameter.name] = parameter.opts[0], next(iter(parameter.secondary_opts), "")
    return flags


def in_flags(text: str, flags: dict[str, tuple[str, str]]) -> str:
    """The library's words for its arguments as flags: "keep must be ..." -> "--keep must be ...",
    "resume=False" -> "--restart", "lora_rank=64" -> "--lora-rank 64"."""
    known = dict(flags)
    for name, other in OTHER_NAMES.items():
        if other in flags:
            known.setdefault(name, flags[other])
    if "calibration" in flags:
        known.setdefault("data", flags["calibration"])
    for name, (on, off) in known.items():
        text = re.sub(rf"\b{name}=True\b", on, text)
        text = re.sub(rf"\b{name}=False\b", off or f"no {on}", text)
        text = re.sub(rf"\b{name}=(?=[\w'\".-])", f"{on} ", text)
        opening = rf"{name}\b" if "_" in name else rf"{name}\b(?=[\s:\[]|$)"
        text = re.sub(rf"^{opening}", on, text)
        if "_" in name:  # No word of a sentence is spelled so.
            text = re.sub(rf"(?<![\w/.'\"-]){name}\b(?![/.=\w])", on, text)
    return text
