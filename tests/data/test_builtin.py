"""The built-in data: the same on every machine, and not to be guessed without reading them."""

import hashlib
import itertools
import json
import platform
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from toys.corpus import (
    documents_of,
    opened,
    own_cache,  # noqa: F401 (a fixture)
)
from toys.mathqa import LETTERS

import core
from lab.data import builtin, columns, instructions, pair_layouts, pairs, problems


def test_built_in_documents_are_there_on_every_machine():
    tokens = opened("python-docs", max_documents=12, val_share=0.3, test_share=0.3)
    expected = list(itertools.islice(builtin.built_in_texts("python-docs"), 12))
    parts = [documents_of(tokens, part) for part in core.PARTS]
    assert sorted(itertools.chain(*parts)) == sorted(expected) and all(parts)


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


RARE = 18.47  # chi-square of four degrees of freedom exceeds it once in a thousand


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


def test_the_built_in_pairs_need_the_prompt():
    rows = builtin.python_pairs(3000)
    words = {topic: set(builtin.topic_words(topic)) for topic in builtin.TOPICS}
    assert all(len(w) == 20 for w in words.values()) and len(set.union(*words.values())) == 80
    by_topics = {}
    for line in rows:
        _, turns, label, _ = pair_layouts.parse(line)
        prompt, a, b = turns[0]
        topic_a, topic_b = ([t for t in words if set(text.split()) <= words[t]] for text in (a, b))
        assert len(topic_a) == len(topic_b) == 1 and topic_a != topic_b
        right = [topic_a[0] in prompt, topic_b[0] in prompt]
        assert label == (2 if right[0] == right[1] else right.index(True))
        by_topics.setdefault((*topic_a, *topic_b), []).append(label)
    for labels in by_topics.values():  # given the two answers, every label is as likely
        np.testing.assert_allclose(np.bincount(labels) / len(labels), 1 / 3, atol=0.12)


def test_a_built_in_set_of_other_rows_is_another_one_to_caches_and_runs(monkeypatch):
    """The rows are made of names and docstrings of live modules, which differ between versions of Python."""
    asked = SimpleNamespace(max_documents=None, template="alpaca", extra_data=())
    keys = {"python-pairs": pairs.pairs_key, "python-instructions": instructions.instructions_key}

    def sources():
        asked_of = {name: SimpleNamespace(**vars(asked), data=name) for name in keys}
        return {name: key(asked_of[name], None)["fingerprint"]["data"] for name, key in keys.items()}

    before = sources()
    assert before == sources() and len({*before.values()}) == 2
    words = builtin.topic_words
    monkeypatch.setattr(builtin, "topic_words", lambda topic: [*words(topic)[:-1], "a_new_name"])
    monkeypatch.setattr(builtin, "MODULES", builtin.MODULES[:-1])
    after = sources()
    assert all(after[name] != before[name] for name in keys)
    assert (
        builtin.built_in_fingerprint("template-problems")
        == hashlib.sha256(json.dumps(builtin.template_problems()).encode()).hexdigest()
    )
    assert builtin.built_in_fingerprint("python-docs") == f"python-docs of Python {platform.python_version()}"
