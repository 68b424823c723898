"""Small runs of run_mathqa.py."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from ranks import launch
from toys.once import once

NAME = "run_mathqa"
TEXT = {  # constants of the first stage
    **{"max_documents": 30, "tokenizer": "bpe:300", "block_size": 64, "vocab_multiple": 32, "n_embd": 32},
    **{"eval_rows": 20, "batch": 10, "max_steps": 10, "eval_every": 4, "save_every": 3, "sample_tokens": 0},
}


def first(**changes) -> list:
    """--pretrain and its words."""
    words = [f"{name}={value}" for name, value in {**TEXT, **changes}.items()]
    return ["--pretrain", ",".join(["noam_wide4", *words])]


FIRST = first()
DATA = [
    *("--smoke", "--max_documents", 200),
    *("--eval_rows", 20, "--answer_rows", 7, "--plain_blocks", 3, "--log_every", 4),
]
SECOND = ["--batch", 10, "--max_steps", 12, "--eval_every", 5, "--save_every", 4]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def here(tmp_path_factory, cache):
    """Makes the current folder a new one that lasts as long as the module, for the length of a `with`."""

    def enter(name):
        patch = pytest.MonkeyPatch()
        patch.chdir(tmp_path_factory.mktemp(name))
        return patch

    return enter


def shared_cache(cache) -> dict:
    return {"TOKEN_CACHE": str(cache)}


@pytest.fixture
def go(cache):
    """The script, expected to end well; returns what it printed."""

    def run(*argv, size=1, out="out", name=NAME, ends=None, **options) -> str:
        codes = launch(
            name, *(["--out", out] if out else []), *argv, size=size, env=shared_cache(cache), **options
        )
        said = Path("out.txt").read_text()
        assert codes == (ends or [0] * size), said
        return said

    return run


def result_of(folder) -> dict:
    return json.loads((Path(folder) / "result.json").read_text())


def constants_of(folder) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())["constants"]


def script_of(folder) -> str:
    return json.loads((Path(folder) / "config.json").read_text())["script"]


def run_folders(out="out") -> list[Path]:
    return sorted(path.parent for path in Path(out).glob("*/config.json"))


def same_outcome(got, want):
    names = [name for name in want if name.startswith(("test/", "weights", "test_check", "alarm", "plain"))]
    assert got["status"] == "finished" and len(names) > 10
    assert {name: got.get(name) for name in names} == {name: want[name] for name in names}


ARMS = ("full", "lora,lr=3e-3", "full,qat=int4")
STUDY = [*DATA, "--mode", "study", *first(max_steps=4), *SECOND, "--answer_rows", 0]
STUDY = [*STUDY, "--arms", *ARMS, "--budgets", "steps", "time", "--seeds", 2]


def arms(*names, of=STUDY) -> list:
    """STUDY with other arms: words of a flag given twice would add up."""
    start = of.index("--arms") + 1
    return [*of[:start], *names, *of[start + len(ARMS) :]]


def budgets(*names, of=STUDY) -> list:
    start = of.index("--budgets") + 1
    return [*of[:start], *names, *of[start + 2 :]]


@pytest.fixture(scope="module")
def studied(here, cache):
    """A folder in which a study has run to its end: not to be written to."""
    return once(_studied, here, cache)


def _studied(here, cache):
    patch = here("studied")
    assert launch(NAME, "--out", "out", *STUDY, env=shared_cache(cache)) == [0], Path("out.txt").read_text()
    folder = Path.cwd()
    patch.undo()
    return folder


@pytest.fixture
def copied(studied, monkeypatch):
    """The current folder is a copy of `studied`."""
    shutil.copytree(studied, "copied")
    monkeypatch.chdir("copied")


def study_of(folder=".", mode="study") -> dict:
    """study.json of the newest study there."""
    path = max(Path(folder).glob(f"out/{mode}-*/study.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(path.read_text())


def tables_of(text) -> list[list[dict]]:
    """The rows of each Markdown table in `text`."""
    found = []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            head, _, *rows = ([c.strip() for c in line.rstrip()[1:-1].split("|")] for line in lines)
            found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def rows_of(text) -> list[dict]:
    """The rows of the first one."""
    return tables_of(text)[0]


SPLIT = [*DATA, "--mode", "split", *SECOND, "--answer_rows", 0, "--plain_blocks", 0]
