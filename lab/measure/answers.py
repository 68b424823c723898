"""Answers of a tuned model: to fixed prompts, to the test rows, to a person."""

import functools
import re
import sys
from collections import Counter

import numpy as np
import torch

from lab.data.templates import Chat, end_id, question_ids
from lab.data.tokenizers import begin_ids, id_count
from lab.errors import UserError
from lab.measure.statistics import bootstrap, plus_minus
from lab.models.decoding import ROUND_TO, decoder_of, note
from lab.models.generate import generate, prompt_loop
from lab.run.files import write_json
from lab.run.terminal import one_line
from lab.train.batches import ShardedBatches, within_memory
from lab.train.device import free_bytes
from lab.train.precision import Precision
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


def answers(model, tokenizer, prompts, max_new_tokens, batch, world, poll=lambda active: 0,
            template="alpaca") -> list[str]:  # fmt: skip
    """Answers prompts (lists of ids) greedily, in batches over all ranks. Every rank gets all texts."""
    texts = answer_ids(model, tokenizer, prompts, max_new_tokens, batch, world, poll, template)
    return said(tokenizer, texts, template)


def said(tokenizer, answers, template) -> list[str]:
    """The texts of answers (ids), without what a chat template writes before each."""
    decode = Chat(tokenizer).said if template == "chat" else lambda ids: tokenizer.decode(ids).strip()
    return [decode(ids) for ids in answers]


def answer_ids(model, tokenizer, prompts, max_new_tokens, batch, world, poll=lambda active: 0,
               template="alpaca") -> list:  # fmt: skip
    """The same as tensors of ids, up to the end token that was learnt, or the tokenizer's own.

    All ranks call `poll(active)` equally often: one that is done calls poll(0) until the sum is 0.
    """
    rooms = [room(model, prompt, max_new_tokens) for prompt in prompts]
    # id + 1; a sum over ranks is a gather
    written = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)
    batches, at_once = ShardedBatches([len(ids) for ids in prompts], batch, world), batch
    how = {"temperature": 0, "vocab_size": id_count(tokenizer), "begin": begin_ids(tokenizer)}
    how["stop"] = {tokenizer.eos_token_id, end_id(tokenizer, template)}
    write = functools.partial(writer(model), **how, poll=lambda: poll(1))
    with progress(len(batches), "answering", world) as bar:
        for step in range(len(batches)):
            if mine := batches.rank_batch(step):
                chosen, most = [prompts[i] for i in mine], max(rooms[i] for i in mine)
                with within_memory(len(chosen), max(map(len, chosen)) + most):
                    rows, at_once = write_in_parts(write, chosen, most, at_once)
                for i, ids in zip(mine, rows, strict=True):
                    ids = torch.tensor(ids[: rooms[i]], dtype=torch.int64)
                    written[i, : len(ids)] = ids + 1
            while poll(0):
                pass
            bar.update()
    written = all_reduce_sum(world, written)
    return [ids[ids > 0] - 1 for ids in written]


def writer(model):
    """What continues prompts greedily: transformers, or one decoder of ours for all calls."""
    theirs = getattr(model, "continuations", None)
    return theirs or functools.partial(generate, model, decoder=decoder_of(model))


def write_in_parts(write, prompts, most, at_once) -> tuple[list, int]:
    """(ids after each prompt, how many prompts a card's memory held at once: `at_once`, or halves of it)"""
    rows = []
    while part := prompts[len(rows) : len(rows) + at_once]:
        try:
            rows += write(part, most)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            at_once = (len(part) + 1) // 2
            note(f"memory is too small to answer {len(part)} prompts at once: {at_once} from here on")
    return rows, at_once


ROWS = 256  # at once on a card, which takes about as long for a token of each as of 32
SHARE = 0.6  # of free memory: fragments, and what is not counted


def rows_at_once(model, prompts, most, world, eval_batch, typed) -> int:
    """Prompts to answer at once, over all ranks: eval_batch on each. On a card as many as its free memory
    holds, unless eval_batch was typed: the most that all ranks can. Inside Precision.generation."""
    shape, kind = model.config, world.device.type
    if kind == "cpu" or typed or not hasattr(shape, "n_layer"):
        return eval_batch * world.size
    size = 2 if torch.is_autocast_enabled(kind) else model.wte.weight.element_size()  # bytes
    longest = max(map(len, prompts), default=0) + most
    length = min(-(-longest // ROUND_TO) * ROUND_TO, shape.block_size)  # of the cache
    cache = 2 * shape.n_layer * shape.qkv_sizes[1]  # keys and values
    token = (cache + 16 * shape.n_embd) * size + 4 * length  # cache, one block's work, mask
    row = length * token + 12 * shape.vocab_size
    free, mine = free_bytes(world.device), torch.zeros(world.size, dtype=torch.int64)
    mine[world.rank] = eval_batch if free is None else max(1, min(ROWS, int(SHARE * free / row)))
    return int(all_reduce_sum(world, mine).min()) * world.size


def sample(run, cfg, step, model, tokenizer, poll):
    """Answers the fixed prompts: all to samples.jsonl and TensorBoard, one of them
    in turn to the terminal."""
    if cfg.sample_tokens:
        prompts = [question_ids(tokenizer, text, "", cfg.template) for text in PROMPTS]
        how = cfg.sample_tokens, len(prompts), run.world, poll, cfg.template
        with Precision(cfg.dtype, run.world).generation():
            texts = answers(model, tokenizer, prompts, *how)
        run.samples(step, [f"{text}\n{answer}" for text, answer in zip(PROMPTS, texts, strict=True)])
        turn = run.state["asked"] = (run.state.get("asked", -1) + 1) % len(PROMPTS)
        run.say(f"  | {PROMPTS[turn]} -> {shortened(one_line(texts[turn]), 90 - len(PROMPTS[turn]))}")


def write_responses(run, cfg, parts, model) -> dict:
    """Writes responses.json as the journal has it: each test row with its model_response. Returns figures."""
    test = parts["test"].some(cfg.answer_rows)
    data = test.data
    prompts, most = [data.prompt(row) for row in test.rows], cfg.max_new_tokens
    with Precision(cfg.dtype, run.world).generation():
        typed = "eval_batch" in cfg.typed.flags
        batch = rows_at_once(model, prompts, most, run.world, cfg.eval_batch, typed)
        ids = answer_ids(model, data.tokenizer, prompts, most, batch, run.world, run.poll, cfg.template)
    texts = said(data.tokenizer, ids, cfg.template)
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
    interactive, world = cfg.prompt is None and sys.stdin.isatty(), World(device=model.wte.weight.device)
    for text in [cfg.prompt] if cfg.prompt is not None else prompt_loop(interactive):
        if text.strip():
            try:
                ids, most = question_ids(tokenizer, text.strip(), "", cfg.template), cfg.max_new_tokens
            except UserError as error:
                if not interactive:
                    raise
                print(error)  # the next line may be a better one
                continue
            if len(ids) > (size := model.config.block_size):
                note(f"{len(ids)} tokens, of which the model holds {size}: the beginning is not read")
            with Precision(cfg.dtype, world).generation():
                print(*answers(model, tokenizer, [ids], most, 1, world, template=cfg.template))
