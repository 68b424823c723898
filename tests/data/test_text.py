"""Text to token ids: whole documents in one part, a cache that survives kills, refusals."""

import gzip
import itertools
import json
import random
import signal
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import everywhere
from toys.corpus import (
    build,
    die,
    documents_of,
    files_of,
    forked,
    opened,
    own_cache,  # noqa: F401 (a fixture)
    table,
    texts_of,
)

import core
import gpt_scratch
import lab.data.text
import lab.run.files
from core import Corpus, UserError, World
from lab.data import cache
from lab.data.text import open_cache, pieces, split_pieces, text_files, token_cache
from lab.data.tokenizers import END
from lab.measure import other_data


def folder_of_files(texts):
    Path("texts/sub").mkdir(parents=True)
    for i, text in enumerate(texts):
        name = f"texts/{'sub/' * (i >= 5)}{i}{'.txt' if i % 2 else '.md'}"
        Path(name).write_text(("\ufeff" if i == 1 else "") + text, newline="")
    Path("texts/image.png").write_bytes(b"\xff\xfe")
    return "texts"


SOURCES = {
    "folder": folder_of_files,
    "jsonl": table,
    "csv": lambda texts: table(texts, "a.csv"),
    "parquet": lambda texts: table(texts, "a.parquet"),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("most", [None, 7])
def test_every_document_is_in_one_part_whole_and_in_order(kind, most):
    texts = texts_of(10)
    tokens = opened(SOURCES[kind](texts), val_share=0.3, test_share=0.2, max_documents=most)
    parts = {part: documents_of(tokens, part) for part in core.PARTS}
    assert Counter(itertools.chain(*parts.values())) == Counter(texts[:most])
    assert all(found == sorted(found, key=texts.index) for found in parts.values())
    assert {part: len(found) for part, found in parts.items()} == tokens.documents
    assert texts[0] in parts["train"]
    counts = np.bincount(tokens.parts["train"], minlength=len(tokens.tokenizer))
    assert tokens.unigram.tolist() == counts.tolist() and tokens.lines == []


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("length", [1000, 1237])
@pytest.mark.parametrize("piece", [1 << 16, 64])
def test_a_single_document_is_cut_to_the_character(newline, length, piece, monkeypatch):
    everywhere(monkeypatch.setattr, lab.data.text, "PIECE", piece)
    text = newline.join(texts_of(40))[:length]
    assert len(text) == length
    Path("one.txt").write_text(text, newline="")
    tokens = opened("one.txt", val_share=0.1, test_share=0.0)
    cut = int(length * 0.9)
    assert documents_of(tokens, "train") == [text[:cut]] and documents_of(tokens, "val") == [text[cut:]]
    assert documents_of(tokens, "test") == []


def test_the_three_parts_of_a_single_document_are_the_document():
    text = "".join(texts_of(60))
    tokens = opened(table([text]), val_share=0.2, test_share=0.1)
    parts = [documents_of(tokens, part)[0] for part in core.PARTS]
    assert "".join(parts) == text
    shares = np.array([len(part) for part in parts]) / len(text)
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=2 / len(text))  # ends are whole characters


def shares_of(texts, **more):
    """part -> documents, without tokens."""
    found = {part: [] for part in core.PARTS}
    for part, text, begins in split_pieces(Corpus(table(texts), "bytes", **more), cache.BadRows()):
        assert begins
        found[part].append(text)
    return found


def test_equal_documents_share_a_part_and_shares_are_met():
    texts = ["the first", *(f"text {i % 1000}" for i in range(2000))]
    parts = shares_of(texts, val_share=0.2, test_share=0.1)
    assert sum(len(set(part)) for part in parts.values()) == 1001  # no text in two parts
    assert len(parts["val"]) / 2001 == pytest.approx(0.2, abs=0.038)  # three standard errors of 1,000 draws
    assert len(parts["test"]) / 2001 == pytest.approx(0.1, abs=0.029)
    assert shares_of(texts, val_share=0.2, test_share=0.1) == parts
    assert shares_of(texts, val_share=0.2, test_share=0.1, split_seed=7) != parts


def test_a_document_equal_to_the_first_shares_its_part():
    """The first one is always trained on; its copies must not be what the model is measured with."""
    for number in range(6):  # of which about half would be drawn into val or test
        parts = shares_of([f"{number}", "b", f"{number}", "c"], val_share=0.4, test_share=0.3)
        assert sum(f"{number}" in part for part in parts.values()) == 1, parts


@pytest.mark.parametrize("name", ["chars", "bytes", "bpe:300", "bpe_scratch:300"])
def test_the_end_token_spelled_out_in_a_text_ends_no_document(name):
    texts = [f"{i} text about {END} and <unk>" for i in (string.digits, *range(11))]
    tokens = opened(table(texts), name, val_share=0.2)
    found = [text for part in core.PARTS for text in documents_of(tokens, part)]
    assert sorted(found) == sorted(texts)
    ends = sum((ids == tokens.tokenizer.eos_token_id).sum() for ids in tokens.parts.values())
    assert ends == len(texts) + 3


def with_bad_rows(n, *bad):
    table([f"document {i}" for i in range(n)])
    lines = Path("train.jsonl").read_text().splitlines()
    for number, row in enumerate(bad, start=4):
        lines[number] = json.dumps(row)
    Path("train.jsonl").write_text("\n".join(lines) + "\n")
    return "train.jsonl"


def test_few_unusable_rows_are_left_out_and_told():
    data = with_bad_rows(500, {"text": ""}, {"text": None}, {"text": 7}, {"id": 3}, {"text": "half \ud83d"})
    tokens = opened(data)
    assert sum(tokens.documents.values()) == 495
    assert tokens.lines == [
        "passed over 3 empty row(s): 5, 6, 8",
        "left out 1 row(s), no text: 7",
        "left out 1 row(s), odd Unicode (a lone surrogate): 9",
    ]
    assert opened(data).lines == tokens.lines  # from the cache too


def test_a_third_of_the_rows_may_be_empty_as_in_wikitext():
    texts = [f"document {i}" for i in range(60)]
    rows = [{"text": text} for i, text in enumerate(texts) for text in ["", text][i % 2 :]]
    Path("wiki.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = opened("wiki.jsonl", val_share=0.2)
    assert sorted(text for part in core.PARTS for text in documents_of(tokens, part)) == sorted(texts)
    assert tokens.lines == ["passed over 30 empty row(s): 1, 4, 7, 10, 13, 16, 19, 22, ..."]


@pytest.mark.parametrize("cell", [float("nan"), None, "NaN", "<NA>"])
def test_a_missing_text_is_an_empty_row_in_any_spelling(cell):
    assert opened(with_bad_rows(20, {"text": cell})).lines == ["passed over 1 empty row(s): 5"]


def test_the_column_of_text_is_looked_for_in_all_of_the_first_rows():
    rows = [{"id": i} for i in range(5)] + [{"text": f"document {i}"} for i in range(50)]
    Path("late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert opened("late.jsonl").lines == ["passed over 5 empty row(s): 1, 2, 3, 4, 5"]


@pytest.mark.parametrize("row", [["a", "list"], "a string", 7, None])
def test_a_row_of_another_shape_is_unusable_not_a_crash(row):
    assert opened(with_bad_rows(200, row)).lines == ["left out 1 row(s), no text: 5"]


def test_many_unusable_rows_are_an_error_every_time():
    data = with_bad_rows(100, {"text": 7}, {"text": ["a"]})
    for _ in range(2):  # a second try finds the tokens of the first, which did not count
        with pytest.raises(UserError, match=r"2 of 100 rows are unusable, more than 1%.*row 5: no text"):
            opened(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("latin", ["latin/b.txt is not UTF-8"]),
        ("one.txt", ["one.txt is not UTF-8"]),
        ("nothing", ["nothing holds"]),
        ("blank.jsonl", ["blank.jsonl holds no text"]),
        ("empty.csv", ["empty.csv holds no text"]),
        ("zeros.txt", ["zeros.txt holds NUL bytes"]),
        ("corpus", ["corpus is neither text nor a table by its name"]),
        ("column.csv", ["column.csv lacks column(s) text; found: id, body"]),
        ("absent.txt", ["no such file or folder: absent.txt"]),
    ],
)
def test_unusable_text_is_refused_in_one_line(data, words):
    for folder in ("latin", "nothing"):
        Path(folder).mkdir()
    Path("latin/a.txt").write_text("fine")
    for name in ("latin/b.txt", "one.txt"):
        Path(name).write_bytes("Zürich".encode("latin-1"))
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    Path("empty.csv").write_text("")
    Path("zeros.txt").write_bytes(b"a text" + b"\0" * 9)
    Path("corpus").write_text("a text")
    table(["a", "b"], "column.csv", column="body")
    with pytest.raises(UserError) as error:
        opened(data)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_hidden_files_in_a_folder_are_left_out_but_the_folder_may_lie_in_a_hidden_one(monkeypatch):
    folder = Path(".cache/texts")
    (folder / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text("a text")
    (folder / ".git" / "b.txt").write_text("none of it")
    (folder / ".c.txt").write_text("nor this")
    for name in (folder, folder.absolute(), Path("..") / Path.cwd().name / folder):
        assert [file.name for file in text_files(str(name))] == ["a.txt"]


def test_an_empty_file_is_no_document_and_told():
    """Beside one, a single text was not cut, and had nothing held out."""
    Path("texts").mkdir()
    for name, content in (("a", b""), ("b", b"\xef\xbb\xbf"), ("c", "".join(texts_of(60)).encode())):
        Path(f"texts/{name}.txt").write_bytes(content)
    Path("texts/d.txt.gz").write_bytes(gzip.compress(b""))
    tokens = opened("texts", val_share=0.2, test_share=0.1)
    assert tokens.documents == {"train": 1, "val": 1, "test": 1}
    assert tokens.lines == ["passed over 3 empty file(s): texts/a.txt, texts/b.txt, texts/d.txt.gz"]
    bad, sizes = cache.BadRows(), []
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    assert len(list(other_data.document_ids(Corpus("texts", ""), tokenizer, bad, sizes))) == len(sizes) == 1


def test_a_readme_beside_texts_is_left_out_and_told():
    Path("texts").mkdir()
    for i, text in enumerate(texts_of(9)):
        Path(f"texts/{i}.md").write_text(text)
    Path("texts/README.md").write_text("what this is")
    tokens = opened("texts")
    assert tokens.lines == ["left out, as they describe the data: README.md"]
    assert sum(tokens.documents.values()) == 9


def test_a_text_that_cannot_be_read_is_named(monkeypatch):
    Path("a.txt").write_text("a text")

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    everywhere(monkeypatch.setattr, lab.run.files, "sha256_file", refused)  # as root every file can be read
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        opened("a.txt")


@pytest.mark.parametrize("files", [1, 2])
def test_files_without_text_are_refused_with_a_remedy_that_exists(files):
    Path("texts").mkdir()
    for i in range(files):
        Path(f"texts/{i}.txt").write_text("")
    cfg = gpt_scratch.Config(data="texts")
    with pytest.raises(UserError, match="texts") as error:
        gpt_scratch.set_up(SimpleNamespace(pin=lambda *_: None), cfg, World())
    assert "train_share" not in str(error.value)  # there is no such constant


def pieces_of(text):
    Path("a.txt").write_text(text, newline="")
    with open("a.txt", encoding="utf-8", newline="") as stream:
        return list(pieces(stream))


@pytest.mark.parametrize("kind", ["lines", "one line", "windows lines", "blank lines"])
def test_pieces_join_to_the_text_and_stay_small(kind, monkeypatch):
    everywhere(monkeypatch.setattr, lab.data.text, "PIECE", 50)
    separator = {"lines": "\n", "one line": " ", "windows lines": "\r\n", "blank lines": "\n\n"}[kind]
    text = separator.join(texts_of(60)) if kind != "one line" else "endless" * 500
    found = pieces_of(text)
    assert "".join(found) == text and max(map(len, found)) <= 17 * 50 and len(found) > 3


def test_pieces_end_where_lines_end(monkeypatch):
    everywhere(monkeypatch.setattr, lab.data.text, "PIECE", 50)
    lines = [f"line {i} of some words\n" for i in range(100)]
    found = pieces_of("".join(lines))
    assert "".join(found) == "".join(lines) and all(piece.endswith("words\n") for piece in found)
    assert max(map(len, found)) < 50 + len(lines[-1])


@pytest.mark.parametrize("name", ["bpe:330", "bpe_scratch:330"])
def test_the_tokens_of_the_pieces_are_those_of_the_whole_text(name, monkeypatch):
    everywhere(monkeypatch.setattr, lab.data.text, "PIECE", 40)
    rng = random.Random(1)
    text = "".join(
        rng.choices(["word", "it's", " ", "  ", "\n", "\n", "\n ", "\t", "12", "é.", "\r\n"], k=2500)
    )
    tokenizer = core.make_tokenizer(name, lambda: [text])
    encode, found = lab.data.text.encoder(name, tokenizer), pieces_of(text)
    assert len(found) > 30 and max(map(len, found)) < 16 * 40  # otherwise one is cut anywhere
    assert list(itertools.chain(*encode(found))) == list(encode([text])[0])
    cut_anywhere = [text[start : start + 40] for start in range(0, len(text), 40)]
    assert list(itertools.chain(*encode(cut_anywhere))) != list(encode([text])[0])


@pytest.mark.parametrize(("symbols", "kind"), [(65_534, np.uint16), (65_535, np.uint32)])
def test_ids_take_two_bytes_up_to_65536_of_them(symbols, kind):
    codes = (code for code in itertools.count(33) if not 0xD800 <= code < 0xE000)
    text = "".join(map(chr, itertools.islice(codes, symbols)))
    Path("a.txt").write_text(text + "!" * 20_000)  # the held-out end
    tokens = opened("a.txt", "chars", val_share=0.1, test_share=0.1)
    assert len(tokens.tokenizer) == symbols + 2
    train = tokens.parts["train"]
    assert train.dtype == kind and train[0] == train[-1] == symbols  # END
    assert train[1 : symbols + 1].tolist() == list(range(symbols))


def test_a_second_call_does_not_tokenise_and_a_change_does(monkeypatch):
    data = table(texts_of(12))
    first = token_cache(Corpus(data, "bytes"))
    with monkeypatch.context() as patch:
        everywhere(patch.setattr, lab.data.text, "write_tokens", lambda *_: pytest.fail("it tokenises again"))
        assert token_cache(Corpus(data, "bytes")) == first
    others = [
        token_cache(Corpus(data, "bytes", **change))
        for change in ({"val_share": 0.3}, {"split_seed": 1}, {"max_documents": 11})
    ]
    others.append(token_cache(Corpus(data, "bpe:300")))
    table(texts_of(12, seed=1))
    others.append(token_cache(Corpus(data, "bytes")))
    assert len({first, *others}) == 6
    assert sorted(path for path in core.cache_root().iterdir()) == sorted([first, *others])  # nothing aside


def test_one_tokenizer_of_two_names_has_one_cache(monkeypatch):
    """A run that continues another one has its folder's tokenizer: the text is not tokenised again."""
    text = table(texts_of(10))
    words = opened(text, "bpe:300").tokenizer
    for name in ("one", "two"):
        words.save_pretrained(name)
    first = opened(text, "one")
    everywhere(
        monkeypatch.setattr, lab.data.text, "write_tokens", lambda *_: pytest.fail("it tokenises again")
    )
    assert np.array_equal(opened(text, "two").parts["train"], first.parts["train"])


def flip(path, at=-3):
    """Changes one bit, `at` that byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "unigram.npy", "meta.json", "manifest.json",
                                  "tokenizer/tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_cache_is_named_set_aside_and_made_anew(name, damage, capfd):
    spec = Corpus(table(texts_of(12)), "chars")
    folder = token_cache(spec)
    before, path = files_of(folder), folder / name
    if damage == "bit":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.unlink()
    assert token_cache(spec) == folder and files_of(folder) == before
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"WARNING cache {folder}: {name}" in said and "made anew" in said
    assert len(list(core.cache_root().glob(".damaged_*"))) == 1
    token_cache(spec)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("tokenizer", ["chars", "bpe:300"])
def test_tokens_that_cannot_be_kept_are_one_line(tokenizer, monkeypatch):
    data = table(texts_of(12))
    monkeypatch.setenv("TOKEN_CACHE", str(Path(data).absolute() / "below"))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\): set TOKEN_CACHE"):
        opened(data, tokenizer)


@pytest.mark.parametrize("name", ["train.bin", "progress.json", "tokenizer/tokenizer.json"])
def test_what_a_killed_build_left_is_not_believed_when_damaged(name):
    spec = Corpus(table(LONG), "bpe:300", val_share=0.3, test_share=0.2)
    expected = files_of(build(spec, "whole", every=1))
    assert forked(lambda: build(spec, "killed", 1, 6)) == signal.SIGKILL
    (left,) = Path("killed").glob(".*.partial")
    flip(left / name, 40)
    got = files_of(build(spec, "killed", every=1))
    assert [name for name in expected if got[name] != expected[name]] == []


LONG = ["".join(texts_of(120, seed)) for seed in range(8)]  # pieces larger than a file's buffer
KILLS = {  # one after the other: how many pieces lie between two saves, and the piece it dies at
    "at once": [(1, 1)],
    "often saved": [(1, 5), (1, 1), (1, 2)],
    "now and then saved": [(2, 4)] * 2,
    "never saved": [(50, 7)],
    "first seldom, then often saved": [(50, 8), (1, 2)],
}


@pytest.mark.parametrize(
    "kills",
    [KILLS["at once"], *(pytest.param(KILLS[name], marks=pytest.mark.slow) for name in [*KILLS][1:])],
    ids=KILLS,
)
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(kills):
    spec = Corpus(table(LONG), "bytes", val_share=0.3, test_share=0.2)
    expected = build(spec, "whole", every=1)
    for every, at in kills:
        status = forked(lambda every=every, at=at: build(spec, "killed", every, at))
        assert status == signal.SIGKILL
    got = build(spec, "killed", every=1)
    contents = [files_of(folder) for folder in (got, expected)]
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []
    assert sum(len(ids) for ids in open_cache(got).parts.values()) > 8 * 6000


def test_a_build_killed_behind_its_last_token_still_tells_of_unusable_rows(monkeypatch):
    spec = Corpus(with_bad_rows(200, {"text": ""}), "bytes")

    def killed_before_the_end():
        np.save = die
        token_cache(spec)

    assert forked(killed_before_the_end) == signal.SIGKILL
    assert core.open_corpus(spec, World()).lines == ["passed over 1 empty row(s): 5"]


def test_the_blocks_of_a_cache_cover_its_documents():
    texts = texts_of(30)
    tokens = opened(table(texts), "bpe:300", val_share=0.2)
    for part in core.PARTS:
        blocks = core.Blocks(tokens.parts[part], 16)
        labels = blocks.batch(range(len(blocks)), torch.device("cpu"))[1]
        stream = [tokens.tokenizer.eos_token_id, *labels[labels != core.IGNORE_INDEX].tolist()]
        assert tokens.tokenizer.decode(stream) == END.join(["", *documents_of(tokens, part), ""])
