"""Quantising against a slow GPTQ in float64, on grids, at every width; errors in their unit."""

from __future__ import annotations

import pytest
import torch
from helpers.compressing import random_terms

from hylora_kernels.compression import quantize as quantize_module
from hylora_kernels.compression.gptq import DAMPING
from hylora_kernels.compression.quantize import (
    error,
    quantize,
    quantize_each,
    quantize_embedding,
    quantize_weights,
)
from hylora_kernels.compression.whiten import factorize_whitened
from hylora_kernels.layers.factors import truncated
from hylora_kernels.layers.grids import CLIPS
from hylora_kernels.reference import dense_weight, dequantize, quantized
from hylora_kernels.weights import GROUP, PLANES, QuantizedMatrix, Weights


def problem(n=24, k=130, seed=0):
    """W [n, k], and G [k, k] and C [n, n] of correlated inputs and gradients."""
    g = torch.Generator().manual_seed(seed)

    def gram(size):
        rows = torch.randn(4 * size, size, generator=g) * torch.logspace(0, -1.5, size)
        rows = rows @ torch.linalg.qr(torch.randn(size, size, generator=g)).Q
        return rows.T @ rows

    return torch.randn(n, k, generator=g), gram(k), gram(n)


def on_a_grid(bits, n=6, k=130, seed=0):
    """A quantised matrix whose codes span each group's grid."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0 if bits < 8 else 1, 2**bits, (n, k), generator=g)
    codes[:, ::GROUP], codes[:, 1::GROUP] = 2**bits - 1, int(bits == 8)
    scales = torch.rand(n, -(-k // GROUP), generator=g) + 0.1
    zeros = None if bits == 8 else torch.randint(0, 2**bits, scales.shape, generator=g)
    return quantized(codes, scales, zeros, bits)


def assert_same(a: QuantizedMatrix, b: QuantizedMatrix):
    assert (a.bits, a.shape) == (b.bits, b.shape)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    assert (a.zeros is None) == (b.zeros is None)
    assert a.zeros is None or torch.equal(a.zeros, b.zeros)


def slow_gptq(W, bits, G):
    """The published form, by the inverse of G, one group's grid and one column at a time."""
    W, G, top = W.double(), G.double(), 2**bits - 1
    G = G + DAMPING * G.diagonal().mean() * torch.eye(len(G))
    scales, zeros = torch.zeros_like(W), torch.zeros_like(W)
    for columns in torch.arange(W.shape[1]).split(GROUP):
        for row in range(len(W)):
            w, least = W[row, columns], float("inf")
            for share in CLIPS if bits <= 5 else CLIPS[:1]:
                low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
                scale = torch.tensor((high - low) * share / top).half().double()
                zero = (-share * low / scale).round()
                off = ((w / scale).round() + zero).clamp(0, top).sub(zero).mul(scale) - w
                if (lost := float((off**2 * G.diagonal()[columns]).sum())) < least:
                    least, scales[row, columns], zeros[row, columns] = lost, scale, zero
    order = G.diagonal().argsort(descending=True)
    inverse = torch.linalg.cholesky(G[order][:, order].inverse(), upper=True)
    left, found = W[:, order].clone(), torch.zeros_like(W)
    for i, column in enumerate(order.tolist()):
        s, z = scales[:, column], zeros[:, column]
        found[:, column] = ((left[:, i] / s).round() + z).clamp(0, top).sub(z).mul(s)
        off = (left[:, i] - found[:, column]) / inverse[i, i]
        left[:, i:] -= off[:, None] * inverse[i, i:]
    return found


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_gptq_is_the_published_one(bits):
    W, G, _ = problem()
    found, expected = dequantize(quantize(W, bits, G), torch.float64), slow_gptq(W, bits, G)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", PLANES)
def test_feedback_lowers_the_error_at_every_width(bits):
    W, G, C = problem()
    found = {m: quantize(W, bits, G, method=m) for m in ("gptq", "rtn")}
    for damping in ((0.0, 0.0), (1e-2, 1e-1)):
        gptq, rtn = (error(W - dequantize(q), G, C, damping) for q in found.values())
        assert gptq < rtn / 2


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", PLANES)
def test_a_matrix_on_a_grid_is_found_again(bits, method):
    matrix = on_a_grid(bits)
    W, (_, G, _) = dequantize(matrix), problem()
    assert_same(quantize(W, bits, G, method=method), matrix)
    assert_same(quantize(W.double(), bits, method=method), matrix)


@pytest.mark.parametrize("bits", [3, 8])
def test_rows_and_columns_have_no_order(bits):
    """Rows are independent; columns may change places in their group, and groups theirs."""
    W, G, _ = problem(10, 192)
    g = torch.Generator().manual_seed(1)
    rows = torch.randperm(10, generator=g)
    groups = (torch.randperm(GROUP, generator=g) + GROUP * i for i in (2, 0, 1))
    columns = torch.cat([*groups])
    found = dequantize(quantize(W[rows][:, columns], bits, G[columns][:, columns]))
    assert torch.equal(found, dequantize(quantize(W, bits, G))[rows][:, columns])


def test_one_sweep_gives_what_single_calls_give():
    W, G, _ = problem()
    found = quantize_each([W[:10], W[10:]], [3, 8], G)
    for part, by_width in zip((W[:10], W[10:]), found, strict=True):
        assert [*by_width] == [3, 8]
        for bits, matrix in by_width.items():
            assert_same(matrix, quantize(part, bits, G))


def edge_cases():
    W, G, _ = problem(3, 70)
    dead, some = G.clone(), [0, 5, 66]
    dead[some] = dead[:, some] = 0
    alone = G.clone().fill_(0)
    alone[7, 7] = 1.0
    yield "dead columns", W, dead
    yield "one live column", W, alone
    yield "no live column", W, torch.zeros_like(G)
    yield "one direction", W, torch.ones_like(G)
    yield "one row", W[:1], G
    yield "one column", W[:, :1], G[:1, :1]
    yield "constant rows", torch.tensor([[0.0], [3.0], [-2.0]]).expand(3, 70), G
    yield "tiny rows", W * 1e-6, G
    yield "large rows", W * 1e4, G
    yield "a tiny G", W, G * 1e-30
    yield "bfloat16", W.bfloat16(), G


@pytest.mark.parametrize(("W", "G"), [pytest.param(*c[1:], id=c[0]) for c in edge_cases()])
def test_edge_cases_lose_no_more_than_rounding(W, G):
    """In the metric of G; and where G says nothing, each weight is within its grid's steps."""
    for bits, matrix in quantize_each([W], [2, 4, 8], G)[0].items():
        E, rtn = (W.float() - dequantize(q) for q in (matrix, quantize(W, bits, method="rtn")))
        assert error(E, G, None, (DAMPING, 0)) <= 1.01 * error(rtn, G, None, (DAMPING, 0)) + 1e-30
        live = G.diagonal() > 0
        span = (W.float().amax(1) - W.float().amin(1) + W.float().abs().amax(1))[:, None]
        assert (E[:, ~live].abs() <= 0.5 * span).all()
    zeros = quantize(torch.zeros_like(W), 3, G)
    assert not dequantize(zeros).any()


@pytest.mark.parametrize("C_of", ["two-sided", "one-sided"])
def test_error_of_dropped_components_is_the_sum_of_their_squares(C_of):
    W, G, C = problem(24, 40)
    C = C if C_of == "two-sided" else None
    factors = factorize_whitened("path", W, G, C)
    for rank in (3, 12, 20):
        E = W - factors.U[:, :rank] @ factors.SVh[:rank]
        assert error(E, G, C) == pytest.approx(factors.dropped(rank), rel=1e-3)
        assert error(E, G, C, factors.damping) == pytest.approx(factors.dropped(rank), rel=1e-3)


@pytest.mark.parametrize("dead", ["G", "C"])
def test_error_of_a_dead_layer_outbids_nobody_as_its_ranks_do(dead):
    W, G, C = problem(24, 40)
    (G if dead == "G" else C).zero_()
    factors = factorize_whitened("path", W, G, C)
    E = W - factors.U[:, :5] @ factors.SVh[:5]
    assert 0 < error(E, G, C) == pytest.approx(factors.dropped(5), rel=1e-3)


def layer(W, G, C, form, rank=16):
    factors = factorize_whitened("path", W, G, C)
    return truncated(factors.U, factors.SVh, rank, 2, form=form, dtype=torch.float32)


def dense(weights: Weights):
    U, SVh = (
        dequantize(t) if isinstance(t, QuantizedMatrix) else t for t in (weights.U, weights.SVh)
    )
    return dense_weight(Weights(SVh, U, pivots=weights.pivots))


@pytest.mark.parametrize("bits", PLANES)
def test_a_pair_is_refitted_to_what_its_quantised_SVh_became(bits, monkeypatch):
    W, G, C = problem(48, 130)
    weights = layer(W, G, C, "pair")
    found, to_W = quantize_weights(weights, bits, G), quantize_weights(weights, bits, G, W=W)
    monkeypatch.setattr(quantize_module, "RIDGE", 1e30)  # U stays as it is.
    apart = quantize_weights(weights, bits, G)
    assert_same(found.SVh, apart.SVh)
    assert (found.SVh.bits, found.U.bits) == (bits, bits)
    assert found.A is weights.A and found.B is weights.B

    def lost(target, weights):
        return error(target - dense(weights), G, None)

    assert lost(dense(weights), found) < 0.95 * lost(dense(weights), apart)
    assert lost(W, to_W) < lost(W, found) * (1 if bits < 6 else 1.0001)


def test_a_pairs_components_may_have_any_size():
    """One scale serves 64 columns of U, so these are brought to one size first."""
    W, G, C = problem(48, 130)
    weights = layer(W, G, C, "pair")
    sizes = torch.logspace(-3, 3, 16)
    scaled = Weights(weights.SVh / sizes[:, None], weights.U * sizes)
    lost = [error(dense(w) - dense(quantize_weights(w, 4, G)), G, C) for w in (weights, scaled)]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


def test_a_pivoted_layer_and_a_dense_one():
    W, G, C = problem(48, 130)
    weights = layer(W, G, C, "pivoted")
    found = quantize_weights(weights, 8, G)
    assert found.pivots is weights.pivots and found.A is weights.A and found.B is weights.B
    assert error(dense(weights) - dense(found), G, C) < 1e-3 * error(dense(weights), G, C)
    whole = Weights(W, W.new_empty(0, 48), pivots=torch.arange(48, dtype=torch.int32))
    found = quantize_weights(whole, 3, G)
    assert found.U is whole.U
    assert_same(found.SVh, quantize(W, 3, G))


def test_an_embeddings_error_counts_in_both_places():
    terms = random_terms(30, 70)
    terms = [terms.embedding.damped(), terms.head.damped()]
    for seed, term in enumerate(terms):
        term.metric = problem(1, 70, seed)[1].double()
    E = torch.randn(30, 70, generator=torch.Generator().manual_seed(1))
    gptq, rtn = (quantize_embedding(E, [2, 4], terms, method=m) for m in ("gptq", "rtn"))
    for bits, (matrix, lost) in gptq.items():
        assert matrix.bits == bits and lost < rtn[bits][1] / 1.5
        D, total = (E - dequantize(matrix)).double(), 0.0
        for t in terms:
            total += sum(
                float(w * (row @ t.metric @ row)) for w, row in zip(t.weight, D, strict=True)
            )
        assert lost == pytest.approx(total)


W, G, _ = problem(4, 70)
NAN = W.clone()
NAN[2, 3] = float("nan")
PIVOTED = Weights(W[:2], W[:2, :2], pivots=torch.arange(2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: quantize(NAN, 4), FloatingPointError, "W is not finite"),
        (lambda: quantize(W, 4, G / 0), FloatingPointError, "G is not finite"),
        (lambda: quantize(W, 7), ValueError, r"bits must be one of \(2, 3, 4, 5, 6, 8\), got 7"),
        (lambda: quantize_each([W], []), ValueError, "widths must not be empty"),
        (lambda: quantize_each([], [4]), ValueError, "matrices must not be empty"),
        (lambda: quantize(W, 4, method="awq"), ValueError, "method must be one of .*got 'awq'"),
        (lambda: quantize(W, 4, G[:9]), ValueError, r"G must be \[70, 70\] .*got \[9, 70\]"),
        (
            lambda: quantize(W, 4, 50 - 49 * torch.eye(70)),
            ValueError,
            "G must be positive semi-definite",
        ),
        (lambda: quantize(W[0], 4), ValueError, r"W must be a non-empty matrix \[n, k\], got"),
        (lambda: quantize([1.0], 4), TypeError, "W must be a Tensor, got list"),
        (lambda: quantize_each([W, G[:, :9]], [4]), ValueError, "matrices must .*one input"),
        (lambda: quantize(W * 1e6, 4), ValueError, "W: a group spans .*at most 9.83e"),
        (lambda: quantize_weights(PIVOTED, 4), ValueError, "bits must be 8 for a pivoted layer"),
    ],
)
def test_bad_arguments_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
