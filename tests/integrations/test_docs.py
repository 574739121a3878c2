"""The Python snippets of docs/integrations.md run as they stand, section by section.

Each section runs in a folder with what the document says: `dense`, a model that transformers saved,
`small`, the same compressed, both with their tokenizer, and `text.txt`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from helpers.documents import DOCUMENT, sections, write_models

# Section -> the modules without which its snippets are skipped.
NEEDS = {
    "transformers": (),
    "Training on several devices": (),
    "TRL": ("trl", "peft"),
    "Export": (),
    "Evaluation harness": ("lm_eval",),
    "PEFT": ("peft",),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", [name for name, snippets in sections().items() if snippets])
def test_snippets_run(name, models, tmp_path, monkeypatch):
    assert name in NEEDS, "add the section to NEEDS"
    missing = [module for module in NEEDS[name] if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")
    work = tmp_path / "work"
    shutil.copytree(models, work)
    monkeypatch.chdir(work)
    namespace = {"__name__": "snippet"}
    for line, code in sections()[name]:
        exec(compile("\n" * line + code, str(DOCUMENT), "exec"), namespace)


def test_the_table_names_every_section():
    """Each row of the table at the top links to its section."""
    table = DOCUMENT.read_text(encoding="utf-8").partition("\n## ")[0]
    linked = re.findall(r"^\| \[(.+?)\]\(#(.+?)\)", table, re.M)
    assert [name for name, _ in linked] == list(sections())
    for name, anchor in linked:
        assert anchor == re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")
