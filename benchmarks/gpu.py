"""Our own acceptance on one NVIDIA card: training, the head alone and decoding beside peers at their best.

python benchmarks/gpu.py             # inside 8 minutes, no network; peft and accelerate where they are there
python benchmarks/gpu.py --tiny      # the same on a CPU, to try the logic

Each row is a process of its own with a deadline; it is printed, and kept in --out, as it comes. Peers:
nanoGPT's step (whole model compiled, vocabulary padded), all logits at once, peft in transformers' Trainer,
Trainer's dynamic padding, transformers' static cache. "ours" computes what a script of ten minutes or more
chooses by itself: half precision, compiled. The rows are in gpu_rows.py. Exit code 1 where a row failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("gpu_rows.py")
SECONDS = 120  # for one row
NO_CARD = "no CUDA device"  # what a row says then
LEAST = 10  # seconds without which a row is not begun
ROWS = [  # what matters most first: the time may be over
    *("losses", "step, nanoGPT", "step, ours", "head, ours", "head, all logits at once"),
    *("decoding 1, ours", "decoding 1, static cache", "lora, ours", "lora, peft"),
    *("preference, ours", "preference, Trainer", "decoding 8, ours", "decoding 8, static cache"),
    *("step, ours --no-compile", "head, ours by torch.compile", "head, ours eager"),
    *("lora, ours --no-compile", "preference, ours --no-compile"),
]
BESIDE = {  # ours: (the peer, how many times its rate we want)
    "step, ours": ("step, nanoGPT", 1.05),
    "head, ours": ("head, all logits at once", 1.0),
    "lora, ours": ("lora, peft", 1.5),
    "preference, ours": ("preference, Trainer", 2.0),
    "decoding 1, ours": ("decoding 1, static cache", 1.5),
    "decoding 8, ours": ("decoding 8, static cache", 1.5),
}


def measured(name, seconds, tiny) -> dict:
    """What a process of its own, which may take so long, says of a row."""
    command = [sys.executable, str(WORKER), name, *(["--tiny"] if tiny else [])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # Trainer would take all cards
    env = os.environ | {"CUDA_VISIBLE_DEVICES": one, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    try:
        said, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a compiler's helpers with it
        process.communicate()
        return {"failed": f"not there after {seconds:.0f} s"}
    try:
        return json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return {"failed": f"exit code {process.returncode}: {last[:200]}"}


def line(name, found) -> str:
    """A row of the table."""
    shown = {key: value for key, value in found.items() if key not in ("device", "torch", "dtype")}
    cells = [
        f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    ]
    return f"{name:30} " + "  ".join(cells)


def ratios(rows) -> dict:
    """ours: (its rate over the peer's, what we want), where both are there."""
    rate = {name: found["per second"] for name, found in rows.items() if "per second" in found}
    both = {ours: peer for ours, (peer, _) in BESIDE.items() if ours in rate and peer in rate}
    return {
        ours: {"times": rate[ours] / rate[peer], "wanted": BESIDE[ours][1]} for ours, peer in both.items()
    }


def keep(path, rows):
    """Whole at every moment: what was measured outlives whatever comes next."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(json.dumps({"rows": rows, "ours : peer": ratios(rows)}, indent=1) + "\n")
    aside.replace(path)


def accept(names, minutes, out, tiny) -> int:
    """Measures rows by their names, one after the other. Exit code."""
    ends, rows, device = time.monotonic() + 60 * minutes, {}, None
    for name in names:
        left, found = ends - time.monotonic(), {"skipped": "the time is over"}
        if left > LEAST:
            found = measured(name, min(SECONDS, left), tiny)
        if not device and (device := found.get("device")):
            print(f"{device}  torch {found['torch']}  {found['dtype']}")
        print(line(name, found), flush=True)
        rows[name] = found
        keep(out, rows)
        if NO_CARD in found.get("failed", ""):
            break  # nor will the others
    for name, found in ratios(rows).items():
        print(f"{name:30} {found['times']:.2f} x {BESIDE[name][0]} (wanted: {found['wanted']:g})")
    return int(any("failed" in found for found in rows.values()))


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins or goes on after them")
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="those whose names begin so, such as step or head"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    names = [name for name in ROWS if name.startswith(tuple(a.rows))]
    sys.exit(accept(names, a.minutes, a.out, a.tiny) if names else f"no such row: {a.rows}; there are {ROWS}")


if __name__ == "__main__":
    main()
