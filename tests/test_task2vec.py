"""task2vec.py: both procedures against slow ones on transformers' GPT-2, distances and intervals by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import everywhere
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import core
from core import GPT, GPTConfig, UserError
from lab.measure import task2vec
from lab.measure.task2vec import Batch, Sequences
from lab.models import gpt_formats

V, T, END = 40, 12, 39
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
PROCEDURES = ["clean", "published"]


def random_gpt(dtype=torch.float32, seed=0, std=0.2, **config):
    """Small, with weights large enough that every part of the model shows in the embedding."""
    torch.manual_seed(seed)
    small = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**small | config)).to(dtype)
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, 1.0 if ".ln" in name or name.startswith("ln") else 0.0, std)
    return model.eval()


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


def text(n=19, seed=1, vocab_size=V, length=T) -> Batch:
    """Of all lengths from 2 on. The third row is whole, with an end token in its middle and as its last."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size - 1, (n, length), generator=generator)
    lengths = torch.arange(n) % (length - 1) + 2
    if n > 2:
        lengths[2] = length
        ids[2, [4, length - 1]] = vocab_size - 1
    ids[torch.arange(length) >= lengths[:, None]] = vocab_size - 1
    return Batch(ids, lengths)


def numbers(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def embed(model, batch, procedure="clean", epochs=2, seed=0, **how):
    torch.manual_seed(seed)
    return task2vec.embed(model, batch, END, procedure, epochs, **how)


def close(a, b, rtol):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=0)


# the slow references: nothing is kept from one epoch to the next, nothing but torch's own operations


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


def real_labels(ids, lengths):
    labels = torch.full_like(ids, -100)  # the last place has no next token
    for i, j in itertools.product(range(len(ids)), range(ids.shape[1] - 1)):
        if j + 1 < lengths[i]:
            labels[i, j] = ids[i, j + 1]
    return labels


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


# what an embedding leaves, and what it starts from


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


# the Fisher information


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


# distances


def some(n, seed=0, size=50):
    """Of the sizes that squared gradients have, where epsilon is not nothing."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(-16, 3, (n, size))).astype(np.float32)


def by_hand(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    total = a + b + 1e-8
    x, y = a / total, b / total
    return 1 - (x * y).sum() / (np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))


def test_distances_are_the_formula():
    a, b = some(3), some(37, seed=1)  # more than one part of 16
    a[:, :7], b[::2, 3:11] = 0, 0  # tokens that a batch does not have
    expected = [[by_hand(x, y) for y in b] for x in a]
    got = task2vec.distances(a, b)
    assert got.shape == (3, 37) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(task2vec.distances(b, a).T, got, rtol=1e-12)  # symmetric


def test_the_distance_is_0_of_equals_and_1_of_what_shares_nothing():
    a = some(4)
    a[:, :5] = 0
    assert np.abs(np.diag(task2vec.distances(a, a))).max() < 1e-12
    left, right = a.copy(), a.copy()
    left[:, :25], right[:, 25:] = 0, 0
    np.testing.assert_allclose(task2vec.distances(left, right), 1)
    assert abs(task2vec.distances(a[:1], 10 * a[:1])[0, 0]) < 1e-12  # size alone is no distance


def test_pairwise_is_distances_with_nothing_on_the_diagonal():
    a = some(20)
    table, expected = task2vec.pairwise(a), task2vec.distances(a, a)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    assert np.array_equal(table, table.T) and not np.diag(table).any()
    assert task2vec.pairwise(a[:1]).tolist() == [[0]]


def test_the_coefficient_takes_pairs_by_place_so_equal_batches_count_with_0():
    a = some(2)[[0, 0, 1]]
    distance = by_hand(a[0], a[2])
    assert task2vec.coefficient(task2vec.pairwise(a)) == pytest.approx(2 / 3 * distance, rel=1e-12)
    assert task2vec.coefficient(task2vec.pairwise(a[[0, 0, 0]])) == pytest.approx(0, abs=1e-12)
    table = np.array([[0, 0, 0.3], [0, 0, 0.6], [0.3, 0.6, 0]])  # exactly 0, where "non-zero" would drop it
    assert task2vec.coefficient(table) == pytest.approx(0.3, rel=1e-12)
    assert math.isnan(task2vec.coefficient(task2vec.pairwise(a[:1])))


def test_the_order_of_batches_does_not_matter():
    a, order = some(7), np.random.default_rng(0).permutation(7)
    straight, shuffled = task2vec.pairwise(a), task2vec.pairwise(a[order])
    np.testing.assert_allclose(shuffled, straight[np.ix_(order, order)], rtol=1e-12)
    expected = np.mean([by_hand(a[i], a[j]) for i in range(7) for j in range(i)])
    for table in (straight, shuffled):
        assert task2vec.coefficient(table) == pytest.approx(expected, rel=1e-12)


# intervals


def test_intervals_cover_their_point():
    table, cross = task2vec.pairwise(some(9)), task2vec.distances(some(9), some(5, seed=1))
    low, high = task2vec.coefficient_interval(table)
    assert low < task2vec.coefficient(table) < high
    low, high = task2vec.cross_interval(cross)
    assert low < cross.mean() < high


@pytest.mark.parametrize("n", [3, 4, 30])
def test_where_all_distances_are_equal_the_interval_is_a_point(n):
    """A batch is no pair with itself: with its distance of 0 the interval would lie under it."""
    np.testing.assert_allclose(task2vec.coefficient_interval(np.ones((n, n)) - np.eye(n)), 1, rtol=1e-12)


def test_fewer_than_three_batches_have_no_interval():
    for n in (1, 2):
        assert all(math.isnan(value) for value in task2vec.coefficient_interval(np.zeros((n, n))))
        assert all(math.isnan(value) for value in task2vec.cross_interval(np.ones((n, 9))))
    assert not any(math.isnan(value) for value in task2vec.coefficient_interval(np.ones((3, 3)) - np.eye(3)))


@pytest.mark.parametrize("n", [4, 20])
def test_the_interval_of_a_coefficient_holds_the_true_mean_distance_in_about_95_of_100(n):
    """Each batch has a share in all its distances: an interval of pairs as if apart is too small."""
    rng, sets = np.random.default_rng(0), 600
    held, naive = 0, 0
    for _ in range(sets):
        share, noise = rng.normal(0, 0.1, n), np.triu(rng.normal(0, 0.05, (n, n)), 1)
        table = 1 + share[:, None] + share + noise + noise.T
        np.fill_diagonal(table, 0)
        low, high = task2vec.coefficient_interval(table)
        held += low <= 1 <= high
        pairs = table[np.triu_indices(n, 1)]
        naive += abs(pairs.mean() - 1) <= 1.96 * pairs.std(ddof=1) / math.sqrt(len(pairs))
    assert 0.92 < held / sets < 0.98, held / sets  # 0.95 of 3,000; 3 standard errors of 600 sets are 0.027
    assert naive / sets < 0.8


def test_the_interval_of_a_cross_distance_holds_the_true_mean_in_95_of_100():
    rng, n, m, sets = np.random.default_rng(0), 10, 14, 300
    held = 0
    for _ in range(sets):
        rows, columns = rng.normal(0, 0.1, (n, 1)), rng.normal(0, 0.1, m)
        low, high = task2vec.cross_interval(1 + rows + columns + rng.normal(0, 0.05, (n, m)))
        held += low <= 1 <= high
    assert 0.92 < held / sets < 0.995, held / sets  # Welch's freedom, taken low: a little wide


def test_both_sets_of_a_cross_distance_count():
    one = np.random.default_rng(0).normal(0.5, 0.1, (8, 1))
    for table in (np.tile(one, 6), np.tile(one, 6).T):  # only rows differ, only columns
        low, high = task2vec.cross_interval(table)
        assert high - low > 0.05 and low < 0.5 < high


# what is drawn

E = 9
STREAM = np.array([E, 1, 2, 3, 4, 5, E, 6, E, 7, 8, E, E, 1, 3, 5, E], dtype=np.uint16)


def drawn(stream, length, kind):
    """The whole rows, and the text in them."""
    sequences = Sequences(stream, E, length, kind)
    batch = sequences.batch(np.arange(len(sequences)))
    assert batch.ids.dtype == batch.lengths.dtype == torch.int64
    rows = list(zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True))
    assert all(len(row) == length and row[size:] == [E] * (length - size) for row, size in rows)
    return [row[:size] for row, size in rows]


def test_documents_are_the_beginnings_of_documents_padded_with_the_end_token():
    """Where it fits, the end token belongs to them: it is a target."""
    assert drawn(STREAM, 3, "documents") == [[1, 2, 3], [6, E], [7, 8, E], [1, 3, 5]]
    assert drawn(STREAM, 2, "documents") == [[1, 2], [6, E], [7, 8], [1, 3]]
    assert drawn(STREAM, 8, "documents") == [[1, 2, 3, 4, 5, E], [6, E], [7, 8, E], [1, 3, 5, E]]


def test_pieces_are_all_whole_pieces_of_each_document_or_the_short_one_as_it_is():
    """What is left of a document is dropped; no piece goes over a document's end."""
    assert drawn(STREAM, 2, "pieces") == [[1, 2], [3, 4], [5, E], [6, E], [7, 8], [1, 3], [5, E]]
    assert drawn(STREAM, 3, "pieces") == [[1, 2, 3], [4, 5, E], [6, E], [7, 8, E], [1, 3, 5]]
    assert drawn(STREAM, 5, "pieces") == [[1, 2, 3, 4, 5], [6, E], [7, 8, E], [1, 3, 5, E]]


@pytest.mark.parametrize("kind", ["documents", "pieces"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 16, 17])
def test_documents_may_lie_over_the_borders_of_what_is_read_at_once(size, kind, monkeypatch):
    expected = drawn(STREAM, 2, kind)
    everywhere(monkeypatch.setattr, task2vec, "CHUNK", size)
    assert (
        sum(map(len, task2vec.chunks(STREAM))) == len(STREAM) and len(next(task2vec.chunks(STREAM))) == size
    )
    assert drawn(STREAM, 2, kind) == expected


def test_a_batch_has_the_rows_that_are_asked_for_in_their_order():
    sequences = Sequences(STREAM, E, 3, "documents")
    batch = sequences.batch([3, 0, 3])
    assert batch.ids.tolist() == [[1, 3, 5], [1, 2, 3], [1, 3, 5]] and batch.lengths.tolist() == [3, 3, 3]
    both = task2vec.joined([batch, sequences.batch([1])])
    assert both.ids.tolist()[3] == [6, E, E] and both.lengths.tolist() == [3, 3, 3, 2]
    assert len(both.ids) == 4
    assert len(Sequences(np.array([E, E], dtype=np.uint16), E, 3, "documents")) == 0  # an empty document


def test_mini_batches_are_of_eight_in_order_and_say_where_the_next_token_is_text():
    batch = text(19)
    parts = list(batch.mini_batches("cpu"))
    assert [len(ids) for ids, _ in parts] == [8, 8, 3]
    assert torch.equal(torch.cat([ids for ids, _ in parts]), batch.ids)
    real = torch.cat([real for _, real in parts])
    assert real.shape == (19, T - 1) and torch.equal(
        real, real_labels(batch.ids, batch.lengths)[:, :-1] != -100
    )


@pytest.mark.parametrize("token", [None, 4])
def test_a_bound_ends_with_its_first_end_token_and_is_padded_from_there(token):
    vocab_size, end, shape = 20, 7, (4000, 10)
    batch = task2vec.synthetic(shape, vocab_size, end, np.random.default_rng(0), token)
    assert batch.ids.shape == shape and batch.ids.dtype == batch.lengths.dtype == torch.int64
    ended = 0
    for row, size in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True):
        assert size >= 2 and end not in row[: size - 1] and row[size:] == [end] * (10 - size)
        ended += row[size - 1] == end
        assert size == 10 or row[size - 1] == end  # the end token is part of the text
        assert token is None or set(row[: size - 1]) == {token}
    expected = 1 - (1 - 1 / vocab_size) ** 9  # the first token is never the end
    assert abs(ended / shape[0] - expected) < 5 * math.sqrt(expected * (1 - expected) / shape[0])


def test_the_upper_bound_is_uniform_at_each_place():
    vocab_size, end = 10, 7
    batch = task2vec.synthetic((20_000, 6), vocab_size, end, np.random.default_rng(0))
    for place in (0, 1, 4):
        there = batch.ids[batch.lengths > place, place].numpy()
        kinds = vocab_size - 1 if place == 0 else vocab_size
        shares = np.bincount(there, minlength=vocab_size) / len(there)
        expected = np.where((np.arange(vocab_size) == end) & (place == 0), 0, 1 / kinds)
        assert np.abs(shares - expected).max() < 5 * math.sqrt(0.1 / len(there)), place


# what the coefficient says


def test_the_same_seed_gives_the_same_embedding_and_others_a_noise_floor_above_0():
    model, batch = random_gpt(), text()
    for procedure in PROCEDURES:
        one = embed(model, batch, procedure)
        assert np.array_equal(embed(model, batch, procedure), one)
        other = embed(model, batch, procedure, seed=1)
        assert task2vec.distances(one[None], other[None])[0, 0] > 0.01
    torch.manual_seed(0)  # and within one stream of draws: the second call does not begin anew
    pair = [task2vec.embed(model, batch, END, epochs=1) for _ in range(2)]
    assert not np.array_equal(*pair)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_more_samples_lower_the_noise_floor(procedure):
    model, batch = random_gpt(), text()
    floors = []
    for samples in (1, 4, 16):
        torch.manual_seed(0)
        found = [task2vec.embed(model, batch, END, procedure, 1, samples) for _ in range(3)]
        floors.append(task2vec.coefficient(task2vec.pairwise(np.stack(found))))
    assert floors[0] > 1.5 * floors[1] > 1.5**2 * floors[2] > 0, floors


def test_successive_batches_of_a_text_differ():
    """The published loader drew all with one seed. Ours takes the rows that it is told."""
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(END, size=10), END) for _ in range(16)]
    sequences = Sequences(np.concatenate([[END], *documents]).astype(np.uint16), END, T, "documents")
    first, second = sequences.batch(np.arange(8)), sequences.batch(np.arange(8, 16))
    assert not torch.equal(first.ids, second.ids)
    model = random_gpt()
    apart = task2vec.distances(embed(model, first, samples=8)[None], embed(model, second, samples=8)[None])
    again = task2vec.distances(*(embed(model, first, samples=8, seed=s)[None] for s in (0, 1)))
    assert apart[0, 0] > 1.5 * again[0, 0]  # farther than a batch from itself


WORDS, SHORT = 300, 16  # more words than a batch has places, as in GPT-2


def toy_language():
    """(first words, next words): frequencies by Zipf, with preferences of each word for the next."""
    rng = np.random.default_rng(7)
    base = np.append(1 / np.arange(1, WORDS) ** 1.5, 0)
    table = base * rng.gamma(0.3, size=(WORDS, WORDS))
    return base / base.sum(), (table / table.sum(1, keepdims=True)).cumsum(1)


def sentences(rng, n):
    first, following = toy_language()
    ids = np.empty((n, SHORT), dtype=np.int64)
    ids[:, 0] = rng.choice(WORDS, size=n, p=first)
    for j in range(1, SHORT):
        ids[:, j] = np.minimum((following[ids[:, j - 1]] < rng.random((n, 1))).sum(1), WORDS - 2)
    return torch.from_numpy(ids)


def test_one_token_is_less_diverse_than_a_language_and_that_less_than_random_tokens():
    """By three small probes that know the language (after 60 steps of training 1 of 12 ranked the last two
    otherwise, after 300 none). The published procedure at this size shows the noise of its draws only."""
    rng, found = np.random.default_rng(0), []
    for seed in range(1, 4):
        torch.manual_seed(seed)
        probe = GPT(GPTConfig(WORDS, SHORT, 2, 2, 32))
        optimizer, known = torch.optim.AdamW(probe.parameters(), 1e-2), sentences(rng, 2000)
        for _ in range(300):
            ids = known[torch.randint(2000, (32,))]
            loss = F.cross_entropy(probe(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        shape, end = (16, SHORT), WORDS - 1
        texts = [
            [task2vec.synthetic(shape, WORDS, end, rng, token=5) for _ in range(4)],
            [Batch(sentences(rng, 16), torch.full((16,), SHORT)) for _ in range(4)],
            [task2vec.synthetic(shape, WORDS, end, rng) for _ in range(4)],
        ]
        vectors = [np.stack([task2vec.embed(probe, b, end, "clean", 1, 6) for b in one]) for one in texts]
        found.append([task2vec.coefficient(task2vec.pairwise(one)) for one in vectors])
        assert found[-1][0] < 0.5 * min(found[-1][1:]), found  # at most 0.23 in 12 probes
    one_token, language, uniform = np.mean(found, 0)
    assert one_token < language < uniform, found
