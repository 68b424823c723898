"""Tables of every kind read alike; what cannot be read is named."""

import csv
import json
import zipfile
from pathlib import Path

import pytest

import core
from core import UserError
from lab.data import tables

ROWS = [{"id": "1", "text": 'a "quoted", line\nbroken'}, {"id": "2", "text": "ü €"}]


def write(path, rows=ROWS):
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:  # Excel writes the mark
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow.feather
        import pyarrow.parquet

        writes = {".parquet": pyarrow.parquet.write_table, ".arrow": pyarrow.feather.write_feather}
        writes[path.suffix](pyarrow.Table.from_pylist(rows), str(path))
    return path


def refusal(name) -> str:
    """The one line with which read_rows refuses a name."""
    with pytest.raises(UserError) as error:
        core.read_rows(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


def read(name, content) -> list:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return core.read_rows(name)


@pytest.mark.parametrize("suffix", tables.TABLES)
def test_every_kind_of_table_reads_alike_alone_zipped_and_in_a_folder(tmp_path, suffix):
    path = write(tmp_path / f"train{suffix}")
    assert core.read_rows(str(path)) == ROWS
    assert core.read_rows(str(path), 1) == ROWS[:1]
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w") as archive:
        archive.write(path, path.name)
        archive.writestr("test.csv", "id\n7\n")
    assert core.read_rows(str(tmp_path / "kaggle.zip")) == ROWS
    assert core.read_rows(str(tmp_path / "kaggle.zip"), prefer="test") == [{"id": "7"}]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / f"train_1{suffix}")
    write(tmp_path / "folder" / f"train_2{suffix}")
    assert core.read_rows(str(tmp_path / "folder")) == ROWS + ROWS


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path):
    rows = [{"id": "1", "text": "x" * 200_000}]
    assert core.read_rows(str(write(tmp_path / "a.csv", rows))) == rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.csv", None, ["no such file", "missing.csv"]),
        ("./nowhere/x", None, ["no such file", "nowhere"]),
        ("broken.jsonl", '{"id": 1}\n{"id"', ["broken.jsonl line 2 is no JSON"]),
        ("broken.zip", "not a zip", ["broken.zip", "whole zip"]),
        ("broken.parquet", "not parquet", ["broken.parquet", "cannot be read as parquet"]),
        ("notes.txt", "hello", ["notes.txt", "no table", ".csv"]),
        ("latin.csv", b"id\n\xe9\n", ["latin.csv line 2 is not UTF-8 (byte 0xe9)"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        core.read_rows(name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_fingerprint_follows_the_bytes(tmp_path):
    path = write(tmp_path / "train.csv")
    before = tables.data_fingerprint(str(path))
    assert tables.data_fingerprint(str(path)) == before
    write(path, [*ROWS, {"id": "3", "text": ""}])
    assert tables.data_fingerprint(str(path)) != before


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a,b\n1,2\n3,4,5\n", "t.csv row 2 (line 3) has 3 cells under 2 columns: quote cells"),
        ("a,b\n\n1,2\n3\n", "t.csv row 2 (line 4) has 1 cells under 2 columns"),
        ('a,b\n"1\n1",2\n3,4,5\n', "t.csv row 2 (line 4) has 3 cells"),
        ('a,b\n1,2\n"he said \\"no\\"",2\n', "t.csv row 2 (line 3): a quote inside a cell is not doubled"),
        ('a,b\n1,2\n"open,2\n5,6\n', "t.csv row 2 (line 3): a cell's quotes are never closed"),
        ("a,b\n1\r1,2\n", "t.csv row 1 (line 2): a carriage return stands outside quotes"),
        ("a;b\n1;2,3\n", "t.csv row 1 (line 2) has 2 cells under 1 column: is it separated by ';'?"),
        ("a,b,a\n1,2,3\n", "t.csv has the column a twice"),
        ("a,b\n1,\0\n", "t.csv line 2 holds a NUL byte"),
        ("a,b\n1,2\n".encode("utf-16"), "t.csv line 1 is not UTF-8 (byte 0xff)"),
    ],
)
def test_csv_is_read_as_written_or_refused_with_its_row_and_line(content, line):
    Path("t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal("t.csv").startswith(line)


def test_a_row_of_another_width_is_found_wherever_it_stands():
    rows = ["1,2\n"] * 5000
    rows[4000] = "1,2,3\n"
    Path("t.csv").write_text("a,b\n" + "".join(rows))
    assert refusal("t.csv").startswith("t.csv row 4001 (line 4002) has 3 cells")


LISTED = [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize("form", ["json", "jsonl", "ndjson"])
@pytest.mark.parametrize(
    "content",
    [
        '\n [{"a": "1"}, {"a": "2"}]\n',
        '\ufeff[{"a": "1"},\n{"a": "2"}]',
        '{"a": "1"}\n{"a": "2"}',
        '\r\n{"a": "1"}\r\n\r\n{"a": "2"}\r\n',
        '{\n "a": "1"\n}\n{\n "a": "2"\n}\n',
        '{\n "version": 1, "names": ["a"],\n "data": [\n {"a": "1"},\n {"a": "2"}\n ]\n}',
    ],
)
def test_json_is_a_list_a_row_a_line_a_row_on_several_lines_or_a_list_under_one_key(content, form):
    assert read(f"t.{form}", content) == LISTED


def test_an_object_on_one_line_holds_rows_in_json_and_is_a_row_in_jsonl():
    line = '{"version": 1, "data": [{"a": "1"}, {"a": "2"}]}'
    assert read("t.json", line) == LISTED
    assert read("t.jsonl", line) == [{"version": 1, "data": LISTED}]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            '[{"a": 1},\n\n{"a" 2}]',
            "t.json cannot be read as json: line 3 is no JSON (Expecting ':' delimiter)",
        ),
        ('{"a": 1}\n{"a": 2}\n{"a"\n', "t.json line 3 is no JSON"),
        ('\n{\n"a": 1}\n{"a": 2', "t.json cannot be read as json: line 4 is no JSON"),
        ('{"x": [{"a": 1}],\n "y": [{"a": 1}]}', "t.json holds lists of rows under x and y"),
        ("[" * 100_000, "t.json is nested too deeply"),
        ('{"a":' * 100_000, "t.json is nested too deeply"),
        ('[{"a": ' + "9" * 5000 + "}]", "t.json cannot be read as json: line 1 is no JSON"),
    ],
)
def test_what_is_no_json_is_named_with_its_line(content, line):
    Path("t.json").write_text(content)
    assert refusal("t.json").startswith(line)


def test_lines_end_at_line_feeds_only():
    rows = [{"a": "one\u2028two\x0cthree\x85four\x1cfive"}, {"a": "x"}]
    assert read("t.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)) == rows
    assert read("t.csv", 'a\n"one\u2028two\x0cthree\x85four\x1cfive"\nx\n') == rows


def test_a_missing_cell_is_none_in_every_format():
    import pyarrow

    assert read("t.json", '[{"a": NaN, "b": null}, {"a": "NaN", "b": 1e3}]') == [
        {"a": None, "b": None},
        {"a": "NaN", "b": 1000.0},
    ]
    words = ["nan", "NaN", "<NA>", "null", "NULL", "#N/A", "None", "", "NA"]
    kept = [row["a"] for row in read("t.csv", "a,b\n" + "".join(f"{word},\n" for word in words))]
    assert kept == [None] * 6 + ["None", "", "NA"]
    pyarrow.parquet.write_table(pyarrow.table({"a": [1.5, float("nan"), None]}), "t.parquet")
    assert core.read_rows("t.parquet") == [{"a": 1.5}, {"a": None}, {"a": None}]


def test_dates_that_python_lacks_and_damaged_columns_are_one_line():
    import pyarrow.parquet

    days = pyarrow.array([1, 2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"id": ["1", "2"], "when": days}), "t.parquet")
    assert refusal("t.parquet").startswith("t.parquet cannot be read as parquet (column when, rows 1 to 2: ")
    text = pyarrow.array([b"fine", b"\xff\xfe"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), "t.parquet")
    assert refusal("t.parquet").startswith("t.parquet cannot be read as parquet (row 1: ")


@pytest.mark.parametrize("form", ["stream", "file"])
def test_an_empty_batch_amid_an_arrow_file_ends_nothing(form):
    import pyarrow.ipc

    schema = pyarrow.Table.from_pylist(ROWS).schema
    opened = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with opened("t.arrow", schema) as writer:
        for rows in (ROWS[:1], [], ROWS[1:], []):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
    assert core.read_rows("t.arrow") == ROWS


def test_a_flipped_bit_in_the_offsets_of_an_arrow_file_is_refused_and_crashes_nothing():
    """Without a full validation of each batch, pyarrow reads outside its memory: a segmentation fault."""
    import pyarrow.ipc

    table = pyarrow.table({"text": [f"row {i}" for i in range(100)]})
    with pyarrow.ipc.new_stream("t.arrow", table.schema) as writer:
        writer.write_table(table)
    content = bytearray(Path("t.arrow").read_bytes())
    at = content.find(b"".join(i.to_bytes(4, "little") for i in (0, 5, 10, 15)))
    content[at + 11] ^= 0x40  # the third offset is now over a thousand million
    assert at > 0
    Path("t.arrow").write_bytes(content)
    assert refusal("t.arrow").startswith("t.arrow cannot be read as arrow (row 1: ")


def test_a_named_split_of_a_hub_set_is_read_and_named():
    assert tables.hub_split("owner/set") == "train" and tables.hub_split("set:a b@1.0#dev") == "dev"
    form = tables._hub_form("owner/set:config@main#validation")
    assert form.groupdict() == {
        "repo": "owner/set",
        "config": "config",
        "revision": "main",
        "split": "validation",
    }


def test_columns_are_those_of_all_rows():
    rows = [{"a": 1}] * 500 + [7, {"b": 2}]
    assert tables.columns_of(rows) == ["a", "b"]
    tables.require_columns(rows, ["b"], "t.json")
    with pytest.raises(UserError) as error:
        tables.require_columns([{"a\n\x1b[31m": 1}], ["b"], "t.json")
    assert str(error.value) == r"t.json lacks column(s) b; found: a\n\x1b[31m"
