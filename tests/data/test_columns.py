"""Columns and classes: what files of each kind are called by, and the order of classes that runs store."""

from lab.data import builtin
from lab.data.columns import INSTRUCTION_COLUMNS, LABELS, LETTERS, PAIR_COLUMNS, PROBLEM_COLUMNS


def test_the_order_of_classes_and_letters_is_that_of_stored_runs():
    assert list(LABELS) == ["A", "B", "tie"] and LETTERS == "abcde"
    assert list(LABELS.values()) == ["winner_model_a", "winner_model_b", "winner_tie"]  # Kaggle's columns


def test_built_in_rows_have_the_columns_of_their_kind():
    assert set(builtin.python_instructions()[0]) == set(INSTRUCTION_COLUMNS)
    assert set(builtin.python_pairs(n=3)[0]) == set(PAIR_COLUMNS)
    assert set(PROBLEM_COLUMNS) < set(builtin.template_problems(count=3)[0])
