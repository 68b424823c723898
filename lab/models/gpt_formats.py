"""A GPT's weights to and from transformers' folders: GPT-2 and the Llama family."""

import re
from dataclasses import replace

import torch

from lab.errors import UserError
from lab.models.decoding import note
from lab.models.gpt import GPT, GPTConfig
from lab.models.rotary import SCALINGS, rotary_angles
from lab.models.trusted import load_causal, probe, same, their_logits

LLAMA = {  # our module -> transformers' in the Llama family; rotary positions are half-split in both
    "wte": ["model.embed_tokens"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
    "ln_1": ["input_layernorm"],
    "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_gate": ["mlp.gate_proj"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
GPT2_SHAPE = {
    "positions": ["learned"],
    "norm": ["layernorm"],
    "activation": ["gelu", "relu"],
    "bias": [True],
    "qkv_bias": [True],
    "head_bias": [False],
    "rope_theta": [GPTConfig.rope_theta],
    "rope_scaling": [None],
    "nope_every": [None],
    "n_kv_head": [None],
    "head_size": [None],
    "qk_norm": [False],
}
LLAMA_SHAPE = {
    "positions": ["rotary"],
    "norm": ["rmsnorm"],
    "activation": ["swiglu"],
    "bias": [False],
    "qkv_bias": [False],
    "head_bias": [False],
    "nope_every": [None],
    "qk_norm": [False],
}
FORMATS = {  # what a transformers model can express; the first that fits is written
    "gpt2": GPT2_SHAPE,
    "llama": LLAMA_SHAPE,
    "qwen2": LLAMA_SHAPE | {"qkv_bias": [True]},
    "qwen3": LLAMA_SHAPE | {"qk_norm": [True]},
    "smollm3": LLAMA_SHAPE | {"nope_every": [*range(1, 1001)]},
}
READ = (*FORMATS, "mistral")  # which is a llama that may look back a limited number of tokens


def to_gpt2(weights) -> dict:
    """Renames our state dict to transformers' GPT-2, which keeps the matrices of its blocks transposed."""
    named = {}
    for name, value in weights.items():
        matrix = name.startswith("h.") and value.dim() == 2
        named[name if name.startswith("lm_head") else f"transformer.{name}"] = value.t() if matrix else value
    return named


def to_llama(weights, config) -> dict:
    """Renames our state dict to that of transformers' Llama family, where c_attn is three matrices."""
    named = {}
    for name, value in weights.items():
        theirs = llama_names(name)
        parts = value.split(config.qkv_sizes) if len(theirs) == 3 else [value]
        named |= zip(theirs, parts, strict=True)
    return named


def llama_names(name) -> list[str]:
    """transformers' names, in the Llama family, of what our tensor `name` holds."""
    layer, module, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.*)\.(weight|bias)", name).groups()
    prefix = f"model.layers.{layer}." if layer else ""
    return [f"{prefix}{their}.{kind}" for their in LLAMA[module]]


def from_theirs(theirs, config, kind) -> dict:
    """Renames transformers' weights to ours. Empties `theirs`, to save memory."""
    with torch.device("meta"):
        ours = GPT(config).state_dict()
    for name, value in ours.items():
        if kind == "gpt2":
            their = theirs.pop(next(iter(to_gpt2({name: value}))))
            ours[name] = their.t().contiguous() if name.startswith("h.") and value.dim() == 2 else their
        else:
            parts = [theirs.pop(their) for their in llama_names(name)]
            ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def misfit(config, table) -> list[str]:
    """Choices of `config` that a format of FORMATS cannot express."""
    values = {name: getattr(config, name) for name in table}
    return [f"{name} {value}" for name, value in values.items() if value not in table[name]]


def export_kind(config) -> str:
    """The transformers model_type of this shape. UserError where there is none."""
    misfits = {kind: misfit(config, table) for kind, table in FORMATS.items()}
    for kind, names in misfits.items():
        if not names:
            return kind
    why = "; ".join(f"{kind} knows no {', '.join(misfits[kind])}" for kind in ("gpt2", "llama"))
    raise UserError(f"transformers has no model of this shape: {why}")


def their_config(c, kind, eos):
    """transformers' config, of model_type `kind`, for a GPTConfig."""
    from transformers import AutoConfig

    common = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_head}
    common |= {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}
    if kind == "gpt2":
        return AutoConfig.for_model(
            kind, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            n_inner=c.inner, activation_function={"gelu": "gelu_new"}.get(c.activation, c.activation),
            layer_norm_epsilon=c.norm_eps, **common)  # fmt: skip
    nope = {"no_rope_layer_interval": c.nope_every} if c.nope_every else {}
    return AutoConfig.for_model(
        kind, max_position_embeddings=c.block_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head or c.n_head, head_dim=c.head_dim,
        intermediate_size=c.inner, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta, **(c.rope_scaling or {})},
        **common, **nope)  # fmt: skip


def save_pretrained(model, tokenizer, folder, end=None):
    """Writes a folder that transformers loads as GPT-2 or one of the Llama family. UserError for what none
    can express. end: the token that answers were learnt to end with, where it is not the tokenizer's own."""
    from transformers import AutoModelForCausalLM

    c, kind = model.config, export_kind(model.config)
    eos = tokenizer and tokenizer.eos_token_id
    config = their_config(c, kind, eos if end in (None, eos) else [end, eos])
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    weights = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    weights = to_gpt2(weights) if kind == "gpt2" else to_llama(weights, c)
    weights = {name: w.contiguous() for name, w in weights.items()}
    if c.tie_head:
        embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
        weights["lm_head.weight"] = weights[embedding]
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)


class OtherKind(UserError):
    """A model that transformers knows and GPT does not."""


def load_pretrained(name, dropout=0.0, checkpointing=False) -> GPT:
    """Loads transformers' GPT-2 or one of the Llama family (folder or Hub id) as a GPT, in fp32. OtherKind
    for what a GPT cannot express."""
    theirs = load_causal(name, "a run of gpt_scratch.py", config_from)
    kind, config = theirs.config.model_type, config_from(name, theirs.config)
    config = replace(config, dropout=dropout, checkpointing=checkpointing)
    input_ids = probe(config.vocab_size, config.block_size)[:1]
    wanted = their_logits(name, theirs, input_ids)
    weights = theirs.state_dict()
    del theirs  # so that each matrix can go when its transpose is there
    model = with_weights(config, from_theirs(weights, config, kind)).eval()
    with torch.no_grad():
        if not same(model(input_ids), wanted):
            raise OtherKind(f"model {name} computes other logits than a {kind} of its config: not supported")
    return model.train()


def config_from(name, c) -> GPTConfig:
    """The GPT's config for transformers' config `c`. OtherKind for what a GPT cannot express."""
    if c.model_type not in READ:
        raise OtherKind(f"model {name} is a {c.model_type}: use a {', '.join(READ[:-1])} or {READ[-1]}")
    try:
        return (gpt2_config if c.model_type == "gpt2" else llama_config)(name, c)
    except OtherKind:
        raise
    except UserError as error:  # of GPTConfig, which does not know the name
        raise OtherKind(f"model {name}: {error}") from None


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
    rope = dict(c.rope_parameters)
    if odd := beyond_llama(c, rope):
        raise OtherKind(f"model {name} has {', '.join(odd)}: not supported")
    size, window = c.max_position_embeddings, look_back(c)
    if window and window < size:
        note(f"{name} looks back {window} tokens: read as a model of {window} positions, not {size}")
        size = window
    heads, head_dim = c.num_attention_heads, getattr(c, "head_dim", None)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    return GPTConfig(
        c.vocab_size, size, c.num_hidden_layers, heads, c.hidden_size, c.intermediate_size,
        positions="rotary", norm="rmsnorm", activation="swiglu", bias=False,
        qkv_bias=c.model_type == "qwen2", tie_head=c.tie_word_embeddings, norm_eps=c.rms_norm_eps,
        rope_theta=theta, rope_scaling=None if kind == "default" else {"rope_type": kind, **rope},
        nope_every=c.no_rope_layer_interval if c.model_type == "smollm3" else None,
        n_kv_head=c.num_key_value_heads if c.num_key_value_heads != heads else None,
        head_size=head_dim if head_dim and head_dim * heads != c.hidden_size else None,
        qk_norm=c.model_type == "qwen3",
    )  # fmt: skip


def beyond_llama(c, rope) -> list[str]:
    """What a config of the Llama family has that a GPT lacks."""
    odd = [key for key in ("attention_bias", "mlp_bias") if getattr(c, key, False)]
    odd += [f"hidden_act {c.hidden_act}"] if c.hidden_act != "silu" else []
    kind = rope["rope_type"]
    odd += [f"rope_type {kind}"] if kind != "default" and kind not in SCALINGS else []
    odd += [key for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    odd += ["partial_rotary_factor"] if rope.get("partial_rotary_factor", 1) != 1 else []
    if c.model_type == "smollm3":
        every = c.no_rope_layer_interval
        regular = every > 0 and [int((i + 1) % every != 0) for i in range(c.num_hidden_layers)]
        odd += ["irregular no_rope_layers"] if c.no_rope_layers != regular else []
    return odd


def look_back(c) -> int | None:
    """The sliding window of a config: tokens that a layer sees, its own included. None where all layers see
    all."""
    window = getattr(c, "sliding_window", None)
    slides = c.model_type == "mistral" or "sliding_attention" in (getattr(c, "layer_types", None) or [])
    return window if slides else None
