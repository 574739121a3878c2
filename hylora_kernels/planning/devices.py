"""Devices by their data sheets: what a compression and a model would do there, predicted.

A share of each peak is reached, as far as our own tables show it (docs/performance.md):

* Decoding on a GPU: 0.134 ms a block and all weights at the sheet's bandwidth, which gives the 376
  and 142 tokens/s of the 1B and 7B shapes in "Optimised models on the H200" (dense, batch 1).
* Products of many rows: 0.45 of the peak, the 33.8 k tokens/s of the 7B shapes' prefill there.
* Decoding on a CPU: 0.93 of the bandwidth, the 31.9 tokens/s of SmolLM2's 538 MB in float32 on a
  core that reads 18.5 GB/s.

The float64 rates are assumptions: 0.6 of the peak for products; for eigenvectors 0.5 TFLOP/s on
an H100 and in proportion on other GPUs, a quarter of the peak on a CPU (one Zen 4 core makes 35 of
its 50 GFLOP/s, and eight don't make eight times as many). So are the disk and the checksums.
Nothing here has been timed on these devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from hylora_kernels.planning.machine import Machine

PRODUCTS = 0.45  # Of the peak of bfloat16 products with float32 sums.
FLOAT64 = 0.6  # Of the peak of float64 products.
EIGH, CPU_EIGH = 0.5 / 67, 0.25  # FLOP/s of eigenvectors over that peak, on a GPU and on a CPU.
STEP = 0.134e-3  # Seconds that a block adds to a decoded token on a GPU.
CPU_READS = 0.93  # Of a CPU's bandwidth.
DISK = 2e9  # Bytes a second of an NVMe disk, taken for all devices.
HASH = 1.2e9  # Bytes a second of a checksum by one core.
IN_A_PROCESS = 600_000_000  # Resident bytes before anything is loaded.


@dataclass(frozen=True)
class Device:
    """A device's data sheet: memory in bytes, bytes/s, FLOP/s of dense bfloat16 and of float64."""

    name: str
    memory: int
    bandwidth: float
    bfloat16: float
    float64: float
    is_gpu: bool
    sheet: str


DEVICES = {
    # Eight Zen 4 cores at 3.3 GHz: 64 FLOP a cycle of bfloat16 (AVX512-BF16 in two halves), 16 of
    # float64; two channels of DDR5-5600.
    "laptop": Device(
        "laptop, Ryzen 7 7840U", 32 * 10**9, 89.6e9, 1.69e12, 0.42e12, False,
        "amd.com, AMD Ryzen 7 7840U: 8 cores, 3.3 GHz, DDR5-5600",
    ),
    "h100": Device(
        "NVIDIA H100 SXM", 80 * 10**9, 3.35e12, 989e12, 67e12, True,
        "nvidia.com, H100 Tensor Core GPU data sheet",
    ),
    "h200": Device(
        "NVIDIA H200 SXM", 141 * 10**9, 4.8e12, 989e12, 67e12, True,
        "nvidia.com, H200 Tensor Core GPU data sheet",
    ),
    "a100": Device(
        "NVIDIA A100 SXM 80 GB", 80 * 10**9, 2.039e12, 312e12, 19.5e12, True,
        "nvidia.com, A100 Tensor Core GPU data sheet",
    ),
    "rtx-4090": Device(
        "NVIDIA GeForce RTX 4090", 24 * 10**9, 1.008e12, 165e12, 1.29e12, True,
        "nvidia.com, Ada GPU architecture white paper, appendix A",
    ),
}  # fmt: skip


def machine_of(name: str) -> Machine:
    """A device of the table as a machine, with the shares above."""
    d = DEVICES[name]
    products, float64 = PRODUCTS * d.bfloat16, FLOAT64 * d.float64
    eigh = (EIGH if d.is_gpu else CPU_EIGH) * d.float64
    disk = 1 / (1 / DISK + 1 / HASH)
    return Machine(
        name=d.name,
        dtype="bfloat16",
        memory=d.memory,
        base=IN_A_PROCESS,
        forward=products,
        training=products,
        head=products,
        gram=[(1, products)],
        matmul=[(1, float64)],
        eigh=[(1, eigh)],
        cut=[(1, eigh)],
        rounding=2e6 if not d.is_gpu else 2e7,
        write=disk,
        read=disk,
        load=1 / (1 / disk + 1 / HASH),
        bandwidth=d.bandwidth * (1.0 if d.is_gpu else CPU_READS),
        latency=STEP if d.is_gpu else 0.0,
        shared=not d.is_gpu,
        source=f"data sheet ({d.sheet}) times the shares of planning/devices.py; nothing measured",
    )
