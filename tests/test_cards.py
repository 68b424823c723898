"""Cards are hidden from tests and from all they start, but for those marked `gpu` (cards.py, conftest.py).

No card is needed: a fake torch.cuda sees one unless CUDA_VISIBLE_DEVICES is empty, as a driver does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cards
import pytest
import ranks
import torch
from conftest import PROJECT

PROBE = """
import dataclasses, os, torch
import core
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""
torch.cuda.device_count = lambda: 1

@dataclasses.dataclass(frozen=True)
class Config(core.Constants):
    out: str = ""  # where runs go
    backend: str = "auto"  # of the exchange

def main(cfg, *rest):
    os.write(1, f"on {rest[-1].device} ".encode())  # in one write: two ranks share the file
"""
FAKE = """
import os
shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
class cuda:
    is_available = staticmethod(lambda: shown != "")
    device_count = staticmethod(lambda: len(shown.split(",")))
    get_device_capability = staticmethod(lambda: (7, 5))
class xpu:
    is_available = staticmethod(lambda: False)
"""
HIDDEN = """
import glob, json, os, subprocess, sys
import cards
glob.glob = lambda path: [path]  # a driver's files are there
cards.hide()
seen = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
run = lambda env: subprocess.run(seen, env=env, capture_output=True, text=True).stdout.strip()
print(json.dumps([cards.found(), run(None), run(cards.environment()) if cards.found() else ""]))
"""


def python(code, **changes):
    """What `code` prints in a process that has not been told of any card; None takes a variable away."""
    env = {**os.environ, cards.FOUND: None, **dict.fromkeys(cards.HIDE), **changes}
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A script like ours, on a machine with one card."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)


def test_two_ranks_of_a_test_do_not_meet_the_one_card_of_the_machine(probe):
    assert ranks.launch("probe", size=2) == [0, 0], Path("out.txt").read_text()
    assert Path("out.txt").read_text().split() == ["on", "cpu"] * 2


def test_nor_does_what_a_test_starts_or_the_test_itself(probe):
    code = "import probe; from lab.train import processes; print(processes._pick_device(0, 2))"
    done = subprocess.run(["bash", "-c", f"'{sys.executable}' -c '{code}'"], capture_output=True, text=True)
    assert done.stdout == "cpu\n", done.stderr
    assert not torch.cuda.is_available() and not torch.xpu.is_available()


@pytest.mark.parametrize(("typed", "count"), [(None, 2), ("3", 1), ("", None)])
def test_a_card_is_found_hidden_and_shown_again_as_the_user_had_it(typed, count, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/torch.py").write_text(FAKE)
    path = os.pathsep.join([str(tmp_path / "fake"), os.environ["PYTHONPATH"]])
    found, hidden, shown = json.loads(python(HIDDEN, PYTHONPATH=path, CUDA_VISIBLE_DEVICES=typed))
    before = {} if typed is None else {"CUDA_VISIBLE_DEVICES": typed}
    card = {"kind": "cuda", "count": count, "half": "fp16", "before": before}
    assert [found, hidden, shown] == ([card, "False", "True"] if count else [None, "False", ""])


def test_without_a_driver_nothing_is_asked(monkeypatch):
    monkeypatch.delenv(cards.FOUND)
    monkeypatch.setattr(cards, "NODES", ["/dev/no such file"])
    monkeypatch.setattr(cards, "_ask_torch", lambda: pytest.fail("torch was imported"))
    cards.hide()
    assert cards.found() is None


MARKED = """
import os, cards, pytest

@pytest.mark.gpu
def test_the_card():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and cards.environment()["CUDA_VISIBLE_DEVICES"] == "3"
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_marked_test_runs_where_a_card_is_and_is_shown_as_skipped_elsewhere(there, tmp_path):
    (tmp_path / "test_marked.py").write_text(MARKED)
    card = {"kind": "cuda", "count": 1, "half": "bf16", "before": {"CUDA_VISIBLE_DEVICES": "3"}}
    env = os.environ | {cards.FOUND: json.dumps(card if there else None)}
    command = [sys.executable, "-m", "pytest", "-c", str(PROJECT / "pyproject.toml"), "-p", "conftest", "-rs"]
    command += ["--basetemp", str(tmp_path / "inner")]  # else it clears what earlier sessions left in /tmp
    done = subprocess.run([*command, "test_marked.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("1 passed" if there else "1 skipped") in done.stdout
    assert ("no GPU here" in done.stdout) == (not there)
