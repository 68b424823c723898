"""Every figure of the report card against scikit-learn, scipy, or a loop that computes it once more."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model
import sklearn.metrics

from core import UserError
from lab.measure import preference
from lab.run import files

NAMES = ["A", "B", "tie"]


def verdicts(n=400, seed=0, symmetric=True, **changes):
    """Verdicts that know a little: three rows a prompt, longer answers preferred."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=[0.4, 0.38, 0.22])
    logits = rng.normal(size=(n, 2, 3)) + 1.2 * np.eye(3)[labels][:, None]
    lengths = rng.integers(0, 300, (n, 2)) + 80 * np.eye(3, dtype=int)[labels][:, :2]
    lengths[:5] = 7  # equally long
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    prior = np.tile([0.4, 0.38, 0.22], (n, 1))
    by_length = preference.length_only(lengths, labels, np.arange(n), np.arange(n))
    facts = {"log_probs": log_probs, "labels": labels, "lengths": lengths, "prior": prior}
    facts |= {"groups": rng.integers(0, n // 3, n), "cut": rng.random(n) < 0.3, "by_length": by_length}
    facts |= {"temperatures": np.full(n, 1.3), "symmetric": symmetric}
    return preference.Verdicts(**facts | changes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_figure_of_the_card_is_computed_once_more(symmetric):
    v = verdicts(symmetric=symmetric)
    card = preference.make_card(v, NAMES)
    one, two = np.exp(v.log_probs[:, 0]), np.exp(v.log_probs[:, 1])
    averaged = np.sqrt(one * two) / np.sqrt(one * two).sum(1, keepdims=True)  # of logits: a geometric mean
    probs = averaged if symmetric else one
    chosen, y = probs.argmax(1), v.labels
    log_loss, accuracy = sklearn.metrics.log_loss, sklearn.metrics.accuracy_score
    recall = sklearn.metrics.recall_score(y, chosen, average=None)
    longer = np.array([2 if a == b else int(b > a) for a, b in v.lengths])
    decided = (chosen < 2) & (longer < 2)
    truly = (y < 2) & (longer < 2)
    tempered = probs ** (1 / 1.3)
    tempered /= tempered.sum(1, keepdims=True)
    wanted = {
        "log_loss": log_loss(y, probs),
        "accuracy": accuracy(y, chosen),
        "prior_log_loss": log_loss(y, v.prior),
        "above_prior": log_loss(y, probs) - log_loss(y, v.prior),
        "one_order_log_loss": log_loss(y, one),
        "one_order_accuracy": accuracy(y, one.argmax(1)),
        "averaged_log_loss": log_loss(y, averaged),
        "averaged_accuracy": accuracy(y, averaged.argmax(1)),
        "averaged_above_one_order": log_loss(y, averaged) - log_loss(y, one),
        "length_only_log_loss": log_loss(y, np.exp(v.by_length)),
        "length_only_accuracy": accuracy(y, v.by_length.argmax(1)),
        "above_length_only": log_loss(y, probs) - log_loss(y, np.exp(v.by_length)),
        "flip_rate": sum(a.argmax() != b.argmax() for a, b in zip(one, two, strict=True)) / len(y),
        "recall_A": recall[0],
        "recall_B": recall[1],
        "recall_tie": recall[2],
        "macro_f1": sklearn.metrics.f1_score(y, chosen, average="macro"),
        "brier": sum(((p - np.eye(3)[label]) ** 2).sum() for p, label in zip(probs, y, strict=True)) / len(y),
        "calibration_error": calibration_error_by_hand(probs, y),
        "prefers_longer": (chosen[decided] == longer[decided]).mean(),
        "truth_prefers_longer": (y[truly] == longer[truly]).mean(),
        "tempered_log_loss": log_loss(y, tempered),
        "tempered_accuracy": accuracy(y, chosen),
        "temperature": 1.3,
        "rows": 400,
        "prompts": len(set(v.groups)),
        "uniform_log_loss": math.log(3),
    }
    assert {name: card[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    assert card["confusion"] == sklearn.metrics.confusion_matrix(y, chosen).tolist()
    for name, rows in {"truncated": v.cut, "whole": ~v.cut}.items():
        part = card["by_truncation"][name]
        assert part["rows"] == rows.sum()
        assert part["log_loss"] == pytest.approx(log_loss(y[rows], probs[rows]))
        assert part["accuracy"] == pytest.approx(accuracy(y[rows], chosen[rows]))
    a, b = v.lengths.T + 1
    parts = {"A longer": 2 * a > 3 * b, "B longer": 2 * b > 3 * a}
    parts["alike"] = ~(parts["A longer"] | parts["B longer"])
    for name, rows in parts.items():
        assert card["by_length"][name]["rows"] == rows.sum()
        assert card["by_length"][name]["log_loss"] == pytest.approx(log_loss(y[rows], probs[rows]))
    json.dumps(card)  # goes to result.json


def calibration_error_by_hand(probs, y, bins=15):
    total = 0.0
    for low in np.arange(bins) / bins:
        rows = [i for i, p in enumerate(probs) if low < p.max() <= low + 1 / bins]
        if rows:
            confidence = np.mean([probs[i].max() for i in rows])
            right = np.mean([probs[i].argmax() == y[i] for i in rows])
            total += len(rows) / len(y) * abs(confidence - right)
    return total


def test_intervals_are_those_of_redrawn_prompts():
    v, rng = verdicts(900), np.random.default_rng(5)
    card = preference.make_card(v, NAMES)
    right = v.final().argmax(1) == v.labels
    loss = -v.final()[np.arange(900), v.labels]
    prompts = [np.flatnonzero(v.groups == group) for group in set(v.groups)]
    draws = []
    for _ in range(2000):
        rows = np.concatenate([prompts[i] for i in rng.integers(len(prompts), size=len(prompts))])
        is_tie = v.labels[rows] == 2
        draws.append((loss[rows].mean(), right[rows].mean(), right[rows][is_tie].mean()))
    wanted = np.percentile(draws, [2.5, 97.5], axis=0).T
    for name, interval in zip(("log_loss", "accuracy", "recall_tie"), wanted, strict=True):
        np.testing.assert_allclose(card[f"{name}_interval"], interval, atol=0.12 * np.ptp(interval))


def test_the_temperature_is_the_minimum():
    v = verdicts()
    log_probs = 2.5 * v.log_probs[:, 0]  # too sure
    log_probs -= np.log(np.exp(log_probs).sum(1, keepdims=True))

    def loss(t):
        return sklearn.metrics.log_loss(v.labels, np.exp(preference.tempered(log_probs, t)))

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8})
    assert preference.fit_temperature(log_probs, v.labels) == pytest.approx(best.x, rel=1e-5)
    always_right = np.log(np.tile([0.6, 0.2, 0.2], (50, 1)))
    assert preference.fit_temperature(always_right, np.zeros(50, dtype=int)) == pytest.approx(0.1)
    v = verdicts(labels=np.zeros(400, dtype=int), temperatures=np.full(400, 0.1))
    v.log_probs[:] = np.log([0.9998, 0.0001, 0.0001])
    card = preference.make_card(v, NAMES)
    assert np.isnan(card["tempered_log_loss_interval"]).all()  # not the rule of three for shares
    assert "(unknown)" in "\n".join(preference.card_lines(card, "test", NAMES))
    assert any("(the limit)" in line for line in preference.card_lines(card, "test", NAMES))


def test_lengths_alone_are_scikit_learns_softmax_regression():
    v = verdicts(600)
    train, rest = np.arange(400), np.arange(400, 600)
    got = preference.length_only(v.lengths, v.labels, train, rest)
    a, b = np.log1p(v.lengths).T
    x = np.c_[a - b, abs(a - b), a + b]
    x = (x - x[train].mean(0)) / x[train].std(0)
    model = sklearn.linear_model.LogisticRegression(C=1 / (2 * 1e-4 * 400), tol=1e-10, max_iter=5000)
    wanted = model.fit(x[train], v.labels[train]).predict_proba(x[rest])
    # it does not shrink the intercept, we do, by as much as rounding in the third digit
    np.testing.assert_allclose(np.exp(got), wanted, atol=2e-3)
    assert sklearn.metrics.log_loss(v.labels[rest], np.exp(got)) < 1.0  # the rows' longer answers win


def test_an_even_judge_never_flips_and_a_biased_one_always_does():
    v = verdicts()
    even = verdicts(log_probs=np.repeat(v.log_probs[:, :1], 2, axis=1))
    assert preference.make_card(even, NAMES)["flip_rate"] == 0.0
    always_first = np.log([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])  # the second with classes put back
    biased = preference.make_card(verdicts(log_probs=np.tile(always_first, (400, 1, 1))), NAMES)
    assert biased["flip_rate"] == 1.0 and biased["averaged_log_loss"] < biased["one_order_log_loss"]


def test_the_calibration_interval_holds_the_true_error_19_times_in_20():
    """A judge that is right 60 % of the time and says 0.7: its error is 0.1. (300 other seeds: 93 %)"""
    inside = 0
    for seed in range(100, 200):
        rng = np.random.default_rng(seed)
        labels = np.where(rng.random(300) < 0.6, 0, 1 + (rng.random(300) < 0.5))
        log_probs = np.log(np.tile([0.7, 0.15, 0.15], (300, 1)))
        _, (low, high) = preference.calibration_error(log_probs, labels, np.arange(300))
        inside += low <= 0.1 <= high
    assert inside >= 90


def test_a_calibrated_judges_error_is_that_of_noise():
    errors, noise = [], []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.4, 0.95, 300)
        log_probs = np.log(np.c_[confidence, (1 - confidence) / 2, (1 - confidence) / 2])
        labels = np.where(rng.random(300) < confidence, 0, 1)
        errors.append(np.abs(preference.calibration_gaps(log_probs, labels).mean(0)).sum())
        noise.append(preference.calibration_noise(log_probs, samples=20))
    assert np.mean(noise) == pytest.approx(np.mean(errors), rel=0.1) and np.mean(noise) > 0.03


def test_a_card_fits_a_screen_and_names_what_is_wrong():
    v = verdicts(labels=np.zeros(400, dtype=int), prior=np.tile([1.0, 0, 0], (400, 1)))
    lines = preference.card_lines(preference.make_card(v, NAMES), "out of fold", NAMES)
    assert len(lines) <= 16 and max(map(len, lines)) <= 100
    uncertain = next(line for line in lines if "calibration" in line)
    assert re.search(r"error 0\.\d+ \(0\.\d+ to 0\.\d+\)", uncertain)  # its interval is not centred
    assert "recall" in "".join(lines) and "B none" in "".join(lines)
    assert "NOT LEARNING" in lines[-2] and "NO BETTER THAN LENGTHS" in lines[-1]
    v.by_length = np.log(np.tile([0.98, 0.01, 0.01], (400, 1)))
    lines = preference.card_lines(preference.make_card(v, NAMES), "out of fold", NAMES)
    assert "WORSE THAN LENGTHS" in lines[-1]


def test_the_picture_is_drawn(tmp_path):
    preference.draw(verdicts(), NAMES, "a title", tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_finished_fold_left_is_believed_only_as_it_was_written():
    path = Path("folds/fold_1.json")
    outcome = {"weights_sha256": "a1", "checkpoint": "best_step_00000002", "log_probs": {"val": [[-1.0]]}}
    files.write_sealed(path, outcome)
    assert preference.read_outcome(path) == outcome
    for text in (path.read_text().replace("a1", "b1"), "{", ""):
        path.write_text(text)
        with pytest.raises(UserError, match=r"^folds/fold_1.json is missing or damaged: use a copy"):
            preference.read_outcome(path)
    path.unlink()
    with pytest.raises(UserError, match=r"^folds/fold_1.json is missing"):
        preference.read_outcome(path)
