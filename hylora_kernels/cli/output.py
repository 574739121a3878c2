"""The files that a command writes beside its folder: checked before its work, JSON after it."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from hylora_kernels.support.console import report_lines
from hylora_kernels.support.report import plain
from hylora_kernels.support.storage import write_json

STDOUT = Path("-")
COMPRESSING = ("compress", "quantize")
SHARED = (*COMPRESSING, "finetune")  # Commands whose work several processes share.
PICTURES = (".png", ".svg", ".pdf")
_stdout: ContextVar[TextIO | None] = ContextVar("_stdout", default=None)


def trainable_line(model: Any) -> str:
    """The line that every model command prints: trainable and all parameters."""
    from hylora_kernels.model.modules import parameter_count

    return report_lines(model, parameter_count(model))


@contextlib.contextmanager
def report_on_stdout(path: Path | None) -> Iterator[None]:
    """With the path - all that is printed in the block goes to stderr but the report."""
    if path != STDOUT:
        yield
        return
    token = _stdout.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.reset(token)


@contextlib.contextmanager
def first_process_prints(command: str) -> Iterator[None]:
    """Under torchrun, or `accelerate launch`, only the first process prints in the block.

    Raises ValueError for a command that doesn't share its work: each process would do all of it and
    write the same files.
    """
    if not are_several():
        yield
    elif command not in SHARED:
        raise ValueError(
            f"{command} runs in one process, without torchrun: only {', '.join(SHARED)} share"
        )
    elif is_first_process():
        yield
    else:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield


@contextlib.contextmanager
def ended_together(command: str) -> Iterator[Callable[[BaseException], bool]]:
    """Inside, the processes of torchrun are a group that a command of COMPRESSING shares its work
    in, and an error in one ends all; yields the answer whether another process tells this error."""
    if command not in COMPRESSING or not are_several():
        yield lambda error: False
        return
    from hylora_kernels.support.processes import LostProcess, together

    with together() as processes:

        def is_told(error: BaseException) -> bool:
            was_told = isinstance(error, LostProcess) and error.was_told
            return not processes.fail(error) or was_told

        yield is_told


def are_several() -> bool:
    """True in a process of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1"


def is_first_process() -> bool:
    """True in the first process under torchrun, and in one without it."""
    return os.environ.get("RANK", "0") == "0"


def write_report(report: object, *paths: Path | None) -> None:
    """Write a report (a dataclass or a dict) as JSON to each path that is not None; - is stdout."""
    for path in paths:
        if path == STDOUT:
            print(json.dumps(plain(report), indent=2, allow_nan=False), file=_stdout.get())
        elif path is not None:
            write_json(path, plain(report))


def check_output_files(given: Mapping[str, Any]) -> None:
    """Raise ValueError naming the option if a file to write, such as that of --json, can't be.

    given: the command's arguments. A file may stand in the folder that the command makes (--out).
    """
    out = given.get("out")
    for name, flag in (
        *(("json_path", "--json"), ("png", "--png")),
        ("markdown", "--markdown"),
    ):
        path = given.get(name)
        if path is None or (name == "json_path" and path == STDOUT):
            continue
        folder = path.parent
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise ValueError(f"{flag} {path} is {what}; give a file")
        if not folder.is_dir() and not (out is not None and out in (folder, *folder.parents)):
            raise ValueError(f"{flag} {path}: its folder {folder} does not exist")
        if folder.is_dir() and not os.access(folder, os.W_OK):
            raise ValueError(f"{flag} {path}: its folder {folder} can't be written to")
        if name == "png" and path.suffix.lower() not in PICTURES:
            raise ValueError(f"{flag} {path} must end with one of {', '.join(PICTURES)}")
