"""What a run, and what a study or eval.py, does with a signal; when a second one leaves at once."""

import contextlib
import os
import signal
import time

import torch

from lab.errors import Stop
from lab.run.terminal import write_in_handler
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


def heed(handler) -> dict:
    """Gives TERM, Ctrl-C and HUP to a handler, but for what nohup ignores. Returns the handlers before it."""
    named = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows knows no HUP
    numbers = [getattr(signal, name) for name in named if hasattr(signal, name)]
    return {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}


def restore(handlers, world):
    """Gives the handlers back. Not under torchrun after a signal: all is written then, and the TERM that
    follows a HUP must not kill a rank on its way out."""
    if heard_signals and under_torchrun(world):
        return
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Signals:
    """A run's signals, from its opening to its end. `name`: the first one heard, or None.

    While it is not `deferring` (nothing to save yet) a single process leaves at once; then the first signal
    is only noted: the ranks agree on it between two steps. A second one ends the process, and says what is
    `saved`.
    """

    def __init__(self, world):
        self.world, self.name, self.log, self.deferring = world, None, None, False
        self.saved, self.saves = "nothing is saved", True  # saves: the mode writes checkpoints
        self._heard = 0.0
        self._before = heed(self._on_signal)

    def leave(self):
        """Raises Stop after a signal."""
        if self.name:
            raise Stop(self.name)

    def close(self):
        restore(self._before, self.world)

    def _on_signal(self, number, frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if self.name is None:
            self.name, self._heard = name, now
            heard_signals.append(number)
            if not self.deferring and may_leave(self.world):
                raise Stop(name)  # nothing to save: leave from wherever this is
            if self.world.is_main:
                next_thing = f"{'saves' if self.saves else 'ends'} after this step"
                write_in_handler(f"{name}: {next_thing}; one more Ctrl-C leaves at once\n")
        elif forces_exit(self.name, self._heard, name, now, self.world):
            write_in_handler(f"second signal: out at once; {self.saved}\n", self.log)
            leave_at_once(number, self.world)


@contextlib.contextmanager
def listening(world):
    """Yields poll(active), which sums `active` over the ranks and raises Stop on all of them after a signal.

    A single process stops at once. A second signal always does, except those of a terminal that closes.
    """
    heard = []
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

    before = heed(on_signal)
    try:
        yield poll
    finally:
        restore(before, world)
