"""The report of run_pretrain_diversity.py's study: tables, sentences, pictures.

matrix: arm -> text -> files of losses (as losses.jsonl), one per seed.
coefficients: of lab/measure/diversity.py."""

import itertools
import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np

from lab.compare.difference import FEWEST, difference, mean
from lab.compare.rows import NEEDED, Rows
from lab.compare.tables import markdown
from lab.data import blocks, mixture
from lab.errors import UserError
from lab.measure.statistics import plus_minus, span
from lab.run.files import short_hash, whole_file, write_json
from lab.run.flags import constants_of
from lab.run.provenance import git_state
from lab.run.resume import changed_constants
from lab.run.stored import read_config, read_result


def write(folder, runs, matrix, coefficients, notes, cfg) -> str:
    """Writes study.md, study.json, matrix.png and, with coefficients, link.png; returns the tables and
    sentences to show. runs: arm -> folders, one per seed; notes: lines on what all runs have in common."""
    figures, seeds, neutral = cells(matrix), cfg.seeds, mixture.label(cfg.neutral)
    sentences, differences = verdicts(matrix, seeds)
    shown = [tables({"loss": figures["loss"]}, seeds), "\n".join(sentences)]
    parts = [heading(runs), "\n".join([*notes, *sentences]), tables(figures, seeds)]
    heat_map(figures["loss"], folder / "matrix.png", neutral, seeds)
    if coefficients:
        shown += [diversity_table(coefficients), link_table(coefficients, neutral, figures, seeds, matrix)]
        parts += [f"**diversity coefficient**\n\n{shown[-2]}", f"**diversity and loss**\n\n{shown[-1]}"]
        plot_link(coefficients, figures["loss"], neutral, folder / "link.png")
    found = {"matrix": figures, "differences": differences, "diversity": coefficients, "notes": notes}
    folders = {arm: [str(path) for path in paths] for arm, paths in runs.items()}
    write_json(folder / "study.json", {"runs": folders, **found, "constants": constants_of(cfg)})
    with whole_file(folder / "study.md") as file:
        file.write("\n\n".join(parts) + "\n")
    return "\n\n".join(shown)


def unequal(first, other, own) -> list[str]:
    """Names of what the config.json of two arms should have in common and have not. own: constants in which
    they may differ."""
    odd = sorted(changed_constants(first["constants"], other["constants"]).keys() - own)
    first, other = first["facts"], other["facts"]
    odd += mixture.differences(first["ledger"], other["ledger"])
    return odd + ["initial_weights"] * (first["initial_weights"] != other["initial_weights"])


def check_equal(runs, own):
    """UserError if the arms of a seed differ in more than their text: constants, tokens, first weights."""
    first = next(iter(runs.values()))
    for folders in runs.values():
        for one, other in zip(first, folders, strict=True):
            if odd := unequal(read_config(one), read_config(other), own):
                pair = f"{one} and {other} differ in {', '.join(odd)}"
                raise UserError(f"{pair}, not in text alone: move one away")


def notes_of(runs, documents) -> list[str]:
    """Lines on what all runs have in common, on arms that had less new text, on runs that learnt nothing.
    documents: text -> number of its test documents."""
    ledgers = {arm: read_config(folders[0])["facts"]["ledger"] for arm, folders in runs.items()}
    ledger = next(iter(ledgers.values()))
    lines = [f"ledger  every run read {ledger['tokens']} tokens in {ledger['steps']} equal steps"]
    distinct = {
        arm: sum(source["distinct_blocks"] for source in of["sources"].values())
        for arm, of in ledgers.items()
    }
    if len(set(distinct.values())) > 1:
        counts = ", ".join(f"{arm} {n}" for arm, n in distinct.items())
        lines.append(f"NOTE by --repeat the arms read unequal numbers of distinct blocks: {counts}")
    for arm, folders in runs.items():
        if idle := sum(read_result(folder)["test/own/alarm"] is not None for folder in folders):
            count = f"{idle} of {len(folders)} runs of {arm}"
            lines.append(f"NOTE NOT LEARNING: {count} do not beat token frequencies")
    few = " (few: intervals by stretch of text)"
    counts = [f"{name} {n}{few if n < blocks.FEWEST else ''}" for name, n in documents.items()]
    return [*lines, f"tested on documents  {'  '.join(counts)}"]


def rows_of(files, figure) -> Rows:
    """Reads losses of several runs on one text as Rows of one figure."""
    lines = [read_lines(Path(path)) for path in files]
    names = ("nats", "hits", "targets", "bytes")
    columns = {name: np.array([[line[name] for line in of] for of in lines], float) for name in names}
    groups = np.array([line["group"] for line in lines[0]])
    if figure == "bits per byte":
        return Rows(figure, columns["nats"] / math.log(2), columns["bytes"][0], groups)
    sums = columns["nats" if figure == "loss" else "hits"]
    return Rows(figure, sums, columns["targets"][0], groups)


def read_lines(path) -> list[dict]:
    """Reads what cross.write_losses wrote. UserError where it is damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if "hash" not in first:  # before 2026-11-28
            lines = [first, *lines]
        elif first["hash"] != short_hash(lines):
            raise ValueError
        if all(NEEDED["losses.jsonl"] <= line.keys() for line in lines):
            return lines
    raise UserError(f"{path} is damaged: delete it, and the same command makes it anew")


FIGURES = ("loss", "accuracy", "bits per byte")


def cells(matrix) -> dict:
    """figure -> arm -> text -> {mean, interval, runs}"""
    figures = {}
    for figure in FIGURES:
        for arm, arm_files in matrix.items():
            for name, files in arm_files.items():
                rows = rows_of(files, figure)
                cell = mean(rows, list(range(len(files))))
                figures.setdefault(figure, {}).setdefault(arm, {})[name] = cell
    return figures


def heading(runs) -> str:
    """What was compared: the folders of each arm's runs."""
    lines = [f"- {arm}: {', '.join(map(str, folders))}" for arm, folders in runs.items()]
    commit = git_state()["commit"] or "unknown"
    return "\n".join([f"# {' against '.join(runs)}", "", f"commit {commit}", "", *lines])


def spread(seeds) -> str:
    """What the intervals of the matrix are over."""
    return f"95 % over documents and {seeds} seeds" if seeds > 1 else "95 % over documents; one seed"


def tables(figures, seeds) -> str:
    """Markdown of the matrix: loss and perplexity, accuracy, bits per byte."""
    parts = []
    for figure, by_arm in figures.items():
        columns = {"trained on": list(by_arm)}
        for name in next(iter(by_arm.values())):
            column = [arm_figures[name] for arm_figures in by_arm.values()]
            columns[name] = [plus_minus(cell["mean"], cell["interval"], 4) for cell in column]
            if figure == "loss":
                columns[f"{name} ppl"] = [f"{math.exp(min(cell['mean'], 700)):.2f}" for cell in column]
        parts.append(f"**{figure}** on the held-out part of ({spread(seeds)})\n\n{markdown(columns)}")
    return "\n\n".join(parts)


def verdicts(matrix, seeds) -> tuple[list[str], list[dict]]:
    """A sentence for each mixture and text: does it beat the single sources? Neutral text first."""
    lines, differences = [], []
    singles = [arm for arm in matrix if len(mixture.shares_of(arm)) == 1]
    mixtures = [arm for arm in matrix if len(mixture.shares_of(arm)) > 1]
    if not singles or not mixtures:
        return ["no mixture beside its sources: nothing to decide"], []
    for mixed in mixtures:
        for name in reversed(matrix[mixed]):
            against = {arm: against_arm(matrix, mixed, arm, name) for arm in singles}
            differences += [
                {"mixture": mixed, "against": arm, "text": name, **figures}
                for arm, figures in against.items()
            ]
            lines.append(sentence(mixed, name, against, seeds))
    return lines, differences


def against_arm(matrix, mixed, arm, name) -> dict:
    """Loss of the mixture minus that of an arm on one text, with interval over documents and seeds."""
    files = [*matrix[mixed][name], *matrix[arm][name]]
    n = len(matrix[mixed][name])
    return difference(rows_of(files, "loss"), list(range(n)), list(range(n, len(files))))


FEWEST_SEEDS = 3  # a side; fewer say nothing of the spread between seeds


def sentence(mixed, name, against, seeds) -> str:
    differences = []
    for arm, figures in against.items():
        low, high = figures["interval"]
        differences.append(f"{figures['difference']:+.4f} ({low:+.4f} to {high:+.4f}) against {arm}")
    ends = [end for figures in against.values() for end in figures["interval"]]
    if any(figures["groups"] < FEWEST for figures in against.values()) or not np.isfinite(ends).all():
        few = f"fewer than {FEWEST} documents (or stretches of one)"
        verdict = f"{few}, or a loss that is no number: nothing to decide"
    elif seeds < FEWEST_SEEDS:
        verdict = f"too few seeds ({seeds} of {FEWEST_SEEDS}) to say whether the mixture wins"
    elif all(figures["interval"][1] < 0 for figures in against.values()):
        verdict = "the mixture wins beyond noise against every single source"
    elif all(figures["interval"][0] > 0 for figures in against.values()):
        verdict = "the mixture loses beyond noise against every single source"
    else:
        better = [arm for arm, figures in against.items() if figures["interval"][1] < 0]
        worse = [arm for arm, figures in against.items() if figures["interval"][0] > 0]
        same = [arm for arm in against if arm not in (*better, *worse)]
        parts = [("better than", better), ("worse than", worse), ("not to be told apart from", same)]
        verdict = "the mixture is " + ", ".join(
            f"{word} {' and '.join(arms)}" for word, arms in parts if arms
        )
    return "\n  loss ".join([f"on {name}, {mixed}: {verdict}", *differences])


def diversity_table(coefficients) -> str:
    """Markdown table of coefficients with intervals and noise floors, of bounds, of
    distances between arms."""
    rows = {**coefficients["arms"], **coefficients["bounds"]}
    columns = {
        "text": list(rows),
        "diversity": [f"{figures['coefficient']:.4f}" for figures in rows.values()],
        "95 %": [span(figures["interval"]) for figures in rows.values()],
        "noise floor": [
            f"{figures['noise_floor']:.4f}" if "noise_floor" in figures else "" for figures in rows.values()
        ],
        "batches": [figures["batches"] for figures in rows.values()],
    }
    text = markdown(columns)
    if crossed := coefficients["cross"]:
        columns = {"between": list(crossed)}
        columns["distance"] = [f"{figures['coefficient']:.4f}" for figures in crossed.values()]
        columns["95 %"] = [span(figures["interval"]) for figures in crossed.values()]
        columns["diversity differs by"] = [f"{figures['difference']:+.4f}" for figures in crossed.values()]
        columns["its 95 %"] = [span(figures["difference_interval"], sign="+") for figures in crossed.values()]
        text += "\n\n" + markdown(columns)
    drowned = [
        arm
        for arm, figures in coefficients["arms"].items()
        if figures["interval"][0] <= figures["noise_floor"]
    ]
    if drowned:
        better = "use larger batches, or more --fisher_samples"
        text += f"\n\nnot above the distance of a batch from itself: {', '.join(drowned)}; {better}"
    return text


def link_table(coefficients, neutral, cells, seeds, matrix) -> str:
    """Markdown table of each arm's coefficient beside its losses, and the order of arms by both: each
    neighbour against the next, by the interval of their difference."""
    arms = list(coefficients["arms"])
    columns = {"arm": arms, "diversity": [f"{coefficients['arms'][arm]['coefficient']:.4f}" for arm in arms]}
    for name in cells["loss"][arms[0]]:
        losses = [cells["loss"][arm][name] for arm in arms]
        columns[f"loss on {name}"] = [plus_minus(cell["mean"], cell["interval"], 4) for cell in losses]
    by_diversity = sorted(arms, key=lambda arm: -coefficients["arms"][arm]["coefficient"])
    by_loss = sorted(arms, key=lambda arm: cells["loss"][arm][neutral]["mean"])

    def more_diverse(a, b):
        cross = coefficients["cross"]
        low, high = (cross.get(f"{a} x {b}") or cross[f"{b} x {a}"])["difference_interval"]
        return low > 0 or high < 0

    def lower(a, b):
        figures = against_arm(matrix, a, b, neutral)
        return figures["groups"] >= FEWEST and figures["interval"][1] < 0

    orders = [f"by diversity: {order(by_diversity, '>', more_diverse)}"]
    if seeds < FEWEST_SEEDS:
        orders.append(f"by loss on {neutral}: no order, too few seeds ({seeds} of {FEWEST_SEEDS})")
    else:
        orders.append(f"by loss on {neutral}: {order(by_loss, '<', lower)}")
    return "\n".join([markdown(columns), "", *orders])


def order(arms, sign, differ) -> str:
    """`a > b ~ c`: neighbours between which `sign` stands differ, those with ~ cannot be told apart."""
    signs = [sign if differ(a, b) else "~" for a, b in itertools.pairwise(arms)]
    text = " ".join(itertools.chain(*itertools.zip_longest(arms, signs, fillvalue="")))
    return text.strip() + (" (~: cannot be told apart)" if "~" in signs else "")


def heat_map(by_arm, path, neutral, seeds):
    """Draws the loss of each arm on each text; the colour is the distance from the text's best arm."""
    from matplotlib.figure import Figure

    arms, texts = list(by_arm), list(next(iter(by_arm.values())))
    means = np.array([[by_arm[arm][name]["mean"] for name in texts] for arm in arms])
    figure = Figure(figsize=(3 + 1.9 * len(texts), 1.6 + 0.7 * len(arms)))
    axes = figure.subplots()
    image = axes.imshow(means - means.min(0), cmap="YlOrRd", aspect="auto")
    for i, arm in enumerate(arms):
        for j, name in enumerate(texts):
            cell = by_arm[arm][name]
            dark = (means - means.min(0))[i, j] > 0.6 * max(1e-9, (means - means.min(0)).max())
            label = plus_minus(cell["mean"], cell["interval"]).replace(" ±", "\n±")
            axes.text(j, i, label, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axes.set_xticks(range(len(texts)), [f"{name}\n(neutral)" if name == neutral else name for name in texts])
    axes.set_yticks(range(len(arms)), arms)
    axes.set(xlabel="tested on", ylabel="trained on", title=f"Loss per token (± {spread(seeds)})")
    figure.colorbar(image, label="above the best arm")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def plot_link(coefficients, losses, neutral, path):
    """Plots the loss of each arm on the neutral text over its diversity, both with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for arm, cell in coefficients["arms"].items():
        loss = losses[arm][neutral]
        x, y = cell["coefficient"], loss["mean"]
        across, up = (
            np.nan_to_num(np.abs(np.subtract(of["interval"], v)))[:, None] for of, v in ((cell, x), (loss, y))
        )
        axes.errorbar(x, y, xerr=across, yerr=up, marker="o", capsize=3, label=arm)
    axes.set(
        xlabel="diversity coefficient", ylabel=f"loss per token on {neutral}", title="Diversity and loss"
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
