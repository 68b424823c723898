"""How the processes of a launch meet: what torchrun says in the environment, and the store they meet in."""

import ctypes
import datetime
import glob
import os
import re
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from lab.errors import LostRanks, UserError
from lab.train.heartbeat import JOIN_SECONDS, Heartbeat, wait_for_all

_UNSET = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # without torchrun
_NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # torch's own: each torchrun reads it
_PR_SET_PDEATHSIG = 1  # of Linux' prctl

_DRIVERS = {  # what a GPU's driver puts there: whose, and the variable by which a user may hide it
    "/dev/nvidia[0-9]*": ("NVIDIA", "CUDA_VISIBLE_DEVICES"),
    "/dev/dxg": ("Windows", "CUDA_VISIBLE_DEVICES"),
    "/dev/nvmap": ("NVIDIA", "CUDA_VISIBLE_DEVICES"),
    "/dev/kfd": ("AMD", "HIP_VISIBLE_DEVICES"),
    "/sys/class/drm/renderD*/device/vendor": ("Intel", "ONEAPI_DEVICE_SELECTOR"),
}
_INTEL = "0x8086"  # a maker
_BESIDE_THE_CPU = "0000:00:02.0"  # its integrated graphics' place


def number(name) -> int:
    """A number that torchrun has put into the environment: RANK, WORLD_SIZE ..."""
    value = os.environ.get(name, _UNSET.get(name, 0))
    try:
        return int(value)
    except ValueError:
        raise UserError(f"the environment says {name}={value}, no number: use torchrun") from None


def launcher() -> str | None:
    """Identifies the torchrun that started this process: host, process, and on Linux when it began, since
    numbers of processes come again. It stays the same when torchrun restarts its workers."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent, began = os.getppid(), ""
    with suppress(OSError):
        stat = Path(f"/proc/{parent}/stat").read_text()
        began = "/" + stat.rpartition(")")[2].split()[19]  # in ticks since the machine's start
    return f"{socket.gethostname()}/{parent}{began}"


def unused_gpu() -> str | None:
    """One line on a GPU that this process computes without: its driver is there, torch does not find it."""
    if sys.platform == "darwin":
        there = torch.backends.mps.is_available()
        return "NOTE Apple's GPU is not used, it has no fp64: this is the CPU" if there else None
    for pattern, (whose, variable) in _DRIVERS.items():
        found = [path for path in sorted(glob.glob(pattern)) if whose != "Intel" or _is_card(Path(path))]
        asked = os.environ.get(variable, "0")  # a scheduler may have set it, too
        if found and asked not in ("", "-1") and "cpu" not in asked:
            can = f"{found[0]}: {whose}'s GPU driver is here, but torch {torch.__version__} finds no GPU"
            return f"NOTE {can}, so this is the CPU: `bash setup.sh` says what to install"
    return None


def _is_card(vendor) -> bool:
    """Whether this is Intel's and no integrated graphics, which most laptops and many servers have."""
    return vendor.read_text().strip() == _INTEL and vendor.parent.resolve().name != _BESIDE_THE_CPU


launchers = []  # of all boxes, once their ranks have met


def end_with_torchrun():
    """Has the kernel send SIGTERM once torchrun is gone (kill -9): its workers lead sessions of their own and
    would train on, or wait for its store. Linux only."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def heard_at_once(sent):
    """Meanwhile Ctrl-C ends the process by itself: Python's handler would wait until torch's C++ returns."""
    if signal.getsignal(sent) is not signal.default_int_handler:  # ignored under nohup: so it stays
        yield
        return
    signal.signal(sent, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(sent, signal.default_int_handler)


def join(rank, size, several_boxes):
    """Meets the other ranks in torchrun's store, or in rank 0's. Returns (store, this rank's Heartbeat)."""
    if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {size}, but {' and '.join(absent)} not set: start with torchrun")
    if several_boxes and number("TORCHELASTIC_MAX_RESTARTS") and os.environ.get(_NEW_STORE) != "1":
        raise UserError(f"--max-restarts on several boxes: type {_NEW_STORE}=1 in front of each torchrun")
    without_traces()
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connect(rank == 0 and not agents, several_boxes)
    store.set(f"launcher/{rank}", f"{launcher()} {number('TORCHELASTIC_RESTART_COUNT')}")
    parents = agents and number("GROUP_RANK") == 0
    pulse = Heartbeat(_connect(False, several_boxes), rank, size, parents)
    pulse.start()
    wait_for_all(store, size)
    told = [store.get(f"launcher/{other}").decode().split() for other in range(size)]
    launchers[:] = sorted({name for name, _ in told})
    if launcher():  # which torchrun lost a rank need not be rank 0's: all go on from the highest count
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(max(int(count) for _, count in told))
    return store, pulse


def _connect(holds, several_boxes):
    """A connection to the store. holds: this process holds it.

    torchrun keeps its store when it restarts workers; a prefix hides the keys of the dead from them. Several
    torchruns count their restarts apart and would disagree on it: they make a new store instead.
    """
    address, port = os.environ["MASTER_ADDR"], number("MASTER_PORT")
    limit = datetime.timedelta(seconds=JOIN_SECONDS)
    try:
        store = dist.TCPStore(address, port, None, holds, limit, wait_for_workers=False, multi_tenant=holds)
    except RuntimeError as error:
        raise LostRanks(f"no store at {address}:{port} ({first_sentence(error)})") from error
    attempt = 0 if several_boxes else number("TORCHELASTIC_RESTART_COUNT")
    return dist.PrefixStore(f"attempt {attempt}", store)


def first_sentence(error) -> str:
    """What torch says of an error, without source file, advice and C++ stack."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". ")[0]


def without_traces():
    """Keeps torch's C++ from writing a stack at each call to a store that is gone. It has read the variable
    when it was loaded, so it is asked to read it again."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if library.exists() and hasattr(c10 := ctypes.CDLL(library), "_ZN3c1011initLoggingEv"):
        c10._ZN3c1011initLoggingEv()
