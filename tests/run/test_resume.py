"""Which run a command goes on with, and with whose constants, as a user stops and edits run_preference."""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from ranks import launch, newest, result, run
from toys.preference import row, write_csv

import core
import gpt_scratch
from core import UserError
from lab.run import checkpoints, resume
from lab.run.files import write_sealed
from lab.train.launch import launcher


def test_what_belongs_to_the_command_never_makes_another_run():
    """--no-dirty, typed in a loop that resumes, would begin anew beside the run it means."""
    given = [gpt_scratch.Config, gpt_scratch.PRESETS, gpt_scratch.SMOKE, ""]
    cfg = core.parsed_config(*given, ["--no-dirty", "--out", "elsewhere", "--lr", "0.5"])
    assert resume.contradictions(cfg, {"dirty": True, "out": None, "lr": 0.5}) == []
    assert resume.contradictions(cfg, {"dirty": True, "lr": 0.25}) == ["--lr 0.25, not 0.5"]


@dataclasses.dataclass(frozen=True)
class Config(core.Constants):
    batch: int = 8  # rows
    lr: float = 0.1  # rate
    max_steps: int = 9  # length
    out: str | None = "out"  # folder of runs
    tag: str | None = None  # end of the name
    resume_timestamp: str | None = None  # which run
    resume_step: int | None = None  # which checkpoint


PRESETS = {"slow": {"lr": 0.01}, "fast": {"lr": 1.0}, "plain": {}}


def planned(*argv) -> dict:
    """What the command would do, resuming or not."""
    cfg = core.parsed_config(Config, PRESETS, {"batch": 2}, "", list(argv))
    with contextlib.ExitStack() as held:
        return resume.plan_run(cfg, Path("script.py"), 1, held)


def leave(name, status="finished", **config) -> Path:
    """A run of script.py below out/, and how it ended."""
    folder, constants = Path("out", name), dataclasses.asdict(Config()) | config.pop("constants", {})
    del constants["typed"]
    config = {"script": "script", "preset": None, "smoke": False, "constants": constants} | config
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / "config.json", config)
    write_sealed(folder / "result.json", {"status": status})
    return folder


def test_auto_in_a_loop_over_presets_or_behind_a_smoke_run_finds_each_its_own():
    """All have one tag, or one --out: the second was called finished, and never trained."""
    slow = leave("20260101_000000-x", preset="slow", constants={"lr": 0.01})
    words = ["--tag", "x", "--resume_timestamp", "auto"]
    assert planned("--preset", "slow", *words)["folder"] == str(slow)
    assert planned(*words)["finished"]  # no preset typed: its own words say nothing against it
    for other in ("fast", "plain"):
        plan = planned("--preset", other, *words)
        assert not plan["resumed"] and not plan["finished"]
    smoke = leave("20260101_000001-x", smoke=True, status="stopped", constants={"batch": 2})
    assert planned("--smoke", *words)["folder"] == str(smoke)
    plan = planned("--lr", "0.1", *words)
    assert not plan["resumed"]
    assert plan["lines"][0].endswith(f"{smoke.name} is unfinished, but ran with --smoke True, not False")
    stamp = ["--tag", "x", "--resume_timestamp"]
    assert planned(*stamp, smoke.name)["folder"] == str(smoke)  # named: --smoke need not be typed again
    with pytest.raises(UserError, match="ran with --preset slow, not fast: drop these flags"):
        planned("--preset", "fast", *stamp, slow.name)


def test_a_preset_of_another_name_and_the_same_constants_contradicts_nothing():
    run = leave("20260101_000000-x", constants={"max_steps": 5})
    plan = planned("--preset", "plain", "--tag", "x", "--resume_timestamp", "auto")
    assert plan["folder"] == str(run) and plan["finished"]


@pytest.fixture
def restarted(monkeypatch):
    """As a worker of a torchrun that has restarted its workers."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


@pytest.mark.parametrize("boxes", ["{}", "box1/17/4711 {} box3/17/4711"])  # rank 0 may have been on another
def test_a_restarted_worker_finds_the_run_of_its_torchrun_alone(boxes, restarted):
    """Numbers of processes come again, in a container at each start; several scripts may share --out."""
    at = launcher()
    for second, facts in enumerate([{}, {"script": "other"}, {"constants": {"mode": "find_lr"}}]):
        leave(f"20260101_00000{second}", "stopped", **{"launcher": boxes.format(at)} | facts)
    leave("20260101_000005-tagged", "stopped", launcher=at)
    leave("20260101_000006", "stopped", launcher=f"{at}1")
    assert planned()["folder"] == "out/20260101_000000"
    assert at.split("/")[1] == str(os.getppid())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_torchrun_is_known_by_when_it_began_too(restarted, monkeypatch):
    began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    assert launcher().split("/")[1:] == [str(os.getppid()), began]


def test_a_restarted_worker_goes_on_and_not_back_once_more(restarted, monkeypatch):
    run = leave("20260101_000000", "stopped", launcher="another")
    for step in (4, 8):
        (run / "checkpoints" / f"step_0000000{step}").mkdir(parents=True)
        checkpoints.write_manifest(run / "checkpoints" / f"step_0000000{step}", {"step": step})
    back = ("--resume_timestamp", run.name, "--resume_step", "4")
    assert planned(*back)["checkpoint"] == "step_00000004"  # it has not gone back yet
    leave(run.name, "stopped", launcher=launcher())
    assert planned(*back)["checkpoint"] == "step_00000008"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert planned(*back)["checkpoint"] == "step_00000004"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    leave(run.name, "finished", launcher=launcher())
    assert planned(*back)["finished"]


@pytest.mark.parametrize("wanted", [[], ["--resume_timestamp", "auto"]])
def test_an_older_checkpoint_goes_with_a_run_that_is_named(wanted):
    with pytest.raises(
        UserError, match="--resume_step 5 needs --resume_timestamp with a timestamp, or latest"
    ):
        planned("--resume_step", "5", *wanted)


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
