"""Rows of instruction, input and answer: template, token ids, splits, padded examples or packs."""

import functools
import hashlib
import itertools
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from lab.data.builtin import built_in_fingerprint, python_instructions
from lab.data.cache import BadRows, cached_rows, write_ids, write_texts
from lab.data.columns import INSTRUCTION_COLUMNS
from lab.data.split import split_by_group
from lab.data.tables import (
    MISSING_WORDS,
    columns_of,
    data_fingerprint,
    hub_split,
    read_rows,
    require_columns,
)
from lab.data.templates import (
    COLUMNS,
    Chat,
    as_texts,
    before_answer,
    end_id,
    messages_of,
    parse,
    prompt_text,
    user_turn,
)
from lab.data.tokenizers import (
    begin_facts,
    begin_ids,
    id_count,
    id_kind,
    make_tokenizer,
    named_tokenizer,
    tokenizer_fingerprint,
    tokenizer_of,
)
from lab.errors import UserError
from lab.train.device import to_device
from lab.train.loss import IGNORE_INDEX
from lab.train.processes import main_first, on_main, progress
from lab.train.waits import waiting

SHARES = {"train": 0.85, "test": 0.10, "val": 0.05}  # journal 001's, in the order in which it took them

TINY_VOCABULARY = 1024  # tokens of the vocabulary that tiny:gpt2 learns from the rows
KINDS = "a run of gpt_scratch.py, or tiny:gpt2 (built in)"  # what an error recommends instead of a name


@dataclass
class Instructions:
    """Tokenised rows: piece 2 i is the prompt of row i, piece 2 i + 1 its answer."""

    texts: list[list[str]]  # instruction, input, output
    categories: list[str | None]  # knowledge, creative ...: where rows have a column of that name
    numbers: np.ndarray  # of the rows in the file, from 1
    groups: np.ndarray  # hash of instruction and input: equal prompts stay together
    tokens: np.ndarray
    offsets: np.ndarray  # piece p is tokens[offsets[p] : offsets[p + 1]]
    tokenizer: object
    fingerprint: dict
    lines: list[str]  # what to tell the user about unusable rows
    # of template chat: rows of several turns as messages (else None), and [from, to) of earlier answers
    turns: list | None = field(default=None, kw_only=True)
    earlier: list | None = field(default=None, kw_only=True)

    def __len__(self):
        return len(self.texts)

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        return np.diff(self.offsets)[::2]

    @functools.cached_property
    def answer_lengths(self) -> np.ndarray:
        """Tokens, without the end token."""
        return np.diff(self.offsets)[1::2]

    @functools.cached_property
    def end(self) -> int:  # the end token of an answer
        return end_id(self.tokenizer, self.fingerprint.get("template"))

    @functools.cached_property
    def first_targets(self) -> np.ndarray:
        """Tokens before the first that is learnt."""
        if self.earlier is None:
            return self.prompt_lengths
        pairs = zip(self.earlier, self.prompt_lengths.tolist(), strict=True)
        return np.array([some[0][0] if some else prompt for some, prompt in pairs])

    def learnt_before(self, row, most) -> list[tuple[int, int]]:
        """[from, to) of what is learnt of the prompt of a row that is cut at `most` tokens."""
        some = self.earlier[row] if self.earlier else []
        return [(start, min(end, most)) for start, end in some if start < most]

    def learnt_bytes(self, row) -> int:
        """UTF-8 bytes of the answers that are learnt of a whole row."""
        texts = [self.texts[row][2]]
        if self.earlier and self.earlier[row]:
            texts = [turn["content"] for turn in self.turns[row] if turn["role"] == "assistant"]
        return sum(len(text.encode()) for text in texts)

    def columns(self, row) -> dict[str, str]:
        """A row as responses.json holds it."""
        named = dict(zip(INSTRUCTION_COLUMNS, self.texts[row], strict=True))
        named |= {"messages": self.turns[row]} if self.turns and self.turns[row] else {}
        return named | ({"category": self.categories[row]} if self.categories[row] else {})

    def prompt(self, row) -> list[int]:
        return self.tokens[self.offsets[2 * row] : self.offsets[2 * row + 1]].tolist()

    def whole(self, row) -> list[int]:
        """Prompt, answer, end token."""
        ids = self.tokens[self.offsets[2 * row] : self.offsets[2 * row + 2]].tolist()
        return [*ids, self.end]


def load_instructions(cfg, world, tokenizer=None) -> Instructions:
    """The rows of cfg.data, tokenised once by rank 0 into the cache, read from there by every rank.

    `tokenizer`: none is that of cfg.model; of tiny:gpt2 it is made of the rows.
    """
    on_main(world, hub_split, cfg.data)  # a mistyped file must not wait for a tokenizer
    name = tokenizer_of(cfg.model)
    if not tokenizer and not cfg.model.startswith("tiny:"):
        tokenizer = main_first(world, named_tokenizer, name, KINDS)
    if cfg.template == "chat" and not tokenizer:
        raise UserError(f"--template chat: {cfg.model} has no chat template: use --template alpaca")
    rows = cached_rows(world, "instructions", instructions_key, write_instructions, cfg, tokenizer)
    return Instructions(
        texts=rows.columns["texts"],
        categories=rows.columns["categories"],
        numbers=np.array(rows.columns["numbers"]),
        groups=np.array(rows.columns["groups"]),
        tokens=rows.tokens,
        offsets=rows.offsets,
        tokenizer=tokenizer or named_tokenizer(str(rows.folder / "tokenizer")),
        fingerprint=rows.fingerprint,
        lines=rows.columns["lines"],
        turns=rows.columns.get("turns"),
        earlier=rows.columns.get("earlier"),
    )


def instructions_key(cfg, tokenizer) -> dict:
    """All that the cached rows depend on."""
    builtin = cfg.data == "python-instructions"
    source = built_in_fingerprint(cfg.data) if builtin else data_fingerprint(cfg.data)
    words = tokenizer_fingerprint(tokenizer) if tokenizer else f"bpe:{TINY_VOCABULARY}"
    fingerprint = {"data": source, "tokenizer": words, "template": cfg.template}
    fingerprint |= begin_facts(tokenizer) if tokenizer else {}
    fingerprint |= Chat(tokenizer).facts() if cfg.template == "chat" else {}
    name = cfg.data if builtin else ""  # a file may be moved
    return {"fingerprint": fingerprint, "built in": name, "max_documents": cfg.max_documents}


def write_instructions(folder, cfg, tokenizer) -> dict:
    """Usable rows -> token ids and tokenizer in `folder`; gives the columns to keep."""
    builtin = cfg.data == "python-instructions"
    rows = python_instructions() if builtin else read_rows(cfg.data, cfg.max_documents)
    if cfg.template == "chat":
        return write_chat(folder, rows[: cfg.max_documents], cfg.data, tokenizer)
    columns = usable_columns(rows[: cfg.max_documents], cfg.data)
    pieces = [[prompt_text(a, b, cfg.template), output] for a, b, output in columns["texts"]]
    pieces = list(itertools.chain.from_iterable(pieces))
    tokenizer = tokenizer or make_tokenizer(f"bpe:{TINY_VOCABULARY}", lambda: pieces)
    columns["integers"] = write_texts(folder, pieces, tokenizer, begin_ids(tokenizer), every=2)
    tokenizer.save_pretrained(folder / "tokenizer")
    return columns


def write_chat(folder, rows, name, tokenizer) -> dict:
    """The same under the tokenizer's chat template: rows of messages, or of instruction, input and output."""
    chat, found, pieces = Chat(tokenizer), [], []

    def read(row):
        bar.update()
        given = messages_of(row)
        texts = as_texts(given) if given else parse(row)
        messages = given or [user_turn(*texts[:2]), {"role": "assistant", "content": texts[2]}]
        prompt, answer, earlier, rewritten = chat.conversation(messages)
        pieces.extend(np.array(ids, dtype=np.uint32) for ids in (prompt, answer))
        found.append((given if len(messages) > 2 else None, earlier, rewritten, messages))
        return texts

    with progress(len(rows), "rendering") as bar:
        columns = usable_columns(rows, name, read)
    turns, earlier, rewritten, messages = zip(*found, strict=True)
    if number := sum(rewritten):
        said = f"of {number} row(s) only the last answer is learnt: the chat template writes "
        columns["lines"].append(said + "their earlier answers otherwise than the last")
    firsts = [before_answer(each)[: 1 + (each[0]["role"] == "system")] for each in messages]
    columns["groups"] = [prompt_hash(*as_texts(first)[:2]) for first in firsts]  # of what begins alike
    columns |= {"turns": turns, "earlier": earlier, "integers": id_kind(tokenizer)}
    write_ids(folder, pieces, columns["integers"], len(pieces))
    tokenizer.save_pretrained(folder / "tokenizer")
    return columns


def usable_columns(rows, name, read=parse) -> dict[str, list]:
    """Texts, categories, numbers and groups of the usable rows; `lines` count and name the others.
    read(row): its three texts. ValueError names the fault."""
    if not {*COLUMNS} & {*columns_of(rows)}:
        require_columns(rows, ("instruction", "output"), name)  # input may be left out
    bad, texts, numbers, categories = BadRows(), [], [], []
    for number, row in enumerate(rows, start=1):
        try:
            texts.append(read(row))
            numbers.append(number)
            categories.append(category(row.get("category")))
        except ValueError as error:
            bad.add(number, error)
    lines = bad.report(len(rows), name)
    if empty := sum(not output for _, _, output in texts):
        lines.append(f"{empty} empty answer(s) are kept: their target is the end token")
    groups = [prompt_hash(instruction, given) for instruction, given, _ in texts]
    return {"texts": texts, "categories": categories, "numbers": numbers, "groups": groups, "lines": lines}


def category(cell) -> str | None:
    """A row's kind as text that every file can hold; None if it has none."""
    text = "" if cell is None else str(cell).encode("utf-8", "backslashreplace").decode()
    return None if text.strip() in MISSING_WORDS else text


def prompt_hash(instruction, given) -> str:
    """Prompts that differ in case and white space only share it."""
    text = "\n".join(" ".join(part.lower().split()) for part in (instruction, given))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split(data, cfg) -> tuple[dict[str, np.ndarray], list[str]]:
    """Row numbers of train, test and val, and what to say of them. Rows whose prompt leaves no room for a
    target within max_length are left out.

    file_order: the first 85 %, the next 10 % and the rest, as the journal; seeded: prompts drawn whole.
    """
    n = len(data)
    if cfg.split == "file_order":
        ends = np.cumsum([0, *(int(n * share) for share in (SHARES["train"], SHARES["test"])), n])
        parts = {name: np.arange(ends[i], min(n, ends[i + 1])) for i, name in enumerate(SHARES)}
    else:
        drawn = split_by_group(data.groups, np.zeros(n), list(SHARES.values()), cfg.split_seed)
        parts = {name: np.flatnonzero(drawn == i) for i, name in enumerate(SHARES)}
    first = 1 if cfg.loss_on_prompt else data.first_targets  # tokens before the first target
    fits = np.minimum(data.prompt_lengths + data.answer_lengths + 1, cfg.max_length) > first
    parts = {name: rows[fits[rows]] for name, rows in parts.items()}
    if not fits.any():
        raise UserError(
            f"the prompts of all {n} rows fill {cfg.max_length} tokens: use a larger --max_length"
        )
    if empty := [name for name, rows in parts.items() if not len(rows)]:
        raise UserError(
            f"{cfg.data} leaves no {empty[0]} rows of {n}: use more rows or a larger --max_length"
        )
    lines, room = [], f"{cfg.max_length} tokens"
    if cut := int((fits & (data.prompt_lengths + data.answer_lengths + 1 > cfg.max_length)).sum()):
        lines.append(f"{cut} row(s) are cut at {room}: they lose the end of the answer and its end token")
    if left := int((~fits).sum()):
        lines.append(f"{left} row(s) are left out: their prompts alone fill {room}")
    return parts, [*lines, *lines_on_known(data, parts, "prompt")]


def lines_on_known(data, parts, what) -> list[str]:
    """A line for each held-out part in which rows have a prompt that training rows have; `what`: its name."""
    known, lines = set(data.groups[parts["train"]]), []
    for name, rows in parts.items():
        if name != "train" and (seen := sum(group in known for group in data.groups[rows])):
            lines.append(f"{seen} of {len(rows)} {name} rows have a {what} that training rows have, too")
    return lines


class Examples:
    """Rows as a language model reads them: prompt, answer, end token, cut at max_length tokens.

    The next token is the target, that of a prompt only if loss_on_prompt says so.
    """

    def __init__(self, data, rows, max_length, loss_on_prompt=False):
        self.data, self.rows, self.max_length, self.loss_on_prompt = data, rows, max_length, loss_on_prompt
        self.lengths = np.minimum(data.prompt_lengths[rows] + data.answer_lengths[rows] + 1, max_length) - 1

    def __len__(self):
        return len(self.rows)

    def masked(self, examples) -> np.ndarray:
        """How many leading inputs of each predict nothing that counts."""
        prompts = self.data.prompt_lengths[self.rows[np.asarray(examples, dtype=int)]]
        return np.where(self.loss_on_prompt, 0, prompts - 1)

    def earlier(self, example) -> list[tuple[int, int]]:
        """[from, to) of the ids of answers before the last one that are targets, too."""
        return [] if self.loss_on_prompt else self.data.learnt_before(self.rows[example], self.max_length)

    def targets(self, examples) -> np.ndarray:
        examples = np.asarray(examples, dtype=int)
        counts = self.lengths[examples] - self.masked(examples)
        if self.data.earlier:
            before = [sum(end - start for start, end in self.earlier(example)) for example in examples]
            counts = np.maximum(counts, 0) + np.array(before, dtype=int)
        return counts

    def pair(self, example) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of an example, equally long."""
        ids, masked = self.data.whole(self.rows[example])[: self.max_length], int(self.masked([example])[0])
        labels = [IGNORE_INDEX] * min(masked, len(ids) - 1) + ids[1 + masked :]
        for start, end in self.earlier(example):
            labels[start - 1 : end - 1] = ids[start:end]
        return ids[:-1], labels

    @waiting("data")
    def batch(self, examples, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, T), padded on the right, where none looks; labels on the host."""
        pairs = [self.pair(example) for example in examples]
        shape = len(pairs), max(len(ids) for ids, _ in pairs)
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
        for row, (ids, wanted) in enumerate(pairs):
            input_ids[row, : len(ids)], labels[row, : len(ids)] = torch.tensor(ids), torch.tensor(wanted)
        return to_device(input_ids, device), labels

    def target_ids(self) -> list[np.ndarray]:
        """The target ids of each example."""
        labels = (np.array(self.pair(i)[1]) for i in range(len(self)))
        return [each[each != IGNORE_INDEX] for each in labels]

    @functools.cached_property
    def log_frequencies(self) -> np.ndarray:
        """(V,): how often each token is a target here, one more of each, as log shares."""
        ids = np.concatenate(self.target_ids())
        counts = np.bincount(ids, minlength=id_count(self.data.tokenizer)) + 1
        return np.log(counts / counts.sum())

    def some(self, n):
        """`n` of them, spread evenly; none: all."""
        chosen = np.linspace(0, len(self) - 1, min(n or len(self), len(self))).round().astype(int)
        return Examples(self.data, self.rows[chosen], self.max_length, self.loss_on_prompt)

    def members(self, units) -> list[int]:
        """The examples that a batch of units holds: here a unit is an example."""
        return list(units)


class Packs:
    """Examples side by side in packs of at most `length` tokens (best fit, longest first); none sees another.

    A pack is one unit of a batch, and the same one in every epoch.
    """

    def __init__(self, examples, length):
        self.examples, self.packs, room = examples, [], defaultdict(list)  # room: packs by tokens left
        for example in np.argsort(-examples.lengths, kind="stable").tolist():
            size = int(examples.lengths[example])
            left = next((n for n in range(size, length + 1) if room[n]), None)
            pack = len(self.packs) if left is None else room[left].pop()
            if left is None:
                self.packs.append([])
            self.packs[pack].append(example)
            room[(length if left is None else left) - size].append(pack)
        self.lengths = np.array([examples.lengths[pack].sum() for pack in self.packs])

    def __len__(self):
        return len(self.packs)

    def targets(self, packs) -> np.ndarray:
        return np.array([self.examples.targets(self.packs[pack]).sum() for pack in packs], dtype=int)

    @waiting("data")
    def batch(self, packs, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, segments), all (B, T); the segment of padding is -1. The last two stay on the
        host."""
        shape = len(packs), int(self.lengths[list(packs)].max())
        both = torch.zeros(*shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
        segments = torch.full(shape, -1)
        for i, pack in enumerate(packs):
            start = 0
            for number, example in enumerate(self.packs[pack]):
                pair = self.examples.pair(example)
                end = start + len(pair[0])
                for tensor, values in zip(both, pair, strict=True):
                    tensor[i, start:end] = torch.tensor(values)
                segments[i, start:end], start = number, end
        return to_device(both[0], device), both[1], segments

    def members(self, units) -> list[int]:
        return [example for unit in units for example in self.packs[unit]]


def examples_of(data, cfg) -> tuple[dict[str, Examples], list[str]]:
    """The parts of `split` as a model reads them, and what to say of their rows."""
    rows, lines = split(data, cfg)
    return {
        name: Examples(data, some, cfg.max_length, cfg.loss_on_prompt) for name, some in rows.items()
    }, lines
