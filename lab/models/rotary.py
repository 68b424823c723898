"""Rotary positions (Su et al. 2021), half-split as in Llama, and their scalings to longer contexts."""

import math

import torch

from lab.errors import UserError

SCALINGS = {  # rope_type -> what it needs beside it, as transformers' rope_parameters name it
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow")}  # none = the paper's


def require_scaling(scaling):
    """UserError unless `scaling` is none, or a known one with all its numbers."""
    if scaling is None:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else scaling
    if kind not in SCALINGS:
        raise UserError(f"rope_scaling {kind} is unknown: use one of {', '.join(SCALINGS)}")
    given = [name for name in OPTIONAL.get(kind, ()) if scaling.get(name) is not None]
    for name in (*SCALINGS[kind], *given):
        value = scaling.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"rope_scaling {kind} with {name} {value}: use a number over 0")
    if kind == "llama3" and scaling["low_freq_factor"] >= (high := scaling["high_freq_factor"]):
        low = f"low_freq_factor {scaling['low_freq_factor']}"
        raise UserError(f"rope_scaling llama3 with {low}: use one below high_freq_factor {high}")


def rotate(x, rotary):
    """Turns the pairs (x[i], x[i + D / 2]) of x (B, H, T, D) by the angles of rotary (2, ..., T, D / 2)."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def rotary_angles(config, dtype=torch.float32) -> torch.Tensor:
    """(2, block_size, D / 2): cosine and sine of position x theta^(-2 i / D), scaled as the config says."""
    scaling, dim = config.rope_scaling or {}, config.head_dim
    rates = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    size = 1.0  # YaRN: of cosine and sine, which makes attention sharper
    if scaling:
        rates = SCALED[scaling["rope_type"]](rates, scaling, config.rope_theta)
        size = attention_factor(scaling)
    angles = torch.arange(config.block_size, dtype=torch.float64)[:, None] * rates
    return (size * torch.stack([angles.cos(), angles.sin()])).to(dtype)


def linear(rates, scaling, theta):
    """All positions closer together (Chen et al. 2023)."""
    return rates / scaling["factor"]


def llama3(rates, scaling, theta):
    """Llama 3.1's: rates that turn less than low_freq_factor times in the original context are divided, those
    that turn more than high_freq_factor times stay, between them a straight line."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * rates / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return rates * keep + rates / scaling["factor"] * (1 - keep)


def yarn(rates, scaling, theta):
    """Peng et al. 2023: as llama3's, but the straight line runs over the numbers of the pairs, from the one
    that turns beta_fast times in the original context to the one that turns beta_slow times."""
    pairs, context = len(rates), scaling["original_max_position_embeddings"]

    def pair_of(turns):  # the pair that turns so often in the original context
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    numbers = torch.arange(pairs, dtype=torch.float64)
    divided = ((numbers - first) / (last - first or 0.001)).clamp(0, 1)
    return rates * (1 - divided) + rates / scaling["factor"] * divided


def attention_factor(scaling) -> float:
    """What cosine and sine are multiplied by: 1, but for YaRN's temperature."""
    if scaling["rope_type"] != "yarn":
        return 1.0
    given, factor = scaling.get("attention_factor"), scaling["factor"]
    return given if given is not None else 1 + 0.1 * math.log(max(factor, 1))


SCALED = {"linear": linear, "llama3": llama3, "yarn": yarn}
