"""Answers of a tuned model: to fixed prompts, to the test rows, to a person."""

import functools
import re
import sys
from collections import Counter

import numpy as np
import torch

from lab.data.instructions import prompt_text
from lab.data.tokenizers import begin_ids, id_count, prompt_ids
from lab.measure.statistics import bootstrap, plus_minus
from lab.models.generate import generate, prompt_loop
from lab.run.files import write_json
from lab.run.terminal import one_line
from lab.train.batches import ShardedBatches, within_memory
from lab.train.processes import World, all_reduce_sum, progress


def shortened(text, width=88) -> str:
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


PROMPTS = (  # answered at every evaluation; the first three and the last are journal 001's questions
    "Suggest an alternate word for 'happy'.",
    "What is the correct spelling of 'freind'?",
    "How many meters are 4 kilometers?",
    "Write a tweet about the first day of spring.",
    "Translate into French: 'Good morning, how are you?'",
)


def room(model, prompt, most) -> int:
    """Tokens that an answer may have: `most`, or as many as fit behind the prompt into the model's positions.
    A prompt that fills these alone slides out of them."""
    left = model.config.block_size - len(prompt)
    return min(most, left) if left > 0 else most


def room_lines(model, prompts, texts, most) -> list[str]:
    """Lines on answers (lists of ids) that end where the model's positions do, and on prompts over these."""
    size = model.config.block_size
    over = sum(len(prompt) >= size for prompt in prompts)
    rooms = [room(model, prompt, most) for prompt in prompts]
    cut = sum(len(ids) == fits < most for ids, fits in zip(texts, rooms, strict=True))
    lines = [f"{cut} answers end where the model's {size} positions do"] if cut else []
    if over:
        lines.append(f"{over} prompts fill the model's {size} positions: their beginnings drop out")
    return lines


def answers(model, tokenizer, prompts, max_new_tokens, batch, world, poll=lambda active: 0) -> list[str]:
    """Answers prompts (lists of ids) greedily, in batches over all ranks. Every rank gets all texts."""
    texts = answer_ids(model, tokenizer, prompts, max_new_tokens, batch, world, poll)
    return [tokenizer.decode(ids).strip() for ids in texts]


def answer_ids(model, tokenizer, prompts, max_new_tokens, batch, world, poll=lambda active: 0) -> list:
    """The same as tensors of ids.

    All ranks call `poll(active)` equally often: one that is done calls poll(0) until the sum is 0.
    """
    rooms = [room(model, prompt, max_new_tokens) for prompt in prompts]
    # id + 1; a sum over ranks is a gather
    written = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)
    batches = ShardedBatches([len(ids) for ids in prompts], batch, world)
    how = {"temperature": 0, "stop": {tokenizer.eos_token_id}, "vocab_size": id_count(tokenizer)}
    how["begin"] = begin_ids(tokenizer)
    write = getattr(model, "continuations", None) or functools.partial(generate, model)
    with progress(len(batches), "answering", world) as bar:
        for step in range(len(batches)):
            if mine := batches.rank_batch(step):
                chosen, most = [prompts[i] for i in mine], max(rooms[i] for i in mine)
                with within_memory(len(chosen), max(map(len, chosen)) + most):
                    rows = write(chosen, most, **how, poll=lambda: poll(1))
                for i, ids in zip(mine, rows, strict=True):
                    ids = torch.tensor(ids[: rooms[i]], dtype=torch.int64)
                    written[i, : len(ids)] = ids + 1
            while poll(0):
                pass
            bar.update()
    written = all_reduce_sum(world, written)
    return [ids[ids > 0] - 1 for ids in written]


def sample(run, cfg, step, model, tokenizer, poll):
    """Answers the fixed prompts: all to samples.jsonl and TensorBoard, one of them
    in turn to the terminal."""
    if cfg.sample_tokens:
        prompts = [prompt_ids(tokenizer, prompt_text(text, "", cfg.template)) for text in PROMPTS]
        texts = answers(model, tokenizer, prompts, cfg.sample_tokens, len(prompts), run.world, poll)
        run.samples(step, [f"{text}\n{answer}" for text, answer in zip(PROMPTS, texts, strict=True)])
        turn = run.state["asked"] = (run.state.get("asked", -1) + 1) % len(PROMPTS)
        run.say(f"  | {PROMPTS[turn]} -> {shortened(one_line(texts[turn]), 90 - len(PROMPTS[turn]))}")


def write_responses(run, cfg, parts, model) -> dict:
    """Writes responses.json as the journal has it: each test row with its model_response. Returns figures."""
    test = parts["test"].some(cfg.answer_rows)
    data = test.data
    prompts, most = [data.prompt(row) for row in test.rows], cfg.max_new_tokens
    batch = cfg.eval_batch * run.world.size
    ids = answer_ids(model, data.tokenizer, prompts, most, batch, run.world, run.poll)
    texts = [data.tokenizer.decode(each).strip() for each in ids]
    rows = [data.columns(row) | {"model_response": text} for row, text in zip(test.rows, texts, strict=True)]
    if run.world.is_main:
        write_json(run.folder / "responses.json", rows)
    empty = sum(not text for text in texts)
    run.say(f"answers  {len(rows)} in responses.json, {empty} empty")
    for line in room_lines(model, prompts, ids, most):
        run.say(f"answers  {line}")
    return first_words(run, parts["train"], test.rows, texts) | {"test/empty_responses": empty}


def first_words(run, train, rows, texts) -> dict:
    """Share of answers whose first word is right, beside that of always saying the training answers' most
    frequent first word."""
    data = train.data
    usual, _ = Counter(first_word(data.texts[row][2]) for row in train.rows).most_common(1)[0]
    wanted = [first_word(data.texts[row][2]) for row in rows]
    counted = [i for i, word in enumerate(wanted) if word]  # some answers are signs only
    if not counted:
        return {}
    right = np.array([[first_word(texts[i]) == wanted[i], usual == wanted[i]] for i in counted])
    interval = bootstrap(right, data.groups[rows][counted]).tolist()[0]
    share, guess = right.mean(0).tolist()
    figure = plus_minus(share, interval)
    run.say(f"answers  first word right in {figure}; always '{usual}' would be right in {guess:.3f}")
    names = {"first_word": share, "first_word_interval": interval, "first_word_guess": guess}
    return {f"test/{name}": value for name, value in names.items()}


def first_word(text) -> str:
    """The first word in lower case, without signs; empty if there is none."""
    return next(iter(re.findall(r"\w+", text.lower())), "")


def ask(model, tokenizer, cfg):
    """Mode ask: answers --prompt, or each typed line, in the template of the tuning."""
    interactive = cfg.prompt is None and sys.stdin.isatty()
    for text in [cfg.prompt] if cfg.prompt is not None else prompt_loop(interactive):
        if text.strip():
            ids = prompt_ids(tokenizer, prompt_text(text.strip(), "", cfg.template))
            print(answers(model, tokenizer, [ids], cfg.max_new_tokens, 1, World())[0])
