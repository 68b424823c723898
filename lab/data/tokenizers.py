"""Tokenizers: characters, bytes, byte-level BPE (trained, or merged by hand), or one of a model."""

import functools
import hashlib
import heapq
import importlib
import itertools
import re
import string
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from lab.data.hub import local_or_hub
from lab.errors import UserError
from lab.run.files import is_folder
from lab.run.stored import is_run
from lab.train.processes import progress

AS_TEXT = {  # a text that spells a special token out means the letters
    "add_special_tokens": False,
    "split_special_tokens": True,
    "verbose": False,
}


def pretrained_tokenizer(name, built_in):
    """The fast tokenizer of a Hub id or folder. UserError otherwise; it recommends `built_in` instead.
    Executes no code of the folder."""

    def load():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
        except Exception as error:  # whatever is missing, transformers asks for tiktoken last
            raise (_unreadable(name) if "tiktoken" in str(error) else error) from None

    tokenizer = local_or_hub("tokenizer", name, load, built_in)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer of {name} is not a fast one: use one with a tokenizer.json")
    return tokenizer


def _unreadable(name) -> Exception:
    """What to say of a tokenizer without tokenizer.json that could not be made of sentencepieces either."""
    try:
        importlib.import_module("sentencepiece")
    except ImportError:
        need = "to read sentencepieces (spm.model): pip install sentencepiece"
        return UserError(f"tokenizer of {name} has no tokenizer.json; {need}")
    return OSError("it has no tokenizer.json, and no sentencepieces (spm.model) that can be read")


def own_tokenizer(folder):
    """The tokenizer that a run or a cache keeps in its folder. UserError where it is gone: a name that is no
    folder would be looked for on the Hub."""
    if not is_folder(Path(folder) / "tokenizer"):
        raise UserError(f"{folder} has lost its tokenizer: copy {folder}/tokenizer anew")
    return pretrained_tokenizer(str(Path(folder) / "tokenizer"), "")


def require_words(tokenizer, name):
    """UserError for what transformers makes where a folder has no tokenizer: one of special tokens alone."""
    if {*tokenizer.get_vocab().values()} <= {*tokenizer.all_special_ids}:
        raise UserError(f"{name} brings no tokenizer: put a tokenizer.json there, or name one by --tokenizer")


def require_ids(tokenizer, rows, name):
    """UserError where a tokenizer gives ids beyond the `rows` of a model's embedding, or knows no text."""
    require_words(tokenizer, name)
    if (ids := id_count(tokenizer)) > rows:
        sizes = f"has {ids} tokens, the model {rows}"
        raise UserError(f"the tokenizer of {name} {sizes}: they do not belong together")


def id_count(tokenizer) -> int:
    """One more than the largest id: more than len(tokenizer) where a vocabulary has holes."""
    return 1 + max(tokenizer.get_vocab().values())


def id_kind(tokenizer) -> str:
    """The kind of integer that holds every id of a tokenizer."""
    return "uint16" if id_count(tokenizer) <= 1 << 16 else "uint32"


def begin_ids(tokenizer) -> list[int]:
    """Ids that a tokenizer itself puts before a text: [<s>] of Llama's, none of GPT-2's. They begin
    documents, windows, rows and prompts alike; what it puts behind a text is never put behind a prompt."""
    mask = tokenizer("a", split_special_tokens=True, return_special_tokens_mask=True)  # as AS_TEXT leaves it
    before = list(itertools.takewhile(bool, mask["special_tokens_mask"]))
    return mask["input_ids"][: len(before)]


def begin_facts(tokenizer) -> dict:
    """What a fingerprint of rows says of begin_ids: nothing where there are none."""
    return {"begin": ids} if (ids := begin_ids(tokenizer)) else {}


def document_start(tokenizer) -> list[int]:
    """Ids before each document of a stream: the end of the one before it, then begin_ids."""
    return [tokenizer.eos_token_id, *begin_ids(tokenizer)]


def prompt_ids(tokenizer, text) -> list[int]:
    """A prompt as a model reads it: begin_ids, then the text; a special token that it spells is letters."""
    return [*begin_ids(tokenizer), *tokenizer(text, **AS_TEXT).input_ids]


def tokenizer_fingerprint(tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


END = "<|endoftext|>"  # stands between documents; GPT-2's own name for it


def make_tokenizer(name, texts):
    """Makes a transformers tokenizer: chars, ascii, bytes, bpe:<size>,
    bpe_scratch:<size>, a Hub id or folder.

    `texts()` yields the training text for chars and bpe. eos_token_id ends a document.
    """
    kind, _, size = name.partition(":")
    if kind in ("bpe", "bpe_scratch") and not (size.isdigit() and int(size) > 256):
        raise UserError(f"--tokenizer {name}: use {kind}:<size> with a size over 256, e.g. {kind}:2048")
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


def named_tokenizer(name, built_in="chars, ascii, bytes or bpe:2048 (built in)"):
    """The tokenizer of a Hub id or folder. UserError if it has no end-of-text token; `built_in` is
    what the error recommends."""
    tokenizer = pretrained_tokenizer(name, built_in)
    require_words(tokenizer, name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {name} has no end-of-text token: use one of a language model")
    return tokenizer


def characters(symbols, plain=False):
    """A tokenizer with one id per character. plain: accents and case are dropped, then what is not ASCII
    becomes `?` (as in journal 003); otherwise a character that the training text lacks is <unk>."""
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
    with progress(None, "reading texts for a tokenizer") as bar:
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
    """Byte -> printable symbol, as in GPT-2: printing bytes are themselves, the others
    characters from 256 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printing)
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES = byte_symbols()


def token_bytes(tokenizer) -> np.ndarray:
    """(V,): UTF-8 bytes of text that each id spells; 0 for special tokens and ids without a token, 1 for the
    unknown token."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(id_count(tokenizer))))
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    sizes = np.array([spelt_bytes(token or "", byte_level) for token in tokens])
    if tokenizer.unk_token_id is not None:
        sizes[tokenizer.unk_token_id] = 1
    # GPT-2 has one id for both unknown and end: it is an end
    ends = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    sizes[[i for i in ends if i is not None]] = 0
    return sizes


def spelt_bytes(token, byte_level) -> int:
    """Bytes of a token as a vocabulary writes it: one symbol a byte, or sentencepiece's ▁ and <0x0A>."""
    if byte_level:
        return len(token)
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())


WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's: no merge crosses
)


class ScratchBPE:
    """Byte-level byte-pair encoding by hand (Sennrich et al. 2016); finds the same merges as `tokenizers`.

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
        kinds = set(itertools.pairwise(symbols))
        for pair in itertools.pairwise(symbols):
            self.pairs[pair] += sign * n
        for pair in kinds:
            self.places[pair].add(place)
        return kinds

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
    """`symbols` with every occurrence of the pair merged, from the left."""
    result, i = [], 0
    while i < len(symbols):
        both = tuple(symbols[i : i + 2]) == pair
        result.append("".join(pair) if both else symbols[i])
        i += 1 + both
    return result


def is_built_in(name) -> bool:
    """Whether a tokenizer is made here, of text: no folder and no Hub id."""
    return name.partition(":")[0] in ("chars", "ascii", "bytes", "bpe", "bpe_scratch")


def encoder_tokenizer(name, texts=()):
    """A fast tokenizer with marks_of, of a Hub id or folder; of tiny:* the words of `texts`. UserError for
    one without."""
    if name.startswith("tiny:"):
        return _word_tokenizer(texts)
    tokenizer = pretrained_tokenizer(name, "tiny:bert (built in)")
    if marks_of(tokenizer)[1] is None:
        what = "has no cls and sep token and no end-of-text token"
        raise UserError(f"tokenizer of {name} {what}: use an encoder of the BERT family, or a language model")
    return tokenizer


def marks_of(tokenizer) -> tuple[list[int], int | None]:
    """(ids in front of a sequence of pieces, id behind each piece): cls and sep of an encoder; begin_ids and
    the end-of-text token of a language model, the one id in it that no text can spell."""
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        return begin_ids(tokenizer), tokenizer.eos_token_id
    return [tokenizer.cls_token_id], tokenizer.sep_token_id


def _word_tokenizer(texts, size=4096):
    """Lower-cased words by frequency, ties by spelling: a pure function of the texts."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(special)]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # the regular expression above
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokenizer_of(model) -> str:
    """Name of the tokenizer of a run folder, a folder or a Hub id."""
    return str(Path(model) / "tokenizer") if is_run(model) else model
