"""Small GPTs."""

import torch
from torch import nn

from core import GPT, GPTConfig

GPT2_SIZES = {"S": (12, 12, 768), "M": (24, 16, 1024), "L": (36, 20, 1280), "XL": (48, 25, 1600)}
LLAMA = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False},
}

GROUPED = {  # all that the Llama family has beside LLAMA, in one shape
    **LLAMA,
    "n_kv_head": 2,
    "head_size": 12,
    "qk_norm": True,
    "nope_every": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
FAMILY = {  # name -> (transformers' model_type, what its config has beside the sizes)
    "gpt2": ("gpt2", {}),
    "llama 2": ("llama", {}),
    "tinyllama": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "llama 3": ("llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": None}),
    "qwen 2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen 2.5 long": ("qwen2", {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 1e4, **YARN}}),
    "qwen 3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 6}),
    "smollm 2": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 36}),
    "smollm 3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layer_interval": 2}),
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
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        size = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-3}
    else:
        size = {"max_position_embeddings": 16, "hidden_size": 32, "num_hidden_layers": 2}
        size |= {"rms_norm_eps": 1e-3, "num_attention_heads": 4, "intermediate_size": 40}
        size |= {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=23, **ends | size | changes)
    )
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval()
