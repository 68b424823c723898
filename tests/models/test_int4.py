"""int4 and int8 numbers against slow loops; training that knows of them."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys.quantise import (
    LLAMA,
    SHAPES,
    assert_close,
    assert_far,
    assert_same,
    ids,
    logits,
    numbers,
    prepared,
    random_gpt,
)

import core
import run_mathqa
from lab.models import int4

EPS = np.float32(2.0**-23)
DTYPES = (torch.float32, torch.float64)
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
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
    cfg = SimpleNamespace(optimizer=kind, weight_decay=0.1, beta1=0.9, beta2=0.95, lora_plus=1.0)
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
