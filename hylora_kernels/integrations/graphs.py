"""A model as a graph of ONNX, OpenVINO or torch.export, traced by transformers' exporters.

They trace a model with its cache into one graph that reads a prompt and decodes. Our ops leave
their traces as plain products (ops/export.py), so they take a compressed model as any other.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylora_kernels.integrations.codes import codes_as_bytes
from hylora_kernels.model.context import vocabulary_size

# What is written -> the exporter of transformers that does it, and the packages that it takes.
EXPORTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("OnnxExporter", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": ("OpenVINOExporter", ("openvino",)),
    "torch": ("DynamoExporter", ()),
}
TRACED = (3, 5)  # rows and tokens of the prompt that is traced: a 1 would become a constant


def packages(to: str) -> tuple[str, ...]:
    """Those that an export takes beside torch and transformers."""
    return EXPORTERS[to][1] if to in EXPORTERS else ("gguf",) if to == "gguf" else ()


def write_graph(model: PreTrainedModel, folder: Path, to: str, run: bool) -> GraphSession | None:
    """Write the graph, its weights and the model's config to `folder`; a session to run it, if
    that is wanted."""
    exporters = _exporters()
    name, _ = EXPORTERS[to]
    inputs = _inputs(model)
    empty_cache = _without_tokens(inputs)
    exporter, traced = getattr(exporters, name)(), copy.copy(model)
    # Keys and values go in and out, as in the other graphs, where OpenVINO's own way is a state.
    options = {"stateful": False} if to == "openvino" else {}
    config = exporter.config_class(dynamic=True, dynamic_shapes=_free_dims(inputs), **options)
    # torch.export's own program reads the bit planes as they are stored.
    codes = nullcontext() if to == "torch" else codes_as_bytes(model, for_onnx=to == "onnx")
    with codes, _without_noise():
        exported = exporter.export(traced, inputs | {"use_cache": True}, config)
    if to == "torch":
        (component,) = exported.components.values()
        component.program = component.program.run_decompositions()
        component.program.example_inputs = None  # a cache would be saved as a pickle
    exported.config = copy.deepcopy(model.config)
    if hasattr(exported.config, "quantization_config"):  # these aren't the weights it speaks of
        del exported.config.quantization_config
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)
    return GraphSession(folder, to, empty_cache) if run else None


class GraphSession:
    """One sequence of an exported graph (agreement.Session), run by transformers' ExportedModel."""

    def __init__(self, folder: Path, to: str, empty_cache: Any):
        options = {}
        if to == "onnx":
            import onnxruntime

            options["session_options"] = onnxruntime.SessionOptions()
            options["session_options"].intra_op_num_threads = torch.get_num_threads()
        exported_model = _exporters().ExportedModel
        self._model = exported_model.from_pretrained(folder, device="cpu", **options)
        (component,) = self._model.components.values()
        self._names, self._empty = set(component.metadata.kwargs), empty_cache
        self._cache, self._tokens = empty_cache, 0

    def prefill(self, ids: Tensor) -> Tensor:
        self._cache, self._tokens = copy.deepcopy(self._empty), 0
        return self._forward(ids)

    def step(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        before, self._tokens = self._tokens, self._tokens + ids.shape[1]
        positions = torch.arange(before, self._tokens, device="cpu")
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones(1, self._tokens, dtype=torch.int64, device="cpu"),
            "position_ids": positions[None],
            "cache_position": positions,
            "past_key_values": self._cache,
        }
        output = self._model(**{n: value for n, value in given.items() if n in self._names})
        self._cache = output.past_key_values
        return output.logits[:, -1]


@contextmanager
def _without_noise() -> Iterator[None]:
    """Silence what torch.onnx says of transformers' translations and of torch's own deprecated
    calls: it is no matter of the model or of the export."""
    translations = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = translations.level
    translations.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        translations.setLevel(level)


def _exporters() -> Any:
    try:
        from transformers import exporters
    except ImportError as error:
        from transformers import __version__

        raise ImportError(
            f"this export needs transformers.exporters, which transformers {__version__} doesn't "
            "have: pip install 'transformers>=5.23'"
        ) from error
    return exporters


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of a forward that reads two tokens after some, as generate() gives them."""
    from transformers.exporters.utils import decompose_prefill_decode

    ids = torch.arange(TRACED[0] * TRACED[1], device="cpu").view(TRACED) % vocabulary_size(model)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # generate() drops a mask without padding, and the graph would have none
    given = {"input_ids": ids, "attention_mask": mask}
    try:
        stages = decompose_prefill_decode(model, given, multi_token_decode=True)
    finally:
        vars(model).pop("forward", None)  # its own wrapper, which it leaves on the object
    found = stages["decode"][1]
    if not hasattr(found.get("past_key_values"), "layers"):
        raise ValueError(f"model: a {type(model).__name__} keeps no keys and values to trace")
    kept = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return kept | {"past_key_values": found["past_key_values"]}


def _free_dims(inputs: dict[str, Any]) -> dict[str, Any]:
    """The dims that may change: rows and tokens, of keys and values [rows, heads, tokens, head dim]
    too. With all dims declared free, tracing takes longer."""
    free, cache = torch.export.Dim.AUTO, "past_key_values"
    shapes: dict[str, Any] = {
        name: dict.fromkeys(range(min(2, value.dim())), free)
        for name, value in inputs.items()
        if name != cache
    }
    shapes[cache] = [{0: free, 2: free} for _ in range(2 * len(inputs[cache].layers))]
    return shapes


def _without_tokens(inputs: dict[str, Any]) -> Any:
    """The cache of `inputs`, with one row and no tokens."""
    cache = copy.deepcopy(inputs["past_key_values"])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1, :, :0], layer.values[:1, :, :0]
    return cache
