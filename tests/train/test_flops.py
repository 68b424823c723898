"""FLOPs by the formula against those that torch counts operator by operator; peaks by the names of cards."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import core
from lab.data import tokenizers
from lab.models import encoders
from lab.train import flops

B, T, V = 3, 24, 50
SHAPES = {
    "gpt2": {},
    "llama": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "tie_head": False},
}


def counted(step) -> int:
    """By torch, of what `step` runs forward and backward; attention by its plain formula."""
    known = {torch.ops.aten.addmm_: in_place}  # of the head; torch's table lacks it
    with FlopCounterMode(display=False, custom_mapping=known) as mode, sdpa_kernel(SDPBackend.MATH):
        step().backward()
    return mode.get_total_flops()


def in_place(total, a, b, out_shape=None, **scales):
    return 2 * a[0] * a[1] * b[1]


def gpt(shape, layers=2):
    torch.manual_seed(0)
    return core.GPT(core.GPTConfig(V, T, layers, 2, 16, **SHAPES[shape])).double()


def of_gpt(model, targets=T):
    """(by the formula, by torch) of B rows of T tokens with so many targets each."""
    ids = torch.randint(V, (B, T))
    labels = ids.masked_fill(torch.arange(T) >= targets, core.IGNORE_INDEX)
    return flops.training_flops(model).of([T] * B, B * targets), counted(lambda: model(ids, labels))


@pytest.mark.parametrize("targets", [T, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_weights_of_a_gpt_trained_are_counted_exactly(shape, targets):
    formula, torchs = of_gpt(gpt(shape), targets)
    assert formula == torchs


def test_of_a_gpt_it_is_6_flops_a_weight_and_token_and_12_l_c_t_of_attention():
    model = gpt("gpt2")
    matrices = 12 * 2 * 16**2 + V * 16
    assert flops.training_flops(model).of([T] * B, B * T) == B * T * (6 * matrices + 12 * 2 * 16 * T)


@pytest.mark.parametrize("top", [6, 3])
def test_a_frozen_base_is_counted_to_4_percent_of_6_blocks(top):
    """4 FLOPs a frozen weight, not 6; what is too many is of the lowest layer, whose input needs no slope."""
    model = gpt("llama", layers=6)
    core.add_lora(model, 2, 2, last_layers=top, head=True)
    formula, torchs = of_gpt(model)
    whole = flops.training_flops(gpt("llama", layers=6)).of([T] * B, B * T)
    assert abs(formula / torchs - 1) < 0.04 and formula < 0.9 * whole


def scorer(family, which):
    encoder = core.load_encoder(
        f"tiny:{family}", tokenizers.encoder_tokenizer("tiny:", ["one two three"]), 0.0
    )
    frozen = encoders.freeze(encoder, which)
    return core.PairScorer(encoder, joint=False, pooling="first", head="linear", dropout=0.0, frozen=frozen)


@pytest.mark.parametrize(
    ("family", "which", "tolerance"),
    [("bert", "none", 0.01), ("distilbert", "bottom", 0.07), ("albert", "none", 0.03)],
)
def test_encoders_are_counted_by_the_tokens_of_both_sequences(family, which, tolerance):
    """A frozen lower half takes 2 FLOPs a weight and token; ALBERT's one block counts as often as it runs."""
    model, ids = scorer(family, which).double(), torch.randint(4, 7, (2 * B, T))
    torchs = counted(lambda: model(ids, [T] * (2 * B), size=B).sum())
    assert abs(flops.training_flops(model).of([2 * T] * B, B) / torchs - 1) < tolerance


def test_a_frozen_encoders_vectors_are_kept_so_that_there_is_nothing_to_count():
    assert flops.training_flops(scorer("distilbert", "all")) is None


@pytest.mark.parametrize(
    ("card", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H200", "tf32", 495),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "fp16", 165),
        ("Tesla T4", "fp16", 65),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
    ],
)
def test_a_card_is_known_by_its_name(card, dtype, tera):
    assert flops.peak(card, dtype) == 1e12 * tera


@pytest.mark.parametrize(
    ("card", "dtype"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16"),
        ("NVIDIA H100 80GB HBM3", "fp64"),
        ("Some Card 9", "bf16"),
    ],
)
def test_no_peak_is_better_than_a_wrong_one(card, dtype):
    assert flops.peak(card, dtype) is None


def test_a_card_that_is_not_known_is_said_and_a_cpu_is_not(monkeypatch):
    model = gpt("gpt2")
    assert flops.seconds_at_peak(model, core.World(), "fp32") == (None, None)
    world = SimpleNamespace(device=torch.device("cuda", 0), size=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    at_peak, note = flops.seconds_at_peak(model, world, "bf16", share=0.5)
    whole = flops.training_flops(model).of([T] * B, B * T)
    assert note is None and at_peak.of([T] * B, B * T) == pytest.approx(0.5 * whole / (2 * 989e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    assert flops.seconds_at_peak(model, world, "bf16") == (
        None,
        "NOTE no MFU: the peak of NVIDIA X1 in bf16 is not in lab/train/flops.py",
    )
