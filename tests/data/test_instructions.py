"""Instruction rows: templates, what the loss counts, splits, packs."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from toys.sft import (
    END,
    QUIET,
    SCRIPTS,
    by_hand,
    every,
    go,
    initial_model,
    loss_of,
    parts_of,
    random_rows,
    small_gpt,
    toy_cfg,
    toy_rows,
    write_rows,
)

import core
from core import IGNORE_INDEX, UserError, World
from lab.data import instructions, pairs

SHARED = PROJECT.parent / "shared" / "data" / "instruct" / "instruction-data.json"
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
        ({"instruction": "a", "input": "", "output": "nan"}, r"output is missing \(nan\)"),
        ({"instruction": " <NA>", "input": "", "output": "b"}, r"instruction is missing \(<NA>\)"),
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


@pytest.mark.parametrize(
    "cell", [None, float("nan"), "nan", "NaN", "None", "N/A", "NA", "<NA>", "null", "<noinput>"]
)
def test_a_missing_input_in_any_spelling_is_none(cell):
    Path("rows.json").write_text(json.dumps([{"instruction": "a", "input": cell, "output": "None"}]))
    (row,) = core.read_rows("rows.json")
    assert instructions.parse(row) == ["a", "", "None"]


def test_a_category_is_text_that_can_be_written():
    assert [instructions.category(cell) for cell in ("qa", 3, "a\ud800", None, "nan", "")] == [
        "qa", "3", "a\\ud800", None, None, None]  # fmt: skip


@pytest.mark.parametrize("load", [instructions.load_instructions, pairs.load_pairs])
def test_a_mistyped_file_is_named_before_a_tokenizer_is_fetched(load):
    cfg = SimpleNamespace(data="mistyped.csv", extra_data=(), model="nobody/nothing", max_documents=None)
    with pytest.raises(core.UserError, match=r"^no such file or folder: mistyped.csv$"):
        load(cfg, core.World())
