"""docs/distribution-alignment.md lists every setting with its default and every column, and quotes real messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.graphs import Job
from pipeline.sinks.publication import publish
from tests.helpers import sample_members, settings, write_pool
from tests.transforms.distribution_alignment.alignment_graph import make_candidates, place
from transforms.core.metrics import NAMES, Counts
from transforms.core.recipe import STAGES, DistributionAlignmentSettings, QualityDuplicationSettings
from transforms.distribution_alignment.copies import UnreachableTargetError, cluster_rows, solve_scale
from transforms.distribution_alignment.records import Allocation
from transforms.storage import files

DOCUMENT = (Path(__file__).parents[3] / "docs" / "distribution-alignment.md").read_text()


def table(section: str) -> dict[str, str]:
    """The first table of a section, as a dict from the first cell (without backticks) to the second cell."""
    lines = DOCUMENT.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0].strip("`"): row[1] for row in rows[2:]}


def leaves(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The path and default of every setting below `model`."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        if sections:
            yield from leaves(sections[0], f"{prefix}{name}.")
        elif field.is_required():
            yield f"{prefix}{name}", "required"
        else:
            yield f"{prefix}{name}", "none" if field.default is None else json.dumps(field.default)


def test_every_setting_is_documented_with_its_default() -> None:
    assert table("Settings") == dict(leaves(DistributionAlignmentSettings))


def test_every_column_is_documented_in_its_order() -> None:
    one = np.ones(1)
    allocation = Allocation(np.array([1]), {"<task>": one}, one, one, target=1.0, scale=1.0)
    assert list(table("clusters.parquet")) == list(cluster_rows(allocation, {})[0])


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (
            {"samples": 100},
            "the target of 100 copies cannot be reached: `max_copies` 2 allows 10 from 5 samples, 90 too few; "
            "raise `max_copies` to 20 or lower `target`",
        ),
        (
            {"pool_share": 0.3},
            "the target of 12 copies cannot be reached: `max_copies` 2 allows 10 from 5 samples, 2 too few; "
            "raise `max_copies` to 2.4 or lower `target`",
        ),
        ({"samples": 10}, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_unreachable_target_fails_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: dict[str, Any], told: str | None
) -> None:
    """Runs the command line, so that the error passes through Beam.

    Five samples of a pool of forty replace the results of stages 1 and 2.
    """
    write_pool(tmp_path / "pool", {"a.tar": sample_members("k0")})
    monkeypatch.chdir(tmp_path)
    aligned = {"target": target, "max_copies": 2.0}
    Path("r.yaml").write_text(yaml.safe_dump(settings(distribution_alignment=aligned)))
    monkeypatch.setattr("pipeline.runs.job.identities", lambda recipe: {stage: {} for stage in STAGES} | {
        "single_modality": {"pos_pattern": {"source": "bundled"}}
    })  # fmt: skip

    def align(name: str, job: Job, beam_options: list[str]) -> Counts:
        if name == "distribution_alignment":
            place(make_candidates(np.eye(5, 8)), job.recipe.distribution_alignment, str(tmp_path / "work"), 40)
            files.write_json(job.layout.funnel, {})
            assert job.publication is not None
            publish(job.layout, job.publication)
        return dict.fromkeys(NAMES, 0)

    monkeypatch.setattr("pipeline.runs.stage._run_stage", align)
    arguments = ["run", "r.yaml", "--input", "pool", "--output", "out"]
    in_words = CliRunner().invoke(app, arguments)
    assert in_words.exit_code == (1 if told else 0), in_words.output
    if told:
        assert told in " ".join(in_words.stderr.split())
        assert not Path("out", "funnel.json").exists()
        in_json = CliRunner().invoke(app, [*arguments, "--json"])
        last = json.loads(in_json.stdout.splitlines()[-1])
        assert (in_json.exit_code, last["event"]) == (1, "error") and told in last["message"]


def test_the_documented_message_equals_the_real_one() -> None:
    section = DOCUMENT.split("## A target that cannot be reached\n")[1].split("\n## ")[0]
    with pytest.raises(UnreachableTargetError) as error:
        solve_scale(100_000, np.ones(1), np.array([549]), QualityDuplicationSettings(), 10.0)
    assert str(error.value) in " ".join(section.split())
    assert "exit status 1" in section
