"""Grouped blocks called from threads, by themselves and by torch's tools."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.grouping import Attention, Calls, Gated, blocks_of, optimise, optimised, ungrouped
from helpers.grouping import in_panels as in_panels
from helpers.optimising import llama, logits, packs

from hylora_kernels import restore_from_inference
from hylora_kernels.layers.grouped import GroupedBlock
from hylora_kernels.layers.packed import PackedLinear

pytestmark = [packs, pytest.mark.usefixtures("in_panels")]


# ------------------------------------------------------------------- one call inside of another one


class Nested(Attention):
    """Calls itself on another input between its linears."""

    inner = None

    def forward(self, query):
        q = self.q(query)
        if self.inner is not None:
            inner, self.inner = self.inner, None
            q = q + self(inner).sum()
        return F.scaled_dot_product_attention(q, self.k(query), self.v(query))


def test_a_block_that_calls_itself():
    model = optimised(Nested())
    block, twin = model.block, ungrouped(model).block
    assert isinstance(block, GroupedBlock)
    block.inner = twin.inner = torch.randn(2, 3, 32)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(block(x), twin(x))


def test_threads_share_a_block():
    model = optimised(Gated())
    inputs = [torch.randn(n + 1, 32) for n in range(4)]
    want = [model.block(x) for x in inputs]
    wrong = []

    def work(x, y):
        for _ in range(50):
            if not torch.equal(model.block(x), y):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------ under torch's tools


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_whole_graph(dynamic):
    model = optimised(Gated())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 7, 2):
        ids = torch.randint(9, (rows, 2))
        assert torch.equal(compiled(ids), model(ids))
    restore_from_inference(model)
    torch.testing.assert_close(compiled(ids), model(ids))


def test_compile_a_whole_attention():
    model = optimised(Calls(Attention(), "key", "value"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(9, (2, 5))
    assert torch.equal(compiled(ids), model(ids))


def test_compile_a_language_model():
    model = optimise(llama(torch.float32))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = tiny.tokens(2, 7)
    with torch.no_grad():
        got = compiled(input_ids=ids, use_cache=False).logits
        assert torch.equal(got, model(input_ids=ids, use_cache=False).logits)


def test_export():
    model = optimised(Gated())
    ids = torch.randint(9, (3, 4))
    rows = ({0: torch.export.Dim("rows", max=99)},)
    program = torch.export.export(model, (ids,), dynamic_shapes=(*rows, None)[:1])
    for count in (3, 9):
        ids = torch.randint(9, (count, 4))
        # Of rows that aren't contiguous, as a group's outputs are, torch's silu has other bits.
        torch.testing.assert_close(program.module()(ids), model(ids))


def test_autocast_and_gradients_are_as_without_groups():
    model = optimised(Gated())
    x = torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model.block(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, ungrouped(model).block(x))
    with pytest.raises(RuntimeError, match=r"x requires grad.*restore_from_inference"):
        model.block(x.requires_grad_())
    with torch.no_grad():
        model.block(x)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., K\] = \[\.\.\., 32\]"):
        model.block(torch.randn(3, 31))
    with pytest.raises(TypeError, match=r"x must have the packed layer's dtype torch\.float32"):
        model.block(torch.randn(3, 32).double())


def test_products_are_counted_as_without_groups():
    from torch.utils.flop_counter import FlopCounterMode

    model = optimised(Gated())
    counts = []
    for one in (model, ungrouped(model)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one(torch.arange(6)[None])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_dense_models_are_grouped_too():
    model = tiny.llama(torch.bfloat16)
    want = logits(model)
    optimise(model)
    up_proj = model.model.layers[0].mlp.up_proj
    assert len(blocks_of(model)) == 4 and isinstance(up_proj, PackedLinear)
    torch.testing.assert_close(logits(model), want, atol=0.1, rtol=0.1)
