"""The options of the commands against the dataclasses of the library, and how they are read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hylora_kernels.cli import main, options
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.experiments.options import SweepOptions, TargetOptions
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.support.options import describe_option

COMMANDS = typer.main.get_command(main.app).commands

# verb -> (dataclass, its fields that are no options of the command, the command's own parameters)
EVERY = {"model", "device", "dtype", "revision", "tokenizer", "json_path", "config", "debug"}
LIBRARY = {
    "compress": (
        TargetOptions,
        {"tokenizer", "device", "dtype", "refit_samples", "progress", "output_dir", "target_ratio"},
        EVERY | {"out", "overwrite", "png", "target_ratio", "by_block"},
    ),
    "finetune": (
        FinetuneOptions,
        {"tokenizer", "output_dir", "progress", "on_step"},
        EVERY | {"out", "overwrite", "trust_remote_code"},
    ),
    "sweep": (
        SweepOptions,
        {"output_dir", "tokenizer", "device", "dtype", "revision", "progress"}
        | {"init", "count", "refit_samples", "cache"},
        EVERY | {"out"},
    ),
}


@pytest.mark.parametrize("verb", LIBRARY)
def test_a_command_has_the_librarys_options_with_its_defaults_and_help(verb):
    source, hidden, own = LIBRARY[verb]
    shown = {param.name: param for param in COMMANDS[verb].params}
    fields = {field.name: field for field in dataclasses.fields(source)}
    assert hidden < fields.keys()
    assert shown.keys() - own == fields.keys() - hidden
    for name in shown.keys() - own:
        default = fields[name].default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        elif isinstance(default, str) and shown[name].multiple:
            default = [default]
        assert shown[name].default == default, name
        assert shown[name].help.startswith(describe_option(fields[name])), name


def test_analyze_has_the_options_of_compress_that_it_needs():
    shown = {param.name: param for param in COMMANDS["analyze"].params}
    fields = {field.name: field for field in dataclasses.fields(CompressOptions)}
    common = {"include", "exclude", "calibration", "split", "column", "samples", "length", "seed"}
    assert shown.keys() == common | EVERY | {"method", "png", "lora", "trust_remote_code"}
    assert all(shown[name].default == fields[name].default for name in common)


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("compress", {"--refit", "--no-refit", "--cache", "--no-cache"}),
        ("finetune", {"--merge", "--no-merge", "--resume", "--restart"}),
        ("finetune", {"--gradient-checkpointing"}),
        ("sweep", {"--refit", "--no-refit"}),
    ],
)
def test_flags(verb, flags):
    known = {o for p in COMMANDS[verb].params for o in (*p.opts, *p.secondary_opts)}
    assert flags <= known and "--no-gradient-checkpointing" not in known


def test_importing_the_command_line_imports_nothing_heavy():
    code = "import hylora_kernels.cli.main, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"transformers", "accelerate", "datasets", "matplotlib"}


# ------------------------------------------------------------------------------------------ reading


def given(*words: str) -> dict:
    """The options that a command gets for these words."""
    caught = {}

    @options.library_options(CompressOptions, only=("ranks", "max_memory", "include", "method"))
    def compress(*, options: dict) -> None:
        caught.update(options)

    @options.library_options(SweepOptions, only=("keep", "lora_rank", "rank"))
    def sweep(*, options: dict) -> None:
        caught.update(options)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(compress)
    app.command()(sweep)
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return caught


def test_a_command_gets_the_librarys_types():
    assert given("compress") == {
        "method": "two_sided",
        "ranks": "global",
        "include": None,
        "max_memory": None,
    }
    words = ("--ranks", '{"mlp": 0.5}', "--max-memory", "4GB", "--include", "a", "--include", "b")
    assert given("compress", *words) == {
        "method": "two_sided",
        "ranks": {"mlp": 0.5},
        "include": ["a", "b"],
        "max_memory": 4 * 10**9,
    }
    assert given("sweep") == {"keep": [0.9, 0.8, 0.6], "lora_rank": [0, 16, 64], "rank": None}
    assert given("sweep", "--keep", "1", "--rank", "8,4") == {
        "keep": [1.0],
        "lora_rank": [0, 16, 64],
        "rank": [8, 4],
    }


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("target_mb", "80", 80),
        ("target_mb", "80MB", 80),
        ("target_mb", "0.5 GB", 500),
        ("target_mb", "1MiB", 1.048576),
        ("target_params", "100M", 10**8),
        ("target_params", "1.5b", 15 * 10**8),
        ("target_params", "1234", 1234),
        ("max_memory", "4GB", 4 * 10**9),
        ("max_memory", "512 MiB", 2**29),
        ("max_memory", "1.5gb", 15 * 10**8),
        ("max_memory", "100", 100),
        ("embedding_rank", "256", 256),
        ("embedding_rank", "auto", "auto"),
    ],
)
def test_quantities_may_have_a_unit(name, text, number):
    _, read = options.QUANTITIES[name]
    assert read(text, name) == number


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("target_mb", "80 apples", "--target-mb must be a size such as 80MB .*got '80 apples'"),
        ("target_mb", "MB", "--target-mb must be a size .*got 'MB'"),
        ("target_params", "100MB", "--target-params must be a number such as 100M .*got '100MB'"),
        ("embedding_rank", "half", "--embedding-rank must be a whole number or auto, got 'half'"),
    ],
)
def test_a_quantity_that_can_not_be_read_is_named(name, text, message):
    with pytest.raises(ValueError, match=message):
        options.QUANTITIES[name][1](text, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("compress", "--method", "best"),
            r"method must be one of \('two_sided', 'whitened', 'svd'\), got 'best'",
        ),
        (("compress", "--ranks", "{oops"), "--ranks is no valid JSON"),
        (("compress", "--max-memory", "much"), "--max-memory must be a size .*got 'much'"),
        (("sweep", "--keep", "0.8,low"), "--keep must be numbers .*got '0.8,low'"),
        (("sweep", "--lora-rank", "0.5"), "--lora-rank must be whole numbers .*got '0.5'"),
    ],
)
def test_an_option_that_is_not_allowed_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        given(*words)


def test_texts_are_named_with_commas_or_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.txt").touch()
    found = options.read_texts(["brown, self", "a,b.txt", "c,d.txt"])
    assert found == ["brown", "self", "a,b.txt", "c", "d.txt"]
    assert options.read_texts([]) is None


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], None),
        (["my.txt"], "my.txt"),
        (["org/name:config"], "org/name:config"),
        (["my.txt:128"], [("my.txt", 128)]),
        (["my.txt,self,stdlib"], [("my.txt", None), ("self", None), ("stdlib", None)]),
        (["my.txt:128", "self:64"], [("my.txt", 128), ("self", 64)]),
        (["org/name:config:9, self"], [("org/name:config", 9), ("self", None)]),
        (["a,b.txt"], "a,b.txt"),
        (["a,b:7.txt,self:3"], [("a", None), ("b:7.txt", None), ("self", 3)]),
        (["c:12"], "c:12"),
        (["c:12:5,c"], [("c:12", 5), ("c", None)]),
        (["self:2,a,b.txt:3,d"], [("self", 2), ("a,b.txt", 3), ("d", None)]),
        (["a.txt:0"], [("a.txt", 0)]),  # The library refuses it.
    ],
)
def test_a_mix_is_written_with_commas_and_numbers(words, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c:12"):
        (tmp_path / name).touch()
    assert options.read_mix(words) == wanted


def test_ranks_are_a_name_or_json():
    assert options.read_ranks("global") == "global"
    assert options.read_ranks('{"mlp": 0.5, "q_proj": 64}') == {"mlp": 0.5, "q_proj": 64}


def test_a_models_folder_may_be_written_again_and_another_may_not(tmp_path: Path):
    options.refuse_foreign_folder(tmp_path / "new", "model")
    options.refuse_foreign_folder(tmp_path, "model")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="files in it that are no model's"):
        options.refuse_foreign_folder(tmp_path, "model")
    options.refuse_foreign_folder(tmp_path, "model", mark="letter.txt")
    options.refuse_foreign_folder(tmp_path, "model", overwrite=True)
    with pytest.raises(ValueError, match="give another folder, or --overwrite"):
        options.refuse_foreign_folder(tmp_path, "model", overwrite=False)
    ours = {"quant_method": "hylora", "files": ["config.json"]}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": ours}))
    options.refuse_foreign_folder(tmp_path, "model")
    config.write_text("{}")  # another program's model
    for arguments in ({}, {"mark": "letter.txt"}, {"overwrite": True}):
        with pytest.raises(ValueError, match="holds a model that hylora_kernels didn't save"):
            options.refuse_foreign_folder(tmp_path, "model", **arguments)


def test_what_a_killed_save_left_is_no_objection(tmp_path: Path):
    (tmp_path / ".saving-0123456789ab").mkdir()
    options.refuse_foreign_folder(tmp_path, "model")
