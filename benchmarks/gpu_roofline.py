"""PREDICTION, nothing here is measured: an analytic roofline of one layer on a GPU.

A product takes the longest of three times: its multiply-adds on the tensor cores, its bytes from
HBM, its bytes from L2. A launch adds the time to fill and to drain the machine. In eager mode the
host may take longer than all of that. bf16 or fp16, forward. gpu_prediction.py is the command.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

FORMS = ("pair", "pivoted")
MODES = ("graph", "eager")
BYTES = 2  # of a bf16 or fp16 number
TILE = 128  # sides of the tiles that the units compute


@dataclass(frozen=True)
class Gpu:
    """hbm, l2: bytes/s. l2_bytes: shared by all units. tensor: dense bf16 FLOP/s with float32
    sums. units: SMs or CUs. gap: seconds between two kernels of a replayed graph. reuse: rows and
    columns of the tile for which torch's product reads its operands once. clock: the boost clock in
    Hz, at which a unit issues 128 lanes' instructions a cycle."""

    hbm: float
    l2: float
    l2_bytes: float
    tensor: float
    units: int
    gap: float = 1.0e-6
    reuse: tuple[int, int] = (128, 256)
    clock: float = 1.755e9


# Sources of hbm, l2_bytes, tensor, units and clock: NVIDIA's datasheets of the H100 (SXM5), the
# H200 (an H100 with faster memory), the A100 (SXM4, 80 GB) and the L4, the Ada white paper (RTX
# 4090), AMD's MI300X datasheet. No NVIDIA datasheet gives l2: these are estimates after published
# micro-benchmarks, the L4's scaled from the RTX 4090's. Each of the MI300X's eight dies has 4 MB of
# L2; the cache that all its units share is the Infinity Cache, 17.2 TB/s by AMD's CDNA 3 white
# paper.
GPUS = {
    "H100": Gpu(3.35e12, 5.5e12, 50e6, 990e12, 132, reuse=(256, 256)),  # multicast between two SMs
    "H200": Gpu(4.8e12, 5.5e12, 50e6, 990e12, 132, reuse=(256, 256)),
    "A100": Gpu(2.0e12, 4.0e12, 40e6, 312e12, 108, clock=1.41e9),
    "L4": Gpu(0.3e12, 2.5e12, 48e6, 121e12, 58, clock=2.04e9),
    "RTX 4090": Gpu(1.008e12, 5.0e12, 72e6, 165e12, 128, clock=2.52e9),
    "MI300X": Gpu(5.3e12, 17.2e12, 256e6, 1307e12, 304, gap=2.5e-6, reuse=(256, 256), clock=2.1e9),
}


@dataclass(frozen=True)
class Shares:
    """The fractions of the tensor cores' rate and of HBM's that a kind of kernel reaches."""

    tensor: float
    hbm: float


@dataclass(frozen=True)
class Calibration:
    """The figures of the model that no datasheet gives; the defaults are assumptions."""

    torch: Shares = Shares(0.78, 0.90)
    one_launch: Shares = Shares(0.66, 0.85)
    cuda_launch: Shares | None = Shares(0.55, 0.80)  # None: not an NVIDIA
    on_chip: dict[int, float] = field(  # rows of a block -> share of the tensor cores' rate
        default_factory=lambda: {16: 0.15, 32: 0.28, 64: 0.45, 128: 0.55}
    )
    pass_l2: float = 0.80  # share of L2's rate that a pass over y reaches
    kept: float = 0.60  # share of L2 that a tensor may fill and be found there by the next kernel
    ramp: float = 1.5e-6  # seconds to fill and to drain the machine, each launch
    wait: float = 1.5e-6  # seconds between the phases of the one launch
    issue: float = 0.7  # share of the cycles in which a kernel of ours issues an instruction
    host_torch: float = 6e-6  # seconds of the host for an op of torch
    host_triton: float = 18e-6  # and for a launch through Triton
    host_cuda: float = 12e-6  # through the C++ binding, taken to cost as much as two ops of torch


# Fitted to one card (backends/triton/tuned/nvidia-h100-80gb-hbm3.json): 10 us where two
# products were estimated at 6.5, 7.6 and 27 where one launch was at 5.6 and 21 (M = 1, K = N =
# 2048 and 4096 x 11008); a call from Python through the package's own op, on a virtual host.
_HOPPER = Calibration(
    one_launch=Shares(0.60, 0.68),
    ramp=2.5e-6,
    wait=2.5e-6,
    host_torch=20e-6,
    host_triton=70e-6,
    host_cuda=40e-6,
    cuda_launch=Shares(0.37, 0.60),  # mma.sync reaches about 0.62 of what wgmma does
)
_ADA = Calibration(  # slower tensor cores, easier to keep busy
    torch=Shares(0.85, 0.90),
    one_launch=Shares(0.80, 0.85),
    cuda_launch=Shares(0.70, 0.80),
    on_chip={16: 0.18, 32: 0.336, 64: 0.54, 128: 0.66},
)
CALIBRATIONS = {
    "H100": _HOPPER,
    "H200": _HOPPER,
    "A100": Calibration(),
    "L4": replace(  # 72 W
        _ADA,
        torch=Shares(0.60, 0.90),
        one_launch=Shares(0.55, 0.85),
        cuda_launch=Shares(0.50, 0.80),
    ),
    "RTX 4090": _ADA,
    "MI300X": Calibration(
        torch=Shares(0.55, 0.80), one_launch=Shares(0.45, 0.75), cuda_launch=None
    ),
}


@dataclass(frozen=True)
class Layer:
    """x [M, K], SVh [r, K], U [N, r] ([N - r, r] if pivoted), A [ra, K], B [N, ra]."""

    M: int
    K: int
    N: int
    r: int
    ra: int = 0
    form: str = "pair"

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if min(self.M, self.K, self.N, self.r) < 1 or self.ra < 0:
            raise ValueError(f"M, K, N and r must be at least 1 and ra at least 0, got {self}")
        if self.form == "pivoted" and self.r >= self.N:
            raise ValueError(f"the pivoted form needs r < N, got r={self.r}, N={self.N}")

    @property
    def R(self) -> int:
        return self.r + self.ra

    @property
    def others(self) -> int:
        """Outputs that U makes."""
        return self.N - self.r if self.form == "pivoted" else self.N

    def __str__(self):
        return f"{self.K}->{self.N} ({self.r}+{self.ra}, {self.form}) M={self.M}"


class Stage(NamedTuple):
    """PREDICTION for one product or pass: the seconds of each limit alone."""

    what: str
    tensor: float
    hbm: float
    l2: float
    issue: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.tensor, self.hbm, self.l2, self.issue)

    @property
    def bound(self) -> str:
        times = {"tensor cores": self.tensor, "HBM": self.hbm, "L2": self.l2}
        times["instructions"] = self.issue
        return max(times, key=times.__getitem__)


class Prediction(NamedTuple):
    """PREDICTION for one candidate. overhead: launches, ramps and waits on the device; host:
    seconds the host needs in eager mode."""

    stages: tuple[Stage, ...]
    launches: int
    overhead: float
    host: float

    def seconds(self, mode: str = "graph") -> float:
        device = sum(stage.seconds for stage in self.stages) + self.overhead
        return max(device, self.host) if mode == "eager" else device

    def bound(self, mode: str = "graph") -> str:
        """The limit that takes most of the time."""
        if mode == "eager" and self.seconds("graph") < self.host:
            return "host"
        parts = {"launches": self.overhead}
        for stage in self.stages:
            parts[stage.bound] = parts.get(stage.bound, 0.0) + stage.seconds
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class Machine:
    """A GPU and its calibration. warm: all that a layer reads is in L2 already."""

    gpu: Gpu
    calibration: Calibration = Calibration()
    warm: bool = False

    def keeps(self, *shape: int) -> bool:
        """A matrix of this shape, written by one kernel, is still in L2 for the next."""
        return BYTES * math.prod(shape) < self.calibration.kept * self.gpu.l2_bytes

    def full_waves(self, M: int, N: int, K: int) -> float:
        """The fraction of the units that work, on average: the last wave of tiles is rarely full.
        Where there are fewer tiles than units, a long K can be cut in up to four."""
        waves = math.ceil(M / TILE) * math.ceil(N / TILE) / self.gpu.units
        if waves >= 1:
            return waves / math.ceil(waves)
        return min(1.0, waves * max(1, min(4, K // 512)))

    def product(self, what, M, N, K, *, shares=None, x_near=False, y_near=False) -> Stage:
        """[M, K] times [K, N]. x_near, y_near: the left operand is read, and the result left, in L2
        alone."""
        gpu, rows = self.gpu, min(TILE, max(16, 1 << (M - 1).bit_length()))
        shares = shares or self.calibration.torch
        down, across = gpu.reuse if shares == self.calibration.torch else (128, 256)
        flops = 2.0 * math.ceil(M / rows) * rows * N * K  # rows of a tile beyond M cost as well
        far = N * K + (0 if x_near else M * K) + (0 if y_near else M * N)
        near = M * K * math.ceil(N / across) + N * K * math.ceil(M / down) + M * N
        return Stage(
            what,
            tensor=flops / (gpu.tensor * shares.tensor * self.full_waves(M, N, K)),
            hbm=0.0 if self.warm and self.keeps(K, N) else BYTES * far / (gpu.hbm * shares.hbm),
            l2=BYTES * near / gpu.l2,
        )

    def columns(self, what: str, M: int, N: int, times: int) -> Stage:
        """`times` readings or writings of a [M, N] matrix, one number after another."""
        size, near = BYTES * M * N * times, self.warm or self.keeps(M, N)
        hbm = 0.0 if near else size / (self.gpu.hbm * self.calibration.torch.hbm)
        return Stage(what, 0.0, hbm, size / (self.gpu.l2 * self.calibration.pass_l2))

    def predict(self, stages, launches: int, host: float, wait: float = 0.0) -> Prediction:
        overhead = launches * (self.calibration.ramp + self.gpu.gap) + wait
        return Prediction(tuple(stages), launches, overhead, host)

    def by_torch(self, stages: list[Stage]) -> Prediction:
        return self.predict(stages, len(stages), len(stages) * self.calibration.host_torch)


# ----------------------------------------------------------------------------------- the candidates


def four_products(layer: Layer, machine: Machine) -> Prediction:
    """PREDICTION: the formula as it stands. The sum is a pass of its own, as is sorting the
    pivoted form's outputs."""
    M, K, N, r, ra = layer.M, layer.K, layer.N, layer.r, layer.ra
    near = machine.keeps(M, r)
    stages = [
        machine.product("x SVh^T", M, r, K, y_near=near),
        machine.product("h_s U^T", M, layer.others, r, x_near=near),
    ]
    if layer.form == "pivoted":
        stages.append(machine.columns("sort", M, N, 2))
    if ra:
        stages += [
            machine.product("x A^T", M, ra, K, x_near=machine.keeps(M, K), y_near=True),
            machine.product("h_a B^T", M, N, ra, x_near=True),
            machine.columns("sum", M, N, 3),
        ]
    return machine.by_torch(stages)


def two_products(layer: Layer, machine: Machine) -> Prediction:
    """PREDICTION: h = x P^T, y = h Q^T on packed factors. A pivoted layer multiplies by the
    equivalent pair's Q, or makes its others and pivots apart and sorts them: the quicker counts."""
    M, R = layer.M, layer.R
    near = machine.keeps(M, R)
    shrink = machine.product("x P^T", M, R, layer.K, y_near=near)
    whole = machine.by_torch([shrink, machine.product("h Q^T", M, layer.N, R, x_near=near)])
    if layer.form == "pair":
        return whole
    parts = [shrink, machine.product("h Q^T, others", M, layer.others, R, x_near=near)]
    if layer.ra:
        parts.append(machine.product("h_a B^T, pivots", M, layer.r, layer.ra, x_near=near))
    parts.append(machine.columns("sort", M, layer.N, 2))
    return min(whole, machine.by_torch(parts), key=Prediction.seconds)


def one_launch(layer: Layer, machine: Machine) -> Prediction:
    """PREDICTION: the Triton kernel of this project."""
    calibration = machine.calibration
    return _dataflow(layer, machine, calibration.one_launch, calibration.host_triton)


def cuda_launch(layer: Layer, machine: Machine) -> Prediction:
    """PREDICTION: the same design in CUDA C++. Its shares are guesses: no GPU has run it."""
    calibration = machine.calibration
    return _dataflow(layer, machine, calibration.cuda_launch, calibration.host_cuda)


def _dataflow(layer: Layer, machine: Machine, shares: Shares, host: float) -> Prediction:
    """h stays in L2; one wait between the phases."""
    M = layer.M
    expand = {"shares": shares, "x_near": True}
    stages = [
        machine.product("x P^T", M, layer.R, layer.K, shares=shares, y_near=True),
        machine.product("h Q^T", M, layer.others, layer.R, **expand),
    ]
    if (
        layer.form == "pivoted"
    ):  # the pivots' share of y: h_s itself, and an adapter if there is one
        stages.append(machine.product("pivots", M, layer.r, layer.ra, **expand))
    return machine.predict(stages, 1, host, machine.calibration.wait)


def on_chip(layer: Layer, machine: Machine) -> Prediction:
    """PREDICTION: h of a block of rows in shared memory, both products in one program, which reads
    both factors whole. Programs that share a block's outputs compute its h once each."""
    gpu, best = machine.gpu, None
    hbm = gpu.hbm * machine.calibration.torch.hbm
    M, K, R, outputs = layer.M, layer.K, layer.R, layer.others
    far = BYTES * (M * K + R * K + outputs * R + M * layer.N)
    for rows, share in machine.calibration.on_chip.items():
        if rows > max(16, 2 * M) or (rows > 16 and rows * R * BYTES > 150e3):
            continue  # h takes more than 150 KB of shared memory
        blocks = math.ceil(M / rows)
        for sharing in (1 << i for i in range(8) if (1 << i) <= max(1, math.ceil(outputs / 64))):
            waves = blocks * sharing / gpu.units
            busy = waves / math.ceil(waves) if waves >= 1 else waves
            flops = 2.0 * blocks * rows * (K * R * sharing + R * outputs)
            near = sharing * (R * K + rows * K) + outputs * R + rows * outputs
            stage = Stage(
                f"both, {rows} rows, {sharing} sharing",
                tensor=flops / (gpu.tensor * share * busy),
                hbm=0.0 if machine.warm else far / (hbm * min(1.0, 2 * waves)),
                l2=BYTES * blocks * near / (gpu.l2 * min(1.0, waves)),
            )
            if best is None or stage.seconds < best.seconds:
                best = stage
    return machine.predict([best], 1, machine.calibration.host_triton)


def dense(layer: Layer, machine: Machine) -> Prediction:
    """PREDICTION: the one product of the layer that was factorized."""
    return machine.by_torch([machine.product("x W^T", layer.M, layer.N, layer.K)])


# bits -> instructions a code in the loop of triton/quantized/kernels.py: sm_90's machine code, 16
# rows of x. With 64 they were 2.0 more at 4 bits.
INSTRUCTIONS = {2: 6.0, 3: 7.4, 4: 4.6, 5: 6.1, 6: 7.3, 8: 5.6}


def quantized(M: int, K: int, N: int, bits: int, machine: Machine) -> Prediction:
    """PREDICTION: x [M, K] times a matrix [N, K] of codes. To 64 rows one launch, bound by bytes or
    by instructions; more rows pass over the matrix once to dequantise it for torch's product."""
    gpu, calibration = machine.gpu, machine.calibration
    numbers, matrix = N * K, N * K * (bits + (16 if bits == 8 else 24) / 64) / 8
    lanes = 128 * gpu.units * gpu.clock * calibration.issue
    issue = numbers * (INSTRUCTIONS[bits] + (2.0 if M > 16 else 0.0)) / lanes
    shares = calibration.one_launch
    if M > 64:
        written = Stage(
            "dequantise", 0.0, (matrix + BYTES * numbers) / (gpu.hbm * shares.hbm), 0.0, issue
        )
        return machine.by_torch([written, machine.product("x W^T", M, N, K)])
    product = machine.product("x W^T", M, N, K, shares=shares)
    far = matrix + BYTES * M * (N + K)
    product = product._replace(hbm=far / (gpu.hbm * shares.hbm), l2=far / gpu.l2, issue=issue)
    return machine.predict([product], 1, calibration.host_triton)


def group(layers: Sequence[Layer], machine: Machine) -> Prediction:
    """PREDICTION: layers on one x in one launch of the Triton kernel: one shrink for all."""
    calibration, M = machine.calibration, layers[0].M
    shares, ranks = calibration.one_launch, sum(layer.R for layer in layers)
    stages = [machine.product("x P^T", M, ranks, layers[0].K, shares=shares, y_near=True)]
    for layer in layers:
        stages += _dataflow(layer, machine, shares, 0.0).stages[1:]
    return machine.predict(stages, 1, calibration.host_triton, calibration.wait)


CANDIDATES = {
    "four_products": four_products,
    "two_products": two_products,
    "on_chip": on_chip,
    "one_launch": one_launch,
    "dense": dense,
    "cuda_launch": cuda_launch,
}


def machine_named(gpu: str, warm: bool = False) -> Machine:
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    return Machine(GPUS[gpu], CALIBRATIONS[gpu], warm)


def predict(layer: Layer, gpu: str = "H100", warm: bool = False) -> dict[str, Prediction]:
    """PREDICTION of every candidate that the GPU runs, by name. warm has an effect only where the
    weights fit L2."""
    at = machine_named(gpu, warm)
    if warm and not at.keeps(layer.R * (layer.K + layer.others)):
        at = replace(at, warm=False)
    runs = [name for name in CANDIDATES if name != "cuda_launch" or at.calibration.cuda_launch]
    return {name: CANDIDATES[name](layer, at) for name in runs}
