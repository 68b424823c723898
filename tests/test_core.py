"""core.py's verbs against references and formulas with known answers, in core's order."""

import csv
import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from typing import Literal

import half_head
import numpy as np
import pytest
import torch
from ranks import SCRIPTS
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import core
from core import UserError, World
from lab.data import cache, tables
from lab.models import encoders


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "big-bert"  # 100 % of it
    batch: int = 32
    lr: float = 1e-3
    clip: float | None = 1.0
    compile: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    tag: str | None = None


PRESETS = {"fast": {"lr": 1, "model": "roberta-base"}}
SMOKE = {"batch": 4, "model": encoders.tiny}


def parse(*argv, presets=PRESETS, smoke=SMOKE, config=Config):
    return core.parse_config(config, presets, smoke, "doc", list(argv))


# constants


def test_defaults_preset_smoke_and_flags_win_in_that_order():
    assert parse() == Config()
    assert parse("--preset", "fast") == Config(lr=1, model="roberta-base", tag="fast")
    assert parse("--preset", "fast", "--smoke").model == "tiny:roberta"  # sizes, not families
    cfg = parse("--preset", "fast", "--smoke", "--batch", "7", "--clip", "none", "--compile", "--tag", "x")
    assert cfg == Config(batch=7, lr=1, model="tiny:roberta", clip=None, compile=True, tag="x")
    assert core.typed(cfg).flags == {"batch", "clip", "compile", "tag"}
    assert core.typed(cfg).overrides == {"lr": 1, "model": "tiny:roberta"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.batch = 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bacth", "3"], ["unknown flag --bacth", "--batch"]),
        (["--bat", "3"], ["unknown flag --bat"]),
        (["--batch", "2.5"], ["--batch", "2.5", "int"]),
        (["--batch", "0"], ["--batch 0", "use 1 or more"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--dtype", "fp8"], ["fp8", "bf16"]),
        (["--preset", "slow"], ["slow", "fast"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("presets", "smoke", "words"),
    [
        ({}, {"bacth": 3}, ["SMOKE names no constant: bacth", "batch"]),
        ({"p": {"epochs": 3}}, {}, ["preset p names no constant: epochs"]),
        ({"p": {"batch": "3"}}, {}, ["preset p", "batch = '3'", "int"]),
        ({}, {"compile": 1}, ["SMOKE", "compile = 1", "bool"]),
        ({}, {"dtype": "fp8"}, ["SMOKE", "fp8"]),
    ],
)
def test_a_wrong_constant_in_smoke_or_a_preset_is_refused_before_anything_runs(presets, smoke, words, capsys):
    with pytest.raises(SystemExit):
        parse(presets=presets, smoke=smoke)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line


def test_only_rank_0_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse("--nonsense")
    assert capsys.readouterr().err == ""


def test_help_shows_each_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "100 % of it [big-bert]" in capsys.readouterr().out


# processes


def test_a_rank_that_is_missing_is_named():
    """Rank 1 never comes to the second reduction; the error on rank 0 says so."""
    code = """
import datetime, os, sys, threading, torch, core
rank = int(sys.argv[1])
os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
with core.distributed(timeout_minutes=0.05) as world:
    core.barrier(world)
    if rank == 0:
        try:
            core.barrier(world)
        except RuntimeError as error:
            print(error)
        os._exit(0)
    import time; time.sleep(8); os._exit(0)
"""
    from ranks import free_port

    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = ranks[0].communicate(timeout=60)[0]
    ranks[1].kill()
    assert "rank 1 did not come to reduction 2" in said


def test_micro_batches_cover_the_rows():
    model = torch.nn.Linear(1, 1)
    assert list(core.micro_batches(model, [1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(core.micro_batches(model, [1, 2, 3])) == [[1, 2, 3]]


# sampling


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


# data sets

ROWS = [{"id": "1", "text": 'a "quoted", line\nbroken'}, {"id": "2", "text": "ü €"}]


def write(path, rows=ROWS):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:  # Excel writes the mark
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", tables.TABLES)
def test_every_kind_of_table_reads_alike_alone_zipped_and_in_a_folder(tmp_path, suffix):
    path = write(tmp_path / f"train{suffix}")
    assert core.read_rows(str(path)) == ROWS
    assert core.read_rows(str(path), 1) == ROWS[:1]
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w") as archive:
        archive.write(path, path.name)
        archive.writestr("test.csv", "id\n7\n")
    assert core.read_rows(str(tmp_path / "kaggle.zip")) == ROWS
    assert core.read_rows(str(tmp_path / "kaggle.zip"), prefer="test") == [{"id": "7"}]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / f"train_1{suffix}")
    write(tmp_path / "folder" / f"train_2{suffix}")
    assert core.read_rows(str(tmp_path / "folder")) == ROWS + ROWS


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path):
    rows = [{"id": "1", "text": "x" * 200_000}]
    assert core.read_rows(str(write(tmp_path / "a.csv", rows))) == rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.csv", None, ["no such file", "missing.csv"]),
        ("./nowhere/x", None, ["no such file", "nowhere"]),
        ("broken.jsonl", '{"id": 1}\n{"id"', ["broken.jsonl line 2 is no JSON"]),
        ("broken.zip", "not a zip", ["broken.zip", "whole zip"]),
        ("broken.parquet", "not parquet", ["broken.parquet", "cannot be read as parquet"]),
        ("notes.txt", "hello", ["notes.txt", "no table", ".csv"]),
        ("latin.csv", b"id\n\xe9\n", ["latin.csv cannot be read as csv: it is not UTF-8"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        core.read_rows(name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_fingerprint_follows_the_bytes(tmp_path):
    path = write(tmp_path / "train.csv")
    before = tables.data_fingerprint(str(path))
    assert tables.data_fingerprint(str(path)) == before
    write(path, [*ROWS, {"id": "3", "text": ""}])
    assert tables.data_fingerprint(str(path)) != before


def test_bad_rows_are_named_and_too_many_are_an_error():
    bad = cache.BadRows()
    bad.add(7, "no winner")
    bad.add(9, "no winner")
    assert bad.report(1000, "x.csv") == ["left out 2 row(s), no winner: 7, 9"]
    bad.add(12, "prompt is empty")
    with pytest.raises(
        UserError,
        match=r"x.csv: 3 of 100 rows are unusable, more than 1%.*row 7: no winner.*row 12: prompt is empty",
    ):
        bad.report(100, "x.csv")


def test_splits_keep_groups_whole_and_labels_even():
    rng = np.random.default_rng(0)
    groups = rng.zipf(1.6, 3000) % 700  # a few prompts with many rows, many with one
    labels = rng.integers(0, 3, 3000)
    part = core.split_by_group(groups, labels, [8, 1, 1], seed=42)
    assert all(len(set(part[groups == group])) == 1 for group in set(groups))
    np.testing.assert_allclose(np.bincount(part) / 3000, [0.8, 0.1, 0.1], atol=0.01)
    for label in range(3):
        np.testing.assert_allclose(
            np.bincount(part[labels == label]) / (labels == label).sum(), [0.8, 0.1, 0.1], atol=0.03
        )
    order = rng.permutation(3000)  # the file's order does not matter
    assert (core.split_by_group(groups[order], labels[order], [8, 1, 1], 42) == part[order]).all()
    assert (core.split_by_group(groups, labels, [8, 1, 1], 43) != part).any()
    with pytest.raises(UserError, match="2 prompts cannot be split into 3 parts"):
        core.split_by_group([1, 2], [0, 1], [8, 1, 1], 0)


def test_a_folder_or_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), core.whole_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("half")
        raise KeyError
    with pytest.raises(KeyError), core.whole_file(tmp_path / "b") as file:
        file.write("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".a.left").mkdir()  # by a process that was killed yesterday
    os.utime(tmp_path / ".a.left", (0, 0))
    with core.whole_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# optimisation


def schedule(name, warmup, steps=100, lr=2e-3, min_lr=1e-4):
    cfg = SimpleNamespace(schedule=name, warmup=warmup, lr=lr, min_lr=min_lr)
    return [core.lr_at(cfg, step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_equal_torchs(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    rise = LinearLR(optimizer, 1 / 20, 1.0, total_iters=19)
    fall = {
        "cosine": lambda: CosineAnnealingLR(optimizer, 80, eta_min=1e-4),
        "linear": lambda: LinearLR(optimizer, 1.0, 1e-4 / 2e-3, total_iters=80),
    }[name]()
    torchs = SequentialLR(optimizer, [rise, fall], milestones=[20])
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    np.testing.assert_allclose(schedule(name, 0.2), rates, rtol=1e-6)


def test_warmup_of_nothing_and_of_everything():
    assert schedule("linear", 0.0)[0] == 2e-3
    assert schedule("constant", 0.0) == [2e-3] * 100
    assert schedule("cosine", 1.0)[-1] == pytest.approx(2e-3) and schedule("cosine", 1.0)[0] == pytest.approx(
        2e-5
    )


def test_loss_sums_in_fp32_and_a_batch_without_targets_gives_zero():
    logits = torch.randn(6, 3, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([0, 1, 2, core.IGNORE_INDEX, 1, 0])
    by_hand = -sum(logits.float().log_softmax(-1)[i, label] for i, label in enumerate(labels) if label >= 0)
    torch.testing.assert_close(core.sum_cross_entropy(logits, labels), by_hand)
    nothing = core.sum_cross_entropy(logits, torch.full((6,), core.IGNORE_INDEX))
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "case",  # rows, width, vocabulary, rank of an adapter, bias
    [(64, 32, 97, 0, False), (64, 32, 129, 4, False), (64, 32, 97, 4, True), (200_000, 8, 97, 0, True)],
    ids=["plain", "adapter", "adapter and bias", "chunks"],
)
def test_the_head_in_bf16_is_the_one_in_fp64(case):
    half_head.check(half_head.errors("cpu", "bf16", *case))  # test_gpu.py has larger ones


def small_model(scale=1.0):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    precision = core.Precision("fp32", World())
    core.scaled_backward(core.sum_cross_entropy(model(x), y) * scale, World(), 8, precision)
    return model, precision


def test_the_step_is_adamws_with_clipping_and_decay_on_matrices_only():
    model, precision = small_model()
    reference, _ = small_model()
    norm = core.optimizer_step(core.make_optimizer(model, "adamw", 0.5), precision, clip=0.1, lr=0.01)
    matrices = [p for p in reference.parameters() if p.dim() == 2]
    vectors = [p for p in reference.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0}], lr=0.01
    )
    want = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    optimizer.step()
    assert norm == pytest.approx(float(want)) and norm > 0.1
    for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_touches_no_weight():
    model, precision = small_model(scale=math.inf)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        core.optimizer_step(core.make_optimizer(model, "adamw", 0), precision, clip=1.0, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_running_out_of_memory_names_the_micro_batch_to_try():
    model = torch.nn.Linear(1, 1)

    def step():
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="with 32 of the longest rows at once: use --micro_batch 16"):
        core.worst_case(World(), model, step, torch.optim.SGD(model.parameters()), 32)


# statistics


def test_metrics_against_formulas():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet([1, 1, 1], 500)
    labels = np.array([rng.choice(3, p=p) for p in probs])
    m = core.classification_metrics(np.log(probs), labels, np.arange(500), [0.5, 0.3, 0.2], ["A", "B", "tie"])
    assert m["log_loss"] == pytest.approx(-np.mean(np.log(probs[np.arange(500), labels])))
    assert m["accuracy"] == np.mean(probs.argmax(1) == labels)
    assert m["uniform_log_loss"] == pytest.approx(1.0986, abs=1e-4)
    shares = np.bincount(labels) / 500
    assert m["prior_log_loss"] == pytest.approx(-(shares * np.log([0.5, 0.3, 0.2])).sum())
    assert m["prior_accuracy"] == shares[0]
    half = 1.96 * np.std(probs.argmax(1) == labels) / np.sqrt(500)
    np.testing.assert_allclose(
        m["accuracy_interval"], [m["accuracy"] - half, m["accuracy"] + half], atol=0.006
    )
    assert m["alarm"] is None


def test_the_alarm_knows_a_model_that_learnt_nothing():
    labels = np.arange(300) % 3
    always = np.log(np.tile([0.2, 0.2, 0.6], (300, 1)))
    names = ["A", "B", "tie"]
    m = core.classification_metrics(always, labels, np.arange(300), [1 / 3] * 3, names)
    assert m["alarm"] == "NOT LEARNING: every one of 300 rows is called 'tie'"
    noise = np.log(np.random.default_rng(0).dirichlet([20, 20, 20], 300))
    m = core.classification_metrics(noise, labels, np.arange(300), [1 / 3] * 3, names)
    assert "cannot be told from the class shares' 1.0986" in m["alarm"]


def test_intervals_respect_groups_and_are_never_of_width_zero():
    values = np.repeat(np.random.default_rng(0).normal(size=40), 25)[
        :, None
    ]  # 40 prompts, 25 equal rows each
    low, high = core.bootstrap(values, np.repeat(np.arange(40), 25))[0]
    alone_low, alone_high = core.bootstrap(values, np.arange(1000))[0]
    assert (high - low) > 3 * (alone_high - alone_low)
    assert core.bootstrap(np.ones((60, 1)), np.arange(60))[0].tolist() == [0.95, 1]
    assert core.bootstrap(np.zeros((60, 1)), np.arange(60))[0].tolist() == [0, 0.05]


@pytest.mark.slow
def test_intervals_cover_the_truth_95_times_in_100():
    """Losses are skewed and go by prompt: 100 prompts of three rows each."""
    rng, hits, trials = np.random.default_rng(0), 0, 1000
    prompts = np.repeat(np.arange(100), 3)
    for trial in range(trials):
        values = rng.exponential(size=(300, 1)) + rng.normal(size=100)[prompts, None]
        low, high = core.bootstrap(values, prompts, samples=500, seed=trial)[0]
        hits += low <= 1 <= high
    assert 0.935 <= hits / trials <= 0.965


@pytest.mark.parametrize("script", [*SCRIPTS, "eval"])
def test_help_says_of_every_constant_what_it_is(script):
    """In one comment on the constant's own line: one that goes on below would be cut off in --help."""
    config = importlib.import_module(script).Config
    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(config), re.M))
    assert {field.name for field in dataclasses.fields(config)} == comments.keys()
    assert [name for name, text in comments.items() if text.rstrip().endswith(",") or len(text) < 4] == []
