"""Small adapted models, ours and peft's."""

import torch
from torch import nn

import core
import run_mathqa as script
from core import World
from lab.models import loha_lokr

NOAM = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False},
}
SHAPES = {"gpt2": {}, "noam": NOAM}
METHODS = loha_lokr.METHODS
OPTIMIZERS = ["adamw", "lion", "muon", "adafactor", "sgd"]


def random_gpt(dtype=torch.float32, seed=0, **config):
    """Small, with weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(seed)
    small = {"vocab_size": 97, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_inner": 48}
    model = core.GPT(core.GPTConfig(**small | config)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval()


def ids(*size, seed=1):
    return torch.randint(97, size, generator=torch.Generator().manual_seed(seed))


def numbers(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_near(got, expected, share):
    """Relative to the largest: what sums up cancels."""
    assert expected.abs().max() > 0
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= share * expected.abs().max()


def config(*argv):
    argv = [str(word) for word in argv]
    return core.parse_config(script.Config, script.PRESETS, script.SMOKE, script.__doc__, argv)


def a_step(model, optimizer):
    model(ids(3, 16), ids(3, 16, seed=2)).backward()
    core.optimizer_step(optimizer, core.Precision("fp32", World()), None, 0.01)


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
