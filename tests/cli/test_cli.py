"""The commands: the words a user types, the files written, the output and the exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers import tiny
from typer.testing import CliRunner

from hylora_kernels.cli import main as cli
from hylora_kernels.support import cache

LINES = [f"The {a} dog of the {b} runs after {i} red cats and one bird." for i, (a, b) in enumerate(
    (a, b) for a in ("old", "young", "small", "big") for b in ("king", "cook", "miller")
)] * 20  # fmt: skip


def run(*words, code: int = 0):
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model's folder and two texts."""
    folder = tmp_path_factory.mktemp("cli")
    text = "\n\n".join(LINES)
    (folder / "text.txt").write_text(text)
    (folder / "empty.jsonl").write_text("")
    model = tiny.llama(vocab_size=tiny.WORDS + 256, max_position_embeddings=256)
    model.save_pretrained(folder / "dense")
    tiny.tokenizer(text, "{{ messages[0]['content'] }}").save_pretrained(folder / "dense")
    return folder


@pytest.fixture(scope="module")
def compressed(home):
    out = home / "small"
    words = ("--keep", 0.7, "--lora-rank", 4, "--rank-multiple", 4, "--samples", 4, "--length", 24)
    text = ("--calibration", home / "text.txt")
    return out, run(
        "compress", home / "dense", "--out", out, *words, *text, "--json", home / "c.json"
    )


@pytest.fixture(scope="module")
def recovered(home, compressed):
    out = home / "recovered"
    words = ("--data", home / "text.txt", "--steps", 3, "--length", 24)
    return out, run("finetune", compressed[0], "--out", out, *words)


def test_every_verb_is_there_and_says_what_it_does():
    assert set(cli.VERBS) == {
        "compress", "finetune", "evaluate", "generate", "analyze", "sweep", "info", "demo", "cache",
        "selftest", "tune", "quantize", "export", "plan", "adapter export", "adapter import",
    }  # fmt: skip
    shown = run("--help").output
    for verb in cli.VERBS:
        *group, name = verb.split()
        assert name in (run(*group, "--help").output if group else shown)
        page = run(*verb.split(), "--help").output
        assert "--json" in page and "--debug" in page
        if verb not in ("info", "cache", "export"):
            assert "--device" in page


def test_a_quantised_model_is_written_loaded_and_measured(home, tmp_path):
    out = tmp_path / "small"
    words = ("--bytes", "60kB", "--samples", 4, "--length", 24, "--data", home / "text.txt")
    adapt = ("--adapt", home / "text.txt", "--adapt-steps", 2, "--adapt-rank", 4)
    shown = run("quantize", home / "dense", "--out", out, *words, *adapt).output
    assert "matrices by bits" in shown and "predicted" in shown and "why not more" in shown
    assert 58_000 < (out / "model.safetensors").stat().st_size <= 60_000
    found = json.loads((out / "compress.json").read_text())
    assert found["adapt"]["steps"] == 2 and found["options"]["low_rank"] is False
    assert {layer["rank"] for layer in found["layers"]} == {0}
    run("evaluate", out, "--data", home / "text.txt", "--no-speed", "--length", 24)


def test_as_a_module_it_is_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "hylora_kernels", "info"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "backend eager" in done.stdout


def test_compress_prints_kept_and_removed_and_writes_the_model(home, compressed):
    out, result = compressed
    words = ("kept", "removed", "linears", "whole model", "merged", "as is", "trainable")
    for text in (*words, "file of weights: "):
        assert text in result.output
    written = json.loads((out / "compress.json").read_text())
    assert written == json.loads((home / "c.json").read_text())
    assert 0 < written["keep"] <= 0.7
    assert (out / "model.safetensors").is_file() and (out / "config.json").is_file()


def test_compress_finds_the_keep_for_a_ratio(home, tmp_path):
    out, limit = tmp_path / "small", ("--limit", 2, "--length", 24, "--samples", 4)
    words = ("compress", home / "dense", "--out", out, "--target-ratio", 2, "--rank-multiple", 4)
    texts = ("--calibration", home / "text.txt", "--texts", f"{home / 'text.txt'},code", *limit)
    result = run(*words, *texts)
    frontier = json.loads((out / "compress.json").read_text())["frontier"]
    assert f"{frontier['chosen']:.3f} *" in result.output and "worst text" in result.output
    assert frontier["points"][-1]["keep"] <= frontier["chosen"] and len(frontier["dense"]) == 2
    assert (out / "frontier.png").is_file() and (out / "model.safetensors").is_file()
    assert "Tensor: 2 blocks" not in result.stderr  # The limit was 2, and is not said again.
    assert run(*words, *texts).output.count("*") == result.output.count("*")
    refused = run(*words, "--keep", 0.5, code=2).stderr
    assert "only one budget may be given, got --keep 0.5 and --target-ratio 2.0" in refused
    refused = run(*words[:4], "--texts", "code", code=2).stderr
    assert "--texts is read for --target-ratio, which is not given" in refused
    refused = run(*words[:4], "--limit", 3, code=2).stderr
    assert "--limit is read for --target-ratio, which is not given" in refused


def test_finetune_recovers_and_keeps_its_log(recovered):
    out, result = recovered
    assert "trained" in result.output and "3 steps" in result.output
    assert json.loads((out / "finetune.json").read_text())["steps"] == 3
    assert (out / "training" / "log.jsonl").read_text().count("\n") == 3


def test_finetune_trains_the_factors(home, compressed, tmp_path):
    out, words = tmp_path / "trained", ("--steps", 2, "--length", 24, "--train", "factors")
    words += ("--data", home / "text.txt")
    run("finetune", compressed[0], "--out", out, *words)
    options = json.loads((out / "finetune.json").read_text())["options"]
    assert (options["train"], options["lr"]) == ("factors", 3e-5)
    refused = run("finetune", compressed[0], "--out", tmp_path / "b", *words, "--no-merge", code=2)
    assert "keeps adapters beside the base, but --train factors" in refused.stderr


def test_finetune_keeps_the_breadth_of_a_teacher(home, compressed, tmp_path):
    out, words = tmp_path / "kept", ("--steps", 3, "--length", 24, "--objective", "keep")
    data = ("--data", f"{home / 'text.txt'}:2,self:1", "--teacher", home / "dense")
    result = run("finetune", compressed[0], "--out", out, *words, *data)
    written = json.loads((out / "finetune.json").read_text())
    assert written["options"]["distill"] == 1.0 and written["teacher"] == str(home / "dense")
    assert [part["blocks"] for part in written["sources"]] == [2, 1]
    assert f"teacher {home / 'dense'}:" in result.output


def test_evaluate_counts_what_is_there(home, compressed, recovered, tmp_path):
    for model in (home / "dense", compressed[0], recovered[0]):
        words = ("--data", home / "text.txt", "--length", 24, "--limit", 3)
        result = run("evaluate", model, *words, "--json", tmp_path / "e.json")
        written = json.loads((tmp_path / "e.json").read_text())
        assert written["perplexity"]["tokens"] == 3 * 23
        assert "perplexity" in result.output and "/ total" in result.output
        parameters = f"{written['size']['parameters']:,}"
        assert parameters in result.output


def squeezed(output: str) -> str:
    """The output without spaces and lines of tables, where a long path's cell is folded."""
    return re.sub(r"[│\s]", "", output)


def test_every_report_says_which_part_of_the_text_was_read(home, compressed, recovered, tmp_path):
    """Of a file compress and finetune read the first 90 %, evaluate measures the rest."""
    assert "text.txt, first 90%" in compressed[1].output
    assert "text.txt, first 90%" in recovered[1].output
    words = ("evaluate", home / "dense", "--data", home / "text.txt", "--no-speed")
    assert "text.txt,last10%" in squeezed(run(*words, "--length", 24).output)
    other = tmp_path / "other[1].txt"
    other.write_text("\n".join(LINES))
    shown = squeezed(run(*words, "--length", 24, "--limit", 2, "--test", other).output)
    assert "other[1].txt,whole" in shown and "last10%" not in shown


def test_compress_reads_several_texts_and_says_each(home, tmp_path):
    odd = tmp_path / "a,b:3.txt"
    odd.write_text("\n".join(LINES))
    words = ("--keep", 0.7, "--rank-multiple", 4, "--lora-rank", 4, "--samples", 4, "--length", 24)

    def read(*texts):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        result = run("compress", home / "dense", "--out", out, *words, *texts)
        found = json.loads((out / "compress.json").read_text())["sources"]
        return {part["name"]: part["blocks"] for part in found}, result.output

    text, names = home / "text.txt", (f"{home / 'text.txt'}, first 90%", f"{odd}, first 90%")
    usual = {"self": 2, "stdlib, train": 1}
    assert read()[0] == usual
    found, said = read("--data", odd)
    assert found == {names[1]: 4} | usual
    assert "a,b:3.txt,first90%:96tokensin4blocks;self:48tokensin2blocks" in squeezed(said)
    found, _ = read("--data", f"{text}:3,self", "--calibration", f"{odd}:2")
    assert found == {names[0]: 3, "self": 2, names[1]: 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self:0", "--calibration[0] must have an int of at least 1, or None, as its number"),
        ("self,self:3", "--calibration[1] is 'self' again: give all its blocks at once"),
        ("self:2,none.txt", "--calibration 'none.txt' does not exist"),
        ("self:2,bronw.zip", "--calibration 'bronw.zip' does not exist"),
    ],
)
def test_a_text_of_a_mix_that_can_not_be_read_is_named(text, message, home, tmp_path):
    words = ("compress", home / "dense", "--out", tmp_path / "out", "--length", 24)
    assert message in " ".join(run(*words, "--data", text, code=2).stderr.split())


def test_evaluate_draws_several_texts_beside_the_dense_model(home, compressed, tmp_path):
    (tmp_path / "a,b.txt").write_text("\n".join(LINES))
    words = ("--length", 24, "--limit", 2, "--no-speed", "--json", tmp_path / "e.json")
    texts = ("--texts", f"{home / 'text.txt'},code,self", "--texts", tmp_path / "a,b.txt")
    beside = ("--dense", home / "dense", "--png", tmp_path / "a.png")
    result = run("evaluate", compressed[0], *texts, *beside, *words)
    found = json.loads((tmp_path / "e.json").read_text())["breadth"]
    names = [str(home / "text.txt"), "code", "self", str(tmp_path / "a,b.txt")]
    assert [text["name"] for text in found["texts"]] == names
    assert found["geometric_mean"] > 0 and found["worst"] in names
    assert "geometric mean" in result.output and "code" in result.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_fewer_blocks_than_asked_for_are_said(home, tmp_path):
    words = ("--length", 200, "--limit", 1000, "--no-speed")
    result = run("evaluate", home / "dense", "--data", home / "text.txt", *words)
    assert "blocks of 200 tokens, where 1000 were asked for" in result.stderr


def test_json_on_stdout_is_alone_there(home):
    words = ("--data", home / "text.txt", "--length", 24, "--limit", 1, "--no-speed", "--json", "-")
    result = run("evaluate", home / "dense", *words)
    assert json.loads(result.stdout)["perplexity"]["tokens"] == 23
    assert "perplexity" in result.stderr and "trainable" in result.stderr
    result = run("generate", home / "dense", "The old", "--max-new-tokens", 3, "--json", "-")
    assert json.loads(result.stdout)["prompt"] == "The old"


def test_another_tokenizer_and_a_revision(home, tmp_path):
    text = (home / "text.txt").read_text()
    tiny.tokenizer(text[:200]).save_pretrained(tmp_path / "words")
    words = ("--data", home / "text.txt", "--length", 24, "--no-speed")
    own = run("evaluate", home / "dense", *words, "--json", "-")
    other = run(
        "evaluate", home / "dense", *words, "--tokenizer", tmp_path / "words", "--json", "-"
    )
    counts = [json.loads(result.stdout)["perplexity"]["blocks"] for result in (own, other)]
    assert counts[0] < counts[1]
    result = run("evaluate", home / "dense", *words, "--revision", "v2", code=2)
    assert "--revision 'v2' goes with a hub id" in result.stderr


def test_a_merged_model_is_trained_again(home, recovered, tmp_path):
    words = ("--data", home / "text.txt", "--steps", 2, "--length", 24, "--lora-rank", 2)
    result = run("finetune", recovered[0], "--out", tmp_path / "again", *words)
    assert "2 steps" in result.output and "trainable 0 " not in result.output


def test_generate_streams_the_text_alone_to_stdout(recovered, tmp_path):
    words = ("The old", "--max-new-tokens", 5, "--json", tmp_path / "g.json")
    result = run("generate", recovered[0], *words)
    assert result.stdout == json.loads((tmp_path / "g.json").read_text())["text"] + "\n"
    assert "parameters" in result.stderr
    again = run("generate", recovered[0], *words, "--chat", "--temperature", 1, "--seed", 3)
    assert again.stdout.strip() or again.stdout == "\n"


def test_analyze_draws_and_writes(home, tmp_path):
    run("analyze", home / "dense", "--png", tmp_path / "a.png", "--json", tmp_path / "a.json")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "a.json").read_text())
    shown = run("analyze", home / "dense", "--lora", "--json", tmp_path / "l.json").output
    found = json.loads((tmp_path / "l.json").read_text())["ranks"]
    assert [size["rank"] for size in found] == [4, 8, 16, 32, 64] and "of the model" in shown
    assert all(f"{size['parameters']:,}" in shown for size in found)


def test_sweep_makes_a_table(home, tmp_path):
    text = home / "text.txt"
    result = run(
        "sweep", home / "dense", "--out", tmp_path / "s", "--keep", "0.9,0.7", "--lora-rank", "0,4",
        "--rank-multiple", 4, "--samples", 4, "--length", 24, "--limit", 3,
        "--data", text, "--calibration", text,
    )  # fmt: skip
    assert "removed" in result.output
    assert len(json.loads((tmp_path / "s" / "sweep.json").read_text())["cells"]) == 4


def test_info_says_why_and_where(tmp_path):
    shown = run("info", "--json", tmp_path / "i.json").output
    written = json.loads((tmp_path / "i.json").read_text())
    for text in ("torch", "triton", "cpu", "threads", "backend triton", "backend eager", "cache"):
        assert text in shown
    assert written["backends"]["eager"] == ""
    assert written["cache"]["path"] == str(cache.cache_root())


def test_cache_is_shown_and_cleared(monkeypatch, tmp_path):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    (cache.cache_dir("models") / "x").write_bytes(bytes(5000))
    assert str(tmp_path / "cache") in run("cache").output
    assert "5.1 kB" in run("cache").output
    assert "deleted 5.1 kB" in run("cache", "--clear").output
    assert cache.cache_size() == 0


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "words, says",
    [
        (("evaluate", "no/such/folder/here"), "no/such/folder/here"),
        (("evaluate", "{home}/dense", "--device", "tpu"), "device"),
        (("evaluate", "{home}/dense", "--dtype", "int4"), "dtype"),
        (("evaluate", "{home}/dense", "--data", "{home}/none.txt"), "none.txt"),
        (("compress", "{home}/dense", "--out", "{home}/x", "--keep", 2), "keep"),
        (("compress", "{home}/dense", "--out", "{home}/x", "--method", "best"), "method"),
        (("compress", "{home}/dense", "--out", "{home}/x", "--ranks", "{oops"), "ranks"),
        (("compress", "{home}/dense", "--out", "{home}/x", "--max-memory", "much"), "max-memory"),
        (("compress", "{home}/dense", "--out", "{home}/dense"), "folder of the model"),
        (("compress", "{home}/dense", "--out", "{home}"), "no model's"),
        (("compress", "{home}/dense", "--out", "{home}/text.txt"), "is a file"),
        (("finetune", "{home}/dense", "--out", "{home}/x"), "adapters"),
        (
            ("finetune", "{home}/small", "--out", "{home}/x", "--objective", "keep"),
            "--objective 'keep' needs --teacher MODEL, the dense model",
        ),
        (("sweep", "{home}/dense", "--out", "{home}/x", "--keep", "0.8,low"), "keep"),
        (("evaluate", "{home}/dense", "--data", "{home}/empty.jsonl"), "--data has 0 tokens"),
        (
            ("evaluate", "{home}/dense", "--data", "{home}/text.txt", "--split", "dev"),
            "--split must",
        ),
        (
            ("evaluate", "{home}/dense", "--data", "{home}/text.txt", "--column", "a"),
            "--column 'a'",
        ),
        (
            ("compress", "{home}/dense", "--out", "{home}/x", "--data", "{home}/none.txt"),
            "--calibration '{home}/none.txt' does not exist",
        ),
        (
            ("compress", "{home}/dense", "--out", "{home}/x", "--data", "{home}/text.txt"),
            "--length must be at most 256, the model's context, got 512",
        ),
        (
            ("evaluate", "{home}/dense", "--png", "{home}/a.png"),
            "--png draws ratios to a dense model",
        ),
        (("evaluate", "{home}/small", "--texts", "self"), "give the dense model with --dense NAME"),
        (
            ("evaluate", "{home}/dense", "--texts", "{home}/none.txt"),
            "--texts['{home}/none.txt']: ",
        ),
        (("generate", "{home}/dense", "The", "--max-new-tokens", 999), "--max-new-tokens 999"),
        (("analyze", "{home}/dense", "--png", "{home}/a.doc"), "--png {home}/a.doc must end with"),
        (("analyze", "{home}/dense", "--lora", "--png", "{home}/a.png"), "--png draws spectra"),
        (
            ("finetune", "{home}/small", "--out", "{home}/x", "--lora-rank", 2),
            "--lora-rank 2 is for",
        ),
    ],
)
def test_an_expected_error_is_one_line_and_exit_code_2(home, compressed, words, says):
    result = run(*(str(word).replace("{home}", str(home)) for word in words), code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says.replace("{home}", str(home)) in lines[0]
    assert "Traceback" not in result.output
    assert not (home / "x").exists()


def failing(error: BaseException):
    def verb(out: Path = Path("there")) -> None:
        """Fail."""
        raise error

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(cli.guarded(verb, "Kept in {out}."))
    return app


def test_debug_shows_the_error_itself(monkeypatch):
    app = failing(ValueError("x is 3"))
    assert CliRunner().invoke(app, []).exit_code == 2
    assert isinstance(CliRunner().invoke(app, ["--debug"]).exception, ValueError)
    monkeypatch.setenv("HYLORA_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, []).exception, ValueError)


def test_a_bug_is_no_expected_error():
    assert isinstance(CliRunner().invoke(failing(KeyError("x")), []).exception, KeyError)


def test_ctrl_c_says_what_is_kept():
    result = CliRunner().invoke(failing(KeyboardInterrupt()), ["--out", "here"])
    assert result.exit_code == 130
    assert "interrupted. Kept in here." in result.stderr


@pytest.mark.parametrize("verb", cli.VERBS)
def test_what_is_kept_can_be_said_for_every_verb(verb):
    function, kept = cli.VERBS[verb]
    assert kept.format(**dict.fromkeys(function.__annotations__, "OUT"))
