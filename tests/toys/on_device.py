"""What test_fake_device.py tries on the pretend device, in a process of its own: planted mix-ups, waits."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import fake_device
import numpy as np
import torch
from fake_device import DEVICE, MixUp, OnDevice, found

import core
import lab.train.loss
import run_preference
from lab.data import tokenizers
from lab.models import encoders, int4, loha_lokr, packed
from lab.train.device import read_step

WORLD = core.World(device=DEVICE)


def stays(tensor, device):
    """A to_device that was forgotten."""
    return tensor


def on_host(**changes) -> core.GPT:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "positions": "rotary"}
    return core.GPT(core.GPTConfig(23, 16, **shape | changes))


def blocks() -> core.Blocks:
    return core.Blocks(np.arange(30) % 23, 8)  # the last one is short: not every position has a target


def labels_of_training():
    with patch.object(lab.train.loss, "to_device", stays):
        on_host().to(DEVICE)(*blocks().batch([2, 3], DEVICE))


def ids_of_generation():
    model = on_host().to(DEVICE)
    hidden = model.hidden
    with patch.object(model, "hidden", lambda ids, cache: hidden(ids.cpu(), cache)):
        core.generate(model, [[1, 2]], 2)


def mask_of_evaluation():
    class OnCard(core.Blocks):
        def batch(self, rows, device):
            ids, labels = super().batch(rows, device)
            return ids, labels.to(device)

    cfg = SimpleNamespace(dtype="fp32", eval_batch=2)
    core.evaluate(on_host().to(DEVICE), OnCard(np.arange(30) % 23, 8), cfg, WORLD)


def buffer_that_is_none():
    model = on_host()
    model.angles = model._buffers.pop("angles")
    model.to(DEVICE).hidden(torch.zeros(1, 4, dtype=torch.int64, device=DEVICE))


def hash_without_cpu():
    with patch.object(OnDevice, "cpu", lambda self: self, create=True):
        core.weights_sha256(on_host().to(DEVICE))


def labels_of_preferences():
    def collated(*given):
        return {"input": torch.zeros(2, 2, 3, device=DEVICE, requires_grad=True)}

    data = SimpleNamespace(labels=np.array([0, 2]), weights=None, soft=None)
    cfg = SimpleNamespace(symmetric=True, micro_batch=None, label_smoothing=0.0)
    shown, precision = [(0, False), (1, True)], core.Precision("fp32", WORLD)
    with patch.object(core, "to_device", stays), patch.object(core, "collate", collated):
        parts = [(shown, run_preference.laid_out(data, cfg, shown, DEVICE))]
        run_preference.backward_of_sum(lambda input: input, precision, parts, 2, WORLD)


def fp64_where_there_is_none():
    on_host().to(DEVICE).wte.weight.double()


PLANTS = {  # what is planted, and in which file it is found
    labels_of_training: "lab/train/loss.py",
    ids_of_generation: "lab/models/gpt.py",
    mask_of_evaluation: "lab/measure/language.py",
    buffer_that_is_none: "lab/models/gpt.py",
    hash_without_cpu: "lab/run/checkpoints.py",
    labels_of_preferences: "lab/train/loss.py",
    fp64_where_there_is_none: "tests/toys/on_device.py",
}


def there(*values) -> torch.Tensor:
    return torch.tensor(values).pin_memory().to(DEVICE, non_blocking=True)


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def weighed() -> dict:
    """How often each of these makes the host wait."""
    a, chosen, at = there(1.0, 2.0, 3.0), there(True, False, True), there(0, 2)
    leaf = there(1.0, 2.0, 3.0).requires_grad_()
    return {
        "item": lambda: a[0].item(),
        "if": lambda: a.sum() > 1 and None,
        "while": lambda: bool(a.all()),
        "tolist": lambda: a.tolist(),
        "to the host": lambda: a.cpu(),
        "from pageable memory": lambda: torch.tensor([1.0]).to(DEVICE, non_blocking=True),
        "made of a list": lambda: torch.tensor([1.0], device=DEVICE),
        "pinned but blocking": lambda: torch.tensor([1.0]).pin_memory().to(DEVICE),
        "a mask": lambda: a[chosen],
        "a list": lambda: a[[0, 2]],
        "nonzero": lambda: chosen.nonzero(),
        "nothing: pinned": lambda: there(1.0),
        "nothing: ids": lambda: a[at],
        "nothing: arithmetic": lambda: torch.softmax(a * 2 + a.mean(), 0),
        "nothing: a backward": lambda: (leaf * a).sum().backward(),
        "nothing: new": lambda: torch.zeros(3, device=DEVICE),
        "nothing: spans of packed rows": lambda: packed.spans(torch.tensor([[0, 0, 1]]), DEVICE),
        "nothing: in a thread": lambda: in_a_thread(there, 1.0),
    }


KINDS = ("full", "lora", "loha", "lokr", "int4")
DTYPES = ("fp32", "bf16", "fp16")


def kinds_of_gpt(kind, dtype) -> int:
    """A step of a GPT tuned in some way, in bf16 evaluation and generation, too; the waits of the step."""
    model, precision = on_host(n_layer=2, tie_head=kind == "full", dropout=0.1), core.Precision(dtype, WORLD)
    if kind == "lora":
        init = "pissa" if dtype == "fp16" else "fan_in"
        core.add_lora(model, 2, 4, head=True, dora=dtype == "bf16", init=init)
    elif kind == "int4":
        int4.insert_fake_quant(model, 8)
        int4.switch(model, True)
    elif kind != "full":
        loha_lokr.add_adapters(model, kind, 2, 4.0)
    optimizer = "adafactor" if (kind, dtype) == ("full", "bf16") else "adamw"
    model = precision.prepare(model).train()
    waits = one_step(model, precision, lambda rows: blocks().batch(rows, DEVICE), optimizer=optimizer)
    if dtype != "bf16":
        return waits
    for each in (model, int4.convert(model, 8)) if kind == "int4" else (model,):
        core.evaluate(each, blocks(), SimpleNamespace(dtype=dtype, eval_batch=2), WORLD)
        with precision.autocast():
            core.generate(each, [[1, 2], [3]], 2, top_k=3, top_p=0.9)
    return waits


def families_of_encoders(family, dtype) -> int:
    """A step of a scorer of pairs of different lengths; its waits."""
    tokenizer = tokenizers.encoder_tokenizer("tiny:", ["one two three four five six"])
    encoder = core.load_encoder(f"tiny:{family}", tokenizer, dropout=0.1)
    model = core.PairScorer(encoder, joint=False, pooling="mean", head="mlp", dropout=0.1)
    precision, lengths = core.Precision(dtype, WORLD), [4, 3, 1, 2]
    ids = there(*([4] * length + [0] * (4 - length) for length in lengths))

    def scored(ids, lengths, size):
        return core.sum_cross_entropy(model(ids, lengths, size=size).mean(0), there(0, 2))

    precision.prepare(model)
    return one_step(model, precision, lambda rows: (ids, lengths, 2), scored)


def one_step(model, precision, batch, loss_of=None, optimizer="adamw") -> int:
    """Waits of two micro-batches and an update."""
    optimizer, losses = core.make_optimizer(model, optimizer, 0.1), []
    found.waits.clear()
    for rows in ([0, 1], [2, 3]):
        with precision.autocast():
            losses.append((loss_of or model)(*batch(rows)))
        core.scaled_backward(losses[-1], WORLD, 30, precision)
    norm = core.gradient_norm(optimizer, precision)
    _, known = read_step(losses, norm)
    core.optimizer_step(optimizer, precision, 1.0, 1e-3, None, norm, known=known)
    return sum(found.waits.values())


def report_steps():
    """Writes the waits of a step of every kind of model to report.json."""
    steps = {}
    for dtype in DTYPES:
        fake_device.knows_fp64[0] = dtype == "fp16"  # torch's loss scaler computes in it
        for kind in KINDS:
            steps[f"gpt {kind} {dtype}"] = kinds_of_gpt(kind, dtype)
        for family in encoders.WHOLE_MASKS if dtype == "bf16" else ["bert"]:
            steps[f"{family} {dtype}"] = families_of_encoders(family, dtype)
    Path("report.json").write_text(json.dumps(steps))


def report_faults():
    """Writes the waits and the mix-ups that are found in what is faulty on purpose to report.json."""
    waits, mixups = {}, {}
    for name, code in weighed().items():
        found.waits.clear()
        code()
        waits[name] = sum(found.waits.values())
    for plant in PLANTS:
        found.mixups.clear()
        with contextlib.suppress(MixUp):
            plant()
        mixups[plant.__name__] = list(found.mixups)
    Path("report.json").write_text(json.dumps([waits, mixups]))
