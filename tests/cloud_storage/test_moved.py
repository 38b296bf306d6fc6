"""A test of moving an unfinished run from a local disk to Cloud Storage (docs/reliability.md)."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from pipeline.report.progress import Progress
from pipeline.runs.run import run
from tests.cloud_storage.server import CloudStorage
from tests.integration.chaos import SHARDS, make_case
from transforms.core.recipe import STAGES, load_recipe


def test_copied_output_folder_is_resumed(store: CloudStorage, bucket: str, tmp_path: Path) -> None:
    case, local = make_case(tmp_path / "case"), tmp_path / "out"
    store.put_folder(bucket, "pool", case.pool)

    def run_into(output: str, stages: list[str]) -> None:
        progress = Progress(Console(stderr=True))
        run(load_recipe(str(case.recipe)), f"gs://{bucket}/pool", output, stages, [], progress)

    run_into(str(local), list(STAGES[:2]))
    for folder in ("annotations", "dead_letters"):
        store.put_folder(bucket, f"out/{folder}", local / folder)
    run_into(f"gs://{bucket}/out", list(STAGES))
    counts = json.loads(store.buckets[bucket]["out/run.json"].content)["counts"]
    for stage in STAGES[:2]:
        assert counts[stage]["shards_finished_before"] == SHARDS
        assert counts[stage]["tars_opened"] == counts[stage]["models_loaded"] == 0
    run_into(str(local), list(STAGES))
    paths = [*local.glob("annotations/*/*.parquet"), *local.glob("versions/1/*.npy"), *local.glob("versions/1/*.json")]
    assert len(paths) > 3 * SHARDS
    for path in paths:
        assert store.buckets[bucket][f"out/{path.relative_to(local)}"].content == path.read_bytes()
