"""Processes that work together: who does what, and how the loss of one is noticed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import run_together
from torch import distributed

from hylora_kernels.support import processes as module
from hylora_kernels.support.processes import ALONE, LostProcess, Processes, together


def at_once(size, work):
    """What work(processes) returns or raises for each of `size` processes, which are threads on one
    store here."""
    store, found = distributed.HashStore(), [None] * size

    def run(rank):
        try:
            processes = Processes(store, rank, size)
            found[rank] = work(processes)
        except Exception as error:
            found[rank] = error
        processes._ended.set()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.fixture
def one_value(monkeypatch):
    """agreed() without collectives, which threads can't make: everybody has the first's value."""
    monkeypatch.setattr(Processes, "agreed", lambda self, value, stage="": value)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.02)


def test_one_process_does_everything():
    assert ALONE.is_first and ALONE.size == 1
    assert list(range(5))[ALONE.part(5)] == [0, 1, 2, 3, 4]
    assert ALONE.share({"a": 1.0, "b": 2.0}) == {"a", "b"}
    assert ALONE.by_first(lambda: 3, "x") == 3
    tensor = torch.ones(2)
    ALONE.add([tensor], "x")
    assert tensor.tolist() == [1, 1] and ALONE.total([1.5], "x") == [1.5]
    with together() as processes:
        assert processes is ALONE


@pytest.mark.parametrize(("size", "count"), [(2, 5), (3, 2), (4, 8)])
def test_every_row_is_read_once(size, count):
    parts = at_once(size, lambda p: list(range(count))[p.part(count)])
    assert sorted(row for part in parts for row in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [2, 3])
def test_work_is_divided_by_its_costs(size, one_value):
    costs = {f"{i}": float(cost) for i, cost in enumerate([9, 1, 1, 7, 3, 3, 6, 6, 2, 2, 2])}
    shares = at_once(size, lambda p: p.share(costs))
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(map(costs.get, share)) for share in shares]
    assert max(loads) - min(loads) <= 1


def test_more_processes_than_work(one_value):
    assert sorted(map(len, at_once(3, lambda p: p.share({"a": 1.0})))) == [0, 0, 1]


def test_all_wait_for_the_last():
    arrived = []

    def work(processes):
        time.sleep(0.1 * processes.rank)
        arrived.append(processes.rank)
        processes.wait("x")
        return len(arrived)

    assert at_once(3, work) == [3, 3, 3]


def test_an_error_of_one_is_told_to_the_others(quick):
    def work(processes):
        if processes.rank == 1:
            processes.fail(ValueError("no text"))
            raise ValueError("no text")
        processes.wait("reading")

    first, second, third = at_once(3, work)
    assert isinstance(second, ValueError)
    for found in (first, third):
        assert isinstance(found, LostProcess) and found.was_told
        assert str(found) == "process of rank 1 of 3 stopped: ValueError: no text"


def test_only_the_first_to_fail_is_heard():
    store = distributed.HashStore()
    pair = [SimpleNamespace(_store=store, rank=r, size=2) for r in range(2)]
    for processes in pair:
        processes._named = lambda ranks: str(ranks)
    assert Processes.fail(pair[1], ValueError("a"))
    assert Processes.fail(pair[1], ValueError("a"))
    assert not Processes.fail(pair[0], ValueError("a"))


def ended_process():
    """The id and time of start of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        start = module.psutil.Process(process.pid).create_time()
        process.kill()
    return process.pid, start


@pytest.mark.parametrize("is_zombie", [False, True])
def test_a_killed_process_is_named(is_zombie, quick):
    with contextlib.ExitStack() as undo:
        if is_zombie:  # Its parent hasn't asked for its status.
            child = undo.enter_context(subprocess.Popen([sys.executable, "-c", ""]))
            place = child.pid, module.psutil.Process(child.pid).create_time()
            while module.psutil.Process(child.pid).status() != module.psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
        else:
            place = ended_process()

        def work(processes):
            if processes.rank == 2:
                processes._store.set("place/2", f"{module._machine()} {place[0]} {place[1]}")
                return None
            processes.wait("factorizing")

        *others, _ = at_once(3, work)
    for found in others:
        assert isinstance(found, LostProcess) and not found.was_told
        assert str(found).startswith("process of rank 2 of 3 ended before the others were done")
        assert "(factorizing)" in str(found) and "the same command continues" in str(found)


def test_a_silent_process_on_another_machine_is_named(quick, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "SILENT", 0.6)
    done = []

    def work(processes):
        if processes.rank == 1:
            processes._store.set("place/1", f"elsewhere ns {os.getpid()} 1.0")
            time.sleep(1.5)  # It gives signs of life in this time, and none after it.
            done.append(time.monotonic())
            return None
        processes.wait("refitting")

    lost, _ = at_once(2, work)
    assert isinstance(lost, LostProcess) and done
    assert str(lost).startswith("process of rank 1 of 2 gave no sign for 1 s (refitting)")


def test_another_process_of_the_same_id_is_not_the_lost_one():
    here, own = module._machine(), module.psutil.Process()
    assert module._is_running(here, own.pid, own.create_time())
    assert not module._is_running(here, own.pid, own.create_time() - 100)
    assert module._is_running("elsewhere", own.pid, 0.0)


EXCHANGE = """
import sys
from pathlib import Path
import torch
from torch import distributed
from hylora_kernels.support.processes import together

folder = Path(sys.argv[1])
for call in range(2):  # A second call has keys of its own, and the same group.
    with together() as processes:
        rank = processes.rank
        tensors = [torch.full((3,), float(rank + 1)), torch.tensor([rank, 10])]
        processes.add(tensors, "adding")
        assert tensors[0].tolist() == [6.0] * 3 and tensors[1].tolist() == [3, 30], tensors
        assert processes.total([1.0, rank], "adding") == [3.0, 3.0]
        assert processes.least(7 - rank) == 5
        assert processes.agreed({"rank": rank}) == {"rank": 0}
        threads = torch.get_num_threads()
        assert processes.local_size == 3
        assert processes.by_first(torch.get_num_threads, "working") == 3 * threads
        assert torch.get_num_threads() == threads
        names = processes.share({"a": 1.0, "b": 2.0, "c": 3.0})
        assert len(names) == 1
        with together() as inner:
            assert inner is processes
        processes.require_shared(folder)
        (folder / f"{call}-{rank}").write_text("x")
        processes.see([folder / f"{call}-{r}" for r in range(3)], "writing")
        assert all((folder / f"{call}-{r}").exists() for r in range(3))
        try:
            processes.require_shared(folder if rank != 1 else folder / "other")
        except OSError as error:
            assert rank == 1 and "rank 1 doesn't see" in str(error) and "HYLORA_CACHE" in str(error)
        else:
            assert rank != 1
assert distributed.is_initialized()
"""


def test_what_real_processes_exchange(tmp_path):
    run_together(EXCHANGE, tmp_path, processes=3)
    assert len(list(tmp_path.iterdir())) == 6
