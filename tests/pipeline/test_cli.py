"""The command line: exit status 0, 1 or 2, one clear message, and nothing written on wrong use."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.graphs import Job
from pipeline.output_folder import lock
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import read_listing, write_listing
from pipeline.output_folder.lock import only_writer
from pipeline.output_folder.manifest import identities
from pipeline.report.printable import PrintableFormatter
from pipeline.runners import supported
from pipeline.runs import claim
from pipeline.sinks.decisions import funnel
from pipeline.sinks.publication import publish
from tests.helpers import DEMO_RECIPE, recipe, sample_members, settings, write_pool
from transforms.core.metrics import NAMES, Counts
from transforms.core.recipe import STAGES
from transforms.storage import files

KNOWN: dict[str, dict] = {stage: {} for stage in STAGES} | {"single_modality": {"pos_pattern": {"source": "bundled"}}}
FUNNEL = funnel(
    {("in", ""): 7, ("survivors", ""): 3, ("dropped", "language"): 2, ("dead_letters", "broken_tar"): 2,
     ("samples", ""): 2, ("copies", ""): 5}, recipe(),
)  # fmt: skip


def pairsift(*arguments: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pool. Models need not exist, and stages are recorded instead of run."""
    write_pool(tmp_path / "pool", {"a.tar": sample_members("k0")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.runs.job.identities", lambda recipe: KNOWN)

    def stage(name: str, job: Job, beam_options: list[str]) -> Counts:
        with open(tmp_path / "stages.txt", "a") as file:
            file.write(f"{name} {' '.join(beam_options)}\n")
        if name == "distribution_alignment":
            files.write_json(job.layout.funnel, FUNNEL)
            assert job.publication is not None
            publish(job.layout, job.publication)
        return dict.fromkeys(NAMES, 0)

    monkeypatch.setattr("pipeline.runs.stage._run_stage", stage)
    return tmp_path


def stages_run(place: Path) -> list[str]:
    path = place / "stages.txt"
    return path.read_text().splitlines() if path.exists() else []


def wrong_use(place: Path, *arguments: str, message: str) -> None:
    """Check for exit status 2, the message as text or as a JSON line, and that nothing is written."""
    before = tree(place)
    for more in ([], ["--json"]):
        result = pairsift(arguments[0], *more, *arguments[1:])
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
        assert tree(place) == before
        if more and result.stdout:
            assert all(isinstance(json.loads(line), dict) for line in result.stdout.splitlines())


# validate ---------------------------------------------------------------------------------------------------------


def test_valid_recipe() -> None:
    result = pairsift("validate", str(DEMO_RECIPE))
    assert result.exit_code == 0
    assert "near_duplicate, caption_length" in result.stdout
    answer = json.loads(pairsift("validate", "--json", str(DEMO_RECIPE)).stdout)
    assert answer == {"recipe": str(DEMO_RECIPE), "faults": []}


def test_every_fault_is_reported_on_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(settings(seed=-1, surprise="[bold]x[/bold]", name=3)))
    result = pairsift("validate", str(path))
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"pairsift: {path}: ") for line in lines)
    assert "[bold]" in result.stderr  # what the recipe holds is no markup
    (line,) = pairsift("validate", "--json", str(path)).stdout.splitlines()
    assert len(json.loads(line)["faults"]) == 3


def test_an_unreadable_recipe(tmp_path: Path) -> None:
    wrong_use(tmp_path, "validate", str(tmp_path / "none.yaml"), message="cannot be read as YAML")
    wrong_use(tmp_path, "validate", message="Missing argument")


# run: wrong use ---------------------------------------------------------------------------------------------------


def run_arguments(**changes: str) -> list[str]:
    given = {"recipe": str(DEMO_RECIPE), "input": "pool", "output": "out"} | changes
    return ["run", given["recipe"], "--input", given["input"], "--output", given["output"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "nowhere"}, "nowhere does not exist"),
        ({"input": "pool/b*.tar"}, "contains no *.tar"),
        ({"recipe": "nowhere.yaml"}, "cannot be read as YAML"),
        ({"recipe": "pool"}, "cannot be read as YAML"),
        ({"output": "pool"}, "pool: is not empty and holds no run of pairsift"),
        ({"output": "pool/a.tar"}, "pool/a.tar"),
        ({"output": ""}, "--output: is empty"),
        ({"input": ""}, "--input: is empty"),
        ({"output": "/"}, "/: is not empty"),
        ({"input": "foo://x"}, "foo:// is not supported"),
        ({"output": "foo://x"}, "foo:// is not supported"),
    ],
)
def test_wrong_use(place: Path, changes: dict[str, str], message: str) -> None:
    wrong_use(place, *run_arguments(**changes), message=message)
    assert stages_run(place) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stages", "cross_modalty"], "got cross_modalty; allowed: single_modality, cross_modality"),
        (["--stages", ""], "--stages: got"),
        (["--stage", "cross_modality"], "No such option"),
        (["--jsn"], "No such option"),
    ],
)
def test_unknown_options(place: Path, more: list[str], message: str) -> None:
    wrong_use(place, *run_arguments(), *more, message=message)
    assert stages_run(place) == []


def test_a_beam_option_with_an_impossible_value(place: Path) -> None:
    before = tree(place)
    assert pairsift(*run_arguments(), "--", "--direct_num_workers=many").exit_code == 2
    assert tree(place) == before


def test_a_pattern_that_the_shell_has_expanded(place: Path) -> None:
    message = "got the extra argument pool/b.tar; put patterns in quotes"
    wrong_use(place, *run_arguments(input="pool/a.tar"), "pool/b.tar", message=message)


@pytest.mark.parametrize(
    ("stages", "missing"),
    [
        ("distribution_alignment", "single_modality"),
        ("cross_modality", "single_modality"),
        ("single_modality,distribution_alignment", "cross_modality"),
    ],
)
def test_a_stage_before_the_one_it_reads_from(place: Path, stages: str, missing: str) -> None:
    message = f"1 of 1 shards have no valid {missing} table for this recipe (the first is a); run that stage"
    wrong_use(place, *run_arguments(), "--stages", stages, message=message)
    assert stages_run(place) == []


def test_missing_options(place: Path) -> None:
    wrong_use(place, "run", str(DEMO_RECIPE), "--input", "pool", message="--output")
    wrong_use(place, "run", str(DEMO_RECIPE), "--output", "out", message="--input")


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", [FileNotFoundError("bundled:clip: not there"), ValueError("no"), LookupError("no")])
def test_missing_models(place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("pipeline.runs.job.identities", failing(error))
    wrong_use(place, *run_arguments(), message=f"recipe: {error}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distribution_alignment__cids": {"tasks": "bundled:tasks", "task_weights": {"cars": 1.0}}}, "cars"),
        ({"distribution_alignment__cids": {"tasks": str(DEMO_RECIPE)}}, "cannot be read as task centroids"),
        ({"distribution_alignment__clusters": {"centroids": str(DEMO_RECIPE)}}, "cannot be read"),
        (
            {"cross_modality__flipped_clip": {"model": "ViT-L-14", "weights": "opnai", "min": 0.2}},
            "neither a file nor a known tag",
        ),
    ],
)
def test_faults_of_later_stages_are_found_at_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        identities(recipe(**changes))


def test_missing_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (place / "gpu.yaml").write_text(yaml.safe_dump(settings(cross_modality__device="cuda")))
    wrong_use(place, *run_arguments(recipe="gpu.yaml"), message="cross_modality.device is cuda")
    assert pairsift(*run_arguments(recipe="gpu.yaml"), "--stages", "single_modality").exit_code == 0


def test_an_output_folder_of_another_pool(place: Path) -> None:
    assert pairsift(*run_arguments()).exit_code == 0
    write_pool(place / "pool2", {"a.tar": []})
    wrong_use(place, *run_arguments(input="pool2"), message=f"out: holds another pool's run (of {place}/pool, and --i")
    assert len(stages_run(place)) == 3


def test_relative_path_is_the_same_pool(place: Path) -> None:
    assert pairsift(*run_arguments()).exit_code == 0
    assert pairsift(*run_arguments(input=str(place / "pool"))).exit_code == 0
    assert json.loads((place / "out" / "manifest.json").read_text())["pool"] == str(place / "pool")


def test_trailing_slash_is_the_same_pool(place: Path) -> None:
    assert pairsift(*run_arguments()).exit_code == 0
    assert pairsift(*run_arguments(input="pool/")).exit_code == 0


def test_another_recipe_reuses_the_output_folder(place: Path) -> None:
    assert pairsift(*run_arguments()).exit_code == 0
    (place / "other.yaml").write_text(yaml.safe_dump(settings(seed=1)))
    assert pairsift(*run_arguments(recipe="other.yaml")).exit_code == 0
    assert json.loads((place / "out" / "manifest.json").read_text())["seed"] == 1
    assert json.loads((place / "out" / "versions" / "1" / "manifest.json").read_text())["seed"] == 0


def test_an_output_folder_that_another_run_writes(place: Path) -> None:
    with only_writer("out"):
        wrong_use(place, *run_arguments(), message=f"out: process {os.getpid()} of")
    assert stages_run(place) == []
    assert pairsift(*run_arguments()).exit_code == 0


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call a function between the first check of a run and its lock."""
    held = lock.only_writer

    @contextlib.contextmanager
    def only_writer(output: str) -> Iterator[None]:
        act()
        with held(output):
            yield

    monkeypatch.setattr(lock, "only_writer", only_writer)


def test_another_run_that_has_just_ended_is_seen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.dumps({"pool": "gs://b/other"}).encode()
    meanwhile(monkeypatch, lambda: files.write_bytes("out/annotations/manifest.json", manifest))
    result = pairsift(*run_arguments())
    assert result.exit_code == 2 and "out: holds another pool's run (of gs://b/other" in " ".join(result.stderr.split())
    assert stages_run(place) == [] and (place / "out/annotations/manifest.json").read_bytes() == manifest


def test_tar_added_before_the_lock_is_processed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, lambda: write_pool(place / "pool", {"b.tar": sample_members("k1")}))
    assert pairsift(*run_arguments()).exit_code == 0
    assert [shard.name for shard in read_listing(Layout("out"))] == ["a", "b"]


def test_tar_with_invalid_utf8_in_its_name_is_processed(place: Path) -> None:
    os.rename("pool/a.tar", b"pool/caf\xe9.tar")
    assert pairsift(*run_arguments()).exit_code == 0
    (shard,) = read_listing(Layout("out"))
    assert shard.name == "caf%E9" and os.path.exists(shard.path)


def test_select_after_a_run_that_has_just_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pairsift(*run_arguments()).exit_code == 0
    monkeypatch.setattr("pipeline.runs.select.identities_from", lambda earlier, recipe: KNOWN)
    monkeypatch.setattr("pipeline.output_folder.pending.FeatureCache.is_complete", lambda cache, shard: True)
    meanwhile(monkeypatch, lambda: write_listing(Layout("out"), []))
    result = pairsift("select", str(DEMO_RECIPE), "--output", "out")
    assert result.exit_code == 2 and "another run has just ended there" in " ".join(result.stderr.split())


def test_an_output_folder_of_a_run_that_was_killed_as_it_began(place: Path) -> None:
    left = place / "out" / f".manifest.json.tmp-{'0' * 32}"
    left.parent.mkdir()
    left.write_text("{")
    assert pairsift(*run_arguments()).exit_code == 0
    assert not left.exists()


def test_only_the_lock_holder_deletes_the_files_of_a_killed_run(place: Path) -> None:
    assert pairsift(*run_arguments()).exit_code == 0
    before = tree(place / "out")
    left = (
        f"annotations/.part-a.parquet.tmp-{'0' * 32}",
        ".distribution_alignment/tiles/0-0.npz",
        ".progress/a",
        ".select/missing",
    )
    with only_writer("out"):
        for name in left:
            files.write_bytes(str(place / "out" / name), b"left")
        wrong_use(place, *run_arguments(), message="out: process")
        assert all((place / "out" / name).exists() for name in left)
    with claim.only_writer(Layout("out")):
        assert not any((place / "out" / name.split("/")[0]).exists() for name in left[1:])
        assert not (place / "out" / left[0]).exists()
    assert tree(place / "out") == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_an_output_folder_with_a_broken_manifest(place: Path, content: str) -> None:
    (place / "out" / "annotations").mkdir(parents=True)
    (place / "out" / "annotations" / "manifest.json").write_text(content)
    wrong_use(place, *run_arguments(), message="out: ")


def test_select_without_annotations(place: Path) -> None:
    message = "nowhere: holds no annotations to select from; `pairsift run` computes them"
    wrong_use(place, "select", str(DEMO_RECIPE), "--output", "nowhere", message=message)
    wrong_use(place, "select", "nowhere.yaml", "--output", "out", message="cannot be read as YAML")
    wrong_use(place, "select", str(DEMO_RECIPE), "--output", "out", "--keep-versions", "0", message="--keep-versions")


# run: what is done ------------------------------------------------------------------------------------------------


def test_a_run(place: Path) -> None:
    result = pairsift(*run_arguments())
    assert result.exit_code == 0, result.output
    assert stages_run(place) == [f"{stage} " for stage in STAGES]
    for shown in ("near_duplicate", "semantic_dedup", "broken_tar", "3 survivors", "2 of them", "5 copies"):
        assert shown in result.stdout
    assert "out/subset.npy" in result.stdout
    content = json.loads((place / "out" / "manifest.json").read_text())
    assert content["recipe_sha256"] == recipe().sha256
    assert set(json.loads((place / "out" / "run.json").read_text())["seconds"]) == set(STAGES)


def test_smaller_batches_are_in_the_manifest_and_the_run_can_be_resumed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FUNNEL, "smaller_batches", {"flipped_clip": 3})
    for _ in range(2):
        assert pairsift(*run_arguments()).exit_code == 0
        assert json.loads((place / "out" / "manifest.json").read_text())["smaller_batches"] == {"flipped_clip": 3}


def test_json_lines(place: Path) -> None:
    result = pairsift(*run_arguments(), "--json")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["stage_done", "stage_counts"] * 2 + ["stage_done", "done"]
    assert events[-1]["funnel"] == FUNNEL


def test_stages_run_once_each_and_in_their_order(place: Path) -> None:
    more = ["--stages", "cross_modality, single_modality,single_modality"]
    assert pairsift(*run_arguments(), *more).exit_code == 0
    assert stages_run(place) == ["single_modality ", "cross_modality "]


def test_run_is_resumed(place: Path) -> None:
    assert pairsift(*run_arguments(), "--stages", "single_modality").exit_code == 0
    manifest = (place / "out" / "annotations" / "manifest.json").read_bytes()
    assert pairsift(*run_arguments()).exit_code == 0
    assert (place / "out" / "manifest.json").read_bytes() == manifest
    assert len(stages_run(place)) == 4


def test_without_the_last_stage_there_is_no_funnel(place: Path) -> None:
    assert pairsift(*run_arguments()).exit_code == 0  # its funnel is not that of the next run
    result = pairsift(*run_arguments(), "--json", "--stages", "single_modality")
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[-1])["funnel"] is None


def test_beam_options_are_passed_on(place: Path) -> None:
    result = pairsift(*run_arguments(), "--stages", "single_modality", "--", "--direct_num_workers=2", "--streaming")
    assert result.exit_code == 0
    assert stages_run(place) == ["single_modality --direct_num_workers=2 --streaming"]


def test_empty_output_folder_with_an_unusual_name(place: Path) -> None:
    for name in ("empty", "out [1]", "deep/er"):
        (place / "empty").mkdir(exist_ok=True)
        assert pairsift(*run_arguments(output=name)).exit_code == 0, name
        assert (place / name / "manifest.json").is_file()


def test_a_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipeline.runs.stage._run_stage", failing(RuntimeError("Traceback…\n  at x\nthe disk is full\n"))
    )
    result = pairsift(*run_arguments())
    assert result.exit_code == 1
    assert "the disk is full (--verbose shows the full traceback)" in " ".join(result.stderr.split())
    (line,) = pairsift(*run_arguments(), "--json").stdout.splitlines()
    assert json.loads(line)["event"] == "error"
    assert isinstance(pairsift(*run_arguments(), "--verbose").exception, RuntimeError)
    assert not (place / "out" / ".progress").exists()


def test_text_of_a_pool_does_not_control_the_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "key \x1b]0;title\x07\x1b[2J \x9b31m \u202e\u2066 \ud800 \r gone"
    monkeypatch.setattr("pipeline.runs.stage._run_stage", failing(RuntimeError(hostile)))
    shown = pairsift(*run_arguments()).stderr
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert r"key \x1b]0;title\x07\x1b[2J \x9b31m \u202e\u2066 \ud800 \r gone" in " ".join(shown.split())
    machine = pairsift(*run_arguments(), "--json").stdout
    assert machine.isascii() and all(c.isprintable() or c == "\n" for c in machine)
    record = logging.LogRecord("x", logging.WARNING, "", 1, "first %s", ("\x1b[2J\nsecond\u202e",), None)
    assert PrintableFormatter("%(message)s").format(record) == "first \\x1b[2J\nsecond\\u202e"


@pytest.mark.parametrize(
    ("options", "local"),
    [
        ([], True), (["--runner=DirectRunner"], True), (["--runner", "DirectRunner"], True),
        (["--runner=FnApiRunner"], True), (["--direct_num_workers=2"], True), (["--runner=DataflowRunner"], False),
        (["--runner", "DataflowRunner"], False), (["--runner=DirectRunner", "--runner=DataflowRunner"], False),
    ],
)  # fmt: skip
def test_which_runs_are_here(options: list[str], local: bool) -> None:
    assert supported.is_here(options) is local


def test_the_demo_runs_the_bundled_recipe_on_the_bundled_pool(place: Path) -> None:
    assert pairsift("demo", "--output", "out").exit_code == 0
    content = json.loads((place / "out" / "manifest.json").read_text())
    assert content["recipe"]["name"] == "demo"
    assert content["pool"].endswith("pool")


def test_help() -> None:
    result = pairsift("--help")
    assert result.exit_code == 0
    for command in ("run", "select", "demo", "validate"):
        assert command in result.stdout
