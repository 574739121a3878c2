"""Several processes that do one piece of work together, as torchrun starts them.

Tensors are summed by the collectives of torch.distributed. A collective says little of a process
that was killed, and waits half an hour for one that hangs. So each one here follows a wait(): it
sees in the key-value store of the process group that all have arrived, and looks in between whether
those that have not are alive. One process alone does the same work with nothing of this.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, distributed, nn

from hylora_kernels.support.console import note
from hylora_kernels.support.devices import free_memory

Value = TypeVar("Value")

SHORTEST_PAUSE = 0.0005  # seconds between two looks at the store, each of which takes 0.06 ms
LONGEST_PAUSE = 0.05
LOOK = 0.5  # seconds between two looks after the processes that are waited for
BEAT = 5.0  # seconds between two signs of life
# Seconds without a sign after which a process on another machine, or a stopped one, counts as lost.
# Some functions of other libraries hold Python's lock, and with it the signs, for many seconds.
SILENT = 300.0
ABSENT = 1800.0  # Seconds that a process may take until its first sign; torch's own limit.
LATE = 60.0  # Seconds after which a network file system shows a file that another machine wrote.
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostProcess(ConnectionError):
    """Another process of the run ended or is silent; the message names its rank.

    was_told: the process itself has said why.
    """

    def __init__(self, message: str, was_told: bool = False):
        super().__init__(message)
        self.was_told = was_told


class Processes:
    """The processes of a run, seen from one of them. All of them make the same calls in the same
    order; `stage` says in an error what was being done.

    store: that of the process group; None for one process alone.
    """

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1):
        self.rank, self.size, self._store = rank, size, store
        self._count, self._ended = 0, threading.Event()
        self._beats = dict.fromkeys(range(size), (0, time.monotonic()))
        self._is_noted = False
        self.local_size = 1
        if size > 1:
            process = psutil.Process()
            place = f"{_machine()} {process.pid} {process.create_time()}"
            store.set(f"place/{rank}", place)
            self._signs = threading.Thread(target=self._beat, daemon=True)
            self._signs.start()
            self.wait("starting")
            self.local_size = sum(self._place(r)[0] == _machine() for r in range(size))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------------------- dividing work

    def part(self, count: int) -> slice:
        """The places of 0..count - 1 that are this process's: every size-th one."""
        return slice(self.rank, count, self.size)

    def share(self, costs: Mapping[str, float]) -> set[str]:
        """The names of `costs` whose work is this process's. The first process's costs count; the
        dearest are given away first, each to the process with the least so far."""
        if self.size == 1:
            return set(costs)
        loads, own = [0.0] * self.size, set()
        costs = self.agreed(dict(costs))
        for name in sorted(costs, key=costs.__getitem__, reverse=True):
            rank = loads.index(min(loads))
            loads[rank] += costs[name]
            if rank == self.rank:
                own.add(name)
        return own

    def by_first(self, work: Callable[[], Value], stage: str) -> Value:
        """What `work` returns to the first process, which alone does it, with the threads of those
        on its machine that wait. The value is pickled."""
        if self.size == 1:
            return work()
        value = None
        if self.is_first:
            threads = torch.get_num_threads()
            torch.set_num_threads(threads * self.local_size)
            try:
                value = work()
            finally:
                torch.set_num_threads(threads)
        return self.agreed(value, stage)

    # -------------------------------------------------------------------------- exchanging results

    def agreed(self, value: Value, stage: str = "exchanging results") -> Value:
        """The first process's value, pickled."""
        if self.size == 1:
            return value
        self.wait(stage)
        held = [value]
        with self._collective(stage):
            distributed.broadcast_object_list(held)
        return held[0]

    def add(self, tensors: Iterable[Tensor], stage: str) -> None:
        """Add to each tensor, in place, those of the other processes: the result has the same bits
        in all of them."""
        if self.size == 1:
            return
        self.wait(stage)
        with self._collective(stage):
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def total(self, values: Iterable[float], stage: str) -> list[float]:
        """The sum over the processes of each value, in float64."""
        sums = torch.tensor([*values], dtype=torch.float64, device=self._device())
        self.add([sums], stage)
        return sums.tolist()

    def least(self, value: int) -> int:
        """The least of the processes' values."""
        if self.size == 1:
            return value
        held = torch.tensor(value, device=self._device())
        self.wait("starting")
        with self._collective("starting"):
            distributed.all_reduce(held, distributed.ReduceOp.MIN)
        return int(held)

    def _device(self) -> str:
        takes_cpu = self.size == 1 or "gloo" in distributed.get_backend_config()
        return "cpu" if takes_cpu else "cuda"

    # ------------------------------------------------------------------------------ shared folders

    def require_shared(self, folder: Path) -> None:
        """Raise OSError where this process doesn't see the first one's folder of this path."""
        if self.size == 1:
            return
        mark = folder / self.agreed(f".shared-{os.urandom(6).hex()}")
        if self.is_first:
            mark.touch()
        self.wait("starting")
        is_there = mark.exists()
        self.wait("starting")
        mark.unlink(missing_ok=True)
        if not is_there:
            raise OSError(
                f"the process of rank {self.rank} doesn't see {folder} of the first one: all need"
                " one cache, so put HYLORA_CACHE on a disk that their machines share"
            )

    def see(self, paths: Iterable[Path], stage: str) -> None:
        """Wait for all processes, and until this one sees the files that they have written."""
        if self.size == 1:
            return
        self.wait(stage)
        end = time.monotonic() + LATE
        for path in paths:
            while not path.exists():
                if time.monotonic() > end:
                    raise OSError(f"{path}, which another process wrote, is not there")
                time.sleep(LONGEST_PAUSE)

    # ------------------------------------------------------------------------------------- waiting

    def wait(self, stage: str) -> None:
        """Return when all processes have made this call. Raises LostProcess naming those that have
        not and are gone or silent."""
        if self.size == 1:
            return
        self._count += 1
        keys = [f"{self._count}/{rank}" for rank in range(self.size)]
        begun = looked = time.monotonic()
        with self._asking(stage):
            self._store.set(keys[self.rank], "")
            while not self._store.check(keys):
                if time.monotonic() - looked > LOOK:
                    missing = [r for r, key in enumerate(keys) if not self._store.check([key])]
                    self.require_alive(missing, stage)
                    looked = time.monotonic()
                waited = time.monotonic() - begun
                time.sleep(min(SHORTEST_PAUSE + 0.05 * waited, LONGEST_PAUSE))

    def require_alive(self, ranks: Iterable[int], stage: str) -> None:
        """Raise LostProcess naming those of the ranks that are gone or silent, or a process that
        has said why it stops."""
        if self._store.check(["failed"]):
            raise LostProcess(self._store.get("failed").decode(), was_told=True)
        now, gone, silent = time.monotonic(), [], []
        for rank in ranks:
            beats = self._store.add(f"beat/{rank}", 0)
            if beats != self._beats[rank][0]:
                self._beats[rank] = beats, now
            has_come = self._store.check([f"place/{rank}"])
            quiet = now - self._beats[rank][1]
            if has_come and not _is_running(*self._place(rank)):
                gone.append(rank)
            elif quiet > (SILENT if has_come else ABSENT):
                silent.append(rank)
            elif not has_come and quiet > LATE and not self._is_noted:
                self._is_noted = True
                note(f"waiting for {self._named([rank])}: all processes make the same call")
        if gone:
            raise LostProcess(
                f"{self._named(gone)} ended before the others were done, perhaps killed for want of"
                f" memory ({stage}). Finished work is kept: the same command continues"
            )
        if silent:
            raise LostProcess(
                f"{self._named(silent)} gave no sign for {SILENT:.0f} s ({stage}). Finished work is"
                " kept: the same command continues"
            )

    def fail(self, error: BaseException) -> bool:
        """Have the others end with this one's error, which is told to them; False if one has told
        another error or the same before."""
        if self.size == 1:
            return True
        words = f"{self._named([self.rank])} stopped: {type(error).__name__}: {error}"
        try:
            return self._store.compare_set("failed", "", words).decode() == words
        except RuntimeError:  # The store is gone, as its process may be.
            return True

    def close(self) -> None:
        """End the signs of life. The first process, which may hold the store, waits for the others
        to have done so."""
        self._ended.set()
        if self.size == 1:
            return
        self._signs.join(LOOK)
        with contextlib.suppress(RuntimeError):
            if not self.is_first:
                self._store.set(f"left/{self.rank}", "")
                return
            end = time.monotonic() + BEAT
            left = [f"left/{rank}" for rank in range(1, self.size)]
            while not self._store.check(left) and time.monotonic() < end:
                time.sleep(LONGEST_PAUSE)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # The store is gone.
            while not self._ended.wait(BEAT):
                self._store.add(f"beat/{self.rank}", 1)

    def _place(self, rank: int) -> tuple[str, int, float]:
        """(machine, process id, time of its start)."""
        machine, pid, start = self._store.get(f"place/{rank}").decode().rsplit(" ", 2)
        return machine, int(pid), float(start)

    def _named(self, ranks: Iterable[int]) -> str:
        names = [str(rank) for rank in ranks]
        plural = "s" if len(names) > 1 else ""
        return f"process{'es' if plural else ''} of rank{plural} {', '.join(names)} of {self.size}"

    @contextlib.contextmanager
    def _asking(self, stage: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's errors of a store are of this type.
            raise LostProcess(
                f"the process of rank 0, or torchrun, ended before the others were done ({stage})."
                " Finished work is kept: the same command continues"
            ) from error

    @contextlib.contextmanager
    def _collective(self, stage: str) -> Iterator[None]:
        """A loss in a collective, which breaks a connection, named."""
        try:
            yield
        except RuntimeError as error:
            others = [rank for rank in range(self.size) if rank != self.rank]
            end = time.monotonic() + 10 * LOOK
            with self._asking(stage):
                while time.monotonic() < end:
                    self.require_alive(others, stage)
                    time.sleep(LONGEST_PAUSE)
            raise LostProcess(
                f"{self._named(others)}: one of them doesn't answer ({stage}): {error}. Finished"
                " work is kept: the same command continues"
            ) from error


def free_memory_of_each(model: nn.Module, processes: Processes) -> int:
    """Bytes that are free for each process on the model's device, the same number in all."""
    device = next(model.parameters()).device
    shared_by = processes.local_size if device.type == "cpu" else 1
    return processes.least(free_memory(device) // shared_by)


ALONE = Processes()
_active: Processes | None = None


@contextlib.contextmanager
def together() -> Iterator[Processes]:
    """The processes that torchrun started, or that torch.distributed's default group has; ALONE
    for one process. Within another together() its own.

    The group is started where there is none, and stays until the process ends: each process gets
    the GPU of its local rank, NCCL for tensors there if there is one for each, and gloo else. An
    exception in one process ends all: the others raise LostProcess at their next call. So does a
    SIGTERM, which torchrun sends to the processes that are left when one was lost.
    """
    global _active
    if _active is not None or not _are_several():
        yield _active or ALONE
        return
    started = _start_group()
    _active = processes = _of_group()
    try:
        with _ended_by_sigterm(processes):
            yield processes
            processes.wait("finishing")
    except BaseException as error:
        processes.fail(error)
        atexit.unregister(_end_group)  # It may wait for the lost one.
        raise
    else:
        if started:
            atexit.register(_end_group)
    finally:
        _active = None
        processes.close()


def _are_several() -> bool:
    if not distributed.is_available():
        return False
    if distributed.is_initialized():
        return distributed.get_world_size() > 1
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def _start_group() -> bool:
    """True if there was none."""
    if distributed.is_initialized():
        return False
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus, backend = torch.cuda.device_count(), "gloo"
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % gpus)
        if int(os.environ.get("LOCAL_WORLD_SIZE", size)) <= gpus:
            backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend)
    return True


def _end_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _of_group() -> Processes:
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    rank = distributed.get_rank()
    # Another together() of this process has keys of its own.
    number = store.add(f"hylora/calls/{rank}", 1)
    prefixed = distributed.PrefixStore(f"hylora/{number}", store)
    return Processes(prefixed, rank, distributed.get_world_size())


@contextlib.contextmanager
def _ended_by_sigterm(processes: Processes) -> Iterator[None]:
    """Inside, SIGTERM raises LostProcess, or SystemExit where all others are alive."""

    def end(_number, _frame):
        others = [rank for rank in range(processes.size) if rank != processes.rank]
        with contextlib.suppress(RuntimeError):
            processes.require_alive(others, "ended by SIGTERM")
        raise SystemExit(128 + signal.SIGTERM)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _machine() -> str:
    """A name of this machine, and of its process ids where containers have their own."""
    with contextlib.suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _is_running(machine: str, pid: int, start: float) -> bool:
    """True if a process is alive, as far as this machine can know."""
    if machine != _machine():
        return True
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - start) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
