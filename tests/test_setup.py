"""setup.sh on a machine whose GPU torch cannot use, and where there is nothing to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

SETUP = ["bash", str(PROJECT / "setup.sh")]
SHOWS = 'case "$*" in -L) echo "GPU 0: A40";; *driver*) echo 550.54;; *) echo "| CUDA Version: 12.4 |";; esac'
TOOLS = {  # what drivers' own tools print where they find a card
    "nvidia-smi": SHOWS,
    "rocminfo": 'echo "  Name:                    gfx942"',
    "xpu-smi": 'echo "| 0 | Device Name: Intel(R) Data Center GPU Max 1100 |"',
}

TORCH = """
__version__ = "{}"
class cuda:
    is_available = staticmethod(bool)
xpu = cuda
"""


def program(path, code):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


@pytest.fixture
def box(tmp_path):
    """box(the tool that finds a card, or none, ...): a machine with a torch that sees no GPU.
    missing: pip does not know it, and cannot fetch it."""

    def environment(tool=None, missing=False, rocm="7.1.1-38", torch="2.13.0+cpu"):
        for name, code in TOOLS.items():
            program(tmp_path / "bin" / name, code if name == tool else "exit 9")
        (tmp_path / "rocm/.info").mkdir(parents=True)
        (tmp_path / "rocm/.info/version").write_text(rocm)
        program(tmp_path / "venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
        (tmp_path / "torch.py").write_text(TORCH.format(torch))
        fails = 'case "$*" in show*|*torch*) exit 1;; esac' if missing else ""
        program(tmp_path / "venv" / "bin" / "pip", f'echo "$@" >>"{tmp_path}/asked"\n{fails}')
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return os.environ | {
            "PATH": path,
            "PYTHONPATH": str(tmp_path),
            "VENV": str(tmp_path / "venv"),
            "ROCM_PATH": str(tmp_path / "rocm"),
        }

    return environment


def setup(env, *command):
    return subprocess.run([*SETUP, *command], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("tool", "said", "wheel"),
    [
        ("nvidia-smi", "driver 550.54 supports CUDA 12.4", "cu124"),
        ("rocminfo", "ROCm 7.1.1-38", "rocm7.1"),
        ("xpu-smi", "the GPU that xpu-smi shows", "xpu"),
    ],
)
def test_a_gpu_that_torch_cannot_use_stops_and_names_driver_and_wheel(tool, said, wheel, box):
    done = setup(box(tool), "echo", "trained")
    assert done.returncode == 1 and "trained" not in done.stdout
    assert said in done.stderr and f"whl/{wheel} " in done.stderr


@pytest.mark.parametrize(
    ("tool", "rocm", "wheel"),
    [
        ("xpu-smi", "", "xpu"),
        ("rocminfo", "6.10.0-1", "rocm6.4"),
        ("rocminfo", "6.2.4", "rocm6.2.4"),
        ("rocminfo", "6.2.2", "rocm6.1"),
        ("rocminfo", "", "none"),
    ],
)
def test_torch_is_asked_for_in_the_build_that_fits_the_driver(tool, rocm, wheel, box):
    done = setup(box(tool, missing=True, rocm=rocm), "echo", "trained")
    assert done.returncode == 1 and "trained" not in done.stdout and f"whl/{wheel} " in done.stderr
    asked = [line for line in Path("asked").read_text().splitlines() if line.startswith("install")]
    line = f"install -q torch>=2.6 --index-url https://download.pytorch.org/whl/{wheel}"
    assert asked == ([] if wheel == "none" else [line])


@pytest.mark.parametrize(("torch", "code"), [("2.11.0", 0), ("2.13.0+cpu", 0), ("2.5.1", 1)])
def test_a_launch_line_that_this_torchrun_refuses_is_said(torch, code, box):
    done = setup(box(torch=torch))
    assert done.returncode == code and ("no --shutdown-timeout" in done.stderr) == (torch == "2.11.0")
    assert ("older than 2.6" in done.stderr) == (code == 1)


def test_nothing_to_do_asks_nobody_and_keeps_the_exit_code(box, tmp_path):
    env = box()
    assert setup(env).returncode == 0 and Path("asked").exists()  # what is installed is looked at once
    Path("asked").unlink()
    done = setup(env, "bash", "-c", 'echo "$VIRTUAL_ENV"; exit 7')
    assert done.returncode == 7 and done.stdout.strip() == str(tmp_path / "venv")
    assert not Path("asked").exists()
