"""Starts a script's processes the way torchrun does, a hundred times faster: forked off a server that has
already imported torch. Can kill a process, or close its terminal, at a named place, which a timer cannot hit.
"""

import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import pty
import select
import signal
import socket
import sys
import termios
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    *("run_preference", "gpt_scratch", "run_instruct", "run_lora", "run_pretrain_diversity", "run_mathqa"),
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "core",
        "eval",
        *SCRIPTS,
        "transformers.models.distilbert.modeling_distilbert",
        "torch.utils.tensorboard",
        "transformers.convert_slow_tokenizer",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "frozen",
    ]
)

PLACES = {  # where a kill or a signal can be made to strike: the function that is about to run
    "caching run_preference": ("lab.data.cache", "write_texts"),
    "caching gpt_scratch": ("lab.data.text", "write_tokens"),
    "caching run_instruct": ("lab.data.cache", "write_texts"),
    "caching run_lora": ("lab.data.cache", "write_texts"),
    "caching run_mathqa": ("lab.data.cache", "write_texts"),
    "caching run_pretrain_diversity": ("lab.data.text", "write_tokens"),
    "embedding": ("lab.measure.task2vec", "embed"),
    "encoding run_preference": ("lab.models.encoders:PairScorer", "encode"),
    "sampling gpt_scratch": ("lab.models.generate", "choose"),
    "sampling run_instruct": ("lab.models.generate", "choose"),
    "step": ("lab.train.optim", "optimizer_step"),
    "evaluation": ("lab.run.folder:Run", "poll"),
    "save": ("lab.run.checkpoints", "write_manifest"),
    "pruning": ("lab.run.checkpoints", "remove_checkpoint"),
    "worst case": ("lab.train.batches", "worst_case"),
    "measuring": ("lab.train.loss", "token_log_probs"),
    "sampling run_lora": ("lab.models.generate", "choose"),
    "answering run_mathqa": ("lab.measure.choices", "answer_figures"),
    "result": ("lab.run.folder:Run", "_write_result"),
}


def launch(
    script,
    *argv,
    size=1,
    kill=None,
    sent=None,
    closed=None,
    again=None,
    crash=None,
    timeout=300,
    env=None,
    nodes=1,
) -> list[int]:
    """Runs `script argv` on `size` ranks in the current folder; returns their exit codes (-9: killed).

    kill: (place, n-th call, rank or "all") dies by SIGKILL there, and the others are killed as torchrun
    would; ("time", seconds, rank or "all") dies whatever it is doing then. sent: (place, n-th call, signal):
    rank 0 sends it to all ranks there. closed: (place, n-th call, signals, seconds): the other end of the
    terminal of every rank is closed there (or "time", seconds), then come the signals, so many seconds later;
    `again`, (place, n-th call, signal) is sent by rank 0 to itself. nodes: as if the ranks were on so many
    boxes, each with its share of this machine's cores. Output of all ranks goes to out.txt.
    All tests share one token cache, but for those that strike while it is made: these have ./cache.
    report.png is drawn only with PICTURES in `env`.
    """
    places = [strike[0] for strike in (kill, sent, closed, again, crash) if strike]
    own = {"caching", "encoding"} & {*places} or Path("cache").exists()
    if own or "--freeze" in argv:  # vectors differ in their last digits by the number of ranks that made them
        env = {"TOKEN_CACHE": str(Path("cache").absolute())} | (env or {})
    env = {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]} | (env or {})
    port = free_port()
    terminals = [OpenTerminal() for _ in range(size)] if closed else [None] * size
    how = closed and closed[2:]
    ranks = [
        _context.Process(
            target=_rank,
            args=(script, argv, rank, size, port, kill, sent or closed, crash, os.getcwd(), env),
            kwargs={"terminal": closed and terminals[rank].name, "again": again, "nodes": nodes},
        )
        for rank in range(size)
    ]
    Path("out.txt").write_text("")
    for rank in ranks:
        rank.start()
    began = time.monotonic()
    while any(rank.is_alive() for rank in ranks):
        if any(
            rank.exitcode not in (None, 0, 2) for rank in ranks
        ):  # after a user error all leave on their own
            for rank in ranks:
                rank.kill()
        if kill and kill[0] == "time" and time.monotonic() - began > kill[1]:
            for rank in ranks if kill[2] == "all" else [ranks[kill[2]]]:
                rank.kill()
        if time.monotonic() - began > timeout:
            for rank in ranks:
                rank.kill()
            raise TimeoutError(
                f"{script} {argv} on {size} ranks: over {timeout} s\n{Path('out.txt').read_text()}"
            )
        if sent and Path("signal").exists():
            for rank in ranks if len(sent) == 3 else [ranks[sent[3]]]:
                os.kill(rank.pid, sent[2])
            Path("signal").rename("signalled")
        if closed:
            for terminal in terminals:
                terminal.read()
            if Path("signal").exists() or (closed[0] == "time" and time.monotonic() - began > closed[1]):
                Path("signal").touch()
                closed = None
                close(terminals, ranks, *how)
                Path("signal").rename("signalled")
        time.sleep(0.01)
    return [rank.exitcode for rank in ranks]


def typed(script, *argv) -> tuple[int, str, str]:
    """`script argv` as one process of its own: exit code, stdout, stderr."""
    env = {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]}
    argv = (script, argv, 0, 1, 0, None, None, None, os.getcwd(), env)
    process = _context.Process(target=_rank, args=argv, kwargs={"errors": "err.txt"})
    for name in ("out.txt", "err.txt"):
        Path(name).write_text("")
    process.start()
    process.join(300)
    return process.exitcode, Path("out.txt").read_text(), Path("err.txt").read_text()


def stopped(size, number) -> list[int]:
    """Exit codes after a stop signal: plain python dies of it, the ranks of a launch leave with 0."""
    return [-number] if size == 1 else [0] * size


def run(script, *argv, size=1, **options) -> dict:
    """launch, expected to succeed; returns result.json of the newest run below ./out."""
    codes = launch(script, "--out", "out", *argv, size=size, **options)
    assert codes == [0] * size, Path("out.txt").read_text()
    return result()


def result(out="out") -> dict:
    return json.loads((newest(out) / "result.json").read_text())


def newest(out="out") -> Path:
    return sorted(Path(out).glob("*/config.json"))[-1].parent


class OpenTerminal:
    """A pseudo-terminal; what is shown on it goes to out.txt until it is closed."""

    def __init__(self):
        self.other_end, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)

    def read(self):
        while self.other_end and select.select([self.other_end], [], [], 0)[0]:
            try:
                shown = os.read(self.other_end, 65536)
            except OSError:  # nobody has it open any more
                return
            with open("out.txt", "ab") as file:
                file.write(shown.replace(b"\r\n", b"\n"))

    def close(self):
        """As an SSH connection that breaks: the kernel hangs up, and SIGHUP goes to who leads the session."""
        self.read()
        os.close(self.other_end)
        os.close(self.slave)
        self.other_end = None


def close(terminals, ranks, signals=(), seconds=0.0):
    for terminal in terminals:
        terminal.close()
    for number in signals:
        time.sleep(seconds)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)


def take_terminal(name):
    """Makes it the streams and the controlling terminal of this process, which leads a session of its own."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    os.close(terminal)
    # Python's streams were made for something else: as at a start, a terminal's stdout is shown line by line
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)


def _rank(
    script,
    argv,
    rank,
    size,
    port,
    kill,
    sent,
    crash,
    folder,
    env,
    terminal=None,
    again=None,
    errors="out.txt",
    nodes=1,
):
    os.chdir(folder)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests run under nohup would pass on that it is ignored
    if terminal:
        take_terminal(terminal)
    else:
        for stream, name in ((1, "out.txt"), (2, errors)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    os.environ |= env
    if size > 1:
        local, node = size // nodes, rank // (size // nodes)
        names = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local}
        if nodes > 1:
            cores = sorted(os.sched_getaffinity(0))
            share = max(1, len(cores) // nodes)
            os.sched_setaffinity(0, (cores[node * share :] or cores)[:share])
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    sys.argv = [f"{script}.py", *map(str, argv)]
    import torch

    torch.set_num_threads(1)
    if "PICTURES" not in env:  # a third of a short run_preference, and nobody looks at them
        everywhere(setattr, importlib.import_module("lab.measure.preference"), "draw", _no_picture)
    if "DISKS_APART" in env:  # of a disk that the other boxes do not see
        importlib.import_module("lab.run.disks").SIGHT_SECONDS = 1
        os.makedirs(f"box {rank}")
        os.chdir(f"box {rank}")
    if "WRITE_APART" in env:  # checkpoints in a thread, as beside a card
        importlib.import_module("lab.run.checkpoints").apart = bool
    if kill and kill[0] != "time" and kill[2] in (rank, "all"):
        strike(script, kill[0], kill[1], lambda: os.kill(os.getpid(), signal.SIGKILL))
    if crash and crash[2] == rank:
        strike(script, *crash[:2], _crash)
    if sent and rank == 0 and sent[0] != "time":
        strike(script, sent[0], sent[1], _send_and_wait)
    if again and rank == 0:
        strike(script, *again[:2], lambda: os.kill(os.getpid(), again[2]))
    main(script)


def _no_picture(verdicts, names, title, path):
    Path(path).touch()


def _crash():
    raise RuntimeError("crashed by the test")


def _send_and_wait():
    Path("signal").touch()
    deadline = time.monotonic() + 30
    while not Path("signalled").exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def strike(script, place, nth, action):
    (path, name), calls = PLACES.get(place) or PLACES[f"{place} {script}"], []
    module, _, cls = path.partition(":")
    module = importlib.import_module(module)
    holder = getattr(module, cls) if cls else module
    original = getattr(holder, name)

    def struck(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            action()
        return original(*args, **kwargs)

    if cls:
        setattr(holder, name, struck)
    else:
        everywhere(setattr, module, name, struck)


def everywhere(setter, module, name, new):
    """Replaces module.name by `new` in every module of the project that has imported it by name, too.
    setter: setattr, or that of pytest's monkeypatch."""
    old, here = getattr(module, name), f"{PROJECT}{os.sep}"
    for other in list(sys.modules.values()):
        if (
            name in vars(other)
            and vars(other)[name] is old
            and (vars(other).get("__file__") or "").startswith(here)
        ):
            setter(other, name, new)


def main(script):
    """The last four lines of every script."""
    import core

    module = importlib.import_module(script)
    presets, smoke = (getattr(module, name, {}) for name in ("PRESETS", "SMOKE"))  # eval.py has none
    cfg = core.parse_config(module.Config, presets, smoke, module.__doc__)
    with core.distributed(cfg.backend) as world:
        module.main(cfg, world)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
