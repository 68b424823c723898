"""Optimizers, the schedule of rates, and one update."""

import math
import re
from typing import Literal

import torch
from torch import nn

from lab.errors import UserError

Optimizer = Literal["adamw", "lion", "muon", "adafactor", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "one_cycle", "wsd", "gpt3"]


def count_parameters(model) -> tuple[int, int]:
    """Number of parameters: (all, trainable)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def lr_at(cfg, step, total_steps) -> float:
    """Learning rate of step `step` (from 0): linear warm-up to cfg.lr, then cfg.schedule down to cfg.min_lr.

    cfg.warmup is a fraction of `total_steps`; 0 and 1 are legal. The first step has lr / warm-up steps.
    one_cycle: by cosine from lr / 25 up during the warm-up, then down to lr / 250,000 (Smith 2018; torch's
    OneCycleLR); gpt3: cosine to lr / 10 at 260/300 of the steps, constant from there (Brown et al. 2020).
    wsd: constant, then over the last cfg.wsd_decay of all steps down by 1 - sqrt (Hu et al. 2024; Hägele et
    al. 2024), not before the warm-up ends.
    """
    if cfg.schedule == "one_cycle":
        return _one_cycle(cfg.lr / 25, cfg.lr, cfg.lr / 25e4, step, cfg.warmup * total_steps, total_steps)
    rising = round(cfg.warmup * total_steps)
    if step < rising:
        return cfg.lr * (step + 1) / rising
    if cfg.schedule == "constant":
        return cfg.lr
    start, end, low = rising, total_steps, cfg.min_lr
    if cfg.schedule == "gpt3":
        end, low = 260 / 300 * total_steps, 0.1 * cfg.lr
    if cfg.schedule == "wsd":
        start = max(rising, (1 - cfg.wsd_decay) * total_steps)
    done = min(1, max(0, step - start) / max(1, end - start))
    left = {"linear": 1 - done, "wsd": 1 - done**0.5}.get(cfg.schedule, 0.5 * (1 + math.cos(math.pi * done)))
    return low + (cfg.lr - low) * left


def beta1_at(cfg, step, total_steps) -> float:
    """Adam's beta1 of a step: with cfg.cycle_beta1, one_cycle moves it 0.95 -> 0.85 ->
    0.95, against the rate."""
    if cfg.schedule == "one_cycle" and cfg.cycle_beta1:
        return _one_cycle(0.95, 0.85, 0.95, step, cfg.warmup * total_steps, total_steps)
    return cfg.beta1


def _one_cycle(start, peak, end, step, rising, total_steps) -> float:
    """Two half cosines; like torch's, the peak is at step rising - 1 and the end at total_steps - 1."""
    if step <= rising - 1:
        low, high, done = start, peak, step / max(rising - 1, 1e-9)
    else:
        low, high, done = peak, end, (step - rising + 1) / max(total_steps - rising, 1e-9)
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def parameter_groups(model, weight_decay, scales=None, undecayed=()) -> list[dict]:
    """Parameter groups of an optimizer: matrices decay, except those named in `undecayed`.

    `scales` maps parameter names to a factor of the lr (default 1).
    """
    groups = {}  # (scale, decays) -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.dim() >= 2 and name not in undecayed
            groups.setdefault(((scales or {}).get(name, 1.0), decays), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def hidden_apart(model, groups) -> list[dict]:
    """The groups with the blocks' matrices (h.0.attn.c_attn.weight, of adapters too) in groups of their own,
    as Muon needs them: embeddings, heads, norms and biases stay in the others."""
    hidden = {p for name, p in model.named_parameters() if p.dim() == 2 and re.search(IN_A_BLOCK, name)}
    split = [
        group | {"params": params, "hidden": kind}
        for group in groups
        for kind in (True, False)
        if (params := [p for p in group["params"] if (p in hidden) == kind])
    ]
    if not any(group["hidden"] for group in split):
        raise UserError("--optimizer muon is for matrices of blocks, and none is trained here: use adamw")
    return split


IN_A_BLOCK = r"(^|\.)\d+\.\w+\."  # a block's number, with more than a weight behind it: not head.0.weight


def make_optimizer(
    model, optimizer, weight_decay, betas=None, eps=1e-8, scales=None, undecayed=()
) -> torch.optim.Optimizer:
    """Makes an Optimizer by name over parameter_groups; optimizer_step sets the lr. betas none: 0.9 and 0.999
    (Lion: 0.99). sgd has a momentum of 0.9. adafactor is torch's (Shazeer and Stern 2018), which decays the
    squares' mean in its own way: a step is lr times the size of a weight. betas, eps of muon: its AdamW's."""
    groups = parameter_groups(model, weight_decay, scales, undecayed)
    if optimizer == "muon":
        return Muon(hidden_apart(model, groups), betas or (0.9, 0.999), eps)
    if optimizer == "lion":
        return Lion(groups, betas or (0.9, 0.99))
    if optimizer == "adafactor":
        return Adafactor(groups)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas or (0.9, 0.999), eps=eps, fused=True)
    return torch.optim.SGD(groups, momentum=0.9)


def state_numbers(optimizer) -> int:
    """How many numbers an optimizer keeps once it has stepped: two a weight (AdamW), one, or Adafactor's."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, torch.optim.Adafactor):
        return sum(n.numel() // n[-1] + n.numel() // n[-2] if len(n) > 1 else n.numel() for n in shapes)
    if isinstance(optimizer, Muon):
        return sum((2 - g["hidden"]) * p.numel() for g in optimizer.param_groups for p in g["params"])
    return (2 if isinstance(optimizer, torch.optim.AdamW) else 1) * sum(map(math.prod, shapes))


def state_megabytes(optimizer) -> float:
    """MB of gradients and of the optimizer's state on this rank."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def gradient_norm(optimizer, precision) -> torch.Tensor:
    """Global norm of the unscaled gradients, before clipping: the same on all ranks."""
    precision.scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients that ranks share


def optimizer_step(
    optimizer, precision, clip, lr, beta1=None, norm=None, leave_out=False, known=None
) -> float:
    """Clips to the global norm `clip` (none: not), steps at `lr`, or leaves the update out; zeroes. Returns
    the unclipped norm; norm: of gradient_norm, if it is there; known: the same as a number, if it was read.

    An fp16 overflow skips the update and returns inf; a norm that is not finite otherwise, or 51 overflows in
    a row, raise FloatingPointError before any weight changes.
    """
    norm = gradient_norm(optimizer, precision) if norm is None else norm
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
        if beta1 is not None and "betas" in group:
            group["betas"] = (beta1, group["betas"][1])
    if clip is not None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(params, clip, norm)
    norm, halves = float(norm if known is None else known), precision.scaler.is_enabled()
    overflow = not math.isfinite(norm)
    precision.skipped_in_a_row = precision.skipped_in_a_row + 1 if overflow else 0
    precision.skipped += overflow
    most = 50 if halves else 0  # 65,536 is halved 16 times to 1
    if precision.skipped_in_a_row > most:
        raise FloatingPointError(
            f"gradient norm is {norm}: try a lower lr, more warm-up, clipping, or dtype fp32"
        )
    if not leave_out:
        precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Lion(torch.optim.Optimizer):
    """p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g (Chen et al. 2023).

    One tensor of state for each parameter. Every step is as long as the rate says: a third to a tenth of
    AdamW's, with a decay as many times higher, since decay is scaled by the rate; for batches of 64 and more.
    """

    def __init__(self, groups, betas=(0.9, 0.99)):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            # a card takes all tensors at once, in few launches; a CPU each by itself, while the cache has it
            on_cpu = all(p.device.type == "cpu" for p in params)
            for some in [[p] for p in params] if on_cpu else [params]:
                self._update(some, group["lr"], *group["betas"], group["weight_decay"])

    def _update(self, params, lr, beta1, beta2, decay):
        grads, means = [p.grad for p in params], [self.state[p]["exp_avg"] for p in params]
        directions = torch._foreach_lerp(means, grads, 1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, directions, alpha=-lr)
        torch._foreach_lerp_(means, grads, 1 - beta2)


class Muon(torch.optim.Optimizer):
    """m <- 0.95 m + 0.05 g; p <- p (1 - lr wd) - lr 0.2 sqrt(longer side) orthogonal(0.95 m + 0.05 g) for the
    matrices of blocks (Jordan et al. 2024), AdamW for the rest.

    The factor (Liu et al. 2025) makes a step as large as AdamW's, so that its rates and decays carry over. A
    fused matrix of queries, keys and values is one matrix. torch's own Muon has no AdamW beside it and rounds
    to bf16 everywhere: in fp64 the number of processes would show, and a CPU takes many times as long.
    """

    def __init__(self, groups, betas, eps):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.adamw = torch.optim.AdamW(self.param_groups, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self):
        rest = [group for group in self.param_groups if not group["hidden"]]
        self.adamw.param_groups, self.adamw.state = rest, self.state  # one state_dict: this one's
        self.adamw.step()
        for group in self.param_groups:
            for p in group["params"] if group["hidden"] else ():
                if p.grad is not None:
                    self._update(p, group["lr"], group["weight_decay"])

    def _update(self, p, lr, decay):
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 0.05)
        # as its authors have it on a card; a CPU is slow in bf16
        dtype = torch.bfloat16 if p.dtype == torch.float32 and p.device.type != "cpu" else p.dtype
        direction = orthogonal(p.grad.lerp(mean, 0.95).to(dtype))
        p.mul_(1 - lr * decay)
        p.add_(direction, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix):
    """About U V^T of a matrix U S V^T: five steps of Newton and Schulz, which take every singular value from
    0.002 of the norm on to between 0.68 and 1.21 (Jordan et al. 2024)."""
    x = matrix.T if len(matrix) > len(matrix.T) else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if len(matrix) > len(matrix.T) else x


class Adafactor(torch.optim.Adafactor):
    """torch's own, which reads two norms of every tensor: as many waits for a card. Here they stay there, in
    the same formula."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.device.type == "cpu" or hasattr(p, "full_tensor") for p in params):  # or DTensors: parts
            return super().step(closure)
        for group in self.param_groups:
            of_group = [[] for _ in range(6)]
            self._init_group(group, *of_group)
            for tensors in zip(*of_group, strict=True):
                self._update(group, *tensors)
        return None

    @staticmethod
    def _update(group, p, grad, rows, columns, squares, count):
        """A step of p (n, m): rows (n, 1), columns (1, m) of mean squares; of a vector squares, like p."""
        n, lr, tiny, size = float(count.add_(1)), group["lr"], torch.finfo(p.dtype).eps, p.numel() ** 0.5
        share = n ** group["beta2_decay"]  # of the new squares
        alpha = (p.norm() / size).clamp_(min=group["eps"][1]) * min(lr, n**-0.5)
        p.mul_(1 - lr * group["weight_decay"])
        if grad.dim() > 1:
            rows.lerp_(grad.norm(dim=-1, keepdim=True).square_() / grad.shape[-1], share)
            columns.lerp_(grad.norm(dim=-2, keepdim=True).square_() / grad.shape[-2], share)
            mean = (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=tiny))
        else:
            mean = squares.lerp_(grad * grad, share).clone()
        update = mean.clamp_(min=tiny**2).rsqrt_().mul_(grad)
        p.sub_(update.mul_(alpha / (update.norm() / (size * group["d"])).clamp_(min=1)))
