"""LoHa and LoKr against peft's own layers, merging, checkpoints of adapters."""

import copy
import math
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from peft.tuners.lokr.layer import factorization
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from toys.adapters import (
    METHODS,
    NOAM,
    OPTIMIZERS,
    SHAPES,
    a_step,
    assert_near,
    assert_same,
    ids,
    moved,
    numbers,
    random_gpt,
)

import core
import gpt_scratch
import run_mathqa as script
from core import UserError, World
from lab.models import gpt, loha_lokr

FIRST = {"lora": {"B"}, "loha": {"W2b"}, "lokr": {"W1"}}  # zero at the start: the others have no slope yet
THEIRS = {
    "lora": {"A": "lora_A.default.weight", "B": "lora_B.default.weight"},
    "loha": {
        **{"W1a": "hada_w1_a.default", "W1b": "hada_w1_b.default"},
        **{"W2a": "hada_w2_a.default", "W2b": "hada_w2_b.default"},
    },
    "lokr": {
        **{"W1": "lokr_w1.default", "W2": "lokr_w2.default"},
        **{"W2a": "lokr_w2_a.default", "W2b": "lokr_w2_b.default"},
    },
}
LAYERS = [  # inputs, outputs, rank; LoKr's W2 is whole from half of its longer side on
    *[(24, 24, 2), (24, 24, 3), (24, 72, 4), (24, 72, 5), (60, 24, 3), (24, 13, 6), (24, 13, 7), (7, 64, 1)],
]
LOW = {(24, 24, 2), (24, 72, 4), (60, 24, 3), (24, 13, 6), (7, 64, 1)}


def randomise(module, seed=5):
    """As after a training: nothing is zero any more."""
    torch.manual_seed(seed)
    for layer in core.adapted(module).values():
        for weight in layer.tensors().values():
            nn.init.normal_(weight, std=0.3)
    return module


def adapted_gpt(method, rank=4, alpha=7, dtype=torch.float32, **config):
    """With trained adapters; rank 4 gives LoKr both kinds of W2."""
    model = random_gpt(dtype, **config)
    loha_lokr.add_adapters(model, method, rank, alpha)
    return randomise(model)


def new_layer(method, base, rank, alpha):
    if method == "lora":
        layer = core.LoRALinear(base, rank, alpha / rank)
        layer.initialise("fan_in")
        return layer
    return {"loha": loha_lokr.LoHaLinear, "lokr": loha_lokr.LoKrLinear}[method](base, rank, alpha / rank)


def frozen_base(inputs, outputs, bias=True):
    torch.manual_seed(1)
    return gpt.Linear(inputs, outputs, bias).requires_grad_(False)


def trained_layer(method, inputs, outputs, rank, bias=True, dtype=torch.float64):
    layer = new_layer(method, frozen_base(inputs, outputs, bias), rank, alpha=7).to(dtype)
    return randomise(layer)


def peft_on(method, model, rank, alpha, targets):
    """The model, its layers wrapped in peft's own."""
    kind = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[method]
    config = kind(r=rank, target_modules=targets, **{"lora_alpha" if method == "lora" else "alpha": alpha})
    return peft.inject_adapter_in_model(config, model)


def beside_peft(method, inputs, outputs, rank, bias=True):
    """Our layer and peft's on the same base; the same generator drew both."""
    base = frozen_base(inputs, outputs, bias)
    torch.manual_seed(3)
    alpha = 1.75 * rank  # peft's LoHa keeps the multiplier in fp32
    theirs = peft_on(method, nn.ModuleDict({"layer": copy.deepcopy(base)}), rank, alpha, ["layer"])["layer"]
    torch.manual_seed(3)
    return new_layer(method, base, rank, alpha), theirs


@torch.no_grad()
def copy_across(method, ours, theirs):
    for name, p in ours.tensors().items():
        theirs.get_parameter(THEIRS[method][name]).copy_(p)


@torch.no_grad()
def logits(model):
    return model(ids(3, 16))


def assert_far(got, expected):
    assert (got - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(("inputs", "outputs", "rank"), LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_new_tensors_are_those_that_peft_draws(method, inputs, outputs, rank):
    ours, theirs = beside_peft(method, inputs, outputs, rank)
    own = ours.tensors()
    trains = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {THEIRS[method][name] for name in own} == trains
    assert all(p.requires_grad and p.is_leaf for p in own.values())
    for name, p in own.items():
        reference = theirs.get_parameter(THEIRS[method][name])
        assert p.shape == reference.shape
        if method == "lora":  # whose layers peft draws twice: A's numbers are in test_lora.py
            assert p.any() == reference.any()
        else:
            assert torch.equal(p, reference)
    assert {name for name, p in own.items() if not p.any()} == FIRST[method]
    assert not ours.delta().any()


@pytest.mark.parametrize("method", METHODS)
def test_new_tensors_are_uniform_within_one_over_the_root_of_their_columns(method):
    torch.manual_seed(0)
    layer = new_layer(method, frozen_base(400, 900), 7, 7)
    for name, p in layer.tensors().items():
        bound, wide = 1 / math.sqrt(p.shape[1]), p.detach().abs()
        if name not in FIRST[method]:
            assert 0.95 * bound < wide.max() <= bound * (1 + 1e-6), name
            assert wide.mean() == pytest.approx(bound / 2, rel=0.15), name  # of 140 draws and more


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("inputs", "outputs", "rank"), LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_its_gradients_and_its_merged_weight_are_pefts(method, inputs, outputs, rank, bias):
    ours, theirs = beside_peft(method, inputs, outputs, rank, bias)
    ours, theirs = randomise(ours.double()), theirs.double()
    copy_across(method, ours, theirs)
    torch.manual_seed(9)
    x = torch.randn(5, 3, inputs, dtype=torch.float64, requires_grad=True)
    again, slope = x.detach().clone().requires_grad_(), torch.randn(5, 3, outputs, dtype=torch.float64)
    got, expected = ours(x), theirs(again)
    assert_near(got, expected, 1e-12)
    assert_far(got, ours.base(x))
    got.backward(slope)
    expected.backward(slope)
    assert_near(x.grad, again.grad, 1e-12)
    for name, p in ours.tensors().items():
        assert_near(p.grad, theirs.get_parameter(THEIRS[method][name]).grad, 1e-12)
    assert ours.base.weight.grad is None and (not bias or ours.base.bias.grad is None)
    assert_near(ours.delta(), theirs.get_delta_weight("default"), 1e-12)
    merged = ours.base.weight + ours.delta()
    theirs.merge()
    assert_near(merged, theirs.base_layer.weight, 1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "rank"), LAYERS)
def test_W2_of_lokr_is_of_low_rank_below_half_of_its_longer_side(inputs, outputs, rank):
    names = set(new_layer("lokr", frozen_base(inputs, outputs), rank, 7).tensors())
    assert names == ({"W1", "W2a", "W2b"} if (inputs, outputs, rank) in LOW else {"W1", "W2"})


@pytest.mark.parametrize(
    ("n", "factors"),
    [(3072, (48, 64)), (2816, (44, 64)), (1024, (32, 32)), (50257, (29, 1733)), (97, (1, 97)), (1, (1, 1))],
)
def test_factors_are_as_near_as_can_be(n, factors):
    assert loha_lokr.near_factors(n) == factors


def test_factors_are_pefts():
    for n in range(1, 500):
        assert loha_lokr.near_factors(n) == factorization(n), n


@pytest.mark.parametrize(("inputs", "outputs", "rank"), LAYERS)
def test_a_lokr_layer_is_a_product_with_the_kronecker_product(inputs, outputs, rank):
    layer = trained_layer("lokr", inputs, outputs, rank)
    W2 = layer.W2a @ layer.W2b if layer.low_rank else layer.W2
    whole = layer.base.weight + 7 / rank * torch.kron(layer.W1, W2)
    torch.manual_seed(9)
    for size in [(inputs,), (4, inputs), (2, 3, inputs)]:
        x = torch.randn(size, dtype=torch.float64)
        assert_near(layer(x), F.linear(x, whole, layer.base.bias), 1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_finite_differences(method, rank, bias):
    layer = trained_layer(method, 6, 4, rank, bias)  # LoKr: W2 is 2 x 3, whole at rank 2
    names, tensors = zip(*layer.tensors().items(), strict=True)
    torch.manual_seed(9)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *(t.detach().requires_grad_() for t in tensors)))


@pytest.mark.parametrize("method", METHODS)
def test_an_input_without_gradient_changes_no_other_gradient(method):
    layer, x = trained_layer(method, 24, 72, 4), torch.randn(5, 24, dtype=torch.float64)
    layer(x.clone().requires_grad_()).square().sum().backward()
    expected = {name: p.grad for name, p in layer.tensors().items()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert x.grad is None
    assert_same({name: p.grad for name, p in layer.tensors().items()}, expected)


class Sizes(TorchDispatchMode):
    """Numbers in the largest storage that an operation made, of those that hold no base weight."""

    def __init__(self, base):
        super().__init__()
        self.known, self.largest = base.weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


def pass_through(forward, layer, rows=3):
    """(largest new storage of forward and backward, largest tensor kept between them but the base weight)"""
    x, kept = torch.randn(rows, layer.base.in_features, requires_grad=True), [0]

    def keep(t):
        if t.untyped_storage().data_ptr() != layer.base.weight.untyped_storage().data_ptr():
            kept.append(t.numel())
        return t

    with Sizes(layer.base) as sizes:
        with saved_tensors_hooks(keep, lambda t: t):
            loss = forward(x).square().sum()
        loss.backward()
    assert all(p.grad is not None for p in (x, *layer.tensors().values()))
    return sizes.largest, max(kept)


@pytest.mark.parametrize("rank", [4, 16], ids=["low", "whole"])
def test_lokr_never_makes_the_kronecker_product(rank):
    layer = trained_layer("lokr", 256, 512, rank, dtype=torch.float32)
    assert layer.low_rank == (rank == 4)
    made, kept = pass_through(layer, layer)
    assert max(made, kept) <= 3 * 16 * 32  # the rows, or a factor
    made, kept = pass_through(lambda x: F.linear(x, layer.base.weight + layer.delta()), layer)
    assert min(made, kept) >= 256 * 512  # which is seen where it is made


def test_loha_keeps_nothing_as_large_as_the_weight_for_the_backward():
    layer = trained_layer("loha", 256, 512, 4, dtype=torch.float32)
    made, kept = pass_through(layer, layer)
    assert kept == 4 * 512 and made == 256 * 512

    def naive(x):
        return F.linear(x, layer.base.weight + (layer.W1a @ layer.W1b) * (layer.W2a @ layer.W2b))

    assert pass_through(naive, layer)[1] == 256 * 512


@pytest.mark.parametrize("method", METHODS)
def test_bf16_gives_gradients_in_fp32_near_those_of_fp32(method):
    layer = trained_layer(method, 12, 24, 2, dtype=torch.float32)
    torch.manual_seed(9)
    x, slope = torch.randn(4, 12), torch.randn(4, 24)

    def passed(enabled):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(leaf)
        out.backward(slope.to(out.dtype))
        return out, [leaf.grad, *(p.grad for p in layer.tensors().values())]

    half, halves = passed(True)
    whole, wholes = passed(False)
    assert half.dtype == torch.bfloat16
    assert_near(half.float(), whole, 2e-2)  # 8 bits, a few roundings in a row
    for got, expected in zip(halves, wholes, strict=True):
        assert got.dtype == torch.float32
        assert_near(got, expected, 2e-2)
        assert not torch.equal(got, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_gradients_and_merged_weights_of_a_model_are_pefts(shape, method):
    ours = adapted_gpt(method, **SHAPES[shape])
    plain = random_gpt(**SHAPES[shape])
    names = list(core.adapted(ours))
    theirs = peft_on(method, copy.deepcopy(plain), 4, 7, names)
    for name, layer in core.adapted(ours).items():
        copy_across(method, layer, theirs.get_submodule(name))
    assert_near(logits(ours), logits(theirs), 1e-5)  # fp32
    assert_far(logits(ours), logits(plain))
    for model in (ours, theirs):
        model(ids(3, 16), ids(3, 16, seed=2)).backward()
    for name, layer in core.adapted(ours).items():
        for own, p in layer.tensors().items():
            reference = theirs.get_submodule(name).get_parameter(THEIRS[method][own]).grad
            assert_near(p.grad, reference, 1e-5)
    merged = script.merged(ours).state_dict()
    for name in names:
        layer = theirs.get_submodule(name)
        layer.merge()
        assert_near(merged[f"{name}.weight"], layer.base_layer.weight.detach(), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_linear_layer_of_the_blocks_gets_one_adapter_and_nothing_else_trains(method):
    model = random_gpt(**NOAM)
    before, layers = logits(model), ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_gate", "mlp.c_proj"]
    names = loha_lokr.add_adapters(model, method, 4, 7)
    assert sorted(names) == [f"h.{i}.{layer}" for i in range(2) for layer in layers]
    assert list(core.adapted(model)) == names
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == set(core.Adapters(model).state_dict())
    assert {layer.multiplier for layer in core.adapted(model).values()} == {7 / 4}
    assert torch.equal(logits(model), before)  # training begins at the base
    assert_far(logits(randomise(model)), before)


def test_dropout_is_of_what_lora_reads():
    model = random_gpt(**NOAM)
    loha_lokr.add_adapters(model, "lora", 4, 7, dropout=0.5)
    assert {(layer.dropout.p, len(layer.parts)) for layer in core.adapted(model).values()} == {(0.5, 1)}


def counts(method, rank):
    cfg = script.Config(method=method, lora_rank=rank)
    tokens = SimpleNamespace(unigram=range(50257))  # only its length matters
    with torch.device("meta"):
        model = gpt_scratch.build_model(gpt_scratch.Config(**gpt_scratch.NOAM_WIDE4), tokens, core.World())
    total = core.count_parameters(model)
    loha_lokr.add_adapters(model, method, rank, cfg.lora_alpha)
    assert all(p.is_meta for p in model.parameters())
    return total, core.count_parameters(model)[1]


@pytest.mark.parametrize(
    ("method", "rank", "expected"),
    [
        ("lora", 4, 706_560), ("lora", 8, 1_413_120), ("lora", 16, 2_826_240),
        ("loha", 4, 1_413_120), ("loha", 8, 2_826_240), ("loha", 16, 5_652_480),
        ("lokr", 4, 85_760), ("lokr", 8, 103_680), ("lokr", 16, 139_520),
    ],
)  # fmt: skip
def test_the_journals_model_has_this_many_parameters_of_which_these_train(method, rank, expected):
    assert counts(method, rank) == ((179_983_360, 179_983_360), expected)


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_blocks_give_the_same_gradients(method):
    def slopes(checkpointing):
        model = adapted_gpt(method, checkpointing=checkpointing, **NOAM).train()
        model(ids(3, 16), ids(3, 16, seed=2)).backward()
        return {name: p.grad for name, p in core.Adapters(model).named_parameters()}

    assert_same(slopes(True), slopes(False))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_model_has_no_adapters_and_the_same_logits(shape, method):
    model = adapted_gpt(method, dtype=torch.float64, **SHAPES[shape])
    before, merged = numbers(model), script.merged(model)
    assert not core.adapted(merged) and merged.config == model.config
    assert_near(logits(merged), logits(model), 1e-11)
    assert_far(logits(merged), logits(random_gpt(torch.float64, **SHAPES[shape])))
    assert_same(numbers(model), before)


def test_without_adapters_the_merged_model_is_the_model():
    model = random_gpt(**NOAM)
    assert_same(numbers(script.merged(model)), numbers(model))


@pytest.mark.parametrize("method", METHODS)
def test_adapted_and_merged_models_say_the_same(method):
    model = adapted_gpt(method, **NOAM)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]

    def said(model):
        return core.generate(model, prompts, 20, temperature=0)

    assert said(model) == said(script.merged(model)) != said(random_gpt(**NOAM))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_come_back_from_their_file(tmp_path, method):
    model = adapted_gpt(method, **NOAM)
    state = core.Adapters(model).state_dict()
    safetensors.torch.save_file(state, tmp_path / "adapters.safetensors")
    again = random_gpt(**NOAM)
    loha_lokr.add_adapters(again, method, 4, 7)
    core.Adapters(again).load_state_dict(safetensors.torch.load_file(tmp_path / "adapters.safetensors"))
    assert_same(numbers(again), numbers(model))
    assert torch.equal(logits(again), logits(model))
    assert all(p.requires_grad and p.is_leaf for p in core.Adapters(again).parameters())


OTHERS = [(one, 4, other, 4) for one in METHODS for other in METHODS if one != other]
OTHERS += [(method, rank, method, 6 - rank) for method in METHODS for rank in (2, 4)]


@pytest.mark.parametrize(("one", "rank", "other", "its_rank"), OTHERS)
def test_adapters_of_another_method_or_rank_are_refused(one, rank, other, its_rank):
    model, misfit = adapted_gpt(one, rank, **NOAM), adapted_gpt(other, its_rank, **NOAM)
    before = numbers(model)
    with pytest.raises(UserError, match="adapters do not fit"):
        core.Adapters(model).load_state_dict(core.Adapters(misfit).state_dict())
    assert_same(numbers(model), before)


def a_model(method, optimizer, **changes):
    """(Config, model as it is trained, its adapters); weights do not decay, so that no slope is no move."""
    cfg = script.Config(method=method, optimizer=optimizer, weight_decay=0.0, lora_rank=4, **changes)
    return cfg, *script.tuned(cfg, random_gpt(**NOAM).train(), World())


def first_to_move(method, names):
    return {name for name in names if name.rpartition(".")[2] in FIRST[method]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_zero_tensor_moves_at_the_first_step_all_at_the_second_and_the_base_never(method, optimizer):
    cfg, model, trained = a_model(method, optimizer)
    of = script.make_optimizer(cfg, model)
    held = [id(p) for group in of.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trained.parameters())
    names, base, before = set(trained.state_dict()), core.base_weights(model), numbers(trained)
    still = {name: value.clone() for name, value in base.items()}
    a_step(model, of)
    assert moved(before, numbers(trained)) == first_to_move(method, names) < names
    a_step(model, of)
    assert moved(before, numbers(trained)) == names
    assert_same(core.base_weights(model), still)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_made_before_the_adapters_would_move_nothing(method, optimizer):
    """The original's: it is what the test above tells from the right order."""
    cfg = script.Config(method=method, optimizer=optimizer, weight_decay=0.0, lora_rank=4)
    model = random_gpt(**NOAM).train()
    of = script.make_optimizer(cfg, model)
    model, _ = script.tuned(cfg, model, World())
    before = numbers(model)
    for _ in range(2):
        a_step(model, of)
    assert not moved(before, numbers(model))


@pytest.mark.parametrize("method", ["full", *METHODS])
def test_a_checkpoint_holds_the_adapters_alone_or_the_model(method):
    _, model, trained = a_model(method, "adamw")
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.state_dict()) == own
    assert bool(core.adapted(model)) == (method != "full")
    assert (trained is model) == (method == "full")


def test_the_seed_decides_how_adapters_begin():
    states = [numbers(a_model("loha", "adamw", seed=seed)[2]) for seed in (0, 0, 1)]
    assert_same(states[0], states[1])
    assert moved(states[0], states[2]) == {n for n in states[0] if not n.endswith(".W2b")}


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_have_the_dtype_of_the_training(method, dtype):
    _, model, _ = a_model(method, "adamw", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, f"float{dtype[2:]}")}
