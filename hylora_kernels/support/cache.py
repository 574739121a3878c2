"""The package's cache folder, and files of tensors in it that prove themselves whole.

Everything in it is made again when needed. It is for its owner's eyes alone, since tokens and
tables hold private texts.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from hylora_kernels.support.hashing import tensor_hash
from hylora_kernels.support.storage import atomic_folder, atomic_path

# Backup tools skip a folder with this file. Its text also marks the folders that this package made:
# other programs mark theirs by a file of the same name.
TAG = "CACHEDIR.TAG"
TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# A cache folder of hylora_kernels; everything in it is rebuilt when needed.\n"
)
# The first level of the cache. Only folders of these names that carry the tag are counted and
# deleted: HYLORA_CACHE may point at a folder with other things in it.
FOLDERS = (
    *("benchmarks", "compress", "data", "datasets", "models", "perplexity", "recovery", "teacher"),
    *("temporary", "tokens"),
)
TUNED = "tuned"  # Tables of `hylora tune`: they take a GPU and minutes, so clearing keeps them.
CHECKSUM, SUMS = "sha256", "SHA256SUMS"


def cache_root() -> Path:
    """$HYLORA_CACHE, or else the system's cache folder of this user; it need not exist."""
    root = os.environ.get("HYLORA_CACHE")
    if not root:
        import platformdirs  # imported here: a machine without it can set HYLORA_CACHE

        root = platformdirs.user_cache_dir("hylora_kernels")
    return Path(root).expanduser().absolute()


def table_name(device_name: str) -> str:
    """The name of a file in the folder TUNED: "AMD EPYC 9R14" -> "amd-epyc-9r14.json"."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower() + ".json"


def cache_dir(*parts: str) -> Path:
    """The folder cache_root()/parts[0]/parts[1]/..., created, closed to other users.

    A new parts[0] gets the tag. An existing root keeps its permissions if it holds anything that
    is not this package's.

    Raises ValueError if a part would lead out of the cache or parts[0] is none of FOLDERS, OSError
    naming HYLORA_CACHE if the folder can't be created.
    """
    for part in parts:
        if not part or part in (".", "..") or Path(part).name != part:
            raise ValueError(f"parts must be plain folder names, got {part!r}")
    if parts and parts[0] not in (*FOLDERS, TUNED):
        raise ValueError(f"parts[0] must be one of {', '.join(FOLDERS)}, {TUNED}, got {parts[0]!r}")
    root = cache_root()
    folder = root.joinpath(*parts)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(PermissionError):  # A root that can be used, but not listed.
            if all(_is_ours(entry) or entry.name == TUNED for entry in root.iterdir()):
                _close_to_others(root)
        if parts:
            _make_first_level(root / parts[0])
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _about_cache(error, folder) from error
    return folder


def _make_first_level(folder: Path) -> None:
    if not folder.exists():
        # Put in place with its tag: a folder without one would never be cleared.
        with atomic_folder(folder) as new:
            (new / TAG).write_text(TAG_TEXT, encoding="utf-8", newline="\n")
    if _is_ours(folder):
        _close_to_others(folder)


def _close_to_others(folder: Path) -> None:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        with suppress(OSError):  # on a read-only disk, or in another user's cache
            folder.chmod(mode & 0o700)


def _about_cache(error: Exception, path: Path) -> OSError:
    """An OSError about a file or folder of the cache; its number is that of `error`."""
    # safetensors gives the number in its text alone.
    found = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else found and int(found[1])
    reason = os.strerror(number) if number else str(error)
    where = f"{path} in the cache: {reason}; HYLORA_CACHE=FOLDER puts the cache elsewhere"
    return OSError(number or errno.EIO, f"can't write {where}")


# ------------------------------------------------------------------------------ counting, clearing


def cache_size() -> int:
    """Bytes of all files in the cache folders that this package made."""
    return sum(_bytes(file) for top in _own_folders() for file in (*_files(top), top / TAG))


def clear_cache() -> int:
    """Delete the cache folders that this package made; returns the bytes freed.

    A link is deleted, not followed. A folder inside that another program has tagged stays, and so
    do those that hold it.
    """
    freed = 0
    for top in _own_folders():
        for file in list(_files(top)):
            freed += _delete(file)
        for folder, _, _ in os.walk(top, topdown=False):
            # The tag goes last: without it, an interrupted clearing could not be repeated.
            if folder == str(top) and os.listdir(top) == [TAG]:
                freed += _delete(top / TAG)
            with suppress(OSError):  # It holds another program's folder, or is gone already.
                os.rmdir(folder)
    return freed


def _own_folders() -> list[Path]:
    return [folder for name in FOLDERS if _is_ours(folder := cache_root() / name)]


def _is_ours(folder: Path) -> bool:
    """True for a folder of the cache's first level that this package made."""
    return folder.name in FOLDERS and not folder.is_symlink() and _tag(folder) == TAG_TEXT


def _tag(folder: Path) -> str | None:
    """The text of a folder's tag, None without one."""
    try:
        return (folder / TAG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _files(top: Path) -> Iterator[Path]:
    """The files and links in one of this package's folders, but for its tag."""
    for name, folders, files in os.walk(top):
        folder = Path(name)
        links = [inner for inner in folders if (folder / inner).is_symlink()]
        yield from (folder / file for file in [*files, *links] if folder != top or file != TAG)
        folders[:] = [f for f in folders if _tag(folder / f) in (None, TAG_TEXT)]


def _bytes(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:  # Another process has deleted it.
        return 0


def _delete(file: Path) -> int:
    """Delete a file; returns its bytes."""
    size = _bytes(file)
    file.unlink(missing_ok=True)
    return size


# ---------------------------------------------------------------------------- what may be damaged


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder` in the cache, filled by fill(new folder) if it is missing or damaged.

    The checksums of its files stand in it, as sha256sum writes and checks them.
    """
    sums = folder / SUMS
    if folder.is_dir():
        if sums.is_file() and sums.read_bytes() == _sums_of(folder):
            return folder
        say_damaged(folder, "its checksums are others")
        shutil.rmtree(folder)
    with atomic_folder(folder) as new:
        fill(new)
        (new / SUMS).write_bytes(_sums_of(new))
    return folder


def _sums_of(folder: Path) -> bytes:
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            lines.append(f"{digest.hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()


def save_tensors(path: Path, tensors: dict[str, Tensor], name: str) -> None:
    """Write tensors to a .safetensors file of the cache, atomically, for its owner alone.

    name: stands for the content; it goes into the checksum, and load_tensors has to know it.

    Raises OSError naming the file and HYLORA_CACHE if it can't be written.
    """
    from safetensors import SafetensorError  # imported here: the layers alone need no safetensors
    from safetensors.torch import save_file

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        if path.exists() and not path.is_file():
            path.unlink()  # A pipe would be written to, and wait for a reader.
        with atomic_path(path, mode=0o600) as temporary:
            save_file(tensors, temporary, {CHECKSUM: tensor_hash(sorted(tensors.items()), name)})
    except (OSError, SafetensorError) as error:
        raise _about_cache(error, path) from error


def load_tensors(path: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors that save_tensors wrote to a file under this name.

    None without such a file. None also for a damaged one, or one that was written under another
    name, which a line on stderr says: the caller makes it again.
    """
    from safetensors import safe_open

    try:
        if not path.exists():
            return None
        if not path.is_file():  # A pipe would be waited for.
            raise OSError(f"{path} is no file")
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            checksum = (file.metadata() or {}).get(CHECKSUM)
        if checksum == tensor_hash(tensors.items(), name):
            return tensors
        reason = "its checksum is another one"
    # A damaged header raises anything, from KeyError to RuntimeError.
    except Exception as error:
        reason = " ".join(str(error).split())
    say_damaged(path, reason)
    return None


class Files:
    """A folder of files of tensors, each with a checksum.

    name: stands for all that the content depends on.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def save(self, part: str, tensors: dict[str, Tensor]) -> None:
        save_tensors(self.path(part), tensors, f"{self.name}/{part}")

    def find(self, part: str) -> dict[str, Tensor] | None:
        """The tensors of a whole file, None where there is none."""
        return load_tensors(self.path(part), f"{self.name}/{part}")

    def load(self, part: str) -> dict[str, Tensor]:
        """The tensors of a file that was found or saved before.

        Raises OSError naming the file if it is no longer what it was.
        """
        tensors = self.find(part)
        if tensors is None:
            raise OSError(
                f"{self.path(part)} was deleted or damaged while it was needed: the same command"
                " again goes on where this one stopped"
            )
        return tensors

    def clear(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def say_damaged(path: Path, reason: str) -> None:
    tqdm.write(f"{path} in the cache is damaged and made again: {reason}", file=sys.stderr)


@contextmanager
def kept_if_possible(what: str) -> Iterator[None]:
    """For writing what a command doesn't need in the cache: a cache that can't be written is said
    on stderr, and the command goes on."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"{what} not kept: {error}", file=sys.stderr)
