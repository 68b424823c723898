"""Seconds per Task2Vec embedding of a batch, GPT-2 small's shape: the clean procedure against two plain ones
on transformers' GPT-2 that go through the body in each of the ten head epochs.

    python benchmarks/task2vec_speed.py [rounds] [sequences]

forward    the body is run again in each epoch, without gradient
backward   the tied matrix is tuned: gradients go back through the body, as in the published code

They take turns. `forward` answers the same question as ours: with our targets its embedding must be ours.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
from lab.measure import task2vec
from lab.models import gpt_formats
from lab.train import cpu

LENGTH, EPOCHS, END = 128, 10, 50256


def plain(model, ids, tied, targets=None):
    """Embedding by transformers and torch alone; `targets` of the Fisher pass, none: they are drawn."""
    parts = ids.split(task2vec.MINI_BATCH)
    head = model.lm_head.weight if tied else model.lm_head.weight.detach().clone().requires_grad_(True)
    model.requires_grad_(False)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW([head], fused=True, **task2vec.HEAD)
    for _ in range(EPOCHS):
        for part in parts:
            hidden = model.transformer(part).last_hidden_state[:, :-1]
            logits = F.linear(hidden, head)
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    weights = [module.weight for module in model.transformer.modules() if hasattr(module, "weight")]
    sums = 0
    for i, part in enumerate(parts):
        hidden = model.transformer(part).last_hidden_state[:, :-1].flatten(0, 1)
        logits = F.linear(hidden, head if tied else head.detach())
        drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0] if targets is None else targets[i]
        slopes = torch.autograd.grad(F.cross_entropy(logits, drawn), weights)
        sums = sums + torch.cat([s.square() if s.dim() == 1 else s.square().mean(1) for s in slopes])
    return (sums / len(parts)).numpy()


def main():
    from transformers import GPT2Config, GPT2LMHeadModel

    cpu.keep_freed_memory()
    rounds, n = (int(word) for word in (*sys.argv[1:], *("2", "16")[len(sys.argv) - 1 :]))
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    config = core.GPTConfig(END + 1)
    state = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    ours = core.with_weights(config, gpt_formats.from_theirs(state, config, "gpt2")).eval()
    ids = torch.randint(END, (n, LENGTH))
    batch = task2vec.Batch(ids, torch.full((n,), LENGTH))
    drawn, draw = [], task2vec.draw
    task2vec.draw = lambda probs: drawn.append(draw(probs)) or drawn[-1]

    def fresh():
        again = GPT2LMHeadModel(GPT2Config()).eval()
        again.load_state_dict(theirs.state_dict())
        return again

    jobs = {
        "clean": lambda model: task2vec.embed(ours, batch, END, "clean", EPOCHS),
        "forward": lambda model: plain(model, ids, tied=False, targets=drawn),
        "backward": lambda model: plain(model, ids, tied=True),
    }
    seconds = {name: [] for name in jobs}
    for number in range(rounds):
        found = {}
        drawn.clear()
        for name, job in jobs.items():
            model = fresh()  # not timed
            began = time.perf_counter()
            found[name] = job(model)
            seconds[name].append(time.perf_counter() - began)
            print(f"round {number + 1}  {name:8} {seconds[name][-1]:7.1f} s", flush=True)
    difference, other = np.abs(found["clean"] - found["forward"]), found["forward"]
    of_largest, of_itself = difference.max() / other.max(), (difference / (other + task2vec.EPSILON)).max()
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{n} sequences of {LENGTH} tokens, {EPOCHS} head epochs, {torch.get_num_threads()} threads, medians"
    )
    for name, value in middle.items():
        print(f"{name:8} {value:7.1f} s  {value / middle['clean']:.2f} x clean")
    print(f"embedding of {len(other)}: {of_largest:.1e} of the largest, {of_itself:.1e} of itself away")


if __name__ == "__main__":
    main()
