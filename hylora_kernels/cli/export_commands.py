"""`hylora export`: a model for another runtime."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hylora_kernels.cli.model_commands import load
from hylora_kernels.cli.options import (
    Json,
    Model,
    Option,
    Overwrite,
    Revision,
    Tokenizer,
    TrustRemoteCode,
)
from hylora_kernels.cli.output import write_report
from hylora_kernels.support.console import format_bytes, show

if TYPE_CHECKING:
    from hylora_kernels.integrations.export import ExportReport

OWN_DTYPE = ("dense", "gguf")  # the others are graphs, which a CPU's runtime computes in float32


def export(
    model: Model,
    out: Annotated[Path, Option(help="Folder to write to: new, empty, or of an earlier export.")],
    to: Annotated[
        str,
        Option(
            help="onnx, openvino, torch (a .pt2 program), dense (a plain folder of transformers) "
            "or gguf (for llama.cpp)."
        ),
    ] = "onnx",
    gguf_type: Annotated[
        str,
        Option(help="Of matrices in a .gguf file: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0."),
    ] = "F16",
    check: Annotated[
        bool,
        Option(
            "--check/--no-check",
            help="Run what was written (not GGUF): logits and 64 greedy tokens beside the model's.",
        ),
    ] = True,
    dtype: Annotated[
        str,
        Option(
            help="bfloat16, float16, float32 or auto: float32 for a graph, else the checkpoint's "
            "own."
        ),
    ] = "auto",
    overwrite: Overwrite = False,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    json_path: Json = None,
) -> None:
    """Write a model, dense or compressed, for another runtime: ONNX, OpenVINO, llama.cpp ..."""
    from hylora_kernels.integrations.export import export as write

    if dtype == "auto" and to not in OWN_DTYPE:
        dtype = "float32"
    loaded, tokenizer = load(model, "cpu", dtype, trust_remote_code, revision, tokenizer)
    report = write(
        loaded, out, to, tokenizer, gguf_type=gguf_type, check=check, overwrite=overwrite
    )
    for line in lines_of(report):
        show(line)
    show(
        f"written to {out}: {', '.join(f'{n} {format_bytes(b)}' for n, b in report.files.items())}"
    )
    write_report(report, json_path)


def lines_of(report: "ExportReport") -> list[str]:
    """What was found about the files."""
    lines, found = [], report.agreement
    if found is not None:
        lines.append(
            f"{found.equal} of {found.tokens} greedy tokens equal in {report.dtype}; largest error "
            f"of a logit {found.largest_error:.2g}, largest logit {found.largest_logit:.3g}"
        )
        lines.append(
            f"{found.decode_tok_s:.1f} tokens/s at batch 1 on {found.threads} threads; by hylora "
            f"({report.own_runtime}) {report.own_decode_tok_s:.1f}"
        )
    if report.weight_error is not None:
        lines.append(f"|W stored - W| / |W| = {report.weight_error:.2g} over all matrices")
    return lines
