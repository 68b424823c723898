"""eval.py --pack: an archive that can be measured at home."""

import shutil
import tarfile
from pathlib import Path

import pytest
import ranks
from toys.eval import (
    MADE,
    evaluate,
    result,
    trained,  # noqa: F401 (a fixture)
)

import core
import eval as script
from core import World
from lab.run import checkpoints, pack, stored


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run_lora", "folds"])
def test_an_archive_holds_what_measuring_needs_and_no_optimizer(kind, trained):
    folder = trained(kind)
    said = evaluate("--pack", folder, "--out", "away")
    archive = Path("away") / f"{folder.name}.tar.gz"
    assert str(archive) in said and [path.name for path in Path("away").iterdir()] == [archive.name]
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        tar.extractall("home", filter="data")
    assert not any("state.pt" in name or ".lock" in name for name in names)
    unpacked = Path("home/runs/smoke") / folder.parent.name / folder.name
    small = {"config.json", "result.json", "log.txt", "metrics.jsonl", "source/core.py"}
    assert all((unpacked / name).read_bytes() == (folder / name).read_bytes() for name in small)
    checkpoints = {path.name for path in (unpacked / "checkpoints").iterdir()}
    assert checkpoints == set(result(folder)["test_checkpoints"])
    assert "as result.json has it" in evaluate("--run", unpacked)
    script_name, argv = MADE[kind]
    code = ranks.launch(
        script_name, *argv, "--out", unpacked.parent, "--resume_timestamp", folder.name, "--epochs", 9
    )
    assert code == [2] and "packed without optimizer state" in Path("out.txt").read_text()
    assert (unpacked / "result.json").read_bytes() == (folder / "result.json").read_bytes()


def test_a_killed_packing_leaves_no_archive_under_its_name(trained, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    cfg = core.parse_config(script.Config, {}, {}, "", ["--pack", str(trained("run_lora")), "--out", "away"])
    with pytest.raises(OSError, match="disk full"):
        script.main(cfg, World())
    assert list(Path("away").iterdir()) == []


def test_a_run_that_is_being_written_is_refused_before_it_is_looked_at(monkeypatch):
    """Its checkpoints come and go meanwhile."""
    Path("out/run/checkpoints").mkdir(parents=True)
    core.write_json(Path("out/run/config.json"), {"script": "run_instruct", "constants": {}})
    lock = stored.locked(Path("out/run"))
    monkeypatch.setattr(pack, "packed_checkpoints", lambda folder: pytest.fail("it was looked at"))
    monkeypatch.setattr(stored.time, "sleep", lambda seconds: None)
    with lock, pytest.raises(core.UserError, match="is being written by process"):
        pack.pack(script.Config(pack=("out/run",)), print)
    assert not Path("run.tar.gz").exists()


def test_links_are_not_followed(trained, tmp_path):
    """A run folder that somebody has sent may link to anything of this box."""
    folder = tmp_path / "copied"
    shutil.copytree(trained("run_lora"), folder)
    (tmp_path / "secret").write_text("of this box")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / ".result.json.4711").touch()  # what a killed write left
    assert "1 link(s) are not inside: notes.txt" in evaluate("--pack", folder, "--out", "away")
    with tarfile.open("away/copied.tar.gz") as tar:
        names = [Path(name).name for name in tar.getnames()]
    assert "log.txt" in names and not {"notes.txt", ".result.json.4711"} & {*names}


@pytest.mark.parametrize("tested", [["../../secret"], [".."], None, [7]])
def test_a_result_that_somebody_has_sent_brings_nothing_else_into_an_archive(tested):
    """The names of checkpoints in it are a path of their own choice; the manifests there may be true."""
    for folder in ("secret", "out/run", "out/run/checkpoints/step_00000001"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "model.safetensors").write_text(f"weights of {folder}")
        checkpoints.write_manifest(Path(folder), {"step": 1})
    core.write_json(Path("out/run/config.json"), {"script": "run_instruct", "constants": {}})
    core.write_json(Path("out/run/result.json"), {"test_checkpoints": tested})
    said = []
    pack.pack(script.Config(pack=("out/run",)), said.append)
    with tarfile.open("run.tar.gz") as tar:
        names = tar.getnames()
    files = ("manifest.json", "model.safetensors")
    inside = {f"runs/out/run/checkpoints/step_00000001/{name}" for name in files}
    assert {name for name in names if "checkpoints" in name} == inside
    assert not [name for name in names if ".." in name or "secret" in name]
