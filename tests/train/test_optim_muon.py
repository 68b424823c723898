"""Muon against torch's and against a singular value decomposition; which weights it is for."""

import pytest
import torch
from torch import nn
from toys.gpt import random_gpt

import core
from core import World, optimizer_step
from lab.train import optim


def a_step(optimizer, lr, clip=None, **more):
    optimizer_step(optimizer, core.Precision("fp32", World()), clip, lr, **more)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    """A matrix in a block, as optimizers see it: h.0.mlp.weight."""

    def __init__(self, weight):
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(*weight.T.shape, bias=False)})])
        self.weight.data = weight.clone()

    @property
    def weight(self):
        return self.h[0]["mlp"].weight


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0), (torch.float64, 0.02)])
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_muon_is_torchs_to_the_bit_in_bf16_and_but_for_its_rounding_in_fp64(shape, dtype, rounding):
    weight, lrs = drawn(*shape).to(dtype), (0.1, 0.03, 0.2)
    theirs = nn.Parameter(weight.clone())
    reference = torch.optim.Muon([theirs], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = Block(weight)
    optimizer = core.make_optimizer(ours, "muon", 0.1)
    for step, lr in enumerate(lrs):
        theirs.grad = drawn(*shape, seed=step + 1).to(dtype)
        ours.weight.grad = theirs.grad.clone()
        reference.param_groups[0]["lr"] = lr
        reference.step()
        a_step(optimizer, lr)
    torch.testing.assert_close(ours.weight.detach(), theirs.detach(), rtol=0, atol=rounding)
    assert (theirs - weight).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    u, _, v = torch.linalg.svd(drawn(*shape), full_matrices=False)
    values = torch.logspace(0, -2.5, min(shape), dtype=torch.float64)  # from 1 to 0.003
    sizes = u.T @ optim.orthogonal(u @ values.diag() @ v) @ v.T
    torch.testing.assert_close(sizes, sizes.diagonal().diag(), rtol=0, atol=1e-9)
    assert 0.68 < sizes.diagonal().min() < sizes.diagonal().max() < 1.21
    assert not optim.orthogonal(torch.zeros(shape)).any()  # LoRA's A, before B has moved


def test_a_step_is_a_fifth_of_the_rate_in_every_shape():
    """As AdamW's (Liu et al. 2025), so that its rates carry over."""
    for shape in [(32, 32), (96, 32), (32, 128)]:
        model = Block(drawn(*shape))
        model.weight.grad = drawn(*shape, seed=1)
        a_step(core.make_optimizer(model, "muon", 0.0), 0.01)
        size = float((model.weight.detach() - drawn(*shape)).pow(2).mean().sqrt())
        assert size == pytest.approx(0.2 * 0.01, rel=0.25)


def test_what_is_no_matrix_of_a_block_is_adamws_with_its_rates_decays_and_beta1():
    """A muon step over a GPT; then AdamW's, over the same gradients."""
    ends = {}
    for kind in ("muon", "adamw"):
        model = random_gpt().train()
        optimizer = core.make_optimizer(
            model, kind, 0.1, (0.9, 0.95), 1e-6, {"wte.weight": 0.5}, ("wpe.weight",)
        )
        for step in range(3):
            for n, p in enumerate(model.parameters()):
                p.grad = drawn(*p.shape, seed=100 * step + n).to(p.dtype)
            a_step(optimizer, 0.01, 1.0, beta1=0.85)
        ends[kind] = dict(model.named_parameters())
    differ = {name for name, p in ends["muon"].items() if not torch.equal(p, ends["adamw"][name])}
    assert differ == {name for name, p in ends["muon"].items() if name.startswith("h.") and p.dim() == 2}
    assert differ and {"wte.weight", "wpe.weight"} <= set(ends["muon"]) - differ


def test_muon_without_a_matrix_in_a_block_is_refused():
    head = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))})
    with pytest.raises(core.UserError, match=r"--optimizer muon .* none is trained here: use adamw"):
        core.make_optimizer(head, "muon", 0.1)


def test_muon_goes_with_no_full_sharding():
    model = random_gpt()
    with pytest.raises(core.UserError, match=r"--shard full is for .*: use --shard optimizer"):
        core.wrap_ddp(model, World(size=2), shard="full", optimizer=core.make_optimizer(model, "muon", 0.1))


@pytest.mark.parametrize("steps", [1, 3])
def test_an_fp16_overflow_moves_nothing(steps):
    model = Block(drawn(4, 4).float())
    optimizer, precision = core.make_optimizer(model, "muon", 0.1), core.Precision("fp16", World())
    for _ in range(steps):
        model.weight.grad = torch.full((4, 4), torch.inf)
        precision.scaler.scale(torch.ones(1))
        optimizer_step(optimizer, precision, 1.0, 0.1)
    assert precision.skipped == steps and not optimizer.state
    assert torch.equal(model.weight.detach(), drawn(4, 4).float())
