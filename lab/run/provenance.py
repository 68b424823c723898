"""What a run notes of where it came from: sources, versions, git, device, data."""

import datetime
import functools
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch

from lab.errors import UserError
from lab.run.files import PROJECT, sha256_file, write_sealed
from lab.run.flags import constants_of
from lab.run.resume import changed_constants
from lab.run.stored import run_config
from lab.train.launch import launcher, launchers


def refuse_other_data(stored, now, name, what=("data",)):
    """Raises UserError where data (or tokenizer, say) are not those that the run was trained on."""
    if any(stored[key] != now[key] for key in what):
        raise UserError(f"data {name} is not what the run was trained on: restore it, or use --data")


def write_provenance(run):
    """Writes config.json and source/ of a new run; notes a resume in config.json."""
    now = {"started": datetime.datetime.now().isoformat(timespec="seconds"), "command": shlex.join(sys.argv)}
    now |= {
        "world_size": run.world.size,
        "threads": torch.get_num_threads(),
        "device": device_name(run.world),
    }
    if run.resumed:
        config = run_config(run.folder)
        entry = {"step": run.position.get("step", 0), **now, "git": git_state()}
        entry["changed"] = changed_constants(config["constants"], constants_of(run.cfg))
        entry["other_code"] = []
        config["resumes"].append(entry)
        for name, path in _sources(run.script).items():
            began = run.folder / "source" / name  # absent where the project has grown a file since
            if began.exists() and sha256_file(path) != sha256_file(began):
                entry["other_code"].append(name)
                run.say(f"WARNING {name} is not the one this run began with (that one is in source/)")
        config |= {"launcher": _all_launchers(), "constants": constants_of(run.cfg)}
    else:
        copy_sources(run.script, run.folder / "source")
        t = run.cfg.typed
        config = {"script": run.script.stem, "constants": constants_of(run.cfg), **now}
        config |= {"preset": t.preset, "smoke": t.smoke, "versions": _versions(), "git": git_state()}
        config |= {"host": socket.gethostname(), "launcher": _all_launchers(), "facts": {}, "resumes": []}
    write_sealed(run.folder / "config.json", config)


def copy_sources(script, folder):
    for name, path in _sources(script).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)


def _all_launchers() -> str | None:
    """Of every box: after a restart rank 0 may run on another one, and must know its run."""
    return " ".join(launchers) if len(launchers) > 1 else launcher()


def _sources(script) -> dict[str, Path]:
    """Name below the project -> file, of the script and all that this process has imported of the project."""
    # by __dict__: asking a lazy module for an attribute would import what it stands for
    modules = [vars(module) for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    names = {name for module in modules if (name := module.get("__file__"))}
    home, foreign = f"{PROJECT}{os.sep}", {"site-packages", "tests", "benchmarks"}
    mine = [name for name in names if name.startswith(home) and name.endswith(".py")]
    # as texts: a virtual environment inside the project holds thousands of them
    mine = {Path(name) for name in mine if not foreign & {*name[len(home) :].split(os.sep)}}
    named = {str(file.relative_to(PROJECT)): file for file in sorted(mine)}
    script = script.resolve()
    return named if script in mine else named | {script.name: script}


@functools.cache  # looks through all that is installed
def _versions() -> dict[str, str | None]:
    from importlib.metadata import distributions

    names = ("torch", "transformers", "datasets", "tokenizers", "numpy")
    versions = {name: next((package.version for package in distributions(name=name)), None) for name in names}
    return {"python": platform.python_version(), **versions}  # built-in data need no `datasets`


def device_name(world) -> str:
    return (
        torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else f"{world.device.type} {platform.machine()}"
    )


def refuse_dirty():
    """Raises UserError unless the project is a git checkout without changes or untracked files."""
    state = git_state()
    if not state["commit"]:
        raise UserError(
            "--no-dirty: this is no git checkout with a commit: commit the project, or use --dirty"
        )
    if state["dirty"]:
        changed = ", ".join(state["dirty"].splitlines()[:5])
        raise UserError(f"--no-dirty: uncommitted changes ({changed}): commit them, or use --dirty")


def git_state() -> dict[str, str]:
    """Commit and uncommitted changes of the project: constants are edited in place. Empty without git."""

    def git(*args):
        if not shutil.which("git"):
            return ""
        try:
            said = subprocess.run(["git", "-C", str(PROJECT), *args], capture_output=True).stdout
        except OSError:  # it cannot be started: where a run comes from never stops it
            return ""
        return said.decode(errors="backslashreplace").strip()  # names and diffs are of any encoding

    return {
        "commit": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=normal"),
        "diff": git("diff", "HEAD"),
    }
