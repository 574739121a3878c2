"""Several processes that work together, as torchrun starts them, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_together(code: str, *arguments: object, processes: int = 2) -> list[tuple[str, str]]:
    """Run `code` in each process, with sys.argv[1:] = arguments; (stdout, stderr) of each.

    Raises AssertionError if one of them fails.
    """
    ended = end_together(code, *arguments, processes=processes)
    assert [status for status, *_ in ended] == [0] * processes, ended
    return [(out, noise) for _, out, noise in ended]


def end_together(code: str, *arguments: object, processes: int = 2) -> list[tuple[int, str, str]]:
    """The same of processes that may fail: (exit status, stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    shared = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)},
        **{"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONWARNINGS": "ignore"},
        **{"PYTHONPATH": os.pathsep.join(paths), "TORCHELASTIC_RUN_ID": "test"},
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *said) for p, said in zip(started, printed, strict=True)]


def torchrun(
    script: Path, *arguments: object, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run `script`, in its folder, by torchrun, which ends all processes once one has failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(script), *map(str, arguments)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    given = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=script.parent,
        env=os.environ | given,
        capture_output=True,
        text=True,
        timeout=900,
    )
