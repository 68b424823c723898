"""Multiple choice: what the loss counts, scores as log-likelihoods, strangers as a control."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys.mathqa import (
    END,
    FIVE,
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
    small_gpt,
    spelt,
)

import core
from core import IGNORE_INDEX, World
from lab.data import problems, tokenizers
from lab.measure.choices import (
    Choices,
    Scores,
    over_padding,
    shuffled_problems,
    some,
)


def every(data, most=65, loss_on_prompt=False) -> core.Examples:
    return core.Examples(data, np.arange(len(data)), most, loss_on_prompt)


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
