"""Ctrl-C while `hylora` still imports torch: one line and exit code 130, as in the command itself.

Python imports the package, which takes seconds, before any code of a command runs. So the package
imports this module first, and what it installs stays out of processes that are no such command.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType


def is_command() -> bool:
    """True in `hylora ...` and in `python -m hylora_kernels ...`, where sys.argv[0] is "-m" until
    the package has been imported."""
    first = sys.argv[0] if sys.argv else ""
    return Path(first).name == "hylora" or (first == "-m" and "hylora_kernels" in sys.orig_argv)


def end_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """sys.excepthook of a command."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("\ninterrupted. Nothing was written.", file=sys.stderr, flush=True)
    os._exit(130)  # After an excepthook Python would end itself by SIGINT.


if is_command():
    sys.excepthook = end_in_one_line
