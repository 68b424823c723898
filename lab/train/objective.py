"""Losses that people try beside plain cross-entropy, without the logits of a whole batch: label smoothing (Szegedy et
al. 2016), z-loss (Chowdhery et al. 2022), weights of rows or tokens; or any function of the logits.

With p = softmax(x), lse = logsumexp(x), target y, smoothing s, z-loss z and weight w, a token's loss is
w ((1 - s)(lse - x_y) + s (lse - mean x) + z lse^2), and its slope by x is w ((1 + 2 z lse) p - (1 - s) onehot - s / V).
"""

import itertools

import torch
import torch.nn.functional as F

from lab.train.cpu import linear
from lab.train.loss import _add_product, _chunks, _product_dtype, _rows, _whole_rows


def objective(terms, bias, labels, weights=None, label_smoothing=0.0, z_loss=0.0, of_logits=None):
    """The summed loss of logits = sum of x @ weight.T over `terms`, + bias, as linear_cross_entropy has them.

    labels (N,), all of them targets; weights (N,) or none. of_logits(logits (N, V), labels): a summed loss of
    one's own instead: the slow road, which holds all logits.
    """
    if of_logits is not None:
        logits = sum(F.linear(x, w) for x, w in terms)
        return of_logits(logits if bias is None else logits + bias, labels)
    if weights is None:
        weights = torch.ones(len(labels), device=labels.device)
    weights = weights.to(torch.promote_types(terms[0][1].dtype, torch.float32))
    return _Objective.apply(labels, weights, label_smoothing, z_loss, bias, *itertools.chain(*terms))


class _Objective(torch.autograd.Function):
    """Gradients are computed with each chunk of logits, and scaled in the backward, of which there is one."""

    @staticmethod
    def forward(ctx, labels, weights, smoothing, z, bias, *terms):  # x, w, x, w, ...
        xs, ws, needs, V = terms[::2], terms[1::2], ctx.needs_input_grad, len(terms[1])
        kind, wide, dtype = xs[0].device.type, ws[0].dtype, _product_dtype(ws[0], xs[0].device.type)
        to_x = [torch.zeros_like(x) if need else None for x, need in zip(xs, needs[5::2], strict=True)]
        to_b = torch.zeros_like(bias) if needs[4] else None
        with torch.autocast(kind, enabled=False):
            xs, ws = [x.to(dtype) for x in xs], [_whole_rows(w, dtype) for w in ws]
            to_w = [
                torch.zeros_like(w, dtype=wide) if n else None for w, n in zip(ws, needs[6::2], strict=True)
            ]
            loss = ws[0].new_zeros((), dtype=weights.dtype)
            for c in _chunks(xs[0], ws[0]):
                logits = sum(linear(x[c], w) for x, w in zip(xs, ws, strict=True))
                slope, part = _slope(logits, bias, labels[c], weights[c, None], smoothing, z, V)
                loss += part
                if to_b is not None:
                    to_b += slope.sum(0, dtype=wide)[:V]
                for x, w, by_x, by_w in zip(xs, ws, _rows(to_x, c), to_w, strict=True):
                    if by_x is not None:
                        by_x.copy_(slope @ w)
                    if by_w is not None:
                        _add_product(by_w, slope.t(), x[c])
        to_w = [None if w is None else w[:V] for w in to_w]
        ctx.slopes = to_b, *itertools.chain(*zip(to_x, to_w, strict=True))
        return loss

    @staticmethod
    def backward(ctx, scale):
        slopes, ctx.slopes = ctx.slopes, None  # scaled in place: there is no second backward
        return None, None, None, None, *(None if slope is None else slope.mul_(scale) for slope in slopes)


def _slope(logits, bias, y, w, smoothing, z, V):
    """logits (n, padded V) -> their slope in the same dtype, and the summed loss; w (n, 1)."""
    x, target = logits.to(w.dtype), y[:, None]
    if bias is not None:
        x = x + F.pad(bias, (0, x.shape[1] - V))
    mean = x[:, :V].mean(1, keepdim=True)
    x[:, V:] = -torch.inf
    lse, hit = x.logsumexp(1, keepdim=True), x.gather(1, target)
    loss = (w * (lse - (1 - smoothing) * hit - smoothing * mean + z * lse**2)).sum()
    slope = (x - lse).exp_().mul_(w * (1 + 2 * z * lse))
    slope[:, :V] -= w * (smoothing / V)
    slope.scatter_add_(1, target, (smoothing - 1) * w)
    return slope.to(logits.dtype), loss
