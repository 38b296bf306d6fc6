"""The number of times a model is loaded: once per process, or once per machine where it is shared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
import torch
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from tests.transforms.models.model_batches import make_batch, make_sample, scores
from transforms.cross_modality.flipped_clip import FlippedClipSettings
from transforms.models.clip import ClipHandler, LoadedClip

ROOT = Path(__file__).parents[3]


class Counting(ClipHandler):
    """Creates a file for each load."""

    def __init__(self, settings: FlippedClipSettings, loads: Path, shared: bool) -> None:
        super().__init__(settings, "cpu")
        self._loads, self._shared = loads, shared

    def share_model_across_processes(self) -> bool:
        return self._shared

    def load_on(self, device: torch.device) -> LoadedClip:
        (self._loads / str(os.getpid())).touch()
        return super().load_on(device)


def test_processes_share_one_copy_on_a_gpu_and_have_their_own_on_a_cpu(clip_folder: Path):
    settings = FlippedClipSettings(model=str(clip_folder), min=0.0)
    assert ClipHandler(settings, "cuda").share_model_across_processes()
    assert not ClipHandler(settings, "cpu").share_model_across_processes()


@pytest.mark.parametrize(("shared", "loads"), [(True, 1), pytest.param(False, 2, marks=pytest.mark.slow)])
def test_two_processes(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, loads: int):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = FlippedClipSettings(model=str(clip_folder), min=0.0, batch_size=4, score_unflipped=True)
    batches = [make_batch([make_sample(2 * i), make_sample(2 * i + 1)]) for i in range(6)]
    plain = ClipHandler(settings, "cpu")
    expected: list[dict[str, Any]] = [scores(plain.run_inference(b, plain.load_model())[0]) for b in batches]
    options = PipelineOptions(["--direct_num_workers=2", "--direct_running_mode=multi_processing"])
    with beam.Pipeline("FnApiRunner", options=options) as p:
        scored = p | beam.Create(batches) | beam.Reshuffle() | RunInference(Counting(settings, tmp_path, shared))
        assert_that(scored | beam.Map(scores), equal_to(expected))
    assert len(list(tmp_path.iterdir())) == loads


def test_without_samples_to_score_no_model_is_loaded(clip_folder: Path, tmp_path: Path):
    settings = FlippedClipSettings(model=str(clip_folder), min=0.0)
    with beam.Pipeline("FnApiRunner") as p:
        scored = p | beam.Create([0]) | beam.FlatMap(lambda _: []) | RunInference(Counting(settings, tmp_path, False))
        assert_that(scored, equal_to([]))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_loaded_fails_the_run_and_makes_no_dead_letter():
    handler = ClipHandler(FlippedClipSettings(model="ViT-B-32", min=0.0), "cpu")
    with pytest.raises(ValueError, match="needs `weights`"):
        handler.run_inference(make_batch([make_sample(0)]), handler.load_model())
