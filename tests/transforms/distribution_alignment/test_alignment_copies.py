"""Copies: Σ E equals the target, E does not exceed the cap, and hashes round it to whole copies."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from transforms.core.recipe import DigitEnhancementSettings, QualityDuplicationSettings, TargetSettings
from transforms.distribution_alignment.copies import (
    UnreachableTargetError,
    expected_copies,
    scaled,
    share_of_each,
    solve_scale,
    target_copies,
    total_expected,
    whole_copies,
)
from transforms.distribution_alignment.digit_enhancement import enhance
from transforms.distribution_alignment.hashing import draw
from transforms.distribution_alignment.quality_duplication import mean_weight, weights

CLUSTERS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([0.0, 1e-12, 0.1, 0.5, 1.0, 3.0])), min_size=1, max_size=7
)
QUALITIES = st.builds(
    lambda w1, rise: QualityDuplicationSettings(w1=w1, w2=w1 * rise),
    st.floats(0.1, 5),
    st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)


def arrays_of(clusters):
    sizes = np.array([size for size, _ in clusters])
    importance = np.where(sizes > 0, [p for _, p in clusters], 0.0)
    assume(importance.sum() > 0)
    return importance / importance.sum(), sizes


def every_expectation(scale, importance, sizes, quality, cap):
    factors = scaled(scale, share_of_each(importance, sizes, quality))
    return [
        expected_copies(float(f), np.arange(n), int(n), quality, cap).tolist()
        for f, n in zip(factors, sizes, strict=True)
    ]


@given(clusters=CLUSTERS, quality=QUALITIES, cap=st.floats(1, 20), fill=st.floats(0, 1))
@example(clusters=[(0, 1.0), (1, 1.0), (2, 1.0)], quality=QualityDuplicationSettings(), cap=2.0, fill=1.0)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_expectations_sum_to_any_target_that_the_cap_allows(clusters, quality, cap, fill):
    importance, sizes = arrays_of(clusters)
    target = fill * cap * int(sizes[importance > 0].sum())
    scale = solve_scale(target, importance, sizes, quality, cap)
    expectations = [e for each in every_expectation(scale, importance, sizes, quality, cap) for e in each]
    assert math.fsum(expectations) == pytest.approx(target, rel=1e-9, abs=1e-300)
    assert max(expectations) <= cap
    assert min(expectations) >= 0


@given(clusters=CLUSTERS, quality=QUALITIES, cap=st.floats(1, 20), scale=st.floats(0, 1000))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_closed_form_is_the_sum_over_samples(clusters, quality, cap, scale):
    importance, sizes = arrays_of(clusters)
    shares = share_of_each(importance, sizes, quality)
    found = total_expected(scale, shares[shares > 0], sizes[shares > 0], quality, cap)
    rows = every_expectation(scale, importance, sizes, quality, cap)
    assert found == pytest.approx(math.fsum(e for each in rows for e in each), rel=1e-12, abs=1e-300)


@given(clusters=CLUSTERS, quality=QUALITIES, fill=st.floats(0.01, 0.99), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_scale_is_the_smallest_float_in_any_order_of_clusters(clusters, quality, fill, data):
    importance, sizes = arrays_of(clusters)
    target = fill * 3.0 * int(sizes[importance > 0].sum())
    scale = solve_scale(target, importance, sizes, quality, 3.0)
    shares = share_of_each(importance, sizes, quality)
    less = total_expected(float(np.nextafter(scale, 0)), shares[shares > 0], sizes[shares > 0], quality, 3.0)
    assert less < target
    order = data.draw(st.permutations(range(len(clusters))))
    assert solve_scale(target, importance[order], sizes[order], quality, 3.0) == scale


def test_without_a_binding_cap_scale_is_the_target():
    importance, sizes = np.array([0.25, 0.75]), np.array([10, 30])
    assert solve_scale(8.0, importance, sizes, QualityDuplicationSettings(), 10.0) == pytest.approx(8, rel=1e-15)


@pytest.mark.parametrize("first", [0, 1, 7, 19, 20])
def test_splitting_a_cluster_changes_no_expectation(first):
    flat = QualityDuplicationSettings(w1=1.0, w2=1.0)

    def expectation(importance, sizes):
        p, n = np.array(importance), np.array(sizes)
        return solve_scale(30.0, p, n, flat, 1.5) * share_of_each(p, n, flat)

    whole = expectation([0.8, 0.2], [20, 10])
    parts = expectation([0.8 * first / 20, 0.8 * (20 - first) / 20, 0.2], [first, 20 - first, 10])
    assert parts[2] == pytest.approx(whole[1], rel=1e-12)
    for part, size in ((parts[0], first), (parts[1], 20 - first)):
        assert part == pytest.approx(whole[0] if size else 0, rel=1e-12)


def test_an_unreachable_target_raises_with_both_numbers():
    importance, sizes = np.array([0.5, 0.5, 0.0]), np.array([3, 1, 9])
    reached = solve_scale(8.0, importance, sizes, QualityDuplicationSettings(), 2.0)
    rows = every_expectation(reached, importance, sizes, QualityDuplicationSettings(), 2.0)
    assert rows[0] == pytest.approx([2, 2, 2], rel=1e-15)
    assert rows[1:] == [[2], [0] * 9]
    message = (
        r"target of 9 copies .*`max_copies` 2 allows 8 from 4 samples, 1 too few; raise `max_copies` to 2.25 or lower"
    )
    with pytest.raises(UnreachableTargetError, match=message):
        solve_scale(9.0, importance, sizes, QualityDuplicationSettings(), 2.0)


def test_every_sample_reaches_the_cap_even_with_a_tiny_share():
    importance, sizes = np.array([1.0, 1e-320, 0.0]), np.array([3, 2, 4])
    flat = QualityDuplicationSettings(w1=1.0, w2=1.0)
    scale = solve_scale(5.0, importance, sizes, flat, 1.0)
    assert scale == math.inf
    assert every_expectation(scale, importance, sizes, flat, 1.0) == [[1] * 3, [1] * 2, [0] * 4]


def test_without_samples_only_a_target_of_zero_is_reachable():
    nothing = np.zeros(0), np.zeros(0, int)
    assert solve_scale(0.0, *nothing, QualityDuplicationSettings(), 2.0) == 0
    with pytest.raises(UnreachableTargetError, match=r"allows 0 from 0 samples, 5 too few; lower `target`"):
        solve_scale(5.0, *nothing, QualityDuplicationSettings(), 2.0)


def test_targets():
    assert target_copies(TargetSettings(samples=12), 1000, 50) == 12
    assert target_copies(TargetSettings(pool_share=0.25), 1000, 50) == 250
    assert target_copies(TargetSettings(survivors=True), 1000, 50) == 50
    assert target_copies(TargetSettings(pool_share=0.25), 1000, 0) == 0
    assert target_copies(TargetSettings(survivors=True), 1000, 0) == 0
    assert target_copies(TargetSettings(samples=12), 1000, 0) == 12


@pytest.mark.parametrize(
    ("size", "expected"), [(0, []), (1, [2.0]), (2, [1.0, 3.0]), (3, [1.0, 2.0, 3.0]), (5, [1.0, 1.5, 2.0, 2.5, 3.0])]
)
def test_weight_rises_with_the_rank(size, expected):
    rule = QualityDuplicationSettings(w1=1.0, w2=3.0)
    assert weights(np.arange(size), size, rule).tolist() == expected
    assert weights(np.arange(size)[::-1], size, rule).tolist() == expected[::-1]


@given(size=st.integers(1, 60), quality=QUALITIES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_mean_weight_is_the_mean_of_the_weights(size, quality):
    found = weights(np.arange(size), size, quality)
    assert math.fsum(found) / size == pytest.approx(mean_weight(quality), rel=1e-12)


@pytest.mark.parametrize(
    ("expected", "probability", "cap", "enhanced"),
    [
        (0.5, 0.75, 10.0, 2.0),  # at the threshold
        (0.5, np.nextafter(np.float32(0.75), np.float32(0)), 10.0, 0.5),  # just below
        (0.5, -1.0, 10.0, 0.5),  # no digit score
        (3.0, 0.9, 10.0, 3.0),  # already above the floor
        (0.5, 0.9, 1.5, 1.5),  # the cap is below the floor
    ],
)
def test_samples_with_digits_get_a_floor(expected, probability, cap, enhanced):
    rule = DigitEnhancementSettings(min_digit_probability=0.75, floor_copies=2.0)
    column = np.array([probability, -1.0], np.float32)
    assert enhance(np.array([expected, 0.25]), column, rule, cap).tolist() == [enhanced, 0.25]


def test_a_stored_probability_is_compared_with_the_threshold_itself():
    below, above = np.float32(0.7), np.float32(0.6)  # in float64: 0.69999999 and 0.60000002
    for probability, threshold, enhanced in ((below, 0.7, 0.5), (above, 0.6, 2.0)):
        rule = DigitEnhancementSettings(min_digit_probability=threshold)
        assert enhance(np.array([0.5]), np.array([probability]), rule, 10.0).tolist() == [enhanced]


def test_a_sample_without_a_digit_score_is_unchanged_at_the_lowest_threshold():
    found = enhance(
        np.array([0.5]), np.array([-1.0], np.float32), DigitEnhancementSettings(min_digit_probability=0.0), 10.0
    )
    assert found.tolist() == [0.5]


UIDS = [f"{index:032x}" for index in range(20_000)]


def whole_copies_of(expectations, seed, uids):
    return whole_copies(np.array(expectations, float), seed, np.array([uid.encode() for uid in uids], "S32")).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("scale", [0.02, 1.0, 7.5])
def test_whole_copies_sum_to_the_expectation_within_the_bound(seed, scale):
    expectations = [scale * (index % 101) / 100 for index in range(len(UIDS))]
    whole = whole_copies_of(expectations, seed, UIDS)
    parts = [e - math.floor(e) for e in expectations]
    bound = 4 * math.sqrt(math.fsum(f * (1 - f) for f in parts))
    assert abs(sum(whole) - math.fsum(expectations)) <= bound
    assert all(w in (math.floor(e), math.ceil(e)) for w, e in zip(whole, expectations, strict=True))


@given(
    expectations=st.lists(st.floats(0, 10) | st.sampled_from([0.0, 1.0, 0.5, 1 / 3]), max_size=40),
    seed=st.integers(0, 5),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_samples_in_another_order_or_tile_get_the_same_copies(expectations, seed, data):
    uids = UIDS[: len(expectations)]
    whole = whole_copies_of(expectations, seed, uids)
    order = data.draw(st.permutations(range(len(uids))))
    assert whole_copies_of([expectations[i] for i in order], seed, [uids[i] for i in order]) == [
        whole[i] for i in order
    ]
    cut = data.draw(st.integers(0, len(uids)))
    parts = [whole_copies_of(expectations[part], seed, uids[part]) for part in (slice(cut), slice(cut, None))]
    assert parts[0] + parts[1] == whole
    bound = 4 * math.sqrt(math.fsum(e % 1 * (1 - e % 1) for e in expectations))
    assert abs(sum(whole) - math.fsum(expectations)) <= bound + 1e-9


def test_the_fraction_is_compared_with_the_draw():
    u = draw("copies", 5, UIDS[0])
    below, above = float(np.nextafter(u, 0)), float(np.nextafter(u, 1))
    assert whole_copies_of([below, u, above], 5, [UIDS[0]] * 3) == [0, 0, 1]
    assert whole_copies_of([0.0, 2.0, 3 + u - 2**-40, 3 + u + 2**-40], 5, [UIDS[0]] * 4) == [0, 2, 3, 4]


def test_draws_are_uniform_and_differ_by_seed_and_purpose():
    draws = np.array([draw("copies", 0, uid) for uid in UIDS])
    counts = np.bincount((draws * 100).astype(int), minlength=100)
    assert len(counts) == 100  # all in [0, 1)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 58 < chi_square < 148  # 99 degrees of freedom: outside with probability 0.001 on either side
    for other in (("copies", 1), ("clusters", 0)):
        others = np.array([draw(*other, uid) for uid in UIDS])
        assert abs(np.corrcoef(draws, others)[0, 1]) < 0.03


def test_draws_are_stable_across_versions():
    assert draw("copies", 0, "0" * 32) == 0.34918081339147033
