"""An int4 model beside its float weights: figures that are known already, and the speed of each."""

import shutil
import statistics
import time

import numpy as np

from lab.data.split import final_parts
from lab.measure import choices
from lab.measure.language import evaluate
from lab.models import int4
from lab.run.checkpoints import weights_sha256
from lab.run.files import read_sealed, write_sealed
from lab.train.processes import main_first, on_main


def beside_float(model, group, target, data, parts, cfg, world, poll) -> dict:
    """Writes the model in int4 to `target`, loads it again and measures both on a run's held-out problems:
    {"float": figures, "int4": figures, "rows": both by row, ...}, which result.json there keeps."""
    on_main(world, write_int4, model, group, data.tokenizer, target)
    small, _ = main_first(world, int4.load, target)
    result = {"weights_sha256": weights_sha256(model), "group": group, "trained_for_it": cfg.qat != "off"}
    bytes_of = {"float": sum(t.numel() * t.element_size() for t in model.state_dict().values())}
    bytes_of["int4"] = (target / "model.safetensors").stat().st_size
    lines, part = {}, final_parts(cfg)[-1]
    for kind, each in (("float", model), ("int4", small.to(world.device))):
        figures, *lines[kind] = choices.measure_parts(each, data, parts, cfg, world, poll)
        rates = tokens_per_second(each, parts[part], cfg, world, poll)
        rate = statistics.median(rates)
        result[kind] = figures | {"mb": bytes_of[kind] / 1e6, "tokens_per_second": rate}
        result[kind]["tokens_per_second_range"] = [min(rates), max(rates)]
        if world.is_main:
            loss = f"{kind:5} {part} loss {figures[f'{part}/loss']:.4f}"
            print(f"{loss}  {rate:.0f} tokens/s  of {target.parent.name}", flush=True)
    result["rows"] = paired_rows(lines["float"], lines["int4"])
    on_main(world, write_sealed, target / "result.json", result)
    return result


def paired_rows(whole, small) -> dict:
    """Two measurements of the same rows, paired for verdicts; each is [lines of losses, of answers]."""
    rows = {"group": [line["group"] for line in whole[0]], "targets": [line["targets"] for line in whole[0]]}
    rows["loss"] = [[line["nats"] for line in losses] for losses, _ in (whole, small)]
    rows["answers"] = [[float(line["right"]) for line in answers] for _, answers in (whole, small)]
    return rows


def write_int4(model, group, tokenizer, folder):
    """Writes the model in int4, in groups of `group` inputs, as a folder that int4.load reads."""
    int4.save(int4.convert(model, group), group, tokenizer, folder)


def known_figures(target, weights) -> dict | None:
    """Figures that were measured of these weights before; removes a folder of other weights or without
    figures."""
    try:
        known = read_sealed(target / "result.json")
    except (OSError, ValueError):
        known = {}
    if known.get("weights_sha256") == weights:
        return known
    shutil.rmtree(target, ignore_errors=True)
    return None


def tokens_per_second(model, units, cfg, world, poll) -> list[float]:
    """Tokens per second of evaluation, over at most 200 rows, of five passes after a first one."""
    some, seconds = units.some(200), []
    for _ in range(6):
        began = time.perf_counter()
        evaluate(model, some, cfg, world, poll)
        seconds.append(time.perf_counter() - began)
    return [int(np.asarray(some.lengths).sum()) / spent for spent in seconds[1:]]
