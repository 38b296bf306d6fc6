"""A model that runs out of GPU memory: its shard is scored again with half the batch shape, as the table records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
import torch
from apache_beam.testing.util import assert_that, equal_to

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.sinks.shard_tables import WriteShardTable
from pipeline.sources.shards import ReadShards
from tests.helpers import BOUNDS, sample_members, write_pool
from tests.pipeline.sources.test_shards import FakeCache
from tests.transforms.models.model_batches import make_batch, make_sample, scores
from tests.transforms.models.tiny_models import PROMPT
from transforms.core import recipe
from transforms.core.recipe import CROSS_MODALITY
from transforms.core.records import Sample, Shard
from transforms.cross_modality.digit import DIGIT, DigitSettings
from transforms.cross_modality.flipped_clip import FLIPPED_CLIP, FlippedClipSettings
from transforms.cross_modality.image_text_matching import IMAGE_TEXT_MATCHING, ImageTextMatchingSettings
from transforms.cross_modality.join_wanted import JoinWanted
from transforms.models.blip import LoadedBlip
from transforms.models.clip import ClipHandler, LoadedClip
from transforms.models.handler import prepared_or_error
from transforms.models.prepare import load_prepare
from transforms.models.score import ScoreByModel


@pytest.fixture
def models(clip_folder: Path, itm_folder: Path, digit_folder: Path) -> recipe.CrossModalitySettings:
    return recipe.CrossModalitySettings(
        flipped_clip=FlippedClipSettings(model=str(clip_folder), min=-1.0, batch_size=4),
        image_text_matching=ImageTextMatchingSettings(model=str(itm_folder), min=0.0, batch_size=4),
        digit=DigitSettings(model=str(digit_folder), prompts=[PROMPT], batch_size=4),
    )


def stage_2(models: recipe.CrossModalitySettings, shards: list[Shard], output: Path) -> dict[str, list[dict]]:
    layout = Layout(str(output))
    with beam.Pipeline("FnApiRunner") as p:
        read = p | beam.Create(shards) | ReadShards(FakeCache(), BOUNDS, 4, load_prepare=lambda: load_prepare(models))
        done = (
            read[ReadShards.BATCHES]
            | "FlippedClip" >> ScoreByModel(FLIPPED_CLIP, models)
            | JoinWanted(models)
            | "ImageTextMatching" >> ScoreByModel(IMAGE_TEXT_MATCHING, models)
            | "Digit" >> ScoreByModel(DIGIT, models)
            | beam.ParDo(
                WriteShardTable(
                    layout, FakeCache(CROSS_MODALITY), Layout.cross_modality, tables.cross_modality_schema()
                )
            )
        )
        assert_that(done, equal_to(shards))
    return {shard.name: tables.read_table(layout.cross_modality(shard.name)) for shard in shards}


def test_a_transient_memory_shortage_does_not_halve_the_shape(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = ClipHandler(FlippedClipSettings(model=str(clip_folder), min=0.0, batch_size=4), "cpu")
    batch, model = make_batch([make_sample(i) for i in range(3)]), handler.load_model()
    (expected,) = handler.run_inference(batch, model)
    score, calls = LoadedClip.score, []

    def short_once(loaded: LoadedClip, inputs: list[Any]) -> Any:
        calls.append(len(inputs))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(loaded, inputs)

    monkeypatch.setattr(LoadedClip, "score", short_once)
    (found,) = handler.run_inference(batch, model)
    assert calls == [4, 4]
    assert not batch.attempt.out_of_memory
    assert scores(found) == scores(expected)


def test_a_failed_preparation_does_not_keep_the_image_in_memory() -> None:
    class Failing:
        def prepare(self, sample: Sample) -> Any:
            try:
                return sample.pixels[10**9]  # type: ignore[index]
            except IndexError as error:
                raise ValueError("cannot prepare this") from error

    error = prepared_or_error(Failing(), make_sample(0))
    assert str(error) == "cannot prepare this"
    assert error.__traceback__ is error.__cause__ is error.__context__ is None


def refuse(monkeypatch: pytest.MonkeyPatch, loaded: Any, rows: int) -> None:
    """Make a model raise out of memory for more than the given number of rows."""
    score = loaded.score

    def limited(self: Any, inputs: list) -> Any:
        if len(inputs) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, inputs)

    monkeypatch.setattr(loaded, "score", limited)


@pytest.mark.parametrize(("loaded", "rule"), [(LoadedClip, "flipped_clip"), (LoadedBlip, "image_text_matching")])
def test_the_shard_is_scored_again_at_half_the_shape(
    models: recipe.CrossModalitySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: Any, rule: str
):
    shards = write_pool(
        tmp_path / "pool",
        {f"{name}.tar": [m for i in range(9) for m in sample_members(f"{name}{i}", seed=i)] for name in "ab"},
    )
    smaller = getattr(models, rule).model_copy(update={"batch_size": 2})
    expected = stage_2(models.model_copy(update={rule: smaller}), shards, tmp_path / "expected")
    refuse(monkeypatch, loaded, 2)
    assert stage_2(models, shards, tmp_path / "found") == expected
    for folder, halvings in (("expected", {}), ("found", {rule: 1})):
        layout = Layout(str(tmp_path / folder))
        assert [tables.read_halvings(layout.cross_modality(shard.name)) for shard in shards] == [halvings] * 2


def test_the_run_fails_where_not_even_one_row_fits(
    models: recipe.CrossModalitySettings, monkeypatch: pytest.MonkeyPatch
):
    handler = ClipHandler(models.flipped_clip.model_copy(update={"batch_size": 1}), "cpu")
    model = handler.load_model()
    refuse(monkeypatch, LoadedClip, 0)
    with pytest.raises(torch.OutOfMemoryError):
        handler.run_inference(make_batch([make_sample(0)]), model)
