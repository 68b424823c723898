"""Folders of what eval.py measured or had answered: names by all that counts, and what they say of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import core
import eval as script
from lab.compare import eval_folder
from lab.measure.other_data import Measured
from lab.run.files import read_sealed

RUN = SimpleNamespace(name="runs/run_lora/a", script="run_lora")
PLAIN = SimpleNamespace(name="gpt2", script=None)


def folder_of(subject, *argv):
    cfg = core.parse_config(script.Config, {}, {}, "", ["--data", "rows.json", *argv])
    return eval_folder.folder_of(subject, "rows.json", cfg, "out")


@pytest.mark.parametrize("subject", [RUN, PLAIN])
def test_a_folder_is_named_by_every_flag_that_figures_or_answers_depend_on(subject):
    """max_new_tokens, and of a run that has none of its own template and max_length, were left out."""
    flags = {"max_new_tokens": "5", "template": "journal", "max_length": "64", "context": "8", "stride": "4"}
    flags |= {"text_column": "body", "max_documents": "3"}
    flags |= {} if subject.script else {"dtype": "fp64", "tokenizer": "words"}
    names = [folder_of(subject), *(folder_of(subject, f"--{name}", value) for name, value in flags.items())]
    assert len(set(names)) == len(flags) + 1
    assert names[0] == folder_of(subject, "--eval_batch", "3")
    assert names[0].parent == Path("out") and names[0].name.startswith(
        f"{Path(subject.name).name}-rows.json-"
    )
    long = SimpleNamespace(name="models/" + "\u6771" * 70, script=None)
    assert len(folder_of(long).name.encode()) < 200


def test_what_two_runs_exported_has_two_names_in_a_table():
    Path("runs/run_lora/a/checkpoints").mkdir(parents=True)
    names = "runs/run_lora/a", "runs/run_lora/a/merged", "gpt2", "HuggingFaceTB/SmolLM2-135M"
    assert [*map(eval_folder.called, names)] == ["a", "a/merged", "gpt2", "SmolLM2-135M"]


def test_answers_say_what_they_are_of_each_time_and_a_measure_keeps_that_and_is_kept(monkeypatch):
    monkeypatch.setattr(eval_folder, "tested_or_newest_checkpoint", lambda name: checkpoint)
    folder, world = Path("folder"), core.World()

    def answered(step, most):
        eval_folder.write_answers(folder, RUN, {"max_new_tokens": most}, [{"instruction": "a"}], world)
        config = read_sealed(folder / "config.json")
        assert config["answers"]["checkpoint"] == step and config["answers"]["constants"] == {
            "max_new_tokens": most
        }
        return config

    checkpoint = "step_1"
    assert answered("step_1", 5)["constants"] == {"max_new_tokens": 5}
    checkpoint = "step_2"  # the run was resumed, and its answers made anew
    config = answered("step_2", 6)
    assert (config["checkpoint"], config["constants"]) == ("step_2", {"max_new_tokens": 6})
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    found = Measured({"loss": 2.0}, [], ("losses.jsonl", [{"nats": 1.0}]), "hash", {})
    eval_folder.write_measured(folder, RUN, "text", {"context": 8}, found, 1.5, world)
    checkpoint = "step_3"
    config = answered("step_3", 7)
    assert (config["kind"], config["checkpoint"], config["constants"]) == ("text", "step_2", {"context": 8})
    assert config["facts"] == {"fingerprint": {"data": "hash"}}
    result = read_sealed(folder / "result.json")
    assert (
        result["test/loss"] == 2.0 and result["seconds"] == 1.5 and set(result["files"]) == {"losses.jsonl"}
    )
    (folder / "config.json").write_text("{")
    assert answered("step_3", 8)["kind"] == "rows"
