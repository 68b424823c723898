"""What a study of sources found, as tables, plain sentences and pictures.

matrix: arm -> text -> files of losses (as losses.jsonl), one a seed. found: the coefficients of task2vec."""

import itertools
import json
import math
from pathlib import Path

import numpy as np

from lab.compare.difference import FEWEST, difference, mean
from lab.compare.rows import Rows
from lab.compare.tables import markdown
from lab.data.mixture import shares_of
from lab.errors import UserError
from lab.measure.statistics import plus_minus


def rows_of(files, figure) -> Rows:
    """The lines of several runs on one text as rows of one figure."""
    lines = [read_lines(Path(path)) for path in files]
    names = ("nats", "hits", "targets", "bytes")
    columns = {name: np.array([[line[name] for line in of] for of in lines], float) for name in names}
    groups = np.array([line["group"] for line in lines[0]])
    if figure == "bits per byte":
        return Rows(figure, columns["nats"] / math.log(2), columns["bytes"][0], groups)
    sums = columns["nats" if figure == "loss" else "hits"]
    return Rows(figure, sums, columns["targets"][0], groups)


def read_lines(path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and the same command makes it anew") from None


FIGURES = ("loss", "accuracy", "bits per byte")


def cells(matrix) -> dict:
    """figure -> arm -> text -> {mean, interval, runs}"""
    found = {}
    for figure in FIGURES:
        for arm, arm_files in matrix.items():
            for name, files in arm_files.items():
                rows = rows_of(files, figure)
                one = mean(rows, list(range(len(files))))
                found.setdefault(figure, {}).setdefault(arm, {})[name] = one
    return found


def heading(runs_by_arm, commit) -> str:
    """What was compared: the folders of each arm's runs."""
    lines = [f"- {arm}: {', '.join(folders)}" for arm, folders in runs_by_arm.items()]
    return "\n".join([f"# {' against '.join(runs_by_arm)}", "", f"commit {commit or 'unknown'}", "", *lines])


def spread(seeds) -> str:
    """What the intervals of the matrix are over."""
    return f"95 % over documents and {seeds} seeds" if seeds > 1 else "95 % over documents; one seed"


def tables(found, seeds) -> str:
    """Markdown of the matrix: loss and perplexity, accuracy, bits per byte."""
    parts = []
    for figure, by_arm in found.items():
        columns = {"trained on": list(by_arm)}
        for name in next(iter(by_arm.values())):
            ones = [arm_figures[name] for arm_figures in by_arm.values()]
            columns[name] = [plus_minus(one["mean"], one["interval"], 4) for one in ones]
            if figure == "loss":
                columns[f"{name} ppl"] = [f"{math.exp(min(one['mean'], 700)):.2f}" for one in ones]
        parts.append(f"**{figure}** on the held-out part of ({spread(seeds)})\n\n{markdown(columns)}")
    return "\n\n".join(parts)


def verdicts(matrix, seeds) -> tuple[list[str], list[dict]]:
    """For each mixture and text a plain sentence: does it beat the arms of one source? Neutral text first."""
    lines, found = [], []
    singles = [arm for arm in matrix if len(shares_of(arm)) == 1]
    mixtures = [arm for arm in matrix if len(shares_of(arm)) > 1]
    if not singles or not mixtures:
        return ["no mixture beside its sources: nothing to decide"], []
    for mixed in mixtures:
        for name in reversed(matrix[mixed]):
            against = {arm: against_arm(matrix, mixed, arm, name) for arm in singles}
            found += [{"mixture": mixed, "against": arm, "text": name, **one} for arm, one in against.items()]
            lines.append(sentence(mixed, name, against, seeds))
    return lines, found


def against_arm(matrix, mixed, arm, name) -> dict:
    """Loss of the mixture less that of an arm on one text, with interval over documents and seeds."""
    files = [*matrix[mixed][name], *matrix[arm][name]]
    n = len(matrix[mixed][name])
    return difference(rows_of(files, "loss"), list(range(n)), list(range(n, len(files))))


FEWEST_SEEDS = 3  # a side; fewer say nothing of the spread between seeds


def sentence(mixed, name, against, seeds) -> str:
    told = [
        f"{one['difference']:+.4f} ({one['interval'][0]:+.4f} to {one['interval'][1]:+.4f}) against {arm}"
        for arm, one in against.items()
    ]
    ends = [end for one in against.values() for end in one["interval"]]
    if any(one["groups"] < FEWEST for one in against.values()) or not np.isfinite(ends).all():
        said = f"fewer than {FEWEST} held-out documents, or a loss that is no number: nothing to decide"
    elif seeds < FEWEST_SEEDS:
        said = f"too few seeds ({seeds} of {FEWEST_SEEDS}) to say whether the mixture wins"
    elif all(one["interval"][1] < 0 for one in against.values()):
        said = "the mixture wins beyond noise against every single source"
    elif all(one["interval"][0] > 0 for one in against.values()):
        said = "the mixture loses beyond noise against every single source"
    else:
        better = [arm for arm, one in against.items() if one["interval"][1] < 0]
        worse = [arm for arm, one in against.items() if one["interval"][0] > 0]
        same = [arm for arm in against if arm not in (*better, *worse)]
        parts = [("better than", better), ("worse than", worse), ("not to be told apart from", same)]
        said = "the mixture is " + ", ".join(f"{word} {' and '.join(arms)}" for word, arms in parts if arms)
    return "\n  loss ".join([f"on {name}, {mixed}: {said}", *told])


def diversity_table(found) -> str:
    """Markdown: coefficients with intervals and noise floors; bounds; distances between arms."""
    ones = {**found["arms"], **found["bounds"]}
    columns = {
        "text": list(ones),
        "diversity": [f"{one['coefficient']:.4f}" for one in ones.values()],
        "95 %": [span(one["interval"]) for one in ones.values()],
        "noise floor": [f"{one['noise_floor']:.4f}" if "noise_floor" in one else "" for one in ones.values()],
        "batches": [one["batches"] for one in ones.values()],
    }
    text = markdown(columns)
    if crossed := found["cross"]:
        columns = {"between": list(crossed)}
        columns["distance"] = [f"{one['coefficient']:.4f}" for one in crossed.values()]
        columns["95 %"] = [span(one["interval"]) for one in crossed.values()]
        columns["diversity differs by"] = [f"{one['difference']:+.4f}" for one in crossed.values()]
        columns["its 95 %"] = [span(one["difference_interval"], "+") for one in crossed.values()]
        text += "\n\n" + markdown(columns)
    drowned = [arm for arm, one in found["arms"].items() if one["interval"][0] <= one["noise_floor"]]
    if drowned:
        better = "use larger batches, or more --fisher_samples"
        text += f"\n\nnot above the distance of a batch from itself: {', '.join(drowned)}; {better}"
    return text


def span(interval, sign="") -> str:
    low, high = interval
    return f"{low:{sign}.4f} to {high:{sign}.4f}" if low == low else "too few batches"


def link_table(found, neutral, cells, seeds) -> str:
    """Markdown: each arm's coefficient beside its losses; the order of arms by either, if there is one."""
    arms = list(found["arms"])
    columns = {"arm": arms, "diversity": [f"{found['arms'][arm]['coefficient']:.4f}" for arm in arms]}
    for name in cells["loss"][arms[0]]:
        losses = [cells["loss"][arm][name] for arm in arms]
        columns[f"loss on {name}"] = [plus_minus(one["mean"], one["interval"], 4) for one in losses]
    text = markdown(columns)
    by_diversity = sorted(arms, key=lambda arm: -found["arms"][arm]["coefficient"])

    def of(arm):
        return cells["loss"][arm][neutral]

    by_loss = sorted(arms, key=lambda arm: of(arm)["mean"])
    orders = [f"by diversity: {' > '.join(by_diversity)}", f"by loss on {neutral}: {' < '.join(by_loss)}"]
    if not apart([found["arms"][arm] for arm in by_diversity]):
        orders[0] += " (intervals of neighbours overlap: no order)"
    if seeds < FEWEST_SEEDS:
        orders[1] += " (too few seeds for an order)"
    elif not apart([of(arm) for arm in by_loss]):
        orders[1] += " (intervals of neighbours overlap: no order)"
    return "\n".join([text, "", *orders])


def apart(ones) -> bool:
    """Whether no interval reaches into that of a neighbour in this order."""
    pairs = ((a["interval"], b["interval"]) for a, b in itertools.pairwise(ones))
    return all(a[0] > b[1] or b[0] > a[1] for a, b in pairs)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def heat_map(by_arm, path, neutral, seeds):
    """Loss of each arm on each text; the colour is the distance from the text's best arm."""
    plt, arms, texts = pyplot(), list(by_arm), list(next(iter(by_arm.values())))
    means = np.array([[by_arm[arm][name]["mean"] for name in texts] for arm in arms])
    figure, axes = plt.subplots(figsize=(3 + 1.9 * len(texts), 1.6 + 0.7 * len(arms)))
    image = axes.imshow(means - means.min(0), cmap="YlOrRd", aspect="auto")
    for i, arm in enumerate(arms):
        for j, name in enumerate(texts):
            one = by_arm[arm][name]
            dark = (means - means.min(0))[i, j] > 0.6 * max(1e-9, (means - means.min(0)).max())
            said = f"{one['mean']:.3f}\n± {(one['interval'][1] - one['interval'][0]) / 2:.3f}"
            axes.text(j, i, said, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axes.set_xticks(range(len(texts)), [f"{name}\n(neutral)" if name == neutral else name for name in texts])
    axes.set_yticks(range(len(arms)), arms)
    axes.set(xlabel="tested on", ylabel="trained on", title=f"Loss per token (± {spread(seeds)})")
    figure.colorbar(image, label="above the best arm")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_link(found, losses, neutral, path):
    """Diversity of each arm against its loss on the neutral text, both with 95 % intervals."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for arm, one in found["arms"].items():
        loss = losses[arm][neutral]
        x, y = one["coefficient"], loss["mean"]
        across, up = (
            np.nan_to_num(np.abs(np.subtract(of["interval"], v)))[:, None] for of, v in ((one, x), (loss, y))
        )
        axes.errorbar(x, y, xerr=across, yerr=up, marker="o", capsize=3, label=arm)
    axes.set(
        xlabel="diversity coefficient", ylabel=f"loss per token on {neutral}", title="Diversity and loss"
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
