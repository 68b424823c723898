"""Rows that are read and tokenised once and mapped into memory; bad rows are counted; splits by group."""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from lab.errors import UserError
from lab.run.files import PROJECT
from lab.train.processes import progress


class BadRows:
    """Counts unusable rows by reason; more than `limit` of all rows is an error that shows three."""

    def __init__(self, limit=0.01):
        self.limit, self.rows, self.seen = limit, [], 0  # seen: rows looked at, if whoever reads counts them

    def add(self, number, reason):
        self.rows.append((number, str(reason)))

    def report(self, total, where) -> list[str]:
        """Lines to print; raises UserError above the limit."""
        if len(self.rows) > self.limit * total:
            named = "; ".join(f"row {number}: {reason}" for number, reason in self.rows[:3])
            share = f"{len(self.rows)} of {total} rows are unusable, more than {self.limit:.0%}"
            raise UserError(f"{where}: {share}: mend or remove them, e.g. {named}")
        lines = []
        for reason, count in Counter(reason for _, reason in self.rows).items():
            numbers = [str(number) for number, why in self.rows if why == reason]
            lines.append(
                f"left out {count} row(s), {reason}: " + ", ".join(numbers[:8]) + ", ..." * (count > 8)
            )
        return lines


def is_clean(text) -> bool:
    """False for lone surrogates, which json.loads lets through and tokenizers raise at."""
    return not re.search("[\ud800-\udfff]", text)


def split_by_group(groups, labels, shares, seed) -> np.ndarray:
    """Part number of every row: in the proportions `shares`, no group in two parts, labels spread evenly.

    Largest groups first, ties in the order of a hash of (seed, group), each into the part that its labels
    fill least so far. A pure function of its arguments: the same on every rank and machine.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    kinds = np.unique(labels, return_inverse=True)[1]
    if len(names) < len(shares):
        raise UserError(f"{len(names)} prompts cannot be split into {len(shares)} parts: use more rows")
    counts = np.zeros((len(names), kinds.max() + 1))  # (groups, labels)
    np.add.at(counts, (index, kinds), 1)
    room = np.outer(np.divide(shares, np.sum(shares)), counts.sum(0))  # (parts, labels): rows each should get
    filled, part = np.zeros_like(room), np.zeros(len(names), dtype=np.int64)
    order = {name: hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names}
    for group in sorted(range(len(names)), key=lambda g: (-counts[g].sum(), order[names[g]])):
        crowding = ((filled + counts[group]) / room * counts[group]).sum(1)
        part[group] = np.argmin(crowding + 1e-3 * filled.sum(1) / room.sum(1))
        filled[part[group]] += counts[group]
    if len(set(part)) < len(shares):
        raise UserError(f"{len(names)} prompts leave one of {len(shares)} parts empty: use more rows")
    return part[index]


def cache_root() -> Path:
    """Where token ids are kept between runs; TOKEN_CACHE lets it sit on a persistent volume."""
    return Path(os.environ.get("TOKEN_CACHE", PROJECT / "cache"))


def write_texts(folder, texts, tokenizer) -> str:
    """Token ids of the list `texts` -> folder/tokens.bin and offsets.npy; returns the kind of integer."""
    kind, offsets = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32, [0]
    with open(folder / "tokens.bin", "wb") as file, progress(len(texts), "tokenising") as bar:
        for start in range(0, len(texts), 1000):
            chunk = texts[start : start + 1000]
            # a text that spells a special token out means the letters
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            for ids in tokenizer(chunk, **plain).input_ids:
                file.write(np.asarray(ids, dtype=kind).tobytes())
                offsets.append(offsets[-1] + len(ids))
            bar.update(len(chunk))
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    return kind.__name__


def read_texts(folder, kind) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets) of write_texts: text i is tokens[offsets[i] : offsets[i + 1]], read when used."""
    offsets = np.load(folder / "offsets.npy")
    empty = np.zeros(0, kind)  # no file of length 0 can be mapped
    return np.memmap(folder / "tokens.bin", dtype=kind, mode="r") if offsets[-1] else empty, offsets
