"""What the scripts share and must not drift, in the order a script uses it.

constants -> processes -> sampling -> data sets -> optimisation -> statistics; runs.py keeps the
run folder

Read a run_*.py first and come here for one verb at a time. The loop, and whatever two experiments could
rightly do differently, stays in the script; a formula stands here once. With one process every verb does the
obvious thing, so no script asks whether it is distributed.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import urllib.error
import urllib.request
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

OVERHEAD = 128  # tokens that could be computed while a forward and backward is started (two cores, GPT-2)
IGNORE_INDEX = -100  # a label that no loss and no accuracy looks at (torch's own default)
PROJECT = Path(__file__).resolve().parent


class UserError(Exception):
    """Bad input. The text is one line: what, the value, and what would work. Exit code 2."""


class Stop(BaseException):
    """All ranks agreed to end before the work is complete; what was computed is saved.

    Raised after a signal only, so plain python then dies of that signal (see `distributed`).
    No Exception: a library that retries or reports whatever fails must not catch it.
    """


class LostRanks(RuntimeError):
    """Another rank did not come to a reduction."""


# ----------------------------------------------------------------------------------------------------------
# 1. Constants -> flags
# ----------------------------------------------------------------------------------------------------------

LIMITS = {  # constants: lowest and highest legal value, in whichever script they appear
    "batch micro_batch micro_tokens eval_batch max_documents log_every save_every eval_every": (1, math.inf),
    "epochs max_steps max_minutes lr head_lr min_lr weight_decay price_per_hour resume_step": (0, math.inf),
    "layer_decay": (1e-3, 1),
    "n_layer n_head n_embd n_inner block_size top_k max_new_tokens find_steps": (1, math.inf),
    "temperature": (0, math.inf),
    "find_from find_to eps": (1e-30, math.inf),
    "top_p": (1e-6, 1),
    "beta1 beta2 find_smoothing test_share": (0, 0.9999),
    "val_share": (1e-4, 0.9999),
    "neutral_share": (1e-4, 0.5),
    "seed split_seed": (0, 2**31),
    "clip": (1e-6, math.inf),
    "max_length": (16, math.inf),
    "eval_rows lora_rank": (1, math.inf),
    "answer_rows sample_tokens plain_blocks freeze_blocks lora_layers": (0, math.inf),
    "lora_alpha": (1e-9, math.inf),
    "dropout encoder_dropout lora_dropout warmup": (0, 1),
    "keep": (2, math.inf),  # law 4 falls back to the checkpoint before the newest
    "folds": (3, math.inf),  # train, val and test
    "context": (2, math.inf),
    "stride judge_repeats judge_requests judge_attempts": (1, math.inf),
    "judge_seconds": (0.1, math.inf),
    "seeds passes max_tokens fisher_samples": (1, math.inf),
    "pretrain_batch pretrain_micro_batch pretrain_eval_every pretrain_save_every": (1, math.inf),
    "pretrain_max_steps pretrain_max_minutes pretrain_lr pretrain_min_lr init_step": (0, math.inf),
    "pretrain_weight_decay": (0, math.inf),
    "text_documents text_tokens vocab_multiple": (1, math.inf),
    "pretrain_warmup qat_start": (0, 1),
    "qat_group": (2, math.inf),
    "diversity_batches head_epochs": (0, math.inf),
    "diversity_batch diversity_length floor_repeats": (2, math.inf),
}
ALIASES = {"run_folder": "run"}  # flags that torchrun would take for its own (--run_path), python does not


@dataclass(frozen=True)
class Typed:
    """What stood on the command line beside the values: it decides what a resume may change."""

    preset: str | None = None
    smoke: bool = False
    flags: frozenset = frozenset()
    overrides: dict = dataclasses.field(default_factory=dict)  # what preset and SMOKE changed
    chosen: str | None = None  # a line: what the device decided


def parse_config(config_class, presets, smoke, doc, argv=None):
    """The script's constants: defaults < preset < `smoke` < flags; a callable maps the value so far.

    Anything wrong is one line on stderr and exit code 2. `typed(cfg)` tells what stood on the command line.
    """
    outlive_terminal()
    try:
        return parsed_config(config_class, presets, smoke, doc, argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every process of a launch meets it, one says it
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def parsed_config(config_class, presets, smoke, doc, argv=None):
    """parse_config for who has words of their own for a UserError."""
    hints = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    named = {f"preset {name}": values for name, values in presets.items()}
    for where, values in {"Config": defaults, "SMOKE": smoke, **named}.items():
        for name, value in values.items():
            _check_type(where, name, value, hints)
    given = vars(_parser(config_class, defaults, presets, hints, doc).parse_args(argv))
    preset, is_smoke = given.pop("preset", None), given.pop("smoke", False)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    changed = ({"tag": preset} if "tag" in defaults else {}) | presets.get(preset, {})
    for name, value in smoke.items() if is_smoke else ():
        changed[name] = value(changed.get(name, defaults[name])) if callable(value) else value
    cfg = config_class(**{**changed, **given})
    _check_limits(cfg)
    overrides = {name: value for name, value in changed.items() if name not in {"tag", *given}}
    object.__setattr__(cfg, "typed", Typed(preset, is_smoke, frozenset(given), overrides))  # no constant
    return cfg


def typed(cfg) -> Typed:
    return getattr(cfg, "typed", Typed())


def with_flags(cfg, like, flags):
    """`cfg` as if `flags` had been typed; preset and the rest as in `like`."""
    object.__setattr__(cfg, "typed", dataclasses.replace(like, flags=frozenset(flags)))
    return cfg


def _parser(config_class, defaults, presets, hints, doc) -> argparse.ArgumentParser:
    flags = ["preset", "smoke", *hints, *(f"no-{name}" for name in hints if hints[name] is bool)]

    class OneLineParser(argparse.ArgumentParser):
        def error(self, message):
            if unknown := re.search(r"unrecognized arguments: --([\w-]+)", message):
                near = difflib.get_close_matches(unknown[1], flags, n=1) or ["help"]
                message = f"unknown flag --{unknown[1]}: did you mean --{near[0]}?"
            raise UserError(message)

    # absent unless typed: the defaults stay in Config, and a resume knows what was typed
    parser = OneLineParser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                           formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny model, built-in data, seconds")
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a named set of constants")
    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(config_class), re.M))
    for name, default in defaults.items():
        shown = " ".join(default) or None if isinstance(default, tuple) else default
        text = f"{comments.get(name, '')} [{shown}]".strip().replace("%", "%%")
        names = [f"--{name}", *([f"--{ALIASES[name]}"] if name in ALIASES else [])]
        parser.add_argument(*names, dest=name, help=text, **_flag(hints[name]))
    return parser


def _flag(hint) -> dict:
    """What argparse needs to know of an annotation that _check_type lets pass."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint), "metavar": "|".join(map(str, typing.get_args(hint)))}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "metavar": "NAME", "action": "extend"}
    kinds = typing.get_args(hint) or (hint,)

    def convert(text):
        if types.NoneType in kinds and text == "none":
            return None
        value = kinds[0](text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value

    convert.__name__ = " or ".join(kind.__name__.removesuffix("Type").lower() for kind in kinds)
    return {"type": convert, "metavar": convert.__name__.replace(" or ", "|").upper()}


def _check_type(where, name, value, hints):
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        raise UserError(f"{where} names no constant: {name}" + (f", did you mean {near[0]}?" if near else ""))
    literal, allowed = (
        typing.get_origin(hints[name]) is Literal,
        typing.get_args(hints[name]) or (hints[name],),
    )
    if hints[name] == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
            raise UserError(f"{where}: {name} = {value!r} has the wrong type: use a tuple of str")
        return
    if not literal and allowed != (bool,) and not set(allowed) <= {int, float, str, types.NoneType}:
        raise UserError(f"{where}.{name}: use bool, Literal, or int, float, str and these | None")
    fits = (
        value in allowed if literal else type(value) in allowed or (type(value) is int and float in allowed)
    )
    if not fits and not (where == "SMOKE" and callable(value)):
        expected = " | ".join(getattr(kind, "__name__", repr(kind)) for kind in allowed)
        raise UserError(f"{where}: {name} = {value!r} has the wrong type: use {expected}")


def _check_limits(cfg):
    if not re.fullmatch(r"[\w.-]*", getattr(cfg, "tag", None) or ""):
        raise UserError(f"--tag {cfg.tag!r} becomes part of a folder's name: use letters, digits, . _ -")
    for names, (low, high) in LIMITS.items():
        for name in names.split():
            value = getattr(cfg, name, None)
            if value is not None and not low <= value <= high:
                legal = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise UserError(f"--{name} {value} is out of range: use {legal}")


# ----------------------------------------------------------------------------------------------------------
# 2. Processes
# ----------------------------------------------------------------------------------------------------------


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
def distributed(backend="auto", timeout_minutes=30):
    """Joins the processes that torchrun started (or none) and leaves them whatever happens. Yields the World.

    auto: nccl on CUDA, xccl on XPU, gloo on CPU; CPU tensors (counts, stop flags) always travel over gloo.
    A UserError is printed once, without traceback, and exits with 2. After a stop signal plain python dies of
    that signal, even if the work was finished meanwhile, so that a shell's loop stops (130, 143, 129).
    """
    outlive_terminal()
    heard_signals.clear()
    env = {name: int(os.environ.get(name, default)) for name, default in _LAUNCH.items()}
    world = World(env["RANK"])
    try:
        device = _pick_device(env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
        native = {"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo")
        if backend not in ("auto", "gloo", native):
            raise UserError(f"--backend {backend} does not fit {device.type}: use auto or gloo")
        world = World(device=device)
        if device.type == "cpu":
            keep_freed_memory()
        if env["WORLD_SIZE"] > 1:
            # torchrun gives each process one thread; ranks x threads should fill the cores, no more
            torch.set_num_threads(max(1, _cores() // env["LOCAL_WORLD_SIZE"]))
            backend = native if backend == "auto" else backend
            store, rank, size = next(dist.rendezvous("env://"))
            # torchrun keeps its store when it restarts workers: they must not meet the keys of the dead
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(
                "gloo" if backend == "gloo" else f"cpu:gloo,{device.type}:{backend}",
                **{"store": store, "rank": rank, "world_size": size},
                timeout=datetime.timedelta(minutes=timeout_minutes),
            )
            world = World(rank, env["LOCAL_RANK"], size, device, backend, dist.PrefixStore("core", store))
        yield world
        barrier(world)  # rank 0 may host the store: nobody leaves while another still reads it
    except UserError as error:
        if world.store.add("user_errors", 1) == 1 if world.store else world.is_main:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stop as stop:  # before there was a run to note it
        if world.is_main:
            print(f"stopped  {stop}", file=sys.stderr)
    except Exception:
        if world.size == 1:
            raise
        traceback.print_exc()
        sys.stderr.flush()  # then out at once: taking the process group down may hang, and the others with it
        os._exit(1)
    finally:
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


heard_signals = []  # numbers of the stop signals that this process has noted (runs.py listens)


def under_torchrun(world) -> bool:
    return world.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def die_of(number):
    """Ends this process by a signal as if nobody had listened. For handlers, too: it flushes nothing."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # process 1 of a container cannot be killed so


_LAUNCH = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # set by torchrun


def keep_freed_memory():
    """On a CPU: reuse large blocks instead of returning them to the kernel and faulting them in at each step.

    PandaLM's longest batches took 29 s with glibc's defaults and 11 s so (2 cores, MiniLM); see JOURNAL.md.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _pick_device(local_rank, local_size) -> torch.device:
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            if local_size > (n := module.device_count()):
                raise UserError(f"{local_size} processes but {n} {kind} device(s): use --nproc_per_node={n}")
            module.set_device(local_rank)
            return torch.device(kind, local_rank)
    return torch.device("cpu")


def all_reduce_sum(world, values: torch.Tensor) -> torch.Tensor:
    """Sums a CPU tensor over the ranks, in place; LostRanks names the rank that is missing."""
    if world.size > 1:
        call = next(_reductions)
        world.store.set(f"reduction/{world.rank}", str(call))
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise LostRanks(f"{_who_is_missing(world, call)}: {error}") from error
    return values


_reductions = itertools.count(1)


def _who_is_missing(world, call) -> str:
    try:
        done = [int(world.store.get(f"reduction/{rank}")) for rank in range(world.size)]
    except RuntimeError as error:
        return f"rank {world.rank} lost the others ({error})"
    late = [str(rank) for rank, last in enumerate(done) if last < call]
    return f"rank {', '.join(late) or '?'} did not come to reduction {call}, where rank {world.rank} waits"


def barrier(world):
    all_reduce_sum(world, torch.zeros(1))


def on_main(world, function):
    """Runs `function` on rank 0 while the others wait, as long as it takes; every rank gets its JSON result.

    Its error is raised on every rank. Waiting goes through the store, with a heartbeat: a collective would
    time out during an hour of tokenising, and a rank 0 that is silent for a minute is reported.
    """
    if world.size == 1:
        return function()
    key, reply = f"on_main/{next(_main_calls)}", {"error": "rank 0 was interrupted", "kind": "Stop"}
    if not world.is_main:
        reply = json.loads(_wait_for_main(world.store, key))
        if "error" in reply:
            raise {"UserError": UserError, "Stop": Stop}.get(reply["kind"], RuntimeError)(reply["error"])
        return reply["result"]
    try:
        with _heartbeat(world.store):
            _alone.set()
            reply = {"result": function()}
        return reply["result"]
    except BaseException as error:
        kind = next((kind for kind in (UserError, Stop) if isinstance(error, kind)), type(error))
        reply = {"error": str(error), "kind": kind.__name__}
        raise
    finally:
        _alone.clear()
        world.store.set(key, json.dumps(reply))


_alone = threading.Event()


def may_leave(world) -> bool:
    """Whether this rank can raise Stop on its own: alone, or in on_main, which tells the others."""
    return world.size == 1 or _alone.is_set()


_main_calls = itertools.count()
HEARTBEAT_SECONDS, SILENCE_SECONDS = 5, 60


@contextmanager
def _heartbeat(store):
    done = threading.Event()

    def beat():
        for count in itertools.count():
            store.set("heartbeat", str(count))
            if done.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _wait_for_main(store, key) -> bytes:
    beat, heard = None, time.monotonic()
    while not store.check([key]):
        time.sleep(0.02)
        now = store.get("heartbeat") if store.check(["heartbeat"]) else None
        if now != beat:
            beat, heard = now, time.monotonic()
        elif time.monotonic() - heard > SILENCE_SECONDS:
            raise RuntimeError(f"rank 0 has been silent for {SILENCE_SECONDS} s while the others wait for it")
    return store.get(key)


def main_first(world, function):
    """`function` on rank 0, then on the others: one download, then cache hits. Returns this rank's result."""
    result = []
    on_main(world, lambda: result.append(function()))
    return result[0] if result else function()


def wrap_ddp(model, world):
    """DistributedDataParallel where there are several ranks. Evaluate and save the model, not the wrapper."""
    if world.size == 1:
        return model
    # no rank's buffers ever differ; the argument was renamed in torch 2.13
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    quiet = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **quiet)


def micro_batches(model, rows, size=None, lengths=None, most=math.inf):
    """Parts of `rows`, `size` each (none: all at once); ranks exchange gradients in the last backward only.

    With the `lengths` of the rows, rows of similar length meet, and none means length_groups(lengths, most).
    """
    if lengths is not None:
        order = np.argsort(-np.asarray(lengths), kind="stable")  # longest first: memory fails early
        rows, lengths = [rows[i] for i in order], [int(lengths[i]) for i in order]
    sizes = length_groups(lengths, most) if lengths and not size else _equal(len(rows), size or len(rows))
    ends = list(itertools.accumulate(sizes))
    for end, n in zip(ends, sizes, strict=True):
        alone = end < len(rows) and isinstance(model, DistributedDataParallel)
        with model.no_sync() if alone else nullcontext():
            yield rows[end - n : end]


def _equal(n, size) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)] if n else []


def length_groups(lengths, most, overhead=OVERHEAD) -> list[int]:
    """Sizes of the groups that `lengths` (falling) are best computed in, each padded to its longest row.

    Best: the fewest padded tokens, where starting a group costs as much as `overhead` tokens, and no group of
    several rows has over `most` of them. Exact, by dynamic programming over where the last group begins.
    """
    best = [(0, 0)]  # of the first n rows: (cost, size of their last group)
    for n in range(1, len(lengths) + 1):
        starts = (i for i in range(n) if i == n - 1 or (n - i) * lengths[i] <= most)
        best.append(min((best[i][0] + (n - i) * lengths[i] + overhead, n - i) for i in starts))
    sizes, n = [], len(lengths)
    while n:
        sizes.append(best[n][1])
        n -= best[n][1]
    return sizes[::-1]


def reseed(*key):
    """Seeds torch from (seed, step, rank, ...): randomness is a function of the position, none is stored."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ----------------------------------------------------------------------------------------------------------
# 3. Sampling
# ----------------------------------------------------------------------------------------------------------


class ShardedBatches:
    """Row numbers of every global batch, a pure function of (seed, epoch, step); a rank takes every size-th.

    With a seed (training): reshuffled each epoch, the rows of an incomplete last batch left out; rows of
    similar length meet inside blocks of `block` batches, whose batches are then shuffled. Without
    (evaluation): every row exactly once, longest first.
    """

    def __init__(self, lengths, batch, world, *, seed=None, block=50):
        self.lengths, self.batch, self.world, self.seed, self.block = (
            np.asarray(lengths),
            batch,
            world,
            seed,
            block,
        )
        n = len(self.lengths)
        self.steps_per_epoch = math.ceil(n / batch) if seed is None else n // batch
        if seed is not None and n < batch:
            raise UserError(
                f"{n} training rows do not fill a batch of {batch}: use a smaller --batch or more data"
            )
        self._epoch, self._order = None, None

    def __len__(self):
        return self.steps_per_epoch

    def global_batch(self, step) -> np.ndarray:
        """Rows of optimizer step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return self._order[position * self.batch : (position + 1) * self.batch]

    def rank_batch(self, step) -> list[int]:
        """This rank's share, uneven or empty; the shares of all ranks are the global batch."""
        return self.global_batch(step)[self.world.rank :: self.world.size].tolist()

    def longest(self) -> np.ndarray:
        """All rows, longest first: the worst case comes first."""
        return np.argsort(-self.lengths, kind="stable")

    def _shuffle(self, epoch) -> np.ndarray:
        if self.seed is None:
            return self.longest()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        order, span = order[: self.steps_per_epoch * self.batch], self.block * self.batch
        blocks = [order[start : start + span] for start in range(0, len(order), span)]
        order = np.concatenate([rows[np.argsort(self.lengths[rows], kind="stable")] for rows in blocks])
        shuffled = torch.randperm(self.steps_per_epoch, generator=generator).numpy()
        return order.reshape(self.steps_per_epoch, self.batch)[shuffled].reshape(-1)


# ----------------------------------------------------------------------------------------------------------
# 4. Data sets
# ----------------------------------------------------------------------------------------------------------

TABLES = (".csv", ".json", ".jsonl", ".parquet")


def read_rows(name, max_documents=None, prefer="train") -> list[dict]:
    """Rows of a table: a file (CSV, JSON, JSONL, Parquet, or in a zip), a folder of them, or a Hub id.

    Of several files in a zip or folder those whose name starts with `prefer` are read. A Hub id may be
    written `owner/name:config@revision`; its `prefer` split is read. UserError for what is not there.
    """
    return list(itertools.islice(stream_rows(name, prefer), max_documents))


def stream_rows(name, prefer="train", streaming=False, shuffled=None):
    """read_rows one by one, in flat memory but for one JSON list; `streaming` fetches what it reads only;
    a Hub set that is not streamed can come in an order drawn by the seed `shuffled`."""
    return itertools.chain.from_iterable(_tables(name, prefer, streaming, shuffled))


def data_fingerprint(name, prefer="train", streaming=False) -> str:
    """SHA-256 over the files that read_rows would read: it names caches and shows a resume changed data.

    Of a Hub set that is streamed it is the commit, and the set's name there.
    """
    if Path(name).is_dir():
        files = _table_files(Path(name), prefer)
    elif Path(name).exists():
        files = [name]
    elif streaming:
        form = _hub_form(name)
        load = functools.partial(_hub_commit, form["repo"], form["revision"])
        commit = from_hub("data set", name, load, "a local file")
        return f"{commit}:{form['config']}" if form["config"] else commit  # its sets share the commit
    else:
        files = [file["filename"] for file in _hub_dataset(name, prefer).cache_files]
    try:
        return joint_hash([sha256_file(file) for file in files])
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None


def _tables(name, prefer, streaming=False, shuffled=None):
    """Yields tables, each an iterable of rows."""
    path = Path(name)
    if path.is_dir():
        for file in _table_files(path, prefer):
            yield _read_table(file.open("rb"), file.suffix, file)
    elif path.suffix == ".zip" and path.exists():
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise UserError(f"{path} is not a whole zip file: fetch it again") from None
        with archive:
            for member in _preferred(archive.namelist(), prefer, path):
                yield _read_table(archive.open(member), Path(member).suffix, f"{path}/{member}")
    elif path.exists():
        yield _read_table(path.open("rb"), path.suffix, path)
    else:
        rows = _hub_dataset(name, prefer, streaming)
        yield rows if shuffled is None else rows.shuffle(seed=shuffled)


def _table_files(folder, prefer) -> list[Path]:
    return [folder / name for name in _preferred(sorted(os.listdir(folder)), prefer, folder)]


def _preferred(names, prefer, where) -> list[str]:
    names = [name for name in names if Path(name).name[0] != "."]  # what a Mac leaves in a zip
    tables = [name for name in names if Path(name).suffix in TABLES]
    chosen = [name for name in tables if Path(name).name.startswith(prefer)]
    if not chosen and len(tables) != 1:
        found = ", ".join(tables) or f"none of {', '.join(TABLES)}"
        raise UserError(f"{where} holds {found}: name one file, or call one {prefer}.csv")
    return chosen or tables


def _read_table(stream, suffix, where):
    """Yields one table's rows; a mistake of the file comes as one line."""
    csv.field_size_limit(1 << 30)  # a long conversation is one field; the default is 131,072 characters
    try:
        with stream:
            if suffix == ".parquet":
                import pyarrow.parquet

                for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1000):
                    yield from batch.to_pylist()
                return
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            if suffix == ".csv":
                yield from csv.DictReader(text, strict=True)
            elif suffix == ".json" and text.read(1) == "[":
                yield from json.loads("[" + text.read())
            elif suffix in (".json", ".jsonl"):  # one object per line
                text.seek(0)
                for number, line in enumerate(text, start=1):
                    try:
                        yield from [json.loads(line)] if line.strip() else []
                    except ValueError:
                        raise UserError(f"{where} line {number} is no JSON: mend or remove it") from None
            else:
                raise UserError(
                    f"{where} is no table: use {', '.join(TABLES)}, one of these in a .zip, or a Hub id"
                )
    except UnicodeDecodeError:
        raise UserError(f"{where} cannot be read as {suffix[1:]}: it is not UTF-8, save it as such") from None
    except (ValueError, OSError, csv.Error, zipfile.BadZipFile, RuntimeError) as error:  # the last: encrypted
        raise UserError(f"{where} cannot be read as {suffix[1:]}: {_first_line(error)}") from None


def _hub_form(name) -> re.Match:
    """The parts of a Hub id; UserError for what can only be a path."""
    form = re.fullmatch(
        r"(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w .-]+))?(@(?P<revision>[\w./-]+))?", name
    )
    if not form or Path(name).suffix in (*TABLES, ".zip", ".txt") or name[0] in "./~":
        raise UserError(f"no such file or folder: {name}")
    return form


def _hub_dataset(name, split, streaming=False):
    form = _hub_form(name)

    def load():
        import datasets

        datasets.disable_progress_bars() if not sys.stderr.isatty() else None
        which = {"split": split, "revision": form["revision"], "streaming": streaming}
        return datasets.load_dataset(form["repo"], form["config"], **which)

    return from_hub("data set", name, load, "a local file, or what --help of --data names as built in")


def _hub_commit(repo, revision) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo, revision=revision or None).sha


def from_hub(what, name, load, instead):
    """`load()`, with the Hub's many ways to fail turned into one line, within seconds."""
    online = _hub_answers()
    try:
        return _quietly(load)
    except Exception as error:  # every library on the way has its own kinds
        reason = _first_line(error) if online else "the Hub does not answer and HF_HOME holds no copy"
        raise UserError(f"{what} {name} cannot be fetched ({reason}): use {instead}") from error


def _first_line(error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _quietly(load):
    """Other libraries' bars belong on a terminal, not as carriage returns in a file."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return load()


def _hub_answers(seconds=5) -> bool:
    """Probes the Hub once; without an answer the libraries are told to look into their cache only."""
    answers = []

    def probe():  # in a thread: looking a name up has no time-out of its own
        with contextlib.suppress(OSError):
            with contextlib.suppress(urllib.error.HTTPError):  # it spoke
                urllib.request.urlopen(
                    os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds
                )
            answers.append(True)

    if "HF_HUB_OFFLINE" not in os.environ:
        thread = threading.Thread(target=probe, daemon=True)
        thread.start()
        thread.join(seconds)
        os.environ["HF_HUB_OFFLINE"] = "0" if answers else "1"  # read when huggingface_hub is first imported
        if hub := sys.modules.get("huggingface_hub.constants"):  # it was: a local tokenizer did that
            hub.HF_HUB_OFFLINE = not answers
    return os.environ["HF_HUB_OFFLINE"] == "0"


def require_columns(rows, columns, where):
    """Refuses an empty table and one that lacks a column, listing the columns there are."""
    if not rows:
        raise UserError(f"{where} has no rows: use a file with the columns {', '.join(columns)}")
    some = [row for row in rows[:100] if isinstance(row, dict)]  # the first may lack what others have
    keys = (key for row in some for key in row if key is not None)  # None: more cells than columns
    found = list(dict.fromkeys(keys)) or [type(rows[0]).__name__]
    if missing := [column for column in columns if column not in found]:
        hint = " (is it separated by ';'?)" if len(found) == 1 and ";" in str(found[0]) else ""
        raise UserError(
            f"{where} lacks column(s) {', '.join(missing)}; found: {', '.join(map(str, found))}{hint}"
        )


class BadRows:
    """Counts unusable rows by reason; more than `limit` of all rows is an error that shows three."""

    def __init__(self, limit=0.01):
        self.limit, self.rows, self.seen = limit, [], 0  # seen: rows looked at, if whoever reads counts them

    def add(self, number, reason):
        self.rows.append((number, str(reason)))

    def report(self, total, where) -> list[str]:
        """Lines to print; raises UserError above the limit."""
        if len(self.rows) > self.limit * total:
            named = "; ".join(f"row {number}: {reason}" for number, reason in self.rows[:3])
            share = f"{len(self.rows)} of {total} rows are unusable, more than {self.limit:.0%}"
            raise UserError(f"{where}: {share}: mend or remove them, e.g. {named}")
        lines = []
        for reason, count in Counter(reason for _, reason in self.rows).items():
            numbers = [str(number) for number, why in self.rows if why == reason]
            lines.append(
                f"left out {count} row(s), {reason}: " + ", ".join(numbers[:8]) + ", ..." * (count > 8)
            )
        return lines


def is_clean(text) -> bool:
    """False for lone surrogates, which json.loads lets through and tokenizers raise at."""
    return not re.search("[\ud800-\udfff]", text)


def split_by_group(groups, labels, shares, seed) -> np.ndarray:
    """Part number of every row: in the proportions `shares`, no group in two parts, labels spread evenly.

    Largest groups first, ties in the order of a hash of (seed, group), each into the part that its labels
    fill least so far. A pure function of its arguments: the same on every rank and machine.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    kinds = np.unique(labels, return_inverse=True)[1]
    if len(names) < len(shares):
        raise UserError(f"{len(names)} prompts cannot be split into {len(shares)} parts: use more rows")
    counts = np.zeros((len(names), kinds.max() + 1))  # (groups, labels)
    np.add.at(counts, (index, kinds), 1)
    room = np.outer(np.divide(shares, np.sum(shares)), counts.sum(0))  # (parts, labels): rows each should get
    filled, part = np.zeros_like(room), np.zeros(len(names), dtype=np.int64)
    order = {name: hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names}
    for group in sorted(range(len(names)), key=lambda g: (-counts[g].sum(), order[names[g]])):
        crowding = ((filled + counts[group]) / room * counts[group]).sum(1)
        part[group] = np.argmin(crowding + 1e-3 * filled.sum(1) / room.sum(1))
        filled[part[group]] += counts[group]
    if len(set(part)) < len(shares):
        raise UserError(f"{len(names)} prompts leave one of {len(shares)} parts empty: use more rows")
    return part[index]


# Token ids are computed once and mapped into memory afterwards.


def pretrained_tokenizer(name, built_in):
    """The fast tokenizer of a Hub id or folder; `built_in` is what an error recommends instead."""

    def load():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, use_fast=True)

    tokenizer = local_or_hub("tokenizer", name, load, built_in)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer of {name} is not a fast one: use one with a tokenizer.json")
    return tokenizer


def local_or_hub(what, name, load, built_in):
    """`load()` of a folder or Hub id, with every failure in one line."""
    if not Path(name).is_dir():
        if name[:1] in ("", ".", "/", "~"):
            raise UserError(f"no such folder: {name or repr(name)}")
        return from_hub(what, name, load, f"a local folder, or {built_in}")
    try:
        return _quietly(load)
    except Exception as error:  # as many kinds as there are ways to damage a folder
        raise UserError(f"{what} in folder {name} cannot be loaded: {_first_line(error)}") from error


def tokenizer_fingerprint(tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def cache_root() -> Path:
    """Where token ids are kept between runs; TOKEN_CACHE lets it sit on a persistent volume."""
    return Path(os.environ.get("TOKEN_CACHE", PROJECT / "cache"))


def write_texts(folder, texts, tokenizer) -> str:
    """Token ids of the list `texts` -> folder/tokens.bin and offsets.npy; returns the kind of integer."""
    kind, offsets = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32, [0]
    with open(folder / "tokens.bin", "wb") as file, progress(len(texts), "tokenising") as bar:
        for start in range(0, len(texts), 1000):
            chunk = texts[start : start + 1000]
            # a text that spells a special token out means the letters
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            for ids in tokenizer(chunk, **plain).input_ids:
                file.write(np.asarray(ids, dtype=kind).tobytes())
                offsets.append(offsets[-1] + len(ids))
            bar.update(len(chunk))
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    return kind.__name__


def read_texts(folder, kind) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets) of write_texts: text i is tokens[offsets[i] : offsets[i + 1]], read when used."""
    offsets = np.load(folder / "offsets.npy")
    empty = np.zeros(0, kind)  # no file of length 0 can be mapped
    return np.memmap(folder / "tokens.bin", dtype=kind, mode="r") if offsets[-1] else empty, offsets


@contextmanager
def whole_file(path, mode="w"):
    """A file that appears under its name only when complete and on the disk; `wb` for bytes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(exist_ok=True)
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_lines(path, lines):
    """A .jsonl file: each of `lines` as JSON."""
    with whole_file(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_json(path, content):
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


@contextmanager
def whole_folder(folder):
    """A folder that appears under its name only when whole and on the disk; yesterday's leftovers go."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # a younger one may be another run's work
        if time.time() - leftover.stat().st_mtime > 86_400:
            shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside.chmod(0o755)  # mkdtemp's are private
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            flush(path)
        if not folder.exists():  # otherwise another run has just written the same
            os.rename(aside, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256_file(path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def joint_hash(hashes) -> str:
    """One hash for several; a single one keeps its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


LOST = (errno.EIO, errno.EPIPE)  # a terminal or a pipe that nobody will ever read again; a disk may have room


class Terminal:
    """A stream whose writes never raise: it outlives its terminal (SSH lost, tmux killed), the reader of its
    pipe, a full disk, and a locale without ± in it. All else is the stream's own."""

    def __init__(self, stream):
        self.stream, self.is_dead = stream, False

    def __getattr__(self, name):
        if name == "stream" or name.startswith("__"):  # of a copy that is still empty
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode("ascii", "replace").decode())
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._failed(error)
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error):
        if isinstance(error, ValueError) or error.errno in LOST:
            self.is_dead = True
            with contextlib.suppress(OSError, ValueError):
                silence(self.stream.fileno())


def silence(descriptor):
    """Points stdout or stderr to /dev/null, for those who write to it past Terminal: libraries that took the
    stream before it was wrapped, C++, child processes, and Python's last flush at exit."""
    if descriptor in (1, 2):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def outlive_terminal():
    """From now on no print, bar, warning or traceback of this process raises because nobody can read it."""
    for descriptor in (0, 1, 2):  # one that the shell closed would become the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where the shell closed it: >&-
        if not isinstance(stream, Terminal):
            setattr(sys, name, Terminal(stream))


def write_in_handler(text, log=None):
    """To stderr, and an open log, from a signal handler: past Python's streams, which may be amid a write.

    Never raises.
    """
    for descriptor in (2, *([log.fileno()] if log and not log.closed else [])):
        try:
            os.write(descriptor, text.encode())
        except OSError as error:
            if error.errno in LOST:
                silence(descriptor)


def progress(total, what, world=World(), unit="it"):
    """A bar for work that logs no lines: rank 0, interactive terminals only. total none: only counts."""
    hide, scaled = None if world.is_main else True, unit != "it"
    return tqdm(
        total=total, desc=what, leave=False, disable=hide, file=sys.stderr, unit=unit, unit_scale=scaled
    )


# ----------------------------------------------------------------------------------------------------------
# 5. Optimisation
# ----------------------------------------------------------------------------------------------------------


def count_parameters(model) -> tuple[int, int]:
    """(all, trainable)"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def lr_at(cfg, step, total_steps) -> float:
    """Rate of step `step` (from 0): linear warm-up to cfg.lr, then cfg.schedule down to cfg.min_lr.

    cfg.warmup is a fraction of `total_steps`; 0 and 1 are legal. The first step has lr / warm-up steps.
    one_cycle: by cosine from lr / 25 up during the warm-up, then down to lr / 250,000 (Smith 2018; torch's
    OneCycleLR); gpt3: cosine to lr / 10 at 260/300 of the steps, constant from there (Brown et al. 2020).
    """
    if cfg.schedule == "one_cycle":
        return _one_cycle(cfg.lr / 25, cfg.lr, cfg.lr / 25e4, step, cfg.warmup * total_steps, total_steps)
    rising = round(cfg.warmup * total_steps)
    if step < rising:
        return cfg.lr * (step + 1) / rising
    if cfg.schedule == "constant":
        return cfg.lr
    end, low = total_steps, cfg.min_lr
    if cfg.schedule == "gpt3":
        end, low = 260 / 300 * total_steps, 0.1 * cfg.lr
    done = min(1, (step - rising) / max(1, end - rising))
    left = 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return low + (cfg.lr - low) * left


def beta1_at(cfg, step, total_steps) -> float:
    """Adam's first beta of a step: one_cycle moves it against the rate, 0.95 -> 0.85 -> 0.95, if it may."""
    if cfg.schedule == "one_cycle" and cfg.cycle_beta1:
        return _one_cycle(0.95, 0.85, 0.95, step, cfg.warmup * total_steps, total_steps)
    return cfg.beta1


def _one_cycle(start, peak, end, step, rising, total_steps) -> float:
    """Two half cosines; like torch's, the peak is at step rising - 1 and the end at total_steps - 1."""
    if step <= rising - 1:
        low, high, done = start, peak, step / max(rising - 1, 1e-9)
    else:
        low, high, done = peak, end, (step - rising + 1) / max(total_steps - rising, 1e-9)
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def parameter_groups(model, weight_decay, scales=None, undecayed=()) -> list[dict]:
    """Matrices decay, except those named in `undecayed`.

    `scales` maps parameter names to the share of the lr at which they learn (otherwise 1).
    """
    found = {}  # (scale, decays) -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.dim() >= 2 and name not in undecayed
            found.setdefault(((scales or {}).get(name, 1.0), decays), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), params in sorted(found.items(), key=lambda item: item[0], reverse=True)
    ]


def make_optimizer(
    model, optimizer, weight_decay, betas=(0.9, 0.999), eps=1e-8, scales=None, undecayed=()
) -> torch.optim.Optimizer:
    """adamw (fused) or sgd (momentum 0.9) over parameter_groups. optimizer_step sets the lr."""
    groups = parameter_groups(model, weight_decay, scales, undecayed)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    return torch.optim.SGD(groups, momentum=0.9)


Dtype = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]


def native_dtype(device) -> str:
    """What `dtype` auto becomes: bf16 where the device computes in it, fp16 on older cards, fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "xpu" else "fp32"


def with_dtype(cfg, world):
    """`cfg` with the dtype that this device will compute in; config.json then holds what it became.

    auto: native_dtype. On a card fp32 becomes tf32, unless it stands on the command line.
    """
    given, dtype = typed(cfg), native_dtype(world.device) if cfg.dtype == "auto" else cfg.dtype
    has_tf32 = world.device.type == "cuda"
    if dtype == "fp32" and has_tf32 and "dtype" not in given.flags:
        dtype = "tf32"
    elif dtype == "tf32" and not has_tf32:
        dtype = "fp32"
    if dtype == cfg.dtype:
        return cfg
    why = "factors rounded to 10 bits" if dtype == "tf32" else "half precision"
    line = f"dtype {cfg.dtype} is {dtype} on this card ({why}; --dtype fp32 for full precision)"
    if dtype == "fp32":
        line = f"dtype tf32 is fp32 on this {world.device.type}" if cfg.dtype == "tf32" else None
    flags = given.flags - {"dtype"} if cfg.dtype == "auto" else given.flags  # auto asks for nothing
    given = dataclasses.replace(given, chosen=line)
    return with_flags(dataclasses.replace(cfg, dtype=dtype), given, flags)


class Precision:
    """fp32 and fp64 run as they are; tf32 is fp32 whose products have rounded factors, on NVIDIA cards; bf16
    and fp16 run under autocast, fp16 with a GradScaler."""

    def __init__(self, dtype, world):
        self.dtype, self.world = native_dtype(world.device) if dtype == "auto" else dtype, world
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == "fp16")
        self.skipped, self.skipped_in_a_row = 0, 0  # steps that overflowed in fp16

    def prepare(self, model):
        return model.to(self.world.device, torch.float64 if self.dtype == "fp64" else torch.float32)

    @contextmanager
    def autocast(self):
        """Wrap the forward pass; scaled_backward wraps its own."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype)
        with self.products(), torch.autocast(self.world.device.type, half) if half else nullcontext():
            yield

    @contextmanager
    def products(self):
        """On a card: what remains in fp32 is multiplied in TF32, but for dtype fp32. Put back afterwards."""
        if self.world.device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if self.dtype in ("fp32", "fp64") else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def warning(self) -> str | None:
        if self.dtype not in ("bf16", "fp16") or self.dtype == native_dtype(self.world.device):
            return None
        if self.world.device.type == "cuda" and self.dtype == "bf16":
            return "WARNING this card only emulates bf16: --dtype fp16 is many times faster"
        cpuinfo = Path("/proc/cpuinfo")
        amx = self.dtype == "bf16" and cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()
        if amx or self.world.device.type != "cpu":
            return None
        return f"WARNING this CPU has no fast {self.dtype}: --dtype fp32 may be a hundred times faster"


def sum_cross_entropy(logits, labels) -> torch.Tensor:
    """Summed, not averaged: the caller divides by the global count. Without a target 0, never NaN."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def linear(x, weight, bias=None) -> torch.Tensor:
    """F.linear; in fp32 on a CPU by oneDNN, whose products are up to 1.5 times as fast as MKL's (AMD)."""
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (ONEDNN and fp32 and x.device.type == "cpu" and x.numel()) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias) if torch.is_grad_enabled() else onednn(x, weight, bias)


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x, weight, bias=None):
    """x @ weight.T + bias without gradient; what torch.compile's freezing calls."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, slope):
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        rows = slope.reshape(-1, slope.shape[-1])
        to_x = onednn(slope, weight.t()) if needs[0] else None
        to_w = rows.t() @ x.reshape(len(rows), -1) if needs[1] else None
        return to_x, to_w, rows.sum(0) if needs[2] else None


def targets_only(hidden, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (..., C), labels (...) -> (N, C), (N,) of the positions with a target: others cost nothing."""
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if not (counted := labels != IGNORE_INDEX).all():
        hidden, labels = hidden[counted], labels[counted]
    return hidden, labels


def linear_cross_entropy(terms, bias, labels) -> torch.Tensor:
    """Summed cross-entropy of logits = sum of x @ weight.T over `terms`, + bias; never holds all of them.

    terms: [(x (N, C), weight (V, C)), ...], one, or two with an adapter of low rank; bias (V,) or None;
    labels (N,), all of them targets. Gradients are made with each chunk of logits, for what needs one only;
    backward scales them (one backward, no second).
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(labels, bias, *itertools.chain(*terms))
    return -token_log_probs(terms, bias, labels)[0].sum()


@torch.no_grad()
def token_log_probs(terms, bias, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every target in `labels` (N,): its log-probability in fp64, and whether it was the likeliest.

    Logits have the weights' dtype, whatever the autocast: near -100, where GPT-2's lie, bf16 has steps of a
    half, and many ids would be the likeliest together; fp16 would overflow.
    """
    log_probs, hits = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.bool)]
    V, device = len(terms[0][1]), terms[0][0].device.type
    if device != "cpu":
        terms = [(x, _whole_rows(w, w.dtype)) for x, w in terms]
    with torch.autocast(device, enabled=False):
        for chunk in _chunks(*terms[0]):
            scores = sum(linear(x[chunk].to(w.dtype), w) for x, w in terms)[:, :V]
            scores = (scores if bias is None else scores + bias).log_softmax(-1)
            log_probs.append(scores.gather(1, labels[chunk, None])[:, 0].cpu().double())
            hits.append((scores.argmax(-1) == labels[chunk]).cpu())
    return torch.cat(log_probs), torch.cat(hits)


def _chunks(hidden, weight) -> list[slice]:
    """Equal slices of rows whose logits are 64 MB in fp32 on a CPU (smaller is slower), and on a card 2^26 to
    2^28 numbers by its memory: a function of the card alone, since the order of additions follows from it."""
    if hidden.device.type == "cpu":
        most = 1 << 24
    else:
        card = getattr(torch, hidden.device.type).get_device_properties(hidden.device)
        most = 1 << min(28, max(26, int(math.log2(card.total_memory / 256))))  # 48 GB: 2^27, 80 GB: 2^28
    rows = max(1, math.ceil(len(hidden) / math.ceil(max(1, len(hidden) * len(weight)) / most)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _product_dtype(weight, kind) -> torch.dtype:
    """bf16 under its autocast; otherwise the weight's: fp16 would overflow, so there the head stays fp32."""
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if half else weight.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """With e = exp(logits - top) and Z its row sums, the slope by the logits is e / Z - one-hot.

    On a CPU in fp32 and fp64 e is the one large array, made in place of the logits; division and one-hot go
    into the products: to_x = e w / Z - w[y], to_w = e^T (x / Z) - x at rows y. bf16 would lose the small
    difference of a late subtraction, so there the slope is formed in fp32 first, as it is on a card.
    """

    @staticmethod
    def forward(ctx, labels, bias, *terms):  # x, w, x, w, ...
        xs, ws, needs = terms[::2], terms[1::2], ctx.needs_input_grad
        kind, dtype = xs[0].device.type, _product_dtype(ws[0], xs[0].device.type)
        to_x = [torch.empty_like(x) if need else None for x, need in zip(xs, needs[2::2], strict=True)]
        to_b = torch.zeros_like(bias) if needs[1] else None
        with torch.autocast(kind, enabled=False):
            head = _head_on_cpu if kind == "cpu" else _head_on_card
            xs = [x.to(dtype) for x in xs]
            loss, to_w = head(xs, ws, bias, labels, to_x, needs[3::2], to_b, dtype)
        ctx.slopes = to_b, *itertools.chain(*zip(to_x, to_w, strict=True))
        return loss

    @staticmethod
    def backward(ctx, scale):
        slopes, ctx.slopes = ctx.slopes, None  # scaled in place: there is no second backward
        return None, *(None if slope is None else slope.mul_(scale) for slope in slopes)


def _head_on_cpu(xs, ws, bias, labels, to_x, needs, to_b, dtype):
    """The summed loss and the slopes by `ws` that are needed; fills to_x, adds to to_b."""
    to_w = [torch.zeros_like(w) if need else None for w, need in zip(ws, needs, strict=True)]
    wide = ws[0].dtype
    ws = [w.to(dtype) for w in ws]
    parts = [
        _add_chunk([x[c] for x in xs], ws, bias, labels[c], _rows(to_x, c), to_w, to_b, wide)
        for c in _chunks(xs[0], ws[0])
    ]
    return torch.stack(parts).sum() if parts else ws[0].new_zeros((), dtype=wide), to_w


def _head_on_card(xs, ws, bias, labels, to_x, needs, to_b, dtype):
    """The same, with the vocabulary rounded up: a product whose width is no multiple of the tensor cores'
    tile misses the fast kernels. The rows of zeros get no probability and no slope."""
    V, wide = len(ws[0]), ws[0].dtype
    ws = [_whole_rows(w, dtype) for w in ws]
    to_w = [torch.zeros_like(w, dtype=wide) if need else None for w, need in zip(ws, needs, strict=True)]
    loss, x_all, w_all = ws[0].new_zeros((), dtype=wide), _side_by_side(xs), _side_by_side(ws)
    for c in _chunks(xs[0], ws[0]):
        slope, chunk_loss = _slope(x_all[c] @ w_all.t(), bias, labels[c], V)
        loss += chunk_loss
        if to_b is not None:
            to_b += slope.sum(0, dtype=wide)[:V]
        for x, w, by_x, by_w in zip(xs, ws, _rows(to_x, c), to_w, strict=True):
            if by_x is not None:
                by_x.copy_(slope @ w)
            if by_w is not None:
                _add_product(by_w, slope.t(), x[c])
    return loss, [None if w is None else w[:V] for w in to_w]


TILE = 64


def _side_by_side(tensors) -> torch.Tensor:
    """One matrix, so that one product makes the sum, rounded once; its width a multiple of 8 (16 bytes)."""
    wide = torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]
    return F.pad(wide, (0, -wide.shape[1] % 8)) if wide.shape[1] % 8 else wide


def _whole_rows(weight, dtype) -> torch.Tensor:
    """(V, C) in `dtype`, V rounded up to a multiple of TILE by rows of zeros."""
    if len(weight) % TILE == 0:
        return weight.detach().to(dtype)
    whole = weight.new_zeros(len(weight) + -len(weight) % TILE, weight.shape[1], dtype=dtype)
    whole[: len(weight)] = weight.detach()
    return whole


def _slope(logits, bias, y, V):
    """logits (n, padded V) -> their slope e / Z - one-hot, in the same dtype, and the summed loss.

    Compiled where that pays and works: one kernel instead of seven passes over the largest array of a step.
    """
    global _compiled_slope
    if logits.device.type == "cuda" and logits.numel() >= LARGE and _compiled_slope is not _eager_slope:
        try:
            if _compiled_slope is None:
                warnings.filterwarnings("ignore", message="\\s*Online softmax is disabled")
                # fullgraph: too many recompilations raise, instead of running this formula step by step
                _compiled_slope = torch.compile(_fused_slope, dynamic=True, fullgraph=True)
            return _compiled_slope(logits, bias, y, V)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no Triton, no C compiler
            _compiled_slope = _eager_slope
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            notes.append(f"NOTE the head is not compiled, which is slower: {reason:.50}")
    return _eager_slope(logits, bias, y, V)


LARGE = 1 << 24  # logits, from which on compiling pays
notes = []  # what a run should say once it has a log


def _eager_slope(logits, bias, y, V):
    """20 bytes a bf16 logit are moved: 6 by log_softmax, 8 by exp_, 6 by the rounding."""
    half, wide = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    if bias is not None:
        logits = logits.to(wide) + F.pad(bias, (0, logits.shape[1] - V))
    logits[:, V:] = -math.inf
    log_p = logits.log_softmax(-1, dtype=wide)
    loss = -log_p.gather(1, y[:, None]).sum()
    slope = log_p.exp_().scatter_add_(1, y[:, None], log_p.new_full((len(y), 1), -1))
    return slope.to(half), loss


def _fused_slope(logits, bias, y, V):
    columns = torch.arange(logits.shape[1], device=logits.device)[None]
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        x = x + F.pad(bias, (0, logits.shape[1] - V))
    x = torch.where(columns < V, x, -math.inf)
    top = x.amax(1, keepdim=True)
    total, hit = (x - top).exp().sum(1, keepdim=True), columns == y[:, None]
    target = torch.where(hit, x, 0.0).sum(1, keepdim=True)
    slope = (x - top).exp() / total - hit.to(x.dtype)
    return slope.to(logits.dtype), (top + total.log() - target).sum()


_compiled_slope = None


def _add_product(total, a, b):
    """total += a @ b: chunks are added up in total's dtype, by the product itself where torch can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif hasattr(torch.ops.aten.addmm, "dtype_out") and a.device.type == "cuda" and not torch.version.hip:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


def _rows(tensors, chunk) -> list:
    return [None if t is None else t[chunk] for t in tensors]


def _add_chunk(xs, ws, bias, y, to_x, to_w, to_b, dtype) -> torch.Tensor:
    """The summed loss of some rows; writes their to_x, adds their share of to_w and to_b."""
    logits = linear(xs[0], ws[0]).to(dtype)
    for x, w in zip(xs[1:], ws[1:], strict=True):
        logits += linear(x, w)
    if bias is not None:
        logits += bias
    targets, top = logits.gather(1, y[:, None]), logits.amax(1, keepdim=True)
    e = logits.sub_(top).exp_()
    total = e.sum(1, keepdim=True)
    if to_b is not None:
        to_b += (e / total).sum(0) - torch.bincount(y, minlength=len(to_b))
    if half := xs[0].dtype != dtype:
        e.div_(total).scatter_add_(1, y[:, None], torch.full_like(total, -1))
    slope = e.to(xs[0].dtype)
    for x, w, by_x, by_w in zip(xs, ws, to_x, to_w, strict=True):
        if by_x is not None:
            by_x.copy_(slope @ w if half else linear(e, w.t()).div_(total).sub_(w[y]))
        if by_w is not None and half:
            by_w += slope.t() @ x  # chunks are added up in fp32
        elif by_w is not None:
            by_w.addmm_(e.t(), x / total).index_add_(0, y, x, alpha=-1)
    return (top + total.log() - targets).sum()


def scaled_backward(loss_sum, world, targets, precision):
    """Backward of a micro-batch's summed loss: the exchanged gradient is that of sum / global targets.

    DDP averages over ranks, hence the world size; no targets at all give zero gradients.
    """
    with precision.products():
        precision.scaler.scale(loss_sum * (world.size / max(targets, 1))).backward()


def optimizer_step(optimizer, precision, clip, lr, beta1=None, skip=None) -> float:
    """Unscale, clip to the global norm `clip` (none: do not), step at `lr`, zero; returns the whole norm.

    The norm is the exchanged gradients': all ranks see the same. An fp16 overflow skips the step and gives
    inf; otherwise, or 51 times in a row, it raises FloatingPointError, and no weight is touched. `skip(norm)`
    may look at the gradients before they are clipped, and leave this step's update out.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
        if beta1 is not None and "betas" in group:
            group["betas"] = (beta1, group["betas"][1])
    precision.scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    total = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    norm, halves = float(total), precision.scaler.is_enabled()
    overflow = not math.isfinite(norm)
    left_out = bool(skip and not (overflow and halves) and skip(norm))  # fp16 overflows now and then
    if clip is not None:
        nn.utils.clip_grads_with_norm_(params, clip, total)
    precision.skipped_in_a_row = precision.skipped_in_a_row + 1 if overflow else 0
    precision.skipped += overflow
    most = 50 if halves else 0  # 65,536 is halved 16 times to 1
    if precision.skipped_in_a_row > most:
        raise FloatingPointError(
            f"gradient norm is {norm}: try a lower lr, more warm-up, clipping, or dtype fp32"
        )
    if not left_out:
        precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def worst_case(world, model, step, optimizer, rows) -> float:
    """Two discarded steps, `step()` being forward and backward of the `rows` longest rows; seconds of one.

    The first exchanges nothing, so that running out of memory on one rank can be agreed on; the second makes
    DDP settle its buckets, without which a resumed run on 3 and more ranks would add up in another order.
    """
    failed = torch.zeros(1)
    try:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            step()
    except torch.OutOfMemoryError:
        failed += 1
    optimizer.zero_grad(set_to_none=True)
    if all_reduce_sum(world, failed).item():
        better = f"--micro_batch {rows // 2}" if rows > 1 else "shorter rows or a smaller model"
        raise UserError(f"out of memory with {rows} of the longest rows at once: use {better}")
    began = time.perf_counter()
    step()
    if world.device.type != "cpu":
        getattr(torch, world.device.type).synchronize()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise RuntimeError(f"{len(idle)} trainable parameters get no gradient, e.g. {idle[0]}: freeze them")
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


# ----------------------------------------------------------------------------------------------------------
# 6. Statistics
# ----------------------------------------------------------------------------------------------------------


def bootstrap(values, groups, *, weights=None, samples=2000, seed=0, of=None) -> np.ndarray:
    """95 % percentile intervals (columns, 2) of the column means of `values` (rows, columns).

    With `of`, intervals of what it makes of means: (samples, columns) -> (samples, figures), as they are.

    `weights` (rows,) count a row that often: the targets of which its values are means. Whole groups
    (prompts, documents) are redrawn, since rows of one group are not independent. A column of nothing but
    zeros or ones would get width 0: it gets the rule of three, 3 / number of groups.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.zeros((index.max() + 1, values.shape[1] + 1))  # per group: of every column, and its weight
    np.add.at(sums, index, np.c_[values * weights[:, None], weights])
    rng, n = np.random.default_rng(seed), len(sums)
    draws = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) * 1.0 @ sums for _ in range(samples)])
    means = draws[:, :-1] / draws[:, -1:]
    intervals = np.percentile(means if of is None else of(means), tails(n), axis=0).T
    if of is not None:
        return intervals
    intervals[(values == 0).all(0)] = 0, min(1, 3 / n)
    intervals[(values == 1).all(0)] = max(0, 1 - 3 / n), 1
    return intervals


def tails(n) -> list[float]:
    """Percentiles that bound a 95 % interval over n redrawn groups: 2.5 and 97.5 where they are many.

    Few: Hesterberg's expanded percentiles (2015), with Student's t to first order in 1 / (n - 1).
    """
    t = 1.96 + (1.96**3 + 1.96) / (4 * max(n - 1, 1))
    tail = 50 * (1 - math.erf(t * math.sqrt(n / max(n - 1, 1) / 2)))
    return [tail, 100 - tail]


def student(freedom) -> float:
    """The two-sided 95 % quantile of Student's t, by integrating over t = sqrt(freedom) tan(angle)."""
    angle = np.linspace(0, math.pi / 2, 200_001)[:-1]
    area = np.cumsum(np.cos(angle) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(angle[np.searchsorted(area, 0.95 * area[-1])])


def language_metrics(sums, groups, unigram=None, byte_counts=None) -> dict:
    """Loss per target token, perplexity, accuracy of the likeliest token, with 95 % intervals by group.

    sums (rows, 3): summed loss in nats, hits, targets. `unigram` (rows,): summed losses by token frequencies
    alone, which are to be beaten. `byte_counts` (rows,): UTF-8 bytes that the targets spell, for bits per
    byte, which compares tokenizers (an end token's loss counts, it spells nothing).
    """
    targets, given = sums[:, 2], [] if unigram is None else [unigram, sums[:, 0] - unigram]
    values = np.column_stack([sums[:, 0], sums[:, 1], *given]) / targets[:, None]
    intervals = bootstrap(values, groups, weights=targets).tolist()
    loss, accuracy, *others = np.average(values, axis=0, weights=targets).tolist()
    metrics = {"loss": loss, "loss_interval": intervals[0], "perplexity": math.exp(min(loss, 700))}
    metrics |= {"accuracy": accuracy, "accuracy_interval": intervals[1]}
    if given:
        metrics |= {"unigram_loss": others[0], "above_unigram_interval": intervals[3]}
    if byte_counts is not None and byte_counts.sum():
        both = np.c_[sums[:, 0] / math.log(2), byte_counts] / targets[:, None]
        ratio = {"weights": targets, "of": lambda means: means[:, :1] / means[:, 1:]}
        metrics |= {"bits_per_byte": sums[:, 0].sum() / math.log(2) / byte_counts.sum()}
        metrics |= {"bits_per_byte_interval": bootstrap(both, groups, **ratio).tolist()[0]}
        metrics |= {"bytes": int(byte_counts.sum())}
    return metrics | {"targets": int(targets.sum()), "rows": len(sums)}


def classification_metrics(log_probs, labels, groups, prior, names) -> dict:
    """Log loss and accuracy with 95 % intervals by group, beside the uniform and the class-prior guess.

    log_probs (N, classes); prior: class shares of the training rows, (classes,) or (N, classes). `alarm` is a
    sentence when nothing was learnt: always the same class, or a log loss not below the prior's.
    """
    log_probs, labels, every = np.asarray(log_probs), np.asarray(labels), np.arange(len(labels))
    prior = np.broadcast_to(np.clip(prior, 1e-12, None), log_probs.shape)
    chosen, loss, prior_loss = log_probs.argmax(1), -log_probs[every, labels], -np.log(prior[every, labels])
    intervals = bootstrap(np.c_[loss, chosen == labels, loss - prior_loss], groups).tolist()
    metrics = {
        "log_loss": float(loss.mean()),
        "log_loss_interval": intervals[0],
        "accuracy": float((chosen == labels).mean()),
        "accuracy_interval": intervals[1],
        "rows": len(labels),
        "uniform_log_loss": math.log(len(names)),
        "prior_log_loss": float(prior_loss.mean()),
        "prior_accuracy": float((labels == prior.argmax(1)).mean()),
        "above_prior": float((loss - prior_loss).mean()),  # below 0: something was learnt
        "above_prior_interval": intervals[2],  # row by row
        "predicted": dict(zip(names, class_shares(chosen, len(names)), strict=True)),
        "truth": dict(zip(names, class_shares(labels, len(names)), strict=True)),
    }
    return metrics | {"alarm": _alarm(metrics)}


def class_shares(labels, classes) -> list[float]:
    """How often each class occurs."""
    return (np.bincount(labels, minlength=classes) / len(labels)).tolist()


def _alarm(metrics) -> str | None:
    name, share = max(metrics["predicted"].items(), key=lambda item: item[1])
    if share == 1.0:
        return f"NOT LEARNING: every one of {metrics['rows']} rows is called '{name}'"
    if metrics["above_prior_interval"][1] >= 0:
        loss, prior = metrics["log_loss"], metrics["prior_log_loss"]
        return f"NOT LEARNING: log loss {loss:.4f} cannot be told from the class shares' {prior:.4f}"
    return None


def plus_minus(value, interval, digits=3) -> str:
    """`0.473 ± 0.013`: half the interval's width; `0.000 (0 to 0.03)` where it lies on one side."""
    low, high = interval
    if value in (low, high) and low != high:
        return f"{value:.{digits}f} ({low:.3g} to {high:.3g})"
    return f"{value:.{digits}f} ± {(interval[1] - interval[0]) / 2:.{digits}f}"
