"""Preset cpu beside nanoGPT's CPU preset on tiny Shakespeare, the last tenth held out: loss and wall time.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/gpt_shakespeare.py nanoGPT tinyshakespeare.txt [runs of ours: steps ...]

nanoGPT trains with its own train.py (4 layers, 128 wide, block 64, batch 12, 2,000 steps); its saved weights
are then measured over every character of the held-out part, as ours are. Wall times: whole processes.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import core  # noqa: E402

NANO = [  # its README's flags for a CPU
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=100",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]


def nano(checkout, text):
    """(loss over the whole held-out part, wall seconds)"""
    symbols = sorted(set(text))
    ids = np.array([symbols.index(c) for c in text], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    folder = checkout / "data" / "shakespeare_char"
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(symbols)}))
    began = time.perf_counter()
    subprocess.run([sys.executable, "train.py", *NANO], cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    sys.path.insert(0, str(checkout))
    import model as peer

    saved = torch.load(checkout / "out-shakespeare-char" / "ckpt.pt", weights_only=False)
    model = peer.GPT(peer.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    blocks, loss, count = core.Blocks(ids[cut:], 64), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(blocks), 256):
            input_ids, labels = blocks.batch(range(start, min(start + 256, len(blocks))), "cpu")
            logits, _ = model(input_ids, labels.clamp(min=0).contiguous())
            loss += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            ).item()
            count += int((labels >= 0).sum())
    return loss / count, seconds


def ours(file, steps):
    """(loss, wall seconds of the whole command, seconds of training)"""
    with tempfile.TemporaryDirectory() as out:
        flags = ["--data", file, "--val_share", 0.1, "--test_share", 0, "--max_steps", steps, "--out", out]
        began = time.perf_counter()
        command = [sys.executable, PROJECT / "gpt_scratch.py", *flags, "--sample_tokens", 0]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        result = json.loads(next(Path(out).glob("*/result.json")).read_text())
    return result["val/loss"], seconds, result["train_seconds"]


if __name__ == "__main__":
    checkout, file = Path(sys.argv[1]).resolve(), str(Path(sys.argv[2]).resolve())
    loss, seconds = nano(checkout, Path(file).read_text())
    print(f"nanoGPT  2000 steps  loss {loss:.4f}  {seconds:.0f} s", flush=True)
    for steps in sys.argv[3:] or (700, 2400):
        mine, wall, training = ours(file, steps)
        print(
            f"ours  {steps} steps  loss {mine:.4f} ({mine - loss:+.4f})  {wall:.0f} s "
            f"({wall / seconds:.2f} of nanoGPT's), {training:.0f} s of them training",
            flush=True,
        )
