"""A terminal that closes (SSH lost, tmux killed) loses nothing: law 5, tried through real pseudo-terminals.

The kernel hangs up when the other end is closed: every write fails from then on, and SIGHUP comes, from the
shell once more, from a session's end with a SIGTERM.
"""

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from conftest import PROJECT
from laws.test_laws import AUTO, DIVERSE, MATHQA, SHORT, same_outcome, straight  # noqa: F401 (a fixture)
from ranks import launch, newest, result, run

from core import World
from lab.run import signals, stored

HUP, TERM, INT = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
HOW = {  # what comes beside the kernel's HUP, and how many seconds after it
    "once": ((), 0),
    "twice at once": ((HUP,), 0),
    "twice": ((HUP,), 2),
    "with TERM": ((TERM,), 0),
    "TERM first": ((TERM, HUP), 0),
}
slow = pytest.mark.slow


def first_heard(how) -> signal.Signals:
    """What result.json gives as the reason: the kernel's HUP, or a TERM sent at the same moment."""
    word, signal_name = result()["why"].split(": ")
    assert word == "Stop" and signal_name in ("SIGHUP", "SIGTERM")[: 1 + (TERM in HOW[how][0])]
    return signal.Signals[signal_name]


@pytest.mark.parametrize(
    ("script", "place", "nth", "how", "size"),
    [
        ("run_preference", "step", 13, "once", 1),
        pytest.param("run_lora", "save", 3, "with TERM", 1, marks=slow),
        pytest.param("run_instruct", "evaluation", 5, "twice at once", 1, marks=slow),
        pytest.param("gpt_scratch", "sampling", 12, "twice at once", 1, marks=slow),
        pytest.param("run_mathqa", "answering", 1, "once", 1, marks=slow),
        pytest.param("run_pretrain_diversity", "step", 7, "twice", 1, marks=slow),
        pytest.param("run_lora", "step", 9, "twice at once", 2, marks=slow),
        pytest.param("run_preference", "worst case", 1, "once", 1, marks=slow),
        pytest.param("gpt_scratch", "result", 1, "with TERM", 2, marks=slow),
        pytest.param("run_instruct", "sampling", 3, "with TERM", 2, marks=slow),
        pytest.param("run_preference", "evaluation", 4, "TERM first", 1, marks=slow),
    ],
)
def test_a_closed_terminal_saves_and_the_same_command_goes_on(script, place, nth, how, size, straight):
    codes = launch(script, "--out", "out", *SHORT[script], *AUTO, size=size, closed=(place, nth, *HOW[how]))
    log = (newest() / "log.txt").read_text()
    assert "Traceback" not in Path("out.txt").read_text() + log
    if place == "result":  # the work is done: only the last file is to be written
        assert result()["status"] == "finished"
    else:
        assert result()["status"] == "stopped"
        assert f"stopped  Stop: {first_heard(how).name}; " in log and log.endswith("next: the same command\n")
    if place == "step":
        assert result()["checkpoint"] == f"step_{nth:08d}"
    if place != "result" or size == 1:  # behind its last line rank 1 may die of the HUP
        assert codes == ranks.stopped(size, HUP if place == "result" else first_heard(how))
    same_outcome(run(script, *SHORT[script], *AUTO, size=size), straight(script, size)[0])
    assert len(list(Path("out").iterdir())) == 1


@slow
@pytest.mark.parametrize(
    ("script", "how", "size"),
    [
        ("gpt_scratch", "twice at once", 1),
        ("run_preference", "once", 1),
        ("run_lora", "with TERM", 2),
        ("run_pretrain_diversity", "TERM first", 1),
    ],
)
def test_a_terminal_closed_while_a_run_caches_damages_nothing(script, how, size, straight):
    codes = launch(script, "--out", "out", *SHORT[script], size=size, closed=("caching", 1, *HOW[how]))
    assert result()["status"] == "stopped"
    assert codes == ranks.stopped(size, first_heard(how)), Path("out.txt").read_text()
    log = (newest() / "log.txt").read_text()  # nothing to resume: no resume is named
    assert log.endswith("there is no checkpoint\nnext: the same command\n")
    same_outcome(run(script, *SHORT[script], *AUTO, size=size), straight(script, size)[0])


@pytest.mark.parametrize(
    ("place", "again"),
    [(("step", 7), ("result", 1, HUP)), pytest.param(("step", 7), ("save", 2, HUP), marks=slow)],
)
def test_a_second_hangup_amid_the_last_writes_loses_nothing(place, again, straight):
    script = "run_preference"
    codes = launch(script, "--out", "out", *SHORT[script], closed=(*place, (), 0), again=again)
    assert codes == [-HUP] and result()["status"] == "stopped"
    stamp, log = newest().name[:15], (newest() / "log.txt").read_text()
    assert log.endswith(f"next: the same command with --resume_timestamp {stamp}\n")
    same_outcome(run(script, *SHORT[script], "--resume_timestamp", stamp), straight(script, 1)[0])


@pytest.mark.parametrize(
    ("first", "second", "seconds", "torchrun", "forces"),
    [
        (HUP, HUP, 0, False, False),  # kernel and shell
        (HUP, HUP, 9, False, False),
        (TERM, HUP, 9, False, False),
        (HUP, TERM, 0.1, False, False),  # a session that ends
        (HUP, TERM, 9, False, True),  # kill
        (HUP, TERM, 9, True, False),  # torchrun's, after its own second HUP
        (TERM, TERM, 0.1, True, False),  # the session's and torchrun's
        (TERM, TERM, 9, True, True),
        (TERM, TERM, 0.1, False, True),
        (INT, INT, 0.1, False, True),  # Ctrl-C, Ctrl-C
        (INT, TERM, 9, False, True),
        (HUP, INT, 9, True, True),
    ],
)
def test_which_second_signal_is_somebody_who_will_not_wait(first, second, seconds, torchrun, forces):
    names = signal.Signals(first).name, signal.Signals(second).name
    assert signals.forces_exit(names[0], 0.0, names[1], seconds, World(size=1 + torchrun)) is forces


# next: names only what is accepted

STAMP = " with --resume_timestamp"
FIRST = f"{MATHQA[MATHQA.index('--pretrain') + 1]},max_steps=6,batch=6,sample_tokens=0"
ROWS = [*MATHQA[:1], *MATHQA[5:9], "--plain_blocks", 3]
NEXT = [
    ("gpt_scratch", [*SHORT["gpt_scratch"], "--mode", "find_lr", "--find_steps", 9], ""),
    *((script, SHORT[script], STAMP) for script in ranks.SCRIPTS[::3]),
]


@pytest.mark.parametrize(
    ("script", "flags", "flag"), [NEXT[0], *(pytest.param(*case, marks=slow) for case in NEXT[1:])]
)
def test_what_next_says_is_accepted_when_typed(script, flags, flag):
    codes = launch(script, "--out", "out", *flags, closed=("step", 4, (HUP,), 0))
    assert codes == [-HUP] and result()["status"] == "stopped"
    (said,) = re.findall("next: the same command(.*)\n", (newest() / "log.txt").read_text())
    assert said.startswith(flag) and bool(said) == bool(flag)
    assert run(script, *flags, *said.replace(" with", "").split())["status"] == "finished"


@slow
def test_next_is_accepted_where_the_base_was_the_newest():
    """A resume keeps the base that its run began with, though the command still says newest."""
    run("gpt_scratch", *SHORT["gpt_scratch"], "--block_size", 64, "--tokenizer", "bpe:300", "--max_steps", 2)
    flags = [*ROWS, "--mode", "train", "--init_from", "newest", "--batch", 10, "--max_steps", 6]
    assert launch("run_mathqa", "--out", "out", *flags, closed=("step", 4, (HUP,), 0)) == [-HUP]
    (said,) = re.findall("next: the same command with(.*)\n", (newest() / "log.txt").read_text())
    assert run("run_mathqa", *flags, *said.split())["status"] == "finished"


STUDY = ["--mode", "study", "--batch", 10, "--max_steps", 6, "--seeds", 1, "--diversity_batches", 0]


@slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("run_pretrain_diversity", [*DIVERSE[:1], *DIVERSE[3:], *STUDY]),
        ("run_mathqa", [*ROWS, "--pretrain", FIRST, "--mode", "both", "--batch", 10, "--max_steps", 6]),
    ],
)
def test_a_terminal_closed_in_a_study_ends_the_whole_program(script, flags):
    assert launch(script, "--out", "out", *flags, closed=("step", 8, (HUP,), 0)) == [-HUP]
    statuses = [stored.status_of(path.parent) for path in Path("out").glob("*/config.json")]
    assert statuses.count("stopped") == 1 and set(statuses) <= {"finished", "stopped"}
    assert launch(script, "--out", "out", *flags) == [0], Path("out.txt").read_text()
    statuses = {stored.status_of(path.parent) for path in Path("out").glob("*/config.json")}
    assert statuses == {"finished"}


# as it is typed: bash in a terminal, torchrun, pipes


class Shell:
    """An interactive bash that leads the session of a pseudo-terminal."""

    def __init__(self):
        self.pid, self.end = pty.fork()
        if not self.pid:
            signal.signal(HUP, signal.SIG_DFL)  # nohup's deafness would be inherited
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self.shown = ""

    def type(self, line):
        os.write(self.end, f"{line}\n".encode())

    def wait(self, text, seconds=300):
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.end], [], [], 0.2)[0]:
                self.shown += os.read(self.end, 65536).decode(errors="replace")

    def close(self):
        os.close(self.end)
        os.waitpid(self.pid, 0)


def typed(script, *argv, torchrun=False):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if torchrun else []
    return shlex.join([sys.executable, *launcher, str(PROJECT / f"{script}.py"), *map(str, argv)])


def wait_for_result(seconds=300):
    deadline = time.monotonic() + seconds
    while not list(Path("out").glob("*/result.json")):
        assert time.monotonic() < deadline, (newest() / "log.txt").read_text()
        time.sleep(0.05)


LONG = {  # so long that what is typed comes in time
    "gpt_scratch": [*SHORT["gpt_scratch"], "--max_steps", 300, "--eval_every", 150, "--save_every", 75],
    "run_preference": [*SHORT["run_preference"], "--epochs", 20, "--eval_every", 100, "--save_every", 100],
}


@slow
def test_ctrl_c_ends_a_loop_of_the_shell_and_a_closed_terminal_saves():
    flags = ["--out", "out", *LONG["gpt_scratch"]]
    shell = Shell()
    shell.type(f"for s in 0 1 2; do {typed('gpt_scratch', *flags, '--seed')} $s; done")
    shell.wait("step   8/")
    os.write(shell.end, b"\x03")
    shell.wait("next: the same command with --resume_timestamp")
    shell.type("echo 'the 'loop ended with $?.")  # not as the terminal shows what is typed
    shell.wait("the loop ended with 130.")
    assert len(list(Path("out").iterdir())) == 1 and result()["why"] == "Stop: SIGINT"
    shell.shown = ""
    shell.type(f"{typed('gpt_scratch', *flags, '--seed', 0, *AUTO)} && echo and on")
    shell.wait("step 100/")
    shell.close()  # the kernel's HUP to bash, and bash's to its job
    wait_for_result()
    assert result()["status"] == "stopped" and result()["why"] == "Stop: SIGHUP"


@slow
@pytest.mark.parametrize(("script", "again"), [("gpt_scratch", 2)])
def test_a_closed_terminal_under_torchrun(script, again, straight):
    """torchrun hands one HUP on, makes a TERM of a second: the kernel's, the shell's and `again`'s."""
    shell = Shell()
    shell.type(typed(script, "--out", "out", *LONG[script], torchrun=True))
    shell.wait("step   8/" if script == "gpt_scratch" else "step  12/")
    torchrun = int(subprocess.check_output(["pgrep", "-P", str(shell.pid)], text=True))
    shell.close()
    if again is not None:
        time.sleep(again)
        try:
            os.kill(torchrun, HUP)
        except ProcessLookupError:
            assert again
    wait_for_result()
    assert result()["status"] == "stopped"
    assert result()["why"] in ["Stop: SIGHUP", "Stop: SIGTERM"]
    want = straight(script, 2, LONG[script])[0]
    same_outcome(run(script, *LONG[script], *AUTO, size=2), want)


SPEAKS = """
import logging, os, subprocess, sys, time, warnings
logging.basicConfig()
early = sys.stderr
import core
from lab.data import tokenizers
from lab.run import terminal
from lab.train import processes
from tqdm import tqdm
terminal.outlive_terminal()

def texts():
    os.write({told}, b"ready")
    os.read(0, 1)  # until nobody reads stdout and stderr any more
    yield from ["a few words", "and some more"] * 5000

tokenizers.trained_bpe(texts(), 300)
for _ in range(3):
    print("words " * 2000)
    print("words", file=sys.stderr, flush=True)
    terminal.write_in_handler("words")
    logging.warning("words")
    warnings.warn("words")
    tqdm.write("words")
    for _ in tqdm(range(3), mininterval=0):
        pass
    with processes.progress(3, "words") as bar:
        bar.update()
    sys.stdout.writelines(["words", "words"])
    if sys.argv[1] != "disk":  # a full disk may have room again: those who go past Terminal do fail
        subprocess.run(["echo", "words"], check=True)
        early.write("words")
open("lived", "w").close()
"""


@pytest.mark.parametrize("dead", ["terminal", *(pytest.param(kind, marks=slow) for kind in ("pipe", "disk"))])
def test_no_write_raises_where_nobody_reads(dead):
    """Nor does Python's last flush, which would say BrokenPipeError and make the exit code 120."""
    told, tells = os.pipe()
    reads, writes = pty.openpty() if dead == "terminal" else os.pipe()
    stream = os.open("/dev/full", os.O_WRONLY) if dead == "disk" else writes
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAKS.format(told=tells), dead],
        **{"stdin": subprocess.PIPE, "stdout": stream, "stderr": stream, "pass_fds": [tells]},
    )
    assert os.read(told, 5) == b"ready"
    os.close(writes)
    os.close(reads)
    process.communicate(b"x", timeout=120)
    assert process.returncode == 0 and Path("lived").exists()


@slow
@pytest.mark.parametrize("where", ["> /dev/full 2>&1", "2>&1 | head -1", "<&- >&- 2>&-"])
def test_a_run_ends_well_though_its_output_has_no_place(where):
    flags = ["--out", "out", *SHORT["run_preference"]]
    command = f"set -o pipefail; {typed('run_preference', *flags)} {where}"
    done = subprocess.run(["bash", "-c", command], timeout=240, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    log = (newest() / "log.txt").read_text()
    assert result()["status"] == "finished" and log.endswith(f"next: python eval.py --run {newest()}\n")


CLOSED = """
import copy, sys
from lab.run import terminal

terminal.outlive_terminal()
first = open("first", "w")
print("words", flush=True)
terminal.write_in_handler("words")
again = copy.copy(sys.stdout)
sys.stdout.stream.close()
print("words")
first.close()
open("lived", "w").write(str(again.is_dead))
"""


def test_streams_that_were_closed_are_no_file_that_is_opened_later():
    """A shell's >&- leaves the number free: a checkpoint opened next would get what is said."""
    command = f"{shlex.join([sys.executable, '-c', CLOSED])} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], timeout=120).returncode == 0
    assert Path("first").read_text() == "" and Path("lived").read_text() == "False"


INTERRUPTED = """
import io, os, signal, sys, core
from lab.run import signals, terminal

terminal.outlive_terminal()
with core.listening(core.World(size=2)) as poll:  # which cannot leave on its own
    os.kill(os.getpid(), signal.SIGINT)

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):  # a second Ctrl-C strikes amid a write of Python's buffered stream
            os.kill(os.getpid(), signal.SIGINT)
            return len(data)

    sys.stdout = terminal.Terminal(io.TextIOWrapper(io.BufferedWriter(Raw()), write_through=True))
    signals.under_torchrun = lambda world: False
    print("words" * 10_000, flush=True)
open("lived", "w").close()
"""


def test_a_second_ctrl_c_amid_a_write_ends_the_process():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], timeout=120, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not Path("lived").exists(), done.stderr
