"""Models whose matrices are codes: saved, loaded, counted, given adapters."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.checkpoints import IDS, assert_same, logits
from helpers.quantizing import quantized_model

from hylora_kernels import available_backends
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.inference.decoder import Decoder
from hylora_kernels.inference.optimize import optimize_for_inference
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.model.adapters import add_adapters, renew_adapters
from hylora_kernels.model.checkpoint import layer_shapes, load_pretrained
from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.modules import unshared_layers
from hylora_kernels.model.saving import save_pretrained
from hylora_kernels.recovery.factors import starting_tensors

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", ["llama, tied", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(name, dtype, tmp_path):
    model = quantized_model(name, dtype)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert_same(loaded, model)
    assert type(loaded.get_submodule(Q)) is QuantizedLinear
    assert loaded.get_submodule(Q).bits == {"SVh": 5, "U": 8}
    assert loaded.get_submodule(f"{Q[:-6]}k_proj").SVh.dtype == dtype
    if name == "llama, tied":
        assert loaded.lm_head.SVh.codes is loaded.model.embed_tokens.matrix.codes


@pytest.mark.parametrize("packed", [False, True])
def test_other_libraries_may_tie_weights_again(packed, tmp_path):
    """lm-eval does so; the weight of an embedding of codes is no parameter to be set."""
    save_pretrained(quantized_model(), tmp_path)
    model = load_pretrained(tmp_path)
    if packed:
        optimize_for_inference(model)
    want = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), want)
    assert model.lm_head.SVh.shape == model.model.embed_tokens.weight.shape


def test_the_files_hold_what_is_resident_and_a_header(tmp_path):
    model = quantized_model()
    save_pretrained(model, tmp_path, max_shard_size=6_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert_same(load_pretrained(tmp_path), model)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards)
    size = model_size(load_pretrained(tmp_path), tmp_path)
    stored = model.state_dict()
    made = sum(b.nbytes for n, b in model.named_buffers() if n not in stored)
    assert size.file_bytes == size.resident_bytes - made + headers


def test_a_loaded_models_dtype_is_asked_for_and_its_codes_stay(tmp_path):
    model = quantized_model()
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, dtype="bfloat16")
    assert loaded(IDS).logits.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(loaded.state_dict()[name], tensor)
    again = loaded.float()
    torch.testing.assert_close(logits(again), logits(model), rtol=0.02, atol=0.02)


def test_parameters_are_the_weights_and_bytes_are_the_codes():
    dense = quantized_model()
    size = model_size(dense)
    q = dense.get_submodule(Q)
    lost = 32 * 32 - q.parameter_count(merged=False)
    from helpers.checkpoints import build

    plain = model_size(build("llama, tied", rank=0))
    assert size.parameters == size.model.as_is == plain.parameters - lost
    assert (size.model.dense, size.linears.dense) == (plain.parameters, plain.linears.dense)
    assert size.linears.as_is == plain.linears.as_is - lost
    k = dense.get_submodule(f"{Q[:-6]}k_proj")
    assert k.parameter_count() == 16 * 32
    assert k.SVh.matrix.nbytes == 16 * (8 * 4 + 2) + 8 * 4
    assert size.parameter_bytes < plain.parameter_bytes / 2
    assert size.parameter_bytes == sum(p.nbytes for p in dense.parameters())


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"SVh": 7}, r"bits of SVh must be one of \(2, 3, 4, 5, 6, 8\), got 7"),
        ({"W": 4}, "bits must be a mapping from SVh or U, got"),
        (4, "bits must be a mapping from SVh or U, got 4"),
        ({"SVh": 6, "U": 8}, r"SVh\.codes' must have shape \[8, 1, 48\], has \[8, 1, 40\]"),
    ],
)
def test_bits_that_can_not_be_are_named(bits, message, tmp_path):
    save_pretrained(quantized_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"][Q]["bits"] = bits
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_shapes_for_tuning_leave_codes_out(tmp_path):
    save_pretrained(quantized_model(), tmp_path)
    with pytest.raises(CheckpointError, match="there are no low-rank layers"):
        layer_shapes(tmp_path)


def test_adapters_on_codes():
    model = quantized_model("llama")
    before, codes = logits(model), model.get_submodule(Q).SVh
    with pytest.raises(ValueError, match=f"its layer {Q} is an SVDLoRALinear"):
        add_adapters(model, 4)
    path = f"{Q[:-6]}k_proj"
    add_adapters(model, 4, include=["k_proj"])
    layer = model.get_submodule(path)
    assert isinstance(layer, QuantizedLinear) and layer.lora_rank == 4
    assert {n for n, p in model.named_parameters() if p.requires_grad and "k_proj" in n} == {
        f"model.layers.{i}.self_attn.k_proj.{n}" for i in (0, 1) for n in "AB"
    }
    torch.testing.assert_close(logits(model), before)
    model(IDS, labels=IDS).loss.backward()
    assert layer.B.grad.any() and model.get_submodule(Q).SVh is codes


def test_merged_layers_of_codes_get_new_adapters_on_the_same_codes():
    model = quantized_model()
    assert "lm_head" not in unshared_layers(model), "its codes are the embedding's too"
    q = model.get_submodule(Q)
    q.A = q.B = None
    before, codes = logits(model), q.SVh.codes
    renew_adapters(model, 4)
    assert model.get_submodule(Q).SVh.codes is codes
    assert model.get_submodule(Q).lora_rank == 4
    torch.testing.assert_close(logits(model), before)
    with pytest.raises(ValueError, match="train must be 'adapters' for a quantised model"):
        starting_tensors(model)


@pytest.mark.skipif(bool(available_backends()["cpu"]), reason="needs the CPU kernels")
def test_the_decoder_computes_steps_on_codes_whole():
    model = optimize_for_inference(quantized_model("llama, tied", torch.bfloat16))
    decoder = Decoder(model)
    assert (decoder.runtime, decoder.reason) == ("cpu", "")
