"""The held-out rows that runs have in common, with the loss, verdict or grade of each run on each row; from
losses.jsonl, predictions.jsonl, answers.jsonl, judged.json."""

import json
import math
from dataclasses import dataclass

import numpy as np

from lab.compare.facts import graded_by, judges_of
from lab.compare.responses import numbered
from lab.errors import UserError
from lab.run.files import sha256_file


@dataclass
class Rows:
    """A figure of several runs on the same rows: sums (runs, rows), whose mean is weighted by `weights`."""

    name: str  # of the figure
    sums: np.ndarray  # (runs, rows)
    weights: np.ndarray  # (rows,)
    groups: np.ndarray  # (rows,)
    note: str = ""  # what was left out, or how rows were made

    def __len__(self):
        return len(self.weights)


def shared_rows(all_facts) -> list[Rows]:
    """Loss and accuracy of each run on the rows that all have in common, loss first."""
    kinds = {kind_of(facts) for facts in all_facts}
    if len(kinds) > 1:
        raise UserError(f"these runs answer different questions: {' and '.join(sorted(kinds))}")
    rows = {"preference": _verdicts, "text": _text_rows, "rows": _losses}[kinds.pop()](all_facts)
    return [*rows, *answer_rows(all_facts)]


def answer_rows(all_facts) -> list[Rows]:
    """Whether each multiple-choice problem was answered rightly; empty unless all runs say it."""
    if not all((facts.folder / "answers.jsonl").exists() for facts in all_facts):
        return []
    by_key = [numbered(read_lines(facts, "answers.jsonl")) for facts in all_facts]
    keys, note = _in_common(by_key)
    right = np.array([[float(run_lines[key]["right"]) for key in keys] for run_lines in by_key])
    return [Rows("answers", right, np.ones(len(keys)), np.array([group for group, _ in keys]), note)]


def kind_of(facts) -> str:
    """Kind of a run's rows: preference, text or rows (instructions)."""
    kinds = {"run_preference": "preference", "gpt_scratch": "text", "run_pretrain_diversity": "text"}
    return facts.config.get("kind") or kinds.get(facts.config["script"], "rows")


NEEDED = {
    "losses.jsonl": {"part", "group", "nats", "hits", "targets", "bytes"},
    "answers.jsonl": {"group", "right"},
    "predictions.jsonl": {"id", "row", "group", "split", "label", "A", "B", "tie"},
}


def read_lines(facts, name) -> list[dict]:
    """Reads a .jsonl file of a run folder. UserError says how to make it."""
    path = facts.folder / name
    if not path.exists():
        raise UserError(f"{path} is missing: python eval.py --run {facts.folder} measures the run again")
    try:
        written = (facts.result.get("files") or {}).get(name)  # of runs before it was noted: none
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(NEEDED[name] <= line.keys() for line in lines) or written not in (None, sha256_file(path)):
            raise ValueError
        return lines
    except (OSError, ValueError, AttributeError, RecursionError):
        again = f"python eval.py --run {facts.folder} writes it anew"
        raise UserError(f"{path} is damaged: {again}") from None


def read_losses(all_facts) -> list[list[dict]]:
    """Reads losses.jsonl of each run. UserError if one holds test rows and another validation rows."""
    lines = [read_lines(facts, "losses.jsonl") for facts in all_facts]
    if len(parts := {line["part"] for run_lines in lines for line in run_lines}) > 1:
        raise UserError(
            f"the runs were measured on different parts ({', '.join(sorted(parts))}): final_eval?"
        )
    return lines


def _in_common(by_key) -> tuple[list, str]:
    """Keys that all runs have, and a note on how many are missing in some run."""
    common = set(by_key[0]).intersection(*by_key[1:])
    if not common:
        raise UserError("no held-out row in common: compare runs of one data set and split")
    every = set().union(*by_key)
    note = (
        f"{len(every) - len(common)} rows that not all have are left out" if len(every) > len(common) else ""
    )
    return [key for key in by_key[0] if key in common], note


def _verdicts(all_facts) -> list[Rows]:
    """Log loss and accuracy by prompt, from predictions.jsonl."""
    by_key = []
    for facts in all_facts:
        lines = read_lines(facts, "predictions.jsonl")
        part = "test" if any(line["split"] == "test" for line in lines) else "val"
        by_key.append({(line["id"], line["row"], line["group"], part): line
                       for line in lines if line["split"] == part})  # fmt: skip
    keys, note = _in_common(by_key)
    names = ("A", "B", "tie")
    loss = [
        [-math.log(max(run_lines[k][run_lines[k]["label"]], 1e-15)) for k in keys] for run_lines in by_key
    ]
    right = [
        [max(names, key=run_lines[k].get) == run_lines[k]["label"] for k in keys] for run_lines in by_key
    ]
    groups, ones = np.array([key[2] for key in keys]), np.ones(len(keys))
    figures = {"log loss": loss, "accuracy": right}
    return [Rows(name, np.array(sums, dtype=float), ones, groups, note) for name, sums in figures.items()]


def _losses(all_facts) -> list[Rows]:
    """Loss of instruction rows from losses.jsonl: per target token, or per byte where tokenizers differ."""
    by_key = [numbered(run_lines) for run_lines in read_losses(all_facts)]
    keys, note = _in_common(by_key)
    same = [key for key in keys if len({run_lines[key]["bytes"] for run_lines in by_key}) == 1]
    if not same:
        raise UserError("the losses count other targets in each run (loss_on_prompt?): measure by --data")
    if len(same) < len(keys):
        cut = f"{len(keys) - len(same)} rows that are cut differently are left out"
        note = "; ".join(filter(None, [note, cut]))
    groups = np.array([group for group, _ in same])
    return _per_target([[run_lines[key] for key in same] for run_lines in by_key], groups, note)


def _per_target(lines, groups, note) -> list[Rows]:
    """Loss and accuracy per target. `lines`: for each run its lines of the same rows."""
    nats, hits, targets, sizes = (
        np.array([[line[name] for line in run_lines] for run_lines in lines], dtype=float)
        for name in ("nats", "hits", "targets", "bytes")
    )
    if (targets == targets[0]).all():
        return [
            Rows("loss", nats, targets[0], groups, note),
            Rows("accuracy", hits, targets[0], groups, note),
        ]
    note = "; ".join(filter(None, [note, "tokenizers differ: bits per byte"]))
    return [Rows("bits per byte", nats / math.log(2), sizes[0], groups, note)]


SAME_TEXT = (
    "max_documents",
    "max_tokens",
    "text_column",
    "val_share",
    "test_share",
    "split_seed",
)


def _text_rows(all_facts) -> list[Rows]:
    """Loss of blocks of a text from losses.jsonl: by block, or by stretches of bytes where blocks differ."""
    texts = {
        json.dumps([facts.config["facts"]["fingerprint"]["data"], *(facts.constant(n) for n in SAME_TEXT
                    if (facts.config["script"], n) != ("run_pretrain_diversity", "max_tokens"))])  # of train
        for facts in all_facts
    }  # fmt: skip
    if len(texts) > 1:
        raise UserError("these runs were tested on different text: compare runs of one data set and split")
    lines = read_losses(all_facts)
    shapes = {tuple((line["targets"], line["bytes"]) for line in run_lines) for run_lines in lines}
    if len(shapes) == 1:
        return _per_target(lines, np.array([line["group"] for line in lines[0]]), "")
    sizes = [sum(line["bytes"] for line in run_lines) for run_lines in lines]
    if max(sizes) - min(sizes) > 0.01 * max(sizes):
        raise UserError(f"the tokens spell {min(sizes)} and {max(sizes)} bytes of the text: not comparable")
    edges = np.linspace(0, 1, 1 + min(100, *map(len, lines)))
    cuts = [_cut(run_lines, edges) * max(sizes) / size for run_lines, size in zip(lines, sizes, strict=True)]
    weights, groups = np.diff(edges) * max(sizes), np.arange(len(edges) - 1)
    note = f"tokenizers or blocks differ: bits per byte in {len(groups)} stretches of the text"
    return [Rows("bits per byte", np.array(cuts) / math.log(2), weights, groups, note)]


def _cut(lines, edges) -> np.ndarray:
    """Nats of each stretch of the text; a block across an edge is divided in proportion to bytes."""
    ends = np.cumsum([0, *(line["bytes"] for line in lines)])
    nats = np.cumsum([0, *(line["nats"] for line in lines)])
    return np.diff(np.interp(edges * ends[-1], ends, nats))


def has_losses(facts) -> bool:
    return any((facts.folder / name).exists() for name in NEEDED)


def judged_rows(all_facts) -> list[Rows]:
    """Grades by prompt, for each judge (model, address and temperature) that graded all of the runs."""
    all_rows = []
    for judge, name in judges_of(all_facts).items():
        summaries = [graded_by(facts, judge) for facts in all_facts]
        if None in summaries:
            continue
        by_key = [mean_grades(summary.get("grades", [])) for summary in summaries]
        if not set(by_key[0]).intersection(*by_key[1:]):
            continue  # answers to other prompts: no reason to compare nothing at all
        keys, note = _in_common(by_key)
        sums, groups = (
            np.array([[run_lines[k] for k in keys] for run_lines in by_key]),
            [key[0] for key in keys],
        )
        all_rows.append(Rows(f"grade by {name}", sums, np.ones(len(keys)), np.array(groups), note))
    return all_rows


def judge_notes(all_facts) -> list[str]:
    """A line for each model that graded all of the runs, but none of whose judges did."""
    notes, judges = [], judges_of(all_facts)
    for model in dict.fromkeys(model for model, *_ in judges):
        named = {name: judge for judge, name in judges.items() if judge[0] == model}
        graded = [[graded_by(facts, judge) is not None for judge in named.values()] for facts in all_facts]
        if all(map(any, graded)) and not any(map(all, zip(*graded, strict=True))):
            notes.append(f"NOTE grades by {'; '.join(named)} are not compared: grade all by one of them")
    return notes


def mean_grades(entries) -> dict:
    """(prompt, occurrence number) -> mean grade; answers without a grade are left out."""
    means = {}
    for key, entry in numbered(entries).items():
        if grades := [grade for grade in entry["grades"] if grade is not None]:
            means[key] = sum(grades) / len(grades)
    return means
