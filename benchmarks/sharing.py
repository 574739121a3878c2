"""How often a shared basis, or a low-rank embedding, is worth its parameters in a real model.

    python benchmarks/sharing.py [--blocks 8] [--length 512] [--out runs/sharing.json]

No model is evaluated: errors are predicted increases of the loss, in nats a token, at equal
parameters. At each keep one budget is spent on all linears: on factors of their own, then with one
basis offered to each projection of blocks 0 and 1, 2 and 3, ...; then on the linears and the
embedding, which is tied to the head, left dense or offered as a low-rank pair.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from hylora_kernels.compression.calibration import Statistics, gather
from hylora_kernels.compression.embedding import (
    embedding_curve,
    embedding_target,
    factorize_embedding,
)
from hylora_kernels.compression.ranks import Curve, curve
from hylora_kernels.compression.share import shared_basis, shared_cost
from hylora_kernels.compression.tokens import TokenSums
from hylora_kernels.compression.whiten import factorize_whitened
from hylora_kernels.model.load import DEMO_MODEL, load_model
from hylora_kernels.model.structure import Structure, Target, discover
from hylora_kernels.support.console import as_text, table
from hylora_kernels.support.storage import write_json
from hylora_kernels.text.blocks import token_blocks

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
MULTIPLE = 16
FORMS = ("pair", "pivoted")  # Of the stack that shares a basis; the second is a bound, no layer.


@dataclass
class Choice:
    """The candidates of one unit of the budget. offered: from which index on they are offered
    instead of factors of its own. kind: the projection's name."""

    kind: str
    costs: np.ndarray
    errors: np.ndarray
    offered: int


def spent(choices: list[Choice], budget: float) -> tuple[float, Counter, list[int]]:
    """(the least error within the budget, the kinds that took what is offered, all indices).

    The error is the Lagrangian bound, which has no steps, so that two sets of candidates can be
    compared.
    """

    def at(price: float) -> list[int]:
        return [int(np.argmin(c.errors + price * c.costs)) for c in choices]

    def cost(chosen: list[int]) -> float:
        return sum(float(c.costs[i]) for c, i in zip(choices, chosen, strict=True))

    low, high = 1e-12, 1e18
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cost(at(middle)) > budget else (low, middle)
    chosen = at(high)
    took = Counter(c.kind for c, i in zip(choices, chosen, strict=True) if i >= c.offered)
    error = sum(float(c.errors[i]) for c, i in zip(choices, chosen, strict=True))
    return error + high * (cost(chosen) - budget), took, chosen


def kind_of(path: str) -> str:
    return re.sub(r".*\.", "", path)


def own(curves: list[Curve]) -> list[Choice]:
    return [Choice(kind_of(c.path), c.costs, c.errors, len(c.costs)) for c in curves]


def with_shared(curves: list[Curve], costs: np.ndarray, errors: np.ndarray) -> Choice:
    """Two linears with factors of their own, in every combination, or with one basis."""
    first, second = curves
    apart = np.add.outer(first.costs, second.costs).ravel()
    lost = np.add.outer(first.errors, second.errors).ravel()
    joined = np.append(apart, costs), np.append(lost, errors)
    return Choice(kind_of(first.path), *joined, len(apart))


def pairs_of(structure: Structure) -> list[tuple[Target, Target]]:
    """The same projection of blocks 0 and 1, 2 and 3, ..."""
    pairs = []
    for first, second in zip(structure.blocks[::2], structure.blocks[1::2], strict=False):
        others = {target.path.removeprefix(second.path): target for target in second.targets}
        for target in first.targets:
            twin = others.get(target.path.removeprefix(first.path))
            if twin is not None and twin.shape == target.shape:
                pairs.append((target, twin))
    return pairs


def own_curves(statistics: Statistics, progress: bool) -> dict[str, Curve]:
    found = {}
    targets = [(group.leader.path, t) for group in statistics.groups for t in group.targets]
    for leader, target in tqdm(targets, "own factors", disable=not progress):
        G, C = statistics.inputs[leader], statistics.gradients[target.path]
        S = factorize_whitened(target.path, target.matrix, G, C).S * statistics.nats(leader) ** 0.5
        found[target.path] = curve(target.path, target.shape, S, multiple=MULTIPLE)
    return found


def shared_choices(
    structure: Structure, statistics: Statistics, curves: dict[str, Curve], progress: bool
) -> dict[str, list[Choice]]:
    """form -> a Choice for each pair, and for each linear without a twin."""
    leader = {path: group.leader.path for group in structure.groups for path in group.paths}
    choices: dict[str, list[Choice]] = {form: [] for form in FORMS}
    left = dict(curves)
    for twins in tqdm(pairs_of(structure), "shared bases", disable=not progress):
        weights = [t.matrix for t in twins]
        inputs = [statistics.inputs[leader[t.path]] for t in twins]
        nats = statistics.nats(leader[twins[0].path])
        basis = shared_basis(weights, inputs, [statistics.gradients[t.path] for t in twins])
        separate = [left.pop(t.path) for t in twins]
        ranks = np.arange(MULTIPLE, len(basis.SVh), MULTIPLE)
        pair = np.array([shared_cost(int(rank), weights) for rank in ranks])
        for form, costs in (("pair", pair), ("pivoted", pair - ranks**2)):
            fits = costs < sum(c.dense_cost for c in separate)
            errors = nats * basis.errors.cpu().numpy()[ranks[fits]]
            choices[form].append(with_shared(separate, costs[fits], errors))
    return {form: [*found, *own(list(left.values()))] for form, found in choices.items()}


def compared(curves: list[Curve], shared: dict[str, list[Choice]], embedding: Curve) -> list[dict]:
    """The predicted errors at each keep, in nats a token."""
    dense = sum(c.dense_cost for c in curves)
    fixed = Choice("", embedding.costs[-1:], embedding.errors[-1:], 1)
    offered = Choice("", embedding.costs, embedding.errors, 0)
    rows = []
    for keep in KEEPS:
        row: dict = {"keep": keep, "own": spent(own(curves), keep * dense)[0]}
        for form, choices in shared.items():
            error, took, _ = spent(choices, keep * dense)
            row[form] = {"error": error, "chosen": took.total(), "kinds": dict(took)}
        budget = keep * (dense + embedding.dense_cost)
        least = embedding.dense_cost + sum(int(c.costs[0]) for c in curves)
        error, _, chosen = spent([*own(curves), offered], budget)
        row["embedding"] = {
            "dense": spent([*own(curves), fixed], budget)[0] if budget > least else None,
            "low rank": error,
            "rank": int(embedding.ranks[chosen[-1]]) or None,
        }
        rows.append(row)
    return rows


def main(name: str = DEMO_MODEL, blocks: int = 8, length: int = 512, progress: bool = True) -> dict:
    """The results as JSON's own types; prints them as tables."""
    started = time.process_time()
    model, tokenizer = load_model(name, "cpu", "float32")
    ids = token_blocks("brown", tokenizer, length, "train", blocks, seed=0, progress=progress)
    structure, target = discover(model), embedding_target(model)
    sums = TokenSums(model)
    statistics = gather(model, ids, structure.groups, True, progress, observers=[sums])
    S = factorize_embedding(model, target, sums.finish(), "two_sided").S
    embedding = embedding_curve(target, S, "auto", MULTIPLE)
    curves = own_curves(statistics, progress)
    shared = shared_choices(structure, statistics, curves, progress)
    result = {
        "model": name,
        "tokens": ids.numel(),
        "pairs": len(pairs_of(structure)),
        "rows": compared(list(curves.values()), shared, embedding),
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    show(result)
    return result


def show(result: dict) -> None:
    rows: list[list] = []
    for row in result["rows"]:
        offers = [row[form] for form in FORMS]
        cells = [cell for offer in offers for cell in (offer["error"], offer["chosen"])]
        rows.append([f"{row['keep']:g}", row["own"], *cells])
    heads = ("keep", "own factors", "shared pair", "chosen", "shared pivoted", "chosen")
    title = f"{result['pairs']} pairs of linears: nats a token, pairs that take a shared basis"
    print(as_text(table(title, heads, rows)))
    rows = [[f"{row['keep']:g}", *row["embedding"].values()] for row in result["rows"]]
    heads = ("keep of linears and embedding", "embedding dense", "low rank", "its rank")
    print(as_text(table("embedding in the budget: nats a token", heads, rows)))
    print(f"{result['tokens']} tokens, {result['cpu_seconds']} CPU seconds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", default="runs/sharing.json")
    given = parser.parse_args()
    write_json(given.out, main(given.model, given.blocks, given.length))
