"""The head's Triton kernel, by Triton's interpreter on a CPU; on cards also tests/test_gpu.py. Skipped where
there is no Triton: torch for CPUs comes without."""

import json
import subprocess
import sys

import pytest

CASES = [  # rows, vocabulary, width of a row, with a bias; a block has 8,192 logits
    (3, 97, 128, False),
    (3, 128, 128, True),
    (2, 8192, 8192, False),
    (2, 8193, 8256, True),
    (2, 20_001, 20_032, False),
]
SCRIPT = """
import json, sys, torch
from lab.train.head_kernel import slope_in_place
from lab.train.loss import _eager_slope
found = []
for rows, V, width, has_bias in json.loads(sys.argv[1]):
    torch.manual_seed(V)
    labels = torch.tensor([V - 1, 0, 1])[:rows]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (4 * torch.randn(rows, width)).to(dtype)
        bias = torch.randn(V) if has_bias else None
        scale = 256.0 if dtype == torch.float16 else 1.0
        slope, loss = slope_in_place(given := logits.clone(), bias, labels, V, scale)
        wanted, wanted_loss = _eager_slope(logits.clone(), bias, labels, V, scale)
        found.append({
            "dtype": str(dtype),
            "same memory": slope is given,
            "slope": ((slope.double() - wanted.double()).norm() / wanted.double().norm()).item(),
            "padding": slope[:, V:].abs().sum().item(),
            "loss": abs(loss - wanted_loss).item() / abs(wanted_loss).item(),
        })
print(json.dumps(found))
"""


def test_by_the_interpreter_it_is_the_eager_form(monkeypatch):
    pytest.importorskip("triton", reason="torch for CPUs comes without Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3 * len(CASES)
    for each in found:
        assert each["same memory"] and each["padding"] == 0, each
        most = 2**-7 if "bfloat16" in each["dtype"] else 1e-5  # it cuts bf16, a card rounds
        assert each["slope"] < most and each["loss"] < 1e-5, each
