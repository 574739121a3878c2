"""An engine of peers.py as a process that stays warm: one line of JSON asks, one answers.

    {"do": "prefill", "model": NAME, "ids": [...]}    -> {"seconds": S, "token": T}
    {"do": "decode", "model": NAME, "count": N}       -> {"seconds": [N of them], "tokens": [...]}
    {"do": "parts", "model": NAME, "count": N}        -> {"seconds": {KIND: S, ...}}

prefill begins a new sequence and gives the greedy token after it; decode makes the next ones, each
timed, from the token to the one after it. parts is the mean of N more tokens by kind of work, empty
where an engine doesn't tell. The first line, before any request, has the versions and
the bytes of each model's weights. Everything else that a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO


class Sequence(Protocol):
    """One model with one sequence."""

    def start(self, ids: list[int]) -> int:
        """Forget the sequence, read these tokens; the likeliest token after them."""

    def step(self) -> int:
        """Append the likeliest token; the likeliest one after it."""

    # An engine that tells has also parts(count: int) -> dict[str, float].


def answers() -> TextIO:
    """stdout for answers alone: what others print goes to stderr from here on."""
    stream = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return stream


def serve(
    sequences: Mapping[str, Sequence],
    versions: Mapping[str, str],
    sizes: Mapping[str, int],
    out: TextIO,
) -> None:
    print(json.dumps({"versions": versions, "bytes": sizes}), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(sequences, json.loads(line))), file=out)


def answer(sequences: Mapping[str, Sequence], request: dict) -> dict:
    sequence = sequences[request["model"]]
    if request["do"] == "prefill":
        token, seconds = _timed(lambda: sequence.start(request["ids"]))
        return {"seconds": seconds, "token": token}
    if request["do"] == "parts":
        parts = getattr(sequence, "parts", lambda count: {})
        return {"seconds": parts(request["count"])}
    steps = [_timed(sequence.step) for _ in range(request["count"])]
    return {"seconds": [s for _, s in steps], "tokens": [token for token, _ in steps]}


def _timed(call):
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start
