"""What a study of ways to fine-tune says, from runs made by hand: known gains, and none."""

import json
from pathlib import Path

import numpy as np

from lab.compare import mathqa_report as report
from lab.measure.quantised import paired_rows

N = 200  # problems


def write_run(name, nats, right) -> Path:
    """A finished run: nats and right (N,) of each problem."""
    folder = Path(name)
    folder.mkdir()
    config = {"script": "run_mathqa", "constants": {"mode": "train"}, "device": "cpu x86"}
    result = {
        "status": "finished",
        "test/loss": float(np.mean(nats)) / 2,
        "test/answer_accuracy_per_token": 0.25,
    }
    result |= {"steps": 10, "train_seconds": 2.5, "trainable_parameters": 1234, "state_mb": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    rows = enumerate(zip(nats, right, strict=True))
    lines = [
        {
            "part": "test",
            "row": i,
            "group": f"p{i}",
            "nats": a,
            "hits": 1,
            "targets": 2,
            "bytes": 4,
            "right": b,
        }
        for i, (a, b) in rows
    ]
    for file, names in {
        "losses.jsonl": ("part", "row", "group", "nats", "hits", "targets", "bytes"),
        "answers.jsonl": ("group", "right", "right_shuffled"),
    }.items():
        kept = [{name: line.get(name, False) for name in names} for line in lines]
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


def make_arms(gain):
    """Arms `full` and `lora`, of which lora loses `gain` nats a problem more, give or take."""
    rng = np.random.default_rng(0)
    nats, right = rng.normal(4, 1, N), rng.random(N) < 0.5
    full = write_run("full", nats.tolist(), right.tolist())
    lora = write_run("lora", (nats + gain + rng.normal(0, 0.1, N)).tolist(), right.tolist())
    return {"full": [full], "lora": [lora]}


def test_a_gain_beyond_noise_is_told_and_equal_answers_are_not():
    sentences, figures = report.verdicts(make_arms(0.5))
    by_name = {figure["figure"]: figure for figure in figures}
    assert abs(by_name["loss"]["difference"] - 0.25) < 0.02  # two targets a problem
    assert by_name["loss"]["interval"][0] > 0.2
    assert by_name["answers"]["difference"] == 0
    assert [sentence.split("  ")[0] for sentence in sentences] == ["lora - full"] * 2
    assert all((figure["arm"], figure["against"]) == ("lora", "full") for figure in figures)


def test_no_gain_is_noise():
    _, figures = report.verdicts(make_arms(0.0))
    low, high = next(figure["interval"] for figure in figures if figure["figure"] == "loss")
    assert low < 0 < high


def test_the_table_has_a_line_an_arm_and_no_column_of_nothing():
    header, _, full, lora = report.table(make_arms(0.5)).splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[:2] == ["arm", "loss"] and "tokens/s" not in names and "forgotten" not in names
    for line, arm in ((full, "full"), (lora, "lora")):
        cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        assert (cells["arm"], cells["trained"], cells["s"], cells["shuffled"][:5]) == (
            arm,
            "1,234",
            "2.5",
            "0.000",
        )


def measure(nats, right):
    losses = [{"group": f"p{i}", "nats": float(value), "targets": 2} for i, value in enumerate(nats)]
    return losses, [{"right": bool(value)} for value in right]


def test_int4_is_told_from_float_by_its_rows():
    rng = np.random.default_rng(1)
    nats, right = rng.normal(4, 1, N), rng.random(N) < 0.5
    rows = paired_rows(measure(nats, right), measure(nats + 0.3 + rng.normal(0, 0.1, N), right))
    figures = {"test/loss": 2.0, "test/answer_accuracy": 0.5, "mb": 4.0, "tokens_per_second": 100.0}
    small = {
        "full": [
            {
                "group": 32,
                "trained_for_it": True,
                "rows": rows,
                "float": figures,
                "int4": figures | {"mb": 1.0},
            }
        ]
    }
    loss, answers = report.small_verdicts(small)
    assert loss.startswith("full, int4 - float  loss") and "+0.15" in loss
    assert answers.startswith("full, int4 - float  answers")
    text = report.quantised_table(small)
    assert "int4 by 32, trained for it" in text and "4.00" in text and "1.00" in text
