"""setup.sh on a machine whose GPU torch cannot use, and where there is nothing to do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT

SETUP = ["bash", str(PROJECT / "setup.sh")]
VENV = Path(sys.prefix)


@pytest.fixture
def gpu_box(tmp_path):
    """A PATH on which nvidia-smi shows a GPU, and a venv whose torch is the CPU build this test runs on."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch can use the GPU")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        '#!/bin/sh\ncase "$*" in -L) echo "GPU 0: A40";; *driver_version*) echo 550.54;;'
        ' *) echo "| CUDA Version: 12.4 |";; esac\n'
    )
    smi.chmod(0o755)
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "bin" / "pip").write_text("#!/bin/sh\nexit 0\n")
    (venv / "bin" / "pip").chmod(0o755)
    (venv / "pyvenv.cfg").write_text((VENV / "pyvenv.cfg").read_text())
    site = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    (venv / "lib").mkdir()
    (venv / site).symlink_to(VENV / site)
    return os.environ | {"PATH": f"{smi.parent}:{os.environ['PATH']}", "VENV": str(venv)}


def test_a_gpu_that_torch_cannot_use_stops_and_names_driver_and_wheel(gpu_box):
    done = subprocess.run([*SETUP, "echo", "trained"], env=gpu_box, capture_output=True, text=True)
    assert done.returncode == 1 and "trained" not in done.stdout
    assert "driver 550.54 supports CUDA 12.4" in done.stderr and "whl/cu124" in done.stderr


def test_nothing_to_do_takes_under_a_second_and_keeps_the_exit_code(tmp_path):
    env = os.environ | {"VENV": str(tmp_path / "venv")}
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    stamp = subprocess.run(
        ["bash", "-c", f'echo "cpu 2.13.0 $(cksum <{PROJECT}/requirements.txt)"'],
        capture_output=True,
        text=True,
    )
    (tmp_path / "venv" / ".installed").write_text(stamp.stdout)
    began = time.monotonic()
    done = subprocess.run(
        [*SETUP, "bash", "-c", 'echo "$VIRTUAL_ENV"; exit 7'], env=env, capture_output=True, text=True
    )
    assert done.returncode == 7 and done.stdout.strip() == str(tmp_path / "venv")
    assert time.monotonic() - began < 1
