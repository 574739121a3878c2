"""What may be asked of a model: one check for every function that takes one."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.layers.quantized import QuantizedFactor
from hylora_kernels.model.by_block import in_memory, is_by_block
from hylora_kernels.model.context import probe_ids, vocabulary_size
from hylora_kernels.model.modules import eval_mode

_causal: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_model(
    model: nn.Module,
    use: Literal["generate", "evaluate", "train", "adapt", "replace"],
    name: str = "model",
) -> None:
    """Raise TypeError or ValueError unless `model` is a causal language model fit for a use.

    use:  "train" means its adapters, "adapt" to give its linears some, "replace" its linears by
          low-rank layers. Of quantised models only ours (QuantizedLinear) can get adapters, and
          none be replaced; a compiled or offloaded one can generate and be evaluated only.
    name: of the argument, for the message.

    Each use but "generate" runs a model that it sees for the first time on two rows of eight
    tokens, which must agree in front of the token in which they differ: a model that looks ahead
    predicts what it was shown.
    """
    if use in ("generate", "evaluate"):
        model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model.
    _check_kind(model, name)
    _check_weights(model, use, name)
    if use != "generate" and model not in _causal:
        _check_causal(model, name)
        _causal.add(model)


def require_finite(model: nn.Module) -> None:
    """Raise FloatingPointError naming the first layer of which a parameter is not finite."""
    for name, parameter in model.named_parameters():
        if not in_memory(model, name, parameter).isfinite().all():
            path, _, kind = name.rpartition(".")
            raise FloatingPointError(f"layer {path}: its {kind} is not finite")


def _check_kind(model: nn.Module, name: str) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        got = repr(model) if isinstance(model, str) else f"a {kind}"
        raise TypeError(
            f"{name} must be a transformers causal language model, got {got}: load_model(...) "
            "loads one"
        )
    if _has_peft_layers(model):
        raise TypeError(
            f"{name} must have no adapters of PEFT, got a {kind} with some: fold them in with "
            "merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        inner = next((p for p, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
        hint = "" if inner is None else f": pass the model inside, its .{inner}"
        raise TypeError(f"{name} must be a transformers PreTrainedModel, got a {kind}{hint}")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} must be a decoder alone, a causal language model; a {kind} is an encoder with "
            "a decoder"
        )
    if not model.can_generate():
        raise ValueError(
            f"{name} must predict the next token; a {kind} has no output head that does: "
            "AutoModelForCausalLM loads one that has"
        )


def _has_peft_layers(model: nn.Module) -> bool:
    if "peft" not in sys.modules:  # Nobody can have made such layers without it.
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules())


def _check_weights(model: nn.Module, use: str, name: str) -> None:
    changes = use in ("train", "adapt", "replace")
    if changes:
        refuse_packed(model)
    codes = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedFactor)}
    if codes and use == "replace":
        raise ValueError(
            f"{name} is quantised already, {next(iter(codes))} and others: take the model that it "
            "was made from"
        )
    ours = {id(p) for m in codes.values() for p in m.parameters()}
    for path, tensor in chain(model.named_parameters(), _codes(model)):
        is_read = use == "replace" and is_by_block(model)
        if tensor.is_meta and not is_read and (changes or not _has_offload_hooks(model)):
            raise ValueError(
                f"{name} must have its weights in memory, but {path} is on the meta device: load "
                "it without offloading"
            )
        if use == "train" and isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} must be whole in each process, but {path} is sharded: pass the model "
                "before fully_shard; finetune's shard=True divides it"
            )
        if use in ("adapt", "replace") and not (_is_plain(tensor) or id(tensor) in ours):
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {type(tensor).__name__}"
            raise ValueError(
                f"{name} must have plain floating-point weights, but {path} is a {kind}: load it "
                "without quantization or sharding, or dequantize it first"
            )


def _codes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The integer matrices of a quantised model, which GPTQ and AWQ keep as buffers."""
    if getattr(model, "hf_quantizer", None) is not None:
        for path, buffer in model.named_buffers():
            if buffer.dim() > 1 and buffer.dtype in (torch.int32, torch.int8, torch.uint8):
                yield path, buffer


def _is_plain(tensor: Tensor) -> bool:
    """True for an ordinary tensor of floats; quantised and sharded weights are subclasses, or codes
    of one byte or more."""
    kinds = (Tensor, nn.Parameter)
    ordinary = type(tensor) in kinds or type(tensor.data) in kinds
    return ordinary and tensor.is_floating_point() and tensor.element_size() > 1


def _has_offload_hooks(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@torch.no_grad()
def _check_causal(model: nn.Module, name: str) -> None:
    ids = probe_ids(model).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary_size(model)
    try:
        with eval_mode(model):
            logits = model(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
        raise ValueError(
            f"{name} must run on token ids alone, but a {type(model).__name__} fails: {error}"
        ) from error
    if logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{name} must give logits [n, L, words] for token ids [n, L], but a "
            f"{type(model).__name__} gives {list(logits.shape)} for {list(ids.shape)}"
        )
    one, other = logits[:, :-1].float()
    # Equal rows differ in rounding at most. Weights that are not finite are another check's.
    tolerance = 1e-4 if logits.dtype == torch.float32 else 0.02
    if (one - other).norm() > tolerance * one.norm():
        raise ValueError(
            f"{name} must be causal, but the predictions of this {type(model).__name__} depend on "
            "later tokens"
        )
