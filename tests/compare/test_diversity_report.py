"""Verdicts over arms: what the intervals say, few documents, losses that are no number."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import core
from lab.compare import cross, diversity_report


def losses_of(arm, name, levels, noise=0.02, seeds=3, documents=40):
    """Files of losses.jsonl: made-up runs whose mean loss is levels[0] and, per seed, a little beside it."""
    rng = np.random.default_rng(sum(map(ord, name)))
    shape, files = rng.normal(0, 0.3, documents), []
    for seed in range(seeds):
        own = np.random.default_rng([sum(map(ord, arm)), seed]).normal(0, noise, documents)
        nats = 10 * (levels + shape + own)
        path = Path(f"{arm}-{name}-{seed}.jsonl")
        lines = [
            {"part": "test", "row": i, "group": i, "nats": n, "hits": 3, "targets": 10, "bytes": 25}
            for i, n in enumerate(nats)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(path)
    return files


@pytest.mark.parametrize(
    ("a", "b", "seeds", "words"),
    [
        (5.5, 5.4, 3, "on n, a+b: the mixture wins beyond noise against every single source"),
        (4.5, 4.4, 3, "on n, a+b: the mixture loses beyond noise against every single source"),
        (5.5, 4.5, 3, "on n, a+b: the mixture is better than a, worse than b"),
        (5.5, 5.0, 3, "on n, a+b: the mixture is better than a, not to be told apart from b"),
        (5.0, 4.5, 3, "on n, a+b: the mixture is worse than b, not to be told apart from a"),
        (5.0, 5.0, 3, "on n, a+b: the mixture is not to be told apart from a and b"),
        (5.5, 5.4, 2, "on n, a+b: too few seeds (2 of 3) to say whether the mixture wins"),
        (5.5, 5.4, 1, "on n, a+b: too few seeds (1 of 3) to say whether the mixture wins"),
    ],
)
def test_the_verdict_is_what_the_intervals_say(a, b, seeds, words):
    levels = {"a": a, "b": b, "a+b": 5.0}
    matrix = {arm: {"n": losses_of(arm, "n", level, seeds=seeds)} for arm, level in levels.items()}
    (line,), differences = diversity_report.verdicts(matrix, seeds)
    said, *numbers = line.split("\n")
    assert said == words and len(numbers) == 2
    assert [one["difference"] for one in differences] == pytest.approx([5 - a, 5 - b], abs=0.02)
    for one in differences:
        low, high = one["interval"]
        text = f"{one['difference']:+.4f} ({low:+.4f} to {high:+.4f}) against {one['against']}"
        assert f"  loss {text}" in numbers and low < one["difference"] < high


@pytest.mark.parametrize(("documents", "decided"), [(9, False), (10, True)])
def test_few_documents_decide_nothing(documents, decided):
    levels = {"a": 5.5, "b": 5.4, "a+b": 5.0}
    matrix = {arm: {"n": losses_of(arm, "n", level, documents=documents)} for arm, level in levels.items()}
    (line,), _ = diversity_report.verdicts(matrix, 3)
    assert ("fewer than 10 documents (or stretches of one), or a loss" in line) != decided
    assert ("the mixture wins beyond noise against every single source" in line) == decided


def coefficients_of(pairs, **values):
    """Arms whose own intervals all overlap; pairs: "a x b" -> interval of the difference."""
    arms = {arm: {"coefficient": value, "interval": [0.0, 1.0]} for arm, value in values.items()}
    return {"arms": arms, "cross": {name: {"difference_interval": ends} for name, ends in pairs.items()}}


def test_arms_are_ordered_by_the_intervals_of_their_differences():
    """By diversity a pair may differ though its single intervals overlap; by loss the rows are the same."""
    pairs = {"a x b": [-0.04, -0.01], "a x c": [-0.1, 0.1], "b x c": [0.01, 0.04]}
    coefficients = coefficients_of(pairs, a=0.20, b=0.22, c=0.19)
    matrix = {arm: {"n": losses_of(arm, "n", loss)} for arm, loss in (("a", 5.0), ("b", 5.0), ("c", 5.05))}
    cells = diversity_report.cells(matrix)
    means = {arm: cells["loss"][arm]["n"] for arm in "abc"}
    assert means["c"]["interval"][0] < means["a"]["interval"][1]  # the single intervals overlap
    said = diversity_report.link_table(coefficients, "n", cells, 3, matrix).splitlines()[-2:]
    first, second = sorted("ab", key=lambda arm: means[arm]["mean"])
    told = " (~: cannot be told apart)"
    assert said == [f"by diversity: b > a ~ c{told}", f"by loss on n: {first} ~ {second} < c{told}"]
    few = diversity_report.link_table(coefficients, "n", cells, 2, matrix)
    assert few.endswith("by loss on n: no order, too few seeds (2 of 3)")
    unknown = coefficients_of({pair: [math.nan, math.nan] for pair in pairs}, a=0.20, b=0.22, c=0.19)
    said = diversity_report.link_table(unknown, "n", cells, 3, matrix)
    assert f"by diversity: b ~ a ~ c{told}" in said
    clear = coefficients_of({pair: [0.01, 0.02] for pair in pairs}, a=0.20, b=0.22, c=0.19)
    assert "by diversity: b > a > c\n" in diversity_report.link_table(clear, "n", cells, 3, matrix)


def test_a_loss_that_is_no_number_decides_nothing():
    matrix = {arm: {"n": losses_of(arm, "n", 5.0)} for arm in ("a", "b", "a+b")}
    path = matrix["a+b"]["n"][0]
    path.write_text(re.sub(r'"nats": [\d.]+', '"nats": NaN', path.read_text(), count=1))
    (line,), _ = diversity_report.verdicts(matrix, 3)
    assert "or a loss that is no number: nothing to decide" in line


def test_the_neutral_text_is_spoken_of_first_and_a_study_without_mixtures_decides_nothing():
    arms = ("a", "b", "a+b")
    matrix = {arm: {name: losses_of(arm, name, 5.0) for name in "abn"} for arm in arms}
    told, _ = diversity_report.verdicts(matrix, 3)
    assert [line.split(",")[0] for line in told] == ["on n", "on b", "on a"]
    assert diversity_report.verdicts({"a": matrix["a"], "b": matrix["b"]}, 3)[0][0].startswith(
        "no mixture beside its"
    )
    assert diversity_report.verdicts({"a+b": matrix["a+b"]}, 3)[1] == []


def test_cells_are_sums_over_sums():
    files = losses_of("a", "n", 5.0)
    found = diversity_report.cells({"a": {"n": files}})
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    nats = [sum(line["nats"] for line in of) for of in lines]
    assert found["loss"]["a"]["n"]["runs"] == pytest.approx([n / 400 for n in nats])
    assert found["accuracy"]["a"]["n"]["mean"] == pytest.approx(0.3)
    assert found["bits per byte"]["a"]["n"]["mean"] == pytest.approx(sum(nats) / 3 / (40 * 25) / math.log(2))
    table = diversity_report.tables({"loss": found["loss"]}, 3)
    assert "95 % over documents and 3 seeds" in table
    assert "95 % over documents; one seed" in diversity_report.tables({"loss": found["loss"]}, 1)
    assert f"{math.exp(found['loss']['a']['n']['mean']):.2f}" in table


def test_losses_of_a_study_that_are_not_as_they_were_written_are_named():
    path, *_ = losses_of("a", "n", 5.0)
    lines = diversity_report.read_lines(path)  # as they were kept before
    cross.write_losses(path, lines)
    assert diversity_report.read_lines(path) == lines and len(lines) == 40
    whole = path.read_text()
    changed, cut = whole.replace('"hits": 3', '"hits": 4', 1), whole[: whole.rindex("{")]
    for text in (
        changed,
        cut,
        whole[:-9],
        whole.replace("hash", "hast"),
        "[]",
        "null",
        "7",
        "{}",
        "",
    ):
        path.write_text(text)
        with pytest.raises(core.UserError, match=r"^a-n-0.jsonl is damaged: delete it, and the same command"):
            diversity_report.read_lines(path)
