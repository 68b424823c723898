"""Generation: sampling, prompts of different lengths, contexts that slide, prompts typed by a person."""

import math
import sys

import torch

from lab.data.tokenizers import begin_ids, prompt_ids
from lab.errors import UserError
from lab.models.decoding import decoder_of
from lab.train.precision import Precision
from lab.train.processes import World


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=(), seed=0,
             begin=(), vocab_size=None, use_cache=True, decoder=None, poll=lambda: None):  # fmt: skip
    """Continues prompts (lists of ids, any lengths). Returns lists of ids, cut before the first id in `stop`.

    temperature 0 is greedy. Ids from `vocab_size` on (a padded vocabulary) are never chosen. Row i has its
    own generator, seeded by (seed, i). A full context slides: its later half is read again, behind `begin`.
    decoder: of decoding.decoder_of, where several calls share one.
    """
    size, device, rows = model.config.block_size, model.wte.weight.device, [list(p) for p in prompts]
    if not all(rows):
        raise UserError("a prompt has no token: give it some text")
    generators = [torch.Generator(device).manual_seed(seed * 1_000_003 + i) for i in range(len(rows))]
    first, ended, left, reads, ids = [0] * len(rows), [None] * len(rows), max_new_tokens, True, None
    decoder = decoder or decoder_of(model)

    def write():
        """The next id (B,) of each row."""
        nonlocal reads, ids
        if reads:
            seen = [in_context(row, start, begin) for row, start in zip(rows, first, strict=True)]
            input_ids, padding = left_padded(seen)
            capacity = min(size, input_ids.shape[1] + max_new_tokens)
            padding = None if padding is None else padding.to(device)
            logits, reads = decoder.read(input_ids.to(device), padding, capacity), not use_cache
        else:
            logits = decoder.step(ids)
        ids = choose(logits[:, :vocab_size], generators, temperature, top_k, top_p)
        return ids

    with decoder.ready(len(rows)):
        while left and None in ended:
            poll()
            if (length := longest(rows, first)) > size:
                windows = zip(rows, first, strict=True)
                first = [s if len(row) - s <= size else len(row) - (size + 1) // 2 for row, s in windows]
                length, reads = longest(rows, first), True  # a row slides when it is full itself, as alone
            n = min(left, decoder.at_once if use_cache else 1, size + 1 - length)
            left -= n
            for chosen in torch.stack([write() for _ in range(n)]).tolist():  # the one wait for a card
                for i, token in enumerate(chosen):
                    if token in stop and ended[i] is None:
                        ended[i] = len(rows[i])
                    rows[i].append(token)
    return [row[len(prompt) : end] for row, prompt, end in zip(rows, prompts, ended, strict=True)]


def longest(rows, first) -> int:
    """Tokens of the longest context: row i from first[i] on."""
    return max(len(row) - start for row, start in zip(rows, first, strict=True))


def in_context(row, start, begin) -> list[int]:
    """What is read of a row from `start` on: where it has slid, begin tokens stand first again."""
    return [*begin, *row[start + len(begin) :]] if start else row


def left_padded(rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids (B, T) padded on the left, padding of each row (B,), or None without any)"""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return input_ids, padding if padding.any() else None


def choose(logits, generators, temperature, top_k, top_p) -> torch.Tensor:
    """Next ids (B,) from logits (B, V): greedy, or drawn from what temperature, top_k and top_p leave."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    probs = logits.softmax(-1)
    if top_p and top_p < 1:  # the likeliest ids that together reach top_p
        ordered, ids = probs.sort(descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.scatter(1, ids, ordered.masked_fill(enough, 0))
    if probs.device.type != "cpu":
        return drawn(probs, generators)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)])


def drawn(probs, generators) -> torch.Tensor:
    """What torch.multinomial draws of each row, without its two waits for a card a row."""
    race = torch.empty_like(probs)
    for row, generator in zip(race, generators, strict=True):
        row.exponential_(generator=generator)
    return (probs / race).argmax(-1)


def continuations(model, tokenizer, cfg, prompts, max_new_tokens, seed, poll=lambda: None) -> list[str]:
    """Generates the text after each prompt, in the run's precision. An empty prompt is an end-of-text token:
    a new document begins."""
    ids = [prompt_ids(tokenizer, prompt) or [tokenizer.eos_token_id] for prompt in prompts]
    choice = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
    choice |= {"stop": stop_ids(tokenizer, cfg.stop), "seed": seed, "poll": poll}
    choice["begin"] = begin_ids(tokenizer)
    choice["vocab_size"] = len(tokenizer) - (tokenizer.unk_token_id == len(tokenizer) - 1)  # no <unk>
    with Precision(cfg.dtype, World(device=model.wte.weight.device)).generation():
        return [tokenizer.decode(row) for row in generate(model, ids, max_new_tokens, **choice)]


def stop_ids(tokenizer, stop) -> set[int]:
    """Ids that end a continuation: end-of-text, and the one token of `stop`, in which \\n and \\t are a
    newline and a tab. UserError where `stop` is not one token."""
    if stop is None:
        return {tokenizer.eos_token_id}
    text = stop.replace("\\n", "\n").replace("\\t", "\t")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"--stop {stop!r} is not one token that this tokenizer knows: use one that is")
    return {tokenizer.eos_token_id, ids[0]}


def prompt_notes(model, tokenizer, prompt) -> list[str]:
    """Lines on what of a prompt the model does not see."""
    ids, size, notes = prompt_ids(tokenizer, prompt), model.config.block_size, []
    if tokenizer.unk_token_id is not None and (unknown := ids.count(tokenizer.unk_token_id)):
        notes.append(f"({unknown} of {len(ids)} tokens of the prompt are unknown to this tokenizer)")
    if len(ids) > size:
        notes.append(
            f"(the prompt has {len(ids)} tokens: the last {(size + 1) // 2} count, block_size is {size})"
        )
    return notes


def prompt_loop(interactive):
    """Yields typed lines until Ctrl-D, Ctrl-C, or until nobody reads the answers."""
    while not getattr(sys.stdout, "is_dead", False):
        try:
            yield input("prompt> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return
