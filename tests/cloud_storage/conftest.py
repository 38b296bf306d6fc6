"""Fixtures: a local Cloud Storage server that Google's own clients use."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from tests.cloud_storage.server import CloudStorage
from transforms.storage import cloud_storage

_numbers = itertools.count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudStorage]:
    """The server, configured for this process and its child processes."""
    with CloudStorage().serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(tmp_path_factory.mktemp("credentials")).items():
            patch.setenv(name, value)
        patch.setenv("PAIRSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(cloud_storage, "_clients", threading.local())
        cloud_storage.credentials.cache_clear()
        yield server
    cloud_storage.credentials.cache_clear()


@pytest.fixture
def bucket(store: CloudStorage) -> str:
    """The name of an empty bucket."""
    name = f"bucket-{next(_numbers)}"
    store.buckets[name] = {}
    return name
