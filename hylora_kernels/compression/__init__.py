"""Compression: calibrate, whiten, allocate ranks, factorize, refit, replace."""

from hylora_kernels.compression.compress import CompressReport, compress
from hylora_kernels.compression.replace import add_adapters, merge_adapters
from hylora_kernels.compression.spectrum import SpectrumReport, analyze_spectrum
from hylora_kernels.model.structure import linears

__all__ = [
    "CompressReport",
    "SpectrumReport",
    "add_adapters",
    "analyze_spectrum",
    "compress",
    "linears",
    "merge_adapters",
]
