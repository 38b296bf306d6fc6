"""Tests of reuse: reruns, other recipes, changed pools and `select` compute nothing twice, with identical results."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from pipeline import graphs
from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.report.progress import Progress
from pipeline.runs.job import settled_job
from pipeline.runs.run import run
from pipeline.runs.select import select
from pipeline.runs.stage import run_graph
from pipeline.sinks.publication import Publication, publish
from pipeline.sources.pool import list_shards
from tests.helpers import encode, jpeg, picture, sample_members, write_pool
from tests.integration.chaos import TWO_WORKERS
from tests.transforms.models import tiny_models
from transforms.core.errors import UsageError
from transforms.core.recipe import SINGLE_MODALITY, STAGES, Recipe, parse_recipe
from transforms.models.handler import OnDemand
from transforms.storage import files

RESULTS = ("decisions", "subset.npy", "funnel.json", "clusters.parquet", "centroids.npy", "manifest.json")
DECIDED = (*RESULTS, "annotations/single_modality", "annotations/pool_wide", "dead_letters")
ALL = (*DECIDED, "annotations/cross_modality")
CAPTIONS = ("a red square", "two dogs on a bench", "bench", "a blue picture of a yard", "is there a digit left")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, because distributing the work of such small models costs more than the work itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "clip": tiny_models.save_clip(folder / "clip"),
        "itm": tiny_models.save_itm(folder / "itm"),
        "digit": tiny_models.save_digit(folder / "digit"),
    }


def shard(name: str, first: int) -> list[tuple[str, bytes]]:
    """Return eight samples, the last of them a smaller copy of the first, and one that cannot be decoded."""
    members = []
    for n in range(first, first + 7):
        members += sample_members(f"{name}{n}", CAPTIONS[n % len(CAPTIONS)], seed=n)
    members += sample_members(f"{name}-small", "a small copy of it", seed=first)
    members[-3] = (f"{name}-small.jpg", encode(picture(60, 40, first)))
    return [*members, (f"{name}-broken.jpg", b"\xff\xd8 broken"), (f"{name}-broken.txt", b"a broken picture")]


SHARDS = {"a.tar": shard("a", 0), "b.tar": shard("b", 10), "c.tar": shard("c", 20)}


@pytest.fixture(scope="module")
def recipe_with(models: dict[str, Path]) -> Callable[..., Recipe]:
    def make(
        min_cosine: float = -0.2, min_match: float = 0.6, min_words: int = 3, further_members: int = 4
    ) -> Recipe:
        content = {
            "name": "test",
            "single_modality": {
                "near_duplicate": {"further_members": further_members},
                "caption_length": {"min_words": min_words, "min_characters": 2},
                "pos_pattern": {"tagger": "bundled"},
                "caption_frequency": {"min_images": 9},
            },
            "cross_modality": {
                "flipped_clip": {"model": str(models["clip"]), "min": min_cosine, "batch_size": 4},
                "image_text_matching": {"model": str(models["itm"]), "min": min_match, "batch_size": 4},
                "digit": {"model": str(models["digit"]), "batch_size": 4},
            },
            "distribution_alignment": {"target": {"survivors": True}, "clusters": {"count": 2}},
        }
        return parse_recipe(content, "test")

    return make


def run_on(recipe: Recipe, pool: Path, output: Path, **more: Any) -> dict[str, dict[str, int]]:
    """Run all stages and return the counts of run.json."""
    outcome = run(recipe, str(pool), str(output), list(STAGES), [], Progress(Console(stderr=True)), **more)
    assert outcome.funnel and outcome.funnel["survivors"] > 0
    return json.loads((output / "run.json").read_text())["counts"]


def select_from(recipe: Recipe, output: Path) -> None:
    select(recipe, "r.yaml", str(output), [], Progress(Console(stderr=True)))


def bytes_of(output: Path, names: tuple[str, ...] = ALL) -> dict[str, bytes]:
    found = [file for name in names for file in (output / name, *(output / name).glob("*")) if file.is_file()]
    return {str(file.relative_to(output)): file.read_bytes() for file in found}


def scores_in(output: Path) -> dict[str, dict[str, Any]]:
    parts = sorted((output / "annotations" / "cross_modality").iterdir())
    return {row["uid"]: row for part in parts for row in pq.read_table(part).to_pylist()}


@dataclasses.dataclass
class Seen:
    """The tars that were opened and the models that were loaded."""

    tars: list[str] = dataclasses.field(default_factory=list)
    models: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen, open_binary, load = Seen(), files.open_binary, OnDemand.load

    def opened(path: str) -> Any:
        if path.endswith(".tar"):
            seen.tars.append(Path(path).name)
        return open_binary(path)

    def loaded(model: OnDemand) -> bool:
        now = load(model)
        seen.models += now
        return now

    monkeypatch.setattr(files, "open_binary", opened)
    monkeypatch.setattr(OnDemand, "load", loaded)
    return seen


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pool"
    write_pool(folder, SHARDS)
    return folder


@pytest.fixture(scope="module")
def first(pool: Path, recipe_with: Callable[..., Recipe]) -> Path:
    """A first run."""
    output = pool.parent / "out"
    counts = run_on(recipe_with(), pool, output)
    assert counts["single_modality"]["tars_opened"] == counts["cross_modality"]["tars_opened"] == 3
    assert counts["single_modality"]["models_loaded"] == 1
    assert counts["cross_modality"]["models_loaded"] == 3
    return output


@pytest.fixture
def output(first: Path, tmp_path: Path) -> Path:
    """A copy of the first run, for further runs."""
    return shutil.copytree(first, tmp_path / "out", symlinks=True)


def test_rerun_with_nothing_new_opens_no_tar_and_loads_no_model(
    pool: Path, output: Path, recipe_with: Callable[..., Recipe], seen: Seen
) -> None:
    before = bytes_of(output)
    counts = run_on(recipe_with(), pool, output)
    assert bytes_of(output) == before
    assert (seen.tars, seen.models) == ([], 0)
    for stage in STAGES[:2]:
        assert counts[stage] == dict.fromkeys(counts[stage], 0) | {"shards_finished_before": 3}


def test_looser_thresholds_score_only_new_samples(
    pool: Path, output: Path, tmp_path: Path, recipe_with: Callable[..., Recipe], seen: Seen
) -> None:
    looser = recipe_with(min_cosine=-0.36, min_match=0.4, min_words=1)
    before = scores_in(output)
    counts = run_on(looser, pool, output)
    after = scores_in(output)
    new = {uid for uid in after if before.get(uid) != after[uid]}
    assert new - before.keys() and new & before.keys() < before.keys()
    assert counts["single_modality"]["tars_opened"] == counts["single_modality"]["models_loaded"] == 0
    assert counts["cross_modality"]["samples_done"] == len(new)
    assert counts["cross_modality"]["samples_back"] == len(new - before.keys())
    assert counts["cross_modality"]["tars_opened"] == len(seen.tars)
    assert counts["cross_modality"]["models_loaded"] == seen.models
    run_on(looser, pool, tmp_path / "fresh")
    assert bytes_of(output) == bytes_of(tmp_path / "fresh")


def test_another_model_computes_only_its_own_scores(
    pool: Path, output: Path, models: dict[str, Path], recipe_with: Callable[..., Recipe], seen: Seen
) -> None:
    base = recipe_with()
    itm = base.cross_modality.image_text_matching
    assert itm is not None
    other = itm.model_copy(update={"max_tokens": 32})
    changed = base.model_copy(update={"cross_modality": base.cross_modality.model_copy(
        update={"image_text_matching": other})})  # fmt: skip
    counts = run_on(changed, pool, output)
    assert counts["single_modality"]["tars_opened"] == 0
    assert counts["cross_modality"]["models_loaded"] == seen.models == 1


def test_changed_pool_computes_only_the_changes_and_equals_a_run_from_scratch(
    pool: Path, tmp_path: Path, recipe_with: Callable[..., Recipe], seen: Seen
) -> None:
    """One shard is added, one removed and one replaced. A dropped sample is kept, because its better copy is gone."""
    keepers_only = recipe_with(further_members=0)  # else the copy is scored at once
    copied, output = shutil.copytree(pool, tmp_path / "pool"), tmp_path / "out"
    larger = [("d1.jpg", jpeg(192, 128, seed=11)), ("d1.txt", b"a larger copy of b11")]
    write_pool(copied, {"d.tar": [*larger, *shard("d", 40)]})
    run_on(keepers_only, copied, output)
    before = scores_in(output)

    seen.tars.clear()
    (copied / "d.tar").unlink()
    write_pool(copied, {"a.tar": shard("a", 50), "e.tar": shard("e", 60)})
    counts = run_on(keepers_only, copied, output)
    told = json.loads((output / "run.json").read_text())
    assert told["shards"] == 4 and told["shards_vanished"] == 1
    assert counts["single_modality"]["tars_opened"] == 2
    assert sorted(set(seen.tars)) == ["a.tar", "b.tar", "e.tar"]  # b contains the sample whose better copy was in d1
    assert counts["cross_modality"]["samples_back"] == 1
    assert {row["key"] for uid, row in scores_in(output).items() if uid not in before} >= {"b11", "e60"}

    run_on(keepers_only, copied, tmp_path / "fresh")
    assert bytes_of(output) == bytes_of(tmp_path / "fresh")


# select -----------------------------------------------------------------------------------------------------------


def test_select_equals_a_run_of_the_same_recipe(
    pool: Path, first: Path, tmp_path: Path, recipe_with: Callable[..., Recipe], seen: Seen
) -> None:
    """All thresholds are stricter. A smaller copy is kept, because the caption of the larger one is now too short."""
    stricter, output = recipe_with(min_cosine=-0.15, min_match=0.8, min_words=4), tmp_path / "out"
    run_on(stricter, pool, output)
    from_nothing = bytes_of(output, DECIDED)
    run_on(recipe_with(), pool, output)
    assert bytes_of(output, DECIDED) == bytes_of(first, DECIDED) != from_nothing

    seen.tars.clear()
    seen.models = 0
    pool.rename(pool.with_name("away"))  # proves that no image is read
    try:
        select_from(stricter, output)
    finally:
        pool.with_name("away").rename(pool)
    assert bytes_of(output, DECIDED) == from_nothing
    assert (seen.tars, seen.models) == ([], 0)
    assert not (output / ".select").exists()


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_select_reports_missing_scores_and_writes_nothing(
    pool: Path, output: Path, recipe_with: Callable[..., Recipe]
) -> None:
    before = everything(output)
    with pytest.raises(UsageError, match=r"\d+ samples have no score .* pairsift run r.yaml --input") as refused:
        select_from(recipe_with(min_words=1, min_cosine=-0.36), output)
    assert everything(output) == before
    number = int(str(refused.value).split(": ")[1].split()[0])
    counts = run_on(recipe_with(min_words=1, min_cosine=-0.36), pool, output)
    assert number == counts["cross_modality"]["samples_done"]
    select_from(recipe_with(min_words=1, min_cosine=-0.36), output)

    other = recipe_with().model_copy(update={"pool": recipe_with().pool.model_copy(update={"max_json_bytes": 10})})
    with pytest.raises(UsageError, match="3 of 3 shards have no features for this recipe; compute them: pairsift run"):
        select_from(other, output)


def test_select_needs_a_run(tmp_path: Path, recipe_with: Callable[..., Recipe]) -> None:
    with pytest.raises(UsageError, match="holds no annotations"):
        select_from(recipe_with(), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_shards_without_scores_are_reported_even_if_no_sample_is_kept(
    pool: Path, tmp_path: Path, recipe_with: Callable[..., Recipe]
) -> None:
    nothing, output = recipe_with(min_words=50), tmp_path / "out"
    run(nothing, str(pool), str(output), [SINGLE_MODALITY], [], Progress(Console(stderr=True)))
    with pytest.raises(UsageError, match="3 of 3 shards have no scores yet; compute them: pairsift run"):
        select_from(nothing, output)
    job = dataclasses.replace(job_on(nothing, pool, output), checks_before=True)
    with pytest.raises(Exception, match="no table of scores yet; run stage cross_modality first"):
        run_graph(graphs.distribution_alignment, job, [])


# versions ---------------------------------------------------------------------------------------------------------


def test_earlier_results_stay_readable_until_pruned(
    pool: Path, output: Path, recipe_with: Callable[..., Recipe]
) -> None:
    before = bytes_of(output, RESULTS)
    select_from(recipe_with(min_cosine=-0.1), output)
    assert os.readlink(output / "current") == "versions/2"
    assert bytes_of(output / "versions" / "1", RESULTS) == before
    assert bytes_of(output / "versions" / "2", RESULTS) == bytes_of(output, RESULTS) != before
    run_on(recipe_with(), pool, output, keep_versions=1)
    assert sorted(path.name for path in (output / "versions").iterdir()) == ["3"]
    assert bytes_of(output, RESULTS) == before
    assert versions.newest(str(output)).results == str(output / "versions" / "3")


def test_failed_run_leaves_earlier_results_unchanged(
    pool: Path, output: Path, recipe_with: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(output, RESULTS)

    def fail(*_: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as failing:
        failing.setattr("pipeline.sinks.decisions.WriteFunnel.process", fail)
        with pytest.raises(RuntimeError, match="the disk is full"):
            run_on(recipe_with(min_cosine=-0.1), pool, output)
    assert bytes_of(output, RESULTS) == before
    run_on(recipe_with(), pool, output)
    assert bytes_of(output, RESULTS) == before
    assert os.readlink(output / "current") == "versions/2"


# Jobs without a waiting process ------------------------------------------------------------------------------------


def job_on(recipe: Recipe, pool: Path, output: Path) -> graphs.Job:
    """Build a job as a cluster launcher does: list the pool and begin a version. The graph does the rest."""
    layout = Layout(str(output))
    job, content = settled_job(recipe, str(pool), layout, list_shards(str(pool)), fetch=False)
    files.write_json(layout.newest_manifest, content)
    write_listing(layout, job.shards)
    return dataclasses.replace(job, layout=versions.begin(layout.output), publication=Publication(content, 1))


def test_three_graphs_as_one_job_give_the_same_outputs_and_resume(
    recipe_with: Callable[..., Recipe], pool: Path, first: Path, tmp_path: Path, seen: Seen
) -> None:
    output = tmp_path / "out"
    counts = run_graph(graphs.all_stages, job_on(recipe_with(), pool, output), [])
    assert bytes_of(output) == bytes_of(first)
    assert counts["tars_opened"] == len(seen.tars) == 6
    again = run_graph(graphs.all_stages, job_on(recipe_with(), pool, output), [])
    assert bytes_of(output) == bytes_of(first)
    assert again["shards_finished_before"] == 6
    assert len(seen.tars) == 6


def test_outputs_do_not_depend_on_worker_processes_or_the_order_of_shards(
    recipe_with: Callable[..., Recipe], pool: Path, first: Path, tmp_path: Path
) -> None:
    """The three stages as one job, whose worker processes start once."""
    for name, options, step in (("two_workers", list(TWO_WORKERS), 1), ("reversed", [], -1)):
        job = job_on(recipe_with(), pool, tmp_path / name)
        write_listing(job.layout, job.shards[::step])
        run_graph(graphs.all_stages, dataclasses.replace(job, shards=job.shards[::step]), options)
        assert bytes_of(tmp_path / name) == bytes_of(first)


def test_stage_started_too_early_names_the_missing_stage(
    recipe_with: Callable[..., Recipe], pool: Path, tmp_path: Path
) -> None:
    job = dataclasses.replace(job_on(recipe_with(), pool, tmp_path / "out"), checks_before=True)
    with pytest.raises(graphs.Incomplete, match=r"shard [abc]: no features .* run stage single_modality first"):
        run_graph(graphs.cross_modality, job, [])
    run_graph(graphs.single_modality, job, [])
    with pytest.raises(graphs.Incomplete, match=r"shard [abc]: no table of scores yet; run stage cross_modality"):
        run_graph(graphs.distribution_alignment, job, [])
    run_graph(graphs.cross_modality, job, [])
    run_graph(graphs.distribution_alignment, job, [])
    assert (tmp_path / "out" / "funnel.json").exists()


def test_publishing_is_idempotent(
    recipe_with: Callable[..., Recipe], pool: Path, first: Path, tmp_path: Path
) -> None:
    """A runner may retry the last step, even if it was completed or interrupted half-way."""
    output = tmp_path / "out"
    shutil.copytree(first, output, symlinks=True)
    job = job_on(recipe_with(), pool, output)
    run_graph(graphs.distribution_alignment, job, [])
    assert job.publication
    before = everything_in(output)
    publish(job.layout, job.publication)
    assert everything_in(output) == before
    os.remove(job.layout.manifest)  # the first attempt got as far as the funnel
    publish(job.layout, job.publication)
    assert everything_in(output) == before


def everything_in(folder: Path) -> dict[str, bytes | str]:
    """Return the content of every file and the target of every link."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }
