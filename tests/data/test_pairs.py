"""Preference pairs: parsing, truncation that keeps prompt and responses in sight, both orders."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from ranks import everywhere, launch
from toys.preference import row, write_csv

import core
import run_preference as script
from core import UserError, World
from lab.data import pairs, tables
from lab.data.split import split_by_group
from lab.train import processes

SHARED = PROJECT.parent / "shared" / "data" / "preference" / "pandalm_part1.csv"


def test_bad_rows_are_counted_and_named_and_many_are_an_error():
    rows = [row(n, prompt=json.dumps([f"prompt {n}", ""])) for n in range(250)]
    rows[7]["prompt"] = "broken"
    rows[99]["winner_model_a"] = 0
    assert launch("run_preference", "--smoke", "--data", write_csv(rows), "--epochs", 0) == [0]
    said = Path("out.txt").read_text()
    assert (
        'left out 1 row(s), prompt is no JSON (a text is written ["text"]): 8' in said
        and "left out 1 row(s), no winner: 100" in said
    )
    for number in (3, 4, 5):
        rows[number]["response_a"] = ""
    assert launch("run_preference", "--smoke", "--data", write_csv(rows), "--epochs", 0) == [2]
    error = "5 of 250 rows are unusable, more than 1%: mend or remove them, e.g. row 4: response_a is empty"
    assert error in Path("out.txt").read_text()


def data_of(lengths_by_row):
    """Preferences whose piece p of a row holds tokens 1000 * p, 1000 * p + 1, ..."""
    sizes = [n for lengths in lengths_by_row for n in lengths]
    tokens = [1000 * (p % len(lengths_by_row[0])) + i for p, n in enumerate(sizes) for i in range(n)]
    return pairs.Preferences(
        ids=[],
        groups=np.zeros(0),
        labels=np.zeros(len(lengths_by_row), dtype=np.int64),
        first=np.concatenate([[0], np.cumsum([len(lengths) for lengths in lengths_by_row])]),
        tokens=np.array(tokens),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        tokenizer=SimpleNamespace(cls_token_id=-1, sep_token_id=-2, pad_token_id=-3),
        folder=Path(),
        fingerprint={},
        lines=[],
    )


def test_room_is_shared_so_that_prompt_and_response_stay_visible():
    assert pairs.allot([3, 4], 10) == [3, 4]
    assert pairs.allot([3, 400], 10) == [3, 7]
    assert pairs.allot([300, 400], 10) == [5, 5]
    assert pairs.allot([1, 100, 3, 100], 21) == [1, 8, 3, 9]
    data = data_of([[2000, 30, 600]])  # the journal's case: a prompt longer than max_length
    a = pairs.sequence_ids(data, 0, 1, "prompt+responses", 512)
    b = pairs.sequence_ids(data, 0, 2, "prompt+responses", 512)
    assert len(a) == len(b) == 512
    assert a[-31:] == [*range(1000, 1030), -2] and a[:2] == [
        -1,
        0,
    ]  # the whole answer, the prompt's beginning
    assert b.count(-2) == 2 and a != b
    pairs.measure_sequences(data, "prompt+responses", 512)
    assert data.truncated() == {"prompt": 1.0, "response_a": 0.0, "response_b": 1.0}
    assert data.lengths.tolist() == [[512, 512]]


def test_a_cut_piece_keeps_its_beginning_and_its_end():
    data = data_of([[4, 100, 5]])
    ids = pairs.sequence_ids(data, 0, 1, "responses", 12)
    assert ids == [-1, 1000, 1001, 1002, 1003, 1004, 1095, 1096, 1097, 1098, 1099, -2]
    assert pairs.sequence_ids(data, 0, 2, "responses", 12) == [-1, 2000, 2001, 2002, 2003, 2004, -2]


def test_with_more_turns_than_fit_the_last_ones_are_kept():
    data = data_of([[20] * 90])
    ids = pairs.sequence_ids(data, 0, 1, "prompt+responses", 128)
    assert len(ids) <= 128 and ids.count(-2) == 6  # three turns, 16 tokens or more of each piece
    assert max(ids) // 1000 == 88  # the last answer of A
    pairs.measure_sequences(data, "prompt+responses", 128)
    assert data.truncated()["prompt"] == 1.0


def test_in_one_sequence_prompt_and_answers_get_20_40_40_percent_and_what_others_leave():
    assert pairs.allot_by_role([900, 900, 900], 100) == [20, 40, 40]
    assert pairs.allot_by_role([5, 900, 900], 100) == [5, 47, 47]  # alike, though one token stays unused
    assert pairs.allot_by_role([900, 10, 900], 100) == [30, 10, 60]
    assert pairs.allot_by_role([900, 10, 20], 100) == [70, 10, 20]
    assert pairs.allot_by_role([3, 4, 5], 100) == [3, 4, 5]
    data = data_of([[900, 700, 600]])
    ids = pairs.sequence_ids(data, 0, 1, "joint", 104)
    assert len(ids) == 104 and [sum(i // 1000 == role for i in ids if i >= 0) for role in range(3)] == [
        20,
        40,
        40,
    ]
    other = pairs.sequence_ids(data, 0, 2, "joint", 104)
    assert [i // 1000 for i in ids if i >= 0 and i % 1000 == 0] == [0, 1, 2]
    assert [i // 1000 for i in other if i >= 0 and i % 1000 == 0] == [0, 2, 1] and sorted(other) == sorted(
        ids
    )


def test_a_swapped_row_is_the_row_with_A_and_B_swapped():
    data, turned = data_of([[5, 30, 9], [4, 3, 20]]), data_of([[5, 9, 30], [4, 20, 3]])
    texts = [0, 5, 35, 44, 48, 51, 71]  # where the pieces of `data` begin
    turned.tokens = np.concatenate([data.tokens[texts[p] : texts[p + 1]] for p in (0, 2, 1, 3, 5, 4)])
    for inputs in ("responses", "prompt+responses", "joint"):
        cfg = SimpleNamespace(inputs=inputs, max_length=24)
        for orders in (1, 2):
            got = core.collate(data, [0, 1], cfg, "cpu", orders, [True, True])
            want = core.collate(turned, [0, 1], cfg, "cpu", orders)
            assert torch.equal(got.pop("input_ids"), want.pop("input_ids")) and got == want
            assert len(got["lengths"]) == (2 if inputs == "joint" and orders == 1 else 4)


def test_lengths_are_those_of_the_ids():
    rng = np.random.default_rng(0)
    rows = [[int(n) for n in rng.integers(0, 90, 6)] for _ in range(60)]
    for inputs in ("responses", "prompt+responses", "joint"):
        for most in (32, 64, 512):
            data = data_of(rows)
            pairs.measure_sequences(data, inputs, most)
            got = [
                [len(pairs.sequence_ids(data, r, side, inputs, most)) for side in (1, 2)] for r in range(60)
            ]
            assert data.lengths.tolist() == got and np.max(got) <= most


@pytest.mark.parametrize("inputs", ["responses", "prompt+responses", "joint"])
def test_whatever_is_cut_every_piece_that_is_shown_keeps_its_beginning_and_its_end(inputs):
    """Long prompts, long answers, many turns; the last turn is always shown."""
    rng = np.random.default_rng(1)
    for turns in (1, 2, 5, 40):
        rows = [rng.choice([0, 1, 2, 7, 60, 600], 3 * turns).tolist() for _ in range(5)]
        for lengths, most, which in itertools.product(rows, (16, 40, 128, 512), (1, 2)):
            data, shown = data_of([lengths]), {"responses": 1, "prompt+responses": 2, "joint": 3}
            spans, _ = pairs.lay_out(data, 0, which, inputs, most)
            ids = pairs.sequence_ids(data, 0, which, inputs, most)
            assert len(ids) <= most and len(spans) % shown[inputs] == 0 and len(spans) >= shown[inputs]
            assert max(stop for _, stop, _ in spans) >= data.offsets[-2]  # of the last turn
            at = 1
            for start, stop, kept in spans:
                piece, whole = ids[at : at + kept], data.tokens[start:stop].tolist()
                assert kept >= min(2, len(whole)) and (not kept or piece[-1] == whole[-1])
                assert piece[: (kept + 1) // 2] == whole[: (kept + 1) // 2]
                at += kept + 1
            assert at == len(ids)


def split_of(groups, labels, sets=None, fold=0, **changes):
    constants = {"folds": None, "val_share": 0.1, "test_share": 0.1, "split_seed": 42} | changes
    known = {"groups": np.array(groups), "labels": np.array(labels), "sets": sets}
    data = SimpleNamespace(**known, own=lambda rows: pairs.Preferences.own(data, rows))
    return pairs.split_rows(data, SimpleNamespace(**constants), fold)


def test_the_default_split_is_the_one_that_it_was_and_shares_are_constants():
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 150, 500).astype(str), rng.integers(0, 3, 500)
    for seed in range(3):
        parts = split_by_group(groups, labels, [8, 1, 1], seed)
        rows = split_of(groups, labels, split_seed=seed)
        assert [rows[part].tolist() for part in ("train", "val", "test")] == [
            np.flatnonzero(parts == part).tolist() for part in range(3)
        ]
    rows = split_of(groups, labels, val_share=0.2, test_share=0.0)
    assert abs(len(rows["val"]) - 100) < 4 and len(rows["train"]) + len(rows["val"]) == 500
    rows = split_of(groups, labels, val_share=0.25, test_share=0.25)
    assert abs(len(rows["train"]) - 250) < 4


@pytest.mark.parametrize("folds", [None, 4])
def test_rows_of_further_sets_only_train_and_no_prompt_straddles_the_split(folds):
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 90, 400).astype(str), rng.integers(0, 3, 400)
    sets = np.repeat([0, 1, 2], [200, 150, 50])
    labels[350:] = -1  # without a winner
    for fold in range(folds or 1):
        rows, alone = (split_of(groups[:n], labels[:n], of, fold, folds=folds)
                       for n, of in ((400, sets), (200, None)))  # fmt: skip
        for part in ("val", "test"):
            assert rows[part].tolist() == alone[part].tolist()  # whatever else trains
            assert not set(groups[rows[part]]) & set(groups[rows["train"]])
        train, n = rows["train"].tolist(), len(alone["train"])
        assert train[:n] == alone["train"].tolist() and len(train) - n > 60


def test_data_sets_have_weights_and_are_read_as_one(cache):
    more = {"prompt": "hello there", "chosen": "x", "rejected": "y"}
    Path("train.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(4)))
    Path("more.jsonl").write_text(f"{json.dumps(more)}\n" * 3)
    cfg = script.Config(data="train.jsonl", extra_data=("0.25*more.jsonl",), model="tiny:bert")
    data = core.load_pairs(cfg, World())
    assert data.sets.tolist() == [0] * 4 + [1] * 3 and data.weights.tolist() == [4.0] * 4 + [1.0] * 3
    assert data.own(np.array([5, 1, 3])).tolist() == [1, 3] and data.weights_of([6, 0]).tolist() == [1, 4]
    assert len(data.fingerprint["extra_data"]) == 1 and data.soft is None
    lines = pairs.set_lines(data, cfg, {"train": np.array([0, 1, 6])})
    assert lines[0] == "data train.jsonl  4 rows, weight 1, 2 train"
    assert lines[1].startswith("data more.jsonl  3 rows, weight 0.25, 1 train, 2 left out: their prompts are")
    alone = core.load_pairs(script.Config(data="train.jsonl", model="tiny:bert"), World())
    assert alone.sets is alone.weights is None and alone.weights_of([0, 1]).tolist() == [1, 1]


@pytest.mark.parametrize("text", ["0*x.csv", "-1*x.csv", "half*x.csv", "2*", "", "train.csv"])
def test_a_set_without_a_weight_or_a_name_is_refused(text):
    with pytest.raises(UserError, match=r"^--extra_data"):
        pairs.weighted_sets(SimpleNamespace(data="train.csv", extra_data=(text,)))


@pytest.mark.skipif(not SHARED.exists(), reason="small real data is not here")
def test_real_rows_split_by_prompt(cache):
    cfg = script.Config(data=str(SHARED), model="tiny:bert")
    data = core.load_pairs(cfg, World())
    assert len(data.labels) == 499 and np.bincount(data.labels).tolist() == [211, 223, 65]
    split = pairs.split_rows(data, cfg)
    assert sum(map(len, split.values())) == 499
    prompts = [set(data.groups[rows]) for rows in split.values()]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 82


@pytest.mark.parametrize("load", [core.load_pairs, core.load_instructions])
def test_rank_0_alone_looks_for_the_file_and_its_word_counts_on_all_ranks(load, monkeypatch):
    """Another box may not see it, and reads nothing but the cache."""
    asked = []

    def on_main(world, function, *args):
        asked.append((function, *args))
        raise UserError("not here")

    everywhere(monkeypatch.setattr, processes, "on_main", on_main)
    with pytest.raises(UserError, match="not here"):
        load(SimpleNamespace(data="rows.csv", model="tiny:", extra_data=()), World())
    assert asked == [(tables.hub_split, "rows.csv")]
