"""What a usual step is, which step stands out, what is noted and left out, also over resumes."""

import json
import math
import os
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from ranks import everywhere
from torch import nn
from toys.sft import (
    BARE,
    SCRIPTS,
    config,
    every,
    go,
    initial_model,
    parts_of,
    random_rows,
    small_gpt,
    toy_file,
    toy_rows,
    write_rows,
)

import core
import lab.data.text
import lab.measure.answers
import lab.train.batches
import lab.train.loss
from core import World
from lab.run.spikes import BAND, spike_limit
from lab.train import loop


def test_too_few_steps_say_nothing_of_what_is_usual():
    assert spike_limit([], 1.5) == spike_limit([1.0] * 19, 1.5) == math.inf
    assert spike_limit([1.0] * 20, 1.5) < math.inf


@pytest.mark.parametrize("least", [1.25, 1.5])
def test_a_constant_series_may_rise_by_what_is_usual_in_any_case(least):
    # exp and log are rounded
    assert spike_limit([2.0] * 30, least) == pytest.approx(2 * least, rel=1e-12)
    assert spike_limit([0.0] * 30, least) < 1e-20  # no logarithm of nothing


def log_normal(n, deviation=0.3, seed=0):
    return np.exp(np.random.default_rng(seed).normal(0, deviation, n)).tolist()


def test_a_log_normal_series_is_rarely_flagged_and_a_twentyfold_value_always():
    series = log_normal(3000)
    limits = [spike_limit(series[max(0, i - BAND) : i], 1.5) for i in range(20, len(series))]
    assert sum(value > limit for value, limit in zip(series[20:], limits, strict=True)) <= 3
    assert all(20 * statistics.median(series) > limit for limit in limits[80:])
    assert spike_limit(log_normal(100), 1.5) == pytest.approx(math.exp(6 * 0.3), rel=0.4)  # of 100 values


def test_a_few_spikes_do_not_hide_the_next():
    series = log_normal(90)
    spiked = [*series, *[100.0, 1e6, 1e12, 50.0, 100.0, 1e3, 40.0, 80.0, 60.0, 70.0]]
    assert spike_limit(spiked, 1.5) < 20 * statistics.median(series)
    assert spike_limit(spiked, 1.5) < 1.6 * spike_limit(series, 1.5)


def test_a_step_that_is_left_out_moves_nothing_and_the_next_one_does():
    model = small_gpt()
    optimizer, precision = core.make_optimizer(model, "adamw", 0.1), core.Precision("fp32", World())
    examples = every(random_rows(4), 28)

    def step(leave_out):
        core.scaled_backward(model(*examples.batch(range(4), "cpu")), World(), 20, precision)
        norm = core.gradient_norm(optimizer, precision)
        before_clipping = math.hypot(*(float(p.grad.norm()) for p in model.parameters()))
        assert core.optimizer_step(optimizer, precision, 0.1, 0.01, norm=norm, leave_out=leave_out) == norm
        assert all(p.grad is None for p in model.parameters())  # they are gone
        # norms of norms, in fp32: the gradients are those before clipping to 0.1
        assert before_clipping == pytest.approx(float(norm), rel=1e-5) and norm > 0.1

    step(False)
    before, moments = core.weights_sha256(model), core.state_sha256(flat(optimizer))
    step(True)
    assert core.weights_sha256(model) == before and core.state_sha256(flat(optimizer)) == moments
    step(False)
    assert core.weights_sha256(model) != before


def a_step(run, step=0, targets=7) -> loop.Step:
    return loop.Step(run, step, [], [], targets, 100, 100, "epoch 1", 1, 0.0)


def a_run(folder, said, **constants) -> SimpleNamespace:
    cfg = SimpleNamespace(**({"skip_spikes": False, "dtype": "fp32"} | constants))
    return SimpleNamespace(world=World(), state={}, cfg=cfg, first_step=0, folder=folder, say=said.append)


def test_an_overflow_of_fp16_is_no_spike(tmp_path):
    """It scales less from now on: nothing is said, nothing becomes usual."""
    model, run = small_gpt(), a_run(tmp_path, [], dtype="fp16", skip_spikes=True)
    optimizer, precision = core.make_optimizer(model, "sgd", 0.0), core.Precision("fp16", World())
    examples = every(random_rows(4), 28)

    def step(overflow):
        core.scaled_backward(model(*examples.batch(range(4), "cpu")), World(), 20, precision)
        if overflow:
            model.wte.weight.grad[3, 5] = math.inf
        norm, at = core.gradient_norm(optimizer, precision), a_step(run)
        spiked = at.spiked(20.0, norm)
        core.optimizer_step(optimizer, precision, 1.0, 0.01, norm=norm, leave_out=at.left_out)
        return spiked, norm

    start, scale = core.weights_sha256(model), precision.scaler.get_scale()
    assert step(overflow=True) == (False, math.inf) and run.state == {}
    assert core.weights_sha256(model) == start and precision.scaler.get_scale() == scale / 2
    spiked, norm = step(overflow=False)
    assert not spiked and run.state["bands"]["grad_norm"] == [norm] and core.weights_sha256(model) != start


def test_an_overflow_of_fp32_is_a_spike_before_it_is_an_error(tmp_path):
    model, run = small_gpt(), a_run(tmp_path, [])
    optimizer, precision = core.make_optimizer(model, "sgd", 0.0), core.Precision("fp32", World())
    run.state["bands"] = {"grad_norm": [1.0] * 30}
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, math.inf)
    norm, at = core.gradient_norm(optimizer, precision), a_step(run)
    assert at.spiked(7.0, norm) and at.spike["odd"] == ["grad_norm"]
    with pytest.raises(FloatingPointError, match="gradient norm is inf"):
        core.optimizer_step(optimizer, precision, 1.0, 0.01, norm=norm)


def watched(losses, norms, folder, skip_spikes) -> tuple[list[bool], list[str], SimpleNamespace]:
    """Which of these steps are left out, what is said, the run."""
    said, left_out, model = [], [], nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.zeros(2)
    run = a_run(folder, said, skip_spikes=skip_spikes)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        at = a_step(run, step)
        if at.spiked(7 * loss, norm):  # the sum of 7 targets
            at.note_spike(model, {})
        left_out.append(at.left_out)
    return left_out, said, run


def test_a_rise_that_no_step_stands_out_in_is_named_once_and_not_left_out(tmp_path):
    rng = np.random.default_rng(0)
    shifts = np.repeat([1.0, 1.3, 1.0, 1.3], [100, 30, 130, 30])
    losses, norms = (shifts * rng.lognormal(0, 0.02, 290)).tolist(), rng.lognormal(0, 0.1, 290).tolist()
    left_out, said, run = watched(losses, norms, tmp_path, skip_spikes=True)
    spikes = spikes_of(tmp_path)
    assert not any(left_out) and {tuple(spike["odd"]) for spike in spikes} == {("smoothed_loss",)}
    rises = [[spike["step"] for spike in spikes if low < spike["step"] <= low + 40] for low in (100, 260)]
    assert sum(map(len, rises)) == len(spikes) and min(map(len, rises)) > 10
    assert [steps[0] - low for steps, low in zip(rises, (100, 260), strict=True)] == [
        pytest.approx(9, abs=4)] * 2  # fmt: skip
    for steps in rises:
        assert steps == list(range(steps[0], steps[-1] + 1))
    assert [re.match(r"spike  step \d+  smoothed_loss ", line)[0] for line in said] == [
        f"spike  step {steps[0]}  smoothed_loss " for steps in rises]  # fmt: skip
    assert not any("left out" in line for line in said)
    assert (run.state["spikes"], run.state["left_out"]) == (len(spikes), 0)
    for spike in spikes:
        smoothed = np.mean(losses[spike["step"] - 10 : spike["step"]])
        assert spike["smoothed_loss"] == pytest.approx(smoothed, rel=1e-12)
        assert spike["smoothed_loss"] > spike["smoothed_loss_limit"] and not spike["left_out"]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_step_that_stands_out_is_left_out_where_that_is_asked_for(name, skips, tmp_path):
    series = {"loss": log_normal(60, 0.05, 1), "grad_norm": log_normal(60, 0.05, 2)}
    series[name][40] = series[name][41] = 5.0
    left_out, said, run = watched(series["loss"], series["grad_norm"], tmp_path, skips)
    spikes = spikes_of(tmp_path)
    named = [spike["step"] for spike in spikes if name in spike["odd"]]
    assert named == [41, 42] and [i + 1 for i, out in enumerate(left_out) if out] == named * skips
    assert [spike["left_out"] for spike in spikes if name in spike["odd"]] == [skips] * 2
    assert len(said) == 1 + skips  # a rise is one line, but each update that is left out is said
    assert said[0].startswith(f"spike  step 41  {name} 5, usually below ")
    assert ("; its update is left out" in said[0]) == skips
    assert (run.state["spikes"], run.state["left_out"]) == (len(spikes), 2 * skips)
    assert (spikes[0]["largest_gradient"], spikes[0]["largest_gradient_norm"]) == ("weight", 2.0)


def flat(optimizer):
    return {f"{i} {key}": value for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}  # fmt: skip


@pytest.fixture
def spike_at(monkeypatch):
    """spike_at(steps, crash): gradients of these steps (from 1) are 60 times as large; a crash in `crash`."""
    now, plan = [None], {"steps": (), "crash": None}
    reseed, backward = core.reseed, core.scaled_backward

    def reseeded(*key):
        now[0] = key[1] + 1 if isinstance(key[1], int) else None
        reseed(*key)

    def scaled(loss, *rest):
        if now[0] is not None and now[0] == plan["crash"]:
            raise RuntimeError("crashed by the test")
        backward(loss * 60 if now[0] in plan["steps"] else loss, *rest)

    everywhere(monkeypatch.setattr, lab.train.batches, "reseed", reseeded)
    everywhere(monkeypatch.setattr, lab.train.loss, "scaled_backward", scaled)
    return lambda steps, crash=None: plan.update(steps=steps, crash=crash)


def spikes_of(folder) -> list[dict]:
    path = folder / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


STEADY = ["--schedule", "constant", "--warmup", 0, "--lr", 1e-4, "--epochs", 3, "--log_every", 100]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_odd_step_is_told_with_what_it_saw(name, spike_at):
    spike_at([25])
    argv = ["--data", toy_file(), *BARE, *STEADY, "--max_steps", 26, "--no-final_eval"]
    _, folder = go(name, *argv)
    (spike,) = spikes_of(folder)
    cfg = config(name, "--smoke", *argv)
    data, parts = parts_of(cfg)
    train = parts["train"]
    batch = core.ShardedBatches(train.lengths, 4, World(), seed=0).global_batch(24)
    lengths = train.lengths[batch]
    expected = {"step": 25, "odd": ["grad_norm"], "rows": data.numbers[train.rows[batch]].tolist(),
                "lengths": lengths.tolist(), "lr": 1e-4, "targets": int(train.targets(batch).sum()),
                "longest": int(lengths.max())}  # fmt: skip
    assert {key: spike[key] for key in expected} == expected
    worst = int(np.argmax(spike["row_losses"]))
    assert spike["worst_row"] == data.tokenizer.decode(train.pair(batch[worst])[0])
    loss = np.average(spike["row_losses"], weights=train.targets(batch))
    assert loss == pytest.approx(spike["loss"], abs=5e-5)  # of four digits
    assert spike["pad_share"] == pytest.approx(1 - lengths.sum() / (4 * lengths.max()), rel=1e-12)
    first = data.tokenizer.decode(train.pair(batch[0])[0])
    assert spike["first_row"] == first and data.texts[train.rows[batch[0]]][0] in first
    assert spike["grad_norm"] > spike["grad_norm_limit"] > 0 and 0 < spike["loss"] <= spike["loss_limit"]
    trains = [n for n, p in initial_model(name, cfg, data.tokenizer).named_parameters() if p.requires_grad]
    assert spike["largest_gradient"] in trains and spike["left_out"] is False
    # the largest of n parts of a sum of squares: over none of them, and no less than their mean
    assert spike["grad_norm"] / math.sqrt(len(trains)) <= spike["largest_gradient_norm"] <= spike["grad_norm"]
    assert spike["grad_norm"] > 2 * cfg.clip  # so that they were not clipped
    assert ("multiplier_lr" in spike) == (name == "run_lora")
    assert spike.get("multiplier_lr", 1e-4) == 1e-4  # alpha 16 / rank 16
    assert "spike  step 25  grad_norm" in (folder / "log.txt").read_text()


def test_the_multiplier_stands_beside_the_rate(spike_at):
    spike_at([22])
    argv = ["--data", toy_file(), *BARE, *STEADY, "--max_steps", 22, "--no-final_eval", "--lora_alpha", 48]
    _, folder = go("run_lora", *argv)
    assert [spike["multiplier_lr"] for spike in spikes_of(folder)] == [pytest.approx(3e-4, rel=1e-12)]


@pytest.mark.slow
def test_skip_spikes_leaves_the_weights_of_that_step(spike_at):
    argv = ["--data", toy_file(), *BARE, *STEADY, "--no-final_eval", "--test_weights", "last"]
    spike_at([25])
    before = go("run_instruct", *argv, "--max_steps", 24, out="a")[0]["weights_sha256"]
    result, folder = go("run_instruct", *argv, "--max_steps", 25, "--skip_spikes", out="b")
    assert result["weights_sha256"] == before and [s["step"] for s in spikes_of(folder)] == [25]
    assert (result["spikes"], result["left_out"]) == (1, 1)
    assert "spikes  1 of 25 steps, 1 left out (spikes.jsonl)" in (folder / "log.txt").read_text()
    result, folder = go("run_instruct", *argv, "--max_steps", 25, out="c")
    assert result["weights_sha256"] != before and [s["step"] for s in spikes_of(folder)] == [25]
    assert (result["spikes"], result["left_out"]) == (1, 0)


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
def test_what_is_usual_survives_a_crash(name, spike_at):
    """The crash is 1 step behind a spike that is not in a checkpoint: it is met again."""
    argv = [
        "--data",
        toy_file(),
        *BARE,
        *STEADY,
        "--no-final_eval",
        "--skip_spikes",
        "--test_weights",
        "last",
    ]
    argv += ["--max_steps", 30, "--save_every", 8]
    spike_at([23, 25, 28])
    whole, folder = go(name, *argv, out="a")
    assert [spike["step"] for spike in spikes_of(folder)] == [23, 25, 28]
    spike_at([23, 25, 28], crash=26)
    with pytest.raises(RuntimeError, match="crashed by the test"):
        go(name, *argv, out="b")
    assert [spike["step"] for spike in spikes_of(ranks.newest("b"))] == [23, 25]
    spike_at([23, 25, 28])
    resumed, again = go(name, *argv, "--resume_timestamp", "latest", out="b")
    assert "from step_00000024" in (again / "log.txt").read_text()
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    for figures in (whole, resumed):
        assert (figures["spikes"], figures["left_out"]) == (3, 3)
    assert (again / "spikes.jsonl").read_text() == (folder / "spikes.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_run_with_spikes_ends_as_if_it_had_not_been():
    """By SIGKILL; a row of one target among long ones makes a spike without help."""
    rows = toy_rows()
    for i, row in enumerate(rows):
        row["output"] = "" if i % 9 == 4 else " ".join(f"{i + j} apples and stones" for j in range(9))
    argv = ["--smoke", "--data", write_rows(rows), *BARE, *STEADY, "--batch", 1, "--max_steps", 50]
    argv += ["--max_length", 256, "--lr", 1e-5]
    argv += ["--no-final_eval", "--skip_spikes", "--test_weights", "last", "--save_every", 12]
    where = {"env": {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]}}
    whole = ranks.run("run_instruct", *argv, **where)
    folder = ranks.newest()
    assert spikes_of(folder), "no row makes a spike"
    codes = ranks.launch("run_instruct", "--out", "b", *argv, kill=("step", 41, 0), **where)
    assert codes == [-9]
    codes = ranks.launch("run_instruct", "--out", "b", *argv, "--resume_timestamp", "latest", **where)
    assert codes == [0], Path("out.txt").read_text()
    assert ranks.result("b")["weights_sha256"] == whole["weights_sha256"]
    assert (ranks.newest("b") / "spikes.jsonl").read_text() == (folder / "spikes.jsonl").read_text()
