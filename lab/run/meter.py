"""Loss and rates of the log lines; the clock that may end a run."""

import datetime
import time

import torch

from lab.train import waits
from lab.train.processes import all_reduce_sum


class Meter:
    """Loss, targets and time since the last log line. Checkpoints hold the sums, so a
    resumed curve is the same."""

    def __init__(self, world, sums=(0.0, 0)):
        self.world, self.all_examples, self.all_seconds = world, 0, 0.0
        self.begin(sums)

    def begin(self, sums=(0.0, 0)):
        """Sets the loss sum and targets since the last log line. For a fold, too: the rate is that of all."""
        # the stored sum is global: one rank carries it
        self._restart(sums[0] if self.world.is_main else 0.0, sums[1])

    def _restart(self, loss=0.0, targets=0):
        self.loss, self.targets, self.steps, self.examples, self.seconds = loss, targets, 0, 0, 0.0
        self.at_peak, self.waited = 0.0, dict.fromkeys(waits.seconds, 0.0)

    def add(self, loss_sum, targets, examples, seconds, at_peak=0.0, waited=None):
        """Adds a step: this rank's summed loss, global targets and examples, seconds.

        at_peak: seconds that the cards would take at their peak, if it is known; waited: for what -> seconds.
        """
        self.loss, self.targets, self.steps = self.loss + loss_sum, self.targets + targets, self.steps + 1
        self.examples, self.seconds = self.examples + examples, self.seconds + seconds
        self.at_peak += at_peak
        for what, spent in (waited or {}).items():
            self.waited[what] += spent
        self.all_examples, self.all_seconds = self.all_examples + examples, self.all_seconds + seconds

    def sums(self) -> list:
        """Returns [global loss sum, targets]. All ranks."""
        return [
            all_reduce_sum(self.world, torch.tensor(self.loss, dtype=torch.float64)).item(),
            self.targets,
        ]

    def shares(self) -> dict[str, float]:
        """Of the steps' time since the last reading: the share that the model's FLOPs would take at the
        cards' peak (mfu), if that is known, and those spent in waiting for data and for other ranks."""
        spent = ({"mfu": self.at_peak} if self.at_peak else {}) | {"wait/data": self.waited["data"]}
        if self.world.size > 1:
            spent["wait/ranks"] = self.waited["ranks"]
        return {name: seconds / max(self.seconds, 1e-9) for name, seconds in spent.items()}

    def read(self) -> tuple[float, float, float]:
        """(mean loss per target, examples per second, seconds per step) since the last reading."""
        loss, targets = self.sums()
        rates = self.examples / max(self.seconds, 1e-9), self.seconds / max(self.steps, 1)
        self._restart()
        return loss / max(targets, 1), *rates

    def rate(self) -> float | None:
        """Examples per second since this process started."""
        return self.all_examples / self.all_seconds if self.all_seconds else None


class Clock:
    """Seconds of training, over all processes of a run, and the share of max_minutes that they are."""

    def __init__(self, minutes, seconds=0.0):
        self.minutes, self.seconds = minutes, seconds  # minutes: none = it ends nothing
        self.share = 0.0  # spent, as rank 0 said at the last step
        self.fit = None  # steps that fit into the minutes, by the forecast; later the share says it
        self._began, self._waits = 0.0, dict(waits.seconds)

    def begin_step(self):
        self._began, self._waits = time.perf_counter(), dict(waits.seconds)

    def end_step(self) -> float:
        """Counts the step since begin_step; its seconds."""
        seconds = time.perf_counter() - self._began
        self.seconds += seconds
        return seconds

    def waited(self) -> dict[str, float]:
        """For what -> seconds since begin_step."""
        return waits.since(self._waits)

    def spent(self) -> float:
        """The share by this rank's own clock."""
        return 0.0 if self.minutes is None else self.seconds / (60 * self.minutes + 1e-9)

    def schedule_length(self, step, total_steps) -> float:
        """How many steps the schedule spans: `total_steps`, or fewer where max_minutes ends the run earlier.

        By the rate so far: step / length is the spent share of the clock, so the end is always reached.
        """
        if not self.share:  # before the first step: as many as the forecast's fit into the clock
            return min(total_steps, self.fit or total_steps)
        return min(total_steps, max(step + 1, step / self.share))


def clock(seconds) -> str:
    """3723 -> `1:02:03`"""
    return str(datetime.timedelta(seconds=round(seconds)))


def with_shares(line, shares, width=110) -> str:
    """A log line with those of Meter.shares that say something, as far as they fit: mfu, and waits from 5 %
    on. All of them are in metrics.jsonl."""
    for name, share in shares.items():
        word = f"  {name.removeprefix('wait/')} {share:.0%}"
        if (name == "mfu" or share >= 0.05) and len(line + word) <= width:
            line += word
    return line
