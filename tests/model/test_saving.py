"""Saving over what is in a folder: whose files may go, and what a killed process leaves."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys

import pytest
import torch
from helpers.checkpoints import CONFIGS, assert_same, build
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hylora_kernels.compression import calibration
from hylora_kernels.compression.compress import compress
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model import saving
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.load import load_model
from hylora_kernels.model.saving import refuse_unsavable, save_pretrained
from hylora_kernels.support import staging

ALL = os.environ.get("HYLORA_TEST_ALL") == "1"


def tokenizer(word="a"):
    backend = Tokenizer(models.WordLevel({"?": 0, word: 5}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ------------------------------------------------------------------------------- whose files may go


def test_a_dense_model_is_never_overwritten(tmp_path):
    build(rank=0).save_pretrained(tmp_path, max_shard_size="20KB")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds a model that hylora_kernels didn't save"):
            save_pretrained(build(), tmp_path, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "small.gguf",
        "config.json",
        "generation_config.json",
    ],
)
def test_files_of_others_need_overwrite(name, tmp_path):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=f"holds {name}, which .* overwrite=True"):
        save_pretrained(build(), tmp_path)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "theirs"
    save_pretrained(build(), tmp_path, overwrite=True)
    load_pretrained(tmp_path)
    # Other weights of these names would be taken for the model's.
    assert not (tmp_path / "model-00001-of-00003.safetensors").exists()
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_the_state_of_a_training_is_no_model(tmp_path):
    """The processes of a Trainer write theirs before the first one has saved the model."""
    state = ("optimizer.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin")
    for name in state:
        (tmp_path / name).write_text("theirs")
    save_pretrained(build(), tmp_path)
    load_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == "theirs" for name in state)


def test_weights_of_others_beside_a_saved_model_stay(tmp_path):
    save_pretrained(build(), tmp_path)
    theirs = tmp_path / "model-00001-of-00002.safetensors"
    theirs.write_text("theirs")
    save_pretrained(build(rank=4), tmp_path)
    with pytest.raises(ValueError, match="holds model-00001-of-00002"):
        save_pretrained(build(rank=4), tmp_path, max_shard_size="40KB")
    assert theirs.read_text() == "theirs"
    load_pretrained(tmp_path)


def test_a_tokenizer_goes_with_the_model_it_was_saved_with(tmp_path):
    save_pretrained(build(), tmp_path, tokenizer())
    assert load_model(tmp_path, "cpu")[1]("a")["input_ids"] == [5]
    (tmp_path / "notes.json").write_text("mine")
    save_pretrained(build(), tmp_path)
    assert names(tmp_path) == [
        *("config.json", "generation_config.json", "model.safetensors", "notes.json")
    ]
    # A tokenizer that its own save_pretrained put there is not this package's.
    tokenizer().save_pretrained(tmp_path)
    save_pretrained(build(), tmp_path)
    assert load_model(tmp_path, "cpu")[1]("a")["input_ids"] == [5]
    save_pretrained(build(), tmp_path, tokenizer("b"))
    assert load_model(tmp_path, "cpu")[1]("b")["input_ids"] == [5]


def test_names_that_lead_out_of_the_folder_are_left(tmp_path):
    """config.json lists the files that the next save removes; it may be a stranger's."""
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "model"
    save_pretrained(build(), folder)
    config = json.loads((folder / "config.json").read_text())
    listed = config["quantization_config"]["files"]
    (folder / "link").symlink_to(tmp_path)
    listed += ["../mine.txt", str(tmp_path / "mine.txt"), "link/mine.txt", "..", ".", "", 3]
    (folder / "config.json").write_text(json.dumps(config))
    save_pretrained(build(), folder)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --------------------------------------------------------------------- refused before the long work


def test_compress_refuses_at_its_start_what_could_not_be_saved(monkeypatch):
    class Mine(LlamaForCausalLM):
        pass

    def reach(*_):
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(calibration, "gather", reach)
    ids = torch.zeros(2, 8, dtype=torch.long)
    unknown = Mine(CONFIGS["llama"]).eval()
    odd = build(rank=0)
    odd.config.function = print
    for model, message in (
        (unknown, "transformers knows no model class 'Mine'"),
        (odd, "not JSON serializable"),
    ):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises((ValueError, TypeError), match=message):
            compress(model, keep=0.8, calibration=ids, lora_rank=2, rank_multiple=1, cache=False)
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_tokenizer_that_can_not_be_saved_is_refused_as_well():
    class Broken(PreTrainedTokenizerFast):
        def save_pretrained(self, *_, **__):
            raise ValueError("this tokenizer has no file of words")

    model, made = build(), tokenizer()
    refuse_unsavable(model, made)
    with pytest.raises(ValueError, match="no file of words"):
        refuse_unsavable(model, Broken(tokenizer_object=made.backend_tokenizer))


def test_compress_warns_of_a_model_that_was_modified(caplog):
    model = build(rank=0)
    model.model.layers[0].mlp.down_proj = nn.Linear(48, 32, bias=True)
    ids = torch.zeros(2, 8, dtype=torch.long)
    compress(model, 0.9, ids, method="svd", refit=False, lora_rank=2, cache=False)
    assert "can be used, but not saved: model: 'model.layers.0.mlp.down_proj.bias'" in caplog.text
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj\.\w+' is"):
        refuse_unsavable(model)


# ----------------------------------------------------------------------- where the folder may stand


def test_links_slashes_and_the_working_folder(tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    for place in (tmp_path / "link", f"{real}/", ".", real / ".." / "real"):
        model = build()
        save_pretrained(model, place)
        assert_same(load_pretrained(place), model)
        assert names(real) == ["config.json", "generation_config.json", "model.safetensors"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        save_pretrained(build(), tmp_path / "nowhere")


def test_a_file_system_without_links_or_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    for rank in (8, 4):
        model = build(rank=rank)
        save_pretrained(model, tmp_path)
        assert_same(load_pretrained(tmp_path), model)
    assert names(tmp_path) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_have_the_permissions_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        save_pretrained(build(), tmp_path / "m", tokenizer(), max_shard_size="40KB")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert modes == {0o666 & ~umask}
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~umask


def test_saves_at_once_are_done_one_after_the_other(tmp_path):
    made = {rank: build(rank=rank) for rank in (2, 4, 8)}
    children = [fork(lambda m=model: save_pretrained(m, tmp_path)) for model in made.values()]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert names(tmp_path) == ["config.json", "generation_config.json", "model.safetensors"]
    loaded = load_pretrained(tmp_path)
    rank = next(m.rank for m in loaded.modules() if isinstance(m, SVDLoRALinear))
    assert_same(loaded, made[rank])


# -------------------------------------------------------------- killed, interrupted, out of space


def fork(action):
    """The process id of a child that runs `action`, and ends with 1 if that raises."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


FILE_EVENTS = ("open", *(f"os.{verb}" for verb in ["rename", "remove", "mkdir", "rmdir", "link"]))


STOPS = {"killed": None, "full": OSError(errno.ENOSPC, "full"), "interrupted": KeyboardInterrupt()}


def stops_at(stop_at, how, action):
    """Run `action` in a child that is stopped at its `stop_at`-th step; False if it ended before.

    A step is what Python tells audit hooks about files (FILE_EVENTS), an fsync, or a file of
    weights that is half written.
    """
    fsync, save_file = os.fsync, saving.save_file
    steps = itertools.count(1)

    def step():
        if next(steps) == stop_at:
            if STOPS[how] is None:
                os._exit(9)
            raise STOPS[how]

    def save_half(tensors, file, **others):
        save_file(tensors, file, **others)
        os.truncate(file, os.path.getsize(file) // 2)
        step()
        save_file(tensors, file, **others)

    def watched():
        sys.addaudithook(lambda event, _: event in FILE_EVENTS and step())
        os.fsync = lambda descriptor: (step(), fsync(descriptor))
        saving.save_file = save_half
        action()

    code = os.waitstatus_to_exitcode(os.waitpid(fork(watched), 0)[1])
    return code != 0


def state_of(folder):
    """The tensors and the tokenizer of a saved model; None if there is none."""
    if not folder.exists() or not {"config.json", staging.DECIDED} & set(os.listdir(folder)):
        return None
    model, found = load_model(folder, "cpu")
    tensors = {name: tensor.sum().item() for name, tensor in model.state_dict().items()}
    return tensors, found and found.get_vocab()


SAVES = {
    "fresh": (None, {}),
    "over an older one": ({}, {}),
    "over one with a tokenizer": ({"tokenizer": tokenizer()}, {}),
    "a tokenizer": ({"tokenizer": tokenizer()}, {"tokenizer": tokenizer("b")}),
    "shards over one file": ({}, {"max_shard_size": "40KB"}),
    "one file over shards": ({"max_shard_size": "40KB"}, {}),
    "shards over shards": ({"max_shard_size": "20KB"}, {"max_shard_size": "40KB"}),
}


FEW = [("killed", "fresh"), ("killed", "over one with a tokenizer"), ("full", "over an older one")]


@pytest.mark.parametrize(("how", "name"), itertools.product(STOPS, SAVES) if ALL else FEW)
def test_a_stop_at_any_step_leaves_the_old_or_the_new(how, name, tmp_path):
    old, new = SAVES[name]
    start, folder, again = (tmp_path / name for name in ("start", "model", "again"))
    start.mkdir()
    if old is not None:
        save_pretrained(build(rank=8), start, **old)
    model = build(rank=4)
    save_pretrained(model, again, **new)
    before, wanted = state_of(start), state_of(again)
    seen, stop_at, stopped = set(), 0, True
    while stopped or stop_at < 50:  # An error may be caught: a link that fails is made a copy.
        stop_at += 1 if ALL else 7
        shutil.copytree(start, folder)
        stopped = stops_at(stop_at, how, lambda: save_pretrained(model, folder, **new))
        found = state_of(folder)
        assert found in (before, wanted), stop_at
        seen.add(found == wanted)
        save_pretrained(model, folder, **new)  # It can be repeated, and clears up.
        assert names(folder) == names(again), stop_at
        assert state_of(folder) == wanted
        shutil.rmtree(folder)
    assert seen == {True, False}
