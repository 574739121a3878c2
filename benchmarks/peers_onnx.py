"""onnxruntime-genai as one of the engines of peers.py.

    python peers_onnx.py '{"threads": N, "length": N, "models": {NAME: FOLDER}}'

It runs in an environment of its own (peers_setup.py), without this project's package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime_genai as genai
from peers_child import answers, serve


class OnnxSequence:
    def __init__(self, folder: str, threads: int, length: int):
        config = genai.Config(folder)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model, self.length, self.generator = genai.Model(config), length, None

    def start(self, ids: list[int]) -> int:
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.length, min_length=self.length)
        parameters.set_search_options(do_sample=False, batch_size=1)
        self.generator = genai.Generator(self.model, parameters)
        self.generator.append_tokens([ids])
        return self.step()

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


def main(words: list[str]) -> None:
    out, given = answers(), json.loads(words[0])
    sequences, sizes = {}, {}
    for name, folder in given["models"].items():
        sequences[name] = OnnxSequence(folder, given["threads"], given["length"])
        sizes[name] = sum(file.stat().st_size for file in Path(folder).glob("model.onnx*"))
    serve(sequences, {"onnxruntime-genai": genai.__version__}, sizes, out)


if __name__ == "__main__":
    main(sys.argv[1:])
