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


def judge(run, step, loss_sum, targets, norm) -> dict:
    """Compares a step's mean loss and gradient norm with the bands of the steps before it, and widens these.
    All ranks, each step, before its update. Returns step, odd (names of what left its band), left_out
    (skip_spikes is on and the step itself is odd), values and limits. The bands are in run.state, so that a
    resume continues them.
    """
    loss = all_reduce_sum(run.world, torch.tensor(loss_sum, dtype=torch.float64)).item() / targets
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
    again, run.state["was_odd"] = run.state.get("was_odd", False), bool(odd)
    spike = {"step": run.first_step + step, "odd": odd, "left_out": left_out}
    return spike | {"values": values, "limits": limits, "again": again}


def note(run, spike, model, facts):
    """Rank 0: writes a line to spikes.jsonl, with the parameter of the largest gradient and `facts` of what
    the step read, and one to the screen."""
    values, limits, names = spike["values"], spike["limits"], ("step", "odd", "left_out")
    norms = spike.get("norms") or {
        n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None
    }
    largest = max(norms, key=norms.get)
    record = {name: spike[name] for name in names} | values
    record |= {f"{name}_limit": limit for name, limit in limits.items()}
    bands = run.state["bands"].items()  # empty where the first step already is no number
    record |= {f"{name}_usual": statistics.median(band) if band else None for name, band in bands}
    record |= {"largest_gradient": largest, "largest_gradient_norm": norms[largest]}
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = None  # JSON knows no inf
    with open(run.folder / "spikes.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record | facts) + "\n")
    if record["left_out"] or not spike["again"]:  # a rise of many steps is one line here
        name = record["odd"][0]
        what = f"{name} {values[name]:.4g}, usually below {limits[name]:.3g}"
        done = "; its update is left out" if record["left_out"] else ""
        run.say(f"spike  step {record['step']}  {what}{done}  (spikes.jsonl)")
