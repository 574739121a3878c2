"""Models for other runtimes: ONNX, OpenVINO, torch.export's programs, plain folders, GGUF."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.evaluation.speed import throughput
from hylora_kernels.inference.decoder import Decoder
from hylora_kernels.integrations import gguf, graphs
from hylora_kernels.integrations.agreement import PROMPT, Agreement, compare
from hylora_kernels.integrations.dense import dense_copy
from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.model.check import check_model
from hylora_kernels.model.files import read_json
from hylora_kernels.model.format import CONFIG
from hylora_kernels.model.load import load_model
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.support.report import Report
from hylora_kernels.support.staging import (
    current,
    discard,
    exclusive,
    files_in,
    is_leftover,
    replacement,
)
from hylora_kernels.support.storage import require_disk, write_json

TARGETS = (*graphs.EXPORTERS, "dense", "gguf")
REPORT = "hylora_export.json"  # in the folder; the next export replaces the files that it lists


@dataclass
class ExportReport(Report):
    """What export() wrote to a folder.

    to:               a name of TARGETS. dtype: of activations, and of weights that aren't codes.
    versions:         of the packages that wrote it.
    files:            name -> bytes.
    agreement:        the exported model beside the given one; None if it wasn't run.
    own_decode_tok_s: tokens a second of this package's Decoder, whose runtime is own_runtime.
    weight_error:     of GGUF: |W stored - W| / |W| over all matrices, in Frobenius norms.
    """

    to: str
    dtype: str
    versions: dict[str, str]
    files: dict[str, int] = field(default_factory=dict)
    agreement: Agreement | None = None
    own_decode_tok_s: float | None = None
    own_runtime: str | None = None
    weight_error: float | None = None


def export(
    model: nn.Module,
    dir: str | Path,
    to: str = "onnx",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    gguf_type: str = "F16",
    check: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Write a causal language model, compressed or not, for another runtime to the folder `dir`.

    to:        "onnx"      model.onnx and its weights; codes stay codes, read by MatMulNBits, an
                           operator of ONNX Runtime, and all else is standard ONNX
               "openvino"  openvino_model.xml and .bin
               "torch"     model.pt2 of torch.export, in aten operations alone
               "dense"     a plain folder of transformers, each weight multiplied out
               "gguf"      model-<gguf_type>.gguf of the dense model, for llama.cpp
               The first three are one graph for any batch and length, of a prompt or of the tokens
               after it: transformers' ExportedModel.from_pretrained(dir) calls it like the model.
    tokenizer: saved beside the model, or None; GGUF has it inside.
    gguf_type: of matrices: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0.
    check:     run what was written (GGUF isn't) and compare logits and 64 greedy tokens.
    overwrite: write beside the files of others, too.

    What an earlier export wrote to `dir` is replaced, all at once; an export that fails or is
    killed leaves it as it was. The model must be on the CPU; it keeps its dtype, and few runtimes
    compute anything but float32 there.
    Raises TypeError or ValueError naming the argument, ImportError for a missing package,
    ArithmeticError if in float32 the check finds other tokens than the model's.

        report = export(load_pretrained("small"), "small-onnx")
        report.agreement.largest_error
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {TARGETS}, got {to!r}")
    gguf.check_type(gguf_type)
    check_model(model, "generate")
    refuse_packed(model)
    elsewhere = {p.device.type for p in model.parameters()} - {"cpu"}
    if elsewhere:
        raise ValueError(f"model must be on the CPU, got one on {', '.join(sorted(elsewhere))}")
    target, dtype = Path(dir), str(model.dtype).removeprefix("torch.")
    refuse_other_files(target, overwrite)
    report = ExportReport(to, dtype, _versions(graphs.packages(to)))
    require_disk(target, sum(p.nbytes for p in model.parameters()), f"the export to {target}")
    with eval_mode(model), _replaced(target, overwrite) as new:
        session = None
        if to == "gguf":
            file = new / f"model-{gguf_type}.gguf"
            report.weight_error = gguf.write_gguf(dense_copy(model), tokenizer, file, gguf_type)
        elif to == "dense":
            dense_copy(model).save_pretrained(new)
            session = Decoder(load_model(new, "cpu")[0]) if check else None
        else:
            session = graphs.write_graph(model, new, to, run=check)
        if tokenizer is not None and to != "gguf":
            tokenizer.save_pretrained(new)
        if session is not None:
            report.agreement = compare(model, session)
            _require_equal_tokens(report)
        report.files = {name: (new / name).stat().st_size for name in files_in(new)}
        write_json(new / REPORT, report.to_dict())
    if report.agreement is not None:
        own = throughput(model, PROMPT, max(1, report.agreement.tokens - 1), optimize=True)
        report.own_decode_tok_s, report.own_runtime = own.decode_tok_s, own.runtime
    return report


def refuse_other_files(folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless `folder` is new, empty, or of an earlier export.

    overwrite: files of others are no objection, unless they are a model's.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"dir {str(folder)!r} is a file, not a folder")
    if not folder.is_dir():
        return
    earlier = _earlier_files(folder)
    if (folder / CONFIG).exists() and CONFIG not in earlier:
        raise ValueError(
            f"dir {str(folder)!r} holds a model, which no export overwrites: delete it first, or "
            "give another folder"
        )
    others = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    others -= {Path(name).parts[0] for name in earlier}
    if others and not overwrite:
        raise ValueError(
            f"dir {str(folder)!r} holds {min(others)}, which no export wrote: give another folder, "
            "or overwrite=True"
        )


def _earlier_files(folder: Path) -> set[str]:
    """The files that an earlier export wrote to `folder`."""
    path = current(folder) / REPORT
    listed: Any = read_json(path).get("files") if path.is_file() else {}
    # run.yaml: the options of the command, which it writes beside its results.
    own = {REPORT, "run.yaml"}
    return own | set(listed) if path.is_file() and isinstance(listed, dict) else set()


@contextmanager
def _replaced(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder, whose files replace those of an earlier export when the block ends; if it
    raises, `folder` stays as it was, or absent."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(folder):
            refuse_other_files(folder, overwrite)
            with replacement(folder, last=REPORT) as new:
                yield new
                discard(new, _earlier_files(folder) - set(files_in(new)))
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


def _require_equal_tokens(report: ExportReport) -> None:
    found = report.agreement
    assert found is not None
    if report.dtype == "float32" and found.equal < found.tokens:
        raise ArithmeticError(
            f"{report.to}: {found.equal} of {found.tokens} greedy tokens are the model's, and its "
            f"logits differ by up to {found.largest_error:.3g}, of {found.largest_logit:.3g}; "
            "check=False writes it all the same"
        )


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """name -> version; raises ImportError naming a package that is missing."""
    names = ("torch", "transformers", *packages)
    try:
        return {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"this export needs the package {error.name}, which is not installed: pip install "
            f"{' '.join(packages)}"
        ) from error
