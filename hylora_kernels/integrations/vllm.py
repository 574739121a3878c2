"""vLLM: `vllm serve FOLDER` and LLM(FOLDER) run our folders.

vLLM imports this module by its entry point, vllm.general_plugins, in each of its processes; nothing
of ours imports it.

vLLM computes q, k and v, and gate and up, as one layer. Such a layer has a *member* for each matrix
on disk, of a rank and a form of its own, or dense. Its tensors come as vLLM's loader reads them; a
member that has all of them is packed for inference, and members on one input become one call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.utils.torch_utils import direct_register_custom_op

from hylora_kernels import backends
from hylora_kernels.inference.optimize import dtype_of, weights_of
from hylora_kernels.layers.experts import stack_of
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear, dense_weights
from hylora_kernels.model.checkpoint import check_pivots
from hylora_kernels.model.files import CheckpointError, shown
from hylora_kernels.model.format import METHOD, check_entry, guard_of
from hylora_kernels.model.skeleton import empty_layer
from hylora_kernels.model.slots import Slot, slots_of
from hylora_kernels.model.tensorfile import checksum
from hylora_kernels.ops.packed import packed_embedding, packed_group, packed_linear

SOURCE = Path("config.json")
# A matrix of codes is several tensors: <path>.SVh.codes is loaded into a parameter SVh_codes, since
# one member of a fused layer may have a plain SVh and another one SVh.codes.
OF_CODES = re.compile(r"\.(SVh|U|matrix)\.(codes|scales|zeros|empty)$")


def register() -> None:
    """The entry point. Importing this module has done what is to be done."""


@register_quantization_config(METHOD)
class HyLoRAConfig(QuantizationConfig):
    """The entry "quantization_config" of a saved model's config.json (model/format.py).

    modules: path on disk -> entry; paths are renamed as vLLM's model renames its weights.
    tied:    name of a tensor -> the name that it is stored under.
    known:   name of a tensor -> its checksum.
    slots:   name of a tensor -> its place in a member, for the layers that vLLM has made.
    """

    def __init__(self, ours: dict[str, Any]) -> None:
        """Raises CheckpointError naming a field that can't be read, NotImplementedError naming a
        layer that vLLM can't run."""
        super().__init__()
        check_entry(ours, SOURCE)
        for path, entry in ours["modules"].items():
            if stack_of(path) is not None:
                raise NotImplementedError(f"{path}: compressed experts don't run in vLLM")
            if "form" not in entry and "bits" not in entry:
                raise NotImplementedError(f"{path}: a low-rank embedding doesn't run in vLLM")
        self.modules, self.tied, self.guard = ours["modules"], ours.get("tied", {}), guard_of(ours)
        self.known = {
            name: crc for file in ours["checksums"].values() for name, crc in file.items()
        }
        self.slots: dict[str, Slot] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HyLoRAConfig:
        return cls(config)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        name = hf_to_vllm_mapper.map_name
        self.modules = {name(path): entry for path, entry in self.modules.items()}
        self.tied = {name(tensor): name(source) for tensor, source in self.tied.items()}
        self.known = {name(tensor): crc for tensor, crc in self.known.items()}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        names: dict[re.Pattern, str | None] = {OF_CODES: r".\1_\2"}
        if self.guard is not None:
            names[re.compile(f"^{re.escape(self.guard)}$")] = None
        return WeightsMapper(orig_to_new_regex=names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method of a compressed layer; vLLM's own for a dense one."""
        if _is_embedding(layer):
            # Many models of vLLM give their embedding no prefix.
            known = [path for path, entry in self.modules.items() if "form" not in entry]
            paths = [prefix] if prefix else known
        elif isinstance(layer, LinearBase | ParallelLMHead):
            parent, _, name = prefix.rpartition(".")
            parts = self.packed_modules_mapping.get(name, [name])
            paths = [f"{parent}.{part}" if parent else part for part in parts]
        else:
            return None
        if any(path in self.modules for path in paths):
            return HyLoRAMethod(self, paths)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _is_embedding(layer: nn.Module) -> bool:
    """False for the output head, which is a subclass in vLLM."""
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


class HyLoRAMethod(LinearMethodBase):
    """What one layer of vLLM computes, and the members that it is made of.

    paths:   of the members on disk, in the order of the layer's outputs.
    members: SVDLoRALinear, QuantizedLinear, nn.Linear or QuantizedEmbedding, without bias.
    call:    (x, biases of the members) -> y once all is loaded; rows: ids -> rows of an embedding.
    """

    members: nn.ModuleList
    call: Callable[[Tensor, Sequence[Tensor | None]], Tensor]
    rows: Callable[[Tensor], Tensor] | None

    def __init__(self, config: HyLoRAConfig, paths: Sequence[str]) -> None:
        self.config, self.paths = config, paths
        self.embedding_method: HyLoRAMethod | None = None  # whose weights a tied head reads

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Put an empty parameter into the layer for each name that a tensor of a member can have;
        it hands what vLLM loads to the member."""
        here = (input_size_per_partition, sum(output_partition_sizes))
        if here != (input_size, output_size):
            raise NotImplementedError(
                f"{self.paths[0]}: tensor parallelism must be 1: a process would hold "
                f"{list(here)} of {[input_size, output_size]}"
            )
        sizes = output_partition_sizes
        if isinstance(layer, VocabParallelEmbedding):
            sizes = [layer.org_vocab_size]  # without vLLM's padding
        elif len(self.paths) == 1:
            sizes = [output_size]  # fused on disk, too
        if len(sizes) != len(self.paths):
            raise NotImplementedError(f"{layer.prefix}: {len(sizes)} parts of {self.paths}")
        self.dtype, self.device = params_dtype, torch.empty(0).device
        self.members = nn.ModuleList(
            self._member(path, input_size, n, _is_embedding(layer))
            for path, n in zip(self.paths, sizes, strict=True)
        )
        self.sizes, self.width = sizes, sum(sizes)
        dtypes = {}
        for path, member in zip(self.paths, self.members, strict=True):
            for name, slot in slots_of(member).items():
                if slot.kind != "made":
                    self.config.slots[f"{path}.{name}"] = slot
                    dtypes[name] = self._dtype(slot.tensor)
        for name, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self._load, name)  # type: ignore[attr-defined]
            layer.register_parameter(name.replace(".", "_"), parameter)
        # As vLLM's attention does: compiled code finds the layer by its name.
        self.name = f"{METHOD}.{self.paths[0]}"
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = layer

    def _member(self, path: str, inputs: int, outputs: int, is_embedding: bool) -> nn.Module:
        with torch.device("meta"):
            dense = (
                nn.Embedding(outputs, inputs) if is_embedding else nn.Linear(inputs, outputs, False)
            )
        entry = self.config.modules.get(path)
        if entry is None:
            return dense
        try:
            return empty_layer(dense, entry)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{SOURCE}: modules[{shown(path)}]: {error}") from error

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        """The dtype in which a tensor of a member is kept: vLLM's for floats."""
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _load(
        self, name: str, parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None
    ) -> None:
        """Put what vLLM's loader read for a parameter into the member that its shard names, and
        into all that are tied to it."""
        if isinstance(shard, tuple):
            raise NotImplementedError(f"{self.paths[0]}: one matrix for the shards {shard}")
        index = 0 if shard is None else shard if isinstance(shard, int) else "qkv".index(shard)
        name = f"{self.paths[index]}.{name}"
        here = self._value(name, tensor)
        for twin in (name, *(twin for twin, source in self.config.tied.items() if source == name)):
            if twin in self.config.slots:
                self.config.slots[twin].set(here)

    def _value(self, name: str, tensor: Tensor) -> Tensor:
        """A copy: a loader may read the next tensor into the same memory."""
        slot = self.config.slots.get(name)
        if slot is None:
            raise CheckpointError(f"unexpected tensor {shown(name)}: the model has none")
        if slot.tensor.shape != tensor.shape:
            wanted, found = list(slot.tensor.shape), list(tensor.shape)
            raise CheckpointError(f"tensor {shown(name)} must have shape {wanted}, has {found}")
        known = self.config.known.get(name)
        if known is not None and checksum(tensor.cpu()) != known:
            raise CheckpointError(f"tensor {shown(name)} doesn't have its checksum in {SOURCE}")
        check_pivots(tensor, slot, SOURCE, name)
        return tensor.to(self.device, self._dtype(slot.tensor), copy=True)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let the head read the embedding's packed codes where the file has both as one matrix."""
        method = embed_tokens.quant_method
        head = f"{self.paths[0]}."
        if isinstance(method, HyLoRAMethod) and any(t.startswith(head) for t in self.config.tied):
            self.embedding_method = method
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the members and free their own memory. Raises CheckpointError naming a tensor that
        never came."""
        if not self.members:
            return
        for path, member in zip(self.paths, self.members, strict=True):
            for name, slot in slots_of(member).items():
                self.config.slots.pop(f"{path}.{name}", None)
                if slot.tensor.is_meta:
                    raise CheckpointError(f"tensor {shown(f'{path}.{name}')} is missing")
        if self.embedding_method is None:
            members = self.members.to(self.device).eval().requires_grad_(False)
            self.call, self.rows = _packed(list(members))
        self.members = nn.ModuleList()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.vllm.hylora_layer(x, bias, self.name, self.width, self.dtype)
        return self.run(x, bias)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            width = layer.embedding_dim
            return torch.ops.vllm.hylora_layer(ids, None, self.name, width, self.dtype)
        return self.run(ids, None)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] of floats -> y [..., N], or ids [...] -> rows [..., K]."""
        method = self.embedding_method or self
        if not x.is_floating_point():
            return method.rows(x)
        biases = [None] * len(self.sizes)
        if bias is not None:
            biases = bias[: self.width].split(self.sizes)
        return method.call(x, biases)


def _packed(members: list[nn.Module]) -> tuple[Callable, Callable | None]:
    """((x, biases) -> the members' outputs side by side, ids -> rows of an embedding)."""
    first = members[0]
    if isinstance(first, QuantizedEmbedding):
        weights = dense_weights(first.matrix.matrix, dtype=first.matrix.dtype)
        packed = backends.pack(weights, first.matrix.dtype)
        if packed is None:
            head = QuantizedLinear.from_weights(weights)
            return _one_by_one([head], [None]), first
        return _one_by_one([first], [packed]), partial(packed_embedding, packed=packed)
    several = len(members) > 1
    packed = [backends.pack(weights_of(m), dtype_of(m), for_group=several) for m in members]
    if not several or None in packed or backends.why_no_group(packed):
        return _one_by_one(members, packed), None
    group = backends.group(packed)
    width = sum(p.out_features for p in packed)

    def grouped(x: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        return packed_group(x, group, biases)[..., :width].contiguous()

    return grouped, None


def _one_by_one(members: list[nn.Module], packed: list[Any]) -> Callable:
    """(x, biases) -> each member's output by its packed layer, or its own forward where packing
    gains nothing."""

    def one(member: nn.Module, packed: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if packed is not None:
            return packed_linear(x, packed, bias)
        y = member(x)
        return y if bias is None else y + bias

    def together(x: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        parts = [one(*member, x, bias) for member, bias in zip(pairs, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    pairs = [(m if p is None else None, p) for m, p in zip(members, packed, strict=True)]
    return together


def _layer_op(x: Tensor, bias: Tensor | None, name: str, width: int, dtype: torch.dtype) -> Tensor:
    return get_forward_context().no_compile_layers[name].quant_method.run(x, bias)


def _layer_op_fake(
    x: Tensor, bias: Tensor | None, name: str, width: int, dtype: torch.dtype
) -> Tensor:
    shape = x.shape[:-1] if x.is_floating_point() else x.shape
    return torch.empty(*shape, width, dtype=dtype, device=x.device)


direct_register_custom_op("hylora_layer", _layer_op, fake_impl=_layer_op_fake)
