"""The examples run unchanged and print the numbers that the README gives."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from helpers import tiny

from hylora_kernels.text.sources import SPLIT_TEXTS, python_docs_text

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def accounting():
    return runpy.run_path(str(EXAMPLES / "article_accounting.py"))["main"]()


def test_accounting_of_the_dense_model(accounting):
    assert accounting[0].dense / 1e6 == pytest.approx(1100.05, abs=0.005)


@pytest.mark.parametrize(
    ("a", "lora_rank", "true_mib", "change"),
    [
        (0.5, 16, 1789.8, -14.7),
        (0.5, 32, 1808.7, -13.8),
        (0.7, 0, 2185.0, +4.1),
        (0.7, 16, 2203.9, +5.0),
        (0.7, 32, 2222.8, +5.9),
    ],
)
def test_accounting_of_the_true_sizes(accounting, a, lora_rank, true_mib, change):
    (row,) = [row for row in accounting if (row.a, row.lora_rank) == (a, lora_rank)]
    assert row.true_mib == pytest.approx(true_mib, abs=0.05)
    assert 100 * row.true_change == pytest.approx(change, abs=0.05)


def test_accounting_by_the_articles_method(accounting):
    counted = {(row.a, row.lora_rank): row.counted_mib for row in accounting}
    assert counted[0.5, 16] == pytest.approx(753, abs=0.5)
    assert counted[0.5, 32] == pytest.approx(772, abs=0.5)
    # The frozen base is not counted, so `a` can't matter.
    assert counted[0.7, 16] == counted[0.5, 16] and counted[0.7, 32] == counted[0.5, 32]


def test_accounting_without_adapters(accounting):
    (row,) = [row for row in accounting if row.lora_rank == 0]
    assert row.true / 1e6 == pytest.approx(1145.57, abs=0.005)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of two blocks, a tokenizer of its own and a text beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    text = python_docs_text()[:200_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = tiny.tokenizer(text)
    tokenizer.save_pretrained(folder)
    model = tiny.llama(vocab_size=len(tokenizer), hidden_size=64, max_position_embeddings=256)
    model.save_pretrained(folder)
    return folder


def test_own_model(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = str(tiny_model / "text.txt")
    main = runpy.run_path(str(EXAMPLES / "own_model.py"))["main"]
    dense, small = main(str(tiny_model), text, text, length=64, samples=8, lora_rank=8)
    assert small.size.linears.keep_merged <= 0.8
    assert small.size.parameters < dense.size.parameters
    # Sixty steps on the very text: a random model has learnt something of it.
    assert small.perplexity.ppl < dense.perplexity.ppl
    assert (tmp_path / "runs/own_model/model.safetensors").is_file()
    assert "perplexity" in capsys.readouterr().out


def test_the_cells_of_the_notebook_run(tiny_model, capsys, monkeypatch):
    """As one script, on a tiny model in the place of SmolLM2 and a text in that of stdlib, which is
    nearly a million characters to gather and to cut up."""
    text = (tiny_model / "text.txt").read_text(encoding="utf-8")
    monkeypatch.setitem(SPLIT_TEXTS, "stdlib", lambda split: text)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    script = "\n".join(cells).replace('"smollm2-135m"', repr(str(tiny_model)))
    found: dict = {}
    exec(compile(script, "quickstart.ipynb", "exec"), found)
    assert found["report"].keep <= 0.8 and found["after"].perplexity.ppl > 1
    assert "perplexity" in capsys.readouterr().out
    assert all(not cell.get("outputs") for cell in notebook["cells"])


def test_own_model_without_a_model_says_what_it_takes(monkeypatch):
    script = str(EXAMPLES / "own_model.py")
    monkeypatch.setattr("sys.argv", [script])
    with pytest.raises(SystemExit, match="MODEL"):
        runpy.run_path(script, run_name="__main__")


@pytest.fixture
def traced(tmp_path):
    """An ONNX file with the inputs of an export."""
    onnx = pytest.importorskip("onnx")

    def write(*operators):
        helper, INT64, FLOAT = onnx.helper, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
        inputs = [
            helper.make_tensor_value_info("input_ids", INT64, ["rows", "tokens"]),
            helper.make_tensor_value_info("attention_mask", INT64, ["rows", "all"]),
            helper.make_tensor_value_info("past.0.keys", FLOAT, ["rows", 2, "before", 16]),
        ]
        nodes = [helper.make_node(name, ["past.0.keys"], [name], domain=d) for name, d in operators]
        graph = helper.make_graph(nodes, "graph", inputs, [])
        onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
        return str(tmp_path / "model.onnx")

    return write


def test_tensorrt_line(traced, capsys):
    main = runpy.run_path(str(EXAMPLES / "tensorrt_build.py"))["main"]
    path = traced(("Abs", ""))
    main([path, "--print", "--batch", "4", "--length", "64"])
    words = capsys.readouterr().out.split()
    assert words[:2] == ["trtexec", f"--onnx={path}"]
    assert "--minShapes=input_ids:1x1,attention_mask:1x2,past.0.keys:1x2x1x16" in words
    assert "--maxShapes=input_ids:4x64,attention_mask:4x128,past.0.keys:4x2x64x16" in words


def test_tensorrt_has_no_operators_of_onnx_runtime(traced):
    main = runpy.run_path(str(EXAMPLES / "tensorrt_build.py"))["main"]
    with pytest.raises(ValueError, match="MatMulNBits of ONNX Runtime are not in TensorRT"):
        main([traced(("MatMulNBits", "com.microsoft")), "--print"])
