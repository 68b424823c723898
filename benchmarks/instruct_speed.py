"""Instruction tuning beside peers on the CPU, step by step in turn: target tokens per second, peak memory.

    pip install -r benchmarks/requirements.txt
    python benchmarks/instruct_speed.py rows.json gpt2 [steps]        # a tokenizer: folder or Hub id
    python benchmarks/instruct_speed.py rows.json <SmolLM2> 12 smollm2

Random weights of GPT-2 small, or of SmolLM2-135M (nine heads share the keys and values of three), batch 16,
prompts masked, the same batches for all, each contender a process of its own. loop: transformers' model in a
plain loop, padded to the longest row, every logit computed; trl: SFTTrainer with completion_only_loss; peft:
Trainer with rank 16 on all linear layers of the blocks. ours and lora are what run_instruct.py and
run_lora.py do in a step.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

PROJECT = Path(__file__).resolve().parent.parent
BATCH, LORA = 16, {"lora", "peft"}
CONTENDERS = {"gpt2": ("loop", "trl", "ours", "peft", "lora"), "smollm2": ("loop", "ours", "peft", "lora")}
PARAMETERS = {"gpt2": 124_439_808, "smollm2": 134_515_008}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # KiB on Linux


class Steps:
    """Begins when a line comes in, then reports seconds, target tokens and peak memory."""

    def begin(self):
        if not sys.stdin.readline():
            sys.exit()
        self.began = time.perf_counter()

    def end(self, targets):
        print("step", time.perf_counter() - self.began, targets, peak(), flush=True)


def examples_of(data, tokenizer, steps):
    """core.Examples of the rows, and the batches of all contenders."""
    import numpy as np

    import core
    from lab.data import instructions

    cfg = SimpleNamespace(data=data, max_documents=None, template="alpaca", model=tokenizer, split="seeded",
                          split_seed=0, max_length=512, loss_on_prompt=False)  # fmt: skip
    rows = core.load_instructions(cfg, core.World())
    parts, _ = instructions.split(rows, cfg)
    examples, rng = core.Examples(rows, parts["train"], 512), np.random.default_rng(0)
    order = np.concatenate(
        [rng.permutation(len(examples)) for _ in range(1 + steps * BATCH // len(examples))]
    )
    return examples, order[: steps * BATCH].reshape(steps, BATCH).tolist()


def our_config(shape):
    import core

    if shape == "gpt2":
        return core.GPTConfig(50257)
    llama = {
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "qkv_bias": False,
    }
    return core.GPTConfig(49152, 2048, 30, 9, 576, 1536, **llama, n_kv_head=3, rope_theta=1e5)


def their_model(shape):
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    if shape == "gpt2":
        return GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), trust_remote_code=False)


def ours(who, shape, examples, batches, counter):
    import torch

    import core
    from lab.train import cpu

    cpu.keep_freed_memory()
    world, precision = core.World(), core.Precision("fp32", core.World())
    model = core.GPT(our_config(shape))
    if who == "lora":
        core.add_lora(model, 16, 16)
    optimizer = core.make_optimizer(model, "adamw", 0.0)
    print("ready", flush=True)
    for rows in batches:
        counter.begin()
        targets = int(examples.targets(rows).sum())
        for part in core.micro_batches(model, rows, None, examples.lengths[rows], 8192):
            core.scaled_backward(model(*examples.batch(part, torch.device("cpu"))), world, targets, precision)
        core.optimizer_step(optimizer, precision, 1.0, 5e-5)
        counter.end(targets)


def peer(who, shape, examples, batches, counter):
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = their_model(shape).train()
    if who == "loop":
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        print("ready", flush=True)
        for rows in batches:
            counter.begin()
            input_ids, labels = examples.batch(rows, "cpu")
            logits = model(input_ids).logits
            torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            counter.end(int((labels != -100).sum()))
        return
    rows, targets = [row for batch in batches for row in batch], iter(batches)

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            counter.begin()

        def on_step_end(self, *args, **kwargs):
            counter.end(int(examples.targets(next(targets)).sum()))

    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "use_cpu": True,
        "max_steps": len(batches),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 5e-5,
        "logging_strategy": "no",
        "bf16": False,
    }
    if who == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class InOrder(SFTTrainer):
            def _get_train_sampler(self, *args):
                return SequentialSampler(self.train_dataset)

        wholes = [examples.data.whole(examples.rows[row]) for row in rows]
        prompts = [int(examples.data.prompt_lengths[examples.rows[row]]) for row in rows]
        masks = [[int(i >= n) for i in range(len(ids))] for ids, n in zip(wholes, prompts, strict=True)]
        data = Dataset.from_dict({"input_ids": wholes, "completion_mask": masks})
        args = SFTConfig(**settings, completion_only_loss=True, max_length=512, gradient_checkpointing=False)
        trainer = InOrder(
            model, args, train_dataset=data, processing_class=examples.data.tokenizer, callbacks=[Turns()]
        )
    else:
        from peft import LoraConfig, get_peft_model

        class InOrder(Trainer):
            def _get_train_sampler(self, *args):
                return SequentialSampler(self.train_dataset)

        layers = ["c_attn", "c_proj", "c_fc"] if shape == "gpt2" else "all-linear"
        adapted = LoraConfig(r=16, lora_alpha=16, target_modules=layers, fan_in_fan_out=shape == "gpt2")

        def collate(numbers):
            input_ids, labels = examples.batch(numbers, "cpu")  # labels shifted; the model shifts by itself
            shifted = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-100)
            last = torch.full((len(numbers), 1), -100)
            ids = torch.cat([input_ids, last.clamp(min=0)], 1)
            full = torch.cat([shifted, last], 1)
            for i, row in enumerate(numbers):  # the end token, which inputs alone lack
                n = int(examples.lengths[row])
                ids[i, n], full[i, n] = examples.pair(row)[1][-1], labels[i, n - 1]
            return {"input_ids": ids, "labels": full, "attention_mask": (ids >= 0).long()}

        args = TrainingArguments(**settings, remove_unused_columns=False)
        trainer = InOrder(
            get_peft_model(model, adapted),
            args,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[Turns()],
        )
    print("ready", flush=True)
    trainer.train()


def contender(who, data, tokenizer, steps, shape):
    sys.path.insert(0, str(PROJECT))
    examples, batches = examples_of(data, tokenizer, int(steps))
    print("base", peak(), flush=True)  # libraries and rows, no model yet
    (ours if who in ("ours", "lora") else peer)(who, shape, examples, batches, Steps())


def read(process, word):
    while not (line := process.stdout.readline()).startswith(word):
        if not line:
            sys.exit(f"a contender ended: {process.args}")
    return [float(x) for x in line.split()[1:]]


def compare(data, tokenizer, steps, shape):
    words = data, tokenizer, str(steps + 2), shape
    processes = {
        who: subprocess.Popen([sys.executable, __file__, "--worker", who, *words],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for who in CONTENDERS[shape]
    }  # fmt: skip
    base = {who: read(process, "base")[0] for who, process in processes.items()}
    for process in processes.values():
        read(process, "ready")
    turns = {who: [] for who in processes}
    for _ in range(steps + 2):
        for who, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            turns[who].append(read(process, "step"))
    for who, rows in turns.items():
        seconds, targets = (sum(row[i] for row in rows[2:]) for i in range(2))
        memory, own = rows[-1][2], "lora" if who in LORA else "ours"
        state = (
            4 * PARAMETERS[shape] / 1e6 * (1 if who in LORA else 4)
        )  # weights, or weights, gradients, moments
        ratio = statistics.median(a[0] / b[0] for a, b in zip(rows[2:], turns[own][2:], strict=True))
        above = memory - state
        print(
            f"{who:5} {seconds / steps:6.2f} s a step  {targets / seconds:6.1f} target tokens/s  "
            f"{own} is {ratio:.2f} x as fast  peak {memory:5.0f} MB, {above:5.0f} above state, "
            f"{above - base[who]:5.0f} above libraries"
        )
        processes[who].kill()


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        contender(*sys.argv[2:])
    else:
        data, tokenizer, *rest = sys.argv[1:]
        steps, shape = [*rest, *("12", "gpt2")[len(rest) :]]
        compare(data, tokenizer, int(steps), shape)
