"""The files of a folder, replaced all at once: a killed process leaves the old ones or the new.

The new files are written to FOLDER/.saving-<random>. Renaming that to FOLDER/.hylora-saved decides:
from then on a reader takes the files there (current()). They are linked into FOLDER, the files that
they make obsolete are removed, and that folder goes. The next replacement completes one that was
cut off after the decision, and removes what is left of one that was cut off before.

Everything stands inside FOLDER, so that FOLDER may be a link, a mount point or the working folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from hylora_kernels.support.storage import settle, settle_folder, sync_folder, write_json

UNDECIDED, DECIDED = ".saving-", ".hylora-saved"
OBSOLETE = ".obsolete.json"  # in the new folder: names of the files to remove


def current(folder: Path) -> Path:
    """The folder to read from: `folder`, or the one in it that a killed process had finished."""
    decided = folder / DECIDED
    return decided if decided.is_dir() else folder


def is_leftover(name: str) -> bool:
    """Whether a name in a folder belongs to a replacement that was cut off."""
    return name == DECIDED or name.startswith(UNDECIDED)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder; what killed processes left in it is put right first.

    Another process that wants the lock waits. Without locks on the file system of `folder`, what
    undecided replacements left stays, since their processes may be alive.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = _lock(descriptor, folder)
        if (folder / DECIDED).is_dir():
            _complete(folder)
        for leftover in folder.glob(f"{UNDECIDED}*") if locked else ():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacement(folder: Path, last: str) -> Iterator[Path]:
    """A new folder for files that replace those of `folder` when the block ends.

    It is used in exclusive(). last: the name of the file that is put into `folder` last. discard()
    names files to remove. If the block raises, `folder` stays as it was.
    """
    new = _make_folder(folder)
    try:
        yield new
        settle_folder(new)
        os.rename(new, folder / DECIDED)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _complete(folder, last)


def discard(new: Path, names: Iterable[str]) -> None:
    """Have these files of the folder removed when those of `new` replace them."""
    write_json(new / OBSOLETE, sorted(names))


def files_in(folder: Path) -> list[str]:
    """Names of the files of a new folder, relative to it, at any depth."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(file.as_posix() for file in files if file != Path(OBSOLETE))


def _complete(folder: Path, last: str = "") -> None:
    """Put the decided files into `folder`, remove the obsolete ones, and the folder they came in.

    Names that lead out of `folder`, as a stranger's may, are passed over.
    """
    decided, holder = folder / DECIDED, _make_folder(folder)
    try:
        names = sorted(files_in(decided), key=lambda name: name == last)
        for name in (name for name in names if _leads_inside(folder, name)):
            (folder / name).parent.mkdir(exist_ok=True)
            new = holder / Path(name).name
            _link(decided / name, new)
            os.replace(new, folder / name)
        obsolete = decided / OBSOLETE
        listed = json.loads(obsolete.read_text("utf-8")) if obsolete.is_file() else []
        for name in set(listed) - set(names):
            if _leads_inside(folder, name) and (folder / name).is_file():
                (folder / name).unlink()
        sync_folder(folder)
        os.rename(decided, holder / DECIDED)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _leads_inside(folder: Path, name: str) -> bool:
    parent, root = (folder / name).parent.resolve(), folder.resolve()
    return parent == root or root in parent.parents


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # A file system without hard links.
        shutil.copy2(source, target)
        settle(target, source.stat().st_mode)


def _make_folder(folder: Path) -> Path:
    made = folder / f"{UNDECIDED}{os.urandom(6).hex()}"
    made.mkdir()
    return made


def _lock(descriptor: int, folder: Path) -> bool:
    """Take the lock, which ends with the descriptor; False if the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tqdm.write(f"waiting for another process that saves to {folder}", file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
