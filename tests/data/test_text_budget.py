"""Texts too large to be read whole: budgets of tokens, ways to read a Hub set, flat memory."""

import itertools
import math
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import everywhere
from toys.corpus import build, documents_of, files_of, forked, table, texts_of
from toys.mixture import (
    one_line,
    opened,
    own_cache,  # noqa: F401 (a fixture)
)

import core
import lab.data.hub
import lab.data.text
from core import Corpus, UserError
from lab.data import builtin, tables
from lab.data.text import open_cache, token_cache


def test_max_tokens_is_an_exact_count_and_the_tokens_are_the_first_ones():
    data = table(texts_of(200))
    whole = opened(data)
    for most in (1, 2, 500, 1234):
        cut = opened(data, max_tokens=most)
        stream = cut.parts["train"]
        assert len(stream) == most + 1 and stream[-1] == cut.tokenizer.eos_token_id  # and an END behind all
        assert stream[:-1].tolist() == whole.parts["train"][:most].tolist()
        assert cut.unigram.sum() == most + 1
    plenty = opened(data, max_tokens=10**9)
    assert [plenty.parts[part].tolist() for part in core.PARTS] == [
        whole.parts[part].tolist() for part in core.PARTS
    ]
    begun = (whole.parts["train"][:1234] == whole.tokenizer.eos_token_id).sum()
    assert opened(data, max_tokens=1234).documents["train"] == begun


def test_reading_goes_on_until_val_and_test_have_their_tokens():
    data, least = table(texts_of(400)), 2500
    whole, found = opened(data), opened(data, max_tokens=300, held_out_tokens=least)
    assert len(found.parts["train"]) == 301
    sizes = [len(found.parts[part]) - 1 for part in ("val", "test")]
    assert min(sizes) >= least and max(sizes) < len(whole.parts["test"])  # and then it stops
    longest = max(len(document.encode()) + 1 for document in documents_of(whole, "val"))
    assert min(sizes) < least + longest
    for part in ("val", "test"):
        kept = found.parts[part][:-1]
        assert kept.tolist() == whole.parts[part][: len(kept)].tolist()


def test_a_text_with_too_little_held_out_gives_all_it_has():
    data = table(texts_of(60))
    whole, found = opened(data), opened(data, max_tokens=300, held_out_tokens=10**9)
    assert found.parts["test"].tolist() == whole.parts["test"].tolist()


@pytest.mark.parametrize(
    "kills",
    [
        [(1, 5), (1, 1), (1, 2)],
        pytest.param([(50, 12)], marks=pytest.mark.slow),
        pytest.param([(2, 9), (3, 3)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_killed_build_with_a_budget_ends_with_the_same_bytes(kills):
    texts = [*texts_of(12, words=3000), *texts_of(5, seed=1)]  # pieces larger than a file's buffer
    spec = Corpus(
        table(texts), "bytes", val_share=0.2, test_share=0.2, max_tokens=60_000, held_out_tokens=9000
    )
    expected = build(spec, "whole", every=1)
    for every, at in kills:
        assert forked(lambda every=every, at=at: build(spec, "killed", every, at)) == signal.SIGKILL
    got = build(spec, "killed", every=1)
    contents = [files_of(folder) for folder in (got, expected)]
    for files in contents:
        files.pop("progress.json", None)  # of use to a killed build only
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []
    assert len(open_cache(got).parts["train"]) == 60_001


def test_the_first_document_is_drawn_like_any_other_if_it_is_not_to_train():
    """A document may be the first of one source and the hundredth of another: one hash for all."""
    texts = texts_of(60)
    first = opened(table(texts, "first.jsonl"))
    held = documents_of(first, "test")[0]
    moved = opened(table([held, *(text for text in texts if text != held)], "moved.jsonl"))
    assert documents_of(moved, "test")[0] == held
    kept = opened(table([held, *(t for t in texts if t != held)], "kept.jsonl"), first_trains=True)
    assert documents_of(kept, "train")[0] == held  # as every script but the study has it


@pytest.mark.slow
def test_what_was_read_ahead_makes_no_source_look_worse_than_it_is():
    texts = ["" if i % 143 == 142 else f"{i} " + "word " * 1200 for i in range(700)]  # 0.7 % are empty
    assert len(opened(table(texts)).lines) == 1
    assert len(opened(table(texts), max_tokens=50_000).parts["train"]) == 50_001


class HubSet:
    """Stands for a set of the Hub: counts what is read of it."""

    def __init__(self, texts, streaming):
        self.texts, self.streaming, self.read, self.seeds = texts, streaming, 0, []
        Path("hub.arrow").write_text("".join(map(str, texts)))
        self.cache_files = [{"filename": "hub.arrow"}]

    def shuffle(self, seed):
        self.seeds.append(seed)
        random.Random(seed).shuffle(texts := list(self.texts))
        shuffled = HubSet(texts, self.streaming)
        return shuffled

    def __iter__(self):
        for text in self.texts:
            self.read += 1
            yield {"text": text}


@pytest.fixture
def hub(monkeypatch):
    """hub(texts) -> a list of the sets that were opened: of (name, split, streaming)."""

    def prepared(texts):
        opened_sets = []

        def load(name, split, streaming=False):
            opened_sets.append((name, split, streaming, HubSet(texts, streaming)))
            return opened_sets[-1][-1]

        everywhere(monkeypatch.setattr, tables, "_hub_dataset", load)
        everywhere(
            monkeypatch.setattr,
            tables,
            "_hub_commit",
            lambda repo, revision: f"commit of {repo} at {revision}",
        )
        return opened_sets

    return prepared


@pytest.mark.slow
def test_a_streamed_set_is_read_as_far_as_it_is_needed(hub):
    texts = texts_of(150, words=5000)  # some 20,000 characters each, 52 to a megabyte
    sets = hub(texts)
    found = opened("owner/set:config", streaming="True", max_tokens=100_000, held_out_tokens=1000)
    assert [one[:3] for one in sets] == [("owner/set:config", "train", True)]
    # a group of pieces in hand, and one ahead
    assert sets[0][-1].read <= 2.2 * (1 << 20) / len(texts[0]) < len(texts)
    whole = opened(table(texts, "same.jsonl"))
    assert found.parts["train"][:-1].tolist() == whole.parts["train"][:100_000].tolist()
    assert found.fingerprint["data"] == "commit of owner/set at None:config"


def test_a_downloaded_set_comes_in_its_own_order_or_in_one_drawn_by_the_split_seed(hub):
    texts = texts_of(80)
    order, parts = {}, {}
    for streaming, seed in (("CacheStream", 42), ("CacheStream", 7), ("False", 42), ("False", 7)):
        sets = hub(texts)
        more = {"val_share": 0.0, "test_share": 0.01, "split_seed": seed, "streaming": streaming}
        found = opened("owner/set", **more)
        order[streaming, seed] = [text for text in documents_of(found, "train") if text in texts]
        parts[streaming, seed] = set(order[streaming, seed])
        assert {one[2] for one in sets} == {False}
        seeds = [seed for one in sets for seed in one[-1].seeds]
        assert set(seeds) == ({seed} if streaming == "False" else set())
    own = [text for text in texts if text in parts["CacheStream", 42]]
    assert order["CacheStream", 42] == own != order["False", 42]
    assert parts["CacheStream", 42] == parts["False", 42]  # another order, the same documents held out
    assert order["False", 42] != order["False", 7]


def test_each_way_of_reading_has_a_cache_of_its_own(hub):
    hub(texts_of(30))
    specs = [Corpus("owner/set", "bytes", streaming=way) for way in ("True", "CacheStream", "False")]
    assert len({token_cache(spec) for spec in specs}) == 3
    assert [spec.streams for spec in specs] == [True, False, False]


@pytest.mark.parametrize("good", [0, 50])
def test_a_stream_of_unusable_rows_is_refused_early(good, hub):
    """A Hub set may have no end: a thousand bad rows that are more than 1 % are enough to know."""
    texts = [text for i in range(3000) for text in ([7] if i else [f"{n} words" for n in range(good)])]
    sets = hub(texts * 2)
    with pytest.raises(UserError) as error:
        opened("owner/set", streaming="True", max_tokens=10**9)
    share = f"1000 of {1000 + good} rows are unusable, more than 1%" if not good else "rows are unusable"
    assert share in one_line(error) and "owner/set" in str(error.value)
    assert sets[0][-1].read <= 1000 + good


@pytest.mark.parametrize(("given", "streams"), [({}, False), ({"max_documents": 5}, True)])
def test_other_scripts_stream_where_documents_are_counted(given, streams):
    assert Corpus("owner/set", "bytes", **given).streams is streams


def test_numpy_docs_are_a_text_of_their_own_that_every_installation_has():
    texts = list(itertools.islice(builtin.built_in_texts("numpy-docs"), 300))
    assert len(texts) == 300 and all(len(text.split()) > 2 for text in texts)
    assert texts == list(itertools.islice(builtin.built_in_texts("numpy-docs"), 300))
    assert "numpy" in " ".join(texts) and len(set(texts)) > 200
    assert not any("tests" in path.parts for path in builtin._numpy_files())
    tokens = opened("numpy-docs", max_documents=150)
    assert f"numpy {np.__version__}" in tokens.fingerprint["data"]
    assert all(len(tokens.parts[part]) > 1000 for part in core.PARTS)


@pytest.mark.parametrize(
    ("tokenizer", "megabytes"), [("ascii", 10), pytest.param("bytes", 20, marks=pytest.mark.slow)]
)
def test_memory_stays_flat_whatever_the_length_of_a_stream(tokenizer, megabytes, monkeypatch):
    """In a child: what it takes at its most must not grow with what it reads."""
    line = "".join(random.Random(0).choices("abcdefghij \n", k=10_000))

    def rows(*_, **__):
        for number in range(megabytes * 100):
            yield {"text": f"{number} {line}"}

    def grown() -> float:
        """MB that the build took beyond the first quarter of it."""
        taken = []

        def watched(*_, **__):
            for number, row in enumerate(rows()):
                if number % 50 == 0:
                    pages = int(Path("/proc/self/statm").read_text().split()[1])
                    taken.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
                yield row

        everywhere(monkeypatch.setattr, tables, "stream_rows", watched)
        more = {"val_share": 0.01, "test_share": 0.01, "streaming": "True"}
        everywhere(monkeypatch.setattr, tables, "_hub_commit", lambda *_: "x")
        token_cache(Corpus("owner/set", tokenizer, **more))
        return max(taken) - max(taken[: math.ceil(len(taken) / 4)])

    def measured():
        Path("grown").write_text(str(grown()))

    assert forked(measured) == 0
    assert float(Path("grown").read_text()) < 15, "MB beyond the first quarter"


def test_a_reader_that_was_one_group_ahead_leaves_no_trace():
    """What was read ahead and not needed changes neither streams nor counts."""
    data = table(texts_of(3000))
    found = opened(data, max_tokens=100)
    with pytest.MonkeyPatch.context() as patch:
        up_to = lab.data.text.up_to
        everywhere(patch.setattr, lab.data.text, "up_to", lambda pieces, _: up_to(pieces, 1))
        patch.setattr(lab.data.text, "time", SimpleNamespace(monotonic=itertools.count(0, 1).__next__))
        patch.setenv("TOKEN_CACHE", "small groups")
        other = opened(data, max_tokens=100)
    assert other.documents == found.documents
    for part in core.PARTS:
        assert other.parts[part].tolist() == found.parts[part].tolist()
