"""Timed pretraining, then MathQA: by all weights, LoRA, LoHa or LoKr; Lion; quantised to int4 (journal 004).

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_mathqa.py         # 3 h of text, 1 h of MathQA
    python run_mathqa.py --mode pretrain --preset noam_wide4_effective --resume_timestamp auto
    python run_mathqa.py --mode finetune --method lora --lr 5e-4 --init_from runs/run_mathqa/<run>
    python run_mathqa.py --mode study                   # full, LoRA, LoHa, LoKr, QAT: equal steps, equal time
    python run_mathqa.py --mode split                   # how to share a fixed time between the two stages
    python run_mathqa.py --mode quantise --run_folder runs/run_mathqa/<run>
    python run_mathqa.py --smoke

Constants called pretrain_... are the first stage's, their namesakes without it fine-tuning's. Each stage is a
run of its own under runs/run_mathqa/. Modes both, study and split make several runs; started again, they
continue where they stopped.
"""

import contextlib
import functools
import gc
import hashlib
import math
import re
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

import core
import gpt_scratch
from lab.compare import mathqa_report, tables
from lab.measure import answers, choices, quantised, tuning
from lab.models import int4, loha_lokr
from lab.run import checkpoints, stored
from lab.train import optim

ARMS = (  # rates as each kind of tuning wants them; a study of them takes several of each
    "full",
    "full,optimizer=lion,lr=1e-5,weight_decay=1,beta2=0.99",
    "lora,lr=5e-4",
    "loha,lr=5e-4",
    "lokr,lr=2e-3",
    "full,qat=int4",
)


Mode = Literal["both", "pretrain", "finetune", "find_lr", "study", "split", "quantise", "export"]


@dataclass(frozen=True)
class Config(core.Bookkeeping):
    # data
    data: str = "kinit/math_qa"  # Hub id, table, folder of train, validation, test, or template-problems
    max_documents: core.Count | None = None  # rows of each part, or of a single table; none = all
    answer_format: Literal["text", "letter"] = "text"  # problem -> option, or problem and options -> letter
    loss_on_prompt: bool = False  # problems are learnt, too, as in the journal
    max_length: core.within(int, 16) = 512  # tokens of a problem and its answer; longer rows are left out
    pack: bool = False  # rows side by side, up to max_length tokens; a pack is then one unit of batch
    text: str = "DKYoon/SlimPajama-6B"  # what is read first: Hub id, file, folder, python-docs (built in)
    text_column: str = "text"  # of a table or Hub set
    text_documents: core.Count | None = None  # none = all
    text_tokens: core.Count | None = None  # of training text, the first ones; none = all
    tokenizer: str = "gpt2"  # Hub id, folder, chars, bytes, bpe:<size>
    val_share: core.within(float, 1e-4, 0.9999) = 0.0005  # of the text's documents
    test_share: core.within(float, 0, 0.9999) = 0.0005  # of the text, for the end
    split_seed: core.Seed = 42  # the same rows and documents for every seed
    block_size: core.Count = 512  # tokens of context
    # model
    n_layer: core.Count = 10  # blocks
    n_head: core.Count = 16  # heads of attention
    n_embd: core.Count = 1024  # width
    vocab_multiple: core.Count = 64  # the embedding's rows are rounded up to it
    dropout: core.Share = 0.0  # share of activations set to 0 in training
    checkpointing: bool = False  # recompute blocks in the backward: more time, less memory
    init_from: str | None = None  # a run, a GPT-2 or Llama folder, new; none = the newest pretraining run
    init_step: core.Whole | None = None  # a checkpoint of that run; none = the one it was tested with
    method: Literal["full", "lora", "loha", "lokr"] = "full"  # all weights, or adapters on a base that stands
    lora_rank: core.Count = 16  # of all three kinds of adapter
    lora_alpha: core.within(float, 1e-9) = 32.0  # they are multiplied by alpha / rank
    lora_dropout: core.Share = 0.0  # of what LoRA reads
    qat: Literal["off", "int4"] = "off"  # train for int4 weights and int8 activations; with method full
    qat_group: core.within(int, 2) = 256  # inputs of an output that share a scale; 32 is finer
    qat_start: core.Share = 0.25  # share of the steps before it
    # first stage
    pretrain_batch: core.Count = 256  # blocks per optimizer step, over all ranks
    pretrain_micro_batch: core.Count | None = 64  # blocks per forward and rank
    pretrain_max_steps: core.Whole | None = None  # the shorter of these two ends the stage
    pretrain_max_minutes: core.Amount | None = 180.0  # of training, over resumes
    pretrain_lr: core.Rate = 8e-4  # peak
    pretrain_min_lr: core.Rate = 0.0  # at the end of the schedule
    pretrain_warmup: core.Share = 0.3  # fraction of all steps; of one_cycle its rise
    pretrain_schedule: Literal["linear", "cosine", "constant", "one_cycle"] = "one_cycle"  # of the rate
    pretrain_optimizer: Literal["adamw", "lion", "sgd"] = "adamw"  # sgd: momentum 0.9
    pretrain_weight_decay: core.Rate = 0.1  # of matrices
    pretrain_eval_every: core.Count | None = 2000  # steps; none = each epoch
    pretrain_save_every: core.Count | None = 500  # steps; none = at each evaluation, before it
    # optimisation; what has no pretrain_... above serves both stages
    batch: core.Count = 128  # rows (or packs) per optimizer step, over all ranks
    micro_batch: core.Count | None = None  # per forward and rank; none = groups that waste least on padding
    micro_tokens: core.Count = 16384  # most tokens of such a group
    group_lengths: bool = True  # rows of similar length meet in a batch
    epochs: core.Whole | None = None  # passes over the training rows
    max_steps: core.Whole | None = None  # the shortest of these three ends it
    max_minutes: core.Amount | None = 60.0  # of training, over resumes
    lr: core.Rate = 5e-5  # peak; adapters want ten times it, Lion a third to a tenth
    min_lr: core.Rate = 0.0  # at the end of the schedule
    warmup: core.Share = 0.05  # fraction of all steps
    schedule: Literal["linear", "cosine", "constant", "one_cycle"] = "cosine"  # of the rate
    cycle_beta1: bool = True  # one_cycle moves beta1 between 0.95 and 0.85, against the rate
    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"  # sgd: momentum 0.9
    beta1: core.within(float, 0, 0.9999) = 0.9  # of Adam: how fast the mean forgets
    beta2: core.within(float, 0, 0.9999) = 0.95  # of Lion 0.99 is usual
    weight_decay: core.Rate = 0.1  # of matrices but the token embedding; Lion wants 3 to 10 times as much
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 on a card (or fp16), else fp32, which untyped is tf32 on a card
    seed: core.Seed = 0  # of weights, order and dropout; the first one of a study
    # evaluation and logging
    eval_batch: core.Count = 64  # blocks or rows per evaluation step, over all ranks
    eval_every: core.Count | None = 500  # steps; none = each epoch
    eval_rows: core.Count | None = 500  # validation rows or blocks looked at during training; none = all
    answer_rows: core.Whole = 200  # validation problems answered then; 0 = none
    sample_tokens: core.Whole = 24  # most tokens generated after three of them; 0 = nothing
    test_weights: Literal["best", "last"] = "best"  # lowest validation loss, or the final ones
    save_every: core.Count | None = None  # steps; none = at each evaluation, before it
    log_every: core.Count = 25  # steps
    plain: str | None = None  # shows what is forgotten; none = held out of the pretraining text, if known
    plain_blocks: core.Whole = 100  # of it; 0 = none
    # study
    arms: tuple[str, ...] = ARMS  # method,constant=value,...: the first one sets steps and time of the others
    budgets: tuple[str, ...] = ("steps", "time")  # what the arms have equal
    shares: tuple[str, ...] = ("0.5", "0.75", "0.9")  # of mode split: pretraining's share of both budgets
    seeds: core.Count = 3  # of each arm: seed, seed + 1, ...
    # run
    mode: Mode = "both"  # stages, one of them, tunings of one base, shares of the time, int4, a Llama folder
    run_folder: str | None = None  # the run that is quantised or exported

    def __post_init__(self):
        super().__post_init__()
        if self.qat != "off" and self.method != "full":
            raise core.UserError(f"--qat int4 trains all weights: use --method full, not {self.method}")
        if self.lora_dropout and self.method in ("loha", "lokr"):
            raise core.UserError(f"--lora_dropout {self.lora_dropout:g}: {self.method} has none, use 0")
        if self.mode in SEVERAL and (self.resume_timestamp not in (None, "auto") or self.resume_step):
            flags = "--resume_timestamp, --resume_step"
            raise core.UserError(f"mode {self.mode} goes on by itself: drop {flags}")
        if self.mode in ("both", "split") and self.init_from:
            raise core.UserError(f"--init_from: mode {self.mode} pretrains first, use finetune or study")
        for first in ("", "pretrain_"):
            schedule, low = (getattr(self, f"{first}{name}") for name in ("schedule", "min_lr"))
            if schedule == "one_cycle" and low:
                raise core.UserError(f"--{first}min_lr {low}: one_cycle has an end of its own, leave it 0")
        if self.val_share + self.test_share >= 1:
            shares = f"val_share {self.val_share} + test_share {self.test_share}"
            raise core.UserError(f"{shares} leave nothing to train on")
        if odd := set(self.budgets) - {"steps", "time"}:
            raise core.UserError(f"--budgets {odd.pop()}: use steps, time, or both")


SEVERAL = ("both", "study", "split")  # modes that make several runs

# 64 x 4 blocks of 512 tokens a step. The one-cycle of journal 004 ignored the 8e-4 of its file and took 1e-3,
# and was 10,000 steps long whatever the clock said; here it ends with the clock.
NOAM_WIDE4 = {
    "mode": "pretrain",
    "text": "DKYoon/SlimPajama-6B",
    "block_size": 512,
    "n_layer": 10,
    "n_head": 16,
    "n_embd": 1024,
    "pretrain_batch": 256,
    "pretrain_micro_batch": 64,
    "pretrain_max_minutes": 180.0,
    "pretrain_lr": 8e-4,
    "pretrain_schedule": "one_cycle",
    "pretrain_warmup": 0.3,
    "cycle_beta1": True,
    "beta1": 0.9,
    "beta2": 0.95,
    "pretrain_weight_decay": 0.1,
    "clip": 1.0,
    "test_weights": "last",
    "pretrain_eval_every": 2000,
    "pretrain_save_every": 500,
    "eval_rows": 1536,
    "compile": True,
}
CONTINUE_NOAM = {  # the same text for 45 minutes more
    "init_from": "newest",
    "pretrain_schedule": "cosine",
    "pretrain_lr": 8e-5,
    "pretrain_min_lr": 8e-6,
    "pretrain_warmup": 0.05,
    "pretrain_max_minutes": 45.0,
}
# Its rows were padded to 1,024 tokens and cut into two windows of 512, the second one mostly nothing but
# padding: 256 windows are 128 rows. It validated on the test part, which is not repeated.
SECOND_STAGE_FULL = {
    "mode": "finetune",
    "method": "full",
    "answer_format": "text",
    "loss_on_prompt": True,
    "batch": 128,
    "group_lengths": False,
    "lr": 5e-6,
    "min_lr": 5e-7,
    "warmup": 0.05,
    "schedule": "cosine",
    "max_minutes": 60.0,
    "weight_decay": 0.1,
    "clip": 1.0,
    "eval_every": 500,
    "test_weights": "last",
    "eval_rows": 1536,
    "compile": True,
}
PRESETS = {
    "recommended": {},
    "noam_wide4": NOAM_WIDE4,
    "noam_wide4_effective": NOAM_WIDE4 | {"pretrain_lr": 1e-3},
    "continue_noam": NOAM_WIDE4 | CONTINUE_NOAM,
    "second_stage_full": SECOND_STAGE_FULL,
}
SMOKE = {
    "mode": lambda mode: "study" if mode == "both" else mode,
    "data": "template-problems",
    "max_documents": 3000,
    "text": "python-docs",
    "text_documents": 400,
    "tokenizer": "bpe:1024",
    "val_share": 0.1,
    "test_share": 0.1,
    "block_size": 64,
    "max_length": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "dropout": 0.0,
    "qat_group": 32,
    "vocab_multiple": 32,
    "pretrain_batch": 24,
    "pretrain_micro_batch": None,
    "pretrain_max_steps": 120,
    "pretrain_max_minutes": None,
    "pretrain_lr": lambda lr: 5 * lr,
    "pretrain_eval_every": 60,
    "pretrain_save_every": None,
    "batch": 36,
    "max_minutes": None,
    "max_steps": 200,
    "lr": lambda lr: 80 * lr,
    "warmup": 0.1,
    "dtype": "auto",
    "eval_every": 100,
    "eval_rows": 100,
    "pretrain_min_lr": lambda lr: 5 * lr,
    "min_lr": lambda lr: 80 * lr,
    "compile": False,
    "answer_rows": 50,
    "save_every": None,
    "plain_blocks": 20,
    "seeds": 1,
    "budgets": ("steps",),
    "arms": ("full", "lora,lr=3e-3", "loha,lr=1e-2", "lokr,lr=3e-2", "full,qat=int4"),
}


def make_optimizer(cfg, model):
    """The optimizer of the trained parameters, after adapters and fake quantisation are in place."""
    decay, betas, undecayed = cfg.weight_decay, (cfg.beta1, cfg.beta2), ("wte.weight",)
    if cfg.optimizer == "lion":
        return core.Lion(optim.parameter_groups(model, decay, undecayed=undecayed), betas)
    return core.make_optimizer(model, cfg.optimizer, decay, betas, undecayed=undecayed)


# ------------------------------------------------------------------------------------------------ both stages


@dataclass
class Stage:
    """What `fit` needs of pretraining or of fine-tuning."""

    units: object  # what batches are made of: core.Blocks, core.Examples, core.Packs
    batches: core.ShardedBatches
    total_steps: int
    model: core.GPT
    trained: object  # what checkpoints hold: the model, or its adapters
    precision: core.Precision
    announce: object  # () -> None: says what is about to run, and begins the run
    check: object  # (at) -> None: validation
    describe: object  # () -> str: what the loss sees
    spike_facts: object  # (at, lr) -> dict: what a spiking step read


def check_length(cfg):
    """Raises UserError if nothing would end the stage."""
    if cfg.epochs is cfg.max_steps is cfg.max_minutes is None:
        what = "fine-tuning: use --max_minutes, --max_steps or --epochs"
        if cfg.mode == "pretrain":
            what = "pretraining: use --pretrain_max_minutes or --pretrain_max_steps"
        raise core.UserError(f"nothing ends {what}")


def fit(run, cfg, world, stage) -> dict:
    """The training loop. Returns the steps taken, and the MB of gradients and optimizer state."""
    units, batches, model = stage.units, stage.batches, stage.model
    lengths, total_steps = np.asarray(units.lengths), stage.total_steps
    optimizer = make_optimizer(cfg, model)
    saved = stage.trained, optimizer, stage.precision
    stage.announce()
    step = run.load(*saved)
    ddp = core.wrap_ddp(model, world, model.h if cfg.compile else (), dynamic=cfg.mode != "pretrain")

    def forward_backward(mine, targets) -> float:
        """Adds the gradients of this rank's rows, of summed loss / global targets;
        returns their summed loss."""
        losses = []
        for part in core.micro_batches(ddp, mine, cfg.micro_batch, lengths[mine], cfg.micro_tokens):
            with stage.precision.autocast():
                losses.append(ddp(*units.batch(part, world.device)))
            core.scaled_backward(losses[-1], world, targets, stage.precision)
        return sum(loss.item() for loss in losses)

    int4.switch(model, True)
    core.rehearse(run, ddp, saved, forward_backward, batches, total_steps - step)
    run.say(stage.describe())
    if cfg.mode == "find_lr":
        beta1 = core.beta1_at(cfg, 0, cfg.find_steps)
        return core.find_lr(run, batches, units.targets, saved, forward_backward, beta1, mode="finetune")
    if cfg.max_minutes is not None and total_steps == core.FOREVER:
        run.say("the clock ends this stage: its number of steps is estimated at each line")
    switch_to_int4(run, cfg, model, step, run.schedule_length(step, total_steps))

    for at in core.steps(run, batches, units.targets, saved, total_steps, evaluate_first=True):
        if at.evaluates:
            if at.ends:  # a clock that ends in one long step must not leave the float model
                switch_to_int4(run, cfg, model, at.step, length=0)
            stage.check(at)
            continue
        lr, beta1 = (rate(cfg, at.step, at.schedule_length) for rate in (core.lr_at, core.beta1_at))
        loss_sum = forward_backward(at.rows, at.targets)
        norm = core.gradient_norm(optimizer, stage.precision)
        if at.spiked(loss_sum, norm) and world.is_main:
            at.note_spike(model, stage.spike_facts(at, lr))
        at.update(optimizer, stage.precision, lr, beta1=beta1)
        switch_to_int4(run, cfg, model, at.step + 1, run.schedule_length(at.step + 1, total_steps))
    switch_to_int4(run, cfg, model, run.step, length=0)
    trains = [p for p in model.parameters() if p.requires_grad]
    state = [t for of in optimizer.state.values() for t in of.values() if isinstance(t, torch.Tensor)]
    megabytes = sum(t.numel() * t.element_size() for t in (*trains, *state)) / 1e6
    figures = {"steps": run.step, "state_mb": megabytes}
    optimizer.zero_grad(set_to_none=True)  # makes room for measuring
    optimizer.state.clear()
    return figures


def switch_to_int4(run, cfg, model, step, length):
    """Switches fake quantisation on from step qat_start x length on, for good; off before."""
    if cfg.qat != "off" and "quantised_from" not in run.state and step >= cfg.qat_start * length:
        run.state["quantised_from"] = step
        for name in ("lowest", "evaluated"):  # of the float model
            run.state.pop(name, None)
        run.say(f"step {step}: int4 weights and int8 activations from here on")
    int4.switch(model, "quantised_from" in run.state)


def keep_if_best(run, cfg, at, loss) -> bool:
    """With QAT a loss without quantisation is no record to beat."""
    return (cfg.qat == "off" or "quantised_from" in run.state) and at.keep_if_best(loss)


final_parts = tuning.final_parts  # the parts whose figures a run ends with


def weights_of(run, cfg, stage) -> dict:
    """Returns checksum, checkpoint and parameter counts; then loads the weights that are to be tested."""
    facts = {"weights_sha256": core.weights_sha256(stage.trained), "test_checkpoints": [run.checkpoint]}
    if cfg.test_weights == "best":
        facts["test_checkpoints"] = [run.load_best(stage.trained)]
    return facts | dict(
        zip(("parameters", "trainable_parameters"), core.count_parameters(stage.model), strict=True)
    )


def said(m, part) -> str:
    """A line of the figures that both stages have."""
    loss, accuracy = (core.plus_minus(m[f"{part}/{k}"], m[f"{part}/{k}_interval"], n) for k, n in FIGURES)
    guess = f"token frequencies {m[f'{part}/unigram_loss']:.4f}"
    return f"loss {loss}  perplexity {m[f'{part}/perplexity']:.2f}  accuracy {accuracy}  {guess}"


FIGURES = (("loss", 4), ("accuracy", 3))


def say_end(run, result, part):
    """Says the last lines of a stage."""
    loss, perplexity = f"{result[f'{part}/loss']:.4f}", f"{result[f'{part}/perplexity']:.2f}"
    run.say(f"done  {part} loss {loss}  perplexity {perplexity}  {run.seconds / 60:.1f} min")
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"next: python eval.py --run {run.folder}")


# ------------------------------------------------------------------------------------------------ pretraining


def pretraining(cfg) -> Config:
    """The constants of the first stage: pretrain_lr becomes lr, and so on. UserError for
    typed flags of the second."""
    names = {field.name for field in fields(Config) if field.name.startswith("pretrain_")}
    theirs = {name.removeprefix("pretrain_"): getattr(cfg, name) for name in names}
    typed = core.typed(cfg)
    if cfg.mode == "pretrain" and (odd := sorted(typed.flags & {*theirs, "epochs"})):
        other = "pretrain_max_steps" if odd[0] == "epochs" else f"pretrain_{odd[0]}"
        raise core.UserError(f"--{odd[0]} is fine-tuning's: use --{other}")
    flags = {name.removeprefix("pretrain_") for name in typed.flags - {*theirs, "epochs"}}
    own = {"mode": "pretrain", "epochs": None, "method": "full", "qat": "off", **theirs}
    return core.with_flags(replace(cfg, **own), typed, flags)


@contextlib.contextmanager
def flags_of_stage(cfg):
    """In the first stage, errors about --lr say --pretrain_lr, and so on."""
    try:
        yield
    except core.UserError as error:
        if cfg.mode != "pretrain":
            raise
        names = "|".join(
            f.name.removeprefix("pretrain_") for f in fields(Config) if f.name.startswith("pretrain_")
        )
        raise core.UserError(re.sub(rf"--({names})\b", r"--pretrain_\1", str(error))) from None


def open_text(cfg, world) -> core.Tokens:
    """The tokens of the pretraining text. UserError names --text, --tokenizer."""
    try:
        return core.open_corpus(corpus_of(cfg), world)
    except core.UserError as error:
        page = str(error).replace(
            "--help of --data", "docs/gpt_scratch.md"
        )  # where gpt_scratch.py has its help
        raise core.UserError(f"--text, --tokenizer: {page}") from None


def corpus_of(cfg) -> core.Corpus:
    return core.Corpus(
        cfg.text, cfg.tokenizer, cfg.text_column, cfg.text_documents, cfg.val_share, cfg.test_share,
        cfg.split_seed, cfg.text_tokens,
    )  # fmt: skip


def new_model(cfg, tokenizer) -> core.GPT:
    """A new GPT like journal 004's `noam`: rotary positions, SwiGLU, RMSNorm, no biases, tied head."""
    rows = math.ceil(len(tokenizer) / cfg.vocab_multiple) * cfg.vocab_multiple
    return core.GPT(core.GPTConfig(
        rows, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, positions="rotary", norm="rmsnorm",
        activation="swiglu", bias=False, qkv_bias=False, dropout=cfg.dropout, checkpointing=cfg.checkpointing,
    ))  # fmt: skip


def first_model(cfg, tokenizer, world) -> core.GPT:
    """A new model, or that of cfg.init_from for continued pretraining. UserError where it does not fit."""
    if cfg.init_from in (None, "new"):
        return new_model(cfg, tokenizer)
    model, own = open_weights(cfg, world)
    if core.tokenizer_fingerprint(own) != core.tokenizer_fingerprint(tokenizer):
        tokenizer = core.tokenizer_of(cfg.init_from)
        raise core.UserError(f"--tokenizer {cfg.tokenizer} is not that of {cfg.init_from}: use {tokenizer}")
    if cfg.block_size > (most := model.config.block_size):
        raise core.UserError(f"--block_size {cfg.block_size} is over the {most} of {cfg.init_from}")
    return model


def blocks_of(cfg, tokens, part, most=None) -> core.Blocks:
    """The first `most` blocks of a part; none: all. UserError if there is none."""
    ids = tokens.parts[part][: None if most is None else most * cfg.block_size + 1]
    if len(ids) < 2:
        share = "" if part == "train" else f" or a larger --{part}_share"
        raise core.UserError(f"{cfg.text} leaves no {part} text: use more documents{share}")
    return core.Blocks(ids, cfg.block_size)


def pretrain(run, cfg, world) -> dict:
    """The first stage. Returns the final figures."""
    check_length(cfg)
    tokens = open_text(cfg, world)
    run.pin("fingerprint", tokens.fingerprint)
    train, val = blocks_of(cfg, tokens, "train"), blocks_of(cfg, tokens, "val", cfg.eval_rows)
    for part in final_parts(cfg):
        blocks_of(cfg, tokens, part)
    order = cfg.seed + (1000 if cfg.init_from else 0)  # continued pretraining reads in a new order
    batches = core.ShardedBatches(np.full(len(train), cfg.block_size), cfg.batch, world, seed=order)
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(first_model(cfg, tokens.tokenizer, world))

    def announce():
        total = core.count_parameters(model)[0]
        sizes = "  ".join(f"{part} {len(of)}" for part, of in tokens.parts.items())
        run.say(f"model noam  {total / 1e6:.1f}M parameters ({total:,})   tokens {sizes}")
        run.begin()
        for line in [*tokens.lines, *([f"from {cfg.init_from}"] if cfg.init_from else [])]:
            run.say(line)
        run.say(f"{cfg.batch * cfg.block_size:,} tokens a step, {len(batches):,} steps an epoch")
        core.on_main(world, gpt_scratch.describe_model, run.folder, model, tokens.tokenizer)

    def check(at):
        sums = core.evaluate(model, val, cfg, world, at.poll)
        metrics = core.language_metrics(sums, core.stretches(len(sums)))
        if at.step == 0:
            run.say(f"initial loss {metrics['loss']:.4f}  ln V {math.log(model.config.vocab_size):.4f}")
        is_best = keep_if_best(run, cfg, at, metrics["loss"])
        tuning.report_validation(run, at, metrics, is_best, len(batches))

    def spike_facts(at, lr) -> dict:
        start = at.batch[0] * cfg.block_size
        first = train.tokens[start : start + cfg.block_size + 1]
        return {"lr": lr, "rows": at.batch, "first_row": tokens.tokenizer.decode(first.tolist())}

    def describe() -> str:
        text = core.one_line(tokens.tokenizer.decode(train.tokens[: cfg.block_size].tolist()))
        return f"the loss sees, in {train.targets([0])[0]} targets (all but the first token):\n  {text[:96]}"

    callbacks = announce, check, describe, spike_facts
    stage = Stage(train, batches, core.count_steps(cfg, batches), model, model, precision, *callbacks)
    result = fit(run, cfg, world, stage)
    result |= weights_of(run, cfg, stage)
    figures, losses, _ = measure_text(model, tokens, cfg, world, run.poll)
    for part in final_parts(cfg):
        run.say(f"{part:5} {said(figures, part)}")
        if alarm := figures[f"{part}/alarm"]:
            run.say(alarm)
    core.on_main(world, core.write_lines, run.folder / "losses.jsonl", losses)
    say_end(run, figures, part)
    return result | figures


def measure_text(model, tokens, cfg, world, poll) -> tuple[dict, list, list]:
    """(figures of val and test, lines of losses.jsonl, no answers)"""
    figures, sizes = {}, core.token_bytes(tokens.tokenizer)
    for part in final_parts(cfg):
        blocks = blocks_of(cfg, tokens, part)
        sums = core.evaluate(model, blocks, cfg, world, poll)
        metrics = core.measure(sums, blocks, tokens.unigram, sizes)
        figures |= {f"{part}/{name}": value for name, value in metrics.items()}
    return figures, core.loss_rows(part, sums, blocks, sizes), []


# ------------------------------------------------------------------------------------------------ fine-tuning


def newest_base(cfg, world) -> str | None:
    """newest_pretraining on all ranks. UserError if --init_from newest finds none."""
    base = core.on_main(world, newest_pretraining, cfg)
    if cfg.init_from == "newest" and base is None:
        out = core.out_folder(cfg, __file__)
        raise core.UserError(f"--init_from newest: there is no finished pretraining run in {out}")
    return base


def newest_pretraining(cfg) -> str | None:
    """The newest finished run of mode pretrain in cfg.out, or None."""
    folders = sorted(path.parent for path in core.out_folder(cfg, __file__).glob("*/result.json"))
    for folder in reversed(folders):
        if (
            stored.status_of(folder) == "finished"
            and core.read_config(folder)["constants"].get("mode") == "pretrain"
        ):
            return str(folder)
    return None


def is_own_pretraining(name) -> bool:
    """Whether `name` is a run of this script's first stage, so that its text is known."""
    if not core.is_run(name):
        return False
    config = core.read_config(name)
    return config["script"] == Path(__file__).stem and config["constants"]["mode"] == "pretrain"


def open_weights(cfg, world):
    """(model, tokenizer) of cfg.init_from, at cfg.init_step or as it was tested.
    UserError where there is none."""
    name = cfg.init_from
    if Path(name).is_file():
        raise core.UserError(f"--init_from {name} is a file: use a run's folder")
    if name.count("/") > 1 and not Path(name).exists():
        raise core.UserError(f"--init_from {name} is not there; paths count from where the run was started")
    if (Path(name) / "checkpoints").is_dir() and not core.is_run(name):
        raise core.UserError(f"--init_from {name} holds adapters only: --mode export merges them")
    model, tokenizer = core.main_first(world, core.open_model, name, cfg.dropout, cfg.checkpointing)
    if len(tokenizer) > model.config.vocab_size:
        raise core.UserError(f"the tokenizer of {name} has {len(tokenizer)} tokens, the model "
                             f"{model.config.vocab_size}: they do not belong together")  # fmt: skip
    if cfg.init_step is not None:
        folder = Path(name) / "checkpoints" / f"step_{cfg.init_step:08d}"
        if not core.is_run(name) or checkpoints.broken(folder):
            there = ", ".join(sorted(path.name for path in folder.parent.glob("step_*"))) or "none"
            raise core.UserError(f"--init_step {cfg.init_step}: no whole {folder.name}; there: {there}")
        core.load_weights(folder, model)
    return model, tokenizer


def open_base(cfg, world):
    """(model, tokenizer) that fine-tuning starts from."""
    if cfg.init_from is None:
        raise core.UserError("there is no pretraining run: --mode pretrain makes one, or use --init_from")
    if cfg.init_from != "new":
        return open_weights(cfg, world)
    if cfg.init_step is not None:
        raise core.UserError(f"--init_step {cfg.init_step}: a new model has no checkpoints, drop it")
    tokenizer = open_text(cfg, world).tokenizer
    core.reseed(cfg.seed, "init")
    return new_model(cfg, tokenizer), tokenizer


def tuned(cfg, base, world):
    """Adds adapters or fake quantisation: (the model to train, what a checkpoint holds of it)."""
    core.reseed(cfg.seed, "adapters")
    if cfg.method != "full":
        loha_lokr.add_adapters(base, cfg.method, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    if cfg.qat != "off":
        int4.insert_fake_quant(base, cfg.qat_group)
    model = core.Precision(cfg.dtype, world).prepare(base)
    return model, model if cfg.method == "full" else core.Adapters(model)


def check_context(cfg, most, of):
    if cfg.max_length > most:
        raise core.UserError(f"--max_length {cfg.max_length} is over the {most} positions of {of}")


def plain_text(cfg, tokenizer, block_size, world) -> tuple[str, core.Blocks | None]:
    """(name of the text, held-out blocks) to measure forgetting: cfg.plain, or the base's own text."""
    if not cfg.plain_blocks:
        return "", None
    if cfg.plain is None and (cfg.init_from == "new" or is_own_pretraining(cfg.init_from)):
        then = cfg if cfg.init_from == "new" else stored_config(cfg.init_from)
        tokens = open_text(then, world)
        if then is not cfg:
            known = core.read_config(cfg.init_from)["facts"]["fingerprint"]
            core.refuse_other_data(known, tokens.fingerprint, then.text, ("data", "tokenizer"))
        return then.text, blocks_of(replace(then, block_size=block_size), tokens, "test", cfg.plain_blocks)
    name, most = cfg.plain or "python-docs", (min(block_size, cfg.max_length), cfg.plain_blocks)
    try:
        return name, core.main_first(world, tuning.plain_blocks, name, tokenizer, *most)
    except core.UserError as error:
        raise core.UserError(f"--plain: {error}") from None


def finetune(run, cfg, world) -> dict:
    """The second stage. Returns the final figures."""
    check_length(cfg)
    base, tokenizer = open_base(cfg, world)
    check_context(cfg, base.config.block_size, cfg.init_from)
    data = core.load_problems(cfg, world, tokenizer)
    run.pin("fingerprint", data.fingerprint)
    parts, lines = choices.examples_of(data, cfg)
    units = core.Packs(parts["train"], cfg.max_length) if cfg.pack else parts["train"]
    block = 50 if cfg.group_lengths else 1
    batches = core.ShardedBatches(units.lengths, cfg.batch, world, seed=cfg.seed, block=block)
    text, plain = plain_text(cfg, tokenizer, base.config.block_size, world)
    val = parts["val"].some(cfg.eval_rows)
    asked = choices.some(parts["val"].rows, cfg.answer_rows)
    model, trained = tuned(cfg, base, world)
    base_sha256 = core.state_sha256(core.base_weights(model))
    run.pin("base_sha256", base_sha256)
    precision = core.Precision(cfg.dtype, world)

    def announce():
        (total, trains), method = core.count_parameters(model), cfg.method
        counts = "  ".join(f"{name} {len(of)}" for name, of in parts.items())
        method += f" r={cfg.lora_rank}" if method != "full" else " int4" if cfg.qat != "off" else ""
        run.say(f"model {method} of {total / 1e6:.1f}M parameters, {trains:,} trainable   {counts}")
        run.begin()
        run.say(f"from {cfg.init_from}\ndata {cfg.data}  {len(data)} rows")
        for line in [*data.lines, *lines]:
            run.say(line)
        train = parts["train"]
        tokens, targets = train.lengths.mean(), train.targets(range(len(train))).mean()
        run.say(f"train rows have {tokens:.0f} tokens, {targets:.1f} of them targets")
        if left := len(units) % cfg.batch:
            run.say(f"each epoch leaves out {left} of {len(units)}, others each time: they fill no batch")
        if cfg.optimizer == "lion" and cfg.batch < 64:
            run.say(f"NOTE Lion is recommended for batches of 64 and more, not {cfg.batch}")
        core.on_main(world, keep_for_later, run.folder, cfg, model, tokenizer)

    def check(at):
        if at.step == 0 and plain:
            run.state["plain"] = tuning.plain_losses(run, cfg, plain, model, at.poll).tolist()
        sums = core.evaluate(model, val, cfg, world, at.poll)
        metrics = core.language_metrics(sums, data.groups[val.rows])
        is_best = keep_if_best(run, cfg, at, metrics["loss"])
        tuning.report_validation(run, at, metrics, is_best, len(batches))
        if len(asked):
            scores = choices.Scores.of(model, choices.Choices(data, asked), cfg, world, at.poll)
            share = scores.right(data, asked).mean(0).tolist()
            run.say(f"{at.where}  val  answers {share[0]:.3f}  per token {share[1]:.3f} of {len(asked)}")
            shares = {"val/answer_accuracy": share[0], "val/answer_accuracy_per_token": share[1]}
            run.metrics(at.step, shares)
            sample(run, cfg, at.step, model, data, asked[:3], at.poll)

    def spike_facts(at, lr) -> dict:
        rows = tuning.spike_rows(cfg, model, parts["train"], units.members(at.batch), world)
        return {"lr": lr, **tuning.batch_facts(units, at.batch), **rows}

    callbacks = announce, check, functools.partial(tuning.describe_example, parts["train"]), spike_facts
    stage = Stage(units, batches, core.count_steps(cfg, batches), model, trained, precision, *callbacks)
    result = fit(run, cfg, world, stage)
    if cfg.mode == "find_lr":
        return result
    if cfg.method != "full":
        if core.state_sha256(core.base_weights(model)) != base_sha256:
            raise RuntimeError("the base has moved: only adapters may")
        run.say("the base is unchanged (checksum)")
    result |= weights_of(run, cfg, stage)
    figures, losses, answers = measure_rows(model, data, parts, cfg, world, run.poll)
    for part in final_parts(cfg):
        run.say(f"{part:5} {said(figures, part)}")
        hits = "hits" if cfg.loss_on_prompt else "an answer's hits"
        share = f"{figures[f'{part}/accuracy_over_padding']:.4f}"
        run.say(f"{part:5} accuracy as journal 004 counted, {hits} / all positions of padded rows: {share}")
    for line in choices.answer_lines(part, figures):
        run.say(line)
    alarm = tuning.alarm(run, result["steps"], part, figures)
    # few steps may teach answers before they teach their spelling
    if alarm and not choices.knows(part, figures):
        run.say(alarm)
        figures["alarm"] = alarm
    if plain:
        figures |= tuning.forgetting(run, replace(cfg, plain=Path(text).name), plain, model)
    core.on_main(world, core.write_lines, run.folder / "losses.jsonl", losses)
    core.on_main(world, core.write_lines, run.folder / "answers.jsonl", answers)
    say_end(run, figures, part)
    return result | figures | {"base_sha256": base_sha256}


def sample(run, cfg, step, model, data, rows, poll):
    """Writes what the model generates after problems to samples.jsonl and TensorBoard; says the first."""
    if not cfg.sample_tokens:
        return
    prompts, world = [data.prompt(row) for row in rows], run.world
    texts = answers.answers(model, data.tokenizer, prompts, cfg.sample_tokens, len(rows), world, poll)
    asked = [core.one_line(data.tokenizer.decode(prompt)) for prompt in prompts]
    run.samples(step, [f"{problem}\n{text}" for problem, text in zip(asked, texts, strict=True)])
    right = data.tokenizer.decode(data.whole(rows[0])[len(prompts[0]) : -1]).strip()
    written = answers.shortened(core.one_line(texts[0]), 20)
    run.say(f"  | {answers.shortened(asked[0], 46)} -> {written} (right: {answers.shortened(right, 16)})")


def measure_rows(model, data, parts, cfg, world, poll) -> tuple[dict, list, list]:
    """(figures of val and test, lines of losses.jsonl, lines of answers.jsonl);
    answers the last part only."""
    figures = {}
    for part in final_parts(cfg):
        last = part == final_parts(cfg)[-1]
        part_figures, losses, answers = choices.measure(model, part, parts, data, cfg, world, poll, last)
        figures |= part_figures
    return figures, losses, answers


def keep_for_later(folder, cfg, model, tokenizer):
    """Writes tokenizer/ and, if checkpoints hold whole models, gpt.json: from these
    the folder rebuilds it."""
    if cfg.method == "full":
        gpt_scratch.describe_model(folder, model, tokenizer)
    else:
        tokenizer.save_pretrained(folder / "tokenizer")


# ------------------------------------------------------------------------------------- a run, from its folder


def stored_config(folder) -> Config:
    """The constants of a run; those that this script no longer has are left out.
    UserError for another script's."""
    stored, known = core.read_config(folder), {field.name for field in fields(Config)}
    if stored["script"] != Path(__file__).stem:
        raise core.UserError(f"{folder} is a run of {stored['script']}.py: open it there")
    return Config(**{name: value for name, value in stored["constants"].items() if name in known})


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, with the weights that it was tested with;
    fake-quantised as in training."""
    cfg = stored_config(folder)
    if cfg.mode == "pretrain":
        model, tokenizer = core.open_model(folder)
        return cfg, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer
    if cfg.method == "full":  # the base is in the folder
        base, tokenizer = core.open_model(folder)
        model, _ = tuned(cfg, base, world)
        int4.switch(model, True)
        return cfg, model.eval(), tokenizer
    base, tokenizer = open_base(cfg, world)
    model, trained = tuned(cfg, base, world)
    if core.state_sha256(core.base_weights(model)) != core.read_config(folder)["facts"].get("base_sha256"):
        raise core.UserError(f"--init_from {cfg.init_from} is not the model that {folder} was trained on")
    core.load_weights(Path(folder) / "checkpoints" / core.tested_or_newest_checkpoint(folder), trained)
    return cfg, model.eval(), tokenizer


def own_measure(folder, cfg, tokenizer, world):
    """(a function (model, poll) -> figures, losses, answers on a run's held-out data; the units of its last
    part). UserError if the data has changed."""
    stored = core.read_config(folder)["facts"]["fingerprint"]
    if cfg.mode == "pretrain":
        tokens = open_text(cfg, world)
        core.refuse_other_data(stored, tokens.fingerprint, cfg.text, ("data", "tokenizer"))
        units = blocks_of(cfg, tokens, final_parts(cfg)[-1])
        return (lambda model, poll: measure_text(model, tokens, cfg, world, poll)), units
    data = core.load_problems(cfg, world, tokenizer)
    core.refuse_other_data(stored, data.fingerprint, cfg.data)
    parts, _ = choices.examples_of(data, cfg)
    return (lambda model, poll: measure_rows(model, data, parts, cfg, world, poll)), parts[
        final_parts(cfg)[-1]
    ]


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, tuple[str, list]]:
    """Measures a run's own val and test data again. Returns figures, and name and lines of losses.jsonl.

    Rewrites answers.jsonl, too.
    """
    cfg, model, tokenizer = load_model(folder, world)
    cfg = replace(cfg, eval_batch=eval_batch or cfg.eval_batch)
    measure, _ = own_measure(folder, cfg, tokenizer, world)
    figures, losses, answers = measure(model, poll)
    if answers:
        core.on_main(world, core.write_lines, Path(folder) / "answers.jsonl", answers)
    return figures, ("losses.jsonl", losses)


def merged(model) -> core.GPT:
    """A plain float GPT of a trained model: adapters merged, fake quantisation removed."""
    if core.adapted(model):
        return core.merge_lora(model)
    plain = core.with_weights(model.config, model.state_dict())
    return plain.requires_grad_(False).train(model.training)


# -------------------------------------------------------------------------------------------- int4 and export


def quantise_run(folder, cfg, world, say, poll) -> dict:
    """Writes <run>/quantised_<group>/, loads it again and measures it beside the float weights. Returns
    {"float": figures, "int4": figures, ...}, from result.json if it was measured before.
    """
    own, model, tokenizer = load_model(folder, world)
    group = own.qat_group if own.qat != "off" else cfg.qat_group  # the one it was trained for
    model, target = merged(model).eval(), Path(folder) / f"quantised_{group}"
    weights = core.weights_sha256(model)
    if known := core.on_main(world, quantised.known_figures, target, weights):
        return known
    core.on_main(world, quantised.write_int4, model, group, tokenizer, target)
    small, _ = core.main_first(world, int4.load, target)
    measure, units = own_measure(folder, replace(own, eval_batch=cfg.eval_batch), tokenizer, world)
    result = {"weights_sha256": weights, "group": group, "trained_for_it": own.qat != "off"}
    bytes_of = {"float": sum(t.numel() * t.element_size() for t in model.state_dict().values())}
    bytes_of["int4"] = (target / "model.safetensors").stat().st_size
    lines = {}
    for kind, of in (("float", model), ("int4", small.to(world.device))):
        figures, *lines[kind] = measure(of, poll)
        rate = quantised.tokens_per_second(of, units, own, world, poll)
        result[kind] = figures | {"mb": bytes_of[kind] / 1e6, "tokens_per_second": rate}
        loss = figures[f"{final_parts(own)[-1]}/loss"]
        say(f"{kind:5} {final_parts(own)[-1]} loss {loss:.4f}  {rate:.0f} tokens/s  of {Path(folder).name}")
    result["rows"] = mathqa_report.paired_rows(lines["float"], lines["int4"])
    core.on_main(world, core.write_json, target / "result.json", result)
    return result


def quantise_or_export(cfg, world, say, poll):
    """Modes quantise and export."""
    if not cfg.run_folder:
        raise core.UserError(f"--mode {cfg.mode} needs --run_folder")
    if cfg.mode == "quantise":
        result = quantise_run(cfg.run_folder, cfg, world, say, poll)
        say(mathqa_report.quantised_table({Path(cfg.run_folder).name: [result]}))
        folder = f"{cfg.run_folder}/quantised_{result['group']}"
        say("\n".join(mathqa_report.small_verdicts({Path(cfg.run_folder).name: [result]})))
        return say(f"done  {folder}\nnext: python eval.py --run {folder} --data <text or rows>")
    _, model, tokenizer = load_model(cfg.run_folder, world)
    folder = Path(cfg.run_folder) / "merged"

    def write():
        shutil.rmtree(folder, ignore_errors=True)
        with core.whole_folder(folder) as aside:
            core.save_pretrained(merged(model), tokenizer, aside)

    core.on_main(world, write)
    say(f"written: {folder}\nnext: python gpt_scratch.py --mode generate --model {folder}")


# ---------------------------------------------------------------------------------------------- several runs


@dataclass
class MathQAStudy:
    """What the runs of a study share: folder of results, say(line), poll() for signals."""

    cfg: Config
    world: core.World
    folder: Path
    say: object
    poll: object


STUDY_CONSTANTS = {"arms", "budgets", "shares", "seeds", "run_folder"}
ARM_MAY = {  # what an arm may have of its own: how it is tuned, not what on or how much of it
    "lr",
    "min_lr",
    "warmup",
    "schedule",
    "cycle_beta1",
    "optimizer",
    "beta1",
    "beta2",
    "weight_decay",
    "clip",
    "dropout",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "qat",
    "qat_group",
    "qat_start",
}
# constants of one stage, ignored in the other
STAGE1_ONLY = {
    "text",
    "text_column",
    "text_documents",
    "text_tokens",
    "tokenizer",
    "vocab_multiple",
    "n_layer",
    "n_head",
    "n_embd",
    "val_share",
    "test_share",
    "block_size",
}
STAGE2_ONLY = {
    "data",
    "max_documents",
    "answer_format",
    "loss_on_prompt",
    "max_length",
    "pack",
    "group_lengths",
    "init_from",
    "init_step",
    "method",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "qat",
    "qat_group",
    "qat_start",
    "answer_rows",
    "sample_tokens",
    "plain",
    "plain_blocks",
}


def arm_config(cfg, arm) -> Config:
    """cfg with the constants of an arm, e.g. `lora,lr=5e-4`. UserError for a constant
    that arms may not change."""
    method, *given = (word.strip() for word in arm.split(","))
    argv = ["--method", method]
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or name not in ARM_MAY:
            raise core.UserError(
                f"--arms {arm}: {word!r} is no constant of an arm; use {', '.join(sorted(ARM_MAY))}"
            )
        switch = {"true": [f"--{name}"], "false": [f"--no-{name}"]}
        argv += switch.get(value, [f"--{name}", value])
    try:
        parsed = core.parsed_config(Config, {}, {}, "", argv)
    except core.UserError as error:
        raise core.UserError(f"--arms {arm}: {error}") from None
    return replace(cfg, **{name: getattr(parsed, name) for name in core.typed(parsed).flags})


def as_run(study, cfg, tag) -> Config:
    """`cfg` as a run of a study, which is found again by its tag and the constants of its stage."""
    other = STAGE2_ONLY if cfg.mode == "pretrain" else set() if cfg.init_from == "new" else STAGE1_ONLY
    names = {field.name for field in fields(Config) if not field.name.startswith("pretrain_")}
    matter = names - core.MAY_CHANGE - core.CALL_CONSTANTS - STUDY_CONSTANTS - other
    tag = "-".join(filter(None, [study.cfg.tag, tag, f"s{cfg.seed}"]))
    run_cfg = replace(cfg, tag=tag, resume_timestamp="auto")
    typed = replace(core.typed(study.cfg), overrides={})
    flags = core.typed(
        cfg if cfg.mode == "pretrain" else study.cfg
    ).flags  # those of the first stage are renamed
    changed = flags & (core.MAY_CHANGE - set(LENGTH))
    return core.with_flags(run_cfg, typed, matter | changed)


LENGTH = ("max_minutes", "max_steps", "epochs")


def length_name(cfg) -> str:
    """The length of a stage as part of its tag, so that another length is another run."""
    named = ((cfg.max_minutes, "min"), (cfg.max_steps, "steps"), (cfg.epochs, "epochs"))
    return "-".join(f"{n:g}{unit}" for n, unit in named if n is not None)


def finished_run(cfg) -> str:
    """Folder of the finished run with these constants, or nothing."""
    return str(core.finished_run(cfg, __file__) or "")


def one_run(study, cfg) -> Path:
    """The folder of the run with these constants; trains it if it is not finished. Stop if it is stopped."""
    if folder := core.on_main(study.world, finished_run, cfg):
        study.say(f"finished already: {folder}")
        return Path(folder)
    if study.world.device.type != "cpu":  # what the last run left is not this one's
        gc.collect()
        getattr(torch, study.world.device.type).empty_cache()
        getattr(torch, study.world.device.type).reset_peak_memory_stats()
    if cfg.compile or study.world.device.type != "cpu":  # each run compiles for itself, as it would alone
        torch.compiler.reset()
    ended = False
    if not (opened := core.open_run(cfg, study.world, __file__, unit="tokens")):
        return one_run(study, cfg)  # another process has finished it while this one waited
    with flags_of_stage(cfg), opened as run:
        run.result = STAGES[cfg.mode](run, run.cfg, study.world)
        ended = True
    if not ended:
        core.barrier(study.world)  # all ranks have read what rank 0 said last, before it leaves
        raise core.Stop(f"mode {study.cfg.mode}")
    study.poll()
    return run.folder


STAGES = {"pretrain": pretrain, "finetune": finetune, "find_lr": finetune}


def pretrained(study, cfg) -> Path:
    """The pretraining run with these constants."""
    typed = core.typed(study.cfg)
    run_cfg = pretraining(core.with_flags(replace(cfg), typed, typed.flags))
    return one_run(study, as_run(study, run_cfg, f"pretrain-{length_name(run_cfg)}"))


def tuned_run(study, cfg, base, name) -> Path:
    """The fine-tuning run with these constants and this length."""
    run_cfg = replace(cfg, mode="finetune", init_from=str(base))
    key = f"{name} {[getattr(run_cfg, length) for length in LENGTH]}"
    mark = hashlib.sha256(key.encode()).hexdigest()[:6]
    return one_run(study, as_run(study, run_cfg, f"{tables.slug(name)[:40]}-{mark}"))


def both(study):
    """Mode both: pretraining, then fine-tuning of its model."""
    base = pretrained(study, study.cfg)
    folder = tuned_run(study, study.cfg, base, f"{study.cfg.method}-{length_name(study.cfg)}")
    study.say(f"both stages are done\n  {base}\n  {folder}")


def compare_arms(study):
    """Mode study: every arm with every seed at equal steps and at equal time; then int4 of the
    first arm and of qat arms."""
    cfg, runs = study.cfg, {}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        base = cfg.init_from or pretrained(study, replace(cfg, seed=seed))
        run_cfg = arm_config(replace(cfg, seed=seed), cfg.arms[0])
        first = tuned_run(study, run_cfg, base, cfg.arms[0])
        length = core.on_main(study.world, mathqa_report.length, first)
        for budget in cfg.budgets:
            equal = {"max_minutes": None, "max_steps": length["steps"], "epochs": None}
            if budget == "time":
                equal |= {"max_minutes": length["seconds"] / 60, "max_steps": None}
            for arm in cfg.arms:
                run_cfg = arm_config(replace(cfg, seed=seed, **equal), arm)
                is_first = arm == cfg.arms[0]
                folder = first if is_first else tuned_run(study, run_cfg, base, f"equal-{budget}-{arm}")
                runs.setdefault(budget, {}).setdefault(arm, []).append(folder)
    budget = cfg.budgets[0]
    small = {
        arm: [quantise_run(folder, cfg, study.world, study.say, study.poll) for folder in runs[budget][arm]]
        for arm in (cfg.arms[0], *(arm for arm in cfg.arms[1:] if arm_config(cfg, arm).qat != "off"))
    }
    core.on_main(study.world, conclude, study, runs, small)


def split_budget(cfg) -> tuple[str, list]:
    """(max_minutes or max_steps, the values of both stages). UserError unless both
    have the same bound alone."""
    for unit, other in (("max_minutes", "max_steps"), ("max_steps", "max_minutes")):
        total, others = ([getattr(cfg, f"{p}{n}") for p in ("pretrain_", "")] for n in (unit, other))
        if None not in total and others == [None, None] and cfg.epochs is None:
            return unit, total
    what = "bound both stages by the same alone, e.g. --pretrain_max_minutes none --max_minutes none"
    raise core.UserError(
        f"mode split shares out minutes or steps: {what} --pretrain_max_steps 900 --max_steps 300"
    )


def split(study):
    """Mode split: the first arm after each share of pretraining; both stages together have a fixed length."""
    cfg, runs = study.cfg, {}
    unit, total = split_budget(cfg)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for share in cfg.shares:
            first = float(share) * sum(total)
            first = round(first) if unit == "max_steps" else first
            run_cfg = replace(cfg, seed=seed, **{f"pretrain_{unit}": first, unit: sum(total) - first})
            base = pretrained(study, run_cfg)
            folder = tuned_run(study, arm_config(run_cfg, cfg.arms[0]), base, f"after-{share}-{cfg.arms[0]}")
            runs.setdefault(f"{float(share):.4g} pretraining", []).append(folder)
    title = f"total {unit.removeprefix('max_')} {sum(total):g}"
    core.on_main(study.world, conclude, study, {title: runs}, {})


def without_rows(small) -> dict:
    """The figures of quantise_run without those of single rows."""
    return {
        arm: [{n: v for n, v in result.items() if n != "rows"} for result in of] for arm, of in small.items()
    }


def conclude(study, runs, small):
    """Rank 0: writes study.md and study.json, and prints the tables."""
    text, figures = mathqa_report.report(runs, small, study.cfg)
    folders = {b: {arm: [str(f) for f in of] for arm, of in arms.items()} for b, arms in runs.items()}
    content = {
        "runs": folders,
        "figures": figures,
        "quantised": without_rows(small),
        "constants": asdict(study.cfg),
    }
    core.write_json(study.folder / "study.json", content)
    with core.whole_file(study.folder / "study.md") as file:
        file.write(f"commit {core.git_state()['commit'] or 'unknown'}\n\n{text}\n")
    study.say(f"\n{text}\n\ndone  tables: {study.folder}/study.md")
    study.say(f"next: python eval.py --table {study.folder.parent}")


def study_folder(cfg) -> Path:
    """<out>/<mode>[-tag]-<hash of the constants that its results depend on>/"""
    aside = (core.MAY_CHANGE - set(LENGTH)) | core.CALL_CONSTANTS | {"mode", "run_folder"}
    constants = {name: value for name, value in asdict(cfg).items() if name not in aside}
    mark = core.short_hash(constants, 6)
    return core.out_folder(cfg, __file__) / "-".join(filter(None, [cfg.mode, cfg.tag, mark]))


def several(cfg, world, say, poll):
    """Modes both, study and split. Checks everything before the first step."""
    if cfg.mode != "both":
        for arm in cfg.arms:
            arm_config(cfg, arm)
        if len(set(cfg.arms)) < len(cfg.arms):
            raise core.UserError(f"--arms {' '.join(cfg.arms)}: one stands there twice")
        if len(set(cfg.budgets)) < len(cfg.budgets):
            raise core.UserError(f"--budgets {' '.join(cfg.budgets)}: one stands there twice")
    if cfg.mode == "split":
        split_budget(cfg)
        try:
            shares = {f"{float(share):.4g}" for share in cfg.shares if 0 < float(share) < 1}
        except ValueError:
            shares = ()
        if len(shares) < len(cfg.shares):
            raise core.UserError(f"--shares {' '.join(cfg.shares)}: use different numbers between 0 and 1")
    if cfg.init_from == "newest":
        cfg = core.with_flags(
            replace(cfg, init_from=newest_base(cfg, world)), core.typed(cfg), core.typed(cfg).flags
        )
    folder = study_folder(cfg)
    if cfg.mode != "both":
        core.on_main(world, core.prepare_folder, folder)
    printed, log = say, folder / "log.txt"

    def say(text):
        printed(text)
        if world.is_main and cfg.mode != "both":
            with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:  # a full disk
                file.write(text + "\n")

    for line in core.override_lines(cfg):
        say(line)
    check_stages(cfg, world)
    for line in plan(cfg):
        say(line)
    work = {"both": both, "study": compare_arms, "split": split}[cfg.mode]
    try:
        work(MathQAStudy(cfg, world, folder, say, poll))
    except core.Stop:
        say("next: the same command goes on where it was")
        raise


def plan(cfg) -> list[str]:
    """A line on how many runs a study makes, how long they train at most, and the cost."""
    if cfg.mode == "both":
        return []
    tunings = len(cfg.shares) if cfg.mode == "split" else 1 + (len(cfg.arms) - 1) * len(cfg.budgets)
    firsts = len(cfg.shares) if cfg.mode == "split" else int(not cfg.init_from)
    line = f"{cfg.mode}  {cfg.seeds} x ({firsts} pretraining + {tunings} tuning) runs"
    if cfg.pretrain_max_minutes is None or cfg.max_minutes is None:
        return [line]
    minutes = [firsts * cfg.pretrain_max_minutes, tunings * cfg.max_minutes]
    if cfg.mode == "split":
        minutes = [len(cfg.shares) * (cfg.pretrain_max_minutes + cfg.max_minutes)]
    hours = cfg.seeds * sum(minutes) / 60
    cost = f", ${hours * cfg.price_per_hour:.2f}" if cfg.price_per_hour else ""
    return [f"{line}, some {hours:.1f} h of training{cost}"]


def check_stages(cfg, world):
    """Opens text and rows of both stages and checks the model's shape, so that a mistake of the second stage
    does not wait for the end of the first."""
    check_length(cfg)
    if min(cfg.batch, cfg.pretrain_batch) < world.size:
        raise core.UserError(f"--batch or --pretrain_batch is smaller than {world.size} ranks: use more rows")
    if cfg.init_from:
        base, tokenizer = open_base(cfg, world)
    else:
        check_length(pretraining(cfg))
        tokens = open_text(cfg, world)
        for part in core.PARTS:
            blocks_of(cfg, tokens, part)
        tokenizer = tokens.tokenizer
        with torch.device("meta"):
            base = new_model(cfg, tokenizer)
    check_context(cfg, base.config.block_size, cfg.init_from or "--block_size")
    parts, _ = choices.examples_of(core.load_problems(cfg, world, tokenizer), cfg)
    if len(parts["train"]) < cfg.batch and not cfg.pack:
        raise core.UserError(
            f"--batch {cfg.batch} is over the {len(parts['train'])} training rows: use fewer"
        )
    for arm_cfg in [cfg] if cfg.mode == "both" else [arm_config(cfg, arm) for arm in cfg.arms]:
        if cfg.mode == "study" or arm_cfg.qat != "off":
            int4.linear_layers(base, arm_cfg.qat_group)


def check_flags(cfg, world):
    """Says which typed flags have no effect in this stage. UserError for a preset of another mode."""
    typed = core.typed(cfg)
    preset_mode = PRESETS.get(typed.preset, {}).get("mode", cfg.mode)
    if preset_mode != cfg.mode and (preset_mode, cfg.mode) != ("finetune", "find_lr"):
        raise core.UserError(f"--preset {typed.preset} is for --mode {preset_mode}, not {cfg.mode}")
    odd = set()
    if cfg.mode in ("finetune", "find_lr"):
        odd = {name for name in typed.flags if name.startswith("pretrain_")}
        odd |= typed.flags & STAGE1_ONLY if cfg.init_from != "new" else set()
    if cfg.mode == "pretrain":
        odd = typed.flags & STAGE2_ONLY - {"init_from", "init_step"}
    if odd and world.is_main:
        print(f"NOTE of the other stage, without effect in mode {cfg.mode}: --{' --'.join(sorted(odd))}")


@record
def main(cfg, world):
    cfg = core.with_dtype(cfg, world)
    check_flags(cfg, world)
    if cfg.mode in STAGES:
        if cfg.mode == "pretrain":
            cfg = pretraining(cfg)
        asked = "newest" if cfg.mode == "pretrain" else None
        if cfg.init_from in (asked, "newest"):
            resumes = cfg.resume_timestamp not in (None, "auto")
            base = cfg.init_from if resumes else newest_base(cfg, world)
            typed = core.typed(cfg)  # not counted as typed: a resume keeps its base, whatever is newest then
            cfg = core.with_flags(replace(cfg, init_from=base), typed, typed.flags - {"init_from"})
        with flags_of_stage(cfg):
            if not (run := core.open_run(cfg, world, __file__, unit="tokens")):
                return None
            with run:
                run.result = STAGES[cfg.mode](run, run.cfg, world)
        return run.result

    def say(text):
        if world.is_main:
            print(text, flush=True)

    with core.listening(world) as poll:
        (several if cfg.mode in SEVERAL else quantise_or_export)(cfg, world, say, poll)


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
