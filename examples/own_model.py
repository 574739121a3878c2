"""Compress, recover, measure, save, load and use a model of your own.

    python examples/own_model.py MODEL [TEXT [HELD_OUT]]

MODEL is a hub id, a folder or a .gguf file. TEXT is calibrated and trained on, HELD_OUT is measured
on; each is "brown", a hub id, or a .txt, .jsonl or .parquet file. The result is written to
runs/own_model.
"""

from __future__ import annotations

import sys

from hylora_kernels import (
    compress,
    evaluate,
    finetune,
    generate,
    load_model,
    load_pretrained,
    save_pretrained,
)
from hylora_kernels.evaluation.evaluate import EvaluateReport

FOLDER = "runs/own_model"
PROMPT = "The most important thing about"


def main(
    name: str, text: str = "brown", held_out: str = "brown", length: int = 512, **options
) -> tuple[EvaluateReport, EvaluateReport]:
    """The reports of the dense and of the recovered model. options: of compress()."""
    model, tokenizer = load_model(name)
    dense = evaluate(model, held_out, tokenizer, length=length, limit=16)

    model, report = compress(
        model, keep=0.8, calibration=text, tokenizer=tokenizer, length=length, **options
    )
    finetune(model, text, tokenizer, steps=60, length=length)
    small = evaluate(model, held_out, tokenizer, length=length, limit=16)

    save_pretrained(model, FOLDER, tokenizer)
    model = load_pretrained(FOLDER)
    print(generate(model, tokenizer, PROMPT, max_new_tokens=32))
    print(f"kept {report.keep:.1%} of the linears, {report.model_keep:.1%} of the model")
    print(f"perplexity {dense.perplexity.ppl:.2f} -> {small.perplexity.ppl:.2f}")
    print(f"decode {dense.speed.decode_tok_s:.1f} -> {small.speed.decode_tok_s:.1f} tokens/s")
    return dense, small


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
