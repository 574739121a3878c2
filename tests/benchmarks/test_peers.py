"""benchmarks/peers.py without its engines: files of weights, processes, turns and tables. Nothing
is fetched; an engine is a small process here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import peers
import peers_setup
from timing import Times

# Its tokens count on from the last of the prompt; a model "broken" ends the process.
ENGINE = """
import json, sys
sys.path.append(sys.argv[1])
from peers_child import answers, serve
class Counting:
    def __init__(self, path):
        self.path = path
    def start(self, ids):
        if self.path == "broken":
            raise SystemExit("broken indeed")
        self.last = ids[-1]
        return self.step()
    def step(self):
        self.last += 1
        return self.last
    def parts(self, count):
        assert count == 16
        return {"linears": 3.0, "rest": 1.0}
out, given = answers(), json.loads(sys.argv[2])
print("a library's chatter")
if "absent" in given["models"]:
    raise SystemExit("no such library")
sequences = {name: Counting(path) for name, path in given["models"].items()}
serve(sequences, {"counting": "1.0"}, dict.fromkeys(sequences, 10_000_000), out)
"""


@pytest.fixture
def counting(monkeypatch):
    words = [sys.executable, "-c", ENGINE, Path(peers.__file__).parent]
    monkeypatch.setattr(peers, "command", lambda engine: (words, {}))
    monkeypatch.setattr(peers_setup, "prompt", lambda count: list(range(count)))


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A file with a quantised matrix, a vector and some metadata; its numbers."""
    values = {
        "blk.0.ffn_up.weight": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32),
        "output_norm.weight": np.full(64, 1.001, np.float32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_token_list(["a", "b"])
    writer.add_add_bos_token(False)
    for name, array in values.items():
        kind = gguf.GGMLQuantizationType.Q4_1 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        values[name] = gguf.dequantize(gguf.quantize(array, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(("kind", "error"), [("BF16", 0), ("F16", 0), ("Q8_0", 0.01)])
def test_gguf_is_the_model_stored_otherwise(tmp_path, kind, error):
    values = tiny_gguf(tmp_path / "source.gguf")
    peers_setup.write_gguf(tmp_path / "source.gguf", tmp_path / "target.gguf", kind)
    source = gguf.GGUFReader(tmp_path / "source.gguf")
    target = gguf.GGUFReader(tmp_path / "target.gguf")
    kept = [name for name in source.fields if name != "general.file_type" and name[:5] != "GGUF."]
    assert kept and all(
        target.fields[name].contents() == source.fields[name].contents() for name in kept
    )
    assert target.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    found = {t.name: t for t in target.tensors}
    assert {name: t.tensor_type.name for name, t in found.items()} == {
        "blk.0.ffn_up.weight": kind,
        "output_norm.weight": "F32",
    }
    for name, tensor in found.items():
        assert list(tensor.shape) == list(values[name].shape[::-1])
        got = gguf.dequantize(tensor.data, tensor.tensor_type)
        bf16 = gguf.GGMLQuantizationType.BF16
        expected = values[name]
        if expected.ndim > 1:
            expected = gguf.dequantize(gguf.quantize(expected, bf16), bf16)
        assert np.abs(got - expected).max() <= error * np.abs(expected).max(), name


def test_a_run_from_processes_to_the_table(tmp_path, counting):
    rows = [
        peers.Peer("ours, dense bf16", "ours", "bf16", "one"),
        peers.Peer("llama.cpp BF16", "llama.cpp", "BF16", "two"),
        peers.Peer("llama.cpp Q8_0", "llama.cpp", "Q8_0", "three"),
        peers.Peer("absent", "onnxruntime-genai", "fp32", "four"),
    ]
    plan = peers.Plan(decode=((130, 3, 2),), prefill=8, prefills=2)
    result = peers.Result({"processor": "one"})
    peers.run(rows, [1, 4096], plan, result, tmp_path / "new" / "peers.json")
    written = json.loads((tmp_path / "new" / "peers.json").read_text())
    assert list(result.phases) == ["decode at 130, 1T", "prefill 8, 1T"]
    assert written["phases"] == result.phases
    assert result.versions == {"counting": "1.0"}
    assert result.tokens["ours, dense bf16"] == [*range(128, 128 + peers.AGREE)]
    assert result.phases["prefill 8, 1T"]["llama.cpp BF16"]["over_reference"] == 1
    assert written["parts"] == {
        f"{row.name}, 1T": {"linears": 3.0, "rest": 1.0} for row in rows[:3]
    }
    assert "ended with 1" in result.missing["onnxruntime-genai"]
    assert "cores may be used" in result.missing["4096 threads"]
    text = peers.text(peers.Result(**written))
    assert text.splitlines()[2].startswith("| ours, dense bf16 | 10 | ")
    assert "| absent" not in text and "not had: onnxruntime-genai: its process" in text
    assert "other greedy tokens" not in text
    assert "| ours, dense bf16, 1T | 4000.00 | 75 % | 25 % |" in text
    assert "no such library" in (tmp_path / "new" / "peers.log").read_text()


def test_an_engine_that_ends_is_named(tmp_path, counting):
    rows = [peers.Peer("x", "ours", "bf16", "broken")]
    with pytest.raises(peers.Missing, match=r"its process ended with 1: see .*peers\.log"):
        peers.run(rows, [1], peers.QUICK, peers.Result({}), tmp_path / "peers.json")


def test_tokens_of_engines_with_the_same_weights_are_compared():
    result = peers.Result({})
    result.weights = {"llama.cpp BF16": "BF16", "a": "bf16", "b": "Q8_0", "c": "fp32", "d": "F16"}
    result.tokens = {"llama.cpp BF16": [1, 2], "a": [1, 2], "b": [3, 4], "c": [1, 3]}
    assert peers.disagreements(result) == {"c": [1, 3]}
    assert "other greedy tokens: c: [1, 3]" in peers.text(result)


def test_ratios_are_those_of_each_round():
    times = Times({peers.REFERENCE: [1.0, 4.0, 2.0], "a": [0.5, 1.0, 2.0]})
    found = peers.speeds(times)
    assert found["a"] == {"tokens_per_second": 1.0, "over_reference": 2.0}
    assert peers.cell(found["a"]) == "1.0 (2.00)"
    assert peers.speeds(Times({"a": [0.5]})) == {"a": {"tokens_per_second": 2.0}}


def test_turns_rotate():
    order = []

    def sample(name):
        order.append(name)
        return 1.0

    peers.in_turns(["a", "b", "c"], 3, sample, "")
    assert "".join(order) == "abcbcacab"


def test_rows(monkeypatch):
    monkeypatch.setattr(peers, "command", lambda engine: ([], {}))
    rows = list(peers.wanted({"mine": "runs/mine"}))
    names = [row[0] for row in rows]
    assert names[:4] == [f"ours, {m} {d}" for m in ("dense", "mine") for d in ("bf16", "fp32")]
    assert peers.REFERENCE in names

    def refuse():
        raise peers.Missing("no npm")

    missing = {}
    found = peers.peers([rows[2], ("gone", "llama.cpp", "BF16", refuse)], missing)
    given = {"path": "runs/mine", "dtype": "bfloat16", "runtime": "ours"}
    assert found == [peers.Peer("ours, mine bf16", "ours", "factors", given)]
    assert missing == {"gone": "no npm"}


def test_a_command_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path))
    words = [sys.executable, "-c", "import os, sys; print('first'); sys.exit(os.environ['WHY'])"]
    with pytest.raises(peers.Missing, match=r"python.* failed: the wind \(all in .*setup\.log\)"):
        peers_setup.run(words, WHY="the wind")
    assert "first\nthe wind\n" in (tmp_path / "benchmarks" / peers_setup.LOG).read_text()


def test_what_is_made_is_whole_or_absent(tmp_path, capsys):
    def fail(new):
        (new / "half").write_text("")
        raise peers.Missing("halfway")

    with pytest.raises(peers.Missing, match="halfway"):
        peers_setup.make(tmp_path / "a", "making a", fail)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        path = peers_setup.make(tmp_path / "a", "making a", lambda new: (new / "x").touch(0o755))
    assert [file.name for file in path.iterdir()] == ["x"]
    assert capsys.readouterr().out.count("making a ... 0 s") == 1
