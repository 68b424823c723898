"""The report card of A / B / tie verdicts: better than lengths alone? calibrated? the same when A and B
change places? Every figure with a 95 % interval by prompt."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lab.data.columns import LABELS
from lab.errors import UserError
from lab.measure.statistics import (
    bootstrap,
    class_shares,
    classification_metrics,
    not_below,
    plus_minus,
    span,
)
from lab.run import files

NAMES = list(LABELS)  # A, B, tie: the order of classes everywhere
BINS = 15  # of confidence, as Guo et al. (2017)
HOTTEST = 10.0  # a temperature is sought from a tenth of 1 to this
CLEARLY = 1.5  # a response is called longer than the other from half as much again


@dataclass
class Verdicts:
    """A model's log-probabilities for N rows, with their labels, groups and lengths. Classes: A, B, tie."""

    log_probs: np.ndarray  # (N, 2, 3): the row as it stands; A and B swapped, classes put back
    symmetric: bool  # the two are averaged
    labels: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) prompts
    prior: np.ndarray  # (N, 3) class shares of the training rows
    lengths: np.ndarray  # (N, 2) tokens of the whole responses
    cut: np.ndarray  # (N,) whether the model saw less than that, or less than the prompt
    by_length: np.ndarray  # (N, 3) log-probabilities of length_only
    temperatures: np.ndarray | None  # (N,) fitted on validation rows; none: these are the validation rows

    def final(self) -> np.ndarray:
        return combine(self.log_probs, self.symmetric)

    def longer(self) -> np.ndarray:
        """0 where A is the longer response, 1 where B is, 2 where they are equally long."""
        a, b = self.lengths.T
        return np.where(a > b, 0, np.where(b > a, 1, 2))

    def some(self, rows) -> "Verdicts":
        """The verdicts of a mask of rows."""
        arrays = {n: x[rows] for n, x in vars(self).items() if isinstance(x, np.ndarray)}
        return dataclasses.replace(self, **arrays)


def prior(data, train_rows) -> list[float]:
    """Class shares of the training rows of the data set that is measured, whatever other sets train."""
    return class_shares(data.labels[data.own(train_rows)], len(NAMES))


def combine(log_probs, symmetric) -> np.ndarray:
    """(N, 2, 3) -> (N, 3): log-probabilities of the first order, or of both orders' averaged logits."""
    if not symmetric:
        return log_probs[:, 0]
    return F.log_softmax(torch.from_numpy(log_probs).mean(1), dim=-1).numpy()


def confidence_bin(confidence) -> np.ndarray:
    """Index of each row's confidence bin; bins are open on the left."""
    return np.ceil(confidence * BINS).astype(int).clip(1, BINS) - 1


def calibration_gaps(log_probs, labels) -> np.ndarray:
    """(N, BINS): confidence minus correctness in the row's bin of confidence, 0 elsewhere.

    The expected calibration error is the sum over bins of |column mean| (Guo et al. 2017).
    """
    confidence, chosen = np.exp(log_probs).max(1), log_probs.argmax(1)
    gaps = np.zeros((len(labels), BINS))
    gaps[np.arange(len(labels)), confidence_bin(confidence)] = confidence - (chosen == labels)
    return gaps


def calibration_error(log_probs, labels, groups) -> tuple[float, list[float]]:
    """(expected calibration error, its 95 % interval).

    Redrawing adds noise to every |gap|, which would put the interval above the figure: it is reflected
    (basic bootstrap).
    """
    gaps = calibration_gaps(log_probs, labels)
    error = float(np.abs(gaps.mean(0)).sum())
    [[low, high]] = bootstrap(gaps, groups, of=lambda means: np.abs(means).sum(1, keepdims=True))
    return error, np.maximum(0.0, [2 * error - high, 2 * error - low]).tolist()  # NaN stays NaN


def calibration_noise(log_probs, samples=200, seed=0) -> float:
    """Mean calibration error that a perfectly calibrated model would show on so few rows, by simulation."""
    confidence, rng = np.exp(log_probs).max(1), np.random.default_rng(seed)
    chosen, errors = log_probs.argmax(1), []
    for _ in range(samples):
        labels = np.where(rng.random(len(chosen)) < confidence, chosen, -1)  # -1: some other class
        errors.append(np.abs(calibration_gaps(log_probs, labels).mean(0)).sum())
    return float(np.mean(errors))


def fit_temperature(log_probs, labels) -> float:
    """The T that minimises the log loss of softmax(log_probs / T), from 1 / 10 (all are right) to 10."""
    every, low, high = np.arange(len(labels)), 1 / HOTTEST, HOTTEST  # of 1 / T: the loss is convex in it
    for _ in range(60):
        beta = math.sqrt(low * high)
        probs = np.exp(tempered(log_probs, 1 / beta))
        slope = ((probs * log_probs).sum(1) - log_probs[every, labels]).mean()
        low, high = (low, beta) if slope > 0 else (beta, high)
    return 1 / beta


def tempered(log_probs, temperature) -> np.ndarray:
    return F.log_softmax(torch.from_numpy(log_probs / temperature), dim=-1).numpy()


def length_only(lengths, labels, train, wanted) -> np.ndarray:
    """(wanted, 3) log-probabilities of a softmax regression on the responses' lengths, fitted on `train`.

    It sees log(A / B), its absolute value and the total length: a model that reads must beat it.
    """
    log_lengths = np.log1p(lengths)
    difference = log_lengths[:, 0] - log_lengths[:, 1]
    columns = np.c_[difference, np.abs(difference), log_lengths.sum(1)]
    mean, width = columns[train].mean(0), columns[train].std(0) + 1e-9
    x = torch.from_numpy(np.c_[(columns - mean) / width, np.ones(len(columns))])
    y, weights = torch.from_numpy(labels[train]), torch.zeros(x.shape[1], 3, dtype=torch.float64)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x[train] @ weights, y) + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return (x[wanted] @ weights).log_softmax(-1).detach().numpy()


def macro_f1(chosen, labels, classes=3) -> float:
    """Mean over classes of 2 tp / (predicted + true); 0 where a class is neither."""
    hits = np.bincount(labels[chosen == labels], minlength=classes)
    both = np.bincount(chosen, minlength=classes) + np.bincount(labels, minlength=classes)
    return float((2 * hits / np.maximum(both, 1)).mean())


def make_card(v, names) -> dict:
    """All figures of result.json; `<name>_interval` is the 95 % interval of <name>.

    by_truncation and by_length hold the same figures for subsets of the rows.
    """
    card = figures(v, names)
    a, b = 1 + v.lengths.T
    parts = {"A longer": a > CLEARLY * b, "B longer": b > CLEARLY * a}
    parts["alike"] = ~(parts["A longer"] | parts["B longer"])
    card["by_length"] = {name: figures(v.some(rows), names) for name, rows in parts.items()}
    parts = {"whole": ~v.cut, "truncated": v.cut}
    card["by_truncation"] = {name: figures(v.some(rows), names) for name, rows in parts.items()}
    return card


def figures(v, names) -> dict:
    if not len(v.labels):
        return {"rows": 0}
    log_probs, longer = v.final(), v.longer()
    chosen = log_probs.argmax(1)
    card = classification_metrics(log_probs, v.labels, v.groups, v.prior, names)
    card |= {"prompts": len(set(v.groups)), "symmetric": v.symmetric}
    card |= _means(_columns(v, log_probs), v.groups)
    for label, name in enumerate(names):
        rows = v.labels == label
        card |= _means({f"recall_{name}": chosen[rows] == label}, v.groups[rows])
    for name, classes in (("prefers_longer", chosen), ("truth_prefers_longer", v.labels)):
        decided = (classes < 2) & (longer < 2)
        card |= _means({name: classes[decided] == longer[decided]}, v.groups[decided])
    error, interval = calibration_error(log_probs, v.labels, v.groups)
    card |= {"calibration_error": error, "calibration_error_interval": interval}
    card["calibration_error_of_noise"] = calibration_noise(log_probs)
    card["temperature"] = None if v.temperatures is None else float(v.temperatures.mean())
    card["macro_f1"] = macro_f1(chosen, v.labels, len(names))
    card["confusion"] = _confusion(v.labels, chosen, len(names)).tolist()  # [truth][verdict]
    return card


def _columns(v, log_probs) -> dict[str, np.ndarray]:
    """Loss and accuracy of each row by one order, by both averaged, by lengths alone, by
    the fitted temperature."""
    every = np.arange(len(v.labels))
    guesses = {"one_order": v.log_probs[:, 0], "averaged": combine(v.log_probs, True)}
    guesses["length_only"] = v.by_length
    if v.temperatures is not None:
        guesses["tempered"] = tempered(log_probs, v.temperatures[:, None])
    losses = {name: np.maximum(-guess[every, v.labels], 1e-15) for name, guess in guesses.items()}  # Kaggle's
    columns = {f"{name}_log_loss": loss for name, loss in losses.items()}
    columns |= {f"{name}_accuracy": guess.argmax(1) == v.labels for name, guess in guesses.items()}
    columns["flip_rate"] = v.log_probs[:, 0].argmax(1) != v.log_probs[:, 1].argmax(1)
    columns["above_length_only"] = -log_probs[every, v.labels] - losses["length_only"]
    columns["averaged_above_one_order"] = losses["averaged"] - losses["one_order"]
    truth = np.eye(log_probs.shape[1])[v.labels]
    return columns | {"brier": ((np.exp(log_probs) - truth) ** 2).sum(1)}


def _means(columns, groups) -> dict:
    """{name: mean, name_interval: ...} of each column, both None without any rows."""
    if not len(groups):
        return {key: None for name in columns for key in (name, f"{name}_interval")}
    values = np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()], axis=1)
    means, intervals = values.mean(0).tolist(), bootstrap(values, groups).tolist()
    named = zip(columns, means, intervals, strict=True)
    return {key: x for name, mean, both in named for key, x in ((name, mean), (f"{name}_interval", both))}


def _confusion(labels, chosen, classes) -> np.ndarray:
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, chosen), 1)
    return counts


def card_lines(card, where, names) -> list[str]:
    """The card as lines for one screen, each beginning with `where`."""

    def figure(name, digits=3):
        value = card[name]
        return "none" if value is None else plus_minus(value, card[f"{name}_interval"], digits)

    def shares(name):
        return " ".join(f"{label} {share:.0%}" for label, share in card[name].items())

    orders = "both orders averaged" if card["symmetric"] else "one order"
    tempered_line = []
    if card["temperature"] is not None:
        fitted = f"temperature  {card['temperature']:.2f}, fitted on validation"
        fitted += " (the limit)" * (not 1.01 / HOTTEST < card["temperature"] < HOTTEST / 1.01)
        loss, interval = card["tempered_log_loss"], card["tempered_log_loss_interval"]
        tempered_line = [f"{fitted} -> log loss {loss:.4f} ({span(interval)})"]
    recall = "   ".join(f"{name} {figure(f'recall_{name}')}" for name in names)
    lines = [
        f"{card['rows']} rows, {card['prompts']} prompts, {orders}; 95 % intervals by prompt",
        f"log loss     {figure('log_loss', 4)}   uniform {card['uniform_log_loss']:.4f}",
        f"accuracy     {figure('accuracy')}   most frequent class {card['prior_accuracy']:.3f}",
        f"class shares log loss {card['prior_log_loss']:.4f}   "
        f"model - class shares {figure('above_prior', 4)}",
        f"lengths only log loss {figure('length_only_log_loss', 4)}   "
        f"model - lengths only {figure('above_length_only', 4)}",
        f"             accuracy {figure('length_only_accuracy')}",
        f"one order    log loss {figure('one_order_log_loss', 4)}   accuracy {figure('one_order_accuracy')}",
        f"averaged     log loss {figure('averaged_log_loss', 4)}   accuracy {figure('averaged_accuracy')}",
        f"flips        {figure('flip_rate')} of one-order verdicts change when A and B are swapped",
        f"recall       {recall}",
        f"calibration  error {card['calibration_error']:.3f} "  # its interval is reflected: not symmetric
        f"({span(card['calibration_error_interval'], 3)})   "
        f"a calibrated judge's on so few rows {card['calibration_error_of_noise']:.3f}",
        *tempered_line,
        f"predicts     {shares('predicted')}   truth {shares('truth')}",
    ]
    return [f"{where}  {line}" for line in [*lines, *filter(None, [card["alarm"], lengths_alarm(card)])]]


def lengths_alarm(card) -> str | None:
    """A sentence if the model is not better than lengths alone."""
    how, ours = not_below(card["above_length_only_interval"]), card["log_loss"]
    if how is None:
        return None
    word = "WORSE" if how == "is above" else "NO BETTER"
    return f"{word} THAN LENGTHS: log loss {ours:.4f} {how} their {card['length_only_log_loss']:.4f}"


def draw(v, names, title, path):
    """Draws report.png: reliability diagram, confusion matrix, histogram of probabilities."""
    from matplotlib.figure import Figure

    log_probs = v.final()
    probs, chosen = np.exp(log_probs), log_probs.argmax(1)
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    figure.suptitle(title)
    reliability, confusion, histogram = figure.subplots(1, 3)
    _draw_reliability(reliability, probs.max(1), chosen == v.labels)
    counts = _confusion(v.labels, chosen, len(names))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    confusion.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (truth, verdict), share in np.ndenumerate(shares):
        text = f"{counts[truth, verdict]}\n{share:.0%}"
        confusion.text(verdict, truth, text, ha="center", va="center", color="w" if share > 0.5 else "k")
    confusion.set(xticks=range(3), xticklabels=names, yticks=range(3), yticklabels=names)
    confusion.set(title="confusion (share of the truth's row)", xlabel="verdict", ylabel="truth")
    for label, name in enumerate(names):
        style = {"bins": np.linspace(0, 1, 41), "histtype": "step", "linestyle": ("-", "--", "-.")[label]}
        histogram.hist(probs[:, label], label=f"P({name})", **style)
    histogram.set(title="probabilities", xlabel="probability", ylabel="rows", xlim=(0, 1))
    histogram.legend()
    figure.savefig(path, dpi=110)


def _draw_reliability(axes, confidence, right):
    """Draws accuracy against confidence in bins, with one standard error; bars show the share of rows."""
    inside = confidence_bin(confidence)
    rows = np.bincount(inside, minlength=BINS)
    full = np.flatnonzero(rows)
    mean = np.bincount(inside, confidence, BINS)[full] / rows[full]
    share = np.bincount(inside, right, BINS)[full] / rows[full]
    error = np.sqrt(np.maximum(share * (1 - share), 0.25 / rows[full]) / rows[full])
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="as sure as right")
    axes.errorbar(mean, share, error, marker="o", capsize=3, label="rows of a bin, one standard error")
    axes.bar(
        (np.arange(BINS) + 0.5) / BINS,
        rows / rows.sum(),
        1 / BINS,
        color="0.85",
        zorder=0,
        label="share of rows",
    )
    axes.set(
        title="reliability", xlabel="confidence of the verdict", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1)
    )
    axes.legend(loc="upper left")


def verdicts(cfg, data, splits, outcomes, part) -> tuple[np.ndarray, Verdicts]:
    """(rows, Verdicts) of a part; with folds every row once, judged by the model that had not seen it."""
    lengths, every = data.response_lengths(), []
    for split, outcome in zip(splits, outcomes, strict=True):
        rows, train_rows = split[part], data.own(split["train"])
        log_probs_of = {name: np.array(log_probs) for name, log_probs in outcome["log_probs"].items()}
        on_val = combine(log_probs_of["val"], cfg.symmetric)
        temperature = fit_temperature(on_val, data.labels[split["val"]])
        by_length = length_only(lengths, data.labels, train_rows, rows)
        facts = {
            "log_probs": log_probs_of[part],
            "prior": np.tile(prior(data, train_rows), (len(rows), 1)),
            "by_length": by_length,
        }
        every.append(facts | {"temperatures": np.full(len(rows), temperature)})
    rows = np.concatenate([split[part] for split in splits])
    facts = {name: np.concatenate([facts_of[name] for facts_of in every]) for name in every[0]}
    facts |= {"labels": data.labels[rows], "groups": data.groups[rows], "lengths": lengths[rows]}
    facts |= {} if part == "test" else {"temperatures": None}
    return rows, Verdicts(symmetric=cfg.symmetric, cut=data.cut[rows].any(1), **facts)


def make_cards(cfg, data, splits, outcomes) -> tuple[dict, dict, dict]:
    """Returns (figures of result.json, {part: (rows, Verdicts)}, {part: report card})."""
    verdicts_of = {part: verdicts(cfg, data, splits, outcomes, part) for part in outcomes[0]["log_probs"]}
    cards = {part: make_card(v, NAMES) for part, (_, v) in verdicts_of.items()}
    named = {f"{part}/{name}": value for part, card in cards.items() for name, value in card.items()}
    return named, verdicts_of, cards


def all_predictions(cfg, data, splits, verdicts_of):
    """Yields lines of predictions.jsonl: every held-out row, judged by the model that had not seen it."""
    for part, (rows, v) in verdicts_of.items():
        folds = np.repeat(np.arange(len(splits)), [len(split[part]) for split in splits])
        yield from predictions(data, rows, v, part, folds if cfg.folds else None)


def predictions(data, rows, v, part, folds):
    """Yields lines of predictions.jsonl, by which runs on the same rows are compared."""
    final = np.exp(v.final())
    for i, (row, shares, orders) in enumerate(zip(rows, final, np.exp(v.log_probs), strict=True)):
        line = {"id": data.ids[row], "row": int(row), "group": data.groups[row], "split": part}
        line |= {} if folds is None else {"fold": int(folds[i]) + 1}
        line |= {"label": NAMES[data.labels[row]], **dict(zip(NAMES, shares.tolist(), strict=True))}
        yield line | {"as_is": orders[0].tolist(), "swapped_back": orders[1].tolist()}


def read_outcome(path) -> dict:
    """What a fold's training returned. UserError if it is missing or damaged."""
    try:
        return files.read_sealed(path)
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged: use a copy of it, or start a new run") from None
