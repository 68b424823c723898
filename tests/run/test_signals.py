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
