"""bfloat16 for triton's interpreter, which computes it wrongly and says nothing.

The interpreter keeps a bfloat16 as the uint16 of its bits, since numpy has no such type. In triton
3.9.0 tl.dot then multiplies those integers, arithmetic and comparison work on them, and a cast from
float32 truncates. Here they are widened to float32, which is exact, and results are rounded to
nearest even, as the hardware does. Operations that aren't mended refuse bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import triton.language as tl
from triton_interpreter.internals import Builder, Handle, replaced


def widen(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> the same values in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of the nearest bfloat16, the even one of two; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    to_even = 0x7FFF + ((bits >> 16) & 1)
    quiet_nan = (bits >> 16) | 0x40
    # Adding to a NaN's bits could carry it over to infinity.
    return np.where(np.isnan(values), quiet_nan, (bits + to_even) >> 16).astype(np.uint16)


def _is_bf16(handle: Handle) -> bool:
    # A comparison's result keeps the type of its operands, with booleans for data.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: Handle) -> Handle:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrowed(handle: Handle) -> Handle:
    if handle.data.dtype == np.bool_:
        return handle
    return Handle(narrow(handle.data), tl.bfloat16)


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """As long as the `with` lasts, kernels in the interpreter compute bfloat16 as a GPU does."""
    stock = {name: getattr(Builder, name) for name in (*_MENDED, *_REFUSED)}

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_bf16(d):
            raise NotImplementedError("tl.dot that adds up in bfloat16")
        rest = (d, input_precision, max_num_imprecise_acc)
        return stock["create_dot"](self, _widened(a), _widened(b), *rest)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return stock["cast_impl"](self, _widened(src), dst_type)
        return src if _is_bf16(src) else Handle(narrow(src.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return stock["create_fp_to_fp"](self, src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return stock["binary_op"](self, lhs, rhs, op)
        return _narrowed(stock["binary_op"](self, _widened(lhs), _widened(rhs), op))

    def unary_op(self, arg, op):
        if not _is_bf16(arg):
            return stock["unary_op"](self, arg, op)
        return _narrowed(stock["unary_op"](self, _widened(arg), op))

    mended = (create_dot, cast_impl, create_fp_to_fp, binary_op, unary_op)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(Builder, **{f.__name__: f for f in mended}))
        for name in _REFUSED:
            refusing = {name: _refusing(name, stock[name])}
            stack.enter_context(replaced(Builder, **refusing))
        yield


_MENDED = ("create_dot", "cast_impl", "create_fp_to_fp", "binary_op", "unary_op")
_REFUSED = (
    *("create_fma", "create_clampf", "create_erf", "create_rsqrt"),
    *("create_atomic_rmw", "create_atomic_cas"),
)


def _refusing(name, stock):
    """`stock`, but it raises NotImplementedError where an argument is bfloat16."""

    @functools.wraps(stock)
    def refuse(self, *args):
        if any(isinstance(arg, Handle) and _is_bf16(arg) for arg in args):
            raise NotImplementedError(f"{name} of bfloat16 is not repaired in the interpreter")
        return stock(self, *args)

    return refuse
