"""Measures any run again, answers, has answers judged, compares runs, writes the journals' tables.

    python eval.py --run runs/run_lora/20261122_101500                # its own test rows once more
    python eval.py --run RUN gpt2 --data own wikitext.txt rows.json   # several models, several sets
    torchrun --nproc_per_node=4 eval.py --run_folder RUN              # --run is torchrun's own
    python eval.py --mode generate --run gpt2-medium --data RUN/responses.json
    python eval.py --mode judge --run RUN RUN --judge_model llama3    # Ollama; docs/eval.md: others
    python eval.py --compare RUN RUN ...                              # or presets, tags
    python eval.py --table runs/run_lora --group_by preset --plot
    python eval.py --pack RUN                                         # to copy home

What is measured on other data than a run's own stands in a folder below runs/eval/, which
--compare, --table and --mode judge take like a run.
"""

import functools
import importlib
import os
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from torch.distributed.elastic.multiprocessing.errors import record

import core
from lab.compare import eval_folder, facts, grades, judge, plots, responses, sides, tables
from lab.compare.facts import find, read_all
from lab.compare.prompts import as_ids, read_prompts
from lab.data import columns, instructions
from lab.data.paths import is_there
from lab.errors import OutOfMemory
from lab.measure import answers, other_data, preference, tuning
from lab.models import int4, pretrained, trusted
from lab.run import files, pack


@dataclass(frozen=True)
class Config(core.Constants):
    # data
    run_folder: tuple[str, ...] = ()  # runs, transformers folders, Hub ids (short: --run); none = newest
    data: tuple[str, ...] = ("own",)  # own = a run's test rows; text, instruction rows or A/B/tie rows
    max_documents: core.Count | None = None  # rows or documents read of other data; none = all
    text_column: str = "text"  # of a table of texts
    tokenizer: str | None = None  # a folder or Hub id, for a model that brings none
    template: Literal["alpaca", "journal", "chat"] = "alpaca"  # of rows, for a model that is no run
    # measuring and answering
    context: core.within(int, 2) | None = None  # tokens that a window on text holds; none = all the model can
    stride: core.Count | None = None  # tokens from one window to the next; none = half of context
    max_length: core.within(int, 16) = 512  # tokens of an instruction row, for models that bring none
    eval_batch: core.Count | None = None  # rows a step, over all ranks (answering: on each); none = the run's
    dtype: core.Dtype = "auto"  # of models that are no run (a run has its own): bf16 or fp16 on a card
    max_new_tokens: core.Count | None = None  # most in an answer; none = as the run has it, or 256
    # judge
    judge_url: str = "http://localhost:11434/v1"  # speaks OpenAI's chat completions; this is Ollama's
    judge_model: str = "llama3"  # as the server calls it
    judge_key: str | None = "JUDGE_API_KEY"  # the environment variable that holds the key; none = no key
    judge_temperature: core.within(float, 0, 2) | None = 0.0  # none = left out of the request
    judge_repeats: core.Count = 1  # grades of each answer: their spread is the judge's own noise
    judge_requests: core.Count = 4  # at once
    judge_seconds: core.within(float, 0.1) = 60.0  # of patience with one request
    judge_attempts: core.Count = 6  # at one question, with growing pauses
    pairwise: bool = False  # two runs: which answer is better? in both orders
    # comparing and listing
    compare: tuple[str, ...] = ()  # run folders, presets or tags; runs that differ in seed only are one side
    answer_rows: core.Whole | None = 50  # prompts shown side by side, spread evenly; none = all
    table: tuple[str, ...] = ()  # folders of runs, or runs
    group_by: tuple[str, ...] = ()  # constants (or preset): means over the runs that agree in them
    sort: str | None = None  # a constant or figure; none = by name
    plot: bool = False  # curves of these runs in one PNG
    pack: tuple[str, ...] = ()  # runs to be put into one archive each
    # run
    mode: Literal["measure", "generate", "judge"] = "measure"  # judge and generate: answers
    out: str | None = None  # folder; none = runs/eval, runs/compare, runs/tables, or (pack) the current one
    backend: Literal["auto", "nccl", "xccl", "gloo"] = "auto"  # auto: nccl, xccl, or gloo on CPUs

    def __post_init__(self):
        asked = [name for name in ("compare", "table", "pack") if getattr(self, name)]
        if len(asked) > 1:
            raise core.UserError(f"--{' and --'.join(asked)} are different jobs: one at a time")
        if self.pairwise and (asked or self.mode != "judge"):
            raise core.UserError("--pairwise belongs to --mode judge")


MODEL = {"run_folder", "data", "max_documents", "tokenizer", "template", "eval_batch"}
JUDGE = {field.name for field in fields(Config) if field.name.startswith("judge_")}
TAKES = {  # what each job may look at; other flags would change nothing
    "measure": MODEL | {"context", "stride", "text_column", "max_length", "dtype"},
    "generate": MODEL | {"max_new_tokens"},
    "judge": JUDGE | {"run_folder", "pairwise"},
    "compare": {"compare", "answer_rows", "plot"},
    "table": {"table", "group_by", "sort", "plot"},
    "pack": {"pack"},
}
OF_A_MODEL = {"template", "max_length", "dtype"}  # a run may have its own
OF_OTHER_DATA = OF_A_MODEL | {"max_documents", "text_column", "context", "stride", "out"}


def job_of(cfg) -> str:
    """measure, generate, judge, compare, table or pack. UserError for a flag that this job does not read."""
    job, typed = (
        next((name for name in ("compare", "table", "pack") if getattr(cfg, name)), cfg.mode),
        cfg.typed.flags,
    )
    if "mode" in typed and job != cfg.mode:
        raise core.UserError(f"--mode {cfg.mode} and --{job} are different jobs: one at a time")
    for name in sorted(typed - TAKES[job] - {"mode", "out", "backend"}):
        readers = [each for each, names in TAKES.items() if name in names]
        raise core.UserError(f"--{name} is read by {' or '.join(readers)}, not by {job}")
    if job == "judge" and "out" in typed and not cfg.pairwise:
        raise core.UserError("--out: grades lie beside the answers (of --pairwise elsewhere): drop it")
    if job in ("measure", "generate") and set(cfg.data) == {"own"}:
        for name in sorted(typed & OF_OTHER_DATA):
            raise core.UserError(f"--{name} says nothing of a run's own rows: drop it, or name other --data")
    return job


def root(cfg) -> Path:
    """The folder of runs and results: runs, with --smoke runs/smoke."""
    return Path("runs/smoke" if cfg.typed.smoke else "runs")


def out(cfg, job) -> Path:
    """Where a job's folders are made: --out, or eval, compare, tables below the root."""
    return Path(cfg.out or root(cfg) / job)


# ------------------------------------------------------------------------------------------ runs and models


@dataclass
class Subject:
    """What is measured: a run, or a plain language model. Loaded once, when it is needed."""

    name: str
    script: str | None = None  # that made the run; none: a transformers folder or Hub id
    loaded: tuple | None = None

    @property
    def is_preference(self) -> bool:
        return self.script == "run_preference"

    @property
    def module(self):
        return importlib.import_module(self.script)

    @property
    def facts(self) -> dict:
        """Facts that a run noted of its data; empty for a plain model."""
        return core.read_config(self.name)["facts"] if self.script else {}

    def load(self, cfg, world):
        """(constants, language model, tokenizer), on its device."""
        self.loaded = self.loaded or (self._run if self.script else self._plain)(cfg, world)
        return self.loaded

    def _run(self, cfg, world):
        stored, model, tokenizer = self.module.load_model(self.name, world)
        return replace(stored, eval_batch=cfg.eval_batch or stored.eval_batch), model, tokenizer

    def _plain(self, cfg, world):
        model, tokenizer = core.main_first(world, pretrained.open_any, self.name, cfg.tokenizer)
        if tokenizer.eos_token_id is None:
            raise core.UserError(f"tokenizer of {self.name} has no end-of-text token: use a language model's")
        if (chosen := cfg.typed.chosen) and world.is_main:  # a run has a dtype of its own
            print(chosen)
        length = min(cfg.max_length, model.config.block_size)
        plain = {"dtype": cfg.dtype, "eval_batch": cfg.eval_batch or 32, "template": cfg.template}
        plain |= {"max_length": length, "max_new_tokens": cfg.max_new_tokens}
        model = core.Precision(cfg.dtype, world).prepare(model)
        return SimpleNamespace(**plain), model.eval(), tokenizer


def subjects(cfg, world) -> list[Subject]:
    """The subjects of --run, checked; without --run the newest finished run."""
    names = core.on_main(world, named_runs, cfg) or [core.on_main(world, newest, root(cfg), "checkpoints")]
    chosen = [subject(name) for name in names]
    if cfg.tokenizer and (runs := [one.name for one in chosen if one.script]):
        raise core.UserError(f"{runs[0]} is a run and has a tokenizer of its own: drop --tokenizer")
    has = [core.read_config(one.name)["constants"] if one.script else {} for one in chosen]
    if own := [name for name in sorted(cfg.typed.flags & OF_A_MODEL) if all(name in each for each in has)]:
        raise core.UserError(f"{chosen[0].name} has a {own[0]} of its own: drop --{own[0]}")
    return chosen


def named_runs(cfg) -> list[str]:
    """The names of --run; a tag or preset stands for the finished runs that have it."""
    names = []
    for name in cfg.run_folder:
        known = [] if is_there(name) or "/" in name else sides.tagged(name, root(cfg))
        names += [str(facts.folder) for facts in known] or [name]
    return names


def newest(root, needed) -> str:
    """The newest finished training run below `root` whose folder holds `needed`."""
    folders = [path.parent for script in core.SCRIPTS for path in (root / script).glob(f"*/{needed}")]
    finished = [facts for facts in read_all(folders) if facts.result.get("test_checkpoints")]
    if not finished:
        smoke = root / "smoke"
        hint = ", or add --smoke for those of smoke runs" if any(smoke.glob(f"*/*/{needed}")) else ""
        raise core.UserError(f"no finished run with {needed} in {root}: name one by --run, or make one{hint}")
    return str(max((facts.folder for facts in finished), key=lambda folder: folder.name))


def subject(name) -> Subject:
    """Checks a name of --run. UserError for a folder that is neither a run nor a model, or for a
    mistyped path."""
    folder = Path(name)
    if not files.is_there(folder) and (
        name.count("/") > 1 or name[0] in "./~" or ("/" in name and folder.parent.is_dir())
    ):
        raise core.UserError(f"no such folder: {name}")
    if files.is_file(folder):
        raise core.UserError(f"{name} is a file: name a run's folder, or a model")
    if int4.is_quantised(folder):
        return Subject(str(folder))
    if not files.is_there(folder / "config.json"):
        if files.is_there(folder / "adapter_config.json"):
            raise core.UserError(f"{name} is an adapter: {trusted.adapter_hint(name)}")
        if folder.exists():
            inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
            hint = f": name one of its runs, e.g. {folder / inside[-1]}" if inside else ""
            raise core.UserError(f"{name} is neither a run nor a model: it has no config.json{hint}")
        return Subject(name)  # of the Hub
    stored = core.read_config(folder)
    if "model_type" in stored:
        return Subject(str(folder))
    if (script := stored.get("script")) == "eval":
        measured = stored.get("constants", {}).get("model")
        raise core.UserError(
            f"{name} holds what eval.py found: name the model, {measured}, to measure it again"
        )
    if script not in core.SCRIPTS:
        maker = script or "an unknown program"
        raise core.UserError(f"{name} was made by {maker}: use a run of {', '.join(core.SCRIPTS)}")
    return Subject(str(folder), script)


def weights_note(folder) -> str | None:
    """A sentence if a run's weights are not those that it was tested with."""
    result = facts.read(folder).result
    tested = result.get("test_checkpoints", [])
    if not tested:
        status = result.get("status", "not finished")
        name = core.tested_or_newest_checkpoint(folder)
        return f"{folder} is {status}: its newest whole checkpoint, {name}, is used"
    return None


def tell_weights(subject, world, say):
    """Says so where a run's weights are not those that it was tested with."""
    if subject.script and (note := core.on_main(world, weights_note, subject.name)):
        say(note)


# ----------------------------------------------------------------------------------------------- measuring


def sets_of(chosen, cfg, say) -> list[list[str]]:
    """For each subject the sets of --data that it is measured on or answers: a model that is no run has no
    rows of its own. UserError where nothing is left, before anything is made or loaded."""
    for subject in chosen:
        if subject.script or "own" not in cfg.data:
            continue
        if set(cfg.data) != {"own"}:
            say(f"{subject.name}  own: skipped, a model that is no run has no rows of its own")
        elif not is_there(subject.name):
            raise core.UserError(f"{subject.name}: no such folder; a model of the Hub needs --data, too")
        else:
            raise core.UserError(f"{subject.name} is a model, no run with rows of its own: use --data")
    return [[data for data in cfg.data if subject.script or data != "own"] for subject in chosen]


def measure(cfg, world, say, poll):
    """Measures every subject on every set of --data: a line each, a table at the end."""
    rows, failed, chosen = [], [], subjects(cfg, world)
    sets = sets_of(chosen, cfg, say)
    for subject, names in zip(chosen, sets, strict=True):
        for data in names:
            how = measure_own if data == "own" else functools.partial(measure_other, data=data)
            try:
                if data == names[0]:
                    tell_weights(subject, world, say)
                metrics = how(subject, cfg=cfg, world=world, say=say, poll=poll)
            except core.UserError as error:
                if sum(map(len, sets)) == 1 or (world.size > 1 and isinstance(error, OutOfMemory)):
                    raise
                failed.append(f"{subject.name} on {data}: {error}")  # the others still count
                say(f"FAILED {failed[-1]}")
            else:
                row = {"model": eval_folder.called(subject.name), "data": Path(data).name}
                rows.append(row | cells(metrics))
        subject.loaded = None  # its memory is the next one's
    if len(rows) > 1:
        headers = dict.fromkeys(header for row in rows for header in row)
        say("\n" + tables.markdown({header: [row.get(header, "") for row in rows] for header in headers}))
    if failed:
        raise core.UserError(f"{len(failed)} of {len(failed) + len(rows)} failed, first {failed[0]}")


def cells(m) -> dict[str, str]:
    """Metrics as cells of a table row."""

    def figure(name, digits=3):
        return core.plus_minus(m[name], m[f"{name}_interval"], digits)

    row = {"part": m["part"]} if m.get("part", "test") != "test" else {}
    row |= {"loss": figure("loss" if "loss" in m else "log_loss", 4)}
    row |= {"perplexity": f"{m['perplexity']:.2f}"} if "perplexity" in m else {}
    row |= {"bits/byte": figure("bits_per_byte", 4)} if "bits_per_byte" in m else {}
    row |= {"accuracy": figure("accuracy")}
    row |= {"answers": figure("answer_accuracy")} if "answer_accuracy" in m else {}
    return row | {"rows": str(m["rows"])}


def cells_line(m) -> str:
    """Metrics as a line."""
    return "  ".join(f"{name} {value}" for name, value in cells(m).items())


def measure_own(subject, cfg, world, say, poll) -> dict:
    """Measures a run's own val and test rows again. If the figures are those of result.json, also rewrites
    the files by which --compare pairs rows."""
    figures, rows = subject.module.remeasure(subject.name, world, cfg.eval_batch, poll)
    shown = None
    for part in ("val", "test"):
        metrics = {name[len(part) + 1 :]: x for name, x in figures.items() if name.startswith(f"{part}/")}
        if metrics:
            if not shown:
                say(subject.name)
            say(f"  {part:4}  {cells_line(metrics)}")
            last, shown = part, metrics
    if subject.is_preference:
        where = "out of fold" if core.read_config(subject.name)["constants"]["folds"] else last
        for line in preference.card_lines(shown, where, list(columns.LABELS)):
            say(line)
    same, sentence = agreement(figures, facts.read(subject.name).result)
    say(f"  {sentence}")
    if same:
        core.on_main(world, write_rows, Path(subject.name), rows)
    return shown | {"part": last}


def write_rows(folder, rows):
    """Writes files of rows (name -> lines) anew, and their hashes to result.json."""
    core.prepare_folder(folder, "the figures above are right, its files stay as they were")
    for name, lines in rows.items():
        core.write_lines(folder / name, lines)
    result = facts.read(folder).result
    files.write_sealed(folder / "result.json", result | {"files": files.row_hashes(folder)})


def agreement(figures, stored) -> tuple[bool, str]:
    """Whether the figures are those of result.json, and a sentence on the largest difference."""
    away = {}
    for name, value in figures.items():
        was = stored.get(name)
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in (value, was)):
            away[name] = abs(value - was) / (abs(was) + 0.1)  # of figures near 0 the size counts
    if not away:
        return False, "result.json has no figures to compare with"
    worst = max(away, key=away.get)
    if away[worst] <= 1e-5:
        return True, f"as result.json has it (largest difference {away[worst]:.0e} of a figure)"
    return False, f"not as result.json has it: {worst} is {figures[worst]:.6g}, was {stored[worst]:.6g}"


def measure_other(subject, data, cfg, world, say, poll) -> dict:
    """Measures other data; writes a folder below runs/eval/ that can be used like a run's."""
    began, folder = time.time(), eval_folder.folder_of(subject, data, cfg, out(cfg, "eval"))
    core.on_main(world, core.prepare_folder, folder.parent)
    if subject.is_preference:
        kind, measured = "preference", measure_pairs(subject, data, cfg, world, poll)
    else:
        stored, model, tokenizer = subject.load(cfg, world)
        kind = core.on_main(world, other_data.kind_of, data, cfg.text_column)
        how = {"text": other_data.measure_text, "rows": other_data.measure_rows}[kind]
        measured = how(data, stored, model, tokenizer, cfg, world, poll)
    if other_data.was_trained_on(measured.fingerprint, subject.facts):
        measured.lines.append("NOTE this is the data that the run was trained on, its training rows included")
    constants = {
        "model": subject.name,
        "data": data,
        "max_documents": cfg.max_documents,
        **measured.constants,
    }
    seconds = time.time() - began
    core.on_main(
        world, eval_folder.write_measured, folder, subject, kind, constants, measured, seconds, world
    )
    say(f"{subject.name} on {data}")
    for line in [cells_line(measured.metrics), *measured.lines]:
        say(f"  {line}")
    if subject.is_preference:
        for line in preference.card_lines(measured.metrics, "rows", list(columns.LABELS)):
            say(line)
    say(f"  written: {folder}")
    return measured.metrics


def measure_pairs(subject, data, cfg, world, poll) -> other_data.Measured:
    """Measures the report card on other A/B/tie rows."""
    options = {"max_documents": cfg.max_documents, "eval_batch": cfg.eval_batch, "poll": poll}
    card, lines, predictions, fingerprint = subject.module.measure_other(subject.name, data, world, **options)
    return other_data.Measured(card, lines, ("predictions.jsonl", predictions), fingerprint, {})


# ------------------------------------------------------------------------------------------------ answering


def generate(cfg, world, say, poll):
    """Mode generate: greedy answers to a run's test rows, or to --data: instruction
    rows, or a prompt per line."""
    chosen = subjects(cfg, world)
    for subject in chosen:
        if subject.is_preference:
            raise core.UserError(f"{subject.name} judges answers and writes none: use a language model")
        if "own" in cfg.data and subject.script not in (None, "run_instruct", "run_lora"):
            raise core.UserError(f"{subject.name} has no instruction rows of its own: name some by --data")
    for subject, names in zip(chosen, sets_of(chosen, cfg, say), strict=True):
        tell_weights(subject, world, say)
        for data in names:
            answer(subject, data, cfg, world, say, poll)
        subject.loaded = None


def answer(subject, data, cfg, world, say, poll):
    """Answers one set of prompts; writes responses.json."""
    own = data == "own"
    folder = Path(subject.name) if own else eval_folder.folder_of(subject, data, cfg, out(cfg, "eval"))
    core.on_main(world, core.prepare_folder, folder if own else folder.parent)
    stored, model, tokenizer = subject.load(cfg, world)
    template = getattr(stored, "template", cfg.template)  # a run of gpt_scratch.py has none
    most = cfg.max_new_tokens or getattr(stored, "max_new_tokens", None) or LONGEST
    rows, prompts = core.main_first(world, prompts_of, subject, data, stored, tokenizer, cfg)
    model = core.merge_lora(model) if subject.script == "run_lora" else model
    with core.Precision(stored.dtype, world).generation():
        batch = answers.rows_at_once(model, prompts, most, world, stored.eval_batch, bool(cfg.eval_batch))
        ids = answers.answer_ids(model, tokenizer, prompts, most, batch, world, poll, template)
    for line in answers.room_lines(model, prompts, ids, most):
        say(line)
    texts = answers.said(tokenizer, ids, template)
    rows = [row | {"model_response": text} for row, text in zip(rows, texts, strict=True)]
    constants = {"model": subject.name, "data": data}
    constants |= {"max_documents": cfg.max_documents, "max_new_tokens": most}
    if own:
        core.on_main(world, core.write_json, folder / "responses.json", rows)
    else:
        core.on_main(world, eval_folder.write_answers, folder, subject, constants, rows, world)
    empty = sum(not text for text in texts)
    say(f"{subject.name}  {len(rows)} answers, {empty} empty: {folder}/responses.json")
    say(f"next: python eval.py --mode judge --run {folder}")


LONGEST = 256  # tokens of an answer, where neither a run nor a flag says otherwise


def prompts_of(subject, data, stored, tokenizer, cfg) -> tuple[list[dict], list[list[int]]]:
    """(rows with all their columns, prompts as lists of ids)"""
    if data == "own":
        rows = tuning.own_data(stored, core.World(), tokenizer, subject.facts)
        test = instructions.examples_of(rows, stored)[0]["test"].rows
        return [rows.columns(row) for row in test], [rows.prompt(row) for row in test]
    rows, texts = read_prompts(data, cfg.max_documents, getattr(stored, "template", cfg.template))
    return rows, as_ids(tokenizer, texts, data)


# -------------------------------------------------------------------------------- judging, comparing, listing


def judge_answers(cfg, say):
    """Mode judge: grades each --run's responses.json (or such a file) into
    judged.json beside it; or a duel."""
    names = named_runs(cfg) or [newest(root(cfg), "responses.json")]
    paths = [Path(name) if files.is_file(name) else Path(name, "responses.json") for name in names]
    rows, asked = [responses.read_responses(path) for path in paths], judge.make_judge(cfg)
    if cfg.pairwise:
        return duel(cfg, names, paths, rows, asked, say)
    hashes = [core.sha256_file(path) for path in paths]  # of the answers that are graded: others may come
    for path in paths:
        core.prepare_folder(path.parent, "copy the answers to a folder of yours and name that")
    for name, path, some, digest in zip(names, paths, rows, hashes, strict=True):
        before, summary = asked.asked, judge.score(asked, some, cfg.judge_repeats)
        for line in grades.lines_of_score(name, summary):
            say(line)
        target = path.with_name(judged_name(path)).with_suffix(".json")
        summary["responses_sha256"] = digest
        core.write_json(target, facts.with_summary(facts.read_judged(target), summary))
        say(f"  written: {target}; {asked.asked - before} questions were asked now")


def judged_name(path) -> str:
    """judged.json beside responses.json, judged_x.json beside responses_x.json or x.json."""
    name = path.name
    return name.replace("responses", "judged", 1) if "responses" in name else f"judged_{name}"


def duel(cfg, names, paths, rows, asked, say):
    """--pairwise: which of two runs answers better? Writes duel_....json."""
    if len(names) != 2:
        raise core.UserError(f"--pairwise compares two, not {len(names)}: name both by --run")
    folder = out(cfg, "compare")
    core.prepare_folder(folder)
    figures = judge.duel(asked, *rows, cfg.judge_repeats)
    for line in grades.lines_of_duel(*names, figures):
        say(line)
    target = folder / judge.duel_name(asked, paths)
    core.write_json(target, {"sides": list(names), **figures})
    say(f"written: {target}")


def compare_runs(cfg, say):
    """--compare: writes compare.md and compare.json (constants, verdicts) and answers.md (side by side)."""
    all_sides = sides.sides(cfg.compare, root(cfg))
    head = sides.constants_table(all_sides)
    lines, figures = sides.report(all_sides)
    answers = sides.side_by_side(all_sides, cfg.answer_rows)
    say("\n".join([head, "", *lines]))
    folder = out(cfg, "compare") / sides.folder_name(all_sides)
    core.prepare_folder(folder)
    for stale in ("answers.md", "curves.png"):  # of an earlier call
        (folder / stale).unlink(missing_ok=True)
    texts = {"compare.md": "\n".join(["# Comparison", "", head, "", *lines, ""]), "answers.md": answers}
    for name, text in texts.items():
        if text:
            with core.whole_file(folder / name) as file:
                file.write(text)
    core.write_json(folder / "compare.json", figures)
    if cfg.plot:
        plots.draw(sides.runs_of(all_sides), folder / "curves.png")
    say(f"written: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    if not answers and any(
        facts.folder.joinpath("responses.json").exists() for facts in sides.runs_of(all_sides)
    ):
        say("no answers side by side: not all sides have answers to the same prompts (--mode generate)")


def tabulate(cfg, say):
    """--table: writes table.md, curves.png and TensorBoard's HPARAMS page; prints the table."""
    all_facts = find(cfg.table)
    tables.check_names(all_facts, cfg.group_by, cfg.sort)
    parents = dict.fromkeys(os.path.relpath(facts.folder.resolve().parent, "runs") for facts in all_facts)
    where = "-".join(tables.slug(parent).strip("._") or "runs" for parent in parents)  # smoke_run_lora
    folder = Path(cfg.out or root(cfg) / "tables" / where[:200])
    text = (
        tables.grouped(all_facts, cfg.group_by, cfg.sort)
        if cfg.group_by
        else tables.table(all_facts, cfg.sort)
    )
    say(text)
    core.prepare_folder(folder)
    by = "_by_" + "_".join(cfg.group_by) if cfg.group_by else ""
    if len(by) > 200:  # a file's name has 255 bytes
        by = f"{by[:180]}_{core.short_hash(cfg.group_by, 6)}"
    with core.whole_file(folder / f"table{by}.md") as file:
        file.write(text + "\n")
    say(f"\nwritten: {folder}/table{by}.md")
    if cfg.plot and not any(facts.metrics for facts in all_facts):
        say("no curves: none of these has logged any")
    elif cfg.plot:
        plots.draw(all_facts, folder / f"curves{by}.png", cfg.group_by)
        say(f"written: {folder}/curves{by}.png")
    if written := plots.write_hparams(all_facts):
        where = os.path.relpath(os.path.commonpath([facts.folder.resolve().parent for facts in all_facts]))
        say(f"{written} runs on TensorBoard's HPARAMS page: tensorboard --logdir {where}")


# ------------------------------------------------------------------------------------------------------ main


@record
def main(cfg, world):
    cfg = core.with_dtype(cfg, world)
    job, terminal = job_of(cfg), sys.stdout

    def say(text):
        if world.is_main:
            terminal.write(f"{text}\n")
            terminal.flush()

    with core.listening(world) as poll:
        if job in ("measure", "generate"):
            return {"measure": measure, "generate": generate}[job](cfg, world, say, poll)
        alone = {"judge": judge_answers, "compare": compare_runs, "table": tabulate, "pack": pack.pack}[job]
        core.on_main(world, alone, cfg, say)  # rank 0's work, the others wait


if __name__ == "__main__":
    cfg = core.parse_config(Config, {}, {}, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
