"""Metrics and intervals against formulas and by coverage."""

import numpy as np
import pytest

import core
from lab.measure import statistics


def test_metrics_against_formulas():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet([1, 1, 1], 500)
    labels = np.array([rng.choice(3, p=p) for p in probs])
    m = core.classification_metrics(np.log(probs), labels, np.arange(500), [0.5, 0.3, 0.2], ["A", "B", "tie"])
    assert m["log_loss"] == pytest.approx(-np.mean(np.log(probs[np.arange(500), labels])))
    assert m["accuracy"] == np.mean(probs.argmax(1) == labels)
    assert m["uniform_log_loss"] == pytest.approx(1.0986, abs=1e-4)
    shares = np.bincount(labels) / 500
    assert m["prior_log_loss"] == pytest.approx(-(shares * np.log([0.5, 0.3, 0.2])).sum())
    assert m["prior_accuracy"] == shares[0]
    half = 1.96 * np.std(probs.argmax(1) == labels) / np.sqrt(500)
    np.testing.assert_allclose(
        m["accuracy_interval"], [m["accuracy"] - half, m["accuracy"] + half], atol=0.006
    )
    assert m["alarm"] is None


def test_the_alarm_knows_a_model_that_learnt_nothing():
    labels = np.arange(300) % 3
    always = np.log(np.tile([0.2, 0.2, 0.6], (300, 1)))
    names = ["A", "B", "tie"]
    m = core.classification_metrics(always, labels, np.arange(300), [1 / 3] * 3, names)
    assert m["alarm"] == "NOT LEARNING: every one of 300 rows is called 'tie'"
    noise = np.log(np.random.default_rng(0).dirichlet([20, 20, 20], 300))
    m = core.classification_metrics(noise, labels, np.arange(300), [1 / 3] * 3, names)
    assert "is above the class shares' 1.0986" in m["alarm"]
    sure = np.log(np.eye(3)[(labels + (np.arange(300) % 13 < 5)) % 3] * 0.76 + 0.08)
    m = core.classification_metrics(sure, labels, np.arange(300), [1 / 3] * 3, names)
    low, high = m["above_prior_interval"]
    assert low < 0 < high and "cannot be told from the class shares' 1.0986" in m["alarm"]


@pytest.mark.parametrize("classes", [[0], [0, 1]])
def test_far_above_a_prior_that_knows_the_absent_classes_is_not_called_the_same(classes):
    """Of one class alone the class shares' loss is 0: 0.7 was "not to be told" from it."""
    labels = np.resize(classes, 300)
    wrong = np.log(np.random.default_rng(0).dirichlet([2, 2, 2], 300))
    shares = np.bincount(labels, minlength=3) / 300
    m = core.classification_metrics(wrong, labels, np.arange(300), shares, ["A", "B", "tie"])
    prior = np.log(len(classes))
    assert m["prior_log_loss"] == pytest.approx(prior, abs=1e-9) and m["log_loss"] > prior + 0.3
    assert f"is above the class shares' {prior:.4f}" in m["alarm"]


def test_intervals_respect_groups_and_are_never_of_width_zero():
    values = np.repeat(np.random.default_rng(0).normal(size=40), 25)[
        :, None
    ]  # 40 prompts, 25 equal rows each
    low, high = core.bootstrap(values, np.repeat(np.arange(40), 25))[0]
    alone_low, alone_high = core.bootstrap(values, np.arange(1000))[0]
    assert (high - low) > 3 * (alone_high - alone_low)
    assert core.bootstrap(np.ones((60, 1)), np.arange(60))[0].tolist() == [0.95, 1]
    assert core.bootstrap(np.zeros((60, 1)), np.arange(60))[0].tolist() == [0, 0.05]


def test_one_group_and_equal_values_say_nothing_of_the_spread():
    values = np.random.default_rng(0).normal(size=(50, 1))
    assert np.isnan(core.bootstrap(values, np.zeros(50))).all()
    ratio = {"of": lambda means: means * 2}
    assert np.isnan(core.bootstrap(values, np.zeros(50), **ratio)).all()
    assert core.bootstrap(np.c_[np.zeros(50), np.ones(50)], np.zeros(50)).tolist() == [[0, 1], [0, 1]]
    intervals = core.bootstrap(np.c_[values, np.full(50, 0.71)], np.arange(50))
    assert not np.isnan(intervals[0]).any() and np.isnan(intervals[1]).all()
    assert statistics.plus_minus(0.71, intervals[1]) == "0.710 ± unknown"
    assert statistics.plus_minus(0.71, None) == "0.710 ± unknown"
    assert statistics.span(intervals[1]) == "unknown" and statistics.span([0, 1], 1, "+") == "+0.0 to +1.0"
    m = statistics.language_metrics(
        np.c_[10 + values, values > 0, np.full(50, 9)], [0] * 50, 99 + values[:, 0]
    )
    assert np.isnan(m["loss_interval"]).all() and m["loss"] < m["unigram_loss"]
    assert statistics.not_below(m["above_unigram_interval"]) == "cannot be told from"
    assert [statistics.not_below(i) for i in ([-2, -1], [-1, 1], [1, 2])] == [
        None,
        "cannot be told from",
        "is above",
    ]


@pytest.mark.slow
def test_intervals_cover_the_truth_95_times_in_100():
    """Losses are skewed and go by prompt: 100 prompts of three rows each."""
    rng, hits, trials = np.random.default_rng(0), 0, 1000
    prompts = np.repeat(np.arange(100), 3)
    for trial in range(trials):
        values = rng.exponential(size=(300, 1)) + rng.normal(size=100)[prompts, None]
        low, high = core.bootstrap(values, prompts, samples=500, seed=trial)[0]
        hits += low <= 1 <= high
    assert 0.935 <= hits / trials <= 0.965


def test_weights_of_the_bootstrap_equal_repeated_rows():
    rng = np.random.default_rng(0)
    values, groups, weights = rng.normal(size=(60, 2)), rng.integers(0, 12, 60), rng.integers(1, 5, 60)
    weighted = core.bootstrap(values, groups, weights=weights, samples=300)
    repeated = core.bootstrap(np.repeat(values, weights, 0), np.repeat(groups, weights), samples=300)
    np.testing.assert_allclose(weighted, repeated, rtol=0, atol=1e-12)  # the same draws, other roundings
    assert np.abs(weighted - core.bootstrap(values, groups, samples=300)).max() > 1e-3
    even = core.bootstrap(values, groups, weights=np.full(60, 7.0), samples=300)
    np.testing.assert_allclose(even, core.bootstrap(values, groups, samples=300), rtol=0, atol=1e-12)
