"""Weights as the kernels read them: packing, what is kept from call to call."""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from hylora_kernels.backends.shared.library import MISSING, in_words

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")

# bf16 limbs hold what lies 2^-60 .. 2^60 around: beyond, a product of two limbs may overflow, or a
# small limb is flushed to zero.
LIMBS_LOW, LIMBS_HIGH = 2.0**-60, 2.0**60


def _level() -> tuple[str, str]:
    """(the level in use, "") or ("", why this room can't be used), in words."""
    if MISSING:
        return "", MISSING
    try:
        return torch.ops.hylora.cpu_isa.default(), ""
    except RuntimeError as error:  # what HYLORA_ISA asks for
        return "", in_words(error)


LEVEL, REFUSAL = _level()


def op(name: str):
    return getattr(torch.ops.hylora, f"cpu_{name}").default


def pack_matrix(W: Tensor) -> Tensor:
    """W [n, k] -> its panels; an empty matrix has none."""
    return op("pack")(W) if W.numel() else W.new_empty(0)


def products_for(dtype: torch.dtype, in_range: bool) -> int:
    """Of how many products of bf16 limbs a product of many rows is made, 0 for multiply-adds.

    float16 is two limbs, so 3 products are exact. float32 is three: 6 products are as exact as
    float32 itself and serve where they are faster; 3 leave an error of 5e-6 and serve where torch's
    float32_matmul_precision is below "highest".
    """
    if dtype == torch.float16:
        return 3
    if dtype != torch.float32 or not in_range:
        return 0
    if torch.get_float32_matmul_precision() != "highest":
        return 3
    return 6 if six_products_serve() else 0


def six_products_serve() -> bool:
    """Not under torch.use_deterministic_algorithms: what a measurement decides may differ from
    process to process, and with it the last bits."""
    return not torch.are_deterministic_algorithms_enabled() and six_products_are_faster()


def six_products_are_faster() -> bool:
    """Whether 6 limb products beat multiply-adds on this machine, measured once a process (10 ms).

    No property of the processor says so: some hosts run the tile unit at a quarter of its rate
    (0.56 TFLOP/s instead of 2.24, FMA untouched), and 6 products then take 1.2 to 1.6 times as long
    as multiply-adds, where at the full rate they take 0.6 times as long.
    """
    return _verdicts.first()


def six_products_stay_faster() -> bool:
    """The same for a layer that is packed, and will be used for long: measured again where the last
    time is a second ago. The rate may change between two of those; who lost once is out."""
    return _verdicts.every()


class _Verdicts:
    """What the measurements of this process said."""

    def __init__(self):
        self.said: list[bool] = []
        self.when = -math.inf
        self.measuring = threading.Lock()  # two at once would be slower than one

    def first(self) -> bool:
        if not self.said:
            with self.measuring:
                if not self.said:
                    self.measure()
        return self.said[0]

    def every(self) -> bool:
        with self.measuring:
            if all(self.said) and time.monotonic() - self.when > 1:
                self.measure()
        return all(self.said)

    def measure(self) -> None:
        self.said.append(_measure_six_products())
        self.when = time.monotonic()

    def forked(self) -> None:
        """In a child that was forked while another thread measured the lock would stay locked."""
        self.measuring = threading.Lock()


_verdicts = _Verdicts()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_verdicts.forked)


def _measure_six_products() -> bool:
    # Whoever traces a model (export does, with tensors that hold no numbers) isn't meant.
    with _disable_current_modes(), torch.inference_mode():
        ours = torch.Generator().manual_seed(0)  # the caller's random numbers stay what they were
        kind = {"generator": ours, "dtype": torch.float32, "device": "cpu"}
        x, W = torch.randn(128, 512, **kind), torch.randn(512, 512, **kind)
        panels = pack_matrix(W)
        seconds = {6: [], 0: []}
        for _ in range(6):
            for products, samples in seconds.items():
                start = time.perf_counter()
                op("linear")(x, panels, None, 512, products)
                samples.append(time.perf_counter() - start)
    limbs, multiply_adds = (statistics.median(samples[1:]) for samples in seconds.values())
    return limbs < 0.9 * multiply_adds  # a tie isn't worth bits that differ between processes


def in_range_of(dtype: torch.dtype, *matrices: tuple[Tensor, int]) -> bool:
    """Whether bf16 limbs hold the float32 matrices, each given with the dim that products sum over:
    all finite, and no row along it, zero rows aside, smaller or larger as a whole than they can."""
    if dtype != torch.float32 or LEVEL != "amx_bf16":  # who else has no use for limbs
        return False
    for matrix, dim in matrices:
        if not matrix.numel():
            continue
        low, high = torch.aminmax(matrix, dim=dim)
        size = torch.maximum(-low, high)  # a NaN stays one, and fits nowhere
        if not bool(((size == 0) | ((size >= LIMBS_LOW) & (size <= LIMBS_HIGH))).all()):
            return False
    return True


# ----------------------------------------------------------------------------- panels that are kept


@dataclass(slots=True)
class Kept:
    """Panels of one (SVh, U), valid while `stamp` and `sample` still describe the two."""

    U: TensorWeakRef
    stamp: tuple
    sample: tuple[Tensor, ...]
    backward: tuple[Tensor, Tensor, bool]
    forward: tuple[Tensor, Tensor, bool] | None = None


# SVh -> Kept, while SVh lives. Single operations on it are atomic; two threads that find nothing
# both pack, and the same values win.
kept_panels = WeakTensorKeyDictionary()


def forget(SVh: Tensor) -> None:
    """Drop the panels kept for a layer with this SVh."""
    kept_panels.pop(SVh, None)


def panels_forward(SVh, U) -> tuple[Tensor, Tensor, bool]:
    """(panels of SVh, panels of U, whether limbs hold them). Kept only where a backward was before:
    a model that is only ever run forward holds nothing but its factors."""
    kept = _lookup(SVh, U)
    if kept is not None and kept.forward is not None:
        return kept.forward
    panels = pack_matrix(SVh), pack_matrix(U), in_range_of(SVh.dtype, (SVh, 1), (U, 1))
    if kept is not None:
        kept.forward = panels
    return panels


def panels_backward(SVh, U) -> tuple[Tensor, Tensor, bool]:
    """(panels of U^T, panels of SVh^T, whether limbs hold them), kept for the next step."""
    kept = _lookup(SVh, U)
    if kept is not None:
        return kept.backward
    panels = pack_matrix(U.T), pack_matrix(SVh.T), in_range_of(SVh.dtype, (U, 0), (SVh, 0))
    if not (SVh.is_inference() or U.is_inference()):  # these can't tell that they were written to
        sample = tuple(_sample(t).clone() for t in (SVh, U))
        kept_panels[SVh] = Kept(TensorWeakRef(U), _stamp(SVh, U), sample, panels)
    return panels


def _lookup(SVh, U) -> Kept | None:
    kept = kept_panels.get(SVh)
    if kept is None or kept.U() is not U or kept.stamp != _stamp(SVh, U):
        return None
    # Writes through .data leave no trace in the version.
    same = all(torch.equal(_sample(t), old) for t, old in zip((SVh, U), kept.sample, strict=True))
    return kept if same else None


def _stamp(*tensors: Tensor) -> tuple:
    return tuple((t._version, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


def _sample(matrix: Tensor) -> Tensor:
    """At most 15 x 15 numbers from all over the matrix, as a view."""
    return matrix[:: max(1, matrix.shape[0] // 8), :: max(1, matrix.shape[1] // 8)]


# pivots tensor -> (its version or a copy, N, the kernels' table, the stream order), while it lives
# and isn't written to.
_orders = WeakTensorKeyDictionary()


def order_of(pivots: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """(the kernels' table, the stream order int64): stream order is the pivots, what fills their
    last panel of 32 (row N, which is none), and the other outputs."""
    kept = _orders.get(pivots)
    if kept is not None and kept[1] == out_features and _unwritten(pivots, kept[0]):
        return kept[2:]
    try:
        table = op("pivot_table")(pivots, out_features)
    except RuntimeError as error:
        raise ValueError(_pivots_error(pivots, out_features)) from error
    is_other = torch.ones(out_features, dtype=torch.bool)
    is_other[pivots.long()] = False
    filler = torch.full((-len(pivots) % 32,), out_features)
    stream = torch.cat((pivots.long(), filler, is_other.nonzero().squeeze(1)))
    stamp = pivots.clone() if pivots.is_inference() else pivots._version
    _orders[pivots] = (stamp, out_features, table, stream)
    return table, stream


def _unwritten(pivots: Tensor, stamp: int | Tensor) -> bool:
    return torch.equal(pivots, stamp) if pivots.is_inference() else pivots._version == stamp


def _pivots_error(pivots: Tensor, out_features: int) -> str:
    wanted, values = f"must be strictly ascending within [0, {out_features})", pivots.tolist()
    if len(values) <= 32:
        return f"pivots {wanted}, got {values}"
    return (
        f"pivots {wanted}, got {len(values)} values from {values[0]} to {values[-1]} that are not"
    )


def in_stream(B: Tensor, stream: Tensor) -> Tensor:
    """B [N, ra] -> its rows in stream order, zeros where there is none."""
    return torch.cat((B, B.new_zeros(1, B.shape[1]))).index_select(0, stream)


# ------------------------------------------------------------- the ops of csrc/ under torch's tools


def _fake_linear(x, weights, bias, n, limb_products):
    return x.new_empty((*x.shape[:-1], n))


def _fake_layer(
    x,
    shrink,
    adapter_shrink,
    expand,
    adapter_expand,
    bias,
    pivot_table,
    r,
    ra,
    n,
    alpha,
    emit_h_a,
    backward,
    limb_products,
):
    emitted = math.prod(x.shape[:-1]) if emit_h_a else 0
    return x.new_empty((*x.shape[:-1], n)), x.new_empty((emitted, ra))


def _fake_rows(panels, n, k, ids):
    return panels.new_empty((*ids.shape, k))


def _refuse_vmap(info, in_dims, *args):
    raise NotImplementedError(
        "a layer packed for inference has no vmap rule: give the batch as leading dims of x instead"
    )


if not REFUSAL:
    for _name, _fake in (
        ("linear", _fake_linear),
        ("packed_layer", _fake_linear),
        ("layer", _fake_layer),
        ("rows", _fake_rows),
    ):
        torch.library.register_fake(f"hylora::cpu_{_name}", _fake)
        torch.library.register_vmap(f"hylora::cpu_{_name}", _refuse_vmap)
