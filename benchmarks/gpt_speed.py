"""Training speed and memory of gpt_scratch's GPT beside nanoGPT's, on the CPU, step by step in turn.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/gpt_speed.py nanoGPT [steps]

Each contender is a process of its own (an allocator setting is one of a process); they take turns step by
step, so that a slow minute of the machine hits all. stock = as nanoGPT's train.py builds it; tuned = with
our allocator setting and a fused AdamW. Every round also times a 1024-cubed matmul: the share is of its rate.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {  # n_layer, n_head, n_embd, block_size, batch, vocab_size
    "4x128": (4, 4, 128, 64, 12, 65),
    "6x384": (6, 6, 384, 256, 12, 65),
    "8x512": (8, 8, 512, 512, 2, 50257),
}
PROJECT = Path(__file__).resolve().parent.parent


def contender(who, shape, peer):
    """Makes one step per line read; answers with its seconds, the matmul's, and the peak memory in MB."""
    import torch

    layers, heads, width, block, batch, vocab = SHAPES[shape]
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": block, "vocab_size": vocab}
    sys.path[:0] = [str(PROJECT), peer]
    import core
    from lab.train import cpu

    if who != "stock":
        cpu.keep_freed_memory()
    torch.manual_seed(0)
    if who == "ours":
        model = core.GPT(core.GPTConfig(**sizes, bias=False, qkv_bias=False))
        optimizer = core.make_optimizer(model, "adamw", 0.1, (0.9, 0.95))
    else:
        import model as nano

        model = nano.GPT(nano.GPTConfig(**sizes, dropout=0.0, bias=False))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        if who == "tuned":
            optimizer = torch.optim.AdamW(optimizer.param_groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    input_ids, labels = torch.randint(vocab, (2, batch, block))
    square = torch.randn(1024, 1024)
    work = (
        6 * sum(p.numel() for n, p in model.named_parameters() if "wpe" not in n) + 6 * layers * width * block
    )
    print(
        "ready", batch * block, work, flush=True
    )  # FLOPs of a token: forward and backward, causal attention
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = model(input_ids, labels) / labels.numel() if who == "ours" else model(input_ids, labels)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        square @ square
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(seconds, time.perf_counter() - began, peak, flush=True)


def compare(shape, peer, steps):
    processes = {}
    for who in ("stock", "tuned", "ours"):
        command = [sys.executable, __file__, "--worker", who, shape, peer]
        processes[who] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    tokens, work = {}, {}
    for who, process in processes.items():
        while not (line := process.stdout.readline()).startswith("ready"):
            pass
        tokens[who], work[who] = map(int, line.split()[1:])
    times = {who: [] for who in processes}
    for _ in range(steps + 2):
        for who, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            times[who].append([float(x) for x in process.stdout.readline().split()])
    matmul = 2 * 1024**3 / statistics.median(t[1] for rows in times.values() for t in rows[2:])
    seconds = {who: statistics.median(t[0] for t in rows[2:]) for who, rows in times.items()}
    for who, rows in times.items():
        processes[who].kill()
        share = work[who] * tokens[who] / seconds[who] / matmul
        ratio = statistics.median(a[0] / b[0] for a, b in zip(rows[2:], times["ours"][2:], strict=True))
        print(
            f"{shape}  {who:5}  {tokens[who] / seconds[who]:6.0f} tokens/s  {share:4.0%} of matmul "
            f"({matmul / 1e9:.0f} GFLOP/s)  {rows[-1][2]:5.0f} MB peak  ours is {ratio:.2f} x as fast"
        )


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        contender(*sys.argv[2:])
    else:
        for shape in SHAPES:
            few = int(sys.argv[2]) if len(sys.argv) > 2 else 20
            compare(shape, str(Path(sys.argv[1]).resolve()), few * 10 if shape == "4x128" else few)
