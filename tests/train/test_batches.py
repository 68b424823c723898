"""Batches and micro-batches: every row once, a pure function of seed and step, fewest padded tokens."""

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch

import core
from core import UserError, World


def test_micro_batches_cover_the_rows():
    model = torch.nn.Linear(1, 1)
    assert list(core.micro_batches(model, [1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(core.micro_batches(model, [1, 2, 3])) == [[1, 2, 3]]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [23, 24, 25])
def test_every_row_is_met_once_whatever_the_ranks(size, n):
    lengths = np.random.default_rng(n).integers(1, 50, n)
    worlds = [World(rank=rank, size=size) for rank in range(size)]
    training = [core.ShardedBatches(lengths, 4, world, seed=1, block=2) for world in worlds]
    evaluation = [core.ShardedBatches(lengths, 4, world) for world in worlds]
    for epoch in (0, 3):
        steps = range(epoch * (n // 4), (epoch + 1) * (n // 4))
        met = [row for step in steps for batches in training for row in batches.rank_batch(step)]
        assert len(met) == len(set(met)) == n // 4 * 4
    met = [
        row
        for step in range(len(evaluation[0]))
        for batches in evaluation
        for row in batches.rank_batch(step)
    ]
    assert sorted(met) == list(range(n))


def test_a_batch_depends_on_seed_and_step_only_and_holds_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 500, 640)
    first, again = (core.ShardedBatches(lengths, 8, World(), seed=3) for _ in range(2))
    assert first.global_batch(93).tolist() == again.global_batch(93).tolist()
    assert sorted(first.global_batch(5)) != sorted(first.global_batch(5 + 80))  # another epoch
    spread = np.mean([np.ptp(lengths[first.global_batch(step)]) for step in range(80)])
    assert spread < 0.1 * np.ptp(lengths)
    other = core.ShardedBatches(lengths, 8, World(), seed=4)
    assert first.global_batch(0).tolist() != other.global_batch(0).tolist()


TOO_MUCH = [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: you tried to allocate")]


@pytest.mark.parametrize("error", TOO_MUCH)
def test_running_out_of_memory_names_the_micro_batch_to_try(error):
    model = torch.nn.Linear(1, 1)
    fixed = SimpleNamespace(model=model, at_once=lambda rows: 32, halve=lambda rows: False)

    def step():
        raise error

    given = World(), fixed, step, torch.optim.SGD(model.parameters()), [], lambda: True
    with pytest.raises(UserError, match="with 32 of the longest rows at once: use --micro_batch 16"):
        core.worst_case(*given)
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        core.worst_case(*given)


def set_partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in set_partitions(rest):
        yield [[first], *partition]
        for i, part in enumerate(partition):
            yield [*partition[:i], [first, *part], *partition[i + 1 :]]


def test_length_groups_are_the_cheapest_of_all_partitions_that_hold_few_enough_tokens():
    rng = np.random.default_rng(0)
    seen = Counter()
    for case in range(80):
        n, overhead = 1 + case % 7 + (case == 7), int(rng.choice([0, 1, 5, 20, 100]))
        lengths = sorted(rng.integers(1, 60, n).tolist(), reverse=True)
        most = int(rng.integers(30, 120)) if case % 2 else math.inf  # a row alone may be longer
        sizes = core.length_groups(lengths, most, overhead)
        ends = list(itertools.accumulate(sizes))
        assert ends[-1] == n and min(sizes) >= 1
        tokens = [size * lengths[end - size] for size, end in zip(sizes, ends, strict=True)]
        assert all(size == 1 or held <= most for size, held in zip(sizes, tokens, strict=True))
        legal = [
            [len(part) * max(part) for part in parts]
            for parts in set_partitions(lengths)
            if all(len(part) == 1 or len(part) * max(part) <= most for part in parts)
        ]
        assert sum(tokens) + len(sizes) * overhead == min(sum(p) + len(p) * overhead for p in legal), case
        seen[len(sizes)] += 1
        seen["bound"] += sizes != core.length_groups(lengths, math.inf, overhead)
    assert {1, 2, 3} <= set(seen) and seen["bound"] >= 5
    assert core.length_groups([], 100) == []


@pytest.mark.parametrize("size", [None, 3, 20])
def test_micro_batches_cover_every_row_once_longest_first(size):
    model = SimpleNamespace()  # no no_sync: nothing is exchanged
    rows = list(range(100, 113))
    lengths = dict(zip(rows, np.random.default_rng(1).permutation(13) * 40 + 5, strict=True))
    parts = list(core.micro_batches(model, rows, size, [lengths[row] for row in rows]))
    order = list(itertools.chain(*parts))
    assert sorted(order) == rows and [lengths[r] for r in order] == sorted(lengths.values(), reverse=True)
    falling = sorted(map(int, lengths.values()), reverse=True)
    expected = core.length_groups(falling, math.inf) if size is None else {3: [3, 3, 3, 3, 1], 20: [13]}[size]
    assert [len(part) for part in parts] == expected and (size or len(parts) > 1)
    assert list(core.micro_batches(model, rows, 5)) == [rows[:5], rows[5:10], rows[10:]]
    assert list(core.micro_batches(model, [], None, [])) == []


def test_micro_batches_hold_no_more_tokens_than_they_may_unless_a_size_is_given():
    lengths, model = [40] * 6 + [10] * 6, SimpleNamespace()
    tokens = [[lengths[row] for row in part] for part in core.micro_batches(model, range(12), None, lengths)]
    assert tokens == [[40] * 6, [10] * 6]  # padding six rows to 40 tokens costs more than a group
    tokens = [
        [lengths[row] for row in part] for part in core.micro_batches(model, range(12), None, lengths, 120)
    ]
    assert tokens == [[40] * 3, [40] * 3, [10] * 6]
    assert [len(part) for part in core.micro_batches(model, range(12), 12, lengths, 120)] == [12]


@pytest.mark.parametrize("error", TOO_MUCH)
def test_measuring_rows_that_do_not_fit_says_what_would_help_and_other_faults_stay(error):
    def compute(rows):
        raise error

    data = SimpleNamespace(lengths=np.array([[1, 2], [3, 4], [5, 60]]))
    cfg = SimpleNamespace(dtype="fp32", eval_batch=2)
    arguments = (torch.zeros(2), data, np.array([1, 2]), cfg, World(), int, "evaluating")
    line = "out of memory with 2 rows of 65 tokens at once: use a smaller --eval_batch"
    with pytest.raises(UserError, match=line):
        core.each_once(compute, *arguments)
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        core.each_once(compute, *arguments)


SHORT = """
import dataclasses, os
from types import SimpleNamespace
import torch
import core

@dataclasses.dataclass(frozen=True)
class Config(core.Constants):
    out: str = ""  # where runs go
    backend: str = "auto"  # of the exchange

class Model(torch.nn.Module):
    def __init__(self, room):
        super().__init__()
        self.weight, self.room, self.seen = torch.nn.Parameter(torch.ones(1)), room, []

    def forward(self, rows):
        self.seen.append(len(rows))
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (self.weight * rows).sum()

def main(cfg, world):
    model = Model(room=8 if world.is_main else 3)
    ddp, precision = core.wrap_ddp(model, world), core.Precision("fp32", world)
    run = SimpleNamespace(cfg=SimpleNamespace(micro_batch=None), world=world, rows_ahead=[])
    parts = core.MicroBatches(run, ddp, lambda part, device: torch.tensor(part))

    def step():
        for _, batch in parts(range(8)):
            core.scaled_backward(ddp(batch), world, 1, precision)
        seen.append(float(model.weight.grad))

    seen = []
    core.worst_case(world, parts, step, torch.optim.SGD(model.parameters()), range(8), lambda: True)
    os.write(1, f"rank {world.rank} {model.seen} {parts.found[1:]} {seen}\\n".encode())
"""


def test_two_ranks_of_which_one_has_less_memory_agree_on_the_smaller_parts(tmp_path, monkeypatch):
    """The last step is exchanged: both ranks have the sum of both, 28 + 28."""
    (tmp_path / "short.py").write_text(SHORT)
    monkeypatch.syspath_prepend(tmp_path)
    assert ranks.launch("short", size=2) == [0, 0], Path("out.txt").read_text()
    first, second = sorted(Path("out.txt").read_text().splitlines())
    assert first == f"rank 0 {[8, 4, 4, *[2] * 8]} (8, 2) [56.0, 56.0, 56.0, 56.0]"
    assert second == f"rank 1 {[8, 4, *[2] * 8]} (8, 2) [56.0, 56.0]"
