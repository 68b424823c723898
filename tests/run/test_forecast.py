"""What a run will need: refused where there is no room, and how many steps fit into the clock."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import everywhere
from torch import nn

from core import UserError, World
from lab.run import flags, forecast
from lab.run.meter import Clock


def make_run(**changes):
    cfg = {"keep": 2, "folds": None, "max_minutes": None, "price_per_hour": None, "mode": "train"}
    run = SimpleNamespace(world=World(), folder=Path(), resumed=False, lines=[], step=0)
    run.cfg = SimpleNamespace(**cfg | changes, typed=SimpleNamespace(runs=1))
    run.say, run.clock = run.lines.append, Clock(run.cfg.max_minutes)
    return run


def look_ahead(run, steps=100, seconds=0.5, typical=0.8, dtype=torch.float32):
    model = nn.Linear(1000, 1000, bias=False, dtype=dtype)
    return forecast.forecast(run, model, torch.optim.AdamW(model.parameters()), steps, seconds, typical)


def test_the_line_is_steps_times_a_typical_step_and_the_disk_of_all_that_is_kept():
    run = make_run(price_per_hour=90.0)
    assert look_ahead(run) is None
    (line,) = run.lines
    assert line.startswith("forecast  100 steps  training 0:00:40  a step takes ")
    # 4 MB of weights: with two moments 12 MB a checkpoint, 3 of them; best weights of one fold, twice
    assert line.endswith("disk 44 MB  $1.00")


def test_fp64_takes_twice_the_disk_and_what_keeps_nothing_none():
    run = make_run()
    look_ahead(run, dtype=torch.float64)
    assert run.lines[0].endswith("disk 88 MB")
    run = make_run(mode="find_lr")
    look_ahead(run)
    assert run.lines[0].endswith("disk 0 MB")


def test_minutes_bound_the_steps_and_what_was_trained_before_counts():
    run = make_run(max_minutes=1.0)
    assert look_ahead(run, steps=1000) == 150  # of 0.4 s each
    assert "forecast  150 steps  training 0:01:00" in run.lines[0]
    run.clock.seconds, run.step = 45.0, 112
    assert look_ahead(run, steps=1000) == 112 + 38
    assert "forecast  38 steps  training 0:00:15" in run.lines[1]


def test_the_first_run_of_a_study_forecasts_all_that_are_to_be_made():
    run = make_run(price_per_hour=90.0)
    run.cfg.typed = flags.Typed(runs=3)
    look_ahead(run)  # 40 s each
    assert run.lines[1:] == ["study  3 runs are left: about 0:02:00, 3.00 dollars"]
    run.clock.seconds = 45.0  # resumed: the others begin at step 0
    look_ahead(run)
    assert run.lines[3:] == ["study  3 runs are left: about 0:03:30, 5.25 dollars"]


def test_too_little_disk_is_refused_for_a_new_run_only(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=43e6))
    with pytest.raises(
        UserError, match=r"checkpoints need 44 MB, [.] has 43 MB free: free some, or use another"
    ):
        look_ahead(make_run())
    run = make_run()
    run.resumed = True
    look_ahead(run)
    assert len(run.lines) == 1
    look_ahead(make_run(mode="find_lr"))  # it writes none


def test_too_little_memory_is_refused(monkeypatch):
    everywhere(monkeypatch.setattr, forecast, "device_memory_gb", lambda world: 0.001)
    with pytest.raises(
        UserError, match=r"training needs [\d.]+ GB, the device has 0.0: use a smaller --micro"
    ):
        look_ahead(make_run())


def test_too_little_memory_on_one_rank_is_refused_on_all(monkeypatch):
    def with_rank_1(world, figures):
        return figures + torch.tensor([[0.0, 0.0], [30.0, 24.0]], dtype=torch.float64)

    run = make_run()
    run.world = World(size=2)
    everywhere(monkeypatch.setattr, forecast, "all_reduce_sum", with_rank_1)
    everywhere(monkeypatch.setattr, forecast, "on_main", lambda world, function, *given: function(*given))
    with pytest.raises(UserError, match=r"training needs 30.0 GB, the device has 24.0"):
        look_ahead(run)
