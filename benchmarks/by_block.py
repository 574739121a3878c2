"""`hylora compress --by-block` of a random model under a memory limit: minutes, peak memory, disk.

    python benchmarks/by_block.py 1b --memory 4 --samples 16 --length 512
    python benchmarks/by_block.py 7b --memory 10 --samples 4 --length 256 --blocks 4

The limit is that of a memory cgroup, which counts this process's page cache, too; it needs a
system that lets the user make one (cgroup v1, or v2 with the memory controller). Other arguments go
to `hylora compress`. With --blocks the run ends when the factors of so many blocks are in the
cache, and what the rest would take is predicted from these.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from synthetic import SHAPES, write_checkpoint

GROUPS = Path("/sys/fs/cgroup")
GB = 1e9


def memory_group(limit: int) -> tuple[Path, Path]:
    """(a new cgroup whose processes get `limit` bytes in all, its file with the peak)."""
    v1 = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if v1 else GROUPS) / f"hylora-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
    return group, group / ("memory.max_usage_in_bytes" if v1 else "memory.peak")


def bytes_in(folder: Path) -> int:
    """Bytes on disk of a folder that another process writes to."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(Path(path) / name).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def anonymous_peak(pid: int, before: int) -> int:
    """The largest VmHWM seen, which ends with the process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return before
    found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return max([before, *(1024 * kib for kib in found)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("--memory", type=float, default=4, help="GiB")
    parser.add_argument("--blocks", type=int, help="end after so many blocks are factorized")
    parser.add_argument("--folder", type=Path, default=Path("runs/by_block"))
    given, others = parser.parse_known_args()
    dense, out = given.folder / given.shapes, given.folder / f"{given.shapes}-compressed"
    cache = given.folder / "cache"
    if not dense.is_dir():
        write_checkpoint(given.shapes, dense)
    shutil.rmtree(out, ignore_errors=True)
    group, peak = memory_group(int(given.memory * 2**30))
    command = [sys.executable, "-m", "hylora_kernels", "compress", dense, "--out", out]
    command += ["--by-block", "--calibration", "stdlib", "--device", "cpu", *others]
    process = subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"HYLORA_CACHE": str(cache.absolute())},
        preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
    )
    start, disk, resident, finished = time.monotonic(), 0, 0, []
    while process.poll() is None:
        time.sleep(2)
        disk, resident = max(disk, bytes_in(cache)), anonymous_peak(process.pid, resident)
        done = {
            p.name.split("layers.")[1].split(".")[0] for p in cache.rglob("*layers.*down_proj*")
        }
        finished += [time.monotonic() - start] * (len(done) - len(finished))
        if given.blocks and len(finished) > given.blocks:
            process.terminate()
            process.wait()
    seconds = time.monotonic() - start
    blocks = SHAPES[given.shapes][0]
    print(f"{given.shapes}: {seconds / 60:.1f} minutes, limit {given.memory} GiB of a cgroup")
    print(f"peak of the group {int(peak.read_text()) / GB:.2f} GB, page cache included")
    print(f"peak resident {resident / GB:.2f} GB; cache at most {disk / GB:.2f} GB")
    if given.blocks and len(finished) > 1:
        each = (finished[-1] - finished[0]) / (len(finished) - 1)
        left = (blocks - len(finished)) * each
        print(f"a block backward and factorized: {each:.0f} s, measured on {len(finished) - 1};")
        print(f"forward before it {finished[0] - each:.0f} s; predicted for the rest {left:.0f} s")
    elif process.returncode == 0:
        print(json.dumps(json.loads((out / "compress.json").read_text())["seconds"], indent=1))
    group.rmdir()
    sys.exit(0 if given.blocks else process.returncode)


if __name__ == "__main__":
    main()
