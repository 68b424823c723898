"""The sequences that are embedded, the bounds, and the noise of the draws."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import everywhere
from toys.task2vec import END, PROCEDURES, E, T, drawn, embed, random_gpt, real_labels, text

from core import GPT, GPTConfig
from lab.measure import task2vec
from lab.measure.task2vec import Batch, Sequences

STREAM = np.array([E, 1, 2, 3, 4, 5, E, 6, E, 7, 8, E, E, 1, 3, 5, E], dtype=np.uint16)


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


@pytest.mark.slow
def test_one_token_is_less_diverse_than_a_language_and_that_less_than_random_tokens():
    """By three small probes that know the language (after 60 steps of training 1 of 12 ranked the last two
    otherwise, after 150 none). The published procedure at this size shows the noise of its draws only."""
    rng, found = np.random.default_rng(0), []
    for seed in range(1, 4):
        torch.manual_seed(seed)
        probe = GPT(GPTConfig(WORDS, SHORT, 2, 2, 32))
        optimizer, known = torch.optim.AdamW(probe.parameters(), 1e-2), sentences(rng, 2000)
        for _ in range(150):
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
        assert found[-1][0] < 0.5 * min(found[-1][1:]), found  # at most 0.25 in 12 probes
    one_token, language, uniform = np.mean(found, 0)
    assert one_token < language < uniform, found
