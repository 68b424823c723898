"""An int4 model beside its float weights: figures that are known already, and the speed of each."""

import json
import shutil
import statistics
import time

import numpy as np

from lab.data.blocks import Blocks
from lab.measure.language import evaluate
from lab.models import int4


def write_int4(model, group, tokenizer, folder):
    """Writes the model in int4, in groups of `group` inputs, as a folder that int4.load reads."""
    int4.save(int4.convert(model, group), group, tokenizer, folder)


def known_figures(target, weights) -> dict | None:
    """Figures that were measured of these weights before; removes a folder of other weights or without
    figures."""
    try:
        known = json.loads((target / "result.json").read_text())
    except (OSError, ValueError):
        known = {}
    if known.get("weights_sha256") == weights:
        return known
    shutil.rmtree(target, ignore_errors=True)
    return None


def tokens_per_second(model, units, cfg, world, poll) -> float:
    """Tokens per second of evaluation, over at most 200 rows: median of three passes after a first one."""
    if isinstance(units, Blocks):
        some = Blocks(units.tokens[: 200 * units.block_size + 1], units.block_size)
    else:
        some = units.some(200)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        evaluate(model, some, cfg, world, poll)
        seconds.append(time.perf_counter() - began)
    return int(np.asarray(some.lengths).sum()) / statistics.median(seconds[1:])
