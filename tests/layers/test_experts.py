"""Stacks of experts as linears: the same outputs and gradients, and when a stack is left alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.compressing import logits
from helpers.mixtures import NAMES, E, mixture, stacks
from torch import nn

from hylora_kernels.layers.experts import (
    ExpertLinears,
    all_experts_called,
    own_weights,
    restack,
    unstack,
    unstacked,
)

DTYPES = [torch.float32, torch.bfloat16]


def stack(name="mixtral", dtype=torch.float32):
    return next(iter(stacks(mixture(name, dtype)).values()))


def call(experts, tokens=10, wide=32, dtype=torch.float32):
    """Arguments of a forward: rows, the experts of each, and their weights."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, wide, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    return x, index, torch.rand(tokens, 2, generator=generator).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_computes_the_same(name, dtype):
    model = mixture(name, dtype)
    want, before = logits(model), stacks(model)
    count = sum(p.numel() for p in model.parameters())
    replaced, reasons = unstack(model)
    assert replaced == before and replaced and not reasons and not stacks(model)
    assert all(type(model.get_submodule(path)) is ExpertLinears for path in replaced)
    assert sum(p.numel() for p in model.parameters()) == count
    error = (logits(model) - want).float().norm() / want.float().norm()
    assert error <= (0.03 if dtype == torch.bfloat16 else 1e-5)
    restack(model, replaced)
    assert stacks(model) == before and torch.equal(logits(model), want)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradients_are_the_same(name):
    stock, (x, index, weights) = stack(name), call(E)
    experts, found = unstacked(stock), []
    for module in (stock, experts):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(leaves[0], index, leaves[1]).sin().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    down = torch.stack([linear.weight.grad for linear in experts.down_proj])
    wanted = stock.down_proj.grad
    torch.testing.assert_close(down, wanted.mT if name == "gpt_oss" else wanted)


def test_weights_are_views_until_they_leave_the_stack():
    stock = stack("gpt_oss")
    experts = unstacked(stock)
    stock.down_proj.data[2, 3, 4] = 7.0
    assert experts.down_proj[2].weight[4, 3] == 7
    own_weights(experts)
    stock.down_proj.data[2, 3, 4] = 8.0
    assert experts.down_proj[2].weight[4, 3] == 7
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in experts.parameters())
    assert all(p.is_contiguous() for p in experts.parameters())


def test_only_experts_with_rows_are_called_unless_all_are_asked_for():
    experts, seen = unstacked(stack()), []
    for e, linear in enumerate(experts.gate_up_proj):
        linear.register_forward_pre_hook(lambda _m, args, e=e: seen.append((e, len(args[0]))))
    x, _, weights = call(E)
    index = torch.tensor([[1, 4]] * 10)
    want = experts(x, index, weights)
    assert seen == [(1, 10), (4, 10)]
    seen.clear()
    with all_experts_called(experts):
        assert torch.equal(experts(x, index, weights), want)
    assert seen == [(e, 10 if e in (1, 4) else 0) for e in range(E)] and not experts.every


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_and_an_index_beyond_the_experts(rows):
    experts = unstacked(stack())
    x, index, weights = (t[:rows] for t in call(E))
    assert experts(x, index, weights).shape == (rows, 32)
    none = torch.full_like(index, E)
    assert torch.equal(experts(x, none, weights), torch.zeros(rows, 32))
    half = torch.stack([index[:, 0], none[:, 1]], 1)
    alone = experts(x, index[:, :1], weights[:, :1])
    torch.testing.assert_close(experts(x, half, weights), alone)


def test_copies_and_pickles_compute_the_same():
    experts, arguments = unstacked(stack("gpt_oss")), call(E)
    want, file = experts(*arguments), io.BytesIO()
    assert torch.equal(copy.deepcopy(experts)(*arguments), want)
    torch.save(experts, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*arguments), want)


class Ungated(nn.Module):
    """Experts without a gate; square, so that only outputs tell how they are stored."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed, self.act_fn = transposed, nn.functional.gelu
        self.up_proj = nn.Parameter(torch.randn(E, 8, 8))
        self.down_proj = nn.Parameter(torch.randn(E, 8, 8))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for t, j in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)):
            up, down = self.up_proj[top_k_index[t, j]], self.down_proj[top_k_index[t, j]]
            up, down = (up, down) if self.is_transposed else (up.T, down.T)
            out[t] += top_k_weights[t, j] * (self.act_fn(hidden_states[t] @ up) @ down)
        return out


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_without_a_gate(transposed):
    stock, arguments = Ungated(transposed), call(E, wide=8)
    torch.testing.assert_close(unstacked(stock)(*arguments), stock(*arguments))


class Mislabelled(Ungated):
    """Says the contrary of how it is stored."""

    def forward(self, *arguments):
        self.is_transposed = not self.is_transposed
        try:
            return super().forward(*arguments)
        finally:
            self.is_transposed = not self.is_transposed


def test_a_stack_stored_otherwise_than_it_says_is_left_alone():
    with pytest.raises(ValueError, match="Mislabelled doesn't compute"):
        unstacked(Mislabelled(True))


# ---------------------------------------------------------------------------------- what is refused


class Odd(type(stack())):
    """Scales its inputs, which no linear does."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(2 * hidden_states, top_k_index, top_k_weights)


class Clamping(type(stack())):
    """Differs for large values only."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights).clamp(-50, 50)


class Asking(type(stack())):
    def forward(self, hidden_states, top_k_index, top_k_weights, more):
        raise AssertionError("never with these arguments")


@pytest.mark.parametrize("kind", [Odd, Clamping, Asking])
def test_a_stack_that_computes_something_else_is_left_alone(kind):
    model = mixture("mixtral")
    model.model.layers[1].mlp.experts.__class__ = kind
    replaced, reasons = unstack(model)
    path = "model.layers.1.mlp.experts"
    assert list(replaced) == ["model.layers.0.mlp.experts"]
    reason = f"{kind.__name__} doesn't compute down(gate(up x)) of each expert"
    assert reasons == {f"{path}.gate_up_proj": reason, f"{path}.down_proj": reason}
    assert type(model.get_submodule(path)) is kind


def shared(model):
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts


def hooked(model):
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)


def replaced_forward(model):
    experts = model.model.layers[0].mlp.experts
    experts.forward = experts.forward


def narrower(model):
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(torch.zeros(E, 32, 55))


def fewer(model):
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(torch.zeros(E - 1, 32, 56))


def quantised(model):
    stack = model.model.layers[0].mlp.experts.down_proj
    integers = nn.Parameter(torch.zeros_like(stack, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.experts.down_proj = integers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shared, "used in several places"),
        (hooked, "its forward is hooked or replaced"),
        (replaced_forward, "its forward is hooked or replaced"),
        (narrower, r"gate_up_proj [6, 112, 32] and down_proj [6, 32, 55] don't fit"),
        (fewer, r"gate_up_proj [6, 112, 32] and down_proj [5, 32, 56] don't fit"),
        (quantised, "down_proj is no plain floating parameter"),
    ],
)
def test_a_stack_that_is_not_plain_is_left_alone(change, reason):
    model = mixture("mixtral")
    change(model)
    _, reasons = unstack(model)
    assert reasons["model.layers.0.mlp.experts.down_proj"] == reason
