"""DoRA, PiSSA, LoRA+, adapters of some matrices only: all against peft, on GPT-2 and the Llama family."""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys.gpt import FAMILY, GROUPED, ids, random_gpt, transformers_model

import core
from core import UserError
from lab.models import gpt, gpt_formats, lora, lora_layers, lora_peft
from lab.train.cpu import linear

KINDS = {
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "both": {"dora": True, "init": "pissa", "scaling": "alpha/sqrt(r)"},
    "some": {"targets": "q,v,down"},
    "some dora": {"targets": "k,v,o", "dora": True},
    "one": {"targets": "v", "last_layers": 1, "init": "pissa"},
    "patterns": {"rank_pattern": "attn.c_attn=3,h.1.mlp=2", "alpha_pattern": "h.0=5"},
    "whole": {"parts": 1, "dora": True},
}


def train(model, seed=5):
    """As after a training: every number that trains has moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return model.eval()


@torch.no_grad()
def logits(model):
    out = model(ids(3, 16))
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_near(got, expected, share=1e-5):
    """Relative to the largest."""
    assert got.shape == expected.shape and expected.abs().max() > 0
    assert (got - expected).abs().max() <= share * expected.abs().max()


def assert_far(got, expected):
    assert (got - expected).abs().max() > 0.01 * expected.abs().max()


def base_of(folder, name):
    kind, changes = FAMILY[name]
    transformers_model(kind, **changes).save_pretrained(folder)
    return lambda: gpt_formats.load_pretrained(str(folder)).eval()


def their_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


CASES = [  # all but the first two in CI alone
    *[("gpt2", "both"), ("llama 3", "some dora"), ("qwen 2", "dora"), ("qwen 3", "pissa")],
    *[("smollm 3", "one"), ("llama 3", "patterns"), ("llama 3", "whole")],
    *[("gpt2", kind) for kind in ("dora", "pissa", "some", "some dora", "whole")],
]


def slow_from(cases, first):
    return [pytest.param(*case, marks=pytest.mark.slow) if i >= first else case
            for i, case in enumerate(cases)]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), slow_from(CASES, 2))
def test_peft_computes_our_logits_merges_alike_and_our_adapters_come_back(tmp_path, name, kind):
    open_base = base_of(tmp_path / "base", name)
    model = open_base()
    before = logits(model)
    core.add_lora(model, 4, 7, **KINDS[kind])
    assert_near(logits(model), before)
    expected = logits(train(model))
    assert_far(expected, before)
    lora_peft.save_peft(model, tmp_path / "adapter", "base")
    theirs = peft.PeftModel.from_pretrained(their_base(tmp_path / "base"), tmp_path / "adapter").eval()
    assert_near(logits(theirs), expected)
    again = open_base()
    lora_peft.load_peft(again, tmp_path / "adapter")
    assert_near(logits(again), expected)
    if kind in ("dora", "some", "patterns"):  # the others come back in another form
        ours, other = core.Adapters(model).state_dict(), core.Adapters(again).state_dict()
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[name], other[name]) for name in ours)
    merged = core.merge_lora(model)
    assert_near(logits(merged), expected)
    theirs = theirs.merge_and_unload()
    wanted = gpt_formats.from_theirs(theirs.state_dict(), model.config, FAMILY[name][0])
    for weight, value in merged.state_dict().items():
        assert_near(value, wanted[weight])


def peft_trained(folder, base, **changes):
    """A folder of adapters that peft has made; its model."""
    torch.manual_seed(7)
    theirs = their_base(base)
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 7} | changes,
        fan_in_fan_out=theirs.config.model_type == "gpt2",
    )
    theirs = train(peft.get_peft_model(theirs, config), seed=7)
    theirs.save_pretrained(folder, save_embedding_layers=False)
    return theirs


ATTENTION = ["q_proj", "v_proj"]  # what peft adapts in a Llama if it is told nothing


THEIRS = [
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"}),
    ("llama 3", {"target_modules": ATTENTION}),
    ("llama 3", {"target_modules": "all-linear", "use_dora": True}),
    ("qwen 3", {"target_modules": [*ATTENTION, "down_proj"], "init_lora_weights": "pissa"}),
    (
        "qwen 2",
        {"target_modules": "all-linear", "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    ),
    ("tinyllama", {"target_modules": ["k_proj", "lm_head"], "use_rslora": True}),
]


@pytest.mark.parametrize(("name", "changes"), slow_from(THEIRS, 1))
def test_we_compute_the_logits_of_what_peft_trained_and_it_goes_out_again(tmp_path, name, changes):
    model = base_of(tmp_path / "base", name)()
    theirs = peft_trained(tmp_path / "theirs", tmp_path / "base", **changes)
    before, expected = logits(model), logits(theirs)
    lora_peft.load_peft(model, tmp_path / "theirs")
    assert_near(logits(model), expected)
    assert_far(expected, before)
    assert_near(logits(core.merge_lora(model)), expected)
    lora_peft.save_peft(model, tmp_path / "ours", "base")
    again = peft.PeftModel.from_pretrained(their_base(tmp_path / "base"), tmp_path / "ours").eval()
    assert_near(logits(again), expected)


def test_matrices_of_one_layer_with_several_ranks_are_refused_by_name(tmp_path):
    model = base_of(tmp_path / "base", "llama 3")()
    peft_trained(tmp_path / "theirs", tmp_path / "base", target_modules=ATTENTION, rank_pattern={"v_proj": 2})
    with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn by several ranks or alphas: merge it"):
        lora_peft.load_peft(model, tmp_path / "theirs")
    assert not core.adapted(model)


def layers_beside_peft(dora, init, bias=True, dtype=torch.float64):
    """(ours, peft's) trained layer of the same numbers, and the product that PiSSA takes off the base."""
    torch.manual_seed(1)
    base = gpt.Linear(24, 36, bias).requires_grad_(False)
    settings = {"use_dora": dora, "init_lora_weights": "pissa" if init == "pissa" else True}
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["layer"], **settings)
    theirs = nn.ModuleDict({"layer": copy.deepcopy(base)})
    theirs = peft.inject_adapter_in_model(config, theirs)["layer"]
    kind = lora_layers.DoRALinear if dora else lora_layers.LoRALinear
    ours = kind(base, 4, 7 / 4)
    ours.initialise(init)
    if init == "pissa":
        assert_near(ours.B @ ours.A, theirs.lora_B.default.weight @ theirs.lora_A.default.weight)
    ours, theirs = train(ours.to(dtype)), theirs.to(dtype)
    with torch.no_grad():
        for name, p in their_parameters(ours, theirs):
            p.copy_(ours.get_parameter(name))
        if init == "pissa":  # which peft computes in fp32
            theirs.base_layer.weight.copy_(ours.base.weight - ours.multiplier * ours.B0 @ ours.A0)
    return ours, theirs


def their_parameters(ours, theirs):
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    names |= {"magnitude": "lora_magnitude_vector.default.weight"} if hasattr(ours, "magnitude") else {}
    return [(name, theirs.get_parameter(their)) for name, their in names.items()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dora", "init"), [(True, "fan_in"), (False, "pissa"), (True, "pissa")])
def test_a_layer_has_pefts_outputs_and_gradients(dora, init, bias):
    ours, theirs = layers_beside_peft(dora, init, bias)
    x = torch.randn(5, 3, 24, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = ours(mine), theirs(other)
    assert_near(out, wanted, 1e-12)
    slope = torch.randn_like(out)
    out.backward(slope)
    wanted.backward(slope)
    assert_near(mine.grad, other.grad, 1e-12)
    for name, p in their_parameters(ours, theirs):
        assert_near(ours.get_parameter(name).grad, p.grad, 1e-12)
    assert ours.base.weight.grad is None and (ours.A0 is None or ours.A0.grad is None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_head_and_its_gradients_are_those_of_the_logits(kind):
    model = random_gpt(**GROUPED, tie_head=False)
    how = {name: value for name, value in KINDS[kind].items() if name != "last_layers"}
    core.add_lora(model, 4, 7, head=True, **how)
    train(model)
    x, labels = ids(3, 16), ids(3, 16, seed=2)
    labels[1, 9:] = core.IGNORE_INDEX
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted = core.sum_cross_entropy(model(x).flatten(0, 1), labels.flatten())
    loss = model(x, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    slopes = torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights)
    for mine, reference in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)


def test_dora_begins_at_the_base_to_the_bit_and_a_row_of_zeros_does_not_divide_by_it():
    model = random_gpt(dtype=torch.float32, tie_head=False)
    with torch.no_grad():
        model.lm_head.weight[20:] = 0
    before = logits(model)
    core.add_lora(model, 4, 7, head=True, dora=True)
    assert torch.equal(logits(model), before)
    model(ids(3, 16), ids(3, 16, seed=2)).backward()
    assert all(torch.isfinite(p.grad).all() for p in core.Adapters(model).parameters())


@pytest.mark.parametrize("kind", ["dora", "pissa", "both"])
def test_dropout_is_of_what_the_trained_product_reads_alone(kind):
    how = {name: value for name, value in KINDS[kind].items() if name != "scaling"}
    dropped, whole = (random_gpt() for _ in range(2))
    for model, dropout in ((dropped, 1.0), (whole, 0.0)):
        torch.manual_seed(3)
        core.add_lora(model, 4, 7, dropout=dropout, **how)
        train(model).train()
    with torch.no_grad():
        for layer in core.adapted(whole).values():
            norms = layer.norms() if hasattr(layer, "norms") else None
            layer.A.zero_()  # as if all that A reads were dropped
            if norms is not None:
                layer.norms = lambda norms=norms: norms
    assert_near(logits(dropped), logits(whole), 1e-12)


def test_a_base_held_in_bf16_is_what_autocast_makes_of_it_anyway():
    out = []
    for narrow in (False, True):
        model = random_gpt(dtype=torch.float32, **GROUPED)
        core.add_lora(model, 4, 7, init="pissa", targets="q,v,up")
        train(model)
        core.narrow_base(model, "bf16" if narrow else "fp32")
        with torch.autocast("cpu", torch.bfloat16):
            out.append(logits(model))
    assert torch.equal(*out)


def test_doras_lengths_of_all_rows_are_there_beside_a_base_held_in_bf16():
    model = random_gpt(dtype=torch.float32)
    core.add_lora(model, 4, 7, targets="q,v", dora=True)
    layer = model.h[0].attn.c_attn
    wanted = torch.linalg.vector_norm(layer.base.weight, dim=1)
    core.narrow_base(model, "bf16")
    torch.testing.assert_close(layer.magnitudes(), wanted, rtol=2**-8, atol=0)  # of bf16


def test_what_a_checkpoint_of_pissa_holds_is_exact_whatever_another_machine_makes_of_the_base():
    first, second = (random_gpt(dtype=torch.float32) for _ in range(2))
    core.add_lora(first, 4, 7, init="pissa")
    base = core.base_weights(first)
    assert base.keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in base.items())
    core.add_lora(second, 4, 7, init="pissa")
    train(first)
    for p in core.Adapters(second).parameters():  # another LAPACK
        p.data.mul_(-1.001)
    core.Adapters(second).load_state_dict(core.Adapters(first).state_dict())
    assert torch.equal(logits(second), logits(first))
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B"}


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_has_the_rates_of_pefts_groups(tmp_path, dora):
    model = base_of(tmp_path / "base", "llama 3")()
    core.add_lora(model, 4, 7, dora=dora)
    theirs = peft.get_peft_model(
        their_base(tmp_path / "base"),
        peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", use_dora=dora),
    )
    theirs_too = {"lr": 0.01, "loraplus_lr_ratio": 16.0}
    groups = create_loraplus_optimizer(theirs, torch.optim.AdamW, **theirs_too).param_groups
    optimizer = core.make_optimizer(model, "adamw", 0.1, scales=core.rate_factors(model, 16.0))
    model(ids(3, 16), ids(3, 16, seed=2)).backward()
    core.optimizer_step(optimizer, core.Precision("fp32", core.World()), None, 0.01)

    def by_kind(model, groups, name, *words):
        names = {p: own for own, p in model.named_parameters()}
        return [{g[name] for g in groups for p in g["params"] if word in names[p]} for word in words]

    rates = by_kind(model, optimizer.param_groups, "lr", ".A", ".B", ".magnitude")
    assert rates == by_kind(theirs, groups, "lr", "lora_A", "lora_B", "magnitude")
    assert rates == [{0.01}, {0.16}, {0.16} if dora else set()]
    decays = by_kind(model, optimizer.param_groups, "weight_decay", ".A", ".B", ".magnitude")
    assert decays == [{0.1}, {0.1}, {0.0} if dora else set()]
    same = core.make_optimizer(model, "adamw", 0.1, scales=core.rate_factors(model, 1.0))
    assert len(same.param_groups) == 1 + dora


def block_diagonal(layer, x):
    """The sum as it was written first."""
    B = torch.block_diag(*layer.B.chunk(len(layer.parts)))
    return layer.base(x) + linear(linear(x, layer.A) * layer.multiplier, B)


LAUNCHES = dict.fromkeys(("mm", "addmm", "mul", "add", "sum", "cat", "masked_fill", "ones_like"), 1)
LAUNCHES["block_diag"] = 4  # zeros, and a copy of each of three parts


class Launches(TorchDispatchMode):
    """Counts what a card would be given: products, copies, sums; no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += LAUNCHES.get(function._schema.name.removeprefix("aten::"), 0)
        return function(*args, **kwargs or {})


def some_layer(parts, device="cpu"):
    with torch.device(device):
        layer = lora_layers.LoRALinear(gpt.Linear(16, 24).requires_grad_(False), 2, 0.7, parts=parts)
    layer.initialise("fan_in")
    return layer


EQUAL = [(0, 8), (8, 16), (16, 24)]


def test_a_card_gets_the_same_sum_in_fewer_launches():
    for parts in (EQUAL, [(0, 12), (12, 18), (18, 24)], [(0, 8), (16, 24)]):
        layer, x = train(some_layer(parts)), torch.randn(5, 3, 16)
        sums = lora_layers.add_product(layer.base(x), layer.low(x), layer.wide(layer.B, layer.factors))
        assert_near(sums, layer(x), 1e-6)
    layer = train(some_layer(EQUAL))
    assert torch.equal(layer(x), block_diagonal(layer, x))  # a CPU's are what they were, to the bit
    counts = []
    for form in (block_diagonal, lora_layers.LoRALinear.__call__):
        layer, x = some_layer(EQUAL, "meta"), torch.empty(5, 3, 16, device="meta", requires_grad=True)
        with Launches() as launches:
            form(layer, x).sum().backward()
        counts.append(launches.count)
    assert counts == [19, 14]  # sum and ones_like are this test's


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"targets": "q,w"}, ["--lora_targets q,w", "all, attention, mlp, or some of q,k,v,o,gate,up,down"]),
        ({"targets": "q,q"}, ["--lora_targets q,q"]),
        ({"targets": "up,gate"}, ["the model has no gate, it has q,k,v,o,up,down"]),
        ({"rank_pattern": "attn.c_atn=8"}, ["--lora_rank_pattern", "attn.c_atn is no layer with an adapter"]),
        ({"rank_pattern": "mlp=8.5"}, ["8.5 is no value", "use e.g. h.0.attn.c_attn=4"]),
        ({"alpha_pattern": "mlp"}, ["--lora_alpha_pattern mlp", "nothing is no value"]),
        ({"alpha_pattern": "mlp=inf"}, ["inf is no value"]),
        ({"init": "pissa", "rank_pattern": "mlp=99"}, ["rank 99 of PiSSA", "32 singular values"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(how, words):
    with pytest.raises(UserError) as error:
        core.add_lora(random_gpt(), 4, 7, **how)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_targets_and_patterns_are_where_they_were_asked_for():
    model = random_gpt(**GROUPED)  # 4 heads of 12 rows, 2 for keys and values
    core.add_lora(
        model, 4, 8, targets="k,v+gate", rank_pattern="h.1.mlp.c_gate=2,mlp=3", alpha_pattern="h.1=2"
    )
    found = {
        name: (layer.parts, layer.B.shape, layer.multiplier) for name, layer in core.adapted(model).items()
    }
    inner = model.config.inner
    assert found == {
        "h.0.attn.c_attn": (((48, 72), (72, 96)), (48, 4), 2),
        "h.0.mlp.c_gate": (((0, inner),), (inner, 3), 8 / 3),
        "h.1.attn.c_attn": (((48, 72), (72, 96)), (48, 4), 0.5),
        "h.1.mlp.c_gate": (((0, inner),), (inner, 2), 1),
    }
    before = {name: value.clone() for name, value in core.merge_lora(model).state_dict().items()}
    train(model)
    after = core.merge_lora(model).state_dict()["h.0.attn.c_attn.weight"]
    moved = (after != before["h.0.attn.c_attn.weight"]).any(1)
    assert not moved[:48].any() and moved[48:].all()  # queries have none
    assert lora.target_names("mlp") == ["gate", "up", "down"]
