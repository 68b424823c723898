"""A run's life: what a mistake, a fault and an end leave behind. laws/ tries the laws on whole scripts."""

import contextlib
import dataclasses
import errno
import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import core
from core import UserError, World
from lab.models.gpt_formats import OtherKind
from lab.run import checkpoints, folder
from lab.run.resume import plan_run


@dataclass(frozen=True)
class Config(core.Constants):
    batch: int = 8  # rows
    lr: float = 0.1  # rate
    keep: int = 2  # checkpoints
    max_minutes: float | None = None  # of training
    price_per_hour: float | None = None  # dollars
    dtype: str = "fp32"  # of the products
    skip_spikes: bool = False  # or not
    out: str | None = "out"  # folder of runs
    tag: str | None = None  # end of the name
    resume_timestamp: str | None = None  # which run
    resume_step: int | None = None  # which checkpoint


def start(*argv) -> core.Run:
    return core.open_run(core.parse_config(Config, {}, {}, "", list(argv)), World(), "script.py")


def one_step(run):
    """A model, an optimizer and a precision behind one step, saved as step 1."""
    model = nn.Linear(2, 2)
    optimizer, precision = torch.optim.SGD(model.parameters(), 0.1), core.Precision("fp32", World())
    run.begin(9)
    run.load(model, optimizer, precision)
    run.agree(4)
    run.step_done(2.0, 4, 4)
    run.save(1, model, optimizer, precision)
    return model, optimizer, precision


def result():
    (path,) = Path("out").glob("*/result.json")
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def script(monkeypatch):
    Path("script.py").write_text("x = 1\n")
    monkeypatch.setattr(sys, "argv", ["script.py"])


def test_a_mistake_leaves_no_folder_and_a_fault_says_what_it_was():
    for kind in (UserError, OtherKind):
        with pytest.raises(kind), start():
            raise kind("a mistake")
        assert list(Path("out").iterdir()) == []
    with pytest.raises(ZeroDivisionError), start() as run:
        one_step(run)
        1 / 0  # noqa: B018
    assert result()["status"] == "failed" and result()["why"] == "ZeroDivisionError: division by zero"
    assert result()["checkpoint"] == "step_00000001"


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("module", ["shutil.copy", "lab.run.provenance.write_sealed"])
def test_a_disk_that_is_full_at_the_start_is_one_line_on_every_rank_and_leaves_no_folder(module, monkeypatch):
    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match=r"\(No space left on device\): free"),
    ):
        patched.setattr(module, full)
        start()
    assert list(Path("out").iterdir()) == []
    waited = []

    def on_main(world, function, *args):
        waited.append(function.__name__)
        if function.__name__ == "_create":  # what rank 0 raises in it, it raises on all
            raise UserError("cannot be written")
        return function(*args)

    monkeypatch.setattr(folder, "on_main", on_main)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cannot be written"):
        core.open_run(core.parse_config(Config, {}, {}, "", []), World(rank=1, size=2), "script.py")
    assert waited == ["plan_run", "_create"]


def test_a_box_that_does_not_see_the_folder_leaves_none_and_a_finished_one_is_not_written_to(monkeypatch):
    def blind(world, *folders):
        raise UserError("rank 1 on box2 does not see it")

    monkeypatch.setattr(folder, "require_one_disk", blind)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")  # as if there were a second box
    with pytest.raises(UserError, match="box2"):
        start()
    assert list(Path("out").iterdir()) == []
    with monkeypatch.context() as patched:
        patched.setenv("LOCAL_WORLD_SIZE", "1")
        with start() as run:
            one_step(run)
    with pytest.raises(UserError, match="box2"):
        start("--resume_timestamp", run.folder.name)
    assert run.folder.exists()  # an earlier run's
    cfg = core.parse_config(Config, {}, {}, "", ["--resume_timestamp", "auto"])
    assert core.open_run(cfg, World(), "script.py") is None


@pytest.mark.parametrize("left", ["a step", "best weights"])
def test_a_run_that_never_found_room_for_a_checkpoint_keeps_what_it_did(left, monkeypatch):
    """An evaluation that runs out of memory, or the last save, is a UserError hours after the start."""
    with pytest.raises(UserError, match="not saved"), start() as run:
        run.begin(9)
        model = nn.Linear(2, 2)
        if left == "best weights":
            assert run.save_best(0, 1.0, model)
        else:
            run.agree(4)
            run.step_done(2.0, 4, 4)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        parts = torch.optim.SGD(model.parameters(), 0.1), core.Precision("fp32", World())
        run.metrics(1, {"train/loss": 2.0})
        run.save(1, model, *parts, must=True)
    assert result()["status"] == "failed" and "not saved" in result()["why"]
    assert '"train/loss": 2.0' in (run.folder / "metrics.jsonl").read_text()
    kept = ["best_step_00000000"] if left == "best weights" else []
    assert [path.name for path in (run.folder / "checkpoints").glob("*_step_*")] == kept


def test_two_runs_of_one_second_have_two_folders_and_one_name_the_same_files():
    with start() as first, start() as second:
        first.begin(9), second.begin(9)
    assert first.folder != second.folder
    for run in (first, second):
        names = {path.name for path in run.folder.iterdir()}
        assert {"config.json", "source", "log.txt", "metrics.jsonl", "tb", "result.json"} <= names
        assert (run.folder / "source" / "script.py").read_text() == "x = 1\n"


def test_a_fact_that_is_pinned_may_not_change_over_a_resume():
    with start() as run:
        run.pin("fingerprint", {"data": "abc"})
        one_step(run)
    with start("--resume_timestamp", run.folder.name) as again:
        again.pin("fingerprint", {"data": "abc"})
        with pytest.raises(UserError, match=r"fingerprint is not what .* began with: start a new run"):
            again.pin("fingerprint", {"data": "xyz"})


def test_a_fact_is_pinned_to_a_run_that_has_none_and_its_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--note", "two words"])
    with start() as run:
        one_step(run)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["command"] == "script.py --note 'two words'"
    for name in ("facts", "resumes", "seal"):  # of an older version
        del config[name]
    (run.folder / "config.json").write_text(json.dumps(config))
    with start("--resume_timestamp", run.folder.name) as again:
        again.pin("fingerprint", "abc")
        again.begin(9)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["facts"] == {"fingerprint": "abc"} and [entry["step"] for entry in config["resumes"]] == [1]


def test_a_checkpoint_brings_back_weights_optimizer_and_meter():
    with start() as run:
        model, *_ = one_step(run)
    with start("--resume_timestamp", run.folder.name, "--lr", "0.1") as again:
        other = nn.Linear(2, 2)
        optimizer, precision = torch.optim.SGD(other.parameters(), 0.1), core.Precision("fp32", World())
        again.begin(9)
        assert again.load(other, optimizer, precision) == 1
        assert core.weights_sha256(other) == core.weights_sha256(model) and again.meter.sums() == [2.0, 4]
    assert result()["status"] == "finished"


def test_a_batch_of_fewer_rows_than_ranks_is_refused_in_one_line():
    with pytest.raises(
        UserError, match="batch 8 is smaller than 9 ranks: use --nproc_per_node=8 or --batch 9"
    ):
        core.open_run(core.parse_config(Config, {}, {}, "", []), World(size=9), "script.py")


def test_a_run_that_auto_finds_finished_is_none_and_its_folder_as_it_was(capfd):
    with start() as run:
        one_step(run)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.folder.rglob("*") if path.is_file())
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    capfd.readouterr()
    cfg = core.parse_config(Config, {}, {}, "", ["--resume_timestamp", "auto"])
    assert core.open_run(cfg, World(), "script.py") is None
    assert f"{run.folder} is finished: nothing to do" in capfd.readouterr().out
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in run.folder.rglob("*") if path.is_file()
    )
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_refused_resume_leaves_every_file_as_it_was(capfd):
    with start() as run:
        one_step(run)
    (run.folder / "result.json").unlink()
    before = files_of(run.folder)
    with pytest.raises(UserError), start("--resume_timestamp", "latest") as again:
        again.say("looks at its data")
        raise UserError("other data")
    (run.folder / "samples.jsonl").mkdir()
    with pytest.raises(UserError, match=r"samples.jsonl is no file: move it away"):
        start("--resume_timestamp", "latest")
    (run.folder / "samples.jsonl").rmdir()
    assert files_of(run.folder) == before and "looks at its data" in capfd.readouterr().out
    with start("--resume_timestamp", "latest") as again:
        again.say("goes on")
        again.begin(9)
    assert "goes on\n" in (run.folder / "log.txt").read_text()


def test_a_run_that_is_further_than_it_is_to_go_is_told_what_to_type_and_stays_as_it_was():
    with start() as run:
        parts = one_step(run)
        run.save(6, *parts)
    before = files_of(run.folder)
    line = "is 2 steps further already: use a larger --max_steps or --epochs"
    with pytest.raises(UserError, match=line), start("--resume_timestamp", run.folder.name) as again:
        again.begin(4)
    assert files_of(run.folder) == before
    with start("--resume_timestamp", run.folder.name) as again:
        again.position |= {"first_step": 3}  # of the second fold, which counts its own steps
        again.begin(4)


def test_what_lies_beside_a_run_stops_no_resume():
    with start() as run:
        one_step(run)
    (run.folder / "result.json").unlink()
    for name in (".DS_Store", ".nfs00012", "step_00000099.tar"):
        (run.folder / name).touch()
        (run.folder / "checkpoints" / name).touch()
    for name, text in (("exported", '{"model_type": "gpt2"}'), ("20260101_000000", "[]"), ("list", "null")):
        Path("out", name).mkdir()
        Path("out", name, "config.json").write_text(text)
    Path("out/.DS_Store").touch()
    for wanted in ("latest", "auto", run.folder.name):
        with start("--resume_timestamp", wanted) as again:
            assert again.folder == run.folder and again.checkpoint == "step_00000001"
    with start("--resume_timestamp", "latest") as again:
        again.begin(9)
    assert (run.folder / "checkpoints" / ".DS_Store").exists()


@pytest.mark.parametrize("damage", ["half", "gone", "changed", "{}", "[]", "null"])
def test_auto_says_that_it_starts_anew_and_why(damage, capfd):
    with start("--resume_timestamp", "auto", "--tag", "a") as run:
        one_step(run)
    assert "a new run: none to resume with tag a in out" in capfd.readouterr().out
    config = run.folder / "config.json"
    text = config.read_text()
    if damage == "gone":
        config.unlink()
    else:
        changed = {"half": text[:99], "changed": text.replace('"lr": 0.1', '"lr": 0.3')}
        config.write_text(changed.get(damage, damage))
    with start("--resume_timestamp", "auto", "--tag", "a") as other:
        other.begin(9)
    out, err = capfd.readouterr()
    assert f"a new run: {run.folder.name} in out is damaged" in out and "WARNING passed over: " in err
    with pytest.raises(UserError, match=rf"--resume_timestamp {run.folder.name[:15]}: .* is no run folder"):
        start("--resume_timestamp", run.folder.name[:15], "--tag", "a")


@dataclass(frozen=True)
class Edited(Config):
    brand_new: float = 0.7  # of a script that was edited since


def test_a_constant_that_is_new_or_gone_since_the_run_began_is_named_on_resume(capfd):
    with start() as run:
        one_step(run)
    (run.folder / "result.json").unlink()
    cfg = core.parse_config(Edited, {}, {}, "", ["--resume_timestamp", "latest"])
    with core.open_run(cfg, World(), "script.py") as again:
        again.begin(9)
    assert "resumed: brand_new 0.7 is new: the run began without it" in capfd.readouterr().out
    (run.folder / "result.json").unlink()
    with start("--resume_timestamp", "latest") as again:
        again.begin(9)
    assert "resumed: brand_new 0.7 is gone: the script has no such constant" in capfd.readouterr().out


def test_a_resumed_runs_own_batch_is_what_the_ranks_must_fill(capfd):
    with start() as run:
        one_step(run)
    (run.folder / "result.json").unlink()
    cfg = core.parse_config(Config, {}, {}, "", ["--resume_timestamp", "latest"])
    with pytest.raises(UserError, match="batch 8 is smaller than 9 ranks"):
        plan_run(dataclasses.replace(cfg, batch=64), Path("script.py"), 9, contextlib.ExitStack())


def test_spikes_count_over_folds_and_what_else_a_fold_noted_is_its_own():
    with start() as run:
        run.state |= {"spikes": 2, "left_out": 1, "lowest": [1.0, 3]}
        run.step_done(2.0, 4, 4)
        assert run.load(None, None, None, fold=1) == 0 and run.meter.all_examples == 4
        assert run.state == {"spikes": 2, "left_out": 1}


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_waits_on_its_way_out_for_the_checkpoint_that_a_thread_writes(stopped, monkeypatch):
    monkeypatch.setattr(checkpoints, "apart", bool)
    with contextlib.nullcontext() if stopped else pytest.raises(ZeroDivisionError), start() as run:
        one_step(run)
        assert run.checkpoint is None and run.checkpoints.pending
        if stopped:
            raise core.Stop("SIGTERM")
        1 / 0  # noqa: B018
    assert result()["checkpoint"] == "step_00000001"
    assert checkpoints.broken(run.folder / "checkpoints" / "step_00000001") is None


@pytest.mark.parametrize("stopped", [True, False])
def test_a_last_checkpoint_that_finds_no_room_is_no_finished_run(stopped, monkeypatch, capfd):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "apart", bool)
    monkeypatch.setattr(checkpoints, "write_manifest", full)
    ends = contextlib.nullcontext() if stopped else pytest.raises(OSError, match="No space left")
    with ends, start() as run:
        one_step(run)
        if stopped:
            raise core.Stop("SIGTERM")
    said = "WARNING the last checkpoint is not written: [Errno 28] No space left on device"
    assert (said in capfd.readouterr().out) == stopped
    assert result()["status"] == ("stopped" if stopped else "failed") and result()["checkpoint"] is None
