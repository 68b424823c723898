"""The house: which names stand where, who may import whom, and how long a file may be."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from ranks import SCRIPTS

LAYERS = [("errors",), ("train", "run"), ("data", "models"), ("measure",), ("compare",)]
PROGRAMS = {"core", "eval", *SCRIPTS}
LAB = sorted(path for path in PROJECT.glob("lab/**/*.py") if path.name != "__init__.py")
TOP = {
    *(
        ".ci",
        ".gitignore",
        "JOURNAL.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements.txt",
        "setup.sh",
    ),
    *("benchmarks", "docs", "lab", "pictures", "tests"),
    *(f"{name}.py" for name in PROGRAMS),
}


def module_of(path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts)


MODULES = {module_of(path) for path in LAB} | PROGRAMS


def imported(source) -> set[str]:
    """The project's modules that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES


IMPORTS = {module: imported((PROJECT / f"{module.replace('.', '/')}.py").read_text()) for module in MODULES}


def layer_of(module) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def everything_behind(module) -> set[str]:
    reached, waiting = set(), [module]
    while waiting:
        new = IMPORTS[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def test_the_reader_of_imports_sees_every_form():
    assert imported("from lab.run import files\nimport lab.errors, torch") == {"lab.run.files", "lab.errors"}
    assert imported("def f():\n    from lab.run.files import flush\n    import core") == {
        "lab.run.files",
        "core",
    }


@pytest.mark.parametrize("module", sorted(MODULES - PROGRAMS))
def test_lab_imports_its_own_layer_and_those_below_and_no_program(module):
    wrong = {name for name in IMPORTS[module] if name in PROGRAMS or layer_of(name) > layer_of(module)}
    assert not wrong


def test_no_module_is_in_a_cycle():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())  # CycleError names them
    assert set(order) == MODULES


def test_programs_import_core_gpt_scratch_and_rooms_but_not_each_other():
    for name in SCRIPTS:
        others = IMPORTS[name] & PROGRAMS
        assert others <= ({"core"} if name == "gpt_scratch" else {"core", "gpt_scratch"}), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_never_imports_the_judge(script):
    assert "lab.compare.judge" not in everything_behind(script)
    assert "lab.compare.judge" in everything_behind("eval")


def test_core_is_an_index():
    doc, *lines = ast.parse((PROJECT / "core.py").read_text()).body
    assert isinstance(doc, ast.Expr) and all(isinstance(line, ast.ImportFrom) for line in lines)
    assert all(line.module.startswith("lab.") for line in lines)


def test_importing_core_reads_no_large_library():
    code = "import sys, core; print(*{'transformers', 'datasets', 'matplotlib', 'pandas'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("path", LAB, ids=module_of)
def test_a_file_of_lab_is_short_and_has_its_tests(path):
    assert len(path.read_text().splitlines()) <= 400
    room = path.relative_to(PROJECT / "lab").parent
    assert (PROJECT / "tests" / room / f"test_{path.name}").exists()


# 80 to 160 of these lines are constants and presets; what else stands there is of one script only
LONGER = {
    "run_mathqa": 700,
    "eval": 640,
    "run_preference": 640,
    "gpt_scratch": 600,
    "run_pretrain_diversity": 600,
}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_program_is_short(name):
    assert len((PROJECT / f"{name}.py").read_text().splitlines()) <= LONGER.get(name, 450)


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_fits_a_page(name):
    """Data, forward, loss and validation in view; pairs with folds, and int4, take a few lines more."""
    tree = ast.parse((PROJECT / f"{name}.py").read_text())
    (train,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert train.end_lineno - train.lineno < {"run_preference": 64, "run_mathqa": 64}.get(name, 60)


@pytest.mark.parametrize("path", [*LAB, *sorted(PROJECT.glob("*.py"))], ids=lambda path: path.stem)
def test_no_sentence_prints_the_name_of_a_value_instead_of_it(path):
    """Like "{cfg.passes} times" in a string that is no f-string."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in inside]
    assert [text for text in texts if re.search(r"\{\w+\.\w", str(text))] == []


def test_no_test_file_is_long():
    lines = {path: len(path.read_text().splitlines()) for path in PROJECT.glob("tests/**/*.py")}
    assert {str(path): count for path, count in lines.items() if count > 600} == {}


def test_no_test_takes_the_place_of_another_of_the_same_name():
    """ruff's F811 is off in tests, for fixtures that files import by name."""
    for path in PROJECT.glob("tests/**/*.py"):
        body = ast.parse(path.read_text()).body
        names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(names) == len(set(names)), path


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "-C", PROJECT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:  # a copy without git
        pytest.skip("not a git checkout")
    assert {Path(name).parts[0] for name in listed.stdout.splitlines()} <= TOP
