"""submission.csv as Kaggle wants it: probabilities of A, B and tie, averaged over runs and their folds, each
at the temperature that fits its validation rows."""

import csv
from pathlib import Path

import numpy as np

from lab.data.columns import LABELS
from lab.data.soft_labels import read_predictions
from lab.errors import UserError
from lab.measure.preference import HOTTEST, combine, fit_temperature, tempered
from lab.run.files import whole_file
from lab.run.stored import newest_run, out_folder


def folders_to_submit(cfg, script) -> list[str]:
    """cfg.run_folder, or the newest finished run. UserError for one that is named twice."""
    folders = list(cfg.run_folder or [str(newest_run(cfg, script, finished=True))])
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise UserError(f"--run_folder {' '.join(folders)}: a run is named twice, name each once")
    return folders


def place_of(folders, cfg, script) -> str:
    """submission.csv of a run in its folder, of several where runs are kept. An older one is removed, so that
    it is not taken for the result if this call fails."""
    path = (Path(folders[0]) if len(folders) == 1 else out_folder(cfg, script)) / "submission.csv"
    if len(folders) > 1:
        path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return str(path)


def validated(folder, cfg) -> tuple[list[float], str]:
    """(temperature of each fold's model, a line with the validation log loss) of a run, from its
    predictions.jsonl. A temperature is 1 without cfg.calibrate, and where all rows are right at any."""
    names, temperatures, losses = list(LABELS), [], []
    lines = [line for line in read_predictions(Path(folder) / "predictions.jsonl") if line["split"] == "val"]
    for fold in sorted({line.get("fold", 1) for line in lines}):
        some = [line for line in lines if line.get("fold", 1) == fold]
        orders = np.array([[line["as_is"], line["swapped_back"]] for line in some])
        log_probs = combine(np.log(np.maximum(orders, 1e-300)), cfg.symmetric)
        labels = np.array([names.index(line["label"]) for line in some])
        fitted = fit_temperature(log_probs, labels) if cfg.calibrate else 1.0
        temperatures.append(fitted if fitted > 1.01 / HOTTEST else 1.0)
        guesses = log_probs, tempered(log_probs, temperatures[-1])
        losses.append(np.array([-guess[np.arange(len(some)), labels] for guess in guesses]))
    before, after = np.concatenate(losses, axis=1).mean(1)
    used = " ".join(f"{temperature:.2f}" for temperature in temperatures)
    return temperatures, f"{folder}  validation log loss {before:.4f}, at temperature {used} {after:.4f}"


def note_known_rows(name, data, fingerprint, say):
    """Warns where the rows to predict are the run's own data, which hold its training rows."""
    known = [fingerprint["data"], *fingerprint.get("extra_data", [])]
    if data.fingerprint["data"] in known and not name.lower().endswith(".zip"):
        say(f"NOTE {name} holds the rows that the run was trained on: this tells nothing of new rows")


def write_submission(path, ids, probs):
    with whole_file(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", *LABELS.values()])
        for row_id, p in zip(ids, (probs / probs.sum(1, keepdims=True)).tolist(), strict=True):
            table.writerow([row_id, *p])
