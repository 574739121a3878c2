"""Compressed, adapted language models, small and fast: a frozen truncated-SVD pair plus a LoRA pair
as one op.

The op and the module are here at once; the pipeline, which needs transformers, is imported on first
use.
"""

import importlib
import sys
from types import ModuleType

from hylora_kernels.backends import available_backends, use_backend
from hylora_kernels.layers.linear import SVD_LoRA_Linear, SVDLoRALinear
from hylora_kernels.ops import svd_lora_linear

__version__ = "0.1.0"

_PIPELINE = {
    "compress": "compression.compress",
    "add_adapters": "model.adapters",
    "merge_adapters": "model.adapters",
    "analyze_spectrum": "compression.spectrum",
    "finetune": "recovery.finetune",
    "evaluate": "evaluation.evaluate",
    "generate": "inference.generate",
    "save_pretrained": "model.checkpoint",
    "load_pretrained": "model.checkpoint",
    "optimize_for_inference": "inference.optimize",
    "restore_from_inference": "inference.optimize",
    "load_model": "model.load",
}

__all__ = [
    "SVDLoRALinear",
    "SVD_LoRA_Linear",
    "available_backends",
    "svd_lora_linear",
    "use_backend",
    *_PIPELINE,
]


class _Package(ModuleType):
    """Importing a submodule binds it here under its name: finetune.py must not hide the function
    finetune."""

    def __setattr__(self, name, value):
        if not (name in _PIPELINE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in _PIPELINE:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_PIPELINE[name]}"), name)
        setattr(self, name, value)
        return value


sys.modules[__name__].__class__ = _Package
