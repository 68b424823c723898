"""Checkpoints: what they hold (weights, optimizer, position); whole or not there, hashed, pruned, checked
before they are read."""

import contextlib
import copy
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lab.errors import UserError
from lab.run.files import remove_leftovers, seal_of, sha256_file, whole_folder, write_json
from lab.run.stored import run_config, tested_names
from lab.train import shard
from lab.train.processes import on_main


def step_name(step) -> str:
    """Folder name of a checkpoint: step_00001234."""
    return f"step_{step:08d}"


def write_manifest(folder, position):
    """manifest.json, written last: the position, SHA-256 of each file, and of itself."""
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", manifest(position, hashes))


def manifest(position, hashes) -> dict:
    """Content of manifest.json; `hashes`: file -> SHA-256."""
    content = position | {"files": hashes}
    return content | {"manifest": seal_of(content)}


def read_manifest(folder) -> dict | None:
    """The position of a checkpoint, or None if manifest.json is absent or was damaged."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
        digest = content.pop("manifest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return content if digest == seal_of(content) else None


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
        if (name := step_name(step)) not in names:
            raise UserError(f"--resume_step {step}: there are {', '.join(names) or 'none'} in {checkpoints}")
        if reason := broken(checkpoints / name):
            others = ", ".join(other for other in names if other != name) or "no others"
            raise UserError(f"--resume_step {step}: {name} is broken ({reason}); there are {others}")
        return name, []
    for name in reversed(names):
        reason = broken(checkpoints / name)
        if reason is None:
            return name, lines
        lines.append(f"checkpoint {name} is broken ({reason}): the one before it is used")
    if lines:
        raise UserError(f"no checkpoint in {checkpoints} is whole ({', '.join(names)}): start a new run")
    return None, lines


def drop_broken_best(checkpoints, position) -> list[str]:
    """Drops the best weights of a position's fold where they are broken: else only later ones of a lower loss
    would be kept. Returns a line."""
    best = f"best {position.get('fold')}"
    name = position.get("kept", {}).get(best, {}).get("name")
    if not name or not (reason := broken(checkpoints / name)):
        return []
    del position["kept"][best]
    return [f"WARNING the best weights are {name} ({reason}): the next evaluation's take their place"]


def tested_or_newest_checkpoint(folder) -> str:
    """Name of the checkpoint that a run was tested with; of an unfinished run, the newest whole one."""
    folder = Path(folder)
    tested = next(iter(tested_names(folder)), None)
    reason = broken(folder / "checkpoints" / tested) if tested else None
    if tested and reason is None:
        return tested
    name, _ = newest_whole_checkpoint(folder / "checkpoints")
    if name is None:
        raise UserError(f"{folder} has no checkpoint")
    if tested:
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
    checkpoint notes (rank 0). Beside a card rank 0 writes in a thread, from a copy in the host's memory:
    `pending` is what it writes, and the newest only once it is whole. All ranks `settle` before they read.
    """

    def __init__(self, run_folder, world, keep, say, newest=None, kept=None):
        self.folder, self.world, self.keep, self.say = run_folder / "checkpoints", world, keep, say
        self.newest, self.curves = newest, None
        self.pending, self._writing = None, None  # a name on all ranks; rank 0's future
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
        disk is too full, or UserError if it `must` succeed: then it is whole on return."""
        if self.pending != step_name(step) or must:
            self.settle()
        if (name := step_name(step)) in (self.newest, self.pending):
            return
        shard.fill(optimizer)
        tensors = {"optimizer": shard.whole_state(optimizer), "scaler": scaler.state_dict()}
        position = position | {"step": step, "kept": self.kept}
        if on_main(self.world, self._write, name, model, tensors, position, must):
            self.pending = name
            if must or not apart(self.world):
                self.settle()

    def settle(self):
        """All ranks: waits until `pending` is whole. Raises what went wrong."""
        if self.pending:
            self._settle(on_main, self.world, self._join)

    def settle_alone(self) -> Exception | None:
        """Rank 0 on its way out, without the others. Returns what went wrong."""
        try:
            return self._settle(self._join) if self.pending else None
        except Exception as error:
            return error

    def finish_writing(self, seconds):
        """Rank 0, where a sibling is lost and this process will end: waits for a checkpoint on its way."""
        if writing := self._writing:
            with contextlib.suppress(Exception):  # what goes wrong is said nowhere: the loss is
                writing.result(seconds)

    def _settle(self, join, *args):
        name, self.pending = self.pending, None  # of one that fails nothing is expected any more
        if apart(self.world):
            join(*args)
        if name.startswith("step_"):
            self.newest = name

    def _join(self):
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def load(self, model, optimizer, scaler):
        """Restores what `save` wrote in the newest checkpoint."""
        load_weights(self.folder / self.newest, model)
        shard.take(optimizer)
        tensors = load_state(self.folder / self.newest, mapped=shard.shares_of(optimizer) is not None)
        shard.load_whole_state(optimizer, tensors["optimizer"])
        if scaler.is_enabled():
            scaler.load_state_dict(tensors["scaler"])

    def keep_weights(self, step, model, kind, fold, loss=None, must=False) -> str | None:
        """All ranks: <kind>_step_... with weights alone, in place of the fold's earlier ones of this kind.
        Returns the name; where the disk is too full none, and a warning, or UserError if it `must` succeed.
        """
        entry = {"name": f"{kind}_{step_name(step)}", "step": step, "loss": loss}
        kept = self.kept | {f"{kind} {fold}": entry}
        self.settle()
        if not on_main(self.world, self._write, entry["name"], model, {}, {"step": step, "kept": kept}, must):
            return None
        self.kept, self.pending = kept, entry["name"]
        return entry["name"]

    def is_best(self, fold, loss) -> bool:
        best = self.kept.get(f"best {fold}")
        return not best or loss < best["loss"]

    def load_best(self, model, fold) -> str:
        """Loads the fold's best weights; leaves the last ones if none were saved. Returns the checkpoint's
        name."""
        self.settle()
        name = self.kept.get(f"best {fold}", {}).get("name")
        if not name or (reason := on_main(self.world, broken, self.folder / name)):
            which = f"are {name} ({reason})" if name else "were never saved"
            self.say(f"WARNING the best weights {which}: the last ones are used")
            return self.newest
        load_weights(self.folder / name, model)
        return name

    def _write(self, name, model, tensors, position, must=False) -> bool:
        """Rank 0: whether it is written, or begun. The manifest says how much of metrics.jsonl counts."""
        position = position | {"metrics_bytes": self.curves.flushed_bytes()}
        weights, folder = model.state_dict(), self.folder / name
        size = tensor_bytes(weights) + tensor_bytes(tensors)
        line = no_room(folder, size)
        if line and must:
            raise UserError(f"{line}: free some, then --resume_timestamp {self.folder.parent.name[:15]}")
        if line:
            self.say(f"WARNING {line}: free some; {self.told()}")
            return False
        if must or not apart(self.world) or not memory_for(size):
            save_checkpoint(folder, weights, tensors, position, self.keep)
        else:
            held = on_host(weights), on_host(tensors), copy.deepcopy(position)  # training changes all three
            self._writing = WRITER.submit(save_checkpoint, folder, *held, self.keep)
        return True


WRITER = ThreadPoolExecutor(1, "checkpoint")  # its thread begins with the first piece of work


def apart(world) -> bool:
    """Whether checkpoints are written beside the training: not on a CPU, which has no core to spare."""
    return world.device.type != "cpu"


def memory_for(size) -> bool:
    """Whether the host's memory takes a copy of `size` bytes, with as much again left over."""
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return free is None or 2 * size < 1024 * int(free[1])


def on_host(tree):
    """A copy of nested dicts of tensors in the host's memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    return {key: on_host(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def no_room(folder, size) -> str | None:
    """A line where the disk is too full for a checkpoint of `size` bytes of tensors."""
    folder.parent.mkdir(exist_ok=True)
    needed = 1.05 * size + 1e6
    if (free := shutil.disk_usage(folder.parent).free) >= needed:
        return None
    room = f"{folder.parent} has {free / 1e6:.0f} MB free"
    return f"not saved: {folder.name} needs {needed / 1e6:.0f} MB, {room}"


def save_checkpoint(folder, weights, tensors, position, keep):
    """Writes a checkpoint (weights, `tensors`, position) atomically; then removes old ones, see prune."""
    import safetensors.torch

    if folder.exists():  # of the same step: it was passed over as broken, or --resume_step went back
        remove_checkpoint(folder)
    with whole_folder(folder) as aside:
        weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        safetensors.torch.save_file(weights, aside / "model.safetensors")
        if tensors:
            torch.save(tensors, aside / "state.pt")
        write_manifest(aside, position)
    prune(folder.parent, keep, position)


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
