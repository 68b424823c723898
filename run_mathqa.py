"""Pretraining for a fixed time, then MathQA: all weights, LoRA, LoHa, LoKr; AdamW, Lion; int4 (journal 004).

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_mathqa.py         # 3 h of text, 1 h of MathQA
    python gpt_scratch.py --preset noam_wide4_effective         # the first stage alone, as the journal ran it
    python run_mathqa.py --mode train --method lora --lr 5e-4 --init_from runs/gpt_scratch/<run>
    python run_mathqa.py --mode study                   # full, Lion, LoRA ...: at equal steps and equal time
    python run_mathqa.py --mode split                   # how to share a fixed time between the two stages
    python run_mathqa.py --mode quantise --run_folder runs/run_mathqa/<run>
    python run_mathqa.py --smoke

The first stage is a run of gpt_scratch.py. --pretrain describes it: one of that script's presets, then
changed constants, as in noam_wide4,max_minutes=90. All other constants are fine-tuning's. Modes both, study
and split make several runs; started again, they continue where they stopped.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import core
import gpt_scratch
from lab.compare import mathqa_report, study
from lab.measure import choices, quantised, tuning
from lab.models import int4, loha_lokr
from lab.train import optim

Mode = Literal["both", "train", "find_lr", "study", "split", "quantise", "export"]
Method = Literal["full", "lora", "dora", "pissa", "loha", "lokr"]


@dataclass(frozen=True)
class Config(core.Bookkeeping):
    # data
    data: str = "kinit/math_qa"  # Hub id, table, template-problems, or folder of train, validation, test
    max_documents: core.Count | None = None  # rows of each part, or of a single table; none = all
    answer_format: Literal["text", "letter"] = "text"  # problem -> option, or problem and options -> letter
    loss_on_prompt: bool = False  # tokens of the problem count in the loss, too; the journal's did
    max_length: core.within(int, 16) = 512  # tokens of a problem and its answer; longer rows are left out
    pack: bool = False  # rows share max_length tokens (none sees another); batch then counts such packs
    split_seed: core.Seed = 42  # draws the held-out rows, whatever --seed is
    # model
    pretrain: str = "noam_wide4"  # the first stage: a preset of gpt_scratch.py, then name=value,...
    init_from: str | None = None  # run, newest, new, GPT-2 or Llama family; none: newest; study: first stage
    init_step: core.Whole | None = None  # a checkpoint of that run; none = the one it was tested with
    method: Method = "full"  # all weights, or adapters on a frozen base; dora, pissa: kinds of lora
    lora_rank: core.Count = 16  # of all kinds of adapter
    lora_alpha: core.within(float, 1e-9) = 32.0  # adapters' outputs are multiplied by lora_alpha / lora_rank
    lora_plus: core.within(float, 1e-3) = 1.0  # LoRA+: B's rate, in multiples of A's
    lora_dropout: core.Share = 0.0  # of LoRA's input
    qat: Literal["off", "int4"] = "off"  # train for int4 weights and int8 activations; with method full
    qat_group: core.within(int, 2) = 256  # weights of a row that share one scale; 32 is finer
    qat_start: core.Share = 0.25  # share of the steps trained in float before int4 begins
    dropout: core.Share = 0.0  # share of activations set to 0 in training
    checkpointing: bool = False  # recompute blocks in the backward: more time, less memory
    # optimisation
    batch: core.Count = 128  # rows (or packs) per optimizer step, over all ranks
    micro_batch: core.Count | None = None  # per forward and rank; none = groups that waste least on padding
    micro_tokens: core.Count = 16384  # upper limit of a group's tokens; less where these do not fit
    group_lengths: bool = True  # rows of similar length meet in a batch
    epochs: core.Whole | None = None  # passes over the training rows
    max_steps: core.Whole | None = None  # the first of these three limits ends training
    max_minutes: core.Amount | None = 60.0  # of training, over resumes
    lr: core.Rate = 5e-5  # peak; adapters want 10 to 40 times it, Lion 1/3 to 1/10
    min_lr: core.Rate = 0.0  # at the end of the schedule
    warmup: core.Share = 0.05  # fraction of all steps
    schedule: core.Schedule = "cosine"  # of the rate, after the warm-up
    cycle_beta1: bool = True  # one_cycle moves beta1 between 0.95 and 0.85, against the rate
    optimizer: core.Optimizer = "adamw"  # muon: adamw's lr; adafactor: little memory, lr relative to weights
    beta1: core.within(float, 0, 0.9999) = 0.9  # of Adam: decay of the gradients' mean
    beta2: core.within(float, 0, 0.9999) = 0.95  # decay of Adam's mean of squares, of Lion's mean (use 0.99)
    weight_decay: core.Rate = 0.1  # of matrices but the token embedding; Lion wants 3 to 10 times as much
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 or fp16 on a GPU, else fp32; fp32 not typed is tf32 on a GPU
    base_dtype: core.BaseDtype = "auto"  # of matrices under adapters; auto: bf16 on a GPU computing in bf16
    seed: core.Seed = 0  # of weights, order and dropout; the first one of a study
    # evaluation and logging
    eval_batch: core.Count = 64  # rows per evaluation step, over all ranks
    eval_every: core.Count | None = 500  # steps; none = each epoch
    eval_rows: core.Count | None = 500  # validation rows looked at during training; none = all
    answer_rows: core.Whole = 200  # validation problems answered then; 0 = none
    sample_tokens: core.Whole = 24  # of each of three sample answers, at most; 0 = none
    test_weights: Literal["best", "last"] = "best"  # lowest validation loss, or the final ones
    save_every: core.Count | None = None  # steps; none = at each evaluation, before it
    log_every: core.Count = 25  # steps
    plain: str | None = None  # text to measure forgetting on; none = what the base read, if known
    plain_blocks: core.Whole = 100  # of that text; 0 = none
    # study
    arms: tuple[str, ...] = ("full", "lion", "lora", "loha", "lokr", "int4")  # all train as long as the first
    seeds: core.Count = 3  # of each arm: seed, seed + 1, ...
    budgets: tuple[str, ...] = ("steps", "time")  # compared at equal steps, at equal time
    shares: tuple[str, ...] = ("0.5", "0.75", "0.9")  # of mode split: pretraining's share of the whole
    max_hours: core.Amount | None = None  # of mode both, study or split; the same line, typed again, goes on
    # run
    mode: Mode = "both"  # train: the second stage; split: a fixed time shared out; export: a Llama folder
    run_folder: str | None = None  # the run that is quantised or exported

    NO_TRAINING = ("quantise", "export")
    READ_BY = core.Bookkeeping.READ_BY | {
        "study split": {"arms", "seeds"},
        "study": {"budgets"},
        "split": {"shares"},
        "both study split": {"max_hours"},
        "both train find_lr study split quantise": {"qat_group", "eval_batch"},
        "quantise export": {"run_folder"},
    }

    def __post_init__(self):
        super().__post_init__()
        if self.epochs is self.max_steps is self.max_minutes is None:
            raise core.UserError("nothing ends fine-tuning: use --max_minutes, --max_steps or --epochs")
        if self.qat != "off" and self.method != "full":
            raise core.UserError(f"--qat int4 trains all weights: use --method full, not {self.method}")
        if self.base_dtype == "bf16" and self.method == "full":
            raise core.UserError("--base_dtype bf16: method full trains all weights, none is frozen: drop it")
        if self.lora_dropout and self.method in ("loha", "lokr"):
            raise core.UserError(f"--lora_dropout {self.lora_dropout:g}: {self.method} has none, use 0")
        if self.lora_plus != 1 and self.method not in loha_lokr.KINDS_OF_LORA:
            raise core.UserError(f"--lora_plus {self.lora_plus:g}: {self.method} has no B, use 1")
        resumes = self.resume_timestamp not in (None, "auto") or self.resume_step is not None
        if self.mode in SEVERAL and resumes:
            flags = "--resume_timestamp, --resume_step"
            raise core.UserError(f"mode {self.mode} continues its runs by itself: drop {flags}")
        if self.init_from == "new" and self.init_step is not None:
            raise core.UserError(f"--init_step {self.init_step}: a new model has no checkpoints, drop it")
        if self.mode in ("both", "split") and self.init_from:
            raise core.UserError(f"--init_from: mode {self.mode} pretrains first, use train or study")


SEVERAL = ("both", "study", "split")  # modes that make several runs
SHARED = ("dtype", "compile", "shard", "skip_spikes", "keep", "log_every", "note", "price_per_hour")
SHARED += ("backend", "out", "profile")
# The journal's rows were padded to 1,024 tokens and cut into two windows of 512, the second one mostly
# nothing but padding: its batch of 256 windows is our batch of 128 rows. It validated on the test part; we do
# not. What is not named here is as in Config.
SECOND_STAGE_FULL = {
    "mode": "train",
    "loss_on_prompt": True,
    "group_lengths": False,
    "lr": 5e-6,
    "min_lr": 5e-7,
    "test_weights": "last",
    "eval_rows": 1536,
    "compile": True,
}
PRESETS = {  # the last six are arms of a study, with rates that suit each kind of tuning
    "recommended": {},
    "second_stage_full": SECOND_STAGE_FULL,
    # of github.com/huggingface/alignment-handbook, whose constants of LoRA the journal took over
    "alignment_handbook": {"method": "lora", "lora_alpha": 16.0, "lora_dropout": 0.05, "lr": 2e-4},
    "full": {},
    "lion": {"optimizer": "lion", "lr": 1e-5, "weight_decay": 1.0, "beta2": 0.99},
    "lora": {"method": "lora", "lr": 5e-4},
    "loha": {"method": "loha", "lr": 5e-4},
    "lokr": {"method": "lokr", "lr": 2e-3},
    "int4": {"qat": "int4"},
}
SMOKE = {
    "mode": lambda mode: "study" if mode == "both" else mode,
    "data": "template-problems",
    "max_documents": 3000,
    "pretrain": "noam_wide4,max_documents=400,tokenizer=bpe:1024,block_size=64,vocab_multiple=32,"
    "max_steps=120,eval_every=60,eval_rows=100",
    "max_length": 64,
    "qat_group": 32,
    "batch": 36,
    "max_minutes": None,
    "max_steps": 200,
    "lr": lambda lr: 80 * lr,
    "min_lr": lambda lr: 80 * lr,
    "warmup": 0.1,
    "compile": False,
    "eval_every": 100,
    "eval_rows": 100,
    "answer_rows": 50,
    "plain_blocks": 20,
    "seeds": 1,
    "budgets": ("steps",),
    "arms": ("full", "lora,lr=3e-3", "loha,lr=1e-2", "lokr,lr=3e-2", "int4"),
}


# -------------------------------------------------------------------------------------------------- the base


def first_stage(cfg, world) -> tuple[study.Plan, study.Arm]:
    """The run of gpt_scratch.py that --pretrain describes: (how to start it, its constants but the seed)."""
    typed = cfg.typed
    argv = ["--smoke"] * typed.smoke
    for name in sorted(typed.flags & {*SHARED}):
        argv += study.as_flags(name, getattr(cfg, name))
    script = gpt_scratch.Config, gpt_scratch.PRESETS, gpt_scratch.SMOKE
    of_call = core.parsed_config(*script, "", argv)
    plan = study.Plan(of_call, world, gpt_scratch.__file__, *script, gpt_scratch.main)
    return plan, study.arm_of(plan, cfg.pretrain, "--pretrain", "pretrain")


def open_base(cfg, world):
    """(model, tokenizer) that fine-tuning starts from. UserError where they do not fit cfg or each other."""
    if cfg.init_from != "new":
        how = cfg.dropout, cfg.checkpointing, cfg.init_step, "--init_from"
        model, tokenizer = core.main_first(world, core.open_model, cfg.init_from, *how)
    else:
        first = first_stage(cfg, world)[1].cfg
        tokens, _ = gpt_scratch.open_text(first, world)
        core.reseed(cfg.seed, "init")
        shaped = replace(first, dropout=cfg.dropout, checkpointing=cfg.checkpointing)
        model, tokenizer = gpt_scratch.build_model(shaped, tokens, world), tokens.tokenizer
    check_context(cfg, model)
    return model, tokenizer


def check_context(cfg, model):
    """UserError where rows are longer than the model's context."""
    if cfg.max_length > (most := model.config.block_size):
        name = cfg.init_from or "--pretrain"
        raise core.UserError(f"--max_length {cfg.max_length} is over the {most} positions of {name}")


def tuned(cfg, base, world):
    """Adds adapters or fake quantisation. Returns (the model to train, what a checkpoint holds of it)."""
    core.reseed(cfg.seed, "adapters")
    if cfg.method != "full":
        loha_lokr.add_adapters(base, cfg.method, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    if cfg.qat != "off":
        int4.insert_fake_quant(base, cfg.qat_group)
    model = core.Precision(cfg.dtype, world).cast(base)
    return model, model if cfg.method == "full" else core.Adapters(model)


def base_text(cfg, world):
    """(constants of gpt_scratch.py, tokens) of the text that the base has read, where that is known."""
    if cfg.init_from == "new":
        first = first_stage(cfg, world)[1].cfg
        return first, gpt_scratch.open_text(first, world)[0]
    if core.is_run(cfg.init_from) and core.script_of(cfg.init_from) == "gpt_scratch":
        first = core.stored_config(cfg.init_from, gpt_scratch.Config, gpt_scratch.__file__)
        tokens = core.open_corpus(gpt_scratch.corpus_of(first), world)
        known = core.read_config(cfg.init_from)["facts"]["fingerprint"]
        core.refuse_other_data(known, tokens.fingerprint, first.data, ("data", "tokenizer"))
        return first, tokens
    return None, None


def plain_text(cfg, tokenizer, block_size, world) -> tuple[str, core.Blocks | None]:
    """(name of the text, held-out blocks) to measure forgetting: cfg.plain, the base's, or python-docs."""
    if not cfg.plain_blocks:
        return "", None
    first, tokens = (None, None) if cfg.plain else base_text(cfg, world)
    if first:
        part = "test" if first.test_share else "val"
        return first.data, core.Blocks(tokens.parts[part], block_size).first(cfg.plain_blocks)
    name, most = cfg.plain or "python-docs", (min(block_size, cfg.max_length), cfg.plain_blocks)
    try:
        return name, core.main_first(world, tuning.plain_blocks, core.Corpus(name, ""), tokenizer, *most)
    except core.UserError as error:
        raise core.UserError(f"--plain: {error}") from None


# -------------------------------------------------------------------------------------------------- training


def train(run, cfg, world) -> dict:
    """Tunes the base on problems and measures it on held-out ones. Returns the final figures."""
    # data: a problem and its right option become token ids, cached; the loss sees the option
    base, tokenizer = open_base(cfg, world)
    data = core.load_problems(cfg, world, tokenizer)
    run.pin("fingerprint", data.fingerprint)  # a resume that finds other rows is refused
    parts, lines = choices.examples_of(data, cfg)
    units = core.Packs(parts["train"], cfg.max_length) if cfg.pack else parts["train"]
    block = 50 if cfg.group_lengths else 1  # rows of 50 batches are sorted by length, the batches shuffled
    batches = core.ShardedBatches(units.lengths, cfg.batch, world, seed=cfg.seed, block=block)
    total_steps = core.count_steps(cfg, batches)
    text, plain = plain_text(cfg, tokenizer, base.config.block_size, world)

    # model: all weights are trained, or adapters alone, which are then all that a checkpoint holds
    model, trained = tuned(cfg, base, world)
    base_sha256, held_sha256 = tuning.hold_base(run, cfg, model, world)  # in cfg.base_dtype, on the device
    precision, optimizer = core.Precision(cfg.dtype, world), make_optimizer(cfg, model)
    choices.announce(run, cfg, data, parts, units, lines, model, total_steps)
    saved = trained, optimizer, precision
    compiled = model.h if cfg.compile else ()
    ddp = core.wrap_ddp(model, world, compiled, shard=cfg.shard, optimizer=optimizer)
    run.load(*saved)  # a resumed run's checkpoint; a new run has none
    core.on_main(world, keep_for_later, run.folder, cfg, model, tokenizer)
    micro_batches = core.MicroBatches(run, ddp, units.batch, units.lengths)

    def forward_backward(rows, targets) -> list:
        """Adds gradients of (this rank's loss sum / targets of all ranks). Returns the sum's parts."""
        losses = []
        for _, batch in micro_batches(rows):  # _: the numbers of its rows
            with precision.autocast():
                losses.append(ddp(*batch))  # cross-entropy, summed over targets
            core.scaled_backward(losses[-1], world, targets, precision)  # x world.size: DDP averages
        return [loss.detach() for loss in losses]  # read later, with the norm

    int4.switch(model, True)  # for the trial below: int4 steps are the slower ones, so forecast those
    # two forwards and backwards of the longest rows: is there memory? Then the forecast of hours
    core.rehearse(run, micro_batches, saved, forward_backward, batches, total_steps - run.step)
    run.say(tuning.describe_example(parts["train"]))
    if cfg.mode == "find_lr":
        beta1 = core.beta1_at(cfg, 0, cfg.find_steps)
        return core.find_lr(run, batches, units.targets, saved, forward_backward, beta1)
    int4_if_due(run, cfg, model, run.step, run.clock.schedule_length(run.step, total_steps))

    # core.steps draws batches from seed and step alone, saves before evaluating, stops all ranks together
    for at in core.steps(run, batches, units.targets, saved, total_steps, evaluate_first=True):
        if at.evaluates:
            if at.ends:  # max_minutes may end a run before qat_start: its final model is int4 even so
                int4_if_due(run, cfg, model, at.step, length=0)
            validate(run, cfg, model, parts["val"], plain, batches, at)
            continue
        lr, beta1 = (rate(cfg, at.step, at.schedule_length) for rate in (core.lr_at, core.beta1_at))
        losses = forward_backward(at.rows, at.targets)
        norm = core.gradient_norm(optimizer, precision)  # of the global batch, not clipped yet
        if at.spiked(losses, norm) and world.is_main:  # spiked() asks all ranks, so it stands first
            rows = tuning.spike_rows(cfg, model, parts["train"], units.members(at.batch), world)
            at.note_spike(model, {"lr": lr, **tuning.batch_facts(units, at.batch), **rows})
        at.update(optimizer, precision, lr, beta1=beta1)  # clips, updates, zeroes the gradients, logs
        int4_if_due(run, cfg, model, at.step + 1, run.clock.schedule_length(at.step + 1, total_steps))
    int4_if_due(run, cfg, model, run.step, length=0)
    if cfg.method != "full":
        tuning.require_same_base(run, model, held_sha256)
    named = replace(cfg, plain=Path(text).name)
    return finish(run, named, data, parts, plain, model, trained, optimizer) | {"base_sha256": base_sha256}


def make_optimizer(cfg, model):
    """The optimizer of the trained parameters, after adapters and fake quantisation are in place."""
    rates = core.rate_factors(model, cfg.lora_plus)
    how = {"betas": (cfg.beta1, cfg.beta2), "scales": rates, "undecayed": ("wte.weight",)}
    return core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, **how)


def keep_for_later(folder, cfg, model, tokenizer):
    """Writes tokenizer/; for method full gpt.json, too: its model is built from the run alone."""
    if cfg.method == "full":
        gpt_scratch.describe_model(folder, model, tokenizer)
    else:
        tokenizer.save_pretrained(folder / "tokenizer")


def int4_if_due(run, cfg, model, step, length):
    """Switches fake quantisation on from step qat_start x length on, for good; off before."""
    if cfg.qat != "off" and "quantised_from" not in run.state and step >= cfg.qat_start * length:
        run.state["quantised_from"] = step
        for name in ("lowest", "evaluated"):  # both are of the float model: start anew
            run.state.pop(name, None)
        run.say(f"step {step}: int4 weights and int8 activations from here on")
    int4.switch(model, "quantised_from" in run.state)


def validate(run, cfg, model, rows, plain, batches, at):
    """Loss and answers on validation rows, best weights, a few generated answers; plain text at step 0."""
    if at.step == 0 and plain:
        run.state["plain"] = tuning.plain_losses(run, cfg, plain, model, at.poll).tolist()
    data, world, val = rows.data, run.world, rows.some(cfg.eval_rows)
    sums = core.evaluate(model, val, cfg, world, at.poll)
    metrics = core.language_metrics(sums, data.groups[val.rows])
    is_record = cfg.qat == "off" or "quantised_from" in run.state  # best of int4, with qat
    is_best = is_record and at.keep_if_best(metrics["loss"])
    tuning.report_validation(run, at, metrics, is_best, len(batches))
    asked = choices.some(rows.rows, cfg.answer_rows)
    if len(asked):
        scores = choices.Scores.of(model, choices.Choices(data, asked), cfg, world, at.poll)
        share = scores.right(data, asked).mean(0).tolist()
        run.say(f"{at.where}  val  right {share[0]:.3f}, by loss per token {share[1]:.3f}, of {len(asked)}")
        run.metrics(at.step, {"val/answer_accuracy": share[0], "val/answer_accuracy_per_token": share[1]})
        choices.sample(run, cfg, at, model, data, asked[:3])


def finish(run, cfg, data, parts, plain, model, trained, optimizer) -> dict:
    """Hash of the last weights; then figures of the chosen ones on val and test rows, answers, forgetting."""
    facts = {"weights_sha256": core.weights_sha256(trained), "test_checkpoints": [run.checkpoint]}
    facts |= {"steps": run.step, "state_mb": optim.state_megabytes(optimizer)}
    facts["parameters"], facts["trainable_parameters"] = core.count_parameters(model)
    optimizer.zero_grad(set_to_none=True)  # makes room for measuring
    optimizer.state.clear()
    if cfg.test_weights == "best":
        facts["test_checkpoints"] = [run.load_best(trained)]
    return facts | choices.final_figures(run, cfg, data, parts, plain, model)


# ------------------------------------------------------------------------------------- a run, from its folder


def stored_config(folder) -> Config:
    """The constants of a run of this script. UserError for a pretraining run that an older version made."""
    stored = core.read_config(folder)
    if stored["constants"].get("mode") == "pretrain":
        raise core.UserError(f"{folder} is an older version's pretraining run: only --init_from can read it")
    cfg = core.stored_config(folder, Config, __file__)
    return core.counting(cfg, smoke=stored["smoke"])


def load_model(folder, world, base_dtype=None):
    """(Config, model, tokenizer) of a run as it was tested, fake-quantised as in training. The base has
    the run's base_dtype, unless another is given."""
    cfg = stored_config(folder)
    if cfg.method == "full":  # the base is in the folder
        base, tokenizer = core.open_model(folder)
        model, _ = tuned(cfg, base, world)
        int4.switch(model, True)
        return cfg, model.to(world.device).eval(), tokenizer
    base, tokenizer = open_base(cfg, world)
    model, trained = tuned(cfg, base, world)
    if core.state_sha256(core.base_weights(model)) != core.read_config(folder)["facts"].get("base_sha256"):
        raise core.UserError(f"--init_from {cfg.init_from} is not the model that {folder} was trained on")
    core.narrow_base(model, base_dtype or cfg.base_dtype).to(world.device)
    core.load_weights(Path(folder) / "checkpoints" / core.tested_or_newest_checkpoint(folder), trained)
    return cfg, model.eval(), tokenizer


def own_rows(folder, cfg, tokenizer, world):
    """(problems, parts) of a run. UserError if the data has changed."""
    data = core.load_problems(cfg, world, tokenizer)
    core.refuse_other_data(core.read_config(folder)["facts"]["fingerprint"], data.fingerprint, cfg.data)
    return data, choices.examples_of(data, cfg)[0]


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, dict[str, list]]:
    """Measures a run's own val and test data again. Returns (figures, file name -> its lines)."""
    cfg, model, tokenizer = load_model(folder, world)
    cfg, rows = replace(cfg, eval_batch=eval_batch or cfg.eval_batch), own_rows(folder, cfg, tokenizer, world)
    figures, losses, lines = choices.measure_parts(model, *rows, cfg, world, poll)
    return figures, {"losses.jsonl": losses, "answers.jsonl": lines}


def merged(model) -> core.GPT:
    """A plain float GPT of a trained model: adapters merged, fake quantisation removed."""
    return core.merge_lora(model)  # which has nothing to merge where there are none


# -------------------------------------------------------------------------------------------- int4 and export


def say(world, text):
    if world.is_main:
        print(text, flush=True)


def quantise_run(folder, cfg, world, poll) -> dict:
    """Writes <run>/quantised_<group>/, loads it again and measures it beside the float weights, unless that
    was done before. Returns {"float": figures, "int4": figures, ...}."""
    own, model, tokenizer = load_model(folder, world, "fp32")
    group = own.qat_group if own.qat != "off" else cfg.qat_group  # the one it was trained for
    model, target = merged(model).eval(), Path(folder) / f"quantised_{group}"
    if known := core.on_main(world, quantised.known_figures, target, core.weights_sha256(model)):
        return known
    own = replace(own, eval_batch=cfg.eval_batch)
    rows = own_rows(folder, own, tokenizer, world)
    return quantised.beside_float(model, group, target, *rows, own, world, poll)


def quantise(cfg, world, poll):
    """Mode quantise."""
    result = quantise_run(cfg.run_folder, cfg, world, poll)
    figures, folder = {Path(cfg.run_folder).name: [result]}, f"{cfg.run_folder}/quantised_{result['group']}"
    say(world, mathqa_report.quantised_table(figures))
    say(world, "\n".join(mathqa_report.small_verdicts(figures)))
    say(world, f"done  {folder}\nnext: python eval.py --run {folder} --data <text or rows>")


def export(cfg, world, poll):
    """Mode export: <run>/merged/, a Llama folder."""
    _, model, tokenizer = load_model(cfg.run_folder, world, "fp32")
    folder = Path(cfg.run_folder) / "merged"
    core.on_main(world, write_merged, merged(model), tokenizer, folder)
    say(world, f"written: {folder}\nnext: python gpt_scratch.py --mode generate --model {folder}")


def write_merged(model, tokenizer, folder):
    with core.whole_folder(folder, replace=True) as aside:
        core.save_pretrained(model, tokenizer, aside)


# ---------------------------------------------------------------------------------------------- several runs

OF_A_STUDY = frozenset({"budgets", "shares", "pretrain"})  # read by no fine-tuning run
ARM_MAY = frozenset({  # constants that may differ between arms: the method, but not rows, base or length
    "method", "base_dtype", "lr", "min_lr", "warmup", "schedule", "wsd_decay", "cycle_beta1", "optimizer",
    "beta1", "beta2", "weight_decay", "clip", "dropout", "lora_rank", "lora_alpha", "lora_plus",
    "lora_dropout", "qat", "qat_group", "qat_start",
})  # fmt: skip


@dataclass
class Stages:
    """What the runs of modes both, study and split share: how runs of either stage are made."""

    text: study.Plan  # of gpt_scratch.py
    pretraining: study.Arm
    rows: study.Plan  # of this script
    arms: list[study.Arm]
    poll: object  # () -> None: raises Stop after a signal

    def pretrained(self, seed, length=None) -> Path:
        """The first stage's run with this seed. length: max_steps or max_minutes in place of its own."""
        return self.made(self.text, study.run_config(self.pretraining, seed, length))

    def tuned(self, arm, seed, base, length=None) -> Path:
        """The run of an arm on this base. length: max_steps or max_minutes in place of its own."""
        changes = {"init_from": str(base)} | (length or {})
        return self.made(self.rows, study.run_config(arm, seed, changes))

    def made(self, plan, cfg) -> Path:
        folder = study.one_run(plan, cfg)
        self.poll()
        return Path(folder)


def both(stages):
    """Mode both: pretraining, then fine-tuning of its model."""
    base = stages.pretrained(seed := stages.rows.cfg.seed)
    folder = stages.tuned(stages.arms[0], seed, base)
    stages.rows.say(f"both stages are done\n  {base}\n  {folder}")


def compare_arms(stages):
    """Mode study: all arms and seeds at equal steps and equal time; then int4 of the first and qat arms."""
    cfg, world, runs, (first, *others) = stages.rows.cfg, stages.rows.world, {}, stages.arms
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        base = cfg.init_from or stages.pretrained(seed)
        folder = stages.tuned(first, seed, base)
        length = core.on_main(world, mathqa_report.length, folder)
        for budget in cfg.budgets:
            equal = {"max_minutes": None, "max_steps": length["steps"], "epochs": None}
            if budget == "time":
                equal |= {"max_minutes": length["seconds"] / 60, "max_steps": None}
            arm_runs = runs.setdefault(budget, {})
            arm_runs.setdefault(first.name, []).append(folder)
            for arm in others:
                arm_runs.setdefault(arm.name, []).append(stages.tuned(arm, seed, base, equal))
    small = {
        arm.name: [quantise_run(folder, cfg, world, stages.poll) for folder in runs[cfg.budgets[0]][arm.name]]
        for arm in (first, *(arm for arm in others if arm.cfg.qat != "off"))
    }
    core.on_main(world, conclude, stages, runs, small)


def split_budget(cfg, first) -> tuple[str, list]:
    """(max_minutes or max_steps, its values of both stages). UserError unless it alone bounds both stages."""
    for unit, other in (("max_minutes", "max_steps"), ("max_steps", "max_minutes")):
        total, others = ([getattr(each, name) for each in (first, cfg)] for name in (unit, other))
        if None not in total and others == [None, None] and cfg.epochs is first.epochs is None:
            return unit, total
    raise core.UserError(
        "mode split shares out minutes or steps: bound both stages by one of them alone, e.g. --pretrain "
        "noam_wide4,max_minutes=none,max_steps=900 --max_minutes none --max_steps 300"
    )


def split(stages):
    """Mode split: the first arm after each share of pretraining; both stages together have a fixed length."""
    cfg, runs = stages.rows.cfg, {}
    unit, total = split_budget(cfg, stages.pretraining.cfg)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for share in cfg.shares:
            first = float(share) * sum(total)
            first = round(first) if unit == "max_steps" else first
            base = stages.pretrained(seed, {unit: first})
            folder = stages.tuned(stages.arms[0], seed, base, {unit: sum(total) - first})
            runs.setdefault(f"{float(share):.4g} pretraining", []).append(folder)
    title = f"total {unit.removeprefix('max_')} {sum(total):g}"
    core.on_main(stages.rows.world, conclude, stages, {title: runs}, {})


def conclude(stages, runs, small):
    """Rank 0: writes study.md and study.json, and prints the tables. runs: budget -> arm -> folders."""
    cfg, arms = stages.rows.cfg, (stages.pretraining, *stages.arms)
    shares = cfg.shares if cfg.mode == "split" else ()
    mark = core.short_hash([[arm.cfg.tag for arm in arms], cfg.init_from, list(runs), shares], 6)
    folder = core.out_folder(cfg, stages.rows.script) / f"{cfg.mode}-{mark}"
    stages.rows.say(f"\n{mathqa_report.write(folder, runs, small, cfg)}\n\ndone  tables: {folder}/study.md")
    stages.rows.say(f"next: python eval.py --table {folder.parent}")


def several(cfg, world):
    """Modes both, study and split. Checks everything before the first step."""
    check_words(cfg)
    if cfg.init_from == "newest":
        raise core.UserError("--init_from newest may be another run on resuming: name its folder")
    unread = OF_A_STUDY - ({"pretrain"} if cfg.init_from == "new" else set())
    plan = study.Plan(cfg, world, __file__, Config, PRESETS, SMOKE, main, ARM_MAY, unread)
    if cfg.mode == "both":
        arms = [study.arm_of(plan, "", called=cfg.method)]
    else:
        arms = study.different(plan, cfg.arms)
    with study.continued(plan) as poll:
        stages = Stages(*first_stage(cfg, world), plan, arms, poll)
        for line in core.override_lines(cfg):
            plan.say(line)
        check_stages(stages)
        for line in forecast(stages):
            plan.say(line)
        {"both": both, "study": compare_arms, "split": split}[cfg.mode](stages)


def check_words(cfg):
    """UserError for --budgets and --shares that are invalid or repeated."""
    if not set(cfg.budgets) <= {"steps", "time"} or len(set(cfg.budgets)) < len(cfg.budgets):
        raise core.UserError(f"--budgets {' '.join(cfg.budgets)}: use steps, time or steps time")
    try:
        shares = {f"{float(share):.4g}" for share in cfg.shares if 0 < float(share) < 1}
    except ValueError:
        shares = ()
    if len(shares) < len(cfg.shares):
        raise core.UserError(f"--shares {' '.join(cfg.shares)}: use different numbers between 0 and 1")


def check_stages(stages):
    """Opens text and rows of both stages and checks the model's shape, so that a mistake of the second stage
    does not wait for the end of the first."""
    cfg, world, first = stages.rows.cfg, stages.rows.world, stages.pretraining.cfg
    if cfg.mode == "split":
        split_budget(cfg, first)
    if min(cfg.batch, first.batch) < world.size:
        raise core.UserError(f"--batch (or --pretrain's batch) is less than the {world.size} ranks: use more")
    if cfg.init_from:
        base, tokenizer = open_base(cfg, world)
    else:
        tokens, _ = gpt_scratch.open_text(first, world)
        tokenizer = tokens.tokenizer
        with torch.device("meta" if first.model == "new" else "cpu"):
            base = gpt_scratch.build_model(first, tokens, world)
        check_context(cfg, base)
    parts, _ = choices.examples_of(core.load_problems(cfg, world, tokenizer), cfg)
    if len(parts["train"]) < cfg.batch and not cfg.pack:
        rows = len(parts["train"])
        raise core.UserError(f"--batch {cfg.batch} is more than the {rows} training rows: use less")
    for number, arm in enumerate(stages.arms):
        if arm.cfg.qat != "off" or (cfg.mode == "study" and number == 0):
            try:
                int4.linear_layers(base, arm.cfg.qat_group)
            except core.UserError as error:
                too = " (a study measures its first arm in int4, too)" if arm.cfg.qat == "off" else ""
                raise core.UserError(f"{error}{too}") from None


def forecast(stages) -> list[str]:
    """A line on how many runs a study makes, about how long they train, and the cost."""
    cfg, first = stages.rows.cfg, stages.pretraining.cfg
    if cfg.mode == "both":
        return []
    firsts, tunings = int(not cfg.init_from), 1 + (len(cfg.arms) - 1) * len(cfg.budgets)
    if cfg.mode == "split":
        firsts = tunings = len(cfg.shares)
    line = f"{cfg.mode}  {cfg.seeds} x ({firsts} pretraining + {tunings} tuning) runs"
    if first.max_minutes is None or cfg.max_minutes is None:
        return [line]
    hours = cfg.seeds * (firsts * first.max_minutes + tunings * cfg.max_minutes) / 60
    cost = f", ${hours * cfg.price_per_hour:.2f}" if cfg.price_per_hour else ""
    return [f"{line}, about {hours:.1f} h of training{cost}"]


# ------------------------------------------------------------------------------------------------------ main


def check_flags(cfg):
    """UserError for typed flags that do not go together."""
    has_first = cfg.init_from == "new" or (not cfg.init_from and cfg.mode in SEVERAL)
    if "pretrain" in cfg.typed.flags and not has_first:
        what = f"--init_from {cfg.init_from}" if cfg.init_from else f"--mode {cfg.mode}"
        raise core.UserError(f"--pretrain describes a first stage, and {what} has none: drop it")
    if cfg.mode in ("quantise", "export") and not cfg.run_folder:
        raise core.UserError(f"--mode {cfg.mode} needs --run_folder")


@record
def main(cfg, world):
    check_flags(cfg)
    if cfg.mode in SEVERAL:
        return several(cfg, world)
    if cfg.mode in ("quantise", "export"):
        with core.listening(world) as poll:
            return (quantise if cfg.mode == "quantise" else export)(cfg, world, poll)
    cfg = core.with_dtype(cfg, world)
    if cfg.init_from in (None, "newest"):
        cfg = gpt_scratch.with_newest(cfg, world, "init_from")
    if not (run := core.open_run(cfg, world, __file__, unit="tokens")):
        return None
    with run:
        run.result = train(run, run.cfg, world)
    return run.result


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
