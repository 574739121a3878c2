"""Files of a folder replaced all at once."""

from __future__ import annotations

import os

import pytest

from hylora_kernels.support import staging


def replace(folder, files, obsolete=()):
    with staging.exclusive(folder), staging.replacement(folder, last="last") as new:
        for name, text in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)
        staging.discard(new, obsolete)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_files_are_replaced_and_obsolete_ones_removed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    replace(tmp_path, {"a": "1", "deep/b": "2", "last": "3"})
    replace(tmp_path, {"a": "4", "last": "5"}, obsolete=["deep/b", "never"])
    assert contents(tmp_path) == {"mine": "mine", "a": "4", "last": "5"}
    assert staging.current(tmp_path) == tmp_path


def test_a_block_that_raises_changes_nothing(tmp_path):
    replace(tmp_path, {"a": "1"})
    with (
        pytest.raises(KeyboardInterrupt),
        staging.exclusive(tmp_path),
        staging.replacement(tmp_path, last="a") as new,
    ):
        (new / "a").write_text("2")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a": "1"}
    assert os.listdir(tmp_path) == ["a"]


def test_what_was_decided_is_read_and_completed(tmp_path, monkeypatch):
    replace(tmp_path, {"a": "1", "b": "1", "last": "1"})
    os_replace = os.replace

    def fail_at_b(source, target):
        if target == tmp_path / "b":
            raise OSError("the process is killed here")
        os_replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_b)
    with pytest.raises(OSError, match="killed"):
        replace(tmp_path, {"a": "2", "b": "2"}, obsolete=["last"])
    monkeypatch.undo()
    now = staging.current(tmp_path)
    assert {name: (now / name).read_text() for name in staging.files_in(now)} == {
        "a": "2",
        "b": "2",
    }
    with staging.exclusive(tmp_path):
        assert contents(tmp_path) == {"a": "2", "b": "2"}
    assert staging.current(tmp_path) == tmp_path


def test_what_killed_processes_left_goes(tmp_path):
    (tmp_path / ".saving-0123").mkdir()
    (tmp_path / ".saving-0123" / "half").write_text("")
    (tmp_path / ".saving-not-a-folder").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / ".saving-link").symlink_to(tmp_path / "elsewhere")
    with staging.exclusive(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [
            *(".saving-link", ".saving-not-a-folder", "elsewhere")
        ]
    assert (tmp_path / "elsewhere" / "mine").exists()


def test_a_strangers_names_do_not_lead_out_of_the_folder(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    decided = folder / staging.DECIDED
    (decided / "link").mkdir(parents=True)
    outside.mkdir()
    (folder / "link").symlink_to(outside)
    (outside / "mine").write_text("mine")
    (decided / "link" / "new").write_text("theirs")
    staging.discard(decided, ["../outside/mine", str(outside / "mine"), "link/mine", ".", ""])
    with staging.exclusive(folder):
        assert contents(outside) == {"mine": "mine"}
