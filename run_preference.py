"""Which of two answers does a person prefer? A / B / tie with a BERT-family encoder (journal 000, LMSYS
Arena).

An encoder reads side A and side B (prompt and answer), the two first-token vectors go through an MLP head.

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_preference.py
    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_preference.py --resume_timestamp auto
    python run_preference.py --smoke
    python run_preference.py --data train.csv --model bert-base-uncased --folds 5

--data takes a Hub id, a CSV, JSON, JSONL or Parquet file (also in Kaggle's zip), a folder, or python-pairs
(built in). Each run is a folder under runs/run_preference/; result.json and predictions.jsonl hold its
outcome.
"""

import functools
import hashlib
import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

import core
import runs


@dataclass(frozen=True)
class Config:
    # data
    data: str = "lmsys/lmsys-arena-human-preference-55k"  # Hub id, file, zip, folder, or python-pairs
    max_documents: int | None = None  # rows read; none = all
    split_seed: int = 42  # of the 80/10/10 split or the folds: the same rows for every seed
    folds: int | None = None  # k-fold cross-validation by prompt, for small sets; none = one 80/10/10 split
    inputs: Literal["responses", "prompt+responses"] = "prompt+responses"  # the journal's run 1, run 2
    max_length: int = 512  # tokens per side, special tokens included
    # model
    model: str = "distilbert-base-uncased"  # Hub id, folder, or tiny:<family>
    dropout: float = 0.1  # in the head
    encoder_dropout: float | None = None  # of hidden states and attention; none = as pretrained
    # optimisation
    batch: int = 32  # rows per optimizer step, over all ranks
    micro_batch: int | None = None  # rows per forward and rank; none = all of the rank's rows
    epochs: int = 3
    max_steps: int | None = None  # optimizer steps (per fold)
    max_minutes: float | None = None  # of training (all folds together), over resumes
    lr: float = 1e-5  # peak
    min_lr: float = 0.0
    warmup: float = 0.1  # fraction of all steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01  # of matrices
    clip: float | None = 1.0  # global gradient norm; none = off
    skip_spikes: bool = False  # no update by a step whose loss or gradient norm leaves its band
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"  # bf16 from Ampere on; fp16 uses a GradScaler
    compile: bool = False
    seed: int = 0
    # evaluation and logging
    eval_batch: int = 64  # rows per evaluation step, over all ranks
    eval_every: int | None = None  # steps; none = each epoch
    final_eval: bool = True  # the test rows, once, at the end
    test_weights: Literal["best", "last"] = "best"  # lowest validation loss, or the final ones
    save_every: int | None = None  # steps; none = at each evaluation, before it
    keep: int = 2  # checkpoints
    log_every: int = 50  # steps
    price_per_hour: float | None = None  # dollars for the whole box
    note: str = ""
    # run
    out: str | None = None  # none = runs/run_preference below the current folder
    tag: str | None = None  # none = the preset's name
    resume_timestamp: str | None = None  # a timestamp, latest, or auto (resume, skip if finished, else start)
    resume_step: int | None = None  # an older checkpoint than the newest
    backend: Literal["auto", "nccl", "xccl", "gloo"] = "auto"

    def __post_init__(self):
        if self.folds and self.max_minutes is not None:
            raise core.UserError(
                "--folds and --max_minutes do not go together: use --max_steps, which is per fold"
            )


PRESETS = {
    "journal": {"schedule": "constant", "warmup": 0.0, "clip": None, "test_weights": "last"},  # as it trained
}
SMOKE = {
    "data": "python-pairs",
    "model": core.tiny,
    "max_length": 48,
    "dropout": 0.0,
    "encoder_dropout": 0.0,
    "batch": 24,
    "epochs": 8,
    "lr": 1e-3,
}

LABELS = {
    "A": "winner_model_a",
    "B": "winner_model_b",
    "tie": "winner_tie",
}  # class order; columns of the file
TEXTS = ("prompt", "response_a", "response_b")
COLUMNS = ("id", *TEXTS, *LABELS.values())
CACHE_VERSION = 2  # of the layout that write_cache writes: change both together


# ----------------------------------------------------------------------------------------------------- data


def turns(row, column) -> list[str]:
    """One cell: a JSON list of strings, one per turn, null for an empty one. ValueError names the fault."""
    cell = row.get(column)
    if cell is None or cell == "":
        raise ValueError(f"{column} is empty")
    try:
        texts = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        raise ValueError(f"{column} is no JSON") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str | None) for t in texts):
        raise ValueError(f"{column} is no list of strings")
    if not all(core.is_clean(text or "") for text in texts):
        raise ValueError(f"{column} has odd Unicode (a lone surrogate)")
    return [text or "" for text in texts]


def winner(row) -> int:
    """Class number in the order of LABELS."""
    flags = [str(row.get(column)).strip().lower() in ("1", "1.0", "true") for column in LABELS.values()]
    if sum(flags) != 1:
        raise ValueError("no winner" if not any(flags) else "several winners")
    return flags.index(True)


def parse(row) -> tuple[list[list[str]], int]:
    """([prompt, a, b] of every turn, class number)"""
    if not isinstance(row, dict) or row.get("id") is None:
        raise ValueError("no id")
    texts = [turns(row, column) for column in TEXTS]
    if len({len(text) for text in texts}) != 1:
        raise ValueError("prompt and responses differ in their number of turns")
    return [list(turn) for turn in zip(*texts, strict=True)], winner(row)


@dataclass
class Preferences:
    """Tokenised rows. Row i has pieces first[i] to first[i + 1]: prompt, A, B of turn 1, of turn 2, ..."""

    ids: list[str]
    groups: np.ndarray  # hash of the prompt: rows of one prompt stay together
    labels: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray  # piece p is tokens[offsets[p] : offsets[p + 1]]
    tokenizer: object
    fingerprint: dict
    lines: list[str]  # what to tell the user about unusable rows
    lengths: np.ndarray | None = None  # (N, 2) tokens of side A and side B; measure_sides sets it, and
    truncated: dict[str, float] | None = None  # the share of rows in which prompt, A or B lost tokens


def load_data(cfg, world) -> Preferences:
    """The rows of cfg.data, tokenised once by rank 0 into the cache, read from there by every rank."""
    builtin = cfg.data == "python-pairs"
    tokenizer = (
        None
        if cfg.model.startswith("tiny:")
        else core.main_first(world, lambda: core.load_tokenizer(cfg.model))
    )
    words = core.tokenizer_fingerprint(tokenizer) if tokenizer else "words"

    def build() -> str:
        source = "built in" if builtin else core.data_fingerprint(cfg.data)
        key = json.dumps([CACHE_VERSION, cfg.data if builtin else "", source, cfg.max_documents, words])
        folder = core.cache_root() / f"preference_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not (folder / "rows.json").exists():
            rows = python_pairs() if builtin else core.read_rows(cfg.data, cfg.max_documents)
            write_cache(
                folder, rows[: cfg.max_documents], tokenizer, cfg.data, {"data": source, "tokenizer": words}
            )
        return str(folder)

    return read_cache(Path(core.on_main(world, build)), tokenizer)


def write_cache(folder, rows, tokenizer, name, fingerprint):
    """Usable rows -> a folder of token ids, labels, groups, tokenizer; unusable ones counted and named."""
    core.require_columns(rows, COLUMNS, name)
    bad, usable = core.BadRows(), []
    for number, row in enumerate(rows, start=1):
        try:
            texts, label = parse(row)
            usable.append((str(row["id"]), texts, label))
        except ValueError as error:
            bad.add(number, error)
    lines = bad.report(len(rows), name)
    texts = [text for _, row_turns, _ in usable for turn in row_turns for text in turn]
    tokenizer = tokenizer or core.load_tokenizer("tiny:", texts)
    if twice := len(usable) - len({row_id for row_id, _, _ in usable}):
        lines.append(f"{twice} row(s) have an id that another row has, too")
    empty = sum(not any(turn[side] for turn in row_turns) for _, row_turns, _ in usable for side in (1, 2))
    with core.whole_folder(folder) as aside:
        kind = core.write_texts(aside, texts, tokenizer)
        tokenizer.save_pretrained(aside / "tokenizer")
        meta = {
            "ids": [row_id for row_id, _, _ in usable],
            "groups": [prompt_hash(row_turns) for _, row_turns, _ in usable],
            "labels": [label for _, _, label in usable],
            "pieces": [3 * len(row_turns) for _, row_turns, _ in usable],
            "kind": kind,
            "lines": [*lines, *([f"{empty} empty responses are kept as they are"] if empty else [])],
            "fingerprint": fingerprint,
        }
        core.write_json(aside / "rows.json", meta)


def prompt_hash(row_turns) -> str:
    """Rows whose prompts differ in case and white space only share it."""
    text = "\n".join(" ".join(prompt.lower().split()) for prompt, _, _ in row_turns)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_cache(folder, tokenizer) -> Preferences:
    meta = json.loads((folder / "rows.json").read_text())
    tokens, offsets = core.read_texts(folder, meta["kind"])
    return Preferences(
        ids=meta["ids"],
        groups=np.array(meta["groups"]),
        labels=np.array(meta["labels"], dtype=np.int64),
        first=np.concatenate([[0], np.cumsum(meta["pieces"])]).astype(np.int64),
        tokens=tokens,
        offsets=offsets,
        tokenizer=tokenizer or core.load_tokenizer(str(folder / "tokenizer")),
        fingerprint=meta["fingerprint"],
        lines=meta["lines"],
    )


TOPICS = ("math", "random", "shutil", "threading")  # modules with 20 public names of their own


def topic_words(topic) -> list[str]:
    module = importlib.import_module(topic)
    public = sorted(name for name in getattr(module, "__all__", dir(module)) if name[0] != "_")
    return [name for name in public if name not in TOPICS][:20]


def python_pairs(n=1500, seed=0) -> list[dict]:
    """Built-in rows: which answer names things of the module that the prompt asks for?

    A and B come from different modules, drawn whatever the label: the answers alone say nothing. A tie is a
    prompt about a third module (both wrong) or about both (both right).
    """
    rng = np.random.default_rng(seed)
    words = {topic: topic_words(topic) for topic in TOPICS}
    openers = ["Please", "Kindly", "Now", "Next", "Quickly", "Briefly", "Today", "First"]
    verbs = ["name", "list", "show", "give", "recall", "write", "print", "tell"]
    rows = []
    for number in range(n):
        label = rng.choice(list(LABELS))
        a, b, other, _ = rng.permutation(TOPICS)
        tied = other if rng.random() < 0.5 else f"{a} or {b}"
        asked = {"A": a, "B": b, "tie": tied}[label]
        prompt = f"{rng.choice(openers)} {rng.choice(verbs)} {asked}"
        answers = [" ".join(rng.choice(words[topic], 8, replace=False)) for topic in (a, b)]
        texts = dict(zip(TEXTS, [json.dumps([text]) for text in (prompt, *answers)], strict=True))
        rows.append(
            {"id": number, **texts, **{column: int(label == name) for name, column in LABELS.items()}}
        )
    return rows


# ------------------------------------------------------------------------------- what the encoder gets to see

SHORTEST = 16  # tokens that a cut piece keeps at least: with more turns than fit, the first ones are left out


def allot(lengths, budget) -> list[int]:
    """Tokens kept of each piece: short ones whole, long ones cut to one common length, `budget` in all."""
    kept = list(lengths)
    if sum(lengths) > budget:
        for done, piece in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
            kept[piece] = min(lengths[piece], budget // (len(lengths) - done))
            budget -= kept[piece]
    return kept


def lay_out(data, row, side, inputs, max_length) -> tuple[list[tuple[int, int, int]], bool, bool]:
    """Side 1 (A) or 2 (B) of a row: (first token, one past the last, kept) of each piece, in reading order.

    With it, whether the prompt lost tokens and whether the response did. Prompt and response share max_length
    over all turns, so both stay visible (the original cut the response away behind a long prompt).
    """
    start, stop = data.first[row], data.first[row + 1]
    shown = (0, side) if inputs == "prompt+responses" else (side,)
    pieces = [turn + piece for turn in range(start, stop, 3) for piece in shown]
    most = max(len(shown), (max_length - 1) // (SHORTEST + 1) // len(shown) * len(shown))
    dropped, pieces = pieces[:-most], pieces[-most:]
    sizes = [int(data.offsets[p + 1] - data.offsets[p]) for p in pieces]
    kept = allot(sizes, max_length - 1 - len(pieces))  # one special token in front, one behind each piece
    lost = {(p - start) % 3 for p, size, k in zip(pieces, sizes, kept, strict=True) if k < size}
    lost |= {(p - start) % 3 for p in dropped if data.offsets[p + 1] > data.offsets[p]}
    spans = [(int(data.offsets[p]), int(data.offsets[p + 1]), k) for p, k in zip(pieces, kept, strict=True)]
    return spans, 0 in lost, side in lost


def side_ids(data, row, side, inputs, max_length) -> list[int]:
    """cls, then each piece and a sep; a cut piece keeps its beginning and its end."""
    ids = [data.tokenizer.cls_token_id]
    for start, stop, kept in lay_out(data, row, side, inputs, max_length)[0]:
        head, tail = (kept + 1) // 2, kept // 2
        whole = kept == stop - start
        ids += data.tokens[start : stop if whole else start + head].tolist()
        ids += [] if whole or not tail else data.tokens[stop - tail : stop].tolist()
        ids.append(data.tokenizer.sep_token_id)
    return ids


def measure_sides(data, inputs, max_length):
    """Sets data.lengths and data.truncated."""
    lengths, lost = (
        np.zeros((len(data.labels), 2), dtype=np.int64),
        np.zeros((len(data.labels), 3), dtype=bool),
    )
    for row in range(len(data.labels)):
        for side in (1, 2):
            spans, prompt_lost, response_lost = lay_out(data, row, side, inputs, max_length)
            lengths[row, side - 1] = 1 + sum(kept + 1 for _, _, kept in spans)
            lost[row, 0] |= prompt_lost
            lost[row, side] = response_lost
    data.lengths, data.truncated = lengths, dict(zip(TEXTS, lost.mean(0).tolist(), strict=True))


def collate(data, rows, cfg, device) -> tuple[torch.Tensor, list[int]]:
    """input_ids (2B, T), A of every row and then B of every row, padded to the longest; their 2B lengths."""
    sides = [side_ids(data, row, side, cfg.inputs, cfg.max_length) for side in (1, 2) for row in rows]
    lengths = [len(ids) for ids in sides]
    input_ids = torch.full((len(sides), max(lengths)), data.tokenizer.pad_token_id or 0)
    for i, ids in enumerate(sides):
        input_ids[i, : len(ids)] = torch.tensor(ids)
    return input_ids.to(device), lengths


# ---------------------------------------------------------------------------------- the model and its measure


def build_model(cfg, data, world):
    """The pretrained encoder with a fresh head; the same weights on every rank."""
    encoder = core.main_first(
        world, lambda: core.load_encoder(cfg.model, data.tokenizer, cfg.encoder_dropout)
    )
    if cfg.max_length > (most := core.position_limit(encoder)):
        raise core.UserError(
            f"--max_length {cfg.max_length} is more than the {most} positions of {cfg.model}"
        )
    return core.ResponseScorer(encoder, cfg.dropout, len(LABELS))


def load_model(folder, world):
    """(Config, model, tokenizer) of a finished run, from its folder alone; the weights it was tested with."""
    from transformers import AutoConfig

    config = runs.read_config(folder)
    cfg = Config(**config["constants"])
    encoder = core.encoder_from_config(AutoConfig.from_pretrained(Path(folder) / "encoder"))
    model = core.ResponseScorer(encoder, cfg.dropout, len(LABELS))
    runs.load_weights(Path(folder) / "checkpoints" / runs.chosen_checkpoint(folder), model)
    return cfg, model.to(world.device).eval(), core.load_tokenizer(str(Path(folder) / "encoder"))


@torch.no_grad()
def evaluate(model, data, rows, cfg, world, poll=lambda: None) -> np.ndarray:
    """Log-probabilities (N, 3) in fp64 of `rows`, each row once, on every rank. `model` is unwrapped."""
    model.eval()
    precision = core.Precision(cfg.dtype, world)
    batches = core.ShardedBatches(data.lengths[rows].sum(1), cfg.eval_batch, world)
    log_probs = torch.zeros(len(rows), len(LABELS), dtype=torch.float64)
    with core.progress(len(batches), "evaluating", world) as bar:
        for step in range(len(batches)):
            poll()
            if mine := batches.rank_batch(step):
                with precision.autocast():
                    logits = model(*collate(data, rows[mine], cfg, world.device))
                log_probs[mine] = logits.cpu().double().log_softmax(-1)
            bar.update()
    model.train()
    return core.all_reduce_sum(
        world, log_probs
    ).numpy()  # every row is nonzero on one rank: a sum is a gather


def measure(log_probs, data, rows, train_rows) -> dict:
    """log_loss, accuracy and their company; the prior is the class shares of the training rows."""
    prior = np.bincount(data.labels[train_rows], minlength=len(LABELS)) / len(train_rows)
    return core.classification_metrics(log_probs, data.labels[rows], data.groups[rows], prior, list(LABELS))


# --------------------------------------------------------------------------------------------------- training


def train(run, cfg, world, data, rows, fold) -> dict:
    """Trains a model on rows["train"] and returns its outcome (see predict)."""
    core.reseed(cfg.seed, "init", fold)
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(build_model(cfg, data, world))
    optimizer = core.make_optimizer(model, cfg.optimizer, cfg.weight_decay)
    lengths = data.lengths[rows["train"]].sum(1)
    batches = core.ShardedBatches(lengths, cfg.batch, world, seed=cfg.seed)
    total_steps = min(n for n in (cfg.epochs * len(batches), cfg.max_steps) if n is not None)
    if fold == run.position.get("fold", 0):
        announce(run, cfg, data, rows, model)
    step = run.load(model, optimizer, precision, fold=fold)
    if world.is_main:  # with the tokenizer, it lets the folder alone rebuild the model: no Hub, no cache
        model.encoder.config.save_pretrained(run.folder / "encoder")
        data.tokenizer.save_pretrained(run.folder / "encoder")
    if cfg.compile:
        model.encoder.compile(dynamic=True)
    ddp = core.wrap_ddp(model, world)

    core.reseed(cfg.seed, "worst case", fold)
    worst = batches.longest()[: math.ceil(cfg.batch / world.size)]
    at_once = min(cfg.micro_batch or len(worst), len(worst))

    def forward_backward(mine, targets):
        return backward_of_sum(ddp, precision, data, rows["train"][mine], targets, cfg, world)

    seconds = core.worst_case(world, ddp, lambda: forward_backward(worst, cfg.batch), optimizer, at_once)
    run.poll()
    if fold == run.position.get("fold", 0):  # later folds look the same
        steps = ((cfg.folds or 1) - fold) * total_steps - step
        run.forecast(model, optimizer, steps, seconds, typical=lengths.mean() / lengths[worst].mean())
        run.say(describe_row(data, rows["train"][0], cfg))

    def where():
        return f"{f'fold {fold + 1} ' if cfg.folds else ''}epoch {step / len(batches):.3g}/{cfg.epochs}"

    while True:
        ends = step >= total_steps
        evaluates = ends or (step > 0 and step % (cfg.eval_every or len(batches)) == 0)
        if evaluates or (step > 0 and cfg.save_every and step % cfg.save_every == 0):
            run.save(step, model, optimizer, precision, must=ends)
        if evaluates:
            log_probs = evaluate(model, data, rows["val"], cfg, world, run.poll)
            val = measure(log_probs, data, rows["val"], rows["train"])
            is_best = run.save_best(step, val["log_loss"], model)
            report_validation(run, step, val, where(), is_best, late=2 * step >= total_steps)
        if ends:
            break
        mine = batches.rank_batch(step)
        targets = run.agree(len(mine))
        if run.stopping:
            run.save(step, model, optimizer, precision, must=True)
            raise core.Stop(run.stopping)
        if run.clock_share >= 1:  # max_minutes are spent
            total_steps = step
            continue
        core.reseed(cfg.seed, fold, step, world.rank)
        lr = core.lr_at(cfg, step, run.schedule_length(step, total_steps))
        loss_sum = forward_backward(mine, targets)
        facts = functools.partial(autopsy, data, rows["train"][batches.global_batch(step)], cfg, lr)
        odd = run.watch(step + 1, loss_sum, targets, model, facts)
        grad_norm = core.optimizer_step(optimizer, precision, cfg.clip, lr, skip=odd)
        run.step_done(loss_sum, targets, examples=cfg.batch)
        step += 1
        if step % cfg.log_every == 0 or step == total_steps:
            run.log_training(where(), step, total_steps, {"lr": lr, "grad_norm": grad_norm})

    return predict(run, cfg, world, data, rows, model, step)


def backward_of_sum(ddp, precision, data, rows, targets, cfg, world) -> float:
    """Gradients of this rank's share of the summed loss / targets; returns the share's sum."""
    losses = []
    for part in core.micro_batches(ddp, rows, cfg.micro_batch):
        labels = torch.as_tensor(data.labels[part], device=world.device)
        with precision.autocast():
            losses.append(core.sum_cross_entropy(ddp(*collate(data, part, cfg, world.device)), labels))
        core.scaled_backward(losses[-1], world, targets, precision)
    return sum(loss.item() for loss in losses)


def autopsy(data, rows, cfg, lr) -> dict:
    """What an odd step saw, for spikes.jsonl."""
    lengths = data.lengths[rows].sum(1)
    facts = {"lr": lr, "rows": [data.ids[row] for row in rows], "first_row": describe_row(data, rows[0], cfg)}
    return facts | {"lengths": lengths.tolist(), "labels": data.labels[rows].tolist()}


def predict(run, cfg, world, data, rows, model, step) -> dict:
    """The fold's outcome: hash of the final weights; what the weights to be measured say of val and test."""
    sha256, measured = runs.weights_sha256(model), run.checkpoint
    if cfg.test_weights == "best":
        measured = run.load_best(model)
    elif cfg.folds:  # later folds push this one's checkpoints out
        measured = run.keep_weights(step, model, "last")
    parts = ("val", "test") if cfg.final_eval else ("val",)
    log_probs = {part: evaluate(model, data, rows[part], cfg, world, run.poll).tolist() for part in parts}
    parameters = core.count_parameters(model)[0]
    return {"weights_sha256": sha256, "measured": measured, "parameters": parameters, "log_probs": log_probs}


def describe_row(data, row, cfg) -> str:
    """Both sides of a row as the encoder reads them, shortened, and the label that the loss wants."""
    lines = [f"the loss sees row {data.ids[row]} -> {list(LABELS)[data.labels[row]]}; padding is masked"]
    for side, name in ((1, "A"), (2, "B")):
        text = data.tokenizer.decode(side_ids(data, row, side, cfg.inputs, cfg.max_length)).replace("\n", " ")
        lines.append(f"  {name}: {text if len(text) <= 95 else f'{text[:45]} ... {text[-45:]}'}")
    return "\n".join(lines)


def histogram(shares) -> str:
    return " ".join(f"{name} {share:.0%}" for name, share in shares.items())


def report_validation(run, step, val, where, is_best, late):
    """`late`: half of the steps are done, so that having learnt nothing is worth a line."""
    run.say(
        f"{where}  val  loss {core.plus_minus(val['log_loss'], val['log_loss_interval'], 4)}  "
        f"accuracy {core.plus_minus(val['accuracy'], val['accuracy_interval'])}  "
        f"{histogram(val['predicted'])}{'  -> best' if is_best else ''}"
    )
    if val["alarm"] and late:
        run.say(f"{where}  val  {val['alarm']}")
    run.metrics(step, {"val/loss": val["log_loss"], "val/accuracy": val["accuracy"]})


# ----------------------------------------------------------------------------------------------------- report


def report(run, cfg, data, splits, outcomes) -> dict:
    """Rank 0: final metrics of val and test (with folds: every row by the model that had not seen it)."""
    result, names = {}, list(LABELS)
    with core.whole_file(run.folder / "predictions.jsonl") as file:
        for part in outcomes[0]["log_probs"]:
            rows = np.concatenate([split[part] for split in splits])
            log_probs = np.concatenate([outcome["log_probs"][part] for outcome in outcomes])
            priors = [core.class_shares(data.labels[split["train"]], len(names)) for split in splits]
            prior = np.repeat(priors, [len(split[part]) for split in splits], axis=0)
            m = core.classification_metrics(log_probs, data.labels[rows], data.groups[rows], prior, names)
            result |= {f"{part}/{name}": value for name, value in m.items()}
            where = "out of fold" if cfg.folds and part == "test" else part
            run.say(
                f"{where:11} log loss {core.plus_minus(m['log_loss'], m['log_loss_interval'], 4)}   "
                f"uniform {m['uniform_log_loss']:.4f}   class shares {m['prior_log_loss']:.4f}\n"
                f"{where:11} accuracy {core.plus_minus(m['accuracy'], m['accuracy_interval'])}   "
                f"most frequent class {m['prior_accuracy']:.3f}\n"
                f"{where:11} predicts {histogram(m['predicted'])}   truth {histogram(m['truth'])}   "
                f"rows {m['rows']}" + (f"\n{where:11} {m['alarm']}" if m["alarm"] else "")
            )
            for row, log_prob in zip(rows, log_probs, strict=True):
                line = {
                    "id": data.ids[row],
                    "group": data.groups[row],
                    "split": part,
                    "label": names[data.labels[row]],
                }
                file.write(json.dumps(line | dict(zip(names, np.exp(log_prob).tolist(), strict=True))) + "\n")
    accuracy, minutes = (
        core.plus_minus(m["accuracy"], m["accuracy_interval"]),
        run.seconds / 60,
    )
    run.say(f"done  {where} loss {m['log_loss']:.4f}  accuracy {accuracy}  {minutes:.1f} min")
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"next: tensorboard --logdir {run.folder.parent}")
    return result


# ------------------------------------------------------------------------------------------------------- main


def split_rows(data, cfg, fold) -> dict[str, np.ndarray]:
    """Row numbers of train, val and test; with folds, fold `fold` is tested and the next one validates."""
    parts = core.split_by_group(
        data.groups, data.labels, [1] * cfg.folds if cfg.folds else [8, 1, 1], cfg.split_seed
    )
    test, val = (fold, (fold + 1) % cfg.folds) if cfg.folds else (2, 1)
    chosen = {"train": (parts != val) & (parts != test), "val": parts == val, "test": parts == test}
    return {part: np.flatnonzero(rows) for part, rows in chosen.items()}


def announce(run, cfg, data, rows, model):
    """What is about to be trained on what, and everything that was left out or cut."""
    total, trainable = core.count_parameters(model)
    parts = "  ".join(f"{part} {len(numbers)}" for part, numbers in rows.items())
    run.say(f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   {parts}")
    run.begin()
    run.say(f"data {cfg.data}  {len(data.labels)} rows, {len(set(data.groups))} prompts")
    for line in data.lines:
        run.say(line)
    run.say(
        "cut to fit  " + "  ".join(f"{name} in {share:.1%} of rows" for name, share in data.truncated.items())
    )
    if left := len(rows["train"]) % cfg.batch:
        run.say(
            f"each epoch leaves out {left} training rows, others each time: they fill no batch of {cfg.batch}"
        )


@record
def main(cfg, world):
    with runs.Run(cfg, world, __file__) as run:
        cfg = run.cfg
        data = load_data(cfg, world)
        run.pin("fingerprint", data.fingerprint)
        measure_sides(data, cfg.inputs, cfg.max_length)
        splits = [split_rows(data, cfg, fold) for fold in range(cfg.folds or 1)]
        outcomes = []
        for fold, rows in enumerate(splits):
            done = run.folder / "folds" / f"fold_{fold + 1}.json"
            if fold < run.position.get("fold", 0):
                outcomes.append(json.loads(done.read_text()))
                continue
            outcomes.append(train(run, cfg, world, data, rows, fold))
            core.on_main(world, lambda done=done: core.write_json(done, outcomes[-1]))
        run.result = core.on_main(world, lambda: report(run, cfg, data, splits, outcomes)) | {
            "weights_sha256": core.joint_hash([outcome["weights_sha256"] for outcome in outcomes]),
            "test_checkpoints": [outcome["measured"] for outcome in outcomes],  # one a fold
            "truncated": data.truncated,
            "parameters": outcomes[0]["parameters"],
        }
    return run.result


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
