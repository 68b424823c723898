"""Rows of tables: CSV, TSV, JSON, JSONL, Parquet, Arrow, packed or not, zips and folders of them, or a data
set on the Hub. Read as written, or refused with file, line and row."""

import csv
import functools
import io
import itertools
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from lab.data.hub import first_line, from_hub
from lab.data.paths import SUFFIXES, TABLES, DataFile, data_files, files_hash, form_of, table_files
from lab.errors import UserError, printable
from lab.run.files import is_there

LOOK = 100  # rows of a stream that are looked at to know its columns
LONGEST = 1 << 28  # bytes of a line: what is longer is no row
# texts by which pandas, R and spreadsheets write a missing cell. None, NA and N/A are words, too: a column
# that may be missing (input) takes them for it, an answer may be one
MISSING = frozenset(["nan", "NaN", "NAN", "-nan", "-NaN", "<NA>", "null", "NULL", "NaT", "#N/A", "#NA"])
MISSING_WORDS = frozenset((*MISSING, "", "None", "none", "NONE", "N/A", "n/a", "NA", "<noinput>"))


def read_rows(name, max_documents=None, prefer="train") -> list[dict]:
    """Reads the rows of a table: a file, packed or not, a folder or zip of them, or a Hub id.

    Of several files in a zip or folder, those whose name starts with `prefer` are read; of a Hub set, its
    `prefer` split. A Hub id may be written `owner/name:config@revision#split`. A missing cell in any spelling
    is None. UserError for what is not there or cannot be read as it was written.
    """
    return list(itertools.islice(stream_rows(name, prefer), max_documents))


def stream_rows(name, prefer="train", streaming=False, shuffled=None):
    """read_rows as a generator, in constant memory except for a JSON list. streaming: fetches only what is
    read. shuffled: a seed for the order of a Hub set that is not streamed."""
    if is_there(name):
        for file in table_files(name, prefer):
            yield from read_table(file)
        return
    rows = _hub_dataset(name, prefer, streaming)
    try:
        for row in rows if shuffled is None else rows.shuffle(seed=shuffled):
            yield without_missing(row)
    except Exception as error:  # a connection may break at any row
        raise UserError(f"data set {name} cannot be read further ({first_line(error)}): try again") from error


def data_fingerprint(name, prefer="train", streaming=False) -> str:
    """SHA-256 over the files that read_rows would read: names caches, and shows a resume that data changed.

    Of a Hub set that is streamed: its name and commit.
    """
    if is_there(name):
        return files_hash(table_files(name, prefer) if Path(name).is_dir() else data_files(name)[:1])
    if streaming:
        form = _hub_form(name)
        load = functools.partial(_hub_commit, form["repo"], form["revision"])
        commit = from_hub("data set", name, load, "a local file")
        # the sets and splits of a repository share the commit
        return ":".join(filter(None, [commit, form["config"], form["split"]]))
    cached = _hub_dataset(name, prefer).cache_files
    return files_hash([DataFile(Path(file["filename"])) for file in cached])


def read_table(file):
    """Yields the rows of one table, missing cells as None. UserError of one line for a mistake in it."""
    readers = {".csv": csv_rows, ".tsv": csv_rows, ".parquet": arrow_rows, ".arrow": arrow_rows}
    if file.form not in TABLES:
        kinds = f"{', '.join(TABLES)}, one of these packed (.gz .bz2 .xz .zst .zip)"
        raise UserError(f"{file} is no table: use {kinds}, or a Hub id")
    try:
        with file.open() as stream:
            yield from map(without_missing, readers.get(file.form, json_rows)(stream, file))
    except RecursionError:
        raise UserError(f"{file} is nested too deeply: rows are objects of texts and lists") from None
    except MemoryError:
        raise UserError(f"{file} needs more memory than there is: use .jsonl, read line by line") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read as {file.form[1:]}: {first_line(error)}") from None


def without_missing(row):
    """A row whose cells that are no number (NaN) are None: so pandas writes what is missing."""
    if not isinstance(row, dict):
        return row
    return {name: None if isinstance(cell, float) and cell != cell else cell for name, cell in row.items()}


def is_missing(cell) -> bool:
    """Whether a cell holds nothing, or nothing but a word for what is missing. An empty text is a text."""
    return cell is None or (isinstance(cell, str) and cell.strip() in MISSING)


def text_lines(stream, where):
    """Yields the lines of a UTF-8 file with their ends (\\n or \\r\\n only). UserError names the line."""
    for number, line in enumerate(iter(functools.partial(stream.readline, LONGEST), b""), start=1):
        if len(line) == LONGEST:
            raise UserError(f"{where} line {number} is over {LONGEST >> 20} MB: is it one row a line?")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte {line[error.start]:#04x}"
            raise UserError(f"{where} line {number} is not UTF-8 ({byte}): save the file as such") from None
        if "\0" in text:
            raise UserError(f"{where} line {number} holds a NUL byte: the file is damaged, or not UTF-8")
        yield text


def csv_rows(stream, file):
    """Yields the rows of a CSV (or TSV) file; every row is as wide as the header."""
    csv.field_size_limit(LONGEST)  # a long conversation is one field; the default is 131,072 characters
    delimiter = "\t" if file.form == ".tsv" else ","
    reader = csv.reader(text_lines(stream, file), strict=True, delimiter=delimiter)
    header, number = None, 0
    while True:
        place = f"{file} row {number + 1} (line {reader.line_num + 1})" if header else f"{file} header"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{place}: {csv_remedy(error)}") from None
        if cells is None:
            return
        if cells and header is None:
            header = checked_header(cells, file)
        elif cells:
            number += 1
            if len(cells) != len(header):
                raise UserError(f"{place} has {len(cells)} cells under {width_remedy(header)}")
            yield {name: None if cell in MISSING else cell for name, cell in zip(header, cells, strict=True)}


def checked_header(cells, file) -> list[str]:
    named = [cell for cell in cells if cell]  # pandas' index has no name
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise UserError(f"{file} has the column {shown(twice)} twice: rename one")
    return cells


def csv_remedy(error) -> str:
    if "expected after" in str(error):
        return r'a quote inside a cell is not doubled (\" is not CSV): write ""'
    if "unexpected end" in str(error):
        return "a cell's quotes are never closed: close them, and double quotes inside"
    if "new-line" in str(error):
        return "a carriage return stands outside quotes: quote the cell, or save with line ends \\n"
    return f"{first_line(error)}: mend it"


def width_remedy(header) -> str:
    remedy = "quote cells that hold a comma or a line break"
    if len(header) == 1 and (signs := [sign for sign in ";\t|" if sign in header[0]]):
        remedy = f"is it separated by {signs[0]!r}? write it with commas"
    return f"{len(header)} column{'s' * (len(header) > 1)}: {remedy}"


def json_rows(stream, file):
    """Yields the rows of JSON: a list, one object a line, objects over several lines, or an object that holds
    the rows under one key."""
    every = enumerate(text_lines(stream, file), start=1)
    lines = ((number, line) for number, line in every if line.strip())
    number, line = next(lines, (0, ""))
    if not number:
        return
    if line.lstrip()[0] == "[" or not is_json(line):
        text = line + "".join(some for _, some in every)
        yield from rows_of_values(list(json_values(text, file, number)), file)
        return
    following = next(lines, None)
    if following is None and file.form == ".json":
        yield from rows_of_values([json.loads(line)], file)
        return
    yield json.loads(line)
    for number, line in itertools.chain([following] if following else [], lines):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{file} line {number} is no JSON ({reason(error)}): mend or remove it") from None


def is_json(text) -> bool:
    try:
        json.loads(text)
        return True
    except ValueError:
        return False


def reason(error) -> str:
    return getattr(error, "msg", None) or first_line(error)


def json_values(text, where, line):
    """Yields the values of JSON that stand one behind the other; `line` is the number of the first."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at = space.match(text).end()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            number = line + text.count("\n", 0, getattr(error, "pos", at))
            place = f"{where} cannot be read as json: line {number} is no JSON"
            raise UserError(f"{place} ({reason(error)}): mend it") from None
        yield value
        at = space.match(text, at).end()


def rows_of_values(values, where) -> list:
    """The rows of a file's JSON values: a list's own, those under one key of an object, or the values."""
    if len(values) != 1:
        return values
    (value,) = values
    if isinstance(value, list):
        return value
    named = value.items() if isinstance(value, dict) else ()
    lists = {k: v for k, v in named if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)}
    if len(lists) > 1:
        keys = " and ".join(map(shown, lists))
        raise UserError(f"{where} holds lists of rows under {keys}: give each a file of its own")
    return next(iter(lists.values()), [value])


def arrow_rows(stream, file):
    """Yields the rows of a Parquet or Arrow file, a thousand at a time."""
    if not isinstance(stream.raw, io.FileIO):  # its end is read first: unpacked, it must lie on the disk
        with stream as packed:
            stream = tempfile.TemporaryFile()
            shutil.copyfileobj(packed, stream, 1 << 20)
            stream.seek(0)
    with stream:
        first = 1
        batches = iter(arrow_batches(stream, file))
        # a batch may be empty, and more stand behind it
        while (batch := arrow_call(next, file, f"row {first}", batches, None)) is not None:
            if twice := len(batch.schema.names) - len(set(batch.schema.names)):
                raise UserError(f"{file} has {twice} column name(s) twice: rename them")
            if batch.num_rows:
                arrow_call(validate, file, f"row {first}", batch)
                yield from batch_rows(batch, first, file)
            first += batch.num_rows


def arrow_batches(stream, file):
    """Record batches of some thousand rows. Arrow files come in two forms: with an index, or as a stream."""
    import pyarrow.ipc
    import pyarrow.parquet

    if file.form == ".parquet":
        opened = functools.partial(pyarrow.parquet.ParquetFile, page_checksum_verification=True)
        table = arrow_call(opened, file, "its end", stream)
        return arrow_call(table.iter_batches, file, "its head", 1000)
    indexed = stream.read(6) == b"ARROW1"
    stream.seek(0)
    opened = pyarrow.ipc.open_file if indexed else pyarrow.ipc.open_stream
    reader = arrow_call(opened, file, "its head", stream)
    return map(reader.get_batch, range(reader.num_record_batches)) if indexed else reader


def arrow_call(function, file, place, *args):
    """Calls pyarrow; whatever it raises at a damaged file (a dozen kinds) is a UserError."""
    try:
        return function(*args)
    except Exception as error:
        line = f"{file} cannot be read as {file.form[1:]} ({place}: {first_line(error)})"
        raise UserError(f"{line}: fetch or write it again") from None


def validate(batch):
    """Raises for offsets that point outside their column: a flipped bit in them would crash the process."""
    batch.validate(full=True)


def batch_rows(batch, first, file) -> list[dict]:
    """Rows of a record batch. UserError names the column that Python cannot hold: a date of year 20000."""
    try:
        return batch.to_pylist()
    except Exception:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            place = f"column {shown(name)}, rows {first} to {first + batch.num_rows - 1}"
            arrow_call(column.to_pylist, file, place)
        raise


def shown(value) -> str:
    """A value as an error line shows it: short, without control characters."""
    text = str(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def _hub_form(name) -> re.Match:
    """Parts of a Hub id `owner/name:config@revision#split`. UserError for what can only be a path."""
    form = re.fullmatch(
        r"(?P<repo>[\w.-]{1,96}(/[\w.-]{1,96})?)(:(?P<config>[\w .-]+))?(@(?P<revision>[\w./-]+))?"
        r"(#(?P<split>[\w.-]+))?",
        name,
    )
    suffix, packing = form_of(name)
    if not form or packing or suffix in SUFFIXES or name[0] in "./~":
        raise UserError(f"no such file or folder: {shown(name)}")
    return form


def hub_split(name, default="train") -> str | None:
    """The split that is read of a Hub set: what `#` names, else `default`; None for a file or folder."""
    return None if is_there(name) else _hub_form(name)["split"] or default


def _hub_dataset(name, split, streaming=False):
    form = _hub_form(name)

    def load():
        import datasets

        datasets.disable_progress_bars() if not sys.stderr.isatty() else None
        which = {"split": form["split"] or split, "revision": form["revision"], "streaming": streaming}
        return datasets.load_dataset(form["repo"], form["config"], **which)

    instead = f"a local file, {form['repo']}#split, or what --help of --data names as built in"
    return from_hub("data set", name, load, instead)


def _hub_commit(repo, revision) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo, revision=revision or None).sha


def columns_of(rows) -> list[str]:
    """The columns that any of the rows has: the first may lack what others have."""
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def require_columns(rows, columns, where):
    """Raises UserError for a table without rows or without one of the columns; lists those it has."""
    if not rows:
        raise UserError(f"{where} has no rows: use a file with the columns {', '.join(columns)}")
    present = columns_of(rows) or [type(rows[0]).__name__]
    if missing := [column for column in columns if column not in present]:
        hint = " (is it separated by ';'?)" if len(present) == 1 and ";" in str(present[0]) else ""
        found = ", ".join(map(shown, present[:30])) + ", ..." * (len(present) > 30)
        raise UserError(f"{where} lacks column(s) {', '.join(missing)}; found: {found}{hint}")
