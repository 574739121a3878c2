"""What of a model a selection of linears reaches: the parameters left alone, and how much they are.

A model may hold most of its parameters outside of linears: transformers 5 stacks the experts of a
layer into tensors of three dimensions, so that the linears of Mixtral-8x7B are 3 % of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hylora_kernels.model.structure import is_linear
from hylora_kernels.support.console import table

if TYPE_CHECKING:
    from rich.table import Table

_log = logging.getLogger(__name__)

BY_WISH = ("excluded", "not included")


@dataclass
class Skipped:
    """A parameter of two or more dimensions that is left alone: its shape, the number of
    its elements (0 for one that is listed under another name too), and the reason."""

    shape: tuple[int, ...]
    parameters: int
    reason: str


def skipped_parameters(
    model: nn.Module, selected: Iterable[str], reasons: Mapping[str, str]
) -> dict[str, Skipped]:
    """name -> what is left alone of a dense model: each parameter of two or more dimensions that
    belongs to no selected linear. The name is that of the parameter, without ".weight" at its end.

    selected: paths of linears. reasons: name -> why it is left alone, where that is known.
    """
    targets, found, first = set(selected), {}, {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or path in targets:
                continue
            full = f"{path}.{name}".removesuffix(".weight").removeprefix(".")
            reason = reasons.get(full) or _reason(module, name)
            twin = first.setdefault(id(parameter), full)
            count = parameter.numel() if twin is full else 0
            if twin is not full:
                reason += f", the same tensor as {twin}"
            found[full] = Skipped(tuple(parameter.shape), count, reason)
    return found


def _reason(module: nn.Module, name: str) -> str:
    if is_linear(module):
        return "not included"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return f"{type(module).__name__}.{name} is no linear's weight"


def body_parameters(model: nn.Module) -> int:
    """The parameters of a model without its embeddings and its output head, a tied one once."""
    outside: list[Tensor] = [
        p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    ]
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, get, lambda: None)()
        outside += module.parameters() if module is not None else ()
    apart = set(map(id, outside))
    return sum(p.numel() for p in model.parameters() if id(p) not in apart)


def summary(skipped: Mapping[str, Skipped]) -> list[tuple[str, int, int, str]]:
    """(name with * for each number in it, tensors, parameters, reason), the largest first."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, one in skipped.items():
        row = rows.setdefault((re.sub(r"\b\d+\b", "*", name), one.reason), [0, 0])
        row[0] += 1
        row[1] += one.parameters
    found = [(name, *row, reason) for (name, reason), row in rows.items()]
    return sorted(found, key=lambda row: -row[2])


def skipped_table(skipped: Mapping[str, Skipped]) -> Table:
    """summary() as a rich Table."""
    return table("left alone", ("name", "tensors", "parameters", "reason"), summary(skipped))


def warn_if_little(selected: int, body: int, skipped: Mapping[str, Skipped]) -> None:
    """Log a warning if the selected linears hold less than half of the body's parameters. What the
    caller's own include and exclude leave out is no part of the body here."""
    body -= sum(one.parameters for one in skipped.values() if one.reason in BY_WISH)
    if selected >= body / 2:
        return
    rest = [
        f"{name} ({parameters:,}: {reason})"
        for name, _, parameters, reason in summary(skipped)
        if not reason.startswith((*BY_WISH, "embedding", "output head"))
    ]
    _log.warning(
        "the selected linears hold %s of the %s parameters of the model's body, which is all but"
        " embeddings and output head (%.0f %%): keep and adapters concern these only. Left alone:"
        " %s",
        f"{selected:,}",
        f"{body:,}",
        100 * selected / max(body, 1),
        "; ".join(rest[:8]) or "nothing",
    )
