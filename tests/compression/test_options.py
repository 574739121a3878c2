"""The options of compress() are said once: its signature is the dataclass."""

from __future__ import annotations

import dataclasses
import inspect

from hylora_kernels import compress
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.support.options import describe_option


def test_compress_takes_its_options_and_a_model():
    model, *arguments = inspect.signature(compress).parameters.values()
    assert model.name == "model_or_id" and model.default is inspect.Parameter.empty
    assert arguments == list(inspect.signature(CompressOptions).parameters.values())
    for field in dataclasses.fields(CompressOptions):
        assert f"\n    {field.name}: {describe_option(field)}" in compress.__doc__


def test_refit_is_on_unless_the_method_is_svd():
    assert [CompressOptions(method=m).refit for m in ("two_sided", "whitened", "svd")] == [
        True, True, False,
    ]  # fmt: skip
    assert CompressOptions(refit=False).refit is False
