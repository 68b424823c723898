"""A language model on the held-out part of each of several texts: by document, and several texts as one."""

from dataclasses import dataclass

import numpy as np

from lab.data.mixture import label, labelled_shares, windows_of
from lab.errors import UserError
from lab.measure.language import evaluate, loss_lines, unigram_alarm
from lab.measure.statistics import language_metrics


def held_out_windows(cfg, text, name, part):
    """(held-out windows, document of each); of val at most eval_rows, spread evenly.
    UserError without any."""
    windows, groups = windows_of(text.tokens[name], part, cfg.block_size)
    if not len(windows):
        raise UserError(f"{name} leaves no {part} text: use more documents, or a larger --{part}_share")
    most = cfg.eval_rows if part == "val" else None
    if most and most < len(windows):
        chosen = np.linspace(0, len(windows) - 1, most).round().astype(int)
        windows.windows, groups = [windows.windows[i] for i in chosen], groups[chosen]
        windows.lengths = windows.lengths[chosen]
    return windows, groups


def require_windows(cfg, text, parts):
    """UserError unless every text leaves something to measure in every part, under a name of its own."""
    if "own" in text.tokens:
        why = "its figures would take the place of test/own/..., those of all sources together"
        raise UserError(f"a text is called own: {why}; name it otherwise by --sources name=where")
    for name in text.tokens:
        for part in parts:
            held_out_windows(cfg, text, name, part)


@dataclass
class MeasuredText:
    """A model's sums (windows, 3) on one held-out text, and the baseline that they are compared with."""

    sums: np.ndarray
    groups: np.ndarray  # document of each window
    plain: np.ndarray  # (windows,): summed loss by the training text's token frequencies
    spelt: np.ndarray  # (windows,): bytes of the targets

    def figures(self) -> dict:
        return language_metrics(self.sums, self.groups, self.plain, self.spelt)

    def lines(self, part) -> list[dict]:
        return loss_lines(part, np.arange(len(self.sums)), self.groups, self.sums, self.spelt)


def measure_text(model, cfg, text, name, part, world, poll) -> MeasuredText:
    """Measures a model that was trained on cfg.data on the held-out part of text `name`."""
    windows, groups = held_out_windows(cfg, text, name, part)
    frequencies = text.frequencies(labelled_shares(cfg.data))
    log_share = np.log((frequencies + 1) / (frequencies.sum() + len(frequencies)))
    plain, spelt = (
        np.array([of[ids].sum() for ids in windows.target_ids()]) for of in (-log_share, text.sizes)
    )
    return MeasuredText(evaluate(model, windows, cfg, world, poll), groups, plain, spelt)


def pooled(parts) -> MeasuredText:
    """Several texts as one; documents stay apart."""
    groups, offset = [], 0
    for part in parts:
        groups.append(part.groups + offset)
        offset += part.groups.max() + 1
    sums, plain, spelt = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("sums", "plain", "spelt")
    )
    return MeasuredText(sums, np.concatenate(groups), plain, spelt)


BRIEF = ("loss", "loss_interval", "perplexity", "accuracy", "bits_per_byte")  # kept of a single source


def figures_of_part(model, cfg, text, part, world, poll) -> tuple[dict, MeasuredText]:
    """Figures of one part: on the neutral text (test/loss, test/accuracy ...), on the sources of cfg.data
    together (test/own/..., with an alarm), on each (test/<source>/...). Also the neutral text as measured."""
    neutral, *sources = names = [label(cfg.neutral), *labelled_shares(cfg.data)]
    measured = {name: measure_text(model, cfg, text, name, part, world, poll) for name in names}
    own = pooled([measured[name] for name in sources]).figures()
    own["alarm"] = unigram_alarm(own, "own loss")
    figures = {f"{part}/{name}": value for name, value in measured[neutral].figures().items()}
    figures |= {f"{part}/own/{name}": value for name, value in own.items()}
    for name in sources:
        source = measured[name].figures()
        figures |= {f"{part}/{name}/{figure}": source[figure] for figure in BRIEF}
    return figures, measured[neutral]
