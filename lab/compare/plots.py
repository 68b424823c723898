"""Curves of runs and TensorBoard's HPARAMS, from metrics.jsonl and the facts."""

import os
import shutil

from lab.compare.facts import ABSENT, differing, judge_of, judges_of, resume_words
from lab.compare.tables import GROUPED, code_version, sorted_facts, values_of
from lab.errors import UserError

SMOOTHED = 20
LABELLED = 14  # as many curves can be told apart by colour and line style


def draw(all_facts, path, by=()):
    """Plots training and validation loss of runs over steps into one PNG.

    by: constants that choose the colour. Without it each run has its own colour; many
    are coloured by final loss.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = dict(zip(("train/loss", "val/loss"), figure.subplots(1, 2), strict=True))
    all_facts = sorted(all_facts, key=lambda facts: [sorted_facts(facts, name) for name in by])  # stable
    names = [", ".join(values_of(facts, by)) for facts in all_facts] if by else short_names(all_facts)
    names = [name.replace("$", r"\$") for name in names]  # between two of them matplotlib reads mathematics
    order = list(dict.fromkeys(names))
    final = [facts.figure("loss", "log_loss")[0] for facts in all_facts]
    known = sorted(value for value in final if value is not None)
    for facts, name, loss in zip(all_facts, names, final, strict=True):
        place = order.index(name)
        style = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":", "-.")[place // 10 % 4]}
        if len(order) > LABELLED:
            share = known.index(loss) / max(len(known) - 1, 1) if loss in known else 1.0
            style = {"color": colormaps["viridis"](share), "linewidth": 0.8}
        for key, panel in axes.items():
            if points := facts.curve(key):
                points = smoothed(points) if key == "train/loss" else points
                marker = "o" if len(points) < 3 else None  # a line of one point cannot be seen
                panel.plot(*zip(*points, strict=True), label=name, marker=marker, **style)
    for key, panel in axes.items():
        smooth = f", running mean of a {SMOOTHED}th of the run" if key == "train/loss" else ""
        folds = ", folds behind each other" if any(f.constant("folds") for f in all_facts) else ""
        panel.set(xlabel="step", ylabel="loss", title=f"{key}{smooth}{folds}")
        panel.grid(alpha=0.3)
        lines = [line.get_ydata() for line in panel.get_lines()]
        panel.set_ylim(*window([float(y) for line in lines for y in line]))
    if len(order) <= LABELLED:
        handles = {line.get_label(): line for panel in axes.values() for line in panel.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(order)),
                      title=", ".join(by) or None)  # fmt: skip
    else:
        figure.suptitle(
            f"{len(all_facts)} runs (too many to name), dark: lowest final loss, bright: highest or none"
        )
    figure.savefig(path, dpi=110)


def short_names(all_facts) -> list[str]:
    """Tags if they differ, otherwise folder names."""
    tags = [facts.tag for facts in all_facts]
    return tags if all(tags) and len(set(tags)) == len(tags) else [facts.name for facts in all_facts]


def smoothed(points):
    """Running mean over a twentieth of the points."""
    width, out = max(1, len(points) // SMOOTHED), []
    for i, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, i + 1 - width) : i + 1]]
        out.append((step, sum(near) / len(near)))
    return out


def window(values) -> tuple[float, float] | tuple[None, None]:
    """Axis limits that a few runaway losses do not stretch."""
    if not values:
        return None, None
    values = sorted(values)
    low, high = values[0], values[int(0.98 * (len(values) - 1))]
    margin = 0.05 * (high - low) + 1e-3
    return low - margin, min(values[-1], high + 0.25 * (high - low)) + margin


def _known_kind(value) -> bool | int | float | str:
    """A constant as TensorBoard takes it: several values as text."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def write_hparams(all_facts) -> int:
    """Writes <run>/hparams/ of each finished run for TensorBoard's HPARAMS page; returns how many.

    The constants in which these runs differ, seed and tag, other code, other constants since a resume; their
    final figures.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    names, version = ["script", "seed", "tag", *differing(all_facts)], code_version(all_facts)
    finished, judges = [facts for facts in all_facts if facts.finished], judges_of(all_facts)
    for facts in finished:
        values = {name: facts.constant(name) for name in names}
        values |= {name: ABSENT for name in names if facts.trained and not facts.has(name)}
        values |= {"code version": version(facts), "resumed": "; ".join(resume_words(facts))}
        values = {name: _known_kind(value) for name, value in values.items() if value not in (None, "")}
        final = "final" if facts.part == "test" else "final_val"  # figures of two parts are two columns
        metrics = {f"{final}/{name}": facts.figure(*of)[0] for name, of in GROUPED.items()}
        metrics |= {f"judge/{judges[judge_of(*item)]}": item[1].get("score") for item in facts.judged.items()}
        metrics = {name: value for name, value in metrics.items() if value is not None}
        folder = facts.folder / "hparams"
        if not os.access(facts.folder, os.W_OK):
            raise UserError(f"{facts.folder} cannot be written: the table stands, HPARAMS does not")
        shutil.rmtree(folder, ignore_errors=True)
        with SummaryWriter(folder) as writer:
            for summary in hparams(values, metrics):
                writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, facts.result["step"])
    return len(finished)
