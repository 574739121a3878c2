"""The workspace's files: kills at any moment, damage of any kind, two processes at once, and the
keys that they are found by. The result is always that of a compression left alone, bit for bit."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import traceback
from dataclasses import fields

import pytest
import torch
from helpers.compressing import assert_same, compressed
from helpers.words import text_of, word_tokenizer
from helpers.zoo import tokens, zoo_model
from safetensors import torch as torchfiles

from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.support import storage

FEW = {"include": ["down_proj"]}  # in two blocks: two files of factors, two of a refit
FILES = 4
KILLED = 9
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def few(folder, **options):
    return compressed(zoo_model("llama"), **FEW | {"cache": folder} | options)[0]


@functools.cache
def undisturbed():
    return few(False)


def files_in(folder):
    return sorted(file for file in folder.rglob("*.safetensors") if file.name[0] != ".")


def in_a_child(work, *given) -> int:
    """Process id of a child that does work(*given); it exits with 1 after an exception, else 0."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's other threads don't outlive the fork.
        try:
            work(*given)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return child


def code_of(child) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(event, folder) -> None:
    """A compression that ends like one killed at an event: 1 is half of the first file written,
    2 all of it, 3 its temporary file renamed, 4 half of the second, and so on."""
    left = [event]
    save_file, replace = torchfiles.save_file, os.replace

    def passed():
        left[0] -= 1
        if not left[0]:
            os._exit(KILLED)

    def saving(tensors, path, metadata):
        save_file(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        passed()
        path.write_bytes(whole)
        passed()

    def replacing(old, new):
        replace(old, new)
        passed()

    torchfiles.save_file, storage.os.replace = saving, replacing
    few(folder)


@needs_fork
def test_killed_at_every_moment(tmp_path):
    """Each run goes on after the kills before it, whose temporary files all lie there."""
    for kill in range(3 * FILES):
        assert code_of(in_a_child(killed_at, 1 + kill % 3, tmp_path)) == KILLED
    assert code_of(in_a_child(killed_at, 1, tmp_path)) == 0  # Nothing is left to write.
    assert len(files_in(tmp_path)) == FILES
    assert len(list(tmp_path.rglob(".*.safetensors"))) == 2 * FILES
    assert_same(few(tmp_path), undisturbed())


@needs_fork
def test_two_at_once(tmp_path):
    children = [in_a_child(few, tmp_path) for _ in range(2)]
    assert [code_of(child) for child in children] == [0, 0]
    assert_same(few(tmp_path), undisturbed())
    assert len(list(tmp_path.rglob("*.safetensors"))) == FILES


# ------------------------------------------------------------------------------------------- damage


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def another_models(file):
    """A whole file of the same layer or block, whose tensors are those of other weights."""
    other = zoo_model("llama", seed=1)
    folder = file.parents[len(file.parts) - file.parts.index("here") - 2].parent / "there"
    compressed(other, **FEW | {"cache": folder})
    (theirs,) = folder.rglob(file.name)
    shutil.copy(theirs, file)


def another_layers(file):
    other = next(f for f in files_in(file.parent) if f != file and f.parent == file.parent)
    shutil.copy(other, file)


DAMAGE = {
    "a flipped bit": flip_a_bit,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "empty": lambda file: file.write_bytes(b""),
    "another layer's": another_layers,
    "another model's": another_models,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_made_again(kind, tmp_path, capsys):
    here = tmp_path / "here"
    few(here)
    factors, refits = files_in(here)[:2], files_in(here)[2:]
    for damaged in ([factors[1]], [refits[0]], [factors[0], refits[1]]):
        for file in damaged:
            DAMAGE[kind](file)
        capsys.readouterr()
        assert_same(few(here), undisturbed())
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(" in the cache is damaged and made again: ")[0] for line in lines] == [
            str(file) for file in damaged
        ]
        assert_same(few(here), undisturbed())
        assert capsys.readouterr().err == ""


def test_stray_files_are_not_read(tmp_path, capsys):
    few(tmp_path)
    (folder,) = tmp_path.rglob("refit-*")
    block = next(iter(folder.iterdir()))
    for name in (".0123456789ab.model.layers.0.safetensors", "model.layers.7.safetensors", "x"):
        (folder / name).write_bytes(block.read_bytes()[:100])
    assert_same(few(tmp_path), undisturbed())
    assert capsys.readouterr().err == ""


def test_a_file_lost_on_the_way_is_named(tmp_path, monkeypatch):
    """Never a block left as it was, and no traceback of KeyError."""
    from hylora_kernels.compression.workspace import Refits

    monkeypatch.setattr(Refits, "find", lambda self, block: None)
    with pytest.raises(OSError, match=r"layers\.0\.safetensors was deleted or damaged while"):
        few(tmp_path)


def test_the_space_of_a_refit_is_checked(tmp_path, monkeypatch):
    few(tmp_path)
    for file in files_in(tmp_path)[2:]:
        file.unlink()
    asked = []
    module = sys.modules["hylora_kernels.compression.compress"]
    monkeypatch.setattr(module, "require_disk", lambda *given: asked.append(given[1:]))
    few(tmp_path)
    written = sum(file.stat().st_size for file in files_in(tmp_path)[2:])
    ((needed, what),) = asked
    assert what == "refitted blocks" and 0.8 * written < needed < written


def test_the_space_for_a_refit_is_counted_from_the_start(tmp_path, monkeypatch):
    module = sys.modules["hylora_kernels.compression.compress"]
    asked = {}
    for refit in (True, False):
        found = asked[refit] = []
        monkeypatch.setattr(module, "require_disk", lambda *given, to=found: to.append(given[1]))
        few(tmp_path / str(refit), refit=refit)
    written = sum(file.stat().st_size for file in files_in(tmp_path / "True"))
    assert asked[True][0] > asked[False][0] and asked[True][0] >= 0.9 * written


def test_a_cache_that_can_not_be_written(tmp_path, monkeypatch):
    """It stops a compression that would keep its work there, and no other."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="HYLORA_CACHE"):
        few(True)
    assert_same(few(False), undisturbed())
    assert_same(few(tmp_path / "elsewhere"), undisturbed())


# --------------------------------------------------------------------------------------------- keys

TEXTS = [text_of(*range(1 + i, 30), *range(1, 1 + i)) for i in range(6)]


class Reversed:
    """A tokenizer with other ids for the same text."""

    def __init__(self):
        self.own = word_tokenizer()

    def __len__(self):
        return len(self.own)

    def __call__(self, text, **options):
        return {"input_ids": self.own(text, **options)["input_ids"][::-1]}


SOME = {"include": ["gate_proj", "down_proj"]}
BASE = SOME | {"tokenizer": word_tokenizer(), "length": 8, "samples": 5}
BASE |= {"calibration": [(TEXTS, None)]}
FACTORS, REFIT, NEITHER = "factors", "refit", "neither"
TARGET = 19_500  # of 21,152 parameters: another keep than 0.7
# A changed option -> the key that changes: of the factors (and so of the refit in their folder), of
# the refit alone, or neither, since the option changes no number in the files.
CHANGES = {
    "keep": (0.5, REFIT),
    "calibration": ([(TEXTS[1:], None)], FACTORS),
    "method": ("whitened", FACTORS),
    "ranks": ("uniform", REFIT),
    "lora_rank": (8, NEITHER),  # The total rank is the same.
    "init": ("classic", REFIT),
    "form": ("pair", REFIT),
    "factorizer": ("exact", FACTORS),
    "refit": (False, NEITHER),
    "rank_multiple": (1, REFIT),
    "include": (["gate_proj"], FACTORS),
    "exclude": (["0.*gate_proj"], FACTORS),
    "count": ("as_is", REFIT),
    "samples": (4, FACTORS),
    "length": (9, FACTORS),
    "refit_samples": (2, REFIT),
    "max_memory": (1, NEITHER),  # Only the order of the work.
    "tokenizer": (Reversed(), FACTORS),
    "device": ("cpu", NEITHER),
    "dtype": (torch.bfloat16, FACTORS),
    "cache": (False, NEITHER),
    "seed": (1, FACTORS),  # It draws the blocks of text.
    "progress": (True, NEITHER),
    "measure": (0, NEITHER),
    "target_params": (TARGET, REFIT),
    "target_mb": (4 * TARGET / 1e6, REFIT),
    "embedding_rank": (4, REFIT),
    "bits": (8, NEITHER),  # What is rounded to 8 bits is the refitted layer.
    "rounding": ("rtn", NEITHER),
    "trust_remote_code": (True, NEITHER),  # What the code makes of a model is in the key itself.
}
CHOOSE_TEXT = {"split", "column"}  # of tables; the tokens that come of them are in the key
BY_RATES = {"target_time"}  # It becomes a keep: test_times.py.
WITH_BITS_ALONE = {"low_rank", "embedding_bits"}  # Codes have files of their own: test_bits.py.


def keys(folder) -> tuple[set[str], set[str]]:
    """The names of the folders of factors, and of those of refits in them."""
    factors = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return factors, {f"{path.parent.name}/{path.name}" for path in folder.glob("*/refit-*")}


def keys_of(folder, **options):
    given = BASE | {"cache": folder} | options
    targeted = any(name.startswith("target_") for name in options)
    keep, ids = given.pop("keep", None if targeted else 0.7), given.pop("calibration")
    compressed(zoo_model("llama"), keep, ids, **given)
    return keys(folder)


@pytest.fixture(scope="module")
def base_keys(tmp_path_factory):
    return keys_of(tmp_path_factory.mktemp("base"))


def test_every_option_is_in_the_table():
    named = set(CHANGES) | CHOOSE_TEXT | BY_RATES | WITH_BITS_ALONE
    assert named == {field.name for field in fields(CompressOptions)}


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_the_key_of_what_it_changes(option, base_keys, tmp_path):
    value, changes = CHANGES[option]
    factors, refits = keys_of(tmp_path, **{option: value})
    if option in ("cache", "refit"):
        assert not refits and factors <= base_keys[0]
    else:
        assert (factors != base_keys[0]) is (changes == FACTORS)
        assert (refits != base_keys[1]) is (changes != NEITHER)


def test_the_lora_rank_is_in_the_key_where_the_refit_leaves_the_adapter_out(tmp_path):
    keys_of(tmp_path, init="classic")
    assert len(keys_of(tmp_path, init="classic", lora_rank=8)[1]) == 2


def test_the_seed_is_in_the_key_where_it_draws_the_factors(tmp_path):
    """ "randomized" draws; the tokens are the same for every seed."""
    for factorizer, count in (("gram", 1), ("randomized", 2)):
        folder = tmp_path / factorizer
        for seed in (0, 1):
            few(folder, factorizer=factorizer, seed=seed, ids=tokens(6, 12))
        assert len(keys(folder)[0]) == count


def test_buffers_that_no_checkpoint_holds_are_in_the_key(tmp_path):
    few(tmp_path)
    model = zoo_model("llama")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    compressed(model, **FEW, cache=tmp_path)
    assert len(keys(tmp_path)[0]) == 2
