"""What a run notes of its code and checkout; --no-dirty."""

import subprocess
from types import SimpleNamespace

import pytest
from ranks import everywhere

import core
from core import UserError
from lab.run import files, provenance


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git checkout that stands for the project: `kept` is committed, `ignored` is ignored."""
    everywhere(monkeypatch.setattr, files, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "kept").write_text("1")
    (tmp_path / ".gitignore").write_text("ignored\n")
    git("add", ".")
    git("commit", "-qm", "first")
    return SimpleNamespace(path=tmp_path, git=git)


def test_a_clean_checkout_may_start(project):
    (project.path / "ignored").write_text("1")
    assert core.refuse_dirty() is None


def test_a_run_of_several_boxes_is_known_by_the_torchruns_of_all(monkeypatch):
    """After a restart rank 0 may be on another of them."""
    monkeypatch.setattr(provenance, "launcher", lambda: "box1/7/9")
    monkeypatch.setattr(provenance, "launchers", [])
    assert provenance._all_launchers() == "box1/7/9"
    provenance.launchers += ["box1/7/9", "box2/4/6"]
    assert provenance._all_launchers() == "box1/7/9 box2/4/6"


@pytest.mark.parametrize("change", ["unstaged", "staged", "untracked", "untracked and hidden", "deleted"])
def test_any_uncommitted_change_is_refused(project, change):
    if change.startswith("untracked"):
        (project.path / "new").write_text("1")
        project.git("config", "status.showUntrackedFiles", "no" if "hidden" in change else "normal")
    elif change == "deleted":
        (project.path / "kept").unlink()
    else:
        (project.path / "kept").write_text("2")
        if change == "staged":
            project.git("add", "kept")
    with pytest.raises(UserError, match=r"uncommitted changes.*(kept|new)") as error:
        core.refuse_dirty()
    assert "--dirty" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_checkout_with_a_commit_is_refused(tmp_path, monkeypatch):
    everywhere(monkeypatch.setattr, files, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="no git checkout"):
        core.refuse_dirty()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "file").write_text("1")
    with pytest.raises(UserError, match="--no-dirty"):
        core.refuse_dirty()


def test_a_name_of_another_encoding_and_a_git_that_cannot_start_do_not_stop_a_run(project, monkeypatch):
    (project.path / "kept").write_bytes(b"\xff\n")
    assert r"+\xff" in provenance.git_state()["diff"]
    monkeypatch.setattr(provenance.subprocess, "run", _no_memory)
    assert provenance.git_state() == {"commit": "", "dirty": "", "diff": ""}


def _no_memory(*args, **options):
    raise OSError("no memory to fork")
