"""Soft labels, label smoothing and weights against torch's own losses; teachers matched by id and prompt."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys.results import refused

from core import World, sum_cross_entropy
from lab.data import soft_labels
from lab.data.pairs import Preferences

CFG = SimpleNamespace(
    label_smoothing=0.0, soft_share=0.5, teacher=(), typed=SimpleNamespace(flags=frozenset())
)


def data_of(labels, **changes):
    n = len(labels)
    facts = {"ids": [str(i) for i in range(n)], "groups": np.array([f"g{i}" for i in range(n)])}
    facts |= dict.fromkeys(("first", "tokens", "offsets", "tokenizer", "folder"))
    facts |= {"labels": np.array(labels), "fingerprint": {"data": "d"}, "lines": []}
    return Preferences(**facts | changes)


def write_predictions(path, *lines):
    """(id, group, label, probabilities, more) -> a run's file."""
    names = ("A", "B", "tie")
    rows = [{"id": i, "group": g, "split": "test", "label": y, **dict(zip(names, p, strict=True)), **more}
            for i, g, y, p, more in lines]  # fmt: skip
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_weights_smoothing_and_teachers_the_targets_are_class_numbers():
    labels, entropy = soft_labels.row_targets(data_of([0, 1, 2]), CFG, [(0, False), (1, True), (2, True)])
    assert labels.tolist() == [0, 0, 2] and entropy == 0.0


@pytest.mark.parametrize("swap", [False, True])
def test_the_objective_is_weighted_smoothed_cross_entropy_and_kl_to_the_soft_label(swap):
    """Row 1 has no soft label, row 3 no winner."""
    soft = np.array([[0.7, 0.2, 0.1], [np.nan] * 3, [0.0, 0.4, 0.6], [0.1, 0.8, 0.1]])
    weights = np.array([1.0, 3.0, 2.5, 1.5])
    data = data_of([0, 1, 2, -1], soft=soft, weights=weights)
    cfg = SimpleNamespace(label_smoothing=0.2, soft_share=0.25)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets, entropy = soft_labels.row_targets(data, cfg, [(row, swap) for row in range(4)])
    got = sum_cross_entropy(logits, targets) - entropy
    put_back = logits[:, [1, 0, 2]] if swap else logits
    want = 0.0
    for row, share in enumerate((0.25, 0.0, 0.25, 1.0)):
        hard = torch.tensor([max(0, data.labels[row])])
        loss = (1 - share) * F.cross_entropy(put_back[row, None], hard, label_smoothing=0.2)
        if share:
            loss += share * F.kl_div(put_back[row].log_softmax(0), torch.tensor(soft[row]), reduction="sum")
        want += weights[row] * loss
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_student_as_its_teacher_has_no_loss():
    soft = np.array([[0.7, 0.2, 0.1]])
    data, cfg = data_of([0], soft=soft), SimpleNamespace(label_smoothing=0.0, soft_share=1.0)
    targets, entropy = soft_labels.row_targets(data, cfg, [(0, False)])
    assert abs(sum_cross_entropy(torch.tensor(soft).log(), targets) - entropy) < 1e-7


def test_teachers_are_averaged_by_id_and_prompt():
    p, q, r = [0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]
    write_predictions(
        "one.jsonl", ("0", "g0", "A", p, {}), ("1", "g1", "B", p, {}), ("2", "other", "tie", r, {})
    )
    folds = [("0", "g0", "A", q, {"fold": 1}), ("0", "g0", "A", r, {"fold": 2, "split": "val"})]
    Path("run").mkdir()
    write_predictions("run/predictions.jsonl", *folds)
    data = data_of([0, 1, 2])
    soft_labels.teach(data, ("one.jsonl", "run"), World())
    np.testing.assert_allclose(data.soft[:2], [np.mean([p, q], axis=0), p])
    assert np.isnan(data.soft[2]).all() and len(data.fingerprint["teacher"]) == 2
    assert data.lines == ["teacher one.jsonl: soft labels of 2 of 3 rows",
                          "teacher run/predictions.jsonl: soft labels of 1 of 3 rows"]  # fmt: skip
    own = data_of([0, 1, 2], soft=np.array([r, [np.nan] * 3, [np.nan] * 3]))  # of its columns
    soft_labels.teach(own, ("one.jsonl",), World())
    np.testing.assert_allclose(own.soft[:2], [r, p])
    twice = data_of([0, 0], ids=["0", "0"], groups=np.array(["g0", "g0"]))  # which of them was judged?
    soft_labels.teach(twice, ("one.jsonl",), World())
    assert np.isnan(twice.soft).all()


def test_what_is_no_teacher_is_refused():
    data, p = data_of([0, 1]), [0.6, 0.3, 0.1]
    write_predictions("swapped.jsonl", ("0", "g0", "B", p, {}), ("1", "g1", "A", p, {}))
    Path("damaged.jsonl").write_text('{"id": 1}\n')
    for name, line in (
        ("swapped.jsonl", "teacher swapped.jsonl: 2 of 2 rows have another winner here"),
        ("damaged.jsonl", "damaged.jsonl is no predictions.jsonl, or is damaged"),
        ("absent.jsonl", "absent.jsonl cannot be read"),
    ):
        refused(line, soft_labels.teach, data, (name,), World())


def test_training_rows_with_and_without_a_soft_label_are_counted_and_none_is_an_error():
    soft = np.array([[0.7, 0.2, 0.1], [np.nan] * 3, [np.nan] * 3])
    data, typed = data_of([0, 1, 2], soft=soft), SimpleNamespace(flags=frozenset({"soft_share"}))
    line = soft_labels.soft_line(data, {"train": np.array([0, 1])}, CFG)
    assert line == "soft labels  1 training rows, KL counts 0.5; 1 have their winner alone"
    data.labels[0] = -1
    assert "KL counts 0.5 (1 in 1 without a winner); 1" in soft_labels.soft_line(
        data, {"train": np.array([0, 1])}, CFG
    )
    cfg = SimpleNamespace(**vars(CFG) | {"teacher": ("run",), "typed": typed})
    refused("no training row has a soft label: use a teacher run with --folds", soft_labels.soft_line,
            data, {"train": np.array([1, 2])}, cfg)  # fmt: skip
    refused("no training row has a soft label: the teacher has judged other rows", soft_labels.soft_line,
            data_of([0], soft=soft[1:2]), {"train": np.array([0])}, cfg)  # fmt: skip
    refused("--soft_share is of soft labels, and there are none", soft_labels.soft_line,
            data_of([0]), {"train": np.array([0])}, cfg)  # fmt: skip
    assert soft_labels.soft_line(data_of([0]), {"train": np.array([0])}, CFG) is None
