"""Does more diverse text make a better model, everything else equal? (journal 002)

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_pretrain_diversity.py --preset journal
    python run_pretrain_diversity.py --sources med=abstracts.jsonl pat=patents.jsonl --arms med pat med+pat
    python run_pretrain_diversity.py --mode train --data 0.7*pubmed+0.3*uspto --resume_timestamp auto
    python run_pretrain_diversity.py --mode cache        # texts to token ids only
    python run_pretrain_diversity.py --mode diversity    # the diversity coefficient of the arms only
    python run_pretrain_diversity.py --smoke

Mode study trains every arm with every seed on equally many tokens, measures all of them on the held-out part
of every source and on a neutral text, and sets the arms' diversity coefficients beside that. The same command
goes on where it was. Runs lie under runs/run_pretrain_diversity/, tables and pictures in study-*/ there.
"""

import functools
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch.distributed.elastic.multiprocessing.errors import record

import core
import corpus
import diversity_report as show
import gpt_scratch
import mixture
import results
import runs
import task2vec


@dataclass(frozen=True)
class Config:
    # data
    data: str = "pubmed+uspto"  # what mode train reads: a source, a mixture a+b, or 0.7*a+0.3*b
    arms: tuple[str, ...] = ("pubmed", "uspto", "pubmed+uspto")  # what a study compares
    sources: tuple[str, ...] = (  # name=where: a file, folder, Hub id with :config, or built-in text
        "pubmed=ArmelR/the-pile-splitted:PubMed Abstracts",
        "uspto=ArmelR/the-pile-splitted:UPSTO Backgrounds",
        "c4=allenai/c4:en",
    )
    neutral: str = "c4"  # a third text, that nobody trains on: val/loss and test/loss are on it
    # of its documents in val and in test; none = val_share and test_share, by the same hash, so that no
    # document of it stands in any source's training text
    neutral_share: float | None = None
    text_column: str = "text"  # of tables and Hub sets
    max_documents: int | None = None  # of each source; none = all that are needed
    max_tokens: int | None = None  # of each source's training text; none = what the arms need
    passes: int = 1  # over an arm's distinct tokens: every arm has max_steps x batch x block_size / passes
    repeat: bool = False  # a source that runs out is read again (and counted), otherwise it is an error
    # Hub sets are streamed, downloaded, or downloaded and read in random order
    streaming: Literal["True", "CacheStream", "False"] = "True"
    tokenizer: str = "gpt2"  # of all arms: bpe:<size>, chars, bytes, Hub id or folder
    val_share: float = 0.005  # of each text's documents, by a hash of the document
    test_share: float = 0.005
    held_out_tokens: int = 500_000  # so many in val and in test at least, where a text has them
    split_seed: int = 42
    block_size: int = 1024  # tokens of context
    # model
    model: Literal["gpt2", "llama"] = "gpt2"  # its shape: GPT-2's, or rotary positions, RMSNorm, SwiGLU
    n_layer: int = 8
    n_head: int = 8
    n_embd: int = 512
    dropout: float = 0.0
    checkpointing: bool = False  # recompute blocks in the backward: more time, less memory
    # optimisation
    batch: int = 64  # blocks per optimizer step, over all ranks
    micro_batch: int | None = None  # blocks per forward and rank; none = all of the rank's blocks
    max_steps: int = 20_000  # with batch and block_size the token pool, the same for every arm
    max_minutes: float | None = None  # of training; a study has none: its arms would differ
    lr: float = 6e-4  # peak
    min_lr: float = 6e-5
    warmup: float = 0.02  # fraction of all steps
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # of matrices
    clip: float | None = 1.0  # global gradient norm; none = off
    skip_spikes: bool = False  # no update by a step whose loss or gradient norm leaves its band
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    compile: bool = False
    seed: int = 0  # of weights, order and dropout; the first one of a study
    seeds: int = 3  # of each arm in a study: seed, seed + 1, ...
    # evaluation and logging
    eval_batch: int = 64  # windows of held-out text per evaluation step, over all ranks
    eval_every: int | None = 2000  # steps; none = at the end only
    eval_rows: int | None = 500  # windows of each val part, spread evenly; none = all
    final_eval: bool = True  # the test parts, once, at the end
    test_weights: Literal["best", "last"] = "last"  # lowest validation loss, or the final ones
    save_every: int | None = 2000  # steps; none = at each evaluation, before it
    keep: int = 2  # checkpoints
    log_every: int = 50  # steps
    price_per_hour: float | None = None  # dollars for the whole box
    note: str = ""
    # diversity coefficient
    probe: str = "gpt2"  # GPT-2 or Llama folder, Hub id, a run folder, or study: the last arm's first run
    procedure: Literal["clean", "published"] = "clean"  # task2vec.py says how they differ
    diversity_batches: int = 200  # of each arm; 0 = a study without coefficients
    diversity_batch: int = 512  # sequences
    diversity_length: int = 128  # tokens of a sequence
    sequences: Literal["documents", "pieces"] = "documents"  # a document's first tokens, or all of them
    head_epochs: int = 10  # over a batch, before its embedding is taken
    fisher_samples: int = 1  # target draws that an embedding averages
    floor_repeats: int = 4  # embeddings of one batch: their distance is the noise floor
    # run
    mode: Literal["study", "train", "cache", "diversity"] = "study"
    dirty: bool = True  # --no-dirty refuses to start with uncommitted changes
    out: str | None = None  # none = runs/run_pretrain_diversity below the current folder
    tag: str | None = None  # none = the preset's name
    resume_timestamp: str | None = None  # of mode train: a timestamp, latest, or auto
    resume_step: int | None = None  # an older checkpoint than the newest
    backend: Literal["auto", "nccl", "xccl", "gloo"] = "auto"

    def __post_init__(self):
        resumes = self.resume_timestamp not in (None, "auto") or self.resume_step is not None
        if self.mode != "train" and resumes:
            raise core.UserError(
                f"mode {self.mode} goes on by itself: drop --resume_timestamp, --resume_step"
            )
        if self.mode == "study" and self.max_minutes is not None:
            raise core.UserError("--max_minutes: the arms of a study see the same tokens, use --max_steps")
        if self.mode == "study" and not self.final_eval:
            raise core.UserError("--no-final_eval: a study needs its runs measured")
        if self.diversity_batches == 1:
            raise core.UserError("--diversity_batches 1: a distance needs 2, and 0 leaves it out")
        if not self.test_share:
            raise core.UserError("--test_share 0 leaves nothing to measure: use 0.01, say")
        if self.val_share + self.test_share >= 1:
            raise core.UserError(
                f"val_share {self.val_share} + test_share {self.test_share} leave nothing to train on"
            )


# Journal 002: transformers' Trainer as it comes. A mirror may hold less than 1.31 billion tokens of a subset:
# the journal's interleaving stopped there, ours reads it again and counts.
JOURNAL = {
    **{"streaming": "CacheStream", "repeat": True, "dropout": 0.1, "lr": 5e-5, "min_lr": 0.0, "warmup": 0.0},
    **{"schedule": "linear", "beta2": 0.999, "weight_decay": 0.0, "seed": 42},
}
PRESETS = {"recommended": {}, "journal": JOURNAL}
SMOKE = {
    **{"data": "python-docs+python-code", "arms": ("python-docs", "python-code", "python-docs+python-code")},
    **{"sources": (), "neutral": "numpy-docs", "max_documents": 1500, "held_out_tokens": 20_000},
    **{"tokenizer": "bpe:512", "val_share": 0.05, "test_share": 0.05, "block_size": 64, "repeat": False},
    **{"n_layer": 2, "n_head": 4, "n_embd": 64, "dropout": 0.0, "batch": 24, "max_steps": 200},
    **{"lr": lambda lr: 6 * lr, "dtype": "fp32", "seeds": 1, "save_every": None},
    **{"eval_every": 100, "eval_rows": 60},
    **{"probe": "study", "diversity_batches": 4, "diversity_batch": 24, "diversity_length": 32},
    **{"sequences": "pieces", "head_epochs": 2, "floor_repeats": 3},
}
SHAPES = {
    "gpt2": {},
    "llama": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "qkv_bias": False,
    },
}
BOUND_BATCHES = 20  # of each synthetic bound, at most

# --------------------------------------------------------------------------------------------------- the text


def shares_of(arm) -> dict[str, float]:
    """Label of each source of an arm -> its share."""
    shares = mixture.shares_of(arm)
    if len(found := {mixture.label(name): share for name, share in shares.items()}) < len(shares):
        raise core.UserError(
            f"arm {arm}: two sources have the same name, give them others by --sources name=where"
        )
    return found


def corpora_of(cfg) -> dict[str, corpus.Corpus]:
    """Label -> where and how each source of an arm, and the neutral text, is read. UserError for bad arms."""
    named, found = mixture.named_sources(cfg.sources), {}
    pool = cfg.max_steps * cfg.batch * cfg.block_size / cfg.passes
    shared = {"text_column": cfg.text_column, "max_documents": cfg.max_documents, "streaming": cfg.streaming}
    shared |= {"val_share": cfg.val_share, "test_share": cfg.test_share, "split_seed": cfg.split_seed}
    # by the hash alone: a document is held out of every source, or of none
    shared |= {"tokenizer": cfg.tokenizer, "first_trains": False, "held_out_tokens": cfg.held_out_tokens}
    # a run that belongs to the study reads what the study reads: the same pools, the same tokenizer
    arms = (cfg.data,) if cfg.mode == "train" and cfg.data not in cfg.arms else cfg.arms
    arms = [mixture.shares_of(arm) for arm in arms]
    for name in dict.fromkeys(name for shares in arms for name in shares):
        most = cfg.max_tokens or max(1, math.ceil(max(s.get(name, 0) for s in arms) * pool)) + cfg.block_size
        one = corpus.Corpus(named.get(name, name), max_tokens=most, **shared)
        if found.setdefault(mixture.label(name), one) != one:
            raise core.UserError(
                f"two sources are called {mixture.label(name)}: name them by --sources name=where"
            )
    if (neutral := neutral_of(cfg)) in found:
        raise core.UserError(f"--neutral {cfg.neutral} is trained on by an arm: use a third text")
    where = named.get(cfg.neutral, cfg.neutral)
    if cfg.neutral_share:
        shared |= {"val_share": cfg.neutral_share, "test_share": cfg.neutral_share}
    # of it only what is held out counts
    return found | {neutral: corpus.Corpus(where, max_tokens=1, **shared)}


def neutral_of(cfg) -> str:
    return mixture.label(cfg.neutral)


def open_text(cfg, world) -> mixture.Text:
    """Token caches of the sources that cfg reads and of the neutral text (last), built if need be."""
    corpora, neutral = corpora_of(cfg), neutral_of(cfg)
    sources = {name: one for name, one in corpora.items() if name != neutral}
    names = [*(shares_of(cfg.data) if cfg.mode == "train" else sources)]
    names += [] if cfg.mode == "diversity" else [neutral]
    wanted = {name: corpora[name] for name in names}
    return mixture.open_text(wanted, cfg.tokenizer, sources, world)


def batches_of(cfg, arm, text, world) -> mixture.Batches:
    """What a run reads, in order; UserError where a source holds less than the arm asks for."""
    shares = shares_of(arm)
    blocks = mixture.Blocks({name: text.tokens[name].parts["train"] for name in shares}, cfg.block_size)
    return mixture.Batches(blocks, shares, cfg.batch, cfg.max_steps, world, cfg.seed, cfg.passes, cfg.repeat)


def held_out(cfg, text, name, part):
    """(windows, document of each); of val at most eval_rows of them, spread evenly."""
    windows, groups = mixture.held_out(text.tokens[name], part, cfg.block_size)
    if not len(windows):
        raise core.UserError(f"{name} leaves no {part} text: use more documents, or a larger --{part}_share")
    most = cfg.eval_rows if part == "val" else None
    if most and most < len(windows):
        chosen = np.linspace(0, len(windows) - 1, most).round().astype(int)
        windows.windows, groups = [windows.windows[i] for i in chosen], groups[chosen]
        windows.lengths = windows.lengths[chosen]
    return windows, groups


# -------------------------------------------------------------------------------------------------- measuring


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, from its folder alone; the weights it was tested with."""
    stored, known = runs.read_config(folder)["constants"], {field.name for field in fields(Config)}
    cfg = Config(**{name: value for name, value in stored.items() if name in known})
    model, tokenizer = gpt_scratch.open_model(folder)
    return cfg, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer


evaluate = gpt_scratch.evaluate  # (windows, 3): summed loss, hits, targets of each


@dataclass
class Measured:
    """What a model makes of one held-out text: sums (windows, 3), and what they are compared with."""

    sums: np.ndarray
    groups: np.ndarray  # document of each window
    plain: np.ndarray  # (windows,): summed loss by the training text's token frequencies
    spelt: np.ndarray  # (windows,): bytes of the targets

    def figures(self) -> dict:
        return core.language_metrics(self.sums, self.groups, self.plain, self.spelt)

    def lines(self, part) -> list[dict]:
        return runs.loss_lines(part, np.arange(len(self.sums)), self.groups, self.sums, self.spelt)


def measure(model, cfg, text, name, part, world, poll) -> Measured:
    windows, groups = held_out(cfg, text, name, part)
    frequencies = text.frequencies(shares_of(cfg.data))
    log_share = np.log((frequencies + 1) / (frequencies.sum() + len(frequencies)))
    plain, spelt = (np.array([of[ids].sum() for ids in windows.wanted()]) for of in (-log_share, text.sizes))
    return Measured(evaluate(model, windows, cfg, world, poll), groups, plain, spelt)


def joined(parts) -> Measured:
    """Several texts as one, documents told apart."""
    groups, offset = [], 0
    for part in parts:
        groups.append(part.groups + offset)
        offset += part.groups.max() + 1
    sums, plain, spelt = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("sums", "plain", "spelt")
    )
    return Measured(sums, np.concatenate(groups), plain, spelt)


BRIEF = ("loss", "loss_interval", "perplexity", "accuracy", "bits_per_byte")  # kept of a single source


def figures(model, cfg, text, part, world, poll) -> tuple[dict, Measured]:
    """Of one part: on the neutral text (loss, accuracy ...), the same for all arms; on what the arm reads
    (own/..., with an alarm), and on each of its sources."""
    neutral = measure(model, cfg, text, neutral_of(cfg), part, world, poll)
    sources = {name: measure(model, cfg, text, name, part, world, poll) for name in shares_of(cfg.data)}
    own = joined(list(sources.values())).figures()
    alarm = f"NOT LEARNING: own loss {own['loss']:.4f}, token frequencies alone {own['unigram_loss']:.4f}"
    found = {f"{part}/{name}": value for name, value in neutral.figures().items()}
    found |= {f"{part}/own/{name}": value for name, value in own.items()}
    found[f"{part}/own/alarm"] = alarm if own["above_unigram_interval"][1] >= 0 else None
    for name, source in sources.items():
        of_source = source.figures()
        found |= {f"{part}/{name}/{figure}": of_source[figure] for figure in BRIEF}
    return found, neutral


def parts_of(cfg) -> tuple[str, ...]:
    """The parts whose figures a run ends with, the most important one last."""
    return ("val", "test") if cfg.final_eval else ("val",)


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, tuple[str, list]]:
    """The figures of a run's own val and test text, measured again, and losses.jsonl: its name and lines."""
    cfg, model, _ = load_model(folder, world)
    cfg = replace(cfg, eval_batch=eval_batch or cfg.eval_batch)
    text, result = open_text(cfg, world), {}
    stored, found = runs.read_config(folder)["facts"]["fingerprint"], text.fingerprint(neutral_of(cfg))
    runs.same_data(stored, found, cfg.data, ("data", "tokenizer", "sources"))
    for part in parts_of(cfg):
        of_part, neutral = figures(model, cfg, text, part, world, poll)
        result |= of_part
    return result, ("losses.jsonl", neutral.lines(part))


def report(run, cfg, found, part, where="", note=""):
    """A line: the neutral text's figures, then the loss on each source that the arm reads."""
    loss = core.plus_minus(found[f"{part}/loss"], found[f"{part}/loss_interval"], 4)
    accuracy = core.plus_minus(found[f"{part}/accuracy"], found[f"{part}/accuracy_interval"])
    own = "  ".join(f"{name} {found[f'{part}/{name}/loss']:.4f}" for name in shares_of(cfg.data))
    head = f"{where}  {part}".strip()
    run.say(f"{head:5} loss {loss}  accuracy {accuracy}  on {neutral_of(cfg)}{note}")
    run.say(f"{head:5} loss {own}")


# ------------------------------------------------------------------------------------------------------ train


def train(run, cfg, world) -> dict:
    text, neutral = open_text(cfg, world), neutral_of(cfg)
    run.pin("fingerprint", text.fingerprint(neutral))
    batches = batches_of(cfg, cfg.data, text, world)
    run.pin("ledger", batches.ledger())  # another length would be another order: start a new run
    for name in (*shares_of(cfg.data), neutral):
        for part in parts_of(cfg):
            held_out(cfg, text, name, part)
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(build_model(cfg, len(text.tokenizer)))
    optimizer = core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, (cfg.beta1, cfg.beta2))
    run.pin("initial_weights", runs.weights_sha256(model))
    saved = model, optimizer, precision
    announce(run, cfg, text, batches, model)
    step, total_steps = run.load(*saved), cfg.max_steps
    core.on_main(world, lambda: gpt_scratch.describe_model(run.folder, model, text.tokenizer))
    if cfg.compile:
        for block in model.h:
            block.compile()
    ddp = core.wrap_ddp(model, world)

    def forward_backward(rows, targets) -> float:
        """Gradients of this rank's share of the summed loss / targets; returns the share's sum."""
        losses = []
        for part in core.micro_batches(ddp, rows, cfg.micro_batch):
            with precision.autocast():
                losses.append(ddp(*batches.blocks.batch(part, world.device)))
            core.scaled_backward(losses[-1], world, targets, precision)
        return sum(loss.item() for loss in losses)

    core.reseed(cfg.seed, "worst case")
    worst = list(range(min(len(batches.blocks), math.ceil(cfg.batch / world.size))))
    at_once = min(cfg.micro_batch or len(worst), len(worst))
    targets = cfg.batch * cfg.block_size
    seconds = core.worst_case(world, ddp, lambda: forward_backward(worst, targets), optimizer, at_once)
    run.poll()
    run.forecast(model, optimizer, total_steps - step, seconds, typical=1.0)
    run.say(describe_block(text.tokenizer, batches))
    seen, val = run.state.setdefault("seen", dict.fromkeys(shares_of(cfg.data), 0)), None

    while True:
        ends = step >= total_steps
        due = ends or (step > 0 and cfg.eval_every and step % cfg.eval_every == 0)
        saves = step % cfg.save_every == 0 if cfg.save_every else due
        if ends or (saves and step > 0):
            run.save(step, *saved, must=ends)
        if due and run.state.get("evaluated") != step:
            # without a checkpoint just made, a signal waits until the evaluation is over, and is then saved
            val = check(run, cfg, text, model, step, run.poll if ends or saves else run.agree)
        if ends:
            break
        val, rows = None, batches.rank_batch(step)
        run.agree()
        if run.stopping:
            run.save(step, *saved, must=True)
            raise core.Stop(run.stopping)
        if run.clock_share >= 1:  # max_minutes are spent
            total_steps = step
            continue
        core.reseed(cfg.seed, step, world.rank)
        lr = core.lr_at(cfg, step, run.schedule_length(step, total_steps))
        loss_sum = forward_backward(rows, targets)
        for name, blocks in batches.seen(step).items():
            seen[name] += blocks
        facts = functools.partial(autopsy, text, batches, step, lr)
        step += 1
        odd = run.watch(step, loss_sum, targets, model, facts)
        grad_norm = core.optimizer_step(optimizer, precision, cfg.clip, lr, skip=odd)
        run.step_done(loss_sum, targets, examples=targets)
        if step % cfg.log_every == 0 or step == total_steps:
            where = f"{step * targets / 1e6:.3g}M tokens"
            run.log_training(where, step, total_steps, {"lr": lr, "grad_norm": grad_norm})
    return finish(run, cfg, world, text, model, batches, val if cfg.test_weights == "last" else None)


def build_model(cfg, vocab_size) -> gpt_scratch.GPT:
    shape = {name: getattr(cfg, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    shape |= {"checkpointing": cfg.checkpointing, **SHAPES[cfg.model]}
    return gpt_scratch.GPT(gpt_scratch.GPTConfig(vocab_size, **shape))


def announce(run, cfg, text, batches, model):
    """What is about to be trained on what: the ledger, in lines."""
    total, trainable = core.count_parameters(model)
    ledger = batches.ledger()
    run.say(
        f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   "
        f"{ledger['tokens']} tokens"
    )
    run.begin()
    for name, one in ledger["sources"].items():
        documents = "  ".join(f"{part} {n}" for part, n in text.tokens[name].documents.items())
        blocks = f"{one['distinct_blocks']} blocks of {ledger['block_size']} tokens"
        run.say(f"source {name}  {blocks}, read {one['epochs']:.3g} times  documents {documents}")
    for name in (*ledger["sources"], neutral_of(cfg)):
        for line in text.tokens[name].lines:
            run.say(f"{name}  {line}")
    passes = [one["epochs"] for one in ledger["sources"].values()]
    if max(passes) > cfg.passes:
        run.say("NOTE --repeat: a source is read more often than the others, it has less new text")
    core.on_main(run.world, lambda: core.write_json(run.folder / "ledger.json", ledger))


def describe_block(tokenizer, batches) -> str:
    """The first block of the first step, decoded from its ids."""
    ids = batches.blocks.tokens(int(batches.rows[0]) if len(batches.rows) else 0)
    text = gpt_scratch.one_line(tokenizer.decode(ids[:200].tolist()))
    return f"the loss sees, in {len(ids) - 1} targets (all but the first token):\n  {text[:96]}"


def autopsy(text, batches, step, lr) -> dict:
    """What an odd step saw, for spikes.jsonl."""
    rows = batches.global_batch(step).tolist()
    first = text.tokenizer.decode(batches.blocks.tokens(rows[0]).tolist())
    return {"lr": lr, "rows": rows, "sources": batches.seen(step), "first_row": first}


def check(run, cfg, text, model, step, poll) -> tuple:
    """Validation: metrics, a line, the best weights. Returns what `figures` found."""
    found, neutral = figures(model, cfg, text, "val", run.world, poll)
    best = cfg.test_weights == "best" and run.save_best(step, found["val/loss"], model)
    where = f"step {step}/{cfg.max_steps}"
    report(run, cfg, found, "val", where, "  -> best" if best else "")
    if found["val/own/alarm"] and 2 * step >= cfg.max_steps:
        run.say(f"{where}  val  {found['val/own/alarm']}")
    names = [name for name in found if name.rpartition("/")[2] in ("loss", "perplexity", "accuracy")]
    run.metrics(step, {name: found[name] for name in names})
    run.state["evaluated"] = step
    return found, neutral


def finish(run, cfg, world, text, model, batches, val=None) -> dict:
    """Checks the ledger, measures the chosen weights on val (if not `val`) and test, says what comes next."""
    ledger, seen = batches.ledger(), run.state["seen"]
    planned = {name: one["blocks"] for name, one in ledger["sources"].items()}
    if cfg.max_minutes is None and seen != planned:
        raise RuntimeError(f"the run read {seen} blocks, its ledger says {planned}")
    sha256, measured, result = runs.weights_sha256(model), run.checkpoint, {}
    if cfg.test_weights == "best":
        measured = run.load_best(model)
    for part in parts_of(cfg):
        known = val if part == "val" else None  # of these very weights
        found, neutral = known or figures(model, cfg, text, part, world, run.poll)
        result |= found
        if not known:
            report(run, cfg, found, part)
            if alarm := found[f"{part}/own/alarm"]:
                run.say(f"{part:5} {alarm}")
    core.on_main(world, lambda: core.write_lines(run.folder / "losses.jsonl", neutral.lines(part)))
    loss, perplexity = result[f"{part}/loss"], result[f"{part}/perplexity"]
    run.say(f"done  {part} loss {loss:.4f}  perplexity {perplexity:.2f}  {run.seconds / 60:.1f} min")
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"next: python eval.py --run {run.folder}")
    return result | {
        "weights_sha256": sha256,
        "test_checkpoints": [measured],
        "parameters": core.count_parameters(model)[0],
        "blocks_read": seen,
    }


# ------------------------------------------------------------------------------------------------------ study
# Every arm with every seed, one after the other; then all of them on all held-out texts


@dataclass
class Study:
    """What the stages share: where results go, how to say a line, what polls for signals."""

    cfg: Config
    world: core.World
    text: mixture.Text
    folder: Path
    say: object
    poll: object

    @property
    def texts(self) -> list[str]:
        """Labels of the held-out texts, the neutral one last."""
        return list(self.text.tokens)


OF_DIVERSITY = {"probe", "procedure", "sequences", "head_epochs", "fisher_samples", "floor_repeats"}
OF_DIVERSITY |= {"diversity_batches", "diversity_batch", "diversity_length"}


def matters(cfg) -> frozenset[str]:
    """Names of the constants that make a run what it is; one that differs in any of them is another run."""
    own = {field.name for field in fields(Config)} - OF_DIVERSITY - runs.MAY_CHANGE - runs.OF_THE_CALL
    return frozenset(own - {"seeds", "dirty"} - (set() if mixture.is_learnt(cfg.tokenizer) else {"arms"}))


def run_config(cfg, arm, seed) -> Config:
    """The constants of one run of the study; max_steps, which a resume might change, is in its tag."""
    tag = "-".join(filter(None, [cfg.tag, results.slug(arm), str(cfg.max_steps), f"s{seed}"]))
    one = replace(cfg, mode="train", data=arm, seed=seed, tag=tag, resume_timestamp="auto")
    object.__setattr__(one, "typed", replace(core.typed(cfg), flags=matters(cfg)))
    return one


def study_folder(cfg) -> Path:
    """<out>/study[-tag]-<hash of the constants that its results depend on>/"""
    aside = (runs.MAY_CHANGE - {"max_steps"}) | runs.OF_THE_CALL | {"mode", "data", "dirty"}
    constants = {name: value for name, value in asdict(cfg).items() if name not in aside}
    mark = hashlib.sha256(json.dumps(constants).encode()).hexdigest()[:6]
    return runs.out_folder(cfg, __file__) / "-".join(filter(None, ["study", cfg.tag, mark]))


def study(cfg, world, say, poll):
    """Trains what is missing, measures, compares; each stage finds again what it had done."""
    text = open_text(cfg, world)
    for arm in cfg.arms:  # all mistakes before the first step
        batches_of(cfg, arm, text, world)
    folder = study_folder(cfg)
    core.on_main(world, lambda: folder.mkdir(parents=True, exist_ok=True))
    s = Study(cfg, world, text, folder, say, poll)
    if cfg.diversity_batches:
        check_sequences(s, cfg.probe != "study")
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    where, planned, began = {}, [(seed, arm) for seed in seeds for arm in cfg.arms], time.monotonic()
    for number, (seed, arm) in enumerate(planned):
        left = (time.monotonic() - began) / number * (len(planned) - number) if number else None
        eta = f"  eta of all {runs.clock(left)}" if left else ""
        say(f"study  run {number + 1} of {len(planned)}  arm {arm}  seed {seed}{eta}")
        where.setdefault(arm, []).append(train_one(run_config(cfg, arm, seed), world, say))
        poll()
    say(core.on_main(world, lambda: check_ledgers(cfg, where)))
    matrix = cross_evaluate(s, where)
    found = diversity(s, where) if cfg.diversity_batches else None
    core.on_main(world, lambda: conclude(s, matrix, found))


def finished(cfg) -> Path | None:
    return runs.finished_run(cfg, __file__)


def train_one(cfg, world, say) -> Path:
    """The folder of the finished run, which is made or resumed if need be; core.Stop if it was stopped."""
    if folder := core.on_main(world, lambda: str(finished(cfg) or "")):
        say(f"finished already: {folder}")
        return Path(folder)
    ended = False
    with runs.Run(cfg, world, __file__, unit="tokens") as run:
        run.result = train(run, run.cfg, world)
        ended = True
    if not ended:
        raise core.Stop(f"the study: the same command goes on with {run.folder}")
    return run.folder


def check_ledgers(cfg, where) -> str:
    """Two arms of a seed differ in nothing but the source: constants, tokens, first weights. UserError."""
    arms = list(where)
    for place in range(len(where[arms[0]])):
        configs = [runs.read_config(where[arm][place]) for arm in arms]
        for arm, config in zip(arms[1:], configs[1:], strict=True):
            first, other = configs[0]["constants"], config["constants"]
            odd = [name for name in sorted(matters(cfg) - {"data"}) if first[name] != other[name]]
            first, other = configs[0]["facts"], config["facts"]
            odd += mixture.differences(first["ledger"], other["ledger"])
            odd += ["initial_weights"] * (first["initial_weights"] != other["initial_weights"])
            if odd:
                pair = f"{where[arms[0]][place]} and {where[arm][place]}"
                raise core.UserError(f"{pair} differ in {', '.join(odd)}, not in text alone: train one anew")
    ledger = configs[0]["facts"]["ledger"]
    said = f"ledger  every run read {ledger['tokens']} tokens in {ledger['steps']} steps"
    said += "; arms of a seed differ in text alone"
    pools = {arm: distinct(runs.read_config(where[arm][0])["facts"]["ledger"]) for arm in arms}
    if len(set(pools.values())) > 1:
        said += "\nNOTE distinct blocks differ (--repeat): " + ", ".join(f"{a} {n}" for a, n in pools.items())
    return said


def distinct(ledger) -> int:
    return sum(one["distinct_blocks"] for one in ledger["sources"].values())


# ------------------------------------------------------------------------------------------- cross-evaluation


def cross_evaluate(s, where) -> dict:
    """Every run on the test part of every text: arm -> text -> a file like losses.jsonl for each seed."""
    found, total, done = {}, sum(map(len, where.values())) * len(s.texts), 0
    for arm, folders in where.items():
        for folder in folders:
            loaded = None
            for name in s.texts:
                path = Path(core.on_main(s.world, lambda f=folder, n=name: str(cross_file(s, f, n))))
                if not core.on_main(s.world, path.exists):
                    loaded = loaded or load_model(folder, s.world)
                    cfg = replace(loaded[0], eval_batch=s.cfg.eval_batch)
                    lines = measure(loaded[1], cfg, s.text, name, "test", s.world, s.poll).lines("test")
                    core.on_main(s.world, functools.partial(core.write_lines, path, lines))
                found.setdefault(arm, {}).setdefault(name, []).append(path)
                done += 1
            s.say(f"measured  {done} of {total}  {folder.name}")
    return found


def cross_file(s, folder, name) -> Path:
    """Named after what it depends on: the weights, the text, how it is cut."""
    weights = json.loads((folder / "result.json").read_text())["test_checkpoints"][0]
    weights = runs.read_manifest(folder / "checkpoints" / weights)["files"]["model.safetensors"]
    tokens = s.text.tokens[name]
    key = json.dumps([weights, tokens.fingerprint, len(tokens.parts["test"]), s.cfg.block_size])
    return s.folder / "cross" / f"{folder.name}-{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.jsonl"


# -------------------------------------------------------------------------------------- diversity coefficient


def check_sequences(s, opens_probe):
    """Mistakes in what mode diversity would draw, before anything is trained."""
    if opens_probe:
        draws_of(s, open_probe(s, {})[1])
    else:
        check_length(s.cfg, s.cfg.block_size)
        draws_of(s, s.text.tokenizer)


def check_length(cfg, most):
    if cfg.diversity_length > most:
        raise core.UserError(f"--diversity_length {cfg.diversity_length} is over the probe's {most} tokens")


def open_probe(s, where):
    """(model, tokenizer); `where`: arm -> folders of its finished runs."""
    name = s.cfg.probe
    if name == "study":
        arm = s.cfg.arms[-1]
        one = run_config(s.cfg, arm, s.cfg.seed)
        name = core.on_main(s.world, lambda: str(where[arm][0] if where else finished(one) or ""))
        if not name:
            raise core.UserError(f"--probe study: arm {arm} has no finished run: train it, or name a probe")
    probe, tokenizer = core.main_first(s.world, lambda: gpt_scratch.open_model(name))
    check_length(s.cfg, probe.config.block_size)
    if tokenizer.eos_token_id is None:
        raise core.UserError(f"the probe {name} has no end-of-text token: use a GPT-2")
    # the squares of small gradients leave no room for halves
    dtype = "fp64" if s.cfg.dtype == "fp64" else "fp32"
    return core.Precision(dtype, s.world).prepare(probe).eval(), tokenizer


def draws_of(s, tokenizer) -> dict:
    """arm -> a function that draws its batch i: (i) -> task2vec.Batch. UserError where a source is too small.

    Batches of an arm share no sequence, unless its source is read again; a mixture takes what its sources'
    own batches take, each in proportion.
    """
    cfg, n = s.cfg, s.cfg.diversity_batches
    same = core.tokenizer_fingerprint(tokenizer) == core.tokenizer_fingerprint(s.text.tokenizer)
    text = s.text if same else reread(s, tokenizer)
    known = {}
    for name in {name for arm in cfg.arms for name in shares_of(arm)}:
        stream = text.tokens[name].parts["train"]
        known[name] = task2vec.Sequences(stream, tokenizer.eos_token_id, cfg.diversity_length, cfg.sequences)
    draws = {}
    for arm in cfg.arms:
        shares = shares_of(arm)
        counts = dict(zip(shares, mixture.apportion(list(shares.values()), cfg.diversity_batch), strict=True))
        for name, count in counts.items():
            if count * n > len(known[name]) and not (cfg.repeat and len(known[name])):
                there = f"{len(known[name])} sequences, enough for {len(known[name]) // count}"
                better = "use fewer or smaller ones, --sequences pieces, more text, or --repeat"
                raise core.UserError(f"{name} has {there} of {n} diversity batches: {better}")
        orders = {}
        for name, count in counts.items():
            most = min(count * n, len(known[name]))
            orders[name] = mixture.source_order(cfg.seed, f"{name} drawn", len(known[name]), count * n, most)

        def draw(i, counts=counts, orders=orders):
            parts = [known[name].batch(orders[name][i * c : (i + 1) * c]) for name, c in counts.items()]
            return task2vec.joined(parts)

        draws[arm] = draw
    return draws


def reread(s, tokenizer) -> mixture.Text:
    """The sources' text in the tokens of the probe."""
    folder = core.cache_root() / f"probe_{core.tokenizer_fingerprint(tokenizer)[:16]}"

    def keep() -> str:
        if not folder.exists():
            with core.whole_folder(folder) as aside:
                tokenizer.save_pretrained(aside)
        return str(folder)

    name = core.on_main(s.world, keep)
    corpora = {label: one for label, one in corpora_of(s.cfg).items() if label != neutral_of(s.cfg)}
    return mixture.open_text(corpora, name, {}, s.world)


def diversity(s, where) -> dict:
    """Embeds what is not embedded yet, spread over the ranks; then coefficients, floors, cross-distances."""
    probe, tokenizer = open_probe(s, where)
    end, cfg, draws = tokenizer.eos_token_id, s.cfg, draws_of(s, tokenizer)
    weights = core.on_main(s.world, lambda: runs.weights_sha256(probe))
    for kind in ("lower bound", "upper bound"):
        draws[kind] = functools.partial(draw_bound, kind, cfg, len(tokenizer), end)
    places = {name: embedding_folder(s, name, weights) for name in draws}
    jobs = [(name, i, 0) for name in draws for i in range(batches_in(cfg, name))]
    jobs += [(arm, 0, repeat) for arm in cfg.arms for repeat in range(1, cfg.floor_repeats)]
    jobs = sorted(jobs, key=lambda job: job[1:])  # round by round: an early look sees all arms
    missing = core.on_main(s.world, lambda: [job for job in jobs if not embedding_file(places, job).exists()])
    if missing:
        s.say(f"diversity  {len(missing)} of {len(jobs)} embeddings to make, procedure {cfg.procedure}")

    def embed(job):
        name, i, repeat = job
        core.reseed(cfg.seed, name, i, repeat)  # the same on whichever rank
        choice = {"epochs": cfg.head_epochs, "samples": cfg.fisher_samples}
        vector = task2vec.embed(probe, draws[name](i), end, cfg.procedure, **choice)
        if not np.isfinite(vector).all():
            raise FloatingPointError(
                f"the embedding of batch {i} of {name} is not finite: is the probe whole?"
            )
        with core.whole_file(embedding_file(places, job), "wb") as file:
            np.save(file, vector)

    share_out(s, missing, embed)
    return core.on_main(s.world, lambda: coefficients(s, places))


def share_out(s, jobs, work):
    """`work(job)` for each, spread over the ranks, with polls between; a line at every tenth."""
    began, told, size = time.monotonic(), 0, s.world.size
    with core.progress(len(jobs), "embedding", s.world) as bar:
        for start in range(0, len(jobs), size):
            s.poll()
            if start * 10 // len(jobs) > told:
                told, left = start * 10 // len(jobs), (time.monotonic() - began) * (len(jobs) / start - 1)
                s.say(f"embedded  {start} of {len(jobs)}  eta {runs.clock(left)}")
            for job in jobs[start : start + size][s.world.rank :: size]:
                work(job)
            bar.update(size)
    core.barrier(s.world)


def batches_in(cfg, name) -> int:
    return (
        min(cfg.diversity_batches, BOUND_BATCHES)
        if name in ("lower bound", "upper bound")
        else cfg.diversity_batches
    )


def draw_bound(kind, cfg, vocab_size, end, i) -> task2vec.Batch:
    rng, shape = np.random.default_rng([cfg.seed, i]), (cfg.diversity_batch, cfg.diversity_length)
    token = None
    if kind == "lower bound":  # the same in all batches
        token = int(np.random.default_rng(cfg.seed).choice(np.delete(np.arange(vocab_size), end)))
    return task2vec.synthetic(shape, vocab_size, end, rng, token)


def embedding_folder(s, name, weights) -> Path:
    """Named after everything that an embedding of this arm depends on."""
    of_arm = {n: s.text.tokens[n].fingerprint["data"] for n in shares_of(name)} if name in s.cfg.arms else {}
    of_arm |= {"shares": shares_of(name)} if of_arm else {}
    constants = {
        n: getattr(s.cfg, n) for n in sorted(OF_DIVERSITY - {"diversity_batches", "floor_repeats", "probe"})
    }
    constants |= {
        n: getattr(s.cfg, n) for n in ("max_documents", "max_tokens", "val_share", "test_share", "split_seed")
    }
    constants |= {
        "pool": s.cfg.max_steps * s.cfg.batch * s.cfg.block_size / s.cfg.passes,
        "batches": s.cfg.diversity_batches * s.cfg.repeat,
    }
    constants |= {"seed": s.cfg.seed, "dtype": s.cfg.dtype == "fp64", "text_column": s.cfg.text_column}
    mark = hashlib.sha256(json.dumps([name, weights, of_arm, constants]).encode()).hexdigest()[:12]
    return runs.out_folder(s.cfg, __file__) / "embeddings" / f"{results.slug(name)}-{mark}"


def embedding_file(places, job) -> Path:
    name, i, repeat = job
    places[name].mkdir(parents=True, exist_ok=True)
    return places[name] / f"batch_{i:05d}{f'_again_{repeat}' if repeat else ''}.npy"


def coefficients(s, places) -> dict:
    """Rank 0: all figures of the coefficient, from the embeddings on the disk."""
    cfg, found = s.cfg, {"arms": {}, "bounds": {}, "cross": {}}
    kept = {}
    for name in places:
        files = [embedding_file(places, (name, i, 0)) for i in range(batches_in(cfg, name))]
        kept[name] = np.stack([np.load(file) for file in files])
        table = task2vec.pairwise(kept[name])
        one = {"coefficient": task2vec.coefficient(table), "interval": task2vec.coefficient_interval(table)}
        one |= {"batches": len(files), "length": kept[name].shape[1]}
        if name in cfg.arms:
            again = [embedding_file(places, (name, 0, repeat)) for repeat in range(1, cfg.floor_repeats)]
            floor = task2vec.pairwise(np.stack([kept[name][0], *map(np.load, again)]))
            one |= {"noise_floor": task2vec.coefficient(floor), "floor_repeats": cfg.floor_repeats}
        found["arms" if name in cfg.arms else "bounds"][name] = one
    for number, a in enumerate(cfg.arms):
        for b in cfg.arms[number + 1 :]:
            table = task2vec.distances(kept[a], kept[b])
            one = {"coefficient": float(table.mean()), "interval": task2vec.cross_interval(table)}
            found["cross"][f"{a} x {b}"] = one
    return found


# --------------------------------------------------------------------------------------------- what comes out


def conclude(s, matrix, found):
    """Rank 0: study.md, study.json, matrix.png, link.png; the same tables in the terminal."""
    figures = show.cells(matrix)
    told, differences = show.verdicts(matrix, s.cfg.seeds)
    parts = ["\n".join(told), show.tables(figures)]
    s.say("\n" + show.tables({"loss": figures["loss"]}) + "\n")
    for line in told:
        s.say(line)
    neutral = neutral_of(s.cfg)
    show.heat_map(figures["loss"], s.folder / "matrix.png", neutral)
    content = {"matrix": figures, "differences": differences, "diversity": found, "constants": asdict(s.cfg)}
    if found:
        link = show.link_table(found, neutral, figures)
        parts += [
            "**diversity coefficient**\n\n" + show.diversity_table(found),
            "**diversity and loss**\n\n" + link,
        ]
        s.say("\n" + show.diversity_table(found) + "\n\n" + link)
        show.plot_link(found, figures["loss"], neutral, s.folder / "link.png")
    core.write_json(s.folder / "study.json", content)
    with core.whole_file(s.folder / "study.md") as file:
        file.write("\n\n".join(parts) + "\n")
    s.say(f"done  tables: {s.folder}/study.md  pictures: matrix.png{', link.png' if found else ''} there")
    s.say(f"next: python eval.py --table {s.folder.parent}")


# ------------------------------------------------------------------------------------------------------- main


def cache(cfg, world, say):
    """Mode cache: texts become token ids, nothing else."""
    text = open_text(cfg, world)
    parts = {part: [f"{len(one.parts[part]):,}" for one in text.tokens.values()] for part in corpus.PARTS}
    documents = [f"{sum(one.documents.values()):,}" for one in text.tokens.values()]
    say(results.markdown({"text": list(text.tokens), "documents": documents, **parts}))
    for name, one in text.tokens.items():
        for line in one.lines:
            say(f"{name}  {line}")
    for arm in cfg.arms:
        batches_of(cfg, arm, text, world)
    say(f"tokens of {len(text.tokens)} texts, enough for every arm: {core.cache_root()}")


def coefficient_only(cfg, world, say, poll):
    """Mode diversity: the coefficients of the arms, without training."""
    if not cfg.diversity_batches:
        raise core.UserError("--diversity_batches 0: use 2 or more in mode diversity")
    folder = study_folder(cfg)
    core.on_main(world, lambda: folder.mkdir(parents=True, exist_ok=True))
    s = Study(cfg, world, open_text(cfg, world), folder, say, poll)
    found = diversity(s, {})

    def write():
        core.write_json(folder / "diversity.json", found)
        with core.whole_file(folder / "diversity.md") as file:
            file.write(show.diversity_table(found) + "\n")
        say(show.diversity_table(found))
        say(f"done  {folder}/diversity.md")

    core.on_main(world, write)


@record
def main(cfg, world):
    if not cfg.dirty:
        core.on_main(world, runs.refuse_dirty)
    if cfg.mode == "train":
        with runs.Run(cfg, world, __file__, unit="tokens") as run:
            run.result = train(run, run.cfg, world)
        return run.result

    def say(text):
        if world.is_main:
            print(text, file=core.Terminal(sys.stdout), flush=True)

    with runs.listening(world) as poll:
        if cfg.mode == "cache":
            return cache(cfg, world, say)
        return {"study": study, "diversity": coefficient_only}[cfg.mode](cfg, world, say, poll)


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
