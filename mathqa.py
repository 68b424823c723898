"""MathQA: multiple-choice problems as rows of text, and who chooses the right option. For run_mathqa.py.

tables -> parsed rows -> token ids -> examples (the right answer behind its problem) and choices (each of the
five options behind it) -> figures. Examples and batches are those of sft.py.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import core
import corpus
import gpt_scratch
import runs
import sft

COLUMNS = ("Problem", "options", "correct")  # MathQA's; Rationale, formulas and category are not read
OTHER_NAMES = {"Problem": "question"}  # AQuA's
LETTERS = "abcde"
BUILT_IN = "template-problems"
CACHE_VERSION = 2  # of the layout that write_cache writes: change both together
MOST_BAD = 0.05  # share of rows: some of MathQA's have fewer than five options
CHANCE = 1 / len(LETTERS)
FIRST = 2  # pieces of a problem before its first answer
JOURNAL_LENGTH = 1024  # journal 004 padded each row to a multiple of it

# ------------------------------------------------------------------------------------------------ rows


def parse(row) -> tuple[str, list[str], int]:
    """(problem, its five options, number of the right one). ValueError names the fault."""
    if not isinstance(row, dict):
        raise ValueError("no object with columns")
    problem, options, correct = (row.get(name, row.get(OTHER_NAMES.get(name))) for name in COLUMNS)
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("the problem is empty")
    options = parse_options(options)
    if not all(map(core.is_clean, [problem, *options])):
        raise ValueError("odd Unicode (a lone surrogate)")
    letter = str(correct).strip().lower()
    if letter not in tuple(LETTERS):
        raise ValueError("the right answer is none of a to e")
    return problem.strip(), options, LETTERS.index(letter)


def parse_options(options) -> list[str]:
    """The five texts behind `a )` to `e )`, of a string in any of MathQA's three spellings or of a list.

    Cut where the pattern letter-space-parenthesis stands, in order: commas (1,000) and parentheses are text.
    """
    if isinstance(options, list):  # AQuA: ["A)32400", ...]
        texts = [str(text).strip() for text in options]
    elif isinstance(options, str):
        # behind a comma if they all are, so that "( 2 + b )" is text
        starts = _marks(options, r"(?:^[\s\['\"]*|,[\s'\"]*)") or _marks(options, r"(?<![a-z0-9])")
        if not starts:
            raise ValueError("options are not five, a ) to e )")
        texts = [options[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]
        listed = options.lstrip().startswith("[")  # "['a ) 8', 'b ) 1', ...]"
        texts = [
            re.sub(r"['\"][\s,]*\]?[\s'\"]*$", "", text) if listed else text.rstrip(" ,") for text in texts
        ]
    else:
        raise ValueError("options are no text")
    if len(texts) != len(LETTERS):
        raise ValueError("options are not five, a ) to e )")
    # a label may stand twice: "a ) a ) 17"
    texts = [re.sub(rf"^(?:{x} ?\)\s*)+", "", t, flags=re.I) for x, t in zip(LETTERS, texts, strict=True)]
    if not all(texts):
        raise ValueError("an option is empty")
    return texts


def _marks(options, before) -> list[int]:
    """Where the labels `a )` to `e )` begin, in this order, each behind the pattern `before`; or none."""
    starts, at = [], 0
    for letter in LETTERS:
        mark = re.compile(rf"{before}({letter}) ?\)", re.I).search(options, at)
        if mark is None:
            return []
        starts.append(mark.start(1))
        at = mark.end()
    return starts


NAMES = (*("ann", "ben", "cora", "dan", "emma", "finn", "ida"), *("jan", "kate", "leo", "mona", "ned", "pat"))
THINGS = ("apples", "books", "coins", "pens", "cards", "roses", "stamps", "balls", "keys", "eggs", "cups")
TEMPLATES = (  # problem, rationale, the two formulas, answer; numbers from 2 to 9
    ("{n} has {a} {t} and gets {b} more . how many {t} ?", "{a} + {b} = {c}",
     "add({a}, {b})", "add(n0,n1)|", lambda a, b: a + b),
    ("{n} had {ab} {t} and lost {b} of them . how many {t} ?", "{ab} - {b} = {c}",
     "subtract({ab}, {b})", "subtract(n0,n1)|", lambda a, b: a),
    ("{n} has {a} {t} and {m} twice as many . how many {t} ?", "2 * {a} = {c}",
     "multiply(2, {a})", "multiply(const_2,n0)|", lambda a, b: 2 * a),
)  # fmt: skip


def template_problems(count=4000, seed=0) -> list[dict]:
    """Built-in rows in MathQA's columns: small sums in words.

    The five options answer five problems of the template that differ in nothing but their numbers, drawn
    together: without the problem none is likelier than another.
    """
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        text, why, formula, linear, solve = TEMPLATES[rng.integers(len(TEMPLATES))]
        pairs = rng.integers(2, 10, size=(len(LETTERS), 2)).tolist()
        answers = [solve(a, b) for a, b in pairs]
        if len(set(answers)) < len(LETTERS):
            continue
        right, (a, b) = int(rng.integers(len(LETTERS))), pairs[0]
        answers[0], answers[right] = answers[right], answers[0]
        name, other = rng.choice(NAMES, 2, replace=False)
        filled = {"n": name, "m": other, "t": rng.choice(THINGS), "a": a, "b": b, "ab": a + b}
        filled["c"] = answers[right]
        options = " , ".join(f"{x} ) {answer}" for x, answer in zip(LETTERS, answers, strict=True))
        rows.append({
            "Problem": text.format(**filled), "Rationale": why.format(**filled), "options": options,
            "correct": LETTERS[right], "annotated_formula": formula.format(**filled),
            "linear_formula": linear, "category": "general",
        })  # fmt: skip
    return rows


@functools.cache
def built_in() -> list[dict]:
    """The rows of BUILT_IN, made once: a study opens them for every run."""
    return template_problems()


PARTS = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}  # how files begin


def official_parts(name) -> dict[str, str] | None:
    """What a data set calls its parts: {"train": ..., "val": ..., "test": ...}; None for a single table."""
    path = Path(name)
    if not path.exists():  # on the Hub
        return {"train": "train", "val": "validation", "test": "test"}
    names = os.listdir(path) if path.is_dir() else []
    if path.suffix == ".zip":
        try:
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, OSError):
            raise core.UserError(f"{path} is not a whole zip file: fetch it again") from None
    tables = sorted(Path(found).name for found in names if Path(found).suffix in core.TABLES)
    tables = [table for table in tables if table[0] != "."]  # what a Mac leaves in a zip
    if len(tables) < 2 or all(table.startswith("train") for table in tables):
        return None
    found = {
        part: next((p for p in begins if any(t.startswith(p) for t in tables)), None)
        for part, begins in PARTS.items()
    }
    if missing := [PARTS[part][0] for part, begin in found.items() if begin is None]:
        raise core.UserError(
            f"{name} holds {', '.join(tables)}, none of them {missing[0]}...: add it, or name one file"
        )
    return found


# ------------------------------------------------------------------------------------------------ token ids


@dataclass
class Problems(sft.Instructions):
    """Tokenised problems: pieces 7 i and 7 i + 1 are what the model reads of problem i (the problem; the list
    of its options, if it gets to see one), 7 i + 2 ... 7 i + 6 the answers to choose from.

    texts: [problem, "", right answer].
    """

    options: list[list[str]]
    right: np.ndarray  # number of the right option
    part: list[str | None]  # train, val, test where the data set says so

    @functools.cached_property
    def pieces(self) -> np.ndarray:
        """(rows, 7): tokens of each piece."""
        return np.diff(self.offsets).reshape(-1, FIRST + len(LETTERS))

    @functools.cached_property
    def prompt_lengths(self):
        return self.pieces[:, :FIRST].sum(1)

    @functools.cached_property
    def answer_lengths(self):
        """Of the right option, without the end token."""
        return self.pieces[np.arange(len(self)), FIRST + self.right]

    def piece(self, row, number) -> list[int]:
        at = (FIRST + len(LETTERS)) * row + number
        return self.tokens[self.offsets[at] : self.offsets[at + 1]].tolist()

    def prompt(self, row) -> list[int]:
        return self.piece(row, 0) + self.piece(row, 1)

    def whole(self, row) -> list[int]:
        """Problem, right answer, end token."""
        return self.ended(row, row, self.right[row])

    def ended(self, asked, row, option) -> list[int]:
        """Problem `asked`, then all that belongs to an option of `row`, then the end token."""
        end = self.tokenizer.eos_token_id
        return [*self.piece(asked, 0), *self.piece(row, 1), *self.piece(row, FIRST + option), end]


def as_read(problem, options, answer_format) -> list[str]:
    """What the model reads before an answer (the problem, the list of options), and the five answers."""
    if answer_format == "text":
        return [problem, "", *(f" {option}" for option in options)]
    listed = " , ".join(f"{letter} ) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return [problem, f" options : {listed} answer :", *(f" {letter}" for letter in LETTERS)]


def load_problems(cfg, world, tokenizer) -> Problems:
    """The rows of cfg.data, tokenised once by rank 0 into the cache, read from there by every rank."""
    words = core.tokenizer_fingerprint(tokenizer)

    def build() -> str:
        if cfg.data == BUILT_IN:
            made = json.dumps(built_in()).encode()
            parts, source = None, hashlib.sha256(made).hexdigest()
        else:
            parts = official_parts(cfg.data)
            kinds = parts.values() if parts else ["train"]
            source = core.joint_hash([core.data_fingerprint(cfg.data, kind) for kind in kinds])
        fingerprint = {"data": source, "tokenizer": words, "answer_format": cfg.answer_format}
        key = json.dumps([CACHE_VERSION, fingerprint, cfg.data == BUILT_IN, cfg.max_documents])
        folder = core.cache_root() / f"problems_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not (folder / "rows.json").exists():
            rows = read_parts(cfg, parts)
            write_cache(folder, rows, tokenizer, cfg, fingerprint)
        return str(folder)

    return read_cache(Path(core.on_main(world, build)), tokenizer)


def read_parts(cfg, parts) -> list[tuple[str | None, dict]]:
    """(part, row) of every row; max_documents counts in each part."""
    if cfg.data == BUILT_IN:
        return [(None, row) for row in built_in()[: cfg.max_documents]]
    found = []
    for part, begin in (parts or {None: "train"}).items():
        rows = core.read_rows(cfg.data, cfg.max_documents, begin)
        names = {key for row in rows[:100] if isinstance(row, dict) for key in row}
        core.require_columns(
            rows, [OTHER_NAMES[c] if OTHER_NAMES.get(c) in names else c for c in COLUMNS], cfg.data
        )
        found += [(part, row) for row in rows]
    return found


def write_cache(folder, rows, tokenizer, cfg, fingerprint):
    """Usable rows -> a folder of token ids and texts; unusable ones counted and named."""
    bad, kept, numbers = core.BadRows(MOST_BAD), [], []
    counts = defaultdict(lambda: itertools.count(1))  # rows are numbered in each part
    for part, row in rows:
        number = next(counts[part])
        try:
            kept.append((part, *parse(row)))
            numbers.append(number)
        except ValueError as error:
            bad.add(f"{part} {number}" if part else number, error)
    lines = bad.report(len(rows), cfg.data)
    if cfg.data != BUILT_IN and any("annotated_formula" in row for _, row in rows[:100]):
        lines.append("a quarter of MathQA's own formulas disagree with its labels: the ceiling is low")
    if twins := sum(options.count(options[right]) > 1 for _, _, options, right in kept):
        lines.append(f"{twins} row(s) have the right option twice: either counts as right")
    pieces = [text for _, p, options, _ in kept for text in as_read(p, options, cfg.answer_format)]
    with core.whole_folder(folder) as aside:
        kind = core.write_texts(aside, pieces, tokenizer)
        core.write_json(aside / "rows.json", {
            "kind": kind, "numbers": numbers, "lines": lines, "fingerprint": fingerprint,
            "part": [part for part, *_ in kept], "options": [options for _, _, options, _ in kept],
            "right": [right for *_, right in kept],
            "texts": [[problem, "", options[right]] for _, problem, options, right in kept],
            "groups": [sft.prompt_hash(problem, "") for _, problem, _, _ in kept],
        })  # fmt: skip


def read_cache(folder, tokenizer) -> Problems:
    meta = json.loads((folder / "rows.json").read_text())
    tokens, offsets = core.read_texts(folder, meta["kind"])
    return Problems(
        texts=meta["texts"], categories=[None] * len(meta["texts"]), numbers=np.array(meta["numbers"]),
        groups=np.array(meta["groups"]), tokens=tokens, offsets=offsets, tokenizer=tokenizer,
        fingerprint=meta["fingerprint"], lines=meta["lines"], options=meta["options"],
        right=np.array(meta["right"]), part=meta["part"],
    )  # fmt: skip


SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}  # of a single table, drawn by problem


def split(data, cfg) -> tuple[dict[str, np.ndarray], list[str]]:
    """Row numbers of train, val and test, and what to say of them.

    The data set's own parts as they are: its test rows are looked at once, at the end. A row whose problem
    and longest option do not fit into max_length tokens is left out: no score is of a cut answer.
    """
    if data.part and data.part[0] is not None:
        parts = {name: np.flatnonzero(np.array(data.part) == name) for name in PARTS}
        lines = ["parts are the data set's own"]
    else:
        drawn = core.split_by_group(data.groups, np.zeros(len(data)), list(SHARES.values()), cfg.split_seed)
        parts = {name: np.flatnonzero(drawn == i) for i, name in enumerate(SHARES)}
        lines = ["a single table: 80 % train, 10 % val, 10 % test, drawn by problem"]
    # the last token is no input
    fits = data.prompt_lengths + data.pieces[:, FIRST:].max(1) <= cfg.max_length
    if not fits.all():
        left = "  ".join(f"{name} {(~fits[rows]).sum()} of {len(rows)}" for name, rows in parts.items())
        lines.append(f"left out, over {cfg.max_length} tokens: {left}")
    parts = {name: rows[fits[rows]] for name, rows in parts.items()}
    if empty := [name for name, rows in parts.items() if not len(rows)]:
        raise core.UserError(f"{cfg.data} leaves no {empty[0]} rows: use more rows or a larger --max_length")
    known = set(data.groups[parts["train"]])
    for name in ("val", "test"):
        if seen := sum(group in known for group in data.groups[parts[name]]):
            lines.append(f"{seen} of {len(parts[name])} {name} rows have a problem that training rows have")
    return parts, lines


# ----------------------------------------------------------------------------------------- choosing an option


class Choices(sft.Examples):
    """Every option of every row behind its problem, 5 i + o, as gpt_scratch.evaluate reads them.

    Targets are the option's tokens and the end token: without it `3` could only be likelier than `38`.
    `asked` (rows,): whose problem stands before the options of each row; none: its own.
    """

    def __init__(self, data, rows, asked=None):
        self.data, self.rows, self.asked = data, rows, rows if asked is None else asked
        self.prompts = data.pieces[self.asked, 0] + data.pieces[rows, 1]
        lengths = self.prompts[:, None] + data.pieces[rows, FIRST:]
        self.lengths, self.max_length, self.loss_on_prompt = lengths.reshape(-1), None, False

    def __len__(self):
        return len(self.lengths)

    def masked(self, examples):
        return self.prompts[np.asarray(examples) // len(LETTERS)] - 1

    def pair(self, example):
        row, option = divmod(example, len(LETTERS))
        ids, masked = self.data.ended(self.asked[row], self.rows[row], option), int(self.masked([example])[0])
        return ids[:-1], [core.IGNORE_INDEX] * masked + ids[1 + masked :]


@dataclass
class Scores:
    """What a model thinks of every option: (rows, 5) log-likelihoods, and the same for each target token."""

    plain: np.ndarray
    per_token: np.ndarray

    @classmethod
    def of(cls, model, choices, cfg, world, poll):
        # rounded, close options would be equal, and the first one chosen
        exact = cfg if cfg.dtype == "fp64" else replace(cfg, dtype="fp32")
        sums = gpt_scratch.evaluate(model, choices, exact, world, poll)
        plain, targets = -sums[:, 0].reshape(-1, len(LETTERS)), sums[:, 2].reshape(-1, len(LETTERS))
        return cls(plain, plain / targets)

    def right(self, data, rows) -> np.ndarray:
        """(rows, 2): whether the likeliest option says what the right one says, plain and per token."""
        said = np.array([data.options[row] for row in rows])
        answer, every = said[np.arange(len(rows)), data.right[rows]], np.arange(len(rows))
        chosen = (scores.argmax(1) for scores in (self.plain, self.per_token))
        return np.stack([said[every, of] == answer for of in chosen], axis=1).astype(float)


def some(rows, n) -> np.ndarray:
    """`n` of the rows, spread evenly; none: all."""
    n = len(rows) if n is None else min(n, len(rows))
    return rows[np.linspace(0, len(rows) - 1, n).round().astype(int)]


def strangers(data, rows, most=10**9) -> np.ndarray:
    """For each row another row, with another problem where there is one: the control's problems."""
    order = np.random.default_rng(0).permutation(len(rows))
    asked = np.empty_like(rows)
    asked[order] = rows[np.roll(order, 1)]
    prompts, room = data.pieces[:, 0], most - data.pieces[rows, 1] - data.pieces[rows, FIRST:].max(1)
    for i in np.flatnonzero((data.groups[asked] == data.groups[rows]) | (prompts[asked] > room)):
        others = np.flatnonzero((data.groups[rows] != data.groups[rows[i]]) & (prompts[rows] <= room[i]))
        asked[i] = rows[others[i % len(others)]] if len(others) else rows[i]
    return asked


def answer_figures(model, data, rows, train, cfg, world, poll) -> tuple[dict, list[dict]]:
    """How often the likeliest option is right, plain and per token, with intervals by problem; always the
    training rows' most frequent letter; the control, in which problems are shuffled among rows.

    Also a line for each row: its number, group, the scores, and whether each way was right.
    """
    own = Scores.of(model, Choices(data, rows), cfg, world, poll)
    control = Scores.of(model, Choices(data, rows, strangers(data, rows, cfg.max_length)), cfg, world, poll)
    usual = Counter(data.right[train].tolist()).most_common(1)[0][0]
    right, shuffled = own.right(data, rows), control.right(data, rows)
    values = np.c_[right, shuffled, data.right[rows] == usual, right - shuffled]
    names = ("answer_accuracy", "answer_accuracy_per_token", "shuffled_accuracy")
    names = (*names, "shuffled_accuracy_per_token", "letter_accuracy")
    names = (*names, "above_shuffled", "above_shuffled_per_token")
    found, intervals = {}, core.bootstrap(values, data.groups[rows]).tolist()
    for name, value, interval in zip(names, values.mean(0).tolist(), intervals, strict=True):
        found |= {name: value, f"{name}_interval": interval}
    lines = [
        {"row": number, "group": group, "right": bool(r[0]), "right_per_token": bool(r[1]),
         "right_shuffled": bool(c), "scores": scores, "answer": LETTERS[answer]}
        for number, group, r, c, scores, answer in zip(
            data.numbers[rows].tolist(), data.groups[rows].tolist(), right, shuffled[:, 0],
            own.plain.round(5).tolist(), data.right[rows].tolist(), strict=True)
    ]  # fmt: skip
    return found | {"letter": LETTERS[usual]}, lines


def answer_lines(part, m) -> list[str]:
    """What of answer_figures belongs on the terminal; `m` has the names with their part."""

    def said(name):
        return core.plus_minus(m[f"{part}/{name}"], m[f"{part}/{name}_interval"])

    lines = [
        f"{part:5} answers {said('answer_accuracy')}  per token {said('answer_accuracy_per_token')}  "
        f"of five: {CHANCE:.3f}  always {m[f'{part}/letter']}: {m[f'{part}/letter_accuracy']:.3f}",
        f"{part:5} control, problems shuffled: {said('shuffled_accuracy')}  "
        f"per token {said('shuffled_accuracy_per_token')}",
    ]
    if not above_guessing(part, m):
        lines.append(f"{part:5} answers cannot be told from guessing")
    elif not knows(part, m):
        why = "options give themselves away"
        lines.append(f"{part:5} answers are no better than without the problem: {why}")
    return lines


def above_guessing(part, m) -> bool:
    """Whether answers beat chance and the most frequent letter."""
    return m[f"{part}/answer_accuracy_interval"][0] > max(CHANCE, m[f"{part}/letter_accuracy"])


def knows(part, m) -> bool:
    """Whether answers beat both guesses and the control."""
    return above_guessing(part, m) and m[f"{part}/above_shuffled_interval"][0] > 0


def over_padding(sums, examples) -> float:
    """Journal 004's token accuracy: hits over every position of rows padded to a multiple of 1,024."""
    positions = np.ceil((examples.lengths + 1) / JOURNAL_LENGTH) * JOURNAL_LENGTH
    return float(sums[:, 1].sum() / positions.sum())


def examples_of(data, cfg) -> tuple[dict[str, sft.Examples], list[str]]:
    """The parts of `split` as a model reads them, and what to say of their rows."""
    rows, lines = split(data, cfg)
    # inputs of max_length tokens: the last token is only a target
    most = cfg.max_length + 1
    return {name: sft.Examples(data, of, most, cfg.loss_on_prompt) for name, of in rows.items()}, lines


def measure(model, part, parts, data, cfg, world, poll, answers=True) -> tuple[dict, list[dict], list[dict]]:
    """Of a whole part: figures by name, lines of losses.jsonl, lines of answers.jsonl.

    Without `answers`, which take ten forwards of each row, none of those.
    """
    examples = parts[part]
    sums = gpt_scratch.evaluate(model, examples, cfg, world, poll)
    spelt = spelt_bytes(examples)
    unigram = unigram_losses(examples, parts["train"])
    found = core.language_metrics(sums, data.groups[examples.rows], unigram, spelt)
    found["accuracy_over_padding"] = over_padding(sums, examples)
    answered, lines = {}, []
    if answers:
        answered, lines = answer_figures(model, data, examples.rows, parts["train"].rows, cfg, world, poll)
    numbers, groups = data.numbers[examples.rows], data.groups[examples.rows]
    losses = runs.loss_lines(part, numbers, groups, sums, spelt)
    return {f"{part}/{name}": value for name, value in (found | answered).items()}, losses, lines


def unigram_losses(examples, train) -> np.ndarray:
    """Summed loss of each row's targets by how often each token is a target in training."""
    logs = log_shares(train)
    return np.array([-logs[ids].sum() for ids in examples.wanted()])


@functools.lru_cache(maxsize=1)
def log_shares(train) -> np.ndarray:
    """(V,): how often each token is a target (Witten-Bell: as many unseen ones as there are kinds). One more
    of each of 50,000 tokens, as sft.py counts, would drown five letters.
    """
    counts = np.bincount(np.concatenate(train.wanted()), minlength=len(train.data.tokenizer)).astype(float)
    kinds = np.count_nonzero(counts)
    counts[counts == 0] = kinds / max(1, len(counts) - kinds)
    return np.log(counts / counts.sum())


def spelt_bytes(examples) -> np.ndarray:
    """Bytes that each row's targets spell."""
    sizes = corpus.token_bytes(examples.data.tokenizer)
    return np.array([sizes[ids].sum() for ids in examples.wanted()], dtype=np.int64)
