"""Rows are paired by prompt; texts and verdicts are compared by what they share."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from toys.compare import ALONE, NATS, losing
from toys.results import make_run, refused

from lab.compare import facts
from lab.compare.rows import shared_rows
from lab.run import files


def shared(*names):
    return shared_rows([facts.read(name) for name in names])


def test_rows_are_paired_by_prompt_whatever_their_order_and_number():
    groups, order = np.repeat([f"p{i}" for i in range(30)], 2), np.random.default_rng(5).permutation(30)[3:]
    order = np.stack([2 * order, 2 * order + 1], 1).ravel()  # prompts shuffled, three of them missing
    kept, first = np.sort(order), losing("first", NATS, groups)
    loss, accuracy = shared(first, losing("second", (NATS + ALONE)[order], groups[order], hits=7))
    np.testing.assert_allclose(loss.sums, [NATS[kept], (NATS + ALONE)[kept]])
    assert loss.groups.tolist() == groups[kept].tolist() and set(loss.weights) == {10}
    assert loss.note == "6 rows that not all have are left out"
    assert accuracy.name == "accuracy" and accuracy.sums.tolist() == [[5] * 54, [7] * 54]
    rows = shared(first, losing("cut", NATS + 1, groups, sizes=np.where(ALONE < 10, 39, 40)))[0]
    assert rows.note == "10 rows that are cut differently are left out"
    np.testing.assert_allclose(rows.sums, [NATS[10:], NATS[10:] + 1])
    refused("no held-out row in common", shared, first, losing("strange", NATS))
    refused("other targets in each run", shared, first, losing("whole", NATS, groups, sizes=99))
    (rows,) = shared(first, losing("tokens", 2 * NATS, groups, targets=7))
    assert (rows.name, rows.note) == ("bits per byte", "tokenizers differ: bits per byte")
    assert np.diff(rows.sums.sum(1)) / rows.weights.sum() == pytest.approx(NATS.sum() / math.log(2) / 2400)


text_run = functools.partial(losing, groups=ALONE // 4, script="gpt_scratch")


def test_texts_are_compared_by_token_or_by_stretches_of_bytes_and_other_data_is_refused():
    a, c = text_run("a", NATS, sizes=20), text_run("c", NATS[:40], sizes=30)
    loss, _ = shared(a, text_run("b", NATS * 0.9, sizes=20))
    assert (loss.name, loss.groups.tolist(), loss.note) == ("loss", (ALONE // 4).tolist(), "")
    np.testing.assert_allclose(loss.sums, [NATS, NATS * 0.9])
    (rows,) = shared(a, c)  # 60 blocks of 20 bytes, 40 of 30
    assert rows.name == "bits per byte" and "40 stretches" in rows.note
    x, y, z = NATS.reshape(20, 3).T
    np.testing.assert_allclose(rows.sums * math.log(2), [np.c_[x + y / 2, y / 2 + z].ravel(), NATS[:40]])
    (rows,) = shared(a, text_run("d", NATS[:30], sizes=[40] * 29 + [30]))  # ten bytes less
    wanted = np.array([NATS.sum() / 1200, NATS[:30].sum() / 1190]) / math.log(2)
    np.testing.assert_allclose(rows.sums.sum(1) / rows.weights.sum(), wanted)
    refused("1160 and 1200 bytes", shared, a, text_run("e", NATS[:29], sizes=40))
    verdicts = make_run("v", script="run_preference")
    other = {"facts": {"fingerprint": {"data": "other"}}}
    for name, how in {"x": {"config": other}, "y": {"split_seed": 1}, "z": {"test_share": 0.2}}.items():
        refused("tested on different text", shared, a, text_run(name, NATS, sizes=20, **how))
    refused("different questions: preference and rows", shared, losing("r", NATS), verdicts)
    for said, content in (("missing", None), ("damaged", '{"group": 1, "na')):
        b = losing(said, NATS, files={"losses.jsonl": content})
        refused(rf"{b}/losses.jsonl is {said}: python eval.py --run {b} ", shared, b, b)
    measured = make_run("e", "eval", config={"kind": "text"})
    refused("different questions: preference and text", shared, measured, verdicts)


def test_verdicts_are_compared_by_log_loss_and_accuracy():
    rng, names, folders = np.random.default_rng(7), ("A", "B", "tie"), []
    probs, labels = rng.dirichlet(np.ones(3), (2, 40)), rng.integers(0, 3, 40)
    for name, of_run, order in zip("ab", probs, (1, -1), strict=True):
        lines = [{"id": i, "row": i, "group": f"p{i // 2}", "split": "val" if i < 5 else "test"}
                 | {"label": names[labels[i]]} | dict(zip(names, of_run[i], strict=True))
                 for i in range(40)]  # fmt: skip
        folders.append(make_run(name, "run_preference", files={"predictions.jsonl": lines[::order]}))
    (loss, accuracy), rows = shared(*folders), np.arange(5, 40)
    np.testing.assert_allclose(loss.sums, -np.log(probs[:, rows, labels[rows]]))
    assert accuracy.sums.tolist() == (probs.argmax(2) == labels)[:, rows].tolist() and loss.name == "log loss"


def test_rows_that_are_not_those_that_were_measured_are_refused():
    """A flipped digit would be another verdict."""
    names = losing("a", NATS), losing("b", NATS + 1)
    for name in names:
        result = json.loads(Path(name, "result.json").read_text())
        result["files"] = files.row_hashes(Path(name))
        Path(name, "result.json").write_text(json.dumps(result))
    assert shared(*names)[0].sums.shape == (2, 60)
    rows = Path(names[0], "losses.jsonl")
    rows.write_text(rows.read_text().replace('"nats": 1', '"nats": 9', 1))
    refused("losses.jsonl is damaged: python eval.py --run .* writes it anew", shared, *names)
