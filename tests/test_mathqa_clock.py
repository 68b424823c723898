"""The clock that ends a stage of run_mathqa.py, and the schedule that ends with it."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import everywhere, newest, result, run
from torch import nn
from toys.quantise import TINY, here, metrics, parsed

import core
from lab.run import meter
from lab.train import optim

BUDGET = 99.93  # seconds
SPEEDS = {  # of step n
    "even": lambda n: 0.25,
    "fast, then slow": lambda n: 0.1 if n < 200 else 0.8,
    "slow, then fast": lambda n: 0.8 if n < 60 else 0.1,
    "slow first step": lambda n: 20.0 if n == 0 else 0.2,
    "uneven": lambda n: 0.1 + 0.4 * (n * 7919 % 11) / 11,
}
CLOCKED = {
    "cosine": {"schedule": "cosine", "warmup": 0.05},
    "linear": {"schedule": "linear", "warmup": 0.1},
    "one_cycle": {"schedule": "one_cycle", "warmup": 0.3},
}


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """A Run that has not begun."""
    cfg = parsed("--smoke", "--mode", "train", "--out", tmp_path_factory.mktemp("clock"))
    with core.open_run(cfg, core.World(), "run_mathqa.py") as one:
        yield one


@pytest.fixture
def clocked(one_run, monkeypatch):
    """make(max_minutes, lr=..., ...) -> (a fresh Run, now): its steps last as long as `now` is moved."""
    now = fake_clock(monkeypatch)

    def make(max_minutes, **constants):
        monkeypatch.setattr(
            one_run, "cfg", dataclasses.replace(one_run.cfg, max_minutes=max_minutes, **constants)
        )
        one_run.clock = meter.Clock(max_minutes)
        return one_run, now

    return make


def fake_clock(monkeypatch):
    """[seconds] that time.perf_counter gives to lab/run/meter.py."""
    now = [1000.0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def path_of(run, now, total_steps, seconds, forecast):
    """[(lr, length)] of a run as core.steps goes through it; step n lasts seconds(n)."""
    model = nn.Linear(2, 2)
    run.forecast(model, torch.optim.AdamW(model.parameters()), total_steps, forecast, 1.0)
    step, path = 0, []
    while True:
        run.agree()
        if step >= total_steps or run.clock.share >= 1:
            return path
        length = run.clock.schedule_length(step, total_steps)
        path.append((core.lr_at(run.cfg, step, length), length))
        now[0] += seconds(step)
        run.step_done(0.0, 0, 0)
        step += 1


@pytest.mark.parametrize("forecast", [0.05, 0.25, 3.0])
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("schedule", CLOCKED)
def test_a_schedule_ends_with_the_clock_whatever_the_speed(schedule, speed, forecast, clocked):
    one, now = clocked(BUDGET / 60, lr=1.0, **CLOCKED[schedule])
    path = path_of(one, now, core.FOREVER, SPEEDS[speed], forecast)
    rates = [lr for lr, _ in path]
    spent = np.cumsum([SPEEDS[speed](n) for n in range(len(path))])
    assert spent[-1] >= BUDGET > spent[-2] and one.clock.seconds == pytest.approx(spent[-1])
    assert path[0][1] == round(BUDGET / forecast) and rates[0] == core.lr_at(
        one.cfg, 0, round(BUDGET / forecast)
    )
    assert rates[-1] <= 0.02
    # the rate of a step is that of the share of the clock spent, up to a step's rounding
    for n in range(5, len(path)):
        share, room = spent[n - 1] / BUDGET, 1.5 / path[n][1]
        ends = [core.lr_at(one.cfg, round(1e6 * min(1, max(0, share + d))), 10**6) for d in (-room, 0, room)]
        peak = [1.0] if abs(share - one.cfg.warmup) <= 2 * room else []
        assert min(ends) - 0.02 <= rates[n] <= max(ends + peak) + 0.02
    peak = int(np.argmax(rates[20:])) + 20 if one.cfg.warmup * BUDGET > spent[19] else 20
    assert max(np.diff(rates[peak:])) <= 2.5 / min(length for _, length in path[peak:])
    if speed != "slow first step" and forecast <= 0.25:
        assert max(rates) > 0.98


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("schedule", CLOCKED)
def test_a_bound_in_steps_wins_where_it_comes_first(schedule, speed, clocked):
    one, now = clocked(BUDGET / 60, lr=1.0, **CLOCKED[schedule])
    path = path_of(one, now, 80, lambda n: SPEEDS[speed](n) / 2, 0.25)
    assert len(path) == 80 and one.clock.share < 1
    assert path[0][1] == 80 == path[-1][1]
    if speed in ("even", "fast, then slow", "uneven"):  # the clock never looked like the end
        assert path == [(core.lr_at(one.cfg, n, 80), 80) for n in range(80)]
    assert path[-1][0] == core.lr_at(one.cfg, 79, 80) <= 0.02


def test_without_a_clock_the_schedule_is_as_long_as_the_steps(clocked):
    one, now = clocked(None, lr=1.0, schedule="cosine")
    assert [length for _, length in path_of(one, now, 30, lambda n: 1e6, 0.1)] == [30] * 30


@pytest.mark.slow
@pytest.mark.parametrize("schedule", CLOCKED)
def test_the_script_itself_anneals_by_the_clock(schedule, monkeypatch):
    now, taken = fake_clock(monkeypatch), []
    original = core.optimizer_step

    def slow_step(optimizer, *args, **kwargs):
        norm = original(optimizer, *args, **kwargs)
        taken.append(optimizer.param_groups[0]["lr"])
        now[0] += 0.5 if len(taken) < 30 else 2.0
        return norm

    everywhere(monkeypatch.setattr, optim, "optimizer_step", slow_step)
    constants = [word for name, value in CLOCKED[schedule].items() for word in (f"--{name}", value)]
    here(
        *TINY,
        "--max_steps",
        "none",
        "--max_minutes",
        1,
        "--lr",
        1e-3,
        *constants,
        "--final_eval",
        "--eval_every",
        100,
    )
    clocked = [row for row in metrics() if "clock/lr" in row]
    assert [row["clock/lr"] for row in clocked] == taken and result()["steps"] == len(taken) == 52
    assert clocked[-1]["clock/share"] == pytest.approx(58.5 / 60) and max(taken) >= 0.9e-3
    assert taken[-1] <= 0.05e-3 and max(np.diff(taken[int(np.argmax(taken)) :])) <= 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_stop_on_one_step_when_the_clock_is_out(size):
    found = run("run_mathqa", *TINY, "--max_steps", "none", "--max_minutes", 0.02, size=size)
    assert found["status"] == "finished" and found["steps"] > 0 and found["train_seconds"] >= 1.2
    rows = [row for row in metrics() if "clock/lr" in row]
    assert len(rows) == found["steps"] == rows[-1]["step"]
    peak = json.loads((newest() / "config.json").read_text())["constants"]["lr"]
    progress = (rows[-1]["clock/share"] - 0.1) / 0.9 - 2 / len(rows)  # whole steps: a busy machine makes few
    assert rows[-1]["clock/lr"] <= peak * 0.5 * (1 + math.cos(math.pi * max(0, progress))) + 1e-9
    assert "0.02 minutes of training are spent" in Path("out.txt").read_text()
