"""Compressed, adapted language models, small and fast: a frozen truncated-SVD pair plus a LoRA pair
as one op.

The op and the module are imported at once. The pipeline needs transformers and is imported on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hylora_kernels.support import interrupt  # noqa: F401  # First: torch takes seconds.

# isort: split
from hylora_kernels.backends import available_backends, use_backend
from hylora_kernels.layers.linear import SVD_LoRA_Linear, SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear
from hylora_kernels.ops.linear import svd_lora_linear
from hylora_kernels.support.imports import import_after

__version__ = "0.1.0"

__all__ = [
    "SVDLoRALinear",
    "SVD_LoRA_Linear",
    "QuantizedLinear",
    "QuantizedEmbedding",
    "svd_lora_linear",
    "available_backends",
    "use_backend",
    "load_model",
    "compress",
    "compress_to_folder",
    "quantize_model",
    "add_adapters",
    "merge_adapters",
    "analyze_spectrum",
    "plan",
    "tie_embeddings",
    "finetune",
    "evaluate",
    "generate",
    "Decoder",
    "save_pretrained",
    "load_pretrained",
    "optimize_for_inference",
    "restore_from_inference",
]

# A module of another library -> the one that extends it, imported right after it, never before.
import_after(
    {
        "transformers.quantizers.auto": "hylora_kernels.integrations.transformers",
        "transformers.modeling_utils": "hylora_kernels.integrations.transformers_saving",
        "peft": "hylora_kernels.integrations.peft",
    }
)

# Type checkers and editors read these imports. They don't read __getattr__, which would let them
# take any name for one of this module's.
if TYPE_CHECKING:
    from hylora_kernels.compression.compress import compress
    from hylora_kernels.compression.quantize_model import quantize_model
    from hylora_kernels.compression.spectrum import analyze_spectrum
    from hylora_kernels.compression.tie import tie_embeddings
    from hylora_kernels.compression.to_folder import compress_to_folder
    from hylora_kernels.evaluation.evaluate import evaluate
    from hylora_kernels.inference.decoder import Decoder
    from hylora_kernels.inference.generate import generate
    from hylora_kernels.inference.optimize import optimize_for_inference, restore_from_inference
    from hylora_kernels.model.adapters import add_adapters, merge_adapters
    from hylora_kernels.model.checkpoint import load_pretrained
    from hylora_kernels.model.load import load_model
    from hylora_kernels.model.saving import save_pretrained
    from hylora_kernels.planning.plan import plan
    from hylora_kernels.recovery.finetune import finetune
else:
    _IMPORTED_ON_FIRST_USE = {
        "load_model": "model.load",
        "compress": "compression.compress",
        "compress_to_folder": "compression.to_folder",
        "quantize_model": "compression.quantize_model",
        "add_adapters": "model.adapters",
        "merge_adapters": "model.adapters",
        "analyze_spectrum": "compression.spectrum",
        "plan": "planning.plan",
        "tie_embeddings": "compression.tie",
        "finetune": "recovery.finetune",
        "evaluate": "evaluation.evaluate",
        "generate": "inference.generate",
        "Decoder": "inference.decoder",
        "save_pretrained": "model.saving",
        "load_pretrained": "model.checkpoint",
        "optimize_for_inference": "inference.optimize",
        "restore_from_inference": "inference.optimize",
    }

    def __getattr__(name):
        if name not in _IMPORTED_ON_FIRST_USE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_IMPORTED_ON_FIRST_USE[name]}")
        value = globals()[name] = getattr(module, name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
