"""The order of things in training: what is saved, evaluated and agreed on before which step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import core
from core import World
from lab.errors import Stop
from lab.train import loop

CONSTANTS = {
    "eval_every": 4, "save_every": None, "test_weights": "last", "max_minutes": None, "log_every": 3,
    "epochs": 2, "folds": None, "seed": 5, "clip": None, "dtype": "fp32", "skip_spikes": False,
    "micro_batch": None, "batch": 2, "mode": "train",
}  # fmt: skip


class Recorded:
    """A Run that only notes what it is asked to do."""

    def __init__(self, world=None, step=0, stops_at=None, clock_ends_at=None, **constants):
        self.cfg, self.world = SimpleNamespace(**(CONSTANTS | constants)), world or World()
        self.step, self.state, self.unit, self.first_step, self.fold = step, {}, "tokens", 0, 0
        self.stopping, self.events, self.agreed = None, [], 0
        self.clock = SimpleNamespace(share=0.0, schedule_length=lambda step, total_steps: total_steps)
        self.stops_at, self.clock_ends_at = stops_at, clock_ends_at

    def save(self, step, *saved, must=False):
        self.events.append(f"save {step}{' must' if must else ''}")

    def save_best(self, step, loss, trained):
        self.events.append(f"best {step} {loss} {trained}")
        return True

    def agree(self, targets=0):
        self.agreed += 1
        self.stopping = "SIGTERM" if self.stops_at is not None and self.agreed > self.stops_at else None
        spent = self.clock_ends_at is not None and self.agreed > self.clock_ends_at
        self.clock.share = 1.0 if spent else 0.01 * self.agreed
        return targets

    def poll(self, active=0):
        self.events.append("poll")
        return active

    def require_finite(self, loss):
        assert loss == 0.5

    def step_done(self, loss_sum, targets, examples):
        self.events.append(f"done {targets} targets {examples} tokens")

    def metrics(self, step, values):
        self.events.append(f"metrics {step} {sorted(values)}")

    def log_training(self, where, step, total_steps, values, name):
        assert name == "loss"
        self.events.append(f"log {where} {step}/{total_steps} {sorted(values)}")

    def forecast(self, *needs):
        self.events.append(("forecast", *needs[2:]))


def through(run, total_steps, evaluate=None, **how) -> list[str]:
    """What happens on the way through core.steps, as words."""
    batches = core.ShardedBatches([3, 5, 4, 3, 6, 4, 3, 4, 5, 3], 2, run.world, seed=1)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight])
    precision = core.Precision("fp32", World())
    for at in core.steps(run, batches, len, ("weights", optimizer, precision), total_steps, **how):
        if at.evaluates:
            run.events.append(f"evaluate {at.step}{' ends' if at.ends else ''}")
            if evaluate:
                evaluate(at)
            continue
        assert at.batch == batches.global_batch(at.step).tolist()
        assert at.rows == batches.rank_batch(at.step)
        weight.grad = torch.ones(2)
        at.spiked(1.0, core.gradient_norm(optimizer, precision))
        at.update(optimizer, precision, 0.1)
        run.events.append(f"step {at.step}")
    return [event for event in run.events if event.split()[0] in ("save", "best", "evaluate", "poll", "step")]


def test_an_evaluation_stands_behind_its_checkpoint_and_the_end_is_saved_in_any_case():
    steps = ["step 0", "step 1", "step 2", "step 3", "save 4", "evaluate 4", "step 4", "step 5"]
    assert through(Recorded(), 6) == [*steps, "save 6 must", "evaluate 6 ends"]


def test_save_every_saves_instead_of_at_evaluations():
    events = through(Recorded(save_every=3), 8)
    saves = [event for event in events if event.startswith("save")]
    assert saves == ["save 3", "save 6", "save 8 must"]
    assert [event for event in events if event.startswith("evaluate")] == ["evaluate 4", "evaluate 8 ends"]


def test_without_a_checkpoint_just_made_a_signal_waits_for_the_end_of_an_evaluation():
    saved, run = {}, Recorded(save_every=4, eval_every=3)
    run.leave_if_signalled = lambda: run.events.append("leave")

    def evaluate(at):
        saved[at.step] = at.saved
        at.poll()
        at.leave_if_signalled()

    events = through(run, 8, evaluate=evaluate)
    assert saved == {3: False, 6: False, 8: True} and events.count("poll") == 1
    assert run.events.count("leave") == 1


def test_an_update_before_the_question_of_spikes_is_an_error_at_once():
    batches = core.ShardedBatches([3] * 4, 2, World(), seed=1)
    at = next(loop.steps(Recorded(), batches, len, (None, None, None), 2))
    with pytest.raises(RuntimeError, match=r"comes after at.spiked"):
        at.update(None, None, 0.1)


def test_a_validation_loss_that_is_no_number_is_an_error_whatever_weights_are_tested():
    run = Recorded(test_weights="last")
    run.require_finite = lambda loss: core.Run.require_finite(run, loss)
    with pytest.raises(FloatingPointError, match="validation loss is nan"):
        through(run, 8, evaluate=lambda at: at.keep_if_best(float("nan")))


def test_the_untrained_model_is_evaluated_where_that_is_asked_for_and_never_kept():
    keep = {"evaluate": lambda at: at.keep_if_best(0.5)}
    first = through(Recorded(test_weights="best"), 2, evaluate_first=True, **keep)
    assert first == ["evaluate 0", "step 0", "step 1", "save 2 must", "evaluate 2 ends", "best 2 0.5 weights"]
    assert through(Recorded(test_weights="best"), 2, **keep) == first[1:]


def test_a_run_of_no_steps_keeps_its_weights():
    keep = {"evaluate": lambda at: at.keep_if_best(0.5)}
    events = ["save 0 must", "evaluate 0 ends", "best 0 0.5 weights"]
    assert through(Recorded(test_weights="best"), 0, **keep) == events


def test_no_best_weights_are_written_where_the_last_ones_are_tested():
    events = through(Recorded(test_weights="last"), 8, evaluate=lambda at: at.keep_if_best(0.5))
    assert not any(event.startswith("best") for event in events)


def test_without_eval_every_an_epoch_lies_between_evaluations_unless_the_script_says_otherwise():
    epochs = ["evaluate 5", "evaluate 10", "evaluate 12 ends"]
    for how, want in [({}, epochs), ({"every": 12}, ["evaluate 12 ends"])]:
        events = through(Recorded(eval_every=None), 12, **how)
        assert [event for event in events if event.startswith("evaluate")] == want


def test_a_resume_evaluates_again_unless_its_checkpoint_is_younger_than_the_evaluation():
    assert through(Recorded(step=4), 5)[:3] == ["save 4", "evaluate 4", "step 4"]
    run = Recorded(step=4)
    run.state["evaluated"] = 4
    assert through(run, 5)[:2] == ["save 4", "step 4"]


def test_a_signal_saves_and_stops_before_the_next_step():
    run = Recorded(stops_at=2)
    with pytest.raises(Stop, match="SIGTERM"):
        through(run, 6)
    assert [event for event in run.events if event.startswith(("step", "save"))] == [
        "step 0", "step 1", "save 2 must"]  # fmt: skip


def test_the_clock_ends_a_run_as_its_last_step_would():
    run = Recorded(clock_ends_at=3, max_minutes=1)
    events = through(run, 10**9)
    assert events[-3:] == ["step 2", "save 3 must", "evaluate 3 ends"]
    clocks = [event for event in run.events if event.startswith("metrics")]
    assert clocks == [f"metrics {step} ['clock/lr', 'clock/share']" for step in (1, 2, 3)]


def test_late_is_the_second_half():
    late = {}
    through(Recorded(eval_every=2), 6, evaluate=lambda at: late.update({at.step: at.late}))
    assert late == {2: False, 4: True, 6: True}


def test_lines_stand_at_every_third_step_and_at_the_last():
    run = Recorded()
    through(run, 5)
    values = "['grad_norm', 'lr']"
    assert [event for event in run.events if event.startswith("log")] == [
        f"log epoch 0.6/2 3/5 {values}", f"log epoch 1/2 5/5 {values}"]  # fmt: skip


def test_rates_count_tokens_or_examples():
    run = Recorded()
    through(run, 5)
    done = [event.split() for event in run.events if event.startswith("done")]
    assert sum(int(words[3]) for words in done) == 40  # all tokens of an epoch
    run = Recorded()
    run.unit = "examples"
    through(run, 5)
    assert all(event == "done 2 targets 2 tokens" for event in run.events if event.startswith("done"))


def test_folds_and_the_clock_alone_are_told_in_the_lines():
    batches = range(5)
    assert loop.epoch_line(Recorded(folds=3), batches, 5) == "fold 1 epoch 1/2"
    assert loop.epoch_line(Recorded(epochs=None), batches, 2) == "epoch 0.4"


def test_a_step_that_is_not_ended_is_an_error():
    batches = core.ShardedBatches([3] * 4, 2, World(), seed=1)
    with pytest.raises(RuntimeError, match=r"step 0 has no at.update"):
        list(loop.steps(Recorded(), batches, len, (None, None, None), 2))


def test_targets_are_whole_numbers_or_one_a_row():
    batches = core.ShardedBatches([3, 4], 2, World(), seed=1)
    for targets_of, want in [(len, 2), (lambda rows: np.array([3, 4])[rows], 7)]:
        assert next(loop.steps(Recorded(), batches, targets_of, (None, None, None), 1)).targets == want


@pytest.mark.parametrize(
    ("constants", "at_once"), [({}, 2), ({"micro_batch": 1}, 1), ({"micro_tokens": 8}, 1)]
)
def test_the_rehearsal_takes_the_longest_rows_and_says_what_a_usual_step_costs(
    constants, at_once, monkeypatch
):
    """4 of 10 tokens in the mean: a step of the longest rows lasts longer than a usual one."""
    asked, run, weight = [], Recorded(**constants), nn.Parameter(torch.ones(1))
    monkeypatch.setattr(loop, "worst_case", lambda *given: asked.append(given) or given[2]() or 2.0)
    batches, shown = core.ShardedBatches([3, 5, 10, 2, 10, 2, 2, 2, 2, 2], 2, World(), seed=1), []
    saved = "weights", torch.optim.SGD([weight]), None
    loop.rehearse(run, "ddp", saved, lambda rows, targets: shown.append((rows, targets)), batches, 7)
    assert shown == [([2, 4], 20)] and asked[0][4] == at_once
    assert run.events == ["poll", ("forecast", 7, 2.0, 0.4)]
    loop.rehearse(run, "ddp", saved, lambda rows, targets: None, batches, None)
    assert run.events[2:] == ["poll"]  # a later fold says nothing


def test_the_rehearsal_names_the_most_rows_at_once_not_those_of_the_longest(monkeypatch):
    asked, run = [], Recorded(batch=4, micro_tokens=10)
    monkeypatch.setattr(loop, "worst_case", lambda *given: asked.append(given[4]) or 1.0)
    batches = core.ShardedBatches([10, 2, 2, 2], 4, World(), seed=1)
    loop.rehearse(run, "ddp", ("weights", None, None), None, batches, None)
    assert asked == [3]
