"""Known differences and known noise: intervals hold the truth 19 times in 20."""

import re

import numpy as np
import pytest
import scipy.stats
from toys.compare import compared

from lab.compare import difference
from lab.compare.rows import Rows
from lab.measure import statistics


def test_one_run_a_side_is_a_paired_bootstrap_by_group_and_students_quantile_is_scipys():
    rng = np.random.default_rng(1)
    groups, weights = rng.integers(0, 60, 200), rng.integers(1, 40, 200)
    sums = rng.gamma(2, 1, (2, 200)) * weights + rng.normal(size=60)[groups]
    found = compared(sums, 1, weights, groups)
    of_groups = np.array([np.bincount(groups, values, 60) for values in (sums[0] - sums[1], weights)])
    assert found["difference"] == pytest.approx(of_groups[0].sum() / weights.sum(), rel=1e-12)
    draws = of_groups @ rng.multinomial(60, np.ones(60) / 60, 4000).T
    wanted = np.percentile(draws[0] / draws[1], [2.5, 97.5])
    np.testing.assert_allclose(found["interval"], wanted, atol=0.08 * np.ptp(wanted))
    for freedom in (1, 2, 3.7, 4, 10, 100, 20_000):
        assert statistics.student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-3)


@pytest.mark.parametrize(
    ("seeds", "noise", "trials"),
    [
        ((1, 1), 0.0, 120),
        ((3, 3), 0.02, 120),
        ((3, 1), 0.3, 120),
        pytest.param((3, 3), 0.1, 1000, marks=pytest.mark.slow),
        pytest.param((3, 1), 0.3, 500, marks=pytest.mark.slow),
    ],
)
def test_intervals_hold_the_truth_19_times_in_20(seeds, noise, trials):
    rng, hits, groups = np.random.default_rng(sum(seeds)), 0, np.repeat(np.arange(150), 2)
    for _ in range(trials):
        weights = rng.integers(1, 40, 300).astype(float)
        both = rng.exponential(1, 150)[groups] + rng.normal(size=300)
        shift = 0.1 + 0.5 * (rng.exponential(1, 150)[groups] - 1) + 0.2 * rng.normal(size=300)
        runs = [both + shift] * seeds[0] + [both] * seeds[1]
        runs += 0.3 * rng.normal(size=(len(runs), 300)) + noise * rng.normal(size=(len(runs), 1))
        low, high = compared(runs * weights, seeds[0], weights, groups)["interval"]
        hits += low <= 0.1 <= high
    assert abs(hits / trials - 0.95) <= (0.045 if trials == 120 else 0.03 if seeds == (3, 1) else 0.015)


def test_what_is_needed_shows_the_difference_four_times_in_five():
    rng, pilot = np.random.default_rng(3), np.random.default_rng(4).normal(size=80)
    said = difference.needed(compared([(pilot - pilot.mean()) / pilot.std() + 0.2, 0 * pilot], 1))
    n = int(re.fullmatch(r"about (\d+) would be needed", said)[1])
    assert n == pytest.approx(2.8**2 / 0.2**2, rel=0.2)  # rows
    found = [compared([rng.normal(0.2, 1, n), np.zeros(n)], 1)["interval"][0] > 0 for _ in range(120)]
    assert 0.68 <= np.mean(found) <= 0.92

    def with_seeds(first, second):
        return compared([a + pilot / 20 for a in first] + [b + 0 * pilot for b in second], len(first))

    said = difference.needed(with_seeds(np.array([-1, 0, 1]) + 0.9 - 0.05 * pilot.mean(), [-1, 0, 1]))
    n = int(re.fullmatch(r"about (\d+) seeds a side would be needed", said)[1])
    assert n == pytest.approx(2 * 2.8**2 / 0.9**2, rel=0.15)
    found = [with_seeds(rng.normal(0.9, 1, n), rng.normal(0, 1, n))["interval"][0] > 0 for _ in range(150)]
    assert 0.68 <= np.mean(found) <= 0.92
    assert difference.needed({"difference": 0.0}) == (
        "the means happen to be equal: any difference within the interval is possible"
    )


def said(first, second, groups=None, name="loss"):
    groups = np.arange(len(first)) if groups is None else groups
    rows = Rows(name, np.array([first, second]), np.ones(len(first)), groups)
    return difference.verdict(difference.difference(rows, [0], [1]), name, ("a", "b"))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (1, "cannot be told apart: 1 prompts or stretches of text decide nothing: 10 are the fewest"),
        (9, "cannot be told apart: 9 prompts or stretches of text decide nothing: 10 are the fewest"),
        (10, "told apart on these 90 rows: a is better"),
    ],
)
def test_a_verdict_needs_ten_groups_however_many_rows(groups, words):
    noise, group = np.random.default_rng(0).normal(size=90), np.arange(90) % groups
    text = said(noise, noise + 1 + 0.1 * noise, group)
    assert f"\n  {words}" in text and ("(unknown)" in text) == (groups == 1)
    found = compared([noise, noise, noise + 1], 2, groups=group)  # several seeds
    assert np.isnan(found["interval"]).all() == (groups == 1)


def test_equal_by_chance_and_the_same_amount_everywhere_are_said_as_what_they_are():
    right = np.random.default_rng(1).permutation(np.repeat([0.0, 1.0], 24))
    other = np.roll(right, 1)
    text = said(right, other, name="answers")
    low, high = compared([right, other], 1)["interval"]
    assert low < -0.05 and f"answers +0.0000 ({low:+.4f} to {high:+.4f})" in text
    assert "equal: any difference within the interval is possible" in text
    text = said(np.zeros(12), np.ones(12), name="accuracy")
    assert text.startswith("accuracy -1.0000 (the same on every one of 12 rows)\n  told apart")
    assert "a loss is no number" in said([np.nan] * 12, np.ones(12))


@pytest.mark.parametrize("name", ["accuracy", "answers"])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("groups", [20, 1])
def test_a_share_of_0_or_1_has_the_interval_that_the_runs_own_figures_have(name, share, groups):
    """Of one run and of several: it was `1.000 ± 0.000` beside result.json's `1.000 (0.85 to 1)`."""
    targets, group = np.arange(1.0, 61.0), np.arange(60) % groups
    own = statistics.language_metrics(np.c_[targets, share * targets, targets], group)["accuracy_interval"]
    assert own[1] - own[0] == pytest.approx(min(1, 3 / groups))
    for runs in (1, 3):
        rows = Rows(name, np.tile(share * targets, (runs, 1)), targets, group)
        assert difference.mean(rows, list(range(runs)))["interval"] == own
    half = Rows("accuracy", np.array([share * targets, 0.5 * targets]), targets, group)
    assert difference.mean(half, [0, 1])["mean"] == pytest.approx((share + 0.5) / 2)
    low, high = difference.mean(half, [0, 1])["interval"]
    assert low != high  # seeds that disagree have a spread of their own
