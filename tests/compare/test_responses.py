"""responses.json: what is read of it, and how a prompt is found again in another file."""

import json
from pathlib import Path

import pytest

from core import UserError
from lab.compare.responses import by_prompt, numbered, read_responses


def test_equal_prompts_are_told_apart_by_their_occurrence():
    lines = [{"group": "a", "x": 1}, {"group": "b", "x": 2}, {"group": "a", "x": 3}]
    assert {key: line["x"] for key, line in numbered(lines).items()} == {
        ("a", 1): 1,
        ("b", 1): 2,
        ("a", 2): 3,
    }


def test_prompts_that_differ_in_case_and_space_are_one_and_the_input_counts():
    rows = [
        {"instruction": "Add  one", "input": ""},
        {"instruction": "add one"},
        {"instruction": "add one", "input": "2"},
    ]
    groups = list(by_prompt(rows))
    assert groups[0][0] == groups[1][0] != groups[2][0] and [key[1] for key in groups] == [1, 2, 1]


@pytest.mark.parametrize("value", [3, None, ["a"], "\ud800"])
def test_something_else_than_text_is_named_by_its_row(value):
    good = {"instruction": "a", "model_response": "b"}
    Path("responses.json").write_text(json.dumps([good, good | {"model_response": value}]))
    with pytest.raises(UserError, match=r"^responses.json: row 2 holds something else than text"):
        read_responses("responses.json")


def test_an_absent_file_says_how_to_make_it():
    with pytest.raises(UserError, match=r"is not there: answer first, by eval.py --mode generate"):
        read_responses("responses.json")
    with pytest.raises(UserError, match=r"^nowhere/responses.json: there is no such folder, and no run"):
        read_responses("nowhere/responses.json")
