"""Compressed, adapted language models, small and fast: a frozen truncated-SVD pair plus a LoRA pair as one op."""

from hylora_kernels.backends import available_backends, use_backend
from hylora_kernels.linear import SVD_LoRA_Linear, SVDLoRALinear
from hylora_kernels.ops import svd_lora_linear
