"""The dispatcher: which backend serves a call, and why one can't.

All backends have one interface (eager.py is the shortest) and never import one another. `auto`
takes the first backend of BACKENDS that can serve the call and is faster than the next one. A
backend that the user forces either serves the call or raises its own reason. The choice is made
once a call and is a constant of code that torch.compile traces. A packed layer stays with the
backend that packed it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from hylora_kernels.backends import cpu, cuda, eager, triton
from hylora_kernels.backends.shared.decoder_form import DecoderForm
from hylora_kernels.weights import Weights

# Fastest first; eager is last, since it serves everything.
BACKENDS: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "cpu": cpu, "eager": eager}

# A plain global, so process-wide: torch.compile guards on it and retraces when it changes, which it
# can do neither for a ContextVar nor for a threading.local.
_forced: str | None = None


def available_backends() -> dict[str, str]:
    """Every backend's name -> "" where it can be used here, or the reason why not.

    Example:
        usable = [name for name, reason in available_backends().items() if not reason]
    """
    return {name: backend.why_not() for name, backend in BACKENDS.items()}


def cpu_levels() -> tuple[str, dict[str, str]]:
    """(the instruction set that the "cpu" backend uses, or ""; every one it has kernels for -> ""
    where this machine has it, or the reason why not)."""
    return cpu.levels()


def cuda_code() -> str:
    """The GPUs that the "cuda" backend has machine code for, or why it has none, in words."""
    return cuda.code()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the `with` by backend `name` ("auto" or a key of
    available_backends()).

    The backward of a call runs in the same backend, also after the `with` has ended. Overrides
    HYLORA_BACKEND and holds for all threads. Raises ValueError for an unknown name.

    Example:
        layer = SVDLoRALinear.from_linear(nn.Linear(64, 96), rank=16)
        with use_backend("eager"):
            y = layer(torch.randn(2, 64))
    """
    global _forced
    before, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def choose(x: Tensor, weights: Weights) -> str:
    """The name of the backend that serves these tensors.

    Raises ValueError with the backend's own reason where the user has forced one that can't.
    """
    name = _wanted()
    if name != "auto":
        _require(name, x, weights)
        return name
    for name, backend in BACKENDS.items():
        if backend.unsupported(x, weights) is None and backend.is_faster_than_next(x, weights):
            return name
    raise AssertionError("eager serves every call")


def forget(SVh: Tensor) -> None:
    """Drop all that the backends keep from call to call for the factors of this SVh."""
    for backend in BACKENDS.values():
        backend.forget(SVh)


# ----------------------------------------------------------------------------- packed for inference


def pack(weights: Weights, dtype: torch.dtype | None = None, for_group: bool = False) -> Any:
    """The weights in the layout that their backend reads fastest, None where packing gains nothing.
    The bias stays outside.

    dtype:     of x and y, which a QuantizedMatrix doesn't tell; by default SVh's.
    for_group: pack what gains something as a member of a group alone, too.

    Raises ValueError with the backend's own reason where the user has forced one that can't serve
    them.
    """
    name, x = _wanted(), _no_rows(weights, dtype)
    if name != "auto":
        _require(name, x, weights)
        return BACKENDS[name].pack(weights, x.dtype, for_group)
    for backend in BACKENDS.values():
        if backend.unsupported(x, weights) is None:
            packed = backend.pack(weights, x.dtype, for_group)
            if packed is not None:
                return packed
    return None


def why_not_packed(weights: Weights, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Each backend that pack() asks -> the reason why it packs nothing."""
    names = BACKENDS if _wanted() == "auto" else (_wanted(),)
    x = _no_rows(weights, dtype)
    lacks = "has no kernels for these codes" if weights.is_quantized else "gains nothing by packing"
    return {name: BACKENDS[name].unsupported(x, weights) or lacks for name in names}


def _no_rows(weights: Weights, dtype: torch.dtype | None) -> Tensor:
    """An x [0, K] of the layer's dtype and device."""
    SVh = weights.SVh
    return torch.empty(0, weights.in_features, dtype=dtype or SVh.dtype, device=SVh.device)


def forward_packed(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    """x [..., K], bias [N] -> y [..., N] by the backend that packed it.

    Raises ValueError where the user has forced another one.
    """
    if _forced is not None and _forced not in ("auto", packed.backend):
        _refuse_packed(packed.backend)
    return BACKENDS[packed.backend].forward_packed(x, packed, bias)


def why_no_group(members: Sequence[Any]) -> str:
    """The reason why these packed layers on the same x can't be computed as one, or ""."""
    if len({(packed.backend, packed.dtype, packed.shape) for packed in members}) > 1:
        return "they differ in backend, dtype or K"
    return BACKENDS[members[0].backend].why_no_group(members)


def group(members: Sequence[Any]) -> Any:
    """Packed layers on the same x for which why_no_group gives "", as one. It has members and
    width, which is at least the sum of their outputs and never K."""
    return BACKENDS[members[0].backend].group(members)


def forward_group(x: Tensor, group: Any, biases: Sequence[Tensor | None]) -> Tensor:
    """x [..., K] -> y [..., group.width]: the members' outputs side by side, by the backend that
    packed them; the columns behind them are undefined.

    biases: [N] or None for each member; empty for none. Raises ValueError where the user has forced
            another backend.
    """
    if _forced is not None and _forced not in ("auto", group.backend):
        _refuse_packed(group.backend)
    return BACKENDS[group.backend].forward_group(x, group, biases)


def rows_packed(ids: Tensor, packed: Any) -> Tensor:
    """ids [...] -> [..., K]: rows of a packed dense matrix."""
    return BACKENDS[packed.backend].rows_packed(ids, packed)


def unpack(packed: Any) -> Weights:
    """The weights as they went into pack, bit for bit, but for the bias, which stays outside."""
    return BACKENDS[packed.backend].unpack(packed)


def decoder_plan(form: DecoderForm, dtype: torch.dtype) -> Any:
    """A decoder's step as one call of the backend that its layers are packed for, which is the
    CPU's."""
    return BACKENDS[form.head.packed.backend].decoder_plan(form, dtype)


def _refuse_packed(backend: str) -> NoReturn:
    raise ValueError(
        f"backend {_forced!r} can't serve this call: the layer is packed for backend {backend!r}: "
        "restore_from_inference(model) first"
    )


def _wanted() -> str:
    return _forced or _known(os.environ.get("HYLORA_BACKEND", "auto"), "HYLORA_BACKEND")


def _require(name: str, x: Tensor, weights: Weights) -> None:
    if reason := BACKENDS[name].unsupported(x, weights):
        raise ValueError(f"backend {name!r} can't serve this call: {reason}")


def _known(name: str, argument: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{argument} must be one of {('auto', *BACKENDS)}, got {name!r}")
    return name
