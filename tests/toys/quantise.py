"""Models prepared for int4, and a clock that is moved by hand."""

import json
from pathlib import Path

import torch
from ranks import launch, newest, result
from torch import nn

import core
import run_mathqa
from core import GPT, GPTConfig
from lab.models import int4

LLAMA = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False},
}
SHAPES = {
    "gpt2": {},  # biases, learned positions, LayerNorm
    "noam": LLAMA,
    "no biases": {"bias": False, "qkv_bias": False, "activation": "relu"},
    "rotary with biases": {"positions": "rotary", "qkv_bias": True, "bias": False},
    "untied": LLAMA | {"tie_head": False},
    "untied with biases": {"tie_head": False, "head_bias": True},
}
TINY = [
    *("--smoke", "--mode", "train", "--init_from", "new", "--max_documents", 300),
    *("--pretrain", "noam_wide4,max_documents=60,tokenizer=bpe:1024,block_size=64,n_embd=32"),
    *("--max_steps", 12, "--batch", 16, "--eval_every", 6, "--answer_rows", 5),
    *("--eval_rows", 20, "--plain_blocks", 3),
]


def random_gpt(dtype=torch.float32, seed=0, **config):
    """Small, with weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(seed)
    small = {"vocab_size": 97, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**small | config)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval()


def prepared(group=16, on=True, **how):
    model = random_gpt(**how)
    int4.insert_fake_quant(model, group)
    int4.switch(model, on)
    return model


def ids(*size, seed=1):
    return torch.randint(97, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, x=None):
    return model(ids(3, 16) if x is None else x)


def numbers(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_close(ours, theirs, most=1e-6):
    assert (ours - theirs).abs().max() <= most * theirs.abs().max()


def assert_far(ours, theirs):
    """So that an equality beside it cannot hold for want of a difference."""
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


def parsed(*argv):
    constants = run_mathqa.Config, run_mathqa.PRESETS, run_mathqa.SMOKE
    return core.parsed_config(*constants, "", [str(word) for word in argv])


def here(*argv):
    """A run of run_mathqa.py in this process; its result.json."""
    run_mathqa.main(parsed("--out", "out", *argv), core.World())
    return result() if "quantise" not in argv else None


def quantised(folder, size=1):
    """(result.json, its folder) of --mode quantise."""
    argv = ["--smoke", "--mode", "quantise", "--run_folder", folder]
    if size == 1:
        here(*argv)
    else:
        assert launch("run_mathqa", *argv, size=size) == [0] * size, Path("out.txt").read_text()
    (small,) = folder.glob("quantised_*")
    return json.loads((small / "result.json").read_text()), small


def metrics(out="out"):
    return [json.loads(line) for line in (newest(out) / "metrics.jsonl").read_text().splitlines()]
