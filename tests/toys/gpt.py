"""Small GPTs."""

import torch
from torch import nn

from core import GPT, GPTConfig

GPT2_SIZES = {"S": (12, 12, 768), "M": (24, 16, 1024), "L": (36, 20, 1280), "XL": (48, 25, 1600)}
LLAMA = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False},
}


def shape(layers, heads, width, **more):
    return {"n_layer": layers, "n_head": heads, "n_embd": width, **more}


def on_meta(**config):
    with torch.device("meta"):
        return GPT(GPTConfig(**config))


def random_gpt(std=0.3, dtype=torch.float64, seed=0, **config):
    """Small, with weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(seed)
    small = {"vocab_size": 23, "block_size": 16, **shape(2, 4, 32)}
    model = GPT(GPTConfig(**small | config)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=std)
    return model.eval()


def lively_gpt(**config):
    """Small random models soon repeat one token for ever; this one, without constants in its stream, not."""
    model = random_gpt(tie_head=False, seed=2, **config)
    with torch.no_grad():
        model.wte.weight *= 3
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(name.endswith("weight"))  # norms 1, biases 0
    return model


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def ids(*size, vocab_size=23, seed=1):
    return torch.randint(vocab_size, size, generator=torch.Generator().manual_seed(seed))


def transformers_model(kind, **changes):
    """Random, with every number that a config can hold away from its default."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        size = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-3}
        ends = {"bos_token_id": None, "eos_token_id": None}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=23, **ends, **size | changes))
    else:
        size = {
            "max_position_embeddings": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-3,
        }
        size |= {"num_attention_heads": 4, "intermediate_size": 40}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=23, **size | rope | changes))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval()
