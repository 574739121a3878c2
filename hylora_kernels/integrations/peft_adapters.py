"""A model's own adapters as one of PEFT, and one of PEFT as its own, in memory and in files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylora_kernels.evaluation.perplexity import Perplexity, perplexity
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.check import check_model
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.context import context_length
from hylora_kernels.model.files import CheckpointError, read_json, reading, require_file
from hylora_kernels.model.load import tokenizer_of
from hylora_kernels.model.modules import (
    base_of,
    freeze_all_but_adapters,
    holder_counts,
)
from hylora_kernels.model.saving import save_in_hylora_format, save_pretrained
from hylora_kernels.model.structure import as_matrix, is_linear
from hylora_kernels.support.console import format_ppl, table
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.report import Report
from hylora_kernels.support.staging import exclusive, replacement
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.sources import source_name

try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError(f"adapters of PEFT need pip install hylora-kernels[peft]: {error}") from None

if TYPE_CHECKING:
    from rich.table import Table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def to_peft(model: PreTrainedModel, adapter_name: str = "default") -> PeftModel:
    """Make the model's own adapters one of PEFT, in place; returns the PeftModel.

    PEFT's lora_A and lora_B are the Parameter objects A and B, and the base is the model without
    them. Raises ValueError for a model without adapters of its own.

        model = to_peft(load_pretrained("small"))
        model.save_pretrained("adapter")
    """
    check_model(model, "train")
    layers = _adapted(model)
    twice = next((p for p, m in layers.items() if list(layers.values()).count(m) > 1), None)
    if twice is not None:
        raise ValueError(f"model must use each layer once, but {twice} stands in several places")
    ranks = {path: layer.lora_rank for path, layer in layers.items()}
    alphas = {path: layer.alpha * layer.lora_rank for path, layer in layers.items()}
    rank, alpha = (Counter(d.values()).most_common(1)[0][0] for d in (ranks, alphas))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(layers),
        r=rank,
        lora_alpha=alpha,
        rank_pattern={path: other for path, other in ranks.items() if other != rank},
        alpha_pattern={path: other for path, other in alphas.items() if other != alpha},
        lora_dropout=max(layer.lora_dropout for layer in layers.values()),
    )
    own = {path: (layer.A, layer.B) for path, layer in layers.items()}
    for layer in layers.values():
        layer.A = layer.B = None
    try:
        made = get_peft_model(
            model, config, adapter_name, autocast_adapter_dtype=False, low_cpu_mem_usage=True
        )
    except BaseException:
        for path, layer in layers.items():
            layer.A, layer.B = own[path]
        raise
    for path, (A, B) in own.items():
        wrapper = model.get_submodule(path)
        wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight = A, B
    return made.train(model.training)


def from_peft(model: PeftModel) -> PreTrainedModel:
    """Make the active adapters of PEFT the model's own A and B, in place; returns the model inside.

    A layer with an adapter of its own gets one that is the sum of both, of rank ra + r. A linear
    that is left dense becomes an SVDLoRALinear on its weight, as add_adapters makes it. All else is
    frozen. Raises TypeError for no PeftModel, ValueError, with nothing changed, for what A and B
    can't say: another method than LoRA, DoRA, biases, tied or merged layers, modules_to_save.

        model = from_peft(PeftModel.from_pretrained(load_pretrained("small"), "adapter"))
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got a {type(model).__name__}")
    inner = model.get_base_model()
    for config in model.peft_config.values():
        _check_config(config)
    counts = holder_counts(inner)
    named = [(p, m) for p, m in inner.named_modules() if isinstance(m, BaseTunerLayer)]
    found = {path: _own_adapter(path, module, counts) for path, module in named}
    for path, module in named:
        base, own = module.get_base_layer(), found[path]
        if own is not None and not isinstance(base, SVDLoRALinear):
            dense = SVDLoRALinear.from_dense(as_matrix(base), bias=base.bias)
            base = dense.train(base.training)
        if own is not None:
            base.A, base.B = own.A, own.B
            base.alpha, base.lora_dropout = own.alpha, own.dropout
        inner.set_submodule(path, base)
    model.unload()
    return save_in_hylora_format(freeze_all_but_adapters(inner))


def _check_config(config: LoraConfig) -> None:
    for field in ("modules_to_save", "trainable_token_indices", "layer_replication"):
        if getattr(config, field, None):
            raise ValueError(f"{field} must be left out: the model takes A and B alone")


class _Adapter(NamedTuple):
    """The adapter that a layer is to have."""

    A: nn.Parameter
    B: nn.Parameter
    alpha: float
    dropout: float


def _own_adapter(path: str, module: nn.Module, counts: Counter[int]) -> _Adapter | None:
    """The sum of a layer's own adapter and PEFT's active ones; None if none of these is its.

    counts: holder_counts of the model.
    """
    base = module.get_base_layer()
    if not (isinstance(module, lora.Linear) and is_linear(base)):
        kind = f"{type(module).__name__} on a {type(base).__name__}"
        raise ValueError(f"{path} must be a linear with LoRA, but is a {kind}")
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    if module.merged:
        raise ValueError(f"{path} must not be merged: call unmerge_adapter() first")
    if any(module.use_dora.get(n) or module.lora_bias.get(n) for n in names) or getattr(
        module, "lora_variant", None
    ):
        raise ValueError(f"{path} must have plain LoRA, but its adapter has DoRA, biases or others")
    held = base_of(base) if isinstance(base, SVDLoRALinear) else (id(base.weight),)
    if any(counts[one] > 1 for one in held):
        raise ValueError(
            f"{path} must have a weight of its own, but another module holds it, too: its adapter "
            "would become that one's"
        )
    parts = [(module.lora_A[n].weight, module.lora_B[n].weight, module.scaling[n]) for n in names]
    if isinstance(base, SVDLoRALinear) and base.lora_rank:
        parts.insert(0, (base.A, base.B, base.alpha))
    dropout = max(getattr(module.lora_dropout[name], "p", 0.0) for name in names)
    if len(parts) == 1:
        return _Adapter(*parts[0], dropout)
    alpha = next((scale for *_, scale in parts if scale), 1.0)
    with torch.no_grad():
        A = torch.cat([A for A, _, _ in parts])
        B = torch.cat([B * (scale / alpha) for _, B, scale in parts], 1)
    return _Adapter(nn.Parameter(A), nn.Parameter(B), alpha, dropout)


# ------------------------------------------------------------------------------------------- files


@dataclass
class AdapterReport(Report):
    """An adapter that was written to files or read from some.

    layers:        those of the model that have one. parameters: of all their A and B.
    data:          name of the text that the perplexities are of; None if they were not measured.
    before, after: perplexity of the model without the adapter that was read, and with it.
    """

    layers: int
    parameters: int
    data: str | None = None
    before: Perplexity | None = None
    after: Perplexity | None = None

    def render(self) -> Table:
        rows: list[tuple[str, object]] = [
            ("layers with an adapter", self.layers),
            ("parameters of adapters", self.parameters),
        ]
        if self.before is not None and self.after is not None:
            rows += [
                (f"perplexity on {self.data} before", format_ppl(self.before.ppl)),
                ("after", format_ppl(self.after.ppl)),
                ("change in loss, nats a token", f"{self.after.nll - self.before.nll:+.4f}"),
            ]
        return table("adapter", ("", "value"), rows)


def export_adapter(
    model: PreTrainedModel,
    dir: str | Path,
    base: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> AdapterReport:
    """Write the model's own adapters to the folder `dir` as an adapter of PEFT.

    base: folder for the model without them, which the adapter names as its base. It is written,
          with the tokenizer, unless that very model is there already.

    The model keeps its adapters; all else is frozen. Raises ValueError, before anything is written,
    for a model without adapters, or if `base` holds another model.
    """
    own = [(layer, layer.A, layer.B) for layer in _adapted(model).values()]
    target, base = Path(dir), Path(base)
    try:
        for layer, _, _ in own:
            layer.A = layer.B = None
        if not base.exists():
            save_pretrained(model, base, tokenizer)
        elif fingerprint(model=load_pretrained(base)) != fingerprint(model=model):
            raise ValueError(f"base {str(base)!r} must be the model without its adapters, or new")
        _put_back(own)
        made = to_peft(model)
        made.peft_config["default"].base_model_name_or_path = str(base)
        try:
            target.mkdir(parents=True, exist_ok=True)
            with exclusive(target), replacement(target, last=CONFIG) as new:
                made.save_pretrained(new, save_embedding_layers=False)
        finally:
            made.unload()
    finally:
        _put_back(own)
    return _report(model)


def import_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    data: Tensor | list[str] | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    merge: bool = False,
    length: int | None = None,
    limit: int | None = None,
    split: str = "test",
    column: str | None = None,
    batch: int = 4,
    progress: bool = True,
) -> AdapterReport:
    """load_adapter, with the perplexity on a text before and after.

    data:  the text, read as evaluate() reads it; None measures nothing. tokenizer, length, limit,
           split, column, batch, progress: as there.
    merge: fold all adapters into the base afterwards (merge_adapters).
    """
    before = after = None
    if data is not None:
        if tokenizer is None and not isinstance(data, Tensor):
            tokenizer = tokenizer_of(model)
        longest = min(2048, context_length(model) or 2048)
        blocks = token_blocks(
            data, tokenizer, length, split, limit, None, progress, column, longest
        )
        before = perplexity(model, blocks, batch, progress, "before")
    load_adapter(model, adapter)
    report = _report(model)
    if merge:
        merge_adapters(model)
    if data is not None:
        after = perplexity(model, blocks, batch, progress, "after")
        report.data, report.before, report.after = source_name(data, split), before, after
    return report


def _adapted(model: nn.Module) -> dict[str, SVDLoRALinear]:
    """path -> each layer with an adapter of its own; ValueError if there is none."""
    named = model.named_modules(remove_duplicate=False)
    layers = {p: m for p, m in named if isinstance(m, SVDLoRALinear) and m.lora_rank}
    if not layers:
        raise ValueError("model must have adapters A and B of its own, but its layers have none")
    return layers


def _put_back(own: list[tuple[SVDLoRALinear, nn.Parameter, nn.Parameter]]) -> None:
    for layer, A, B in own:
        layer.A, layer.B = A, B


def _report(model: nn.Module) -> AdapterReport:
    layers = _adapted(model).values()
    return AdapterReport(len(layers), sum(m.A.numel() + m.B.numel() for m in layers))


def load_adapter(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """Add a LoRA that PEFT saved to the model's own adapters, in place; returns the model.

    adapter: folder, or hub id, with adapter_config.json and adapter_model.safetensors; other forms,
             which may be pickles, are not read. It may have been trained on the dense model.

    Raises CheckpointError naming the file for an adapter that can't be read, doesn't fit the model
    or is no plain LoRA (see from_peft); the model is then as it was.
    """
    check_model(model, "train")
    folder = _folder_of(adapter)
    config_file, weights = folder / CONFIG, folder / WEIGHTS
    method = read_json(config_file).get("peft_type")
    if method != "LORA":
        raise CheckpointError(f"{config_file}: peft_type must be 'LORA', got {method!r}")
    require_file(weights)
    kind = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    try:
        with reading(config_file, "can't be put on this model"):
            config = LoraConfig.from_pretrained(folder)
            _check_config(config)
            with torch.device("meta"):  # A rank that is not the file's takes no memory.
                made = PeftModel(model, config, **kind)
        with reading(weights, "can't be put on this model"):
            found = made.load_adapter(str(folder), "default", **kind)
            missing = [key for key in found.missing_keys if ".lora_" in key]
            for words, keys in (("lacks", missing), ("has", found.unexpected_keys)):
                if keys:
                    raise ValueError(f"{words} {keys[0]} (of {len(keys)})")
            return from_peft(made)
    except BaseException:
        for path, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                model.set_submodule(path, module.get_base_layer())
        vars(model).pop("peft_config", None)
        raise


def _folder_of(adapter: str | Path) -> Path:
    """The folder, or that of the hub's cache with the two files of a hub id."""
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        return Path(snapshot_download(str(adapter), allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"adapter {str(adapter)!r} is neither a folder here nor a hub id that could be had: "
            f"{error}"
        ) from error
