"""Low-rank adaptation of a GPT by hand (Hu et al. 2021): adapters on linear layers of a frozen base.

A layer W x becomes W x + s B A x, with A (rank, in) drawn and B (out, rank) zero at the start, so that
training begins at the base. s is the multiplier: alpha / rank today, alpha in the ancestor of journal 001.
"""

import math
import re

import torch
from torch import nn

from lab.errors import UserError
from lab.models.gpt import GPT
from lab.models.gpt_formats import with_weights
from lab.train.cpu import linear

SCALINGS = {  # alpha, rank -> multiplier
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha": lambda alpha, rank: alpha,  # rasbt's LLMs-from-scratch until September 2025
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, Kalajdzievski 2023
}
FUSED = {"attn.c_attn": 3}  # query, key and value: one matrix in GPT-2, an adapter for each of them here


class Adapter(nn.Module):
    """A frozen linear layer `base` with trained tensors that add `delta()` to its weight."""

    def __init__(self, base, multiplier):
        super().__init__()
        self.base, self.multiplier = base, multiplier

    def delta(self) -> torch.Tensor:
        """What the adapter adds to base.weight, (out, in)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained tensors, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}


class LoRALinear(Adapter):
    """base(x) + multiplier * B A dropout(x); the output of a fused layer in `parts` with an A and B each.

    A (parts * rank, in), B (out, rank): the rows of B of part i belong to rows i * rank ... of A.
    """

    def __init__(self, base, rank, multiplier, dropout=0.0, parts=1):
        super().__init__(base, multiplier)
        self.dropout, self.parts = nn.Dropout(dropout), parts
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Parameter(torch.empty(parts * rank, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x):
        return self.base(x) + linear(self.low(x), self.wide_B())

    def terms(self, x):
        """forward(x) unmultiplied, for linear_cross_entropy: makes nothing of the size of base.weight."""
        terms, bias = self.base.terms(x)
        return [*terms, (self.low(x), self.wide_B())], bias

    def low(self, x):
        """multiplier * A dropout(x): (..., in) -> (..., parts * rank)"""
        return linear(self.dropout(x), self.A) * self.multiplier

    def wide_B(self) -> torch.Tensor:
        """(out, parts * rank): the parts of B on a diagonal."""
        return self.B if self.parts == 1 else torch.block_diag(*self.B.chunk(self.parts))

    def delta(self) -> torch.Tensor:
        return self.multiplier * (self.wide_B() @ self.A)

    @torch.no_grad()
    def initialise(self, kind):
        """A uniform within 1 / sqrt(in) as nn.Linear and peft have it; `rank`: 1 / sqrt(rank), as journal
        001's ancestor did, whose A is stored as (in, rank) and so takes the rank for its input.
        """
        limit = 1 / math.sqrt(self.base.in_features if kind == "fan_in" else self.B.shape[1])
        self.A.uniform_(-limit, limit)
        self.B.zero_()


def add_lora(
    model,
    rank,
    alpha,
    scaling="alpha/r",
    dropout=0.0,
    targets="all",
    head=False,
    last_layers=None,
    init="fan_in",
    parts=None,
):
    """Freezes the model and puts adapters on layers of its blocks, in place; returns the layers' names.

    targets: all | attention | mlp; head: the output matrix too; last_layers: only so many blocks at the top;
    parts: adapters per fused layer; none: one for each of its matrices (FUSED).
    """
    model.requires_grad_(False)  # first: the adapters are to train
    names = layer_names(model, targets, head, last_layers)
    for name in names:
        layer = wrap_layer(model, name, rank, SCALINGS[scaling](alpha, rank), dropout, parts)
        layer.initialise(init)
    return names


def layer_names(model, targets="all", head=False, last_layers=None) -> list[str]:
    """Names of the linear layers that get an adapter."""
    if head and model.config.tie_head:
        raise UserError("the output matrix is the embedding: use --no-tie_head, or --no-lora_head")
    if last_layers is not None and last_layers > len(model.h):
        raise UserError(f"--lora_layers {last_layers} is more than the model's {len(model.h)} blocks")
    first = len(model.h) - (len(model.h) if last_layers is None else last_layers)
    kinds = {"all": ("attn", "mlp"), "attention": ("attn",), "mlp": ("mlp",)}[targets]
    names = [name for name, module in model.h.named_modules(prefix="h") if isinstance(module, nn.Linear)]
    names = [n for n in names if int(n.split(".")[1]) >= first and n.split(".")[2] in kinds]
    if not (names or head):
        raise UserError("no layer gets an adapter: use more --lora_layers, or --lora_head")
    return [*names, *(["lm_head"] if head else [])]


def wrap_layer(model, name, rank, multiplier, dropout=0.0, parts=None) -> LoRALinear:
    layer = LoRALinear(model.get_submodule(name), rank, multiplier, dropout, parts or fused_parts(name))
    model.set_submodule(name, layer)
    return layer


def fused_parts(name) -> int:
    return FUSED.get(name.split(".", 2)[-1], 1)


def adapted(model) -> dict[str, Adapter]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


class Adapters:
    """The adapters of a model as one module: what a checkpoint of a run saves and loads."""

    def __init__(self, model):
        self.model = model

    def named_parameters(self):
        for name, layer in adapted(self.model).items():
            yield from ((f"{name}.{own}", p) for own, p in layer.tensors().items())

    def parameters(self):
        return (p for _, p in self.named_parameters())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state, strict=True):
        own = dict(self.named_parameters())
        shapes = [{name: tuple(p.shape) for name, p in side.items()} for side in (own, state)]
        if odd := sorted(dict(shapes[0].items() ^ shapes[1].items())):
            raise UserError(f"adapters do not fit in {len(odd)} tensors, e.g. {odd[0]}")
        for name, p in own.items():
            p.copy_(state[name])


def base_weights(model) -> dict[str, torch.Tensor]:
    """State dict of the base: all but the adapters, under the names of the model without adapters."""
    own = {name for name, _ in Adapters(model).named_parameters()}
    weights = {name: w for name, w in model.state_dict().items() if name not in own}
    return {re.sub(r"\.base\.(weight|bias)$", r".\1", name): w for name, w in weights.items()}


@torch.no_grad()
def narrow_base(model, dtype):
    """With dtype bf16, holds the frozen matrices of the blocks in it: half the memory, and what autocast
    makes of them for each product. Embeddings, norms and the output matrix stay: they are read in fp32.
    Returns the model, for the device: so it never holds the wide ones."""
    if dtype == "bf16":
        for module in model.h.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.to(torch.bfloat16)
    return model


@torch.no_grad()
def merge_lora(model) -> GPT:
    """A model without adapters that gives the same logits. Merged matrices are new, in the dtype of the
    base's, others shared; `model` does not change."""
    weights = base_weights(model)
    for name, layer in adapted(model).items():
        weights[f"{name}.weight"] = (layer.base.weight + layer.delta()).to(layer.base.weight.dtype)
    merged = with_weights(model.config, weights)
    return merged.requires_grad_(False).train(model.training)
