"""Tables of every kind read alike; what cannot be read is named."""

import csv
import json
import zipfile

import pytest

import core
from core import UserError
from lab.data import tables

ROWS = [{"id": "1", "text": 'a "quoted", line\nbroken'}, {"id": "2", "text": "ü €"}]


def write(path, rows=ROWS):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:  # Excel writes the mark
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


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
        ("latin.csv", b"id\n\xe9\n", ["latin.csv cannot be read as csv: it is not UTF-8"]),
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
