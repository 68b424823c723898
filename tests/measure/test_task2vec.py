"""Task2Vec: both procedures against slow ones on transformers' GPT-2."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import everywhere
from torch import nn
from toys.task2vec import END, PROCEDURES, T, V, embed, random_gpt, real_labels, text
from transformers import GPT2Config, GPT2LMHeadModel

import core
from core import GPT, GPTConfig, UserError
from lab.measure import task2vec
from lab.measure.task2vec import Batch
from lab.models import gpt_formats

LLAMA = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False, "n_inner": 24},
}
SHAPES = {
    "gpt2": {},
    "untied": {"tie_head": False},
    "llama": LLAMA | {"tie_head": False},
    "llama tied": LLAMA,
}


def twins(tied=True):
    """transformers' GPT-2, and ours of the same weights, in fp64."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_positions": T, "n_layer": 2, "n_head": 2, "n_embd": 16}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": tied}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **off)).double()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    config = GPTConfig(V, T, 2, 2, 16, tie_head=tied)
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    return theirs, core.with_weights(config, gpt_formats.from_theirs(weights, config, "gpt2")).eval()


def numbers(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def close(a, b, rtol):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=0)


class Recorder:
    """Stands in for task2vec.draw: keeps each matrix of probabilities and what was drawn from it."""

    def __init__(self):
        self.probs, self.drawn = [], []

    def __call__(self, probs):
        self.probs.append(probs.detach().clone())
        self.drawn.append(torch.multinomial(self.probs[-1], 1)[:, 0])
        return self.drawn[-1]


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    everywhere(monkeypatch.setattr, task2vec, "draw", recorder)
    return recorder


def their_rows(theirs):
    """transformers keeps GPT-2's matrices as (in, out), the embeddings as (V, C): rows are the first axis."""
    return [
        (m.weight, (1,) * (m.weight.dim() - 1)) for m in theirs.transformer.modules() if hasattr(m, "weight")
    ]


def our_rows(model):
    """The same by name, for shapes that transformers keeps otherwise."""
    found = []
    for name, weight in model.named_parameters():
        if name.endswith(".weight") and name != "lm_head.weight":
            embedding = name in ("wte.weight", "wpe.weight")
            found.append((weight, () if weight.dim() == 1 else (1,) if embedding else (0,)))
    return found


def mean_loss(hidden, head, labels, ignored=-100):
    return F.cross_entropy((hidden @ head.t()).flatten(0, 1), labels.flatten(), ignore_index=ignored)


def tune(hidden_of, head, parts, labels, ignored, epochs):
    optimizer = torch.optim.AdamW([head], lr=5e-5, eps=1e-8, weight_decay=1e-4)
    for _ in range(epochs):
        for (ids, _), expected in zip(parts, labels, strict=True):
            optimizer.zero_grad()
            mean_loss(hidden_of(ids), head, expected, ignored).backward()
            optimizer.step()


def mean_squares(rows, losses):
    total = 0
    for loss in losses:
        for weight, _ in rows:
            weight.grad = None
        loss().backward()
        squares = [(weight.grad**2).mean(axes) if axes else weight.grad**2 for weight, axes in rows]
        total = total + torch.cat(squares)
    return (total / len(losses)).numpy()


def slow_clean(hidden_of, output, rows, batch, epochs, recorder):
    head = output.detach().clone().requires_grad_(True)
    parts = list(zip(batch.ids.split(8), batch.lengths.split(8), strict=True))
    labels = [real_labels(*part) for part in parts]
    tune(lambda ids: hidden_of(ids).detach(), head, parts, labels, -100, epochs)
    drawn, probs, losses = list(recorder.drawn), list(recorder.probs), []
    for (ids, _), expected in zip(parts * (len(drawn) // len(parts)), itertools.cycle(labels)):
        with torch.no_grad():
            ours = (hidden_of(ids) @ head.t())[expected != -100].softmax(-1)
        torch.testing.assert_close(probs.pop(0), ours, rtol=1e-9, atol=0)  # it is these that it drew from
        expected = expected.masked_scatter(expected != -100, drawn.pop(0))
        losses.append(lambda ids=ids, e=expected: mean_loss(hidden_of(ids), head.detach(), e))
    assert not drawn
    return mean_squares(rows, losses)


def slow_published(model, hidden_of, output, rows, batch, epochs, recorder):
    """Moves `output`: the embedding, where that is the output matrix."""
    model.requires_grad_(False)
    output.requires_grad_(True)
    parts = list(zip(batch.ids.split(8), batch.lengths.split(8), strict=True))
    labels = [torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], END)], 1) for ids, _ in parts]
    tune(hidden_of, output, parts, labels, END, epochs)
    model.requires_grad_(True)
    losses = []
    for (ids, _), probs, drawn in zip(parts, recorder.probs, recorder.drawn, strict=True):
        with torch.no_grad():
            ours = (hidden_of(ids) @ output.t()).softmax(-1).flatten(0, 1)
        torch.testing.assert_close(probs, ours, rtol=1e-9, atol=0)
        drawn = drawn.view(ids.shape)
        shifted = torch.cat([drawn[:, 1:], torch.full_like(drawn[:, :1], END)], 1)
        losses.append(lambda ids=ids, e=shifted: mean_loss(hidden_of(ids), output, e, END))
    return mean_squares(rows, losses)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("epochs", [0, 3])
def test_the_clean_procedure_is_that_of_a_plain_loop_over_transformers_gpt2(tied, epochs, recorder):
    theirs, ours = twins(tied)
    theirs.eval()
    batch = text()
    got = embed(ours, batch, epochs=epochs)
    pairs = [int((part - 1).sum()) for part in batch.lengths.split(8)]
    assert [len(drawn) for drawn in recorder.drawn] == pairs  # pads and the last places draw nothing
    output = theirs.lm_head.weight
    slow = slow_clean(
        lambda ids: theirs.transformer(ids).last_hidden_state,
        output, their_rows(theirs), batch, epochs, recorder,
    )  # fmt: skip
    assert (got >= 0).all() and (got > 0).mean() > 0.9
    close(got, slow, 1e-8)  # weight decay moves the last by 1e-7


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("epochs", [0, 3])
def test_the_published_procedure_is_that_of_a_plain_loop_over_transformers_gpt2(
    tied, epochs, recorder, monkeypatch
):
    everywhere(monkeypatch.setattr, task2vec, "DROPOUT", 0)
    theirs, ours = twins(tied)
    theirs.eval()
    batch = text()
    got = embed(ours, batch, "published", epochs)
    assert [len(drawn) for drawn in recorder.drawn] == [8 * T, 8 * T, 3 * T]  # every place draws, pads too
    assert any((drawn == END).any() for drawn in recorder.drawn)  # so that it matters that they do not count
    before = theirs.transformer.wte.weight.detach().clone()
    slow = slow_published(
        theirs, lambda ids: theirs.transformer(ids).last_hidden_state,
        theirs.lm_head.weight, their_rows(theirs), batch, epochs, recorder,
    )  # fmt: skip
    moved = not torch.equal(before, theirs.transformer.wte.weight)
    assert moved == (tied and epochs > 0)  # the reference does what the published code does
    close(got, slow, 1e-8)


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_untied_probe_and_one_of_llamas_shape_have_the_slow_loops_embedding(
    shape, procedure, recorder, monkeypatch
):
    everywhere(monkeypatch.setattr, task2vec, "DROPOUT", 0)
    model = random_gpt(torch.float64, **SHAPES[shape])
    batch = text(11)
    got = embed(model, batch, procedure)
    output = model.wte.weight if model.config.tie_head else model.lm_head.weight
    if procedure == "clean":
        slow = slow_clean(model.hidden, output, our_rows(model), batch, 2, recorder)
    else:
        slow = slow_published(model, model.hidden, output, our_rows(model), batch, 2, recorder)
    close(got, slow, 1e-8)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_in_fp32_the_embedding_is_that_of_fp64(procedure, monkeypatch):
    """The path that runs are made with (oneDNN's products), given the same targets."""
    everywhere(monkeypatch.setattr, task2vec, "DROPOUT", 0)
    recorder = Recorder()
    everywhere(monkeypatch.setattr, task2vec, "draw", recorder)
    exact = embed(random_gpt().double(), text(), procedure)
    replay = iter(recorder.drawn)
    everywhere(monkeypatch.setattr, task2vec, "draw", lambda probs: next(replay))
    got = embed(random_gpt(), text(), procedure)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-6 * exact.max())
    assert abs(1 - task2vec.distances(got[None], exact[None])[0, 0] - 1) < 1e-4


def test_samples_are_fisher_passes_whose_squares_are_averaged(recorder):
    theirs, ours = twins()
    got = embed(ours, text(11), samples=3)
    assert len(recorder.drawn) == 6 and not torch.equal(recorder.drawn[0], recorder.drawn[2])
    slow = slow_clean(
        lambda ids: theirs.eval().transformer(ids).last_hidden_state,
        theirs.lm_head.weight, their_rows(theirs), text(11), 2, recorder,
    )  # fmt: skip
    close(got, slow, 1e-8)


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("shape", ["gpt2", "untied"])
def test_the_probe_is_left_as_it_was(shape, procedure):
    model = random_gpt(**SHAPES[shape])
    before = numbers(model)
    embed(model, text(), procedure)
    assert_same(numbers(model), before)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert not any(module.training for module in model.modules())
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    assert all(block.attn.dropout == 0 for block in model.h)


def test_the_head_that_is_tuned_is_a_copy_and_it_moves_towards_the_batch():
    model, batch = random_gpt(), text()
    before = numbers(model)
    head = task2vec.tune_head(model, batch, 30)
    assert_same(numbers(model), before)
    assert not head.requires_grad and head.data_ptr() != model.wte.weight.data_ptr()
    labels = real_labels(batch.ids, batch.lengths)
    with torch.no_grad():
        hidden = model.hidden(batch.ids)
        assert mean_loss(hidden, head, labels) < mean_loss(hidden, model.wte.weight, labels) - 0.01


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_every_batch_begins_with_a_fresh_probe(procedure):
    """Embeddings must not depend on the batches before them: earlier versions of the API's did."""
    model, first, second = random_gpt(), text(seed=1), text(seed=2)
    alone = embed(model, first, procedure)
    other = embed(model, second, procedure)
    again = embed(model, first, procedure)
    assert np.array_equal(alone, again)
    assert task2vec.distances(alone[None], other[None])[0, 0] > 0.01


def test_clean_draws_no_dropout_even_of_a_probe_in_training_mode():
    model = random_gpt()
    expected = embed(model, text())
    noisy = task2vec.with_dropout(random_gpt()).train()
    assert np.array_equal(embed(noisy, text()), expected)
    assert not noisy.training


@pytest.mark.parametrize("place", ["embedding", "attention", "block"])
def test_published_has_dropout_of_a_tenth_at_each_of_gpt2s_places(place, monkeypatch):
    """With the other places turned off again, dropout at the one still shows in the Fisher pass."""
    model = random_gpt()
    probe = task2vec.tune_tied(model, text(), END, 0)
    rates = [m.p for m in probe.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.1] * 3 and [block.attn.dropout for block in probe.h] == [0.1] * 2 and probe.training
    for block in probe.h:
        block.attn.dropout *= place == "attention"
        block.dropout.p *= place == "block"
    probe.dropout.p *= place == "embedding"
    ids = text().ids
    assert not torch.equal(probe.hidden(ids), probe.hidden(ids))


def test_clean_does_not_look_at_pads():
    """Whatever stands behind a text's end, the embedding is the same; published sees it."""
    model, batch = random_gpt(torch.float64), text()
    other = batch.ids.clone()
    pads = torch.arange(T) >= batch.lengths[:, None]
    other[pads] = torch.randint(V, (int(pads.sum()),), generator=torch.Generator().manual_seed(3))
    changed = Batch(other, batch.lengths)
    close(embed(model, batch), embed(model, changed), 1e-12)
    assert np.abs(embed(model, batch, "published") - embed(model, changed, "published")).max() > 1e-6


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("n", [1, 3, 9])
def test_small_mini_batches_and_rows_of_a_single_pair_count(procedure, n, recorder, monkeypatch):
    """The last mini-batch is smaller (n 9: it is one row of one pair) and weighs as much as the others."""
    everywhere(monkeypatch.setattr, task2vec, "DROPOUT", 0)
    theirs, ours = twins()
    theirs.eval()
    batch = text(n)
    batch.lengths[-1] = 2
    batch.ids[-1, 2:] = END
    got = embed(ours, batch, procedure)
    assert len(recorder.drawn) == math.ceil(n / 8)
    common = {"output": theirs.lm_head.weight, "rows": their_rows(theirs), "batch": batch, "epochs": 2}
    common |= {"hidden_of": lambda ids: theirs.transformer(ids).last_hidden_state, "recorder": recorder}
    if procedure == "clean":
        assert len(recorder.drawn[-1]) == {1: 1, 3: 1 + 2 + 1, 9: 1}[n]
        slow = slow_clean(**common)
    else:
        slow = slow_published(theirs, **common)
    close(got, slow, 1e-8)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_a_mini_batch_without_any_target_adds_nothing_and_no_nan(procedure, monkeypatch):
    """Texts of one token only (clean), and nothing but drawn end tokens (published)."""
    batch = Batch(torch.full((3, T), END), torch.ones(3, dtype=torch.int64))
    if procedure == "published":
        everywhere(monkeypatch.setattr, task2vec, "draw", lambda probs: torch.full((len(probs),), END))
    got = embed(random_gpt(), batch, procedure)
    assert got.shape and not got.any()


def test_a_probe_whose_output_has_a_bias_is_refused():
    model = random_gpt(tie_head=False, head_bias=True)
    for procedure in PROCEDURES:
        with pytest.raises(UserError, match="head_bias"):
            embed(model, text(), procedure)


def test_the_fisher_diagonal_of_a_linear_softmax_model_is_its_closed_form():
    """The squared gradient of a mean of n losses is p (1 - p) x^2 in the mean, summed over rows, over n^2."""
    torch.manual_seed(0)
    n, width, classes, passes = 5, 3, 4, 2500
    x = torch.randn(n, width, dtype=torch.float64)
    weight = torch.randn(classes, width, dtype=torch.float64).requires_grad_(True)
    probs = (x @ weight.t()).softmax(-1).detach()

    def draws():
        for i in range(passes):
            logits = x @ weight.t()
            targets = task2vec.draw(probs)
            if i % 2:  # the two forms of a pass: a loss, and a gradient by what the loss reads
                yield F.cross_entropy(logits, targets), None
            else:
                yield logits, (probs - F.one_hot(targets, classes)) / n

    exact = torch.einsum("nv,nc->vc", probs * (1 - probs), x.square()).numpy() / n**2
    got = task2vec.fisher_rows([(weight, 1)], draws())
    close(got, exact.mean(1), 5 * 1.5 / math.sqrt(passes))  # a square of about a normal: sd 1.4 of its mean
    got = task2vec.fisher_rows([(weight, 0)], draws())
    close(got, exact.mean(0), 5 * 1.5 / math.sqrt(passes))


@pytest.mark.slow
def test_the_clean_embedding_of_the_last_norm_is_its_closed_form():
    """Over many samples, from the model's own probabilities: targets are drawn from those, at their place."""
    model, batch, samples = random_gpt(), text(5), 800
    got = embed(model, batch, epochs=0, samples=samples)[-16:]
    reads, labels = [], real_labels(batch.ids, batch.lengths)
    model.ln_f.register_forward_hook(lambda module, given, out: reads.append((given[0], out)))
    with torch.no_grad():
        model.hidden(batch.ids)
    (given, out), real = reads[0], labels != -100
    z = F.layer_norm(given[real], (16,))  # what the weight multiplies
    probs = (out[real] @ model.wte.weight.t()).softmax(-1)
    mean = probs @ model.wte.weight
    variance = probs @ model.wte.weight.square() - mean.square()
    exact = (z.square() * variance).sum(0) / len(z) ** 2
    close(got, exact.detach().numpy(), 4 * 1.5 / math.sqrt(samples))


def test_rows_are_averaged_over_the_axis_that_is_named_and_vectors_kept():
    """Also over passes, and in the order of the weights."""
    torch.manual_seed(0)
    a, b, c = (torch.zeros(size).requires_grad_(True) for size in ((2, 3), (4,), (3, 5)))
    slopes = [[torch.randn(w.shape) for w in (a, b, c)] for _ in range(2)]
    passes = [(sum((w * s).sum() for w, s in zip((a, b, c), one, strict=True)), None) for one in slopes]
    got = task2vec.fisher_rows([(a, 1), (b, None), (c, 0)], iter(passes))
    squares = [torch.stack(pair).square().mean(0) for pair in zip(*slopes, strict=True)]
    expected = [*squares[0].mean(1), *squares[1], *squares[2].mean(0)]
    close(got, torch.stack(expected).numpy(), 1e-6)


def on_meta(**config):
    with torch.device("meta"):
        return GPT(GPTConfig(50257, **config))


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_by_gpt2_small_has_134993_entries_in_transformers_order(tied):
    model = on_meta(tie_head=tied)
    named = {weight: name for name, weight in model.named_parameters()}
    found = [(named[weight], weight, axis) for weight, axis in task2vec.weights(model)]
    sizes = [weight.shape[1 if axis == 0 else 0] for _, weight, axis in found]
    assert sum(sizes) == 50257 + 1024 + 12 * (5 * 768 + 3072) + 768 == 134_993
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config())
    modules = [(name, m) for name, m in theirs.transformer.named_modules() if hasattr(m, "weight")]
    assert [name for name, _, _ in found] == [f"{name}.weight" for name, _ in modules]
    assert sizes == [len(module.weight) for _, module in modules]
    assert not any("bias" in name or "lm_head" in name for name, _, _ in found)
    axes = {name.removesuffix(".weight").split(".", 2)[-1]: axis for name, _, axis in found}
    assert axes == {
        **{"wte": 1, "wpe": 1, "ln_1": None, "ln_2": None, "ln_f": None},
        **{"attn.c_attn": 0, "attn.c_proj": 0, "mlp.c_fc": 0, "mlp.c_proj": 0},
    }


def test_the_embedding_of_llamas_shape_has_its_gate_and_no_positions():
    model = random_gpt(**LLAMA, tie_head=False)
    assert len(embed(model, text())) == V + 2 * (6 * 16 + 24) + 16  # c_proj of the MLP reads n_inner 24
