"""The language-model head as a card computes it (on a CPU): padded vocabulary, both formulas of the slope."""

import itertools
import sys
import types
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from ranks import everywhere

import core
import lab.train.loss
from lab.train import cpu
from lab.train.loss import (
    FAST,
    _by_triton,
    _compiled_slope,
    _eager_slope,
    _fused_slope,
    _head_on_card,
    _slope,
    _whole_rows,
    linear_cross_entropy,
)

FORMULAS = {"eager": _eager_slope, "fused": _fused_slope}


@pytest.fixture(params=FORMULAS)
def on_card(request, monkeypatch):
    """The CPU stands in for a card."""
    formula = FORMULAS[request.param]
    everywhere(
        monkeypatch.setattr, lab.train.loss, "_slope", lambda logits, *rest: formula(logits.clone(), *rest)
    )
    everywhere(monkeypatch.setattr, lab.train.loss, "_head_on_cpu", _head_on_card)


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
        loss = linear_cross_entropy(terms, bias, labels)
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
@pytest.mark.parametrize("V", [97, 128, pytest.param(50_257, marks=pytest.mark.slow)])
def test_in_fp64_it_is_cross_entropy(V, terms, bias, chunk, on_card, monkeypatch):
    everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(chunk))
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
    everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(20))
    given = inputs(V, terms, bias, torch.float32)
    got = losses_and_slopes(*given, torch.autocast("cpu", torch.bfloat16))
    wanted = by_the_formula(*given)
    assert error(got[0], wanted[0]) < 3e-4
    assert {slope.dtype for slope in got[1]} == {torch.float32}
    for mine, reference in zip(got[1], wanted[1], strict=True):
        assert error(mine, reference) < 3e-3


@pytest.mark.parametrize("terms", [1, 2])
def test_in_fp16_it_is_fp64_within_a_thousandth(terms, on_card, monkeypatch):
    """Also gradients whose sum over rows is beyond fp16, and probabilities that it would round to nothing."""
    everywhere(monkeypatch.setattr, lab.train.loss, "_head_dtype", lambda weight, kind: torch.float16)
    everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(300))
    made, bias, labels = inputs(4096, terms, True, torch.float32, N=600)
    with torch.no_grad():
        made[0][0].mul_(40).clamp_(-200, 200)  # 300 rows x 256 x 200 is over 65,504
        made[0][1].mul_(0.01)
        labels[:] = 7
    got = losses_and_slopes(made, bias, labels, nullcontext())
    wanted = by_the_formula(made, bias, labels)
    assert error(got[0], wanted[0]) < 1e-3
    for mine, reference in zip(got[1], wanted[1], strict=True):
        assert mine.isfinite().all() and error(mine, reference) < 1e-3


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, None])
def test_what_is_measured_is_measured_in_the_weights_dtype(half, padded, bias, monkeypatch):
    """Also where fp16 would overflow, and where bf16 would call many ids the likeliest."""
    if padded:  # as on a card
        whole, linear = _whole_rows, cpu.linear
        everywhere(monkeypatch.setattr, cpu, "linear", lambda x, w: linear(x, whole(w, w.dtype)))
    terms, b, labels = inputs(97, 2, bias, torch.float32)
    terms = [(300 * x, w) for x, w in terms] + [(torch.full((48, 1), -1.0), torch.full((97, 1), 1e5))]
    autocast = torch.autocast("cpu", half) if half else nullcontext()
    with autocast:
        log_probs, hits = core.token_log_probs(terms, b, labels)
    scores = sum(x.double() @ w.double().t() for x, w in terms) + (0 if b is None else b.double())
    wanted = scores.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert log_probs.shape == wanted.shape and log_probs.dtype == torch.float64
    torch.testing.assert_close(log_probs, wanted, rtol=1e-3, atol=0.1)  # fp32 numbers near 100,000
    assert (hits == (scores.argmax(-1) == labels)).float().mean() > 0.95


class FakeCard(torch.Tensor):
    """Says that it lies on a card."""

    @property
    def device(self):
        return torch.device("cuda", 0)


@pytest.fixture
def on_no_card(monkeypatch):
    everywhere(monkeypatch.setattr, lab.train.loss, "_compiled_slope", None)
    everywhere(monkeypatch.setattr, lab.train.loss, "FAST", list(FAST[1:]))
    everywhere(monkeypatch.setattr, lab.train.loss, "notes", [])
    everywhere(monkeypatch.setattr, lab.train.loss, "LARGE", 100)
    logits = torch.randn(4, 64).as_subclass(FakeCard)
    return logits, None, torch.tensor([1, 2, 3, 4]), 60


def test_where_nothing_compiles_the_other_formula_is_used_and_said_once(on_no_card, monkeypatch):
    calls = []

    def compile(*args, **how):
        def fails(*args):
            calls.append(1)
            raise RuntimeError("no C compiler\nsecond line")

        return fails

    monkeypatch.setattr(torch, "compile", compile)
    everywhere(monkeypatch.setattr, lab.train.loss, "_eager_slope", lambda *given: "eager")
    assert [_slope(*on_no_card), _slope(*on_no_card)] == ["eager", "eager"]
    (note,) = lab.train.loss.notes
    assert len(calls) == 1 and note.endswith("RuntimeError: no C compiler")


def kernel_that(monkeypatch, computes):
    """Puts a stand-in for lab/train/head_kernel.py, which needs Triton, in front of torch.compile."""
    calls, stand_in = [], types.ModuleType("lab.train.head_kernel")

    def slope_in_place(*given):
        calls.append(len(given[0]))
        return computes(*given)

    stand_in.slope_in_place = slope_in_place
    monkeypatch.setitem(sys.modules, "lab.train.head_kernel", stand_in)
    everywhere(monkeypatch.setattr, lab.train.loss, "_is_checked", False)
    lab.train.loss.FAST.insert(0, ("its Triton kernel", _by_triton))
    return calls


def test_a_kernel_is_held_against_torch_once_on_a_few_rows_and_then_believed(on_no_card, monkeypatch):
    logits, _, y, V = on_no_card
    calls = kernel_that(monkeypatch, _eager_slope)
    wide, labels = logits.repeat(5, 1), y.repeat(5)
    wanted = _eager_slope(wide.clone(), None, labels, V)
    for _ in range(2):
        got = _slope(wide.clone().as_subclass(FakeCard), None, labels, V)
        assert torch.equal(got[0], wanted[0]) and got[1] == wanted[1]
    assert calls == [8, 20, 20] and not lab.train.loss.notes


@pytest.mark.parametrize("off", [0, 1], ids=["slope", "loss"])
def test_a_kernel_that_computes_something_else_is_left_out_and_said(off, on_no_card, monkeypatch):
    def wrong(*given):
        found = list(_eager_slope(*given))
        found[off] = found[off] * 1.1
        return found

    kernel_that(monkeypatch, wrong)
    del lab.train.loss.FAST[1:]
    logits, _, y, V = on_no_card
    slope, loss = _slope(logits.clone().as_subclass(FakeCard), None, y, V)
    wanted = _eager_slope(logits.clone(), None, y, V)
    assert torch.allclose(slope, wanted[0], atol=1e-6) and torch.allclose(loss, wanted[1])
    (note,) = lab.train.loss.notes
    assert note.startswith("NOTE the head goes without its Triton kernel") and "other numbers" in note


def test_out_of_memory_is_no_reason_to_give_up_compiling(on_no_card, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda *args, **how: full)
    with pytest.raises(torch.OutOfMemoryError):
        _slope(*on_no_card)
    assert lab.train.loss._compiled_slope is full and not lab.train.loss.notes


def test_few_logits_and_a_cpu_are_not_compiled(on_no_card, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **how: pytest.fail("compiled"))
    logits, *rest = on_no_card
    _slope(logits.as_subclass(torch.Tensor), *rest)
    everywhere(monkeypatch.setattr, lab.train.loss, "LARGE", 1000)
    _slope(logits, *rest)
    assert _compiled_slope is None
