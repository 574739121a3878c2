"""Modules imported after those of another library."""

from __future__ import annotations

import sys

import pytest

from hylora_kernels.support.imports import import_after


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library `other_lib` with a module `registry`, and `our_part`, which writes to it."""
    (tmp_path / "other_lib").mkdir()
    (tmp_path / "other_lib/__init__.py").write_text("")
    (tmp_path / "other_lib/registry.py").write_text("names = []\n")
    (tmp_path / "our_part.py").write_text(
        "from other_lib.registry import names\nnames.append('ours')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield {"other_lib.registry": "our_part"}
    for name in ("other_lib", "other_lib.registry", "our_part"):
        sys.modules.pop(name, None)


def test_ours_is_imported_after_the_others_module(library):
    import_after(library)
    import other_lib  # noqa: F401

    assert "our_part" not in sys.modules
    from other_lib import registry

    assert registry.names == ["ours"]


def test_ours_is_imported_at_once_where_the_other_is(library):
    from other_lib import registry

    import_after(library)
    assert registry.names == ["ours"]


def test_a_missing_library_is_as_missing_as_ever(library):
    import_after({"no_such_library.registry": "our_part"})
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        import no_such_library.registry  # noqa: F401
    assert "our_part" not in sys.modules


@pytest.mark.parametrize("is_there", [False, True])
def test_a_library_that_ours_does_not_know_works_without_it(library, tmp_path, is_there):
    (tmp_path / "our_part.py").write_text("from other_lib.registry import other_names\n")
    if is_there:
        from other_lib import registry
    with pytest.warns(RuntimeWarning, match=r"other_lib\.registry goes without our_part: Import"):
        import_after(library)
        from other_lib import registry
    assert registry.names == []
