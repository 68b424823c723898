"""Hides accelerators from the tests and from every process they start: those are about numbers on a CPU, and
about several processes where there may be one card. Tests marked `gpu` show them to processes of their own.
"""

import glob
import json
import os
import subprocess
import sys

HIDE = {
    "CUDA_VISIBLE_DEVICES": "",  # NVIDIA: an empty list
    "HIP_VISIBLE_DEVICES": "-1",  # AMD: its runtime takes an empty list for none given
    "ONEAPI_DEVICE_SELECTOR": "opencl:cpu",  # Intel: torch.xpu looks at the GPUs among these
}
NODES = [
    *("/dev/nvidia*", "/dev/dxg", "/dev/nvmap", "/dev/kfd", "/dev/dri/renderD*")
]  # of drivers, Windows' too
ASK = """
import json, torch
kind = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
old = kind == "cuda" and torch.cuda.get_device_capability() < (8, 0)  # bf16 is emulated there
card = {"kind": kind, "count": getattr(torch, kind).device_count() if kind else 0}
print(json.dumps(card | {"half": "fp16" if old else "bf16"} if kind else None))
"""
# What hide() has found, for the workers of pytest-xdist, too. To try the gpu tests, let a CPU stand in:
# CARDS_OF_THE_TESTS='{"kind": "cpu", "count": 1, "half": "bf16", "before": {}}'
FOUND = "CARDS_OF_THE_TESTS"


def hide():
    """Looks for a card, once and before anything has started it, then hides all from here on."""
    if FOUND not in os.environ:
        before = {name: os.environ[name] for name in HIDE if name in os.environ}
        card = (
            _ask_torch() if any(map(glob.glob, NODES)) else None
        )  # without a driver torch is not even imported
        os.environ[FOUND] = json.dumps(card and card | {"before": before})
    os.environ |= HIDE


def _ask_torch() -> dict | None:
    """In a process of its own: this one shall not have seen the card."""
    try:
        done = subprocess.run([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True, timeout=120)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def found() -> dict | None:
    """kind (cuda or xpu), count, half (the dtype it is fast in), before (what the user had set)."""
    return json.loads(os.environ[FOUND])


def environment() -> dict[str, str]:
    """For a process that may use the cards which the user had shown to pytest."""
    return {name: value for name, value in os.environ.items() if name not in HIDE} | found()["before"]
