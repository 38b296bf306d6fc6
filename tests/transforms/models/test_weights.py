from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import open_clip
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from transforms.core import recipe
from transforms.cross_modality.digit import DigitSettings
from transforms.cross_modality.flipped_clip import FlippedClipSettings
from transforms.cross_modality.image_text_matching import ImageTextMatchingSettings
from transforms.models import weights


def test_a_missing_bundled_model_raises():
    with pytest.raises(FileNotFoundError, match="bundled:nothing: this installation has no such file"):
        weights.local_path("bundled:nothing")


def test_identity_has_the_hash_of_the_weights(itm_folder: Path):
    settings = ImageTextMatchingSettings(model=str(itm_folder), revision="abc", min=0.5)
    digest = hashlib.sha256((itm_folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights.model_identity(settings) == {
        "name": str(itm_folder),
        "revision": "abc",
        "sha256": {"model.safetensors": digest},
    }


def test_identity_resolves_a_hub_model_through_the_hub_cache(
    itm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--itm"
    shutil.copytree(itm_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = weights.model_identity(ImageTextMatchingSettings(model="someone/itm", min=0.5))
    assert cached["revision"] == commit
    assert set(cached["sha256"]) == {"model.safetensors"}
    absent = weights.model_identity(DigitSettings(model="someone/other", revision="v1"))
    assert absent == {"name": "someone/other", "revision": "v1", "sha256": {}}


@pytest.mark.parametrize(
    ("architecture", "tag", "quick"),
    [("ViT-L-14", "openai", True), ("ViT-L/14", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False)],
)
def test_quick_gelu_follows_the_tag(architecture: str, tag: str, quick: bool):
    settings = FlippedClipSettings(model=architecture, weights=tag, min=0.2)
    assert weights.clip_source(settings) == (architecture, tag, quick)
    assert not open_clip.get_model_config(architecture.replace("/", "-")).get("quick_gelu", False)


def test_quick_gelu_must_be_given_for_a_weight_file(tmp_path: Path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    given: dict = {"model": "ViT-L-14", "weights": str(file), "min": 0.2}
    with pytest.raises(ValueError, match="set `quick_gelu: true`"):
        weights.clip_source(FlippedClipSettings(**given))
    for quick in (True, False):
        assert weights.clip_source(FlippedClipSettings(**given, quick_gelu=quick)).quick_gelu is quick
    never = given | {"model": "ViT-B-16-SigLIP"}  # none of its tags needs it
    assert not weights.clip_source(FlippedClipSettings(**never)).quick_gelu


def test_an_unknown_open_clip_tag_raises():
    with pytest.raises(ValueError, match="neither a file nor a known tag; tags of ViT-L-14: openai"):
        weights.clip_source(FlippedClipSettings(model="ViT-L-14", weights="opnai", min=0.2))


@pytest.mark.parametrize("fetch", [True, False])
def test_a_branch_is_pinned_to_its_commit_and_weights_are_fetched_on_request(
    itm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path, fetch: bool
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / commit
    asked: list[tuple[str | None, list[str]]] = []

    def download(repository: str, revision: str | None, local_files_only: bool = False, **more: list[str]) -> str:
        if local_files_only:
            if not snapshot.exists():
                raise LocalEntryNotFoundError(repository)
        else:
            asked.append((revision, more["allow_patterns"]))
            shutil.copytree(itm_folder, snapshot, dirs_exist_ok=True)
            if "*.safetensors" not in more["allow_patterns"]:
                (snapshot / "model.safetensors").unlink()
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    given = recipe.CrossModalitySettings(
        flipped_clip=FlippedClipSettings(model=str(clip_folder), min=0.2),
        image_text_matching=ImageTextMatchingSettings(model="someone/itm", min=0.5),
    )
    first = weights.pinned(given, fetch)
    assert first.image_text_matching and first.image_text_matching.revision == commit
    assert asked[0][0] is None
    assert ("*.safetensors" in asked[0][1]) is fetch
    if fetch:  # as after an interrupted download
        (snapshot / "model.safetensors").unlink()
    before = len(asked)
    weights.pinned(given, fetch)
    assert {revision for revision, _ in asked[before:]} == ({commit} if fetch else set())
    identity = weights.model_identity(first.image_text_matching)
    assert set(identity["sha256"]) == ({"model.safetensors"} if fetch else set())
    again = weights.pinned(given, fetch)  # as when an interrupted run resumes
    assert again == first
    assert again.image_text_matching
    assert weights.model_identity(again.image_text_matching) == identity


def test_an_open_clip_model_on_a_hub_is_loaded_at_its_revision(clip_folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(clip_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    settings = FlippedClipSettings(model="hf-hub:someone/clip", revision="0123abcd", min=0.2)
    assert weights.clip_source(settings) == (f"local-dir:{clip_folder}", None, False)
    assert asked == [("someone/clip", "0123abcd")]


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a hub that cannot be reached."""

    def fail(repository: str, **_: object) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("open_clip.download_pretrained", fail)


def missing(fetch: bool = True, **changes: object) -> str:
    given = recipe.CrossModalitySettings(
        flipped_clip=FlippedClipSettings(model="ViT-L-14", weights="openai", min=0.2),
        image_text_matching=ImageTextMatchingSettings(model="someone/itm", min=0.5),
        digit=DigitSettings(model="someone/blip2"),
    )
    with pytest.raises(weights.MissingModels) as caught:
        weights.pinned(given.model_copy(update=changes), fetch)
    return str(caught.value)


@pytest.mark.parametrize(("offline", "why"), [(False, "its hub cannot be reached"), (True, "HF_HUB_OFFLINE or TRANS")])
def test_all_missing_models_are_named_at_once(
    no_hub: None, monkeypatch: pytest.MonkeyPatch, offline: bool, why: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    message = missing()
    for where in (
        "cross_modality.flipped_clip.weights: openai of ViT-L-14: is not on this machine, and ",
        "cross_modality.image_text_matching.model: someone/itm: is not on this machine, and ",
        "cross_modality.digit.model: someone/blip2: is not on this machine, and ",
    ):
        assert where + why in message
    assert message.endswith(". Name a local folder there, or fetch the models beforehand: see docs/models.md")
    assert "\n" not in message


def test_folders_and_tags_that_do_not_exist_are_named_as_that(no_hub: None, tmp_path: Path) -> None:
    message = missing(
        flipped_clip=FlippedClipSettings(model="ViT-L-14", weights="opnai", min=0.2),
        image_text_matching=ImageTextMatchingSettings(model=f"{tmp_path}/gone", min=0.5),
        digit=DigitSettings(model="bundled:nothing"),
    )
    assert "cross_modality.flipped_clip.weights: 'opnai' is neither a file nor a known tag" in message
    assert f"cross_modality.image_text_matching.model: {tmp_path}/gone: no such folder on this machine" in message
    assert "cross_modality.digit.model: bundled:nothing: this installation has no such file" in message


def test_a_copy_without_weights_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> None:
    """As after an interrupted download, when the hub cannot be reached now."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    clip = FlippedClipSettings(model=str(clip_folder), min=0.2)
    message = missing(flipped_clip=clip, digit=None)
    assert "image_text_matching.model: someone/itm: the copy on this machine has no weights, and its hub" in message
