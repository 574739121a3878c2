"""A function that takes the fields of a dataclass, and what a field may be."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass

import pytest

from hylora_kernels.support.options import (
    check_options,
    option,
    option_of,
    reported_options,
    takes_options,
)


@dataclass(frozen=True)
class Shape:
    kind: str = option("round", "How it is cut.", choices=("round", "square"))
    edges: int = option(2, "How many.", least=1)
    secret: str = option("", "Not told.", reported=False)
    corners: int | None = option(None, "How many.", least=0)

    def __post_init__(self):
        check_options(self)


@takes_options(Shape)
def draw(canvas, options: Shape):
    """Draw on a canvas."""
    return canvas, options


def test_the_fields_are_the_arguments():
    assert draw("paper") == ("paper", Shape())
    assert draw("paper", "square", secret="x") == ("paper", Shape("square", 2, "x"))
    assert draw("paper", corners=None) == draw("paper") != draw("paper", corners=0)
    assert draw(edges=3, canvas="paper") == ("paper", Shape(edges=3))
    assert str(inspect.signature(draw)).startswith("(canvas, kind: 'str' = 'round', edges: 'int'")
    assert draw.__name__ == "draw" and draw.__doc__.startswith("Draw on a canvas.\n\nOptions:\n")
    assert "    edges: How many.\n" in draw.__doc__
    assert "    kind: How it is cut. One of: round, square.\n" in draw.__doc__


@dataclass(frozen=True)
class Shapes:
    count: int = option(MISSING, "How many.", least=1)
    kind: str = option_of(Shape, "kind")
    edges: int = option_of(Shape, "edges", reported=False)


def test_a_field_of_another_dataclass_has_its_default_and_its_rules():
    assert Shapes(3) == Shapes(3, kind="round", edges=2)
    assert reported_options(Shapes(3)) == {"count": 3, "kind": "round"}
    with pytest.raises(ValueError, match="kind must be one of"):
        check_options(Shapes(3, kind="oval"))
    with pytest.raises(TypeError, match="count"):
        Shapes()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"edge": 3}, TypeError, r"draw\(\): got an unexpected keyword argument 'edge'"),
        ({"kind": "oval"}, ValueError, r"kind must be one of \('round', 'square'\), got 'oval'"),
        ({"edges": 0}, ValueError, "edges must be an int of at least 1, got 0"),
        ({"edges": True}, ValueError, "edges must be an int of at least 1, got True"),
        ({"edges": 2.0}, ValueError, "edges must be an int of at least 1, got 2.0"),
        ({"edges": None}, ValueError, "edges must be an int of at least 1, got None"),
        ({"corners": -1}, ValueError, "corners must be an int of at least 0, got -1"),
        ({"corners": 2**70}, ValueError, "corners must be an int of 64 bits, got 1180591620717411"),
    ],
)
def test_what_a_field_may_not_be(arguments, error, message):
    with pytest.raises(error, match=message):
        draw("paper", **arguments)


def test_a_report_leaves_out_what_is_not_reported():
    assert reported_options(Shape(edges=4)) == {"kind": "round", "edges": 4, "corners": None}
