"""The recipe: every setting of a run, typed, and validated when it is read.

Each installed score and rule has a section in its stage, with the settings class that it declares
(`transforms.core.catalogue`). A section that is absent switches its rule off, and `{}` takes its defaults. The sections
that belong to no rule are declared here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import pydantic
from pydantic import Field

from transforms.core import catalogue
from transforms.core.catalogue import (
    CROSS_MODALITY,
    DISTRIBUTION_ALIGNMENT,
    SINGLE_MODALITY,
    STAGES,
    Rule,
    Score,
    rules_of_stage,
    scores_of,
)
from transforms.core.settings import (
    PositiveShare,
    Settings,
    SettingsError,
    Share,
    ThresholdSettings,
    load_settings,
    parse_settings,
)

FILES = ("yunet_model", "tasks", "centroids")
"""Settings that name a file. `model` and `weights` may also name one, else a hub's or open_clip's model."""

SectionSettings = TypeVar("SectionSettings", bound=Settings)

_SUFFIX = re.compile(r"\*|[^./*]+(\.[^./*]+)*(\.\*)?")


def _checked_suffix(suffix: str) -> str:
    if suffix != suffix.lower() or not _SUFFIX.fullmatch(suffix):
        raise ValueError("give what follows the key in lower case and without the first dot, for example image.jpg")
    return suffix


MemberSuffix = Annotated[str, pydantic.AfterValidator(_checked_suffix)]
FieldName = Annotated[str, Field(min_length=1, max_length=100)]


class PoolSettings(Settings):
    """What the pairs of a pool are made of, and limits on what is read. What exceeds one becomes a dead letter.

    `image_members`, `caption_members` and `json_members` name a sample's files by what follows the key, best first;
    `*` stands for the extensions of all formats that are read. `caption_fields` name the fields of the json (or of the
    parquet beside the tar) that hold the caption where no member does; `uid_fields` those that hold the uid. Of a
    picture with several captions, `each` is a sample of its own, or the `first` is the caption. `keep_columns` carries
    fields into the decisions. docs/pools.md has examples.

    `max_dead_share`: where more than this share of the samples are dead letters for one reason, the run fails; 1.0
    never does. `stats_mismatch`: whether a shard that holds another number of samples than img2dataset's `_stats.json`
    says is reported only, or skipped too.
    """

    only_decide = frozenset({"keep_columns", "max_dead_share", "stats_mismatch"})

    image_members: list[MemberSuffix] = Field(["*", "image.*", "img.*"], min_length=1)
    caption_members: list[MemberSuffix] = Field(["txt", "caption", "cap", "text", "caption.txt", "cap.txt", "text.txt"])
    json_members: list[MemberSuffix] = Field(["json", "meta.json", "metadata.json"])
    caption_fields: list[FieldName] = Field(["caption", "captions", "text", "texts", "alt_text"])
    several_captions: Literal["each", "first"] = "each"
    uid_fields: list[FieldName] = Field(["uid"])
    keep_columns: list[FieldName] = Field([])

    max_image_bytes: int = Field(20 * 2**20, gt=0)
    max_image_pixels: int = Field(64_000_000, gt=0, le=178_000_000)  # Pillow itself refuses more
    max_caption_bytes: int = Field(16_384, gt=0)
    max_captions: int = Field(32, ge=1)
    max_json_bytes: int = Field(2**20, gt=0)
    max_json_depth: int = Field(64, ge=1, le=500)  # Python's own parser fails near 1,000
    max_json_values: int = Field(50_000, gt=0)
    max_key_characters: int = Field(1024, ge=64)
    max_tar_members: int = Field(1_000_000, gt=0)
    max_tar_bytes: int = Field(64 * 2**30, gt=0)
    max_regroup_bytes: int = Field(256 * 2**20, gt=0)
    max_parquet_bytes: int = Field(256 * 2**20, gt=0)
    max_decode_seconds: float = Field(60.0, gt=0.0)
    max_dead_share: PositiveShare = 0.9
    stats_mismatch: Literal["report", "skip"] = "report"

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> PoolSettings:
        if not (self.caption_members or self.caption_fields):
            raise ValueError("give `caption_members` or `caption_fields`, else no sample has a caption")
        named = [*self.image_members, *self.caption_members, *self.json_members]
        repeated = [name for name, count in Counter(named).items() if count > 1]
        if repeated:
            raise ValueError(f"{repeated[0]} is named twice among the members of a sample")
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ValueError("`keep_columns` names a field twice")
        return self


class StageSettings(Settings):
    """The settings of one stage: its own, and one section for each score and rule."""

    if TYPE_CHECKING:
        # The sections are derived from the catalogue, which a type checker cannot see.
        def __init__(self, **sections: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    @pydantic.model_validator(mode="after")
    def _sections_agree(self) -> StageSettings:
        for score in catalogue.scores():
            settings = getattr(self, score.name, None) if score.name in type(self).model_fields else None
            if settings is not None and score.check:
                score.check(settings, self)
        return self


class _CrossModality(StageSettings):
    """Stage 2: models that look at image and caption together.

    `precision` is the type of the models' weights. `auto` is the fastest type that keeps fp32's range on this hardware:
    bf16 where it is native, else fp32 on CPUs and fp16 on GPUs. docs/models.md says how much scores change.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"

    @pydantic.model_validator(mode="after")
    def _device_has_precision(self) -> _CrossModality:
        if self.device == "cpu" and self.precision == "fp16":
            raise ValueError("`precision: fp16` is for GPUs; a CPU takes fp32, bf16 or auto")
        return self


class TargetSettings(Settings):
    """The size of the training subset in copies: a count, a share of the pool, or the number of survivors."""

    samples: int | None = Field(None, ge=0)
    pool_share: PositiveShare | None = None
    survivors: Literal[True] | None = None

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> TargetSettings:
        if sum(value is not None for value in (self.samples, self.pool_share, self.survivors)) != 1:
            raise ValueError("give exactly one of `samples`, `pool_share` and `survivors: true`")
        return self


class ClustersSettings(Settings):
    """Spherical k-means on a hash-chosen sample of about `samples_per_cluster` times `count` candidates.

    With `coarse_count` above 1, training has two levels: that many clusters first, then each is split on its own.
    `centroids` names a .npy file of float32 (k, d) to use instead.
    """

    count: int = Field(1000, ge=1)
    coarse_count: int | None = Field(None, ge=1)
    samples_per_cluster: int = Field(256, ge=1)  # more change k-means little: faiss's own limit
    iterations: int = Field(20, ge=1)
    centroids: str | None = None

    @pydantic.model_validator(mode="after")
    def _coarse_is_fewer(self) -> ClustersSettings:
        if self.coarse_count is not None and self.coarse_count > self.count:
            raise ValueError("`coarse_count` must not exceed `count`")
        return self

    @property
    def first_level(self) -> int:
        """Clusters of the first level; 1 for training in one level. By default the square root of `count` from 256
        clusters on, which makes training in two levels cheapest."""
        if self.coarse_count is not None:
            return self.coarse_count
        return round(self.count**0.5) if self.count > 256 else 1


class CidsSettings(Settings):
    """Cluster-importance-based data selection. `tasks` names a .npz file of float32 (m, d) task centroids, as written
    by `pairsift centroids`, or `bundled:tasks`. `task_weights` are equal by default."""

    tasks: str
    task_weights: dict[str, Annotated[float, Field(ge=0.0)]] | None = None
    estimator: Literal["similarity", "assignment"] = "similarity"
    prior: Literal["pool", "uniform"] = "pool"
    temperature: float = Field(0.1, gt=0.0)


class QualityDuplicationSettings(Settings):
    """Weight within a cluster. It rises with the rank of the flipped-CLIP score from `w1` (worst) to `w2` (best)."""

    w1: float = Field(1.0, gt=0.0)
    w2: float = Field(2.0, gt=0.0)

    @pydantic.model_validator(mode="after")
    def _rising(self) -> QualityDuplicationSettings:
        if self.w2 < self.w1:
            raise ValueError("`w2` must not be below `w1`")
        return self


class DigitEnhancementSettings(Settings):
    """Samples with digit probability >= `min_digit_probability` get at least `floor_copies` expected copies."""

    min_digit_probability: Share = 0.5
    floor_copies: float = Field(2.0, gt=0.0)


class _DistributionAlignment(StageSettings):
    """Stage 3: how many copies of each survivor the training subset has."""

    target: TargetSettings
    max_copies: float = Field(10.0, ge=1.0)
    clusters: ClustersSettings = ClustersSettings()
    cids: CidsSettings | None = None
    quality_duplication: QualityDuplicationSettings | None = None
    digit_enhancement: DigitEnhancementSettings | None = None

    @pydantic.model_validator(mode="after")
    def _floor_below_cap(self) -> _DistributionAlignment:
        if self.digit_enhancement and self.digit_enhancement.floor_copies > self.max_copies:
            raise ValueError("`digit_enhancement.floor_copies` must not exceed `max_copies`")
        return self


class _SingleModality(StageSettings):
    """Stage 1: rules that look at the caption or the image alone."""


def _with_sections(name: str, base: type[StageSettings], stage: str) -> type[StageSettings]:
    """`base` with a section for each score and rule of the stage. Raises CatalogueError if a name is taken."""
    sections: dict[str, Any] = {}
    for score in scores_of(stage):
        if score.name in base.model_fields or hasattr(base, score.name):
            raise catalogue.CatalogueError(f"rule {score.name} of {score.provider}: the section's name is taken")
        sections[score.name] = (score.settings, ...) if score.required else (score.settings | None, None)
    made = pydantic.create_model(name, __base__=base, __doc__=base.__doc__, __module__=__name__, **sections)
    return cast(type[StageSettings], made)


if TYPE_CHECKING:

    class SingleModalitySettings(_SingleModality):
        """Stage 1, with the sections of its rules."""

        def __init__(self, **sections: Any) -> None: ...

    class CrossModalitySettings(_CrossModality):
        """Stage 2, with the sections of its scores and rules."""

        def __init__(self, **sections: Any) -> None: ...

    class DistributionAlignmentSettings(_DistributionAlignment):
        """Stage 3, with the sections of its rules."""

        def __init__(self, **sections: Any) -> None: ...
else:
    SingleModalitySettings = _with_sections("SingleModalitySettings", _SingleModality, SINGLE_MODALITY)
    CrossModalitySettings = _with_sections("CrossModalitySettings", _CrossModality, CROSS_MODALITY)
    DistributionAlignmentSettings = _with_sections(
        "DistributionAlignmentSettings", _DistributionAlignment, DISTRIBUTION_ALIGNMENT
    )


class Recipe(Settings):
    """Every setting of a run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    pool: PoolSettings = PoolSettings()
    rule_order: list[str] | None = None
    single_modality: SingleModalitySettings
    cross_modality: CrossModalitySettings
    distribution_alignment: DistributionAlignmentSettings

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.rule_order is not None and sorted(self.rule_order) != sorted(self.active_rules):
            raise ValueError(f"`rule_order` must name each rule that is on, once: {', '.join(self.active_rules)}")
        stage_of = {rule.name: rule.stage for stage in STAGES for rule in rules_of_stage(stage)}
        stages = [stage_of[name] for name in self.rule_order or ()]
        if stages != sorted(stages, key=STAGES.index):
            raise ValueError("`rule_order` must name the rules of an earlier stage before those of a later one")
        taken = set(self.pool.keep_columns) & {*catalogue.columns(), *catalogue.DECISION_COLUMNS}
        if taken:
            raise ValueError(f"`pool.keep_columns`: the decisions have a column {min(taken)} of their own")
        if self.distribution_alignment.digit_enhancement and not self.cross_modality.digit:
            raise ValueError("`distribution_alignment.digit_enhancement` needs the section `cross_modality.digit`")
        return self

    def settings_of(self, score: Score[SectionSettings]) -> SectionSettings | None:
        """The section of a score or rule; None if it is off."""
        return getattr(getattr(self, score.stage), score.name)

    def is_on(self, score: Score[Any]) -> bool:
        """Whether the recipe has the section of a score or rule."""
        return self.settings_of(score) is not None

    def with_settings(self, score: Score[SectionSettings], settings: SectionSettings) -> Recipe:
        """A copy with another section for a score or rule; it is not validated again."""
        stage = getattr(self, score.stage).model_copy(update={score.name: settings})
        return self.model_copy(update={score.stage: stage})

    def rules_of(self, stage: str) -> list[Rule[Any]]:
        """The rules of one stage that are on, in the recipe's order."""
        on = {rule.name: rule for rule in rules_of_stage(stage) if self.is_on(rule)}
        return [on[name] for name in self.rule_order or on if name in on]

    @property
    def active_rules(self) -> list[str]:
        """Names of the rules that are on, in the default order."""
        return [rule.name for stage in STAGES for rule in rules_of_stage(stage) if self.is_on(rule)]

    @property
    def sha256(self) -> str:
        """Hash of every setting, defaults included: the identity of the recipe."""
        return section_sha256(self)


def section_sha256(settings: pydantic.BaseModel) -> str:
    """Hash of a section of the recipe, defaults included."""
    return hashlib.sha256(json.dumps(settings.model_dump(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str) -> Recipe:
    """The recipe at `path` (local or `gs://`). Raises SettingsError with every fault at once."""
    return load_settings(path, Recipe)


def parse_recipe(content: Any, source: str) -> Recipe:
    """The recipe in `content`, the mapping read from YAML. Raises SettingsError with every fault at once."""
    return parse_settings(content, source, Recipe)


def model_files(recipe: Recipe) -> dict[str, str]:
    """The settings of the recipe that may name a file or folder, by their path in the recipe."""
    found = {}

    def collect(path: str, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, dict):
                collect(f"{path}{name}.", value)
            elif isinstance(value, str) and name in (*FILES, "model", "weights"):
                found[f"recipe: {path}{name}"] = value

    collect("", recipe.model_dump())
    return found


__all__ = [
    "CROSS_MODALITY", "DISTRIBUTION_ALIGNMENT", "SINGLE_MODALITY", "STAGES", "CidsSettings", "ClustersSettings",
    "CrossModalitySettings", "DigitEnhancementSettings", "DistributionAlignmentSettings", "PoolSettings",
    "QualityDuplicationSettings", "Recipe", "SettingsError", "SingleModalitySettings", "TargetSettings",
    "ThresholdSettings", "load_recipe", "model_files", "parse_recipe", "section_sha256",
]  # fmt: skip
