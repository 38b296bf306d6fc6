"""The complete stage 3 agrees with the formulas for every sample, in any order and with any number of workers."""

import math
import types

import numpy as np
import pytest

from tests.transforms.distribution_alignment.alignment_graph import make_candidates, place
from transforms.core.recipe import (
    CidsSettings,
    ClustersSettings,
    DigitEnhancementSettings,
    DistributionAlignmentSettings,
    QualityDuplicationSettings,
    TargetSettings,
)
from transforms.distribution_alignment.clusters import load_centroids
from transforms.distribution_alignment.copies import UnreachableTargetError
from transforms.distribution_alignment.hashing import draw
from transforms.distribution_alignment.semantic_dedup import SemanticDedupSettings
from transforms.distribution_alignment.vectors import unit_rows
from transforms.storage import files

D = 16
NOBODY = make_candidates(np.empty((0, D)))


@pytest.fixture(scope="module")
def candidates():
    """Samples around 6 centres, some duplicated, one far from all others, and one isolated pair."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, D))
    rows = centres[rng.integers(6, size=150)] + 0.5 * rng.normal(size=(150, D))
    twice = rows[:40] + 0.01 * rng.normal(size=(40, D))
    return make_candidates(np.concatenate([rows, twice]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    rng = np.random.default_rng(1)
    path = str(tmp_path_factory.mktemp("tasks") / "tasks.npz")
    vectors = {name: rng.normal(size=(m, D)).astype(np.float32) for name, m in (("digits", 3), ("pets", 2))}
    np.savez(path, **vectors, __model__="a model")
    return path


def everything(tasks, **changes):
    options = {
        "target": TargetSettings(samples=200),
        "max_copies": 4.0,
        "clusters": ClustersSettings(count=9, iterations=5),
        "semantic_dedup": SemanticDedupSettings(),
        "cids": CidsSettings(tasks=tasks, task_weights={"digits": 3.0, "pets": 1.0}),
        "quality_duplication": QualityDuplicationSettings(w1=1.0, w2=3.0),
        "digit_enhancement": DigitEnhancementSettings(),
    }
    return DistributionAlignmentSettings(**{**options, **changes})


def by_the_formulas(candidates, settings, centroids, seed, pool_count=0):
    """The formulas, one sample at a time in float64, with λ by bisection: uid → (cluster, keeper, E, copies)."""
    units = unit_rows(candidates.embeddings).astype(np.float64)
    uids = [uid.decode() for uid in candidates.uids]
    cluster = (units @ centroids.T.astype(np.float64)).argmax(axis=1)
    best_first = sorted(range(len(uids)), key=lambda i: (-candidates.cosines[i], uids[i]))
    keeper = dict.fromkeys(best_first, "")
    if settings.semantic_dedup:
        for place_of, x in enumerate(best_first):
            for y in best_first[:place_of]:
                if cluster[x] == cluster[y] and units[x] @ units[y] > 1 - settings.semantic_dedup.epsilon:
                    keeper[x] = uids[y]
                    break
    late = settings.semantic_dedup and settings.semantic_dedup.after_duplication
    counted = [x for x in best_first if late or not keeper[x]]
    members = [[x for x in reversed(counted) if cluster[x] == c] for c in range(len(centroids))]
    n = np.array([len(m) for m in members])

    p = n / n.sum()
    if settings.cids:
        with np.load(settings.cids.tasks) as file:
            vectors = {t: unit_rows(file[t]) for t in settings.cids.task_weights}
        total = sum(settings.cids.task_weights.values())
        p = np.zeros(len(centroids))
        for task, w in settings.cids.task_weights.items():
            s = (centroids.astype(np.float64) @ vectors[task].T.astype(np.float64)).max(axis=1)
            likeness = np.where(n > 0, n * np.exp(s / settings.cids.temperature), 0)
            p += w / total * likeness / likeness.sum()

    quality = settings.quality_duplication or QualityDuplicationSettings(w1=1.0, w2=1.0)
    share = {}
    for c, ranks in enumerate(members):
        heights = np.linspace(0, 1, len(ranks)) if len(ranks) > 1 else np.full(len(ranks), 0.5)
        weights = quality.w1 + (quality.w2 - quality.w1) * heights
        share.update({x: p[c] / n[c] * w / weights.mean() for x, w in zip(ranks, weights, strict=True)})
    survivors = sum(not keeper[x] for x in best_first)
    target = settings.target.samples
    if target is None:
        target = settings.target.pool_share * pool_count if settings.target.pool_share else survivors
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        enough = math.fsum(min(settings.max_copies, middle * s) for s in share.values()) >= target
        low, high = (low, middle) if enough else (middle, high)

    found = {}
    for x, uid in enumerate(uids):
        expected = 0.0 if keeper[x] else min(settings.max_copies, high * share[x])
        digits = settings.digit_enhancement
        if digits and not keeper[x] and candidates.digits[x] >= digits.min_digit_probability:
            expected = max(expected, digits.floor_copies)
        whole = math.floor(expected)
        copies = whole + (draw("copies", seed, uid) < expected - whole)
        found[uid] = (int(cluster[x]), keeper[x], expected, copies)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"semantic_dedup": SemanticDedupSettings(after_duplication=True), "target": TargetSettings(survivors=True)},
        {
            "semantic_dedup": None,
            "cids": None,
            "quality_duplication": None,
            "digit_enhancement": None,
            "target": TargetSettings(pool_share=0.2),
        },
    ],
    ids=["everything", "after_duplication", "nothing"],
)
def test_every_sample_agrees_with_the_formulas(candidates, tasks, tmp_path, changes):
    settings = everything(tasks, **changes)
    placements, table = place(candidates, settings, str(tmp_path), pool_count=300, seed=11)
    centroids = load_centroids(str(tmp_path / "centroids.npy"))
    oracle = by_the_formulas(candidates, settings, centroids, 11, pool_count=300)

    assert [p.uid for p in placements] == sorted(oracle)
    for p in placements:
        cluster, keeper, expected, copies = oracle[p.uid]
        assert (p.cluster, p.semantic_duplicate_of, p.copies) == (cluster, keeper, copies)
        assert p.expected_copies == pytest.approx(expected, rel=1e-12)
    assert {p.uid: p.shard for p in placements} == {
        uid.decode(): shard.decode() for uid, shard in zip(candidates.uids, candidates.shards, strict=True)
    }

    total = math.fsum(p.expected_copies for p in placements)
    added = math.fsum(row["digit_addition"] for row in table)
    if "semantic_dedup" in changes and settings.semantic_dedup:  # the share of the duplicates is lost
        assert any(p.semantic_duplicate_of for p in placements)
        assert total - added < sum(not p.semantic_duplicate_of for p in placements) - 1
    else:
        target = 200 if settings.target.samples else 60
        assert total - added == pytest.approx(target, rel=1e-9)
        assert (added > 1) == (settings.digit_enhancement is not None)
    for row in table:
        members = [p for p in placements if p.cluster == row["cluster"]]
        dropped = sum(bool(p.semantic_duplicate_of) for p in members)
        late = settings.semantic_dedup and settings.semantic_dedup.after_duplication
        assert row["size"] == len(members) - (0 if late else dropped)
        assert row["semantic_duplicates"] == dropped
        assert row["copies"] == sum(p.copies for p in members)
        assert row["expected_copies"] == pytest.approx(math.fsum(p.expected_copies for p in members), abs=1e-9)
    assert [row["cluster"] for row in table] == list(range(len(centroids)))
    assert math.fsum(row["importance"] for row in table) == pytest.approx(1)
    assert ("similarity_digits" in table[0]) == (settings.cids is not None)


TWO_WORKERS = {"direct_num_workers": 2, "direct_running_mode": "multi_processing"}


PARALLEL = [(1024, {}), (7, {}), (1024, TWO_WORKERS)]


@pytest.mark.parametrize("runs", [PARALLEL[:2], pytest.param(PARALLEL[::2], marks=pytest.mark.slow)])
def test_no_order_batch_or_number_of_workers_changes_anything(candidates, tasks, tmp_path, monkeypatch, runs):
    clusters = ClustersSettings(count=9, iterations=5, samples_per_cluster=13)
    assert_nothing_changes(candidates, everything(tasks, clusters=clusters), tmp_path, monkeypatch, runs)


def test_results_do_not_depend_on_order_with_two_levels_and_several_tiles(candidates, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("transforms.distribution_alignment.tiles.TILE_ROWS", 8)
    clusters = ClustersSettings(count=7, coarse_count=3, iterations=5, samples_per_cluster=20)
    table = assert_nothing_changes(candidates, everything(tasks, clusters=clusters), tmp_path, monkeypatch, PARALLEL)
    assert len(table) == 7
    assert max(row["size"] for row in table) > 16


def assert_nothing_changes(candidates, settings, folder, monkeypatch, runs):
    """Each run has an order of its own, and its rows in a batch and options of Beam; the table of clusters."""
    results = []
    for run, (batch_rows, options) in enumerate(runs):
        monkeypatch.setattr("transforms.distribution_alignment.clusters._BATCH_ROWS", batch_rows)
        shuffled = candidates.take(np.random.default_rng(run).permutation(len(candidates)))
        found = place(shuffled, settings, str(folder / str(run)), **options)
        results.append((*found, (folder / str(run) / "centroids.npy").read_bytes()))
    placements, table, _ = results[0]
    for other in results[1:]:
        assert other == results[0]
    assert any(p.copies > 1 for p in placements)
    return table


@pytest.mark.parametrize(("tile_rows", "after"), [(3, False), (40, True)])
def test_a_cluster_in_tiles_gives_the_same_result_as_one_tile(
    candidates, tasks, tmp_path, monkeypatch, tile_rows, after
):
    settings = everything(
        tasks,
        clusters=ClustersSettings(count=2, iterations=5),
        semantic_dedup=SemanticDedupSettings(after_duplication=after),
    )
    whole = place(candidates, settings, str(tmp_path / "whole"), seed=11)
    monkeypatch.setattr("transforms.distribution_alignment.tiles.TILE_ROWS", tile_rows)
    assert place(candidates, settings, str(tmp_path / "tiles"), seed=11) == whole
    assert len(list((tmp_path / "tiles" / "work" / "tiles").iterdir())) >= 150 // tile_rows
    assert not (tmp_path / "whole" / "work" / "tiles").exists()


def test_embeddings_through_the_shuffle_or_from_disk_are_the_same(candidates, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("transforms.distribution_alignment.tiles.TILE_ROWS", 40)
    settings = everything(tasks, clusters=ClustersSettings(count=2, iterations=5))
    from_disk = place(candidates, settings, str(tmp_path / "disk"))
    elsewhere = types.SimpleNamespace(**{**vars(files), "in_cloud_storage": lambda path: True})
    monkeypatch.setattr("transforms.distribution_alignment.tiles.files", elsewhere)
    monkeypatch.setattr("transforms.distribution_alignment.work_folder.EmbeddingSlice.read", None)
    assert place(candidates, settings, str(tmp_path / "shuffle")) == from_disk


def test_given_centroids_are_used_without_training(candidates, tmp_path):
    given = str(tmp_path / "given.npy")
    np.save(given, np.eye(3, D, dtype=np.float32))
    settings = DistributionAlignmentSettings(
        target=TargetSettings(survivors=True), clusters=ClustersSettings(centroids=given)
    )
    placements, table = place(candidates, settings, str(tmp_path / "run"))
    units = unit_rows(candidates.embeddings)
    assert [p.cluster for p in placements] == units[:, :3].argmax(axis=1).tolist()
    assert len(table) == 3
    assert [p.copies for p in placements] == [1] * len(candidates)
    assert not (tmp_path / "run" / "centroids.npy").exists()


@pytest.mark.parametrize("target", [TargetSettings(pool_share=0.2), TargetSettings(survivors=True)])
def test_the_graph_runs_without_candidates(tasks, tmp_path, target):
    placements, table = place(NOBODY, everything(tasks, target=target), str(tmp_path), pool_count=1000)
    assert (placements, table) == ([], [])
    assert np.load(tmp_path / "centroids.npy").shape == (0, 0)


def test_an_unreachable_target_fails_the_graph_with_the_reason(tasks, tmp_path):
    with pytest.raises(UnreachableTargetError, match=r"allows 0 from 0 samples, 7 too few"):
        place(NOBODY, everything(tasks, target=TargetSettings(samples=7)), str(tmp_path))


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_samples(candidates, tasks, tmp_path, count):
    some = candidates.take(slice(1, 1 + count))
    placements, table = place(some, everything(tasks, target=TargetSettings(samples=count)), str(tmp_path))
    assert math.fsum(p.expected_copies for p in placements) == pytest.approx(count)
    assert sum(row["size"] for row in table) == count
