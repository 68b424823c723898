"""A GPT written by hand, and journal 003's experiment with it: character and BPE language models.

    torchrun --nproc_per_node=4 --shutdown-timeout 300 gpt_scratch.py --preset gpt3_small_char
    python gpt_scratch.py                               # preset cpu: built-in text, minutes on two cores
    python gpt_scratch.py --data shakespeare.txt --tokenizer bpe:2048 --resume_timestamp auto
    python gpt_scratch.py --mode find_lr                # which rate? (find_from, find_to, find_steps)
    python gpt_scratch.py --mode generate --model runs/gpt_scratch/20261122_101500
    python gpt_scratch.py --smoke

Top: the model, generation, weights in and out, tokenizers, the token cache, for other scripts to import.
Bottom: the experiment; its constants stand in Config. Each run is a folder under runs/gpt_scratch/.
"""

import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import platform
import re
import string
import sys
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.checkpoint import checkpoint

import core
import runs

# ----------------------------------------------------------------------------------------------- the model
# Shapes: B rows, T tokens, C = n_embd channels, H = n_head heads, D = C / H, S tokens seen so far, V vocabulary


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2's choices are the defaults; journal 003 and 004 differ in the ones named there."""

    vocab_size: int
    block_size: int = 1024  # most tokens of context
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # width of the MLP; none = 4 C, swiglu 8/3 C rounded up to a multiple of 256
    positions: Literal["learned", "rotary"] = "learned"  # rotary is half-split, as in Llama
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"  # gelu by its tanh formula
    bias: bool = True  # of linear layers and LayerNorms
    qkv_bias: bool = True
    tie_head: bool = True  # the output matrix is the embedding
    head_bias: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    checkpointing: bool = False  # recompute each block in the backward: a third more time, far less memory

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise core.UserError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.positions == "rotary" and self.n_embd // self.n_head % 2:
            raise core.UserError(f"rotary positions need an even n_embd / n_head: it is {self.n_embd // self.n_head}")
        if self.tie_head and self.head_bias:
            raise core.UserError("head_bias needs --no-tie_head")

    @property
    def inner(self) -> int:
        wide = 4 * self.n_embd if self.activation != "swiglu" else math.ceil(8 / 3 * self.n_embd / 256) * 256
        return self.n_inner or wide


def linear(x, weight, bias):
    """F.linear, but a few rows on a CPU (generation) go as W x^T, which is 1.5 to 4 times faster there."""
    rows = x.numel() // x.shape[-1]
    if torch.is_grad_enabled() or x.device.type != "cpu" or not 1 < rows <= 64:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(rows, -1).t()).t()
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rotary, mask, remember):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if remember is not None:
            k, v = remember(k, v)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(x, rotary):
    """Turns the pairs (x[i], x[i + D / 2]) of x (B, H, T, D) by the angles of rotary (2, ..., T, D / 2)."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.c_gate = Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_fc = Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.activation == "swiglu":
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        x = self.c_fc(x)
        return self.c_proj(F.relu(x) if self.activation == "relu" else F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, mask=None, remember=None):
        x = x + self.dropout(self.attn(self.ln_1(x), rotary, mask, remember))
        return x + self.dropout(self.mlp(self.ln_2(x)))


def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class GPT(nn.Module):
    """Pre-norm decoder; module names are GPT-2's. One forward serves training, evaluation and generation."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.register_buffer("angles", rotary_angles(config), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        if not config.tie_head:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # GPT-2: what adds to the residual stream starts smaller, the deeper the model
                depth = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(weight, std=0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, input_ids, labels=None):
        """input_ids (B, T) -> logits (B, T, V); with labels (B, T) the summed loss over its targets, a scalar."""
        hidden = self.hidden(input_ids)
        return self.logits(hidden) if labels is None else core.linear_cross_entropy(hidden, *self.head(), labels)

    def head(self):
        """(weight (V, C), bias (V,) or None) of the output layer."""
        return (self.wte.weight, None) if self.config.tie_head else (self.lm_head.weight, self.lm_head.bias)

    def logits(self, hidden):
        """(..., C) -> (..., V)"""
        return linear(hidden, *self.head())

    def hidden(self, input_ids, cache=None):
        """(B, T) -> what the head reads, (B, T, C). With a KVCache the ids follow those it has seen."""
        T, past = input_ids.shape[1], cache.length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens exceed block_size {self.config.block_size}")
        positions = torch.arange(past, past + T, device=input_ids.device)
        if cache and cache.padding is not None:
            positions = (positions - cache.padding[:, None]).clamp(min=0)  # (B, T)
        x, rotary, mask = self.wte(input_ids), None, cache.mask(T) if cache else None
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        else:
            rotary = self.angles[:, positions]  # (2, T, D / 2), or with padding (2, B, T, D / 2):
            rotary = rotary if positions.dim() == 1 else rotary.unsqueeze(2)  # the same for all heads
        x = self.dropout(x)
        for i, block in enumerate(self.h):
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, mask, functools.partial(cache.append, i) if cache else None)
        if cache:
            cache.length += T
        return self.ln_f(x)


def rotary_angles(config) -> torch.Tensor:
    """(2, block_size, D / 2): cosine and sine of position x theta^(-2 i / D) (Su et al. 2021)."""
    dim = config.n_embd // config.n_head
    rates = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(config.block_size, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()]).float()


# --------------------------------------------------------------------------------------------- generation


class KVCache:
    """Keys and values of the tokens seen so far; the first padding[i] (B,) positions of row i are none."""

    def __init__(self, n_layer, capacity, padding=None):
        self.keys, self.values = [None] * n_layer, [None] * n_layer
        self.capacity, self.padding, self.length = capacity, padding, 0

    def append(self, layer, k, v):
        """Those of new tokens (B, H, T, D) -> those of all tokens (B, H, S, D)."""
        if self.keys[layer] is None:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.keys[layer], self.values[layer] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end], self.values[layer][:, :, self.length : end] = k, v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def mask(self, T):
        """Which keys each of T new tokens sees: (1 or B, 1, T, S) bool, or None where a rule says it."""
        if self.padding is None and (T == 1 or self.length == 0):
            return None
        device = None if self.padding is None else self.padding.device
        keys = torch.arange(self.length + T, device=device)
        queries = keys[self.length :, None]
        seen = (keys <= queries)[None]
        if self.padding is not None:  # padding sees itself: a softmax over nothing would be NaN
            seen = seen & (keys >= self.padding[:, None, None]) | (keys == queries)
        return seen[:, None]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=(), seed=0,
             vocab_size=None, use_cache=True, poll=lambda: None):  # fmt: skip
    """Continuations (lists of ids, without the first id in `stop`) of prompts, lists of ids of any length.

    temperature 0 is greedy. Ids from `vocab_size` on (a padded vocabulary) are never chosen. Row i draws from
    a generator of (seed, i). When block_size is full, the window slides: its later half is read anew.
    """
    was_training, size = model.training, model.config.block_size
    model.eval()
    device, rows = model.wte.weight.device, [list(prompt) for prompt in prompts]
    if not all(rows):
        raise core.UserError("a prompt has no token: give it some text")
    generators = [torch.Generator(device).manual_seed(seed * 1_000_003 + i) for i in range(len(rows))]
    first, ended, cache = [0] * len(rows), [None] * len(rows), None
    for _ in range(max_new_tokens):
        poll()
        if max(map(len, rows)) - min(first) > size or cache is None or not use_cache:
            if any(len(row) - start > size for row, start in zip(rows, first, strict=True)):
                first = [max(start, len(row) - max(1, size // 2)) for row, start in zip(rows, first, strict=True)]
                cache = None
        if cache is None or not use_cache:
            input_ids, padding = left_padded([row[start:] for row, start in zip(rows, first, strict=True)])
            cache = KVCache(len(model.h), size, None if padding is None else padding.to(device))
        else:
            input_ids = torch.tensor([row[-1:] for row in rows])
        logits = model.logits(model.hidden(input_ids.to(device), cache)[:, -1])[:, :vocab_size]
        for i, token in enumerate(choose(logits, generators, temperature, top_k, top_p).tolist()):
            if token in stop and ended[i] is None:
                ended[i] = len(rows[i])
            rows[i].append(token)
        if None not in ended:
            break
    model.train(was_training)
    return [row[len(prompt) : end] for row, prompt, end in zip(rows, prompts, ended, strict=True)]


def left_padded(rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids (B, T) that end together, and how many positions of each row are padding; None if there is none."""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows]), padding if padding.any() else None


def choose(logits, generators, temperature, top_k, top_p) -> torch.Tensor:
    """Next ids (B,) from logits (B, V): greedy, or drawn from what temperature, top_k and top_p leave."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    probs = logits.softmax(-1)
    if top_p and top_p < 1:  # the likeliest ids that together reach top_p
        ordered, ids = probs.sort(descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.scatter(1, ids, ordered.masked_fill(enough, 0))
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)])


# ------------------------------------------------------------------------------------- weights in and out

LLAMA = {  # our module -> transformers' in Llama; rotary positions are half-split in both
    **{"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"},
    **{"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj"},
    **{"mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
}
FORMATS = {  # what a transformers model can express
    "gpt2": {"positions": ["learned"], "norm": ["layernorm"], "activation": ["gelu", "relu"], "bias": [True],
             "qkv_bias": [True], "head_bias": [False], "rope_theta": [GPTConfig.rope_theta]},
    "llama": {"positions": ["rotary"], "norm": ["rmsnorm"], "activation": ["swiglu"], "bias": [False],
              "qkv_bias": [False], "head_bias": [False]},
}  # fmt: skip


def to_gpt2(weights, config) -> dict:
    """Our state dict under transformers' names: GPT-2 keeps the matrices of its blocks transposed."""
    named = {}
    for name, value in weights.items():
        matrix = name.startswith("h.") and value.dim() == 2
        named[name if name.startswith("lm_head") else f"transformer.{name}"] = value.t() if matrix else value
    return named


def to_llama(weights, config) -> dict:
    named = {}
    for name, value in weights.items():
        layer = re.fullmatch(r"h\.(\d+)\.(.*)\.weight", name)
        prefix, module = (f"model.layers.{layer[1]}.", layer[2]) if layer else ("", name.removesuffix(".weight"))
        if module == "attn.c_attn":
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                named[f"{prefix}self_attn.{part}_proj.weight"] = rows
        else:
            named[f"{prefix}{LLAMA[module]}.weight"] = value
    return named


def from_theirs(theirs, config, kind) -> dict:
    """The way back: the same table read from right to left, on a model without memory."""
    with torch.device("meta"):
        ours = GPT(config).state_dict()
    if kind == "gpt2":
        names = {name: next(iter(to_gpt2({name: value}, config))) for name, value in ours.items()}
        turned = {name for name, value in ours.items() if name.startswith("h.") and value.dim() == 2}
        return {name: theirs[their].t() if name in turned else theirs[their] for name, their in names.items()}
    names = {name: list(to_llama({name: value}, config)) for name, value in ours.items()}
    return {name: torch.cat([theirs[their] for their in parts]) for name, parts in names.items()}


def save_pretrained(model, tokenizer, folder):
    """A folder that transformers loads as GPT-2 or Llama. UserError names what neither can express."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    c = model.config
    misfits = {kind: [f"{name} {getattr(c, name)}" for name, legal in table.items() if getattr(c, name) not in legal]
               for kind, table in FORMATS.items()}  # fmt: skip
    if all(misfits.values()):
        why = "; ".join(f"{kind} knows no {', '.join(names)}" for kind, names in misfits.items())
        raise core.UserError(f"transformers has no model of this shape: {why}")
    sizes = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_head}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer and tokenizer.eos_token_id, "pad_token_id": None}
    with torch.device("meta"):
        if not misfits["gpt2"]:
            theirs = GPT2LMHeadModel(GPT2Config(
                n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.inner,
                activation_function={"gelu": "gelu_new"}.get(c.activation, c.activation),
                layer_norm_epsilon=c.norm_eps, **sizes, **ends))  # fmt: skip
        else:
            theirs = LlamaForCausalLM(LlamaConfig(
                max_position_embeddings=c.block_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head, intermediate_size=c.inner, rms_norm_eps=c.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, **sizes, **ends))  # fmt: skip
    convert = to_gpt2 if not misfits["gpt2"] else to_llama
    weights = {name: value.detach().cpu().contiguous() for name, value in convert(model.state_dict(), c).items()}
    if c.tie_head:
        weights["lm_head.weight"] = weights[convert({"wte.weight": torch.empty(0)}, c).popitem()[0]]
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)


def load_pretrained(name, dropout=0.0, checkpointing=False) -> GPT:
    """A GPT-2 or Llama model of transformers (folder or Hub id), in fp32. UserError for what differs from ours."""
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)

    theirs, info = core.local_or_hub("model", name, load, "a run of gpt_scratch.py")
    if missing := sorted(info["missing_keys"]):
        raise core.UserError(f"model {name} lacks {len(missing)} weights, e.g. {missing[0]}")
    c = theirs.config
    if c.model_type not in FORMATS:
        raise core.UserError(f"model {name} is a {c.model_type}: use a gpt2 or a llama")
    config = (gpt2_config if c.model_type == "gpt2" else llama_config)(name, c)
    config = replace(config, dropout=dropout, checkpointing=checkpointing)
    model = GPT(config)
    model.load_state_dict(from_theirs(theirs.state_dict(), config, c.model_type), strict=True)
    return model


def gpt2_config(name, c) -> GPTConfig:
    activation = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}.get(c.activation_function)
    if not activation or c.scale_attn_by_inverse_layer_idx or not c.scale_attn_weights:
        raise core.UserError(f"model {name}: {c.activation_function} or its scaling of attention is not GPT-2's")
    return GPTConfig(c.vocab_size, c.n_positions, c.n_layer, c.n_head, c.n_embd, c.n_inner,
                     activation=activation, tie_head=c.tie_word_embeddings, norm_eps=c.layer_norm_epsilon)  # fmt: skip


def llama_config(name, c) -> GPTConfig:
    rope = c.rope_parameters
    if c.num_key_value_heads != c.num_attention_heads:
        raise core.UserError(f"model {name} shares keys between heads ({c.num_key_value_heads}): not supported")
    if c.hidden_act != "silu" or c.attention_bias or c.mlp_bias or rope["rope_type"] != "default":
        raise core.UserError(f"model {name} has biases, scaled positions or {c.hidden_act}: not supported")
    return GPTConfig(
        c.vocab_size, c.max_position_embeddings, c.num_hidden_layers, c.num_attention_heads, c.hidden_size,
        c.intermediate_size, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, qkv_bias=False,
        tie_head=c.tie_word_embeddings, norm_eps=c.rms_norm_eps, rope_theta=rope["rope_theta"],
    )  # fmt: skip
