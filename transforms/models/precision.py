"""The dtype of a model's weights and activations, and the fastest one for the hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Torch takes seconds to import, and a resolved precision does not need it
    import torch


def resolve(precision: str, device: str) -> str:
    """Resolve "auto" to "fp32", "bf16" or "fp16" for `device` ("cpu" or "cuda"); other values are returned unchanged.

    bf16 has the range of fp32 and is several times as fast on hardware with native instructions: CPUs with AVX512-BF16
    or AMX, and GPUs since Ampere. On other hardware fp32 is the best choice for a CPU and fp16 for a GPU. A launcher
    without a GPU cannot see the workers' GPUs: it chooses bf16, and `dtype_on` raises on a worker whose GPU lacks it.
    """
    if precision != "auto":
        return precision
    import torch

    if device == "cuda":
        return "fp16" if torch.cuda.is_available() and not _native_bf16_gpu() else "bf16"
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"


def usable_on(precision: str, device: torch.device) -> str:
    """`precision` resolved on the worker. Raises RuntimeError if its GPU would only emulate bf16.

    For fp32 it also turns TF32 off, for the whole process.
    """
    import torch

    resolved = resolve(precision, device.type)
    if device.type == "cuda" and resolved == "bf16" and not _native_bf16_gpu():
        raise RuntimeError(f"{torch.cuda.get_device_name()} has no bf16; set `precision: fp16` in the recipe")
    if resolved == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # by default cuDNN convolves fp32 with a 10-bit mantissa
    return resolved


def dtype_on(precision: str, device: torch.device) -> torch.dtype:
    """The dtype to load weights in, on the worker; see `usable_on`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[usable_on(precision, device)]


def _native_bf16_gpu() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)
