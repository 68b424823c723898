"""Loss, rates and clocks of the log lines."""

import pytest

from core import World
from lab.run.meter import Meter, clock


def test_a_reading_is_the_mean_since_the_last_one_and_the_rate_that_of_the_process():
    meter = Meter(World())
    assert meter.rate() is None
    meter.add(6.0, 4, 2, 0.5)
    meter.add(2.0, 4, 2, 1.5)
    assert meter.read() == (1.0, 2.0, 1.0)  # 8 nats over 8 targets; 4 examples in 2 s; 2 steps in 2 s
    meter.add(3.0, 1, 6, 1.0)
    assert meter.read() == (3.0, 6.0, 1.0)
    assert meter.rate() == pytest.approx(10 / 3)


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
