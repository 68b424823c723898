"""What the scripts share and must not drift: one section per heading, in the order a script uses them.

constants -> processes -> sampling -> data sets -> encoders -> optimisation -> statistics -> runs

Read a run_*.py first and come here for one verb at a time. The loop, and whatever two experiments could rightly do
differently, stays in the script; a formula stands here once. With one process every verb does the obvious thing, so
no script asks whether it is distributed.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tokenize
import types
import typing
import urllib.error
import urllib.request
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
from tqdm import tqdm

IGNORE_INDEX = -100  # a label that no loss and no accuracy looks at (torch's own default)
PROJECT = Path(__file__).resolve().parent


class UserError(Exception):
    """Bad input. The text is one line: what, the value, and what would work. Exit code 2."""


class Stop(Exception):
    """All ranks agreed to end before the work is complete, and what was computed is saved. Exit code 0."""


# ------------------------------------------------------------------------------------------------------------
# 1. Constants -> flags
# ------------------------------------------------------------------------------------------------------------

LIMITS = {  # lowest and highest legal value of every constant that has one, in whichever script it appears
    **dict.fromkeys(
        ["batch", "micro_batch", "eval_batch", "log_every", "save_every", "eval_every"], (1, None)
    ),
    **dict.fromkeys(["epochs", "max_steps", "max_minutes", "lr", "min_lr", "weight_decay"], (0, None)),
    **dict.fromkeys(["max_documents", "resume_step"], (1, None)),
    **dict.fromkeys(["dropout", "encoder_dropout", "warmup"], (0, 1)),
    **{
        "clip": (0, None),
        "price_per_hour": (0, None),
        "seed": (0, None),
        "keep": (2, None),
        "folds": (2, None),
    },
}


@dataclass(frozen=True)
class Typed:
    """What stood on the command line beside the values themselves: it decides what a resume may change."""

    preset: str | None = None
    smoke: bool = False
    flags: frozenset = frozenset()
    overrides: dict = dataclasses.field(default_factory=dict)  # what preset and SMOKE changed


def parse_config(config_class, presets, smoke, doc, argv=None):
    """The script's constants: defaults < preset < `smoke` < flags; a callable in `smoke` maps the value so far.

    Anything wrong is one line on stderr and exit code 2. `typed(cfg)` says what stood on the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        hints = typing.get_type_hints(config_class)
        for where, values in {"SMOKE": smoke, **{f"preset {k}": v for k, v in presets.items()}}.items():
            for name, value in values.items():
                _check_constant(where, name, value, hints)
        given = vars(_parser(config_class, presets, hints, doc).parse_args(argv))
        preset, is_smoke = given.pop("preset", None), given.pop("smoke", False)
        values = dict(presets.get(preset, {}))
        if is_smoke:
            now = {**_defaults(config_class), **values}
            values |= {k: v(now[k]) if callable(v) else v for k, v in smoke.items()}
        cfg = config_class(**{"tag": preset, **values, **given})
        check_limits(cfg)
    except UserError as error:
        _exit_with_line(error)
    overrides = {name: value for name, value in values.items() if name not in given}
    object.__setattr__(cfg, "typed", Typed(preset, is_smoke, frozenset(given), overrides))  # no constant
    return cfg


def typed(cfg) -> Typed:
    return getattr(cfg, "typed", Typed())


def check_limits(cfg):
    """Refuses a value outside LIMITS, naming the constant."""
    for name, (low, high) in LIMITS.items():
        value = getattr(cfg, name, None)
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise UserError(
                f"--{name} {value} is out of range: use {low} {'or more' if high is None else f'to {high}'}"
            )


def _defaults(config_class) -> dict:
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def _parser(config_class, presets, hints, doc) -> argparse.ArgumentParser:
    names = ["preset", "smoke", *hints, *(f"no-{name}" for name in hints if hints[name] is bool)]

    class OneLineParser(argparse.ArgumentParser):
        def error(self, message):
            if unknown := re.search(r"unrecognized arguments: --([\w-]+)", message):
                near = difflib.get_close_matches(unknown[1], names, n=1)
                message = (
                    f"unknown flag --{unknown[1]}: {f'did you mean --{near[0]}?' if near else 'see --help'}"
                )
            raise UserError(message)

    parser = OneLineParser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    skip = (
        argparse.SUPPRESS
    )  # absent unless typed: defaults stay in Config, and a resume knows what was typed
    parser.add_argument(
        "--smoke", action="store_true", default=skip, help="tiny model, built-in data, seconds"
    )
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=skip, help="a named set of overrides")
    comments = _trailing_comments(config_class)
    for field in dataclasses.fields(config_class):
        text = f"{comments.get(field.name, '')} [{field.default}]".strip().replace("%", "%%")
        _check_constant(f"default of {config_class.__name__}", field.name, field.default, hints)
        parser.add_argument(f"--{field.name}", default=skip, help=text, **_flag(hints[field.name]))
    return parser


def _trailing_comments(config_class) -> dict[str, str]:
    """Constant name -> the comment behind it: its unit and meaning, shown by --help."""
    try:
        source = inspect.getsource(config_class)
    except OSError:  # typed into an interpreter: no source, no help texts
        return {}
    names, comments = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            names.setdefault(token.start[0], token.string)
        elif token.type == tokenize.COMMENT and token.start[0] in names:
            comments[names[token.start[0]]] = token.string.lstrip("# ")
    return comments


def _flag(hint) -> dict:
    """What argparse needs to know about one annotation: int, float, str, bool, Literal, or one of these | None."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint), "metavar": "|".join(map(str, typing.get_args(hint)))}
    if typing.get_origin(hint) is types.UnionType:
        (kind,) = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        convert = _flag(kind)["type"]

        def or_none(text):
            return None if text == "none" else convert(text)

        or_none.__name__ = f"{kind.__name__} or none"  # argparse puts it into its message
        return {"type": or_none, "metavar": f"{kind.__name__.upper()}|none"}
    if hint not in (int, float, str):
        raise UserError(
            f"a constant may be int, float, str, bool, Literal or one of these | None, not {hint}"
        )

    def finite(text):
        value = hint(text)
        if hint is float and not math.isfinite(value):
            raise ValueError(text)
        return value

    finite.__name__ = hint.__name__
    return {"type": finite, "metavar": hint.__name__.upper()}


def _check_constant(where, name, value, hints):
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        raise UserError(
            f"{where} names no constant: {name!r}{f', did you mean {near[0]!r}?' if near else ''}"
        )
    if callable(value):  # in SMOKE: a map from the value so far
        return
    hint = hints[name]
    allowed = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is Literal:
        fits = value in allowed
    else:
        exact = {type(None) if value is None else type(value)}
        fits = exact <= set(allowed) or (type(value) is int and float in allowed)
    if not fits:
        expected = " | ".join(getattr(kind, "__name__", repr(kind)) for kind in allowed)
        raise UserError(f"{where}: {name} = {value!r} has the wrong type: use {expected}")


def _exit_with_line(error) -> typing.NoReturn:
    """Every process of a launch meets a wrong flag; the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------------------
# 2. Processes
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of the launch; size 1 needs no process group."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    backend: str = "none"
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def distributed(backend="auto", timeout_minutes=30):
    """Joins the processes torchrun started (or none), and leaves them whatever happens. Yields the World.

    auto: nccl on CUDA, xccl on XPU, gloo on CPU; CPU tensors (counts, stop flags) always travel over gloo.
    A UserError is printed once, without traceback, and exits with 2.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in _LAUNCH_ENV.items()}
    world = World()
    try:
        device = _pick_device(env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
        if env["WORLD_SIZE"] == 1:
            world = World(device=device)
        else:
            # torchrun sets OMP_NUM_THREADS=1 for every process: with fewer ranks than cores most cores would idle
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // env["LOCAL_WORLD_SIZE"]))
            native = (
                {"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo") if backend == "auto" else backend
            )
            store, rank, size = next(dist.rendezvous("env://"))
            dist.init_process_group(
                "gloo" if native == "gloo" else f"cpu:gloo,{device.type}:{native}",
                store=store,
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(minutes=timeout_minutes),
            )
            world = World(rank, env["LOCAL_RANK"], size, device, native, dist.PrefixStore("core", store))
        yield world
        barrier(world)  # rank 0 may host the store: nobody leaves while another still reads it
    except UserError as error:
        if (
            world.size == 1
            or world.store.compare_set("user_error", "", str(world.rank)) == str(world.rank).encode()
        ):
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


_LAUNCH_ENV = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}


def _pick_device(local_rank, local_size) -> torch.device:
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            if local_size > module.device_count():
                n = module.device_count()
                raise UserError(f"{local_size} processes but {n} {kind} device(s): use --nproc_per_node={n}")
            module.set_device(local_rank)
            return torch.device(kind, local_rank)
    return torch.device("cpu")


def all_reduce_sum(world, values: torch.Tensor) -> torch.Tensor:
    """Sums a CPU tensor over the ranks, in place. A rank that hangs is named after the time-out."""
    if world.size > 1:
        call = next(_reductions)
        world.store.set(f"reduction/{world.rank}", str(call))
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise RuntimeError(f"{_who_is_missing(world, call)}: {error}") from error
    return values


_reductions = itertools.count(1)


def _who_is_missing(world, call) -> str:
    try:
        done = {rank: int(world.store.get(f"reduction/{rank}")) for rank in range(world.size)}
    except RuntimeError as error:
        return f"rank {world.rank} lost the others ({error})"
    late = [str(rank) for rank, last in done.items() if last < call]
    return (
        f"rank {', '.join(late) or 'unknown'} did not reach reduction {call} that rank {world.rank} waits in"
    )


def barrier(world):
    all_reduce_sum(world, torch.zeros(1))


def on_main(world, function):
    """Runs `function` on rank 0 while the others wait, as long as it takes; every rank gets its JSON result.

    Its error is raised on every rank. Waiting goes through the store, with a heartbeat, since a collective would
    time out during an hour of tokenising; a rank 0 that is silent for a minute is reported.
    """
    if world.size == 1:
        return function()
    key = f"on_main/{next(_main_calls)}"
    if not world.is_main:
        reply = json.loads(_wait_for_main(world.store, key))
        if "error" in reply:
            kind = {"UserError": UserError, "Stop": Stop}.get(reply["kind"], RuntimeError)
            raise kind(reply["error"])
        return reply["result"]
    try:
        with _heartbeat(world.store):
            reply = {"result": function()}
        return reply["result"]
    except BaseException as error:
        reply = {"error": str(error), "kind": type(error).__name__}
        raise
    finally:
        world.store.set(key, json.dumps(reply))


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
        time.sleep(0.05)
        now = store.get("heartbeat") if store.check(["heartbeat"]) else None
        if now != beat:
            beat, heard = now, time.monotonic()
        elif time.monotonic() - heard > SILENCE_SECONDS:
            raise RuntimeError(f"rank 0 has been silent for {SILENCE_SECONDS} s while the others wait for it")
    return store.get(key)


def main_first(world, function):
    """Runs `function` on rank 0, then on the others: one download, then cache hits. Returns this rank's result."""
    result = []
    on_main(world, lambda: result.append(function()))
    return result[0] if result else function()


def wrap_ddp(model, world):
    """DistributedDataParallel where there are several ranks. Evaluate and save the module itself, not the wrapper."""
    if world.size == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    # no rank's buffers ever differ; the argument got a new name in torch 2.13
    known = inspect.signature(ddp).parameters
    quiet = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return ddp(model, gradient_as_bucket_view=True, **{quiet: False})


def micro_batches(model, rows, size=None):
    """Slices of `size` rows (none: all at once); the ranks exchange gradients only in the last one's backward.

    No rows still give one empty slice, so that every rank takes part in the exchange.
    """
    starts = range(0, max(len(rows), 1), size or max(len(rows), 1))
    for start in starts:
        exchange = start == starts[-1] or not hasattr(model, "no_sync")
        with nullcontext() if exchange else model.no_sync():
            yield rows[start : start + (size or len(rows) or 1)]


def reseed(*key):
    """Seeds torch from (seed, step, rank, ...): randomness is a function of the position, so none is stored."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ------------------------------------------------------------------------------------------------------------
# 3. Sampling
# ------------------------------------------------------------------------------------------------------------


class ShardedBatches:
    """Row numbers of every global batch, a pure function of (seed, epoch, step); a rank takes every size-th one.

    With a seed (training): reshuffled each epoch, rows of an incomplete last batch left out. Without (evaluation):
    every row exactly once, in order. `lengths` groups rows of similar length: in training inside blocks of
    `block` batches whose order is then shuffled, in evaluation over all rows, longest first.
    """

    def __init__(self, n, batch, world, *, seed=None, lengths=None, block=50):
        self.n, self.batch, self.world, self.seed, self.block = n, batch, world, seed, block
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.steps_per_epoch = n // batch if seed is not None else math.ceil(n / batch)
        if seed is not None and n < batch:
            raise UserError(
                f"{n} training rows do not fill one batch: use --batch {max(n, 1)} or less, or more data"
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

    def longest(self, rows_per_rank) -> list[int]:
        """The worst case a rank can meet: as many of the longest rows as one rank holds."""
        order = np.arange(self.n) if self.lengths is None else np.argsort(-self.lengths, kind="stable")
        return order[:rows_per_rank].tolist()

    def _shuffle(self, epoch) -> np.ndarray:
        if self.seed is None:
            return np.array(self.longest(self.n), dtype=np.int64)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.n, generator=generator).numpy()[: self.steps_per_epoch * self.batch]
        if self.lengths is None:
            return order
        span = self.block * self.batch
        blocks = [order[start : start + span] for start in range(0, len(order), span)]
        order = np.concatenate([rows[np.argsort(self.lengths[rows], kind="stable")] for rows in blocks])
        batches = order.reshape(self.steps_per_epoch, self.batch)
        return batches[torch.randperm(self.steps_per_epoch, generator=generator).numpy()].reshape(-1)


# ------------------------------------------------------------------------------------------------------------
# 4. Data sets
# ------------------------------------------------------------------------------------------------------------

TABLES = (".csv", ".json", ".jsonl", ".parquet")


def read_rows(name, max_documents=None, prefer="train") -> list[dict]:
    """Rows of a table by name: a file (CSV, JSON, JSONL, Parquet, or in a zip), a folder of them, or a Hub id.

    Of several files in a zip or folder those whose name starts with `prefer` are read. A Hub id may be written
    `owner/name:config@revision`; its `prefer` split is read. Raises UserError for whatever is not there.
    """
    rows = itertools.chain.from_iterable(_tables(name, prefer))
    return list(itertools.islice(rows, max_documents))


def data_fingerprint(name, prefer="train") -> str:
    """SHA-256 over the bytes that read_rows would read: it names caches and tells whether a resume sees the same."""
    if not Path(name).exists():
        _, dataset = _hub_dataset(name, prefer)
        paths = [Path(file["filename"]) for file in dataset.cache_files]
    else:
        paths = [Path(name)] if Path(name).is_file() else _table_files(Path(name), prefer)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_sha256(path).encode())
    return digest.hexdigest()


def _tables(name, prefer):
    path = Path(name)
    if path.is_dir():
        for file in _table_files(path, prefer):
            yield _read_table(file.open("rb"), file.suffix, file)
    elif path.suffix == ".zip" and path.exists():
        with _open_zip(path) as archive:
            for member in _preferred(archive.namelist(), prefer, path):
                yield _read_table(archive.open(member), Path(member).suffix, f"{path}/{member}")
    elif path.exists():
        yield _read_table(path.open("rb"), path.suffix, path)
    else:
        yield from _hub_dataset(name, prefer)


def _open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(f"{path} is not a whole zip file: fetch it again") from None


def _table_files(folder, prefer) -> list[Path]:
    return [folder / name for name in _preferred(sorted(os.listdir(folder)), prefer, folder)]


def _preferred(names, prefer, where) -> list[str]:
    tables = [name for name in names if Path(name).suffix in TABLES]
    chosen = [name for name in tables if Path(name).name.startswith(prefer)] or (
        tables if len(tables) == 1 else []
    )
    if not chosen:
        found = ", ".join(tables) or "no table"
        raise UserError(
            f"{where} holds {found}: name one file ({', '.join(TABLES)}), or call one {prefer}.csv"
        )
    return chosen


def _read_table(stream, suffix, where):
    """Yields one table's rows; the file's own mistakes come as one line."""
    csv.field_size_limit(1 << 30)  # a long conversation is one field; the default stops at 131,072 characters
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(io.BytesIO(stream.read())).to_pylist()
            return
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        if suffix == ".csv":
            yield from csv.DictReader(text)
        elif suffix == ".jsonl":
            yield from (json.loads(line) for line in text if line.strip())
        elif suffix == ".json":  # one list, or one object per line
            content = text.read()
            yield from (
                json.loads(content)
                if content.lstrip().startswith("[")
                else map(json.loads, filter(str.strip, content.splitlines()))
            )
        else:
            raise UserError(
                f"{where} is no table: use {', '.join(TABLES)}, one of these in a .zip, or a Hub id"
            )
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise UserError(f"{where} cannot be read as {suffix[1:]}: {str(error).splitlines()[0]}") from None
    finally:
        stream.close()


def _hub_dataset(name, split):
    """One Hub set as a list of one table, so that it reads like a folder."""
    form = re.fullmatch(
        r"(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?", name
    )
    if not form or Path(name).suffix in (*TABLES, ".zip", ".txt") or name[0] in "./":
        raise UserError(f"no such file or folder: {name}")

    def load():
        import datasets

        return datasets.load_dataset(form["repo"], form["config"], split=split, revision=form["revision"])

    return [from_hub("data set", name, load, "a local file, or what --help of --data names as built in")]


def require_columns(rows, columns, where):
    """Refuses an empty table and one that lacks a column, listing the columns there are."""
    if not rows:
        raise UserError(f"{where} has no rows: use a file with the columns {', '.join(columns)}")
    if missing := [column for column in columns if column not in rows[0]]:
        found = ", ".join(map(str, rows[0])) if isinstance(rows[0], dict) else type(rows[0]).__name__
        raise UserError(f"{where} lacks the column(s) {', '.join(missing)}; found: {found}")


class BadRows:
    """Counts unusable rows by reason and row number; more than `limit` of all rows is an error that shows three."""

    def __init__(self, limit=0.01):
        self.limit, self.rows = limit, []

    def add(self, number, reason):
        self.rows.append((number, str(reason)))

    def report(self, total, where) -> list[str]:
        """Lines to print; raises UserError above the limit."""
        named = "; ".join(f"row {number}: {reason}" for number, reason in self.rows[:3])
        if len(self.rows) > self.limit * total:
            raise UserError(f"{where}: {len(self.rows)} of {total} rows are unusable, e.g. {named}")
        reasons = Counter(reason for _, reason in self.rows)
        return [
            f"left out {count} row(s): {reason}, row(s) "
            + ", ".join([str(number) for number, r in self.rows if r == reason][:10])
            + (", ..." if count > 10 else "")
            for reason, count in reasons.items()
        ]


def is_clean(text) -> bool:
    """False for lone surrogates, which json.loads lets through and tokenizers raise at."""
    return not re.search("[\ud800-\udfff]", text)


def split_by_group(groups, labels, shares, seed) -> np.ndarray:
    """Part number of every row: parts in the proportions `shares`, no group in two parts, labels spread evenly.

    Largest groups first, ties in the order of a hash of (seed, group), each into the part that its labels fill
    least so far. A pure function of its arguments: the same on every rank and machine.
    """
    shares = np.asarray(shares, dtype=float) / np.sum(shares)
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    kinds = np.unique(labels, return_inverse=True)[1]
    if len(names) < len(shares):
        raise UserError(
            f"{len(names)} different prompts cannot be split into {len(shares)} parts: use more data"
        )
    counts = np.zeros((len(names), kinds.max() + 1))
    np.add.at(counts, (index, kinds), 1)
    room = np.outer(shares, counts.sum(0))  # (parts, labels): rows each part should get
    filled = np.zeros_like(room)
    hashes = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names]
    part = np.zeros(len(names), dtype=np.int64)
    for group in sorted(range(len(names)), key=lambda g: (-counts[g].sum(), hashes[g])):
        after = (filled + counts[group]) / room
        crowding = (after * counts[group]).sum(1) + 1e-3 * (filled.sum(1) / room.sum(1))
        part[group] = int(np.argmin(crowding))
        filled[part[group]] += counts[group]
    return part[index]


# Token ids, once


def tokenizer_fingerprint(tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def cache_root() -> Path:
    """Where token ids are kept between runs; the variable lets it sit on a persistent volume."""
    return Path(os.environ.get("TOKEN_CACHE", PROJECT / "cache"))


def write_texts(folder, texts, tokenizer, total):
    """Token ids of `texts` (an iterable of `total` strings) -> folder/tokens.bin and offsets.npy."""
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    offsets, texts = [0], iter(texts)
    with open(folder / "tokens.bin", "wb") as file, progress(total, "tokenising") as bar:
        while chunk := list(itertools.islice(texts, 1000)):
            for ids in tokenizer(
                chunk, add_special_tokens=False, return_attention_mask=False, verbose=False
            ).input_ids:
                file.write(np.asarray(ids, dtype=kind).tobytes())
                offsets.append(offsets[-1] + len(ids))
            bar.update(len(chunk))
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    return kind.__name__


def read_texts(folder, kind) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets) of write_texts: text i is tokens[offsets[i] : offsets[i + 1]], read from disk when used."""
    path = folder / "tokens.bin"
    tokens = (
        np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, kind)
    )  # mmap refuses empty
    return tokens, np.load(folder / "offsets.npy")


@contextmanager
def whole_file(path):
    """A text file that appears under its name only when complete."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(exist_ok=True)
    try:
        with open(aside, "w") as file:
            yield file
        _flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(folder):
    """A folder that appears under its name only when whole: written beside it, flushed, renamed."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(total, what, world=World()):
    """A bar for work that logs no lines: rank 0, interactive terminals only (no carriage returns in files)."""
    return tqdm(total=total, desc=what, leave=False, disable=None if world.is_main else True)


# ------------------------------------------------------------------------------------------------------------
# 5. Encoders
# ------------------------------------------------------------------------------------------------------------

TINY = {  # 0.1: a vector of 64 numbers starts as large as one of 768 does with the usual 0.02
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "initializer_range": 0.1,
}
TINY_FAMILIES = {  # what each family needs beside TINY
    "distilbert": {"hidden_dim": 128},
    "bert": {},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "electra": {"embedding_size": 64},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "albert": {"embedding_size": 64, "inner_group_num": 1},
}


def tiny(name) -> str:
    """The small stand-in of the same family: `microsoft/deberta-base` -> `tiny:deberta`."""
    families = sorted(TINY_FAMILIES, key=len, reverse=True)  # distilbert before bert
    return f"tiny:{next((family for family in families if family in name.lower()), 'bert')}"


def from_hub(what, name, load, instead):
    """`load()`, with the Hub's many ways to fail turned into one line that says what to do, within seconds."""
    online = _hub_answers()
    try:
        return load()
    except (
        Exception
    ) as error:  # every library on the way has errors of its own: the line keeps the first one's text
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        if not online:
            reason = "the Hub does not answer and HF_HOME holds no copy"
        raise UserError(f"{what} {name} cannot be fetched ({reason}): use {instead}") from error


def _hub_answers(seconds=5) -> bool:
    """Probes the Hub once; without an answer the libraries are told to look into their cache only."""
    if "HF_HUB_OFFLINE" not in os.environ:
        answers = []

        def probe():  # in a thread: looking a name up has no time-out of its own
            with contextlib.suppress(OSError):
                try:
                    urllib.request.urlopen(
                        os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds
                    )
                except urllib.error.HTTPError:
                    answers.append(True)  # it spoke
                else:
                    answers.append(True)

        thread = threading.Thread(target=probe, daemon=True)
        thread.start()
        thread.join(seconds)
        os.environ["HF_HUB_OFFLINE"] = "0" if answers else "1"  # read when transformers is first imported
    return os.environ["HF_HUB_OFFLINE"] in ("0", "")


def load_tokenizer(name, texts=()):
    """A fast tokenizer with cls and sep tokens: Hub id, folder, or (tiny:*) the words of `texts`."""
    if name.startswith("tiny:"):
        return _word_tokenizer(texts)

    def load():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, use_fast=True)

    tokenizer = _local_or_hub("tokenizer", name, load)
    if not getattr(tokenizer, "is_fast", False) or None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise UserError(f"tokenizer of {name} has no cls and sep token: use an encoder of the BERT family")
    return tokenizer


def _local_or_hub(what, name, load):
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"no such folder: {name}")
    if not Path(name).is_dir():
        return from_hub(what, name, load, "a local folder, or tiny:bert (built in)")
    try:
        return load()
    except (OSError, ValueError) as error:
        raise UserError(f"{what} in folder {name} cannot be loaded: {str(error).splitlines()[0]}") from error


def _word_tokenizer(texts, size=4096):
    """Lower-cased words by frequency, ties by spelling: a pure function of the texts."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(special)]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # the regular expression above
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def load_encoder(name, tokenizer, dropout=None) -> nn.Module:
    """An AutoModel in fp32, never with a pooler: Hub id, folder, or tiny:<family> (random weights).

    `dropout` replaces the pretrained dropout of hidden states and attention. Weights that a checkpoint lacks are
    an error: transformers would fill them at random.
    """
    from transformers import AutoConfig, AutoModel

    if name.startswith("tiny:"):
        family = name.removeprefix("tiny:")
        if family not in TINY_FAMILIES:
            raise UserError(f"--model {name}: use tiny: with one of {', '.join(TINY_FAMILIES)}")
        ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return encoder_from_config(
            AutoConfig.for_model(family, **TINY, **TINY_FAMILIES[family], **ids), dropout
        )

    def load():
        config = _with_dropout(AutoConfig.from_pretrained(name), dropout)
        return AutoModel.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)

    model, info = _local_or_hub("model", name, load)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(
            f"model {name} lacks {len(missing)} weights, e.g. {missing[0]}: is it an encoder checkpoint?"
        )
    return _without_pooler(model)


def encoder_from_config(config, dropout=None) -> nn.Module:
    """The same architecture with random weights, for tiny:* and for weights that a run saved."""
    from transformers import AutoModel

    return _without_pooler(AutoModel.from_config(_with_dropout(config, dropout), dtype=torch.float32))


def _with_dropout(config, dropout):
    names = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "attention_dropout",
        "embd_pdrop",
    )
    for field in names if dropout is not None else ():
        if hasattr(config, field):
            setattr(config, field, dropout)
    return config


def _without_pooler(model):
    """Only the last hidden state is used: a pooler's weights would get no gradient, and DDP would wait for them."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.train()


def position_limit(encoder) -> int:
    """How many tokens the position table holds; RoBERTa's starts behind the padding index."""
    config = encoder.config
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return config.max_position_embeddings - offset


class ResponseScorer(nn.Module):
    """Encoder applied to side A and side B, first-token vectors concatenated, MLP head -> logits (B, 3)."""

    GROUPS = 4  # sides are encoded in groups of similar length: padding costs as much as text

    def __init__(self, encoder, dropout=0.1, classes=3):
        super().__init__()
        h = encoder.config.hidden_size
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(2 * h, h), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(h, h // 2), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(h // 2, classes),
        )  # fmt: skip

    def forward(self, input_ids, lengths):
        """input_ids (2B, T): B rows of A, then B rows of B, padded; lengths: their 2B lengths, a list."""
        a, b = self.encode(input_ids, lengths).chunk(2)
        return self.head(torch.cat([a, b], dim=-1))

    def encode(self, input_ids, lengths):
        """First-token vectors (N, h), in the order given; the grouping changes no number but rounding."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = max(8, math.ceil(len(order) / self.GROUPS))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        first = [self._encode_group(input_ids[group], [lengths[i] for i in group]) for group in groups]
        return torch.cat(first)[torch.tensor(order, device=input_ids.device).argsort()]

    def _encode_group(self, input_ids, lengths):
        longest = max(lengths)
        ends = torch.tensor(lengths, device=input_ids.device).unsqueeze(1)
        mask = torch.arange(longest, device=input_ids.device) < ends  # by length, never by token id
        hidden = self.encoder(input_ids=input_ids[:, :longest], attention_mask=mask.long()).last_hidden_state
        return hidden[:, 0]


def count_parameters(model) -> tuple[int, int]:
    """(all, trainable)"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


# ------------------------------------------------------------------------------------------------------------
# 6. (LoRA comes with run_lora.py)  7. Optimisation
# ------------------------------------------------------------------------------------------------------------


def lr_at(cfg, step, total_steps) -> float:
    """Rate of step `step` (from 0) of `total_steps`: linear warm-up to cfg.lr, then cfg.schedule down to cfg.min_lr.

    cfg.warmup is a fraction of all steps; 0 and 1 are legal. The first warm-up step is lr / warm-up steps, not 0.
    """
    rising = round(cfg.warmup * total_steps)
    if step < rising:
        return cfg.lr * (step + 1) / rising
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - rising) / max(1, total_steps - rising)
    left = 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


def make_optimizer(model, optimizer, lr, weight_decay) -> torch.optim.Optimizer:
    """adamw (0.9/0.999, fused) or sgd (momentum 0.9) over what trains; matrices decay, biases and norms do not."""
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def sum_cross_entropy(logits, labels) -> torch.Tensor:
    """Summed, not averaged: whoever calls divides by the global count of targets. No target gives 0, never NaN."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE_INDEX, reduction="sum")


@dataclass
class Precision:
    """fp32 and fp64 run as they are; bf16 and fp16 under autocast, fp16 with a GradScaler."""

    dtype: str
    world: World

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.dtype == "fp16")

    def prepare(self, model):
        return model.to(self.world.device, torch.float64 if self.dtype == "fp64" else torch.float32)

    def autocast(self):
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype)
        return torch.autocast(self.world.device.type, dtype=half) if half else nullcontext()

    def warning(self) -> str | None:
        if self.world.device.type == "cpu" and self.dtype in ("bf16", "fp16"):
            native = self.dtype == "bf16" and "amx_bf16" in _cpu_flags()
            return (
                None
                if native
                else f"WARNING {self.dtype} has no fast path on this CPU: --dtype fp32 is faster"
            )


def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    return (
        next((line for line in path.read_text().splitlines() if line.startswith("flags")), "")
        if path.exists()
        else ""
    )


def scaled_backward(loss_sum, world, targets, precision):
    """Backward of a micro-batch's summed loss, so that the exchanged gradient is that of sum / global targets.

    DDP averages over ranks, hence the world size; targets == 0 (nothing to learn from) gives zero gradients.
    """
    precision.scaler.scale(loss_sum * (world.size / max(targets, 1))).backward()


def optimizer_step(optimizer, precision, clip, lr) -> float:
    """Unscale, clip to the global norm `clip` (none: do not), step at `lr`, zero. Returns the norm before clipping.

    The norm is read off the exchanged gradients, so all ranks see the same value. fp16 overflow skips the step and
    returns inf; otherwise a norm that is not finite raises FloatingPointError before any weight is touched.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    precision.scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(params, math.inf if clip is None else clip))
    if not math.isfinite(norm) and not precision.scaler.is_enabled():
        raise FloatingPointError(
            f"gradient norm is {norm}: try a lower lr, more warm-up, clipping, or dtype fp32"
        )
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ------------------------------------------------------------------------------------------------------------
# 8. Statistics
# ------------------------------------------------------------------------------------------------------------


def bootstrap(values, groups, *, samples=2000, seed=0) -> np.ndarray:
    """95 % percentile intervals (columns, 2) of the column means of `values` (rows, columns).

    Whole groups (prompts, documents) are redrawn, since rows of one group are not independent. A column of equal
    zeros or ones would get width 0: it gets the rule of three, 3 / number of groups.
    """
    values = np.asarray(values, dtype=np.float64)
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.zeros((index.max() + 1, values.shape[1] + 1))
    np.add.at(sums, index, np.c_[values, np.ones(len(values))])
    rng = np.random.default_rng(seed)
    draws = np.stack([sums[rng.integers(len(sums), size=len(sums))].sum(0) for _ in range(samples)])
    low, high = np.percentile(draws[:, :-1] / draws[:, -1:], [2.5, 97.5], axis=0)
    never, always = (values == 0).all(0), (values == 1).all(0)
    return np.stack(
        [np.where(always, 1 - 3 / len(sums), low), np.where(never, 3 / len(sums), high)], axis=1
    ).clip(min=np.where(never | always, 0, -np.inf)[:, None])


def classification_metrics(log_probs, labels, groups, prior, names) -> dict:
    """Log loss and accuracy with 95 % intervals by group, beside the uniform and the class-prior guess.

    log_probs (N, classes); prior: class shares of the training rows, (classes,) or one line per row. `alarm` is a
    sentence when nothing was learnt: always the same class, or a log loss not below the prior's.
    """
    labels, every = np.asarray(labels), np.arange(len(labels))
    log_probs = np.asarray(log_probs)
    prior = np.broadcast_to(np.clip(prior, 1e-12, None), log_probs.shape)
    chosen, loss, prior_loss = log_probs.argmax(1), -log_probs[every, labels], -np.log(prior[every, labels])
    intervals = bootstrap(np.c_[loss, chosen == labels, loss - prior_loss], groups)
    metrics = {
        "log_loss": float(loss.mean()),
        "log_loss_interval": intervals[0].tolist(),
        "accuracy": float((chosen == labels).mean()),
        "accuracy_interval": intervals[1].tolist(),
        "rows": len(labels),
        "uniform_log_loss": math.log(len(names)),
        "prior_log_loss": float(prior_loss.mean()),
        "prior_accuracy": float((labels == prior.argmax(1)).mean()),
        "below_prior_interval": intervals[2].tolist(),
        "predicted": dict(zip(names, shares(chosen, len(names)), strict=True)),
        "truth": dict(zip(names, shares(labels, len(names)), strict=True)),
    }
    return metrics | {"alarm": _alarm(metrics)}


def shares(labels, classes) -> list[float]:
    """How often each class occurs."""
    return (np.bincount(labels, minlength=classes) / len(labels)).tolist()


def _alarm(metrics) -> str | None:
    name, share = max(metrics["predicted"].items(), key=lambda item: item[1])
    if share == 1.0:
        return f"NOT LEARNING: every one of {metrics['rows']} rows is called '{name}'"
    if metrics["below_prior_interval"][1] >= 0:
        loss, prior = metrics["log_loss"], metrics["prior_log_loss"]
        return (
            f"NOT LEARNING: log loss {loss:.4f} is not below {prior:.4f}, the class shares' (95 % interval)"
        )
    return None


def plus_minus(value, interval, digits=3) -> str:
    """`0.473 ± 0.013`: half the interval's width; the interval itself is in result.json."""
    return f"{value:.{digits}f} ± {(interval[1] - interval[0]) / 2:.{digits}f}"


# ------------------------------------------------------------------------------------------------------------
# 9. Runs
# ------------------------------------------------------------------------------------------------------------

MAY_CHANGE = {  # what a resumed run may be told anew: length, cadence, bookkeeping, how it is computed
    *("epochs", "max_steps", "max_minutes", "eval_batch", "eval_every", "final_eval", "save_every", "keep"),
    *("log_every", "price_per_hour", "note", "out", "tag", "resume_timestamp", "resume_step", "backend"),
    *("micro_batch", "compile"),
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Run:
    """One run folder (DESIGN section 6): constants, log, metrics, checkpoints, signals, result.

    Use as a context manager. A Stop ends the body quietly as `stopped`; any other error is recorded as `failed` and
    goes on; a UserError before the first training step removes a folder that holds nothing yet.
    """

    def __init__(self, cfg, world, script):
        self.world, self.script, self.started = world, Path(script), time.time()
        if getattr(cfg, "batch", world.size) < world.size:
            raise UserError(
                f"batch {cfg.batch} is smaller than {world.size} ranks: "
                f"use --nproc_per_node={cfg.batch} or --batch {world.size} or more"
            )
        self._signal, self._training = None, False
        self._install_signals()
        plan = on_main(world, lambda: _plan(cfg, self.script))
        if plan.get("finished"):
            if world.is_main:
                print(f"{plan['folder']} is finished: nothing to do")
            sys.exit(0)
        self.folder, self.checkpoint = Path(plan["folder"]), plan["checkpoint"]
        self.cfg = dataclasses.replace(cfg, **plan["constants"])
        object.__setattr__(self.cfg, "typed", typed(cfg))
        self.position = plan["position"]  # what the checkpoint says beside tensors: step, fold, best, seconds
        self.resumed = plan["resumed"]
        self.train_seconds = self.position.get("train_seconds", 0.0)
        self.bests = self.position.get(
            "bests", {}
        )  # fold -> {"name", "step", "loss"} of its lowest validation loss
        self.fold, self.first_step, self._last_step = 0, 0, 0  # folds follow each other on one axis of steps
        self.result, self.clock_share, self.stopping, self.meter = {}, 0.0, None, Meter(world)
        self._log = self._metrics = self._tensorboard = None
        if world.is_main:
            self._open(cfg, plan)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and self._signal and issubclass(kind, RuntimeError):
            error, kind = Stop(f"signal {self._signal}, while another rank left"), Stop
        empty = not self.resumed and not self._training and not (self.folder / "checkpoints").exists()
        status = "finished" if kind is None else "stopped" if issubclass(kind, Stop) else "failed"
        if self.world.is_main:
            if kind is UserError and empty:
                self._close()
                shutil.rmtree(self.folder)
                return False
            self._write_result(status, error)
            self._close()
        self._restore_signals()
        return status == "stopped"

    # -- what the terminal, the log and the curves show ------------------------------------------------------

    def say(self, text):
        """One line (or several) to the terminal and log.txt, rank 0 only."""
        if not self.world.is_main:
            return
        self._log.write(text + "\n")
        self._log.flush()
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the terminal is gone (SSH lost, tmux killed): the run goes on, the log has the line
            sys.stdout = open(os.devnull, "w")

    def metrics(self, step, values):
        """Numbers of a step to metrics.jsonl and TensorBoard, rank 0 only."""
        if not self.world.is_main:
            return
        record = {"step": self.first_step + step, "time": time.time(), **values}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._to_tensorboard(record)

    def _to_tensorboard(self, record):
        for name, value in record.items():
            if name not in ("step", "time"):
                self._tensorboard.add_scalar(name, value, record["step"], walltime=record["time"])
        self._tensorboard.flush()

    # -- what all ranks decide together ----------------------------------------------------------------------

    def agree(self, targets=0) -> int:
        """The step's one small reduction: returns the global count of targets and settles stop and clock.

        Afterwards `stopping` says why all ranks must save and stop now (or None), and `clock_share` is the spent
        share of max_minutes, rank 0's, the same on all ranks.
        """
        self._step_began = time.perf_counter()
        minutes = getattr(self.cfg, "max_minutes", None)
        share = (
            self.train_seconds / (60 * minutes + 1e-9) if minutes is not None and self.world.is_main else 0.0
        )
        sums = torch.tensor([targets, bool(self._signal), share], dtype=torch.float64)
        targets, signalled, self.clock_share = all_reduce_sum(self.world, sums).tolist()
        self.stopping = (self._signal or "a signal to another rank") if signalled else None
        return int(targets)

    def poll(self):
        """For evaluation and other long work behind a checkpoint: raises Stop on all ranks at once."""
        self.agree()
        if self.stopping:
            raise Stop(self.stopping)

    def _install_signals(self):
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                self._before[number] = signal.signal(number, self._on_signal)

    def _restore_signals(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self._signal:
            os.write(2, b"second signal: out at once, the newest checkpoint stands\n")
            os._exit(1)
        self._signal = signal.Signals(number).name
        if not self._training:  # nothing to save yet: leave from wherever this is
            raise Stop(f"signal {self._signal} before training")

    # -- checkpoints -----------------------------------------------------------------------------------------

    def save(self, step, model, optimizer, precision, must=False):
        """checkpoints/step_…: weights, optimizer, position; whole or not at all; once per step. All ranks call it.

        Too little disk is a warning that is repeated at every save, an error where it `must` succeed.
        """
        self._last_step = self.first_step + step
        name = _step_name(self._last_step)
        if self.checkpoint == name:
            return
        position = {"step": self._last_step, "fold": self.fold, "first_step": self.first_step}
        position |= {"train_seconds": self.train_seconds, "bests": self.bests, "sums": self.meter.sums()}
        tensors = {"optimizer": optimizer.state_dict(), "scaler": precision.scaler.state_dict()}
        if on_main(self.world, lambda: self._save(name, model, tensors, position, must)):
            self.checkpoint = name

    def save_best(self, step, loss, model) -> bool:
        """Weights only, beside the checkpoints, when `loss` is the fold's lowest so far. Returns whether it is."""
        step, key = self.first_step + step, str(self.fold)
        if key in self.bests and loss >= self.bests[key]["loss"]:
            return False
        best = {"name": f"best_{_step_name(step)}", "step": step, "loss": loss}
        bests = self.bests | {key: best}
        if on_main(
            self.world, lambda: self._save(best["name"], model, {}, {"step": step, "bests": bests}, False)
        ):
            self.bests = bests
        return True

    def load(self, model, optimizer, precision, fold=0) -> int:
        """Begins a fold: its step 0, or the step this run resumes at with all state restored. Before DDP, all ranks."""
        self.fold, self.meter = fold, Meter(self.world, self.position.get("sums", (0, 0)))
        if not self.position or self.position["fold"] != fold:
            self.first_step, self.meter = self._last_step, Meter(self.world)
            return 0
        self.first_step, self._last_step = self.position["first_step"], self.position["step"]
        folder = self.folder / "checkpoints" / self.checkpoint
        load_weights(folder, model)
        tensors = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(tensors["optimizer"])
        if precision.scaler.is_enabled():
            precision.scaler.load_state_dict(tensors["scaler"])
        return self._last_step - self.first_step

    def load_best(self, model):
        """The fold's best weights so far, if any were saved."""
        if best := self.bests.get(str(self.fold)):
            load_weights(self.folder / "checkpoints" / best["name"], model)

    def _save(self, name, model, extra, position, must) -> bool:
        import safetensors.torch

        checkpoints = self.folder / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        needed = 1.05 * (_tensor_bytes(weights) + _tensor_bytes(extra)) + 1e6
        free = shutil.disk_usage(checkpoints).free
        if free < needed:
            line = f"{name} needs {needed / 1e6:.0f} MB, {checkpoints} has {free / 1e6:.0f} MB free"
            if must:
                raise UserError(
                    f"not saved: {line}: free some, then --resume_timestamp {self.folder.name[:15]}"
                )
            self.say(
                f"WARNING not saved: {line}; training goes on, the newest checkpoint is {self.checkpoint}"
            )
            return False
        began = time.perf_counter()
        with written_aside(checkpoints / name) as aside:
            safetensors.torch.save_file(weights, aside / "model.safetensors")
            if extra:
                torch.save(extra, aside / "state.pt")
            position = position | {"metrics_bytes": self._metrics.tell()}
            write_manifest(aside, position)
        self.save_seconds = time.perf_counter() - began
        self._prune(name, position)
        return True

    def _prune(self, newest, position):
        """Keeps the last `keep` checkpoints up to this one, and every best that one of them or this one names."""
        checkpoints = self.folder / "checkpoints"
        if newest.startswith("step_"):  # later ones belong to a future that --resume_step went back from
            steps = sorted(checkpoints.glob("step_*"))
            kept = [path for path in steps if path.name <= newest][-self.cfg.keep :]
            for path in set(steps) - set(kept):
                _remove_checkpoint(path)
        manifests = [position, *filter(None, map(read_manifest, checkpoints.glob("step_*")))]
        named = {best["name"] for manifest in manifests for best in manifest["bests"].values()}
        for path in checkpoints.glob("best_*"):
            if path.name not in named:
                _remove_checkpoint(path)

    # -- time ------------------------------------------------------------------------------------------------

    def step_done(self, loss_sum, targets, examples):
        """Counts a step: its loss for the next log line, its time for max_minutes, which knows training steps only."""
        seconds = time.perf_counter() - self._step_began
        self.train_seconds += seconds
        self.meter.add(loss_sum, targets, examples, seconds)

    def schedule_length(self, step, total_steps) -> int:
        """Steps the schedule should span: `total_steps`, or fewer where the clock will end the run earlier."""
        if not self.clock_share:
            return total_steps
        return min(total_steps, max(step + 1, round(step / self.clock_share)))

    def log_training(self, where, step, total_steps, values):
        """The line every script prints each log_every steps, and the same numbers to metrics.jsonl and TensorBoard."""
        loss, rate, seconds_per_step = self.meter.read()
        values = {"train/loss": loss, **values, "examples_per_second": rate}
        self.say(
            f"{where}  step {step:{len(str(total_steps))}}/{total_steps}  loss {loss:.4f}  lr {values['lr']:.1e}  "
            f"grad {values['grad_norm']:.2f}  {rate:.0f}/s  eta {clock((total_steps - step) * seconds_per_step)}"
        )
        self.metrics(step, values)

    def forecast(self, model, optimizer, steps, seconds, typical):
        """From the worst-case step: memory, time, disk, money. `typical`: an average step's share of its length.

        Called with nothing else on the disk yet, it refuses a disk that cannot hold the checkpoints.
        """
        total, trainable = count_parameters(model)
        adam = 0 if optimizer.state else 8 * trainable
        checkpoint_mb = 4 * (total + 2 * trainable) / 1e6
        disk_mb = (self.cfg.keep + 1) * checkpoint_mb + 8 * total / 1e6
        free_mb = shutil.disk_usage(self.folder).free / 1e6
        if not self.resumed and free_mb < disk_mb:
            raise UserError(
                f"checkpoints need {disk_mb:.0f} MB, {self.folder} has {free_mb:.0f} MB free: free some"
            )
        minutes = steps * seconds * typical / 60
        memory = (peak_memory_mb(self.world) + adam / 1e6) / 1e3
        price = getattr(self.cfg, "price_per_hour", None)
        dollars = f"  ${price * minutes / 60:.2f}" if price else ""
        self.say(
            f"forecast  {steps} steps  training {clock(60 * minutes)}  memory {memory:.2f} GB  "
            f"disk {disk_mb:.0f} MB{dollars}"
        )
        if (
            "TORCHELASTIC_RUN_ID" in os.environ and checkpoint_mb > 5000
        ):  # at some 300 MB/s written and hashed
            self.say(
                "a save takes over 15 s: give torchrun --shutdown-timeout 300, or it kills one after 30 s"
            )

    def pin(self, name, value):
        """Notes a fact (a fingerprint) in config.json; a resume that finds another value is refused."""
        stored = read_config(self.folder).get("facts", {}).get(name, value)
        if stored != value:
            raise UserError(f"{name} is not what {self.folder} began with: start a new run")
        if self.world.is_main:
            config = read_config(self.folder)
            write_json(
                self.folder / "config.json", config | {"facts": config.get("facts", {}) | {name: value}}
            )

    # -- opening and closing ---------------------------------------------------------------------------------

    def training_begins(self):
        """From here on a signal waits for the next step's agreement, so that nothing computed is lost."""
        self._training = True

    def _open(self, cfg, plan):
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder
        (folder / "result.json").unlink(missing_ok=True)
        self._log = open(folder / "log.txt", "a")
        path = folder / "metrics.jsonl"
        path.touch()
        os.truncate(path, min(path.stat().st_size, self.position.get("metrics_bytes", 0)))
        self._metrics = open(path, "a")
        shutil.rmtree(folder / "tb", ignore_errors=True)
        # metrics.jsonl is the truth: TensorBoard's file is written anew from it, so no resume forks a curve;
        # purge_step=0 tells a TensorBoard that is watching to forget the old file
        self._tensorboard = SummaryWriter(folder / "tb", purge_step=0)
        for line in path.read_text().splitlines():
            self._to_tensorboard(json.loads(line))
        if not self.resumed:
            _copy_source(self.script, folder / "source")
            write_json(folder / "config.json", provenance(self.cfg, self.world))
        else:
            _note_resume(folder, self.cfg, self.world, self.position)
        w, c = self.world, self.cfg
        ranks = f"{w.size} rank{'s' * (w.size > 1)} {w.device.type if w.size == 1 else w.backend} {c.dtype}"
        share = f"{c.batch} = {w.size} x {c.batch / w.size:g}"
        self.say(f"{self.script.stem}  {ranks}  batch {share}  {folder}")
        for line in plan["lines"]:
            self.say(line)

    def _write_result(self, status, error):
        last = {"finished": "", "stopped": str(error), "failed": f"{type(error).__name__}: {error}"}[status]
        result = {"status": status, "why": last, "script": self.script.stem, "checkpoint": self.checkpoint}
        result |= {"seconds": time.time() - self.started, "train_seconds": self.train_seconds}
        result |= {"peak_memory_mb": peak_memory_mb(self.world), **self.result}
        write_json(self.folder / "result.json", result)
        self.result = result
        if status != "finished":
            where = f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint yet"
            self.say(f"{status}  {' '.join(last.split())}; {where}   next: the same command with")
            self.say(f"  --resume_timestamp {self.folder.name[:15]}")

    def _close(self):
        for stream in (self._log, self._metrics, self._tensorboard):
            if stream:
                stream.close()


def joint_hash(hashes) -> str:
    """One hash for the models of all folds; a single model keeps its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _step_name(step) -> str:
    return f"step_{step:08d}"


def write_json(path, content):
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def write_manifest(folder, position):
    """manifest.json: the position, SHA-256 of each file, and of itself; written last."""
    content = dict(position) | {"files": {path.name: _sha256(path) for path in sorted(folder.iterdir())}}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    write_json(folder / "manifest.json", content | {"manifest": digest})


def read_manifest(folder) -> dict | None:
    """The position of a checkpoint, or None if manifest.json is absent or was damaged."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
        digest = content.pop("manifest")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return (
        content
        if digest == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        else None
    )


def broken(folder) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is there and hashes as written."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "manifest.json is absent or damaged"
    for name, digest in manifest["files"].items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def load_weights(folder, model):
    """model.safetensors of a checkpoint into `model`, every name matched. Executes nothing."""
    import safetensors.torch

    model.load_state_dict(safetensors.torch.load_file(Path(folder) / "model.safetensors"), strict=True)


def _remove_checkpoint(path):
    (path / "manifest.json").unlink(
        missing_ok=True
    )  # first: a kill in between leaves an incomplete one, not a trap
    shutil.rmtree(path)


def _tensor_bytes(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(_tensor_bytes(value) for value in values)


def weights_sha256(model) -> str:
    """SHA-256 over the weights in name order: two runs ended in the same place or they did not."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Which folder, which checkpoint, which constants


def _plan(cfg, script) -> dict:
    """Rank 0's decision, as JSON: a new folder, or one to resume with its checkpoint, position and constants."""
    out = Path(cfg.out or f"runs/{'smoke/' if typed(cfg).smoke else ''}{script.stem}")
    folder = _resume_folder(cfg, out)
    constants, lines = dataclasses.asdict(cfg), _override_lines(cfg)
    plan = {
        "constants": constants,
        "lines": lines,
        "checkpoint": None,
        "position": {},
        "resumed": bool(folder),
    }
    if not folder:
        return plan | {"folder": str(_new_folder(out, cfg.tag))}
    if cfg.resume_timestamp == "auto" and _status(folder) == "finished":
        return {"folder": str(folder), "finished": True}
    stored = read_config(folder)["constants"]
    if clash := _contradictions(cfg, stored):
        raise UserError(f"{folder} ran with {'; '.join(clash)}: drop these flags, or start a new run")
    for name in sorted(set(stored) & set(constants)):
        if name not in MAY_CHANGE and stored[name] != constants[name]:
            lines.append(
                f"resumed constant {name} = {stored[name]!r} (the script now says {constants[name]!r})"
            )
    plan["constants"] = {
        n: constants[n] if n in MAY_CHANGE or n not in stored else stored[n] for n in constants
    }
    name, notes = _choose_checkpoint(folder / "checkpoints", cfg.resume_step)
    position = read_manifest(folder / "checkpoints" / name) if name else {}
    where = f"from {name}" if name else "from step 0: it has no checkpoint yet"
    return plan | {
        "folder": str(folder),
        "checkpoint": name,
        "position": position,
        "lines": [*notes, f"resumes {folder.name} {where}", *lines],
    }


def _override_lines(cfg) -> list[str]:
    what = " and ".join(
        filter(None, [typed(cfg).preset and f"preset {typed(cfg).preset}", "smoke" * typed(cfg).smoke])
    )
    words = [f"{name} {value}" for name, value in typed(cfg).overrides.items()]
    lines, line = [], f"{what} set:"
    for word in words:
        if len(line) + len(word) > 97:
            lines, line = [*lines, line], " "
        line += f" {word},"
    return [*lines, line.rstrip(",")] if words else []


def _new_folder(out, tag) -> Path:
    while True:
        folder = out / f"{datetime.datetime.now():%Y%m%d_%H%M%S}{f'-{tag}' if tag else ''}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not out.is_dir():
                raise UserError(f"out {out} is a file: use a folder") from None
            time.sleep(0.2)  # another run started in this second
        except OSError as error:
            raise UserError(f"out {out} cannot be written ({error.strerror}): use another --out") from None


def _resume_folder(cfg, out) -> Path | None:
    """The run to resume, None for a new one. UserError if a resume was asked for and there is none."""
    wanted, tag = cfg.resume_timestamp, f"-{cfg.tag}" if cfg.tag else ""
    runs = sorted(path.parent for path in out.glob("*/config.json")) if out.is_dir() else []
    launcher = _launcher()
    if wanted is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:  # torchrun --max-restarts
        mine = [run for run in runs if read_config(run).get("launcher") == launcher]
        return mine[-1] if mine else None
    if wanted is None:
        if cfg.resume_step is not None:
            raise UserError(f"--resume_step {cfg.resume_step} needs --resume_timestamp")
        return None
    if wanted not in ("auto", "latest"):
        found = [run for run in runs if run.name == f"{wanted}{tag}"] or [
            r for r in runs if r.name[:15] == wanted[:15]
        ]
        if len(found) != 1:
            near = ", ".join(run.name for run in (found or runs)[-3:]) or "none"
            raise UserError(f"--resume_timestamp {wanted}: {len(found)} such runs in {out}; there: {near}")
        return found[0]
    same = [
        run for run in runs if run.name[15:] == tag and read_config(run)["script"] == Path(sys.argv[0]).stem
    ]
    if wanted == "auto":
        same = [run for run in same if not _contradictions(cfg, read_config(run)["constants"])]
        return same[-1] if same else None
    unfinished = [run for run in same if _status(run) != "finished"]
    if not unfinished:
        raise UserError(
            f"--resume_timestamp latest: no unfinished run{tag and f' with tag {cfg.tag}'} in {out}"
        )
    return unfinished[-1]


def _contradictions(cfg, stored) -> list[str]:
    names = sorted((typed(cfg).flags - MAY_CHANGE) & set(stored))
    return [f"--{n} {stored[n]}, not {getattr(cfg, n)}" for n in names if stored[n] != getattr(cfg, n)]


def _choose_checkpoint(checkpoints, step=None) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint (or that of `step`), and a line for each broken one passed over."""
    names = sorted(path.name for path in checkpoints.glob("step_*")) if checkpoints.is_dir() else []
    if step is not None and _step_name(step) not in names:
        raise UserError(
            f"--resume_step {step}: there are {', '.join(names) or 'no checkpoints'} in {checkpoints}"
        )
    lines = []
    for name in reversed(names if step is None else [_step_name(step)]):
        reason = broken(checkpoints / name)
        if reason is None:
            return name, lines
        lines.append(f"checkpoint {name} is broken ({reason}): the one before it is used")
    if lines:
        raise UserError(f"no checkpoint in {checkpoints} is whole: {lines[0]}; start a new run")
    return None, lines


def read_config(folder) -> dict:
    """config.json of a run folder: constants, provenance, resumes."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} is no run folder: its config.json cannot be read") from None


def _status(folder) -> str:
    path = folder / "result.json"
    return json.loads(path.read_text())["status"] if path.exists() else "running or killed"


# Provenance


def provenance(cfg, world) -> dict:
    """config.json: every constant, the command line, and what the numbers depend on beside them."""
    import transformers

    return {
        "script": Path(sys.argv[0]).stem,
        "constants": dataclasses.asdict(cfg),
        "preset": typed(cfg).preset,
        "smoke": typed(cfg).smoke,
        "command": " ".join(sys.argv),
        "world_size": world.size,
        "device": torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, np)},
        },
        "git": git_state(),
        "launcher": _launcher(),
        "host": socket.gethostname(),
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "resumes": [],
    }


def git_state() -> dict:
    """Commit and uncommitted diff of the project, since constants are edited in place; empty outside git."""

    def git(*args):
        done = subprocess.run(["git", "-C", str(PROJECT), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") if shutil.which("git") else ""
    return (
        {"commit": commit, "dirty": git("status", "--porcelain"), "diff": git("diff", "HEAD")}
        if commit
        else {}
    )


def _launcher() -> str | None:
    """The torchrun that started this process: it lives on while it restarts its workers."""
    return f"{socket.gethostname()}/{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def _note_resume(folder, cfg, world, position):
    config = read_config(folder)
    config["resumes"].append(
        {"started": datetime.datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
        | {"step": position.get("step", 0), "world_size": world.size, "constants": dataclasses.asdict(cfg)}
    )
    write_json(folder / "config.json", config | {"launcher": _launcher()})


def _copy_source(script, folder):
    folder.mkdir(exist_ok=True)
    for path in (script, PROJECT / "core.py", PROJECT / "gpt_scratch.py"):
        if path.exists():
            shutil.copy(path, folder)


# Memory, rate, forecast


class Meter:
    """Loss, targets and time since the last log line; the sums travel in checkpoints, so that no curve forks."""

    def __init__(self, world, sums=(0.0, 0)):
        self.world, self.steps, self.examples, self.seconds, self.targets = world, 0, 0, 0.0, sums[1]
        loss = float(sums[0]) if world.is_main else 0.0  # the restored sum is global: one rank carries it
        self.loss = torch.tensor(loss, dtype=torch.float64, device=world.device)

    def add(self, loss_sum, targets, examples, seconds):
        """This rank's summed loss (a tensor, so nothing waits for the device); global targets and examples."""
        self.loss += loss_sum.detach()
        self.targets += targets
        self.steps, self.examples, self.seconds = (
            self.steps + 1,
            self.examples + examples,
            self.seconds + seconds,
        )

    def sums(self) -> list:
        """[global loss sum, targets]; every rank calls it."""
        return [all_reduce_sum(self.world, self.loss.cpu().clone()).item(), self.targets]

    def read(self) -> tuple[float, float, float]:
        """(mean loss per target, examples per second, seconds per step) since the last reading; starts anew."""
        loss, targets = self.sums()
        rates = self.examples / max(self.seconds, 1e-9), self.seconds / max(self.steps, 1)
        self.__init__(self.world)
        return loss / max(targets, 1), *rates


def peak_memory_mb(world) -> float:
    """Peak so far: allocated on the GPU, or resident on the CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 1e3 if sys.platform != "darwin" else kilobytes / 1e6


def clock(seconds) -> str:
    """3723 -> `1:02:03`"""
    return str(datetime.timedelta(seconds=round(seconds)))


def worst_case(world, model, step, optimizer, rows) -> float:
    """Two discarded steps, `step()` being forward and backward of `rows` longest rows: the second's seconds.

    The first exchanges nothing, so that running out of memory on one rank is agreed on by all; the second makes DDP
    settle its buckets, without which a resumed run on 3 and more ranks would add in another order.
    """
    failed = torch.zeros(1)
    try:
        with model.no_sync() if hasattr(model, "no_sync") else nullcontext():
            step()
    except torch.OutOfMemoryError:
        failed += 1
    optimizer.zero_grad(set_to_none=True)
    if all_reduce_sum(world, failed).item():
        better = max(1, rows // 2)
        raise UserError(f"out of memory with {rows} of the longest rows at once: use --micro_batch {better}")
    began = time.perf_counter()
    step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    missing = [n for n, p in unwrap(model).named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise RuntimeError(
            f"{len(missing)} trainable parameters get no gradient, e.g. {missing[0]}: freeze them"
        )
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def unwrap(model) -> nn.Module:
    """The module inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
