"""transformers' own from_pretrained, and what is built on it, with folders of this package."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from helpers import mixtures, tiny
from helpers.checkpoints import IDS, assert_same, build, edit_config
from helpers.quantizing import quantized_model, rounded
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import hub

from hylora_kernels.integrations.transformers import HyLoRAConfig
from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.layers.experts import own_weights, unstack
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedLinear, dense_weights
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.saving import save_pretrained
from hylora_kernels.weights import PLANES

FIRST = "model.layers.0.self_attn.q_proj"
PROMPT = torch.arange(3, 11)[None]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def low_rank_embedding():
    """A head that shares both factors with the embedding."""
    model = build("llama, tied")
    U, S, Vh = torch.linalg.svd(model.model.embed_tokens.weight.detach(), full_matrices=False)
    embedding, head = LowRankEmbedding.tied_pair(U[:, :12] * S[:12], Vh[:12])
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    return model


def several_dtypes():
    """A base in bfloat16, adapters in float32."""
    model = build("llama").to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, SVDLoRALinear):
            layer.A.data, layer.B.data = layer.A.data.float(), layer.B.data.float()
    return model


def every_width():
    model = build("llama", rank=0)
    linears = [(p, m) for p, m in model.named_modules() if p.startswith("model.layers.")]
    linears = [(p, m) for p, m in linears if isinstance(m, torch.nn.Linear)]
    for (path, linear), bits in zip(linears, [*PLANES], strict=False):
        weights = dense_weights(rounded(linear.weight, bits))
        model.set_submodule(path, QuantizedLinear.from_weights(weights, dtype=torch.float32))
    return model.eval()


def mixture():
    """Experts, one of them left dense."""
    model = mixtures.mixture("mixtral")
    replaced, _ = unstack(model)
    linears = {p: m for p, m in model.named_modules() if re.search(r"experts\.\w+\.\d+$", p)}
    for path, linear in list(linears.items())[1:]:
        model.set_submodule(path, SVDLoRALinear.from_linear(linear, 4, 2, form="pivoted"))
    for path in replaced:
        own_weights(model.get_submodule(path))
    model.hylora_linears = [*linears]
    return model.eval()


MODELS = {
    "pivoted, tied": lambda: build("llama, tied"),
    "pair, Conv1D": lambda: build("gpt2", "pair"),
    # Its rotary frequencies, which a model makes for itself, are rounded and therefore saved.
    "bfloat16": lambda: build("llama, scaled rope").to(torch.bfloat16),
    "several dtypes": several_dtypes,
    "low-rank embedding": low_rank_embedding,
    "codes": quantized_model,
    "every width": every_width,
    "experts": mixture,
}


def equal(loaded, wanted):
    """All that a model's state_dict leaves out is the same, too."""
    assert_same(loaded, wanted)
    for kind in ("named_parameters", "named_buffers"):
        found = {n: (t.dtype, t.requires_grad) for n, t in getattr(loaded, kind)()}
        assert found == {n: (t.dtype, t.requires_grad) for n, t in getattr(wanted, kind)()}
    buffers = dict(wanted.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert getattr(loaded, "hylora_linears", None) == getattr(wanted, "hylora_linears", None)
    assert loaded.config.to_dict() == wanted.config.to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_loaded_as_load_pretrained_does_and_saved_again(name, tmp_path):
    save_pretrained(MODELS[name](), tmp_path / "a", max_shard_size=6_000)
    assert len([*(tmp_path / "a").glob("*.safetensors")]) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    wanted = load_pretrained(tmp_path / "a")
    equal(loaded, wanted)
    loaded.save_pretrained(tmp_path / "b")
    again = load_pretrained(tmp_path / "b")
    assert_same(again, wanted)
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "b", device_map="auto"), again)
    loaded.tie_weights()
    assert_same(loaded, wanted)


@pytest.mark.parametrize("name", ["pivoted, tied", "codes"])
def test_a_dtype_is_asked_for(name, tmp_path):
    save_pretrained(MODELS[name](), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    equal(loaded, load_pretrained(tmp_path, dtype=torch.bfloat16))
    assert copy.deepcopy(loaded).half().dtype == torch.float16


def test_layers_put_in_by_hand_are_saved_by_any_call(tmp_path):
    """On the class, as subclasses do through super(), with arguments by place or by name."""
    model = build("llama")
    PreTrainedModel.save_pretrained(model, tmp_path / "a", True, None, save_original_format=True)
    model.save_pretrained(save_directory=tmp_path / "b", save_function=torch.save)
    for folder in ("a", "b"):
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / folder), model)
    with pytest.raises(ValueError, match="variant is not supported when saving a compressed model"):
        PreTrainedModel.save_pretrained(model, tmp_path / "c", variant="fp16")
    assert not (tmp_path / "c").exists()
    dense = build("llama", rank=0)
    dense.save_pretrained(tmp_path / "dense", variant="fp16")
    assert (tmp_path / "dense/model.fp16.safetensors").exists()


def test_adapters_added_by_transformers_are_saved_alone(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(saved)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(config)
    model.save_pretrained(tmp_path)
    assert not {"config.json", "model.safetensors"} & {path.name for path in tmp_path.iterdir()}
    again = AutoModelForCausalLM.from_pretrained(saved)
    again.load_adapter(tmp_path)
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def offloaded(folder, last):
    devices = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers"), "cpu"
    )
    devices = {name: device for name, device in devices.items() if name != "model.layers"}
    layers = {f"model.layers.{i}": "cpu" for i in range(last)} | {f"model.layers.{last}": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=devices | layers, offload_folder=folder / "offloaded"
    )


def test_layers_on_disk(tmp_path):
    save_pretrained(build("llama"), tmp_path)
    assert torch.equal(offloaded(tmp_path, 1)(IDS).logits, load_pretrained(tmp_path)(IDS).logits)


def test_codes_on_disk_are_refused(tmp_path):
    save_pretrained(quantized_model(), tmp_path)
    with pytest.raises(ValueError, match=rf"device_map offloads {re.escape(FIRST)}\.SVh"):
        offloaded(tmp_path, 0)


def flip_last_byte(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (flip_last_byte, "model.safetensors: corrupted: tensor '.*' doesn't have its checksum"),
        (cut, "model.safetensors: truncated"),
        (lambda f: edit_config(f, lambda ours: ours.update(format=9)), "format is 9, supported"),
        (
            lambda f: edit_config(f, lambda ours: ours["modules"][FIRST].update(rank=9)),
            f"tensor '{FIRST}.SVh' must have shape",
        ),
        (
            lambda f: edit_config(f, lambda ours: ours["modules"].update(nowhere={"rank": 9})),
            r"modules\['nowhere'\]",
        ),
    ],
    ids=["altered", "cut", "format", "shape", "module"],
)
def test_a_spoilt_folder_is_refused_by_name(spoil, error, copied):
    spoil(copied)
    with pytest.raises(CheckpointError, match=error):
        AutoModelForCausalLM.from_pretrained(copied)


def test_another_class_is_refused(saved):
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM, which a LlamaModel can't be"):
        AutoModel.from_pretrained(saved)


def test_a_dense_model_is_not_compressed_by_loading(tmp_path):
    build(rank=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hylora does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HyLoRAConfig(format=2))


def training(model, folder, steps, **options):
    rows = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(16)]
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(**options)
    return trainer


@pytest.mark.parametrize("name", ["pivoted, tied", "codes"])
def test_trainer_trains_adapters_and_resumes(name, tmp_path):
    save_pretrained(MODELS[name](), tmp_path / "model")
    load = AutoModelForCausalLM.from_pretrained
    straight, before = load(tmp_path / "model"), load(tmp_path / "model")
    training(straight, tmp_path / "runs", 4)
    for (path, old), new in zip(before.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(old, new) != path.endswith((".A", ".B")), path
    resumed = load(tmp_path / "model")
    checkpoint = tmp_path / "runs/checkpoint-2"
    trainer = training(resumed, tmp_path / "again", 4, resume_from_checkpoint=str(checkpoint))
    assert_same(resumed, straight)
    trainer.save_model(tmp_path / "trained")
    assert_same(load(tmp_path / "trained"), straight)
    assert_same(load_pretrained(tmp_path / "trained"), straight)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_tokenizer")
    tokenizer = tiny.tokenizer("the quick brown fox jumps over the lazy dog " * 9)
    model = tiny.adapted(tiny.llama(vocab_size=len(tokenizer)))
    save_pretrained(model, folder, tokenizer)
    return folder


def test_pipeline(with_tokenizer):
    made = pipeline("text-generation", model=str(with_tokenizer))
    (answer,) = made("the quick", return_full_text=True, **GREEDY)
    ids = made.tokenizer("the quick", return_tensors="pt")
    wanted = load_pretrained(with_tokenizer).generate(**ids, **GREEDY)
    assert answer["generated_text"] == made.tokenizer.decode(wanted[0])


def test_generate_with_a_static_cache_and_an_assistant(with_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(with_tokenizer)
    wanted = model.generate(PROMPT, **GREEDY)
    assert torch.equal(wanted, model.generate(PROMPT, cache_implementation="static", **GREEDY))
    assistant = AutoModelForCausalLM.from_pretrained(with_tokenizer)
    assert torch.equal(wanted, model.generate(PROMPT, assistant_model=assistant, **GREEDY))


def test_push_to_hub_sends_our_files(with_tokenizer, monkeypatch):
    """The requests apart: the files are those of a folder that this package saves."""
    sent = {}

    def upload(self, folder, *others, **options):
        shutil.copytree(folder, with_tokenizer / "sent")
        sent.update(folder=with_tokenizer / "sent")

    class Card:
        def save(self, path): ...

    class Repository:
        repo_id = "me/small"

        def create_repo(self, *others, **options):
            return self

    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **b: Card())
    for name in ("hf_api", "create_repo"):  # one in early versions, one in late ones
        monkeypatch.setattr(hub, name, lambda *a, **b: Repository(), raising=False)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    AutoModelForCausalLM.from_pretrained(with_tokenizer).push_to_hub("me/small")
    names = {path.name for path in sent["folder"].iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert_same(load_pretrained(sent["folder"]), load_pretrained(with_tokenizer))


def test_memory_is_the_files(tmp_path):
    """At its peak, loading takes 1.2 times the files' bytes at most."""
    for name, sizes in {"small": {}, "large": {"vocab_size": 16384, "hidden_size": 512}}.items():
        model = tiny.adapted(tiny.llama(dtype=torch.bfloat16, **sizes))
        save_pretrained(model, tmp_path / name)
    code = """
import re, sys
from pathlib import Path
import hylora_kernels
from transformers import AutoModelForCausalLM

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # imports
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(1024 * (kilobytes("VmHWM") - before))
"""
    command = [sys.executable, "-c", code, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "large/model.safetensors").stat().st_size
    assert 20e6 < size < int(done.stdout.split()[-1]) * 1.05 < 1.2 * 1.05 * size


slow = pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL") != "1", reason="HYLORA_TEST_ALL=1 compiles for minutes"
)


@slow
def test_generate_compiled(with_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(with_tokenizer)
    wanted = model.generate(PROMPT, **GREEDY)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(wanted, model.generate(PROMPT, cache_implementation="static", **GREEDY))


@slow
def test_continuous_batching(with_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(with_tokenizer)
    config = copy.deepcopy(model.generation_config)
    config.update(**GREEDY, eos_token_id=-1, pad_token_id=0)
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    made = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    for prompt, answer in zip(prompts, made.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), eos_token_id=None, **GREEDY)
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()


@slow
@pytest.mark.skipif(find_spec("fastapi") is None, reason="fastapi is not installed")
def test_serve(tmp_path):
    """The command of docs/integrations.md, and one request."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = tiny.tokenizer("the quick brown fox jumps over the lazy dog " * 9, template)
    model = tiny.adapted(tiny.llama(vocab_size=len(tokenizer)))
    save_pretrained(model, tmp_path, tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    code = "import hylora_kernels; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", "--device", "cpu", "--port", at[10:]]
    server = subprocess.Popen([*command, "--host", at[:9]])
    asked = {
        "model": str(tmp_path),
        "messages": [{"role": "user", "content": "the quick"}],
        "max_tokens": 6,
        "generation_config": json.dumps({"do_sample": False}),
    }
    headers = {"content-type": "application/json"}
    url = f"http://{at}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(asked).encode(), headers)
    try:
        for _ in range(120):
            time.sleep(1)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{at}/health"):
                break
        with urllib.request.urlopen(request, timeout=200) as answer:
            (choice,) = json.load(answer)["choices"]
    finally:
        server.kill()
        server.wait()
    ids = tokenizer("the quick", return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert choice["message"]["content"] == tokenizer.decode(made, skip_special_tokens=True)
