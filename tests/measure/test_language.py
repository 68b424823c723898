"""Held-out loss, intervals and the NOT LEARNING alarm of a language model."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys.gpt import ids, random_gpt

import core
import gpt_scratch as script
from core import World
from lab.data.cache import BadRows
from lab.data.text import split_pieces
from lab.measure import language

FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("error", FULL)
def test_running_out_of_memory_says_what_would_help_and_other_faults_stay(error):
    model = random_gpt()

    def hidden(input_ids):
        raise error

    model.hidden = hidden
    blocks = core.Blocks(np.zeros(90, np.uint16), 16)
    with pytest.raises(
        core.UserError, match="memory with 3 rows of 16 tokens at once: use a smaller --eval_batch"
    ):
        core.evaluate(model, blocks, script.Config(eval_batch=3), World())
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        core.evaluate(model, blocks, script.Config(eval_batch=3), World())


def measured(model, blocks, unigram=None, eval_batch=3):
    cfg = script.Config(dtype="fp64", eval_batch=eval_batch)
    sums = core.evaluate(model, blocks, cfg, World())
    return sums, core.measure(sums, blocks, np.ones(23) if unigram is None else unigram)


@pytest.mark.parametrize("eval_batch", [1, 3, 64])
@pytest.mark.parametrize("length", [16 * 5 + 1, 16 * 5 + 2, 16 * 6, 9])
def test_the_measured_loss_is_the_mean_cross_entropy_of_the_whole_stream(eval_batch, length):
    model, stream = random_gpt(positions="rotary", std=0.15, dropout=0.5), ids(length, vocab_size=23)
    losses, hits = [], []
    with torch.no_grad():
        for start in range(0, length - 1, 16):
            x, y = stream[start : start + 16], stream[start + 1 : start + 17]
            logits = model(x[None, : len(y)])[0]
            losses += F.cross_entropy(logits, y, reduction="none").tolist()
            hits += (logits.argmax(-1) == y).tolist()
    blocks = core.Blocks(stream.numpy().astype(np.uint16), 16)
    sums, m = measured(model, blocks, eval_batch=eval_batch)
    assert len(losses) == length - 1 == m["targets"] and sums.shape == (len(blocks), 3)
    assert m["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert m["accuracy"] == pytest.approx(np.mean(hits), rel=1e-12)
    assert m["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-12)
    first = [losses[:16], losses[-((length - 2) % 16 + 1) :]]
    assert [sums[0, 0], sums[-1, 0]] == pytest.approx([sum(first[0]), sum(first[1])], rel=1e-12)


def test_the_unigram_loss_is_that_of_the_training_frequencies_plus_one():
    stream, unigram = ids(16 * 5 + 4).numpy(), np.random.default_rng(0).integers(0, 50, 23)
    m = measured(random_gpt(), core.Blocks(stream, 16), unigram)[1]
    share = (unigram + 1) / (unigram.sum() + 23)
    assert m["unigram_loss"] == pytest.approx(-np.log(share[stream[1:]]).mean(), rel=1e-12)


def test_a_model_that_guesses_uniformly_raises_the_alarm_and_one_that_knows_does_not():
    stream = np.random.default_rng(0).geometric(0.3, 16 * 60).clip(1, 22)  # frequencies tell a lot
    unigram, blocks = np.bincount(stream, minlength=23), core.Blocks(stream, 16)
    model = random_gpt()
    with torch.no_grad():
        model.wte.weight.zero_()  # tied: all logits are 0
    sums, m = measured(model, blocks, unigram)
    assert m["loss"] == pytest.approx(math.log(23), rel=1e-12)
    assert m["alarm"].startswith(f"NOT LEARNING: loss {math.log(23):.4f}")
    assert f"{m['unigram_loss']:.4f}" in m["alarm"] and "token frequencies" in m["alarm"]
    sums[:, 0] = (m["unigram_loss"] - 0.8) * sums[:, 2]
    knows = core.measure(sums, blocks, unigram)
    assert knows["alarm"] is None and knows["loss"] == pytest.approx(m["unigram_loss"] - 0.8)
    low, high = knows["above_unigram_interval"]
    assert low < -0.8 < high < 0


def test_the_interval_counts_a_block_as_often_as_it_has_targets():
    blocks = core.Blocks(ids(16 * 30 + 2).numpy(), 16)  # 30 of 16 targets, one of 1
    targets = blocks.targets(range(31))
    sums = np.c_[np.where(targets == 1, 1000.0, 16.0), np.zeros(31), targets]
    m = core.measure(sums, blocks, np.ones(23))
    assert m["loss"] == pytest.approx(1480 / 481) and m["loss_interval"][0] == pytest.approx(1)
    assert m["loss_interval"][1] < 12  # the last one drawn 3 times: 7; were all blocks equal: over 90


def test_known_words_are_those_of_the_training_text():
    text = np.array([ord(c) for c in "the cat sat on the mat"])
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    tokens = SimpleNamespace(tokenizer=tokenizer, parts={"train": text})
    assert language.known_words(Path(), tokens, 2) is None
    samples = ["old", "The cat, dog 4 m", "sat. mats a"]  # the last word of each is cut
    Path("samples.jsonl").write_text("".join(json.dumps({"text": sample}) + "\n" for sample in samples))
    assert language.known_words(Path(), tokens, 2) == 3 / 5  # the, cat, sat; neither dog nor mats
    assert language.known_words(Path(), tokens, 2, most=7) == 2 / 5


def test_the_bytes_of_a_text_are_its_own_whatever_its_tokens_spell():
    Path("texts").mkdir()
    texts = {"a": "plain text of letters only. ", "ü": "Ünïcödé wörds, lost by this tokenizer. "}
    for name in ("ascii", "bytes"):
        for letter, text in texts.items():
            Path("texts/one.txt").write_text(text * 200)
            corpus = core.Corpus("texts", name, val_share=0.2, test_share=0.2)
            tokens = core.open_corpus(corpus, World())
            sizes, spelt = language.sizes_of(tokens, "test"), core.token_bytes(tokens.tokenizer)
            pieces = [piece for part, piece, _ in split_pieces(corpus, BadRows()) if part == "test"]
            assert sizes[tokens.parts["test"]].sum() == pytest.approx(len("".join(pieces).encode()))
            assert (sizes == spelt).all() == (name == "bytes" or letter == "a")
    tokens.text_bytes.clear()  # of a cache that was made before
    assert (language.sizes_of(tokens, "test") == spelt).all()
