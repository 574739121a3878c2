"""Every op of the C++ CPU library on ragged shapes, as a program: a crash ends its process alone,
and an instrumented copy of the library runs it too.

    PYTHONPATH=tests python tests/helpers/cpu_battery.py LIBRARY LEVEL...
        [--guard] [--quick] [--few-rows]

Each result is checked against float64. With --guard every operand is put into memory of its own
between two pages that can't be touched, once flush with the one before it and once with the one
behind it, and the bits have to be those of ordinary memory. --quick takes two numbers of rows for
each shape rather than all. --few-rows takes two tiles of rows of LONG_SUMS rather than four, which
take most of an instrumented copy's time; all lie in one block of 192 either way. Each level is a
child forked before the library is loaded, which chooses its level then: importing torch takes half
as long as the calls. Prints the levels and how many calls; the first that fails ends it.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
import traceback

import torch
from helpers import row_ops
from helpers.quantized_battery import PLANES, run_quantized
from torch.utils._pytree import tree_map_only

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}
# K, N, r, ra
SHAPES = [(1, 1, 1, 0), (33, 17, 5, 3), (70, 37, 16, 8), (64, 96, 32, 16), (129, 257, 48, 33)]
SHAPES += [(576, 200, 40, 16), (31, 33, 33, 1), (40, 70, 650, 5), (40, 1400, 650, 5)]
LONG_SUMS = (801, 833, 800, 16)  # both products in several passes
QUANTIZED_SHAPES = [(1, 1, 1, 0), (70, 37, 16, 8), (129, 257, 48, 33), LONG_SUMS]
ROWS = [1, 3, 16, 17, 40, 70, 300]  # up to 64 threads share a block's panels, above it split rows
ops = torch.ops.hylora
PAGE = mmap.PAGESIZE


class Fenced:
    """Copies of tensors that end, or start, at a page without access; all go at once."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
        self.libc.mmap.argtypes += [ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.mappings = []

    def copy(self, tensor: torch.Tensor | None, at_end: bool) -> torch.Tensor | None:
        """Its storage is cut to what its strides reach."""
        if tensor is None or tensor.numel() == 0:
            return tensor
        reach = sum((s - 1) * d for s, d in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = reach * tensor.element_size()
        inside = -(-size // PAGE) * PAGE
        base = self.libc.mmap(None, inside + 2 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value), "mmap failed"
        self.mappings.append((base, inside + 2 * PAGE))
        assert self.libc.mprotect(base + PAGE, inside, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        start = base + PAGE + (inside - size if at_end else 0)
        memory = (ctypes.c_char * size).from_address(start)
        fenced = torch.frombuffer(memory, dtype=tensor.dtype, count=reach)
        return fenced.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def free(self) -> None:
        for base, size in self.mappings:
            self.libc.munmap(base, size)
        self.mappings.clear()


class Battery:
    def __init__(self, guard: bool):
        self.fence = Fenced() if guard else None
        self.calls = 0

    def call(self, op, *arguments):
        """The op's result on the arguments as they are, and the same bits on fenced copies."""
        result = op(*arguments)
        self.calls += 1
        if self.fence is None:
            return result
        for at_end in (True, False):
            fenced = tree_map_only(
                torch.Tensor, lambda t, at_end=at_end: self.fence.copy(t, at_end), arguments
            )
            again = op(*fenced)
            for one, other in zip(tensors(result), tensors(again), strict=True):
                assert torch.equal(bits(one), bits(other)), (op, at_end, describe(arguments))
            del fenced, again
            self.fence.free()
        return result

    def pack(self, W: torch.Tensor | None) -> torch.Tensor | None:
        return None if W is None else self.call(ops.cpu_pack, W)

    def close(self, got: torch.Tensor, wanted: torch.Tensor, what: object) -> None:
        """Within the dtype's tolerance of the largest value; NaN fails."""
        assert got.shape == wanted.shape, (what, got.shape, wanted.shape)
        if wanted.numel():
            off = (got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1)
            assert off <= TOLERANCE[got.dtype], (what, float(off))


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def describe(arguments) -> list:
    return [(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape) / max(shape[-1], 1) ** 0.5).to(dtype)


def rows(M: int, K: int, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """x [M, K], or every row of it in a longer one."""
    return torch.randn(M, K + 5 if strided else K).to(dtype)[:, :K]


def transposed(W: torch.Tensor | None) -> torch.Tensor | None:
    return None if W is None else W.T


def run_matrix(t: Battery, N: int, K: int, dtype: torch.dtype) -> None:
    """Packing, its inverse, rows out of panels."""
    W = random(N, K, dtype=dtype)
    panels = t.pack(W)
    for other in (W.T.contiguous().T, torch.cat([W, W], 1)[:, :K]):
        assert torch.equal(bits(t.pack(other)), bits(panels)), "packing a strided matrix"
    assert torch.equal(bits(t.call(ops.cpu_unpack, panels, N, K)), bits(W))
    ids = torch.tensor([[0, N - 1], [N // 2, 0]])
    assert torch.equal(bits(t.call(ops.cpu_rows, panels, N, K, ids)), bits(W[ids]))


def run_linear(t: Battery, x: torch.Tensor, N: int, products: int) -> None:
    W, bias = random(N, x.shape[1], dtype=x.dtype), random(N, dtype=x.dtype)
    y = t.call(ops.cpu_linear, x, t.pack(W), bias, N, products)
    t.close(y, x.double() @ W.double().T + bias.double(), ("linear", x.shape, N, products))


def run_pair(t: Battery, x, SVh, U, A, B, bias, alpha, products) -> None:
    (N, r), ra, K = U.shape, 0 if A is None else len(A), x.shape[1]
    h_a = None if A is None else x.double() @ A.double().T
    wanted = x.double() @ SVh.double().T @ U.double().T + bias.double()
    wanted = wanted if A is None else wanted + alpha * h_a @ B.double().T
    what = ("pair", x.shape, N, r, ra, products)
    separate = (t.pack(SVh), t.pack(A), t.pack(U), t.pack(B))
    sizes = (bias, None, r, ra, N, alpha)
    y, emitted = t.call(ops.cpu_layer, x, *separate, *sizes, True, False, products)
    t.close(y, wanted, what)
    if ra:
        t.close(emitted, h_a, ("h_a of", *what))
        joined = (t.pack(torch.cat([SVh, A])), None, t.pack(torch.cat([U, B], 1)), None)
        y, _ = t.call(ops.cpu_layer, x, *joined, *sizes, False, False, products)
        t.close(y, wanted, ("joined", *what))
        run_packed(t, x, y, joined, sizes, products)
    else:
        run_packed(t, x, y, separate, sizes, products)
    dy = torch.randn(len(x), N).to(x.dtype)
    weights = (t.pack(U.T), t.pack(transposed(B)), t.pack(SVh.T), t.pack(transposed(A)))
    sizes = (None, None, r, ra, K, alpha)
    dx, dh_a = t.call(ops.cpu_layer, dy, *weights, *sizes, True, True, products)
    check_backward(t, dx, dh_a, dy.double() @ U.double(), dy, SVh, A, B, alpha, what)


def run_packed(t: Battery, x, y, weights, sizes, products) -> None:
    """The same layer as one tensor, alone and beside itself and a matrix, gives the same bits, and
    its parts are what was packed."""
    bias, table, r, ra, N, alpha = sizes
    layer = t.call(ops.cpu_pack_layer, x, *weights, table, x.shape[1], r, ra, N, alpha)
    again = t.call(ops.cpu_packed_layer, x, layer, bias, N, products)
    assert torch.equal(bits(again), bits(y)), ("packed", x.shape, N, r, ra)
    matrix = t.pack(random(N, x.shape[1], dtype=x.dtype))
    group = ([layer, matrix, layer], [0, N, 0], [bias, None, bias], [products] * 3, 3 * N)
    first, _, last = t.call(ops.cpu_packed_group, x, *group).chunk(3, 1)
    for member in (first, last):
        assert torch.equal(bits(member), bits(y)), ("grouped", x.shape, N, r, ra)
    for part, panels in enumerate(weights):
        W = t.call(ops.cpu_unpack_part, layer, part)
        assert torch.equal(bits(t.pack(W)), bits(panels)) if panels is not None else not W.numel()


def check_backward(t: Battery, dx, emitted, dh_s, dy, SVh, A, B, alpha, what) -> None:
    wanted = dh_s @ SVh.double()
    if A is not None:
        dh_a = alpha * dy.double() @ B.double()
        t.close(emitted, dh_a, ("dh_a of", *what))
        wanted = wanted + dh_a @ A.double()
    t.close(dx, wanted, ("backward of", *what))


def run_pivoted(t: Battery, x, SVh, A, B, bias, alpha, products) -> None:
    r, N, ra, K = len(SVh), len(bias), 0 if A is None else len(A), x.shape[1]
    pivots = torch.randperm(N)[:r].sort().values.int()
    others = torch.tensor([i for i in range(N) if i not in set(pivots.tolist())], dtype=torch.long)
    U = random(N - r, r, dtype=x.dtype)
    sorted_B = None
    if B is not None:
        padding = B.new_zeros(-r % 32, ra)
        sorted_B = torch.cat([B[pivots.long()], padding, B[others]])
    table = t.call(ops.cpu_pivot_table, pivots, N)
    h_s = x.double() @ SVh.double().T
    wanted = bias.double().repeat(len(x), 1)
    wanted[:, pivots.long()] += h_s
    wanted[:, others] += h_s @ U.double().T
    wanted = wanted if A is None else wanted + alpha * (x.double() @ A.double().T) @ B.double().T
    what = ("pivoted", x.shape, N, r, ra, products)
    separate = (t.pack(SVh), t.pack(A), t.pack(U), t.pack(sorted_B))
    sizes = (bias, table, r, ra, N, alpha)
    y, _ = t.call(ops.cpu_layer, x, *separate, *sizes, False, False, products)
    t.close(y, wanted, what)
    if A is not None:
        of_pivots = torch.nn.functional.pad(B[pivots.long()], (r % 32, 0))
        P, Q = torch.cat([SVh, A]), torch.cat([U, B[others]], 1)
        joined = (t.pack(P), None, t.pack(Q), t.pack(of_pivots))
        y, _ = t.call(ops.cpu_layer, x, *joined, *sizes, False, False, products)
        t.close(y, wanted, ("joined", *what))
        run_packed(t, x, y, joined, sizes, products)
    else:
        run_packed(t, x, y, separate, sizes, products)
    dy = torch.randn(len(x), N).to(x.dtype)
    dh_s = dy[:, pivots.long()].double() + dy[:, others].double() @ U.double()
    weights = (t.pack(U.T), t.pack(transposed(sorted_B)), t.pack(SVh.T), t.pack(transposed(A)))
    sizes = (None, table, r, ra, K, alpha)
    dx, dh_a = t.call(ops.cpu_layer, dy, *weights, *sizes, True, True, products)
    check_backward(t, dx, dh_a, dh_s, dy, SVh, A, B, alpha, what)


def run_adapter_gradients(t: Battery, M: int, ra: int, N: int, dtype: torch.dtype) -> None:
    """a is strided: its rows are parts of longer ones."""
    a, b = rows(M, ra, dtype, True), rows(M, N, dtype, False)
    for sums in (False, True):
        got = t.call(ops.cpu_adapter_gradients, a, b, 0.5, sums)
        wanted = 0.5 * a.double().T @ b.double()
        wanted = torch.cat([wanted, b.double().sum(0, keepdim=True)]) if sums else wanted
        t.close(got, wanted, ("adapter gradients", M, ra, N, sums))


def run_shape(t: Battery, M: int, shape: tuple[int, ...], dtype: torch.dtype, products: int):
    K, N, r, ra = shape
    x = rows(M, K, dtype, strided=(M + K) % 2 == 1)
    SVh, U, bias = random(r, K, dtype=dtype), random(N, r, dtype=dtype), random(N, dtype=dtype)
    A = random(ra, K, dtype=dtype) if ra else None
    B = random(N, ra, dtype=dtype) if ra else None
    run_linear(t, x, N, products)
    run_pair(t, x, SVh, U, A, B, bias, 0.37, products)
    if r <= N:
        run_pivoted(t, x, SVh, A, B, bias, 0.37, products)
    if ra and products == 0:
        run_adapter_gradients(t, M, ra, N, dtype)


def run_attention(t: Battery, dtype: torch.dtype, **case) -> None:
    case = row_ops.AttentionCase(spare=0, **case)
    q, k, v = case.draw(dtype)
    first = None if case.first_key is None else torch.tensor(case.first_key)
    options = (first, case.keys, case.window, case.scale, case.softcap, case.pieces)
    got = t.call(ops.cpu_attention, q, k, v, *options)
    t.close(got, row_ops.attention(case, q.double(), k.double(), v.double()), case)


def rotary(x, y, *arguments) -> torch.Tensor:
    ops.cpu_rotary(x, y, *arguments)
    return y.clone()


def run_row_ops(t: Battery, width: int, dtype: torch.dtype) -> None:
    """Rows and heads of this many numbers."""
    for keys, queries, pieces in ((1, 1, 1), (67, 1, 3), (65, 66 - width % 60, 1)):
        run_attention(t, dtype, size=width, keys=keys, queries=min(keys, queries), pieces=pieces)
    run_attention(t, dtype, size=width, sequences=2, first_key=(0, 30), keys=40, window=25)
    x, weight, bias = rows(3, width, dtype, strided=True), torch.rand(width), torch.randn(width)
    for centers in (False, True):
        y, _ = t.call(ops.cpu_norm, x, 1, weight, bias, 1e-5, centers, False, None, 1.0)
        exact = row_ops.norm(x.double(), weight, bias, 1e-5, centers, False)
        t.close(y, exact, ("norm", width, centers))
    _, total = t.call(ops.cpu_norm, x, 1, None, None, 1e-5, False, True, x, 1.0)
    assert torch.equal(bits(total), bits(x + x))
    heads = torch.randn(2, 3, 4, width).to(dtype)
    angles, positions = torch.rand(5, width // 2), torch.randint(5, (2, 3))
    tables = (angles.cos(), angles.sin(), positions)
    for interleaved in (False, True):
        y = t.call(rotary, heads, torch.zeros_like(heads), *tables, interleaved)
        t.close(y, row_ops.rotary(heads.double(), *tables, interleaved), ("rotary", width))
    for name, function in row_ops.ACTIVATIONS.items():
        y = t.call(ops.cpu_activation, x, x, name, 0.0)
        t.close(y, function(x.double()) * x.double(), (name, width))
    t.close(t.call(ops.cpu_add, x, x, 0.5), 1.5 * x.double(), ("add", width))
    pieces = min(width, 3)
    assert torch.equal(t.call(ops.cpu_argmax, x, pieces), x.argmax(1)), ("argmax", width)


def run(library: str, guard: bool, quick: bool, few_rows: bool) -> None:
    torch.ops.load_library(library)
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    t = Battery(guard)
    kinds = [(torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 0)]
    kinds += [(torch.float32, 3), (torch.float32, 6), (torch.float16, 3)]
    for i, (shape, (dtype, products)) in enumerate(itertools.product(SHAPES, kinds)):
        run_matrix(t, shape[1], shape[0], dtype)
        few, many = (i + i // 6) % 3, 3 + (i + i // 3) % 4  # quick: two numbers of rows, in turn
        for M in (ROWS[few], ROWS[many]) if quick else ROWS:
            run_shape(t, M, shape, dtype, products)
    for dtype, products in kinds:
        run_shape(t, 36 if few_rows else 100, LONG_SUMS, dtype, products)
    for i, (shape, bits) in enumerate(itertools.product(QUANTIZED_SHAPES, PLANES)):
        for M in ROWS[i % 7 :: 7 if quick else 3]:
            dtype, products = kinds[(i + i // 6 + M) % 6]
            M = min(M, 70) if few_rows and shape == LONG_SUMS else M
            run_quantized(t, rows(M, shape[0], dtype, strided=M % 2 == 1), shape, bits, products)
    for width, dtype in itertools.product((1, 7, 33, 64, 80, 529), TOLERANCE):
        run_row_ops(t, width, dtype)
    print(ops.cpu_isa(), t.calls, flush=True)


def in_a_child(level: str, library: str, *options: bool) -> int:
    """Exit code of run(library, *options) at this level, negative for a signal's."""
    child = os.fork()
    if child == 0:
        os.environ["HYLORA_ISA"] = level
        try:
            run(library, *options)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(library: str, *words: str) -> None:
    options = [name in words for name in ("--guard", "--quick", "--few-rows")]
    for level in words:
        if not level.startswith("--"):
            code = in_a_child(level, library, *options)
            if code != 0:
                sys.exit(f"{level}: exit code {code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
