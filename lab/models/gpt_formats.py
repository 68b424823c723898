"""A GPT's weights to and from transformers' GPT-2 and Llama folders."""

import re
from dataclasses import replace

import torch

from lab.errors import UserError
from lab.models.gpt import GPT, GPTConfig, rotary_angles
from lab.models.trusted import load_causal, probe, same

LLAMA = {  # our module -> transformers' in Llama; rotary positions are half-split in both
    "wte": "model.embed_tokens",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
FORMATS = {  # what a transformers model can express
    "gpt2": {"positions": ["learned"], "norm": ["layernorm"], "activation": ["gelu", "relu"], "bias": [True],
             "qkv_bias": [True], "head_bias": [False], "rope_theta": [GPTConfig.rope_theta]},
    "llama": {"positions": ["rotary"], "norm": ["rmsnorm"], "activation": ["swiglu"], "bias": [False],
              "qkv_bias": [False], "head_bias": [False]},
}  # fmt: skip


def to_gpt2(weights) -> dict:
    """Renames our state dict to transformers' GPT-2, which keeps the matrices of its blocks transposed."""
    named = {}
    for name, value in weights.items():
        matrix = name.startswith("h.") and value.dim() == 2
        named[name if name.startswith("lm_head") else f"transformer.{name}"] = value.t() if matrix else value
    return named


def to_llama(weights) -> dict:
    named = {}
    for name, value in weights.items():
        layer = re.fullmatch(r"h\.(\d+)\.(.*)\.weight", name)
        prefix, module = (
            (f"model.layers.{layer[1]}.", layer[2]) if layer else ("", name.removesuffix(".weight"))
        )
        if module == "attn.c_attn":
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                named[f"{prefix}self_attn.{part}_proj.weight"] = rows
        else:
            named[f"{prefix}{LLAMA[module]}.weight"] = value
    return named


def from_theirs(theirs, config, kind) -> dict:
    """Renames transformers' weights to ours. Empties `theirs`, to save memory."""
    with torch.device("meta"):
        ours = GPT(config).state_dict()
    if kind == "gpt2":
        names = {name: next(iter(to_gpt2({name: value}))) for name, value in ours.items()}
        turned = {name for name, value in ours.items() if name.startswith("h.") and value.dim() == 2}
        for name, their in names.items():
            ours[name] = theirs.pop(their)
            ours[name] = ours[name].t().contiguous() if name in turned else ours[name]
        return ours
    names = {name: list(to_llama({name: value})) for name, value in ours.items()}
    return {name: torch.cat([theirs[their] for their in parts]) for name, parts in names.items()}


def misfit(config, table) -> list[str]:
    """Choices of `config` that a format of FORMATS cannot express."""
    values = {name: getattr(config, name) for name in table}
    return [f"{name} {value}" for name, value in values.items() if value not in table[name]]


def save_pretrained(model, tokenizer, folder):
    """Writes a folder that transformers loads as GPT-2 or Llama. UserError for what neither can express."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    c = model.config
    misfits = {kind: misfit(c, table) for kind, table in FORMATS.items()}
    if all(misfits.values()):
        why = "; ".join(f"{kind} knows no {', '.join(names)}" for kind, names in misfits.items())
        raise UserError(f"transformers has no model of this shape: {why}")
    sizes = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_head}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer and tokenizer.eos_token_id, "pad_token_id": None}
    with torch.device("meta"):
        if not misfits["gpt2"]:
            theirs = GPT2LMHeadModel(GPT2Config(
                n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                n_inner=c.inner, activation_function={"gelu": "gelu_new"}.get(c.activation, c.activation),
                layer_norm_epsilon=c.norm_eps, **sizes, **ends))  # fmt: skip
        else:
            theirs = LlamaForCausalLM(LlamaConfig(
                max_position_embeddings=c.block_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head, intermediate_size=c.inner, rms_norm_eps=c.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
                **sizes, **ends))  # fmt: skip
    convert = to_gpt2 if not misfits["gpt2"] else to_llama
    weights = {name: w.detach().cpu().contiguous() for name, w in convert(model.state_dict()).items()}
    if c.tie_head:
        weights["lm_head.weight"] = weights[convert({"wte.weight": torch.empty(0)}).popitem()[0]]
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)


class OtherKind(UserError):
    """A model that transformers knows and GPT does not."""


def load_pretrained(name, dropout=0.0, checkpointing=False) -> GPT:
    """Loads transformers' GPT-2 or Llama (folder or Hub id) as a GPT, in fp32. UserError for
    what it cannot express."""

    theirs = load_causal(name, "a run of gpt_scratch.py", config_from)
    kind, config = theirs.config.model_type, config_from(name, theirs.config)
    config = replace(config, dropout=dropout, checkpointing=checkpointing)
    input_ids = probe(config.vocab_size, config.block_size)[:1]
    with torch.no_grad():
        wanted = theirs(input_ids=input_ids).logits
    weights = theirs.state_dict()
    del theirs  # so that each matrix can go when its transpose is there
    model = with_weights(config, from_theirs(weights, config, kind)).eval()
    with torch.no_grad():
        if not same(model(input_ids), wanted):
            raise OtherKind(f"model {name} computes other logits than a {kind} of its config: not supported")
    return model.train()


def config_from(name, c) -> GPTConfig:
    """The GPT's config for transformers' config `c`. OtherKind for what a GPT cannot express."""
    if c.model_type not in FORMATS:
        raise OtherKind(f"model {name} is a {c.model_type}: use a gpt2 or a llama")
    return (gpt2_config if c.model_type == "gpt2" else llama_config)(name, c)


def with_weights(config, weights) -> GPT:
    """A GPT made of these tensors, without initialising or copying any."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, strict=True, assign=True)
    if config.positions == "rotary":
        model.angles = rotary_angles(config).to(model.wte.weight.device)
    return model.requires_grad_(True)


def untied(model) -> GPT:
    """The model with an output matrix of its own, a copy of the embedding, as journal 001 had it."""
    if not model.config.tie_head:
        return model
    weights = model.state_dict() | {"lm_head.weight": model.wte.weight.detach().clone()}
    return with_weights(replace(model.config, tie_head=False), weights)


def gpt2_config(name, c) -> GPTConfig:
    activation = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}.get(c.activation_function)
    if not activation or c.scale_attn_by_inverse_layer_idx or not c.scale_attn_weights:
        raise OtherKind(f"model {name}: {c.activation_function} or its scaling of attention is not GPT-2's")
    return GPTConfig(c.vocab_size, c.n_positions, c.n_layer, c.n_head, c.n_embd, c.n_inner,
                     activation=activation, tie_head=c.tie_word_embeddings,
                     norm_eps=c.layer_norm_epsilon)  # fmt: skip


def llama_config(name, c) -> GPTConfig:
    rope = c.rope_parameters
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        raise OtherKind(f"model {name} has heads of {c.head_dim}, not n_embd / n_head: not supported")
    if c.num_key_value_heads != c.num_attention_heads:
        raise OtherKind(f"model {name} shares keys between heads ({c.num_key_value_heads}): not supported")
    if c.hidden_act != "silu" or c.attention_bias or c.mlp_bias or rope["rope_type"] != "default":
        raise OtherKind(f"model {name} has biases, scaled positions or {c.hidden_act}: not supported")
    return GPTConfig(
        c.vocab_size, c.max_position_embeddings, c.num_hidden_layers, c.num_attention_heads, c.hidden_size,
        c.intermediate_size, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False,
        qkv_bias=False, tie_head=c.tie_word_embeddings, norm_eps=c.rms_norm_eps,
        rope_theta=rope["rope_theta"],
    )  # fmt: skip
