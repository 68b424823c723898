"""The GPT: shapes, start, attention written out, rotary positions, checkpointing, refusals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys.gpt import GPT2_SIZES, LLAMA, ids, on_meta, random_gpt, shape

import core
from core import GPT, GPTConfig, UserError
from lab.models import gpt

JOURNAL_003 = {"activation": "relu", "qkv_bias": False, "tie_head": False, "head_bias": True}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *(({"vocab_size": 50257, **shape(*GPT2_SIZES[size], tie_head=tied)}, n) for size, tied, n in [
            ("S", True, 124_439_808), ("S", False, 163_037_184),
            ("M", True, 354_823_168), ("M", False, 406_286_336),
            ("L", True, 774_030_080), ("L", False, 838_359_040),
            ("XL", True, 1_557_611_200), ("XL", False, 1_638_022_400),
        ]),
        ({"vocab_size": 50257, **shape(8, 8, 512)}, 51_475_968),
        ({"vocab_size": 75, "block_size": 2048, **JOURNAL_003}, 86_716_491),
        ({"vocab_size": 75, "block_size": 256, **shape(10, 8, 512), **JOURNAL_003}, 31_717_451),
        ({"vocab_size": 75, "block_size": 256, **shape(6, 6, 384), **JOURNAL_003}, 10_796_619),
        ({"vocab_size": 50257, "block_size": 2048, **JOURNAL_003}, 163_846_225),
        ({"vocab_size": 50304, "block_size": 512, **shape(10, 16, 1024), **LLAMA}, 179_983_360),
        ({"vocab_size": 50304, "block_size": 512, **shape(10, 16, 1024), **LLAMA, "tie_head": False},
         231_494_656),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones_to_the_unit(config, expected):
    assert core.count_parameters(on_meta(**config)) == (expected, expected)


def test_swiglu_is_as_wide_as_journal_004s_and_n_inner_overrides_any_width():
    assert GPTConfig(50304, **shape(10, 16, 1024), **LLAMA).inner == 2816
    assert GPTConfig(75).inner == 4 * 768
    assert GPTConfig(75, n_inner=100).inner == GPTConfig(75, n_inner=100, activation="swiglu").inner == 100


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"n_head": 5}, ["n_embd 768", "n_head 5"]),
        ({"n_head": 256, "positions": "rotary"}, ["even", "3"]),
        ({"head_bias": True}, ["head_bias", "--no-tie_head"]),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_name(config, words):
    with pytest.raises(UserError) as error:
        GPTConfig(75, **config)
    assert all(word in str(error.value) for word in words)


def test_the_weights_start_as_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, block_size=200, **shape(8, 2, 128)))
    expected = {"wte": 0.02, "wpe": 0.02, "c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / 4}  # 4 = sqrt(2 x 8)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # 16,384 numbers and more: their spread is off by 0.6 % (one sigma)
            assert weight.std().item() == pytest.approx(expected[name.split(".")[-2]], rel=0.04), name
        else:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_a_token_changes_no_logit_before_it(positions, norm, activation):
    model = random_gpt(positions=positions, norm=norm, activation=activation)
    x = ids(2, 16)
    with torch.no_grad():
        before = model(x)
        for t in (0, 7, 15):
            changed = x.clone()
            changed[:, t] = (changed[:, t] + 1) % 23
            moved = (model(changed) - before).abs().amax((0, 2))
            assert (moved[:t] < 1e-12).all()  # rounding of fp64 at logits of some tens
            assert (moved[t:] > 1e-6).all()


def test_rotary_scores_depend_on_the_distance_alone():
    angles = gpt.rotary_angles(GPTConfig(1, block_size=64, **shape(1, 1, 8, positions="rotary"))).double()
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (gpt.rotate(q, angles[:, [i]]) * gpt.rotate(k, angles[:, [j]])).sum().item()

    for distance in (0, 3, 17):
        scores = [score(start + distance, start) for start in range(0, 40, 3)]
        assert np.ptp(scores) < 1e-5 * max(1, abs(scores[0]))  # the table is fp32
    assert score(0, 0) == pytest.approx((q * k).sum().item(), rel=1e-6)
    assert abs(score(5, 0) - score(0, 5)) > 1e-3  # it has a direction


def test_dropout_acts_in_training_only():
    model = random_gpt(dropout=0.5)
    plain = random_gpt(dropout=0.0)
    x = ids(2, 16)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        model.train()
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_checkpointed_blocks_give_the_same_gradients(dropout, positions):
    def gradients(checkpointing):
        model = random_gpt(dropout=dropout, positions=positions, checkpointing=checkpointing).train()
        torch.manual_seed(5)
        model(ids(2, 16), ids(2, 16, seed=2)).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name  # the same operations on the same numbers
        assert gradient.abs().sum() > 0, name


def test_checkpointing_does_recompute(monkeypatch):
    blocks = []
    monkeypatch.setattr(gpt, "checkpoint", lambda block, x, *rest, **_: blocks.append(1) or block(x, *rest))
    model = random_gpt(checkpointing=True)
    model(ids(1, 4))
    assert blocks == []  # not in evaluation
    model.train()(ids(1, 4))
    assert blocks == [1, 1]


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_attention_is_the_formula_written_out(qkv_bias):
    model = random_gpt(positions="rotary", qkv_bias=qkv_bias)
    layer, x = model.h[0].attn, torch.randn(3, 11, 32, dtype=torch.float64)
    rotary = model.angles[:, :11]
    q, k, v = F.linear(x, layer.c_attn.weight, layer.c_attn.bias).view(3, 11, 3, 4, 8).permute(2, 0, 3, 1, 4)

    def turned(y):  # as complex numbers: (y[i] + i y[i + D / 2]) e^(i angle)
        z = torch.complex(y[..., :4], y[..., 4:]) * torch.complex(*rotary)
        return torch.cat([z.real, z.imag], -1)

    scores = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -math.inf)
    expected = layer.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 11, 32))
    with torch.no_grad():
        got = layer(x, rotary, None, None)
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-12)  # fp64, numbers near 1


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="17 tokens exceed block_size 16"):
        random_gpt()(ids(1, 17))
