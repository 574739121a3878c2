"""Commands that torchrun starts in several processes."""

from __future__ import annotations

import json

import pytest
from helpers import tiny
from helpers.processes import run_together
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
    alone = CliRunner().invoke(cli.app, [*map(str, [*words, tmp_path / "one"]), "--batch", "2"])
    assert alone.exit_code == 0, alone.output
    reports = [json.loads((tmp_path / n / "finetune.json").read_text()) for n in ("one", "two")]
    assert reports[1]["losses"] == pytest.approx(reports[0]["losses"], rel=1e-3)


def test_other_commands_run_in_one_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(cli.app, ["info"])
    assert found.exit_code == 2
    assert "info runs in one process, without torchrun" in found.output
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert CliRunner().invoke(cli.app, ["cache"]).exit_code == 0
