"""Checkpoints: what they hold (weights, optimizer, position); whole or not there, hashed, pruned, checked
before they are read."""

import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import torch

from lab.errors import UserError
from lab.run.files import remove_leftovers, sha256_file, whole_folder, write_json
from lab.run.stored import run_config, tested_names
from lab.train import shard
from lab.train.processes import on_main


def step_name(step) -> str:
    """Folder name of a checkpoint: step_00001234."""
    return f"step_{step:08d}"


def _manifest_hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, position):
    """manifest.json, written last: the position, SHA-256 of each file, and of itself."""
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", manifest(position, hashes))


def manifest(position, hashes) -> dict:
    """Content of manifest.json; `hashes`: file -> SHA-256."""
    content = position | {"files": hashes}
    return content | {"manifest": _manifest_hash(content)}


def read_manifest(folder) -> dict | None:
    """The position of a checkpoint, or None if manifest.json is absent or was damaged."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
        digest = content.pop("manifest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return content if digest == _manifest_hash(content) else None


def broken(folder) -> str | None:
    """Returns why a checkpoint cannot be used, or None where every file is there with its noted hash."""
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items() if manifest else ():
        if not (folder / name).exists():
            return f"{name} is missing"
        try:
            if sha256_file(folder / name) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None if manifest else "manifest.json is absent or damaged"


def load_weights(folder, model):
    """Loads model.safetensors of a checkpoint into `model`; every name must match. Executes no code."""
    import safetensors.torch

    model.load_state_dict(safetensors.torch.load_file(Path(folder) / "model.safetensors"), strict=True)


def load_state(folder, mapped=False) -> dict:
    """state.pt of a checkpoint, on the CPU. Executes no code: UserError where it holds any. mapped: only what
    is used of it is read."""
    try:
        return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder}/state.pt is no state ({reason}): resume another step") from None


def remove_checkpoint(path):
    """Deletes a checkpoint, its manifest first; of a link only the link."""
    if path.is_symlink():
        return path.unlink()
    if not (path / "manifest.json").is_dir():
        (path / "manifest.json").unlink(missing_ok=True)  # first: what a kill leaves is plainly incomplete
    shutil.rmtree(path)


def tensor_bytes(tree) -> int:
    """Bytes of all tensors in nested dicts."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(map(tensor_bytes, tree.values())) if isinstance(tree, dict) else 0


def weights_sha256(model) -> str:
    """SHA-256 over a model's weights in name order: equal for two runs that end with the same weights."""
    return state_sha256(model.state_dict())


def state_sha256(state) -> str:
    """SHA-256 over the names and values of a state dict, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def step_folders(checkpoints) -> list[Path]:
    """The checkpoints of steps, oldest first; a copy by another name (step_00000012_mine) is none."""
    paths = [path for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(filter(Path.is_dir, paths), key=lambda path: int(path.name[5:]))


def newest_whole_checkpoint(checkpoints, step=None) -> tuple[str | None, list[str]]:
    """Returns the newest whole checkpoint (or that of `step`), and a line for each broken one before it."""
    names, lines = [path.name for path in step_folders(checkpoints)], []
    if step is not None:
        if step_name(step) not in names:
            raise UserError(f"--resume_step {step}: there are {', '.join(names) or 'none'} in {checkpoints}")
        names = [step_name(step)]
    for name in reversed(names):
        reason = broken(checkpoints / name)
        if reason is None:
            return name, lines
        lines.append(f"checkpoint {name} is broken ({reason}): the one before it is used")
    if lines:
        raise UserError(f"no checkpoint in {checkpoints} is whole ({', '.join(names)}): start a new run")
    return None, lines


def tested_or_newest_checkpoint(folder) -> str:
    """Name of the checkpoint that a run was tested with; of an unfinished run, the newest whole one."""
    folder = Path(folder)
    tested = tested_names(folder)[:1]
    reasons = {name: broken(folder / "checkpoints" / name) for name in tested}
    for name, reason in reasons.items():
        if reason is None:
            return name
    name, _ = newest_whole_checkpoint(folder / "checkpoints")
    if name is None:
        raise UserError(f"{folder} has no checkpoint")
    for tested, reason in reasons.items():
        _warn(f"{folder}: checkpoint {tested} is broken ({reason}): {name} is used, figures may differ")
    return name


@functools.cache  # once for each checkpoint, though several places ask
def _warn(line):
    if os.environ.get("RANK", "0") == "0":
        print(f"WARNING {line}", file=sys.stderr)


def tested_checkpoints(folder) -> list[str]:
    """Names of the checkpoints that a finished run was tested with, one per fold.
    UserError if one is damaged."""
    folder = Path(folder)
    run_config(folder)  # is it a run at all?
    names = tested_names(folder)
    if not names:
        raise UserError(f"{folder} is not finished: resume it, or name another --run")
    for name in names:
        if reason := broken(folder / "checkpoints" / name):
            raise UserError(f"{folder}/checkpoints/{name} is broken ({reason}): copy it anew")
    return names


class Checkpoints:
    """checkpoints/ of a run: the newest of them, the weights kept beside them, and how both come back.

    Made of what plan_run found; `open` begins to change the folder, and `curves` are those whose length a
    checkpoint notes (rank 0).
    """

    def __init__(self, run_folder, world, keep, say, newest=None, kept=None):
        self.folder, self.world, self.keep, self.say = run_folder / "checkpoints", world, keep, say
        self.newest, self.curves = newest, None
        self.kept = kept or {}  # "best <fold>" -> name, step, loss of weights to keep

    def told(self) -> str:
        return f"the newest checkpoint is {self.newest}" if self.newest else "there is no checkpoint"

    def open(self):
        """Rank 0: removes what lies behind the newest: it is broken, or --resume_step went back."""
        remove_leftovers(self.folder)
        for path in step_folders(self.folder):
            if self.newest is None or int(path.name[5:]) > int(self.newest[5:]):
                remove_checkpoint(path)

    def save(self, step, model, optimizer, scaler, position, must=False):
        """All ranks: step_... with weights, optimizer and position, unless it is there. A warning where the
        disk is too full, or UserError if it `must` succeed."""
        if self.newest == (name := step_name(step)):
            return
        shard.fill(optimizer)
        tensors = {"optimizer": shard.whole_state(optimizer), "scaler": scaler.state_dict()}
        position = position | {"step": step, "kept": self.kept}
        if on_main(self.world, self._write, name, model, tensors, position, must):
            self.newest = name

    def load(self, model, optimizer, scaler):
        """Restores what `save` wrote in the newest checkpoint."""
        load_weights(self.folder / self.newest, model)
        shard.take(optimizer)
        tensors = load_state(self.folder / self.newest, mapped=shard.shares_of(optimizer) is not None)
        shard.load_whole_state(optimizer, tensors["optimizer"])
        if scaler.is_enabled():
            scaler.load_state_dict(tensors["scaler"])

    def keep_weights(self, step, model, kind, fold, loss=None) -> str:
        """All ranks: <kind>_step_... with weights alone, in place of the fold's earlier ones of this kind.
        Returns the name."""
        entry = {"name": f"{kind}_{step_name(step)}", "step": step, "loss": loss}
        kept = self.kept | {f"{kind} {fold}": entry}
        if on_main(self.world, self._write, entry["name"], model, {}, {"step": step, "kept": kept}):
            self.kept = kept
        return entry["name"]

    def is_best(self, fold, loss) -> bool:
        best = self.kept.get(f"best {fold}")
        return not best or loss < best["loss"]

    def load_best(self, model, fold) -> str:
        """Loads the fold's best weights; leaves the last ones if none were saved. Returns the checkpoint's
        name."""
        name = self.kept.get(f"best {fold}", {}).get("name")
        if not name or (reason := on_main(self.world, broken, self.folder / name)):
            which = f"are {name} ({reason})" if name else "were never saved"
            self.say(f"WARNING the best weights {which}: the last ones are used")
            return self.newest
        load_weights(self.folder / name, model)
        return name

    def _write(self, name, model, tensors, position, must=False) -> bool:
        """Rank 0: whether it was written. The manifest says how much of metrics.jsonl counts."""
        position = position | {"metrics_bytes": self.curves.flushed_bytes()}
        line = save_checkpoint(self.folder / name, model, tensors, position)
        if line and must:
            raise UserError(f"{line}: free some, then --resume_timestamp {self.folder.parent.name[:15]}")
        if line:
            self.say(f"WARNING {line}: free some; {self.told()}")
            return False
        prune(self.folder, self.keep, position)
        return True


def save_checkpoint(folder, model, tensors, position) -> str | None:
    """Writes a checkpoint (weights, `tensors`, position) atomically. Returns a line where the disk is too
    full."""
    import safetensors.torch

    folder.parent.mkdir(exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    needed = 1.05 * (tensor_bytes(weights) + tensor_bytes(tensors)) + 1e6
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        room = f"{folder.parent} has {free / 1e6:.0f} MB free"
        return f"not saved: {folder.name} needs {needed / 1e6:.0f} MB, {room}"
    if folder.exists():  # of the same step: it was passed over as broken, or --resume_step went back
        remove_checkpoint(folder)
    with whole_folder(folder) as aside:
        safetensors.torch.save_file(weights, aside / "model.safetensors")
        if tensors:
            torch.save(tensors, aside / "state.pt")
        write_manifest(aside, position)
    return None


def prune(checkpoints, keep, position):
    """Removes all but the last `keep` checkpoints and the best weights that these or `position` refer to."""
    steps = step_folders(checkpoints)
    for path in steps[:-keep]:
        remove_checkpoint(path)
    manifests = [position, *filter(None, map(read_manifest, steps[-keep:]))]
    named = {entry["name"] for manifest in manifests for entry in manifest["kept"].values()}
    for path in checkpoints.glob("*_step_*"):
        if path.name not in named and re.fullmatch(r"[a-z]+_step_\d{8,}", path.name) and path.is_dir():
            remove_checkpoint(path)
