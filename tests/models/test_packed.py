"""Packed rows by the kernel of cards. Here a CPU has one: formulas in place of its two operators, below
torch's own varlen_attn."""

import functools
import itertools

import pytest
import torch
from toys.gpt import LLAMA, ids, random_gpt

import core
from lab.models import int4, loha_lokr, packed
from lab.train import compiling, loss

varlen = pytest.importorskip("torch.nn.attention.varlen")  # came with torch 2.10
SEGMENTS = torch.tensor([[0] * 7 + [1] * 8 + [-1], [0] + [1] * 10 + [2] * 5, [-1] * 3 + [-2] * 13])
STARTS = [0, 7, 15, 16, 17, 27, 32, 35, 48]


def attended(q, k, v):
    """One row (t, H, D): what it attends to (H, t, D), by which weights (H, t, t)."""
    q, k, v = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v))
    unseen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(unseen, -torch.inf).softmax(-1)
    return weights @ v, weights


def slopes(q, k, v, slope):
    """By q, k and v, each (t, H, D), of one row."""
    (_, weights), shared = attended(q, k, v), k.shape[1]
    heads = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v, slope))
    q, k, v, slope = heads
    by_weights = slope @ v.mT
    by_scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    by_k, by_v = (x.unflatten(0, (shared, -1)).sum(1) for x in (by_scores.mT @ q, weights.mT @ slope))
    return [x.transpose(0, 1) for x in (by_scores @ k, by_k, by_v)]


def forward(q, k, v, starts, starts_k, longest, longest_k, dropout, causal, *_, **how):
    """aten::_flash_attention_forward"""
    assert torch.equal(starts, starts_k) and starts.dtype == torch.int32 and starts[-1] == len(q)
    assert longest == longest_k == starts.diff().max() and (dropout, causal) == (0, True)
    assert (how["window_size_left"], how["window_size_right"]) == (-1, 0)
    assert q.dtype == k.dtype == v.dtype and all(x.stride(-1) == 1 for x in (q, k, v))
    seen.append(q.dtype)
    bounds = itertools.pairwise(starts.tolist())
    out = torch.cat([attended(q[a:b], k[a:b], v[a:b])[0].transpose(0, 1) for a, b in bounds])
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float), *(q.new_zeros(0) for _ in range(3))


def backward(slope, q, k, v, out, sums, starts, starts_k, longest, *_, **how):
    """aten::_flash_attention_backward"""
    assert slope.stride(-1) == 1 and longest == starts.diff().max() and how["window_size_right"] == 0
    bounds = itertools.pairwise(starts.tolist())
    rows = [slopes(q[a:b], k[a:b], v[a:b], slope[a:b]) for a, b in bounds]
    return tuple(map(torch.cat, zip(*rows, strict=True)))


seen = []  # dtypes of what the kernel was given


@pytest.fixture
def kernel(monkeypatch):
    """A CPU with the kernel, for any dtype. Yields how often it ran."""
    seen.clear()
    packed._works.cache_clear()
    monkeypatch.setattr(packed, "has_kernel", lambda device, config, training: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield seen
    packed._works.cache_clear()


def loss_and_slopes(model):
    x, labels = ids(3, 16), ids(3, 16, seed=2).masked_fill(SEGMENTS == -1, core.IGNORE_INDEX)
    total = model(x, labels, SEGMENTS)
    return [total, *torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])]


GROUPED = LLAMA | {"n_kv_head": 2, "qk_norm": True}


@pytest.mark.parametrize("options", [{"checkpointing": True}, LLAMA, GROUPED], ids=["gpt2", "llama", "gqa"])
def test_the_kernel_and_the_mask_give_the_same_loss_and_slopes(options, kernel, monkeypatch):
    model = random_gpt(**options).train()
    by_kernel = loss_and_slopes(model)
    assert len(kernel) == (4 if "checkpointing" in options else 2)  # of two layers
    monkeypatch.setattr(packed, "has_kernel", lambda *given: False)
    kernel.clear()
    by_mask = loss_and_slopes(model)
    assert not kernel
    torch.testing.assert_close(by_kernel, by_mask, rtol=1e-9, atol=1e-9)  # fp64


def test_spans_are_the_runs_of_a_number_and_positions_count_within_them():
    rows, positions = packed.spans(SEGMENTS, "cpu")
    assert rows.starts.tolist() == STARTS and rows.starts.dtype == torch.int32 and rows.longest == 13
    assert torch.equal(positions, packed.dense_mask(SEGMENTS, "cpu")[1])
    one = packed.spans(torch.zeros(1, 1, dtype=torch.int64), "cpu")
    assert (one[0].starts.tolist(), one[0].longest, one[1].tolist()) == ([0, 1], 1, [[0]])


@pytest.mark.parametrize("kind", ["full", "lora", "loha", "lokr", "int4"])
def test_the_kernel_is_given_half_precision_by_every_kind_of_layer(kind, kernel):
    model = random_gpt(dtype=torch.float32, std=0.02, positions="rotary").train()
    if kind == "lora":
        core.add_lora(model, 2, 4)
        core.narrow_base(model, "bf16")
    elif kind == "int4":
        int4.insert_fake_quant(model, 8)
        int4.switch(model, True)
    elif kind != "full":
        loha_lokr.add_adapters(model, kind, 2, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss_and_slopes(model)
    assert set(kernel) == {torch.bfloat16}
    q, k, v = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8).bfloat16()
    packed.attention(q, k, v, packed.spans(SEGMENTS[:1], "cpu")[0])  # norms of q and k may leave fp32
    assert kernel[-1] == torch.bfloat16


@pytest.mark.slow
def test_packs_of_all_sizes_share_a_compiled_block(kernel, monkeypatch):
    """A single row is a graph of its own; fullgraph: a break would raise. Where two sizes of the first batch
    are equal by chance there is one more."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    whole = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    model = random_gpt(0.02, torch.float32, n_layer=1).train()
    core.wrap_ddp(model, core.World(), model.h, True)
    compiling.switch(True)
    for rows, length, each in [(3, 8, 5), (2, 12, 3), (1, 9, 2), (4, 16, 1), (2, 14, 14)]:
        segments = torch.arange(length).expand(rows, length) // each
        model(ids(rows, length), ids(rows, length), segments).backward()
    torch.compiler.reset()
    assert kernel and len(graphs) == 2


def test_only_half_precision_on_nvidias_cards_without_dropout_has_it(monkeypatch):
    card, config, asked = torch.device("cuda"), random_gpt(n_kv_head=2, dropout=0.1).config, []
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(packed, "_works", lambda *given: asked.append(given) or True)
    assert packed.has_kernel(card, config, training=False)
    assert asked == [(card, torch.get_autocast_dtype("cuda"), 8, 2)]
    assert not packed.has_kernel(card, config, training=True)
    assert not packed.has_kernel(torch.device("cpu"), config, training=False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    assert not packed.has_kernel(card, config, training=False)


def works(groups=1):
    """Whether the CPU's kernel passes its trial, and what is noted."""
    packed._works.cache_clear()
    loss.notes.clear()
    found = [packed._works(torch.device("cpu"), torch.bfloat16, 8, groups) for _ in range(2)]
    noted = list(loss.notes)
    loss.notes.clear()
    packed._works.cache_clear()
    return found, noted


def test_a_kernel_is_tried_once_against_the_mask_and_left_out_with_a_note(kernel, monkeypatch):
    assert works() == works(groups=2) == ([True, True], [])
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *_, window_size: q + k + v)
    passed, (note,) = works()
    assert passed == [False, False] and len(note) <= 100
    assert note.startswith("NOTE packed rows go by a mask, which is slower: RuntimeError: it computes ")
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, *_, is_causal: q)
    assert "TypeError" in works()[1][0]  # torch 2.10's


def test_without_the_kernel_the_mask_is_used():
    passed, (note,) = works()  # the CPU has none
    assert passed == [False, False] and "NotImplementedError" in note
