"""Losses that people try beside plain cross-entropy, without the logits of a whole batch: label smoothing
(Szegedy et al. 2016), z-loss (Chowdhery et al. 2022), weights of targets; or any function of the logits.

With p = softmax(x), lse = logsumexp(x), target y, smoothing s, z-loss z and weight w, a target's loss is
w ((1 - s)(lse - x_y) + s (lse - mean x) + z lse^2), its slope w ((1 + 2 z lse) p - (1 - s) onehot - s / V).
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
        if weights is not None or label_smoothing or z_loss:
            raise ValueError("of_logits computes the whole loss: leave weights, label_smoothing, z_loss out")
        kind = terms[0][0].device.type
        dtype = _product_dtype(terms[0][1], kind)
        with torch.autocast(kind, enabled=False):
            logits = sum(F.linear(x.to(dtype), w.to(dtype)) for x, w in terms)
            logits = logits.to(torch.promote_types(dtype, torch.float32))
            return of_logits(logits if bias is None else logits + bias, labels)
    if weights is None:
        weights = torch.ones(len(labels), device=labels.device)
    weights = weights.to(torch.promote_types(terms[0][1].dtype, torch.float32))
    return _Objective.apply(labels, weights, label_smoothing, z_loss, bias, *itertools.chain(*terms))


class _Objective(torch.autograd.Function):
    """Gradients are computed with each chunk of logits, and scaled in the backward, of which there is one."""

    @staticmethod
    def forward(ctx, labels, weights, smoothing, z, bias, *terms):  # x, w, x, w, ...
        xs, ws, needs = terms[::2], terms[1::2], ctx.needs_input_grad
        kind, wide, dtype = xs[0].device.type, ws[0].dtype, _product_dtype(ws[0], xs[0].device.type)
        to_x = [torch.zeros_like(x) if need else None for x, need in zip(xs, needs[5::2], strict=True)]
        to_b = torch.zeros_like(bias) if needs[4] else None
        with torch.autocast(kind, enabled=False):
            on_cpu = _is_exact_cpu(kind, dtype, wide)
            xs, V = [x.to(dtype) for x in xs], len(ws[0])
            ws = [w.detach() if on_cpu else _whole_rows(w, dtype) for w in ws]
            wanted = zip(ws, needs[6::2], strict=True)
            to_w = [torch.zeros_like(w, dtype=wide) if need else None for w, need in wanted]
            loss, add = ws[0].new_zeros((), dtype=weights.dtype), _add_on_cpu if on_cpu else _add_on_card
            sums = [w.sum(0) for w in ws] if on_cpu else None
            for c in _chunks(xs[0], ws[0]):
                how = labels[c], weights[c, None], smoothing, z, V, sums
                loss += add([x[c] for x in xs], ws, bias, _rows(to_x, c), to_w, to_b, *how)
        ctx.slopes = (
            to_b,
            *itertools.chain(*zip(to_x, [None if w is None else w[:V] for w in to_w], strict=True)),
        )
        return loss

    @staticmethod
    def backward(ctx, scale):
        slopes, ctx.slopes = ctx.slopes, None  # scaled in place: there is no second backward
        return None, None, None, None, *(None if slope is None else slope.mul_(scale) for slope in slopes)


def _is_exact_cpu(kind, dtype, wide) -> bool:
    """Whether factors may go into the products; bf16 would lose the difference of a late subtraction."""
    return kind == "cpu" and dtype == wide


def _add_on_cpu(xs, ws, bias, to_x, to_w, to_b, y, weights, s, z, V, sums):
    """The loss of some rows; adds their slopes. e = exp(logits - top) is the one large array: a row's factor,
    the targets and the smoothing go into the products, as in loss.py."""
    logits = linear(xs[0], ws[0])
    for x, w in zip(xs[1:], ws[1:], strict=True):
        logits += linear(x, w)
    mean = sum(x @ w for x, w in zip(xs, sums, strict=True))[:, None] / V  # of the logits
    if bias is not None:
        logits, mean = logits + bias, mean + bias.mean()
    hit, top = logits.gather(1, y[:, None]), logits.amax(1, keepdim=True)
    e = logits.sub_(top).exp_()
    total = e.sum(1, keepdim=True)
    lse = top + total.log()
    factor, targets, even = weights * (1 + 2 * z * lse) / total, (1 - s) * weights, s / V * weights
    for x, w, by_x, by_w, w_sum in zip(xs, ws, to_x, to_w, sums, strict=True):
        if by_x is not None:
            by_x.copy_(linear(e, w.t()).mul_(factor).sub_(targets * w[y]).sub_(even * w_sum))
        if by_w is not None:
            by_w.addmm_(e.t(), x * factor).index_add_(0, y, x * targets, alpha=-1).sub_((x * even).sum(0))
    if to_b is not None:
        to_b += (e * factor).sum(0).index_add_(0, y, targets[:, 0], alpha=-1).sub_(even.sum())
    return (weights * (lse + z * lse**2) - targets * hit - s * weights * mean).sum()


def _add_on_card(xs, ws, bias, to_x, to_w, to_b, y, weights, s, z, V, _):
    """The same with the slope by the logits made first, in fp32, and the vocabulary padded as on cards."""
    logits = sum(linear(x, w) for x, w in zip(xs, ws, strict=True)).to(weights.dtype)
    if bias is not None:
        logits = logits + F.pad(bias, (0, logits.shape[1] - V))
    mean = logits[:, :V].mean(1, keepdim=True)
    logits[:, V:] = -torch.inf
    lse, hit = logits.logsumexp(1, keepdim=True), logits.gather(1, y[:, None])
    slope = (logits - lse).exp_().mul_(weights * (1 + 2 * z * lse))
    slope[:, :V] -= s / V * weights
    slope = slope.scatter_add_(1, y[:, None], (s - 1) * weights).to(xs[0].dtype)
    if to_b is not None:
        to_b += slope.sum(0, dtype=to_b.dtype)[:V]
    for x, w, by_x, by_w in zip(xs, ws, to_x, to_w, strict=True):
        if by_x is not None:
            by_x.copy_(slope @ w)
        if by_w is not None:
            _add_product(by_w, slope.t(), x)
    return (weights * (lse - (1 - s) * hit - s * mean + z * lse**2)).sum()
