"""The catalogue: every score and rule that this installation has, and what each of them declares.

A rule is declared once, as one object in its own file. Recipe sections, table schemas, reuse, metrics, the graphs, the
order of the rules, the funnel, and the docs are derived from the declarations. The declarations are found through the
entry point group `pairsift.rules`. The built-in rules use the same entry points as rules of other packages.

Neither this module nor a file with declarations imports Beam or Torch, so that a recipe is validated in an instant.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from transforms.core.settings import Settings, ThresholdSettings

if TYPE_CHECKING:
    from transforms.core.records import Annotation, Sample

SINGLE_MODALITY = "single_modality"
CROSS_MODALITY = "cross_modality"
DISTRIBUTION_ALIGNMENT = "distribution_alignment"
STAGES = (SINGLE_MODALITY, CROSS_MODALITY, DISTRIBUTION_ALIGNMENT)

ENTRY_POINT_GROUP = "pairsift.rules"
PACKAGE = "pairsift"

ColumnType = Literal["string", "int32", "int64", "float32", "float64", "binary"]
"""Types of columns, by pyarrow's names. Binary columns are kept in annotations only, not in decisions."""

IDENTITY_COLUMNS: dict[str, ColumnType] = {"uid": "string", "shard": "string", "key": "string", "caption": "string"}
IMAGE_COLUMNS: dict[str, ColumnType] = {
    "width_px": "int32",
    "height_px": "int32",
    "original_width_px": "int32",
    "original_height_px": "int32",
    "image_sha256": "string",
    "perceptual_hash": "string",
    "image_thumbnail": "binary",
}
SOURCE_COLUMNS: dict[str, ColumnType] = {"kept_fields": "string", "pool_notes": "string"}
"""Of stage 1's tables only. `kept_fields`: the fields of `pool.keep_columns` as a JSON object. `pool_notes`: what the
pool says of the sample and pairsift does not use (`transforms.core.records`), separated by spaces."""

POOL_COLUMNS: dict[str, ColumnType] = {"pool_samples": "int64"}
ALIGNMENT_COLUMNS: dict[str, ColumnType] = {"cluster": "int32"}
DECISION_COLUMNS: dict[str, ColumnType] = {"dropped_by": "string", "expected_copies": "float64", "copies": "int32"}

_OWN_COLUMNS = {**IDENTITY_COLUMNS, **IMAGE_COLUMNS, **SOURCE_COLUMNS, **POOL_COLUMNS, **ALIGNMENT_COLUMNS}
_NAME = re.compile(r"[a-z][a-z0-9_]*")

AnySettings = TypeVar("AnySettings", bound=Settings)


class CatalogueError(RuntimeError):
    """A declaration that cannot be used: which one, whose it is, and what is wrong with it."""


class Annotator(Protocol):
    """Computes the columns of one score, sample by sample, on a worker.

    `load` is called once, before the first sample. An exception from `columns` turns that sample into a dead letter.
    """

    def load(self) -> None:
        """Load what `columns` needs, for example a model."""

    def columns(self, sample: Sample) -> Mapping[str, Any]:
        """The values of the declared columns, by name."""


class Preparation(Protocol):
    """Makes a model's input from a decoded sample. Loads processors and tokenizers, but no weights."""

    def prepare(self, sample: Sample) -> Any:
        """The model's input: small, and of one size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Generic[AnySettings]):
    """A computation that adds columns to every sample of a stage. It drops nothing; see `Rule`.

    name: of the score, and of its section in the recipe.
    stage: one of `STAGES`.
    settings: the class of its section.
    summary: one phrase for the docs.
    source: where the rule and its defaults come from: "paper", "DataComp", or "ours", with details.
    columns: the columns that it adds, with their types.
    fields: the fields of the pool's json that its annotator reads. A sample's metadata has these, and those that the
        recipe names.
    value: the column that holds the score itself.
    order: position among the scores of its stage, which is also the default order of the rules. Ties end at the name.
    title: the label of its step in the graph; by default derived from the name.
    required: whether a recipe must have the section.
    annotator: makes what computes the columns from the settings.
    handler: makes a RunInference handler from the stage's section of the recipe. Stage 2 only.
    preparation: makes the `Preparation` of the handler's inputs from the settings.
    identity: what the columns depend on besides the settings, such as the hash of a model's file. A change of it makes
        kept columns stale. It is part of the manifest. Raises OSError, ValueError, or LookupError for missing files.
    loads_model: whether `annotator` loads a model, which is counted and timed.
    thread_safe: whether several threads may call the annotator's `columns` at once, which is faster where it releases
        the GIL for most of its time. A model of OpenCV is not thread-safe.
    check: raises ValueError if the settings contradict other sections of the same stage.
    """

    name: str
    stage: str
    settings: type[AnySettings]
    summary: str
    source: str
    columns: Mapping[str, ColumnType] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    value: str | None = None
    order: int = 1000
    title: str = ""
    required: bool = False
    annotator: Callable[[AnySettings], Annotator] | None = None
    handler: Callable[[Any], Any] | None = None
    preparation: Callable[[AnySettings], Preparation] | None = None
    identity: Callable[[AnySettings], Mapping[str, Any]] | None = None
    loads_model: bool = False
    thread_safe: bool = False
    check: Callable[[AnySettings, Any], None] | None = None
    provider: str = ""
    """The distribution that declares it, with its version. Filled in when the catalogue is loaded."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise CatalogueError(f"rule {self.name!r}: the name must be lower-case letters, digits and underscores")
        if self.stage not in STAGES:
            raise self._fault(f"stage is {self.stage!r}; allowed: {', '.join(STAGES)}")
        if not (isinstance(self.settings, type) and issubclass(self.settings, Settings)):
            raise self._fault("settings must be a subclass of Settings")
        taken = _OWN_COLUMNS.keys() & self.columns.keys()
        if taken:
            raise self._fault(f"column {min(taken)} is pairsift's own; choose another name")
        unfit = [name for name in self.columns if not _NAME.fullmatch(name)]
        if unfit:
            raise self._fault(f"column {unfit[0]!r}: use lower-case letters, digits and underscores")
        if self.value is not None and self.value not in self.columns:
            raise self._fault(f"value is {self.value!r}, which is none of its columns")
        if self.annotator and self.stage == DISTRIBUTION_ALIGNMENT:
            raise self._fault("an annotator runs in stages 1 and 2 only")
        if (self.handler or self.preparation) and self.stage != CROSS_MODALITY:
            raise self._fault("a model handler runs in stage 2 only")
        if issubclass(self.settings, ThresholdSettings) and (self.stage != CROSS_MODALITY or self.value is None):
            raise self._fault("`keep_fraction` needs a rule of stage 2 with a `value` column")

    @property
    def label(self) -> str:
        """The label of its step in the graph."""
        return self.title or self.name.replace("_", " ").capitalize()

    @property
    def is_built_in(self) -> bool:
        """Whether pairsift itself declares it."""
        return self.provider.partition(" ")[0] == PACKAGE

    def identity_of(self, settings: AnySettings) -> dict[str, Any]:
        """What stored columns depend on besides `settings`, with package and version if the score is not built in."""
        found = dict(self.identity(settings)) if self.identity else {}
        return found if self.is_built_in else {**found, "package": self.provider}

    def _fault(self, message: str) -> CatalogueError:
        return CatalogueError(f"rule {self.name}: {message}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(Score[AnySettings]):
    """A score with a predicate: it keeps a sample or drops it.

    keeps: the predicate, a pure function of an annotation and the settings. Where the settings are
        `ThresholdSettings`, `settings.min` is the threshold in force, also if the recipe gives a `keep_fraction`.
    threshold: the setting that `value` is compared with, and
    keeps_if: which way it points.
    pool_wide: whether its columns are computed over the whole pool. Built-in rules only.
    after_verdicts: whether its columns depend on the verdicts of the other rules of its stage.
    """

    keeps: Callable[[Annotation, AnySettings], bool]
    threshold: str | None = None
    keeps_if: Literal["at_least", "at_most", None] = None
    pool_wide: bool = False
    after_verdicts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.keeps):
            raise self._fault("`keeps` must be a function of an annotation and the settings")
        if self.threshold is not None and self.threshold not in self.settings.model_fields:
            raise self._fault(f"threshold is {self.threshold!r}, which is not a setting of {self.settings.__name__}")
        if (self.threshold is None) != (self.keeps_if is None):
            raise self._fault("give both `threshold` and `keeps_if`, or neither")


def load(entry_points: Iterable[importlib.metadata.EntryPoint]) -> tuple[Score[Any], ...]:
    """The scores and rules that `entry_points` name, by stage, order, and name.

    Raises CatalogueError if one cannot be imported, is not a `Score`, or takes the name or a column of another.
    """
    found = sorted(map(_load, entry_points), key=lambda s: (STAGES.index(s.stage), s.order, s.name))
    owner_of: dict[str, Score[Any]] = {}
    for score in found:
        for thing in (f"name {score.name}", *(f"column {column}" for column in score.columns)):
            other = owner_of.setdefault(thing, score)
            if other is not score:
                raise CatalogueError(
                    f"rule {score.name} of {score.provider}: the {thing} is taken by rule {other.name} of "
                    f"{other.provider}; uninstall one of the two packages"
                )
    return tuple(found)


def _load(entry_point: importlib.metadata.EntryPoint) -> Score[Any]:
    provider = _provider(entry_point.dist)
    where = f"entry point {entry_point.name} = {entry_point.value} of {provider}"
    try:
        score = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise CatalogueError(f"{where}: cannot be imported ({error}); reinstall or uninstall that package") from error
    if not isinstance(score, Score):
        raise CatalogueError(f"{where}: is {type(score).__name__}; it must name a Score or a Rule")
    return dataclasses.replace(score, provider=provider)


@functools.cache  # each access to a name or a version parses the distribution's metadata again
def _provider(distribution: importlib.metadata.Distribution | None) -> str:
    return f"{distribution.name} {distribution.version}" if distribution else "unknown"


@functools.cache
def scores() -> tuple[Score[Any], ...]:
    """All scores and rules that are installed, by stage, order, and name. Raises CatalogueError."""
    found = load(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
    if not any(score.is_built_in for score in found):
        raise CatalogueError(f"{PACKAGE}'s own rules are not installed; install the package (pip install --editable .)")
    return found


def scores_of(stage: str) -> tuple[Score[Any], ...]:
    """The scores and rules of one stage."""
    return tuple(score for score in scores() if score.stage == stage)


def rules_of_stage(stage: str) -> tuple[Rule[Any], ...]:
    """The rules of one stage in the default order."""
    return tuple(score for score in scores_of(stage) if isinstance(score, Rule))


def per_sample_scores() -> tuple[Score[Any], ...]:
    """The scores of stage 1 that are computed sample by sample."""
    return tuple(s for s in scores_of(SINGLE_MODALITY) if s.annotator)


def pool_wide_rules() -> tuple[Rule[Any], ...]:
    """The rules of stage 1 whose columns are computed over the whole pool, in the order of computation."""
    found = [rule for rule in rules_of_stage(SINGLE_MODALITY) if rule.pool_wide]
    return tuple(sorted(found, key=lambda rule: rule.after_verdicts))


def model_scores() -> tuple[Score[Any], ...]:
    """The scores of stage 2 that a model handler computes, in the order in which the models run."""
    return tuple(score for score in scores_of(CROSS_MODALITY) if score.handler)


@functools.cache
def metadata_fields() -> frozenset[str]:
    """The fields of the pool's json that an installed score reads."""
    return frozenset(field for score in scores() for field in score.fields)


@functools.cache
def columns() -> dict[str, ColumnType]:
    """All columns that an annotation can have, with their types."""
    found = dict(_OWN_COLUMNS)
    for score in scores():
        found.update(score.columns)
    return found
