"""run_preference's training step beside transformers' Trainer on the CPU, step by step in turn.

    pip install -r benchmarks/requirements.txt
    python benchmarks/preference_speed.py FILE ENCODER [steps] [encoder dropout]

Same encoder, head, rows, batch of 16, AdamW and clipping, each contender a process of its own. dynamic:
Trainer, rows in random order, both sides of a batch padded to its longest; padded: the same, to max_length
512; ours: what run_preference.py does in a step (one order of A and B, as the Trainer). Rows per second are
those of all steps together.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BATCH, MAX_LENGTH = 16, 512
CONTENDERS = ("ours", "dynamic", "padded")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # KiB on Linux


class Steps:
    """Begins when a line comes in, then reports seconds and peak memory."""

    def begin(self):
        if not sys.stdin.readline():
            sys.exit()
        self.began = time.perf_counter()

    def end(self):
        print("step", time.perf_counter() - self.began, peak(), flush=True)


def prepared(file, encoder, dropout):
    import core
    import run_preference
    from lab.data import pairs

    cfg = run_preference.Config(
        data=file, model=encoder, batch=BATCH, max_length=MAX_LENGTH, symmetric=False,
        encoder_dropout=None if dropout == "none" else float(dropout),
    )  # fmt: skip
    data = core.load_pairs(cfg, core.World())
    pairs.measure_sequences(data, cfg.inputs, cfg.max_length)
    return cfg, data


def ours(cfg, data, steps, counter):
    import core
    import run_preference
    from lab.train import cpu

    cpu.keep_freed_memory()
    world, precision = core.World(), core.Precision("fp32", core.World())
    model = run_preference.scorer(cfg, core.load_backbone(cfg, data.tokenizer, world), precision)
    optimizer = core.make_optimizer(model, "adamw", 0.01)
    batches = core.ShardedBatches(data.lengths.sum(1), BATCH, world, seed=0)
    print("ready", flush=True)
    for step in range(steps):
        counter.begin()
        rows = batches.rank_batch(step * len(batches) // steps)
        shown = [(row, False) for row in rows]
        parts = [(shown, run_preference.laid_out(data, cfg, shown, world.device))]
        run_preference.backward_of_sum(model, precision, parts, BATCH, world)
        core.optimizer_step(optimizer, precision, 1.0, 1e-5)
        counter.end()


def trainer(cfg, data, steps, counter, padded):
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import core
    import run_preference

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            backbone = core.load_backbone(cfg, data.tokenizer, core.World())
            self.scorer = run_preference.scorer(cfg, backbone, core.Precision("fp32", core.World()))

        def forward(self, input_ids, attention_mask, labels):
            hidden = self.scorer.encoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
            logits = self.scorer.head(torch.cat(hidden.chunk(2), dim=-1))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            counter.begin()

        def on_step_end(self, *args, **kwargs):
            counter.end()

    def collate(rows):
        inputs = core.collate(data, rows, cfg, "cpu")
        ids, ends = inputs["input_ids"], torch.tensor(inputs["lengths"])[:, None]
        if padded:
            ids = torch.nn.functional.pad(ids, (0, MAX_LENGTH - ids.shape[1]))
        mask = (torch.arange(ids.shape[1]) < ends).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.as_tensor(data.labels[rows])}

    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, use_cpu=True, max_steps=steps,
        save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-5, logging_strategy="no",
        remove_unused_columns=False, seed=0,
    )  # fmt: skip
    core.reseed(0)
    rows = list(range(len(data.labels)))
    run = Trainer(Model(), args, train_dataset=rows, data_collator=collate, callbacks=[Turns()])
    print("ready", flush=True)
    run.train()


def contender(who, file, encoder, steps, dropout):
    sys.path.insert(0, str(PROJECT))
    cfg, data = prepared(file, encoder, dropout)
    if who == "ours":
        ours(cfg, data, int(steps), Steps())
    else:
        trainer(cfg, data, int(steps), Steps(), who == "padded")


def read(process, word):
    while not (line := process.stdout.readline()).startswith(word):
        if not line:
            sys.exit(f"a contender ended: {process.args}")
    return [float(x) for x in line.split()[1:]]


def compare(file, encoder, steps="15", dropout="none"):
    start = [sys.executable, __file__, "--worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {}
    for who in CONTENDERS:  # one after the other: the first fills the token cache
        processes[who] = subprocess.Popen([*start, who, file, encoder, steps, dropout], **pipes)
        read(processes[who], "ready")
    turns = {who: [] for who in CONTENDERS}
    for _ in range(int(steps)):
        for who, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            turns[who].append(read(process, "step"))
    rates = {who: int(steps) * BATCH / sum(seconds for seconds, _ in rows) for who, rows in turns.items()}
    for who, rows in turns.items():
        print(f"{who:8} {rates[who]:6.2f} rows/s   ours is {rates['ours'] / rates[who]:.2f} x as fast   "
              f"peak memory {rows[-1][1]:6.0f} MB")  # fmt: skip
        processes[who].kill()


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        contender(*sys.argv[2:])
    else:
        compare(*sys.argv[1:])
