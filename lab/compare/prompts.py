"""What eval.py --mode generate asks: rows of instructions, or text, one prompt a line."""

import datetime
import decimal
import json

from lab.data.builtin import BUILT_IN, python_instructions
from lab.data.columns import INSTRUCTION_COLUMNS
from lab.data.paths import text_files
from lab.data.tables import columns_of, read_rows, require_columns, text_lines
from lab.data.templates import (
    COLUMNS,
    Chat,
    as_texts,
    before_answer,
    messages_of,
    parse,
    prompt_text,
    user_turn,
)
from lab.data.tokenizers import prompt_ids
from lab.errors import UserError


def read_prompts(data, most, template) -> tuple[list[dict], list[str | list[dict]]]:
    """(rows with all their columns, as responses.json holds them; the prompt of each, of template chat its
    turns), `most` of them. UserError where there are none."""
    wanted = "use python-instructions, instruction rows, or text, one prompt a line"
    if data in BUILT_IN:
        raise UserError(f"{data} is text to be measured on and has no prompts: {wanted}")
    if files := text_files(data):
        lines = [line for file in files for line in prompts_in(file) if line.strip()]
        rows = [{"instruction": line, "input": "", "output": ""} for line in lines][:most]
        texts = [row["instruction"] for row in rows]
    else:
        rows = python_instructions()[:most] if data == "python-instructions" else read_rows(data, most)
        if not {*COLUMNS} & {*columns_of(rows)}:
            require_columns(rows, ("instruction",), data)
        texts = [prompt_of(row, n, data, template) for n, row in enumerate(rows, start=1)]
        rows = [writable(row, n, data) for n, row in enumerate(rows, start=1)]
    if not rows:
        raise UserError(f"{data} has no prompts: {wanted}")
    return rows, texts


def prompts_in(file) -> list[str]:
    """The lines of a text file; only \\n and \\r\\n end one."""
    with file.open() as stream:
        return [line.removesuffix("\n").removesuffix("\r") for line in text_lines(stream, file)]


def prompt_of(row, number, data, template) -> str | list[dict]:
    """A row's prompt as text; of template chat the turns before its answer."""
    if template != "chat":
        return prompt_text(*asked(row, number, data), template)
    messages = turns_of(row, number, data)
    return before_answer(messages) if messages else [user_turn(*asked(row, number, data))]


def turns_of(row, number, data) -> list[dict] | None:
    """A row's messages, with or without an answer; None if it has none."""
    try:
        return messages_of(row, answered=False)
    except ValueError as error:
        raise UserError(f"{data}: row {number} has no usable messages ({error}): mend it") from None


def asked(row, number, data) -> tuple[str, str]:
    """(instruction, input) of a row. UserError without an instruction."""
    try:
        row = row | {"output": ""} if isinstance(row, dict) else row
        instruction, given, _ = parse(row, answered=False)
    except ValueError as error:
        raise UserError(f"{data}: row {number} has no usable instruction ({error}): mend it") from None
    return instruction, given


def as_ids(tokenizer, prompts, data) -> list[list[int]]:
    """Ids of prompts: of texts, or of turns under the tokenizer's chat template."""
    chat = Chat(tokenizer) if any(isinstance(prompt, list) for prompt in prompts) else None
    try:
        return [chat.question(p) if isinstance(p, list) else prompt_ids(tokenizer, p) for p in prompts]
    except ValueError as error:
        raise UserError(f"{data} cannot be asked under --template chat: {error}") from None


def writable(row, number, data) -> dict:
    """A row of a table as JSON holds it: dates, times and decimals as their text. UserError for other cells
    (bytes), which would be found when all prompts were answered."""
    cells = {}
    if row.get("instruction") is None:  # messages alone
        cells = dict(zip(INSTRUCTION_COLUMNS, as_texts(turns_of(row, number, data)), strict=True))
    for name, cell in row.items():
        if cell is None and name in cells:
            continue
        try:
            cells[name] = json.loads(json.dumps(cell, default=as_text))
        except TypeError as error:
            raise UserError(f"{data}: row {number}, column {name} holds {error}: leave it out") from None
    return cells


def as_text(cell) -> str:
    """TypeError names the kind of what has no plain text."""
    if isinstance(cell, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(cell)
    raise TypeError(type(cell).__name__)
