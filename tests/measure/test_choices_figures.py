"""Figures of multiple choice: known answers, guessing, letters, intervals."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from toys.mathqa import (
    LETTERS,
    MODERN,
    Fake,
    by_hand,
    cfg_of,
    letters,  # noqa: F401 (a fixture)
    load,
    log_likelihood,
    made_up,
    quiet,
    random_problems,
    row_of,
    small_gpt,
    write,
)

import core
from core import World
from lab.data import builtin, problems
from lab.measure.choices import (
    Choices,
    Scores,
    answer_figures,
    answer_lines,
    examples_of,
    measure,
    shuffled_problems,
)


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
        ((0.05, 0.2), 0.1, (-0.1, 0.2), "cannot be told from guessing"),
        ((0.05, 0.19), 0.1, (-0.1, 0.2), "answers are worse than guessing"),
        ((0.05, 0.25), 0.26, (-0.1, 0.2), "answers are worse than guessing"),
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
