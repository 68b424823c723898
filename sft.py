"""Supervised fine-tuning: rows of instruction, input and answer, for run_instruct.py and run_lora.py.

template -> token ids -> splits -> examples (padded to their length, or packed) -> measures -> answers
"""

import functools
import hashlib
import importlib
import inspect
import itertools
import json
import platform
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import core
import corpus
import gpt_scratch
import runs

COLUMNS = ("instruction", "input", "output")  # Alpaca's
SHARES = {"train": 0.85, "test": 0.10, "val": 0.05}  # journal 001's, in the order in which it took them
CACHE_VERSION = 3  # of the layout that write_cache writes: change both together

KINDS = "a run of gpt_scratch.py, or tiny:gpt2 (built in)"  # what an error recommends instead of a name

# ----------------------------------------------------------------------------------------------- template

PREAMBLE = "Below is an instruction that describes a task"
ASK = "Write a response that appropriately completes the request."


def prompt_text(instruction, given, template) -> str:
    """What stands before the answer: Alpaca's text with its two preambles, or (journal) the first for both.

    It ends with a line break, as in the data set's own column of text: no token crosses the border.
    """
    context = ", paired with an input that provides further context" if given and template == "alpaca" else ""
    parts = [f"{PREAMBLE}{context}. {ASK}", f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{given}"] if given else []
    return "\n\n".join([*parts, "### Response:\n"])


def parse(row) -> list[str]:
    """[instruction, input, output], stripped. ValueError names the fault."""
    if not isinstance(row, dict):
        raise ValueError("no object with columns")
    texts = [row.get(column) for column in COLUMNS]
    texts[1] = "" if texts[1] is None else texts[1]  # some sets leave it out
    for column, text in zip(COLUMNS, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{column} is no text")
        if not core.is_clean(text):
            raise ValueError(f"{column} has odd Unicode (a lone surrogate)")
    if not texts[0].strip():
        raise ValueError("instruction is empty")
    return [text.strip() for text in texts]


MODULES = (
    *("math", "os.path", "random", "statistics", "string", "textwrap", "shutil", "itertools", "functools"),
    *("operator", "bisect", "heapq", "glob", "fnmatch", "json", "base64", "calendar", "copy", "os", "shlex"),
    *("tempfile", "time", "warnings", "inspect", "html", "difflib"),
)
WORDINGS = (  # instruction, input
    ("What does {} do?", ""), ("Explain {} in a sentence.", ""), ("Describe the function {}.", ""),
    ("What is this function for?", "{}"), ("Say what it does.", "{}"), ("Explain the function.", "{}"),
)  # fmt: skip


def python_instructions(seed=0) -> list[dict]:
    """Built-in rows: what does a function of the standard library do? The first sentence of its docstring.

    At most four answers begin with the same word, and each function is asked about in six wordings: who
    has learnt from the training rows which function does what begins the answers to the others rightly.
    """
    answers, taken = {}, Counter()
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in sorted(getattr(module, "__all__", dir(module))):
            function = getattr(module, attribute)
            if attribute[0] == "_" or inspect.isclass(function) or not callable(function):
                continue
            paragraph = (inspect.getdoc(function) or "").strip().split("\n\n")[0]
            answer = re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0]
            word = answer.split(" ")[0]
            if word.isalpha() and taken[word] < 4 and 3 <= answer.count(" ") <= 11:
                taken[word] += 1
                answers[f"{name}.{attribute}"] = answer
    rows = [
        dict(zip(COLUMNS, (instruction.format(name), given.format(name), answer), strict=True))
        for name, answer in answers.items()
        for instruction, given in WORDINGS
    ]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


# ------------------------------------------------------------------------------------------------ token ids


@dataclass
class Instructions:
    """Tokenised rows: piece 2 i is the prompt of row i, piece 2 i + 1 its answer."""

    texts: list[list[str]]  # instruction, input, output
    categories: list[str | None]  # knowledge, creative ...: where rows have a column of that name
    numbers: np.ndarray  # of the rows in the file, from 1
    groups: np.ndarray  # hash of instruction and input: equal prompts stay together
    tokens: np.ndarray
    offsets: np.ndarray  # piece p is tokens[offsets[p] : offsets[p + 1]]
    tokenizer: object
    fingerprint: dict
    lines: list[str]  # what to tell the user about unusable rows

    def __len__(self):
        return len(self.texts)

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        return np.diff(self.offsets)[::2]

    @functools.cached_property
    def answer_lengths(self) -> np.ndarray:
        """Tokens, without the end token."""
        return np.diff(self.offsets)[1::2]

    def columns(self, row) -> dict[str, str]:
        """A row as responses.json holds it."""
        named = dict(zip(COLUMNS, self.texts[row], strict=True))
        return named | ({"category": self.categories[row]} if self.categories[row] else {})

    def prompt(self, row) -> list[int]:
        return self.tokens[self.offsets[2 * row] : self.offsets[2 * row + 1]].tolist()

    def whole(self, row) -> list[int]:
        """Prompt, answer, end token."""
        ids = self.tokens[self.offsets[2 * row] : self.offsets[2 * row + 2]].tolist()
        return [*ids, self.tokenizer.eos_token_id]


def load_instructions(cfg, world, tokenizer=None) -> Instructions:
    """The rows of cfg.data, tokenised once by rank 0 into the cache, read from there by every rank.

    `tokenizer`: none is that of cfg.model; of tiny:gpt2 it is made of the rows.
    """
    builtin, name = cfg.data == "python-instructions", gpt_scratch.tokenizer_of(cfg.model)
    if not tokenizer and not cfg.model.startswith("tiny:"):
        tokenizer = core.main_first(world, lambda: corpus.named_tokenizer(name, KINDS))
    words = core.tokenizer_fingerprint(tokenizer) if tokenizer else f"bpe:{TINY_VOCABULARY}"

    def build() -> str:
        source = (
            f"built in, Python {platform.python_version()}" if builtin else core.data_fingerprint(cfg.data)
        )
        key = json.dumps(
            [CACHE_VERSION, source, cfg.data if builtin else "", cfg.max_documents, words, cfg.template]
        )
        folder = core.cache_root() / f"instructions_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not (folder / "rows.json").exists():
            rows = python_instructions() if builtin else core.read_rows(cfg.data, cfg.max_documents)
            fingerprint = {"data": source, "tokenizer": words, "template": cfg.template}
            write_cache(folder, rows[: cfg.max_documents], tokenizer, cfg, fingerprint)
        return str(folder)

    return read_cache(Path(core.on_main(world, build)), tokenizer)


def write_cache(folder, rows, tokenizer, cfg, fingerprint):
    """Usable rows -> a folder of token ids, texts and tokenizer; unusable ones counted and named."""
    core.require_columns(rows, ("instruction", "output"), cfg.data)  # input may be left out
    bad, texts, numbers, categories = core.BadRows(), [], [], []
    for number, row in enumerate(rows, start=1):
        try:
            texts.append(parse(row))
            numbers.append(number)
            categories.append(str(row["category"]) if row.get("category") else None)
        except ValueError as error:
            bad.add(number, error)
    lines = bad.report(len(rows), cfg.data)
    if empty := sum(not output for _, _, output in texts):
        lines.append(f"{empty} empty answer(s) are kept: their target is the end token")
    pieces = [[prompt_text(a, b, cfg.template), output] for a, b, output in texts]
    pieces = list(itertools.chain.from_iterable(pieces))
    tokenizer = tokenizer or corpus.make_tokenizer(f"bpe:{TINY_VOCABULARY}", lambda: pieces)
    with core.whole_folder(folder) as aside:
        kind = core.write_texts(aside, pieces, tokenizer)
        tokenizer.save_pretrained(aside / "tokenizer")
        groups = [prompt_hash(instruction, given) for instruction, given, _ in texts]
        meta = {
            "kind": kind,
            "texts": texts,
            "categories": categories,
            "numbers": numbers,
            "groups": groups,
            "lines": lines,
            "fingerprint": fingerprint,
        }
        core.write_json(aside / "rows.json", meta)


def prompt_hash(instruction, given) -> str:
    """Prompts that differ in case and white space only share it."""
    text = "\n".join(" ".join(part.lower().split()) for part in (instruction, given))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_cache(folder, tokenizer) -> Instructions:
    meta = json.loads((folder / "rows.json").read_text())
    tokens, offsets = core.read_texts(folder, meta["kind"])
    tokenizer = tokenizer or corpus.named_tokenizer(str(folder / "tokenizer"))
    groups = np.array(meta["groups"])
    return Instructions(
        meta["texts"],
        meta["categories"],
        np.array(meta["numbers"]),
        groups,
        tokens,
        offsets,
        tokenizer,
        meta["fingerprint"],
        meta["lines"],
    )


def split(data, cfg) -> tuple[dict[str, np.ndarray], list[str]]:
    """Row numbers of train, test and val, and what to say of them. Rows whose prompt leaves no room for a
    target within max_length are left out.

    file_order: the first 85 %, the next 10 % and the rest, as the journal; seeded: prompts drawn whole.
    """
    n = len(data)
    if cfg.split == "file_order":
        ends = np.cumsum([0, *(int(n * share) for share in (SHARES["train"], SHARES["test"])), n])
        parts = {name: np.arange(ends[i], min(n, ends[i + 1])) for i, name in enumerate(SHARES)}
    else:
        drawn = core.split_by_group(data.groups, np.zeros(n), list(SHARES.values()), cfg.split_seed)
        parts = {name: np.flatnonzero(drawn == i) for i, name in enumerate(SHARES)}
    first = 1 if cfg.loss_on_prompt else data.prompt_lengths  # tokens before the first target
    fits = np.minimum(data.prompt_lengths + data.answer_lengths + 1, cfg.max_length) > first
    parts = {name: rows[fits[rows]] for name, rows in parts.items()}
    if not fits.any():
        raise core.UserError(
            f"the prompts of all {n} rows fill {cfg.max_length} tokens: use a larger --max_length"
        )
    if empty := [name for name, rows in parts.items() if not len(rows)]:
        raise core.UserError(
            f"{cfg.data} leaves no {empty[0]} rows of {n}: use more rows or a larger --max_length"
        )
    lines, room = [], f"{cfg.max_length} tokens"
    if cut := int((fits & (data.prompt_lengths + data.answer_lengths + 1 > cfg.max_length)).sum()):
        lines.append(f"{cut} row(s) are cut at {room}: they lose the end of the answer and its end token")
    if left := int((~fits).sum()):
        lines.append(f"{left} row(s) are left out: their prompts alone fill {room}")
    known = set(data.groups[parts["train"]])
    for name in ("test", "val"):
        if seen := sum(group in known for group in data.groups[parts[name]]):
            lines.append(
                f"{seen} of {len(parts[name])} {name} rows have a prompt that training rows have, too"
            )
    return parts, lines


# ------------------------------------------------------------------------------------- what the model reads


class Examples:
    """Rows as a language model reads them: prompt, answer, end token, cut at max_length tokens.

    The next token is the target, that of a prompt only if loss_on_prompt says so.
    """

    def __init__(self, data, rows, max_length, loss_on_prompt=False):
        self.data, self.rows, self.max_length, self.loss_on_prompt = data, rows, max_length, loss_on_prompt
        self.lengths = np.minimum(data.prompt_lengths[rows] + data.answer_lengths[rows] + 1, max_length) - 1

    def __len__(self):
        return len(self.rows)

    def masked(self, examples) -> np.ndarray:
        """How many leading inputs of each predict nothing that counts."""
        prompts = self.data.prompt_lengths[self.rows[np.asarray(examples, dtype=int)]]
        return np.where(self.loss_on_prompt, 0, prompts - 1)

    def targets(self, examples) -> np.ndarray:
        return self.lengths[np.asarray(examples, dtype=int)] - self.masked(examples)

    def pair(self, example) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of an example, equally long."""
        ids, masked = self.data.whole(self.rows[example])[: self.max_length], int(self.masked([example])[0])
        return ids[:-1], [core.IGNORE_INDEX] * masked + ids[1 + masked :]

    def batch(self, examples, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), both (B, T), padded on the right, where no real token looks."""
        pairs = [self.pair(example) for example in examples]
        shape = len(pairs), max(len(ids) for ids, _ in pairs)
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, core.IGNORE_INDEX)
        for row, (ids, wanted) in enumerate(pairs):
            input_ids[row, : len(ids)], labels[row, : len(ids)] = torch.tensor(ids), torch.tensor(wanted)
        return input_ids.to(device), labels.to(device)

    def wanted(self) -> list[np.ndarray]:
        """The targets of each."""
        masked = self.masked(range(len(self)))
        return [np.array(self.pair(i)[1][n:]) for i, n in enumerate(masked.tolist())]

    @functools.cached_property
    def log_frequencies(self) -> np.ndarray:
        """(V,): how often each token is a target here, one more of each, as log shares."""
        counts = np.bincount(np.concatenate(self.wanted()), minlength=len(self.data.tokenizer)) + 1
        return np.log(counts / counts.sum())

    def some(self, n):
        """`n` of them, spread evenly; none: all."""
        chosen = np.linspace(0, len(self) - 1, min(n or len(self), len(self))).round().astype(int)
        return Examples(self.data, self.rows[chosen], self.max_length, self.loss_on_prompt)

    def members(self, units) -> list[int]:
        """The examples that a batch of units holds: here a unit is an example."""
        return list(units)


class Packs:
    """Examples side by side in packs of at most `length` tokens (best fit, longest first); none sees another.

    A pack is one unit of a batch, and the same one in every epoch.
    """

    def __init__(self, examples, length):
        self.examples, self.packs, room = examples, [], defaultdict(list)  # room: packs by tokens left
        for example in np.argsort(-examples.lengths, kind="stable").tolist():
            size = int(examples.lengths[example])
            left = next((n for n in range(size, length + 1) if room[n]), None)
            pack = len(self.packs) if left is None else room[left].pop()
            if left is None:
                self.packs.append([])
            self.packs[pack].append(example)
            room[(length if left is None else left) - size].append(pack)
        self.lengths = np.array([examples.lengths[pack].sum() for pack in self.packs])

    def __len__(self):
        return len(self.packs)

    def targets(self, packs) -> np.ndarray:
        return np.array([self.examples.targets(self.packs[pack]).sum() for pack in packs], dtype=int)

    def batch(self, packs, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, segments), all (B, T); the segment of padding is -1."""
        shape = len(packs), int(self.lengths[list(packs)].max())
        both = torch.zeros(*shape, dtype=torch.int64), torch.full(shape, core.IGNORE_INDEX)
        segments = torch.full(shape, -1)
        for i, pack in enumerate(packs):
            start = 0
            for number, example in enumerate(self.packs[pack]):
                pair = self.examples.pair(example)
                end = start + len(pair[0])
                for tensor, values in zip(both, pair, strict=True):
                    tensor[i, start:end] = torch.tensor(values)
                segments[i, start:end], start = number, end
        return tuple(tensor.to(device) for tensor in (*both, segments))

    def members(self, units) -> list[int]:
        return [example for unit in units for example in self.packs[unit]]


def plain_blocks(name, tokenizer, block_size, most) -> corpus.Blocks:
    """Plain held-out text: the first blocks of the test documents of a corpus."""
    ids, plain = [], corpus.Corpus(name, "")
    for part, text, _ in corpus.split_pieces(plain, core.BadRows()):
        if part == "test":
            found = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            ).input_ids
            ids += [tokenizer.eos_token_id, *found]
        if len(ids) > most * block_size:
            break
    if len(ids) < 2:
        raise core.UserError(f"{name} has no held-out document: use several files, or python-docs")
    return corpus.Blocks(np.array(ids[: most * block_size + 1]), block_size)


def examples_of(data, cfg) -> tuple[dict[str, Examples], list[str]]:
    """The parts of `split` as a model reads them, and what to say of their rows."""
    rows, lines = split(data, cfg)
    return {
        name: Examples(data, some, cfg.max_length, cfg.loss_on_prompt) for name, some in rows.items()
    }, lines


@dataclass
class Study:
    """What is trained on and measured with."""

    data: Instructions
    parts: dict[str, Examples]  # train, test, val
    units: Examples | Packs  # of the training part: what batches are made of, examples or packs of them
    batches: core.ShardedBatches
    total_steps: int
    val: Examples  # the validation examples looked at during training
    plain: corpus.Blocks | None
    lines: list[str]  # what to say of rows that are cut or left out


def set_up(run, cfg, world) -> Study:
    """Reads and splits the data and the plain text; a resume that finds others is refused."""
    data = load_instructions(cfg, world)
    run.pin("fingerprint", data.fingerprint)
    parts, lines = examples_of(data, cfg)
    units, plain = parts["train"], None
    if cfg.pack:
        units = Packs(units, cfg.max_length)
    if cfg.plain_blocks:
        sizes = cfg.max_length, cfg.plain_blocks
        try:
            plain = core.main_first(world, lambda: plain_blocks(cfg.plain, data.tokenizer, *sizes))
        except core.UserError as error:
            raise core.UserError(f"--plain: {error}") from None
        run.pin("plain", hashlib.sha256(plain.tokens.tobytes()).hexdigest())
    block = 50 if cfg.group_lengths else 1
    batches = core.ShardedBatches(units.lengths, cfg.batch, world, seed=cfg.seed, block=block)
    total_steps = min(n for n in (cfg.epochs * len(batches), cfg.max_steps) if n is not None)
    return Study(data, parts, units, batches, total_steps, parts["val"].some(cfg.eval_rows), plain, lines)


# ---------------------------------------------------------------------------------------------- the model

TINY_VOCABULARY = 1024
TINY_SCALE = 5  # a vector of 64 numbers then starts as large as one of 768 does
TINY = {"block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 64}


def build_model(cfg, tokenizer, world) -> gpt_scratch.GPT:
    """GPT-2 of a Hub id or folder, a run of gpt_scratch.py, or tiny:gpt2 with random weights."""
    if cfg.model.startswith("tiny:"):
        if cfg.model != "tiny:gpt2":
            raise core.UserError(f"--model {cfg.model}: the only tiny one here is tiny:gpt2")
        own = {name: getattr(cfg, name) for name in ("tie_head", "dropout", "checkpointing")}
        config = gpt_scratch.GPTConfig(len(tokenizer), **TINY, **own)
        model = gpt_scratch.GPT(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(TINY_SCALE) if weight.dim() == 2 else None
    else:
        dropout, checkpointing = cfg.dropout, cfg.checkpointing
        model = core.main_first(world, lambda: gpt_scratch.open_model(cfg.model, dropout, checkpointing)[0])
        if cfg.tie_head and not model.config.tie_head:
            raise core.UserError(f"{cfg.model} has an output matrix of its own: use --no-tie_head")
        model = model if cfg.tie_head else gpt_scratch.untied(model)
    if cfg.max_length > (most := model.config.block_size):
        raise core.UserError(f"--max_length {cfg.max_length} is over the {most} positions of {cfg.model}")
    if len(tokenizer) > model.config.vocab_size:
        raise core.UserError(f"the tokenizer of {cfg.model} has {len(tokenizer)} tokens, the model "
                             f"{model.config.vocab_size}: they do not belong together")  # fmt: skip
    return model


def announce(run, cfg, s, model):
    """The journal's table (parameters, MB, trainable), and what of the data is used how."""
    (total, trainable), examples = core.count_parameters(model), s.parts["train"]
    counts = "  ".join(f"{name} {len(part)}" for name, part in s.parts.items())
    run.say(f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   {counts}")
    run.begin()  # all input is good
    run.say(f"parameters {total:,}  {4 * total / 2**20:.2f} MB in fp32  trainable {trainable:,}")
    run.say(f"data {cfg.data}  {len(s.data)} rows, {len(set(s.data.groups))} prompts  split {cfg.split}")
    for line in [*s.data.lines, *s.lines]:
        run.say(line)
    tokens, targets = examples.lengths.mean(), examples.targets(range(len(examples))).mean()
    longest = int(examples.lengths.max())
    run.say(f"train rows have {tokens:.0f} tokens (longest {longest}), {targets:.0f} of them targets")
    if cfg.pack:
        most, packs = int(s.units.lengths.max()), len(s.units)
        rows, fill = len(examples) / packs, s.units.lengths.mean() / most
        run.say(f"{packs} packs of at most {most} tokens hold {rows:.1f} rows each and are {fill:.0%} full")
        run.say(f"a batch of {cfg.batch} packs is one of some {cfg.batch * rows:.0f} rows")
    if left := len(s.units) % cfg.batch:
        what = f"{left} of {len(s.units)} {'packs' if cfg.pack else 'rows'}"
        run.say(f"each epoch leaves out {what}, others each time: they fill no batch of {cfg.batch}")


def describe_example(examples, example=0) -> str:
    """What the loss masks and what it counts, decoded from the ids."""
    ids, labels = examples.pair(example)
    masked = int(examples.masked([example])[0])
    decode, one_line = examples.data.tokenizer.decode, gpt_scratch.one_line
    seen, counted = one_line(decode(ids[: masked + 1])), one_line(decode(labels[masked:]))
    counts = f"{len(ids) - masked} targets, {masked + 1} tokens masked"
    lines = [
        f"the loss sees row {examples.data.numbers[examples.rows[example]]}: {counts}; padding is masked"
    ]
    return "\n".join([*lines, f"  masked:  {shortened(seen)}", f"  counted: {shortened(counted)}"])


def shortened(text, width=88) -> str:
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


def step_facts(units, chosen) -> dict:
    """Of a global batch: targets, the share that padding to its longest row would add, the longest row."""
    lengths = units.lengths[chosen]
    return {
        "targets": int(units.targets(chosen).sum()),
        "pad_share": float(1 - lengths.sum() / (len(lengths) * lengths.max())),
        "longest": int(lengths.max()),
    }


def autopsy(run, cfg, s, model, chosen, rates) -> dict:
    """What an odd step saw, for spikes.jsonl (rank 0); `chosen` are the units of its global batch.

    Each row's loss is measured again, without dropout: the worst one's text stands beside the first one's.
    """
    members = s.units.members(chosen)
    seen = Examples(s.data, s.parts["train"].rows[members], cfg.max_length, cfg.loss_on_prompt)
    sums = gpt_scratch.evaluate(model, seen, cfg, core.World(device=run.world.device))
    losses = sums[:, 0] / sums[:, 2]
    texts = [s.data.tokenizer.decode(seen.pair(i)[0]) for i in (0, int(losses.argmax()))]
    facts = {"rows": s.data.numbers[seen.rows].tolist(), "lengths": seen.lengths.tolist()}
    facts |= {"row_losses": losses.round(4).tolist(), "first_row": texts[0], "worst_row": texts[1]}
    return rates | facts | step_facts(s.units, chosen)


# ------------------------------------------------------------------------------------ measures and answers

PROMPTS = (  # answered at every evaluation; the first three and the last are journal 001's questions
    "Suggest an alternate word for 'happy'.",
    "What is the correct spelling of 'freind'?",
    "How many meters are 4 kilometers?",
    "Write a tweet about the first day of spring.",
    "Translate into French: 'Good morning, how are you?'",
)


def held_out(cfg) -> tuple[str, ...]:
    """The parts whose figures a run ends with, the most important one last."""
    return ("val", "test") if cfg.final_eval else ("val",)


def measure(part, sums, examples, train) -> tuple[dict, list[dict]]:
    """Of gpt_scratch.evaluate's sums: figures of examples, and the lines of losses.jsonl."""
    spelt = spelt_bytes(examples)
    groups, numbers = (facts[examples.rows] for facts in (examples.data.groups, examples.data.numbers))
    metrics = core.language_metrics(sums, groups, unigram_losses(examples, train), spelt)
    return metrics, runs.loss_lines(part, numbers, groups, sums, spelt)


def spelt_bytes(examples) -> np.ndarray:
    """Bytes of each row's targets: of a whole answer those of its text, whatever a tokenizer adds."""
    data, sizes = examples.data, corpus.token_bytes(examples.data.tokenizer)
    spelt = np.array([sizes[ids].sum() for ids in examples.wanted()], dtype=np.int64)
    answers = np.array([len(data.texts[row][2].encode()) for row in examples.rows], dtype=np.int64)
    whole = data.prompt_lengths[examples.rows] + data.answer_lengths[examples.rows] == examples.lengths
    return spelt if examples.loss_on_prompt else np.where(whole, answers, spelt)


def own_data(cfg, world, tokenizer, facts) -> Instructions:
    """The rows that a run was trained on; UserError if cfg.data changed. `facts`: of config.json."""
    data = load_instructions(cfg, world, tokenizer)
    runs.same_data(facts["fingerprint"], data.fingerprint, cfg.data)
    return data


def remeasure(model, tokenizer, cfg, facts, world, poll) -> tuple[dict, tuple[str, list]]:
    """The figures of a run's own val and test rows, measured again; losses.jsonl: its name and lines."""
    parts, result = examples_of(own_data(cfg, world, tokenizer, facts), cfg)[0], {}
    for part in held_out(cfg):
        sums = gpt_scratch.evaluate(model, parts[part], cfg, world, poll)
        metrics, losses = measure(part, sums, parts[part], parts["train"])
        result |= {f"{part}/{name}": value for name, value in metrics.items()}
    return result, ("losses.jsonl", losses)


def unigram_losses(examples, train) -> np.ndarray:
    """Summed loss of each example's targets by how often each token is a target in training."""
    return np.array([-train.log_frequencies[labels].sum() for labels in examples.wanted()])


def check(run, cfg, s, model, step, where, keep_best, poll):
    """An evaluation during training: validation, its best weights (keep_best(loss) says whether), the fixed
    prompts; at step 0 the plain text too, see forgetting. Noted in run.state: no resume repeats it."""
    if step == 0 and s.plain:
        run.state["plain"] = plain_losses(run, cfg, s.plain, model, poll).tolist()
    sums = gpt_scratch.evaluate(model, s.val, cfg, run.world, poll)
    val = core.language_metrics(sums, s.data.groups[s.val.rows])
    report_validation(run, step, val, where, keep_best(val["loss"]), len(s.batches))
    sample(run, cfg, step, model, s.data.tokenizer, poll)
    run.state["evaluated"] = step


def report_validation(run, step, val, where, is_best, steps_per_epoch):
    """The line of an evaluation, and a warning when validation has not fallen for half an epoch."""
    lowest = run.state.setdefault("lowest", [val["loss"], step])
    run.state.setdefault("before", val["loss"])
    if val["loss"] < lowest[0]:
        lowest[:] = val["loss"], step
    loss = core.plus_minus(val["loss"], val["loss_interval"], 4)
    accuracy = core.plus_minus(val["accuracy"], val["accuracy_interval"])
    perplexity, best = f"perplexity {val['perplexity']:.2f}", "  -> best" if is_best else ""
    run.say(f"{where}  val  loss {loss}  {perplexity}  accuracy {accuracy}{best}")
    if step - lowest[1] >= 0.5 * steps_per_epoch:
        epochs, low = (step - lowest[1]) / steps_per_epoch, f"lowest {lowest[0]:.4f} at step {lowest[1]}"
        run.say(f"{where}  val  no fall for {epochs:.2g} epochs ({low}): OVERFITTING if train falls")
    run.metrics(step, {f"val/{name}": val[name] for name in ("loss", "perplexity", "accuracy")})


def answers(model, tokenizer, prompts, max_new_tokens, batch, world, poll=lambda active: 0) -> list[str]:
    """Greedy answers to prompts (lists of ids), in batches over all ranks; every rank gets all of them.

    `poll(active)` is called by all ranks in step: a rank that is done goes on until the sum is 0.
    """
    found = torch.zeros(
        len(prompts), max_new_tokens, dtype=torch.int64
    )  # id + 1; a sum over ranks is a gather
    batches = core.ShardedBatches([len(ids) for ids in prompts], batch, world)
    how = {"temperature": 0, "stop": {tokenizer.eos_token_id}, "vocab_size": len(tokenizer)}
    write = getattr(model, "continuations", None) or functools.partial(gpt_scratch.generate, model)
    with core.progress(len(batches), "answering", world) as bar:
        for step in range(len(batches)):
            if mine := batches.rank_batch(step):
                chosen = [prompts[i] for i in mine]
                rows = write(chosen, max_new_tokens, **how, poll=lambda: poll(1))
                for i, ids in zip(mine, rows, strict=True):
                    found[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
            while poll(0):
                pass
            bar.update()
    found = core.all_reduce_sum(world, found)
    return [tokenizer.decode(ids[ids > 0] - 1).strip() for ids in found]


def sample(run, cfg, step, model, tokenizer, poll):
    """The fixed prompts' answers to samples.jsonl and TensorBoard, one of them to the terminal, in turn."""
    if cfg.sample_tokens:
        prompts = [
            tokenizer(prompt_text(text, "", cfg.template), add_special_tokens=False).input_ids
            for text in PROMPTS
        ]
        texts = answers(model, tokenizer, prompts, cfg.sample_tokens, len(prompts), run.world, poll)
        run.samples(step, [f"{text}\n{answer}" for text, answer in zip(PROMPTS, texts, strict=True)])
        turn = run.state["asked"] = (run.state.get("asked", -1) + 1) % len(PROMPTS)
        run.say(
            f"  | {PROMPTS[turn]} -> {shortened(gpt_scratch.one_line(texts[turn]), 90 - len(PROMPTS[turn]))}"
        )


def write_responses(run, cfg, s, model) -> dict:
    """responses.json in the journal's form: each test row and its model_response; how many begin rightly."""
    data, test = s.data, s.parts["test"].some(cfg.answer_rows)
    prompts, most = [data.prompt(row) for row in test.rows], cfg.max_new_tokens
    batch = cfg.eval_batch * run.world.size
    texts = answers(model, data.tokenizer, prompts, most, batch, run.world, run.poll)
    rows = [data.columns(row) | {"model_response": text} for row, text in zip(test.rows, texts, strict=True)]
    if run.world.is_main:
        core.write_json(run.folder / "responses.json", rows)
    empty, long = (
        sum(not text for text in texts),
        sum(len(p) + most > model.config.block_size for p in prompts),
    )
    run.say(f"answers  {len(rows)} in responses.json, {empty} empty")
    if long:
        run.say(f"answers  {long} prompts leave no room for {most} tokens: their beginning is forgotten")
    return first_words(run, s, test.rows, texts) | {"test/empty_responses": empty}


def first_words(run, s, rows, texts) -> dict:
    """Share of answers whose first word is the wanted one, beside that of always saying the usual one."""
    usual = Counter(first_word(s.data.texts[row][2]) for row in s.parts["train"].rows).most_common(1)[0][0]
    wanted = [first_word(s.data.texts[row][2]) for row in rows]
    counted = [i for i, word in enumerate(wanted) if word]  # some answers are signs only
    if not counted:
        return {}
    right = np.array([[first_word(texts[i]) == wanted[i], usual == wanted[i]] for i in counted])
    interval = core.bootstrap(right, s.data.groups[rows][counted]).tolist()[0]
    share, guess = right.mean(0).tolist()
    said = core.plus_minus(share, interval)
    run.say(f"answers  the first word is right in {said}, would be by always '{usual}' in {guess:.3f}")
    names = {"first_word": share, "first_word_interval": interval, "first_word_guess": guess}
    return {f"test/{name}": value for name, value in names.items()}


def first_word(text) -> str:
    """In small letters, without signs; empty if there is none."""
    return next(iter(re.findall(r"\w+", text.lower())), "")


def plain_losses(run, cfg, plain, model, poll) -> np.ndarray:
    """(blocks, 2): summed loss and targets of each block of plain text."""
    return gpt_scratch.evaluate(model, plain, cfg, run.world, poll)[:, [0, 2]]


def forgetting(run, cfg, plain, model) -> dict:
    """Loss on plain text after training minus before; the interval redraws blocks, both sides at once."""
    before, after = np.array(run.state["plain"]), plain_losses(run, cfg, plain, model, run.poll)
    targets = after[:, 1]
    values = np.c_[before[:, 0], after[:, 0], after[:, 0] - before[:, 0]] / targets[:, None]
    old, new, more = np.average(values, axis=0, weights=targets).tolist()
    interval = core.bootstrap(values, np.arange(len(values)), weights=targets).tolist()[2]
    change = core.plus_minus(more, interval, 4)
    run.say(f"plain text of {cfg.plain}  loss {old:.4f} before, {new:.4f} after: forgotten {change}")
    return {
        "plain/before": old,
        "plain/after": new,
        "plain/forgotten": more,
        "plain/forgotten_interval": interval,
    }


def alarm(run, step, part, figures) -> str | None:
    """A sentence where `step` steps have taught nothing."""
    lowest, before = run.state["lowest"], run.state["before"]
    if step and not lowest[0] < before:
        return f"NOT LEARNING: validation never fell below the {before:.4f} before training"
    low, high = figures[f"{part}/above_unigram_interval"]
    if step and high >= 0:
        loss, guess = figures[f"{part}/loss"], figures[f"{part}/unigram_loss"]
        how = "is above" if low > 0 else "cannot be told from"
        return f"NOT LEARNING: {part} loss {loss:.4f} {how} that of token frequencies, {guess:.4f}"
    return None


def final_figures(run, cfg, s, model, answering, step) -> dict:
    """Loss, perplexity, accuracy on val and test; forgetting; answers to the test rows by `answering()`, the
    same model as it generates fastest; an alarm if validation is no better than before training."""
    result, done = {}, ""
    for part in held_out(cfg):
        sums = gpt_scratch.evaluate(model, s.parts[part], cfg, run.world, run.poll)
        m, losses = measure(part, sums, s.parts[part], s.parts["train"])
        result |= {f"{part}/{name}": value for name, value in m.items()}
        loss, accuracy = (
            core.plus_minus(m[k], m[f"{k}_interval"], n) for k, n in (("loss", 4), ("accuracy", 3))
        )
        perplexity = f"perplexity {m['perplexity']:.2f}"
        guess = f"token frequencies {m['unigram_loss']:.4f}"
        run.say(f"{part:5} loss {loss}  {perplexity}  accuracy {accuracy}  {guess}")
        done = f"done  {part} loss {m['loss']:.4f}  {perplexity}"
    core.on_main(run.world, lambda: core.write_lines(run.folder / "losses.jsonl", losses))
    if said := alarm(run, step, part, result):
        run.say(said)
        result["alarm"] = said
    if s.plain:
        result |= forgetting(run, cfg, s.plain, model)
    if cfg.final_eval and cfg.answer_rows != 0:
        result |= write_responses(run, cfg, s, answering())
    if spikes := run.state.get("spikes", 0):
        run.say(f"spikes  {spikes} of {step} steps, {run.state['left_out']} left out (spikes.jsonl)")
    run.say(f"{done}  {run.seconds / 60:.1f} min")
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"questions: python {run.script.name} --mode ask --run {run.folder}")
    run.say(f"next: python eval.py --run {run.folder}")
    return result


def ask(model, tokenizer, cfg):
    """Mode ask: answers --prompt, or each line typed, as the tuned model was taught to read it."""
    interactive = cfg.prompt is None and sys.stdin.isatty()
    for text in [cfg.prompt] if cfg.prompt is not None else gpt_scratch.prompt_loop(interactive):
        if text.strip():
            ids = tokenizer(prompt_text(text.strip(), "", cfg.template), add_special_tokens=False).input_ids
            print(answers(model, tokenizer, [ids], cfg.max_new_tokens, 1, core.World())[0])
