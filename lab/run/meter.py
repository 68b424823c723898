"""Loss, rates and clocks of the log lines."""

import datetime

import torch

from lab.train.processes import all_reduce_sum


class Meter:
    """Loss, targets and time since the last log line. Checkpoints hold the sums, so a
    resumed curve is the same."""

    def __init__(self, world, sums=(0.0, 0)):
        self.world, self.all_examples, self.all_seconds = world, 0, 0.0
        # the stored sum is global: one rank carries it
        self._restart(sums[0] if world.is_main else 0.0, sums[1])

    def _restart(self, loss=0.0, targets=0):
        self.loss, self.targets, self.steps, self.examples, self.seconds = loss, targets, 0, 0, 0.0

    def add(self, loss_sum, targets, examples, seconds):
        """Adds a step: this rank's summed loss, global targets and examples, seconds."""
        self.loss, self.targets, self.steps = self.loss + loss_sum, self.targets + targets, self.steps + 1
        self.examples, self.seconds = self.examples + examples, self.seconds + seconds
        self.all_examples, self.all_seconds = self.all_examples + examples, self.all_seconds + seconds

    def sums(self) -> list:
        """Returns [global loss sum, targets]. All ranks."""
        return [
            all_reduce_sum(self.world, torch.tensor(self.loss, dtype=torch.float64)).item(),
            self.targets,
        ]

    def read(self) -> tuple[float, float, float]:
        """(mean loss per target, examples per second, seconds per step) since the last reading."""
        loss, targets = self.sums()
        rates = self.examples / max(self.seconds, 1e-9), self.seconds / max(self.steps, 1)
        self._restart()
        return loss / max(targets, 1), *rates

    def rate(self) -> float | None:
        """Examples per second since this process started."""
        return self.all_examples / self.all_seconds if self.all_seconds else None


def clock(seconds) -> str:
    """3723 -> `1:02:03`"""
    return str(datetime.timedelta(seconds=round(seconds)))
