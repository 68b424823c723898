"""The sides of a comparison: one run, or several seeds; how their constants and code differ; the report."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.compare.difference import difference, verdict
from lab.compare.facts import (
    Facts,
    alarm_notes,
    code_versions,
    differing,
    differing_bookkeeping,
    differing_scripts,
    experiment_constants,
    had_by_some,
    how_to_see,
    judge_of,
    judges_of,
    not_the_same,
    read,
    read_all,
    resume_notes,
    resume_words,
    value_of,
)
from lab.compare.responses import by_prompt, read_responses
from lab.compare.rows import has_losses, judge_notes, judged_rows, mean_grades, shared_rows
from lab.compare.tables import markdown, slug
from lab.errors import UserError
from lab.run.files import is_there, short_hash


@dataclass
class Side:
    """Runs with the same constants but for the seed."""

    name: str
    all_facts: list[Facts]


def sides(names, root) -> list[Side]:
    """Sides of a comparison, from run folders, or presets and tags of finished runs below `root`.

    Runs that differ only in seed and bookkeeping are one side; if that leaves a single side, each run is one.
    """
    chosen = [facts for name in names for facts in named(name, root)]
    once = {facts.folder.resolve(): facts for facts in chosen}  # a run named twice is no second seed
    chosen = list(once.values()) if len(once) > 1 else chosen
    groups = {}
    for facts in chosen:
        groups.setdefault(experiment(facts), []).append(facts)
    if len(groups) == 1 and len(chosen) > 1:
        groups = dict(enumerate([facts] for facts in chosen))
    if len(groups) < 2:
        raise UserError("--compare needs two sides: name another run")
    names = [side_name(group) for group in groups.values()]
    if len(set(names)) < len(names):
        names = [group[0].name for group in groups.values()]
    if len(set(names)) < len(names):
        names = [str(group[0].folder) for group in groups.values()]
    return [Side(name, group) for name, group in zip(names, groups.values(), strict=True)]


def experiment(facts) -> str:
    """Script, constants and data of a run: equal for runs that differ in seed and bookkeeping only."""
    found = facts.config["facts"].get("fingerprint", {})
    data = found.get("data"), found.get("sources")  # of a mixture `data` is the neutral text
    return json.dumps([facts.config["script"], experiment_constants(facts), data], sort_keys=True)


def is_same_experiment(one, other) -> bool:
    """Whether two sides are seeds of one experiment, of the same code, never resumed with another length."""
    both = runs_of([one, other])
    is_same = len(set(map(experiment, both))) == 1 and len({facts.constant("seed") for facts in both}) > 1
    return is_same and not code_versions(both) and not any(map(resume_words, both))


def named(name, root) -> list[Facts]:
    """The run of a folder, or the finished runs with this tag or preset. UserError without any."""
    if is_there(Path(name) / "config.json"):
        return [read(name)]
    if finished := tagged(name, root):
        return finished
    raise UserError(
        f"--compare {name}: no run folder, and no finished run in {root} has such a tag or preset "
        "(of smoke runs: add --smoke)"
    )


def tagged(name, root) -> list[Facts]:
    """The finished runs below `root` with this tag or preset, but for those that sought a rate."""
    runs = read_all(path.parent for path in sorted(Path(root).glob("*/*/config.json")))
    runs = [facts for facts in runs if name in (facts.tag, facts.config.get("preset")) and facts.finished]
    return [facts for facts in runs if facts.constant("mode") != "find_lr"]


def side_name(group) -> str:
    """A run's tag or folder name; of several runs the common part of their tags."""
    tags = [facts.tag for facts in group]
    if len(group) == 1:
        return tags[0] or group[0].name
    common = tags[0] if len(set(tags)) == 1 else re.sub(r"[-_.]+(s|seed)?\d*$", "", _common_start(tags))
    return f"{common or group[0].name} ({len(group)} seeds)"


def runs_of(all_sides) -> list[Facts]:
    return [facts for side in all_sides for facts in side.all_facts]


def folder_name(all_sides) -> str:
    """Folder name of a comparison: names of the first sides, and a hash of all runs."""
    every = [str(facts.folder.resolve()) for facts in runs_of(all_sides)]
    return "-".join([*(slug(side.name) for side in all_sides[:2]), short_hash(every, 6)])


def seed_notes(all_sides) -> list[str]:
    """A line for each side in which a seed occurs twice."""
    notes = []
    for side in all_sides:
        seeds = [facts.constant("seed") for facts in side.all_facts]
        if len(set(seeds)) < len(seeds):
            notes.append(f"NOTE {side.name}: seeds {seeds} repeat, their spread is too small")
    return notes


def _common_start(texts) -> str:
    length = next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    return texts[0][:length]


def constants_table(all_sides) -> str:
    """Markdown table of the constants in which sides differ; if only seed or bookkeeping differ, of these."""
    firsts = [side.all_facts[0] for side in all_sides]
    trained = [facts for facts in firsts if facts.trained]
    names = [*differing_scripts(firsts), *differing(firsts), *had_by_some(trained)]
    if not names and len(all_sides) == len(runs_of(all_sides)):
        names = differing_bookkeeping(firsts)
    if not names:
        return agreement(runs_of(all_sides))
    names = list(dict.fromkeys(names))
    cells = {"constant": names}
    for side, facts in zip(all_sides, firsts, strict=True):
        cells[side.name] = [value_of(facts, name) for name in names]
    return markdown(cells)


def agreement(all_facts) -> str:
    """A sentence on how far runs with equal constants are the same."""
    if code_versions(all_facts):
        return "no constant differs, but the code does"
    if resume_notes([(facts.name, facts) for facts in all_facts]):
        return "no constant differs at the end, but a run was resumed"
    return "the constants are the same"


def notes(all_sides) -> list[str]:
    """Lines on what the table of constants does not show: repeated seeds, other code, resumes."""
    named = [
        (side.name if len(side.all_facts) == 1 else facts.name, facts)
        for side in all_sides
        for facts in side.all_facts
    ]
    lines = [*seed_notes(all_sides), *code_notes(all_sides), *resume_notes(named), *alarm_notes(named)]
    return [*lines, ""] if lines else []


def code_notes(all_sides) -> list[str]:
    """Lines on files of code that differ between sides or within one, and how to see it."""
    lines, alike, all_facts = [], {}, runs_of(all_sides)
    for file, versions in code_versions(all_facts).items():
        who = ", another in ".join(_names_of(all_sides, same_code) for same_code in versions)
        alike.setdefault(who, {})[file] = versions
    for who, files in alike.items():
        lines.append(f"NOTE {not_the_same(files)}: one version in {who}")
        lines.append(f"  {how_to_see(next(iter(files.values())))}")
    if unknown := [facts for facts in all_facts if facts.trained and not facts.code]:
        who = _names_of(all_sides, unknown)
        lines.append(f"NOTE no source/ in {who}: whether the code was the same is not known")
    return lines


def _names_of(all_sides, all_facts) -> str:
    """Names of these runs: of the side if all its runs are among them, otherwise their own."""
    names = []
    for side in all_sides:
        among = [facts.name for facts in side.all_facts if any(facts is one for one in all_facts)]
        names += [side.name] if len(among) == len(side.all_facts) else among
    return ", ".join(names)


def report(all_sides) -> tuple[list[str], dict]:
    """Compares each side with the first: lines for terminal and compare.md, and figures."""
    all_facts = runs_of(all_sides)
    for facts in all_facts:
        if not facts.finished:
            raise UserError(f"{facts.folder} is not finished: resume it, or compare others")
    lines, figures, place, where = notes(all_sides), {}, 0, []
    for side in all_sides:
        where.append(list(range(place, place + len(side.all_facts))))
        place += len(side.all_facts)
    graded = judged_rows(all_facts)
    lines += judge_notes(all_facts)
    silent = [facts.name for facts in all_facts if facts.config.get("kind") and not has_losses(facts)]
    if silent and graded:  # a plain model's answers were judged, its loss not measured
        lines.append(f"(no losses of {', '.join(silent)}: grades only)")
    for rows in [*([] if silent and graded else shared_rows(all_facts)), *graded]:
        count = len(set(rows.groups.tolist()))
        lines.append(f"**{rows.name}** on {len(rows):,} rows, {count:,} prompts or stretches of text")
        lines += [f"({rows.note})"] if rows.note else []
        means = rows.sums.sum(1) / rows.weights.sum()
        lines += ["", markdown({
            "side": [side.name for side in all_sides],
            "mean": [f"{means[at].mean():.4f}" for at in where],
            "runs": [" ".join(f"{mean:.4f}" for mean in means[at]) for at in where],
        }), ""]  # fmt: skip
        for side, at in zip(all_sides[1:], where[1:], strict=True):
            figure = difference(rows, where[0], at)
            names = all_sides[0].name, side.name
            words = verdict(figure, rows.name, names)
            if is_same_experiment(all_sides[0], side):
                words = f"{words.partition(chr(10))[0]}\n  they differ in their seed only: neither is better"
            lines.append(f"{names[0]} - {names[1]}  {words}")
            if all(facts.alarm for one in (all_sides[0], side) for facts in one.all_facts):
                lines.append("  both are NOT LEARNING: neither is good, whatever their difference")
            figures.setdefault(rows.name, []).append(figure | {"sides": names})
        lines.append("")
    weights = [facts.result.get("weights_sha256") for facts in all_facts]
    if same := [f.name for f, w in zip(all_facts[1:], weights[1:], strict=True) if w and w == weights[0]]:
        lines.append(f"the same weights as {all_facts[0].name}: {', '.join(same)}")
    if (count := sum(map(len, figures.values()))) > 2:
        lines.append(f"{count} comparisons: of 20 between equals one looks like a difference")
    return lines, figures


def side_by_side(all_sides, most) -> str | None:
    """Markdown of prompts, references, and the answers of each side's first run with grades.

    most: how many prompts, spread evenly; none: all. Returns None if a side has no answers to common prompts.
    """
    firsts = [side.all_facts[0] for side in all_sides]
    if not all((facts.folder / "responses.json").exists() for facts in firsts):
        return None
    answers = [read_responses(facts.folder / "responses.json") for facts in firsts]
    by_key = [by_prompt(rows) for rows in answers]
    keys = [key for key in by_key[0] if all(key in run_answers for run_answers in by_key)]
    if not keys:
        return None
    names = judges_of(firsts)
    grades = [
        {names[judge_of(*item)]: mean_grades(item[1].get("grades", [])) for item in facts.judged.items()}
        for facts in firsts
    ]
    most = len(keys) if most is None else min(most, len(keys))
    chosen = np.linspace(0, len(keys) - 1, most).round().astype(int)
    lines = ["# Answers side by side", "", f"{len(chosen)} of {len(keys)} prompts"]
    for number, key in enumerate((keys[i] for i in chosen), start=1):
        row = by_key[0][key]
        lines += ["", f"## {number}", "", quoted(row["instruction"])]
        lines += ["", quoted(row["input"])] if row.get("input") else []
        lines += ["", "**reference**", "", quoted(row.get("output") or "")]
        for side, run_answers, graded in zip(all_sides, by_key, grades, strict=True):
            given = "  ".join(f"{name} {means[key]:g}" for name, means in graded.items() if key in means)
            lines += [
                "",
                f"**{side.name}**  {given}".rstrip(),
                "",
                quoted(run_answers[key]["model_response"]),
            ]
    return "\n".join(lines) + "\n"


def quoted(text) -> str:
    """A Markdown block quote of any text."""
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines() or ["(empty)"])
