"""Supervised fine-tuning: rows of instruction, input and answer, for run_instruct.py and run_lora.py.

template -> token ids -> splits -> examples (padded to their length, or packed) -> measures -> answers
"""

import hashlib
import importlib
import inspect
import itertools
import json
import math
import platform
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import core
import corpus
import gpt_scratch

COLUMNS = ("instruction", "input", "output")  # Alpaca's
SHARES = {"train": 0.85, "test": 0.10, "val": 0.05}  # journal 001's, in the order in which it took them
CACHE_VERSION = 1  # of the layout that write_cache writes: change both together

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
    groups: np.ndarray  # hash of instruction and input: equal prompts stay together
    tokens: np.ndarray
    offsets: np.ndarray  # piece p is tokens[offsets[p] : offsets[p + 1]]
    tokenizer: object
    fingerprint: dict
    lines: list[str]  # what to tell the user about unusable rows

    def __len__(self):
        return len(self.texts)

    @property
    def prompt_lengths(self) -> np.ndarray:
        return np.diff(self.offsets)[::2]

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens, without the end token."""
        return np.diff(self.offsets)[1::2]

    def prompt(self, row) -> list[int]:
        return self.tokens[self.offsets[2 * row] : self.offsets[2 * row + 1]].tolist()

    def whole(self, row) -> list[int]:
        """Prompt, answer, end token."""
        ids = self.tokens[self.offsets[2 * row] : self.offsets[2 * row + 2]].tolist()
        return [*ids, self.tokenizer.eos_token_id]


def load_instructions(cfg, world) -> Instructions:
    """The rows of cfg.data, tokenised once by rank 0 into the cache, read from there by every rank."""
    builtin, tiny = cfg.data == "python-instructions", cfg.model.startswith("tiny:")
    name = gpt_scratch.tokenizer_of(cfg.model)
    tokenizer = None if tiny else core.main_first(world, lambda: corpus.named_tokenizer(name))
    words = f"bpe:{TINY_VOCABULARY}" if tiny else core.tokenizer_fingerprint(tokenizer)

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
    bad, texts = core.BadRows(), []
    for number, row in enumerate(rows, start=1):
        try:
            texts.append(parse(row))
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
        meta = {"kind": kind, "texts": texts, "groups": groups, "lines": lines, "fingerprint": fingerprint}
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
    return Instructions(meta["texts"], groups, tokens, offsets, tokenizer, meta["fingerprint"], meta["lines"])


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
    if empty := [name for name, rows in parts.items() if not len(rows)]:
        raise core.UserError(
            f"{cfg.data} leaves no {empty[0]} rows of {n}: use more rows or a larger --max_length"
        )
    cut = int((fits & (data.prompt_lengths + data.answer_lengths + 1 > cfg.max_length)).sum())
    lines = [
        f"{cut} row(s) are cut at {cfg.max_length} tokens: they lose the end of the answer and its end token"
    ]
    if left := int((~fits).sum()):
        lines.append(f"{left} row(s) are left out: their prompts alone fill {cfg.max_length} tokens")
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
        longest = max(len(ids) for ids, _ in pairs)
        both = (
            torch.tensor([[0, core.IGNORE_INDEX]])
            .repeat(len(pairs) * longest, 1)
            .view(len(pairs), longest, 2)
        )
        for row, pair in zip(both, pairs, strict=True):
            row[: len(pair[0])] = torch.tensor(pair).T
        return both[..., 0].contiguous().to(device), both[..., 1].contiguous().to(device)

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
    texts = (
        text
        for part, text, _ in corpus.split_pieces(corpus.Corpus(name, ""), core.BadRows())
        if part == "test"
    )
    ids = []
    for text in texts:
        ids += [
            tokenizer.eos_token_id,
            *tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids,
        ]
        if len(ids) > most * block_size:
            break
    if len(ids) < 2:
        raise core.UserError(f"--plain {name} has no held-out document: use several files, or python-docs")
    return corpus.Blocks(np.array(ids[: most * block_size + 1]), block_size)


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
        model = model if cfg.tie_head else gpt_scratch.untied(model)
    if cfg.max_length > (most := model.config.block_size):
        raise core.UserError(f"--max_length {cfg.max_length} is over the {most} positions of {cfg.model}")
    if len(tokenizer) > model.config.vocab_size:
        raise core.UserError(f"the tokenizer of {cfg.model} has {len(tokenizer)} tokens, the model "
                             f"{model.config.vocab_size}: they do not belong together")  # fmt: skip
    return model


def announce(run, cfg, data, parts, lines, model, train):
    """The journal's table (parameters, MB, trainable), and what of the data is used how."""
    total, trainable = core.count_parameters(model)
    counts = "  ".join(f"{name} {len(rows)}" for name, rows in parts.items())
    run.say(f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   {counts}")
    run.begin()
    run.say(f"parameters {total:,}  {4 * total / 2**20:.2f} MB in fp32  trainable {trainable:,}")
    run.say(f"data {cfg.data}  {len(data)} rows, {len(set(data.groups))} prompts  split {cfg.split}")
    for line in [*data.lines, *lines]:
        run.say(line)
    examples = parts["train"]
    every = range(len(examples))
    tokens, targets = int(examples.lengths.sum()), int(examples.targets(every).sum())
    longest = int(examples.lengths.max())
    run.say(f"train rows have {tokens / len(examples):.0f} tokens (longest {longest}), "
            f"{targets / len(examples):.0f} of them targets")  # fmt: skip
    if isinstance(train, Packs):
        fill = tokens / (len(train) * train.lengths.max())
        run.say(f"packed into {len(train)} packs of at most {train.lengths.max()} tokens, {fill:.0%} full")
    if left := len(train) % cfg.batch:
        what = f"{left} of {len(train)} {'packs' if cfg.pack else 'rows'}"
        run.say(f"each epoch leaves out {what}, others each time: they fill no batch of {cfg.batch}")


def describe_example(examples, example=0) -> str:
    """What the loss masks and what it counts, decoded from the ids."""
    ids, labels = examples.pair(example)
    masked = int(examples.masked([example])[0])
    decode, one_line = examples.data.tokenizer.decode, gpt_scratch.one_line
    seen, counted = one_line(decode(ids[: masked + 1])), one_line(decode(labels[masked:]))
    counts = f"{len(ids) - masked} targets, {masked + 1} tokens masked"
    lines = [f"the loss sees row {examples.rows[example]}: {counts}; padding is masked"]
    return "\n".join([*lines, f"  masked:  {shortened(seen)}", f"  counted: {shortened(counted)}"])


def shortened(text, width=88) -> str:
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


def step_facts(train, units) -> dict:
    """Of a global batch: targets, the share that padding to its longest row would add, the longest row."""
    lengths = train.lengths[list(units)]
    return {
        "targets": int(train.targets(units).sum()),
        "pad_share": float(1 - lengths.sum() / (len(lengths) * lengths.max())),
        "longest": int(lengths.max()),
    }


def autopsy(train, units, examples, rates) -> dict:
    """What an odd step saw, for spikes.jsonl."""
    members = train.members(units)
    text = examples.data.tokenizer.decode(examples.pair(members[0])[0])
    facts = {"rows": [int(examples.rows[member]) for member in members], "first_row": text}
    return rates | facts | {"lengths": examples.lengths[members].tolist(), **step_facts(train, units)}


# ------------------------------------------------------------------------------------ measures and answers

PROMPTS = (  # answered at every evaluation; the first three and the last are journal 001's questions
    "Suggest an alternate word for 'happy'.",
    "What is the correct spelling of 'freind'?",
    "How many meters are 4 kilometers?",
    "Write a tweet about the first day of spring.",
    "Translate into French: 'Good morning, how are you?'",
)


def measure(sums, groups) -> dict:
    """Of gpt_scratch.evaluate's sums, (rows, 3): loss per target token, perplexity, accuracy; 95 % intervals
    over prompts."""
    targets = sums[:, 2]
    values = sums[:, :2] / targets[:, None]
    intervals = core.bootstrap(values, groups, weights=targets).tolist()
    loss, accuracy = sums[:, :2].sum(0) / targets.sum()
    metrics = {"loss": loss, "loss_interval": intervals[0], "perplexity": math.exp(min(loss, 700))}
    metrics |= {"accuracy": accuracy, "accuracy_interval": intervals[1]}
    return metrics | {"targets": int(targets.sum()), "rows": len(sums)}


def report_validation(run, step, val, where, is_best, steps_per_epoch):
    """The line of an evaluation, and a warning when validation has not fallen for half an epoch."""
    lowest = run.state.setdefault("lowest", [val["loss"], step])
    run.state.setdefault("before", val["loss"])
    if val["loss"] < lowest[0]:
        lowest[:] = val["loss"], step
    loss, accuracy = (
        core.plus_minus(val[name], val[f"{name}_interval"], digits)
        for name, digits in (("loss", 4), ("accuracy", 3))
    )
    perplexity, best = f"perplexity {val['perplexity']:.2f}", "  -> best" if is_best else ""
    run.say(f"{where}  val  loss {loss}  {perplexity}  accuracy {accuracy}{best}")
    if step - lowest[1] >= 0.5 * steps_per_epoch:
        epochs = (step - lowest[1]) / steps_per_epoch
        run.say(
            f"{where}  val  OVERFITTING? no fall for {epochs:.2g} epochs: {lowest[0]:.4f} at step {lowest[1]}"
        )
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
    with core.progress(len(batches), "answering", world) as bar:
        for step in range(len(batches)):
            if mine := batches.rank_batch(step):
                chosen = [prompts[i] for i in mine]
                rows = gpt_scratch.generate(model, chosen, max_new_tokens, **how, poll=lambda: poll(1))
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


def write_responses(run, cfg, model, test, train) -> dict:
    """responses.json in the journal's form: each test row and its model_response; how many begin rightly."""
    data, rows = test.data, test.rows[: cfg.answer_rows]
    if not len(rows):
        return {}
    prompts = [data.prompt(row) for row in rows]
    texts = answers(model, data.tokenizer, prompts, cfg.max_new_tokens, cfg.eval_batch, run.world, run.poll)
    named = [dict(zip(COLUMNS, data.texts[row], strict=True)) for row in rows]
    full = [row | {"model_response": text} for row, text in zip(named, texts, strict=True)]
    if run.world.is_main:
        core.write_json(run.folder / "responses.json", full)
    wanted = [first_word(row["output"]) for row in full]
    usual = Counter(first_word(data.texts[row][2]) for row in train.rows).most_common(1)[0][0]
    right = [first_word(text) == word for text, word in zip(texts, wanted, strict=True)]
    guess = [usual == word for word in wanted]
    intervals = core.bootstrap(np.c_[right, guess], data.groups[rows]).tolist()
    empty = sum(not text for text in texts)
    share = core.plus_minus(np.mean(right), intervals[0])
    run.say(f"answers  {len(rows)} in responses.json, {empty} empty")
    run.say(
        f"answers  the first word is right in {share}, would be by always '{usual}' in {np.mean(guess):.3f}"
    )
    names = {"first_word": float(np.mean(right)), "first_word_interval": intervals[0]}
    names["first_word_guess"] = float(np.mean(guess))
    return {f"test/{name}": value for name, value in names.items()} | {"test/empty_responses": empty}


def first_word(text) -> str:
    """In small letters, without signs."""
    return next(iter(re.findall(r"\w+", text.lower())), "")


def remember_plain(run, cfg, model, tokenizer, poll):
    """The loss on plain text before training, block by block: see forgetting."""
    if cfg.plain_blocks:
        run.state["plain"] = plain_losses(run, cfg, model, tokenizer, poll).tolist()


def plain_losses(run, cfg, model, tokenizer, poll) -> np.ndarray:
    """(blocks, 2): summed loss and targets of each block of plain text."""
    blocks = plain_blocks(
        cfg.plain, tokenizer, min(cfg.max_length, model.config.block_size), cfg.plain_blocks
    )
    return gpt_scratch.evaluate(model, blocks, cfg, run.world, poll)[:, [0, 2]]


def forgetting(run, cfg, model, tokenizer) -> dict:
    """Loss on plain text after training minus before; the interval redraws blocks, both sides at once."""
    if "plain" not in run.state:
        return {}
    before, after = np.array(run.state["plain"]), plain_losses(run, cfg, model, tokenizer, run.poll)
    targets = after[:, 1]
    values = np.c_[before[:, 0], after[:, 0], after[:, 0] - before[:, 0]] / targets[:, None]
    old, new, more = np.average(values, axis=0, weights=targets).tolist()
    interval = core.bootstrap(values, np.arange(len(values)), weights=targets).tolist()[2]
    run.say(f"plain text of {cfg.plain}  loss {old:.4f} before, {new:.4f} after: forgotten "
            f"{core.plus_minus(more, interval, 4)}")  # fmt: skip
    return {
        "plain/before": old,
        "plain/after": new,
        "plain/forgotten": more,
        "plain/forgotten_interval": interval,
    }


def final_figures(run, cfg, parts, model, answering, step) -> dict:
    """Loss, perplexity, accuracy on val and test; forgetting; answers to the test rows by `answering`, the
    same model as it generates fastest; an alarm if validation is no better than before training."""
    result, world = {}, run.world
    for part in ("val", "test") if cfg.final_eval else ("val",):
        sums = gpt_scratch.evaluate(model, parts[part], cfg, world, run.poll)
        m = measure(sums, parts[part].data.groups[parts[part].rows])
        result |= {f"{part}/{name}": value for name, value in m.items()}
        accuracy = core.plus_minus(m["accuracy"], m["accuracy_interval"])
        run.say(f"{part:5} loss {core.plus_minus(m['loss'], m['loss_interval'], 4)}   "
                f"perplexity {m['perplexity']:.2f}   accuracy {accuracy}   rows {m['rows']}")  # fmt: skip
    lowest, before = run.state["lowest"], run.state["before"]
    if step and not lowest[0] < before:
        result["alarm"] = f"NOT LEARNING: validation never fell below the {before:.4f} before training"
        run.say(result["alarm"])
    result |= forgetting(run, cfg, model, parts["train"].data.tokenizer)
    if cfg.final_eval:
        result |= write_responses(run, cfg, answering, parts["test"], parts["train"])
    run.say(
        f"done  {part} loss {m['loss']:.4f}  perplexity {m['perplexity']:.2f}  {run.seconds / 60:.1f} min"
    )
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"next: tensorboard --logdir {run.folder.parent}")
    return result
