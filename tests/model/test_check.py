"""The check of models: each function refuses the wrong ones in one line, before any work."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from helpers import tiny
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    T5Config,
)

from hylora_kernels import (
    add_adapters,
    analyze_spectrum,
    compress,
    evaluate,
    finetune,
    generate,
    optimize_for_inference,
)
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.speed import throughput
from hylora_kernels.model.check import check_model

IDS = tiny.tokens(2, 16)
TOKENIZER = tiny.tokenizer("a rose is a rose. " * 9)
CHANGE = {
    "compress": lambda model: compress(model, 0.7, IDS, cache=False, progress=False),
    "analyze_spectrum": lambda model: analyze_spectrum(model, cache=False, progress=False),
    "add_adapters": lambda model: add_adapters(model, lora_rank=2),
}
TRAIN = {
    "finetune": lambda model: finetune(model, IDS, steps=1, batch=1, progress=False),
}
SCORE = {
    "evaluate": lambda model: evaluate(model, IDS, speed=False, progress=False),
    "perplexity": lambda model: perplexity(model, IDS, progress=False),
}
RUN = {
    "generate": lambda model: generate(model, TOKENIZER, "a rose", max_new_tokens=2),
    "throughput": lambda model: throughput(model, 4, 2),
}
ALL = CHANGE | TRAIN | SCORE | RUN
SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
T5 = T5Config(
    vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0
)


def llama():
    return tiny.llama(vocab_size=384)


class Around(nn.Module):
    """As DistributedDataParallel wraps a model, without processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **arguments):
        return self.module(**arguments)


class Codes(nn.Parameter):
    """As bitsandbytes keeps four-bit weights."""


def with_weight(weight):
    model = llama()
    linear = model.model.layers[1].mlp.up_proj
    del linear.weight
    if isinstance(weight, nn.Parameter):
        linear.weight = weight
    else:
        linear.register_buffer("qweight", weight)
    return model


NO_CAUSAL_LM = {
    "a dict": (lambda: {}, TypeError, "must be a transformers causal language model, got a dict"),
    "a linear": (lambda: nn.Linear(2, 2), TypeError, "PreTrainedModel, got a Linear$"),
    "a wrapper": (
        lambda: Around(llama()),
        TypeError,
        r"PreTrainedModel, got a Around: pass the model inside, its \.module$",
    ),
    "T5": (
        lambda: AutoModelForSeq2SeqLM.from_config(T5),
        ValueError,
        "T5ForConditionalGeneration is an encoder with a decoder",
    ),
    "no head": (
        lambda: AutoModel.from_config(llama().config),
        ValueError,
        "must predict the next token; a LlamaModel has no output head",
    ),
    "classes": (
        lambda: AutoModelForSequenceClassification.from_config(llama().config),
        ValueError,
        "must predict the next token; a LlamaForSequenceClassification has",
    ),
    "masked": (
        lambda: AutoModelForMaskedLM.from_config(BertConfig(**SIZES)),
        ValueError,
        "must predict the next token; a BertForMaskedLM has",
    ),
    "no memory": (
        lambda: llama().to("meta"),
        ValueError,
        r"weights in memory, but model\.embed_tokens\.weight is on the meta device",
    ),
}


@pytest.mark.parametrize("kind", NO_CAUSAL_LM)
@pytest.mark.parametrize("function", ALL)
def test_no_causal_language_model(function, kind):
    make, error, message = NO_CAUSAL_LM[kind]
    with pytest.raises(error, match=message) as raised:
        ALL[function](make())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("function", [name for name in ALL if name != "compress"])
def test_a_name_in_the_place_of_a_model(function):
    with pytest.raises(TypeError, match=r"got 'my/model': load_model\(\.\.\.\) loads one"):
        ALL[function]("my/model")


@pytest.mark.parametrize("function", CHANGE | TRAIN | SCORE)
def test_a_model_that_looks_ahead(function):
    """BertLMHeadModel reads in both directions unless its config says is_decoder."""
    torch.manual_seed(0)
    looks_ahead = BertLMHeadModel(BertConfig(**SIZES, is_decoder=False)).eval()
    with pytest.raises(ValueError, match=r"must be causal, but .* this BertLMHeadModel depend on"):
        ALL[function](looks_ahead)
    torch.manual_seed(0)
    check_model(BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval(), "replace")


def test_a_model_that_needs_more_than_token_ids():
    model = llama()
    forward = model.forward
    model.forward = lambda pixels, **arguments: forward(**arguments)
    with pytest.raises(ValueError, match=r"must run on token ids alone, but a Llama.*'pixels'"):
        evaluate(model, IDS, progress=False)
    model.forward = lambda **arguments: SimpleNamespace(logits=forward(**arguments).logits[0])
    with pytest.raises(ValueError, match=r"logits \[n, L, words\] .*\[8, 384\] for \[2, 8\]"):
        evaluate(model, IDS, progress=False)


QUANTIZED = {
    "codes": (
        lambda: with_weight(Codes(torch.zeros(8, dtype=torch.uint8), requires_grad=False)),
        "uint8 Codes",
    ),
    "float8": (
        lambda: with_weight(
            nn.Parameter(torch.zeros(48, 32).to(torch.float8_e4m3fn), requires_grad=False)
        ),
        "float8_e4m3fn Parameter",
    ),
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("function", CHANGE)
def test_quantized_weights(function, kind, monkeypatch):
    make, found = QUANTIZED[kind]
    with pytest.raises(
        ValueError, match=rf"plain floating.*layers\.1\.mlp\.up_proj\.weight is a {found}: load it"
    ):
        ALL[function](make())


def test_codes_in_buffers_count_in_a_model_that_transformers_quantized():
    model = with_weight(torch.zeros(4, 32, dtype=torch.int32))
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"up_proj\.qweight is a int32 Tensor"):
        compress(model, 0.7, IDS)
    model = llama()
    model.hf_quantizer = object()  # GPT-OSS, dequantized as it was loaded.
    check_model(model, "replace")


def test_a_sharded_or_quantized_tensor_class_is_named():
    class Sharded(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return args[0]

    model = llama()
    data = torch.Tensor._make_wrapper_subclass(Sharded, (48, 32), dtype=torch.float32)
    model.model.layers[1].mlp.up_proj._parameters["weight"] = data
    with pytest.raises(ValueError, match="is a float32 Sharded: load it without"):
        check_model(model, "replace")


@pytest.mark.parametrize("function", CHANGE | TRAIN)
def test_offloaded_weights(function):
    model = cpu_offload(llama(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"weights in memory, but model\.\S+ is on the meta"):
        ALL[function](model)


@pytest.mark.parametrize("function", SCORE | RUN)
def test_an_offloaded_model_runs(function):
    want, model = ALL[function](llama()), cpu_offload(llama(), execution_device="cpu")
    got = ALL[function](model)
    if function == "generate":
        assert got == want
    if function == "perplexity":
        assert got == want


@pytest.mark.parametrize("function", CHANGE | TRAIN)
def test_a_packed_model(function):
    with pytest.raises(ValueError, match="model must not be packed for inference"):
        ALL[function](optimize_for_inference(llama().bfloat16()))


def test_a_compiled_model_is_evaluated_but_not_changed():
    compiled = torch.compile(llama(), backend="eager")
    assert perplexity(compiled, IDS, progress=False) == perplexity(llama(), IDS, progress=False)
    for change in (CHANGE | TRAIN).values():
        with pytest.raises(TypeError, match=r"OptimizedModule: pass the model inside, its \._orig"):
            change(compiled)


def test_a_compressed_model_is_not_compressed_again():
    model, _ = compress(
        llama(), 0.7, IDS, rank_multiple=4, lora_rank=2, cache=False, progress=False
    )
    with pytest.raises(ValueError, match=r"must be dense, but its layer model\.layers\.0\.\S+ has"):
        compress(model, 0.7, IDS, cache=False)


@pytest.mark.parametrize("function", ALL)
def test_adapters_of_peft(function, monkeypatch):
    """PEFT wraps a model (PeftModel), or puts its layers into one (BaseTunerLayer)."""
    peft, layers = ModuleType("peft"), ModuleType("peft.tuners.tuners_utils")
    peft.PeftModel = type("PeftModel", (Around,), {})
    layers.BaseTunerLayer = type("BaseTunerLayer", (), {})
    names = ("peft", "peft.tuners", "peft.tuners.tuners_utils")
    for name, module in zip(names, (peft, ModuleType("peft.tuners"), layers), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    injected = llama()
    injected.model.layers[0].mlp.up_proj = type("Lora", (Around, layers.BaseTunerLayer), {})(
        injected.model.layers[0].mlp.up_proj
    )
    for model in (peft.PeftModel(llama()), injected):
        with pytest.raises(TypeError, match=r"no adapters of PEFT, .*merge_and_unload\(\)"):
            ALL[function](model)


def test_real_peft_models():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    wrapped = peft.get_peft_model(llama(), config)
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(TypeError, match="no adapters of PEFT"):
            evaluate(model, IDS, progress=False)
    evaluate(wrapped.merge_and_unload(), IDS, speed=False, progress=False)


def test_a_model_is_tried_once():
    model, forwards = llama(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for _ in range(3):
        check_model(model, "evaluate")
    assert len(forwards) == 1
    check_model(copy.deepcopy(model), "replace")
    assert len(forwards) == 2
