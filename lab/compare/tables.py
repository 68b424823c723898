"""Tables of runs: a row for each run, or for each group of seeds."""

import math
import re
import statistics

from lab.compare.facts import (
    ABSENT,
    IGNORED_IN_COMPARISON,
    alarm_notes,
    code_versions,
    differing,
    differing_scripts,
    graded_by,
    how_to_see,
    judges_of,
    not_the_same,
    resume_notes,
)
from lab.errors import UserError
from lab.measure.statistics import plus_minus


def _number(value) -> str:
    if value is None or isinstance(value, str | bool):
        return "" if value is None else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _constant(name, all_facts):
    """Makes the cell of a constant: `absent` where only other runs have it."""
    known = any(facts.has(name) for facts in all_facts)

    def text(facts):
        return ABSENT if known and facts.trained and not facts.has(name) else _number(facts.constant(name))

    return text


def _figure(*names, digits=3):
    def text(facts):
        value, interval = facts.figure(*names)
        if value is None:
            return ""
        cell = plus_minus(value, interval, digits) if interval else f"{value:.{digits}f}"
        return cell if facts.part == "test" else f"val {cell}"

    return text


def _model(facts) -> str:
    """The last two parts of a path; a Hub id stays as it is."""
    return "/".join(str(facts.constant("model") or "").rstrip("/").split("/")[-2:])


def _result(name, text):
    """Makes a cell of one figure of result.json."""
    return lambda facts: "" if facts.result.get(name) is None else text(facts.result[name])


def _rate(facts) -> str:
    for unit in ("tokens", "examples"):
        if rate := facts.result.get(f"{unit}_per_second"):
            return f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.2f} {unit}/s"
    return ""


def _dollars(facts) -> str:
    price, seconds = facts.constant("price_per_hour"), facts.result.get("seconds")
    return f"{price * seconds / 3600:.2f}" if price and seconds else ""


def _status(facts) -> str:
    """Empty for a finished run; otherwise its step and last validation loss."""
    if facts.finished:
        return ""
    steps = [row["step"] for row in facts.metrics]
    val = facts.curve("val/loss")
    line = f"{facts.result.get('status', 'running or killed')} at step {max(steps, default=0)}"
    return line + (f", val {val[-1][1]:.4f}" if val else "")


def _judges(all_facts) -> dict:
    """A column for each judge that graded one of them."""

    def column(judge):
        def text(facts):
            s = graded_by(facts, judge) or {}
            if s.get("score") is None or not s.get("score_interval"):
                return ""
            some = f" ({s['graded']} of {s['rows']})" if s.get("graded", 0) < s.get("rows", 0) else ""
            return plus_minus(s["score"], s["score_interval"], 2) + some

        return text

    return {name: column(judge) for judge, name in judges_of(all_facts).items()}


def code_version(all_facts):
    """Makes a cell: runs with the same number ran the same code. Empty if all did."""
    files = code_versions(all_facts)

    def version(facts):
        return tuple(facts.code.get(file) for file in files)

    numbers = {}
    for facts in all_facts:
        if any(version(facts)):
            numbers.setdefault(version(facts), len(numbers) + 1)

    def text(facts):
        unknown = files and facts.trained and not facts.code
        return "unknown" if unknown else str(numbers.get(version(facts), ""))

    return text


def columns(all_facts) -> dict:
    """Header -> function that makes a run's cell."""

    def constant(name):
        return _constant(name, all_facts)

    head = {"run": lambda facts: facts.name, "script": constant("script"), "data": constant("data")}
    head |= {"model": _model, "batch": constant("batch"), "epochs": constant("epochs")}
    head |= {"opt": constant("optimizer"), "lr": constant("lr"), "min_lr": constant("min_lr")}
    head |= {"warmup": constant("warmup"), "wd": constant("weight_decay")}
    head |= {"rank": constant("lora_rank"), "alpha": constant("lora_alpha")}
    shown = {"script", "data", "optimizer", "tag", "preset", "mode", *IGNORED_IN_COMPARISON}
    shown |= {"model", "batch", "epochs", "lr", "min_lr", "warmup", "weight_decay", "lora_rank", "lora_alpha"}
    also = [name for name in differing(all_facts) if name not in shown]
    head |= {name: constant(name) for name in also}  # what else tells these runs apart
    head |= {"code version": code_version(all_facts)}
    head |= {"seed": constant("seed"), "loss": _figure("loss", "log_loss", digits=4)}
    head |= {"perplexity": _figure("perplexity"), "bits/byte": _figure("bits_per_byte", digits=4)}
    head |= {"accuracy": _figure("accuracy"), "answers": _figure("answer_accuracy")}
    head |= {f"judge {name}": column for name, column in _judges(all_facts).items()}
    head |= {"min": _result("seconds", lambda s: f"{s / 60:.1f}"), "note": constant("note")}
    head |= {"parameters": _result("parameters", lambda n: f"{n:,}")}
    head |= {"trained": _result("trainable_parameters", lambda n: f"{n:,}"), "rate": _rate}
    head |= {"memory MB": _result("peak_memory_mb", lambda mb: f"{mb:.0f}")}
    head |= {"device": constant("device"), "dollars": _dollars, "unfinished": _status}
    return head


def notes_below(all_facts) -> list[str]:
    """Lines on what constants do not show: other code, resumes with another schedule."""
    lines, versions = [], code_versions(all_facts)
    if versions:
        lines.append(f"NOTE {not_the_same(versions)} in all of these runs:")
        lines.append(f"  {how_to_see(next(iter(versions.values())))}")
    named = [(facts.name, facts) for facts in all_facts]
    lines += [*resume_notes(named), *alarm_notes(named)]
    return ["", *lines] if lines else []


SAME = ("script", "data", "device", "seed")  # said once above the table where all runs agree


def table(all_facts, order=None) -> str:
    """Markdown table with a line for each run, sorted by name or by the constant or figure `order`."""
    all_facts = sorted(all_facts, key=lambda facts: facts.name)
    if order:
        all_facts = sorted(
            all_facts, key=lambda facts: sorted_facts(facts, order)
        )  # stable: ties stay by name
    cells = {header: [cell(facts) for facts in all_facts] for header, cell in columns(all_facts).items()}
    shared = [f"{name} {cells[name][0]}" for name in SAME if len(set(cells[name])) == 1 and cells[name][0]]
    kept = {h: c for h, c in cells.items() if any(c) and not (h in SAME and len(set(c)) == 1)}
    lines = [f"{len(all_facts)} runs  {'  '.join(shared)}", "", markdown(kept), *notes_below(all_facts)]
    return "\n".join(lines)


def sorted_facts(facts, name):
    name = {"bits/byte": "bits_per_byte", "min": "seconds"}.get(name, name)  # headers of the table
    value = facts.figure(name, "log_loss" if name == "loss" else name)[0]
    value = facts.result.get(name, facts.constant(name)) if value is None else value
    value = value if isinstance(value, int | float | str) and value == value else None  # NaN comes last
    return (value is None, isinstance(value, str), value if value is not None else 0)


def check_names(all_facts, group_by, sort):
    """Raises UserError if no run has the constants of --group_by, or the constant or figure of --sort."""
    known = dict.fromkeys(
        name for facts in all_facts for name in (*facts.config["constants"], "preset", "script")
    )
    for name in group_by:
        if name not in known:
            raise UserError(f"--group_by {name}: no run has such a constant: use one of {', '.join(known)}")
    if sort and sort not in known and all(sorted_facts(facts, sort)[0] for facts in all_facts):
        figures = "loss, accuracy, perplexity"
        raise UserError(f"--sort {sort}: no run has such a constant or figure: use lr or {figures}, say")


def slug(text) -> str:
    """`text` as part of a file name: 60 bytes at most."""
    return re.sub(r"[^\w.]+", "_", text).encode()[:60].decode(errors="ignore")


def markdown(cells) -> str:
    """{header: cells} as a Markdown table with aligned columns."""
    rows = [list(cells), *zip(*cells.values(), strict=True)]
    rows = [[" ".join(str(cell).replace("|", "/").split()) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(cells))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


GROUPED = {
    "loss": ("loss", "log_loss"),
    "perplexity": ("perplexity",),
    "bits/byte": ("bits_per_byte",),
    "accuracy": ("accuracy",),
    "answers": ("answer_accuracy",),
}


def grouped(all_facts, names, order=None) -> str:
    """Markdown table with a line for each combination of the constants `names`: mean ± s.d. over runs.

    Sorted by these constants, or by the mean of `order`.
    """
    groups, unfinished = {}, [facts for facts in all_facts if not facts.finished]
    for facts in sorted(
        all_facts, key=lambda facts: ([sorted_facts(facts, name) for name in names], facts.name)
    ):
        if facts.finished:
            groups.setdefault(values_of(facts, names), []).append(facts)
    if order:
        groups = dict(sorted(groups.items(), key=lambda item: _mean_order(item[1], order)))
    cells = {name: [values[i] for values in groups] for i, name in enumerate(names)}
    if not groups:
        raise UserError(f"none of {len(all_facts)} runs is finished: leave out --group_by to see them")
    cells["runs"] = [str(len(group)) for group in groups.values()]
    cells["seeds"] = [_seeds(group) for group in groups.values()]
    for header, of in GROUPED.items():
        cells[header] = [_group_figure(group, of) for group in groups.values()]
    for judge, name in judges_of(all_facts).items():
        scores = [[(graded_by(f, judge) or {}).get("score") for f in group] for group in groups.values()]
        cells[f"judge {name}"] = [_spread(values, 2) for values in scores]
    times = [[f.result["seconds"] / 60 for f in group if "seconds" in f.result] for group in groups.values()]
    cells["min"] = [_spread(values, 1) for values in times]
    cells["also differ in"] = [_also_differing(group, names) for group in groups.values()]
    lines = ["means ± standard deviation over runs", ""]
    lines.append(markdown({header: column for header, column in cells.items() if any(column)}))
    counted = [facts for group in groups.values() for facts in group]
    told = {*names, *(name for cell in cells["also differ in"] for name in cell.split(", "))}
    if others := [name for name in (*differing_scripts(counted), *differing(counted)) if name not in told]:
        lines += ["", f"NOTE from line to line {', '.join(others)} differ{'s' * (len(others) == 1)}, too"]
    lines += notes_below(counted)
    if unfinished:
        lines += ["", f"not counted, unfinished: {', '.join(facts.name for facts in unfinished)}"]
    return "\n".join(lines)


def values_of(facts, names) -> tuple[str, ...]:
    return tuple((_number(facts.constant(name)) or "none") if facts.has(name) else ABSENT for name in names)


def _also_differing(group, names) -> str:
    """Constants other than `names`, and files of code, in which runs of one group differ."""
    names_of = [*differing_scripts(group), *differing(group)]
    return ", ".join([*(name for name in names_of if name not in names), *code_versions(group)])


def _mean_order(group, order):
    keys = [sorted_facts(facts, order) for facts in group]
    numbers = [value for missing, is_text, value in keys if not (missing or is_text)]
    return (not numbers, statistics.mean(numbers)) if numbers else (True, 0.0)


def _seeds(group) -> str:
    return " ".join(sorted({_number(facts.constant("seed")) for facts in group}))


def _group_figure(group, names) -> str:
    """Mean and deviation of a figure; the part that it is of, where that is not the test part in all runs."""
    known = [facts for facts in group if facts.figure(*names)[0] is not None]
    parts = " and ".join(sorted({facts.part for facts in known}))
    text = _spread([facts.figure(*names)[0] for facts in known], 4)
    return text if parts in ("test", "") else f"{parts} {text}"


def _spread(values, digits) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "nan"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
