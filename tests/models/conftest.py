"""The tiny models, saved once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny_models


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def itm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_itm(tmp_path_factory.mktemp("itm"))


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_digit(tmp_path_factory.mktemp("digit"))
