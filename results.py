"""Tables and curves of runs, from their small files alone (config.json, result.json, metrics.jsonl,
judged.json): a run that came home without its checkpoints counts. Used by eval.py.
"""

import collections
import functools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import core
import runs

# ------------------------------------------------------------------------------------------ what a run says

ABSENT = "absent"  # what is shown of a constant that a run's script did not have; one that is None is "none"
IMPORTED = re.compile(r"^\s*(?:import|from) (\w+)", re.MULTILINE)


@dataclass
class Facts:
    """The small files of a run."""

    folder: Path
    config: dict
    result: dict  # empty while it runs, or when it was killed
    metrics: list[dict]
    judged: dict  # judge -> its summary

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def part(self) -> str:
        """What its figures are of."""
        return "test" if any(name.startswith("test/") for name in self.result) else "val"

    @property
    def tag(self) -> str:
        return self.constant("tag") or ""

    @property
    def finished(self) -> bool:
        return self.result.get("status") == "finished"

    def constant(self, name):
        """Of config.json; preset and script are there, too."""
        return self.config["constants"].get(name, self.config.get(name))

    def has(self, name) -> bool:
        return name in self.config["constants"] or name in self.config

    @property
    def trained(self) -> bool:
        """Of a training script, not of eval.py, whose folders hold the measure's constants only."""
        return self.config["script"] != "eval"

    @functools.cached_property
    def code(self) -> dict[str, str]:
        """File -> SHA-256 of the script and of the project's modules that it imports, as they ran.

        Empty without source/. What lies in source/ and is not imported (the tables' code) changes no run.
        """
        hashes, waiting = {}, [f"{self.config['script']}.py"]
        while waiting:
            path = self.folder / "source" / waiting.pop()
            if path.name not in hashes and path.exists():
                hashes[path.name] = core.sha256_file(path)
                waiting += [f"{name}.py" for name in IMPORTED.findall(_text(path))]
        return dict(sorted(hashes.items()))

    def figure(self, *names):
        """(value, interval) of the first of these figures that there is, of `part`."""
        for name in names:
            if (value := self.result.get(f"{self.part}/{name}")) is not None:
                return value, self.result.get(f"{self.part}/{name}_interval")
        return None, None

    def curve(self, name) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for row in self.metrics if isinstance(row.get(name), int | float)]


def read(folder) -> Facts:
    """UserError where `folder` is no run."""
    folder = Path(folder)
    config = runs.read_config(folder)
    if not isinstance(config, dict) or not {"script", "constants"} <= config.keys():
        raise core.UserError(f"{folder} is no run folder: its config.json is that of something else")
    lines = _text(folder / "metrics.jsonl").splitlines()
    rows = [row for line in lines if isinstance(row := _json(line), dict)]  # a kill leaves half a line
    metrics = [row for row in rows if isinstance(row.get("step"), int)]
    result, judged = _json(_text(folder / "result.json")), read_judged(folder / "judged.json")
    result = result if isinstance(result, dict) else {}
    return Facts(folder, config, result, metrics, of_these_answers(folder, judged))


def of_these_answers(folder, judged) -> dict:
    """The grades that belong to responses.json as it is now; others are passed over, with a line."""
    path = folder / "responses.json"
    if not judged or not path.exists():
        return judged
    now = core.sha256_file(path)
    old = [name for name, summary in judged.items() if summary.get("responses_sha256", now) != now]
    for name in old:
        print(f"WARNING {folder}: {name} graded other answers than responses.json now holds", file=sys.stderr)
    return {name: summary for name, summary in judged.items() if name not in old}


def read_judged(path) -> dict:
    """judge -> its summary; empty where there is none, or a damaged one."""
    judged = _json(_text(path))
    judged = judged if isinstance(judged, dict) else {}
    return {name: summary for name, summary in judged.items() if isinstance(summary, dict)}


def read_all(folders) -> list[Facts]:
    """Those that can be read; a damaged one is named and passed over: it must not hide the others."""
    found = []
    for folder in folders:
        try:
            found.append(read(folder))
        except core.UserError as error:
            print(f"WARNING passed over: {error}", file=sys.stderr)
    return found


def _text(path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def find(names) -> list[Facts]:
    """The runs that folders stand for: a run, or whatever runs lie in a folder, oldest first; each once."""
    single, inside_of = {}, {}
    for name in names:
        path = Path(name)
        if not path.is_dir():
            raise core.UserError(f"no such folder: {name}")
        if (path / "config.json").exists():
            single[path.resolve()] = read(path)
            continue
        inside = sorted(p.parent for p in path.glob("*/config.json"))
        if not inside:
            deeper = sorted({str(p.parents[1]) for p in path.glob("*/*/config.json")})
            hint = f": use {' '.join(deeper)}" if deeper else ""
            raise core.UserError(f"{name} holds no run{hint}")
        inside_of |= {facts.folder.resolve(): facts for facts in read_all(inside)}
    return list((single | inside_of).values())


LENGTH = {"epochs", "max_steps", "max_minutes", "final_eval"}
OF_NO_ACCOUNT = runs.OF_THE_CALL | (runs.MAY_CHANGE - LENGTH) | {"seed", "run_folder", "prompt"}


def of_account(facts) -> dict:
    """The constants that tell a run from another but for the seed: without notes, those of another stage, and
    the seed in the name of the run it began with."""
    constants = {n: v for n, v in facts.config["constants"].items() if n not in OF_NO_ACCOUNT}
    if facts.config["script"] == "run_mathqa":
        constants = {n: v for n, v in constants.items() if not n.startswith("pretrain_")}
        if base := re.fullmatch(r".*/\d{8}_\d{6}-(.+)-s\d+", constants.get("init_from") or ""):
            constants["init_from"] = base[1]
    return constants


def differing(all_facts) -> list[str]:
    """Names of the constants in which runs that have them differ, or that only some runs of one script have,
    in the scripts' order; seed and notes are none."""
    values, scripts = {}, {}
    for facts in all_facts:
        for name, value in of_account(facts).items():
            values.setdefault(name, set()).add(repr(value))
        kind = facts.config.get("kind")  # what eval.py measures of texts and of rows has other constants
        scripts.setdefault((facts.config["script"], kind), []).append(facts)
    partly = {name for of_script in scripts.values() for name in had_by_some(of_script)}
    return [name for name, of_runs in values.items() if len(of_runs) > 1 or name in partly]


def had_by_some(all_facts) -> list[str]:
    """Names of the constants that some of these runs have and others lack, in the scripts' order."""
    counts = collections.Counter(name for facts in all_facts for name in of_account(facts))
    return [name for name, count in counts.items() if count < len(all_facts)]


def differing_bookkeeping(all_facts) -> list[str]:
    """Names of the constants of no account, seed first, in which these runs differ."""
    names = ["seed", *sorted(OF_NO_ACCOUNT - runs.OF_THE_CALL - {"seed", "note"})]
    return [name for name in names if len({value_of(facts, name) for facts in all_facts}) > 1]


def differing_scripts(all_facts) -> list[str]:
    return ["script"] if len({facts.constant("script") for facts in all_facts}) > 1 else []


# ------------------------------------------------------------------------- what constants do not tell of runs


def code_versions(all_facts) -> dict[str, list[list[Facts]]]:
    """File -> the runs that ran each of its versions, for the files of which there are several."""
    versions = {}
    for facts in all_facts:
        for file, digest in facts.code.items():
            versions.setdefault(file, {}).setdefault(digest, []).append(facts)
    return {file: list(of_file.values()) for file, of_file in sorted(versions.items()) if len(of_file) > 1}


def how_to_see(versions) -> str:
    """The command that shows in what the first two versions of a file differ."""
    return shlex.join(["diff", "-r", *(str(of_version[0].folder / "source") for of_version in versions[:2])])


def not_the_same(files) -> str:
    return f"{', '.join(files)} {'is' if len(files) == 1 else 'are'} not the same"


def resumed(facts) -> dict[int, dict]:
    """Step at which a run was resumed -> constants that changed there: name -> (before, after).

    A resume from an older checkpoint undoes the later ones: the changes of both count from the older step.
    """
    changes, step = {}, math.inf
    for entry in reversed(facts.config.get("resumes", [])):
        step = min(step, entry["step"])
        here = changes.setdefault(step, {})
        for name, change in entry.get("changed", {}).items():
            after = here[name][1] if name in here else change.get("is", ABSENT)
            here[name] = (change.get("was", ABSENT), after)
    return dict(sorted(changes.items()))


def resume_notes(named) -> list[str]:
    """Lines on the runs that were resumed with other constants or code; `named`: (name to be said, Facts)."""
    lines, untold = [], []
    for name, facts in named:
        for step, changes in resumed(facts).items():
            if step and (changes := _that_matter(changes)):  # at step 0 nothing had been trained before
                lines.append(f"NOTE {name} was resumed at step {step} with {_changes(facts, changes)}")
        standing = _standing(facts.config.get("resumes", []))
        for entry in standing:
            if files := facts.code.keys() & entry.get("other_code", []):
                step, files = entry["step"], ", ".join(sorted(files))
                lines.append(
                    f"NOTE {name} was resumed at step {step} with another {files} than its source/ has"
                )
        steps = [entry["step"] for entry in standing if "changed" not in entry]
        untold += [f"{name} at step {step}" for step in steps if step]
    if untold:  # by the code before changes were recorded
        lines.append(f"NOTE resumed, perhaps with another length (not recorded): {', '.join(untold)}")
    return list(dict.fromkeys(lines))


def _standing(resumes) -> list[dict]:
    """Those whose steps are part of the run: a later return to an older checkpoint threw the others away."""
    return [entry for i, entry in enumerate(resumes) if all(entry["step"] <= e["step"] for e in resumes[i:])]


def _that_matter(changes) -> dict:
    """Without bookkeeping, and without what was changed and changed back."""
    passed_over = OF_NO_ACCOUNT | {"final_eval"}
    return {n: (was, now) for n, (was, now) in changes.items() if n not in passed_over and was != now}


def _changes(facts, changes) -> str:
    text = ", ".join(f"{name} {_word(now)} (before: {_word(was)})" for name, (was, now) in changes.items())
    has_schedule = facts.constant("schedule") != "constant" or facts.constant("warmup")
    if has_schedule and changes.keys() & LENGTH:
        text += ": its learning rate followed another schedule until then"
    return text


# ------------------------------------------------------------------------------------------------- the table
# Journal 001's columns, then what it had no room for. A column that is empty everywhere is left out.


def _number(value) -> str:
    if value is None or isinstance(value, str | bool):
        return "" if value is None else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _word(value) -> str:
    return "none" if value is None else str(value)


def _constant(name, all_facts):
    """A cell; `absent` where another run has the constant."""
    known = any(facts.has(name) for facts in all_facts)

    def text(facts):
        return ABSENT if known and facts.trained and not facts.has(name) else _number(facts.constant(name))

    return text


def value_of(facts, name) -> str:
    """A constant's value in full: `none` and `absent` are two things."""
    return _word(facts.constant(name)) if facts.has(name) else ABSENT


def _figure(*names, digits=3):
    def text(facts):
        value, interval = facts.figure(*names)
        if value is None:
            return ""
        said = core.plus_minus(value, interval, digits) if interval else f"{value:.{digits}f}"
        return said if facts.part == "test" else f"val {said}"

    return text


def _model(facts) -> str:
    """The last two parts of a path: a Hub id as it is."""
    return "/".join(str(facts.constant("model") or "").rstrip("/").split("/")[-2:])


def _result(name, text):
    """A cell made of one figure of result.json."""
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
    """Empty for a finished run; else how far it came, and its last validation loss."""
    if facts.finished:
        return ""
    steps = [row["step"] for row in facts.metrics]
    val = facts.curve("val/loss")
    said = f"{facts.result.get('status', 'running or killed')} at step {max(steps, default=0)}"
    return said + (f", val {val[-1][1]:.4f}" if val else "")


def _judges(all_facts) -> dict:
    """A column for each judge that graded one of them."""
    names = sorted({name for facts in all_facts for name in facts.judged})

    def column(name):
        def text(facts):
            s = facts.judged.get(name, {})
            if s.get("score") is None or not s.get("score_interval"):
                return ""
            some = f" ({s['graded']} of {s['rows']})" if s.get("graded", 0) < s.get("rows", 0) else ""
            return core.plus_minus(s["score"], s["score_interval"], 2) + some

        return text

    return {name: column(name) for name in names}


def _code(all_facts):
    """A cell: runs of one number ran the same code. Empty everywhere where all did."""
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
    """Header -> what makes a run's cell."""

    def constant(name):
        return _constant(name, all_facts)

    head = {"run": lambda facts: facts.name, "script": constant("script"), "data": constant("data")}
    head |= {"model": _model, "batch": constant("batch"), "epochs": constant("epochs")}
    head |= {"opt": constant("optimizer"), "lr": constant("lr"), "min_lr": constant("min_lr")}
    head |= {"warmup": constant("warmup"), "wd": constant("weight_decay")}
    head |= {"rank": constant("lora_rank"), "alpha": constant("lora_alpha")}
    shown = {"script", "data", "optimizer", "tag", "preset", "mode", *OF_NO_ACCOUNT}
    shown |= {"model", "batch", "epochs", "lr", "min_lr", "warmup", "weight_decay", "lora_rank", "lora_alpha"}
    also = [name for name in differing(all_facts) if name not in shown]
    head |= {name: constant(name) for name in also}  # what else tells these runs apart
    head |= {"code version": _code(all_facts)}
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
    """What constants do not show: runs of other code, runs resumed with another schedule."""
    lines, versions = [], code_versions(all_facts)
    if versions:
        lines.append(f"NOTE {not_the_same(versions)} in all of these runs:")
        lines.append(f"  {how_to_see(next(iter(versions.values())))}")
    lines += resume_notes([(facts.name, facts) for facts in all_facts])
    return ["", *lines] if lines else []


SAME = ("script", "data", "device", "seed")  # said once above the table where all runs agree


def table(all_facts, order=None) -> str:
    """Markdown, one line a run, by name, or by the constant or figure `order` (smallest first)."""
    all_facts = sorted(all_facts, key=lambda facts: facts.name)
    if order:
        all_facts = sorted(all_facts, key=lambda facts: _order(facts, order))  # stable: ties stay by name
    cells = {header: [cell(facts) for facts in all_facts] for header, cell in columns(all_facts).items()}
    said = [f"{name} {cells[name][0]}" for name in SAME if len(set(cells[name])) == 1 and cells[name][0]]
    kept = {h: c for h, c in cells.items() if any(c) and not (h in SAME and len(set(c)) == 1)}
    lines = [f"{len(all_facts)} runs  {'  '.join(said)}", "", markdown(kept), *notes_below(all_facts)]
    return "\n".join(lines)


def _order(facts, name):
    name = {"bits/byte": "bits_per_byte", "min": "seconds"}.get(name, name)  # headers of the table
    value = facts.figure(name, "log_loss" if name == "loss" else name)[0]
    value = facts.result.get(name, facts.constant(name)) if value is None else value
    value = value if isinstance(value, int | float | str) and value == value else None  # NaN comes last
    return (value is None, isinstance(value, str), value if value is not None else 0)


def check_names(all_facts, group_by, sort):
    """UserError unless runs have the constants to be grouped by, the constant or figure to be sorted by."""
    known = dict.fromkeys(
        name for facts in all_facts for name in (*facts.config["constants"], "preset", "script")
    )
    for name in group_by:
        if name not in known:
            raise core.UserError(
                f"--group_by {name}: no run has such a constant: use one of {', '.join(known)}"
            )
    if sort and sort not in known and all(_order(facts, sort)[0] for facts in all_facts):
        figures = "loss, accuracy, perplexity"
        raise core.UserError(f"--sort {sort}: no run has such a constant or figure: use lr or {figures}, say")


def slug(text) -> str:
    """Fit for a part of a file's name."""
    return re.sub(r"[^\w.]+", "_", text)[:60]


def markdown(cells) -> str:
    """{header: cells} as a table whose columns line up in a terminal, too."""
    rows = [list(cells), *zip(*cells.values(), strict=True)]
    rows = [[" ".join(str(cell).replace("|", "/").split()) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(cells))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# ------------------------------------------------------------------------------------------- over the seeds

GROUPED = {
    "loss": ("loss", "log_loss"),
    "perplexity": ("perplexity",),
    "bits/byte": ("bits_per_byte",),
    "accuracy": ("accuracy",),
    "answers": ("answer_accuracy",),
}


def grouped(all_facts, names, order=None) -> str:
    """Markdown, one line for each combination of the constants `names`: mean ± standard deviation over runs.

    Sorted by these constants, or by the mean of `order`.
    """
    groups, unfinished = {}, [facts for facts in all_facts if not facts.finished]
    for facts in sorted(all_facts, key=lambda facts: ([_order(facts, name) for name in names], facts.name)):
        if facts.finished:
            groups.setdefault(values_of(facts, names), []).append(facts)
    if order:
        groups = dict(sorted(groups.items(), key=lambda item: _mean_order(item[1], order)))
    cells = {name: [values[i] for values in groups] for i, name in enumerate(names)}
    if not groups:
        raise core.UserError(f"none of {len(all_facts)} runs is finished: leave out --group_by to see them")
    cells["runs"] = [str(len(group)) for group in groups.values()]
    cells["seeds"] = [_seeds(group) for group in groups.values()]
    for header, of in GROUPED.items():
        cells[header] = [_spread([f.figure(*of)[0] for f in group], 4) for group in groups.values()]
    for judge in _judges(all_facts):
        scores = [[f.judged.get(judge, {}).get("score") for f in group] for group in groups.values()]
        cells[f"judge {judge}"] = [_spread(of_group, 2) for of_group in scores]
    times = [[f.result["seconds"] / 60 for f in group if "seconds" in f.result] for group in groups.values()]
    cells["min"] = [_spread(of_group, 1) for of_group in times]
    cells["also differ in"] = [_also_differing(group, names) for group in groups.values()]
    lines = ["means ± standard deviation over runs", ""]
    lines.append(markdown({header: column for header, column in cells.items() if any(column)}))
    lines += notes_below([facts for group in groups.values() for facts in group])
    if unfinished:
        lines += ["", f"not counted, unfinished: {', '.join(facts.name for facts in unfinished)}"]
    return "\n".join(lines)


def values_of(facts, names) -> tuple[str, ...]:
    return tuple((_number(facts.constant(name)) or "none") if facts.has(name) else ABSENT for name in names)


def _also_differing(group, names) -> str:
    """Constants beside `names`, and files of code, in which runs of one group differ."""
    found = [*differing_scripts(group), *differing(group)]
    return ", ".join([*(name for name in found if name not in names), *code_versions(group)])


def _mean_order(group, order):
    keys = [_order(facts, order) for facts in group]
    numbers = [value for missing, is_text, value in keys if not (missing or is_text)]
    return (not numbers, statistics.mean(numbers)) if numbers else (True, 0.0)


def _seeds(group) -> str:
    return " ".join(sorted({_number(facts.constant("seed")) for facts in group}))


def _spread(values, digits) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "nan"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


# -------------------------------------------------------------------------------------- curves, TensorBoard

SMOOTHED = 20
LABELLED = 14  # as many curves can be told apart by colour and line style


def draw(all_facts, path, by=()):
    """Training and validation loss of runs against steps, in one PNG.

    `by` colours by constants. Without it each run has its own line, or, of many, its final loss's colour.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = dict(zip(("train/loss", "val/loss"), figure.subplots(1, 2), strict=True))
    all_facts = sorted(all_facts, key=lambda facts: [_order(facts, name) for name in by])  # stable
    names = [", ".join(values_of(facts, by)) for facts in all_facts] if by else short_names(all_facts)
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
    """Tags where they tell runs apart, otherwise the folders' names."""
    tags = [facts.tag for facts in all_facts]
    return tags if all(tags) and len(set(tags)) == len(tags) else [facts.name for facts in all_facts]


def smoothed(points):
    """A running mean over a share of the points: single batches hide the course."""
    width, out = max(1, len(points) // SMOOTHED), []
    for i, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, i + 1 - width) : i + 1]]
        out.append((step, sum(near) / len(near)))
    return out


def window(values) -> tuple[float, float] | tuple[None, None]:
    """Limits of an axis on which a few runaway losses do not flatten all others."""
    if not values:
        return None, None
    values = sorted(values)
    low, high = values[0], values[int(0.98 * (len(values) - 1))]
    margin = 0.05 * (high - low) + 1e-3
    return low - margin, min(values[-1], high + 0.25 * (high - low)) + margin


def write_hparams(all_facts) -> int:
    """<run>/hparams/ of each finished run, for TensorBoard's page of that name; says how many.

    The constants in which these runs differ, seed and tag; their final figures.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    names = ["script", "seed", "tag", *differing(all_facts)]
    finished = [facts for facts in all_facts if facts.finished]
    for facts in finished:
        values = {name: facts.constant(name) for name in names}
        values |= {name: ABSENT for name in names if facts.trained and not facts.has(name)}
        values = {name: value for name, value in values.items() if value not in (None, "")}
        metrics = {f"final/{name}": facts.figure(*of)[0] for name, of in GROUPED.items()}
        metrics |= {f"judge/{name}": s.get("score") for name, s in facts.judged.items()}
        metrics = {name: value for name, value in metrics.items() if value is not None}
        folder = facts.folder / "hparams"
        if not os.access(facts.folder, os.W_OK):
            raise core.UserError(f"{facts.folder} cannot be written: the table stands, HPARAMS does not")
        shutil.rmtree(folder, ignore_errors=True)
        with SummaryWriter(folder) as writer:
            for summary in hparams(values, metrics):
                writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, facts.result["step"])
    return len(finished)
