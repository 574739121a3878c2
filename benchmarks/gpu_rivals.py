"""The rivals of one layer on a GPU: functions of x and of weights in the layout that suits each.

auto        svd_lora_linear as a user calls it
optimised   the layer as optimize_for_inference packs it
one_launch  the Triton kernel, whatever the table says
cuda_launch the CUDA C++ kernels, whatever the backend cuda would choose
four_products  the formula, product by product
two_products  x P^T and h Q^T on factors packed ahead, P = [SVh; A], Q = [U, alpha B]; a pivoted
            layer as the pair that it equals
dense       F.linear with the matrix that was compressed
peft        peft's LoRA of the same rank on that matrix; its arithmetic where peft isn't installed
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels import reference, svd_lora_linear, use_backend
from hylora_kernels.backends import cuda, triton
from hylora_kernels.backends.shared import packed_gpu, torch_products
from hylora_kernels.backends.triton import config as configs
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.weights import Weights

ALPHA = 0.7
FORWARD = (
    *("auto", "optimised", "one_launch", "cuda_launch"),
    *("four_products", "two_products", "dense", "peft"),
)
TRAINING = ("auto", "cuda_launch", "four_products", "peft")
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")

try:
    from peft import LoraConfig, inject_adapter_in_model
except ImportError:
    LoraConfig = None


@dataclass(frozen=True)
class Layer:
    """r, ra: the ranks of base and adapter; ra is 0 where the adapter is merged. lora_rank: the
    rank of peft's adapter."""

    M: int
    K: int
    N: int
    r: int
    ra: int
    form: str
    lora_rank: int

    def __str__(self):
        return f"{self.K}->{self.N} ({self.r}+{self.ra} {self.form})"

    @property
    def others(self) -> int:
        return self.N - self.r if self.form == "pivoted" else self.N

    @property
    def weights(self) -> int:
        """Numbers in the factors, which are the multiply-adds for each row of x."""
        return self.r * (self.K + self.others) + self.ra * (self.K + self.N)

    @property
    def problem(self) -> configs.Problem:
        pivoted = self.form == "pivoted"
        return configs.Problem(self.M, self.K, self.N, self.r, self.ra, DTYPE, pivoted)


def random_weights(layer: Layer) -> Weights:
    """Scaled so that outputs are of order one."""

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=DEVICE) / math.sqrt(columns)).to(DTYPE)

    K, N, r, ra = layer.K, layer.N, layer.r, layer.ra
    pivots = None
    if layer.form == "pivoted":
        pivots = torch.randperm(N, device=DEVICE)[:r].sort().values.int()
    return Weights(
        SVh=normal(r, K),
        U=normal(layer.others, r),
        A=normal(ra, K) if ra else None,
        B=normal(N, ra) if ra else None,
        bias=torch.randn(N, device=DEVICE).to(DTYPE),
        alpha=ALPHA,
        pivots=pivots,
    )


def formula(x, SVh, U, A, B, bias, pivots, others):
    """pivots, others: int64 indices of the outputs, or None."""
    h = x @ SVh.T
    if pivots is None:
        y = torch.addmm(bias, h, U.T)
    else:
        y = torch.empty(len(x), len(bias), dtype=x.dtype, device=x.device)
        y = y.index_copy(1, pivots, h).index_copy(1, others, h @ U.T) + bias
    return y if A is None else y + ALPHA * ((x @ A.T) @ B.T)


def shrink_and_expand(x, P, Q, bias):
    return F.linear(F.linear(x, P), Q, bias)


class Lora(nn.Module):
    """peft's arithmetic: the dense product, and the scaled adapter's added to it."""

    def __init__(self, dense: nn.Linear, rank: int):
        super().__init__()
        kind = {"bias": False, "device": dense.weight.device, "dtype": dense.weight.dtype}
        self.dense = dense
        self.A = nn.Linear(dense.in_features, rank, **kind)
        self.B = nn.Linear(rank, dense.out_features, **kind)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        return self.dense(x) + self.B(self.A(x)) * ALPHA


def add_lora(model: nn.Module, paths: list[str], rank: int) -> list[Tensor]:
    """Give the linears at `paths` peft's adapters, or the same arithmetic; the trainable A and B,
    in the model's dtype."""
    if LoraConfig is None:
        for path in paths:
            model.set_submodule(path, Lora(model.get_submodule(path), rank))
        layers = [model.get_submodule(path) for path in paths]
        return [side.weight for layer in layers for side in (layer.A, layer.B)]
    weight = model.get_submodule(paths[0]).weight
    config = LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=paths)
    inject_adapter_in_model(config, model)
    trainable = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in trainable:
        parameter.data = parameter.data.to(weight.device, weight.dtype)
    return trainable


def lora_on_dense(weights: Weights, layer: Layer) -> tuple[Callable, list[Tensor]]:
    """(the layer, its trainable A and B)."""
    dense = nn.Linear(layer.K, layer.N, device="meta")
    dense.weight = nn.Parameter(reference.dense_weight(weights), requires_grad=False)
    dense.bias = nn.Parameter(weights.bias, requires_grad=False)
    model = nn.Sequential(dense)
    trainable = add_lora(model, ["0"], layer.lora_rank)
    return model[0], trainable


def maker(name: str) -> Callable[[Weights, Layer], tuple[Callable, list[Tensor]]]:
    """From weights and layer to (a function of x, the A and B that it trains)."""
    return {
        "auto": _auto,
        "optimised": _optimised,
        "one_launch": _auto,
        "cuda_launch": lambda w, layer: (by_cuda(_auto(w, layer)[0]), [w.A, w.B]),
        "four_products": _four_products,
        "two_products": _two_products,
        "dense": _dense,
        "peft": lora_on_dense,
    }[name]


def _dense(w: Weights, _: Layer):
    return functools.partial(F.linear, weight=reference.dense_weight(w), bias=w.bias), []


def _auto(w: Weights, _: Layer):
    arguments = tuple(w)  # torch.compile (2.11) can't unpack the Weights itself
    return lambda x: svd_lora_linear(x, *arguments), [w.A, w.B]


def _optimised(w: Weights, _: Layer):
    packed = packed_gpu.pack(w, "triton")
    assert packed is not None
    return lambda x: packed.forward(x, w.bias, triton.forward), []


def _four_products(w: Weights, layer: Layer):
    both = (None, None)
    if w.pivots is not None:
        both = torch_products.part_order(w.pivots, layer.others).split((layer.r, layer.others))
    return lambda x: formula(x, w.SVh, w.U, w.A, w.B, w.bias, *both), [w.A, w.B]


def _two_products(w: Weights, _: Layer):
    P, Q = w.SVh, reference.full_U(w.U, w.pivots).contiguous()
    if w.A is not None:
        P, Q = torch.cat((P, w.A)), torch.cat((Q, (ALPHA * w.B.float()).to(DTYPE)), 1)
    return lambda x: shrink_and_expand(x, P, Q, w.bias), []


def weight_bytes(name: str, layer: Layer) -> int:
    """Bytes that a call reads besides x."""
    if name in ("dense", "peft"):
        extra = layer.lora_rank * (layer.K + layer.N) if name == "peft" else 0
        return DTYPE.itemsize * (layer.K * layer.N + extra)
    pivoted_as_pair = name == "two_products" and layer.form == "pivoted"
    return DTYPE.itemsize * (layer.r * (layer.K + layer.N) if pivoted_as_pair else layer.weights)


def forward_calls(name: str, layer: Layer, x: Tensor, weights: Weights) -> list[Callable]:
    """The rival's call on x for each of several copies of its weights: enough that a call, when all
    are called in turn, reads its own from memory."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    count = max(2, min(512, math.ceil(2.5 * cache / weight_bytes(name, layer))))
    calls = []
    for _ in range(count):
        copy = Weights(*(t.clone() if isinstance(t, Tensor) else t for t in weights))
        calls.append(functools.partial(maker(name)(copy, layer)[0], x))
    return calls


def compiled_call(name: str, layer: Layer, x: Tensor, weights: Weights) -> Callable:
    torch._dynamo.reset()
    return functools.partial(torch.compile(maker(name)(weights, layer)[0], dynamic=False), x)


def check(y: Tensor, x: Tensor, weights: Weights, name: str) -> None:
    """Raise FloatingPointError unless y is the formula's result, on the first and last rows."""
    rows = torch.arange(len(x), device=DEVICE)
    rows = rows[(rows < 8) | (rows >= len(x) - 8)]
    wide = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in weights)
    expected = reference.forward(x[rows].double(), Weights(*wide))[0]
    error = float((y[rows].double() - expected).norm() / expected.norm())
    if not error < 2e-2:
        raise FloatingPointError(f"{name} is wrong: relative error {error:.1e}")


def under(config, call: Callable) -> Callable:
    """The call with a forced launch."""

    def run():
        with triton.forcing(config):
            return call()

    return run


def by_cuda(function: Callable) -> Callable:
    """The function by the CUDA C++ kernels."""

    def run(*given):
        with use_backend("cuda"), cuda.forcing(cuda.KERNELS):
            return function(*given)

    return run


def names_of(contest: tuple[str, ...]) -> list[str]:
    """The names of FORWARD or TRAINING whose backend can be used here."""
    return [name for name in contest if name != "cuda_launch" or cuda.is_available()]


def training_step(name: str, layer: Layer, x: Tensor, dy: Tensor) -> Callable:
    """Forward and backward: gradients of x, A and B."""
    function, trained = maker(name)(random_weights(layer), layer)
    wanted = [x, *(t.requires_grad_() for t in trained if t is not None)]

    def step():
        return torch.autograd.grad(function(x), wanted, dy)

    return by_cuda(step) if name == "cuda_launch" else step


def launches(layer: Layer, quick: bool) -> list[configs.Config]:
    """The launches that tuning may pick; with quick the default one alone."""
    target = dispatch.target_of(torch.device("cuda", torch.cuda.current_device()))
    found = [configs.first_candidate(layer.problem, target)]
    if not quick:
        candidates = configs.candidate_configs(layer.problem, target)
        found += [c for c in candidates if c != configs.TORCH_PRODUCTS]
    return list(dict.fromkeys(found))
