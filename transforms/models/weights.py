"""Where a model's files come from, and what exactly was loaded.

A model is named by `bundled:clip|itm|digit` (the small demo models that this package holds, with
`bundled:tasks`, task centroids made by that CLIP), a local folder, a folder of Cloud Storage
(`gs://…`, copied once to this machine), or a name that the library itself resolves (an open_clip
architecture with its tag, a hub name with its revision). Only safetensors files are read, or
pickles that torch confines to tensors (`weights_only`).
"""

from __future__ import annotations

import functools
import importlib.resources
import os
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import open_clip
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError

from transforms.core import catalogue
from transforms.core.recipe import CrossModalitySettings
from transforms.models.settings import ClipModelSettings, ModelSettings
from transforms.storage import files
from transforms.storage.local_copies import local_copy

_BUNDLED = "bundled:"
LOCAL = "local-dir:"  # open_clip's own prefixes
_HUB = "hf-hub:"


class ClipSource(NamedTuple):
    """The arguments by which open_clip finds a model."""

    name: str
    pretrained: str | None
    quick_gelu: bool


def clip_source(settings: ClipModelSettings) -> ClipSource:
    """What open_clip is to load. Raises ValueError where it would go on with random weights."""
    model = local_path(settings.model)
    if Path(model).is_dir():
        return ClipSource(LOCAL + model, None, False)
    if model.startswith(_HUB):
        return ClipSource(LOCAL + _clip_snapshot(model.removeprefix(_HUB), settings.revision), None, False)
    if settings.weights is None:
        raise ValueError(
            f"flipped_clip.model: {settings.model!r} is no folder, so it names an architecture, which needs `weights`"
        )
    weights = local_path(settings.weights)
    known = open_clip.list_pretrained_tags_by_model(model)
    if not os.path.isfile(weights) and not _tag(model, weights):
        allowed = f"tags of {model}: {', '.join(known)}" if known else f"open_clip knows no tag of {model!r}"
        raise ValueError(f"flipped_clip.weights: {settings.weights!r} is neither a file nor a known tag; {allowed}")
    # open_clip 3 only warns where a tag was trained with QuickGELU and the architecture's name does
    # not say so, as with ViT-L-14 and `openai`; the scores would be quietly wrong. A file cannot say.
    quick_gelu = settings.quick_gelu
    if quick_gelu is None and os.path.isfile(weights):
        if any(_tag(model, tag).get("quick_gelu") for tag in known) and not model.endswith("-quickgelu"):
            raise ValueError(
                f"flipped_clip.weights: {settings.weights!r} is a file, and some weights of {model} need QuickGELU: "
                "say `quick_gelu: true` (OpenAI's do) or `quick_gelu: false`"
            )
        quick_gelu = False
    if quick_gelu is None:
        quick_gelu = bool(_tag(model, weights).get("quick_gelu"))
    return ClipSource(model, weights, quick_gelu)


def load_pretrained(
    model_class: Any,
    settings: ModelSettings,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """A transformers model in `dtype`, ready to score on `device`."""
    transformers.utils.logging.disable_progress_bar()  # the command line draws its own
    path, revision = local_path(settings.model), settings.revision or "main"
    model = model_class.from_pretrained(path, revision=revision, dtype=dtype, weights_only=True)
    return model.eval().to(device)


def load_processor(processor_class: Any, settings: ModelSettings) -> Any:
    """A transformers model's processor.

    It works on Pillow: that is what these models were trained with, to the bit; transformers' default, on torchvision,
    differs from it in the last step of some pixels.
    """
    path, revision = local_path(settings.model), settings.revision or "main"
    return processor_class.from_pretrained(path, revision=revision, backend="pil")


def pinned(settings: CrossModalitySettings, fetch: bool) -> CrossModalitySettings:
    """The settings with each hub model's revision as the commit that it stands for now, so that all workers load one.

    With `fetch`, weights that this machine lacks are fetched too: a run that is to be gone on with must have the same
    hashes before as after. Raises OSError or ValueError where a hub has no such model.
    """
    changes: dict[str, Any] = {}
    for score in catalogue.model_scores():
        name, section = score.name, getattr(settings, score.name)
        if not isinstance(section, ModelSettings):
            continue
        if isinstance(section, ClipModelSettings):
            source = clip_source(section)  # brings all of an `hf-hub:` model here
            if fetch and source.pretrained and not os.path.isfile(source.pretrained) and not _weight_files(section)[0]:
                open_clip.download_pretrained(_tag(source.name, source.pretrained))
        repository = _hub_repository(section)
        if repository:
            _, commit = _in_hub_cache(repository, section.revision)
            if fetch:  # also where some of it is here: the last fetching may have been interrupted
                commit = Path(_snapshot(repository, commit or section.revision, ["*.safetensors"], ["*.bin"])).name
            elif commit is None:
                commit = Path(_snapshot(repository, section.revision, [], [])).name
            changes[name] = section.model_copy(update={"revision": commit})
    return settings.model_copy(update=changes)


def _hub_repository(settings: ModelSettings) -> str | None:
    """The hub's name of the model; None where the model is no snapshot of a hub's repository."""
    if isinstance(settings, ClipModelSettings):
        return settings.model.removeprefix(_HUB) if settings.model.startswith(_HUB) else None
    elsewhere = settings.model.startswith(_BUNDLED) or "://" in settings.model or Path(settings.model).is_dir()
    return None if elsewhere else settings.model


def model_identity(
    settings: ModelSettings,
) -> dict[str, Any]:
    """What the manifest says of a model: its name, revision, and the sha256 of each weight file.

    The revision is the hub's commit where its cache on this machine knows it, else what the recipe
    says (for open_clip the tag or file). Files that do not lie on this machine have no hash.
    """
    given = settings.revision
    if isinstance(settings, ClipModelSettings) and settings.weights is not None:
        given = settings.weights
    weights, commit = _weight_files(settings)
    return {
        "name": settings.model,
        "revision": commit or given,
        "sha256": {file.name: files.sha256(str(file)) for file in weights},
    }


def local_path(name: str) -> str:
    """`name` as the libraries can open it: bundled and remote files as local paths."""
    if name.startswith(_BUNDLED):
        demo, bundled = importlib.resources.files("pipeline") / "demo", name.removeprefix(_BUNDLED)
        for path in (demo / "models" / bundled, demo / f"{bundled}.npz"):
            if path.is_dir() or path.is_file():
                return str(path)
        raise FileNotFoundError(f"{name}: this installation holds no such file")
    return local_copy(name)


def _clip_snapshot(repository: str, revision: str | None) -> str:
    """A local copy of an open_clip model on a hub, at a revision, which open_clip's own `hf-hub:` cannot name."""
    return _snapshot(repository, revision, ["open_clip_*.safetensors"], ["open_clip_pytorch_model.bin"])


def _snapshot(repository: str, revision: str | None, safe: list[str], pickled: list[str]) -> str:
    """A hub's snapshot without weights in other formats: safetensors where there are any, else tensors-only pickles."""
    fetch = functools.partial(huggingface_hub.snapshot_download, repository, revision=revision)
    folder = fetch(allow_patterns=["*.json", "*.txt", "*.model", *safe])
    if not list(Path(folder).glob("*.safetensors")):
        folder = fetch(allow_patterns=["*.json", "*.txt", "*.model", *pickled])
    return folder


def _tag(model: str, tag: str) -> dict[str, Any]:
    return open_clip.get_pretrained_cfg(model.replace("/", "-"), tag) or {}


def _weight_files(
    settings: ModelSettings,
) -> tuple[list[Path], str | None]:
    """The weight files on this machine, and the commit where they come from a hub's cache."""
    if not isinstance(settings, ClipModelSettings):
        path = local_path(settings.model)
        if Path(path).is_dir():
            return _in_folder(Path(path))
        return _in_hub_cache(path, settings.revision)
    if settings.model.startswith(_HUB):
        return _in_hub_cache(settings.model.removeprefix(_HUB), settings.revision)
    source = clip_source(settings)
    if source.name.startswith(LOCAL):
        return _in_folder(Path(source.name.removeprefix(LOCAL)))
    assert source.pretrained is not None
    if os.path.isfile(source.pretrained):
        return [Path(source.pretrained)], None
    repository = _tag(source.name, source.pretrained).get("hf_hub", "")
    return _in_hub_cache(repository.rpartition("/")[0], None) if repository else ([], None)


def _in_folder(folder: Path) -> tuple[list[Path], None]:
    """Every safetensors file, or where there is none every pickled one, as the libraries look."""
    for patterns in (("*.safetensors",), ("*.bin", "*.pt", "*.pth")):
        found = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if found:
            return found, None
    return [], None


def _in_hub_cache(repository: str, revision: str | None) -> tuple[list[Path], str | None]:
    try:
        snapshot = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return [], None
    return _in_folder(snapshot)[0], snapshot.name
