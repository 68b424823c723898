"""The finder on curves drawn by hand, and on a quadratic."""

import copy
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from laws.test_laws import SHORT
from ranks import SCRIPTS, launch, newest, run
from torch import nn

import core
from core import World
from lab.measure import lr_finder


def fp64():
    return core.Precision("fp64", World())


def quadratic(a):
    """A model, its optimizer without momentum, and `take`: a step on a / 2 w^2."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer, precision = torch.optim.SGD(model.parameters(), lr=0.0), fp64()

    def take(step, lr):
        loss = (0.5 * a * model.weight**2).sum()
        loss.backward()
        core.optimizer_step(optimizer, precision, None, lr)
        return loss.item()

    return model, optimizer, precision, take


@pytest.mark.parametrize("a", [0.7, 8.0, 300.0])
def test_on_a_quadratic_the_lowest_loss_lies_at_the_last_rate_that_converges(a):
    model, optimizer, precision, take = quadratic(a)
    lrs = np.geomspace(1e-4, 10, 70)
    curve = lr_finder.sweep(take, lrs, 0.0, model, optimizer, precision)
    last = max(lr for lr in lrs if lr < 2 / a)
    assert curve["smoothed"] == curve["loss"]
    assert curve["lr"][int(np.argmin(curve["loss"]))] == last
    assert lr_finder.suggest(curve["lr"], curve["smoothed"])["minimum/10"] == pytest.approx(
        last / 10, rel=1e-12
    )
    assert len(curve["lr"]) < 70  # it ended when it had diverged
    assert model.weight.item() == 1.0


def sweep_of(losses, smoothing=0.0):
    """The curve of a `take` that returns (or raises) what stands in `losses`, step by step."""

    def take(step, lr):
        if isinstance(losses[step], Exception):
            raise losses[step]
        return losses[step]

    lrs = [10.0**step for step in range(len(losses) - 1)]
    model, optimizer, precision, _ = quadratic(1.0)
    return lr_finder.sweep(take, lrs, smoothing, model, optimizer, precision)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.8, 0.98])
def test_a_constant_loss_is_drawn_flat_and_suggests_nothing(smoothing):
    curve = sweep_of([4.4] * 101, smoothing)
    assert len(curve["smoothed"]) == 100
    np.testing.assert_allclose(curve["smoothed"], 4.4, rtol=0, atol=1e-12)  # journal 003: 2.22 up to 4.35
    assert lr_finder.suggest(curve["lr"], curve["smoothed"]) == dict.fromkeys(
        ["steepest", "valley", "minimum/10"]
    )


def test_smoothing_is_the_weighted_mean_of_all_losses_so_far():
    losses = np.random.default_rng(0).uniform(2, 3, 30)
    curve = sweep_of([9.0, *losses], 0.8)
    for n, got in enumerate(curve["smoothed"], start=1):
        weights = 0.8 ** np.arange(n)[::-1]
        assert got == pytest.approx(np.average(losses[:n], weights=weights), rel=1e-12)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3, 3, 2, 2, 8.1, 9, 9], [3, 2, 2, 8.1]),  # over 4 times the lowest
        ([3, 3, 2, 2, 7.9, 7, 7], [3, 2, 2, 7.9, 7, 7]),
        ([3, 3, 2, math.nan, 1, 1], [3, 2]),
        ([3, 3, 2, math.inf, 1, 1], [3, 2]),
        ([3, 3, 2, FloatingPointError("gradient norm is nan"), 1, 1], [3, 2]),
    ],
)
def test_a_sweep_ends_when_the_loss_diverges_and_a_loss_belongs_to_the_rate_before_it(losses, kept):
    curve = sweep_of(losses)
    assert curve["loss"] == kept and curve["lr"] == [10.0**step for step in range(len(kept))]


def same(a, b):
    """Trees of tensors and values, equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("before", [0, 3], ids=["new optimizer", "optimizer with state"])
@pytest.mark.parametrize("error", [None, core.Stop("enough"), RuntimeError("broken")])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_sweep_puts_back_weights_optimizer_and_scaler_bit_for_bit(before, error, dtype):
    torch.manual_seed(0)
    model, precision = nn.Linear(3, 2), core.Precision(dtype, World())
    optimizer = core.make_optimizer(model, "adamw", 0.1)

    def take(step, lr):
        if error and step == 4:
            model(torch.ones(1, 3)).sum().backward()  # gradients that nobody used
            raise error
        x = torch.full((2, 3), math.inf if dtype == "fp16" and step == 2 else 1.0 + step)  # fp16: overflows
        precision.scaler.scale(model(x).square().sum()).backward()
        core.optimizer_step(optimizer, precision, 1.0, lr, 0.85)
        return 1.0

    def state():
        return copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.scaler.state_dict()))

    for step in range(before):
        take(step + 10, 1e-2)
    kept, seen = state(), []
    run = lambda step, lr: seen.append(take(step, lr)) or 1.0  # noqa: E731
    try:
        lr_finder.sweep(run, [1e-3] * 9, 0.8, model, optimizer, precision)
    except BaseException as raised:
        assert raised is error
    assert len(seen) == (4 if error else 10)
    assert same(state(), kept) and (len(kept[1]["state"]) == 2) == bool(before)
    assert all(weight.grad is None for weight in model.parameters())
    take(20, 1e-2)
    assert not same(state(), kept)  # what it compares does move


def test_the_longest_fall_is_found_through_noise():
    assert lr_finder.longest_fall(np.array([5, 4, 6, 3, 2, 7, 1])) == (0, 6)
    assert lr_finder.longest_fall(np.array([1, 2, 3])) == (0, 0)
    assert lr_finder.longest_fall(np.array([9, 1, 8, 7, 6, 0.5, 9])) == (0, 5)
    assert lr_finder.longest_fall(np.array([3])) == (0, 0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        y = rng.permutation(8)
        subsets = (c for n in range(1, 9) for c in itertools.combinations(range(8), n))
        falls = [c for c in subsets if all(y[i] > y[j] for i, j in itertools.pairwise(c))]
        most = max(map(len, falls))
        assert lr_finder.longest_fall(y) in {(c[0], c[-1]) for c in falls if len(c) == most}


def test_suggestions_on_a_curve_drawn_by_hand():
    lrs = [10.0**k for k in range(-8, 1)]
    y = [5.2, 5.1, 5.0, 4.0, 1.0, 0.5, 0.4, 0.3, 9.0]  # falls most at 1e-5, from 5.0 to 1.0 over two decades
    suggestions = lr_finder.suggest(lrs, y)
    assert suggestions == {"steepest": 1e-5, "valley": lrs[3], "minimum/10": pytest.approx(1e-2)}
    rising = dict.fromkeys(["steepest", "valley", "minimum/10"])
    assert lr_finder.suggest(lrs, sorted(y)) == lr_finder.suggest([], []) == rising
    assert lr_finder.suggest(lrs, [5 - 1e-4 * k for k in range(9)]) == rising  # less than a thousandth


def test_a_sweep_that_only_takes_back_its_own_rise_suggests_nothing():
    """A trained model's loss rises and falls again, yet never below where it stood before the sweep."""
    lrs, nothing = [10.0**k for k in range(-8, 1)], dict.fromkeys(["steepest", "valley", "minimum/10"])
    y = [2.05, 2.4, 2.6, 2.5, 2.3, 2.1, 2.0, 2.2, 9.0]
    assert lr_finder.suggest(lrs, y)["minimum/10"] is not None
    assert lr_finder.suggest(lrs, y, before=2.0) == lr_finder.suggest(lrs, y, before=1.5) == nothing
    assert lr_finder.suggest(lrs, y, before=2.1) == lr_finder.suggest(lrs, y)
    curve = sweep_of([1.9, *y])
    assert curve["before"] == 1.9 and curve["loss"][0] == 2.05


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("span", [(1e-6, 1.0), (3e-8, 7e-8), (1e-10, 10.0)])
def test_the_plot_in_the_terminal_fits_100_columns_and_shows_every_mark(scale, span):
    lrs = np.geomspace(*span, 60).tolist()
    y = [scale * (3 - 2 / (1 + math.exp(-(i - 30) / 4)) + (i > 50) * (i - 50)) for i in range(60)]
    marks = {"steepest": lrs[20], "valley": lrs[40], "minimum/10": None}
    lines = lr_finder.text_plot(lrs, y, marks).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == 12 + 3
    curve, axis = "\n".join(lines[:12]), lines[12]
    assert 20 < curve.count("*") <= 60 and axis.count("S") == axis.count("V") == 1 and "M" not in axis
    assert axis.index("S") < axis.index("V") and lines[14].split("  ")[-2:] == ["S steepest", "V valley"]
    rows = [lines[:12].index(line) for line in lines[:12] if "*" in line]
    assert lines[rows[0]].index("*") < lines[rows[-1]].index("*")  # high on the left, low on the right


def test_a_flat_curve_can_be_drawn():
    lines = lr_finder.text_plot([1e-6, 1e-3, 1.0], [2.0, 2.0, 2.0], {}).splitlines()
    assert sum(line.count("*") for line in lines) == 3 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("losses", [[], [2.0]], ids=["no loss", "one loss"])
def test_a_sweep_that_ended_at_once_is_shown_not_a_crash(tmp_path, losses):
    """--find_steps 1 is legal, and the first update may already diverge."""
    said = []
    run = SimpleNamespace(folder=tmp_path, say=said.append, metrics=lambda *_: None)
    curve = {"lr": [1e-6] * len(losses), "loss": losses, "smoothed": losses}
    lr_finder.show_curve(run, curve, lr_finder.suggest(curve["lr"], curve["smoothed"]))
    assert said and (tmp_path / "lr_finder.json").exists()


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt_scratch")) for name in SCRIPTS]
)
def test_every_script_finds_rates_and_leaves_its_weights_as_they_were(script, size):
    """On its own batches; a run of no steps has the same weights. Nothing is left that could be resumed."""
    flags = [*SHORT[script], "--mode", "find_lr", "--find_steps", 12, "--find_from", 1e-5, "--find_to", 1e-3]
    found = run(script, *flags, size=size)
    folder = newest()
    curve = json.loads((folder / "lr_finder.json").read_text())
    np.testing.assert_allclose(curve["lr"], np.geomspace(1e-5, 1e-3, 12))
    assert curve["suggestions"] == found["lr_finder"] and len(set(curve["loss"])) == 12
    assert (folder / "lr_finder.png").stat().st_size > 5000 and not list(folder.glob("checkpoints/*"))
    lines = (folder / "log.txt").read_text()
    assert ("multiplier" in lines) == (script == "run_lora") and "forecast  12 steps" in lines
    untrained = run(script, *SHORT[script], "--max_steps", 0, size=size)["weights_sha256"]
    weights = found["weights_sha256"]
    assert untrained == (core.joint_hash([weights]) if script == "run_preference" else weights)
    assert launch(script, *flags, "--out", "out", "--resume_timestamp", "auto", size=size) == [2] * size
    assert "--resume_timestamp goes with" in Path("out.txt").read_text()
