"""Several texts as one: named sources, mixtures of them, their token caches, batches with fixed shares.

An arm is written `pubmed`, `pubmed+uspto` (equal shares) or `0.7*pubmed+0.3*uspto`. Everything but the source
is the same in all arms of a seed: the ledger says what each one read, and is checked.
"""

import functools
import hashlib
import itertools
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from lab.data import blocks
from lab.data.blocks import Windows
from lab.data.builtin import BUILT_IN
from lab.data.cache import BadRows, cache_root, cached_folder
from lab.data.paths import stem_of
from lab.data.text import TEXT_CACHE_VERSION, Corpus, Tokens, open_corpus, split_pieces, text_fingerprint
from lab.data.tokenizers import is_built_in, make_tokenizer, token_bytes, tokenizer_fingerprint
from lab.errors import UserError
from lab.run.files import is_there, short_hash
from lab.train.device import to_device
from lab.train.processes import on_main
from lab.train.waits import waiting


def named_sources(pairs) -> dict[str, str]:
    """("pubmed=owner/set:config", ...) -> {name: where the text is}. UserError for one without a name."""
    sources = {}
    for pair in pairs:
        name, equals, where = pair.partition("=")
        if not equals or not where or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"--sources {pair}: write name=where, e.g. pubmed=abstracts.jsonl")
        if sources.setdefault(name, where) != where:
            raise UserError(f"--sources: {name} is both {sources[name]} and {where}: use two names")
    return sources


def shares_of(arm) -> dict[str, float]:
    """`0.7*a+0.3*b` -> {a: 0.7, b: 0.3}; without weights all are equal. UserError unless they add up to 1."""
    terms = [term.strip().rpartition("*") for term in arm.split("+")]
    names = [name.strip() for _, _, name in terms]
    if not all(names):
        raise UserError(f"arm {arm!r} has a part without a name: write a, a+b, or 0.7*a+0.3*b")
    if len(set(names)) < len(names):
        raise UserError(f"arm {arm} names a source twice: name each once, with a weight")
    given = [weight for weight, times, _ in terms if times]
    if given and len(given) < len(names):
        raise UserError(f"arm {arm}: give every source a weight, or none")
    try:
        weights = [float(weight) for weight in given] or [1 / len(names)] * len(names)
    except ValueError:
        raise UserError(f"arm {arm}: a weight is no number: write 0.7*a+0.3*b") from None
    if not all(w > 0 for w in weights) or not abs(sum(weights) - 1) <= TOLERANCE * len(names):
        line = f"the weights of arm {arm} add up to {sum(weights):g}"
        raise UserError(f"{line}: make it 1, with every weight above 0")
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


ONE_ARM = ("train", "find_lr")  # modes that read the text of one arm, cfg.data; others read all of cfg.arms
TOLERANCE = 0.0034  # of each weight: .33 three times is meant as a third each


def label(name) -> str:
    """Short name of a source in files and tables, where it is a path or a Hub id."""
    if "/" not in name and not is_there(name):
        return name
    return stem_of(name.partition("@")[0].rstrip("/").rpartition("/")[2])


def labelled_shares(arm) -> dict[str, float]:
    """Source label -> share of an arm. UserError if two sources have the same label."""
    shares = shares_of(arm)
    if len(labelled := {label(name): share for name, share in shares.items()}) < len(shares):
        raise UserError(
            f"arm {arm}: two sources have the same name, give them others by --sources name=where"
        )
    return labelled


def address(named, name, flag) -> str:
    """Where a text is: as --sources says, or the name itself. UserError if it can be neither."""
    known = name in named or "/" in name or name in BUILT_IN or is_there(name)
    if not name or not known:
        names = ", ".join([*named, *BUILT_IN])
        raise UserError(f"{flag} {name!r}: no such text; use {names}, a path, or --sources {name}=where")
    return named.get(name, name)


@dataclass
class Text:
    """The token caches of all sources, one tokenizer."""

    tokens: dict[str, Tokens]  # by label
    tokenizer: object

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(V,): bytes of text that each id spells."""
        return token_bytes(self.tokenizer)

    def fingerprint(self, neutral, sources) -> dict:
        """Hashes of the tokenizer, the neutral text (as `data`: runs are compared on it) and some sources."""
        hashes = {name: tokens.fingerprint["data"] for name, tokens in self.tokens.items()}
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        sources = {name: hashes[name] for name in sources}
        return {"tokenizer": tokenizer, "data": hashes[neutral], "sources": sources}

    def frequencies(self, shares) -> np.ndarray:
        """(V,): expected count of each id in a hundred million tokens of a mixture."""
        counts = {name: self.tokens[name].unigram for name in shares}
        return sum(share * counts[name] / counts[name].sum() for name, share in shares.items()) * 1e8


def open_text(corpora, tokenizer, learns_from, world) -> Text:
    """Opens the tokens of every Corpus (by label), cached by rank 0. A tokenizer that is trained (bpe, chars)
    reads equally much of every Corpus in `learns_from`."""
    if is_learnt(tokenizer):
        tokenizer = on_main(world, shared_tokenizer, tokenizer, learns_from)
    corpora = {name: replace(corpus, tokenizer=tokenizer) for name, corpus in corpora.items()}
    opened = {name: open_corpus(corpus, world) for name, corpus in corpora.items()}
    return Text(opened, next(iter(opened.values())).tokenizer)


def is_learnt(tokenizer) -> bool:
    return is_built_in(tokenizer) and tokenizer not in ("ascii", "bytes")


def sources_of(cfg) -> dict[str, Corpus]:
    """Source label -> Corpus, for all arms. UserError for a source that is nowhere."""
    named, sources = named_sources(cfg.sources), {}
    # each source holds a whole pool, whatever its share: what an arm reads does not depend on other arms
    pool = math.ceil(cfg.max_steps * cfg.batch / cfg.passes) * cfg.block_size + cfg.block_size
    # a run that belongs to a study shares its tokenizer, which all arms' sources may teach
    alone = cfg.mode in ONE_ARM and (cfg.data not in cfg.arms or not is_learnt(cfg.tokenizer))
    arms = (cfg.data,) if alone else cfg.arms
    for name in dict.fromkeys(name for arm in arms for name in shares_of(arm)):
        where = address(named, name, "--data" if alone else "--arms")
        corpus = corpus_of(cfg, where, max_tokens=cfg.max_tokens or pool)
        if sources.setdefault(label(name), corpus) != corpus:
            raise UserError(f"two sources are called {label(name)}: name them by --sources name=where")
    return sources


def neutral_corpus(cfg) -> Corpus:
    """Corpus of the neutral text, streamed as far as its held-out part needs."""
    where = address(named_sources(cfg.sources), cfg.neutral, "--neutral")
    shares = {"val_share": cfg.neutral_share, "test_share": cfg.neutral_share} if cfg.neutral_share else {}
    return corpus_of(cfg, where, max_tokens=0, streaming="True", **shares)


def corpus_of(cfg, where, **given) -> Corpus:
    """A text as all of a study are read and split. given: fields in which it differs."""
    shared = ("text_column", "max_documents", "streaming", "tokenizer")
    shared += ("val_share", "test_share", "split_seed", "held_out_tokens")
    fields = {name: getattr(cfg, name) for name in shared} | given
    # by the hash alone: a document is held out of every source, or of none
    return Corpus(where, first_trains=False, **fields)


def load_text(cfg, world) -> Text:
    """Token caches of the sources that cfg reads and, last, of the neutral text; built if need be. UserError
    if two texts are the same."""
    sources, neutral = sources_of(cfg), label(cfg.neutral)
    names = [*(labelled_shares(cfg.data) if cfg.mode in ONE_ARM else sources)]
    wanted = {name: sources[name] for name in names}
    if cfg.mode != "diversity":
        wanted[neutral] = neutral_corpus(cfg)
        if neutral in sources:
            raise UserError(f"--neutral {cfg.neutral} is trained on by an arm: use a third text")
    text = open_text(wanted, cfg.tokenizer, sources, world)
    names = {}
    for name, tokens in text.tokens.items():
        if (other := names.setdefault(tokens.fingerprint["data"], name)) != name:
            raise UserError(f"{other} and {name} are the same text: sources and --neutral must differ")
    return text


LEARNT_FROM = 5_000_000  # characters of each source


def shared_tokenizer(kind, corpora) -> str:
    """A folder in the token cache with the tokenizer (bpe:<size>, chars ...) that all arms share."""
    corpora = dict(sorted(corpora.items()))  # a study and its runs name them in other orders
    sources = {name: [text_fingerprint(corpus), repr(corpus)] for name, corpus in corpora.items()}
    folder = cache_root() / f"tokenizer_{short_hash([TEXT_CACHE_VERSION, kind, sources])}"

    def texts():
        for corpus in corpora.values():
            room = LEARNT_FROM
            for part, text, _ in split_pieces(corpus, BadRows()):
                if part == "train" and room > 0:
                    yield text[:room]
                    room -= len(text)
                if room <= 0:
                    break

    return cached_folder(folder, write_tokenizer, kind, texts)


def write_tokenizer(folder, kind, texts):
    make_tokenizer(kind, texts).save_pretrained(folder)


def windows_of(tokens, part, context) -> tuple[Windows, np.ndarray]:
    """Documents of val or test in windows of `context` tokens, each from its own beginning. Also the group of
    each window, for intervals: its document."""
    stream = tokens.parts[part]
    ends = np.flatnonzero(stream == tokens.tokenizer.eos_token_id)
    documents = [stream[start : end + 1] for start, end in itertools.pairwise(ends)]
    windows = Windows(documents, context, context)
    return windows, windows.groups()


class MixedBlocks:
    """Blocks of several sources, numbered in one row: first those of the first source, and so on."""

    def __init__(self, streams, block_size):
        """streams: name -> tokens (N,); a last block that is not full is left out."""
        self.names, self.block_size = list(streams), block_size
        self.of = [blocks.Blocks(stream, block_size) for stream in streams.values()]
        self.counts = [max(0, len(stream) - 1) // block_size for stream in streams.values()]
        self.starts = np.cumsum([0, *self.counts])

    def __len__(self):
        return int(self.starts[-1])

    def targets(self, rows) -> np.ndarray:
        """Number of tokens that each block predicts: all its tokens."""
        return np.full(len(rows), self.block_size)

    def source(self, rows) -> np.ndarray:
        """Index of the source of each row."""
        return np.searchsorted(self.starts, np.asarray(rows, dtype=int), side="right") - 1

    @waiting("data")
    def batch(self, rows, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, block_size); labels on the host."""
        ids = np.stack([self.tokens(row) for row in rows]).astype(np.int64)
        ids = torch.from_numpy(ids)
        return to_device(ids[:, :-1], device), ids[:, 1:]

    def tokens(self, row) -> np.ndarray:
        """(block_size + 1,)"""
        source = int(self.source([row])[0])
        start = (row - int(self.starts[source])) * self.block_size
        return self.of[source].tokens[start : start + self.block_size + 1]


class Batches:
    """Rows of every global batch, a pure function of (seed, step); rank r takes every size-th row.

    Slots are shared out evenly: batch 4 of 0.75 a + 0.25 b is a a b a. Each source has its own order of
    blocks, whose first pass is the same in all arms.
    passes: the run reads a pool of 1 / passes of the blocks so many times, reshuffled each time.
    repeat: a source that has too few blocks is read more often; otherwise UserError.
    """

    def __init__(self, blocks, shares, batch, steps, world, seed, passes=1, repeat=False):
        self.blocks, self.batch, self.steps, self.world = blocks, batch, steps, world
        self.lengths = blocks.targets(range(len(blocks)))
        self.wanted = apportion([shares[name] for name in blocks.names], batch * steps)
        # equally many distinct blocks in every arm, whatever its number of sources
        self.pools = apportion([shares[name] for name in blocks.names], math.ceil(batch * steps / passes))
        for name, there, pool in zip(blocks.names, blocks.counts, self.pools, strict=True):
            if pool and not there:
                raise UserError(f"{name} holds no block of training text: use more or other text")
            if pool > there and not repeat:
                has = f"{name} has {there} blocks of {blocks.block_size} training tokens"
                better = "use fewer --max_steps, more text, more --passes, or --repeat"
                raise UserError(f"{has}, {pool} are asked for: {better}")
        self.pools = np.minimum(np.maximum(self.pools, np.sign(self.wanted)), blocks.counts).tolist()
        self.rows, owner = np.zeros(batch * steps, dtype=np.int64), interleave(self.wanted)
        for source, (name, n) in enumerate(zip(blocks.names, self.wanted, strict=True)):
            order = source_order(seed, name, blocks.counts[source], n, self.pools[source])
            self.rows[owner == source] = blocks.starts[source] + order

    def __len__(self):
        return self.steps

    def global_batch(self, step) -> np.ndarray:
        return self.rows[step * self.batch : (step + 1) * self.batch]

    def rank_batch(self, step) -> list[int]:
        """This rank's share of global batch `step`; it may be empty."""
        return self.global_batch(step)[self.world.rank :: self.world.size].tolist()

    def longest(self) -> np.ndarray:
        """All rows, longest first: they are all equally long."""
        return np.arange(len(self.blocks))

    def seen(self, step) -> dict[str, int]:
        """Number of blocks of each source in global batch `step`."""
        counts = np.bincount(self.blocks.source(self.global_batch(step)), minlength=len(self.blocks.names))
        return dict(zip(self.blocks.names, counts.tolist(), strict=True))

    def ledger(self) -> dict:
        """What the run will read, as figures; the same for all arms of a study, except `sources`."""
        size, sources = self.blocks.block_size, {}
        for source, name in enumerate(self.blocks.names):
            rows = self.rows[self.blocks.source(self.rows) == source] - self.blocks.starts[source]
            n, pool = self.wanted[source], self.pools[source]
            sources[name] = {
                "share": n / max(1, len(self.rows)),
                "blocks": n,
                "tokens": n * size,
                "distinct_blocks": pool,
                "epochs": n / max(1, pool),
                "first_block": int(rows[0]) if n else None,
                "last_block": int(rows[-1]) if n else None,
                "order_sha256": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
            }
        total = {"steps": self.steps, "batch": self.batch, "block_size": size}
        return total | {"blocks": len(self.rows), "tokens": len(self.rows) * size, "sources": sources}


def apportion(shares, n) -> list[int]:
    """Splits n into whole numbers in proportion to `shares`; largest remainders get the rest."""
    exact = np.asarray(shares) * n
    counts = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: n - counts.sum()]:
        counts[i] += 1
    return counts.tolist()


def interleave(counts) -> np.ndarray:
    """(sum of counts,): each i counts[i] times, spread evenly."""
    when = np.concatenate([(np.arange(n) + 0.5) / max(1, n) for n in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(when, kind="stable")]


def source_order(seed, name, blocks, n, pool) -> np.ndarray:
    """(n,): a pool of a source's blocks drawn by the seed, reshuffled for each pass over it."""

    def shuffled(number, among) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(among)

    first = shuffled(0, blocks)[:pool]
    again = (shuffled(number, first) for number in range(1, math.ceil(n / max(1, pool))))
    return np.concatenate([first, *again])[:n]


def differences(first, second) -> list[str]:
    """Names of ledger figures that should be equal in two arms (all except `sources`) and are not."""
    return [name for name in first if name != "sources" and first[name] != second[name]]
