"""Which files a name of data means, and opening them: one file, those below a folder, the members of a zip;
packed (.gz .bz2 .xz .zst) or not. Only regular files are read, and a damaged or hostile one is one line."""

import codecs
import contextlib
import io
import os
import re
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from lab.data.hub import first_line
from lab.errors import UserError
from lab.run.files import is_folder, is_there, joint_hash, sha256_file

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
TEXT_FILES = (".txt", ".text", ".md", ".rst", ".py")
PACKED = (".gz", ".bz2", ".xz", ".zst")
# what stands beside data and tells of it, or was left by a library that read it
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|contributing|authors|requirements"
    r"|code_of_conduct|datasheet|(data|dataset)_?card)([._-].*)?"
    r"|(dataset_infos?|dataset_dict|state|info|metadata|schema|config|stats|croissant|datapackage)\.json"
    r"|(md5|sha\d+)sums?(\.txt)?|cache-.*\.arrow"
)
SUFFIXES = (*TEXT_FILES, *TABLES, *PACKED, ".zip")  # of what can be read
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200  # text packs 3 to 20 times; from so many bytes on, this much is a trap


def form_of(name) -> tuple[str, str]:
    """(suffix, packing) of a file's name in small letters: (".csv", ".gz"), (".json", "")."""
    path = PurePath(str(name).lower())
    packing = path.suffix if path.suffix in PACKED else ""
    return PurePath(path.name.removesuffix(packing)).suffix, packing


def stem_of(name) -> str:
    """A file's name without the suffixes that form_of knows."""
    suffix, packing = form_of(name)
    known = suffix in (*TABLES, *TEXT_FILES, ".zip")
    return name[: len(name) - len(packing) - len(suffix)] if known else name


@dataclass(frozen=True)
class DataFile:
    """A file of data on the disk, or a member of a zip there."""

    path: Path
    member: zipfile.ZipInfo | None = None
    inside: PurePath = field(default=PurePath(), compare=False)  # its folder, below the one that was named

    def __str__(self):
        return f"{self.path}/{self.member.filename}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        return PurePath(self.member.filename if self.member else self.path).name

    @property
    def folder(self) -> PurePath:
        return PurePath(self.member.filename if self.member else self.path).parent

    @property
    def form(self) -> str:
        """Its suffix in small letters, without .gz and the like."""
        return form_of(self.name)[0]

    @property
    def size(self) -> int:
        """Bytes, as far as they are known without unpacking."""
        return self.member.file_size if self.member else os.stat(self.path).st_size

    @property
    def is_empty(self) -> bool:
        """Whether it holds, unpacked, nothing but perhaps a byte order mark."""
        if self.size > 256:  # nothing is packed into fewer
            return False
        with self.open() as stream:
            return stream.read(4) in (b"", codecs.BOM_UTF8)

    def open(self) -> io.BufferedReader:
        """Its bytes, unpacked. UserError for what is no regular file, cannot be read or unpacked."""
        packing = form_of(self.name)[1]
        stream = open_member(self) if self.member else open_file(self.path)
        size = self.member.compress_size if self.member else os.fstat(stream.fileno()).st_size
        if packing and not size:
            stream.close()
            raise UserError(f"{self} is empty: fetch it again")
        if self.member or packing:
            with contextlib.ExitStack() as stack:
                stack.callback(stream.close)
                raw = Unpacked(unpack(stream, packing), size, str(self))
                stack.pop_all()
            stream = io.BufferedReader(raw, 1 << 16)
        refuse_foreign(stream.peek(32), self)
        return stream


def open_file(path) -> io.BufferedReader:
    """Opens a regular file to read. UserError for a pipe, socket, device or folder, before it can hang."""
    require_regular(path)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): take it out or give it back") from None


def require_regular(path):
    """UserError unless `path` is a regular file: from others reading may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): take it out or give it back") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise UserError(f"{path} is a {kind}: write what it gives into a file, and name that")


def open_member(file):
    """Opens a member of a zip. UserError names what Python cannot unpack."""
    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    if file.member.flag_bits & 1:
        raise UserError(f"{file} is encrypted: unpack it with its password first")
    if file.member.compress_type not in known:
        method = f"method {file.member.compress_type}" + " (Deflate64)" * (file.member.compress_type == 9)
        raise UserError(f"{file} is packed by {method}, which Python lacks: unpack it, or zip it anew")
    with zip_archive(file.path) as archive:
        try:
            return archive.open(file.member)
        except Exception as error:  # as many kinds as there are ways to damage a zip
            raise UserError(f"{file} is damaged ({first_line(error)}): fetch it again") from None


def zip_archive(path) -> zipfile.ZipFile:
    require_regular(path)
    try:
        return zipfile.ZipFile(path)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): take it out or give it back") from None
    except Exception as error:  # BadZipFile, struct.error, NotImplementedError ...
        raise UserError(f"{path} is not a whole zip file: fetch it again ({first_line(error)})") from None


def unpack(stream, packing):
    """A stream of what a packed one holds."""
    if packing == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
    if packing:
        import bz2
        import gzip
        import lzma

        return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[packing](stream)
    return stream


class Unpacked(io.RawIOBase):
    """What a packed file holds, as a stream. UserError where it is damaged, or far larger than data are."""

    def __init__(self, stream, size, name):
        self.stream, self.size, self.name, self.seen = stream, size, name, 0

    def readable(self):
        return True

    def readinto(self, buffer) -> int:
        try:
            content = self.stream.read(len(buffer))
        except Exception as error:  # zlib.error, LZMAError, EOFError, BadZipFile, ArrowInvalid ...
            raise UserError(f"{self.name} is damaged ({first_line(error)}): fetch it again") from None
        self.seen += len(content)
        if self.seen > max(BOMB_BYTES, BOMB_RATIO * self.size):
            more = f"over {self.seen / 1e9:.1f} GB from {self.size / 1e6:.1f} MB"
            raise UserError(f"{self.name} unpacks to {more}: unpack it yourself if it is meant")
        buffer[: len(content)] = content
        return len(content)

    def close(self):
        self.stream.close()
        super().close()


FOREIGN = {  # how other kinds of files begin: what to say of one under a name of ours
    b"version https://git-lfs": "a Git LFS pointer, not the data: git lfs pull",
    b"\x1f\x8b": "packed by gzip: name it .gz",
    b"PK\x03\x04": "a zip file: name it .zip",
    b"\x28\xb5\x2f\xfd": "packed by zstd: name it .zst",
    b"\xfd7zXZ\0": "packed by xz: name it .xz",
    b"SQLite format 3\0": "a data base: export a table as CSV",
    b"%PDF-": "a PDF: export its text",
}


def refuse_foreign(head, file):
    for magic, line in FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{file} is {line}")
    if head.startswith(b"PAR1") and file.form != ".parquet":
        raise UserError(f"{file} is a Parquet file: name it .parquet")


def data_files(name) -> list[DataFile]:
    """Every file of data that a file, folder or zip holds, in the order of their paths (in a zip: its own);
    hidden files and those that only describe data are left out. Empty if there is nothing of this name."""
    path = Path(name)
    if not is_there(name):
        return []
    if path.is_dir():
        files = [file for file in sorted(walk(path)) if is_data(file, path.name)]
        return [DataFile(path / file, inside=file.parent) for file in files]
    if form_of(path) == (".zip", ""):
        with zip_archive(path) as archive:
            members = [info for info in archive.infolist() if not info.filename.endswith("/")]
        members = [(info, PurePath(info.filename)) for info in members]
        return [DataFile(path, info, name.parent) for info, name in members if is_data(name)]
    return [DataFile(path)]


def walk(folder):
    """Yields the path of every file below a folder, relative to it, links to folders followed; each folder is
    read once, whatever leads to it. UserError where that is not allowed."""
    seen = set()

    def refuse(error):
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): take it out or give it back")

    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        links = {name for name in folders if os.path.islink(os.path.join(where, name))}
        folders[:] = [*sorted({*folders} - links), *sorted(links)]  # its own name before a link's
        for name in names:
            yield Path(where, name).relative_to(folder)


def descriptions(name) -> list[str]:
    """Names of the text files of a folder that are left out, since they describe it: README.md and such."""
    files = sorted(walk(Path(name))) if is_folder(name) else []
    texts = [file for file in files if form_of(file)[0] in TEXT_FILES and not is_hidden(file)]
    return [str(file) for file in texts if not is_data(file, Path(name).name)]


def is_data(path, folder="") -> bool:
    """Whether a file found in a folder (relative to it) or zip is data: not hidden, no README, no LICENSE, no
    dataset_info.json, and not the loading script, which is called like its folder."""
    script = path.name == f"{folder}.py"
    return not (is_hidden(path) or not path.name or script or ABOUT.fullmatch(path.name.lower()))


def is_hidden(path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def table_files(name, prefer) -> list[DataFile]:
    """The tables of a file, folder or zip that are read as one: of several, those of the part `prefer`.

    UserError unless they lie in one folder, are of one kind, their names differ in numbers only, and no
    numbered piece is missing.
    """
    files = data_files(name)
    if files == [DataFile(Path(name))]:
        return files
    tables = [file for file in files if file.form in TABLES]
    chosen = files_of(prefer, tables)
    if not chosen and not is_one_set(tables):
        there = ", ".join(file.name for file in tables[:20]) or f"none of {', '.join(TABLES)}"
        raise UserError(f"{name} holds {there}: name one file, or call one {prefer}.csv")
    require_one_set(chosen or tables, name)
    return chosen or tables


def files_of(part, files) -> list[DataFile]:
    """Those of `files` that belong to a part (train, test): which are called so (train-00000.parquet), else
    which lie in a folder of this name, below the one that was named."""
    called = [file for file in files if file.name.lower().startswith(part)]
    return called or [file for file in files if file.inside.name.lower() == part]


def is_one_set(files) -> bool:
    """Whether files are the pieces of one table: of one folder, with names that differ in numbers only. The
    Hub's older ones have a hash behind them: train-00000-of-00002-a09b74b3ef9c3b56.parquet."""
    numbers = re.compile(r"(?<=-of-\d{5})-[0-9a-f]{16}|\d+")
    return len({(file.folder, numbers.sub("", file.name)) for file in files}) == 1


def require_one_set(files, name):
    """UserError for files that are not one table's, some of which would be read twice, or where one is
    missing."""
    if len(folders := sorted({str(file.folder) for file in files})) > 1:
        raise UserError(f"{name} holds such files in several folders: name one of {', '.join(folders[:10])}")
    if len({file.form for file in files}) > 1:
        both = ", ".join(file.name for file in files[:10])
        raise UserError(f"{name} holds tables of several kinds ({both}): name one file")
    if not is_one_set(files):
        both = ", ".join(file.name for file in files[:10])
        raise UserError(f"{name} holds several tables ({both}): name one, or take the others out")
    pieces = [match for file in files if (match := re.search(r"(\d+)-of-(\d+)", file.name))]
    for match in pieces:
        missing = set(range(int(match[2]))) - {int(m[1]) for m in pieces if m[2] == match[2]}
        if missing and int(match[2]) < 100_000:
            raise UserError(f"{name} lacks piece {min(missing)} of {match.string}: fetch it again")


def text_files(name) -> list[DataFile]:
    """The text files of a file, folder or zip; empty for tables or a Hub id. UserError for another kind."""
    files = data_files(name)
    texts = [file for file in files if file.form in TEXT_FILES]
    tables = [file for file in files if file.form in TABLES]
    if files and not texts and not tables:
        where, kinds = Path(name), ", ".join((*TEXT_FILES, *TABLES))
        if where.is_dir():
            raise UserError(f"folder {name} holds no text: use {kinds}")
        raise UserError(f"{name} is neither text nor a table by its name: use {kinds}, or rename it")
    if texts and tables and not texts[0].member:
        both = f"{texts[0].name} and {tables[0].name}"
        raise UserError(f"folder {name} holds text files and tables ({both}): name one, or move one kind")
    return [] if tables else texts


def files_hash(files) -> str:
    """SHA-256 over the bytes of files as they lie on the disk."""
    paths = list(dict.fromkeys(file.path for file in files))
    for path in paths:
        require_regular(path)
    try:
        return joint_hash([sha256_file(path) for path in paths])
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): take it out") from None
