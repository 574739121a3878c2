"""The numbers behind the tests of the op: shape grid, tensors, layers, float64 truth, tolerance.

A result may be no further from the float64 truth than twice what the plain formula of
reference.py, four products in the result's own dtype, is itself. Weights are scaled by
1/sqrt(fan-in), so that outputs are about 1.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hylora_kernels import SVDLoRALinear, backends, reference
from hylora_kernels.machine.selftest.grid import FORMS, LAYOUTS, draw_inputs
from hylora_kernels.weights import Saved, Weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GRADS = ("dx", "dA", "dB", "db")
FACTORS = ("SVh", "U", "A", "B")
every_backend = pytest.mark.parametrize("backend", backends.BACKENDS)
every_form = pytest.mark.parametrize("form", FORMS)


@dataclass(frozen=True)
class Case:
    """One point of the grid. `form` is "pair", "pivoted", or "dense": pivoted at rank N."""

    M: int = 17
    sizes: tuple[int, int, int] = (37, 53, 7)  # K, N, r
    lora_rank: int = 8
    bias: bool = True
    alpha: float = 0.37
    layout: str = "contiguous"
    lead_dims: int = 1
    form: str = "pair"

    @property
    def lead(self) -> tuple[int, ...]:
        """x's leading dims, `lead_dims` of them with product M; none at all only for M = 1."""
        shapes = {0: (), 1: (self.M,), 2: (1, self.M), 3: (self.M, 1, 1)}
        if self.M % 2 == 0:
            shapes |= {2: (2, self.M // 2), 3: (2, 1, self.M // 2)}
        return shapes[1] if self.lead_dims == 0 and self.M != 1 else shapes[self.lead_dims]

    def __str__(self) -> str:
        bias = "bias" if self.bias else "nobias"
        lead = "x".join(map(str, self.lead)) or "scalar"
        sizes = "x".join(map(str, self.sizes))
        return f"{self.form}-{lead}-{sizes}-ra{self.lora_rank}-{bias}-{self.alpha:g}-{self.layout}"


AXES = {
    "M": (0, 1, 3, 16, 17, 70, 300),
    "sizes": ((37, 53, 7), (53, 37, 29), (129, 65, 31), (64, 96, 32), (1, 3, 1), (5, 1, 1)),
    "lora_rank": (0, 1, 8, 16, 33),
    "bias": (True, False),
    "alpha": (0.37, 1.0, 0.0),
    "layout": LAYOUTS,
    "lead_dims": (0, 1, 2, 3),
    "form": FORMS,
}


def pairwise(axes: dict[str, tuple]) -> list[dict]:
    """Few points that hold, for any two axes, every combination of their values."""
    names = list(axes)
    wanted = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }
    generator, points = random.Random(0), []
    while wanted:
        point = dict(generator.choice(sorted(wanted, key=sorted)))
        for name in names:
            if name not in point:
                gains = [
                    sum(frozenset({(name, index), old}) in wanted for old in point.items())
                    for index in range(len(axes[name]))
                ]
                best = [index for index, gain in enumerate(gains) if gain == max(gains)]
                point[name] = generator.choice(best)
        wanted -= {frozenset(two) for two in itertools.combinations(point.items(), 2)}
        points.append({name: axes[name][point[name]] for name in names})
    return points


# Pairs alone could miss an adapter that matters at sizes on either side of every heuristic.
CASES = [Case(**point) for point in pairwise(AXES)] + [
    Case(M=M, form=form, alpha=alpha)
    for M in (3, 300)
    for form in AXES["form"]
    for alpha in (0.37, -2.5)
]


class Inputs(NamedTuple):
    """The arguments of svd_lora_linear, in its order."""

    x: Tensor
    SVh: Tensor
    U: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    alpha: float = 1.0
    pivots: Tensor | None = None

    @property
    def weights(self) -> Weights:
        return Weights(*self[1:])

    def map(self, change) -> Inputs:
        """The same with `change` applied to every floating tensor."""
        return Inputs(
            *(change(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in self)
        )

    def with_grad(self) -> Inputs:
        """Leaves of their own memory and strides for x, A, B and bias."""
        names = [n for n in ("x", "A", "B", "bias") if getattr(self, n) is not None]
        return self._replace(**{n: getattr(self, n).detach().requires_grad_() for n in names})


def make_inputs(case: Case, dtype=torch.float64, device="cpu", seed: int = 0) -> Inputs:
    """Random tensors for a case; all draws are made in float64, then rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, fan_in=1):
        values = (
            torch.randn(shape, generator=generator, dtype=torch.float64) / max(fan_in, 1) ** 0.5
        )
        return values.to(device, dtype)

    def permutation(N):
        return torch.randperm(N, generator=generator).to(device)

    sizes = (*case.sizes, case.lora_rank)
    kind = case.form, case.layout, case.bias, case.alpha
    x, weights = draw_inputs(draw, permutation, case.lead, sizes, *kind)
    return Inputs(x, *weights)


def skip_if_refused(backend: str, inputs: Inputs) -> None:
    """Skip the test where the backend can't serve these inputs."""
    if reason := backends.BACKENDS[backend].unsupported(inputs.x, inputs.weights):
        pytest.skip(f"{backend}: {reason}")


def inputs_for(backend: str, case: Case, dtype=torch.float64, device="cpu") -> Inputs:
    """make_inputs; the test is skipped where the backend can't serve them."""
    inputs = make_inputs(case, dtype, device)
    skip_if_refused(backend, inputs)
    return inputs


def make_dy(inputs: Inputs, seed: int = 1) -> Tensor:
    """A gradient [..., N] for the output."""
    generator, N = torch.Generator().manual_seed(seed), inputs.weights.out_features
    dy = torch.randn(*inputs.x.shape[:-1], N, generator=generator, dtype=torch.float64)
    return dy.to(inputs.x)


def by_reference(inputs: Inputs, dy: Tensor) -> dict[str, Tensor | None]:
    """y and the gradients by the plain formula, in the dtype of the inputs."""
    x, weights = inputs.x, inputs.weights
    lead, K = x.shape[:-1], x.shape[-1]
    x, dy = x.reshape(lead.numel(), K), dy.reshape(lead.numel(), dy.shape[-1])
    y, h_a = reference.forward(x, weights)
    grads = reference.backward(dy, Saved(x, h_a), weights)
    named = dict(zip(GRADS, grads, strict=True))
    named["dx"] = named["dx"].reshape(*lead, K)
    named["db"] = None if weights.bias is None else named["db"]
    return {"y": y.reshape(*lead, y.shape[-1]), **named}


def by_op(op, inputs: Inputs, dy: Tensor) -> dict[str, Tensor | None]:
    """y and the gradients by `op`, called like svd_lora_linear, and autograd."""
    leaves = inputs.with_grad()
    y = op(*leaves)
    y.backward(dy)
    grads = (None if t is None else t.grad for t in (leaves.x, leaves.A, leaves.B, leaves.bias))
    return {"y": y.detach(), **dict(zip(GRADS, grads, strict=True))}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors, in float64; infinite if there is a NaN."""
    difference = (a.double() - b.double()).abs()
    return float(difference.nan_to_num(float("inf")).max()) if difference.numel() else 0.0


class OneAfterAnother(TorchFunctionMode):
    """Inside it, products of float32 matrices add one number after the other, as a thread of a GPU
    does, where a CPU's library adds up sixteen chains side by side."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.matmul or function is Tensor.__matmul__:
            left, right = args
            if left.dtype == torch.float32 and left.shape[1]:
                return self._summed(left[:, :, None] * right[None], 1)
        if function is Tensor.sum and args[0].dtype == torch.float32 and len(args[0]):
            return self._summed(args[0], 0)
        return function(*args, **(kwargs or {}))

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        chain = np.cumsum(terms.cpu().numpy(), axis=dim)  # torch's own adds in float64
        return torch.from_numpy(chain).to(terms.device).select(dim, -1)


def assert_as_exact_as_formula(
    got: dict[str, Tensor | None], inputs: Inputs, dy: Tensor, chained: bool = False
) -> None:
    """Every tensor of `got` is within the tolerance of the float64 truth for these very inputs.

    chained: the formula's own error is the larger of two ways to add, torch's and, in float32, one
    number after the other.
    """
    truth = by_reference(inputs.map(Tensor.double), dy.double())
    formula = by_reference(inputs, dy)
    formulas = [formula]
    if chained:
        with OneAfterAnother():
            formulas.append(by_reference(inputs, dy))
    for name, exact in truth.items():
        if exact is None:
            assert got[name] is None, f"{name} should be None"
            continue
        dtype = formula[name].dtype
        assert got[name].dtype == dtype and got[name].shape == exact.shape, name
        # The formula's own error is one throw of the dice, and a lucky one where there are few
        # numbers, so a few roundings on top are always allowed; in float64, where the formula is
        # the truth, more of them. The parts of a sum are of size 1, whatever it comes to.
        roundings = 64 if dtype == torch.float64 else 2
        size = max(1.0, distance(exact, torch.zeros_like(exact)))
        slack = roundings * torch.finfo(dtype).eps * size
        error = distance(got[name], exact)
        own = max(distance(found[name], exact) for found in formulas)
        assert error <= 2 * own + slack, f"{name}: error {error:.3g}, the formula's own {own:.3g}"


def make_layer(form="pair", N=9, K=14, rank=4, lora_rank=3, dtype=torch.float64, **options):
    """SVDLoRALinear with an adapter that counts, and pivots that are not the first rows."""
    if form == "dense":
        form, rank = "pivoted", N
    layer = SVDLoRALinear(K, N, rank, lora_rank, form=form, dtype=dtype, **options)
    if lora_rank:
        torch.nn.init.normal_(layer.B)
    if layer.pivots is not None:
        layer.pivots.copy_(torch.randperm(N)[:rank].sort().values)
    return layer


def dense_weight(layer: SVDLoRALinear) -> Tensor:
    """W [N, K] float64 of everything the layer adds up."""
    factors = (getattr(layer, name) for name in FACTORS)
    factors = (None if factor is None else factor.detach().double() for factor in factors)
    return reference.dense_weight(Weights(*factors, alpha=layer.alpha, pivots=layer.pivots))
