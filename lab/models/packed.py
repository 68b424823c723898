"""Attention over rows that lie packed in one (B, T) batch, each of which sees itself alone.

Anywhere by a mask of all pairs of tokens. NVIDIA cards have a fused kernel for it in half precision: no mask
of T^2 entries, and no work over pairs of different rows.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lab.train.device import to_device
from lab.train.loss import notes


class Spans(NamedTuple):
    """Rows that follow each other without a gap, row i from starts[i] to starts[i + 1]."""

    starts: torch.Tensor  # (rows + 1,) int32, on the device
    longest: int  # tokens


def dense_mask(segments, device) -> tuple[torch.Tensor, torch.Tensor]:
    """segments (B, T): the number of each token's row -> (which keys a query sees (B, 1, T, T), positions
    (B, T) within the rows), both on the device."""
    segments = to_device(segments, device)
    mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    return mask, mask.sum(-1)[:, 0] - 1


def spans(segments, device) -> tuple[Spans, torch.Tensor]:
    """The same for the kernel. The tokens of a row stand side by side, padding is a row like others. Segments
    on the host, where batches leave them, are counted without waiting for the card."""
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts, at = first.view(-1).nonzero()[:, 0], torch.arange(segments.numel(), device=segments.device)
    positions = at - torch.where(first.view(-1), at, 0).cummax(0).values
    starts = torch.cat([starts, starts.new_tensor([segments.numel()])])
    longest = int(starts.diff().max())
    return (
        Spans(to_device(starts.int(), device), longest),
        to_device(positions.view(segments.shape), device),
    )


def attention(q, k, v, rows: Spans):
    """Causal attention of q (B, H, T, D) to k and v (B, KV, T, D), within each of the rows, in v's dtype."""
    from torch.nn.attention.varlen import varlen_attn  # which imports the compiler (seconds)

    B, H, T, D = q.shape
    grouped = {"enable_gqa": True} if k.shape[1] < H else {}  # torch 2.11 does not know the word
    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, D).to(v.dtype) for x in (q, k, v))
    limits = rows.starts, rows.starts, rows.longest, rows.longest
    return varlen_attn(q, k, v, *limits, window_size=(-1, 0), **grouped).view(B, T, H, D).transpose(1, 2)


def has_kernel(device, config, training) -> bool:
    """Whether packed rows have the kernel: in half precision on an NVIDIA card, without dropout."""
    half = device.type == "cuda" and not torch.version.hip and torch.is_autocast_enabled("cuda")
    if not half or (training and config.dropout):
        return False
    heads, shared = (size // config.head_dim for size in config.qkv_sizes[:2])
    return _works(device, torch.get_autocast_dtype("cuda"), config.head_dim, heads // shared)


@functools.cache  # once a process
def _works(device, dtype, head_dim, groups) -> bool:
    """Whether the kernel computes here what the mask does, tried on two rows; if not, why is noted."""
    try:
        for one, other in zip(*_both_ways(device, dtype, head_dim, groups), strict=True):
            if not torch.allclose(one.float(), other.float(), rtol=0.03, atol=0.03):
                raise RuntimeError("it computes other numbers than the mask")
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch before 2.11, an old card, a head size that it lacks
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        notes.append(f"NOTE packed rows go by a mask, which is slower: {reason:.50}")
        return False


def _both_ways(device, dtype, head_dim, groups) -> list[list[torch.Tensor]]:
    """[output and slopes by q, k, v] of two short rows by the kernel, and by the mask."""
    segments, found = torch.tensor([[0] * 5 + [1] * 19]), []
    shapes = [(1, 2 * groups, 24, head_dim), (1, 2, 24, head_dim), (1, 2, 24, head_dim)]  # of q, k, v
    dense = functools.partial(F.scaled_dot_product_attention, enable_gqa=groups > 1)
    for layout, compute in ((spans, attention), (dense_mask, dense)):
        leaves = [
            torch.arange(math.prod(shape), device=device).add(i).sin().to(dtype).view(shape).requires_grad_()
            for i, shape in enumerate(shapes)  # nothing is drawn
        ]
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            y = compute(*leaves, layout(segments, device)[0])
            found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    return found
