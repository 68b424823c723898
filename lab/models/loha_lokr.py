"""LoHa and LoKr by hand (Hyeon-Woo et al. 2021, Yeh et al. 2023), beside lora.py's LoRA.

A layer W x becomes (W + s D) x, s = alpha / rank. LoRA's D has rank r; LoHa's is an elementwise product of
two such, of rank up to r^2; LoKr's is a Kronecker product: full rank, few numbers. All begin at D = 0."""

import math

import torch
from torch import nn

from lab.errors import UserError
from lab.models.lora import add_lora, layer_names
from lab.models.lora_layers import Adapter
from lab.train.cpu import linear

METHODS = ("lora", "loha", "lokr")
KINDS_OF_LORA = ("lora", "dora", "pissa")


class LoHaLinear(Adapter):
    """x -> (W + s (W1a W1b) * (W2a W2b)) x: a factor a is (out, rank), b (rank, in); W2b is zero at first."""

    def __init__(self, base, rank, multiplier):
        super().__init__(base, multiplier)
        shapes = {"W1a": (base.out_features, rank), "W1b": (rank, base.in_features)}
        shapes |= {"W2a": (base.out_features, rank), "W2b": (rank, base.in_features)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(base.weight.new_empty(shape)))
        uniform(self.W1a, self.W1b, self.W2a)
        nn.init.zeros_(self.W2b)

    def factors(self):
        return self.W1a, self.W1b, self.W2a, self.W2b

    def forward(self, x):
        return _LoHa.apply(x, self.base.weight, self.base.bias, self.multiplier, *self.factors())

    def delta(self):
        return _hadamard(self.multiplier, *self.factors())


def _hadamard(multiplier, W1a, W1b, W2a, W2b):
    return (W1a @ W1b).mul_(W2a @ W2b).mul_(multiplier)


class _LoHa(torch.autograd.Function):
    """One product with W + delta instead of two; recomputes what is as large as W in the backward.

    With G the slope by the whole weight: to W1a (G * M2) W1b^T, to W1b W1a^T (G * M2), M2 = W2a W2b, and the
    same with 1 and 2 swapped. W itself gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, multiplier, *factors):
        ctx.save_for_backward(x, weight, *factors)
        ctx.multiplier = multiplier
        with torch.autocast(x.device.type, enabled=False):
            whole = _whole(weight, multiplier, factors)
        return linear(x, whole, bias)  # under autocast in half precision

    @staticmethod
    def backward(ctx, slope):
        with torch.autocast(slope.device.type, enabled=False):  # a compiled backward would inherit it
            return _LoHa.slopes(ctx, slope)

    @staticmethod
    def slopes(ctx, slope):
        x, weight, *factors = ctx.saved_tensors
        W1a, W1b, W2a, W2b = factors
        rows, to_x = slope.reshape(-1, slope.shape[-1]), None
        if ctx.needs_input_grad[0]:
            whole = _whole(weight, ctx.multiplier, factors).to(slope.dtype)
            to_x = linear(slope, whole.t()).to(x.dtype)
        G = (rows.t() @ x.reshape(-1, x.shape[-1]).to(slope.dtype)).to(W1a.dtype).mul_(ctx.multiplier)
        by_1 = G * (W2a @ W2b)
        by_2 = G.mul_(W1a @ W1b)
        to_factors = by_1 @ W1b.t(), W1a.t() @ by_1, by_2 @ W2b.t(), W2a.t() @ by_2
        return to_x, None, None, None, *to_factors


def _whole(weight, multiplier, factors):
    return _hadamard(multiplier, *factors).add_(weight)


class LoKrLinear(Adapter):
    """x -> W x + s (W1 kron W2) x, without ever making the product: x as a matrix X, it is W1 X W2^T.

    in = m n, out = l k with factors as near as possible; W1 (l, m), zero at first; W2 (k, n), or of low rank,
    W2a (k, rank) W2b (rank, n), where rank < max(k, n) / 2.
    """

    def __init__(self, base, rank, multiplier):
        super().__init__(base, multiplier)
        (rows, k), (columns, n) = near_factors(base.out_features), near_factors(base.in_features)
        new = base.weight.new_empty
        self.W1 = nn.Parameter(base.weight.new_zeros(rows, columns))
        self.low_rank = rank < max(k, n) / 2
        if self.low_rank:
            self.W2a, self.W2b = nn.Parameter(new(k, rank)), nn.Parameter(new(rank, n))
            uniform(self.W2a, self.W2b)
        else:
            self.W2 = nn.Parameter(new(k, n))
            uniform(self.W2)

    def forward(self, x):
        X = x.reshape(*x.shape[:-1], self.W1.shape[1], -1)
        X = linear(linear(X, self.W2b), self.W2a) if self.low_rank else linear(X, self.W2)
        # (..., m, k) -> (..., l, k)
        return self.base(x) + (self.multiplier * self.W1 @ X).flatten(-2)

    def delta(self):
        return self.multiplier * torch.kron(self.W1, self.W2a @ self.W2b if self.low_rank else self.W2)


def near_factors(n) -> tuple[int, int]:
    """(smaller, larger) with product n, as near to each other as can be: 3072 -> (48, 64)."""
    small = next(i for i in range(math.isqrt(n), 0, -1) if n % i == 0)
    return small, n // small


@torch.no_grad()
def uniform(*matrices):
    """A parameter drawn within 1 / sqrt(columns), as nn.Linear, peft and LoRALinear do."""
    for matrix in matrices:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))


def add_adapters(model, method, rank, alpha, dropout=0.0) -> list[str]:
    """Freezes a GPT and puts lora (dora, pissa), loha or lokr on every linear layer of its blocks; returns
    their names.

    A fused layer gets one adapter. `dropout` applies to what LoRA reads; LoHa and LoKr have none, as in peft.
    """
    if method in KINDS_OF_LORA:
        init = "pissa" if method == "pissa" else "fan_in"
        return add_lora(model, rank, alpha, dropout=dropout, init=init, parts=1, dora=method == "dora")
    if dropout:
        raise UserError(f"--lora_dropout {dropout:g}: {method} has no dropout of inputs, use 0")
    model.requires_grad_(False)
    names = layer_names(model)
    kind = {"loha": LoHaLinear, "lokr": LoKrLinear}[method]
    for name in names:
        model.set_submodule(name, kind(model.get_submodule(name), rank, alpha / rank))
    return names
