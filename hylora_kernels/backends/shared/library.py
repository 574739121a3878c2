"""_csrc.so, which holds the C++ and CUDA kernels: loading it, or the reason why it isn't there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

# HYLORA_CSRC names another build of the library: the instrumented one of `make sanitize`.
LIBRARY = Path(os.environ.get("HYLORA_CSRC") or Path(__file__).parents[2] / "_csrc.so")
# setup.py writes this file where it builds no library.
BUILD_NOTE = LIBRARY.with_name("_build.json")


def in_words(error: Exception) -> str:
    """The first line of an error, without the place in our sources that raised it."""
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])


def _why_not_built() -> str:
    """The reason that setup.py gave, in words."""
    message = f"{LIBRARY.name} was not built when the package was installed"
    try:
        return f"{message}: {json.loads(BUILD_NOTE.read_text(encoding='utf-8'))['no_library']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{message} (no reason is recorded in {BUILD_NOTE})"


def _load() -> str:
    if not LIBRARY.is_file():
        named = os.environ.get("HYLORA_CSRC")
        return f"HYLORA_CSRC={named} is no file" if named else _why_not_built()
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:  # a torch that it wasn't built for
        return in_words(error.__cause__ or error)
    return ""


def lacks(*ops: str) -> str:
    """The reason why the library can't run these ops of it; "" if it has them all."""
    absent = [op for op in ops if not hasattr(torch.ops.hylora, op)]
    if MISSING or not absent:
        return MISSING
    return (
        f"{LIBRARY} lacks the op {absent[0]}: it is older than the package (build it again) or no "
        "library of it"
    )


def op_or_none(name: str) -> Any:
    """An op of the library, looked up once, as a decoded token waits for every layer's call; None
    where the library is missing or older."""
    found = None if MISSING else getattr(torch.ops.hylora, name, None)
    return found and found.default


MISSING = _load()  # why there is no library, in words; "" if it is loaded
