"""The host's time for one call of a layer on a GPU: Python, torch, our C++, up to the launch.

    python benchmarks/gpu_host_cost.py [--out runs/gpu] [--seconds 10]

Called one by one, the small layers of a decoder step wait for the host, not for the device. On a
GPU the calls are timed without waiting for it, and the device is waited for between samples. On a
machine without one, the C++ op of an optimised layer is built with launches that do nothing and
serves CPU tensors. That figure has all of the host's work but four things: the driver's launch
(2 to 4 us), torch's CUDA allocator instead of the CPU's, the question whether a graph is being
captured, and the look-up of the stream. host_cost.json is written.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing import interleave
from torch import nn

from hylora_kernels import SVDLoRALinear, backends, optimize_for_inference, use_backend
from hylora_kernels.ops.packed import packed_group
from hylora_kernels.support.storage import write_json

# A decoder's small projection; without a GPU a tiny one, since rivals compute there.
SHAPE, TINY = (2048, 2048, 512, 32), (64, 64, 16, 16)  # K, N, r, ra
DTYPE = torch.bfloat16
CALLS = 200  # in a row, fewer than a device queues


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Inside it the cuda backend serves CPU tensors, and its launches do nothing."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from cuda_emulator import on_cpu

    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HYLORA_CACHE", folder)
        torch.ops.load_library(on_cpu.build(on_cpu.NO_LAUNCH))
        with on_cpu.emulated():
            yield


def layers(device: torch.device) -> dict[str, nn.Module]:
    """name -> a layer in eval(); the optimised ones are packed for the cuda backend on a CPU."""
    K, N, rank, lora_rank = SHAPE if device.type == "cuda" else TINY
    kind = {"device": device, "dtype": DTYPE, "bias": False}
    found: dict[str, nn.Module] = {"nn.Linear": nn.Linear(K, N, **kind)}
    for form in ("pair", "pivoted"):
        layer = SVDLoRALinear(K, N, rank, lora_rank, form=form, **kind).eval()
        found[f"{form}, adapter apart"] = layer
        packed = SVDLoRALinear(K, N, rank, lora_rank, form=form, **kind).eval()
        packed.load_state_dict(layer.state_dict())
        backend = contextlib.nullcontext() if device.type == "cuda" else use_backend("cuda")
        with backend:
            found[f"{form}, optimised"] = optimize_for_inference(packed)
    members = [copy.deepcopy(found["pair, optimised"]) for _ in range(3)]
    found["three on one x, one by one"] = _OnOneInput(members)
    found["three on one x, a group"] = _OnOneInput(copy.deepcopy(members), grouped=True)
    return found


class _OnOneInput(nn.Module):
    """Optimised layers on one x, each by itself or as a group."""

    def __init__(self, layers: list[nn.Module], grouped: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        packed = [layer.packed_state.packed for layer in layers]
        self.group = backends.group(packed) if grouped else None

    def forward(self, x):
        if self.group is not None:
            return packed_group(x, self.group)
        return [layer(x) for layer in self.layers]


def measure(device: torch.device, seconds: float) -> dict[str, float]:
    """name -> microseconds a call, median of interleaved samples."""
    x = torch.randn(1, 1, SHAPE[0] if device.type == "cuda" else TINY[0], device=device).to(DTYPE)

    def many(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            for _ in range(CALLS):
                layer(x)

        return run

    calls = {name: [many(layer)] for name, layer in layers(device).items()}
    with torch.inference_mode():
        times = interleave(calls, seconds, lead_in=False)
    return {name: 1e6 * times.median(name) / CALLS for name in calls}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring")
    given = parser.parse_args(words)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    with contextlib.nullcontext() if on_gpu else without_launches():
        found = measure(device, min(given.seconds, 10.0))
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "host_cost.json", {"on_gpu": on_gpu, "microseconds": found})
    for name, us in found.items():
        print(f"{name:24} {us:8.1f} us a call{'' if on_gpu else ', without the launch'}")


if __name__ == "__main__":
    main()
