"""Steps whose loss or gradient norm leaves its usual band: what is usual, what is noted, what is left out."""

import json
import math
import statistics

import torch

from lab.train.processes import all_reduce_sum

BAND, FEWEST, SMOOTHED = 100, 20, 10  # steps that say what is usual; the fewest that do; of a running mean
LEAST = {"loss": 1.5, "grad_norm": 1.5, "smoothed_loss": 1.25}  # times the median that is usual in any case


def spike_limit(values, least) -> float:
    """Upper end of the usual band: median x exp(6 x 1.4826 x median deviation of logs), at least
    `least` medians.

    Like 6 standard deviations of a log-normal, but a few spikes among the values hardly move it.
    """
    if len(values) < FEWEST:
        return math.inf
    logs = sorted(math.log(max(value, 1e-30)) for value in values)
    middle = statistics.median(logs)
    deviation = statistics.median(abs(log - middle) for log in logs)
    return math.exp(middle + max(6 * 1.4826 * deviation, math.log(least)))


def watch(run, step, loss_sum, targets, model, describe):
    """Returns the function that optimizer_step takes as `skip`. Called with the gradient norm, it tells
    whether to leave the update out: skip_spikes is on and loss or norm left its band. All ranks, each step.

    A spike is noted in spikes.jsonl with the parameter of the largest gradient and what `describe()` (called
    on rank 0) tells of its rows. The bands are in run.state, so that a resume continues them.
    """
    loss = all_reduce_sum(run.world, torch.tensor(loss_sum, dtype=torch.float64)).item() / targets

    def is_odd(norm) -> bool:
        bands = run.state.setdefault("bands", {})
        recent = [*bands.get("loss", []), loss][-SMOOTHED:]
        # the mean sees a rise in which no single step stands out
        values = {"loss": loss, "grad_norm": norm, "smoothed_loss": sum(recent) / len(recent)}
        limits = {name: spike_limit(bands.setdefault(name, []), LEAST[name]) for name in values}
        odd = [name for name, value in values.items() if not value <= limits[name]]
        for name, value in values.items():
            bands[name] = [*bands[name], value][-BAND:] if math.isfinite(value) else bands[name]
        left_out = run.cfg.skip_spikes and bool({"loss", "grad_norm"} & set(odd))
        run.state["spikes"] = run.state.get("spikes", 0) + bool(odd)
        run.state["left_out"] = run.state.get("left_out", 0) + left_out
        if odd and run.world.is_main:
            record = {"step": run.first_step + step, "odd": odd, "left_out": left_out}
            _note(run, record, values, limits, model, describe())
        run.state["was_odd"] = bool(odd)
        return left_out

    return is_odd


def _note(run, record, values, limits, model, facts):
    """Writes a line to spikes.jsonl and one to the screen."""
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    largest = max(norms, key=norms.get)
    record |= values | {f"{name}_limit": limit for name, limit in limits.items()}
    record |= {f"{name}_usual": statistics.median(band) for name, band in run.state["bands"].items()}
    record |= {"largest_gradient": largest, "largest_gradient_norm": norms[largest]}
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = None  # JSON knows no inf
    with open(run.folder / "spikes.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record | facts) + "\n")
    if record["left_out"] or not run.state.get("was_odd"):  # a rise of many steps is one line here
        name = record["odd"][0]
        what = f"{name} {values[name]:.4g}, usually below {limits[name]:.3g}"
        done = "; its update is left out" if record["left_out"] else ""
        run.say(f"spike  step {record['step']}  {what}{done}  (spikes.jsonl)")
