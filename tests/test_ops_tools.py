"""svd_lora_linear under torch's tools: opcheck, compile, export, autocast, meta, transforms."""

from __future__ import annotations

import pytest
import torch
from helpers.numerics import (
    GRADS,
    Case,
    Inputs,
    assert_as_exact_as_formula,
    by_op,
    every_backend,
    every_form,
    inputs_for,
    make_dy,
    make_inputs,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hylora_kernels import svd_lora_linear, use_backend


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch.compiler.reset()


@every_backend
@every_form
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_opcheck(lora_rank, form, backend, device):
    forward = getattr(torch.ops.hylora, f"{backend}_forward").default
    backward = getattr(torch.ops.hylora, f"{backend}_backward").default
    quick = ("test_schema", "test_faketensor")
    everything = (*quick, "test_autograd_registration", "test_aot_dispatch_dynamic")
    for M, lead_dims, dtype, tests in (
        (17, 2, torch.float32, everything),
        (1, 0, torch.bfloat16, quick),
        (0, 2, torch.float32, quick),
        (300, 3, torch.bfloat16, quick),
    ):
        case = Case(M=M, lora_rank=lora_rank, lead_dims=lead_dims, form=form, layout="transposed")
        inputs = inputs_for(backend, case, dtype, device)
        torch.library.opcheck(forward, tuple(inputs.with_grad()), test_utils=tests)
        _, h_a = forward(*inputs)
        x, SVh, U, A, B, _, alpha, pivots = inputs
        rest = (make_dy(inputs), x, h_a, SVh, U, A, B, alpha, pivots)
        adapter = bool(lora_rank)
        torch.library.opcheck(backward, (*rest, [True, adapter, adapter, True]), test_utils=tests)
        torch.library.opcheck(
            backward, (*rest, [not adapter, adapter, False, False]), test_utils=quick
        )


@every_backend
@pytest.mark.parametrize(
    "form, dynamic", [("pair", True), ("pivoted", True), ("dense", True), ("pivoted", False)]
)
def test_compile_whole_graph(dynamic, form, backend, device):
    compiled = torch.compile(svd_lora_linear, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with use_backend(backend):
        for M, alpha, lora_rank in ((17, 1.0, 8), (3, 0.37, 8), (70, 1.0, 0)):
            case = Case(M=M, alpha=alpha, lora_rank=lora_rank, lead_dims=2, form=form)
            inputs = inputs_for(backend, case, torch.float32, device)
            dy = make_dy(inputs)
            assert_as_exact_as_formula(by_op(compiled, inputs, dy), inputs, dy)


@every_backend
@pytest.mark.parametrize("form, dynamic", [("pair", True), ("pivoted", False)])
def test_compile_with_inductor(dynamic, form, backend, device):
    compiled = torch.compile(svd_lora_linear, fullgraph=True, dynamic=dynamic)
    inputs = inputs_for(backend, Case(form=form), torch.float32, device)
    dy = make_dy(inputs)
    with use_backend(backend):
        got, expected = (by_op(op, inputs, dy) for op in (compiled, svd_lora_linear))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.slow  # g++ takes 25 s for torch's headers
def test_compile_with_inductor_between_compiled_neighbours(backend, device):
    if device == "cpu":
        _require_cpp_compiler()

    def block(x, *args):
        return torch.nn.functional.silu(svd_lora_linear(x * 2, *args)) + 1

    compiled = torch.compile(block, fullgraph=True)
    inputs = inputs_for(backend, Case(form="pivoted"), torch.float32, device)
    dy = make_dy(inputs)
    with use_backend(backend):
        got, expected = by_op(compiled, inputs, dy), by_op(block, inputs, dy)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def _require_cpp_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("inductor needs a C++ compiler, none found")


class Call(torch.nn.Module):
    """The op as a module, for torch.export."""

    def __init__(self, inputs: Inputs):
        super().__init__()
        for name, value in inputs._asdict().items():
            if name == "alpha":
                self.alpha = value
            elif name != "x":
                self.register_buffer(name, value)

    def forward(self, x):
        args = (self.SVh, self.U, self.A, self.B, self.bias, self.alpha, self.pivots)
        return svd_lora_linear(x, *args)


@every_backend
@every_form
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, form, backend):
    inputs = inputs_for(backend, Case(M=16, lead_dims=2, form=form), torch.float32)
    module = Call(inputs)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with use_backend(backend):
        program = torch.export.export(module, (inputs.x,), dynamic_shapes=(dims,), strict=strict)
    assert f"hylora.{backend}_forward" in str(program.graph)
    x = torch.randn(3, 5, inputs.x.shape[-1])
    with use_backend(backend):
        torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=0)


@every_backend
@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, form, backend, device):
    inputs = inputs_for(backend, Case(form=form), torch.float32, device)
    dy = make_dy(inputs).to(dtype)
    with torch.autocast(device, dtype=dtype), use_backend(backend):
        got = by_op(svd_lora_linear, inputs, dy)
    with use_backend(backend):
        expected = by_op(svd_lora_linear, inputs.map(lambda t: t.to(dtype)), dy)
    assert got["y"].dtype == dtype and torch.equal(got["y"], expected["y"])
    for name in GRADS:
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], expected[name].float())


def test_autocast_takes_mixed_dtypes_and_leaves_float64_alone():
    inputs = make_inputs(Case(), torch.float32)
    mixed = inputs._replace(x=inputs.x.bfloat16(), A=inputs.A.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert svd_lora_linear(*mixed).dtype == torch.bfloat16
        assert svd_lora_linear(*make_inputs(Case())).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert svd_lora_linear(*inputs).dtype == torch.float32
    compiled = torch.compile(svd_lora_linear, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(*inputs), svd_lora_linear(*inputs))


@every_form
def test_meta_and_fake_tensors(form):
    inputs = make_inputs(Case(form=form, lead_dims=3), torch.float32)
    y = svd_lora_linear(*inputs)
    on_meta = Inputs(*(v.to("meta") if isinstance(v, Tensor) else v for v in inputs))
    assert svd_lora_linear(*on_meta).shape == y.shape
    leaves = on_meta.with_grad()
    svd_lora_linear(*leaves).sum().backward()
    assert leaves.A.grad.shape == leaves.A.shape and leaves.x.grad.shape == leaves.x.shape
    with torch._subclasses.FakeTensorMode() as mode:
        fake = Inputs(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs))
        out = svd_lora_linear(*fake)
        assert (out.shape, out.dtype, out.stride()) == (y.shape, y.dtype, y.stride())


def test_vmap_is_refused():
    x, SVh, U = make_inputs(Case(lora_rank=0))[:3]
    with pytest.raises(NotImplementedError, match=r"no vmap rule: .* leading dims of x"):
        torch.vmap(lambda x: svd_lora_linear(x, SVh, U))(x)


@pytest.mark.parametrize("argument", ["x", "A", "B", "bias", "SVh"])
def test_func_transforms_are_refused(argument):
    inputs = make_inputs(Case())

    def loss(value):
        return svd_lora_linear(*inputs._replace(**{argument: value})).sum()

    refused = pytest.raises(
        NotImplementedError, match=rf"no rule for torch.func.grad, .* got {argument} to differen"
    )
    value = getattr(inputs, argument)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with refused:
            transform(loss)(value)
    with refused:
        torch.func.vjp(loss, value)
    if argument == "x":
        with refused:
            torch.func.vmap(torch.func.grad(loss))(value)
    else:  # nothing is differentiated here, so nothing is refused
        x = torch.func.grad(lambda x: x.square().sum() + loss(value))(inputs.x)
        assert torch.equal(x, 2 * inputs.x)


def test_double_backward_is_refused():
    leaves = make_inputs(Case()).with_grad()
    y = svd_lora_linear(*leaves)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dx.sum().backward()


def test_forward_mode_is_refused():
    x, SVh, U = make_inputs(Case(lora_rank=0))[:3]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative, got a tangent on x"):
        torch.func.jvp(lambda x: svd_lora_linear(x, SVh, U), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(svd_lora_linear(x, SVh, U), x @ SVh.T @ U.T)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    inputs = make_inputs(Case(form="pivoted"))
    dy = make_dy(inputs)
    got = by_op(
        lambda *args: checkpoint(svd_lora_linear, *args, use_reentrant=reentrant), inputs, dy
    )
    assert_as_exact_as_formula(got, inputs, dy)
