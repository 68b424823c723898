"""mixture.py: arms and their shares, batches of several sources; and what corpus.py does for streams too
large to be read whole: budgets of tokens, three ways to read a Hub set, flat memory.
"""

import hashlib
import itertools
import json
import math
import os
import random
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import everywhere
from test_corpus import build, documents_of, files_of, forked, table, texts_of

import core
import lab.data.hub
import lab.data.text
from core import Corpus, UserError, World
from lab.data import builtin, mixture, tables
from lab.data.text import open_cache, token_cache

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# what is meant


@pytest.mark.parametrize(
    ("arm", "shares"),
    [
        ("pubmed", {"pubmed": 1}),
        ("a+b", {"a": 1 / 2, "b": 1 / 2}),
        ("a+b+c", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("0.7*a+0.3*b", {"a": 0.7, "b": 0.3}),
        (" 0.7*a + 0.3*b ", {"a": 0.7, "b": 0.3}),
        ("0.33*a+0.33*b+0.33*c", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),  # rounded by whoever typed it
        ("0.667*a+.333*b", {"a": 0.667, "b": 0.333}),
        ("1*a", {"a": 1}),
        ("owner/set:a config", {"owner/set:a config": 1}),
    ],
)
def test_an_arm_is_read_as_shares_that_add_up_to_one(arm, shares):
    found = mixture.shares_of(arm)
    assert list(found) == list(shares) and found == pytest.approx(shares, abs=1e-12)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("0.7*a+0.7*b", ["0.7*a+0.7*b", "add up to 1.4", "make it 1"]),
        ("0.5*a+0.48*b", ["add up to 0.98"]),  # two roundings are not worth 0.02
        ("0.7*a", ["add up to 0.7"]),
        ("0*a+1*b", ["every weight above 0"]),
        ("-0.3*a+1.3*b", ["every weight above 0"]),
        ("0.5*a+0.49*b", ["add up to 0.99"]),
        ("nan*a", ["add up to nan"]),
        ("0.7*a+b", ["0.7*a+b", "every source a weight, or none"]),
        ("a+0.7*b", ["every source a weight, or none"]),
        ("1.2.3*a+0.3*b", ["a weight is no number", "0.7*a+0.3*b"]),
        ("a+a", ["names a source twice", "with a weight"]),
        ("0.5*a+0.5*a", ["names a source twice"]),
        ("a+", ["'a+'", "part without a name"]),
        ("", ["part without a name"]),
        ("a++b", ["part without a name"]),
    ],
)
def test_an_arm_that_means_nothing_is_refused_by_name_and_with_a_cure(arm, words):
    with pytest.raises(UserError) as error:
        mixture.shares_of(arm)
    assert all(word in one_line(error) for word in words), error.value


def test_sources_get_their_names():
    pairs = ("a=x.jsonl", "b.2=owner/set:with=equals", "c=/dir/x y.txt", "a=x.jsonl")
    expected = {"a": "x.jsonl", "b.2": "owner/set:with=equals", "c": "/dir/x y.txt"}
    assert mixture.named_sources(pairs) == expected
    assert mixture.named_sources(()) == {}


@pytest.mark.parametrize("pair", ["x.jsonl", "=x.jsonl", "a=", "a+b=x.jsonl", "a b=x.jsonl", "0.5*a=x"])
def test_a_source_without_a_name_is_refused(pair):
    with pytest.raises(UserError) as error:
        mixture.named_sources((pair,))
    assert pair in one_line(error) and "write name=where" in str(error.value)


def test_a_name_for_two_sources_is_refused():
    with pytest.raises(UserError, match=r"a is both x.jsonl and y.jsonl: use two names"):
        mixture.named_sources(("a=x.jsonl", "a=y.jsonl"))


def test_a_path_or_hub_id_is_called_by_its_last_part_without_revision():
    Path("here.jsonl").touch()
    assert mixture.label("here.jsonl") == "here" and mixture.label("/data/there.jsonl") == "there"
    assert mixture.label("absent.jsonl") == "absent.jsonl"  # a name, as far as anybody knows
    assert mixture.label("owner/med_v1.2") == "med_v1.2" and mixture.label("allenai/c4:en") == "c4:en"
    assert mixture.label("owner/set@a/branch") == "set" and mixture.label("pubmed") == "pubmed"


# whole numbers, evenly spread


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100, 1001, 1_280_000])
@pytest.mark.parametrize(
    "shares", [[1.0], [0.5, 0.5], [1 / 3] * 3, [0.7, 0.3], [0.9, 0.09, 0.01], [0.1] * 10]
)
def test_shares_become_whole_numbers_that_add_up_and_are_off_by_less_than_one(shares, n):
    counts = mixture.apportion(shares, n)
    assert sum(counts) == n and min(counts) >= 0
    assert all(abs(count - share * n) < 1 for count, share in zip(counts, shares, strict=True))


def test_the_largest_remainders_get_what_is_left_and_of_equals_the_first():
    assert mixture.apportion([0.5, 0.5], 7) == [4, 3]
    assert mixture.apportion([0.24, 0.52, 0.24], 10) == [3, 5, 2]
    assert mixture.apportion([0.28, 0.28, 0.44], 10) == [3, 3, 4]
    assert mixture.apportion([0.7, 0.3], 10) == [7, 3]  # 0.7 * 10 is a bit under 7 in floating point
    assert mixture.apportion([0.1 + 0.2, 0.7], 10) == [3, 7]


@pytest.mark.parametrize("counts", [[5], [3, 3], [7, 3], [90, 9, 1], [1, 1, 1], [0, 4], [640, 320, 40]])
def test_sources_are_spread_evenly_over_the_run(counts):
    owner, total = mixture.interleave(counts), sum(counts)
    assert np.bincount(owner, minlength=len(counts)).tolist() == counts
    for source, count in enumerate(counts):  # at any time every source has given what it should have by then
        given = np.cumsum(owner == source)
        assert np.abs(given - np.arange(1, total + 1) * count / total).max() <= max(1, len(counts) - 1)


def test_a_source_of_which_there_is_little_comes_in_the_middle_not_first():
    assert mixture.interleave([9, 1]).tolist().index(1) in (4, 5)
    rare = np.flatnonzero(mixture.interleave([2, 98]) == 0)
    assert abs(rare[0] - 25) <= 1 and abs(rare[1] - 75) <= 1


# the order of a source's blocks


def test_an_order_is_a_pool_then_the_same_pool_shuffled_again():
    order = mixture.source_order(1, "a", 20, 17, 6)
    first, second, rest = order[:6].tolist(), order[6:12].tolist(), order[12:].tolist()
    assert len(set(first)) == 6 and set(first) < set(range(20)) and sorted(second) == sorted(first) != second
    assert first != second and len(rest) == 5 and set(rest) < set(first) and rest != first[:5] != second[:5]


def test_an_order_depends_on_seed_and_name_and_begins_alike_whatever_its_length():
    whole = mixture.source_order(3, "a", 50, 50, 50).tolist()
    assert sorted(whole) == list(range(50)) != whole
    for n in (0, 1, 17, 49):
        assert mixture.source_order(3, "a", 50, n, n).tolist() == whole[:n]
    assert mixture.source_order(4, "a", 50, 50, 50).tolist() != whole
    assert mixture.source_order(3, "b", 50, 50, 50).tolist() != whole


def test_an_order_is_the_same_on_every_machine():
    """Fixed once: a run that is resumed elsewhere, or next year, reads on where it was."""
    digest = hashlib.sha256(b"42/pubmed/0").digest()
    want = np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(1000)[:8]
    assert mixture.source_order(42, "pubmed", 1000, 8, 8).tolist() == want.tolist()


# blocks of several sources


def streams(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 60_000, n).astype(np.uint16) for name, n in zip("abcd", sizes, strict=False)
    }


def test_blocks_are_the_text_of_their_streams_and_know_their_source():
    of, size = streams(41, 5, 4, 33), 4
    blocks = mixture.MixedBlocks(of, size)
    assert blocks.counts == [10, 1, 0, 8] and len(blocks) == 19  # 4 tokens have 3 targets: no whole block
    row = 0
    for number, stream in enumerate(of.values()):
        for start in range(0, (len(stream) - 1) // size * size, size):
            assert blocks.source([row]).tolist() == [number]
            assert blocks.tokens(row).tolist() == stream[start : start + size + 1].tolist()
            row += 1
    ids, labels = blocks.batch([18, 0, 10], CPU)
    assert ids.shape == labels.shape == (3, size) and ids.dtype == labels.dtype == torch.int64
    assert labels[0].tolist() == of["d"][29:33].tolist() and ids[0].tolist() == of["d"][28:32].tolist()
    assert ids[1].tolist() == of["a"][:4].tolist() and labels[2].tolist() == of["b"][1:5].tolist()


def test_an_empty_share_of_a_rank_is_no_special_case():
    assert mixture.MixedBlocks(streams(9), 4).source([]).tolist() == []


# batches


def batches(arm, sizes=(1000, 900, 500), batch=6, steps=9, world=None, seed=5, passes=1, repeat=False):
    shares = mixture.shares_of(arm)
    of = {name: stream for name, stream in streams(*sizes).items() if name in shares}
    blocks = mixture.MixedBlocks({name: of[name] for name in shares}, 4)
    return mixture.Batches(blocks, shares, batch, steps, world or World(), seed, passes, repeat)


def given(found, name) -> list[int]:
    """The blocks of one source in the order of the run, by their number in that source."""
    source = found.blocks.names.index(name)
    rows = found.rows[found.blocks.source(found.rows) == source]
    return (rows - found.blocks.starts[source]).tolist()


@pytest.mark.parametrize("arm", ["a", "a+b", "0.7*a+0.3*b", "a+b+c", "0.9*a+0.1*c"])
def test_no_block_is_read_twice_and_shares_are_exact(arm):
    found = batches(arm)
    assert len(set(found.rows.tolist())) == len(found.rows) == 54
    counts = np.bincount(found.blocks.source(found.rows)).tolist()
    assert counts == mixture.apportion(list(mixture.shares_of(arm).values()), 54)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("arm", ["a+b", "0.7*a+0.3*b", "b+a", "b+0*a".replace("0*a", "c")])
def test_a_source_gives_a_mixture_the_first_blocks_of_its_own_arm(arm, passes):
    """Nothing but how much of it is read may depend on what stands beside a source."""
    mixed = batches(arm, passes=passes)
    for name in mixed.blocks.names:
        alone, pool = given(batches(name, passes=passes), name), mixed.pools[mixed.blocks.names.index(name)]
        assert given(mixed, name)[:pool] == alone[:pool] and pool >= 5


def test_passes_read_as_many_times_fewer_blocks_equally_many_in_all_arms():
    for passes in (1, 2, 3, 6):
        for arm in ("a", "b", "a+b", "c+b+a"):
            found = batches(arm, batch=12, steps=6, passes=passes)
            assert len(set(found.rows.tolist())) == sum(found.pools) == 72 / passes
            for name in found.blocks.names:
                assert set(Counter(given(found, name)).values()) == {passes}


def test_an_odd_number_of_passes_leaves_the_arms_equal_too():
    for passes, steps in itertools.product((2, 3, 5, 7), (5, 11)):
        pools = [sum(batches(arm, passes=passes, steps=steps).pools) for arm in ("a", "a+b", "a+b+c")]
        assert len(set(pools)) == 1


def test_each_pass_has_an_order_of_its_own():
    order = given(batches("a", passes=3), "a")
    first, second, third = order[:18], order[18:36], order[36:]
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first


def test_a_source_that_holds_too_little_is_an_error_that_says_what_would_do():
    with pytest.raises(UserError) as error:
        batches("a+b", sizes=(1000, 41))
    words = [
        "b has 10 blocks of 4 training tokens",
        "27 are asked for",
        "--max_steps",
        "--passes",
        "--repeat",
    ]
    assert all(word in one_line(error) for word in words)
    batches("a+b", sizes=(1000, 41), passes=3)  # 9 distinct ones do
    with pytest.raises(
        UserError, match=r"a holds no block of training text"
    ):  # of nothing, no repetition makes more
        batches("a", sizes=(3,), repeat=True)


def test_repeat_reads_all_of_a_short_source_again_and_counts():
    found = batches("a+b", sizes=(1000, 41), repeat=True)
    counts = Counter(given(found, "b"))
    assert set(counts) == set(range(10)) and set(counts.values()) == {2, 3} and sum(counts.values()) == 27
    assert len(set(given(found, "a"))) == 27  # the other one is left alone
    one = found.ledger()["sources"]["b"]
    assert one["distinct_blocks"] == 10 and one["epochs"] == 2.7


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_ranks_share_out_the_global_batch(size):
    ranks = [batches("a+b", world=World(rank, rank, size)) for rank in range(size)]
    for step in range(len(ranks[0])):
        shares = [rank.rank_batch(step) for rank in ranks]
        whole = ranks[0].global_batch(step).tolist()
        assert len(whole) == 6 and sorted(row for share in shares for row in share) == sorted(whole)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert all(rank.global_batch(step).tolist() == whole for rank in ranks)
        assert all(isinstance(row, int) for share in shares for row in share)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    one, same, other = batches("a+b"), batches("a+b"), batches("a+b", seed=6)
    backwards = [same.global_batch(step).tolist() for step in reversed(range(9))][::-1]
    core.reseed(1)
    assert [one.global_batch(step).tolist() for step in range(9)] == backwards
    assert other.rows.tolist() != one.rows.tolist()
    longer = batches("a", steps=20).rows.tolist()
    assert longer[: 9 * 6] == batches("a").rows.tolist()


def test_every_batch_of_an_even_mixture_is_even():
    found = batches("a+b")
    assert {tuple(found.seen(step).values()) for step in range(9)} == {(3, 3)}
    skewed = batches("0.7*a+0.3*b")
    seen = [skewed.seen(step) for step in range(9)]
    assert all(abs(one["a"] - 4.2) <= 1 for one in seen) and {sum(one.values()) for one in seen} == {6}
    assert sum(one["b"] for one in seen) == 16  # 16.2


def test_the_ledger_is_what_a_count_by_hand_says():
    found = batches("0.7*a+0.3*b", passes=2)
    ledger = found.ledger()
    assert {name: ledger[name] for name in ("steps", "batch", "block_size", "blocks", "tokens")} == {
        **{"steps": 9, "batch": 6, "block_size": 4, "blocks": 54, "tokens": 216}
    }
    assert json.loads(json.dumps(ledger)) == ledger  # it goes into config.json
    for name, blocks in (("a", 38), ("b", 16)):
        order, one = given(found, name), ledger["sources"][name]
        assert (one["blocks"], one["tokens"], one["share"]) == (blocks, 4 * blocks, blocks / 54)
        assert (one["distinct_blocks"], one["epochs"]) == (len(set(order)), 2) and len(order) == blocks
        assert (one["first_block"], one["last_block"]) == (order[0], order[-1])
        sha = hashlib.sha256(np.array(order, dtype="<i8").tobytes()).hexdigest()
        assert one["order_sha256"] == sha


def test_a_run_of_no_steps_has_a_ledger_too():
    ledger = batches("a+b", steps=0).ledger()
    assert ledger["tokens"] == 0 and ledger["sources"]["a"]["first_block"] is None


def test_arms_differ_in_their_sources_alone_and_what_else_differs_is_named():
    first = batches("a").ledger()
    assert mixture.differences(first, batches("0.7*b+0.3*c").ledger()) == []
    assert mixture.differences(first, batches("a", steps=8).ledger()) == ["steps", "blocks", "tokens"]
    assert "batch" in mixture.differences(first, batches("a", batch=3, steps=18).ledger())


# several texts with one tokenizer


def opened(data, tokenizer="bytes", **more):
    more = {"val_share": 0.2, "test_share": 0.2, "first_trains": False} | more
    return core.open_corpus(Corpus(str(data), tokenizer, **more), World())


def test_a_learnt_tokenizer_is_one_for_all_learns_from_training_text_of_each_and_is_kept():
    shared = {"val_share": 0.2, "test_share": 0.2, "first_trains": False}
    a = [f"{i} anemone anemone" for i in range(60)]
    b = [f"{i} zirconium zirconium" for i in range(60)]
    specs = {"a": Corpus(table(a, "a.jsonl"), "bpe:300", **shared)}
    specs["b"] = Corpus(table(b, "b.jsonl"), "bpe:300", **shared)
    text = mixture.open_text(specs, "bpe:300", specs, World())
    assert text.tokens["a"].fingerprint["tokenizer"] == text.tokens["b"].fingerprint["tokenizer"]
    vocabulary = set(text.tokenizer.get_vocab())
    assert {"Ġanemone", "Ġzirconium"} <= vocabulary
    again = mixture.open_text({"b": specs["b"]}, "bpe:300", specs, World())  # a run reads a part of the study
    assert again.tokens["b"].fingerprint == text.tokens["b"].fingerprint
    alone = mixture.open_text({"b": specs["b"]}, "bpe:300", {"b": specs["b"]}, World())
    assert "Ġanemone" not in alone.tokenizer.get_vocab()


def test_the_frequencies_of_a_mixture_are_those_of_its_sources_by_share():
    shared = {"val_share": 0.2, "test_share": 0.2, "first_trains": False}
    specs = {"a": Corpus(table(["aab"] * 2 + texts_of(10), "a.jsonl"), "bytes", **shared)}
    specs["b"] = Corpus(table(texts_of(300, seed=1), "b.jsonl"), "bytes", **shared)
    text = mixture.open_text(specs, "bytes", {}, World())
    of = [np.bincount(text.tokens[name].parts["train"], minlength=257) for name in "ab"]
    want = 0.3 * of[0] / of[0].sum() + 0.7 * of[1] / of[1].sum()
    found = text.frequencies({"a": 0.3, "b": 0.7})
    np.testing.assert_allclose(found / found.sum(), want, rtol=1e-12)
    assert found.sum() == pytest.approx(1e8)


# held-out text


@pytest.mark.parametrize("context", [1, 7, 64, 1000])
@pytest.mark.parametrize("part", ["val", "test"])
def test_every_token_of_every_held_out_document_is_a_target_once(context, part):
    tokens = opened(table(texts_of(100)))
    windows, groups = mixture.windows_of(tokens, part, context)
    texts, end = documents_of(tokens, part), tokens.tokenizer.eos_token_id
    targets = [[] for _ in texts]
    for window, group in enumerate(groups):
        ids, labels = windows.batch([window], CPU)
        counted = labels[0] != core.IGNORE_INDEX
        assert ids.shape[1] <= context
        if not targets[group]:  # a document begins with its own END: nothing of the one before is seen
            assert ids[0, 0] == end
        targets[group] += labels[0][counted].tolist()
    assert [tokens.tokenizer.decode(ids[:-1]) for ids in targets] == texts
    assert all(ids[-1] == end and end not in ids[:-1] for ids in targets)
    assert (
        len(windows) == len(groups) and groups.tolist() == sorted(groups) and len(set(groups)) == len(texts)
    )


def test_intervals_over_few_documents_redraw_stretches_of_windows():
    """Of three documents nothing can be redrawn; of a single one (a book) even less."""
    tokens = opened(table(texts_of(8, words=300)), val_share=0.3, test_share=0.3)
    documents = documents_of(tokens, "test")
    assert 0 < len(documents) < mixture.FEWEST
    windows, groups = mixture.windows_of(tokens, "test", 16)
    assert len(set(groups.tolist())) == min(100, len(windows)) > len(documents)


def test_a_part_without_documents_has_no_windows():
    tokens = opened(table(texts_of(6)), test_share=0.0)
    windows, groups = mixture.windows_of(tokens, "test", 16)
    assert len(windows) == len(groups) == 0


# budgets of tokens


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


def test_what_was_read_ahead_makes_no_source_look_worse_than_it_is():
    texts = ["" if i % 143 == 142 else f"{i} " + "word " * 1200 for i in range(700)]  # 0.7 % are empty
    assert len(opened(table(texts)).lines) == 1
    assert len(opened(table(texts), max_tokens=50_000).parts["train"]) == 50_001


# sets of the Hub


class HubSet:
    """Stands for a set of the Hub: counts what is read of it."""

    def __init__(self, texts, streaming):
        self.texts, self.streaming, self.read, self.seeds = texts, streaming, 0, []
        Path("hub.arrow").write_text("".join(texts))
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
    texts = [text for i in range(3000) for text in ([""] if i else [f"{n} words" for n in range(good)])]
    sets = hub(texts * 2)
    with pytest.raises(UserError) as error:
        opened("owner/set", streaming="True", max_tokens=10**9)
    share = f"1000 of {1000 + good} rows are unusable, more than 1%" if not good else "rows are unusable"
    assert share in one_line(error) and "owner/set" in str(error.value)
    assert sets[0][-1].read <= 1000 + good


@pytest.mark.parametrize(("given", "streams"), [({}, False), ({"max_documents": 5}, True)])
def test_other_scripts_stream_where_documents_are_counted(given, streams):
    assert Corpus("owner/set", "bytes", **given).streams is streams


# built-in text


def test_numpy_docs_are_a_text_of_their_own_that_every_installation_has():
    texts = list(itertools.islice(builtin.built_in_texts("numpy-docs"), 300))
    assert len(texts) == 300 and all(len(text.split()) > 2 for text in texts)
    assert texts == list(itertools.islice(builtin.built_in_texts("numpy-docs"), 300))
    assert "numpy" in " ".join(texts) and len(set(texts)) > 200
    assert not any("tests" in path.parts for path in builtin._numpy_files())
    tokens = opened("numpy-docs", max_documents=150)
    assert f"numpy {np.__version__}" in tokens.fingerprint["data"]
    assert all(len(tokens.parts[part]) > 1000 for part in core.PARTS)


# memory


@pytest.mark.parametrize(
    ("tokenizer", "megabytes"), [("ascii", 10), pytest.param("bytes", 200, marks=pytest.mark.slow)]
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


def test_two_sets_of_one_repository_are_two_texts(monkeypatch):
    """Streamed, they share the repository's commit: journal 002's two subsets would be called the same."""
    asked = []
    everywhere(
        monkeypatch.setattr,
        tables,
        "_hub_commit",
        lambda repo, revision: asked.append((repo, revision)) or "c0ffee",
    )
    everywhere(monkeypatch.setattr, lab.data.hub, "_hub_answers", lambda: True)
    names = ("owner/pile:PubMed Abstracts", "owner/pile:USPTO@v1", "owner/pile")
    found = [tables.data_fingerprint(name, streaming=True) for name in names]
    assert found == ["c0ffee:PubMed Abstracts", "c0ffee:USPTO", "c0ffee"]
    assert asked == [("owner/pile", None), ("owner/pile", "v1"), ("owner/pile", None)]
