"""What ends a run on purpose: how it looks, with which exit code, and that nobody swallows it."""

import subprocess
import sys

import pytest

from lab.errors import LostRanks, Stop, UserError

CODE = """
import core
with core.distributed() as world:
    raise core.{error}("batch 2 is smaller than 4 ranks: use --batch 4")
"""


def test_a_stop_is_not_caught_by_who_catches_every_error():
    with pytest.raises(Stop):
        try:
            raise Stop("SIGTERM")
        except Exception:
            pytest.fail("a library would have gone on")
    assert issubclass(UserError, Exception) and issubclass(LostRanks, RuntimeError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [("UserError", 2, "-c: error: batch 2 is smaller than 4 ranks: use --batch 4\n"),
     ("Stop", 0, "stopped  batch 2 is smaller than 4 ranks: use --batch 4\n")],
)  # fmt: skip
def test_both_are_one_line_without_a_traceback(error, code, shown):
    command = [sys.executable, "-O", "-c", CODE.format(error=error)]  # asserts are off under -O
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", shown)


def test_any_other_fault_keeps_its_traceback_and_is_1():
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(error="LostRanks")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "LostRanks" in done.stderr


def test_an_error_is_one_line_whatever_the_names_in_it_hold():
    error = UserError("a\nb\x1b[31m\ud800 ü.csv is no table")
    assert str(error) == r"a\nb\x1b[31m\ud800 ü.csv is no table" == str(UserError(str(error)))
