"""benchmarks/gpu.py: every row runs, tiny, on a CPU; a slow one costs no other; ours beside the peer."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from conftest import PROJECT


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    return importlib.import_module("gpu")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
def test_every_row_has_figures_or_says_what_is_not_installed(gpu, monkeypatch):
    rows = importlib.import_module("gpu_rows")
    assert sorted(rows.ROWS) == sorted(gpu.ROWS)
    monkeypatch.setattr(rows.loss, "FAST", rows.loss.FAST[:])
    found = {name: rows.row(name) for name in gpu.ROWS}
    assert found.pop("losses") == {"fp32 worst": 0.0, "fp32 mean": 0.0}
    assert [name for name, figures in found.items() if not figures.get("per second", 0) > 0] == [], found
    monkeypatch.setitem(sys.modules, "peft", None)
    assert rows.row("lora, peft") == {"skipped": "peft is not installed"}


SLOW = """
import json, sys, time
name = sys.argv[1]
if name == "lora, peft":
    time.sleep(600)
if name == "head, ours":
    sys.exit("a fault")
rate = {"step, ours": 30.0, "step, nanoGPT": 20.0, "lora, ours": 1.0}[name]
print("a library's chatter")
print(json.dumps({"per second": rate, "device": "a card", "torch": "2", "dtype": "bf16"}))
"""


def test_rows_are_kept_as_they_come_and_a_slow_one_costs_no_other(gpu, monkeypatch, capsys):
    Path("worker.py").write_text(SLOW)
    monkeypatch.setattr(gpu, "WORKER", Path("worker.py").absolute())
    monkeypatch.setattr(gpu, "SECONDS", 10)
    names = ["step, nanoGPT", "lora, peft", "head, ours", "step, ours", "lora, ours"]
    assert gpu.accept(names, 1, Path("kept.json"), tiny=True) == 1
    kept = json.loads(Path("kept.json").read_text())
    assert kept["ours : peer"] == {"step, ours": {"times": 1.5, "wanted": 1.05}}  # lora has no peer
    assert kept["rows"]["lora, peft"] == {"failed": "not there after 10 s"}
    assert kept["rows"]["head, ours"] == {"failed": "exit code 1: a fault"}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a card  torch 2  bf16" and said[-1].endswith("1.50 x step, nanoGPT (wanted: 1.05)")
    monkeypatch.setattr(gpu, "LEAST", 60)
    assert gpu.accept(["step, ours"], 0.5, Path("kept.json"), tiny=True) == 0
    assert json.loads(Path("kept.json").read_text())["rows"] == {
        "step, ours": {"skipped": "the time is over"}
    }
