"""Small preference pairs and runs."""

import csv
import json

from lab.data import columns


def row(number=0, winner="winner_model_a", **changes):
    texts = {"prompt": ["hello there", None], "response_a": ["general", "no"], "response_b": ["who?", "yes"]}
    flags = {column: int(column == winner) for column in columns.LABELS.values()}
    return {"id": number, **{k: json.dumps(v) for k, v in texts.items()}, **flags, **changes}


def write_csv(rows, name="train.csv"):
    with open(name, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return name
