"""The recipe: every setting of a run, typed and validated where it is read.

A section that is absent switches its rule off; `{}` takes its defaults. Defaults are the paper's (arXiv 2309.15954)
where it states a figure, DataComp's where the rule is DataComp's, and our choice elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from transforms.core.settings import Settings, load_settings, parse_settings

SINGLE_MODALITY = "single_modality"
CROSS_MODALITY = "cross_modality"
DISTRIBUTION_ALIGNMENT = "distribution_alignment"
STAGES = (SINGLE_MODALITY, CROSS_MODALITY, DISTRIBUTION_ALIGNMENT)

FILES = ("yunet_model", "tasks", "centroids")
"""Settings that name a file. `model` and `weights` may name one, too, else what a hub or open_clip has by that name."""

PENN_TAGS = frozenset(
    "# $ '' ( ) , . : CC CD DT EX FW IN JJ JJR JJS LS MD NN NNP NNPS NNS PDT POS PRP PRP$ RB RBR "
    "RBS RP SYM TO UH VB VBD VBG VBN VBP VBZ WDT WP WP$ WRB ``".split()
)
COMMON_NOUNS = ("NN", "NNS")
NAMES_NUMBERS_SYMBOLS = (
    "NNP", "NNPS", "CD", "LS", "SYM", "#", "$", "''", "(", ")", ",", ".", ":", "``",
)  # fmt: skip


def _penn_tag(tag: str) -> str:
    if tag not in PENN_TAGS:
        raise ValueError(f"no Penn tag; allowed: {' '.join(sorted(PENN_TAGS))}")
    return tag


def _language_label(label: str) -> str:
    if not re.fullmatch(r"[a-z]{2,3}", label):
        raise ValueError("no label of lid.176: two or three small letters, for example en")
    return label


PennTag = Annotated[str, pydantic.AfterValidator(_penn_tag)]
LanguageLabel = Annotated[str, pydantic.AfterValidator(_language_label)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]


class PoolBounds(Settings):
    """What is read of a pool at most; whatever exceeds a bound becomes a dead letter."""

    max_image_bytes: int = Field(20 * 2**20, gt=0)
    max_image_pixels: int = Field(64_000_000, gt=0, le=178_000_000)  # Pillow itself refuses more
    max_caption_bytes: int = Field(16_384, gt=0)
    max_json_bytes: int = Field(2**20, gt=0)
    max_json_depth: int = Field(64, ge=1, le=500)  # Python's own parser ends near 1,000
    max_key_characters: int = Field(1024, ge=64)
    max_tar_members: int = Field(1_000_000, gt=0)
    max_tar_bytes: int = Field(64 * 2**30, gt=0)
    max_decode_seconds: float = Field(60.0, gt=0.0)


# Stage 1 ---------------------------------------------------------------------------------------------------------


class NearDuplicate(Settings):
    """Near-duplicate images: perceptual hashes within `max_hamming` of 64 bits."""

    max_hamming: int = Field(3, ge=0, le=7)


class CaptionLength(Settings):
    """Shortest caption kept (DataComp's basic filter: more than 2 words and more than 5 characters)."""

    only_decide = frozenset({"min_words", "min_characters"})

    min_words: int = Field(3, ge=0)
    min_characters: int = Field(6, ge=0)


class Language(Settings):
    """Languages kept, as fastText lid.176 labels; `model` is a path to lid.176.bin, else the bundled lid.176.ftz."""

    only_decide = frozenset({"allowed"})

    allowed: list[LanguageLabel] = Field(["en"], min_length=1)
    model: str | None = None


class PosPattern(Settings):
    """Part-of-speech patterns, in Penn tags: a caption needs one tag of `any_of`, and goes where all its tags lie in
    `only_of`. The first `max_words` tokens are tagged. `tagger` is NLTK's own, the bundled one, or `auto`: NLTK's own
    where the machine has it."""

    only_decide = frozenset({"any_of", "only_of"})

    any_of: list[PennTag] = Field(list(COMMON_NOUNS), min_length=1)
    only_of: list[PennTag] = Field(list(NAMES_NUMBERS_SYMBOLS))
    max_words: int = Field(64, ge=1, le=1024)
    tagger: Literal["auto", "nltk", "bundled"] = "auto"


class CaptionFrequency(Settings):
    """A normalised caption standing with more than max(`min_images`, `max_pool_share` of the pool) distinct images
    is high-frequency text."""

    min_images: int = Field(10, ge=1)
    max_pool_share: Share = 1e-6


class AspectRatio(Settings):
    """Longest side over shortest side, at most."""

    max_ratio: float = Field(3.0, ge=1.0)


class MinSide(Settings):
    """Shortest side, at least."""

    min_px: int = Field(200, ge=1)


class FaceArea(Settings):
    """Union of the face boxes over the image area, at most. Boxes come from the pool's `face_bboxes` where it has
    them, else from YuNet where `yunet_model` names its ONNX file, else from the bundled cascade."""

    only_decide = frozenset({"max_share"})

    max_share: Share = 0.4
    yunet_model: str | None = None


class SingleModality(Settings):
    """Stage 1: rules that look at the caption or the image alone."""

    near_duplicate: NearDuplicate | None = None
    caption_length: CaptionLength | None = None
    language: Language | None = None
    pos_pattern: PosPattern | None = None
    caption_frequency: CaptionFrequency | None = None
    aspect_ratio: AspectRatio | None = None
    min_side: MinSide | None = None
    face_area: FaceArea | None = None


# Stage 2 ---------------------------------------------------------------------------------------------------------


class Threshold(Settings):
    """A score threshold: keep `>= min`, or the best `keep_fraction` of what reaches the rule (the threshold is then
    the score at index int(n * keep_fraction) in descending order, as DataComp has it)."""

    only_decide = frozenset({"min", "keep_fraction"})

    min: float | None = None
    keep_fraction: PositiveShare | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_them(self) -> Threshold:
        if (self.min is None) == (self.keep_fraction is None):
            raise ValueError("give exactly one of `min` and `keep_fraction`")
        return self


class DigitRescue(Settings):
    """A sample with digit probability >= `min_digit_probability` needs only `min_cosine` (ours; off by default)."""

    min_digit_probability: Share = 0.5
    min_cosine: Cosine


class FlippedClip(Threshold):
    """Cosine of caption and horizontally flipped image. `model` is an open_clip architecture (with `weights` its
    tag or file), a folder in open_clip's hub form, `hf-hub:` and a hub name (pin its `revision`), or `bundled:clip`."""

    only_decide = Threshold.only_decide | {"digit_rescue"}

    min: Cosine | None = None
    model: str
    weights: str | None = None
    quick_gelu: bool | None = None
    revision: str | None = None
    batch_size: int = Field(64, ge=1, le=4096)
    score_unflipped: bool = False
    digit_rescue: DigitRescue | None = None

    @pydantic.model_validator(mode="after")
    def _nothing_is_ignored(self) -> FlippedClip:
        if self.revision and not self.model.startswith("hf-hub:"):
            raise ValueError("`revision` belongs to a `model` that starts with hf-hub:; a tag has none")
        if self.quick_gelu is not None and self.weights is None:
            raise ValueError("`quick_gelu` belongs to `weights`; a folder and a hub's model say it themselves")
        return self

    @pydantic.model_validator(mode="after")
    def _rescue_is_lower(self) -> FlippedClip:
        if self.digit_rescue:
            if self.min is None:
                raise ValueError("`digit_rescue` needs `min`, not `keep_fraction`")
            if self.digit_rescue.min_cosine > self.min:
                raise ValueError("`digit_rescue.min_cosine` must not exceed `min`")
        return self

    @property
    def cascade_min_cosine(self) -> float | None:
        """Below this no later model needs to look; None where that is only known once the pool is scored."""
        return self.digit_rescue.min_cosine if self.digit_rescue else self.min


class ImageTextMatching(Threshold):
    """BLIP's probability that caption and image match. `model` is a hub name (pin its `revision`), a folder, or
    `bundled:itm`."""

    min: Share | None = None
    model: str
    revision: str | None = None
    batch_size: int = Field(16, ge=1, le=4096)
    max_tokens: int = Field(64, ge=8, le=512)


class ClipPrompts(Settings):
    """Which pictures are worth the digit question (ours; off by default): those for which CLIP gives the `positive`
    prompts a share of at least `min_probability` in the softmax over all prompts."""

    only_decide = frozenset({"min_probability"})

    positive: list[str] = Field(["a picture with digits or numbers written in it"], min_length=1)
    negative: list[str] = Field(["a picture without any text", "a picture with words but no numbers"], min_length=1)
    min_probability: Share


class Digit(Settings):
    """The question BLIP-2 is asked; the score is p(yes) / (p(yes) + p(no)) of the first answer token, averaged over
    `prompts`. `model` is a hub name (pin its `revision`), a folder, or `bundled:digit`."""

    only_decide = frozenset({"clip_prompts"})  # they choose who is asked; CLIP's own score of them is apart

    model: str
    revision: str | None = None
    prompts: list[str] = Field(
        ["Question: is there any digit or number written in the image? Answer:"], min_length=1
    )
    clip_prompts: ClipPrompts | None = None
    batch_size: int = Field(16, ge=1, le=4096)


class CrossModality(Settings):
    """Stage 2: models that look at image and caption together. `precision` is what their weights are kept in; `auto`
    is the fastest that keeps fp32's range on the hardware at hand (bf16 where it is native, else fp32 on CPUs and fp16
    on GPUs), and moves scores by as much as docs/models.md says."""

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    flipped_clip: FlippedClip
    image_text_matching: ImageTextMatching | None = None
    digit: Digit | None = None

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> CrossModality:
        if self.device == "cpu" and self.precision == "fp16":
            raise ValueError("`precision: fp16` is for GPUs; a CPU takes fp32, bf16 or auto")
        if self.flipped_clip.digit_rescue and not self.digit:
            raise ValueError("`flipped_clip.digit_rescue` needs the section `digit`")
        return self


# Stage 3 ---------------------------------------------------------------------------------------------------------


class Target(Settings):
    """The size of the training subset in copies: a count, a share of the pool, or as many as survive."""

    samples: int | None = Field(None, ge=0)
    pool_share: PositiveShare | None = None
    survivors: Literal[True] | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_them(self) -> Target:
        if sum(value is not None for value in (self.samples, self.pool_share, self.survivors)) != 1:
            raise ValueError("give exactly one of `samples`, `pool_share` and `survivors: true`")
        return self


class Clusters(Settings):
    """Spherical k-means on a hash-chosen sample of about `samples_per_cluster` times `count` candidates. Two levels
    where `coarse_count` is more than 1: that many clusters, then each of them split on its own. `centroids` names a
    .npy of float32 (k, d) to use instead."""

    count: int = Field(1000, ge=1)
    coarse_count: int | None = Field(None, ge=1)
    samples_per_cluster: int = Field(256, ge=1)  # more change k-means little: faiss' own bound
    iterations: int = Field(20, ge=1)
    centroids: str | None = None

    @pydantic.model_validator(mode="after")
    def _coarse_is_fewer(self) -> Clusters:
        if self.coarse_count is not None and self.coarse_count > self.count:
            raise ValueError("`coarse_count` must not exceed `count`")
        return self

    @property
    def first_level(self) -> int:
        """Clusters of the first level, 1 where there is but one level: as given, else the square root of `count` from
        256 clusters on, which makes training as cheap as two levels can."""
        if self.coarse_count is not None:
            return self.coarse_count
        return round(self.count**0.5) if self.count > 256 else 1


class SemanticDedup(Settings):
    """Within a cluster x goes when a better-ranked y has cosine > 1 - `epsilon`. `after_duplication` counts copies
    over all samples first and drops after (the order the paper names; the duplicates' mass is then lost)."""

    epsilon: float = Field(0.05, gt=0.0, lt=1.0)
    after_duplication: bool = False


class Cids(Settings):
    """Cluster-importance-based data selection. `tasks` names a .npz of float32 (m, d) task centroids, as
    `pairsift centroids` writes it, or `bundled:tasks`; `task_weights` default to equal ones."""

    tasks: str
    task_weights: dict[str, Annotated[float, Field(ge=0.0)]] | None = None
    estimator: Literal["similarity", "assignment"] = "similarity"
    prior: Literal["pool", "uniform"] = "pool"
    temperature: float = Field(0.1, gt=0.0)


class QualityDuplication(Settings):
    """Weight within a cluster, rising with the rank of the flipped-CLIP score from `w1` (worst) to `w2` (best)."""

    w1: float = Field(1.0, gt=0.0)
    w2: float = Field(2.0, gt=0.0)

    @pydantic.model_validator(mode="after")
    def _rising(self) -> QualityDuplication:
        if self.w2 < self.w1:
            raise ValueError("`w2` must not be below `w1`")
        return self


class DigitEnhancement(Settings):
    """Samples with digit probability >= `min_digit_probability` get at least `floor_copies` expected copies."""

    min_digit_probability: Share = 0.5
    floor_copies: float = Field(2.0, gt=0.0)


class DistributionAlignment(Settings):
    """Stage 3: how many copies of each survivor the training subset holds."""

    target: Target
    max_copies: float = Field(10.0, ge=1.0)
    clusters: Clusters = Clusters()
    semantic_dedup: SemanticDedup | None = None
    cids: Cids | None = None
    quality_duplication: QualityDuplication | None = None
    digit_enhancement: DigitEnhancement | None = None

    @pydantic.model_validator(mode="after")
    def _floor_below_cap(self) -> DistributionAlignment:
        if self.digit_enhancement and self.digit_enhancement.floor_copies > self.max_copies:
            raise ValueError("`digit_enhancement.floor_copies` must not exceed `max_copies`")
        return self


RULES = {
    SINGLE_MODALITY: tuple(SingleModality.model_fields),
    CROSS_MODALITY: ("flipped_clip", "image_text_matching"),
    DISTRIBUTION_ALIGNMENT: ("semantic_dedup",),
}


class Recipe(Settings):
    """Every setting of a run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    pool: PoolBounds = PoolBounds()
    rule_order: list[str] | None = None
    single_modality: SingleModality
    cross_modality: CrossModality
    distribution_alignment: DistributionAlignment

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.rule_order is not None and sorted(self.rule_order) != sorted(self.active_rules):
            raise ValueError(f"`rule_order` must name each rule that is on, once: {', '.join(self.active_rules)}")
        stages = [next(stage for stage, names in RULES.items() if rule in names) for rule in self.rule_order or ()]
        if stages != sorted(stages, key=STAGES.index):
            raise ValueError("`rule_order` must name the rules of an earlier stage before those of a later one")
        if self.distribution_alignment.digit_enhancement and not self.cross_modality.digit:
            raise ValueError("`distribution_alignment.digit_enhancement` needs the section `cross_modality.digit`")
        return self

    @property
    def active_rules(self) -> list[str]:
        """Names of the rules that are on, in DESIGN's order."""
        return [
            name for stage, names in RULES.items() for name in names if getattr(getattr(self, stage), name) is not None
        ]

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
    """The recipe in `content`, the mapping that YAML gave. Raises SettingsError with every fault at once."""
    return parse_settings(content, source, Recipe)


def model_files(recipe: Recipe) -> dict[str, str]:
    """What the recipe names that may be a file or folder, by its place in the recipe."""
    found = {}

    def look(place: str, settings: Any) -> None:
        for name, value in settings.items():
            if isinstance(value, dict):
                look(f"{place}{name}.", value)
            elif isinstance(value, str) and name in (*FILES, "model", "weights"):
                found[f"recipe: {place}{name}"] = value

    look("", recipe.model_dump())
    return found
