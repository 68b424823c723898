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
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lab.errors import LostRanks, OutOfMemory, Stop, UserError
from lab.run import forecast
from lab.run.checkpoints import Checkpoints, step_name
from lab.run.curves import Curves, keep_rows
from lab.run.disks import cache_root, require_one_disk
from lab.run.files import remove_leftovers, row_hashes, write_sealed
from lab.run.flags import KEEPS_NOTHING
from lab.run.meter import Clock, Meter, clock, with_shares
from lab.run.provenance import write_provenance
from lab.run.resume import plan_run, require_rows
from lab.run.signals import Signals
from lab.run.stored import run_config, stored_constants
from lab.run.terminal import Log
from lab.train import heartbeat, launch
from lab.train.batches import is_out_of_memory
from lab.train.precision import Precision
from lab.train.processes import all_reduce_sum, on_main


def open_run(cfg, world, script, unit="examples"):
    """The Run of these constants: a new folder or one to resume. None, and a line, where --resume_timestamp
    auto finds it finished. unit: what rates count, examples or tokens."""
    if not cfg.resume_timestamp:
        require_rows(cfg.batch, world.size)
    signals = Signals(world)
    with contextlib.ExitStack() as undone:  # where the command is refused, or the run is finished
        undone.callback(signals.close)
        held = undone.enter_context(contextlib.ExitStack())
        plan = on_main(world, plan_run, cfg, Path(script), world.size, held)
        if not plan["finished"]:
            if world.is_main and not plan["resumed"]:
                undone.callback(shutil.rmtree, plan["folder"], ignore_errors=True)
            if world.size > launch.number("LOCAL_WORLD_SIZE"):
                require_one_disk(world, plan["folder"], cache_root())
            run = Run(cfg, world, script, unit, plan, signals, held)
            undone.pop_all()
            return run
    if world.is_main:
        print("\n".join([*plan["lines"], f"{plan['folder']} is finished: nothing to do"]), flush=True)
    return None


class Run:
    """One run folder, from open_run. A context manager: Stop ends its body quietly as `stopped`, an error as
    `failed`.

    Until `begin` nothing of an earlier run is touched: a UserError leaves a resumed folder as it was. A new
    one it removes, as long as no step was taken.
    """

    def __init__(self, cfg, world, script, unit, plan, signals, held):
        self.world, self.script, self.started = world, Path(script), time.time()
        self.signals, self._held = signals, held  # held: rank 0's lock of the folder
        self.signals.saves = getattr(cfg, "mode", "train") not in KEEPS_NOTHING
        self._log = self.curves = None
        self.folder, self.resumed = Path(plan["folder"]), plan["resumed"]
        self.cfg = dataclasses.replace(cfg, **stored_constants(plan["constants"]))
        self.position = plan["position"]  # of the checkpoint: step, fold, first_step, kept, sums, seconds ...
        self.seconds_before = self.position.get("seconds", 0.0)  # of earlier processes of this run
        self.clock = Clock(self.cfg.max_minutes, self.position.get("train_seconds", 0.0))
        found = plan["checkpoint"], self.position.get("kept")
        self.checkpoints = Checkpoints(self.folder, world, self.cfg.keep, self.say, *found)
        if self.checkpoint:
            self.signals.saved = self.checkpoints.told()
        self.state = self.position.get("state", {})  # what a script wants to find again after a resume (JSON)
        self.fold, self.first_step, self._last_step = 0, 0, 0  # folds follow each other on one axis of steps
        self.rows_ahead = []  # this rank's of the step after the one it takes, for prefetch.py
        self.result, self.stopping, self.meter, self.unit = {}, None, Meter(world), unit
        self.profiled = False  # by this process, for --profile
        self.compiles = False  # under compile auto
        self.at_peak = None  # Flops of a step, in seconds at the cards' peak
        self._lines = plan["lines"]
        if world.is_main:
            self._log = self.signals.log = Log(self.folder / "log.txt")
        if not self.resumed:
            on_main(world, self._create)
        transport = world.device.type if world.size == 1 else world.backend
        ranks = f"{world.size} rank{'s' * (world.size > 1)} {transport}"
        share = f"batch {self.cfg.batch} = {world.size} x {self.cfg.batch / world.size:g}"
        self.say(f"{self.script.stem}  {ranks} {self.cfg.dtype}  {share}  {self.folder}")

    def __enter__(self):
        heartbeat.last_words[:] = [self._note_loss]
        return self

    def _note_loss(self, text):
        """Where a rank is lost and this one hangs: its thread writes what __exit__ would."""
        if self.world.is_main and self.signals.deferring:
            self.checkpoints.finish_writing(seconds=60)
            self._write_result("failed", LostRanks(text))

    def __exit__(self, kind, error, trace):
        unsaved = self.checkpoints.settle_alone() if self.world.is_main else None
        if unsaved and kind is None:
            kind, error = type(unsaved), unsaved
        elif unsaved:
            self.say(f"WARNING the last checkpoint is not written: {unsaved}")
        status = "finished" if kind is None else "stopped" if kind is Stop else "failed"
        heartbeat.last_words.clear()
        worked = self.resumed or self.checkpoint or self.clock.seconds or self.checkpoints.kept
        refused = kind and issubclass(kind, UserError) and kind is not OutOfMemory
        unborn = refused and not worked  # hours may lie behind it though no save found room
        touched = self.signals.deferring or not self.resumed
        self.signals.deferring = True  # a signal must not break this off
        if self.world.is_main:
            if touched and not unborn:
                try:
                    self._write_result(status, error)
                except OSError as full:  # the lines above it have been said
                    self.say(f"WARNING result.json is not written: {full}")
            for stream in filter(None, (self._log, self.curves, self._held)):
                with contextlib.suppress(OSError):  # closing flushes: the disk may be full
                    stream.close()
            if unborn:
                shutil.rmtree(self.folder)
        self.signals.close()
        if unsaved and error is unsaved:
            raise unsaved
        return status == "stopped"

    # -- what the terminal, the log and the curves show ----------------------------------------------------

    def say(self, text):
        """Prints lines to the terminal and log.txt. Rank 0 only."""
        if not self.world.is_main:
            return
        self._log.write(text + "\n")
        tqdm.write(text, file=sys.stdout)  # past a bar, if there is one
        sys.stdout.flush()

    def metrics(self, step, values, flush=True):
        """Writes numbers of a step to metrics.jsonl and TensorBoard. Rank 0 only."""
        if self.world.is_main:
            self.curves.metrics(self.first_step + step, values, flush)

    def samples(self, step, texts):
        """Writes generated texts to samples.jsonl and TensorBoard. Rank 0 only."""
        if self.world.is_main:
            self.curves.samples(step, texts)

    def log_training(self, where, step, total_steps, values, name="loss"):
        """Prints the line of every log_every steps, writes its numbers to the metrics. name: of the loss."""
        shares = self.meter.shares()
        loss, rate, step_seconds = self.meter.read()
        values = {f"train/{name}": loss, **values, f"{self.unit}_per_second": rate, **shares}
        if self.unit == "tokens" and name == "loss":
            values["train/perplexity"] = math.exp(min(loss, 700))
        eta, unit = clock((total_steps - step) * step_seconds), self.unit.replace("examples", "rows")
        line = (
            f"{where}  step {step:{len(str(total_steps))}}/{total_steps}  {name} {loss:.4f}  "
            f"lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  {rate:.0f} {unit}/s  eta {eta}"
        )
        self.say(with_shares(line, shares))
        self.metrics(step, values)

    # -- what all ranks decide together --------------------------------------------------------------------

    def agree(self, targets=0) -> float:
        """Sums `targets` over the ranks, in the step's one small reduction, and agrees on stop and clock.

        Afterwards `stopping` says why all ranks must save and stop now (or None); `clock.share` is the spent
        share of max_minutes: rank 0's, the same on all ranks.
        """
        self.clock.begin_step()
        share, before = self.clock.spent() if self.world.is_main else 0.0, self.clock.share
        sums = torch.tensor([targets, bool(self.signals.name), share], dtype=torch.float64)
        targets, signalled, self.clock.share = all_reduce_sum(self.world, sums).tolist()
        self.stopping = (self.signals.name or "a signal to another rank") if signalled else None
        if self.clock.share >= 1 > before:
            self.say(f"{self.clock.minutes:g} minutes of training are spent: it ends here")
        return int(targets) if targets == int(targets) else targets

    def poll(self, active=0) -> int:
        """Sums `active` over the ranks; raises Stop on all of them after a signal. For long work."""
        total = self.agree(active)
        if self.stopping:
            raise Stop(self.stopping)
        return total

    def leave_if_signalled(self):
        """Raises Stop after a signal. For rank 0's work inside on_main, which passes it on to all ranks."""
        self.signals.leave()

    # -- checkpoints ---------------------------------------------------------------------------------------

    def begin(self, steps):
        """Starts the run once all input is checked: from here on a resumed folder is changed, and signals are
        answered where all ranks agree. steps: planned, of this fold; UserError where the run is further."""
        further = self.position.get("step", 0) - self.position.get("first_step", 0) - steps
        if further > 0:
            better = "use a larger --max_steps or --epochs"
            raise UserError(f"{self.folder} is {further} steps further already: {better}")
        if not self.signals.deferring:
            self.signals.deferring = True
            on_main(self.world, self._open)
            for line in filter(None, [*self._lines, Precision(self.cfg.dtype, self.world).warning()]):
                self.say(line)
            self.poll()

    def load(self, model, optimizer, precision, fold=0) -> int:
        """Restores the state of a resumed run and returns its step, 0 for a new one.
        All ranks, before DDP."""
        self.fold = fold
        if not self.position or self.position["fold"] != fold:
            self.first_step = self._last_step
            self.meter.begin()
            self.state = {name: self.state[name] for name in ("spikes", "left_out") if name in self.state}
            return 0
        self.first_step, self._last_step = self.position["first_step"], self.position["step"]
        self.meter.begin(self.position["sums"])
        self.checkpoints.load(model, optimizer, precision.scaler)
        return self.step

    @property
    def step(self) -> int:
        """Steps of this fold at the newest save, or of the resumed checkpoint: where the loop begins."""
        return self._last_step - self.first_step

    def save(self, step, model, optimizer, precision, must=False):
        """Writes checkpoints/step_… (weights, optimizer, position) atomically, once a step. All ranks.

        Where the disk is too full it warns at every save, or raises UserError if it `must` succeed.
        """
        self._last_step = self.first_step + step
        position = {"fold": self.fold, "first_step": self.first_step, "sums": self.meter.sums()}
        position |= {"train_seconds": self.clock.seconds, "seconds": self.seconds, "state": self.state}
        self.checkpoints.save(self._last_step, model, optimizer, precision.scaler, position, must)
        self.signals.saved = self.checkpoints.told()

    def has_saved(self, step) -> bool:
        """Whether the newest checkpoint, or that which is being written, is this step's of the fold."""
        return step_name(self.first_step + step) in (self.checkpoint, self.checkpoints.pending)

    def require_finite(self, loss):
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss is {loss}: try a lower lr, clipping, or dtype fp32")

    def save_best(self, step, loss, model) -> bool:
        """Saves the weights if `loss` is the fold's lowest so far. Returns whether they are kept."""
        self.require_finite(loss)
        is_best = self.checkpoints.is_best(self.fold, loss)
        return is_best and self.keep_weights(step, model, "best", loss) is not None

    def keep_weights(self, step, model, kind, loss=None, must=False) -> str | None:
        """Saves the weights as <kind>_step_…; see Checkpoints. Returns the name, if there was room."""
        return self.checkpoints.keep_weights(self.first_step + step, model, kind, self.fold, loss, must)

    def load_best(self, model) -> str:
        """Loads the fold's best weights; see Checkpoints. Returns the checkpoint's name."""
        return self.checkpoints.load_best(model, self.fold)

    @property
    def checkpoint(self) -> str | None:
        """The newest one's name."""
        return self.checkpoints.newest

    # -- time, memory, money -------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run so far, over all resumes."""
        return self.seconds_before + time.time() - self.started

    def step_done(self, loss_sum, targets, examples, at_peak=0.0):
        """Counts a step: its loss for the next log line, its seconds for max_minutes; at_peak: see Meter."""
        self.meter.add(loss_sum, targets, examples, self.clock.end_step(), at_peak, self.clock.waited())

    def forecast(self, model, optimizer, steps, seconds, typical):
        """Says in one line what the run will need; see forecast.forecast. All ranks,
        before the first step."""
        self.clock.fit = forecast.forecast(self, model, optimizer, steps, seconds, typical)

    # -- opening and closing -------------------------------------------------------------------------------

    def _create(self):
        """Rank 0: log.txt, config.json and source/ of a new run."""
        try:
            self._log.open()
            write_provenance(self)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): free some space") from None

    def _open(self):
        """Rank 0: cuts metrics, samples and checkpoints back to the checkpoint that is resumed from."""
        if self.resumed:
            self._log.open()
            write_provenance(self)
        (self.folder / "result.json").unlink(missing_ok=True)
        remove_leftovers(self.folder)
        self.checkpoints.open()
        at = self.position.get("step", 0)
        evaluated = self.state.get("evaluated") == at  # else `at` is evaluated again
        self.curves = Curves(self.folder, self.position.get("metrics_bytes", 0), at + evaluated)
        self.checkpoints.curves = self.curves
        _, cut = keep_rows(self.folder / "spikes.jsonl", at + 1)
        self._lines += [*self.curves.lines, *cut]

    def pin(self, name, value):
        """Notes a fact (a fingerprint, say) in config.json. A resume that finds another value is refused."""
        on_main(self.world, self._pin, name, value)

    def note(self, name, value):
        """Notes a fact in config.json that may differ after a resume."""
        on_main(self.world, self._pin, name, value, True)

    def _pin(self, name, value, may_change=False):
        config = run_config(self.folder)
        absent = may_change or name not in config["facts"]
        if may_change:
            config["facts"][name] = value
        elif config["facts"].setdefault(name, value) != value:
            raise UserError(f"{name} is not what {self.folder} began with: start a new run")
        if absent:
            write_sealed(self.folder / "config.json", config)

    def _write_result(self, status, error):
        why = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
        if is_out_of_memory(error):
            why += " (resume with a smaller --micro_batch or --eval_batch)"
        self.result = {
            "status": status,
            "why": why,
            "script": self.script.stem,
            "checkpoint": self.checkpoint,
            "step": self._last_step,
            "seconds": self.seconds,
            "train_seconds": self.clock.seconds,
            "peak_memory_mb": forecast.peak_memory_mb(self.world),
            f"{self.unit}_per_second": self.meter.rate(),
            "spikes": self.state.get("spikes", 0),
            "left_out": self.state.get("left_out", 0),
            **self.result,
        }
        if status != "finished":
            self.say(f"{status}  {why}; {self.checkpoints.told()}")
            self.say(f"next: the same command{self._flags_to_go_on()}")
            if "TORCHELASTIC_RUN_ID" in os.environ:
                self.say("(torchrun reports every stop with a traceback of its own)")
        self.result["files"] = row_hashes(self.folder)
        write_sealed(self.folder / "result.json", self.result)

    def _flags_to_go_on(self) -> str:
        """What a resume needs beside the command as it was typed. None without a checkpoint: the same command
        starts over (find_lr never saves one, and refuses to be resumed)."""
        flags = []
        if self.checkpoint and self.cfg.resume_timestamp != "auto":
            flags.append(f"with --resume_timestamp {self.folder.name[:15]}")
        if self.cfg.resume_step is not None:
            flags.append("without --resume_step")
        return " " * bool(flags) + " and ".join(flags)
