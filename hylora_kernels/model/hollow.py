"""A hollow model: what a config alone says, as an object that the package reads like a loaded one.

Every parameter is a zero on the CPU, expanded to the shape that the weight has, so a model of any
size takes no memory. Sizes, names, ties and the structure (model/structure.py) are the loaded
model's. Its forward runs inside `without_products`, where each product gives zeros at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from hylora_kernels.layers.experts import unstack_for
from hylora_kernels.model.dense import auto_class, refuse_code
from hylora_kernels.model.files import CheckpointError, read_json, reading
from hylora_kernels.model.format import METHOD
from hylora_kernels.model.limits import MAX_BUFFERS, check_config, unusual_fields
from hylora_kernels.model.load import find_config
from hylora_kernels.model.modules import empty_weights
from hylora_kernels.model.skeleton import slots_of
from hylora_kernels.model.structure import Structure, discover


def hollow_model(
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """The model of a config, its parameters zeros that take no memory, its experts linears.

    name_or_path: as for load_model(), or the path of a config.json. Nothing but the config is read.
    dtype:        None is the one that the config names, bfloat16 where it names none.

    Raises ValueError naming the argument, CheckpointError naming the file.
    """
    path = find_config(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    config = read_json(path, unique=False)
    ours = config.get("quantization_config")
    if isinstance(ours, dict) and ours.get("quant_method") == METHOD:
        raise CheckpointError(f"{path}: this model has been compressed already; take the dense one")
    if not trust_remote_code:
        check_config(config, path)
        refuse_code(path.parent, config)
    kind = str(config.get("model_type"))
    usual = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401
    with reading(path, "no config comes of it", lambda: unusual_fields(config, usual)):
        described = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    if hasattr(described, "quantization_config"):
        del described.quantization_config
    return hollow_model_of(described, dtype, path, trust_remote_code)


def hollow_model_of(
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    source: str | Path = "config",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """hollow_model() of a config of transformers."""
    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    with (
        reading(source, "no model comes of it", lambda: unusual_fields(vars(config), type(config))),
        empty_weights(),
    ):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    made = 0
    hollow: dict[int, nn.Parameter] = {}
    for slot in slots_of(model).values():
        if slot.kind != "parameter":
            made += slot.tensor.nbytes
            continue
        if (key := id(slot.tensor)) not in hollow:
            hollow[key] = nn.Parameter(_zeros(slot.tensor.shape, dtype), requires_grad=False)
        setattr(slot.module, slot.name, hollow[key])
    if made > MAX_BUFFERS:
        raise CheckpointError(
            f"{source}: the model makes buffers of {made} bytes, more than the limit of"
            f" {MAX_BUFFERS}"
        )
    stacks = [name for name, p in model.named_parameters() if p.ndim == 3]
    for name in stacks:
        try:
            unstack_for(model, [f"{name}.0"])
        except ValueError:
            continue  # Left alone, as compress() leaves it.
    return model.eval()


def structure_of(
    model: PreTrainedModel, include: list[str] | None = None, exclude: list[str] | None = None
) -> Structure:
    """discover() of a hollow model."""
    with without_products():
        return discover(model, include, exclude)


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros of a shape in one number's memory. A stack of experts has one for each, so that no two
    have one address, by which tied weights are known."""
    one = torch.zeros(shape[0] if len(shape) == 3 else 1, dtype=dtype, device="cpu")
    return one.view(-1, *[1] * (len(shape) - 1)).expand(shape) if len(shape) else one[0]


class _Product(torch.autograd.Function):
    """Zeros in the place of a product, and of its gradient; nothing is kept for the backward."""

    @staticmethod
    def forward(ctx, x, outputs):
        ctx.inputs = x.shape
        return x.new_zeros(*x.shape[:-1], outputs)

    @staticmethod
    def backward(ctx, dy):
        return dy.new_zeros(ctx.inputs), None


class without_products(TorchFunctionMode):
    """Inside, in this thread, products with a weight give zeros at once.

    attention: sum over the calls of torch's attention of heads * head size, the numbers that q and
               k multiply and those that the scores multiply, of one token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            return _Product.apply(x, weight.shape[0])
        if func is torch.addmm:  # Conv1D's
            return _Product.apply(args[1], args[2].shape[1])
        if func is F.scaled_dot_product_attention:
            q, v = args[0], args[2] if len(args) > 2 else kwargs["value"]
            self.attention += q.shape[-3] * (q.shape[-1] + v.shape[-1]) // 2
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Activations:
    """What autograd keeps of one token, bytes: in all blocks, in the largest one; and `attention`,
    the sum over all blocks of heads * head size."""

    all_blocks: float
    one_block: float
    attention: int


def activations_of(
    model: PreTrainedModel, structure: Structure, length: int, tokens: int = 64
) -> Activations:
    """The memory that a forward with gradients keeps for its backward, seen by running a short one.

    length: the tokens of a block of text; no more than `tokens` are run.
    """
    L = min(length, tokens)
    ids = torch.zeros(1, L, dtype=torch.int64, device="cpu")
    sums: list[int] = []
    alive: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def begins(_module, _args):
        sums.append(0)
        alive.clear()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if sums and storage.data_ptr() not in alive and storage.data_ptr() not in weights:
            alive[storage.data_ptr()] = tensor
            sums[-1] += storage.nbytes()
        return tensor.new_empty(0)  # No backward follows.

    def embedded(_module, _args, output):
        return output.detach().requires_grad_().clone()

    hooks = [model.get_input_embeddings().register_forward_hook(embedded)]
    hooks += [block.module.register_forward_pre_hook(begins) for block in structure.blocks]
    try:
        with (
            without_products() as seen,
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    # What follows the last block counts as its own.
    return Activations(sum(sums) / L, max(sums[:-1] or sums or [0]) / L, seen.attention)


@contextmanager
def filled(module: nn.Module, scale: float = 0.02) -> Iterator[nn.Module]:
    """`module` of a hollow model with random weights; afterwards it is as it was."""
    slots = [s for s in slots_of(module).values() if s.kind == "parameter"]
    made: dict[int, Tensor] = {}
    try:
        for slot in slots:
            if (key := id(slot.tensor)) not in made:
                new = torch.empty(slot.tensor.shape, dtype=slot.tensor.dtype, device="cpu")
                made[key] = new.uniform_(-scale, scale)
            setattr(slot.module, slot.name, nn.Parameter(made[key], requires_grad=False))
        yield module
    finally:
        for slot in slots:
            setattr(slot.module, slot.name, slot.tensor)


def first_call(
    model: PreTrainedModel, block: nn.Module, length: int
) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) of the model's call of a block on `length` tokens."""
    found: list[tuple[tuple, dict[str, Any]]] = []

    class Seen(Exception):
        pass

    def hook(_module, args, kwargs):
        found.append((args, kwargs))
        raise Seen

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    ids = torch.zeros(1, length, dtype=torch.int64, device="cpu")
    try:
        with without_products(), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Seen:
        pass
    finally:
        handle.remove()
    return found[0]
