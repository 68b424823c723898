"""Which of two answers does a person prefer? A / B / tie with a BERT-family encoder or an open decoder
(journal 000, LMSYS Arena).

A model reads side A and side B (prompt and answer), a head reads the two vectors, in both orders.

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_preference.py
    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_preference.py --preset frozen
    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_preference.py --resume_timestamp auto
    python run_preference.py --smoke
    python run_preference.py --data train.csv --model bert-base-uncased --folds 5
    python run_preference.py --data a.csv --extra_data '0.5*more.jsonl' --teacher runs/run_preference/<run>
    python run_preference.py --mode submit --test_csv test.csv

--data takes a Hub id, a CSV, JSON, JSONL or Parquet file (also in Kaggle's zip), a folder, or python-pairs
(built in): rows of Arena, conversations with a winner, or chosen and rejected answers. Each run is a folder
under runs/run_preference/: log.txt and result.json hold the report card, report.png its plots,
predictions.jsonl what was said of every row, submission.csv what Kaggle wants.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

import core
from lab.data import pairs, soft_labels
from lab.measure import preference, submission
from lab.models import backbones, encoders
from lab.run import files


@dataclass(frozen=True)
class Config(core.Studied):
    # data
    data: str = "lmsys/lmsys-arena-human-preference-55k"  # Hub id, file, zip, folder, or python-pairs
    extra_data: tuple[str, ...] = ()  # sets that only train, e.g. 0.5*pairs.jsonl: each row counts half
    max_documents: core.Count | None = None  # rows read of each set; none = all
    split_seed: core.Seed = 42  # of the split or the folds, whatever --seed is
    val_share: core.within(float, 1e-4, 0.9999) = 0.1  # of the rows of --data, by prompt; not with --folds
    test_share: core.within(float, 0, 0.9999) = 0.1  # measured after training only
    folds: core.within(int, 3) | None = None  # cross-validation, split by prompt; none = one split
    teacher: tuple[str, ...] = ()  # runs (or predictions.jsonl) whose mean verdicts are soft labels, by id
    inputs: Literal["responses", "prompt+responses", "joint"] = "prompt+responses"  # joint: A and B in one
    max_length: core.within(int, 16) = 512  # of one sequence, special tokens too; joint: A and B share it
    test_csv: str | None = None  # rows to predict, or Kaggle's zip of them: submission.csv is written
    # model
    model: str = "distilbert-base-uncased"  # encoder or decoder: Hub id, folder, tiny:<family>, a GPT's run
    method: Literal["full", "lora"] = "full"  # lora: adapters on linear layers of the blocks, and the head
    lora_rank: core.Count = 16  # columns of B and rows of A
    lora_alpha: core.within(float, 1e-9) = 16.0  # the multiplier of B A x is alpha / rank
    lora_dropout: core.Share = 0.0  # of an adapter's input
    base_dtype: core.BaseDtype = "auto"  # of a decoder under adapters; auto: bf16 on a GPU that has it
    checkpointing: bool = False  # recompute blocks in the backward: a third more time, far less memory
    freeze: Literal["none", "all", "bottom", "blocks"] = "none"  # blocks: all; bottom: lower half, embeddings
    encode_once: bool = True  # with freeze all: the encoder's vectors are computed once and cached
    pooling: Literal["auto", "first", "mean", "last"] = "auto"  # of tokens; auto: first, of a decoder last
    head: Literal["mlp", "linear", "compare"] = "mlp"  # mlp: the journal's; compare: also |a - b| and a * b
    start_at_prior: bool = True  # the head's first bias: log of the class shares of the training rows
    symmetric: bool = True  # logits of both orders of A and B averaged, in training and in testing
    dropout: core.Share = 0.1  # in the head
    encoder_dropout: core.Share | None = None  # of hidden states and attention; none = as pretrained
    # optimisation
    batch: core.Count = 32  # rows per optimizer step, over all ranks
    micro_batch: core.Count | None = None  # rows per forward and rank; none = all of a rank's that fit
    epochs: core.Whole = 3  # passes over the training rows
    max_steps: core.Whole | None = None  # optimizer steps (per fold)
    max_minutes: core.Amount | None = None  # of training, over resumes; not with --folds
    lr: core.Rate = 2e-5  # peak
    head_lr: core.Rate | None = 2e-4  # peak rate of the head; none, or freeze all: lr
    layer_decay: core.within(float, 0.001, 1) = 1.0  # a block's rate is this times that of the block above it
    min_lr: core.Rate = 0.0  # at the end of the schedule
    warmup: core.Share = 0.1  # fraction of all steps
    schedule: core.Schedule = "linear"  # of the rate, after the warm-up
    optimizer: core.Optimizer = "adamw"  # muon: adamw's lr; adafactor: little memory, lr relative to weights
    weight_decay: core.Rate = 0.01  # of matrices
    label_smoothing: core.Share = 0.0  # of the winner's probability, shared out over A, B and tie
    soft_share: core.Share = 0.5  # of a row's loss: KL to its soft label; the rest is its winner's
    swap_augmentation: bool = False  # swap A and B of half the training rows, drawn anew each epoch
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 or fp16 on a GPU, else fp32; fp32 not typed is tf32 on a GPU
    seed: core.Seed = 0  # of weights, order and dropout
    # evaluation and logging
    eval_batch: core.Count = 64  # rows per evaluation step, over all ranks
    eval_every: core.Count | None = None  # steps; none = each epoch
    test_weights: Literal["best", "last"] = "best"  # lowest validation loss, or the final ones
    calibrate: bool = True  # submission.csv at the temperature that fits the validation rows
    save_every: core.Count | None = None  # steps; none = at each evaluation, before it
    # run
    mode: Literal["train", "find_lr", "study", "submit"] = "train"  # submit: a finished run predicts test_csv
    run_folder: tuple[str, ...] = ()  # the finished runs that submit, averaged; none = the newest

    NO_TRAINING = ("submit",)
    READ_BY = core.Studied.READ_BY | {
        "submit": {"run_folder"},
        "train find_lr study submit": {"test_csv", "eval_batch", "encode_once", "dtype", "calibrate"},
    }

    def __post_init__(self):
        super().__post_init__()
        if self.method == "lora" and self.freeze != "none":
            raise core.UserError("--method lora freezes all but adapters and head: drop --freeze")
        if (own := backbones.OF_LORA & self.typed.flags) and self.method != "lora":
            raise core.UserError(f"--{min(own)} is read with --method lora alone: add it")
        if self.freeze == "all" and "head_lr" in self.typed.flags:
            raise core.UserError("--freeze all trains the head alone, at --lr: drop --head_lr")
        if self.shard == "full":
            raise core.UserError("--shard full is for language models: use --shard optimizer")
        if self.symmetric and self.swap_augmentation:
            word = "changes nothing while both orders are averaged: add --no-symmetric"
            raise core.UserError(f"--swap_augmentation {word}")
        if self.lr == 0 and self.head_lr and self.freeze != "all":
            raise core.UserError(
                f"--lr 0 trains the head alone: instead use --freeze all --lr {self.head_lr:g}"
            )
        if self.head == "compare" and self.inputs == "joint":
            raise core.UserError("--head compare needs A and B apart: use --inputs prompt+responses")
        if self.folds and {"val_share", "test_share"} & self.typed.flags:
            raise core.UserError("--folds makes parts of equal size: drop --val_share, --test_share")
        if self.val_share + self.test_share >= 1:
            shares = f"val_share {self.val_share} + test_share {self.test_share}"
            raise core.UserError(f"{shares} leave nothing to train on")
        if self.mode == "submit" and not self.test_csv:
            raise core.UserError("--mode submit needs --test_csv: the rows to predict")
        if self.folds and self.max_minutes is not None:
            raise core.UserError(
                "--folds and --max_minutes do not go together: use --max_steps, which is per fold"
            )


JOURNAL = {  # as the journal's scripts trained, except that they truncated prompt and answer as one string
    "schedule": "constant",
    "warmup": 0.0,
    "clip": None,
    "test_weights": "last",
    "symmetric": False,
    "start_at_prior": False,
    "head_lr": None,
    "dtype": "fp32",
    "model": "distilbert-base-uncased",
    "pooling": "first",
    "lr": 1e-5,
    "batch": 32,
    "epochs": 3,
}
PRESETS = {
    "recommended": {},
    "strong": {  # argued in docs/preference.md, not run on Arena's rows here
        **{"model": "microsoft/deberta-v3-base", "max_length": 768, "epochs": 2},
        **{"head_lr": 1e-4, "layer_decay": 0.9},
    },
    "strong_decoder": {
        **{"model": "Qwen/Qwen2.5-1.5B-Instruct", "method": "lora", "inputs": "joint", "max_length": 2048},
        **{"epochs": 1, "lr": 2e-4, "lora_dropout": 0.05, "checkpointing": True, "head": "linear"},
    },
    "random": JOURNAL | {"max_steps": 0},
    "baseline": JOURNAL,
    "frozen": JOURNAL | {"freeze": "all"},
    "bottom": JOURNAL | {"freeze": "bottom"},
    "bottom_journal": JOURNAL | {"freeze": "blocks"},
    "bert": JOURNAL | {"model": "bert-base-uncased"},
    "bert-large": JOURNAL | {"model": "bert-large-uncased"},
    "roberta": JOURNAL | {"model": "roberta-base"},
    "electra": JOURNAL | {"model": "google/electra-base-discriminator"},
    "deberta": JOURNAL | {"model": "microsoft/deberta-base"},
    "albert": JOURNAL | {"model": "albert-base-v2"},
    "run_1": JOURNAL | {"inputs": "responses"},
    "run_2": JOURNAL,
    "max_length_128": JOURNAL | {"inputs": "responses", "max_length": 128},
    "batch_2": JOURNAL | {"batch": 2, "epochs": 1},
}
JOURNAL_RESULTS = {  # what the journal got with a preset, on LMSYS, one run each
    "random": "accuracy 0.351, pretrained weights under an untrained head",
    "baseline": "accuracy 0.473",
    "frozen": "accuracy 0.453",
    "bottom": "no figure: in its run 'bottom frozen' all blocks were frozen",
    "bottom_journal": "accuracy 0.469; called 'bottom frozen', but all blocks were frozen",
    "bert": "accuracy 0.4835",
    "bert-large": "accuracy 0.4843",
    "roberta": "accuracy 0.486",
    "electra": "accuracy 0.493",
    "deberta": "accuracy 0.351, one class for every row",
    "albert": "accuracy 0.491",
    "run_1": "accuracy 0.33 in a notebook, 0.50 as a script with another split",
    "run_2": "accuracy 0.473, the baseline of later runs",
    "max_length_128": "accuracy 0.46, from responses alone",
    "batch_2": "accuracy 0.45 after one epoch",
}
SMOKE = {
    "data": "python-pairs",
    "model": encoders.tiny,
    "max_length": 48,
    "dropout": 0.0,
    "encoder_dropout": 0.0,
    "batch": 24,
    "epochs": 8,
    "lr": 2e-3,
    "head_lr": None,
}


# ---------------------------------------------------------------------------------- the model and its measure


def scorer(cfg, backbone, precision):
    """A PairScorer on the device: `backbone` with frozen parts or adapters and a new head."""
    frozen = backbones.prepare(cfg, backbone)
    options = {"pooling": cfg.pooling, "head": cfg.head, "dropout": cfg.dropout, "frozen": frozen}
    model = core.PairScorer(backbone, joint=cfg.inputs == "joint", **options)
    return backbones.on_device(cfg, model, precision)


def rebuild(folder, world, **changes):
    """(Config, model without what was trained, tokenizer) of a run, from its folder, and what was frozen from
    cfg.model; `changes` override constants."""
    before = {"symmetric": False}  # runs stored before --symmetric existed
    changes = {"extra_data": (), "teacher": ()} | changes  # only trained on
    cfg = dataclasses.replace(core.stored_config(folder, Config, __file__, before), **changes)
    backbone, tokenizer = backbones.backbone_of_run(folder, cfg, world)
    return cfg, scorer(cfg, backbone, core.Precision(cfg.dtype, world)), tokenizer


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, with the weights that it was tested with (of an unfinished run,
    its newest)."""
    cfg, model, tokenizer = rebuild(folder, world)
    checkpoint = Path(folder) / "checkpoints" / core.tested_or_newest_checkpoint(folder)
    core.load_weights(checkpoint, core.saved_part(model))
    return cfg, model.eval(), tokenizer


def evaluate(model, data, rows, cfg, world, poll=lambda: None) -> np.ndarray:
    """(N, 2, 3) fp64 log-probabilities of `rows` on every rank: as they are, and with A and B swapped.

    `model` is unwrapped. The second order's classes are swapped back; nothing is averaged yet.
    """

    def log_probs(some):
        logits = model(**core.collate(data, some, cfg, world.device))
        return logits.cpu().double().log_softmax(-1).transpose(0, 1)  # not all cards know fp64

    model.eval()
    out = torch.zeros(len(rows), 2, len(preference.NAMES), dtype=torch.float64)
    core.each_once(log_probs, out, data, rows, cfg, world, poll, "evaluating")
    model.train()
    return out.numpy()


def measure(log_probs, data, rows, train_rows, symmetric) -> dict:
    """log_loss, accuracy and other metrics; the prior is the class shares of the training rows."""
    prior = preference.prior(data, train_rows)
    final = preference.combine(log_probs, symmetric)
    return core.classification_metrics(final, data.labels[rows], data.groups[rows], prior, preference.NAMES)


# --------------------------------------------------------------------------------------------------- training


def train(run, cfg, world, data, rows, fold) -> dict:
    """Trains a model on rows["train"] and returns its outcome (see predict)."""
    precision = core.Precision(cfg.dtype, world)
    model = scorer(cfg, core.load_backbone(cfg, data.tokenizer, world, fold, run), precision)
    if cfg.start_at_prior:
        model.start_at(preference.prior(data, rows["train"]))
    own_rate = cfg.head_lr is not None and cfg.lr > 0 and cfg.freeze != "all"
    head_scale = cfg.head_lr / cfg.lr if own_rate else 1.0
    scales = encoders.lr_scales(model, cfg.layer_decay, head_scale)
    optimizer = core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, scales=scales)
    weights = data.weights_of(rows["train"])
    batches = core.ShardedBatches(data.lengths[rows["train"]].sum(1), cfg.batch, world, seed=cfg.seed)
    total_steps = core.count_steps(cfg, batches)
    if fold == run.position.get("fold", 0):
        announce(run, cfg, data, rows, model, total_steps)
    saved = core.saved_part(model), optimizer, precision  # all of it, or what is trained
    compiled = backbones.compiled_parts(model.encoder) if cfg.compile else ()
    ddp = core.wrap_ddp(model, world, compiled, shard=cfg.shard, optimizer=optimizer)
    run.load(*saved, fold=fold)
    core.on_main(world, backbones.write_backbone, run.folder / "encoder", model.encoder, data.tokenizer)
    core.cache_vectors(model, data, cfg, world, run.poll, run.say)
    micro_batches = core.MicroBatches(run, ddp, functools.partial(laid_out, data, cfg))

    def forward_backward(mine, targets, swaps=None) -> list:
        """Adds gradients of (this rank's loss sum / weights of all ranks' rows). Returns the sum's parts.

        mine: positions in rows["train"]. swaps: whether A and B of each are swapped.
        """
        shown = pairs.shown_rows(rows["train"], mine, swaps)
        return backward_of_sum(ddp, precision, micro_batches(shown), targets, world)

    first_here = fold == run.position.get("fold", 0)  # what follows is said once
    steps_left = ((cfg.folds or 1) - fold) * total_steps - run.step if first_here else None
    # two forwards and backwards of the longest rows: is there memory? Then the forecast of hours
    read = 0.5 if cfg.inputs == "joint" and not cfg.symmetric else 1.0  # share of a row's tokens that is read
    core.rehearse(run, micro_batches, saved, forward_backward, batches, steps_left, read)
    if first_here:
        run.say(pairs.describe_row(data, rows["train"][0], cfg.inputs, cfg.max_length))
    if cfg.mode == "find_lr":
        if own_rate:
            run.say(f"the rates shown are not the head's, which is {head_scale:g} x as large")
        return core.find_lr(run, batches, weights.__getitem__, saved, forward_backward)

    # core.steps draws batches from seed and step alone, saves before evaluating, stops all ranks together
    for at in core.steps(run, batches, weights.__getitem__, saved, total_steps):
        if at.evaluates:
            log_probs = evaluate(model, data, rows["val"], cfg, world, at.poll)
            val = measure(log_probs, data, rows["val"], rows["train"], cfg.symmetric)
            val["flips"] = float((log_probs[:, 0].argmax(1) != log_probs[:, 1].argmax(1)).mean())
            is_best = at.keep_if_best(val["log_loss"])  # all ranks: it may save
            report_validation(run, at, val, is_best)
            continue
        core.reseed(cfg.seed, fold, at.step, world.rank)  # in place of core.steps' seed, which knows no fold
        swaps = pairs.swapped(cfg, fold, at.step)
        lr = core.lr_at(cfg, at.step, at.schedule_length)  # total_steps, or what fits into max_minutes
        run.rows_ahead = pairs.next_rows(run, cfg, fold, at.step + 1, rows["train"])
        losses = forward_backward(at.rows, at.targets, swaps[world.rank :: world.size])
        norm = core.gradient_norm(optimizer, precision)  # of the global batch, not clipped yet
        if at.spiked(losses, norm) and world.is_main:  # spiked() asks all ranks, so it stands first
            at.note_spike(model, spike_facts(data, rows["train"][at.batch], swaps, cfg, lr))
        at.update(optimizer, precision, lr, objective=soft_labels.are_learnt(data, cfg))  # clips, logs, too

    return predict(run, cfg, world, data, rows, model, run.step)


def laid_out(data, cfg, shown, device) -> tuple[dict, torch.Tensor, float]:
    """What the model takes of pairs (row, whether A and B are swapped), and what the loss does."""
    rows, swaps = zip(*shown, strict=True)
    labels, entropy = soft_labels.row_targets(data, cfg, shown)
    orders = 2 if cfg.symmetric or not torch.is_grad_enabled() else 1  # an evaluation always has both
    sequences = core.collate(data, rows, cfg, device, orders, swaps)
    return sequences, core.to_device(labels, device), entropy


def backward_of_sum(ddp, precision, micro_batches, targets, world) -> list:
    """Adds gradients of (this rank's loss sum / targets of all ranks). Returns the sum's parts."""
    losses = []
    for _, (sequences, labels, entropy) in micro_batches:
        with precision.autocast():
            logits = ddp(**sequences).mean(0)  # of both orders
            losses.append(core.sum_cross_entropy(logits, labels) - entropy)
        core.scaled_backward(losses[-1], world, targets, precision)  # x world.size: DDP averages
    return [loss.detach() for loss in losses]  # read later, with the norm


def spike_facts(data, rows, swaps, cfg, lr) -> dict:
    """What a spiking step read, for spikes.jsonl."""
    first_row = pairs.describe_row(data, rows[0], cfg.inputs, cfg.max_length)
    facts = {"lr": lr, "rows": [data.ids[row] for row in rows], "first_row": first_row}
    facts |= {"lengths": data.lengths[rows].sum(1).tolist(), "labels": data.labels[rows].tolist()}
    return facts | {"swapped": swaps}


def predict(run, cfg, world, data, rows, model, step) -> dict:
    """The fold's outcome: hash of the final weights, and log-probabilities of val and
    test by the chosen ones."""
    sha256, checkpoint = core.weights_sha256(model), run.checkpoint
    if cfg.test_weights == "best":
        checkpoint = run.load_best(core.saved_part(model))
    if cfg.folds and checkpoint == run.checkpoint:  # later folds push this one's checkpoints out
        checkpoint = run.keep_weights(step, core.saved_part(model), "last", must=True)
    log_probs = {
        part: evaluate(model, data, rows[part], cfg, world, run.poll).tolist()
        for part in core.final_parts(cfg)
    }
    parameters = core.count_parameters(model)
    facts = {"weights_sha256": sha256, "checkpoint": checkpoint, "parameters": parameters}
    return facts | {"log_probs": log_probs}


VAL_METRICS = {"loss": "log_loss", "accuracy": "accuracy", "flips": "flips"}  # TensorBoard's name: ours


def report_validation(run, at, val, is_best):
    """Says and logs validation figures."""
    predicted = " ".join(f"{name} {share:.0%}" for name, share in val["predicted"].items())
    run.say(
        f"{at.where}  val  loss {core.plus_minus(val['log_loss'], val['log_loss_interval'], 4)}  "
        f"accuracy {core.plus_minus(val['accuracy'], val['accuracy_interval'])}  "
        f"{predicted}{'  -> best' if is_best else ''}"
    )
    if val["alarm"] and at.late:
        run.say(f"{at.where}  val  {val['alarm']}")
    run.metrics(at.step, {f"val/{key}": val[name] for key, name in VAL_METRICS.items()})


def report(run, cfg, data, splits, outcomes) -> dict:
    """Rank 0: makes the report card of val and test, report.png, predictions.jsonl. Returns the figures."""
    run.leave_if_signalled()
    result, verdicts, cards = preference.make_cards(cfg, data, splits, outcomes)
    run.leave_if_signalled()
    core.write_lines(
        run.folder / "predictions.jsonl", preference.all_predictions(cfg, data, splits, verdicts)
    )
    last = "test" if "test" in cards else "val"
    card, where = cards[last], "out of fold" if cfg.folds and last == "test" else last
    for line in preference.card_lines(card, where, preference.NAMES):
        run.say(line)
    title = f"{run.folder.name}   {where}   log loss {card['log_loss']:.4f}   accuracy {card['accuracy']:.3f}"
    preference.draw(verdicts[last][1], preference.NAMES, title, run.folder / "report.png")
    if line := journal_line(cfg):
        run.say(line)
    accuracy = core.plus_minus(card["accuracy"], card["accuracy_interval"])
    run.say(f"done  {where} loss {card['log_loss']:.4f}  accuracy {accuracy}  {run.seconds / 60:.1f} min")
    run.say(f"all figures: {run.folder}/result.json")
    return result


# -------------------------------------------------------------------------------------------- measured again


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, dict[str, list]]:
    """Measures a run's own val and test rows again (every fold by its own weights). Returns (figures,
    file name -> its lines). UserError if cfg.data has changed since.
    """
    cfg, model, tokenizer = rebuild(folder, world, **({"eval_batch": eval_batch} if eval_batch else {}))
    data = core.load_pairs(cfg, world, tokenizer)
    core.refuse_other_data(core.read_config(folder)["facts"]["fingerprint"], data.fingerprint, cfg.data)
    pairs.measure_sequences(data, cfg.inputs, cfg.max_length)
    splits, outcomes = [], []
    for fold, name in enumerate(core.on_main(world, measured_checkpoints, folder, cfg)):
        core.load_weights(Path(folder) / "checkpoints" / name, core.saved_part(model))
        rows = pairs.split_rows(data, cfg, fold)
        log_probs_of = {
            part: evaluate(model, data, rows[part], cfg, world, poll) for part in core.final_parts(cfg)
        }
        splits.append(rows)
        outcomes.append({"log_probs": log_probs_of})
    result, verdicts, _ = preference.make_cards(cfg, data, splits, outcomes)
    return result, {"predictions.jsonl": list(preference.all_predictions(cfg, data, splits, verdicts))}


def measured_checkpoints(folder, cfg) -> list[str]:
    """Checkpoints that the run was tested with, one per fold. An unfinished run without folds: its newest."""
    return core.tested_checkpoints(folder) if cfg.folds else [core.tested_or_newest_checkpoint(folder)]


def measure_other(folder, name, world, max_documents=None, eval_batch=None, poll=lambda: None):
    """(report card of other labelled rows, lines about them, lines of predictions.jsonl, their fingerprint)

    Training rows are not needed: class shares are those of these rows, and the baseline that sees nothing but
    lengths is cross-validated on them. A run with folds: its models' probabilities are averaged.
    """
    changes = {"data": name, "max_documents": max_documents}
    changes |= {"eval_batch": eval_batch} if eval_batch else {}
    cfg, model, tokenizer = rebuild(folder, world, **changes)
    data = core.load_pairs(cfg, world, tokenizer)
    pairs.measure_sequences(data, cfg.inputs, cfg.max_length)
    checkpoints = core.on_main(world, measured_checkpoints, folder, cfg)
    log_probs = mean_of_folds(folder, checkpoints, cfg, model, data, world, poll)
    every = np.arange(len(data.labels))
    lengths, by_length = data.response_lengths(), np.zeros((len(every), len(preference.NAMES)))
    parts = core.split_by_group(data.groups, data.labels, [1] * 5, cfg.split_seed)
    for part in range(5):
        rows = parts == part
        by_length[rows] = preference.length_only(lengths, data.labels, ~rows, rows)
    prior = np.tile(core.class_shares(data.labels, len(preference.NAMES)), (len(every), 1))
    facts = {"labels": data.labels, "groups": data.groups, "lengths": lengths, "cut": data.cut.any(1)}
    facts |= {"log_probs": log_probs, "prior": prior, "by_length": by_length, "temperatures": None}
    v = preference.Verdicts(symmetric=cfg.symmetric, **facts)
    lines = list(preference.predictions(data, every, v, "test", None))
    notes = [*data.lines, data.cut_line()]
    return preference.make_card(v, preference.NAMES), notes, lines, data.fingerprint["data"]


def mean_of_folds(folder, checkpoints, cfg, model, data, world, poll, say=None, temperatures=None):
    """(N, 2, 3) log-probabilities of all rows, as `evaluate` has them; with folds, logs of the probabilities
    averaged over their models. With `say`, a frozen encoder's vectors are cached, and a line says so."""
    every, probs = np.arange(len(data.labels)), 0.0
    for number, name in enumerate(checkpoints):
        core.load_weights(Path(folder) / "checkpoints" / name, core.saved_part(model))
        if say:
            core.cache_vectors(model, data, cfg, world, poll, say)
        log_probs = evaluate(model, data, every, cfg, world, poll)
        if temperatures:
            log_probs = preference.tempered(log_probs, temperatures[number])
        probs = probs + np.exp(log_probs) / len(checkpoints)
    return np.log(probs)


# ----------------------------------------------------------------------------------------------------- Kaggle


def rows_to_judge(cfg, tokenizer, world):
    """The rows of cfg.test_csv, tokenised and measured."""
    data = pairs.load_unlabelled(cfg.test_csv, tokenizer, world)
    pairs.measure_sequences(data, cfg.inputs, cfg.max_length)
    return data


def submit(cfg, world, folders, tested=core.tested_checkpoints, poll=lambda: None, say=print):
    """Writes submission.csv in Kaggle's format: every row of cfg.test_csv, judged by each of the runs in
    `folders` (by all its folds); the mean of their probabilities."""
    tested_of = {folder: core.on_main(world, tested, folder) for folder in map(Path, folders)}
    path, probs = core.on_main(world, submission.place_of, folders, cfg, __file__), 0.0
    typed = cfg.typed.flags & {"eval_batch", "dtype", "encode_once", "calibrate"}
    changes = {"test_csv": cfg.test_csv} | {name: getattr(cfg, name) for name in typed}
    for folder, checkpoints in tested_of.items():
        stored, model, tokenizer = rebuild(folder, world, **changes)  # all else is as the run has it
        temperatures, line = core.on_main(world, submission.validated, folder, stored)
        say(line)
        data = rows_to_judge(stored, tokenizer, world)
        trained_on = core.read_config(folder)["facts"]["fingerprint"]
        if cfg.mode == "submit":  # a run that trains has said it at its start
            submission.note_known_rows(cfg.test_csv, data, trained_on, say)
        log_probs = mean_of_folds(folder, checkpoints, stored, model, data, world, poll, say, temperatures)
        probs = probs + np.exp(preference.combine(log_probs, stored.symmetric)) / len(tested_of)
        for line in [*data.lines, data.cut_line()]:
            say(line)
    core.on_main(world, submission.write_submission, Path(path), data.ids, probs)
    say(f"written: {path}, {len(data.labels)} rows, the mean of {len(tested_of)} run(s)")


# ------------------------------------------------------------------------------------------------------- main


def journal_line(cfg) -> str | None:
    """A line on what the journal got with this preset, and which of its constants were changed."""
    preset, flags = cfg.typed.preset, cfg.typed.flags
    if preset not in JOURNAL_RESULTS:
        return None
    changed = ", ".join(f"{name} {getattr(cfg, name)}" for name in sorted(flags & set(PRESETS[preset])))
    line = f"journal 000 on LMSYS, preset {preset}: {JOURNAL_RESULTS[preset]}"
    return line + (f"\n  (here with {changed})" if changed else "")


def announce(run, cfg, data, rows, model, total_steps):
    """Says what is about to be trained on what, and what was left out or cut."""
    total, trainable = core.count_parameters(model)
    parts = "  ".join(f"{part} {len(numbers)}" for part, numbers in rows.items())
    run.say(f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   {parts}")
    run.begin(total_steps)
    if line := journal_line(cfg):
        run.say(line)
    for line in pairs.set_lines(data, cfg, rows):
        run.say(line)
    lines = [*data.lines, data.cut_line(), soft_labels.soft_line(data, rows, cfg)]
    for line in filter(None, [backbones.adapter_line(cfg, model), *lines]):
        run.say(line)
    if left := len(rows["train"]) % cfg.batch:
        run.say(f"each epoch leaves out {left} training rows (other ones each time): "
                f"they fill no batch of {cfg.batch}")  # fmt: skip


def cross_validate(run, cfg, world, data) -> tuple[list, list]:
    """Trains all folds (or the only one) and returns (splits, outcomes); a resume reads finished folds."""
    splits, outcomes = [pairs.split_rows(data, cfg, fold) for fold in range(cfg.folds or 1)], []
    soft_labels.soft_line(data, splits[0], cfg)  # refuses a wrong teacher before a model is read
    for fold, rows in enumerate(splits):
        done = run.folder / "folds" / f"fold_{fold + 1}.json"
        if fold < run.position.get("fold", 0):
            outcomes.append(core.on_main(world, preference.read_outcome, done))
            continue
        outcomes.append(train(run, cfg, world, data, rows, fold))
        core.on_main(world, files.write_sealed, done, outcomes[-1])
    return splits, outcomes


@record
def main(cfg, world):
    if cfg.mode == "study":
        return core.study(cfg, world, __file__, Config, PRESETS, SMOKE, main)
    cfg = core.with_dtype(cfg, world)
    if cfg.mode == "submit":
        folders = core.on_main(world, submission.folders_to_submit, cfg, __file__)
        return submit(cfg, world, folders, say=print if world.is_main else lambda line: None)
    if not (run := core.open_run(cfg, world, __file__)):
        return None
    with run:
        cfg = run.cfg
        data = core.load_pairs(cfg, world)
        run.pin("fingerprint", data.fingerprint)
        pairs.measure_sequences(data, cfg.inputs, cfg.max_length)
        if cfg.mode == "find_lr":  # on the first fold, if there are folds
            run.result = train(run, cfg, world, data, pairs.split_rows(data, cfg), fold=0)
            return run.result
        if cfg.test_csv:  # is it there, and can it be read?
            judged = rows_to_judge(cfg, data.tokenizer, world)
            submission.note_known_rows(cfg.test_csv, judged, data.fingerprint, run.say)
        splits, outcomes = cross_validate(run, cfg, world, data)
        checkpoints = [outcome["checkpoint"] for outcome in outcomes]  # one a fold
        run.result = core.on_main(world, report, run, cfg, data, splits, outcomes) | {
            "weights_sha256": core.joint_hash([outcome["weights_sha256"] for outcome in outcomes]),
            "test_checkpoints": checkpoints,
            "truncated": data.truncated(),
            **dict(zip(("parameters", "trainable_parameters"), outcomes[0]["parameters"], strict=True)),
        }
        if cfg.test_csv:
            submit(cfg, world, [str(run.folder)], lambda folder: checkpoints, run.poll, run.say)
        run.say(f"curves: tensorboard --logdir {run.folder.parent}")
        run.say(f"next: python eval.py --run {run.folder}")
    return run.result


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
