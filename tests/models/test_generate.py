"""Generation: a row of a batch is the row alone, sampling in proportion, stops and windows."""

import numpy as np
import pytest
import torch
from toys.gpt import GROUPED, PROMPTS, ids, lively_gpt, random_gpt, transformers_model

from core import UserError, generate
from lab.models import gpt_formats
from lab.models.generate import choose


def written_out(model, prompt, n, pick=lambda logits: int(logits.argmax())):
    """What generate should do for one prompt, without a cache, a batch or padding."""
    size, row, start = model.config.block_size, list(prompt), 0
    for _ in range(n):
        if len(row) - start > size:
            start = len(row) - (size + 1) // 2
        with torch.no_grad():
            row.append(pick(model(torch.tensor([row[start:]]))[0, -1]))
    return row[len(prompt) :]


SHAPES = {"learned": {}, "rotary": {"positions": "rotary"}, "grouped": GROUPED}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_of_a_greedy_batch_is_the_row_alone(shape, use_cache):
    model = lively_gpt(**SHAPES[shape])
    batch = generate(model, PROMPTS, 9, temperature=0, use_cache=use_cache)  # the longest fills block_size
    assert batch == [written_out(model, prompt, 9) for prompt in PROMPTS]
    assert min(len(set(row)) for row in batch) > 2


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("block_size", [15, 16])
@pytest.mark.parametrize("length", [1, 16, 40])
def test_behind_block_size_the_window_slides(positions, block_size, length):
    model = lively_gpt(positions=positions, block_size=block_size)
    prompt = ids(length).tolist()
    assert generate(model, [prompt], 30, temperature=0)[0] == written_out(model, prompt, 30)


def test_a_row_is_the_row_alone_even_when_another_rows_window_slides():
    model = lively_gpt()
    prompts = [ids(15).tolist(), [4, 5]]
    assert generate(model, prompts, 14, temperature=0)[1] == written_out(model, prompts[1], 14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choice", [{"temperature": 0}, {}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}],
                         ids=["greedy", "sampled", "top k and p"])  # fmt: skip
def test_the_cache_changes_no_token(shape, choice):
    model = lively_gpt(**SHAPES[shape])
    cached = generate(model, PROMPTS, 30, **choice, seed=3)
    assert cached == generate(model, PROMPTS, 30, **choice, seed=3, use_cache=False)
    assert [len(row) for row in cached] == [30] * 3 and min(len(set(row)) for row in cached) > 4


def test_same_seed_same_text_and_equal_prompts_differ_from_row_to_row():
    model = random_gpt(std=0.1)  # flat enough to have a choice
    first = generate(model, [[1, 2]] * 3, 20, seed=7)
    assert generate(model, [[1, 2]] * 3, 20, seed=7) == first
    assert generate(model, [[1, 2]], 20, seed=7) == first[:1]  # row i draws from (seed, i)
    assert all(a != b for a, b in zip(first, generate(model, [[1, 2]] * 3, 20, seed=8), strict=True))
    assert first[0] != first[1] != first[2] != first[0]


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    model = lively_gpt()
    greedy = generate(model, PROMPTS, 20, temperature=0)
    assert generate(model, PROMPTS, 20, top_k=1) == greedy
    assert generate(model, PROMPTS, 20, top_p=1e-6) == greedy
    assert generate(model, PROMPTS, 20) != greedy


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_p": 0.91}, {0, 1, 2, 3}),
        ({"top_p": 0.89}, {0, 1, 3}),
        ({"top_p": 0.76}, {0, 1, 3}),
        ({"top_p": 0.74}, {1, 3}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.49}, {3}),
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_k": 2, "top_p": 0.66}, {3}),  # of the two that top_k leaves, 3 has 2 / 3
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_exactly_the_likeliest_ids_are_drawn_in_their_proportions(choice, kept, temperature):
    probs = torch.tensor([0.15, 0.25, 0.10, 0.50])
    generator, choice = torch.Generator().manual_seed(0), {"top_k": None, "top_p": None, **choice}
    logits = (probs.log() * temperature + 3).expand(1000, 4)  # so that the temperature brings probs back
    drawn = choose(logits, [generator] * 1000, temperature, **choice)
    shares = np.bincount(drawn, minlength=4) / 1000
    expected = np.array([probs[i].item() * (i in kept) for i in range(4)])
    assert set(np.flatnonzero(shares)) == kept
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.063)  # four standard errors of 1,000


def test_ids_beyond_the_vocabulary_are_never_drawn():
    model = random_gpt(tie_head=False, head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[20:] = 1000.0
    assert min(min(row) for row in generate(model, PROMPTS, 5)) >= 20  # a padded matrix, unguarded
    for choice in ({"temperature": 0}, {}, {"top_k": 22}, {"top_p": 0.99}):
        rows = generate(model, PROMPTS, 20, vocab_size=20, **choice)
        assert max(max(row) for row in rows) < 20


def test_a_stop_id_ends_its_row_only_and_is_not_part_of_it():
    model, polled = lively_gpt(), []
    free = generate(model, PROMPTS, 30, temperature=0)
    stop = free[0][4]
    ends = [row.index(stop) if stop in row else 30 for row in free]
    stopped = generate(model, PROMPTS, 30, temperature=0, stop={stop}, poll=lambda: polled.append(1))
    assert stopped == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len(set(ends)) > 1 and len(polled) == min(30, max(ends) + 1)
    everything = generate(model, PROMPTS, 30, stop=range(23), poll=lambda: polled.append(2))
    assert everything == [[], [], []] and polled.count(2) == 1  # nothing left to do


def test_greedy_text_is_that_of_transformers(tmp_path):
    theirs = transformers_model("gpt2", n_positions=64)
    theirs.save_pretrained(tmp_path)
    model = gpt_formats.load_pretrained(str(tmp_path))
    for prompt in PROMPTS:
        x = torch.tensor([prompt])
        out = theirs.generate(x, attention_mask=x >= 0, max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert generate(model, [prompt], 40, temperature=0)[0] == out[0, len(prompt) :].tolist()


def test_a_context_that_slides_begins_with_the_begin_tokens_again():
    model, begin = lively_gpt(), [3, 4]
    for prompt in ([3, 4, *PROMPTS[0]], [3, 4, *range(20)]):
        row, start = list(prompt), 0
        for _ in range(40):  # by hand, without a cache
            start = start if len(row) - start <= 16 else len(row) - 8
            read = row if start == 0 else [*begin, *row[start + 2 :]]
            row.append(int(model.logits(model.hidden(torch.tensor([read]))[:, -1]).argmax()))
        assert generate(model, [prompt], 40, temperature=0, begin=begin)[0] == row[len(prompt) :]
        assert generate(model, [prompt], 40, temperature=0)[0] != row[len(prompt) :]


@pytest.mark.parametrize("training", [True, False])
def test_generation_is_without_dropout_and_leaves_the_mode_as_it_was(training):
    model = lively_gpt(dropout=0.9).train(training)
    assert generate(model, PROMPTS, 9, temperature=0) == generate(lively_gpt(), PROMPTS, 9, temperature=0)
    assert model.training == training
    assert all(module.training == training for module in model.modules())


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt has no token"):
        generate(random_gpt(), [[1], []], 3)
