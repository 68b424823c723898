"""Run folders made by hand."""

import json
from pathlib import Path

import pytest

import core

CONSTANTS = {"data": "rows.json", "text_column": "text", "max_documents": None, "split_seed": 42}
CONSTANTS |= {"val_share": 0.1, "test_share": 0.1, "model": "/some/models/tiny", "lora_rank": 16, "lr": 0.01}
CONSTANTS |= {"batch": 24, "seed": 0, "price_per_hour": None, "note": "", "out": None, "tag": None}
FIGURES = {"step": 75, "seconds": 90.0, "parameters": 1234567, "peak_memory_mb": 512.4, "test/loss": 2.5}
FIGURES |= {"tokens_per_second": 1234.5, "test/loss_interval": [2.25, 2.75], "test/accuracy": 0.25}
FIGURES |= {"test/accuracy_interval": [0.2, 0.3]}
STEPS = [{"step": step, "train/loss": 4 - step / 100} for step in (25, 50, 75)]
STEPS += [{"step": 75, "val/loss": 2.9}]


def make_run(name, script="run_lora", status="finished", result=(), config=(), files=(), **constants):
    """A run folder without checkpoints. `files`: name -> what a .json holds, lines of a .jsonl, or text."""
    folder = Path("runs", script, name)
    folder.mkdir(parents=True)
    stored = {"script": script, "constants": CONSTANTS | constants, "preset": None, "device": "cpu"}
    stored |= {"facts": {"fingerprint": {"data": "abc"}}} | dict(config)
    told = {"status": status, "weights_sha256": f"of {name}"} | FIGURES | dict(result)
    written = {"config.json": stored, "result.json": told if status else "", "metrics.jsonl": STEPS}
    for file, content in (written | dict(files)).items():
        if isinstance(content, list) and file.endswith(".jsonl"):
            content = "".join(json.dumps(line) + "\n" for line in content)
        if content:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def refused(match, job, *args):
    with pytest.raises(core.UserError, match=rf"\A(?=.+\Z).*{match}"):
        job(*args)


def rows_of(text) -> list[dict]:
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and set("".join(lines[1])) == {"-"}
    assert len(lines) > 2 and all(line[0] == line[-1] == "" for line in lines)
    return [dict(zip(lines[0][1:-1], line[1:-1], strict=True)) for line in lines[2:]]


def smoothing_runs():
    """Before a constant was added to run_lora.py; with it, as none and as a number; of another script."""
    make_run("before")
    make_run("none", label_smoothing=None)
    make_run("some", label_smoothing=0.1)
    make_run("other", script="run_instruct", freeze_blocks=2)


def source(first="x = 1\n", imported="", also="never imported"):
    """source/ of a run of run_lora.py, which imports sft.py, which imports core.py."""
    files = {"run_lora.py": f"import sft\n{first}", "sft.py": "def f():\n    import core\n"}
    files |= {"core.py": f"import torch\n{imported}", "judge.py": also}
    return {f"source/{name}": text for name, text in files.items()}


def resumes(*entries):
    """config.json's list: (step, {name: (was, is)}), or a step alone as runs had it once."""
    entries = [entry if isinstance(entry, tuple) else (entry, None) for entry in entries]
    return {"resumes": [{"step": step} if changed is None else {"step": step, "other_code": []}
            | {"changed": {name: {"was": was, "is": now} for name, (was, now) in changed.items()}}
            for step, changed in entries]}  # fmt: skip
