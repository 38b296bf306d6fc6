"""The three graphs: their labels, and that pixels never leave the fused stage that read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from pipeline import graphs
from pipeline.output_folder.layout import Layout
from tests.helpers import recipe
from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY, STAGES, Recipe
from transforms.core.records import Shard
from transforms.models import score

SHARDS = tuple(Shard(f"{n:05d}", f"/p/{n:05d}.tar", f"{n}") for n in range(3))
NOTHING: dict[str, Any] = {stage: {} for stage in STAGES}


def job(
    recipe_: Recipe | None = None, shards: tuple[Shard, ...] = SHARDS, output: str = "/out", **known: Any
) -> graphs.Job:
    return graphs.Job(recipe_ or recipe(), shards, Layout(output), NOTHING | known)


def graph(stage: str, job_: graphs.Job | None = None) -> beam.Pipeline:
    pipeline = beam.Pipeline(FnApiRunner())
    graphs.build(graphs.GRAPHS[stage], pipeline, job_ or job())
    return pipeline


def own_steps(node: Any) -> Iterator[str]:
    """Yield the labels of the steps that our code applies, without those inside Beam's own composites."""
    for part in node.parts:
        yield part.full_label
        if type(part.transform).__module__.startswith(("pipeline.", "transforms.")):
            yield from own_steps(part)


def labels(stage: str, job_: graphs.Job | None = None) -> list[str]:
    return list(own_steps(graph(stage, job_).transforms_stack[0]))


RECIPES = {
    "demo": recipe(),
    "keep_fraction": recipe(
        cross_modality__flipped_clip={"model": "bundled:clip", "keep_fraction": 0.3},
        cross_modality__image_text_matching={"model": "bundled:itm", "keep_fraction": 0.3},
    ),
    "least": recipe(
        single_modality={}, cross_modality={"flipped_clip": {"model": "bundled:clip", "min": 0.0}},
        distribution_alignment={"target": {"survivors": True}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_step_has_its_own_label(stage: str, name: str) -> None:
    found = labels(stage, job(RECIPES[name]))
    assert len(found) == len(set(found)) > 3
    unnamed = [label for label in found if re.search(r"lambda|\(|<|\[", label.rpartition("/")[2])]
    assert unnamed == []


@pytest.mark.parametrize("stage", STAGES)
def test_labels_do_not_change_from_run_to_run(stage: str) -> None:
    assert labels(stage) == labels(stage, job(recipe(seed=7), SHARDS[:1], "/elsewhere"))


def test_unlabelled_step_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlabelled(beam.PTransform):
        __module__ = "transforms.somewhere"

        def __init__(self, *settings: Any) -> None:
            super().__init__()

        def expand(self, batches: beam.PCollection) -> beam.PCollection:
            return batches | beam.Map(lambda batch: batch)

    monkeypatch.setattr(graphs, "Annotate", Unlabelled)
    assert any("lambda" in label for label in labels(SINGLE_MODALITY))


def test_rule_that_is_off_adds_no_step() -> None:
    names = ("Caption length", "Language", "PoS pattern", "Face area", "Caption frequency", "Near duplicate")
    assert set(names) <= set(labels(SINGLE_MODALITY))
    assert not [label for label in labels(SINGLE_MODALITY, job(RECIPES["least"])) if label.startswith(names)]
    assert {"Score shards/Image-text matching", "Score shards/Digit"} <= set(labels(CROSS_MODALITY))
    assert not [
        label
        for label in labels(CROSS_MODALITY, job(RECIPES["least"]))
        if label.startswith(("Score shards/Image-text matching", "Score shards/Digit"))
    ]


# Fusion -----------------------------------------------------------------------------------------------------------


def fused_stages(pipeline: beam.Pipeline) -> list[set[str]]:
    """The steps of each executable stage, as the local runner's optimiser joins them."""
    _, stages = FnApiRunner().create_stages(pipeline.to_runner_api())
    return [{transform.unique_name for transform in stage.transforms} for stage in stages]


def in_one_stage(pipeline: beam.Pipeline, steps: list[str]) -> bool:
    """Return whether steps (given by the start of their labels) are fused. Raises if one does not exist."""
    stages = fused_stages(pipeline)
    places = []
    for step in steps:
        found = [n for n, stage in enumerate(stages) if any(name.startswith(step) for name in stage)]
        assert found, step
        places += found
    return len(set(places)) == 1


PER_SHARD = {
    SINGLE_MODALITY: [
        "Read shards/Read and decode", "Image features/", "Caption length/", "Language/", "PoS pattern/", "Face area/",
        "Write features",
    ],
    CROSS_MODALITY: [
        "Score shards/Read kept/Read and decode", "Score shards/Flipped CLIP/", "Score shards/Image-text matching/",
        "Score shards/Digit/", "Score shards/Write scores",
    ],
}  # fmt: skip


@pytest.mark.parametrize("stage", PER_SHARD)
def test_read_decode_score_and_write_are_one_fused_stage(stage: str) -> None:
    assert in_one_stage(graph(stage), PER_SHARD[stage])


@pytest.mark.parametrize(
    ("stage", "module", "step"),
    [(SINGLE_MODALITY, graphs, "Annotate"), (CROSS_MODALITY, score, "ScoreByModel")],
)
def test_shuffle_in_between_is_detected(
    stage: str, module: ModuleType, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(module, step)

    class Torn(beam.PTransform):
        def __init__(self, *settings: Any) -> None:
            super().__init__()
            self._settings = settings

        def expand(self, batches: beam.PCollection) -> beam.PCollection:
            return batches | "Tear" >> beam.Reshuffle() | "Whole" >> plain(*self._settings)

    monkeypatch.setattr(module, step, Torn)
    assert not in_one_stage(graph(stage), PER_SHARD[stage])


def test_hint_on_one_model_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another environment breaks fusion, so a hint must be on the complete stage."""
    plain = score.ScoreByModel
    hint = "type:nvidia-tesla-t4;count:1;install-nvidia-driver"

    def hinted(one: Any, models: Any, calls: int) -> Any:
        scored = plain(one, models, calls)
        return scored.with_resource_hints(accelerator=hint) if one.name == "digit" else scored

    monkeypatch.setattr(score, "ScoreByModel", hinted)
    assert not in_one_stage(graph(CROSS_MODALITY), PER_SHARD[CROSS_MODALITY])


@pytest.mark.parametrize("stage", PER_SHARD)
def test_the_shards_are_spread_before_they_are_read(stage: str) -> None:
    assert not in_one_stage(graph(stage), ["Shards/", PER_SHARD[stage][0]])


def test_the_pool_s_rows_are_read_after_the_tables_are_written() -> None:
    assert not in_one_stage(graph(SINGLE_MODALITY), ["Write features", "Read features/"])


class FakeCache:
    """Caches of the three stages in one object, with the answers that a test sets."""

    def __init__(self, missing: int | None) -> None:
        self.missing = missing

    def is_complete(self, shard: Shard) -> bool:
        return True

    def has_scores(self, shard: Shard) -> bool:
        return self.missing is not None

    def count_wanted(self, shard: Shard) -> int:
        return self.missing or 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (None, "shard 00000: no table of scores yet; run stage cross_modality first"),
        (2, "shard 00000: 2 samples lack a score that this recipe needs; run stage cross_modality first"),
        (0, None),
    ],
)
def test_stage_3_requires_all_scores(missing: int | None, message: str | None) -> None:
    cache: Any = FakeCache(missing)
    if message is None:
        assert graphs._with_scores(SHARDS[0], cache, cache, cache) == SHARDS[0]
        return
    with pytest.raises(graphs.Incomplete, match=re.escape(message)):
        graphs._with_scores(SHARDS[0], cache, cache, cache)
