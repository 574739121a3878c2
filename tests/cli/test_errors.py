"""Errors as one line in the words of the command line, and exit codes of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from hylora_kernels.cli import errors
from hylora_kernels.cli import main as cli

COMMANDS = typer.main.get_command(cli.app).commands


def in_words_of(verb: str, text: str) -> str:
    return errors.one_line(ValueError(text), COMMANDS[verb].params)


@pytest.mark.parametrize(
    ("verb", "library", "command_line"),
    [
        ("compress", "keep must be in (0, 1], got 2", "--keep must be in (0, 1], got 2"),
        ("compress", "lora_rank must be an int", "--lora-rank must be an int"),
        ("compress", "got 'svd': set refit=False", "got 'svd': set --no-refit"),
        ("compress", "data 'a.txt' does not exist", "--calibration 'a.txt' does not exist"),
        ("compress", "name one with column='b'", "name one with --column 'b'"),
        ("compress", "ranks: pattern 'mpl' matches", "--ranks: pattern 'mpl' matches"),
        ("finetune", "set resume=False to start anew", "set --restart to start anew"),
        ("finetune", "give resume=True", "give --resume"),
        ("finetune", "save_every=3 needs an output_dir to", "--save-every 3 needs an --out to"),
        ("finetune", "warmup must be at most steps=4", "--warmup must be at most --steps 4"),
        ("finetune", "distill > 0, got distill=0.5 and", "--distill > 0, got --distill 0.5 and"),
        ("evaluate", "name_or_path 'x/y' does not exist", "MODEL 'x/y' does not exist"),
        ("evaluate", "blocks must hold token ids in", "--data must hold token ids in"),
        ("evaluate", "data has 7 tokens: take length=7", "--data has 7 tokens: take --length 7"),
        ("generate", "prompt and max_new_tokens=64 are", "PROMPT and --max-new-tokens 64 are"),
        ("generate", "chat needs a tokenizer", "--chat needs a tokenizer"),
        ("sweep", "keep (or rank) and lora_rank must", "--keep (or rank) and --lora-rank must"),
        # Words of a sentence and parts of a path stay.
        ("compress", "model has no linear", "MODEL has no linear"),
        ("compress", "layer x: seed of data", "layer x: seed of data"),
        ("finetune", "the file lora_rank/save_every.txt", "the file lora_rank/save_every.txt"),
        ("finetune", "no /data/lora_rank here", "no /data/lora_rank here"),
    ],
)  # fmt: skip
def test_the_librarys_arguments_are_said_as_flags(verb, library, command_line):
    assert in_words_of(verb, library) == command_line


def test_the_words_for_a_parameter_and_its_opposite():
    found = errors.flags_of(COMMANDS["finetune"].params)
    assert found["model"] == ("DIR", "")
    assert found["resume"] == ("--resume", "--restart")
    assert found["gradient_checkpointing"] == ("--gradient-checkpointing", "")
    assert found["json_path"] == ("--json", "")


# ------------------------------------------------------------------------- expected and unexpected

EXPECTED = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device"),
    ImportError("cannot import name 'x'"),
    ModuleNotFoundError("No module named 'gguf'"),
    RuntimeError("PytorchStreamReader failed"),
    EOFError("Compressed file ended early"),
    StopIteration(),
    IndexError("index out of range in self"),
    MemoryError(),
    OverflowError("int too large"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    FloatingPointError("loss is nan"),
    RecursionError("maximum recursion depth exceeded"),
]


def failing(error: BaseException) -> typer.Typer:
    def verb() -> None:
        """Fail."""
        raise error

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(cli.guarded(verb, "Kept."))
    return app


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_an_expected_error_is_one_line(error):
    result = CliRunner().invoke(failing(error), [])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and len(line) > len("error: ")
    assert str(error) in line and "Traceback" not in result.output
    if not isinstance(error, errors.SPOKEN) or not str(error):
        assert type(error).__name__ in line and "--debug" in line
    if isinstance(error, EOFError):
        return  # typer takes it for the end of its own input
    debugged = CliRunner().invoke(failing(error), ["--debug"])
    assert debugged.exit_code != 2 and type(debugged.exception) is not SystemExit


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("x"), AssertionError("x")])
def test_a_bug_keeps_its_traceback(error):
    assert CliRunner().invoke(failing(error), []).exception is error


def hylora(*words: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hylora_kernels", *map(str, words)],
        capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def raising(error: str) -> subprocess.CompletedProcess:
    """`hylora info`, in which `error` is raised."""
    code = (
        "import sys\nfrom hylora_kernels.cli import main\nfrom hylora_kernels.machine import info\n"
        f"def fail(): raise {error}\ninfo.info = fail\nsys.argv = ['hylora', 'info']\nmain.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        ("OSError(28, 'No space left on device')", 2, "error: [Errno 28] No space left on device"),
        ("MemoryError()", 2, "error: MemoryError (--debug shows where)"),
        ("KeyboardInterrupt()", 130, "interrupted. Nothing was written."),
        ("KeyError('x')", 1, "KeyError: 'x'"),
    ],
)
def test_exit_codes_of_a_process(error, code, last):
    done = raising(error)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, last)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_the_reader_of_stdout_may_end_early():
    """As in `hylora info | head`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "hylora_kernels", "info"],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "error" not in done.stderr


def test_no_color_is_obeyed(tmp_path):
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": ""}
    done = hylora("evaluate", tmp_path / "none", env=environment)
    assert done.returncode == 2 and "\x1b[" not in done.stderr + done.stdout


def test_version():
    done = hylora("--version")
    assert (
        done.returncode == 0
        and done.stdout == f"hylora {cli.importlib.metadata.version('hylora-kernels')}\n"
    )


# ------------------------------------------------------------------ output files, before the work


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{tmp}", "is a folder; give a file"),
        ("{tmp}/none/x.json", "its folder {tmp}/none does not exist"),
        ("/dev/null", "is no regular file"),
    ],
)
def test_a_report_that_can_not_be_written_is_refused_before_the_work(path, says, tmp_path):
    path, says = (text.replace("{tmp}", str(tmp_path)) for text in (path, says))
    result = CliRunner().invoke(cli.app, ["evaluate", "no/such/model/here", "--json", path])
    assert result.exit_code == 2 and says in result.stderr and "model" not in result.stderr


def test_a_report_may_stand_in_the_folder_to_be_made(tmp_path):
    given = {"json_path": tmp_path / "out" / "sub" / "x.json", "out": tmp_path / "out"}
    cli.check_output_files(given)
    with pytest.raises(ValueError, match=r"--json .* does not exist"):
        cli.check_output_files(given | {"out": tmp_path / "other"})


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work():
    with pytest.raises(ValueError, match=r"--png a\.doc must end with one of \.png, \.svg, \.pdf"):
        cli.check_output_files({"png": Path("a.doc")})
