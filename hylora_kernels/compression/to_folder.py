"""compress() of a model that need not fit in memory, into a folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hylora_kernels.compression.compress import Compression
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.report import CompressReport
from hylora_kernels.model.by_block import is_by_block
from hylora_kernels.model.saving import refuse_foreign_files, saved_by_block
from hylora_kernels.support.processes import together


def compress_to_folder(
    model: nn.Module, dir: str | Path, *, overwrite: bool = False, **options: object
) -> CompressReport:
    """Compress a model that load_model(..., by_block=True) has opened, and write the result to the
    folder `dir` as save_pretrained() does.

    One decoder block at a time is in memory, beside the embedding, the head and, for the refit, two
    streams of hidden states. The statistics, and so factors and ranks, are those of compress(), bit
    for bit. They are kept in the cache; so are the hidden states of the calibration text meanwhile,
    blocks x tokens x width numbers. The same call goes on where a killed one has stopped.

    options: those of compress(). Without a text, or beside one, "stdlib" is read, but no text that
             the model writes: each token of it would read the whole model. The tokenizer is saved,
             too.

    Returns the report; `model` reads its blocks from `dir` from then on. Raises what compress() and
    save_pretrained() raise, and ValueError for a model whose blocks don't form a chain of hidden
    states, or for a linear outside of them. Processes of torchrun share the work, as in compress().

    Example:
        model, tokenizer = load_model("my-org/my-model", by_block=True)
        report = compress_to_folder(
            model, "smaller", tokenizer=tokenizer, keep=0.8, calibration="my.txt", length=64
        )
    """
    if not is_by_block(model):
        raise ValueError(
            "model must be one that load_model(..., by_block=True) opened: compress() takes one"
            " that is in memory"
        )
    refuse_foreign_files(dir, overwrite)  # Before the long work.
    checked = CompressOptions(**options)
    with together() as processes, Compression(model, checked, processes) as run:
        for statistics in run.calibrate():
            run.factorize(statistics)
            run.quantize(statistics)
        choices = run.allocate()
        refitted = run.refit(choices)
        saved = saved_by_block(
            run.model, dir, checked.tokenizer, overwrite=overwrite, processes=processes
        )
        with saved as write:
            run.replace(choices, refitted, write)
    return run.report
