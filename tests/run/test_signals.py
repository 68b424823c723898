"""A second signal leaves at once, unless it belongs to the same event."""

import os
import signal
from pathlib import Path

from ranks import everywhere

from core import World
from lab.run import signals


def test_a_second_signal_leaves_at_once_but_a_hangup_beside_it_is_the_same_event(monkeypatch):
    left, before = [], signal.getsignal(signal.SIGTERM)
    everywhere(monkeypatch.setattr, signals, "leave_at_once", lambda number, world: left.append(number))
    heard = signals.Signals(World())
    heard.deferring, heard.log = True, open("log.txt", "a")
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)  # a session that ends sends both
    assert heard.name == "SIGTERM" and left == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert left == [signal.SIGTERM]
    assert Path("log.txt").read_text() == "second signal: out at once; nothing is saved\n"
    heard.saved = "the newest checkpoint is step_00000010"
    os.kill(os.getpid(), signal.SIGTERM)
    assert "the newest checkpoint is step_00000010" in Path("log.txt").read_text()
    heard.log.close()
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(left) == 3
    heard.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_mode_that_keeps_nothing_promises_no_save(capfd, monkeypatch):
    for saves, said in [(True, "SIGHUP: saves after this step;"), (False, "SIGHUP: ends after this step;")]:
        heard = signals.Signals(World())
        heard.deferring, heard.saves = True, saves
        os.kill(os.getpid(), signal.SIGHUP)
        heard.close()
        signals.heard_signals.clear()
        assert capfd.readouterr().err.startswith(said)


def test_after_a_signal_a_rank_of_torchrun_is_not_killed_on_its_way_out(monkeypatch):
    """All is written when the handlers are given back; the TERM behind a terminal's HUP comes as it likes."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signals, "heard_signals", [])
    for size, stays in [(2, True), (1, False)]:
        signals.heard_signals.clear()
        heard = signals.Signals(World(size=size))
        heard.deferring = True
        os.kill(os.getpid(), signal.SIGHUP)
        heard.close()
        assert (signal.getsignal(signal.SIGTERM) is not before) is stays
        if stays:
            os.kill(os.getpid(), signal.SIGTERM)  # nothing happens
        signals.heard_signals.clear()
        heard.close()
    assert signal.getsignal(signal.SIGTERM) is before
