"""The standard library as text: its modules for tests, and Pythons without its sources."""

from __future__ import annotations

import ast
import sys
import zipfile
from pathlib import Path

import pytest

from hylora_kernels.text import sources, stdlib
from hylora_kernels.text.stdlib import EXCERPT, TEST_MODULES, code_text, stdlib_text

LICENCE = "# A licence.\n" * 200
PROSE = "Keep a list in order, so that a search in it is quick. " * 5


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes {name: source} as the whole standard library, in a folder or in an archive."""

    def write(files: dict[str, str], zipped: bool = False):
        names = {Path(name).parts[0].removesuffix(".py") for name in files} - {"stranger"}
        monkeypatch.setattr(sys, "stdlib_module_names", names)
        folder = tmp_path / "lib"
        folder.mkdir()
        for name, source in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(source, encoding="utf-8")
        root = folder
        if zipped:
            version = "{}{}".format(*sys.version_info)
            with zipfile.ZipFile(tmp_path / f"python{version}.zip", "w") as archive:
                for name in files:
                    archive.write(folder / name, name)
            monkeypatch.setattr(sys, "path", [str(tmp_path / f"python{version}.zip")])
            root = tmp_path / "nowhere"
        monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(root))

    stdlib_text.cache_clear()
    code_text.cache_clear()
    yield write
    stdlib_text.cache_clear()
    code_text.cache_clear()


def test_the_running_pythons_library_is_enough_to_calibrate_and_recover_on():
    train, test = (stdlib_text(split) for split in ("train", "test"))
    assert 500_000 < len(train) < 2_000_000 and 10_000 < len(test) < 100_000
    assert "SequenceMatcher" in train and "SequenceMatcher" not in test
    assert code_text("test").count("\ndef ") > 30


@pytest.mark.parametrize("text", [stdlib_text, code_text])
def test_the_modules_for_tests_are_in_no_other_part(text):
    lines = {split: set(text(split).split("\n")) for split in ("train", "test")}
    assert "class TextWrapper:" in code_text("test")
    assert not lines["train"] & {"class TextWrapper:", "def heappush(heap, item):"}
    # What both have in common is what any two modules have: braces, imports, "Return True".
    long = [line for line in lines["test"] if len(line) > 60]
    assert sum(line in lines["train"] for line in long) < len(long) / 50
    assert sources.python_docs_text()[:2000] not in text("train")


def test_a_modules_documentation_and_the_middle_of_its_code(library):
    code = "\n".join(f"value_{i} = {i}" for i in range(1000))
    source = f'"""{PROSE}"""\n{LICENCE}\n\ndef short():\n    """No."""\n\n{code}\n'
    library({"one.py": source, "bisect.py": "held = 1\n", "two.py": "x = 2\n"})
    prose, middle, other = stdlib_text("train").split("\n\n")
    assert prose == PROSE and other == "x = 2\n"
    assert len(middle) <= EXCERPT and "licence" not in middle
    assert middle.startswith("value_") and set(middle.split("\n")) <= set(code.split("\n"))
    assert stdlib_text("test") == "held = 1\n"
    assert "held" in stdlib_text("all") and "x = 2" in stdlib_text("all")
    assert code_text("train") == f"{source}\n\nx = 2\n"


def test_methods_are_documented_too_and_the_rest_of_a_long_module_is_not_parsed(
    library, monkeypatch
):
    method = f'class A:\n    def f(self):\n        """{PROSE}"""\n'
    filler = "# filler\n" * 1000
    library({"one.py": f"{method}{filler}\ndef later():\n    this is no Python\n"})
    assert stdlib_text("train").startswith(PROSE.strip())
    with pytest.raises(SyntaxError):
        ast.parse(code_text("train"))


def test_private_modules_tests_tables_and_strangers_are_left_out(library):
    kept = {"a/__init__.py": "k0 = 0\n", "a/b.py": "k1 = 1\n", "c.py": "k2 = 2\n"}
    left = {name: "left = 1\n" for name in (
        "_d.py", "a/_e.py", "test/__init__.py", "a/tests/__init__.py", "a/tests/f.py",
        "encodings/__init__.py", "pydoc_data/__init__.py", "pydoc_data/topics.py", "stranger.py",
    )}  # fmt: skip
    library(kept | left | {"broken.py": "no Python (\n", "empty.py": ""})
    assert code_text("all") == "k0 = 0\n\n\nk1 = 1\n\n\nno Python (\n\n\nk2 = 2\n"
    assert "no Python (" in stdlib_text("all")


def test_a_library_in_an_archive_is_read_there(library):
    library(
        {"one.py": "x = 1\n", "queue.py": "y = 2\n", "p/__init__.py": "", "p/q.py": "z = 3\n"}, True
    )
    assert code_text("train") == "x = 1\n\n\nz = 3\n" and code_text("test") == "y = 2\n"


def test_a_python_without_sources_says_so(library):
    library({})
    with pytest.raises(
        ModuleNotFoundError, match="'stdlib' needs the sources of Python's standard"
    ):
        stdlib_text("train")


def test_a_library_without_the_modules_for_tests_can_still_be_calibrated_on(library):
    library({"one.py": "x = 1\n"})
    assert stdlib_text("train") == "x = 1\n"
    with pytest.raises(
        ModuleNotFoundError, match=f"has not those of {TEST_MODULES[0]}, .* in .*lib"
    ):
        code_text("test")


@pytest.mark.parametrize("name", ["stdlib", "code"])
def test_another_split_is_refused(name):
    with pytest.raises(
        ValueError, match=f"split must be 'train', 'test' or 'all' for '{name}', got"
    ):
        sources.read_text(name, "validation")


def test_names_win_over_folders_and_files_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "stdlib").write_text("mine")
    for name in ("code", "stdlib"):
        assert sources.has_splits(name) and not sources.may_have_columns(name)
        assert sources.source_name(name, "test") == f"{name}, test"
        assert sources.held_out(name, "a.txt", name) == (name, "test")
    assert "class TextWrapper" in sources.read_text("code", "test")
