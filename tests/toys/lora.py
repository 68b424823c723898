"""Small GPT-2s of transformers with adapters, ours and peft's."""

import peft
import torch
from torch import nn
from transformers import GPT2LMHeadModel

import core
from core import GPT, GPTConfig
from lab.models import lora_peft

LLAMA = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False},
}


def random_gpt(dtype=torch.float32, seed=0, **config):
    """Small, with weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(seed)
    small = {"vocab_size": 97, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**small | config)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval()


def randomise(model, std=0.2):
    """As after a training: B is not zero any more."""
    torch.manual_seed(5)
    for layer in core.adapted(model).values():
        nn.init.normal_(layer.B, std=std)
    return model


def adapted_gpt(rank=4, alpha=6, dtype=torch.float32, scaling="alpha/r", config=None, **how):
    """With trained adapters."""
    model = random_gpt(dtype, **(config or {}))
    core.add_lora(model, rank, alpha, scaling, **how)
    return randomise(model)


def ids(*size, seed=1):
    return torch.randint(97, size, generator=torch.Generator().manual_seed(seed))


def numbers(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@torch.no_grad()
def logits(model, x=None):
    out = model(ids(3, 16) if x is None else x)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_close_logits(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()  # fp32, another order of additions


def assert_far(ours, theirs):
    """So that an equality beside it cannot hold for want of a difference."""
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


def beside_peft(folder, rank=4, alpha=7, scaling="alpha/r", config=None, **how):
    """Our adapted model, and peft's of the same numbers: base and adapters went over the disk."""
    model = random_gpt(**(config or {}))
    core.save_pretrained(model, None, folder / "base")
    core.add_lora(model, rank, alpha, scaling, **how)
    lora_peft.save_peft(randomise(model), folder / "adapter", str(folder / "base"))
    base = GPT2LMHeadModel.from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    return model, theirs.eval()
