"""The cpu backend: which calls it takes, its numbers.
test_ops.py shows that it computes the formula, for every backend."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers.numerics import (
    GRADS,
    Case,
    assert_as_exact_as_formula,
    by_op,
    by_reference,
    distance,
    every_form,
    make_dy,
    make_inputs,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hylora_kernels import backends, reference, svd_lora_linear, use_backend
from hylora_kernels.backends import cpu
from hylora_kernels.backends.cpu import limbs
from hylora_kernels.machine.selftest.grid import LONG_SUMS

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ----------------------------------------------------------------------------- which calls it takes


def chosen(M: int, grads: tuple[str, ...] = (), dtype=torch.bfloat16, form="pivoted") -> str:
    inputs = make_inputs(Case(M=M, form=form), dtype)
    for name in grads:
        getattr(inputs, name).requires_grad_()
    return backends.choose(inputs.x, inputs.weights)


def test_auto_takes_it_where_packing_pays(monkeypatch):
    monkeypatch.delenv("HYLORA_BACKEND", raising=False)
    if cpu.LEVEL == "scalar":
        assert chosen(cpu.ROWS_WORTH_PACKING) == "eager"
        return
    assert chosen(cpu.ROWS_WORTH_PACKING) == "cpu" and chosen(1) == chosen(0) == "eager"
    assert chosen(cpu.ROWS_WORTH_PACKING - 1) == "eager"
    for name in ("x", "A", "B", "bias"):
        assert chosen(cpu.ROWS_WORTH_TRAINING, (name,)) == "cpu"
        assert chosen(cpu.ROWS_WORTH_TRAINING - 1, (name,)) == "eager"
    with torch.no_grad():
        assert chosen(cpu.ROWS_WORTH_TRAINING, ("x",)) == "eager"
    for dtype in (torch.float32, torch.float64):
        assert chosen(cpu.ROWS_WORTH_PACKING, dtype=dtype) == "eager"


def test_auto_takes_it_where_panels_are_kept(monkeypatch):
    monkeypatch.delenv("HYLORA_BACKEND", raising=False)
    inputs = make_inputs(Case(M=3), torch.bfloat16)
    assert backends.choose(inputs.x, inputs.weights) == "eager"
    with use_backend("cpu"):
        by_op(svd_lora_linear, inputs, make_dy(inputs))
    assert cpu.LEVEL == "scalar" or backends.choose(inputs.x, inputs.weights) == "cpu"


def test_forced_it_serves_every_M_or_says_why_not():
    with use_backend("cpu"):
        for M, form in itertools.product((0, 1, 70), ("pair", "pivoted", "dense")):
            assert chosen(M, form=form) == "cpu"
        with pytest.raises(ValueError, match=r"'cpu' can't serve this call: .* got torch\.float64"):
            svd_lora_linear(*make_inputs(Case()))
        x, SVh, U = torch.ones(1, 2), torch.ones(1, 2), torch.ones(3, 1)
        with pytest.raises(ValueError, match=r"serves tensors on the CPU, got meta"):
            svd_lora_linear(x.to("meta"), SVh.to("meta"), U.to("meta"))
        for r, K, N in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
            with pytest.raises(ValueError, match=r"no empty factors, got SVh \[\d, \d\] and U"):
                svd_lora_linear(torch.ones(1, K), torch.ones(r, K), torch.ones(N, r))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_threshold_of_M_does_not_break_compiled_code(backend):
    compiled = torch.compile(svd_lora_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    with use_backend(backend), torch.no_grad():
        for M in (3, 300, 2, cpu.ROWS_WORTH_PACKING + 2, 17):
            inputs = make_inputs(Case(M=M, form="pivoted"), torch.bfloat16)
            torch.testing.assert_close(compiled(*inputs), svd_lora_linear(*inputs))


def test_exported_code_is_for_any_M():
    inputs = make_inputs(Case(M=300), torch.float32)

    class Call(torch.nn.Module):
        def forward(self, x):
            return svd_lora_linear(x, *inputs[1:])

    dims = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(Call(), (inputs.x,), dynamic_shapes=dims).module()
    for M in (3, 300, 2000):
        x = torch.randn(M, inputs.x.shape[1])
        torch.testing.assert_close(program(x), Call()(x))


# ---------------------------------------------------------------------------------------- numbers


@pytest.fixture(params=[6, 0], ids=["limbs", "fma"])
def _float32_by(request, monkeypatch):
    """Sets how many rows of float32 are multiplied; else a measurement chooses."""
    monkeypatch.setattr(limbs, "six_products_serve", lambda: request.param == 6)


@every_dtype
@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize(
    "M, sizes", [(1, (576, 1536, 208)), (300, (576, 1536, 208)), (100, LONG_SUMS[:3])]
)
@pytest.mark.usefixtures("_float32_by")
def test_sizes_of_a_real_layer(M, sizes, form, dtype):
    inputs = make_inputs(Case(M=M, sizes=sizes, lora_rank=16, form=form), dtype)
    with use_backend("cpu"):
        got = by_op(svd_lora_linear, inputs, dy := make_dy(inputs))
    assert_as_exact_as_formula(got, inputs, dy)


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_every_number_of_few_rows(form):
    """bf16 has code of its own for each number of rows; K is more than is summed at a time, and
    odd."""
    for M in (*range(1, 25), 27, 28, 31):
        case = Case(M=M, sizes=(547, 101, 41), lora_rank=7, form=form)
        inputs = make_inputs(case, torch.bfloat16)
        with use_backend("cpu"):
            got = by_op(svd_lora_linear, inputs, dy := make_dy(inputs))
        assert_as_exact_as_formula(got, inputs, dy)


@every_form
@every_dtype
@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=4) if any(n)])
def test_any_choice_of_gradients(needs, dtype, form):
    inputs = make_inputs(Case(M=70, form=form), dtype)
    dy = make_dy(inputs)
    names = [n for n, need in zip(("x", "A", "B", "bias"), needs, strict=True) if need]
    leaves = inputs._replace(**{n: getattr(inputs, n).detach().requires_grad_() for n in names})
    with use_backend("cpu"):
        svd_lora_linear(*leaves).backward(dy)
    got = by_reference(inputs, dy)
    for name, grad in zip(("x", "A", "B", "bias"), GRADS, strict=True):
        assert (getattr(leaves, name).grad is not None) == (name in names)
        if name in names:
            got[grad] = getattr(leaves, name).grad
    assert_as_exact_as_formula(got, inputs, dy)


def test_a_gradient_of_one_number():
    """sum() hands back a gradient with no strides at all."""
    inputs = make_inputs(Case(M=70, form="pivoted"), torch.float32)
    leaves = inputs.with_grad()
    with use_backend("cpu"):
        svd_lora_linear(*leaves).sum().backward()
    want = by_reference(inputs.map(Tensor.double), torch.ones(70, 53, dtype=torch.float64))
    torch.testing.assert_close(leaves.x.grad.double(), want["dx"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(leaves.B.grad.double(), want["dB"], atol=1e-4, rtol=1e-4)


@every_form
@pytest.mark.usefixtures("_float32_by")
def test_float32_precision_follows_torch(form):
    inputs = make_inputs(Case(M=300, sizes=(256, 320, 128), form=form), torch.float32)
    exact = inputs.map(Tensor.double)
    truth = reference.forward(exact.x, exact.weights)[0]
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with use_backend("cpu"):
                errors[precision] = distance(svd_lora_linear(*inputs), truth)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert errors["highest"] < 1e-5 and errors["high"] < 1e-3


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("name", ["SVh", "U", "A", "B", "x"])
@pytest.mark.parametrize("M", [3, 300])
@pytest.mark.usefixtures("_float32_by")
def test_float32_beyond_what_limbs_hold(M, name, size):
    """Weights as large and small as float32 goes; NaN and infinity come out where they do else."""
    inputs = make_inputs(Case(M=M, sizes=(64, 96, 32), form="pair"), torch.float32)
    getattr(inputs, name)[1] *= size
    dy = make_dy(inputs)
    with use_backend("cpu"):
        got = by_op(svd_lora_linear, inputs, dy)
    want = by_reference(inputs.map(Tensor.double), dy.double())
    sizes = by_reference(inputs.map(lambda t: t.double().abs()), dy.double().abs())
    for key, expected in want.items():
        finite = expected.isfinite()
        assert torch.equal(got[key].isfinite(), finite), key
        error = (got[key] - expected).abs()[finite]
        # What is added up for this very number, not for the largest one.
        assert (error <= 1e-5 * sizes[key][finite]).all(), key


def test_a_measurement_chooses_between_limbs_and_fma(monkeypatch):
    """One a process; none where torch is to be deterministic, and none of the caller's numbers."""
    monkeypatch.undo()
    measured = []
    monkeypatch.setattr(limbs, "six_products_are_faster", lambda: measured.append(1) or True)
    products = functools.partial(limbs.limb_products_for, torch.float32, True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert products() == 0 and not measured
    torch.use_deterministic_algorithms(False)
    assert products() == 6 and measured == [1]
    monkeypatch.undo()
    random_state = torch.get_rng_state()
    monkeypatch.setattr(limbs, "_measurements", limbs._Measurements())
    torch.set_default_dtype(torch.float64)  # it is no business of the measurement
    try:
        with FakeTensorMode():
            chosen = products()
    finally:
        torch.set_default_dtype(torch.float32)
    assert chosen in (0, 6) and products() == chosen
    assert limbs._measurements.results == [chosen == 6]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_layer_is_packed_for_limbs_as_long_as_they_never_lost(monkeypatch):
    monkeypatch.undo()
    answers, clock = [True, True, False, True], [0.0]
    monkeypatch.setattr(limbs, "_measure_six_products", lambda: answers.pop(0))
    monkeypatch.setattr(limbs, "_measurements", limbs._Measurements())
    monkeypatch.setattr(limbs.time, "monotonic", lambda: clock[0])
    for moment, faster, left in ((0, True, 3), (0.5, True, 3), (2, True, 2), (4, False, 1)):
        clock[0] = moment
        assert limbs.six_products_stay_faster() == faster and len(answers) == left
    clock[0] = 9
    assert not limbs.six_products_stay_faster() and len(answers) == 1, (
        "one lost measurement decides"
    )
    assert limbs.six_products_are_faster(), "what serves unpacked calls doesn't change"


def test_what_limbs_hold(monkeypatch):
    monkeypatch.setattr(limbs, "LEVEL", "amx_bf16")
    good = torch.randn(4, 5)
    for row, holds in (
        (torch.zeros(5), True),
        (good[0] * 2.0**50, True),
        (torch.tensor([1.0, 1e-30, 0, 0, 0]), True),
        (good[0] * 2.0**70, False),
        (good[0] * 2.0**-70, False),
        (torch.tensor([1.0, torch.nan, 0, 0, 0]), False),
        (torch.tensor([1.0, -torch.inf, 0, 0, 0]), False),
    ):
        matrix = torch.cat((good, row[None]))
        assert limbs.fit_limbs(torch.float32, (good, 1), (matrix, 1)) == holds
        assert limbs.fit_limbs(torch.float32, (matrix.T, 0)) == holds
    assert not limbs.fit_limbs(torch.bfloat16, (good.bfloat16(), 1)), "it has one limb"
    assert limbs.fit_limbs(torch.float32, (torch.empty(0, 5), 0))


def test_pivots_that_cannot_be_are_named():
    inputs = make_inputs(Case(M=3, form="pivoted"), torch.float32)
    with use_backend("cpu"):
        svd_lora_linear(*inputs)
        inputs.pivots[1] = inputs.pivots[0]
        with pytest.raises(ValueError, match=r"pivots must be strictly ascending within \[0, 53\)"):
            svd_lora_linear(*inputs)


@pytest.mark.parametrize("written", ["normal", "inside inference_mode", "inference tensor"])
def test_a_change_of_pivots_is_seen(written):
    case = Case(form="pivoted")
    first, second = (make_inputs(case, torch.float32, seed=seed) for seed in (0, 1))
    with torch.inference_mode(written == "inference tensor"):
        pivots = first.pivots.clone()
    with torch.inference_mode(written != "normal"), use_backend("cpu"):
        for values in (first.pivots, second.pivots, first.pivots):
            pivots.copy_(values)
            for _ in range(2):
                expected = reference.forward(first.x, first._replace(pivots=values).weights)[0]
                got = svd_lora_linear(*first._replace(pivots=pivots))
                torch.testing.assert_close(got, expected)
