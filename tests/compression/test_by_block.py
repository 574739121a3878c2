"""Compression block by block is that of the whole model, bit for bit, in one block's memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import tiny
from helpers.compressing import IDS, SMALL, Interrupted, assert_same, compressed, interrupt_after
from helpers.mixtures import mixture
from helpers.zoo import tokens, zoo_model

from hylora_kernels import compress, compress_to_folder, load_model, load_pretrained
from hylora_kernels.compression.calibration import gather_in_passes
from hylora_kernels.compression.compress import Compression
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.workspace import Refits, Workspace
from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.modules import model_fingerprint
from hylora_kernels.support.cache import Files

ALL = os.environ.get("HYLORA_TEST_ALL") == "1"
# Of the loss alone eight sequences run at once.
NOT_EQUAL = ("seconds", "peak_rss", "loss", "dense_loss", "options")


@pytest.fixture
def dense(tmp_path):
    """A folder with the dense model of a name of the zoo, or the one given."""

    def folder(model):
        model = zoo_model(model) if isinstance(model, str) else model
        model.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return folder


def by_block(folder, out, keep=0.7, ids=IDS, **options):
    """(the compressed model from its folder, the report, the model that reads its blocks there)."""
    model, _ = load_model(folder, "cpu", by_block=True)
    given = {"keep": keep, "calibration": ids, "cache": False} | SMALL | options
    report = compress_to_folder(model, out, **given)
    return load_pretrained(out), report, model


def assert_as_in_memory(folder, out, ids=IDS, **options):
    options["ids"] = ids
    whole, report = compressed(load_model(folder, "cpu")[0], **options)
    found, other, model = by_block(folder, out, **options)
    assert_same(whole, found)
    a, b = report.to_dict(), other.to_dict()
    assert {n: v for n, v in a.items() if n not in NOT_EQUAL} == {
        n: v for n, v in b.items() if n not in NOT_EQUAL
    }
    assert (other.loss is None) == (report.loss is None)
    assert report.loss is None or other.loss == pytest.approx(report.loss, rel=1e-3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, found(ids).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2", "opt", "gemma3", "mistral"])
def test_architectures(name, dense, tmp_path):
    assert_as_in_memory(dense(name), tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "whitened"},
        {"method": "svd"},
        {"refit": False, "form": "pair"},
        {"max_memory": 1},
        {"embedding_rank": 8},
        {"init": "classic", "count": "as_is"},
        {"include": [r"layers\.1\."], "keep": 0.6},
        {"keep": None, "bits": 4, "low_rank": False},
        {"keep": None, "bits": "auto", "target_mb": 0.05, "measure": 0},
        {"bits": 8},
    ],
    ids=str,
)
def test_options(options, dense, tmp_path):
    if options.get("measure") == 0:
        whole, _ = compressed(load_model(folder := dense("llama"), "cpu")[0], **options)
        return assert_same(whole, by_block(folder, tmp_path / "out", **options)[0])
    assert_as_in_memory(dense("llama"), tmp_path / "out", **options)


def test_bfloat16(dense, tmp_path):
    model = tiny.llama(torch.bfloat16, num_hidden_layers=5)
    assert_as_in_memory(dense(model), tmp_path / "out", ids=tiny.tokens(6, 12))


def test_one_block_is_in_memory(dense, tmp_path):
    """Counted in each step's consumer, and in every forward of a linear."""
    folder = dense(tiny.llama(num_hidden_layers=6))
    model, _ = load_model(folder, "cpu", by_block=True)
    blocks, most = model.model.layers, 0

    def count(*_):
        nonlocal most
        most = max(most, sum(not block.mlp.up_proj.weight.is_meta for block in blocks))

    for block in blocks:
        block.mlp.up_proj.register_forward_hook(count)
    ids = tiny.tokens(6, 12)
    options = CompressOptions(keep=0.7, calibration=ids, **SMALL, cache=tmp_path / "cache")
    with Compression(model, options) as run:
        for statistics in run.calibrate():
            count()
            assert len({path.split(".")[2] for path in statistics.gradients}) == 1
            run.factorize(statistics)
        run.refit(run.allocate())
    assert most == 1
    assert all(block.mlp.up_proj.weight.is_meta for block in blocks)


def test_fingerprint_and_workspace_are_those_of_the_whole_model(dense, tmp_path):
    folder = dense("llama")
    whole, stored = load_model(folder, "cpu")[0], load_model(folder, "cpu", by_block=True)[0]
    assert model_fingerprint(whole) == model_fingerprint(stored)
    compressed(whole, cache=tmp_path / "cache", refit=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "save", None)  # All factors are there.
        by_block(folder, tmp_path / "out", cache=tmp_path / "cache", refit=False)


TOKENS_TOO = {"embedding_rank": 8}  # A table whose statistics stand in front and behind.


class TestInterrupted:
    """An error at each kind of file that is written; the same call then does the rest alone."""

    @pytest.mark.parametrize(
        ("kind", "count"),
        [(Files, n) for n in (0, 5, 8, 13, 17, 23, 30, 36)]
        + [(Workspace, 0), (Workspace, 4), (Workspace, 9), (Refits, 0), (Refits, 1)],
    )
    def test_goes_on(self, kind, count, dense, tmp_path, monkeypatch):
        folder, options = dense("llama"), TOKENS_TOO | {"cache": tmp_path / "cache"}
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_after(patch, kind, count)
            by_block(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out" / "config.json").exists()
        whole, _ = compressed(load_model(folder, "cpu")[0], **TOKENS_TOO)
        assert_same(whole, by_block(folder, tmp_path / "out", **options)[0])
        assert not list((tmp_path / "cache").rglob("hidden-*"))

    def test_finished_blocks_are_not_run_again(self, dense, tmp_path, monkeypatch):
        folder, options = dense("llama"), {"cache": tmp_path / "cache", "refit": False}
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_after(patch, Workspace, 7)  # The linears of the last of two blocks.
            by_block(folder, tmp_path / "out", **options)
        saved, original = [], Files.save

        def save(self, part, tensors):
            saved.append(part)
            original(self, part, tensors)

        monkeypatch.setattr(Files, "save", save)
        by_block(folder, tmp_path / "out", **options)
        states = [part for part in saved if part.startswith(("hidden", "gradient"))]
        assert states == [f"gradient-0-{i}" for i in range(len(IDS))]

    def test_while_writing_the_folder(self, dense, tmp_path, monkeypatch):
        folder, options = dense("llama"), {"cache": tmp_path / "cache"}
        by_block(folder, tmp_path / "out", keep=0.8, **options)
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            calls = []

            def written(*_args):
                calls.append(None)
                if len(calls) == 2:
                    raise Interrupted
                return original(*_args)

            original = patch_target("hylora_kernels.model.saving")._write_file
            patch.setattr("hylora_kernels.model.saving._write_file", written)
            by_block(folder, tmp_path / "out", keep=0.6, **options)
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
        whole, _ = compressed(load_model(folder, "cpu")[0], keep=0.6)
        assert_same(whole, by_block(folder, tmp_path / "out", keep=0.6, **options)[0])


def patch_target(name):
    return sys.modules[name]


@pytest.mark.skipif(not ALL, reason="HYLORA_TEST_ALL=1 kills ten processes")
def test_killed_at_ten_moments(dense, tmp_path):
    folder = dense(tiny.llama(num_hidden_layers=6, vocab_size=tiny.WORDS + 256))
    text = " ".join(f"a{i} walked b{i * i} home" for i in range(2000))
    tiny.tokenizer(text).save_pretrained(folder)
    (tmp_path / "text.txt").write_text(text)

    def command(out, cache):
        words = ["compress", folder, "--out", out, "--by-block", "--keep", "0.7"]
        words += ["--calibration", tmp_path / "text.txt", "--samples", "24", "--length", "48"]
        words += ["--rank-multiple", "4", "--lora-rank", "4", "--measure", "2", "--device", "cpu"]
        environment = os.environ | {"HYLORA_CACHE": str(cache)}
        start = [sys.executable, "-m", "hylora_kernels", *map(str, words)]
        return subprocess.Popen(start, env=environment, stderr=subprocess.PIPE)

    begun = time.monotonic()
    whole = command(tmp_path / "whole", tmp_path / "cache-whole")
    assert whole.communicate()[0] is None and whole.returncode == 0
    seconds, kills = time.monotonic() - begun, 0
    for share in (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.85, 0.95):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = command(tmp_path / "out", tmp_path / "cache")
        time.sleep(share * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        again = command(tmp_path / "out", tmp_path / "cache")
        assert again.communicate() and again.returncode == 0
        assert_same(load_pretrained(tmp_path / "whole"), load_pretrained(tmp_path / "out"))
    assert kills >= 8


class TestRefused:
    def test_names_of_other_tensors(self, tmp_path):
        folder = tmp_path / "dense"
        mixture("mixtral").save_pretrained(
            folder
        )  # transformers stacks its experts in memory alone.
        with pytest.raises(CheckpointError, match=r"experts.* missing .* names that the model"):
            load_model(folder, "cpu", by_block=True)
        zoo_model("gpt_neox").save_pretrained(tmp_path / "neox")  # Its head has another name.
        with pytest.raises(CheckpointError, match=r"lm_head.* missing .* names that the model"):
            load_model(tmp_path / "neox", "cpu", by_block=True)

    def test_a_compressed_model(self, tmp_path):
        model, _ = compressed(zoo_model("llama"))
        model.save_pretrained(tmp_path / "small")
        with pytest.raises(CheckpointError, match="the model is compressed"):
            load_model(tmp_path / "small", "cpu", by_block=True)

    def test_a_file_that_is_cut_off(self, dense):
        folder = dense("llama")
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
            load_model(folder, "cpu", by_block=True)

    def test_a_linear_outside_of_the_blocks(self, dense, tmp_path):
        with pytest.raises(ValueError, match="lm_head is in none of the blocks"):
            by_block(dense("qwen2"), tmp_path / "out", include=["lm_head", "layers"])

    def test_own_text(self, dense, tmp_path):
        with pytest.raises(ValueError, match="calibration 'self' can't be written block by block"):
            by_block(dense("llama"), tmp_path / "out", ids="self")

    def test_compress(self, dense):
        model, _ = load_model(dense("llama"), "cpu", by_block=True)
        with pytest.raises(ValueError, match=r"compress_to_folder\(\) takes it"):
            compress(model, calibration=IDS)

    def test_a_model_in_memory(self, dense, tmp_path):
        model, _ = load_model(dense("llama"), "cpu")
        with pytest.raises(ValueError, match=r"by_block=True\) opened: compress\(\) takes one"):
            compress_to_folder(model, tmp_path / "out", calibration=IDS)
        assert not (tmp_path / "out").exists()

    def test_another_programs_model(self, dense, tmp_path, monkeypatch):
        folder = dense("llama")
        monkeypatch.setattr(Compression, "__init__", None)  # Before any work.
        with pytest.raises(ValueError, match="hylora_kernels didn't save"):
            by_block(folder, folder)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"

    def test_not_finite(self, dense, tmp_path):
        model = zoo_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
        with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj"):
            by_block(dense(model), tmp_path / "out")


def test_own_text_is_left_out_of_the_default(dense, tmp_path, capsys, monkeypatch):
    folder = dense(tiny.llama(vocab_size=tiny.WORDS + 256))
    text = " ".join(f"a{i} walked b{i * i} home" for i in range(400))
    tokenizer = tiny.tokenizer(text)
    options = {"tokenizer": tokenizer, "length": 12, "samples": 4, "measure": 0}
    (tmp_path / "text.txt").write_text(text)
    _, report, _ = by_block(folder, tmp_path / "out", ids=str(tmp_path / "text.txt"), **options)
    assert report.sources[0].name.startswith(str(tmp_path / "text.txt"))
    assert len(report.sources) == 2 and report.sources[1].name.startswith("stdlib")
    assert "self: left out" in capsys.readouterr().err


def test_the_passes_of_a_whole_model_are_split_by_memory():
    model = zoo_model("llama")
    with Compression(model, CompressOptions(calibration=tokens(2, 8), cache=False)) as run:
        groups = run.structure.groups
        runs = [
            len(s.groups) for s in gather_in_passes(model, tokens(2, 8), groups, True, 1, False)
        ]
        assert runs == [1] * len(groups)
