"""Text becomes token ids. A Corpus says which text, how it is split and tokenised; open_corpus gives its
Tokens: one stream of ids for each of train, val and test, mapped into memory."""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lab.data import tables
from lab.data.builtin import BUILT_IN, built_in_fingerprint, built_in_texts
from lab.data.cache import BadRows, cache_root, damage, first_few, is_clean, is_whole, seal, writable_cache
from lab.data.paths import descriptions, files_hash, text_files
from lab.data.split import PARTS
from lab.data.tables import LOOK, is_missing, require_columns, stream_rows
from lab.data.tokenizers import (
    ScratchBPE,
    begin_facts,
    document_start,
    id_count,
    id_kind,
    is_built_in,
    make_tokenizer,
    named_tokenizer,
    pretrained_tokenizer,
    tokenizer_fingerprint,
)
from lab.errors import UserError
from lab.run.files import lock_file, sha256_file, short_hash, write_json
from lab.train.processes import on_main, progress

TEXT_CACHE_VERSION = 3  # of what a cache of tokens holds: a change there is a change here
# of fields that Corpus has grown: older caches keep their names
ADDED_FIELDS = {"max_tokens": None, "held_out_tokens": 0, "streaming": None, "first_trains": True}
PIECE = 1 << 16  # characters of a document that are read and encoded at once


@dataclass(frozen=True)
class Corpus:
    """Which text, how it is split and tokenised: all that decides what a token cache holds."""

    data: str  # file or folder of text, a table with a column of text, a Hub id, python-docs, python-code
    tokenizer: str
    text_column: str = "text"
    max_documents: int | None = None
    val_share: float = 0.05
    test_share: float = 0.05
    split_seed: int = 42
    max_tokens: int | None = None  # of training text, the first ones
    held_out_tokens: int = 0  # where max_tokens are read, reading stops once val and test have so many each
    # how a Hub set is read. True: streamed, what is needed only; CacheStream: downloaded, in its own order;
    # False: downloaded, in an order drawn by split_seed; none: streamed where max_documents is given
    streaming: str | None = None
    first_trains: bool = True  # the first document is training text, whatever its hash says

    @property
    def streams(self) -> bool:
        return self.max_documents is not None if self.streaming is None else self.streaming == "True"


@dataclass
class Tokens:
    """An opened token cache: a memory-mapped stream of ids for each part, and its tokenizer."""

    parts: dict[str, np.ndarray]
    tokenizer: object
    unigram: np.ndarray  # how often each id occurs in train, (V,)
    documents: dict[str, int]
    fingerprint: dict
    lines: list[str]  # what to tell the user about unusable documents
    text_bytes: dict[str, int] = field(default_factory=dict)  # UTF-8 bytes of val and test


def open_corpus(corpus, world) -> Tokens:
    """Opens the tokens of a Corpus; rank 0 builds the cache if need be."""

    def build() -> str:
        return str(token_cache(corpus))

    return open_cache(Path(on_main(world, build)))


def token_cache(corpus) -> Path:
    """Returns the cache folder of `corpus`, built under a lock if it is not there. Rank 0 only."""
    source = text_fingerprint(corpus)
    name = corpus.tokenizer  # what a Hub id or folder holds may change
    words = None if is_built_in(name) else words_of(named_tokenizer(name))
    fields = {name: value for name, value in asdict(corpus).items() if value != ADDED_FIELDS.get(name, "")}
    if words:  # the same tokenizer may have several names: a Hub id, the folder of a run that began with it
        fields["tokenizer"] = ""
    folder = cache_root() / f"tokens_{short_hash([TEXT_CACHE_VERSION, source, words, fields])}"
    with writable_cache():
        if not is_whole(folder):
            aside = folder.with_name(f".{folder.name}.partial")  # kept when killed
            aside.mkdir(parents=True, exist_ok=True)
            with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
                lock_file(lock, wait=True)  # another run may be building it: then this one waits
                if not is_whole(folder):
                    build_cache(corpus, source, aside)
                    seal(aside)
                    os.rename(aside, folder)
                Path(lock.name).unlink(missing_ok=True)
    return folder


def words_of(tokenizer):
    """All that a cache of tokens depends on in a tokenizer: a base and its -Instruct may share tokenizer.json
    and end a text by other tokens."""
    return [tokenizer_fingerprint(tokenizer), document_start(tokenizer)]


def open_cache(folder) -> Tokens:
    """Maps the streams of a cache folder, which token_cache has checked, into memory."""
    meta = json.loads((folder / "meta.json").read_text())
    kind = np.dtype(meta["kind"])
    parts = {part: np.memmap(folder / f"{part}.bin", dtype=kind, mode="r") for part in PARTS}
    unigram = np.load(folder / "unigram.npy")
    tokenizer = pretrained_tokenizer(str(folder / "tokenizer"), "")
    names = ("documents", "fingerprint", "lines")
    return Tokens(parts, tokenizer, unigram, *(meta[name] for name in names), meta.get("text_bytes", {}))


def text_fingerprint(corpus) -> str:
    """Hash of the text: names the cache, and shows a resume that data changed."""
    if corpus.data in BUILT_IN:
        return built_in_fingerprint(corpus.data)
    if files := text_files(corpus.data):
        return files_hash(files)
    return tables.data_fingerprint(corpus.data, streaming=corpus.streams)


def documents(corpus, bad):
    """Yields, for each document, a function that opens it as a stream of text."""
    if corpus.data in BUILT_IN:
        rows = ({corpus.text_column: text} for text in built_in_texts(corpus.data))
    elif files := text_files(corpus.data):
        if about := descriptions(corpus.data):
            bad.notes.append(f"left out, as they describe the data: {first_few(about)}")
        chosen = {str(file): file for file in files[: corpus.max_documents]}
        if empty := [name for name, file in chosen.items() if file.is_empty]:
            bad.notes.append(f"passed over {len(empty)} empty file(s): {first_few(empty)}")
        left_out = {*empty}  # there may be thousands
        yield from (functools.partial(open_text, chosen[name]) for name in chosen if name not in left_out)
        return
    else:
        shuffled = corpus.split_seed if corpus.streaming == "False" else None
        rows = stream_rows(corpus.data, streaming=corpus.streams, shuffled=shuffled)
    rows = itertools.islice(rows, corpus.max_documents)
    for number, row in enumerate(with_column(rows, corpus), start=1):
        bad.seen = number
        text = row.get(corpus.text_column) if isinstance(row, dict) else 0
        if text == "" or is_missing(text):
            bad.pass_over(number, corpus.data)
        elif isinstance(text, str) and is_clean(text):
            yield functools.partial(io.StringIO, text, newline="")
        else:
            bad.add(number, "odd Unicode (a lone surrogate)" if isinstance(text, str) else "no text")
            if len(bad.rows) % 1000 == 0:  # a stream may be long
                bad.report(number, corpus.data)


def open_text(file) -> io.TextIOWrapper:
    return io.TextIOWrapper(file.open(), encoding="utf-8-sig", newline="")


def with_column(rows, corpus):
    """The same rows. UserError if none of the first has the column of text."""
    first = list(itertools.islice(rows, LOOK))
    if first:
        try:
            require_columns(first, [corpus.text_column], corpus.data)
        except UserError as error:
            raise UserError(f"{error}; say --text_column") from None
    return itertools.chain(first, rows)


def pieces(stream):
    """Yields a document in pieces of about PIECE characters, cut where GPT-2's pre-tokenizer cuts anyway:
    after a line, else before white space."""
    rest = ""
    try:
        while chunk := stream.read(PIECE):
            if "\0" in chunk and hasattr(stream, "name"):  # a file
                raise UserError(f"{stream.name} holds NUL bytes: it is damaged, or no text; take it out")
            rest += chunk
            if len(chunk) < PIECE:
                break  # the end
            cut = re.match(r"(?s:.*)\S\n(?=\S)", rest) or re.match(r"(?s:.*)\S(?=\s)", rest)
            cut = cut.end() if cut else 0 if len(rest) < 16 * PIECE else len(rest)  # one endless line
            if cut:
                yield rest[:cut]
            rest = rest[cut:]
    except UnicodeDecodeError:
        raise UserError(f"{stream.name} is not UTF-8: save it as such, or take it out") from None
    except OSError as error:
        raise UserError(f"{stream.name} cannot be read ({error.strerror}): take it out") from None
    if rest:
        yield rest


def split_pieces(corpus, bad):
    """Yields (part, text, whether a document begins). Equal documents share a part; a single one is cut."""
    opened = documents(corpus, bad)
    first, second = next(opened, None), next(opened, None)
    if first is None:
        raise UserError(f"{corpus.data} holds no text: use text files, a table with a column, or python-docs")
    if second is None:
        yield from cut_document(first, corpus)
        return
    trained = None  # the first document and its copies, so that there is something to train on
    for opens in itertools.chain([first, second], opened):
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
    """Maps a number from 0 to 1 to train, val or test, in this order."""
    train = 1 - corpus.val_share - corpus.test_share
    return "train" if share < train else "val" if share < train + corpus.val_share else "test"


def cut_document(opens, corpus):
    """Splits a single document at exact characters: its end is val, then test."""
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
    """Writes tokenizer, streams, counts and (last) meta.json; continues what a killed build left."""
    bad, path = BadRows(), folder / "tokenizer"
    if damage(path):

        def train_texts():
            return (text for part, text, _ in split_pieces(corpus, BadRows()) if part == "train")

        make_tokenizer(corpus.tokenizer, train_texts).save_pretrained(path)
        seal(path)
    tokenizer = pretrained_tokenizer(str(path), "")
    kind = np.dtype(id_kind(tokenizer))
    state = write_tokens(folder, corpus, tokenizer, kind, bad)
    counts = np.zeros(id_count(tokenizer), dtype=np.int64)
    train = np.memmap(folder / "train.bin", dtype=kind, mode="r")
    for start in range(0, len(train), 1 << 24):
        counts += np.bincount(train[start : start + (1 << 24)], minlength=len(counts))
    np.save(folder / "unigram.npy", counts)
    write_json(folder / "meta.json", {
        "fingerprint": {"data": source, "tokenizer": sha256_file(path / "tokenizer.json")}
        | begin_facts(tokenizer),
        "kind": kind.name, "corpus": asdict(corpus), "documents": state["documents"],
        "tokens": {part: size // kind.itemsize for part, size in state["bytes"].items()},
        "text_bytes": {part: state["text"][part] for part in PARTS if part != "train"},
        "lines": bad.report(bad.seen, corpus.data),
    })  # fmt: skip
    (folder / "progress.json").unlink(missing_ok=True)


def write_tokens(folder, corpus, tokenizer, kind, bad) -> dict:
    """Appends to the streams piece by piece. progress.json notes every few seconds how far they are."""
    head = np.array(document_start(tokenizer), kind)
    encode, end = encoder(corpus.tokenizer, tokenizer), head[:1]
    state = progress_of(folder)
    files = {part: open(folder / f"{part}.bin", "ab") for part in PARTS}
    for part, file in files.items():
        file.truncate(state["bytes"][part])
    digests = {part: hash_of_first(folder / f"{part}.bin", size) for part, size in state["bytes"].items()}
    unread, saved = itertools.islice(split_pieces(corpus, bad), state["pieces"], None), time.monotonic()
    size = sum(file.size for file in text_files(corpus.data))
    written = {part: size // kind.itemsize for part, size in state["bytes"].items()}
    most = math.inf if corpus.max_tokens is None else corpus.max_tokens

    def enough() -> bool:
        held_out = min(written["val"], written["test"])
        return written["train"] >= most and held_out >= corpus.held_out_tokens

    with progress(size or None, "tokenising", unit="B") as bar, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(up_to, unread, 1 << 20)  # read while the cores are encoding
        while not enough() and (group := ahead.result()):
            ahead = reader.submit(up_to, unread, 1 << 20)
            wanted = [piece for piece in group if piece[0] != "train" or written["train"] < most]
            for (part, text, begins), ids in zip(
                wanted, encode([text for _, text, _ in wanted]), strict=True
            ):
                if enough():  # to the piece: a killed build stops at the same one
                    break
                ids = np.concatenate([head if begins else end[:0], np.asarray(ids, dtype=kind)])
                ids = ids[: min(len(ids), most - written["train"])] if part == "train" else ids
                files[part].write(ids.tobytes())
                digests[part].update(ids.tobytes())
                written[part] += len(ids)
                state["documents"][part] += begins and len(ids) > 0
                state["text"][part] += len(text.encode())
            state["pieces"] += len(group)
            bar.update(sum(len(text) for _, text, _ in group))
            if time.monotonic() - saved > 5:
                state["bytes"] = {part: flushed(file) for part, file in files.items()}
                state["hashes"] = {part: digest.hexdigest() for part, digest in digests.items()}
                write_json(folder / "progress.json", state | {"check": short_hash(state)})
                saved = time.monotonic()
    for file in files.values():
        file.write(end.tobytes())
    return state | {"bytes": {part: flushed(file) for part, file in files.items()}}


def progress_of(folder) -> dict:
    """How far the streams of a killed build are complete: not at all if they are not as it left them."""
    none = dict.fromkeys(PARTS, 0)
    try:
        state = json.loads((folder / "progress.json").read_text())
        if (
            state.pop("check") != short_hash(state) or "text" not in state
        ):  # by the code before it was counted
            raise ValueError
        for part, size in state["bytes"].items():
            if hash_of_first(folder / f"{part}.bin", size).hexdigest() != state["hashes"][part]:
                raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"pieces": 0, "bytes": dict(none), "documents": dict(none), "text": dict(none)}
    return state


def hash_of_first(path, size):
    """SHA-256 of the first `size` bytes of a file, to be gone on with."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 22))):
            digest.update(chunk)
            size -= len(chunk)
    return digest


def flushed(file) -> int:
    """Flushes a file to the disk and returns its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size  # tell() lags behind a truncation


def up_to(unread, characters) -> list:
    """The next pieces of about so many characters together: a batch that all cores tokenise."""
    group = []
    for piece in unread:
        group.append(piece)
        characters -= len(piece[1])
        if characters <= 0:
            break
    return group


def encoder(name, tokenizer):
    """Returns texts -> a list of ids each: in Rust on all cores; characters by a table, bpe_scratch in
    Python."""
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
