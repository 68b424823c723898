"""What a row teaches beside its winner: probabilities, from its columns or from runs that have judged it;
label smoothing; a weight."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from lab.data.columns import LABELS, SWAP
from lab.data.pair_layouts import UNKNOWN
from lab.errors import UserError
from lab.run.files import is_folder, sha256_file
from lab.train.processes import on_main


def teach(data, teachers, world):
    """Sets data.soft of rows without probabilities of their own: the mean of what `teachers` (runs, or their
    predictions.jsonl) said of them. Adds a line for each and its fingerprint."""
    known, lines, hashes = on_main(world, taught, data, teachers)
    data.lines, data.fingerprint = [*data.lines, *lines], data.fingerprint | {"teacher": hashes}
    soft = np.array([probs or [np.nan] * len(LABELS) for probs in known])
    data.soft = soft if data.soft is None else np.where(np.isnan(data.soft), soft, data.soft)


def taught(data, teachers) -> tuple[list, list[str], list[str]]:
    """([mean probabilities or None] of every row, lines, hashes of the files). A row is known by its id and
    its prompt; where two rows share both, neither has a teacher."""
    keys = list(zip(data.ids, data.groups.tolist(), strict=True))
    places = {key: row for row, key in enumerate(keys)}
    for key, count in Counter(keys).items():
        if count > 1:
            del places[key]
    sums, counts, lines, hashes = np.zeros((len(keys), len(LABELS))), np.zeros(len(keys)), [], []
    for name in teachers:
        path = Path(name) / "predictions.jsonl" if is_folder(name) else Path(name)
        said = {places[key]: probs for key, probs in judged(path, data, places).items()}
        rows = list(said)
        sums[rows] += np.array(list(said.values())).reshape(-1, len(LABELS))
        counts[rows] += 1
        lines.append(f"teacher {path}: soft labels of {len(said)} of {len(keys)} rows")
        hashes.append(sha256_file(path))
    pairs = zip((sums / np.maximum(counts, 1)[:, None]).tolist(), counts, strict=True)
    return [probs if count else None for probs, count in pairs], lines, hashes


def judged(path, data, places) -> dict:
    """(id, prompt) -> probabilities of a predictions.jsonl, of rows in `places`. Of a run with folds: by the
    model that had neither trained nor validated on the row. UserError where the winners are others."""
    lines = read_predictions(path)
    if any("fold" in line for line in lines):
        lines = [line for line in lines if line["split"] == "test"]
    keys = Counter((line["id"], line["group"]) for line in lines)
    found, odd = {}, 0
    for line in lines:
        key = line["id"], line["group"]
        if keys[key] == 1 and key in places:
            label = data.labels[places[key]]
            odd += label != UNKNOWN and list(LABELS)[label] != line["label"]
            found[key] = [line[name] for name in LABELS]
    if odd > 0.01 * len(found):
        raise UserError(
            f"teacher {path}: {odd} of {len(found)} rows have another winner here: not these rows"
        )
    return found


def read_predictions(path) -> list[dict]:
    """The lines of a run's predictions.jsonl. UserError where it is none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name a finished run, or the file"
        ) from None
    except (ValueError, RecursionError):
        lines = [None]
    needed = {"id", "group", "split", "label", *LABELS}
    if not all(isinstance(line, dict) and needed <= line.keys() for line in lines):
        raise UserError(f"{path} is no predictions.jsonl, or is damaged: python eval.py --run writes it anew")
    return lines


def soft_line(data, rows, cfg) -> str | None:
    """How many of the training rows have a soft label. UserError where they should and none has."""
    if data.soft is None:
        if "soft_share" in cfg.typed.flags:
            raise UserError(
                "--soft_share is of soft labels, and there are none: add --teacher, or columns prob_*"
            )
        return None
    known = int((~np.isnan(data.soft[rows["train"], 0])).sum())
    if not known:
        better = "drop the columns"
        if cfg.teacher:
            better = "use a teacher run with --folds, which judges every row"
        if cfg.teacher and np.isnan(data.soft).all():
            better = "the teacher has judged other rows (they are matched by id and prompt)"
        raise UserError(f"no training row has a soft label: {better}")
    rest, silent = len(rows["train"]) - known, int((data.labels[rows["train"]] == UNKNOWN).sum())
    counts = f"{cfg.soft_share:g}" + f" (1 in {silent} without a winner)" * (silent > 0)
    return f"soft labels  {known} training rows, KL counts {counts}; {rest} have their winner alone"


def are_learnt(data, cfg) -> bool:
    """Whether training looks at more than the winners."""
    return data.soft is not None or cfg.label_smoothing > 0


def row_targets(data, cfg, shown) -> tuple[torch.Tensor, float]:
    """Of pairs (row, whether A and B are swapped): class numbers (B,), or probabilities times the row's
    weight (B, 3). And the soft labels' entropy, by which cross-entropy exceeds their KL divergence."""
    rows, swaps = zip(*shown, strict=True)
    labels = data.labels[list(rows)]
    if data.weights is None and not are_learnt(data, cfg):
        return torch.tensor([SWAP[y] if swap else int(y) for y, swap in zip(labels, swaps, strict=True)]), 0.0
    classes, entropy = len(LABELS), 0.0
    probs = (1 - cfg.label_smoothing) * np.eye(classes)[labels] + cfg.label_smoothing / classes
    weights = data.weights_of(list(rows))[:, None]
    if data.soft is not None:
        soft = data.soft[list(rows)]
        share = np.where(labels == UNKNOWN, 1.0, cfg.soft_share)[:, None] * ~np.isnan(soft)
        soft = np.nan_to_num(soft)
        entropy = -float((weights * share * soft * np.log(np.where(soft > 0, soft, 1))).sum())
        probs = (1 - share) * probs + share * soft
    shown_probs = np.where(np.array(swaps)[:, None], probs[:, SWAP], probs)
    return torch.tensor(weights * shown_probs, dtype=torch.float32), entropy
