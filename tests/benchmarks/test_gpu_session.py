"""benchmarks/gpu.sh and gpu_session.py without a GPU: which programs run in which order, and what
is written when one fails, hangs or no longer fits. The programs here are a line of Python each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_results
import gpu_session
from gpu_session import Step

CARD = {
    "card": "NVIDIA H100 80GB HBM3",
    "arch": "90",
    "memory": 80e9,
    "versions": {"torch": "2.11.0"},
    "has_table": True,
    "table": "/no/such/table.json",
    "driver": "580",
    "commit": "abc",
}


def names(machine=CARD) -> dict[str, Step]:
    return {step.name: step for step in gpu_session.steps(machine, Path("/out"), 1.0)}


def test_the_steps_in_order_of_value():
    steps = names()
    models, decode = "benchmarks/gpu_models.py", "benchmarks/gpu_decode.py"
    tests = steps["tests"].words
    assert {name: " ".join(step.words) for name, step in steps.items() if name != "tests"} == {
        "build": "setup.py --quiet build_csrc",
        "decode": f"{decode} llama-3.2-1b --out /out",
        "host-cost": "benchmarks/gpu_host_cost.py --out /out",
        "groups": "benchmarks/gpu_groups.py --out /out",
        "one-row": "benchmarks/gpu_one_row.py --out /out",
        "selftest": "-m hylora_kernels selftest --device cuda --json /out/selftest.json",
        "quantized": "benchmarks/gpu_quantized.py llama-3.2-1b --out /out",
        "tinyllama": f"{models} tinyllama --out /out",
        "layers": "benchmarks/gpu_layers.py --quick --compile --out /out",
        "decode-7b": f"{decode} 7b --out /out",
        "7b": f"{models} 7b --out /out",
        "llama-3.2-1b": f"{models} llama-3.2-1b --out /out",
        "compiled": f"{models} tinyllama --compiled --out /out",
        "predicted": "benchmarks/gpu_prediction.py --gpu H100 --compare /out/layers.json",
        "tune": "-m hylora_kernels tune --device cuda --quick",
        "selftest-full": "-m hylora_kernels selftest --device cuda"
        " --json /out/selftest-full.json --full",
    }
    assert list(steps)[-2:] == ["tests", "selftest-full"]
    assert tests[:5] == ["-m", "pytest", "-m", "gpu", "-q"]
    assert {"test_ops.py", "test_cuda.py"} <= {Path(word).name for word in tests}
    assert all(step.least <= step.seconds for step in steps.values())
    first = list(steps.values())[:8]
    assert first[-1].name == "layers" and sum(s.seconds for s in first) < 60 * gpu_session.MINUTES


def test_what_a_machine_does_not_need_is_left_out():
    assert {n: s.why_not for n, s in names().items() if s.why_not} == {
        "tune": "there is a table for NVIDIA H100 80GB HBM3"
    }
    small = CARD | {"card": "NVIDIA T1000", "memory": 8e9, "has_table": False}
    assert {n: s.why_not for n, s in names(small).items() if s.why_not} == {
        "decode-7b": "needs 60 GB on the GPU",
        "7b": "needs 60 GB on the GPU",
        "predicted": "gpu_roofline.py doesn't know NVIDIA T1000",
    }


def test_limits_grow_with_the_minutes():
    short, long = (gpu_session.steps(CARD, Path("/out"), scale) for scale in (1.0, 3.0))
    assert [s.seconds for s in long] == [3 * s.seconds for s in short]


def test_test_files_without_their_imports_are_named(tmp_path):
    head, body = "import torch, {}\n", "def test_a(device): pass\n"
    (tmp_path / "inner").mkdir()
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "inner/test_good.py").write_text(head.format("helper") + body)
    (tmp_path / "test_bad.py").write_text(head.format("no_such_module.inner") + body)
    (tmp_path / "test_cpu.py").write_text("def test_a(): pass\n")
    found, left_out = gpu_session.gpu_tests(tmp_path)
    assert found == [str(tmp_path / "inner/test_good.py")]
    assert left_out == {str(tmp_path / "test_bad.py"): "no_such_module"}


@pytest.fixture
def session(tmp_path, monkeypatch):
    """The session of some steps: (exit code, name -> outcome, folder)."""

    def run(*steps: Step, minutes: float = 1.0, only=()):
        monkeypatch.setattr(gpu_session, "steps", lambda *given: list(steps))
        monkeypatch.setattr(gpu_session, "look_at_machine", lambda: dict(CARD))
        words = ["--minutes", str(minutes), "--out", str(tmp_path)]
        code = gpu_session.main([*words, *(word for name in only for word in ("--only", name))])
        report = json.loads((tmp_path / "session.json").read_text())
        return code, {step["name"]: step for step in report["steps"]}, tmp_path

    return run


def program(name: str, text: str, seconds: float = 30, least: float = 0, why_not="") -> Step:
    return Step(name, ["-c", text], seconds, least, why_not)


def test_a_step_that_fails_or_hangs_does_not_keep_the_others_from_running(session, capfd):
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {!r}]); {}"
    sleeps = "import time; time.sleep(60)"
    code, steps, folder = session(
        program("first", "print('one'); print('all | well')"),
        program("broken", "import sys; print('before'); sys.exit(3)"),
        program("hangs", child.format(sleeps, "print(p.pid, flush=True); p.wait()"), seconds=2),
        program("last", "print('still here')"),
    )
    assert code == 3
    assert {name: step["status"] for name, step in steps.items()} == {
        "first": "ok",
        "broken": "failed (3)",
        "hangs": "cut at 2 s",
        "last": "ok",
    }
    assert steps["first"]["last_line"] == "all / well"
    assert 2 <= steps["hangs"]["seconds"] < 15
    wait_until_gone(int(steps["hangs"]["last_line"]))
    log, shown = (folder / "log.txt").read_text(), capfd.readouterr().out
    assert "\nbefore\n" in log and "\nbefore\n" in shown
    results = (folder / "results.md").read_text()
    assert results.startswith("### NVIDIA H100 80GB HBM3\n\ndriver 580, torch 2.11.0; commit abc, ")
    assert "| hangs | cut at 2 s | " in results and "| last | ok | " in results


def wait_until_gone(process: int) -> None:
    """What a step started is stopped with it; a moment later, where init has to reap it."""
    for _ in range(100):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} still runs")


def test_results_are_there_before_a_step_ends(session, tmp_path):
    look = "import pathlib, shutil; p = pathlib.Path({!r}); shutil.copy(p / {!r}, p / 'seen.json')"
    _, steps, folder = session(
        program("first", "print(1)"),
        program("looks", look.format(str(tmp_path), "session.json")),
    )
    seen = json.loads((folder / "seen.json").read_text())["steps"]
    assert [(s["name"], s["status"]) for s in seen] == [("first", "ok"), ("looks", "running")]
    assert steps["looks"]["status"] == "ok"


def test_what_no_longer_fits_is_skipped_and_what_is_short_goes_on(session):
    minutes = (gpu_session.AT_THE_END + 20) / 60
    code, steps, folder = session(
        program("long", "print('never')", least=1000),
        program("short", "print('done')"),
        program("needless", "print('never')", why_not="there is a table"),
        minutes=minutes,
    )
    assert code == 0
    assert steps["long"]["status"].endswith(" s are left, it needs 1000")
    assert steps["short"]["status"] == "ok"
    assert steps["needless"]["status"] == "skipped: there is a table"
    assert "==== needless: skipped: there is a table" in (folder / "log.txt").read_text()


def test_the_last_step_is_cut_where_the_minutes_end(session):
    minutes = (gpu_session.AT_THE_END + 3) / 60
    code, steps, _ = session(program("long", "import time; time.sleep(60)"), minutes=minutes)
    assert code == 124 and steps["long"]["status"].startswith("cut at ")
    assert steps["long"]["seconds"] < 10


def test_only_the_steps_named(session, capsys):
    code, steps, _ = session(program("a", ""), program("b", ""), program("c", ""), only=("c", "a"))
    assert code == 0 and list(steps) == ["a", "c"]
    with pytest.raises(SystemExit):
        session(program("a", ""), only=("d",))
    assert "--only must be one of a, got 'd'" in capsys.readouterr().err


def test_steps_that_can_stop_by_themselves_are_told_when():
    steps = names()
    told = {name for name, step in steps.items() if gpu_session.seconds_of(step, 100.0)}
    assert told == {
        *("decode", "decode-7b", "groups", "host-cost", "quantized", "selftest"),
        "selftest-full",
        *("tinyllama", "llama-3.2-1b", "7b", "compiled"),
    }
    assert gpu_session.seconds_of(steps["7b"], 100.0) == ["--seconds", "90"]


def test_the_steps_find_the_package_and_build_for_the_present_card_alone(monkeypatch):
    monkeypatch.delenv("HYLORA_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("HYLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    found = gpu_session.environment(CARD)
    assert found["HYLORA_CUDA_ARCHS"] == "90" and "HYLORA_CACHE" not in found
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(gpu_session.ROOT)
    monkeypatch.setattr(gpu_session.importlib.util, "find_spec", lambda name: None)
    assert gpu_session.environment(CARD)["HYLORA_CACHE"] == "/cache/hylora_kernels"
    monkeypatch.setenv("HYLORA_CUDA_ARCHS", "80 90")
    assert gpu_session.environment(CARD)["HYLORA_CUDA_ARCHS"] == "80 90"


def test_a_table_measured_on_the_card_comes_back(session, tmp_path, monkeypatch):
    table = tmp_path / "cache.json"
    monkeypatch.setitem(CARD, "table", str(table))
    write = f"open({str(table)!r}, 'w').write('{{\"rows\": [1, 2]}}')"
    _, _, folder = session(program("tune", write))
    assert "2 problems, in tune.json" in (folder / "results.md").read_text()


def test_results_of_files_that_are_missing_or_cut_off(tmp_path):
    assert "no card" in gpu_results.render(tmp_path)
    (tmp_path / "models.json").write_text('[{"model": "7b", "wh')
    (tmp_path / "layers.json").write_text(
        json.dumps(
            {
                "limits": {"hbm": 3e12, "product": 8e14},
                "geometric_means": {"forward, pair, graph cold": {"dense": 2.0, "peft": 3.0}},
                "failures": ["one layer"],
            }
        )
    )
    line = {"backend": "cuda", "dtype": "bfloat16", "form": "pair", "cases": 7, "worst": 0.5}
    line |= {"repeats": 20, "bit_equal": True, "failures": []}
    report = {"lines": [line], "skipped": {"cpu": "no"}, "seconds": 3.0}
    (tmp_path / "selftest.json").write_text(json.dumps(report))
    rendered = gpu_results.render(tmp_path)
    assert "Whole models" not in rendered
    assert "3.00 TB/s, a large bf16 product 800 TFLOP/s" in rendered
    assert "| forward, pair, graph cold | 2.00 | 3.00 |\n* FAILED: one layer" in rendered
    assert "| cuda | bfloat16 | pair | 7 | 0.50 | 20 x bit-equal | ok |" in rendered
    assert "* not tested: cpu: no" in rendered


@pytest.fixture
def script(tmp_path):
    """benchmarks/gpu.sh from a copy of benchmarks/, with programs in place of Pythons."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    folder = tmp_path / "copy" / "benchmarks"
    folder.mkdir(parents=True)
    shutil.copy(Path(gpu_session.__file__).with_name("gpu.sh"), folder)

    def run(*words: str, **environment: str) -> str:
        done = subprocess.run(
            ["bash", folder / "gpu.sh", *words],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run, folder.parent


def fake_python(path: Path, name: str, has_torch: bool = True) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = f'[ "$1" = -c ] && exit {0 if has_torch else 1}\necho {name}: "$@"\n'
    path.write_text(f"#!/usr/bin/env bash\n{answer}")
    path.chmod(0o755)
    return str(path)


def test_the_script_takes_a_python_that_has_torch(script, tmp_path):
    run, root = script
    wanted = "benchmarks/gpu_session.py --minutes 11 --only 7b\n"
    mine = fake_python(tmp_path / "python", "mine")
    words = ("--minutes", "11", "--only", "7b")
    assert run(*words, PYTHON=mine) == "mine: " + wanted
    fake_python(tmp_path / "bin/python3", "system")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert run(*words, PATH=path) == "system: " + wanted
    fake_python(root / ".venv/bin/python", "venv")
    assert run(*words, PATH=path) == "venv: " + wanted
    fake_python(root / ".venv/bin/python", "venv", has_torch=False)
    assert run(*words, PATH=path) == "system: " + wanted


def test_the_script_builds_an_environment_where_no_python_has_torch(script, tmp_path):
    run, root = script
    fake_python(tmp_path / "bin/python3", "system", has_torch=False)
    make = tmp_path / "bin/make"
    venv = root / ".venv/bin/python"
    fake_python(tmp_path / "made", "venv")
    make.write_text(f"#!/bin/sh\nmkdir -p {venv.parent} && cp {tmp_path / 'made'} {venv}\n")
    make.chmod(0o755)
    shown = run("--minutes", "1", PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert shown.splitlines()[-1] == "venv: benchmarks/gpu_session.py --minutes 1"
    assert "pip install" in shown and "peft" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    with pytest.raises(SystemExit, match=r"gpu\.sh needs a GPU: torch sees no CUDA device"):
        gpu_session.look_at_machine()


def test_a_session_that_is_stopped_stops_its_step(tmp_path):
    pid, sleep = tmp_path / "pid", "import time; time.sleep(60)"
    step = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); {sleep}"
    start = (
        "import gpu_session as g, sys\n"
        f"g.steps = lambda *given: [g.Step('long', ['-c', {step!r}], 60, 0)]\n"
        f"g.look_at_machine = lambda: {CARD!r}\n"
        f"sys.exit(g.main(['--out', {str(tmp_path / 'out')!r}]))\n"
    )
    folder = Path(gpu_session.__file__).parent
    running = subprocess.Popen([sys.executable, "-c", start], cwd=folder, text=True)
    while not (pid.exists() and pid.read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait(30) == 143
    wait_until_gone(int(pid.read_text()))
    assert "| long | running |" in (tmp_path / "out/results.md").read_text()
