"""fp32, tf32, bf16, fp16 or fp64: what is computed in which, and the loss scaler."""

import dataclasses
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from lab.errors import UserError
from lab.run.flags import counting

Dtype = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]
BaseDtype = Literal["auto", "fp32", "bf16"]


def native_dtype(device) -> str:
    """What `dtype` auto becomes: bf16 where the device computes in it, fp16 on older cards, fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "xpu" else "fp32"


def refuse_without_fp64(dtype, device):
    """UserError on a card without fp64 (Intel's Arc) for fp64, and for fp16, whose loss scaler needs it."""
    if device.type != "xpu" or dtype not in ("fp16", "fp64"):
        return
    if not torch.xpu.get_device_properties(device).has_fp64:
        needs = " (its loss scaler needs it)" if dtype == "fp16" else ""
        raise UserError(f"--dtype {dtype}{needs}: this card has no fp64, use --dtype bf16")


def with_dtype(cfg, world):
    """`cfg` with the dtype that this device will compute in, as config.json then has it.

    auto becomes native_dtype. On a card fp32 becomes tf32, unless --dtype fp32 was typed. base_dtype auto, of
    weights frozen under adapters, becomes bf16 where a card computes in bf16.
    """
    cfg = _with_computed_dtype(cfg, world)
    if getattr(cfg, "base_dtype", None) != "auto":
        return cfg
    narrow = cfg.dtype == "bf16" and world.device.type != "cpu" and getattr(cfg, "method", "lora") != "full"
    narrow = narrow and cfg.shard != "full"  # which wants one dtype
    resolved = dataclasses.replace(cfg, base_dtype="bf16" if narrow else "fp32")
    return counting(resolved, flags=cfg.typed.flags - {"base_dtype"})


def _with_computed_dtype(cfg, world):
    given, dtype = cfg.typed, native_dtype(world.device) if cfg.dtype == "auto" else cfg.dtype
    refuse_without_fp64(dtype, world.device)
    has_tf32 = world.device.type == "cuda"
    if dtype == "fp32" and has_tf32 and "dtype" not in given.flags:
        dtype = "tf32"
    elif dtype == "tf32" and not has_tf32:
        dtype = "fp32"
    if dtype == cfg.dtype:
        return cfg
    why = "factors rounded to 10 bits" if dtype == "tf32" else "half precision"
    line = f"dtype {cfg.dtype} is {dtype} on this card ({why}; --dtype fp32 for full precision)"
    if dtype == "fp32":
        line = f"dtype tf32 is fp32 on this {world.device.type}" if cfg.dtype == "tf32" else None
    flags = given.flags - {"dtype"} if cfg.dtype == "auto" else given.flags  # auto asks for nothing
    return counting(dataclasses.replace(cfg, dtype=dtype), chosen=line, flags=flags)


class Precision:
    """fp32 and fp64 run as they are; tf32 is fp32 whose products have rounded factors, on NVIDIA cards; bf16
    and fp16 run under autocast, fp16 with a GradScaler."""

    def __init__(self, dtype, world):
        self.dtype, self.world = native_dtype(world.device) if dtype == "auto" else dtype, world
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == "fp16")
        self.skipped, self.skipped_in_a_row = 0, 0  # steps that overflowed in fp16

    def prepare(self, model):
        """Moves a model to the device, in fp32 or fp64."""
        return self.cast(model).to(self.world.device)

    def cast(self, model):
        """A model in fp32 or fp64, where it is."""
        return model.to(torch.float64 if self.dtype == "fp64" else torch.float32)

    @contextmanager
    def autocast(self):
        """Context of a forward pass; scaled_backward has its own."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype)
        with self.products(), torch.autocast(self.world.device.type, half) if half else nullcontext():
            yield

    def generation(self):
        """Context of writing text: of a forward pass on a card, so that the cache is in half, too. A CPU
        writes in fp32 or fp64: half is no faster there."""
        return nullcontext() if self.world.device.type == "cpu" else self.autocast()

    @contextmanager
    def products(self):
        """Context in which a card multiplies fp32 in TF32, unless dtype is fp32 or fp64."""
        if self.world.device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if self.dtype in ("fp32", "fp64") else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def warning(self) -> str | None:
        """A line if the device has no fast arithmetic of this dtype."""
        if self.dtype not in ("bf16", "fp16") or self.dtype == native_dtype(self.world.device):
            return None
        if self.world.device.type == "cuda" and self.dtype == "bf16":
            return "WARNING this card only emulates bf16: --dtype fp16 is many times faster"
        cpuinfo = Path("/proc/cpuinfo")
        amx = self.dtype == "bf16" and cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()
        if amx or self.world.device.type != "cpu":
            return None
        return f"WARNING this CPU has no fast {self.dtype}: --dtype fp32 may be a hundred times faster"
