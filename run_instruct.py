"""Alpaca instruction tuning of GPT-2, all weights (journal 001, run_1 to run_6).

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_instruct.py
    python run_instruct.py --preset run_4 --resume_timestamp auto            # its batch of 2 is for one GPU
    python run_instruct.py --data rows.json --model gpt2 --pack
    python run_instruct.py --smoke

--data takes python-instructions (built in), a Hub id, a folder, or a JSON, JSONL, CSV or Parquet file with
the columns instruction, input, output. Each run is a folder under runs/run_instruct/: responses.json holds
the test rows' answers, spikes.jsonl the loss spikes; --mode ask puts questions to the model.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch.distributed.elastic.multiprocessing.errors import record

import core
import gpt_scratch
from lab.measure import answers, tuning


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
    freeze_blocks: core.Whole = 0  # so many of the lowest, with positions and, if untied, the embedding
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
    lr: core.Rate = 5e-5  # peak
    min_lr: core.Rate = 0.0  # at the end of the schedule
    warmup: core.Share = 0.05  # fraction of all steps
    schedule: core.Schedule = "cosine"  # of the rate, after the warm-up
    optimizer: core.Optimizer = "adamw"  # muon: adamw's lr; adafactor: little memory, lr relative to weights
    weight_decay: core.Rate = 0.1  # of matrices
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 or fp16 on a GPU, else fp32
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
    mode: Literal["train", "find_lr", "study", "ask"] = "train"  # ask: a trained run answers
    run_folder: str | None = None  # the one that is asked; none = the newest

    NO_TRAINING = ("ask",)
    READ_BY = core.Studied.READ_BY | {
        "ask": {"prompt", "run_folder"},
        "train find_lr study ask": {"max_new_tokens"},
    }


# max_documents: the journal's runs ended at step 5975 with a batch of 2, so some 12,000 training rows (85 %).
# We differ from its code in two things: it clipped gradients only after the warm-up, and decayed biases and
# norms, too.
JOURNAL = {
    "max_documents": 14_118,
    "template": "journal",
    "split": "file_order",
    "max_length": 1024,
    "group_lengths": False,
    "loss_on_prompt": True,
    "tie_head": False,
    "batch": 2,
    "epochs": 1,
    "lr": 5e-5,
    "weight_decay": 0.1,
    "eval_every": 25,
    "eval_rows": 20,
    "log_every": 25,
    "save_every": 1000,
    "test_weights": "last",
}
PLAIN = JOURNAL | {"schedule": "constant", "warmup": 0.0, "clip": None}
ANNEALED = JOURNAL | {"schedule": "cosine", "min_lr": 1e-5, "warmup": 0.2, "clip": 1.0}
PRESETS = {
    "recommended": {},
    "run_1": PLAIN | {"model": "gpt2-medium"},
    "run_2": PLAIN | {"model": "gpt2-large"},
    "run_3": PLAIN | {"model": "gpt2-xl"},
    "run_4": ANNEALED | {"model": "gpt2-large"},
    "run_5": ANNEALED | {"model": "gpt2-medium"},
    "run_6": ANNEALED | {"model": "gpt2-large", "clip": None},
}
SMOKE = {
    "data": "python-instructions",
    "max_documents": None,
    "model": "tiny:gpt2",
    "max_length": 128,
    "batch": 24,
    "epochs": 12,
    "lr": lambda lr: 80 * lr,  # a tiny random model needs more; one factor for all presets
    "min_lr": 0.0,
    "dtype": "auto",
    "eval_every": 100,
    "eval_rows": None,
    "save_every": None,
    "sample_tokens": 12,
    "max_new_tokens": 24,
    "plain_blocks": 10,
}


def build_model(cfg, tokenizer, world):
    """The pretrained GPT, with cfg.freeze_blocks of its lowest blocks frozen."""
    model = core.build_model(cfg, tokenizer, world)
    if cfg.freeze_blocks > len(model.h):
        raise core.UserError(f"--freeze_blocks {cfg.freeze_blocks}: {cfg.model} has {len(model.h)} blocks")
    if cfg.freeze_blocks:
        bottom = [model.h[: cfg.freeze_blocks], *([model.wpe] if hasattr(model, "wpe") else [])]
        for part in bottom if model.config.tie_head else [*bottom, model.wte]:
            part.requires_grad_(False)
    return model


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, from its folder alone, with the weights
    that it was tested with (of an unfinished run, its newest)."""
    cfg = core.stored_config(folder, Config, __file__)
    model, tokenizer = core.open_model(folder)
    return cfg, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer


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
    """Trains all weights and measures them. Returns the final figures."""
    # data: rows of instruction, input and answer become token ids; the loss sees answers, or all
    data = core.load_instructions(cfg, world)
    run.pin("fingerprint", data.fingerprint)  # a resume that finds other rows is refused
    parts, lines = core.examples_of(data, cfg)  # train, test and val, as cfg.split says
    units = core.Packs(parts["train"], cfg.max_length) if cfg.pack else parts["train"]
    block = 50 if cfg.group_lengths else 1  # rows of 50 batches are sorted by length, the batches shuffled
    batches = core.ShardedBatches(units.lengths, cfg.batch, world, seed=cfg.seed, block=block)
    total_steps = core.count_steps(cfg, batches)
    val, plain = parts["val"].some(cfg.eval_rows), tuning.plain_text(run, cfg, data.tokenizer)

    # model
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(build_model(cfg, data.tokenizer, world))
    optimizer = core.make_optimizer(model, cfg.optimizer, cfg.weight_decay)
    tuning.announce(run, cfg, parts, units, lines, model, total_steps)  # begins the run: writes its folder
    saved = model, optimizer, precision
    compiled = model.h if cfg.compile else ()
    ddp = core.wrap_ddp(model, world, compiled, shard=cfg.shard, optimizer=optimizer)
    run.load(*saved)  # a resumed run's checkpoint; a new run has none
    core.on_main(world, gpt_scratch.describe_model, run.folder, model, data.tokenizer)

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
        return core.find_lr(run, batches, units.targets, saved, forward_backward)

    # core.steps draws batches from seed and step alone, saves before evaluating, stops all ranks together
    for at in core.steps(run, batches, units.targets, saved, total_steps, evaluate_first=True):
        if at.evaluates:
            validate(run, cfg, model, val, plain, batches, at)
            continue
        lr = core.lr_at(cfg, at.step, at.schedule_length)  # total_steps, or what fits into max_minutes
        losses = forward_backward(at.rows, at.targets)
        norm = core.gradient_norm(optimizer, precision)  # of the global batch, not clipped yet
        figures = tuning.batch_facts(units, at.batch)
        if at.spiked(losses, norm) and world.is_main:  # spiked() asks all ranks, so it stands first
            rows = tuning.spike_rows(cfg, model, parts["train"], units.members(at.batch), world)
            at.note_spike(model, {"lr": lr, **figures, **rows})
        at.update(optimizer, precision, lr, **figures)  # clips, updates, zeroes the gradients, logs

    return finish(run, cfg, parts, plain, model, optimizer)


def finish(run, cfg, parts, plain, model, optimizer) -> dict:
    """Hash of the last weights; then figures of the chosen ones on val and test, forgetting, answers."""
    facts = {"weights_sha256": core.weights_sha256(model), "test_checkpoints": [run.checkpoint]}
    if cfg.test_weights == "best":
        facts["test_checkpoints"] = [run.load_best(model)]
    facts["parameters"], facts["trainable_parameters"] = core.count_parameters(model)
    optimizer.zero_grad(set_to_none=True)  # makes room for answering
    optimizer.state.clear()
    return facts | tuning.final_figures(run, cfg, parts, plain, model)


def one_process(cfg, world):
    """Mode ask, in one process."""
    if world.size > 1:
        raise core.UserError(f"--mode {cfg.mode} runs in one process: start it with python")
    folder = Path(cfg.run_folder or core.newest_run(cfg, __file__))
    stored, model, tokenizer = load_model(folder, world)
    asked = replace(stored, prompt=cfg.prompt, max_new_tokens=cfg.max_new_tokens)
    core.ask(model, tokenizer, asked)


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
