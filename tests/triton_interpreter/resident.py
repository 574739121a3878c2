"""All programs of a grid alive at once in triton's interpreter, in an order that a seed draws.

The interpreter runs one program after the other to its end, so a program that waits for a later one
would hang, and one that forgets to wait would never be seen to. Here every program has a thread, of
which one runs at a time. Before and after every atomic another may be drawn to go on; some programs
are drawn rarely, so a program that doesn't wait for their data misses it. If no atomic changes
anything any more, all wait for each other, and that is a Deadlock.

Between atomics a program isn't interrupted, and memory is always up to date. So a wrong memory
order of the atomics can't be seen here; guards.py judges it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import triton.language as tl  # noqa: F401 - the interpreter asks for it in what it calls
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton_interpreter.internals import Builder, own_errors, replaced

# A program that has done so many atomics while none changed anything is waiting for a change.
_PATIENCE = 8
_ADDS = (ir.ATOMIC_OP.ADD, ir.ATOMIC_OP.FADD, ir.ATOMIC_OP.OR, ir.ATOMIC_OP.XOR)


class Deadlock(Exception):
    """Every program that is left waits, and none of them does anything that ends the waiting."""


class _Abandoned(BaseException):
    """Ends a program after another one has failed; no Exception, lest the interpreter wrap it."""


class Programs:
    """The programs of one launch, taking turns."""

    def __init__(self, run: Callable[[], None], grid: tuple[int, int, int], draw: random.Random):
        self.run, self.draw = run, draw
        x, y, z = (range(n) for n in grid)
        self.places = [(i, j, k) for i in x for j in y for k in z]
        # From one time in a hundred to always: a uniform draw hardly ever keeps one back for long.
        self.weights = [max(0.01, draw.random() ** 3) for _ in self.places]
        self.turns = [threading.Semaphore(0) for _ in self.places]
        self.alive = set(range(len(self.places)))
        self.waited = dict.fromkeys(self.alive, 0)  # atomics since anything changed
        self.finished = threading.Event()
        self.failure: BaseException | None = None
        self.order: list[int] = []

    def run_all(self) -> None:
        """Return when no thread is left, or raise the first error of a program."""
        threads = [threading.Thread(target=self._live, args=(me,)) for me in sorted(self.alive)]
        for thread in threads:
            thread.start()
        try:
            self._pass_on()
            self.finished.wait()
        except BaseException as interrupt:
            self.failure = interrupt
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def pause(self) -> None:
        """Called by the program that runs: from here on another one may."""
        me = self.order[-1]
        self._pass_on()
        self._await_turn(me)

    def after_atomic(self, changed: bool) -> None:
        me = self.order[-1]
        if changed:
            self.waited = dict.fromkeys(self.alive, 0)
            return
        self.waited[me] += 1
        if not self._awake():
            raise Deadlock(f"programs {sorted(self.alive)} wait, and nothing changes any more")

    def _live(self, me: int) -> None:
        try:
            self._await_turn(me)
            self.run()
        except _Abandoned:
            pass
        except BaseException as failure:
            self.failure = self.failure or failure
        self.alive.discard(me)
        self.waited = dict.fromkeys(self.alive, 0)
        if self.alive:
            self._pass_on()
        else:
            self.finished.set()

    def _pass_on(self) -> None:
        awake = self._awake() if self.failure is None else sorted(self.alive)
        chosen = self.draw.choices(awake, [self.weights[program] for program in awake])[0]
        self.order.append(chosen)
        self.turns[chosen].release()

    def _awake(self) -> list[int]:
        """The programs that may go on without anything changing."""
        return [program for program in sorted(self.alive) if self.waited[program] < _PATIENCE]

    def _await_turn(self, me: int) -> None:
        self.turns[me].acquire()
        if self.failure is not None:
            raise _Abandoned
        interpreter.interpreter_builder.set_grid_idx(*self.places[me])


@contextlib.contextmanager
def together(seed: int) -> Iterator[list[list[int]]]:
    """Run the programs of every launch inside the `with` together, in an order drawn by `seed`.

    Yields a list that gets, for every launch, the numbers of the programs in the order of their
    turns. Raises Deadlock, or what a program raised, once no program runs any more.
    """
    draw = random.Random(seed)
    orders: list[list[int]] = []
    running: Programs | None = None
    executor = interpreter.GridExecutor
    names = ("create_atomic_rmw", "create_atomic_cas", "create_atomic_poll")
    stock = {name: getattr(Builder, name) for name in names}
    stock_run = executor.__call__

    def run(self, *args_dev, **kwargs):
        self.fn = at_the_last(self.fn)
        with own_errors():
            return stock_run(self, *args_dev, **kwargs)

    def at_the_last(kernel):
        """A kernel for the interpreter to call once a program: the last call runs them all."""

        @functools.wraps(kernel)
        def call(**args):
            nonlocal running
            builder = interpreter.interpreter_builder
            grid = builder.grid_dim
            if builder.grid_idx != tuple(n - 1 for n in grid):
                return
            running = Programs(functools.partial(kernel, **args), grid, draw)
            orders.append(running.order)
            try:
                running.run_all()
            finally:
                running = None

        call.__signature__ = inspect.signature(kernel)
        return call

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        running.pause()
        before = stock["create_atomic_rmw"](self, rmwOp, ptr, val, mask, sem, scope)
        running.after_atomic(changed=rmwOp not in _ADDS or bool(np.any(val.data)))
        running.pause()
        return before

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        running.pause()
        before = stock["create_atomic_cas"](self, ptr, cmp, val, sem, scope)
        running.after_atomic(changed=bool(np.any(before.data == cmp.data)))
        running.pause()
        return before

    def create_atomic_poll(self, ptr, expected, timeout_ns, sem, scope):
        raise NotImplementedError("tl.atomic_poll would never let another program go on")

    mine = locals()
    with (
        replaced(executor, __call__=run),
        replaced(Builder, **{name: mine[name] for name in names}),
    ):
        yield orders
