"""MathQA's multiple-choice problems: tables -> parsed rows and options -> token ids -> splits."""

import functools
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from lab.data.builtin import built_in_fingerprint, built_in_problems
from lab.data.cache import BadRows, cached_rows, is_clean, write_texts
from lab.data.columns import LETTERS, PROBLEM_COLUMNS
from lab.data.instructions import Instructions, lines_on_known, prompt_hash
from lab.data.paths import TABLES, data_files, files_of, is_one_set
from lab.data.split import split_by_group
from lab.data.tables import columns_of, data_fingerprint, hub_split, read_rows, require_columns
from lab.data.tokenizers import begin_facts, begin_ids, tokenizer_fingerprint
from lab.errors import UserError
from lab.run.files import is_there, joint_hash

OTHER_NAMES = {"Problem": "question"}  # AQuA's
BUILT_IN = "template-problems"
MOST_BAD = 0.05  # share of rows: some of MathQA's have fewer than five options
FIRST = 2  # pieces of a problem before its first answer


def parse(row) -> tuple[str, list[str], int]:
    """(problem, its five options, number of the right one). ValueError names the fault."""
    if not isinstance(row, dict):
        raise ValueError("no object with columns")
    problem, options, correct = (row.get(name, row.get(OTHER_NAMES.get(name))) for name in PROBLEM_COLUMNS)
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("the problem is empty")
    options = parse_options(options)
    if not all(map(is_clean, [problem, *options])):
        raise ValueError("odd Unicode (a lone surrogate)")
    letter = str(correct).strip().lower()
    if letter not in tuple(LETTERS):
        raise ValueError("the right answer is none of a to e")
    return problem.strip(), options, LETTERS.index(letter)


def parse_options(options) -> list[str]:
    """The five texts behind `a )` to `e )`, of a string in any of MathQA's three spellings, of one with the
    labels `(a)` or `a.`, of a list, or of an object {"a": ...}.

    Cut where the labels stand, in order: commas (1,000) and parentheses are text.
    """
    if isinstance(options, dict) and [str(name).lower() for name in options] == [*LETTERS]:
        options = list(options.values())
    if isinstance(options, list):  # AQuA: ["A)32400", ...]
        texts = ["" if text is None else str(text).strip() for text in options]
    elif isinstance(options, str):
        texts = _cut(options)
    else:
        raise ValueError("options are no text")
    if len(texts) != len(LETTERS):
        raise ValueError("options are not five, a ) to e )")
    texts = _without_labels(texts)
    if not all(texts):
        raise ValueError("an option is empty")
    return texts


LABEL, IN_PARENTHESES, DOTTED = r"{} ?\)", r"\( ?{} ?\)", r"{} ?[.:]"  # of one option, {} is its letter


def _cut(options) -> list[str]:
    """The five options of a string with their labels; empty if there are not five."""
    if len(options) > 10_000:
        raise ValueError("options are over 10,000 characters")
    # behind a comma if they all are, so that "( 2 + b )" is text
    starts = _marks(options, r"(?:^[\s\['\"]*|,[\s'\"]*)", LABEL)
    if re.match(r"[\s\['\"]*\( ?a ?\)", options, re.I):
        starts = _marks(options, "", IN_PARENTHESES)
    dotted = r"(?:^[\s\['\"]*|[\s,;]['\"]*)"
    starts = starts or _marks(options, r"(?<![a-z0-9])", LABEL) or _marks(options, dotted, DOTTED, once=True)
    texts = [options[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)] if starts else []
    if options.lstrip().startswith("["):  # "['a ) 8', 'b ) 1', ...]"
        return [re.sub(r"['\"][\s,]*\]?[\s'\"]*$", "", text) for text in texts]
    return [text.rstrip(" ,;\r\n\t") for text in texts]


def _without_labels(texts) -> list[str]:
    """Texts without their labels, of which one may stand twice: "a ) a ) 17"."""
    pairs = list(zip(LETTERS, texts, strict=True))
    labels = [IN_PARENTHESES, LABEL]
    if all(re.match(DOTTED.format(letter), text, re.I) for letter, text in pairs):
        labels.append(DOTTED)
    patterns = {letter: "|".join(label.format(letter) for label in labels) for letter in LETTERS}
    return [re.sub(rf"^(?:(?:{patterns[x]})\s*)+", "", text, flags=re.I) for x, text in pairs]


def _marks(options, before, label, once=False) -> list[int]:
    """Where the labels of a to e begin, in this order, each behind the pattern `before`; or none. `once`: nor
    if a label stands twice, since one of them is text."""
    starts, at = [], 0
    for letter in LETTERS:
        pattern = re.compile(f"{before}({label.format(letter)})", re.I)
        mark = pattern.search(options, at)
        if mark is None or (once and len(pattern.findall(options)) > 1):
            return []
        starts.append(mark.start(1))
        at = mark.end()
    return starts


PARTS = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}  # how files begin
SINGLE = {None: "train"}  # the same of a single table, in place of official_parts


def official_parts(name) -> dict[str, str] | None:
    """What a data set calls its parts: {"train": ..., "val": ..., "test": ...}; None for a single table."""
    if not is_there(name):  # on the Hub: all of them, unless one is named
        named = hub_split(name, None)
        return None if named else {"train": "train", "val": "validation", "test": "test"}
    tables = [file for file in data_files(name) if file.form in TABLES]
    if len(tables) < 2 or is_one_set(tables) or len(files_of("train", tables)) == len(tables):
        return None
    found = {part: next((p for p in begins if files_of(p, tables)), None) for part, begins in PARTS.items()}
    if missing := [PARTS[part][0] for part, begin in found.items() if begin is None]:
        there = ", ".join(sorted(table.name for table in tables)[:20])
        raise UserError(f"{name} holds {there}, none of them {missing[0]}...: add it, or name one file")
    return found


@dataclass
class Problems(Instructions):
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
        """Ids of problem `asked`, of option `option` of `row` behind it, and the end token."""
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
    rows = cached_rows(world, "problems", problems_key, write_problems, cfg, tokenizer)
    return Problems(
        texts=rows.columns["texts"],
        categories=[None] * len(rows.columns["texts"]),
        numbers=np.array(rows.columns["numbers"]),
        groups=np.array(rows.columns["groups"]),
        tokens=rows.tokens,
        offsets=rows.offsets,
        tokenizer=tokenizer,
        fingerprint=rows.fingerprint,
        lines=rows.columns["lines"],
        options=rows.columns["options"],
        right=np.array(rows.columns["right"]),
        part=rows.columns["part"],
    )


def problems_key(cfg, tokenizer) -> dict:
    """All that the cached rows depend on."""
    if cfg.data == BUILT_IN:
        source = built_in_fingerprint(cfg.data)
    else:
        parts = official_parts(cfg.data)
        source = joint_hash([data_fingerprint(cfg.data, begin) for begin in (parts or SINGLE).values()])
    words = tokenizer_fingerprint(tokenizer)
    fingerprint = {"data": source, "tokenizer": words, "answer_format": cfg.answer_format}
    fingerprint |= begin_facts(tokenizer)
    return {
        "fingerprint": fingerprint,
        "built in": cfg.data == BUILT_IN,
        "max_documents": cfg.max_documents,
    }


def read_parts(cfg) -> list[tuple[str | None, dict]]:
    """(part, row) of every row; max_documents counts in each part."""
    if cfg.data == BUILT_IN:
        return [(None, row) for row in built_in_problems()[: cfg.max_documents]]
    found = []
    for part, begin in (official_parts(cfg.data) or SINGLE).items():
        rows = read_rows(cfg.data, cfg.max_documents, begin)
        names = columns_of(rows)
        require_columns(
            rows, [OTHER_NAMES[c] if OTHER_NAMES.get(c) in names else c for c in PROBLEM_COLUMNS], cfg.data
        )
        found += [(part, row) for row in rows]
    return found


def write_problems(folder, cfg, tokenizer) -> dict:
    """Usable rows -> token ids in `folder`; gives the columns to keep."""
    usable, numbers, lines = usable_rows(read_parts(cfg), cfg.data)
    pieces = [text for _, p, options, _ in usable for text in as_read(p, options, cfg.answer_format)]
    return {
        "integers": write_texts(folder, pieces, tokenizer, begin_ids(tokenizer), every=FIRST + len(LETTERS)),
        "numbers": numbers,
        "lines": lines,
        "part": [part for part, *_ in usable],
        "options": [options for _, _, options, _ in usable],
        "right": [right for *_, right in usable],
        "texts": [[problem, "", options[right]] for _, problem, options, right in usable],
        "groups": [prompt_hash(problem, "") for _, problem, _, _ in usable],
    }


def usable_rows(rows, name) -> tuple[list, list[int], list[str]]:
    """[(part, problem, options, number of the right one)] of (part, row), their numbers in each part, and
    what to say; unusable rows are counted and named."""
    bad, usable, numbers = BadRows(MOST_BAD), [], []
    counts = defaultdict(lambda: itertools.count(1))
    for part, row in rows:
        number = next(counts[part])
        try:
            usable.append((part, *parse(row)))
            numbers.append(number)
        except ValueError as error:
            bad.add(f"{part} {number}" if part else number, error)
    lines = bad.report(len(rows), name)
    if name != BUILT_IN and "annotated_formula" in columns_of(row for _, row in rows):
        lines.append("a quarter of MathQA's own formulas disagree with its labels: the ceiling is low")
    if twins := sum(options.count(options[right]) > 1 for _, _, options, right in usable):
        lines.append(f"{twins} row(s) have the right option twice: either counts as right")
    return usable, numbers, lines


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
        drawn = split_by_group(data.groups, np.zeros(len(data)), list(SHARES.values()), cfg.split_seed)
        parts = {name: np.flatnonzero(drawn == i) for i, name in enumerate(SHARES)}
        lines = ["a single table: 80 % train, 10 % val, 10 % test, drawn by problem"]
    # the last token is no input
    fits = data.prompt_lengths + data.pieces[:, FIRST:].max(1) <= cfg.max_length
    if not fits.all():
        left = "  ".join(f"{name} {(~fits[rows]).sum()} of {len(rows)}" for name, rows in parts.items())
        lines.append(f"left out, over {cfg.max_length} tokens: {left}")
    parts = {name: rows[fits[rows]] for name, rows in parts.items()}
    if empty := [name for name, rows in parts.items() if not len(rows)]:
        raise UserError(f"{cfg.data} leaves no {empty[0]} rows: use more rows or a larger --max_length")
    return parts, [*lines, *lines_on_known(data, parts, "problem")]
