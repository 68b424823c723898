"""Alpaca instruction tuning of GPT-2 by hand-written LoRA (journal 001, run_10 to run_19).

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_lora.py
    python run_lora.py --preset run_15 --resume_timestamp auto               # its batch of 4 is for one GPU
    python run_lora.py --preset run_15 --lora_scaling alpha/r --lora_init fan_in --tag run_15_today
    python run_lora.py --mode export --run_folder runs/run_lora/20261122_101500
    python run_lora.py --smoke

The base is frozen; a checkpoint holds the adapters and their optimizer only. --data as in
run_instruct.py. Each run is a folder under runs/run_lora/; mode export writes peft/ (adapters for peft) and
merged/ (a GPT-2 that transformers and gpt_scratch.py load) into it.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch.distributed.elastic.multiprocessing.errors import record

import core
from lab.data import templates
from lab.measure import answers, tuning
from lab.models import lora, lora_peft


@dataclass(frozen=True)
class Config(core.Studied):
    # data
    data: str = "tatsu-lab/alpaca"  # Hub id, file, folder, or python-instructions (built in)
    max_documents: core.Count | None = None  # rows read; none = all
    template: Literal["alpaca", "journal", "chat"] = "alpaca"  # two preambles, one; chat: the model's own
    split: Literal["seeded", "file_order"] = "seeded"  # 85/10/5 train/test/val; seeded: at random, by prompt
    split_seed: core.Seed = 42  # draws the parts, whatever --seed is
    max_length: core.within(int, 16) = 512  # tokens of a row; what is over is cut, from the end of the answer
    loss_on_prompt: bool = False  # prompt tokens count in the loss, too
    pack: bool = False  # rows share max_length tokens (none sees another); batch then counts such packs
    # model
    model: str = "gpt2-medium"  # Hub id, folder, run of gpt_scratch.py, or tiny:gpt2 or tiny:llama
    tie_head: bool = True  # the output matrix is the embedding; the journal trained a copy apart
    lora_rank: core.Count = 16  # columns of B and rows of A
    lora_alpha: core.within(float, 1e-9) = 16.0  # the multiplier follows from it, as lora_scaling says
    lora_rank_pattern: str | None = None  # other ranks of some layers, as in attn.c_attn=8,h.0.mlp=32
    lora_alpha_pattern: str | None = None  # other alphas, likewise
    lora_scaling: Literal["alpha/r", "alpha", "alpha/sqrt(r)"] = "alpha/r"  # multiplier of B A x
    lora_init: Literal["fan_in", "rank", "pissa"] = "fan_in"  # A within ±1 / sqrt(fan_in or rank), or by SVD
    lora_dora: bool = False  # DoRA: trains the length of each row of a matrix apart from its direction
    lora_plus: core.within(float, 1e-3) = 1.0  # LoRA+: B's rate, in multiples of A's
    lora_dropout: core.Share = 0.0  # of an adapter's input
    lora_targets: str = "all"  # in the blocks: all, attention, mlp, or some of q,k,v,o,gate,up,down
    lora_head: bool = False  # the output matrix too; needs --no-tie_head
    lora_layers: core.Whole | None = None  # only this many of the last blocks; none = all
    adapter: str | None = None  # a peft folder to continue from: rank, alpha, targets are then its own
    dropout: core.Share = 0.0  # in the model
    checkpointing: bool = False  # recompute blocks in the backward: more time, less memory (for gpt2-xl)
    # optimisation
    batch: core.Count = 128  # rows (or packs) per optimizer step, over all ranks
    micro_batch: core.Count | None = None  # rows per forward and rank; none = groups with the least padding
    micro_tokens: core.Count = 8192  # upper limit of a group's tokens; less where these do not fit
    group_lengths: bool = True  # rows of similar length meet in a batch; the journal's met by chance
    epochs: core.Whole = 3  # passes over the training rows
    max_steps: core.Whole | None = None  # optimizer steps
    max_minutes: core.Amount | None = None  # of training, over resumes
    lr: core.Rate = 5e-4  # peak; about ten times that of full tuning
    min_lr: core.Rate = 0.0  # at the end of the schedule
    warmup: core.Share = 0.05  # fraction of all steps
    schedule: core.Schedule = "cosine"  # of the rate, after the warm-up
    optimizer: core.Optimizer = "adamw"  # muon: adamw's lr; adafactor: little memory, lr relative to weights
    weight_decay: core.Rate = 0.0  # of A and B
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 or fp16 on a GPU, else fp32
    base_dtype: core.BaseDtype = "auto"  # of the frozen matrices; auto: bf16 on a GPU that computes in bf16
    seed: core.Seed = 0  # of order, dropout and fresh weights
    # evaluation and logging
    eval_batch: core.Count = 32  # rows per evaluation step, over all ranks; answers: rows per rank
    eval_every: core.Count | None = 100  # steps; none = each epoch
    eval_rows: core.Count | None = 500  # validation rows looked at during training, spread evenly; none = all
    test_weights: Literal["best", "last"] = "best"  # lowest validation loss, or the final ones
    save_every: core.Count | None = None  # steps; none = at each evaluation, before it
    log_every: core.Count = 25  # steps
    # answers and forgetting
    sample_tokens: core.Whole = 50  # limit of an answer to a fixed prompt, at evaluations; 0: no answers
    answer_rows: core.Whole | None = None  # test rows answered at the end; none = all rows, 0 = no row
    max_new_tokens: core.Count = 256  # limit of such an answer, and of one in mode ask
    plain: str | None = None  # text for forgetting; none = held-out text of the base's run, else python-docs
    plain_blocks: core.Whole = 50  # of max_length tokens; 0 = none
    prompt: str | None = None  # in mode ask: an instruction; none = a prompt loop
    # run
    mode: Literal["train", "find_lr", "study", "ask", "export"] = "train"  # export: writes peft/, merged/
    run_folder: str | None = None  # the one that is asked, or that export writes into; none = the newest

    NO_TRAINING = ("ask", "export")
    READ_BY = core.Studied.READ_BY | {
        "ask": {"prompt"},
        "ask export": {"run_folder"},
        "train find_lr study ask": {"max_new_tokens"},
    }

    def __post_init__(self):
        super().__post_init__()
        lora.target_names(self.lora_targets)
        of_optimizer = {"lora_plus", "lora_dropout"}
        own = {name for name in core.names_of(Config) if name.startswith("lora_")} - of_optimizer
        if self.adapter and (typed := sorted(own & self.typed.flags)):
            raise core.UserError(f"--adapter brings its own {', '.join(typed)}: drop these flags")


# Some 12,000 training rows. LoRA's multiplier and A's first values are as in the journal's code. We differ
# from it in one thing: it clipped gradients only after the warm-up.
JOURNAL = {
    "max_documents": 14_118,
    "template": "journal",
    "split": "file_order",
    "max_length": 1024,
    "group_lengths": False,
    "loss_on_prompt": True,
    "tie_head": False,
    "lora_head": True,
    "lora_scaling": "alpha",
    "lora_init": "rank",
    "model": "gpt2-medium",
    "epochs": 1,
    "lr": 5e-5,
    "min_lr": 1e-5,
    "warmup": 0.2,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "clip": 1.0,
    "eval_every": 25,
    "eval_rows": 20,
    "log_every": 25,
    "save_every": 1000,
    "test_weights": "last",
}
PRESETS = {
    "recommended": {},
    "run_10": JOURNAL | {"batch": 2, "lora_rank": 16, "lora_alpha": 16.0},
    "run_11": JOURNAL | {"batch": 2, "lora_rank": 16, "lora_alpha": 16.0, "model": "gpt2-large"},
    "run_12": JOURNAL | {"batch": 4, "lora_rank": 16, "lora_alpha": 16.0},
    "run_13": JOURNAL | {"batch": 2, "lora_rank": 16, "lora_alpha": 32.0},
    "run_14": JOURNAL | {"batch": 2, "lora_rank": 32, "lora_alpha": 32.0},
    "run_15": JOURNAL | {"batch": 4, "lora_rank": 64, "lora_alpha": 64.0},
    "run_16": JOURNAL | {"batch": 4, "lora_rank": 64, "lora_alpha": 64.0, "lr": 2.5e-5, "warmup": 0.3},
    "run_17": JOURNAL | {"batch": 4, "lora_rank": 64, "lora_alpha": 64.0, "lr": 3e-5, "warmup": 0.0},
    "run_18": JOURNAL | {"batch": 4, "lora_rank": 64, "lora_alpha": 64.0, "lr": 1e-4, "warmup": 0.0},
    "run_19": JOURNAL | {"batch": 4, "lora_rank": 16, "lora_alpha": 16.0, "epochs": 2},
}
SMOKE = {
    "data": "python-instructions",
    "max_documents": None,
    "model": "tiny:gpt2",
    "max_length": 128,
    "batch": 24,
    "epochs": 12,
    "tie_head": False,
    "lora_head": True,
    "lr": lambda lr: 20 * lr,  # a tiny random base needs more; one factor for all presets
    "dtype": "auto",
    "eval_every": 100,
    "eval_rows": None,
    "save_every": None,
    "sample_tokens": 12,
    "max_new_tokens": 24,
    "plain_blocks": 10,
}


def build_model(cfg, tokenizer, world, folder):
    """The pretrained GPT, frozen, with new adapters or those of cfg.adapter (of which a run keeps a copy)."""
    model, kept = core.build_model(cfg, tokenizer, world), Path(folder) / "adapter"
    if cfg.adapter:
        lora_peft.load_peft(model, kept if kept.exists() else cfg.adapter, cfg.lora_dropout)
    else:
        core.add_lora(
            model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_scaling, cfg.lora_dropout, cfg.lora_targets,
            cfg.lora_head, cfg.lora_layers, cfg.lora_init, dora=cfg.lora_dora,
            rank_pattern=cfg.lora_rank_pattern, alpha_pattern=cfg.lora_alpha_pattern,
        )  # fmt: skip
    return model


def make_optimizer(cfg, model):
    """The optimizer of the adapters; with LoRA+ their B has a rate of its own."""
    rates = core.rate_factors(model, cfg.lora_plus)
    return core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, scales=rates)


def keep_for_later(folder, cfg, tokenizer):
    """Writes tokenizer/ and, with --adapter, adapter/ (its copy). From these and the base that cfg names the
    model can be built again."""
    tokenizer.save_pretrained(folder / "tokenizer")
    if cfg.adapter and not (folder / "adapter").exists():
        with core.whole_folder(folder / "adapter") as aside:
            for name in lora_peft.FILES:  # not whatever else lies there
                shutil.copyfile(Path(cfg.adapter) / name, aside / name)


def load_model(folder, world, base_dtype=None):
    """(Config, model, tokenizer) of a run: the adapters that it was tested with, on its base, in the dtype
    of training or in base_dtype. UserError if the base has changed."""
    cfg = core.stored_config(folder, Config, __file__)
    tokenizer = core.own_tokenizer(folder)
    core.reseed(cfg.seed, "init")  # the random weights of tiny:gpt2 come from it
    model = core.Precision(cfg.dtype, world).cast(build_model(cfg, tokenizer, world, folder))
    if core.state_sha256(core.base_weights(model)) != core.read_config(folder)["facts"].get("base_sha256"):
        raise core.UserError(f"model {cfg.model} is not the one that {folder} was trained on")
    core.narrow_base(model, base_dtype or cfg.base_dtype).to(world.device)
    core.load_weights(
        Path(folder) / "checkpoints" / core.tested_or_newest_checkpoint(folder), core.Adapters(model)
    )
    return cfg, model.eval(), tokenizer


def announce_lora(run, cfg, model):
    """Says on how many layers adapters are, their multiplier, and multiplier x lr, the scale of a step."""
    layers = core.adapted(model)
    multipliers = sorted({layer.multiplier for layer in layers.values()})
    ranks = "/".join(str(rank) for rank in sorted({layer.B.shape[1] for layer in layers.values()}))
    kind = f"alpha {cfg.lora_alpha:g}  scaling {cfg.lora_scaling}"
    if cfg.adapter:
        kept = run.folder / "adapter"
        config = json.loads(
            ((kept if kept.exists() else Path(cfg.adapter)) / "adapter_config.json").read_text()
        )
        kind = f"from {cfg.adapter}, made for {config.get('base_model_name_or_path')}"
    kind += "  DoRA" * any(hasattr(layer, "magnitude") for layer in layers.values())
    kind += "  PiSSA" * any(layer.A0 is not None for layer in layers.values())
    count = core.count_parameters(model)[1]
    run.say(f"adapters {count:,} parameters on {len(layers)} layers  rank {ranks}  {kind}")
    effective, plus = "/".join(f"{m:g}" for m in multipliers), cfg.lora_plus
    faster = f"  rate of B x {plus:g} (LoRA+)" if plus != 1 else ""
    run.say(f"multiplier {effective}  largest multiplier x lr {multipliers[-1] * cfg.lr:.2g}{faster}")


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, dict[str, list]]:
    """Measures a run's own val and test rows again. Returns (figures, file name -> its lines)."""
    cfg, model, tokenizer = load_model(folder, world)
    cfg = replace(cfg, eval_batch=eval_batch or cfg.eval_batch)
    return tuning.remeasure(model, tokenizer, cfg, core.read_config(folder)["facts"], world, poll)


def validate(run, cfg, model, val, plain, batches, at):
    """Validation loss (at step 0 also that on `plain`), best weights, samples of answers."""
    if at.step == 0 and plain:
        run.state["plain"] = tuning.plain_losses(run, cfg, plain, model, at.poll).tolist()
    sums = core.evaluate(model, val, cfg, run.world, at.poll)
    figures = core.language_metrics(sums, val.data.groups[val.rows])  # intervals: bootstrap over prompts
    is_best = at.keep_if_best(figures["loss"])  # all ranks: it may save
    tuning.report_validation(run, at, figures, is_best, len(batches))
    answers.sample(run, cfg, at.step, model, val.data.tokenizer, at.poll)


def train(run, cfg, world) -> dict:
    """Trains adapters and measures them. Returns the final figures."""
    # data: rows of instruction, input and answer become token ids; the loss sees answers, or all
    data = core.load_instructions(cfg, world)
    run.pin("fingerprint", data.fingerprint)  # a resume that finds other rows is refused
    parts, lines = core.examples_of(data, cfg)  # train, test and val, as cfg.split says
    units = core.Packs(parts["train"], cfg.max_length) if cfg.pack else parts["train"]
    block = 50 if cfg.group_lengths else 1  # rows of 50 batches are sorted by length, the batches shuffled
    batches = core.ShardedBatches(units.lengths, cfg.batch, world, seed=cfg.seed, block=block)
    total_steps = core.count_steps(cfg, batches)
    val, plain = parts["val"].some(cfg.eval_rows), tuning.plain_text(run, cfg, data.tokenizer)

    # model: the base is frozen; a checkpoint holds the adapters and their optimizer alone
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.cast(build_model(cfg, data.tokenizer, world, run.folder))
    adapters = core.Adapters(model)
    base_sha256, held_sha256 = tuning.hold_base(run, cfg, model, world)  # in cfg.base_dtype, on the device
    top_multiplier = max(layer.multiplier for layer in core.adapted(model).values())
    optimizer = make_optimizer(cfg, model)
    tuning.announce(run, cfg, parts, units, lines, model, total_steps)  # begins the run: writes its folder
    announce_lora(run, cfg, model)
    saved = adapters, optimizer, precision
    compiled = model.h if cfg.compile else ()
    ddp = core.wrap_ddp(model, world, compiled, shard=cfg.shard, optimizer=optimizer)
    run.load(*saved)  # a resumed run's checkpoint; a new run has none
    core.on_main(world, keep_for_later, run.folder, cfg, data.tokenizer)
    micro_batches = core.MicroBatches(run, ddp, units.batch, units.lengths)

    def forward_backward(rows, targets) -> list:
        """Adds gradients of (this rank's loss sum / targets of all ranks). Returns the sum's parts."""
        losses = []
        for _, batch in micro_batches(rows):  # _: the numbers of its rows
            with precision.autocast():
                losses.append(ddp(*batch))  # cross-entropy, summed over targets
            core.scaled_backward(losses[-1], world, targets, precision)  # x world.size: DDP averages
        return [loss.detach() for loss in losses]  # read later, with the norm

    # two forwards and backwards of the longest rows: is there memory? Then the forecast of hours
    core.rehearse(run, micro_batches, saved, forward_backward, batches, total_steps - run.step)
    run.say(tuning.describe_example(parts["train"]))
    if cfg.mode == "find_lr":
        return core.find_lr(run, batches, units.targets, saved, forward_backward, multiplier=top_multiplier)

    # core.steps draws batches from seed and step alone, saves before evaluating, stops all ranks together
    for at in core.steps(run, batches, units.targets, saved, total_steps, evaluate_first=True):
        if at.evaluates:
            validate(run, cfg, model, val, plain, batches, at)
            continue
        lr = core.lr_at(cfg, at.step, at.schedule_length)  # total_steps, or what fits into max_minutes
        losses = forward_backward(at.rows, at.targets)
        norm = core.gradient_norm(optimizer, precision)  # of the global batch, not clipped yet
        figures = {"multiplier_lr": top_multiplier * lr, **tuning.batch_facts(units, at.batch)}
        if at.spiked(losses, norm) and world.is_main:  # spiked() asks all ranks, so it stands first
            rows = tuning.spike_rows(cfg, model, parts["train"], units.members(at.batch), world)
            at.note_spike(model, {"lr": lr, **figures, **rows})
        at.update(optimizer, precision, lr, **figures)  # clips, updates, zeroes the gradients, logs

    tuning.require_same_base(run, model, held_sha256)
    return finish(run, cfg, parts, plain, model, adapters, optimizer) | {"base_sha256": base_sha256}


def finish(run, cfg, parts, plain, model, adapters, optimizer) -> dict:
    """Hash of the last weights; then figures of the chosen ones on val and test, forgetting, answers."""
    facts = {"weights_sha256": core.weights_sha256(adapters), "test_checkpoints": [run.checkpoint]}
    if cfg.test_weights == "best":
        facts["test_checkpoints"] = [run.load_best(adapters)]
    facts["parameters"], facts["trainable_parameters"] = core.count_parameters(model)
    optimizer.zero_grad(set_to_none=True)  # makes room for answering
    optimizer.state.clear()
    return facts | tuning.final_figures(run, cfg, parts, plain, model, core.merge_lora)


def one_process(cfg, world):
    """Modes ask and export, in one process."""
    if world.size > 1:
        raise core.UserError(f"--mode {cfg.mode} runs in one process: start it with python")
    folder = Path(cfg.run_folder or core.newest_run(cfg, __file__))
    stored, model, tokenizer = load_model(folder, world, "fp32" if cfg.mode == "export" else None)
    asked = replace(stored, prompt=cfg.prompt, max_new_tokens=cfg.max_new_tokens)
    if cfg.mode == "ask":
        return core.ask(core.merge_lora(model), tokenizer, asked)
    end = templates.end_id(tokenizer, stored.template)
    with core.whole_folder(folder / "merged", replace=True) as aside:
        core.save_pretrained(core.merge_lora(model), tokenizer, aside, end)
    print(f"written: {folder}/merged\nnext: python gpt_scratch.py --mode generate --model {folder}/merged")
    base = stored.model
    if base.startswith("tiny:") or core.is_run(base) or "lm_head" in core.adapted(model):
        # peft needs a base that transformers loads and, if the head has an adapter, one with an untied head
        base = str((folder / "base").resolve())
        with core.whole_folder(Path(base), replace=True) as aside:
            core.save_pretrained(core.with_weights(model.config, core.base_weights(model)), tokenizer, aside)
    try:
        lora_peft.save_peft(model, folder / "peft", base)
        print(f"written: {folder}/peft, adapters for\n  {base}")
    except core.UserError as error:  # adapters that peft cannot express
        print(f"no peft folder: {error}")


@record
def main(cfg, world):
    if cfg.mode == "study":
        return core.study(cfg, world, __file__, Config, PRESETS, SMOKE, main)
    cfg = core.with_dtype(cfg, world)
    if cfg.mode not in ("train", "find_lr"):
        return one_process(cfg, world)
    if not (run := core.open_run(cfg, world, __file__, unit="tokens")):
        return None
    with run:
        run.result = train(run, run.cfg, world)
    return run.result


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
