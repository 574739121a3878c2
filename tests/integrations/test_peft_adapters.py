"""A model's own adapters as one of PEFT and back: in memory, in files, by command."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from helpers import tiny
from helpers.quantizing import quantized_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hylora_kernels import SVDLoRALinear, load_pretrained, save_pretrained
from hylora_kernels.cli import main as cli
from hylora_kernels.model.files import CheckpointError

peft = pytest.importorskip("peft")
adapters = pytest.importorskip("hylora_kernels.integrations.peft_adapters")

IDS = tiny.tokens(2, 8)


def compressed(lora_rank=3):
    """A tiny Llama, q and gate compressed with different alphas and ranks, the others dense."""
    model = tiny.adapted(tiny.llama(), 12, lora_rank, "pair", alpha=0.5, names=("q_proj",))
    return tiny.adapted(model, 10, lora_rank and lora_rank + 1, "pivoted", names=("gate_proj",))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def own(model):
    named = model.named_modules()
    return {path: m for path, m in named if isinstance(m, SVDLoRALinear) and m.lora_rank}


@pytest.fixture(scope="module")
def on_dense(tmp_path_factory):
    """A LoRA of the dense model, in PEFT's files, of two ranks and scalings."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    torch.manual_seed(2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=2,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"down_proj": 3},
        target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
        init_lora_weights=False,
        lora_dropout=0.1,
    )
    peft.get_peft_model(tiny.llama(), config).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------- in memory


def test_own_adapters_become_pefts_and_come_back():
    model = compressed()
    y, before = logits(model), {path: (m.A, m.B, m.alpha) for path, m in own(model).items()}
    made = adapters.to_peft(model)
    assert not own(model)
    torch.testing.assert_close(logits(made), y, rtol=1e-5, atol=1e-5)
    trainable = {id(p) for p in made.parameters() if p.requires_grad}
    assert trainable == {id(p) for A, B, _ in before.values() for p in (A, B)}
    assert adapters.from_peft(made) is model
    after = own(model)
    assert after.keys() == before.keys()
    for path, (A, B, alpha) in before.items():
        assert after[path].A is A and after[path].B is B and after[path].alpha == alpha
    assert torch.equal(logits(model), y)


def test_active_adapters_add_up_with_a_layers_own(on_dense):
    model = compressed()
    made = peft.PeftModel.from_pretrained(model, on_dense, "one")
    torch.manual_seed(3)
    made.add_adapter("two", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    made.base_model.set_adapter(["one", "two"])
    y = logits(made.eval())
    assert adapters.from_peft(made) is model
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-5)
    block = model.model.layers[0]
    assert block.self_attn.q_proj.lora_rank == 3 + 4 + 8 and block.self_attn.q_proj.alpha == 0.5
    assert block.mlp.gate_proj.lora_rank == 4 + 4 and block.mlp.gate_proj.lora_dropout == 0.1
    assert (block.self_attn.v_proj.form, block.self_attn.v_proj.lora_rank) == ("pivoted", 2)
    assert not hasattr(model, "peft_config")


def test_codes_get_an_adapter_and_stay():
    model = quantized_model("llama")
    ids, codes = IDS % model.config.vocab_size, model.model.layers[0].self_attn.k_proj.SVh.codes
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    made = peft.get_peft_model(model, config).eval()
    y = logits(made, ids)
    layer = adapters.from_peft(made).model.layers[0].self_attn.k_proj
    assert layer.SVh.codes is codes and layer.lora_rank == 8
    torch.testing.assert_close(logits(model, ids), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "tied", "message"),
    [
        ({"use_dora": True, "target_modules": ["v_proj"]}, False, "v_proj must have plain LoRA"),
        ({"modules_to_save": ["norm"]}, False, "modules_to_save must be left out"),
        ({"target_modules": ["embed_tokens"]}, False, "embed_tokens must be a linear with LoRA"),
        ({"target_modules": ["lm_head"]}, True, "lm_head must have a weight of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_and_b_can_not_say_is_refused(changes, tied, message):
    model = tiny.llama(tie_word_embeddings=tied)
    made = peft.get_peft_model(model, peft.LoraConfig(**({"target_modules": ["q_proj"]} | changes)))
    names = [name for name, _ in made.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapters.from_peft(made)
    assert names == [name for name, _ in made.named_modules()]


def test_models_without_what_is_asked_for_are_refused():
    with pytest.raises(ValueError, match="model must have adapters A and B of its own"):
        adapters.to_peft(compressed(0))
    with pytest.raises(TypeError, match="model must be a PeftModel, got a LlamaForCausalLM"):
        adapters.from_peft(compressed())


# ----------------------------------------------------------------------------------------- in files


def test_an_exported_adapter_is_read_back_bit_for_bit(tmp_path):
    model = compressed()
    y, before = logits(model), {p: (m, m.A, m.B) for p, m in own(model).items()}
    report = adapters.export_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert report.layers == 4 and report.parameters == sum(
        A.numel() + B.numel() for _, A, B in before.values()
    )
    assert all(m.A is A and m.B is B for m, A, B in before.values())
    assert torch.equal(logits(model), y)

    base = load_pretrained(tmp_path / "base")
    assert not own(base)
    by_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(by_peft), y, rtol=1e-5, atol=1e-5)
    named = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "base")

    again = adapters.load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert own(again).keys() == before.keys()
    assert all(torch.equal(own(again)[p].A, A) for p, (_, A, _) in before.items())
    assert torch.equal(logits(again), y)

    adapters.export_adapter(model, tmp_path / "second", tmp_path / "base")  # The same base.
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="must be the model without its adapters"):
        adapters.export_adapter(model, tmp_path / "third", tmp_path / "base")
    assert own(model).keys() == before.keys()


def test_a_lora_of_the_dense_model_is_added_to_the_compressed_one(on_dense):
    model, dense = compressed(), tiny.llama()
    trained = peft.PeftModel.from_pretrained(copy.deepcopy(dense), on_dense).merge_and_unload()
    before = {path: layer.to_linear().weight for path, layer in own(model).items()}
    first = copy.deepcopy(model)
    report = adapters.import_adapter(model, on_dense, IDS, progress=False)
    found = own(model)
    assert report.layers == len(found) == 8
    for path, layer in found.items():
        old = dense.get_submodule(path).weight
        delta = trained.get_submodule(path).weight - old
        wanted = before.get(path, old) + delta
        torch.testing.assert_close(layer.to_linear().weight, wanted, rtol=1e-5, atol=1e-5)
    assert report.before.ppl != report.after.ppl and report.data
    assert "change in loss" in str(report)
    merged = adapters.import_adapter(first, on_dense, IDS, merge=True, progress=False)
    assert not own(first) and merged.parameters == report.parameters
    assert merged.after.nll == pytest.approx(report.after.nll, rel=1e-5)


def test_an_imported_model_is_saved_and_loaded(on_dense, tmp_path):
    model = adapters.load_adapter(compressed(), on_dense)
    save_pretrained(model, tmp_path / "model")
    assert torch.equal(logits(load_pretrained(tmp_path / "model")), logits(model))


def spoil(folder, fault: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, said = load_file(weights), json.loads(config.read_text())
    name = next(iter(tensors))
    if fault == "lacks":
        del tensors[name]
    elif fault == "has":
        tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    elif fault == "shape":
        tensors[name] = torch.zeros(4, 31)
    elif fault == "method":
        said["peft_type"] = "LOHA"
    elif fault == "rank":
        said["r"] = 10**9
    save_file(tensors, weights)
    config.write_text(json.dumps(said))
    if fault == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    elif fault == "json":
        config.write_text("{")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lacks", r"adapter_model.safetensors: can't be put on this model: lacks base_model"),
        ("has", r"adapter_model.safetensors: .* has base_model.*layers.7.mlp"),
        ("shape", r"adapter_model.safetensors: .*size mismatch"),
        ("rank", r"adapter_model.safetensors: .*size mismatch"),
        ("method", r"adapter_config.json: peft_type must be 'LORA', got 'LOHA'"),
        ("pickle", r"adapter_model.safetensors: can't be read: No such file"),
        ("cut", r"adapter_model.safetensors: "),
        ("json", r"adapter_config.json: corrupted"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_that_does_not_fit_leaves_the_model_alone(fault, message, on_dense, tmp_path):
    shutil.copytree(on_dense, tmp_path / "adapter")
    spoil(tmp_path / "adapter", fault)
    model = compressed()
    y, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(CheckpointError, match=message):
        adapters.load_adapter(model, tmp_path / "adapter")
    assert names == [name for name, _ in model.named_modules()]
    assert torch.equal(logits(model), y)


def test_the_commands_write_and_read(on_dense, tmp_path):
    def run(*words, code=0):
        result = CliRunner().invoke(cli.app, list(map(str, words)))
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return " ".join(result.output.split())

    text = "The old dog runs after the red cats. " * 60
    tokenizer = tiny.tokenizer(text)
    (tmp_path / "text.txt").write_text(text)
    model = tiny.adapted(tiny.llama(vocab_size=len(tokenizer)), names=("q_proj",))
    save_pretrained(model, tmp_path / "small", tokenizer)
    said = run("adapter", "export", tmp_path / "small", "--out", tmp_path / "lora")
    base = tmp_path / "lora/base"
    assert "command: adapter export" in (tmp_path / "lora/run.yaml").read_text()
    assert f"for the model in {base}" in said and (base / "tokenizer.json").is_file()
    words = ("--out", tmp_path / "again", "--data", tmp_path / "text.txt", "--split", "all")
    report = ("--length", 16, "--limit", 2, "--json", tmp_path / "report.json")
    said = run("adapter", "import", base, tmp_path / "lora", *words, *report)
    assert "change in loss, nats a token" in said
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["before"]["ppl"] != found["after"]["ppl"] and found["layers"] == 2
    again = load_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    words = (base, tmp_path / "none", "--out", tmp_path / "other")
    assert "is neither a folder here nor a hub id" in run("adapter", "import", *words, code=2)
    assert not (tmp_path / "other").exists()
