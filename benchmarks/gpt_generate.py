"""Greedy generation of gpt_scratch beside transformers' generate: random-weight GPT-2 small, CPU, fp32.

    python benchmarks/gpt_generate.py [tokens]

Both hold the same weights in one process and take turns; equal tokens are checked. The bound in brackets: the
weights are read once a step, at the rate at which this machine sums them up, measured in the same run.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
from lab.train import cpu


def timed(function):
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def main(tokens):
    from transformers import GPT2LMHeadModel

    cpu.keep_freed_memory()
    torch.manual_seed(0)
    ours = core.GPT(core.GPTConfig(50257)).eval()
    with tempfile.TemporaryDirectory() as folder:
        core.save_pretrained(ours, None, folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    for batch in (1, 8):
        prompts = torch.randint(50257, (batch, 32))
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}

        def peer(prompts=prompts, options=options):
            mask = torch.ones_like(prompts)
            return theirs.generate(prompts, attention_mask=mask, **options)[:, prompts.shape[1] :].tolist()

        def mine(prompts=prompts):
            return core.generate(ours, prompts.tolist(), tokens, temperature=0)

        times = {"transformers": [], "ours": []}
        for turn in range(6):
            (a, first), (b, second) = timed(peer), timed(mine)
            assert a == b, "the two disagree"
            if turn:  # the first warms up
                times["transformers"].append(first)
                times["ours"].append(second)
        rates = {who: batch * tokens / statistics.median(seconds) for who, seconds in times.items()}
        pairs = zip(times["transformers"], times["ours"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        weights = torch.cat([p.detach().flatten() for p in ours.parameters()])
        seconds = statistics.median(timed(weights.sum)[1] for _ in range(9))
        print(
            f"batch {batch}  transformers {rates['transformers']:.1f}  ours {rates['ours']:.1f} tokens/s  "
            f"{ratio:.2f} x  (reading the weights once a step: {batch / seconds:.0f})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
