"""Rotary positions and their scalings: transformers' angles; refusals."""

import pytest
import torch
from toys.gpt import LLAMA, LLAMA3, YARN

from core import GPTConfig, UserError
from lab.models.rotary import rotary_angles

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama 3.1": LLAMA3 | {"original_max_position_embeddings": 128},
    "yarn": YARN | {"original_max_position_embeddings": 128},
    "yarn of its own": YARN
    | {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
    | {"original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_those_of_transformers(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": 1e4, **SCALINGS[name]}
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 512}
    theirs = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=rope, **sizes))
    cos, sin = theirs(torch.zeros(1), torch.arange(512)[None])
    scaling = None if name == "default" else SCALINGS[name]
    config = GPTConfig(1, 512, n_head=1, n_embd=64, rope_scaling=scaling, **LLAMA)
    ours = rotary_angles(config)
    assert (ours - torch.stack([cos, sin])[:, 0, :, :32]).abs().max() < 1e-4  # theirs are products in fp32


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope"}, "rope_scaling longrope is unknown: use one of linear, llama3, yarn"),
        ("x", "rope_scaling x is unknown"),
        ({"rope_type": "linear"}, "rope_scaling linear with factor None: use a number over 0"),
        ({"rope_type": "yarn", "factor": float("nan")}, "rope_scaling yarn with factor nan"),
        (YARN | {"attention_factor": "x"}, "rope_scaling yarn with attention_factor x: use a number over 0"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor 4.0: use one below high_freq_factor 4.0"),
    ],
)
def test_an_unknown_or_damaged_scaling_is_refused(scaling, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(1, rope_scaling=scaling, **LLAMA)
