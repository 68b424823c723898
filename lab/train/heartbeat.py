"""Each rank shows in the store that it lives, and where in the code it is. One that falls silent is named
within a minute, and the others end.

Two small threads beside the work: one writes this rank's beat and reads the others', one sees to it that the
store answers and that the process ends. Torch, tokenizers and compilers let them run. What silences a rank:
SIGSTOP, a frozen machine, a lost network, or one call of a minute that keeps Python's lock (json.loads of
one text of several gigabytes). Silence is counted in looks, not read off a clock: who was stopped himself
and goes on finds the others alive.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

from lab.errors import LostRanks
from lab.run.files import PROJECT
from lab.run.terminal import one_line

BEAT_SECONDS, SILENT_BEATS = 5.0, 11  # so a rank is named within 60 s of its last beat
JOIN_SECONDS = 300.0  # until all are there: one box may read torch from a cold network disk, another not

lost = []  # what was found, for whoever waits: check() raises it
last_words = []  # functions of that text, called before a rank ends that cannot raise it: a run notes it


def check():
    """Raises LostRanks if a rank has fallen silent. For loops that wait."""
    if lost:
        raise LostRanks(lost[0])


class Heartbeat:
    """The beats of rank `rank` of `size`. store: a connection in which nobody else waits.

    parents_store: the torchrun that started this process holds the store: while it is stopped, all wait.
    """

    def __init__(self, store, rank, size, parents_store=False):
        self.store, self.rank, self.size, self.parents_store = store, rank, size, parents_store
        self.seen, self.silent = {}, dict.fromkeys(range(size), 0)  # last beats, and looks since they changed
        self.looks, self.is_gone, self.answers, self._done = 0, False, True, threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._guard)]

    def start(self):
        lost.clear()
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._done.set()
        for thread in self._threads:
            thread.join(1)  # no longer: the store may hang

    def _beat(self):
        while not self._done.is_set():
            try:
                self.look()
            except RuntimeError:  # the connection broke
                self.is_gone, self.answers = True, False
                return
            self._done.wait(BEAT_SECONDS)

    def look(self):
        """Writes this rank's beat, reads the others', notes who is silent."""
        self.store.set(f"beat/{self.rank}", f"{self.looks}\n{socket.gethostname()}\n{place()}")
        self.looks += 1
        for rank in range(self.size):
            if rank == self.rank or not self.store.check([f"beat/{rank}"]):  # wait_for_all waits for these
                continue
            beat = self.store.get(f"beat/{rank}").decode()
            self.silent[rank] = self.silent[rank] + 1 if self.seen.get(rank) == beat else 0
            self.seen[rank] = beat
        if silent := [rank for rank, looks in self.silent.items() if looks >= SILENT_BEATS]:
            named = ", ".join(_described(rank, self.seen[rank]) for rank in silent)
            lost.append(f"{named}: silent for a minute: it was stopped, or its machine or network is gone")

    def _guard(self):
        looks = unanswered = 0
        while not self._done.wait(BEAT_SECONDS):
            unanswered = unanswered + 1 if self.looks == looks else 0
            looks = self.looks
            if unanswered >= SILENT_BEATS and (self.is_gone or not self.parents_store):
                self.answers, word = False, "gone" if self.is_gone else "silent for a minute"
                lost.append(f"the store is {word}: torchrun, or the rank that holds it, was ended")
            if lost and not self._done.wait(2 * BEAT_SECONDS):  # time to raise it, to save, to leave
                self._end(lost[0])

    def stopped(self, beats=2) -> list[str]:
        """Names ranks that have not beaten for `beats` looks; waits for one, twice as long at most."""
        for _ in range(4 * beats):
            if silent := [rank for rank, looks in self.silent.items() if looks >= beats]:
                return [_described(rank, self.seen[rank]) for rank in silent]
            time.sleep(BEAT_SECONDS / 2)
        return []

    def _end(self, text):
        """Ends this process, whose main thread hangs where no exception reaches it."""
        for say in last_words:
            with contextlib.suppress(Exception):  # whatever it is, this process must end
                say(text)
        say_error(text, self.store if self.answers else None)
        os._exit(1)


def say_error(text, store=None):
    """The one line with which a program ends; of all ranks the first says it."""
    try:
        first = store is None or store.add("errors", 1) == 1
    except RuntimeError:  # the store went with the process that held it
        first = True
    if first:
        print(f"{Path(sys.argv[0]).name}: error: {one_line(str(text))}", file=sys.stderr, flush=True)


def _described(rank, beat) -> str:
    _, host, where = beat.split("\n")
    return f"rank {rank} on {host}, last in {where}"


def place() -> str:
    """Where the main thread is: its innermost line of this project that does not just wait for others."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        path = Path(frame.f_code.co_filename)
        inside = path.is_relative_to(PROJECT) and "site-packages" not in path.parts
        if inside and path.parent != PROJECT / "lab" / "train":
            return f"{frame.f_code.co_name} ({path.relative_to(PROJECT)}:{frame.f_lineno})"
        frame = frame.f_back
    return "its start"


def wait_for_all(store, size):
    """Waits until every rank has shown itself; after a minute says who has not, after JOIN_SECONDS raises."""
    began, warned = time.monotonic(), False
    while missing := [str(rank) for rank in range(size) if not store.check([f"beat/{rank}"])]:
        waited = time.monotonic() - began
        named = f"rank {', '.join(missing)} of {size} has not come in {waited:.0f} s"
        if waited > JOIN_SECONDS:
            raise LostRanks(f"{named}: did its process start, and does it reach MASTER_ADDR?")
        if waited > 60 and not warned:
            warned = True
            print(f"{named}; waits up to {JOIN_SECONDS:.0f} s", file=sys.stderr, flush=True)
        time.sleep(0.02)
