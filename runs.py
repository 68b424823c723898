"""A run's life on the disk: its folder, log, metrics and curves, checkpoints, signals, resume, provenance,
result.

<out>/<timestamp>[-<tag>]/
    config.json     every constant, command line, versions, device, git commit and diff, fingerprints, resumes
    source/         the script and what it imports, as they ran
    log.txt         what the terminal showed
    metrics.jsonl   the numbers; tb/ shows the same ones in TensorBoard
    checkpoints/    step_00001234/ (weights, optimizer, position), best_step_00001200/ (weights)
    result.json     written last: status, final metrics with intervals, weights_sha256
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import core

MAY_CHANGE = {  # what a resumed run may be told anew: length, cadence, bookkeeping, how it is computed
    *("epochs", "max_steps", "max_minutes", "eval_batch", "eval_every", "final_eval", "save_every", "keep"),
    *("log_every", "price_per_hour", "note", "out", "tag", "resume_timestamp", "resume_step", "backend"),
    *("micro_batch", "compile"),
}


class Run:
    """One run folder (see README): constants, log, metrics, checkpoints, signals, result.

    A context manager: core.Stop ends the body quietly as `stopped`, any other error is recorded as `failed`
    and goes on; a core.UserError before the first training step removes a new folder, which holds nothing
    yet.
    """

    def __init__(self, cfg, world, script):
        self.world, self.script, self.started = world, Path(script), time.time()
        if cfg.batch < world.size:
            better = f"use --nproc_per_node={cfg.batch} or --batch {world.size} or more"
            raise core.UserError(f"batch {cfg.batch} is smaller than {world.size} ranks: {better}")
        self._signal, self._training, self._install = None, False, {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # what nohup ignores stays ignored
                self._install[number] = signal.signal(number, self._on_signal)
        plan = core.on_main(world, lambda: _plan(cfg, self.script))
        self.folder, self.resumed, self.checkpoint = Path(plan["folder"]), plan["resumed"], plan["checkpoint"]
        if plan["finished"]:
            print(f"{self.folder} is finished: nothing to do") if world.is_main else None
            sys.exit(0)
        self.cfg = dataclasses.replace(cfg, **plan["constants"])
        object.__setattr__(self.cfg, "typed", core.typed(cfg))
        self.position = plan[
            "position"
        ]  # of the checkpoint: step, fold, first_step, bests, sums, train_seconds
        self.train_seconds = self.position.get("train_seconds", 0.0)
        self.bests = self.position.get("bests", {})  # fold -> name, step, loss of its lowest validation loss
        self.fold, self.first_step, self._last_step = 0, 0, 0  # folds follow each other on one axis of steps
        self.result, self.clock_share, self.stopping, self.meter = {}, 0.0, None, Meter(world)
        if world.is_main:
            self._open(plan["lines"])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is RuntimeError and self._signal:  # another rank got it, too, and left first
            kind, error = core.Stop, core.Stop(self._signal)
        status = "finished" if kind is None else "stopped" if kind is core.Stop else "failed"
        unborn = kind is core.UserError and not self.resumed and not self._training
        if self.world.is_main:
            if not unborn:
                self._write_result(status, error)
            for stream in (self._log, self._metrics, self._tensorboard):
                stream.close()
            if unborn:
                shutil.rmtree(self.folder)
        for number, handler in self._install.items():
            signal.signal(number, handler)
        return status == "stopped"

    # -- what the terminal, the log and the curves show ----------------------------------------------------

    def say(self, text):
        """Lines to the terminal and log.txt, rank 0 only."""
        if not self.world.is_main:
            return
        self._log.write(text + "\n")
        self._log.flush()
        try:
            tqdm.write(text, file=sys.stdout)  # past a bar, if there is one
            sys.stdout.flush()
        except OSError:  # the terminal is gone (SSH lost, tmux killed): the run goes on, the log has the line
            sys.stdout = open(os.devnull, "w")

    def metrics(self, step, values):
        """Numbers of a step to metrics.jsonl and TensorBoard, rank 0 only."""
        if self.world.is_main:
            record = {"step": self.first_step + step, "time": time.time(), **values}
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            self._to_tensorboard(record)

    def log_training(self, where, step, total_steps, values):
        """The line every script prints each log_every steps; the same numbers go to metrics."""
        loss, rate, step_seconds = self.meter.read()
        values = {"train/loss": loss, **values, "examples_per_second": rate}
        eta = clock((total_steps - step) * step_seconds)
        self.say(
            f"{where}  step {step:{len(str(total_steps))}}/{total_steps}  loss {loss:.4f}  "
            f"lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  {rate:.0f}/s  eta {eta}"
        )
        self.metrics(step, values)

    def _to_tensorboard(self, record):
        for name, value in record.items():
            if name not in ("step", "time"):
                self._tensorboard.add_scalar(name, value, record["step"], walltime=record["time"])
        self._tensorboard.flush()

    # -- what all ranks decide together --------------------------------------------------------------------

    def agree(self, targets=0) -> int:
        """The step's one small reduction: returns the global count of targets and settles stop and clock.

        Afterwards `stopping` says why all ranks must save and stop now (or None), and `clock_share` is the
        spent share of max_minutes, rank 0's, the same on all ranks. From its first call on, signals wait for
        it.
        """
        self._training, self._step_began = True, time.perf_counter()
        minutes = self.cfg.max_minutes if self.world.is_main else None
        share = 0.0 if minutes is None else self.train_seconds / (60 * minutes + 1e-9)
        sums = torch.tensor([targets, bool(self._signal), share], dtype=torch.float64)
        targets, signalled, self.clock_share = core.all_reduce_sum(self.world, sums).tolist()
        self.stopping = (self._signal or "a signal to another rank") if signalled else None
        return int(targets)

    def poll(self):
        """For evaluation and other long work behind a checkpoint: raises core.Stop on all ranks at once."""
        self.agree()
        if self.stopping:
            raise core.Stop(self.stopping)

    def _on_signal(self, number, frame):
        if self._signal:
            os.write(2, b"second signal: out at once, the newest checkpoint stands\n")
            os._exit(1)
        self._signal = signal.Signals(number).name
        if not self._training:  # nothing to save yet: leave from wherever this is
            raise core.Stop(self._signal)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def load(self, model, optimizer, precision, fold=0) -> int:
        """Begins a fold: returns 0, or the step this run resumes at, all state restored. Before DDP, all
        ranks.
        """
        self.fold = fold
        if not self.position or self.position["fold"] != fold:
            self.first_step, self.meter = self._last_step, Meter(self.world)
            return 0
        self.first_step, self._last_step = self.position["first_step"], self.position["step"]
        self.meter = Meter(self.world, self.position["sums"])
        folder = self.folder / "checkpoints" / self.checkpoint
        load_weights(folder, model)
        tensors = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(tensors["optimizer"])
        if precision.scaler.is_enabled():
            precision.scaler.load_state_dict(tensors["scaler"])
        return self._last_step - self.first_step

    def load_best(self, model) -> str:
        """The fold's best weights so far, or if none could be saved those in `model`; returns their
        checkpoint.
        """
        best = self.bests.get(str(self.fold))
        if best:
            load_weights(self.folder / "checkpoints" / best["name"], model)
        return best["name"] if best else self.checkpoint

    def save(self, step, model, optimizer, precision, must=False):
        """checkpoints/step_…: weights, optimizer, position; whole or not at all; once per step. All ranks
        call it.

        Too little disk is a warning that is repeated at every save, an error where it `must` succeed.
        """
        self._last_step = self.first_step + step
        name, sums = _step_name(self._last_step), self.meter.sums()
        if self.checkpoint == name:
            return
        position = {"step": self._last_step, "fold": self.fold, "first_step": self.first_step, "sums": sums}
        position |= {"train_seconds": self.train_seconds, "bests": self.bests}
        tensors = {"optimizer": optimizer.state_dict(), "scaler": precision.scaler.state_dict()}
        if core.on_main(self.world, lambda: self._save(name, model, tensors, position, must)):
            self.checkpoint = name

    def save_best(self, step, loss, model) -> bool:
        """Weights only, beside the checkpoints, when `loss` is the fold's lowest so far. Returns whether it
        is.
        """
        step, key = self.first_step + step, str(self.fold)
        if key in self.bests and loss >= self.bests[key]["loss"]:
            return False
        bests = self.bests | {key: {"name": f"best_{_step_name(step)}", "step": step, "loss": loss}}
        if core.on_main(
            self.world, lambda: self._save(bests[key]["name"], model, {}, {"step": step, "bests": bests})
        ):
            self.bests = bests
        return True

    def _save(self, name, model, tensors, position, must=False) -> bool:
        import safetensors.torch

        folder = self.folder / "checkpoints" / name
        folder.parent.mkdir(exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        needed = 1.05 * (_tensor_bytes(weights) + _tensor_bytes(tensors)) + 1e6
        if (free := shutil.disk_usage(folder.parent).free) < needed:
            line = (
                f"not saved: {name} needs {needed / 1e6:.0f} MB, {folder.parent} has {free / 1e6:.0f} MB free"
            )
            if must:
                raise core.UserError(f"{line}: free some, then --resume_timestamp {self.folder.name[:15]}")
            self.say(f"WARNING {line}; the newest checkpoint is {self.checkpoint}")
            return False
        if folder.exists():  # of the same step: it was passed over as broken, or --resume_step went back
            _remove_checkpoint(folder)
        with core.whole_folder(folder) as aside:
            safetensors.torch.save_file(weights, aside / "model.safetensors")
            if tensors:
                torch.save(tensors, aside / "state.pt")
            write_manifest(aside, position | {"metrics_bytes": self._metrics.tell()})
        self._prune(name, position)
        return True

    def _prune(self, newest, position):
        """Keeps the last `keep` checkpoints up to this one, and every best that one of them or this one
        names.
        """
        checkpoints = self.folder / "checkpoints"
        steps = sorted(checkpoints.glob("step_*"))
        if newest.startswith("step_"):  # later ones belong to a future that --resume_step went back from
            kept = [path for path in steps if path.name <= newest][-self.cfg.keep :]
            for path in set(steps) - set(kept):
                _remove_checkpoint(path)
            steps = kept
        manifests = [position, *filter(None, map(read_manifest, steps))]
        named = {best["name"] for manifest in manifests for best in manifest["bests"].values()}
        for path in checkpoints.glob("best_*"):
            if path.name not in named:
                _remove_checkpoint(path)

    # -- time, memory, money -------------------------------------------------------------------------------

    def step_done(self, loss_sum, targets, examples):
        """Counts a step: its loss for the next log line, its seconds for max_minutes, which knows nothing
        else.
        """
        seconds = time.perf_counter() - self._step_began
        self.train_seconds += seconds
        self.meter.add(loss_sum, targets, examples, seconds)

    def schedule_length(self, step, total_steps) -> int:
        """Steps the schedule should span: `total_steps`, or fewer where the clock will end the run
        earlier.
        """
        if not self.clock_share:
            return total_steps
        return min(total_steps, max(step + 1, round(step / self.clock_share)))

    def forecast(self, model, optimizer, steps, seconds, typical):
        """One line from the worst-case step's seconds; `typical` is an average step's share of its length.

        Raises core.UserError where the disk cannot hold the checkpoints of a new run.
        """
        total, trainable = core.count_parameters(model)
        checkpoint_mb = 4 * (total + 2 * trainable) / 1e6  # fp32 weights and AdamW's two moments
        disk_mb, free_mb = (
            (self.cfg.keep + 1) * checkpoint_mb + 8 * total / 1e6,
            shutil.disk_usage(self.folder).free / 1e6,
        )
        if not self.resumed and free_mb < disk_mb:
            raise core.UserError(
                f"checkpoints need {disk_mb:.0f} MB, {self.folder} has {free_mb:.0f} MB free: free some"
            )
        memory_gb = (peak_memory_mb(self.world) + (0 if optimizer.state else 8 * trainable / 1e6)) / 1e3
        hours, price = steps * seconds * typical / 3600, self.cfg.price_per_hour
        millions = f"{total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable"
        self.say(f"model {self.cfg.model}  {millions}")
        self.say(
            f"forecast  {steps} steps  training {clock(3600 * hours)}  peak memory {memory_gb:.2f} GB  "
            f"disk {disk_mb:.0f} MB" + (f"  ${price * hours:.2f}" if price else "")
        )
        if (
            "TORCHELASTIC_RUN_ID" in os.environ and checkpoint_mb > 5000
        ):  # at some 300 MB/s written and hashed
            self.say(
                "a save takes over 15 s: give torchrun --shutdown-timeout 300, or it kills one after 30 s"
            )

    # -- opening and closing -------------------------------------------------------------------------------

    def _open(self, lines):
        from torch.utils.tensorboard import SummaryWriter

        folder, metrics = self.folder, self.folder / "metrics.jsonl"
        self._log = open(folder / "log.txt", "a")
        metrics.touch()
        os.truncate(metrics, self.position.get("metrics_bytes", 0))
        self._metrics = open(metrics, "a")
        # metrics.jsonl is the truth: TensorBoard's file is written anew from it, so no resume forks a curve;
        # purge_step=0 tells a TensorBoard that is watching to forget the old file
        shutil.rmtree(folder / "tb", ignore_errors=True)
        self._tensorboard = SummaryWriter(folder / "tb", purge_step=0)
        for line in metrics.read_text().splitlines():
            self._to_tensorboard(json.loads(line))
        (folder / "result.json").unlink(missing_ok=True)
        _write_provenance(self)
        w, batch = self.world, self.cfg.batch
        ranks = f"{w.size} rank{'s' * (w.size > 1)} {w.device.type if w.size == 1 else w.backend}"
        share = f"batch {batch} = {w.size} x {batch / w.size:g}"
        self.say(f"{self.script.stem}  {ranks} {self.cfg.dtype}  {share}  {folder}")
        for line in filter(None, [*lines, core.Precision(self.cfg.dtype, w).warning()]):
            self.say(line)

    def pin(self, name, value):
        """Notes a fact (a fingerprint) in config.json; a resume that finds another value is refused."""
        config = read_config(self.folder)
        if config["facts"].setdefault(name, value) != value:
            raise core.UserError(f"{name} is not what {self.folder} began with: start a new run")
        if self.world.is_main:
            core.write_json(self.folder / "config.json", config)

    def _write_result(self, status, error):
        why = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
        self.result = {
            **{"status": status, "why": why, "script": self.script.stem, "checkpoint": self.checkpoint},
            **{
                "step": self._last_step,
                "seconds": time.time() - self.started,
                "train_seconds": self.train_seconds,
            },
            **{"peak_memory_mb": peak_memory_mb(self.world), **self.result},
        }
        core.write_json(self.folder / "result.json", self.result)
        if status != "finished":
            saved = (
                f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint"
            )
            self.say(f"{status}  {why}; {saved}")
            self.say(f"next: the same command with --resume_timestamp {self.folder.name[:15]}")


class Meter:
    """Loss, targets and time since the last log line; its sums travel in checkpoints, so that no curve
    forks.
    """

    def __init__(self, world, sums=(0.0, 0)):
        self.world, self.steps, self.examples, self.seconds, self.targets = world, 0, 0, 0.0, sums[1]
        loss = float(sums[0]) if world.is_main else 0.0  # the restored sum is global: one rank carries it
        self.loss = torch.tensor(loss, dtype=torch.float64, device=world.device)

    def add(self, loss_sum, targets, examples, seconds):
        """This rank's summed loss (a tensor, so nothing waits for the device); global targets and
        examples.
        """
        self.loss += loss_sum.detach()
        self.targets, self.examples = self.targets + targets, self.examples + examples
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds

    def sums(self) -> list:
        """[global loss sum, targets]; every rank calls it."""
        return [core.all_reduce_sum(self.world, self.loss.cpu().clone()).item(), self.targets]

    def read(self) -> tuple[float, float, float]:
        """(mean loss per target, examples per second, seconds per step) since the last reading; starts
        anew.
        """
        loss, targets = self.sums()
        rates = self.examples / max(self.seconds, 1e-9), self.seconds / max(self.steps, 1)
        self.__init__(self.world)
        return loss / max(targets, 1), *rates


# What a checkpoint is made of


def _step_name(step) -> str:
    return f"step_{step:08d}"


def _manifest_hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, position):
    """manifest.json, written last: the position, SHA-256 of each file, and of itself."""
    content = position | {"files": {path.name: core.sha256_file(path) for path in sorted(folder.iterdir())}}
    core.write_json(folder / "manifest.json", content | {"manifest": _manifest_hash(content)})


def read_manifest(folder) -> dict | None:
    """The position of a checkpoint, or None if manifest.json is absent or was damaged."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
        digest = content.pop("manifest")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return content if digest == _manifest_hash(content) else None


def broken(folder) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is there and hashes as written."""
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items() if manifest else ():
        if not (folder / name).exists():
            return f"{name} is missing"
        if core.sha256_file(folder / name) != digest:
            return f"{name} is not what was written"
    return None if manifest else "manifest.json is absent or damaged"


def load_weights(folder, model):
    """model.safetensors of a checkpoint into `model`, every name matched. Executes nothing."""
    import safetensors.torch

    model.load_state_dict(safetensors.torch.load_file(Path(folder) / "model.safetensors"), strict=True)


def _remove_checkpoint(path):
    (path / "manifest.json").unlink(missing_ok=True)  # first: what a kill leaves is plainly incomplete
    shutil.rmtree(path)


def _tensor_bytes(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(map(_tensor_bytes, tree.values())) if isinstance(tree, dict) else 0


def weights_sha256(model) -> str:
    """SHA-256 over the weights in name order: two runs ended in the same place or they did not."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Which folder, which checkpoint, which constants


def _plan(cfg, script) -> dict:
    """Rank 0's decision, as JSON: a new folder, or one to resume with its checkpoint, position and
    constants.
    """
    out = Path(cfg.out or f"runs/{'smoke/' if core.typed(cfg).smoke else ''}{script.stem}")
    folder, constants, lines = _resume_folder(cfg, script, out), dataclasses.asdict(cfg), _override_lines(cfg)
    plan = {"folder": str(folder), "resumed": True, "finished": False, "checkpoint": None, "position": {}}
    if not folder:
        return plan | {
            "folder": str(_new_folder(out, cfg.tag)),
            "resumed": False,
            "constants": constants,
            "lines": lines,
        }
    if cfg.resume_timestamp == "auto" and _status(folder) == "finished":
        return plan | {"finished": True}
    stored = read_config(folder)["constants"]
    if clash := _contradictions(cfg, stored):
        raise core.UserError(f"{folder} ran with {'; '.join(clash)}: drop these flags, or start a new run")
    kept = {name: stored[name] for name in constants if name in stored and name not in MAY_CHANGE}
    for name in kept:
        if kept[name] != constants[name]:
            lines.append(f"resumed: {name} stays {kept[name]} (the script now says {constants[name]})")
    name, notes = _choose_checkpoint(folder / "checkpoints", cfg.resume_step)
    position = read_manifest(folder / "checkpoints" / name) if name else {}
    notes.append(f"resumes {folder.name} from {name or 'step 0: there is no checkpoint yet'}")
    plan |= {"constants": constants | kept, "checkpoint": name, "position": position}
    return plan | {"lines": notes + lines}


def _override_lines(cfg) -> list[str]:
    """What preset and smoke changed, in lines of at most 100 columns."""
    t = core.typed(cfg)
    lines = [" and ".join(filter(None, [t.preset and f"preset {t.preset}", t.smoke and "smoke"])) + " set:"]
    for name, value in t.overrides.items():
        word = f" {name} {value},"
        if len(lines[-1] + word) > 100:
            lines.append(" ")
        lines[-1] += word
    return [*lines[:-1], lines[-1].rstrip(",")] if t.overrides else []


def _new_folder(out, tag) -> Path:
    while True:
        folder = out / f"{datetime.datetime.now():%Y%m%d_%H%M%S}{f'-{tag}' if tag else ''}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not out.is_dir():
                raise core.UserError(f"out {out} is a file: use a folder") from None
            time.sleep(0.2)  # another run started in this second
        except OSError as error:
            raise core.UserError(
                f"out {out} cannot be written ({error.strerror}): use another --out"
            ) from None


def _resume_folder(cfg, script, out) -> Path | None:
    """The run to resume, None for a new one. core.UserError if a resume was asked for and there is none."""
    wanted, tag = cfg.resume_timestamp, f"-{cfg.tag}" if cfg.tag else ""
    runs = sorted(path.parent for path in out.glob("*/config.json"))
    if wanted is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:  # torchrun --max-restarts
        return next((run for run in reversed(runs) if read_config(run)["launcher"] == _launcher()), None)
    if wanted is None:
        if cfg.resume_step is not None:
            raise core.UserError(f"--resume_step {cfg.resume_step} needs --resume_timestamp")
        return None
    if wanted in ("auto", "latest"):
        runs = [run for run in runs if run.name[15:] == tag and read_config(run)["script"] == script.stem]
        if wanted == "auto":  # a loop over seeds types the same words: another seed is another run
            runs = [run for run in runs if not _contradictions(cfg, read_config(run)["constants"])]
            return runs[-1] if runs else None
        if unfinished := [run for run in runs if _status(run) != "finished"]:
            return unfinished[-1]
        raise core.UserError(
            f"--resume_timestamp latest: no unfinished run{tag and f' with tag {cfg.tag}'} in {out}"
        )
    found = [run for run in runs if run.name == wanted + tag] or [
        run for run in runs if run.name[:15] == wanted[:15]
    ]
    if len(found) != 1:
        near = ", ".join(run.name for run in (found or runs)[-3:]) or "none"
        raise core.UserError(f"--resume_timestamp {wanted}: {len(found)} such runs in {out}; there: {near}")
    return found[0]


def _contradictions(cfg, stored) -> list[str]:
    names = sorted((core.typed(cfg).flags - MAY_CHANGE) & set(stored))
    return [f"--{n} {stored[n]}, not {getattr(cfg, n)}" for n in names if stored[n] != getattr(cfg, n)]


def _choose_checkpoint(checkpoints, step=None) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint (or that of `step`), and a line for each broken one passed over."""
    names, lines = sorted(path.name for path in checkpoints.glob("step_*")), []
    if step is not None:
        if _step_name(step) not in names:
            raise core.UserError(
                f"--resume_step {step}: there are {', '.join(names) or 'none'} in {checkpoints}"
            )
        names = [_step_name(step)]
    for name in reversed(names):
        reason = broken(checkpoints / name)
        if reason is None:
            return name, lines
        lines.append(f"checkpoint {name} is broken ({reason}): the one before it is used")
    if lines:
        raise core.UserError(f"no checkpoint in {checkpoints} is whole ({lines[0]}): start a new run")
    return None, lines


def read_config(folder) -> dict:
    """config.json of a run folder: constants, provenance, facts, resumes."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        raise core.UserError(f"{folder} is no run folder: its config.json cannot be read") from None


def _status(folder) -> str:
    path = folder / "result.json"
    return json.loads(path.read_text())["status"] if path.exists() else "running or killed"


# Provenance


def _write_provenance(run):
    """config.json and source/ of a new run; a resume is noted in config.json."""
    now = {"started": datetime.datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
    now |= {
        "world_size": run.world.size,
        "threads": torch.get_num_threads(),
        "device": _device_name(run.world),
    }
    if run.resumed:
        config = read_config(run.folder)
        config["resumes"].append({"step": run.position.get("step", 0), **now, "git": git_state()["commit"]})
        config |= {"launcher": _launcher(), "constants": dataclasses.asdict(run.cfg)}
    else:
        (run.folder / "source").mkdir()
        for path in (run.script, core.PROJECT / "core.py", core.PROJECT / "gpt_scratch.py"):
            shutil.copy(path, run.folder / "source") if path.exists() else None
        t = core.typed(run.cfg)
        config = {"script": run.script.stem, "constants": dataclasses.asdict(run.cfg), **now}
        config |= {"preset": t.preset, "smoke": t.smoke, "versions": _versions(), "git": git_state()}
        config |= {"host": socket.gethostname(), "launcher": _launcher(), "facts": {}, "resumes": []}
    core.write_json(run.folder / "config.json", config)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "datasets", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _device_name(world) -> str:
    return (
        torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else f"{world.device.type} {platform.machine()}"
    )


def git_state() -> dict[str, str]:
    """Commit and uncommitted changes of the project, since constants are edited in place; empty without
    git.
    """

    def git(*args):
        if not shutil.which("git"):
            return ""
        return subprocess.run(
            ["git", "-C", str(core.PROJECT), *args], capture_output=True, text=True
        ).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": git("status", "--porcelain"),
        "diff": git("diff", "HEAD"),
    }


def _launcher() -> str | None:
    """The torchrun that started this process: it lives on while it restarts its workers."""
    return f"{socket.gethostname()}/{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def peak_memory_mb(world) -> float:
    """Peak so far: allocated on the GPU, or resident on the CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def clock(seconds) -> str:
    """3723 -> `1:02:03`"""
    return str(datetime.timedelta(seconds=round(seconds)))
