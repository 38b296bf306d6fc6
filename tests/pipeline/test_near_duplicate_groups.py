"""Near-duplicates from tables to decisions: no group loses its pair, whichever member is the true one."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from pipeline import graphs
from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from tests.helpers import annotation, recipe, uid
from transforms.core.recipe import STAGES, Recipe
from transforms.core.records import Annotation, DeadLetter, Shard

KINDS = ("spam", "true", "copy")
"""A larger picture with another caption that stage 2 drops, the true pair, and a smaller copy of it with a good
caption. Stage 1 ranks them in this order: by pixels."""
PIXELS = {"spam": (800, 600), "true": (640, 480), "copy": (320, 240)}
ORDERS = list(itertools.permutations(KINDS))


def settings(**changes: Any) -> Recipe:
    changes = {"cross_modality__flipped_clip__min": 0.2, "cross_modality__image_text_matching__min": 0.5, **changes}
    return recipe(distribution_alignment__cids=..., distribution_alignment__clusters={"count": 2}, **changes)


def row(number: int, shard: int, group: int, width: int, height: int, cosine: float, **columns: Any) -> Annotation:
    """A sample of a group; hashes of two groups differ in half of their bits."""
    hash_ = hash_of(group)
    embedding = np.random.default_rng(number).standard_normal(8)
    known: dict[str, Any] = {
        "uid": uid(number), "shard": f"s{shard}", "key": f"k{number}", "caption": f"caption of number {number}",
        "width_px": width, "height_px": height, "original_width_px": width, "original_height_px": height,
        "image_sha256": sha256(number), "perceptual_hash": f"{hash_:016x}", "flipped_clip_cosine": cosine,
        "embedding": (embedding / np.linalg.norm(embedding)).astype("<f2").tobytes(),
    }  # fmt: skip
    return annotation(**{**known, **columns})


def sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def hash_of(group: int) -> int:
    return int.from_bytes(np.random.default_rng(1000 + group).bytes(8))


def write(folder: Path, rows: list[Annotation], scored: Recipe) -> graphs.Job:
    """The tables that stages 1 and 2 leave of the rows, and the job of a recipe over them."""
    shards = tuple(Shard(name, f"/pool/{name}.tar", "1") for name in sorted({r.shard for r in rows}))
    job = graphs.Job(scored, shards, Layout(str(folder)), {stage: {} for stage in STAGES})
    write_listing(job.layout, shards)
    for shard in shards:
        own = [tables.annotation_row(r) for r in rows if r.shard == shard.name]
        key = job.score_cache.cache_key(shard)
        tables.write_table(job.layout.single_modality(shard.name), own, tables.single_modality_schema(), due=len(own))
        scores = [r for r in own if r.get("flipped_clip_cosine") is not None]
        tables.write_table(job.layout.cross_modality(shard.name), scores, tables.cross_modality_schema(), key)
    return job


def decide(job: graphs.Job) -> dict[int, tuple[str | None, int | None]]:
    """Run the passes over the pool and stage 3. Number -> the rule that drops the sample, and what stands for it."""
    for graph in (graphs.pool_wide, graphs.distribution_alignment):
        pipeline = beam.Pipeline(FnApiRunner())
        graphs.build(graph, pipeline, job)
        pipeline.run().wait_until_finish()
    return decisions(job)


def decisions(job: graphs.Job) -> dict[int, tuple[str | None, int | None]]:
    rows = [r for shard in job.shards for r in tables.read_table(job.layout.decisions(shard.name))]
    of = {int(r["uid"], 16): r["duplicate_of"] and int(r["duplicate_of"], 16) for r in rows}
    dropped = {int(r["uid"], 16): r["dropped_by"] for r in rows}
    return {number: (dropped[number], of[number]) for number in dropped}


def test_three_members_in_all_orders(tmp_path: Path) -> None:
    """Each order of uids and each order of shards is a group of its own."""
    rows: list[Annotation] = []
    expected: dict[int, tuple[str | None, int | None]] = {}
    cosines = {"spam": 0.05, "true": 0.4, "copy": 0.3}
    for group, (uids, shards) in enumerate(itertools.product(ORDERS, ORDERS)):
        number = {kind: 10 * group + 1 + uids.index(kind) for kind in KINDS}
        for kind in KINDS:
            rows.append(row(number[kind], shards.index(kind), group, *PIXELS[kind], cosines[kind]))
        expected |= {
            number["spam"]: ("flipped_clip", None),
            number["true"]: (None, None),
            number["copy"]: ("near_duplicate", number["true"]),
        }
    job = write(tmp_path, rows, settings(distribution_alignment__semantic_dedup=...))
    assert decide(job) == expected
    funnel = json.loads(Path(job.layout.funnel).read_text())
    assert (funnel["in"], funnel["survivors"]) == (3 * 36, 36)
    assert {r["name"]: r["dropped"] for r in funnel["rules"] if r["dropped"]} == {"near_duplicate": 36,
                                                                                 "flipped_clip": 36}  # fmt: skip

    # `select` decides the groups anew from the same tables, here with a threshold that keeps the larger picture.
    loose = settings(distribution_alignment__semantic_dedup=..., cross_modality__flipped_clip__min=0.01)
    anew = decide(graphs.Job(loose, job.shards, job.layout, job.identities))
    spam = {int(r.uid, 16) for r in rows if (r.width_px, r.height_px) == PIXELS["spam"]}
    assert {anew[number] for number in spam} == {(None, None)}
    assert {rule for number, (rule, _) in anew.items() if number not in spam} == {"near_duplicate"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[graphs.Job, dict[int, tuple[str | None, int | None]]]:
    """One pool with a group for each case, so that one run serves all tests."""
    near, far = hash_of(3) ^ 0b11111, hash_of(3) ^ 0b1111111111
    unscored = dict.fromkeys(("flipped_clip_cosine", "match_probability", "digit_probability"))
    rows = [
        # Equal bytes: the caption with the higher cosine stands, whatever the uids.
        row(1, 0, 1, 640, 480, 0.25, image_sha256="aa" * 32),
        row(2, 1, 1, 640, 480, 0.45, image_sha256="aa" * 32),
        row(3, 0, 1, 640, 480, 0.35, image_sha256="aa" * 32),
        # The keeper could not be decoded in stage 2.
        row(11, 0, 2, 800, 600, 0.0).with_columns(**unscored),
        row(12, 1, 2, 640, 480, 0.3),
        # A chain: 22 lies near 21 and 23, which are 10 bits apart. 21 fails; 22 stands, and 23 is near it.
        row(21, 0, 3, 800, 600, 0.1),
        row(22, 1, 3, 640, 480, 0.3, perceptual_hash=f"{near:016x}"),
        row(23, 0, 3, 320, 240, 0.3, perceptual_hash=f"{far:016x}"),
        # A keeper that fails stage 1, as ever; and one that fails image-text matching.
        row(31, 0, 4, 900, 600, 0.4, word_count=1).with_columns(**unscored),
        row(32, 1, 4, 800, 600, 0.4, match_probability=0.1),
        row(33, 0, 4, 640, 480, 0.3),
        row(34, 1, 4, 320, 240, 0.1),
        # Alone.
        row(41, 0, 5, 640, 480, 0.3),
        # No member survives; the third was not scored, because it has the bytes and the caption of the second.
        row(51, 0, 6, 800, 600, 0.1),
        row(52, 1, 6, 640, 480, 0.1),
        row(53, 0, 6, 640, 480, 0.1, image_sha256=sha256(52), caption="caption of number 52").with_columns(**unscored),
    ]
    job = write(tmp_path_factory.mktemp("mixed"), rows, settings(distribution_alignment__semantic_dedup=...))
    letter = DeadLetter("s0", "k11", uid(11), "cross_modality", "undecodable_image", "m")
    tables.write_dead_letters(job.layout.dead_letters("cross_modality", "s0"), [letter])
    return job, decide(job)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, ("near_duplicate", 2)), (2, (None, None)), (3, ("near_duplicate", 2)),
        (12, (None, None)),
        (21, ("flipped_clip", None)), (22, (None, None)), (23, ("near_duplicate", 22)),
        (31, ("near_duplicate", 33)), (32, ("image_text_matching", None)), (33, (None, None)),
        (34, ("near_duplicate", 33)),
        (41, (None, None)),
        (51, ("flipped_clip", None)), (52, ("flipped_clip", None)), (53, ("near_duplicate", 51)),
    ],
)  # fmt: skip
def test_one_pool(mixed: Any, number: int, expected: tuple[str | None, int | None]) -> None:
    assert mixed[1][number] == expected


def test_every_sample_is_accounted_for(mixed: Any) -> None:
    job, found = mixed
    funnel = json.loads(Path(job.layout.funnel).read_text())
    assert funnel["in"] == len(found) + 1 == 16
    assert funnel["dead_letters"] == {"undecodable_image": 1}
    dropped = sum(rule["dropped"] for rule in funnel["rules"])
    assert funnel["in"] == dropped + funnel["survivors"] + 1


def test_the_group_is_a_column(mixed: Any) -> None:
    job, _ = mixed
    rows = [r for shard in job.shards for r in tables.read_table(job.layout.decisions(shard.name))]
    group = {int(r["uid"], 16): r["near_duplicate_group"] and int(r["near_duplicate_group"], 16) for r in rows}
    assert {n: group[n] for n in (1, 2, 3, 12, 21, 22, 23, 41)} == {1: 1, 2: 1, 3: 1, 12: 11, 21: 21, 22: 21, 23: 22,
                                                                   41: None}  # fmt: skip
    rank = {int(r["uid"], 16): r["near_duplicate_rank"] for r in rows}
    assert [rank[n] for n in (21, 22, 23, 31, 32, 33, 41, 51, 52, 53)] == [0, 0, 1, None, 0, 1, None, 0, 1, None]


def test_stage_2_scores_keepers_and_further_members(mixed: Any) -> None:
    job, _ = mixed
    cache = job.score_cache
    kept = {key for shard in job.shards for key in cache._kept(shard)}
    assert kept == {f"k{n}" for n in (1, 2, 3, 11, 12, 21, 22, 23, 32, 33, 34, 41, 51, 52)}
    assert sum(cache.count_wanted(shard) for shard in job.shards) == 0  # 11 is a dead letter, which holds
