"""The documentation builds as a site, and each of its links leads somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hylora_kernels

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    """Strict: a link to a page or heading that isn't there, and a page outside of the navigation,
    are errors."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config("mkdocs.yml", site_dir=str(tmp_path)))
    page = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    for name in set(hylora_kernels.__all__) - {"SVD_LoRA_Linear"}:
        assert f'id="hylora_kernels.{name}"' in page, name
    assert "lora_rank" in page and "<li><code>keep</code>" in re.sub(r"\s*<p>\s*", "", page)


def test_every_link_of_the_readme_leads_to_a_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    files = [link for link in links if link and "://" not in link]
    assert files and [link for link in files if not (ROOT / link).exists()] == []


def test_each_message_of_the_troubleshooting_page_is_one_of_the_package():
    """Code of three words or more in the first column, "..." for what varies, but transformers'
    own."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ((?!transformers).+?) \| ", page, re.M)
    quoted = [m for cell in cells for m in re.findall(r"`(.+?)`", cell) if m.count(" ") >= 2]
    files = (ROOT / "hylora_kernels").rglob("*.py")
    nodes = (n for f in files for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))))
    # An f-string's text has a node for each part between its values.
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    parts = {part.strip() for message in quoted for part in message.split("...") if part.strip()}
    assert len(quoted) > 9
    assert sorted(p for p in parts if not any(p in text for text in texts)) == []
