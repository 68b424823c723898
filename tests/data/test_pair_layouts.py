"""How rows of preferences are read: Arena's columns, conversations, chosen and rejected answers."""

import itertools
import json
from pathlib import Path

import pytest
from conftest import PROJECT
from toys.preference import row

from core import UserError
from lab.data import tables
from lab.data.cache import is_clean
from lab.data.pair_layouts import layout_of, parse, parse_anyway, rows_to_judge, usable_rows

SHARED = PROJECT.parent / "shared" / "data" / "preference"


def test_a_row_is_turns_and_a_class_in_the_order_of_LABELS():
    assert parse(row()) == ("0", [["hello there", "general", "who?"], ["", "no", "yes"]], 0, None)
    assert parse(row(winner="winner_model_b"))[2] == 1
    assert parse(row(winner="winner_tie"))[2] == 2
    assert parse({**row(), "prompt": ["as", "lists"]})[1][0][0] == "as"  # Parquet holds lists


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": '["half'}, "prompt is no JSON"),
        ({"response_a": ""}, "response_a is empty"),
        ({"response_b": "[]"}, "response_b is no list of strings"),
        ({"response_b": '["x", 3]'}, "response_b is no list of strings"),
        ({"response_a": '["\\ud83d", "x"]'}, "response_a has odd Unicode"),
        ({"response_a": '["only one turn"]'}, "differ in their number of turns"),
        ({"winner_model_a": 0}, "no winner"),
        ({"winner_tie": 1}, "several winners"),
        ({"id": None}, "no id"),
    ],
)
def test_unusable_rows_are_told_apart(changes, reason):
    with pytest.raises(ValueError, match=reason):
        parse({**row(), **changes})


@pytest.mark.parametrize("odd", [{"id": 3}, ["a"], 7, None])
def test_a_row_of_another_shape_is_unusable_not_a_crash(odd):
    with pytest.raises(ValueError):
        parse(odd)


ODD = {  # cells of rows that must be judged all the same -> what is read
    "an empty cell": ({"response_a": ""}, [["hello there", "", "who?"], ["", "", "yes"]]),
    "no JSON": ({"prompt": "plain [text"}, [["plain [text", "general", "who?"], ["", "no", "yes"]]),
    "one turn less": ({"response_b": '["x"]'}, [["hello there", "general", "x"], ["", "no", ""]]),
    "nothing": ({"prompt": None}, [["", "general", "who?"], ["", "no", "yes"]]),
    "half a character": ({"response_a": '["\\ud83d", "x"]'}, None),
}


@pytest.mark.parametrize("case", ODD)
def test_a_row_to_be_judged_is_never_dropped(case):
    changes, wanted = ODD[case]
    texts, odd = parse_anyway({**row(), **changes})
    assert odd and (wanted is None or texts == wanted)
    assert all(is_clean(text) for turn in texts for text in turn)
    assert parse_anyway(row()) == (parse(row())[1], None)


def test_an_id_that_cannot_be_written_is_refused_where_it_is_read():
    row = {"id": "a\ud800", "prompt": '["p"]', "response_a": '["a"]', "response_b": '["b"]'}
    with pytest.raises(UserError, match=r"t\.json: row 1 has an id with odd Unicode"):
        rows_to_judge([row], "t.json")
    with pytest.raises(ValueError, match="id has odd Unicode"):
        parse(row | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0})


def test_a_deep_cell_is_a_bad_row():
    deep = {"id": "1", "prompt": "[" * 100_000, "response_a": '["a"]', "response_b": '["b"]'}
    with pytest.raises(ValueError, match="prompt is no JSON"):
        parse(deep)
    assert rows_to_judge([deep], "t.json")[1] == [
        '1 row(s) are judged as plain text: prompt is no JSON (a text is written ["text"])'
    ]


def say(*texts):
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def usable(*rows, **options):
    return usable_rows([*rows], "t.jsonl", **options)


@pytest.mark.parametrize(
    ("word", "label"), [("model_a", 0), ("model_b", 1), ("tie", 2), ("tie (bothbad)", 2), ("both_bad", 2)]
)
def test_conversations_are_turns_with_a_winner_in_words(word, label):
    a, b = say("hi", "yes", "why?", "so"), say("hi", "no", "why?", "thus")
    system = [{"role": "system", "content": "be short"}]
    line = {"question_id": "q1", "winner": word, "conversation_a": system + a}
    (found,), lines = usable(line | {"conversation_b": json.dumps(system + b)})  # of a CSV
    assert found == ("q1", [["be short\n\nhi", "yes", "no"], ["why?", "so", "thus"]], label, None)
    assert lines == ["rows are conversations A and B"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"winner": "model_c"}, "winner is none of model_a"),
        ({"conversation_b": say("other", "no")}, "ask different things"),
        ({"conversation_b": say("hi", "no", "why?", "so")}, "ask different things"),
        ({"conversation_b": say("hi")}, "does not end with an answer"),
        ({"conversation_b": [{"role": "user"}, 3]}, "without a role or a text"),
        ({"conversation_b": ""}, "conversation_b is empty"),
        ({"conversation_b": say("hi", "\ud83d")}, "odd Unicode"),
    ],
)
def test_odd_conversations_are_told_apart(changes, reason):
    line = {"winner": "tie", "conversation_a": say("hi", "yes"), "conversation_b": say("hi", "no")}
    with pytest.raises(UserError, match=f"1 of 1 rows are unusable.*{reason}"):
        usable(line | changes)


CHOSEN = {  # a row -> prompt, better and worse answer of its turns
    "prompt": ({"prompt": "p", "chosen": "good", "rejected": "bad"}, [["p", "good", "bad"]]),
    "instruction": (
        {"instruction": "do", "input": "this", "chosen": "good", "rejected": "bad", "output": "good"},
        [["do\n\nthis", "good", "bad"]],
    ),
    "no input": ({"instruction": "do", "input": "", "chosen": "x", "rejected": "y"}, [["do", "x", "y"]]),
    "messages": (
        {"prompt": "p", "chosen": say("p", "good"), "rejected": say("p", "bad")},
        [["p", "good", "bad"]],
    ),
    "answers as messages": (
        {"prompt": say("p"), "chosen": say("p", "good")[1:], "rejected": say("p", "bad")[1:]},
        [["p", "good", "bad"]],
    ),
    "marks in a string": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"},
        [["a", "b", "b"], ["c", "good", "bad"]],
    ),
    "what follows the first difference": (
        {"chosen": say("p", "good", "q", "r"), "rejected": say("p", "bad")},
        [["p", "good", "bad"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN)
def test_a_chosen_and_a_rejected_answer_make_a_row(case):
    line, turns = CHOSEN[case]
    (found,), lines = usable(line)
    row_id, got, label, soft = found
    assert (row_id, soft) == ("1", None) and label in (0, 1) and "drawn by the row's hash" in lines[0]
    assert [[asked, *(pair if label == 0 else pair[::-1])] for asked, *pair in got] == turns
    assert usable(line | {"id": "x", "extra": 3})[0][0][1:] == found[1:]  # the side is the texts' alone


def test_the_chosen_answer_is_A_in_half_of_the_rows():
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(400)]
    labels = [label for _, _, label, _ in usable_rows(rows, "t")[0]]
    assert 160 < sum(labels) < 240


def test_chosen_rows_that_say_nothing_are_counted_however_many_and_odd_ones_are_named():
    good = [{"prompt": "p", "chosen": "x", "rejected": f"y{i}"} for i in range(200)]
    same = [{"prompt": "p", "chosen": "x", "rejected": "x"}] * 50
    odd = [
        {"prompt": "p", "chosen": say("a", "x"), "rejected": say("b", "x")},
        {"chosen": "x", "rejected": "y"},
    ]
    found, lines = usable(*good, *same, *odd)
    assert len(found) == 200 and "left out 50 row(s), chosen and rejected are the same" in lines[1]
    assert "answer different prompts: 251" in lines[2] and "no prompt: use a column" in lines[3]
    with pytest.raises(UserError, match="t: no row is left to learn from: left out 50 row"):
        usable_rows(same, "t")


SOFT = {"prob_a": 0.2, "prob_b": "0.3", "prob_tie": 0.5}


def test_probabilities_stand_beside_a_winner_or_instead_of_one():
    none = dict.fromkeys(("winner_model_a", "winner_model_b", "winner_tie"), "")
    (both, only), _ = usable(row() | SOFT, row(1) | none | SOFT, needs_winner=False)
    assert both[2] == 0 and only[2] == -1 and both[3] == only[3] == pytest.approx([0.2, 0.3, 0.5])
    bare = {name: cell for name, cell in row().items() if "winner" not in name}
    assert usable(bare | SOFT, needs_winner=False)[0][0][2] == -1
    with pytest.raises(UserError, match="no winner"):  # where it would be tested on
        usable(row() | none | SOFT)
    assert usable(row() | dict.fromkeys(SOFT, None))[0][0][3] is None


@pytest.mark.parametrize(
    ("cell", "reason"), [("x", "no three numbers"), (0.9, "a sum of 1"), (-0.2, "a sum of 1")]
)
def test_odd_probabilities_are_named(cell, reason):
    with pytest.raises(UserError, match=reason):
        usable(row() | SOFT | {"prob_a": cell})


ODD_CELLS = [3, True, 1e400, 10**400, [], {}, [[]], [{}], ["x"], {"role": 1}, "", "[{", "[{}]", "[3]", None]
ODD_CELLS += ["[" * 9000, "\ud800", [{"role": "user", "content": [3]}], [{"role": "assistant", "content": 7}]]


@pytest.mark.parametrize("kind", ["Arena", "conversations", "chosen"])
def test_whatever_a_cell_holds_the_row_is_read_or_named(kind):
    two = {
        "conversation_a": say("p", "x"),
        "conversation_b": say("p", "y"),
        "winner": "tie",
        "question_id": 1,
    }
    chosen = {"prompt": "p", "instruction": "i", "input": "", "chosen": "x", "rejected": "y", "id": 1}
    good = {"Arena": row() | SOFT, "conversations": two | SOFT, "chosen": chosen}[kind]
    named = 0
    for column, cell in itertools.product(good, ODD_CELLS):
        try:
            found, _ = usable(good | {column: cell}, needs_winner=False)
            json.dumps(found, ensure_ascii=False).encode()  # as the cache writes it
        except UserError as error:
            named += "rows are unusable" in str(error)
    assert named > 20


def test_layouts_are_known_by_their_columns():
    with pytest.raises(UserError, match=r"lacks column\(s\) winner_tie"):
        layout_of([{name: 1 for name in row() if name != "winner_tie"}], "t")
    with pytest.raises(UserError, match="need columns A and B, not chosen"):
        layout_of([{"chosen": "x", "rejected": "y", **SOFT}], "t")
    assert layout_of([row() | {"chosen": 1, "rejected": 2}], "t")[1] is parse


@pytest.mark.skipif(not SHARED.exists(), reason="small real data is not here")
def test_a_real_file_of_chosen_and_rejected_answers():
    path = Path(SHARED / "instruction-data-with-preference.json")
    found, lines = usable_rows(tables.read_rows(str(path)), "real.json")
    labels = [label for *_, label, _ in found]
    assert len(found) + sum(int(line.split()[2]) for line in lines[1:]) == 1100
    assert len(found) > 1050 and 0.4 < sum(labels) / len(labels) < 0.6
