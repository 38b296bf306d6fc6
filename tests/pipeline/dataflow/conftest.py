"""Fixtures: a local stand-in for Google Cloud, and a user who is logged in to it as a service account."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner, Result

from pipeline.cli import app
from tests.helpers import DEMO_RECIPE
from tests.pipeline.dataflow.discovery import VERSIONS
from tests.pipeline.dataflow.google_cloud import GoogleCloud

EXAMPLE = Path(__file__).parents[3] / "templates" / "dataflow.yaml"
PLACES = ("--input", "gs://my-bucket/pool", "--output", "gs://my-bucket/out", "--settings", "dataflow.yaml")
ACCOUNT = "launcher@my-project.iam.gserviceaccount.com"

Pairsift = Callable[..., Result]


@pytest.fixture(scope="session")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and launch settings, as the working folder of a user without credentials."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    shutil.copy(EXAMPLE, tmp_path / "dataflow.yaml")
    recipe = DEMO_RECIPE.read_text()
    assert "device: cpu" in recipe
    (tmp_path / "recipe.yaml").write_text(recipe.replace("device: cpu", "device: cuda"))
    return tmp_path


@pytest.fixture
def cloud(place: Path, monkeypatch: pytest.MonkeyPatch, private_key: str) -> Iterator[GoogleCloud]:
    """Local services with a logged-in user. At the end, checks all requests against the discovery documents."""
    cloud = GoogleCloud()
    with cloud.serving():
        for service in VERSIONS:
            name = "STORAGE_EMULATOR_HOST" if service == "storage" else f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service}"
            monkeypatch.setenv(name.upper(), f"{cloud.url}/{service}/")
        account = {"type": "service_account", "client_email": ACCOUNT, "private_key": private_key}
        account |= {"token_uri": f"{cloud.url}/token", "project_id": "my-project"}
        (place / "account.json").write_text(json.dumps(account))
        monkeypatch.setattr("pipeline.dataflow.workflow._POLL_SECONDS", 0.01)
        # Requested from iamcredentials.googleapis.com in another thread; no environment variable redirects it.
        lookup = "google.oauth2.service_account.Credentials._is_regional_access_boundary_lookup_required"
        monkeypatch.setattr(lookup, lambda _: False, raising=False)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(place / "account.json"))
        yield cloud
    assert cloud.faults == []


@pytest.fixture
def pairsift(place: Path) -> Pairsift:
    """Run the command line in the folder."""
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace waiting by recording the seconds to wait."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited
