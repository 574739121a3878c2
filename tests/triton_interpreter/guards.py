"""Faults of a kernel that triton's interpreter would let pass: memory, races, shapes of tl.dot.

As long as `watching` lasts, a kernel sees addresses of a world of its own, a terabyte to each
argument, so a wrong offset can't land in another tensor unseen: every load, store and atomic has to
hit an element of the very tensor it came from, gaps between strided rows excluded. Then for every
launch, from nothing:

* no element is stored twice, neither by two lanes nor by two programs, and none after it was read;
* data that one program stored and another touches went through atomics of gpu scope: gathered
  by tl.debug_barrier (an atomic is one thread's), released by the one and acquired by the other; so
  is a counter, before a plain access to it. Vector clocks tell, in which a relaxed
  read-modify-write keeps a release alive, as in PTX;
* every side of tl.dot is at least 16.

A hand-over is judged by the memory order that the source asks for: a release or acquire that is
missing shows in any interleaving. The compiler's treatment of that order isn't seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton_interpreter.internals import Builder, Handle, linear, own_errors, replaced

_WORLD = 40  # bits of an argument's address space
_ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class KernelFault(Exception):
    """A kernel's fault, in any of the kinds below."""


class OutOfBounds(KernelFault):
    """An access outside the elements of the argument that its address came from."""


class Race(KernelFault):
    """Memory, or a value read from it, depends on which program came first."""


class SmallDot(KernelFault):
    """A product that tensor cores don't have."""


class Cells:
    """The accesses of a launch to one storage, by byte; an element counts as its first byte."""

    def __init__(self, size: int):
        self.writer = np.zeros(size, np.int32)  # program + 1, 0 for none
        self.written_at = np.zeros(size, np.int64)  # the barrier of the writer's that gathers it
        self.loaded = np.zeros(size, bool)
        self.atomics: dict[int, Atomic] = {}
        self.stored = False


@dataclass
class Atomic:
    """One element that atomics touch."""

    released: np.ndarray  # [2 programs], the clock that an acquire takes over
    touched_at: np.ndarray  # [programs], each one's count of releases after its last atomic here


@dataclass
class Argument:
    """One tensor that a kernel was given."""

    base: int  # where the kernel believes it begins
    real: int  # where it does
    size: int  # of an element, in bytes
    inside: np.ndarray  # which elements of its span, in steps of one, are its own
    offset: int  # of its first element in its storage, in bytes
    cells: Cells

    @classmethod
    def of(cls, tensor: Tensor, number: int, storages: dict[int, Cells]) -> Argument:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = Cells(storage.nbytes())
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        inside = np.zeros(span if tensor.numel() else 0, bool)
        if tensor.numel():
            strides = tensor.stride()  # of booleans, elements and bytes are the same
            np.lib.stride_tricks.as_strided(inside, tensor.shape, strides)[...] = True
        return cls(
            # The middle, so that an access before the first element is this argument's fault.
            base=(number << _WORLD) + (1 << _WORLD - 1),
            real=tensor.data_ptr(),
            size=tensor.element_size(),
            inside=inside,
            offset=tensor.data_ptr() - storage.data_ptr(),
            cells=storages[storage.data_ptr()],
        )


@dataclass
class Launch:
    """All that is known of the launch that runs."""

    arguments: dict[int, Argument] = field(default_factory=dict)  # by their address's upper bits
    storages: dict[int, Cells] = field(default_factory=dict)
    # [program, what it knows of: everyone's barriers, then everyone's releases]
    clocks: np.ndarray | None = None

    def give(self, tensor: Tensor) -> int:
        """The address under which the kernel is to know `tensor`."""
        number = len(self.arguments) + 1
        self.arguments[number] = argument = Argument.of(tensor, number, self.storages)
        return argument.base

    def begin(self, programs: int) -> None:
        self.clocks = np.zeros((programs, 2 * programs), np.int64)

    def barrier(self, me: int) -> None:
        self.clocks[me, me] += 1

    # --------------------------------------------------------------------------------- addresses

    def find(self, pointers: Handle, mask, what: str) -> tuple[np.ndarray, Cells, np.ndarray]:
        """(real addresses of all lanes, the cells, the places there of the lanes in the mask).

        Raises OutOfBounds where one of those is no element of its argument.
        """
        lanes = np.ones(1, bool) if mask is None else mask.data
        wanted = pointers.data[np.broadcast_to(lanes, pointers.data.shape)].astype(np.int64)
        if not wanted.size:
            return pointers.data, Cells(0), wanted
        argument = self.arguments.get(int(wanted[0]) >> _WORLD)
        if argument is None or ((wanted >> _WORLD) != (wanted[0] >> _WORLD)).any():
            raise OutOfBounds(f"{what} outside every argument")
        size = pointers.get_element_ty().primitive_bitwidth // 8
        element, rest = np.divmod(wanted - argument.base, argument.size)
        within = (rest == 0) & (element >= 0) & (element < argument.inside.size)
        within &= size == argument.size
        if argument.inside.size:
            within &= argument.inside[element.clip(0, argument.inside.size - 1)]
        if not within.all():
            first = int(element[np.argmin(within)])
            raise OutOfBounds(
                f"{what}, {(~within).sum()} of {within.size} lanes; the first at "
                f"element {first} of the {argument.inside.size} that argument spans"
            )
        shift = np.uint64((argument.base - argument.real) % (1 << 64))
        return pointers.data - shift, argument.cells, wanted - argument.base + argument.offset

    # ------------------------------------------------------------------------------------- races

    def load(self, me: int, cells: Cells, places: np.ndarray) -> None:
        cells.loaded[places] = True
        if cells.stored:
            self._handed_over(me, cells, places, "loads")
        if cells.atomics:
            self._left_alone(me, cells, places, "loads")

    def store(self, me: int, cells: Cells, places: np.ndarray) -> None:
        if not places.size:
            return
        if np.unique(places).size != places.size:
            raise Race(f"two lanes of a store by program {me} go to one element")
        if cells.loaded[places].any():
            raise Race(f"program {me} stores to what was loaded before")
        if cells.stored:
            self._handed_over(me, cells, places, "stores to")
            if cells.writer[places].any():
                raise Race(f"program {me} stores to what was stored before")
        if cells.atomics:
            self._left_alone(me, cells, places, "stores")
        cells.stored = True
        cells.writer[places] = me + 1
        cells.written_at[places] = self.clocks[me, me] + 1

    def atomic(self, me: int, cells: Cells, places: np.ndarray, sem, scope) -> None:
        """An atomic that is about to happen."""
        if cells.stored:
            self._handed_over(me, cells, places, "does an atomic on")
        wide = scope != ir.MEM_SYNC_SCOPE.CTA
        known, programs = self.clocks[me], len(self.clocks)
        for place in places.tolist():
            atomic = cells.atomics.setdefault(
                place, Atomic(np.zeros(2 * programs, np.int64), np.zeros(programs, np.int64))
            )
            atomic.touched_at[me] = self._releases(me)[me] + 1
            if wide and sem in _ACQUIRES:
                np.maximum(known, atomic.released, out=known)
            if wide and sem in _RELEASES:
                known[programs + me] += 1
                np.maximum(atomic.released, known, out=atomic.released)

    def _releases(self, me: int) -> np.ndarray:
        """[programs], how many releases of everyone's `me` knows of."""
        return self.clocks[me, len(self.clocks) :]

    def _handed_over(self, me: int, cells: Cells, places: np.ndarray, what: str) -> None:
        writer = cells.writer[places]
        foreign = (writer != 0) & (writer != me + 1)
        if foreign.any():
            known = self.clocks[me, writer[foreign] - 1] >= cells.written_at[places[foreign]]
            if not known.all():
                other = int(writer[foreign][np.argmin(known)]) - 1
                raise Race(
                    f"program {me} {what} what program {other} stored, and that one didn't "
                    "gather (tl.debug_barrier) and release it, or this one didn't acquire it"
                )

    def _left_alone(self, me: int, cells: Cells, places: np.ndarray, what: str) -> None:
        for place in places.tolist():
            atomic = cells.atomics.get(place)
            if atomic and (np.delete(atomic.touched_at - self._releases(me), me) > 0).any():
                raise Race(f"program {me} {what} where others' atomics go on")


# A launch at a time, as in the interpreter itself.
_launch: Launch | None = None


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Raise KernelFault at the first fault of any kernel that is launched inside the `with`."""
    executor = interpreter.GridExecutor
    stock_convert, stock_run = interpreter._implicit_cvt, executor.__call__
    names = ("set_grid_dim", "create_masked_load", "create_masked_store", "create_barrier")
    names += ("create_atomic_rmw", "create_atomic_cas", "create_dot")
    stock = {name: getattr(Builder, name) for name in names}

    def run(self, *args_dev, **kwargs):
        global _launch
        _launch = Launch()
        try:
            with own_errors():
                return stock_run(self, *args_dev, **kwargs)
        finally:
            _launch = None

    def _implicit_cvt(arg):
        converted = stock_convert(arg)
        if isinstance(arg, Tensor):
            converted.handle.data = np.array([_launch.give(arg)], np.uint64)
        return converted

    def set_grid_dim(self, nx, ny, nz):
        stock["set_grid_dim"](self, nx, ny, nz)
        _launch.begin(nx * ny * nz)

    def find(builder, pointers, mask, what):
        me = linear(builder.grid_idx, builder.grid_dim)
        addresses, *where = _launch.find(pointers, mask, f"{what} of program {me}")
        return Handle(addresses, pointers.dtype), me, *where

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        ptrs, *access = find(self, ptrs, mask, "load")
        _launch.load(*access)
        return stock["create_masked_load"](self, ptrs, mask, other, cache_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        ptrs, *access = find(self, ptrs, mask, "store")
        _launch.store(*access)
        return stock["create_masked_store"](self, ptrs, value, mask, cache_policy)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        ptr, *access = find(self, ptr, mask, "atomic")
        _launch.atomic(*access, sem, scope)
        return stock["create_atomic_rmw"](self, rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        ptr, *access = find(self, ptr, None, "atomic")
        _launch.atomic(*access, sem, scope)
        return stock["create_atomic_cas"](self, ptr, cmp, val, sem, scope)

    def create_barrier(self):
        _launch.barrier(linear(self.grid_idx, self.grid_dim))
        return stock["create_barrier"](self)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        sides = (*a.data.shape[-2:], b.data.shape[-1])
        if min(sides) < 16:
            raise SmallDot(f"tl.dot of sides {sides}: each has to be 16 or more")
        return stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)

    mine = locals()
    with (
        replaced(interpreter, _implicit_cvt=_implicit_cvt),
        replaced(executor, __call__=run),
        replaced(Builder, **{name: mine[name] for name in names}),
    ):
        yield
