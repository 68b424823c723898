"""Does alpha alone make journal 001's spikes? All weights and LoRA, four strengths, with and without warm-up.

    python gpt_scratch.py --data python-docs ... --tag base             # a small base, see JOURNAL.md
    python benchmarks/lora_spikes.py rows.json runs/gpt_scratch/<run> [seeds]

Runs what is missing below runs/, as many at once as there are cores, one thread each; then prints a table
and draws runs/lora_spikes.png. The rate is the same everywhere, as in the journal; alpha is the rank.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
LR, EPOCHS, BATCH = 1e-3, 2, 4
RANKS, WARMUPS = (4, 16, 64), (0.2, 0.0)
STRENGTHS = {  # scaling, init of A
    "alpha, A as the ancestor": ("alpha", "rank"),
    "alpha": ("alpha", "fan_in"),
    "alpha/r, A as the ancestor": ("alpha/r", "rank"),
    "alpha/r": ("alpha/r", "fan_in"),
}


def constants(rows, base):
    return {
        "data": rows,
        "model": base,
        "max_length": 256,
        "batch": BATCH,
        "epochs": EPOCHS,
        "lr": LR,
        "min_lr": LR / 5,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "tie_head": False,
        "log_every": 5,
        "eval_every": 58,
        "eval_rows": "none",
        "save_every": 10**6,
        "test_weights": "last",
        "sample_tokens": 0,
        "answer_rows": 0,
        "plain_blocks": 20,
        "resume_timestamp": "auto",
    }


def jobs(seeds):
    """(tag, script, constants) of every run."""
    for seed in range(seeds):
        for warmup in WARMUPS:
            same = {"warmup": warmup, "seed": seed}
            yield tag_of("full", None, warmup, seed), "run_instruct", same
            for rank in RANKS:
                for name, (scaling, init) in STRENGTHS.items():
                    own = {"lora_rank": rank, "lora_alpha": rank, "lora_scaling": scaling, "lora_init": init}
                    yield tag_of(name, rank, warmup, seed), "run_lora", same | own | {"lora_head": True}


def tag_of(name, rank, warmup, seed) -> str:
    short = name.replace(", A as the ancestor", "-A").replace("/", "_")
    return f"{short}-r{rank}-w{warmup}-s{seed}"


def start(job, shared):
    tag, script, own = job
    argv = [sys.executable, str(PROJECT / f"{script}.py"), "--tag", tag]
    for name, value in (shared | own).items():
        argv += (
            [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    print(tag, (done.stdout + done.stderr).strip().splitlines()[-1][:80], flush=True)


def outcome(tag) -> dict | None:
    """Curves and figures of the newest run with a tag; None if it did not finish."""
    folders = sorted(Path("runs").glob(f"run_*/*-{tag}"))
    if not folders or not (folders[-1] / "result.json").exists():
        return None
    result = json.loads((folders[-1] / "result.json").read_text())
    rows = [json.loads(line) for line in (folders[-1] / "metrics.jsonl").read_text().splitlines()]
    train = np.array([[row["step"], row["train/loss"]] for row in rows if "train/loss" in row])
    val = np.array([[row["step"], row["val/loss"]] for row in rows if "val/loss" in row])
    spikes = folders[-1] / "spikes.jsonl"
    odd = [json.loads(line) for line in spikes.read_text().splitlines()] if spikes.exists() else []
    return {"result": result, "train": train, "val": val, "spikes": odd}


def table(seeds):
    """Means over seeds; rise: the highest validation loss on the way minus the one before training."""
    print(f"{'':28} {'rank':>4} {'warm-up':>7}  {'test loss':20} {'rise':>6} {'spikes':>6} {'forgotten':>9}")
    for name, rank in [("full", None), *((name, rank) for name in STRENGTHS for rank in RANKS)]:
        for warmup in WARMUPS:
            found = [outcome(tag_of(name, rank, warmup, seed)) for seed in range(seeds)]
            done = [run for run in found if run and run["result"]["status"] == "finished"]
            line = f"{name:28} {rank!s:>4} {warmup:7}  "
            if done:
                tests = [run["result"]["test/loss"] for run in done]
                rise = np.mean([run["val"][1:, 1].max() - run["val"][0, 1] for run in done])
                odd = np.mean([len(run["spikes"]) for run in done])
                forgotten = np.mean([run["result"]["plain/forgotten"] for run in done])
                line += f"{f'{np.mean(tests):.3f} ({min(tests):.3f}-{max(tests):.3f})':20} "
                line += f"{rise:6.2f} {odd:6.1f} {forgotten:9.2f}"
            print(line + (f"   {seeds - len(done)} diverged" if len(done) < seeds else ""))


def picture(seeds, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(WARMUPS), len(RANKS), figsize=(13, 7), sharex=True, sharey=True)
    for row, warmup in zip(axes, WARMUPS, strict=True):
        for panel, rank in zip(row, RANKS, strict=True):
            for number, name in enumerate(("full", *STRENGTHS)):
                runs = [
                    outcome(tag_of(name, None if name == "full" else rank, warmup, s)) for s in range(seeds)
                ]
                curves = [run["train"] for run in runs if run and len(run["train"])]
                if curves:
                    shortest = min(map(len, curves))
                    mean = np.mean([curve[:shortest, 1] for curve in curves], axis=0)
                    panel.plot(curves[0][:shortest, 0], mean, color=f"C{number}", label=name, linewidth=1)
            panel.set_title(f"rank = alpha = {rank}, warm-up {warmup:g}", fontsize=10)
            panel.grid(alpha=0.3)
        row[0].set_ylabel("training loss, mean of seeds")
    for panel in axes[-1]:
        panel.set_xlabel("step")
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    seeds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: start(job, constants(sys.argv[1], sys.argv[2])), jobs(seeds)))
    table(seeds)
    picture(seeds, "runs/lora_spikes.png")
    print("runs/lora_spikes.png")
