"""Which runs are one side, what differs between sides, and the report."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from ranks import typed
from toys.compare import ALONE, NATS, compared, losing
from toys.results import make_run, refused, resumes, rows_of, source

import lab.compare.sides
from lab.compare import facts, responses, tables
from lab.compare.rows import judged_rows
from lab.compare.sides import constants_table, side_by_side


def report(*names):
    lines, figures = lab.compare.sides.report(lab.compare.sides.sides(names, "runs"))
    return "\n".join(lines), figures


def test_a_run_is_told_from_a_better_one_only_and_one_prompt_or_no_number_tells_nothing():
    sizes = np.where(ALONE % 2, 0, 40)  # of an empty answer the end token's loss
    low, high = compared([NATS + (sizes == 0) * NATS, NATS], 1, sizes)["interval"]
    assert low < NATS[1::2].sum() / 1200 < high
    for name, nats, groups in (("one", NATS, 0 * ALONE), ("nan", [math.nan, *NATS[1:]], ALONE)):
        sides = losing(name, nats, groups), losing(f"{name}2", NATS + 1, groups, lr=1)
        assert not re.search("(?<!cannot be )told apart", report(*sides)[0])
    run = losing("a", NATS)
    text, figures = report(run, run)
    assert constants_table(lab.compare.sides.sides([run, run], "runs")) == "the constants are the same"
    for name in ("loss", "accuracy"):
        assert (figures[name][0]["difference"], figures[name][0]["interval"]) == (0, [0, 0])
    assert text.count("the same on every one of 60 rows: they cannot be told apart") == 2
    assert "the same weights as a: a" in text
    assert "the same weights" not in report(run, losing("b", NATS, lr=1))[0]
    noise = np.random.default_rng(2).normal(size=60)
    names = losing("trained", NATS, lr=0.1), losing("untrained", NATS + 5 + noise, lr=0.0)
    for sign, order in ((-1, names), (1, names[::-1])):
        text, figures = report(*order)
        value, (low, high) = (figures["loss"][0][name] for name in ("difference", "interval"))
        assert value == pytest.approx(sign * (5 + noise.mean()) / 10) and sign * low > 0 < sign * high
        said = (
            f"loss {value:+.4f} ({low:+.4f} to {high:+.4f})\n  told apart on these 60 rows: trained is better"
        )
        assert said in text and "comparisons" not in text
    assert "4 comparisons: of 20" in report(*names, losing("third", NATS + ALONE % 2))[0]


def test_runs_that_differ_in_their_seed_are_one_side_and_what_else_differs_is_listed():
    nats = NATS + np.random.default_rng(8).normal(size=(6, 60)) + np.array([[0, 5, 9, 3, 4, 8]]).T
    boss = [losing(f"boss{i}", nats[i], seed=i, tag=f"boss-s{i}") for i in range(3)]
    how = {"lr": 0.5, "tag": "other", "config": {"preset": "strong"}}
    other = [losing(f"other{i}", nats[3 + i], seed=i, **how) for i in range(3)]
    make_run("boss9", tag="boss-s0", seed=9, status="stopped")
    sides = lab.compare.sides.sides([*boss, *other], "runs")
    assert [side.name for side in sides] == ["boss (3 seeds)", "other (3 seeds)"]
    assert [len(side.all_facts) for side in lab.compare.sides.sides(boss, "runs")] == [1, 1, 1]
    sides = lab.compare.sides.sides(["boss-s0", "strong"], "runs")  # a tag and a preset: finished runs only
    assert [[f.name for f in side.all_facts] for side in sides] == [["boss0"], ["other0", "other1", "other2"]]
    found = report("boss-s0", "strong")[1]["loss"][0]
    wanted = (nats[0].mean() - nats[3:].mean()) / 10
    assert found["difference"] == pytest.approx(wanted) and found["seeds"] == [1, 3]
    assert len(lab.compare.sides.sides(["boss-s0", boss[0], *other], "runs")[0].all_facts) == 1  # named twice
    refused("needs two sides", lab.compare.sides.sides, ["boss-s0"], "runs")
    refused(
        "nothing: no run folder, and no finished run in runs",
        lab.compare.sides.sides,
        ["nothing", *boss],
        "runs",
    )
    refused("boss9 is not finished", report, "runs/run_lora/boss9", "strong")
    a = losing("same", NATS, lr=0.1, warmup=2, pack=True, seed=1, out="x", tag="a|a", note="n")
    b = losing("same", NATS, lr=0.2, warmup=3, pack=True, seed=2, tag="b", script="run_instruct")
    wanted = [["script", "run_lora", "run_instruct"], ["lr", "0.1", "0.2"], ["warmup", "2", "3"]]
    rows = rows_of(constants_table(lab.compare.sides.sides([a, b], "runs")))
    assert [list(row.values()) for row in rows] == wanted and list(rows[0]) == ["constant", "a/a", "b"]
    twins = [losing("twin", NATS, script=script, lr=i) for i, script in enumerate("xy")]  # of one second
    assert constants_table(lab.compare.sides.sides(twins, "runs")).count("twin") == 2


def test_runs_on_a_source_whose_text_has_changed_are_two_sides_and_not_seeds_of_one():
    def mixed(name, text, seed):
        found = {"data": "neutral", "sources": {"a": text}}
        return make_run(name, "run_pretrain_diversity", config={"facts": {"fingerprint": found}}, seed=seed)

    same, other, changed = mixed("x", "text", 0), mixed("y", "text", 1), mixed("z", "edited", 2)
    found = lab.compare.sides.sides([same, other, changed], "runs")
    assert [[facts.name for facts in side.all_facts] for side in found] == [["x", "y"], ["z"]]


def head(*names):
    """What is said above the figures: the table of constants, and the notes."""
    sides = lab.compare.sides.sides(names, "runs")
    notes = "\n".join(lab.compare.sides.report(sides)[0]).partition("**")[0]
    return constants_table(sides), notes.strip().splitlines()


def listed(*names):
    """Rows of the table of constants: name -> the sides' values."""
    found = [list(row.values()) for row in rows_of(constants_table(lab.compare.sides.sides(names, "runs")))]
    return {name: values for name, *values in found}


def test_a_constant_that_one_side_lacks_is_listed_as_absent():
    old, none = losing("old", NATS), losing("none", NATS, label_smoothing=None)
    new = [losing(f"new{seed}", NATS + 1, label_smoothing=0.1, seed=seed, tag="new") for seed in (0, 1)]
    wanted = {"label_smoothing": ["absent", "none", "0.1"]}
    assert listed(old, none, *new) == wanted
    sides = lab.compare.sides.sides([old, none, *new], "runs")
    assert [side.name for side in sides] == ["old", "none", "new (2 seeds)"]
    full = losing("full", NATS, script="run_instruct", freeze_blocks=0, lr=0.5, keep=3, note="n")
    instruct = facts.read(full).folder / "config.json"
    config = json.loads(instruct.read_text())
    del config["constants"]["lora_rank"]
    instruct.write_text(json.dumps(config))
    wanted = {"script": ["run_instruct", "run_lora"], "lr": ["0.5", "0.01"]}
    wanted |= {"freeze_blocks": ["0", "absent"], "lora_rank": ["absent", "16"]}
    assert listed(full, old) == wanted
    measured = losing("measured", NATS, script="eval", config={"kind": "rows"})
    (Path(measured) / "config.json").write_text(
        json.dumps({"script": "eval", "kind": "rows", "facts": {}, "constants": {"model": "gpt2"}})
    )
    assert list(listed(measured, old)) == ["script", "model"]  # it was not trained: nothing is absent


def test_runs_that_differ_in_their_seed_only_are_not_called_the_same():
    a, b = losing("a", NATS, micro_batch=1), losing("b", NATS, seed=1, micro_batch=2)
    assert listed(a, b) == {"seed": ["0", "1"], "micro_batch": ["1", "2"]}
    worse = losing("worse", NATS + 5 + NATS / 9, seed=2, micro_batch=1)
    text, figures = report(a, worse)
    assert (
        figures["loss"][0]["interval"][1] < 0 and text.count("they differ in their seed only: neither") == 2
    )
    assert "told apart" not in text
    edited = losing("edited", NATS + 5 + NATS / 9, seed=2, micro_batch=1, files=source("x = 2\n"))
    old = losing("old", NATS, micro_batch=1, files=source())
    assert "told apart" in report(old, edited)[0]  # the code differs, too
    assert head(a, losing("c", NATS, note="n", micro_batch=1))[0] == "the constants are the same"


def test_code_that_is_not_the_same_is_named_between_sides_and_within_one():
    old, new = losing("old", NATS, files=source()), losing("new", NATS, files=source("x = 2\n"))
    table, notes = head(old, new)
    assert table == "no constant differs, but the code does"
    see = f"  diff -r {old}/source {new}/source"
    assert notes == ["NOTE run_lora.py is not the same: one version in old, another in new", see]
    text, _ = report(old, new)
    assert "\n".join(notes) + "\n\n**loss**" in text
    passed_over = losing("judge", NATS, files=source(also="the tables' code is imported by no run"))
    assert head(old, passed_over) == ("the constants are the same", [])
    seeds = [
        losing(f"s{i}", NATS, seed=i, lr=1, tag="s", files=source(imported=f"y = {i // 2}")) for i in range(3)
    ]
    notes = head(new, *seeds)[1]
    assert notes[0] == "NOTE core.py is not the same: one version in new, another in s0, s1, another in s2"
    assert notes[2] == "NOTE run_lora.py is not the same: one version in new, another in s (3 seeds)"
    unknown = "NOTE no source/ in none: whether the code was the same is not known"
    assert head(old, losing("none", NATS)) == ("the constants are the same", [unknown])


def test_a_side_that_was_resumed_with_another_schedule_is_named():
    changed = {"config": resumes((40, {"epochs": (3, 6)})), "schedule": "linear", "epochs": 6, "lr": 0.1}
    panda, other = losing("a", NATS, tag="panda", **changed), losing("b", NATS, lr=0.2)
    end = "epochs 6 (before: 3): its learning rate followed another schedule until then"
    assert f"NOTE panda was resumed at step 40 with {end}" in head(panda, other)[1]
    seeds = [panda, losing("c", NATS, tag="panda", seed=1, **changed | {"config": {}})]
    assert f"NOTE a was resumed at step 40 with {end}" in head(*seeds, other)[1]
    twin = losing("d", NATS, **changed | {"config": resumes((40, {}))})
    assert head(panda, twin)[0] == "no constant differs at the end, but a run was resumed"


def test_runs_that_learnt_nothing_are_named_and_a_verdict_between_two_says_so():
    alarm = "NOT LEARNING: test loss 3.0 cannot be told from that of token frequencies, 3.0"
    worse = NATS + 5 + np.random.default_rng(2).normal(size=60)
    where = ({"alarm": alarm}, {"test/alarm": alarm}, {"test/own/alarm": alarm}, {})
    a, b, c, good = (
        losing(f"r{i}", NATS if i == 0 else worse, lr=i, result=of) for i, of in enumerate(where)
    )
    warning = "both are NOT LEARNING"
    for names, count in (((a, b), 2), ((a, c), 2), ((good, a), 0)):  # one of the loss, one of the accuracy
        text, _ = report(*names)
        assert text.count(warning) == count and f"NOTE r0 is {alarm}" in text and "told apart" in text
    assert f"NOTE r0 is {alarm}" in tables.table(facts.find(["runs/run_lora"]))


def graded(name, grades, answers, **how):
    rows = [{"instruction": f"Say {i}\nloudly", "input": "in" * (i % 2), "output": f"right {i}"}
            | {"model_response": answer} for i, answer in enumerate(answers)]  # fmt: skip
    entries = [{"group": responses.group_of(row), "grades": of} for row, of in zip(rows, grades, strict=True)]
    judged = {who: {"score": 1.0, "score_interval": [0, 2], "grades": entries} for who in ("j", name)}
    return losing(name, NATS, files={"responses.json": rows, "judged.json": judged}, **how)


@pytest.mark.slow
def test_answers_and_grades_stand_side_by_side_and_none_breaks_out():
    wild = "# Heading\n\n| a | b |\n|---|---|\n```python\nx = 1\n---\n## 2\n> quote"
    a = graded("a", [[50], [75, 80], [None]], [wild, "plain", " "], tag="one")
    b = graded("b", [[60], [None, 90], [30]], ["short", wild, "```"], lr=1)
    sides = lab.compare.sides.sides([a, b], "runs")
    quoted = wild.replace("\n", "\n> ").replace("> \n", ">\n")
    wanted = "# Answers side by side\n\n3 of 3 prompts\n"
    answers = [(quoted, "short"), ("plain", quoted), ("(empty)", "```")]
    grades = [("  j 50  a 50", "  j 60  b 60"), ("  j 77.5  a 77.5", "  j 90  b 90"), ("", "  j 30  b 30")]
    for i, ((of_a, of_b), (x, y)) in enumerate(zip(answers, grades, strict=True)):
        wanted += f"\n## {i + 1}\n\n> Say {i}\n> loudly\n\n" + "> in\n\n" * (i % 2)
        wanted += f"**reference**\n\n> right {i}\n\n**one**{x}\n\n> {of_a}\n\n**b**{y}\n\n> {of_b}\n"
    assert side_by_side(sides, None) == wanted
    (rows,) = judged_rows([side.all_facts[0] for side in sides])
    assert rows.name == "grade by j" and rows.sums.tolist() == [[50, 77.5], [60, 90]]
    few = side_by_side(sides, 2)
    assert "2 of 3 prompts" in few and re.findall(r"> (right \d)", few) == ["right 0", "right 2"]
    assert side_by_side(sides, 0) == "# Answers side by side\n\n0 of 3 prompts\n"
    assert side_by_side(lab.compare.sides.sides([a, losing("c", NATS, lr=3)], "runs"), None) is None

    code, out, err = typed("eval", "--compare", a, b, "--plot")
    assert code == 0, err
    folder, files = re.fullmatch(r"written: (\S+)/ \((.*)\)", out.splitlines()[-1]).groups()
    assert files == "answers.md, compare.json, compare.md, curves.png"
    texts = {name: Path(folder, name).read_bytes() for name in files.split(", ")}
    assert json.loads(texts["compare.json"])["grade by j"][0]["difference"] == -11.25
    assert texts["answers.md"].decode() == wanted and b"| lr " in texts["compare.md"] and texts["curves.png"]


def test_grades_of_other_prompts_do_not_end_a_comparison():
    other = Path(graded("b", [[60], [90]], ["x", "y"], lr=1))
    judged = json.loads((other / "judged.json").read_text())
    for summary in judged.values():
        for number, entry in enumerate(summary["grades"]):
            entry["group"] = f"other {number}"
    (other / "judged.json").write_text(json.dumps(judged))
    text, figures = report(graded("a", [[50], [70]], ["x", "y"]), str(other))
    assert list(figures) == ["loss", "accuracy"] and "grade" not in text


@pytest.mark.slow
def test_a_constant_added_to_a_script_as_a_user_adds_it():
    """run_lora.py as it is; edited, with the new constant; the first run resumed longer. Then --compare."""
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, ".")
    shutil.copytree(PROJECT / "lab", "lab", ignore=shutil.ignore_patterns("__pycache__"))
    script = Path("run_lora.py")

    def trained(*flags):
        small = ["--smoke", "--max_documents", "80", "--out", "runs/run_lora"]
        command = [sys.executable, "run_lora.py", *small, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
        assert done.returncode == 0, done.stderr

    trained("--max_steps", "2", "--tag", "old")
    line = "    lora_rank: core.Count = 16  # columns of B and rows of A\n"
    new = "    label_smoothing: core.Share = 0.0  # of a target's weight\n"
    script.write_text(script.read_text().replace(line, line + new))
    trained("--max_steps", "3", "--tag", "new", "--label_smoothing", "0.1")
    code, out, err = typed("eval", "--compare", "old", "new")
    assert code == 0, err
    found = {row["constant"]: (row["old"], row["new"]) for row in rows_of(out.split("**loss**")[0])}
    assert found == {"label_smoothing": ("absent", "0.1"), "max_steps": ("2", "3")}
    assert "NOTE run_lora.py is not the same: one version in old, another in new" in out
    (old,) = Path("runs/run_lora").glob("*-old")
    trained("--max_steps", "3", "--tag", "old", "--resume_timestamp", old.name[:15])
    out = typed("eval", "--compare", "old", "new")[1]
    changed = "max_steps 3 (before: 2), label_smoothing 0.0 (before: absent)"
    note = f"NOTE old was resumed at step 2 with {changed}: its learning rate followed another schedule"
    assert f"{note} until then\nNOTE old was resumed at step 2 with another run_lora.py than" in out
