"""The report of run_mathqa.py's study of ways to fine-tune: tables and sentences."""

from pathlib import Path

import numpy as np

from lab.compare import facts
from lab.compare.difference import difference, mean, verdict
from lab.compare.rows import Rows, read_lines, shared_rows
from lab.compare.tables import markdown
from lab.errors import UserError
from lab.measure.statistics import plus_minus
from lab.run.files import read_sealed, whole_file, write_json
from lab.run.flags import constants_of
from lab.run.provenance import git_state
from lab.run.stored import prepare_folder

RATES = "Each arm has the rate it was given: which one suits it, several arms of one method can tell."


def read(folder, name) -> dict:
    """A .json file of a run folder. UserError where it is damaged."""
    try:
        return read_sealed(Path(folder) / name)
    except (OSError, ValueError):
        raise UserError(
            f"{folder}/{name} is missing or damaged: the same command makes the run anew"
        ) from None


def length(folder) -> dict:
    """Steps and seconds of training of a run, which set those of the other arms."""
    result = read(folder, "result.json")
    return {"steps": result["steps"], "seconds": result["train_seconds"]}


def shared(folders) -> list[Rows]:
    """Loss and answers of several runs on their common rows."""
    rows = shared_rows([facts.read(folder) for folder in folders])
    return [one for one in rows if one.name in ("loss", "answers")]


def shuffled_rows(folders) -> Rows:
    """Whether each row was answered rightly after another row's problem: the control."""
    lines = [read_lines(facts.read(folder), "answers.jsonl") for folder in folders]
    right = np.array([[float(line["right_shuffled"]) for line in run_lines] for run_lines in lines])
    return Rows("shuffled", right, np.ones(right.shape[1]), np.array([x["group"] for x in lines[0]]))


def heading(folders_by_arm) -> str:
    """What was studied, and what the columns mean."""
    folder = next(iter(next(iter(folders_by_arm.values())).values()))[0]
    config, result = read(folder, "config.json"), read(folder, "result.json")
    part = "test" if "test/loss" in result else "val"
    c, usual = config["constants"], result[f"{part}/letter"]
    rows = f"{result[f'{part}/rows']} {part} rows of {c['data']}"
    lines = [
        f"{rows}; a model of {result['parameters']:,} parameters, begun with {c['init_from']}",
        f"answers: the likeliest of five options is right; by chance 0.200, always {usual} "
        f"{result[f'{part}/letter_accuracy']:.3f}",
        "per token: the same by likelihood per token; shuffled: after another row's problem",
        "forgotten: nats per token more on held-out text of the pretraining",
    ]
    alarms = [name for arms in folders_by_arm.values() for name, of in arms.items() if any(
        read(folder, "result.json").get("alarm") for folder in of)]  # fmt: skip
    if alarms:
        lines.append(
            f"NOT LEARNING in some run (its result.json says how): {', '.join(dict.fromkeys(alarms))}"
        )
    return "\n".join(lines)


def report(runs, small, cfg) -> tuple[str, dict]:
    """Markdown and figures. runs: budget -> arm -> run folders, one per seed; small: arm ->
    results of quantise_run."""
    parts, figures = [heading(runs)], {}
    seeds = f"{cfg.seeds} seeds" if cfg.seeds > 1 else "one seed"
    for budget, arms in runs.items():
        title = f"equal {budget}" if budget in ("steps", "time") else budget
        interval = "95 % over problems and seeds" if cfg.seeds > 1 else "95 % over problems, one seed"
        parts.append(
            f"**{title}** ({interval}; s: of training; MB: gradients and optimizer)\n\n{table(arms)}"
        )
        sentences, figures[budget] = verdicts(arms)
        parts.append("\n".join(sentences))
    if (count := sum(map(len, figures.values()))) > 2:
        parts.append(f"{count} comparisons: of 20 between equals one looks like a difference.\n{RATES}")
    if small:
        parts.append(f"**int4** (means over {seeds})\n\n{quantised_table(small)}")
        parts.append("\n".join(small_verdicts(small)))
    return "\n\n".join(parts), figures


def write(folder, runs, small, cfg) -> str:
    """Writes study.md and study.json of `report`; returns its text."""
    text, figures = report(runs, small, cfg)
    folders = {b: {arm: [str(f) for f in paths] for arm, paths in arms.items()} for b, arms in runs.items()}
    no_rows = {
        arm: [{name: value for name, value in result.items() if name != "rows"} for result in results]
        for arm, results in small.items()
    }
    content = {"runs": folders, "figures": figures, "quantised": no_rows, "constants": constants_of(cfg)}
    prepare_folder(folder)
    write_json(folder / "study.json", content)
    with whole_file(folder / "study.md") as file:
        file.write(f"commit {git_state()['commit'] or 'unknown'}\n\n{text}\n")
    return text


def table(arms) -> str:
    """Markdown table: what each arm learnt, forgot and cost."""
    cells = {}
    for arm, folders in arms.items():
        arm_results = [read(folder, "result.json") for folder in folders]
        every, part = list(range(len(folders))), "test" if "test/loss" in arm_results[0] else "val"
        row = {"arm": arm}
        for rows, digits in zip(shared(folders), (4, 3), strict=True):
            average = mean(rows, every)
            row[rows.name] = plus_minus(average["mean"], average["interval"], digits)
        row["per token"] = f"{over(arm_results, f'{part}/answer_accuracy_per_token'):.3f}"
        average = mean(shuffled_rows(folders), every)
        row["shuffled"] = plus_minus(average["mean"], average["interval"])
        forgotten = over(arm_results, "plain/forgotten")
        row["forgotten"] = "" if forgotten is None else f"{forgotten:+.4f}"
        row["trained"] = f"{arm_results[0]['trainable_parameters']:,}"
        row["steps"] = f"{over(arm_results, 'steps'):.0f}"
        row["s"] = f"{over(arm_results, 'train_seconds'):.1f}"
        rate = over(arm_results, "tokens_per_second")
        row["tokens/s"] = "" if rate is None else f"{rate:.0f}"
        row["MB"] = f"{over(arm_results, 'state_mb'):.2f}"
        # on a CPU that of the process: all runs so far
        on_cpu = read(folders[0], "config.json")["device"].startswith("cpu")
        row["peak MB"] = "" if on_cpu else f"{over(arm_results, 'peak_memory_mb'):.0f}"
        for name, cell in row.items():
            cells.setdefault(name, []).append(cell)
    return markdown({name: column for name, column in cells.items() if any(column)})


def over(arm_results, name) -> float | None:
    """Mean of a figure over runs; None if one lacks it."""
    values = [result.get(name) for result in arm_results]
    return None if None in values else float(np.mean(values))


def verdicts(arms) -> tuple[list[str], list[dict]]:
    """Compares each arm with the first, in loss and in answers: sentences and figures."""
    sentences, figures = [], []
    first, *others = arms
    for arm in others:
        folders = [*arms[arm], *arms[first]]
        n = len(arms[arm])
        for rows in shared(folders):
            figure = difference(rows, list(range(n)), list(range(n, len(folders))))
            figures.append({"arm": arm, "against": first, "figure": rows.name, **figure})
            sentences.append(f"{arm} - {first}  {verdict(figure, rows.name, (arm, first))}")
    return sentences, figures


def quantised_table(small) -> str:
    """Markdown table: float and int4 weights of each arm."""
    cells = {}
    for arm, arm_results in small.items():
        for kind in ("float", "int4"):
            how = f"int4 by {arm_results[0]['group']}" + (
                ", trained for it" if arm_results[0]["trained_for_it"] else ""
            )
            figures = [result[kind] for result in arm_results]
            part = "test" if "test/loss" in figures[0] else "val"
            row = {"run": arm, "weights": how if kind == "int4" else "float"}
            row["loss"] = f"{over(figures, f'{part}/loss'):.4f}"
            answers = over(figures, f"{part}/answer_accuracy")
            row["answers"] = "" if answers is None else f"{answers:.3f}"
            row["MB"] = f"{over(figures, 'mb'):.2f}"
            row["tokens/s"] = rate(figures)
            for name, cell in row.items():
                cells.setdefault(name, []).append(cell)
    return markdown({name: column for name, column in cells.items() if any(column)})


def rate(figures) -> str:
    """Tokens per second: mean over runs, and slowest to fastest pass: other work on the box moves it, too."""
    ranges = [of.get("tokens_per_second_range", [of["tokens_per_second"]]) for of in figures]
    low, high = min(map(min, ranges)), max(map(max, ranges))
    return f"{over(figures, 'tokens_per_second'):.0f} ({low:.0f} to {high:.0f})"


def small_verdicts(small) -> list[str]:
    """Sentences: does int4 differ from float, for each arm over all its runs?"""
    sentences = []
    for arm, arm_results in small.items():
        group, seeds = np.array(arm_results[0]["rows"]["group"]), range(len(arm_results))
        for name in ("loss", "answers"):
            sums = np.array([run["rows"][name][i] for i in (0, 1) for run in arm_results])
            weights = (
                np.array(arm_results[0]["rows"]["targets"], float) if name == "loss" else np.ones(len(group))
            )
            figure = difference(
                Rows(name, sums, weights, group), [len(arm_results) + i for i in seeds], list(seeds)
            )
            sentences.append(f"{arm}, int4 - float  {verdict(figure, name, ('int4', 'float'))}")
    return sentences
