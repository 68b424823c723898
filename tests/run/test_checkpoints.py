"""Damaged checkpoints, damaged best weights and full disks cost no more than they must."""

import errno
import pickle
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import launch, newest, result

import core
import run_preference as script
from core import UserError, World
from lab.run import checkpoints
from lab.run.checkpoints import write_manifest
from lab.run.files import write_json


def test_after_a_broken_checkpoint_two_whole_ones_are_kept():
    flags = ["--smoke", "--max_documents", 200, "--epochs", 3, "--save_every", 2, "--out", "out"]
    launch("run_preference", *flags, kill=("step", 9, 0))
    first, second = sorted((newest() / "checkpoints").glob("step_*"))
    (second / "state.pt").write_bytes(b"")
    launch("run_preference", *flags, "--resume_timestamp", "auto", kill=("step", 3, 0))
    assert [checkpoints.broken(path) for path in (newest() / "checkpoints").glob("step_*")] == [None, None]
    assert first.exists()


@pytest.mark.slow
def test_damaged_best_weights_are_named_and_those_of_the_next_evaluation_tested():
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
    assert result()["test_checkpoints"] == ["best_step_00000012"]


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


def kept_here(**found) -> tuple[checkpoints.Checkpoints, torch.nn.Linear, list[str]]:
    """(Checkpoints of the run out/one, a model, the lines that it said)"""
    said, folder = [], Path("out/one")
    folder.mkdir(parents=True, exist_ok=True)
    kept = checkpoints.Checkpoints(folder, World(), 2, said.append, **found)
    kept.curves = SimpleNamespace(flushed_bytes=lambda: 7)
    torch.manual_seed(0)
    return kept, torch.nn.Linear(2, 2), said


def parts(model) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    """What a checkpoint holds beside weights and position."""
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), torch.amp.GradScaler("cpu", enabled=False)


def names() -> list[str]:
    return sorted(path.name for path in Path("out/one/checkpoints").iterdir())


def test_the_newest_checkpoints_and_the_best_weights_that_they_refer_to_are_kept():
    kept, model, said = kept_here()
    assert kept.told() == "there is no checkpoint" and kept.is_best(0, 9.0)
    for step, fold, loss in [(1, 0, 3.0), (2, 0, 2.0), (3, 1, 5.0), (4, 1, 4.0)]:
        assert kept.is_best(fold, loss)
        kept.keep_weights(step, model, "best", fold, loss)
        kept.save(step, model, *parts(model), {"fold": fold})
    best = [f"best_step_0000000{step}" for step in (2, 3, 4)]  # 3: by the position of step 3
    assert names() == [*best, "step_00000003", "step_00000004"]
    position = checkpoints.read_manifest(Path("out/one/checkpoints/step_00000004"))
    assert position["kept"] == kept.kept and (position["step"], position["metrics_bytes"]) == (4, 7)
    assert not kept.is_best(0, 2.0) and kept.is_best(0, 1.9) and not kept.is_best(1, 4.5) and said == []


def test_best_weights_come_back_and_broken_ones_are_told_and_left():
    kept, model, said = kept_here()
    kept.keep_weights(1, model, "best", 0, 1.0)
    best = core.weights_sha256(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    kept.save(2, model, *parts(model), {})
    last = core.weights_sha256(model)
    assert kept.load_best(model, 0) == "best_step_00000001" and core.weights_sha256(model) == best != last
    core.load_weights("out/one/checkpoints/step_00000002", model)
    Path("out/one/checkpoints/best_step_00000001/model.safetensors").write_bytes(b"x")
    assert kept.load_best(model, 0) == "step_00000002" and core.weights_sha256(model) == last
    assert said == [
        "WARNING the best weights are best_step_00000001 (model.safetensors is not what was written): "
        "the last ones are used"
    ]


def test_what_lies_behind_the_checkpoint_that_is_resumed_from_goes():
    kept, model, _ = kept_here()
    for step in (1, 2, 3):
        kept.keep = 9
        kept.save(step, model, *parts(model), {})
    back, model, _ = kept_here(newest="step_00000002")
    back.open()
    assert names() == ["step_00000001", "step_00000002"]
    back.save(2, model, *parts(model), {})  # it is there: nothing is written
    assert checkpoints.broken(Path("out/one/checkpoints/step_00000002")) is None
    assert back.told() == "the newest checkpoint is step_00000002"


def test_weights_and_optimizer_come_back_from_the_newest():
    kept, model, _ = kept_here()
    optimizer, scaler = parts(model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    want = core.weights_sha256(model), optimizer.state_dict()["state"][0]["momentum_buffer"]
    kept.save(1, model, optimizer, scaler, {})
    back, other, _ = kept_here(newest="step_00000001")
    fresh, scaler = parts(other)
    back.load(other, fresh, scaler)
    assert core.weights_sha256(other) == want[0]
    assert torch.equal(fresh.state_dict()["state"][0]["momentum_buffer"], want[1])


def test_a_save_that_finds_no_room_is_told_or_an_error_and_the_one_before_stays(monkeypatch):
    kept, model, said = kept_here()
    kept.save(1, model, *parts(model), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    kept.save(2, model, *parts(model), {})
    assert kept.newest == "step_00000001" and said[0].endswith("the newest checkpoint is step_00000001")
    with pytest.raises(UserError, match=r"^not saved: step_00000002 needs 1 MB, .* free some, then --resume"):
        kept.save(2, model, *parts(model), {}, must=True)
    assert kept.keep_weights(2, model, "last", 0) is None and kept.kept == {}  # no name of what is not there
    with pytest.raises(UserError, match=r"^not saved: last_step_00000002 needs"):
        kept.keep_weights(2, model, "last", 0, must=True)
    assert names() == ["step_00000001"]


def test_a_step_that_is_asked_for_and_broken_is_named_with_the_others():
    kept, model, _ = kept_here()
    for step in (1, 2):
        kept.save(step, model, *parts(model), {})
    folder = Path("out/one/checkpoints")
    assert checkpoints.newest_whole_checkpoint(folder, 2) == ("step_00000002", [])
    (folder / "step_00000002" / "state.pt").unlink()
    line = r"^--resume_step 2: step_00000002 is broken \(state.pt is missing\); there are step_00000001$"
    with pytest.raises(UserError, match=line):
        checkpoints.newest_whole_checkpoint(folder, 2)


def test_best_weights_that_are_broken_are_no_others_rivals():
    kept, model, _ = kept_here()
    for fold in (0, 1):
        kept.keep_weights(fold, model, "best", fold, 1.0)
    folder = Path("out/one/checkpoints")
    position = {"fold": 1, "kept": dict(kept.kept)}
    assert checkpoints.drop_broken_best(folder, position) == [] and position["kept"] == kept.kept
    for fold in (0, 1):  # the first fold is finished: its weights are its own business
        shutil.rmtree(folder / f"best_step_0000000{fold}")
    (line,) = checkpoints.drop_broken_best(folder, position)
    assert line.startswith("WARNING the best weights are best_step_00000001 (manifest.json is absent")
    assert [*position["kept"]] == ["best 0"]
    back, *_ = kept_here(kept=position["kept"])
    assert back.is_best(1, 2.0) and not back.is_best(0, 2.0)
    assert checkpoints.drop_broken_best(folder, {}) == []


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


@pytest.mark.parametrize("text", ["{}", "[]", "null", "[" * 100_000, '{"files": {}}', "", b"\xff"], ids=len)
def test_a_manifest_that_is_none_makes_a_checkpoint_a_broken_one(text):
    Path("c").mkdir()
    Path("c/manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert checkpoints.broken(Path("c")) == "manifest.json is absent or damaged"


@pytest.mark.parametrize("tested", [[], None, 5, "step_00000009", [5], ["../../elsewhere"], [".."]])
def test_without_the_name_of_a_tested_checkpoint_the_newest_is_used(tested, capfd):
    kept, model, _ = kept_here()
    kept.save(1, model, *parts(model), {})
    for folder in ("elsewhere", "out/one"):
        Path(folder).mkdir(exist_ok=True)
        write_json(Path(folder, "manifest.json"), checkpoints.manifest({"step": 9}, {}))
    write_json(Path("out/one/config.json"), {"script": "run_lora", "constants": {}})
    write_json(Path("out/one/result.json"), {"status": "finished", "test_checkpoints": tested})
    assert checkpoints.tested_or_newest_checkpoint("out/one") == "step_00000001"
    with pytest.raises(UserError, match=r"^out/one is not finished: resume it, or name another --run$"):
        checkpoints.tested_checkpoints("out/one")
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------- written in a thread, as beside a card


@pytest.fixture
def gate(monkeypatch):
    """Checkpoints are written in a thread, which waits for the gate before it writes a manifest."""
    opened, write = threading.Event(), checkpoints.write_manifest

    def wait_and_write(folder, position):
        assert threading.current_thread().name.startswith("checkpoint") and opened.wait(30)
        write(folder, position)

    monkeypatch.setattr(checkpoints, "apart", bool)
    monkeypatch.setattr(checkpoints, "write_manifest", wait_and_write)
    yield opened
    opened.set()


def trained_once():
    """(Checkpoints, a model, its optimizer, a scaler, a position), the same each time"""
    kept, model, said = kept_here()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 0.1), parts(model)[1]
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return kept, said, model, optimizer, scaler, {"fold": 0, "state": {"lowest": [1.0]}}


def files(name):
    return {path.name: path.read_bytes() for path in Path("out/one/checkpoints", name).iterdir()}


def test_a_thread_writes_the_files_of_the_moment_whatever_training_does_meanwhile(gate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "apart", lambda world: False)
        patch.setattr(checkpoints, "write_manifest", write_manifest)
        kept, _, model, optimizer, scaler, position = trained_once()
        kept.save(1, model, optimizer, scaler, position)
        kept.keep_weights(1, model, "best", 0, 1.0)
    want = files("step_00000001"), files("best_step_00000001")
    shutil.rmtree("out")
    kept, said, model, optimizer, scaler, position = trained_once()
    kept.save(1, model, optimizer, scaler, position)
    assert kept.told() == "there is no checkpoint" and kept.pending == "step_00000001"
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    position["state"]["lowest"].append(0.5)
    assert [name for name in names() if not name.startswith(".")] == []
    gate.set()
    kept.settle()
    assert kept.told() == "the newest checkpoint is step_00000001" and kept.pending is None
    kept, _, model, optimizer, scaler, position = trained_once()
    gate.clear()
    kept.keep_weights(1, model, "best", 0, 1.0)
    with torch.no_grad():
        model.weight.zero_()
    gate.set()
    assert kept.load_best(model, 0) == "best_step_00000001"  # waits for it
    assert (files("step_00000001"), files("best_step_00000001")) == want and said == []


def test_one_is_whole_before_the_next_is_begun_and_one_that_must_be_on_return(gate):
    kept, _, *saved, position = trained_once()
    kept.save(1, *saved, position)
    threading.Timer(0.05, gate.set).start()
    kept.save(2, *saved, position)
    assert kept.newest == "step_00000001" and kept.pending == "step_00000002"
    kept.save(2, *saved, position)  # it is being written
    kept.save(2, *saved, position, must=True)
    assert kept.newest == "step_00000002" and kept.pending is None
    assert [checkpoints.broken(path) for path in Path("out/one/checkpoints").iterdir()] == [None, None]


def test_a_disk_that_fills_while_a_thread_writes_is_an_error_where_it_is_waited_for(gate, monkeypatch):
    kept, said, *saved, position = trained_once()
    gate.set()
    kept.save(1, *saved, position)
    kept.settle()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lab.run.files.flush", full)
        kept.save(2, *saved, position)
        with pytest.raises(OSError, match="No space left"):
            kept.save(3, *saved, position)
        kept.save(4, *saved, position)
        assert isinstance(kept.settle_alone(), OSError) and kept.settle_alone() is None
    assert names() == ["step_00000001"] == [kept.newest] and kept.told().endswith("is step_00000001")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        kept.save(5, *saved, position)  # this is known at once
        assert kept.pending is None and said[0].startswith("WARNING not saved: step_00000005 needs 1 MB")


def test_without_memory_for_a_copy_the_training_waits(monkeypatch):
    monkeypatch.setattr(checkpoints, "apart", bool)
    monkeypatch.setattr(checkpoints, "memory_for", lambda size: False)
    kept, _, *saved, position = trained_once()
    kept.save(1, *saved, position)
    assert checkpoints.broken(Path("out/one/checkpoints/step_00000001")) is None
    kept.settle()
    assert kept.newest == "step_00000001"


def test_a_copy_leaves_as_much_memory_again():
    assert checkpoints.memory_for(1) and not checkpoints.memory_for(10**15)


@pytest.mark.slow
def test_killed_while_a_thread_writes_the_one_before_stays_and_a_stop_waits_for_it():
    """By SIGKILL in the second checkpoint; then by TERM in the next; both before its manifest."""
    flags = ["--smoke", "--max_documents", 200, "--epochs", 2, "--save_every", 2, "--out", "out"]
    again, apart = ["--resume_timestamp", "auto"], {"WRITE_APART": "1"}
    assert launch("run_preference", *flags, kill=("save", 2, 0), env=apart) == [-signal.SIGKILL]
    assert [path.name for path in checkpoints.step_folders(newest() / "checkpoints")] == ["step_00000002"]
    codes = launch("run_preference", *flags, *again, sent=("save", 1, signal.SIGTERM), env=apart)
    assert codes == [-signal.SIGTERM] and result()["status"] == "stopped"
    assert len(list(Path("out").iterdir())) == 1
    last = newest() / "checkpoints" / result()["checkpoint"]
    assert int(last.name[5:]) > 2 and checkpoints.broken(last) is None
    assert not list(last.parent.glob(".*"))


@pytest.mark.parametrize("error", [None, OSError("the disk is full")])
def test_a_checkpoint_on_its_way_outlives_the_loss_of_a_sibling(error, tmp_path):
    """Then a thread ends this process: what goes wrong with the writing must not keep it from that."""
    waited = []

    def result(seconds):
        waited.append(seconds)
        if error:
            raise error

    kept = checkpoints.Checkpoints(tmp_path, World(), 2, print)
    kept.finish_writing(60)  # nothing is on its way
    kept._writing = SimpleNamespace(result=result)
    kept.finish_writing(60)
    assert waited == [60]
