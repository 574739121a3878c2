"""Models written for other runtimes compute what they computed before."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import build, logits
from helpers.mixtures import mixture
from helpers.quantizing import quantized_model
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hylora_kernels import save_pretrained
from hylora_kernels.cli import main as cli
from hylora_kernels.integrations import export as module
from hylora_kernels.integrations.dense import dense_copy
from hylora_kernels.integrations.export import REPORT, export
from hylora_kernels.layers.experts import unstack
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedFactor
from hylora_kernels.model.load import load_model

ALL = pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL", "0") in ("", "0"), reason="HYLORA_TEST_ALL=1 traces more"
)


def experts_as_factors():
    """A mixture with one expert's linear in factors of full rank."""
    model = mixture("mixtral")
    unstack(model)
    path = next(path for path, _ in model.named_modules() if path.endswith("down_proj.1"))
    linear = model.get_submodule(path)
    model.set_submodule(path, SVDLoRALinear.from_linear(linear, min(linear.weight.shape)))
    return model


MODELS = {
    "pair": lambda: build("qwen2", "pair"),
    "pivoted": lambda: build("llama", "pivoted"),
    "transposed": lambda: build("gpt2", "pair"),
    "tied codes": quantized_model,
    "codes": lambda: quantized_model("llama"),
    "experts": experts_as_factors,
}


@pytest.mark.parametrize("name", MODELS)
def test_dense_copy(name):
    model = MODELS[name]()
    before = dict(model.named_modules())
    plain = dense_copy(model)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, SVDLoRALinear | QuantizedFactor) for m in plain.modules())
    assert dict(model.named_modules()) == before


def test_a_head_that_differs_from_the_embedding_is_untied():
    model = build("llama, tied", rank=0)
    model.lm_head = SVDLoRALinear.from_linear(model.lm_head, 8)
    plain = dense_copy(model)
    assert not plain.config.tie_word_embeddings and model.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_a_plain_folder(tmp_path):
    model, tokenizer = build("llama", "pivoted"), tiny.tokenizer("a text to learn from")
    report = export(model, tmp_path / "plain", "dense", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token == "<end>"
    assert report.agreement.equal == report.agreement.tokens == 48  # the context is 64
    assert 0 < report.agreement.largest_error < 1e-4 < report.agreement.largest_logit
    written = json.loads((tmp_path / "plain" / REPORT).read_text())
    there = {path.name for path in (tmp_path / "plain").iterdir()} - {REPORT}
    assert set(written["files"]) == there and "quantization_config" not in loaded.config.to_dict()


@pytest.mark.parametrize("fails", [False, True])
def test_an_export_replaces_an_earlier_one_or_leaves_it(fails, tmp_path, monkeypatch):
    model = build("llama, tied", "pair")
    folder = tmp_path / "made"
    export(model, folder, "dense", tiny.tokenizer("some text"), check=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "tokenizer.json" in before

    def fail(*_):
        raise KeyboardInterrupt

    if fails:
        monkeypatch.setattr(module, "compare", fail)
        for dir in (folder, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                export(model, dir, "dense")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert not (tmp_path / "new").exists()
    else:
        export(model, folder, "dense", check=False)
        assert "tokenizer.json" not in {path.name for path in folder.iterdir()}


def test_files_of_others_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = build("llama, tied", "pair")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no export wrote.*overwrite"):
        export(model, tmp_path, "dense", check=False)
    export(model, tmp_path, "dense", check=False, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    save_pretrained(model, tmp_path / "small")
    with pytest.raises(ValueError, match="holds a model, which no export overwrites"):
        export(model, tmp_path / "small", "dense", check=False, overwrite=True)


def test_wrong_arguments_are_named(tmp_path):
    model = build("llama, tied", "pair")
    for given, message in (
        ({"to": "tflite"}, r"to must be one of \('onnx', .*, got 'tflite'"),
        ({"to": "gguf", "gguf_type": "Q3_K"}, r"gguf_type must be one of .*, got 'Q3_K'"),
        ({"to": "gguf"}, "tokenizer must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "made", **given)
    assert not (tmp_path / "made").exists()


def test_other_tokens_in_float32_are_an_error(tmp_path, monkeypatch):
    found = module.Agreement(64, 60, 0.5, 9.0, 1.0, 1)
    monkeypatch.setattr(module, "compare", lambda *_: found)
    with pytest.raises(ArithmeticError, match=r"60 of 64 greedy tokens .* check=False"):
        export(build("llama, tied", "pair"), tmp_path / "made", "dense")
    assert not (tmp_path / "made").exists()


def test_the_command(tmp_path):
    save_pretrained(build("llama, tied", "pair"), tmp_path / "small", tiny.tokenizer("a text"))

    def run(*words):
        return CliRunner().invoke(cli.app, ["export", *map(str, (tmp_path / "small", *words))])

    out = ("--out", tmp_path / "made", "--to")
    done = run(*out, "dense", "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    assert "48 of 48 greedy tokens equal in float32" in done.output
    assert json.loads((tmp_path / "report.json").read_text())["agreement"]["equal"] == 48
    wrong = run(*out, "gguf", "--gguf-type", "Q3_K")
    assert wrong.exit_code == 2 and "--gguf-type must be one of" in wrong.output
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "n.txt").touch()
    wrong = run("--to", "dense", "--out", tmp_path / "notes")
    assert wrong.exit_code == 2 and "give another folder, or --overwrite" in wrong.output


# ------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer("the quick brown fox jumps over the lazy dog " * 9)


def llama(tokenizer, **changes):
    model = tiny.llama(vocab_size=len(tokenizer) + 3, **changes)
    return tiny.adapted(model, form="pair").requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
    ids=["tied", "scaled"],
)
def test_gguf_is_read_back(changes, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    model = llama(tokenizer, **changes)
    report = export(model, tmp_path / "f32", "gguf", tokenizer, gguf_type="F32")
    assert report.weight_error == 0 and report.agreement is None
    loaded, read = load_model(tmp_path / "f32/model-F32.gguf", "cpu", "float32")
    ids = tiny.tokens(2, 20)
    if "rope_parameters" not in changes:  # transformers reads no rope_freqs
        expected = model(ids).logits.detach()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    words = "the quick dog jumps"
    assert read(words).input_ids == tokenizer(words).input_ids


def test_pieces_are_read_back(tmp_path):
    """A tokenizer like Llama 2's: transformers rebuilds it from the pieces' scores alone."""
    pytest.importorskip("gguf")
    text = "the quick brown fox jumps over the lazy dog\n" * 9
    tokenizer = tiny.piece_tokenizer(text)
    export(llama(tokenizer), tmp_path / "f32", "gguf", tokenizer, gguf_type="F32", check=False)
    read = load_model(tmp_path / "f32/model-F32.gguf", "cpu", "float32")[1]
    for words in ("the quick dog jumps", "a lazy  thebrown", "caf\u00e9 \u732b"):
        mine = tokenizer(words).input_ids
        assert read(words, add_special_tokens=False).input_ids == mine, words
        assert tokenizer.decode(mine) == words


def test_pieces_of_a_text_that_is_changed_are_refused(tmp_path):
    pytest.importorskip("gguf")
    tokenizer = tiny.piece_tokenizer("the quick brown fox")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ValueError, match=r"GGUF has those for spaces alone, got .*NFKC"):
        export(llama(tokenizer), tmp_path / "made", "gguf", tokenizer)


def test_gguf_types(tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, errors = llama(tokenizer), {}
    for kind in ("F16", "BF16", "Q8_0", "Q4_1"):
        report = export(model, tmp_path, "gguf", tokenizer, gguf_type=kind)
        errors[kind] = report.weight_error
        assert list(report.files) == [f"model-{kind}.gguf"]
    assert 0 < errors["F16"] < errors["BF16"] < errors["Q8_0"] < 0.01 < errors["Q4_1"] < 0.1
    stored = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"model-{kind}.gguf").tensors
    }
    assert stored["blk.0.attn_q.weight"] == "Q4_1" and stored["blk.0.attn_norm.weight"] == "F32"
    assert stored["blk.0.ffn_down.weight"] == "F16"  # rows of 48 hold no whole number of blocks


def test_gguf_refuses_other_models(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=r"one of llama, .*qwen3 for GGUF, got 'gpt2'"):
        export(build("gpt2", "pair"), tmp_path / "made", "gguf", tokenizer)
    assert not (tmp_path / "made").exists()


# ----------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    "name", ["tied codes", *(pytest.param(n, marks=ALL) for n in ("pivoted", "codes", "pair"))]
)
def test_onnx(name, tmp_path, capfd):
    for needed in ("onnx", "onnxscript", "onnxruntime", "transformers.exporters"):
        pytest.importorskip(needed)
    model = MODELS[name]()
    expected = logits(model)
    report = export(model, tmp_path, "onnx")
    said = capfd.readouterr().err
    assert "Failed to infer the signature" not in said and "FutureWarning" not in said
    assert report.agreement.equal == report.agreement.tokens
    assert report.agreement.largest_error < 1e-4 * report.agreement.largest_logit
    assert {"model.onnx", "model.onnx.data", "export.json"} < set(report.files)
    assert torch.equal(logits(model), expected)
    assert_padding_is_masked(model, tmp_path)

    import onnx

    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert {"input_ids", "attention_mask", "position_ids"} < {value.name for value in graph.input}
    operators = {(node.domain, node.op_type) for node in graph.node}
    assert (("com.microsoft", "MatMulNBits") in operators) == ("codes" in name)
    weights = [tuple(t.dims) for t in graph.initializer]
    words = model.get_input_embeddings().num_embeddings
    tables = [shape for shape in weights if len(shape) > 1 and shape[0] == words]
    assert len(tables) <= 4, "a tied head and its embedding are stored once"


@torch.no_grad()
def assert_padding_is_masked(model, folder):
    """Two prompts, one of them padded on the left, through the graph and through the model."""
    from transformers.exporters import ExportedModel

    ids, mask = tiny.tokens(2, 7, 60), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    graph = ExportedModel.from_pretrained(folder, device="cpu")
    got, expected = graph(**given, past_key_values=cache).logits, model(**given).logits
    kept = mask.bool()
    torch.testing.assert_close(got[kept], expected[kept], rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize("name", ["pivoted", "codes"])
def test_torch_program(name, tmp_path):
    pytest.importorskip("transformers.exporters")
    report = export(MODELS[name](), tmp_path, "torch")
    assert report.agreement.equal == report.agreement.tokens
    program = torch.export.load(tmp_path / "model.pt2")
    assert "hylora" not in str(program.graph)
