"""A submission: runs and folds averaged, each model at the temperature of its own validation rows."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys.results import refused

import core
import run_preference as script
from core import World
from lab.data import columns
from lab.measure import preference, submission

CFG = SimpleNamespace(symmetric=True, calibrate=True)


def write_run(folder, seed=0, folds=(None,), right=False):
    """predictions.jsonl of 60 validation rows a fold; returns {fold: (log_probs, labels)}."""
    rng, lines, known = np.random.default_rng(seed), [], {}
    for fold in folds:
        labels = rng.integers(0, 3, 60)
        logits = 2 * rng.normal(size=(60, 2, 3)) + (50 if right else 1) * np.eye(3)[labels][:, None]
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        known[fold] = np.log(probs), labels
        for p, label in zip(probs, labels, strict=True):
            line = {"id": str(len(lines)), "group": "g", "split": "val", "label": preference.NAMES[label]}
            line |= dict.fromkeys(preference.NAMES, 1 / 3) | ({} if fold is None else {"fold": fold})
            lines.append(line | {"as_is": p[0].tolist(), "swapped_back": p[1].tolist()})
    Path(folder).mkdir(parents=True)
    Path(folder, "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return known


def test_each_folds_temperature_is_that_of_its_own_validation_rows():
    known = write_run("run", folds=(1, 2, 3))
    temperatures, line = submission.validated("run", CFG)
    finals = [(preference.combine(log_probs, True), labels) for log_probs, labels in known.values()]
    assert temperatures == pytest.approx([preference.fit_temperature(*final) for final in finals])
    assert len(set(temperatures)) == 3
    losses = []
    for used in ([1.0] * 3, temperatures):
        tempered = [preference.tempered(p, t) for (p, _), t in zip(finals, used, strict=True)]
        losses.append(np.mean([-p[np.arange(60), y] for p, (_, y) in zip(tempered, finals, strict=True)]))
    assert line.startswith(f"run  validation log loss {losses[0]:.4f}, at temperature ")
    assert line.endswith(f" {losses[1]:.4f}") and losses[1] < losses[0]
    assert submission.validated("run", SimpleNamespace(symmetric=True, calibrate=False))[0] == [1.0] * 3


def test_rows_that_are_all_right_say_nothing_about_a_temperature():
    write_run("run", right=True)
    assert submission.validated("run", CFG)[0] == [1.0]


def test_a_run_without_its_predictions_is_one_line():
    refused("run/predictions.jsonl cannot be read", submission.validated, "run", CFG)


def test_one_run_submits_into_its_folder_several_beside_them():
    cfg = SimpleNamespace(out="runs", run_folder=("a", "b"))
    assert submission.folders_to_submit(cfg, "x.py") == ["a", "b"]
    twice = SimpleNamespace(run_folder=("a", "./a/"))
    refused("--run_folder a ./a/: a run is named twice", submission.folders_to_submit, twice, "x.py")
    Path("a").mkdir()
    Path("a/submission.csv").write_text("old")
    assert submission.place_of(["a"], cfg, "x.py") == "a/submission.csv"
    assert not Path("a/submission.csv").exists()  # not taken for the result if the call fails
    assert submission.place_of(["a", "b"], cfg, "x.py") == "runs/submission.csv"


def test_a_submission_is_the_mean_of_runs_and_of_their_folds_at_their_temperatures(monkeypatch):
    """Run a has two folds and averages both orders; run b has none and reads one order."""
    rng, loaded = np.random.default_rng(3), []
    said = {name: rng.normal(size=(5, 2, 3)) for name in ("a1", "a2", "b1")}
    said = {name: x - np.log(np.exp(x).sum(-1, keepdims=True)) for name, x in said.items()}
    checkpoints = {"a": ["a1", "a2"], "b": ["b1"]}
    known = {"a": write_run("a", 1, (1, 2)), "b": write_run("b", 2)}
    cfg = SimpleNamespace(
        out="out", test_csv="t.csv", mode="submit", typed=SimpleNamespace(flags=frozenset())
    )
    data = SimpleNamespace(ids=list("vwxyz"), labels=np.zeros(5), lines=[], cut_line=lambda: "cut")
    data.fingerprint = {"data": "new"}

    def rebuild(folder, world, **changes):
        return SimpleNamespace(symmetric=folder.name == "a", calibrate=True), torch.nn.Linear(1, 1), None

    monkeypatch.setattr(core, "load_weights", lambda path, model: loaded.append(path.name))
    monkeypatch.setattr(core, "cache_vectors", lambda *given: None)
    monkeypatch.setattr(core, "read_config", lambda folder: {"facts": {"fingerprint": {"data": "old"}}})
    for name, new in (("rebuild", rebuild), ("rows_to_judge", lambda *given: data)):
        monkeypatch.setattr(script, name, new)
    monkeypatch.setattr(script, "evaluate", lambda *given: said[loaded[-1]])
    script.submit(cfg, World(), ["a", "b"], lambda folder: checkpoints[folder.name])

    def at_temperature(name, fitted_on, both):
        log_probs, labels = fitted_on
        fitted = preference.fit_temperature(preference.combine(log_probs, both), labels)
        return np.exp(preference.tempered(said[name], fitted))

    fold_mean = (at_temperature("a1", known["a"][1], True) + at_temperature("a2", known["a"][2], True)) / 2
    first = np.sqrt(fold_mean[:, 0] * fold_mean[:, 1])  # logits of both orders, averaged
    first /= first.sum(1, keepdims=True)
    want = (first + at_temperature("b1", known["b"][None], False)[:, 0]) / 2
    with open("out/submission.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == data.ids and loaded == ["a1", "a2", "b1"]
    got = np.array([[float(line[name]) for name in columns.LABELS.values()] for line in lines])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_rows_that_a_run_was_trained_on_are_not_judged_without_a_word():
    cases = [
        ("train.csv", "abc", 1),
        ("train.csv", "more", 1),
        ("test.csv", "xyz", 0),
        ("kaggle.zip", "abc", 0),
    ]  # a zip holds both files
    for name, source, count in cases:
        said = []
        judged = SimpleNamespace(fingerprint={"data": source, "tokenizer": "t"})
        trained_on = {"data": "abc", "extra_data": ["more"], "tokenizer": "t"}
        submission.note_known_rows(name, judged, trained_on, said.append)
        assert len(said) == count and all("train.csv holds the rows" in line for line in said)
