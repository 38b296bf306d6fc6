"""Normalising images with the byte table: each channel uses its own row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transforms.models.pictures import normalised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_is_looked_up_in_the_row_of_its_channel(dtype: torch.dtype):
    table = torch.arange(3 * 256).view(3, 256).to(dtype)
    pictures = [np.random.default_rng(seed).integers(0, 256, (3, 5, 7), dtype=np.uint8) for seed in range(2)]
    found = normalised(pictures, table)
    expected = np.stack(pictures) + 256 * np.arange(3).reshape(1, 3, 1, 1)
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))
