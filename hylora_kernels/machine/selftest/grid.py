"""The grid of a selftest: sizes, dtypes and forms, random tensors for them, and a plan of cases for
each backend and device. The tests draw their tensors here too."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hylora_kernels.weights import Weights

FORMS = ("pair", "pivoted", "dense")  # dense: pivoted at rank N
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 3, 16, 17, 70, 300)
RAGGED, ALIGNED, BARE = (129, 65, 31, 33), (64, 96, 32, 16), (53, 37, 29, 0)  # K, N, r, ra
SIZES = (RAGGED, ALIGNED, BARE, (1, 3, 1, 1), (37, 53, 7, 8), (256, 384, 96, 16))
# The CPU kernels sum both products in several passes, as they never do in smaller sizes.
LONG_SUMS = (801, 833, 800, 16)
LAYERS = ((576, 1536, 208, 16), (2048, 5632, 768, 32), (4096, 11008, 1536, 32))
LAYOUTS = ("contiguous", "padded", "every_second", "transposed")


class Call(NamedTuple):
    """svd_lora_linear's arguments in its order, and a gradient [M, N] for its output."""

    x: Tensor
    SVh: Tensor
    U: Tensor
    A: Tensor | None
    B: Tensor | None
    bias: Tensor | None
    alpha: float
    pivots: Tensor | None
    dy: Tensor

    def in_float64(self) -> Call:
        wide = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self)
        return Call(*wide)


@dataclass(frozen=True)
class Case:
    """One point of the grid. sizes: K, N, r, ra."""

    M: int
    sizes: tuple[int, int, int, int]
    form: str
    layout: str = "contiguous"
    bias: bool = True
    alpha: float = 0.37

    def __str__(self):
        K, N, r, ra = self.sizes
        return f"M={self.M} {K}x{N} r{r}+{ra} {self.form} x {self.layout} alpha {self.alpha:g}"

    def call(self, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
        """Random tensors, scaled for outputs of order one."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape, fan_in=1):
            values = torch.randn(shape, generator=generator, device=device) / max(fan_in, 1) ** 0.5
            return values.to(dtype)

        def permutation(N):
            return torch.randperm(N, generator=generator, device=device)

        x, weights = draw_inputs(
            *(draw, permutation, (self.M,), self.sizes, self.form, self.layout),
            *(self.bias, self.alpha),
        )
        return Call(x, *weights, in_layout(draw, (self.M,), weights.out_features, self.layout))


def draw_inputs(
    draw: Callable[..., Tensor],
    permutation: Callable[[int], Tensor],
    lead: tuple[int, ...],
    sizes: tuple[int, int, int, int],
    form: str,
    layout: str,
    bias: bool,
    alpha: float,
) -> tuple[Tensor, Weights]:
    """(x [*lead, K] in a layout, weights) of a form; sizes: K, N, r, ra.

    draw(*shape, fan_in=...) gives random numbers scaled by 1 / sqrt(fan_in), permutation(N) a
    random order of N outputs. Both are called in one order, so a seed stands for the same numbers.
    """
    K, N, rank, lora_rank = sizes
    rank, pivots = (N if form == "dense" else rank), None
    if form != "pair":
        pivots = permutation(N)[:rank].sort().values.int()
    A = draw(lora_rank, K, fan_in=K) if lora_rank else None
    B = draw(N, lora_rank, fan_in=lora_rank) if lora_rank else None
    x = in_layout(draw, lead, K, layout)
    SVh = draw(rank, K, fan_in=K)
    U = draw(N if pivots is None else N - rank, rank, fan_in=rank)
    return x, Weights(SVh, U, A, B, draw(N) if bias else None, alpha, pivots)


def in_layout(
    draw: Callable[..., Tensor], lead: tuple[int, ...], columns: int, layout: str
) -> Tensor:
    """Random [*lead, columns] in one of LAYOUTS: contiguous, or a view of a larger tensor."""
    if layout == "padded":
        return draw(*lead, columns + 3)[..., :columns]
    if layout == "every_second":
        return draw(*lead, 2 * columns)[..., ::2]
    if layout == "transposed":
        return draw(columns, *lead).movedim(0, -1)
    return draw(*lead, columns)


class Entry(NamedTuple):
    """One case of a plan.

    launches: the number of launches to force on it, besides the backend's own choice. dtypes: the
    dtypes to run it in.
    """

    case: Case
    launches: int
    dtypes: tuple[torch.dtype, ...]


def plan(name: str, device: torch.device, full: bool) -> list[Entry]:
    """The cases for backend `name` on a device."""
    if name == "triton" and device.type == "cpu":  # the interpreter: slow, and no bfloat16
        if full:
            return [Entry(case, 9, DTYPES[1:]) for case in _cross(SIZES[:4], (1, 3, 17, 70))]
        cases = [Entry(case, 0, DTYPES[2:]) for case in _cross(((37, 53, 7, 8),), (1,))]
        return cases + [Entry(case, 1, DTYPES[1:]) for case in _cross(((35, 20, 18, 3),), (17,))]
    if device.type != "cuda":
        sizes = SIZES + LAYERS[:1] if full else SIZES[:4]
        cases = _cross(sizes, ROWS) + _cross((LONG_SUMS,), (100,) if name == "cpu" else ())
        return [Entry(case, 0, DTYPES) for case in cases]
    large = _cross(LAYERS, (1, 16, 64, 256, 300, 2048))
    if full:
        return [Entry(case, 99, DTYPES) for case in _cross(SIZES, ROWS) + large]
    # A launch is compiled for each dtype, form, direction and kind of sizes. All of them take many
    # minutes, these take one or two.
    few = _cross((RAGGED, ALIGNED), ROWS) + _cross((BARE,), (3, 70))
    large = [c for c in large if c.sizes != LAYERS[2] and c.M in (1, 16, 2048)]
    found = []
    for case in few + [c for c in large if c.form != "dense"]:
        tuned = (case.sizes, case.M) in ((RAGGED, 3), (ALIGNED, 1)) and case.form != "dense"
        in_all_dtypes = case.sizes == RAGGED and case.M in (1, 17, 70, 300)
        found.append(Entry(case, 99 if tuned else 1, DTYPES if in_all_dtypes else DTYPES[:1]))
    return found


def _cross(sizes, rows) -> list[Case]:
    """Every size with every number of rows; layouts, bias and alpha take turns."""
    alphas, found = (0.37, 1.0, -2.5, 0.0), []
    for i, (size, M) in enumerate(itertools.product(sizes, rows)):
        layout = LAYOUTS[i % 4] if M > 1 and size not in LAYERS else LAYOUTS[0]
        kind = {"layout": layout, "bias": i % 3 != 1, "alpha": alphas[(i + i // 4) % 4]}
        found += [Case(M, size, form, **kind) for form in FORMS]
    return found
