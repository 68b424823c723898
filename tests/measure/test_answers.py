"""Answers are the same on any ranks and in any batch; what is counted among them."""

import io
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from torch import nn
from toys.sft import (
    END,
    SCRIPTS,
    adapted,  # noqa: F401 (a fixture)
    by_hand,
    config,
    every,
    parts_of,
    toy_cfg,
    tuned,  # noqa: F401 (a fixture)
)

import core
import lab.data.text
import lab.measure.answers
import lab.train.batches
import lab.train.loss
import run_instruct
from core import UserError, World
from lab.data import columns, instructions
from lab.measure.answers import (
    answer_ids,
    first_word,
    first_words,
    rows_at_once,
    write_in_parts,
    write_responses,
)
from lab.models import generate
from lab.models.decoding import note


@pytest.mark.slow
def test_answers_are_the_same_on_1_2_and_3_ranks_and_in_any_batch(tuned):
    _, model = tuned
    argv = ["--smoke", "--model", model, "--max_steps", 0, "--plain_blocks", 0, "--sample_tokens", 0]
    argv += ["--answer_rows", 24]
    found = []
    for size, batch in ((1, 32), (2, 32), (3, 7)):
        out = f"out{size}"
        codes = ranks.launch("run_instruct", "--out", out, *argv, "--eval_batch", batch, size=size,
                             env={"TOKEN_CACHE": os.environ["TOKEN_CACHE"]})  # fmt: skip
        assert codes == [0] * size, Path("out.txt").read_text()
        found.append((ranks.newest(out) / "responses.json").read_text())
    assert found[0] == found[1] == found[2]
    responses = json.loads(found[0])
    assert len(responses) == 24 and len({row["model_response"] for row in responses}) > 5


@pytest.mark.slow
def test_the_batch_does_not_matter_to_an_answer(tuned):
    cfg, model, tokenizer = run_instruct.load_model(tuned[1], World())
    data, parts = parts_of(cfg)
    prompts = [data.prompt(row) for row in parts["test"].rows[:9]]
    together = lab.measure.answers.answers(model, tokenizer, prompts, 16, 9, World())
    assert together == lab.measure.answers.answers(model, tokenizer, prompts, 16, 2, World())
    assert together == [
        lab.measure.answers.answers(model, tokenizer, [ids], 16, 1, World())[0] for ids in prompts
    ]
    assert lab.measure.answers.answers(model, tokenizer, [], 16, 4, World()) == []


def test_responses_are_the_test_rows_with_an_answer_each(tuned):
    result, folder = tuned
    cfg, _, _ = run_instruct.load_model(folder, World())
    data, parts = parts_of(cfg)
    responses = json.loads((folder / "responses.json").read_text())
    named = [
        dict(zip(columns.INSTRUCTION_COLUMNS, data.texts[row], strict=True)) for row in parts["test"].rows
    ]
    assert [{k: row[k] for k in columns.INSTRUCTION_COLUMNS} for row in responses] == named
    assert {tuple(row) for row in responses} == {(*columns.INSTRUCTION_COLUMNS, "model_response")}
    right = [first_word(row["model_response"]) == first_word(row["output"]) for row in responses]
    assert result["test/first_word"] == np.mean(right)
    usual, times = Counter(first_word(data.texts[row][2]) for row in parts["train"].rows).most_common(1)[0]
    assert times > 1
    guess = np.mean([first_word(row["output"]) == usual for row in responses])
    assert result["test/first_word_guess"] == guess
    assert result["test/empty_responses"] == 0


class Answering(nn.Module):
    """A model that says what stands in `replies` for the first id of a prompt, then the end token."""

    def __init__(self, replies):
        super().__init__()
        self.replies, self.config = replies, SimpleNamespace(block_size=64, tie_head=False)
        self.wte, self.h = nn.Embedding(1, 1), []

    def hidden(self, input_ids, cache=None):
        if not hasattr(cache, "said"):
            real = 0 if cache.padding is None else cache.padding
            cache.who, cache.said = input_ids[torch.arange(len(input_ids)), real].tolist(), 0
        words = [[*self.replies[who], *[END] * 9][cache.said] for who in cache.who]
        cache.said += 1
        return nn.functional.one_hot(torch.tensor(words), 100).float()[:, None]

    def logits(self, hidden):
        return hidden


class Numbers:
    eos_token_id = END

    def get_vocab(self):
        return {str(i): i for i in range(100)}

    def __call__(self, text, **options):
        return {"input_ids": [1], "special_tokens_mask": [0]}

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)


def test_empty_answers_are_counted_and_an_id_of_0_is_an_answer(tmp_path):
    data = by_hand(([1, 50], [7]), ([2], [5]), ([3, 4, 5], [0]), ([4], [8, 8]))
    data.tokenizer = Numbers()
    data.texts = [[f"q{i}", "", text] for i, text in enumerate(["7", "5", "0 1", "8 8"])]
    model = Answering({1: [], 2: [5, 6, 7, 8, 9], 3: [0, 1], 4: []})
    said = []
    run = SimpleNamespace(world=World(), folder=tmp_path, say=said.append, poll=lambda active=0: 0)
    cfg = toy_cfg("--max_new_tokens", 3, "--eval_batch", 3)
    parts = {"train": every(data), "test": every(data)}
    figures = write_responses(run, cfg, parts, model)
    answers = [row["model_response"] for row in json.loads((tmp_path / "responses.json").read_text())]
    assert answers == ["", "5 6 7", "0 1", ""]
    assert figures["test/empty_responses"] == 2 and figures["test/first_word"] == 0.5
    assert "answers  4 in responses.json, 2 empty" in said


def test_answers_fit_into_the_models_positions(monkeypatch):
    torch.manual_seed(0)
    model = core.GPT(core.GPTConfig(100, block_size=16, n_layer=1, n_head=2, n_embd=8))
    prompts, most = [[1] * 3, [2] * 10, [3] * 15, [4] * 20], 12
    slid, never_ends = [], Numbers()
    never_ends.eos_token_id = 1000
    monkeypatch.setattr(generate, "in_context", lambda row, start, begin: slid.append(start) or row[start:])
    got = [ids.tolist() for ids in answer_ids(model, never_ends, prompts[:3], most, 3, World())]
    assert [len(ids) for ids in got] == [12, 6, 1]
    slid.clear()
    for prompt, ids in zip(prompts, got, strict=False):  # what was cut off is all that had no room
        assert generate.generate(model, [prompt], len(ids), temperature=0) == [ids]
    assert not any(slid)
    got = answer_ids(model, never_ends, prompts, most, 2, World())
    assert lab.measure.answers.room_lines(model, prompts, got, most) == [
        "2 answers end where the model's 16 positions do",
        "1 prompts fill the model's 16 positions: their beginnings drop out",
    ]
    assert len(got[3]) == most
    assert lab.measure.answers.room_lines(model, prompts[:1], got[:1], most) == []


def test_where_a_card_has_no_room_for_all_prompts_they_are_answered_in_halves(capfd):
    asked = []

    def write(prompts, most):
        asked.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[prompt[0]] * most for prompt in prompts]

    note.cache_clear()
    prompts = [[i] for i in range(7)]
    wanted = [[i] * 3 for i in range(7)]
    assert write_in_parts(write, prompts, 3, 9) == (wanted, 2)
    assert asked == [7, 4, 2, 2, 2, 1]
    assert "NOTE memory is too small to answer 7 prompts at once: 4 from here on" in capfd.readouterr().err
    asked.clear()
    assert write_in_parts(write, prompts, 3, 2) == (wanted, 2) and asked == [2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        write_in_parts(lambda prompts, most: write([[0]] * 3, most), prompts, 3, 2)


def test_where_even_one_prompt_has_no_room_it_is_one_line(monkeypatch):
    model = core.GPT(core.GPTConfig(100, block_size=16, n_layer=1, n_head=2, n_embd=8))

    def no_room(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lab.measure.answers, "generate", no_room)
    with pytest.raises(UserError, match=r"^out of memory with 2 rows of 7 tokens at once: use a smaller"):
        answer_ids(model, Numbers(), [[1, 2], [3]], 5, 2, World())


def test_as_many_prompts_at_once_as_the_free_memory_of_every_rank_holds(monkeypatch):
    config = core.GPTConfig(1000, block_size=256, n_layer=4, n_head=2, n_embd=64)
    model, free = core.GPT(config), 10**9
    card = SimpleNamespace(
        mem_get_info=lambda device: (free, 2 * free),
        memory_reserved=lambda device: 0,
        memory_allocated=lambda device: 0,
    )
    prompts, cpu = [[1] * 20, [1] * 100], World()
    assert rows_at_once(model, prompts, 50, cpu, 32, False) == 32
    assert rows_at_once(model, prompts, 50, replace(cpu, size=3), 32, False) == 96
    world = World(device=torch.device("xpu"))
    monkeypatch.setattr(torch, "xpu", card)
    assert rows_at_once(model, prompts, 50, world, 32, False) == lab.measure.answers.ROWS
    assert rows_at_once(model, prompts, 50, world, 32, True) == 32
    # bytes of a row's cache: places for 150 tokens, keys and values, layers, width, fp32
    cache = 256 * 2 * 4 * 64 * 4
    free = 40 * cache
    few = rows_at_once(model, prompts, 50, world, 32, False)
    assert 5 < few < 0.6 * 40
    monkeypatch.setattr(lab.measure.answers, "all_reduce_sum", lambda world, own: own + torch.tensor([0, 4]))
    assert rows_at_once(model, prompts, 50, replace(world, size=2), 32, False) == 2 * 4
    free = 1
    assert rows_at_once(model, prompts, 50, replace(world, size=2), 32, False) == 2
    assert rows_at_once(SimpleNamespace(config=SimpleNamespace()), prompts, 50, world, 32, False) == 32
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(memory_reserved=card.memory_reserved))
    assert rows_at_once(model, prompts, 50, world, 32, False) == 32  # the driver does not tell


def test_rows_whose_answer_has_no_word_do_not_count_among_first_words():
    data = by_hand(*[([i], [7]) for i in range(5)])
    data.texts = [["q", "", text] for text in ("Yes, it is.", "...", "no", "YES!", "")]
    train = core.Examples(data, np.array([0, 3, 2]), 9)
    run = SimpleNamespace(say=lambda line: None)
    figures = first_words(run, train, np.arange(5), ["yes", "...", "yes", "no", ""])
    assert figures["test/first_word"] == 1 / 3 and figures["test/first_word_guess"] == 2 / 3
    assert first_words(run, train, np.array([1, 4]), ["", "word"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["tuned", pytest.param("adapted", marks=pytest.mark.slow)])
def test_a_run_answers_what_it_is_asked(fixture, request, monkeypatch, capfd):
    _, folder = request.getfixturevalue(fixture)
    name = {"tuned": "run_instruct", "adapted": "run_lora"}[fixture]
    argv = ["--mode", "ask", "--run_folder", folder, "--max_new_tokens", 9]
    cfg, model, tokenizer = SCRIPTS[name].load_model(folder, World())
    questions = ["What does math.sin do?", "Explain os.path.join in a sentence."]
    texts = [instructions.prompt_text(question, "", cfg.template) for question in questions]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    expected = [lab.measure.answers.answers(model, tokenizer, [ids], 9, 1, World())[0] for ids in prompts]
    capfd.readouterr()
    SCRIPTS[name].main(config(name, *argv, "--prompt", f" {questions[0]} "), World())
    assert capfd.readouterr().out == f"{expected[0]}\n" and expected[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([questions[1], "", questions[0]])))
    SCRIPTS[name].main(config(name, *argv), World())
    assert capfd.readouterr().out == f"{expected[1]}\n{expected[0]}\n"


@pytest.mark.parametrize(
    ("name", "mode"), [("run_instruct", "ask"), ("run_lora", "ask"), ("run_lora", "export")]
)
def test_a_question_takes_one_process(name, mode):
    cfg = config(name, "--mode", mode, "--run_folder", "nowhere")
    for rank in (0, 1):
        with pytest.raises(UserError, match=f"--mode {mode} runs in one process: start it with python$"):
            SCRIPTS[name].main(cfg, World(rank=rank, size=2))
    assert not list(Path().iterdir())
