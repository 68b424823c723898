"""MathQA's problems: options in every spelling, parts, duplicates, refusals."""

import itertools
import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT
from ranks import everywhere
from toys.mathqa import (
    FIVE,
    LETTERS,
    cfg_of,
    letters,  # noqa: F401 (a fixture)
    load,
    made_up,
    row_of,
    spelt,
    write,
)

import core
import lab.data.cache
from core import UserError
from lab.data import problems, tokenizers
from lab.measure.choices import (
    Choices,
    examples_of,
)

SHARED = PROJECT.parent / "shared" / "data" / "math"
REAL = {"mathqa": SHARED / "mathqa_test_part1.json", "aqua": SHARED / "aqua_dev.json"}
shared = pytest.mark.skipif(not all(map(Path.exists, REAL.values())), reason="no shared data")


def naive(options) -> list[str]:
    """Cut at every comma, as the original."""
    return [re.sub(r"^\s*[a-e] ?\) ?", "", part).strip() for part in options.split(",")]


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


@pytest.mark.parametrize(
    "options",
    [
        "(a) 87 (b) 5.2 (c) ( 2 + b ) (d) 9,0 (e) x",
        "( A ) 87 ( B ) 5.2 ( C ) ( 2 + b ) ( D ) 9,0 ( E ) x",
        "(a) 87\n(b) 5.2\n(c) ( 2 + b )\r\n(d) 9,0\n(e) x\n",
        "a) 87\nb) 5.2\nc) ( 2 + b )\nd) 9,0\ne) x",
        "A. 87 B. 5.2 C. ( 2 + b ) D. 9,0 E. x",
        "a. 87\nb. 5.2\nc. ( 2 + b )\nd. 9,0\ne. x",
        "a: 87; b: 5.2; c: ( 2 + b ); d: 9,0; e: x",
        ["(a) 87", "(b) 5.2", "(c) ( 2 + b )", "(d) 9,0", "(e) x"],
        ["A. 87", "B. 5.2", "C. ( 2 + b )", "D. 9,0", "E. x"],
        {"a": "87", "b": 5.2, "c": "( 2 + b )", "d": "9,0", "e": "x"},
        ["87", "5.2", "( 2 + b )", "9,0", "x"],
    ],
)
def test_labels_are_read_as_other_exams_write_them(options):
    assert problems.parse_options(options) == ["87", "5.2", "( 2 + b )", "9,0", "x"]


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
        (dict.fromkeys("badce", "1"), "options are no text"),
        ("A. 1 B. 2 C. vitamin B. 3 D. 4 E. 5", "options are not five"),
        ("A. 1 B. 2 C. 3 D. 4", "options are not five"),
        (["A)1", None, "C)3", "D)4", "E)5"], "an option is empty"),
        ("['a ) 1" + "'" * 100_000 + "x", "options are over 10,000 characters"),  # took hours
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
                       ("empty", "empty holds none of .csv, .tsv, .json, .jsonl")]:  # fmt: skip
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
        "1 of 5 val rows have a problem that training rows have, too",
        "2 of 6 test rows have a problem that training rows have, too",
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


def test_built_in_problems_of_val_and_test_are_not_training_problems(letters):
    cfg = cfg_of(problems.BUILT_IN)
    data = load(cfg.data, letters)
    parts, lines = problems.split(data, cfg)
    sets = [set(problems_of(data, rows)) for rows in parts.values()]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert [len(rows) for rows in parts.values()] == [3200, 400, 400] and len(lines) == 1
    assert len(load(problems.BUILT_IN, letters, max_documents=40)) == 40


@pytest.fixture
def tokenised(tmp_path, monkeypatch):
    """Folders that were written, each time something is tokenised."""
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))
    seen, write_texts = [], lab.data.cache.write_texts

    def counting(folder, texts, tokenizer, *begin, **options):
        seen.append(len(texts))
        return write_texts(folder, texts, tokenizer, *begin, **options)

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


@pytest.mark.parametrize("folder", ["x/train", "x/test", "dev"])
def test_parts_are_found_whatever_their_folder_is_called(folder):
    for part in ("train", "validation", "test"):
        write(made_up(2, 1), f"{folder}/{part}.json")
    assert problems.official_parts(folder) == {"train": "train", "val": "validation", "test": "test"}
    write(made_up(2, 1), f"{folder}/validation.tok.json")
    with pytest.raises(UserError, match=r"holds several tables \(validation.json, validation.tok.json\)"):
        problems.read_parts(SimpleNamespace(data=folder, max_documents=None))
