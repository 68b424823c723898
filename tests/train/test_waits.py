"""What counts as waiting: the main thread's time in a named stretch, and nobody else's."""

import threading
from types import SimpleNamespace

import pytest
import torch

import core
from lab.data.blocks import Blocks
from lab.train import waits


@pytest.fixture
def clock(monkeypatch):
    """A clock that each look moves on by a second."""
    looks = iter(range(1000))
    monkeypatch.setattr(waits, "time", SimpleNamespace(perf_counter=lambda: float(next(looks))))
    return dict(waits.seconds)


def test_a_stretch_counts_for_what_it_waits_for_even_where_it_ends_in_an_error(clock):
    with waits.waiting("data"):
        pass
    with pytest.raises(ZeroDivisionError), waits.waiting("ranks"):
        1 / 0  # noqa: B018
    assert waits.since(clock) == {"data": 1.0, "ranks": 1.0}


def test_batches_and_reductions_are_such_stretches(clock):
    blocks = Blocks(torch.arange(20).numpy(), 4)
    blocks.batch([0, 1], "cpu")
    blocks.batch([2], "cpu")
    core.all_reduce_sum(core.World(), torch.zeros(1))
    assert waits.since(clock) == {"data": 2.0, "ranks": 1.0}


def test_a_thread_that_prepares_ahead_keeps_nobody_waiting(clock):
    ahead = threading.Thread(target=Blocks(torch.arange(20).numpy(), 4).batch, args=([0], "cpu"))
    ahead.start()
    ahead.join()
    assert waits.since(clock) == {"data": 0.0, "ranks": 0.0}
