"""Speed and memory of MathQA tuning, side by side: full tuning and LoRA; LoHa and LoKr against peft's on the
same model; an epoch of rows against one padded to the longest row of random batches; the int4 file.

    python benchmarks/mathqa_speed.py <rows of MathQA> <GPT-2's tokenizer folder> [rounds] [layers]

Everything takes turns; medians. Journal 004's width, 1,024, with fewer layers. Needs
benchmarks/requirements.txt.
"""

import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
import run_mathqa
from lab.data.tokenizers import pretrained_tokenizer
from lab.models import gpt, int4, loha_lokr
from lab.train import cpu

RANK, ALPHA, ROWS, LENGTH = 16, 32.0, 16, 128  # a step of 2,048 tokens


def shape(layers):
    return core.GPTConfig(
        50304, 512, layers, 16, 1024, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False,
        qkv_bias=False,
    )  # fmt: skip


def in_turns(jobs, rounds) -> dict[str, float]:
    """Median seconds of each job; the first round warms up."""
    seconds = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def step_of(model, optimizer, ids, labels):
    def step():
        model(ids, labels).backward()
        core.optimizer_step(optimizer, core.Precision("fp32", core.World()), 1.0, 1e-5)

    return step


def optimizer_of(model):
    return run_mathqa.make_optimizer(run_mathqa.Config(), model)


def memory(model, optimizer) -> int:
    """Bytes of gradients and optimizer state."""
    trains = [p for p in model.parameters() if p.requires_grad]
    state = [t for of in optimizer.state.values() for t in of.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in (*trains, *state))


def peft_of(kind, module):
    """The same module with peft's adapters on its linear layers."""
    import peft

    config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    module.requires_grad_(False)
    return peft.inject_adapter_in_model(config(r=RANK, alpha=ALPHA, target_modules=names), module)


def layers_alone(rounds):
    """Forward and backward of one 1,024 -> 3,072 and one 2,816 -> 1,024 layer, 2,048 rows."""
    for kind, ours in (("loha", loha_lokr.LoHaLinear), ("lokr", loha_lokr.LoKrLinear)):
        jobs = {}
        for who in ("ours", "peft"):
            wide, back = (
                gpt.Linear(1024, 3072, bias=False),
                gpt.Linear(2816, 1024, bias=False),
            )
            both = nn.ModuleList([wide, back])
            if who == "ours":
                both.requires_grad_(False)
                both = nn.ModuleList([ours(layer, RANK, ALPHA / RANK) for layer in both])
            else:
                both = peft_of(kind, both)
            xs = [torch.randn(ROWS * LENGTH, n, requires_grad=True) for n in (1024, 2816)]

            def job(both=both, xs=xs):
                for layer, x in zip(both, xs, strict=True):
                    layer(x).sum().backward()

            jobs[who] = job
        found = in_turns(jobs, rounds)
        print(f"{kind} layers  ours {1e3 * found['ours']:.0f} ms  peft {1e3 * found['peft']:.0f} ms  "
              f"{found['peft'] / found['ours']:.2f} x", flush=True)  # fmt: skip


def whole_steps(rounds, layers):
    torch.manual_seed(0)
    ids = torch.randint(50257, (ROWS, LENGTH))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(LENGTH) < LENGTH - 8, core.IGNORE_INDEX)  # an answer
    base = core.GPT(shape(layers))
    full = copy.deepcopy(base)
    jobs, models = {}, {"full": full}
    for method in loha_lokr.METHODS:
        models[method] = copy.deepcopy(base)
        loha_lokr.add_adapters(models[method], method, RANK, ALPHA)
    for kind in ("loha", "lokr"):
        models[f"peft {kind}"] = peft_of(kind, copy.deepcopy(base))
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    jobs = {name: step_of(model, optimizers[name], ids, labels) for name, model in models.items()}
    found = in_turns(jobs, rounds)
    rates = {name: ids.numel() / seconds for name, seconds in found.items()}
    print("  ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()))
    print(f"LoRA {rates['lora'] / rates['full']:.2f} x full tuning")
    for kind in ("loha", "lokr"):
        print(f"{kind} step {rates[kind] / rates[f'peft {kind}']:.2f} x peft's")
    bytes_of = {name: memory(model, optimizers[name]) for name, model in models.items()}
    share = bytes_of["lora"] / bytes_of["full"]
    print(f"gradients and optimizer, {layers} layers: LoRA {bytes_of['lora'] / 1e6:.1f} MB, full "
          f"{bytes_of['full'] / 1e6:.1f} MB, {share:.4f}", flush=True)  # fmt: skip


def epoch(data, folder, rounds):
    """All rows once, 128 a batch: as run_mathqa.py groups them, and padded to a random batch's longest."""
    tokenizer = pretrained_tokenizer(folder, "")
    cfg = run_mathqa.Config(data=data)
    rows = core.load_problems(cfg, core.World(), tokenizer)
    units = core.Examples(rows, np.arange(len(rows)), cfg.max_length + 1, cfg.loss_on_prompt)
    model = core.GPT(core.GPTConfig(
        50304, 512, 4, 8, 256, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False,
        qkv_bias=False,
    ))  # fmt: skip
    optimizer, world = optimizer_of(model), core.World()
    precision = core.Precision("fp32", world)

    def one(block, size, most):
        batches = core.ShardedBatches(units.lengths, 128, world, seed=0, block=block)
        for step in range(len(batches)):
            mine = batches.rank_batch(step)
            lengths = units.lengths[mine] if most else None
            for part in core.micro_batches(model, mine, size, lengths, most or cfg.micro_tokens):
                core.scaled_backward(model(*units.batch(part, world.device)), world, 1, precision)
            core.optimizer_step(optimizer, precision, 1.0, 1e-5)

    packs = core.Packs(units, cfg.max_length)

    def packed():
        batches = core.ShardedBatches(packs.lengths, 128 * len(packs) // len(units), world, seed=0)
        for step in range(len(batches)):
            for part in core.micro_batches(model, batches.rank_batch(step), 4):
                core.scaled_backward(model(*packs.batch(part, world.device)), world, 1, precision)
            core.optimizer_step(optimizer, precision, 1.0, 1e-5)

    jobs = {"grouped": lambda: one(50, None, cfg.micro_tokens), "random": lambda: one(1, 128, None)}
    found = in_turns(jobs | {"packed": packed}, rounds)
    longest, mean = units.lengths.max(), units.lengths.mean()
    print(f"epoch of {len(units)} rows, {mean:.0f} tokens, longest {longest}: " + "  ".join(
        f"{name} {seconds:.2f} s" for name, seconds in found.items()))  # fmt: skip
    print(
        f"grouped {found['random'] / found['grouped']:.2f} x padded to the longest of random batches",
        flush=True,
    )


def files():
    with torch.device("meta"):
        whole = sum(p.numel() for p in core.GPT(shape(10)).parameters())
    model = core.GPT(shape(10))
    for group in (256, 32):
        with tempfile.TemporaryDirectory() as folder:

            class Nothing:
                def save_pretrained(self, path):
                    path.mkdir()

            int4.save(int4.convert(model, group), group, Nothing(), Path(folder) / "small")
            size = (Path(folder) / "small" / "model.safetensors").stat().st_size
        print(
            f"int4 in groups of {group}: {size / 1e6:.1f} of {4 * whole / 1e6:.1f} MB, {size / 4 / whole:.3f}"
        )
    with torch.device("meta"):
        small = core.GPT(shape(10))
        loha_lokr.add_adapters(small, "lora", RANK, ALPHA)
    print(f"LoRA's share of gradients and optimizer at 10 layers: "
          f"{core.count_parameters(core.Adapters(small))[0] / whole:.4f}")  # fmt: skip


def main():
    cpu.keep_freed_memory()
    data, folder, rounds, layers = (*sys.argv[1:], *("", "", "5", "4")[len(sys.argv) - 1 :])
    print(f"{torch.get_num_threads()} threads, {rounds} rounds, {ROWS} x {LENGTH} tokens, {layers} layers")
    layers_alone(2 * int(rounds))
    whole_steps(int(rounds), int(layers))
    epoch(data, folder, max(1, int(rounds) // 2))
    files()


if __name__ == "__main__":
    main()
