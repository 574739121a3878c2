"""Evaluation: perplexity, true size and speed of a causal language model, dense or compressed."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.inference.optimize import (
    PackedLinear,
    held_by,
    optimize_for_inference,
    restore_from_inference,
)
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.load import tokenizer_of
from hylora_kernels.model.loss import eval_mode, token_loss
from hylora_kernels.model.structure import linears
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.report import Report, format_bytes, format_ppl, kept_removed, table
from hylora_kernels.text.sources import token_blocks


@dataclass
class Perplexity(Report):
    """ppl = exp(nll), nll in nats a token over `tokens` predictions: length - 1 in each block."""

    ppl: float
    nll: float
    tokens: int
    blocks: int
    length: int


@dataclass
class Kept(Report):
    """Parameters dense, as held now, and with the adapters merged; keep and removed of dense."""

    dense: int
    as_is: int
    merged: int
    keep_as_is: float
    removed_as_is: float
    keep_merged: float
    removed_merged: float


@dataclass
class ModelSize(Report):
    """Counts and bytes; what is held twice (tied) counts once, pivots are buffers.

    resident_bytes: the whole storages of all parameters and buffers.
    file_bytes:     of the folder's .safetensors, or None.
    linears:        the weights that compression is about, those left dense included; no biases.
    model:          every parameter.
    """

    parameters: int
    buffers: int
    trainable: int
    parameter_bytes: int
    buffer_bytes: int
    trainable_bytes: int
    resident_bytes: int
    file_bytes: int | None
    linears: Kept
    model: Kept


@dataclass
class Throughput(Report):
    """Tokens a second at batch 1: medians of three prefills and of the single new tokens."""

    prefill_tok_s: float
    decode_tok_s: float
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    threads: int
    optimized: bool


@dataclass
class EvaluateReport(Report):
    data: str
    split: str
    perplexity: Perplexity
    size: ModelSize
    speed: Throughput | None

    def render(self):
        """A rich table."""
        size, quality = self.size, self.perplexity
        rows = [
            ("perplexity", format_ppl(quality.ppl)),
            (
                "tokens counted",
                f"{quality.tokens:,} in {quality.blocks} blocks of {quality.length}",
            ),
            ("parameters", size.parameters),
            ("trainable parameters", size.trainable),
            ("in memory", format_bytes(size.resident_bytes)),
            ("files", None if size.file_bytes is None else format_bytes(size.file_bytes)),
        ]
        for name, kept in (("linears", size.linears), ("whole model", size.model)):
            rows.append((name, f"{kept.merged:,}: {kept_removed(kept.keep_merged)}"))
            if kept.as_is != kept.merged:
                rows.append(
                    (
                        f"{name}, adapters separate",
                        f"{kept.as_is:,}: {kept_removed(kept.keep_as_is)}",
                    )
                )
        if self.speed is not None:
            how = ", optimized" if self.speed.optimized else ""
            rows.append((f"prefill tokens/s{how}", self.speed.prefill_tok_s))
            rows.append((f"decode tokens/s{how}", self.speed.decode_tok_s))
        return table(f"{self.data} ({self.split})", ("", "value"), rows)


def evaluate(
    model: nn.Module,
    data="brown",
    tokenizer=None,
    length: int = 2048,
    limit: int | None = None,
    split: str = "test",
    batch: int = 4,
    speed: bool = True,
    path: str | Path | None = None,
    progress: bool = True,
    optimize: bool = False,
) -> EvaluateReport:
    """Perplexity on `data`, size and, if wanted, speed.

    data, tokenizer: as for data.token_blocks, the tokenizer by default the model's own; a
           LongTensor [n, L] brings its own length.
    limit: at most so many blocks.
    path:  the folder the model was loaded from or saved to, for its bytes on disk.
    optimize: the speed is that of the model laid out by optimize_for_inference, which is undone:
           the same bits in new Parameter objects, which an optimizer made before doesn't know.
    """
    if tokenizer is None and not isinstance(data, Tensor):
        tokenizer = tokenizer_of(model)
    blocks = token_blocks(data, tokenizer, length, split, limit, progress=progress)
    quality = perplexity(model, blocks, batch, progress)
    size, most = model_size(model, path), context_length(model)
    prompt_tokens = 128 if most is None else max(1, min(128, most - 33))
    timed = throughput(model, prompt_tokens, 32, optimize=optimize) if speed else None
    return EvaluateReport(name_of(data), split, quality, size, timed)


def name_of(data) -> str:
    """What a report calls the text: the name or path it was given by, else the type."""
    return str(data) if isinstance(data, str | Path) else type(data).__name__


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model was made for, None where its config doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_context(model: nn.Module, length: int) -> None:
    """ValueError if `length` tokens are more than the model was made for."""
    most = context_length(model)
    if most is not None and length > most:
        raise ValueError(f"length must be at most {most}, the model's context, got {length}")


def check_blocks(model: nn.Module, blocks: Tensor) -> None:
    """ValueError if `blocks` aren't token ids [n >= 1, L >= 2] that the model can take."""
    if not isinstance(blocks, Tensor) or blocks.dim() != 2 or 0 in blocks.shape:
        got = list(blocks.shape) if isinstance(blocks, Tensor) else type(blocks).__name__
        raise ValueError(f"blocks must be token ids [n >= 1, L >= 2], got {got}")
    if blocks.shape[1] < 2:
        raise ValueError(f"blocks must be at least 2 tokens long, got {list(blocks.shape)}")
    check_context(model, blocks.shape[1])
    words, low, high = (
        model.get_input_embeddings().num_embeddings,
        int(blocks.min()),
        int(blocks.max()),
    )
    if low < 0 or high >= words:
        raise ValueError(f"blocks must hold token ids in [0, {words}), got {low} to {high}")


@torch.no_grad()
def perplexity(
    model: nn.Module, blocks: Tensor, batch: int = 4, progress: bool = True
) -> Perplexity:
    """blocks int64 [n, L]: each on its own, its first token given, the other L - 1 all counted.

    Raises FloatingPointError naming the block whose loss is not finite, ValueError for blocks
    of another kind or longer than the model's context, or batch < 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    check_blocks(model, blocks)
    device = input_device(model)
    nll, tokens = 0.0, 0
    bar = tqdm(total=len(blocks), desc="perplexity", unit="block", disable=not progress)
    with eval_mode(model), bar:
        for start in range(0, len(blocks), batch):
            ids = blocks[start : start + batch].to(device)
            loss, count = token_loss(model, ids)
            if not math.isfinite(loss):
                raise FloatingPointError(f"perplexity: {_not_finite(model, ids, start)}")
            nll, tokens = nll + float(loss), tokens + count
            bar.set_postfix(ppl=format_ppl(math.exp(min(nll / tokens, 700))), refresh=False)
            bar.update(len(ids))
    mean = nll / tokens
    if mean > 700:
        raise FloatingPointError(
            f"perplexity: exp of a mean loss of {mean:.1f} nats is beyond float64"
        )
    return Perplexity(math.exp(mean), mean, tokens, *blocks.shape)


def _not_finite(model, ids, start) -> str:
    for place, block in enumerate(ids):
        loss, _ = token_loss(model, block[None])
        if not math.isfinite(loss):
            return f"the loss of block {start + place} is {float(loss)}"
    last = start + len(ids) - 1
    return f"the loss of blocks {start} to {last} is not finite together, yet each alone is"


# ---------------------------------------------------------------------------------------- true size


def model_size(model: nn.Module, path: str | Path | None = None) -> ModelSize:
    """Count everything the model holds; with `path`, a folder, its .safetensors files too.

    What is packed for inference counts as the parameters it is made of, and with the bytes that it
    takes. Raises ValueError if there are no files.
    """
    packed = held_by(model)
    panels = {id(tensor) for held in packed for tensor in held.tensors}
    parameters, all_buffers = list(model.parameters()), list(model.buffers())
    buffers = [b for b in all_buffers if id(b) not in panels]
    trainable = [p for p in parameters if p.requires_grad]
    total = sum(p.numel() for p in parameters) + sum(held.count for held in packed)
    targets = linears(model).values()
    dense = sum(_count(layer, "dense") for layer in targets)
    as_is = sum(_count(layer, "as_is") for layer in targets)
    merged = sum(_count(layer, "merged") for layer in targets)
    return ModelSize(
        parameters=total,
        buffers=sum(b.numel() for b in buffers),
        trainable=sum(p.numel() for p in trainable),
        parameter_bytes=sum(part.nbytes for part in (*parameters, *packed)),
        buffer_bytes=sum(b.nbytes for b in buffers),
        trainable_bytes=sum(p.nbytes for p in trainable),
        resident_bytes=_storage_bytes(parameters + all_buffers),
        file_bytes=None if path is None else _file_bytes(Path(path)),
        linears=_kept(dense, as_is, merged),
        model=_kept(total - as_is + dense, total, total - as_is + merged),
    )


def _count(layer: nn.Module, which: str) -> int:
    if isinstance(layer, PackedLinear):
        return layer.held.count
    if not isinstance(layer, SVDLoRALinear):
        return layer.weight.numel()
    if which == "dense":
        return layer.in_features * layer.out_features
    return layer.parameter_count(merged=which == "merged")


def _kept(dense: int, as_is: int, merged: int) -> Kept:
    keep_as_is, keep_merged = as_is / max(dense, 1), merged / max(dense, 1)
    return Kept(dense, as_is, merged, keep_as_is, 1 - keep_as_is, keep_merged, 1 - keep_merged)


def _storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages; on the meta device, which has none, of the tensors."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def _file_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"path must be a folder with .safetensors files, got {folder}")
    return sum(file.stat().st_size for file in files)


# -------------------------------------------------------------------------------------------- speed


@torch.no_grad()
def throughput(
    model: nn.Module,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    seed: int = 0,
    optimize: bool = False,
) -> Throughput:
    """Time the model on random tokens: prompts at once, then greedily token by token with a cache.

    Both are warmed up first; then three prompts and exactly `new_tokens` tokens are timed. Logits
    are made for a prompt's last token only, as generate() does. With `optimize` the model is laid
    out by optimize_for_inference first and restored afterwards, the same bits in new Parameter
    objects. Raises ValueError for sizes that can't be.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_context(model, prompt_tokens + new_tokens + 1)
    device, words = input_device(model), model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (1, prompt_tokens), generator=generator).to(device)
    last = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    with eval_mode(model), _optimized(model) if optimize else nullcontext():
        optimized = bool(held_by(model))
        _timed(model, ids, None, last)
        prefills = [_timed(model, ids, None, last)[0] for _ in range(3)]
        _, token, cache = _timed(model, ids, None, last)
        _, token, cache = _timed(model, token, cache, last)
        decodes = []
        for _ in range(new_tokens):
            seconds, token, cache = _timed(model, token, cache, last)
            decodes.append(seconds)
    return Throughput(
        prefill_tok_s=prompt_tokens / statistics.median(prefills),
        decode_tok_s=1 / statistics.median(decodes),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        optimized=optimized,
    )


@contextmanager
def _optimized(model: nn.Module) -> Iterator[None]:
    """Optimised inside; outside as it was."""
    already = bool(held_by(model))
    try:
        if not already:
            optimize_for_inference(model)
        yield
    finally:
        if not already:
            restore_from_inference(model)


def _timed(model, ids, cache, options) -> tuple[float, Tensor, object]:
    """(seconds, the likeliest next token [1, 1], the cache) of one forward."""
    _synchronize(ids.device)
    start = time.perf_counter()
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
    token = output.logits[:, -1:].argmax(-1)
    _synchronize(ids.device)
    return time.perf_counter() - start, token, output.past_key_values


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
