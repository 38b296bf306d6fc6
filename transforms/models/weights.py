"""Finding and loading model files, and the identity of what was loaded.

A model is given as one of

- `bundled:clip`, `bundled:itm`, `bundled:digit`: the small demo models of this package;
- a local folder;
- a Cloud Storage folder (`gs://…`), copied to this machine once;
- a name that the library resolves: an open_clip architecture with its tag, or a hub name with its revision.

`bundled:tasks` names task centroids computed with `bundled:clip`. Only safetensors files are read, or pickles that
torch restricts to tensors (`weights_only`).

`open_clip`, `transformers` and `huggingface_hub` are imported on first use, because importing them takes seconds.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transforms.core import catalogue
from transforms.core.recipe import CrossModalitySettings
from transforms.models.settings import ClipModelSettings, ModelSettings
from transforms.storage import files, local_copies

if TYPE_CHECKING:  # Torch takes seconds to import
    import torch

_BUNDLED = "bundled:"
LOCAL = "local-dir:"
"""open_clip's prefix of a local folder."""
_HUB = "hf-hub:"  # open_clip's prefix of a hub name


class ClipSource(NamedTuple):
    """The arguments with which open_clip loads a model; `pretrained` is a tag or a file, None for a folder."""

    name: str
    pretrained: str | None
    quick_gelu: bool


def clip_source(settings: ClipModelSettings) -> ClipSource:
    """The arguments for open_clip. Raises ValueError if open_clip would silently use random or unsuitable weights.

    A hub model is downloaded, and a Cloud Storage folder is copied, to this machine.
    """
    import open_clip

    model = local_path(settings.model)
    if Path(model).is_dir():
        return ClipSource(LOCAL + model, None, False)
    if model.startswith(_HUB):
        return ClipSource(LOCAL + _clip_snapshot(model.removeprefix(_HUB), settings.revision), None, False)
    if settings.weights is None:
        raise ValueError(
            f"flipped_clip.model: {settings.model!r} is not a folder, so it is an architecture, which needs `weights`"
        )
    weights = local_path(settings.weights)
    known = open_clip.list_pretrained_tags_by_model(model)
    if not os.path.isfile(weights) and not _tag(model, weights):
        allowed = f"tags of {model}: {', '.join(known)}" if known else f"open_clip has no tags for {model!r}"
        raise ValueError(f"flipped_clip.weights: {settings.weights!r} is neither a file nor a known tag; {allowed}")
    # Some tags were trained with QuickGELU though the architecture's name does not end in -quickgelu, such as `openai`
    # of ViT-L-14. open_clip 3 only warns about it and gives wrong scores. A weight file does not tell at all.
    quick_gelu = settings.quick_gelu
    if quick_gelu is None and os.path.isfile(weights):
        if any(_tag(model, tag).get("quick_gelu") for tag in known) and not model.endswith("-quickgelu"):
            raise ValueError(
                f"flipped_clip.weights: {settings.weights!r} is a file, and some weights of {model} need QuickGELU: "
                "set `quick_gelu: true` (as for OpenAI's weights) or `quick_gelu: false`"
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
    """Load a transformers model of `model_class` in `dtype` onto `device`, in evaluation mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # the command line draws its own
    path, revision = local_path(settings.model), settings.revision or "main"
    model = model_class.from_pretrained(path, revision=revision, dtype=dtype, weights_only=True)
    return model.eval().to(device)


def load_processor(processor_class: Any, settings: ModelSettings) -> Any:
    """Load the processor of a transformers model, with the Pillow backend.

    These models were trained with images resized by Pillow. The torchvision backend, the default of transformers,
    differs from it by one step in some pixels.
    """
    path, revision = local_path(settings.model), settings.revision or "main"
    return processor_class.from_pretrained(path, revision=revision, backend="pil")


class MissingModels(OSError):
    """Models that are not on this machine and cannot be fetched. The message names all of them, by their settings."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(
            f"{'; '.join(faults)}. Name a local folder there, or fetch the models beforehand: see docs/models.md"
        )


def pinned(settings: CrossModalitySettings, fetch: bool) -> CrossModalitySettings:
    """The settings with the revision of each hub model replaced by its current commit, so that all workers load it.

    With `fetch`, missing weights are downloaded too, because an interrupted run resumes only if the hashes of its
    weights are the same. Raises MissingModels, which names all that are missing at once.
    """
    changes: dict[str, Any] = {}
    faults: list[str] = []
    for score in catalogue.model_scores():
        name, section = score.name, getattr(settings, score.name)
        if not isinstance(section, ModelSettings):
            continue
        try:
            if isinstance(section, ClipModelSettings):
                _fetch_clip(section, fetch)
            if repository := _hub_repository(section):
                changes[name] = section.model_copy(update={"revision": _pinned_commit(repository, section, fetch)})
            else:
                local_path(section.model)
        except (OSError, ValueError, LookupError) as error:
            faults.append(_fault(name, section, error))
    if faults:
        raise MissingModels(faults)
    return settings.model_copy(update=changes)


def _pinned_commit(repository: str, settings: ModelSettings, fetch: bool) -> str:
    """The commit of a hub model, whose files are then on this machine if `fetch`."""
    if repository.startswith(("/", ".", "~")) or repository.count("/") > 1:
        raise FileNotFoundError(f"{repository}: no such folder on this machine")
    _, commit = _in_hub_cache(repository, settings.revision)
    if not fetch:
        return commit or Path(_snapshot(repository, settings.revision, [], [])).name
    # Also where the cache has some of the files: an earlier download may have been interrupted.
    folder = Path(_snapshot(repository, commit or settings.revision, ["*.safetensors"], ["*.bin"]))
    if not _in_folder(folder)[0]:
        raise FileNotFoundError(f"{repository}: the copy on this machine has no weights, {_hub_state()}")
    return folder.name


def _fetch_clip(settings: ClipModelSettings, fetch: bool) -> None:
    """Download the weights that open_clip would, if `fetch`. Raises as `clip_source`, and OSError."""
    import open_clip

    source = clip_source(settings)  # downloads all files of an `hf-hub:` model
    if not fetch or not source.pretrained or os.path.isfile(source.pretrained) or _weight_files(settings)[0]:
        return
    tag = _tag(source.name, source.pretrained)
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if not repository or file:
        _quiet_hub()
        open_clip.download_pretrained(tag)
    elif not _in_folder(Path(_clip_snapshot(repository, None)))[0]:
        raise FileNotFoundError(f"{repository}: the copy on this machine has no weights, {_hub_state()}")


def _fault(name: str, settings: ModelSettings, error: Exception) -> str:
    """The setting that names a model, the model, and why it cannot be had, on one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if str(error).startswith(f"{name}."):
        return f"cross_modality.{error}"
    tag = settings.weights if isinstance(settings, ClipModelSettings) else None
    where, model = ("weights", f"{tag} of {settings.model}") if tag is not None else ("model", settings.model)
    if isinstance(error, RepositoryNotFoundError):
        reason = "the hub has no such model, or does not show it to this user"
    elif isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        reason = f"is not on this machine, {_hub_state()}"
    else:
        reason = " ".join(str(error).split()).removeprefix(f"{settings.model}: ")[:300]
    return f"cross_modality.{name}.{where}: {model}: {reason}"


def _hub_state() -> str:
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to fetch it"
    return "and its hub cannot be reached"


def _quiet_hub() -> None:
    """Keep the hub's client from printing each of its retries: an error says once what failed."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()


def _hub_repository(settings: ModelSettings) -> str | None:
    """The hub repository of the model; None if the model does not come from a hub repository."""
    if isinstance(settings, ClipModelSettings):
        return settings.model.removeprefix(_HUB) if settings.model.startswith(_HUB) else None
    elsewhere = settings.model.startswith(_BUNDLED) or "://" in settings.model or Path(settings.model).is_dir()
    return None if elsewhere else settings.model


def model_identity(
    settings: ModelSettings,
) -> dict[str, Any]:
    """The identity of a model, as recorded in the manifest: `name`, `revision` and the `sha256` of each weight file.

    The revision is the commit in the hub cache of this machine, else the one of the recipe (for open_clip the tag or
    file). Files that are not on this machine have no hash.
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
    """`name` with bundled and remote files replaced by local paths; other names are returned unchanged.

    Raises FileNotFoundError if there is no such bundled file.
    """
    if name.startswith(_BUNDLED):
        demo, bundled = importlib.resources.files("pipeline") / "demo", name.removeprefix(_BUNDLED)
        for path in (demo / "models" / bundled, demo / f"{bundled}.npz"):
            if path.is_dir() or path.is_file():
                return str(path)
        raise FileNotFoundError(f"{name}: this installation has no such file")
    return local_copies.local_copy(name)


def _clip_snapshot(repository: str, revision: str | None) -> str:
    """Download an open_clip model from a hub at a revision, which open_clip's own `hf-hub:` names cannot specify."""
    return _snapshot(repository, revision, ["open_clip_*.safetensors"], ["open_clip_pytorch_model.bin"])


def _snapshot(repository: str, revision: str | None, safe: list[str], pickled: list[str]) -> str:
    """Download a hub snapshot with weights in one format: `safe` (safetensors) where there are any, else `pickled`.

    Returns the local folder, which is named after the commit.
    """
    import huggingface_hub

    _quiet_hub()
    fetch = functools.partial(huggingface_hub.snapshot_download, repository, revision=revision)
    folder = fetch(allow_patterns=["*.json", "*.txt", "*.model", *safe])
    if not list(Path(folder).glob("*.safetensors")):
        folder = fetch(allow_patterns=["*.json", "*.txt", "*.model", *pickled])
    return folder


def _tag(model: str, tag: str) -> dict[str, Any]:
    """open_clip's configuration of a tag; empty if it has no such tag."""
    import open_clip

    return open_clip.get_pretrained_cfg(model.replace("/", "-"), tag) or {}


def _weight_files(
    settings: ModelSettings,
) -> tuple[list[Path], str | None]:
    """The weight files on this machine, and their commit if they are in the hub cache."""
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
    """All safetensors files, else all pickled ones: the order in which the libraries look for weights."""
    for patterns in (("*.safetensors",), ("*.bin", "*.pt", "*.pth")):
        found = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if found:
            return found, None
    return [], None


def _in_hub_cache(repository: str, revision: str | None) -> tuple[list[Path], str | None]:
    """The weight files and the commit of a repository in the hub cache; none if it is not cached."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return [], None
    return _in_folder(snapshot)[0], snapshot.name
