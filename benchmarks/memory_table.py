"""What a training step needs, counted without a GPU and without memory; which models fit on which cards.

python benchmarks/memory_table.py           # the table of docs/on_a_box.md, some minutes on one core
python benchmarks/memory_table.py --check   # the count beside what this CPU really takes, at two shapes

Counted: the storages alive in forward and backward under fake tensors, which have shapes and no numbers, with
the kernels a card takes (bf16, its head, flash attention); AdamW's two fp32 numbers a trained weight are
added. Of a card 0.92 are used, but for 0.6 GB of CUDA's own. Rows have 1,024 tokens.
"""

import argparse
import functools
import resource
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
from lab.models import gpt
from lab.train import cpu, loss, optim

LLAMA = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False}
QWEN = LLAMA | {"qkv_bias": True, "vocab_size": 151_936}
SHAPES = {  # layers, heads, width, and what is not GPT-2's
    "gpt2 (0.12B)": (12, 12, 768, {}),
    "gpt2-medium (0.35B)": (24, 16, 1024, {}),
    "gpt2-large (0.77B)": (36, 20, 1280, {}),
    "gpt2-xl (1.6B)": (48, 25, 1600, {}),
    "SmolLM2-360M": (32, 15, 960, {**LLAMA, "vocab_size": 49_152, "n_inner": 2560, "n_kv_head": 5}),
    "Qwen2.5-0.5B": (24, 14, 896, {**QWEN, "n_inner": 4864, "n_kv_head": 2}),
    "Llama-3.2-1B": (16, 32, 2048, {**LLAMA, "vocab_size": 128_256, "n_inner": 8192, "n_kv_head": 8}),
    "Qwen2.5-1.5B": (28, 12, 1536, {**QWEN, "n_inner": 8960, "n_kv_head": 2}),
    "Qwen2.5-3B": (36, 16, 2048, {**QWEN, "n_inner": 11_008, "n_kv_head": 2}),
}
TOKENS = 1024  # of a row
CARDS = (16, 24, 48, 80)  # GB
MODES = {  # flags -> (adapters, checkpointing, whether AdamW's state is shared out)
    "full": (False, False, False),
    "full --checkpointing": (False, True, False),
    "full --checkpointing --shard optimizer": (False, True, True),
    "LoRA": (True, False, False),
    "LoRA --checkpointing": (True, True, False),
}


class Storages(TorchDispatchMode):
    """Bytes of all storages alive that operators have returned meanwhile, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, out)
        return out

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, address, size):
        self.alive.remove(address)
        self.now -= size


def config_of(shape, checkpointing=False) -> core.GPTConfig:
    n_layer, n_head, n_embd, other = SHAPES[shape]
    whole = {"vocab_size": 50_257, "block_size": TOKENS, "checkpointing": checkpointing, **other}
    return core.GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, **whole)


def new_model(config, adapters=False, half=True):
    model = core.GPT(config)
    if adapters:
        core.add_lora(model, rank=16, alpha=16)
        core.narrow_base(model, "bf16" if half else "fp32")
    return model


def backward(model, rows, half=True):
    ids = torch.zeros(rows, TOKENS, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        hidden = model.hidden(ids).flatten(0, 1)
        value = loss.linear_cross_entropy(*model.head(hidden), ids.flatten())
    value.backward()


def counted(config, rows, adapters=False, half=True) -> tuple[float, float]:
    """(GB of a step's peak without AdamW's state, GB of that state)."""
    with FakeTensorMode(), Storages() as storages:
        model = new_model(config, adapters, half)
        storages.peak = storages.now  # it reaches the card as it is
        backward(model, rows, half)
        state = optim.state_numbers(core.make_optimizer(model, "adamw", 0.1))
        del model
    return storages.peak / 1e9, 4 * state / 1e9


def as_on_a_card(logits=1 << 27):
    """Has the head computed as a card does, by default one of 48 GB: so many logits at once, by one kernel.
    Lets models be made that are larger than this machine."""

    def chunks(hidden, weight):
        rows = max(1, logits // len(weight))
        return [slice(start, start + rows) for start in range(0, len(hidden), rows)]

    loss._head_on_cpu, loss._chunks, loss._slope = loss._head_on_card, chunks, one_kernel
    gpt.require_memory = nothing


def one_kernel(logits, bias, y, V, scale=1.0):
    """The memory of _slope where it is compiled."""
    return torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)


def nothing(parameters, what):
    """Instead of a refusal."""


ROWS = (1, 4, 16, 64, 256)  # counted; straight lines between them, and no guess beyond: few rows need no more
# memory than the gradients do at the end of the backward, so a line through them would be flat


@functools.cache
def peaks(shape, adapters, checkpointing) -> tuple[list[float], float]:
    """GB of a step's peak for each of ROWS, without AdamW's state, and GB of that state."""
    found = [counted(config_of(shape, checkpointing), rows, adapters) for rows in ROWS]
    return [peak for peak, _ in found], found[0][1]


def most_rows(shape, mode, cards, gb) -> int:
    """The largest micro-batch that fits; 0: none does."""
    adapters, checkpointing, shared = MODES[mode]
    known, state = peaks(shape, adapters, checkpointing)
    room, rows = 0.92 * (gb - 0.6) - state / (cards if shared else 1), 0
    for first, last, low, high in zip(ROWS, ROWS[1:], known, known[1:], strict=False):
        if room >= low:
            rows = min(last, first + int((room - low) / max(high - low, 1e-9) * (last - first)))
    return rows


def cell(shape, cards, gb) -> str:
    """The first of MODES that fits, and with how many rows at once."""
    for mode in MODES:
        if (rows := most_rows(shape, mode, cards, gb)) and not (MODES[mode][2] and cards == 1):
            return f"{mode}, {rows}{'+' if rows == ROWS[-1] else ''}"
    return "-"


def rows_of(shape) -> list[tuple[str, list[str]]]:
    """(numbers of cards, a cell for each of CARDS); numbers that make no difference share a row."""
    cells = {cards: [cell(shape, cards, gb) for gb in CARDS] for cards in (1, 2, 4)}
    if cells[1] == cells[2] == cells[4]:
        return [("1, 2, 4", cells[1])]
    return [(str(cards), of) for cards, of in cells.items()]


def table(shapes):
    as_on_a_card()
    print(f"| | cards | {' | '.join(f'{gb} GB' for gb in CARDS)} |")
    print("|---|---" + "|---" * len(CARDS) + "|")
    for shape in shapes:
        for cards, cells in rows_of(shape):
            print(f"| {shape} | {cards} | {' | '.join(cells)} |", flush=True)
    alone = {mode: how for mode, how in MODES.items() if not how[2]}
    print(f"\n| GB of a step, 1 and {ROWS[1]} rows at once | {' | '.join(alone)} |")
    print("|---" * (1 + len(alone)) + "|")
    for shape in shapes:
        known = [peaks(shape, *how[:2]) for how in alone.values()]
        cells = [f"{peak[0] + state:.1f}, {peak[1] + state:.1f}" for peak, state in known]
        print(f"| {shape} | {' | '.join(cells)} |")


CHECKED = {  # what one process of this CPU takes: small enough for fp32 on two cores
    "8 layers of 512": (8, 8, 512, {"vocab_size": 8192}),
    "4 layers of 1024, Llama": (4, 8, 1024, LLAMA | {"vocab_size": 8192, "tie_head": False}),
}


def check():
    """Counted beside measured: the growth of this process's peak, in fp32, with two steps of AdamW."""
    SHAPES.update(CHECKED)
    for shape in CHECKED:
        needs, state = counted(config_of(shape), 2, half=False)
        command = [sys.executable, __file__, "--measure", shape]
        measured = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        counts = needs + state
        told = f"counted {counts:.3f} GB  measured {measured:.3f} GB  {counts / measured:.3f}"
        print(f"{shape:26} {told}")
    gpt2 = config_of("gpt2 (0.12B)")
    as_on_a_card(1 << 28)
    counts = sum(counted(gpt2, 64))
    told = f"counted {counts:.1f} GB  measured on an H200 26.0 GB  {counts / 26:.3f}"
    print(f"{'gpt2, 64 rows, bf16':26} {told}")


def measure(shape) -> float:
    """GB by which two real steps make this process larger."""
    SHAPES.update(CHECKED)
    cpu.keep_freed_memory()
    backward(new_model(core.GPTConfig(64, TOKENS, 1, 1, 64)), 1, half=False)  # libraries, threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = new_model(config_of(shape))
    backward(model, 2, half=False)
    optimizer, precision = core.make_optimizer(model, "adamw", 0.1), core.Precision("fp32", core.World())
    core.optimizer_step(optimizer, precision, 1.0, 1e-4)
    backward(model, 2, half=False)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e9


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--measure", help="of --check: a process of its own for each shape")
    given = parser.parse_args()
    if given.measure:
        print(measure(given.measure))
    else:
        check() if given.check else table([given.shape] if given.shape else SHAPES)


if __name__ == "__main__":
    main()
