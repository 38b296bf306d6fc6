"""What a model's weights and activations are kept in, and what the hardware at hand does fastest."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: str, device: str) -> str:
    """`auto` as fp32, bf16 or fp16; any other as it is.

    bf16 keeps fp32's range and runs at several times its speed where the hardware has instructions for it: CPUs with
    AVX512-BF16 or AMX, GPUs from Ampere on. Elsewhere a CPU is at its best with fp32 and a GPU with fp16. A launcher
    without a GPU speaks for the workers: bf16, and a worker that has none says so (`dtype_on`).
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        return "fp16" if torch.cuda.is_available() and not _native_bf16_gpu() else "bf16"
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"


def dtype_on(precision: str, device: torch.device) -> torch.dtype:
    """The type to load weights in, on the worker. Raises where its GPU would only emulate it."""
    resolved = resolve(precision, device.type)
    if device.type == "cuda" and resolved == "bf16" and not _native_bf16_gpu():
        raise RuntimeError(f"{torch.cuda.get_device_name()} has no bf16; say `precision: fp16` in the recipe")
    if resolved == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # its default: convolutions of fp32 with 10 bits of mantissa
    return DTYPES[resolved]


def _native_bf16_gpu() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
