"""A second signal leaves at once, unless it belongs to the same event."""

import signal
from pathlib import Path

from ranks import everywhere

import core
from core import World
from lab.run import signals


def test_a_second_signal_leaves_at_once_but_a_hangup_beside_it_is_the_same_event(monkeypatch):
    left = []
    everywhere(monkeypatch.setattr, signals, "leave_at_once", lambda number, world: left.append(number))
    run = core.Run.__new__(core.Run)
    run.world, run._signal, run._deferring = World(), None, True
    run.checkpoint, run._log = None, open("log.txt", "a")
    run._on_signal(signal.SIGTERM, None)
    run._on_signal(signal.SIGHUP, None)  # a session that ends sends both
    assert run._signal == "SIGTERM" and left == []
    run._on_signal(signal.SIGTERM, None)
    assert left == [signal.SIGTERM]
    assert Path("log.txt").read_text() == "second signal: out at once; nothing is saved\n"
    run.checkpoint = "step_00000010"
    run._on_signal(signal.SIGTERM, None)
    assert "the newest checkpoint is step_00000010" in Path("log.txt").read_text()
    run._log.close()
    run._on_signal(signal.SIGTERM, None)
    assert len(left) == 3
