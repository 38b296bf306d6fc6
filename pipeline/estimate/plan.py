"""The question that `pairsift estimate` answers, and the plan that answers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pipeline.dataflow.settings import Accelerator, DataflowSettings, Workers
from pipeline.estimate.figures import Kind, Known
from transforms.core.errors import UsageError
from transforms.core.recipe import STAGES, Recipe

COMPUTED: Literal["computed"] = "computed"
EXTRAPOLATED: Literal["extrapolated"] = "extrapolated"
FigureKind = Kind | Literal["computed", "extrapolated"]

LEFT_OUT = (
    "starting machines and pulling the image (minutes per job); retries; side inputs; shuffles of a few bytes per "
    "shard, tile or job; operations on objects; network traffic to other regions; storage of the pool itself; taxes, "
    "discounts and free tiers, including Dataflow's volume adjustments of shuffled data",
    "stage 2 reads the pool's tars a second time; whether reading keeps up with the GPU was not measured",
)


class CannotEstimate(UsageError):
    """A figure that the plan needs is missing or unusable."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of the plan. `source` is where it comes from; for a computed or extrapolated figure it is the formula,
    and `uses` names the figures in the formula."""

    value: float
    unit: str
    kind: FigureKind
    source: str
    uses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Machines:
    """The parts of the launch settings that the plan depends on. `source` is the path of their file."""

    source: str
    region: str
    workers: Mapping[str, Workers]
    accelerator: Accelerator | None

    @classmethod
    def of(cls, settings: DataflowSettings, source: str) -> Machines:
        """The machines in `settings`, which were read from `source`."""
        return cls(source, settings.region, {stage: getattr(settings, stage) for stage in STAGES}, settings.accelerator)


@dataclasses.dataclass(frozen=True)
class Question:
    """The run to estimate. `known` has all input figures by name. `funnel` is the path and content of an earlier run's
    funnel.json. `like` maps models of the recipe to models in `known`."""

    recipe: Recipe
    samples: int
    machines: Machines
    known: Mapping[str, Known]
    samples_per_shard: int = 10_000
    bytes_per_sample: float | None = None
    utilisation: float | None = None
    funnel: tuple[str, Mapping[str, Any]] | None = None
    like: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept_versions: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures by name (`STAGE/WHAT`, `total/WHAT`, or as in figures.yaml), the machines of each stage, and notes."""

    figures: dict[str, Figure]
    machines: dict[str, str]
    warnings: tuple[str, ...]
    left_out: tuple[str, ...] = LEFT_OUT

    def value(self, name: str) -> float:
        """The value of a figure."""
        return self.figures[name].value

    @property
    def content(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "figures": {name: dataclasses.asdict(figure) for name, figure in self.figures.items()},
            "machines": self.machines,
            "warnings": list(self.warnings),
            "left_out": list(self.left_out),
        }

    def behind(self, name: str) -> Iterator[str]:
        """The figure itself and all figures that it is computed from, depth first, each once."""
        seen, waiting = set(), [name]
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                yield one
                waiting += reversed(self.figures[one].uses)

    def roots(self, name: str) -> Iterator[str]:
        """The input figures that a figure is computed from, each once."""
        return (one for one in self.behind(name) if not self.figures[one].uses)

    def is_extrapolated(self, name: str) -> bool:
        """Whether the figure depends on an extrapolated one."""
        return any(self.figures[one].kind == EXTRAPOLATED for one in self.behind(name))
