"""Commands that torchrun starts in several processes."""

from __future__ import annotations

import json

import pytest
from helpers import tiny
from helpers.processes import end_together, run_together, torchrun
from typer.testing import CliRunner

from hylora_kernels.cli import main as cli
from hylora_kernels.model.load import load_model
from hylora_kernels.model.saving import save_pretrained

COMMAND = "import sys; from hylora_kernels.cli.main import main; main()"
TEXT = " ".join(f"a{i} walked b{i * i} home" for i in range(300))


def test_finetune_prints_and_writes_in_the_first_process_alone(tmp_path):
    model = tiny.adapted(tiny.llama(vocab_size=tiny.WORDS + 256))
    save_pretrained(model, tmp_path / "small", tiny.tokenizer(TEXT))
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["finetune", tmp_path / "small", "--data", tmp_path / "text.txt", "--length", 16]
    words += ["--steps", 3, "--device", "cpu", "--out"]
    (first, _), (second, noise) = run_together(COMMAND, *words, tmp_path / "two")
    assert "3 steps" in first and f"written to {tmp_path / 'two'}" in first
    assert second == noise == ""
    files = {
        path.relative_to(tmp_path / "two").as_posix() for path in (tmp_path / "two").rglob("*")
    }
    assert files >= {"config.json", "finetune.json", "training/log.jsonl"}
    assert not [name for name in files if name.startswith(".")]
    assert load_model(tmp_path / "two", "cpu")[1] is not None
    (first, _), (second, noise) = run_together(COMMAND, *words, tmp_path / "parts", "--shard")
    assert "3 steps" in first and second == noise == ""
    alone = CliRunner().invoke(cli.app, [*map(str, [*words, tmp_path / "one"]), "--batch", "2"])
    assert alone.exit_code == 0, alone.output
    names = ("one", "two", "parts")
    reports = [json.loads((tmp_path / n / "finetune.json").read_text()) for n in names]
    assert reports[1]["losses"] == reports[2]["losses"]
    assert reports[1]["losses"] == pytest.approx(reports[0]["losses"], rel=1e-3)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in names[1:]]
    assert weights[0] == weights[1]


def test_other_commands_run_in_one_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(cli.app, ["info"])
    assert found.exit_code == 2
    assert "info runs in one process, without torchrun" in found.output
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert CliRunner().invoke(cli.app, ["cache"]).exit_code == 0


# A command whose process of rank 1, if it is told so, is killed at its second layer.
SCRIPT = """
import os, signal, sys
from hylora_kernels.cli.main import main
from hylora_kernels.compression.workspace import Workspace

save, saved = Workspace.save, []

def saving(*given):
    saved.append(given[1])
    if len(saved) == 2 and os.environ["RANK"] == "1" and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*given)

Workspace.save = saving
main()
"""


@pytest.fixture
def words(tmp_path):
    """A command in a folder with a model, a text and SCRIPT."""
    tiny.llama(vocab_size=tiny.WORDS + 256).save_pretrained(tmp_path / "dense")
    tiny.tokenizer(TEXT).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["compress", tmp_path / "dense", "--data", f"{tmp_path / 'text.txt'}:6"]
    words += ["--length", 16, "--rank-multiple", 4, "--lora-rank", 4, "--device", "cpu"]
    return [*words, "--keep", 0.7, "--out", tmp_path / "small"]


def test_torchrun_compresses_and_a_lost_process_is_named(words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("KILL", "1")
        ended = torchrun(tmp_path / "script.py", *words)
    assert ended.returncode != 0
    assert "error: process of rank 1 of 2 ended before the others were done" in ended.stderr
    assert "the same command continues" in ended.stderr
    assert not (tmp_path / "small").exists()
    (said, _), nothing = run_together(COMMAND, *words)
    assert f"written to {tmp_path / 'small'}" in said and nothing == ("", "")
    alone = CliRunner().invoke(cli.app, [*map(str, words[:-1]), str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    two, one = (
        json.loads((tmp_path / n / "compress.json").read_text()) for n in ("small", "alone")
    )
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert two["calibration_tokens"] == one["calibration_tokens"] == 96


def test_an_error_of_all_processes_is_said_once(words, tmp_path):
    ended = end_together(COMMAND, *words, "--rank-multiple", 64)
    assert [status for status, *_ in ended] == [2, 2]
    said = "".join(noise for _, _, noise in ended)
    assert said.count("--keep 0.7 can't be met") == 1


def test_a_search_runs_in_one_process(monkeypatch, words):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    found = CliRunner().invoke(cli.app, [*map(str, words), "--target-ratio", "1.1"])
    assert found.exit_code == 2
    assert "--target-ratio is searched by one process: run it without torchrun" in found.output
