"""Damaged checkpoints, damaged best weights and full disks cost no more than they must."""

import pickle
import shutil
import sys
from pathlib import Path

import pytest
from ranks import launch, newest, result

import core
import run_preference as script
from core import UserError, World
from lab.run import checkpoints


def test_after_a_broken_checkpoint_two_whole_ones_are_kept():
    flags = ["--smoke", "--max_documents", 200, "--epochs", 3, "--save_every", 2, "--out", "out"]
    launch("run_preference", *flags, kill=("step", 9, 0))
    first, second = sorted((newest() / "checkpoints").glob("step_*"))
    (second / "state.pt").write_bytes(b"")
    launch("run_preference", *flags, "--resume_timestamp", "auto", kill=("step", 3, 0))
    assert [checkpoints.broken(path) for path in (newest() / "checkpoints").glob("step_*")] == [None, None]
    assert first.exists()


def test_damaged_best_weights_are_named_and_the_last_ones_tested():
    flags = [
        "--smoke",
        "--max_documents",
        200,
        "--epochs",
        2,
        "--lr",
        0,
        "--out",
        "out",
    ]  # step 6 stays the best
    assert launch("run_preference", *flags) == [0]
    best = newest() / "checkpoints" / result()["test_checkpoints"][0]
    (best / "model.safetensors").write_bytes(b"damaged")
    assert launch("run_preference", *flags, "--resume_timestamp", newest().name) == [0]
    assert (
        f"WARNING the best weights are {best.name} (model.safetensors is not" in Path("out.txt").read_text()
    )
    assert result()["test_checkpoints"] == ["step_00000012"]


def test_too_little_disk_is_refused_at_the_start_and_survived_later(monkeypatch):
    import shutil as system

    free = iter([10**12] * 2 + [1000] * 3 + [10**12] * 99)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: system._ntuple_diskusage(1, 1, next(free)))
    monkeypatch.setattr(sys, "argv", ["run_preference.py"])
    flags = ["--smoke", "--max_documents", "200", "--epochs", "2", "--save_every", "2", "--out", "out"]
    cfg = core.parse_config(script.Config, script.PRESETS, script.SMOKE, "", flags)
    outcome = script.main(cfg, World())
    assert outcome["status"] == "finished" and "WARNING not saved" in (newest() / "log.txt").read_text()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: system._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(core.UserError, match=r"checkpoints need \d+ MB"):
        script.main(cfg, World())


def test_a_copy_of_a_checkpoint_under_another_name_is_no_checkpoint(tmp_path):
    for name in ("step_00000012", "step_00000012_mine", "step_100000000"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000099").touch()
    assert [path.name for path in checkpoints.step_folders(tmp_path)] == ["step_00000012", "step_100000000"]


def test_a_state_that_would_run_code_is_one_line(tmp_path):
    (tmp_path / "state.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"state.pt is no state .*: resume another step"):
        checkpoints.load_state(tmp_path)


def test_of_a_linked_checkpoint_only_the_link_is_removed_and_foreign_files_are_none():
    for name in ("elsewhere", "checkpoints/step_00000003"):
        Path(name).mkdir(parents=True)
        Path(name, "manifest.json").write_text("{}")
    for name in (".DS_Store", ".nfs0001", "step_00000099.tar", "step_00000004_mine"):
        Path("checkpoints", name).touch()
    Path("checkpoints/step_00000002").symlink_to("../elsewhere")
    steps = checkpoints.step_folders(Path("checkpoints"))
    assert [path.name for path in steps] == ["step_00000002", "step_00000003"]
    for path in steps:
        checkpoints.remove_checkpoint(path)
    assert Path("elsewhere/manifest.json").exists() and len(list(Path("checkpoints").iterdir())) == 4


def test_a_file_that_cannot_be_read_makes_a_checkpoint_a_broken_one():
    Path("c").mkdir()
    Path("c/model.safetensors").write_text("weights")
    checkpoints.write_manifest(Path("c"), {"step": 1})
    assert checkpoints.broken(Path("c")) is None
    Path("c/model.safetensors").unlink()
    Path("c/model.safetensors").mkdir()
    assert checkpoints.broken(Path("c")) == "model.safetensors cannot be read: Is a directory"
