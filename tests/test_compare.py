"""Comparisons of runs whose losses are made by hand: known differences, known noise."""

import functools
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
import scipy.stats
from conftest import PROJECT
from test_results import evaluate, make_run, refused, resumes, rows_of, source

import lab.compare.sides
from lab.compare import difference, facts, responses
from lab.compare.rows import Rows, judged_rows, shared_rows
from lab.compare.sides import constants_table, side_by_side
from lab.measure import statistics

NATS = np.random.default_rng(0).gamma(4, 5, 60)
ALONE = np.arange(60)


def losing(name, nats, groups=ALONE, hits=5, targets=10, sizes=40, files=(), **how):
    columns = {
        "part": "test",
        "row": np.arange(len(nats)),
        "group": groups[: len(nats)],
        "nats": nats,
        "hits": hits,
    }
    columns |= {"targets": targets, "bytes": sizes}
    lists = [np.broadcast_to(column, len(nats)).tolist() for column in columns.values()]
    lines = [dict(zip(columns, line, strict=True)) for line in zip(*lists, strict=True)]
    return make_run(name, files={"losses.jsonl": lines} | dict(files), **how)


def report(*names):
    lines, figures = lab.compare.sides.report(lab.compare.sides.sides(names, "runs"))
    return "\n".join(lines), figures


def shared(*names):
    return shared_rows([facts.read(name) for name in names])


def compared(sums, n, weights=None, groups=None):
    weights = np.ones(len(sums[0])) if weights is None else weights
    groups = np.arange(len(weights)) if groups is None else groups
    rows = Rows("loss", np.array(sums), weights, groups)
    return difference.difference(rows, range(n), range(n, len(sums)))


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


@pytest.mark.parametrize("trials", [120, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds, noise", [((1, 1), 0.0), ((3, 3), 0.02), ((3, 3), 0.1), ((3, 1), 0.3)])
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


def test_rows_are_paired_by_prompt_whatever_their_order_and_number():
    groups, order = np.repeat([f"p{i}" for i in range(30)], 2), np.random.default_rng(5).permutation(30)[3:]
    order = np.stack([2 * order, 2 * order + 1], 1).ravel()  # prompts shuffled, three of them missing
    kept, first = np.sort(order), losing("first", NATS, groups)
    loss, accuracy = shared(first, losing("second", (NATS + ALONE)[order], groups[order], hits=7))
    np.testing.assert_allclose(loss.sums, [NATS[kept], (NATS + ALONE)[kept]])
    assert loss.groups.tolist() == groups[kept].tolist() and set(loss.weights) == {10}
    assert loss.note == "6 rows that not all have are left out"
    assert accuracy.name == "accuracy" and accuracy.sums.tolist() == [[5] * 54, [7] * 54]
    rows = shared(first, losing("cut", NATS + 1, groups, sizes=np.where(ALONE < 10, 39, 40)))[0]
    assert rows.note == "10 rows that are cut differently are left out"
    np.testing.assert_allclose(rows.sums, [NATS[10:], NATS[10:] + 1])
    refused("no held-out row in common", shared, first, losing("strange", NATS))
    refused("other targets in each run", shared, first, losing("whole", NATS, groups, sizes=99))
    (rows,) = shared(first, losing("tokens", 2 * NATS, groups, targets=7))
    assert (rows.name, rows.note) == ("bits per byte", "tokenizers differ: bits per byte")
    assert np.diff(rows.sums.sum(1)) / rows.weights.sum() == pytest.approx(NATS.sum() / math.log(2) / 2400)


text_run = functools.partial(losing, groups=ALONE // 4, script="gpt_scratch")


def test_texts_are_compared_by_token_or_by_stretches_of_bytes_and_other_data_is_refused():
    a, c = text_run("a", NATS, sizes=20), text_run("c", NATS[:40], sizes=30)
    loss, _ = shared(a, text_run("b", NATS * 0.9, sizes=20))
    assert (loss.name, loss.groups.tolist(), loss.note) == ("loss", (ALONE // 4).tolist(), "")
    np.testing.assert_allclose(loss.sums, [NATS, NATS * 0.9])
    (rows,) = shared(a, c)  # 60 blocks of 20 bytes, 40 of 30
    assert rows.name == "bits per byte" and "40 stretches" in rows.note
    x, y, z = NATS.reshape(20, 3).T
    np.testing.assert_allclose(rows.sums * math.log(2), [np.c_[x + y / 2, y / 2 + z].ravel(), NATS[:40]])
    (rows,) = shared(a, text_run("d", NATS[:30], sizes=[40] * 29 + [30]))  # ten bytes less
    wanted = np.array([NATS.sum() / 1200, NATS[:30].sum() / 1190]) / math.log(2)
    np.testing.assert_allclose(rows.sums.sum(1) / rows.weights.sum(), wanted)
    refused("1160 and 1200 bytes", shared, a, text_run("e", NATS[:29], sizes=40))
    verdicts = make_run("v", script="run_preference")
    other = {"facts": {"fingerprint": {"data": "other"}}}
    for name, how in {"x": {"config": other}, "y": {"split_seed": 1}, "z": {"test_share": 0.2}}.items():
        refused("tested on different text", shared, a, text_run(name, NATS, sizes=20, **how))
    refused("different questions: preference and rows", shared, losing("r", NATS), verdicts)
    for said, content in (("missing", None), ("damaged", '{"group": 1, "na')):
        b = losing(said, NATS, files={"losses.jsonl": content})
        refused(rf"{b}/losses.jsonl is {said}: python eval.py --run {b} ", shared, b, b)
    measured = make_run("e", "eval", config={"kind": "text"})
    refused("different questions: preference and text", shared, measured, verdicts)


def test_verdicts_are_compared_by_log_loss_and_accuracy():
    rng, names, folders = np.random.default_rng(7), ("A", "B", "tie"), []
    probs, labels = rng.dirichlet(np.ones(3), (2, 40)), rng.integers(0, 3, 40)
    for name, of_run, order in zip("ab", probs, (1, -1), strict=True):
        lines = [{"id": i, "row": i, "group": f"p{i // 2}", "split": "val" if i < 5 else "test"}
                 | {"label": names[labels[i]]} | dict(zip(names, of_run[i], strict=True))
                 for i in range(40)]  # fmt: skip
        folders.append(make_run(name, "run_preference", files={"predictions.jsonl": lines[::order]}))
    (loss, accuracy), rows = shared(*folders), np.arange(5, 40)
    np.testing.assert_allclose(loss.sums, -np.log(probs[:, rows, labels[rows]]))
    assert accuracy.sums.tolist() == (probs.argmax(2) == labels)[:, rows].tolist() and loss.name == "log loss"


def graded(name, grades, answers, **how):
    rows = [{"instruction": f"Say {i}\nloudly", "input": "in" * (i % 2), "output": f"right {i}"}
            | {"model_response": answer} for i, answer in enumerate(answers)]  # fmt: skip
    entries = [{"group": responses.group_of(row), "grades": of} for row, of in zip(rows, grades, strict=True)]
    judged = {who: {"score": 1.0, "score_interval": [0, 2], "grades": entries} for who in ("j", name)}
    return losing(name, NATS, files={"responses.json": rows, "judged.json": judged}, **how)


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
    assert side_by_side(lab.compare.sides.sides([a, losing("c", NATS, lr=3)], "runs"), None) is None

    code, out, err = evaluate("--compare", a, b, "--plot")
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
    script = Path("run_lora.py")

    def trained(*flags):
        small = ["--smoke", "--max_documents", "80", "--out", "runs/run_lora"]
        command = [sys.executable, "run_lora.py", *small, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
        assert done.returncode == 0, done.stderr

    trained("--max_steps", "2", "--tag", "old")
    line = "    lora_rank: int = 16  # columns of B and rows of A\n"
    script.write_text(
        script.read_text().replace(line, f"{line}    label_smoothing: float = 0.0  # a share\n")
    )
    trained("--max_steps", "3", "--tag", "new", "--label_smoothing", "0.1")
    code, out, err = evaluate("--compare", "old", "new")
    assert code == 0, err
    found = {row["constant"]: (row["old"], row["new"]) for row in rows_of(out.split("**loss**")[0])}
    assert found == {"label_smoothing": ("absent", "0.1"), "max_steps": ("2", "3")}
    assert "NOTE run_lora.py is not the same: one version in old, another in new" in out
    (old,) = Path("runs/run_lora").glob("*-old")
    trained("--max_steps", "3", "--tag", "old", "--resume_timestamp", old.name[:15])
    out = evaluate("--compare", "old", "new")[1]
    changed = "max_steps 3 (before: 2), label_smoothing 0.0 (before: absent)"
    note = f"NOTE old was resumed at step 2 with {changed}: its learning rate followed another schedule"
    assert f"{note} until then\nNOTE old was resumed at step 2 with another run_lora.py than" in out
