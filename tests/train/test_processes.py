"""Ranks that wait for each other: one that dies or hangs is named, in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import free_port, launch

import core
from lab.train import processes

CODE = """
import os, sys, threading, time
rank, how = sys.argv[1], sys.argv[3]
os.environ |= dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
import core
from lab.train import heartbeat
heartbeat.BEAT_SECONDS = 0.1
with core.distributed() as world:
    print("ready", flush=True)
    if rank == "1":
        time.sleep(600)
    if how == "in C++":
        import torch.distributed as dist, torch
        heartbeat.last_words.append(lambda text: print("noted", flush=True))
        dist.all_reduce(torch.zeros(1))
    core.barrier(world)
"""


@pytest.mark.parametrize(
    ("sent", "how", "said"),
    [
        (signal.SIGKILL, "reduction", "rank 1 did not come to reduction 1, where rank 0 waits ("),
        pytest.param(signal.SIGSTOP, "reduction", "silent for a minute", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "in C++", "silent for a minute", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "in C++", "ended while the others waited", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_died_or_stopped_is_named(sent, how, said):
    """Before its first reduction, too. `in C++`: where no exception reaches the one that waits."""
    command, port = [sys.executable, "-c", CODE], str(free_port())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), port, how], **pipes) for rank in (0, 1)]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    os.kill(ranks[1].pid, sent)
    out, err = ranks[0].communicate(timeout=120)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    (line,) = err.splitlines()  # no traceback, no stack of C++
    assert line.startswith("-c: error: ") and "rank 1" in line and said in line
    assert out == ("noted\n" if (sent, how) == (signal.SIGSTOP, "in C++") else "")


LATE = """
import os, sys, time
rank = sys.argv[1]
os.environ |= dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
import torch, core
from lab.train import heartbeat
with core.distributed() as world:
    heartbeat.BEAT_SECONDS = 0.05
    for call in range(3):
        time.sleep(0.5 * (rank == str(call % 2)))
        print(core.all_reduce_sum(world, torch.tensor([1.0 + world.rank, 10.0**call])).tolist(), flush=True)
"""


@pytest.mark.slow
def test_who_is_late_by_many_looks_is_waited_for_and_the_sums_are_right():
    """Waiting in slices must not break off the reduction, nor those behind it."""
    command, port = [sys.executable, "-c", LATE], str(free_port())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), port], **pipes) for rank in (0, 1)]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert out.splitlines() == ["[3.0, 2.0]", "[3.0, 20.0]", "[3.0, 200.0]"]


@pytest.mark.parametrize(
    ("error", "full"),
    [(OSError(28, "No space left on device"), True), (RuntimeError("PytorchStreamWriter failed"), True),
     (OSError(5, "Input/output error"), False), (RuntimeError("shapes do not fit"), False)],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_a_fault_is_not(error, full, capsys, monkeypatch):
    monkeypatch.setattr(processes.os, "_exit", sys.exit)  # which no code runs behind, either
    with pytest.raises((SystemExit, OSError, RuntimeError)) as raised, core.distributed():
        raise error
    assert (isinstance(raised.value, SystemExit) and raised.value.code == 1) is full
    assert (raised.value is error) is not full
    assert ("make room, then go on by --resume_timestamp auto or latest\n" in capsys.readouterr().err) is full


def test_a_mistake_that_all_ranks_meet_before_they_join_is_said_once_a_box():
    assert launch("run_lora", "--smoke", "--backend", "nccl", size=2) == [2, 2]
    assert Path("out.txt").read_text().count("--backend nccl does not fit cpu") == 1


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("typed", [None, *NAMES])
@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_segments_of_memory_may_grow_on_nvidias_cards_unless_the_user_says_otherwise(
    typed, cuda, monkeypatch
):
    for name in NAMES:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    if typed:
        monkeypatch.setenv(typed, "max_split_size_mb:64")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert processes._pick_device(0, 1).type == "cpu"
    ours = dict.fromkeys(NAMES, "expandable_segments:True") if cuda else {}
    expected = {typed: "max_split_size_mb:64"} if typed else ours
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == expected
