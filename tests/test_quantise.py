"""quantise.py: its numbers against slow loops, training that knows of them, the int4 model and its folder;
the clock that ends a stage of run_mathqa.py, and what its presets resolve to.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from ranks import everywhere, launch, newest, result, run
from torch import nn

import core
import run_mathqa
from core import GPT, GPTConfig
from lab.models import gpt, int4
from lab.run import folder as folder_module
from lab.train import optim

LLAMA = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False},
}
SHAPES = {
    "gpt2": {},  # biases, learned positions, LayerNorm
    "noam": LLAMA,
    "no biases": {"bias": False, "qkv_bias": False, "activation": "relu"},
    "rotary with biases": {"positions": "rotary", "qkv_bias": True, "bias": False},
    "untied": LLAMA | {"tie_head": False},
    "untied with biases": {"tie_head": False, "head_bias": True},
}
EPS = np.float32(2.0**-23)
DTYPES = (torch.float32, torch.float64)
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
TINY = [
    *("--smoke", "--mode", "finetune", "--init_from", "new", "--max_documents", 300, "--text_documents", 60),
    *("--n_embd", 32, "--max_steps", 12, "--batch", 16, "--eval_every", 6, "--answer_rows", 5),
    *("--eval_rows", 20, "--plain_blocks", 3),
]
READ = [
    *("--smoke", "--mode", "pretrain", "--text_documents", 60, "--n_embd", 32, "--pretrain_batch", 4),
    *("--pretrain_max_steps", 20, "--pretrain_eval_every", 20, "--eval_rows", 8, "--log_every", 1),
]


def random_gpt(dtype=torch.float32, seed=0, **config):
    """Small, with weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(seed)
    small = {"vocab_size": 97, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**small | config)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval()


def prepared(group=16, on=True, **how):
    model = random_gpt(**how)
    int4.insert_fake_quant(model, group)
    int4.switch(model, on)
    return model


def ids(*size, seed=1):
    return torch.randint(97, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, x=None):
    return model(ids(3, 16) if x is None else x)


def numbers(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_close(ours, theirs, most=1e-6):
    assert (ours - theirs).abs().max() <= most * theirs.abs().max()


def assert_far(ours, theirs):
    """So that an equality beside it cannot hold for want of a difference."""
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


def bytes_of(model):
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


# the numbers, one by one


UP = 1 + 1e-6  # no rounding tie at the largest weight: its level would hang on the last digit


def slow_weights(weight, size, lowest, highest, steps):
    """(numbers, levels before the clamp, scales of each number) by loops; s = max / steps in each `size`."""
    w = weight.detach().numpy()
    seen, levels, scales = np.empty_like(w), np.empty_like(w), np.empty_like(w)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            scale = max(max(abs(v) for v in w[row, start : start + size]) / w.dtype.type(steps), EPS)
            for i in range(start, start + size):
                levels[row, i], scales[row, i] = np.rint(w[row, i] / scale), scale
                seen[row, i] = min(max(levels[row, i], lowest), highest) * scale
    return tuple(map(torch.from_numpy, (seen, levels, scales)))


def slow_int4(weight, group):
    return slow_weights(weight, group, -8, 7, 7.5 * (1 + 1e-6))


def slow_rows(weight):
    return slow_weights(weight, weight.shape[1], -128, 127, 127.5 * UP)


def slow_tokens(x):
    """(numbers, scales) by loops: the range of a token and 0 in 256 levels, the zero point whole."""
    flat, kind = x.detach().numpy().reshape(-1, x.shape[-1]), NUMPY[x.dtype]
    seen, scales = np.empty_like(flat), np.empty_like(flat)
    for row, values in enumerate(flat):
        low, high = min([kind(0), *values]), max([kind(0), *values])
        scale = max((high - low) / kind(255), EPS)
        zero = min(max(np.rint(kind(-128) - low / scale), -128), 127)
        for i, value in enumerate(values):
            level = min(max(np.rint(value / scale) + zero, -128), 127)
            seen[row, i], scales[row, i] = (level - zero) * scale, scale
    return torch.from_numpy(seen).view(x.shape), torch.from_numpy(scales).view(x.shape)


def hard_rows(width, dtype, seed=0):
    """Normal, with outliers, tiny, zero, of one sign, constant."""
    x = torch.randn(12, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x[1, ::7] *= 50
    x[2] *= 1e-9
    x[3] = 0
    x[4], x[5] = x[4].abs() + 1, -x[5].abs() - 1
    x[6], x[7] = 0.37, -0.37
    x[8, 1:] = 0
    x[9] *= 1e5
    x[10, : width // 2] = 0
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [256, 32])
def test_int4_weights_are_the_slow_loops(group, dtype):
    weight = hard_rows(512, dtype)
    seen, levels, scales = slow_int4(weight, group)
    got_levels, got_scales = int4.int4_groups(weight, group)
    assert got_levels.shape == (12, 512 // group, group) and got_scales.shape == (12, 512 // group, 1)
    assert torch.equal(got_levels.flatten(1), levels)
    assert torch.equal(got_scales.expand_as(got_levels).flatten(1), scales)
    assert torch.equal(int4.fake_int4(weight, group), seen)
    assert levels.max() == 8 and levels.min() == -8  # both ends are met, and the one beyond the last


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_are_the_slow_loops(dtype):
    weight = hard_rows(160, dtype)
    seen, levels, scales = slow_rows(weight)
    got_levels, got_scales = int4.int8_rows(weight)
    assert torch.equal(got_levels, levels) and torch.equal(got_scales, scales[:, :1])
    assert torch.equal(int4.fake_int8_rows(weight), seen)
    assert levels.max() == 128 and levels.min() == -128


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_tokens_are_the_slow_loops(dtype):
    x = hard_rows(160, dtype).view(3, 4, 160)
    got = int4.int8_tokens(x)
    assert got.dtype == dtype and torch.equal(got, slow_tokens(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_tokens_of_half_numbers_have_a_scale_in_fp32(dtype):
    x = torch.randn(12, 160, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    x[1, ::7] *= 50
    got = int4.int8_tokens(x)
    assert got.dtype == dtype and torch.equal(got, slow_tokens(x.float())[0].to(dtype))
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    coarse = (torch.round(x / scale) + torch.round(-128 - low / scale)).clamp(-128, 127)
    coarse = (coarse - torch.round(-128 - low / scale)) * scale
    assert not torch.equal(coarse, got)  # what it would be in half numbers


def test_an_embedding_gives_the_rows_of_its_matrix_and_their_slopes():
    """A row has its own scale: those that are read are quantised as all would be."""
    wte = prepared(dtype=torch.float64).wte
    which = ids(3, 16) % 40
    upstream = torch.randn(3, 16, 32, dtype=torch.float64)
    slopes = []
    for rows in (wte(which), wte.matrix()[which]):
        wte.weight.grad = None
        rows.backward(upstream)
        slopes.append(wte.weight.grad)
    assert torch.equal(wte(which), wte.matrix()[which]) and torch.equal(
        wte(which), slow_rows(wte.weight)[0][which]
    )
    assert_close(slopes[0], slopes[1], 1e-12)
    assert (slopes[0][40:] == 0).all() and (slopes[0][which.unique()] != 0).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_errs_by_half_a_step_at_most_even_where_it_is_clamped(dtype):
    for weight in (hard_rows(512, dtype, seed) for seed in range(4)):
        for seen, levels, scales in (slow_int4(weight, 32), slow_int4(weight, 256), slow_rows(weight)):
            last = 7 if levels.abs().max() <= 8 else 127
            errors = (weight - seen).abs() / scales
            assert errors.max() <= 0.5 + 2e-4  # 127.5 * 1e-6 of a step more
            assert (levels == last + 1).any() and (errors[levels > last] >= 0.5 - 1e-4).all()
        ours = int4.fake_int4(weight, 32), int4.fake_int8_rows(weight)
        steps = slow_int4(weight, 32)[2], slow_rows(weight)[2]
        for seen, step in zip(ours, steps, strict=True):
            assert ((weight - seen).abs() <= 0.5002 * step).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_errs_by_half_a_step_and_0_not_at_all(dtype):
    for x in (hard_rows(160, dtype, seed) for seed in range(4)):
        got, step = int4.int8_tokens(x), slow_tokens(x)[1]
        assert ((x - got).abs() <= 0.501 * step).all()
        assert (got[x == 0] == 0).all() and (x == 0).sum() > 160
        assert_close(got[6:8], x[6:8], 1e-6)  # constant tokens


def test_zero_rows_stay_zero_and_constant_weights_lose_half_a_step():
    zero, constant = torch.zeros(2, 64), torch.tensor([[3.0], [-3.0]]).expand(2, 64)
    assert torch.equal(int4.fake_int4(zero, 32), zero)
    assert torch.equal(int4.fake_int8_rows(zero), zero)
    assert torch.equal(int4.int8_tokens(zero), zero)
    # the largest number lies half a step off the outermost levels, 7 and -8
    assert_close(int4.fake_int4(constant, 32), constant * torch.tensor([[7 / 7.5], [8 / 7.5]]) / UP)
    assert_close(int4.fake_int8_rows(constant), constant * torch.tensor([[127 / 127.5], [128 / 127.5]]) / UP)


@pytest.mark.parametrize("factor", [2.0**-5, 2.0**7])
def test_scaled_numbers_are_quantised_alike(factor):
    x = torch.randn(6, 64)
    for of in (lambda w: int4.fake_int4(w, 32), int4.fake_int8_rows, int4.int8_tokens):
        assert torch.equal(of(factor * x), factor * of(x))
    mixed = x * torch.tensor([1.0, factor]).repeat_interleave(32)  # a group knows nothing of its neighbours
    expected = int4.fake_int4(x, 32) * torch.tensor([1.0, factor]).repeat_interleave(32)
    assert torch.equal(int4.fake_int4(mixed, 32), expected)


def test_a_token_is_quantised_without_its_neighbours():
    x = hard_rows(64, torch.float32).view(3, 4, 64)
    alone = torch.stack([int4.int8_tokens(token) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(int4.int8_tokens(x), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_activations_stay_and_quantised_weights_keep_their_levels(dtype):
    x = torch.randn(50, 160, dtype=dtype)
    once = int4.int8_tokens(x)
    assert_close(int4.int8_tokens(once), once)
    # weights do not stay: the largest level left is 7 or -8, so the scale is 14/15 or 16/15 of what it was
    w = torch.randn(50, 256, dtype=dtype)
    levels, scales = int4.int4_groups(w, 32)
    levels = levels.clamp(-8, 7)
    again, new_scales = int4.int4_groups((levels * scales).flatten(1), 32)
    reaches_8 = (levels == -8).any(-1, keepdim=True)
    assert 0 < reaches_8.sum() < reaches_8.numel()
    assert_close(new_scales, scales * torch.where(reaches_8, 16, 14) / 15 / UP)
    again = again.clamp(-8, 7)
    assert (again - levels).abs().max() == 1
    assert (again[(levels == 7) & ~reaches_8] == 7).all() and (again[levels == -8] <= -7).all()


# the gradient


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_slope_passes_but_not_beyond_the_last_level(kind):
    weight = torch.randn(8, 64, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(8, 64, dtype=torch.float64)
    fake = int4.fake_int4(weight, 32) if kind == "int4" else int4.fake_int8_rows(weight)
    fake.backward(upstream)
    levels = (slow_int4(weight, 32) if kind == "int4" else slow_rows(weight))[1]
    beyond = levels > (7 if kind == "int4" else 127)
    assert 0 < beyond.sum() <= 16
    assert torch.equal(weight.grad, upstream.masked_fill(beyond, 0))


def test_a_linear_layer_has_the_slopes_of_what_it_computed():
    layer = prepared(dtype=torch.float64).h[0].mlp.c_fc
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 128, dtype=torch.float64)
    y = layer(x)
    y.backward(upstream)
    weight, levels, _ = slow_int4(layer.weight, 16)
    seen = slow_tokens(x)[0]
    assert_close(y.detach(), seen @ weight.T + layer.bias.detach(), 1e-12)
    assert_close(x.grad, upstream @ weight, 1e-12)
    assert_close(layer.weight.grad, (upstream.T @ seen).masked_fill(levels > 7, 0), 1e-12)
    assert_close(layer.bias.grad, upstream.sum(0), 1e-12)


def reference(model, group):
    """A plain GPT of the slow loops' weights whose linear layers read the slow loops' activations, and which
    weights lie beyond the last level.
    """
    plain, beyond = random_gpt(torch.float64, **dataclasses.asdict(model.config)), {}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            state[f"{name}.weight"], levels, _ = slow_int4(state[f"{name}.weight"], group)
            beyond[f"{name}.weight"] = levels > 7

            def quantised(layer, args):
                return args[0] + (slow_tokens(args[0])[0] - args[0]).detach()

            layer.register_forward_pre_hook(quantised)
    state["wte.weight"], levels, _ = slow_rows(state["wte.weight"])
    beyond["wte.weight"] = levels > 127
    plain.load_state_dict(state)
    return plain, beyond


@pytest.mark.parametrize("shape", ["gpt2", "noam"])
def test_logits_loss_and_all_gradients_of_a_gpt_are_the_slow_loops(shape):
    model, x, labels = prepared(dtype=torch.float64, **SHAPES[shape]), ids(3, 16), ids(3, 16, seed=2)
    plain, beyond = reference(model, 16)
    assert_close(logits(model), logits(plain), 1e-10)
    loss = model(x, labels)
    loss.backward()
    expected = F.cross_entropy(plain(x).flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-10)
    theirs = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        slope = theirs[name].grad.masked_fill(beyond.get(name, torch.tensor(False)), 0)
        assert_close(p.grad, slope, 1e-8)
        assert p.grad.abs().max() > 0, name


def test_slopes_are_those_of_finite_differences():
    model = prepared(dtype=torch.float64)
    x, labels = ids(3, 16) % 50, ids(3, 16, seed=2)
    labels[0, 0] = target = 77  # never read: it only reaches the head
    plain, beyond = reference(model, 16)
    model(x, labels).backward()
    for name, place in (("h.1.mlp.c_proj.weight", (3, 5)), ("wte.weight", (target, 4))):
        assert not beyond[name][place]
        weight, around = plain.get_parameter(name), []
        for step in (-1e-5, 1e-5):  # nothing behind these weights is rounded
            with torch.no_grad():
                weight[place] += step
                around.append(plain(x, labels).item())
                weight[place] -= step
        slope = (around[1] - around[0]) / 2e-5
        assert math.isclose(model.get_parameter(name).grad[place].item(), slope, rel_tol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_that_trains_is_that_of_the_logits(shape):
    model, x, labels = prepared(**SHAPES[shape]), ids(3, 16), ids(3, 16, seed=2)
    for of in (model, int4.convert(model, 16)):
        expected = F.cross_entropy(logits(of).flatten(0, 1), labels.flatten(), reduction="sum").item()
        with torch.no_grad():
            assert math.isclose(of(x, labels).item(), expected, rel_tol=1e-6)
    int4.switch(model, True)
    expected = F.cross_entropy(logits(model).flatten(0, 1), labels.flatten(), reduction="sum").item()
    assert math.isclose(model(x, labels).item(), expected, rel_tol=1e-6)


# prepare and switch


@pytest.mark.parametrize("shape", SHAPES)
def test_prepare_keeps_parameters_names_and_order_and_off_is_bit_identical(shape):
    model = random_gpt(**SHAPES[shape])
    before, state, plain = dict(model.named_parameters()), numbers(model), logits(model)
    int4.insert_fake_quant(model, 16)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is p for name, p in before.items())
    assert_same(numbers(model), state)
    assert torch.equal(logits(model), plain)
    int4.switch(model, True)
    quantised = logits(model)
    assert_far(quantised, plain)
    assert_close(quantised, plain, 0.5)
    int4.switch(model, False)
    assert torch.equal(logits(model), plain)
    assert_same(numbers(model), state)


def test_every_matrix_of_a_prepared_model_is_quantised():
    for shape, config in SHAPES.items():
        model = prepared(**config)
        matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        plain = [m for m in matrices if not isinstance(m, int4.QATLinear | int4.QATEmbedding)]
        assert plain == ([model.wpe] if hasattr(model, "wpe") else []), shape


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_prepare_may_come_before_or_after_the_optimizer(kind):
    cfg = SimpleNamespace(optimizer=kind, weight_decay=0.1, beta1=0.9, beta2=0.95)
    ended = []
    for first in (True, False):
        model = random_gpt(**LLAMA)
        if first:
            int4.insert_fake_quant(model, 16)
        optimizer = run_mathqa.make_optimizer(cfg, model)
        if not first:
            int4.insert_fake_quant(model, 16)
        start = numbers(model)
        int4.switch(model, True)
        for step in range(3):
            model(ids(3, 16, seed=step), ids(3, 16, seed=step + 9)).backward()
            core.optimizer_step(optimizer, core.Precision("fp32", core.World()), 1.0, 1e-3)
        ended.append(numbers(model))
        assert all(not torch.equal(value, start[name]) for name, value in ended[-1].items())
    assert_same(*ended)


# convert


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_converted_model_has_the_logits_of_the_prepared_one(shape, dtype):
    model = prepared(dtype=dtype, **SHAPES[shape])
    state, layers = numbers(model), list(model.modules())
    small = int4.convert(model, 16)
    assert_close(logits(small), logits(model))
    assert_same(numbers(model), state)
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert not any(isinstance(m, nn.Linear) for m in small.modules()) and not small.training
    int4.switch(model, False)
    assert_far(logits(small), logits(model))
    assert_close(logits(int4.convert(random_gpt(dtype, **SHAPES[shape]), 16)), logits(small))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_converted_model_is_evaluated_like_the_prepared_one(shape):
    model, cfg = prepared(**SHAPES[shape]), SimpleNamespace(dtype="fp32", eval_batch=3)
    blocks = core.Blocks(ids(16 * 7 + 4).numpy(), 16)
    expected = core.evaluate(model, blocks, cfg, core.World())
    small = int4.convert(model, 16)
    for _ in range(2):  # and evaluation leaves nothing behind
        got = core.evaluate(small, blocks, cfg, core.World())
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert_close(logits(small), logits(model))


@pytest.mark.parametrize("group", [16, 32])
def test_packing_keeps_all_16_levels(group):
    model = random_gpt()
    layer = model.h[0].attn.c_attn
    wanted = torch.arange(32).add(torch.arange(96)[:, None]).mul(5) % 16 - 8  # (96, 32)
    assert all(len(set(row)) == 16 for row in wanted.unflatten(1, (-1, 16)).flatten(0, 1).tolist())
    with torch.no_grad():
        layer.weight.copy_(torch.where(wanted == -8, -7.5 * UP, wanted.float()))
        layer.weight.mul_(2.0 ** (torch.arange(96)[:, None] % 5))
    small = int4.convert(model, group).h[0].attn.c_attn
    assert small.packed_weight.shape == (96, 16) and small.packed_weight.dtype == torch.uint8
    unpacked = [
        [n for byte in row for n in (byte % 16 - 8, byte // 16 - 8)] for row in small.packed_weight.tolist()
    ]
    assert unpacked == wanted.tolist()
    assert_close(small.scales, (2.0 ** (torch.arange(96)[:, None] % 5)).expand(96, 32 // group))
    assert_close(small.matrix(), wanted * 2.0 ** (torch.arange(96)[:, None] % 5))


@pytest.mark.parametrize("function", [int4.insert_fake_quant, int4.convert])
@pytest.mark.parametrize(
    ("group", "layer"), [(20, "h.0.attn.c_attn"), (3, "h.0.attn.c_attn"), (24, "h.0.mlp.c_proj")]
)
def test_a_group_that_does_not_fit_is_one_line_that_names_the_layer(function, group, layer):
    model = random_gpt(n_embd=48, n_inner=100)
    with pytest.raises(core.UserError, match=rf"\b{group}\b.*{layer}") as error:
        function(model, group)
    assert "\n" not in str(error.value)
    if 48 % group == 0 and layer.endswith("c_attn"):
        assert "does not divide" not in str(error.value)  # 3 does


# the folder


@pytest.fixture
def tokenizer():
    return core.make_tokenizer("ascii", None)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(prepared model, its folder)"""
    model = prepared(**LLAMA)
    int4.save(int4.convert(model, 16), 16, tokenizer, tmp_path / "small")
    return model, tmp_path / "small"


FRESH = """
import torch
from lab.models import int4
torch.set_num_threads({threads})
model, tokenizer = int4.load({folder!r})
with torch.no_grad():
    torch.save((model(torch.load("ids.pt")), tokenizer("fox 0").input_ids), "there.pt")
"""


@pytest.mark.parametrize("shape", ["gpt2", "noam"])
def test_another_process_loads_the_same_model_bit_for_bit(shape, tmp_path, tokenizer):
    model = prepared(**SHAPES[shape])
    small, folder = int4.convert(model, 16), tmp_path / "deep" / "small"
    int4.save(small, 16, tokenizer, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "quantised.json",
        "tokenizer",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    loaded, _ = int4.load(folder)
    assert_same(numbers(loaded), numbers(small))
    torch.save(ids(3, 16), "ids.pt")
    code = FRESH.format(threads=torch.get_num_threads(), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there, words = torch.load("there.pt")
    assert torch.equal(there, logits(small)) and torch.equal(there, logits(loaded))
    assert words == tokenizer("fox 0").input_ids
    assert_close(there, logits(model))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_loaded_model_generates_what_the_prepared_one_does(temperature, saved):
    model, folder = saved
    loaded, _ = int4.load(folder)
    prompts, how = [[5, 7, 9], [1], [3] * 12], {"temperature": temperature, "seed": 3}
    texts = [core.generate(of, prompts, 40, **how) for of in (model, loaded)]
    assert texts[0] == texts[1] and len(texts[0][2]) == 40  # past block_size 16, too
    int4.switch(model, False)
    assert core.generate(model, prompts, 40, **how) != texts[0]
    assert not gpt.SECOND_LAYOUT


@pytest.mark.parametrize(
    "how", ["missing", "empty", "truncated", "garbage", "without a tensor", "other shapes"]
)
def test_a_damaged_model_file_is_one_line(how, saved):
    path = saved[1] / "model.safetensors"
    content, state = path.read_bytes(), safetensors.torch.load_file(path)
    path.unlink()
    if how in ("empty", "truncated", "garbage"):
        path.write_bytes({"empty": b"", "truncated": content[:-100], "garbage": b"\x07" * 5000}[how])
    elif how == "without a tensor":
        state.pop("h.1.attn.c_proj.scales")
        safetensors.torch.save_file(state, path)
    elif how == "other shapes":
        safetensors.torch.save_file(state | {"wte.levels": torch.zeros(5, 32, dtype=torch.int8)}, path)
    with pytest.raises(core.UserError, match="small") as error:
        int4.load(saved[1])
    assert "\n" not in str(error.value)


JUNK = {
    "missing": None,
    "empty": "",
    "truncated": '{"group": 16, "conf',
    "no object": "[]",
    "no config": '{"group": 16}',
    "config null": '{"group": 16, "config": null}',
    "unknown constant": '{"group": 16, "config": {"vocab_size": 97, "colour": 3}}',
    "another group": lambda stored: stored | {"group": 8},
    "group 0": lambda stored: stored | {"group": 0},
    "group in words": lambda stored: stored | {"group": "sixteen"},
    "another width": lambda stored: stored | {"config": stored["config"] | {"n_embd": 64}},
}


@pytest.mark.parametrize("how", JUNK)
def test_a_damaged_description_is_one_line(how, saved):
    path, content = saved[1] / "quantised.json", JUNK[how]
    stored = json.loads(path.read_text())
    path.unlink()
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content(stored)))
    with pytest.raises(core.UserError, match="small") as error:
        int4.load(saved[1])
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_loading_executes_nothing(saved, monkeypatch):
    folder = saved[1]
    for path in folder.rglob("*.*"):
        assert path.read_bytes()[:1] != b"\x80" and path.read_bytes()[:2] != b"PK", path
    torch.save(Bomb(), "bomb.pt")
    (folder / "model.safetensors").write_bytes(Path("bomb.pt").read_bytes())
    with pytest.raises(core.UserError):
        int4.load(folder)
    assert not Path("executed").exists()
    torch.load("bomb.pt", weights_only=False)  # the bomb would have worked
    assert Path("executed").is_dir()


def test_a_folder_without_its_tokenizer_is_refused(saved):
    for path in (saved[1] / "tokenizer").iterdir():
        path.unlink()
    (saved[1] / "tokenizer").rmdir()
    with pytest.raises(core.UserError, match="tokenizer"):
        int4.load(saved[1])


def test_what_is_saved_is_what_is_loaded_even_over_another_model(saved, tokenizer):
    other = int4.convert(random_gpt(seed=8, **LLAMA), 16)
    int4.save(other, 16, tokenizer, saved[1])
    assert_same(numbers(int4.load(saved[1])[0]), numbers(other))


# sizes


@pytest.mark.parametrize("group", [256, 32])
def test_the_full_model_takes_less_than_a_fifth(group):
    with torch.device("meta"):
        model = GPT(GPTConfig(50304, 512, n_layer=10, n_head=16, n_embd=1024, **LLAMA))
    small = int4.convert(model, group)
    matrices = 10 * (4 * 1024**2 + 3 * 1024 * 2816)
    expected = 50304 * (1024 + 4) + matrices // 2 + 4 * matrices // group + 4 * 21 * 1024
    assert bytes_of(model) == 4 * (50304 * 1024 + matrices + 21 * 1024)
    assert bytes_of(small) == expected <= 0.2 * bytes_of(model)


@pytest.mark.parametrize("group", [256, 32])
def test_the_file_is_as_large_as_computed(group, tmp_path, tokenizer):
    model = random_gpt(vocab_size=1000, n_embd=256, **LLAMA)
    small = int4.convert(model, group)
    int4.save(small, group, tokenizer, tmp_path / "small")
    written = (tmp_path / "small" / "model.safetensors").stat().st_size
    with torch.device("meta"):
        computed = bytes_of(int4.convert(GPT(model.config), group))
    assert computed == bytes_of(small) and computed <= written <= computed + 200 * len(small.state_dict())
    assert written <= 0.2 * bytes_of(model)


# --mode quantise


def parsed(*argv):
    return core.parse_config(
        run_mathqa.Config, run_mathqa.PRESETS, run_mathqa.SMOKE, "", [str(word) for word in argv]
    )


def here(*argv):
    """A run of run_mathqa.py in this process; its result.json."""
    run_mathqa.main(parsed("--out", "out", *argv), core.World())
    return result() if "quantise" not in argv else None


def quantised(folder, size=1):
    """(result.json, its folder) of --mode quantise."""
    argv = ["--smoke", "--mode", "quantise", "--run_folder", folder]
    if size == 1:
        here(*argv)
    else:
        assert launch("run_mathqa", *argv, size=size) == [0] * size, Path("out.txt").read_text()
    (small,) = folder.glob("quantised_*")
    return json.loads((small / "result.json").read_text()), small


def times(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_mode_quantise_keeps_the_model_and_its_figures_until_the_weights_change(capsys):
    own = here(*TINY)
    found, small = quantised(folder := newest())
    assert small.name == "quantised_32" and found["group"] == 32 and found["trained_for_it"] is False
    for kind in ("float", "int4"):
        assert {"test/loss", "test/answer_accuracy", "mb", "tokens_per_second"} <= found[kind].keys()
        assert found[kind]["tokens_per_second"] > 0
    for name in ("test/loss", "val/loss", "test/answer_accuracy"):
        assert math.isclose(found["float"][name], own[name], rel_tol=1e-6)
    assert found["int4"]["test/loss"] != own["test/loss"]
    assert math.isclose(found["int4"]["test/loss"], own["test/loss"], rel_tol=0.05)
    assert found["int4"]["mb"] == (small / "model.safetensors").stat().st_size / 1e6
    assert math.isclose(found["float"]["mb"], 4 * own["parameters"] / 1e6)
    model, words = int4.load(small)
    assert len(words) <= model.config.vocab_size
    text = capsys.readouterr().out
    assert "int4 by 32" in text and str(small) in text

    before = times(small)
    assert quantised(folder)[0] == found and times(small) == before

    more = [*TINY, "--max_steps", 18, "--test_weights", "best", "--resume_timestamp", folder.name[:15]]
    here(*more)
    assert newest() == folder and result()["steps"] == 18
    again, _ = quantised(folder, size=2)
    assert again["weights_sha256"] != found["weights_sha256"] and times(small) != before
    assert math.isclose(again["float"]["test/loss"], result()["test/loss"], rel_tol=1e-6)
    assert abs(again["int4"]["test/loss"] - result()["test/loss"]) < abs(
        found["int4"]["test/loss"] - result()["test/loss"]
    )
    assert_far(logits(int4.load(small)[0]), logits(model))


def test_a_run_that_trained_for_int4_has_the_figures_of_its_int4_model():
    own = here(*TINY, "--qat", "int4", "--qat_group", 16)
    found, small = quantised(newest())  # by the group it was trained for, not the call's 32
    assert small.name == "quantised_16" and found["group"] == 16 and found["trained_for_it"] is True
    for name in ("val/loss", "test/loss", "test/unigram_loss"):
        assert math.isclose(found["int4"][name], own[name], rel_tol=1e-5)
    assert found["int4"]["test/answer_accuracy"] == own["test/answer_accuracy"]
    assert found["float"]["test/loss"] != own["test/loss"]


@pytest.mark.parametrize(
    ("argv", "word"), [([], "--run_folder"), (["--run_folder", "nowhere"], "nowhere")], ids=["none", "absent"]
)
def test_mode_quantise_without_a_run_is_one_line(argv, word):
    with pytest.raises(core.UserError, match=word) as error:
        here("--smoke", "--mode", "quantise", *argv)
    assert "\n" not in str(error.value)


# the clock


BUDGET = 99.93  # seconds
SPEEDS = {  # of step n
    "even": lambda n: 0.25,
    "fast, then slow": lambda n: 0.1 if n < 200 else 0.8,
    "slow, then fast": lambda n: 0.8 if n < 60 else 0.1,
    "slow first step": lambda n: 20.0 if n == 0 else 0.2,
    "uneven": lambda n: 0.1 + 0.4 * (n * 7919 % 11) / 11,
}
CLOCKED = {
    "cosine": {"schedule": "cosine", "warmup": 0.05},
    "linear": {"schedule": "linear", "warmup": 0.1},
    "one_cycle": {"schedule": "one_cycle", "warmup": 0.3},
}


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """A Run that has not begun."""
    cfg = parsed("--smoke", "--mode", "finetune", "--out", tmp_path_factory.mktemp("clock"))
    with core.Run(cfg, core.World(), "run_mathqa.py") as one:
        yield one


@pytest.fixture
def clocked(one_run, monkeypatch):
    """make(max_minutes, lr=..., ...) -> (a fresh Run, now): its steps last as long as `now` is moved."""
    now = fake_clock(monkeypatch)

    def make(max_minutes, **constants):
        monkeypatch.setattr(
            one_run, "cfg", dataclasses.replace(one_run.cfg, max_minutes=max_minutes, **constants)
        )
        one_run.train_seconds = one_run.clock_share = 0.0
        one_run._steps_in_budget = None
        return one_run, now

    return make


def fake_clock(monkeypatch):
    """[seconds] that time.perf_counter gives to lab/run/folder.py."""
    now, real = [1000.0], ("time", "monotonic", "sleep")
    fake = SimpleNamespace(perf_counter=lambda: now[0], **{name: getattr(time, name) for name in real})
    monkeypatch.setattr(folder_module, "time", fake)
    return now


def path_of(run, now, total_steps, seconds, forecast):
    """[(lr, length)] of a stage as run_mathqa.fit goes through it; step n lasts seconds(n)."""
    model = nn.Linear(2, 2)
    run.forecast(model, torch.optim.AdamW(model.parameters()), total_steps, forecast, 1.0)
    step, path = 0, []
    while True:
        run.agree()
        if step >= total_steps or run.clock_share >= 1:
            return path
        length = run.schedule_length(step, total_steps)
        path.append((core.lr_at(run.cfg, step, length), length))
        now[0] += seconds(step)
        run.step_done(0.0, 0, 0)
        step += 1


@pytest.mark.parametrize("forecast", [0.05, 0.25, 3.0])
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("schedule", CLOCKED)
def test_a_schedule_ends_with_the_clock_whatever_the_speed(schedule, speed, forecast, clocked):
    one, now = clocked(BUDGET / 60, lr=1.0, **CLOCKED[schedule])
    path = path_of(one, now, run_mathqa.FOREVER, SPEEDS[speed], forecast)
    rates = [lr for lr, _ in path]
    spent = np.cumsum([SPEEDS[speed](n) for n in range(len(path))])
    assert spent[-1] >= BUDGET > spent[-2] and one.train_seconds == pytest.approx(spent[-1])
    assert path[0][1] == round(BUDGET / forecast) and rates[0] == core.lr_at(
        one.cfg, 0, round(BUDGET / forecast)
    )
    assert rates[-1] <= 0.02
    # the rate of a step is that of the share of the clock spent, up to a step's rounding
    for n in range(5, len(path)):
        share, room = spent[n - 1] / BUDGET, 1.5 / path[n][1]
        ends = [core.lr_at(one.cfg, round(1e6 * min(1, max(0, share + d))), 10**6) for d in (-room, 0, room)]
        peak = [1.0] if abs(share - one.cfg.warmup) <= 2 * room else []
        assert min(ends) - 0.02 <= rates[n] <= max(ends + peak) + 0.02
    peak = int(np.argmax(rates[20:])) + 20 if one.cfg.warmup * BUDGET > spent[19] else 20
    assert max(np.diff(rates[peak:])) <= 2.5 / min(length for _, length in path[peak:])
    if speed != "slow first step" and forecast <= 0.25:
        assert max(rates) > 0.98


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("schedule", CLOCKED)
def test_a_bound_in_steps_wins_where_it_comes_first(schedule, speed, clocked):
    one, now = clocked(BUDGET / 60, lr=1.0, **CLOCKED[schedule])
    path = path_of(one, now, 80, lambda n: SPEEDS[speed](n) / 2, 0.25)
    assert len(path) == 80 and one.clock_share < 1
    assert path[0][1] == 80 == path[-1][1]
    if speed in ("even", "fast, then slow", "uneven"):  # the clock never looked like the end
        assert path == [(core.lr_at(one.cfg, n, 80), 80) for n in range(80)]
    assert path[-1][0] == core.lr_at(one.cfg, 79, 80) <= 0.02


def test_without_a_clock_the_schedule_is_as_long_as_the_steps(clocked):
    one, now = clocked(None, lr=1.0, schedule="cosine")
    assert [length for _, length in path_of(one, now, 30, lambda n: 1e6, 0.1)] == [30] * 30


def test_the_length_is_what_the_spent_share_says(clocked):
    one, _ = clocked(1)
    for share, step, total, expected in (
        *(
            (0.25, 10, 10**9, 40),
            (0.25, 10, 30, 30),
            (0.999, 7, 10**9, 8),
            (0.5, 0, 10**9, 1),
            (0.3, 10, 10**9, 10 / 0.3),
        ),
    ):
        one.clock_share = share
        assert one.schedule_length(step, total) == expected


@pytest.mark.parametrize("schedule", CLOCKED)
def test_the_script_itself_anneals_by_the_clock(schedule, monkeypatch):
    now, taken = fake_clock(monkeypatch), []
    original = core.optimizer_step

    def slow_step(optimizer, *args, **kwargs):
        norm = original(optimizer, *args, **kwargs)
        taken.append(optimizer.param_groups[0]["lr"])
        now[0] += 0.5 if len(taken) < 30 else 2.0
        return norm

    everywhere(monkeypatch.setattr, optim, "optimizer_step", slow_step)
    constants = [word for name, value in CLOCKED[schedule].items() for word in (f"--{name}", value)]
    here(
        *TINY,
        "--max_steps",
        "none",
        "--max_minutes",
        1,
        "--lr",
        1e-3,
        *constants,
        "--final_eval",
        "--eval_every",
        100,
    )
    clocked = [row for row in metrics() if "clock/lr" in row]
    assert [row["clock/lr"] for row in clocked] == taken and result()["steps"] == len(taken) == 52
    assert clocked[-1]["clock/share"] == pytest.approx(58.5 / 60) and max(taken) >= 0.9e-3
    assert taken[-1] <= 0.05e-3 and max(np.diff(taken[int(np.argmax(taken)) :])) <= 0


def metrics(out="out"):
    return [json.loads(line) for line in (newest(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_stop_on_one_step_when_the_clock_is_out(size):
    found = run("run_mathqa", *TINY, "--max_steps", "none", "--max_minutes", 0.02, size=size)
    assert found["status"] == "finished" and found["steps"] > 0 and found["train_seconds"] >= 1.2
    rows = [row for row in metrics() if "clock/lr" in row]
    assert len(rows) == found["steps"] == rows[-1]["step"]
    peak, share = (
        json.loads((newest() / "config.json").read_text())["constants"]["lr"],
        rows[-1]["clock/share"],
    )
    progress = (share - 0.1) / 0.9 - 2 / len(rows)  # whole steps
    assert rows[-1]["clock/lr"] <= peak * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-9
    assert rows[-1]["clock/lr"] < 0.3 * peak
    assert "0.02 minutes of training are spent" in Path("out.txt").read_text()


UNBOUND = {
    "pretrain": ["--mode", "pretrain", "--text_documents", 60, "--pretrain_max_steps", "none"],
    "finetune": [*TINY[1:], "--max_steps", "none"],
}


@pytest.mark.parametrize("mode", UNBOUND)
def test_a_stage_that_nothing_ends_is_one_line(mode):
    with pytest.raises(core.UserError, match=r"nothing ends (pretraining|fine-tuning)") as error:
        here("--smoke", *UNBOUND[mode])
    assert "\n" not in str(error.value)
    assert ("--pretrain_max_minutes" in str(error.value)) == (mode == "pretrain")
    assert not list(newest_folders())


BOTH = [
    *("--smoke", "--mode", "both", "--max_documents", 300, "--text_documents", 60, "--n_embd", 32),
    *("--pretrain_max_steps", 3, "--pretrain_eval_every", 3, "--plain_blocks", 3),
]


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["--max_steps", "none"], "nothing ends"), (["--qat", "int4", "--qat_group", 48], "--qat_group 48")],
    ids=["unbound", "group"],
)
def test_a_mistake_of_the_second_stage_is_found_before_the_first(argv, word):
    with pytest.raises(core.UserError, match=word):
        here(*BOTH, *argv)
    assert not list(newest_folders())


def newest_folders(out="out"):
    return (path.parent for path in sorted(Path(out).glob("*/config.json")))


# the presets


DEFAULTS = {
    **{"data": "kinit/math_qa", "max_documents": None, "answer_format": "text", "loss_on_prompt": False},
    **{"max_length": 512, "pack": False, "text": "DKYoon/SlimPajama-6B", "text_column": "text"},
    **{"text_documents": None, "text_tokens": None, "tokenizer": "gpt2", "val_share": 0.0005},
    **{"test_share": 0.0005, "split_seed": 42, "block_size": 512, "n_layer": 10, "n_head": 16},
    **{"n_embd": 1024, "vocab_multiple": 64, "dropout": 0.0, "checkpointing": False, "init_from": None},
    **{"init_step": None, "method": "full", "lora_rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.0},
    **{"qat": "off", "qat_group": 256, "qat_start": 0.25, "pretrain_batch": 256},
    **{"pretrain_micro_batch": 64, "pretrain_max_steps": None, "pretrain_max_minutes": 180.0},
    **{"pretrain_lr": 8e-4, "pretrain_min_lr": 0.0, "pretrain_warmup": 0.3},
    **{"pretrain_schedule": "one_cycle", "pretrain_optimizer": "adamw", "pretrain_weight_decay": 0.1},
    **{"pretrain_eval_every": 2000, "pretrain_save_every": 500, "batch": 128, "micro_batch": None},
    **{"micro_tokens": 16384, "group_lengths": True, "epochs": None, "max_steps": None, "max_minutes": 60.0},
    **{"lr": 5e-5, "min_lr": 0.0, "warmup": 0.05, "schedule": "cosine", "cycle_beta1": True},
    **{"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0},
    **{"skip_spikes": False, "dtype": "auto", "compile": False, "seed": 0, "eval_batch": 64},
    **{"eval_every": 500, "eval_rows": 500, "answer_rows": 200, "sample_tokens": 24, "final_eval": True},
    **{"test_weights": "best"},
    **{"save_every": None, "keep": 2, "log_every": 25, "price_per_hour": None, "note": "", "plain": None},
    **{"plain_blocks": 100, "budgets": ("steps", "time"), "shares": ("0.5", "0.75", "0.9"), "seeds": 3},
    "arms": (
        *("full", "full,optimizer=lion,lr=1e-5,weight_decay=1,beta2=0.99", "lora,lr=5e-4", "loha,lr=5e-4"),
        *("lokr,lr=2e-3", "full,qat=int4"),
    ),
    **{"mode": "both", "run_folder": None, "out": None, "tag": "recommended", "resume_timestamp": None},
    **{"resume_step": None, "backend": "auto"},
}
NOAM = DEFAULTS | {
    **{"mode": "pretrain", "test_weights": "last", "eval_rows": 1536, "compile": True},
}
RESOLVED = {
    "recommended": DEFAULTS,
    "noam_wide4": NOAM | {"tag": "noam_wide4"},
    "noam_wide4_effective": NOAM | {"tag": "noam_wide4_effective", "pretrain_lr": 1e-3},
    "continue_noam": NOAM
    | {"tag": "continue_noam", "init_from": "newest", "pretrain_schedule": "cosine", "pretrain_lr": 8e-5}
    | {"pretrain_min_lr": 8e-6, "pretrain_warmup": 0.05, "pretrain_max_minutes": 45.0},
    "second_stage_full": DEFAULTS
    | {"tag": "second_stage_full", "mode": "finetune", "test_weights": "last", "loss_on_prompt": True}
    | {"group_lengths": False, "lr": 5e-6, "min_lr": 5e-7, "eval_rows": 1536, "compile": True},
}


def test_every_preset_is_written_down_here():
    assert run_mathqa.PRESETS.keys() == RESOLVED.keys()
    assert dataclasses.asdict(run_mathqa.Config()) | {"tag": "recommended"} == DEFAULTS


@pytest.mark.parametrize("preset", RESOLVED)
def test_a_preset_resolves_to_these_constants(preset):
    assert dataclasses.asdict(parsed("--preset", preset)) == RESOLVED[preset]


@pytest.mark.parametrize(("preset", "peak"), [("noam_wide4", 8e-4), ("noam_wide4_effective", 1e-3)])
def test_the_first_stage_of_a_preset_is_the_journal_s(preset, peak):
    cfg = run_mathqa.pretraining(parsed("--preset", preset))
    assert (cfg.lr, cfg.schedule, cfg.warmup, cfg.cycle_beta1) == (peak, "one_cycle", 0.3, True)
    assert (cfg.batch, cfg.micro_batch, cfg.batch // cfg.micro_batch, cfg.block_size) == (256, 64, 4, 512)
    assert (cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.max_minutes) == (10, 1024, 16, 180.0)
    assert (cfg.weight_decay, cfg.clip, cfg.beta1, cfg.beta2) == (0.1, 1.0, 0.9, 0.95)
    assert (cfg.optimizer, cfg.max_steps, cfg.epochs, cfg.method, cfg.qat) == (
        "adamw",
        None,
        None,
        "full",
        "off",
    )
    torch_s = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        torch_s, peak, total_steps=500, pct_start=0.3, cycle_momentum=False
    )
    for step in range(500):
        assert math.isclose(core.lr_at(cfg, step, 500), theirs.get_last_lr()[0], rel_tol=1e-6)
        torch_s.step()
        theirs.step()


def test_what_continues_noam_falls_from_a_tenth_of_its_rate_to_a_hundredth():
    first = run_mathqa.pretraining(parsed("--preset", "noam_wide4"))
    cfg = run_mathqa.pretraining(parsed("--preset", "continue_noam"))
    changed = {
        name: value
        for name, value in dataclasses.asdict(cfg).items()
        if value != getattr(first, name) and not name.startswith("pretrain_")
    }
    assert changed == {
        **{"init_from": "newest", "tag": "continue_noam", "schedule": "cosine", "lr": 8e-5, "min_lr": 8e-6},
        **{"warmup": 0.05, "max_minutes": 45.0},
    }
    rates = [core.lr_at(cfg, step, 1000) for step in range(1001)]
    assert math.isclose(max(rates), 8e-5) and np.argmax(rates) in (49, 50)
    assert math.isclose(rates[-1], 8e-6) and min(rates[50:]) == rates[-1]
    halfway = 8e-6 + (8e-5 - 8e-6) / 2
    assert math.isclose(rates[525], halfway, rel_tol=0.01)  # a cosine: the middle in the middle


@pytest.mark.parametrize("first", ["", "pretrain_"])
def test_one_cycle_has_no_lowest_rate(first):
    argv = [f"--{first}schedule", "one_cycle", f"--{first}min_lr"]
    with pytest.raises(core.UserError, match=rf"^--{first}min_lr 1e-05: one_cycle") as error:
        run_mathqa.Config(**{f"{first}schedule": "one_cycle", f"{first}min_lr": 1e-5})
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        parsed(*argv, 1e-5)
    assert getattr(parsed(*argv, 0), f"{first}schedule") == "one_cycle"
    other = parsed(f"--{first}schedule", "cosine", f"--{first}min_lr", 1e-5)
    assert getattr(other, f"{first}min_lr") == 1e-5
    if not first:  # nor has an arm of a study
        with pytest.raises(core.UserError, match="one_cycle"):
            run_mathqa.arm_config(run_mathqa.Config(min_lr=1e-6), "full,schedule=one_cycle")


# whose constants are whose


# Config's fields that are neither pretrain_... nor of one stage alone. A new constant belongs here, or in
# STAGE1_ONLY or STAGE2_ONLY: what is in none of these makes a study pretrain anew where only fine-tuning
# differs.
BOTH_STAGES = {
    # pretraining has its own: these are replaced by pretrain_...
    *("batch", "micro_batch", "max_steps", "max_minutes", "lr", "min_lr", "warmup", "schedule", "optimizer"),
    *("weight_decay", "eval_every", "save_every"),
    # the loop, the model, what is held out
    *("epochs", "micro_tokens", "cycle_beta1", "beta1", "beta2", "clip", "skip_spikes", "dtype", "compile"),
    *("seed", "split_seed", "dropout", "checkpointing", "eval_batch", "eval_rows", "final_eval", "keep"),
    *("test_weights", "log_every", "price_per_hour", "note"),
    # several runs, and the call
    *("arms", "budgets", "shares", "seeds", "mode", "run_folder", "out", "tag", "resume_timestamp"),
    *("resume_step", "backend"),
}


def test_every_constant_is_of_the_text_of_the_rows_or_of_both_stages():
    names = {field.name for field in dataclasses.fields(run_mathqa.Config)}
    first = {name for name in names if name.startswith("pretrain_")}
    kinds = [run_mathqa.STAGE1_ONLY, run_mathqa.STAGE2_ONLY, first, BOTH_STAGES]
    counted = Counter(name for kind in kinds for name in kind)
    assert counted.keys() == names and set(counted.values()) == {1}
    assert {name.removeprefix("pretrain_") for name in first} <= BOTH_STAGES


def matter(mode, **changes):
    """The constants by which a study knows a run again."""
    cfg = run_mathqa.Config(mode="study", **changes)
    one = run_mathqa.pretraining(cfg) if mode == "pretrain" else dataclasses.replace(cfg, mode=mode)
    study = run_mathqa.MathQAStudy(cfg, core.World(), Path(), None, None)
    return core.typed(run_mathqa.as_run(study, one, "x")).flags


def test_a_study_knows_a_pretraining_by_its_text_and_a_tuning_by_its_rows():
    text, rows = matter("pretrain"), matter("finetune")
    assert text & run_mathqa.STAGE2_ONLY == rows & run_mathqa.STAGE1_ONLY == set()
    free = core.MAY_CHANGE | core.CALL_CONSTANTS | run_mathqa.STUDY_CONSTANTS
    assert text == (BOTH_STAGES | run_mathqa.STAGE1_ONLY) - free
    assert rows == (BOTH_STAGES | run_mathqa.STAGE2_ONLY) - free


def test_a_study_from_new_weights_knows_a_tuning_by_its_shape_and_text_too():
    assert matter("finetune", init_from="new") >= run_mathqa.STAGE1_ONLY


# pretraining that goes on from a run


def weights(folder, step):
    return safetensors.torch.load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def first_and(more, *argv):
    """(first run's folder and result, folder and result of the one that goes on from it)"""
    first = here(*READ, "--test_weights", "last")
    folder = newest()
    return folder, first, here(*READ, "--test_weights", "last", "--init_from", more or folder, *argv)


@pytest.mark.parametrize("more", [None, "newest"], ids=["named", "newest"])
def test_pretraining_from_a_run_goes_on_with_its_weights(more):
    folder, first, then = first_and(more, "--pretrain_lr", 1e-4, "--pretrain_eval_every", 10)
    assert newest() != folder and first["steps"] == then["steps"] == 20
    losses = [row["val/loss"] for row in metrics() if "val/loss" in row]
    old = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    old = [row["val/loss"] for row in old if "val/loss" in row]
    assert math.isclose(losses[0], old[-1], rel_tol=1e-6) and losses[0] < old[0] - 0.1  # not a new model
    assert then["test/loss"] < first["test/loss"]  # and it has gone on learning
    stored = json.loads((newest() / "config.json").read_text())["constants"]
    assert stored["init_from"] == str(folder) and stored["mode"] == "pretrain"
    before, after = weights(folder, 20), weights(newest(), 20)
    assert before.keys() == after.keys() and all(not torch.equal(before[k], after[k]) for k in before)


def test_pretraining_from_a_run_may_begin_with_an_older_checkpoint():
    first = here(*READ, "--test_weights", "last", "--pretrain_save_every", 10)
    folder = newest()
    for step, same in ((10, False), (20, True)):
        then = here(*READ, "--test_weights", "last", "--init_from", folder, "--init_step", step,
                    "--pretrain_max_steps", 0)  # fmt: skip
        assert (then["weights_sha256"] == first["weights_sha256"]) == same
        assert_same(weights(newest(), 0), weights(folder, step))


def test_pretraining_from_a_run_wants_its_tokenizer_and_context():
    here(*READ)
    folder = newest()
    with pytest.raises(core.UserError, match=r"^--tokenizer bpe:300 is not that of") as error:
        here(*READ, "--init_from", folder, "--tokenizer", "bpe:300")
    assert "\n" not in str(error.value) and str(error.value).endswith(f"use {folder / 'tokenizer'}")
    with pytest.raises(core.UserError, match=r"^--block_size 65 is over the 64 of"):
        here(*READ, "--init_from", folder, "--block_size", 65)
    assert list(newest_folders()) == [folder]  # refused before anything is kept
    found = here(*READ, "--init_from", folder, "--tokenizer", folder / "tokenizer")  # as the line says
    assert found["steps"] == 20


@pytest.mark.parametrize(
    "how",
    [
        ["--preset", "continue_noam"],
        ["--init_from", "newest", "--tag", "more"],
    ],
    ids=["preset", "typed"],
)
def test_going_on_from_the_newest_run_is_done_once_however_often_it_is_asked(how):
    here(*READ, "--pretrain_max_steps", 2)
    for _ in range(3):
        here(*READ, *how, "--pretrain_max_steps", 2, "--resume_timestamp", "auto")
    assert len(list(newest_folders())) == 2


def test_there_is_nothing_newest_without_a_run():
    with pytest.raises(core.UserError, match=r"^--init_from newest: there is no finished pretraining run"):
        here(*READ, "--init_from", "newest")
    assert not list(newest_folders())


def test_the_second_stage_is_the_journal_s():
    cfg = parsed("--preset", "second_stage_full")
    assert (cfg.mode, cfg.method, cfg.schedule, cfg.max_minutes) == ("finetune", "full", "cosine", 60.0)
    assert (cfg.lr, cfg.min_lr, cfg.warmup) == (5e-6, 5e-7, 0.05) and math.isclose(cfg.min_lr, cfg.lr / 10)
    assert core.lr_at(cfg, 50, 1000) == 5e-6 and math.isclose(core.lr_at(cfg, 10**6, 10**6), 5e-7)


@pytest.mark.parametrize(("preset", "peak"), [("noam_wide4", 8e-4), ("noam_wide4_effective", 1e-3)])
@pytest.mark.parametrize("told", [False, True])
def test_the_peak_rate_of_a_pretraining_is_its_constant(preset, peak, told, monkeypatch):
    used, original = [], core.optimizer_step

    def watched(optimizer, *args, **kwargs):
        norm = original(optimizer, *args, **kwargs)
        used.append(tuple(group["lr"] for group in optimizer.param_groups))
        return norm

    everywhere(monkeypatch.setattr, optim, "optimizer_step", watched)
    here(*READ, "--preset", preset, *(["--pretrain_lr", 7e-4] if told else []))
    peak = 7e-4 if told else 5 * peak  # a smoke run learns five times as fast
    rates = [row["lr"] for row in metrics() if "lr" in row]
    assert len(rates) == 20 and math.isclose(max(rates), peak, rel_tol=1e-9) and np.argmax(rates) == 5
    assert used == [(rate,) * len(used[0]) for rate in rates]
    assert math.isclose(rates[0], peak / 25, rel_tol=1e-9) and rates[-1] < 1e-4 * peak
    stored = json.loads((newest() / "config.json").read_text())["constants"]
    assert math.isclose(stored["lr"], peak, rel_tol=1e-9) and stored["schedule"] == "one_cycle"
