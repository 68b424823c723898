"""sft.py, run_instruct.py and run_lora.py: templates, what the loss counts, splits, packs, the journal's
presets, spikes, answers, adapters alone in checkpoints, forgetting, bad input line by line."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import safetensors.torch
import torch
from conftest import PROJECT
from ranks import everywhere
from torch import nn

import core
import lab.data.text
import lab.measure.answers
import lab.train.batches
import lab.train.loss
import run_instruct
import run_lora
from core import IGNORE_INDEX, UserError, World
from lab.data import builtin, columns, instructions, tokenizers
from lab.data.cache import BadRows
from lab.data.text import split_pieces
from lab.measure import tuning
from lab.measure.answers import PROMPTS, first_word, first_words, write_responses
from lab.models import gpt_formats
from lab.run.spikes import BAND, spike_limit

SHARED = PROJECT.parent / "shared" / "data" / "instruct" / "instruction-data.json"
SCRIPTS = {"run_instruct": run_instruct, "run_lora": run_lora}
END = 99  # the end token of the data made by hand
QUIET = ["--sample_tokens", 0, "--answer_rows", 0, "--plain_blocks", 0]
BARE = ["--batch", 4, "--micro_batch", 4, "--epochs", 1, "--max_length", 64, "--eval_every", "none", *QUIET]


def config(name, *argv):
    s = SCRIPTS[name]
    return core.parse_config(s.Config, s.PRESETS, s.SMOKE, s.__doc__, [str(word) for word in argv])


def go(name, *argv, out="out", smoke=True) -> tuple[dict, Path]:
    """A run in this process: its result.json and its folder."""
    flags = ["--smoke"] if smoke else []
    result = SCRIPTS[name].main(config(name, *flags, "--out", out, *argv), World())
    return result, ranks.newest(out)


def toy_rows(n=60) -> list[dict]:
    words = ["apple", "river", "stone", "cloud", "table", "green", "seven"]
    return [
        {
            "instruction": f"Repeat {words[i % 7]} {i}.",
            "input": f"case {i}" if i % 2 else "",
            "output": f"{words[i % 7]} {words[i % 5]} {i}" + ", again and again" * (i % 4),
        }
        for i in range(n)
    ]


def write_rows(rows, name="rows.json") -> str:
    Path(name).write_text(json.dumps(rows))
    return name


def toy_file(n=60) -> str:
    return write_rows(toy_rows(n))


def by_hand(*rows, groups=None) -> instructions.Instructions:
    """Rows of (prompt ids, answer ids)."""
    pieces = list(itertools.chain.from_iterable(rows))
    offsets = np.cumsum([0, *map(len, pieces)])
    tokens = np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.uint16)
    tokenizer = SimpleNamespace(eos_token_id=END, decode=lambda ids: " ".join(map(str, ids)))
    groups = np.array([str(i) for i in range(len(rows))] if groups is None else groups)
    texts = [["", "", ""]] * len(rows)
    numbers = np.arange(1, len(rows) + 1)
    return instructions.Instructions(
        texts, [None] * len(texts), numbers, groups, tokens, offsets, tokenizer, {}, []
    )


def random_rows(n=24, seed=0, most=14):
    """Ids below END, so that an end token is the one appended."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most, (n, 2)).tolist()
    return by_hand(*[(rng.integers(1, 90, a).tolist(), rng.integers(1, 90, b).tolist()) for a, b in sizes])


def every(data, most=64, loss_on_prompt=False) -> core.Examples:
    return core.Examples(data, np.arange(len(data)), most, loss_on_prompt)


def small_gpt(dtype=torch.float32, **shape):
    torch.manual_seed(3)
    sizes = {"vocab_size": 100, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16} | shape
    model = core.GPT(core.GPTConfig(**sizes)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


def initial_model(name, cfg, tokenizer):
    core.reseed(cfg.seed, "init")
    folder = ["no run"] if name == "run_lora" else []  # whose adapter/ would be taken
    return SCRIPTS[name].build_model(cfg, tokenizer, World(), *folder)


def parts_of(cfg):
    data = core.load_instructions(cfg, World())
    return data, {
        part: core.Examples(data, rows, cfg.max_length, cfg.loss_on_prompt)
        for part, rows in instructions.split(data, cfg)[0].items()
    }


def loss_of(model, examples, cfg) -> float:
    sums = core.evaluate(model, examples, cfg, World())
    return sums[:, 0].sum() / sums[:, 2].sum()


@pytest.fixture(scope="session")
def tuned(cache, tmp_path_factory):
    """The smoke test's run of all weights, with fewer epochs: (result, folder)."""
    argv = ["--epochs", 5, "--batch", 16, "--lr", 6e-3, "--eval_every", "none", "--plain_blocks", 4]
    return go("run_instruct", *argv, "--sample_tokens", 4, out=str(tmp_path_factory.mktemp("tuned")))


@pytest.fixture(scope="session")
def adapted(cache, tmp_path_factory):
    """The smoke test's run of adapters, with fewer epochs."""
    argv = ["--epochs", 2, "--eval_every", 40, "--sample_tokens", 0, "--plain_blocks", 0, "--answer_rows", 10]
    return go("run_lora", *argv, out=str(tmp_path_factory.mktemp("adapted")))


@pytest.fixture(scope="session")
def gpt2_folder(cache, tmp_path_factory):
    """A GPT-2 with a tokenizer, as transformers writes it."""
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    texts = [
        instructions.prompt_text(r["instruction"], r["input"], "alpaca") + r["output"] for r in toy_rows()
    ]
    tokenizer = core.make_tokenizer("bpe:400", lambda: texts)
    core.save_pretrained(small_gpt(vocab_size=len(tokenizer)).eval(), tokenizer, folder)
    return folder


# template

BOTH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
)
ALONE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
)
JOURNAL_BOTH = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("template", "given", "text"),
    [
        ("alpaca", "1 and 2", BOTH),
        ("alpaca", "", ALONE),
        ("journal", "1 and 2", JOURNAL_BOTH),
        ("journal", "", ALONE),
    ],
)
def test_prompts_are_the_templates_to_the_letter(template, given, text):
    assert instructions.prompt_text("Add.", given, template) == text


# rows


def toy_cfg(*argv, name="run_instruct"):
    return config(name, "--smoke", *argv)


def load(rows, *argv) -> instructions.Instructions:
    return core.load_instructions(toy_cfg("--data", write_rows(rows), *argv), World())


def test_a_row_is_three_stripped_texts_and_an_absent_input_is_empty():
    assert instructions.parse({"instruction": " a ", "input": "\tb\n", "output": "c "}) == ["a", "b", "c"]
    assert instructions.parse({"instruction": "a", "input": None, "output": ""}) == ["a", "", ""]
    assert instructions.parse({"instruction": "a", "output": "c", "text": 7}) == ["a", "", "c"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a"], "no object with columns"),
        (None, "no object with columns"),
        ({"instruction": None, "input": "", "output": "c"}, "instruction is no text"),
        ({"instruction": "a", "input": 3, "output": "c"}, "input is no text"),
        ({"instruction": "a", "input": "", "output": ["c"]}, "output is no text"),
        ({"instruction": "a", "input": "", "output": None}, "output is no text"),
        ({"instruction": "a", "input": "\ud83d", "output": "c"}, "input has odd Unicode"),
        ({"instruction": "a", "input": "", "output": "x\udc00"}, "output has odd Unicode"),
        ({"instruction": " \n", "input": "b", "output": "c"}, "instruction is empty"),
    ],
)
def test_unusable_rows_are_told_apart(row, reason):
    with pytest.raises(ValueError, match=reason):
        instructions.parse(row)


def test_bad_rows_are_counted_and_named_and_many_are_an_error():
    rows = toy_rows(250)
    rows[7]["output"], rows[99]["instruction"], rows[12]["input"] = None, " ", None
    data = load(rows)
    assert len(data) == 248
    assert data.numbers.tolist() == [n for n in range(1, 251) if n not in (8, 100)]
    assert data.texts[11] == ["Repeat " + rows[12]["instruction"][7:], "", rows[12]["output"]]  # one fewer
    assert data.lines == ["left out 1 row(s), output is no text: 8",
                          "left out 1 row(s), instruction is empty: 100"]  # fmt: skip
    for number in (3, 4, 5):
        rows[number]["output"] = "\ud800"
    named = "5 of 250 rows are unusable, more than 1%: mend or remove them, e.g. "
    named += "; ".join(f"row {n}: output has odd Unicode (a lone surrogate)" for n in (4, 5, 6)) + "$"
    with pytest.raises(UserError, match=named.replace("(", r"\(").replace(")", r"\)")):
        load(rows)


def test_missing_columns_are_named_with_those_there_are():
    with pytest.raises(UserError, match=r"rows.json lacks column\(s\) output; found: instruction, a"):
        load([{"instruction": "x", "a": "y"}] * 5)


def test_empty_answers_are_kept_and_counted():
    rows = toy_rows()
    rows[2]["output"] = rows[5]["output"] = "  "
    data = load(rows)
    assert "2 empty answer(s) are kept: their target is the end token" in data.lines
    ids, labels = every(data, 128).pair(2)
    assert len(data) == 60 and labels[-1] == data.tokenizer.eos_token_id
    assert ids == data.prompt(2) and labels[:-1] == [IGNORE_INDEX] * (len(ids) - 1)


def test_max_documents_takes_the_first_rows():
    data = load(toy_rows(), "--max_documents", 30)
    assert [text[0] for text in data.texts] == [row["instruction"] for row in toy_rows(30)]


def test_the_cache_knows_data_template_and_rows_apart():
    rows = toy_rows()
    alpaca, journal = load(rows), load(rows, "--template", "journal")
    assert alpaca.prompt_lengths[0] == journal.prompt_lengths[0]  # no input: the same text
    assert "paired with" in alpaca.tokenizer.decode(alpaca.prompt(1))
    assert "paired with" not in journal.tokenizer.decode(journal.prompt(1))
    rows[0]["output"] = "changed"
    changed = load(rows)
    assert changed.texts[0][2] == "changed" and changed.fingerprint["data"] != alpaca.fingerprint["data"]


# what the loss counts


def test_only_the_answer_and_one_end_token_are_targets():
    data = by_hand(([1, 2, 3], [4, 5]), ([6], []), ([7, 8], [9, 10, 11, 12]))
    examples = every(data)
    assert examples.pair(0) == ([1, 2, 3, 4, 5], [IGNORE_INDEX, IGNORE_INDEX, 4, 5, END])
    assert examples.pair(1) == ([6], [END])
    assert examples.pair(2) == ([7, 8, 9, 10, 11, 12], [IGNORE_INDEX, 9, 10, 11, 12, END])
    assert examples.lengths.tolist() == [5, 1, 6] and examples.targets([0, 1, 2]).tolist() == [3, 1, 5]
    ids, labels = examples.batch([2, 0], "cpu")
    assert ids.tolist() == [[7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 0]]
    assert labels.tolist() == [[-100, 9, 10, 11, 12, END], [-100, -100, 4, 5, END, -100]]


def test_with_loss_on_prompt_every_next_token_is_a_target():
    examples = every(by_hand(([1, 2, 3], [4, 5]), ([6], [7])), loss_on_prompt=True)
    assert examples.pair(0) == ([1, 2, 3, 4, 5], [2, 3, 4, 5, END])
    ids, labels = examples.batch([0, 1], "cpu")
    assert ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert labels.tolist() == [[2, 3, 4, 5, END], [7, END, -100, -100, -100]]
    assert examples.targets([1, 0]).tolist() == [2, 5]


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_a_cut_row_loses_the_end_of_the_answer_and_its_end_token(loss_on_prompt):
    data = by_hand(([1, 2, 3], [4, 5]))
    masked = [2, 3] if loss_on_prompt else [IGNORE_INDEX] * 2
    assert every(data, 6, loss_on_prompt).pair(0) == ([1, 2, 3, 4, 5], [*masked, 4, 5, END])
    assert every(data, 5, loss_on_prompt).pair(0) == ([1, 2, 3, 4], [*masked, 4, 5])
    assert every(data, 4, loss_on_prompt).pair(0) == ([1, 2, 3], [*masked, 4])


def test_counts_are_those_of_the_labels():
    data = random_rows(60)
    fits = np.flatnonzero(data.prompt_lengths < 12)
    for loss_on_prompt in (False, True):
        examples = core.Examples(data, fits, 12, loss_on_prompt)
        pairs = [examples.pair(i) for i in range(len(fits))]
        assert examples.lengths.tolist() == [len(ids) for ids, _ in pairs]
        counted = [sum(label != IGNORE_INDEX for label in labels) for _, labels in pairs]
        assert examples.targets(range(len(fits))).tolist() == counted and min(counted) >= 1
        ends = [(ids + labels).count(END) for ids, labels in pairs]
        uncut = data.prompt_lengths[fits] + data.answer_lengths[fits] + 1 <= 12
        assert ends == uncut.astype(int).tolist() and 0 < sum(ends) < len(ends)


def test_a_spelled_end_token_is_letters():
    rows = toy_rows()
    rows[3] = {
        "instruction": "Say <|endoftext|> now",
        "input": "<|endoftext|>",
        "output": "a <|endoftext|> b",
    }
    data = load(rows)
    end = data.tokenizer.eos_token_id
    ids, labels = every(data, 256).pair(3)
    assert end not in ids and labels.count(end) == 1 and labels[-1] == end
    assert data.tokenizer.decode(ids).count("<|endoftext|>") == 3


def journal_collate(batch, end=50256, ignore=-100, most=None):
    """The journal's ancestor: append one end token, pad with it, shift; only the first one is a target."""
    longest = max(len(item) + 1 for item in batch)
    inputs, targets = [], []
    for item in batch:
        padded = [*item, *[end] * (longest - len(item))]
        source, target = padded[:-1][:most], padded[1:]
        seen = False
        for i, token in enumerate(target):
            target[i], seen = (ignore if token == end and seen else token), seen or token == end
        inputs.append(source)
        targets.append(target[:most])
    return inputs, targets


def test_batches_are_the_journals_on_real_positions():
    data = random_rows(40)
    examples, rows = every(data, 1024, loss_on_prompt=True), list(range(40))
    inputs, targets = journal_collate([data.whole(row)[:-1] for row in rows], end=END)
    ids, labels = examples.batch(rows, "cpu")
    assert labels.tolist() == targets  # of padding, too
    real = labels != IGNORE_INDEX
    assert torch.equal(ids[real], torch.tensor(inputs)[real])
    assert (~real).any() and int(real.sum()) == int(examples.lengths.sum())


def test_at_the_cut_the_journal_has_one_pair_more():
    """It cut at 1024 inputs, here max_length counts the tokens of a row: one input fewer."""
    data = by_hand(([1, 2, 3], [4, 5, 6, 7, 8]))
    inputs, targets = journal_collate([data.whole(0)[:-1]], end=END, most=6)
    ids, labels = every(data, 6, loss_on_prompt=True).pair(0)
    assert (ids, labels) == (inputs[0][:5], targets[0][:5]) and len(inputs[0]) == 6
    ids, labels = every(data, 7, loss_on_prompt=True).pair(0)
    assert (ids, labels) == (inputs[0], targets[0])


def bordering_texts():
    starts = [
        "word",
        "Word",
        "12",
        "(a)",
        "'s mine",
        "“quoted”",
        "- list\n- of two",
        "...",
        "é",
        "日本",
        "\\n",
        "",
    ]
    return [(instructions.prompt_text(*asked, template), start) for start in starts
            for asked in (("Do it.", ""), ("Do it:", "so"))
            for template in ("alpaca", "journal")]  # fmt: skip


def assert_no_token_crosses(tokenizer, pairs):
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    for prompt, answer in pairs:
        apart = [*tokenizer(prompt, **plain).input_ids, *tokenizer(answer, **plain).input_ids]
        assert apart == tokenizer(prompt + answer, **plain).input_ids, answer


def test_no_token_crosses_the_border_of_prompt_and_answer():
    pairs = bordering_texts()
    tokenizer = core.make_tokenizer("bpe:600", lambda: [a + b for a, b in pairs] * 3)
    assert_no_token_crosses(tokenizer, pairs)
    with pytest.raises(AssertionError):  # as one inside a word does
        assert_no_token_crosses(tokenizer, [("### Resp", "onse")])


@pytest.mark.skipif(not SHARED.exists(), reason="small real data is not here")
def test_real_rows_are_read_whole_and_no_token_crosses():
    cfg = toy_cfg("--data", SHARED, "--max_length", 256)
    data = core.load_instructions(cfg, World())
    assert len(data) == 1100 and data.lines == []
    pairs = [(instructions.prompt_text(a, b, "alpaca"), c) for a, b, c in data.texts[:300]]
    assert_no_token_crosses(data.tokenizer, pairs)
    for row, (prompt, answer) in enumerate(pairs):
        assert data.tokenizer.decode(data.whole(row)) == f"{prompt}{answer}<|endoftext|>"
    parts = instructions.split(data, cfg)[0]
    assert sorted(itertools.chain(*parts.values())) == list(range(1100))


# splits


def many(n, prompt=3, answer=4, groups=None) -> instructions.Instructions:
    """n rows of the same lengths, without their tokens."""
    offsets = np.concatenate([[0], np.cumsum(np.tile([prompt, answer], n))])
    groups = np.arange(n).astype(str) if groups is None else groups
    texts, numbers = [["", "", ""]] * n, np.arange(1, n + 1)
    return instructions.Instructions(
        texts, [None] * len(texts), numbers, groups, np.zeros(0), offsets, None, {}, []
    )


def test_file_order_is_the_journals_cut_of_Alpaca():
    parts, lines = instructions.split(many(52_002), toy_cfg("--split", "file_order"))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 44_201, "test": 5_200, "val": 2_601}
    assert np.array_equal(np.concatenate([parts["train"], parts["test"], parts["val"]]), np.arange(52_002))
    assert lines == []


def test_the_seeded_split_keeps_equal_prompts_together():
    groups = np.array([f"group {i % 300}" for i in range(1000)])
    split = {
        seed: instructions.split(many(1000, groups=groups), toy_cfg("--split_seed", seed))[0]
        for seed in (1, 2)
    }
    for parts in split.values():
        assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1000))
        held = [set(groups[rows]) for rows in parts.values()]
        assert sum(map(len, held)) == len(set.union(*held)) == 300
        shares = [len(parts[name]) / 1000 for name in ("train", "test", "val")]
        np.testing.assert_allclose(shares, [0.85, 0.10, 0.05], atol=0.01)  # groups are of 3 and 4 rows
    assert not np.array_equal(split[1]["test"], split[2]["test"])
    again = instructions.split(many(1000, groups=groups), toy_cfg("--split_seed", 1, "--seed", 5))[0]
    assert all(np.array_equal(again[name], rows) for name, rows in split[1].items())


def test_prompts_that_differ_in_case_and_spaces_only_are_equal():
    assert instructions.prompt_hash("Say  Hello", "A\nb") == instructions.prompt_hash("say hello ", "a B")
    assert instructions.prompt_hash("say hello", "") != instructions.prompt_hash("say", "hello")


def test_prompts_in_two_parts_are_told():
    groups = np.array(["same"] * 1000)
    groups[:850] = np.arange(850).astype(str)
    groups[:10] = "same"
    lines = instructions.split(many(1000, groups=groups), toy_cfg("--split", "file_order"))[1]
    assert "100 of 100 test rows have a prompt that training rows have, too" in lines
    assert "50 of 50 val rows have a prompt that training rows have, too" in lines


def test_rows_without_room_for_a_target_are_left_out_and_cut_ones_counted():
    sizes = [(3, 4)] * 95 + [(15, 1), (16, 0), (16, 1), (14, 2), (3, 13)]  # tokens of prompt and answer
    rows = [([1] * a, [2] * b) for a, b in sizes]
    cfg = toy_cfg("--split", "file_order", "--max_length", 16)
    parts, lines = instructions.split(by_hand(*rows), cfg)
    assert sorted(itertools.chain(*parts.values())) == [*range(96), 98, 99]
    assert lines[0].startswith("3 row(s) are cut at 16 tokens")  # of the last five all but those left out
    assert lines[1] == "2 row(s) are left out: their prompts alone fill 16 tokens"
    parts, lines = instructions.split(by_hand(*rows), toy_cfg("--split", "file_order", "--max_length", 16,
                                                     "--loss_on_prompt"))  # fmt: skip
    assert (
        sum(map(len, parts.values())) == 100 and lines[0].startswith("5 row(s) are cut") and len(lines) == 1
    )


@pytest.mark.parametrize("total", [1, 2, 7, 60])
def test_some_examples_are_spread_evenly_without_repeats(total):
    examples = every(many(total))
    for n in range(1, total + 1):
        rows = examples.some(n).rows.tolist()
        assert len(rows) == n and rows[0] == 0 and (rows[-1] == total - 1 or n == 1)
        gaps = np.diff(rows)
        assert n == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    for n in (None, total, total + 1):
        assert examples.some(n).rows.tolist() == list(range(total))


def test_some_examples_are_read_as_all_of_them_are():
    examples = core.Examples(random_rows(30), np.arange(5, 25), 12, loss_on_prompt=True)
    few = examples.some(4)
    assert few.rows.tolist() == [5, 11, 18, 24]
    assert [few.pair(i) for i in range(4)] == [examples.pair(i) for i in (0, 6, 13, 19)]


# packs


@pytest.mark.parametrize("length", [28, 40, 64])
def test_packs_hold_every_example_once_and_none_is_too_long(length):
    examples = every(random_rows(80), 28)
    packs = core.Packs(examples, length)
    assert sorted(itertools.chain(*packs.packs)) == list(range(80))
    sums = [int(examples.lengths[pack].sum()) for pack in packs.packs]
    assert packs.lengths.tolist() == sums and max(sums) <= length
    assert len(packs) <= 1.25 * math.ceil(examples.lengths.sum() / length)  # best fit wastes little
    assert packs.targets(range(len(packs))).sum() == examples.targets(range(80)).sum()
    assert packs.members([1, 0]) == [*packs.packs[1], *packs.packs[0]]


def test_a_pack_is_its_examples_side_by_side():
    examples = every(by_hand(([1, 2], [3]), ([4], [5, 6, 7]), ([8, 9, 10], [11])), 8)
    packs = core.Packs(examples, 8)
    assert packs.packs == [[1, 2], [0]]
    ids, labels, segments = packs.batch([1, 0], "cpu")
    assert ids.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert labels.tolist() == [[-100, 3, END, *[-100] * 5], [5, 6, 7, END, -100, -100, 11, END]]
    assert segments.tolist() == [[0, 0, 0, *[-1] * 5], [0] * 4 + [1] * 4]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_packed_rows_have_the_loss_and_gradients_of_single_ones(dtype, tolerance, shape):
    llama = {
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_head": False,
    }
    model = small_gpt(dtype, **(llama if shape == "llama" else {}))
    examples = every(random_rows(30), 28)
    packs = core.Packs(examples, 60)
    assert len(packs) < 20

    def loss_and_gradients(losses):
        model.zero_grad()
        loss = sum(losses)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    loss, slopes = loss_and_gradients([model(*packs.batch(range(len(packs)), "cpu"))])
    alone, expected = loss_and_gradients([model(*examples.batch([i], "cpu")) for i in range(30)])
    # other orders of additions: relative to the largest number of a tensor
    assert abs(loss - alone) <= tolerance * alone
    for got, wanted in zip(slopes, expected, strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    joined = model(packs.batch(range(len(packs)), "cpu")[0], packs.batch(range(len(packs)), "cpu")[1])
    assert abs(joined - alone) > 1e-4 * alone  # without segments they do see each other


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_packed_run_learns_and_measures_the_test_rows_unpacked(name):
    argv = ["--epochs", 2, *QUIET, "--max_documents", 300, "--batch", 6, "--pack", "--eval_every", "none"]
    result, folder = go(name, *argv)
    cfg, model, _ = SCRIPTS[name].load_model(folder, World())
    assert cfg.pack
    _, parts = parts_of(cfg)
    assert result["test/rows"] == len(parts["test"]) and result["val/rows"] == len(parts["val"])
    assert result["test/targets"] == parts["test"].targets(range(len(parts["test"]))).sum()
    assert result["test/loss"] == loss_of(model, parts["test"], cfg)
    before = loss_of(initial_model(name, cfg, parts["test"].data.tokenizer), parts["test"], cfg)
    assert result["test/loss"] < before - 0.5
    packs = core.Packs(parts["train"], cfg.max_length)
    rows, most = len(parts["train"]) / len(packs), packs.lengths.max()
    line = f"{len(packs)} packs of at most {most} tokens hold {rows:.1f} rows each and are "
    line += f"{packs.lengths.mean() / most:.0%} full\n"
    assert line in (folder / "log.txt").read_text() and rows > 1


# length groups


def set_partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in set_partitions(rest):
        yield [[first], *partition]
        for i, part in enumerate(partition):
            yield [*partition[:i], [first, *part], *partition[i + 1 :]]


def test_length_groups_are_the_cheapest_of_all_partitions_that_hold_few_enough_tokens():
    rng = np.random.default_rng(0)
    seen = Counter()
    for case in range(80):
        n, overhead = 1 + case % 7 + (case == 7), int(rng.choice([0, 1, 5, 20, 100]))
        lengths = sorted(rng.integers(1, 60, n).tolist(), reverse=True)
        most = int(rng.integers(30, 120)) if case % 2 else math.inf  # a row alone may be longer
        sizes = core.length_groups(lengths, most, overhead)
        ends = list(itertools.accumulate(sizes))
        assert ends[-1] == n and min(sizes) >= 1
        tokens = [size * lengths[end - size] for size, end in zip(sizes, ends, strict=True)]
        assert all(size == 1 or held <= most for size, held in zip(sizes, tokens, strict=True))
        legal = [
            [len(part) * max(part) for part in parts]
            for parts in set_partitions(lengths)
            if all(len(part) == 1 or len(part) * max(part) <= most for part in parts)
        ]
        assert sum(tokens) + len(sizes) * overhead == min(sum(p) + len(p) * overhead for p in legal), case
        seen[len(sizes)] += 1
        seen["bound"] += sizes != core.length_groups(lengths, math.inf, overhead)
    assert {1, 2, 3} <= set(seen) and seen["bound"] >= 5
    assert core.length_groups([], 100) == []


@pytest.mark.parametrize("size", [None, 3, 20])
def test_micro_batches_cover_every_row_once_longest_first(size):
    model = SimpleNamespace()  # no no_sync: nothing is exchanged
    rows = list(range(100, 113))
    lengths = dict(zip(rows, np.random.default_rng(1).permutation(13) * 40 + 5, strict=True))
    parts = list(core.micro_batches(model, rows, size, [lengths[row] for row in rows]))
    order = list(itertools.chain(*parts))
    assert sorted(order) == rows and [lengths[r] for r in order] == sorted(lengths.values(), reverse=True)
    falling = sorted(map(int, lengths.values()), reverse=True)
    expected = core.length_groups(falling, math.inf) if size is None else {3: [3, 3, 3, 3, 1], 20: [13]}[size]
    assert [len(part) for part in parts] == expected and (size or len(parts) > 1)
    assert list(core.micro_batches(model, rows, 5)) == [rows[:5], rows[5:10], rows[10:]]
    assert list(core.micro_batches(model, [], None, [])) == []


def test_micro_batches_hold_no_more_tokens_than_they_may_unless_a_size_is_given():
    lengths, model = [40] * 6 + [10] * 6, SimpleNamespace()
    tokens = [[lengths[row] for row in part] for part in core.micro_batches(model, range(12), None, lengths)]
    assert tokens == [[40] * 6, [10] * 6]  # padding six rows to 40 tokens costs more than a group
    tokens = [
        [lengths[row] for row in part] for part in core.micro_batches(model, range(12), None, lengths, 120)
    ]
    assert tokens == [[40] * 3, [40] * 3, [10] * 6]
    assert [len(part) for part in core.micro_batches(model, range(12), 12, lengths, 120)] == [12]


def set_up(*argv) -> tuning.TuningSetup:
    run = SimpleNamespace(pin=lambda *fact: None)
    return tuning.set_up(run, toy_cfg("--data", toy_file(400), *QUIET, "--batch", 8, *argv), World())


def test_lengths_meet_by_chance_without_group_lengths():
    grouped, free = set_up().batches, set_up("--no-group_lengths").batches

    def spread(batches):
        """Of lengths within a batch, beside that of all rows."""
        chosen = [batches.lengths[batches.global_batch(step)] for step in range(len(batches))]
        return np.mean([lengths.var(ddof=1) for lengths in chosen]) / batches.lengths.var(ddof=1)

    assert len(grouped) == len(free) > 30
    assert spread(grouped) < 0.2  # the rows of a block of 50 batches, sorted
    assert spread(free) == pytest.approx(1, abs=0.15)  # of some 40 batches of 8


# presets

OF_ALL = {
    **{"data": "tatsu-lab/alpaca", "template": "journal", "split": "file_order", "loss_on_prompt": True},
    **{"tie_head": False, "optimizer": "adamw", "weight_decay": 0.1, "test_weights": "last", "pack": False},
    **{
        "max_length": 1024,
        "dropout": 0.0,
        "skip_spikes": False,
        "group_lengths": False,
        "dtype": "auto",
        "max_steps": None,
    },
}
M, L, XL = "gpt2-medium", "gpt2-large", "gpt2-xl"
INSTRUCT = {
    name: {"model": model, "batch": 2, "epochs": 1, "lr": 5e-5, "schedule": schedule, "min_lr": low,
           "warmup": warmup, "clip": clip, "freeze_blocks": 0}
    for name, model, schedule, low, warmup, clip in [
        ("run_1", M, "constant", 0.0, 0.0, None),
        ("run_2", L, "constant", 0.0, 0.0, None),
        ("run_3", XL, "constant", 0.0, 0.0, None),
        ("run_4", L, "cosine", 1e-5, 0.2, 1.0),
        ("run_5", M, "cosine", 1e-5, 0.2, 1.0),
        ("run_6", L, "cosine", 1e-5, 0.2, None),
    ]
}  # fmt: skip
LORA = {
    name: {"model": model, "batch": batch, "epochs": epochs, "lr": lr, "min_lr": 1e-5, "warmup": warmup,
           "lora_rank": rank, "lora_alpha": float(alpha), "lora_scaling": "alpha", "lora_init": "rank",
           "lora_head": True, "lora_targets": "all", "lora_layers": None, "lora_dropout": 0.0,
           "adapter": None, "schedule": "cosine", "clip": 1.0}
    for name, model, batch, epochs, lr, warmup, rank, alpha in [
        ("run_10", M, 2, 1, 5e-5, 0.2, 16, 16),
        ("run_11", L, 2, 1, 5e-5, 0.2, 16, 16),
        ("run_12", M, 4, 1, 5e-5, 0.2, 16, 16),
        ("run_13", M, 2, 1, 5e-5, 0.2, 16, 32),
        ("run_14", M, 2, 1, 5e-5, 0.2, 32, 32),
        ("run_15", M, 4, 1, 5e-5, 0.2, 64, 64),
        ("run_16", M, 4, 1, 2.5e-5, 0.3, 64, 64),
        ("run_17", M, 4, 1, 3e-5, 0.0, 64, 64),
        ("run_18", M, 4, 1, 1e-4, 0.0, 64, 64),
        ("run_19", M, 4, 2, 5e-5, 0.2, 16, 16),
    ]
}  # fmt: skip
TABLE = [("run_instruct", *item) for item in INSTRUCT.items()] + [
    ("run_lora", *item) for item in LORA.items()
]


@pytest.mark.parametrize(("name", "preset", "row"), TABLE, ids=[preset for _, preset, _ in TABLE])
def test_presets_are_the_journals_table(name, preset, row):
    cfg = asdict(config(name, "--preset", preset))
    expected = OF_ALL | row | {"tag": preset}
    assert {constant: cfg[constant] for constant in expected} == expected
    assert 11_990 <= int(0.85 * cfg["max_documents"]) <= 12_010


def test_there_are_the_journals_presets_and_no_others():
    assert list(run_instruct.PRESETS) == ["recommended", *INSTRUCT]
    assert list(run_lora.PRESETS) == ["recommended", *LORA]


DAILY = ("run_18",)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(name, preset, marks=[] if preset in DAILY else pytest.mark.slow)
        for name, preset, _ in [*TABLE, ("run_instruct", "recommended", {}), ("run_lora", "recommended", {})]
    ],
)
def test_every_preset_has_a_smoke_run(name, preset):
    argv = ["--max_documents", 240, "--epochs", 1, "--plain_blocks", 0, "--answer_rows", 4]
    result, folder = go(name, "--preset", preset, *argv)
    assert result["status"] == "finished" and folder.name.endswith(f"-{preset}")
    stored = core.read_config(folder)["constants"]
    kept = {k: v for k, v in SCRIPTS[name].PRESETS[preset].items() if k not in SCRIPTS[name].SMOKE}
    assert {k: stored[k] for k in kept if k not in ("epochs", "max_documents")} == {
        k: v for k, v in kept.items() if k not in ("epochs", "max_documents")
    }
    assert (
        math.isfinite(result["test/loss"]) and len(json.loads((folder / "responses.json").read_text())) == 4
    )
    best = stored["test_weights"] == "best"
    assert result["test_checkpoints"][0].startswith("best_step_" if best else "step_")


def test_the_presets_of_the_adapters_keep_their_distance_in_the_smoke_test():
    rates = {p: config("run_lora", "--smoke", "--preset", p).lr for p in ("run_15", "run_16", "run_18")}
    assert rates == pytest.approx({"run_15": 1e-3, "run_16": 5e-4, "run_18": 2e-3}, rel=1e-12)  # one product


# warm-up


def test_without_warm_up_the_first_step_is_the_peak():
    cfg, total = config("run_lora", "--preset", "run_17"), 3000
    assert core.lr_at(cfg, 0, total) == pytest.approx(3e-5, rel=1e-12)  # low + (lr - low) is rounded
    assert core.lr_at(cfg, total // 2, total) == pytest.approx(2e-5, rel=1e-12)  # half way of a cosine
    last = 1e-5 + 2e-5 * (1 - math.cos(math.pi / total)) / 2
    assert core.lr_at(cfg, total - 1, total) == pytest.approx(last, rel=1e-12)


def test_with_a_warm_up_of_all_steps_the_last_one_is_the_peak():
    cfg, total = config("run_lora", "--preset", "run_17", "--warmup", 1.0), 3000
    assert core.lr_at(cfg, 0, total) == pytest.approx(3e-5 / total, rel=1e-12)
    assert core.lr_at(cfg, total // 2 - 1, total) == pytest.approx(1.5e-5, rel=1e-12)
    assert core.lr_at(cfg, total - 1, total) == pytest.approx(3e-5, rel=1e-12)


@pytest.mark.parametrize(("preset", "peak"), [("run_5", 600), ("run_16", 900)])
def test_the_peak_comes_behind_the_warm_up(preset, peak):
    cfg = config("run_instruct" if preset == "run_5" else "run_lora", "--preset", preset)
    rates = [core.lr_at(cfg, step, 3000) for step in range(3000)]
    assert [max(rates), rates[peak - 1], rates[peak]] == pytest.approx([cfg.lr] * 3, rel=1e-12)
    assert rates[peak - 2] < cfg.lr > rates[peak + 1]
    assert rates[0] == pytest.approx(cfg.lr / peak, rel=1e-12)
    assert rates[-1] >= 1e-5 and rates[-1] == pytest.approx(1e-5, rel=1e-4)  # a step before the cosine's end


@pytest.mark.parametrize(("name", "warmup"), [("run_instruct", 0), ("run_lora", 1)])
def test_runs_with_no_warm_up_and_with_nothing_else(name, warmup):
    argv = ["--data", toy_file(), *BARE, "--log_every", 1, "--warmup", warmup, "--lr", 1e-3, "--min_lr", 1e-4]
    result, folder = go(name, *argv)
    steps = result["step"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
    expected = cosine if warmup == 0 else [1e-3 * (i + 1) / steps for i in range(steps)]
    assert steps == 12 and rates == pytest.approx(expected, rel=1e-12)


# spikes


def test_too_few_steps_say_nothing_of_what_is_usual():
    assert spike_limit([], 1.5) == spike_limit([1.0] * 19, 1.5) == math.inf
    assert spike_limit([1.0] * 20, 1.5) < math.inf


@pytest.mark.parametrize("least", [1.25, 1.5])
def test_a_constant_series_may_rise_by_what_is_usual_in_any_case(least):
    # exp and log are rounded
    assert spike_limit([2.0] * 30, least) == pytest.approx(2 * least, rel=1e-12)
    assert spike_limit([0.0] * 30, least) < 1e-20  # no logarithm of nothing


def log_normal(n, deviation=0.3, seed=0):
    return np.exp(np.random.default_rng(seed).normal(0, deviation, n)).tolist()


def test_a_log_normal_series_is_rarely_flagged_and_a_twentyfold_value_always():
    series = log_normal(3000)
    limits = [spike_limit(series[max(0, i - BAND) : i], 1.5) for i in range(20, len(series))]
    assert sum(value > limit for value, limit in zip(series[20:], limits, strict=True)) <= 3
    assert all(20 * statistics.median(series) > limit for limit in limits[80:])
    assert spike_limit(log_normal(100), 1.5) == pytest.approx(math.exp(6 * 0.3), rel=0.4)  # of 100 values


def test_a_few_spikes_do_not_hide_the_next():
    series = log_normal(90)
    spiked = [*series, *[100.0, 1e6, 1e12, 50.0, 100.0, 1e3, 40.0, 80.0, 60.0, 70.0]]
    assert spike_limit(spiked, 1.5) < 20 * statistics.median(series)
    assert spike_limit(spiked, 1.5) < 1.6 * spike_limit(series, 1.5)


def test_a_step_that_is_left_out_moves_nothing_and_the_next_one_does():
    model = small_gpt()
    optimizer = core.make_optimizer(model, "adamw", 0.1)
    precision, seen = core.Precision("fp32", World()), []
    examples = every(random_rows(4), 28)

    def step(skip):
        core.scaled_backward(model(*examples.batch(range(4), "cpu")), World(), 20, precision)
        return core.optimizer_step(optimizer, precision, 0.1, 0.01, skip=skip)

    step(None)
    before, moments = core.weights_sha256(model), core.state_sha256(flat(optimizer))

    def leave_out(norm):
        seen.append((norm, math.hypot(*(float(p.grad.norm()) for p in model.parameters()))))
        return True

    norm = step(leave_out)
    assert core.weights_sha256(model) == before and core.state_sha256(flat(optimizer)) == moments
    # norms of norms, in fp32: the gradients are those before clipping to 0.1
    assert seen == [(norm, pytest.approx(norm, rel=1e-5))] and norm > 0.2
    assert all(p.grad is None for p in model.parameters())  # and are gone
    step(lambda norm: False)
    assert core.weights_sha256(model) != before


def test_an_overflow_of_fp16_is_no_spike():
    """It scales less from now on: nothing is said, nothing becomes usual."""
    model, calls = small_gpt(), []
    optimizer, precision = core.make_optimizer(model, "sgd", 0.0), core.Precision("fp16", World())
    examples = every(random_rows(4), 28)

    def step(overflow, leaves_out):
        core.scaled_backward(model(*examples.batch(range(4), "cpu")), World(), 20, precision)
        if overflow:
            model.wte.weight.grad[3, 5] = math.inf
        return core.optimizer_step(
            optimizer, precision, 1.0, 0.01, skip=lambda norm: calls.append(norm) or leaves_out
        )

    start, scale = core.weights_sha256(model), precision.scaler.get_scale()
    assert step(True, False) == math.inf and calls == []
    assert core.weights_sha256(model) == start and precision.scaler.get_scale() == scale / 2
    assert calls == [] and step(False, True) == calls[0] < math.inf
    assert core.weights_sha256(model) == start and precision.scaler.get_scale() == scale / 2
    assert step(False, False) == calls[1] and core.weights_sha256(model) != start


def test_an_overflow_of_fp32_is_a_spike_before_it_is_an_error():
    model, calls = small_gpt(), []
    optimizer, precision = core.make_optimizer(model, "sgd", 0.0), core.Precision("fp32", World())
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, math.inf)
    with pytest.raises(FloatingPointError, match="gradient norm is inf"):
        core.optimizer_step(optimizer, precision, 1.0, 0.01, skip=calls.append)
    assert calls == [math.inf]


def watched(losses, norms, folder, skip_spikes) -> tuple[list[bool], list[str], SimpleNamespace]:
    """What Run.watch leaves out of these steps, what it says, the run."""
    said, model = [], nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.zeros(2)
    run = SimpleNamespace(world=World(), state={}, cfg=SimpleNamespace(skip_spikes=skip_spikes),
                          first_step=0, folder=folder, say=said.append)  # fmt: skip
    run._note_spike = lambda *a: core.Run._note_spike(run, *a)
    steps = enumerate(zip(losses, norms, strict=True), start=1)
    left_out = [
        core.Run.watch(run, step, 7 * loss, 7, model, dict)(norm)  # the sum of 7 targets
        for step, (loss, norm) in steps
    ]
    return left_out, said, run


def test_a_rise_that_no_step_stands_out_in_is_named_once_and_not_left_out(tmp_path):
    rng = np.random.default_rng(0)
    shifts = np.repeat([1.0, 1.3, 1.0, 1.3], [100, 30, 130, 30])
    losses, norms = (shifts * rng.lognormal(0, 0.02, 290)).tolist(), rng.lognormal(0, 0.1, 290).tolist()
    left_out, said, run = watched(losses, norms, tmp_path, skip_spikes=True)
    spikes = spikes_of(tmp_path)
    assert not any(left_out) and {tuple(spike["odd"]) for spike in spikes} == {("smoothed_loss",)}
    rises = [[spike["step"] for spike in spikes if low < spike["step"] <= low + 40] for low in (100, 260)]
    assert sum(map(len, rises)) == len(spikes) and min(map(len, rises)) > 10
    assert [steps[0] - low for steps, low in zip(rises, (100, 260), strict=True)] == [
        pytest.approx(9, abs=4)] * 2  # fmt: skip
    for steps in rises:
        assert steps == list(range(steps[0], steps[-1] + 1))
    assert [re.match(r"spike  step \d+  smoothed_loss ", line)[0] for line in said] == [
        f"spike  step {steps[0]}  smoothed_loss " for steps in rises]  # fmt: skip
    assert not any("left out" in line for line in said)
    assert (run.state["spikes"], run.state["left_out"]) == (len(spikes), 0)
    for spike in spikes:
        smoothed = np.mean(losses[spike["step"] - 10 : spike["step"]])
        assert spike["smoothed_loss"] == pytest.approx(smoothed, rel=1e-12)
        assert spike["smoothed_loss"] > spike["smoothed_loss_limit"] and not spike["left_out"]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_step_that_stands_out_is_left_out_where_that_is_asked_for(name, skips, tmp_path):
    series = {"loss": log_normal(60, 0.05, 1), "grad_norm": log_normal(60, 0.05, 2)}
    series[name][40] = series[name][41] = 5.0
    left_out, said, run = watched(series["loss"], series["grad_norm"], tmp_path, skips)
    spikes = spikes_of(tmp_path)
    named = [spike["step"] for spike in spikes if name in spike["odd"]]
    assert named == [41, 42] and [i + 1 for i, out in enumerate(left_out) if out] == named * skips
    assert [spike["left_out"] for spike in spikes if name in spike["odd"]] == [skips] * 2
    assert len(said) == 1 + skips  # a rise is one line, but each update that is left out is said
    assert said[0].startswith(f"spike  step 41  {name} 5, usually below ")
    assert ("; its update is left out" in said[0]) == skips
    assert (run.state["spikes"], run.state["left_out"]) == (len(spikes), 2 * skips)
    assert (spikes[0]["largest_gradient"], spikes[0]["largest_gradient_norm"]) == ("weight", 2.0)


def flat(optimizer):
    return {f"{i} {key}": value for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}  # fmt: skip


@pytest.fixture
def spike_at(monkeypatch):
    """spike_at(steps, crash): gradients of these steps (from 1) are 60 times as large; a crash in `crash`."""
    now, plan = [None], {"steps": (), "crash": None}
    reseed, backward = core.reseed, core.scaled_backward

    def reseeded(*key):
        now[0] = key[1] + 1 if isinstance(key[1], int) else None
        reseed(*key)

    def scaled(loss, *rest):
        if now[0] is not None and now[0] == plan["crash"]:
            raise RuntimeError("crashed by the test")
        backward(loss * 60 if now[0] in plan["steps"] else loss, *rest)

    everywhere(monkeypatch.setattr, lab.train.batches, "reseed", reseeded)
    everywhere(monkeypatch.setattr, lab.train.loss, "scaled_backward", scaled)
    return lambda steps, crash=None: plan.update(steps=steps, crash=crash)


def spikes_of(folder) -> list[dict]:
    path = folder / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


STEADY = ["--schedule", "constant", "--warmup", 0, "--lr", 1e-4, "--epochs", 3, "--log_every", 100]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_odd_step_is_told_with_what_it_saw(name, spike_at):
    spike_at([25])
    argv = ["--data", toy_file(), *BARE, *STEADY, "--max_steps", 26, "--no-final_eval"]
    _, folder = go(name, *argv)
    (spike,) = spikes_of(folder)
    cfg = config(name, "--smoke", *argv)
    data, parts = parts_of(cfg)
    train = parts["train"]
    batch = core.ShardedBatches(train.lengths, 4, World(), seed=0).global_batch(24)
    lengths = train.lengths[batch]
    expected = {"step": 25, "odd": ["grad_norm"], "rows": data.numbers[train.rows[batch]].tolist(),
                "lengths": lengths.tolist(), "lr": 1e-4, "targets": int(train.targets(batch).sum()),
                "longest": int(lengths.max())}  # fmt: skip
    assert {key: spike[key] for key in expected} == expected
    worst = int(np.argmax(spike["row_losses"]))
    assert spike["worst_row"] == data.tokenizer.decode(train.pair(batch[worst])[0])
    loss = np.average(spike["row_losses"], weights=train.targets(batch))
    assert loss == pytest.approx(spike["loss"], abs=5e-5)  # of four digits
    assert spike["pad_share"] == pytest.approx(1 - lengths.sum() / (4 * lengths.max()), rel=1e-12)
    first = data.tokenizer.decode(train.pair(batch[0])[0])
    assert spike["first_row"] == first and data.texts[train.rows[batch[0]]][0] in first
    assert spike["grad_norm"] > spike["grad_norm_limit"] > 0 and 0 < spike["loss"] <= spike["loss_limit"]
    trains = [n for n, p in initial_model(name, cfg, data.tokenizer).named_parameters() if p.requires_grad]
    assert spike["largest_gradient"] in trains and spike["left_out"] is False
    # the largest of n parts of a sum of squares: over none of them, and no less than their mean
    assert spike["grad_norm"] / math.sqrt(len(trains)) <= spike["largest_gradient_norm"] <= spike["grad_norm"]
    assert spike["grad_norm"] > 2 * cfg.clip  # so that they were not clipped
    assert ("multiplier_lr" in spike) == (name == "run_lora")
    assert spike.get("multiplier_lr", 1e-4) == 1e-4  # alpha 16 / rank 16
    assert "spike  step 25  grad_norm" in (folder / "log.txt").read_text()


def test_the_multiplier_stands_beside_the_rate(spike_at):
    spike_at([22])
    argv = ["--data", toy_file(), *BARE, *STEADY, "--max_steps", 22, "--no-final_eval", "--lora_alpha", 48]
    _, folder = go("run_lora", *argv)
    assert [spike["multiplier_lr"] for spike in spikes_of(folder)] == [pytest.approx(3e-4, rel=1e-12)]


def test_skip_spikes_leaves_the_weights_of_that_step(spike_at):
    argv = ["--data", toy_file(), *BARE, *STEADY, "--no-final_eval", "--test_weights", "last"]
    spike_at([25])
    before = go("run_instruct", *argv, "--max_steps", 24, out="a")[0]["weights_sha256"]
    result, folder = go("run_instruct", *argv, "--max_steps", 25, "--skip_spikes", out="b")
    assert result["weights_sha256"] == before and [s["step"] for s in spikes_of(folder)] == [25]
    assert (result["spikes"], result["left_out"]) == (1, 1)
    assert "spikes  1 of 25 steps, 1 left out (spikes.jsonl)" in (folder / "log.txt").read_text()
    result, folder = go("run_instruct", *argv, "--max_steps", 25, out="c")
    assert result["weights_sha256"] != before and [s["step"] for s in spikes_of(folder)] == [25]
    assert (result["spikes"], result["left_out"]) == (1, 0)


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
def test_what_is_usual_survives_a_crash(name, spike_at):
    """The crash is 1 step behind a spike that is not in a checkpoint: it is met again."""
    argv = [
        "--data",
        toy_file(),
        *BARE,
        *STEADY,
        "--no-final_eval",
        "--skip_spikes",
        "--test_weights",
        "last",
    ]
    argv += ["--max_steps", 30, "--save_every", 8]
    spike_at([23, 25, 28])
    whole, folder = go(name, *argv, out="a")
    assert [spike["step"] for spike in spikes_of(folder)] == [23, 25, 28]
    spike_at([23, 25, 28], crash=26)
    with pytest.raises(RuntimeError, match="crashed by the test"):
        go(name, *argv, out="b")
    assert [spike["step"] for spike in spikes_of(ranks.newest("b"))] == [23, 25]
    spike_at([23, 25, 28])
    resumed, again = go(name, *argv, "--resume_timestamp", "latest", out="b")
    assert "from step_00000024" in (again / "log.txt").read_text()
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    for figures in (whole, resumed):
        assert (figures["spikes"], figures["left_out"]) == (3, 3)
    assert (again / "spikes.jsonl").read_text() == (folder / "spikes.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_run_with_spikes_ends_as_if_it_had_not_been():
    """By SIGKILL; a row of one target among long ones makes a spike without help."""
    rows = toy_rows()
    for i, row in enumerate(rows):
        row["output"] = "" if i % 9 == 4 else " ".join(f"{i + j} apples and stones" for j in range(9))
    argv = ["--smoke", "--data", write_rows(rows), *BARE, *STEADY, "--batch", 1, "--max_steps", 50]
    argv += ["--max_length", 256, "--lr", 1e-5]
    argv += ["--no-final_eval", "--skip_spikes", "--test_weights", "last", "--save_every", 12]
    where = {"env": {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]}}
    whole = ranks.run("run_instruct", *argv, **where)
    folder = ranks.newest()
    assert spikes_of(folder), "no row makes a spike"
    codes = ranks.launch("run_instruct", "--out", "b", *argv, kill=("step", 41, 0), **where)
    assert codes == [-9]
    codes = ranks.launch("run_instruct", "--out", "b", *argv, "--resume_timestamp", "latest", **where)
    assert codes == [0], Path("out.txt").read_text()
    assert ranks.result("b")["weights_sha256"] == whole["weights_sha256"]
    assert (ranks.newest("b") / "spikes.jsonl").read_text() == (folder / "spikes.jsonl").read_text()


# stopped and resumed


def evaluated_steps(folder) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "val/loss" in line]


def samples_of(folder) -> list[tuple[int, int, str]]:
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [(line["step"], line["number"], line["text"]) for line in lines]


STOPPED = [*BARE, "--epochs", 2, "--max_steps", 20, "--eval_every", 8, "--sample_tokens", 3]


def assert_is_the_same_run(resumed, whole):
    (result, folder), (expected, other) = resumed, whole
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert result["test_checkpoints"] == expected["test_checkpoints"]
    assert evaluated_steps(folder) == evaluated_steps(other) == [0, 8, 16, 20]
    assert samples_of(folder) == samples_of(other)
    once = list(itertools.product([0, 8, 16, 20], range(len(PROMPTS))))
    assert [sample[:2] for sample in samples_of(folder)] == once


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("place", "save_every", "repeats"),
    [
        ("amid", 1000, False),
        ("behind", 1000, False),
        ("amid", 8, True),
        pytest.param("behind", 8, True, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_is_repeated_only_if_its_step_was_saved_before_it(
    name, place, save_every, repeats, monkeypatch
):
    """The signal comes amid the evaluation of step 8 or behind it; without a checkpoint it is finished."""
    argv = ["--data", toy_file(), *STOPPED, "--save_every", save_every]
    whole, seen, sent = go(name, *argv, out="a"), [], []

    def strike(step, here):
        if (step, here) == (8, place) and not sent:
            sent.append(here)
            os.kill(os.getpid(), signal.SIGTERM)

    def reported(run, step, *rest, original=tuning.report_validation):
        seen.append(step)
        strike(step, "amid")
        original(run, step, *rest)

    def sampled(run, cfg, step, *rest, original=lab.measure.answers.sample):
        original(run, cfg, step, *rest)
        strike(step, "behind")

    everywhere(monkeypatch.setattr, tuning, "report_validation", reported)
    everywhere(monkeypatch.setattr, lab.measure.answers, "sample", sampled)
    stopped, _ = go(name, *argv, out="b")
    assert (stopped["status"], stopped["checkpoint"]) == ("stopped", "step_00000008")
    resumed = go(name, *argv, "--resume_timestamp", "auto", out="b")
    assert "from step_00000008" in (resumed[1] / "log.txt").read_text()
    assert seen == [0, 8, 8, 16, 20] if repeats else seen == [0, 8, 16, 20]
    assert_is_the_same_run(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_behind_an_evaluation_does_not_repeat_it_on_any_number_of_ranks(name, size):
    where = {"size": size, "env": {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]}}
    argv = ["--smoke", "--data", toy_file(), *STOPPED, "--save_every", 1000]
    whole = ranks.run(name, *argv, **where), ranks.newest()
    argv = ["--out", "b", *argv]
    ranks.launch(name, *argv, sent=("step", 9, signal.SIGTERM), **where)
    assert ranks.result("b")["checkpoint"] == "step_00000009", Path("out.txt").read_text()
    assert ranks.launch(name, *argv, "--resume_timestamp", "auto", **where) == [0] * size
    assert_is_the_same_run((ranks.result("b"), ranks.newest("b")), whole)


def test_a_run_that_was_killed_before_it_knew_its_base_can_be_exported_in_the_end():
    argv = ["--data", toy_file(53), *BARE, "--max_steps", 2, "--no-final_eval"]  # 53: not in the cache yet
    where = {"env": {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]}}
    assert ranks.launch("run_lora", "--smoke", "--out", "out", *argv, kill=("caching", 1, 0), **where) == [-9]
    folder = ranks.newest()
    assert core.read_config(folder)["facts"] == {}
    result, again = go("run_lora", *argv, "--resume_timestamp", "auto")
    facts = core.read_config(folder)["facts"]
    assert again == folder and facts["base_sha256"] == result["base_sha256"]
    assert set(facts["fingerprint"]) == {"data", "tokenizer", "template"}
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    assert (folder / "peft" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
def test_other_validation_rows_or_another_plain_text_are_refused_by_a_resume(name, monkeypatch, capfd):
    texts = {f"{i}.txt": f"Document {i} tells of apples. " * 9 for i in range(60)}
    Path("plain").mkdir()
    for file, text in texts.items():
        Path("plain", file).write_text(text)
    pieces = split_pieces(core.Corpus("plain", ""), BadRows())
    held = [text for part, text, _ in pieces if part == "test"]
    argv = ["--data", toy_file(), *BARE, "--max_steps", 2, "--no-final_eval", "--eval_rows", 2]
    argv += ["--plain", "plain", "--plain_blocks", 9]
    _, folder = go(name, *argv)
    assert len(held) > 1 and "plain" in core.read_config(folder)["facts"]
    flags = ["--smoke", "--out", "out", "--resume_timestamp", folder.name[:15], "--max_steps", 4]
    error = fails(name, [*flags, "--eval_rows", 3], monkeypatch, capfd)
    assert f"{folder} ran with --eval_rows 2, not 3: drop these flags, or start a new run" in error
    before = (folder / "log.txt").read_text(), (folder / "result.json").read_text()
    changed = next(file for file, text in texts.items() if text in held)
    Path("plain", changed).write_text(texts[changed] + "Pears, too.")
    assert f"plain is not what {folder} began with" in fails(name, flags, monkeypatch, capfd)
    assert (folder / "log.txt").read_text().startswith(before[0])
    assert (folder / "result.json").read_text() == before[1]
    Path("plain", changed).write_text(texts[changed])
    result, _ = go(name, *argv[:4], *flags[3:])
    assert result["step"] == 4


# frozen blocks


@pytest.mark.parametrize("head", ["tie_head", "no-tie_head"])
def test_frozen_blocks_stand_still_and_the_others_move(head):
    argv = ["--data", toy_file(), *BARE, "--freeze_blocks", 1, f"--{head}", "--no-final_eval"]
    result, folder = go("run_instruct", *argv, "--test_weights", "last")
    cfg, model, tokenizer = run_instruct.load_model(folder, World())
    after, before = model.state_dict(), initial_model("run_instruct", cfg, tokenizer).state_dict()
    still = {name for name in after if torch.equal(after[name], before[name])}
    frozen = {name for name in after if name.startswith("h.0.")} | {"wpe.weight"}
    frozen |= set() if cfg.tie_head else {"wte.weight"}
    assert still == frozen and len(after) > len(frozen)
    assert result["parameters"] - result["trainable_parameters"] == sum(after[n].numel() for n in frozen)


def test_the_embedding_of_a_model_with_its_own_head_is_frozen_too(gpt2_folder):
    """Its own head may come with the model, not as a copy of the embedding."""
    tokenizer = tokenizers.named_tokenizer(str(gpt2_folder))
    untied = small_gpt(vocab_size=len(tokenizer), tie_head=False)
    core.save_pretrained(untied, tokenizer, "untied")
    argv = ["--model", "untied", "--no-tie_head", "--freeze_blocks", 1, "--max_length", 64]
    cfg = config("run_instruct", *argv)
    model = run_instruct.build_model(cfg, tokenizer, World())
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trains and "wte.weight" not in trains


# answers


@pytest.mark.slow
def test_answers_are_the_same_on_1_2_and_3_ranks_and_in_any_batch(tuned):
    _, model = tuned
    argv = ["--smoke", "--model", model, "--max_steps", 0, "--plain_blocks", 0, "--sample_tokens", 0]
    argv += ["--answer_rows", 24]
    found = []
    for size, batch in ((1, 32), (2, 32), (3, 7)):
        out = f"out{size}"
        codes = ranks.launch("run_instruct", "--out", out, *argv, "--eval_batch", batch, size=size,
                             env={"TOKEN_CACHE": os.environ["TOKEN_CACHE"]})  # fmt: skip
        assert codes == [0] * size, Path("out.txt").read_text()
        found.append((ranks.newest(out) / "responses.json").read_text())
    assert found[0] == found[1] == found[2]
    responses = json.loads(found[0])
    assert len(responses) == 24 and len({row["model_response"] for row in responses}) > 5


def test_the_batch_does_not_matter_to_an_answer(tuned):
    cfg, model, tokenizer = run_instruct.load_model(tuned[1], World())
    data, parts = parts_of(cfg)
    prompts = [data.prompt(row) for row in parts["test"].rows[:9]]
    together = lab.measure.answers.answers(model, tokenizer, prompts, 16, 9, World())
    assert together == lab.measure.answers.answers(model, tokenizer, prompts, 16, 2, World())
    assert together == [
        lab.measure.answers.answers(model, tokenizer, [ids], 16, 1, World())[0] for ids in prompts
    ]
    assert lab.measure.answers.answers(model, tokenizer, [], 16, 4, World()) == []


def test_responses_are_the_test_rows_with_an_answer_each(tuned):
    result, folder = tuned
    cfg, _, _ = run_instruct.load_model(folder, World())
    data, parts = parts_of(cfg)
    responses = json.loads((folder / "responses.json").read_text())
    named = [
        dict(zip(columns.INSTRUCTION_COLUMNS, data.texts[row], strict=True)) for row in parts["test"].rows
    ]
    assert [{k: row[k] for k in columns.INSTRUCTION_COLUMNS} for row in responses] == named
    assert {tuple(row) for row in responses} == {(*columns.INSTRUCTION_COLUMNS, "model_response")}
    right = [first_word(row["model_response"]) == first_word(row["output"]) for row in responses]
    assert result["test/first_word"] == np.mean(right)
    usual, times = Counter(first_word(data.texts[row][2]) for row in parts["train"].rows).most_common(1)[0]
    assert times > 1
    guess = np.mean([first_word(row["output"]) == usual for row in responses])
    assert result["test/first_word_guess"] == guess
    assert result["test/empty_responses"] == 0


class Answering(nn.Module):
    """A model that says what stands in `replies` for the first id of a prompt, then the end token."""

    def __init__(self, replies):
        super().__init__()
        self.replies, self.config = replies, SimpleNamespace(block_size=64, tie_head=False)
        self.wte, self.h = nn.Embedding(1, 1), []

    def hidden(self, input_ids, cache=None):
        if not hasattr(cache, "said"):
            real = 0 if cache.padding is None else cache.padding
            cache.who, cache.said = input_ids[torch.arange(len(input_ids)), real].tolist(), 0
        words = [[*self.replies[who], *[END] * 9][cache.said] for who in cache.who]
        cache.said += 1
        return nn.functional.one_hot(torch.tensor(words), 100).float()[:, None]

    def logits(self, hidden):
        return hidden


class Numbers:
    eos_token_id = END

    def __len__(self):
        return 100

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)


def test_empty_answers_are_counted_and_an_id_of_0_is_an_answer(tmp_path):
    data = by_hand(([1, 50], [7]), ([2], [5]), ([3, 4, 5], [0]), ([4], [8, 8]))
    data.tokenizer = Numbers()
    data.texts = [[f"q{i}", "", text] for i, text in enumerate(["7", "5", "0 1", "8 8"])]
    model = Answering({1: [], 2: [5, 6, 7, 8, 9], 3: [0, 1], 4: []})
    said = []
    run = SimpleNamespace(world=World(), folder=tmp_path, say=said.append, poll=lambda active=0: 0)
    cfg = toy_cfg("--max_new_tokens", 3, "--eval_batch", 3)
    parts = {"train": every(data), "test": every(data)}
    figures = write_responses(run, cfg, SimpleNamespace(data=data, parts=parts), model)
    answers = [row["model_response"] for row in json.loads((tmp_path / "responses.json").read_text())]
    assert answers == ["", "5 6 7", "0 1", ""]
    assert figures["test/empty_responses"] == 2 and figures["test/first_word"] == 0.5
    assert "answers  4 in responses.json, 2 empty" in said


def test_rows_whose_answer_has_no_word_do_not_count_among_first_words():
    data = by_hand(*[([i], [7]) for i in range(5)])
    data.texts = [["q", "", text] for text in ("Yes, it is.", "...", "no", "YES!", "")]
    s = SimpleNamespace(data=data, parts={"train": core.Examples(data, np.array([0, 3, 2]), 9)})
    run = SimpleNamespace(say=lambda line: None)
    figures = first_words(run, s, np.arange(5), ["yes", "...", "yes", "no", ""])
    assert figures["test/first_word"] == 1 / 3 and figures["test/first_word_guess"] == 2 / 3
    assert first_words(run, s, np.array([1, 4]), ["", "word"]) == {}


# questions


@pytest.mark.parametrize("fixture", ["tuned", "adapted"])
def test_a_run_answers_what_it_is_asked(fixture, request, monkeypatch, capfd):
    _, folder = request.getfixturevalue(fixture)
    name = {"tuned": "run_instruct", "adapted": "run_lora"}[fixture]
    argv = ["--mode", "ask", "--run_folder", folder, "--max_new_tokens", 9]
    cfg, model, tokenizer = SCRIPTS[name].load_model(folder, World())
    questions = ["What does math.sin do?", "Explain os.path.join in a sentence."]
    texts = [instructions.prompt_text(question, "", cfg.template) for question in questions]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    expected = [lab.measure.answers.answers(model, tokenizer, [ids], 9, 1, World())[0] for ids in prompts]
    capfd.readouterr()
    SCRIPTS[name].main(config(name, *argv, "--prompt", f" {questions[0]} "), World())
    assert capfd.readouterr().out == f"{expected[0]}\n" and expected[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([questions[1], "", questions[0]])))
    SCRIPTS[name].main(config(name, *argv), World())
    assert capfd.readouterr().out == f"{expected[1]}\n{expected[0]}\n"


@pytest.mark.parametrize(
    ("name", "mode"), [("run_instruct", "ask"), ("run_lora", "ask"), ("run_lora", "export")]
)
def test_a_question_takes_one_process(name, mode):
    cfg = config(name, "--mode", mode, "--run_folder", "nowhere", "--prompt", "Why?")
    for rank in (0, 1):
        with pytest.raises(UserError, match=f"--mode {mode} runs in one process: start it with python$"):
            SCRIPTS[name].main(cfg, World(rank=rank, size=2))
    assert not list(Path().iterdir())


# adapters


def tune_folder(gpt2_folder, *argv, out="out"):
    most = ["--model", gpt2_folder, "--tie_head", "--lr", 0.02, "--data", toy_file()]
    most += [] if "--adapter" in argv else ["--no-lora_head"]  # an adapter brings its own
    return go("run_lora", *most, *BARE, *argv, out=out)


def test_a_checkpoint_holds_adapters_only_and_the_base_is_named(adapted):
    result, folder = adapted
    cfg, model, _ = run_lora.load_model(folder, World())
    paths = list((folder / "checkpoints").glob("*/model.safetensors"))
    wanted = {name: p.shape for name, p in core.Adapters(model).named_parameters()}
    assert len(paths) >= 2 and len(wanted) == 2 * 9
    for path in paths:
        held = safetensors.torch.load_file(path)
        assert {name: w.shape for name, w in held.items()} == wanted
        assert all(name.rpartition(".")[2] in "AB" for name in held)
    fresh = core.base_weights(initial_model("run_lora", cfg, _))
    assert result["base_sha256"] == core.state_sha256(fresh)
    assert core.read_config(folder)["facts"]["base_sha256"] == result["base_sha256"]
    assert result["trainable_parameters"] == sum(math.prod(shape) for shape in wanted.values())
    assert "the base is unchanged (checksum)" in (folder / "log.txt").read_text()


def test_a_changed_base_is_refused_by_a_resume_and_by_load_model(gpt2_folder, monkeypatch, capfd):
    base = gpt_formats.load_pretrained(str(gpt2_folder))
    tokenizer = tokenizers.named_tokenizer(str(gpt2_folder))
    core.save_pretrained(base, tokenizer, "mine")
    argv = ["--max_steps", 2, "--no-final_eval"]
    _, folder = tune_folder("mine", *argv)
    before = (folder / "log.txt").read_text()
    with torch.no_grad():
        base.h[1].mlp.c_fc.bias[3] += 1e-3
    core.save_pretrained(base, tokenizer, "mine")
    flags = ["--smoke", "--out", "out", "--resume_timestamp", folder.name[:15], "--max_steps", 4]
    error = fails("run_lora", flags, monkeypatch, capfd)
    assert "base_sha256 is not what out/" in error
    assert (folder / "log.txt").read_text().startswith(before)
    with pytest.raises(UserError, match="model mine is not the one that"):
        run_lora.load_model(folder, World())


def test_exported_adapters_are_the_run_to_peft_and_to_a_run_that_goes_on(gpt2_folder, capfd):
    import peft
    from transformers import GPT2LMHeadModel

    result, folder = tune_folder(gpt2_folder, "--test_weights", "last", "--lora_alpha", 32)
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    out = capfd.readouterr().out
    assert out.splitlines()[-4:] == [
        f"written: {folder}/merged",
        f"next: python gpt_scratch.py --mode generate --model {folder}/merged",
        f"written: {folder}/peft, adapters for",
        f"  {gpt2_folder}",
    ]
    cfg, model, tokenizer = run_lora.load_model(folder, World())
    _, parts = parts_of(cfg)
    ids = parts["test"].batch(range(4), "cpu")[0]
    merged = GPT2LMHeadModel.from_pretrained(folder / "merged")
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(gpt2_folder), folder / "peft")
    ours = gpt_formats.load_pretrained(str(folder / "merged")).eval()
    with torch.no_grad():
        expected, base = model(ids), GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()(ids).logits
        found = [merged.eval()(ids).logits, theirs.eval()(ids).logits, ours(ids)]
    for logits in found:  # fp32, another order of additions
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (base - expected).abs().max() > 0.01 * expected.abs().max()
    assert tokenizers.named_tokenizer(str(folder / "merged")).get_vocab() == tokenizer.get_vocab()
    # from here another run goes on: at its step 0 it is the exported one
    argv = ["--adapter", folder / "peft", "--max_steps", 0]
    again, other = tune_folder(gpt2_folder, *argv, out="again")
    assert again["test/loss"] == pytest.approx(result["test/loss"], rel=1e-6)  # alpha / rank, once more
    assert again["trainable_parameters"] == result["trainable_parameters"]
    stronger = max(
        layer.multiplier for layer in core.adapted(run_lora.load_model(other, World())[1]).values()
    )
    assert stronger == pytest.approx(2, rel=1e-12)
    better, _ = tune_folder(gpt2_folder, "--adapter", folder / "peft", "--epochs", 3, out="better")
    assert better["val/loss"] < result["val/loss"]


def test_the_base_that_exported_adapters_name_is_there(adapted, capfd):
    """Of a tiny model, too, whose weights are in no folder beforehand."""
    _, folder = adapted
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    base = json.loads((folder / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_dir()


def exported(folder) -> dict[str, torch.Tensor]:
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    peft, merged = (
        safetensors.torch.load_file(folder / path)
        for path in ("peft/adapter_model.safetensors", "merged/model.safetensors")
    )
    return {**{f"peft {k}": w for k, w in peft.items()}, **{f"merged {k}": w for k, w in merged.items()}}


def test_adapters_that_a_run_began_with_may_go(gpt2_folder):
    steady = ["--schedule", "constant", "--warmup", 0, "--test_weights", "last", "--no-final_eval"]
    argv = ["--max_steps", 4, *steady]
    _, first = tune_folder(gpt2_folder, *argv, "--lora_rank", 3, "--lora_alpha", 6, out="first")
    exported(first)
    shutil.move(first / "peft", "mine")
    argv = [*steady, "--adapter", "mine"]
    whole, other = tune_folder(gpt2_folder, *argv, "--max_steps", 8, out="whole")
    _, folder = tune_folder(gpt2_folder, *argv, "--max_steps", 4)
    kept = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    assert kept == {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    model = run_lora.load_model(folder, World())[1]
    shutil.rmtree("mine")
    assert core.weights_sha256(run_lora.load_model(folder, World())[1]) == core.weights_sha256(model)
    assert exported(folder).keys() == exported(other).keys()
    resumed, _ = tune_folder(gpt2_folder, *argv, "--max_steps", 8, "--resume_timestamp", folder.name[:15])
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_a_second_export_takes_the_place_of_the_first(gpt2_folder):
    argv = ["--test_weights", "last", "--no-final_eval", "--schedule", "constant", "--warmup", 0]
    _, other = tune_folder(gpt2_folder, *argv, "--epochs", 2, out="whole")
    _, folder = tune_folder(gpt2_folder, *argv)
    before = exported(folder)
    again = tune_folder(gpt2_folder, *argv, "--epochs", 2, "--resume_timestamp", folder.name[:15])[1]
    assert again == folder
    after, expected = exported(folder), exported(other)
    assert after.keys() == before.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    for kind in ("peft", "merged"):
        assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith(kind))


@pytest.mark.parametrize("how", ["fresh", "adapter"])
def test_a_head_is_exported_beside_a_base_with_a_head_of_its_own(how, gpt2_folder):
    """Onto a tied base peft would merge it into the embedding, too."""
    argv = ["--model", gpt2_folder, "--no-tie_head", "--data", toy_file(), *BARE, "--max_steps", 2]
    argv += ["--no-final_eval"]
    _, folder = go("run_lora", *argv, "--lora_head", smoke=False)
    names = exported(folder)
    if how == "adapter":
        _, folder = go("run_lora", *argv, "--adapter", folder / "peft", out="again", smoke=False)
        assert exported(folder).keys() == names.keys()
    base = json.loads((folder / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert "peft base_model.model.lm_head.lora_A.weight" in names
    assert Path(base).is_absolute() and Path(base).samefile(folder / "base")
    weights = safetensors.torch.load_file(Path(base) / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_adapters_on_the_output_matrix_alone_are_a_run():
    argv = ["--data", toy_file(), *BARE, "--max_steps", 2, "--lora_layers", 0, "--lora_head", "--no-tie_head"]
    _, folder = go("run_lora", *argv)
    weights = [safetensors.torch.load_file(path) for path in folder.glob("checkpoints/*/model.safetensors")]
    assert weights and all(set(held) == {"lm_head.A", "lm_head.B"} for held in weights)
    assert any(held["lm_head.B"].any() for held in weights)
    assert {key.split(".lora_")[0] for key in exported(folder) if key.startswith("peft")} == {
        "peft base_model.model.lm_head"}  # fmt: skip


@pytest.mark.parametrize("fixture", ["tuned", "adapted"])
def test_a_run_can_be_opened_and_measures_as_it_did(fixture, request):
    result, folder = request.getfixturevalue(fixture)
    name = {"tuned": "run_instruct", "adapted": "run_lora"}[fixture]
    cfg, model, tokenizer = SCRIPTS[name].load_model(folder, World())
    data, parts = parts_of(cfg)
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab() and not model.training
    sums = SCRIPTS[name].evaluate(model, parts["test"], cfg, World())
    m, _ = tuning.measure("test", sums, parts["test"], parts["train"])
    assert {f"test/{k}": v for k, v in m.items()} == {k: result[k] for k in (f"test/{k}" for k in m)}


@pytest.mark.parametrize("name", [pytest.param("run_instruct", marks=pytest.mark.slow), "run_lora"])
def test_a_run_in_fp64_can_be_opened(name):
    argv = ["--data", toy_file(), *BARE, "--max_steps", 3, "--dtype", "fp64"]
    result, folder = go(name, *argv)
    cfg, model, _ = SCRIPTS[name].load_model(folder, World())
    loss = loss_of(model.double(), parts_of(cfg)[1]["test"], cfg)
    assert loss == pytest.approx(result["test/loss"], rel=1e-5)  # weights may have been rounded to fp32


# smoke runs, forgetting


def training_losses(folder) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_short_smoke_run_of_all_weights_learns(tuned):
    result, folder = tuned
    losses = training_losses(folder)
    assert losses[-1] < losses[0] - 1.0
    assert result["test/first_word"] >= 0.2 and "alarm" not in result  # by guessing 0.05
    assert result["plain/forgotten"] == pytest.approx(
        result["plain/after"] - result["plain/before"], abs=1e-9
    )


def test_a_short_smoke_run_of_adapters_learns(adapted):
    result, folder = adapted
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < losses[0] - 1.0 and losses[-1] == result["val/loss"]
    assert result["test/accuracy"] >= 0.08 and "alarm" not in result  # a sixth of the smoke run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "figure", "least"), [("run_instruct", "test/first_word", 0.5),
                                                       ("run_lora", "test/accuracy", 0.15)])  # fmt: skip
def test_the_whole_smoke_run_learns(name, figure, least):
    result, folder = go(name)
    losses = training_losses(folder)
    assert losses[-1] < losses[0] - 1.0 and result[figure] >= least


@pytest.mark.parametrize("name", [pytest.param("run_instruct", marks=pytest.mark.slow), "run_lora"])
def test_an_untrained_run_knows_and_forgets_nothing(name):
    result, _ = go(name, "--max_steps", 0, "--sample_tokens", 0, "--plain_blocks", 4, "--answer_rows", 30)
    assert result["step"] == 0 and "alarm" not in result
    assert result["test/first_word"] < 0.1 and result["test/accuracy"] < 0.05
    assert result["plain/forgotten"] == 0 and result["plain/after"] == result["plain/before"]
    cfg = config(name, "--smoke", "--plain_blocks", 4)
    tokenizer = core.load_instructions(cfg, World()).tokenizer
    blocks = tuning.plain_blocks("python-docs", tokenizer, 128, 4)
    assert blocks.lengths.tolist() == [128] * 4
    model = initial_model(name, cfg, tokenizer)
    # np.average multiplies by the targets what was divided by them
    assert result["plain/before"] == pytest.approx(loss_of(model, blocks, cfg), rel=1e-12)


def test_what_is_forgotten_is_the_difference_to_the_initial_model(tuned):
    result, folder = tuned
    cfg, model, tokenizer = run_instruct.load_model(folder, World())
    blocks = tuning.plain_blocks(cfg.plain, tokenizer, cfg.max_length, cfg.plain_blocks)
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
        tuning.plain_blocks("one.txt", tokenizer, 16, 2)


def test_plain_text_is_the_held_out_documents_each_behind_an_end_token(monkeypatch):
    pieces = [("test", "abc", True), ("train", "zzz", True), ("test", "<|endoftext|>", True)]
    everywhere(monkeypatch.setattr, lab.data.text, "split_pieces", lambda *a: pieces)
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    blocks, end = tuning.plain_blocks("text", tokenizer, 6, 9), tokenizer.eos_token_id
    ids = blocks.tokens.tolist()
    assert tokenizer.decode(ids) == "<|endoftext|>abc<|endoftext|><|endoftext|>"
    assert [i for i, token in enumerate(ids) if token == end] == [0, 4] and len(ids) == 18  # letters follow
    assert blocks.lengths.tolist() == [6, 6, 5]


# errors


def fails(name, argv, monkeypatch, capfd) -> str:
    """Expects one line on stderr and exit code 2; returns the line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        ranks.main(name)
    lines = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{name}.py: error: ")
    return lines[0]


TUNE = [(name, *case) for name in SCRIPTS for case in [
    (["--model", "tiny:foo"], "--model tiny:foo: the only tiny one here is tiny:gpt2"),
    (["--data", "absent.json"], "no such file or folder: absent.json"),
    (["--data", "odd.json"], "odd.json lacks column(s) instruction, output; found: question, answer"),
    (["--data", "long.json", "--max_length", 64], "prompts of all 20 rows fill 64 tokens: use a larger"),
    (["--data", "rows.json", "--split", "file_order", "--max_documents", 3], "leaves no test rows of 3: use"),
    (["--data", "rows.json", "--plain", "absent.txt", "--plain_blocks", 2], "--plain: no such file or fold"),
    (["--data", "rows.json", "--batch", 5000], "training rows do not fill a batch of 5000"),
    (["--data", "rows.json", "--max_documents", 2], "cannot be split into 3 parts"),
    (["--data", "rows.json", "--model", "base", "--max_length", 65],
     "64 positions of base"),
]]  # fmt: skip
ERRORS = [
    *TUNE,
    ("run_instruct", ["--freeze_blocks", 99], "--freeze_blocks 99"),
    ("run_lora", ["--lora_head", "--tie_head"], "the output matrix is the embedding: use --no-tie_head"),
    ("run_lora", ["--adapter", "nowhere"], "nowhere is no whole adapter of peft"),
    ("run_lora", ["--lora_layers", 3], "--lora_layers 3 is more than the model's 2 blocks"),
    ("run_lora", ["--lora_layers", 0, "--no-lora_head"], "use more --lora_layers, or --lora_head"),
    ("run_lora", ["--mode", "export", "--run_folder", "nowhere"], "nowhere is no run folder"),
]


@pytest.mark.parametrize(
    ("name", "argv", "line"), ERRORS, ids=[f"{n} {' '.join(map(str, a))}" for n, a, _ in ERRORS]
)
def test_a_mistake_is_one_line_and_leaves_no_folder(name, argv, line, gpt2_folder, monkeypatch, capfd):
    toy_file()
    write_rows([{"question": "a", "answer": "b"}] * 5, "odd.json")
    long = [{"instruction": f"{i} " + "wordy " * 200, "input": "", "output": "x"} for i in range(20)]
    write_rows(long, "long.json")
    Path("base").symlink_to(gpt2_folder)
    error = fails(name, ["--smoke", "--out", "out", *QUIET, *argv], monkeypatch, capfd)
    assert line in error
    assert not list(Path("out").glob("*"))


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
def test_a_run_with_an_output_matrix_of_its_own_is_no_tied_model(name, monkeypatch, capfd):
    argv = ["--smoke", *QUIET, "--data", toy_file(), "--batch", 4]
    _, base = go("run_instruct", *argv, "--no-tie_head", "--max_steps", 0, "--no-final_eval", out="base")
    argv += ["--out", "out", "--model", base, "--no-lora_head"][: None if name == "run_lora" else 4]
    error = fails(name, [*argv, "--tie_head"], monkeypatch, capfd)
    assert f"{base} has an output matrix of its own: use --no-tie_head" in error
    assert not list(Path("out").glob("*"))
    result, _ = go(name, *argv[1:], "--no-tie_head", "--max_steps", 1, "--no-final_eval")
    assert result["step"] == 1


def test_a_tiny_model_too_has_no_more_positions_than_it_has(monkeypatch, capfd):
    """As for the models with weights: one line, no traceback out of the middle of a step."""
    long = [
        {"instruction": f"Say {i} " + "wordy words " * 300, "input": "", "output": "x"} for i in range(60)
    ]
    argv = ["--smoke", *QUIET, "--data", write_rows(long), "--batch", 4, "--max_length", 1000]
    assert "--max_length 1000" in fails("run_instruct", argv, monkeypatch, capfd)


# built-in rows


def test_the_built_in_rows_are_many_distinct_and_the_same_each_time():
    rows = builtin.python_instructions()
    assert rows == builtin.python_instructions() and rows != builtin.python_instructions(seed=1)
    assert len(rows) >= 600 and all(list(row) == list(columns.INSTRUCTION_COLUMNS) for row in rows)
    prompts = Counter((row["instruction"], row["input"]) for row in rows)
    assert len(prompts) == len(rows)
    functions = {}  # answered by each first word
    for row in rows:
        texts = f"{row['instruction']} {row['input']}"
        name = re.search(r"\b[a-z][a-z0-9]*(\.\w+)+", texts)[0]
        functions.setdefault(row["output"].split()[0], set()).add(name)
    assert max(map(len, functions.values())) <= 4
    assert 6 * sum(map(len, functions.values())) == len(rows)  # each in six wordings
    assert sum(row["input"] != "" for row in rows) == len(rows) / 2
    for row in rows:
        assert instructions.parse(row) == list(row.values())


# what is said


def reports(losses, every_steps=10, steps_per_epoch=40) -> list[list[str]]:
    """The lines of each evaluation."""
    said, run = [], SimpleNamespace(state={}, metrics=lambda *a: None)
    for number, loss in enumerate(losses):
        lines = []
        run.say = lines.append
        val = {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5}
        val |= {"loss_interval": [loss - 0.1, loss + 0.1], "accuracy_interval": [0.4, 0.6]}
        tuning.report_validation(run, number * every_steps, val, "epoch", False, steps_per_epoch)
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
    run = SimpleNamespace(say=said.append, begin=lambda: said.append("begins"))
    data, cfg = random_rows(23), config("run_instruct", "--preset", "run_1", "--batch", 4)
    parts = {"train": every(data, 64), "test": range(5), "val": range(3)}
    s = SimpleNamespace(data=data, parts=parts, units=parts["train"], lines=["a line"])
    tuning.announce(run, cfg, s, model)
    assert said[0] == "model gpt2-medium  406.3M parameters, 406.3M trainable   train 23  test 5  val 3"
    assert said[1:3] == ["begins", "parameters 406,286,336  1549.86 MB in fp32  trainable 406,286,336"]
    assert "a line" in said and said[-1].startswith("each epoch leaves out 3 of 23 rows")


def test_the_loss_is_shown_as_it_masks():
    shown = tuning.describe_example(every(by_hand(([1, 2, 3], [4, 5]))))
    assert shown.splitlines() == [
        "the loss sees row 1: 3 targets, 3 tokens masked; padding is masked",
        "  masked:  1 2 3",
        f"  counted: 4 5 {END}",
    ]
