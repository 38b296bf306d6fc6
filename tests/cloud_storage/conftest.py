"""A store that Google's own clients talk to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
from apache_beam.internal.gcp import auth

from tests.cloud_storage.server import CloudStorage
from transforms.storage import files

_numbers = itertools.count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudStorage]:
    """The server, for this process and those that it starts."""
    with CloudStorage().serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(tmp_path_factory.mktemp("credentials")).items():
            patch.setenv(name, value)
        patch.setenv("PAIRSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(auth._Credentials, "_credentials_init", False)  # what Beam found before, it keeps
        patch.setattr(files, "_clients", threading.local())
        yield server


@pytest.fixture
def bucket(store: CloudStorage) -> str:
    """An empty bucket's name."""
    name = f"bucket-{next(_numbers)}"
    store.buckets[name] = {}
    return name
