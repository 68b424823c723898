"""--profile N: so many steps of training recorded by torch.profiler, as a trace and in ten lines."""

import contextlib
import math
import re
import time

import torch
from torch.autograd import DeviceType

from lab.train import waits

SKIPPED, WARM = 2, 1  # steps before the record: compilers and buckets settle; the profiler itself starts
EXCHANGE = re.compile("ncclDevKernel|ncclKernel|gloo:")  # how reductions are called in a trace
TOP = 7  # operators shown


class Profile:
    """Rank 0's record of cfg.profile steps in a row, from the fourth of this process on; an evaluation ends
    it early. It reads only: no number of the run depends on it."""

    def __init__(self, run):
        self.run, self.begun, self.profiler = run, 0, None
        self.wanted = run.cfg.profile if run.world.is_main and not run.profiled else None
        run.profiled = True  # a later fold records nothing

    def begin_step(self):
        """In front of each step."""
        if not self.wanted:
            return
        if self.profiler is None:
            self.profiler = profiler_of(self.run.world.device, self.wanted)
            self.profiler.start()
        else:
            self.profiler.step()
        if self.begun == SKIPPED + WARM:
            self.began, self.waits = time.perf_counter(), dict(waits.seconds)
        if self.begun == SKIPPED + WARM + self.wanted:
            self._report()
            self.run.clock.begin_step()  # what the report took is no part of the step
        self.begun += 1

    def end_at(self, evaluation_ends_run):
        """In front of an evaluation, which shall not be recorded."""
        if self.wanted and self.begun > SKIPPED + WARM:
            self._report()
        elif self.wanted and evaluation_ends_run:
            self._stop()
            self.run.say(f"profile: nothing is recorded, the run ended within {SKIPPED + WARM} steps")

    def _stop(self):
        if self.profiler is not None:
            self.profiler.stop()
        self.wanted = None

    def _report(self):
        steps, seconds = min(self.begun - SKIPPED - WARM, self.wanted), time.perf_counter() - self.began
        waited, run, path = waits.since(self.waits), self.run, self.run.folder / "trace.json"
        self._stop()
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError, RuntimeError):  # a full disk ends no run; some versions only log it
            self.profiler.export_chrome_trace(str(path))
        kind = run.world.device.type
        waited = {"data": waited["data"]} if run.world.size == 1 else waited
        rows, events = self.profiler.key_averages(), self.profiler.events()
        for line in summary(rows, events, steps, seconds, waited, on_card=kind != "cpu"):
            run.say(line)
        told = f"trace: {path} (open it at ui.perfetto.dev or in chrome://tracing)"
        run.say(told if path.exists() else f"WARNING {path} could not be written")


def profiler_of(device, steps):
    """A torch profiler that records `steps` steps behind SKIPPED and WARM."""
    activities = torch.profiler.supported_activities() if device.type != "cpu" else set()
    activities = activities | {torch.profiler.ProfilerActivity.CPU}
    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=WARM, active=steps, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=schedule)


def summary(rows, events, steps, seconds, waited, on_card) -> list[str]:
    """What took the time of `steps` steps, from the profiler's averages by operator and its single events.

    waited: for what -> seconds. Idle is a card on which no kernel runs; exchange is when a reduction is on
    its way, whether anybody waits for it or not.
    """
    own, whose = ("self_device_time_total", "GPU") if on_card else ("self_cpu_time_total", "CPU")
    ran = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    shares = {"GPU idle": 1 - covered(ran) / seconds} if on_card else {}
    shares |= {f"waiting for {what}": spent / seconds for what, spent in waited.items()}
    if "ranks" in waited:
        shares["exchange"] = covered([e for e in events if EXCHANGE.search(e.name)]) / seconds
    told = "  ".join(f"{name} {share:.0%}" for name, share in shares.items())
    lines = [f"profile  {steps} step{'s' * (steps > 1)} of {1e3 * seconds / steps:.1f} ms  {told}"]
    lines.append(f"{f'operator, by its own time on the {whose}':60} {'calls':>7} {'ms':>9}   a step")
    rows = [row for row in rows if row.device_type == DeviceType.CPU and not is_mark(row)]
    total = sum(getattr(row, own) for row in rows) or math.inf
    for row in sorted(rows, key=lambda row: -getattr(row, own))[:TOP]:
        spent = getattr(row, own)
        ms = spent / 1e3 / steps
        lines.append(f"{row.key[:60]:60} {row.count / steps:7.1f} {ms:9.2f} {spent / total:8.1%}")
    return lines


def is_mark(row) -> bool:
    """Whether a row is no operator but a name that a program gave to a stretch of time."""
    return bool(row.is_user_annotation) or row.key.startswith("ProfilerStep")


def covered(events) -> float:
    """Seconds in which at least one of the events was going on."""
    total, end = 0.0, -math.inf  # microseconds
    for begins, ends in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, ends - max(begins, end))
        end = max(end, ends)
    return total / 1e6
