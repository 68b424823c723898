"""Training GPT-2 small on one card beside a plain nanoGPT step, and the language-model head alone.

python benchmarks/gpu.py            # one GPU, two minutes, no network
python benchmarks/gpu.py --tiny     # the same on a CPU, to try the logic

The peer: SDPA, half precision, fused AdamW, whole model compiled, vocabulary padded to 50,304. Ours is what
gpt_scratch.py does in a step with nothing typed (dtype auto), then with --compile. All in one process, 4
steps to warm up and 12 timed. MFU: of ours, by lab/train/flops.py.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
from lab.train import compiling, flops, loss
from lab.train.loss import linear_cross_entropy
from lab.train.precision import native_dtype

TINY = "--tiny" in sys.argv
WORLD = core.World(device=torch.device("cpu" if TINY else "cuda"))
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(native_dtype(WORLD.device), torch.float32)
FULL = native_dtype(WORLD.device) == "fp32"
B, T, L, H, C, V = (4, 64, 2, 4, 64, 500) if TINY else (64, 1024, 12, 12, 768, 50257)
WARM, STEPS = (1, 2) if TINY else (4, 12)


def wait():
    if WORLD.device.type == "cuda":
        torch.cuda.synchronize()


def timed(step) -> dict:
    """Milliseconds of a step, and peak memory."""
    on_card = WORLD.device.type == "cuda"
    for i in range(WARM + STEPS):
        if i == WARM:
            wait()
            began = time.perf_counter()
            _ = torch.cuda.reset_peak_memory_stats() if on_card else None
        step(i)
    wait()
    figures = {"ms": 1e3 * (time.perf_counter() - began) / STEPS}
    return figures | ({"peak GB": torch.cuda.max_memory_allocated() / 1e9} if on_card else {})


def row(name, make, tokens=None):
    """Each contender with clean memory; one that fails is a line. Printed as it comes."""
    gc.collect()
    torch.compiler.reset()
    if WORLD.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        figures = timed(make())
    except Exception as error:
        print(f"{name:44} failed: {type(error).__name__}: {error}".splitlines()[0][:100], flush=True)
        return
    if tokens:
        figures["tokens/s"] = 1e3 * tokens / figures["ms"]
        card = torch.cuda.get_device_name() if WORLD.device.type == "cuda" else "CPU"
        if most := flops.peak(card, native_dtype(WORLD.device)):
            with torch.device("meta"):
                model = core.GPT(core.GPTConfig(V, T, L, H, C))
            figures["MFU"] = 1e3 * flops.training_flops(model).of([T] * B, B * T) / figures["ms"] / most
    print(f"{name:44}", "  ".join(f"{key} {value:.5g}" for key, value in figures.items()), flush=True)


def our_step(stream, compiled):
    """gpt_scratch.py's, from core's verbs."""
    model = core.GPT(core.GPTConfig(V, T, L, H, C))
    precision = core.Precision("auto", WORLD)
    model = precision.prepare(model)
    core.wrap_ddp(model, WORLD, model.h, dynamic=None)
    compiling.switch(compiled)
    optimizer = core.make_optimizer(model, "adamw", 0.1)
    blocks = core.Blocks(stream, T)
    batches = core.ShardedBatches(np.full(len(blocks), T), B, WORLD, seed=0)

    def step(i):
        with precision.autocast():
            loss = model(*blocks.batch(batches.rank_batch(i), WORLD.device))
        core.scaled_backward(loss, WORLD, B * T, precision)
        loss.item()
        core.optimizer_step(optimizer, precision, 1.0, 1e-4)

    return step


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        q, k, v = (y.view(B, T, H, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Peer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding((V + 63) // 64 * 64, C), nn.Embedding(T, C)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(L))), nn.LayerNorm(C)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, x, y):
        x = self.norm(self.blocks(self.wte(x) + self.wpe.weight))
        return F.cross_entropy((x @ self.wte.weight.t()).flatten(0, 1), y.flatten())


def peer_step(stream):
    model = Peer().to(WORLD.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward = model if TINY else torch.compile(model)
    ids = torch.from_numpy(stream[: B * T + 1].astype(np.int64)).to(WORLD.device)

    def step(i):
        with torch.autocast(WORLD.device.type, HALF, enabled=not FULL):
            forward(ids[:-1].view(B, T), ids[1:].view(B, T)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def head_step(loss_of):
    x = torch.randn(B * T, C, device=WORLD.device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=WORLD.device)).requires_grad_()
    labels = torch.randint(V, (B * T,), device=WORLD.device)

    def step(i):
        x.grad = weight.grad = None
        with torch.autocast(WORLD.device.type, HALF, enabled=not FULL):
            loss = loss_of(x, weight, labels)
        loss.backward()

    return step


def ours(x, weight, labels):
    return linear_cross_entropy([(x, weight)], None, labels)


def whole(x, weight, labels):
    """All logits at once, as nanoGPT has them."""
    return F.cross_entropy(x @ F.pad(weight, (0, 0, 0, -V % 64)).t(), labels, reduction="sum")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.parse_args()
    if not TINY and not torch.cuda.is_available():
        sys.exit("no CUDA device: use --tiny for the logic alone")
    name = "CPU" if TINY else torch.cuda.get_device_name()
    print(f"{name}  torch {torch.__version__}  {native_dtype(WORLD.device)}  {B} x {T} tokens a step")
    stream = np.random.default_rng(0).integers(0, V, 2_000_001, dtype=np.uint16)
    row("head: ours", lambda: head_step(ours))  # also lets the compiler's helpers start before the steps
    large, loss.LARGE = loss.LARGE, sys.maxsize
    row("head: ours, not compiled", lambda: head_step(ours))
    loss.LARGE = large
    row("head: all logits at once, compiled", lambda: head_step(whole if TINY else torch.compile(whole)))
    row("step: nanoGPT's, compiled", lambda: peer_step(stream), B * T)
    row("step: ours, nothing typed", lambda: our_step(stream, False), B * T)
    row("step: ours, --compile", lambda: our_step(stream, not TINY), B * T)
    row("step: nanoGPT's, compiled, again", lambda: peer_step(stream), B * T)


if __name__ == "__main__":
    main()
