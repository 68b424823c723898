"""What is asked of a model: rows as they would be trained on, lines, and what is neither."""

import datetime
import decimal
import json
from pathlib import Path

import pytest

from lab.compare import prompts
from lab.compare.responses import read_responses
from lab.data.paths import text_files
from lab.errors import UserError


def test_prompts_of_a_text_file_end_at_line_feeds_only():
    lines = ["What is a river?", "one\u2028two", "page\x0ctwo", "next\x85line", "", "last"]
    Path("prompts.txt").write_bytes("\r\n".join(lines).encode() + b"\n")
    (file,) = text_files("prompts.txt")
    assert prompts.prompts_in(file) == lines


def test_a_row_to_be_answered_is_read_as_one_to_be_trained_on():
    assert prompts.asked({"instruction": " a ", "input": "nan"}, 1, "t.json") == ("a", "")
    for row in ({"instruction": None}, {"instruction": "nan"}, ["a"], {"instruction": "a\ud800"}):
        with pytest.raises(UserError, match=r"t\.json: row 7 has no usable instruction"):
            prompts.asked(row, 7, "t.json")


def parquet(**columns):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(
        pa.table({name: pa.array([value]) for name, value in columns.items()}), "rows.parquet"
    )


def test_dates_and_decimals_of_a_table_are_written_as_text():
    """They raised a TypeError when all was answered."""
    day = datetime.date(2024, 2, 29)
    row = {
        "instruction": "Say so.",
        "day": day,
        "at": datetime.datetime(2024, 2, 29, 12),
        "some": [day, None],
    }
    parquet(**row, price=decimal.Decimal("1.50"), id=7, share=0.5)
    rows, texts = prompts.read_prompts("rows.parquet", None, "alpaca")
    wanted = {"day": "2024-02-29", "at": "2024-02-29 12:00:00", "some": ["2024-02-29", None]}
    wanted |= {"instruction": "Say so.", "price": "1.50", "id": 7, "share": 0.5}
    assert rows == [wanted] and "Say so." in texts[0]
    Path("responses.json").write_text(json.dumps([rows[0] | {"model_response": "so"}]))
    assert read_responses("responses.json")[0]["price"] == "1.50"


@pytest.mark.parametrize("cell", [b"\xff\x00", [{"bytes": b"png"}]])
def test_bytes_are_refused_before_anything_is_answered(cell):
    parquet(instruction="Describe.", image=cell)
    with pytest.raises(UserError, match=r"rows.parquet: row 1, column image holds bytes: leave it out"):
        prompts.read_prompts("rows.parquet", None, "alpaca")


def test_built_in_rows_are_asked_and_built_in_text_is_refused_by_its_name():
    """Both were looked for on the Hub."""
    rows, texts = prompts.read_prompts("python-instructions", 3, "journal")
    assert len(rows) == len(texts) == 3
    assert all(row["instruction"] in text for row, text in zip(rows, texts, strict=True))
    with pytest.raises(UserError, match="python-docs is text to be measured on and has no prompts: use"):
        prompts.read_prompts("python-docs", None, "alpaca")
    Path("blank.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"blank.txt has no prompts"):
        prompts.read_prompts("blank.txt", None, "alpaca")
