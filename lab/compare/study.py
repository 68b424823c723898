"""Mode study of a training script: arms x seeds. Each is a run of its own, which the same command finds
again, skips when it is finished and resumes when it is not; then a table, verdicts in words, one picture.

An arm is a list of constants, a preset, or both: `lr=1e-4`, `lora_rank=64,lora_alpha=64`, `run_15,lr=1e-5`.
It is what its command would be: the words of the study's, and the arm's after them.
"""

import contextlib
import gc
import itertools
import math
import os
import shlex
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lab.compare.difference import SHARES, difference, mean, verdict
from lab.compare.facts import LENGTH, alarm_notes, read
from lab.compare.rows import shared_rows
from lab.compare.tables import markdown, slug
from lab.errors import Stop, UserError
from lab.measure.statistics import span
from lab.run.files import short_hash, whole_file, write_json
from lab.run.flags import STUDY_CONSTANTS, constants_of, counting, names_of, parsed_config
from lab.run.forecast import runs_line
from lab.run.meter import clock
from lab.run.resume import CALL_CONSTANTS, MAY_CHANGE, finished_run
from lab.run.signals import listening
from lab.run.stored import out_folder, read_result
from lab.train.precision import with_dtype
from lab.train.processes import barrier, on_main

NOT_AN_ARMS = CALL_CONSTANTS | STUDY_CONSTANTS | {"mode", "seed", "note", "price_per_hour"}


@dataclass
class Arm:
    """One side of a study: its words, the constants that they name, its runs' constants but for the seed."""

    name: str
    values: dict
    cfg: object


@dataclass
class Plan:
    """What a script brings to its study. main(cfg, world) trains one run."""

    cfg: object
    world: object
    script: str
    config: type
    presets: dict
    smoke: dict
    main: object
    may_differ: frozenset | None = None  # constants that an arm may name; none = all but bookkeeping
    own: frozenset = frozenset()  # constants of the script's own studies: no run reads them

    def say(self, text):
        if self.world.is_main:
            print(text, flush=True)


def study(cfg, world, script, config, presets, smoke, main):
    """Makes the runs that are missing and writes study-<hash>/study.md, study.json and study.png."""
    plan = Plan(cfg, world, script, config, presets, smoke, main)
    arms = arms_of(plan)
    folder = out_folder(cfg, script) / f"study-{short_hash([cfg.seed, *(arm.cfg.tag for arm in arms)], 6)}"
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    planned = [(arm.name, run_config(arm, seed)) for seed in seeds for arm in arms]
    with continued(plan) as poll:
        runs = make_runs(plan, planned, poll)
        on_main(world, report, plan, arms, runs, folder)


@contextlib.contextmanager
def continued(plan):
    """Yields poll(), which raises Stop on all ranks after a signal or max_hours; says how a study goes on."""
    timer = None
    if (hours := plan.cfg.max_hours) is not None and plan.world.is_main:
        # a signal: saved between two steps, and agreed on
        timer = threading.Timer(3600 * hours, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    try:
        with listening(plan.world) as poll:
            yield poll
    except Stop:
        plan.say("next: the same command continues the study")
        raise
    finally:
        if timer:
            timer.cancel()


# -- arms --------------------------------------------------------------------------------------------------


def arms_of(plan) -> list[Arm]:
    """The arms of --arms, then all products of --grid. UserError for what is none, or twice the same."""
    words = [*plan.cfg.arms, *products(plan.cfg.grid)]
    if not words:
        raise UserError("--mode study needs --arms (lr=1e-4 lr=3e-4, or presets) or --grid (lr=1e-4,3e-4)")
    return different(plan, words)


def different(plan, words) -> list[Arm]:
    """An arm for each word. UserError where two are the same."""
    arms = [arm_of(plan, word) for word in words]
    for one, other in itertools.combinations(arms, 2):
        if one.cfg.tag.rpartition("-")[2] == other.cfg.tag.rpartition("-")[2]:  # of all constants
            raise UserError(f"--arms {one.name} and {other.name} are the same run: leave one out")
    return arms


def products(grid) -> list[str]:
    """["lr=1,2", "rank=8,9"] -> ["lr=1,rank=8", "lr=1,rank=9", "lr=2,rank=8", "lr=2,rank=9"]"""
    columns = []
    for word in grid:
        name, equals, values = word.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--grid {word} is no name=value,value,...")
        columns.append([f"{name}={value}" for value in values.split(",")])
    return [",".join(chosen) for chosen in itertools.product(*columns)] if columns else []


def arm_of(plan, word, flag="--arms", called=None) -> Arm:
    """An arm, as its own command would have it; no word: as the study's command has it. flag: where the word
    stood; called: in the names of its folders, if not by the word."""
    constants = {*names_of(plan.config)} - NOT_AN_ARMS
    constants &= constants if plan.may_differ is None else plan.may_differ
    preset, flags, names = None, [], []
    for part in word.split(",") if word else ():
        name, equals, value = part.strip().partition("=")
        if not equals and name in plan.presets and preset is None and not names:
            preset = name
        elif equals and name in constants:
            names.append(name)
            flags += as_flags(name, {"true": True, "false": False}.get(value, value))
        else:
            known = f"a preset ({', '.join(plan.presets)}) or " if plan.presets else ""
            which = "" if plan.may_differ is None else f" of {', '.join(sorted(constants))}"
            raise UserError(f"{flag} {word}: {part.strip()!r} is not {known}constant=value{which}")
    try:
        cfg = parsed_config(
            plan.config, plan.presets, plan.smoke, "", [*command_of(plan.cfg, preset, plan.own), *flags]
        )
    except UserError as error:
        raise UserError(f"{flag} {word}: {error}") from None
    if getattr(cfg, "model", None) == "newest":
        raise UserError(f"{flag} {word}: the newest run would be another one each time, use model=<run>")
    cfg, no_arms = replace(cfg, mode="train", seed=plan.cfg.seed), NOT_AN_ARMS | plan.own
    overrides = {name: value for name, value in cfg.typed.overrides.items() if name not in no_arms}
    ignored = CALL_CONSTANTS | STUDY_CONSTANTS | plan.own | (MAY_CHANGE - LENGTH) | {"seed"}
    constants = {name: value for name, value in constants_of(cfg).items() if name not in ignored}
    prefix = [plan.cfg.tag] if "tag" in plan.cfg.typed.flags else []
    tag = "-".join([*prefix, called or slug(word)[:40], short_hash(constants, 6)])
    cfg = with_dtype(replace(cfg, tag=tag, out=plan.cfg.out), plan.world)  # as its runs will have it
    cfg = counting(cfg, overrides=overrides, flags=cfg.typed.flags | {"tag"})
    return Arm(word, {name: getattr(cfg, name) for name in names}, cfg)


def command_of(cfg, preset=None, own=frozenset()) -> list[str]:
    """The words of a study's command that its runs share; an arm's preset stands for the study's. own: names
    of constants that they do not share, beside a study's."""
    t = cfg.typed
    argv = ["--smoke"] * t.smoke
    argv += ["--preset", preset or t.preset] if preset or t.preset else []
    for name in sorted(t.flags - CALL_CONSTANTS - STUDY_CONSTANTS - own - {"mode", "seed"}):
        argv += as_flags(name, getattr(cfg, name))
    return argv


def as_flags(name, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *value]
    return [f"--{name}={'none' if value is None else value}"]  # a value may begin with a dash


# -- runs --------------------------------------------------------------------------------------------------


def make_runs(plan, planned, poll) -> dict[str, list[Path]]:
    """arm -> folders of its finished runs, one a seed. planned: (arm, constants of a run), in the order in
    which they are made. Stop if one is stopped."""
    runs, seconds = {arm: [] for arm, _ in planned}, []
    there = [on_main(plan.world, finished_folder, cfg, plan.script) for _, cfg in planned]
    plan.say(f"study  {len(runs)} arms x {plan.cfg.seeds} seeds: {len(planned)} runs, "
           f"{sum(map(bool, there))} of them finished")  # fmt: skip
    for number, (arm, cfg) in enumerate(planned):
        plan.say(f"study  run {number + 1} of {len(planned)}  {arm}  seed {cfg.seed}")
        is_first = "" not in there[:number]  # of those to be made: it forecasts them all
        folder = one_run(plan, counting(cfg, runs=there.count("")) if is_first else cfg)
        runs[arm].append(Path(folder))
        seconds.append(on_main(plan.world, seconds_of, folder))
        left = there[number + 1 :].count("")
        if left and not there[number]:
            hours = left * sum(seconds) / len(seconds) / 3600
            plan.say(runs_line(left, hours, plan.cfg.price_per_hour))
        poll()
    return runs


def run_config(arm, seed, changes=None):
    """The constants of an arm's run, which is found again by its tag. changes: name -> value, constants that
    the study itself gives to its arms (a base, a length)."""
    given = changes or {}
    tag = "-".join([arm.cfg.tag, *([short_hash(given, 6)] if given else []), f"s{seed}"])
    cfg = replace(arm.cfg, seed=seed, tag=tag, resume_timestamp="auto", **given)
    return counting(cfg, flags=cfg.typed.flags | {"seed", *given})


def finished_folder(cfg, script) -> str:
    return str(finished_run(cfg, Path(script)) or "")


def seconds_of(folder) -> float:
    return read_result(folder).get("seconds", 0.0)


def one_run(plan, cfg) -> str:
    """Trains a run, or resumes it, unless it is finished. Returns its folder; Stop if it was stopped."""
    if folder := on_main(plan.world, finished_folder, cfg, plan.script):
        plan.say(f"finished already: {folder}")
        return folder
    if cfg.compile is True or plan.world.device.type != "cpu":  # each compiles for itself, as alone
        torch.compiler.reset()
    if plan.world.device.type != "cpu":  # what the last run left is not this one's
        gc.collect()
        getattr(torch, plan.world.device.type).empty_cache()
        getattr(torch, plan.world.device.type).reset_peak_memory_stats()
    plan.main(replace(cfg, profile=plan.cfg.profile), plan.world)  # of this call, not of the run
    folder = on_main(plan.world, finished_folder, cfg, plan.script)
    if not folder:
        barrier(plan.world)  # all ranks have read what rank 0 said last, before it leaves
        raise Stop("the study")
    return folder


# -- conclusions -------------------------------------------------------------------------------------------


def report(plan, arms, runs, folder):
    """Rank 0: writes table, verdicts and picture, and shows them."""
    facts = [read(path) for arm in arms for path in runs[arm.name]]
    size = plan.cfg.seeds
    at = {arm.name: list(range(n * size, (n + 1) * size)) for n, arm in enumerate(arms)}
    validation = {arm.name: validation_loss(facts, at[arm.name]) for arm in arms}
    means, told = figures_of(arms, facts, at, validation)
    lines = ["# Study", "", f"`python {Path(plan.script).name} {shlex.join(words_of(plan))}`", ""]
    lines += [table(plan, arms, facts, at, validation, means), ""]
    notes = [] if told[:1] and told[0].startswith(NO_VERDICT) else warnings(plan, arms, validation)
    lines += [*told, "", *notes, *alarm_notes([(one.tag or one.name, one) for one in facts])]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines).rstrip() + "\n"
    with whole_file(folder / "study.md") as file:
        file.write(text)
    found = {name: [str(path) for path in paths] for name, paths in runs.items()}
    write_json(folder / "study.json", {"runs": found, "val/loss": validation, "means": means})
    name = next(iter(means))
    draw(arms, f"{facts[0].part} {name}", means[name], folder / "study.png")
    plan.say(f"{text}done  {folder}/study.md  picture: study.png there")
    plan.say(f"next: python eval.py --table {out_folder(plan.cfg, plan.script)}")


NO_VERDICT = "NOTE no verdict, and no arm is chosen: they were validated and tested on different rows"


def figures_of(arms, facts, at, validation) -> tuple[dict, list[str]]:
    """figure -> arm -> mean and interval; verdicts. Arms tested on other rows have figures, no verdict."""
    try:
        every = shared_rows(facts)
        lines = verdicts(arms, at, validation, every[0])
        return {
            rows.name: {arm.name: possible_mean(rows, at[arm.name]) for arm in arms} for rows in every
        }, lines
    except UserError as error:
        lines = [f"{NO_VERDICT}: {error}"]
    means = {}
    for arm in arms:
        for rows in shared_rows([facts[i] for i in at[arm.name]]):
            means.setdefault(rows.name, {})[arm.name] = possible_mean(rows, list(range(len(rows.sums))))
    return means, lines


def possible_mean(rows, side) -> dict:
    """The mean of the runs `side`, its interval cut to what the figure can be: Student's t has no limits."""
    figure, most = mean(rows, side), 1.0 if rows.name in SHARES else math.inf
    low, high = figure["interval"]
    return figure | {"interval": [max(low, 0.0), min(high, most)]}


def words_of(plan) -> list[str]:
    """The study's command, for its report."""
    names = [name for name in ("arms", "grid", "seeds") if getattr(plan.cfg, name)]
    names += sorted({"seed", "tag", "out"} & plan.cfg.typed.flags)
    given = [as_flags(name, getattr(plan.cfg, name)) for name in names]
    return ["--mode", "study", *command_of(plan.cfg), *itertools.chain(*given)]


def validation_loss(facts, at) -> float:
    names = ("val/loss", "val/log_loss")
    values = [next(facts[i].result[name] for name in names if name in facts[i].result) for i in at]
    return sum(values) / len(values)


def table(plan, arms, facts, at, validation, means) -> str:
    """Markdown: a row an arm, with figures on the test rows and their 95 % intervals."""
    cells = {"arm": [arm.name for arm in arms], "runs": [plan.cfg.seeds] * len(arms)}
    cells["val loss"] = [f"{validation[arm.name]:.4f}" for arm in arms]
    for name, by_arm in means.items():
        cells[f"{facts[0].part} {name}"] = [shown(by_arm[arm.name]) for arm in arms]
    seconds = {arm.name: sum(facts[i].result["seconds"] for i in at[arm.name]) for arm in arms}
    cells["time"] = [clock(seconds[arm.name]) for arm in arms]
    if plan.cfg.price_per_hour:
        cells["dollars"] = [f"{seconds[arm.name] / 3600 * plan.cfg.price_per_hour:.2f}" for arm in arms]
    return markdown(cells)


def shown(figure) -> str:
    return f"{figure['mean']:.4f} ({span(figure['interval'])})"


def verdicts(arms, at, validation, rows) -> list[str]:
    """Sentences: each arm against the first; the best on validation against the second best."""
    lines, best = [], sorted(arms, key=lambda arm: validation[arm.name])[:2]
    pairs = [(arms[0], arm) for arm in arms[1:]]
    if len(arms) > 2 and arms[0] not in best:
        pairs.append(tuple(best))
    for one, other in pairs:
        names = one.name, other.name
        figure = difference(rows, at[one.name], at[other.name])
        lines.append(f"{names[0]} - {names[1]}  {verdict(figure, rows.name, names)}")
    if len(lines) > 2:
        lines.append(f"{len(lines)} comparisons: of 20 between equals one looks like a difference")
    return lines


def warnings(plan, arms, validation) -> list[str]:
    """What a reader should know of the choice."""
    best = min(arms, key=lambda arm: validation[arm.name])
    lines = [f"chosen by validation loss: {best.name}; what is told apart above is told on the test rows"]
    if not plan.cfg.final_eval:
        lines = [f"NOTE {best.name} was chosen on the rows it is reported on: use --final_eval"]
    for name, value in best.values.items():
        values = {arm.values[name] for arm in arms if type(arm.values.get(name)) in (int, float)}
        if len(values) > 1 and value in (min(values), max(values)):
            side = "smaller" if value == min(values) else "larger"
            lines.append(f"NOTE the best {name}, {value:g}, is at the edge of what was tried: try {side}")
    if plan.cfg.seeds == 1:
        lines.append("NOTE one seed: another one may differ by more than these rows' noise; use --seeds 3")
    return lines


EACH_RUN = {"linestyle": "", "marker": "x", "color": "C1", "markersize": 5}


def draw(arms, name, means, path):
    """A curve with a band over the one numeric constant that the arms differ in, otherwise bars; and each
    run, since a wide interval may be two seeds that learnt and one that did not."""
    from matplotlib.figure import Figure

    values = [means[arm.name] for arm in arms]
    middle, low, high = [v["mean"] for v in values], *zip(*(v["interval"] for v in values), strict=True)
    figure = Figure(figsize=(8, max(3.0, 0.5 * len(arms) + 1.5)), layout="constrained")
    axes, label = figure.subplots(), f"{name}: mean with 95 % interval, and each run (x)"
    names = {constant for arm in arms for constant in arm.values}
    numbers = [next(iter(arm.values.values()), None) for arm in arms]
    if len(names) == 1 and len(arms) > 2 and all(type(n) in (int, float) for n in numbers):
        order = sorted(range(len(arms)), key=lambda i: numbers[i])
        x, y = [numbers[i] for i in order], [middle[i] for i in order]
        axes.plot(x, y, "o-")
        for i in order:
            axes.plot([numbers[i]] * len(values[i]["runs"]), values[i]["runs"], **EACH_RUN)
        axes.fill_between(x, [low[i] for i in order], [high[i] for i in order], alpha=0.2, label="95 %")
        axes.set(xlabel=names.pop(), ylabel=label, xscale="log" if x[0] > 0 else "linear")
        axes.legend()
    else:
        rows = range(len(arms))[::-1]
        errors = [np.subtract(middle, low), np.subtract(high, middle)]
        axes.errorbar(middle, rows, xerr=errors, fmt="o", capsize=3)
        for row, value in zip(rows, values, strict=True):
            axes.plot(value["runs"], [row] * len(value["runs"]), **EACH_RUN)
        axes.set_yticks(list(rows), [arm.name for arm in arms])
        axes.set(xlabel=label, ylim=(-0.5, len(arms) - 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
