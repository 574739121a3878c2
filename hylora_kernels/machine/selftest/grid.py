"""What a selftest runs: sizes, dtypes and forms, random tensors for them, and how many of them on
which device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FORMS = ("pair", "pivoted", "dense")  # dense: pivoted at rank N
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 3, 16, 17, 70, 300)
RAGGED, ALIGNED, BARE = (129, 65, 31, 33), (64, 96, 32, 16), (53, 37, 29, 0)  # K, N, r, ra
SIZES = (RAGGED, ALIGNED, BARE, (1, 3, 1, 1), (37, 53, 7, 8), (256, 384, 96, 16))
LAYERS = ((576, 1536, 208, 16), (2048, 5632, 768, 32), (4096, 11008, 1536, 32))
LAYOUTS = ("contiguous", "padded", "every_second", "transposed")


class Call(NamedTuple):
    """The arguments of svd_lora_linear, in its order, and a gradient [M, N] for its output."""

    x: Tensor
    SVh: Tensor
    U: Tensor
    A: Tensor | None
    B: Tensor | None
    bias: Tensor | None
    alpha: float
    pivots: Tensor | None
    dy: Tensor


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
        """Random tensors, scaled so that outputs are of order one."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape, fan_in=1):
            values = torch.randn(shape, generator=generator, device=device) / fan_in**0.5
            return values.to(dtype)

        K, N, r, ra = self.sizes
        r, pivots = (N if self.form == "dense" else r), None
        if self.form != "pair":
            drawn = torch.randperm(N, generator=generator, device=device)
            pivots = drawn[:r].sort().values.int()
        return Call(
            x=self._laid_out(draw, K),
            SVh=draw(r, K, fan_in=K),
            U=draw(N if pivots is None else N - r, r, fan_in=r),
            A=draw(ra, K, fan_in=K) if ra else None,
            B=draw(N, ra, fan_in=ra) if ra else None,
            bias=draw(N) if self.bias else None,
            alpha=self.alpha,
            pivots=pivots,
            dy=self._laid_out(draw, N),
        )

    def _laid_out(self, draw, columns: int) -> Tensor:
        if self.layout == "padded":
            return draw(self.M, columns + 3)[:, :columns]
        if self.layout == "every_second":
            return draw(self.M, 2 * columns)[:, ::2]
        return draw(columns, self.M).T if self.layout == "transposed" else draw(self.M, columns)


class Entry(NamedTuple):
    """One case of a plan. launches: how many of the room's launches are forced on it, besides the
    room's own choice. dtypes: what it is run in."""

    case: Case
    launches: int
    dtypes: tuple[torch.dtype, ...]


def plan(name: str, device: torch.device, full: bool) -> list[Entry]:
    if name == "triton" and device.type == "cpu":  # the interpreter: slow, and no bfloat16
        if full:
            return [Entry(case, 9, DTYPES[1:]) for case in _cross(SIZES[:4], (1, 3, 17, 70))]
        cases = [Entry(case, 0, DTYPES[2:]) for case in _cross(((37, 53, 7, 8),), (1,))]
        return cases + [Entry(case, 1, DTYPES[1:]) for case in _cross(((35, 20, 18, 3),), (17,))]
    if device.type != "cuda":
        sizes = SIZES + LAYERS[:1] if full else SIZES[:4]
        return [Entry(case, 0, DTYPES) for case in _cross(sizes, ROWS)]
    large = _cross(LAYERS, (1, 16, 64, 256, 300, 2048))
    if full:
        return [Entry(case, 99, DTYPES) for case in _cross(SIZES, ROWS) + large]
    # A launch is compiled for each dtype, form, direction and kind of sizes: all of them would take
    # many minutes, these take one or two.
    few = _cross((RAGGED, ALIGNED), ROWS) + _cross((BARE,), (3, 70))
    large = [c for c in large if c.sizes != LAYERS[2] and c.M in (1, 16, 2048)]
    found = []
    for case in few + [c for c in large if c.form != "dense"]:
        tuned = (case.sizes, case.M) in ((RAGGED, 3), (ALIGNED, 1)) and case.form != "dense"
        in_all_dtypes = case.sizes == RAGGED and case.M in (1, 17, 70, 300)
        found.append(Entry(case, 99 if tuned else 1, DTYPES if in_all_dtypes else DTYPES[:1]))
    return found


def _cross(sizes, rows) -> list[Case]:
    """Sizes and rows combined in full, what else a call has in turns."""
    alphas, found = (0.37, 1.0, -2.5, 0.0), []
    for i, (size, M) in enumerate(itertools.product(sizes, rows)):
        layout = LAYOUTS[i % 4] if M > 1 and size not in LAYERS else LAYOUTS[0]
        kind = {"layout": layout, "bias": i % 3 != 1, "alpha": alphas[(i + i // 4) % 4]}
        found += [Case(M, size, form, **kind) for form in FORMS]
    return found
