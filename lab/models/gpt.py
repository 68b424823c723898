"""A GPT written by hand: the layers of GPT-2 and of the Llama family, one class."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lab.errors import UserError
from lab.models import packed
from lab.models.rotary import require_scaling, rotary_angles, rotate
from lab.train import cpu
from lab.train.cpu import onednn, require_memory
from lab.train.device import to_device
from lab.train.loss import IGNORE_INDEX, linear_cross_entropy, targets_only
from lab.train.objective import objective

MOST = {  # beyond these a constant has a zero too many, and would cost memory or hours before it fails
    "vocab_size": 10**8,
    "block_size": 2**24,
    "n_layer": 1000,
    "n_head": 10_000,
    "n_embd": 10**6,
}


@dataclass(frozen=True)
class GPTConfig:
    """Shape and choices of a GPT. The defaults are GPT-2's."""

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
    rope_scaling: dict | None = None  # of rotary positions, as transformers' rope_parameters have it
    nope_every: int | None = None  # every n-th block knows no positions (SmolLM3: 4th); none = all do
    n_kv_head: int | None = None  # heads of keys and values, n_head / n_kv_head queries each; none = n_head
    head_size: int | None = None  # none = n_embd / n_head
    qk_norm: bool = False  # RMSNorm of each query and key before it is rotated, as in Qwen 3
    checkpointing: bool = False  # recompute each block in the backward: a third more time, far less memory

    def __post_init__(self):
        for name, most in MOST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UserError(f"a model with {name} {value}: use a whole number from 1 to {most:,}")
        if self.head_size is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        for name in ("n_kv_head", "head_size", "nope_every"):
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"a model with {name} {value}: use a whole number from 1, or none")
        if self.n_head % (self.n_kv_head or 1):
            raise UserError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.positions == "rotary" and self.head_dim % 2:
            size = "head_size" if self.head_size else "n_embd / n_head"
            raise UserError(f"rotary positions need an even {size}: it is {self.head_dim}")
        require_scaling(self.rope_scaling)
        if self.tie_head and self.head_bias:
            raise UserError("head_bias needs --no-tie_head")

    @property
    def inner(self) -> int:
        wide = 4 * self.n_embd if self.activation != "swiglu" else math.ceil(8 / 3 * self.n_embd / 256) * 256
        return self.n_inner or wide

    @property
    def head_dim(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of c_attn that make queries, keys and values."""
        shared = (self.n_kv_head or self.n_head) * self.head_dim
        return self.n_head * self.head_dim, shared, shared

    @property
    def parameters(self) -> int:
        """Of the matrices alone, computed without making any."""
        width, matrices = self.n_embd, 3 if self.activation == "swiglu" else 2
        block = width * (sum(self.qkv_sizes) + self.qkv_sizes[0]) + matrices * width * self.inner
        learned = self.block_size if self.positions == "learned" else 0
        return self.n_layer * block + width * (learned + self.vocab_size * (1 if self.tie_head else 2))


class Linear(nn.Linear):
    """nn.Linear whose products a CPU computes by oneDNN."""

    def forward(self, x):
        weight = self.weight
        if weight.dtype == torch.bfloat16 != x.dtype and not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)  # a frozen base, held in bf16
        return linear(x, weight, self.bias, self)

    def terms(self, x):
        """forward(x) unmultiplied, for linear_cross_entropy: ([(x, weight)], bias)."""
        return [(x, self.weight)], self.bias


class Embedding(nn.Embedding):
    """nn.Embedding whose matrix a tied head can share."""

    def matrix(self) -> torch.Tensor:
        """(V, C)"""
        return self.weight


def linear(x, weight, bias, module):
    """`linear` of lab/train/cpu.py, with the second layout of a weight that decoding has made, if any."""
    packed = None if torch.compiler.is_compiling() else SECOND_LAYOUT.get(module)
    if isinstance(packed, tuple):
        return F.linear(x, *packed)  # in half, with the bias
    few = packed is not None and x.numel() // x.shape[-1] <= FEW_ROWS
    return onednn(x, packed, bias) if few else cpu.linear(x, weight, bias)


FEW_ROWS = 64  # from here on the usual layout is as fast
SECOND_LAYOUT = {}  # module -> weight; as an attribute of the module it would have blocks recompiled


class Attention(nn.Module):
    """Self-attention. Groups of heads may share keys and values (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.sizes, self.head_dim, self.dropout = config.qkv_sizes, config.head_dim, config.dropout
        self.c_attn = Linear(config.n_embd, sum(self.sizes), bias=config.qkv_bias)
        self.c_proj = Linear(self.sizes[0], config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, config.norm_eps) for _ in "qk")

    def forward(self, x, rotary, mask, remember):
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.c_attn(x).split(self.sizes, dim=2))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if remember is not None:
            k, v = remember(k.type_as(v), v)  # (B, KV, S, D); k_norm leaves k in fp32 under a card's autocast
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and (remember is None or T > 1)  # whatever T is: one graph
        y = attend(q, k, v, mask, dropout, causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask, dropout, causal):
    """Attention of q (B, H, T, D) to k and v (B, KV, S, D), each shared by H / KV heads -> (B, H, T, D)."""
    if isinstance(mask, packed.Spans):
        return packed.attention(q, k, v, mask)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1 and not causal:  # decoding: heads of a group are rows of one product
        y = F.scaled_dot_product_attention(q.view(len(q), -1, groups, q.shape[3]), k, v, mask, dropout)
        return y.reshape(q.shape)
    if groups > 1 and mask is not None and q.device.type != "cpu":  # no fused kernel there has both
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=groups > 1)


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
        if torch.get_default_device().type != "meta":
            require_memory(config.parameters, "a model of this shape")
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

    def forward(self, input_ids, labels=None, segments=None, weights=None, **options):
        """input_ids (B, T) -> logits (B, T, V); with labels (B, T) the summed loss, a scalar.

        weights (B, T) of the targets and `options` (label_smoothing, z_loss, of_logits): see objective.py;
        labels and weights may be on the host. For several rows packed into one, `segments` (B, T) numbers
        them, better on the host, too: none sees another, positions restart.
        """
        hidden = self.hidden(input_ids, segments=segments)
        if labels is None:
            return self.logits(hidden)
        if weights is not None:
            counted = to_device(labels != IGNORE_INDEX, weights.device)
            options["weights"] = to_device(weights[counted], hidden.device)
        hidden, labels = targets_only(hidden, labels)
        if options:
            return objective(*self.head(hidden), labels, **options)
        return linear_cross_entropy(*self.head(hidden), labels)

    def head(self, hidden):
        """The logits of hidden (N, C), unmultiplied: ([(x, weight (V, ...)), ...], bias or None)."""
        return ([(hidden, self.wte.matrix())], None) if self.config.tie_head else self.lm_head.terms(hidden)

    def logits(self, hidden):
        """(..., C) -> (..., V)"""
        if self.config.tie_head:
            return linear(hidden, self.wte.matrix(), None, self)
        return self.lm_head(hidden)

    def hidden(self, input_ids, cache=None, segments=None):
        """input_ids (B, T) -> (B, T, C), which the head reads. With a KVCache the ids
        follow those it has seen."""
        T, past = input_ids.shape[1], cache.length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens exceed block_size {self.config.block_size}")
        device = input_ids.device
        positions = cache.positions(T, device) if cache else torch.arange(T, device=device)  # (T,) or (B, T)
        x, rotary, mask = self.wte(input_ids), None, cache.mask(T, device) if cache else None
        if segments is not None:
            fast = packed.has_kernel(device, self.config, self.training)
            mask, positions = (packed.spans if fast else packed.dense_mask)(segments, device)  # (B, T)
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        else:
            rotary = self.angles[:, positions]  # (2, T, D / 2), or with padding (2, B, T, D / 2):
            rotary = rotary if positions.dim() == 1 else rotary.unsqueeze(2)  # the same for all heads
        x, every = self.dropout(x), self.config.nope_every
        for i, block in enumerate(self.h):
            turned = rotary if not every or (i + 1) % every else None
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, turned, mask, use_reentrant=False)
            else:
                x = block(x, turned, mask, functools.partial(cache.append, i) if cache else None)
        if cache:
            cache.advance(T)
        return self.ln_f(x)
