"""This project and transformers as engines of peers.py.

    python peers_ours.py '{"threads": N, "length": N, "models": {NAME: {"path": ..., "dtype": ...,
                          "runtime": "ours" or "transformers"}}}'

"ours" is optimize_for_inference and Decoder, "transformers" the model as it was loaded, with the
cache that its own generate uses. Adapters are merged.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from peers_child import answers, serve
from timing import keep_freed_memory
from torch import Tensor, nn

from hylora_kernels import Decoder, load_model, merge_adapters, optimize_for_inference
from hylora_kernels.backends.cpu.decoder import seconds_by_work


class TransformersSequence:
    def __init__(self, model: nn.Module, length: int):
        self.model = model

    def start(self, ids: list[int]) -> int:
        self.cache = transformers.DynamicCache(config=self.model.config)
        return self._forward(torch.tensor([ids]))

    def step(self) -> int:
        return self._forward(self.token)

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> int:
        found = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.token = found.logits[:, -1].argmax(-1, keepdim=True)
        return int(self.token)


class OurSequence:
    def __init__(self, model: nn.Module, length: int):
        self.decoder = Decoder(optimize_for_inference(model), length=length)

    def start(self, ids: list[int]) -> int:
        self.decoder.prefill(torch.tensor([ids]))
        return int(self.decoder.likeliest)

    def step(self) -> int:
        self.decoder.step(self.decoder.likeliest)
        return int(self.decoder.likeliest)

    def parts(self, count: int) -> dict[str, float]:
        """Seconds of a token by kind of work, the mean of `count`; none by the model's modules."""
        if self.decoder.runtime != "cpu":
            return {}
        before, start = seconds_by_work(), time.perf_counter()
        for _ in range(count):
            self.step()
        seconds, after = time.perf_counter() - start, seconds_by_work()
        spent = {work: (after[work] - before[work]) / count for work in after}
        return spent | {"Python": seconds / count - sum(spent.values())}


RUNTIMES = {"ours": OurSequence, "transformers": TransformersSequence}


def main(words: list[str]) -> None:
    out, given = answers(), json.loads(words[0])
    torch.set_num_threads(given["threads"])
    keep_freed_memory()
    sequences, sizes = {}, {}
    for name, wanted in given["models"].items():
        model, _ = load_model(wanted["path"], "cpu", wanted["dtype"])
        merge_adapters(model)
        sizes[name] = sum(parameter.nbytes for parameter in model.parameters())
        sequences[name] = RUNTIMES[wanted["runtime"]](model, given["length"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    ours = [sequence for sequence in sequences.values() if isinstance(sequence, OurSequence)]
    versions["our runtime"] = ", ".join(sorted({sequence.decoder.runtime for sequence in ours}))
    serve(sequences, versions, sizes, out)


if __name__ == "__main__":
    main(sys.argv[1:])
