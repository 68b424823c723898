"""What a tuned run announces, shows of its loss, and forgets of plain text."""

import functools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import everywhere
from toys.results import make_run
from toys.sft import (
    END,
    by_hand,
    config,
    every,
    go,
    initial_model,
    loss_of,
    random_rows,
    tuned,  # noqa: F401 (a fixture)
)

import core
import lab.data.text
import lab.measure.answers
import lab.train.batches
import lab.train.loss
import run_instruct
from core import UserError, World
from lab.errors import OutOfMemory
from lab.measure import tuning


@pytest.mark.parametrize("name", [pytest.param("run_instruct", marks=pytest.mark.slow), "run_lora"])
def test_an_untrained_run_knows_and_forgets_nothing(name):
    result, _ = go(name, "--max_steps", 0, "--sample_tokens", 0, "--plain_blocks", 4, "--answer_rows", 30)
    assert result["step"] == 0 and "alarm" not in result
    assert result["test/first_word"] < 0.1 and result["test/accuracy"] < 0.05
    assert result["plain/forgotten"] == 0 and result["plain/after"] == result["plain/before"]
    cfg = config(name, "--smoke", "--plain_blocks", 4)
    tokenizer = core.load_instructions(cfg, World()).tokenizer
    blocks = tuning.plain_blocks(core.Corpus("python-docs", ""), tokenizer, 128, 4)
    assert blocks.lengths.tolist() == [128] * 4
    model = initial_model(name, cfg, tokenizer)
    # np.average multiplies by the targets what was divided by them
    assert result["plain/before"] == pytest.approx(loss_of(model, blocks, cfg), rel=1e-12)


def test_what_is_forgotten_is_the_difference_to_the_initial_model(tuned):
    result, folder = tuned
    cfg, model, tokenizer = run_instruct.load_model(folder, World())
    blocks = tuning.plain_blocks(tuning.plain_corpus(cfg), tokenizer, cfg.max_length, cfg.plain_blocks)
    losses = [loss_of(m, blocks, cfg) for m in (initial_model("run_instruct", cfg, tokenizer), model)]
    assert [result["plain/before"], result["plain/after"]] == pytest.approx(losses, rel=1e-12)
    low, high = result["plain/forgotten_interval"]
    assert low < result["plain/forgotten"] < high and losses[0] != losses[1]


def test_a_plain_corpus_without_held_out_text_is_an_error(monkeypatch):
    everywhere(
        monkeypatch.setattr,
        lab.data.text,
        "split_pieces",
        lambda *a: [("train", "text", True), ("val", "more", True)],
    )
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    with pytest.raises(UserError, match=r"^one.txt has no held-out document"):
        tuning.plain_blocks(core.Corpus("one.txt", ""), tokenizer, 16, 2)


def test_plain_text_is_the_held_out_documents_each_behind_an_end_token(monkeypatch):
    pieces = [("test", "abc", True), ("train", "zzz", True), ("test", "<|endoftext|>", True)]
    everywhere(monkeypatch.setattr, lab.data.text, "split_pieces", lambda *a: pieces)
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    blocks, end = tuning.plain_blocks(core.Corpus("text", ""), tokenizer, 6, 9), tokenizer.eos_token_id
    ids = blocks.tokens.tolist()
    assert tokenizer.decode(ids) == "<|endoftext|>abc<|endoftext|><|endoftext|>"
    assert [i for i, token in enumerate(ids) if token == end] == [0, 4] and len(ids) == 18  # letters follow
    assert blocks.lengths.tolist() == [6, 6, 5]


def test_plain_text_is_by_default_what_the_base_was_trained_on():
    constants = {"data": "news.txt", "test_share": 0.0, "val_share": 0.3, "split_seed": 7}
    base = make_run("base", "gpt_scratch", files={"gpt.json": {"n_layer": 1}}, **constants)
    corpus = tuning.plain_corpus(SimpleNamespace(plain=None, model=base))
    assert (corpus.data, corpus.val_share, corpus.split_seed) == ("news.txt", 0.3, 7)
    assert tuning.plain_corpus(SimpleNamespace(plain="mine.txt", model=base)).data == "mine.txt"
    for model in (make_run("other", "run_instruct", files={"gpt.json": {"n_layer": 1}}), "gpt2", "tiny:gpt2"):
        assert tuning.plain_corpus(SimpleNamespace(plain=None, model=model)).data == "python-docs"
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    with pytest.raises(UserError, match=r"^--plain: .*news.txt.*, the text of .*: name another, or"):
        run = SimpleNamespace(world=World())
        cfg = SimpleNamespace(plain=None, model=base, plain_blocks=2, max_length=8)
        tuning.plain_text(run, cfg, tokenizer)
    Path("news.txt").write_text("one line\n" * 50)
    assert len(tuning.plain_blocks(corpus, tokenizer, 8, 4)) == 4  # no test part is kept: its validation part


@pytest.mark.parametrize(
    ("model", "plain", "more", "words"),
    [
        (
            "base",
            None,
            0.5,
            "plain text of news.txt  loss 2.0000 before, 2.5000 after: forgotten 0.5000 ±",
        ),
        ("base", "elsewhere/news.txt", -0.5, "after: gained 0.5000 ± 0.0"),
        ("base", "python-docs", 0.5, "after: higher by 0.5000 ± 0.0"),
        ("tiny:gpt2", "python-docs", -0.5, "after: lower by 0.5000 ± 0.0"),
        (
            "gpt2",
            None,
            0.5,
            "plain text of python-docs  loss 2.0000 before, 2.5000 after: forgotten 0.5",
        ),
        ("gpt2", None, 0.0, "after: nothing has changed"),
    ],
)
def test_a_text_that_the_base_never_saw_is_not_forgotten(model, plain, more, words, monkeypatch):
    if model == "base":
        model = make_run("base", "gpt_scratch", files={"gpt.json": {"n_layer": 1}}, data="texts/news.txt")
        words = words.replace("news.txt", "texts/news.txt") if plain is None else words
    noise = np.random.default_rng(0).normal(size=30) * 0.1 * bool(more)
    losses = np.c_[np.full(30, 2.0), np.ones(30)]
    after = losses + np.c_[more + noise - noise.mean(), np.zeros(30)]
    monkeypatch.setattr(tuning, "plain_losses", lambda *a: after)
    said, cfg = [], SimpleNamespace(model=model, plain=plain)
    run = SimpleNamespace(state={"plain": losses.tolist()}, say=said.append, poll=None)
    figures = tuning.forgetting(run, cfg, None, None)
    assert words in said[0] and figures["plain/forgotten"] == pytest.approx(more)


def reports(losses, every_steps=10, steps_per_epoch=40) -> list[list[str]]:
    """The lines of each evaluation."""
    said, run = [], SimpleNamespace(state={}, metrics=lambda *a: None)
    for number, loss in enumerate(losses):
        lines = []
        run.say = lines.append
        val = {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5}
        val |= {"loss_interval": [loss - 0.1, loss + 0.1], "accuracy_interval": [0.4, 0.6]}
        at = SimpleNamespace(step=number * every_steps, where="epoch")
        tuning.report_validation(run, at, val, False, steps_per_epoch)
        said.append(lines)
    return said


def test_overfitting_is_called_half_an_epoch_behind_the_lowest_loss_and_not_before():
    said = reports([3.0, 2.0, 2.5, 2.6, 2.0, 1.9, 1.95, 1.91])
    called = [number for number, lines in enumerate(said) if any("OVERFITTING" in line for line in lines)]
    assert called == [3, 4, 7]  # at steps 30 and 40 after step 10, at step 70 after step 50
    assert (
        said[3][1]
        == "epoch  val  no fall for 0.5 epochs (lowest 2.0000 at step 10): OVERFITTING if train falls"
    )
    assert said[0] == ["epoch  val  loss 3.0000 ± 0.1000  perplexity 20.09  accuracy 0.500 ± 0.100"]
    falling = reports(np.linspace(3, 1, 20).tolist(), steps_per_epoch=2)  # each is lower: never
    assert [len(lines) for lines in falling] == [1] * 20


def test_the_run_begins_with_the_journals_table():
    with torch.device("meta"):
        shape = {"n_layer": 24, "n_head": 16, "n_embd": 1024, "tie_head": False}
        model = core.GPT(core.GPTConfig(50257, **shape))
    said = []
    run = SimpleNamespace(say=said.append, begin=lambda steps: said.append(f"begins {steps}"))
    data, cfg = random_rows(23), config("run_instruct", "--preset", "run_1", "--batch", 4)
    parts = {"train": every(data, 64), "test": range(5), "val": range(3)}
    tuning.announce(run, cfg, parts, parts["train"], ["a line"], model, 7)
    assert said[0] == "model gpt2-medium  406.3M parameters, 406.3M trainable   train 23  test 5  val 3"
    assert said[1:3] == ["begins 7", "parameters 406,286,336  1549.86 MB in fp32  trainable 406,286,336"]
    assert "a line" in said and said[-1].startswith("each epoch leaves out 3 of 23 rows")


def test_the_loss_is_shown_as_it_masks():
    shown = tuning.describe_example(every(by_hand(([1, 2, 3], [4, 5]))))
    assert shown.splitlines() == [
        "the loss sees row 1: 3 targets, 3 tokens masked; padding is masked",
        "  masked:  1 2 3",
        f"  counted: 4 5 {END}",
    ]


def test_answers_come_from_the_adapted_model_where_memory_has_no_room_for_a_merged_one():
    said = []
    run = SimpleNamespace(say=said.append)

    def merge(model, error):
        raise error

    full = functools.partial(merge, error=torch.OutOfMemoryError("CUDA out of memory"))
    assert tuning.fastest_form(run, "adapted", full) == "adapted" and "no memory for a merged copy" in said[0]
    with pytest.raises(RuntimeError, match="shapes differ"):
        tuning.fastest_form(run, "adapted", functools.partial(merge, error=RuntimeError("shapes differ")))
    assert tuning.fastest_form(run, "adapted", str.upper) == "ADAPTED" and len(said) == 1


def test_a_spikes_look_that_finds_no_memory_leaves_out_the_losses_and_ends_no_run(monkeypatch):
    def full(*given):
        raise OutOfMemory("out of memory with 2 rows")

    monkeypatch.setattr(tuning, "evaluate", full)
    parts = SimpleNamespace(data=SimpleNamespace(numbers=np.arange(9)), rows=np.array([4, 6]))
    seen = SimpleNamespace(data=parts.data, rows=np.array([6]), lengths=np.array([3]))
    monkeypatch.setattr(tuning, "Examples", lambda *given: seen)
    parts.max_length, parts.loss_on_prompt = 8, False
    assert tuning.spike_rows(None, None, parts, [1], World()) == {"rows": [6], "lengths": [3]}
