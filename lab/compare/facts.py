"""What the small files of a run say (config.json, result.json, judged.json), without its checkpoints; and in
which constants, code and resumes runs differ."""

import collections
import functools
import json
import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UserError
from lab.run.files import is_folder, is_there, read_sealed, sha256_file
from lab.run.flags import STUDY_CONSTANTS
from lab.run.resume import CALL_CONSTANTS, MAY_CHANGE
from lab.run.stored import read_result, run_config

ABSENT = "absent"  # what is shown of a constant that a run's script did not have; one that is None is "none"
IMPORTED = re.compile(r"^\s*(?:import|from) ([\w.]+)(?: import (\([^)]*\)|.*))?", re.MULTILINE)
OF_CORE = re.compile(r"\bcore\.(\w+)")


@dataclass
class Facts:
    """The small files of a run."""

    folder: Path
    config: dict
    result: dict  # empty while it runs, or when it was killed
    metrics: list[dict]
    judged: dict  # name -> summary of a judge's grades; see judge_of

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def part(self) -> str:
        """The part that its final figures are of: test, else val."""
        return "test" if any(name.startswith("test/") for name in self.result) else "val"

    @property
    def tag(self) -> str:
        return self.constant("tag") or ""

    @property
    def finished(self) -> bool:
        return self.result.get("status") == "finished"

    def constant(self, name):
        """A constant of config.json, or its preset, script, device."""
        return self.config["constants"].get(name, self.config.get(name))

    def has(self, name) -> bool:
        return name in self.config["constants"] or name in self.config

    @property
    def trained(self) -> bool:
        """Whether a training script made it. Folders of eval.py hold constants of the measurement only."""
        return self.config["script"] != "eval"

    @functools.cached_property
    def code(self) -> dict[str, str]:
        """File -> SHA-256 of the script and of the project's modules that it imports, as they ran.

        Empty without source/. Files in source/ that the script does not import do not count, nor do those of
        lab/compare/, from which no figure of a run comes.
        """
        source = self.folder / "source"
        hashes, waiting = {}, [f"{self.config['script']}.py"]
        while waiting:
            name = waiting.pop()
            if name not in hashes and not name.startswith("lab/compare/") and (source / name).exists():
                hashes[name] = sha256_file(source / name)
                waiting += imported_files(source, _text(source / name))
        return dict(sorted(hashes.items()))

    def figure(self, *names):
        """(value, interval) of the first of these figures that the run has, of `part`."""
        for name in names:
            if (value := self.result.get(f"{self.part}/{name}")) is not None:
                return value, self.result.get(f"{self.part}/{name}_interval")
        return None, None

    @property
    def alarm(self) -> str | None:
        """The sentence of a run that has learnt nothing."""
        names = ("alarm", f"{self.part}/alarm", f"{self.part}/own/alarm")
        return next((alarm for name in names if (alarm := self.result.get(name))), None)

    def curve(self, name) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for row in self.metrics if isinstance(row.get(name), int | float)]


def imported_files(source, text) -> list[str]:
    """Files below `source` that the code `text` may import; through core.py, the index, only those of
    the names that it uses."""
    names = []
    for module, imported in IMPORTED.findall(text):
        if module == "core" and (source / "lab").exists():
            used = set(OF_CORE.findall(text)) | set(re.findall(r"\w+", imported))
            for room, offered in IMPORTED.findall(_text(source / "core.py")):
                names += [room] * bool(used & set(re.findall(r"\w+", offered)))
            continue
        names += [module, *(f"{module}.{name}" for name in re.findall(r"\w+", imported))]
    return [f"{name.replace('.', '/')}.py" for name in names]


def read(folder) -> Facts:
    """Reads the Facts of a run folder. UserError where it is none."""
    folder = Path(folder)
    config = run_config(folder)
    lines = _text(folder / "metrics.jsonl").splitlines()
    rows = [row for line in lines if isinstance(row := _json(line), dict)]  # a kill leaves half a line
    metrics = [row for row in rows if isinstance(row.get("step"), int)]  # (bytes that are no text: likewise)
    result, judged = read_result(folder), read_judged(folder / "judged.json")
    if not result and (folder / "result.json").exists():
        print(f"WARNING {folder}: result.json is damaged, its figures are not shown", file=sys.stderr)
    return Facts(folder, config, result, metrics, current_grades(folder, judged))


def current_grades(folder, judged) -> dict:
    """The grades of the present responses.json; grades of other answers are left out, with a warning."""
    path = folder / "responses.json"
    if not judged or not path.exists():
        return judged
    try:
        now = sha256_file(path)
    except OSError as error:
        print(f"WARNING {path} cannot be read ({error.strerror}): its grades are not shown", file=sys.stderr)
        return {}
    old = [name for name, summary in judged.items() if summary.get("responses_sha256", now) != now]
    for name in old:
        print(f"WARNING {folder}: {name} graded other answers than responses.json now holds", file=sys.stderr)
    return {name: summary for name, summary in judged.items() if name not in old}


def read_judged(path) -> dict:
    """Reads judged.json: judge -> summary. Empty where it is absent or damaged."""
    try:
        judged = read_sealed(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        print(f"WARNING {path} is damaged: its grades are not shown", file=sys.stderr)
        return {}
    return {name: summary for name, summary in judged.items() if _is_summary(summary)}


def _is_summary(summary) -> bool:
    """Whether what is stored of a judge is whole; grades may be absent."""
    entries = summary.get("grades", []) if isinstance(summary, dict) else None
    return isinstance(entries, list) and all(map(_is_grade, entries))


def _is_grade(entry) -> bool:
    return isinstance(entry, dict) and "group" in entry and isinstance(entry.get("grades"), list)


def judge_of(name, summary) -> tuple:
    """(model, address, temperature) of the judge whose summary stands under a name in judged.json; `unknown`:
    of grades from before it was noted."""
    about = summary.get("judge", name), summary.get("url"), summary.get("temperature", "unknown")
    return tuple(map(str, about))


def judges_of(all_facts) -> dict[tuple, str]:
    """Each judge that graded one of these runs -> its name, in this order: the model's, with address and
    temperature where that is not enough."""
    judges = {judge_of(*item) for facts in all_facts for item in facts.judged.items()}
    models = [model for model, *_ in judges]
    names = {judge: judge[0] if models.count(judge[0]) == 1 else _full_name(*judge) for judge in judges}
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _full_name(model, url, temperature) -> str:
    return f"{model} at {url}, temperature {temperature}"


def graded_by(facts, judge) -> dict | None:
    """The summary of a judge's grades of a run."""
    return next((s for name, s in facts.judged.items() if judge_of(name, s) == judge), None)


def with_summary(judged, summary) -> dict:
    """What judged.json holds, with a summary that replaces the same judge's, and never another's of its
    name."""
    judge = judge_of(None, summary)
    there = judge_of(judge[0], judged.get(judge[0], summary))
    is_same = there[:2] == judge[:2] and there[2] in (judge[2], "unknown")
    return judged | {judge[0] if is_same else _full_name(*judge): summary}


def read_all(folders) -> list[Facts]:
    """Reads all folders that can be read; warns of a damaged one and goes on."""
    found = []
    for folder in folders:
        try:
            found.append(read(folder))
        except UserError as error:
            print(f"WARNING passed over: {error}", file=sys.stderr)
    return found


def _text(path) -> str:
    """What a file of a run holds; nothing where there is none, or it cannot be read: then with a warning."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        print(f"WARNING {path} cannot be read ({error.strerror}): it counts as empty", file=sys.stderr)
        return ""


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def find(names) -> list[Facts]:
    """Runs of the named folders: a run itself, or all runs in a folder, oldest first; each once.
    UserError where there is none."""
    single, inside_of = {}, {}
    for name in names:
        path = Path(name)
        if not is_folder(path):
            raise UserError(f"no such folder: {name}")
        if is_there(path / "config.json"):
            single[path.resolve()] = read(path)
            continue
        inside = sorted(p.parent for p in path.glob("*/config.json"))
        if not inside:
            deeper = sorted({str(p.parents[1]) for p in path.glob("*/*/config.json")})
            hint = f": use {' '.join(deeper)}" if deeper else ""
            raise UserError(f"{name} holds no run{hint}")
        inside_of |= {facts.folder.resolve(): facts for facts in read_all(inside)}
    return list((single | inside_of).values())


LENGTH = {"epochs", "max_steps", "max_minutes", "final_eval"}
IGNORED_IN_COMPARISON = CALL_CONSTANTS | STUDY_CONSTANTS | (MAY_CHANGE - LENGTH)
IGNORED_IN_COMPARISON |= {"seed", "run_folder", "prompt"}


def experiment_constants(facts) -> dict:
    """Constants that make two runs different experiments: without seed, bookkeeping, and the seed in the name
    of the base run."""
    constants = {n: v for n, v in facts.config["constants"].items() if n not in IGNORED_IN_COMPARISON}
    if base := re.fullmatch(r".*/\d{8}_\d{6}-(.+)-s\d+", constants.get("init_from") or ""):
        constants["init_from"] = base[1]
    return constants


def differing(all_facts) -> list[str]:
    """Names of the experiment constants in which runs differ, or that only some runs of a script have, in the
    order of the scripts."""
    values, scripts = {}, {}
    for facts in all_facts:
        for name, value in experiment_constants(facts).items():
            values.setdefault(name, set()).add(repr(value))
        kind = facts.config.get("kind")  # what eval.py measures of texts and of rows has other constants
        scripts.setdefault((facts.config["script"], kind), []).append(facts)
    partly = {name for script_runs in scripts.values() for name in had_by_some(script_runs)}
    return [name for name, different in values.items() if len(different) > 1 or name in partly]


def had_by_some(all_facts) -> list[str]:
    """Names of the experiment constants that some of these runs have and others lack."""
    counts = collections.Counter(name for facts in all_facts for name in experiment_constants(facts))
    return [name for name, count in counts.items() if count < len(all_facts)]


def differing_bookkeeping(all_facts) -> list[str]:
    """Names of the bookkeeping constants, seed first, in which these runs differ."""
    names = ["seed", *sorted(IGNORED_IN_COMPARISON - CALL_CONSTANTS - {"seed", "note"})]
    return [name for name in names if len({value_of(facts, name) for facts in all_facts}) > 1]


def differing_scripts(all_facts) -> list[str]:
    return ["script"] if len({facts.constant("script") for facts in all_facts}) > 1 else []


def code_versions(all_facts) -> dict[str, list[list[Facts]]]:
    """File -> runs grouped by its version, for the files that have several versions among these runs."""
    versions = {}
    for facts in all_facts:
        for file, digest in facts.code.items():
            versions.setdefault(file, {}).setdefault(digest, []).append(facts)
    return {file: list(runs.values()) for file, runs in sorted(versions.items()) if len(runs) > 1}


def how_to_see(versions) -> str:
    """The diff command that shows how the first two versions differ."""
    return shlex.join(["diff", "-r", *(str(same_code[0].folder / "source") for same_code in versions[:2])])


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
    """Lines on runs that were resumed with other constants or code; `named`: (name, Facts)."""
    lines, untold = [], []
    for name, facts in named:
        lines += [f"NOTE {name} was resumed {words}" for words in resume_words(facts)]
        standing = _standing(facts.config.get("resumes", []))
        steps = [entry["step"] for entry in standing if "changed" not in entry]
        untold += [f"{name} at step {step}" for step in steps if step]
    if untold:  # by the code before changes were recorded
        lines.append(f"NOTE resumed, perhaps with another length (not recorded): {', '.join(untold)}")
    return list(dict.fromkeys(lines))


def resume_words(facts) -> list[str]:
    """At which step a run was resumed with what other constants, and with what other code."""
    words = []
    for step, changes in resumed(facts).items():
        if step and (changes := _that_matter(changes)):  # at step 0 nothing had been trained before
            words.append(f"at step {step} with {_changes(facts, changes)}")
    for entry in _standing(facts.config.get("resumes", [])):
        if files := facts.code.keys() & entry.get("other_code", []):
            words.append(
                f"at step {entry['step']} with another {', '.join(sorted(files))} than its source/ has"
            )
    return words


def alarm_notes(named) -> list[str]:
    """A line for each run that has learnt nothing; `named`: (name, Facts)."""
    return [f"NOTE {name} is {facts.alarm}" for name, facts in named if facts.alarm]


def _standing(resumes) -> list[dict]:
    """The resumes whose steps are part of the run: a later resume from an older checkpoint discards them."""
    return [entry for i, entry in enumerate(resumes) if all(entry["step"] <= e["step"] for e in resumes[i:])]


def _that_matter(changes) -> dict:
    """The changes without bookkeeping, and without those that were changed back."""
    passed_over = IGNORED_IN_COMPARISON | {"final_eval"}
    return {n: (was, now) for n, (was, now) in changes.items() if n not in passed_over and was != now}


def _changes(facts, changes) -> str:
    text = ", ".join(f"{name} {_word(now)} (before: {_word(was)})" for name, (was, now) in changes.items())
    has_schedule = facts.constant("schedule") != "constant" or facts.constant("warmup")
    if has_schedule and changes.keys() & LENGTH:
        text += ": its learning rate followed another schedule until then"
    return text


def _word(value) -> str:
    return "none" if value is None else str(value)


def value_of(facts, name) -> str:
    """A constant's value as text; `none` and `absent` are different."""
    return _word(facts.constant(name)) if facts.has(name) else ABSENT
