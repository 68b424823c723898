"""Schedules and optimizers against torch's and against published curves."""

import itertools
import math
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from toys.sft import config

import core
from core import World
from lab.train import optim


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


def schedule_of(kind, lr=1e-3, warmup=0.3, **more):
    return SimpleNamespace(schedule=kind, lr=lr, warmup=warmup, beta1=0.9, **{"min_lr": 0.0, **more})


@pytest.mark.parametrize(("warmup", "share"), [(0.1, 0.25), (0.0, 1.0), (0.3, 0.0)])
def test_wsd_is_transformers_behind_its_warm_up(warmup, share):
    from transformers import get_wsd_schedule

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    parts = {"num_warmup_steps": warmup * 200, "num_decay_steps": share * 200, "num_training_steps": 200}
    theirs = get_wsd_schedule(optimizer, **parts, decay_type="1-sqrt", min_lr_ratio=0.05)
    cfg = schedule_of("wsd", 2e-3, warmup, min_lr=1e-4, wsd_decay=share)
    for step in range(200):
        if step >= warmup * 200:
            assert core.lr_at(cfg, step, 200) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_wsd_stays_at_its_peak_whatever_length_is_still_to_come_and_falls_behind_a_long_warm_up():
    cfg = schedule_of("wsd", warmup=0.0, wsd_decay=0.2)
    assert {core.lr_at(cfg, 70, length) for length in (88.0, 90.5, 100, 1000)} == {cfg.lr}
    late = schedule_of("wsd", warmup=0.9, wsd_decay=0.5)
    rates = [core.lr_at(late, step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 89 and rates[90] == cfg.lr > rates[91] > rates[-1] > 0


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 7, 20, 333])
def test_one_cycle_is_torchs_in_rate_and_beta1(total):
    cfg = schedule_of("one_cycle", lr=0.02, cycle_beta1=True)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.99))
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=total, pct_start=0.3)
    for step in range(total):
        group = optimizer.param_groups[0]
        assert core.lr_at(cfg, step, total) == pytest.approx(group["lr"], rel=1e-9), step
        assert core.beta1_at(cfg, step, total) == pytest.approx(group["betas"][0], rel=1e-12), step
        optimizer.step()
        if step + 1 < total:
            theirs.step()


@pytest.mark.parametrize(
    ("kind", "cycle"), [("one_cycle", False), ("linear", True), ("cosine", True), ("gpt3", True)]
)
def test_beta1_stays_unless_one_cycle_may_move_it(kind, cycle):
    cfg = schedule_of(kind, cycle_beta1=cycle)
    assert {core.beta1_at(cfg, step, 50) for step in range(50)} == {0.9}


def test_one_cycle_draws_journal_004s_published_curve():
    cfg = schedule_of("one_cycle", cycle_beta1=True)
    published = {0: "4.0e-05", 2_999: "1.0e-03", 5_000: "8.1e-04", 8_780: "7.3e-05", 9_999: "4.0e-09"}
    assert {step: f"{core.lr_at(cfg, step, 10_000):.1e}" for step in published} == published
    beta1 = [core.beta1_at(cfg, step, 10_000) for step in (0, 2_999, 9_999)]
    assert beta1 == pytest.approx([0.95, 0.85, 0.95], abs=1e-12)


@pytest.mark.parametrize("total", [300, 3_000, 299])
def test_gpt3_rises_in_a_line_falls_by_cosine_and_stays_at_a_tenth(total):
    cfg = schedule_of("gpt3", lr=6e-4, warmup=0.1)
    lrs = np.array([core.lr_at(cfg, step, total) for step in range(total)])
    rising, end = round(0.1 * total), 260 / 300 * total
    np.testing.assert_allclose(lrs[:rising], 6e-4 * np.arange(1, rising + 1) / rising, rtol=1e-12)
    steps = np.arange(rising, math.ceil(end))
    cosine = 0.5 * (1 + np.cos(np.pi * (steps - rising) / (end - rising)))
    np.testing.assert_allclose(lrs[rising : len(steps) + rising], 6e-5 + 5.4e-4 * cosine, rtol=1e-12)
    np.testing.assert_allclose(lrs[math.ceil(end) :], 6e-5, rtol=1e-12)
    assert len(lrs[math.ceil(end) :]) == total - math.ceil(end) > 30


def test_the_first_and_last_steps_of_short_schedules_are_finite():
    kinds = typing.get_args(core.Schedule)
    for kind, total, warmup in itertools.product(kinds, (1, 2, 3), (0.0, 0.5, 1.0)):
        cfg = schedule_of(kind, warmup=warmup, wsd_decay=0.2)
        lrs = [core.lr_at(cfg, step, total) for step in range(total)]
        assert all(0 < lr <= 1e-3 * (1 + 1e-12) for lr in lrs), (kind, total, warmup)


def test_without_warm_up_the_first_step_is_the_peak():
    cfg, total = config("run_lora", "--preset", "run_17"), 3000
    assert core.lr_at(cfg, 0, total) == pytest.approx(3e-5, rel=1e-12)  # low + (lr - low) is rounded
    assert core.lr_at(cfg, total // 2, total) == pytest.approx(2e-5, rel=1e-12)  # half way of a cosine
    last = 1e-5 + 2e-5 * (1 - math.cos(math.pi / total)) / 2
    assert core.lr_at(cfg, total - 1, total) == pytest.approx(last, rel=1e-12)


def test_with_a_warm_up_of_all_steps_the_last_one_is_the_peak():
    cfg, total = config("run_lora", "--preset", "run_17", "--warmup", 1.0), 3000
    assert core.lr_at(cfg, 0, total) == pytest.approx(3e-5 / total, rel=1e-12)
    assert core.lr_at(cfg, total // 2 - 1, total) == pytest.approx(1.5e-5, rel=1e-12)
    assert core.lr_at(cfg, total - 1, total) == pytest.approx(3e-5, rel=1e-12)


@pytest.mark.parametrize(("preset", "peak"), [("run_5", 600), ("run_16", 900)])
def test_the_peak_comes_behind_the_warm_up(preset, peak):
    cfg = config("run_instruct" if preset == "run_5" else "run_lora", "--preset", preset)
    rates = [core.lr_at(cfg, step, 3000) for step in range(3000)]
    assert [max(rates), rates[peak - 1], rates[peak]] == pytest.approx([cfg.lr] * 3, rel=1e-12)
    assert rates[peak - 2] < cfg.lr > rates[peak + 1]
    assert rates[0] == pytest.approx(cfg.lr / peak, rel=1e-12)
    assert rates[-1] >= 1e-5 and rates[-1] == pytest.approx(1e-5, rel=1e-4)  # a step before the cosine's end


def block(width=5):
    """A model of one block, named as blocks are: 0.linear.weight."""
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(7, width), "norm": nn.LayerNorm(width)}
    return nn.ModuleList([nn.ModuleDict(layers)]).double()


def stepped(optimizer, model, steps, first=0):
    """The weights after these steps of drawn gradients."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        core.optimizer_step(optimizer, core.Precision("fp64", World()), 1.0, 0.01)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", typing.get_args(core.Optimizer))
def test_every_optimizer_goes_on_from_its_state_to_the_same_weights_bit_for_bit(name, tmp_path):
    straight, first, second = (block() for _ in range(3))
    expected = stepped(core.make_optimizer(straight, name, 0.1), straight, 5)
    optimizer = core.make_optimizer(first, name, 0.1)
    weights = stepped(optimizer, first, 2)
    assert not torch.equal(weights[0], expected[0])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(first.state_dict())
    again = core.make_optimizer(second, name, 0.1)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(map(torch.equal, stepped(again, second, 3, first=2), expected))


@pytest.mark.parametrize("name", typing.get_args(core.Optimizer))
def test_the_state_is_counted_before_it_is_there(name):
    model = block()
    model[0]["linear"].bias.requires_grad_(False)
    optimizer = core.make_optimizer(model, name, 0.1)
    expected = optim.state_numbers(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    core.optimizer_step(optimizer, core.Precision("fp64", World()), None, 0.01)
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert sum(value.numel() for value in kept) == expected > 0


def test_adafactor_is_its_formula_in_the_first_step():
    """Shazeer and Stern 2018: squares' means by row and column, a step clipped to a mean size of one, times
    the weights' size, times the rate."""
    weight, slope = (torch.randn(4, 3, generator=torch.Generator().manual_seed(n)).double() for n in (0, 1))
    p = nn.Parameter(weight.clone())
    optimizer = core.make_optimizer(nn.ParameterList([p]), "adafactor", 0.1)
    p.grad = slope.clone()
    core.optimizer_step(optimizer, core.Precision("fp64", World()), None, 0.02)
    squares = slope**2
    guess = squares.mean(1, keepdim=True) * squares.mean(0, keepdim=True) / squares.mean()
    step = slope / guess.sqrt()
    step /= max(1.0, float(step.pow(2).mean().sqrt()))
    expected = weight * (1 - 0.02 * 0.1) - 0.02 * weight.pow(2).mean().sqrt() * step
    torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)
