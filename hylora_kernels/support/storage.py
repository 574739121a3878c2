"""Files: atomic writes, and the disk space that a command needs."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

LEFTOVER_SECONDS = 3600  # A temporary file that nobody has written to for so long is nobody's.
QUIET_BELOW = 100_000_000  # bytes; require_disk() prints nothing for less


@contextmanager
def atomic_path(path: str | Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary path to write a file to; at the end of the block it replaces `path`.

    If the block raises, the temporary file is removed and `path` stays as it was. That of a killed
    process goes at a later write of `path`. It stands in the same folder, which is created, so that
    the replacement is atomic. It keeps `path`'s ending:
    writers such as matplotlib read the format from it. A link is followed, and a device or a pipe
    is written to directly: replacing it would take it from the system.

    mode: the file's permissions, by default those that the umask leaves.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{'[0-9a-f]' * 12}.{glob.escape(path.name)}"):
        with suppress(FileNotFoundError):  # Another process has removed or renamed it.
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()
    temporary = path.parent / f".{os.urandom(6).hex()}.{path.name}"
    try:
        mode = mode_of_new_files(path.parent) if mode is None else mode
        yield temporary
        settle(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; at the end of the block it becomes `path`.

    A folder that another process put there in the meantime stays: both are complete. If the block
    raises, the temporary folder is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as holder:
        temporary = Path(holder) / path.name
        temporary.mkdir()
        yield temporary
        settle_folder(temporary)
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise


def mode_of_new_files(folder: Path) -> int:
    """The permissions of a file that is made in `folder`: by the umask, or the folder's own rule.

    Some writers make their files 0600 whatever the umask is: safetensors does.
    """
    probe = folder / f".{os.urandom(6).hex()}"
    probe.touch(exist_ok=False)
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def settle(file: Path, mode: int) -> None:
    """Set a written file's permissions and wait until it is on the disk: after a power failure a
    file that was renamed earlier than that may be empty."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle_folder(folder: Path) -> None:
    """settle() all files in `folder`, at any depth, and the folders; a link's target is left
    alone, which may be another program's file."""
    mode = mode_of_new_files(folder)
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        if path.is_file():
            settle(path, mode)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's list of files is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, obj: object) -> None:
    """Write `obj` as JSON, indented by two, atomically.

    Raises ValueError for a NaN or an infinity: JSON has none.
    """
    write_text(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def require_disk(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Check that `needed_bytes` fit on the disk of `folder`, which need not exist yet.

    The need and the free space go to stderr if the need is at least QUIET_BELOW. what: the subject
    of that line and of the error.

    Raises OSError (ENOSPC) with both figures if the bytes don't fit.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    line = f"{what}: needs about {needed_bytes / 1e9:.2f} GB on disk, {free / 1e9:.2f} GB free"
    if needed_bytes > free:
        raise OSError(errno.ENOSPC, f"{line} in {place}")
    if needed_bytes >= QUIET_BELOW:
        tqdm.write(line, file=sys.stderr)
