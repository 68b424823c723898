"""metrics.jsonl, samples.jsonl and TensorBoard say the same, and are cut back to where a run resumes."""

import json
from pathlib import Path

import pytest
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


def test_what_comes_with_every_step_is_written_with_the_next_line_or_checkpoint():
    def written():
        return [json.loads(line)["step"] for line in Path("metrics.jsonl").read_text().splitlines()]

    curves = Curves(Path())
    curves.metrics(1, {"clock/share": 0.1}, flush=False)
    assert written() == []
    curves.metrics(2, {"loss": 2.0})
    assert written() == [1, 2]
    curves.metrics(3, {"clock/share": 0.2}, flush=False)
    assert curves.flushed_bytes() == Path("metrics.jsonl").stat().st_size and written() == [1, 2, 3]
    curves.close()


def test_half_a_line_of_a_killed_process_goes():
    Path("rows.jsonl").write_text('{"step": 1}\n{"step": 5}\n{"st')
    rows, lines = keep_rows(Path("rows.jsonl"), 5)
    assert rows == [{"step": 1}] and lines == ["WARNING 1 damaged line(s) of rows.jsonl are cut"]
    assert Path("rows.jsonl").read_text() == '{"step": 1}\n'
    assert keep_rows(Path("rows.jsonl"), 5) == (rows, [])
    assert keep_rows(Path("absent.jsonl"), 5) == ([], []) and not Path("absent.jsonl").exists()


TAILS = [b"\0" * 4000, b'{"step": 9, "lo', b"\xff\xfe\n", b'[1]\n{"loss": 2}\n{"step": "x"}\n']


@pytest.mark.parametrize("tail", TAILS, ids=["NULs", "half a line", "no text", "other JSON"])
def test_a_damaged_tail_is_cut_and_said_and_the_rest_stays(tail):
    curves = Curves(Path())
    for step in (1, 2):
        curves.metrics(step, {"loss": 1 / step})
        curves.samples(step, [f"ü {step}"])
    size = curves.flushed_bytes()
    curves.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(name, "ab") as file:
            file.write(tail)
    curves = Curves(Path(), size + len(tail), before=3)
    damaged = 1 + 2 * (tail[:1] == b"[")
    files = ("metrics.jsonl", "samples.jsonl")
    assert curves.lines == [f"WARNING {damaged} damaged line(s) of {name} are cut" for name in files]
    curves.metrics(3, {"loss": 0.25})
    curves.close()
    assert scalars("loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [json.loads(line)["text"] for line in Path("samples.jsonl").read_text().splitlines()] == [
        "ü 1",
        "ü 2",
    ]
    curves = Curves(Path(), size + 10_000, before=4)
    curves.close()
    assert (
        len(curves.lines) == 1
        and "bytes of metrics.jsonl are gone: its curves have a hole" in curves.lines[0]
    )
