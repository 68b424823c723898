"""Measures any run again, lets models answer, has answers judged, compares runs, writes the journals' tables.

    python eval.py --run runs/run_lora/20261122_101500                       # its own test rows once more
    python eval.py --run RUN gpt2 --data own wikitext.txt rows.json          # several models, several sets
    torchrun --nproc_per_node=4 eval.py --run_folder RUN                     # --run is torchrun's own
    python eval.py --mode generate --run gpt2-medium --data RUN/responses.json
    python eval.py --mode judge --run RUN RUN --judge_model llama3           # Ollama; README has others
    python eval.py --compare RUN RUN ...                                     # or presets, tags
    python eval.py --table runs/run_lora --group_by preset --plot
    python eval.py --pack RUN                                                # to copy home

What is measured on other data than a run's own stands in a folder below runs/eval/, which --compare,
--table and --mode judge take like a run.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

import compare
import core
import corpus
import gpt_scratch
import judge
import lora
import pairs
import report_card
import results
import runs
import sft


@dataclass(frozen=True)
class Config:
    # data
    run_folder: tuple[
        str, ...
    ] = ()  # runs, transformers folders or Hub ids (short: --run); none = newest run
    data: tuple[str, ...] = ("own",)  # own = a run's test rows; text, instruction rows or A/B/tie rows
    max_documents: int | None = None  # rows or documents read of other data; none = all
    text_column: str = "text"  # of a table of texts
    template: Literal["alpaca", "journal"] = "alpaca"  # of instruction rows, for models that bring none
    # measuring and answering
    context: int | None = None  # tokens that a window on text holds; none = all the model can
    stride: int | None = None  # tokens from one window to the next; none = half of context
    max_length: int = 512  # tokens of an instruction row, for models that bring none
    eval_batch: int | None = None  # rows per step over all ranks; none = the run's own, or 32
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of models that are no run; a run has its own
    max_new_tokens: int = 256  # most in an answer
    # judge
    judge_url: str = "http://localhost:11434/v1"  # speaks OpenAI's chat completions; this is Ollama's
    judge_model: str = "llama3"
    judge_key: str | None = "JUDGE_API_KEY"  # the environment variable that holds the key; none = no key
    judge_repeats: int = 1  # grades of each answer: their spread is the judge's own noise
    judge_requests: int = 4  # at once
    judge_seconds: float = 60.0  # of patience with one request
    judge_attempts: int = 6  # at one question, with growing pauses
    pairwise: bool = False  # two runs: which answer is better? in both orders
    # comparing and listing
    compare: tuple[str, ...] = ()  # run folders, presets or tags; runs that differ in seed only are one side
    answer_rows: int | None = 50  # prompts shown side by side, spread evenly; none = all
    table: tuple[str, ...] = ()  # folders of runs, or runs
    group_by: tuple[str, ...] = ()  # constants (or preset): means over the runs that agree in them
    sort: str | None = None  # a constant or figure; none = by name
    plot: bool = False  # curves of these runs in one PNG
    pack: tuple[str, ...] = ()  # runs to be put into one archive each
    # run
    mode: Literal["measure", "generate", "judge"] = "measure"
    out: str | None = None  # where results go; none = runs/eval (runs/compare) below the current folder
    backend: Literal["auto", "nccl", "xccl", "gloo"] = "auto"

    def __post_init__(self):
        asked = [name for name in ("compare", "table", "pack") if getattr(self, name)]
        if len(asked) > 1:
            raise core.UserError(f"--{' and --'.join(asked)} are different jobs: one at a time")
        if self.stride and self.context and self.stride >= self.context:
            raise core.UserError(
                f"--stride {self.stride} is not below --context {self.context}: use about half"
            )


SCRIPTS = ("run_preference", "gpt_scratch", "run_instruct", "run_lora")  # whose runs are known


def root(cfg) -> Path:
    """Below which runs lie and results go; --smoke looks at smoke runs."""
    return Path("runs/smoke" if core.typed(cfg).smoke else "runs")


# ------------------------------------------------------------------------------------------ runs and models


@dataclass
class Subject:
    """What is measured: a run, or a plain language model. The weights are loaded when they are needed."""

    name: str
    script: str | None = None  # that made the run; none: a transformers folder or Hub id

    @property
    def is_preference(self) -> bool:
        return self.script == "run_preference"

    @property
    def module(self):
        return importlib.import_module(self.script)

    def load(self, cfg, world):
        """(constants, language model, tokenizer), on its device."""
        if self.script:
            stored, model, tokenizer = self.module.load_model(self.name, world)
            changes = {"eval_batch": cfg.eval_batch} if cfg.eval_batch else {}
            return replace(stored, **changes), model, tokenizer
        model, tokenizer = core.main_first(world, lambda: gpt_scratch.open_model(self.name))
        if tokenizer.eos_token_id is None:
            raise core.UserError(f"tokenizer of {self.name} has no end-of-text token: use a language model's")
        plain = SimpleNamespace(dtype=cfg.dtype, eval_batch=cfg.eval_batch or 32, max_length=cfg.max_length)
        plain.template, plain.loss_on_prompt = cfg.template, False
        plain.max_length = min(cfg.max_length, model.config.block_size)
        return plain, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer


def subjects(cfg, world) -> list[Subject]:
    """--run, each looked at; none: the newest finished run below runs/."""
    names = cfg.run_folder or (core.on_main(world, lambda: newest(root(cfg))),)
    return [subject(name.rstrip("/") or name) for name in names]


def newest(root) -> str:
    folders = [path.parent for script in SCRIPTS for path in (root / script).glob("*/result.json")]
    finished = [folder for folder in folders if results.read(folder).finished]
    if not finished:
        raise core.UserError(f"no finished run below {root}: name one by --run, or make one")
    return str(max(finished, key=lambda folder: folder.name))


def subject(name) -> Subject:
    """UserError for a folder that is neither a run nor a model."""
    folder = Path(name)
    config = folder / "config.json"
    if not config.exists():
        if folder.is_dir():
            inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
            hint = f": name one of its runs, e.g. {folder / inside[-1]}" if inside else ""
            raise core.UserError(f"{name} is neither a run nor a model: it has no config.json{hint}")
        return Subject(name)  # of the Hub, or nothing
    stored = runs.read_config(folder)
    if "model_type" in stored:
        return Subject(name)
    if (script := stored.get("script")) not in SCRIPTS:
        maker = script or "an unknown program"
        raise core.UserError(f"{name} was made by {maker}: use a run of {', '.join(SCRIPTS)}")
    return Subject(name, script)


def weights_note(folder) -> str | None:
    """A sentence where a run's weights are not the ones that it was tested with."""
    result = results.read(folder).result
    tested = result.get("test_checkpoints", [])
    if not tested:
        return f"{folder} is {result.get('status', 'not finished')}: its newest whole checkpoint, " + (
            f"{runs.chosen_checkpoint(folder)}, is used"
        )
    reason = runs.broken(Path(folder) / "checkpoints" / tested[0])
    if reason and len(tested) == 1:
        used = runs.chosen_checkpoint(folder)
        return f"WARNING checkpoint {tested[0]} is broken ({reason}): {used} is used, figures will differ"
    return None


def listen(world):
    """poll(active) -> its sum over ranks; it raises core.Stop on all ranks after a signal to any of them.

    Alone a signal stops at once; a second one always does.
    """
    heard = []

    def on_signal(number, frame):
        if heard:
            os._exit(1)
        heard.append(signal.Signals(number).name)
        if core.may_leave(world):
            raise core.Stop(heard[0])

    def poll(active=0) -> int:
        total, signalled = core.all_reduce_sum(world, torch.tensor([active, len(heard)])).tolist()
        if signalled:
            raise core.Stop(heard[0] if heard else "a signal to another rank")
        return total

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    return poll


# ----------------------------------------------------------------------------------------------- measuring


def measure(cfg, world, say, poll):
    """Every subject on every set of --data; a line each, a table at the end."""
    found = []
    for one in subjects(cfg, world):
        if one.script and (note := core.on_main(world, lambda one=one: weights_note(one.name))):
            say(note)
        for data in cfg.data:
            how = measure_own if data == "own" else functools.partial(measure_other, data=data)
            metrics = how(one, cfg=cfg, world=world, say=say, poll=poll)
            found.append({"model": Path(one.name).name, "data": Path(data).name, **cells(metrics)})
    if len(found) > 1:
        headers = dict.fromkeys(header for row in found for header in row)
        say("\n" + results.markdown({header: [row.get(header, "") for row in found] for header in headers}))


def cells(m) -> dict[str, str]:
    """The row of a measure's metrics in a table."""
    loss = "loss" if "loss" in m else "log_loss"
    row = {"loss": core.plus_minus(m[loss], m[f"{loss}_interval"], 4)}
    row |= {"perplexity": f"{m['perplexity']:.2f}"} if "perplexity" in m else {}
    if "bits_per_byte" in m:
        row["bits/byte"] = core.plus_minus(m["bits_per_byte"], m["bits_per_byte_interval"], 4)
    return row | {"accuracy": core.plus_minus(m["accuracy"], m["accuracy_interval"]), "rows": str(m["rows"])}


def said(m) -> str:
    return "  ".join(f"{name} {value}" for name, value in cells(m).items())


def measure_own(one, cfg, world, say, poll) -> dict:
    """A run's own val and test rows once more; says whether result.json had the same."""
    if not one.script:
        raise core.UserError(f"{one.name} is no run and has no rows of its own: name some by --data")
    found, losses = one.module.remeasure(one.name, world, cfg.eval_batch, poll)
    if losses:
        core.on_main(world, lambda: runs.write_losses(one.name, losses))
    for part in ("val", "test"):
        metrics = {name[len(part) + 1 :]: x for name, x in found.items() if name.startswith(f"{part}/")}
        if metrics:
            say(f"{one.name}  {part}  {said(metrics)}")
            last, shown = part, metrics
    if one.is_preference:
        for line in report_card.card_lines(shown, last, list(pairs.LABELS)):
            say(line)
    say(f"  {agreement(found, results.read(one.name).result)}")
    return shown


def agreement(found, stored) -> str:
    """How far the figures are from those of result.json, the farthest one named."""
    away = {}
    for name, value in found.items():
        was = stored.get(name)
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in (value, was)):
            away[name] = abs(value - was) / max(abs(was), 1e-9)
    if not away:
        return "result.json has no figures to compare with"
    worst = max(away, key=away.get)
    if away[worst] <= 1e-5:
        return f"as result.json has it (largest difference {away[worst]:.0e} of a figure)"
    return f"not as result.json has it: {worst} is {found[worst]:.6g}, was {stored[worst]:.6g}"


def measure_other(one, data, cfg, world, say, poll) -> dict:
    """Other data: into a folder below runs/eval/ that looks like a run's."""
    began, folder = time.time(), other_folder(one, data, cfg)
    if one.is_preference:
        kind, (metrics, lines, written) = "preference", measure_pairs(one, data, cfg, world, poll)
        facts, constants = {"fingerprint": {"data": core.data_fingerprint(data)}}, {}
    else:
        stored, model, tokenizer = one.load(cfg, world)
        kind = core.on_main(world, lambda: kind_of(data, cfg))
        how = {"text": measure_text, "rows": measure_rows}[kind]
        metrics, lines, written, fingerprint, constants = how(
            data, stored, model, tokenizer, cfg, world, poll
        )
        facts = {"fingerprint": {"data": fingerprint}}
    constants = {"model": one.name, "data": data, "max_documents": cfg.max_documents, **constants}
    config = {"script": "eval", "kind": kind, "constants": constants, "facts": facts, "preset": None}
    config |= {"device": runs.device_name(world), "git": runs.git_state()}
    result = {"status": "finished", "step": 0, "seconds": time.time() - began, "weights_sha256": None}
    result |= {f"test/{name}": value for name, value in metrics.items()}
    core.on_main(world, lambda: write_folder(folder, config, result, written))
    say(f"{one.name}  {data}  {said(metrics)}")
    for line in lines:
        say(f"  {line}")
    if one.is_preference:
        for line in report_card.card_lines(metrics, "rows", list(pairs.LABELS)):
            say(line)
    say(f"  written: {folder}")
    return metrics


def other_folder(one, data, cfg) -> Path:
    """runs/eval/<model>-<data>, with a hash of their paths: equal names may be different things."""
    words = "-".join(re.sub(r"[^\w.]+", "_", Path(name).name)[:40] for name in (one.name, data))
    where = [str(Path(name).resolve()) if Path(name).exists() else name for name in (one.name, data)]
    return (
        Path(cfg.out or root(cfg) / "eval")
        / f"{words}-{hashlib.sha256(json.dumps(where).encode()).hexdigest()[:6]}"
    )


def write_folder(folder, config, result, written):
    """config.json, result.json, and `written`: (name of a .jsonl file, its lines)."""
    folder.mkdir(parents=True, exist_ok=True)
    name, lines = written
    with core.whole_file(folder / name) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    core.write_json(folder / "config.json", config)
    core.write_json(folder / "result.json", result)


def kind_of(data, cfg) -> str:
    """text, or rows of instructions; UserError for a table that is neither."""
    if data == "python-instructions":
        return "rows"
    if data in corpus.BUILT_IN or corpus.text_files(data):
        return "text"
    first = core.read_rows(data, 1)
    if first and isinstance(first[0], dict) and {"instruction", "output"} <= first[0].keys():
        return "rows"
    if first and isinstance(first[0], dict) and cfg.text_column in first[0]:
        return "text"
    core.require_columns(
        first, ("instruction", "output"), f"{data} (or a column {cfg.text_column!r} of texts)"
    )
    raise core.UserError(f"{data} cannot be measured: use text, or rows with instruction and output")


class Windows:
    """Documents in windows of `context` tokens, each `stride` behind the last: a token counts once, in the
    first window that holds it, where (but in the first) it has seen context - stride tokens at least.
    """

    def __init__(self, documents, context, stride):
        self.documents, self.windows = documents, []  # (document, first input, end of inputs, first target)
        for number, ids in enumerate(documents):
            done = 1  # the first token is given
            while done < len(ids):
                end = min(len(ids), max(done + stride, context + 1))
                self.windows.append((number, max(0, end - 1 - context), end - 1, done))
                done = end
        self.lengths = np.array([end - start for _, start, end, _ in self.windows])

    def __len__(self):
        return len(self.windows)

    def wanted(self) -> list[np.ndarray]:
        """The targets of each."""
        return [self.documents[number][first : end + 1] for number, _, end, first in self.windows]

    def batch(self, chosen, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, T), padded on the right."""
        shape = len(chosen), int(self.lengths[chosen].max())
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, core.IGNORE_INDEX)
        for row, window in enumerate(chosen):
            number, start, end, first = self.windows[window]
            ids = torch.from_numpy(self.documents[number].astype(np.int64))
            input_ids[row, : end - start] = ids[start:end]
            labels[row, first - 1 - start : end - start] = ids[first : end + 1]
        return input_ids.to(device), labels.to(device)


def read_documents(data, tokenizer, cfg) -> tuple[list[np.ndarray], int, list[str]]:
    """(ids of each document between begin and end tokens, bytes of all texts, lines on unusable ones)."""
    source = corpus.Corpus(data, "", cfg.text_column, cfg.max_documents)
    bad, documents, size = core.BadRows(), [], 0
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    with core.progress(None, "tokenising") as bar:
        for opens in corpus.documents(source, bad):
            ids = [begin]
            with opens() as stream:
                for text in corpus.pieces(stream):
                    ids += tokenizer(text, **plain).input_ids
                    size += len(text.encode())
            documents.append(np.array([*ids, tokenizer.eos_token_id]))
            bar.update()
    if not size:
        raise core.UserError(
            f"{data} holds no text: use text files, or a table with a column {cfg.text_column!r}"
        )
    return documents, size, bad.report(len(documents) + len(bad.rows), data) if bad.rows else []


def measure_text(data, stored, model, tokenizer, cfg, world, poll):
    """Text by sliding windows; rows of losses.jsonl are windows, intervals redraw documents or stretches."""
    most = model.config.block_size
    context = cfg.context or most
    if context > most:
        raise core.UserError(f"--context {context} is over the {most} positions of the model")
    documents, size, lines = core.main_first(world, lambda: read_documents(data, tokenizer, cfg))
    stride = cfg.stride or max(1, context // 2)
    windows = Windows(documents, context, stride)
    sums = gpt_scratch.evaluate(model, windows, stored, world, poll)
    sizes = corpus.token_bytes(tokenizer)
    spelt = np.array([sizes[ids].sum() for ids in windows.wanted()])
    if abs(spelt.sum() - size) > 1e-3 * size:
        lines.append(
            f"the tokens spell {spelt.sum():,} bytes, the text has {size:,}: bits are per byte spelt"
        )
    groups = gpt_scratch.stretches(len(windows))
    if len(documents) >= 100:
        groups = np.array([number for number, *_ in windows.windows])
    counts = f"{len(documents)} documents, {int(sums[:, 2].sum()):,} targets"
    lines.append(f"{counts}, windows of {context}, stride {stride}")
    written = "losses.jsonl", runs.loss_lines(np.arange(len(windows)), groups, sums, spelt)
    fingerprint = corpus.data_fingerprint(corpus.Corpus(data, "", cfg.text_column, cfg.max_documents))
    constants = {"text_column": cfg.text_column, "context": context, "stride": stride}
    return core.language_metrics(sums, groups, byte_counts=spelt), lines, written, fingerprint, constants


def measure_rows(data, stored, model, tokenizer, cfg, world, poll):
    """Answers of instruction rows as targets, under the template that the model was taught."""
    shape = {"template": cfg.template, "max_length": min(cfg.max_length, model.config.block_size)}
    shape = {name: getattr(stored, name, value) for name, value in shape.items()}
    asked = SimpleNamespace(data=data, model="", max_documents=cfg.max_documents, **shape)
    rows = sft.load_instructions(asked, world, tokenizer)
    whole, most = rows.prompt_lengths + rows.answer_lengths + 1, shape["max_length"]
    fits = np.flatnonzero(rows.prompt_lengths < np.minimum(whole, most))
    if not len(fits):
        raise core.UserError(f"the prompts of all {len(rows)} rows fill {most} tokens: use a model with more")
    examples, lines = sft.Examples(rows, fits, most), list(rows.lines)
    if cut := int((whole[fits] > most).sum()):
        lines.append(f"{cut} row(s) are cut at {most} tokens: they lose the end of the answer")
    if left := len(rows) - len(fits):
        lines.append(f"{left} row(s) are left out: their prompts alone fill {most} tokens")
    sums = gpt_scratch.evaluate(model, examples, stored, world, poll)
    sizes = corpus.token_bytes(tokenizer)
    spelt = np.array([sizes[ids].sum() for ids in examples.wanted()])
    groups = rows.groups[fits]
    written = "losses.jsonl", runs.loss_lines(rows.numbers[fits], groups, sums, spelt)
    metrics = core.language_metrics(sums, groups, byte_counts=spelt)
    return metrics, lines, written, rows.fingerprint["data"], shape


def measure_pairs(one, data, cfg, world, poll):
    """The report card of other A/B/tie rows, and the lines of predictions.jsonl."""
    card, lines, predictions = one.module.measure_other(one.name, data, world, cfg.eval_batch, poll)
    return card, lines, ("predictions.jsonl", predictions)


# ------------------------------------------------------------------------------------------------ answering


def generate(cfg, world, say, poll):
    """Greedy answers to a run's own test rows, or to --data: instruction rows, or text, one prompt a line."""
    for one in subjects(cfg, world):
        if one.is_preference:
            raise core.UserError(f"{one.name} judges answers and writes none: use a language model")
        for data in cfg.data:
            answer(one, data, cfg, world, say, poll)


def answer(one, data, cfg, world, say, poll):
    stored, model, tokenizer = one.load(cfg, world)
    rows, prompts = prompts_of(one, data, stored, tokenizer, cfg, world)
    model = lora.merge_lora(model) if one.script == "run_lora" else model
    room = max(map(len, prompts)) + cfg.max_new_tokens - model.config.block_size
    if room > 0:
        size = f"the model's {model.config.block_size}"
        say(f"the longest prompt and its answer are {room} tokens over {size}: its beginning is forgotten")
    batch = stored.eval_batch * world.size
    texts = sft.answers(model, tokenizer, prompts, cfg.max_new_tokens, batch, world, poll)
    rows = [row | {"model_response": text} for row, text in zip(rows, texts, strict=True)]
    folder = Path(one.name) if data == "own" else other_folder(one, data, cfg)

    def write():
        folder.mkdir(parents=True, exist_ok=True)
        core.write_json(folder / "responses.json", rows)
        if not (folder / "config.json").exists():
            constants = {"model": one.name, "data": data, "max_documents": cfg.max_documents}
            config = {"script": "eval", "kind": "rows", "constants": constants, "facts": {}, "preset": None}
            core.write_json(folder / "config.json", config | {"device": runs.device_name(world)})
            core.write_json(folder / "result.json", {"status": "finished", "step": 0})

    core.on_main(world, write)
    empty = sum(not text for text in texts)
    say(f"{one.name}  {len(rows)} answers, {empty} empty: {folder}/responses.json")
    say(f"next: python eval.py --mode judge --run {folder}")


def prompts_of(one, data, stored, tokenizer, cfg, world) -> tuple[list[dict], list[list[int]]]:
    """Rows (their columns stay) and the ids of what the model is asked."""
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    if data == "own":
        if one.script not in ("run_instruct", "run_lora"):
            raise core.UserError(f"{one.name} has no instruction rows of its own: name some by --data")
        rows = sft.load_instructions(stored, world, tokenizer)
        runs.same_data(runs.read_config(one.name)["facts"]["fingerprint"], rows.fingerprint, stored.data)
        test = sft.examples_of(rows, stored)[0]["test"].rows
        return [rows.columns(row) for row in test], [rows.prompt(row) for row in test]
    if corpus.text_files(data):
        lines = [line for file in corpus.text_files(data) for line in file.read_text("utf-8").splitlines()]
        rows = [{"instruction": line, "input": "", "output": ""} for line in lines if line.strip()]
        prompts = [row["instruction"] for row in rows]
    else:
        rows = core.read_rows(data, cfg.max_documents)
        core.require_columns(rows, ("instruction",), data)
        template = getattr(stored, "template", cfg.template)
        numbered = enumerate(rows, start=1)
        prompts = [sft.prompt_text(*asked(row, number, data), template) for number, row in numbered]
    rows, prompts = rows[: cfg.max_documents], prompts[: cfg.max_documents]
    if not rows:
        raise core.UserError(
            f"{data} has no prompts: use rows with an instruction, or text, one prompt a line"
        )
    return rows, [tokenizer(text, **plain).input_ids for text in prompts]


def asked(row, number, data) -> tuple[str, str]:
    """(instruction, input) of a row; UserError where it has none."""
    texts = [row.get(name) or "" for name in ("instruction", "input")] if isinstance(row, dict) else [""]
    if not all(isinstance(text, str) and core.is_clean(text) for text in texts) or not texts[0].strip():
        raise core.UserError(f"{data}: row {number} has no usable instruction: mend or remove it")
    return texts[0].strip(), texts[1].strip()


# -------------------------------------------------------------------------------- judging, comparing, listing


def judge_answers(cfg, say):
    """Grades of each --run's responses.json (or such a file) into judged.json beside it; or a duel of two."""
    names = cfg.run_folder or (newest(root(cfg)),)
    paths = [path if (path := Path(name)).is_file() else path / "responses.json" for name in names]
    rows, asked = [judge.read_responses(path) for path in paths], judge.make_judge(cfg)
    if cfg.pairwise:
        if len(names) != 2:
            raise core.UserError(f"--pairwise compares two, not {len(names)}: name both by --run")
        found = judge.duel(asked, *rows, cfg.judge_repeats)
        for line in judge.lines_of_duel(*names, found):
            say(line)
        path = (
            Path(cfg.out or root(cfg) / "compare")
            / f"duel_{'_'.join(p.parent.name or p.stem for p in paths)}.json"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        core.write_json(path, {"sides": list(names), **found})
        return say(f"written: {path}")
    for name, path, some in zip(names, paths, rows, strict=True):
        before, found = asked.asked, judge.score(asked, some, cfg.judge_repeats)
        for line in judge.lines_of_score(name, found):
            say(line)
        path = path.with_name(path.name.replace("responses", "judged", 1) if "responses" in path.name
                              else f"judged_{path.name}").with_suffix(".json")  # fmt: skip
        core.write_json(path, results.read_judged(path) | {cfg.judge_model: found})
        say(f"  written: {path}; {asked.asked - before} questions were asked, the others known")


def compare_runs(cfg, say):
    """--compare: constants, verdicts, answers side by side; compare.md, compare.json and answers.md."""
    all_sides = compare.sides(cfg.compare, root(cfg))
    head = compare.constants_table(all_sides)
    lines, figures = compare.report(all_sides)
    say("\n".join([head, "", *lines]))
    folder = Path(cfg.out or root(cfg) / "compare") / "-".join(
        side.all_facts[0].name for side in all_sides[:3]
    )
    folder.mkdir(parents=True, exist_ok=True)
    answers = compare.side_by_side(all_sides, cfg.answer_rows)
    texts = {"compare.md": "\n".join(["# Comparison", "", head, "", *lines, ""]), "answers.md": answers}
    for name, text in texts.items():
        if text:
            with core.whole_file(folder / name) as file:
                file.write(text)
    core.write_json(folder / "compare.json", figures)
    if cfg.plot:
        results.draw([facts for side in all_sides for facts in side.all_facts], folder / "curves.png")
    say(f"written: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")


def tabulate(cfg, say):
    """--table: Markdown to the terminal and table.md, curves.png, and TensorBoard's page of constants."""
    found = results.find(cfg.table)
    results.check_names(found, cfg.group_by, cfg.sort)
    text = results.grouped(found, cfg.group_by, cfg.sort) if cfg.group_by else results.table(found, cfg.sort)
    say(text)
    folder = Path(cfg.out or (found[0].folder.parent if len(found) > 1 else found[0].folder))
    folder.mkdir(parents=True, exist_ok=True)
    with core.whole_file(folder / "table.md") as file:
        file.write(text + "\n")
    say(f"\nwritten: {folder}/table.md")
    if cfg.plot:
        results.draw(found, folder / "curves.png", cfg.group_by)
        say(f"written: {folder}/curves.png")
    if written := results.write_hparams(found):
        where = os.path.relpath(os.path.commonpath([facts.folder.resolve().parent for facts in found]))
        say(f"{written} runs on TensorBoard's HPARAMS page: tensorboard --logdir {where}")


# -------------------------------------------------------------------------------------------------- packing


def pack(cfg, say):
    """--pack: <run>.tar.gz beside each run: the small files, and the weights it was tested with."""
    for name in cfg.pack:
        folder = Path(name)
        config = runs.read_config(folder)
        if config.get("script") not in SCRIPTS:
            raise core.UserError(f"{name} is no run: name a run folder")
        kept = packed_checkpoints(folder)
        target = Path(cfg.out or folder.parent) / f"{folder.name}.tar.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        small = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
        small = [path for path in small if path.relative_to(folder).parts[0] != "checkpoints"]
        whole = [folder / "checkpoints" / name / "model.safetensors" for name in kept]
        needed = sum(path.stat().st_size for path in (*small, *whole))
        if (free := shutil.disk_usage(target.parent).free) < 1.02 * needed + 1e6:
            room = f"{target.parent} has {free / 1e6:.0f} MB free, the archive needs {needed / 1e6:.0f}"
            raise core.UserError(f"{room}: free some, or use another --out")
        write_archive(target, folder, small, kept)
        size, left = target.stat().st_size / 1e6, optimizer_megabytes(folder)
        weights = f"weights {', '.join(kept) or 'none'}"
        say(f"{target}  {size:.1f} MB  {len(small)} files, {weights}; left out {left:.0f} MB of optimizer")
        say(f"  at home, in the project's folder: tar xzf {target.name}")


def packed_checkpoints(folder) -> list[str]:
    """Those that the run was tested with, or the newest whole one; none where there is none."""
    tested = results.read(folder).result.get("test_checkpoints", [])
    whole = [name for name in tested if runs.broken(folder / "checkpoints" / name) is None]
    if whole and len(whole) == len(tested):
        return list(dict.fromkeys(whole))
    with contextlib.suppress(core.UserError):
        return [runs.chosen_checkpoint(folder)]
    return []


def write_archive(target, folder, small, kept):
    """Under its name only when whole. Each manifest is made anew for what is in the archive."""
    inside = Path("runs") / folder.resolve().parent.name / folder.resolve().name
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with tarfile.open(aside, "w:gz", compresslevel=1) as archive:  # weights hardly shrink
            for path in small:
                archive.add(path, inside / path.relative_to(folder))
            for name in kept:
                checkpoint, weights = Path("checkpoints") / name, "model.safetensors"
                position = runs.read_manifest(folder / checkpoint)
                hashes = {weights: position.pop("files")[weights]}
                archive.add(folder / checkpoint / weights, inside / checkpoint / weights)
                manifest = json.dumps(runs.manifest(position, hashes))
                add_text(archive, inside / checkpoint / "manifest.json", manifest)
            add_text(archive, inside / runs.PACKED, f"packed {time.ctime()}: no optimizer state, no resume\n")
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def add_text(archive, name, text):
    entry = tarfile.TarInfo(str(name))
    entry.size, entry.mtime = len(text.encode()), time.time()
    archive.addfile(entry, io.BytesIO(text.encode()))


def optimizer_megabytes(folder) -> float:
    return sum(path.stat().st_size for path in folder.glob("checkpoints/*/state.pt")) / 1e6


# ------------------------------------------------------------------------------------------------------ main


@record
def main(cfg, world):
    poll, say = listen(world), print if world.is_main else lambda line: None
    alone = {"compare": compare_runs, "table": tabulate, "pack": pack}
    job = next((alone[name] for name in alone if getattr(cfg, name)), None)
    job = job or (judge_answers if cfg.mode == "judge" else None)
    if job:  # rank 0's work, the others wait
        core.on_main(world, lambda: job(cfg, say))
    else:
        {"measure": measure, "generate": generate}[cfg.mode](cfg, world, say, poll)


if __name__ == "__main__":
    cfg = core.parse_config(Config, {}, {}, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
