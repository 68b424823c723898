"""A script that trains tiny models with and without --shard, on however many ranks, and says how they end."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import torch
from toys.gpt import ids, random_gpt

import core
from lab.train.shard import load_whole_state, whole_state


@dataclasses.dataclass(frozen=True)
class Config(core.Constants):
    out: str = ""  # where runs go
    backend: str = "auto"  # of the exchange


def begun(world, kind, shard, dtype="fp32"):
    """(model, what is called, optimizer, precision) before the first step."""
    # no biases of keys, whose gradients are noise around 0: Lion steps by their signs
    wide = torch.float64 if dtype == "fp64" else torch.float32
    model = random_gpt(std=0.05, dtype=wide, qkv_bias=False).train()
    optimizer, precision = core.make_optimizer(model, kind, 0.1), core.Precision(dtype, world)
    ddp = core.wrap_ddp(model, world, shard=shard, optimizer=optimizer)
    core.scaled_backward(ddp(ids(1, 8), ids(1, 8)), world, 1, precision)  # as in runs: DDP settles
    optimizer.zero_grad()
    return model, ddp, optimizer, precision


def train(world, parts, steps):
    """Steps of 7 rows each: the second is left out as a spike, the third overflows a scaler."""
    _, ddp, optimizer, precision = parts
    for step in steps:
        rows = ids(7, 9, seed=step)[world.rank :: world.size]
        loss = ddp(rows[:, :-1], rows[:, 1:])
        if step == 2 and precision.scaler.is_enabled():
            loss = loss * math.inf
        core.scaled_backward(loss, world, 7 * 8, precision)
        norm = core.gradient_norm(optimizer, precision)
        core.optimizer_step(optimizer, precision, 0.5, 1e-2, 0.85, norm, leave_out=step == 1)


def resumed(world, kind, shard, folder, dtype="fp32"):
    """A model that went on for three steps from what `main` has left in `folder`, by whatever sharing."""
    parts = begun(world, kind, shard, dtype)
    parts[0].load_state_dict(torch.load(f"{folder}/weights.pt"))
    load_whole_state(parts[2], torch.load(f"{folder}/state.pt"))
    train(world, parts, range(4, 7))
    return parts[0]


def main(cfg, world):
    said = {}
    for kind, dtype in itertools.product(("adamw", "lion", "sgd"), ("fp16", "fp64")):
        for shard in ("none", "optimizer"):
            parts, folder = begun(world, kind, shard, dtype), Path(f"{kind} {dtype} {shard}")
            train(world, parts, range(4))
            numbers = sum(v.numel() for s in parts[2].state.values() for v in s.values() if v.dim())
            whole = whole_state(parts[2])
            if world.is_main:
                folder.mkdir()
                torch.save(parts[0].state_dict(), folder / "weights.pt")
                torch.save(whole, folder / "state.pt")
            core.barrier(world)
            train(world, parts, range(4, 7))
            ends = [resumed(world, kind, other, folder, dtype) for other in ("none", "optimizer")]
            said[str(folder)] = [numbers, *map(core.weights_sha256, [parts[0], *ends])]
            core.barrier(world)
    Path(f"said {world.rank}.json").write_text(json.dumps(said))
