"""What torch.utils.flop_counter.FlopCounterMode counts for a layer: two operations for each number
of a weight and row of x, as it counts for torch's own products.

    forward    2 M (r K + N r + ra K + N ra); the pivoted form N - r in the place of N for U
    backward   the same for dx, 2 M ra K for dA, 2 M N ra for dB, 2 M N ra for dh_a without dx

The counter imports Triton, 0.3 s of CPU time, so the formulas wait until a program imports it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_waiting: dict[str, Callable[..., int]] = {}  # op -> formula, until the counter is imported


def register(backends: Iterable[str]) -> None:
    """Have the ops of these backends counted, from the import of the counter on."""
    formulas = dict(_PACKED)
    for name in backends:
        formulas |= {f"{name}_forward": _forward, f"{name}_backward": _backward}
    _register(formulas)


def register_quantized() -> None:
    """As register, for the ops on codes."""
    _register({"quantized_forward": _quantized_forward, "quantized_backward": _quantized_backward})


def _register(formulas: dict[str, Callable[..., int]]) -> None:
    if _COUNTER in sys.modules:
        _add(sys.modules[_COUNTER], formulas)
        return
    if not _waiting:
        sys.meta_path.insert(0, _AfterImport(lambda counter: _add(counter, _waiting)))
    _waiting.update(formulas)


def _add(counter: ModuleType, formulas: dict[str, Callable[..., int]]) -> None:
    for name, formula in formulas.items():
        if hasattr(torch.ops.hylora, name):  # those in C++ are there if it is compiled
            op = getattr(torch.ops.hylora, name)
            counter.register_flop_formula(op, get_raw=True)(formula)


class _AfterImport(MetaPathFinder):
    """Calls `then` with the counter's module once it has been imported."""

    def __init__(self, then):
        self._then = then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


# ----------------------------------------------------------------------- one formula for each op


def _forward(x: Tensor, *weights: Any, out_val: Any = None) -> int:
    return 2 * _rows(x) * _numbers(*weights[:4])


def _backward(dy, x, h_a, SVh, U, A, B, alpha, pivots, needs, *, out_val: Any = None) -> int:
    need_dx, need_dA, need_dB, _ = needs
    numbers = _numbers(SVh, U, A, B) if need_dx else _numbers(B) if need_dA else 0
    numbers += (_numbers(A) if need_dA else 0) + (_numbers(B) if need_dB else 0)
    return 2 * _rows(dy) * numbers


def _quantized_forward(x: Tensor, *inputs: Any, out_val: Any = None) -> int:
    frozen, (A, B), K = inputs[:6], inputs[6:8], inputs[-2]
    return 2 * _rows(x) * _numbers(*_shapes(frozen, K), A, B)


def _quantized_backward(dy, x, h_a, *inputs: Any, out_val: Any = None) -> int:
    frozen, (A, B, alpha, pivots, needs, K, _) = inputs[:6], inputs[6:]
    return _backward(dy, x, h_a, *_shapes(frozen, K), A, B, alpha, pivots, needs)


def _shapes(frozen: Sequence[Tensor], K: int) -> tuple[Tensor, Tensor]:
    """SVh and U, without numbers, of which frozen has the codes or themselves."""
    SVh, _, _, U, _, _ = frozen
    rank = len(SVh)
    return torch.empty(rank, K, device="meta"), torch.empty(len(U), rank, device="meta")


def _packed_matrix(x, panels, bias, n, limb_products, *, out_val: Any = None) -> int:
    return 2 * _rows(x) * x.shape[-1] * n


def _packed_layer(x, layer, bias, n, limb_products, *, out_val: Any = None) -> int:
    # P [r + ra, K]; Q [N or N - r, r + ra]; in the pivoted form B's r rows of the pivots
    P, _, Q, of_pivots = (torch.ops.hylora.cpu_unpack_part(layer, part) for part in range(4))
    rank = len(of_pivots)
    return 2 * _rows(x) * (_numbers(P, Q) + rank * (len(P) - rank))


def _packed_group(x, weights, matrix_outputs, biases, limbs, width, *, out_val: Any = None) -> int:
    return sum(
        _packed_matrix(x, packed, None, n, 0) if n else _packed_layer(x, packed, None, 0, 0)
        for packed, n in zip(weights, matrix_outputs, strict=True)
    )


_PACKED = {
    "cpu_linear": _packed_matrix,
    "cpu_packed_layer": _packed_layer,
    "cpu_packed_group": _packed_group,
}


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _numbers(*matrices: Tensor | None) -> int:
    return sum(matrix.numel() for matrix in matrices if matrix is not None)
