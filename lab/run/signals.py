"""Signals outside a run (studies, eval.py), and when a second one leaves at once."""

import contextlib
import os
import signal
import time

import torch

from lab.errors import Stop
from lab.train.processes import all_reduce_sum, die_of, heard_signals, may_leave, under_torchrun


def forces_exit(first, first_time, name, now, world) -> bool:
    """Whether a second signal, `name` after `first`, ends the process at once: a
    person does not want to wait.

    Not a HUP: nobody presses keys at a terminal that is gone, but the kernel and the shell send one each, and
    tmux or sshd may add theirs. Not another signal within a second: a session that ends sends TERM and HUP.
    torchrun's workers may get that TERM twice, from the session and from torchrun, which also turns its own
    second HUP, however late, into a TERM for them.
    """
    torchrun = under_torchrun(world)
    if name == "SIGHUP" or (torchrun and (first, name) == ("SIGHUP", "SIGTERM")):
        return False
    return now - first_time > 1 or (name == first and not torchrun)


def leave_at_once(number, world):
    """Ends this process after a second signal. Plain python dies of the signal, so a
    shell's loop ends too."""
    if not under_torchrun(world):
        die_of(number)
    os._exit(1)


@contextlib.contextmanager
def listening(world):
    """Yields poll(active), which sums `active` over the ranks and raises Stop on all of them after a signal.

    A single process stops at once. A second signal always does, except those of a terminal that closes.
    """
    heard, before = [], {}
    heard_signals.clear()

    def on_signal(number, frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if not heard:
            heard.append((name, now))
            heard_signals.append(number)
            if may_leave(world):
                raise Stop(name)
        elif forces_exit(*heard[0], name, now, world):
            leave_at_once(number, world)

    def poll(active=0) -> int:
        mine = heard_signals  # also what a run of a study heard too late to stop
        total, signalled = all_reduce_sum(world, torch.tensor([active, len(mine)])).tolist()
        if signalled:
            raise Stop(signal.Signals(mine[0]).name if mine else "a signal to another rank")
        return total

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, on_signal)
    try:
        yield poll
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
