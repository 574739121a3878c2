"""The commands `hylora adapter`: a model's own adapters as files of PEFT, and back."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

from pathlib import Path
from typing import Annotated

from hylora_kernels.cli.model_commands import load
from hylora_kernels.cli.options import (
    Argument,
    CompressedModel,
    Device,
    Dtype,
    Json,
    Model,
    Option,
    Out,
    Overwrite,
    Revision,
    Tokenizer,
    TrustRemoteCode,
    refuse_foreign_folder,
)
from hylora_kernels.cli.output import trainable_line, write_report
from hylora_kernels.support.console import show

CONFIG = "adapter_config.json"


def export_adapter(
    model: CompressedModel,
    out: Annotated[Path, Option(help="Folder of the adapter, new, empty, or of an adapter.")],
    base: Annotated[
        Path | None,
        Option(
            help="Folder of the model without its adapters, which is written unless it is there. "
            "By default base in --out."
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    json_path: Json = None,
) -> None:
    """Write a compressed model's adapters as an adapter of PEFT, beside the model without them."""
    from hylora_kernels.integrations.peft_adapters import export_adapter as write

    refuse_foreign_folder(out, model, mark=CONFIG, overwrite=overwrite)
    loaded, tokenizer = load(model, device, dtype, trust_remote_code, revision, tokenizer)
    base = out / "base" if base is None else base
    report = write(loaded, out, base, tokenizer)
    show(report.render())
    write_report(report, json_path)
    show(f"adapter written to {out}, for the model in {base}")


def import_adapter(
    model: Model,
    adapter: Annotated[
        str, Argument(metavar="ADAPTER", help="Folder or hub id of a LoRA that PEFT saved.")
    ],
    out: Out,
    data: Annotated[
        str | None, Option(help="Text to measure the perplexity on before and after.")
    ] = None,
    split: Annotated[str, Option(help="Part of the text, as for evaluate.")] = "test",
    column: Annotated[str | None, Option(help="Column of a table to read.")] = None,
    length: Annotated[int | None, Option(min=2, help="Tokens in a block, as for evaluate.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Most blocks to measure on.")] = None,
    batch: Annotated[int, Option(min=1, help="Blocks in one forward.")] = 4,
    merge: Annotated[
        bool, Option("--merge", help="Fold all adapters into the base; by default they stay.")
    ] = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    json_path: Json = None,
) -> None:
    """Put a LoRA of PEFT onto a model, dense or compressed, and write the model to a folder."""
    from hylora_kernels.integrations.peft_adapters import import_adapter as read
    from hylora_kernels.model.saving import save_pretrained

    refuse_foreign_folder(out, model, overwrite=overwrite)
    loaded, tokenizer = load(model, device, dtype, trust_remote_code, revision, tokenizer)
    text = {"split": split, "column": column, "length": length, "limit": limit, "batch": batch}
    report = read(loaded, adapter, data, tokenizer, merge=merge, **text)
    save_pretrained(loaded, out, tokenizer, overwrite=overwrite)
    show(report.render())
    show(trainable_line(loaded))
    write_report(report, json_path)
    show(f"written to {out}. Next: hylora evaluate {out}")
