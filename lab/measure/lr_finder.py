"""The learning-rate finder: loss against a rate that grows at every step, and the rates it suggests."""

import copy
import math

import numpy as np
import torch

from lab.errors import Stop
from lab.run.checkpoints import weights_sha256
from lab.run.files import write_json
from lab.train.batches import reseed
from lab.train.device import read_step
from lab.train.optim import gradient_norm, optimizer_step
from lab.train.processes import all_reduce_sum, on_main

DIVERGED = 4  # times the lowest smoothed loss so far, as in fastai and Lightning


def find_lr(run, batches, targets_of, saved, forward_backward, beta1=None, multiplier=None) -> dict:
    """Mode find_lr of a script: the loss while the rate grows from find_from to find_to, in the conditions of
    training; then everything is as before. Returns what result.json holds.

    saved, targets_of and forward_backward as in training; multiplier: LoRA's, whose product with the rate is
    shown, too. All ranks.
    """
    cfg, world, (trained, optimizer, precision) = run.cfg, run.world, saved

    def take(step, lr):
        rows = batches.rank_batch(step)
        targets = run.agree(np.sum(targets_of(rows)).item())
        if run.stopping:
            raise Stop(run.stopping)
        reseed(cfg.seed, step, world.rank)
        losses, norm = forward_backward(rows, targets), gradient_norm(optimizer, precision)
        loss_sum, known = read_step(losses, norm)
        optimizer_step(optimizer, precision, cfg.clip, lr, beta1, norm, known=known)
        return all_reduce_sum(world, torch.tensor(loss_sum, dtype=torch.float64)).item() / targets

    lrs = np.geomspace(cfg.find_from, cfg.find_to, cfg.find_steps)
    curve = sweep(take, lrs, cfg.find_smoothing, trained, optimizer, precision)
    suggestions = suggest(curve["lr"], curve["smoothed"], curve["before"])
    on_main(world, show_curve, run, curve, suggestions, multiplier)
    best = suggestions["minimum/10"]
    before = f"no advice: the loss never falls below the {curve['before']:.4f} before the first step"
    run.say(f"next: the same with --mode train --lr {best:.1e}" if best else before)
    return {"lr_finder": suggestions, "weights_sha256": weights_sha256(trained)}


def sweep(take, lrs, smoothing, model, optimizer, precision) -> dict:
    """Calls `take(step, lr)` for each rate; it makes a step and returns the loss before the update.

    A rate's loss is that of the next step, after its update. Smoothed by a running mean divided by
    1 - smoothing^n after n losses; without that a constant loss looks like a rise (as in the journal's plot).
    Ends early on divergence. Restores weights, optimizer and scaler.
    """
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.scaler.state_dict()))
    losses, smoothed, mean, before = [], [], 0.0, math.nan
    try:
        for step, lr in enumerate([*lrs, 0.0]):
            try:
                loss = take(step, float(lr))
            except FloatingPointError:
                break
            if step == 0:
                before = loss
                continue
            if not math.isfinite(loss):
                break
            mean = smoothing * mean + (1 - smoothing) * loss
            losses.append(loss)
            smoothed.append(mean / (1 - smoothing ** len(losses)))
            if smoothed[-1] > DIVERGED * min(smoothed):
                break
    finally:
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        if precision.scaler.is_enabled():
            precision.scaler.load_state_dict(kept[2])
        optimizer.zero_grad(set_to_none=True)
    rates = [float(lr) for lr in lrs[: len(losses)]]
    return {"lr": rates, "loss": losses, "smoothed": smoothed, "before": before}


def suggest(lrs, smoothed, before=math.inf) -> dict[str, float | None]:
    """Suggests a rate by three rules; None where the curve never falls by a thousandth, or not below the loss
    `before` the first step: a fall that only takes back a rise teaches nothing.

    steepest: where the loss falls fastest per factor of the rate; valley: the middle of the longest fall;
    minimum/10: a tenth of where it is lowest (Gugger: up to the minimum itself with one_cycle).
    """
    y = np.asarray(smoothed)
    lowest = int(y.argmin()) if len(y) else 0
    if lowest < 2 or min(before, y[:lowest].max()) - y[lowest] < 1e-3 * abs(y[lowest]):
        return {"steepest": None, "valley": None, "minimum/10": None}
    slope = np.gradient(np.minimum.accumulate(y), np.log(lrs))  # falling back from a bad batch gains nothing
    start, end = longest_fall(y)
    steepest, middle = int(slope.argmin()), (start + end) // 2
    return {"steepest": lrs[steepest], "valley": lrs[middle], "minimum/10": lrs[lowest] / 10}


def longest_fall(y) -> tuple[int, int]:
    """First and last index of the longest decreasing subsequence, so that noise does not end a fall."""
    length, before = np.ones(len(y), dtype=int), np.arange(len(y))
    for i in range(1, len(y)):
        higher = np.flatnonzero(y[:i] > y[i])
        if len(higher):
            before[i] = higher[length[higher].argmax()]
            length[i] = length[before[i]] + 1
    end = start = int(length.argmax())
    while before[start] != start:
        start = before[start]
    return int(start), end


def show_curve(run, curve, suggestions, multiplier=None):
    """Writes lr_finder.json and lr_finder.png, and draws the curve in the terminal. multiplier: of LoRA."""
    write_json(run.folder / "lr_finder.json", curve | {"suggestions": suggestions})
    if len(curve["lr"]) < 3:
        return run.say(
            f"{len(curve['lr'])} losses before the end: no curve; use a lower find_from or more steps"
        )
    for step, (lr, loss, smooth) in enumerate(
        zip(curve["lr"], curve["loss"], curve["smoothed"], strict=True)
    ):
        run.metrics(step, {"find/lr": lr, "find/loss": loss, "find/smoothed": smooth})
    run.say(text_plot(curve["lr"], curve["smoothed"], suggestions))
    rates = {name: lr for name, lr in suggestions.items() if lr}
    if rates:
        run.say("suggested lr  " + "   ".join(f"{name} {lr:.2e}" for name, lr in rates.items()))
    if rates and multiplier:
        products = "   ".join(f"{name} {multiplier * lr:.2e}" for name, lr in rates.items())
        run.say(f"multiplier {multiplier:g} x lr  {products}")
    unit = "token" if run.unit == "tokens" else "row"
    plot_curve(curve, suggestions, run.folder / "lr_finder.png", unit, multiplier)
    run.say(f"the curve: {run.folder}/lr_finder.png")


def plot_curve(curve, suggestions, path, unit="token", multiplier=None):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.plot(curve["lr"], curve["loss"], ".", color="0.7", label="loss after a step at this rate")
    axes.plot(curve["lr"], curve["smoothed"], label="smoothed")
    for (name, lr), color in zip(suggestions.items(), ("C1", "C2", "C3"), strict=True):
        if lr:
            axes.axvline(lr, color=color, linestyle="--", label=f"{name}: {lr:.1e}")
    low, high = min(curve["smoothed"]), curve["smoothed"][0]
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"loss per {unit}", title="Learning-rate finder")
    if multiplier:
        scale = (lambda lr: lr * multiplier), (lambda product: product / multiplier)
        axes.secondary_xaxis(-0.18, functions=scale).set_xlabel(f"multiplier {multiplier:g} x learning rate")
    axes.set_ylim(low - 0.2 * (high - low + 0.1), high + 0.5 * (high - low + 0.1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def text_plot(lrs, values, marks, width=80, height=12) -> str:
    """Draws values over log lrs as text of `height` lines, with a letter on the axis for each mark."""
    x = np.log10(lrs)
    columns = np.round((x - x[0]) / max(x[-1] - x[0], 1e-9) * (width - 1)).astype(int)
    low, high = min(values), max(values[0], min(values) + 1e-9)
    top = high + 0.25 * (high - low)  # what shoots above is cut off
    canvas = [[" "] * width for _ in range(height)]
    for column, value in zip(columns, values, strict=True):
        if value <= top:
            canvas[round((top - value) / (top - low) * (height - 1))][column] = "*"
    lines = [
        f"{top - (top - low) * i / (height - 1):8.4f} |{''.join(row)}".rstrip()
        for i, row in enumerate(canvas)
    ]
    axis, under = ["-"] * width, [" "] * (width + 6)
    for exponent in range(math.ceil(x[0]), math.floor(x[-1]) + 1):
        column = round((exponent - x[0]) / (x[-1] - x[0]) * (width - 1))
        axis[column], under[column : column + 5] = "+", f"1e{exponent:<3}"[:5]
    for name, lr in marks.items():
        if lr:
            column = round((math.log10(lr) - x[0]) / (x[-1] - x[0]) * (width - 1))
            axis[np.clip(column, 0, width - 1)] = name[0].upper()
    letters = "  ".join(f"{name[0].upper()} {name}" for name, lr in marks.items() if lr)
    return "\n".join(
        [*lines, " " * 9 + "+" + "".join(axis), (" " * 10 + "".join(under)).rstrip(), " " * 10 + letters]
    )
