"""Mode study: which runs an arm's words mean, that each is made once however often the study is stopped,
and what is concluded."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
from laws.test_laws import SHORT
from ranks import launch
from toys.sft import toy_file

import core
import gpt_scratch
import run_lora
import run_preference
from core import World
from lab.compare import difference
from lab.compare import study as studies
from lab.compare.rows import Rows

STUDIED = ["gpt_scratch", "run_lora", "run_instruct", "run_preference"]
ARMS = ["--mode", "study", "--arms", "lr=1e-3", "lr=2e-3,clip=none", "--seeds", 2]


def plan_of(script, *argv) -> studies.Plan:
    given = [script.Config, script.PRESETS, script.SMOKE]
    cfg = core.parsed_config(*given, "", ["--smoke", "--mode", "study", *map(str, argv)])
    return studies.Plan(cfg, World(), script.__file__, *given, None)


def test_an_arm_is_what_its_command_would_be():
    arms, shared = ["lora_rank=64,lora_alpha=32", "run_15,lr=1e-5"], ["--no-lora_head", "--epochs", "2"]
    plan = plan_of(run_lora, "--arms", *arms, *shared)
    first, second = studies.arms_of(plan)
    assert first.values == {"lora_rank": 64, "lora_alpha": 32.0} and first.cfg.epochs == 2
    argv = ["--smoke", "--preset", "run_15", *shared, "--lr", "1e-5"]
    alone = core.parsed_config(run_lora.Config, run_lora.PRESETS, run_lora.SMOKE, "", argv)
    for name in ("lr", "lora_scaling", "lora_rank", "epochs", "lora_head", "max_length", "model"):
        assert getattr(second.cfg, name) == getattr(alone, name), name
    assert second.cfg.mode == "train" and first.cfg.tag != second.cfg.tag


def test_a_script_may_keep_arms_to_some_constants_and_give_its_own_to_runs():
    """As run_mathqa's studies do: arms differ in how they are tuned, the study gives base and length."""

    def arm(word, *argv, **how):
        own = frozenset({"epochs"})
        plan = replace(plan_of(run_lora, *argv), may_differ=frozenset({"lr"}), own=own)
        return studies.arm_of(plan, word, **how)

    given = arm("lr=1e-3", "--epochs", 7)
    assert given.cfg.epochs == arm("lr=1e-3").cfg.epochs != 7 and given.cfg.tag == arm("lr=1e-3").cfg.tag
    with pytest.raises(core.UserError, match=r"--first lora_rank=8: .* or constant=value of lr$"):
        arm("lora_rank=8", flag="--first")
    assert arm("", "--lr", 0.5, called="both").cfg.lr == 0.5
    assert arm("", called="both").cfg.tag.startswith("both-")
    short, again, plain = (
        studies.run_config(given, 1, changes) for changes in ({"max_steps": 5}, {"max_steps": 5}, None)
    )
    assert short == again and short.max_steps == 5 and "max_steps" in short.typed.flags
    assert short.tag != plain.tag == f"{given.cfg.tag}-s1" and short.seed == plain.seed == 1


@pytest.mark.parametrize("dtype", ["auto", "tf32"])  # fp32 on a CPU
def test_a_finished_run_is_found_by_the_dtype_that_the_device_chose(dtype):
    plan = plan_of(run_lora, "--arms", "lr=1e-3", "--dtype", dtype, "--out", "out")
    cfg = studies.run_config(*studies.arms_of(plan), 0)
    assert studies.finished_folder(cfg, plan.script) == ""
    folder = Path(f"out/20260101_000000-{cfg.tag}")
    folder.mkdir(parents=True)
    constants = core.constants_of(cfg) | {"dtype": "fp32"}
    core.write_json(folder / "config.json", {"script": "run_lora", "constants": constants})
    core.write_json(folder / "result.json", {"status": "finished"})
    assert studies.finished_folder(cfg, plan.script) == str(folder)


def test_an_arm_names_the_run_that_it_continues():
    with pytest.raises(core.UserError, match=r"--arms continue_noam: the newest run would be another one"):
        studies.arms_of(plan_of(gpt_scratch, "--arms", "continue_noam"))


def test_a_grid_is_every_product():
    assert studies.products(["lr=1,2", "rank=8,9"]) == [
        "lr=1,rank=8",
        "lr=1,rank=9",
        "lr=2,rank=8",
        "lr=2,rank=9",
    ]
    plan = plan_of(gpt_scratch, "--grid", "lr=1e-3,3e-3", "n_layer=1,2", "--arms", "clip=none")
    assert [arm.values for arm in studies.arms_of(plan)] == [
        {"clip": None},
        *({"lr": lr, "n_layer": n} for lr in (1e-3, 3e-3) for n in (1, 2)),
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--mode study needs --arms"),
        (["--arms", "lr"], "--arms lr: 'lr' is not a preset ("),
        (["--arms", "lr=1e-4,basline"], "--arms lr=1e-4,basline: 'basline' is not"),
        (["--arms", "lr=-1"], "--arms lr=-1: --lr -1.0 is out of range: use 0 or more"),
        (["--arms", "lr=fast"], "--arms lr=fast: argument --lr"),
        (["--arms", "seed=3"], "--arms seed=3: 'seed=3' is not"),
        (["--arms", "out=x"], "'out=x' is not"),
        (["--arms", "lr=1e-4", "lr=0.0001"], "--arms lr=1e-4 and lr=0.0001 are the same run: leave one out"),
        (["--grid", "lr"], "--grid lr is no name=value,value,..."),
        (["--grid", "lr=1,,2"], "--grid lr=1,,2 is no name=value,value,..."),
    ],
)
def test_words_that_are_no_arm_are_one_line(argv, said):
    with pytest.raises(core.UserError) as error:
        studies.arms_of(plan_of(run_preference, *argv))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_study_is_not_resumed_by_hand():
    with pytest.raises(core.UserError, match="mode study continues by itself"):
        plan_of(gpt_scratch, "--arms", "lr=1", "--resume_timestamp", "auto")


def study_of(out="out") -> dict:
    (path,) = Path(out).glob("study-*/study.json")
    return json.loads(path.read_text())


ONLY_LOSSES = ["--answer_rows", 0, "--sample_tokens", 0, "--plain_blocks", 0]
FEWER = dict.fromkeys(("run_lora", "run_instruct"), ONLY_LOSSES)
FEWER |= {"gpt_scratch": ["--sample_tokens", 0], "run_preference": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "size"),
    [
        *((name, 1) for name in ("run_lora", "run_instruct")),
        *((name, 2) for name in ("gpt_scratch", "run_preference")),
    ],
)
def test_a_study_killed_again_and_again_has_the_same_table_and_no_run_twice(script, size):
    flags = [*SHORT[script], *ARMS, "--max_steps", 10, *FEWER[script]]
    assert launch(script, "--out", "whole", *flags, size=size) == [0] * size, Path("out.txt").read_text()
    kills, rng = 0, random.Random(size)
    for attempt in range(5):
        places = ["step", "save", "evaluation", "result"]
        place = places[attempt] if attempt < 4 else rng.choice(places)
        codes = launch(script, "--out", "out", *flags, size=size, kill=(place, rng.randint(1, 3), 0))
        kills += -9 in codes
    assert kills >= 3
    assert launch(script, "--out", "out", *flags, size=size) == [0] * size, Path("out.txt").read_text()
    said = Path("out.txt").read_text()
    found, want = study_of(), study_of("whole")
    assert found["means"] == want["means"] and found["val/loss"] == want["val/loss"]
    assert len(list(Path("out").glob("*/config.json"))) == 4 and sum(map(len, found["runs"].values())) == 4
    for arm, folders in found["runs"].items():
        for mine, theirs in zip(folders, want["runs"][arm], strict=True):
            results = [json.loads((Path(f) / "result.json").read_text()) for f in (mine, theirs)]
            assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert "lr=1e-3 - lr=2e-3,clip=none" in said and "chosen by validation loss: " in said
    (picture,) = Path("out").glob("study-*/study.png")
    assert picture.stat().st_size > 5000
    again = launch(script, "--out", "out", *flags, size=size)
    assert again == [0] * size and "4 runs, 4 of them finished" in Path("out.txt").read_text()


@pytest.mark.slow
def test_max_hours_end_a_study_between_two_steps_and_the_same_command_continues():
    flags = [*SHORT["gpt_scratch"], "--mode", "study", "--arms", "lr=1e-3", "lr=2e-3"]
    assert launch("gpt_scratch", "--out", "whole", *flags) == [0]
    assert launch("gpt_scratch", "--out", "out", *flags, "--max_hours", 1.5 / 3600) == [-15]
    said = Path("out.txt").read_text()
    assert "next: the same command continues the study" in said and not list(Path("out").glob("study-*"))
    assert launch("gpt_scratch", "--out", "out", *flags, "--max_hours", 1) == [0]
    assert study_of()["means"] == study_of("whole")["means"]


def test_arms_that_were_tested_on_other_rows_have_figures_and_no_verdict():
    small = [*SHORT["run_lora"], "--max_steps", 2, "--answer_rows", 0, "--plain_blocks", 0]
    flags = [*small, "--mode", "study", "--arms", "lr=1e-3", f"data={toy_file(140)}"]
    assert launch("run_lora", "--out", "out", *flags) == [0], Path("out.txt").read_text()
    said = Path("out.txt").read_text()
    assert "NOTE no verdict, and no arm is chosen: they were validated and tested on different rows" in said
    assert set(study_of()["means"]["loss"]) == {"lr=1e-3", "data=rows.json"}
    assert "chosen by" not in said


def arm(name, **values) -> studies.Arm:
    return studies.Arm(name, values, None)


def test_a_winner_at_the_edge_and_a_single_seed_are_said():
    plan = plan_of(run_lora, "--arms", "lr=1")
    arms = [arm(f"lr={lr}", lr=lr) for lr in (0.1, 0.2, 0.3)]
    lines = studies.warnings(plan, arms, {"lr=0.1": 3.0, "lr=0.2": 2.0, "lr=0.3": 1.0})
    assert "chosen by validation loss: lr=0.3; what is told apart above is told on the test rows" in lines
    assert "NOTE the best lr, 0.3, is at the edge of what was tried: try larger" in lines
    assert any(line.startswith("NOTE one seed") for line in lines)
    lines = studies.warnings(plan, arms, {"lr=0.1": 3.0, "lr=0.2": 1.0, "lr=0.3": 2.0})
    assert not any("edge" in line for line in lines)
    several = plan_of(run_lora, "--arms", "lr=1", "--seeds", 3, "--no-final_eval")
    lines = studies.warnings(several, arms, {"lr=0.1": 3.0, "lr=0.2": 1.0, "lr=0.3": 2.0})
    assert lines == ["NOTE lr=0.2 was chosen on the rows it is reported on: use --final_eval"]


@pytest.mark.parametrize("name", ["accuracy", "log loss"])
def test_an_interval_ends_where_the_figure_must(name):
    """One of two seeds learnt: Student's t alone would give an accuracy above 1."""
    rows = Rows(name, np.array([[1.0] * 20, [0.2] * 20]), np.ones(20), np.arange(20))
    wide = difference.mean(rows, [0, 1])["interval"]
    found = studies.possible_mean(rows, [0, 1])
    assert found["mean"] == pytest.approx(0.6) and wide[0] < 0 and wide[1] > 1
    assert found["interval"] == [0.0, 1.0 if name == "accuracy" else wide[1]]


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([{"lr": 0.1}, {"lr": 0.01}, {"lr": 1.0}], True),
        ([{"lr": 0.1}, {"lr": 0.01}], False),
        ([{"lr": 0.1}, {"clip": None}, {}], False),
        ([{"optimizer": "sgd"}, {"optimizer": "adamw"}, {"optimizer": "lion"}], False),
    ],
)
def test_one_numeric_constant_is_drawn_as_a_curve_and_the_rest_as_bars(values, curve, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, *rest, **how: drawn.append(x))
    arms = [arm(str(number), **given) for number, given in enumerate(values)]
    means = {
        each.name: {"mean": 2.0 + i, "interval": [1.5 + i, 2.5 + i], "runs": [2.0 + i]}
        for i, each in enumerate(arms)
    }
    studies.draw(arms, "loss", means, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 3000
    assert drawn == ([[0.01, 0.1, 1.0]] if curve else [])


@pytest.mark.slow
def test_ranks_stop_a_study_together():
    flags = [*SHORT["gpt_scratch"], *ARMS]
    codes = launch("gpt_scratch", "--out", "out", *flags, size=2, sent=("step", 35, 15))
    assert codes == ranks.stopped(2, 15) and "continues the study" in Path("out.txt").read_text()
    assert launch("gpt_scratch", "--out", "out", *flags, size=2) == [0, 0]
    assert len(list(Path("out").glob("*/config.json"))) == 4


def test_the_command_in_the_report_makes_the_same_study_again():
    plan = plan_of(
        run_lora, "--arms", "lr=1e-3", "lr=2e-3", "--seed", 7, "--tag", "mine", "--note", "two words"
    )
    words = studies.words_of(plan)
    given = [run_lora.Config, run_lora.PRESETS, run_lora.SMOKE]
    again = replace(plan, cfg=core.parsed_config(*given, "", words))
    assert core.constants_of(again.cfg) == core.constants_of(plan.cfg)
    assert [arm.cfg.tag for arm in studies.arms_of(again)] == [arm.cfg.tag for arm in studies.arms_of(plan)]
