"""The layers that are timed: sizes, random factors, least work, and the check of a result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from limits import cycled_bytes
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.layers.factors import factor_count
from hylora_kernels.weights import Weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALPHA = 0.7  # no power of two: folding it into a bf16 B rounds
# Up to 16 rows reading the weights bounds a product. Only then are the weights copied, so that each
# call reads its own from the cache level named.
FEW_ROWS = 16


@dataclass(frozen=True)
class Shape:
    K: int
    N: int
    r: int
    ra: int

    def __str__(self):
        return f"{self.K}x{self.N} r{self.r}+{self.ra}"

    def weights(self) -> int:
        """Numbers in the pair form's factors, adapter included."""
        return (self.r + self.ra) * (self.K + self.N)

    def flops(self, M: int) -> float:
        return 2.0 * M * self.weights()

    def bytes_moved(self, M: int, dtype: torch.dtype) -> float:
        """Weights, input and output, each once."""
        return float(dtype.itemsize * (self.weights() + M * (self.K + self.N)))


# The kernel was tuned on these: square and both halves of an MLP at K >= 2048; SmolLM2-135M's.
TUNED = (
    Shape(2048, 2048, 512, 32),
    Shape(2048, 5632, 768, 32),
    Shape(5632, 2048, 768, 32),
    Shape(576, 1536, 208, 16),
    Shape(576, 576, 144, 16),
)
UNTUNED = (Shape(4096, 11008, 1024, 16), Shape(896, 4864, 300, 8), Shape(1536, 576, 256, 0))
# Layers of models from 0.36 to 3 billion parameters at keep 0.6, adapters merged.
MODELS = (
    Shape(1536, 8960, 704, 0),
    Shape(3072, 3072, 736, 0),
    Shape(8960, 1536, 656, 0),
    Shape(896, 4864, 336, 0),
    Shape(960, 2560, 416, 0),
)


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    shape: Shape
    dtype: str
    M: int
    regime: str
    threads: int

    def __str__(self):
        return f"{self.shape} {self.dtype} M={self.M} {self.regime} {self.threads}T"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def x(self) -> Tensor:
        return torch.randn(self.M, self.shape.K).to(self.torch_dtype)


def kept_rank(K: int, N: int, keep: float, form: str) -> int:
    """The largest multiple of 16 at which a layer keeps at most `keep` of its parameters."""
    ranks = range(16, min(K, N), 16)
    return max(rank for rank in ranks if factor_count(rank, K, N, form) <= keep * K * N)


def random_factors(shape: Shape, dtype: torch.dtype, form: str = "pair", seed: int = 0) -> Weights:
    """Scaled so that every output is of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return values.to(dtype)

    pivots, others = None, shape.N
    if form == "pivoted":
        pivots = torch.randperm(shape.N, generator=generator)[: shape.r].sort().values.int()
        others -= shape.r
    return Weights(
        SVh=normal(shape.r, shape.K),
        U=normal(others, shape.r),
        A=normal(shape.ra, shape.K) if shape.ra else None,
        B=normal(shape.N, shape.ra) if shape.ra else None,
        bias=torch.randn(shape.N, generator=generator).to(dtype),
        alpha=ALPHA,
        pivots=pivots,
    )


def copies(tensors, regime: str) -> list[list[Tensor | None]]:
    """`tensors` and as many clones of them as it takes to go round in `regime`, "one copy" none."""
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    count = 1 if regime == "one copy" else math.ceil(cycled_bytes(regime) / size)
    cloned = [[None if t is None else t.clone() for t in tensors] for _ in range(count - 1)]
    return [list(tensors), *cloned]


def check(y: Tensor, x: Tensor, factors: Weights, name: str) -> None:
    """Assert that y is what reference.py says, on the first and last eight rows, in float64."""
    rows = torch.arange(len(x))
    rows = rows[(rows < 8) | (rows >= len(x) - 8)]
    wide = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in factors)
    expected = reference.forward(x[rows].double(), Weights(*wide))[0]
    close(y[rows], expected, name)


def close(got: Tensor, expected: Tensor, name: str) -> None:
    """Assert a relative error in the Frobenius norm that rounding alone can explain."""
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}[got.dtype]
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    error = float((got.to(expected.dtype) - expected).norm() / expected.norm())
    assert error < bound, f"{name}: relative error {error:.1e} in {got.dtype}, allowed {bound}"
