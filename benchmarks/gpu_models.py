"""Whole models on a GPU: compressed over dense, in one process and in turns.

    python benchmarks/gpu_models.py tinyllama llama-3.2-1b 7b [--seconds 240] [--out runs/gpu]
    python benchmarks/gpu_models.py tinyllama --compiled     decode compiled, nothing else
    python benchmarks/gpu_models.py tiny                     the same code on a CPU, in seconds

A model is built on the GPU from its configuration with random weights: nothing is downloaded, and
its times are those of a trained one. Compressed, every linear but the output head is an
SVDLoRALinear with random factors of the largest rank that `keep` allows for its size, the same
fraction everywhere (compress() would spread it). All in bfloat16.

merged: the adapter is folded in, as a model is deployed. apart: A and B of rank 32 are separate, as
in training; the ranks add up to that of the merged layer.
eager: called from Python with transformers' growing cache. graph: a CUDA graph of a few steps with
its static cache. compiled: torch.compile(mode="reduce-overhead") with its static cache, what
generate(cache_implementation="static") does.

One layer of each compressed model is checked against float64 and all results must be finite.
models.json is rewritten after every measurement: a row has seconds (median over rounds), the ratio
over dense (median of each round's ratio; above 1 is faster) and peak bytes (own weights plus what
the call allocates).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_compressed import (
    DTYPE,
    FORMS,
    SHAPES,
    build,
    check_layer,
    compile_ahead,
    compressed,
    has_adapter,
    sharing_copy,
    weight_bytes,
)
from gpu_layers import graph_of
from gpu_rivals import add_lora
from timing import interleave
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from hylora_kernels.backends import triton
from hylora_kernels.model.loss import token_loss
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.model.structure import linears
from hylora_kernels.recovery.run import training_mode
from hylora_kernels.support.storage import write_json

KEEPS, LORA_RANK = (0.5, 0.6), 32
COMPILED_KEEPS = (0.5,)  # compiling takes half a minute a model and batch


@dataclass(frozen=True)
class Sizes:
    """prefill: tokens. context: tokens in the cache before those decoded. steps: decoded in a row.
    training: sequences and tokens of each in a step. seconds: of measuring a contest, after the
    least rounds."""

    prefill: int = 2048
    context: int = 512
    batches: tuple[int, ...] = (1, 8, 32)
    steps: int = 4
    training: tuple[int, int] = (4, 1024)
    seconds: float = 1.5
    least_rounds: int = 5
    lora_rank: int = LORA_RANK


TINY = Sizes(
    prefill=12,
    context=6,
    batches=(2,),
    steps=2,
    training=(2, 5),
    seconds=0,
    least_rounds=1,
    lora_rank=8,
)


# ----------------------------------------------------------------------------------------- decoding


def random_ids(model: nn.Module, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, device=model.device)


def growing_decode(model: nn.Module, cache: DynamicCache, token: Tensor, steps: int) -> Callable:
    """A function that decodes a few tokens and takes them out of the cache again."""

    def run() -> Tensor:
        for _ in range(steps):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-steps)
        return logits

    return run


def static_decode(forward: Callable, cache: StaticCache, token: Tensor, steps: int) -> Callable:
    """The same with a static cache, whose length, a tensor in every layer, is put back."""
    lengths = [
        tensor
        for layer in cache.layers
        for name, tensor in vars(layer).items()
        if isinstance(tensor, Tensor) and name not in ("keys", "values")
    ]
    before = [tensor.clone() for tensor in lengths]

    def run() -> Tensor:
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
        torch._foreach_copy_(lengths, before)
        return logits

    return run


# ---------------------------------------------------------------------------------------- measuring


class Bench:
    """The measurements of one model. `rows` is what models.json holds, of all models."""

    def __init__(self, name: str, sizes: Sizes, device: torch.device, deadline: float, out: Path):
        self.name, self.sizes, self.device, self.deadline = name, sizes, device, deadline
        self.on_gpu = device.type == "cuda"
        self.compiled: dict[nn.Module, Callable] = {}  # the dense model is compiled once
        self.path, self.failures = out / "models.json", []
        self.rows = json.loads(self.path.read_text()) if self.path.is_file() else []
        self.dense = build(name, device)

    def compare(self, lora_rank: int, keeps, modes, least_seconds: float, forms=FORMS) -> None:
        """Build the compressed models of one kind and measure all parts that concern them."""
        kind = "apart" if lora_rank else "merged"
        models = self.attempt(
            f"building {kind}", least_seconds, self.contest, lora_rank, keeps, forms
        )
        if models is None:
            return
        parts = {}
        if modes != ("compiled",):
            if lora_rank:
                parts["training step"] = (self.training_step, models)
            parts["prefill"] = (self.prefill, models)
            parts["host cost"] = (self.host_cost, models)
        for batch, mode in itertools.product(self.sizes.batches, modes):
            parts[f"decode {mode}, batch {batch}"] = (self.decode, models, mode, batch)
        for words, part in parts.items():
            self.attempt(f"{words}, {kind}", least_seconds, *part)

    def contest(self, lora_rank: int, keeps=KEEPS, forms=FORMS) -> dict[str, nn.Module]:
        """name -> model, "dense" first; each compressed one has a layer checked."""
        found = {"dense": self.dense}
        for keep, form in itertools.product(keeps, forms):
            found[f"keep {keep} {form}"] = compressed(self.dense, keep, form, lora_rank)
        if self.on_gpu and triton.is_available():
            sizes = self.sizes
            rows, training = (
                [*sizes.batches, sizes.prefill],
                [math.prod(sizes.training)] * (lora_rank > 0),
            )
            self.attempt(
                "compiling", 0, compile_ahead, [*found.values()], rows, training, self.device
            )
        for name, model in found.items():
            error, size = check_layer(model, name), weight_bytes(model) / 1e9
            self.say(f"{name}: {size:.2f} GB, a layer's relative error {error:.1e}")
        return found

    @torch.no_grad()
    def prefill(self, models: dict[str, nn.Module]) -> None:
        ids = random_ids(self.dense, 1, self.sizes.prefill)

        def call(model):
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

        calls = {name: functools.partial(call, model) for name, model in models.items()}
        self.measure("prefill", "eager", 1, models, calls, tokens=self.sizes.prefill)

    @torch.no_grad()
    def decode(self, models: dict[str, nn.Module], mode: str, batch: int) -> None:
        sizes, token = self.sizes, random_ids(self.dense, batch, 1)
        cache = DynamicCache()
        if mode != "eager":
            longest = sizes.context + sizes.steps
            cache = StaticCache(config=self.dense.config, max_cache_len=longest)
        ids = random_ids(self.dense, batch, sizes.context)
        self.dense(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        made = {}
        for name, model in models.items():
            if mode == "eager":
                made[name] = growing_decode(model, cache, token, sizes.steps)
            else:
                forward = self.compiled_forward(model) if mode == "compiled" else model
                made[name] = static_decode(forward, cache, token, sizes.steps)
            if mode == "graph" and self.on_gpu:
                check_finite(name, made[name]())
                made[name] = graph_of([made[name]])
        tokens = batch * sizes.steps
        self.measure("decode", mode, batch, models, made, tokens, calls_in_one=sizes.steps)

    def training_step(self, models: dict[str, nn.Module]) -> None:
        """Forward, backward and AdamW of the adapters; the dense model's are peft's."""
        ids = random_ids(self.dense, *self.sizes.training)
        models = {**models, "dense": sharing_copy(self.dense)}
        add_lora(models["dense"], list(linears(models["dense"])), self.sizes.lora_rank)
        with contextlib.ExitStack() as stack:
            calls = {
                name: stack.enter_context(training_call(model, ids, is_dense=name == "dense"))
                for name, model in models.items()
            }
            self.measure("training step", "eager", 1, models, calls, ids.numel())

    @torch.no_grad()
    def host_cost(self, models: dict[str, nn.Module]) -> None:
        """One linear called from Python on one row, without waiting for the device."""
        layers = {name: next(iter(linears(model).values())) for name, model in models.items()}
        x = torch.randn(1, self.dense.config.hidden_size, device=self.device).to(DTYPE)
        calls = {name: functools.partial(layer, x) for name, layer in layers.items()}
        self.measure("host cost of a layer's call", "eager", 1, layers, calls, 1, waits=False)

    def measure(
        self, what, mode, batch, models, calls, tokens, calls_in_one: int = 1, waits: bool = True
    ) -> None:
        """A row for each model. tokens: of one call; calls_in_one: steps that it consists of."""
        adapters = "apart" if any(has_adapter(model) for model in models.values()) else "merged"
        peaks = {name: self.peak_bytes(models[name], call, name) for name, call in calls.items()}
        timed = {name: [self.synchronised(call) if waits else call] for name, call in calls.items()}
        times = interleave(timed, self.sizes.seconds, self.sizes.least_rounds, lead_in=False)
        found = []
        for name in calls:
            seconds = times.median(name)
            found.append(
                {
                    "model": self.name,
                    "what": what,
                    "mode": mode,
                    "batch": batch,
                    "adapters": adapters,
                    "candidate": name,
                    "seconds": seconds / calls_in_one,
                    "tokens_per_second": tokens / seconds if waits else None,
                    "times_faster_than_dense": times.ratio("dense", name),
                    "peak_bytes": peaks[name] if waits and mode == "eager" else None,
                    "weight_bytes": weight_bytes(models[name]),
                    "rounds": times.rounds,
                }
            )
            self.say(line(found[-1]))
        self.keep(found)

    def compiled_forward(self, model: nn.Module) -> Callable:
        """Compiled as generate() does with a static cache; on a CPU only traced."""
        if model not in self.compiled:
            options = {"mode": "reduce-overhead"} if self.on_gpu else {"backend": "aot_eager"}
            self.compiled[model] = torch.compile(model, dynamic=False, **options)
        return self.compiled[model]

    def peak_bytes(self, model: nn.Module, call: Callable, name: str) -> int | None:
        """Bytes of the model's weights and of all that the call allocates; it checks the result."""
        if not self.on_gpu:
            check_finite(name, call())
            return None
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        check_finite(name, call())
        return weight_bytes(model) + torch.cuda.max_memory_allocated() - before

    def synchronised(self, call: Callable) -> Callable:
        def run():
            call()
            if self.on_gpu:
                torch.cuda.synchronize()

        return run

    def keep(self, found: list[dict]) -> None:
        """Put rows in the place of those of the same measurement, and write them all."""
        key = ("model", "what", "mode", "batch", "adapters", "candidate")
        by_key = {tuple(row[k] for k in key): row for row in self.rows + found}
        self.rows = list(by_key.values())
        write_json(self.path, self.rows)

    def attempt(self, words: str, least_seconds: float, function: Callable, *arguments):
        """function(*arguments), or None where too little time is left or it fails."""
        left = self.deadline - time.monotonic()
        if left < least_seconds:
            self.say(f"skipped: {words}: {max(0, left):.0f} s are left")
            return None
        try:
            return function(*arguments)
        # One part that fails, in whatever way, is not to lose the others.
        except Exception as error:
            self.failures.append(f"{self.name}, {words}: {type(error).__name__}: {error}")
            self.say(f"FAILED: {self.failures[-1]}")
            return None
        finally:
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def say(self, words: str) -> None:
        print(f"{self.name}: {words}", flush=True)


def check_finite(name: str, result: Tensor | None) -> None:
    if result is not None and not bool(torch.isfinite(result).all()):
        raise FloatingPointError(f"{name} gives numbers that are not finite")


@contextlib.contextmanager
def training_call(model: nn.Module, ids: Tensor, is_dense: bool) -> Iterator[Callable[[], Tensor]]:
    """A function that makes one step and returns its loss; adapters are float32 masters, as in
    finetune(), or peft's in the model's dtype."""
    if not is_dense:
        freeze_all_but_adapters(model)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with contextlib.nullcontext() if is_dense else training_mode(model, adapters, False):
        optimizer = torch.optim.AdamW(adapters.values(), lr=1e-5, fused=True)

        def step() -> Tensor:
            loss, count = token_loss(model, ids, chunk=512)
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        yield step
    model.requires_grad_(False)


def line(row: dict) -> str:
    rate, peak = row["tokens_per_second"], row["peak_bytes"]
    return (
        f"{row['what']}, {row['mode']}, batch {row['batch']}, {row['adapters']}: "
        f"{row['candidate']}: "
        f"{1e3 * row['seconds']:.3f} ms, {row['times_faster_than_dense']:.2f} x dense"
        + ("" if rate is None else f", {rate:.0f} tokens/s")
        + ("" if peak is None else f", peak {peak / 1e9:.2f} GB")
    )


# --------------------------------------------------------------------------------------------- main


def run(bench: Bench, only_compiled: bool) -> list[str]:
    """Measure one model, the most telling parts first; what failed, in words."""
    if only_compiled:
        torch._dynamo.config.recompile_limit = 64  # the models share their code
        for form in FORMS:  # one after the other: a cut loses the second alone
            least_seconds = 20 * bench.sizes.seconds
            bench.compare(0, COMPILED_KEEPS, ("compiled",), least_seconds, forms=(form,))
    else:
        for lora_rank in (0, bench.sizes.lora_rank):
            bench.compare(lora_rank, KEEPS, ("graph", "eager"), 4 * bench.sizes.seconds)
    return bench.failures


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("models", nargs="+", choices=list(SHAPES))
    parser.add_argument("--compiled", action="store_true", help="decode compiled, and nothing else")
    parser.add_argument("--seconds", type=float, default=1e9, help="no part is begun after them")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    given = parser.parse_args(words)
    if given.models != ["tiny"] and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_models.py needs a GPU for any model but tiny: no CUDA device")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    deadline, failures = time.monotonic() + given.seconds, []
    torch.manual_seed(0)
    for name in given.models:
        sizes = TINY if name == "tiny" else Sizes()
        bench = Bench(name, sizes, device, deadline, given.out)
        failures += run(bench, given.compiled)
    if failures:
        sys.exit(f"parts that failed: {len(failures)}, the first: {failures[0]}")


if __name__ == "__main__":
    main()
