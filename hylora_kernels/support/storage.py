"""Where files go: the one cache of the package, writing through a temporary path, room on disk."""

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

# The marker that backup tools know. It also says which folders are ours to count and to delete, so
# that HYLORA_CACHE pointing at a folder with other things in it loses nobody's files.
TAG = "CACHEDIR.TAG"
TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# A cache folder of hylora_kernels; everything in it is rebuilt when needed.\n"
)
QUIET_BELOW = 100_000_000  # bytes; smaller needs are no news


def cache_root() -> Path:
    """$HYLORA_CACHE, or the user's cache folder of the system; not created here."""
    root = os.environ.get("HYLORA_CACHE")
    if not root:
        import platformdirs  # here, so that HYLORA_CACHE serves where the package is missing

        root = platformdirs.user_cache_dir("hylora_kernels")
    return Path(root).expanduser().absolute()


def cache_dir(*parts: str) -> Path:
    """The cache folder `parts[0]/parts[1]/...`, created. A first part made here carries our marker.

    Raises ValueError if a part would lead out of the cache, OSError if it can't be created.
    """
    for part in parts:
        if not part or part in (".", "..") or Path(part).name != part:
            raise ValueError(f"parts must be plain folder names, got {part!r}")
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    if parts:
        room = root / parts[0]
        if not room.exists():
            room.mkdir(exist_ok=True)
            write_text(room / TAG, TAG_TEXT)
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_size() -> int:
    """Bytes of all files in the cache folders that are ours."""
    files = (file for room in _rooms() for file in room.rglob("*"))
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def clear_cache() -> int:
    """Delete the cache folders that are ours; the bytes freed."""
    freed = cache_size()
    for room in _rooms():
        shutil.rmtree(room)
    return freed


def _rooms() -> list[Path]:
    root = cache_root()
    return sorted(tag.parent for tag in root.glob(f"*/{TAG}")) if root.is_dir() else []


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it takes `path`'s place on success.

    On failure it is removed and `path` stays as it was. The name keeps its ending, since writers
    such as matplotlib read the format from it. The folder is created.
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
    """A temporary folder to fill; it becomes `path` on success, unless another one was first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as holder:
        temporary = Path(holder) / path.name
        temporary.mkdir()
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():  # a folder that is already there is as good: both are complete
                raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, obj: object) -> None:
    """Write `obj` as JSON, indented by two; a NaN or infinity is a ValueError, as JSON has none."""
    write_text(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def require_disk(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Say what `what` needs on the disk of `folder`, which may not exist yet, and what is free.

    Raises OSError (ENOSPC) with both figures if it can't fit.
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
