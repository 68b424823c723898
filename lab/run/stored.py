"""Runs that lie on the disk: their folders, their config.json, how they ended, which is the newest."""

import contextlib
import os
import re
import socket
import time
from pathlib import Path

from lab.errors import UserError
from lab.run.files import is_there, lock_file, read_sealed
from lab.run.flags import names_of

SCRIPTS = (  # whose runs are known
    "run_preference",
    "gpt_scratch",
    "run_instruct",
    "run_lora",
    "run_pretrain_diversity",
    "run_mathqa",
)
PACKED = "packed.txt"  # says of a folder that it came out of eval.py --pack


def prepare_folder(folder, instead="use another --out"):
    """Makes a folder and checks that it can be written to. UserError where it cannot: says what to do."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # several commands may start at once
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): {instead}") from None


def locked(folder):
    """Locks a run folder for this process (returns the open file). UserError if
    another process writes there."""
    try:
        lock = open(folder / ".lock", "a+")
        for _ in range(50):  # a killed process lets go a moment later
            with contextlib.suppress(BlockingIOError):
                lock_file(lock, wait=False)
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}")
                lock.flush()
                return lock
            time.sleep(0.1)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): use another --out") from None
    lock.seek(0)
    raise UserError(f"{folder} is being written by {lock.read()}: stop it first")


def out_folder(cfg, script) -> Path:
    """The folder of a script's runs: cfg.out, or runs/<script>. UserError for a name that no disk takes."""
    out = Path(cfg.out or f"runs/{'smoke/' if cfg.typed.smoke else ''}{Path(script).stem}")
    is_there(out)
    return out


def newest_run(cfg, script, finished=False) -> Path:
    """The newest run folder of a script in cfg.out that holds a checkpoint (and is finished)."""
    out = out_folder(cfg, script)
    runs = sorted({path.parents[2] for path in out.glob("*/checkpoints/*/manifest.json")})
    runs = [run for run in runs if script_of(run) == Path(script).stem]
    runs = [run for run in runs if not finished or status_of(run) == "finished"]
    if not runs:
        kind = "finished run" if finished else "run with a checkpoint"
        raise UserError(f"no {kind} of {Path(script).name} in {out}: train one, name one, or add --smoke")
    return runs[-1]


def script_of(folder) -> str | None:
    """The script that made a run; none where its config.json cannot be read."""
    with contextlib.suppress(UserError):
        return run_config(folder)["script"]


def read_config(folder) -> dict:
    """Reads the config.json of a folder; of a run: constants, provenance, facts, resumes. UserError where it
    cannot be read, or is not what the run wrote."""
    try:
        config = read_sealed(Path(folder) / "config.json")
    except FileNotFoundError:
        raise UserError(f"{folder} is no run folder: it has no config.json") from None
    except (OSError, ValueError):
        raise UserError(f"{folder} is no run folder: its config.json cannot be read, or is damaged") from None
    if isinstance(config.get("constants"), dict):
        config["constants"] = stored_constants(config["constants"])
    return config


KINDS = {"script": str, "constants": dict, "facts": dict, "resumes": list}


def run_config(folder) -> dict:
    """read_config of a folder that must be a run. UserError where it is something else."""
    config = {"facts": {}, "resumes": []} | read_config(folder)
    if not all(isinstance(config.get(name), kind) for name, kind in KINDS.items()):
        raise UserError(f"{folder} is no run folder: its config.json is that of something else")
    return config


def stored_config(folder, config, script, absent=None):
    """The constants of a run as the dataclass `config`; those that it no longer has are left out. absent: of
    constants that older runs lack. UserError for another script's run."""
    stored, known = run_config(folder), names_of(config)
    if stored["script"] != Path(script).stem:
        raise UserError(f"{folder} is a run of {stored['script']}.py: open it there")
    constants = (absent or {}) | stored["constants"]
    return config(**{name: value for name, value in constants.items() if name in known})


def stored_constants(values) -> dict:
    """Stored constants with tuples again, where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_result(folder) -> dict:
    """Reads result.json of a run folder; empty where it is absent, incomplete or damaged."""
    try:
        return read_sealed(Path(folder) / "result.json")
    except (OSError, ValueError):
        return {}


def tested_names(folder) -> list[str]:
    """Names of the checkpoints that a run was tested with, one per fold; empty where result.json has none.
    What is no plain name is left out: a result that somebody has sent could lead to any file of this box."""
    names = read_result(folder).get("test_checkpoints")
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and re.fullmatch(r"\w+", name)]


def status_of(folder) -> str:
    """finished, stopped or failed; or that there is no result.json."""
    return read_result(folder).get("status", "running or killed")


def is_run(name) -> bool:
    """Whether a folder is a run that brings a GPT of its own."""
    return is_there(Path(name) / "gpt.json")
