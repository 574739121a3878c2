"""Linears on one input, computed as one in an optimised model: found, verified, undone."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.grouping import Attention, Calls, Gated, Toy, blocks_of, optimise, optimised, ungrouped
from helpers.grouping import in_panels as in_panels
from helpers.numerics import make_layer
from helpers.optimising import (
    FLOAT32,
    assert_same_but_rounding,
    every_dtype,
    llama,
    logits,
    packs,
    same_state,
    state_of,
)
from helpers.zoo import ZOO, zoo_model
from torch import nn

from hylora_kernels import SVDLoRALinear, restore_from_inference
from hylora_kernels.inference import optimize
from hylora_kernels.layers.grouped import GroupedBlock, is_intact
from hylora_kernels.layers.packed import PackedModule, packed_states

pytestmark = [packs, pytest.mark.usefixtures("in_panels")]


# ---------------------------------------------------------------------------------- what is grouped


@every_dtype
@pytest.mark.parametrize("form", ["pair", "pivoted", "mixed"])
def test_a_model_gives_the_same_numbers(form, dtype, caplog):
    model = llama(dtype, form="pair" if form == "mixed" else form)
    if form == "mixed":
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj = attention.k_proj.to_linear()
            attention.v_proj = make_layer("pivoted", 64, 64, 40, 0, dtype=dtype)
    state = state_of(model)
    kinds = [type(m) for m in model.modules()]
    with caplog.at_level(logging.INFO, "hylora_kernels"):
        optimise(model.eval())
    assert "; 4 groups computed as one" in caplog.text
    blocks = blocks_of(model)
    assert [type(b).__name__ for b in blocks.values()] == [
        *("GroupedLlamaAttention", "GroupedLlamaMLP") * 2
    ]
    for block in blocks.values():
        (group,) = block.packed_groups
        assert group.names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    twin = ungrouped(model)
    for length in (1, 3, 17, 70):
        ids = tiny.tokens(2, length)
        with torch.no_grad():
            got, want = (m(input_ids=ids % 96, use_cache=False).logits for m in (model, twin))
        assert_same_but_rounding(got, want)
    assert same_state(model.state_dict(), state)
    restore_from_inference(model)
    assert [type(m) for m in model.modules()] == kinds and same_state(model.state_dict(), state)
    assert not any("columns" in vars(m) or "packed_groups" in vars(m) for m in model.modules())


GROUPS = dict.fromkeys(ZOO, 2) | {"gpt2": 0, "gpt_neox": 0, "opt": 1, "phi": 1}


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_grouped_without_a_list_of_names(name):
    model = optimise(zoo_model(name))
    per_layer = len(blocks_of(model)) / model.config.num_hidden_layers
    assert per_layer == GROUPS[name]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generation_says_the_same(mode):
    model = optimise(llama(torch.float32))
    twin = ungrouped(model)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with mode():
        texts = [m.generate(tiny.tokens(2, 5), **settings) for m in (model, twin)]
    assert torch.equal(*texts)


def test_names_do_not_matter():
    model = optimised(Gated())
    (group,) = model.block.packed_groups
    assert group.names == ("first", "second") and type(model.block).__name__ == "GroupedGated"
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(model.block(x), ungrouped(model).block(x))
    torch.testing.assert_close(model.block(x=x), ungrouped(model).block(x))


def test_a_linear_called_by_hand_computes_what_it_always_does():
    """Also where the members' outputs are as wide as x together. A group's outputs lie side by
    side, and of rows that aren't contiguous torch's silu has other bits on AVX-512."""
    for N in (48, 16):
        model = optimised(Gated(N=N))
        twin, x = ungrouped(model), torch.randn(3, 32)
        for name in ("first", "second"):
            assert torch.equal(getattr(model.block, name)(x), getattr(twin.block, name)(x))
        torch.testing.assert_close(model.block(x), twin.block(x))
    assert model.block.packed_groups[0].columns[0].width != 32


class Twice(Gated):
    def forward(self, x):
        return self.down(self.first(x) * self.second(x) + self.first(x))


def test_a_forward_that_calls_a_linear_twice():
    model = optimised(Twice())
    x = torch.randn(4, 32)
    assert type(model.block).__name__ == "GroupedTwice"
    torch.testing.assert_close(model.block(x), ungrouped(model).block(x))


@pytest.mark.parametrize("names", [(), ("key",), ("key", "value")])
def test_other_inputs_than_those_watched(names):
    """Self-attention was seen; key and value from elsewhere are computed by the linears alone."""
    model = optimised(Calls(Attention(), *names))
    attention, twin = model.block.attention, ungrouped(model).block.attention
    assert len(attention.packed_groups[0].arguments) == 1 + len(names)
    x, other = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    for args, kwargs in (
        ((x,), {}),
        ((x, x, x), {}),
        ((x, other), {}),
        ((x,), {"key": other, "value": other + 1}),
        ((), {"query": x, "scale": 0.5}),
        ((x, other, None, 0.3), {}),
    ):
        torch.testing.assert_close(attention(*args, **kwargs), twin(*args, **kwargs))


# ------------------------------------------------------------------------------------- what is left


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Norm(Gated):
    def forward(self, x):
        x = F.layer_norm(x, (32,))
        return super().forward(x)


class Writes(Gated):
    def forward(self, x):
        y = super().forward(x)
        x[..., :1].zero_()
        return y


class ByWidth(Gated):
    """Gives numbers, but others, for an input of another width."""

    def forward(self, x):
        return super().forward(x) * x.shape[-1]


class Mixed(Gated):
    """One of three linears is none that could be packed."""

    def __init__(self):
        super().__init__()
        self.third = type("Own", (nn.Linear,), {})(32, 48)

    def forward(self, x):
        return super().forward(x) + self.down(self.third(x))


class TorchProducts(Gated):
    def __init__(self):
        super().__init__()
        self.second = make_layer("pair", 48, 32, 15, 4, **FLOAT32)


LEFT = {
    "it needs its input for more than first, second: RuntimeError": Residual,
    "what first, second read is no argument of its forward": Norm,
    "it writes to its arguments": Writes,
    "it gives other numbers with first, second computed as one": ByWidth,
    "it needs its input for more than first, second: ": Mixed,
    "torch's products are faster for one of them": TorchProducts,
}


@pytest.mark.parametrize("reason", LEFT)
def test_a_block_that_does_not_pass_stays_with_the_reason(reason, caplog):
    model = Toy(LEFT[reason]()).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad(), caplog.at_level(logging.INFO, "hylora_kernels"):
        before = model(ids)
        optimise(model)
        torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=1e-4)
    assert type(model.block) is LEFT[reason] and isinstance(model.block.first, PackedModule)
    assert f"; 0 groups computed as one (block: {reason}" in caplog.text


def test_models_without_a_forward_to_watch_are_packed_all_the_same(caplog):
    class Fails(Toy):
        def forward(self, input_ids, use_cache=False):
            raise KeyError("no such thing")

    with caplog.at_level(logging.INFO, "hylora_kernels"):
        for model, reason in (
            (Gated(), "no forward to watch: the model takes no token ids"),
            (Fails(Gated()), "block: a forward to watch fails: KeyError: 'no such thing'"),
        ):
            optimise(model.eval())
            assert not blocks_of(model) and packed_states(model)
            assert f"0 groups computed as one ({reason})" in caplog.text


def test_hooks_are_not_called_by_the_forwards_that_are_watched():
    model, calls = Toy(Gated()).eval(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append("after"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
    optimise(model)
    assert calls == []
    model(torch.arange(4)[None])
    assert calls == ["before"] * 1 + calls[1:] and len(calls) == 14


@pytest.mark.parametrize("step", ["group_linears", "convert_layers"])
def test_a_failure_leaves_the_model_as_it_was(step, monkeypatch):
    model = llama(torch.float32)
    state, kinds = state_of(model), [type(m) for m in model.modules()]

    def fails(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize, step, fails)
    with pytest.raises(KeyboardInterrupt):
        optimise(model)
    assert [type(m) for m in model.modules()] == kinds and same_state(model.state_dict(), state)


# ----------------------------------------------------------------------------- life as an nn.Module


def test_a_hook_on_a_linear_sees_its_own_input():
    model = optimised(Gated())
    x, seen = torch.randn(3, 32), []
    want, of_second = model.block(x), ungrouped(model).block.second(x)
    handle = model.block.second.register_forward_hook(lambda _m, args, y: seen.append((args[0], y)))
    torch.testing.assert_close(model.block(x), want)
    ((given, y),) = seen
    assert given is x and torch.equal(y, of_second)
    handle.remove()
    assert is_intact(model.block) and torch.equal(model.block(x), want) and len(seen) == 1


def test_copies_and_pickles():
    model = optimise(llama(torch.bfloat16))
    want, state = logits(model), state_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert len(blocks_of(twin)) == 4 and all(map(is_intact, blocks_of(twin).values()))
        assert torch.equal(logits(twin), want) and same_state(twin.state_dict(), state)
        restore_from_inference(twin)
        assert not blocks_of(twin) and same_state(twin.state_dict(), state)
    part = copy.deepcopy(model.model.layers[0].mlp)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(part(x), model.model.layers[0].mlp(x))
    assert len(blocks_of(model)) == 4


def test_to_another_dtype_restores_the_blocks():
    model = optimise(llama(torch.float32))
    model.to("cpu").float()
    assert len(blocks_of(model)) == 4
    model.double()
    assert not blocks_of(model) and not packed_states(model)
    assert logits(model).dtype == torch.float64


@torch.no_grad()
def test_one_linear_restored_leaves_the_others_to_compute_alone():
    model = optimised(Gated())
    x = torch.randn(3, 32)
    want = model.block(x)
    restore_from_inference(model.block.first)
    assert type(model.block.first) is SVDLoRALinear and not is_intact(model.block)
    torch.testing.assert_close(model.block(x), want)
    optimise(model)
    assert is_intact(model.block) and torch.equal(model.block(x), want)
    restore_from_inference(model)
    assert type(model.block) is Gated
    torch.testing.assert_close(model.block(x), want)


@torch.no_grad()
def test_a_linear_taken_out_or_exchanged():
    model, other = optimised(Gated()), optimised(Gated())
    x, first = torch.randn(3, 32), model.block.first
    want = model.block(x)
    model.block.first = nn.Linear(32, 48).eval()
    assert not is_intact(model.block)
    model.block(x)
    model.block.first = first
    assert is_intact(model.block) and torch.equal(model.block(x), want)
    model.block.first = other.block.first
    torch.testing.assert_close(model.block(x), ungrouped(model).block(x))
    del model.block.first
    restore_from_inference(model)
    assert type(model.block) is Gated


def test_restoring_a_part_leaves_the_rest():
    model = optimise(llama(torch.float32))
    want = logits(model)
    restore_from_inference(model.model.layers[0])
    assert list(blocks_of(model)) == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    assert_same_but_rounding(logits(model), want, roundings=32)
    restore_from_inference(model)
    assert not blocks_of(model)


def test_a_block_in_two_places():
    block = Gated()

    class Both(Calls):
        def forward(self, x):
            return self.attention(self.attention(x))

    model = Toy(Both(block)).eval()
    model.again = block
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids)
        optimise(model)
        assert model.again is block and isinstance(block, GroupedBlock)
        torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=1e-4)


def test_a_linear_of_two_blocks_is_in_no_group(caplog):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Gated(), Gated()
            self.two.first = self.one.first

        def forward(self, x):
            return self.one(x) + self.two(x)

    model = optimised(Two())
    assert not blocks_of(model)


def test_a_bias_that_changes_is_followed():
    model = optimised(Gated())
    x = torch.randn(3, 32)
    before = model.block(x)
    with torch.no_grad():
        model.block.first.bias.add_(1)
    assert not torch.equal(model.block(x), before)
    torch.testing.assert_close(model.block(x), ungrouped(model).block(x))
    model.block.first.bias = None
    torch.testing.assert_close(model.block(x), ungrouped(model).block(x))
