"""What a run will need: refused where there is no room, and how many steps fit into the clock."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import everywhere
from torch import nn

import core
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


class Card:
    """What torch.cuda says of a card of 24 GB, of which other programs hold 3; this one has peaked at 10."""

    def __init__(self, peak=10e9, **changes):
        self.mem_get_info = lambda device: (9e9, 24e9)
        self.memory_reserved, self.memory_allocated = (lambda device: 12e9), (lambda device: 5e9)
        self.max_memory_allocated = lambda: peak
        self.get_device_properties = lambda device: SimpleNamespace(total_memory=24e9)
        vars(self).update(changes)


@pytest.fixture
def on_card(monkeypatch):
    def make(**changes):
        monkeypatch.setattr(torch, "pretended", Card(**changes), raising=False)
        return World(device=SimpleNamespace(type="pretended"))

    return make


def test_the_room_on_a_card_is_what_its_driver_calls_free_and_what_is_held_already(on_card):
    assert forecast.device_memory_gb(on_card()) == 21
    untold = RuntimeError("the device doesn't support querying the available free memory")

    def mem_get_info(device):
        raise untold

    assert forecast.device_memory_gb(on_card(mem_get_info=mem_get_info)) == 24
    assert forecast.device_memory_gb(World()) == float("inf")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_memory_is_the_peak_so_far_and_the_state_that_is_to_come(name, on_card):
    model = nn.Linear(10**5, 10**4, bias=False, device="meta")  # 1e9 weights: a moment is 4 GB
    optimizer = core.make_optimizer(model, name, 0.1)
    moments = {"adamw": 2, "sgd": 1}[name]
    assert forecast.needed_gb(on_card(), optimizer) == pytest.approx(10 + 4 * moments)
    optimizer.state[model.weight] = {"exp_avg": model.weight}  # resumed: it is there already
    assert forecast.needed_gb(on_card(), optimizer) == pytest.approx(10)


def test_a_part_is_left_for_fragments_before_a_micro_batch_is_called_the_largest(on_card):
    model = nn.Linear(10, 10)
    optimizer = core.make_optimizer(model, "sgd", 0.1)
    assert forecast.has_room(on_card(peak=0.91 * 21e9), optimizer)
    assert not forecast.has_room(on_card(peak=0.93 * 21e9), optimizer)
    run = make_run()
    run.world = on_card(peak=0.93 * 21e9)  # a typed one is refused where there is no room at all
    forecast.forecast(run, model, optimizer, 100, 0.5, 0.8)
    assert "a step takes 19.53 GB" in run.lines[0]
    run.world = on_card(peak=22e9)
    with pytest.raises(
        UserError, match=r"training needs 22.0 GB, the device has 21.0: use a smaller --micro"
    ):
        forecast.forecast(run, model, optimizer, 100, 0.5, 0.8)


def test_too_little_memory_on_one_rank_is_refused_on_all(monkeypatch):
    def with_rank_1(world, figures):
        return figures + torch.tensor([[0.0, 0.0], [30.0, 24.0]], dtype=torch.float64)

    run = make_run()
    run.world = World(size=2)
    everywhere(monkeypatch.setattr, forecast, "all_reduce_sum", with_rank_1)
    everywhere(monkeypatch.setattr, forecast, "on_main", lambda world, function, *given: function(*given))
    with pytest.raises(UserError, match=r"training needs 30.0 GB, the device has 24.0"):
        look_ahead(run)
