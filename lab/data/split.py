"""Which rows train, which are val and which are test."""

import hashlib

import numpy as np

from lab.errors import UserError

PARTS = ("train", "val", "test")


def final_parts(cfg) -> tuple[str, ...]:
    """The parts whose figures a run ends with, the most important one last."""
    has_test = cfg.final_eval and getattr(cfg, "test_share", True)
    return ("val", "test") if has_test else ("val",)


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
