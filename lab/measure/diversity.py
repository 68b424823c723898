"""The diversity coefficient of a study's arms: draws batches, embeds them over all ranks, compares.

An embedding is kept under a hash of all that it depends on, the sequences included: none is made twice, a
killed job continues, and a stale one is never used."""

import contextlib
import hashlib
import math
import time

import numpy as np

from lab.data.cache import cache_root, cached_folder
from lab.data.mixture import apportion, labelled_shares, open_text, source_order
from lab.data.text import words_of
from lab.data.tokenizers import id_count
from lab.errors import UserError
from lab.measure import task2vec
from lab.measure.task2vec import (
    Batch,
    Sequences,
    coefficient,
    coefficient_interval,
    cross_interval,
    distances,
    joined,
    pairwise,
    synthetic,
)
from lab.models.pretrained import open_model
from lab.run.checkpoints import weights_sha256
from lab.run.files import short_hash, whole_file
from lab.run.meter import clock
from lab.train.batches import reseed
from lab.train.precision import Precision
from lab.train.processes import barrier, main_first, on_main, progress

BOUNDS = ("lower bound", "upper bound")
BOUND_BATCHES = 20  # of each synthetic bound, at most
FLOOR_BATCHES = 3  # of each arm are embedded floor_repeats times


def open_probe(cfg, name, world):
    """(model, tokenizer) of a run, a folder or a Hub id. UserError for a probe that cannot embed."""
    try:
        probe, tokenizer = main_first(world, open_model, name)
    except UserError as error:
        raise UserError(f"--probe: {error}; or --probe study, a model of the study's own") from None
    check_length(cfg, probe.config.block_size)
    if tokenizer.eos_token_id is None or probe.config.head_bias:
        lacks = "an output bias" if probe.config.head_bias else "no end-of-text token"
        raise UserError(f"--probe {name} has {lacks}: use a GPT-2 or a run without --head_bias")
    # the squares of small gradients leave no room for halves
    dtype = "fp64" if cfg.dtype == "fp64" else "fp32"
    return Precision(dtype, world).prepare(probe).eval(), tokenizer


def check_length(cfg, most):
    if cfg.diversity_length > most:
        raise UserError(f"--diversity_length {cfg.diversity_length} is over the probe's {most} tokens")


def draws_of(cfg, text, corpora, tokenizer, world) -> "Draws":
    """The batches to embed, in tokens of the probe: `text` is read again from its corpora for another
    tokenizer than its own. UserError if a source is too small."""
    if words_of(tokenizer) != words_of(text.tokenizer):
        folder = cache_root() / f"probe_tokenizer_{short_hash(words_of(tokenizer))}"
        name = on_main(world, cached_folder, folder, save_tokenizer, tokenizer)
        text = open_text(corpora, name, {}, world)
    arms = {arm: labelled_shares(arm) for arm in cfg.arms}
    sequences = sequences_of(cfg, text, {name for shares in arms.values() for name in shares})
    return Draws(cfg, arms, sequences, id_count(tokenizer), tokenizer.eos_token_id)


def save_tokenizer(folder, tokenizer):
    tokenizer.save_pretrained(folder)


def sequences_of(cfg, text, names) -> dict[str, Sequences]:
    """The sequences of each source's training tokens, from which batches are drawn."""
    how = {"end": text.tokenizer.eos_token_id, "length": cfg.diversity_length, "kind": cfg.sequences}
    return {name: Sequences(text.tokens[name].parts["train"], **how) for name in names}


class Draws:
    """Batch i of every arm and of the two synthetic bounds, a pure function of the seed.

    The batches of an arm share no sequence. arms: arm -> source -> share. UserError for too small a source.
    """

    def __init__(self, cfg, arms, sequences, vocab_size, end):
        self.cfg, self.arms, self.sequences, self.vocab_size, self.end = cfg, arms, sequences, vocab_size, end
        self.names = [*arms, *BOUNDS]
        self.orders = {arm: self._orders(arm, shares) for arm, shares in arms.items()}

    def _orders(self, arm, shares) -> dict[str, np.ndarray]:
        """source -> (batches, sequences of it in a batch)"""
        counts, orders = apportion(list(shares.values()), self.cfg.diversity_batch), {}
        for name, count in zip(shares, counts, strict=True):
            n, there = count * self.cfg.diversity_batches, len(self.sequences[name])
            if n > there:
                has = f"{name} has {there} sequences of {self.cfg.diversity_length} tokens"
                better = "use fewer --diversity_batches, smaller ones, or more text"
                better += ", or --sequences pieces" * (self.cfg.sequences == "documents")
                raise UserError(f"{has}, {n} are asked for: {better}")
            order = source_order(self.cfg.seed, f"{arm} draws {name}", there, n, n)
            orders[name] = order.reshape(self.cfg.diversity_batches, count)
        return orders

    def count(self, name) -> int:
        most = BOUND_BATCHES if name in BOUNDS else self.cfg.diversity_batches
        return min(most, self.cfg.diversity_batches)

    def batch(self, name, i) -> Batch:
        if name in self.arms:
            return joined([self.sequences[n].batch(o[i]) for n, o in self.orders[name].items()])
        others = np.delete(np.arange(self.vocab_size), self.end)
        one = int(np.random.default_rng(self.cfg.seed).choice(others))  # the same in all batches
        rng, token = np.random.default_rng([self.cfg.seed, i]), one if name == "lower bound" else None
        shape = self.cfg.diversity_batch, self.cfg.diversity_length
        return synthetic(shape, self.vocab_size, self.end, rng, token)


def measure(cfg, draws, probe, folder, world, say, poll) -> dict:
    """Makes the missing embeddings, spread over the ranks, and returns the figures of all arms."""
    weights = on_main(world, weights_sha256, probe)
    jobs = on_main(world, plan, cfg, draws, weights, probe.wte.weight.dtype)
    missing = on_main(world, not_embedded, jobs, folder)
    if missing:
        say(f"diversity  {len(missing)} of {len(jobs)} embeddings to make, procedure {cfg.procedure}")

    def embed(job):
        name, i, file, drawn = job
        reseed(drawn)  # the same targets on whichever rank, and whatever the probe's last digits
        choice = {"epochs": cfg.head_epochs, "samples": cfg.fisher_samples}
        vector = task2vec.embed(probe, draws.batch(name, i), draws.end, cfg.procedure, **choice)
        if not np.isfinite(vector).all():
            raise FloatingPointError(f"batch {i} of {name} has no finite embedding: is the probe whole?")
        keep(folder / file, vector)

    share_out(missing, embed, world, say, poll)
    return on_main(world, figures, cfg, draws, jobs, folder)


def not_embedded(jobs, folder) -> list:
    """The jobs without a file in `folder`. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [job for job in jobs if not (folder / job[2]).exists()]


def plan(cfg, draws, weights, dtype) -> list[tuple[str, int, str, str]]:
    """Lists all embeddings: (arm or bound, batch, file, seed of its targets); repeats of
    a batch are neighbours."""
    places = [(name, i) for name in draws.names for i in range(draws.count(name))]
    jobs = []
    for name, i in sorted(places, key=lambda place: place[1]):  # round by round: an early look sees all arms
        again = cfg.floor_repeats if name in draws.arms and i < FLOOR_BATCHES else 1
        ids = hashlib.sha256(draws.batch(name, i).ids.numpy().tobytes()).hexdigest()
        how = [weights, str(dtype), cfg.procedure, cfg.head_epochs, cfg.fisher_samples, cfg.seed, i, ids]
        for repeat in range(again):
            file = f"{short_hash([*how, repeat], 24)}.npy"
            jobs.append((name, i, file, f"{cfg.seed}/{i}/{ids}/{repeat}"))  # equal batches draw apart, too
    return jobs


def share_out(jobs, work, world, say, poll):
    """Calls work(job) for each job, spread over the ranks, and polls in between; a line at every tenth."""
    began, told, size = time.monotonic(), 0, world.size
    with progress(len(jobs), "embedding", world) as bar:
        for start in range(0, len(jobs), size):
            poll()
            spent = time.monotonic() - began
            if start * 10 // len(jobs) > told and spent > 10:
                told = start * 10 // len(jobs)
                say(f"embedded  {start} of {len(jobs)}  eta {clock(spent * (len(jobs) / start - 1))}")
            for job in jobs[start : start + size][world.rank :: size]:
                work(job)
            bar.update(size)
    barrier(world)


def figures(cfg, draws, jobs, folder) -> dict:
    """Rank 0: coefficients of arms and bounds with interval and noise floor; distances between arms."""
    result, vectors = {"arms": {}, "bounds": {}, "cross": {}}, {}
    for name in draws.names:
        files = [[file for n, i, file, _ in jobs if (n, i) == (name, at)] for at in range(draws.count(name))]
        opened = [[kept(folder / file) for file in batch_files] for batch_files in files]
        vectors[name] = [repeats[0] for repeats in opened]
        table = pairwise(vectors[name])
        arm_figures = {"coefficient": coefficient(table), "interval": coefficient_interval(table)}
        arm_figures |= {"batches": len(files), "length": len(vectors[name][0])}
        if name in draws.arms:
            floors = [coefficient(pairwise(again)) for again in opened[:FLOOR_BATCHES]]
            arm_figures |= {"noise_floor": sum(floors) / len(floors), "noise_floors": floors}
        result["bounds" if name in BOUNDS else "arms"][name] = arm_figures
    arms = list(draws.arms)
    for a, b in [(a, b) for i, a in enumerate(arms) for b in arms[i + 1 :]]:
        result["cross"][f"{a} x {b}"] = pair(vectors[a], vectors[b], result["arms"][a], result["arms"][b])
    return result | {"procedure": cfg.procedure, "probe": str(cfg.probe)}


def keep(path, vector):
    """Writes an embedding with its hash behind it, where np.load does not look."""
    with whole_file(path, "wb") as out:
        np.save(out, vector)
        out.write(digest_of(vector))


def kept(path) -> np.ndarray:
    """An embedding, mapped into memory. UserError where it is not as it was written."""
    with contextlib.suppress(Exception):  # np.load of a damaged header: TokenError, SyntaxError and others
        vector = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(vector.offset + vector.nbytes)
            if file.read() in (b"", digest_of(vector)):  # those of before 2026-11-28 have none
                return vector
    raise UserError(f"{path} is damaged: delete it, and the same command makes it anew")


def digest_of(vector) -> bytes:
    digest = hashlib.sha256(f"{vector.dtype.str} {vector.shape}".encode())
    digest.update(vector)
    return digest.digest()


def pair(first, second, a, b) -> dict:
    """Mean distance between the batches of two arms, and the difference of their
    coefficients, with intervals."""
    table = distances(first, second)
    halves = [(arm["interval"][1] - arm["interval"][0]) / 2 for arm in (a, b)]
    difference, half = a["coefficient"] - b["coefficient"], math.hypot(*halves)
    return {
        "coefficient": float(table.mean()),
        "interval": cross_interval(table),
        "difference": difference,
        "difference_interval": [difference - half, difference + half],
    }
