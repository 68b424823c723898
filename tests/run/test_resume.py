"""Which run a command goes on with, and with whose constants, as a user stops and edits run_preference."""

import json
from pathlib import Path

import pytest
from ranks import launch, newest, result, run
from toys.preference import row, write_csv

import core
import gpt_scratch
from lab.run import resume


def test_what_belongs_to_the_command_never_makes_another_run():
    """--no-dirty, typed in a loop that resumes, would begin anew beside the run it means."""
    given = [gpt_scratch.Config, gpt_scratch.PRESETS, gpt_scratch.SMOKE, ""]
    cfg = core.parsed_config(*given, ["--no-dirty", "--out", "elsewhere", "--lr", "0.5"])
    assert resume.contradictions(cfg, {"dirty": True, "out": None, "lr": 0.5}) == []
    assert resume.contradictions(cfg, {"dirty": True, "lr": 0.25}) == ["--lr 0.25, not 0.5"]


def test_a_resume_that_contradicts_the_run_is_refused_and_lists_it():
    flags = ["--smoke", "--max_documents", 200, "--epochs", 1, "--out", "out"]
    assert launch("run_preference", *flags) == [0]
    before = (newest() / "result.json").read_text()
    stamp = newest().name
    codes = launch(
        "run_preference", *flags, "--resume_timestamp", stamp, "--seed", 5, "--batch", 12, "--lr", "0.5"
    )
    said = Path("out.txt").read_text()
    assert codes == [2] and "--batch 24, not 12; --lr 0.002, not 0.5; --seed 0, not 5" in said
    assert (newest() / "result.json").read_text() == before
    assert launch("run_preference", *flags, "--resume_timestamp", "auto") == [0]
    assert "is finished: nothing to do" in Path("out.txt").read_text()
    assert launch("run_preference", *flags, "--resume_timestamp", "auto", "--seed", 5) == [
        0
    ]  # a loop over seeds
    assert len(list(Path("out").iterdir())) == 2


@pytest.mark.slow
def test_edited_constants_do_not_change_a_resumed_run_but_length_may(monkeypatch):
    flags = ["--smoke", "--max_documents", 200, "--out", "out"]
    launch("run_preference", *flags, "--lr", "0.003", "--epochs", 1)
    stamp = newest().name
    assert launch("run_preference", *flags, "--resume_timestamp", stamp, "--epochs", 2) == [0]
    said = Path("out.txt").read_text()
    assert "resumed: lr stays 0.003 (the script now says 0.002)" in said and "epoch 2/2" in said
    assert "resumed: epochs is now 2 (it was 1)" in said
    config = json.loads((newest() / "config.json").read_text())
    assert config["constants"]["lr"] == 0.003 and config["constants"]["epochs"] == 2
    assert [resume["step"] for resume in config["resumes"]] == [6]


def test_a_resume_without_the_original_flags_keeps_the_runs_own_length():
    flags = ["--smoke", "--max_documents", 200, "--out", "out", "--epochs", 3, "--note", "mine"]
    launch("run_preference", *flags, kill=("step", 8, 0))
    assert launch("run_preference", "--smoke", "--out", "out", "--resume_timestamp", "latest") == [0]
    constants = json.loads((newest() / "config.json").read_text())["constants"]
    assert constants["epochs"] == 3 and constants["note"] == "mine" and result()["step"] == 18
    assert "epochs stays 3 (the script now says 8)" in Path("out.txt").read_text()


def test_a_resume_on_other_data_is_refused_and_the_finished_run_stays_as_it_was():
    rows = [row(n, prompt=json.dumps([f"prompt {n}", ""])) for n in range(120)]
    flags = ["--smoke", "--data", write_csv(rows), "--epochs", 1, "--out", "out"]
    assert launch("run_preference", *flags) == [0]
    touched = {newest() / "log.txt", newest() / ".lock"}
    kept = {path: path.read_bytes() for path in set(newest().rglob("*")) - touched if path.is_file()}
    write_csv(rows[:-1])
    assert launch("run_preference", *flags, "--resume_timestamp", newest().name) == [2]
    assert "fingerprint is not what" in Path("out.txt").read_text()
    Path("train.csv").unlink()
    assert launch("run_preference", *flags, "--resume_timestamp", newest().name) == [2]
    assert kept.items() <= {path: path.read_bytes() for path in newest().rglob("*") if path.is_file()}.items()


@pytest.mark.slow
def test_an_older_checkpoint_can_be_resumed():
    flags = ["--smoke", "--max_documents", 200, "--epochs", 2, "--save_every", 4, "--keep", 9]
    first = run("run_preference", *flags)
    assert launch(
        "run_preference", *flags, "--out", "out", "--resume_timestamp", newest().name, "--resume_step", 5
    ) == [2]
    assert "--resume_step 5: there are step_00000004, step_00000008" in Path("out.txt").read_text()
    back = ("--resume_timestamp", newest().name, "--resume_step", 4)
    assert launch("run_preference", *flags, "--out", "out", *back, kill=("step", 1, 0)) == [-9]
    second = run("run_preference", *flags, "--resume_timestamp", "auto")  # not in the abandoned future
    assert json.loads((newest() / "config.json").read_text())["resumes"][-1]["step"] == 4
    assert second["weights_sha256"] == first["weights_sha256"]
