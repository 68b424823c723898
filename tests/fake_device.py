"""A pretend accelerator: its tensors say privateuseone:0, hold real numbers in host memory, and refuse to
meet host tensors.

It is torch's own backend for Python (PrivateUse1) below a tensor subclass. A process that has it keeps it, so
`on_device` and `run` start one. What happened there is in Found:

    mixups   a host tensor with dimensions in an operator with a device tensor (0-dim ones may, as in torch),
             numpy() of a device tensor, fp64 on a device that has none, as Intel's Arc
    waits    what makes the host wait until the card has done all that it was given: .item(), bool(),
             .tolist(), nonzero, boolean and host indices, copies unless non-blocking and from pinned memory

It cannot see kernels, memory, streams, NCCL, torch.compile, branches on device.type == "cuda", nor any speed.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import ranks
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE, HOST, aten = torch.device("privateuseone", 0), torch.device("cpu"), torch.ops.aten
KIND = DEVICE.type


@dataclass
class Found:
    """What is wrong or slow, by what it is and the project's line, with how often it happened."""

    mixups: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    steps: list = field(default_factory=list)  # the waits from one optimizer step to the next
    error: str = ""


found, knows_fp64 = Found(), [False]


class MixUp(RuntimeError):
    """What a real card would refuse."""


def mixup(what):
    found.mixups[f"{what} at {line()}"] += 1
    raise MixUp(f"{what} at {line()}")


def wait(what):
    found.waits[f"{what} at {line()}"] += 1


def line() -> str:
    """The innermost line of the project; in a backward there may be none."""
    frame, project = sys._getframe(1), f"{ranks.PROJECT}{os.sep}"
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(project) and "site-packages" not in path and path != __file__:
            return f"{path.removeprefix(project)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


# --------------------------------------------------------------------------------------------------- tensors


class OnDevice(torch.Tensor):
    """The numbers of `host`, a host tensor, that say they are on the device."""

    @staticmethod
    def __new__(cls, host):
        if host.dtype in (torch.float64, torch.complex128) and not knows_fp64[0]:
            mixup("fp64 on a device without it")
        where = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        how = {"dtype": host.dtype, "layout": host.layout, "device": DEVICE}
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.size(), **where, **how)
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return computed(operator, args, kwargs or {})

    def __deepcopy__(self, memo):
        copy = OnDevice(self.host.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __repr__(self):
        return f"OnDevice({self.host})"

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.host = new.host

    def tolist(self):
        wait("tolist")
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        mixup("numpy() of a device tensor")

    __array__ = numpy


class Everything(TorchDispatchMode):
    """Sees what no device tensor is an argument of: new tensors, copies from the host."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return computed(operator, args, kwargs or {})


# ------------------------------------------------------------------------------------------------- operators

WAITS = {
    aten._local_scalar_dense.default: "item",  # bool(), float(), if, while, too
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


def mapped(change, value):
    """`change` of every element of nested tuples and lists, which is all that operators take and give."""
    if isinstance(value, tuple | list):
        return type(value)([mapped(change, each) for each in value])
    return change(value)


def on_host(value):
    return value.host if isinstance(value, OnDevice) else HOST if isinstance(value, torch.device) else value


def computed(operator, args, kwargs):
    """What an operator gives, computed on the host; notes what a card would have waited for or refused."""
    if operator is aten._fused_sdp_choice.default:
        return 0  # attention by elementary operators
    if operator is aten.copy_.default:
        return copied_into(*args, **kwargs)
    if operator is aten._to_copy.default:
        return copied(*args, **kwargs)
    tensors, keywords = [], {name: value for name, value in kwargs.items() if name != "pin_memory"}
    mapped(lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None, args)
    ours = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
    if ours:
        look_at(operator, args, tensors)
    stays = kwargs["device"].type == KIND if kwargs.get("device") is not None else bool(ours)
    with _disable_current_modes():
        given = {name: mapped(on_host, value) for name, value in keywords.items()}
        out = operator(*mapped(on_host, args), **given)

    def back(value):  # what works in place gives its argument back
        if not isinstance(value, torch.Tensor):
            return value
        return ours[id(value)] if id(value) in ours else OnDevice(value)

    return mapped(back, out) if stays else out


def look_at(operator, args, tensors):
    """Notes waits; MixUp where a host tensor meets a device tensor."""
    strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
    if operator in WAITS:
        wait(WAITS[operator])
    if operator in INDEXING:
        indices = [index for index in args[1] if index is not None]
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8):
                wait("boolean index")
            elif not isinstance(index, OnDevice):
                wait("host index")
        if isinstance(args[0], OnDevice):  # torch takes indices to the device by itself, not the other way
            strangers = [t for t in strangers if not any(t is index for index in indices)]
    if strangers:
        mixup(f"{operator}: a host tensor {tuple(strangers[0].shape)} meets the device")


def copied(source, *, device=None, non_blocking=False, pin_memory=None, **how):
    """tensor.to(...)"""
    from_device = isinstance(source, OnDevice)
    stays = from_device if device is None else device.type == KIND
    if from_device and not stays:
        wait("copy to the host")
    elif stays and not from_device and not (non_blocking and getattr(source, "in_pinned_memory", False)):
        wait("copy to the device")
    with _disable_current_modes():
        copy = aten._to_copy.default(on_host(source), device=HOST, **how)
    return OnDevice(copy) if stays else copy


def copied_into(into, source, non_blocking=False):
    """into.copy_(source)"""
    if isinstance(into, OnDevice) != isinstance(source, OnDevice) and source.dim():
        wait("copy_ to the device" if isinstance(into, OnDevice) else "copy_ to the host")
    with _disable_current_modes():
        on_host(into).copy_(on_host(source))
    return into


def pinned(tensor):
    """tensor.pin_memory()"""
    copy = tensor.clone()
    copy.in_pinned_memory = True
    return copy


# -------------------------------------------------------------------------------------------------- autocast

HALF = [  # as CUDA's lists have them
    *("linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv"),
    "scaled_dot_product_attention",
]
WIDE = [
    *("layer_norm", "native_layer_norm", "softmax", "log_softmax", "nll_loss", "cross_entropy_loss", "exp"),
    *("log", "pow", "rsqrt", "reciprocal", "cumsum", "sum", "prod", "norm", "logsumexp", "cosine_similarity"),
]


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def add_autocast() -> list:
    """Rules of torch.autocast on the device. They hold as long as what is returned."""
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    library, keys = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1"), torch._C.DispatchKeySet
    inside = keys(torch._C.DispatchKey.AutocastPrivateUse1)

    def rule(operator, half):
        def cast(tensor):
            if not isinstance(tensor, OnDevice) or tensor.dtype not in FLOATS:
                return tensor
            return tensor.to(torch.get_autocast_dtype(KIND) if half else torch.float32)

        def run(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(inside):
                kwargs = {name: cast(value) for name, value in kwargs.items()}
                return operator(*mapped(cast, args), **kwargs)

        return run

    for name in (*HALF, *WIDE):
        for overload in getattr(aten, name).overloads():
            operator = getattr(getattr(aten, name), overload)
            odd = operator._schema.is_mutable or "out" in overload or "Dimname" in str(operator._schema)
            if not odd:
                library.impl(operator, rule(operator, name in HALF))
    return [rest, library]


# ------------------------------------------------------------------------------------------------- the device


class Backend:
    """torch.privateuseone, as torch.cuda is to CUDA."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count, current_device = staticmethod(lambda: 1), staticmethod(lambda: 0)
    set_device = manual_seed = manual_seed_all = empty_cache = reset_peak_memory_stats = staticmethod(
        lambda *given: None
    )
    memory_allocated = max_memory_allocated = max_memory_reserved = staticmethod(lambda *given: 0)
    mem_get_info = staticmethod(lambda *given: (8 * 10**10, 8 * 10**10))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_device_name, memory_reserved = staticmethod(lambda *given: KIND), staticmethod(lambda *given: 0)
    get_rng_state = staticmethod(lambda *given: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *given: torch.set_rng_state(state))
    device = staticmethod(lambda *given: contextlib.nullcontext())
    synchronize = staticmethod(lambda *given: wait("synchronize"))

    @staticmethod
    def get_device_properties(*given):
        return type("Properties", (), {"total_memory": 8 * 10**10, "name": KIND})


def install(fp64=False):
    """From here on DEVICE works in this process, and is what its scripts find."""
    from lab.train import processes

    knows_fp64[0] = fp64
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(KIND, Backend)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # .to() makes new parameters
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is a host tensor and a copy
    torch.Tensor.pin_memory, generator = pinned, torch.Generator

    class Generator:  # a type: annotations say `torch.Generator | None`
        def __new__(cls, device="cpu"):
            return generator("cpu")

    torch.Generator = Generator
    processes._pick_device = lambda *sizes: DEVICE
    _kept.extend([*add_autocast(), Everything()])
    _kept[-1].__enter__()
    threading.Thread.run = functools.partialmethod(in_thread, threading.Thread.run)


def in_thread(thread, run):
    """A thread's work: modes are of one thread."""
    with Everything():
        run(thread)


_kept = []
WORKS = hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")  # in newer torch


# ------------------------------------------------------------------------------------ in a process of its own


def on_device(function, *args, fp64=False) -> Found:
    """Calls a module's function(*args) on the device. A MixUp ends it and is found."""
    process = ranks._context.Process(target=_child, args=(function, args, fp64, os.getcwd()))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    values = json.loads(Path("found.json").read_text())
    return Found(Counter(values["mixups"]), Counter(values["waits"]), values["steps"], values["error"])


def run(script, *argv, fp64=False) -> Found:
    """A whole script, like ranks.launch; what it says goes to out.txt."""
    return on_device(_script, script, argv, fp64=fp64)


def _child(function, args, fp64, folder):
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("out.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    torch.set_num_threads(1)
    install(fp64)
    try:
        function(*args)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        found.error = f"{type(error).__name__}: {error}"
    Path("found.json").write_text(json.dumps(vars(found)))
    sys.stdout.flush()
    os._exit(0)


def _script(script, argv):
    from lab.train import optim

    importlib.import_module(script)
    optimizer_step, before = optim.optimizer_step, []

    def counted(*args, **kwargs):
        if before:
            found.steps.append(dict(found.waits - before[0]))
        before[:] = [Counter(found.waits)]
        return optimizer_step(*args, **kwargs)

    ranks.everywhere(setattr, optim, "optimizer_step", counted)
    sys.argv = [f"{script}.py", *map(str, argv)]
    ranks.main(script)
