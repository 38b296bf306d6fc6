from __future__ import annotations

import pytest
import torch

from tests.helpers import recipe
from transforms.models.precision import dtype_on, resolve


@pytest.mark.parametrize(
    ("features", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")]
)
def test_auto_on_a_cpu_depends_on_its_instructions(
    features: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve("auto", "cpu") == expected
    assert resolve("fp32", "cpu") == "fp32"
    assert dtype_on("auto", torch.device("cpu")) is {"bf16": torch.bfloat16, "fp32": torch.float32}[expected]


@pytest.mark.parametrize(
    ("there", "native", "expected"), [(False, False, "bf16"), (True, True, "bf16"), (True, False, "fp16")]
)
def test_auto_on_a_gpu(there: bool, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert resolve("auto", "cuda") == expected


def test_a_worker_whose_gpu_would_emulate_bf16_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    with pytest.raises(RuntimeError, match="an old one has no bf16; set `precision: fp16`"):
        dtype_on("bf16", torch.device("cuda"))


def test_a_recipe_cannot_combine_fp16_with_a_cpu():
    with pytest.raises(ValueError, match="fp16` is for GPUs"):
        recipe(cross_modality__precision="fp16")
