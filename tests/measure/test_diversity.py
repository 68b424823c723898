"""Coefficients of a study's arms: disjoint batches, embeddings found again or not."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toys.diversity import (
    TINY,
    copied,  # noqa: F401 (a fixture)
    fails,
    go,
    in_process,
    parsed,
    plan_of,
    run_folders,
    snapshot,
    sources,  # noqa: F401 (a fixture)
    study_here,
    study_of,
    texts_of,
    whole,  # noqa: F401 (a fixture)
    write,
)

import core
import run_pretrain_diversity as script
from core import World
from lab.data import mixture
from lab.measure import diversity, task2vec


def test_mode_cache_fills_the_token_cache_and_trains_nothing(sources, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))
    said = in_process([*TINY, "--out", "out", "--mode", "cache"], monkeypatch, capfd)
    assert not [path for path in Path("out").rglob("*") if path.is_file()]
    assert len(list(Path("tokens").glob("tokens_*/meta.json"))) == 3
    text = mixture.load_text(parsed(*TINY), World())
    for name in "abc":
        counts = [f"{len(text.tokens[name].parts[part]):,}" for part in ("train", "val", "test")]
        row = next(line for line in said.splitlines() if line.startswith(f"| {name} "))
        assert all(re.search(rf"\b{count}\b", row) for count in counts)
    assert len(list(Path("tokens").glob("tokens_*"))) == 3  # the study finds them


def test_mode_cache_says_which_arm_has_too_little(sources, monkeypatch, capfd):
    error = fails([*TINY, "--mode", "cache", "--max_steps", 5000], monkeypatch, capfd)
    assert "blocks of 16 training tokens, 30000 are asked for" in error


def test_mode_diversity_finds_the_coefficients_of_the_study(copied, monkeypatch, capfd):
    want = study_of()["diversity"]
    before = snapshot("*.npy")
    said = go("--mode", "diversity")
    (path,) = Path("out").glob("study-*/diversity.json")
    assert json.loads(path.read_text()) == want and snapshot("*.npy") == before
    assert "noise floor" in said and len(run_folders()) == 3


def test_mode_diversity_needs_a_probe(sources, monkeypatch, capfd):
    error = fails([*TINY, "--mode", "diversity"], monkeypatch, capfd)
    assert "--probe study: arm a+b has no finished run: train it, or name a probe" in error


def test_the_coefficient_is_the_mean_distance_of_the_embeddings_that_were_kept(whole):
    found = study_of(whole / "out")["diversity"]

    def distance(x, y):
        x, y = x.astype(np.float64), y.astype(np.float64)
        total = x + y + 1e-8
        x, y = x / total, y / total
        return 1 - (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())

    (draws, jobs), kept = plan_of(whole), {}
    for arm, i, file, _ in jobs:
        kept.setdefault((arm, i), []).append(np.load(whole / "out/embeddings" / file))
    for arm in ("a", "b", "a+b"):
        pairs = [distance(kept[arm, i][0], kept[arm, j][0]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found["arms"][arm]["coefficient"] == pytest.approx(np.mean(pairs), abs=1e-9)
        floors = [distance(*kept[arm, i]) for i in range(3)]
        assert found["arms"][arm]["noise_floors"] == pytest.approx(floors, abs=1e-9)
        assert found["arms"][arm]["noise_floor"] == pytest.approx(np.mean(floors), abs=1e-9)
        assert min(floors) > 0, "the same batch, other draws"
        low, high = found["arms"][arm]["interval"]
        assert 0 <= low <= found["arms"][arm]["coefficient"] <= high
    crossed = [distance(kept["a", i][0], kept["b", j][0]) for i in range(3) for j in range(3)]
    assert found["cross"]["a x b"]["coefficient"] == pytest.approx(np.mean(crossed), abs=1e-9)
    _, model, tokenizer = script.load_model(run_folders(whole / "out")["a_b-s0"], World())
    for arm, i, file, drawn in (jobs[0], jobs[1], jobs[-1]):  # and they are what the plan's batches give
        core.reseed(drawn)
        vector = task2vec.embed(model, draws.batch(arm, i), tokenizer.eos_token_id, "clean", 1, 1)
        np.testing.assert_allclose(vector, np.load(whole / "out/embeddings" / file), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", ["documents", "pieces"])
def test_batches_for_the_coefficient_share_no_sequence_and_mix_in_proportion(kind, whole, monkeypatch):
    monkeypatch.chdir(whole)
    flags = ["--diversity_length", 16, "--sequences", kind, "--max_tokens", 10**6]
    s = study_here("--arms", "a", "0.75*a+0.25*b", *flags)
    draws = script.draws_of(s, s.text.tokenizer)
    alone, mixed = ([draws.batch(arm, i) for i in range(3)] for arm in draws.arms)
    trained = {name: s.text.tokens[name].parts["train"].astype(np.uint16).tobytes() for name in "ab"}
    rows = {}
    for arm, batches in (("alone", alone), ("mixed", mixed)):
        rows[arm] = [tuple(row.tolist()) for batch in batches for row in batch.ids]
        assert len(set(rows[arm])) == len(rows[arm]) == 12
        for batch in batches:
            of = [
                [name for name in "ab" if np.array(row[:n], np.uint16).tobytes() in trained[name]]
                for row, n in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True)
            ]
            assert of == [["a"]] * 4 if arm == "alone" else of == [["a"]] * 3 + [["b"]]
    # an arm draws with a key of its own: otherwise the mixture would look like its sources
    assert len(set(rows["mixed"]) & set(rows["alone"])) < 6


def ids_and_files(s) -> dict[tuple, str]:
    """(ids of the batch, which repeat of it) -> file of its embedding"""
    draws, found = script.draws_of(s, s.text.tokenizer), {}
    for name, i, file, _ in diversity.plan(s.plan.cfg, draws, "weights", torch.float32):
        ids = draws.batch(name, i).ids.numpy().tobytes()
        repeat = sum(key == ids and of != file for (key, _), of in found.items())
        assert found.setdefault((ids, repeat), file) == file
    assert len(set(found.values())) == len(found)
    return found


def test_equal_batches_draw_targets_of_their_own(sources):
    """With a large vocabulary all batches of the lower bound are equal: it is that of the draws, not 0."""
    s = study_here()
    draws = script.draws_of(s, s.text.tokenizer)
    draws.vocab_size = 10**6
    lower = [
        job for job in diversity.plan(s.plan.cfg, draws, "weights", torch.float32) if job[0] == "lower bound"
    ]
    assert len({draws.batch("lower bound", i).ids.numpy().tobytes() for _, i, *_ in lower}) == 1
    assert len(lower) == len({job[2] for job in lower}) == len({job[3] for job in lower}) == 3


def test_embeddings_that_are_found_again_are_those_of_the_same_batches(sources):
    one, other = (study_here("--arms", *arms) for arms in (("a", "a+b"), ("a", "b", "a+b")))
    first, second = ids_and_files(one), ids_and_files(other)
    assert first.items() <= second.items() and len(second) == len(first) + 3 * 2  # an arm more: its own
    write("b.jsonl", texts_of("b")[::-1])  # the same text in another order: other batches, for b
    third = ids_and_files(study_here())
    assert all(third[key] == second[key] for key in third.keys() & second.keys())
    assert len(third.keys() - second.keys()) >= 3 * 2


@pytest.mark.parametrize(
    "flags",
    [["--procedure", "published"], ["--head_epochs", 2], ["--fisher_samples", 2], ["--seed", 1]],
    ids=str,
)
def test_embeddings_made_in_another_way_have_other_names(flags, sources):
    one, other = ids_and_files(study_here()), ids_and_files(study_here(*flags))
    assert not set(one.values()) & set(other.values())


def test_embeddings_of_other_weights_have_other_names_and_more_repeats_keep_theirs(sources):
    s = study_here()
    draws, more = script.draws_of(s, s.text.tokenizer), replace(s.plan.cfg, floor_repeats=4)
    plans = [
        {job[2] for job in diversity.plan(cfg, draws, weights, dtype)}
        for cfg, weights, dtype in (
            (s.plan.cfg, "w", torch.float32),
            (s.plan.cfg, "v", torch.float32),
            (s.plan.cfg, "w", torch.float64),
            (more, "w", torch.float32),
        )
    ]
    assert not plans[0] & plans[1] and not plans[0] & plans[2] and plans[0] < plans[3]
    assert len(plans[3] - plans[0]) == 3 * 3 * 2


def test_an_embedding_that_is_not_as_it_was_written_is_named():
    path, vector = Path("embeddings/a.npy"), np.arange(5, dtype=np.float32)
    diversity.keep(path, vector)
    whole = path.read_bytes()
    assert diversity.kept(path).tolist() == vector.tolist()
    path.write_bytes(whole[:-32])  # as they were kept before
    assert diversity.kept(path).tolist() == vector.tolist()
    for content in (whole[:-33], whole[:-1], whole.replace(b"<f4", b">f4"), b"", None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(core.UserError, match=r"^embeddings/a.npy is damaged: delete it, and the same"):
            diversity.kept(path)
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:  # a blank of the header may change
            assert diversity.kept(path).tolist() == vector.tolist()
        except core.UserError:
            refused += 1
    assert refused > len(whole) - 9
