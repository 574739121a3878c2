"""quantized_linear: gradients, torch's tools, and what a forward keeps for its backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.quantizing import FORMS, dequantized, random_weights

from hylora_kernels import reference, svd_lora_linear, use_backend
from hylora_kernels.ops.quantized import quantized_linear
from hylora_kernels.weights import Needs, Saved, Weights


def trainable(weights: Weights, dtype: torch.dtype) -> Weights:
    weights = dequantized(weights, dtype, factors=False)
    for tensor in (weights.A, weights.B, weights.bias):
        if tensor is not None:
            tensor.requires_grad_()
    return weights


def leaves(x, weights: Weights) -> list[torch.Tensor]:
    return [t for t in (x, weights.A, weights.B, weights.bias) if t is not None]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(form):
    weights = trainable(random_weights(form, bias=True), torch.float64)
    x = torch.randn(2, 3, weights.in_features, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, weights.out_features, dtype=torch.float64)
    y = quantized_linear(x, *weights)
    grads = torch.autograd.grad(y, leaves(x, weights), dy)
    plain = dequantized(weights)
    exact, h_a = reference.forward(x.detach().flatten(0, 1), plain)
    torch.testing.assert_close(y.flatten(0, 1), exact)
    saved = Saved(x.detach().flatten(0, 1), h_a)
    expected = [g for g in reference.backward(dy.flatten(0, 1), saved, plain) if g is not None]
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got.flatten(), want.flatten())


def test_gradcheck():
    weights = trainable(random_weights("pair", bias=True), torch.float64)
    x = torch.randn(2, weights.in_features, dtype=torch.float64, requires_grad=True)

    def call(x, A, B, bias):
        return quantized_linear(x, *replace(weights, A=A, B=B, bias=bias))

    torch.autograd.gradcheck(call, leaves(x, weights), fast_mode=True)


@pytest.mark.parametrize("form", ["dense", "pair"])
def test_no_matrix_outlives_the_forward(form):
    weights = trainable(random_weights(form, bias=True), torch.float32)
    x = torch.randn(4, weights.in_features, requires_grad=True)
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        quantized_linear(x, *weights)
    matrices = {tuple(m.shape) for m in (weights.SVh, weights.U) if m.shape[0]}
    floats = [t for t in kept if t.is_floating_point()]
    assert not any(tuple(t.shape) in matrices for t in floats)
    by_torch = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: by_torch.append(t) or t, lambda t: t):
        svd_lora_linear(x, *dequantized(weights, torch.float32))
    assert any(tuple(t.shape) in matrices for t in by_torch), "the test would see one"


@pytest.mark.parametrize("form", ["dense", "pair", "U"])
def test_opcheck(form):
    weights = trainable(random_weights(form), torch.float32)
    x = torch.randn(2, 3, weights.in_features, requires_grad=True)
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith("hylora::quantized"):
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Watch():
        quantized_linear(x, *weights).sum().backward()
    (forward, args), (backward, backward_args) = calls
    torch.library.opcheck(forward, (x, *args[1:]))
    torch.library.opcheck(
        backward, tuple(backward_args), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("form", ["dense", "pair"])
def test_compile_and_export(form):
    weights = dequantized(random_weights(form, bias=True), torch.float32, factors=False)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return quantized_linear(x, *weights)

    x = torch.randn(3, weights.in_features)
    expected = quantized_linear(x, *weights)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=(rows,)).module()
    assert torch.equal(exported(x[:2]), expected[:2])
    torch.compiler.reset()


def test_autocast_makes_matrices_of_its_dtype_and_leaves_codes_alone():
    weights = dequantized(random_weights("pair", bias=True), torch.float32, factors=False)
    x = torch.randn(3, weights.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, *weights)
    plain = dequantized(weights, torch.bfloat16)
    assert torch.equal(y, svd_lora_linear(x.bfloat16(), *plain))


def test_the_backward_is_the_forwards_backend(monkeypatch):
    from hylora_kernels.backends import eager

    calls, real = [], eager.backward

    def noted(dy, saved, weights, needs: Needs):
        calls.append(needs)
        return real(dy, saved, weights, needs)

    monkeypatch.setattr(eager, "backward", noted)
    weights = trainable(random_weights("pair"), torch.float32)
    with use_backend("eager"):
        y = quantized_linear(torch.randn(2, weights.in_features), *weights)
    y.sum().backward()
    assert calls == [Needs(False, True, True, False)]


def test_bad_input_is_named():
    weights = random_weights("pair")
    with pytest.raises(ValueError, match=r"A must be \[ra, K\] = \[any, 100\]"):
        quantized_linear(torch.randn(2, 100), *replace(weights, A=torch.randn(4, 99)))
    with pytest.raises(ValueError, match=r"x must|SVh must be \[r, K\] = \[any, 99\] \(K from x\)"):
        quantized_linear(torch.randn(2, 99), *weights)
    broken = replace(weights.SVh, zeros=None)
    with pytest.raises(ValueError, match=r"zeros of SVh must have shape \(1, 40\), got None"):
        quantized_linear(torch.randn(2, 100), *replace(weights, SVh=broken))


def test_flops_are_those_of_the_matrices():
    from torch.utils.flop_counter import FlopCounterMode

    weights = trainable(random_weights("pair", bias=True), torch.float32)
    x = torch.randn(5, weights.in_features, requires_grad=True)
    counted = []
    for op, operands in (
        (quantized_linear, weights),
        (svd_lora_linear, replace(dequantized(weights, torch.float32), A=weights.A, B=weights.B)),
    ):
        with FlopCounterMode(display=False) as counter:
            op(x, *operands).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
