"""Runs on the disk: read however they ended, written by one process at a time."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from core import UserError
from lab.run.stored import locked, newest_run, prepare_folder, read_config, read_result, status_of


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


@pytest.mark.parametrize("text", ['{"status": "fini', "[1, 2]", "{}", None])
def test_half_a_result_is_none(text):
    if text is not None:
        write("run/result.json", text)
    assert read_result("run") == {} and status_of(Path("run")) == "running or killed"


def test_a_result_says_how_it_ended():
    write("run/result.json", json.dumps({"status": "stopped", "step": 3}))
    assert status_of(Path("run")) == "stopped" and read_result("run")["step"] == 3


def test_constants_come_back_as_they_were_and_a_folder_of_something_else_is_named():
    write("run/config.json", json.dumps({"constants": {"arms": ["a", "b"], "lr": 0.1}}))
    assert read_config("run")["constants"] == {"arms": ("a", "b"), "lr": 0.1}
    write("other/config.json", "not JSON")
    for folder in ("other", "absent"):
        with pytest.raises(UserError, match=rf"^{folder} is no run folder"):
            read_config(folder)


def test_a_folder_is_written_by_one_process_at_a_time():
    Path("run").mkdir()
    lock = locked(Path("run"))
    with pytest.raises(UserError, match=r"run is being written by process \d+ on .*: stop it first"):
        locked(Path("run"))
    lock.close()
    locked(Path("run")).close()


def test_a_place_that_cannot_be_written_is_refused_before_work_begins():
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"file/out cannot be written .*: use another --out"):
        prepare_folder("file/out")
    prepare_folder("new/out")
    assert list(Path("new/out").iterdir()) == []


def test_another_command_that_starts_at_the_same_moment_is_no_reason_to_refuse_a_folder(monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)  # it was there, and the other one has removed it
    prepare_folder("out")
    assert list(Path("out").iterdir()) == []


def test_the_newest_run_is_one_of_the_script_that_holds_a_checkpoint_and_is_finished():
    """A damaged config or result hides no other run."""
    runs = [("a", "gpt_scratch", "finished"), ("b", "gpt_scratch", "stopped"), ("c", "run_lora", "finished")]
    for name, script, status in runs:
        write(f"out/{name}/config.json", json.dumps({"script": script, "constants": {}}))
        write(f"out/{name}/result.json", json.dumps({"status": status}))
        write(f"out/{name}/checkpoints/step_00000001/manifest.json", "{}")
    for name, text in (
        ("d", '{"script": "gpt'),
        ("e", json.dumps({"script": "gpt_scratch", "constants": {}})),
    ):
        write(f"out/{name}/config.json", text)
        write(f"out/{name}/result.json", '{"status": "fin')
        write(f"out/{name}/checkpoints/step_00000001/manifest.json", "{}")
    cfg = SimpleNamespace(out="out")
    assert newest_run(cfg, "gpt_scratch.py", finished=True) == Path("out/a")
    assert newest_run(cfg, "gpt_scratch.py") == Path("out/e")
    with pytest.raises(UserError, match=r"no finished run of run_instruct.py in out: train one"):
        newest_run(cfg, "run_instruct.py", finished=True)
