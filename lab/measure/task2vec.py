"""The diversity coefficient of text: Task2Vec embeddings of batches, and how far they lie apart.

Lee et al. 2023 (arXiv 2306.13840) after Achille et al. 2019. Per batch: a fresh probe, its output matrix
tuned to the batch for some epochs, then the diagonal of its Fisher information by targets drawn from its own
predictions; the embedding is the mean squared gradient per row of every weight but the output matrix. The
coefficient is the mean distance of distinct batches. Two procedures:

published  as the paper's code does it: the output matrix is the embedding and moves with it (each epoch goes
           back through the whole body), dropout is on, pads draw targets (but are masked in attention there,
           not here), and logits at t meet the target drawn at t + 1
clean      an untied copy of the output matrix, no dropout, targets at their own place, no pads. The body is
           frozen while the head is tuned, so what the head reads is computed once
"""

import copy
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from lab.errors import UserError
from lab.measure.statistics import student
from lab.models.gpt import Attention
from lab.train.cpu import linear
from lab.train.loss import IGNORE_INDEX, linear_cross_entropy

MINI_BATCH = 8  # sequences a step; it scales the embedding, since a mini-batch's mean gradient is squared
HEAD = {"lr": 5e-5, "eps": 1e-8, "weight_decay": 1e-4}  # of AdamW
DROPOUT = 0.1  # of the published procedure
EPSILON = 1e-8


@dataclass
class Batch:
    """Sequences, padded on the right with the end token."""

    ids: torch.Tensor  # (N, T)
    lengths: torch.Tensor  # (N,)

    def mini_batches(self, device):
        """(ids (n, T), real (n, T - 1): whether the next token is text), in order."""
        for start in range(0, len(self.ids), MINI_BATCH):
            ids, lengths = (t[start : start + MINI_BATCH] for t in (self.ids, self.lengths))
            yield ids.to(device), (torch.arange(1, ids.shape[1]) < lengths[:, None]).to(device)


def embed(probe, batch, end, procedure="clean", epochs=10, samples=1) -> np.ndarray:
    """(rows,): the embedding of a batch. `probe`, a GPT in evaluation mode, is not changed.

    samples: Fisher passes that are averaged; end: id of the end token. Draws from torch's global generator.
    """
    probe.eval()
    if procedure == "published":
        probe = tune_tied(probe, batch, end, epochs)
        passes = (published_pass(probe, batch, end) for _ in range(samples))
    else:
        head = tune_head(probe, batch, epochs)
        passes = (clean_pass(probe, batch, head) for _ in range(samples))
    return fisher_rows(weights(probe), itertools.chain.from_iterable(passes))


def weights(probe) -> list[tuple[torch.Tensor, int | None]]:
    """(weight, axis to average over) of every module except the output matrix, in order; no biases.

    GPT-2 keeps its linear layers transposed, (in, out): its rows are our columns.
    """
    pairs = []
    for name, module in probe.named_modules():
        if getattr(module, "weight", None) is not None and name != "lm_head":
            axis = None if module.weight.dim() == 1 else 0 if isinstance(module, torch.nn.Linear) else 1
            pairs.append((module.weight, axis))
    return pairs


def fisher_rows(weights, passes) -> np.ndarray:
    """Mean over `passes` of the squared gradient, averaged over an axis of each weight, as one vector.

    passes yields (loss, None), or (hidden states, the gradient of the loss by them).
    """
    total, n = 0, 0
    for output, slope in passes:
        slopes = torch.autograd.grad(output, [weight for weight, _ in weights], slope)
        axes = (axis for _, axis in weights)
        squares = [g.square() if a is None else g.square().mean(a) for g, a in zip(slopes, axes, strict=True)]
        total, n = total + torch.cat(squares), n + 1
    return (total / n).cpu().numpy()


def output_matrix(probe) -> torch.Tensor:
    """(V, C)"""
    if probe.config.head_bias:
        raise UserError("a probe whose output has a bias is not supported: use one without head_bias")
    return probe.wte.weight if probe.config.tie_head else probe.lm_head.weight


def tune_head(probe, batch, epochs) -> torch.Tensor:
    """A copy of the output matrix, tuned to the batch; hidden states of the frozen body are computed once."""
    device = probe.wte.weight.device
    head = output_matrix(probe).detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([head], fused=True, **HEAD)
    with torch.no_grad():
        read = [
            (probe.hidden(ids)[:, :-1][real], ids[:, 1:][real]) for ids, real in batch.mini_batches(device)
        ]
    for _ in range(epochs):
        for hidden, targets in read:
            (linear_cross_entropy([(hidden, head)], None, targets) / max(1, len(targets))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return head.detach()


def clean_pass(probe, batch, head):
    """Passes for fisher_rows: mean loss of each mini-batch on targets drawn from the probe, at every position
    before a token of text. The gradient by the hidden states is (softmax - one-hot) @ head."""
    for ids, real in batch.mini_batches(probe.wte.weight.device):
        hidden = probe.hidden(ids)[:, :-1][real]
        with torch.no_grad():
            slope = linear(hidden, head).softmax(-1)
            targets = draw(slope)
            slope[torch.arange(len(targets), device=slope.device), targets] -= 1
            slope = linear(slope, head.t()) / len(targets)
        yield hidden, slope


def tune_tied(probe, batch, end, epochs):
    """A copy of the probe with dropout, its output matrix (where tied: its embedding, too) tuned."""
    probe = with_dropout(copy.deepcopy(probe)).train().requires_grad_(False)
    head = output_matrix(probe).requires_grad_(True)
    optimizer = torch.optim.AdamW([head], fused=True, **HEAD)
    for _ in range(epochs):
        for ids, _ in batch.mini_batches(head.device):
            labels = ids[:, 1:].masked_fill(ids[:, 1:] == end, IGNORE_INDEX)
            (probe(ids[:, :-1], labels) / (labels != IGNORE_INDEX).sum().clamp(min=1)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return probe.requires_grad_(True)


def with_dropout(probe):
    for module in probe.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = DROPOUT
        if isinstance(module, Attention):
            module.dropout = DROPOUT
    return probe


def published_pass(probe, batch, end):
    """Passes for fisher_rows: every position draws a target, pads too; the target of t + 1 is compared with
    the logits of t, and drawn end tokens do not count."""
    head = output_matrix(probe)
    for ids, _ in batch.mini_batches(head.device):
        hidden = probe.hidden(ids)
        with torch.no_grad():
            targets = draw(linear(hidden.flatten(0, 1), head).softmax(-1)).view(ids.shape)[:, 1:]
        counted = targets != end
        rows = hidden[:, :-1][counted]
        yield linear_cross_entropy([(rows, head)], None, targets[counted]) / max(1, len(rows)), None


def draw(probs) -> torch.Tensor:
    """(N,): a target drawn from each row of probabilities (N, V)."""
    return torch.multinomial(probs, 1)[:, 0]


def distances(first, second) -> np.ndarray:
    """(n, m): cosine distance of a / (a + b) and b / (a + b), for a in first (n, D), b in second (m, D)."""
    table = np.zeros((len(first), len(second)))
    for start in range(0, len(second), 16):  # flat memory
        b = torch.from_numpy(np.stack(second[start : start + 16])).double()
        for i in range(len(first)):
            a = torch.from_numpy(np.array(first[i])).double()
            total = a + b + EPSILON
            nearness = torch.cosine_similarity(a / total, b / total, dim=1)
            table[i, start : start + 16] = (1 - nearness).clamp(min=0).numpy()
    return table


def pairwise(embeddings) -> np.ndarray:
    """(n, n): distances of all pairs, symmetric, 0 on the diagonal."""
    table = np.zeros((len(embeddings), len(embeddings)))
    for i in range(len(embeddings) - 1):
        table[i, i + 1 :] = distances(embeddings[i : i + 1], embeddings[i + 1 :])[0]
    return table + table.T


def coefficient(table) -> float:
    """Mean distance over pairs of different batches; equal batches count with a distance of 0."""
    n = len(table)
    return float(table[np.triu_indices(n, 1)].mean()) if n > 1 else math.nan


def coefficient_interval(table) -> list[float]:
    """95 % interval of the coefficient by jackknife over batches, with Student's t: pairs share
    batches, and a bootstrap of few batches covers too little (52 % with 3, 92 % with 6, simulated). NaN for
    fewer than 3."""
    n, sums = len(table), table.sum(1)
    if n < 3:
        return [math.nan, math.nan]
    without = (sums.sum() - 2 * sums) / ((n - 1) * (n - 2))
    return around(coefficient(table), _jackknife(without), n - 1)


def cross_interval(table) -> list[float]:
    """The same for the mean of distances (n, m) between two sets of batches; either
    set loses one at a time."""
    n, m = table.shape
    if min(n, m) < 3:
        return [math.nan, math.nan]
    by_rows = _jackknife((table.sum() - table.sum(1)) / ((n - 1) * m))
    by_columns = _jackknife((table.sum() - table.sum(0)) / ((m - 1) * n))
    return around(float(table.mean()), by_rows + by_columns, min(n, m) - 1)


def _jackknife(without) -> float:
    """Jackknife variance of a figure, from its values without each of n batches."""
    return float((len(without) - 1) / len(without) * ((without - without.mean()) ** 2).sum())


def around(value, variance, freedom) -> list[float]:
    half = student(freedom) * math.sqrt(variance)
    return [max(0.0, value - half), min(1.0, value + half)]  # no two embeddings are farther apart than 1


class Sequences:
    """Sequences of `length` tokens of a stream: the first of each document (`documents`), or all whole ones
    (`pieces`). A document's end token belongs to it."""

    def __init__(self, tokens, end, length, kind):
        ends = np.concatenate(
            [np.flatnonzero(part == end) + i * CHUNK for i, part in enumerate(chunks(tokens))]
        )
        starts, sizes = ends[:-1] + 1, np.diff(ends)  # with the end token, which is a target, too
        starts, sizes = starts[sizes > 1], sizes[sizes > 1]
        if kind == "pieces":
            counts = np.maximum(1, sizes // length)
            first = np.repeat(np.cumsum(counts) - counts, counts)
            starts = np.repeat(starts, counts) + (np.arange(counts.sum()) - first) * length
            sizes = np.minimum(length, np.repeat(sizes, counts))
        self.tokens, self.starts, self.sizes, self.end = tokens, starts, np.minimum(sizes, length), end
        self.length = length

    def __len__(self):
        return len(self.starts)

    def batch(self, rows) -> Batch:
        ids = np.full((len(rows), self.length), self.end, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : self.sizes[row]] = self.tokens[self.starts[row] : self.starts[row] + self.sizes[row]]
        return Batch(torch.from_numpy(ids), torch.from_numpy(self.sizes[rows].astype(np.int64)))


CHUNK = 1 << 26


def chunks(tokens):
    return (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))


def joined(batches) -> Batch:
    return Batch(torch.cat([b.ids for b in batches]), torch.cat([b.lengths for b in batches]))


def synthetic(shape, vocab_size, end, rng, token=None) -> Batch:
    """The paper's bounds: sequences (N, T) of random tokens (upper), or of one `token` (lower).

    A sequence ends where the end token is drawn (1 in V), and is padded from there.
    """
    ids = rng.integers(vocab_size, size=shape)
    ids[:, 0] = rng.choice(np.delete(np.arange(vocab_size), end), shape[0])
    if token is not None:  # the paper's code has another one in each sequence, its text one for all
        ids = np.where(ids == end, end, token)
    ended = ids == end
    lengths = np.where(ended.any(1), ended.argmax(1) + 1, shape[1])
    ids[np.arange(shape[1]) >= lengths[:, None]] = end
    return Batch(torch.from_numpy(ids), torch.from_numpy(lengths))
