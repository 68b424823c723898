"""Which folder a command resumes, from which checkpoint, and with which constants."""

import datetime
import os
import re
import sys
import time
from pathlib import Path

from lab.errors import UserError
from lab.run.checkpoints import drop_broken_best, newest_whole_checkpoint, read_manifest
from lab.run.flags import FIND_CONSTANTS, constants_of, override_lines
from lab.run.stored import PACKED, locked, out_folder, run_config, status_of
from lab.train.launch import launcher, number

MAY_CHANGE = {  # what a flag may change in a resumed run: length, cadence, bookkeeping, how it is computed
    "epochs",
    "max_steps",
    "max_minutes",
    "eval_batch",
    "eval_every",
    "final_eval",
    "save_every",
    "keep",
    "log_every",
    "price_per_hour",
    "note",
    "micro_batch",
    "micro_tokens",
    "compile",
    "shard",
    "answer_rows",
    *FIND_CONSTANTS,  # no run that is resumed reads them
}
# of the call, not of the run: what was stored of these never counts
CALL_CONSTANTS = {
    "out",
    "tag",
    "resume_timestamp",
    "resume_step",
    "backend",
    "dirty",
    "profile",
    "run_folder",
}


def plan_run(cfg, script, ranks, held) -> dict:
    """Rank 0 decides, as JSON: a new folder or one to resume, its checkpoint, position and constants.
    held: an ExitStack that gets the folder's lock, unless the run is finished already."""
    out = out_folder(cfg, script)
    folder, constants, lines = resume_folder(cfg, script, out), constants_of(cfg), override_lines(cfg)
    plan = {"resumed": True, "finished": False, "checkpoint": None, "position": {}}
    if not folder:
        lines += passed_over(cfg, script, out)
        require_rows(constants["batch"], ranks)
        folder = new_folder(out, cfg.tag)
        held.enter_context(locked(folder))
        lines += filter(None, [cfg.typed.chosen])
        return plan | {"folder": str(folder), "resumed": False, "constants": constants, "lines": lines}
    if clash := clashes(cfg, config := run_config(folder)):
        raise UserError(f"{folder} ran with {'; '.join(clash)}: drop these flags, or start a new run")
    lines += merge_constants(config["constants"], constants, cfg.typed.flags)
    plan |= {"folder": str(folder), "constants": constants, "lines": lines}
    goes_on = has_restarted(config)  # torchrun's workers, amid this run
    skips = goes_on or cfg.resume_timestamp == "auto"
    if skips and status_of(folder) == "finished":
        return plan | {"finished": True}
    if (folder / PACKED).exists():
        raise UserError(f"{folder} was packed without optimizer state: resume the original, not this copy")
    require_rows(constants["batch"], ranks)
    require_files(folder)
    held.enter_context(locked(folder))
    # while this one waited for the lock
    if skips and status_of(folder) == "finished":
        return plan | {"finished": True}
    step = None if goes_on else cfg.resume_step  # it went back once, and has gone on from there
    name, notes = newest_whole_checkpoint(folder / "checkpoints", step)
    notes.append(f"resumes {folder.name} from {name or 'step 0: there is no checkpoint yet'}")
    position = read_manifest(folder / "checkpoints" / name) if name else {}
    notes += drop_broken_best(folder / "checkpoints", position)
    return plan | {"checkpoint": name, "position": position, "lines": notes + lines}


def require_rows(batch, ranks):
    """UserError where a batch has no row for some process."""
    if batch < ranks:
        better = f"use --nproc_per_node={batch} or --batch {ranks} or more"
        raise UserError(f"batch {batch} is smaller than {ranks} ranks: {better}")


def require_files(folder):
    """Raises UserError where something else stands in the place of a file that a resume goes on with."""
    for name in ("log.txt", "metrics.jsonl", "samples.jsonl", "spikes.jsonl", "result.json"):
        path = folder / name
        if (path.exists() or path.is_symlink()) and not path.is_file():
            raise UserError(f"{path} is no file: move it away")


def merge_constants(stored, constants, flags) -> list[str]:
    """The constants of a resumed run: the stored ones, except what a flag may change. And a
    line for each difference."""
    lines = []
    for name, old in stored.items():
        if name in CALL_CONSTANTS or name not in constants or old == constants[name]:
            continue
        if name in MAY_CHANGE & flags:
            lines.append(f"resumed: {name} is now {constants[name]} (it was {old})")
        else:
            lines.append(f"resumed: {name} stays {old} (the script now says {constants[name]})")
            constants[name] = old
    known = CALL_CONSTANTS | FIND_CONSTANTS
    new = [name for name in constants if name not in stored and name not in known]
    lines += [f"resumed: {name} {constants[name]} is new: the run began without it" for name in new]
    gone = [name for name in stored if name not in constants and name not in known]
    return lines + [
        f"resumed: {name} {stored[name]} is gone: the script has no such constant" for name in gone
    ]


def new_folder(out, tag) -> Path:
    while True:
        folder = out / f"{datetime.datetime.now():%Y%m%d_%H%M%S}{name_end(tag)}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not out.is_dir():
                raise UserError(f"out {out} is a file: use a folder") from None
            time.sleep(0.2)  # another run started in this second
        except OSError as error:
            raise UserError(f"out {out} cannot be written ({error.strerror}): use another --out") from None


def name_end(tag) -> str:
    """What the tag adds to a folder's name."""
    return f"-{tag}" if tag else ""


def is_like(cfg, script, run) -> bool:
    """Whether a run is one of this script and mode."""
    config = run_config(run)
    return config["script"] == script.stem and config["constants"].get("mode") == getattr(cfg, "mode", None)


def has_restarted(config) -> bool:
    """Whether torchrun has restarted this process (--max-restarts), and the one before it was at this run."""
    return number("TORCHELASTIC_RESTART_COUNT") > 0 and launcher() in str(config.get("launcher")).split()


def resume_folder(cfg, script, out) -> Path | None:
    """Finds the run to resume; None starts a new one. UserError if a resume was asked
    for and there is none."""
    wanted, tag = cfg.resume_timestamp, name_end(cfg.tag)
    if wanted in (None, "auto") and cfg.resume_step is not None:  # auto would go back each time it is typed
        better = "--resume_timestamp with a timestamp, or latest"
        raise UserError(f"--resume_step {cfg.resume_step} needs {better}")
    runs, damaged = found_runs(out)
    runs = [run for run in runs if is_like(cfg, script, run)]
    if wanted is None:
        mine = [run for run in runs if run.name[15:] == tag and has_restarted(run_config(run))]
        return mine[-1] if mine else None
    for name, why in damaged.items():
        if wanted[:15] == name[:15]:
            raise UserError(f"--resume_timestamp {wanted}: {why}")
        print(f"WARNING passed over: {why}", file=sys.stderr)
    if wanted in ("auto", "latest"):
        runs = [run for run in runs if run.name[15:] == tag]
        if wanted == "auto":  # a loop over seeds types the same words: another seed is another run
            runs = [run for run in runs if not clashes(cfg, run_config(run))]
            return runs[-1] if runs else None
        if unfinished := [run for run in runs if status_of(run) != "finished"]:
            return unfinished[-1]
        raise UserError(
            f"--resume_timestamp latest: no unfinished run{tag and f' with tag {cfg.tag}'} in {out}"
        )
    named = [run for run in runs if run.name == wanted + tag] or [
        run for run in runs if run.name[:15] == wanted[:15]
    ]
    if len(named) != 1:
        near = ", ".join(run.name for run in (named or runs)[-3:]) or "none"
        raise UserError(f"--resume_timestamp {wanted}: {len(named)} such runs in {out}; there: {near}")
    return named[0]


def found_runs(out) -> tuple[list[Path], dict[str, str]]:
    """The runs in a folder, oldest first, and name -> what is wrong of damaged ones. What is no run (an
    export, a model, files of the system) is neither."""
    runs, damaged = [], {}
    for folder in sorted(path for path in out.glob("*") if path.is_dir()):
        try:
            run_config(folder)
            runs.append(folder)
        except UserError as error:
            # of a folder that may not be looked into: False
            has_begun = any(os.path.exists(folder / name) for name in ("config.json", "checkpoints"))
            if has_begun and re.fullmatch(r"\d{8}_\d{6}(-.*)?", folder.name):
                damaged[folder.name] = str(error)
    return runs, damaged


def passed_over(cfg, script, out) -> list[str]:
    """A line on why `auto` starts a new run: the one with the same tag is damaged or ran with other flags, or
    there is none."""
    if cfg.resume_timestamp != "auto":
        return []
    runs, damaged = found_runs(out)
    tag = name_end(cfg.tag)
    if names := [name for name in damaged if name[15:] == tag]:
        return [f"a new run: {', '.join(names)} in {out} is damaged"]
    for run in reversed(runs):
        same = is_like(cfg, script, run) and run.name[15:] == tag
        if same and status_of(run) != "finished" and (odd := clashes(cfg, run_config(run))):
            return [f"a new run: {run.name} is unfinished, but ran with {'; '.join(odd)}"]
    return [f"a new run: none to resume{f' with tag {cfg.tag}' if tag else ''} in {out}"]


def clashes(cfg, config) -> list[str]:
    """What was typed and is not so in a run's config.json: constants, --preset, --smoke. For auto, which
    looks for the run that the same words began, --smoke counts where it is not typed, too."""
    typed, odd = cfg.typed, contradictions(cfg, config["constants"])
    preset, smoke = config.get("preset", typed.preset), config.get("smoke", typed.smoke)
    if typed.preset and preset != typed.preset and differs(cfg, config["constants"]):
        odd.append(f"--preset {preset or 'none'}, not {typed.preset}")
    if smoke != typed.smoke and (typed.smoke or cfg.resume_timestamp == "auto"):
        odd.append(f"--smoke {smoke}, not {typed.smoke}")
    return odd


def differs(cfg, stored) -> bool:
    """Whether a constant that a resume may not change has another value now."""
    kept = constants_of(cfg).keys() & stored.keys() - MAY_CHANGE - CALL_CONSTANTS
    return any(stored[name] != getattr(cfg, name) for name in kept)


def contradictions(cfg, stored) -> list[str]:
    """The typed flags that a resume may not change and that have another value in `stored`."""
    names = sorted((cfg.typed.flags - MAY_CHANGE - CALL_CONSTANTS) & set(stored))
    return [f"--{n} {stored[n]}, not {getattr(cfg, n)}" for n in names if stored[n] != getattr(cfg, n)]


def finished_run(cfg, script) -> Path | None:
    """The finished run that `--resume_timestamp auto` would find, or None."""
    folder = resume_folder(cfg, Path(script), out_folder(cfg, script))
    return folder if folder and status_of(folder) == "finished" else None


def changed_constants(stored, now) -> dict[str, dict]:
    """Maps each constant that a resume changes to {was, is}; a constant that the script has gained or lost
    since has only one of the two."""
    changed = {}
    for name in (*stored, *(name for name in now if name not in stored)):
        if name in CALL_CONSTANTS or (name in stored and name in now and stored[name] == now[name]):
            continue
        sides = {"was": stored, "is": now}
        changed[name] = {word: side[name] for word, side in sides.items() if name in side}
    return changed
