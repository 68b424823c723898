"""Rows of a prompt with two responses, in the columns of LMSYS Arena: reading, token cache, splits, and what
of a row an encoder gets to see."""

import functools
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab.data.builtin import built_in_fingerprint, python_pairs
from lab.data.cache import BadRows, cached_rows, is_clean, write_texts
from lab.data.columns import LABELS, PAIR_COLUMNS, TEXTS
from lab.data.split import split_by_group
from lab.data.tables import data_fingerprint, hub_split, read_rows, require_columns
from lab.data.tokenizers import encoder_tokenizer, marks_of, tokenizer_fingerprint, tokenizer_of
from lab.errors import UserError
from lab.train.device import to_device
from lab.train.processes import main_first, on_main
from lab.train.waits import waiting

UNKNOWN = -1  # label of a row that is to be judged


def turns(row, column) -> list[str]:
    """One cell: a JSON list of strings, one per turn, null for an empty one. ValueError names the fault."""
    cell = row.get(column)
    if cell is None or cell == "":
        raise ValueError(f"{column} is empty")
    try:
        texts = json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        raise ValueError(f'{column} is no JSON (a text is written ["text"])') from None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str | None) for t in texts):
        raise ValueError(f"{column} is no list of strings")
    if not all(is_clean(text or "") for text in texts):
        raise ValueError(f"{column} has odd Unicode (a lone surrogate)")
    return [text or "" for text in texts]


def winner(row) -> int:
    """Class number in the order of LABELS."""
    flags = [str(row.get(column)).strip().lower() in ("1", "1.0", "true") for column in LABELS.values()]
    if sum(flags) != 1:
        raise ValueError("no winner" if not any(flags) else "several winners")
    return flags.index(True)


def parse(row) -> tuple[list[list[str]], int]:
    """([prompt, a, b] of every turn, class number)"""
    if not isinstance(row, dict) or row.get("id") is None:
        raise ValueError("no id")
    if not is_clean(str(row["id"])):
        raise ValueError("id has odd Unicode (a lone surrogate)")
    texts = [turns(row, column) for column in TEXTS]
    if len({len(text) for text in texts}) != 1:
        raise ValueError("prompt and responses differ in their number of turns")
    return [list(turn) for turn in zip(*texts, strict=True)], winner(row)


def parse_anyway(row) -> tuple[list[list[str]], str | None]:
    """([prompt, a, b] of every turn, what was odd) of a row that must be judged whatever its cells hold."""
    texts, odd = [], None
    for column in TEXTS:
        try:
            texts.append(turns(row, column))
        except ValueError as error:
            cell, odd = row.get(column), str(error)
            text = "" if cell is None else str(cell)
            texts.append([text.encode("utf-8", "replace").decode()])
    longest = max(map(len, texts))
    if len({len(text) for text in texts}) != 1:
        odd = odd or "prompt and responses differ in their number of turns"
    padded = [text + [""] * (longest - len(text)) for text in texts]
    return [list(turn) for turn in zip(*padded, strict=True)], odd


def prompt_hash(row_turns) -> str:
    """Rows whose prompts differ in case and white space only share it."""
    text = "\n".join(" ".join(prompt.lower().split()) for prompt, _, _ in row_turns)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Preferences:
    """Tokenised rows. Row i has pieces first[i] to first[i + 1]: prompt, A, B of turn 1, of turn 2, ..."""

    ids: list[str]
    groups: np.ndarray  # hash of the prompt: rows of one prompt stay together
    labels: np.ndarray  # class numbers, UNKNOWN in rows that are to be judged
    first: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray  # piece p is tokens[offsets[p] : offsets[p + 1]]
    tokenizer: object
    folder: Path  # where all this is cached
    fingerprint: dict
    lines: list[str]  # what to tell the user about odd rows
    lengths: np.ndarray | None = None  # (N, 2) tokens of sequences 1 and 2; set by measure_sequences, like
    cut: np.ndarray | None = None  # (N, 3) whether prompt, A, B lost tokens
    vectors: np.ndarray | None = None  # (N, 2, h) of a frozen encoder; set by cache_vectors

    @functools.cached_property
    def marks(self) -> tuple[list[int], int]:
        """(ids in front of a sequence, id behind each piece)"""
        return marks_of(self.tokenizer)

    def truncated(self) -> dict[str, float]:
        """Share of rows in which prompt, A or B lost tokens."""
        return dict(zip(TEXTS, self.cut.mean(0).tolist(), strict=True))

    def response_lengths(self) -> np.ndarray:
        """(N, 2) tokens of A and of B over all turns, before any cut."""
        sizes = np.diff(self.offsets).reshape(-1, 3)[:, 1:]
        return np.add.reduceat(sizes, self.first[:-1] // 3, axis=0) if len(sizes) else sizes


def load_pairs(cfg, world, tokenizer=None) -> Preferences:
    """The rows of cfg.data, tokenised once by rank 0 into the cache, read from there by every rank.

    `tokenizer`: none is that of cfg.model.
    """
    on_main(world, hub_split, cfg.data)  # a mistyped file must not wait for a tokenizer
    # a tiny model's tokenizer is made of the rows' words
    if not tokenizer and not cfg.model.startswith("tiny:"):
        tokenizer = main_first(world, encoder_tokenizer, tokenizer_of(cfg.model))
    rows = cached_rows(world, "preference", pairs_key, write_pairs, cfg, tokenizer)
    return as_preferences(rows, tokenizer)


def load_unlabelled(name, tokenizer, world) -> Preferences:
    """Every row of a file to be judged (in a zip: of test.csv), in its order, whatever its cells hold."""
    rows = cached_rows(world, "unlabelled", unlabelled_key, write_unlabelled, name, tokenizer)
    return as_preferences(rows, tokenizer)


def as_preferences(rows, tokenizer) -> Preferences:
    """Makes Preferences of cached rows; without a tokenizer, the one cached beside them is read."""
    return Preferences(
        ids=rows.columns["ids"],
        groups=np.array(rows.columns["groups"]),
        labels=np.array(rows.columns["labels"], dtype=np.int64),
        first=np.concatenate([[0], np.cumsum(rows.columns["pieces"])]).astype(np.int64),
        tokens=rows.tokens,
        offsets=rows.offsets,
        tokenizer=tokenizer or encoder_tokenizer(str(rows.folder / "tokenizer")),
        folder=rows.folder,
        fingerprint=rows.fingerprint,
        lines=rows.columns["lines"],
    )


def pairs_key(cfg, tokenizer) -> dict:
    """All that the cached rows depend on."""
    builtin = cfg.data == "python-pairs"
    source = built_in_fingerprint(cfg.data) if builtin else data_fingerprint(cfg.data)
    words = tokenizer_fingerprint(tokenizer) if tokenizer else "words"
    return {"fingerprint": {"data": source, "tokenizer": words}, "max_documents": cfg.max_documents}


def unlabelled_key(name, tokenizer) -> dict:
    words = tokenizer_fingerprint(tokenizer) if tokenizer else "words"
    return {"fingerprint": {"data": data_fingerprint(name, "test"), "tokenizer": words}}


def write_pairs(folder, cfg, tokenizer) -> dict:
    """Usable rows with a winner -> token ids and tokenizer in `folder`; gives the columns to keep."""
    rows = python_pairs() if cfg.data == "python-pairs" else read_rows(cfg.data, cfg.max_documents)
    rows = rows[: cfg.max_documents]
    require_columns(rows, PAIR_COLUMNS, cfg.data)
    usable, lines = usable_rows(rows, cfg.data)
    return write_usable(folder, usable, lines, tokenizer)


def write_unlabelled(folder, name, tokenizer) -> dict:
    """Every row of a file to be judged -> token ids and tokenizer in `folder`; gives the columns to keep."""
    rows = read_rows(name, prefer="test")
    require_columns(rows, ("id", *TEXTS), name)
    usable, lines = rows_to_judge(rows, name)
    return write_usable(folder, usable, lines, tokenizer)


def write_usable(folder, usable, lines, tokenizer) -> dict:
    """[(id, turns, class number)] -> token ids and tokenizer in `folder`; gives the columns to keep."""
    texts = [text for _, row_turns, _ in usable for turn in row_turns for text in turn]
    tokenizer = tokenizer or encoder_tokenizer("tiny:", texts)
    integers = write_texts(folder, texts, tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "integers": integers,
        "ids": [row_id for row_id, _, _ in usable],
        "groups": [prompt_hash(row_turns) for _, row_turns, _ in usable],
        "labels": [label for _, _, label in usable],
        "pieces": [3 * len(row_turns) for _, row_turns, _ in usable],
        "lines": lines + _peculiarities(usable),
    }


def usable_rows(rows, name) -> tuple[list, list[str]]:
    """[(id, turns, class number)] of the usable rows, and a line for each reason to leave others out."""
    bad, usable = BadRows(), []
    for number, row in enumerate(rows, start=1):
        try:
            texts, label = parse(row)
            usable.append((str(row["id"]), texts, label))
        except ValueError as error:
            bad.add(number, error)
    return usable, bad.report(len(rows), name)


def rows_to_judge(rows, name) -> tuple[list, list[str]]:
    """Keeps every row of a file to be judged; UserError for one without an id: it cannot be answered."""
    usable, odd = [], Counter()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.get("id") in (None, ""):
            raise UserError(f"{name}: row {number} has no id: every row to be judged needs one")
        if not is_clean(str(row["id"])):  # the answer could not be written under it
            raise UserError(f"{name}: row {number} has an id with odd Unicode (a lone surrogate): rename it")
        texts, reason = parse_anyway(row)
        usable.append((str(row["id"]), texts, UNKNOWN))
        odd.update([reason] if reason else [])
    return usable, [f"{count} row(s) are judged as plain text: {why}" for why, count in odd.items()]


def _peculiarities(usable) -> list[str]:
    lines = []
    if twice := len(usable) - len({row_id for row_id, _, _ in usable}):
        lines.append(f"{twice} row(s) have an id that another row has, too")
    empty = sum(not any(turn[side] for turn in texts) for _, texts, _ in usable for side in (1, 2))
    lines += [f"{empty} empty responses are kept as they are"] if empty else []
    same = sum(all(turn[1] == turn[2] for turn in texts) for _, texts, _ in usable)
    return lines + ([f"{same} row(s) have identical responses, and are kept"] if same else [])


def split_rows(data, folds, fold, seed) -> dict[str, np.ndarray]:
    """Row numbers of train, val, test: 80/10/10 by prompt; with folds `fold` is tested, the next validates.

    A function of prompts, labels and seed alone: the same rows for every encoder, max_length and machine.
    """
    parts = split_by_group(data.groups, data.labels, [1] * folds if folds else [8, 1, 1], seed)
    test, val = (fold, (fold + 1) % folds) if folds else (2, 1)
    chosen = {"train": (parts != val) & (parts != test), "val": parts == val, "test": parts == test}
    return {part: np.flatnonzero(rows) for part, rows in chosen.items()}


SHORTEST = 16  # tokens that a cut piece keeps at least: with more turns than fit, the first ones are left out
SHARES = (1, 2, 2)  # of prompt, A and B in one sequence: 20/40/40 %, as Kaggle's fourth did


def allot(lengths, budget) -> list[int]:
    """Tokens kept of each piece: short ones whole, long ones cut to one common length, `budget` in all."""
    kept = list(lengths)
    if sum(lengths) > budget:
        for done, piece in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
            kept[piece] = min(lengths[piece], budget // (len(lengths) - done))
            budget -= kept[piece]
    return kept


def allot_by_role(totals, budget) -> list[int]:
    """Tokens of prompt, A and B: each its share, and what a short one leaves over in the same proportions.

    A and B are treated alike to the token, otherwise swapping them would show other words.
    """
    kept, left = [0, 0, 0], {0, 1, 2}
    while left:
        whole = sum(SHARES[role] for role in left)
        part = {role: budget * SHARES[role] // whole for role in left}
        settled = {role for role in left if totals[role] <= part[role]} or set(left)
        for role in settled:
            kept[role] = min(totals[role], part[role])
            budget -= kept[role]
        left -= settled
    return kept


def lay_out(data, row, which, inputs, max_length) -> tuple[list[tuple[int, int, int]], set[int]]:
    """Sequence 1 or 2 of a row: (first token, one past the last, kept) of each piece, in reading order.

    responses: A or B; prompt+responses: the prompt with A or with B; joint: prompt, A, B or prompt, B, A.
    With it, which of prompt, A, B (0, 1, 2) lost tokens. Room is shared over all turns, so that every piece
    stays visible (the original cut the response away behind a long prompt).
    """
    start, stop = data.first[row], data.first[row + 1]
    shown = {"responses": (which,), "prompt+responses": (0, which), "joint": (0, which, 3 - which)}[inputs]
    pieces = [turn + role for turn in range(start, stop, 3) for role in shown]
    most = max(len(shown), (max_length - 1) // (SHORTEST + 1) // len(shown) * len(shown))
    dropped, pieces = pieces[:-most], pieces[-most:]
    sizes = [int(data.offsets[p + 1] - data.offsets[p]) for p in pieces]
    room = max_length - len(data.marks[0]) - len(pieces)  # special tokens in front, one behind each piece
    if inputs == "joint":
        roles = [(p - start) % 3 for p in pieces]
        of_role = [[size for size, r in zip(sizes, roles, strict=True) if r == role] for role in range(3)]
        budgets = allot_by_role([sum(lengths) for lengths in of_role], room)
        by_role = [iter(allot(*part)) for part in zip(of_role, budgets, strict=True)]
        kept = [next(by_role[role]) for role in roles]
    else:
        kept = allot(sizes, room)
    lost = {(p - start) % 3 for p, size, k in zip(pieces, sizes, kept, strict=True) if k < size}
    lost |= {(p - start) % 3 for p in dropped if data.offsets[p + 1] > data.offsets[p]}
    return [
        (int(data.offsets[p]), int(data.offsets[p + 1]), k) for p, k in zip(pieces, kept, strict=True)
    ], lost


def sequence_ids(data, row, which, inputs, max_length) -> list[int]:
    """cls, then each piece and a sep (or a decoder's, see marks_of); a cut piece keeps its beginning and its
    end."""
    begin, end = data.marks
    ids = [*begin]
    for start, stop, kept in lay_out(data, row, which, inputs, max_length)[0]:
        head, tail = (kept + 1) // 2, kept // 2
        whole = kept == stop - start
        ids += data.tokens[start : stop if whole else start + head].tolist()
        ids += [] if whole or not tail else data.tokens[stop - tail : stop].tolist()
        ids.append(end)
    return ids


def measure_sequences(data, inputs, max_length):
    """Sets data.lengths and data.cut."""
    n = len(data.labels)
    data.lengths, data.cut = np.zeros((n, 2), dtype=np.int64), np.zeros((n, 3), dtype=bool)
    for row in range(n):
        for which in (1, 2):
            spans, lost = lay_out(data, row, which, inputs, max_length)
            data.lengths[row, which - 1] = len(data.marks[0]) + sum(kept + 1 for _, _, kept in spans)
            data.cut[row, list(lost)] = True


@waiting("data")
def collate(data, rows, cfg, device, orders=2, swapped=None) -> dict:
    """What PairScorer.forward takes: sequence 1 of every row, then (but for joint in one order) sequence 2.

    `swapped` (rows,) says which rows are shown with A and B swapped (the caller swaps their labels, too).
    """
    swapped = np.zeros(len(rows), dtype=bool) if swapped is None else swapped
    sequences = (1,) if cfg.inputs == "joint" and orders == 1 else (1, 2)
    wanted = [
        (row, 3 - which if swap else which)
        for which in sequences
        for row, swap in zip(rows, swapped, strict=True)
    ]
    if data.vectors is not None:
        numbers = np.array(wanted)
        vectors = torch.from_numpy(data.vectors[numbers[:, 0], numbers[:, 1] - 1])
        return {"vectors": to_device(vectors, device), "size": len(rows), "orders": orders}
    ids = [sequence_ids(data, row, which, cfg.inputs, cfg.max_length) for row, which in wanted]
    lengths = [len(sequence) for sequence in ids]
    input_ids = torch.full((len(ids), max(lengths)), data.tokenizer.pad_token_id or 0)
    for i, sequence in enumerate(ids):
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
    input_ids = to_device(input_ids, device)
    return {"input_ids": input_ids, "lengths": lengths, "size": len(rows), "orders": orders}
