"""Curves and TensorBoard's HPARAMS from run folders made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from toys.results import make_run, resumes, smoothing_runs, source

from lab.compare import facts, plots


@pytest.mark.parametrize("n", [0, 1, 3, 30])
def test_every_run_has_its_curves(monkeypatch, n):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    steps, names = np.arange(1, 41), [f"tag{i}" for i in range(n)]
    for i, tag in enumerate(names):
        curve = [{"step": s, "train/loss": 5 + i - s / 10, "val/loss": 6 + i - s / 10} for s in range(1, 41)]
        make_run(f"{i:02}", tag=tag, result={"test/loss": n - i}, seed=i % 2, files={"metrics.jsonl": curve})
    make_run("without", tag="none", files={"metrics.jsonl": ""})
    plots.draw(facts.find(["runs/run_lora"]), "curves.png")
    assert Path("curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [text.get_text() for of in drawn[0].legends for text in of.get_texts()] == names * (n < 30)
    train, val = (panel.get_lines() for panel in drawn[0].axes)
    assert [line.get_label() for line in train] == [line.get_label() for line in val] == names
    assert len({(str(line.get_color()), line.get_linestyle()) for line in val}) == n
    for i in range(n):
        np.testing.assert_allclose(val[i].get_xydata(), np.c_[steps, 6 + i - steps / 10])
        means = 5 + i - np.r_[1, (steps[1:] + steps[:-1]) / 2] / 10  # of two: a 20th of 40 points
        np.testing.assert_allclose(train[i].get_xydata(), np.c_[steps, means])
    plots.draw(facts.find(["runs/run_lora"]), "by.png", ["seed", "lr"])
    lines = [(line.get_label(), line.get_color()) for line in drawn[1].axes[1].get_lines()]
    assert sorted(lines) == sorted([("0, 0.01", "C0"), ("1, 0.01", "C1")][i % 2] for i in range(n))


def test_tensorboard_reads_constants_and_figures_back():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    files = {"judged.json": {"j": {"score": 61.5}, "mute": {"score": None}}}
    one = make_run("a", lr=0.125, schedule="cosine", pack=True, tag="t", warmup=None, files=files)
    make_run("b", lr=0.25, schedule="linear", pack=False, warmup=3)
    make_run("c", status="stopped")
    found = facts.find(["runs/run_lora"])
    assert plots.write_hparams(found) == plots.write_hparams(found) == 2
    assert [path.parts[2] for path in sorted(Path("runs").rglob("events*"))] == ["a", "b"]  # one each
    events = EventAccumulator(f"{one}/hparams").Reload()
    said = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(said).session_start_info.hparams
    read = {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
    wanted = {"script": "run_lora", "tag": "t", "lr": 0.125, "seed": 0, "schedule": "cosine", "pack": True}
    assert {name: value for name, value in read.items() if value != ""} == wanted
    scalars = {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"final/loss": [(75, 2.5)], "final/accuracy": [(75, 0.25)], "judge/j": [(75, 61.5)]}


def test_tensorboard_shows_a_constant_that_a_script_did_not_have_as_absent():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    smoothing_runs()
    plots.write_hparams(facts.find(["runs/run_lora", "runs/run_instruct"]))
    found = {}
    for path in Path("runs").glob("*/*/hparams"):
        content = EventAccumulator(str(path)).Reload().PluginTagToContent("hparams")
        values = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
        if "label_smoothing" in values.hparams:
            value = values.hparams["label_smoothing"]
            found[path.parent.name] = value.string_value or value.number_value
    assert found == {"before": "absent", "other": "absent", "some": 0.1}  # none is left out


def test_tensorboard_shows_edited_code_and_a_resume_with_another_schedule():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    make_run("old", files=source(), epochs=6, config=resumes((40, {"epochs": (3, 6)})))
    make_run("new", files=source("x = 2\n"), epochs=6)
    plots.write_hparams(facts.find(["runs/run_lora"]))
    shown = {}
    for name in ("old", "new"):
        content = EventAccumulator(f"runs/run_lora/{name}/hparams").Reload().PluginTagToContent("hparams")
        values = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
        shown[name] = {key: value.string_value for key, value in values.hparams.items()}
    assert shown["old"]["code version"] != shown["new"]["code version"]
    assert shown["old"]["resumed"].startswith("at step 40 with epochs 6 (before: 3)")
    assert "resumed" not in shown["new"]


def test_tensorboard_takes_constants_of_several_values_and_figures_of_two_parts():
    """run_pretrain_diversity's sources raised a ValueError when the table had been written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for name, sources, part in (("one", [], "test"), ("two", ["b=b.txt", "c=c.txt"], "val")):
        figures = {"status": "finished", "step": 9, f"{part}/loss": 2.0}
        make_run(name, files={"result.json": json.dumps(figures)}, sources=sources, of={"x": 1})
    make_run("three", sources=["b=b.txt"], of=None)
    plots.write_hparams(facts.find(["runs/run_lora"]))
    shown, tags = {}, {}
    for name in ("one", "two"):
        events = EventAccumulator(f"runs/run_lora/{name}/hparams").Reload()
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        shown[name] = values["sources"].string_value, values["of"].string_value
        tags[name] = events.Tags()["scalars"]
    assert shown == {"one": ("()", "{'x': 1}"), "two": ("('b=b.txt', 'c=c.txt')", "{'x': 1}")}
    assert tags == {"one": ["final/loss"], "two": ["final_val/loss"]}
