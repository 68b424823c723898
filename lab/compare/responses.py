"""responses.json: rows answered by models, found again in every file by prompt and occurrence."""

from pathlib import Path

from lab.data.cache import is_clean
from lab.data.instructions import prompt_hash
from lab.data.tables import read_rows, require_columns
from lab.errors import UserError
from lab.run.files import is_there


def read_responses(path) -> list[dict]:
    """Reads responses.json: instruction, input, output, model_response. UserError for
    a row that is not text."""
    if not is_there(Path(path).parent):
        raise UserError(f"{path}: there is no such folder, and no run has such a tag")
    if not is_there(path):
        raise UserError(f"{path} is not there: answer first, by eval.py --mode generate")
    rows = read_rows(str(path))
    require_columns(rows, ("instruction", "model_response"), path)
    for number, row in enumerate(rows, start=1):
        row = row if isinstance(row, dict) else {}
        texts = [row.get(name) for name in ("instruction", "model_response")]
        texts += [row.get(name) or "" for name in ("input", "output")]
        if not all(isinstance(text, str) and is_clean(text) for text in texts):
            raise UserError(f"{path}: row {number} holds something else than text: mend or remove it")
    return rows


def numbered(lines) -> dict:
    """(prompt, occurrence number) -> line with this `group`: a key that is the same in every file."""
    seen, by_key = {}, {}
    for line in lines:
        count = seen[line["group"]] = seen.get(line["group"], 0) + 1
        by_key[line["group"], count] = line
    return by_key


def by_prompt(rows) -> dict:
    """`numbered` of rows of responses.json."""
    return numbered([row | {"group": group_of(row)} for row in rows])


def group_of(row) -> str:
    return prompt_hash(row["instruction"], row.get("input") or "")
