"""What is refused takes little memory: measured in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from helpers import hostile
from helpers.checkpoints import build

# Prints the peak memory for each folder, over that of loading the first. RLIMIT_AS turns a bomb
# into a MemoryError.
MEASURE = """
import resource, sys
from hylora_kernels.model.load import load_model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_model(sys.argv[1], "cpu")
before = peak()
resource.setrlimit(resource.RLIMIT_AS, (before + 16 * 2**30,) * 2)
for folder in sys.argv[2:]:
    try:
        load_model(folder, "cpu")
    except ValueError as error:
        assert "MemoryError" not in str(error), error
        print(peak() - before)
"""
BOMBS = {
    "vocabulary": hostile.edited("config.json", lambda c: c.update(vocab_size=10**9)),
    "heads": hostile.edited("config.json", lambda c: c.update(head_dim=2**28)),
    "layers": hostile.edited("config.json", lambda c: c.update(num_hidden_layers=100_000)),
    "header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
}


def test_what_is_refused_takes_little_memory(saved, tmp_path):
    """A config of 1 KB took 13 GB, a header that claims 8 GB as much."""
    dense = tmp_path / "dense"
    build(rank=0).save_pretrained(dense)
    folders = []
    for source in (saved, dense):
        for what, change in BOMBS.items():
            folders.append(shutil.copytree(source, tmp_path / f"{source.name}-{what}"))
            change(Path(folders[-1]))
    command = [sys.executable, "-c", MEASURE, str(dense), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    taken = [int(line) for line in done.stdout.splitlines()]
    assert len(taken) == len(folders) and max(taken) < 200e6
