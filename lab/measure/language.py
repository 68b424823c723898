"""A language model on held-out rows: summed losses, hits and targets; perplexity, accuracy, bits per byte."""

import json
import re

import numpy as np
import torch

from lab.data.blocks import stretches
from lab.data.tokenizers import token_bytes
from lab.measure.statistics import language_metrics, not_below
from lab.train.batches import ShardedBatches, within_memory
from lab.train.loss import IGNORE_INDEX, targets_only, token_log_probs
from lab.train.precision import Precision
from lab.train.processes import all_reduce_sum, progress


def loss_lines(part, numbers, groups, sums, spelt) -> list[dict]:
    """Lines of losses.jsonl, by which eval.py --compare pairs runs: of each held-out row its part (test,
    val), row, group, loss in nats, hits, targets, and their bytes."""
    columns = (np.asarray(column).tolist() for column in (numbers, groups, sums.round(6), spelt))
    return [
        {
            "part": part,
            "row": row,
            "group": group,
            "nats": nats,
            "hits": int(hits),
            "targets": int(targets),
            "bytes": size,
        }
        for row, group, (nats, hits, targets), size in zip(*columns, strict=True)
    ]


@torch.no_grad()
def evaluate(model, blocks, cfg, world, poll=lambda: None) -> np.ndarray:
    """(blocks, 3) on every rank: summed loss in nats, hits of the likeliest token, targets of each block.

    `model` is unwrapped. `blocks`: Blocks, Windows, Examples: whatever has `lengths` and `batch`, whose
    labels are on the host.
    """
    was_training = model.training
    model.eval()
    precision = Precision(cfg.dtype, world)
    batches = ShardedBatches(blocks.lengths, cfg.eval_batch, world)
    sums = torch.zeros(len(blocks), 3, dtype=torch.float64)
    with progress(len(batches), "evaluating", world) as bar:
        for step in range(len(batches)):
            poll()
            if mine := batches.rank_batch(step):
                input_ids, labels = blocks.batch(mine, world.device)
                with precision.autocast(), within_memory(*input_ids.shape):
                    hidden, targets = targets_only(model.hidden(input_ids), labels)
                    log_probs, hits = token_log_probs(*model.head(hidden), targets)
                rows = torch.tensor(mine)[(labels != IGNORE_INDEX).nonzero()[:, 0]]
                sums.index_add_(
                    0, rows, torch.stack([-log_probs, hits.double(), torch.ones_like(log_probs)], 1)
                )
            bar.update()
    model.train(was_training)
    return all_reduce_sum(world, sums).numpy()


def measure(sums, blocks, unigram, sizes=None) -> dict:
    """Loss per token, perplexity and accuracy with 95 % intervals, beside the loss of token frequencies.

    sums (blocks, 3): of `evaluate`. unigram (V,): counts in training. sizes (V,): bytes of each id, for bits
    per byte. Neighbouring blocks resemble each other, so intervals redraw 100 stretches of the text.
    """
    log_share = np.log((unigram + 1) / (unigram.sum() + len(unigram)))
    plain = -block_sums(log_share, blocks)
    spelt = None if sizes is None else block_sums(sizes, blocks)
    metrics = language_metrics(sums, stretches(len(sums)), plain, spelt)
    return metrics | {"alarm": unigram_alarm(metrics)}


def unigram_alarm(metrics, name="loss") -> str | None:
    """A sentence unless the loss is below that of token frequencies. name: of the loss, in the sentence."""
    if how := not_below(metrics["above_unigram_interval"]):
        loss, guess = metrics["loss"], metrics["unigram_loss"]
        return f"NOT LEARNING: {name} {loss:.4f} {how} that of token frequencies, {guess:.4f}"
    return None


def sizes_of(tokens, part) -> np.ndarray:
    """(V,): bytes of a part's text that each id of opened Tokens stands for: those that it spells, or in
    proportion where the tokenizer loses or changes some of the text."""
    sizes = token_bytes(tokens.tokenizer)
    spelt = int(sizes[tokens.parts[part]].sum())
    size = tokens.text_bytes.get(part, spelt)
    return sizes if size == spelt or not spelt else sizes * (size / spelt)


def block_sums(values, blocks) -> np.ndarray:
    """(blocks,): the sum over each block's targets of `values`, one for each id of the vocabulary."""
    return np.add.reduceat(values[blocks.tokens[1:]], np.arange(0, len(blocks.tokens) - 1, blocks.block_size))


def loss_rows(part, sums, blocks, sizes) -> list[dict]:
    """loss_lines of a stream in blocks."""
    spelt = block_sums(sizes, blocks)
    return loss_lines(part, np.arange(len(sums)), stretches(len(sums)), sums, spelt)


def known_words(folder, tokens, samples, most=5_000_000) -> float | None:
    """Share of the words in a run's last `samples` samples that occur in the first `most` tokens of its
    training text; none without samples."""
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last = [json.loads(line)["text"] for line in lines[-samples:]]
    sampled = [word for text in last for word in words(text)[:-1]]  # the last one is cut
    text = tokens.tokenizer.decode(tokens.parts["train"][:most].tolist()) if sampled else ""
    vocabulary = set(words(text))
    return sum(word in vocabulary for word in sampled) / len(sampled) if sampled else None


def words(text) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())
