"""Folders of the cache, believed only when whole; in them rows that are read and tokenised once and mapped
into memory; bad rows are counted."""

import json
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.data.tokenizers import AS_TEXT, id_kind
from lab.errors import UserError
from lab.run.checkpoints import manifest, read_manifest
from lab.run.disks import cache_root
from lab.run.files import sha256_file, short_hash, whole_folder, write_json
from lab.train.processes import on_main, progress

ROWS_CACHE_VERSION = 6  # of what the builders of all kinds of rows write: a change there is a change here


class BadRows:
    """Counts unusable rows by reason; more than `limit` of all rows is an error that shows three."""

    def __init__(self, limit=0.01):
        self.limit, self.rows, self.seen = limit, [], 0  # seen: rows looked at, if whoever reads counts them
        self.empty = []  # numbers of rows that hold nothing: passed over, however many
        self.notes = []  # lines about what else was left out

    def add(self, number, reason):
        self.rows.append((number, str(reason)))

    def pass_over(self, number, where):
        """Notes a row that holds nothing. UserError when hardly any other comes: a stream may have no end."""
        self.empty.append(number)
        if len(self.empty) % 1000 == 0 and len(self.empty) > 0.95 * number:
            raise UserError(f"{where}: {len(self.empty)} of {number} rows are empty: name the column of text")

    def report(self, total, where) -> list[str]:
        """Lines to print; raises UserError above the limit."""
        if len(self.rows) > self.limit * total:
            named = "; ".join(f"row {number}: {reason}" for number, reason in self.rows[:3])
            share = f"{len(self.rows)} of {total} rows are unusable, more than {self.limit:.0%}"
            raise UserError(f"{where}: {share}: mend or remove them, e.g. {named}")
        lines = list(self.notes)
        if self.empty:
            lines.append(f"passed over {len(self.empty)} empty row(s): {first_few(self.empty)}")
        for reason, count in Counter(reason for _, reason in self.rows).items():
            numbers = [number for number, why in self.rows if why == reason]
            lines.append(f"left out {count} row(s), {reason}: {first_few(numbers)}")
        return lines


def first_few(numbers) -> str:
    return ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)


def is_clean(text) -> bool:
    """False for lone surrogates, which json.loads lets through and tokenizers raise at."""
    return not re.search("[\ud800-\udfff]", text)


@contextmanager
def writable_cache():
    """Makes one line of it when the cache cannot be written: a full disk, a read-only one, no permission; or
    when a file of the data, which lies elsewhere, cannot be read."""
    try:
        yield
    except Exception as error:
        rust = re.search(r"(.*) \(os error \d+\)", str(error))  # how tokenizers say it
        if not isinstance(error, OSError) and not rust:
            raise
        reason = getattr(error, "strerror", None) or (rust[1] if rust else str(error))
        if (name := getattr(error, "filename", None)) and not on_the_way(name, cache_root()):
            raise UserError(f"{name} cannot be read ({reason}): take it out or give it back") from error
        where = f"the cache {cache_root()} cannot be written ({reason})"
        raise UserError(f"{where}: set TOKEN_CACHE to a folder with room") from error


def on_the_way(name, folder) -> bool:
    """Whether a file lies in a folder, or is one of its parents."""
    name, folder = Path(os.path.abspath(name)), Path(os.path.abspath(folder))
    return name.is_relative_to(folder) or folder.is_relative_to(name)


def seal(folder):
    """Writes manifest.json of a finished cache folder: bytes and SHA-256 of each file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    names = {str(path.relative_to(folder)): path for path in files}
    sizes = {name: path.stat().st_size for name, path in names.items()}
    hashes = {name: sha256_file(path) for name, path in names.items()}
    write_json(folder / "manifest.json", manifest({"bytes": sizes}, hashes))


def damage(folder) -> str | None:
    """What of a sealed folder is not as it was written, or None."""
    sealed = read_manifest(folder)
    if sealed is None:
        return "manifest.json is absent or damaged"
    for name, digest in sealed["files"].items():
        try:
            if (size := (folder / name).stat().st_size) != sealed["bytes"][name]:
                return f"{name} has {size} bytes of {sealed['bytes'][name]}"
            if sha256_file(folder / name) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


_checked = {}  # folder -> what its files looked like when they were found whole


def is_whole(folder) -> bool:
    """Whether a cache folder is there and as it was written: checked once, when it is first opened. A damaged
    one is named and set aside, so that it is made anew."""
    if not folder.exists():
        return False
    seen = looks_of(folder)
    if seen and _checked.get(folder) == seen:
        return True
    if reason := damage(folder):
        aside = folder.with_name(f".damaged_{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)  # an earlier one
        print(f"WARNING cache {folder}: {reason}; set aside as {aside.name} and made anew", file=sys.stderr)
        with suppress(FileNotFoundError):  # another run was faster
            os.rename(folder, aside)
        return False
    _checked[folder] = seen
    return True


def looks_of(folder) -> list | None:
    """Size, time and number of each file of a sealed folder: where they stay, nothing is hashed again."""
    if sealed := read_manifest(folder):
        with suppress(OSError):
            stats = {name: (folder / name).stat() for name in sealed["files"]}
            return [(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()]
    return None


def cached_folder(folder, build, *args) -> str:
    """`folder` of the cache; build(aside, *args) writes its files if there is no whole one."""
    with writable_cache():
        if not is_whole(folder):
            with whole_folder(folder) as aside:
                build(aside, *args)
                seal(aside)
    return str(folder)


@dataclass
class CachedRows:
    """A folder of the cache. Text i is tokens[offsets[i] : offsets[i + 1]], read when used."""

    folder: Path
    fingerprint: dict  # of data and tokenizer
    columns: dict  # whatever else the kind of rows keeps
    tokens: np.ndarray
    offsets: np.ndarray


def cached_rows(world, kind, key, build, *args) -> CachedRows:
    """Rows built once by rank 0, while the others wait, and read from the cache by every rank.

    key(*args) gives, as JSON, all that the rows depend on, and in it the `fingerprint` that a run keeps.
    build(folder, *args) writes the token ids into a folder and gives the columns to keep beside them;
    `integers` is one of them: what write_texts returned.
    """
    folder = Path(on_main(world, built_folder, kind, key, build, *args))
    content = json.loads((folder / "rows.json").read_text())
    columns = content["columns"]
    tokens, offsets = read_texts(folder, columns["integers"])
    return CachedRows(folder, content["key"]["fingerprint"], columns, tokens, offsets)


def built_folder(kind, key, build, *args) -> str:
    """The folder <kind>_<hash of the key>, built if it is not there: all of it or nothing."""
    depends_on = key(*args)
    folder = cache_root() / f"{kind}_{short_hash([ROWS_CACHE_VERSION, kind, depends_on])}"
    return cached_folder(folder, build_rows, depends_on, build, *args)


def build_rows(folder, depends_on, build, *args):
    columns = build(folder, *args)
    write_json(folder / "rows.json", {"key": depends_on, "columns": columns})


def write_texts(folder, texts, tokenizer, begin=(), every=1) -> str:
    """Token ids of the list `texts` -> folder/tokens.bin and offsets.npy; returns the kind of integer.

    `begin`: ids before the texts 0, every, 2 every ..., with which a row begins.
    """
    integers = id_kind(tokenizer)
    sequences = enumerate(ids_of(texts, tokenizer))
    begun = (ids if i % every or not begin else [*begin, *ids] for i, ids in sequences)
    write_ids(folder, begun, integers, len(texts))
    return integers


def ids_of(texts, tokenizer):
    """Yields the token ids of each text; a thousand are tokenised at once."""
    for start in range(0, len(texts), 1000):
        yield from tokenizer(texts[start : start + 1000], **AS_TEXT).input_ids


def write_ids(folder, sequences, integers, total=None):
    """Lists of token ids -> folder/tokens.bin and offsets.npy. `total`: how many lists, where it is known."""
    offsets = [0]
    with open(folder / "tokens.bin", "wb") as file, progress(total, "tokenising") as bar:
        for ids in sequences:
            file.write(np.asarray(ids, dtype=integers).tobytes())
            offsets.append(offsets[-1] + len(ids))
            bar.update()
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))


def read_texts(folder, integers) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets) of write_ids, the tokens mapped into memory."""
    offsets = np.load(folder / "offsets.npy")
    if not offsets[-1]:  # no file of length 0 can be mapped
        return np.zeros(0, integers), offsets
    return np.memmap(folder / "tokens.bin", dtype=integers, mode="r"), offsets
