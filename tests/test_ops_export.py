"""What run_decompositions() leaves of the ops: aten operations that compute the same."""

from __future__ import annotations

import pytest
import torch
from helpers.numerics import Case, make_dy, make_inputs
from helpers.quantized_layers import quantised
from torch import nn
from torch.export import Dim

from hylora_kernels import SVDLoRALinear, reference, use_backend
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.weights import Saved

FORMS = ("pair", "pivoted", "dense")
K = 37
ANY_ROWS = ({0: Dim("batch"), 1: Dim("length")},)


class OnOneInput(nn.ModuleList):
    def forward(self, x):
        return [layer(x) for layer in self]


def decomposed(module: nn.Module, x: torch.Tensor, shapes=None) -> nn.Module:
    """The exported module, its ops decomposed into aten operations."""
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    assert "hylora" in str(program.graph), "torch.export keeps the ops"
    program = program.run_decompositions()
    ops = {n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {op.namespace for op in ops} == {"aten"}
    return program.module()


def assert_the_same_for_any_rows(layers: nn.Module) -> None:
    run = decomposed(layers, torch.randn(2, 5, K), ANY_ROWS)
    for x in (torch.randn(2, 5, K), torch.randn(3, 1, K)):
        for got, expected in zip(run(x), layers(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("backend", "forms"), [("eager", FORMS), ("cpu", ["pivoted"])])
def test_forward(backend, forms):
    cases = [Case(form=form, lora_rank=ra, bias=ra > 0) for form in forms for ra in (0, 8)]
    weights = [make_inputs(case, torch.float32).weights for case in cases]
    with use_backend(backend):
        assert_the_same_for_any_rows(OnOneInput(SVDLoRALinear.from_factors(*w) for w in weights))


def test_forward_on_codes():
    cases = [(Case(), 2, 3), (Case(lora_rank=0), 5, 6)]
    cases += [(Case(form="pivoted", lora_rank=0), 8, 0), (Case(form="dense"), 4, 0)]
    weights = [quantised(case, torch.float32, *bits).weights for case, *bits in cases]
    assert_the_same_for_any_rows(OnOneInput(QuantizedLinear.from_weights(w) for w in weights))


@pytest.mark.parametrize("form", FORMS)
def test_backward(form):
    inputs = make_inputs(Case(form=form, M=10, lead_dims=2), torch.float32)
    dy, rows = make_dy(inputs), inputs.x.flatten(0, 1)
    h_a = reference.forward(rows, inputs.weights)[1]

    class Gradients(nn.Module):
        def forward(self, dy):
            _, SVh, U, A, B, _, alpha, pivots = inputs
            factors = (SVh, U, A, B, alpha, pivots)
            return torch.ops.hylora.eager_backward(dy, inputs.x, h_a, *factors, [True] * 4)

    expected = reference.backward(dy.flatten(0, 1), Saved(rows, h_a), inputs.weights)
    for got, wanted in zip(decomposed(Gradients(), dy)(dy), expected, strict=True):
        torch.testing.assert_close(got.reshape(wanted.shape), wanted, rtol=2e-5, atol=2e-5)
