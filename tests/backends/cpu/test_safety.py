"""What the C++ CPU library must not do: touch memory outside its operands, break after fork or in
several threads at once, change its bits from one call to the next. Whatever could crash runs in a
process of its own; `make sanitize` runs all tests of the CPU kernels on an instrumented copy."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import hylora_kernels
from hylora_kernels.backends import cpu

ROOT = Path(hylora_kernels.__file__).resolve().parents[1]
LIBRARY = Path(os.environ.get("HYLORA_CSRC") or ROOT / "hylora_kernels" / "_csrc.so")
TESTS = Path(__file__).resolve().parents[2]
BATTERY = TESTS / "helpers" / "cpu_battery.py"
LEVELS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and mprotect as Linux has")


def python(*words: object, limit=600, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("HYLORA_ISA", "LD_PRELOAD")}
    clean["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *map(str, words)],
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=limit,
        cwd=Path(__file__).parent,
    )


def available_levels() -> list[str]:
    reasons = {level: torch.ops.hylora.cpu_isa_reason(level) for level in LEVELS}
    print(*(f"without {level}: {reason}" for level, reason in reasons.items() if reason), sep="\n")
    return [level for level, reason in reasons.items() if not reason]


def battery(library: Path, *options: str, **environment: str) -> None:
    """At every level that this processor has."""
    levels = available_levels()
    done = python(BATTERY, library, *levels, *options, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [level for level, _ in lines] == levels
    assert all(int(calls) > 1000 for _, calls in lines)


# Memory


@pytest.fixture(scope="module")
def fence(tmp_path_factory) -> dict[str, str]:
    """What puts results and scratch behind fences as well: the allocator, preloaded."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("fence") / "fence.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC"]
    source = TESTS / "helpers" / "fenced_alloc.cpp"
    subprocess.run(["g++", *flags, str(source), "-o", str(path)], check=True)
    return {"LD_PRELOAD": str(path)}


@linux
@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_outside_a_buffer_is_touched(threads, fence):
    """Operands, results and scratch."""
    battery(LIBRARY, "--guard", "--quick", OMP_NUM_THREADS=str(threads), **fence)


@linux
@pytest.mark.parametrize(
    "touch, how",
    [
        ("ctypes.string_at(copy(five, at_end=True).data_ptr(), 21)", signal.SIGSEGV),
        ("ctypes.string_at(copy(five, at_end=False).data_ptr() - 1, 1)", signal.SIGSEGV),
        ("ctypes.memset(five.data_ptr(), 0, 21); del five", signal.SIGABRT),
        ("ctypes.memset(five.data_ptr(), 0, 65)", signal.SIGSEGV),
    ],
    ids=["operand's end", "operand's start", "result's end", "far behind a result"],
)
def test_the_fences_bite(touch, how, fence):
    lines = [
        "import torch, ctypes",
        "from helpers.cpu_battery import Fenced",
        "copy = Fenced().copy",
        "five = torch.empty(5).fill_(1)",
        "assert copy(five, at_end=True).equal(five)",
    ]
    assert python("-c", "\n".join(lines), **fence).returncode == 0
    assert python("-c", "\n".join([*lines, touch]), **fence).returncode == -how


@pytest.fixture(scope="module")
def instrumented() -> tuple[Path, dict[str, str]]:
    """The copy with sanitizers, for the levels of this processor, brought up to date, and what a
    process needs to load it."""
    if shutil.which("g++") is None or not (ROOT / "setup.py").is_file():
        pytest.skip("needs g++ and a checkout")
    preload = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        asked = ["g++", f"-print-file-name={name}"]
        path = Path(subprocess.run(asked, capture_output=True, text=True).stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"g++ has no {name} here")
        preload.append(str(path))
    isas = [level for level in available_levels() if level != "scalar"]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_csrc"],
        cwd=ROOT,
        env=os.environ | {"HYLORA_SANITIZE": "1", "CXX": "g++", "HYLORA_ISAS": " ".join(isas)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    # AddressSanitizer has to be there before Python, and libstdc++ with it, whose exceptions it
    # intercepts. Leaks are Python's own.
    environment = {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
    return ROOT / "build" / "sanitized" / "_csrc.so", environment


@linux
@pytest.mark.slow
def test_an_instrumented_copy_finds_nothing(instrumented):
    library, environment = instrumented
    assert b"__ubsan_handle_out_of_bounds" in library.read_bytes()
    battery(library, "--quick", "--few-rows", **environment)


# Processes and threads


class Problem:
    """One op call, small or large enough for threads; its weights are packed once."""

    def __init__(self, M: int, K: int, N: int, rank: int, dtype: torch.dtype):
        scale = K**-0.5
        self.x = torch.randn(M, K).to(dtype)
        self.shrink = torch.ops.hylora.cpu_pack((torch.randn(rank, K) * scale).to(dtype))
        self.expand = torch.ops.hylora.cpu_pack((torch.randn(N, rank) * scale).to(dtype))
        self.sizes = (None, None, rank, 0, N, 1.0, False, False, 0)

    def run(self) -> torch.Tensor:
        layer = torch.ops.hylora.cpu_layer
        return layer(self.x, self.shrink, None, self.expand, None, *self.sizes)[0]


def problems() -> list[Problem]:
    sizes = [(1, 576, 1536, 208), (2, 576, 1536, 208), (16, 300, 200, 40), (16, 576, 1536, 208)]
    sizes += [(70, 129, 257, 48), (300, 576, 576, 144)]
    return [Problem(*size, dtype) for size in sizes for dtype in DTYPES]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_same_bits_every_time(threads):
    for problem in problems():
        first = problem.run()
        assert all(same(problem.run(), first) for _ in range(5))


def test_inference_mode_changes_nothing(threads):
    for problem in problems():
        first = problem.run()
        with torch.inference_mode():
            inside = problem.run()
        assert inside.is_inference() and same(inside.clone(), first)


def test_several_python_threads_at_once(threads):
    """Each on its own problem, ten rounds, all let go together."""
    tasks = problems()
    wanted = [task.run() for task in tasks]
    start, wrong = threading.Barrier(4), []

    def work(index: int) -> None:
        torch.set_num_threads(threads)  # a thread's own setting in OpenMP
        start.wait()
        for _ in range(10):
            for task, result in zip(tasks[index::4], wanted[index::4], strict=True):
                if not same(task.run(), result):
                    wrong.append(task.x.shape)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    assert wrong == []


FORK = """
import os, sys, torch
from test_safety import problems, same
torch.set_num_threads(int(sys.argv[1]))
tasks = problems()
wanted = [task.run() for task in tasks]
child = os.fork()
if child == 0:
    if sys.argv[2] != "as it is":
        torch.set_num_threads(int(sys.argv[2]))
    results = [task.run() for task in tasks]
    torch.set_num_threads(1)  # of torch.equal: OpenMP's pool doesn't outlive fork()
    os._exit(0 if all(map(same, results, wanted)) else 3)
assert all(same(task.run(), y) for task, y in zip(tasks, wanted))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@linux
@pytest.mark.parametrize("parent, child", [("1", "as it is"), ("2", "1"), ("2", "as it is")])
def test_a_forked_child_computes_the_same_bits(parent, child):
    """The child makes worker threads of its own."""
    done = python("-c", FORK, parent, child, limit=120)
    assert done.stdout.split() == ["0"], done.stderr


FORK_WHILE_MEASURING = """
import os, signal
from hylora_kernels.backends.cpu import limbs
with limbs._measurements.lock:  # as another thread would
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if limbs.six_products_stay_faster() in (True, False) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@linux
def test_a_child_forked_while_limbs_are_measured_is_not_locked_out():
    done = python("-c", FORK_WHILE_MEASURING, limit=120)
    assert done.stdout.split() == ["0"], done.stderr


class Products(Dataset):
    """Item i: problem i's result, computed in the worker."""

    def __init__(self):
        self.tasks = problems()

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tasks[index].run()


@linux
def test_a_data_loaders_workers_compute_the_same_bits():
    data = Products()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the number a worker has
    try:
        wanted = [data[i] for i in range(len(data))]
    finally:
        torch.set_num_threads(before)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(same(y, z) for y, z in zip(loader, wanted, strict=True))


def test_scratch_follows_every_size():
    """A thread's scratch only grows: a small call after a large one, and the other way round."""
    large, small = Problem(300, 900, 700, 300, torch.float32), Problem(3, 33, 17, 5, torch.float32)
    first = (large.run(), small.run(), large.run(), small.run())
    assert same(first[0], first[2]) and same(first[1], first[3])
