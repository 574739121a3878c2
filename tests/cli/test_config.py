"""--config run.yaml: options from a file, and every run's options beside its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hylora_kernels.cli import main as cli


def run(*words, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.replace("│", " ").split())


def given(*words) -> dict:
    """The values that a command gets, by name."""
    seen: dict = {}
    verb = words[0]
    function = cli.VERBS[verb][0]
    app = cli.typer.Typer()
    app.callback()(lambda: None)

    def command(**arguments):
        seen.update(arguments)

    signature = cli.inspect.signature(function)
    command.__name__ = verb
    own = cli.with_parameters(command, list(signature.parameters.values()))
    app.command(verb)(cli.guarded(own, "{out}" if "out" in signature.parameters else ""))
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return seen


def write(text: str, name: str = "run.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_values_of_every_kind_are_those_of_the_command_line():
    write(
        "command: compress\nmodel: my-model\nout: small\nlora-rank: 4\nlength: 24\n"
        "refit: false\ncalibration: [a.txt, b.txt]\nrevision: null\nranks: {mlp: 0.5}\nkeep: 0.7\n"
    )
    words = ("my-model", "--out", "small", "--lora-rank", 4, "--length", 24, "--no-refit")
    words += ("--calibration", "a.txt", "--calibration", "b.txt", "--ranks", '{"mlp": 0.5}')
    assert given("compress", "--config", "run.yaml") == given("compress", *words, "--keep", 0.7)


def test_the_command_line_wins():
    write("model: a\nprompt: hello\nmax_new_tokens: 3\ntemperature: 0.5\nchat: true\n")
    found = given("generate", "b", "--config", "run.yaml", "--max-new-tokens", 7)
    assert (found["model"], found["prompt"], found["max_new_tokens"]) == ("b", "hello", 7)
    assert found["temperature"] == 0.5 and found["chat"] is True


@pytest.mark.parametrize(
    "text, message",
    [
        ("max-new-token: 3", "generate has no option 'max-new-token'; near ones: max-new-tokens"),
        ("debug: true", "generate has no option 'debug'"),
        ("seed: 1\nseed: 2", "'seed' stands there twice"),
        ("max-new-tokens: 1\nmax_new_tokens: 2", "'max_new_tokens' stands there twice"),
        ("command: compress", "is for the command 'compress', not 'generate'"),
        ("chat: 1", "'chat' must be true or false, got 1"),
        ("seed: true", "--seed"),
        ("- seed", "must be a YAML mapping of options to values"),
        ("seed: [1", "can't be read: "),
        (None, "can't be read: [Errno 2]"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(text, message):
    if text is not None:
        write(text)
    shown = run("generate", "model", "prompt", "--config", "run.yaml", code=2)
    assert message in shown


def test_a_run_writes_its_options_and_takes_them_again():
    run("info", "--json", "here.json")
    path = Path("here.run.yaml")
    assert yaml.safe_load(path.read_text()) == {"command": "info", "json": "here.json"}
    first = json.loads(Path("here.json").read_text())
    Path("here.json").unlink()
    run("info", "--config", path)
    assert json.loads(Path("here.json").read_text()).keys() == first.keys()
    Path("small").mkdir()
    before = given("compress", "m", "--out", "small", "--data", "a.txt", "--keep", 0.6)
    written = yaml.safe_load(Path("small/run.yaml").read_text())
    assert written["keep"] == 0.6 and written["calibration"] == ["a.txt"]
    assert "debug" not in written and "config" not in written
    assert given("compress", "--config", "small/run.yaml") == before


def test_a_run_without_results_or_with_an_error_writes_none():
    run("info")
    run("info", "--json", "-")
    run("generate", "nowhere/at/all", "prompt", "--json", "x.json", code=2)
    assert not list(Path().rglob("*.yaml"))
