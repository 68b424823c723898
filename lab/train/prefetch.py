"""A rank's rows in micro-batches on its device; beside an accelerator a thread lays out the next step's."""

import contextlib
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from lab.train.batches import cut, in_turn
from lab.train.waits import waiting


def prepares(world) -> bool:
    """Whether the next step's rows are laid out meanwhile: not on a CPU, whose cores are busy computing."""
    return world.device.type != "cpu"


class MicroBatches:
    """micro_batches(rows) yields (part, batch): some of `rows`, and what lay_out(part, device) makes of them.

    Parts have cfg.micro_batch rows; none: all of them, or with the `lengths` of rows groups of similar ones
    within cfg.micro_tokens. Ranks exchange gradients in the last backward only.
    While an accelerator computes, a thread lays out the rows that the run will ask for next (run.rows_ahead):
    the same batches in the same order, since rows depend on the step alone and laying them out draws nothing.
    """

    def __init__(self, run, model, lay_out, lengths=None):
        self.run, self.model, self.lay_out, self.lengths = run, model, lay_out, lengths
        self.size, self.most = run.cfg.micro_batch, getattr(run.cfg, "micro_tokens", math.inf)
        self.found = None  # (constant, its value, what `halve` has made of it)
        self._ahead = None  # (rows, Future of what `_whole` returns)

    def __call__(self, rows):
        parts = self._prepared(rows) or [(part, None) for part in self.cut(rows)]
        for part, batch in in_turn(self.model, parts):
            yield part, self.lay_out(part, self.run.world.device) if batch is None else batch
        self._prepare(self.run.rows_ahead)  # the last backward is on its way: this thread is about to wait

    def cut(self, rows) -> list[list]:
        """The parts of `rows`."""
        return cut(rows, self.size, None if self.lengths is None else self.lengths[rows], self.most)

    def _prepare(self, rows):
        if not (rows and prepares(self.run.world)):
            return
        pool = ThreadPoolExecutor(1, "next batch")
        self._ahead = rows, pool.submit(self._whole, rows)
        pool.shutdown(wait=False)  # the thread ends with its work

    def _whole(self, rows) -> list[tuple]:
        """The parts of `rows`, each with its batch."""
        device = self.run.world.device
        getattr(torch, device.type).set_device(device)  # of this thread; else pinned memory would be GPU 0's
        return [(part, self.lay_out(part, device)) for part in self.cut(rows)]

    def _prepared(self, rows) -> list[tuple] | None:
        """What the thread has made, if it is of these rows. Raises what it raised."""
        (ahead, made), self._ahead = self._ahead or (None, None), None
        with waiting("data"):
            whole = made.result() if made else None
        return whole if ahead == rows else None

    # -- how many rows at once -----------------------------------------------------------------------------

    def at_once(self, rows) -> int:
        """The most of these rows that one forward sees."""
        return max(map(len, self.cut(rows)))

    def halve(self, rows) -> bool:
        """Makes parts of these rows half as large. Returns whether that was possible: not with a micro_batch
        that somebody has set, nor below one row."""
        if self.run.cfg.micro_batch or (n := self.at_once(rows)) == 1:
            return False
        if self.lengths is None:
            self.size = n // 2
            self.found = "micro_batch", len(rows), self.size
        else:
            parts = [part for part in self.cut(rows) if len(part) > 1]
            most = max(len(part) * int(self.lengths[part].max()) for part in parts)
            self.most = most // 2
            self.found = "micro_tokens", self.run.cfg.micro_tokens, self.most
        return True

    @contextlib.contextmanager
    def for_evaluation(self):
        """Context in which `rows` are one part, and the model evaluates, uncompiled."""
        before, self.size = self.size, sys.maxsize
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.size = before
            self.model.train()
