"""run_mathqa.py --mode study and split: tables against the runs, nothing made twice."""

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import launch
from toys.run_mathqa import (
    ARMS,
    NAME,
    SPLIT,
    STUDY,
    arms,
    budgets,
    constants_of,
    copied,  # noqa: F401 (a fixture)
    first,
    go,  # noqa: F401 (a fixture)
    here,  # noqa: F401 (a fixture)
    result_of,
    rows_of,
    run_folders,
    same_outcome,
    slow,
    studied,  # noqa: F401 (a fixture)
    study_of,
)

import core
from lab.run import files


@pytest.mark.slow
def test_every_arm_stands_in_both_tables_with_the_figures_of_its_runs(studied):
    (path,) = studied.glob("out/study-*/study.md")
    sections = path.read_text().split("**equal ")[1:]
    sections[-1], last = sections[-1].split("**int4**")
    found = study_of(studied)["runs"]
    assert list(found) == ["steps", "time"]
    for section, budget in zip(sections, found, strict=True):
        assert section.startswith(budget)
        rows = {row["arm"]: row for row in rows_of(section)}
        assert tuple(rows) == tuple(found[budget]) == ARMS
        for arm, row in rows.items():
            results = [result_of(studied / folder) for folder in found[budget][arm]]
            for name, figure, digits in (
                ("loss", "test/loss", 4),
                ("answers", "test/answer_accuracy", 3),
                ("per token", "test/answer_accuracy_per_token", 3),
                ("shuffled", "test/shuffled_accuracy", 3),
                ("forgotten", "plain/forgotten", 4),
                ("steps", "steps", 0),
                ("s", "train_seconds", 1),
                ("MB", "state_mb", 2),
            ):
                mean = np.mean([result[figure] for result in results])
                assert float(row[name].split()[0]) == pytest.approx(mean, abs=0.501 * 10.0**-digits), (
                    arm,
                    name,
                )
            assert row["trained"] == f"{results[0]['trainable_parameters']:,}"
    assert {row["run"] for row in rows_of(last)} == {"full", "full,qat=int4"}


def test_a_difference_of_the_study_is_that_of_its_runs(studied):
    study = study_of(studied)
    for budget, figures in study["figures"].items():
        assert {(one["arm"], one["figure"]) for one in figures} == {
            (arm, figure) for arm in ARMS[1:] for figure in ("loss", "answers")
        }
        for one in figures:
            name = {"loss": "test/loss", "answers": "test/answer_accuracy"}[one["figure"]]
            means = [
                np.mean([result_of(studied / folder)[name] for folder in study["runs"][budget][arm]])
                for arm in (one["arm"], "full")
            ]
            assert one["difference"] == pytest.approx(means[0] - means[1], abs=1e-6)


def test_arms_differ_in_what_they_name_alone(studied):
    study, aside = study_of(studied), core.CALL_CONSTANTS | {"max_steps", "max_minutes"}
    for of_budget in study["runs"].values():
        for seed in (0, 1):
            full, lora, int4 = (constants_of(studied / of_budget[arm][seed]) for arm in ARMS)
            base = constants_of(studied / full["init_from"])
            assert full["seed"] == base["seed"] == seed and base["max_steps"] == 4
            differ = [{n for n in full if n not in aside and full[n] != one[n]} for one in (lora, int4)]
            assert differ == [{"method", "lr"}, {"qat"}]
            assert lora["lr"] == 3e-3 and lora["method"] == "lora" and int4["qat"] == "int4"


def test_equal_steps_are_equal_and_equal_time_is_to_a_step(studied):
    found = study_of(studied)["runs"]
    assert found["steps"]["full"] == found["time"]["full"]
    for seed in (0, 1):
        leader = result_of(studied / found["steps"]["full"][seed])
        for arm in ARMS[1:]:
            assert result_of(studied / found["steps"][arm][seed])["steps"] == leader["steps"] == 12
            folder = studied / found["time"][arm][seed]
            lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            shares = [line["clock/share"] for line in lines if "clock/share" in line]  # before each step
            assert len(shares) == result_of(folder)["steps"] and shares[-1] < 1
            assert result_of(folder)["train_seconds"] >= leader["train_seconds"] - 1e-6


def test_the_quantised_figures_of_the_study_are_those_of_its_folders(studied):
    study = study_of(studied)
    assert list(study["quantised"]) == ["full", "full,qat=int4"]
    for arm, of_arm in study["quantised"].items():
        for folder, one in zip(study["runs"]["steps"][arm], of_arm, strict=True):
            stored = files.read_sealed(studied / folder / "quantised_32" / "result.json")
            rows = stored.pop("rows")  # each row's, by which int4 and float are compared
            assert one == stored and np.shape(rows["loss"]) == (2, len(rows["targets"]))
            means = np.sum(rows["loss"], axis=1) / sum(rows["targets"])
            assert means.tolist() == pytest.approx([one[kind]["test/loss"] for kind in ("float", "int4")])
            assert one["trained_for_it"] == ("qat" in arm)
            own = result_of(studied / folder)["test/loss"]
            assert one["int4" if "qat" in arm else "float"]["test/loss"] == pytest.approx(own, abs=1e-4)
            assert one["int4"]["mb"] < one["float"]["mb"] / 2


def test_a_finished_study_typed_again_makes_nothing_and_says_the_same(copied, go):
    folders, (path,) = run_folders(), Path("out").glob("study-*/study.md")
    before = study_of(), path.read_text()
    said = go(*STUDY)
    assert said.count("finished already") == len(folders) == 12 and "forecast" not in said
    assert (
        run_folders() == folders
        and (study_of(), next(Path("out").glob("study-*/study.md")).read_text()) == before
    )


@pytest.mark.slow
def test_another_rate_of_an_arm_makes_that_arm_anew(copied, go):
    folders, was = run_folders(), study_of()["runs"]
    go(*arms("full", "lora,lr=1e-3", "full,qat=int4"), "--seeds", 1)
    new = [constants_of(folder) for folder in run_folders() if folder not in folders]
    assert [(one["method"], one["lr"]) for one in new] == [("lora", 1e-3)] * 2
    assert study_of()["runs"]["steps"]["full"] == was["steps"]["full"][:1]


@pytest.mark.slow
def test_other_lengths_and_rates_of_tuning_repeat_no_pretraining(copied, go):
    folders = run_folders()
    go(*arms("full", of=budgets("steps")), "--seeds", 1, "--max_steps", 5, "--lr", 1e-3, "--loss_on_prompt")
    (new,) = (constants_of(folder) for folder in run_folders() if folder not in folders)
    assert new["mode"] == "train" and new["max_steps"] == 5 and new["lr"] == 1e-3
    assert constants_of(new["init_from"])["seed"] == 0 and study_of()["runs"]["steps"].keys() == {"full"}


@slow
def test_another_length_makes_every_arm_anew_and_no_pretraining(copied, go):
    folders = run_folders()
    go(*STUDY, "--seeds", 1, "--max_steps", 6)
    new = [constants_of(folder) for folder in run_folders() if folder not in folders]
    assert [one["mode"] for one in new] == ["train"] * 5


@pytest.mark.slow
def test_equal_time_is_that_of_the_first_arm_there_is_now(copied, go):
    """The arms of another first arm had another time."""
    go(*arms("lora,lr=3e-3", "full", "full,qat=int4"), "--seeds", 1)
    found = study_of()["runs"]["time"]
    seconds = result_of(found["lora,lr=3e-3"][0])["train_seconds"]
    for arm in ("full", "full,qat=int4"):
        assert constants_of(found[arm][0])["max_minutes"] == pytest.approx(seconds / 60), arm


@pytest.mark.slow
def test_arms_of_many_words_are_trained_for_both_budgets(copied, go):
    long = "lora,lr=3e-3,beta1=0.9,beta2=0.95,weight_decay=0.1,warmup=0.1,clip=1.0"
    go(*arms("full", long), "--seeds", 1)
    found = study_of()["runs"]
    assert found["steps"][long] != found["time"][long]
    assert constants_of(found["time"][long][0])["max_minutes"]


@slow
@pytest.mark.parametrize(("place", "nth"), [("step", 2), ("save", 4), ("step", 20)])
def test_a_study_killed_anywhere_and_typed_again_has_the_same_figures(place, nth, studied, go):
    """At equal steps: what follows the clock is not repeated to the bit."""
    argv = [*budgets("steps"), "--seeds", 1]
    assert -9 in launch(NAME, "--out", "out", *argv, kill=(place, nth, 0)), Path("out.txt").read_text()
    go(*argv)
    for arm, (folder,) in study_of()["runs"]["steps"].items():
        same_outcome(result_of(folder), result_of(studied / study_of(studied)["runs"]["steps"][arm][0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "total", [pytest.param((8, 12), id="even", marks=slow), pytest.param((9, 12), id="odd")]
)
def test_the_steps_of_each_share_add_up_to_the_total(total, go):
    shares = ("0.5", "0.9")
    go(*SPLIT, *first(max_steps=total[0]), "--max_steps", total[1], "--shares", *shares)
    (arms,) = study_of(mode="split")["runs"].values()
    assert list(arms) == ["0.5 pretraining", "0.9 pretraining"]
    for share, (folder,) in zip(shares, arms.values(), strict=True):
        steps = [result_of(each)["step"] for each in (constants_of(folder)["init_from"], folder)]
        assert steps[0] == pytest.approx(float(share) * sum(total), abs=0.5)
        assert sum(steps) == sum(total), (share, steps)


@pytest.mark.slow
def test_the_minutes_of_each_share_add_up_to_the_total(go):
    minutes = [*first(max_steps="none", max_minutes=0.003), "--max_steps", "none", "--max_minutes", 0.003]
    go(*SPLIT, *minutes, "--shares", 0.25, 0.5)
    (arms,) = study_of(mode="split")["runs"].values()
    assert list(arms) == ["0.25 pretraining", "0.5 pretraining"]
    for share, (folder,) in zip((0.25, 0.5), arms.values(), strict=True):
        for each, part in ((constants_of(folder)["init_from"], share), (folder, 1 - share)):
            assert constants_of(each)["max_minutes"] == pytest.approx(part * 0.006)
            assert result_of(each)["train_seconds"] >= part * 0.36


@pytest.mark.slow
def test_shares_that_are_near_each_other_are_not_seeds_of_one(go):
    go(*SPLIT, *first(max_steps=8), "--max_steps", 12, "--shares", 0.5, 0.504)
    (arms,) = study_of(mode="split")["runs"].values()
    assert [len(folders) for folders in arms.values()] == [1, 1], arms
