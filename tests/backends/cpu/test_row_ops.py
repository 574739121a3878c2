"""The row operations of a decoder block: attention over a cache, norms, rotary embeddings,
activations, sums and argmax, each no further from the float64 truth than twice what torch is in the
same dtype. The level is the one in use; a test below runs all others again on level "scalar"."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import row_ops
from helpers.numerics import distance
from helpers.row_ops import AttentionCase

from hylora_kernels.backends import cpu
from hylora_kernels.backends.cpu import rows
from hylora_kernels.backends.cpu.library import LEVEL

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
every_dtype = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)


def assert_as_exact(got, eager, exact):
    """The tolerance of helpers.numerics: twice the formula's own error and two roundings."""
    assert got.shape == exact.shape and got.dtype == eager.dtype
    size = max(1.0, distance(exact, torch.zeros_like(exact)))
    allowed = 2 * distance(eager, exact) + 2 * torch.finfo(got.dtype).eps * size
    assert distance(got, exact) <= allowed


# ------------------------------------------------------------------------------------ attention

ATTENTION = {
    **{f"size {size}": AttentionCase(size=size) for size in (1, 7, 64, 80, 96, 128, 256)},
    **{f"{keys} keys": AttentionCase(keys=keys) for keys in (1, 2, 31, 33, 64, 65, 4095)},
    **{f"group of {group}": AttentionCase(group=group) for group in (1, 2, 4, 5, 7, 9)},
    "values of another size": AttentionCase(size=40, value_size=24),
    "window": AttentionCase(keys=150, window=70),
    "window of one": AttentionCase(keys=5, window=1),
    "soft cap": AttentionCase(softcap=3.0, magnitude=8),
    "padding": AttentionCase(keys=150, sequences=4, first_key=(0, 1, 77, 149)),
    "padding and window": AttentionCase(keys=90, sequences=3, first_key=(0, 50, 85), window=20),
    "16 sequences": AttentionCase(sequences=16, size=16, first_key=tuple(range(16))),
    "pieces": AttentionCase(keys=300, pieces=3),
    "pieces of nothing": AttentionCase(keys=3, pieces=7),
    "pieces and padding": AttentionCase(
        keys=300, pieces=4, sequences=2, first_key=(0, 290), queries=3, window=200
    ),
    "chunk": AttentionCase(keys=100, queries=5),
    "chunk alone": AttentionCase(keys=70, queries=70),
    "chunk, padding and window": AttentionCase(
        keys=100, queries=20, sequences=2, first_key=(0, 85), window=30, group=2
    ),
    "great scores": AttentionCase(keys=70, magnitude=1e4),
    "cache in slots": AttentionCase(keys=70, heads_apart=False, sequences=2),
}


@every_dtype
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention(case, dtype):
    q, k, v = case.draw(dtype)
    first_key = None if case.first_key is None else torch.tensor(case.first_key)
    options = dict(first_key=first_key, window=case.window, softcap=case.softcap)
    got = rows.attention(q, k, v, case.keys, scale=case.scale, pieces=case.pieces, **options)
    exact = row_ops.attention(case, q.double(), k.double(), v.double())
    assert_as_exact(got, row_ops.attention(case, q, k, v), exact)


def test_attention_over_numbers_near_float16s_greatest():
    """Scores of 1e9 and sums of values above 65504 stay finite inside."""
    q = torch.full((1, 1, 3, 64), 6e4, dtype=torch.float16)
    k = torch.full((1, 1, 40, 64), 6e4, dtype=torch.float16)
    v = torch.full((1, 1, 40, 64), 6e4, dtype=torch.float16)
    out = rows.attention(q, k, v, 40, scale=1.0)
    assert torch.equal(out, v[:, :, :1].expand(1, 1, 3, 64))


@every_dtype
def test_attention_with_scores_all_very_low(dtype):
    """The greatest score is found among the keys, not taken to be above some number."""
    q = torch.full((1, 1, 1, 64), 1e4, dtype=dtype)
    k = torch.full((1, 1, 9, 64), -1e4, dtype=dtype)
    v = torch.randn(1, 1, 9, 64).to(dtype)
    out = rows.attention(q, k, v, 9, scale=1.0)
    assert_as_exact(out, v.mean(2, keepdim=True), v.double().mean(2, keepdim=True))


BAD_ATTENTION = {
    "keys must be in": lambda q, k: rows.attention(q, k, k, 9, scale=1.0),
    "keys must be in .3, 8., got 2": lambda q, k: rows.attention(q, k, k, 2, scale=1.0),
    "k and v must be caches": lambda q, k: rows.attention(q, k[..., :3], k, 8, scale=1.0),
    "for q's 4 heads, got 3": lambda q, k: rows.attention(
        q, k[:, :1].expand(2, 3, 8, 4), k[:, :1].expand(2, 3, 8, 4), 8, scale=1.0
    ),
    "first_key must have 2 numbers": lambda q, k: rows.attention(
        q, k, k, 8, scale=1.0, first_key=torch.zeros(3, dtype=torch.int64)
    ),
    "first_key must be 0 or more": lambda q, k: rows.attention(
        q, k, k, 8, scale=1.0, first_key=torch.tensor([0, -1])
    ),
    "k must have q's dtype": lambda q, k: rows.attention(q, k.half(), k, 8, scale=1.0),
}


@pytest.mark.parametrize("message", BAD_ATTENTION)
def test_attention_refuses(message):
    with pytest.raises(RuntimeError, match=message):
        BAD_ATTENTION[message](torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 8, 4))


# ----------------------------------------------------------------------------------- the others


@every_dtype
@pytest.mark.parametrize("width", (1, 7, 64, 576, 1001))
@pytest.mark.parametrize("centers", (False, True), ids=("rms", "layer"))
@pytest.mark.parametrize("rounds_first", (False, True), ids=("rounds last", "rounds first"))
def test_norm(dtype, width, centers, rounds_first):
    x = torch.randn(3, width + 5).to(dtype)[:, 2 : width + 2] * 4 + 1
    weight = torch.rand(width) + 0.5
    bias = torch.randn(width) if centers else None
    options = dict(eps=1e-5, centers=centers, rounds_first=rounds_first)
    got, none = rows.norm(x, weight, bias, **options)
    exact = row_ops.norm(x.double(), weight, bias, **options)
    assert none.numel() == 0
    assert_as_exact(got, row_ops.norm(x, weight, bias, **options), exact)


@every_dtype
def test_norm_rounds_as_the_models_do(dtype):
    """Bit for bit, where the mean of squares is exact: 1, and its root as well."""
    x = torch.ones(2, 64, dtype=dtype)
    x[:, ::2] *= -1
    weight = 1 + torch.randn(64) / 8
    for rounds_first in (False, True):
        options = dict(eps=0.0, centers=False, rounds_first=rounds_first)
        got, _ = rows.norm(x, weight, **options)
        assert torch.equal(got, row_ops.norm(x, weight, None, **options))


@every_dtype
@pytest.mark.parametrize("scale", (1.0, 0.22))
def test_norm_of_a_sum_with_the_residual(dtype, scale):
    x, residual = torch.randn(4, 70).to(dtype), torch.randn(4, 80).to(dtype)[:, 5:75]
    weight = torch.rand(70)
    y, total = rows.norm(x, weight, eps=1e-6, residual=residual, scale=scale)
    wanted = residual + (x if scale == 1 else x * torch.tensor(scale, dtype=torch.float32))
    assert torch.equal(total, wanted.to(dtype)) and torch.equal(total, rows.add(residual, x, scale))
    assert torch.equal(y, rows.norm(total, weight, eps=1e-6)[0])


@every_dtype
def test_norm_of_each_head(dtype):
    x, weight = torch.randn(2, 5, 3 * 24).to(dtype), torch.rand(24)
    y, _ = rows.norm(x, weight, eps=1e-6, heads=3)
    apart, _ = rows.norm(x.unflatten(-1, (3, 24)), weight, eps=1e-6)
    assert torch.equal(y, apart.flatten(-2))


@every_dtype
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize(
    "size, rotary_size", ((64, 64), (80, 32), (7, 6), (2, 2), (96, 96), (9, 0))
)
def test_rotary(dtype, interleaved, size, rotary_size):
    x = torch.randn(2, 3, 4 * size + 1).to(dtype)[..., : 4 * size].unflatten(-1, (4, size))
    angles = torch.rand(50, rotary_size // 2) * 7
    cos, sin = (table.to(dtype).float() for table in (angles.cos(), angles.sin()))
    positions = torch.randint(50, (2, 3))
    exact = row_ops.rotary(x.double(), cos, sin, positions, interleaved)
    eager = row_ops.rotary(x, cos, sin, positions, interleaved)
    cache = torch.full((2, 4, 9, size), 5.0, dtype=dtype)
    rows.rotary(x, cache.transpose(1, 2)[:, 4:7], cos, sin, positions, interleaved=interleaved)
    assert_as_exact(cache.transpose(1, 2)[:, 4:7], eager, exact)
    assert (cache[:, :, :4] == 5).all() and (cache[:, :, 7:] == 5).all()
    in_place = x.clone()
    rows.rotary(in_place, in_place, cos, sin, positions, interleaved=interleaved)
    assert torch.equal(in_place, cache.transpose(1, 2)[:, 4:7])


def test_rotary_refuses_a_position_without_angles():
    x, table = torch.zeros(1, 1, 1, 4), torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match=r"positions must be in \[0, 3\), got 3"):
        rows.rotary(x, x, table, table, torch.tensor([[3]]))


@every_dtype
@pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))
@pytest.mark.parametrize("name", row_ops.ACTIVATIONS)
@pytest.mark.parametrize("columns", (1, 7, 512, 1500))
def test_activation(dtype, gated, name, columns):
    x = (torch.randn(3, columns + 1) * 4).to(dtype)[:, 1:]
    up = torch.randn(3, columns).to(dtype) if gated else None
    function = row_ops.ACTIVATIONS[name]
    got = rows.activation(x, name, up)
    eager, exact = function(x), function(x.double())
    if gated:
        eager, exact = eager * up, exact * up.double()
    assert_as_exact(got, eager, exact)


@every_dtype
@pytest.mark.parametrize("name", row_ops.ACTIVATIONS)
def test_activation_of_every_magnitude(dtype, name):
    """From where powers vanish to where they would overflow; and what is no number stays none."""
    x = torch.logspace(-7, 4, 400, dtype=torch.float64)
    x = torch.cat((x, -x, torch.zeros(1))).to(dtype)
    function = row_ops.ACTIVATIONS[name]
    got, eager, exact = rows.activation(x, name), function(x), function(x.double())
    error, own = (got.double() - exact).abs(), (eager.double() - exact).abs()
    # 1 + erf(x) cancels below zero, as eager's does: a rounding of 1, times x.
    eps = torch.finfo(dtype).eps
    assert (error <= 2 * own + eps * exact.abs() + 2**-22 * x.double().abs().clamp(max=8)).all()
    assert rows.activation(torch.tensor([float("nan")], dtype=dtype), name).isnan().all()


@every_dtype
def test_softcap(dtype):
    x = torch.cat((torch.randn(500) * 40, torch.logspace(-6, 4, 100))).to(dtype)
    got = rows.activation(x, "softcap", softcap=30.0)
    assert_as_exact(got, torch.tanh(x / 30) * 30, torch.tanh(x.double() / 30) * 30)
    small = x.abs() < 1
    error = (got.double() / (torch.tanh(x.double() / 30) * 30) - 1).abs()[small & (x != 0)]
    assert error.max() <= 2 * torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("columns, pieces", ((1, 1), (7, 3), (1000, 1), (1000, 7), (49152, 16)))
def test_argmax(dtype, columns, pieces):
    x = torch.randn(4, columns).to(dtype)
    x[1] = -torch.rand(columns).to(dtype) - 1  # all below zero
    x[2] = -float("inf")
    assert torch.equal(rows.argmax(x, pieces), first_greatest(x))
    x[:, columns // 2 :] = x.amax()  # many equal numbers
    assert torch.equal(rows.argmax(x, pieces), first_greatest(x))
    x[3, columns // 3] = x[3, -1] = float("nan")
    assert rows.argmax(x, pieces)[3] == columns // 3


def first_greatest(x):
    return (x == x.amax(-1, keepdim=True)).int().argmax(-1)


@pytest.mark.skipif(LEVEL == "scalar", reason="is the level in use")
def test_on_the_scalar_level():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"HYLORA_ISA": "scalar", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
