"""The order of things in training: what is saved, evaluated and agreed on before which step."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import core
from core import UserError, World
from lab.errors import Stop
from lab.run import forecast
from lab.train import batches as loop_batches
from lab.train import loop

CONSTANTS = {
    "eval_every": 4, "save_every": None, "test_weights": "last", "max_minutes": None, "log_every": 3,
    "epochs": 2, "folds": None, "seed": 5, "clip": None, "dtype": "fp32", "skip_spikes": False,
    "micro_batch": None, "batch": 2, "mode": "train", "profile": None,
} | {"compile": False}  # fmt: skip


class Recorded:
    """A Run that only notes what it is asked to do."""

    def __init__(self, world=None, step=0, stops_at=None, clock_ends_at=None, **constants):
        self.cfg, self.world = SimpleNamespace(**(CONSTANTS | constants)), world or World()
        self.step, self.state, self.unit, self.first_step, self.fold = step, {}, "tokens", 0, 0
        self.stopping, self.events, self.agreed = None, [], 0
        self.at_peak, self.profiled, self.compiles = None, False, False
        self.clock = SimpleNamespace(share=0.0, schedule_length=lambda step, total_steps: total_steps)
        self.stops_at, self.clock_ends_at = stops_at, clock_ends_at
        self.rows_ahead, self.lines, self.noted = [], [], {}
        self.say = self.lines.append
        self.newest, self.no_room_at = step, ()

    def save(self, step, *saved, must=False):
        self.events.append(f"save {step}{' must' if must else ''}")
        self.newest = self.newest if step in self.no_room_at else step

    def has_saved(self, step):
        return self.newest == step

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

    def step_done(self, loss_sum, targets, examples, at_peak):
        self.events.append(f"done {targets} targets {examples} tokens")

    def metrics(self, step, values, flush):
        assert not flush  # it comes with every step
        self.events.append(f"metrics {step} {sorted(values)}")

    def log_training(self, where, step, total_steps, values, name):
        assert name == "loss"
        self.events.append(f"log {where} {step}/{total_steps} {sorted(values)}")

    def note(self, name, value):
        self.noted[name] = value

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
        at.spiked([torch.tensor(1.0)], core.gradient_norm(optimizer, precision))
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


def test_where_a_checkpoint_found_no_room_a_signal_waits_for_the_end_of_the_evaluation():
    run, saved = Recorded(eval_every=2), {}
    run.no_room_at = (4,)
    through(run, 8, evaluate=lambda at: saved.update({at.step: at.saved}), evaluate_first=True)
    assert saved == {0: True, 2: True, 4: False, 6: True, 8: True}


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


def test_a_clock_that_ends_right_behind_an_evaluation_ends_in_one_that_knows_it_is_the_last():
    for run in (Recorded(clock_ends_at=4), Recorded(step=4)):
        run.state["evaluated"] = run.step  # of a resumed run: by a process that planned further
        assert through(run, 10**9 if run.step == 0 else 4)[-1] == "evaluate 4 ends"


def test_steps_that_the_clock_leaves_behind_the_last_line_are_logged():
    for ends_at, logged in [(5, ["3/", "5/"]), (6, ["3/", "6/"])]:
        run = Recorded(clock_ends_at=ends_at, epochs=None)
        events = through(run, 10**9)
        lines = [event.split()[3] for event in run.events if event.startswith("log")]
        assert [line[:2] for line in lines] == logged and events[-1] == f"evaluate {ends_at} ends"


def test_late_is_the_second_half():
    late = {}
    through(Recorded(eval_every=2), 6, evaluate=lambda at: late.update({at.step: at.late}))
    assert late == {2: False, 4: True, 6: True}
    run, late = Recorded(eval_every=1, clock_ends_at=3), {}
    run.clock.share = 0.0
    half = {"evaluate": lambda at: late.update({at.step: at.late}), "evaluate_first": True}
    agree = run.agree

    def halved(targets):
        agree(targets)
        run.clock.share = max(run.clock.share, 0.5 * (run.agreed > 1))
        return targets

    run.agree = halved
    through(run, 10**9, **half)
    assert late == {0: False, 1: False, 2: True, 3: True}  # where the clock alone ends a run


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


class Weights(nn.Module):
    """Sums its rows; there is memory for `room` of them at once."""

    def __init__(self, room=10):
        super().__init__()
        self.weight, self.room, self.seen = nn.Parameter(torch.ones(1)), room, []

    def forward(self, rows):
        self.seen.append(len(rows) if torch.is_grad_enabled() else f"{len(rows)} {self.training}")
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (self.weight * rows).sum()


def rehearsed(run, room=10, lengths=(3, 5, 10, 2, 10, 2, 2, 2, 2, 2), grouped=False, steps_left=7):
    """What a rehearsal with memory for `room` rows computed: sizes of forwards, the rows of each step."""
    model, lengths, steps = Weights(room), np.array(lengths), []
    parts = core.MicroBatches(
        run, model, lambda part, device: torch.tensor(part), lengths if grouped else None
    )

    def forward_backward(rows, targets):
        steps.append((rows, targets))
        for _, batch in parts(rows):
            core.scaled_backward(model(batch), run.world, targets, core.Precision("fp32", World()))

    batches = core.ShardedBatches(lengths, run.cfg.batch, run.world, seed=1)
    loop.rehearse(
        run, parts, ("weights", torch.optim.SGD([model.weight]), None), forward_backward, batches, steps_left
    )
    assert model.weight.grad is None and model.training and parts.size != sys.maxsize
    return model.seen, steps


@pytest.mark.parametrize("worth", [False, True])
def test_what_is_compiled_unasked_is_compiled_before_the_clock_starts(worth, monkeypatch):
    """Its first step took a minute of max_minutes, and the schedule with it."""
    events = []
    monkeypatch.setattr(loop, "compile_if_worth_it", lambda run, seconds: events.append("decided") or worth)
    run = Recorded(batch=2)
    run.forecast = lambda *given: events.append("forecast")
    seen, _ = rehearsed(run)
    assert events == ["decided", "forecast"] and seen == [2, 2] * (1 + worth)


@pytest.mark.parametrize(
    ("constants", "sizes"), [({}, [2, 2]), ({"micro_batch": 1}, [1] * 4), ({"micro_tokens": 8}, [1] * 4)]
)
def test_the_rehearsal_takes_the_longest_rows_and_says_what_a_usual_step_costs(constants, sizes, monkeypatch):
    """4 of 10 tokens in the mean: a step of the longest rows lasts longer than a usual one."""
    run = Recorded(**constants)
    seen, steps = rehearsed(run, grouped="micro_tokens" in constants)
    assert seen == sizes and steps == [([2, 4], 20)] * 2
    (poll, (word, steps_left, seconds, typical)) = run.events
    assert (poll, word, steps_left, typical) == ("poll", "forecast", 7, 0.4) and seconds > 0
    rehearsed(run, steps_left=None)
    assert run.events[2:] == ["poll"]  # a later fold says nothing


def test_a_micro_batch_that_nobody_has_set_is_the_largest_that_fits():
    run = Recorded(batch=8)
    seen, _ = rehearsed(run, room=3)
    assert seen == [8, 4, *[2] * 4, *[2] * 4]
    assert run.lines == ["micro_batch 8 -> 2: the largest that fits the longest rows"]
    assert run.noted == {"micro_batch": 2}


def test_groups_of_similar_rows_are_halved_by_their_tokens():
    run = Recorded(batch=8, micro_tokens=8192)
    seen, _ = rehearsed(run, room=3, lengths=[10] * 4 + [4] * 4, grouped=True)
    assert seen == [8, 4, 2, 2, 4, *[1, 1, 1, 1, 2, 2] * 2]
    assert run.lines == ["micro_tokens 8192 -> 10: the largest that fits the longest rows"]


@pytest.mark.parametrize(
    ("constants", "room", "line"),
    [({"micro_batch": 4}, 3, "with 4 of the longest rows at once: use --micro_batch 2"),
     ({}, 0, "with 1 of the longest rows at once: use shorter rows or a smaller model")],
)  # fmt: skip
def test_a_micro_batch_that_was_typed_stays_and_a_row_that_does_not_fit_is_refused(constants, room, line):
    with pytest.raises(UserError, match=line):
        rehearsed(Recorded(batch=8, **constants), room=room)


def test_what_comes_later_needs_room_too(monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(forecast, "has_room", lambda world, optimizer: next(answers))
    run = Recorded(batch=8)
    assert rehearsed(run)[0] == [8, 4, 4, *[2] * 8]
    monkeypatch.setattr(forecast, "has_room", lambda world, optimizer: False)
    run = Recorded(batch=8, micro_batch=4)  # whether that is too much says the forecast, with figures
    assert rehearsed(run)[0] == [4] * 4 and not run.lines


def test_one_rank_that_is_short_of_memory_makes_the_parts_of_all_smaller(monkeypatch):
    """This rank has room for all; the other reports that it has none, once."""
    others = iter([[1, 0], [0, 0]])
    monkeypatch.setattr(loop_batches, "all_reduce_sum", lambda world, mine: mine + torch.tensor(next(others)))
    run = Recorded(batch=8)
    assert rehearsed(run)[0] == [8, 4, 4, 4, 4]


@pytest.fixture
def card(monkeypatch):
    """A World whose device is no CPU, with memory of its own."""
    monkeypatch.setattr(loop.flops, "seconds_at_peak", lambda *given: (None, None))
    nothing = SimpleNamespace(synchronize=list, empty_cache=list, reset_peak_memory_stats=list)
    nothing.max_memory_allocated = lambda: 1e9
    nothing.memory_reserved = nothing.memory_allocated = lambda device: 0
    nothing.mem_get_info = lambda device: (8e9, 8e9)
    monkeypatch.setattr(torch, "pretended", nothing, raising=False)
    return World(device=SimpleNamespace(type="pretended"))


def test_on_a_card_an_evaluation_is_rehearsed_too(card):
    run = Recorded(card, batch=4, micro_batch=2, eval_batch=6)
    seen, steps = rehearsed(run, room=6)
    assert seen == [2] * 4 + ["6 False"]  # without gradients, in one part, as an evaluation has them
    assert steps[-1] == ([2, 4, 1, 0, 3, 5], 1) and run.events[0] == "poll"
    with pytest.raises(UserError, match="in an evaluation with 7 of the longest rows: use --eval_batch 3"):
        rehearsed(Recorded(card, batch=4, eval_batch=7), room=6)


def test_weights_that_ranks_share_are_whole_once_and_training_is_not_compiled_unasked(card, monkeypatch):
    done = []
    monkeypatch.setattr(loop.shard, "fill", lambda optimizer: done.append("whole"))
    monkeypatch.setattr(loop, "compile_if_worth_it", lambda run, seconds: done.append("compiled"))
    rehearsed(Recorded(card, batch=4, eval_batch=6), room=6)
    assert done == ["compiled"]
    monkeypatch.setattr(loop, "Sharded", Weights)
    seen, _ = rehearsed(Recorded(card, batch=4, eval_batch=6), room=6)
    assert done == ["compiled", "whole"] and seen == [4, 4, "6 False"]
