"""metrics.jsonl, samples.jsonl and TensorBoard say the same, and are cut back to where a run resumes."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.run.curves import Curves, keep_rows


def scalars(name):
    events = EventAccumulator("tb")
    events.Reload()
    return (
        [(event.step, event.value) for event in events.Scalars(name)]
        if name in events.Tags()["scalars"]
        else []
    )


def test_both_hold_the_same_numbers_and_infinity_is_none_of_them():
    curves = Curves(Path())
    curves.metrics(1, {"loss": 2.0, "lr": float("inf")})
    curves.metrics(2, {"loss": 1.5, "lr": 0.5})
    curves.close()
    rows = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["lr"]) for row in rows] == [(1, 2.0, None), (2, 1.5, 0.5)]
    assert scalars("loss") == [(1, 2.0), (2, 1.5)] and scalars("lr") == [(2, 0.5)]


def test_a_resume_cuts_what_came_after_its_checkpoint_and_forks_no_curve():
    curves = Curves(Path())
    curves.metrics(1, {"loss": 2.0})
    curves.samples(1, ["early"])
    counts = curves.flushed_bytes()
    curves.metrics(2, {"loss": 9.0})
    curves.samples(2, ["late"])
    curves.close()
    curves = Curves(Path(), counts, before=2)
    curves.metrics(2, {"loss": 1.0})
    curves.close()
    assert scalars("loss") == [(1, 2.0), (2, 1.0)]
    assert [json.loads(line)["text"] for line in Path("samples.jsonl").read_text().splitlines()] == ["early"]


def test_half_a_line_of_a_killed_process_goes():
    Path("rows.jsonl").write_text('{"step": 1}\n{"step": 5}\n{"st')
    assert keep_rows(Path("rows.jsonl"), 5) == [{"step": 1}]
    assert Path("rows.jsonl").read_text() == '{"step": 1}\n'
    assert keep_rows(Path("absent.jsonl"), 5) == [] and not Path("absent.jsonl").exists()
