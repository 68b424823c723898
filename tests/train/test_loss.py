"""Losses against cross-entropy written out, in chunks and without, with no target at all."""

import half_head
import pytest
import torch
import torch.nn.functional as F
from ranks import everywhere
from toys.gpt import ids, random_gpt

import core
import lab.train.loss
from lab.train.loss import _chunks, linear_cross_entropy, targets_only


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


@pytest.mark.parametrize("every", [True, False])
def test_what_has_a_target_is_what_a_mask_would_take_with_its_slope(every):
    hidden, labels = torch.randn(3, 5, 4, requires_grad=True), ids(3, 5)
    labels[:, :2] = labels[:, :2] if every else core.IGNORE_INDEX
    slope = torch.randn(int((labels >= 0).sum()), 4)
    ours, targets = targets_only(hidden, labels)
    assert torch.equal(ours, hidden[labels >= 0]) and torch.equal(targets, labels[labels >= 0])
    by_mask = torch.autograd.grad(hidden[labels >= 0], hidden, slope)[0]
    assert torch.equal(torch.autograd.grad(ours, hidden, slope)[0], by_mask)


def loss_of(hidden, weight, bias, labels):
    hidden, labels = targets_only(hidden, labels)
    return linear_cross_entropy([(hidden, weight)], bias, labels)


def slices_of(rows):
    return lambda hidden, weight: [slice(start, start + rows) for start in range(0, len(hidden), rows)]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("frozen", [[], [0], [0, 2]], ids=["none", "first", "both"])
def test_the_loss_of_two_terms_is_cross_entropy_of_their_sum(chunk, frozen, monkeypatch):
    """As LoRA's head has it; what is frozen gets no gradient and the others the right one."""
    if chunk:
        everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(chunk))
    torch.manual_seed(0)
    weights = [torch.randn(40, 8).double(), torch.randn(3, 8).double(), torch.randn(40, 3).double()]
    for i, weight in enumerate(weights):
        weight.requires_grad_(i not in frozen)
    hidden, labels = torch.randn(24, 8).double().requires_grad_(), ids(24, 1, vocab_size=40)[:, 0]
    terms = [(hidden, weights[0]), (0.5 * hidden @ weights[1].t(), weights[2])]
    ours = linear_cross_entropy(terms, None, labels)
    theirs = F.cross_entropy(sum(x @ w.t() for x, w in terms), labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    wanted = [hidden, *(w for w in weights if w.requires_grad)]
    for mine, reference in zip(
        torch.autograd.grad(ours, wanted, retain_graph=True), torch.autograd.grad(theirs, wanted), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(terms, None, labels), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100], ids=lambda chunk: f"chunks of {chunk}")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [0, 5, 24])
@pytest.mark.parametrize("size", [1, 1000], ids=["moderate logits", "huge logits"])
def test_the_loss_without_all_logits_is_cross_entropy(chunk, bias, ignored, size, monkeypatch):
    if chunk:
        everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(chunk))
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, "requires_grad": True}
    inputs = [torch.randn(4, 6, 8, **kind), torch.randn(40, 8, **kind)] + [torch.randn(40, **kind)] * bias
    scaled = [inputs[0] * size, *inputs[1:]]
    labels = ids(4, 6, vocab_size=40)
    labels.view(-1)[torch.randperm(24)[:ignored]] = core.IGNORE_INDEX
    b = scaled[2] if bias else None
    ours = loss_of(scaled[0], scaled[1], b, labels)
    logits = F.linear(*scaled).view(-1, 40)
    theirs = F.cross_entropy(logits, labels.view(-1), ignore_index=core.IGNORE_INDEX, reduction="sum")
    got = torch.autograd.grad(0.37 * ours, inputs, retain_graph=True)
    expected = torch.autograd.grad(0.37 * theirs, inputs)
    near = {"rtol": 1e-12, "atol": 1e-12 * size}  # fp64, sums of up to 24 numbers
    torch.testing.assert_close(ours, theirs, **near)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, **near)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(scaled[0], scaled[1], b, labels), theirs, **near)
    if ignored == 24:
        assert ours.item() == 0 and all((slope == 0).all() for slope in got)


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_loss_has_the_gradients_of_its_logits(tied, monkeypatch):
    everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(5))
    model = random_gpt(tie_head=tied, head_bias=not tied)
    x, labels = ids(2, 16), ids(2, 16, seed=2)
    labels[1, 9:] = core.IGNORE_INDEX
    ours = model(x, labels)
    theirs = F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    weights = list(model.parameters())
    expected = torch.autograd.grad(theirs, weights)
    for mine, reference in zip(torch.autograd.grad(ours, weights), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)  # fp64, slopes up to hundreds


@pytest.mark.parametrize("rows", [0, 1, 7, 4096, 100_000])
@pytest.mark.parametrize("vocabulary", [75, 50_257, 1 << 25])
def test_chunks_cover_every_row_once_and_stay_below_64_mb(rows, vocabulary):
    hidden, weight = torch.empty(rows, 1), torch.empty(vocabulary, 0)
    chunks = _chunks(hidden, weight)
    assert [i for chunk in chunks for i in range(*chunk.indices(rows))] == list(range(rows))
    for chunk in chunks:
        n = len(range(*chunk.indices(rows)))
        assert n == 1 or 4 * (n - 1) * vocabulary <= 64 * 2**20  # rows are rounded up
