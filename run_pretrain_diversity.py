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

import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from torch.distributed.elastic.multiprocessing.errors import record

import core
import gpt_scratch
from lab.compare import diversity_report, tables
from lab.data import builtin, mixture, paths
from lab.measure import diversity, held_out, language
from lab.run import checkpoints

ONE_ARM = ("train", "find_lr")  # modes that read the text of one arm, `data`


@dataclass(frozen=True)
class Config(core.Bookkeeping):
    # data
    data: str = "pubmed+uspto"  # what mode train reads: a source, a mixture a+b, or 0.7*a+0.3*b
    arms: tuple[str, ...] = ("pubmed", "uspto", "pubmed+uspto")  # what a study compares
    # mirrors of the journal's subsets in a format that datasets 5 reads (the patents' name is misspelt there)
    sources: tuple[str, ...] = (  # name=where: a file, folder, Hub id with :config, or built-in text
        "pubmed=ArmelR/the-pile-splitted:PubMed Abstracts",
        "uspto=ArmelR/the-pile-splitted:UPSTO Backgrounds",
        "c4=allenai/c4:en",
    )
    neutral: str = "c4"  # a third text, that nobody trains on: val/loss and test/loss are on it
    neutral_share: core.within(float, 1e-4, 0.5) | None = None  # of it; none = val_share, test_share
    text_column: str = "text"  # of tables and Hub sets
    max_documents: core.Count | None = None  # of each source; none = all that are needed
    max_tokens: core.Count | None = None  # of each source's training text; none = what the arms need
    passes: core.Count = 1  # over the training text: in every arm 1 / passes of its tokens are distinct
    repeat: bool = False  # a source that runs out is read again (and counted), otherwise it is an error
    streaming: Literal["True", "CacheStream", "False"] = "True"  # or download Hub sets; False: and shuffle
    tokenizer: str = "gpt2"  # of all arms: bpe:<size>, chars, bytes, Hub id or folder
    val_share: core.within(float, 1e-4, 0.9999) = 0.005  # of each text's documents, by their hash
    test_share: core.within(float, 0, 0.9999) = 0.005  # of the text, for the end
    held_out_tokens: core.Whole = 500_000  # so many in val and in test at least, where a text has them
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
    micro_batch: core.Count | None = None  # blocks per forward and rank; none = all of the rank's blocks
    max_steps: core.Whole = 20_000  # with batch and block_size the token pool, the same for every arm
    max_minutes: core.Amount | None = None  # of training; a study has none: its arms would differ
    lr: core.Rate = 6e-4  # peak
    min_lr: core.Rate = 6e-5  # at the end of the schedule
    warmup: core.Share = 0.02  # fraction of all steps
    schedule: Literal["linear", "cosine", "constant"] = "cosine"  # of the rate, after the warm-up
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: momentum 0.9
    beta1: core.within(float, 0, 0.9999) = 0.9  # of Adam: how fast the mean forgets
    beta2: core.within(float, 0, 0.9999) = 0.95  # of Adam: how fast the squares forget
    weight_decay: core.Rate = 0.1  # of matrices
    clip: core.within(float, 1e-6) | None = 1.0  # global gradient norm; none = off
    dtype: core.Dtype = "auto"  # auto: bf16 on a card (or fp16), else fp32, which untyped is tf32 on a card
    seed: core.Seed = 0  # of weights, order and dropout; the first one of a study
    seeds: core.Count = 3  # of each arm in a study: seed, seed + 1, ...
    # evaluation and logging
    eval_batch: core.Count = 64  # windows of held-out text per evaluation step, over all ranks
    eval_every: core.Count | None = 2000  # steps; none = at the end only
    eval_rows: core.Count | None = 500  # windows of each val part, spread evenly; none = all
    test_weights: Literal["best", "last"] = "last"  # lowest validation loss, or the final ones
    save_every: core.Count | None = 2000  # steps; none = at each evaluation, before it
    # diversity coefficient
    probe: str = "gpt2"  # GPT-2 or Llama folder, Hub id, a run folder, or study: the last arm's first run
    procedure: Literal["clean", "published"] = "clean"  # lab/measure/task2vec.py says how they differ
    diversity_batches: core.Whole = 200  # of each arm; 0 = a study without coefficients
    diversity_batch: core.within(int, 2) = 512  # sequences
    diversity_length: core.within(int, 2) = 128  # tokens of a sequence
    sequences: Literal["documents", "pieces"] = "documents"  # a document's first tokens, or all of them
    head_epochs: core.Whole = 10  # over a batch, before its embedding is taken
    fisher_samples: core.Count = 1  # target draws that an embedding averages
    floor_repeats: core.within(int, 2) = 4  # embeddings of one batch: their distance is the noise floor
    # run
    mode: Literal["study", "train", "find_lr", "cache", "diversity"] = "study"  # study: all arms
    dirty: bool = True  # --no-dirty refuses to start with uncommitted changes

    def __post_init__(self):
        super().__post_init__()
        resumes = self.resume_timestamp not in (None, "auto") or self.resume_step is not None
        if self.mode not in ONE_ARM and resumes:
            raise core.UserError(
                f"mode {self.mode} goes on by itself: drop --resume_timestamp, --resume_step"
            )
        if self.mode == "study" and self.max_minutes is not None:
            raise core.UserError("--max_minutes: the arms of a study see the same tokens, use --max_steps")
        if self.mode == "study" and not self.final_eval:
            raise core.UserError("--no-final_eval: a study needs its runs measured")
        if self.diversity_batches == 1:
            raise core.UserError("--diversity_batches 1: a distance needs 2, and 0 leaves it out")
        if len({tuple(sorted(mixture.shares_of(arm).items())) for arm in self.arms}) < len(self.arms):
            raise core.UserError(f"--arms {' '.join(self.arms)}: two are the same text, name each once")
        if not self.test_share:
            raise core.UserError("--test_share 0 leaves nothing to measure: use 0.01, say")
        if self.val_share + self.test_share >= 1:
            raise core.UserError(
                f"val_share {self.val_share} + test_share {self.test_share} leave nothing to train on"
            )


# Journal 002: transformers' Trainer as it comes. A mirror may hold less than 1.31 billion tokens of a subset:
# the journal's interleaving stopped there, ours reads it again and counts.
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


def shares_of(arm) -> dict[str, float]:
    """Source label -> share of an arm. UserError if two sources have the same label."""
    shares = mixture.shares_of(arm)
    if len(labelled := {mixture.label(name): share for name, share in shares.items()}) < len(shares):
        raise core.UserError(
            f"arm {arm}: two sources have the same name, give them others by --sources name=where"
        )
    return labelled


def sources_of(cfg) -> dict[str, core.Corpus]:
    """Source label -> Corpus, for all arms. UserError for a source that is nowhere."""
    named, sources = mixture.named_sources(cfg.sources), {}
    # each source holds a whole pool, whatever its share: what an arm reads does not depend on other arms
    pool = math.ceil(cfg.max_steps * cfg.batch / cfg.passes) * cfg.block_size + cfg.block_size
    # a run that belongs to a study shares its tokenizer, which all arms' sources may teach
    alone = cfg.mode in ONE_ARM and (cfg.data not in cfg.arms or not mixture.is_learnt(cfg.tokenizer))
    arms = (cfg.data,) if alone else cfg.arms
    for name in dict.fromkeys(name for arm in arms for name in mixture.shares_of(arm)):
        corpus = corpus_of(cfg, address(named, name, "--arms"), max_tokens=cfg.max_tokens or pool)
        if sources.setdefault(mixture.label(name), corpus) != corpus:
            raise core.UserError(
                f"two sources are called {mixture.label(name)}: name them by --sources name=where"
            )
    return sources


def address(named, name, flag) -> str:
    """Where a text is: as --sources says, or the name itself. UserError if it can be neither."""
    known = name in named or "/" in name or name in builtin.BUILT_IN or paths.is_there(name)
    if not name or not known:
        names = ", ".join([*named, *builtin.BUILT_IN])
        raise core.UserError(f"{flag} {name!r}: no such text; use {names}, a path, or --sources {name}=where")
    return named.get(name, name)


def neutral_corpus(cfg) -> core.Corpus:
    """Corpus of the neutral text, streamed as far as its held-out part needs."""
    where = address(mixture.named_sources(cfg.sources), cfg.neutral, "--neutral")
    shares = {"val_share": cfg.neutral_share, "test_share": cfg.neutral_share} if cfg.neutral_share else {}
    return corpus_of(cfg, where, max_tokens=0, streaming="True", **shares)


def corpus_of(cfg, where, **given) -> core.Corpus:
    shared = {name: getattr(cfg, name) for name in ("text_column", "max_documents", "streaming", "tokenizer")}
    shared |= {
        name: getattr(cfg, name) for name in ("val_share", "test_share", "split_seed", "held_out_tokens")
    }
    # by the hash alone: a document is held out of every source, or of none
    return core.Corpus(where, **shared | {"first_trains": False} | given)


def neutral_of(cfg) -> str:
    return mixture.label(cfg.neutral)


def open_text(cfg, world) -> mixture.Text:
    """Token caches of the sources that cfg reads and, last, of the neutral text; built if need be. UserError
    if two texts are the same."""
    sources, neutral = sources_of(cfg), neutral_of(cfg)
    names = [*(shares_of(cfg.data) if cfg.mode in ONE_ARM else sources)]
    wanted = {name: sources[name] for name in names}
    if cfg.mode != "diversity":
        wanted[neutral] = neutral_corpus(cfg)
        if neutral in sources:
            raise core.UserError(f"--neutral {cfg.neutral} is trained on by an arm: use a third text")
    text = mixture.open_text(wanted, cfg.tokenizer, sources, world)
    names = {}
    for name, tokens in text.tokens.items():
        if (other := names.setdefault(tokens.fingerprint["data"], name)) != name:
            raise core.UserError(f"{other} and {name} are the same text: sources and --neutral must differ")
    return text


def batches_of(cfg, arm, text, world) -> mixture.Batches:
    """The batches of an arm. UserError if a source holds less than the arm needs."""
    shares = shares_of(arm)
    blocks = mixture.MixedBlocks({name: text.tokens[name].parts["train"] for name in shares}, cfg.block_size)
    return mixture.Batches(blocks, shares, cfg.batch, cfg.max_steps, world, cfg.seed, cfg.passes, cfg.repeat)


def run_facts(cfg, text, batches) -> dict:
    """What config.json notes of a run's text: its fingerprint, and the ledger of what is read."""
    fingerprint = text.fingerprint(neutral_of(cfg), shares_of(cfg.data))
    return {"fingerprint": fingerprint, "ledger": batches.ledger()}


# -------------------------------------------------------------------------------------------------- measuring


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, from its folder alone, with the weights
    that it was tested with."""
    cfg = core.stored_config(folder, Config, __file__)
    model, tokenizer = core.open_model(folder)
    return cfg, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer


BRIEF = ("loss", "loss_interval", "perplexity", "accuracy", "bits_per_byte")  # kept of a single source


def figures(model, cfg, text, part, world, poll) -> tuple[dict, held_out.MeasuredText]:
    """Figures of one part: on the neutral text (loss, accuracy ...), on the arm's sources together
    (own/..., with an alarm), and on each source. Also the neutral text as measured."""
    shares = shares_of(cfg.data)
    neutral = held_out.measure_text(model, cfg, text, shares, neutral_of(cfg), part, world, poll)
    sources = {
        name: held_out.measure_text(model, cfg, text, shares, name, part, world, poll) for name in shares
    }
    own = held_out.pooled(list(sources.values())).figures()
    result = {f"{part}/{name}": value for name, value in neutral.figures().items()}
    result |= {f"{part}/own/{name}": value for name, value in own.items()}
    result[f"{part}/own/alarm"] = language.unigram_alarm(own, "own loss")
    for name, source in sources.items():
        source_figures = source.figures()
        result |= {f"{part}/{name}/{figure}": source_figures[figure] for figure in BRIEF}
    return result, neutral


def final_parts(cfg) -> tuple[str, ...]:
    """The parts that are measured at the end, the most important one last."""
    return ("val", "test") if cfg.final_eval else ("val",)


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, dict[str, list]]:
    """Measures a run's own val and test text again. Returns figures, and losses.jsonl: its lines."""
    cfg, model, _ = load_model(folder, world)
    cfg = replace(cfg, eval_batch=eval_batch or cfg.eval_batch)
    text, result = open_text(cfg, world), {}
    stored = core.read_config(folder)["facts"]["fingerprint"]
    fingerprint = text.fingerprint(neutral_of(cfg), shares_of(cfg.data))
    core.refuse_other_data(stored, fingerprint, cfg.data, ("data", "tokenizer", "sources"))
    for part in final_parts(cfg):
        part_figures, neutral = figures(model, cfg, text, part, world, poll)
        result |= part_figures
    return result, {"losses.jsonl": neutral.lines(part)}


def report(run, cfg, metrics, part, where="", note=""):
    """Says the figures on the neutral text, and the loss on each source that the arm reads."""
    loss = core.plus_minus(metrics[f"{part}/loss"], metrics[f"{part}/loss_interval"], 4)
    accuracy = core.plus_minus(metrics[f"{part}/accuracy"], metrics[f"{part}/accuracy_interval"])
    own = "  ".join(f"{name} {metrics[f'{part}/{name}/loss']:.4f}" for name in shares_of(cfg.data))
    head = f"{where}  {part}".strip()
    run.say(f"{head:5} loss {loss}  accuracy {accuracy}  on {neutral_of(cfg)}{note}")
    run.say(f"{head:5} loss {own}")


# ------------------------------------------------------------------------------------------------------ train


def train(run, cfg, world, text=None) -> dict:
    """Trains and measures one arm; returns the final figures. text: what a study has opened already."""
    if cfg.mode == "find_lr" and cfg.find_steps >= cfg.max_steps:
        raise core.UserError(f"--find_steps {cfg.find_steps} reads as many batches: use a larger --max_steps")
    text, neutral = text or open_text(cfg, world), neutral_of(cfg)
    batches = batches_of(cfg, cfg.data, text, world)
    for name, value in run_facts(cfg, text, batches).items():
        run.pin(name, value)  # another length would be another order: start a new run
    for name in (*shares_of(cfg.data), neutral):
        for part in final_parts(cfg):
            held_out.held_out_windows(cfg, text, name, part)
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(build_model(cfg, len(text.tokenizer)))
    optimizer = core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, (cfg.beta1, cfg.beta2))
    run.pin("initial_weights", core.weights_sha256(model))
    saved = model, optimizer, precision
    announce(run, cfg, text, batches, model)
    step, total_steps = run.load(*saved), cfg.max_steps
    core.on_main(world, gpt_scratch.describe_model, run.folder, model, text.tokenizer)
    ddp = core.wrap_ddp(model, world, model.h if cfg.compile else (), dynamic=None)

    def forward_backward(rows, targets) -> float:
        """Adds the gradients of this rank's rows, of summed loss / global targets;
        returns their summed loss."""
        losses = []
        for part in core.micro_batches(ddp, rows, cfg.micro_batch):
            with precision.autocast():
                losses.append(ddp(*batches.blocks.batch(part, world.device)))
            core.scaled_backward(losses[-1], world, targets, precision)
        return sum(loss.item() for loss in losses)

    core.rehearse(run, ddp, saved, forward_backward, batches, total_steps - step)
    run.say(describe_block(text.tokenizer, batches))
    if cfg.mode == "find_lr":
        return core.find_lr(run, batches, batches.blocks.targets, saved, forward_backward)
    seen, val = run.state.setdefault("seen", dict.fromkeys(shares_of(cfg.data), 0)), None

    every = cfg.eval_every or total_steps  # none: at the end only
    targets_of = batches.blocks.targets
    for at in core.steps(run, batches, targets_of, saved, total_steps, every=every, where=tokens_read):
        if at.evaluates:
            val = check(run, cfg, text, model, at)
            continue
        val, lr = None, core.lr_at(cfg, at.step, at.schedule_length)
        loss_sum = forward_backward(at.rows, at.targets)
        for name, blocks in batches.seen(at.step).items():
            seen[name] += blocks
        norm = core.gradient_norm(optimizer, precision)
        if at.spiked(loss_sum, norm) and world.is_main:
            at.note_spike(model, spike_facts(text, batches, at, lr))
        at.update(optimizer, precision, lr)
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
    run.begin()
    for name, source in ledger["sources"].items():
        documents = "  ".join(f"{part} {n}" for part, n in text.tokens[name].documents.items())
        blocks = f"{source['distinct_blocks']} blocks of {ledger['block_size']} tokens"
        times = "once" if source["epochs"] == 1 else f"{source['epochs']:.3g} times"
        run.say(f"source {name}  {blocks}, read {times}  documents {documents}")
    for name in (*ledger["sources"], neutral_of(cfg)):
        for line in text.tokens[name].lines:
            run.say(f"{name}  {line}")
    passes = [source["epochs"] for source in ledger["sources"].values()]
    if cfg.repeat and max(passes) > cfg.passes:
        run.say("NOTE --repeat: a source is read more often than the others, it has less new text")
    core.on_main(run.world, core.write_json, run.folder / "ledger.json", ledger)


def describe_block(tokenizer, batches) -> str:
    """The first block of the first step, decoded from its ids."""
    ids = batches.blocks.tokens(int(batches.rows[0]) if len(batches.rows) else 0)
    text = core.one_line(tokenizer.decode(ids[:200].tolist()))
    return f"the loss sees, in {len(ids) - 1} targets (all but the first token):\n  {text[:96]}"


def tokens_read(run, batches, step) -> str:
    """How far a run is after `step` steps, for its lines."""
    return f"{step * run.cfg.batch * run.cfg.block_size / 1e6:.3g}M tokens"


def spike_facts(text, batches, at, lr) -> dict:
    """What a spiking step read, for spikes.jsonl."""
    first = text.tokenizer.decode(batches.blocks.tokens(at.batch[0]).tolist())
    return {"lr": lr, "rows": at.batch, "sources": batches.seen(at.step), "first_row": first}


def check(run, cfg, text, model, at) -> tuple:
    """Validates: says and logs figures, keeps the best weights. Returns what `figures` returns."""
    metrics, neutral = figures(model, cfg, text, "val", run.world, at.poll)
    where, is_best = f"step {at.step}/{cfg.max_steps}", at.keep_if_best(metrics["val/loss"])
    report(run, cfg, metrics, "val", where, "  -> best" if is_best else "")
    if metrics["val/own/alarm"] and at.late:
        run.say(f"{where}  val  {metrics['val/own/alarm']}")
    names = [name for name in metrics if name.rpartition("/")[2] in ("loss", "perplexity", "accuracy")]
    run.metrics(at.step, {name: metrics[name] for name in names})
    return metrics, neutral


def finish(run, cfg, world, text, model, batches, val=None) -> dict:
    """Checks that the run read what its ledger says; measures the chosen weights on val
    (if not `val`) and test."""
    ledger, seen = batches.ledger(), run.state["seen"]
    planned = {name: source["blocks"] for name, source in ledger["sources"].items()}
    if cfg.max_minutes is None and seen != planned:
        raise RuntimeError(f"the run read {seen} blocks, its ledger says {planned}: start a new one")
    sha256, measured, result = core.weights_sha256(model), run.checkpoint, {}
    if cfg.test_weights == "best":
        measured = run.load_best(model)
    for part in final_parts(cfg):
        known = val if part == "val" else None  # of these very weights
        metrics, neutral = known or figures(model, cfg, text, part, world, run.poll)
        result |= metrics
        if not known:
            report(run, cfg, metrics, part)
            if alarm := metrics[f"{part}/own/alarm"]:
                run.say(f"{part:5} {alarm}")
    core.on_main(world, write_losses, run.folder, neutral, part)
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


def write_losses(folder, neutral, part):
    """Writes losses.jsonl: a line for each window of the neutral text."""
    core.write_lines(folder / "losses.jsonl", neutral.lines(part))


# ------------------------------------------------------------------------------------------------------ study
# Every arm with every seed, one after the other; then all of them on all held-out texts


@dataclass
class DiversityStudy:
    """What the stages of a study share: texts, folder of results, say(line), poll() for signals."""

    cfg: Config
    world: core.World
    text: mixture.Text
    folder: Path
    say: object
    poll: object


DIVERSITY_CONSTANTS = {"probe", "procedure", "sequences", "head_epochs", "fisher_samples", "floor_repeats"}
DIVERSITY_CONSTANTS |= {"diversity_batches", "diversity_batch", "diversity_length"}


def matters(cfg) -> frozenset[str]:
    """Names of the constants that make two runs different."""
    own = (
        {field.name for field in fields(Config)} - DIVERSITY_CONSTANTS - core.MAY_CHANGE - core.CALL_CONSTANTS
    )
    return frozenset(own - {"seeds", "dirty"})


def run_config(cfg, arm, seed) -> Config:
    """The constants of one run of the study. Its tag holds max_steps, which a resume might change."""
    tag = "-".join(filter(None, [cfg.tag, tables.slug(arm), str(cfg.max_steps), f"s{seed}"]))
    run_cfg = replace(cfg, mode="train", data=arm, seed=seed, tag=tag, resume_timestamp="auto")
    # other arms are not its business, but for the sources that its tokenizer is learnt from
    taught = cfg.arms if mixture.is_learnt(cfg.tokenizer) else (arm,)
    names = sorted({name for each in taught for name in mixture.shares_of(each)})
    named = mixture.named_sources(cfg.sources)
    sources = tuple(f"{name}={named[name]}" for name in sorted({*names, cfg.neutral}) if name in named)
    run_cfg = replace(run_cfg, arms=tuple(dict.fromkeys([*names, arm])), sources=sources)
    typed = replace(core.typed(cfg), overrides={})
    return core.with_flags(run_cfg, typed, matters(cfg) | core.typed(cfg).flags & core.MAY_CHANGE)


def study_folder(cfg) -> Path:
    """<out>/study[-tag]-<hash of the constants that its results depend on>/"""
    aside = (core.MAY_CHANGE - {"max_steps"}) | core.CALL_CONSTANTS | {"mode", "data", "dirty"}
    constants = {name: value for name, value in asdict(cfg).items() if name not in aside}
    mark = core.short_hash(constants, 6)
    return core.out_folder(cfg, __file__) / "-".join(filter(None, ["study", cfg.tag, mark]))


def open_study(cfg, world, say, poll) -> DiversityStudy:
    """Opens all text and checks everything before the first step of the first run."""
    diversity_report.pyplot()
    for line in core.override_lines(cfg):
        say(line)
    study = DiversityStudy(cfg, world, open_text(cfg, world), study_folder(cfg), say, poll)
    if cfg.mode != "diversity":
        for arm in cfg.arms:
            batches_of(cfg, arm, study.text, world)
        for name in study.text.tokens:
            for part in final_parts(cfg):
                held_out.held_out_windows(cfg, study.text, name, part)
    if cfg.diversity_batches and cfg.probe == "study":
        check_length(cfg, cfg.block_size)
        draws_of(study, study.text.tokenizer)
    elif cfg.diversity_batches:
        draws_of(study, open_probe(study, {})[1])
    if cfg.mode != "cache":
        core.on_main(world, core.prepare_folder, study.folder)
    if cfg.neutral_share and cfg.mode != "diversity":
        say("NOTE --neutral_share: a document of the neutral text that a source holds too may be trained on")
    return study


def compare_arms(study):
    """Mode study: trains the missing runs, measures and compares all; finished work is found again."""
    cfg, began, trained, runs_by_arm = study.cfg, time.monotonic(), 0, {arm: [] for arm in study.cfg.arms}
    planned = [(cfg.seed + number, arm) for number in range(cfg.seeds) for arm in cfg.arms]
    core.on_main(study.world, check_text, study, planned)
    for number, (seed, arm) in enumerate(planned):
        left = (time.monotonic() - began) / trained * (len(planned) - number) if trained else None
        eta = f"  eta of all {core.clock(left)}" if left else ""
        study.say(f"study  run {number + 1} of {len(planned)}  arm {arm}  seed {seed}{eta}")
        run_cfg = run_config(cfg, arm, seed)
        folder = core.on_main(study.world, finished_run, run_cfg)
        if folder:
            study.say(f"finished already: {folder}")
        else:
            folder, trained = train_one(run_cfg, study), trained + 1
        runs_by_arm[arm].append(Path(folder))
        study.poll()
    notes = core.on_main(study.world, check_runs, study, runs_by_arm)
    study.say("\n".join(notes))
    losses = cross_evaluate(study, runs_by_arm)
    diversity_figures = coefficients(study, runs_by_arm) if cfg.diversity_batches else None
    core.on_main(study.world, conclude, study, runs_by_arm, losses, diversity_figures, notes)


def finished_run(cfg) -> str:
    """Folder of the finished run with these constants, or nothing."""
    return str(core.finished_run(cfg, __file__) or "")


def train_one(cfg, study) -> Path:
    """Trains a run, or resumes it, and returns its folder. Stop if it was stopped."""
    ended = False
    if cfg.compile or study.world.device.type != "cpu":  # each run compiles for itself, as it would alone
        import torch

        torch.compiler.reset()
    with core.Run(cfg, study.world, __file__, unit="tokens") as run:
        run.result = train(run, run.cfg, study.world, study.text)
        ended = True
    if not ended:
        core.barrier(study.world)  # all ranks have read what rank 0 said last, before it leaves
        raise core.Stop("the study")
    return run.folder


def check_text(study, planned):
    """Rank 0: raises UserError for a finished run that read other text than it would read today."""
    for seed, arm in planned:
        run_cfg = run_config(study.cfg, arm, seed)
        if folder := finished_run(run_cfg):
            core.tested_checkpoints(folder)  # UserError where its weights are damaged
            then = core.read_config(folder)["facts"]
            now = run_facts(run_cfg, study.text, batches_of(run_cfg, arm, study.text, study.world))
            odd = [name for name in now if then[name] != now[name]]
            if odd:
                raise core.UserError(
                    f"{folder} read other text ({', '.join(odd)}): move it away, or use --out"
                )


def check_runs(study, runs_by_arm) -> list[str]:
    """Rank 0: lines on what all runs have in common. UserError if a run read other text than it would today,
    or if arms of a seed differ in more than their sources (constants, tokens, first weights)."""
    check_text(
        study, [(study.cfg.seed + number, arm) for number in range(study.cfg.seeds) for arm in runs_by_arm]
    )
    configs = {arm: [core.read_config(folder) for folder in folders] for arm, folders in runs_by_arm.items()}
    for arm, folders in runs_by_arm.items():
        for number, folder in enumerate(folders):
            config, first = configs[arm][number], next(iter(configs.values()))[number]
            odd, names = [], sorted(matters(study.cfg) - {"data", "arms", "sources"})
            odd += [n for n in names if config["constants"].get(n) != first["constants"].get(n)]
            odd += mixture.differences(config["facts"]["ledger"], first["facts"]["ledger"])
            weights = [of["facts"]["initial_weights"] for of in (config, first)]
            odd += ["initial_weights"] * (weights[0] != weights[1])
            if odd:
                pair = f"{next(iter(runs_by_arm.values()))[number]} and {folder}"
                raise core.UserError(f"{pair} differ in {', '.join(odd)}, not in text alone: move one away")
    ledgers = {arm: arm_configs[0]["facts"]["ledger"] for arm, arm_configs in configs.items()}
    ledger = next(iter(ledgers.values()))
    lines = [f"ledger  every run read {ledger['tokens']} tokens in {ledger['steps']} equal steps"]
    distinct = {
        a: sum(source["distinct_blocks"] for source in of["sources"].values()) for a, of in ledgers.items()
    }
    if len(set(distinct.values())) > 1:
        counts = ", ".join(f"{arm} {n}" for arm, n in distinct.items())
        lines.append(f"NOTE by --repeat the arms read unequal numbers of distinct blocks: {counts}")
    for arm, folders in runs_by_arm.items():
        results = [json.loads((folder / "result.json").read_text()) for folder in folders]
        if idle := sum(result["test/own/alarm"] is not None for result in results):
            lines.append(
                f"NOTE NOT LEARNING: {idle} of {len(results)} runs of {arm} do not beat token frequencies"
            )
    counts = {name: tokens.documents["test"] for name, tokens in study.text.tokens.items()}
    few = {
        name: "" if n >= mixture.FEWEST else " (few: intervals by stretch of text)"
        for name, n in counts.items()
    }
    return [
        *lines,
        "tested on documents  " + "  ".join(f"{name} {n}{few[name]}" for name, n in counts.items()),
    ]


# ------------------------------------------------------------------------------------------- cross-evaluation


def cross_evaluate(study, runs_by_arm) -> dict:
    """Measures every run on the test part of every text: arm -> text -> files like
    losses.jsonl, one per seed."""
    losses = {arm: {name: [] for name in study.text.tokens} for arm in runs_by_arm}
    for arm, folders in runs_by_arm.items():
        for folder in folders:
            paths = core.on_main(study.world, cross_files, study, folder)
            missing = core.on_main(study.world, not_there, paths)
            if missing:
                cfg, model, _ = load_model(folder, study.world)
                cfg = replace(cfg, eval_batch=study.cfg.eval_batch)
            for name in missing:
                lines = held_out.measure_text(
                    model, cfg, study.text, shares_of(cfg.data), name, "test", study.world, study.poll
                ).lines("test")
                core.on_main(study.world, core.write_lines, Path(paths[name]), lines)
            for name, path in paths.items():
                losses[arm][name].append(path)
            study.say(f"measured  {folder.name} on {', '.join(paths)}")
    return losses


def not_there(paths) -> list[str]:
    """Names of the files that do not exist yet."""
    return [name for name, path in paths.items() if not Path(path).exists()]


def cross_files(study, folder) -> dict[str, str]:
    """text -> file of a run's losses on it, named by a hash of what they depend on:
    weights, text, windows."""
    weights = json.loads((folder / "result.json").read_text())["test_checkpoints"][0]
    weights = checkpoints.read_manifest(folder / "checkpoints" / weights)["files"]["model.safetensors"]
    paths = {}
    for name, tokens in study.text.tokens.items():
        key = [weights, tokens.fingerprint, len(tokens.parts["test"]), study.cfg.block_size]
        file = f"{folder.name}-{name}-{core.short_hash(key, 12)}.jsonl"
        paths[name] = str(core.out_folder(study.cfg, __file__) / "cross" / file)
    return paths


# -------------------------------------------------------------------------------------- diversity coefficient


def open_probe(study, runs_by_arm):
    """(model, tokenizer) of cfg.probe; `study`: the last arm's first run, of
    runs_by_arm or finished before."""
    cfg, name = study.cfg, study.cfg.probe
    if name == "study":
        run_cfg, arm = run_config(cfg, cfg.arms[-1], cfg.seed), cfg.arms[-1]
        folders = runs_by_arm.get(arm, [])[:1] or [core.on_main(study.world, finished_run, run_cfg)]
        if not (name := str(folders[0])):
            raise core.UserError(f"--probe study: arm {arm} has no finished run: train it, or name a probe")
    try:
        probe, tokenizer = core.main_first(study.world, core.open_model, name)
    except core.UserError as error:
        raise core.UserError(f"--probe: {error}; or --probe study, a model of the study's own") from None
    check_length(cfg, probe.config.block_size)
    if tokenizer.eos_token_id is None or probe.config.head_bias:
        lacks = "an output bias" if probe.config.head_bias else "no end-of-text token"
        raise core.UserError(f"--probe {name} has {lacks}: use a GPT-2 or a run without --head_bias")
    # the squares of small gradients leave no room for halves
    dtype = "fp64" if cfg.dtype == "fp64" else "fp32"
    return core.Precision(dtype, study.world).prepare(probe).eval(), tokenizer


def check_length(cfg, most):
    if cfg.diversity_length > most:
        raise core.UserError(f"--diversity_length {cfg.diversity_length} is over the probe's {most} tokens")


def draws_of(study, tokenizer) -> diversity.Draws:
    """The batches to embed, in tokens of the probe. UserError if a source is too small."""
    same = core.tokenizer_fingerprint(tokenizer) == core.tokenizer_fingerprint(study.text.tokenizer)
    text = study.text if same else reread(study, tokenizer)
    arms = {arm: shares_of(arm) for arm in study.cfg.arms}
    sequences = diversity.sequences_of(study.cfg, text, {name for shares in arms.values() for name in shares})
    return diversity.Draws(study.cfg, arms, sequences, len(tokenizer), tokenizer.eos_token_id)


def reread(study, tokenizer) -> mixture.Text:
    """The sources' text, tokenised for the probe."""
    folder = core.cache_root() / f"probe_tokenizer_{core.tokenizer_fingerprint(tokenizer)[:16]}"
    name = core.on_main(study.world, core.cached_folder, folder, save_tokenizer, tokenizer)
    return mixture.open_text(sources_of(study.cfg), name, {}, study.world)


def save_tokenizer(folder, tokenizer):
    tokenizer.save_pretrained(folder)


def coefficients(study, runs_by_arm) -> dict:
    """The diversity coefficients of all arms."""
    probe, tokenizer = open_probe(study, runs_by_arm)
    folder = core.out_folder(study.cfg, __file__) / "embeddings"
    with core.Precision("fp32", study.world).products():  # not even in TF32
        return diversity.measure(
            study.cfg, draws_of(study, tokenizer), probe, folder, study.world, study.say, study.poll
        )


# --------------------------------------------------------------------------------------------- what comes out


def conclude(study, runs_by_arm, losses, diversity_figures, notes):
    """Rank 0: writes study.md, study.json, matrix.png, link.png, and prints the tables."""
    figures, seeds, neutral = diversity_report.cells(losses), study.cfg.seeds, neutral_of(study.cfg)
    sentences, differences = diversity_report.verdicts(losses, seeds)
    folders = {arm: [str(folder) for folder in arm_folders] for arm, arm_folders in runs_by_arm.items()}
    parts = [diversity_report.heading(folders, core.git_state()["commit"]), "\n".join([*notes, *sentences])]
    parts.append(diversity_report.tables(figures, seeds))
    study.say("\n" + diversity_report.tables({"loss": figures["loss"]}, seeds) + "\n")
    study.say("\n".join(sentences))
    diversity_report.heat_map(figures["loss"], study.folder / "matrix.png", neutral, seeds)
    content = {"runs": folders, "matrix": figures, "differences": differences, "diversity": diversity_figures}
    content |= {"notes": notes, "constants": asdict(study.cfg)}
    if diversity_figures:
        tables = (
            diversity_report.diversity_table(diversity_figures),
            diversity_report.link_table(diversity_figures, neutral, figures, seeds, losses),
        )
        parts += [f"**diversity coefficient**\n\n{tables[0]}", f"**diversity and loss**\n\n{tables[1]}"]
        study.say("\n" + "\n\n".join(tables))
        diversity_report.plot_link(diversity_figures, figures["loss"], neutral, study.folder / "link.png")
    core.write_json(study.folder / "study.json", content)
    with core.whole_file(study.folder / "study.md") as file:
        file.write("\n\n".join(parts) + "\n")
    pictures = "matrix.png, link.png" if diversity_figures else "matrix.png"
    study.say(f"done  tables: {study.folder}/study.md  pictures: {pictures} there")
    study.say(f"next: python eval.py --table {study.folder.parent}")


# ------------------------------------------------------------------------------------------------------- main


def cache(study):
    """Mode cache: says how many tokens the texts have become, enough for every arm."""
    texts = study.text.tokens
    parts = {part: [f"{len(tokens.parts[part]):,}" for tokens in texts.values()] for part in core.PARTS}
    documents = [f"{sum(tokens.documents.values()):,}" for tokens in texts.values()]
    study.say(tables.markdown({"text": list(texts), "documents": documents, **parts}))
    for name, tokens in texts.items():
        for line in tokens.lines:
            study.say(f"{name}  {line}")
    study.say(f"tokens of {len(texts)} texts, enough for every arm: {core.cache_root()}")


def coefficient_only(study):
    """Mode diversity: the coefficients of the arms, without training."""
    figures = coefficients(study, {arm: [] for arm in study.cfg.arms})

    def write():
        core.write_json(study.folder / "diversity.json", figures)
        with core.whole_file(study.folder / "diversity.md") as file:
            file.write(diversity_report.diversity_table(figures) + "\n")
        study.say(diversity_report.diversity_table(figures))
        study.say(f"done  {study.folder}/diversity.md")

    core.on_main(study.world, write)


@record
def main(cfg, world):
    cfg = core.with_dtype(cfg, world)
    if not cfg.dirty:
        core.on_main(world, core.refuse_dirty)
    if cfg.mode in ONE_ARM:
        with core.Run(cfg, world, __file__, unit="tokens") as run:
            run.result = train(run, run.cfg, world)
        return run.result

    def say(text):
        if world.is_main:
            print(text, flush=True)

    with core.listening(world) as poll:
        work = {"study": compare_arms, "cache": cache, "diversity": coefficient_only}[cfg.mode]
        try:
            work(open_study(cfg, world, say, poll))
        except core.Stop:
            say("next: the same command goes on where it was")
            raise


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
