"""The contenders of benchmarks/gpu.py: `python benchmarks/gpu_rows.py NAME [--tiny]` prints one as JSON.

Random weights and rows, the same for both sides; ours are the scripts' steps from core's verbs, in the dtype
that they choose by themselves. A peer that is not installed says "skipped".
"""

import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
import run_preference
from lab.data.instructions import Instructions
from lab.data.pairs import Preferences, measure_sequences
from lab.models import decoding
from lab.train import compiling, flops, loss
from lab.train.precision import native_dtype

TINY = "--tiny" in sys.argv  # to try the logic on a CPU
ON_CARD = not TINY and torch.cuda.is_available()
WORLD = core.World(device=torch.device("cuda", 0) if ON_CARD else torch.device("cpu"))
DTYPE = native_dtype(WORLD.device)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(DTYPE, torch.float32)
SMALL = core.GPTConfig(500, 64, 2, 4, 64) if TINY else core.GPTConfig(50257)
MEDIUM = core.GPTConfig(512, 64, 2, 4, 64) if TINY else core.GPTConfig(50257, 1024, 24, 16, 1024)
B, WARM, STEPS = (4, 1, 2) if TINY else (64, 4, 12)


def wait():
    if ON_CARD:
        torch.cuda.synchronize()


def half():
    return torch.autocast(WORLD.device.type, HALF, enabled=torch.float32 != HALF)


def timed(step, units, steps=STEPS) -> dict:
    """Units (tokens, rows) a second, milliseconds of a step, peak memory. units(i): of step i."""
    for i in range(WARM + steps):
        if i == WARM:
            wait()
            began = time.perf_counter()
            if ON_CARD:
                torch.cuda.reset_peak_memory_stats()
        step(i)
    wait()
    return figures(time.perf_counter() - began, [units(i) for i in range(WARM, WARM + steps)])


def figures(seconds, units) -> dict:
    found = {"per second": sum(units) / seconds, "ms": 1e3 * seconds / len(units)}
    return found | ({"peak GB": torch.cuda.max_memory_allocated() / 1e9} if ON_CARD else {})


def with_mfu(found) -> dict:
    """Model FLOPs of ours over the card's dense peak, where that is known; for GPT-2 small."""
    most = flops.peak(torch.cuda.get_device_name() if ON_CARD else "CPU", DTYPE)
    if not most:
        return found
    with torch.device("meta"):
        model = core.GPT(SMALL)
    T = SMALL.block_size
    return found | {"MFU": 1e3 * flops.training_flops(model).of([T] * B, B * T) / found["ms"] / most}


# -- the language-model head alone: 65,536 rows of width 768, forward and both gradients ---------------------


def head(loss_of) -> dict:
    rows, C, V = B * SMALL.block_size, SMALL.n_embd, SMALL.vocab_size
    x = torch.randn(rows, C, device=WORLD.device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=WORLD.device)).requires_grad_()
    labels = torch.randint(V, (rows,), device=WORLD.device)

    def step(i):
        x.grad = weight.grad = None
        with half():
            total = loss_of(x, weight, labels)
        total.backward()

    found = timed(step, lambda i: rows)
    return found | ({"note": "; ".join(loss.notes)} if loss.notes else {})


def head_whole() -> dict:
    """All logits at once, as nanoGPT has them."""

    def whole(x, weight, labels):
        padded = F.pad(weight, (0, 0, 0, -len(weight) % 64))
        return F.cross_entropy(x @ padded.t(), labels, reduction="sum")

    return head(whole if TINY else torch.compile(whole))


def head_ours(ways=None) -> dict:
    """ways: of loss.FAST, the kernels that may be used; none: all."""
    if ways is not None:
        loss.FAST[:] = [(name, way) for name, way in loss.FAST if name in ways]

    def ours(x, weight, labels):
        return loss.linear_cross_entropy([(x, weight)], None, labels)

    return head(ours)


# -- a step of GPT-2 small, 64 x 1,024 tokens ----------------------------------------------------------------


def compiled(model, parts, on, dynamic=True):
    """As scripts do, unasked from ten minutes of training on. dynamic: one graph for all lengths."""
    core.wrap_ddp(model, WORLD, parts, dynamic)
    compiling.switch(on and ON_CARD)


def update(optimizer, precision, losses, lr):
    """The end of every script's step."""
    norm = core.gradient_norm(optimizer, precision)
    torch.stack([*losses, norm]).tolist()  # the one wait
    core.optimizer_step(optimizer, precision, 1.0, lr, None, norm)


def step_ours(compile) -> dict:
    T = SMALL.block_size
    stream = np.random.default_rng(0).integers(0, SMALL.vocab_size, 40 * B * T + 1, dtype=np.uint16)
    blocks, precision = core.Blocks(stream, T), core.Precision(DTYPE, WORLD)
    batches = core.ShardedBatches(np.full(len(blocks), T), B, WORLD, seed=0)
    model = precision.prepare(core.GPT(SMALL))
    compiled(model, model.h, compile, dynamic=None)
    optimizer = core.make_optimizer(model, "adamw", 0.1)
    run = SimpleNamespace(world=WORLD, cfg=SimpleNamespace(micro_batch=None), rows_ahead=[])
    micro_batches = core.MicroBatches(run, model, blocks.batch)

    def step(i):
        run.rows_ahead, losses = batches.rank_batch(i + 1), []
        for _, batch in micro_batches(batches.rank_batch(i)):
            with precision.autocast():
                losses.append(model(*batch))
            core.scaled_backward(losses[-1], WORLD, B * T, precision)
        update(optimizer, precision, [one.detach() for one in losses], 1e-4)

    return with_mfu(timed(step, lambda i: B * T))


class Block(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(C), nn.LayerNorm(C), H
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Plain(nn.Module):
    """nanoGPT's model: SDPA, vocabulary padded to 50,304."""

    def __init__(self, shape):
        super().__init__()
        C, V = shape.n_embd, shape.vocab_size
        self.wte, self.wpe = nn.Embedding((V + 63) // 64 * 64, C), nn.Embedding(shape.block_size, C)
        self.blocks = nn.Sequential(*(Block(C, shape.n_head) for _ in range(shape.n_layer)))
        self.norm = nn.LayerNorm(C)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, x, y):
        x = self.norm(self.blocks(self.wte(x) + self.wpe.weight))
        return F.cross_entropy((x @ self.wte.weight.t()).flatten(0, 1), y.flatten())


def step_nano() -> dict:
    """Half precision, fused AdamW, the whole model compiled, clipped; its rows lie on the card already."""
    T = SMALL.block_size
    model = Plain(SMALL).to(WORLD.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward = model if TINY else torch.compile(model)
    ids = torch.randint(SMALL.vocab_size, (B * T + 1,), device=WORLD.device)

    def step(i):
        with half():
            forward(ids[:-1].view(B, T), ids[1:].view(B, T)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return with_mfu(timed(step, lambda i: B * T))


# -- LoRA on GPT-2 medium, batch 128, lengths like Alpaca's --------------------------------------------------


@functools.cache
def instructions():
    """(Examples, ShardedBatches): the same batches for both sides."""
    rng, n, scale = np.random.default_rng(0), 100 if TINY else 4000, 8 if TINY else 1
    sizes = np.c_[rng.integers(40, 120, n), np.minimum(rng.gamma(1.2, 50, n).astype(int) + 2, 380)]
    offsets = np.concatenate([[0], np.cumsum((sizes // scale + 1).reshape(-1))])
    tokens, end = rng.integers(0, MEDIUM.vocab_size, offsets[-1]), SimpleNamespace(eos_token_id=0)
    data = Instructions(
        [["a", "", "b"]] * n, [None] * n, np.arange(n), np.arange(n), tokens, offsets, end, {}, []
    )
    examples = core.Examples(data, np.arange(n), 512 // scale)
    return examples, core.ShardedBatches(examples.lengths, 8 if TINY else 128, WORLD, seed=0)


def lora_ours(compile) -> dict:
    examples, batches = instructions()
    precision = core.Precision(DTYPE, WORLD)
    model = core.GPT(MEDIUM)
    core.add_lora(model, 16, 16)
    model = precision.prepare(model)
    core.narrow_base(model, "bf16" if DTYPE == "bf16" else "fp32")
    optimizer = core.make_optimizer(model, "adamw", 0.0)
    compiled(model, model.h, compile)
    cfg = SimpleNamespace(micro_batch=None, micro_tokens=8192)
    run = SimpleNamespace(world=WORLD, cfg=cfg, rows_ahead=[])
    micro_batches = core.MicroBatches(run, model, examples.batch, examples.lengths)

    def step(i):
        rows, losses = batches.rank_batch(i), []
        run.rows_ahead, targets = batches.rank_batch(i + 1), int(examples.targets(rows).sum())
        for _, batch in micro_batches(rows):
            with precision.autocast():
                losses.append(model(*batch))
            core.scaled_backward(losses[-1], WORLD, targets, precision)
        update(optimizer, precision, [one.detach() for one in losses], 5e-4)

    return timed(step, lambda i: int(examples.lengths[batches.rank_batch(i)].sum()))


def hugging_face(shape):
    """transformers' GPT-2 of this shape, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
    sizes = {"n_positions": shape.block_size, "n_layer": shape.n_layer, "n_head": shape.n_head}
    return GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab_size, n_embd=shape.n_embd, **sizes, **none))


def lora_peft() -> dict:
    """peft's LoRA in transformers' Trainer, on the same batches of similar lengths."""
    from peft import LoraConfig, get_peft_model

    examples, batches = instructions()
    layers = LoraConfig(r=16, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    rows = [row for i in range(WARM + STEPS) for row in batches.rank_batch(i)]

    def collate(numbers):
        wholes = [torch.tensor(examples.data.whole(row)[: examples.max_length]) for row in numbers]
        ids = nn.utils.rnn.pad_sequence(wholes, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(wholes, batch_first=True, padding_value=-100)
        for row, prompt in enumerate(examples.data.prompt_lengths[numbers]):
            labels[row, :prompt] = -100
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(one)] for one in wholes])).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    lengths = [int(examples.lengths[batches.rank_batch(i)].sum()) for i in range(WARM, WARM + STEPS)]
    model = get_peft_model(hugging_face(MEDIUM), layers)
    return trainer(model, rows, collate, batches.batch, 4, STEPS, lengths)


def trainer(model, rows, collate, batch, parts, steps, units) -> dict:
    """transformers' Trainer over `rows` in their order: `parts` micro-batches a step."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times = {}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (WARM, WARM + steps):
                wait()
                times[state.global_step] = time.perf_counter()
            if state.global_step == WARM and ON_CARD:
                torch.cuda.reset_peak_memory_stats()

    folder = tempfile.TemporaryDirectory()
    args = TrainingArguments(
        output_dir=folder.name, per_device_train_batch_size=batch // parts, max_steps=WARM + steps,
        gradient_accumulation_steps=parts, optim="adamw_torch_fused" if ON_CARD else "adamw_torch", seed=0,
        bf16=DTYPE == "bf16", fp16=DTYPE == "fp16", use_cpu=not ON_CARD, dataloader_pin_memory=ON_CARD,
        dataloader_num_workers=2 if ON_CARD else 0, save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    with folder:
        InOrder(model, args, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    return figures(times[WARM + steps] - times[WARM], units)


# -- preference: BERT base, batch 32, both sides of a row up to 512 tokens -----------------------------------


@functools.cache
def preferences():
    rng, n, scale = np.random.default_rng(0), 40 if TINY else 1120, 8 if TINY else 1
    sizes = np.minimum(rng.gamma(1.5, 130, (n, 3)).astype(int) + 4, 700) // scale + 1
    offsets = np.concatenate([[0], np.cumsum(sizes.reshape(-1))])
    special = SimpleNamespace(pad_token_id=0, cls_token_id=1, sep_token_id=2)
    tokens, labels = rng.integers(3, 500, offsets[-1]), rng.integers(0, 3, n)
    ids = [str(i) for i in range(n)]
    data = Preferences(
        ids, np.arange(n), labels, np.arange(n + 1) * 3, tokens, offsets, special, None, {}, []
    )
    cfg = run_preference.Config(batch=4 if TINY else 32, max_length=512 // scale, symmetric=False)
    measure_sequences(data, cfg.inputs, cfg.max_length)
    return cfg, data, (n - 4 * cfg.batch) // cfg.batch  # steps: an epoch, but for those that warm up


def scorer():
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    shape = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **(small if TINY else {}))
    encoder = BertModel(shape, add_pooling_layer=False)
    return core.PairScorer(encoder, joint=False, pooling="first", head="linear", dropout=0.0)


def preference_ours(compile) -> dict:
    cfg, data, steps = preferences()
    precision = core.Precision(DTYPE, WORLD)
    model = precision.prepare(scorer())
    optimizer = core.make_optimizer(model, "adamw", 0.01)
    compiled(model, [model.encoder], compile)
    batches = core.ShardedBatches(data.lengths.sum(1), cfg.batch, WORLD, seed=0)
    run = SimpleNamespace(world=WORLD, cfg=SimpleNamespace(micro_batch=None), rows_ahead=[])
    lay_out = functools.partial(run_preference.laid_out, data, cfg)
    micro_batches = core.MicroBatches(run, model, lay_out)

    def step(i):
        rows, ahead = ([(row, False) for row in batches.rank_batch(n)] for n in (i, i + 1))
        run.rows_ahead = ahead
        made = micro_batches(rows)
        losses = run_preference.backward_of_sum(model, precision, made, cfg.batch, WORLD)
        update(optimizer, precision, losses, 1e-5)

    return timed(step, lambda i: cfg.batch, steps)


class Classifier(nn.Module):
    """The same encoder and head, in the form that Trainer takes."""

    def __init__(self):
        super().__init__()
        self.scorer = scorer()

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.scorer.encoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        logits = self.scorer.head(torch.cat(hidden.chunk(2), dim=-1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def preference_trainer() -> dict:
    """Rows in random order, both sides of a batch padded to its longest."""
    cfg, data, steps = preferences()

    def collate(rows):
        found = core.collate(data, rows, cfg, "cpu", 1)
        mask = (torch.arange(found["input_ids"].shape[1]) < torch.tensor(found["lengths"])[:, None]).long()
        return {
            "input_ids": found["input_ids"],
            "attention_mask": mask,
            "labels": torch.as_tensor(data.labels[rows]),
        }

    rows = np.random.default_rng(1).permutation(len(data.labels)).tolist()
    return trainer(Classifier(), rows, collate, cfg.batch, 1, steps, [cfg.batch] * steps)


# -- decoding: GPT-2 medium, greedy, 16 tokens and 128 more --------------------------------------------------


def written(write, batch) -> dict:
    """The second call of write(prompts, n): tokens a second."""
    n = 8 if TINY else 128
    prompts = [[(7 * row + j) % MEDIUM.vocab_size for j in range(16)] for row in range(batch)]
    write(prompts, n)
    wait()
    began = time.perf_counter()
    write(prompts, n)
    wait()
    return figures(time.perf_counter() - began, [batch * n])


def decode_ours(batch) -> dict:
    model, precision = core.GPT(MEDIUM).to(WORLD.device).eval(), core.Precision(DTYPE, WORLD)
    decoder = decoding.decoder_of(model)  # shared, as by all batches of an evaluation's answers

    def write(prompts, n):
        with precision.autocast():
            core.generate(model, prompts, n, temperature=0, decoder=decoder)

    return written(write, batch)


def decode_static(batch) -> dict:
    """transformers' generate with its static cache, which it compiles by itself; weights in half."""
    model = hugging_face(MEDIUM).to(WORLD.device, HALF).eval()
    cache = {} if TINY else {"cache_implementation": "static"}

    def write(prompts, n):
        ids = torch.tensor(prompts, device=WORLD.device)
        lengths = {"max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0, "do_sample": False}
        model.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **cache)

    return written(write, batch)


# -- the same losses as on the CPU ---------------------------------------------------------------------------


def curve(device, dtype) -> list[float]:
    """Losses of 20 steps of a small GPT; weights and rows are the CPU's."""
    world, shape = core.World(device=device), core.GPTConfig(2000, 64, 2, 4, 128)
    core.reseed(0)
    model, precision, found = core.GPT(shape), core.Precision(dtype, world), []
    model = precision.prepare(model)
    optimizer = core.make_optimizer(model, "adamw", 0.1)
    blocks = core.Blocks(np.random.default_rng(0).zipf(1.3, 20 * 8 * 64 + 1) % 2000, 64)
    for step in range(3 if TINY else 20):
        with precision.autocast():
            total = model(*blocks.batch(range(8 * step, 8 * step + 8), device))
        core.scaled_backward(total, world, 8 * 64, precision)
        found.append(total.item() / (8 * 64))
        core.optimizer_step(optimizer, precision, 1.0, 3e-4)
    return found


def losses() -> dict:
    there, exact, rounded = (
        curve(torch.device("cpu"), "fp32"),
        curve(WORLD.device, "fp32"),
        curve(WORLD.device, DTYPE),
    )
    worst = max(abs(a / b - 1) for a, b in zip(exact, there, strict=True))
    mean = sum(abs(a - b) for a, b in zip(rounded, there, strict=True)) / len(there)
    wanted = {} if worst <= 1e-5 and mean <= 0.02 else {"failed": "wanted: 1e-5 and 0.02 at most"}
    return {"fp32 worst": worst, f"{DTYPE} mean": mean, **wanted}


ROWS = {
    "losses": losses,
    "head, all logits at once": head_whole,
    "head, ours": head_ours,
    "head, ours by torch.compile": functools.partial(head_ours, ["torch.compile"]),
    "head, ours eager": functools.partial(head_ours, []),
    "step, nanoGPT": step_nano,
    "step, ours": functools.partial(step_ours, True),
    "step, ours --no-compile": functools.partial(step_ours, False),
    "lora, peft": lora_peft,
    "lora, ours": functools.partial(lora_ours, True),
    "lora, ours --no-compile": functools.partial(lora_ours, False),
    "preference, Trainer": preference_trainer,
    "preference, ours": functools.partial(preference_ours, True),
    "preference, ours --no-compile": functools.partial(preference_ours, False),
    "decoding 1, static cache": functools.partial(decode_static, 1),
    "decoding 1, ours": functools.partial(decode_ours, 1),
    "decoding 8, static cache": functools.partial(decode_static, 8),
    "decoding 8, ours": functools.partial(decode_ours, 8),
}


def row(name) -> dict:
    """Its figures, or why there are none."""
    try:
        return ROWS[name]()
    except ImportError as error:
        missing = f"{error.name.partition('.')[0]} is not installed" if error.name else str(error)
        return {"skipped": missing.splitlines()[0][:100]}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


if __name__ == "__main__":
    where = {"device": torch.cuda.get_device_name() if ON_CARD else "CPU", "torch": torch.__version__}
    if not (TINY or ON_CARD):
        sys.exit("no CUDA device: use --tiny for the logic alone")
    print(json.dumps(row(sys.argv[1]) | where | {"dtype": DTYPE}))
