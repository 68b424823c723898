"""Cross-entropy at the targets, summed; the language model's head without the logits of a whole batch."""

import itertools
import math
import warnings

import torch
import torch.nn.functional as F

from lab.train.cpu import linear
from lab.train.device import to_device

IGNORE_INDEX = -100  # a label that no loss and no accuracy looks at (torch's own default)


def sum_cross_entropy(logits, labels) -> torch.Tensor:
    """Cross-entropy summed over the targets: the caller divides by the global count. 0 without targets.

    labels: numbers of classes, or of each row the probabilities of all classes, times its weight.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(wide.dtype) if labels.is_floating_point() else labels
    return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def targets_only(hidden, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (..., C), labels (...) -> (N, C), (N,): only the positions that have a target.

    Labels on the host, where batches leave them, say where these are without waiting for a card.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if not (counted := labels != IGNORE_INDEX).all():
        at = counted.nonzero()[:, 0]
        hidden, labels = hidden.index_select(0, to_device(at, hidden.device)), labels[at]
    return hidden, to_device(labels, hidden.device)


def linear_cross_entropy(terms, bias, labels) -> torch.Tensor:
    """Summed cross-entropy of logits = sum of x @ weight.T over `terms`, + bias, a chunk of logits at a time.

    terms: [(x (N, C), weight (V, C)), ...], one, or two with an adapter of low rank; bias (V,) or None;
    labels (N,), all of them targets. Gradients are computed with each chunk, and scaled in the backward, of
    which there is one only.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(labels, bias, *itertools.chain(*terms))
    return -token_log_probs(terms, bias, labels)[0].sum()


@torch.no_grad()
def token_log_probs(terms, bias, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability in fp64 of every target in `labels` (N,), and whether it was the likeliest.

    Logits have the weights' dtype, whatever the autocast: near -100, where GPT-2's lie, bf16 has steps of a
    half, and many ids would be the likeliest together; fp16 would overflow.
    """
    log_probs, hits = [], []
    V, device = len(terms[0][1]), terms[0][0].device.type
    if device != "cpu":
        terms = [(x, _whole_rows(w, w.dtype)) for x, w in terms]
    with torch.autocast(device, enabled=False):
        for chunk in _chunks(*terms[0]):
            scores = sum(linear(x[chunk].to(w.dtype), w) for x, w in terms)[:, :V]
            scores = (scores if bias is None else scores + bias).log_softmax(-1)
            log_probs.append(scores.gather(1, labels[chunk, None])[:, 0])
            hits.append(scores.argmax(-1) == labels[chunk])
    if not hits:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    return torch.cat(log_probs).cpu().double(), torch.cat(hits).cpu()  # on the host: not all cards know fp64


def _chunks(hidden, weight) -> list[slice]:
    """Equal slices of rows: 64 MB of fp32 logits on a CPU, on a card 2^26 to 2^28 logits by its memory.
    Depends on the card alone, because the order of additions follows from it."""
    if hidden.device.type == "cpu":
        most = 1 << 24
    else:
        card = getattr(torch, hidden.device.type).get_device_properties(hidden.device)
        most = 1 << min(28, max(26, int(math.log2(card.total_memory / 256))))  # 48 GB: 2^27, 80 GB: 2^28
    rows = max(1, math.ceil(len(hidden) / math.ceil(max(1, len(hidden) * len(weight)) / most)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _product_dtype(weight, kind) -> torch.dtype:
    """bf16 under its autocast; otherwise the weight's: fp16 would overflow."""
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if half else weight.dtype


def _head_dtype(weight, kind) -> torch.dtype:
    """The same, but fp16 on cards, where slopes are scaled (SLOPE_SCALE)."""
    fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return torch.float16 if fp16 and kind == "cuda" else _product_dtype(weight, kind)


class _LinearCrossEntropy(torch.autograd.Function):
    """With e = exp(logits - top) and Z its row sums, the slope by the logits is e / Z - one-hot.

    On a CPU in fp32 and fp64 e is the one large array, made in place of the logits; division and one-hot go
    into the products: to_x = e w / Z - w[y], to_w = e^T (x / Z) - x at rows y. bf16 would lose the small
    difference of a late subtraction, so there the slope is formed in fp32 first, as it is on a card.
    """

    @staticmethod
    def forward(ctx, labels, bias, *terms):  # x, w, x, w, ...
        xs, ws, needs = terms[::2], terms[1::2], ctx.needs_input_grad
        kind, dtype = xs[0].device.type, _head_dtype(ws[0], xs[0].device.type)
        to_x = [torch.empty_like(x) if need else None for x, need in zip(xs, needs[2::2], strict=True)]
        to_b = torch.zeros_like(bias) if needs[1] else None
        with torch.autocast(kind, enabled=False):
            head = _head_on_cpu if kind == "cpu" else _head_on_card
            xs = [x.to(dtype) for x in xs]
            loss, to_w = head(xs, ws, bias, labels, to_x, needs[3::2], to_b, dtype)
        ctx.slopes = to_b, *itertools.chain(*zip(to_x, to_w, strict=True))
        return loss

    @staticmethod
    def backward(ctx, scale):
        slopes, ctx.slopes = ctx.slopes, None  # scaled in place: there is no second backward
        return None, *(None if slope is None else slope.mul_(scale) for slope in slopes)


def _head_on_cpu(xs, ws, bias, labels, to_x, needs, to_b, dtype):
    """The summed loss and the slopes by `ws` that are needed; fills to_x, adds to to_b."""
    to_w = [torch.zeros_like(w) if need else None for w, need in zip(ws, needs, strict=True)]
    wide = ws[0].dtype
    ws = [w.to(dtype) for w in ws]
    parts = [
        _add_chunk([x[c] for x in xs], ws, bias, labels[c], _rows(to_x, c), to_w, to_b, wide)
        for c in _chunks(xs[0], ws[0])
    ]
    return torch.stack(parts).sum() if parts else ws[0].new_zeros((), dtype=wide), to_w


def _head_on_card(xs, ws, bias, labels, to_x, needs, to_b, dtype):
    """The same, with the vocabulary rounded up: a product whose width is no multiple of the tensor cores'
    tile misses the fast kernels. The rows of zeros get no probability and no slope."""
    V, wide, scale = len(ws[0]), ws[0].dtype, SLOPE_SCALE if dtype == torch.float16 else 1.0
    ws = [_whole_rows(w, dtype) for w in ws]
    to_w = [torch.zeros_like(w, dtype=wide) if need else None for w, need in zip(ws, needs, strict=True)]
    loss, x_all, w_all = ws[0].new_zeros((), dtype=wide), _side_by_side(xs), _side_by_side(ws)
    for c in _chunks(xs[0], ws[0]):
        slope, chunk_loss = _slope(x_all[c] @ w_all.t(), bias, labels[c], V, scale)
        loss += chunk_loss
        if to_b is not None:
            to_b += slope.sum(0, dtype=wide)[:V] / scale
        for x, w, by_x, by_w in zip(xs, ws, _rows(to_x, c), to_w, strict=True):
            if by_x is not None:
                by_x.copy_(slope @ w).mul_(1 / scale) if scale != 1 else by_x.copy_(slope @ w)
            if by_w is not None:
                _add_product(by_w, slope.t(), x[c])
    if scale != 1:
        to_w = [None if w is None else w.div_(scale) for w in to_w]
    return loss, [None if w is None else w[:V] for w in to_w]


TILE = 64
# of fp16, whose numbers end near 6e-8: a probability of 1 / 50,000 would lose half its digits
SLOPE_SCALE = 256.0


def _side_by_side(tensors) -> torch.Tensor:
    """One matrix, so that one product makes the sum, rounded once; its width a multiple of 8 (16 bytes)."""
    wide = torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]
    return F.pad(wide, (0, -wide.shape[1] % 8)) if wide.shape[1] % 8 else wide


def _whole_rows(weight, dtype) -> torch.Tensor:
    """(V, C) in `dtype`, V rounded up to a multiple of TILE by rows of zeros."""
    if len(weight) % TILE == 0:
        return weight.detach().to(dtype)
    whole = weight.new_zeros(len(weight) + -len(weight) % TILE, weight.shape[1], dtype=dtype)
    whole[: len(weight)] = weight.detach()
    return whole


def _slope(logits, bias, y, V, scale=1.0):
    """logits (n, padded V) -> scale x their slope e / Z - one-hot, in the same dtype, and the summed loss.

    Large ones on a CUDA card by one kernel instead of seven passes over the largest array of a step; a way
    that does not work there is said and left out.
    """
    large = logits.device.type == "cuda" and logits.numel() >= LARGE and logits.dtype != torch.float64
    while FAST and large:
        try:
            return FAST[0][1](logits, bias, y, V, scale)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no Triton, no C compiler
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            notes.append(f"NOTE the head goes without {FAST.pop(0)[0]}, which is slower: {reason:.50}")
    return _eager_slope(logits, bias, y, V, scale)


LARGE = 1 << 24  # logits, from which on a kernel of one's own pays
notes = []  # what a run should say once it has a log


def _by_triton(logits, bias, y, V, scale):
    global _is_checked
    from lab.train.head_kernel import slope_in_place

    if not _is_checked:  # a new card or compiler: a few rows by both ways first
        few = slice(0, 8)
        wanted = _eager_slope(logits[few].clone(), bias, y[few], V, scale)
        got = slope_in_place(logits[few].clone(), bias, y[few], V, scale)
        for one, other in zip(got, wanted, strict=True):
            if not torch.allclose(one.float(), other.float(), rtol=0.02, atol=1e-4 * scale, equal_nan=True):
                raise RuntimeError("it computes other numbers than torch")
        _is_checked = True
    return slope_in_place(logits, bias, y, V, scale)


_is_checked = False


def _by_compile(logits, bias, y, V, scale):
    global _compiled_slope
    if _compiled_slope is None:
        warnings.filterwarnings("ignore", message="\\s*Online softmax is disabled")
        # fullgraph: too many recompilations raise, instead of running this formula step by step
        _compiled_slope = torch.compile(_fused_slope, dynamic=True, fullgraph=True)
    return _compiled_slope(logits, bias, y, V, scale)


FAST = [("its Triton kernel", _by_triton), ("torch.compile", _by_compile)]  # in this order


def _eager_slope(logits, bias, y, V, scale=1.0):
    """20 bytes a bf16 logit are moved: 6 by log_softmax, 8 by exp_, 6 by the rounding."""
    half, wide = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    if bias is not None:
        logits = logits.to(wide) + F.pad(bias, (0, logits.shape[1] - V))
    logits[:, V:] = -math.inf
    log_p = logits.log_softmax(-1, dtype=wide)
    loss = -log_p.gather(1, y[:, None]).sum()
    slope = log_p.exp_().scatter_add_(1, y[:, None], log_p.new_full((len(y), 1), -1))
    return (slope.mul_(scale) if scale != 1 else slope).to(half), loss


def _fused_slope(logits, bias, y, V, scale=1.0):
    columns = torch.arange(logits.shape[1], device=logits.device)[None]
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        x = x + F.pad(bias, (0, logits.shape[1] - V))
    x = torch.where(columns < V, x, -math.inf)
    top = x.amax(1, keepdim=True)
    total, hit = (x - top).exp().sum(1, keepdim=True), columns == y[:, None]
    target = torch.where(hit, x, 0.0).sum(1, keepdim=True)
    slope = scale * ((x - top).exp() / total - hit.to(x.dtype))
    return slope.to(logits.dtype), (top + total.log() - target).sum()


_compiled_slope = None


def _add_product(total, a, b):
    """total += a @ b: chunks are added up in total's dtype, by the product itself where torch can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif hasattr(torch.ops.aten.addmm, "dtype_out") and a.device.type == "cuda" and not torch.version.hip:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif a.dtype == torch.float16:  # a sum over rows may be beyond its 65,504
        total += a.to(total.dtype) @ b.to(total.dtype)
    else:
        total += a @ b


def _rows(tensors, chunk) -> list:
    return [None if t is None else t[chunk] for t in tensors]


def _add_chunk(xs, ws, bias, y, to_x, to_w, to_b, dtype) -> torch.Tensor:
    """Returns the summed loss of some rows; writes their to_x, adds their share of to_w and to_b."""
    logits = linear(xs[0], ws[0]).to(dtype)
    for x, w in zip(xs[1:], ws[1:], strict=True):
        logits += linear(x, w)
    if bias is not None:
        logits += bias
    targets, top = logits.gather(1, y[:, None]), logits.amax(1, keepdim=True)
    e = logits.sub_(top).exp_()
    total = e.sum(1, keepdim=True)
    if to_b is not None:
        to_b += (e / total).sum(0) - torch.bincount(y, minlength=len(to_b))
    if half := xs[0].dtype != dtype:
        e.div_(total).scatter_add_(1, y[:, None], torch.full_like(total, -1))
    slope = e.to(xs[0].dtype)
    for x, w, by_x, by_w in zip(xs, ws, to_x, to_w, strict=True):
        if by_x is not None:
            by_x.copy_(slope @ w if half else linear(e, w.t()).div_(total).sub_(w[y]))
        if by_w is not None and half:
            by_w += slope.t() @ x  # chunks are added up in fp32
        elif by_w is not None:
            by_w.addmm_(e.t(), x / total).index_add_(0, y, x, alpha=-1)
    return (top + total.log() - targets).sum()


def scaled_backward(loss_sum, world, targets, precision):
    """Backward of a micro-batch's summed loss; summed over ranks and micro-batches the gradient is that of
    the mean loss per global target.

    DDP averages over ranks, hence the factor of world size. Without targets gradients are zero.
    """
    if not torch.is_grad_enabled():  # a rehearsal of what evaluations need
        return
    with precision.products():
        precision.scaler.scale(loss_sum * (world.size / max(targets, 1))).backward()
