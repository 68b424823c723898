"""What torchrun says is read or refused by name; its workers do not outlive it; Ctrl-C is heard meanwhile."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import free_port

import core
from core import UserError
from lab.train import launch


def test_a_number_of_the_environment_is_one_or_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch.number("WORLD_SIZE") == 1
    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(UserError, match="RANK=abc, no number"):
        launch.number("RANK")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({}, "WORLD_SIZE is 2, but MASTER_PORT not set"),
        (
            {"MASTER_PORT": "1", "TORCHELASTIC_MAX_RESTARTS": "2"},
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front",
        ),
    ],
)
def test_what_a_launch_lacks_is_named(named, said, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        launch.join(0, 2, several_boxes=True)


def test_torchs_errors_are_said_without_source_advice_and_stack():
    error = "[/a/gloo/pair.cc:553] Connection closed by peer [::1]:80. This is typically ...\nframe #0: c10"
    assert launch.first_sentence(RuntimeError(error)) == "Connection closed by peer [::1]:80"


def a_vendor(path, maker):
    """Intel's files below /sys: a card on the PCI bus, by the name of its place there."""
    path.mkdir(parents=True)
    (path / "vendor").write_text(f"{maker}\n")
    return str(path / "vendor")


CARD, SCREEN, OTHER = (("0000:03:00.0", "0x8086"), ("0000:00:02.0", "0x8086"), ("0000:04:00.0", "0x1002"))


@pytest.mark.parametrize(
    ("pattern", "files", "asked", "said"),
    [
        ("/dev/nvidia[0-9]*", ["/dev/nvidia0"], {"CUDA_VISIBLE_DEVICES": "0,1"}, "/dev/nvidia0: NVIDIA's"),
        ("/dev/nvidia[0-9]*", ["/dev/nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, None),
        ("/dev/kfd", ["/dev/kfd"], {}, "/dev/kfd: AMD's"),
        ("/dev/kfd", ["/dev/kfd"], {"HIP_VISIBLE_DEVICES": "-1"}, None),
        ("/sys/class/drm", [SCREEN, CARD], {}, "0000:03:00.0/vendor: Intel's"),
        ("/sys/class/drm", [SCREEN, OTHER], {}, None),
        ("/sys/class/drm", [CARD], {"ONEAPI_DEVICE_SELECTOR": "opencl:cpu"}, None),
        ("none", [], {}, None),
    ],
)
def test_a_gpu_that_torch_does_not_find_is_said_once_unless_the_user_hid_it(
    pattern, files, asked, said, monkeypatch, tmp_path, capsys
):
    there = [a_vendor(tmp_path / file[0], file[1]) if isinstance(file, tuple) else file for file in files]
    monkeypatch.setattr(launch.glob, "glob", lambda path: there if path.startswith(pattern) else [])
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with core.distributed():
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(said in line and "this is the CPU" in line for line in lines)


def test_apples_gpu_is_not_passed_over_in_silence(monkeypatch):
    monkeypatch.setattr(launch.sys, "platform", "darwin")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert launch.unused_gpu() == "NOTE Apple's GPU is not used, it has no fp64: this is the CPU"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert launch.unused_gpu() is None


ALONE = """
import os, sys
os.environ |= dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
import core
from lab.train import launch
here = launch.wait_for_all
launch.wait_for_all = lambda *args: (print("waits", flush=True), here(*args))
with core.distributed():
    pass
"""


def test_ctrl_c_is_heard_while_ranks_join():
    alone = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(free_port())], stdout=subprocess.PIPE, text=True
    )
    assert alone.stdout.readline() == "waits\n"
    alone.send_signal(signal.SIGINT)
    assert alone.wait(60) == -signal.SIGINT


PARENT = """
import os, subprocess, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "1"
code = "import time; from lab.train import launch; launch.end_with_torchrun(); "
code += "print('ready', flush=True); time.sleep(600)"
command = [sys.executable, "-c", code]
worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
print(worker.stdout.readline().strip(), worker.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_worker_does_not_outlive_a_killed_torchrun():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    word, worker = parent.stdout.readline().split()
    assert word == "ready"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _lives(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] != "Z"  # a dead one whose new parent has not looked yet
    except FileNotFoundError:
        return False
