"""_csrc.so: the C++ and CUDA kernels behind the rooms that have some."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

# HYLORA_CSRC names another build of it: the instrumented ones of `make sanitize`.
LIBRARY = Path(os.environ.get("HYLORA_CSRC") or Path(__file__).parents[2] / "_csrc.so")


def in_words(error: Exception) -> str:
    """The first line of an error, without where in our sources it was said."""
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])


def _load() -> str:
    if not LIBRARY.is_file():
        return (
            f"{LIBRARY.name} was not built when the package was installed: "
            "pip install it again where there is a C++ compiler (g++ or clang)"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:  # another torch
        return in_words(error)
    return ""


MISSING = _load()  # why it isn't there, in words; "" where it is
