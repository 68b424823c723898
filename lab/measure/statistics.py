"""Figures with intervals: bootstrap by group, Student's t, metrics of language models and of classes."""

import math

import numpy as np


def bootstrap(values, groups, *, weights=None, samples=2000, seed=0, of=None) -> np.ndarray:
    """95 % bootstrap intervals (columns, 2) of the column means of `values` (rows, columns).

    Redraws whole groups (prompts, documents), since rows of one group are not independent. `weights` (rows,):
    how much a row counts, e.g. its number of targets. `of`: a function of means, (samples, columns) ->
    (samples, figures), whose intervals are returned instead. A column of only zeros or only ones gets the
    rule of three, a width of 3 / number of groups. NaN where nothing shows the spread: one group, or other
    values that are all equal.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.zeros((index.max() + 1, values.shape[1] + 1))  # per group: of every column, and its weight
    np.add.at(sums, index, np.c_[values * weights[:, None], weights])
    rng, n = np.random.default_rng(seed), len(sums)
    draws, most = [], max(1, 2**15 // n)  # samples at once: they stay in the cache
    for start in range(0, samples, most):
        chosen = rng.integers(n, size=(min(most, samples - start), n))
        numbered = chosen + n * np.arange(len(chosen))[:, None]
        counts = np.bincount(numbered.ravel(), minlength=chosen.size).reshape(chosen.shape) * 1.0
        draws += [row @ sums for row in counts]
    draws = np.stack(draws)
    means = draws[:, :-1] / draws[:, -1:]
    intervals = np.percentile(means if of is None else of(means), tails(n), axis=0).T
    intervals[:] = np.nan if n == 1 else intervals
    if of is not None:
        return intervals
    intervals[(values == values[0]).all(0)] = np.nan
    for column, shares in enumerate(values.T):
        if interval := rule_of_three(shares, n):
            intervals[column] = interval
    return intervals


def rule_of_three(shares, groups) -> tuple[float, float] | None:
    """The 95 % interval of shares (rows,) that are all 0 or all 1, in so many groups; none for others."""
    if (shares == 0).all():
        return 0.0, min(1.0, 3 / groups)
    return (max(0.0, 1 - 3 / groups), 1.0) if (shares == 1).all() else None


def tails(n) -> list[float]:
    """Percentiles that bound a 95 % interval over n redrawn groups: 2.5 and 97.5 for many.

    For few, Hesterberg's expanded percentiles (2015), with Student's t to first order in 1 / (n - 1).
    """
    t = 1.96 + (1.96**3 + 1.96) / (4 * max(n - 1, 1))
    tail = 50 * (1 - math.erf(t * math.sqrt(n / max(n - 1, 1) / 2)))
    return [tail, 100 - tail]


def student(freedom) -> float:
    """The two-sided 95 % quantile of Student's t, by integrating over t = sqrt(freedom) tan(angle)."""
    angle = np.linspace(0, math.pi / 2, 200_001)[:-1]
    area = np.cumsum(np.cos(angle) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(angle[np.searchsorted(area, 0.95 * area[-1])])


def language_metrics(sums, groups, unigram=None, byte_counts=None) -> dict:
    """Loss per target token, perplexity, accuracy of the likeliest token, with 95 % intervals by group.

    sums (rows, 3): summed loss in nats, hits, targets. unigram (rows,): summed loss under token frequencies,
    a baseline. byte_counts (rows,): UTF-8 bytes of the text behind the targets, for bits per byte, which
    compares tokenizers (the loss of an end token counts, though it spells nothing).
    """
    targets, given = sums[:, 2], [] if unigram is None else [unigram, sums[:, 0] - unigram]
    values = np.column_stack([sums[:, 0], sums[:, 1], *given]) / targets[:, None]
    intervals = bootstrap(values, groups, weights=targets).tolist()
    loss, accuracy, *others = np.average(values, axis=0, weights=targets).tolist()
    metrics = {"loss": loss, "loss_interval": intervals[0], "perplexity": math.exp(min(loss, 700))}
    metrics |= {"accuracy": accuracy, "accuracy_interval": intervals[1]}
    if given:
        metrics |= {"unigram_loss": others[0], "above_unigram_interval": intervals[3]}
    if byte_counts is not None and byte_counts.sum():
        both = np.c_[sums[:, 0] / math.log(2), byte_counts] / targets[:, None]
        ratio = {"weights": targets, "of": lambda means: means[:, :1] / means[:, 1:]}
        metrics |= {"bits_per_byte": sums[:, 0].sum() / math.log(2) / byte_counts.sum()}
        metrics |= {"bits_per_byte_interval": bootstrap(both, groups, **ratio).tolist()[0]}
        metrics |= {"bytes": round(float(byte_counts.sum()))}
    return metrics | {"targets": int(targets.sum()), "rows": len(sums)}


def classification_metrics(log_probs, labels, groups, prior, names) -> dict:
    """Log loss and accuracy with 95 % intervals by group, beside the uniform guess and the class shares.

    log_probs (N, classes); prior: class shares of the training rows, (classes,) or (N, classes). `alarm` is a
    sentence when nothing was learnt: always the same class, or a log loss not below the prior's.
    """
    log_probs, labels, every = np.asarray(log_probs), np.asarray(labels), np.arange(len(labels))
    prior = np.broadcast_to(np.clip(prior, 1e-12, None), log_probs.shape)
    chosen, loss, prior_loss = log_probs.argmax(1), -log_probs[every, labels], -np.log(prior[every, labels])
    intervals = bootstrap(np.c_[loss, chosen == labels, loss - prior_loss], groups).tolist()
    metrics = {
        "log_loss": float(loss.mean()),
        "log_loss_interval": intervals[0],
        "accuracy": float((chosen == labels).mean()),
        "accuracy_interval": intervals[1],
        "rows": len(labels),
        "uniform_log_loss": math.log(len(names)),
        "prior_log_loss": float(prior_loss.mean()),
        "prior_accuracy": float((labels == prior.argmax(1)).mean()),
        "above_prior": float((loss - prior_loss).mean()),  # below 0: something was learnt
        "above_prior_interval": intervals[2],  # row by row
        "predicted": dict(zip(names, class_shares(chosen, len(names)), strict=True)),
        "truth": dict(zip(names, class_shares(labels, len(names)), strict=True)),
    }
    return metrics | {"alarm": _alarm(metrics)}


def class_shares(labels, classes) -> list[float]:
    """(classes,): share of each class."""
    return (np.bincount(labels, minlength=classes) / len(labels)).tolist()


def _alarm(metrics) -> str | None:
    name, share = max(metrics["predicted"].items(), key=lambda item: item[1])
    if share == 1.0:
        return f"NOT LEARNING: every one of {metrics['rows']} rows is called '{name}'"
    if how := not_below(metrics["above_prior_interval"]):
        loss, prior = metrics["log_loss"], metrics["prior_log_loss"]
        return f"NOT LEARNING: log loss {loss:.4f} {how} the class shares' {prior:.4f}"
    return None


def is_known(interval) -> bool:
    """Whether an interval has ends: those of a single group are NaN."""
    return interval is not None and all(end is not None and math.isfinite(end) for end in interval)


def not_below(interval) -> str | None:
    """Words for a loss minus a baseline's, whose 95 % interval this is; none where the loss is below."""
    low, high = interval
    return None if high < 0 else "is above" if low > 0 else "cannot be told from"


def span(interval, digits=4, sign="") -> str:
    """Formats an interval as `0.460 to 0.486`, or `unknown`."""
    return " to ".join(f"{end:{sign}.{digits}f}" for end in interval) if is_known(interval) else "unknown"


def plus_minus(value, interval, digits=3) -> str:
    """Formats `0.473 ± 0.013`, half the interval's width; `0.000 (0 to 0.03)` where it is one-sided;
    `0.473 ± unknown`."""
    if not is_known(interval):
        return f"{value:.{digits}f} ± unknown"
    low, high = interval
    if value in (low, high) and low != high:
        return f"{value:.{digits}f} ({low:.3g} to {high:.3g})"
    return f"{value:.{digits}f} ± {(interval[1] - interval[0]) / 2:.{digits}f}"
