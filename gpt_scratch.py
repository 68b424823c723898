"""A GPT written by hand: journal 003's character and BPE models, and journal 004's timed pretraining.

    torchrun --nproc_per_node=4 --shutdown-timeout 300 gpt_scratch.py --preset mini_v0
    torchrun --nproc_per_node=4 --shutdown-timeout 300 gpt_scratch.py --preset noam_wide4
    python gpt_scratch.py                               # preset cpu: built-in text, minutes on two cores
    python gpt_scratch.py --data shakespeare.txt --tokenizer bpe:2048 --resume_timestamp auto
    python gpt_scratch.py --mode find_lr                # which rate? (find_from, find_to, find_steps)
    python gpt_scratch.py --mode generate --model runs/gpt_scratch/20261122_101500
    python gpt_scratch.py --smoke

The model is lab/models/gpt.py, tokenizers and the token cache are in lab/data/. Here is the experiment; its
constants stand in Config. Each run is a folder under runs/gpt_scratch/.
"""

import functools
import math
import sys
import textwrap
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

import core
from lab.data import templates
from lab.measure import language
from lab.models import generate
from lab.run import files

# ------------------------------------------------------------------------- the experiment and its constants


@dataclass(frozen=True)
class Config(core.Studied):
    # data
    data: str = "python-docs"  # text file or folder, table, Hub id, python-docs or python-code (built in)
    text_column: str = "text"  # of a table or Hub set
    max_documents: core.Count | None = None  # none = all
    max_tokens: core.Count | None = None  # of training text, the first ones; none = all
    tokenizer: str = "chars"  # chars, ascii, bytes, bpe:<size>, bpe_scratch:<size>, Hub id or folder
    val_share: core.within(float, 1e-4, 0.9999) = 0.05  # of the documents; of a single document, its end
    test_share: core.within(float, 0, 0.9999) = 0.05  # of the text; measured after training only
    split_seed: core.Seed = 42  # of what is held out
    block_size: core.Count = 64  # tokens of context
    # model
    model: str = "new"  # or where to start from: a run, newest, GPT-2 or Llama family by folder or Hub id
    model_step: core.Whole | None = None  # a checkpoint of that run; none = the one it was tested with
    n_layer: core.Count = 4  # blocks
    n_head: core.Count = 4  # attention heads
    n_embd: core.Count = 128  # width
    n_inner: core.Count | None = 344  # none = 4 n_embd; swiglu: 8/3 n_embd, rounded up to a multiple of 256
    positions: Literal["learned", "rotary"] = "rotary"  # rotary as in Llama
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"  # before each half of a block
    activation: Literal["gelu", "relu", "swiglu"] = "swiglu"  # of the MLP
    bias: bool = False  # of linear layers and LayerNorms
    qkv_bias: bool = False  # of queries, keys and values
    tie_head: bool = True  # the output matrix is the embedding
    vocab_multiple: core.Count = 1  # the embedding's rows: the vocabulary, rounded up to a multiple of this
    head_bias: bool = False  # of the output layer; with --no-tie_head
    dropout: core.Share = 0.0  # share of activations set to 0 in training
    checkpointing: bool = False  # recompute blocks in the backward: more time, less memory
    # optimisation
    batch: core.Count = 8  # blocks per optimizer step, over all ranks
    micro_batch: core.Count | None = None  # blocks per forward and rank; none = all of a rank's that fit
    epochs: core.Whole | None = 10  # passes over the training rows
    max_steps: core.Whole | None = 3600  # optimizer steps; the first of these three limits ends training
    max_minutes: core.Amount | None = None  # of training, over resumes
    lr: core.Rate = 3e-3  # peak; GPT-3's are near 1.95 x parameters^-0.437 (journal 003)
    min_lr: core.Rate = 0.0  # at the end of the schedule
    warmup: core.Share = 0.05  # fraction of all steps in which the rate rises; one_cycle's is usually 0.3
    schedule: core.Schedule = "linear"  # of the rate, after the warm-up
    cycle_beta1: bool = True  # one_cycle moves beta1 between 0.95 and 0.85, against the rate
    optimizer: core.Optimizer = "adamw"  # muon: adamw's lr; adafactor: little memory, lr relative to weights
    beta1: core.within(float, 0, 0.9999) = 0.9  # of Adam: decay of the gradients' mean
    beta2: core.within(float, 0, 0.9999) = 0.99  # decay of Adam's mean of squares, of Lion's mean
    eps: core.within(float, 1e-30) = 1e-8  # of Adam
    weight_decay: core.Rate = 0.1  # of matrices
    decay_embedding: bool = True  # the token embedding decays, too
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 or fp16 on a GPU, else fp32; fp32 not typed is tf32 on a GPU
    seed: core.Seed = 0  # of weights, order and dropout
    # evaluation and logging
    eval_batch: core.Count = 64  # blocks per evaluation step, over all ranks
    eval_every: core.Count | None = None  # steps; none = each epoch
    eval_rows: core.Count | None = None  # validation blocks looked at during training; none = all
    test_weights: Literal["best", "last"] = "best"  # lowest validation loss, or the final ones
    save_every: core.Count | None = None  # steps; none = at each evaluation, before it
    # samples and generation
    prompt: str | None = None  # in mode generate; none = a prompt loop
    sample_tokens: core.Whole = 300  # of each of three samples after an evaluation; 0 = none
    max_new_tokens: core.Count = 300  # in mode generate
    temperature: core.Amount = 0.8  # 0 = greedy
    top_k: core.Count | None = None  # sample from this many likeliest tokens; none = all
    top_p: core.within(float, 1e-6, 1) | None = None  # likeliest tokens that sum to this; none = all
    stop: str | None = None  # a token that ends a continuation, beside end-of-text
    # run
    mode: Literal["train", "find_lr", "study", "generate", "export"] = "train"  # what is done
    dirty: bool = True  # --no-dirty refuses to start with uncommitted changes

    NO_TRAINING = ("generate", "export")
    READ_BY = core.Studied.READ_BY | {
        "generate": {"prompt", "max_new_tokens"},
        "train find_lr study generate": {"temperature", "top_k", "top_p", "stop", "seed"},
        "train find_lr study generate export": {"model", "dirty"},
    }

    def __post_init__(self):
        super().__post_init__()
        if self.val_share + self.test_share >= 1:
            raise core.UserError(
                f"val_share {self.val_share} + test_share {self.test_share} leave nothing to train on"
            )
        if self.epochs is self.max_steps is self.max_minutes is None:
            raise core.UserError("nothing ends training: use --max_minutes, --max_steps or --epochs")
        if self.model_step is not None and self.model == "new":
            raise core.UserError(f"--model_step {self.model_step}: a new model has no checkpoints, drop it")


JOURNAL = {  # what journal 003's code trained: Wikipedia, 1 % each for val and test, AdamW as torch has it
    "data": "wikimedia/wikipedia:20231101.en",
    "max_documents": 75_000,
    "val_share": 0.01,
    "test_share": 0.01,
    "positions": "learned",
    "norm": "layernorm",
    "activation": "relu",
    "n_inner": None,
    "bias": True,
    "qkv_bias": False,
    "tie_head": False,
    "head_bias": True,
    "dropout": 0.2,
    "lr": 1e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "clip": None,
    "dtype": "bf16",
    "eval_every": 1000,
    "tokenizer": "ascii",
    "epochs": 1,
    "max_steps": None,
}
SMALL = JOURNAL | {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 2048, "batch": 2, "lr": 6e-4}
MINI = JOURNAL | {"n_layer": 10, "n_head": 8, "n_embd": 512, "block_size": 256, "batch": 128}
# Journal 004's 180M parameters, 4 x 64 blocks of 512 tokens a step. A bug made its one-cycle peak at 1e-3
# instead of the 8e-4 of its settings, and span 10,000 steps however long the run; ours ends with max_minutes.
NOAM_WIDE4 = {
    "data": "DKYoon/SlimPajama-6B",
    "tokenizer": "gpt2",
    "val_share": 0.0005,
    "test_share": 0.0005,
    "block_size": 512,
    "n_layer": 10,
    "n_head": 16,
    "n_embd": 1024,
    "n_inner": None,
    "vocab_multiple": 64,
    "batch": 256,
    "micro_batch": 64,
    "epochs": None,
    "max_steps": None,
    "max_minutes": 180.0,
    "lr": 8e-4,
    "schedule": "one_cycle",
    "warmup": 0.3,
    "beta2": 0.95,
    "decay_embedding": False,
    "eval_every": 2000,
    "eval_rows": 1536,
    "save_every": 500,
    "test_weights": "last",
    "compile": True,
}
PRESETS = {  # rates of journal 003 are those of its settings; a bug made it train all its models at 1e-3
    "cpu": {},
    "baby": JOURNAL | {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch": 64},
    "mini_v0": MINI,
    "mini_v1": MINI | {"batch": 180},
    "gpt3_small": SMALL | {"tokenizer": "gpt2"},
    "gpt3_small_char": SMALL,
    "gpt3_small_char_one_cycle": SMALL | {"schedule": "one_cycle", "warmup": 0.3},
    "gpt3_small_large_batch": SMALL | {"tokenizer": "gpt2", "batch": 128, "micro_batch": 2, "lr": 1e-5},
    "noam_wide4": NOAM_WIDE4,
    "noam_wide4_effective": NOAM_WIDE4 | {"lr": 1e-3},
    "continue_noam": NOAM_WIDE4  # the same text for 45 minutes more
    | {"model": "newest", "max_minutes": 45.0, "schedule": "cosine", "warmup": 0.05}
    | {"lr": 8e-5, "min_lr": 8e-6},
}
SMOKE = {
    "data": "python-docs",
    "max_documents": 60,
    "tokenizer": lambda name: "bpe:512" if name == "gpt2" else name,  # learnt here: no download
    "block_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_inner": None,
    "dropout": 0.0,
    "batch": 24,
    "micro_batch": None,
    "max_steps": 200,
    "max_minutes": None,
    "lr": 4e-3,
    "dtype": "auto",
    "compile": False,
    "val_share": 0.1,
    "test_share": 0.1,
    "eval_every": 100,
    "save_every": None,
    "sample_tokens": 80,
    "find_steps": 60,
}
SAMPLES = 3  # after each evaluation
RATIO = 20  # tokens per parameter that Hoffmann et al. 2022 find best


def corpus_of(cfg) -> core.Corpus:
    """The Corpus that cfg describes. A model that is not new brings its own tokenizer and shape:
    UserError where flags of either are typed."""
    name = cfg.tokenizer
    if cfg.model != "new":
        own = {"tokenizer", "vocab_multiple", *(field.name for field in fields(core.GPTConfig))}
        if typed := sorted((own - {"block_size", "dropout", "checkpointing"}) & cfg.typed.flags):
            raise core.UserError(f"--model {cfg.model} brings its own {', '.join(typed)}: drop these flags")
        name = core.tokenizer_of(cfg.model)
    values = {f.name: getattr(cfg, f.name) for f in fields(core.Corpus) if hasattr(cfg, f.name)}
    return core.Corpus(**values | {"tokenizer": name})


def shape_of(cfg, vocab_size) -> core.GPTConfig:
    """The GPTConfig that cfg describes. UserError for constants that contradict each other."""
    shared = [field.name for field in fields(core.GPTConfig) if hasattr(cfg, field.name)]
    return core.GPTConfig(vocab_size=vocab_size, **{name: getattr(cfg, name) for name in shared})


def build_model(cfg, tokens, world) -> core.GPT:
    """A new GPT of cfg's shape, or the model of cfg.model. UserError where it does not fit."""
    if cfg.model == "new":
        rows = math.ceil(len(tokens.unigram) / cfg.vocab_multiple) * cfg.vocab_multiple
        return core.GPT(shape_of(cfg, rows))
    how = cfg.dropout, cfg.checkpointing, cfg.model_step
    model, _ = core.main_first(world, core.open_model, cfg.model, *how)
    if cfg.block_size > model.config.block_size:
        most = model.config.block_size
        raise core.UserError(f"--block_size {cfg.block_size} is over the {most} of {cfg.model}")
    return model


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, from its folder alone; the weights it was tested with."""
    cfg = core.stored_config(folder, Config, __file__)
    model, tokenizer = core.open_model(folder)
    return cfg, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer


# ------------------------------------------------------------------------------------------- one step of it


@dataclass
class Setup:
    """Data, model and optimizer, for train and find_lr."""

    cfg: Config
    world: core.World
    tokens: core.Tokens
    blocks: dict[str, core.Blocks]
    batches: core.ShardedBatches
    total_steps: int
    model: core.GPT
    ddp: nn.Module
    micro_batches: core.MicroBatches
    optimizer: torch.optim.Optimizer
    precision: core.Precision
    step: int = 0  # where a resumed run stands


def open_text(cfg, world) -> tuple[core.Tokens, dict[str, core.Blocks]]:
    """The text of cfg as token ids, and as blocks of each part. UserError for constants that contradict each
    other, and where a part that will be measured is empty."""
    shape_of(cfg, vocab_size=1)  # a contradiction should not wait for an hour of tokenising
    tokens = core.open_corpus(corpus_of(cfg), world)
    blocks = {part: core.Blocks(tokens.parts[part], cfg.block_size) for part in core.PARTS}
    for part in ("train", "val", *(("test",) if cfg.test_share else ())):
        if not len(blocks[part]):
            better = "more documents" + (f" or a larger --{part}_share" if part != "train" else "")
            raise core.UserError(f"{cfg.data} leaves no {part} text: use {better}")
    return tokens, blocks


def set_up(run, cfg, world, steps=None) -> Setup:
    """Makes data, model and optimizer, loads a resumed run's checkpoint, tries whether memory suffices by two
    steps whose gradients are thrown away, and prints what will run.

    `steps` none: as many as cfg.epochs, max_steps and max_minutes allow.
    """
    tokens, blocks = open_text(cfg, world)
    run.pin("fingerprint", tokens.fingerprint)
    order = cfg.seed + 1000 * (cfg.model != "new")  # continued pretraining reads the text in a new order
    lengths = np.full(len(blocks["train"]), cfg.block_size)
    batches = core.ShardedBatches(lengths, cfg.batch, world, seed=order)
    total_steps = core.count_steps(cfg, batches, steps or core.FOREVER)
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(build_model(cfg, tokens, world))
    optimizer = make_optimizer(cfg, model)
    announce(run, cfg, tokens, blocks, batches, total_steps, model)
    compiled = model.h if cfg.compile else ()
    ddp = core.wrap_ddp(model, world, compiled, None, shard=cfg.shard, optimizer=optimizer)
    step = run.load(model, optimizer, precision)
    core.on_main(world, describe_model, run.folder, model, tokens.tokenizer)
    generate.stop_ids(tokens.tokenizer, cfg.stop)  # a mistake should not wait for the first sample
    micro_batches = core.MicroBatches(run, ddp, blocks["train"].batch)
    data = tokens, blocks, batches, total_steps
    setup = Setup(cfg, world, *data, model, ddp, micro_batches, optimizer, precision, step)
    if step == 0:
        loss, _, targets = core.evaluate(model, blocks["val"].first(16), cfg, world).sum(0)
        run.say(f"initial loss {loss / targets:.4f}  ln V {math.log(model.config.vocab_size):.4f}")
    saved, gradients = (model, optimizer, precision), functools.partial(forward_backward, setup)
    core.rehearse(run, micro_batches, saved, gradients, batches, total_steps - step)
    run.say(describe_block(tokens.tokenizer, blocks["train"].tokens[: cfg.block_size + 1]))
    return setup


def make_optimizer(cfg, model):
    betas, undecayed = (cfg.beta1, cfg.beta2), () if cfg.decay_embedding else ("wte.weight",)
    return core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, betas, cfg.eps, undecayed=undecayed)


def describe_model(folder, model, tokenizer):
    """Writes tokenizer/ and gpt.json, from which the folder alone can rebuild the model."""
    tokenizer.save_pretrained(folder / "tokenizer")
    files.write_sealed(folder / "gpt.json", asdict(model.config))


def forward_backward(setup, rows, targets) -> list:
    """Adds gradients of (this rank's loss sum / targets of all ranks). Returns the sum's parts."""
    losses = []
    for _, batch in setup.micro_batches(rows):
        with setup.precision.autocast():
            losses.append(setup.ddp(*batch))  # cross-entropy, summed over targets
        core.scaled_backward(losses[-1], setup.world, targets, setup.precision)  # x world.size: DDP averages
    return [loss.detach() for loss in losses]  # read later, with the norm


def spike_facts(setup, rows, lr) -> dict:
    """What a spiking step read, for spikes.jsonl."""
    stream = setup.blocks["train"]
    start = rows[0] * setup.cfg.block_size
    text = setup.tokens.tokenizer.decode(stream.tokens[start : start + setup.cfg.block_size + 1].tolist())
    return {"lr": lr, "rows": rows, "first_row": text, "targets": int(stream.targets(rows).sum())}


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, dict[str, list]]:
    """Measures a run's own val and test text again. Returns (figures, file name -> its lines).

    UserError if cfg.data or its tokenizer has changed since.
    """
    cfg, model, _ = load_model(folder, world)
    cfg = replace(cfg, eval_batch=eval_batch or cfg.eval_batch)
    tokens, result = core.open_corpus(corpus_of(cfg), world), {}
    stored = core.read_config(folder)["facts"]["fingerprint"]
    core.refuse_other_data(stored, tokens.fingerprint, cfg.data, ("data", "tokenizer"))
    for part in core.final_parts(cfg):
        sizes = language.sizes_of(tokens, part)
        blocks = core.Blocks(tokens.parts[part], cfg.block_size)
        sums = core.evaluate(model, blocks, cfg, world, poll)
        metrics = core.measure(sums, blocks, tokens.unigram, sizes)
        result |= {f"{part}/{name}": value for name, value in metrics.items()}
    return result, {"losses.jsonl": core.loss_rows(part, sums, blocks, sizes)}


# ---------------------------------------------------------------------------------------------------- train


def train(run, cfg, world) -> dict:
    """Mode train. Returns the final figures."""
    setup = set_up(run, cfg, world)
    model, optimizer, precision = saved = setup.model, setup.optimizer, setup.precision
    looked_at = setup.blocks["val"].first(cfg.eval_rows)
    # core.steps draws batches from seed and step alone, saves before evaluating, stops all ranks together
    for at in core.steps(run, setup.batches, setup.blocks["train"].targets, saved, setup.total_steps):
        if at.evaluates:
            sums = core.evaluate(model, looked_at, cfg, world, at.poll)
            val = core.measure(sums, looked_at, setup.tokens.unigram)
            report_validation(run, at, val, is_best=at.keep_if_best(val["loss"]))
            core.on_main(world, sample, run, cfg, at, model, setup.tokens.tokenizer)
            continue
        lr, beta1 = (rate(cfg, at.step, at.schedule_length) for rate in (core.lr_at, core.beta1_at))
        losses = forward_backward(setup, at.rows, at.targets)
        norm = core.gradient_norm(optimizer, precision)  # of the global batch, not clipped yet
        if at.spiked(losses, norm) and world.is_main:  # spiked() asks all ranks, so it stands first
            at.note_spike(model, spike_facts(setup, at.batch, lr))
        at.update(optimizer, precision, lr, beta1=beta1)  # clips, updates, zeroes the gradients, logs
    return finish(run, cfg, world, setup)


def finish(run, cfg, world, setup) -> dict:
    """Figures of the chosen weights on val and test, and the share of sampled words that the text has."""
    sha256, measured, result = core.weights_sha256(setup.model), run.checkpoint, {}
    if cfg.test_weights == "best":
        measured = run.load_best(setup.model)
    for part in core.final_parts(cfg):
        sizes = language.sizes_of(setup.tokens, part)
        sums = core.evaluate(setup.model, setup.blocks[part], cfg, world, run.poll)
        m = core.measure(sums, setup.blocks[part], setup.tokens.unigram, sizes)
        result |= {f"{part}/{name}": value for name, value in m.items()}
        run.say(
            f"{part:5} loss {core.plus_minus(m['loss'], m['loss_interval'], 4)}   "
            f"perplexity {m['perplexity']:.2f}   "
            f"accuracy {core.plus_minus(m['accuracy'], m['accuracy_interval'])}   "
            f"unigram loss {m['unigram_loss']:.4f}" + (f"\n{part:5} {m['alarm']}" if m["alarm"] else "")
        )
    lines = core.loss_rows(part, sums, setup.blocks[part], sizes)
    core.on_main(world, core.write_lines, run.folder / "losses.jsonl", lines)
    known = core.on_main(world, language.known_words, run.folder, setup.tokens, SAMPLES)
    if known is not None:
        run.say(f"samples  {known:.0%} of the generated words occur in the training text")
    run.say(
        f"done  {part} loss {m['loss']:.4f}  perplexity {m['perplexity']:.2f}  {run.seconds / 60:.1f} min"
    )
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"samples: python gpt_scratch.py --mode generate --model {run.folder}")
    run.say(f"next: python eval.py --run {run.folder}")
    return result | {
        "weights_sha256": sha256,
        "test_checkpoints": [measured],
        "parameters": core.count_parameters(setup.model)[0],
        "known_words": known,
    }


def announce(run, cfg, tokens, blocks, batches, total_steps, model):
    """Says what is about to be trained on what."""
    total, trainable = core.count_parameters(model)
    sizes = "  ".join(f"{part} {len(tokens.parts[part])}" for part in core.PARTS)
    run.say(
        f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   {sizes} tokens"
    )
    run.begin(total_steps)
    counts = "  ".join(f"{part} {n}" for part, n in tokens.documents.items())
    tokenizer = corpus_of(cfg).tokenizer
    run.say(f"data {cfg.data}  documents {counts}  tokenizer {tokenizer} of {len(tokens.tokenizer)}")
    for line in tokens.lines:
        run.say(line)
    seen = f"{total_steps * cfg.batch * cfg.block_size / total:.2f} in {total_steps} steps"
    if total_steps == core.FOREVER:
        seen = f"{cfg.batch * cfg.block_size / total:.2g} a step; max_minutes decides the number of steps"
    run.say(f"tokens per parameter  {len(tokens.parts['train']) / total:.2f} in the data, {seen} "
            f"(Hoffmann et al. 2022: {RATIO} is best)")  # fmt: skip
    if left := len(blocks["train"]) % cfg.batch:
        run.say(f"each epoch leaves out {left} of {len(blocks['train'])} blocks "
                f"(other ones each time): they fill no batch of {cfg.batch}")  # fmt: skip


def describe_block(tokenizer, ids) -> str:
    """A block, decoded from its ids: garbage here is garbage in training (journal 003, v0.0.11)."""
    text = core.one_line(tokenizer.decode(ids[:201].tolist()))
    return f"the loss sees {len(ids) - 1} targets (after each token of a block, the next):\n  {text[:96]}"


def report_validation(run, at, val, is_best):
    """Says and logs validation figures."""
    run.say(
        f"{at.where}  val  loss {core.plus_minus(val['loss'], val['loss_interval'], 4)}  "
        f"perplexity {val['perplexity']:.2f}  "
        f"accuracy {core.plus_minus(val['accuracy'], val['accuracy_interval'])}"
        f"{'  -> best' if is_best else ''}"
    )
    if val["alarm"] and at.late:
        run.say(f"{at.where}  val  {val['alarm']}")
    run.metrics(at.step, {f"val/{name}": val[name] for name in ("loss", "perplexity", "accuracy")})


def sample(run, cfg, at, model, tokenizer):
    """Rank 0: writes new documents to samples.jsonl and TensorBoard, shows how the first one begins."""
    if cfg.sample_tokens:
        how = (cfg, [""] * SAMPLES, cfg.sample_tokens, at.step, at.leave_if_signalled)
        texts = core.continuations(model, tokenizer, *how)
        run.samples(at.step, texts)
        for text in texts[:1]:
            run.say("\n".join(f"  | {line}" for line in textwrap.wrap(core.one_line(text), 95)[:4]))


def newest_base(cfg) -> str:
    """The newest finished run in cfg.out, or in runs/gpt_scratch."""
    return str(core.newest_run(cfg, __file__, finished=True))


def with_newest(cfg, world, name):
    """cfg with the newest base as its constant `name`, which does not count as typed: a resumed run
    keeps its first base even if a newer run is there by then."""
    is_new = cfg.resume_timestamp in (None, "auto")
    base = core.on_main(world, newest_base, cfg) if is_new else getattr(cfg, name)
    return core.counting(replace(cfg, **{name: base}), flags=cfg.typed.flags - {name})


def find_lr(run, cfg, world) -> dict:
    """Mode find_lr: the loss over a rate that grows at every step."""
    setup = set_up(run, cfg, world, cfg.find_steps)
    saved, targets_of = (setup.model, setup.optimizer, setup.precision), setup.blocks["train"].targets
    gradients, beta1 = functools.partial(forward_backward, setup), core.beta1_at(cfg, 0, cfg.find_steps)
    return core.find_lr(run, setup.batches, targets_of, saved, gradients, beta1)


# ---------------------------------------------------------------------------------------- generate and export


def generate_mode(cfg, world):
    """Mode generate: continues --prompt, or each line typed (an empty one starts a new document)."""
    name = str(core.newest_run(cfg, __file__)) if cfg.model in ("new", "newest") else cfg.model
    model, tokenizer = core.open_model(name)
    model.to(world.device)
    millions = core.count_parameters(model)[0] / 1e6
    print(f"{name}  {millions:.1f}M parameters  block_size {model.config.block_size}")
    interactive = cfg.prompt is None and sys.stdin.isatty()
    prompts = [cfg.prompt] if cfg.prompt is not None else generate.prompt_loop(interactive)
    try:
        for count, prompt in enumerate(prompts):
            for note in generate.prompt_notes(model, tokenizer, prompt):
                print(note, file=sys.stderr)
            texts = core.continuations(model, tokenizer, cfg, [prompt], cfg.max_new_tokens, cfg.seed + count)
            print(prompt + texts[0])
    except KeyboardInterrupt:
        print()


def export(cfg, world):
    """Mode export: the weights of --model (a run folder) as a folder that transformers loads."""
    if not core.is_run(cfg.model):
        raise core.UserError(f"--mode export needs --model with a run of gpt_scratch.py, not {cfg.model}")
    folder = Path(cfg.out or Path(cfg.model) / "transformers")
    model, tokenizer = core.open_model(cfg.model)
    template = core.read_config(cfg.model)["constants"].get("template")  # of a run of run_instruct.py
    core.save_pretrained(model, tokenizer, folder, templates.end_id(tokenizer, template))
    print(f"written: {folder}")


# ----------------------------------------------------------------------------------------------------- main


@record
def main(cfg, world):
    if cfg.mode == "study":
        return core.study(cfg, world, __file__, Config, PRESETS, SMOKE, main)
    cfg = core.with_dtype(cfg, world)
    if not cfg.dirty:
        core.on_main(world, core.refuse_dirty)
    if cfg.mode in ("generate", "export"):
        if world.size > 1:
            raise core.UserError(f"--mode {cfg.mode} runs in one process: start it with python")
        return (generate_mode if cfg.mode == "generate" else export)(cfg, world)
    if cfg.model == "newest":
        cfg = with_newest(cfg, world, "model")
    if not (run := core.open_run(cfg, world, __file__, unit="tokens")):
        return None
    with run:
        run.result = {"train": train, "find_lr": find_lr}[cfg.mode](run, run.cfg, world)
    return run.result


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
