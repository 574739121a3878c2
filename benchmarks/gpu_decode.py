"""Whole models decoding in our runtime on a GPU: compressed and dense, and dense by transformers.

    python benchmarks/gpu_decode.py llama-3.2-1b [--seconds 110] [--out runs/gpu]
    python benchmarks/gpu_decode.py tiny                     the same code on a CPU, in seconds

runtime:   our CUDA graph of a step over a static cache, batch 1, 8, 32 and 64; dense weights, and
           compressed ones after optimize_for_inference.
           "dense, transformers": torch.compile(mode="reduce-overhead") with its static cache, what
           its generate(cache_implementation="static") does; at batch 1.
           "runtime compiled": Decoder's compiled=True, which has torch.compile fuse what lies
           between the linears before the graph is captured; at batch 1.
prefill optimised, decode optimised: called from Python, one by one.

The models are those of gpu_models.py, with random weights and the adapter merged; its models.json
takes the rows, whose ratio is over the dense model in our runtime.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gpu_compressed import FORMS, SHAPES, check_layer, compile_ahead, compressed
from gpu_models import TINY, Bench, Sizes, growing_decode, random_ids, static_decode
from torch import nn
from transformers import DynamicCache, StaticCache

from hylora_kernels import optimize_for_inference
from hylora_kernels.backends import triton
from hylora_kernels.inference.cuda_graph import CudaGraphs, captured

KEEP = 0.5
BATCHES, PEER = (1, 8, 32, 64), "dense, transformers"


class DecodeBench(Bench):
    """The measurements of one model in our runtime."""

    def run(self) -> None:
        least_seconds = 4 * self.sizes.seconds
        models = self.attempt("building", 0, self.models)
        if models is None:
            return
        parts: dict[str, tuple] = {}
        for batch in self.sizes.batches[:1]:
            parts[f"runtime, batch {batch}"] = (self.in_runtime, models, batch)
        parts["prefill"] = (self.optimised_prefill, models)
        parts["eager"] = (self.optimised_decode, models)
        for batch in self.sizes.batches[1:]:
            parts[f"runtime, batch {batch}"] = (self.in_runtime, models, batch)
        # Last: compiling takes a quarter of a minute a model. transformers' is measured beside the
        # dense model in our runtime.
        first = self.sizes.batches[0]
        parts["compiled"] = (self.in_runtime, models, first, True)
        parts["transformers"] = (self.by_transformers, models, first)
        for words, part in parts.items():
            self.attempt(words, least_seconds, *part)

    def models(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"dense": self.dense}
        for form in FORMS:
            model = compressed(self.dense, KEEP, form, 0)
            # On a CPU the head, which the models share, would be packed as well.
            found[f"keep {KEEP} {form}"] = model if self.on_gpu else copy.deepcopy(model)
        if self.on_gpu and triton.is_available():
            rows = list(self.sizes.batches)
            self.attempt("compiling", 0, compile_ahead, [*found.values()], rows, [], self.device)
        for name, model in found.items():
            if name != "dense":
                optimize_for_inference(model)
                for way in ("first call", "later call"):  # by the backend; by the C++ op
                    self.attempt(f"{name}, {way}", 0, check_layer, model, name)
        return found

    @torch.no_grad()
    def in_runtime(self, models: dict[str, nn.Module], batch: int, compiled: bool = False) -> None:
        calls = {name: self.steps_of(model, batch, compiled) for name, model in models.items()}
        self.measure_steps("runtime compiled" if compiled else "runtime", batch, models, calls)

    @torch.no_grad()
    def by_transformers(self, models: dict[str, nn.Module], batch: int) -> None:
        dense, sizes = models["dense"], self.sizes
        cache = StaticCache(config=dense.config, max_cache_len=sizes.context + sizes.steps)
        ids = random_ids(dense, batch, sizes.context)
        dense(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        forward = self.compiled_forward(dense)
        peer = static_decode(forward, cache, random_ids(dense, batch, 1), sizes.steps)
        beside = {PEER: dense, **models}
        calls = {name: self.steps_of(model, batch) for name, model in models.items()}
        self.measure_steps("runtime", batch, beside, {PEER: peer, **calls})

    def measure_steps(self, mode: str, batch: int, models, calls) -> None:
        steps = self.sizes.steps
        self.measure("decode", mode, batch, models, calls, batch * steps, calls_in_one=steps)

    def steps_of(
        self, model: nn.Module, batch: int, compiled: bool = False
    ) -> Callable[[], torch.Tensor]:
        """A function that decodes a few tokens in our runtime and goes back to where it began."""
        capture = captured if self.on_gpu else uncaptured
        runtime = CudaGraphs(model, capture, compiled=compiled and self.on_gpu)
        ids = random_ids(model, batch, self.sizes.context)
        logits = runtime.prefill(ids, torch.ones_like(ids))
        tokens = logits.argmax(-1)
        runtime.step(tokens)  # captures
        assert runtime.state is not None
        changing = runtime.state.changing()
        before, tokens_before = [t.clone() for t in changing], runtime.tokens

        def run() -> torch.Tensor:
            for _ in range(self.sizes.steps):
                logits = runtime.step(tokens)
            torch._foreach_copy_(changing, before)
            runtime.tokens = tokens_before
            return logits

        return run

    @torch.no_grad()
    def optimised_prefill(self, models: dict[str, nn.Module]) -> None:
        ids = random_ids(self.dense, 1, self.sizes.prefill)

        def call(model):
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

        calls = {name: functools.partial(call, model) for name, model in models.items()}
        self.measure("prefill", "optimised", 1, models, calls, tokens=self.sizes.prefill)

    @torch.no_grad()
    def optimised_decode(self, models: dict[str, nn.Module]) -> None:
        ids, token = random_ids(self.dense, 1, self.sizes.context), random_ids(self.dense, 1, 1)
        cache = DynamicCache()
        self.dense(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        calls = {
            name: growing_decode(model, cache, token, self.sizes.steps)
            for name, model in models.items()
        }
        self.measure_steps("optimised", 1, models, calls)


def uncaptured(run: Callable[[], None], put_back: Callable[[], None], device) -> Callable:
    """For a CPU: the step itself."""
    run()
    put_back()
    return run


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("models", nargs="+", choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=1e9, help="no part is begun after them")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    given = parser.parse_args(words)
    on_gpu = torch.cuda.is_available()
    if given.models != ["tiny"] and not on_gpu:
        sys.exit("benchmarks/gpu_decode.py needs a GPU for any model but tiny: no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    deadline, failures = time.monotonic() + given.seconds, []
    torch.manual_seed(0)
    for name in given.models:
        # 7B's cache of 64 sequences takes 34 GB, and each model has one.
        batches = BATCHES[:-1] if name == "7b" else BATCHES
        sizes = TINY if name == "tiny" else replace(Sizes(), batches=batches, seconds=1.0)
        bench = DecodeBench(name, sizes, device, deadline, given.out)
        bench.run()
        failures += bench.failures
    if failures:
        sys.exit(f"parts that failed: {len(failures)}, the first: {failures[0]}")


if __name__ == "__main__":
    main()
