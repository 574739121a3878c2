"""vLLM runs folders of this package by the plug-in's entry point, in a process of its own.

vLLM wants versions of its own (torch, transformers), so it lives in an environment of its own:
HYLORA_VLLM_PYTHON names its Python. Nothing of this package is installed there.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import checkpoints, tiny
from helpers.checkpoints import edit_config
from helpers.quantizing import quantized_model
from torch import nn
from transformers import LlamaConfig, Qwen2Config

import hylora_kernels
from hylora_kernels import SVDLoRALinear, load_pretrained, save_pretrained

ROOT = Path(hylora_kernels.__file__).parents[1]
TOKENS = 32
SIZES = {
    "vocab_size": 100,  # vLLM pads it to 128
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 32: the least of vLLM's attention on a CPU
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# Reads jobs, [[folder, prompts, options of LLM], ...], and prints each one's tokens or its error.
RUN = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from hylora_kernels.integrations.vllm import HyLoRAConfig, HyLoRAMethod

entry = {"modules": {"a": {"rank": 1, "form": "pair"}}, "quant_method": "hylora", "format": 2}
try:  # half of the inputs, as one of two processes gets them
    HyLoRAMethod(HyLoRAConfig(entry), ["a"]).create_weights(None, 64, [8], 128, 8, None)
except NotImplementedError as error:
    print("RESULT", json.dumps(str(error)))

greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
for folder, prompts, options in json.load(sys.stdin):
    try:
        options |= {"skip_tokenizer_init": True, "max_model_len": 64, "dtype": "float32"}
        llm = LLM(folder, **options)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
        found = [list(answer.outputs[0].token_ids) for answer in answers]
        del llm
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print("RESULT", json.dumps(found), flush=True)
    gc.collect()
    cleanup_dist_env_and_memory()
"""


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> Path:
    """A folder with this checkout's own metadata, which makes it an installed package."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder]
    command += ["dist_info", "--output-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_entry_point_is_a_function_without_arguments(metadata):
    """What vLLM reads and calls; vLLM itself isn't needed for that."""
    (text,) = [file.read_text() for file in metadata.glob("*.dist-info/entry_points.txt")]
    group = text.partition("[vllm.general_plugins]\n")[2].partition("\n[")[0].strip()
    module, _, function = group.removeprefix("hylora = ").partition(":")
    spec = importlib.util.find_spec(module)
    found = {n.name: n for n in ast.parse(Path(spec.origin).read_text()).body if hasattr(n, "name")}
    arguments = found[function].args
    assert not arguments.args and not arguments.kwonlyargs


# ------------------------------------------------------------------------------- behind vLLM itself


def vllm_python() -> str:
    named = os.environ.get("HYLORA_VLLM_PYTHON", "")
    return named or (sys.executable if importlib.util.find_spec("vllm") else "")


needs_vllm = pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL", "0") in ("", "0") or not vllm_python(),
    reason="HYLORA_TEST_ALL=1 runs vLLM, if it is installed here (it isn't"
    " beside transformers 5.20 or later) or HYLORA_VLLM_PYTHON names a Python that has it",
)


def mixed(model: nn.Module) -> nn.Module:
    """Forms, ranks and adapters that differ within q, k, v and within gate, up; some are dense."""
    kinds = {
        "q_proj": {"rank": 40, "lora_rank": 4, "form": "pair", "alpha": 0.5},
        "k_proj": {"rank": 24, "lora_rank": 0, "form": "pivoted"},
        "gate_proj": {"rank": 33, "lora_rank": 8, "form": "pivoted", "alpha": 2.0},
        "up_proj": {"rank": 8, "lora_rank": 0, "form": "pair"},  # torch's products, so no group
        "down_proj": {"rank": 50, "lora_rank": 3, "form": "pivoted"},
    }
    for path, linear in list(model.named_modules()):
        kind = kinds.get(path.rpartition(".")[2])
        first = path.startswith("model.layers.0.")
        if kind and (first or not path.endswith(("gate_proj", "q_proj"))):
            rank = kind["rank"] + 8 * first
            model.set_submodule(path, SVDLoRALinear.from_linear(linear, **kind | {"rank": rank}))
    return model.eval()


def codes(config) -> nn.Module:
    name = "of 32 a head"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.CONFIGS, name, config)
        return quantized_model(name)


def qwen2_with_biases() -> nn.Module:
    model = tiny.causal_lm(Qwen2Config(**SIZES, tie_word_embeddings=True))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return mixed(model)


def with_entry(path: str, **entry) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda ours: ours["modules"].update({path: entry}))


def corrupted(folder: Path) -> None:
    """Alter the last byte of the weights, which is a layer's."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


MODELS = {
    "mixed": lambda: mixed(tiny.llama(**SIZES)),
    "biases, tied": qwen2_with_biases,
    "codes, tied": lambda: codes(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "codes": lambda: codes(LlamaConfig(**SIZES)),
}
EXPERT = "model.layers.0.mlp.experts.down_proj.3"
CHANGES = {  # to the folder "mixed"
    "embedding": with_entry("model.embed_tokens", rank=8),
    "experts": with_entry(EXPERT, rank=8, form="pair"),
    "corrupted": corrupted,
}
REFUSALS = {
    "embedding": "model.embed_tokens: a low-rank embedding doesn't run in vLLM",
    "experts": f"{EXPERT}: compressed experts don't run in vLLM",
    "corrupted": "doesn't have its checksum",
    "parallel": "a: tensor parallelism must be 1",
}


@pytest.fixture(scope="module")
def runs(metadata, tmp_path_factory) -> dict:
    """Name -> (folder, prompts, options, what vLLM says)."""
    work = tmp_path_factory.mktemp("vllm")
    prompts = [tiny.tokens(1, n, 100, seed=n)[0].tolist() for n in (3, 8, 17, 20)]
    eager = {"enforce_eager": True}
    for name, make in MODELS.items():
        save_pretrained(make(), work / name)
    for name, change in CHANGES.items():
        shutil.copytree(work / "mixed", work / name)
        change(work / name)
    jobs = {name: [str(work / name), prompts, eager] for name in (*MODELS, *CHANGES)}
    jobs["compiled"] = [str(work / "codes, tied"), prompts, {}]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, metadata))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [vllm_python(), "-c", RUN],
        input=json.dumps([*jobs.values()]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=work,
    )
    results = [json.loads(s[7:]) for s in done.stdout.splitlines() if s.startswith("RESULT ")]
    assert len(results) == 1 + len(jobs), done.stdout[-2000:] + done.stderr[-5000:]
    found = dict(zip(jobs, results[1:], strict=True))
    return {name: (*job, found[name]) for name, job in jobs.items()} | {"parallel": results[:1]}


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "compiled"])
def test_tokens_are_those_of_transformers(name, runs):
    folder, prompts, _, found = runs[name]
    model = load_pretrained(folder)
    model.generation_config.eos_token_id = None
    for ids, tokens in zip(prompts, found, strict=True):
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        assert tokens == wanted[0, len(ids) :].tolist()


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_run_is_refused_by_name(name, runs):
    *_, found = runs[name]
    assert REFUSALS[name] in found
