"""How far linear_cross_entropy in half precision is from itself in fp64 on the CPU.

python half_head.py cuda bf16 '[[rows, width, vocabulary, rank, bias], ...]' prints errors() of each.
"""

import json
import sys

import torch

from lab.train.loss import linear_cross_entropy, notes

NORM = 0.003  # bf16 keeps 8 bits: two roundings of a number (slope, result) are 0.0021 in the mean square
WORST = 2**-7  # and twice 2^-8 at worst
ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_inputs(rows, width, vocabulary, rank, bias):
    """[x, weight (, x and weight of an adapter) (, bias)] that half precision holds exactly, and labels."""
    random = torch.Generator().manual_seed(rows + vocabulary)
    shapes = [(rows, width), (vocabulary, width)] + [(rows, rank), (vocabulary, rank)] * bool(rank)
    tensors = [torch.randn(shape, generator=random) for shape in shapes]
    tensors = [0.05 * t if i % 2 else t for i, t in enumerate(tensors)]
    tensors += [0.1 * torch.randn(vocabulary, generator=random)] * bool(bias)
    labels = torch.randint(vocabulary, (rows,), generator=random)
    labels[:2] = torch.tensor([0, vocabulary - 1])  # next to where a vocabulary might be padded
    return [t.bfloat16().float() for t in tensors], labels


def loss_and_slopes(inputs, labels, bias, device, dtype, half=None) -> list[torch.Tensor]:
    leaves = [t.to(device, dtype).requires_grad_() for t in inputs]
    pairs = leaves[:-1] if bias else leaves
    terms = list(zip(pairs[::2], pairs[1::2], strict=True))
    with torch.autocast(torch.device(device).type, half, enabled=half is not None):
        loss = linear_cross_entropy(terms, leaves[-1] if bias else None, labels.to(device))
    return [t.detach().cpu().double() for t in (loss, *torch.autograd.grad(0.37 * loss, leaves))]


def errors(device, half, rows, width, vocabulary, rank, bias) -> list[tuple[float, float]]:
    """Of the loss and of every gradient: |error| / |value| as norms, and the same of the largest entries."""
    inputs, labels = make_inputs(rows, width, vocabulary, rank, bias)
    got = loss_and_slopes(inputs, labels, bias, device, torch.float32, ROUNDED[half])
    expected = loss_and_slopes(inputs, labels, bias, "cpu", torch.float64)
    pairs = [(a - b, b) for a, b in zip(got, expected, strict=True)]
    return [((e.norm() / b.norm()).item(), (e.abs().max() / b.abs().max()).item()) for e, b in pairs]


def check(found):
    """Of what errors() returns."""
    assert all(norm <= NORM and worst <= WORST for norm, worst in found), found


if __name__ == "__main__":
    device, half, cases = sys.argv[1:]
    found = [errors(device, half, *case) for case in json.loads(cases)]
    if notes:  # the largest cases would have been computed by the other formula
        sys.exit("\n".join(notes))
    print(json.dumps(found))
