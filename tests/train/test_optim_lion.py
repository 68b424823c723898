"""Lion against its formula, and what decays in run_mathqa."""

import numpy as np
import pytest
import torch
from torch import nn
from toys.adapters import OPTIMIZERS, SHAPES, random_gpt

import core
import run_mathqa as script
from core import World
from lab.train import optim


def lion_by_hand(p, slopes, rates, decay, beta1, beta2):
    """Algorithm 2 of Chen et al. 2023; decay is scaled by the rate."""
    m = np.zeros_like(p)
    for g, rate in zip(slopes, rates, strict=True):
        direction = np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
        p = p - rate * (direction + decay * p)
    return p, m


def lion_over(values, decays, betas):
    """(parameters, Lion with a group for each)"""
    params = [nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(params, decays, strict=True)]
    return params, optim.Lion(groups, betas)


def steps(params, optimizer, slopes, rates):
    for at, rate in enumerate(rates):
        for p, of in zip(params, slopes, strict=True):
            p.grad = torch.from_numpy(of[at].copy())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


SHAPE_OF, RATES = [(4, 3), (5,)], [0.1, 0.3, 0.05, 0.2, 0.01, 0.15]


def drawn():
    generator = np.random.default_rng(0)
    values = [generator.normal(size=shape) for shape in SHAPE_OF]
    slopes = [generator.normal(size=(len(RATES), *shape)) for shape in SHAPE_OF]
    slopes[1][:, 2] = 0  # without slope and decay nothing moves: sign(0) is 0
    return values, slopes


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5)])
def test_lion_is_its_formula(betas):
    values, slopes = drawn()
    params, optimizer = lion_over(values, [0.7, 0.0], betas)
    steps(params, optimizer, slopes, RATES)
    for p, value, of, decay in zip(params, values, slopes, (0.7, 0.0), strict=True):
        expected, momentum = lion_by_hand(value, of, RATES, decay, *betas)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
        assert list(optimizer.state[p]) == ["exp_avg"]
        np.testing.assert_allclose(optimizer.state[p]["exp_avg"], momentum, rtol=1e-12, atol=1e-14)
    assert params[1][2] == values[1][2] and params[1][0] != values[1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_tensors_at_once_as_on_a_card_are_to_the_bit_what_each_one_is_by_itself(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 17), (5,), (7, 64), (1,)]
    drawn = [[torch.randn(s, generator=generator, dtype=dtype) for s in shapes] for _ in range(6)]
    whole, single = ([nn.Parameter(value.clone()) for value in drawn[0]] for _ in range(2))
    optimizer, state = optim.Lion([{"params": whole, "weight_decay": 0.3}]), {}
    for p in whole:
        optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
    for grads in drawn[1:]:
        for p, q, grad in zip(whole, single, grads, strict=True):
            p.grad = grad
            with torch.no_grad():
                m = state.setdefault(q, torch.zeros_like(q))
                q.mul_(1 - 0.01 * 0.3).add_(m.lerp(grad, 1 - 0.9).sign_(), alpha=-0.01)
                m.lerp_(grad, 1 - 0.99)
        with torch.no_grad():
            optimizer._update(whole, 0.01, 0.9, 0.99, 0.3)
    for p, q in zip(whole, single, strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["exp_avg"], state[q])


def test_lion_leaves_alone_what_has_no_gradient():
    values, _ = drawn()
    params, optimizer = lion_over(values, [0.7, 0.7], (0.9, 0.99))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    np.testing.assert_allclose(params[0].detach(), values[0] * (1 - 0.07) - 0.1, rtol=1e-12)
    assert np.array_equal(params[1].detach(), values[1]) and params[1] not in optimizer.state


def test_lion_goes_on_from_its_state_as_if_never_stopped(tmp_path):
    values, slopes = drawn()
    params, optimizer = lion_over(values, [0.7, 0.0], (0.9, 0.99))
    steps(params, optimizer, [of[:3] for of in slopes], RATES[:3])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, other = lion_over([p.detach().numpy() for p in params], [0.1, 0.2], (0.5, 0.5))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for of in ((params, optimizer), (again, other)):
        steps(*of, [of[3:] for of in slopes], RATES[3:])
    assert all(torch.equal(one, two) for one, two in zip(params, again, strict=True))
    expected, _ = lion_by_hand(values[0], slopes[0], RATES, 0.7, 0.9, 0.99)
    np.testing.assert_allclose(again[0].detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_decay_but_not_the_embedding_norms_and_biases(shape, optimizer):
    model = random_gpt(tie_head=False, **SHAPES[shape])
    cfg = script.Config(optimizer=optimizer, weight_decay=0.3, beta1=0.8, beta2=0.97)
    of = script.make_optimizer(cfg, model)
    kinds = {"adamw": torch.optim.AdamW, "lion": optim.Lion, "muon": optim.Muon, "adafactor": optim.Adafactor}
    assert type(of) is kinds.get(optimizer, torch.optim.SGD)
    names = {p: name for name, p in model.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in of.param_groups for p in group["params"]}
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    positions = {"wpe.weight"} & set(decays)
    assert set(decays) == set(names.values()) and "lm_head.weight" in linear
    assert {name for name, decay in decays.items() if decay == 0.3} == linear | positions
    assert {name for name, decay in decays.items() if decay == 0} == set(decays) - linear - positions
    assert {"wte.weight", "ln_f.weight", "h.0.ln_1.weight"} <= set(decays) - linear
    for group in of.param_groups:
        if optimizer in ("adamw", "lion", "muon"):
            assert tuple(group["betas"]) == (0.8, 0.97)
        assert group.get("momentum") == (0.9 if optimizer == "sgd" else None)


def test_the_schedule_moves_lions_beta1_and_rate():
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = optim.Lion([{"params": [p], "scale": 0.5}], (0.9, 0.99))
    p.grad = torch.tensor([[1.0, -1.0], [2.0, 0.0]], dtype=torch.float64)
    core.optimizer_step(optimizer, core.Precision("fp64", World()), None, 0.2, beta1=0.7)
    assert optimizer.param_groups[0]["betas"] == (0.7, 0.99)
    assert torch.allclose(p, torch.tensor([[0.9, 1.1], [0.9, 1.0]], dtype=torch.float64))


def test_adafactor_on_a_card_is_torchs_without_its_waits():
    """Its own formula, tried on the CPU, whose tensors pass for a card's."""
    torch.manual_seed(0)
    start = [torch.randn(6, 9), torch.randn(7), 3 * torch.randn(2, 5, 4)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    how = {"lr": 0.02, "weight_decay": 0.1}
    mine, reference = optim.Adafactor(ours, **how), torch.optim.Adafactor(theirs, **how)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = 10.0 ** (step - 2) * torch.randn_like(a)
            b.grad = a.grad.clone()
        reference.step()
        for group in mine.param_groups:
            lists = [[] for _ in range(6)]
            mine._init_group(group, *lists)
            for tensors in zip(*lists, strict=True):
                with torch.no_grad():
                    mine._update(group, *tensors)
    for a, b, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert (a - before).abs().max() > 1e-2
    for one, other in zip(mine.state.values(), reference.state.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
