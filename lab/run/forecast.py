"""What a run will need before it takes its first step: steps, hours, memory, disk, money."""

import math
import os
import shutil
import sys

import torch

from lab.errors import UserError
from lab.run.flags import KEEPS_NOTHING
from lab.run.meter import clock
from lab.train import loss
from lab.train.device import free_bytes
from lab.train.optim import count_parameters, state_numbers
from lab.train.processes import all_reduce_sum, on_main
from lab.train.shard import kept_share, line

try:
    import resource
except ImportError:  # native Windows
    resource = None


def forecast(run, model, optimizer, steps, seconds, typical) -> int | None:
    """Says what a run will need, from the seconds of a worst-case step; `typical` is an average step's share.

    Returns how many steps the run will have by max_minutes. UserError where memory or a new run's disk is too
    small.
    """
    total, size = count_parameters(model)[0], next(model.parameters()).element_size()  # 4 bytes in fp32
    checkpoint_mb = size * (total + state_numbers(optimizer)) / 1e6
    disk_mb = _require_disk(run, checkpoint_mb, size * total / 1e6)
    fit, minutes = None, run.cfg.max_minutes
    if minutes is not None:
        left = max(0.0, 60 * minutes - run.clock.seconds)
        more = max(1, on_main(run.world, int, round(left / max(seconds * typical, 1e-9))))
        steps, fit = min(steps, more), run.step + more
    hours, price = steps * seconds * typical / 3600, run.cfg.price_per_hour
    if minutes is not None:
        hours = min(hours, left / 3600)
    memory_gb = _require_memory(run.world, optimizer)
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
        better = "give torchrun --shutdown-timeout 300 (from torch 2.13 on)"
        run.say(f"a save takes over 15 s: {better}, or it kills one after 30 s")
    return fit


def runs_line(runs, hours, price) -> str:
    """What a study will need for the runs that it has to make."""
    dollars = f", {hours * price:.2f} dollars" if price else ""
    return f"study  {runs} runs are left: about {clock(3600 * hours)}{dollars}"


def _free_mb(folder) -> float:
    return shutil.disk_usage(folder).free / 1e6


def _require_disk(run, checkpoint_mb, weights_mb) -> float:
    """Returns the MB that the run's checkpoints will take at most. UserError where a new run has no room."""
    if run.cfg.mode in KEEPS_NOTHING:
        return 0.0
    kept = (getattr(run.cfg, "folds", None) or 1) + 1  # while one is being written
    disk_mb = (run.cfg.keep + 1) * checkpoint_mb + kept * weights_mb
    free_mb = on_main(run.world, _free_mb, run.folder)
    if not run.resumed and free_mb < disk_mb:
        room = f"checkpoints need {disk_mb:.0f} MB, {run.folder} has {free_mb:.0f} MB free"
        raise UserError(f"{room}: free some, or use another --out")
    return disk_mb


def _require_memory(world, optimizer) -> float:
    """Returns the GB that training takes on the rank with the least room. UserError, on all ranks, where its
    device has less."""
    figures = torch.zeros(world.size, 2, dtype=torch.float64)
    figures[world.rank, 0] = needed_gb(world, optimizer)
    figures[world.rank, 1] = device_memory_gb(world)
    needed, room = max(all_reduce_sum(world, figures).tolist(), key=_excess)
    if needed > room:
        better = "a smaller --micro_batch, --checkpointing, or a smaller model"
        raise UserError(f"training needs {needed:.1f} GB, the device has {room:.1f}: use {better}")
    return needed


def has_room(world, optimizer) -> bool:
    """Whether what was computed so far fits beside the state that the optimizer will add, with 8 % of the
    memory left for fragments."""
    return needed_gb(world, optimizer) <= 0.92 * device_memory_gb(world)


def needed_gb(world, optimizer) -> float:
    """GB of the peak so far and of this rank's share of the optimizer's state, if that is still to come."""
    size = optimizer.param_groups[0]["params"][0].element_size() * kept_share(optimizer)
    return peak_memory_mb(world) / 1e3 + (0 if optimizer.state else size * state_numbers(optimizer) / 1e9)


def _excess(figures) -> float:
    needed, room = figures
    return needed - room


def peak_memory_mb(world) -> float:
    """Peak memory in MB: allocated on the accelerator, or resident on the CPU. 0 where no one counts it: on
    native Windows."""
    if world.device.type != "cpu":
        return getattr(torch, world.device.type).max_memory_allocated() / 1e6
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def device_memory_gb(world) -> float:
    """GB of the accelerator that this process can have: what its driver calls free and what it holds already.
    Infinity for a CPU, whose free memory is not known."""
    if world.device.type == "cpu":
        return math.inf
    device, free = getattr(torch, world.device.type), free_bytes(world.device)
    if free is None:
        return device.get_device_properties(world.device).total_memory / 1e9
    return (free + device.memory_allocated(world.device)) / 1e9
