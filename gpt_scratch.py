"""A GPT written by hand, and journal 003's experiment with it: character and BPE language models.

    torchrun --nproc_per_node=4 --shutdown-timeout 300 gpt_scratch.py --preset mini_v0
    python gpt_scratch.py                               # preset cpu: built-in text, minutes on two cores
    python gpt_scratch.py --data shakespeare.txt --tokenizer bpe:2048 --resume_timestamp auto
    python gpt_scratch.py --mode find_lr                # which rate? (find_from, find_to, find_steps)
    python gpt_scratch.py --mode generate --model runs/gpt_scratch/20261122_101500
    python gpt_scratch.py --smoke

Top: the model, generation, weights in and out, for other scripts to import (tokenizers and the token cache
are in corpus.py). Bottom: the experiment; its constants stand in Config. Each run is a folder under
runs/gpt_scratch/.
"""

import copy
import functools
import json
import math
import re
import sys
import textwrap
from contextlib import contextmanager, nullcontext
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
import corpus
import runs

# ----------------------------------------------------------------------------------------------- the model
# Shapes: B rows, T tokens, S tokens seen so far, C = n_embd channels, H heads, D = C / H, V vocabulary


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
            raise core.UserError(
                f"rotary positions need an even n_embd / n_head: it is {self.n_embd // self.n_head}"
            )
        if self.tie_head and self.head_bias:
            raise core.UserError("head_bias needs --no-tie_head")

    @property
    def inner(self) -> int:
        wide = 4 * self.n_embd if self.activation != "swiglu" else math.ceil(8 / 3 * self.n_embd / 256) * 256
        return self.n_inner or wide


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias, self)

    def terms(self, x):
        """forward(x) as core.linear_cross_entropy wants it: ([(x, weight)], bias)."""
        return [(x, self.weight)], self.bias


class Embedding(nn.Embedding):
    """nn.Embedding whose matrix a tied head reads, too."""

    def matrix(self) -> torch.Tensor:
        """(V, C)"""
        return self.weight


def linear(x, weight, bias, module):
    """core.linear; `generating` lays some weights out a second time, and then it uses that one."""
    if torch.compiler.is_compiling() or x.numel() // x.shape[-1] > FEW_ROWS:
        return core.linear(x, weight, bias)
    packed = SECOND_LAYOUT.get(module)
    return core.linear(x, weight, bias) if packed is None else core.onednn(x, packed, bias)


FEW_ROWS = 64  # from here on the usual layout is as fast
SECOND_LAYOUT = {}  # module -> weight; as an attribute of the module it would have blocks compiled anew


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
        causal = mask is None and (remember is None or T > 1)  # whatever T is: one graph
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
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
        self.wte = Embedding(config.vocab_size, config.n_embd)
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
            if weight.dim() == 2:  # GPT-2: what adds to the residual stream starts smaller in deep models
                depth = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(weight, std=0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, input_ids, labels=None, segments=None):
        """input_ids (B, T) -> logits (B, T, V); with labels (B, T) the summed loss, a scalar.

        Several rows packed into one: `segments` (B, T) numbers them; none sees another, positions restart.
        """
        hidden = self.hidden(input_ids, segments=segments)
        if labels is None:
            return self.logits(hidden)
        hidden, labels = core.targets_only(hidden, labels)
        return core.linear_cross_entropy(*self.head(hidden), labels)

    def head(self, hidden):
        """Of what the logits of hidden (N, C) are the sum: ([(x, weight (V, ...)), ...], bias or None)."""
        return ([(hidden, self.wte.matrix())], None) if self.config.tie_head else self.lm_head.terms(hidden)

    def logits(self, hidden):
        """(..., C) -> (..., V)"""
        if self.config.tie_head:
            return linear(hidden, self.wte.matrix(), None, self)
        return self.lm_head(hidden)

    def hidden(self, input_ids, cache=None, segments=None):
        """(B, T) -> what the head reads, (B, T, C). With a KVCache the ids follow those it has seen."""
        T, past = input_ids.shape[1], cache.length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens exceed block_size {self.config.block_size}")
        positions = torch.arange(past, past + T, device=input_ids.device)
        if cache and cache.padding is not None:
            positions = (positions - cache.padding[:, None]).clamp(min=0)  # (B, T)
        x, rotary, mask = self.wte(input_ids), None, cache.mask(T, input_ids.device) if cache else None
        if segments is not None:
            mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]  # (B, 1, T, T)
            positions = mask.sum(-1)[:, 0] - 1  # (B, T)
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        else:
            rotary = self.angles[:, positions]  # (2, T, D / 2), or with padding (2, B, T, D / 2):
            rotary = rotary if positions.dim() == 1 else rotary.unsqueeze(2)  # the same for all heads
        x = self.dropout(x)
        for i, block in enumerate(self.h):
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
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

    def mask(self, T, device):
        """Which keys each of T new tokens sees: (1 or B, 1, T, S) bool, or None where a rule says it."""
        if self.padding is None and (T == 1 or self.length == 0):
            return None
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
    size, device, rows = model.config.block_size, model.wte.weight.device, [list(p) for p in prompts]
    if not all(rows):
        raise core.UserError("a prompt has no token: give it some text")
    generators = [torch.Generator(device).manual_seed(seed * 1_000_003 + i) for i in range(len(rows))]
    first, ended, cache = [0] * len(rows), [None] * len(rows), None

    def step():
        nonlocal cache, first
        if max(len(row) - start for row, start in zip(rows, first, strict=True)) > size:
            windows = zip(rows, first, strict=True)  # a row slides when it is full itself, as it would alone
            first = [s if len(row) - s <= size else len(row) - (size + 1) // 2 for row, s in windows]
            cache = None
        if cache is None or not use_cache:
            input_ids, padding = left_padded([row[start:] for row, start in zip(rows, first, strict=True)])
            capacity = min(size, input_ids.shape[1] + max_new_tokens)
            cache = KVCache(len(model.h), capacity, None if padding is None else padding.to(device))
        else:
            input_ids = torch.tensor([row[-1:] for row in rows])
        logits = model.logits(model.hidden(input_ids.to(device), cache)[:, -1])[:, :vocab_size]
        for i, token in enumerate(choose(logits, generators, temperature, top_k, top_p).tolist()):
            if token in stop and ended[i] is None:
                ended[i] = len(rows[i])
            rows[i].append(token)

    with generating(model, len(rows)):
        for _ in range(max_new_tokens):
            poll()
            step()
            if None not in ended:
                break
    return [row[len(prompt) : end] for row, prompt, end in zip(rows, prompts, ended, strict=True)]


@contextmanager
def generating(model, rows):
    """Evaluation mode; on a CPU the matrices also in oneDNN's own layout, in which a product with a few rows
    takes a third to a half of the time (torch.compile's freezing does the same). Costs their memory again.
    """
    holders = [(module, module.weight) for module in model.modules() if isinstance(module, Linear)]
    holders += [(model, model.wte.matrix())] if model.config.tie_head else []
    fits = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for _, weight in holders)
    # compiled blocks would be compiled anew for every length; set_stance imports the compiler (1.5 s)
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    was_training = model.training
    model.eval()
    try:
        if fits and rows <= FEW_ROWS and core.ONEDNN:
            for module, weight in holders:
                SECOND_LAYOUT[module] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        with eager:
            yield
    finally:
        model.train(was_training)
        for module, _ in holders:
            SECOND_LAYOUT.pop(module, None)


def left_padded(rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids (B, T) that end together, and how many positions of each row are padding; None if there is none."""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return input_ids, padding if padding.any() else None


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


def to_gpt2(weights) -> dict:
    """Our state dict under transformers' names: GPT-2 keeps the matrices of its blocks transposed."""
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
    """The way back: the same table read from right to left, on a model without memory. Empties `theirs`."""
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
    """The choices of `config` that a table of FORMATS does not list."""
    values = {name: getattr(config, name) for name in table}
    return [f"{name} {value}" for name, value in values.items() if value not in table[name]]


def save_pretrained(model, tokenizer, folder):
    """A folder that transformers loads as GPT-2 or Llama. UserError names what neither can express."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    c = model.config
    misfits = {kind: misfit(c, table) for kind, table in FORMATS.items()}
    if all(misfits.values()):
        why = "; ".join(f"{kind} knows no {', '.join(names)}" for kind, names in misfits.items())
        raise core.UserError(f"transformers has no model of this shape: {why}")
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


class OtherKind(core.UserError):
    """A model that transformers knows and GPT does not."""


def load_pretrained(name, dropout=0.0, checkpointing=False) -> GPT:
    """transformers' GPT-2 or Llama (folder or Hub id), in fp32. UserError names what we cannot express."""

    def load():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)

    theirs, info = core.local_or_hub("model", name, load, "a run of gpt_scratch.py")
    if missing := sorted(info["missing_keys"]):
        raise core.UserError(f"model {name} lacks {len(missing)} weights, e.g. {missing[0]}")
    c = theirs.config
    if c.model_type not in FORMATS:
        raise OtherKind(f"model {name} is a {c.model_type}: use a gpt2 or a llama")
    config = (gpt2_config if c.model_type == "gpt2" else llama_config)(name, c)
    config, weights = replace(config, dropout=dropout, checkpointing=checkpointing), theirs.state_dict()
    del theirs  # so that each matrix can go when its transpose is there
    return with_weights(config, from_theirs(weights, config, c.model_type))


def with_weights(config, weights) -> GPT:
    """A GPT of these tensors: they are neither initialised nor copied."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, strict=True, assign=True)
    if config.positions == "rotary":
        model.angles = rotary_angles(config).to(model.wte.weight.device)
    return model.requires_grad_(True)


def untied(model) -> GPT:
    """With an output matrix of its own, a copy of the embedding: journal 001's models, and its counts."""
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


# ------------------------------------------------------------------------- the experiment and its constants


@dataclass(frozen=True)
class Config:
    # data
    data: str = "python-docs"  # text file or folder, table, Hub id, python-docs or python-code (built in)
    text_column: str = "text"  # of a table or Hub set
    max_documents: int | None = None  # none = all
    tokenizer: str = "chars"  # chars, ascii, bytes, bpe:<size>, bpe_scratch:<size>, Hub id or folder
    val_share: float = 0.05  # of the documents; of a single document, its end
    test_share: float = 0.05  # of the text, for the end
    split_seed: int = 42  # of what is held out
    block_size: int = 64  # tokens of context
    # model
    model: str = "new"  # or where to start from: a run folder, a GPT-2 or Llama folder, a Hub id
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    n_inner: int | None = 344  # none = 4 n_embd; swiglu: 8/3 n_embd, rounded up to a multiple of 256
    positions: Literal["learned", "rotary"] = "rotary"  # rotary as in Llama
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"  # before each half of a block
    activation: Literal["gelu", "relu", "swiglu"] = "swiglu"  # of the MLP
    bias: bool = False  # of linear layers and LayerNorms
    qkv_bias: bool = False  # of queries, keys and values
    tie_head: bool = True  # the output matrix is the embedding
    head_bias: bool = False  # of an output matrix of its own
    dropout: float = 0.0  # share of activations set to 0 in training
    checkpointing: bool = False  # recompute blocks in the backward: more time, less memory
    # optimisation
    batch: int = 8  # blocks per optimizer step, over all ranks
    micro_batch: int | None = None  # blocks per forward and rank; none = all of the rank's blocks
    epochs: int = 10  # passes over the training rows
    max_steps: int | None = 3600  # optimizer steps; whichever of the two ends first
    max_minutes: float | None = None  # of training, over resumes
    lr: float = 3e-3  # peak; GPT-3's sizes and rates lie near 1.95 parameters^-0.437 (journal 003)
    min_lr: float = 0.0  # at the end of the schedule
    warmup: float = 0.05  # fraction of all steps; of one_cycle its rise (the usual is 0.3)
    schedule: Literal["linear", "cosine", "constant", "one_cycle", "gpt3"] = "linear"  # of the rate
    cycle_beta1: bool = True  # one_cycle moves beta1 between 0.95 and 0.85, against the rate
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: momentum 0.9
    beta1: float = 0.9  # of Adam: how fast the mean forgets
    beta2: float = 0.99  # of Adam: how fast the squares forget
    eps: float = 1e-8  # of Adam
    weight_decay: float = 0.1  # of matrices
    clip: float | None = 1.0  # global gradient norm; none = off
    skip_spikes: bool = False  # no update by a step whose loss or gradient norm leaves its band
    dtype: core.Dtype = "auto"  # auto: bf16 on a card (or fp16), else fp32, which untyped is tf32 on a card
    compile: bool = False  # the blocks, by torch.compile
    seed: int = 0  # of weights, order and dropout
    # learning-rate finder
    find_from: float = 1e-6  # lowest rate of mode find_lr
    find_to: float = 1.0  # highest
    find_steps: int = 100  # of mode find_lr
    find_smoothing: float = 0.8  # weight of the past in the running mean of the loss
    # evaluation and logging
    eval_batch: int = 64  # blocks per evaluation step, over all ranks
    eval_every: int | None = None  # steps; none = each epoch
    final_eval: bool = True  # the test part, once, at the end
    test_weights: Literal["best", "last"] = "best"  # lowest validation loss, or the final ones
    save_every: int | None = None  # steps; none = at each evaluation, before it
    keep: int = 2  # checkpoints
    log_every: int = 50  # steps
    price_per_hour: float | None = None  # dollars for the whole box
    note: str = ""  # anything; eval.py --table shows it
    # samples and generation
    prompt: str | None = None  # none = an end-of-text token in training, a prompt loop in mode generate
    sample_tokens: int = 300  # of each of three samples after an evaluation; 0 = none
    max_new_tokens: int = 300  # in mode generate
    temperature: float = 0.8  # 0 = greedy
    top_k: int | None = None  # sample from so many of the likeliest; none = all
    top_p: float | None = None  # sample from the likeliest that reach this; none = all
    stop: str | None = None  # a token that ends a continuation, beside end-of-text
    # run
    mode: Literal["train", "find_lr", "generate", "profile", "export"] = "train"  # what to do
    dirty: bool = True  # --no-dirty refuses to start with uncommitted changes
    out: str | None = None  # none = runs/gpt_scratch below the current folder
    tag: str | None = None  # none = the preset's name
    resume_timestamp: str | None = None  # a timestamp, latest, or auto (resume, skip if finished, else start)
    resume_step: int | None = None  # an older checkpoint than the newest
    backend: Literal["auto", "nccl", "xccl", "gloo"] = "auto"  # auto: nccl, xccl, or gloo on CPUs

    def __post_init__(self):
        if self.mode != "train" and self.resume_timestamp:
            raise core.UserError(f"--resume_timestamp goes with mode train, not with {self.mode}")
        if self.val_share + self.test_share >= 1:
            raise core.UserError(
                f"val_share {self.val_share} + test_share {self.test_share} leave nothing to train on"
            )
        if self.schedule in ("one_cycle", "gpt3") and self.min_lr:
            raise core.UserError(
                f"min_lr {self.min_lr}: schedule {self.schedule} has an end of its own, leave it 0"
            )
        if self.find_from >= self.find_to:
            raise core.UserError(f"find_from {self.find_from} is not below find_to {self.find_to}")


JOURNAL = {  # what journal 003's code trained: articles of Wikipedia, 1 % held out, AdamW as torch has it
    **{
        "data": "wikimedia/wikipedia:20231101.en",
        "max_documents": 75_000,
        "val_share": 0.01,
        "test_share": 0.01,
    },
    **{"positions": "learned", "norm": "layernorm", "activation": "relu", "n_inner": None, "bias": True},
    **{"qkv_bias": False, "tie_head": False, "head_bias": True, "dropout": 0.2},
    **{"lr": 1e-3, "schedule": "constant", "warmup": 0.0, "beta2": 0.999},
    **{"weight_decay": 0.01, "clip": None, "dtype": "bf16", "eval_every": 1000, "tokenizer": "ascii"},
    **{"epochs": 1, "max_steps": None},
}
SMALL = JOURNAL | {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 2048, "batch": 2, "lr": 6e-4}
MINI = JOURNAL | {"n_layer": 10, "n_head": 8, "n_embd": 512, "block_size": 256, "batch": 128}
PRESETS = {  # rates as the journal meant them: its code ran all of them at 1e-3 (seeds' bug D8)
    "cpu": {},
    "baby": JOURNAL | {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch": 64},
    "mini_v0": MINI,
    "mini_v1": MINI | {"batch": 180},
    "gpt3_small": SMALL | {"tokenizer": "gpt2"},
    "gpt3_small_char": SMALL,
    "gpt3_small_char_one_cycle": SMALL | {"schedule": "one_cycle", "warmup": 0.3},
    "gpt3_small_large_batch": SMALL | {"tokenizer": "gpt2", "batch": 128, "micro_batch": 2, "lr": 1e-5},
}
SMOKE = {
    "data": "python-docs",
    "max_documents": 60,
    "tokenizer": lambda name: "bpe:512" if name == "gpt2" else name,  # as the preset, without a network
    "block_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_inner": None,
    "dropout": 0.0,
    "batch": 24,
    "micro_batch": None,
    "max_steps": 200,
    "lr": 4e-3,
    "dtype": "auto",
    "val_share": 0.1,
    "test_share": 0.1,
    "eval_every": 100,
    "sample_tokens": 80,
    "find_steps": 60,
}
SAMPLES = 3  # after each evaluation
RATIO = 20  # tokens per parameter that Hoffmann et al. 2022 find best


def corpus_of(cfg) -> corpus.Corpus:
    """What cfg says of the text; a model that is not new brings its own tokenizer and shape."""
    name = cfg.tokenizer
    if cfg.model != "new":
        own = {"tokenizer", *(field.name for field in fields(GPTConfig))}
        if typed := sorted((own - {"block_size", "dropout", "checkpointing"}) & core.typed(cfg).flags):
            raise core.UserError(f"--model {cfg.model} brings its own {', '.join(typed)}: drop these flags")
        name = tokenizer_of(cfg.model)
    values = {f.name: getattr(cfg, f.name) for f in fields(corpus.Corpus) if hasattr(cfg, f.name)}
    return corpus.Corpus(**values | {"tokenizer": name})


def tokenizer_of(model) -> str:
    """Name of the tokenizer that a run folder, a folder or a Hub id brings."""
    return str(Path(model) / "tokenizer") if is_run(model) else model


def is_run(name) -> bool:
    return (Path(name) / "gpt.json").exists()


def shape_of(cfg, vocab_size) -> GPTConfig:
    """The constants that describe the model; UserError where they contradict each other."""
    shared = [field.name for field in fields(GPTConfig) if hasattr(cfg, field.name)]
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(cfg, name) for name in shared})


def build_model(cfg, tokens, world) -> GPT:
    """cfg's shape with random weights, or the weights of cfg.model."""
    if cfg.model == "new":
        return GPT(shape_of(cfg, len(tokens.tokenizer)))
    model = core.main_first(world, lambda: open_model(cfg.model, cfg.dropout, cfg.checkpointing)[0])
    if cfg.block_size > model.config.block_size:
        most = model.config.block_size
        raise core.UserError(f"--block_size {cfg.block_size} is over the {most} of {cfg.model}")
    if len(tokens.tokenizer) > model.config.vocab_size:
        sizes = f"{len(tokens.tokenizer)} tokens, the model {model.config.vocab_size}"
        raise core.UserError(f"the tokenizer of {cfg.model} has {sizes}: they do not belong together")
    return model


def open_model(name, dropout=0.0, checkpointing=False):
    """(model, tokenizer) of a run folder (as it was trained, fp32 or fp64), a GPT-2 or Llama folder, or a Hub
    id; on the CPU."""
    import safetensors.torch

    if not is_run(name):
        return load_pretrained(name, dropout, checkpointing), core.pretrained_tokenizer(name, "a run folder")
    folder = Path(name)
    config = GPTConfig(**json.loads((folder / "gpt.json").read_text()))
    config = replace(config, dropout=dropout, checkpointing=checkpointing)
    weights = folder / "checkpoints" / runs.chosen_checkpoint(folder) / "model.safetensors"
    model = with_weights(config, safetensors.torch.load_file(weights))
    return model, core.pretrained_tokenizer(str(folder / "tokenizer"), "")


def load_model(folder, world):
    """(Config, model, tokenizer) of a run, from its folder alone; the weights it was tested with."""
    stored, known = runs.read_config(folder)["constants"], {field.name for field in fields(Config)}
    cfg = Config(**{name: value for name, value in stored.items() if name in known})
    model, tokenizer = open_model(folder)
    return cfg, core.Precision(cfg.dtype, world).prepare(model).eval(), tokenizer


# ------------------------------------------------------------------------------------------- one step of it


@dataclass
class Setup:
    """What train, find_lr and profile share."""

    cfg: Config
    world: core.World
    tokens: corpus.Tokens
    blocks: dict[str, corpus.Blocks]
    batches: core.ShardedBatches
    total_steps: int
    model: GPT
    ddp: nn.Module
    optimizer: torch.optim.Optimizer
    precision: core.Precision
    step: int = 0  # where a resumed run stands


def set_up(run, cfg, world, steps=None) -> Setup:
    """Data, model, optimizer, the state of a resumed run, two discarded steps; says what is about to run.

    `steps` none: as many as cfg.epochs and cfg.max_steps allow.
    """
    shape_of(cfg, vocab_size=1)  # a contradiction should not wait for an hour of tokenising
    tokens = corpus.open_corpus(corpus_of(cfg), world)
    run.pin("fingerprint", tokens.fingerprint)
    blocks = {part: corpus.Blocks(tokens.parts[part], cfg.block_size) for part in corpus.PARTS}
    for part in ("train", "val", *(("test",) if cfg.test_share else ())):
        if not len(blocks[part]):
            better = "more documents" + (f" or a larger --{part}_share" if part != "train" else "")
            raise core.UserError(f"{cfg.data} leaves no {part} text: use {better}")
    batches = core.ShardedBatches(
        np.full(len(blocks["train"]), cfg.block_size), cfg.batch, world, seed=cfg.seed
    )
    total_steps = min(n for n in (cfg.epochs * len(batches), cfg.max_steps, steps) if n is not None)
    core.reseed(cfg.seed, "init")
    precision = core.Precision(cfg.dtype, world)
    model = precision.prepare(build_model(cfg, tokens, world))
    optimizer = core.make_optimizer(model, cfg.optimizer, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.eps)
    announce(run, cfg, tokens, blocks, batches, total_steps, model)
    step = run.load(model, optimizer, precision)
    core.on_main(world, lambda: describe_model(run.folder, model, tokens.tokenizer))
    stop_ids(tokens.tokenizer, cfg.stop)  # a mistake should not wait for the first sample
    if cfg.compile:
        for block in model.h:
            block.compile()
    ddp = core.wrap_ddp(model, world)
    s = Setup(cfg, world, tokens, blocks, batches, total_steps, model, ddp, optimizer, precision, step)
    if step == 0:
        first = corpus.Blocks(blocks["val"].tokens[: 16 * cfg.block_size + 1], cfg.block_size)
        loss, _, targets = evaluate(model, first, cfg, world).sum(0)
        run.say(f"initial loss {loss / targets:.4f}  ln V {math.log(model.config.vocab_size):.4f}")
    core.reseed(cfg.seed, "worst case")
    worst = batches.longest()[: math.ceil(cfg.batch / world.size)].tolist()
    at_once = min(cfg.micro_batch or len(worst), len(worst))
    targets = cfg.batch * cfg.block_size
    seconds = core.worst_case(world, ddp, lambda: forward_backward(s, worst, targets), optimizer, at_once)
    run.poll()
    run.forecast(model, optimizer, total_steps - step, seconds, typical=1.0)
    run.say(describe_block(tokens.tokenizer, blocks["train"]))
    return s


def describe_model(folder, model, tokenizer):
    """tokenizer/ and gpt.json: with them the folder alone can rebuild the model."""
    tokenizer.save_pretrained(folder / "tokenizer")
    core.write_json(folder / "gpt.json", asdict(model.config))


def forward_backward(s, rows, targets) -> float:
    """Gradients of this rank's share of the summed loss / targets; returns the share's sum."""
    losses = []
    for part in core.micro_batches(s.ddp, rows, s.cfg.micro_batch):
        input_ids, labels = s.blocks["train"].batch(part, s.world.device)
        with s.precision.autocast():
            losses.append(s.ddp(input_ids, labels))
        core.scaled_backward(losses[-1], s.world, targets, s.precision)
    return sum(loss.item() for loss in losses)


def take_step(s, step, targets, lr, beta1, watch=lambda loss_sum: None) -> tuple[float, float]:
    """Global batch `step`: (this rank's summed loss before the update, norm of the whole gradient)."""
    core.reseed(s.cfg.seed, step, s.world.rank)
    loss_sum = forward_backward(s, s.batches.rank_batch(step), targets)
    skip = watch(loss_sum)
    return loss_sum, core.optimizer_step(s.optimizer, s.precision, s.cfg.clip, lr, beta1, skip)


def autopsy(s, step, lr) -> dict:
    """What an odd step saw, for spikes.jsonl."""
    rows, stream = s.batches.global_batch(step).tolist(), s.blocks["train"]
    start = rows[0] * s.cfg.block_size
    text = s.tokens.tokenizer.decode(stream.tokens[start : start + s.cfg.block_size + 1].tolist())
    return {"lr": lr, "rows": rows, "first_row": text, "targets": int(stream.targets(rows).sum())}


def count_targets(s, step) -> int:
    """Of this rank's share of global batch `step`."""
    return int(s.blocks["train"].targets(s.batches.rank_batch(step)).sum())


def held_out(cfg) -> tuple[str, ...]:
    """The parts whose figures a run ends with, the most important one last."""
    return ("val", "test") if cfg.final_eval and cfg.test_share else ("val",)


@torch.no_grad()
def evaluate(model, blocks, cfg, world, poll=lambda: None) -> np.ndarray:
    """(blocks, 3) on every rank: summed loss, hits of the likeliest token, targets. `model` is unwrapped.

    `blocks`: corpus.Blocks, or another with lengths, targets and batch.
    """
    was_training = model.training
    model.eval()
    precision = core.Precision(cfg.dtype, world)
    batches = core.ShardedBatches(blocks.lengths, cfg.eval_batch, world)
    sums = torch.zeros(len(blocks), 3, dtype=torch.float64)
    with core.progress(len(batches), "evaluating", world) as bar:
        for step in range(len(batches)):
            poll()
            if mine := batches.rank_batch(step):
                input_ids, labels = blocks.batch(mine, world.device)
                counted = labels != core.IGNORE_INDEX
                with precision.autocast():
                    hidden = model.hidden(input_ids)[counted]
                    log_probs, hits = core.token_log_probs(*model.head(hidden), labels[counted])
                rows = torch.tensor(mine)[counted.cpu().nonzero()[:, 0]]
                sums.index_add_(
                    0, rows, torch.stack([-log_probs, hits.double(), torch.ones_like(log_probs)], 1)
                )
            bar.update()
    model.train(was_training)
    return core.all_reduce_sum(world, sums).numpy()


def measure(sums, blocks, unigram, sizes=None) -> dict:
    """Loss per token, perplexity, accuracy with 95 % intervals, beside the loss of the training frequencies.

    Neighbouring blocks resemble each other: the intervals redraw 100 stretches of the text. `sizes` (V,) are
    the bytes that each id spells, for bits per byte.
    """
    log_share = np.log((unigram + 1) / (unigram.sum() + len(unigram)))
    plain = -block_sums(log_share, blocks)
    spelt = None if sizes is None else block_sums(sizes, blocks)
    metrics = core.language_metrics(sums, stretches(len(sums)), plain, spelt)
    alarm = f"NOT LEARNING: loss {metrics['loss']:.4f}, token frequencies alone {metrics['unigram_loss']:.4f}"
    return metrics | {"alarm": alarm if metrics["above_unigram_interval"][1] >= 0 else None}


def stretches(n) -> np.ndarray:
    """Number of the stretch, of 100 equal ones, that each of n neighbouring rows lies in."""
    return np.arange(n) * min(100, n) // n


def block_sums(values, blocks) -> np.ndarray:
    """(blocks,): the sum over each block's targets of `values`, one for each id of the vocabulary."""
    return np.add.reduceat(values[blocks.tokens[1:]], np.arange(0, len(blocks.tokens) - 1, blocks.block_size))


def losses(part, sums, blocks, sizes) -> list[dict]:
    """Lines of losses.jsonl."""
    spelt = block_sums(sizes, blocks)
    return runs.loss_lines(part, np.arange(len(sums)), stretches(len(sums)), sums, spelt)


def remeasure(folder, world, eval_batch=None, poll=lambda: None) -> tuple[dict, tuple[str, list]]:
    """The figures of a run's own val and test text, measured again, and losses.jsonl: its name and lines.

    UserError if cfg.data or its tokenizer has changed since.
    """
    cfg, model, _ = load_model(folder, world)
    cfg = replace(cfg, eval_batch=eval_batch or cfg.eval_batch)
    tokens, result = corpus.open_corpus(corpus_of(cfg), world), {}
    stored = runs.read_config(folder)["facts"]["fingerprint"]
    runs.same_data(stored, tokens.fingerprint, cfg.data, ("data", "tokenizer"))
    sizes = corpus.token_bytes(tokens.tokenizer)
    for part in held_out(cfg):
        blocks = corpus.Blocks(tokens.parts[part], cfg.block_size)
        sums = evaluate(model, blocks, cfg, world, poll)
        metrics = measure(sums, blocks, tokens.unigram, sizes)
        result |= {f"{part}/{name}": value for name, value in metrics.items()}
    return result, ("losses.jsonl", losses(part, sums, blocks, sizes))


# ---------------------------------------------------------------------------------------------------- train


def train(run, cfg, world) -> dict:
    s = set_up(run, cfg, world)
    step, total_steps, model = s.step, s.total_steps, s.model
    saved = (model, s.optimizer, s.precision)

    def where():
        return f"epoch {step / len(s.batches):.3g}/{cfg.epochs}"

    while True:
        ends = step >= total_steps
        evaluates = ends or (step > 0 and step % (cfg.eval_every or len(s.batches)) == 0)
        if evaluates or (step > 0 and cfg.save_every and step % cfg.save_every == 0):
            run.save(step, *saved, must=ends)
        if evaluates:
            sums = evaluate(model, s.blocks["val"], cfg, world, run.poll)
            val = measure(sums, s.blocks["val"], s.tokens.unigram)
            is_best = run.save_best(step, val["loss"], model)
            report_validation(run, step, val, where(), is_best, late=2 * step >= total_steps)
            core.on_main(world, functools.partial(sample, run, cfg, step, model, s.tokens.tokenizer))
        if ends:
            break
        targets = run.agree(count_targets(s, step))
        if run.stopping:
            run.save(step, *saved, must=True)
            raise core.Stop(run.stopping)
        if run.clock_share >= 1:  # max_minutes are spent
            total_steps = step
            continue
        length = run.schedule_length(step, total_steps)
        lr, beta1 = core.lr_at(cfg, step, length), core.beta1_at(cfg, step, length)
        facts = functools.partial(autopsy, s, step, lr)
        watch = functools.partial(run.watch, step + 1, targets=targets, model=model, describe=facts)
        loss_sum, grad_norm = take_step(s, step, targets, lr, beta1, watch)
        run.step_done(loss_sum, targets, targets)
        step += 1
        if step % cfg.log_every == 0 or step == total_steps:
            run.log_training(where(), step, total_steps, {"lr": lr, "grad_norm": grad_norm})
    return finish(run, cfg, world, s)


def finish(run, cfg, world, s) -> dict:
    """Measures the chosen weights on val and test; final figures, and how many sampled words are known."""
    sha256, measured, result = runs.weights_sha256(s.model), run.checkpoint, {}
    sizes = corpus.token_bytes(s.tokens.tokenizer)
    if cfg.test_weights == "best":
        measured = run.load_best(s.model)
    for part in held_out(cfg):
        sums = evaluate(s.model, s.blocks[part], cfg, world, run.poll)
        m = measure(sums, s.blocks[part], s.tokens.unigram, sizes)
        result |= {f"{part}/{name}": value for name, value in m.items()}
        run.say(
            f"{part:5} loss {core.plus_minus(m['loss'], m['loss_interval'], 4)}   "
            f"perplexity {m['perplexity']:.2f}   "
            f"accuracy {core.plus_minus(m['accuracy'], m['accuracy_interval'])}   "
            f"token frequencies {m['unigram_loss']:.4f}" + (f"\n{part:5} {m['alarm']}" if m["alarm"] else "")
        )
    lines = losses(part, sums, s.blocks[part], sizes)
    core.on_main(world, lambda: core.write_lines(run.folder / "losses.jsonl", lines))
    known = core.on_main(world, lambda: known_words(run.folder / "samples.jsonl", s.tokens))
    if known is not None:
        run.say(f"samples  {known:.0%} of their words occur in the training text")
    run.say(
        f"done  {part} loss {m['loss']:.4f}  perplexity {m['perplexity']:.2f}  {run.seconds / 60:.1f} min"
    )
    run.say(f"all figures: {run.folder}/result.json")
    run.say(f"samples: python gpt_scratch.py --mode generate --model {run.folder}")
    run.say(f"next: python eval.py --run {run.folder}")
    return result | {
        "weights_sha256": sha256,
        "test_checkpoints": [measured],
        "parameters": core.count_parameters(s.model)[0],
        "known_words": known,
    }


def announce(run, cfg, tokens, blocks, batches, total_steps, model):
    """What is about to be trained on what."""
    total, trainable = core.count_parameters(model)
    sizes = "  ".join(f"{part} {len(tokens.parts[part])}" for part in corpus.PARTS)
    run.say(
        f"model {cfg.model}  {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable   {sizes} tokens"
    )
    run.begin()
    counts = "  ".join(f"{part} {n}" for part, n in tokens.documents.items())
    tokenizer = corpus_of(cfg).tokenizer
    run.say(f"data {cfg.data}  documents {counts}  tokenizer {tokenizer} of {len(tokens.tokenizer)}")
    for line in tokens.lines:
        run.say(line)
    seen = total_steps * cfg.batch * cfg.block_size
    run.say(f"tokens per parameter  {len(tokens.parts['train']) / total:.2f} in the data, {seen / total:.2f} "
            f"will be seen in {total_steps} steps ({RATIO} are said to be best)")  # fmt: skip
    if left := len(blocks["train"]) % cfg.batch:
        run.say(f"each epoch leaves out {left} of {len(blocks['train'])} blocks, others each time: "
                f"they fill no batch of {cfg.batch}")  # fmt: skip


def describe_block(tokenizer, blocks) -> str:
    """The first block, decoded from its ids: garbage here is garbage in training (journal 003, v0.0.11)."""
    text = one_line(tokenizer.decode(blocks.tokens[: min(blocks.block_size, 200) + 1].tolist()))
    return f"the loss sees, in {blocks.targets([0])[0]} targets (all but the first token):\n  {text[:96]}"


def one_line(text) -> str:
    return "".join(c if c.isprintable() else " " for c in text.replace("\n", " / "))


def report_validation(run, step, val, where, is_best, late):
    """`late`: half of the steps are done, so that having learnt nothing is worth a line."""
    run.say(
        f"{where}  val  loss {core.plus_minus(val['loss'], val['loss_interval'], 4)}  "
        f"perplexity {val['perplexity']:.2f}  "
        f"accuracy {core.plus_minus(val['accuracy'], val['accuracy_interval'])}"
        f"{'  -> best' if is_best else ''}"
    )
    if val["alarm"] and late:
        run.say(f"{where}  val  {val['alarm']}")
    run.metrics(step, {f"val/{name}": val[name] for name in ("loss", "perplexity", "accuracy")})


def sample(run, cfg, step, model, tokenizer):
    """Rank 0: a few continuations of the prompt to log, TensorBoard and samples.jsonl."""
    if cfg.sample_tokens:
        prompts = [cfg.prompt or ""] * SAMPLES
        texts = continuations(model, tokenizer, cfg, prompts, cfg.sample_tokens, step, run.leave_if_signalled)
        run.samples(step, texts)
        for text in texts[:1]:
            run.say("\n".join(f"  | {line}" for line in textwrap.wrap(one_line(text), 95)[:4]))


def continuations(model, tokenizer, cfg, prompts, max_new_tokens, seed, poll=lambda: None) -> list[str]:
    """Text behind each prompt; an empty prompt is an end-of-text token: a new document begins."""
    ids = [tokenizer(prompt).input_ids or [tokenizer.eos_token_id] for prompt in prompts]
    choice = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
    choice |= {"stop": stop_ids(tokenizer, cfg.stop), "seed": seed, "poll": poll}
    choice["vocab_size"] = len(tokenizer) - (tokenizer.unk_token_id == len(tokenizer) - 1)  # no <unk>
    return [tokenizer.decode(row) for row in generate(model, ids, max_new_tokens, **choice)]


def stop_ids(tokenizer, stop) -> set[int]:
    """End-of-text, and the one token of `stop` (in which \\n and \\t stand for themselves)."""
    if stop is None:
        return {tokenizer.eos_token_id}
    text = stop.replace("\\n", "\n").replace("\\t", "\t")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise core.UserError(f"--stop {stop!r} is not one token that this tokenizer knows: use one that is")
    return {tokenizer.eos_token_id, ids[0]}


def known_words(path, tokens, most=5_000_000) -> float | None:
    """Share of the last samples' words that occur in the training text (its first `most` tokens)."""
    lines = path.read_text().splitlines() if path.exists() else []
    last = [json.loads(line)["text"] for line in lines[-SAMPLES:]]
    sampled = [word for text in last for word in words(text)[:-1]]  # the last one is cut
    text = tokens.tokenizer.decode(tokens.parts["train"][:most].tolist()) if sampled else ""
    vocabulary = set(words(text))
    return sum(word in vocabulary for word in sampled) / len(sampled) if sampled else None


def words(text) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


# ------------------------------------------------------------------------------------- learning-rate finder

DIVERGED = 4  # times the lowest smoothed loss so far, as in fastai and Lightning


def find_lr(run, cfg, world) -> dict:
    """Which rate? Loss against a rate that grows at every step, under exactly the conditions of training."""
    s = set_up(run, cfg, world, cfg.find_steps)

    def take(step, lr):
        targets = run.agree(count_targets(s, step))
        if run.stopping:
            raise core.Stop(run.stopping)
        loss_sum, _ = take_step(s, step, targets, lr, core.beta1_at(cfg, 0, s.total_steps))
        return core.all_reduce_sum(world, torch.tensor(loss_sum, dtype=torch.float64)).item() / targets

    lrs = np.geomspace(cfg.find_from, cfg.find_to, cfg.find_steps)
    curve = sweep(take, lrs, cfg.find_smoothing, s.model, s.optimizer, s.precision)
    suggestions = suggest(curve["lr"], curve["smoothed"])
    core.on_main(world, lambda: show_curve(run, curve, suggestions))
    best = suggestions["minimum/10"]
    run.say(f"next: the same with --mode train --lr {best:.1e}" if best else "the curve does not fall")
    return {"lr_finder": suggestions, "weights_sha256": runs.weights_sha256(s.model)}


def sweep(take, lrs, smoothing, model, optimizer, precision) -> dict:
    """`take(step, lr)` makes a step and returns its loss before the update, for each of `lrs` in turn.

    The loss of a rate is the one its update leads to: that of the next step. Smoothed by a running mean
    divided by 1 - smoothing^n (n losses seen, from 1), without which a constant loss would be drawn as a
    rise (the journal's plot). Ends early on divergence. Weights, optimizer and scaler are put back.
    """
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.scaler.state_dict()))
    losses, smoothed, mean = [], [], 0.0
    try:
        for step, lr in enumerate([*lrs, 0.0]):
            try:
                loss = take(step, float(lr))
            except FloatingPointError:
                break
            if step == 0:
                continue
            if not math.isfinite(loss):
                break
            mean = smoothing * mean + (1 - smoothing) * loss
            losses.append(loss)
            smoothed.append(mean / (1 - smoothing ** len(losses)))
            if smoothed[-1] > DIVERGED * min(smoothed):
                break
    finally:
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        if precision.scaler.is_enabled():
            precision.scaler.load_state_dict(kept[2])
        optimizer.zero_grad(set_to_none=True)
    return {"lr": [float(lr) for lr in lrs[: len(losses)]], "loss": losses, "smoothed": smoothed}


def suggest(lrs, smoothed) -> dict[str, float | None]:
    """Three rules side by side; None where the curve never falls by a thousandth.

    steepest: where the loss falls fastest per factor of the rate; valley: the middle of the longest fall;
    minimum/10: a tenth of where it is lowest (Gugger: up to the minimum itself with one_cycle).
    """
    y = np.asarray(smoothed)
    lowest = int(y.argmin()) if len(y) else 0
    if lowest < 2 or y[:lowest].max() - y[lowest] < 1e-3 * abs(y[lowest]):
        return {"steepest": None, "valley": None, "minimum/10": None}
    slope = np.gradient(np.minimum.accumulate(y), np.log(lrs))  # falling back from a bad batch gains nothing
    start, end = longest_fall(y)
    steepest, middle = int(slope.argmin()), (start + end) // 2
    return {"steepest": lrs[steepest], "valley": lrs[middle], "minimum/10": lrs[lowest] / 10}


def longest_fall(y) -> tuple[int, int]:
    """First and last index of the longest decreasing subsequence: noise between does not end a fall."""
    length, before = np.ones(len(y), dtype=int), np.arange(len(y))
    for i in range(1, len(y)):
        higher = np.flatnonzero(y[:i] > y[i])
        if len(higher):
            before[i] = higher[length[higher].argmax()]
            length[i] = length[before[i]] + 1
    end = start = int(length.argmax())
    while before[start] != start:
        start = before[start]
    return int(start), end


def show_curve(run, curve, suggestions):
    """lr_finder.json, lr_finder.png, and the same plot in the terminal."""
    core.write_json(run.folder / "lr_finder.json", curve | {"suggestions": suggestions})
    if len(curve["lr"]) < 3:
        return run.say(
            f"{len(curve['lr'])} losses before the end: no curve; use a lower find_from or more steps"
        )
    for step, (lr, loss, smooth) in enumerate(
        zip(curve["lr"], curve["loss"], curve["smoothed"], strict=True)
    ):
        run.metrics(step, {"find/lr": lr, "find/loss": loss, "find/smoothed": smooth})
    run.say(text_plot(curve["lr"], curve["smoothed"], suggestions))
    run.say("suggested lr  " + "   ".join(f"{name} {lr:.2e}" for name, lr in suggestions.items() if lr))
    plot_curve(curve, suggestions, run.folder / "lr_finder.png")
    run.say(f"the curve: {run.folder}/lr_finder.png")


def plot_curve(curve, suggestions, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(curve["lr"], curve["loss"], ".", color="0.7", label="loss after a step at this rate")
    axes.plot(curve["lr"], curve["smoothed"], label="smoothed")
    for (name, lr), color in zip(suggestions.items(), ("C1", "C2", "C3"), strict=True):
        if lr:
            axes.axvline(lr, color=color, linestyle="--", label=f"{name}: {lr:.1e}")
    low, high = min(curve["smoothed"]), curve["smoothed"][0]
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss per token", title="Learning-rate finder")
    axes.set_ylim(low - 0.2 * (high - low + 0.1), high + 0.5 * (high - low + 0.1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def text_plot(lrs, values, marks, width=80, height=12) -> str:
    """values over log lrs in `height` lines; a letter on the axis for each mark."""
    x = np.log10(lrs)
    columns = np.round((x - x[0]) / max(x[-1] - x[0], 1e-9) * (width - 1)).astype(int)
    low, high = min(values), max(values[0], min(values) + 1e-9)
    top = high + 0.25 * (high - low)  # what shoots above is cut off
    canvas = [[" "] * width for _ in range(height)]
    for column, value in zip(columns, values, strict=True):
        if value <= top:
            canvas[round((top - value) / (top - low) * (height - 1))][column] = "*"
    lines = [
        f"{top - (top - low) * i / (height - 1):8.4f} |{''.join(row)}".rstrip()
        for i, row in enumerate(canvas)
    ]
    axis, under = ["-"] * width, [" "] * (width + 6)
    for exponent in range(math.ceil(x[0]), math.floor(x[-1]) + 1):
        column = round((exponent - x[0]) / (x[-1] - x[0]) * (width - 1))
        axis[column], under[column : column + 5] = "+", f"1e{exponent:<3}"[:5]
    for name, lr in marks.items():
        if lr:
            column = round((math.log10(lr) - x[0]) / (x[-1] - x[0]) * (width - 1))
            axis[np.clip(column, 0, width - 1)] = name[0].upper()
    letters = "  ".join(f"{name[0].upper()} {name}" for name, lr in marks.items() if lr)
    return "\n".join(
        [*lines, " " * 9 + "+" + "".join(axis), (" " * 10 + "".join(under)).rstrip(), " " * 10 + letters]
    )


# ----------------------------------------------------------------------------- generate, export and profile


def talk(cfg, world):
    """Mode generate: continues --prompt, or each line typed (an empty one starts a new document)."""
    name = cfg.model if cfg.model != "new" else str(runs.newest_run(cfg, __file__))
    model, tokenizer = open_model(name)
    model.to(world.device)
    millions = core.count_parameters(model)[0] / 1e6
    print(f"{name}  {millions:.1f}M parameters  block_size {model.config.block_size}")
    interactive = cfg.prompt is None and sys.stdin.isatty()
    prompts = [cfg.prompt] if cfg.prompt is not None else prompt_loop(interactive)
    try:
        for count, prompt in enumerate(prompts):
            for note in prompt_notes(model, tokenizer, prompt):
                print(note, file=sys.stderr)
            texts = continuations(model, tokenizer, cfg, [prompt], cfg.max_new_tokens, cfg.seed + count)
            print(prompt + texts[0])
    except KeyboardInterrupt:
        print()


def prompt_notes(model, tokenizer, prompt) -> list[str]:
    """What of a prompt the model does not get to see."""
    ids, size, notes = tokenizer(prompt).input_ids, model.config.block_size, []
    if tokenizer.unk_token_id is not None and (unknown := ids.count(tokenizer.unk_token_id)):
        notes.append(f"({unknown} of {len(ids)} tokens of the prompt are unknown to this tokenizer)")
    if len(ids) > size:
        notes.append(
            f"(the prompt has {len(ids)} tokens: the last {(size + 1) // 2} count, block_size is {size})"
        )
    return notes


def prompt_loop(interactive):
    """Lines until end of file; Ctrl-C or Ctrl-D leave, and so does a reader of the answers that is gone."""
    while not getattr(sys.stdout, "is_dead", False):
        try:
            yield input("prompt> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return


def export(cfg, world):
    """Mode export: the weights of --model (a run folder) as a folder that transformers loads."""
    if not is_run(cfg.model):
        raise core.UserError(
            f"--mode export needs --model with a run folder of gpt_scratch.py, not {cfg.model}"
        )
    folder = Path(cfg.out or Path(cfg.model) / "transformers")
    save_pretrained(*open_model(cfg.model), folder)
    print(f"written: {folder}")


def profile(run, cfg, world) -> dict:
    """Mode profile: where ten steps spend their time; a table, and trace.json for a browser."""
    from torch.profiler import profile as profiler

    s = set_up(run, cfg, world, 10)
    with profiler() as seen:
        for step in range(10):
            targets = run.agree(count_targets(s, step))
            if run.stopping:
                raise core.Stop(run.stopping)
            lr, beta1 = core.lr_at(cfg, step, s.total_steps), core.beta1_at(cfg, step, s.total_steps)
            take_step(s, step, targets, lr, beta1)
    kind = "self_device_time_total" if world.device.type != "cpu" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, kind))
    total = sum(getattr(row, kind) for row in rows)
    run.say(f"{'self time':60} {'calls a step':>12} {'ms a step':>10} {'share':>7}")
    for row in rows[:20]:
        spent = getattr(row, kind)
        run.say(f"{row.key[:60]:60} {row.count / 10:12.1f} {spent / 1e4:10.2f} {spent / total:7.1%}")
    if world.is_main:
        seen.export_chrome_trace(str(run.folder / "trace.json"))
    run.say(f"trace: {run.folder}/trace.json (open it at ui.perfetto.dev)")
    return {"profile": {row.key: getattr(row, kind) / 1e4 for row in rows[:20]}}


# ----------------------------------------------------------------------------------------------------- main


@record
def main(cfg, world):
    cfg = core.with_dtype(cfg, world)
    if not cfg.dirty:
        core.on_main(world, runs.refuse_dirty)
    if cfg.mode in ("generate", "export"):
        if world.size > 1:
            raise core.UserError(f"--mode {cfg.mode} runs in one process: start it with python")
        return (talk if cfg.mode == "generate" else export)(cfg, world)
    with runs.Run(cfg, world, __file__, unit="tokens") as run:
        run.result = {"train": train, "find_lr": find_lr, "profile": profile}[cfg.mode](run, run.cfg, world)
    return run.result


if __name__ == "__main__":
    cfg = core.parse_config(Config, PRESETS, SMOKE, __doc__)
    with core.distributed(cfg.backend) as world:
        main(cfg, world)
