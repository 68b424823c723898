"""Writing text on one card: core.generate beside transformers'. GPT-2 medium, random weights, greedy.

    python benchmarks/gpu_decoding.py            # one NVIDIA card, some two minutes, no network
    python benchmarks/gpu_decoding.py --tiny     # the same on a CPU, to try the logic

16 + 128 tokens, batches of 1 and 8; the best of three calls, of which the first also makes the graph, or
compiles (transformers' static cache). Each rate beside the share of tokens that are ours in fp32.
"""

import functools
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
from lab.models.decoding import Decoder, decoder_of
from lab.train.precision import native_dtype

TINY = "--tiny" in sys.argv
KIND = "cpu" if TINY else "cuda"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(native_dtype(torch.device(KIND)))
CONFIG = core.GPTConfig(500, 256, 2, 2, 64) if TINY else core.GPTConfig(50257, 1024, 24, 16, 1024)
NEW, TURNS = (8, 2) if TINY else (128, 3)


def best(write) -> tuple[list, float]:
    """(rows of ids, seconds of the fastest call)"""
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        rows = write()  # ids on the host: the card is done
        seconds.append(time.perf_counter() - began)
    return rows, min(seconds)


def row(name, truth, write, *args, **how) -> torch.Tensor:
    """Prints a contender's line. Returns `truth`, the rows in fp32; they are its own where none are given."""
    try:
        rows, seconds = best(functools.partial(write, *args, **how))
    except Exception as error:  # one that fails is a line
        print(f"{name:44} failed: {type(error).__name__}: {error}".splitlines()[0][:100], flush=True)
        return truth
    rows = torch.tensor(rows)
    truth = rows if truth is None else truth
    equal = (rows == truth).double().mean().item()
    print(f"{name:44} tokens/s {rows.numel() / seconds:8.1f}   as in fp32 {equal:.3f}", flush=True)
    return truth


def main():
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    ours = core.GPT(CONFIG).eval()
    with tempfile.TemporaryDirectory() as folder:
        core.save_pretrained(ours, None, folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval().to(KIND, HALF or torch.float32)
    ours.to(KIND)
    for batch in (1, 8):
        prompts = torch.randint(CONFIG.vocab_size, (batch, 16))

        def mine(decoder, half=None, prompts=prompts):
            with torch.autocast(KIND, half) if half else nullcontext():
                return core.generate(ours, prompts.tolist(), NEW, temperature=0, decoder=decoder)

        def peer(prompts=prompts.to(KIND), **how):
            how |= {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
            return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **how)[:, 16:].tolist()

        print(f"batch {batch}")
        truth = row("ours fp32, kernel by kernel", None, mine, Decoder(ours))
        row("ours fp32, a graph kept", truth, mine, decoder_of(ours))
        if HALF:
            row("ours half, a graph made in each call", truth, mine, None, HALF)
            row("ours half, a graph kept", truth, mine, decoder_of(ours), HALF)
        row("transformers", truth, peer)
        if not TINY:
            row("transformers, static cache", truth, peer, cache_implementation="static")


if __name__ == "__main__":
    main()
