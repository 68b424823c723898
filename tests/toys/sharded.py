"""A script that trains tiny models with and without --shard, on however many ranks, and says how they end."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import torch
from toys.gpt import ids, random_gpt

import core
from lab.train import shard

KINDS = ("adamw", "lion", "muon", "sgd", "adafactor")
SHARDS = ("none", "optimizer", "full")
THEN = {"none": "optimizer", "optimizer": "full", "full": "none"}  # by which sharding a run goes on


@dataclasses.dataclass(frozen=True)
class Config(core.Constants):
    out: str = ""  # where runs go
    backend: str = "auto"  # of the exchange


def begun(world, kind, how, dtype="fp32"):
    """(model, what is called, optimizer, precision) before the first step."""
    # no biases of keys, whose gradients are noise around 0: Lion steps by their signs
    wide = torch.float64 if dtype == "fp64" else torch.float32
    model = random_gpt(std=0.05, dtype=wide, qkv_bias=False, checkpointing=True).train()
    optimizer, precision = core.make_optimizer(model, kind, 0.1), core.Precision(dtype, world)
    ddp = core.wrap_ddp(model, world, shard=how, optimizer=optimizer)
    core.scaled_backward(ddp(ids(1, 8), ids(1, 8)), world, 1, precision)  # as in runs: DDP settles
    optimizer.zero_grad()
    return model, ddp, optimizer, precision


def as_a_spike_is_noted(world, parts, row) -> list:
    """Name and norm of each gradient, and the loss of a row that rank 0 computes alone."""
    model, _, optimizer, _ = parts
    shard.fill(optimizer)
    norms = shard.gradient_norms(optimizer)
    norms = norms or {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    return [norms, model(row[:, :-1], row[:, 1:]).item() if world.is_main else None]


def train(world, parts, steps):
    """Steps of 5 rows, one at a time: the second is left out as a spike is, the third overflows a scaler."""
    (_, ddp, optimizer, precision), noted = parts, None
    for step in steps:
        rows = ids(5, 9, seed=step)[world.rank :: world.size]
        for row in core.micro_batches(ddp, rows, 1):
            loss = ddp(row[:, :-1], row[:, 1:])
            if step == 2 and precision.scaler.is_enabled():
                loss = loss * math.inf
            core.scaled_backward(loss, world, 5 * 8, precision)
        norm = core.gradient_norm(optimizer, precision)
        if step == 1:
            noted = as_a_spike_is_noted(world, parts, rows[:1])
        core.optimizer_step(optimizer, precision, 0.5, 1e-2, 0.85, norm, leave_out=step == 1)
    shard.fill(optimizer)
    return noted


def resumed(world, kind, how, folder, dtype="fp32"):
    """A model that went on for two steps from what `main` has left in `folder`, by whatever sharing."""
    parts = begun(world, kind, how, dtype)
    shard.fill(parts[2])
    parts[0].load_state_dict(torch.load(f"{folder}/weights.pt"))
    shard.take(parts[2])
    shard.load_whole_state(parts[2], torch.load(f"{folder}/state.pt"))
    train(world, parts, range(4, 6))
    return parts[0]


def kept(optimizer) -> int:
    """Numbers of state that lie on this rank."""
    values = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return sum((v.to_local() if hasattr(v, "to_local") else v).numel() for v in values)


def ends(world, kind, dtype, how) -> tuple[int, list, list[torch.nn.Module]]:
    """Numbers of state on this rank, what was noted of a spike, and the model after six steps; of adamw in
    fp64 also one that went on after the fourth by another sharing."""
    parts, folder = begun(world, kind, how, dtype), Path(f"{kind} {dtype} {how}")
    noted = train(world, parts, range(4))
    whole = shard.whole_state(parts[2])
    if world.is_main:
        folder.mkdir()
        torch.save(parts[0].state_dict(), folder / "weights.pt")
        torch.save(whole, folder / "state.pt")
    core.barrier(world)
    train(world, parts, range(4, 6))
    goes_on = (kind, dtype) == ("adamw", "fp64")
    others = [resumed(world, kind, THEN[how], folder, dtype)] if goes_on else []
    return kept(parts[2]), noted, [parts[0], *others]


def main(cfg, world):
    said, cases = {}, [("adamw", "fp16"), *((kind, "fp64") for kind in KINDS)]
    for (kind, dtype), how in itertools.product(cases[1:2] if world.size > 2 else cases, SHARDS):
        if how != "full" or (dtype != "fp16" and kind not in ("muon", "adafactor")):
            *facts, models = ends(world, kind, dtype, how)
            name = f"{kind} {dtype} {how}"
            said[name] = [*facts, *map(core.weights_sha256, models)]
            torch.save([model.state_dict() for model in models], f"{name}/ends {world.rank}.pt")
            core.barrier(world)
    Path(f"said {world.rank}.json").write_text(json.dumps(said))
