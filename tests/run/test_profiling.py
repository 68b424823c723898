"""--profile: which steps are recorded, by whom, what is said of them, and that nothing else changes."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import core
from core import World
from lab.errors import Stop
from lab.run import profiling
from lab.run.meter import Clock

CPU, GPU = DeviceType.CPU, DeviceType.CUDA


def a_run(profile=2, world=World()):
    said = []
    cfg, clock = SimpleNamespace(profile=profile), Clock(None)
    return SimpleNamespace(
        clock=clock, cfg=cfg, world=world, folder=Path(), said=said, say=said.append, profiled=False
    )


def steps(run, count, evaluations=()):
    """The protocol of lab/train/loop.py: a step is a product, an evaluation a sort in front of it."""
    profile = profiling.Profile(run)
    for step in range(count + 1):
        if step in (*evaluations, count):
            profile.end_at(step == count)
            torch.rand(5).sort()
        if step < count:
            profile.begin_step()
            torch.rand(8, 8) @ torch.rand(8, 8)
    return run


def trace() -> dict[str, int]:
    """How often each name stands in the trace."""
    names = [event.get("name") for event in json.loads(Path("trace.json").read_text())["traceEvents"]]
    return {name: names.count(name) for name in names}


def test_the_fourth_step_and_those_after_it_are_recorded_and_told_in_ten_lines():
    said = steps(a_run(), 9).said
    assert trace()["aten::mm"] == 2 and {"ProfilerStep#3", "ProfilerStep#4"} <= trace().keys()
    assert not {"ProfilerStep#2", "ProfilerStep#5", "aten::sort"} & trace().keys()
    assert len(said) <= 10 and all(len(line) <= 110 for line in said)
    assert said[0].startswith("profile  2 steps of ") and "data 0%" in said[0] and "ranks" not in said[0]
    (product,) = [line.split() for line in said if line.startswith("aten::mm ")]
    assert product[1] == "1.0" and float(product[2]) > 0 and product[3].endswith("%")
    assert said[-1].startswith("trace: trace.json")


def test_an_evaluation_is_not_recorded_and_ends_the_record():
    said = steps(a_run(profile=9), 9, evaluations=(0, 2, 3, 6)).said
    assert said[0].startswith("profile  3 steps of ")
    assert trace()["aten::mm"] == 3 and "aten::sort" not in trace()


def test_a_run_that_ends_before_says_so_and_one_that_ends_within_tells_what_there_is():
    assert steps(a_run(), 3).said == ["profile: nothing is recorded, the run ended within 3 steps"]
    assert not Path("trace.json").exists()
    assert steps(a_run(profile=5), 4).said[0].startswith("profile  1 step of ")


def test_rank_0_alone_records_once_in_a_process_and_only_where_it_is_asked_to():
    run = steps(a_run(), 9)
    assert steps(run, 9).said == run.said and run.said.count(run.said[-1]) == 1  # a second fold
    assert steps(a_run(world=World(rank=1)), 9).said == [] == steps(a_run(profile=None), 9).said


def test_a_trace_that_cannot_be_written_ends_no_run():
    run = a_run()
    run.folder = Path("nowhere")
    said = steps(run, 9).said
    assert said[0].startswith("profile  2") and said[-1] == "WARNING nowhere/trace.json could not be written"


def test_the_time_of_the_report_is_no_part_of_a_step(monkeypatch):
    run = a_run()
    monkeypatch.setattr(run.clock, "begin_step", lambda: run.said.append("the clock begins anew"))
    *_, told, last = steps(run, 9).said
    assert told.startswith("trace: ") and last == "the clock begins anew"


def event(name, begins, ends, kind=GPU, mark=False):
    times = SimpleNamespace(start=begins, end=ends)
    return SimpleNamespace(name=name, time_range=times, device_type=kind, is_user_annotation=mark)


def row(key, gpu, count, mark=False, kind=CPU):
    times = {"self_device_time_total": gpu, "self_cpu_time_total": 1.0}
    return SimpleNamespace(key=key, count=count, is_user_annotation=mark, device_type=kind, **times)


def test_of_a_card_idle_time_and_exchange_are_told_and_operators_by_their_time_on_it():
    events = [
        *(event("gemm", 0, 400), event("norm", 300, 500)),  # microseconds; they overlap
        *(event("ncclDevKernel_AllReduce", 450, 600), event("ProfilerStep#3", 0, 1000, mark=True)),
        *(event("aten::mm", 0, 900, CPU), event("gloo:all_reduce", 800, 850, CPU)),
    ]
    rows = [row("aten::norm", 100.0, 2), row("aten::mm", 300.0, 4), row("gemm", 300.0, 4, kind=GPU)]
    rows += [row("ProfilerStep#3", 900.0, 1, mark=True)]
    lines = profiling.summary(rows, events, 2, 1e-3, {"data": 1e-4, "ranks": 5e-5}, on_card=True)
    shares = "GPU idle 40%  waiting for data 10%  waiting for ranks 5%  exchange 20%"
    assert lines[0] == f"profile  2 steps of 0.5 ms  {shares}"
    assert [line.split() for line in lines[2:]] == [
        ["aten::mm", "2.0", "0.15", "75.0%"],
        ["aten::norm", "1.0", "0.05", "25.0%"],
    ]


def test_nothing_that_ran_covers_no_time():
    assert profiling.covered([]) == 0.0


def trained(profile, spent_after=8, signalled_after=99) -> tuple[torch.Tensor, list[str]]:
    """The weights of a model with dropout behind eight steps of the loop, or those that its clock allows; and
    what was said."""
    world = World()
    constants = {"eval_every": 8, "save_every": None, "max_minutes": None, "log_every": 99, "clip": None}
    constants |= {"seed": 0, "dtype": "fp32", "skip_spikes": False, "epochs": 1, "test_weights": "last"}
    run = a_run(profile)
    run.cfg = SimpleNamespace(profile=profile, **constants)
    run.step, run.state, run.unit, run.first_step, run.fold, run.at_peak = 0, {}, "rows", 0, 0, None
    run.stopping, run.save, run.has_saved = None, lambda *given, must: None, lambda step: True

    def agree(targets):
        run.asked += 1
        run.clock.share = float(run.asked > spent_after)
        run.stopping = "SIGTERM" if run.asked > signalled_after else None
        return targets

    run.asked, run.agree = 0, agree
    run.step_done, run.log_training = lambda *given: None, lambda *given: None
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, 1))
    optimizer, precision = torch.optim.SGD(model.parameters()), core.Precision("fp32", world)
    batches = core.ShardedBatches(np.full(16, 3), 2, world, seed=1)
    with contextlib.suppress(Stop):
        for at in core.steps(run, batches, len, (model, optimizer, precision), 8):
            if not at.evaluates:
                loss = model(torch.ones(len(at.rows), 6)).square().mean()
                loss.backward()
                at.spiked([loss.detach()], core.gradient_norm(optimizer, precision))
                at.update(optimizer, precision, 0.1)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), run.said


@pytest.mark.parametrize("profile", [1, 3])
def test_profiling_changes_no_weight(profile):
    (plain, nothing), (weights, said) = trained(None), trained(profile)
    assert torch.equal(plain, weights) and said and not nothing


def test_a_signal_ends_the_record_and_shows_it():
    assert trained(4, signalled_after=5)[1][0].startswith("profile  2 steps of ")


def test_a_step_that_the_clock_forbids_is_not_counted():
    assert trained(4, spent_after=5)[1][0].startswith("profile  2 steps of ")
