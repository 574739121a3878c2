"""Files: atomic writes, and the disk space that a command needs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

QUIET_BELOW = 100_000_000  # bytes; require_disk() prints nothing for less


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path to write a file to; at the end of the block it replaces `path`.

    If the block raises, the temporary file is removed and `path` stays as it was. It stands in the
    same folder, which is created, so that the replacement is atomic. It keeps `path`'s ending:
    writers such as matplotlib read the format from it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{os.urandom(6).hex()}.{path.name}"
    try:
        yield temporary
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
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise


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
