"""Offline, quiet, without a GPU (cards.py), and with the project importable; `launch` (ranks.py) starts the
processes of a run.
"""

import os
import signal
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
os.environ |= {
    "HF_HUB_OFFLINE": "1",  # set before transformers is imported: an unreachable Hub costs a minute
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")]),
}
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import cards  # noqa: E402

cards.hide()  # before torch is imported here or, later on, by a process that a test starts

import pytest  # noqa: E402

# a shell starts what it puts in the background deaf to Ctrl-C, and so would every process be that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LARGE = {"smoke", "tuned", "adapted", "whole", "studied", "copied"}  # fixtures: whole runs, studies, copies


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What looks at a whole run or study is slow. Tests marked `gpu` are part of every run, and skipped where
    they cannot run."""
    for item in items:
        if LARGE & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)
    if cards.found():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One token cache for all tests that do not look at it."""
    os.environ["TOKEN_CACHE"] = str(tmp_path_factory.mktemp("token_cache"))
    return Path(os.environ["TOKEN_CACHE"])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, cache):
    """Every test runs in a folder of its own, so that runs/ never lands in the project."""
    monkeypatch.chdir(tmp_path)
