"""corpus.py: tokenizers, the token cache and its interruptions, blocks."""

import csv
import inspect
import itertools
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import everywhere

import core
import gpt_scratch
import lab.data.text
import lab.run.files
from core import Corpus, UserError, World
from lab.data import builtin, cache, tokenizers
from lab.data.text import open_cache, pieces, split_pieces, text_files, token_cache
from lab.data.tokenizers import END
from lab.models import encoders

ODD = [  # each comes back to the character
    "plain words, isn't it ? a . b ; they 're n't , 've \"quoted\" !",
    "Zürich naïve \u0130stanbul Å e\u0301 漢字 \U0001f600 \U0001f468\u200d\U0001f469 ½² \u2028 \u00a0 \ufeff",
    "windows\r\nlines\r\n\r\ntabs\tand\t\ttrailing   \n  leading   ",
    "\n\n\n  \n \t ",
    "controls \x00 \x01 \x1c\x1f \x7f \x85 \x0b\x0c end",
    "<unk> <|end of text|> aaaaaaaaaaaaaa'll 'LL 12345 $%^&*(",
    "x",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))


def opened(data, tokenizer="bytes", **more):
    return core.open_corpus(Corpus(str(data), tokenizer, **more), World())


def table(texts, name="train.jsonl", column="text"):
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    if name.endswith(".csv"):
        with open(name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    else:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def texts_of(n, seed=0, words=12):
    """Documents that differ, of odd characters and lines."""
    rng, pool = (
        random.Random(seed),
        ["the", "of", "naïve\n", "漢字", "\r\n", "x\ty", "'ll", "\U0001f600", "end.\n"],
    )
    return [f"{i} " + " ".join(rng.choices(pool, k=words)) for i in range(n)]


def documents_of(tokens, part):
    """The texts of a stream, read back from its ids: END before and behind each."""
    end, found = tokens.tokenizer.eos_token_id, [[]]
    for token in tokens.parts[part].tolist():
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    assert found[0] == found[-1] == [], "a stream begins and ends with END"
    return [tokens.tokenizer.decode(ids) for ids in found[1:-1]]


# tokenizers


@pytest.mark.parametrize("name", ["chars", "bytes", "bpe:300", "bpe_scratch:300"])
def test_every_text_comes_back_to_the_character(name):
    texts = [" ".join(ODD), *ODD, *ODD]  # the first is always trained on: chars then knows all
    tokens = opened(table(texts), name, val_share=0.2, test_share=0.2)
    for text in ODD:
        assert tokens.tokenizer.decode(tokens.tokenizer(text).input_ids) == text
        encoded = lab.data.text.encoder(name, tokens.tokenizer)([text])[0]
        assert tokens.tokenizer.decode(list(encoded)) == text
    found = [text for part in core.PARTS for text in documents_of(tokens, part)]
    assert Counter(found) == Counter(texts)


def test_chars_are_the_sorted_characters_of_the_training_text_then_end_and_unk():
    text = "zebra " * 90 + "?!" * 30  # the held-out end has two characters of its own
    Path("a.txt").write_text(text)
    tokens = opened("a.txt", "chars", val_share=0.1, test_share=0.0)
    vocabulary = sorted(tokens.tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert [symbol for symbol, _ in vocabulary] == [*sorted(set("zebra ")), END, "<unk>"]
    assert tokens.tokenizer.eos_token == END and tokens.tokenizer.unk_token == "<unk>"
    assert set(tokens.parts["val"].tolist()) == {6, 7}  # END and unknown
    assert tokens.tokenizer("a☃é").input_ids == [1, 7, 7]


def test_ascii_has_journal_003s_75_ids_lower_cases_and_strips_accents():
    tokenizer = core.make_tokenizer("ascii", lambda: pytest.fail("it needs no text"))
    assert len(tokenizer) == 75 and tokenizer.unk_token is None
    ids = tokenizer("Àé STRASSE ﬁn Ça ☃ø\tÅ\r\n").input_ids
    assert tokenizer.decode(ids) == "ae strasse fin ca ??\ta\r\n"


@pytest.mark.parametrize("name", ["chars", "ascii"])
def test_the_character_table_encodes_what_the_tokenizer_encodes(name):
    rng = random.Random(0)
    codes = [*range(0x250), *(rng.randrange(0x110000) for _ in range(4000))]
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    tokenizer = core.make_tokenizer(name, lambda: [text[::2]])
    for piece in (text, text[::-1], *ODD[:-2], "\u0301", "\r\n"):  # none spells out <unk>
        ids = lab.data.text.encoder(name, tokenizer)([piece])[0]
        assert ids.tolist() == tokenizer.backend_tokenizer.encode(piece).ids, piece


LETTERS = ["ab", "aé ", "aab'\n", "漢字a", "a"]


@pytest.mark.parametrize("size", [257, 270, 400])
def test_bpe_by_hand_finds_the_merges_vocabulary_and_ids_of_tokenizers(size):
    """Few letters in random order: many runs, ties, and pairs that overlap."""
    rng = random.Random(size)
    texts = ["".join(rng.choices(letters, k=60)) for letters in LETTERS for _ in range(4)]
    texts += [*ODD, "aaaaaa aaaaa aaaa aaa aa a", "hug hug hugs pun puns bun buns " * 5]
    ours, theirs = (core.make_tokenizer(f"{kind}:{size}", lambda: texts) for kind in ("bpe_scratch", "bpe"))
    model, reference = (json.loads(t.backend_tokenizer.to_str())["model"] for t in (ours, theirs))
    assert model["merges"] == reference["merges"] and model["vocab"] == reference["vocab"]
    assert len(reference["merges"]) == size - 257
    unseen = ["".join(rng.choices(letters, k=200)) for letters in LETTERS] + ODD
    scratch = tokenizers.ScratchBPE(model["vocab"], model["merges"])
    for text in texts + unseen:
        assert scratch.encode(text) == theirs.backend_tokenizer.encode(text).ids


def test_bpe_stops_when_nothing_is_left_to_merge():
    for kind in ("bpe", "bpe_scratch"):
        tokenizer = core.make_tokenizer(f"{kind}:5000", lambda: ["abab"])
        assert len(tokenizer) == 257 + 2 and tokenizer.decode([258]) == "abab"


def test_bpe_by_hand_stays_within_80_lines():
    source = inspect.getsource(tokenizers.ScratchBPE) + inspect.getsource(tokenizers.joined)
    assert len(source.splitlines()) <= 80


@pytest.mark.parametrize("name", ["bpe", "bpe:x", "bpe:10", "bpe:256", "bpe_scratch:", "bpe:-5", "bpe:2e3"])
def test_a_bpe_without_a_sensible_size_is_refused(name):
    with pytest.raises(
        UserError, match=rf"--tokenizer {name}: use bpe(_scratch)?:<size> with a size over 256"
    ):
        core.make_tokenizer(name, lambda: ["text"])


def test_a_tokenizer_that_is_not_there_or_has_no_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: \./nowhere"):
        core.make_tokenizer("./nowhere", lambda: ["text"])
    encoders.load_tokenizer("tiny:bert", ["some words"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="has no end-of-text token"):
        core.make_tokenizer(str(tmp_path / "bert"), lambda: ["text"])


def test_ids_do_not_depend_on_the_hash_seed():
    """Journal 003: ids came from a set, changed with each process, and its cache decoded to garbage."""
    table(texts_of(60), "hashed.jsonl")
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than this process has
    env = os.environ | {"PYTHONHASHSEED": seed, "TOKEN_CACHE": "elsewhere"}
    done = subprocess.run([sys.executable, "-c", HASHES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exec(HASHES, ours := {})
    assert json.loads(done.stdout) == ours["hashes"]
    assert [len(hashes) for hashes in ours["hashes"]] == [5, 5]


HASHES = """
import json, core
from lab.data import text
names = ("train.bin", "val.bin", "test.bin", "unigram.npy", "tokenizer/tokenizer.json")
folders = [text.token_cache(core.Corpus("hashed.jsonl", name)) for name in ("chars", "bpe_scratch:280")]
hashes = [{name: core.sha256_file(folder / name) for name in names} for folder in folders]
print(json.dumps(hashes))
"""


# text


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


def test_built_in_documents_are_there_on_every_machine():
    tokens = opened("python-docs", max_documents=12, val_share=0.3, test_share=0.3)
    expected = list(itertools.islice(builtin.built_in_texts("python-docs"), 12))
    parts = [documents_of(tokens, part) for part in core.PARTS]
    assert sorted(itertools.chain(*parts)) == sorted(expected) and all(parts)


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


# unusable text


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
        "left out 4 row(s), no text: 5, 6, 7, 8",
        "left out 1 row(s), odd Unicode (a lone surrogate): 9",
    ]
    assert opened(data).lines == tokens.lines  # from the cache too


@pytest.mark.parametrize("row", [["a", "list"], "a string", 7, None])
def test_a_row_of_another_shape_is_unusable_not_a_crash(row):
    assert opened(with_bad_rows(200, row)).lines == ["left out 1 row(s), no text: 5"]


def test_many_unusable_rows_are_an_error_every_time():
    data = with_bad_rows(100, {"text": ""}, {"text": None})
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


# pieces


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


# the cache


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


def test_another_tokenizer_in_the_same_folder_makes_another_cache():
    data = table(texts_of(12))
    core.make_tokenizer("bytes", lambda: []).save_pretrained("mine")
    assert len(opened(data, "mine").tokenizer) == 257
    shutil.rmtree("mine")
    core.make_tokenizer("bpe:300", lambda: texts_of(12)).save_pretrained("mine")
    assert len(opened(data, "mine").tokenizer) > 257


def test_a_tokenizers_own_truncation_cuts_nothing():
    """Many tokenizer.json of the Hub hold one; a truncated document would be lost without a word."""
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained("mine")
    data = table(texts_of(12))
    whole, cut = (opened(data, name).parts for name in ("bytes", "mine"))
    assert {part: len(ids) for part, ids in cut.items()} == {part: len(ids) for part, ids in whole.items()}


@pytest.mark.parametrize("damage", ["tokenizer", "shorter", "longer"])
def test_a_cache_that_is_not_what_was_built_is_refused(damage):
    folder = token_cache(Corpus(table(texts_of(12)), "chars"))
    if damage == "tokenizer":
        path = folder / "tokenizer" / "tokenizer.json"
        path.write_text(path.read_text().replace('"x"', '"y"'))
    else:
        with open(folder / "train.bin", "r+b") as file:
            size = file.seek(0, 2)
            file.truncate(size + (2 if damage == "longer" else -2))
    with pytest.raises(UserError, match=r"is not what was built.*delete it"):
        open_cache(folder)


def forked(function) -> int:
    """Runs it in a child that then vanishes like a killed process, nothing flushed; its exit status."""
    if (pid := os.fork()) == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def build(spec, tokens, every, at=None):
    """token_cache in pieces of its own, progress saved behind each `every`-th; killed before the `at`-th."""
    calls, encoder, up_to = itertools.count(1), lab.data.text.encoder, lab.data.text.up_to

    def struck(*args):
        encode = encoder(*args)
        return lambda texts: die() if next(calls) == at else encode(texts)

    with pytest.MonkeyPatch.context() as patch:
        ticks = itertools.count(0, 6 / every)
        patch.setattr(lab.data.text, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
        everywhere(patch.setattr, lab.data.text, "PIECE", 6000)
        everywhere(patch.setattr, lab.data.text, "up_to", lambda found, _: up_to(found, 1))
        everywhere(patch.setattr, lab.data.text, "encoder", struck)
        patch.setenv("TOKEN_CACHE", tokens)
        return token_cache(spec)


def files_of(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


LONG = ["".join(texts_of(120, seed)) for seed in range(8)]  # pieces larger than a file's buffer


KILLS = {  # one after the other: how many pieces lie between two saves, and the piece it dies at
    "at once": [(1, 1)],
    "often saved": [(1, 5), (1, 1), (1, 2)],
    "now and then saved": [(2, 4)] * 2,
    "never saved": [(50, 7)],
    "first seldom, then often saved": [(50, 8), (1, 2)],
}


@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS)
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(kills):
    spec = Corpus(table(LONG), "bytes", val_share=0.3, test_share=0.2)
    expected = build(spec, "whole", every=1)
    for every, at in kills:
        status = forked(lambda every=every, at=at: build(spec, "killed", every, at))
        assert status == signal.SIGKILL
    got = build(spec, "killed", every=1)
    contents = [files_of(folder) for folder in (got, expected)]
    for files in contents:
        files.pop("progress.json", None)  # of use to a killed build only
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []
    assert sum(len(ids) for ids in open_cache(got).parts.values()) > 8 * 6000


def test_a_build_killed_behind_its_last_token_still_tells_of_unusable_rows(monkeypatch):
    spec = Corpus(with_bad_rows(200, {"text": ""}), "bytes")

    def killed_before_the_end():
        np.save = die
        token_cache(spec)

    assert forked(killed_before_the_end) == signal.SIGKILL
    assert core.open_corpus(spec, World()).lines == ["left out 1 row(s), no text: 5"]


# blocks


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("block_size", [1, 7, 8, 100])
@pytest.mark.parametrize("length", [2, 8, 9, 50, 57])
def test_every_token_but_the_first_is_the_target_of_exactly_one_block(kind, block_size, length):
    stream = np.random.default_rng(0).integers(0, 60_000, length).astype(kind)
    blocks = core.Blocks(stream, block_size)
    ids, labels = blocks.batch(range(len(blocks)), torch.device("cpu"))
    assert ids.shape == labels.shape == (len(blocks), block_size) and ids.dtype == labels.dtype == torch.int64
    counted = labels != core.IGNORE_INDEX
    assert labels[counted].tolist() == stream[1:].tolist()
    assert ids[counted].tolist() == stream[:-1].tolist()
    assert counted.sum(1).tolist() == blocks.targets(range(len(blocks))).tolist()
    assert ids.min() >= 0 and counted[:-1].all()
    if len(blocks) > 2:
        some = [len(blocks) - 1, 0]
        assert torch.equal(blocks.batch(some, torch.device("cpu"))[1], labels[some])


def test_a_stream_without_a_target_has_no_block():
    assert len(core.Blocks(np.zeros(1, np.uint16), 8)) == 0


def test_the_blocks_of_a_cache_cover_its_documents():
    texts = texts_of(30)
    tokens = opened(table(texts), "bpe:300", val_share=0.2)
    for part in core.PARTS:
        blocks = core.Blocks(tokens.parts[part], 16)
        labels = blocks.batch(range(len(blocks)), torch.device("cpu"))[1]
        stream = [tokens.tokenizer.eos_token_id, *labels[labels != core.IGNORE_INDEX].tolist()]
        assert tokens.tokenizer.decode(stream) == END.join(["", *documents_of(tokens, part), ""])
