"""svd_lora_linear in every backend: numbers, gradients, saved tensors, where a backward runs."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.numerics import (
    CASES,
    DTYPES,
    GRADS,
    Case,
    Inputs,
    assert_as_exact_as_formula,
    by_op,
    by_reference,
    every_backend,
    every_form,
    inputs_for,
    make_dy,
    make_inputs,
    skip_if_refused,
)
from torch import Tensor

from hylora_kernels import backends, reference, svd_lora_linear, use_backend
from hylora_kernels.ops import linear
from hylora_kernels.weights import Weights


def test_memory_is_poisoned():
    like = torch.zeros(3, dtype=torch.bfloat16)
    for empty in (torch.empty(3), torch.empty_like(like), like.new_empty(3)):
        assert empty.isnan().all()
    assert torch.empty(3, dtype=torch.int32).min() > 2**30


# ---------------------------------------------------------------------------------------- numbers


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, backend, device):
    inputs = inputs_for(backend, case, dtype, device)
    dy = make_dy(inputs)
    with use_backend(backend):
        got = by_op(svd_lora_linear, inputs, dy)
    assert_as_exact_as_formula(got, inputs, dy, chained=backend == "triton")


@every_backend
@every_form
def test_same_call_same_bits(form, backend, device):
    inputs = inputs_for(backend, Case(M=70, form=form), torch.float32, device)
    dy = make_dy(inputs)
    with use_backend(backend):
        first, second = (by_op(svd_lora_linear, inputs, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
@every_form
@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=4) if any(n)])
def test_any_choice_of_gradients(needs, form, backend, device):
    inputs = inputs_for(backend, Case(M=3, form=form), device=device)
    dy = make_dy(inputs)
    names = [n for n, need in zip(("x", "A", "B", "bias"), needs, strict=True) if need]
    leaves = inputs._replace(**{n: getattr(inputs, n).detach().requires_grad_() for n in names})
    with use_backend(backend):
        svd_lora_linear(*leaves).backward(dy)
    everything = by_reference(inputs, dy)
    for name, grad in zip(("x", "A", "B", "bias"), GRADS, strict=True):
        got = getattr(leaves, name).grad
        if name in names:
            torch.testing.assert_close(got, everything[grad])
        else:
            assert got is None


@every_backend
@every_form
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_gradcheck(lora_rank, form, backend):
    inputs = inputs_for(
        backend, Case(M=4, sizes=(5, 6, 3), lora_rank=lora_rank, lead_dims=2, form=form)
    )
    leaves = inputs.with_grad()
    tensors = [t for t in (leaves.x, leaves.A, leaves.B, leaves.bias) if t is not None]

    def call(*tensors):
        x, *adapter, bias = tensors
        A, B = adapter or (None, None)
        return svd_lora_linear(x, leaves.SVh, leaves.U, A, B, bias, leaves.alpha, leaves.pivots)

    with use_backend(backend):
        assert torch.autograd.gradcheck(call, tensors)


@every_backend
@pytest.mark.parametrize("sizes", [(0, 3, 1), (4, 0, 1), (4, 3, 0)], ids=["K=0", "N=0", "r=0"])
@pytest.mark.parametrize("lead", [(), (2,), (0, 2)], ids=str)
def test_empty_dims(lead, sizes, backend):
    K, N, rank = sizes
    shapes = ((*lead, K), (rank, K), (N, rank), (2, K), (N, 2), (N,))
    inputs = Inputs(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    skip_if_refused(backend, inputs)
    dy = make_dy(inputs)
    with use_backend(backend):
        assert_as_exact_as_formula(by_op(svd_lora_linear, inputs, dy), inputs, dy)


@every_backend
def test_adapter_of_rank_zero_and_defaults(backend):
    inputs = inputs_for(backend, Case(M=3, lora_rank=0, bias=False))
    x, SVh, U = inputs[:3]
    with use_backend(backend):
        plain = svd_lora_linear(x, SVh, U)
        empty = svd_lora_linear(x, SVh, U, x.new_empty(0, x.shape[1]), x.new_empty(len(U), 0))
    torch.testing.assert_close(plain, x @ SVh.T @ U.T)
    torch.testing.assert_close(empty, plain)


# ----------------------------------------------------------------------------- what a forward keeps


def kept_for_backward(inputs: Inputs) -> list[Tensor]:
    """The tensors that autograd saves while the op runs, without the inputs other than x."""
    packed = []
    weights = {id(t) for t in inputs[1:] if isinstance(t, Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        svd_lora_linear(*inputs)
    return [t for t in packed if t is not None and id(t) not in weights]


@every_backend
@every_form
@pytest.mark.parametrize("M", [3, 300])  # two ways of the pair form in the eager backend
def test_only_x_and_h_a_are_saved(M, form, backend):
    inputs = inputs_for(backend, Case(M=M, lora_rank=16, form=form)).with_grad()
    with use_backend(backend):
        saved = kept_for_backward(inputs)
    assert sorted(t.shape for t in saved) == sorted([(M, 16), inputs.x.shape])
    x, h_a = sorted(saved, key=lambda t: t.shape == (M, 16))
    assert x.data_ptr() == inputs.x.data_ptr(), "x is saved as it came, not as a copy"
    torch.testing.assert_close(h_a, inputs.x.detach() @ inputs.A.detach().T)
    assert h_a.untyped_storage().nbytes() == h_a.nbytes, "h_a keeps a larger tensor alive"


@every_backend
@every_form
def test_nothing_of_size_M_is_saved_without_need(form, backend):
    case = Case(M=300, form=form)
    inputs = inputs_for(backend, case)
    wants = {
        "x alone": ("x",),
        "bias alone": ("bias",),
        "x and bias": ("x", "bias"),
    }
    with use_backend(backend):
        for label, names in wants.items():
            leaves = inputs._replace(**{n: getattr(inputs, n).clone() for n in names})
            for name in names:
                getattr(leaves, name).requires_grad_()
            assert kept_for_backward(leaves) == [], label
        no_adapter = make_inputs(Case(M=300, form=form, lora_rank=0)).with_grad()
        assert kept_for_backward(no_adapter) == [], "lora_rank 0"
        only_A = inputs._replace(A=inputs.A.clone().requires_grad_())
        assert [t.shape for t in kept_for_backward(only_A)] == [inputs.x.shape]
        only_B = inputs._replace(B=inputs.B.clone().requires_grad_())
        assert [t.shape for t in kept_for_backward(only_B)] == [(300, case.lora_rank)]


@every_backend
@pytest.mark.parametrize("lead_dims", [1, 2, 3])
def test_output_can_be_written_to_in_place(lead_dims, backend):
    inputs = inputs_for(backend, Case(lead_dims=lead_dims, form="pivoted"))
    dy = make_dy(inputs)
    with use_backend(backend):
        got = by_op(lambda *args: svd_lora_linear(*args).mul_(2).relu_(), inputs, dy)
        expected = by_op(lambda *args: (svd_lora_linear(*args) * 2).relu(), inputs, dy)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_no_graph_without_gradients():
    inputs = make_inputs(Case())
    assert not svd_lora_linear(*inputs).requires_grad
    with torch.no_grad():
        assert not svd_lora_linear(*inputs.with_grad()).requires_grad
    with torch.inference_mode():
        assert svd_lora_linear(*inputs).is_inference()


# -------------------------------------------------------------------- the backend of a backward


class CountingBackend(SimpleNamespace):
    """A backend that computes by reference.py and records its calls."""

    def __init__(self):
        super().__init__(calls=[], reason=None)

    def is_available(self):
        return True

    def unsupported(self, x, weights):
        return self.reason

    def forward(self, x, weights):
        self.calls.append("forward")
        return reference.forward(x, weights)

    def backward(self, dy, saved, weights, needs):
        self.calls.append("backward")
        grads = reference.backward(dy, saved, weights)
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


_counting_backend = CountingBackend()
_counting_op = linear._define("counting", _counting_backend)


@pytest.fixture
def counting(monkeypatch):
    _counting_backend.calls.clear()
    monkeypatch.setitem(backends.BACKENDS, "counting", _counting_backend)
    monkeypatch.setitem(linear._FORWARD_OPS, "counting", _counting_op)
    return _counting_backend


@every_form
def test_backward_runs_in_the_backend_of_its_forward(counting, form):
    inputs = make_inputs(Case(form=form))
    dy = make_dy(inputs)
    leaves = inputs.with_grad()
    with use_backend("counting"):
        y = svd_lora_linear(*leaves)
    with use_backend("eager"):
        y.backward(dy)
    assert counting.calls == ["forward", "backward"]
    with use_backend("eager"):
        y = svd_lora_linear(*inputs.with_grad())
    with use_backend("counting"):
        y.backward(dy)
    assert counting.calls == ["forward", "backward"]


def test_compiled_code_follows_use_backend(counting):
    inputs = make_inputs(Case())
    compiled = torch.compile(svd_lora_linear, backend="eager", fullgraph=True)
    for backend, calls in (("eager", 0), ("counting", 1), ("eager", 1), ("counting", 2)):
        with use_backend(backend):
            compiled(*inputs)
        assert len(counting.calls) == calls
    torch.compiler.reset()


# ------------------------------------------------------------------------- from call to call


@every_backend
def test_threads_do_not_disturb_one_another(backend):
    shared = inputs_for(backend, Case(M=16, form="pivoted")).pivots
    jobs = []
    for seed in range(8):
        inputs = make_inputs(Case(M=16, form="pivoted"), seed=seed)
        # Half of them share one pivots tensor, whose orders are kept from call to call.
        inputs = inputs._replace(pivots=shared) if seed % 2 else inputs
        jobs.append((inputs, make_dy(inputs, seed)))
    failures = []

    def work(inputs, dy):
        try:
            for _ in range(20):
                assert_as_exact_as_formula(by_op(svd_lora_linear, inputs, dy), inputs, dy)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    with use_backend(backend):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize("written", ["normal", "inside inference_mode", "inference tensor"])
def test_a_change_of_pivots_is_seen(written):
    first, second = (make_inputs(Case(form="pivoted"), seed=seed) for seed in (0, 1))
    with torch.inference_mode(written == "inference tensor"):
        pivots = first.pivots.clone()
    with torch.inference_mode(written != "normal"):
        for values in (first.pivots, second.pivots, first.pivots):
            pivots.copy_(values)
            inputs = first._replace(pivots=pivots)
            for _ in range(2):
                expected = reference.forward(first.x, first._replace(pivots=values).weights)[0]
                torch.testing.assert_close(svd_lora_linear(*inputs), expected)
    assert pivots.is_inference() == (written == "inference tensor")


def test_pivots_of_one_tensor_serve_layers_of_two_sizes():
    pivots = torch.tensor([0, 2], dtype=torch.int32)
    for others in (3, 5):
        x, SVh, U = torch.randn(4, 6), torch.randn(2, 6), torch.randn(others, 2)
        expected = reference.forward(x, Weights(SVh, U, pivots=pivots))[0]
        torch.testing.assert_close(svd_lora_linear(x, SVh, U, pivots=pivots), expected)
