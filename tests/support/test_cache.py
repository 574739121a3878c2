"""The cache folder: its place, its permissions, clearing it, files that prove themselves whole."""

from __future__ import annotations

import errno
import os
import stat

import platformdirs
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hylora_kernels.support import cache


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_dir_follows_the_environment(root):
    folder = cache.cache_dir("models", "tiny")
    assert folder == root / "models" / "tiny"
    assert folder.is_dir()
    assert cache.cache_dir() == root


def test_cache_dir_without_the_environment_is_the_systems(tmp_path, monkeypatch):
    monkeypatch.delenv("HYLORA_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert cache.cache_dir("data") == tmp_path / "hylora_kernels" / "data"


@pytest.mark.parametrize("part", ["..", ".", "", "a/b", "/etc"])
def test_cache_dir_refuses_parts_that_lead_out(root, part):
    with pytest.raises(ValueError, match="parts must be plain folder names"):
        cache.cache_dir("data", part)
    with pytest.raises(ValueError, match="parts must be plain folder names"):
        cache.cache_dir(part)


def test_cache_size_and_clear(root):
    assert cache.cache_size() == 0
    assert cache.clear_cache() == 0
    tag = len(cache.TAG_TEXT)
    (cache.cache_dir("data") / "a.txt").write_bytes(b"x" * 1000)
    (cache.cache_dir("models", "m") / "b.bin").write_bytes(b"x" * 500)
    assert cache.cache_size() == 1500 + 2 * tag
    assert cache.clear_cache() == 1500 + 2 * tag
    assert cache.cache_size() == 0
    assert list(root.iterdir()) == []


def test_clear_cache_leaves_what_is_not_ours(root):
    """HYLORA_CACHE may point at a folder with other things in it, even one named like ours."""
    (root / "data").mkdir(parents=True)
    (root / "data" / "theirs.txt").write_text("keep me")
    (root / "note.txt").write_text("keep me too")
    (cache.cache_dir("data") / "ours.txt").write_text("1")
    (cache.cache_dir("models") / "ours.txt").write_text("22")
    assert cache.clear_cache() == 2 + len(cache.TAG_TEXT)
    assert (root / "data" / "theirs.txt").read_text() == "keep me"
    assert (root / "note.txt").exists()
    assert not (root / "models").exists()


def test_clear_cache_follows_no_link(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs.txt").write_text("keep me")
    (cache.cache_dir("data") / "link").symlink_to(outside)
    cache.clear_cache()
    assert (outside / "theirs.txt").exists()


# ----------------------------------------------------------------------------- folders of strangers


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def tagged(folder, text=cache.TAG_TEXT):
    folder.mkdir(parents=True)
    (folder / cache.TAG).write_text(text)
    (folder / "file").write_text("keep me")
    return folder


# The first lines of the tags that uv and cargo write.
UV = "Signature: 8a477f597d28d172789f06886806bc55"
CARGO = f"{UV}\n# This file is a cache directory tag created by cargo.\n"


@pytest.mark.parametrize("name", [".venv", "target", "data", "models"])
@pytest.mark.parametrize("text", [UV, CARGO, "", cache.TAG_TEXT + "more"])
def test_clearing_leaves_folders_that_others_tagged(root, name, text):
    tagged(root / name, text)
    assert cache.cache_size() == cache.clear_cache() == 0
    assert names(root / name) == [cache.TAG, "file"]


def test_clearing_leaves_folders_of_other_names(root):
    tagged(root / "mine")
    assert cache.clear_cache() == 0
    assert names(root / "mine") == [cache.TAG, "file"]


def test_clearing_leaves_what_others_tagged_inside(root):
    (cache.cache_dir("compress", "0" * 20) / "a").write_bytes(b"xx")
    tagged(root / "compress" / "there" / ".venv", UV)
    size = cache.cache_size()
    assert cache.clear_cache() == size - len(cache.TAG_TEXT) == 2
    assert names(root / "compress") == [cache.TAG, "there"]
    assert names(root / "compress" / "there" / ".venv") == [cache.TAG, "file"]
    assert cache.clear_cache() == 0  # The tag stays, so that the rest can be cleared later.


def test_a_link_at_the_first_level_is_not_cleared(root, tmp_path):
    outside = tagged(tmp_path / "outside")
    root.mkdir()
    (root / "models").symlink_to(outside)
    assert cache.cache_dir("models", "m").is_dir()
    assert cache.cache_size() == cache.clear_cache() == 0
    assert names(outside) == [cache.TAG, "file", "m"]


def test_clearing_goes_on_where_it_was_interrupted(root, monkeypatch):
    for name in ("a", "b", "c"):
        (cache.cache_dir("compress", "0" * 20) / name).write_bytes(b"xx")
    delete, left = cache._delete, [1]

    def interrupted(file):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return delete(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "_delete", interrupted)
        cache.clear_cache()
    assert cache.clear_cache() == 4 + len(cache.TAG_TEXT)
    assert names(root) == []


def test_tuned_tables_stay(root):
    (cache.cache_dir("tuned") / "gpu.json").write_text("{}")
    assert cache.clear_cache() == 0
    assert (root / "tuned" / "gpu.json").exists()


def test_the_first_level_has_fixed_names(root):
    with pytest.raises(
        ValueError, match=r"parts\[0\] must be one of benchmarks, compress, .* got 'mine'"
    ):
        cache.cache_dir("mine")


# -------------------------------------------------------------------------------------- permissions


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o000, 0o077, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_folders_and_files_are_for_their_owner_alone(root):
    folder = cache.cache_dir("compress", "key")
    assert {mode(root), mode(root / "compress")} == {0o700}
    cache.save_tensors(folder / "a.safetensors", {"x": torch.ones(2)}, "a")
    assert mode(folder / "a.safetensors") == 0o600
    for name in cache.FOLDERS:
        assert mode(cache.cache_dir(name)) == 0o700


@pytest.mark.parametrize("entries", [[], ["compress", "tuned"]])
def test_an_older_cache_is_closed_to_others(root, entries):
    for name in entries:
        tagged(root / name)
    root.mkdir(exist_ok=True)
    for folder in (root, *root.iterdir()):
        folder.chmod(0o755)
    cache.cache_dir("compress")
    assert mode(root) == mode(root / "compress") == 0o700


def test_a_root_with_other_things_in_it_keeps_its_permissions(root):
    """HYLORA_CACHE=$HOME or /, say; what this package makes there is closed all the same."""
    (root / "theirs").mkdir(parents=True)
    tagged(root / "models", UV)
    for folder in (root.parent, root, root / "theirs", root / "models"):
        folder.chmod(0o755)
    cache.cache_dir("tokens")
    cache.cache_dir("models")
    assert mode(root / "tokens") == 0o700
    assert (
        mode(root) == mode(root / "theirs") == mode(root / "models") == mode(root.parent) == 0o755
    )


def test_permissions_that_can_not_be_changed_are_left(root, monkeypatch):
    tagged(root / "data").chmod(0o755)

    def refused(*_):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(root), "chmod", refused)
    assert cache.cache_dir("data") == root / "data"


@pytest.mark.parametrize("place", ["file", "file/deeper", "/proc/nothing"])
def test_a_cache_that_can_not_be_made_names_the_variable(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / place))
    with pytest.raises(OSError, match=r"can't write .* in the cache: .*; HYLORA_CACHE=FOLDER"):
        cache.cache_dir("data")
    assert cache.cache_size() == cache.clear_cache() == 0


# --------------------------------------------------------------------------------- files of tensors


TENSORS = {"U": torch.randn(5, 3), "ids": torch.arange(7), "none": torch.empty(0, 2)}


@pytest.fixture
def stored(root):
    path = cache.cache_dir("compress") / "layer.safetensors"
    cache.save_tensors(path, TENSORS, "key/layer")
    return path


def test_tensors_come_back(stored, capsys):
    found = cache.load_tensors(stored, "key/layer")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert cache.load_tensors(stored.with_name("other"), "key/layer") is None
    assert capsys.readouterr().err == ""


def test_every_flipped_bit_is_seen(stored, capsys):
    whole = stored.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        stored.write_bytes(damaged)
        found = cache.load_tensors(stored, "key/layer")
        # A bit of the header's padding or of the word "__metadata__" may change nothing.
        assert found is None or all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
        assert len(capsys.readouterr().err.splitlines()) == (found is None), place


def other_tensors(path):
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, path)


def other_tensors_with_a_checksum(path):
    cache.save_tensors(path, {name: tensor + 1 for name, tensor in TENSORS.items()}, "key/other")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "ones": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "text": lambda path: path.write_text("not tensors"),
    "other tensors": other_tensors,
    "another part's": other_tensors_with_a_checksum,
    "a pipe": a_pipe,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_said_and_made_again(stored, damage, capsys):
    DAMAGE[damage](stored)
    assert cache.load_tensors(stored, "key/layer") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{stored} in the cache is damaged and made again: ")
    cache.save_tensors(stored, TENSORS, "key/layer")
    assert cache.load_tensors(stored, "key/layer") is not None


def test_a_full_disk_names_the_file_and_the_variable(stored, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        OSError, match=r"layer\.safetensors in the cache: No space .*HYLORA_CACHE"
    ) as e:
        cache.save_tensors(stored, TENSORS, "key/layer")
    assert e.value.errno == errno.ENOSPC
    assert names(stored.parent) == [cache.TAG, "layer.safetensors"]


def test_temporary_names_differ(root):
    """Two processes may write the same file at once."""
    with cache.atomic_path(root / "a") as one, cache.atomic_path(root / "a") as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert (root / "a").read_text() == "1"


# ------------------------------------------------------------------------------------------ folders


def a_missing_file(folder):
    (folder / "weights").unlink()


def a_strangers_file(folder):
    (folder / "code.py").write_text("")


def a_flipped_bit(folder):
    (folder / "inner" / "config").write_bytes(b"{!")


def an_older_version(folder):
    (folder / cache.SUMS).unlink()


@pytest.mark.parametrize(
    "damage", [a_missing_file, a_strangers_file, a_flipped_bit, an_older_version]
)
def test_a_damaged_folder_is_said_and_made_again(root, damage, capsys):
    made = []

    def fill(folder):
        made.append(folder)
        (folder / "weights").write_bytes(b"x" * 3_000_000)
        (folder / "inner").mkdir()
        (folder / "inner" / "config").write_bytes(b"{}")

    folder = cache.cache_dir("models") / "one"
    assert cache.cached_folder(folder, fill) == cache.cached_folder(folder, fill) == folder
    assert len(made) == 1 and capsys.readouterr().err == ""
    damage(folder)
    cache.cached_folder(folder, fill)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder} in the cache is damaged and made again: ")
    cache.cached_folder(folder, fill)
    assert len(made) == 2 and names(folder) == [cache.SUMS, "inner", "weights"]
    assert capsys.readouterr().err == ""
