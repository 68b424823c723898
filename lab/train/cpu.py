"""The CPU: oneDNN's matrix products, memory that is kept, models that do not fit into it."""

import contextlib
import ctypes
import os

import torch
import torch.nn.functional as F

from lab.errors import UserError


def keep_freed_memory():
    """Keeps freed blocks of memory instead of returning them to the kernel and faulting them in at each step.

    PandaLM's longest batches took 29 s with glibc's defaults and 11 s so (2 cores, MiniLM); see JOURNAL.md.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def linear(x, weight, bias=None) -> torch.Tensor:
    """F.linear; in fp32 on a CPU by oneDNN, whose products are up to 1.5 times as fast as MKL's (AMD)."""
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (ONEDNN and fp32 and x.device.type == "cpu" and x.numel()) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias) if torch.is_grad_enabled() else onednn(x, weight, bias)


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x, weight, bias=None):
    """x @ weight.T + bias without gradient, by oneDNN (as torch.compile's freezing calls it)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, slope):
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        rows = slope.reshape(-1, slope.shape[-1])
        to_x = onednn(slope, weight.t()) if needs[0] else None
        to_w = rows.t() @ x.reshape(len(rows), -1) if needs[1] else None
        return to_x, to_w, rows.sum(0) if needs[2] else None


def require_memory(parameters, what):
    """UserError where so many fp32 numbers, the matrices of a model alone, exceed this machine's memory."""
    if not hasattr(os, "sysconf"):  # native Windows
        return
    needed, memory = 4 * parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        size = f"{parameters:.3g} parameters, {needed / 1e9:,.0f} GB"
        raise UserError(f"{what} has {size}, this machine {memory / 1e9:,.0f} GB: use a smaller one")
