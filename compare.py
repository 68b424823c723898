"""Are these runs different, or is it noise? Row by row on the same held-out rows, and over seeds. From small
files alone: losses.jsonl or predictions.jsonl, judged.json, responses.json. Used by eval.py.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import core
import judge
import results

# --------------------------------------------------------------------------------------------- which sides


@dataclass
class Side:
    """Runs with the same constants but for the seed."""

    name: str
    all_facts: list[results.Facts]


def sides(names, root) -> list[Side]:
    """Run folders, or presets and tags whose finished runs are looked up below `root`, as sides.

    Runs that differ in seed and bookkeeping only are one side, unless that leaves a single one: then
    each is its own.
    """
    chosen = [facts for name in names for facts in named(name, root)]
    once = {facts.folder.resolve(): facts for facts in chosen}  # a run named twice is no second seed
    chosen = list(once.values()) if len(once) > 1 else chosen
    groups = {}
    for facts in chosen:
        constants = results.of_account(facts)
        data = facts.config["facts"].get("fingerprint", {}).get("data")
        key = json.dumps([facts.config["script"], constants, data], sort_keys=True)
        groups.setdefault(key, []).append(facts)
    if len(groups) == 1 and len(chosen) > 1:
        groups = dict(enumerate([facts] for facts in chosen))
    if len(groups) < 2:
        raise core.UserError("--compare needs two sides: name another run")
    names = [side_name(group) for group in groups.values()]
    if len(set(names)) < len(names):
        names = [group[0].name for group in groups.values()]
    if len(set(names)) < len(names):
        names = [str(group[0].folder) for group in groups.values()]
    return [Side(name, group) for name, group in zip(names, groups.values(), strict=True)]


def named(name, root) -> list[results.Facts]:
    """One run folder, or the finished runs with this tag or preset."""
    if (Path(name) / "config.json").exists():
        return [results.read(name)]
    found = results.read_all(path.parent for path in sorted(Path(root).glob("*/*/config.json")))
    found = [facts for facts in found if name in (facts.tag, facts.config.get("preset"))]
    if finished := [facts for facts in found if facts.finished]:
        return finished
    raise core.UserError(
        f"--compare {name}: no run folder, and no finished run in {root} has such a tag or preset "
        "(of smoke runs: add --smoke)"
    )


def side_name(group) -> str:
    """A run's tag, or its folder's name; of several runs what their tags have in common."""
    tags = [facts.tag for facts in group]
    if len(group) == 1:
        return tags[0] or group[0].name
    common = tags[0] if len(set(tags)) == 1 else re.sub(r"[-_.]+(s|seed)?\d*$", "", _common_start(tags))
    return f"{common or group[0].name} ({len(group)} seeds)"


def runs_of(all_sides) -> list[results.Facts]:
    return [facts for side in all_sides for facts in side.all_facts]


def folder_name(all_sides) -> str:
    """Of the folder that a comparison goes to: names of the first sides, and a hash of all runs."""
    every = [str(facts.folder.resolve()) for facts in runs_of(all_sides)]
    mark = hashlib.sha256(json.dumps(every).encode()).hexdigest()[:6]
    return "-".join([*(results.slug(side.name) for side in all_sides[:2]), mark])


def seed_notes(all_sides) -> list[str]:
    """A line for each side whose runs do not all have a seed of their own."""
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
    """The constants in which sides differ, as Markdown: what is being compared, first.

    If they differ in seed or bookkeeping only, these are listed.
    """
    firsts = [side.all_facts[0] for side in all_sides]
    trained = [facts for facts in firsts if facts.trained]
    names = [*results.differing_scripts(firsts), *results.differing(firsts), *results.had_by_some(trained)]
    if not names and len(all_sides) == len(runs_of(all_sides)):
        names = results.differing_bookkeeping(firsts)
    if not names:
        return agreement(runs_of(all_sides))
    names = list(dict.fromkeys(names))
    cells = {"constant": names}
    for side, facts in zip(all_sides, firsts, strict=True):
        cells[side.name] = [results.value_of(facts, name) for name in names]
    return results.markdown(cells)


def agreement(all_facts) -> str:
    """How far runs without a differing constant are the same."""
    if results.code_versions(all_facts):
        return "no constant differs, but the code does"
    if results.resume_notes([(facts.name, facts) for facts in all_facts]):
        return "no constant differs at the end, but a run was resumed"
    return "the constants are the same"


def notes(all_sides) -> list[str]:
    """Lines on what the table of constants does not show: seeds that repeat, other code, other schedules."""
    named = [
        (side.name if len(side.all_facts) == 1 else facts.name, facts)
        for side in all_sides
        for facts in side.all_facts
    ]
    lines = [*seed_notes(all_sides), *code_notes(all_sides), *results.resume_notes(named)]
    return [*lines, ""] if lines else []


def code_notes(all_sides) -> list[str]:
    """Which files of the code that ran are not the same in all sides, or within one, and how to see it."""
    lines, alike, all_facts = [], {}, runs_of(all_sides)
    for file, versions in results.code_versions(all_facts).items():
        who = ", another in ".join(_names_of(all_sides, of_version) for of_version in versions)
        alike.setdefault(who, {})[file] = versions
    for who, files in alike.items():
        lines.append(f"NOTE {results.not_the_same(files)}: one version in {who}")
        lines.append(f"  {results.how_to_see(next(iter(files.values())))}")
    if unknown := [facts for facts in all_facts if facts.trained and not facts.code]:
        who = _names_of(all_sides, unknown)
        lines.append(f"NOTE no source/ in {who}: whether the code was the same is not known")
    return lines


def _names_of(all_sides, all_facts) -> str:
    """Sides of which all runs are among these, by the side's name; other runs by their own."""
    names = []
    for side in all_sides:
        among = [facts.name for facts in side.all_facts if any(facts is one for one in all_facts)]
        names += [side.name] if len(among) == len(side.all_facts) else among
    return ", ".join(names)


# ------------------------------------------------------------------------------------ the rows they share


@dataclass
class Rows:
    """What several runs said of the same rows: sums (runs, rows) of a figure whose mean is by `weights`."""

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
        raise core.UserError(f"these runs answer different questions: {' and '.join(sorted(kinds))}")
    rows = {"preference": _verdicts, "text": _text_rows, "rows": _losses}[kinds.pop()](all_facts)
    return [*rows, *answer_rows(all_facts)]


def answer_rows(all_facts) -> list[Rows]:
    """Whether each multiple-choice problem was answered rightly, where all runs say it."""
    if not all((facts.folder / "answers.jsonl").exists() for facts in all_facts):
        return []
    by_key = [judge.numbered(read_lines(facts, "answers.jsonl")) for facts in all_facts]
    keys, note = _in_common(by_key)
    right = np.array([[float(of_run[key]["right"]) for key in keys] for of_run in by_key])
    return [Rows("answers", right, np.ones(len(keys)), np.array([group for group, _ in keys]), note)]


def kind_of(facts) -> str:
    """preference, text or rows; of a folder that eval.py made it is noted there."""
    kinds = {"run_preference": "preference", "gpt_scratch": "text", "run_pretrain_diversity": "text"}
    if facts.config["script"] == "run_mathqa" and facts.constant("mode") == "pretrain":
        return "text"
    return facts.config.get("kind") or kinds.get(facts.config["script"], "rows")


NEEDED = {
    "losses.jsonl": {"part", "group", "nats", "hits", "targets", "bytes"},
    "answers.jsonl": {"group", "right"},
    "predictions.jsonl": {"id", "row", "group", "split", "label", "A", "B", "tie"},
}


def read_lines(facts, name) -> list[dict]:
    """Of a .jsonl file in a run folder; UserError says how to get it."""
    path = facts.folder / name
    if not path.exists():
        raise core.UserError(f"{path} is missing: python eval.py --run {facts.folder} measures the run again")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(NEEDED[name] <= line.keys() for line in lines):
            raise ValueError
        return lines
    except (ValueError, AttributeError):
        again = f"python eval.py --run {facts.folder} writes it anew"
        raise core.UserError(f"{path} is damaged: {again}") from None


def loss_lines(all_facts) -> list[list[dict]]:
    """losses.jsonl of each run; UserError where one holds test rows and another validation rows."""
    lines = [read_lines(facts, "losses.jsonl") for facts in all_facts]
    if len(parts := {line["part"] for of_run in lines for line in of_run}) > 1:
        raise core.UserError(
            f"the runs were measured on different parts ({', '.join(sorted(parts))}): final_eval?"
        )
    return lines


def _in_common(by_key) -> tuple[list, str]:
    """Keys that all runs have, and a note on how many some run lacks."""
    common = set(by_key[0]).intersection(*by_key[1:])
    if not common:
        raise core.UserError("no held-out row in common: compare runs of one data set and split")
    every = set().union(*by_key)
    note = (
        f"{len(every) - len(common)} rows that not all have are left out" if len(every) > len(common) else ""
    )
    return [key for key in by_key[0] if key in common], note


def _verdicts(all_facts) -> list[Rows]:
    """Of predictions.jsonl: log loss and accuracy, by prompt."""
    by_key = []
    for facts in all_facts:
        lines = read_lines(facts, "predictions.jsonl")
        part = "test" if any(line["split"] == "test" for line in lines) else "val"
        by_key.append({(line["id"], line["row"], line["group"], part): line
                       for line in lines if line["split"] == part})  # fmt: skip
    keys, note = _in_common(by_key)
    names = ("A", "B", "tie")
    loss = [[-math.log(max(of_run[k][of_run[k]["label"]], 1e-15)) for k in keys] for of_run in by_key]
    right = [[max(names, key=of_run[k].get) == of_run[k]["label"] for k in keys] for of_run in by_key]
    groups, ones = np.array([key[2] for key in keys]), np.ones(len(keys))
    figures = {"log loss": loss, "accuracy": right}
    return [Rows(name, np.array(sums, dtype=float), ones, groups, note) for name, sums in figures.items()]


def _losses(all_facts) -> list[Rows]:
    """Of losses.jsonl, rows of instructions: by target token, or by byte where tokens differ."""
    by_key = [judge.numbered(of_run) for of_run in loss_lines(all_facts)]
    keys, note = _in_common(by_key)
    same = [key for key in keys if len({of_run[key]["bytes"] for of_run in by_key}) == 1]
    if not same:
        raise core.UserError(
            "the losses count other targets in each run (loss_on_prompt?): measure by --data"
        )
    if len(same) < len(keys):
        cut = f"{len(keys) - len(same)} rows that are cut differently are left out"
        note = "; ".join(filter(None, [note, cut]))
    groups = np.array([group for group, _ in same])
    return _per_target([[of_run[key] for key in same] for of_run in by_key], groups, note)


def _per_target(lines, groups, note) -> list[Rows]:
    """`lines`: for each run those of the same rows."""
    nats, hits, targets, sizes = (
        np.array([[line[name] for line in of_run] for of_run in lines], dtype=float)
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
    *("max_documents", "text_documents", "text_tokens", "text_column", "val_share", "test_share"),
    "split_seed",
)


def _text_rows(all_facts) -> list[Rows]:
    """Of losses.jsonl, blocks of a text: block by block, or by stretches of bytes where blocks differ."""
    texts = {
        json.dumps([facts.config["facts"]["fingerprint"]["data"], *(facts.constant(n) for n in SAME_TEXT
                    if (facts.config["script"], n) != ("run_mathqa", "max_documents"))])  # there of problems
        for facts in all_facts
    }  # fmt: skip
    if len(texts) > 1:
        raise core.UserError(
            "these runs were tested on different text: compare runs of one data set and split"
        )
    lines = loss_lines(all_facts)
    shapes = {tuple((line["targets"], line["bytes"]) for line in of_run) for of_run in lines}
    if len(shapes) == 1:
        return _per_target(lines, np.array([line["group"] for line in lines[0]]), "")
    sizes = [sum(line["bytes"] for line in of_run) for of_run in lines]
    if max(sizes) - min(sizes) > 0.01 * max(sizes):
        raise core.UserError(
            f"the tokens spell {min(sizes)} and {max(sizes)} bytes of the text: not comparable"
        )
    edges = np.linspace(0, 1, 1 + min(100, *map(len, lines)))
    cuts = [_cut(of_run, edges) * max(sizes) / size for of_run, size in zip(lines, sizes, strict=True)]
    weights, groups = np.diff(edges) * max(sizes), np.arange(len(edges) - 1)
    note = f"tokenizers or blocks differ: bits per byte in {len(groups)} stretches of the text"
    return [Rows("bits per byte", np.array(cuts) / math.log(2), weights, groups, note)]


def _cut(lines, edges) -> np.ndarray:
    """Nats of each stretch of the text, blocks that lie across an edge in proportion to their bytes."""
    ends = np.cumsum([0, *(line["bytes"] for line in lines)])
    nats = np.cumsum([0, *(line["nats"] for line in lines)])
    return np.diff(np.interp(edges * ends[-1], ends, nats))


# ----------------------------------------------------------------------------------------- is it different?

POWER = ((1.96 + 0.84) / 1.96) ** 2  # rows for an interval that excludes 0 four times in five


def difference(rows, first, second) -> dict:
    """First - second with its 95 % interval; `first` and `second` are lists of runs (indices of rows.sums).

    One run a side: rows redrawn by group, in pairs. Several: variances of rows and of seeds, see _over_seeds.
    """
    total = rows.weights.sum()
    means = [rows.sums[side].sum(1) / total for side in (first, second)]
    value = float(means[0].mean() - means[1].mean())
    found = {"difference": value, "seeds": [len(first), len(second)], "rows": len(rows)}
    found["groups"] = len(set(rows.groups.tolist()))
    found["means"] = [of_side.tolist() for of_side in means]
    if len(first) == len(second) == 1:
        interval = _by_groups(rows, rows.sums[first[0]] - rows.sums[second[0]])
        found["row_noise"] = found["noise"] = (interval[1] - interval[0]) / (2 * 1.96)
        return found | {"interval": interval}
    return found | _over_seeds(rows, (first, second), means, value)


def mean(rows, side) -> dict:
    """Mean of the runs `side` with its 95 % interval, over groups of rows and seeds as in `difference`."""
    total = rows.weights.sum()
    means = rows.sums[side].sum(1) / total
    found = {"mean": float(means.mean()), "runs": means.tolist()}
    if len(side) == 1:
        return found | {"interval": _by_groups(rows, rows.sums[side[0]])}
    return found | _over_seeds(rows, (side,), [means], found["mean"])


def _by_groups(rows, sums) -> list[float]:
    """Interval of sum / weight, groups of rows redrawn."""
    ratio = {"of": lambda means: means[:, :1] / means[:, 1:]}
    return core.bootstrap(np.c_[sums, rows.weights], rows.groups, **ratio).tolist()[0]  # a weight may be 0


def _over_seeds(rows, sides, means, value) -> dict:
    """Rows and seeds are crossed: the variance of a mean, or of the difference of two, is that over groups
    (of seed means), plus that over seeds (of row means), less what both contain, the seed-by-group rest.
    Welch's t. A side of one seed borrows the other's spread.
    """
    index = np.unique(rows.groups, return_inverse=True)[1]
    n, total = index.max() + 1, rows.weights.sum()
    share = np.bincount(index, rows.weights, n) / total
    parts = []
    for side, of_seed in zip(sides, means, strict=True):
        summed = np.stack([np.bincount(index, rows.sums[run], n) for run in side]) / total
        parts.append(summed - of_seed[:, None] * share)  # (seeds, groups): what a group adds to the error
    by_group = sum(sign * part.mean(0) for sign, part in zip((1, -1), parts, strict=False))
    of_rows = n / max(n - 1, 1) * float((by_group**2).sum())
    spreads = [_seed_variance(part, of_seed) for part, of_seed in zip(parts, means, strict=True)]
    known, components = [spread for spread in spreads if spread], [(of_rows, max(n - 1, 1))]
    shares = [1 / len(of_seed) for of_seed in means]
    shares = shares if len(known) == len(means) else [sum(shares)]
    components += [
        (variance * share, freedom) for (variance, freedom), share in zip(known, shares, strict=True)
    ]
    noise = sum(variance for variance, _ in components)
    freedom = noise**2 / max(sum(v**2 / f for v, f in components), 1e-300)
    half = core.student(max(freedom, 1.0)) * math.sqrt(noise)
    if min(map(len, means)) < 3:  # as simulations show, Satterthwaite's freedom is too high here
        half = math.hypot(*(core.student(f) * math.sqrt(v) for v, f in components))
    found = {"interval": [value - half, value + half], "noise": math.sqrt(noise)}
    found["seed_noise"] = math.sqrt(max(noise - of_rows, 0.0))
    return found | {"row_noise": math.sqrt(of_rows)}


def _seed_variance(part, of_seed) -> tuple[float, int] | None:
    """(variance of one seed's mean that is the seed's own, degrees of freedom); None for a single seed."""
    seeds, n = part.shape
    if seeds < 2:
        return None
    rest = n / max(n - 1, 1) * float(((part - part.mean(0)) ** 2).sum()) / (seeds - 1)
    return max(0.0, float(np.var(of_seed, ddof=1)) - rest), seeds - 1


FEWEST = 6  # prompts or stretches: all of five on one side of 0 happen by chance once in 16


def verdict(found, name, names) -> str:
    """The figure, and a plain sentence: told apart or not, by what noise, and what it would take."""
    low, high = found["interval"]
    value, rows = found["difference"], found["rows"]
    signed = f"{name} {value:+.4f} ({low:+.4f} to {high:+.4f})"
    a, b = found["seeds"]
    seeds = "one seed each: row noise only" if a == b == 1 else f"{a} and {b} seeds"
    if not math.isfinite(value) or ((low or high) and found["groups"] < FEWEST):
        return f"{signed}\n  cannot be told apart: fewer than {FEWEST} prompts, or a loss that is no number"
    if low == high == 0:
        return f"{signed}\n  the same on every one of {rows:,} rows: they cannot be told apart"
    if low <= 0 <= high:
        return f"{signed}\n  cannot be told apart on these {rows:,} rows; {needed(found)} ({seeds})"
    lower_is_better = name in ("loss", "log loss", "bits per byte")
    better = names[0] if (value < 0) == lower_is_better else names[1]
    return f"{signed}\n  told apart on these {rows:,} rows: {better} is better ({seeds})"


def needed(found) -> str:
    """What would show a difference of this size four times in five."""
    wanted = (abs(found["difference"]) / (1.96 * math.sqrt(POWER))) ** 2  # variance
    if abs(found["difference"]) < 1e-12:
        return "there is no difference to look for"
    if found.get("seed_noise") and found["row_noise"] ** 2 < wanted:
        now = min(found["seeds"])
        seeds = max(now + 1, now * found["seed_noise"] ** 2 / (wanted - found["row_noise"] ** 2))
        return f"about {rounded(seeds)} seeds a side would be needed"
    rows = found["rows"] * found["row_noise"] ** 2 / wanted
    if found.get("seed_noise"):
        return f"more rows than {rounded(rows)}, and more seeds, would be needed"
    return f"about {rounded(rows)} would be needed" if rows < 1e9 else "no number of rows would do"


def rounded(value) -> str:
    """Two significant digits, upwards."""
    scale = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return f"{math.ceil(value / scale) * scale:,}"


def has_losses(facts) -> bool:
    return any((facts.folder / name).exists() for name in NEEDED)


def judged_rows(all_facts) -> list[Rows]:
    """Grades by each judge that graded all of the runs, prompt by prompt."""
    found = []
    for name in sorted(set(all_facts[0].judged).intersection(*(facts.judged for facts in all_facts[1:]))):
        by_key = [_grades(facts.judged[name].get("grades", [])) for facts in all_facts]
        if not set(by_key[0]).intersection(*by_key[1:]):
            continue  # answers to other prompts: no reason to compare nothing at all
        keys, note = _in_common(by_key)
        sums, groups = np.array([[of_run[k] for k in keys] for of_run in by_key]), [key[0] for key in keys]
        found.append(Rows(f"grade by {name}", sums, np.ones(len(keys)), np.array(groups), note))
    return found


def _grades(entries) -> dict:
    """(prompt, its how-manieth occurrence) -> mean grade; answers without one are left out."""
    means = {}
    for key, entry in judge.numbered(entries).items():
        if grades := [grade for grade in entry["grades"] if grade is not None]:
            means[key] = sum(grades) / len(grades)
    return means


def report(all_sides) -> tuple[list[str], dict]:
    """Lines for terminal and compare.md, and the figures: each side against the first."""
    all_facts = runs_of(all_sides)
    for facts in all_facts:
        if not facts.finished:
            raise core.UserError(f"{facts.folder} is not finished: resume it, or compare others")
    lines, figures, place, where = notes(all_sides), {}, 0, []
    for side in all_sides:
        where.append(list(range(place, place + len(side.all_facts))))
        place += len(side.all_facts)
    graded = judged_rows(all_facts)
    silent = [facts.name for facts in all_facts if facts.config.get("kind") and not has_losses(facts)]
    if silent and graded:  # a plain model's answers were judged, its loss not measured
        lines.append(f"(no losses of {', '.join(silent)}: grades only)")
    for rows in [*([] if silent and graded else shared_rows(all_facts)), *graded]:
        count = len(set(rows.groups.tolist()))
        lines.append(f"**{rows.name}** on {len(rows):,} rows, {count:,} prompts or stretches of text")
        lines += [f"({rows.note})"] if rows.note else []
        means = rows.sums.sum(1) / rows.weights.sum()
        lines += ["", results.markdown({
            "side": [side.name for side in all_sides],
            "mean": [f"{means[at].mean():.4f}" for at in where],
            "runs": [" ".join(f"{mean:.4f}" for mean in means[at]) for at in where],
        }), ""]  # fmt: skip
        for side, at in zip(all_sides[1:], where[1:], strict=True):
            found = difference(rows, where[0], at)
            names = all_sides[0].name, side.name
            lines.append(f"{names[0]} - {names[1]}  {verdict(found, rows.name, names)}")
            figures.setdefault(rows.name, []).append(found | {"sides": names})
        lines.append("")
    weights = [facts.result.get("weights_sha256") for facts in all_facts]
    if same := [f.name for f, w in zip(all_facts[1:], weights[1:], strict=True) if w and w == weights[0]]:
        lines.append(f"the same weights as {all_facts[0].name}: {', '.join(same)}")
    if (count := sum(map(len, figures.values()))) > 2:
        lines.append(f"{count} comparisons: of 20 between equals one looks like a difference")
    return lines, figures


def side_by_side(all_sides, most) -> str | None:
    """Markdown: each prompt, its reference, the answer of each side's first run with its grades.

    `most`: so many prompts, spread evenly. None where a side has no answers, or none to the same prompts.
    """
    firsts = [side.all_facts[0] for side in all_sides]
    if not all((facts.folder / "responses.json").exists() for facts in firsts):
        return None
    answers = [judge.read_responses(facts.folder / "responses.json") for facts in firsts]
    by_key = [judge.by_prompt(rows) for rows in answers]
    keys = [key for key in by_key[0] if all(key in of_run for of_run in by_key)]
    if not keys:
        return None
    grades = [{name: _grades(s.get("grades", [])) for name, s in facts.judged.items()} for facts in firsts]
    chosen = np.linspace(0, len(keys) - 1, min(most or len(keys), len(keys))).round().astype(int)
    lines = ["# Answers side by side", "", f"{len(chosen)} of {len(keys)} prompts"]
    for number, key in enumerate((keys[i] for i in chosen), start=1):
        row = by_key[0][key]
        lines += ["", f"## {number}", "", quoted(row["instruction"])]
        lines += ["", quoted(row["input"])] if row.get("input") else []
        lines += ["", "**reference**", "", quoted(row.get("output") or "")]
        for side, of_run, graded in zip(all_sides, by_key, grades, strict=True):
            given = "  ".join(f"{name} {means[key]:g}" for name, means in graded.items() if key in means)
            lines += ["", f"**{side.name}**  {given}".rstrip(), "", quoted(of_run[key]["model_response"])]
    return "\n".join(lines) + "\n"


def quoted(text) -> str:
    """A block quote: whatever the text holds, it stays inside."""
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines() or ["(empty)"])
