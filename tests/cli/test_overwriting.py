"""--out: which folders a command writes to, and what is asked before its work."""

from __future__ import annotations

import pytest
from helpers import tiny
from typer.testing import CliRunner

from hylora_kernels.cli import main as cli
from hylora_kernels.model.load import load_model

OPTIONS = [
    *("--method", "svd", "--no-refit", "--no-cache"),
    *("--keep", "0.8", "--lora-rank", "2", "--rank-multiple", "1"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny.llama(vocab_size=tiny.WORDS + 256).save_pretrained(folder, max_shard_size="20KB")
    return folder


def compress(dense, out, *flags):
    words = ["compress", dense, "--out", out, *OPTIONS, *flags]
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_another_programs_model_is_never_overwritten(dense, tmp_path):
    tiny.llama().save_pretrained(tmp_path, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for flags in ((), ("--overwrite",)):
        found = compress(dense, tmp_path, *flags)
        assert found.exit_code == 2
        assert f"--out '{tmp_path}' holds a model that hylora_kernels didn't save" in found.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_others_need_the_flag(dense, tmp_path):
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_text("theirs")
    found = compress(dense, tmp_path)
    assert found.exit_code == 2 and f"holds {shard.name}" in found.output
    assert "give another folder, or --overwrite" in found.output
    assert shard.read_text() == "theirs"
    assert compress(dense, tmp_path, "--overwrite").exit_code == 0
    load_model(tmp_path, "cpu")


def test_a_model_of_this_package_is_replaced_and_a_killed_save_is_repeated(dense, tmp_path):
    (tmp_path / ".saving-0123456789ab").mkdir()  # All that a killed first save leaves.
    for _ in range(2):
        found = compress(dense, tmp_path)
        assert found.exit_code == 0, found.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("compress.json", "config.json", "generation_config.json", "model.safetensors"),
        "run.yaml",
    ]
