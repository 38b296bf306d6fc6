"""The tiny models, saved once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.transforms.models import tiny_models


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: for models this small, more threads only add overhead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def itm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_itm(tmp_path_factory.mktemp("itm"))


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_digit(tmp_path_factory.mktemp("digit"))
