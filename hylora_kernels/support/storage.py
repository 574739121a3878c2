"""Files: the package's cache folder, atomic writes, and the disk space that a command needs."""

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

# Backup tools skip a folder with this file. It also marks the folders that this package made. Only
# those are counted and deleted: HYLORA_CACHE may point at a folder with other files in it.
TAG = "CACHEDIR.TAG"
TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# A cache folder of hylora_kernels; everything in it is rebuilt when needed.\n"
)
QUIET_BELOW = 100_000_000  # bytes; require_disk() prints nothing for less


def cache_root() -> Path:
    """$HYLORA_CACHE, or else the system's cache folder of this user; it need not exist."""
    root = os.environ.get("HYLORA_CACHE")
    if not root:
        import platformdirs  # imported here: a machine without it can set HYLORA_CACHE

        root = platformdirs.user_cache_dir("hylora_kernels")
    return Path(root).expanduser().absolute()


def cache_dir(*parts: str) -> Path:
    """The folder cache_root()/parts[0]/parts[1]/..., created; a new parts[0] gets the marker file.

    Raises ValueError if a part would lead out of the cache, OSError if it can't be created.
    """
    for part in parts:
        if not part or part in (".", "..") or Path(part).name != part:
            raise ValueError(f"parts must be plain folder names, got {part!r}")
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    if parts:
        top = root / parts[0]
        if not top.exists():
            top.mkdir(exist_ok=True)
            write_text(top / TAG, TAG_TEXT)
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_size() -> int:
    """Bytes of all files in the cache folders that this package made."""
    files = (file for folder in _cache_folders() for file in folder.rglob("*"))
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def clear_cache() -> int:
    """Delete the cache folders that this package made; returns the bytes freed."""
    freed = cache_size()
    for folder in _cache_folders():
        shutil.rmtree(folder)
    return freed


def _cache_folders() -> list[Path]:
    """The cache's first-level folders that carry the marker file."""
    root = cache_root()
    return sorted(tag.parent for tag in root.glob(f"*/{TAG}")) if root.is_dir() else []


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
