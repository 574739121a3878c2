"""Tokens a second of models in vLLM, which take turns in one process.

    python benchmarks/vllm_speed.py DENSE FOLDER ...

Runs in vLLM's environment (docs/integrations.md), greedily, in float32, without compilation; each
answer has 32 tokens after a prompt of 16. The best of the rounds is printed, and the median.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

PROMPT, TOKENS = 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders or hub ids, the dense one first")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    options = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    engines = {path: LLM(path, max_model_len=128, **options) for path in given.models}
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for batch in given.batch:
        ids = [[10 + 7 * row + i for i in range(PROMPT)] for row in range(batch)]
        prompts = [{"prompt_token_ids": row} for row in ids]
        seconds: dict[str, list[float]] = {path: [] for path in engines}
        for _ in range(given.rounds):
            for path, engine in engines.items():
                begin = time.perf_counter()
                engine.generate(prompts, greedy, use_tqdm=False)
                seconds[path].append(time.perf_counter() - begin)
        for path, taken in seconds.items():
            best, middle = (batch * TOKENS / of(taken) for of in (min, median))
            print(f"batch {batch}  {path}: {best:.1f} tokens/s, median {middle:.1f}", flush=True)


if __name__ == "__main__":
    main()
