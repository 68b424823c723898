"""A rank that falls silent is named; one that is slow, or was stopped and goes on, is not."""

import sys
import threading

import pytest

from lab.errors import LostRanks
from lab.train import heartbeat
from lab.train.heartbeat import Heartbeat


class Store(dict):
    """What a store does, in a dictionary."""

    set = dict.__setitem__

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()

    def add(self, key, more):
        self[key] = more + self.setdefault(key, 0)
        return self[key]


@pytest.fixture(autouse=True)
def nothing_lost():
    heartbeat.lost.clear()
    yield
    heartbeat.lost.clear()


def test_a_silent_rank_is_named_after_so_many_looks_with_its_host_and_place():
    store = Store()
    pulses = [Heartbeat(store, rank, 3) for rank in range(3)]
    for pulse in pulses:
        pulse.look()
    for _ in range(heartbeat.SILENT_BEATS + 1):  # the first of these sees the other's beat for the first time
        heartbeat.check()  # nobody is lost yet
        for pulse in pulses[:2]:
            pulse.look()
    with pytest.raises(
        LostRanks, match=r"rank 2 on \S+, last in .*\(tests/train/test_heartbeat.py:\d+\)"
    ) as found:
        heartbeat.check()
    assert "rank 1" not in str(found.value) and "\n" not in str(found.value)


def test_who_was_stopped_and_goes_on_finds_the_others_alive():
    """However much time has passed: its own looks count."""
    store = Store()
    mine = Heartbeat(store, 0, 2)
    for count in range(3):
        store.set("beat/1", f"{100 * count}\nbox\nhere")
        mine.look()  # and then, an hour and many beats of the other later, once more
    heartbeat.check()
    assert mine.silent == {0: 0, 1: 0}


def test_long_work_is_not_silence_and_a_store_that_is_gone_is_noted(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(heartbeat, "SILENT_BEATS", 10**9)
    store, seen = Store(), threading.Event()
    pulse = Heartbeat(store, 0, 2)
    monkeypatch.setattr(store, "check", lambda keys: pulse.looks > 50 and seen.set())
    pulse.start()
    total = sum(range(3_000_000))  # a main thread that computes
    assert seen.wait(60) and total > 0
    monkeypatch.setattr(store, "check", _broken)
    pulse._threads[0].join(60)
    pulse.stop()
    assert pulse.is_gone and not pulse.answers


def _broken(keys):
    raise RuntimeError("Connection reset by peer")


def test_last_words_that_fail_in_any_way_keep_no_process_alive(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(heartbeat.os, "_exit", ended.append)
    monkeypatch.setattr(heartbeat, "last_words", [_broken])
    Heartbeat(Store(), 0, 2)._end("rank 1 is lost")
    assert ended == [1] and "rank 1 is lost" in capsys.readouterr().err


def test_ranks_that_have_not_come_are_named(monkeypatch, capsys):
    store = Store({"beat/0": "", "beat/2": ""})
    monkeypatch.setattr(heartbeat, "JOIN_SECONDS", 0.0)
    with pytest.raises(LostRanks, match="rank 1, 3 of 4 has not come"):
        heartbeat.wait_for_all(store, 4)
    heartbeat.wait_for_all(store, 1)


def test_an_error_is_said_once_and_holds_no_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/here/run_x.py"])
    store = Store()
    for _ in range(2):
        heartbeat.say_error("row \x1b[2J\nis odd", store)
    assert capsys.readouterr().err == "run_x.py: error: row  [2J / is odd\n"
