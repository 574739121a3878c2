"""SVDLoRALinear: its constructors, its output and gradients, merging, counting."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.numerics import FACTORS, dense_weight, every_form, make_layer
from torch import Tensor, nn

from hylora_kernels import SVD_LoRA_Linear, SVDLoRALinear, reference, use_backend
from hylora_kernels.layers.factorize import truncated_svd
from hylora_kernels.weights import Weights

SHAPES = [(9, 14), (14, 9), (12, 12), (1, 6), (6, 1)]  # N, K
two_forms = pytest.mark.parametrize("form", ["pair", "pivoted"])


def linear_with_spectrum(N, K, spectrum, dtype=torch.float64) -> nn.Linear:
    left, right = (torch.linalg.qr(torch.randn(n, len(spectrum)).double()).Q for n in (N, K))
    linear = nn.Linear(K, N, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_((left * spectrum) @ right.T)
    return linear


# ------------------------------------------------------------------------------------- from_linear


@two_forms
@pytest.mark.parametrize("factorizer", ["gram", "exact"])
@pytest.mark.parametrize("init", ["next", "classic"])
@pytest.mark.parametrize("N, K", SHAPES, ids=str)
def test_from_linear_is_the_best_approximation(N, K, init, factorizer, form):
    full = min(N, K)
    spectrum = 2.0 ** -torch.arange(full, dtype=torch.float64)
    linear = linear_with_spectrum(N, K, spectrum)
    for rank, lora_rank in {(1, 0), (max(1, full // 2), 2), (full, 0), (max(1, full - 1), 3)}:
        layer = SVDLoRALinear.from_linear(
            linear, rank, lora_rank, alpha=0.5, factorizer=factorizer, form=form, init=init
        )
        assert (layer.rank, layer.lora_rank) == (rank, lora_rank)
        held = rank + lora_rank if init == "next" else rank
        error = float((dense_weight(layer) - linear.weight.detach()).norm())
        assert error == pytest.approx(float(spectrum[held:].norm()), rel=1e-6, abs=1e-9)
        x = torch.randn(5, K, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ dense_weight(layer).T + linear.bias)


@two_forms
def test_from_linear_adapter_is_balanced_and_starts_as_asked(form):
    linear = linear_with_spectrum(9, 14, torch.arange(9, 0, -1).double())
    for alpha in (0.5, -3.0):
        layer = SVDLoRALinear.from_linear(linear, 4, 8, alpha=alpha, form=form)
        rows, columns = layer.A.norm(dim=1), abs(alpha) * layer.B.norm(dim=0)
        torch.testing.assert_close(rows[:5], columns[:5])
        assert torch.equal(columns[5:], torch.zeros(3).double()) and (rows[5:] > 0.1).all()
        torch.testing.assert_close(dense_weight(layer), linear.weight)
    for options in ({"init": "classic"}, {"alpha": 0.0}):
        layer = SVDLoRALinear.from_linear(linear, 4, 3, form=form, **options)
        assert not layer.B.any() and 0.5 < layer.A.norm(dim=1).mean() < 2


@two_forms
def test_a_random_adapter_is_drawn_by_the_seed_or_by_torch(form):
    linear = nn.Linear(14, 9)
    makers = {
        "from_linear": lambda **seed: SVDLoRALinear.from_linear(
            linear, 4, 3, form=form, init="classic", **seed
        ),
        "from_linear, alpha": lambda **seed: SVDLoRALinear.from_linear(
            linear, 4, 3, form=form, alpha=0, **seed
        ),
        "from_linear, dense": lambda **seed: SVDLoRALinear.from_linear(
            linear, 9, 3, form="pivoted", **seed
        ),
        "beyond the components": lambda **seed: SVDLoRALinear.from_linear(
            linear, 8, 3, form=form, **seed
        ),
        "from_dense": lambda **seed: SVDLoRALinear.from_dense(linear.weight, 3, **seed),
        "from_product": lambda **seed: SVDLoRALinear.from_product(
            torch.ones(9, 4), torch.ones(4, 14), 4, 3, form=form, **seed
        ),
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        first, second = make().A, make().A
        torch.manual_seed(0)
        assert torch.equal(make().A, first), name
        assert not torch.equal(second, first), name
        state = torch.get_rng_state()
        assert torch.equal(make(seed=5).A, make(seed=5).A), name
        assert not torch.equal(make(seed=5).A, make(seed=6).A), name
        assert torch.equal(torch.get_rng_state(), state), name


@two_forms
def test_an_adapter_of_components_draws_nothing(form):
    linear = nn.Linear(14, 9)
    state = torch.get_rng_state()
    SVDLoRALinear.from_linear(linear, 4, 3, form=form)
    assert torch.equal(torch.get_rng_state(), state)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_linear_keeps_dtype_bias_and_mode(dtype, form):
    linear = nn.Linear(14, 9, dtype=dtype).eval()
    linear.bias.requires_grad_(False)
    rank, form = (9, "pivoted") if form == "dense" else (4, form)
    layer = SVDLoRALinear.from_linear(linear, rank, 2, form=form, lora_dropout=0.3)
    assert all(getattr(layer, name).dtype == dtype for name in FACTORS)
    assert layer.bias is linear.bias and not layer.bias.requires_grad
    assert not layer.training and layer.lora_dropout == 0.3
    bare = SVDLoRALinear.from_linear(nn.Linear(14, 9, bias=False, dtype=dtype), rank, form=form)
    assert bare.bias is None and bare.A is None and bare.B is None and bare.training
    for made in (layer, bare):
        assert made(torch.ones(2, 14, dtype=dtype)).dtype == dtype


def test_from_linear_of_full_pivoted_rank_is_the_linear_itself():
    for N, K in ((9, 14), (14, 9)):
        linear = nn.Linear(K, N)
        layer = SVDLoRALinear.from_linear(linear, rank=N, lora_rank=2, form="pivoted")
        assert torch.equal(layer.SVh, linear.weight) and layer.U.shape == (0, N)
        assert layer.pivots.tolist() == list(range(N)) and layer.keep == 1
        x = torch.randn(3, K)
        torch.testing.assert_close(layer(x), linear(x))


@every_form
def test_from_factors_keeps_the_given_tensors(form):
    made = make_layer(form)
    tensors = [getattr(made, name).detach() for name in FACTORS]
    layer = SVDLoRALinear.from_factors(*tensors, made.bias, made.alpha, made.pivots)
    held = [getattr(layer, name) for name in FACTORS]
    assert [t.data_ptr() for t in held] == [t.data_ptr() for t in tensors]
    assert layer.bias is made.bias and layer.form == made.form
    x = torch.randn(2, 14, dtype=torch.float64)
    assert torch.equal(layer(x), made(x))


# -------------------------------------------------------------------------------- what it computes


@every_form
@pytest.mark.parametrize("lora_rank", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_op(bias, lora_rank, form):
    layer = make_layer(form, lora_rank=lora_rank, bias=bias, alpha=0.37)
    assert (layer.bias is None) == (not bias) and (layer.A is None) == (not lora_rank)
    x = torch.randn(2, 3, 14, dtype=torch.float64)
    expected = x @ dense_weight(layer).T
    torch.testing.assert_close(layer(x), expected + layer.bias if bias else expected)


def test_a_new_layer_has_the_variance_of_a_linear_and_no_adapter_yet():
    x = torch.randn(200, 256)
    for form, rank in (("pair", 64), ("pivoted", 64), ("pivoted", 128)):
        layer = SVDLoRALinear(256, 128, rank, 8, form=form)
        assert not layer.B.any()
        expected = float(nn.Linear(256, 128)(x).detach().std())
        assert float(layer(x).detach().std()) == pytest.approx(expected, rel=0.15)


@every_form
def test_dropout_acts_on_the_adapter_in_training_alone(form):
    layer = make_layer(form, lora_dropout=0.4, alpha=0.7)
    without = copy.deepcopy(layer)
    without.lora_dropout = 0.0
    x = torch.randn(1, 14, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), without.train()(x))
    draws = layer.train()(x.expand(20_000, -1))
    spread = draws.std(0) / len(draws) ** 0.5
    assert (spread > 0).all()
    assert ((draws.mean(0) - without(x)).abs() < 5 * spread).all()
    base = SVDLoRALinear.from_factors(layer.SVh, layer.U, bias=layer.bias, pivots=layer.pivots)
    from_adapter = draws[:100] - base(x)
    assert torch.linalg.matrix_rank(from_adapter, rtol=1e-9) == layer.lora_rank


@every_form
def test_dropout_gradients(form):
    layer = make_layer(form, lora_dropout=0.4, alpha=0.7)
    x = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    wanted = [x, layer.A, layer.B, layer.bias]
    torch.manual_seed(3)
    got = torch.autograd.grad(layer(x).square().sum(), wanted)
    torch.manual_seed(3)
    base_weight = reference.dense_weight(Weights(layer.SVh, layer.U, pivots=layer.pivots))
    base = x @ base_weight.T + layer.bias
    y = base + layer.alpha * F.dropout(x, 0.4) @ layer.A.T @ layer.B.T
    expected = torch.autograd.grad(y.square().sum(), wanted)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two)
    plain = make_layer(form, lora_rank=0, lora_dropout=0.4)
    assert torch.equal(plain.train()(x), plain.eval()(x))


@every_form
@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
def test_float32_masters_on_a_bfloat16_base(lora_dropout, form):
    layer = make_layer(form, dtype=torch.bfloat16, lora_dropout=lora_dropout)
    low = copy.deepcopy(layer)
    layer.A, layer.B = nn.Parameter(layer.A.float()), nn.Parameter(layer.B.float())
    x = torch.randn(5, 14, dtype=torch.bfloat16)
    ys = []
    for each in (layer, low):
        torch.manual_seed(0)
        ys.append(each(x))
        ys[-1].square().sum().backward()
    assert ys[0].dtype == torch.bfloat16 and torch.equal(*ys)
    for name in ("A", "B"):
        grad = getattr(layer, name).grad
        assert grad.dtype == torch.float32 and torch.equal(grad.bfloat16(), getattr(low, name).grad)
        assert layer.state_dict()[name].dtype == torch.float32
    assert layer.parameter_count(merged=False) == low.parameter_count(merged=False)
    assert layer.merge().SVh.dtype == layer.U.dtype == torch.bfloat16


# ---------------------------------------------------------------------------- range of h in float16


def with_large_outputs(kind: str, N: int, K: int, largest: float) -> tuple[nn.Linear, Tensor]:
    """A linear whose first singular value stands out, or that copies one input to one output, and
    float16 inputs that give outputs up to `largest`."""
    if kind == "mean":
        W, x = torch.randn(N, K) * 0.02 + 0.02, torch.randn(4, K) + 3
    elif kind == "gaussian":
        W, x = torch.randn(N, K) / K**0.5, torch.randn(4, K)
    else:  # one output and one input that stand out, as in language models
        W, x = torch.randn(N, K) * 0.01, torch.randn(4, K)
        W[3] += 1
        W[:, 5] += 2
        x[:, 5] *= 30
    linear = nn.Linear(K, N, bias=False)
    y = x @ W.T
    x_scale = min(1.0, 6e4 / float(x.abs().max()))
    linear.weight.data = W * (largest / float(y.abs().max()) / x_scale)
    return linear.half(), (x * x_scale).half()


@two_forms
@pytest.mark.parametrize("kind", ["mean", "gaussian", "outliers"])
@pytest.mark.parametrize("N, K", [(256, 192), (96, 384)])
def test_float16_is_finite_wherever_the_linear_is(N, K, kind, form):
    linear, x = with_large_outputs(kind, N, K, 6e4)
    expected = linear(x)
    assert expected.isfinite().all() and expected.abs().max() > 5.5e4
    weight = linear.weight.double()
    rank = min(N, K) // 2
    exact = {r: truncated_svd(weight, r) for r in (rank, rank + 16)}
    layers = {
        factorizer: SVDLoRALinear.from_linear(linear, rank, factorizer=factorizer, form=form)
        for factorizer in ("gram", "exact", "randomized")
    }
    U, S, Vh = exact[rank + 16]
    for name, left, right in (
        ("all in SVh", U, S[:, None] * Vh),
        ("all in U", U * S, Vh),
        ("even", U * S.sqrt(), S.sqrt()[:, None] * Vh),
        ("tiny U", U * 1e-12, 1e12 * S[:, None] * Vh),
    ):
        layers[name] = SVDLoRALinear.from_product(left, right, rank, form=form, dtype=torch.float16)
    merged = SVDLoRALinear.from_product(U, S[:, None] * Vh, rank, 16, form=form)
    layers["merged"] = merged.merge().half()
    for name, layer in layers.items():
        U, S, Vh = exact[layer.rank]
        truth = x.double() @ Vh.T @ (U * S).T
        for backend in ("eager", "cpu"):
            with use_backend(backend):
                y = layer.half()(x)
            assert y.isfinite().all(), (name, backend)
            if name != "randomized":
                assert (y - truth).norm() < 2e-3 * truth.norm(), (name, backend)


def test_powers_of_two_change_no_bit_of_other_dtypes():
    N, K = 48, 40
    U, S, Vh = truncated_svd(torch.randn(N, K), 24)
    x = torch.randn(5, K)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = SVDLoRALinear.from_product(U, S[:, None] * Vh, 24, dtype=dtype)
        plain = SVDLoRALinear.from_factors(
            (S[:, None] * Vh).to(dtype).contiguous(), U.to(dtype).contiguous()
        )
        assert torch.equal(layer(x.to(dtype)), plain(x.to(dtype)))
        sizes = layer.U.double().norm(dim=0) / N**0.5
        assert (sizes > 0.99).all() and (sizes < 2.01).all()
        power = torch.log2(layer.U.abs().sum(0) / plain.U.abs().sum(0))
        torch.testing.assert_close(power, power.round(), rtol=0, atol=1e-2)


def test_a_pair_with_components_of_zero_stays_finite():
    U, SVh = torch.randn(9, 4), torch.randn(4, 14)
    U[:, 2], SVh[3] = 0, 0
    layer = SVDLoRALinear.from_product(U, SVh, 4)
    torch.testing.assert_close(dense_weight(layer), (U @ SVh).double(), rtol=1e-5, atol=1e-6)
    empty = SVDLoRALinear.from_linear(linear_with_spectrum(9, 14, torch.zeros(9)), 4)
    assert not dense_weight(empty).any()


# -------------------------------------------------------------------------------- merge, to_linear

MERGES = [  # form, N, K, rank, lora_rank, the merged rank
    ("pair", 9, 14, 4, 3, 7),
    ("pair", 9, 14, 6, 3, 9),
    ("pair", 9, 14, 6, 5, 9),
    ("pair", 14, 9, 6, 5, 9),
    ("pivoted", 9, 14, 4, 3, 7),
    ("pivoted", 14, 9, 6, 3, 9),
    ("pivoted", 9, 14, 6, 3, 9),
    ("pivoted", 14, 9, 6, 5, 14),
    ("pivoted", 9, 14, 6, 5, 9),
    ("pivoted", 9, 14, 9, 3, 9),
    ("pivoted", 14, 9, 14, 3, 14),
    ("pivoted", 1, 5, 1, 2, 1),
]


@pytest.mark.parametrize("alpha", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("form, N, K, rank, lora_rank, merged", MERGES)
def test_merge_is_exact(form, N, K, rank, lora_rank, merged, alpha):
    layer = make_layer(form, N, K, rank, lora_rank, alpha=alpha)
    weight, count, keep = dense_weight(layer), layer.parameter_count(), layer.keep
    linear, bias = layer.to_linear(), layer.bias
    assert layer.merge() is layer
    assert layer.A is None and layer.B is None and (layer.rank, layer.lora_rank) == (merged, 0)
    assert layer.bias is bias and layer.form == form
    torch.testing.assert_close(dense_weight(layer), weight)
    x = torch.randn(3, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)
    torch.testing.assert_close(linear(x), x @ weight.T + bias)
    held = layer.parameter_count(merged=False)
    assert held == layer.parameter_count() == count and layer.keep == keep
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")
    before = layer.SVh
    assert layer.merge().SVh is before, "nothing is left to merge"


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_rounds_no_more_than_a_few_times(dtype, form):
    for seed in range(5):
        torch.manual_seed(seed)
        layer = make_layer(form, 40, 50, 20, 8, dtype=dtype)
        weight = dense_weight(layer)
        for made in (dense_weight(layer.merge()), layer.to_linear().weight.double()):
            assert (made - weight).norm() < 4 * torch.finfo(dtype).eps * weight.norm()


def test_to_linear():
    layer = make_layer("pivoted", dtype=torch.bfloat16).eval()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and not linear.training and linear.bias is layer.bias
    assert linear.weight.dtype == torch.bfloat16 and linear.weight.shape == (9, 14)
    assert (linear.in_features, linear.out_features) == (14, 9)
    assert torch.equal(linear.weight, dense_weight(layer).bfloat16())
    assert make_layer(bias=False).to_linear().bias is None


# ------------------------------------------------------------------------------ counting, printing


def test_parameter_count_and_keep():
    N, K = 9, 14
    for form, rank, lora_rank, merged in (
        ("pair", 4, 0, 4 * 23),
        ("pair", 4, 3, 7 * 23),
        ("pair", 8, 3, 9 * 23),
        ("pivoted", 4, 0, 4 * 19),
        ("pivoted", 4, 3, 7 * 16),
        ("pivoted", 8, 3, 9 * 14),
        ("pivoted", 9, 3, 9 * 14),
    ):
        layer = SVDLoRALinear(K, N, rank, lora_rank, form=form)
        held = sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
        assert layer.parameter_count(merged=False) == held
        assert layer.parameter_count() == merged and layer.keep == merged / (N * K)


def test_repr_says_keep_and_removed():
    assert repr(SVDLoRALinear(14, 9, 4, 3, alpha=0.5, form="pivoted", bias=False)) == (
        "SVDLoRALinear(in_features=14, out_features=9, rank=4, lora_rank=3, alpha=0.5, "
        "form='pivoted', bias=False, keep=0.889 (removed 0.111))"
    )
    assert SVD_LoRA_Linear is SVDLoRALinear
