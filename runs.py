"""A run's life on the disk: folder, log, metrics, checkpoints, signals, resume, provenance, result.

<out>/<timestamp>[-<tag>]/
    config.json        every constant, command line, versions, device, git state, fingerprints, resumes
    source/            the script and what it imports, as they ran
    log.txt            what the terminal showed
    metrics.jsonl      the numbers; tb/ shows the same ones in TensorBoard
    checkpoints/       step_00001234/ (weights, optimizer, position), best_step_00001200/ (weights)
    spikes.jsonl       steps whose loss or gradient norm left its usual band, and what they saw
    result.json        written last: status, final metrics with intervals, weights_sha256
    and what the script adds (predictions.jsonl, encoder/, folds/)
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import html
import json
import math
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import core

MAY_CHANGE = {  # what a flag may tell a resumed run anew: length, cadence, bookkeeping, how it is computed
    *("epochs", "max_steps", "max_minutes", "eval_batch", "eval_every", "final_eval", "save_every", "keep"),
    *("log_every", "price_per_hour", "note", "micro_batch", "micro_tokens", "compile", "answer_rows"),
}
PACKED = "packed.txt"  # says of a folder that it came out of eval.py --pack
# of the call, not of the run: what was stored of these never counts
OF_THE_CALL = {"out", "tag", "resume_timestamp", "resume_step", "backend"}


class Run:
    """One run folder. A context manager: Stop ends its body quietly as `stopped`, an error as `failed`.

    Until `begin` nothing of an earlier run is touched: a UserError leaves a resumed folder as it was and
    removes a new one.
    """

    def __init__(self, cfg, world, script, unit="examples"):
        self.world, self.script, self.started = world, Path(script), time.time()
        if cfg.batch < world.size:
            better = f"use --nproc_per_node={cfg.batch} or --batch {world.size} or more"
            raise core.UserError(f"batch {cfg.batch} is smaller than {world.size} ranks: {better}")
        self._signal, self._signal_time, self._deferring, self._handlers = None, 0.0, False, {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # what nohup ignores stays ignored
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._lock = self._log = self._metrics = self._tensorboard = self.checkpoint = None
        plan = core.on_main(world, lambda: self._plan(cfg))
        self.folder, self.resumed, self.checkpoint = Path(plan["folder"]), plan["resumed"], plan["checkpoint"]
        if plan["finished"]:
            if world.is_main:
                print("\n".join([*plan["lines"], f"{self.folder} is finished: nothing to do"]))
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            sys.exit(0)
        self.cfg = dataclasses.replace(cfg, **_constants(plan["constants"]))
        object.__setattr__(self.cfg, "typed", core.typed(cfg))
        self.position = plan["position"]  # of the checkpoint: step, fold, first_step, best, sums, seconds ...
        self.seconds_before = self.position.get("seconds", 0.0)  # of earlier processes of this run
        self.train_seconds = self.position.get("train_seconds", 0.0)
        self.kept = self.position.get("kept", {})  # "best <fold>" -> name, step, loss of weights to keep
        self.state = self.position.get("state", {})  # what a script wants to find again after a resume (JSON)
        self.fold, self.first_step, self._last_step = 0, 0, 0  # folds follow each other on one axis of steps
        self.result, self.clock_share, self.stopping, self.meter = {}, 0.0, None, Meter(world)
        self.unit, self._clock_said = unit, False  # what rates count
        self._steps_in_budget = None  # of max_minutes, by the forecast; later the clock itself says it
        self._lines = plan["lines"]
        if world.is_main:
            self._log = open(self.folder / "log.txt", "a", encoding="utf-8")
            if not self.resumed:
                _write_provenance(self)
        transport = world.device.type if world.size == 1 else world.backend
        ranks = f"{world.size} rank{'s' * (world.size > 1)} {transport}"
        share = f"batch {cfg.batch} = {world.size} x {self.cfg.batch / world.size:g}"
        self.say(f"{self.script.stem}  {ranks} {self.cfg.dtype}  {share}  {self.folder}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        status = "finished" if kind is None else "stopped" if kind is core.Stop else "failed"
        unborn = kind is core.UserError and not self.resumed and self.checkpoint is None
        touched = self._deferring or not self.resumed
        self._deferring = True  # a signal must not break this off
        if self.world.is_main:
            if touched and not unborn:
                try:
                    self._write_result(status, error)
                except OSError as full:  # the lines above it have been said
                    self.say(f"WARNING result.json is not written: {full}")
            for stream in filter(None, (self._log, self._metrics, self._tensorboard, self._lock)):
                with contextlib.suppress(OSError):  # closing flushes: the disk may be full
                    stream.close()
            if unborn:
                shutil.rmtree(self.folder)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        return status == "stopped"

    # -- what the terminal, the log and the curves show ----------------------------------------------------

    def say(self, text):
        """Lines to the terminal and log.txt, rank 0 only."""
        if not self.world.is_main:
            return
        log = core.Terminal(self._log)  # a full disk must not end a run
        log.write(text + "\n")
        log.flush()
        tqdm.write(text, file=sys.stdout)  # past a bar, if there is one
        sys.stdout.flush()

    def metrics(self, step, values):
        """Numbers of a step to metrics.jsonl and TensorBoard, rank 0 only."""
        if self.world.is_main:
            record = {"step": self.first_step + step, "time": time.time()}
            record |= {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON knows no inf
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            self._to_tensorboard(record)
            self._tensorboard.flush()

    def log_training(self, where, step, total_steps, values):
        """The line every script prints each log_every steps; the same numbers go to metrics."""
        loss, rate, step_seconds = self.meter.read()
        values = {"train/loss": loss, **values, f"{self.unit}_per_second": rate}
        if self.unit == "tokens":
            values["train/perplexity"] = math.exp(min(loss, 700))
        eta = clock((total_steps - step) * step_seconds)
        self.say(
            f"{where}  step {step:{len(str(total_steps))}}/{total_steps}  loss {loss:.4f}  "
            f"lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  {rate:.0f}/s  eta {eta}"
        )
        self.metrics(step, values)

    def samples(self, step, texts):
        """Generated texts to samples.jsonl and TensorBoard, rank 0 only."""
        if self.world.is_main:
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                for number, text in enumerate(texts):
                    row = {"step": step, "number": number, "text": text}
                    file.write(json.dumps(row) + "\n")
                    self._show_sample(**row)

    def _show_sample(self, step, number, text):
        self._tensorboard.add_text(f"sample/{number}", f"<pre>{html.escape(text)}</pre>", step)

    def watch(self, step, loss_sum, targets, model, describe):
        """What core.optimizer_step takes as `skip`. All ranks, each step.

        Called with the gradient norm, it notes whether this step's loss or norm left its band, and says
        whether to leave the update out (skip_spikes). An odd step goes to spikes.jsonl with the parameter of
        the largest gradient and with what `describe()` tells of its rows (rank 0 calls it).
        """
        loss = core.all_reduce_sum(self.world, torch.tensor(loss_sum, dtype=torch.float64)).item() / targets

        def is_odd(norm) -> bool:
            bands = self.state.setdefault("bands", {})
            recent = [*bands.get("loss", []), loss][-SMOOTHED:]
            # the mean sees a rise in which no single step stands out
            values = {"loss": loss, "grad_norm": norm, "smoothed_loss": sum(recent) / len(recent)}
            limits = {name: spike_limit(bands.setdefault(name, []), LEAST[name]) for name in values}
            odd = [name for name, value in values.items() if not value <= limits[name]]
            for name, value in values.items():
                bands[name] = [*bands[name], value][-BAND:] if math.isfinite(value) else bands[name]
            left_out = self.cfg.skip_spikes and bool({"loss", "grad_norm"} & set(odd))
            self.state["spikes"] = self.state.get("spikes", 0) + bool(odd)
            self.state["left_out"] = self.state.get("left_out", 0) + left_out
            if odd and self.world.is_main:
                record = {"step": self.first_step + step, "odd": odd, "left_out": left_out}
                self._note_spike(record, values, limits, model, describe())
            self.state["was_odd"] = bool(odd)
            return left_out

        return is_odd

    def _note_spike(self, record, values, limits, model, facts):
        norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
        largest = max(norms, key=norms.get)
        record |= values | {f"{name}_limit": limit for name, limit in limits.items()}
        record |= {f"{name}_usual": statistics.median(band) for name, band in self.state["bands"].items()}
        record |= {"largest_gradient": largest, "largest_gradient_norm": norms[largest]}
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None  # JSON knows no inf
        with open(self.folder / "spikes.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record | facts) + "\n")
        if record["left_out"] or not self.state.get("was_odd"):  # a rise of many steps is one line here
            name = record["odd"][0]
            what = f"{name} {values[name]:.4g}, usually below {limits[name]:.3g}"
            done = "; its update is left out" if record["left_out"] else ""
            self.say(f"spike  step {record['step']}  {what}{done}  (spikes.jsonl)")

    def _to_tensorboard(self, record):
        for name, value in record.items():
            if name not in ("step", "time") and value is not None:
                self._tensorboard.add_scalar(name, value, record["step"], walltime=record["time"])

    # -- what all ranks decide together --------------------------------------------------------------------

    def agree(self, targets=0) -> int:
        """The step's one small reduction: returns the global count of targets and settles stop and clock.

        Afterwards `stopping` says why all ranks must save and stop now (or None); `clock_share` is the spent
        share of max_minutes: rank 0's, the same on all ranks.
        """
        self._step_began = time.perf_counter()
        minutes = self.cfg.max_minutes if self.world.is_main else None
        share = 0.0 if minutes is None else self.train_seconds / (60 * minutes + 1e-9)
        sums = torch.tensor([targets, bool(self._signal), share], dtype=torch.float64)
        targets, signalled, self.clock_share = core.all_reduce_sum(self.world, sums).tolist()
        self.stopping = (self._signal or "a signal to another rank") if signalled else None
        if self.clock_share >= 1 and not self._clock_said:
            self._clock_said = True
            self.say(f"{self.cfg.max_minutes:g} minutes of training are spent: it ends here")
        return int(targets)

    def poll(self, active=0) -> int:
        """For evaluation and other long work behind a checkpoint: raises core.Stop on all ranks at once.

        Returns the sum of `active` over the ranks.
        """
        total = self.agree(active)
        if self.stopping:
            raise core.Stop(self.stopping)
        return total

    def leave_if_signalled(self):
        """For rank 0's work inside on_main, behind a checkpoint: raises core.Stop, which reaches all."""
        if self._signal:
            raise core.Stop(self._signal)

    def _on_signal(self, number, frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if self._signal is None:
            self._signal, self._signal_time = name, now
            core.heard_signals.append(number)
            if not self._deferring and core.may_leave(self.world):
                raise core.Stop(name)  # nothing to save: leave from wherever this is
            if self.world.is_main:
                core.write_in_handler(f"{name}: saves after this step; one more Ctrl-C leaves at once\n")
        elif forces_exit(self._signal, self._signal_time, name, now, self.world):
            saved = f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "nothing is saved"
            core.write_in_handler(f"second signal: out at once; {saved}\n", self._log)
            leave_at_once(number, self.world)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def begin(self):
        """All input is good: from now on signals wait for an agreement, and a resumed folder is changed."""
        if not self._deferring:
            self._deferring = True
            core.on_main(self.world, self._open)
            for line in filter(None, [*self._lines, core.Precision(self.cfg.dtype, self.world).warning()]):
                self.say(line)
            self.poll()

    def load(self, model, optimizer, precision, fold=0) -> int:
        """Starts a fold: returns 0, or the step to resume at, state restored. All ranks, before DDP."""
        self.fold = fold
        if not self.position or self.position["fold"] != fold:
            self.first_step, self.meter, self.state = self._last_step, Meter(self.world), {}
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

    def save(self, step, model, optimizer, precision, must=False):
        """checkpoints/step_…: weights, optimizer, position; whole or not at all; once a step. All ranks.

        Too little disk is a warning that is repeated at every save, an error where it `must` succeed.
        """
        self._last_step = self.first_step + step
        name, sums = _step_name(self._last_step), self.meter.sums()
        if self.checkpoint == name:
            return
        position = {"step": self._last_step, "fold": self.fold, "first_step": self.first_step, "sums": sums}
        position |= {"train_seconds": self.train_seconds, "seconds": self.seconds, "kept": self.kept}
        position["state"] = self.state
        tensors = {"optimizer": optimizer.state_dict(), "scaler": precision.scaler.state_dict()}
        if core.on_main(self.world, lambda: self._save(name, model, tensors, position, must)):
            self.checkpoint = name

    def save_best(self, step, loss, model) -> bool:
        """Weights only, when `loss` is the fold's lowest so far. Returns whether it is."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss is {loss}: try a lower lr, clipping, or dtype fp32")
        best = self.kept.get(f"best {self.fold}")
        if best and loss >= best["loss"]:
            return False
        self.keep_weights(step, model, "best", loss)
        return True

    def keep_weights(self, step, model, kind, loss=None) -> str:
        """<kind>_step_…: the fold's weights of this kind, in the place of earlier ones. Returns the name."""
        step = self.first_step + step
        entry = {"name": f"{kind}_{_step_name(step)}", "step": step, "loss": loss}
        kept = self.kept | {f"{kind} {self.fold}": entry}
        if core.on_main(
            self.world, lambda: self._save(entry["name"], model, {}, {"step": step, "kept": kept})
        ):
            self.kept = kept
        return entry["name"]

    def load_best(self, model) -> str:
        """The fold's best weights, or as they are if none could be kept. Returns their checkpoint's name."""
        name = self.kept.get(f"best {self.fold}", {}).get("name")
        reason = core.on_main(
            self.world, lambda: broken(self.folder / "checkpoints" / name) if name else "never saved"
        )
        if reason:
            self.say(f"WARNING the best weights are {name} ({reason}): the last ones are used")
            return self.checkpoint
        load_weights(self.folder / "checkpoints" / name, model)
        return name

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
            self.say(f"WARNING {line}: free some; the newest checkpoint is {self.checkpoint}")
            return False
        if folder.exists():  # of the same step: it was passed over as broken, or --resume_step went back
            _remove_checkpoint(folder)
        with core.whole_folder(folder) as aside:
            safetensors.torch.save_file(weights, aside / "model.safetensors")
            if tensors:
                torch.save(tensors, aside / "state.pt")
            os.fsync(self._metrics.fileno())  # the manifest says how much of it counts
            write_manifest(aside, position | {"metrics_bytes": self._metrics.tell()})
        self._prune(position)
        return True

    def _prune(self, position):
        """Keeps the last `keep` checkpoints, and every kept weights that one of them or this one names."""
        checkpoints = self.folder / "checkpoints"
        steps = sorted(checkpoints.glob("step_*"))
        for path in steps[: -self.cfg.keep]:
            _remove_checkpoint(path)
        manifests = [position, *filter(None, map(read_manifest, steps[-self.cfg.keep :]))]
        named = {entry["name"] for manifest in manifests for entry in manifest["kept"].values()}
        for path in checkpoints.glob("*_step_*"):
            if path.name not in named:
                _remove_checkpoint(path)

    # -- time, memory, money -------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Of this run so far, over all its processes."""
        return self.seconds_before + time.time() - self.started

    def step_done(self, loss_sum, targets, examples):
        """Counts a step: its loss for the next log line, its seconds for max_minutes."""
        seconds = time.perf_counter() - self._step_began
        self.train_seconds += seconds
        self.meter.add(loss_sum, targets, examples, seconds)

    def schedule_length(self, step, total_steps) -> float:
        """Steps the schedule should span: `total_steps`, or fewer where the clock ends the run earlier.

        By the rate so far: step / length is the spent share of the clock, so the end is always reached.
        """
        if not self.clock_share:  # before the first step: as many as the forecast's fit into the clock
            return min(total_steps, self._steps_in_budget or total_steps)
        return min(total_steps, max(step + 1, step / self.clock_share))

    def forecast(self, model, optimizer, steps, seconds, typical):
        """One line from the worst-case step's seconds; `typical` is an average step's share of its length.

        Raises UserError where the disk cannot hold the checkpoints of a new run.
        """
        total, trainable = core.count_parameters(model)
        moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # tensors of state per weight
        checkpoint_mb = 4 * (total + moments * trainable) / 1e6  # all of it in fp32
        kept = (getattr(self.cfg, "folds", None) or 1) + 1  # while one is being written
        disk_mb = (self.cfg.keep + 1) * checkpoint_mb + 4 * kept * total / 1e6
        free_mb = core.on_main(self.world, lambda: shutil.disk_usage(self.folder).free / 1e6)
        if not self.resumed and free_mb < disk_mb:
            room = f"checkpoints need {disk_mb:.0f} MB, {self.folder} has {free_mb:.0f} MB free"
            raise core.UserError(f"{room}: free some, or use another --out")
        memory_gb = (
            peak_memory_mb(self.world) + (0 if optimizer.state else 4 * moments * trainable / 1e6)
        ) / 1e3
        if steps < 0:
            raise core.UserError(
                f"{self.folder} is {-steps} steps further already: use a larger --max_steps or --epochs"
            )
        if self.cfg.max_minutes is not None:
            fit = round(60 * self.cfg.max_minutes / max(seconds * typical, 1e-9))
            self._steps_in_budget = max(1, core.on_main(self.world, lambda: fit))
            steps = min(steps, self._steps_in_budget)
        hours, price = steps * seconds * typical / 3600, self.cfg.price_per_hour
        if self.cfg.max_minutes is not None:
            hours = min(hours, max(0, self.cfg.max_minutes / 60 - self.train_seconds / 3600))
        if memory_gb > (room_gb := device_memory_gb(self.world)):
            room = f"training needs {memory_gb:.1f} GB, the device has {room_gb:.1f}"
            raise core.UserError(f"{room}: use a smaller --micro_batch, --checkpointing, or a smaller model")
        for note in core.notes:
            self.say(note)
        core.notes.clear()
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

    def _plan(self, cfg) -> dict:
        """Rank 0's decision, as JSON: a new folder, or one to resume; checkpoint, position, constants."""
        out = out_folder(cfg, self.script)
        folder, constants, lines = (
            _resume_folder(cfg, self.script, out),
            dataclasses.asdict(cfg),
            override_lines(cfg),
        )
        plan = {"folder": str(folder), "resumed": True, "finished": False, "checkpoint": None, "position": {}}
        if not folder:
            lines += _passed_over(cfg, self.script, out)
            folder = _new_folder(out, cfg.tag)
            self._lock = locked(folder)
            lines += filter(None, [core.typed(cfg).chosen])
            return plan | {"folder": str(folder), "resumed": False, "constants": constants, "lines": lines}
        stored = read_config(folder)["constants"]
        if clash := _contradictions(cfg, stored):
            raise core.UserError(
                f"{folder} ran with {'; '.join(clash)}: drop these flags, or start a new run"
            )
        for name, old in stored.items():
            if name in OF_THE_CALL or name not in constants or old == constants[name]:
                continue
            if name in MAY_CHANGE & core.typed(cfg).flags:
                lines.append(f"resumed: {name} is now {constants[name]} (it was {old})")
            else:
                lines.append(f"resumed: {name} stays {old} (the script now says {constants[name]})")
                constants[name] = old
        plan |= {"constants": constants, "lines": lines}
        if cfg.resume_timestamp == "auto" and status_of(folder) == "finished":
            return plan | {"finished": True}
        if (folder / PACKED).exists():
            raise core.UserError(
                f"{folder} was packed without optimizer state: resume the original, not this copy"
            )
        self._lock = locked(folder)
        # while this one waited for the lock
        if cfg.resume_timestamp == "auto" and status_of(folder) == "finished":
            return plan | {"finished": True}
        name, notes = _choose_checkpoint(folder / "checkpoints", cfg.resume_step)
        notes.append(f"resumes {folder.name} from {name or 'step 0: there is no checkpoint yet'}")
        position = read_manifest(folder / "checkpoints" / name) if name else {}
        return plan | {"checkpoint": name, "position": position, "lines": notes + lines}

    def _open(self):
        """Rank 0: the folder becomes that of the checkpoint resumed from; what came after it goes."""
        from torch.utils.tensorboard import SummaryWriter

        if self.resumed:
            _write_provenance(self)
        (self.folder / "result.json").unlink(missing_ok=True)
        for path in (self.folder / "checkpoints").glob(".*"):  # what killed saves left
            shutil.rmtree(path)
        for path in sorted(
            (self.folder / "checkpoints").glob("step_*")
        ):  # broken ones, or --resume_step went back
            if path.name > (self.checkpoint or ""):
                _remove_checkpoint(path)
        metrics = self.folder / "metrics.jsonl"
        metrics.touch()
        os.truncate(metrics, min(metrics.stat().st_size, self.position.get("metrics_bytes", 0)))
        self._metrics = open(metrics, "a", encoding="utf-8")
        # metrics.jsonl is the truth: TensorBoard's file is written anew from it, so no resume forks a curve;
        # purge_step=0 tells a TensorBoard that is watching to forget the old file
        shutil.rmtree(self.folder / "tb", ignore_errors=True)
        self._tensorboard = SummaryWriter(self.folder / "tb", purge_step=0)
        for line in metrics.read_text().splitlines():
            self._to_tensorboard(json.loads(line))
        at, evaluated = (
            self.position.get("step", 0),
            self.state.get("evaluated"),
        )  # else `at` is evaluated again
        for row in _keep_rows(self.folder / "samples.jsonl", at + (evaluated == at)):
            self._show_sample(**row)
        _keep_rows(self.folder / "spikes.jsonl", at + 1)
        self._tensorboard.flush()

    def pin(self, name, value):
        """Notes a fact (a fingerprint) in config.json; a resume that finds another value is refused."""

        def note():
            config = read_config(self.folder)
            absent = name not in config["facts"]
            if config["facts"].setdefault(name, value) != value:
                raise core.UserError(f"{name} is not what {self.folder} began with: start a new run")
            if absent:
                core.write_json(self.folder / "config.json", config)

        core.on_main(self.world, note)

    def _write_result(self, status, error):
        why = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, torch.OutOfMemoryError):
            why += " (resume with a smaller --micro_batch or --eval_batch)"
        self.result = {
            **{"status": status, "why": why, "script": self.script.stem, "checkpoint": self.checkpoint},
            **{"step": self._last_step, "seconds": self.seconds, "train_seconds": self.train_seconds},
            **{"peak_memory_mb": peak_memory_mb(self.world), f"{self.unit}_per_second": self.meter.rate()},
            **{"spikes": self.state.get("spikes", 0), "left_out": self.state.get("left_out", 0)},
            **self.result,
        }
        if status != "finished":
            saved = (
                f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint"
            )
            self.say(f"{status}  {why}; {saved}")
            self.say(f"next: the same command{self._flags_to_go_on()}")
            if "TORCHELASTIC_RUN_ID" in os.environ:
                self.say("(torchrun reports every stop with a traceback of its own)")
        core.write_json(self.folder / "result.json", self.result)

    def _flags_to_go_on(self) -> str:
        """What a resume needs beside the command as it was typed. None without a checkpoint: the same command
        starts over (find_lr and profile never save one, and refuse to be resumed)."""
        flags = []
        if self.checkpoint and self.cfg.resume_timestamp != "auto":
            flags.append(f"with --resume_timestamp {self.folder.name[:15]}")
        if self.cfg.resume_step is not None:
            flags.append("without --resume_step")
        return " " * bool(flags) + " and ".join(flags)


class Meter:
    """Loss, targets and time since the last log line; the sums travel in checkpoints: no curve forks."""

    def __init__(self, world, sums=(0.0, 0)):
        self.world, self.all_examples, self.all_seconds = world, 0, 0.0
        self._restart(
            sums[0] if world.is_main else 0.0, sums[1]
        )  # the stored sum is global: one rank carries it

    def _restart(self, loss=0.0, targets=0):
        self.loss, self.targets, self.steps, self.examples, self.seconds = loss, targets, 0, 0, 0.0

    def add(self, loss_sum, targets, examples, seconds):
        """This rank's summed loss; global targets and examples."""
        self.loss, self.targets, self.steps = self.loss + loss_sum, self.targets + targets, self.steps + 1
        self.examples, self.seconds = self.examples + examples, self.seconds + seconds
        self.all_examples, self.all_seconds = self.all_examples + examples, self.all_seconds + seconds

    def sums(self) -> list:
        """[global loss sum, targets]; every rank calls it."""
        return [
            core.all_reduce_sum(self.world, torch.tensor(self.loss, dtype=torch.float64)).item(),
            self.targets,
        ]

    def read(self) -> tuple[float, float, float]:
        """(mean loss per target, examples per second, seconds per step) since the last reading."""
        loss, targets = self.sums()
        rates = self.examples / max(self.seconds, 1e-9), self.seconds / max(self.steps, 1)
        self._restart()
        return loss / max(targets, 1), *rates

    def rate(self) -> float | None:
        """Examples per second of this process so far."""
        return self.all_examples / self.all_seconds if self.all_seconds else None


BAND, FEWEST, SMOOTHED = 100, 20, 10  # steps that say what is usual; the fewest that do; of a running mean
LEAST = {"loss": 1.5, "grad_norm": 1.5, "smoothed_loss": 1.25}  # times the median that is usual in any case


def spike_limit(values, least) -> float:
    """The highest usual value: median x exp(6 x 1.4826 x median deviation of the logs), or `least` medians.

    Like 6 standard deviations of a log-normal, but a few spikes among the values hardly move it.
    """
    if len(values) < FEWEST:
        return math.inf
    logs = sorted(math.log(max(value, 1e-30)) for value in values)
    middle = statistics.median(logs)
    deviation = statistics.median(abs(log - middle) for log in logs)
    return math.exp(middle + max(6 * 1.4826 * deviation, math.log(least)))


def _keep_rows(path, before) -> list[dict]:
    """Leaves the rows of a .jsonl file with a step below `before`: what came later will come again."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # half a line of a killed process
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] < before]
    with core.whole_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def prepared(folder) -> Path:
    """A folder that can be written to; it is looked at before work begins."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise core.UserError(f"{folder} cannot be written ({error.strerror}): use another --out") from None
    return folder


def forces_exit(first, first_time, name, now, world) -> bool:
    """Whether signal `name` after a `first` one is from a person who will not wait for the save.

    Not a HUP: nobody presses keys at a terminal that is gone, but the kernel and the shell send one each, and
    tmux or sshd may add theirs. Not another signal within a second: a session that ends sends TERM and HUP.
    torchrun's workers may get that TERM twice, from the session and from torchrun, which also turns its own
    second HUP, however late, into a TERM for them.
    """
    torchrun = core.under_torchrun(world)
    if name == "SIGHUP" or (torchrun and (first, name) == ("SIGHUP", "SIGTERM")):
        return False
    return now - first_time > 1 or (name == first and not torchrun)


def leave_at_once(number, world):
    """After a second signal. Plain python dies of it, which ends a shell's loop, too."""
    if not core.under_torchrun(world):
        core.die_of(number)
    os._exit(1)


@contextlib.contextmanager
def listening(world):
    """Yields poll(active) -> its sum over ranks; it raises core.Stop on all ranks after a signal to one.

    Alone a signal stops at once; a second one always does, but for those of a terminal that closes.
    """
    heard, before = [], {}
    core.heard_signals.clear()

    def on_signal(number, frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if not heard:
            heard.append((name, now))
            core.heard_signals.append(number)
            if core.may_leave(world):
                raise core.Stop(name)
        elif forces_exit(*heard[0], name, now, world):
            leave_at_once(number, world)

    def poll(active=0) -> int:
        mine = core.heard_signals  # also what a run of a study heard too late to stop
        total, signalled = core.all_reduce_sum(world, torch.tensor([active, len(mine)])).tolist()
        if signalled:
            raise core.Stop(signal.Signals(mine[0]).name if mine else "a signal to another rank")
        return total

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, on_signal)
    try:
        yield poll
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What two runs are compared by


def loss_lines(part, numbers, groups, sums, spelt) -> list[dict]:
    """Lines of losses.jsonl, by which eval.py --compare pairs runs: part (test, val), row and group of each
    held-out row, its loss in nats, hits, targets, and their bytes."""
    columns = (np.asarray(column).tolist() for column in (numbers, groups, sums.round(6), spelt))
    return [
        {
            "part": part,
            "row": row,
            "group": group,
            "nats": nats,
            "hits": int(hits),
            "targets": int(targets),
            "bytes": size,
        }
        for row, group, (nats, hits, targets), size in zip(*columns, strict=True)
    ]


def same_data(stored, found, name, what=("data",)):
    """UserError unless the data (and tokenizer, say) that a run was trained on is what is there now."""
    if any(stored[key] != found[key] for key in what):
        raise core.UserError(f"data {name} is not what the run was trained on: restore it, or use --data")


# What a checkpoint is made of


def _step_name(step) -> str:
    return f"step_{step:08d}"


def _manifest_hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, position):
    """manifest.json, written last: the position, SHA-256 of each file, and of itself."""
    hashes = {path.name: core.sha256_file(path) for path in sorted(folder.iterdir())}
    core.write_json(folder / "manifest.json", manifest(position, hashes))


def manifest(position, hashes) -> dict:
    """Content of manifest.json; `hashes`: file -> SHA-256."""
    content = position | {"files": hashes}
    return content | {"manifest": _manifest_hash(content)}


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
    return state_sha256(model.state_dict())


def state_sha256(state) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Which folder, which checkpoint, which constants


def locked(folder):
    """An open file that says who writes here; UserError if another process does. It ends with this one."""
    try:
        lock = open(folder / ".lock", "a+")
        for _ in range(50):  # a killed process lets go a moment later
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}")
                lock.flush()
                return lock
            time.sleep(0.1)
    except OSError as error:
        raise core.UserError(f"{folder} cannot be written ({error.strerror}): use another --out") from None
    lock.seek(0)
    raise core.UserError(f"{folder} is being written by {lock.read()}: stop it first")


def override_lines(cfg) -> list[str]:
    """What preset and smoke changed, in lines of at most 100 columns."""
    t = core.typed(cfg)
    lines = [" and ".join(filter(None, [t.preset and f"preset {t.preset}", t.smoke and "smoke"])) + " set:"]
    for name, value in t.overrides.items():
        word = f" {name} {value},"
        if len(lines[-1] + word) > 100:
            lines.append(" ")
        lines[-1] += word
    return [*lines[:-1], lines[-1].rstrip(",")] if t.overrides else []


def out_folder(cfg, script) -> Path:
    """Where the runs of a script lie."""
    return Path(cfg.out or f"runs/{'smoke/' if core.typed(cfg).smoke else ''}{Path(script).stem}")


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
    runs = sorted(path.parent for path in out.glob("*/config.json") if _readable(path.parent))
    if wanted is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:  # torchrun --max-restarts
        return next((run for run in reversed(runs) if read_config(run)["launcher"] == _launcher()), None)
    if wanted is None:
        if cfg.resume_step is not None:
            raise core.UserError(f"--resume_step {cfg.resume_step} needs --resume_timestamp")
        return None
    mode = getattr(cfg, "mode", None)
    runs = [
        run
        for run in runs
        if (config := read_config(run))["script"] == script.stem and config["constants"].get("mode") == mode
    ]
    if wanted in ("auto", "latest"):
        runs = [run for run in runs if run.name[15:] == tag]
        if wanted == "auto":  # a loop over seeds types the same words: another seed is another run
            runs = [run for run in runs if not _contradictions(cfg, read_config(run)["constants"])]
            return runs[-1] if runs else None
        if unfinished := [run for run in runs if status_of(run) != "finished"]:
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


def _passed_over(cfg, script, out) -> list[str]:
    """A line if `auto` starts a new run beside an unfinished one that what was typed contradicts."""
    runs = sorted((path.parent for path in out.glob("*/config.json")), reverse=True)
    for run in runs if cfg.resume_timestamp == "auto" else ():
        with contextlib.suppress(core.UserError):  # unreadable ones have been named
            config = read_config(run)
            same = config["script"] == script.stem and run.name[15:] == (f"-{cfg.tag}" if cfg.tag else "")
            same &= config["constants"].get("mode") == getattr(cfg, "mode", None)
            if same and status_of(run) != "finished" and (odd := _contradictions(cfg, config["constants"])):
                return [f"a new run: {run.name} is unfinished, but ran with {'; '.join(odd)}"]
    return []


def _readable(folder) -> bool:
    try:
        return bool(read_config(folder))
    except core.UserError as error:
        print(f"WARNING passed over: {error}", file=sys.stderr)
        return False


def _contradictions(cfg, stored) -> list[str]:
    names = sorted((core.typed(cfg).flags - MAY_CHANGE - OF_THE_CALL) & set(stored))
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
        raise core.UserError(f"no checkpoint in {checkpoints} is whole ({', '.join(names)}): start a new run")
    return None, lines


def chosen_checkpoint(folder) -> str:
    """Name of the weights that a run was tested with; of an unfinished run, the newest whole checkpoint."""
    folder = Path(folder)
    with contextlib.suppress(OSError, ValueError, KeyError):
        name = json.loads((folder / "result.json").read_text())["test_checkpoints"][0]
        if broken(folder / "checkpoints" / name) is None:
            return name
    name, _ = _choose_checkpoint(folder / "checkpoints")
    if name is None:
        raise core.UserError(f"{folder} has no checkpoint")
    return name


def tested_checkpoints(folder) -> list[str]:
    """Names of the weights that a finished run was tested with, one a fold; UserError if one is damaged."""
    folder = Path(folder)
    read_config(folder)  # is it a run at all?
    try:
        names = json.loads((folder / "result.json").read_text())["test_checkpoints"]
    except (OSError, ValueError, KeyError):
        raise core.UserError(f"{folder} is not finished: resume it, or name another --run") from None
    for name in names:
        if reason := broken(folder / "checkpoints" / name):
            raise core.UserError(f"{folder}/checkpoints/{name} is broken ({reason}): copy it anew")
    return names


def finished_run(cfg, script) -> Path | None:
    """The run that `--resume_timestamp auto` would find finished."""
    folder = _resume_folder(cfg, Path(script), out_folder(cfg, script))
    return folder if folder and status_of(folder) == "finished" else None


def newest_run(cfg, script, finished=False) -> Path:
    """The newest run folder of a script in cfg.out that holds a checkpoint (and is finished)."""
    out = out_folder(cfg, script)
    runs = sorted({path.parents[2] for path in out.glob("*/checkpoints/*/manifest.json")})
    runs = [run for run in runs if not finished or status_of(run) == "finished"]
    if not runs:
        raise core.UserError(f"no run with a checkpoint in {out}: train one, name one, or add --smoke")
    return runs[-1]


def read_config(folder) -> dict:
    """config.json of a run folder: constants, provenance, facts, resumes."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        raise core.UserError(f"{folder} is no run folder: its config.json cannot be read") from None
    if isinstance(config, dict) and isinstance(config.get("constants"), dict):
        config["constants"] = _constants(config["constants"])
    return config


def _constants(values) -> dict:
    """Constants as Config has them: JSON makes lists of tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def status_of(folder) -> str:
    """Of result.json: finished, stopped, failed; or that there is none."""
    try:
        return json.loads((folder / "result.json").read_text())["status"]
    except (OSError, ValueError, KeyError):  # absent, or half of it on a full disk
        return "running or killed"


# Provenance


def _write_provenance(run):
    """config.json and source/ of a new run; a resume is noted in config.json."""
    now = {"started": datetime.datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
    now |= {
        "world_size": run.world.size,
        "threads": torch.get_num_threads(),
        "device": device_name(run.world),
    }
    if run.resumed:
        config = read_config(run.folder)
        entry = {"step": run.position.get("step", 0), **now, "git": git_state()}
        entry["changed"] = changed_constants(config["constants"], dataclasses.asdict(run.cfg))
        entry["other_code"] = []
        config["resumes"].append(entry)
        for path in _sources(run.script):
            began = run.folder / "source" / path.name  # absent where the project has grown a file since
            if began.exists() and core.sha256_file(path) != core.sha256_file(began):
                entry["other_code"].append(path.name)
                run.say(f"WARNING {path.name} is not the one this run began with (that one is in source/)")
        config |= {"launcher": _launcher(), "constants": dataclasses.asdict(run.cfg)}
    else:
        (run.folder / "source").mkdir()
        for path in _sources(run.script):
            shutil.copy(path, run.folder / "source")
        t = core.typed(run.cfg)
        config = {"script": run.script.stem, "constants": dataclasses.asdict(run.cfg), **now}
        config |= {"preset": t.preset, "smoke": t.smoke, "versions": _versions(), "git": git_state()}
        config |= {"host": socket.gethostname(), "launcher": _launcher(), "facts": {}, "resumes": []}
    core.write_json(run.folder / "config.json", config)


def changed_constants(stored, now) -> dict[str, dict]:
    """Name -> {was, is} of the constants that a resume changes; one that the script has gained or lost since
    has only one of the two."""
    changed = {}
    for name in (*stored, *(name for name in now if name not in stored)):
        if name in OF_THE_CALL or (name in stored and name in now and stored[name] == now[name]):
            continue
        sides = {"was": stored, "is": now}
        changed[name] = {word: side[name] for word, side in sides.items() if name in side}
    return changed


def _sources(script) -> list[Path]:
    """The files of the project that this process has imported, and the script."""
    # by __dict__: asking a lazy module for an attribute would import what it stands for
    names = (
        vars(module).get("__file__") for module in list(sys.modules.values()) if hasattr(module, "__dict__")
    )
    files = {Path(name) for name in names if name and Path(name).is_absolute()}
    mine = {file for file in files if file.is_relative_to(core.PROJECT) and file.suffix == ".py"}
    others = {"site-packages", "tests", "benchmarks"}
    mine = {file for file in mine if not others & set(file.relative_to(core.PROJECT).parts)}
    return sorted({script.resolve(), *mine})


def _versions() -> dict[str, str | None]:
    from importlib.metadata import distributions

    names = ("torch", "transformers", "datasets", "tokenizers", "numpy")
    found = {name: next((one.version for one in distributions(name=name)), None) for name in names}
    return {"python": platform.python_version(), **found}  # built-in data need no `datasets`


def device_name(world) -> str:
    return (
        torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else f"{world.device.type} {platform.machine()}"
    )


def refuse_dirty():
    """UserError unless the project is a git checkout without any change, staged and untracked files too."""
    state = git_state()
    if not state["commit"]:
        raise core.UserError(
            "--no-dirty: this is no git checkout with a commit: commit the project, or use --dirty"
        )
    if state["dirty"]:
        changed = ", ".join(state["dirty"].splitlines()[:5])
        raise core.UserError(f"--no-dirty: uncommitted changes ({changed}): commit them, or use --dirty")


def git_state() -> dict[str, str]:
    """Commit and uncommitted changes of the project: constants are edited in place. Empty without git."""

    def git(*args):
        if not shutil.which("git"):
            return ""
        return subprocess.run(
            ["git", "-C", str(core.PROJECT), *args], capture_output=True, text=True
        ).stdout.strip()

    return {
        "commit": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=normal"),
        "diff": git("diff", "HEAD"),
    }


def _launcher() -> str | None:
    """The torchrun that started this process: it lives on while it restarts its workers."""
    return f"{socket.gethostname()}/{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def peak_memory_mb(world) -> float:
    """Peak so far: allocated on the accelerator, or resident on the CPU."""
    if world.device.type != "cpu":
        return getattr(torch, world.device.type).max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def device_memory_gb(world) -> float:
    """Of the accelerator; a CPU's is not known to be free."""
    if world.device.type == "cpu":
        return math.inf
    return getattr(torch, world.device.type).get_device_properties(world.device).total_memory / 1e9


def clock(seconds) -> str:
    """3723 -> `1:02:03`"""
    return str(datetime.timedelta(seconds=round(seconds)))
