"""Files and folders that appear whole or not at all."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import core
import eval as script
from lab.compare import facts, responses, sides
from lab.data import hub
from lab.models import int4, pretrained, trusted
from lab.run import files, stored


def test_a_folder_or_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), core.whole_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("half")
        raise KeyError
    with pytest.raises(KeyError), core.whole_file(tmp_path / "b") as file:
        file.write("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".a.leftover").mkdir()  # by a process that was killed yesterday
    os.utime(tmp_path / ".a.leftover", (0, 0))
    with core.whole_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_killed_writers_go_and_what_is_somebody_elses_stays(tmp_path):
    for name in (".result.json.4711", ".step_00000004.ab12_xyz", ".DS_Store", ".lock", ".nfs0001"):
        (tmp_path / name).touch()
    (tmp_path / ".step_00000008.ab12cd34").mkdir()
    files.remove_leftovers(tmp_path, older=60)
    assert len(list(tmp_path.iterdir())) == 6  # they may be a living process's
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".DS_Store", ".lock", ".nfs0001"]


def test_files_have_the_modes_that_the_umask_leaves_and_hold_any_text(tmp_path):
    before = os.umask(0o027)
    try:
        with core.whole_folder(tmp_path / "folder") as aside:
            (aside / "private").touch(mode=0o600)  # as safetensors makes it
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "private").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    with core.whole_file(tmp_path / "text") as file:
        file.write("a lone \ud800")
    assert (tmp_path / "text").read_text() == "a lone \\ud800"


def test_a_sealed_file_shows_every_later_change_and_one_without_a_seal_is_taken_as_it_is(tmp_path):
    content, path = {"lr": 0.1, "data": ("a", "b"), 3: None, "loss": float("nan")}, tmp_path / "x.json"
    files.write_sealed(path, content)
    found = files.read_sealed(path)
    assert found.pop("loss") != found.get("loss") and found == {"lr": 0.1, "data": ["a", "b"], "3": None}
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with contextlib.suppress(ValueError):  # white space and the word "seal" itself may change
            assert {name: files.read_sealed(path)[name] for name in ("lr", "data", "3")} == found
    path.write_text('{"lr": 0.3}')
    assert files.read_sealed(path) == {"lr": 0.3}
    for text in ("[]", "null", "[" * 100_000, "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"."):
            files.read_sealed(path)


def test_a_folder_is_replaced_only_once_the_new_one_is_whole(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export/old").touch()
    with pytest.raises(KeyError), core.whole_folder(tmp_path / "export", replace=True):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "old"]
    with core.whole_folder(tmp_path / "export", replace=True) as aside:
        (aside / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "new"]


TYPED = {  # whatever a user may type in place of a model, a run or a folder
    "is_run": stored.is_run,
    "is_quantised": int4.is_quantised,
    "a model": lambda name: pretrained.open_model(name),
    "any model": lambda name: pretrained.open_any(name),
    "a config": trusted.config_of,
    "the Hub": lambda name: hub.local_or_hub("model", name, list, "tiny:gpt2"),
    "eval's subject": script.subject,
    "answers": lambda name: responses.read_responses(Path(name, "responses.json")),
    "a side": lambda name: sides.named(name, "runs"),
    "a table": lambda name: facts.find([name]),
    "out": lambda name: stored.out_folder(SimpleNamespace(out=name), "run_lora.py"),
}


@pytest.mark.parametrize("call", TYPED)
def test_a_name_that_no_disk_takes_or_a_folder_that_may_not_be_entered_is_one_line(call, monkeypatch):
    """Path.exists raises for these: a traceback."""
    stat = os.stat

    def refused(path, *args, **options):
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    Path("secret").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refused)  # as root every folder may be entered
        for name, words in (("x" * 300, "File name too long"), ("secret", "Permission denied")):
            with pytest.raises(core.UserError, match=rf"^[^\n]*cannot be read \({words}\)[^\n]*$") as error:
                TYPED[call](name)
            assert len(str(error.value)) < 200
