"""Tokenizers: every text comes back, by-hand BPE is the library's, what is refused."""

import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from toys.corpus import (
    documents_of,
    opened,
    own_cache,  # noqa: F401 (a fixture)
    table,
    texts_of,
)

import core
import lab.data.text
import lab.run.files
from core import UserError
from lab.data import tokenizers
from lab.data.cache import read_texts, write_texts
from lab.data.tokenizers import END

ODD = [  # each comes back to the character
    "plain words, isn't it ? a . b ; they 're n't , 've \"quoted\" !",
    "Zürich naïve \u0130stanbul Å e\u0301 漢字 \U0001f600 \U0001f468\u200d\U0001f469 ½² \u2028 \u00a0 \ufeff",
    "windows\r\nlines\r\n\r\ntabs\tand\t\ttrailing   \n  leading   ",
    "\n\n\n  \n \t ",
    "controls \x00 \x01 \x1c\x1f \x7f \x85 \x0b\x0c end",
    "<unk> <|end of text|> aaaaaaaaaaaaaa'll 'LL 12345 $%^&*(",
    "x",
]


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
    tokenizers.encoder_tokenizer("tiny:bert", ["some words"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="has no end-of-text token"):
        core.make_tokenizer(str(tmp_path / "bert"), lambda: ["text"])


@pytest.mark.slow
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


@pytest.mark.parametrize(("last", "kind"), [(900, "uint16"), (70_000, "uint32")])
def test_ids_beyond_a_hole_of_the_vocabulary_are_counted(last, kind):
    """len(tokenizer) counts tokens, and is less than the largest id where some are missing before it."""
    import tokenizers as library

    inner = core.make_tokenizer("bytes", lambda: []).backend_tokenizer
    vocabulary = {**inner.get_vocab(), "e": last}
    holed = tokenizers.byte_level(vocabulary, [])
    assert isinstance(holed.backend_tokenizer, library.Tokenizer) and len(holed) == 257
    assert tokenizers.id_count(holed) == last + 1 and tokenizers.id_kind(holed) == kind
    sizes = core.token_bytes(holed)
    assert len(sizes) == last + 1 and sizes[last] == 1 and not sizes[257:last].any()
    holed.save_pretrained("holed")
    tokens = opened(table(["eel"] * 9), "holed")
    assert tokens.parts["train"].dtype == kind and len(tokens.unigram) == last + 1
    assert tokens.parts["train"].tolist().count(last) == tokens.unigram[last] > 0
    Path("cached").mkdir()
    integers = write_texts(Path("cached"), ["eel"], holed)
    assert read_texts(Path("cached"), integers)[0].tolist()[:2] == [last, last]
