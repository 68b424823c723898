"""Duels in both orders, ties and unreadable verdicts."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from toys.judge import (
    in_process,
    judge_of,
    row,
    serve,  # noqa: F401 (a fixture)
    write,
)

import core
from lab.compare import grades, judge, responses
from lab.compare.grades import lines_of_duel


def shown(text):
    """The answers of a question for the better one, as a judge sees them."""
    found = re.search(r"Response A:\n\n(=.*=)\n(.*)\n\1\n\nResponse B:\n\n\1\n(.*)\n\1\n\nWhich", text, re.S)
    return found[2], found[3]


def sides(n=12):
    ours = [row(i, model_response=f"good {i}", input=f"given {i}") for i in range(n)]
    return ours, [{**one, "model_response": f"much longer {i}"} for i, one in enumerate(ours)][::-1]


JUDGES = {  # what it says -> rates of: wins, the same in both orders, the first place, the longer answer
    "always A": (lambda a, b: "A", [0.5, 0, 1, 0.5]),
    "the longer": (lambda a, b: "A" if len(a) > len(b) else "B", [0, 1, 0.5, 1]),
    "knows": (lambda a, b: "Response A." if "good" in a else "**B**", [1, 1, 0.5, 0]),
    "ties": (lambda a, b: "tie", [0.5, 1, None, None]),
    "ties or ours": (lambda a, b: "A" if "good" in a else "tie", [1, 0, 1, 0]),
}


@pytest.mark.parametrize("case", JUDGES)
def test_a_duel_shows_both_orders_and_tells_a_judges_leanings(serve, case):
    says, wanted = JUDGES[case]
    server = serve(lambda text: says(*shown(text)))
    (ours, theirs), names = sides(), ("wins", "same_in_both_orders", "first_place", "longer")
    found = judge.duel(judge_of(server), ours, theirs)
    assert [found[name] for name in names] == wanted
    answers = [{one["model_response"] for one in pair} for pair in zip(ours, theirs[::-1], strict=True)]
    seen = Counter(frozenset(shown(text)) for text in server.asked)
    assert seen == dict.fromkeys(map(frozenset, answers), 2) and set(server.asked.values()) == {1}
    for text in server.asked:  # prompt, input and reference of the two answers
        i = re.search(r"(good|longer) (\d+)", text)[2]
        assert all(part in text for part in (f"Name thing {i}.", f"given {i}", f"reference {i}"))
    assert (found["prompts"], found["equal"], found["unreadable"]) == (12, 0, 0)
    assert [outcome["win"] for outcome in found["outcomes"]] == [wanted[0]] * 12
    told = "\n".join(lines_of_duel("ours", "theirs", found))
    assert ("cannot be told apart" in told) == (wanted[0] == 0.5)
    few = judge.duel(judge_of(server), *sides(9))
    assert "they cannot be told apart on fewer than 10 prompts" in "\n".join(lines_of_duel("a", "b", few))


def test_equal_answers_are_ties_unasked_and_unreadable_verdicts_are_counted(serve):
    server = serve(lambda text: "hm" if " 1" in shown(text)[0] else "A" if "good" in shown(text)[0] else "B")
    ours, theirs = sides(4)
    theirs[0] = {**theirs[0], "model_response": " good 3\n"}
    found = judge.duel(judge_of(server), ours, [*theirs, row(70)])
    assert server.asked.total() == 6 and not any(" 3" in text for text in server.asked)
    assert (found["prompts"], found["equal"], found["unreadable"]) == (4, 1, 2)
    wins = {outcome["group"]: outcome["win"] for outcome in found["outcomes"]}
    assert wins == {responses.group_of(ours[i]): win for i, win in {0: 1, 2: 1, 3: 0.5}.items()}
    assert found["wins"] == pytest.approx(2.5 / 3)
    with pytest.raises(core.UserError, match="no prompt in common"):
        judge.duel(judge_of(server), ours, [row(70)])


def test_several_verdicts_in_one_order_are_not_both_orders(serve):
    server = serve(lambda text: "A" if "good" in shown(text)[0] else "I cannot say")
    found = judge.duel(judge_of(server), *sides(3), repeats=2)
    assert found["unreadable"] == 6 and set(server.asked.values()) == {2}
    assert found["wins"] is None and found["outcomes"] == []


def test_a_duel_of_two_files_is_written_and_one_file_is_no_duel(serve, tmp_path, capfd):
    server = serve(lambda text: "A" if "good" in shown(text)[0] else "B")
    for name, some in zip(("one", "two"), sides(), strict=True):
        (tmp_path / name).mkdir()
        write(some, tmp_path / name / "responses.json")
    run = ["--judge_url", server.url, "--pairwise", "--out", "results", "--run"]
    assert in_process(*run, "one", "two") == 0
    assert "one against two: wins 1.000" in capfd.readouterr().out
    [written] = (tmp_path / "results").glob("duel_*_one_two-*.json")  # the judge's name between
    found = json.loads(written.read_text())
    assert found["sides"] == ["one", "two"] and found["wins"] == 1
    assert in_process(*run, "one") == 2 and "--pairwise" in capfd.readouterr().err


def test_another_pair_or_judge_has_another_file(serve):
    asked, folders = judge_of(serve()), ("d", "e")
    pairs = [(f"{d}/responses_a.json", f"{d}/responses_{x}.json") for d in folders for x in "bc"]
    pairs += [(f"{d}/20260101_000000/responses.json", f"{d}/20260102_000000/responses.json") for d in folders]
    names = [judge.duel_name(asked, [*map(Path, pair)]) for pair in pairs]
    assert names[0].startswith("duel_m_responses_a_responses_b-")
    assert names[4].startswith("duel_m_20260101_000000_20260102_000000-")
    asked.temperature = 0.7
    assert len({*names, judge.duel_name(asked, [*map(Path, pairs[0])])}) == 7
    assert names[0] == judge.duel_name(judge_of_url(asked.url), [*map(Path, pairs[0])])


def judge_of_url(url):
    return judge.Judge(url, "m")


def test_grades_of_answers_to_one_prompt_have_no_interval():
    rows = [row(1, model_response=answer) for answer in ("good", "bad", "odd")]
    found = grades.summary(rows, [[50], [60], [70]])
    assert found["score"] == 60 and np.isnan(found["score_interval"]).all()
    assert "60.00 ± unknown of 100" in grades.lines_of_score("run", found | {"judge": "j", "repeats": 1})[0]
    apart = [row(i, model_response=one["model_response"]) for i, one in enumerate(rows)]
    low, high = grades.summary(apart, [[50], [60], [70]])["score_interval"]
    assert low < 60 < high
