"""mathqa.py: rows and their options, parts, token ids, what the loss counts, choices, answers and figures."""

import csv
import dataclasses
import itertools
import json
import math
import re
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from ranks import everywhere
from torch import nn

import core
import lab.data.cache
from core import IGNORE_INDEX, UserError, World
from lab.data import builtin, problems, tokenizers
from lab.measure.choices import (
    Choices,
    Scores,
    answer_figures,
    answer_lines,
    examples_of,
    measure,
    over_padding,
    shuffled_problems,
    some,
)

SHARED = PROJECT.parent / "shared" / "data" / "math"
REAL = {"mathqa": SHARED / "mathqa_test_part1.json", "aqua": SHARED / "aqua_dev.json"}
shared = pytest.mark.skipif(not all(map(Path.exists, REAL.values())), reason="no shared data")
END = 99  # the end token of the data made by hand
LETTERS = "abcde"
RARE = 18.47  # chi-square of four degrees of freedom exceeds it once in a thousand


def cfg_of(data="problems.json", **others):
    known = {"data": str(data), "max_documents": None, "answer_format": "text", "max_length": 256}
    known |= {"split_seed": 42, "loss_on_prompt": False, "eval_batch": 8, "dtype": "fp64"}
    return SimpleNamespace(**known | others)


def spelt(options) -> str:
    return " , ".join(f"{letter} ) {option}" for letter, option in zip(LETTERS, options, strict=True))


def row_of(problem, options, right=0, **others) -> dict:
    return {"Problem": problem, "options": spelt(options), "correct": LETTERS[right]} | others


def made_up(n=60, seed=0, start=0) -> list[dict]:
    """Different problems; options of one to three digits, the right one anywhere."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(start, start + n):
        options = rng.choice(400, len(LETTERS), replace=False).tolist()
        right = int(rng.integers(len(LETTERS)))
        extra = " and 7 spare ones" * int(rng.integers(4))
        problem = f"crate {i} : {options[right] - 3} bolts{extra} , then 3 more . bolts ?"
        rows.append(row_of(problem, options, right))
    return rows


def write(rows, path="problems.json") -> str:
    """A table of the kind that the suffix names."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def letters():
    """One token a byte; its end token is 0, with which batches are padded."""
    return core.make_tokenizer("bytes", lambda: [])


def load(rows, tokenizer, **others) -> core.Problems:
    data = write(rows) if isinstance(rows, list) else rows
    return core.load_problems(cfg_of(data, **others), World(), tokenizer)


def by_hand(*rows, right=None, groups=None, said=None) -> core.Problems:
    """Rows of (problem's ids, ids of five options), or of these and the ids of their list."""
    pieces = [piece for problem, options, *listed in rows for piece in (problem, *(listed or [[]]), *options)]
    tokens = np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.uint16)
    words = [[str(option) for option in options] for _, options, *_ in rows] if said is None else said
    right = np.zeros(len(rows), dtype=int) if right is None else np.array(right)
    return core.Problems(
        texts=[["", "", words[i][r]] for i, r in enumerate(right)], categories=[None] * len(rows),
        numbers=np.arange(1, len(rows) + 1), tokens=tokens, offsets=np.cumsum([0, *map(len, pieces)]),
        groups=np.array([str(i) for i in range(len(rows))] if groups is None else groups),
        tokenizer=SimpleNamespace(eos_token_id=END), fingerprint={}, lines=[],
        options=words, right=right, part=[None] * len(rows),
    )  # fmt: skip


def random_problems(n=20, seed=0, most=12, listed=False) -> core.Problems:
    """Ids below 90, options of one to four tokens; `listed`: behind a list of one to six."""
    rng = np.random.default_rng(seed)
    rows = [
        (rng.integers(1, 90, rng.integers(1, most)).tolist(),
         [rng.integers(1, 90, size).tolist() for size in rng.integers(1, 5, 5)],
         *([rng.integers(1, 90, rng.integers(1, 7)).tolist()] if listed else []))
        for _ in range(n)
    ]  # fmt: skip
    return by_hand(*rows, right=rng.integers(0, 5, n))


def every(data, most=65, loss_on_prompt=False) -> core.Examples:
    return core.Examples(data, np.arange(len(data)), most, loss_on_prompt)


def small_gpt(dtype=torch.float64, **shape):
    torch.manual_seed(3)
    sizes = {"vocab_size": 100, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16} | shape
    model = core.GPT(core.GPTConfig(**sizes)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


MODERN = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False}


class Fake(nn.Module):
    """A model whose logits are `scores(ids)`: (T, V) of each row."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def hidden(self, input_ids):
        return torch.stack([self.scores(ids) for ids in input_ids.tolist()])

    def head(self, hidden):
        return [(hidden, torch.eye(hidden.shape[-1], dtype=hidden.dtype))], None


def knowing(data, size) -> Fake:
    """Wants the right answer of every problem that it knows and an end, whatever options are listed."""
    answers = {}
    for row in range(len(data)):
        wanted = [*data.piece(row, problems.FIRST + data.right[row]), data.tokenizer.eos_token_id]
        answers.setdefault(tuple(data.piece(row, 0)), wanted)
        answers[tuple(data.prompt(row))] = wanted  # the same problem may stand before other options
    listed = data.fingerprint["answer_format"] == "letter"
    mark = data.tokenizer(" answer :", add_special_tokens=False).input_ids

    def scores(ids):
        logits = torch.zeros(len(ids), size, dtype=torch.float64)
        asked = next(tuple(ids[:n]) for n in range(len(ids), 0, -1) if tuple(ids[:n]) in answers)
        start = len(asked)
        if listed:
            start = next(n for n in range(start, len(ids) + 1) if ids[n - len(mark) : n] == mark)
        wanted = answers[asked][: len(ids) - start + 1]
        logits[range(start - 1, start - 1 + len(wanted)), wanted] = 9.0
        return logits

    return Fake(scores)


def log_likelihood(model, before, after) -> float:
    """Of the ids `after` behind `before`, from the logits of that row alone."""
    with torch.no_grad():
        log_probs = model(torch.tensor([[*before, *after]]))[0].log_softmax(-1)
    return sum(log_probs[len(before) - 1 + i, token].item() for i, token in enumerate(after))


def naive(options) -> list[str]:
    """Cut at every comma, as the original."""
    return [re.sub(r"^\s*[a-e] ?\) ?", "", part).strip() for part in options.split(",")]


# options

HARD = [  # a cut at every comma has them wrong
    ("a ) a ) 17 , b ) b ) 18 , c ) c ) 19 , d ) d ) 20 , e ) e ) 21", ["17", "18", "19", "20", "21"]),
    ("['a ) 8', 'b ) 1', 'c ) 3', 'd ) 4', 'e ) 6']", ["8", "1", "3", "4", "6"]),
    ("[ 'A)8' , 'B)1', 'C)3', 'D)4', 'E)6' ]", ["8", "1", "3", "4", "6"]),
    ('["a ) 8 , 5", "b ) it\'s 1", "c ) 3", "d ) 4", "e ) 6"]', ["8 , 5", "it's 1", "3", "4", "6"]),
    ("a ) 1,000 , b ) 20,500,000 , c ) 7 , d ) 1,5 , e ) 2,000",
     ["1,000", "20,500,000", "7", "1,5", "2,000"]),
    ("a ) 1 , 2 , b ) 2 , 3 , c ) 3 , 4 , d ) 4 , 5 , e ) 5 , 6",
     ["1 , 2", "2 , 3", "3 , 4", "4 , 5", "5 , 6"]),
    ("a ) f ( 1 , 2 ) , b ) ( 3 , 4 ) , c ) 5 , d ) ( 6 ) , e ) ( 7 , 8 )",
     ["f ( 1 , 2 )", "( 3 , 4 )", "5", "( 6 )", "( 7 , 8 )"]),
]  # fmt: skip
PLAIN = [
    ("a ) 38 , b ) 27.675 , c ) 30 , d ) - 4 , e ) data inadequate",
     ["38", "27.675", "30", "- 4", "data inadequate"]),
    ("A ) 38 , B ) 27 , C ) 30 , D ) 4 , E ) 5", ["38", "27", "30", "4", "5"]),
    ("a)38 , b)27 , c)30 , d)4 , e)5", ["38", "27", "30", "4", "5"]),
    ("a ) ( 2 + e ) , b ) ( 1 + a ) , c ) 3 ( b ) , d ) 4 , e ) ( 2 + e )",
     ["( 2 + e )", "( 1 + a )", "3 ( b )", "4", "( 2 + e )"]),
    ("a ) ( crab ) , b ) ( arc ) , c ) ( and ) , d ) ( 5 the ) , e ) ( id )",
     ["( crab )", "( arc )", "( and )", "( 5 the )", "( id )"]),
    ("a ) ( 2b ) , b ) ( 3c ) , c ) 1 , d ) 2 , e ) 4", ["( 2b )", "( 3c )", "1", "2", "4"]),
]  # fmt: skip
LISTS = [
    (["A)32400", "B)6000", "C) 600", "D)60000", "E)10"], ["32400", "6000", "600", "60000", "10"]),
    (
        ["a ) 1,000", "b ) ( 2 + e )", "C)c)3", " d)4 ", "e ) b ) 5"],
        ["1,000", "( 2 + e )", "3", "4", "b ) 5"],
    ),
    (["1", "2", "3", "4", "5"], ["1", "2", "3", "4", "5"]),
]


@pytest.mark.parametrize(("options", "texts"), [*HARD, *PLAIN, *LISTS])
def test_options_are_five_texts_in_every_spelling(options, texts):
    assert problems.parse_options(options) == texts


@pytest.mark.parametrize(("options", "texts"), HARD)
def test_a_cut_at_every_comma_gets_these_options_wrong(options, texts):
    assert naive(options) != texts


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ("a ) ( 2 + b ) , b ) 3 , c ) 4 , d ) 5 , e ) 6", ["( 2 + b )", "3", "4", "5", "6"]),
        ("a ) 1 , b ) 2 , c ) 3 , d ) ( 2 + e ) , e ) 6", ["1", "2", "3", "( 2 + e )", "6"]),
        ("a ) x ( c ) , b ) y ( c ) , c ) 4 , d ) 5 , e ) 6", ["x ( c )", "y ( c )", "4", "5", "6"]),
    ],
)
def test_the_next_letter_in_parentheses_begins_no_option(options, texts):
    assert problems.parse_options(options) == texts


def test_brackets_of_a_list_of_options_are_text():
    options = "['a ) [ 1 , 2 ]', 'b ) [ 2 ]', 'c ) 1', 'd ) 2', 'e ) 3']"
    assert problems.parse_options(options) == ["[ 1 , 2 ]", "[ 2 ]", "1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("a ) 1 , b ) 2 , c ) 3 , d ) 4", "options are not five"),
        ("a ) 1 , b ) 2 , d ) 4 , e ) 5", "options are not five"),
        ("b ) 1 , a ) 2 , c ) 3 , d ) 4 , e ) 5", "options are not five"),
        ("1 , 2 , 3 , 4 , 5", "options are not five"),
        ("", "options are not five"),
        ("[]", "options are not five"),
        ([], "options are not five"),
        (["A)1", "B)2", "C)3", "D)4"], "options are not five"),
        (["A)1", "B)2", "C)3", "D)4", "E)5", "F)6"], "options are not five"),
        ("a ) 1 , b ) , c ) 3 , d ) 4 , e ) 5", "an option is empty"),
        ("a ) 1 , b ) 2 , c ) 3 , d ) 4 , e )", "an option is empty"),
        ("['a ) 1', 'b ) 2', 'c ) ', 'd ) 4', 'e ) 5']", "an option is empty"),
        (["A)1", "B) ", "C)3", "D)4", "E)5"], "an option is empty"),
        (None, "options are no text"),
        (5, "options are no text"),
        ({"a": "1"}, "options are no text"),
    ],
)
def test_unusable_options_are_told_apart(options, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        problems.parse_options(options)


@shared
def test_the_options_of_every_real_row_are_the_string_without_its_labels():
    spellings = Counter()
    for row in json.loads(REAL["mathqa"].read_text()):
        _, texts, right = problems.parse(row)
        assert row["correct"] == LETTERS[right]
        listed = row["options"].startswith("[")
        mark, end = (r"'{0} \) ", "'") if listed else (r"(?:{0} \) )+", "")
        whole = [mark.format(x) + re.escape(text) + end for x, text in zip(LETTERS, texts, strict=True)]
        pattern = r"\[" + ", ".join(whole) + r"\]" if listed else r" ?, ".join(whole) + " ?"
        assert re.fullmatch(pattern, row["options"]), row["options"]
        spellings[listed, naive(row["options"]) == texts] += 1
    assert spellings[True, False] and spellings[False, True] and spellings[False, False]


@shared
def test_the_options_of_every_real_list_are_its_texts_without_the_letters():
    rows = [json.loads(line) for line in REAL["aqua"].read_text().splitlines()]
    for row in rows:
        problem, texts, right = problems.parse(row)
        assert problem == row["question"].strip() and LETTERS[right] == row["correct"].lower()
        theirs = [re.sub(r"\s", "", text)[2:] for text in row["options"]]
        assert [re.sub(r"\s", "", text) for text in texts] == theirs
    assert len(rows) > 200


# rows

FIVE = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("row", "parsed"),
    [
        (row_of("p ?", FIVE, 2), ("p ?", FIVE, 2)),
        ({"question": " p\n", "options": FIVE, "correct": "E"}, ("p", FIVE, 4)),
        (row_of("ours", FIVE, question="theirs"), ("ours", FIVE, 0)),
        (row_of("p", FIVE) | {"correct": " D \n"}, ("p", FIVE, 3)),
        (row_of("p", FIVE, Rationale=None, category=3), ("p", FIVE, 0)),
    ],
)
def test_a_row_is_a_problem_five_options_and_a_number(row, parsed):
    assert problems.parse(row) == parsed


LETTERLESS = "the right answer is none of a to e"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["p"], "no object with columns"),
        (None, "no object with columns"),
        ({"options": FIVE, "correct": "a"}, "the problem is empty"),
        (row_of(None, FIVE), "the problem is empty"),
        (row_of(7, FIVE), "the problem is empty"),
        (row_of(" \n", FIVE), "the problem is empty"),
        ({"Problem": "p", "correct": "a"}, "options are no text"),
        (row_of("p", FIVE) | {"options": "a ) 1"}, "options are not five"),
        (row_of("p \ud83d", FIVE), "odd Unicode"),
        (row_of("p", [*FIVE[:4], "\udc00"]), "odd Unicode"),
        (row_of("p", FIVE) | {"correct": "f"}, LETTERLESS),
        (row_of("p", FIVE) | {"correct": ""}, LETTERLESS),
        (row_of("p", FIVE) | {"correct": None}, LETTERLESS),
        (row_of("p", FIVE) | {"correct": 1}, LETTERLESS),
        (row_of("p", FIVE) | {"correct": "abcdef"}, LETTERLESS),
        ({"Problem": "p", "options": FIVE}, LETTERLESS),
    ],
)
def test_unusable_rows_are_told_apart(row, reason):
    with pytest.raises(ValueError, match=reason):
        problems.parse(row)


@pytest.mark.parametrize("correct", ["ab", "bcd", "abcde"])
def test_several_letters_are_no_right_answer(correct):
    with pytest.raises(ValueError, match=LETTERLESS):
        problems.parse(row_of("p", FIVE) | {"correct": correct})


def test_unusable_rows_are_counted_and_named_and_many_are_an_error(letters):
    rows = made_up(100)
    rows[7]["correct"], rows[30]["options"], rows[55]["options"], rows[99] = "f", "a ) 1", "?", ["p"]
    rows[41]["Problem"] = "\ud800"
    data = load(rows, letters)
    assert data.numbers.tolist() == [n for n in range(1, 101) if n not in (8, 31, 42, 56, 100)]
    assert data.lines == [
        "left out 1 row(s), the right answer is none of a to e: 8",
        "left out 2 row(s), options are not five, a ) to e ): 31, 56",
        "left out 1 row(s), odd Unicode (a lone surrogate): 42",
        "left out 1 row(s), no object with columns: 100",
    ]
    rows[60]["Problem"] = ""
    named = "problems.json: 6 of 100 rows are unusable, more than 5%: mend or remove them, e.g. row 8: the "
    named += "right answer is none of a to e; row 31: options are not five, a ) to e ); row 42: odd Unicode"
    with pytest.raises(UserError, match="^" + re.escape(named) + r"[^;]*$"):
        load(rows, letters)


def test_missing_columns_and_no_rows_are_one_line(letters):
    rows = [{"question": "p", "options": FIVE}] * 4
    with pytest.raises(UserError, match=r"^problems\.json lacks column\(s\) correct; found: "):
        load(rows, letters)
    with pytest.raises(UserError, match=r"^problems\.json has no rows"):
        load([], letters)


def test_rows_with_the_right_option_twice_are_counted(letters):
    rows = [
        *made_up(30),
        row_of("p", ["7", "8", "7", "9", "1"], 2),
        row_of("q", ["8", "8", "7", "9", "1"], 2),
    ]
    assert load(rows, letters).lines == ["1 row(s) have the right option twice: either counts as right"]


def test_other_names_and_lists_of_options_are_the_same_problems(letters):
    ours = made_up(20)
    theirs = [
        {"question": row["Problem"], "options": problems.parse_options(row["options"]), "rationale": "",
         "correct": row["correct"].upper()}
        for row in ours
    ]  # fmt: skip
    a, b = load(ours, letters), load(theirs, letters)
    assert (a.texts, a.options, a.right.tolist()) == (b.texts, b.options, b.right.tolist())
    assert a.tokens.tolist() == b.tokens.tolist() and a.groups.tolist() == b.groups.tolist()


# parts


def problems_of(data, rows) -> list[str]:
    return [data.texts[row][0] for row in rows]


PARTS = {"train": made_up(12, 1), "validation": made_up(5, 2, 100), "test": made_up(6, 3, 200)}


def official(folder, suffix=".json", val="validation", **parts) -> str:
    for name, rows in (PARTS | parts).items():
        if rows:
            write(rows, Path(folder) / f"{val if name == 'validation' else name}{suffix}")
    return str(folder)


def expect_own_parts(data, parts, lines, sizes=(12, 5, 6)):
    assert lines == ["parts are the data set's own"]
    for name, theirs, size in zip(("train", "val", "test"), PARTS, sizes, strict=True):
        assert problems_of(data, parts[name]) == [row["Problem"] for row in PARTS[theirs][:size]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("val", ["validation", "dev", "val-00000-of-00001"])
def test_a_folders_parts_stay_as_they_are(suffix, val, letters):
    cfg = cfg_of(official("set", suffix, val))
    data = load(cfg.data, letters)
    expect_own_parts(data, *problems.split(data, cfg))


def test_a_zips_parts_stay_as_they_are_and_its_other_tables_are_not_read(letters):
    official("set", val="dev")
    with zipfile.ZipFile("set.zip", "w") as archive:
        for path in sorted(Path("set").iterdir()):
            archive.write(path, f"MathQA/{path.name}")
        archive.writestr("MathQA/challenge_test.json", json.dumps(made_up(9, 4, 300)))
        archive.writestr("MathQA/README.txt", "train")
    data = load("set.zip", letters)
    expect_own_parts(data, *problems.split(data, cfg_of("set.zip")))


def test_the_test_rows_are_never_validation_or_training_rows(letters):
    for seed in range(5):
        cfg = cfg_of(official("set"), split_seed=seed, max_documents=4)
        parts, _ = problems.split(load(cfg.data, letters, max_documents=4), cfg)
        assert {name: rows.tolist() for name, rows in parts.items()} == {
            "train": [0, 1, 2, 3], "val": [4, 5, 6, 7], "test": [8, 9, 10, 11]}  # fmt: skip


def test_max_documents_counts_in_each_part(letters):
    cfg = cfg_of(official("set"), max_documents=3)
    data = load(cfg.data, letters, max_documents=3)
    assert Counter(data.part) == {"train": 3, "val": 3, "test": 3}
    expect_own_parts(data, *problems.split(data, cfg), sizes=(3, 3, 3))


def test_rows_are_numbered_in_each_part(letters):
    val, train = [dict(row) for row in PARTS["validation"]], made_up(30, 1)
    val[2]["correct"] = train[4]["correct"] = "f"
    data = load(official("set", train=train, validation=val), letters)
    numbers = {part: data.numbers[np.array(data.part) == part].tolist() for part in ("train", "val", "test")}
    assert numbers["train"] == [n for n in range(1, 31) if n != 5]
    assert numbers["val"] == [1, 2, 4, 5] and numbers["test"] == [1, 2, 3, 4, 5, 6]
    assert data.lines == ["left out 2 row(s), the right answer is none of a to e: train 5, val 3"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_several_training_tables_alone_are_a_single_table(kind, letters):
    for i in range(3):
        write(made_up(40, i, 100 * i), f"set/train-{i}.json")
    name = "set"
    if kind == "zip":
        with zipfile.ZipFile(name := "set.zip", "w") as archive:
            for path in sorted(Path("set").iterdir()):
                archive.write(path)
    assert problems.official_parts(name) is None
    data = load(name, letters)
    parts, lines = problems.split(data, cfg_of(name))
    assert lines == ["a single table: 80 % train, 10 % val, 10 % test, drawn by problem"]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(120))
    assert data.numbers.tolist() == list(range(1, 121))


def zipped(name, *members, hidden=()) -> str:
    with zipfile.ZipFile(name, "w") as archive:
        for path in members:
            archive.write(path)
        for path in hidden:
            archive.writestr(path, b"\x00\x05\x16\x07")
    return name


def test_what_a_mac_leaves_beside_the_tables_is_no_part(letters):
    members = sorted(str(path) for path in Path(official("set")).iterdir())
    hidden = [f"__MACOSX/set/._{Path(path).name}" for path in members]
    data = load(zipped("set.zip", *members, hidden=hidden), letters)
    expect_own_parts(data, *problems.split(data, cfg_of("set.zip")))
    one = write(made_up(40), "train.json")
    assert problems.official_parts(zipped("one.zip", one, hidden=["__MACOSX/._train.json"])) is None
    assert len(load("one.zip", letters)) == 40


def test_what_a_mac_leaves_beside_a_single_table_is_no_table(letters):
    one = write(made_up(40), "problems.json")
    assert len(load(zipped("one.zip", one, hidden=["__MACOSX/._problems.json"]), letters)) == 40


@pytest.mark.parametrize(
    ("part", "named"), [("train", "train"), ("validation", "validation"), ("test", "test")]
)
def test_a_folder_that_lacks_a_part_is_one_line(part, named, letters):
    cfg = cfg_of(official("set", **{part: []}))
    others = ", ".join(sorted(f"{name}.json" for name in PARTS if name != part))
    line = f"set holds {others}, none of them {named}...: add it, or name one file"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load(cfg.data, letters)


def test_what_is_not_there_or_not_whole_is_one_line(letters):
    Path("torn.zip").write_bytes(b"PK no more")
    Path("empty").mkdir()
    for name, line in [("absent.json", "no such file or folder: absent.json"),
                       ("torn.zip", "torn.zip is not a whole zip file: fetch it again"),
                       ("empty", "empty holds none of .csv, .json, .jsonl, .parquet")]:  # fmt: skip
        with pytest.raises(UserError, match=line):
            load(name, letters)


@pytest.mark.parametrize("where", ["one.json", "folder/train.csv", "one.zip"])
def test_a_single_table_is_drawn_by_problem(where, letters):
    rows = made_up(200)
    for i in range(0, 60, 3):  # the same problem with other options and in other letters
        rows[i + 1]["Problem"] = rows[i]["Problem"].upper().replace(" ", "  ")
    name = write(rows, Path(where).with_suffix(".json") if where.endswith("zip") else where)
    if where.endswith("zip"):
        with zipfile.ZipFile(where, "w") as archive:
            archive.write(name)
        name = where
    name = str(Path(name).parent) if where.startswith("folder") else name
    data = load(name, letters)
    sizes, drawn = [], []
    for seed in range(6):
        parts, lines = problems.split(data, cfg_of(name, split_seed=seed))
        again, _ = problems.split(data, cfg_of(name, split_seed=seed))
        assert all((again[part] == parts[part]).all() for part in parts)
        assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(200))
        words = {
            part: {text.lower().replace(" ", "") for text in problems_of(data, parts[part])} for part in parts
        }
        assert all(not words[a] & words[b] for a, b in itertools.combinations(words, 2))
        assert lines == ["a single table: 80 % train, 10 % val, 10 % test, drawn by problem"]
        sizes.append([len(parts[part]) for part in ("train", "val", "test")])
        drawn.append(tuple(parts["test"].tolist()))
    assert np.abs(np.array(sizes) - [160, 20, 20]).max() <= 1 and len(set(drawn)) == 6


def test_problems_that_training_has_are_counted_not_hidden(letters):
    val, test = [dict(row) for row in PARTS["validation"]], [dict(row) for row in PARTS["test"]]
    val[1]["Problem"] = PARTS["train"][4]["Problem"].upper()
    test[0]["Problem"] = test[5]["Problem"] = PARTS["train"][0]["Problem"]
    cfg = cfg_of(official("set", validation=val, test=test))
    parts, lines = problems.split(load(cfg.data, letters), cfg)
    assert lines[1:] == [
        "1 of 5 val rows have a problem that training rows have",
        "2 of 6 test rows have a problem that training rows have",
    ]
    assert [len(rows) for rows in parts.values()] == [12, 5, 6]


@pytest.mark.parametrize("answer_format", ["text", "letter"])
def test_rows_over_max_length_are_left_out_and_counted_and_none_is_cut(answer_format, letters):
    rows = made_up(80)
    rows[3]["options"] = spelt([*FIVE[:4], "5" * 90])
    data = load(rows, letters, answer_format=answer_format)
    longest = [
        len(data.prompt(i)) + max(len(data.piece(i, problems.FIRST + o)) for o in range(5)) for i in range(80)
    ]
    most = sorted(longest)[60]
    cfg = cfg_of(max_length=most)
    parts, lines = examples_of(data, cfg)
    kept = sorted(np.concatenate([part.rows for part in parts.values()]).tolist())
    assert kept == [i for i in range(80) if longest[i] <= most] and 3 not in kept
    (said,) = (line for line in lines if line.startswith(f"left out, over {most} tokens: train "))
    numbers = [int(n) for n in re.findall(r"(\d+) of", said)]
    assert sum(numbers) == 80 - len(kept) and len(numbers) == 3
    for part in parts.values():
        pairs = [part.pair(i) for i in range(len(part))]
        assert all(labels[-1] == letters.eos_token_id and len(ids) <= most for ids, labels in pairs)
        assert Choices(data, part.rows).lengths.max() <= most
    assert max(Choices(data, part.rows).lengths.max() for part in parts.values()) == most


def test_a_part_that_nothing_is_left_of_is_one_line(letters):
    long = [row_of("many words " * 40, FIVE)] * 4
    cfg = cfg_of(official("set", test=long))
    with pytest.raises(UserError, match=r"^set leaves no test rows: use more rows or a larger --max_length$"):
        problems.split(load(cfg.data, letters), cfg)


@shared
@pytest.mark.parametrize("name", list(REAL))
def test_real_files_load_whole(name, letters):
    cfg = cfg_of(REAL[name], max_length=1024)
    data = load(cfg.data, letters)
    assert not any("left out" in line for line in data.lines)
    parts, _ = problems.split(data, cfg)
    shares = [len(parts[part]) / len(data) for part in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    decoded = letters.decode(data.whole(5))
    assert decoded == f"{data.texts[5][0]} {data.texts[5][2]}{tokenizers.END}"


# built-in problems


def solved(text) -> int:
    if found := re.fullmatch(r"\w+ has (\d+) \w+ and gets (\d+) more \. how many \w+ \?", text):
        return int(found[1]) + int(found[2])
    if found := re.fullmatch(r"\w+ had (\d+) \w+ and lost (\d+) of them \. how many \w+ \?", text):
        return int(found[1]) - int(found[2])
    found = re.fullmatch(r"(\w+) has (\d+) \w+ and (\w+) twice as many \. how many \w+ \?", text)
    assert found[1] != found[3]
    return 2 * int(found[2])


def chi_square(counts) -> float:
    expected = counts.total() / len(LETTERS)
    return sum((counts[i] - expected) ** 2 / expected for i in range(len(LETTERS)))


def test_built_in_problems_are_the_same_each_time_and_in_mathqas_columns():
    rows = builtin.template_problems()
    assert rows == builtin.template_problems() and rows[:50] != builtin.template_problems(50, seed=1)
    assert rows[:50] == builtin.template_problems(50) and len(rows) == 4000
    columns = [
        "Problem",
        "Rationale",
        "options",
        "correct",
        "annotated_formula",
        "linear_formula",
        "category",
    ]
    assert all(list(row) == columns and all(type(cell) is str for cell in row.values()) for row in rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_built_in_answers_are_right(seed):
    for row in builtin.template_problems(1000, seed):
        problem, options, right = problems.parse(row)
        assert len(set(options)) == 5 and options[right] == str(solved(problem))
        left, _, value = row["Rationale"].rpartition(" = ")
        assert int(value) == solved(problem) == eval(left)
        names = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__}
        assert eval(row["annotated_formula"], names) == solved(problem)


@pytest.mark.parametrize("seed", range(4))
def test_without_the_problem_no_built_in_option_is_likelier(seed):
    letter, rank, by_template = Counter(), Counter(), {}
    for row in builtin.template_problems(4000, seed):
        _, options, right = problems.parse(row)
        values = [int(option) for option in options]
        place = sorted(values).index(values[right])
        letter[right] += 1
        rank[place] += 1
        by_template.setdefault(row["linear_formula"], Counter())[place] += 1
    assert len(by_template) == 3
    assert all(chi_square(counts) < RARE for counts in (letter, rank, *by_template.values()))


def test_built_in_problems_of_val_and_test_are_not_training_problems(letters):
    cfg = cfg_of(problems.BUILT_IN)
    data = load(cfg.data, letters)
    parts, lines = problems.split(data, cfg)
    sets = [set(problems_of(data, rows)) for rows in parts.values()]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert [len(rows) for rows in parts.values()] == [3200, 400, 400] and len(lines) == 1
    assert len(load(problems.BUILT_IN, letters, max_documents=40)) == 40


# what the loss counts


def test_the_right_option_and_one_end_token_are_targets():
    options = [[4], [5, 6], [7], [8], [9, 10]]
    data = by_hand(([1, 2, 3], options), ([11], options), right=[1, 3])
    examples = every(data)
    assert data.whole(0) == [1, 2, 3, 5, 6, END] and data.whole(1) == [11, 8, END]
    assert examples.pair(0) == ([1, 2, 3, 5, 6], [IGNORE_INDEX, IGNORE_INDEX, 5, 6, END])
    assert examples.pair(1) == ([11, 8], [8, END])
    assert every(data, loss_on_prompt=True).pair(0) == ([1, 2, 3, 5, 6], [2, 3, 5, 6, END])
    ids, labels = examples.batch([0, 1], "cpu")
    assert ids.tolist() == [[1, 2, 3, 5, 6], [11, 8, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, 5, 6, END], [8, END, -100, -100, -100]]
    assert examples.targets([0, 1]).tolist() == [3, 2] and data.answer_lengths.tolist() == [2, 1]


def with_pad(tokenizer, kind):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizers.END)
    if kind == "end":
        tokenizer.pad_token = tokenizer.eos_token
    if kind == "own":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


@pytest.mark.parametrize("kind", ["none", "end", "own"])
def test_the_first_end_token_is_learnt_and_no_padding(kind, letters):
    tokenizer = with_pad(letters, kind)
    assert {"none": tokenizer.pad_token_id is None, "end": tokenizer.pad_token_id == tokenizer.eos_token_id,
            "own": tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)}[kind]  # fmt: skip
    data = load(made_up(30), tokenizer)
    ids, labels = every(data, 300).batch(range(30), "cpu")
    for row in range(30):
        whole = data.whole(row)
        asked, real = len(data.prompt(row)), len(whole) - 1
        assert labels[row].tolist() == [-100] * (asked - 1) + whole[asked:] + [-100] * (ids.shape[1] - real)
        assert labels[row, real - 1] == tokenizer.eos_token_id
        assert labels[row].tolist().count(tokenizer.eos_token_id) == 1
    assert len(set(map(len, (data.whole(row) for row in range(30))))) > 5


@pytest.mark.parametrize("loss_on_prompt", [False, True])
@pytest.mark.parametrize("shape", [{}, MODERN], ids=["gpt2", "noam"])
def test_padding_changes_neither_loss_nor_accuracy(loss_on_prompt, shape):
    data, model = random_problems(24), small_gpt(**shape)
    examples = every(data, 65, loss_on_prompt)
    sums = [core.evaluate(model, examples, cfg_of(eval_batch=n), World()) for n in (1, 5, 24)]
    for row in range(24):
        ids, labels = examples.pair(row)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids]))[0].log_softmax(-1)
        counted = [(t, label) for t, label in enumerate(labels) if label != IGNORE_INDEX]
        nats = -sum(log_probs[t, label].item() for t, label in counted)
        hits = sum(int(log_probs[t].argmax()) == label for t, label in counted)
        for found in sums:
            assert found[row].tolist() == pytest.approx([nats, hits, len(counted)], rel=1e-9)
    longer = every(by_hand(([7] * 55, [[1]] * 5)))  # a companion that widens the batch
    both = [examples.pair(3), longer.pair(0)]
    mixed = SimpleNamespace(pair=lambda i: both[i])
    ids, labels = core.Examples.batch(mixed, [0, 1], "cpu")
    with torch.no_grad():
        assert model(ids[:1], labels[:1]).item() == pytest.approx(sums[0][3, 0], rel=1e-9)


def test_a_guess_of_padding_everywhere_hits_end_tokens_only(letters):
    """An accuracy over every position would be near one."""
    data = load(made_up(20), letters)
    size, end = len(letters), letters.eos_token_id
    model = Fake(lambda ids: torch.eye(size, dtype=torch.float64)[[end] * len(ids)])
    sums = core.evaluate(model, every(data, 300), cfg_of(eval_batch=20), World())
    assert sums[:, 1].tolist() == [1.0] * 20
    assert sums[:, 2].tolist() == [len(f" {text[2]}") + 1 for text in data.texts]


@pytest.mark.parametrize("shape", [{}, MODERN, {"tie_head": False}], ids=["gpt2", "noam", "untied"])
def test_a_batch_without_targets_contributes_nothing(shape):
    model, ids = small_gpt(torch.float32, **shape), torch.arange(12).reshape(2, 6)
    none = torch.full_like(ids, IGNORE_INDEX)
    loss = model(ids, none)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    labels = none.clone()
    labels[0, 3:] = torch.tensor([4, 5, 6])
    both, alone = [], []
    for rows, grads in ((slice(None), both), (slice(0, 1), alone)):
        model.zero_grad()
        model(ids[rows], labels[rows]).backward()
        grads += [p.grad.clone() for p in model.parameters()]
    for ours, theirs in zip(both, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_accuracy_over_padding_counts_every_position_of_the_journals_rows():
    sizes = [1, 500, 1021, 1022, 1023, 2046, 2047]  # with an option of one token and the end: 1023, 1024, ...
    data = by_hand(*[([7] * size, [[1]] * 5) for size in sizes])
    examples = every(data, 4000)
    sums = np.c_[np.zeros(7), [2, 1, 0, 2, 1, 2, 0], np.full(7, 2)]
    hits = positions = 0
    for row in range(len(sizes)):
        padded = data.whole(row)
        while len(padded) % 1024:
            padded.append(END)
        positions += len(padded)
        hits += sums[row, 1]
    assert positions == 11 * 1024 and over_padding(sums, examples) == hits / positions


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["gpt2", "noam"])
@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_packed_problems_do_not_see_each_other(shape, loss_on_prompt):
    data, model = random_problems(24), small_gpt(**shape)
    examples = every(data, 65, loss_on_prompt)
    packs = core.Packs(examples, 64)
    assert len(packs) < 12 and sorted(packs.members(range(len(packs)))) == list(range(24))
    with torch.no_grad():
        alone = np.array([model(*examples.batch([i], "cpu")).item() for i in range(24)])
        for pack in range(len(packs)):
            assert model(*packs.batch([pack], "cpu")).item() == pytest.approx(
                alone[packs.packs[pack]].sum(), rel=1e-9
            )
        assert model(*packs.batch(range(len(packs)), "cpu")).item() == pytest.approx(alone.sum(), rel=1e-9)
    assert packs.targets(range(len(packs))).sum() == examples.targets(range(24)).sum()


# choices


def test_a_choice_is_an_option_behind_a_problem():
    first, second = [[4], [5, 6], [7], [8], [9, 10]], [[21], [22], [23, 24, 25], [26], [27]]
    data = by_hand(([90], first), ([1, 2, 3], first), ([11], second), right=[0, 1, 3])
    own = Choices(data, np.array([1, 2]))
    assert len(own) == 10 and own.lengths.tolist() == [4, 5, 4, 4, 5, 2, 2, 4, 2, 2]
    assert own.pair(1) == ([1, 2, 3, 5, 6], [IGNORE_INDEX, IGNORE_INDEX, 5, 6, END])
    assert own.pair(3) == ([1, 2, 3, 8], [IGNORE_INDEX, IGNORE_INDEX, 8, END])
    assert own.pair(7) == ([11, 23, 24, 25], [23, 24, 25, END])
    other = Choices(data, np.array([1, 2]), np.array([2, 1]))
    assert other.pair(1) == ([11, 5, 6], [5, 6, END])
    assert other.pair(7) == ([1, 2, 3, 23, 24, 25], [IGNORE_INDEX, IGNORE_INDEX, 23, 24, 25, END])
    for choices in (own, other):
        assert choices.lengths.tolist() == [len(choices.pair(i)[0]) for i in range(10)]
        counted = [sum(label != IGNORE_INDEX for label in choices.pair(i)[1]) for i in range(10)]
        assert choices.targets(range(10)).tolist() == counted


@pytest.mark.parametrize("eval_batch", [3, 64])
@pytest.mark.parametrize("strange", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_scores_are_log_likelihoods_of_option_and_end(eval_batch, strange, listed):
    data, model = random_problems(9, listed=listed), small_gpt(**MODERN)
    rows = np.array([8, 1, 4, 5])
    asked = np.array([1, 2, 5, 0]) if strange else rows
    choices = Choices(data, rows, asked if strange else None)
    scores = Scores.of(model, choices, cfg_of(eval_batch=eval_batch), World(), quiet)
    for i, option in itertools.product(range(4), range(5)):
        wanted = [*data.piece(rows[i], problems.FIRST + option), END]
        plain = log_likelihood(model, data.piece(asked[i], 0) + data.piece(rows[i], 1), wanted)
        assert scores.plain[i, option] == pytest.approx(plain, rel=1e-9)
        assert scores.per_token[i, option] == pytest.approx(plain / len(wanted), rel=1e-9)


def test_long_and_short_options_can_win_differently():
    rows = [([1], [[2], [3, 4, 5], [6], [7], [8]])]
    scores = Scores(np.array([[-4.0, -5.0, -9, -9, -9]]), np.array([[-4 / 2, -5 / 4, -4.5, -4.5, -4.5]]))
    assert scores.right(by_hand(*rows, right=[0]), np.array([0])).tolist() == [[1.0, 0.0]]
    assert scores.right(by_hand(*rows, right=[1]), np.array([0])).tolist() == [[0.0, 1.0]]


def test_an_option_that_says_what_the_right_one_says_is_right():
    said = [["7", "8", "9", "8", "1"], ["7", "8", "9", "80", "1"]]
    options = [[1], [2], [3], [2], [5]]
    data = by_hand(([1], options), ([2], options), right=[1, 1], said=said)
    fourth = np.array([[-9.0, -9, -9, -1, -9]] * 2)
    right = Scores(fourth, fourth / 2).right(data, np.array([1, 0]))
    assert right.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_letters_are_chosen_behind_all_options(letters):
    rows = made_up(40)
    data = load(rows, letters, answer_format="letter")
    for row in (0, 17):
        options = problems.parse_options(rows[row]["options"])
        assert (
            letters.decode(data.prompt(row)) == f"{rows[row]['Problem']} options : {spelt(options)} answer :"
        )
        assert letters.decode(data.piece(row, 0)) == rows[row]["Problem"]
        pieces = [letters.decode(data.piece(row, problems.FIRST + option)) for option in range(5)]
        assert pieces == [" a", " b", " c", " d", " e"]
        assert letters.decode(data.whole(row)[:-1]).endswith(f" answer : {rows[row]['correct']}")
        assert data.options[row] == options
    assert problems.as_read("p ?", FIVE, "text") == ["p ?", "", " 1", " 2", " 3", " 4", " 5"]
    listed = " options : a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5 answer :"
    assert problems.as_read("p ?", FIVE, "letter") == ["p ?", listed, " a", " b", " c", " d", " e"]
    text = load(rows, letters)
    assert all(text.piece(row, 1) == [] for row in range(40))
    assert letters.decode(text.prompt(3)) == rows[3]["Problem"]


@pytest.mark.parametrize("n", [2, 3, 50])
def test_strangers_are_a_permutation_without_own_problems(n):
    data = random_problems(n + 4)
    rows = np.arange(4, n + 4)[::-1].copy()
    asked = shuffled_problems(data, rows)
    assert sorted(asked.tolist()) == sorted(rows.tolist()) and (asked != rows).all()
    assert (shuffled_problems(data, rows) == asked).all()


@pytest.mark.parametrize("groups", [["a"] * 30 + ["b"] * 30, ["a"] * 59 + ["b"], list("abcdef") * 10])
def test_strangers_have_another_problem_among_many_duplicates(groups):
    groups = np.random.default_rng(1).permutation(groups).tolist()
    rows = [(random_problems(1, seed).prompt(0), [[1]] * 5) for seed in range(60)]
    data = by_hand(*rows, groups=groups)
    asked = shuffled_problems(data, np.arange(60))
    assert all(groups[a] != groups[row] for row, a in enumerate(asked))


@pytest.mark.parametrize("n", [1, 4])
def test_without_another_problem_the_control_has_its_own(n):
    data = by_hand(*[([1], [[1]] * 5)] * n, groups=["a"] * n)
    asked = shuffled_problems(data, np.arange(n))
    assert sorted(asked.tolist()) == list(range(n))


def test_strangers_fit_before_the_options_or_are_the_own_problem():
    """The room before the options of each row is `room`: no other problem fits the fourth."""
    sizes, own = [4, 5, 11, 2, 18], [[7] * 3, [8] * 3, [9] * 2, [], []]
    longest = [7, 22, 16, 28, 12]
    rows = [([i + 1] * n, [[3]] * 4 + [[4] * most], listed)
            for i, (n, most, listed) in enumerate(zip(sizes, longest, own, strict=True))]  # fmt: skip
    data, room = by_hand(*rows), np.array([20, 5, 12, 2, 18])
    rows = np.arange(5)
    asked = shuffled_problems(data, rows, 30)
    lengths = Choices(data, rows, asked).lengths.reshape(5, 5).max(1)
    assert (lengths <= 30).all() and (data.pieces[asked, 0] <= room).all()
    assert asked[3] == 3 and (asked != rows).sum() == 4  # nothing else has two tokens
    assert (Choices(data, rows, shuffled_problems(data, rows)).lengths > 30).any()  # without a limit


@pytest.mark.parametrize("listed", [0, 4])
def test_without_the_room_for_a_stranger_the_control_has_its_own(listed):
    data = by_hand(([1] * 30, [[2]] * 5, [7] * listed), ([3] * 30, [[4]] * 5, [8] * listed))
    assert shuffled_problems(data, np.arange(2), 31 + listed).tolist() == [1, 0]
    assert shuffled_problems(data, np.arange(2), 30 + listed).tolist() == [0, 1]


def test_the_controls_options_are_the_rows_own_in_both_formats(letters):
    rows = made_up(12)
    for answer_format in ("text", "letter"):
        data = load(rows, letters, answer_format=answer_format)
        own = np.array([3, 8, 5])
        asked = shuffled_problems(data, own)
        choices = Choices(data, own, asked)
        for i, option in itertools.product(range(3), range(5)):
            options = problems.parse_options(rows[own[i]]["options"])
            ids, labels = choices.pair(5 * i + option)
            before = rows[asked[i]]["Problem"]
            answer = f" {options[option]}"
            if answer_format == "letter":
                before, answer = f"{before} options : {spelt(options)} answer :", f" {LETTERS[option]}"
            assert letters.decode(ids) == before + answer
            wanted = [label for label in labels if label != IGNORE_INDEX]
            assert letters.decode(wanted[:-1]) == answer and wanted[-1] == letters.eos_token_id
            assert rows[asked[i]]["options"] not in letters.decode(ids)


def test_some_rows_are_spread_evenly():
    rows = np.arange(10, 21)
    assert some(rows, 3).tolist() == [10, 15, 20] and some(rows, 0).tolist() == []
    assert some(rows, None).tolist() == some(rows, 99).tolist() == rows.tolist()


# figures


def quiet():
    pass


def figures_of(model, data, cfg, train=None, rows=None):
    rows = np.arange(len(data)) if rows is None else rows
    return answer_figures(model, data, rows, rows if train is None else train, cfg, World(), quiet)


@pytest.mark.parametrize("answer_format", ["text", "letter"])
def test_who_knows_the_answers_is_always_right_and_the_control_guesses(answer_format, letters):
    rows = builtin.template_problems(400, seed=5)
    data = load(rows, letters, answer_format=answer_format)
    found, lines = figures_of(knowing(data, len(letters)), data, cfg_of(eval_batch=100))
    assert found["answer_accuracy"] == found["answer_accuracy_per_token"] == 1.0
    assert found["answer_accuracy_interval"][1] == 1.0 and 0.98 < found["answer_accuracy_interval"][0] < 1
    assert found["shuffled_accuracy"] == pytest.approx(0.2, abs=0.08)  # four standard errors
    assert found["shuffled_accuracy_per_token"] == pytest.approx(0.2, abs=0.08)
    assert all(line["right"] and line["right_per_token"] for line in lines)


def test_who_likes_one_text_chooses_it_everywhere(letters):
    rng, size = np.random.default_rng(0), len(letters)
    rows = []
    for i in range(60):
        options, place = rng.choice(np.arange(10, 99), 5, replace=False).tolist(), rng.integers(5)
        options[place] = "x"
        rows.append(row_of(f"problem {i} ?", options, int(rng.integers(5))))
    data = load(rows, letters)
    (space, x), end = letters(" x", add_special_tokens=False).input_ids, letters.eos_token_id
    after = torch.zeros(size, size, dtype=torch.float64)
    after[space, x] = after[x, end] = 9.0
    found, lines = figures_of(Fake(lambda ids: after[ids]), data, cfg_of())
    share = sum(data.options[i][data.right[i]] == "x" for i in range(60)) / 60
    assert 0 < share < 0.5
    assert found["answer_accuracy"] == found["shuffled_accuracy"] == pytest.approx(share)
    assert found["answer_accuracy_per_token"] == found["shuffled_accuracy_per_token"] == pytest.approx(share)
    chosen = [data.options[i][int(np.argmax(line["scores"]))] for i, line in enumerate(lines)]
    assert chosen == ["x"] * 60


def test_the_letter_figure_is_how_often_trainings_usual_letter_is_right():
    data = by_hand(*[([i + 1], [[1], [2], [3], [4], [5]]) for i in range(14)],
                   right=[2, 2, 2, 1, 0, 4, 1, 2, 1, 1, 3, 1, 0, 2])  # fmt: skip
    train, rows = np.arange(6), np.arange(6, 14)
    found, _ = figures_of(small_gpt(), data, cfg_of(), train, rows)
    assert found["letter"] == "c" and found["letter_accuracy"] == 2 / 8  # of these rows b is usual


def choosing_x(data, size) -> Fake:
    """Wants the letter whose listed option is x, whatever the problem."""
    decode, marks = data.tokenizer.decode, [f"{letter} ) x" for letter in LETTERS]
    wanted = [data.tokenizer(f" {letter}", add_special_tokens=False).input_ids for letter in LETTERS]

    def scores(ids):
        text, logits = decode(ids), torch.zeros(len(ids), size, dtype=torch.float64)
        place = next(i for i, mark in enumerate(marks) if mark in text)
        start = text.index(" answer :") + len(" answer :")
        for i, token in enumerate(wanted[place]):
            logits[start - 1 + i, token] = 9.0
        return logits

    return Fake(scores)


def test_options_that_give_themselves_away_are_found_out_in_the_letter_format(letters):
    """A model that reads no problem: right behind any. With another row's options it would look clever."""
    rng, rows = np.random.default_rng(2), []
    for i in range(60):
        options, right = rng.choice(np.arange(10, 99), 5, replace=False).tolist(), int(rng.integers(5))
        options[right if i % 10 else (right + 1) % 5] = "x"  # nine of ten times x is right
        rows.append(row_of(f"problem {i} ?", options, right))
    data = load(rows, letters, answer_format="letter")
    found, _ = figures_of(choosing_x(data, len(letters)), data, cfg_of())
    assert found["answer_accuracy"] == found["shuffled_accuracy"] == pytest.approx(0.9)
    assert found["above_shuffled"] == found["above_shuffled_per_token"] == 0
    lines = answer_lines("val", {f"val/{name}": value for name, value in found.items()})
    assert lines[-1].startswith("val   answers are no better than without the problem") and len(lines) == 3


def test_above_shuffled_is_the_paired_difference_with_its_interval(letters):
    """Knows three of four problems: its gain over its own control, row by row, groups redrawn."""
    data = load(builtin.template_problems(120, seed=4), letters)
    partly = load(builtin.template_problems(120, seed=4), letters)
    partly.right = np.where(np.arange(120) % 4 == 0, (data.right + 1) % 5, data.right)
    model, rows, cfg = knowing(partly, len(letters)), np.arange(120), cfg_of(eval_batch=100)
    found, lines = figures_of(model, data, cfg)
    asked = shuffled_problems(data, rows, cfg.max_length)
    scores = Scores.of(model, Choices(data, rows, asked), cfg, World(), quiet)
    own = np.array([[line["right"], line["right_per_token"]] for line in lines], dtype=float)
    gains = own - scores.right(data, rows)
    assert len(np.unique(gains)) == 3  # the control is right where the model is not, too
    intervals = core.bootstrap(gains, data.groups)
    for i, name in enumerate(("", "_per_token")):
        assert found[f"above_shuffled{name}"] == pytest.approx(gains[:, i].mean())
        plain = found[f"answer_accuracy{name}"] - found[f"shuffled_accuracy{name}"]
        assert found[f"above_shuffled{name}"] == pytest.approx(plain)
        assert found[f"above_shuffled{name}_interval"] == pytest.approx(intervals[i].tolist())
        low, high = found[f"above_shuffled{name}_interval"]
        assert 0.3 < low < found[f"above_shuffled{name}"] < high < 0.8


def figures_by_hand(right, letter, above, per_token=1.0) -> dict:
    """Named as answer_lines wants them; right, above: (low, high)."""
    middle = {"answer_accuracy": right, "answer_accuracy_per_token": (per_token - 0.01, per_token)}
    middle |= {"shuffled_accuracy": (0.2, 0.3), "shuffled_accuracy_per_token": (0.2, 0.3)}
    middle |= {"above_shuffled": above, "above_shuffled_per_token": (0.5, 0.6)}
    found = {"test/letter": "c", "test/letter_accuracy": letter}
    for name, ends in middle.items():
        found |= {f"test/{name}": sum(ends) / 2, f"test/{name}_interval": list(ends)}
    return found


@pytest.mark.parametrize(
    ("right", "letter", "above", "last"),
    [
        ((0.19, 0.4), 0.1, (0.1, 0.2), "cannot be told from guessing"),
        ((0.20, 0.4), 0.1, (0.1, 0.2), "cannot be told from guessing"),
        ((0.25, 0.4), 0.26, (0.1, 0.2), "cannot be told from guessing"),
        ((0.19, 0.4), 0.1, (-0.1, 0.2), "cannot be told from guessing"),
        ((0.25, 0.4), 0.24, (-0.1, 0.2), "no better than without the problem"),
        ((0.25, 0.4), 0.1, (0.0, 0.2), "no better than without the problem"),
        ((0.25, 0.4), 0.24, (0.01, 0.2), None),
    ],
)
def test_the_last_line_says_what_answers_are_worth(right, letter, above, last):
    """By the plain choice alone: a second way of choosing is a second chance to be lucky."""
    lines = answer_lines("test", figures_by_hand(right, letter, above))
    said = [line for line in lines if "guessing" in line or "no better" in line]
    assert lines[2:] == said and len(said) == (last is not None)
    assert last is None or last in lines[-1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_answers_are_measured_in_fp32_where_training_is_in_half(dtype):
    fields = [("dtype", str), ("eval_batch", int)]
    cfg = dataclasses.make_dataclass("Cfg", fields, frozen=True)(dtype, 8)
    data, model, rows = random_problems(12), small_gpt(torch.float32, **MODERN), np.arange(12)
    choices = Choices(data, rows)
    got = Scores.of(model, choices, cfg, World(), quiet)
    exact = Scores.of(model, choices, dataclasses.replace(cfg, dtype="fp32"), World(), quiet)
    assert (got.plain == exact.plain).all() and (got.per_token == exact.per_token).all()
    half = core.evaluate(model, choices, cfg, World())[:, 0].reshape(-1, 5)
    assert np.abs(half + exact.plain).max() > 1e-4 and cfg.dtype == dtype


@pytest.fixture(scope="module")
def measured(letters, tmp_path_factory, cache):
    """A model with random weights: (data, parts, eval_batch -> measure's answer on test)."""
    path = write(made_up(140, seed=7), tmp_path_factory.mktemp("measured") / "problems.json")
    cfg = cfg_of(path, max_length=128)
    data = core.load_problems(cfg, World(), letters)
    parts, _ = examples_of(data, cfg)
    model = small_gpt(vocab_size=len(letters), block_size=128, **MODERN)
    found = {}
    for size in (1, 7, 64):
        cfg.eval_batch = size
        found[size] = measure(model, "test", parts, data, cfg, World(), quiet)
    return model, data, parts, found


def test_figures_do_not_depend_on_eval_batch(measured):
    *_, found = measured
    for size in (1, 7):
        for name, value in found[64][0].items():
            assert found[size][0][name] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-9)
            )
        for ours, theirs in zip(found[size][1] + found[size][2], found[64][1] + found[64][2], strict=True):
            assert ours == {
                k: v if isinstance(v, str) else pytest.approx(v, abs=2e-5) for k, v in theirs.items()
            }


def test_figures_are_those_of_the_lines(measured):
    _, data, parts, found = measured
    figures, losses, answers = found[7]
    rows = parts["test"].rows.tolist()
    for lines in (losses, answers):
        assert [line["row"] for line in lines] == data.numbers[rows].tolist()
        assert [line["group"] for line in lines] == data.groups[rows].tolist()
    assert figures["test/rows"] == len(rows) == 14
    for name, key in (("answer_accuracy", "right"), ("answer_accuracy_per_token", "right_per_token")):
        assert figures[f"test/{name}"] == pytest.approx(sum(line[key] for line in answers) / len(rows))
    for row, line in zip(rows, answers, strict=True):
        said = data.options[row]
        assert line["answer"] == LETTERS[data.right[row]]
        assert line["right"] == (said[int(np.argmax(line["scores"]))] == said[data.right[row]])
        per_token = [score / (len(f" {text}") + 1) for score, text in zip(line["scores"], said, strict=True)]
        assert line["right_per_token"] == (said[int(np.argmax(per_token))] == said[data.right[row]])
    assert 0 < sum(line["right"] for line in answers) < len(rows)
    right = [losses[i]["nats"] for i in range(len(rows))]
    own = [-answers[i]["scores"][data.right[row]] for i, row in enumerate(rows)]
    assert right == pytest.approx(own, abs=1e-4)  # the right answer's loss is its score
    nats, hits, targets, size = (
        sum(line[k] for line in losses) for k in ("nats", "hits", "targets", "bytes")
    )
    assert size == sum(len(f" {data.texts[row][2]}") for row in rows) == targets - len(rows)
    assert figures["test/loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert figures["test/accuracy"] == pytest.approx(hits / targets)
    assert figures["test/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert figures["test/accuracy_over_padding"] == hits / (1024 * len(rows))
    usual, count = Counter(data.right[parts["train"].rows].tolist()).most_common(1)[0]
    assert figures["test/letter"] == LETTERS[usual] and count > len(parts["train"]) / 5
    share = np.mean([line["answer"] == LETTERS[usual] for line in answers])
    assert figures["test/letter_accuracy"] == pytest.approx(share)


def test_intervals_hold_their_figures_and_shares_stay_between_0_and_1(measured):
    figures = measured[3][7][0]
    shares = [
        "answer_accuracy",
        "answer_accuracy_per_token",
        "shuffled_accuracy",
        "shuffled_accuracy_per_token",
    ]
    for name in (*shares, "letter_accuracy", "accuracy"):
        low, high = figures[f"test/{name}_interval"]
        assert 0 <= low <= figures[f"test/{name}"] <= high <= 1 and low < high
    for name in ("above_shuffled", "above_shuffled_per_token"):
        low, high = figures[f"test/{name}_interval"]
        assert -1 <= low <= figures[f"test/{name}"] <= high <= 1 and low < high


def test_the_control_is_the_options_behind_another_rows_problem(measured):
    model, data, parts, found = measured
    rows = parts["test"].rows
    right = []
    for row, asked in zip(rows, shuffled_problems(data, rows), strict=True):
        said, scores = data.options[row], []
        for option in said:
            ids = data.tokenizer(f" {option}", add_special_tokens=False).input_ids
            scores.append(log_likelihood(model, data.prompt(asked), [*ids, data.tokenizer.eos_token_id]))
        right.append(int(np.argmax(scores)) == data.right[row])
    assert found[7][0]["test/shuffled_accuracy"] == pytest.approx(np.mean(right))


def test_the_control_fits_into_a_model_that_the_rows_fit_into():
    """The longest problem meets the longest option: each row alone is within max_length."""
    data = by_hand(([1] * 60, [[2], [3], [4], [5], [6]]), ([1], [[7] * 40, [8], [9], [10], [11]]))
    rows, cfg = np.arange(2), cfg_of(max_length=64)
    assert (data.prompt_lengths + data.pieces[:, problems.FIRST :].max(1) <= cfg.max_length).all()
    found, _ = figures_of(small_gpt(block_size=64), data, cfg, rows, rows)
    assert 0 <= found["shuffled_accuracy"] <= 1


def test_a_guess_is_called_one_and_knowledge_is_not(letters):
    data = load(builtin.template_problems(150, seed=9), letters)
    cfg = cfg_of(eval_batch=100)
    guess = Fake(lambda ids: torch.zeros(len(ids), len(letters), dtype=torch.float64))
    for model, called in ((guess, True), (knowing(data, len(letters)), False)):
        found, _ = figures_of(model, data, cfg)
        lines = answer_lines("val", {f"val/{name}": value for name, value in found.items()})
        assert ("val   answers cannot be told from guessing" in lines) == called
        assert f"of five: 0.200  always {found['letter']}: {found['letter_accuracy']:.3f}" in lines[0]
        assert lines[0].startswith(f"val   answers {found['answer_accuracy']:.3f} ")
        assert f"control, problems shuffled: {found['shuffled_accuracy']:.3f} " in lines[1]


# the token cache


@pytest.fixture
def tokenised(tmp_path, monkeypatch):
    """Folders that were written, each time something is tokenised."""
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))
    seen, write_texts = [], lab.data.cache.write_texts

    def counting(folder, texts, tokenizer):
        seen.append(len(texts))
        return write_texts(folder, texts, tokenizer)

    everywhere(monkeypatch.setattr, lab.data.cache, "write_texts", counting)
    return seen


def folders() -> set[str]:
    return {path.name for path in Path("tokens").glob("problems_*")}


def test_a_second_load_reads_what_the_first_one_wrote(tokenised, letters):
    rows = made_up(20)
    rows[4]["options"] = "?"
    first = load(rows, letters)
    second = load("problems.json", letters)
    assert tokenised == [19 * 7] and len(folders()) == 1
    for name in ("texts", "options", "part", "lines", "fingerprint", "tokenizer"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("tokens", "offsets", "numbers", "groups", "right"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
    assert first.numbers.tolist() == [n for n in range(1, 21) if n != 5] and len(first.lines) == 1


def test_other_data_and_other_constants_have_a_folder_of_their_own(tokenised, letters):
    data = write(made_up(20))
    others = core.make_tokenizer("ascii", lambda: [])
    load(data, letters)
    load(data, letters, answer_format="letter")
    load(data, letters, max_documents=15)
    load(data, others)
    load(write(made_up(20, seed=3), "more.json"), letters)
    load(official("set"), letters)
    load(problems.BUILT_IN, letters, max_documents=20)
    assert len(folders()) == len(tokenised) == 7
    rows = made_up(20)
    rows[0]["Problem"] = "changed ?"
    assert load(rows, letters).texts[0][0] == "changed ?" and len(folders()) == 8
    write(made_up(6, 8, 400), "set/dev.json")  # a table that is no part: validation is there
    load("set", letters)
    assert len(folders()) == 8
    write(made_up(6, 9, 500), "set/test.json")
    load("set", letters)
    assert len(folders()) == 9
    for name in ("max_length", "split_seed", "eval_batch"):  # not what the cache holds
        load("set", letters, **{name: 7})
    assert len(folders()) == len(tokenised) == 9


def test_fingerprints_tell_data_tokenizer_and_format_apart(letters):
    others = core.make_tokenizer("ascii", lambda: [])
    prints = [
        load(made_up(20), letters).fingerprint,
        load(made_up(20), letters, answer_format="letter").fingerprint,
        load(made_up(20), others).fingerprint,
        load(made_up(20, seed=1), letters).fingerprint,
    ]
    changed = [{key for key in prints[0] if prints[0][key] != other[key]} for other in prints[1:]]
    assert changed == [{"answer_format"}, {"tokenizer"}, {"data"}]
