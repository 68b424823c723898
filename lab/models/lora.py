"""Low-rank adaptation of a GPT by hand (Hu et al. 2021): adapters on linear layers of a frozen base.

A layer W x becomes W x + s B A x, with A (rank, in) drawn and B (out, rank) zero at the start, so that
training begins at the base. s is the multiplier: alpha / rank today, alpha in the ancestor of journal 001.
PiSSA begins A and B elsewhere, DoRA trains the lengths of the rows apart, LoRA+ gives B a rate of its own.
"""

import itertools
import math
import re

import torch
from torch import nn

from lab.errors import UserError
from lab.models.gpt import GPT
from lab.models.gpt_formats import with_weights
from lab.models.lora_layers import Adapter, DoRALinear, LoRALinear

SCALINGS = {  # alpha, rank -> multiplier
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha": lambda alpha, rank: alpha,  # rasbt's LLMs-from-scratch until September 2025
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, Kalajdzievski 2023
}
TARGETS = {  # what may get an adapter, by the names that Llama has made usual -> the layer of a block
    "q": "attn.c_attn",  # query, key and value are one matrix here, with an adapter for each of them
    "k": "attn.c_attn",
    "v": "attn.c_attn",
    "o": "attn.c_proj",
    "gate": "mlp.c_gate",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
GROUPS = {"all": [*TARGETS], "attention": ["q", "k", "v", "o"], "mlp": ["gate", "up", "down"]}


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
    dora=False,
    rank_pattern=None,
    alpha_pattern=None,
):
    """Freezes the model and puts adapters on layers of its blocks, in place; returns the layers' names.

    targets: all | attention | mlp | some of TARGETS, as in q,v; head: the output matrix too; last_layers:
    only so many blocks at the top; parts 1: one adapter for all matrices of a fused layer, not one for each;
    patterns: other ranks and alphas, as in attn.c_attn=8,h.0.mlp=32.
    """
    layers = chosen_layers(model, targets, head, last_layers)
    ranks = by_pattern("lora_rank_pattern", rank_pattern, layers, rank, int)
    alphas = by_pattern("lora_alpha_pattern", alpha_pattern, layers, alpha, float)
    model.requires_grad_(False)  # first: the adapters are to train
    for name, rows in layers.items():
        multiplier = SCALINGS[scaling](alphas[name], ranks[name])
        layer = wrap_layer(model, name, ranks[name], multiplier, dropout, None if parts == 1 else rows, dora)
        layer.initialise(init)
    return list(layers)


def target_names(targets) -> list[str]:
    """Which of TARGETS the constant lora_targets names: q,v or, in an arm of a study, q+v."""
    names = GROUPS.get(targets) or re.split("[,+]", targets)
    if not set(names) <= TARGETS.keys() or len(set(names)) < len(names):
        every = f"all, attention, mlp, or some of {','.join(TARGETS)}"
        raise UserError(f"--lora_targets {targets}: use {every}")
    return names


def chosen_layers(model, targets="all", head=False, last_layers=None) -> dict[str, list | None]:
    """Names of the linear layers that get an adapter -> ranges of rows that get one each; none: all rows."""
    if head and model.config.tie_head:
        raise UserError("the output matrix is the embedding: use --no-tie_head, or --no-lora_head")
    if last_layers is not None and last_layers > len(model.h):
        raise UserError(f"--lora_layers {last_layers} is more than the model's {len(model.h)} blocks")
    first = len(model.h) - (len(model.h) if last_layers is None else last_layers)
    wanted = target_names(targets)
    there = {name for name, module in model.h.named_modules(prefix="h") if isinstance(module, nn.Linear)}
    lacks = [t for t in wanted if not any(name.endswith(TARGETS[t]) for name in there)]
    if lacks and targets not in GROUPS:
        has = ",".join(t for t in TARGETS if t not in lacks)
        raise UserError(f"--lora_targets {targets}: the model has no {lacks[0]}, it has {has}")
    of_block = dict.fromkeys(TARGETS[t] for t in TARGETS if t in wanted)
    names = [f"h.{i}.{layer}" for i in range(first, len(model.h)) for layer in of_block]
    layers = {name: matrix_rows(model.config, name, wanted) for name in names if name in there}
    if not (layers or head):
        raise UserError("no layer gets an adapter: use more --lora_layers, or --lora_head")
    return layers | ({"lm_head": None} if head else {})


def layer_names(model, targets="all", head=False, last_layers=None) -> list[str]:
    """Names of the linear layers that get an adapter."""
    return list(chosen_layers(model, targets, head, last_layers))


def matrix_rows(config, name, wanted=TARGETS) -> list[tuple[int, int]] | None:
    """Ranges of rows of the wanted matrices in a fused layer; None for a layer of one matrix."""
    if not name.endswith("attn.c_attn"):
        return None
    ends = list(itertools.accumulate(config.qkv_sizes))
    return [rows for t, rows in zip("qkv", zip([0, *ends], ends, strict=False), strict=False) if t in wanted]


def by_pattern(constant, patterns, layers, default, kind) -> dict:
    """Layer -> its value by the first of `patterns` (name=value,...) that is a dotted part of its name.
    UserError for a pattern that fits no layer, and for a value that is no number over 0."""
    values = dict.fromkeys(layers, default)
    pairs = [pair.partition("=")[::2] for pair in re.split("[,+]", patterns)] if patterns else []
    for pattern, text in reversed(pairs):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        fits = [name for name in layers if f".{pattern}." in f".{name}."]
        right = 0 < value < math.inf
        if not right or not fits:
            why = f"{pattern} is no layer with an adapter" if right else f"{text or 'nothing'} is no value"
            raise UserError(f"--{constant} {patterns}: {why}, use e.g. {next(iter(layers))}={default}")
        values |= dict.fromkeys(fits, value)
    return values


def wrap_layer(model, name, rank, multiplier, dropout=0.0, parts=None, dora=False) -> LoRALinear:
    kind = DoRALinear if dora else LoRALinear
    layer = kind(model.get_submodule(name), rank, multiplier, dropout, parts)
    model.set_submodule(name, layer)
    return layer


def rate_factors(model, ratio) -> dict[str, float]:
    """LoRA+ (Hayou et al. 2024): parameter -> factor of its rate, `ratio` for B and, as in peft, DoRA's
    magnitudes."""
    return {
        name: ratio for name, _ in Adapters(model).named_parameters() if name.endswith((".B", ".magnitude"))
    }


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
