"""Does more diverse text make a better model, everything else equal? (journal 002)

    torchrun --nproc_per_node=4 --shutdown-timeout 300 run_pretrain_diversity.py --preset journal
    python run_pretrain_diversity.py --sources a=a.jsonl b=b.jsonl --arms a b a+b --neutral c.jsonl
    python run_pretrain_diversity.py --mode train --data 0.7*pubmed+0.3*uspto --resume_timestamp auto
    python run_pretrain_diversity.py --mode cache        # texts to token ids only
    python run_pretrain_diversity.py --mode diversity    # the diversity coefficient of the arms only
    python run_pretrain_diversity.py --smoke

Mode study trains every arm with every seed on equally many tokens, measures all of them on the held-out part
of every source and on a neutral text, and sets the arms' diversity coefficients beside that. The same command
continues where it stopped. Runs are in runs/run_pretrain_diversity/, tables and pictures in study-*/ there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch.distributed.elastic.multiprocessing.errors import record

import core
import gpt_scratch
from lab.compare import cross, diversity_report, tables
from lab.compare import study as studies
from lab.data import mixture
from lab.measure import diversity, held_out

DIVERSITY = {"probe", "procedure", "sequences", "head_epochs", "fisher_samples", "floor_repeats"}
DIVERSITY |= {"diversity_batches", "diversity_batch", "diversity_length"}  # no run reads them


@dataclass(frozen=True)
class Config(core.Bookkeeping):
    # data
    data: str = "pubmed+uspto"  # what mode train reads: a source, a mixture a+b, or 0.7*a+0.3*b
    arms: tuple[str, ...] = ("pubmed", "uspto", "pubmed+uspto")  # what a study compares
    # mirrors of the journal's subsets that datasets>=5 can read (the patents' name is misspelt there)
    sources: tuple[str, ...] = (  # name=where: a file, folder, Hub id with :config, or built-in text
        "pubmed=ArmelR/the-pile-splitted:PubMed Abstracts",
        "uspto=ArmelR/the-pile-splitted:UPSTO Backgrounds",
        "c4=allenai/c4:en",
    )
    neutral: str = "c4"  # a third text, that nobody trains on: val/loss and test/loss are on it
    neutral_share: core.within(float, 1e-4, 0.5) | None = None  # for val, and for test; none = as others
    text_column: str = "text"  # of tables and Hub sets
    max_documents: core.Count | None = None  # of each source; none = all that are needed
    max_tokens: core.Count | None = None  # of each source's training text; none = what the arms need
    passes: core.Count = 1  # how often an arm reads its training text; 1 = every token once
    repeat: bool = False  # a source that runs out is read again (and counted), otherwise it is an error
    streaming: Literal["True", "CacheStream", "False"] = "True"  # as needed; all first; all first, shuffled
    tokenizer: str = "gpt2"  # of all arms: bpe:<size>, chars, bytes, Hub id or folder
    val_share: core.within(float, 1e-4, 0.9999) = 0.005  # of each text's documents, drawn by their hash
    test_share: core.within(float, 0, 0.9999) = 0.005  # of the text; measured after training only
    held_out_tokens: core.Whole = 500_000  # at least so many in val and in test, if a text is that long
    split_seed: core.Seed = 42  # of what is held out
    block_size: core.Count = 1024  # tokens of context
    # model
    model: Literal["gpt2", "llama"] = "gpt2"  # its shape: GPT-2's, or rotary positions, RMSNorm, SwiGLU
    n_layer: core.Count = 8  # blocks
    n_head: core.Count = 8  # attention heads
    n_embd: core.Count = 512  # width
    dropout: core.Share = 0.0  # share of activations set to 0 in training
    checkpointing: bool = False  # recompute blocks in the backward: more time, less memory
    # optimisation
    batch: core.Count = 64  # blocks per optimizer step, over all ranks
    micro_batch: core.Count | None = None  # blocks per forward and rank; none = all of a rank's that fit
    max_steps: core.Whole = 20_000  # each arm reads max_steps x batch x block_size tokens
    max_minutes: core.Amount | None = None  # of training; a study has none: its arms would differ
    lr: core.Rate = 6e-4  # peak
    min_lr: core.Rate = 6e-5  # at the end of the schedule
    warmup: core.Share = 0.02  # fraction of all steps
    schedule: core.Schedule = "cosine"  # of the rate, after the warm-up
    optimizer: core.Optimizer = "adamw"  # muon: adamw's lr; adafactor: little memory, lr relative to weights
    beta1: core.within(float, 0, 0.9999) = 0.9  # of Adam: decay of the gradients' mean
    beta2: core.within(float, 0, 0.9999) = 0.95  # of Adam: decay of the squares' mean
    weight_decay: core.Rate = 0.1  # of matrices
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 or fp16 on a GPU, else fp32; fp32 not typed is tf32 on a GPU
    seed: core.Seed = 0  # of weights, order and dropout; the first one of a study
    seeds: core.Count = 3  # of each arm in a study: seed, seed + 1, ...
    # evaluation and logging
    eval_batch: core.Count = 64  # windows of held-out text per evaluation step, over all ranks
    eval_every: core.Count | None = 2000  # steps; none = at the end only
    eval_rows: core.Count | None = 500  # windows of each val part, spread evenly; none = all
    test_weights: Literal["best", "last"] = "last"  # lowest validation loss, or the final ones
    save_every: core.Count | None = 2000  # steps; none = at each evaluation, before it
    # diversity coefficient
    probe: str = "gpt2"  # GPT-2 or Llama family (folder, Hub id), a run, or study: the last arm's first run
    procedure: Literal["clean", "published"] = "clean"  # lab/measure/task2vec.py says how they differ
    diversity_batches: core.Whole = 200  # of each arm; 0 = a study without coefficients
    diversity_batch: core.within(int, 2) = 512  # sequences
    diversity_length: core.within(int, 2) = 128  # tokens of a sequence
    sequences: Literal["documents", "pieces"] = "documents"  # one of each document, or all that it holds
    head_epochs: core.Whole = 10  # of training the probe's head on a batch, before Task2Vec embeds it
    fisher_samples: core.Count = 1  # draws of targets, averaged in the Fisher information of an embedding
    floor_repeats: core.within(int, 2) = 4  # embeddings of one batch: their distance is the noise floor
    # run
    max_hours: core.Amount | None = None  # ends a study between two steps; the same command continues
    mode: Literal["study", "train", "find_lr", "cache", "diversity"] = "study"  # study: all arms
    dirty: bool = True  # --no-dirty refuses to start with uncommitted changes

    READ_BY = core.Bookkeeping.READ_BY | {
        " ".join(mixture.ONE_ARM): {"data"},
        "study cache diversity": {
            "seeds",
            "max_hours",
            *DIVERSITY,
        },  # cache and diversity do parts of a study's work
    }

    def __post_init__(self):
        super().__post_init__()
        resumes = self.resume_timestamp not in (None, "auto") or self.resume_step is not None
        if self.mode not in mixture.ONE_ARM and resumes:
            raise core.UserError(
                f"mode {self.mode} continues its runs by itself: drop --resume_timestamp, --resume_step"
            )
        if self.mode == "study" and self.max_minutes is not None:
            raise core.UserError("--max_minutes: arms of a study see equally many tokens, use --max_steps")
        if self.mode == "study" and not self.final_eval:
            raise core.UserError("--no-final_eval: a study needs its runs measured")
        if self.diversity_batches == 1:
            raise core.UserError("--diversity_batches 1: a distance needs 2; 0 for no coefficient")
        if self.mode == "diversity" and not self.diversity_batches:
            raise core.UserError("--diversity_batches 0 leaves --mode diversity nothing to do: use 2 or more")
        if len({tuple(sorted(mixture.shares_of(arm).items())) for arm in self.arms}) < len(self.arms):
            raise core.UserError(f"--arms {' '.join(self.arms)}: two are the same text, name each once")
        if not self.test_share:
            raise core.UserError("--test_share 0 leaves nothing to measure: use 0.01, say")
        if self.val_share + self.test_share >= 1:
            raise core.UserError(
                f"val_share {self.val_share} + test_share {self.test_share} leave nothing to train on"
            )


# Journal 002: transformers' Trainer with its defaults. An arm reads 1.31 billion tokens; where a subset has
# fewer, the journal's reading stopped, ours begins it again and says how often.
JOURNAL = {
    "streaming": "CacheStream",
    "repeat": True,
    "dropout": 0.1,
    "lr": 5e-5,
    "min_lr": 0.0,
    "warmup": 0.0,
    "schedule": "linear",
    "beta2": 0.999,
    "weight_decay": 0.0,
    "dtype": "fp32",
    "seed": 42,
}
PRESETS = {"recommended": {}, "journal": JOURNAL}
SMOKE = {
    "data": "python-docs+python-code",
    "arms": ("python-docs", "python-code", "python-docs+python-code"),
    "sources": (),
    "neutral": "numpy-docs",
    "max_documents": 1500,
    "held_out_tokens": 20_000,
    "tokenizer": "bpe:512",
    "val_share": 0.05,
    "test_share": 0.05,
    "block_size": 64,
    "repeat": False,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "dropout": 0.0,
    "batch": 24,
    "max_steps": 200,
    "lr": lambda lr: 6 * lr,
    "dtype": "auto",
    "seeds": 1,
    "save_every": None,
    "eval_every": 100,
    "eval_rows": 60,
    "probe": "study",
    "diversity_batches": 4,
    "diversity_batch": 24,
    "diversity_length": 32,
    "sequences": "pieces",
    "head_epochs": 2,
    "floor_repeats": 3,
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

# --------------------------------------------------------------------------------------------------- the text


def batches_of(cfg, arm, text, world) -> mixture.Batches:
    """The batches of an arm. UserError if a source holds less than the arm needs."""
    shares = mixture.labelled_shares(arm)
    blocks = mixture.MixedBlocks({name: text.tokens[name].parts["train"] for name in shares}, cfg.block_size)
    return mixture.Batches(blocks, shares, cfg.batch, cfg.max_steps, world, cfg.seed, cfg.passes, cfg.repeat)


def run_facts(cfg, text, batches) -> dict:
    """What config.json notes of a run's text: its fingerprint, and the ledger of what is read."""
    fingerprint = text.fingerprint(mixture.label(cfg.neutral), mixture.labelled_shares(cfg.data))
    return {"fingerprint": fingerprint, "ledger": batches.ledger()}


# -------------------------------------------------------------------------------------------------- measuring


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, from its folder alone, with the weights it was tested with."""
    cfg = core.stored_config(folder, Config, __file__)
    model, tokenizer = core.open_model(folder)
    return cfg, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, dict[str, list]]:
    """Measures a run's own val and test text again. Returns (figures, file name -> its lines)."""
    cfg, model, _ = load_model(folder, world)
    cfg = replace(cfg, eval_batch=eval_batch or cfg.eval_batch)
    text, result = mixture.load_text(cfg, world), {}
    stored = core.read_config(folder)["facts"]["fingerprint"]
    fingerprint = text.fingerprint(mixture.label(cfg.neutral), mixture.labelled_shares(cfg.data))
    core.refuse_other_data(stored, fingerprint, cfg.data, ("data", "tokenizer", "sources"))
    for part in core.final_parts(cfg):
        part_figures, neutral = held_out.figures_of_part(model, cfg, text, part, world, poll)
        result |= part_figures
    return result, {"losses.jsonl": neutral.lines(part)}


def report(run, cfg, metrics, part, where="", note="", late=True):
    """Says the figures on the neutral text, the loss on each source that the arm reads, and an alarm."""
    loss = core.plus_minus(metrics[f"{part}/loss"], metrics[f"{part}/loss_interval"], 4)
    accuracy = core.plus_minus(metrics[f"{part}/accuracy"], metrics[f"{part}/accuracy_interval"])
    own = "  ".join(
        f"{name} {metrics[f'{part}/{name}/loss']:.4f}" for name in mixture.labelled_shares(cfg.data)
    )
    head = f"{where}  {part}".strip()
    run.say(f"{head:5} loss {loss}  accuracy {accuracy}  on {mixture.label(cfg.neutral)}{note}")
    run.say(f"{head:5} loss {own}")
    if late and metrics[f"{part}/own/alarm"]:
        run.say(f"{head:5} {metrics[f'{part}/own/alarm']}")


# ------------------------------------------------------------------------------------------------------ train


def train(run, cfg, world) -> dict:
    """Trains and measures one arm; returns the final figures."""
    if cfg.mode == "find_lr" and cfg.find_steps >= cfg.max_steps:
        raise core.UserError(f"--find_steps {cfg.find_steps} needs a --max_steps above it")
    text = mixture.load_text(cfg, world)
    batches = batches_of(cfg, cfg.data, text, world)
    for name, value in run_facts(cfg, text, batches).items():
        run.pin(name, value)  # a resume with another max_steps is refused: it changes the order
    held_out.require_windows(cfg, text, core.final_parts(cfg))
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(build_model(cfg, len(text.sizes)))
    optimizer = core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, (cfg.beta1, cfg.beta2))
    run.pin("initial_weights", core.weights_sha256(model))
    saved = model, optimizer, precision
    announce(run, cfg, text, batches, model)
    compiled = model.h if cfg.compile else ()
    ddp = core.wrap_ddp(model, world, compiled, None, shard=cfg.shard, optimizer=optimizer)
    step, total_steps = run.load(*saved), cfg.max_steps
    core.on_main(world, gpt_scratch.describe_model, run.folder, model, text.tokenizer)

    micro_batches = core.MicroBatches(run, ddp, batches.blocks.batch)

    def forward_backward(rows, targets) -> list:
        """Adds gradients of (this rank's loss sum / targets of all ranks). Returns the sum's parts."""
        losses = []
        for _, batch in micro_batches(rows):
            with precision.autocast():
                losses.append(ddp(*batch))
            core.scaled_backward(losses[-1], world, targets, precision)  # x world.size: DDP averages
        return [loss.detach() for loss in losses]  # read later, with the norm

    # two forwards and backwards of the longest rows: is there memory? Then the forecast of hours
    core.rehearse(run, micro_batches, saved, forward_backward, batches, total_steps - step)
    first = batches.blocks.tokens(int(batches.rows[0]) if len(batches.rows) else 0)
    run.say(gpt_scratch.describe_block(text.tokenizer, first))
    if cfg.mode == "find_lr":
        return core.find_lr(run, batches, batches.blocks.targets, saved, forward_backward)
    seen, val = run.state.setdefault("seen", dict.fromkeys(mixture.labelled_shares(cfg.data), 0)), None

    every = cfg.eval_every or total_steps  # none: at the end only
    targets_of = batches.blocks.targets
    # core.steps draws batches from seed and step alone, saves before evaluating, stops all ranks together
    for at in core.steps(run, batches, targets_of, saved, total_steps, every=every, where=tokens_read):
        if at.evaluates:
            val = check(run, cfg, text, model, at)
            continue
        val, lr = None, core.lr_at(cfg, at.step, at.schedule_length)
        losses = forward_backward(at.rows, at.targets)
        for name, blocks in batches.seen(at.step).items():
            seen[name] += blocks
        norm = core.gradient_norm(optimizer, precision)  # of the global batch, not clipped yet
        if at.spiked(losses, norm) and world.is_main:  # spiked() asks all ranks, so it stands first
            at.note_spike(model, spike_facts(text, batches, at, lr))
        at.update(optimizer, precision, lr)  # clips, updates, zeroes the gradients, logs
    return finish(run, cfg, world, text, model, batches, val if cfg.test_weights == "last" else None)


def build_model(cfg, vocab_size) -> core.GPT:
    shape = {name: getattr(cfg, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    shape |= {"checkpointing": cfg.checkpointing, **SHAPES[cfg.model]}
    return core.GPT(core.GPTConfig(vocab_size, **shape))


def announce(run, cfg, text, batches, model):
    """Says what is about to be trained on what, and writes ledger.json."""
    total, trainable = core.count_parameters(model)
    ledger = batches.ledger()
    run.say(
        f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   "
        f"{ledger['tokens']} tokens"
    )
    run.begin(cfg.max_steps)
    for name, source in ledger["sources"].items():
        documents = "  ".join(f"{part} {n}" for part, n in text.tokens[name].documents.items())
        blocks = f"{source['distinct_blocks']} blocks of {ledger['block_size']} tokens"
        times = "once" if source["epochs"] == 1 else f"{source['epochs']:.3g} times"
        run.say(f"source {name}  {blocks}, read {times}  documents {documents}")
    for name in (*ledger["sources"], mixture.label(cfg.neutral)):
        for line in text.tokens[name].lines:
            run.say(f"{name}  {line}")
    passes = [source["epochs"] for source in ledger["sources"].values()]
    if cfg.repeat and max(passes) > cfg.passes:
        run.say(f"NOTE --repeat: a source is read more than {cfg.passes} x: its arm sees fewer new tokens")
    core.on_main(run.world, core.write_json, run.folder / "ledger.json", ledger)


def tokens_read(run, batches, step) -> str:
    """How far a run is after `step` steps, for its lines."""
    return f"{step * run.cfg.batch * run.cfg.block_size / 1e6:.3g}M tokens"


def spike_facts(text, batches, at, lr) -> dict:
    """What a spiking step read, for spikes.jsonl."""
    first = text.tokenizer.decode(batches.blocks.tokens(at.batch[0]).tolist())
    return {"lr": lr, "rows": at.batch, "sources": batches.seen(at.step), "first_row": first}


def check(run, cfg, text, model, at) -> tuple:
    """Validates: says and logs figures, keeps the best weights. Returns (figures, neutral rows)."""
    metrics, neutral = held_out.figures_of_part(model, cfg, text, "val", run.world, at.poll)
    where, is_best = f"step {at.step}/{cfg.max_steps}", at.keep_if_best(metrics["val/loss"])
    report(run, cfg, metrics, "val", where, "  -> best" if is_best else "", at.late)
    names = [name for name in metrics if name.rpartition("/")[2] in ("loss", "perplexity", "accuracy")]
    run.metrics(at.step, {name: metrics[name] for name in names})
    return metrics, neutral


def finish(run, cfg, world, text, model, batches, val=None) -> dict:
    """Checks that the run read what its ledger says; measures the chosen weights on val and test. val: their
    figures on val, if measured already."""
    ledger, seen = batches.ledger(), run.state["seen"]
    planned = {name: source["blocks"] for name, source in ledger["sources"].items()}
    if cfg.max_minutes is None and seen != planned:
        raise RuntimeError(f"the run read {seen} blocks, its ledger says {planned}: start a new run")
    sha256, measured, result = core.weights_sha256(model), run.checkpoint, {}
    if cfg.test_weights == "best":
        measured = run.load_best(model)
    for part in core.final_parts(cfg):
        known = val if part == "val" else None  # of these very weights
        metrics, neutral = known or held_out.figures_of_part(model, cfg, text, part, world, run.poll)
        result |= metrics
        if not known:
            report(run, cfg, metrics, part)
    core.on_main(world, core.write_lines, run.folder / "losses.jsonl", neutral.lines(part))
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

OWN = frozenset(DIVERSITY | {"data", "sources"})  # set for each run by text_of_a_run, or read by none


@dataclass
class DiversityStudy:
    """What the stages of a study share: the plan of its runs, its texts, the check for signals."""

    plan: studies.Plan
    text: mixture.Text
    poll: Callable  # () -> None: raises Stop after a signal


def text_of_a_run(cfg, arm) -> dict:
    """The constants that say what a run reads. A learnt tokenizer was learnt from the text of all arms:
    then their sources are named, too."""
    taught = cfg.arms if mixture.is_learnt(cfg.tokenizer) else (arm,)
    names = sorted({name for each in taught for name in mixture.shares_of(each)})
    named = mixture.named_sources(cfg.sources)
    sources = tuple(f"{name}={named[name]}" for name in sorted({*names, cfg.neutral}) if name in named)
    return {"data": arm, "arms": tuple(dict.fromkeys([*names, arm])), "sources": sources}


def planned_runs(plan) -> list[tuple[str, Config]]:
    """(arm, constants of its run) for every seed and arm."""
    cfg, runs = plan.cfg, []
    arms = {arm: studies.arm_of(plan, "", called=tables.slug(arm)) for arm in cfg.arms}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        runs += [
            (name, studies.run_config(arm, seed, text_of_a_run(cfg, name))) for name, arm in arms.items()
        ]
    return runs


def study_folder(plan) -> Path:
    """<out>/study-<hash of the first seed's runs and of what the coefficients depend on>/"""
    tags = [run_cfg.tag for _, run_cfg in planned_runs(plan)[: len(plan.cfg.arms)]]
    mark = core.short_hash([tags, {name: getattr(plan.cfg, name) for name in sorted(DIVERSITY)}], 6)
    return core.out_folder(plan.cfg, __file__) / f"study-{mark}"


def open_study(plan, poll) -> DiversityStudy:
    """Opens all text and checks everything before the first step of the first run."""
    cfg, world = plan.cfg, plan.world
    for line in core.override_lines(cfg):
        plan.say(line)
    study = DiversityStudy(plan, mixture.load_text(cfg, world), poll)
    if cfg.mode != "diversity":
        for arm in cfg.arms:
            batches_of(cfg, arm, study.text, world)
        held_out.require_windows(cfg, study.text, core.final_parts(cfg))
    if cfg.diversity_batches and cfg.probe == "study":
        diversity.check_length(cfg, cfg.block_size)
        draws_of(study, study.text.tokenizer)
    elif cfg.diversity_batches:
        draws_of(study, diversity.open_probe(cfg, cfg.probe, world)[1])
    if cfg.mode != "cache":
        core.on_main(world, core.prepare_folder, study_folder(plan))
    if cfg.neutral_share and cfg.mode != "diversity":
        twice = "a document of the neutral text may stand in a source's training text, too"
        plan.say(f"NOTE --neutral_share: {twice}")
    return study


def compare_arms(study):
    """Mode study: trains the missing runs, measures and compares all; finished work is kept."""
    plan, planned = study.plan, planned_runs(study.plan)
    core.on_main(plan.world, check_text, study, planned)
    runs = studies.make_runs(plan, planned, study.poll)
    notes = core.on_main(plan.world, check_runs, study, planned, runs)
    plan.say("\n".join(notes))
    losses = cross.evaluate(plan, study.text, runs, load_model, study.poll)
    coefficients = measure_diversity(study) if plan.cfg.diversity_batches else None
    core.on_main(plan.world, conclude, plan, runs, losses, coefficients, notes)


def check_text(study, planned):
    """Rank 0: raises UserError for a finished run that read other text than it would read today."""
    for arm, cfg in planned:
        if not (folder := studies.finished_folder(cfg, __file__)):
            continue
        core.tested_checkpoints(folder)  # UserError where its weights are damaged
        then = core.read_config(folder)["facts"]
        now = run_facts(cfg, study.text, batches_of(cfg, arm, study.text, study.plan.world))
        if odd := [name for name in now if then[name] != now[name]]:
            other = f"{folder} had read other text ({', '.join(odd)})"
            raise core.UserError(f"{other}: move it away, or use --out")


def check_runs(study, planned, runs) -> list[str]:
    """Rank 0: lines on what all runs have in common. UserError if a run read other text than it would today,
    or if arms of a seed differ in more than their text."""
    check_text(study, planned)
    diversity_report.check_equal(runs, OWN | core.MAY_CHANGE | {"arms"})
    documents = {name: tokens.documents["test"] for name, tokens in study.text.tokens.items()}
    return diversity_report.notes_of(runs, documents)


# -------------------------------------------------------------------------------------- diversity coefficient


def probe_name(plan) -> str:
    """cfg.probe; `study`: the last arm's first run. UserError if that is not finished."""
    if plan.cfg.probe != "study":
        return plan.cfg.probe
    arm, cfg = planned_runs(plan)[len(plan.cfg.arms) - 1]
    if folder := studies.finished_folder(cfg, __file__):
        return folder
    raise core.UserError(f"--probe study: arm {arm} has no finished run: train it, or name a probe")


def draws_of(study, tokenizer) -> diversity.Draws:
    """The batches to embed, as token ids of the probe's tokenizer. UserError if a source is too small."""
    cfg = study.plan.cfg
    return diversity.draws_of(cfg, study.text, mixture.sources_of(cfg), tokenizer, study.plan.world)


def measure_diversity(study) -> dict:
    """The diversity coefficients of all arms."""
    plan, cfg, world = study.plan, study.plan.cfg, study.plan.world
    probe, tokenizer = diversity.open_probe(cfg, core.on_main(world, probe_name, plan), world)
    folder, draws = core.out_folder(cfg, __file__) / "embeddings", draws_of(study, tokenizer)
    with core.Precision("fp32", world).products():  # true fp32, no TF32
        return diversity.measure(cfg, draws, probe, folder, world, plan.say, study.poll)


# --------------------------------------------------------------------------------------------- what comes out


def conclude(plan, runs, losses, coefficients, notes):
    """Rank 0: writes study.md, study.json, matrix.png, link.png, and prints the tables."""
    folder, cfg = study_folder(plan), core.with_dtype(plan.cfg, plan.world)
    plan.say(f"\n{diversity_report.write(folder, runs, losses, coefficients, notes, cfg)}")
    pictures = "matrix.png, link.png" if coefficients else "matrix.png"
    plan.say(f"done  tables: {folder}/study.md  pictures: {pictures} there")
    plan.say(f"next: python eval.py --table {folder.parent}")


def cache(study):
    """Mode cache: prints how many tokens each text has; open_study has checked that every arm has enough."""
    texts = study.text.tokens
    parts = {part: [f"{len(tokens.parts[part]):,}" for tokens in texts.values()] for part in core.PARTS}
    documents = [f"{sum(tokens.documents.values()):,}" for tokens in texts.values()]
    study.plan.say(tables.markdown({"text": list(texts), "documents": documents, **parts}))
    for name, tokens in texts.items():
        for line in tokens.lines:
            study.plan.say(f"{name}  {line}")
    study.plan.say(f"cached: tokens of {len(texts)} texts, enough for every arm, in {core.cache_root()}")


def coefficients_alone(study):
    """Mode diversity: the coefficients of the arms, without training."""
    core.on_main(study.plan.world, conclude_diversity, study.plan, measure_diversity(study))


def conclude_diversity(plan, coefficients):
    """Rank 0: writes diversity.json and diversity.md, and prints the table."""
    folder, table = study_folder(plan), diversity_report.diversity_table(coefficients)
    core.write_json(folder / "diversity.json", coefficients)
    with core.whole_file(folder / "diversity.md") as file:
        file.write(table + "\n")
    plan.say(f"{table}\ndone  {folder}/diversity.md")


# ------------------------------------------------------------------------------------------------------- main


@record
def main(cfg, world):
    if not cfg.dirty:
        core.on_main(world, core.refuse_dirty)
    if cfg.mode in mixture.ONE_ARM:
        if not (run := core.open_run(core.with_dtype(cfg, world), world, __file__, unit="tokens")):
            return None
        with run:
            run.result = train(run, run.cfg, world)
        return run.result
    plan = studies.Plan(cfg, world, __file__, Config, PRESETS, SMOKE, main, own=OWN)
    with studies.continued(plan) as poll:
        work = {"study": compare_arms, "cache": cache, "diversity": coefficients_alone}[cfg.mode]
        work(open_study(plan, poll))


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
