"""Arms and their shares, batches of several sources, one tokenizer for all."""

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys.corpus import documents_of, table, texts_of
from toys.mixture import (
    given,
    one_line,
    opened,
    own_cache,  # noqa: F401 (a fixture)
    streams,
)

import core
from core import Corpus, UserError, World
from lab.data import mixture
from lab.data.blocks import FEWEST

CPU = torch.device("cpu")


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


def batches(arm, sizes=(1000, 900, 500), batch=6, steps=9, world=None, seed=5, passes=1, repeat=False):
    shares = mixture.shares_of(arm)
    of = {name: stream for name, stream in streams(*sizes).items() if name in shares}
    blocks = mixture.MixedBlocks({name: of[name] for name in shares}, 4)
    return mixture.Batches(blocks, shares, batch, steps, world or World(), seed, passes, repeat)


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
    assert 0 < len(documents) < FEWEST
    windows, groups = mixture.windows_of(tokens, "test", 16)
    assert len(set(groups.tolist())) == min(100, len(windows)) > len(documents)


def test_a_part_without_documents_has_no_windows():
    tokens = opened(table(texts_of(6)), test_share=0.0)
    windows, groups = mixture.windows_of(tokens, "test", 16)
    assert len(windows) == len(groups) == 0


def test_a_damaged_shared_tokenizer_is_learnt_again():
    corpora = {name: Corpus(table(texts_of(40, seed), f"{name}.jsonl"), "") for seed, name in enumerate("ab")}
    path = Path(mixture.shared_tokenizer("bpe:300", corpora)) / "tokenizer.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"a"', b'"b"', 1))
    assert Path(mixture.shared_tokenizer("bpe:300", corpora)) == path.parent and path.read_bytes() == before


def test_a_study_and_its_runs_share_a_tokenizer_in_whatever_order_they_name_the_sources():
    """Each learnt one of its own: the same, in two folders."""
    corpora = {name: Corpus(table(texts_of(40, seed), f"{name}.jsonl"), "") for seed, name in enumerate("ab")}
    turned = dict(reversed(corpora.items()))
    assert mixture.shared_tokenizer("bpe:300", corpora) == mixture.shared_tokenizer("bpe:300", turned)


@pytest.mark.parametrize(
    ("name", "short"), [("a.jsonl.gz", "a"), ("x/B.CSV", "B"), ("owner/set@main", "set")]
)
def test_a_label_has_no_suffix_of_any_kind(name, short):
    Path("a.jsonl.gz").touch()
    assert mixture.label(name) == short


@pytest.mark.parametrize(("mode", "flag"), [("train", "--data"), ("study", "--arms")])
def test_a_text_that_is_nowhere_is_told_under_the_flag_that_named_it(mode, flag):
    cfg = SimpleNamespace(sources=(), max_steps=2, batch=2, passes=1, block_size=8, max_tokens=None)
    vars(cfg).update(mode=mode, data="nowhere", arms=("nowhere",), tokenizer="bytes", text_column="text")
    with pytest.raises(UserError, match=f"^{flag} 'nowhere': no such text"):
        mixture.sources_of(cfg)
