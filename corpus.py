"""Text becomes token ids: built-in text, tokenizers, the token cache, blocks.

A Corpus says which text, how it is split and how it is tokenised; open_corpus gives its Tokens: one stream of
ids for each of train, val and test, mapped into memory. Blocks cuts a stream into rows for a language model.
"""

import ast
import contextlib
import fcntl
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import platform
import re
import string
import sysconfig
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import core

# ----------------------------------------------------------------------------------------- built-in text
# What every Python installation carries: a fresh machine may have no network.

BUILT_IN = ("python-docs", "python-code", "numpy-docs")


def built_in_texts(name):
    """Yields the texts of python-docs (help topics, docstrings), python-code (sources of the library) or
    numpy-docs (docstrings of a package that every installation of this project has)."""
    if name == "python-docs":
        from pydoc_data.topics import topics

        yield from (topics[topic] for topic in sorted(topics))
    for path in _numpy_files() if name == "numpy-docs" else _library_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        if name == "python-code":
            yield source
        else:
            yield from _docstrings(source)


def _library_files() -> list[Path]:
    """Modules of the standard library: no tests, no installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
    skipped.add("ensurepip")
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*.py")))
    return [folder / path for path in files if not skipped & set(path.parts)]


def _numpy_files() -> list[Path]:
    folder = Path(np.__file__).parent
    return [path for path in sorted(folder.rglob("*.py")) if "tests" not in path.parts]


def _docstrings(source):
    """Those of modules, classes and functions with at least three words."""
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) > 2:
                    yield text


# --------------------------------------------------------------------------------------------- tokenizers

END = "<|endoftext|>"  # stands between documents; GPT-2's own name for it


def make_tokenizer(name, texts):
    """The transformers tokenizer of a name; `texts()` yields the training text that chars and bpe learn from.

    chars | ascii | bytes | bpe:<size> | bpe_scratch:<size> | Hub id or folder. eos_token_id ends a document.
    """
    kind, _, size = name.partition(":")
    if kind in ("bpe", "bpe_scratch") and not (size.isdigit() and int(size) > 256):
        raise core.UserError(f"--tokenizer {name}: use {kind}:<size> with a size over 256, e.g. {kind}:2048")
    if kind == "chars":
        seen = set()
        for text in texts():
            seen.update(text)
        return characters(sorted(seen))
    if kind == "ascii":
        return characters(sorted(set(string.printable.lower())), plain=True)
    if kind == "bytes":
        return byte_level({symbol: i for i, symbol in enumerate([END, *sorted(BYTES.values())])}, [])
    if kind == "bpe":
        return trained_bpe(texts(), int(size))
    if kind == "bpe_scratch":
        scratch = ScratchBPE.train(texts(), int(size))
        return byte_level(scratch.vocabulary, list(scratch.merges))
    return named_tokenizer(name)


def is_built_in(name) -> bool:
    return name.partition(":")[0] in ("chars", "ascii", "bytes", "bpe", "bpe_scratch")


def named_tokenizer(name, built_in="chars, ascii, bytes or bpe:2048 (built in)"):
    """That of a Hub id or folder, if it can end a document; `built_in` is what an error recommends."""
    tokenizer = core.pretrained_tokenizer(name, built_in)
    if tokenizer.eos_token_id is None:
        raise core.UserError(f"tokenizer of {name} has no end-of-text token: use one of a language model")
    return tokenizer


def characters(symbols, plain=False):
    """One id per character. plain: accents and case go, and what is not ASCII then becomes `?` (journal 003
    also lower-cased ASCII); otherwise a character the training text lacks is <unk>."""
    import tokenizers
    from tokenizers import normalizers

    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, END, *([] if plain else ["<unk>"])])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="?" if plain else "<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if plain:
        steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
        steps.append(normalizers.Replace(tokenizers.Regex(r"[^\x20-\x7e\t-\r]"), "?"))
        tokenizer.normalizer = normalizers.Sequence(steps)
    return fast(tokenizer, unk_token=None if plain else "<unk>")


def byte_level(vocabulary, merges):
    import tokenizers

    return fast(byte_level_rules(tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))))


def trained_bpe(texts, size):
    import tokenizers

    tokenizer = byte_level_rules(tokenizers.Tokenizer(tokenizers.models.BPE()))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )  # its own bar panics where the terminal is gone
    with core.progress(None, "reading texts for a tokenizer") as bar:
        tokenizer.train_from_iterator(_counted(texts, bar), trainer)
    return fast(tokenizer)


def _counted(texts, bar):
    for text in texts:
        bar.update()
        yield text


def byte_level_rules(tokenizer):
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fast(tokenizer, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **special)


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-ins: a byte that prints stands for itself, the others for 256 and on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printing)
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES = byte_symbols()


def token_bytes(tokenizer) -> np.ndarray:
    """(V,): UTF-8 bytes of text that each id spells: special tokens none, an unknown character one."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    sizes = np.array([spelt_bytes(token, byte_level) for token in tokens])
    if tokenizer.unk_token_id is not None:
        sizes[tokenizer.unk_token_id] = 1
    # GPT-2 has one id for both unknown and end: it is an end
    ends = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    sizes[[i for i in ends if i is not None]] = 0
    return sizes


def spelt_bytes(token, byte_level) -> int:
    """Of a token as vocabularies write it: one symbol a byte, or (sentencepiece) ▁ for a space, <0x0A>."""
    if byte_level:
        return len(token)
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())


WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's: no merge crosses
)


class ScratchBPE:
    """Byte-level byte-pair encoding by hand (Sennrich et al. 2016): the merges that `tokenizers` finds.

    Training keeps, for every pair of neighbours, its count and the words it stands in, so that a merge only
    touches those words; the heap's counts may be stale and are corrected when they come up.
    """

    def __init__(self, vocabulary, merges):
        import regex  # comes with transformers; re knows no \p{L}

        self.split = regex.compile(WORDS).findall
        self.vocabulary, self.merges = vocabulary, {tuple(pair): i for i, pair in enumerate(merges)}

    @classmethod
    def train(cls, texts, size):
        self = cls({symbol: i for i, symbol in enumerate([END, *sorted(BYTES.values())])}, [])
        counts = Counter(word for text in texts for word in self.split(text))
        self.words = [([BYTES[byte] for byte in word.encode()], n) for word, n in counts.items()]
        self.pairs, self.places = Counter(), defaultdict(set)
        for place in range(len(self.words)):
            self._count(place, +1)
        heap = [self._entry(pair) for pair in self.pairs]
        heapq.heapify(heap)
        while len(self.vocabulary) < size and heap:
            entry = heapq.heappop(heap)
            pair = entry[-1]
            if entry != self._entry(pair):  # stale
                if self.pairs[pair] > 0:
                    heapq.heappush(heap, self._entry(pair))
            elif self.pairs[pair] < 1:
                break
            else:
                for new in self._merge(pair):
                    heapq.heappush(heap, self._entry(new))
        del self.words, self.pairs, self.places
        return self

    def _entry(self, pair):
        """Most frequent first; of equals the one with the smaller ids, as in `tokenizers`."""
        return -self.pairs[pair], self.vocabulary[pair[0]], self.vocabulary[pair[1]], pair

    def _count(self, place, sign) -> set:
        symbols, n = self.words[place]
        found = set(itertools.pairwise(symbols))
        for pair in itertools.pairwise(symbols):
            self.pairs[pair] += sign * n
        for pair in found:
            self.places[pair].add(place)
        return found

    def _merge(self, pair) -> set:
        """Learns the pair and applies it to every word; returns the pairs that are new or more frequent."""
        self.merges[pair] = len(self.merges)
        self.vocabulary.setdefault("".join(pair), len(self.vocabulary))
        changed = set()
        for place in self.places.pop(pair):
            self._count(place, -1)
            self.words[place] = joined(self.words[place][0], pair), self.words[place][1]
            changed |= {new for new in self._count(place, +1) if "".join(pair) in new}
        return changed - {pair}

    @functools.lru_cache(1 << 18)  # noqa: B019 (words repeat; the tokenizer lives as long as the program)
    def _word(self, word) -> list[int]:
        symbols = [BYTES[byte] for byte in word.encode()]
        while known := [pair for pair in itertools.pairwise(symbols) if pair in self.merges]:
            symbols = joined(symbols, min(known, key=self.merges.get))
        return [self.vocabulary[symbol] for symbol in symbols]

    def encode(self, text) -> list[int]:
        return [token for word in self.split(text) for token in self._word(word)]


def joined(symbols, pair) -> list[str]:
    """`symbols` with every occurrence of the pair, from the left, as one."""
    result, i = [], 0
    while i < len(symbols):
        both = tuple(symbols[i : i + 2]) == pair
        result.append("".join(pair) if both else symbols[i])
        i += 1 + both
    return result


# -------------------------------------------------------------------------------------------- token cache
# text -> train.bin, val.bin, test.bin: streams of token ids, mapped into memory, END before and behind each
# document. Built once by rank 0; a killed build goes on where it was.

CACHE_VERSION = 1  # of the layout: change both together
# of fields that Corpus has grown: older caches keep their names
LATER = {"max_tokens": None, "held_out_tokens": 0, "streaming": None, "first_trains": True}
PARTS = ("train", "val", "test")
PIECE = 1 << 16  # characters of a document that are read and encoded at once
TEXT_FILES = (".txt", ".text", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_FILES, *core.TABLES, ".zip")  # of what can be read as text


@dataclass(frozen=True)
class Corpus:
    """Which text, how split, how tokenised: everything that decides what a token cache holds."""

    data: str  # file or folder of text, a table with a column of text, a Hub id, python-docs, python-code
    tokenizer: str
    text_column: str = "text"
    max_documents: int | None = None
    val_share: float = 0.05
    test_share: float = 0.05
    split_seed: int = 42
    max_tokens: int | None = None  # of training text, the first ones; then reading stops,
    held_out_tokens: int = 0  # as soon as val and test have so many
    # how a Hub set is read. True: streamed, what is needed only; CacheStream: downloaded, in its own order;
    # False: downloaded, in an order drawn by split_seed; none: streamed where max_documents is given
    streaming: str | None = None
    first_trains: bool = True  # the first document is training text, whatever its hash says

    @property
    def streams(self) -> bool:
        return self.max_documents is not None if self.streaming is None else self.streaming == "True"


@dataclass
class Tokens:
    """An opened token cache."""

    parts: dict[str, np.ndarray]
    tokenizer: object
    unigram: np.ndarray  # how often each id occurs in train, (V,)
    documents: dict[str, int]
    fingerprint: dict
    lines: list[str]  # what to tell the user about unusable documents


def open_corpus(corpus, world) -> Tokens:
    """The tokens of a Corpus, from the cache or built into it by rank 0."""
    return open_cache(Path(core.on_main(world, lambda: str(token_cache(corpus)))))


def token_cache(corpus) -> Path:
    """The folder with the tokens of `corpus`; built under a lock if it is not there. One process calls it."""
    source = data_fingerprint(corpus)
    name = corpus.tokenizer  # a Hub id or folder may hold another one tomorrow
    words = None if is_built_in(name) else core.tokenizer_fingerprint(named_tokenizer(name))
    fields = {name: value for name, value in asdict(corpus).items() if value != LATER.get(name, "")}
    key = json.dumps([CACHE_VERSION, source, words, fields])
    folder = core.cache_root() / f"tokens_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "meta.json").exists():
        aside = folder.with_name(f".{folder.name}.partial")  # kept when killed
        try:
            aside.mkdir(parents=True, exist_ok=True)
            with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be building it: then this one waits
                if not (folder / "meta.json").exists():
                    build_cache(corpus, source, aside)
                    os.rename(aside, folder)
                Path(lock.name).unlink(missing_ok=True)
        except OSError as error:
            where = f"token cache in {core.cache_root()} cannot be written ({error.strerror})"
            raise core.UserError(f"{where}: set TOKEN_CACHE to a folder with room") from error
    return folder


def open_cache(folder) -> Tokens:
    """Maps the streams. UserError if a file is not what the cache was built with."""
    meta = json.loads((folder / "meta.json").read_text())
    path, kind = folder / "tokenizer" / "tokenizer.json", np.dtype(meta["kind"])
    files = {part: folder / f"{part}.bin" for part in PARTS}
    sizes = {part: file.exists() and file.stat().st_size // kind.itemsize for part, file in files.items()}
    if core.sha256_file(path) != meta["fingerprint"]["tokenizer"] or sizes != meta["tokens"]:
        raise core.UserError(
            f"token cache {folder} is not what was built (tokenizer or tokens changed): delete it"
        )
    parts = {part: np.memmap(folder / f"{part}.bin", dtype=kind, mode="r") for part in PARTS}
    unigram = np.load(folder / "unigram.npy")
    tokenizer = core.pretrained_tokenizer(str(folder / "tokenizer"), "")
    return Tokens(parts, tokenizer, unigram, meta["documents"], meta["fingerprint"], meta["lines"])


def data_fingerprint(corpus) -> str:
    """Of the text itself: it names the cache, and shows a resume that the data changed."""
    if corpus.data in BUILT_IN:
        python = f"Python {platform.python_version()}"
        return f"{corpus.data} of {f'numpy {np.__version__}' if corpus.data == 'numpy-docs' else python}"
    if files := text_files(corpus.data):
        try:
            return core.joint_hash([core.sha256_file(file) for file in files])
        except OSError as error:
            raise core.UserError(f"{error.filename} cannot be read ({error.strerror}): take it out") from None
    return core.data_fingerprint(corpus.data, streaming=corpus.streams)


def text_files(name) -> list[Path]:
    """The text files that a name stands for; none where it is a table or on the Hub."""
    path = Path(name)
    if path.is_dir():
        found = (file.relative_to(path) for file in path.rglob("*"))
        files = [path / f for f in found if (path / f).is_file() and not any(p[0] == "." for p in f.parts)]
        texts = sorted(file for file in files if file.suffix in TEXT_FILES)
        if not any(file.suffix in (*TEXT_FILES, *core.TABLES, ".zip") for file in files):
            raise core.UserError(f"folder {name} holds no text: use {', '.join((*TEXT_FILES, *core.TABLES))}")
        if texts and (tables := [file for file in files if file.suffix in core.TABLES]):
            both = f"{texts[0].name} and {tables[0].name}"
            raise core.UserError(
                f"folder {name} holds text files and tables ({both}): name one, or move one kind"
            )
        return texts
    return [path] if path.is_file() and path.suffix not in (*core.TABLES, ".zip") else []


def documents(corpus, bad):
    """Yields, for each document, a function that opens it as a stream of text."""
    column = corpus.text_column
    if corpus.data in BUILT_IN:
        rows = ({column: text} for text in built_in_texts(corpus.data))
    elif files := text_files(corpus.data):
        for file in files[: corpus.max_documents]:
            yield functools.partial(open, file, encoding="utf-8-sig", newline="")
        return
    else:
        shuffled = corpus.split_seed if corpus.streaming == "False" else None
        rows = core.stream_rows(corpus.data, streaming=corpus.streams, shuffled=shuffled)
    for number, row in enumerate(itertools.islice(rows, corpus.max_documents), start=1):
        bad.seen = number
        if number == 1:
            try:
                core.require_columns([row], [column], corpus.data)
            except core.UserError as error:
                raise core.UserError(f"{error}; say --text_column") from None
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text or not core.is_clean(text):
            bad.add(
                number,
                "no text" if not text or not isinstance(text, str) else "odd Unicode (a lone surrogate)",
            )
            if len(bad.rows) % 1000 == 0:  # a stream may be long
                bad.report(number, corpus.data)
            continue
        yield functools.partial(io.StringIO, text, newline="")


def pieces(stream):
    """A document in pieces of some PIECE characters, cut where GPT-2's rules cut anyway: behind a line,
    else before white space."""
    rest = ""
    try:
        while chunk := stream.read(PIECE):
            rest += chunk
            if len(chunk) < PIECE:
                break  # the end
            cut = re.match(r"(?s:.*)\S\n(?=\S)", rest) or re.match(r"(?s:.*)\S(?=\s)", rest)
            cut = cut.end() if cut else 0 if len(rest) < 16 * PIECE else len(rest)  # one endless line
            if cut:
                yield rest[:cut]
            rest = rest[cut:]
    except UnicodeDecodeError:
        raise core.UserError(f"{stream.name} is not UTF-8: save it as such, or take it out") from None
    if rest:
        yield rest


def split_pieces(corpus, bad):
    """Yields (part, text, whether a document begins). Equal documents share a part; a single one is cut."""
    found = documents(corpus, bad)
    first, second = next(found, None), next(found, None)
    if first is None:
        raise core.UserError(
            f"{corpus.data} holds no text: use text files, a table with a column, or python-docs"
        )
    if second is None:
        yield from cut_document(first, corpus)
        return
    trained = None  # the first document and its copies, so that there is something to train on
    for opens in itertools.chain([first, second], found):
        with opens() as stream:
            for i, text in enumerate(pieces(stream)):
                if i == 0:
                    drawn = hashlib.sha256(f"{corpus.split_seed}/{text}".encode()).digest()
                    trained = trained or drawn
                    share = int.from_bytes(drawn[:6], "big") / 2**48
                    forced = corpus.first_trains and drawn == trained
                    part = part_of(0 if forced else share, corpus)
                yield part, text, i == 0


def part_of(share, corpus) -> str:
    """0 ... 1 -> train, val, test, in this order."""
    train = 1 - corpus.val_share - corpus.test_share
    return "train" if share < train else "val" if share < train + corpus.val_share else "test"


def cut_document(opens, corpus):
    """A single document: its last parts are held out, to the character."""
    with opens() as stream:
        length = sum(len(text) for text in pieces(stream))
    ends = [
        int(length * share + 1e-6)
        for share in (1 - corpus.val_share - corpus.test_share, 1 - corpus.test_share, 1)
    ]
    at, begins = 0, set(PARTS)
    with opens() as stream:
        for text in pieces(stream):
            for part, start, end in zip(PARTS, [0, *ends], ends, strict=False):
                if inside := text[max(0, start - at) : max(0, end - at)]:
                    yield part, inside, part in begins
                    begins.discard(part)
            at += len(text)


def build_cache(corpus, source, folder):
    """Tokenizer, streams, counts, meta.json (last) into `folder`, going on from what a killed build left."""
    bad, path = core.BadRows(), folder / "tokenizer"
    if not (path / "done").exists():

        def train_texts():
            return (text for part, text, _ in split_pieces(corpus, core.BadRows()) if part == "train")

        make_tokenizer(corpus.tokenizer, train_texts).save_pretrained(path)
        (path / "done").touch()
    tokenizer = core.pretrained_tokenizer(str(path), "")
    kind = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    state = write_tokens(folder, corpus, tokenizer, kind, bad)
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    train = np.memmap(folder / "train.bin", dtype=kind, mode="r")
    for start in range(0, len(train), 1 << 24):
        counts += np.bincount(train[start : start + (1 << 24)], minlength=len(tokenizer))
    np.save(folder / "unigram.npy", counts)
    core.write_json(folder / "meta.json", {
        "fingerprint": {"data": source, "tokenizer": core.sha256_file(path / "tokenizer.json")},
        "kind": kind.name, "corpus": asdict(corpus), "documents": state["documents"],
        "tokens": {part: size // kind.itemsize for part, size in state["bytes"].items()},
        "lines": bad.report(bad.seen, corpus.data) if bad.rows else [],
    })  # fmt: skip


def write_tokens(folder, corpus, tokenizer, kind, bad) -> dict:
    """Appends to the streams piece by piece; progress.json says every few seconds how much of them counts."""
    encode, end = encoder(corpus.tokenizer, tokenizer), np.array([tokenizer.eos_token_id], kind)
    path, none = folder / "progress.json", dict.fromkeys(PARTS, 0)
    state = {"pieces": 0, "bytes": dict(none), "documents": dict(none)}
    state |= json.loads(path.read_text()) if path.exists() else {}
    files = {part: open(folder / f"{part}.bin", "ab") for part in PARTS}
    for part, file in files.items():
        file.truncate(state["bytes"][part])
    found, saved = itertools.islice(split_pieces(corpus, bad), state["pieces"], None), time.monotonic()
    size = sum(file.stat().st_size for file in text_files(corpus.data))
    written = {part: size // kind.itemsize for part, size in state["bytes"].items()}
    most = math.inf if corpus.max_tokens is None else corpus.max_tokens

    def enough() -> bool:
        held_out = min(written["val"], written["test"])
        return written["train"] >= most and held_out >= corpus.held_out_tokens

    with core.progress(size or None, "tokenising", unit="B") as bar, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(up_to, found, 1 << 20)  # read while the cores are encoding
        while not enough() and (group := ahead.result()):
            ahead = reader.submit(up_to, found, 1 << 20)
            wanted = [piece for piece in group if piece[0] != "train" or written["train"] < most]
            for (part, _, begins), ids in zip(wanted, encode([text for _, text, _ in wanted]), strict=True):
                if enough():  # to the piece: a killed build stops at the same one
                    break
                ids = np.concatenate([end[:begins], np.asarray(ids, dtype=kind)])
                ids = ids[: min(len(ids), most - written["train"])] if part == "train" else ids
                files[part].write(ids.tobytes())
                written[part] += len(ids)
                state["documents"][part] += begins and len(ids) > 0
            state["pieces"] += len(group)
            bar.update(sum(len(text) for _, text, _ in group))
            if time.monotonic() - saved > 5:
                state["bytes"] = {part: flushed(file) for part, file in files.items()}
                core.write_json(path, state)
                saved = time.monotonic()
    for file in files.values():
        file.write(end.tobytes())
    return state | {"bytes": {part: flushed(file) for part, file in files.items()}}


def flushed(file) -> int:
    """Its bytes, all of them on the disk."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size  # tell() lags behind a truncation


def up_to(found, characters) -> list:
    """The next pieces that together have about so many characters: a batch for all cores, flat in memory."""
    group = []
    for piece in found:
        group.append(piece)
        characters -= len(piece[1])
        if characters <= 0:
            break
    return group


def encoder(name, tokenizer):
    """texts -> a list of ids each. Rust, on all cores; characters by a table; bpe_scratch by its own code."""
    rust = tokenizer.backend_tokenizer
    rust.encode_special_tokens = True  # a text that spells the end token out does not end
    rust.no_truncation()  # some files of the Hub hold one
    rust.no_padding()
    if name in ("chars", "ascii"):
        table = np.full(0x110000, tokenizer.vocab.get("<unk>", 0), dtype=np.uint32)
        for symbol, i in tokenizer.vocab.items():
            if len(symbol) == 1:
                table[ord(symbol)] = i
        plain = rust.normalizer.normalize_str if rust.normalizer else str
        return lambda texts: [table[np.frombuffer(plain(text).encode("utf-32-le"), "<u4")] for text in texts]
    if name.startswith("bpe_scratch"):
        model = json.loads(rust.to_str())["model"]
        scratch = ScratchBPE(model["vocab"], model["merges"])
        return lambda texts: [scratch.encode(text) for text in texts]
    return lambda texts: [e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=False)]


class Blocks:
    """A stream in blocks that do not overlap: block i predicts the block_size tokens behind i block_size."""

    def __init__(self, tokens, block_size):
        self.tokens, self.block_size = tokens, block_size

    def __len__(self):
        return math.ceil((len(self.tokens) - 1) / self.block_size)

    def targets(self, rows) -> np.ndarray:
        """How many tokens each block predicts: block_size, less in the last one."""
        return np.minimum(
            self.block_size, len(self.tokens) - 1 - np.asarray(rows, dtype=int) * self.block_size
        )

    @property
    def lengths(self) -> np.ndarray:
        return self.targets(range(len(self)))

    def batch(self, rows, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, block_size); what a short block lacks is no target."""
        ids = np.zeros((len(rows), self.block_size + 1), dtype=np.int64)
        for i, (row, n) in enumerate(zip(rows, self.targets(rows), strict=True)):
            ids[i, : n + 1] = self.tokens[row * self.block_size : row * self.block_size + n + 1]
            ids[i, n + 1 :] = core.IGNORE_INDEX
        ids = torch.from_numpy(ids)
        return ids[:, :-1].clamp(min=0).to(device), ids[:, 1:].to(device)


class Windows:
    """Documents in windows of `context` tokens, each `stride` behind the last: a token counts once, in the
    first window that holds it, where (but in the first) it has seen more than context - stride tokens.
    """

    def __init__(self, documents, context, stride):
        self.documents, self.windows = documents, []  # (document, first input, end of inputs, first target)
        for number, ids in enumerate(documents):
            done = 1  # the first token is given
            while done < len(ids):
                end = min(len(ids), max(done + stride, context + 1))
                self.windows.append((number, max(0, end - 1 - context), end - 1, done))
                done = end
        self.lengths = np.array([end - start for _, start, end, _ in self.windows])

    def __len__(self):
        return len(self.windows)

    def wanted(self) -> list[np.ndarray]:
        """The targets of each."""
        return [self.documents[number][first : end + 1] for number, _, end, first in self.windows]

    def batch(self, chosen, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, T), padded on the right."""
        shape = len(chosen), int(self.lengths[chosen].max())
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, core.IGNORE_INDEX)
        for row, window in enumerate(chosen):
            number, start, end, first = self.windows[window]
            ids = torch.from_numpy(self.documents[number][start : end + 1].astype(np.int64))
            input_ids[row, : end - start] = ids[:-1]
            labels[row, first - 1 - start : end - start] = ids[first - start :]
        return input_ids.to(device), labels.to(device)
