"""Which option does the model choose? Multiple choice by likelihood, beside controls without the problem."""

import functools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from lab.data.columns import LETTERS
from lab.data.instructions import Examples
from lab.data.problems import FIRST, split
from lab.data.split import final_parts
from lab.data.tokenizers import id_count, token_bytes
from lab.measure import tuning
from lab.measure.answers import answers as greedy_answers
from lab.measure.answers import shortened
from lab.measure.language import evaluate, loss_lines
from lab.measure.statistics import bootstrap, language_metrics, plus_minus
from lab.run.files import write_lines
from lab.run.terminal import one_line
from lab.train.loss import IGNORE_INDEX
from lab.train.optim import count_parameters
from lab.train.precision import Precision
from lab.train.processes import on_main

CHANCE = 1 / len(LETTERS)
JOURNAL_LENGTH = 1024  # journal 004 padded each row to a multiple of it


class Choices(Examples):
    """Every option of every row after its problem, for `evaluate`: example 5 i + o is option o of row i.

    Targets are the option's tokens and the end token, without which `3` could never be less likely than `38`.
    `asked` (rows,): the row whose problem stands before the options of each row; none: its own.
    """

    def __init__(self, data, rows, asked=None):
        self.data, self.rows, self.asked = data, rows, rows if asked is None else asked
        self.prompts = data.pieces[self.asked, 0] + data.pieces[rows, 1]
        lengths = self.prompts[:, None] + data.pieces[rows, FIRST:]
        self.lengths, self.max_length, self.loss_on_prompt = lengths.reshape(-1), None, False

    def __len__(self):
        return len(self.lengths)

    def masked(self, examples):
        return self.prompts[np.asarray(examples) // len(LETTERS)] - 1

    def pair(self, example):
        row, option = divmod(example, len(LETTERS))
        ids, masked = self.data.ended(self.asked[row], self.rows[row], option), int(self.masked([example])[0])
        return ids[:-1], [IGNORE_INDEX] * masked + ids[1 + masked :]


@dataclass
class Scores:
    """A model's log-likelihood of every option (rows, 5), and the same per target token."""

    plain: np.ndarray
    per_token: np.ndarray

    @classmethod
    def of(cls, model, choices, cfg, world, poll):
        # rounded, close options would be equal, and the first one chosen
        exact = cfg if cfg.dtype == "fp64" else replace(cfg, dtype="fp32")
        sums = evaluate(model, choices, exact, world, poll)
        plain, targets = -sums[:, 0].reshape(-1, len(LETTERS)), sums[:, 2].reshape(-1, len(LETTERS))
        return cls(plain, plain / targets)

    def right(self, data, rows) -> np.ndarray:
        """(rows, 2): whether the likeliest option, plain and per token, has the text of the right one."""
        texts = np.array([data.options[row] for row in rows])
        answer, every = texts[np.arange(len(rows)), data.right[rows]], np.arange(len(rows))
        chosen = (scores.argmax(1) for scores in (self.plain, self.per_token))
        return np.stack([texts[every, of] == answer for of in chosen], axis=1).astype(float)


def some(rows, n) -> np.ndarray:
    """`n` of the rows, spread evenly; none: all."""
    n = len(rows) if n is None else min(n, len(rows))
    return rows[np.linspace(0, len(rows) - 1, n).round().astype(int)]


def shuffled_problems(data, rows, most=10**9) -> np.ndarray:
    """For each row the row whose problem replaces its own in the control: a different problem where there is
    one, of a length that fits."""
    order = np.random.default_rng(0).permutation(len(rows))
    asked = np.empty_like(rows)
    asked[order] = rows[np.roll(order, 1)]
    prompts, room = data.pieces[:, 0], most - data.pieces[rows, 1] - data.pieces[rows, FIRST:].max(1)
    for i in np.flatnonzero((data.groups[asked] == data.groups[rows]) | (prompts[asked] > room)):
        others = np.flatnonzero((data.groups[rows] != data.groups[rows[i]]) & (prompts[rows] <= room[i]))
        asked[i] = rows[others[i % len(others)]] if len(others) else rows[i]
    return asked


def answer_figures(model, data, rows, train, cfg, world, poll) -> tuple[dict, list[dict]]:
    """Accuracy of the likeliest option, plain and per token; of always the most frequent letter of training;
    of the control, with problems shuffled among rows. Intervals are by problem.

    Also returns a line for each row: number, group, scores, and which choices were right.
    """
    own = Scores.of(model, Choices(data, rows), cfg, world, poll)
    control = Scores.of(
        model, Choices(data, rows, shuffled_problems(data, rows, cfg.max_length)), cfg, world, poll
    )
    usual = Counter(data.right[train].tolist()).most_common(1)[0][0]
    right, shuffled = own.right(data, rows), control.right(data, rows)
    values = np.c_[right, shuffled, data.right[rows] == usual, right - shuffled]
    names = ("answer_accuracy", "answer_accuracy_per_token", "shuffled_accuracy")
    names = (*names, "shuffled_accuracy_per_token", "letter_accuracy")
    names = (*names, "above_shuffled", "above_shuffled_per_token")
    figures, intervals = {}, bootstrap(values, data.groups[rows]).tolist()
    for name, value, interval in zip(names, values.mean(0).tolist(), intervals, strict=True):
        figures |= {name: value, f"{name}_interval": interval}
    lines = [
        {"row": number, "group": group, "right": bool(r[0]), "right_per_token": bool(r[1]),
         "right_shuffled": bool(c), "scores": scores, "answer": LETTERS[answer]}
        for number, group, r, c, scores, answer in zip(
            data.numbers[rows].tolist(), data.groups[rows].tolist(), right, shuffled[:, 0],
            own.plain.round(5).tolist(), data.right[rows].tolist(), strict=True)
    ]  # fmt: skip
    return figures | {"letter": LETTERS[usual]}, lines


def answer_lines(part, m) -> list[str]:
    """Lines for the terminal. `m`: the figures of answer_figures, named <part>/<name>."""

    def figure(name):
        return plus_minus(m[f"{part}/{name}"], m[f"{part}/{name}_interval"])

    lines = [
        f"{part:5} answers {figure('answer_accuracy')}  per token {figure('answer_accuracy_per_token')}  "
        f"of five: {CHANCE:.3f}  always {m[f'{part}/letter']}: {m[f'{part}/letter_accuracy']:.3f}",
        f"{part:5} control, problems shuffled: {figure('shuffled_accuracy')}  "
        f"per token {figure('shuffled_accuracy_per_token')}",
    ]
    if m[f"{part}/answer_accuracy_interval"][1] < guess(part, m):
        lines.append(f"{part:5} answers are worse than guessing")
    elif not above_guessing(part, m):
        lines.append(f"{part:5} answers cannot be told from guessing")
    elif not knows(part, m):
        why = "options give themselves away"
        lines.append(f"{part:5} answers are no better than without the problem: {why}")
    return lines


def guess(part, m) -> float:
    """The accuracy of the better guess: any option, or always the most frequent letter."""
    return max(CHANCE, m[f"{part}/letter_accuracy"])


def above_guessing(part, m) -> bool:
    """Whether answers beat chance and the most frequent letter."""
    return m[f"{part}/answer_accuracy_interval"][0] > guess(part, m)


def knows(part, m) -> bool:
    """Whether answers beat both guesses and the control."""
    return above_guessing(part, m) and m[f"{part}/above_shuffled_interval"][0] > 0


def over_padding(sums, examples) -> float:
    """Journal 004's token accuracy: hits over every position of rows padded to a multiple of 1,024."""
    positions = np.ceil((examples.lengths + 1) / JOURNAL_LENGTH) * JOURNAL_LENGTH
    return float(sums[:, 1].sum() / positions.sum())


def examples_of(data, cfg) -> tuple[dict[str, Examples], list[str]]:
    """The parts of `split` as Examples, and lines on their rows."""
    rows, lines = split(data, cfg)
    # inputs of max_length tokens: the last token is only a target
    most = cfg.max_length + 1
    return {name: Examples(data, of, most, cfg.loss_on_prompt) for name, of in rows.items()}, lines


def measure(model, part, parts, data, cfg, world, poll, answers=True) -> tuple[dict, list[dict], list[dict]]:
    """Measures a whole part: (figures by name, lines of losses.jsonl, lines of answers.jsonl).

    Answers take ten forwards of each row; without `answers` there are none.
    """
    examples = parts[part]
    sums = evaluate(model, examples, cfg, world, poll)
    spelt = spelt_bytes(examples)
    unigram = unigram_losses(examples, parts["train"])
    metrics = language_metrics(sums, data.groups[examples.rows], unigram, spelt)
    metrics["accuracy_over_padding"] = over_padding(sums, examples)
    answered, lines = {}, []
    if answers:
        answered, lines = answer_figures(model, data, examples.rows, parts["train"].rows, cfg, world, poll)
    numbers, groups = data.numbers[examples.rows], data.groups[examples.rows]
    losses = loss_lines(part, numbers, groups, sums, spelt)
    return {f"{part}/{name}": value for name, value in (metrics | answered).items()}, losses, lines


def unigram_losses(examples, train) -> np.ndarray:
    """(rows,): summed loss of each row's targets under the token frequencies of the training targets."""
    logs = log_shares(train)
    return np.array([-logs[ids].sum() for ids in examples.target_ids()])


@functools.lru_cache(maxsize=1)
def log_shares(train) -> np.ndarray:
    """(V,): log share of each token among the training targets, with Witten-Bell smoothing: adding one to
    each of 50,000 tokens, as Examples.log_frequencies does, would drown five letters."""
    ids = np.concatenate(train.target_ids())
    counts = np.bincount(ids, minlength=id_count(train.data.tokenizer)).astype(float)
    kinds = np.count_nonzero(counts)
    counts[counts == 0] = kinds / max(1, len(counts) - kinds)
    return np.log(counts / counts.sum())


def spelt_bytes(examples) -> np.ndarray:
    """(rows,): bytes that each row's targets spell."""
    sizes = token_bytes(examples.data.tokenizer)
    return np.array([sizes[ids].sum() for ids in examples.target_ids()], dtype=np.int64)


def measure_parts(model, data, parts, cfg, world, poll) -> tuple[dict, list[dict], list[dict]]:
    """(figures of val and test, lines of losses.jsonl and of answers.jsonl); answers the last part only."""
    figures, names = {}, final_parts(cfg)
    for part in names:
        found, losses, lines = measure(model, part, parts, data, cfg, world, poll, part == names[-1])
        figures |= found
    return figures, losses, lines


def final_figures(run, cfg, data, parts, plain, model) -> dict:
    """Final figures: loss, perplexity, accuracy on val and test; answers to the last part; forgetting; an
    alarm if nothing was learnt. Says them, and writes losses.jsonl and answers.jsonl."""
    figures, losses, lines = measure_parts(model, data, parts, cfg, run.world, run.poll)
    for part in final_parts(cfg):
        say_part(run, cfg, part, figures)
    for line in answer_lines(part, figures):
        run.say(line)
    alarm = tuning.alarm(run, run.step, part, figures)
    # few steps may teach answers before they teach their spelling
    if alarm and not knows(part, figures):
        run.say(alarm)
        figures["alarm"] = alarm
    if plain:
        figures |= tuning.forgetting(run, cfg, plain, model)
    on_main(run.world, write_lines, run.folder / "losses.jsonl", losses)
    on_main(run.world, write_lines, run.folder / "answers.jsonl", lines)
    loss, perplexity = figures[f"{part}/loss"], figures[f"{part}/perplexity"]
    run.say(f"done  {part} loss {loss:.4f}  perplexity {perplexity:.2f}  {run.seconds / 60:.1f} min")
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"next: python eval.py --run {run.folder}")
    return figures


def say_part(run, cfg, part, figures):
    """Says loss, perplexity and accuracy of a part, and its accuracy as the journal counted."""
    m = {name.removeprefix(f"{part}/"): value for name, value in figures.items()}
    loss = plus_minus(m["loss"], m["loss_interval"], 4)
    accuracy = plus_minus(m["accuracy"], m["accuracy_interval"])
    guess = f"unigram loss {m['unigram_loss']:.4f}"
    run.say(f"{part:5} loss {loss}  perplexity {m['perplexity']:.2f}  accuracy {accuracy}  {guess}")
    hits, share = "hits" if cfg.loss_on_prompt else "an answer's hits", m["accuracy_over_padding"]
    run.say(f"{part:5} accuracy as journal 004 counted, {hits} / all positions of padded rows: {share:.4f}")


def announce(run, cfg, data, parts, units, lines, model, total_steps):
    """Says what is about to be trained on what; begins the run."""
    (total, trains), method, train = count_parameters(model), cfg.method, parts["train"]
    counts = "  ".join(f"{name} {len(part)}" for name, part in parts.items())
    method += f" r={cfg.lora_rank}" if method != "full" else " int4" if cfg.qat != "off" else ""
    run.say(f"model {method} of {total / 1e6:.1f}M parameters, {trains:,} trainable   {counts}")
    run.begin(total_steps)
    run.say(f"from {cfg.init_from}\ndata {cfg.data}  {len(data)} rows")
    for line in [*data.lines, *lines]:
        run.say(line)
    tokens, targets = train.lengths.mean(), train.targets(range(len(train))).mean()
    run.say(f"train rows have {tokens:.0f} tokens, {targets:.1f} of them targets")
    if left := len(units) % cfg.batch:
        run.say(f"each epoch leaves out {left} of {len(units)} (other ones each time): they fill no batch")
    if cfg.max_steps is cfg.epochs is None:
        run.say("the clock ends this run: its number of steps is estimated at each line")
    if cfg.optimizer == "lion" and cfg.batch < 64:
        run.say(f"NOTE Lion is recommended for batches of 64 and more, not {cfg.batch}")


def sample(run, cfg, at, model, data, rows):
    """Writes what the model generates after problems to samples.jsonl and TensorBoard; says the first."""
    if not cfg.sample_tokens:
        return
    prompts, decode = [data.prompt(row) for row in rows], data.tokenizer.decode
    with Precision(cfg.dtype, run.world).generation():
        how = (cfg.sample_tokens, len(rows), run.world, at.poll)
        texts = greedy_answers(model, data.tokenizer, prompts, *how)
    asked = [one_line(decode(prompt)) for prompt in prompts]
    run.samples(at.step, [f"{problem}\n{text}" for problem, text in zip(asked, texts, strict=True)])
    right = decode(data.whole(rows[0])[len(prompts[0]) : -1]).strip()
    written = shortened(one_line(texts[0]), 20)
    run.say(f"  | {shortened(asked[0], 46)} -> {written} (right: {shortened(right, 16)})")
