"""Begin and end tokens by one rule, the tokenizer's own: in text, windows, rows, prompts, generation."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import everywhere
from toys.begun import TEXT, begun_tokenizer
from toys.gpt import random_gpt

import core
import eval as script
from core import World
from lab.data import instructions, problems, text
from lab.data import tokenizers as names
from lab.data.cache import cached_rows
from lab.measure import answers, other_data, tuning
from lab.models import generate

AROUND = {  # what a tokenizer puts before and behind a text -> what a sequence begins with
    ("<s>", ""): ["<s>"], ("<s>", "</s>"): ["<s>"], ("<s> <s>", ""): ["<s>", "<s>"],
    ("", "</s>"): [], ("", ""): [],
}  # fmt: skip
BEGUN = pytest.mark.parametrize("around", AROUND)


def made(around):
    """(tokenizer, ids that a sequence begins with, id of the end)"""
    tokenizer = begun_tokenizer(*around)
    return tokenizer, tokenizer.convert_tokens_to_ids(AROUND[around]), tokenizer.eos_token_id


def plain(tokenizer, some) -> list[int]:
    return tokenizer(some, add_special_tokens=False, split_special_tokens=True).input_ids


@BEGUN
def test_a_prompt_begins_as_the_tokenizer_has_it_ends_open_and_spells_special_tokens(around):
    tokenizer, begin, end = made(around)
    assert names.begin_ids(tokenizer) == begin
    ids = names.prompt_ids(tokenizer, "The </s> cat <s>")
    assert ids[: len(begin)] == begin and not {end, *begin} & {*ids[len(begin) :]}
    assert tokenizer.decode(ids[len(begin) :]) == "The </s> cat <s>"


@BEGUN
def test_documents_of_a_stream_and_plain_text_begin_behind_an_end(around):
    tokenizer, begin, end = made(around)
    tokenizer.save_pretrained("mine")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"The cat {i}."}) + "\n" for i in range(40)))
    tokens = core.open_corpus(core.Corpus("rows.jsonl", "mine"), World())
    stream = tokens.parts["train"].tolist()
    starts = [i for i, token in enumerate(stream) if token == end][:-1]
    assert len(starts) == tokens.documents["train"] > 20
    for start in starts:
        assert stream[start + 1 : start + 1 + len(begin)] == begin
        assert stream[start + 1 + len(begin)] == plain(tokenizer, "The")[0]
    blocks = tuning.plain_blocks(core.Corpus("rows.jsonl", ""), tokenizer, 8, 4)
    assert blocks.tokens.tolist()[: 1 + len(begin)] == [end, *begin]


@BEGUN
def test_rows_and_problems_begin_and_end_once(around):
    tokenizer, begin, end = made(around)
    Path("rows.json").write_text(
        json.dumps([{"instruction": f"Say {i}.", "output": "</s> cat"} for i in range(9)])
    )
    cfg = SimpleNamespace(data="rows.json", model="", max_documents=None, template="alpaca")
    rows = core.load_instructions(cfg, World(), tokenizer)
    prompt = instructions.prompt_text("Say 0.", "", "alpaca")
    assert rows.prompt(0) == [*begin, *plain(tokenizer, prompt)] == names.prompt_ids(tokenizer, prompt)
    assert rows.whole(0) == [*rows.prompt(0), *plain(tokenizer, "</s> cat"), end]
    assert rows.prompt_lengths[0] == len(rows.prompt(0))
    cfg = SimpleNamespace(data=problems.BUILT_IN, max_documents=9, answer_format="text")
    loaded = problems.load_problems(cfg, World(), tokenizer)
    for row in range(3):
        assert loaded.prompt(row) == names.prompt_ids(tokenizer, loaded.texts[row][0])
        assert loaded.piece(row, 3) == plain(tokenizer, f" {loaded.options[row][1]}")
        assert loaded.whole(row)[-1] == end and loaded.whole(row).count(end) == 1


@BEGUN
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (5, 1)])
def test_every_window_on_a_text_begins_and_no_target_gives_way(around, context, stride, monkeypatch):
    tokenizer, begin, end = made(around)
    Path("text.txt").write_text(TEXT)
    seen = []

    def kept(model, windows, *rest):
        seen.append(windows)
        return np.ones((len(windows), 3))

    monkeypatch.setattr(other_data, "evaluate", kept)
    model = SimpleNamespace(config=SimpleNamespace(block_size=32))
    cfg = script.Config(context=context, stride=stride)
    other_data.measure_text("text.txt", None, model, tokenizer, cfg, World(), int)
    [windows], targets = seen, []
    for row in range(len(windows)):
        input_ids, labels = windows.batch([row], "cpu")
        assert input_ids.shape[1] <= context
        if row == 0:
            assert input_ids[0, 0] == (begin or [end])[0]
        assert input_ids[0, : len(begin)].tolist() == begin
        counted = labels[0] != core.IGNORE_INDEX
        targets += labels[0][counted].tolist()
        for place in counted.nonzero()[
            :, 0
        ].tolist():  # each is predicted behind the token before it, or the begin
            before = windows.documents[0][
                len(targets) - int(counted.sum()) + place - int(counted.nonzero()[0])
            ]
            assert input_ids[0, place] in (before, *begin)
    assert targets == windows.documents[0][1:].tolist()
    assert targets == [*begin[1:], *plain(tokenizer, TEXT), end]


@BEGUN
def test_what_is_answered_and_continued_is_the_prompt_by_the_same_rule(around, monkeypatch, capsys):
    tokenizer, begin, end = made(around)
    asked = []

    def remember(model, prompts, *rest, **options):
        asked.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(generate, "generate", remember)
    cfg = SimpleNamespace(temperature=0, top_k=None, top_p=None, stop=None, dtype="fp32")
    model = SimpleNamespace(wte=torch.nn.Embedding(1, 1))
    generate.continuations(model, tokenizer, cfg, ["The </s> cat", ""], 4, 0)
    assert asked == [[*begin, *plain(tokenizer, "The </s> cat")], begin or [end]]
    model.continuations = functools.partial(remember, None)
    model.config = SimpleNamespace(block_size=1000)
    cfg = SimpleNamespace(prompt="The </s> cat", template="alpaca", max_new_tokens=3, dtype="fp32")
    asked.clear()
    answers.ask(model, tokenizer, cfg)
    assert asked == [names.prompt_ids(tokenizer, instructions.prompt_text("The </s> cat", "", "alpaca"))]
    answers.note.cache_clear()
    model.config.block_size, there = 7, capsys.readouterr().err
    answers.ask(model, tokenizer, cfg)
    said = f"{len(asked[0])} tokens, of which the model holds 7: the beginning is not read"
    assert said not in there and said in capsys.readouterr().err
    asked.clear()
    Path("prompts.txt").write_text("The </s> cat\n")
    subject = SimpleNamespace(name="m", script=None)
    _, prompts = script.prompts_of(subject, "prompts.txt", None, tokenizer, script.Config())
    assert prompts == [[*begin, *plain(tokenizer, "The </s> cat")]]


def test_caches_of_texts_and_rows_know_begin_tokens_apart():
    """Their tokenizers differ in what stands around a text alone."""
    without, begun = made(("", ""))[0], made(("<s>", ""))[0]
    assert names.begin_facts(without) == {} and names.begin_facts(begun) == {"begin": names.begin_ids(begun)}
    assert text.words_of(without) != text.words_of(begun)


def test_caches_of_texts_know_end_tokens_apart():
    """A base and its -Instruct share tokenizer.json, and end a text by <|endoftext|> and by <|im_end|>."""
    base, chat = made(("", ""))[0], made(("", ""))[0]
    chat.eos_token = "<s>"
    assert names.tokenizer_fingerprint(base) == names.tokenizer_fingerprint(chat)
    for name, tokenizer in (("base", base), ("chat", chat)):
        tokenizer.save_pretrained(name)
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"The cat {i}."}) + "\n" for i in range(40)))
    for name, tokenizer in (("base", base), ("chat", chat), ("base", base)):
        stream = core.open_corpus(core.Corpus("rows.jsonl", name), World()).parts["train"]
        assert stream[0] == stream[-1] == tokenizer.eos_token_id
        source = core.Corpus("rows.jsonl", "")
        rows = cached_rows(
            World(), "measured", other_data.documents_key, other_data.write_documents, source, tokenizer
        )
        assert rows.tokens[-1] == tokenizer.eos_token_id


@BEGUN
def test_a_long_document_begins_once(around, monkeypatch):
    """It is read in pieces, each of which began behind an end token of its own."""
    tokenizer, _, end = made(around)
    tokenizer.save_pretrained("mine")
    everywhere(monkeypatch.setattr, text, "PIECE", 64)
    Path("long").mkdir()
    for i in range(6):
        Path(f"long/{i}.txt").write_text(f"{i} The cat sat on the mat.\n" * 30)
    parts = {"val_share": 0.3, "test_share": 0.3, "split_seed": 3}
    tokens = core.open_corpus(core.Corpus("long", "mine", **parts), World())
    assert tokens.documents["test"] > 0
    blocks = tuning.plain_blocks(core.Corpus("long", "", **parts), tokenizer, 8, 10_000)
    assert blocks.tokens.tolist() == tokens.parts["test"][:-1].tolist()
    assert blocks.tokens.tolist().count(end) == tokens.documents["test"]


def test_windows_without_begin_tokens_are_what_they_were():
    stream = [np.arange(40)]
    plain_windows, begun = core.Windows(stream, 8, 3), core.Windows(stream, 8, 3, [99])
    assert plain_windows.windows == begun.windows
    ours, theirs = plain_windows.batch(range(9), "cpu"), begun.batch(range(9), "cpu")
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0][:, 1:], theirs[0][:, 1:])
    assert theirs[0][1:, 0].tolist() == [99] * 8 and theirs[0][0, 0] == 0


def test_the_loss_in_windows_is_that_behind_the_begin_token():
    """A model that sees nothing but the first token gives every window the same."""
    model, ids = random_gpt(dtype=torch.float32), torch.randint(23, (1, 30))[0].numpy()
    windows = core.Windows([ids], 8, 4, [5])
    cfg = SimpleNamespace(dtype="fp32", eval_batch=4)
    sums = core.evaluate(model, windows, cfg, World())
    for row, (_, start, end, first) in enumerate(windows.windows):
        read = torch.tensor(ids[None, start:end])
        read[0, 0] = 5 if start else read[0, 0]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(read)[0].double(), torch.tensor(ids[start + 1 : end + 1]), reduction="none"
            )
        assert sums[row, 0] == pytest.approx(losses[first - 1 - start :].sum().item(), rel=1e-5)
