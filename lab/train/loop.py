"""The protocol of training, the same for every script: when to save and to evaluate, how all ranks stop on
one step, when the clock ends a run, what a spike is. What is computed stands in the script:

    for at in core.steps(run, batches, units.targets, saved, total_steps):
        if at.evaluates:                                    # behind a checkpoint, and at the end
            at.keep_if_best(validate(model))
            continue
        losses = forward_backward(at.rows, at.targets)      # of the micro-batches
        norm = core.gradient_norm(optimizer, precision)
        if at.spiked(losses, norm):                         # noted; with skip_spikes its update is left out
            at.note_spike(model, spike_facts(at))
        at.update(optimizer, precision, core.lr_at(cfg, at.step, at.schedule_length))
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lab.errors import Stop, UserError
from lab.run import forecast, profiling, spikes
from lab.run.folder import Run
from lab.run.stored import read_config
from lab.train import compiling, flops, shard
from lab.train.batches import reseed, runs_out_of_memory, worst_case
from lab.train.device import read_step
from lab.train.fsdp import Sharded
from lab.train.optim import optimizer_step
from lab.train.prefetch import prepares
from lab.train.processes import all_reduce_sum, on_main


@dataclass
class Evaluation:
    """The model is to be evaluated, after `step` steps."""

    run: Run
    step: int
    where: str  # for a line: "epoch 1.5/3"
    late: bool  # half of the steps, or of max_minutes, are done, so that an alarm is worth a line
    ends: bool  # no step follows
    saved: bool  # nothing would be lost: a signal may end the evaluation; else it waits for its end
    trained: Any  # what a checkpoint holds
    evaluates = True

    def poll(self, active=0) -> int:
        """For long work of all ranks: raises Stop after a signal if this step is saved; sums `active`."""
        return (self.run.poll if self.saved else self.run.agree)(active)

    def leave_if_signalled(self):
        """For rank 0's long work: the same, without asking the others."""
        if self.saved:
            self.run.leave_if_signalled()

    def keep_if_best(self, loss) -> bool:
        """With test_weights best: saves the weights if their validation loss is the lowest so far. An error
        if it is no number."""
        self.run.require_finite(loss)
        keeps = self.run.cfg.test_weights == "best" and (self.ends or self.step > 0)
        return keeps and self.run.save_best(self.step, loss, self.trained)


@dataclass
class Step:
    """A step that all ranks have agreed to take; update ends it."""

    run: Run
    step: int  # steps taken before: 0 at the first
    batch: list[int]  # the global batch: numbers of rows, packs or blocks
    rows: list[int]  # this rank's share of it; may be empty
    targets: float  # of the global batch, or the sum of its rows' weights
    schedule_length: float  # steps that the schedule spans: total_steps, or what the clock leaves
    total_steps: int
    where: str  # after this step
    read: int  # examples or tokens of the global batch, for the rate
    at_peak: float = 0.0  # seconds that its FLOPs would take at the cards' peak; 0 where that is not known
    optimizer: Any = None
    loss_sum: float = math.nan
    norm: Any = None  # of the gradients, where they are
    grad_norm: float = math.nan  # the same as a number
    left_out: bool = False
    spike: dict = field(default_factory=dict)
    updated: bool = False
    values: dict = field(default_factory=dict)  # of its line
    name: str = "loss"  # there
    logged: bool = False
    evaluates = False

    def spiked(self, losses, norm) -> bool:
        """Whether the mean loss or the gradient norm leaves its usual band. losses: of this rank's
        micro-batches, read here: a card is waited for."""
        self.norm = norm
        self.loss_sum, self.grad_norm = read_step(losses, norm)
        # the overflows of fp16 are the scaler's, no spikes
        if self.run.cfg.dtype == "fp16" and not math.isfinite(self.grad_norm):
            return False
        self.spike = spikes.judge(self.run, self.step + 1, self.loss_sum, self.targets, self.grad_norm)
        self.left_out = self.spike["left_out"]
        if self.spike["odd"]:  # rank 0 will look at the model alone
            shard.fill(self.optimizer)
            self.spike["norms"] = shard.gradient_norms(self.optimizer)
        return bool(self.spike["odd"])

    def note_spike(self, model, facts):
        """Writes the spike to spikes.jsonl, with `facts` of what the step read; a rise is one line here."""
        if self.run.world.is_main:
            spikes.note(self.run, self.spike, model, facts)

    def update(self, optimizer, precision, lr, *, beta1=None, objective=False, **values):
        """Updates the weights at `lr`, unless a spike is left out; counts the step; logs, with `values`.

        objective: the loss holds more than val/loss does (smoothing, z-loss): logged as train/objective.
        """
        if self.norm is None:
            raise RuntimeError("at.update(...) comes after at.spiked(losses, norm)")
        run, cfg, step = self.run, self.run.cfg, self.step + 1
        known = self.grad_norm
        optimizer_step(optimizer, precision, cfg.clip, lr, beta1, self.norm, self.left_out, known)
        run.step_done(self.loss_sum, self.targets, self.read, self.at_peak)
        if cfg.max_minutes is not None:  # such a run is not repeated to the bit: its path is kept
            run.metrics(step, {"clock/lr": lr, "clock/share": run.clock.share}, flush=False)
        self.values = {"lr": lr, "grad_norm": known, **values}
        self.name = "objective" if objective else "loss"
        if step % cfg.log_every == 0 or step == self.total_steps:
            self.log()
        self.updated = True

    def log(self):
        """Logs this step, and the loss since the last one that was; once."""
        if not self.logged:
            length = round(self.schedule_length)
            self.run.log_training(self.where, self.step + 1, length, self.values, self.name)
        self.logged = True


FOREVER = 10**9  # steps, where only the clock ends a run


def count_steps(cfg, batches, most=FOREVER) -> int:
    """Steps of a run by epochs, max_steps and `most`: the least of them. FOREVER: only the clock ends it."""
    epochs = None if cfg.epochs is None else cfg.epochs * len(batches)
    return min(steps for steps in (epochs, cfg.max_steps, most) if steps is not None)


def epoch_line(run, batches, step) -> str:
    """How far a run is after `step` steps, for its lines."""
    fold = f"fold {run.fold + 1} " if getattr(run.cfg, "folds", None) else ""
    planned = f"/{run.cfg.epochs}" if run.cfg.epochs else ""
    return f"{fold}epoch {step / len(batches):.3g}{planned}"


def compile_if_worth_it(run, seconds) -> bool:
    """With compile auto, on an NVIDIA card: whether training, which takes that long, is now compiled.
    config.json keeps what was decided, so that a resume computes the same. All ranks."""
    cfg = run.cfg
    if cfg.compile != "auto" or run.world.device.type != "cuda":
        return False
    seconds = min(seconds, 60 * (cfg.max_minutes or math.inf))
    run.compiles = on_main(run.world, _decided, run.folder, seconds >= compiling.WORTH)
    run.pin("compiled", run.compiles)
    compiling.switch(run.compiles, falls_back=True)
    if run.compiles:
        run.say("training is compiled: its length repays some minute of start-up (--no-compile: it is not)")
    return run.compiles


def _decided(folder, now) -> bool:
    return read_config(folder)["facts"].get("compiled", now)


def steps(
    run, batches, targets_of, saved, total_steps, *, evaluate_first=False, every=None, where=epoch_line
) -> Iterator[Evaluation | Step]:
    """Yields what comes next until the run ends: an Evaluation, or a Step to take. Stop after a signal.

    targets_of(rows): number of targets, or weight, whole or of each row. saved: (what a checkpoint holds of
    the model, optimizer, precision), restored by run.load. every: steps between evaluations (none: an epoch).
    With save_every, checkpoints are written every so many steps instead of before each evaluation.
    """
    cfg, world, step, at = run.cfg, run.world, run.step, None
    every = every or cfg.eval_every or len(batches)
    profile = profiling.Profile(run)
    while True:
        ends = step >= total_steps
        due = ends or (step % every == 0 and (step > 0 or evaluate_first))
        saves = step % cfg.save_every == 0 if cfg.save_every else due
        if ends or (saves and step > 0):
            run.save(step, *saved, must=ends)
        if due:
            profile.end_at(ends)
            shard.fill(saved[1])  # evaluations, and what follows the last step, see a plain model
        if due and (ends or run.state.get("evaluated") != step):  # the last one says that it is
            late = ends or 2 * step >= total_steps or run.clock.share >= 0.5
            safe = step == 0 or run.has_saved(step)  # the disk may have had no room
            yield Evaluation(run, step, where(run, batches, step), late, ends, safe, saved[0])
            run.state["evaluated"] = step  # a resume does not repeat it
        if ends:
            run.rows_ahead = []
            return
        batch = batches.global_batch(step).tolist()
        rows = batch[world.rank :: world.size]
        targets = run.agree(np.sum(targets_of(rows)).item())  # with the signals, in one small reduction
        if run.stopping:
            profile.end_at(True)
            run.save(step, *saved, must=True)
            raise Stop(run.stopping)
        if run.clock.share >= 1:  # max_minutes are spent
            if at:
                at.log()  # no step has known that it is the last
            total_steps = step
            continue
        profile.begin_step()
        reseed(cfg.seed, step, world.rank)  # dropout depends on the position only
        length, read = run.clock.schedule_length(step, total_steps), len(batch)
        if run.unit == "tokens":
            read = int(batches.lengths[batch].sum())
        at_peak = run.at_peak.of(batches.lengths[batch], targets) if run.at_peak else 0.0
        of_run = where(run, batches, step + 1), read, at_peak, saved[1]
        at = Step(run, step, batch, rows, targets, length, total_steps, *of_run)
        more = prepares(world) and step + 1 < total_steps
        run.rows_ahead = batches.rank_batch(step + 1) if more else []
        yield at
        if not at.updated:
            raise RuntimeError(f"step {step} has no at.update(...)")
        step += 1


def rehearse(run, micro_batches, saved, forward_backward, batches, steps_left, share_read=1.0):
    """Makes two steps of the longest rows and discards them. Where memory is too small, micro_batches becomes
    smaller, if nobody has set its size; else UserError. Then says what the run will need. steps_left: none
    says nothing (a later fold). share_read: of the rows' tokens."""
    cfg, world, lengths = run.cfg, run.world, np.asarray(batches.lengths)
    compiling.switch(cfg.compile is True or run.compiles, falls_back=cfg.compile == "auto")
    reseed(cfg.seed, "worst case")
    longest = batches.longest()
    worst = longest[: math.ceil(cfg.batch / world.size)].tolist()
    total = int(lengths[worst].sum())
    fits = functools.partial(forecast.has_room, world, saved[1])
    step = functools.partial(forward_backward, worst, total)
    seconds = worst_case(world, micro_batches, step, saved[1], worst, fits)
    run.poll()
    if micro_batches.found:
        name, before, after = micro_batches.found
        run.say(f"{name} {before} -> {after}: the largest that fits the longest rows")
        run.note(name, after)  # the constant stays none: a resume, on another card perhaps, looks anew
    model = micro_batches.model
    is_sharded = isinstance(model, Sharded)
    if is_sharded:
        shard.fill(saved[1])  # as for an evaluation: whole weights are part of the peak
    if world.device.type != "cpu" and not getattr(cfg, "pack", False):  # evaluations are of single rows
        _rehearse_evaluation(run, micro_batches, forward_backward, longest)
    model = getattr(model, "module", getattr(model, "twin", model))
    run.at_peak, note = flops.seconds_at_peak(model, world, cfg.dtype, share_read)
    steps_left = cfg.find_steps if cfg.mode == "find_lr" else steps_left
    if steps_left is not None:
        for line in filter(None, [note]):
            run.say(line)
        typical = lengths.mean() / lengths[worst].mean()
        if not is_sharded and compile_if_worth_it(run, steps_left * seconds * typical):
            # compiles now, not within the clock of the first step
            seconds = worst_case(world, micro_batches, step, saved[1], worst, fits)
        run.forecast(*saved[:2], steps_left, seconds, typical)


def _rehearse_evaluation(run, micro_batches, forward_backward, longest):
    """A forward of as many of the longest rows as an evaluation sees at once: its memory is then part of the
    forecast. UserError if it is too small."""
    rows = longest[: math.ceil(run.cfg.eval_batch / run.world.size)].tolist()
    with micro_batches.for_evaluation(), torch.no_grad():
        failed = runs_out_of_memory(functools.partial(forward_backward, rows, 1))
    if all_reduce_sum(run.world, torch.tensor(float(failed))).item():
        better = f"--eval_batch {max(1, run.cfg.eval_batch // 2)}"
        raise UserError(f"out of memory in an evaluation with {len(rows)} of the longest rows: use {better}")
