"""The measured side: the backend that HYLORA_BACKEND names (else cpu), packed or through the op."""

from __future__ import annotations

import functools
import os

import torch
from layers import copies
from torch import Tensor

from hylora_kernels import available_backends, backends, svd_lora_linear
from hylora_kernels.backends.cpu import limbs
from hylora_kernels.weights import Weights


def backend_name() -> str:
    name = os.environ.get("HYLORA_BACKEND", "auto")
    return "cpu" if name == "auto" else name


def missing() -> str:
    """Why the backend can't be measured, or ""."""
    name = backend_name()
    reason = available_backends().get(name, "this version of the package has no such backend")
    return f"backend {name!r}: {reason}" if reason else ""


def isa() -> str:
    """The instruction-set level in use, "" where the backend has none."""
    try:
        return torch.ops.hylora.cpu_isa()
    except (AttributeError, RuntimeError):
        return ""


def float32_products() -> int | None:
    """6 where many rows of float32 are multiplied as bf16 limbs, 0 where by multiply-adds; None
    without AMX."""
    return limbs.limb_products_for(torch.float32, True) if isa() == "amx_bf16" else None


def packed(x: Tensor, factors: Weights, regime: str):
    """Calls on packed weights, one for each copy, as optimize_for_inference lays them out."""
    backend = backends.BACKENDS[backend_name()]
    tensors = [t for t in factors if t is None or isinstance(t, Tensor)]
    calls = []
    for *most, pivots in copies(tensors, regime):
        own = Weights(*most, factors.alpha, pivots)
        pack = getattr(backend, "pack", None)
        layout = pack(own) if pack is not None else None
        if layout is None:  # this backend packs nothing: the op on plain factors
            calls.append(functools.partial(svd_lora_linear, x, *own))
        else:
            calls.append(functools.partial(backend.forward_packed, x, layout, own.bias))
    return calls


def op(x: Tensor, factors: Weights):
    """The op on plain factors, as a layer calls it that was not optimised."""
    return [functools.partial(svd_lora_linear, x, *factors)]
