"""bf16 limbs: whether many rows of float32 or float16 are multiplied by AMX.

bf16 limbs are bf16 pieces whose sum is a float32 (csrc/cpu/kernels/amx.h). A product is then 3 or 6
products of limbs, which only the amx_bf16 level has; the number is an argument of the ops, 0 for
fused multiply-adds (FMA).
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hylora_kernels.backends.cpu.library import LEVEL, op
from hylora_kernels.backends.shared.tracing import assume_constant_result

# A product of two limbs beyond these may overflow, or AMX flushes a small limb to zero.
SMALLEST, LARGEST = 2.0**-60, 2.0**60


def limb_products_for(dtype: torch.dtype, fit: bool) -> int:
    """The number of limb products for weights of this dtype; `fit`: fit_limbs of the weights.

    float16 takes 3 of two limbs: what they leave out is at most 2^-18 of a product, far below its
    own rounding. float32 takes 6 of three limbs, as exact as float32 itself, where they are faster;
    or 3 of two limbs, with an error of 5e-6, if torch's float32_matmul_precision is below
    "highest".
    """
    if dtype == torch.float16:
        return 3
    if dtype != torch.float32 or not fit:
        return 0
    if torch.get_float32_matmul_precision() != "highest":
        return 3
    return 6 if six_products_serve() else 0


@assume_constant_result  # torch.compile guards on torch's settings, which decide this
def limb_products_of_packed(most: int) -> int:
    """The same at a call of a float32 layer that was packed for `most`, 6 or 0."""
    products = limb_products_for(torch.float32, True)
    return products if products == 3 else min(products, most)


def fit_limbs(dtype: torch.dtype, *matrices: tuple[Tensor, int]) -> bool:
    """True if bf16 limbs can hold float32 matrices, each given with the dim that products sum over.

    All numbers must be finite, and the largest magnitude along that dim zero or within
    [SMALLEST, LARGEST]. False at a level without limbs.
    """
    if dtype != torch.float32 or LEVEL != "amx_bf16":
        return False
    for matrix, dim in matrices:
        if not matrix.numel():
            continue
        low, high = torch.aminmax(matrix, dim=dim)
        size = torch.maximum(-low, high)  # NaN if there is a NaN; then neither comparison holds
        if not bool(((size == 0) | ((size >= SMALLEST) & (size <= LARGEST))).all()):
            return False
    return True


# ------------------------------------------------------------------------ which is faster, measured


def six_products_serve() -> bool:
    """True if calls on weights that aren't packed take 6 limb products.

    Never under torch.use_deterministic_algorithms: a measurement may decide differently in another
    process, and that changes the last bits.
    """
    return not torch.are_deterministic_algorithms_enabled() and six_products_are_faster()


def six_products_are_faster() -> bool:
    """True if 6 limb products beat FMA on this machine, measured once in a process (10 ms).

    No property of the processor tells: some hosts run the tile unit at a quarter of its rate
    (0.56 TFLOP/s instead of 2.24, FMA untouched). There 6 products take 1.2 to 1.6 times as long as
    FMA; at the full rate they take 0.6 times as long.
    """
    return _measurements.first()


def six_products_stay_faster() -> bool:
    """True if a layer that is packed now, for long use, takes 6 limb products.

    Measures again if the last measurement is over a second old, since a host may change the rate.
    One lost measurement disables limbs for newly packed layers in this process.
    """
    return _measurements.all()


class _Measurements:
    """The results of this process's measurements: True where limbs won."""

    def __init__(self):
        self.results: list[bool] = []
        self.last_time = -math.inf
        self.lock = threading.Lock()  # two measurements at once would slow each other down

    def first(self) -> bool:
        if not self.results:
            with self.lock:
                if not self.results:
                    self.measure()
        return self.results[0]

    def all(self) -> bool:
        with self.lock:
            if all(self.results) and time.monotonic() - self.last_time > 1:
                self.measure()
        return all(self.results)

    def measure(self) -> None:
        self.results.append(_measure_six_products())
        self.last_time = time.monotonic()

    def renew_lock(self) -> None:
        """After a fork: if another thread was measuring, the child's lock would stay locked."""
        self.lock = threading.Lock()


_measurements = _Measurements()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_measurements.renew_lock)


def _measure_six_products() -> bool:
    # Leave torch.export's fake-tensor mode: fake tensors cannot be timed.
    with _disable_current_modes(), torch.inference_mode():
        generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone
        kind = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        x, W = torch.randn(128, 512, **kind), torch.randn(512, 512, **kind)
        panels = op("pack")(W)
        seconds = {6: [], 0: []}
        for _ in range(6):
            for products, samples in seconds.items():
                start = time.perf_counter()
                op("linear")(x, panels, None, 512, products)
                samples.append(time.perf_counter() - start)
    limbs, fma = (statistics.median(samples[1:]) for samples in seconds.values())
    return limbs < 0.9 * fma  # a small gain isn't worth bits that differ between processes
