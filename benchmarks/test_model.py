"""SmolLM2-135M end to end: tokens a second in prefill and decode, and the parts of a decode step.

Rivals: the dense model in fp32, bf16 and compiled; compressed to keep 0.6 (pivoted, one uniform
rank for each size of layer, adapters merged) through eager, through the backend, optimised, and
optimised compiled. And the dense model optimised: the gain of the kernels without compression.
"""

from __future__ import annotations

import copy
import functools
import time
from collections import defaultdict

import pytest
import smollm
import torch
from record import format_time, keep_ratios
from timing import interleave
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import StaticCache

from hylora_kernels import optimize_for_inference, use_backend

PREFILL_TOKENS = 512
CONTEXT = 128  # tokens before those decoded
AT_ONCE = 4  # decode steps in a row: before the first the previous rival has displaced the weights
LONGEST = 1024  # of the compiled model's static cache

# A kind of work -> parts of operator names; the first kind that matches gets the operator's time.
KINDS = (
    ("linears", ("hylora::", "aten::mm", "aten::addmm", "aten::linear", "mkldnn::", "mkl::")),
    ("attention", ("scaled_dot_product", "softmax", "bmm")),
    ("cache and copies", ("aten::cat", "aten::copy_", "index_copy", "aten::clone")),
)


class Rival:
    """A model, the backend it runs through, and a state to decode from."""

    def __init__(self, model, backend: str = "eager", compiled: bool = False):
        self.model, self.backend, self.compiled = model, backend, compiled
        self.forward = torch.compile(model) if compiled else model
        self.cache, self.place = None, 0
        self.token = torch.randint(model.config.vocab_size, (1, 1))

    @torch.inference_mode()
    def prefill(self, ids, cache=None):
        with use_backend(self.backend):
            return self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )

    def start(self) -> None:
        """Decode anew, behind CONTEXT tokens."""
        ids = torch.randint(self.model.config.vocab_size, (1, CONTEXT))
        fixed = self.compiled and StaticCache(config=self.model.config, max_cache_len=LONGEST)
        self.cache, self.place = self.prefill(ids, fixed or None).past_key_values, CONTEXT

    @torch.inference_mode()
    def step(self):
        place = torch.tensor([[self.place]])
        with use_backend(self.backend):
            logits = self.forward(
                input_ids=self.token,
                past_key_values=self.cache,
                position_ids=place,
                use_cache=True,
            ).logits
        self.place += 1
        return logits


def _rivals(backend: str, quick: bool) -> dict[str, Rival]:
    found = {"dense bf16": Rival(smollm.dense(torch.bfloat16))}
    if not quick:
        found["dense fp32"] = Rival(smollm.dense(torch.float32))
        # One compilation serves every number of threads.
        torch._inductor.config.cpp.dynamic_threads = True
        found["dense bf16 compiled"] = Rival(smollm.dense(torch.bfloat16), compiled=True)
        found["dense optimised"] = Rival(
            optimize_for_inference(smollm.dense(torch.bfloat16)), "auto"
        )
        found["optimised compiled"] = Rival(
            optimize_for_inference(smollm.compressed(torch.bfloat16)), "auto", compiled=True
        )
    small = smollm.compressed(torch.bfloat16)
    found["eager"] = Rival(small, "eager")
    if backend != "eager" and not quick:
        found["fused"] = Rival(small, backend)
    found["optimised"] = Rival(optimize_for_inference(copy.deepcopy(small)), "auto")
    return found


@pytest.fixture(scope="module")
def rivals(request):
    """A function of the backend: a missing one skips the test before any model is loaded."""
    return functools.cache(lambda backend: _rivals(backend, request.config.getoption("--quick")))


def _best(contest) -> str:
    return next(name for name in ("optimised", "fused", "eager") if name in contest)


def _report(benchmark, what: str, threads: int, tokens: int, times) -> None:
    """tokens: how many a sample's call makes."""
    speeds = {name: tokens / times.median(name) for name in times.samples}
    ours = _best(times.samples)
    ratios = {name: times.ratio(name, ours) for name in speeds if name != ours}
    keep_ratios(f"SmolLM2 {what} {threads}T, {ours}", ratios)
    benchmark.extra_info.update(
        suite="model",
        what=what,
        threads=threads,
        ours=ours,
        tokens_per_second=speeds,
        times_faster_than=ratios,
    )
    print(f"\nSmolLM2 {what}, {threads}T, keep {smollm.KEEP}; tokens/s, {ours} over it", end="")
    for name, speed in speeds.items():
        ratio = f"{ratios[name]:.2f}x" if name in ratios else ""
        print(f"\n  {name:22} {speed:8.1f}  {ratio}", end="")


def test_prefill(benchmark, rivals, backend, threads, with_threads, quick):
    with_threads(threads)
    tokens = 64 if quick else PREFILL_TOKENS
    contest = {name: rival for name, rival in rivals(backend).items() if not rival.compiled}
    ids = torch.randint(49152, (1, tokens))
    calls = {name: [functools.partial(rival.prefill, ids)] for name, rival in contest.items()}
    times = interleave(calls, 0.4 if quick else 4.0, least_rounds=2)
    _report(benchmark, f"prefill of {tokens}", threads, tokens, times)
    benchmark.pedantic(calls[_best(contest)][0], rounds=1)


def test_decode(benchmark, rivals, backend, threads, with_threads, quick):
    with_threads(threads)
    contest = rivals(backend)
    for rival in contest.values():
        rival.start()
    calls = {name: [rival.step] * AT_ONCE for name, rival in contest.items()}
    most = (LONGEST - CONTEXT) // AT_ONCE - 4
    times = interleave(calls, 0.4 if quick else 8.0, most_rounds=most, lead_in=False)
    _report(benchmark, "decode", threads, 1, times)
    benchmark.pedantic(contest[_best(contest)].step, rounds=AT_ONCE)


def test_breakdown(benchmark, rivals, backend, threads, with_threads, quick):
    """Shares are the profiler's, of a step that it slows down; milliseconds are those shares of an
    unprofiled step."""
    with_threads(threads)
    contest = rivals(backend)
    for name in (_best(contest),) if quick else ("dense bf16", _best(contest)):
        rival = contest[name]
        rival.start()
        seconds = _seconds_a_step(rival)
        shares = _shares(rival)
        benchmark.extra_info[name] = {kind: share * seconds for kind, share in shares.items()}
        print(f"\nSmolLM2 decode, {threads}T, {name}: {format_time(seconds)} a token", end="")
        for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
            print(f"\n  {kind:22} {1e3 * share * seconds:6.2f} ms  {100 * share:3.0f} %", end="")
    benchmark.extra_info.update(suite="breakdown", threads=threads)
    benchmark.pedantic(contest[_best(contest)].step, rounds=AT_ONCE)


def _seconds_a_step(rival: Rival) -> float:
    times = interleave({"step": [rival.step] * AT_ONCE}, 0.5, lead_in=False)
    return times.median("step")


def _shares(rival: Rival, steps: int = 4) -> dict[str, float]:
    """kind -> its fraction of a decode step."""
    head = rival.model.get_output_embeddings()
    plain = head.forward

    def marked(*args, **kwargs):
        with record_function("lm_head"):
            return plain(*args, **kwargs)

    head.forward = marked
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            for _ in range(steps):
                rival.step()
            wall = time.perf_counter() - start
    finally:
        head.forward = plain
    spent = defaultdict(float)
    for event in profiler.key_averages():
        if event.key == "lm_head":
            spent["lm_head"] = event.cpu_time_total / 1e6
        else:
            spent[_kind(event.key)] += event.self_cpu_time_total / 1e6
    spent["linears"] -= spent["lm_head"]
    spent["Python and dispatch"] = max(0.0, wall - sum(spent.values()))
    return {kind: seconds / wall for kind, seconds in spent.items()}


def _kind(operator: str) -> str:
    for kind, parts in KINDS:
        if any(part in operator for part in parts):
            return kind
    return "norms and elementwise"
