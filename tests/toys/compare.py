"""Runs whose losses are made by hand."""

import numpy as np
from toys.results import make_run

from lab.compare import difference
from lab.compare.rows import Rows

NATS = np.random.default_rng(0).gamma(4, 5, 60)
ALONE = np.arange(60)


def losing(name, nats, groups=ALONE, hits=5, targets=10, sizes=40, files=(), **how):
    columns = {
        "part": "test",
        "row": np.arange(len(nats)),
        "group": groups[: len(nats)],
        "nats": nats,
        "hits": hits,
    }
    columns |= {"targets": targets, "bytes": sizes}
    lists = [np.broadcast_to(column, len(nats)).tolist() for column in columns.values()]
    lines = [dict(zip(columns, line, strict=True)) for line in zip(*lists, strict=True)]
    return make_run(name, files={"losses.jsonl": lines} | dict(files), **how)


def compared(sums, n, weights=None, groups=None):
    weights = np.ones(len(sums[0])) if weights is None else weights
    groups = np.arange(len(weights)) if groups is None else groups
    rows = Rows("loss", np.array(sums), weights, groups)
    return difference.difference(rows, range(n), range(n, len(sums)))
