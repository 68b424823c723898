"""Decoding: a cache of keys and values, and one token of each row at a time; on NVIDIA cards by a CUDA graph.

Launched one by one, the kernels of a token of GPT-2 medium take 10 to 15 ms of a processor's time, and of an
H200's 1.5 ms. A graph launches them all at once, but only what has fixed shapes and reads no number from the
host: so keys and values lie in buffers of full length, and where the next token goes is a tensor.
"""

import functools
import os
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

from lab.models.gpt import FEW_ROWS, SECOND_LAYOUT, Linear
from lab.train.cpu import ONEDNN

AT_ONCE = 8  # tokens of each row that a card writes between two looks at what they are
WARM_UP = 2  # steps of a shape before its graph is made: kernels are loaded and chosen in them
ROUND_TO = 128  # capacities of a graph: batches of similar length share one; fused attention wants 8


class KVCache:
    """Keys and values of the tokens seen so far. The first padding[i] positions of row i are padding."""

    def __init__(self, n_layer, capacity, padding=None):
        self.keys, self.values = [None] * n_layer, [None] * n_layer
        self.capacity, self.padding, self.length = capacity, padding, 0

    def positions(self, T, device):
        """Of T new tokens: (T,), or with padding (B, T)."""
        positions = torch.arange(self.length, self.length + T, device=device)
        return positions if self.padding is None else (positions - self.padding[:, None]).clamp(min=0)

    def append(self, layer, k, v):
        """Adds k and v of new tokens (B, H, T, D); returns those of all tokens (B, H, S, D)."""
        if self.keys[layer] is None:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.keys[layer], self.values[layer] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end], self.values[layer][:, :, self.length : end] = k, v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def mask(self, T, device):
        """Which keys each of T new tokens sees: (1 or B, 1, T, S) bool. None where that is all of them, or
        the plain causal mask."""
        if self.padding is None and (T == 1 or self.length == 0):
            return None
        keys = torch.arange(self.length + T, device=device)
        queries = keys[self.length :, None]
        seen = (keys <= queries)[None]
        if self.padding is not None:  # padding sees itself: a softmax over nothing would be NaN
            seen = seen & (keys >= self.padding[:, None, None]) | (keys == queries)
        return seen[:, None]

    def advance(self, T):
        """T tokens have been added in all layers."""
        self.length += T


class StaticCache:
    """The buffers of a KVCache that has read the prompts, for steps of one token and of fixed shapes."""

    length = 0  # the device knows it: `place`; who calls sees to the capacity

    def __init__(self, read):
        self.keys, self.values, (rows, _, capacity, _) = read.keys, read.values, read.keys[0].shape
        self.place = torch.zeros(1, dtype=torch.int64, device=read.keys[0].device)  # of the next token
        self.padding = self.place.new_zeros(rows, 1)
        self.unseen = read.keys[0].new_zeros(rows, 1, 1, capacity)  # added to scores: 0 or -inf
        self.follow(read)

    def follow(self, read):
        """Goes on behind what the KVCache `read`, which holds the same buffers, has read."""
        self.place.fill_(read.length)
        self.padding.copy_(0 if read.padding is None else read.padding[:, None])
        keys = torch.arange(self.unseen.shape[-1], device=self.place.device)
        seen = (keys < self.place) & (keys >= self.padding)
        self.unseen.zero_().masked_fill_(~seen[:, None, None], -torch.inf)
        for buffer in (*self.keys, *self.values):  # a weight of 0 times what stood in memory may be NaN
            buffer[:, :, read.length :] = 0

    def positions(self, T, device):
        """(B, 1)"""
        return self.place - self.padding

    def mask(self, T, device):
        """(B, 1, 1, capacity), the new token's place included."""
        return self.unseen.index_fill_(3, self.place, 0)

    def append(self, layer, k, v):
        """Adds k and v (B, H, 1, D); returns all (B, H, capacity, D)."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(2, self.place, k), values.index_copy_(2, self.place, v)

    def advance(self, T):
        self.place += T


def decoder_of(model):
    """The Decoder for a model where it lies. One may serve many `generate` calls, as long as no weight
    changes."""
    kind = model.wte.weight.device.type
    if kind not in ("cpu", "cuda"):
        note(f"tokens are launched kernel by kernel: no graphs on {kind}")
    return GraphDecoder(model) if kind == "cuda" else Decoder(model)


class Decoder:
    """Reads rows, then one token of each at a time: logits (B, V) of what comes next."""

    def __init__(self, model):
        self.model, self.cache = model, None
        self.at_once = 1 if model.wte.weight.device.type == "cpu" else AT_ONCE

    def read(self, input_ids, padding, capacity):
        """Begins with rows (B, T), without the first `padding` (B,) ids of each. capacity: tokens to fit."""
        self.cache = KVCache(len(self.model.h), capacity, padding)
        return self._logits(input_ids, self.cache)

    def step(self, ids):
        """Goes on with one id (B,) of each row."""
        return self._logits(ids[:, None], self.cache)

    def layouts(self, rows) -> dict:
        return second_layouts(self.model, rows)

    def _logits(self, input_ids, cache):
        return logits_of(self.model, self.model.hidden(input_ids, cache)[:, -1])

    @contextmanager
    def ready(self, rows):
        """Context of generation: evaluation mode, weights in the layout that suits it."""
        # compiled blocks would be compiled again for every length; set_stance imports the compiler (1.5 s)
        compiled = "torch._dynamo" in sys.modules
        was_training, layouts = self.model.training, self.layouts(rows)
        self.model.eval()
        try:
            SECOND_LAYOUT.update(layouts)
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                yield
        finally:
            self.model.train(was_training)
            for module in layouts:
                SECOND_LAYOUT.pop(module, None)


class GraphDecoder(Decoder):
    """The same with one launch a token. A graph serves all rows of one shape; only the last one is kept."""

    def __init__(self, model):
        super().__init__(model)
        self.at_once = AT_ONCE
        self.shape = self.still = self.next_ids = self.logits = self.graph = self.kept = None
        self.steps = 0
        device = model.wte.weight.device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, input_ids, padding, capacity):
        capacity = min(-(-capacity // ROUND_TO) * ROUND_TO, self.model.config.block_size)
        if self.shape != (shape := (len(input_ids), capacity)):
            self.graph = self.still = self.logits = None  # first: their memory is wanted
            self.shape, self.steps = shape, 0
        read = KVCache(len(self.model.h), capacity, padding)
        if self.still:
            read.keys, read.values = self.still.keys, self.still.values
        logits = self._logits(input_ids, read)
        if self.still:
            self.still.follow(read)
        else:
            self.still, self.next_ids = StaticCache(read), input_ids[:, -1:].clone()
        return logits

    def step(self, ids):
        self.next_ids.copy_(ids[:, None])
        if self.graph is None and self.steps < WARM_UP:
            self.steps += 1
            with beside(self.stream):  # as capturing wants it
                self._forward()
        else:
            self.graph = self.graph or self._make_graph()
            self.graph.replay()
        return self.logits

    def layouts(self, rows) -> dict:
        self.kept = self.kept or super().layouts(rows)  # the graph keeps their addresses
        return self.kept

    def _forward(self):
        kind = self.next_ids.device.type
        half = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        with torch.autocast(kind, **half, cache_enabled=False):  # a graph would keep the address of a cast
            self.logits = self._logits(self.next_ids, self.still)

    def _make_graph(self):
        try:
            return captured(self._forward, self.stream)
        except RuntimeError as error:  # of memory, too
            reason = str(error).partition("\n")[0]
            note(f"tokens are launched kernel by kernel: no CUDA graph here ({reason:.80})")
            return SimpleNamespace(replay=self._forward)


def captured(forward, stream):
    """`forward()` as a CUDA graph: made, not run. Other threads may copy and allocate meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        forward()
    return graph


@contextmanager
def beside(stream):
    """Context of work on `stream` (none: the usual one), behind what was launched before."""
    if stream is None:
        yield
        return
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)


def logits_of(model, hidden) -> torch.Tensor:
    """(B, C) -> (B, V): under autocast, too, in fp32 if the head's weights are: logits of GPT-2 lie near
    -100, where bf16 knows only multiples of 0.5."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return model.logits(hidden)
    same = all(weight.dtype == hidden.dtype for weight in head_of(model).parameters())
    with torch.autocast(kind, enabled=False) if same else nullcontext():
        return model.logits(hidden)


def head_of(model):
    return model.wte if model.config.tie_head else model.lm_head


def second_layouts(model, rows) -> dict:
    """module -> its weight for generation. On a CPU in oneDNN's own layout, in which products with few rows
    take a third to a half of the time (as torch.compile's freezing has it). Under a card's autocast in half,
    with the bias, but for the head's: else each token would cast all weights again."""
    linears = (module for module in model.modules() if isinstance(module, Linear))
    layers = [(module, module.weight, module.bias) for module in linears]
    layers += [(model, model.wte.matrix(), None)] if model.config.tie_head else []
    kind = model.wte.weight.device.type
    if kind != "cpu":
        apart = {model, *head_of(model).modules()}
        layers = [layer for layer in layers if layer[0] not in apart]
        return half_copies(layers, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else {}
    fits = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for _, weight, _ in layers)
    if not (fits and rows <= FEW_ROWS and ONEDNN) or torch.is_autocast_enabled("cpu"):
        return {}
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return {module: reorder(weight.detach(), rows) for module, weight, _ in layers}


def half_copies(layers, dtype) -> dict:
    """module -> (weight, bias or none) in half; none of them where memory is too small."""
    try:
        return {
            module: (weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
            for module, weight, bias in layers
            if weight.dtype == torch.float32  # autocast leaves fp64 alone, too
        }
    except torch.OutOfMemoryError:
        note("no memory for weights in half precision: each token casts them again, which is slower")
        return {}


@functools.cache  # once a process
def note(line):
    if os.environ.get("RANK", "0") == "0":
        print(f"NOTE {line}", file=sys.stderr)
