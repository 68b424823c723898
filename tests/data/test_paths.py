"""Which files a name means; pipes, devices, bombs and damaged packings are one line."""

import bz2
import gzip
import json
import lzma
import os
import socket
import struct
import zipfile
from pathlib import Path

import pytest

import core
from core import UserError
from lab.data import paths
from lab.data.paths import DataFile, data_files, form_of, stem_of, table_files, text_files
from lab.data.tables import data_fingerprint

ROWS = [{"a": "1"}, {"a": "2"}]
LINES = b'{"a": "1"}\n{"a": "2"}\n'


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def put(name, content=LINES):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def names(files) -> list[str]:
    return [str(file) for file in files]


def test_a_name_has_a_form_and_a_packing():
    assert [form_of(name) for name in ("A.CSV", "b.jsonl.GZ", "c.tar.gz", ".gz", "d", "x/e.Txt.zst")] == [
        (".csv", ""), (".jsonl", ".gz"), (".tar", ".gz"), ("", ""), ("", ""), (".txt", ".zst")]  # fmt: skip
    assert [stem_of(name) for name in ("A.JSONL", "b.csv.gz", "v1.2", "c.zip")] == ["A", "b", "v1.2", "c"]


def packings():
    import pyarrow

    return {".gz": gzip.compress(LINES), ".bz2": bz2.compress(LINES), ".xz": lzma.compress(LINES),
            ".zst": pyarrow.compress(LINES, codec="zstd", asbytes=True)}  # fmt: skip


@pytest.mark.parametrize("packing", paths.PACKED)
def test_packed_files_are_unpacked_and_damaged_ones_named(packing):
    content = packings()[packing]
    assert core.read_rows(put(f"t.jsonl{packing}", content)) == ROWS
    assert core.read_rows(put(f"T.JSONL{packing.upper()}", content)) == ROWS
    for damaged in (content[:-5], content[: len(content) // 2], b"\0\0" + content):
        assert f"t.jsonl{packing} is damaged" in refusal(core.read_rows, put(f"t.jsonl{packing}", damaged))
    assert "is empty" in refusal(core.read_rows, put(f"t.jsonl{packing}", b""))


def test_parquet_is_read_packed_and_zipped():
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "train.parquet")
    content = Path("train.parquet").read_bytes()
    with zipfile.ZipFile("t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write("train.parquet", "data/train.parquet")
    assert core.read_rows(put("u.parquet.gz", gzip.compress(content))) == core.read_rows("t.zip") == ROWS


@pytest.mark.parametrize("packing", ["", ".gz", ".zip"])
def test_text_is_read_packed_and_zipped(packing):
    if packing == ".zip":
        with zipfile.ZipFile("a.zip", "w") as archive:
            archive.writestr("a.txt", "some text")
            archive.writestr("__MACOSX/._a.txt", "none")
        name = "a.zip"
    else:
        name = put("a.txt" + packing, gzip.compress(b"some text") if packing else b"some text")
    (file,) = text_files(name)
    assert file.open().read() == b"some text"


@pytest.mark.parametrize("name", ["a.foo", "corpus", "a.xlsx", "a.docx", "a.tar.gz", "a.npy"])
def test_what_has_another_suffix_is_never_prose_nor_a_table(name):
    put(name)
    assert f"{name} is neither text nor a table by its name" in refusal(text_files, name)
    assert f"{name} is no table" in refusal(core.read_rows, name)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (gzip.compress(LINES, mtime=0), "t.jsonl is packed by gzip"),
        (b"PK\x03\x04....", "t.jsonl is a zip file"),
        (b"PAR1....PAR1", "t.jsonl is a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "t.jsonl is a Git LFS pointer"),
    ],
)
def test_another_kind_of_file_under_a_name_of_ours_is_told(content, line):
    assert line in refusal(core.read_rows, put("t.jsonl", content))


def test_a_data_set_cloned_from_the_hub_is_its_tables():
    for name in (
        "README.md",
        "LICENSE",
        "dataset_infos.json",
        "hub/.git/train.parquet",
        "hub/.gitattributes",
    ):
        put(f"hub/{name}".replace("hub/hub", "hub"), b"about")
    put("hub/hub.py", b"a loading script")
    put("hub/data/train-00000-of-00002.jsonl", b'{"a": "1"}\n')
    put("hub/data/train-00001-of-00002.jsonl", b'{"a": "2"}\n')
    put("hub/data/test-00000-of-00001.jsonl", b'{"a": "3"}\n')
    assert core.read_rows("hub") == ROWS and core.read_rows("hub", prefer="test") == [{"a": "3"}]
    assert text_files("hub") == []
    os.remove("hub/data/train-00000-of-00002.jsonl")
    assert "hub lacks piece 0 of train-00001-of-00002.jsonl" in refusal(core.read_rows, "hub")


def test_two_sets_in_one_clone_are_never_mixed():
    put("hub/small/train-00000-of-00001.jsonl")
    put("hub/large/train-00000-of-00001.jsonl")
    line = refusal(core.read_rows, "hub")
    assert "hub holds such files in several folders: name one of hub/large, hub/small" in line
    put("both/train.csv", b"a\n1\n")
    put("both/train.jsonl")
    assert "both holds tables of several kinds (train.csv, train.jsonl)" in refusal(core.read_rows, "both")


@pytest.mark.parametrize(
    "other", ["train.tok.jsonl", "train_small.jsonl", "train (copy).jsonl", "training.jsonl"]
)
def test_two_tables_of_one_part_are_never_read_as_one(other):
    """A clone of AQuA has each problem twice, in dev.json and dev.tok.json."""
    put("d/train.jsonl")
    put(f"d/{other}")
    with zipfile.ZipFile("d.zip", "w") as archive:
        archive.write("d/train.jsonl")
        archive.write(f"d/{other}")
    for name in ("d", "d.zip"):
        line = refusal(core.read_rows, name)
        assert f"{name} holds several tables" in line and "train.jsonl" in line and other in line


@pytest.mark.parametrize("pieces", [
    ("train1.jsonl", "train2.jsonl"), ("train_2019.jsonl", "train_2020.jsonl"),
    ("train-00000-of-00002-a09b74b3ef9c3b56.jsonl", "train-00001-of-00002-0011223344556677.jsonl"),
    ("part-0.jsonl", "part-1.jsonl"),
    ("a-00000-of-00002-a09b74b3ef9c3b56.jsonl", "a-00001-of-00002-0b.jsonl"),
])  # fmt: skip
def test_names_that_differ_in_numbers_are_pieces_of_one_table(pieces):
    for piece, line in zip(pieces, LINES.splitlines(), strict=True):
        put(f"d/{piece}", line)
    if pieces[1].endswith("-0b.jsonl"):  # no hash of the Hub's
        assert "name one file, or call one train.csv" in refusal(core.read_rows, "d")
    else:
        assert core.read_rows("d") == ROWS


@pytest.mark.parametrize("name", ["x/test", "x/train", "x/dev"])
def test_the_name_of_the_folder_that_is_named_is_no_part(name):
    for part, line in zip(("train", "test"), LINES.splitlines(), strict=True):
        put(f"{name}/{part}.jsonl", line)
    assert core.read_rows(name) == ROWS[:1] and core.read_rows(name, prefer="test") == ROWS[1:]
    put("y/test/a.jsonl")
    put("y/train/a.jsonl", b'{"a": "3"}')
    assert core.read_rows("y") == [{"a": "3"}] and core.read_rows("y", prefer="test") == ROWS
    put("y/test/b.jsonl")
    assert "y/test holds a.jsonl, b.jsonl: name one file" in refusal(core.read_rows, "y/test", None, "test")


@pytest.mark.parametrize("shards", [1, 2])
def test_what_datasets_saved_to_disk_is_read(shards):
    import datasets

    made = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS),
                                 "test": datasets.Dataset.from_list(ROWS[:1])})  # fmt: skip
    made.save_to_disk("saved", num_shards={"train": shards, "test": 1})
    put("saved/train/cache-0123456789abcdef.arrow", b"left by map")
    assert core.read_rows("saved") == ROWS and core.read_rows("saved", prefer="test") == ROWS[:1]
    assert core.read_rows("saved/train") == ROWS


def test_files_that_describe_data_are_no_data():
    put("texts/a.txt", b"text")
    for name in (
        "README",
        "README.md",
        "readme.txt",
        "LICENSE.txt",
        "Licence",
        "CHANGELOG.md",
        "SHA256SUMS.txt",
    ):
        put(f"texts/{name}", b"about")
    assert names(data_files("texts")) == ["texts/a.txt"]
    put("texts/readers.txt", b"text")  # begins alike
    assert names(data_files("texts")) == ["texts/a.txt", "texts/readers.txt"]
    assert names(text_files("texts/README.md")) == ["texts/README.md"]  # named by the user: it is meant


def special(kind) -> str:
    if kind == "pipe":
        os.mkfifo("train.jsonl")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("train.jsonl")
    elif kind == "device":
        os.symlink("/dev/zero", "train.jsonl")
    elif kind == "loop":
        os.symlink("train.jsonl", "train.jsonl")
    return "train.jsonl"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("call", [core.read_rows, data_fingerprint], ids=["read", "hash"])
def test_what_is_no_regular_file_is_refused_at_once(kind, call, tmp_path):
    name = special(kind)
    assert f"train.jsonl is a {kind}" in refusal(call, name)
    assert f"is a {kind}" in refusal(call, str(tmp_path))  # and in a folder


@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 300, "File name too long"), ("x" * 5000, "File name too long"), ("a\0b", "no file name"),
     ("loop", "symbolic links"), ("train.jsonl/x.csv", "no such file"), ("", "no such file")],
)  # fmt: skip
def test_names_that_no_disk_takes_are_one_short_line(name, words):
    put("train.jsonl")
    os.symlink("loop", "loop")
    for call in (core.read_rows, data_fingerprint):
        assert words in (line := refusal(call, name)) and len(line) < 200


def test_what_may_not_be_read_is_named(monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    put("t.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", refused)  # as root every file can be read
        line = refusal(paths.open_file, "t.jsonl")
    assert "t.jsonl cannot be read (Permission denied)" in line


def zip_of(content=LINES, method=zipfile.ZIP_DEFLATED, name="train.jsonl") -> bytearray:
    with zipfile.ZipFile("t.zip", "w", method) as archive:
        archive.writestr(name, content)
    return bytearray(Path("t.zip").read_bytes())


def encrypted(content):
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(signature) + at] |= 1


def deflate64(content):
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        where = content.find(signature) + at
        content[where : where + 2] = struct.pack("<H", 9)


def local_header(content):
    content[0] = 0


def flipped(content):
    content[45] ^= 255


@pytest.mark.parametrize(
    ("harm", "words"),
    [(encrypted, "is encrypted"), (deflate64, "method 9 (Deflate64)"), (local_header, "is damaged"),
     (flipped, "is damaged"), (bytearray.clear, "is not a whole zip file")],
)  # fmt: skip
def test_zips_that_cannot_be_unpacked_are_one_line(harm, words):
    content = zip_of()
    harm(content)
    Path("t.zip").write_bytes(content)
    assert words in refusal(core.read_rows, "t.zip")


@pytest.mark.parametrize("member", ["/", ".", "//", "a/"])
def test_odd_member_names_are_passed_over(member):
    with zipfile.ZipFile("t.zip", "w") as archive:
        archive.writestr(member, "")
        archive.writestr("train.jsonl", LINES)
    assert core.read_rows("t.zip") == ROWS


@pytest.mark.parametrize("packing", [".zip", ".gz"])
def test_a_bomb_is_refused_before_it_fills_the_memory(packing, monkeypatch):
    monkeypatch.setattr(paths, "BOMB_BYTES", 1 << 20)
    content = b'{"a": "' + b"x" * (3 << 20) + b'"}\n'
    name = "t.zip"
    if packing == ".zip":
        zip_of(content)
    else:
        name = put("t.jsonl.gz", gzip.compress(content))
    assert "unpacks to over" in refusal(core.read_rows, name)
    ordinary = json.dumps({"a": os.urandom(2 << 20).hex()}).encode()  # as large, of text that packs by two
    zip_of(ordinary)
    assert core.read_rows("t.zip") == [json.loads(ordinary)]


def test_the_hash_of_a_folder_is_that_of_the_files_it_is_read_from():
    put("d/train.jsonl")
    put("d/test.jsonl", b"other")
    assert data_fingerprint("d") == data_fingerprint("d/train.jsonl") == core.sha256_file("d/train.jsonl")
    assert table_files("d", "train") == [DataFile(Path("d/train.jsonl"))]


def test_links_to_folders_are_followed_and_each_folder_is_read_once():
    put("far/b.jsonl", LINES[11:])
    put("d/train/a.jsonl", LINES[:11])
    os.symlink("../far", "d/linked")
    os.symlink("..", "d/train/loop")
    os.symlink("train", "d/again")
    assert names(data_files("d")) == ["d/linked/b.jsonl", "d/train/a.jsonl"]
    os.symlink("d", "link")
    assert names(data_files("link")) == ["link/linked/b.jsonl", "link/train/a.jsonl"]
    assert core.read_rows("d") == ROWS[:1]
