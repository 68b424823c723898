"""Which rows stand in which batch: a pure function of (seed, epoch, step), cut by rank and micro-batch."""

import gc
import hashlib
import itertools
import math
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from lab.errors import OutOfMemory, UserError
from lab.train.fsdp import Sharded
from lab.train.precision import Precision
from lab.train.processes import all_reduce_sum, progress

OVERHEAD = 128  # tokens that could be computed while a forward and backward is started (two cores, GPT-2)


def micro_batches(model, rows, size=None, lengths=None, most=math.inf):
    """Yields the parts of `rows` that `cut` makes, in_turn."""
    yield from in_turn(model, cut(rows, size, lengths, most))


def in_turn(model, parts):
    """Yields the parts of a step. Ranks exchange gradients in the last backward only; with --shard full in
    each, so that all make as many: some repeat their last part."""
    for n, part in enumerate(model.in_step(parts) if isinstance(model, Sharded) else parts, start=1):
        with exchanging(model, n == len(parts)):
            yield part


def exchanging(model, exchanges):
    """Context of a forward and backward in which ranks exchange their gradients, or do not."""
    return nullcontext() if exchanges or not isinstance(model, DistributedDataParallel) else model.no_sync()


def cut(rows, size=None, lengths=None, most=math.inf) -> list[list]:
    """Parts of `rows`, `size` each (none: all at once). With `lengths`, rows of similar length share a part,
    and none means length_groups(lengths, most)."""
    if lengths is not None:
        order = np.argsort(-np.asarray(lengths), kind="stable")  # longest first: memory fails early
        rows, lengths = [rows[i] for i in order], [int(lengths[i]) for i in order]
    sizes = length_groups(lengths, most) if lengths and not size else _equal(len(rows), size or len(rows))
    return [rows[end - n : end] for end, n in zip(itertools.accumulate(sizes), sizes, strict=True)]


def _equal(n, size) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)] if n else []


def length_groups(lengths, most, overhead=OVERHEAD) -> list[int]:
    """Splits rows of falling `lengths` into groups, each padded to its longest row; returns the group sizes.

    Minimises padded tokens plus `overhead` tokens per group; a group of several rows has at most `most`
    tokens. Exact, by dynamic programming over where the last group begins.
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
    """Seeds torch from (seed, step, rank, ...): randomness depends on the position
    only, no state is stored."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class ShardedBatches:
    """Row numbers of every global batch, a pure function of (seed, epoch, step); rank
    r takes every size-th row.

    With a seed (training): reshuffled each epoch, the incomplete last batch left out; rows are sorted by
    length within blocks of `block` batches, and these batches are shuffled. Without a seed (evaluation):
    every row exactly once, longest first.
    """

    def __init__(self, lengths, batch, world, *, seed=None, block=50):
        self.lengths, self.batch = np.asarray(lengths), batch
        self.world, self.seed, self.block = world, seed, block
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
        """Rows of optimizer step `step`, which counts from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return self._order[position * self.batch : (position + 1) * self.batch]

    def rank_batch(self, step) -> list[int]:
        """This rank's share of global batch `step`; shares may differ by one row, and be empty."""
        return self.global_batch(step)[self.world.rank :: self.world.size].tolist()

    def longest(self) -> np.ndarray:
        """All rows, longest first."""
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


def worst_case(world, micro_batches, step, optimizer, rows, fits) -> float:
    """Makes two discarded steps of the longest rows; `step()` is forward and backward, `fits()` whether there
    is memory for what comes later. Returns the seconds of one. Where they do not fit, micro_batches is
    halved, if it may be, until they do; UserError if one row does not.

    The first exchanges no gradients, so that all ranks can agree if one runs out of memory; the second makes
    DDP settle its buckets: otherwise a resumed run on 3 or more ranks would sum in another order.
    """
    model = micro_batches.model
    failed, tight = _shortage(world, model, step, optimizer, fits)
    while (failed or tight) and micro_batches.halve(rows):
        forget_freed_memory(world)
        failed, tight = _shortage(world, model, step, optimizer, fits)
    if failed:  # what is only tight is the forecast's to refuse
        n = micro_batches.at_once(rows)
        better = f"--micro_batch {n // 2}" if n > 1 else "shorter rows or a smaller model"
        raise UserError(f"out of memory with {n} of the longest rows at once: use {better}")
    _wait_for(world.device)  # the first step's backward may be on its way
    began = time.perf_counter()
    step()
    _wait_for(world.device)
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise RuntimeError(f"{len(idle)} trainable parameters get no gradient, e.g. {idle[0]}: freeze them")
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def _wait_for(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _shortage(world, model, step, optimizer, fits) -> list[int]:
    """On how many ranks a step, without an exchange of gradients, ran out of memory, and what comes later
    will."""
    with exchanging(model, False):
        if failed := runs_out_of_memory(step):
            gc.collect()  # closes in_turn here, or it would leave DDP without its exchange
    if failed and isinstance(model, Sharded):  # the others wait inside the forward: torchrun ends them
        raise UserError("out of memory with --shard full: use a smaller --micro_batch")
    optimizer.zero_grad(set_to_none=True)
    return all_reduce_sum(world, torch.tensor([failed, not fits()], dtype=torch.int64)).tolist()


def runs_out_of_memory(step) -> bool:
    """Calls `step()`; says whether there was too little memory for it."""
    try:
        step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


def forget_freed_memory(world):
    """Gives what an attempt has left back to the accelerator, and measures its peak anew."""
    if world.device.type != "cpu":
        gc.collect()  # an error's frames hold tensors
        getattr(torch, world.device.type).empty_cache()
        getattr(torch, world.device.type).reset_peak_memory_stats()


def is_out_of_memory(error) -> bool:
    """Whether an error says so: torch's own, that of a CPU's allocator, or that of cuBLAS."""
    words = ("allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def within_memory(rows, tokens):
    """Context of a forward pass in which running out of memory is one line on what would help."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = f"out of memory with {rows} rows of {tokens} tokens at once"
        raise OutOfMemory(f"{size}: use a smaller --eval_batch, or shorter rows (text: --context)") from None


def each_once(compute, out, data, rows, cfg, world, poll, what):
    """Sets out[i] = compute(rows[i]), each row once, on one rank; every rank gets the whole `out`."""
    precision = Precision(cfg.dtype, world)
    lengths = data.lengths[rows].sum(1)
    batches = ShardedBatches(lengths, cfg.eval_batch, world)
    with progress(len(batches), what, world) as bar, torch.no_grad():
        for step in range(len(batches)):
            poll()
            if mine := batches.rank_batch(step):
                with precision.autocast(), within_memory(len(mine), lengths[mine].max()):
                    values = compute(rows[mine])
                out[mine] = values.to("cpu", out.dtype)
            bar.update()
    return all_reduce_sum(world, out)  # the others hold zeros: a sum is a gather
