"""What a run will need before it takes its first step: steps, hours, memory, disk, money."""

import math
import os
import resource
import shutil
import sys

import torch

from lab.errors import UserError
from lab.run.meter import clock
from lab.train import loss
from lab.train.optim import count_parameters
from lab.train.processes import on_main
from lab.train.shard import kept_weights, line


def forecast(run, model, optimizer, steps, seconds, typical) -> int | None:
    """Says what a run will need, from the seconds of a worst-case step; `typical` is an average step's share.

    Returns how many steps fit into max_minutes. UserError where memory or a new run's disk is too small.
    """
    total, trainable = count_parameters(model)
    moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # tensors of state per weight
    checkpoint_mb = 4 * (total + moments * trainable) / 1e6  # all of it in fp32
    disk_mb = _require_disk(run, checkpoint_mb, 4 * total / 1e6)
    if steps < 0:
        further = f"{run.folder} is {-steps} steps further already"
        raise UserError(f"{further}: use a larger --max_steps or --epochs")
    fit, minutes = None, run.cfg.max_minutes
    if minutes is not None:
        fit = round(60 * minutes / max(seconds * typical, 1e-9))
        fit = max(1, on_main(run.world, int, fit))
        steps = min(steps, fit)
    hours, price = steps * seconds * typical / 3600, run.cfg.price_per_hour
    if minutes is not None:
        hours = min(hours, max(0, minutes / 60 - run.clock.seconds / 3600))
    to_come = 0 if optimizer.state else 4 * moments * kept_weights(optimizer) / 1e6
    memory_gb = _require_memory(run.world, to_come)
    for note in loss.notes:
        run.say(note)
    loss.notes.clear()
    if shared := line(optimizer):
        run.say(shared)
    run.say(
        f"forecast  {steps} steps  training {clock(3600 * hours)}  a step takes {memory_gb:.2f} GB  "
        f"disk {disk_mb:.0f} MB" + (f"  ${price * hours:.2f}" if price else "")
    )
    if (runs := run.cfg.typed.runs) > 1:  # the others begin at step 0
        run.say(runs_line(runs, hours + (runs - 1) * (hours + run.clock.seconds / 3600), price))
    if "TORCHELASTIC_RUN_ID" in os.environ and checkpoint_mb > 5000:  # at some 300 MB/s written and hashed
        run.say("a save takes over 15 s: give torchrun --shutdown-timeout 300, or it kills one after 30 s")
    return fit


def runs_line(runs, hours, price) -> str:
    """What a study will need for the runs that it has to make."""
    dollars = f", {hours * price:.2f} dollars" if price else ""
    return f"study  {runs} runs are left: about {clock(3600 * hours)}{dollars}"


def _free_mb(folder) -> float:
    return shutil.disk_usage(folder).free / 1e6


def _require_disk(run, checkpoint_mb, weights_mb) -> float:
    """Returns the MB that the run's checkpoints will take at most. UserError where a new run has no room."""
    kept = (getattr(run.cfg, "folds", None) or 1) + 1  # while one is being written
    disk_mb = (run.cfg.keep + 1) * checkpoint_mb + kept * weights_mb
    free_mb = on_main(run.world, _free_mb, run.folder)
    if not run.resumed and free_mb < disk_mb:
        room = f"checkpoints need {disk_mb:.0f} MB, {run.folder} has {free_mb:.0f} MB free"
        raise UserError(f"{room}: free some, or use another --out")
    return disk_mb


def _require_memory(world, to_come_mb) -> float:
    """Returns the GB of the peak so far plus what the optimizer will add."""
    memory_gb = (peak_memory_mb(world) + to_come_mb) / 1e3
    if memory_gb > (room_gb := device_memory_gb(world)):
        room = f"training needs {memory_gb:.1f} GB, the device has {room_gb:.1f}"
        raise UserError(f"{room}: use a smaller --micro_batch, --checkpointing, or a smaller model")
    return memory_gb


def peak_memory_mb(world) -> float:
    """Peak memory in MB: allocated on the accelerator, or resident on the CPU."""
    if world.device.type != "cpu":
        return getattr(torch, world.device.type).max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def device_memory_gb(world) -> float:
    """Memory of the accelerator in GB; infinity for a CPU, whose free memory is not known."""
    if world.device.type == "cpu":
        return math.inf
    return getattr(torch, world.device.type).get_device_properties(world.device).total_memory / 1e9
