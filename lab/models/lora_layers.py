"""The layers of low-rank adaptation: LoRA's (Hu et al. 2021) and DoRA's; PiSSA's first A and B."""

import math

import torch
from torch import nn

from lab.errors import UserError
from lab.train.cpu import linear


class Adapter(nn.Module):
    """A frozen linear layer `base` with trained tensors that add `delta()` to its weight."""

    def __init__(self, base, multiplier):
        super().__init__()
        self.base, self.multiplier = base, multiplier

    def delta(self) -> torch.Tensor:
        """What the adapter adds to base.weight, (out, in)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors, by name: all that is not the base's."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}


class LoRALinear(Adapter):
    """base(x) + multiplier * B A dropout(x), with an A and a B for each of `parts`: ranges (first, end) of
    the output's rows, in ascending order; none: one adapter of all rows.

    A (parts * rank, in), B (rows of all parts, rank): part i owns rows i * rank ... of A and its rows of B.
    PiSSA's layers have A0 and B0, too, what A and B began with: their product is subtracted from the base.
    """

    def __init__(self, base, rank, multiplier, dropout=0.0, parts=None):
        super().__init__(base, multiplier)
        self.parts = tuple(parts or [(0, base.out_features)])
        self.dropout, device = nn.Dropout(dropout), base.weight.device
        rows = torch.cat([torch.arange(first, end) for first, end in self.parts])  # that have an adapter
        first, end = torch.tensor(self.parts).T
        own = ((rows[:, None] >= first) & (rows[:, None] < end))[..., None]  # (rows, parts, 1)
        factors = multiplier * own.to(device, base.weight.dtype)
        self.register_buffer("factors", factors, persistent=False)
        some = len(rows) < base.out_features
        self.register_buffer("rows", rows.to(device) if some else None, persistent=False)
        self.A = nn.Parameter(base.weight.new_empty(len(self.parts) * rank, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(len(rows), rank))
        self.register_parameter("A0", None)
        self.register_parameter("B0", None)

    def forward(self, x):
        return self.add_to(self.base(x), x)

    def add_to(self, out, x):
        """out + multiplier * B A dropout(x); out (..., out)."""
        low, B = self.low(x), self.plain()[1]
        if x.device.type == "cpu":
            return out + linear(low * self.multiplier, self.wide(B))
        return add_product(out, low, self.wide(B, self.factors))

    def terms(self, x):
        """forward(x) unmultiplied, for linear_cross_entropy: makes nothing of the size of base.weight."""
        terms, bias = self.base.terms(x)
        return [*terms, (self.low(x) * self.multiplier, self.wide(self.plain()[1]))], bias

    def low(self, x):
        """A dropout(x): (..., in) -> (..., parts * rank); with PiSSA beside A0 x, as in plain()."""
        low = linear(self.dropout(x), self.A)
        return low if self.A0 is None else self.side_by_side(low, linear(x, self.A0), -1)

    def side_by_side(self, one, other, dim):
        """(parts * rank) along `dim`, twice -> (parts * 2 rank): behind each part of `one` `other`'s."""
        dim %= one.dim()
        each = [value.unflatten(dim, (len(self.parts), -1)) for value in (one, other)]
        return torch.cat(each, dim + 1).flatten(dim, dim + 1)

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, B of the same function as LoRA alone: with PiSSA of twice the rank, B A - B0 A0."""
        if self.A0 is None:
            return self.A, self.B
        return self.side_by_side(self.A, self.A0, 0), torch.cat([self.B, -self.B0], 1)

    def wide(self, B, factors=None) -> torch.Tensor:
        """B (rows, rank) -> (out, parts * rank): its parts on a diagonal, zero in rows without an adapter;
        with `factors` times the multiplier, in the same launch of a card."""
        if factors is not None:
            B = (B[:, None] * factors).flatten(1)
        elif len(self.parts) > 1:
            B = B[:, None].masked_fill(self.factors == 0, 0).flatten(1)
        if self.rows is None:
            return B
        return B.new_zeros(self.base.out_features, B.shape[1]).index_copy(0, self.rows, B)

    def delta(self) -> torch.Tensor:
        A, B = self.plain()
        return self.multiplier * (self.wide(B) @ A)

    @torch.no_grad()
    def initialise(self, kind):
        """A uniform within 1 / sqrt(in) as nn.Linear and peft have it; `rank`: 1 / sqrt(rank), as journal
        001's ancestor did, whose A is stored as (in, rank) and so takes the rank for its input; `pissa`: A, B
        the principal part of the base's matrix, or of the rows of each part.
        """
        if kind == "pissa":
            rank, each = self.B.shape[1], [self.base.weight[first:end] for first, end in self.parts]
            A, B = zip(*(principal(rows, rank, self.multiplier) for rows in each), strict=True)
            return self.begin_at(torch.cat(A), torch.cat(B))
        limit = 1 / math.sqrt(self.base.in_features if kind == "fan_in" else self.B.shape[1])
        self.A.uniform_(-limit, limit)
        self.B.zero_()

    @torch.no_grad()
    def begin_at(self, A, B):
        """Begins at A and B, with their product subtracted from the base (PiSSA). It is subtracted in each
        forward, from A0 and B0: so the base stays what it is, to the bit, and is not rounded once more."""
        self.A.copy_(A)
        self.B.copy_(B)
        self.A0, self.B0 = (nn.Parameter(value.clone(), requires_grad=False) for value in (self.A, self.B))


def add_product(out, low, B):
    """out + low @ B.T in one launch, which rounds once: the sums of a card."""
    return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), B.t()).view(out.shape)


def principal(weight, rank, multiplier) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in), B (out, rank) with multiplier * B A = U S V^T of the `rank` largest singular values of
    weight (out, in), shared evenly: A = sqrt(S / multiplier) V^T, B = U sqrt(S / multiplier) (PiSSA, Meng et
    al. 2024)."""
    if rank > (most := min(weight.shape)):
        raise UserError(f"rank {rank} of PiSSA is more than a matrix's {most} singular values: use less")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    U, S, V = torch.linalg.svd(wide, full_matrices=False)
    root = (S[:rank] / multiplier).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


class DoRALinear(LoRALinear):
    """LoRALinear whose rows of the sum W + D, D LoRA's delta, get a length of their own, which is trained:
    magnitude * (W + D) / |W + D|, a magnitude (rows,) for each row with an adapter (Liu et al. 2024).

    The norm |W + D| counts as a constant in the backward, as in section 4.3 of the paper.
    """

    def __init__(self, base, rank, multiplier, dropout=0.0, parts=None):
        super().__init__(base, rank, multiplier, dropout, parts)
        self.magnitude = nn.Parameter(base.weight.new_empty(len(self.B)))

    def forward(self, x):
        out, bias = super().forward(x), self.base.bias
        more = (self.gain() - 1).to(out.dtype)
        # at the start out itself, to the bit, unless the base was held in bf16 after its norms were taken
        return out + more * (out if bias is None else out - bias)

    def terms(self, x):
        """Here every matrix is multiplied by the rows' gain: a second one as large as base.weight."""
        terms, bias = super().terms(x)
        gain = self.gain()[:, None]
        return [(x, gain * weight) for x, weight in terms], bias

    def gain(self) -> torch.Tensor:
        """(out,): magnitude / norm of each row, 1 where there is no adapter."""
        gain = self.magnitude / self.norms()
        if self.rows is None:
            return gain
        return gain.new_ones(self.base.out_features).index_copy(0, self.rows, gain)

    def magnitudes(self) -> torch.Tensor:
        """(out,): of all rows; without an adapter it is the norm of the base's."""
        if self.rows is None:
            return self.magnitude
        norms = torch.linalg.vector_norm(self.base.weight, dim=1, dtype=self.magnitude.dtype)
        return norms.index_copy(0, self.rows, self.magnitude)

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """(rows,): norms of the rows of W + D; of a row of zeros tiny, for it is divided by."""
        with torch.autocast(self.A.device.type, enabled=False):
            norms = torch.linalg.vector_norm(self.base.weight + super().delta(), dim=1)
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return norms if self.rows is None else norms[self.rows]

    def delta(self) -> torch.Tensor:
        weight = self.base.weight
        return self.gain()[:, None] * (weight + super().delta()) - weight

    @torch.no_grad()
    def initialise(self, kind):
        super().initialise(kind)
        self.magnitude.copy_(self.norms())
