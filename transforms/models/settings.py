"""Settings that name a model, shared by the rules that run one."""

from __future__ import annotations

import pydantic
from pydantic import Field

from transforms.core.settings import Settings, Share


class ModelSettings(Settings):
    """A model and its batch size. `model` is a hub name (pin its `revision`), a folder (local or `gs://`), or one of
    the bundled demo models."""

    model: str
    revision: str | None = None
    batch_size: int = Field(16, ge=1, le=4096)


class ClipModelSettings(ModelSettings):
    """A CLIP. `model` is an open_clip architecture (with `weights`, its tag or file), a folder in open_clip's hub form,
    `hf-hub:` and a hub name (pin its `revision`), or `bundled:clip`."""

    weights: str | None = None
    quick_gelu: bool | None = None
    batch_size: int = Field(64, ge=1, le=4096)

    @pydantic.model_validator(mode="after")
    def _nothing_is_ignored(self) -> ClipModelSettings:
        if self.revision and not self.model.startswith("hf-hub:"):
            raise ValueError("`revision` belongs to a `model` that starts with hf-hub:; a tag has none")
        if self.quick_gelu is not None and self.weights is None:
            raise ValueError("`quick_gelu` belongs to `weights`; folders and hub models state it themselves")
        return self


class ClipPromptsSettings(Settings):
    """Which images BLIP-2 is asked about (our choice; off by default): those for which CLIP gives the `positive`
    prompts a share of at least `min_probability` in the softmax over all prompts."""

    only_decide = frozenset({"min_probability"})

    positive: list[str] = Field(["a picture with digits or numbers written in it"], min_length=1)
    negative: list[str] = Field(["a picture without any text", "a picture with words but no numbers"], min_length=1)
    min_probability: Share
