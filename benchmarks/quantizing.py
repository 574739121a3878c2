"""What few bits cost a real model, by width, and how long quantising takes.

    python benchmarks/quantizing.py [--blocks 8] [--depths 1,12,21,28] [--out runs/quantizing.json]

No model is evaluated: errors are predicted increases of the loss, in nats a token. Every linear of
the chosen decoder blocks is quantised in all widths, by rounding and by rounding with feedback,
then the embedding, which is tied to the head. Errors are taken in the statistics of the text that
the matrices were quantised for, and in the inputs of a text they have not seen.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict

from hylora_kernels.compression.calibration import Statistics, gather
from hylora_kernels.compression.embedding import embedding_target
from hylora_kernels.compression.quantize import error, quantize_each, quantize_embedding
from hylora_kernels.compression.tokens import TokenSums
from hylora_kernels.model.load import DEMO_MODEL, load_model
from hylora_kernels.model.structure import depth_of, discover, layer_type
from hylora_kernels.reference import dequantize
from hylora_kernels.support.console import as_text, table
from hylora_kernels.support.storage import write_json
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.weights import PLANES

METHODS = ("rtn", "gptq")


def linears(seen: Statistics, unseen: Statistics) -> dict:
    """Nats a token by [text][method][width] and, on the seen text, by [type][method][width]; CPU
    seconds by method."""
    texts: dict = {name: _table() for name in ("seen", "unseen")}
    types: dict = defaultdict(_table)
    seconds = dict.fromkeys(METHODS, 0.0)
    for group in seen.groups:
        leader, matrices = group.leader.path, [target.matrix for target in group.targets]
        for method in METHODS:
            started = time.process_time()
            found = quantize_each(matrices, [*PLANES], seen.inputs[leader], method=method)
            seconds[method] += time.process_time() - started
            for target, by_width in zip(group.targets, found, strict=True):
                for bits, matrix in by_width.items():
                    E, C = target.matrix - dequantize(matrix), seen.gradients[target.path]
                    nats = error(E, seen.inputs[leader], C) * seen.nats(leader)
                    texts["seen"][method][bits] += nats
                    types[layer_type(target.path)][method][bits] += nats
                    nats = error(E, unseen.inputs[leader], C) * seen.nats(leader)
                    texts["unseen"][method][bits] += nats
    return {"texts": texts, "types": dict(types), "seconds": seconds}


def _table() -> dict[str, dict[int, float]]:
    return {method: dict.fromkeys(PLANES, 0.0) for method in METHODS}


def main(
    name: str = DEMO_MODEL,
    blocks: int = 8,
    length: int = 512,
    depths: tuple[int, ...] = (),
    progress: bool = True,
) -> dict:
    """The results as JSON's own types; prints them as tables. depths: of the decoder blocks, all if
    there are none."""
    model, tokenizer = load_model(name, "cpu", "float32")
    ids, others = (
        token_blocks(text, tokenizer, length, split, blocks, seed=0, progress=progress)
        for text, split in (("brown", "train"), ("python-docs", "test"))
    )
    structure = discover(model)
    groups = [g for g in structure.groups if not depths or depth_of(g.leader.path) in depths]
    sums = TokenSums(model)
    seen = gather(model, ids, groups, True, progress, observers=[sums])
    unseen = gather(model, others, groups, False, progress)
    result = linears(seen, unseen)
    linear_bytes = sum(target.matrix.numel() for group in groups for target in group.targets)
    tokens, E = sums.finish(), embedding_target(model).matrix
    terms = [tokens.embedding.damped(), tokens.head.damped()]
    started = time.process_time()
    result["embedding"] = {
        method: {
            bits: tokens.nats(lost)
            for bits, (_, lost) in quantize_embedding(E, [*PLANES], terms, method=method).items()
        }
        for method in METHODS
    }
    result |= {
        "model": name,
        "tokens": ids.numel(),
        "linears": sum(len(group.targets) for group in groups),
        "weights": linear_bytes,
        "embedding_seconds": time.process_time() - started,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    show(result)
    return result


def show(result: dict) -> None:
    rows = []
    found = {"linears": result["texts"]["seen"], "linears, unseen text": result["texts"]["unseen"]}
    found |= {name: result["types"][name] for name in sorted(result["types"])}
    for name, errors in (found | {"embedding": result["embedding"]}).items():
        for method in METHODS:
            rows.append([name, method, *(errors[method][bits] for bits in PLANES)])
        ratios = (errors["rtn"][bits] / errors["gptq"][bits] for bits in PLANES)
        rows.append([name, "ratio", *(f"{ratio:.1f}" for ratio in ratios)])
    title = f"{result['linears']} linears of {result['model']}: nats a token by bits"
    print(as_text(table(title, ["matrices", "method", *map(str, PLANES)], rows)))
    gptq, rtn = (result["seconds"][method] for method in ("gptq", "rtn"))
    print(
        f"{result['tokens']} tokens. All {len(PLANES)} widths of {result['weights'] / 1e6:.1f} M"
        f" weights: {gptq:.1f} CPU seconds by gptq, {rtn:.1f} by rtn;"
        f" {result['peak_bytes'] / 1e9:.1f} GB at the peak, with the model and its statistics"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--depths", default="", help="of the decoder blocks; all if not given")
    parser.add_argument("--out", default="runs/quantizing.json")
    given = parser.parse_args()
    depths = tuple(int(depth) for depth in given.depths.split(",") if depth)
    write_json(given.out, main(given.model, given.blocks, given.length, depths))
