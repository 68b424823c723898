"""Micro-batches laid out beside an accelerator: the same ones in the same order, faults told, no thread left.

No accelerator is needed: a device of another type than a CPU switches the thread on.
"""

import threading
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from toys.sft import BARE, go, toy_file

import core
from core import World
from lab.data import pairs
from lab.train import prefetch

LENGTHS = np.random.default_rng(0).integers(1, 40, 60)


@pytest.fixture
def card(monkeypatch):
    """A device with a thread beside it; it lists the threads that took it as theirs."""
    chosen = []
    kind = SimpleNamespace(set_device=lambda device: chosen.append((device, threading.current_thread())))
    monkeypatch.setattr(torch, "pretended", kind, raising=False)
    device = SimpleNamespace(type="pretended", chosen=chosen)
    yield device
    assert threads() == []


def threads():
    """Those that lay out rows, and stay when they are through."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith("next batch")]
    for thread in found:
        thread.join(30)
    return [thread for thread in found if thread.is_alive()]


def make(device, lay_out, lengths=LENGTHS, **constants):
    cfg = SimpleNamespace(**{"micro_batch": None, "micro_tokens": 100} | constants)
    run = SimpleNamespace(cfg=cfg, world=World(device=device), rows_ahead=[])
    return run, core.MicroBatches(run, torch.nn.Linear(1, 1), lay_out, lengths)


def whole_run(device, steps=8, ahead=True, **how):
    """(what every step was given, in which threads it was laid out)"""
    laid, given = [], []

    def lay_out(part, device):
        laid.append(threading.current_thread().name.partition("_")[0])
        return [LENGTHS[row] for row in part]

    run, parts = make(device, lay_out, **how)
    batches = core.ShardedBatches(LENGTHS, 12, run.world, seed=1)
    for step in range(steps):
        run.rows_ahead = batches.rank_batch(step + 1) if ahead and step + 1 < steps else []
        given.append(list(parts(batches.rank_batch(step))))
    return given, laid


@pytest.mark.parametrize(
    "how", [{}, {"micro_batch": 5}, {"lengths": None}, {"lengths": None, "micro_batch": 5}]
)
def test_the_thread_gives_the_same_parts_in_the_same_order_over_the_end_of_an_epoch(card, how):
    given, laid = whole_run(card, **how)
    expected, here = whole_run(torch.device("cpu"), **how)
    assert given == expected and len(laid) == len(here)
    first = len(given[0])
    assert laid == ["MainThread"] * first + ["next batch"] * (len(laid) - first)
    assert set(here) == {"MainThread"}  # a CPU's cores are busy
    assert [device is card for device, _ in card.chosen] == [True] * 7


def test_without_a_next_step_nothing_is_prepared(card):
    given, laid = whole_run(card, ahead=False)
    assert given == whole_run(torch.device("cpu"))[0] and set(laid) == {"MainThread"}


def test_what_was_prepared_for_other_rows_is_not_used(card):
    run, parts = make(card, lambda part, device: sorted(part), micro_batch=2)
    run.rows_ahead = [5, 6, 7]
    list(parts([1, 2]))
    run.rows_ahead = []
    assert [batch for _, batch in parts([8, 9, 10])] == [sorted(part) for part in parts.cut([8, 9, 10])]


def test_an_error_in_the_thread_is_raised_where_its_batch_is_asked_for_with_its_own_lines(card):
    def lay_out(part, device):
        return broken_row(part) if 7 in part else part

    def broken_row(part):
        raise ValueError("row 7 is broken")

    run, parts = make(card, lay_out)
    run.rows_ahead = [6, 7]
    assert [part for part, _ in parts([1, 2])]  # this step is whole
    with pytest.raises(ValueError, match="row 7 is broken") as error:
        list(parts([6, 7]))
    assert "broken_row" in {frame.name for frame in traceback.extract_tb(error.value.__traceback__)}
    run.rows_ahead = []
    assert list(parts([1, 2]))  # it is told once


def test_the_thread_ends_with_its_work_though_nobody_takes_it(card):
    run, parts = make(card, lambda part, device: part)
    run.rows_ahead = [3, 4]
    list(parts([1, 2]))
    assert threads() == []


def test_a_run_ends_with_the_same_weights_and_all_steps_but_the_first_were_ready(monkeypatch):
    """The thread switched on beside a CPU, over an evaluation, which takes no part in it."""
    flags = ["--data", toy_file(), *BARE, "--max_steps", 4, "--eval_every", 2]
    expected, ready, prepared = go("run_lora", *flags)[0], [], prefetch.MicroBatches._prepared

    def noted(self, rows):
        made = prepared(self, rows)
        ready.append(made is not None)
        return made

    monkeypatch.setattr(prefetch.MicroBatches, "_prepared", noted)
    ranks.everywhere(monkeypatch.setattr, prefetch, "prepares", lambda world: True)
    assert go("run_lora", *flags)[0]["weights_sha256"] == expected["weights_sha256"]
    assert ready == [False, False, False, True, True, True]  # twice rehearsed, four steps
    assert threads() == []


def test_pairs_are_prepared_as_their_step_will_ask_for_them():
    """Whether A and B of a row are swapped depends on the step: rows_ahead become pairs of its own."""
    cfg = SimpleNamespace(swap_augmentation=True, batch=8, seed=3)
    swaps = [pairs.swapped(cfg, 0, step) for step in (4, 5)]
    assert swaps[0] != swaps[1] and pairs.swapped(cfg, 0, 5) == swaps[1]
    shown = pairs.shown_rows(np.arange(100, 200), [3, 1, 4], swaps[1][:3])
    assert shown == list(zip([103, 101, 104], swaps[1][:3], strict=True))
    assert pairs.shown_rows(np.arange(100, 200), [3]) == [(103, False)]
