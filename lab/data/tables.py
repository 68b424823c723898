"""Rows of tables: CSV, JSON, JSONL, Parquet, zips and folders of them, or a data set on the Hub."""

import csv
import functools
import io
import itertools
import json
import os
import re
import sys
import zipfile
from pathlib import Path

from lab.data.hub import first_line, from_hub
from lab.errors import UserError
from lab.run.files import joint_hash, sha256_file

TABLES = (".csv", ".json", ".jsonl", ".parquet")


def read_rows(name, max_documents=None, prefer="train") -> list[dict]:
    """Reads the rows of a table: a file (CSV, JSON, JSONL, Parquet, or in a zip), a
    folder of them, or a Hub id.

    Of several files in a zip or folder, those whose name starts with `prefer` are read; of a Hub set, its
    `prefer` split. A Hub id may be written `owner/name:config@revision`. UserError for what is not there.
    """
    return list(itertools.islice(stream_rows(name, prefer), max_documents))


def stream_rows(name, prefer="train", streaming=False, shuffled=None):
    """read_rows as a generator, in constant memory except for a JSON list. streaming: fetches only what is
    read. shuffled: a seed for the order of a Hub set that is not streamed."""
    return itertools.chain.from_iterable(_tables(name, prefer, streaming, shuffled))


def data_fingerprint(name, prefer="train", streaming=False) -> str:
    """SHA-256 over the files that read_rows would read: names caches, and shows a resume that data changed.

    Of a Hub set that is streamed: its name and commit.
    """
    if Path(name).is_dir():
        files = _table_files(Path(name), prefer)
    elif Path(name).exists():
        files = [name]
    elif streaming:
        form = _hub_form(name)
        load = functools.partial(_hub_commit, form["repo"], form["revision"])
        commit = from_hub("data set", name, load, "a local file")
        return f"{commit}:{form['config']}" if form["config"] else commit  # its sets share the commit
    else:
        files = [file["filename"] for file in _hub_dataset(name, prefer).cache_files]
    try:
        return joint_hash([sha256_file(file) for file in files])
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None


def _tables(name, prefer, streaming=False, shuffled=None):
    """Yields tables, each an iterable of rows."""
    path = Path(name)
    if path.is_dir():
        for file in _table_files(path, prefer):
            yield _read_table(file.open("rb"), file.suffix, file)
    elif path.suffix == ".zip" and path.exists():
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise UserError(f"{path} is not a whole zip file: fetch it again") from None
        with archive:
            for member in _preferred(archive.namelist(), prefer, path):
                yield _read_table(archive.open(member), Path(member).suffix, f"{path}/{member}")
    elif path.exists():
        yield _read_table(path.open("rb"), path.suffix, path)
    else:
        rows = _hub_dataset(name, prefer, streaming)
        yield rows if shuffled is None else rows.shuffle(seed=shuffled)


def _table_files(folder, prefer) -> list[Path]:
    return [folder / name for name in _preferred(sorted(os.listdir(folder)), prefer, folder)]


def _preferred(names, prefer, where) -> list[str]:
    names = [name for name in names if Path(name).name[0] != "."]  # what a Mac leaves in a zip
    tables = [name for name in names if Path(name).suffix in TABLES]
    chosen = [name for name in tables if Path(name).name.startswith(prefer)]
    if not chosen and len(tables) != 1:
        there = ", ".join(tables) or f"none of {', '.join(TABLES)}"
        raise UserError(f"{where} holds {there}: name one file, or call one {prefer}.csv")
    return chosen or tables


def _read_table(stream, suffix, where):
    """Yields the rows of one table. UserError of one line for a mistake in the file."""
    csv.field_size_limit(1 << 30)  # a long conversation is one field; the default is 131,072 characters
    try:
        with stream:
            if suffix == ".parquet":
                import pyarrow.parquet

                for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1000):
                    yield from batch.to_pylist()
                return
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            if suffix == ".csv":
                yield from csv.DictReader(text, strict=True)
            elif suffix == ".json" and text.read(1) == "[":
                yield from json.loads("[" + text.read())
            elif suffix in (".json", ".jsonl"):  # one object per line
                text.seek(0)
                for number, line in enumerate(text, start=1):
                    try:
                        yield from [json.loads(line)] if line.strip() else []
                    except ValueError:
                        raise UserError(f"{where} line {number} is no JSON: mend or remove it") from None
            else:
                raise UserError(
                    f"{where} is no table: use {', '.join(TABLES)}, one of these in a .zip, or a Hub id"
                )
    except UnicodeDecodeError:
        raise UserError(f"{where} cannot be read as {suffix[1:]}: it is not UTF-8, save it as such") from None
    except (ValueError, OSError, csv.Error, zipfile.BadZipFile, RuntimeError) as error:  # the last: encrypted
        raise UserError(f"{where} cannot be read as {suffix[1:]}: {first_line(error)}") from None


def _hub_form(name) -> re.Match:
    """Parts of a Hub id `owner/name:config@revision`. UserError for what can only be a path."""
    form = re.fullmatch(
        r"(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w .-]+))?(@(?P<revision>[\w./-]+))?", name
    )
    if not form or Path(name).suffix in (*TABLES, ".zip", ".txt") or name[0] in "./~":
        raise UserError(f"no such file or folder: {name}")
    return form


def _hub_dataset(name, split, streaming=False):
    form = _hub_form(name)

    def load():
        import datasets

        datasets.disable_progress_bars() if not sys.stderr.isatty() else None
        which = {"split": split, "revision": form["revision"], "streaming": streaming}
        return datasets.load_dataset(form["repo"], form["config"], **which)

    return from_hub("data set", name, load, "a local file, or what --help of --data names as built in")


def _hub_commit(repo, revision) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo, revision=revision or None).sha


def require_columns(rows, columns, where):
    """Raises UserError for a table without rows or without one of the columns; lists those it has."""
    if not rows:
        raise UserError(f"{where} has no rows: use a file with the columns {', '.join(columns)}")
    some = [row for row in rows[:100] if isinstance(row, dict)]  # the first may lack what others have
    keys = (key for row in some for key in row if key is not None)  # None: more cells than columns
    present = list(dict.fromkeys(keys)) or [type(rows[0]).__name__]
    if missing := [column for column in columns if column not in present]:
        hint = " (is it separated by ';'?)" if len(present) == 1 and ";" in str(present[0]) else ""
        raise UserError(
            f"{where} lacks column(s) {', '.join(missing)}; found: {', '.join(map(str, present))}{hint}"
        )
