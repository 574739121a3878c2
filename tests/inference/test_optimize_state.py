"""An optimised model's memory, state, files and refusals."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import tiny
from helpers.numerics import dense_weight, every_form, make_layer
from helpers.optimising import HINT, every_dtype, llama, logits, packs, same_state, state_of
from torch import nn

from hylora_kernels import (
    SVDLoRALinear,
    add_adapters,
    compress,
    finetune,
    load_pretrained,
    optimize_for_inference,
    restore_from_inference,
    save_pretrained,
)
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.layers.packed import packed_states


def live_bytes() -> int:
    """Of all storages above 1 kB that Python holds a tensor of."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    plain = [t for t in tensors if t.layout is torch.strided and not t.is_nested]  # of any test
    storages = [t.untyped_storage() for t in plain if t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes() > 1000}.values())


@packs
@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_plain_weights_are_freed(tied, form):
    model = llama(torch.bfloat16, tied, form)
    size = model_size(model)
    before, plain = live_bytes(), size.resident_bytes
    optimize_for_inference(model)
    assert live_bytes() <= before + 0.05 * plain
    packed = model_size(model)
    assert packed.parameters == size.parameters
    assert (packed.linears, packed.model) == (size.linears, size.model)
    assert packed.parameter_bytes <= 1.05 * size.parameter_bytes
    assert packed.resident_bytes <= 1.05 * size.resident_bytes
    assert packed.buffer_bytes == size.buffer_bytes
    panels = {id(tensor) for state in packed_states(model) for tensor in state.tensors}
    assert panels <= {id(buffer) for buffer in model.buffers()}, "other tools count them too"
    restore_from_inference(model)
    assert model_size(model) == size


@packs
def test_bytes_of_filled_panels_are_reported():
    model = nn.Sequential(nn.Linear(33, 33, bias=False)).bfloat16().eval()
    optimize_for_inference(model)
    (packed,) = packed_states(model)
    assert (
        packed.nbytes == 64 * 64 * 2
        and packed.plain_bytes == 33 * 33 * 2
        and packed.count == 33 * 33
    )


@packs
@every_form
@every_dtype
def test_state_is_put_back_bit_for_bit(dtype, form):
    layer = make_layer(form, 60, 50, 20, 8, dtype=dtype).eval()
    layer.bias.requires_grad_(False)
    layer.A.requires_grad_(False)
    state, needs = state_of(layer), {n: p.requires_grad for n, p in layer.named_parameters()}
    x = torch.randn(3, 50, dtype=dtype)
    y = layer(x)
    optimize_for_inference(layer)
    assert same_state(layer.state_dict(), state)
    assert not any(p.requires_grad for p in layer.parameters())
    assert restore_from_inference(layer) is layer and type(layer) is SVDLoRALinear
    assert same_state(layer.state_dict(), state)
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == needs
    assert list(needs) == ["SVh", "U", "A", "B", "bias"]
    assert torch.equal(layer(x), y)
    assert not any(name.startswith("packed") for name, _ in layer.named_buffers())
    layer.train()(x).sum().backward()
    assert layer.B.grad is not None and layer.A.grad is None


@packs
def test_float32_masters_keep_their_bits():
    layer = make_layer("pair", 60, 50, 20, 8, dtype=torch.bfloat16).eval()
    layer.A, layer.B = nn.Parameter(torch.randn(8, 50)), nn.Parameter(torch.randn(60, 8))
    state, x = state_of(layer), torch.randn(3, 50, dtype=torch.bfloat16)
    y = layer(x)
    optimize_for_inference(layer)
    assert same_state(layer.state_dict(), state) and layer.A.dtype == torch.float32
    torch.testing.assert_close(layer(x), y, atol=0.2, rtol=0.05)
    assert model_size_of(layer) >= sum(t.nbytes for t in state.values())
    restore_from_inference(layer)
    assert same_state(layer.state_dict(), state) and layer.A.requires_grad


def model_size_of(layer) -> int:
    return sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


@packs
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saving_and_loading(tied, tmp_path):
    model = llama(torch.bfloat16, tied)
    state = state_of(model)
    save_pretrained(model, tmp_path / "plain")
    optimize_for_inference(model)
    save_pretrained(model, tmp_path / "packed")
    names = {"model.safetensors", "config.json"}
    for name in names:
        plain, packed = ((tmp_path / kind / name).read_bytes() for kind in ("plain", "packed"))
        assert plain == packed
    loaded = load_pretrained(tmp_path / "packed")
    assert same_state(loaded.state_dict(), state)
    if tied:
        given = model.state_dict()
        twins = given["lm_head.weight"], given["model.embed_tokens.weight"]
        assert twins[0].data_ptr() == twins[1].data_ptr()
    dense = tiny.llama(tie_word_embeddings=tied, seed=1)
    before = logits(dense)
    optimize_for_inference(dense).save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(type(dense).from_pretrained(tmp_path / "dense")), before)


@packs
def test_tied_weights_are_tied_again():
    model = llama(torch.bfloat16, tied=True)
    weight = model.lm_head.weight.clone()
    optimize_for_inference(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.packed_state is embedding.packed_state
    assert torch.equal(embedding(torch.arange(96)), weight)
    assert torch.equal(embedding(torch.arange(96, dtype=torch.int32)), weight)
    restore_from_inference(model)
    assert type(head) is nn.Linear and type(embedding) is nn.Embedding
    assert isinstance(head.weight, nn.Parameter) and head.weight is embedding.weight
    assert torch.equal(head.weight, weight)
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch\.float32"):
        optimize_for_inference(model).get_input_embeddings()(torch.ones(3))


@packs
@every_form
def test_read_as_before(form):
    layer = make_layer(form, 60, 50, 20, 8, alpha=0.5, dtype=torch.bfloat16).eval()
    told = {n: getattr(layer, n) for n in ("rank", "lora_rank", "keep", "alpha", "form")}
    counts = [layer.parameter_count(merged) for merged in (True, False)]
    text, weight, state = repr(layer), dense_weight(layer), state_of(layer)
    linear = layer.to_linear().weight
    optimize_for_inference(layer)
    assert {n: getattr(layer, n) for n in told} == told
    assert [layer.parameter_count(merged) for merged in (True, False)] == counts
    assert repr(layer) == "Packed" + text
    for name in ("SVh", "U", "A", "B", "bias"):
        assert torch.equal(getattr(layer, name), state[name])
    assert torch.equal(dense_weight(layer), weight)
    assert torch.equal(layer.to_linear().weight, linear)
    assert layer.pivots is None or torch.equal(layer.pivots, state["pivots"])


@packs
def test_writing_is_refused():
    layer = optimize_for_inference(make_layer(dtype=torch.float32).eval())
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        layer.SVh.mul_(2)
    with pytest.raises(RuntimeError, match=f"U is packed for inference and can't be set: {HINT}"):
        layer.U = nn.Parameter(torch.zeros(9, 4))
    with pytest.raises(RuntimeError, match=HINT):
        layer.merge()
    with pytest.raises(RuntimeError, match=f"the layer is packed for inference: {HINT}"):
        layer.load_state_dict(make_layer(dtype=torch.float32).state_dict())
    model = optimize_for_inference(llama())
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=f"lm_head is packed for inference: {HINT}"):
        model.load_state_dict(state)
    without = make_layer(lora_rank=0, dtype=torch.float32).eval()
    assert optimize_for_inference(without).merge() is without


@packs
def test_training_is_refused():
    model = optimize_for_inference(llama(torch.float32))
    with pytest.raises(RuntimeError, match=f"can't be trained: {HINT}"):
        model.train()
    x = torch.randn(3, 64, requires_grad=True)
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match=f"x requires grad.*{HINT}"):
        layer(x)
    with torch.no_grad():
        layer(x)
    model.eval()
    restore_from_inference(model).train()
    model(input_ids=tiny.tokens(2, 8), labels=tiny.tokens(2, 8)).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.A.grad is not None


@packs
@pytest.mark.parametrize(
    "verb",
    [
        lambda model, ids: finetune(model, ids, steps=1),
        lambda model, ids: compress(model, calibration=ids),
        lambda model, ids: add_adapters(model),
    ],
    ids=["finetune", "compress", "add_adapters"],
)
def test_a_packed_model_is_not_changed(verb):
    for model in (llama(torch.float32), tiny.llama(torch.float32)):
        state = state_of(optimize_for_inference(model))
        with pytest.raises(ValueError, match=f"model must not be packed for inference: {HINT}"):
            verb(model, tiny.tokens(4, 16))
        assert same_state(model.state_dict(), state)


@packs
def test_dense_models_need_no_no_grad_and_get_their_flags_back():
    model = tiny.llama(torch.float32)
    needs = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(needs.values())
    optimize_for_inference(model)
    assert not model(input_ids=tiny.tokens(1, 4)).logits.requires_grad
    optimize_for_inference(model)
    restore_from_inference(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needs


@packs
def test_wrong_x_is_named():
    layer = optimize_for_inference(make_layer("pivoted", dtype=torch.float32).eval())
    for wrong in (torch.ones(3, 13), torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match=r"x must be \[\.\.\., K\] = \[\.\.\., 14\] .*, got \["
        ):
            layer(wrong)
    with pytest.raises(TypeError, match=r"x must have the packed layer's dtype torch\.float32"):
        layer(torch.ones(3, 14).bfloat16())
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.vmap(layer)(torch.ones(3, 14))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative, got a tangent on x"):
        torch.func.jvp(layer, (torch.ones(3, 14),), (torch.ones(3, 14),))


@pytest.mark.parametrize("form", ["pair", "pivoted", "dense"])
def test_a_merged_layer_is_packed_and_restored(form):
    """merge() leaves A and B as parameters that are None."""
    layer = make_layer(form, 64, 96, 40, 8, dtype=torch.float32).eval().merge()
    x = torch.randn(2, 96)
    with torch.no_grad():
        y = layer(x)
        model = restore_from_inference(optimize_for_inference(nn.Sequential(layer).eval()))
        assert model[0] is layer and layer.A is None and layer.B is None
        assert torch.equal(layer(x), y)
    assert layer.parameter_count(merged=False) == layer.parameter_count() and repr(layer)
