"""The language-model head as a card computes it (on a CPU): padded vocabulary, both formulas of the slope."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import core

FORMULAS = {"eager": core._eager_slope, "fused": core._fused_slope}


@pytest.fixture(params=FORMULAS)
def on_card(request, monkeypatch):
    """The CPU stands in for a card."""
    formula = FORMULAS[request.param]
    monkeypatch.setattr(core, "_slope", lambda logits, *rest: formula(logits.clone(), *rest))
    monkeypatch.setattr(core, "_head_on_cpu", core._head_on_card)


def slices_of(rows):
    return lambda hidden, weight: [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def inputs(V, terms, bias, dtype=torch.float64, N=48, C=24, device="cpu"):
    """([(x, weight), ...], bias, labels), all of which want gradients; the second term is an adapter's."""
    torch.manual_seed(V + terms)
    like = {"dtype": dtype, "device": device, "requires_grad": True}
    pairs = [(N, width, 0.5 * width**-0.5) for width in (C, 4)[:terms]]  # logits as large as GPT-2's at first
    made = [(torch.randn(n, c, **like), (torch.randn(V, c, device=device) * s).to(dtype).requires_grad_())
            for n, c, s in pairs]  # fmt: skip
    b = torch.randn(V, **like) if bias else None
    return made, b, torch.randint(V, (N,), device=device)


def losses_and_slopes(terms, bias, labels, autocast):
    with autocast:
        loss = core.linear_cross_entropy(terms, bias, labels)
    wanted = [*itertools.chain(*terms), *([] if bias is None else [bias])]
    return loss, torch.autograd.grad(0.37 * loss, wanted)


def by_the_formula(terms, bias, labels):
    """In fp64, all logits at once."""
    terms = [[t.detach().cpu().double().requires_grad_() for t in term] for term in terms]
    bias = None if bias is None else bias.detach().cpu().double().requires_grad_()
    logits = sum(x @ w.t() for x, w in terms) + (0 if bias is None else bias)
    loss = F.cross_entropy(logits, labels.cpu(), reduction="sum")
    wanted = [*itertools.chain(*terms), *([] if bias is None else [bias])]
    return loss, torch.autograd.grad(0.37 * loss, wanted)


def error(got, wanted):
    """Length of the difference, in lengths of what is wanted."""
    return ((got.detach().cpu().double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("chunk", [48, 20])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("V", [97, 128, 50_257])
def test_in_fp64_it_is_cross_entropy(V, terms, bias, chunk, on_card, monkeypatch):
    monkeypatch.setattr(core, "_chunks", slices_of(chunk))
    given = inputs(V, terms, bias)
    (loss, got), (wanted_loss, wanted) = losses_and_slopes(*given, nullcontext()), by_the_formula(*given)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-12)
    for mine, reference in zip(got, wanted, strict=True):
        assert mine.shape == reference.shape and mine.is_contiguous()
        assert error(mine, reference) < 1e-12


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("V", [97, 192])  # on cards also 50,257 (test_gpu.py): half precision is slow here
def test_in_bf16_it_is_fp64_within_3_thousandths(V, terms, bias, on_card, monkeypatch):
    monkeypatch.setattr(core, "_chunks", slices_of(20))
    given = inputs(V, terms, bias, torch.float32)
    got = losses_and_slopes(*given, torch.autocast("cpu", torch.bfloat16))
    wanted = by_the_formula(*given)
    assert error(got[0], wanted[0]) < 3e-4
    assert {slope.dtype for slope in got[1]} == {torch.float32}
    for mine, reference in zip(got[1], wanted[1], strict=True):
        assert error(mine, reference) < 3e-3
