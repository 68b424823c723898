"""A seeded share of tests/fuzz.py; and that it finds what it is for."""

import math
import random
import signal
from pathlib import Path

import fuzz
import fuzz_models
import fuzz_runs
import pytest
import torch
from ranks import everywhere

import core
from lab.data import cache, tables
from lab.errors import UserError
from lab.run import checkpoints, files, resume


def test_two_hundred_damaged_inputs_are_read_rightly_or_refused_in_one_line():
    counts, failures = fuzz.run(seed=20, cases=200)
    assert failures == [] and min(counts["right"], counts["refused"]) > 40


def believe(*_):
    return None


def none(*_):
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "fault", "first"),
    [
        (files, "seal_of", str, 0),  # config.json and result.json are believed
        (checkpoints, "broken", believe, 0),
        (resume, "passed_over", none, 85),
    ],
)
def test_it_finds_a_run_that_is_believed(module, name, fault, first, monkeypatch):
    fuzz_runs.template()
    everywhere(monkeypatch.setattr, module, name, fault)
    assert fuzz.run(seed=1, cases=15, only="runs", first=first)[1]


def boom(*_):
    raise KeyError("options")


def empty(*_):
    raise UserError("")


def slow(*_):
    signal.pause()


def other_rows(name, *_, **__):
    return [{"a": "1"}]


@pytest.mark.parametrize("fault", [boom, empty, slow, other_rows])
def test_it_finds_a_faulty_reader(fault, monkeypatch):
    monkeypatch.setattr(fuzz, "PATIENCE", 0.1)
    monkeypatch.setattr(tables, "read_rows", fault)
    _, failures = fuzz.run(seed=1, cases=6, only="tables")
    assert failures and all(failure.startswith("case ") for failure in failures)


def test_it_finds_a_cache_that_is_believed(monkeypatch):
    monkeypatch.setattr(cache, "damage", believe)
    monkeypatch.setattr(cache, "_checked", {})
    assert fuzz.run(seed=1, cases=20, only="caches")[1]


def test_it_finds_code_that_runs_and_constants_that_are_none(monkeypatch):
    monkeypatch.setattr(fuzz_models.pretrained, "open_any", lambda folder: pickled(Path(folder)))
    assert fuzz.run(seed=1, cases=20, only="models")[1]
    monkeypatch.setattr(core, "parsed_config", lambda config, *_: config(lr=math.inf))
    assert "lr became inf" in fuzz.run(seed=1, cases=1, only="constants")[1][0]


def pickled(folder):
    """Opens a pickle as one must not."""
    for path in folder.glob("pytorch_model.bin"):
        torch.load(path, weights_only=False)
    raise UserError("refused")


def test_a_case_is_a_function_of_seed_and_number(tmp_path):
    rows = [fuzz.some_rows(random.Random("7/3")) for _ in range(2)]
    paths = [fuzz.write_file(tmp_path, rows[0], random.Random("7/3")) for _ in range(2)]
    assert rows[0] == rows[1] and paths[0] == paths[1] and Path(paths[0]).exists()
