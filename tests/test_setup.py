"""setup.sh on a machine whose GPU torch cannot use, and where there is nothing to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

SETUP = ["bash", str(PROJECT / "setup.sh")]
SHOWS = 'case "$*" in -L) echo "GPU 0: A40";; *driver*) echo 550.54;; *) echo "| CUDA Version: 12.4 |";; esac'


def program(path, code):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


@pytest.fixture
def box(tmp_path):
    """box(GPU or none): a machine whose venv has the torch that this test runs on, which sees no GPU."""

    def environment(gpu):
        program(tmp_path / "bin" / "nvidia-smi", SHOWS if gpu else "exit 9")
        program(tmp_path / "venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
        program(tmp_path / "venv" / "bin" / "pip", f'echo "$@" >>"{tmp_path}/asked"')
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return os.environ | {"PATH": path, "VENV": str(tmp_path / "venv")}

    return environment


def setup(env, *command):
    return subprocess.run([*SETUP, *command], env=env, capture_output=True, text=True)


def test_a_gpu_that_torch_cannot_use_stops_and_names_driver_and_wheel(box):
    done = setup(box(gpu=True), "echo", "trained")
    assert done.returncode == 1 and "trained" not in done.stdout
    assert "driver 550.54 supports CUDA 12.4" in done.stderr and "whl/cu124" in done.stderr


def test_nothing_to_do_asks_nobody_and_keeps_the_exit_code(box, tmp_path):
    env = box(gpu=False)
    assert setup(env).returncode == 0 and Path("asked").exists()  # what is installed is looked at once
    Path("asked").unlink()
    done = setup(env, "bash", "-c", 'echo "$VIRTUAL_ENV"; exit 7')
    assert done.returncode == 7 and done.stdout.strip() == str(tmp_path / "venv")
    assert not Path("asked").exists()
