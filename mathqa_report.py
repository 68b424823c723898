"""What a study of arms found, as tables and plain sentences. Used by run_mathqa.py."""

import json
from pathlib import Path

import numpy as np

import compare
import core
import results

RATES = "Each arm has the rate it was given: which one suits it, several arms of one method can tell."


def read(folder, name):
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


def length(folder) -> dict:
    """Steps and seconds of training of a run: what other arms get, too."""
    result = read(folder, "result.json")
    return {"steps": result["steps"], "seconds": result["train_seconds"]}


def shared(folders) -> list[compare.Rows]:
    """Loss and answers of several runs on the rows that they share."""
    rows = compare.shared_rows([results.read(folder) for folder in folders])
    return [one for one in rows if one.name in ("loss", "answers")]


def report(found, small, cfg) -> tuple[str, dict]:
    """Markdown and figures. found: budget -> arm -> run folders, one a seed; small: arm -> quantise_run's."""
    parts, figures = [], {}
    seeds = f"{cfg.seeds} seeds" if cfg.seeds > 1 else "one seed"
    for budget, arms in found.items():
        title = f"equal {budget}" if budget in ("steps", "time") else budget
        said = "95 % over problems and seeds" if cfg.seeds > 1 else "95 % over problems, one seed"
        parts.append(f"**{title}** ({said}; s: of training; MB: gradients and optimizer)\n\n{table(arms)}")
        told, figures[budget] = verdicts(arms)
        parts.append("\n".join(told))
    if (count := sum(map(len, figures.values()))) > 2:
        parts.append(f"{count} comparisons: of 20 between equals one looks like a difference.\n{RATES}")
    if small:
        parts.append(f"**int4** (means over {seeds})\n\n{quantised_table(small)}")
        parts.append("\n".join(small_verdicts(small)))
    return "\n\n".join(parts), figures


def table(arms) -> str:
    """One line an arm: what it learnt, what it forgot, what it cost."""
    cells = {}
    for arm, folders in arms.items():
        of_arm = [read(folder, "result.json") for folder in folders]
        every, part = list(range(len(folders))), "test" if "test/loss" in of_arm[0] else "val"
        row = {"arm": arm}
        for rows, digits in zip(shared(folders), (4, 3), strict=True):
            one = compare.mean(rows, every)
            row[rows.name] = core.plus_minus(one["mean"], one["interval"], digits)
        row["per token"] = f"{over(of_arm, f'{part}/answer_accuracy_per_token'):.3f}"
        row["shuffled"] = f"{over(of_arm, f'{part}/shuffled_accuracy'):.3f}"
        forgotten = over(of_arm, "plain/forgotten")
        row["forgotten"] = "" if forgotten is None else f"{forgotten:+.4f}"
        row["trained"] = f"{of_arm[0]['trainable_parameters']:,}"
        row["steps"] = f"{over(of_arm, 'steps'):.0f}"
        row["s"] = f"{over(of_arm, 'train_seconds'):.1f}"
        rate = over(of_arm, "tokens_per_second")
        row["tokens/s"] = "" if rate is None else f"{rate:.0f}"
        row["MB"] = f"{over(of_arm, 'state_mb'):.2f}"
        # on a CPU that of the process: all runs so far
        on_cpu = read(folders[0], "config.json")["device"].startswith("cpu")
        row["peak MB"] = "" if on_cpu else f"{over(of_arm, 'peak_memory_mb'):.0f}"
        for name, cell in row.items():
            cells.setdefault(name, []).append(cell)
    return results.markdown({name: column for name, column in cells.items() if any(column)})


def over(of_arm, name) -> float | None:
    """The mean of a figure over runs; None where one lacks it."""
    values = [result.get(name) for result in of_arm]
    return None if None in values else float(np.mean(values))


def verdicts(arms) -> tuple[list[str], list[dict]]:
    """Each arm against the first, in loss and in answers: told apart, or noise?"""
    told, found = [], []
    first, *others = arms
    for arm in others:
        folders = [*arms[arm], *arms[first]]
        n = len(arms[arm])
        for rows in shared(folders):
            one = compare.difference(rows, list(range(n)), list(range(n, len(folders))))
            found.append({"arm": arm, "against": first, "figure": rows.name, **one})
            told.append(f"{arm} - {first}  {compare.verdict(one, rows.name, (arm, first))}")
    return told, found


def quantised_table(small) -> str:
    """A line for the float weights and the int4 ones of each arm's runs."""
    cells = {}
    for arm, of_arm in small.items():
        for kind in ("float", "int4"):
            how = f"int4 by {of_arm[0]['group']}" + (
                ", trained for it" if of_arm[0]["trained_for_it"] else ""
            )
            figures = [one[kind] for one in of_arm]
            part = "test" if "test/loss" in figures[0] else "val"
            row = {"run": arm, "weights": how if kind == "int4" else "float"}
            row["loss"] = f"{over(figures, f'{part}/loss'):.4f}"
            answers = over(figures, f"{part}/answer_accuracy")
            row["answers"] = "" if answers is None else f"{answers:.3f}"
            row["MB"] = f"{over(figures, 'mb'):.2f}"
            row["tokens/s"] = f"{over(figures, 'tokens_per_second'):.0f}"
            for name, cell in row.items():
                cells.setdefault(name, []).append(cell)
    return results.markdown({name: column for name, column in cells.items() if any(column)})


def small_difference(small, whole) -> dict:
    """int4 - float on the same rows, by figure; each side is (lines of losses.jsonl, of answers.jsonl)."""
    found = {}
    for (ours, theirs), name, column in (
        ((small[0], whole[0]), "loss", "nats"),
        ((small[1], whole[1]), "answers", "right"),
    ):
        if ours:
            sums = np.array([[float(line[column]) for line in of] for of in (ours, theirs)])
            weights = np.array([float(line.get("targets", 1)) for line in ours])
            rows = compare.Rows(name, sums, weights, np.array([line["group"] for line in ours]))
            found[name] = compare.difference(rows, [0], [1])
    return found


def small_verdicts(small) -> list[str]:
    """For the first run of each arm: does int4 differ from float?"""
    return [
        f"{arm}, int4 - float  {compare.verdict(one, name, ('int4', 'float'))}"
        for arm, of_arm in small.items()
        for name, one in of_arm[0]["int4 - float"].items()
    ]
