"""Where the time of one launch goes at M = 1: compiles gpu_one_row.cu, runs and prints it.

    python benchmarks/gpu_one_row.py [--out runs/gpu] [--shape 2048 2048 544]

A layer of 2048 x 2048, rank 544, takes one launch 7.6 us on an H100, where its bytes take 1.5. Each
variant of the same products leaves out or exchanges one part: the launch, the second phase, the
queue, the flag. Microseconds of one pass in a CUDA graph, the weights out of memory (cold) or out
of L2 (warm). Results are checked; one_row.json is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu_results

SOURCE = Path(__file__).with_suffix(".cu")
SHAPE = (2048, 2048, 544)  # K, N, rank


def nvcc_command(program: Path, arch: str) -> list[str]:
    """The words that compile the program; SystemExit without nvcc."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), None]
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if found is None:
        sys.exit("benchmarks/gpu_one_row.py needs nvcc: none on PATH or in $CUDA_HOME/bin")
    return [found, "-std=c++17", "-O3", f"-arch={arch}", "-o", str(program), str(SOURCE)]


def measure(shape: tuple[int, int, int]) -> dict:
    """What the program prints."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "one_row")
        subprocess.run(nvcc_command(program, "native"), check=True)
        words = [str(program), *map(str, shape)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("K", "N", "RANK"))
    given = parser.parse_args(words)
    report = measure(tuple(given.shape))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "one_row.json").write_text(json.dumps(report, indent=1) + "\n")
    print(gpu_results.one_row(report))


if __name__ == "__main__":
    main()
