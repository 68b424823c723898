"""The slope of the language-model head as one kernel for cards, in Triton, which comes with torch for CUDA:
logits are read twice (the second time from the card's cache), and their slope is written in their place."""

import torch
import triton
import triton.language as tl

BLOCK = 8192  # logits of a row that a program holds at a time: 32 for each thread of 8 warps


@triton.jit
def _slope_of_a_row(
    logits, bias, labels, losses, V, width, scale, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Row `program_id` of logits (n, width) becomes scale x (e / Z - one-hot); columns from V on are padding.
    The running maximum and sum are those of an online softmax (Milakov and Gimelshein 2018)."""
    row = tl.program_id(0).to(tl.int64)
    line, label = logits + row * width, tl.load(labels + row)
    top, total, target = float("-inf"), 0.0, 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(line + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=columns < V, other=0.0)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        target += tl.sum(tl.where(columns == label, x, 0.0), 0)
        top = higher
    tl.store(losses + row, top + tl.log(total) - target)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(line + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=columns < V, other=0.0)
        slope = tl.exp(x - top) / total - tl.where(columns == label, 1.0, 0.0)
        tl.store(line + columns, (scale * slope).to(logits.dtype.element_ty), mask=columns < width)


def slope_in_place(logits, bias, labels, V, scale=1.0):
    """logits (n, width), contiguous, bf16, fp16 or fp32 -> the same memory with scale x their slope, and the
    summed loss, in fp32. bias (V,) in fp32, or None."""
    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    given = logits, logits if bias is None else bias, labels, losses, V, logits.shape[1], scale
    _slope_of_a_row[(len(labels),)](*given, HAS_BIAS=bias is not None, BLOCK=BLOCK, num_warps=8)
    return logits, losses.sum()
