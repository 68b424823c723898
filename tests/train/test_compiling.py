"""When training is compiled: typed, or unasked where a card has more than ten minutes of it to do. What is
compiled, and into how many graphs: tests/models/test_compile.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import core
from core import World
from lab.run.files import write_sealed
from lab.train import compiling, loop


@pytest.fixture
def layer(monkeypatch):
    """A layer that wrap_ddp was handed, whose compiled form answers with zeros."""
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: lambda x: call(x) * 0)
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.bias)
    core.wrap_ddp(layer, World(), [layer])
    yield layer
    core.wrap_ddp(layer, World())


def is_compiled(layer) -> bool:
    return not layer(torch.ones(1, 2)).any()


def a_run(compile="auto", kind="cuda", minutes=None):
    write_sealed(Path("config.json"), {"facts": {}})
    cfg = SimpleNamespace(compile=compile, max_minutes=minutes)
    run = SimpleNamespace(cfg=cfg, folder=Path(), compiles=False, said=[])
    run.world, run.say = SimpleNamespace(device=torch.device(kind), size=1), run.said.append
    run.pin = lambda name, value: write_sealed(Path("config.json"), {"facts": {name: value}})
    return run


def test_only_calls_that_record_gradients_are_compiled_and_only_when_switched_on(layer):
    assert not is_compiled(layer)
    compiling.switch(True)
    assert is_compiled(layer)
    with torch.no_grad():
        assert not is_compiled(layer)
    compiling.switch(False)
    assert not is_compiled(layer)


@pytest.mark.parametrize(
    ("changes", "seconds", "compiles"),
    [
        ({}, 700.0, True),
        ({}, 500.0, False),
        ({"kind": "cpu"}, 1e6, False),
        ({"kind": "xpu"}, 1e6, False),
        ({"minutes": 5.0}, 1e6, False),
        ({"minutes": 90.0}, 1e6, True),
    ],
)
def test_unasked_it_is_compiled_on_a_card_with_more_than_ten_minutes_to_do(changes, seconds, compiles, layer):
    run = a_run(**changes)
    loop.compile_if_worth_it(run, seconds)
    assert (run.compiles, is_compiled(layer), len(run.said)) == (compiles, compiles, compiles)
    assert all("--no-compile" in line and len(line) <= 110 for line in run.said)


@pytest.mark.parametrize("first", [True, False])
def test_a_resume_computes_as_its_run_began_however_much_is_left(first, layer):
    run = a_run()
    loop.compile_if_worth_it(run, 700.0 if first else 500.0)
    assert json.loads(Path("config.json").read_text())["facts"] == {"compiled": first}
    loop.compile_if_worth_it(run, 500.0 if first else 700.0)
    assert run.compiles is first and is_compiled(layer) is first


@pytest.mark.parametrize("typed", [True, False])
def test_what_was_typed_is_done(typed, layer):
    run = a_run(compile=typed)
    compiling.switch(typed)
    loop.compile_if_worth_it(run, 1e6)
    assert is_compiled(layer) is typed and not run.said


def test_only_an_unasked_compilation_falls_back():
    """A study may hold both kinds of runs in one process."""
    import torch._dynamo

    for falls_back in (True, False):
        compiling.switch(True, falls_back=falls_back)
        assert torch._dynamo.config.suppress_errors is falls_back
