"""What is known of a run from its small files alone (config.json, result.json, judged.json), so that one that
came home without its checkpoints counts; and in which constants, code and resumes runs differ."""

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
from lab.run.files import sha256_file
from lab.run.resume import CALL_CONSTANTS, MAY_CHANGE
from lab.run.stored import read_config

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
        source = self.folder / "source"
        hashes, waiting = {}, [f"{self.config['script']}.py"]
        while waiting:
            name = waiting.pop()
            if name not in hashes and (source / name).exists():
                hashes[name] = sha256_file(source / name)
                waiting += imported_files(source, _text(source / name))
        return dict(sorted(hashes.items()))

    def figure(self, *names):
        """(value, interval) of the first of these figures that there is, of `part`."""
        for name in names:
            if (value := self.result.get(f"{self.part}/{name}")) is not None:
                return value, self.result.get(f"{self.part}/{name}_interval")
        return None, None

    def curve(self, name) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for row in self.metrics if isinstance(row.get(name), int | float)]


def imported_files(source, text) -> list[str]:
    """Names below `source` that the code `text` may import; of core.py, the index, what stands behind the
    names that are used."""
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
    """UserError where `folder` is no run."""
    folder = Path(folder)
    config = read_config(folder)
    if not isinstance(config, dict) or not {"script", "constants"} <= config.keys():
        raise UserError(f"{folder} is no run folder: its config.json is that of something else")
    lines = _text(folder / "metrics.jsonl").splitlines()
    rows = [row for line in lines if isinstance(row := _json(line), dict)]  # a kill leaves half a line
    metrics = [row for row in rows if isinstance(row.get("step"), int)]
    result, judged = _json(_text(folder / "result.json")), read_judged(folder / "judged.json")
    result = result if isinstance(result, dict) else {}
    return Facts(folder, config, result, metrics, current_grades(folder, judged))


def current_grades(folder, judged) -> dict:
    """The grades that belong to responses.json as it is now; others are passed over, with a line."""
    path = folder / "responses.json"
    if not judged or not path.exists():
        return judged
    now = sha256_file(path)
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
        except UserError as error:
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
            raise UserError(f"no such folder: {name}")
        if (path / "config.json").exists():
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
IGNORED_IN_COMPARISON = CALL_CONSTANTS | (MAY_CHANGE - LENGTH) | {"seed", "run_folder", "prompt"}


def experiment_constants(facts) -> dict:
    """The constants that tell a run from another but for the seed: without notes, those of another stage, and
    the seed in the name of the run it began with."""
    constants = {n: v for n, v in facts.config["constants"].items() if n not in IGNORED_IN_COMPARISON}
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
        for name, value in experiment_constants(facts).items():
            values.setdefault(name, set()).add(repr(value))
        kind = facts.config.get("kind")  # what eval.py measures of texts and of rows has other constants
        scripts.setdefault((facts.config["script"], kind), []).append(facts)
    partly = {name for script_runs in scripts.values() for name in had_by_some(script_runs)}
    return [name for name, different in values.items() if len(different) > 1 or name in partly]


def had_by_some(all_facts) -> list[str]:
    """Names of the constants that some of these runs have and others lack, in the scripts' order."""
    counts = collections.Counter(name for facts in all_facts for name in experiment_constants(facts))
    return [name for name, count in counts.items() if count < len(all_facts)]


def differing_bookkeeping(all_facts) -> list[str]:
    """Names of the constants of no account, seed first, in which these runs differ."""
    names = ["seed", *sorted(IGNORED_IN_COMPARISON - CALL_CONSTANTS - {"seed", "note"})]
    return [name for name in names if len({value_of(facts, name) for facts in all_facts}) > 1]


def differing_scripts(all_facts) -> list[str]:
    return ["script"] if len({facts.constant("script") for facts in all_facts}) > 1 else []


def code_versions(all_facts) -> dict[str, list[list[Facts]]]:
    """File -> the runs that ran each of its versions, for the files of which there are several."""
    versions = {}
    for facts in all_facts:
        for file, digest in facts.code.items():
            versions.setdefault(file, {}).setdefault(digest, []).append(facts)
    return {file: list(runs.values()) for file, runs in sorted(versions.items()) if len(runs) > 1}


def how_to_see(versions) -> str:
    """The command that shows in what the first two versions of a file differ."""
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
    """A constant's value in full: `none` and `absent` are two things."""
    return _word(facts.constant(name)) if facts.has(name) else ABSENT
