"""All that is refused, and the message it gives: `pytest tests/test_bad_input.py -s` lists it.

Every message names the argument, what came, and what is allowed.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn, randn, tensor

from hylora_kernels import SVDLoRALinear, svd_lora_linear, use_backend
from hylora_kernels.layers.factorize import pivot_rows, truncated_svd

K, N, R, RA = 6, 5, 3, 2
FLOATS = "float64, float32, bfloat16, float16"


def ints(*values):
    return tensor(values, dtype=torch.int32)


def op(pivoted=False, **changed):
    """A correct call of the op with one change."""
    arguments = {
        "x": randn(4, K),
        "SVh": randn(R, K),
        "U": randn(N - R if pivoted else N, R),
        "A": randn(RA, K),
        "B": randn(N, RA),
        "bias": randn(N),
        "pivots": ints(0, 2, 3) if pivoted else None,
    } | changed
    return lambda: svd_lora_linear(**arguments)


def in_autocast(call):
    def wrapped():
        with torch.autocast("cpu", torch.bfloat16):
            call()

    return wrapped


def layer(*sizes, **options):
    return lambda: SVDLoRALinear(*sizes, **options)


def from_linear(linear=None, rank=R, **options):
    return lambda: SVDLoRALinear.from_linear(linear or nn.Linear(K, N), rank, **options)


def linear_of(weight):
    """An nn.Linear that holds this weight, as a quantized layer holds its own."""
    linear = nn.Linear(K, N, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Quantized(torch.Tensor):
    """A tensor that passes for float32, as torchao's do."""


def product(U=None, SVh=None, **options):
    U, SVh = randn(N, R) if U is None else U, randn(R, K) if SVh is None else SVh
    return lambda: SVDLoRALinear.from_product(U, SVh, R, **options)


def dense(W, **options):
    return lambda: SVDLoRALinear.from_dense(W, RA, **options)


def factors(**changed):
    arguments = {"SVh": randn(R, K), "U": randn(N, R)} | changed
    return lambda: SVDLoRALinear.from_factors(**arguments)


def svd(W=None, *args, **options):
    return lambda: truncated_svd(randn(N, K) if W is None else W, *args, **options)


def called(made, *args):
    return lambda: made(*args)


def thawed(name):
    made = SVDLoRALinear(K, N, R)
    getattr(made, name).requires_grad_()
    return called(made, randn(4, K))


def backend(name):
    def call():
        with use_backend(name):
            pass

    return call


half = randn(4, K).half()
nested = torch.nested.nested_tensor([randn(2, K), randn(3, K)], layout=torch.jagged)
infinite = torch.full((N, K), math.inf)
unlike = tensor([[1.0, 2.0], [0.0, 1.0]])
indefinite = tensor([[1.0, 0.0], [0.0, -1.0]])

TYPE_ERRORS = {
    "x a list": (op(x=[1.0]), "x must be a Tensor, got list"),
    "U None": (op(U=None), "U must be a Tensor, got NoneType"),
    "bias a number": (op(bias=1.0), "bias must be a Tensor or None, got float"),
    "pivots a list": (op(pivots=[0]), "pivots must be a Tensor or None, got list"),
    "x sparse": (
        op(x=randn(4, K).to_sparse()),
        "x must be a strided tensor, got layout torch.sparse_coo",
    ),
    "x nested": (op(x=nested), "x must be a strided tensor, got a nested one"),
    "x int64": (
        op(x=torch.ones(4, K, dtype=torch.int64)),
        f"x must be one of {FLOATS}, got torch.int64",
    ),
    "U complex": (
        op(U=randn(N, R, dtype=torch.complex64)),
        f"U must be one of {FLOATS}, got torch.complex64",
    ),
    "x half, weights float": (
        op(x=half),
        "SVh must have x's dtype torch.float16, got torch.float32",
    ),
    "bias of another dtype": (
        op(bias=randn(N).double()),
        "bias must have x's dtype torch.float32, got torch.float64",
    ),
    "float64 among others under autocast": (
        in_autocast(op(A=randn(RA, K).double())),
        "A must have x's dtype torch.float32, got torch.float64",
    ),
    "int64 under autocast": (
        in_autocast(op(x=torch.ones(4, K, dtype=torch.int64))),
        f"x must be one of {FLOATS}, got torch.int64",
    ),
    "pivots int64": (
        op(pivoted=True, pivots=tensor([0, 2, 3])),
        "pivots must be int32, got torch.int64",
    ),
    "alpha text": (op(alpha="1"), "alpha must be a real number, got str"),
    "alpha a bool": (op(alpha=True), "alpha must be a real number, got bool"),
    "alpha a tensor": (op(alpha=tensor(1.0)), "alpha must be a real number, got Tensor"),
    "alpha complex": (op(alpha=1j), "alpha must be a real number, got complex"),
    "in_features a float": (layer(6.0, N, R), "in_features must be an int, got float"),
    "rank a bool": (layer(K, N, True), "rank must be an int, got bool"),
    "lora_rank text": (layer(K, N, R, "8"), "lora_rank must be an int, got str"),
    "layer alpha text": (layer(K, N, R, alpha="1"), "alpha must be a real number, got str"),
    "lora_dropout text": (
        layer(K, N, R, lora_dropout="0.1"),
        "lora_dropout must be a number, got str",
    ),
    "dtype int8": (
        layer(K, N, R, dtype=torch.int8),
        "dtype must be float64, float32, bfloat16 or float16, got torch.int8",
    ),
    "input of another dtype": (
        called(SVDLoRALinear(K, N, R), half),
        "SVh must have x's dtype torch.float16, got torch.float32",
    ),
    "linear a Conv1d": (from_linear(nn.Conv1d(K, N, 1)), "linear must be an nn.Linear, got Conv1d"),
    **{
        f"linear of {weight.dtype}": (
            from_linear(linear_of(weight), form=form),
            f"linear.weight must be float64, float32, bfloat16 or float16, got {weight.dtype}",
        )
        for form, weight in (
            ("pair", randn(N, K).to(torch.int8)),
            ("pivoted", randn(N, K).to(torch.uint8)),
            ("pair", randn(N, K) > 0),
            ("pivoted", randn(N, K).to(torch.complex64)),
            ("pair", randn(N, K).to(torch.float8_e4m3fn)),
            ("pivoted", torch.quantize_per_tensor(randn(N, K), 0.1, 0, torch.qint8)),
        )
    },
    "linear, quantized": (
        from_linear(linear_of(randn(N, K).as_subclass(Quantized))),
        "linear.weight must be a plain tensor, got a Quantized: a quantized or sharded",
    ),
    "linear, sparse": (
        from_linear(linear_of(randn(N, K).to_sparse())),
        "linear.weight must be a strided tensor, got layout torch.sparse_coo",
    ),
    "linear, lazy": (
        from_linear(nn.LazyLinear(N)),
        "linear.weight must be a plain tensor, got a UninitializedParameter",
    ),
    "from_product dtype": (
        product(dtype=torch.int8),
        "dtype must be float64, float32, bfloat16 or float16, got torch.int8",
    ),
    "from_product of ints": (
        product(SVh=torch.ones(R, K, dtype=torch.int8)),
        "SVh must be float64, float32, bfloat16 or float16, got torch.int8",
    ),
    "from_dense of ints": (
        dense(torch.ones(N, K, dtype=torch.int8)),
        "SVh must be float64, float32, bfloat16 or float16, got torch.int8",
    ),
    "from_factors of ints": (
        factors(U=torch.ones(N, R, dtype=torch.int64)),
        "U must be float64, float32, bfloat16 or float16, got torch.int64",
    ),
    "from_factors, adapter of ints": (
        factors(A=torch.ones(RA, K, dtype=torch.int8), B=randn(N, RA)),
        "A must be float64, float32, bfloat16 or float16, got torch.int8",
    ),
    "from_factors of two dtypes": (
        factors(U=randn(N, R).bfloat16()),
        "U must have SVh's dtype torch.float32, got torch.bfloat16",
    ),
    "from_linear rank a float": (from_linear(rank=2.0), "rank must be an int, got float"),
    "W a list": (svd([[1.0]]), "W must be a Tensor, got list"),
    "W complex": (svd(randn(2, 2, dtype=torch.complex64)), "W must be real, got torch.complex64"),
    "svd rank a float": (svd(None, 2.5), "rank must be an int or None, got float"),
}
VALUE_ERRORS = {
    "U on another device": (
        op(U=randn(N, R, device="meta")),
        "U must be on x's device cpu, got meta",
    ),
    "pivots on another device": (
        op(pivoted=True, pivots=ints(0, 2, 3).to("meta")),
        "pivots must be on x's device cpu, got meta",
    ),
    "SVh requires grad": (
        op(SVh=randn(R, K, requires_grad=True)),
        "SVh must not require grad: it is frozen and has no gradient here",
    ),
    "U requires grad": (
        op(U=randn(N, R, requires_grad=True)),
        "U must not require grad: it is frozen and has no gradient here",
    ),
    "x a scalar": (op(x=tensor(1.0)), "x must be [..., K] with at least one dim, got a scalar"),
    "x of another K": (op(x=randn(4, 7)), "SVh must be [r, K] = [any, 7] (K from x), got [3, 6]"),
    "SVh with three dims": (
        op(SVh=randn(1, R, K)),
        "SVh must be [r, K] = [any, 6] (K from x), got [1, 3, 6]",
    ),
    "U transposed": (op(U=randn(R, N)), "U must be [N, r] = [any, 3] (r from SVh), got [3, 5]"),
    "U of another r, pivoted": (
        op(pivoted=True, U=randn(2, 4)),
        "U must be [N - r, r] = [any, 3] (r from SVh), got [2, 4]",
    ),
    "A of another K": (op(A=randn(RA, 7)), "A must be [ra, K] = [any, 6] (K from x), got [2, 7]"),
    "B of another ra": (
        op(B=randn(N, 3)),
        "B must be [N, ra] = [5, 2] (N from U, ra from A), got [5, 3]",
    ),
    "B of another N, pivoted": (
        op(pivoted=True, B=randn(2, RA)),
        "B must be [N, ra] = [5, 2] (N from U, ra from A), got [2, 2]",
    ),
    "A without B": (
        op(B=None),
        "A and B must be given together or not at all, got A but B is None",
    ),
    "B without A": (
        op(A=None),
        "A and B must be given together or not at all, got B but A is None",
    ),
    "bias of another N": (op(bias=randn(7)), "bias must be [N] = [5] (N from U), got [7]"),
    "bias a row": (op(bias=randn(1, N)), "bias must be [N] = [5] (N from U), got [1, 5]"),
    "pivots too few": (
        op(pivoted=True, pivots=ints(0, 2)),
        "pivots must be [r] = [3] (r from SVh), got [2]",
    ),
    "pivots descending": (
        op(pivoted=True, pivots=ints(3, 2, 0)),
        "pivots must be strictly ascending within [0, 5), got [3, 2, 0]",
    ),
    "pivots repeated": (
        op(pivoted=True, pivots=ints(0, 2, 2)),
        "pivots must be strictly ascending within [0, 5), got [0, 2, 2]",
    ),
    "pivots beyond N": (
        op(pivoted=True, pivots=ints(0, 2, 5)),
        "pivots must be strictly ascending within [0, 5), got [0, 2, 5]",
    ),
    "pivots negative": (
        op(pivoted=True, pivots=ints(-1, 2, 4)),
        "pivots must be strictly ascending within [0, 5), got [-1, 2, 4]",
    ),
    "many pivots": (
        lambda: svd_lora_linear(
            randn(1, 2),
            randn(40, 2),
            randn(3, 40),
            pivots=torch.arange(40, dtype=torch.int32).flip(0),
        ),
        "pivots must be strictly ascending within [0, 43), got 40 values from 39 to 0 that are not",
    ),
    "alpha NaN": (op(alpha=math.nan), "alpha must be finite in float32, got nan"),
    "alpha infinite": (op(alpha=-math.inf), "alpha must be finite in float32, got -inf"),
    "alpha beyond float32": (op(alpha=-1e39), "alpha must be finite in float32, got -1e+39"),
    "alpha too large": (op(alpha=10**400), "alpha must be finite in float32, got 1000"),
    "backend unknown": (
        backend("gpu"),
        "use_backend must be one of ('auto', ... 'eager'), got 'gpu'",
    ),
    "out_features zero": (layer(K, 0, R), "out_features must be at least 1, got 0"),
    "rank zero": (layer(K, N, 0), "rank must be at least 1, got 0"),
    "rank too large": (
        layer(K, N, 6),
        "rank must be in 1..5 for in_features=6, out_features=5, got 6",
    ),
    "rank too large, pivoted": (
        layer(4, 9, 6, form="pivoted"),
        "rank must be in 1..4 or 9 for in_features=4, out_features=9, got 6",
    ),
    "lora_rank negative": (layer(K, N, R, -1), "lora_rank must be at least 0, got -1"),
    "form unknown": (
        layer(K, N, R, form="pivot"),
        "form must be one of ('pair', 'pivoted'), got 'pivot'",
    ),
    "layer alpha NaN": (layer(K, N, R, alpha=math.nan), "alpha must be finite in float32, got nan"),
    "lora_dropout one": (
        layer(K, N, R, lora_dropout=1.0),
        "lora_dropout must be in [0, 1), got 1.0",
    ),
    "lora_dropout NaN": (
        layer(K, N, R, lora_dropout=math.nan),
        "lora_dropout must be in [0, 1), got nan",
    ),
    "input of another width": (
        called(SVDLoRALinear(K, N, R), randn(4, 7)),
        "SVh must be [r, K] = [any, 7] (K from x), got [3, 6]",
    ),
    "layer with SVh thawed": (thawed("SVh"), "SVh must not require grad: it is frozen"),
    "layer with U thawed": (thawed("U"), "U must not require grad: it is frozen"),
    "from_linear rank": (
        from_linear(rank=6),
        "rank must be in 1..5 for in_features=6, out_features=5, got 6",
    ),
    "from_linear lora_rank": (from_linear(lora_rank=-2), "lora_rank must be at least 0, got -2"),
    "from_linear alpha": (
        from_linear(lora_rank=2, alpha=math.inf),
        "alpha must be finite in float32, got inf",
    ),
    "from_linear factorizer": (
        from_linear(factorizer="svd"),
        "factorizer must be one of ('gram', 'exact', 'randomized', 'nystrom'), got 'svd'",
    ),
    "from_linear form": (
        from_linear(form=None),
        "form must be one of ('pair', 'pivoted'), got None",
    ),
    "from_linear init": (from_linear(init="zero"), "init must be 'next' or 'classic', got 'zero'"),
    "from_linear init, full pivoted rank": (
        from_linear(rank=N, form="pivoted", init="zero"),
        "init must be 'next' or 'classic', got 'zero'",
    ),
    "from_linear lora_dropout": (
        from_linear(lora_rank=2, lora_dropout=2.0),
        "lora_dropout must be in [0, 1), got 2.0",
    ),
    "from_linear on meta": (
        from_linear(nn.Linear(K, N, device="meta")),
        "W must hold values, got a tensor on the meta device",
    ),
    "factors of two ranks": (
        factors(U=randn(N, 4)),
        "U must be [N, r] = [any, 3] (r from SVh), got [5, 4]",
    ),
    "factors with A of another K": (
        factors(A=randn(RA, 7), B=randn(N, RA)),
        "A must be [ra, K] = [any, 6] (K from SVh), got [2, 7]",
    ),
    "factors with A alone": (
        factors(A=randn(RA, K)),
        "A and B must be given together or not at all, got A but B is None",
    ),
    "factors with a long bias": (
        factors(bias=randn(7)),
        "bias must be [N] = [5] (N from U), got [7]",
    ),
    "factors with few pivots": (
        factors(pivots=ints(0, 1)),
        "pivots must be [r] = [3] (r from SVh), got [2]",
    ),
    "W a vector": (svd(randn(3)), "W must be a non-empty matrix [N, K], got [3]"),
    "W empty": (svd(randn(0, 3)), "W must be a non-empty matrix [N, K], got [0, 3]"),
    "W infinite": (svd(infinite), "W must be finite, got NaN or Inf in it"),
    "W on meta": (
        svd(randn(3, 3, device="meta")),
        "W must hold values, got a tensor on the meta device",
    ),
    "svd rank": (svd(None, 6), "rank must be in 1..5 for a 5 x 6 matrix, got 6"),
    "svd rank zero": (svd(None, 0), "rank must be in 1..5 for a 5 x 6 matrix, got 0"),
    "svd factorizer": (
        svd(None, 2, "svd"),
        "factorizer must be one of ('gram', 'exact', 'randomized', 'nystrom'), got 'svd'",
    ),
    "nystrom, rectangular": (
        svd(None, 2, "nystrom"),
        "factorizer 'nystrom' needs a symmetric matrix, got one of [5, 6] that is not",
    ),
    "nystrom, not symmetric": (
        svd(unlike, 1, "nystrom"),
        "factorizer 'nystrom' needs a symmetric matrix, got one of [2, 2] that is not",
    ),
    "nystrom, indefinite": (
        svd(indefinite, 1, "nystrom"),
        "factorizer 'nystrom' needs a positive semi-definite matrix, got one with negative eigen",
    ),
    "pivot rows of a wide U": (
        called(pivot_rows, randn(3, 5)),
        "U must be [N, r] with r at most N, got [3, 5]",
    ),
    "pivot rows of a vector": (
        called(pivot_rows, randn(3)),
        "U must be a non-empty matrix [N, r], got [3]",
    ),
}
CASES = {name: (call, TypeError, message) for name, (call, message) in TYPE_ERRORS.items()}
CASES |= {name: (call, ValueError, message) for name, (call, message) in VALUE_ERRORS.items()}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    # "..." stands for the names of other backends.
    assert re.match(re.escape(message).replace(r"\.\.\.\ ", ".*"), str(caught.value)), caught.value
    print(f"\n{case:36} {kind.__name__}: {str(caught.value)[:120]}", end="")


def test_the_same_calls_are_right_without_the_fault():
    for call in (op(), op(pivoted=True), layer(K, N, R), from_linear(), factors(), svd()):
        call()
    in_autocast(op(x=half))()
    SVDLoRALinear.from_linear(nn.Linear(4, 9), 9, form="pivoted")
