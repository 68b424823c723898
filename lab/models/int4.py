"""int4 weights, int8 embeddings and activations: training that knows of them, and a model made of them.

Weights of linear layers: 16 levels, one scale for each `group` inputs of an output. The embedding, which is
the head too: 256 levels, one scale a row. What a linear layer reads: 256 levels, one range a token, found as
it comes (dynamic): a range fixed in advance would need calibration text and clips what lies outside.
The scheme is torchao's Int8DynActInt4Weight."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from lab.data.tokenizers import own_tokenizer
from lab.errors import UserError
from lab.models.gpt import GPT, Embedding, GPTConfig, Linear
from lab.models.rotary import rotary_angles
from lab.run.files import is_there, whole_folder, write_json
from lab.train.cpu import linear

# The largest weight of a group stands at 7.5 levels, halfway between two: a last digit, as another order of
# additions leaves it, would decide. So it stands a little beyond, and goes to -8, or is clamped to 7.
UP = 1 + 1e-6


def int4_groups(weight, group) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in) -> levels, to be clamped to -8 ... 7, (out, in / group, group); scales: max / 7.5."""
    groups = weight.unflatten(1, (-1, group))
    scales = _positive(groups.abs().amax(-1, keepdim=True) / (7.5 * UP))
    return torch.round(groups / scales), scales


def int8_rows(weight) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (V, C) -> levels, to be clamped to -128 ... 127, (V, C); scales (V, 1): max / 127.5."""
    scales = _positive(weight.abs().amax(-1, keepdim=True) / (127.5 * UP))
    return torch.round(weight / scales), scales


def int8_tokens(x) -> torch.Tensor:
    """x (..., C) rounded to 256 levels between each token's lowest and highest number (0 included)."""
    # half a number is too coarse a scale
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = _positive((high - low) / 255)
    zero = torch.round(-128 - low / scale).clamp(-128, 127)
    return (((torch.round(x / scale) + zero).clamp(-128, 127) - zero) * scale).to(dtype)


def _positive(scales):
    return scales.clamp(min=torch.finfo(torch.float32).eps)


def straight_through(value, seen, inside=None):
    """`seen` forwards, the slope of `value` backwards, 0 where not `inside`."""
    passed = value if inside is None else torch.where(inside, value, value.detach())
    return passed + (seen - value).detach()


def fake_int4(weight, group) -> torch.Tensor:
    levels, scales = int4_groups(weight.detach(), group)
    inside = ((levels >= -8) & (levels <= 7)).flatten(1)
    return straight_through(weight, (levels.clamp(-8, 7) * scales).flatten(1), inside)


def fake_int8_rows(weight) -> torch.Tensor:
    levels, scales = int8_rows(weight.detach())
    return straight_through(weight, levels.clamp(-128, 127) * scales, (levels >= -128) & (levels <= 127))


class QATLinear(Linear):
    """A Linear that, while `on`, computes with weights rounded to int4 and inputs rounded to int8."""

    on, group = False, 0

    def forward(self, x):
        if not self.on:
            return super().forward(x)
        [(x, matrix)], bias = self.terms(x)
        return linear(x, matrix, bias)

    def terms(self, x):
        if not self.on:
            return super().terms(x)
        return [(straight_through(x, int8_tokens(x.detach())), fake_int4(self.weight, self.group))], self.bias


class QATEmbedding(Embedding):
    on = False

    def matrix(self):
        return fake_int8_rows(self.weight) if self.on else self.weight

    def forward(self, ids):
        rows = super().forward(ids)  # a row has its own scale: only those that are read
        return fake_int8_rows(rows) if self.on else rows


def insert_fake_quant(model, group):
    """Replaces a GPT's linear layers and embedding by QAT layers with the same parameters, switched off."""
    for name, layer in linear_layers(model, group):
        with torch.device("meta"):
            new = QATLinear(layer.in_features, layer.out_features, layer.bias is not None)
        new.weight, new.bias, new.group = layer.weight, layer.bias, group
        model.set_submodule(name, new)
    with torch.device("meta"):
        wte = QATEmbedding(*model.wte.weight.shape)
    wte.weight, model.wte = model.wte.weight, wte


def linear_layers(model, group) -> list[tuple[str, Linear]]:
    """(name, layer) of all linear layers. UserError where groups of this size do not
    divide the inputs of one."""
    layers = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, Linear)]
    common = math.gcd(*(layer.in_features for _, layer in layers))
    fits = ", ".join(str(n) for n in (16, 32, 64, 128, 256) if common % n == 0) or "another width"
    for name, layer in layers:
        if layer.in_features % group or group % 2:
            why = "is odd, like no group of" if group % 2 else "does not divide"
            raise UserError(f"--qat_group {group} {why} the {layer.in_features} inputs of {name}: use {fits}")
    return layers


def switch(model, on):
    """Turns the fake quantisation of a model on or off."""
    for layer in model.modules():
        if isinstance(layer, QATLinear | QATEmbedding):
            layer.on = on


class Int4Linear(nn.Module):
    """A linear layer of int4 weights: packed (out, in / 2), two a byte, the lower half first; scales
    (out, in / group)."""

    def __init__(self, inputs, outputs, bias, group):
        super().__init__()
        self.register_buffer("packed_weight", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(outputs, inputs // group))
        self.register_buffer("bias", torch.empty(outputs) if bias else None)

    def matrix(self) -> torch.Tensor:
        levels = torch.stack([self.packed_weight & 15, self.packed_weight >> 4], dim=-1).flatten(1)
        groups = levels.to(self.scales.dtype).sub_(8).unflatten(1, (self.scales.shape[1], -1))
        return groups.mul_(self.scales[..., None]).flatten(1)

    def forward(self, x):
        return linear(int8_tokens(x), self.matrix(), self.bias)

    def terms(self, x):
        return [(int8_tokens(x), self.matrix())], self.bias


class Int8Embedding(nn.Module):
    """An embedding of int8: levels (V, C), scales (V, 1)."""

    def __init__(self, rows, width):
        super().__init__()
        self.register_buffer("levels", torch.empty(rows, width, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(rows, 1))

    def matrix(self) -> torch.Tensor:
        return self.levels.to(self.scales.dtype).mul_(self.scales)

    @property
    def weight(self):
        """The scales: callers ask a `weight` for its device and dtype only."""
        return self.scales

    def forward(self, ids):
        return self.levels[ids].to(self.scales.dtype) * self.scales[ids]


@torch.no_grad()
def convert(model, group) -> GPT:
    """A GPT whose matrices are int4 and int8; norms and biases stay as they are. `model` is not changed.

    Gives the same logits as a model trained with insert_fake_quant and switched on.
    """
    state, linear = {}, {name for name, _ in linear_layers(model, group)}
    for name, value in model.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        if kind == "weight" and prefix in linear:
            levels, scales = int4_groups(value, group)
            halves = levels.clamp(-8, 7).add_(8).to(torch.uint8).flatten(1)
            state[f"{prefix}.packed_weight"] = halves[:, ::2] | halves[:, 1::2] << 4
            state[f"{prefix}.scales"] = scales[..., 0]
        elif name == "wte.weight":
            levels, scales = int8_rows(value)
            state |= {"wte.levels": levels.clamp(-128, 127).to(torch.int8), "wte.scales": scales}
        else:
            state[name] = value.clone()
    return with_state(model.config, group, state)


def with_state(config, group, state) -> GPT:
    """A quantised GPT made of these tensors. Raises what load_state_dict raises."""
    with torch.device("meta"):
        model = GPT(config)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Linear):
                shape = layer.in_features, layer.out_features, layer.bias is not None
                model.set_submodule(name, Int4Linear(*shape, group))
        model.wte = Int8Embedding(config.vocab_size, config.n_embd)
    model.load_state_dict(state, strict=True, assign=True)
    if config.positions == "rotary":
        model.angles = rotary_angles(config).to(model.wte.scales.device)
    return model.requires_grad_(False).eval()


def save(model, group, tokenizer, folder):
    """Writes model.safetensors, quantised.json and tokenizer/, all that `load` needs; replaces older ones."""
    import safetensors.torch

    with whole_folder(Path(folder), replace=True) as aside:
        tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(tensors, aside / "model.safetensors", {"format": "pt"})
        write_json(aside / "quantised.json", {"group": group, "config": asdict(model.config)})
        tokenizer.save_pretrained(aside / "tokenizer")


def is_quantised(name) -> bool:
    """Whether `name` is a folder that `save` wrote."""
    return is_there(Path(name) / "quantised.json")


def load(folder) -> tuple[GPT, object]:
    """Loads (model, tokenizer) that `save` wrote, on the CPU. Executes no code."""
    import safetensors.torch

    folder = Path(folder)
    try:
        stored = json.loads((folder / "quantised.json").read_text())
        state = safetensors.torch.load_file(folder / "model.safetensors")
        model = with_state(GPTConfig(**stored["config"]), stored["group"], state)
    except Exception as error:  # as many kinds as there are ways to damage a folder
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{folder} is no whole quantised model ({why}): make it anew") from None
    return model, own_tokenizer(folder)
