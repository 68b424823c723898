"""The six built-in data sets, for a machine without a network: real text and code of Python itself,
instructions and preference pairs made of it, small problems from templates. Deterministic."""

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import os
import platform
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

from lab.data.columns import INSTRUCTION_COLUMNS, LABELS, LETTERS, TEXTS

BUILT_IN = ("python-docs", "python-code", "numpy-docs")


def built_in_texts(name):
    """Yields the texts of python-docs (help topics, docstrings), python-code (sources of the library) or
    numpy-docs (docstrings of a package that every installation of this project has)."""
    if name == "python-docs":
        from pydoc_data.topics import topics

        yield from (topics[topic] for topic in sorted(topics))
    for path in _numpy_files() if name == "numpy-docs" else _library_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        if name == "python-code":
            yield source
        else:
            yield from _docstrings(source)


def _library_files() -> list[Path]:
    """Modules of the standard library: no tests, no installed packages."""
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    skipped |= {"idlelib", "lib2to3", "turtledemo", "ensurepip"}
    return _modules(Path(sysconfig.get_path("stdlib")), skipped)


def _numpy_files() -> list[Path]:
    return _modules(Path(np.__file__).parent, {"tests"})


def _modules(folder, skipped) -> list[Path]:
    """All *.py below a folder, sorted, without what lies in folders of these names: these are not walked,
    for site-packages has tens of thousands of files."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(where, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _docstrings(source):
    """Docstrings of at least three words, of modules, classes and functions."""
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) > 2:
                    yield text


MODULES = (
    "math",
    "os.path",
    "random",
    "statistics",
    "string",
    "textwrap",
    "shutil",
    "itertools",
    "functools",
    "operator",
    "bisect",
    "heapq",
    "glob",
    "fnmatch",
    "json",
    "base64",
    "calendar",
    "copy",
    "os",
    "shlex",
    "tempfile",
    "time",
    "warnings",
    "inspect",
    "html",
    "difflib",
)
WORDINGS = (  # instruction, input
    ("What does {} do?", ""), ("Explain {} in a sentence.", ""), ("Describe the function {}.", ""),
    ("What is this function for?", "{}"), ("Say what it does.", "{}"), ("Explain the function.", "{}"),
)  # fmt: skip


def python_instructions(seed=0) -> list[dict]:
    """Built-in instruction rows: what does a function of the standard library do? The answer is the first
    sentence of its docstring.

    At most four answers begin with the same word, and each function is asked about in six wordings: a model
    that has learnt what a function does gets the first word right in the held-out wordings.
    """
    answers, taken = {}, Counter()
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in sorted(getattr(module, "__all__", dir(module))):
            function = getattr(module, attribute)
            if attribute[0] == "_" or inspect.isclass(function) or not callable(function):
                continue
            paragraph = (inspect.getdoc(function) or "").strip().split("\n\n")[0]
            answer = re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0]
            word = answer.split(" ")[0]
            if word.isalpha() and taken[word] < 4 and 3 <= answer.count(" ") <= 11:
                taken[word] += 1
                answers[f"{name}.{attribute}"] = answer
    rows = [
        dict(zip(INSTRUCTION_COLUMNS, (instruction.format(name), given.format(name), answer), strict=True))
        for name, answer in answers.items()
        for instruction, given in WORDINGS
    ]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


TOPICS = ("math", "random", "shutil", "threading")  # modules with 20 public names of their own


def topic_words(topic) -> list[str]:
    module = importlib.import_module(topic)
    public = sorted(name for name in getattr(module, "__all__", dir(module)) if name[0] != "_")
    return [name for name in public if name not in TOPICS][:20]


def pair_words() -> dict[str, list[str]]:
    """All that differs in python_pairs between versions of Python."""
    return {topic: topic_words(topic) for topic in TOPICS}


def python_pairs(n=1500, seed=0) -> list[dict]:
    """Built-in preference rows: which answer names things of the module that the prompt asks for?

    A and B come from different modules, drawn independently of the label, so that the answers alone say
    nothing. A tie is a prompt about a third module (both wrong) or about both modules (both right).
    """
    rng = np.random.default_rng(seed)
    words = pair_words()
    openers = ["Please", "Kindly", "Now", "Next", "Quickly", "Briefly", "Today", "First"]
    verbs = ["name", "list", "show", "give", "recall", "write", "print", "tell"]
    rows = []
    for number in range(n):
        label = rng.choice(list(LABELS))
        a, b, other, _ = rng.permutation(TOPICS)
        tied = other if rng.random() < 0.5 else f"{a} or {b}"
        asked = {"A": a, "B": b, "tie": tied}[label]
        prompt = f"{rng.choice(openers)} {rng.choice(verbs)} {asked}"
        answers = [" ".join(rng.choice(words[topic], 8, replace=False)) for topic in (a, b)]
        texts = dict(zip(TEXTS, [json.dumps([text]) for text in (prompt, *answers)], strict=True))
        rows.append(
            {"id": number, **texts, **{column: int(label == name) for name, column in LABELS.items()}}
        )
    return rows


PEOPLE = (
    "ann",
    "ben",
    "cora",
    "dan",
    "emma",
    "finn",
    "ida",
    "jan",
    "kate",
    "leo",
    "mona",
    "ned",
    "pat",
)
THINGS = ("apples", "books", "coins", "pens", "cards", "roses", "stamps", "balls", "keys", "eggs", "cups")
TEMPLATES = (  # problem, rationale, the two formulas, answer; numbers from 2 to 9
    ("{n} has {a} {t} and gets {b} more . how many {t} ?", "{a} + {b} = {c}",
     "add({a}, {b})", "add(n0,n1)|", lambda a, b: a + b),
    ("{n} had {ab} {t} and lost {b} of them . how many {t} ?", "{ab} - {b} = {c}",
     "subtract({ab}, {b})", "subtract(n0,n1)|", lambda a, b: a),
    ("{n} has {a} {t} and {m} twice as many . how many {t} ?", "2 * {a} = {c}",
     "multiply(2, {a})", "multiply(const_2,n0)|", lambda a, b: 2 * a),
)  # fmt: skip


def template_problems(count=4000, seed=0) -> list[dict]:
    """Built-in rows in MathQA's columns: small sums in words.

    The five options answer five problems of one template with other numbers, drawn together: without the
    problem no option is likelier than another.
    """
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        text, why, formula, linear, solve = TEMPLATES[rng.integers(len(TEMPLATES))]
        pairs = rng.integers(2, 10, size=(len(LETTERS), 2)).tolist()
        answers = [solve(a, b) for a, b in pairs]
        if len(set(answers)) < len(LETTERS):
            continue
        right, (a, b) = int(rng.integers(len(LETTERS))), pairs[0]
        answers[0], answers[right] = answers[right], answers[0]
        name, other = rng.choice(PEOPLE, 2, replace=False)
        filled = {"n": name, "m": other, "t": rng.choice(THINGS), "a": a, "b": b, "ab": a + b}
        filled["c"] = answers[right]
        options = " , ".join(f"{x} ) {answer}" for x, answer in zip(LETTERS, answers, strict=True))
        rows.append({
            "Problem": text.format(**filled), "Rationale": why.format(**filled), "options": options,
            "correct": LETTERS[right], "annotated_formula": formula.format(**filled),
            "linear_formula": linear, "category": "general",
        })  # fmt: skip
    return rows


@functools.cache
def built_in_problems() -> list[dict]:
    """template_problems(), made once per process: a study opens them for every run."""
    return template_problems()


ROWS = {  # the sets that are rows -> what tells them from other rows; of pairs the words, which take no time
    "python-instructions": python_instructions,
    "python-pairs": pair_words,
    "template-problems": built_in_problems,
}


def built_in_fingerprint(name) -> str:
    """What names a built-in set in caches and runs: SHA-256 of its rows, or of what they are drawn from: they
    differ between versions of Python. Of a text, which takes seconds to read, its package's version."""
    if name in ROWS:
        return hashlib.sha256(json.dumps(ROWS[name]()).encode()).hexdigest()
    numpy = f"numpy {np.__version__}"
    return f"{name} of {numpy if name == 'numpy-docs' else f'Python {platform.python_version()}'}"
