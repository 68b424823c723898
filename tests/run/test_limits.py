"""What a number may be stands in its type: every number of every script has its limits, and they hold."""

import dataclasses
import importlib
import math
import typing
from dataclasses import dataclass

import pytest
from ranks import SCRIPTS

import core
from lab.run.limits import Limits, limits_of


@dataclass(frozen=True)
class Config(core.Constants):
    batch: core.Count = 4
    steps: core.Whole | None = None
    warmup: core.Share = 0.1
    keep: core.within(int, 2) = 2
    name: str = "a"


def parsed(*argv) -> Config:
    return core.parsed_config(Config, {}, {"warmup": 0.5}, "", list(argv))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch", "0"], "--batch 0 is out of range: use 1 or more"),
        (["--steps", "-1"], "--steps -1 is out of range: use 0 or more"),
        (["--warmup", "1.5"], "--warmup 1.5 is out of range: use 0 to 1"),
        (["--keep", "1"], "--keep 1 is out of range: use 2 or more"),
    ],
)
def test_a_value_out_of_range_is_one_line_that_says_what_is_legal(argv, said):
    with pytest.raises(core.UserError) as error:
        parsed(*argv)
    assert str(error.value) == said


def test_limits_themselves_none_and_what_has_no_limits_are_legal():
    cfg = parsed("--batch", "1", "--steps", "0", "--warmup", "1", "--keep", "2", "--name", "")
    assert [*core.constants_of(cfg).values()] == [1, 0, 1.0, 2, ""]
    assert parsed("--steps", "none").steps is None


def test_limits_are_found_in_unions_and_nowhere_else():
    hints = typing.get_type_hints(Config, include_extras=True)
    assert limits_of(hints["steps"]) == Limits(0, math.inf) and limits_of(hints["keep"]) == Limits(2)
    assert limits_of(hints["name"]) is None and limits_of(int | None) is None
    assert limits_of(typing.Annotated[int, "a remark"]) is None


@pytest.mark.parametrize("script", [*SCRIPTS, "eval"])
def test_every_number_of_a_script_states_its_limits_and_its_default_keeps_them(script):
    config = importlib.import_module(script).Config
    hints, bare = typing.get_type_hints(config, include_extras=True), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds = typing.get_args(bare[field.name]) or (bare[field.name],)
        if not {int, float} & set(kinds):
            continue
        limits = limits_of(hints[field.name])
        assert limits, f"{script}.{field.name}"
        assert field.default is None or limits.low <= field.default <= limits.high, field.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_training_script_inherits_its_bookkeeping_and_shows_it_last(script):
    config = importlib.import_module(script).Config
    assert issubclass(config, core.Bookkeeping)
    inherited = {*core.names_of(core.Bookkeeping)}
    assert not (inherited & set(vars(config)["__annotations__"])) - {"log_every"}  # journals log every 25
    from lab.run.flags import _own_first

    shown = [field.name for field in _own_first(config)]
    own = [name for name in shown if name in vars(config)["__annotations__"]]
    assert shown[: len(own)] == own == list(vars(config)["__annotations__"])
