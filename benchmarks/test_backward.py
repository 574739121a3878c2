"""Training: the backward of one layer alone and with its forward, and SmolLM2's whole step.

Gradients of x, A, B and bias are taken. The rivals are autograd through (a), four products, and
(b), two, whose P and Q are laid side by side anew in every step, since A and B have changed.
"""

from __future__ import annotations

import functools

import pytest
import smollm
import torch
import torch.nn.functional as F
from baselines import naive
from conftest import thread_counts
from layers import TUNED, Case, close, random_factors
from record import format_time, keep_ratios, record
from timing import interleave

from hylora_kernels import reference, svd_lora_linear, use_backend
from hylora_kernels.model.loss import token_loss
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.recovery.run import training_mode
from hylora_kernels.weights import Saved, Weights

STEP_TOKENS = 512


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(metafunc.config), ids=str)


def cases(config) -> list[Case]:
    if config.getoption("--quick"):
        grid = [(TUNED[3], "bf16", 512)]
    elif config.getoption("--full"):
        grid = [(s, kind, M) for s in TUNED for kind in ("bf16", "fp32") for M in (512, 2048)]
    else:
        grid = [(s, "bf16", M) for s in TUNED for M in (512, 2048)]
        grid += [(s, "fp32", 512) for s in (TUNED[0], TUNED[3], TUNED[4])]
    return [Case(*place, "L3", n) for place in grid for n in thread_counts(config)]


def two_products(x, SVh, U, A, B, bias, alpha):
    P, Q = torch.cat((SVh, A)), torch.cat((U, alpha * B), 1)
    return F.linear(F.linear(x, P), Q, bias)


def forwards(x, factors):
    """name -> a function that computes y."""
    *pair, alpha, _ = factors
    return {
        "op": functools.partial(svd_lora_linear, x, *factors),
        "a": functools.partial(naive, x, *pair, alpha),
        "b": functools.partial(two_products, x, *pair, alpha),
    }


def check_gradients(made: dict, inputs, dy, x, factors) -> None:
    """Assert that every rival's gradients are those of reference.py in float32."""
    wide = [t.detach().float() if isinstance(t, torch.Tensor) else t for t in factors]
    weights, wide_x = Weights(*wide), x.detach().float()
    saved = Saved(wide_x, wide_x @ weights.A.T)
    expected = reference.backward(dy.float(), saved, weights)
    for name, forward in made.items():
        found = torch.autograd.grad(forward(), inputs, dy)
        for what, got, want in zip(("dx", "dA", "dB", "db"), found, expected, strict=True):
            close(got, want, f"{name} {what}")


@pytest.mark.parametrize("part", ["backward", "both"])
def test_backward(benchmark, case, part, backend, limits, with_threads, quick):
    with_threads(case.threads)
    factors = random_factors(case.shape, case.torch_dtype)
    x = case.x().requires_grad_()
    for trained in (factors.A, factors.B, factors.bias):
        trained.requires_grad_()
    inputs = [x, factors.A, factors.B, factors.bias]
    dy = torch.randn(case.M, case.shape.N).to(case.torch_dtype)
    made = forwards(x, factors)
    with use_backend(backend):
        check_gradients(made, inputs, dy, x, factors)
        if part == "both":

            def rival(forward):
                return lambda: torch.autograd.grad(forward(), inputs, dy)
        else:

            def rival(forward):
                y = forward()
                return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

        contest = {name: [rival(forward)] for name, forward in made.items()}
        times = interleave(contest, 0.2 if quick else 0.35)
        # Products of the frozen weights once forward and once backward, of the adapters twice.
        adapter = case.shape.ra * (case.shape.K + case.shape.N)
        work = 1 + adapter / case.shape.weights() + (part == "both")
        suite = "backward" if part == "backward" else "fwd+bwd"
        record(benchmark, suite, case, times, limits(case.threads), "op", work=work)
        benchmark.pedantic(contest["op"][0], rounds=3)


@pytest.fixture(scope="module")
def trained():
    """(model at keep 0.6 with adapters of rank 16, name -> adapter)."""
    model = freeze_all_but_adapters(smollm.compressed(torch.bfloat16, lora_rank=16))
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_training_step(benchmark, trained, threads, backend, with_threads, quick):
    """Forward, backward and AdamW on 512 tokens, adapters in float32, as finetune() does."""
    with_threads(threads)
    model, adapters = trained
    tokens = 32 if quick else STEP_TOKENS
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    with training_mode(model, adapters, gradient_checkpointing=False):
        optimizer = torch.optim.AdamW(adapters.values(), lr=1e-5, fused=True)

        def step(backend: str):
            with use_backend(backend):
                loss, count = token_loss(model, ids)
                (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        contest = {name: [functools.partial(step, name)] for name in (backend, "eager")}
        times = interleave(contest, 1.0 if quick else 6.0, least_rounds=2, most_rounds=6)
        benchmark.pedantic(step, (backend,), rounds=1)
    speeds = {name: tokens / times.median(name) for name in contest}
    ratio = times.ratio("eager", backend)
    keep_ratios(f"training step {threads}T", {"eager": ratio})
    benchmark.extra_info.update(
        suite="training", threads=threads, tokens=tokens, tokens_per_second=speeds, ratio=ratio
    )
    words = ", ".join(f"{name} {speed:.0f} tokens/s" for name, speed in speeds.items())
    print(
        f"\ntraining SmolLM2 keep {smollm.KEEP} bf16 {tokens} tokens {threads}T: {words},"
        f" {format_time(times.median(backend))} a step, {ratio:.2f}x eager",
        end="",
    )
