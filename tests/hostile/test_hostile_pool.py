"""Runs over a pool of hostile samples and damaged tars among valid ones.

The run succeeds, every sample has an allowed outcome, and nothing is written outside the output folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.output_folder.versions import LINKED
from tests.helpers import settings
from tests.hostile import malformed
from tests.hostile.malformed import (
    JUDGED,
    KINDS,
    Malformed,
    MalformedTar,
    Outcomes,
    corpus,
    damaged_tars,
    sound_members,
)
from transforms.core.recipe import STAGES

SAMPLES_PER_TAR = 40  # malformed ones, with a valid one after every fourth
TABLE = "table"  # conftest.py prints what tests record under this name


@dataclasses.dataclass
class Pool:
    """The samples of the pool: their allowed outcomes and their kind, by shard and key."""

    outcomes: dict[tuple[str, str], list[set[str]]] = dataclasses.field(default_factory=dict)
    kinds: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    malformed: int = 0

    def add(self, shard: str, kind: str, outcomes: Outcomes) -> None:
        for key, allowed in outcomes.items():
            self.outcomes[shard, key], self.kinds[shard, key] = allowed, kind


def write_pool(folder: Path, per_kind: int, tars: list[MalformedTar]) -> Pool:
    pool = Pool()
    folder.mkdir()
    end = bytes(2 * malformed.BLOCK)
    samples = sorted(corpus(per_kind), key=lambda one: hashlib.sha256(one.members).digest())  # kinds mixed
    for number, group in enumerate(_groups(samples)):
        shard, content = f"samples-{number:03d}", b""
        for index, sample in enumerate(group):
            content += sample.members
            pool.add(shard, sample.kind, sample.outcomes)
            pool.malformed += 1
            if index % 4 == 3:
                content += sound_members(random.Random(f"{shard} {index}"), f"sound{index:03d}")
                pool.add(shard, "sound", {f"sound{index:03d}": [{JUDGED}]})
        (folder / f"{shard}.tar").write_bytes(content + end)
    for number, tar in enumerate(tars):
        shard = f"tar-{number:03d}"
        (folder / f"{shard}.tar").write_bytes(tar.content)
        pool.add(shard, tar.kind, {key: [{JUDGED}] for key in tar.sound_keys})
        pool.add(shard, tar.kind, {"": [{tar.reason}]} if tar.reason else {})
        pool.malformed += 1
    return pool


def _groups(samples: list[Malformed]) -> list[list[Malformed]]:
    return [samples[start : start + SAMPLES_PER_TAR] for start in range(0, len(samples), SAMPLES_PER_TAR)]


def listing(folder: Path, *, without: str) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if without not in path.relative_to(folder).parts[:1]
    }


@dataclasses.dataclass
class Ran:
    """A run over the corpus and its outputs."""

    pool: Pool
    per_kind: int
    output: Path
    tables: str
    result: Any
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]

    def rows(self) -> list[dict[str, Any]]:
        return [
            row | {"shard": part.stem.removeprefix("part-")}
            for part in sorted((self.output / self.tables).iterdir())
            for row in pq.read_table(part).to_pylist()
        ]

    def letters(self) -> list[dict[str, str]]:
        files = sorted((self.output / "dead_letters").iterdir())
        return [json.loads(line) for file in files for line in file.read_text("ascii").split("\n") if line]


@pytest.fixture(scope="module", params=["single_modality", ",".join(STAGES)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run stage 1 over the complete corpus, and all stages over one sample of each kind and a few tars."""
    place = tmp_path_factory.mktemp("hostile")
    here = place / "a" / "b" / "here"
    here.mkdir(parents=True)
    recipe = settings(
        pool=malformed.SETTINGS, cross_modality__flipped_clip__min=-1.0, cross_modality__image_text_matching__min=0.0
    )
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tars, first_stage = list(damaged_tars()), request.param == "single_modality"
    per_kind = 4 if first_stage else 1
    pool = write_pool(place / "pool", per_kind, tars if first_stage else tars[::9])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        before = listing(place, without="out")
        options = ["--input", str(place / "pool"), "--output", str(place / "out"), "--stages", request.param]
        result = CliRunner().invoke(app, ["run", str(place / "recipe.yaml"), *options])
    tables = "annotations/pool_wide" if first_stage else "decisions"
    return Ran(pool, per_kind, place / "out", tables, result, before, listing(place, without="out"))


def test_run_succeeds(ran: Ran) -> None:
    assert ran.result.exit_code == 0, ran.result.output


def test_corpus_size(ran: Ran) -> None:
    if ran.per_kind > 1:
        assert ran.pool.malformed >= 300
    assert len(KINDS) >= 75


def test_every_sample_has_an_allowed_outcome(ran: Ran, record_property: Any) -> None:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in ran.rows():
        found[row["shard"], row["key"]].append(JUDGED)
    for letter in ran.letters():
        found[letter["shard"], letter["key"]].append(letter["reason"])
    wrong = {
        (ran.pool.kinds.get(place, "nobody's"), *place): (found.get(place), ran.pool.outcomes.get(place))
        for place in found.keys() | ran.pool.outcomes.keys()
        if not fits(found.get(place, []), ran.pool.outcomes.get(place, []))
    }
    assert not wrong
    kinds = set(ran.pool.kinds.values()) - {"sound"}
    sound = sum(kind == "sound" for kind in ran.pool.kinds.values())
    record_property(
        TABLE,
        f"hostile pool, {ran.tables}: {ran.pool.malformed} malformed inputs of {len(kinds)} kinds among {sound} sound "
        "samples, none lost",
    )


def fits(found: list[str], allowed: list[set[str]]) -> bool:
    """Return whether the outcomes of a key are allowed: first a judged sample, then its dead letters in tar order."""
    return len(found) == len(allowed) and all(one in these for one, these in zip(found, allowed, strict=True))


def test_every_uid_is_accounted_for_once(ran: Ran) -> None:
    rows, letters = ran.rows(), ran.letters()
    judged = [row["uid"] for row in rows]
    dead = [letter for letter in letters if letter["uid"]]
    named = [letter["uid"] for letter in dead if letter["reason"] != "repeated_uid"]
    assert len(set(judged + named)) == len(judged + named)
    found = [(one["shard"], one["key"]) for one in (*rows, *dead)]
    assert sorted(found) == sorted(place for place in ran.pool.kinds if place[1])
    if ran.tables != "decisions":
        return
    funnel = json.loads((ran.output / "funnel.json").read_text())
    assert funnel["in"] == len(rows) + len(letters)
    assert funnel["in"] == funnel["survivors"] + sum(r["dropped"] for r in funnel["rules"]) + len(letters)
    assert funnel["survivors"] > 20  # so that the models and stage 3 had samples to process


def test_nothing_is_written_outside_the_output_folder(ran: Ran) -> None:
    assert ran.after == ran.before
    assert not Path(malformed.CANARY).exists()
    links = [path for path in ran.output.rglob("*") if path.is_symlink()]
    assert {path.name for path in links} <= {"current", *LINKED}  # pairsift's own links
    assert all(path.resolve().is_relative_to(ran.output.resolve()) for path in links)


def test_resharded_tars_contain_no_names_of_the_pool(ran: Ran) -> None:
    if ran.tables != "decisions":
        return
    place, tars = ran.output.parent, ran.output.parent / "tars"
    arguments = ["reshard", str(ran.output), "--input", str(place / "pool"), "--output", str(tars)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    names = [name for path in tars.glob("*.tar") for name in names_in(path)]
    assert len(names) >= 2 * json.loads((ran.output / "funnel.json").read_text())["copies"] > 0
    assert all(re.fullmatch(r"[0-9a-f]{32}-\d+\.(jpg|jpeg|png|webp|gif|bmp|tif|avif|txt|json)", name) for name in names)


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_messages_are_bounded_and_plain(ran: Ran) -> None:
    for letter in ran.letters():
        assert len(letter["message"]) <= 500
        assert letter["message"].strip()
    assert all(c.isprintable() or c == "\n" for c in ran.result.output)


def test_corpus_is_reproducible() -> None:
    first, second = ([(one.kind, one.members) for one in corpus(1)] for _ in range(2))
    assert first == second
    assert len(first) == len(KINDS)
