"""Rows of a prompt with two responses, of one data set or several: token cache, splits, and what of a row an
encoder gets to see. How a row is read: pair_layouts.py; what is learnt of it: soft_labels.py."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab.data.builtin import built_in_fingerprint, python_pairs
from lab.data.cache import cached_rows, write_texts
from lab.data.columns import LABELS, TEXTS
from lab.data.pair_layouts import UNKNOWN, peculiarities, prompt_hash, rows_to_judge, usable_rows
from lab.data.soft_labels import teach
from lab.data.split import split_by_group
from lab.data.tables import data_fingerprint, hub_split, read_rows, require_columns
from lab.data.tokenizers import encoder_tokenizer, tokenizer_fingerprint
from lab.errors import UserError
from lab.train.device import to_device
from lab.train.processes import main_first, on_main
from lab.train.waits import waiting


@dataclass
class Preferences:
    """Tokenised rows. Row i has pieces first[i] to first[i + 1]: prompt, A, B of turn 1, of turn 2, ..."""

    ids: list[str]
    groups: np.ndarray  # hash of the prompt: rows of one prompt stay together
    labels: np.ndarray  # class numbers, UNKNOWN in rows without a winner
    first: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray  # piece p is tokens[offsets[p] : offsets[p + 1]]
    tokenizer: object
    folder: Path  # where all this is cached
    fingerprint: dict
    lines: list[str]  # what to tell the user about odd rows
    sets: np.ndarray | None = None  # number of each row's data set: 0 is cfg.data, others only train
    weights: np.ndarray | None = None  # of each row's loss, at least 1; none: all are equal
    soft: np.ndarray | None = None  # (N, 3) probabilities to learn from; NaN in rows without
    lengths: np.ndarray | None = None  # (N, 2) tokens of sequences 1 and 2; set by measure_sequences, like
    cut: np.ndarray | None = None  # (N, 3) whether prompt, A, B lost tokens
    vectors: np.ndarray | None = None  # (N, 2, h) of a frozen encoder; set by cache_vectors

    def truncated(self) -> dict[str, float]:
        """Share of rows in which prompt, A or B lost tokens."""
        return dict(zip(TEXTS, self.cut.mean(0).tolist(), strict=True))

    def cut_line(self) -> str:
        shares = self.truncated().items()
        return "cut to fit  " + "  ".join(f"{name} in {share:.1%} of rows" for name, share in shares)

    def own(self, rows) -> np.ndarray:
        """Those of `rows` that belong to cfg.data: what is measured is compared with their class shares."""
        return rows if self.sets is None else rows[self.sets[rows] == 0]

    def weights_of(self, rows) -> np.ndarray:
        """(rows,): how much each counts in the loss of its batch."""
        return np.ones(len(rows), dtype=np.int64) if self.weights is None else self.weights[rows]

    def response_lengths(self) -> np.ndarray:
        """(N, 2) tokens of A and of B over all turns, before any cut."""
        sizes = np.diff(self.offsets).reshape(-1, 3)[:, 1:]
        return np.add.reduceat(sizes, self.first[:-1] // 3, axis=0) if len(sizes) else sizes


def load_pairs(cfg, world, tokenizer=None) -> Preferences:
    """The rows of cfg.data and cfg.extra_data, tokenised once by rank 0 into the cache, read from there by
    every rank; with the soft labels of cfg.teacher.

    `tokenizer`: none is that of cfg.model.
    """
    sets = weighted_sets(cfg)
    for name, _ in sets:
        on_main(world, hub_split, name)  # a mistyped file must not wait for a tokenizer
    # a tiny model's tokenizer is made of the rows' words
    if not tokenizer and not cfg.model.startswith("tiny:"):
        tokenizer = main_first(world, encoder_tokenizer, cfg.model)
    rows = cached_rows(world, "preference", pairs_key, write_pairs, cfg, tokenizer)
    data = as_preferences(rows, tokenizer)
    if cfg.extra_data:
        weights = np.array([weight for _, weight in sets])
        data.weights = (weights / weights.min())[data.sets]  # none below 1: a batch's sum is never small
    if cfg.teacher:
        teach(data, cfg.teacher, world)
    return data


def weighted_sets(cfg) -> list[tuple[str, float]]:
    """(name, weight of its rows' losses) of cfg.data and of each `weight*name` in cfg.extra_data."""
    sets = [(cfg.data, 1.0)]
    for text in cfg.extra_data:
        weight, times, name = text.partition("*")
        if not times:
            weight, name = "1", text
        if not re.fullmatch(r"\d*\.?\d+", weight) or not 0.001 <= float(weight) <= 1000 or not name:
            raise UserError(f"--extra_data {text}: write weight*name, e.g. 0.5*pairs.jsonl, 0.001 to 1000")
        sets.append((name, float(weight)))
    if twice := next((name for name, _ in sets if [other for other, _ in sets].count(name) > 1), None):
        raise UserError(f"--extra_data: {twice} is read twice: name it once, with a weight")
    return sets


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
        sets=np.array(rows.columns["sets"]) if "sets" in rows.columns else None,
        soft=np.array(rows.columns["soft"], dtype=float) if "soft" in rows.columns else None,
        first=np.concatenate([[0], np.cumsum(rows.columns["pieces"])]).astype(np.int64),
        tokens=rows.tokens,
        offsets=rows.offsets,
        tokenizer=tokenizer or encoder_tokenizer(str(rows.folder / "tokenizer")),
        folder=rows.folder,
        fingerprint=rows.fingerprint,
        lines=rows.columns["lines"],
    )


LAYOUTS_READ = 1  # of what pair_layouts.py makes of a row: a change there is a change here


def pairs_key(cfg, tokenizer) -> dict:
    """All that the cached rows depend on."""
    words = tokenizer_fingerprint(tokenizer) if tokenizer else "words"
    fingerprint = {"data": pairs_fingerprint(cfg.data), "tokenizer": words}
    if cfg.extra_data:
        fingerprint["extra_data"] = [pairs_fingerprint(name) for name, _ in weighted_sets(cfg)[1:]]
    return {"fingerprint": fingerprint, "max_documents": cfg.max_documents, "layouts": LAYOUTS_READ}


def pairs_fingerprint(name) -> str:
    return built_in_fingerprint(name) if name == "python-pairs" else data_fingerprint(name)


def unlabelled_key(name, tokenizer) -> dict:
    words = tokenizer_fingerprint(tokenizer) if tokenizer else "words"
    return {"fingerprint": {"data": data_fingerprint(name, "test"), "tokenizer": words}}


def write_pairs(folder, cfg, tokenizer) -> dict:
    """Usable rows of every set -> token ids and tokenizer in `folder`; gives the columns to keep."""
    every, lines, sets = [], [], []
    for number, (name, _) in enumerate(weighted_sets(cfg)):
        rows = python_pairs() if name == "python-pairs" else read_rows(name, cfg.max_documents)
        usable, said = usable_rows(rows[: cfg.max_documents], name, needs_winner=number == 0)
        whose = f"{name}  " if cfg.extra_data else ""
        lines += [whose + line for line in said + peculiarities(usable)]
        every, sets = every + usable, sets + [number] * len(usable)
    columns = write_usable(folder, every, tokenizer) | {"lines": lines}
    if any(soft for *_, soft in every):
        columns["soft"] = [soft or [None] * len(LABELS) for *_, soft in every]
    return columns | ({"sets": sets} if cfg.extra_data else {})


def write_unlabelled(folder, name, tokenizer) -> dict:
    """Every row of a file to be judged -> token ids and tokenizer in `folder`; gives the columns to keep."""
    rows = read_rows(name, prefer="test")
    require_columns(rows, ("id", *TEXTS), name)
    usable, lines = rows_to_judge(rows, name)
    return write_usable(folder, usable, tokenizer) | {"lines": lines + peculiarities(usable)}


def write_usable(folder, usable, tokenizer) -> dict:
    """Rows of pair_layouts -> token ids and tokenizer in `folder`; gives the columns to keep."""
    texts = [text for _, row_turns, *_ in usable for turn in row_turns for text in turn]
    tokenizer = tokenizer or encoder_tokenizer("tiny:", texts)
    integers = write_texts(folder, texts, tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "integers": integers,
        "ids": [row_id for row_id, *_ in usable],
        "groups": [prompt_hash(row_turns) for _, row_turns, *_ in usable],
        "labels": [label for _, _, label, _ in usable],
        "pieces": [3 * len(row_turns) for _, row_turns, *_ in usable],
    }


def split_rows(data, cfg, fold=0) -> dict[str, np.ndarray]:
    """Row numbers of train, val, test, by prompt: in the shares of cfg; with folds `fold` is tested, the next
    validates. Rows of further data sets train, unless their prompt is held out.

    A function of the prompts and labels of cfg.data and of its constants alone: the same rows for every
    encoder, max_length, machine and further set.
    """
    own = data.own(np.arange(len(data.labels)))
    shares = (
        [1] * cfg.folds if cfg.folds else [1 - cfg.val_share - cfg.test_share, cfg.val_share, cfg.test_share]
    )
    shares = [round(share, 9) for share in shares if share]  # 0.8 0.1 0.1, not 0.7999...
    parts = split_by_group(data.groups[own], data.labels[own], shares, cfg.split_seed)
    test, val = (fold, (fold + 1) % cfg.folds) if cfg.folds else (2, 1)
    chosen = {"train": (parts != val) & (parts != test), "val": parts == val, "test": parts == test}
    rows = {part: own[those] for part, those in chosen.items()}
    if data.sets is not None:
        others = np.flatnonzero(data.sets)
        held_out = data.groups[np.concatenate([rows["val"], rows["test"]])]
        rows["train"] = np.concatenate([rows["train"], others[~np.isin(data.groups[others], held_out)]])
    return rows


def set_lines(data, cfg, rows) -> list[str]:
    """What is read of each data set."""
    prompts, lines = len(set(data.groups)), []
    if data.sets is None:
        return [f"data {cfg.data}  {len(data.labels)} rows, {prompts} prompts"]
    for number, (name, weight) in enumerate(weighted_sets(cfg)):
        there, trains = (int((x == number).sum()) for x in (data.sets, data.sets[rows["train"]]))
        others = f", {there - trains} left out: their prompts are held out" if number else ""
        lines.append(f"data {name}  {there} rows, weight {weight:g}, {trains} train{others}")
    return [*lines, f"{prompts} prompts; all that is held out is of {cfg.data}"]


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
    room = max_length - 1 - len(pieces)  # one special token in front, one behind each piece
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
    """cls, then each piece and a sep; a cut piece keeps its beginning and its end."""
    ids = [data.tokenizer.cls_token_id]
    for start, stop, kept in lay_out(data, row, which, inputs, max_length)[0]:
        head, tail = (kept + 1) // 2, kept // 2
        whole = kept == stop - start
        ids += data.tokens[start : stop if whole else start + head].tolist()
        ids += [] if whole or not tail else data.tokens[stop - tail : stop].tolist()
        ids.append(data.tokenizer.sep_token_id)
    return ids


def measure_sequences(data, inputs, max_length):
    """Sets data.lengths and data.cut."""
    n = len(data.labels)
    data.lengths, data.cut = np.zeros((n, 2), dtype=np.int64), np.zeros((n, 3), dtype=bool)
    for row in range(n):
        for which in (1, 2):
            spans, lost = lay_out(data, row, which, inputs, max_length)
            data.lengths[row, which - 1] = 1 + sum(kept + 1 for _, _, kept in spans)
            data.cut[row, list(lost)] = True


def swapped(cfg, fold, step) -> list[bool]:
    """Which rows of a global batch have A and B swapped; independent of the number of ranks."""
    if not cfg.swap_augmentation:
        return [False] * cfg.batch
    return (np.random.default_rng([cfg.seed, fold, step]).random(cfg.batch) < 0.5).tolist()


def shown_rows(train_rows, positions, swaps=None) -> list[tuple]:
    """Pairs (row, whether A and B are swapped) of positions in the training rows."""
    return list(zip(train_rows[positions].tolist(), swaps or [False] * len(positions), strict=True))


def next_rows(run, cfg, fold, step, train_rows) -> list[tuple]:
    """This rank's pairs of step `step`, if a thread is to lay them out meanwhile."""
    swaps = swapped(cfg, fold, step)[run.world.rank :: run.world.size]
    return shown_rows(train_rows, run.rows_ahead, swaps) if run.rows_ahead else []


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


def describe_row(data, row, inputs, max_length) -> str:
    """Lines that show both sequences of a row as the encoder reads them, and its label."""
    label = "no winner" if data.labels[row] == UNKNOWN else list(LABELS)[data.labels[row]]
    lines = [f"the loss sees row {data.ids[row]} -> {label}; padding is masked"]
    for which, name in enumerate(("A B", "B A") if inputs == "joint" else ("A", "B"), start=1):
        ids = sequence_ids(data, row, which, inputs, max_length)
        text = data.tokenizer.decode(ids).replace("\n", " ")
        lines.append(f"  {name}: {text if len(text) <= 93 else f'{text[:44]} ... {text[-44:]}'}")
    return "\n".join(lines)
