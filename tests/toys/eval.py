"""Runs of every script, and eval.py on them."""

import json
from pathlib import Path

import pytest
import ranks
from laws.test_laws import SHORT

FOLDS = ["--smoke", "--max_documents", 90, "--batch", 6, "--epochs", 1, "--folds", 3, "--eval_batch", 17]
MADE = {name: (name, SHORT[name]) for name in ranks.SCRIPTS} | {"folds": ("run_preference", FOLDS)}


_known = {}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """kind -> folder of a short run, made once; a test that changes it takes a copy."""
    known = _known  # several files import this fixture

    def folder(kind):
        if kind not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp(f"trained_{kind}"))
                ranks.run(MADE[kind][0], *MADE[kind][1])
                known[kind] = ranks.newest().absolute()
        return known[kind]

    return folder


def evaluate(*argv, size=1, codes=None, **options) -> str:
    """What `eval.py argv` says on `size` processes."""
    got = ranks.launch("eval", *argv, size=size, **options)
    assert got == (codes or [0] * size), Path("out.txt").read_text()
    return Path("out.txt").read_text()


def refused(*argv) -> str:
    """The one line that it says instead."""
    said = evaluate(*argv, codes=[2]).strip().splitlines()
    assert len(said) == 1 and said[0].startswith("eval.py: error: "), said
    return said[0]


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
