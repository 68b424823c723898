"""Distances, coefficients and their intervals by hand and by coverage."""

import math

import numpy as np
import pytest

from lab.measure import task2vec


def some(n, seed=0, size=50):
    """Of the sizes that squared gradients have, where epsilon is not nothing."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(-16, 3, (n, size))).astype(np.float32)


def by_hand(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    total = a + b + 1e-8
    x, y = a / total, b / total
    return 1 - (x * y).sum() / (np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))


def test_distances_are_the_formula():
    a, b = some(3), some(37, seed=1)  # more than one part of 16
    a[:, :7], b[::2, 3:11] = 0, 0  # tokens that a batch does not have
    expected = [[by_hand(x, y) for y in b] for x in a]
    got = task2vec.distances(a, b)
    assert got.shape == (3, 37) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(task2vec.distances(b, a).T, got, rtol=1e-12)  # symmetric


def test_the_distance_is_0_of_equals_and_1_of_what_shares_nothing():
    a = some(4)
    a[:, :5] = 0
    assert np.abs(np.diag(task2vec.distances(a, a))).max() < 1e-12
    left, right = a.copy(), a.copy()
    left[:, :25], right[:, 25:] = 0, 0
    np.testing.assert_allclose(task2vec.distances(left, right), 1)
    assert abs(task2vec.distances(a[:1], 10 * a[:1])[0, 0]) < 1e-12  # size alone is no distance


def test_pairwise_is_distances_with_nothing_on_the_diagonal():
    a = some(20)
    table, expected = task2vec.pairwise(a), task2vec.distances(a, a)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    assert np.array_equal(table, table.T) and not np.diag(table).any()
    assert task2vec.pairwise(a[:1]).tolist() == [[0]]


def test_the_coefficient_takes_pairs_by_place_so_equal_batches_count_with_0():
    a = some(2)[[0, 0, 1]]
    distance = by_hand(a[0], a[2])
    assert task2vec.coefficient(task2vec.pairwise(a)) == pytest.approx(2 / 3 * distance, rel=1e-12)
    assert task2vec.coefficient(task2vec.pairwise(a[[0, 0, 0]])) == pytest.approx(0, abs=1e-12)
    table = np.array([[0, 0, 0.3], [0, 0, 0.6], [0.3, 0.6, 0]])  # exactly 0, where "non-zero" would drop it
    assert task2vec.coefficient(table) == pytest.approx(0.3, rel=1e-12)
    assert math.isnan(task2vec.coefficient(task2vec.pairwise(a[:1])))


def test_the_order_of_batches_does_not_matter():
    a, order = some(7), np.random.default_rng(0).permutation(7)
    straight, shuffled = task2vec.pairwise(a), task2vec.pairwise(a[order])
    np.testing.assert_allclose(shuffled, straight[np.ix_(order, order)], rtol=1e-12)
    expected = np.mean([by_hand(a[i], a[j]) for i in range(7) for j in range(i)])
    for table in (straight, shuffled):
        assert task2vec.coefficient(table) == pytest.approx(expected, rel=1e-12)


def test_intervals_cover_their_point():
    table, cross = task2vec.pairwise(some(9)), task2vec.distances(some(9), some(5, seed=1))
    low, high = task2vec.coefficient_interval(table)
    assert low < task2vec.coefficient(table) < high
    low, high = task2vec.cross_interval(cross)
    assert low < cross.mean() < high


@pytest.mark.parametrize("n", [3, 4, 30])
def test_where_all_distances_are_equal_the_interval_is_a_point(n):
    """A batch is no pair with itself: with its distance of 0 the interval would lie under it."""
    np.testing.assert_allclose(task2vec.coefficient_interval(np.ones((n, n)) - np.eye(n)), 1, rtol=1e-12)


def test_fewer_than_three_batches_have_no_interval():
    for n in (1, 2):
        assert all(math.isnan(value) for value in task2vec.coefficient_interval(np.zeros((n, n))))
        assert all(math.isnan(value) for value in task2vec.cross_interval(np.ones((n, 9))))
    assert not any(math.isnan(value) for value in task2vec.coefficient_interval(np.ones((3, 3)) - np.eye(3)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 20])
def test_the_interval_of_a_coefficient_holds_the_true_mean_distance_in_about_95_of_100(n):
    """Each batch has a share in all its distances: an interval of pairs as if apart is too small."""
    rng, sets = np.random.default_rng(0), 600
    held, naive = 0, 0
    for _ in range(sets):
        share, noise = rng.normal(0, 0.1, n), np.triu(rng.normal(0, 0.05, (n, n)), 1)
        table = 1 + share[:, None] + share + noise + noise.T
        np.fill_diagonal(table, 0)
        low, high = task2vec.coefficient_interval(table)
        held += low <= 1 <= high
        pairs = table[np.triu_indices(n, 1)]
        naive += abs(pairs.mean() - 1) <= 1.96 * pairs.std(ddof=1) / math.sqrt(len(pairs))
    assert 0.92 < held / sets < 0.98, held / sets  # 0.95 of 3,000; 3 standard errors of 600 sets are 0.027
    assert naive / sets < 0.8


def test_the_interval_of_a_cross_distance_holds_the_true_mean_in_95_of_100():
    rng, n, m, sets = np.random.default_rng(0), 10, 14, 300
    held = 0
    for _ in range(sets):
        rows, columns = rng.normal(0, 0.1, (n, 1)), rng.normal(0, 0.1, m)
        low, high = task2vec.cross_interval(1 + rows + columns + rng.normal(0, 0.05, (n, m)))
        held += low <= 1 <= high
    assert 0.92 < held / sets < 0.995, held / sets  # Welch's freedom, taken low: a little wide


def test_both_sets_of_a_cross_distance_count():
    one = np.random.default_rng(0).normal(0.5, 0.1, (8, 1))
    for table in (np.tile(one, 6), np.tile(one, 6).T):  # only rows differ, only columns
        low, high = task2vec.cross_interval(table)
        assert high - low > 0.05 and low < 0.5 < high
