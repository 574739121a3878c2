"""Norms, recognised by what they make."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from hylora_kernels.backends.shared.decoder_form import NormForm
from hylora_kernels.inference.watch import NotRecognised

_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)


def same(a: Tensor, b: Tensor) -> bool:
    """True for the same numbers in the same order, whatever the shapes."""
    return a is b or (a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1)))


def norm_of(module: nn.Module, x: Tensor, y: Tensor) -> NormForm:
    """The norm that has made y of x, over their last dim: by root mean square or of mean and
    variance, with weight or 1 + weight, with a bias or without."""
    width, dtype = x.shape[-1], y.dtype
    parameters = [p.detach().float().flatten() for p in module.parameters(recurse=False)]
    if len(parameters) > 2 or any(p.numel() != width for p in parameters):
        raise NotRecognised(f"a {type(module).__name__} of it is no known norm")
    weights: list[Tensor | None] = [None]
    if parameters:
        weights = [parameters[0], 1 + parameters[0]]
    bias = parameters[1] if len(parameters) == 2 else None
    most = 4 * torch.finfo(dtype).eps * float(y.double().norm())
    own = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2]
    for all_eps in (own, _USUAL_EPS):
        best, least = None, torch.inf
        for kind, eps in itertools.product(("rms", "layer"), all_eps):
            normed = _normed(kind, x.double(), eps)
            for weight, rounds_first in itertools.product(weights, (True, False)):
                made = normed.to(dtype).double() if rounds_first else normed
                made = made if weight is None else made * weight
                made = made if bias is None else made + bias
                error = float((made - y.double()).norm())
                if error < least:
                    best = NormForm(kind, width, eps, weight, bias, rounds_first)  # type: ignore[arg-type]
                    least = error
        if best is not None and least <= most:
            return best
    raise NotRecognised(f"a {type(module).__name__} of it is no known norm")


def _normed(kind: str, x: Tensor, eps: float) -> Tensor:
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
