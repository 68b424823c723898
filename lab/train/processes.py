"""One process or several: set-up, sums over ranks, rank 0's own work, waiting for it."""

import contextlib
import datetime
import errno
import inspect
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lab.errors import LostRanks, Stop, UserError
from lab.run.terminal import outlive_terminal
from lab.train import compiling, heartbeat, launch
from lab.train.cpu import keep_freed_memory
from lab.train.fsdp import Sharded
from lab.train.launch import end_with_torchrun, first_sentence, heard_at_once, join, number
from lab.train.shard import shard_optimizer
from lab.train.waits import waiting


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of the launch; size 1 has no process group and no store."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    backend: str = "none"
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def distributed(backend="auto", timeout_minutes=10):
    """Joins the processes of torchrun, if any, and leaves them at the end. Yields the World.

    auto: nccl on CUDA, xccl on XPU, gloo on CPU; CPU tensors (counts, stop flags) always travel over gloo.
    A UserError is printed once, without traceback, and exits with 2. After a stop signal plain python dies of
    that signal, even if the work was finished meanwhile, so that a shell's loop stops (130, 143, 129).
    Ranks that die or fall silent are named in one line, and the others end (heartbeat.py).
    """
    outlive_terminal()
    end_with_torchrun()
    heard_signals.clear()
    world, pulse = World(), None
    try:
        env = {name: number(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        device = _pick_device(env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
        native = {"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo")
        if backend not in ("auto", "gloo", native):
            raise UserError(f"--backend {backend} does not fit {device.type}: use auto or gloo")
        world = World(env["RANK"], device=device)
        if device.type == "cpu":
            keep_freed_memory()
            if env["LOCAL_RANK"] == 0 and (note := launch.unused_gpu()):
                print(note, file=sys.stderr, flush=True)
        if env["WORLD_SIZE"] > 1:
            # torchrun gives each process one thread; ranks x threads should fill the cores, no more
            torch.set_num_threads(max(1, _cores() // env["LOCAL_WORLD_SIZE"]))
            backend = native if backend == "auto" else backend
            rank, size = env["RANK"], env["WORLD_SIZE"]
            with heard_at_once(signal.SIGINT):
                store, pulse = join(rank, size, size > env["LOCAL_WORLD_SIZE"])
                dist.init_process_group(
                    "gloo" if backend == "gloo" else f"cpu:gloo,{device.type}:{backend}",
                    store=store,
                    rank=rank,
                    world_size=size,
                    timeout=datetime.timedelta(minutes=timeout_minutes),
                )
            world = World(rank, env["LOCAL_RANK"], size, device, backend, dist.PrefixStore("core", store))
        yield world
        barrier(world)  # rank 0 may host the store: nobody leaves while another still reads it
    except UserError as error:
        # before this process knows its World, the first of each box speaks: the boxes may differ
        if world.store or (world.is_main and os.environ.get("LOCAL_RANK", "0") == "0"):
            heartbeat.say_error(error, world.store)
        sys.exit(2)
    except Stop as stop:  # before there was a run to note it
        if world.is_main:
            print(f"stopped  {stop}", file=sys.stderr)
    except Exception as error:
        full = _full_disk(error)
        if not full and os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        _say_fault(full or error, world, pulse)
        sys.stdout.flush()
        sys.stderr.flush()  # then out at once: taking the process group down may hang, and the others with it
        os._exit(1)
    finally:
        if pulse:
            pulse.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
    if heard_signals and not under_torchrun(world):
        sys.stdout.flush()
        sys.stderr.flush()
        die_of(heard_signals[0])
    if world.size > 1:
        # all is written; on a busy machine torch's own threads now and then abort the interpreter's shutdown
        # ("terminate called without an active exception"), and torchrun would call a finished run failed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


heard_signals = []  # numbers of the stop signals that this process has noted (by handlers in lab/run/)


def under_torchrun(world) -> bool:
    """Whether torchrun started this process."""
    return world.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def _say_fault(error, world, pulse):
    """One line where the disk or another rank is at fault; else a traceback."""
    if pulse and "third_party/gloo" in str(error):  # of a gradient's reduction, say
        named = "; ".join(pulse.stopped()) or "a rank"
        error = LostRanks(f"{named}: ended while the others waited for it ({first_sentence(error)})")
    if isinstance(error, str | LostRanks):  # nothing of this rank's is wrong
        heartbeat.say_error(error, world.store)
    else:
        traceback.print_exc()


def _full_disk(error) -> str | None:
    """What to say where the disk or a limit on file sizes, and not the program, is at fault; else none."""
    said = str(error).partition("\n")[0]
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    torchs = ("No space left on device", "File too large", "PytorchStreamWriter failed")  # no OSErrors
    if full or any(words in said for words in torchs):
        better = "make room, then go on by --resume_timestamp auto or latest"
        return f"the disk is full, or a file may not grow ({said}): {better}"


def die_of(number):
    """Ends this process by a signal, as if it had no handler. Flushes nothing, so handlers may call it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # process 1 of a container cannot be killed so


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _pick_device(local_rank, local_size) -> torch.device:
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & {*os.environ} and torch.version.cuda:
        # lengths vary from batch to batch: without this, memory falls to pieces that fit none. Read when CUDA
        # starts; until torch 2.9 under the second name
        os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            if local_size > (n := module.device_count()):
                raise UserError(f"{local_size} processes but {n} {kind} device(s): use --nproc_per_node={n}")
            module.set_device(local_rank)
            return torch.device(kind, local_rank)
    return torch.device("cpu")


@waiting("ranks")
def all_reduce_sum(world, values: torch.Tensor) -> torch.Tensor:
    """Sums a CPU tensor over the ranks, in place. Raises LostRanks, which names the rank that is missing."""
    if world.size > 1:
        call = next(_reductions)
        with contextlib.suppress(RuntimeError):  # a killed torchrun took it along; only names need it
            world.store.set(f"reduction/{world.rank}", str(call))
        try:
            work = dist.all_reduce(values, async_op=True)
            while not _arrived(work):
                heartbeat.check()
        except LostRanks:
            raise
        except RuntimeError as error:
            raise LostRanks(f"{_who_is_missing(world, call)} ({first_sentence(error)})") from error
    return values


_reductions = itertools.count(1)


def _arrived(work) -> bool:
    """Waits a few seconds for a collective. False if it is not there by then; raises where it failed."""
    try:
        work.wait(datetime.timedelta(seconds=heartbeat.BEAT_SECONDS))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True


def _who_is_missing(world, call) -> str:
    try:
        keys = [f"reduction/{rank}" for rank in range(world.size)]  # absent: it died before its first
        done = [int(world.store.get(key)) if world.store.check([key]) else 0 for key in keys]
    except RuntimeError:
        return f"rank {world.rank} lost the others, and their store with them"
    late = [str(rank) for rank, last in enumerate(done) if last < call]
    return f"rank {', '.join(late) or '?'} did not come to reduction {call}, where rank {world.rank} waits"


def barrier(world):
    """Waits until all ranks are here."""
    all_reduce_sum(world, torch.zeros(1))


def on_main(world, function, *args):
    """Runs function(*args) on rank 0 while the others wait, however long. Every rank
    gets its result, as JSON.

    Its error is raised on every rank. Waiting goes through the store: a collective would time out during an
    hour of tokenising.
    """
    if world.size == 1:
        return function(*args)
    key, reply = f"on_main/{next(_main_calls)}", {"error": "rank 0 was interrupted", "kind": "Stop"}
    if not world.is_main:
        reply = json.loads(_wait_for_main(world.store, key))
        if "error" in reply:
            raise {"UserError": UserError, "Stop": Stop}.get(reply["kind"], RuntimeError)(reply["error"])
        return reply["result"]
    try:
        _alone.set()
        reply = {"result": function(*args)}
        return reply["result"]
    except BaseException as error:
        kind = next((kind for kind in (UserError, Stop) if isinstance(error, kind)), type(error))
        reply = {"error": str(error), "kind": kind.__name__}
        raise
    finally:
        _alone.clear()
        with _names_the_lost():
            world.store.set(key, json.dumps(reply))


_alone = threading.Event()


def may_leave(world) -> bool:
    """Whether this rank may raise Stop by itself: it is alone, or in on_main, which tells the others."""
    return world.size == 1 or _alone.is_set()


_main_calls = itertools.count()


@contextmanager
def _names_the_lost():
    try:
        yield
    except LostRanks:
        raise
    except RuntimeError as error:
        raise LostRanks(f"the store is gone: torchrun, or rank 0, ended ({first_sentence(error)})") from error


def _wait_for_main(store, key) -> bytes:
    with _names_the_lost():
        while not store.check([key]):
            heartbeat.check()
            time.sleep(0.02)
        return store.get(key)


def main_first(world, function, *args):
    """Runs function(*args) on rank 0, then on the others: one download, then cache hits. Returns this rank's
    own result, which need not be JSON."""
    results = []

    def call():
        results.append(function(*args))

    on_main(world, call)
    return results[0] if results else function(*args)


def wrap_ddp(model, world, compiled=(), dynamic=True, shard="none", optimizer=None):
    """Wraps in DistributedDataParallel if there are several ranks. Evaluate and save the model itself.

    compiled: parts of it that rehearse may compile; dynamic: one graph for all lengths (none: once a second
    one comes). shard: the optimizer's state, of which there is none yet, or all (full) is spread over the
    ranks.
    """
    compiling.prepare(() if shard == "full" else compiled, dynamic)
    if shard == "full" and world.size > 1:
        optimizer.shares = Sharded(model, optimizer, world)
        return optimizer.shares
    if shard != "none":
        shard_optimizer(optimizer, world)
    if world.size == 1:
        return model
    # no rank's buffers ever differ; the argument was renamed in torch 2.13
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    quiet = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **quiet)


def progress(total, what, world=World(), unit="it"):
    """A tqdm bar for work without log lines, on rank 0 and interactive terminals
    only. total none: a count."""
    hide, scaled = None if world.is_main else True, unit != "it"
    return tqdm(
        total=total, desc=what, leave=False, disable=hide, file=sys.stderr, unit=unit, unit_scale=scaled
    )
