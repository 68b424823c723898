"""A probe, batches and a toy language."""

import itertools

import numpy as np
import torch
from torch import nn

from core import GPT, GPTConfig
from lab.measure import task2vec
from lab.measure.task2vec import Batch, Sequences

V, T, END = 40, 12, 39
PROCEDURES = ["clean", "published"]


def random_gpt(dtype=torch.float32, seed=0, std=0.2, **config):
    """Small, with weights large enough that every part of the model shows in the embedding."""
    torch.manual_seed(seed)
    small = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**small | config)).to(dtype)
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, 1.0 if ".ln" in name or name.startswith("ln") else 0.0, std)
    return model.eval()


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


def embed(model, batch, procedure="clean", epochs=2, seed=0, **how):
    torch.manual_seed(seed)
    return task2vec.embed(model, batch, END, procedure, epochs, **how)


def real_labels(ids, lengths):
    labels = torch.full_like(ids, -100)  # the last place has no next token
    for i, j in itertools.product(range(len(ids)), range(ids.shape[1] - 1)):
        if j + 1 < lengths[i]:
            labels[i, j] = ids[i, j + 1]
    return labels


E = 9


def drawn(stream, length, kind):
    """The whole rows, and the text in them."""
    sequences = Sequences(stream, E, length, kind)
    batch = sequences.batch(np.arange(len(sequences)))
    assert batch.ids.dtype == batch.lengths.dtype == torch.int64
    rows = list(zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True))
    assert all(len(row) == length and row[size:] == [E] * (length - size) for row, size in rows)
    return [row[:size] for row, size in rows]
