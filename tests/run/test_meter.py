"""Loss and rates of the log lines; the clock that may end a run."""

from types import SimpleNamespace

import pytest

from core import World
from lab.run import meter as module
from lab.run.meter import Clock, Meter, clock, with_shares
from lab.train import waits


def test_a_reading_is_the_mean_since_the_last_one_and_the_rate_that_of_the_process():
    meter = Meter(World())
    assert meter.rate() is None
    meter.add(6.0, 4, 2, 0.5)
    meter.add(2.0, 4, 2, 1.5)
    assert meter.read() == (1.0, 2.0, 1.0)  # 8 nats over 8 targets; 4 examples in 2 s; 2 steps in 2 s
    meter.add(3.0, 1, 6, 1.0)
    assert meter.read() == (3.0, 6.0, 1.0)
    assert meter.rate() == pytest.approx(10 / 3)


def test_shares_are_of_the_time_of_the_steps_since_the_last_reading():
    alone, one_of_two = Meter(World()), Meter(World(size=2))
    for meter in (alone, one_of_two):
        meter.add(6.0, 4, 2, 0.5, at_peak=0.2, waited={"data": 0.1, "ranks": 0.3})
        meter.add(6.0, 4, 2, 1.5, at_peak=0.6, waited={"data": 0.0, "ranks": 0.1})
    assert alone.shares() == pytest.approx({"mfu": 0.4, "wait/data": 0.05})
    assert one_of_two.shares() == pytest.approx({"mfu": 0.4, "wait/data": 0.05, "wait/ranks": 0.2})
    alone.read()
    alone.add(6.0, 4, 2, 0.5)  # on a CPU
    assert alone.shares() == {"wait/data": 0.0}


LINE = "epoch 1.25/10  step 1200/3600  loss 3.1234  lr 1.0e-03  grad 1.23  123456 tokens/s  eta 0:12:34"


@pytest.mark.parametrize(
    ("line", "shares", "added"),
    [
        (LINE, {"mfu": 0.414, "wait/data": 0.049}, "  mfu 41%"),
        (LINE, {"wait/data": 0.049, "wait/ranks": 0.0}, ""),
        (LINE, {"wait/data": 0.12, "wait/ranks": 0.3}, "  data 12%"),
        (LINE[9:], {"mfu": 0.41, "wait/data": 0.01, "wait/ranks": 0.05}, "  mfu 41%  ranks 5%"),
        (LINE + 12 * ".", {"mfu": 0.41}, ""),
    ],
)
def test_a_log_line_has_the_shares_that_matter_and_at_most_110_columns(line, shares, added):
    assert with_shares(line, shares) == line + added and len(line + added) <= 110


def test_the_rate_is_that_of_all_folds_and_a_fold_begins_without_the_last_ones_loss():
    meter = Meter(World())
    meter.add(6.0, 4, 2, 0.5)
    meter.begin()
    assert meter.sums() == [0.0, 0]
    meter.add(1.0, 1, 8, 4.5)
    assert meter.rate() == pytest.approx(2.0)


def test_no_step_since_the_last_reading_divides_by_nothing():
    assert Meter(World()).read() == (0.0, 0.0, 0.0)


def test_sums_travel_in_checkpoints_and_only_rank_0_carries_them():
    meter = Meter(World())
    meter.add(6.0, 4, 2, 0.5)
    resumed = Meter(World(), meter.sums())
    resumed.add(2.0, 4, 2, 0.5)
    assert resumed.sums() == [8.0, 8]
    assert Meter(World(rank=1), (6.0, 4)).loss == 0.0  # the others would count it again


def test_seconds_are_shown_as_a_clock():
    assert [clock(seconds) for seconds in (0.4, 59.6, 3723, 90000)] == [
        "0:00:00",
        "0:01:00",
        "1:02:03",
        "1 day, 1:00:00",
    ]


def test_a_clock_counts_steps_alone_over_all_processes_and_without_minutes_ends_nothing(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    first, endless = Clock(1.0), Clock(None, seconds=1e9)
    for seconds, between in [(6.0, 100.0), (9.0, 0.0)]:
        first.begin_step()
        now[0] += seconds
        monkeypatch.setitem(waits.seconds, "data", waits.seconds["data"] + 2)
        assert first.end_step() == seconds
        assert first.waited() == pytest.approx({"data": 2, "ranks": 0})
        now[0] += between  # an evaluation
    assert Clock(1.0, first.seconds).spent() == pytest.approx(0.25) and endless.spent() == 0.0
    assert endless.schedule_length(7, 100) == 100


def test_a_schedule_spans_what_the_clock_leaves_and_never_ends_before_its_step():
    ours = Clock(1.0)
    assert ours.schedule_length(0, 100) == 100  # nothing is known yet
    ours.fit = 40
    assert ours.schedule_length(0, 100) == 40 and ours.schedule_length(0, 30) == 30
    for share, step, total, expected in [
        (0.25, 10, 10**9, 40),
        (0.25, 10, 30, 30),
        (0.999, 7, 10**9, 8),
        (0.5, 0, 10**9, 1),
        (0.3, 10, 10**9, 10 / 0.3),
    ]:
        ours.share = share
        assert ours.schedule_length(step, total) == expected
