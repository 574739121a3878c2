"""lm-evaluation-harness: scores of dense, compressed and quantised models on local tasks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from typer.testing import CliRunner

from hylora_kernels import save_pretrained
from hylora_kernels.cli import main as cli
from hylora_kernels.compression.quantize_model import quantize_model
from hylora_kernels.layers.packed import packed_states
from hylora_kernels.model.load import load_model
from hylora_kernels.text.sources import python_docs_text

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)

import yaml
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hylora_kernels.integrations import lm_eval
from hylora_kernels.integrations.lm_eval import evaluate_tasks, load_tasks

KINDS = {
    "multiple_choice": {
        "doc_to_text": "{{question}}",
        "doc_to_target": 1,
        "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": "acc"}],
    },
    "generate_until": {
        "doc_to_text": "{{question}}",
        "doc_to_target": "yes",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Folders dense, small and codes, and a .yaml file of a task for each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    text = python_docs_text()[:20_000]
    tokenizer = tiny.tokenizer(text)
    sizes = {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    model = tiny.llama(**sizes, max_position_embeddings=256)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    save_pretrained(tiny.adapted(model), folder / "small", tokenizer)
    ids = tiny.tokens(4, 24)
    codes, _ = quantize_model(
        folder / "dense", bits=8, calibration=ids, rounding="rtn", cache=False, progress=False
    )
    save_pretrained(codes, folder / "codes", tokenizer)
    lines = [{"question": f"Is {n} a number of the list?"} for n in range(6)]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"data_files": {"test": str(folder / "lines.jsonl")}}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    for kind, of_kind in KINDS.items():
        task = {"task": f"local_{kind}", "output_type": kind, **common, **of_kind}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(autouse=True)
def local(home, tmp_path_factory, monkeypatch):
    """The data sets' cache in a temporary folder, and our tasks alone: those of the harness are
    thousands of files to read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")
    monkeypatch.setattr(lm_eval, "TaskManager", without_defaults)


def without_defaults(include_path, include_defaults=False):
    return TaskManager(include_path=include_path, include_defaults=False)


def files(home: Path) -> list[str]:
    return [str(home / f"{kind}.yaml") for kind in KINDS]


def test_scores_are_those_of_the_harness_on_the_same_model(home):
    dense = str(home / "dense")
    found = evaluate_tasks(dense, files(home), optimize=False, progress=False)
    plain = HFLM(dense, device="cpu", batch_size=8)
    want = lm_eval.run_harness(plain, load_tasks(files(home)), bootstrap_iters=0)
    for score in found.scores:
        expected = want["results"][score.task][f"{score.metric},none"]
        assert score.value == pytest.approx(expected, rel=1e-5)
        assert score.examples == 6
        assert (score.stderr is None) == score.task.endswith("rolling")  # has no formula for one
    assert len(found.scores) == 4
    assert [s.higher_is_better for s in found.scores] == [True, True, False, False]


def test_every_kind_of_model_packed_and_as_it_is(home):
    names = [str(home / name) for name in ("dense", "small", "codes")]
    bits = []
    for optimize in (False, True):
        tasks = files(home)[0 if optimize else 2 :]  # the rolling one alone, or all
        report = evaluate_tasks(names, tasks, optimize=optimize, progress=False, limit=2)
        bits.append([s.value for s in report.scores if s.metric == "bits_per_byte"])
    assert bits[0] == pytest.approx(bits[1], rel=1e-3) and len(set(bits[0])) == 3
    assert report.models == names and report.seconds.keys() == set(names)
    assert {score.examples for score in report.scores} == {2}


def test_a_model_that_is_given_stays_packed(home):
    model, tokenizer = load_model(home / "codes")
    evaluate_tasks({"mine": model}, "small_reasoning", limit=2, tokenizer=tokenizer, progress=False)
    assert packed_states(model)


def test_the_small_tasks_need_no_file_and_are_the_same_twice(home):
    first, second = (load_tasks(["small"])["tasks"] for _ in range(2))
    assert list(first) == ["small_classification", "small_generation", "small_reasoning"]
    for name, task in first.items():
        examples = list(task.test_docs())
        assert examples == list(second[name].test_docs()) and 80 < len(examples) <= 100
        shown = {json.dumps(example) for example in task.fewshot_docs()}
        assert not shown & {json.dumps(example) for example in examples}
    reasoning = list(first["small_reasoning"].test_docs())
    assert all(len(set(e["choices"])) == len(e["choices"]) > e["label"] for e in reasoning)


def test_the_table_is_printed_and_written_as_json_and_markdown(home, tmp_path):
    names = [str(home / "dense"), str(home / "small")]
    words = ["evaluate", *names, "--tasks", f"small_classification,{files(home)[0]}"]
    words += ["--limit", "3", "--json", tmp_path / "t.json", "--markdown", tmp_path / "t.md"]
    shown = run(*words)
    assert "± is the standard error" in shown.output
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["models"] == names and written["limit"] == 3
    assert {s["task"] for s in written["scores"]} == {
        "small_classification",
        "local_multiple_choice",
    }
    heading, rule, *rows = (tmp_path / "t.md").read_text().splitlines()
    assert heading == f"| task | metric | examples | {names[0]} | {names[1]} |"
    assert rule.count("---:") == 3 and len(rows) == 2
    assert rows[0].startswith("| small_classification | acc ↑ | 3 |") and rows[0].count("±") == 2


def run(*words, code: int = 0):
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.mark.parametrize(
    "words, message",
    [
        ("--tasks small_reasonin", "knows no 'small_reasonin'; near ones: small_reasoning"),
        ("--tasks nothing.yaml", "--tasks: there is no file 'nothing.yaml'"),
        ("--tasks broken.yaml", "--tasks: 'broken.yaml' can't be loaded: "),
        ("--tasks small --dense x", "--dense is not read with --tasks"),
        ("--tasks small --shots -1", "--shots"),
        ("--shots 2", "--shots is read with --tasks alone"),
        ("another", "MODEL must be one, or several with --tasks"),
        ("dense --tasks small", "models must differ, got 'dense' twice"),
    ],
)
def test_what_is_wrong_is_named_before_a_model_is_loaded(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\n")
    shown = run("evaluate", "dense", *words.split(), code=2).output
    assert message in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"batch": 0}, {"num_fewshot": -1}])
def test_numbers_that_can_not_be(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be at least"):
        evaluate_tasks("dense", "small", **arguments)


def test_the_harness_knows_the_name(home):
    lm = get_model("hylora").create_from_arg_string(
        f"pretrained={home / 'codes'},optimize=False,dtype=bfloat16",
        {"batch_size": 2, "max_batch_size": None, "device": "cpu"},
    )
    assert lm.model.dtype == torch.bfloat16 and not packed_states(lm.model)
    assert lm.batch_size == 2 and lm.max_length == 256


@pytest.mark.skipif(os.environ.get("HYLORA_TEST_ALL") != "1", reason="HYLORA_TEST_ALL=1: slow")
@pytest.mark.parametrize("kind", ["hylora", "hf"])
def test_the_harness_own_command(kind, home, tmp_path):
    command = [sys.executable, "-m", "hylora_kernels.integrations.lm_eval", "--model", kind]
    command += ["--model_args", f"pretrained={home / 'codes'}", "--tasks", files(home)[0]]
    done = subprocess.run(
        [*command, "--device", "cpu", "--output_path", tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "local_multiple_choice" in done.stdout
