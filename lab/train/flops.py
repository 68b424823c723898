"""Model FLOPs of a training step, and the peaks of cards: their ratio is the utilisation (MFU) of the log.

Counted is what the formulas of the model ask for (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B):
recomputed activations, padding and a padded vocabulary are work, but none of the model's.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

# Dense TFLOP/s of one card by its maker's data sheet: half precision with sums in fp32, tf32, fp32. The first
# name that stands in torch's name of the card counts.
PEAKS = {
    "B200": (2250, 1125, 75),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 418, 60),
    "H[12]00|H800|GH200": (989, 495, 67),
    "H20": (148, 74, 44),
    "A[18]00": (312, 156, 19.5),
    "A40": (150, 75, 37.4),
    "A30": (165, 82, 10.3),
    "A10": (125, 62.5, 31.2),
    "A10G": (70, 35, 35),
    "RTX A6000": (155, 77.4, 38.7),
    "RTX 6000 Ada": (364, 182, 91.1),
    "L40S?": (362, 181, 91),
    "L4": (121, 60, 30.3),
    "RTX 5090": (210, 105, 105),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "T4": (65, 8.1, 8.1),  # without TF32: such products run in fp32 there
    "V100": (125, 15.7, 15.7),
    "MI300X": (1307, 654, 163),
}
PARTS_OF_CARDS = "Laptop|Max-Q|MIG|GRID|vGPU"  # slower than the card they are named after
COLUMN = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}


def peak(name, dtype) -> float | None:
    """Dense FLOP/s of a card, by the name that torch has for it. None: not known here."""
    figures = [figures for card, figures in PEAKS.items() if re.search(rf"\b({card})\b", name)]
    if not figures or dtype not in COLUMN or re.search(PARTS_OF_CARDS, name):
        return None
    return 1e12 * figures[0][COLUMN[dtype]]


@dataclass(frozen=True)
class Flops:
    """What forward and backward take."""

    token: float  # for each token that is read
    target: float  # for each position whose logits are made
    pair: float  # for each two tokens of a row: attention

    def of(self, lengths, targets) -> float:
        """FLOPs of rows with these numbers of tokens, and so many targets in all."""
        lengths = np.asarray(lengths, dtype=np.float64)
        return self.token * lengths.sum() + self.target * targets + self.pair * (lengths**2).sum()

    def times(self, factor) -> "Flops":
        return Flops(factor * self.token, factor * self.target, factor * self.pair)


def training_flops(model) -> Flops | None:
    """Of a GPT, with or without adapters, or of a PairScorer. None where the whole encoder is frozen.

    A weight of a matrix takes 2 FLOPs a token forward, 2 for the slope by its input where anything below it
    is trained, 2 for its own slope if it is trained itself: 6 N of a model, 4 N of a frozen base. The head's
    are counted by target. Attention takes 4 C forward and 8 C backward for each block and two tokens of a
    row, causal or not: 12 L C T a token. Lookups, norms and softmaxes are not counted.
    """
    body = getattr(model, "encoder", model)
    if not any(p.requires_grad for p in body.parameters()):
        return None
    blocks = next(module for module in body.modules() if isinstance(module, nn.ModuleList))
    width, layers = _shape(body.config)
    repeats = layers // len(blocks)  # ALBERT has one block, which it goes through often
    sequences = 1 if body is model else 2  # of a row, about equally long
    head, tables, inside = _head(model), _tables(body), set(blocks.parameters())
    token, trained = 0, False
    for p in body.parameters():
        if p.dim() == 2 and p not in tables and p not in head:
            token += p.numel() * (2 + 2 * trained + 2 * p.requires_grad) * (repeats if p in inside else 1)
        trained |= p.requires_grad
    target = sum(p.numel() * (4 + 2 * p.requires_grad) for p in head if p.dim() == 2)
    return Flops(token, target, _attention(blocks, tables) * repeats * width / sequences)


def _head(model) -> set[nn.Parameter]:
    """Parameters of the output layer, which may be the embedding."""
    own = {p for name, p in model.named_parameters() if name.startswith(("lm_head.", "head."))}
    return own or {model.wte.weight}


def _tables(body) -> set[nn.Parameter]:
    """What is looked up, not multiplied."""
    return {p for m in body.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}


def _shape(config) -> tuple[int, int]:
    """(width of all heads' queries, layers), whatever they are called."""
    if hasattr(config, "qkv_sizes"):
        return config.qkv_sizes[0], config.n_layer
    return config.hidden_size, config.num_hidden_layers


def _attention(blocks, tables) -> int:
    """Over the blocks: 12, or 4 where nothing up to it is trained: the backward ends above."""
    total, trained = 0, any(p.requires_grad for p in tables)
    for block in blocks:
        trained |= any(p.requires_grad for p in block.parameters())
        total += 12 if trained else 4
    return total


def seconds_at_peak(model, world, dtype, share=1.0) -> tuple[Flops | None, str | None]:
    """(Flops as seconds that the ranks' cards would take at their peak, a line where that is not known).

    share: of a row's tokens, that is read. (None, None) on a CPU, and where the encoder is frozen.
    """
    kind = world.device.type
    if kind == "cpu" or (flops := training_flops(model)) is None:
        return None, None
    name = getattr(torch, kind).get_device_name(world.device)
    if not (most := peak(name, dtype)):
        return None, f"NOTE no MFU: the peak of {name} in {dtype} is not in lab/train/flops.py"
    return flops.times(share / (most * world.size)), None
