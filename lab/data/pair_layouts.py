"""What a row of preferences may look like: Arena's columns with a winner, two conversations with a winner in
words, or a chosen and a rejected answer; told apart by their columns. Any may hold three probabilities, too.

A usable row is (id, turns, class number, probabilities or None); turns are [prompt, a, b], one a turn."""

import hashlib
import json
import re
from collections import Counter

from lab.data.cache import BadRows, first_few, is_clean
from lab.data.columns import LABELS, PAIR_COLUMNS, SOFT, TEXTS
from lab.data.tables import columns_of, is_missing, require_columns
from lab.errors import UserError

UNKNOWN = -1  # label of a row without a winner: one that is to be judged, or that has probabilities only
WINNERS = {"model_a": 0, "model_b": 1, "tie": 2, "tie (bothbad)": 2, "both_bad": 2, "bothbad": 2}
LAYOUTS = {  # columns -> what such rows are called
    ("prompt", "response_a", "response_b"): "a prompt with responses A and B",
    ("conversation_a", "conversation_b", "winner"): "conversations A and B",
    ("chosen", "rejected"): "a chosen and a rejected answer, which of them is A drawn by the row's hash",
}
SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # marks of the turns of a conversation in one string


class SaysNothing(ValueError):
    """Why a row is left out that is no mistake: however many there are, they are only counted."""


def usable_rows(rows, name, needs_winner=True) -> tuple[list, list[str]]:
    """[(id, turns, class number, probabilities)] of the usable rows, and lines on what they are and which
    are left out. needs_winner: rows that only have probabilities are left out."""
    layout, parse_row = layout_of(rows, name)
    bad, usable, empty = BadRows(), [], {}
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, dict):
                raise ValueError("no row of columns")
            usable.append(parse_row(row, number, needs_winner))
        except SaysNothing as reason:
            empty.setdefault(str(reason), []).append(number)
        except ValueError as error:
            bad.add(number, error)
    lines = [f"left out {len(where)} row(s), {why}: {first_few(where)}" for why, where in empty.items()]
    if empty and not usable:
        raise UserError(f"{name}: no row is left to learn from: {'; '.join(lines)}")
    return usable, [f"rows are {LAYOUTS[layout]}", *lines, *bad.report(len(rows), name)]


def layout_of(rows, name) -> tuple:
    """(the columns by which a table's rows are known, the function that parses one). UserError for others."""
    there, soft = set(columns_of(rows)), set(SOFT) <= set(columns_of(rows))
    parsers = dict(zip(LAYOUTS, (parse, parse_conversations, parse_chosen), strict=True))
    layout = next((columns for columns in parsers if there >= set(columns)), None)
    if layout is None or layout == next(iter(LAYOUTS)):
        needed = [column for column in PAIR_COLUMNS if not (soft and column in LABELS.values())]
        require_columns(rows, needed, name)
    if layout == ("chosen", "rejected") and soft:
        raise UserError(f"{name}: {', '.join(SOFT)} need columns A and B, not chosen and rejected: drop them")
    return layout or next(iter(LAYOUTS)), parsers.get(layout, parse)


# -- Arena's columns ---------------------------------------------------------------------------------------


def listed(row, column) -> list:
    """One cell that is a list, or the JSON of one. ValueError names the fault."""
    cell = row.get(column)
    if cell is None or cell == "":
        raise ValueError(f"{column} is empty")
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        raise ValueError(f'{column} is no JSON (a text is written ["text"])') from None


def turns(row, column) -> list[str]:
    """One cell: a JSON list of strings, one per turn, null for an empty one. ValueError names the fault."""
    texts = listed(row, column)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str | None) for t in texts):
        raise ValueError(f"{column} is no list of strings")
    return [clean(text or "", column) for text in texts]


def clean(text, column) -> str:
    if not is_clean(text):
        raise ValueError(f"{column} has odd Unicode (a lone surrogate)")
    return text


def winner(row) -> int:
    """Class number in the order of LABELS."""
    flags = [str(row.get(column)).strip().lower() in ("1", "1.0", "true") for column in LABELS.values()]
    if sum(flags) != 1:
        raise ValueError("no winner" if not any(flags) else "several winners")
    return flags.index(True)


def parse(row, number=None, needs_winner=True) -> tuple:
    """A usable row of Arena's columns. ValueError names the fault."""
    if not isinstance(row, dict) or row.get("id") is None:
        raise ValueError("no id")
    texts = [turns(row, column) for column in TEXTS]
    if len({len(text) for text in texts}) != 1:
        raise ValueError("prompt and responses differ in their number of turns")
    silent = all(is_missing(row.get(column)) or row[column] == "" for column in LABELS.values())
    label, soft = label_of(row, winner, silent, needs_winner)
    return row_id(row, ("id",), number), [list(turn) for turn in zip(*texts, strict=True)], label, soft


def label_of(row, read, silent, needs_winner) -> tuple[int, list[float] | None]:
    """(class number, probabilities or None) of a row; silent: it has no winner."""
    soft = probabilities(row)
    return (UNKNOWN if silent and soft and not needs_winner else read(row)), soft


def probabilities(row) -> list[float] | None:
    """Of A, B and tie, with a sum of 1; None for a row without. ValueError where they are none."""
    cells = [row.get(column) for column in SOFT]
    if all(is_missing(cell) or cell == "" for cell in cells):
        return None
    try:
        values = [float(cell) for cell in cells]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{', '.join(SOFT)} are no three numbers") from None
    if not all(0 <= value <= 1 for value in values) or not abs(sum(values) - 1) < 0.01:
        raise ValueError(f"{', '.join(SOFT)} are no probabilities with a sum of 1")
    return [value / sum(values) for value in values]


def row_id(row, columns, number) -> str:
    """What the first of `columns` holds that is there; else the row's number in its table, from 1."""
    known = (str(row[column]) for column in columns if row.get(column) not in (None, ""))
    return clean(next(known, str(number)), "id")


# -- conversations -----------------------------------------------------------------------------------------


def parse_conversations(row, number, needs_winner=True) -> tuple:
    """A usable row of the 33k conversations: lists of messages (role, content), and who won in words."""
    first, second = (
        conversation(listed(row, column), column) for column in ("conversation_a", "conversation_b")
    )
    if [asked for asked, _ in first] != [asked for asked, _ in second]:
        raise ValueError("the two conversations ask different things")
    both = [[asked, a, b] for (asked, a), (_, b) in zip(first, second, strict=True)]
    silent = is_missing(row.get("winner")) or row["winner"] == ""
    label, soft = label_of(row, winner_in_words, silent, needs_winner)
    return row_id(row, ("id", "question_id"), number), both, label, soft


def winner_in_words(row) -> int:
    word = str(row.get("winner")).strip().lower()
    if word not in WINNERS:
        raise ValueError(f"winner is none of {', '.join(WINNERS)}")
    return WINNERS[word]


def conversation(messages, column) -> list[tuple[str, str]]:
    """[(what was asked, the answer)] of a list of messages; a system message belongs to the first prompt.
    ValueError names the fault."""
    found, asked = [], []
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column} is no list of messages")
    for message in messages:
        role, text = said(message, column)
        if role in ("assistant", "gpt", "model"):
            found.append(("\n\n".join(asked), text))
            asked = []
        else:
            asked.append(text)
    if asked:
        raise ValueError(f"{column} does not end with an answer")
    return found


def said(message, column) -> tuple[str, str]:
    """(role, text) of a message, whose content is a string or a list of parts."""
    role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
    if isinstance(content, list):  # of parts, some of them pictures
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise ValueError(f"{column} has a message without a role or a text")
    return role.lower(), clean(content or "", column)


# -- chosen and rejected -----------------------------------------------------------------------------------


def parse_chosen(row, number, needs_winner=True) -> tuple:
    """A usable row of a chosen and a rejected answer, or conversation: up to where the two part."""
    asked = prompt_of(row)
    good, bad = (answers(row, column, asked) for column in ("chosen", "rejected"))
    both = []
    for (question, better), (other, worse) in zip(good, bad, strict=False):
        if question != other:
            raise ValueError("chosen and rejected answer different prompts")
        both.append([question, better, worse])
        if better != worse:
            break
    if both[-1][1] == both[-1][2]:
        raise SaysNothing("chosen and rejected are the same")
    swaps = hashlib.sha256("\0".join(both[-1]).encode()).digest()[0] % 2
    both = [
        [question, worse, better] if swaps else [question, better, worse] for question, better, worse in both
    ]
    return row_id(row, ("id", "prompt_id", "question_id"), number), both, int(swaps), None


def prompt_of(row) -> str | list | None:
    """The prompt that stands beside the answers: text, or a list of messages; None without one."""
    cell = row.get("prompt")
    if isinstance(cell, list):
        return cell
    if is_missing(cell) and isinstance(row.get("instruction"), str):
        given = row.get("input")
        parts = [row["instruction"], *([given] if isinstance(given, str) and not is_missing(given) else [])]
        return "\n\n".join(filter(None, parts))
    return cell if isinstance(cell, str) else None


def answers(row, column, asked) -> list[tuple[str, str]]:
    """[(prompt, answer)] of a chosen or rejected cell: a list of messages, or its JSON, a conversation in one
    string, or an answer to the prompt `asked`."""
    cell = row.get(column)
    if not isinstance(cell, str | list) or not cell:
        raise ValueError(f"{column} is empty")
    if isinstance(cell, str):
        cell = messages_in(cell, asked)
    if isinstance(cell[0], dict) and cell[0].get("role") == "assistant":
        if asked is None:
            raise ValueError("no prompt: use a column prompt or instruction, or whole conversations")
        before = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        cell = [*before, *cell]
    return conversation(cell, column)


def messages_in(text, asked) -> list:
    """The messages of a string: of JSON, of Human: and Assistant: marks, or the answer that it is."""
    if text.startswith("[{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass  # an answer may begin like this
    before, *parts = SPEAKER.split(text)
    if asked is not None or not parts:
        return [{"role": "assistant", "content": text}]
    roles, spoken = {"Human": "user", "Assistant": "assistant"}, zip(parts[::2], parts[1::2], strict=True)
    messages = [{"role": "system", "content": before.strip()}] if before.strip() else []
    return messages + [{"role": roles[who], "content": what.strip()} for who, what in spoken]


# -- rows that are to be judged ----------------------------------------------------------------------------


def rows_to_judge(rows, name) -> tuple[list, list[str]]:
    """Keeps every row of a file to be judged; UserError for one without an id: it cannot be answered."""
    usable, odd = [], Counter()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.get("id") in (None, ""):
            raise UserError(f"{name}: row {number} has no id: every row to be judged needs one")
        if not is_clean(str(row["id"])):  # the answer could not be written under it
            raise UserError(f"{name}: row {number} has an id with odd Unicode (a lone surrogate): rename it")
        texts, reason = parse_anyway(row)
        usable.append((str(row["id"]), texts, UNKNOWN, None))
        odd.update([reason] if reason else [])
    return usable, [f"{count} row(s) are judged as plain text: {why}" for why, count in odd.items()]


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


# -- what rows have in common ------------------------------------------------------------------------------


def prompt_hash(row_turns) -> str:
    """Rows whose prompts differ in case and white space only share it."""
    text = "\n".join(" ".join(prompt.lower().split()) for prompt, _, _ in row_turns)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def peculiarities(usable) -> list[str]:
    """Lines on ids that are not unique, empty responses and equal ones."""
    lines = []
    if twice := len(usable) - len({row_id for row_id, *_ in usable}):
        lines.append(f"{twice} row(s) have an id that another row has, too")
    empty = sum(not any(turn[side] for turn in texts) for _, texts, *_ in usable for side in (1, 2))
    lines += [f"{empty} empty responses are kept as they are"] if empty else []
    same = sum(all(turn[1] == turn[2] for turn in texts) for _, texts, *_ in usable)
    return lines + ([f"{same} row(s) have identical responses, and are kept"] if same else [])
