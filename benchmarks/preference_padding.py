"""Examples per second of run_preference's training step against padding every side to max_length.

Same model, rows and batch, one process; the two take turns, so that a drift of the machine meets both.

    python benchmarks/preference_padding.py --data FILE --model FOLDER [--steps 4] [--batch 16]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
import run_preference


def timed(model, data, rows, cfg, padded) -> float:
    """Seconds of one forward and backward over `rows`."""
    began = time.perf_counter()
    input_ids, lengths = run_preference.collate(data, rows, cfg, "cpu")
    if padded:  # every side as long as max_length, in one group
        input_ids = torch.nn.functional.pad(input_ids, (0, cfg.max_length - input_ids.shape[1]))
        mask = torch.arange(cfg.max_length) < torch.tensor(lengths)[:, None]
        hidden = model.encoder(input_ids, attention_mask=mask.long()).last_hidden_state[:, 0]
        logits = model.head(torch.cat(hidden.chunk(2), dim=-1))
    else:
        logits = model(input_ids, lengths)
    core.sum_cross_entropy(logits, torch.as_tensor(data.labels[rows])).backward()
    model.zero_grad()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    core.keep_freed_memory()  # as core.distributed does, for both
    world = core.World()
    cfg = run_preference.Config(
        data=args.data, model=args.model, batch=args.batch, max_length=args.max_length
    )
    data = run_preference.load_data(cfg, world)
    run_preference.measure_sides(data, cfg.inputs, cfg.max_length)
    model = run_preference.build_model(cfg, data, world)
    lengths = data.lengths.sum(1)
    batches = core.ShardedBatches(lengths, cfg.batch, world, seed=0)
    steps = [step * len(batches) // args.steps for step in range(args.steps)]  # short and long batches alike
    seconds = {False: [], True: []}
    timed(model, data, batches.rank_batch(0), cfg, padded=False)  # warm up
    for step in steps:
        for padded in (False, True):
            seconds[padded].append(timed(model, data, batches.rank_batch(step), cfg, padded))
        print(
            f"batch {step:3}  ours {seconds[False][-1]:6.2f} s  padded {seconds[True][-1]:6.2f} s", flush=True
        )
    rates = {padded: len(steps) * cfg.batch / sum(times) for padded, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    print(f"ours {rates[False]:.2f} examples/s   padded to {cfg.max_length} {rates[True]:.2f} examples/s")
    print(
        f"ratio {rates[False] / rates[True]:.2f} over all, {statistics.median(ratios):.2f} median of batches"
    )


if __name__ == "__main__":
    main()
