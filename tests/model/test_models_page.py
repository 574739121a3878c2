"""docs/models.md says of each architecture of the zoo what compress() replaces in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.zoo import NAMES, zoo_model

from hylora_kernels.model.coverage import BY_WISH, body_parameters, skipped_parameters, summary
from hylora_kernels.model.structure import discover

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"


def row(name: str) -> str:
    """| architecture | what is compressed | share of the body | what is left alone, and why |."""
    model = zoo_model(name)
    structure = discover(model)
    targets = [path for path, _ in model.named_modules() if path in structure.paths]
    left = skipped_parameters(model, targets, structure.skipped)
    share = sum(target.matrix.numel() for target in structure.targets) / body_parameters(model)
    assert not any(one.reason in BY_WISH for one in left.values())
    rest = [f"`{kind(path)}`: {reason}" for path, _, _, reason in summary(left)]
    types = ", ".join(f"`{one}`" for one in dict.fromkeys(map(kind, targets)))
    return f"| {name} | {types} | {share:.0%} | {'; '.join(dict.fromkeys(rest))} |"


def kind(path: str) -> str:
    """The last name of a path that is no number."""
    return next(name for name in reversed(path.split(".")) if not re.fullmatch(r"\d+|\*", name))


@pytest.mark.parametrize("name", NAMES)
def test_the_row_of(name):
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()


def test_no_other_row_stands_there():
    rows = re.findall(r"^\| ([a-z0-9_]+) \| `", PAGE.read_text(encoding="utf-8"), re.M)
    assert rows == list(NAMES)
