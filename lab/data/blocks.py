"""A stream of token ids as rows for a language model: blocks, or overlapping windows."""

import math

import numpy as np
import torch

from lab.train.device import to_device
from lab.train.loss import IGNORE_INDEX
from lab.train.waits import waiting


class Blocks:
    """A stream of tokens cut into blocks: block i reads block_size tokens from i * block_size and
    predicts the token after each."""

    def __init__(self, tokens, block_size):
        self.tokens, self.block_size = tokens, block_size

    def __len__(self):
        return math.ceil((len(self.tokens) - 1) / self.block_size)

    def first(self, most) -> "Blocks":
        """The first `most` blocks; none: all."""
        return self if most is None else Blocks(self.tokens[: most * self.block_size + 1], self.block_size)

    def targets(self, rows) -> np.ndarray:
        """Number of tokens that each block predicts: block_size, fewer in the last one."""
        return np.minimum(
            self.block_size, len(self.tokens) - 1 - np.asarray(rows, dtype=int) * self.block_size
        )

    @property
    def lengths(self) -> np.ndarray:
        return self.targets(range(len(self)))

    @waiting("data")
    def batch(self, rows, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, block_size); a short last block is padded and masked. Labels stay on
        the host, which knows without a wait where the targets are."""
        ids = np.zeros((len(rows), self.block_size + 1), dtype=np.int64)
        for i, (row, n) in enumerate(zip(rows, self.targets(rows), strict=True)):
            ids[i, : n + 1] = self.tokens[row * self.block_size : row * self.block_size + n + 1]
            ids[i, n + 1 :] = IGNORE_INDEX
        ids = torch.from_numpy(ids)
        return to_device(ids[:, :-1].clamp(min=0), device), ids[:, 1:]


class Windows:
    """Documents in windows of `context` tokens, each `stride` behind the last. A token is a target
    once, in the first window that holds it; in all but the first window it has over context -
    stride tokens before it. `begin`: ids that stand first in every window, as at the front of a document:
    some models know no text without them."""

    def __init__(self, documents, context, stride, begin=()):
        self.begin, stride = torch.tensor(list(begin)), min(stride, context + 1 - max(1, len(begin)))
        self.documents, self.windows = documents, []  # (document, first input, end of inputs, first target)
        for number, ids in enumerate(documents):
            done = 1  # the first token is given
            while done < len(ids):
                end = min(len(ids), max(done + stride, context + 1))
                self.windows.append((number, max(0, end - 1 - context), end - 1, done))
                done = end
        self.lengths = np.array([end - start for _, start, end, _ in self.windows])

    def __len__(self):
        return len(self.windows)

    def target_ids(self) -> list[np.ndarray]:
        """The target ids of each window."""
        return [self.documents[number][first : end + 1] for number, _, end, first in self.windows]

    def groups(self) -> np.ndarray:
        """(windows,): what an interval redraws: documents, or of fewer than FEWEST (a book) stretches of
        neighbouring windows."""
        if len(self.documents) < FEWEST:
            return stretches(len(self))
        return np.array([number for number, *_ in self.windows], dtype=int)

    def batch(self, chosen, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, T), padded on the right; labels on the host."""
        shape = len(chosen), int(self.lengths[chosen].max())
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
        for row, window in enumerate(chosen):
            number, start, end, first = self.windows[window]
            ids = torch.from_numpy(self.documents[number][start : end + 1].astype(np.int64))
            input_ids[row, : end - start] = ids[:-1]
            if start:  # none of the tokens that give way is a target
                input_ids[row, : len(self.begin)] = self.begin
            labels[row, first - 1 - start : end - start] = ids[first - start :]
        return to_device(input_ids, device), labels


FEWEST = 10  # documents that an interval can redraw


def stretches(n) -> np.ndarray:
    """Cuts n neighbouring rows into 100 equal stretches; returns the stretch of each row."""
    return np.arange(n) * min(100, n) // n
