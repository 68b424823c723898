"""LoRA against peft's on transformers' GPT-2, where adapters sit, merging, what trains."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys.lora import (
    LLAMA,
    adapted_gpt,
    assert_close_logits,
    assert_far,
    assert_same,
    beside_peft,
    ids,
    logits,
    numbers,
    random_gpt,
    randomise,
)

import core
from core import GPT, GPTConfig, UserError
from lab.models import gpt, gpt_formats, loha_lokr, lora

GPT2_SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
SHAPES = {"gpt2": {}, "gpt2 untied": {"tie_head": False}, "llama": LLAMA | {"tie_head": False}}
BLOCK = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
ALL = [f"h.{i}.{name}" for i in range(2) for name in BLOCK]


def on_meta(size, **config):
    layers, heads, width = GPT2_SIZES[size]
    with torch.device("meta"):
        return GPT(GPTConfig(50257, n_layer=layers, n_head=heads, n_embd=width, tie_head=False, **config))


@pytest.mark.parametrize("init", ["fan_in", "rank"])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_begins_at_the_base_exactly(shape, init):
    model = random_gpt(**SHAPES[shape])
    x, labels = ids(3, 16), ids(3, 16, seed=2)
    with torch.no_grad():
        before, loss = model(x), model(x, labels)
        core.add_lora(model, 4, 6, head=not model.config.tie_head, init=init)
        assert torch.equal(model(x), before) and torch.equal(model(x, labels), loss)
        randomise(model)
        assert_far(model(x), before)  # every one of them is in use


def kaiming(parts, *size):
    """A of each part as nn.Linear would draw it, one after the other."""
    torch.manual_seed(3)
    return torch.cat([nn.init.kaiming_uniform_(torch.empty(size), a=math.sqrt(5)) for _ in range(parts)])


@pytest.mark.parametrize("name", ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "lm_head"])
@pytest.mark.parametrize("init", ["fan_in", "rank"])
def test_A_is_drawn_as_peft_does_or_as_the_ancestor_did_who_kept_it_transposed(name, init):
    model = random_gpt(tie_head=False)
    core.add_lora(model, 5, 5, head=True)
    layer = core.adapted(randomise(model))[name]
    width = 128 if name == "h.0.mlp.c_proj" else 32
    torch.manual_seed(3)
    layer.initialise(init)
    expected = kaiming(len(layer.parts), *((5, width) if init == "fan_in" else (width, 5)))
    # the same draws in the same order; the reference's sqrt(3) sqrt(1/3) / sqrt(n) has roundings more
    torch.testing.assert_close(layer.A.detach().flatten(), expected.flatten(), rtol=1e-6, atol=0)
    bound = 1 / math.sqrt({"fan_in": width, "rank": 5}[init])
    assert 0.95 * bound < layer.A.abs().max() <= bound * (1 + 1e-6)  # of 160 draws and more
    assert (layer.B == 0).all()  # again: it was not before


@pytest.mark.parametrize(("how", "n"), [({}, 32), ({"init": "rank"}, 5)])
def test_new_adapters_are_initialised(how, n):
    model = random_gpt()
    core.add_lora(model, 5, 5, targets="attention", **how)
    for name, layer in core.adapted(model).items():
        assert 0.95 < layer.A.abs().max() * math.sqrt(n) <= 1 + 1e-6, name
        assert (layer.B == 0).all(), name


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, ALL),
        ({"targets": "attention"}, [n for n in ALL if "attn." in n]),
        ({"targets": "mlp"}, [n for n in ALL if "mlp." in n]),
        ({"last_layers": 1}, ALL[4:]),
        ({"last_layers": 2, "targets": "mlp"}, ["h.0.mlp.c_fc", "h.0.mlp.c_proj", *ALL[6:]]),
        ({"head": True}, [*ALL, "lm_head"]),
        ({"head": True, "last_layers": 0}, ["lm_head"]),
        ({"head": True, "last_layers": 1, "targets": "attention"}, [*ALL[4:6], "lm_head"]),
    ],
)
def test_adapters_are_where_they_were_asked_for_and_nowhere_else(how, expected):
    model = random_gpt(tie_head=False)
    assert core.add_lora(model, 4, 6, **how) == expected == list(core.adapted(model))
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == [f"{name}.{letter}" for name in expected for letter in "AB"]


def test_the_gate_of_swiglu_is_part_of_the_mlp():
    model = random_gpt(**LLAMA)
    names = core.add_lora(model, 4, 6, targets="mlp", last_layers=1)
    assert sorted(names) == ["h.1.mlp.c_fc", "h.1.mlp.c_gate", "h.1.mlp.c_proj"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"head": True}, ["embedding", "--no-tie_head", "--no-lora_head"]),
        ({"last_layers": 3}, ["--lora_layers 3", "2 blocks"]),
        ({"last_layers": 0}, ["no layer gets an adapter", "more --lora_layers", "--lora_head"]),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_name(how, words):
    model = random_gpt()
    before = logits(model)
    with pytest.raises(UserError) as error:
        core.add_lora(model, 4, 6, **how)
    assert all(word in str(error.value) for word in words)
    assert not core.adapted(model) and torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("size", "rank", "head", "expected"),
    [
        ("medium", 2, True, 987_298), ("medium", 4, True, 1_974_596), ("medium", 8, True, 3_949_192),
        ("medium", 16, True, 7_898_384), ("medium", 32, True, 15_796_768), ("medium", 64, True, 31_593_536),
        ("medium", 16, False, 7_077_888), ("small", 16, True, 3_470_608), ("large", 16, True, 14_095_632),
        ("xl", 16, True, 22_948_112),
    ],
)  # fmt: skip
def test_the_number_of_adapter_weights_is_the_published_one_to_the_unit(size, rank, head, expected):
    model = on_meta(size)
    base = {"small": 163_037_184, "medium": 406_286_336, "large": 838_359_040, "xl": 1_638_022_400}[size]
    assert core.count_parameters(model) == (base, base)
    core.add_lora(model, rank, rank, head=head)
    assert core.count_parameters(model) == (base + expected, expected)
    assert sum(p.numel() for p in core.Adapters(model).parameters()) == expected


def remember_slope_of(embedding):
    """Makes what the blocks read a leaf: the base is frozen, so that without it nothing goes so far back."""
    kept = []
    embedding.register_forward_hook(lambda module, args, out: kept.append(out.requires_grad_()))
    return kept


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "with the head"])
@pytest.mark.parametrize("scaling", lora.SCALINGS)
def test_logits_and_gradients_are_those_of_peft(tmp_path, scaling, head):
    ours, theirs = beside_peft(tmp_path, scaling=scaling, head=head, config={"tie_head": not head})
    assert_close_logits(logits(ours), logits(theirs))
    multiplier = {"alpha/r": 7 / 4, "alpha": 7, "alpha/sqrt(r)": 7 / 2}[scaling]
    assert {layer.multiplier for layer in core.adapted(ours).values()} == {multiplier}

    ours, theirs = ours.double(), theirs.double()  # the same numbers, now without noise
    embedded = remember_slope_of(ours.wte), remember_slope_of(theirs.base_model.model.transformer.wte)
    x, labels = ids(3, 16), ids(3, 16, seed=2)
    labels[1, 9:] = core.IGNORE_INDEX
    ours(x, labels).backward()
    out = theirs(x).logits
    F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum").backward()

    def assert_close(mine, reference):
        # fp64; relative to the largest, for slopes of a sum cancel
        assert (mine - reference).abs().max() <= 1e-11 * reference.abs().max()
        assert reference.abs().max() > 0

    assert_close(embedded[0][0].grad, embedded[1][0].grad)
    reference = dict(theirs.named_parameters())
    for name, layer in core.adapted(ours).items():
        their = f"base_model.model.{'' if name == 'lm_head' else 'transformer.'}{name}.lora_%s.default.weight"
        A, B = reference[their % "A"].grad, reference[their % "B"].grad
        assert_close(layer.A.grad, A)
        count = len(layer.parts)
        n, r = len(B) // count, A.shape[0] // count  # what we have not lies beside the diagonal
        diagonal = [B[i * n : (i + 1) * n, i * r : (i + 1) * r] for i in range(count)]
        assert_close(layer.B.grad, torch.cat(diagonal))
    assert all(w.grad is None for name, w in ours.named_parameters() if not name.endswith((".A", ".B")))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_layer_is_what_its_formula_says(parts):
    torch.manual_seed(0)
    rows = [(12 // parts * i, 12 // parts * (i + 1)) for i in range(parts)]
    layer = core.LoRALinear(gpt.Linear(8, 12).double(), 2, 0.7, parts=rows)
    nn.init.normal_(layer.A)
    nn.init.normal_(layer.B)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    n, expected = 12 // parts, layer.base(x)
    for i in range(parts):
        A, B = layer.A[2 * i : 2 * i + 2], layer.B[n * i : n * i + n]
        expected[..., n * i : n * i + n] += 0.7 * (x @ A.t() @ B.t())
    terms, bias = layer.terms(x)
    near = {"rtol": 0, "atol": 1e-13}  # fp64, numbers near 10
    torch.testing.assert_close(layer(x), expected, **near)
    torch.testing.assert_close(sum(x @ w.t() for x, w in terms) + bias, expected, **near)
    torch.testing.assert_close(F.linear(x, layer.base.weight + layer.delta(), bias), expected, **near)


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "with the head"])
@pytest.mark.parametrize("shape", ["gpt2 untied", "llama"])
def test_the_loss_of_an_adapted_model_is_cross_entropy_of_its_logits(shape, head):
    config = SHAPES[shape] | ({"head_bias": True} if shape == "llama" else {})
    model = adapted_gpt(dtype=torch.float64, head=head, config=config)
    x, labels = ids(3, 16), ids(3, 16, seed=2)
    labels[1, 9:] = core.IGNORE_INDEX
    ours = model(x, labels)
    theirs = F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    weights = list(core.Adapters(model).parameters())
    expected = torch.autograd.grad(theirs, weights)
    for mine, reference in zip(torch.autograd.grad(ours, weights), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)  # fp64, slopes up to hundreds
    with torch.no_grad():
        torch.testing.assert_close(model(x, labels), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_move_and_the_base_stands_still(checkpointing):
    model = random_gpt(tie_head=False, checkpointing=checkpointing)
    core.add_lora(model, 4, 6, dropout=0.1, head=True)
    model.train()
    optimizer = core.make_optimizer(model, "adamw", 0.0)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in core.Adapters(model).parameters())
    base = {name: value.clone() for name, value in core.base_weights(model).items()}
    precision, losses = core.Precision("fp32", core.World()), []
    before = numbers(core.Adapters(model))
    for step in range(4):
        losses.append(model(ids(3, 16), ids(3, 16, seed=2)))
        losses[-1].backward()
        core.optimizer_step(optimizer, precision, None, 0.01)
        for name, value in numbers(core.Adapters(model)).items():
            moved = not torch.equal(value, before[name])
            assert moved == (step > 0 or name.endswith(".B")), (step, name)  # with B zero A has no slope
    assert losses[-1] < losses[0]
    assert_same(core.base_weights(model), base)


def test_recomputed_blocks_give_the_adapters_the_same_gradients():
    def slopes(checkpointing):
        model = adapted_gpt(config={"checkpointing": checkpointing}).train()
        model(ids(3, 16), ids(3, 16, seed=2)).backward()
        return {name: p.grad for name, p in core.Adapters(model).named_parameters()}

    assert_same(slopes(True), slopes(False))


def test_dropout_acts_in_training_only_and_on_the_adapters_path_only():
    start = random_gpt(tie_head=False)
    before = logits(start)
    core.add_lora(start, 4, 6, dropout=0.5, head=True)
    assert torch.equal(logits(start.train()), before)  # B is zero: base paths have no dropout

    whole = adapted_gpt(head=True, config={"tie_head": False})
    model = adapted_gpt(head=True, dropout=0.5, config={"tie_head": False})
    assert torch.equal(logits(model.eval()), logits(whole))
    assert_far(logits(model.train()), logits(whole))

    layer, x = core.adapted(model)["h.0.attn.c_attn"], torch.randn(3, 5, 32)
    with torch.no_grad():
        torch.manual_seed(4)
        got = layer(x)
        torch.manual_seed(4)
        expected = (
            layer.base(x) + layer.multiplier * (F.dropout(x, 0.5) @ layer.A.t()) @ layer.wide(layer.B).t()
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # fp32, numbers up to 10


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "with the head"])
@pytest.mark.parametrize("shape", ["gpt2 untied", "llama"])
@pytest.mark.parametrize("scaling", lora.SCALINGS)
def test_the_merged_model_has_no_adapters_and_the_same_logits(shape, head, scaling):
    model = adapted_gpt(scaling=scaling, head=head, config=SHAPES[shape])
    before = numbers(model)
    base = core.with_weights(model.config, core.base_weights(model)).eval()
    merged = core.merge_lora(model)
    assert not core.adapted(merged) and merged.config == model.config
    assert_close_logits(logits(merged), logits(model))
    assert_far(logits(merged), logits(base))
    assert_same(numbers(model), before)
    ours, changed = merged.state_dict(), {f"{name}.weight" for name in core.adapted(model)}
    for name, weight in core.base_weights(model).items():
        assert (ours[name].data_ptr() == weight.data_ptr()) == (name not in changed), name
        assert torch.equal(ours[name], weight) == (name not in changed), name
    assert not any(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_merging_keeps_the_mode(training):
    model = adapted_gpt(config={"dropout": 0.2}).train(training)
    assert core.merge_lora(model).training == training == model.training


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "with the head"])
def test_the_merged_model_is_pefts(tmp_path, head):
    ours, theirs = beside_peft(tmp_path, head=head, config={"tie_head": not head})
    ours, theirs = core.merge_lora(ours), theirs.merge_and_unload()
    assert_close_logits(logits(ours), logits(theirs))
    weights, reference = gpt_formats.to_gpt2(ours.state_dict()), theirs.state_dict()
    for name, weight in weights.items():  # sums of 4 products on numbers near 1, each rounded elsewhere
        torch.testing.assert_close(weight, reference[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_logits_of_a_merged_model(tmp_path, shape):
    from transformers import AutoModelForCausalLM

    model = adapted_gpt(head="tie_head" in SHAPES[shape], config=SHAPES[shape])
    core.save_pretrained(core.merge_lora(model), None, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close_logits(logits(model), logits(theirs))


@pytest.mark.parametrize("shape", SHAPES)
def test_adapted_and_merged_models_say_the_same(shape):
    model = adapted_gpt(head="tie_head" in SHAPES[shape], config=SHAPES[shape])
    randomise(model, std=1)  # with less they repeat one token, all of them the same
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    base = core.with_weights(model.config, core.base_weights(model)).eval()

    def said(model):  # longer than a context: the window slides
        return core.generate(model, prompts, 20, temperature=0)

    assert said(model) == said(core.merge_lora(model)) != said(base)


@pytest.mark.parametrize("shape", SHAPES)
def test_base_weights_are_those_of_the_plain_model_under_their_names(shape):
    plain, model = random_gpt(**SHAPES[shape]), adapted_gpt(config=SHAPES[shape])
    assert_same(core.base_weights(model), plain.state_dict())
    headed = adapted_gpt(head="tie_head" in SHAPES[shape], config=SHAPES[shape])
    assert_same(core.base_weights(headed), plain.state_dict())


def test_adapters_come_back_from_their_state(tmp_path):
    model = adapted_gpt(head=True, config={"tie_head": False})
    state = core.Adapters(model).state_dict()
    assert list(state) == [f"{name}.{letter}" for name in [*ALL, "lm_head"] for letter in "AB"]
    torch.save(state, tmp_path / "adapters.pt")
    again = random_gpt(tie_head=False)
    core.add_lora(again, 4, 6, head=True)
    core.Adapters(again).load_state_dict(torch.load(tmp_path / "adapters.pt"))
    assert_same(numbers(again), numbers(model))
    assert torch.equal(logits(again), logits(model))
    assert all(p.requires_grad and p.is_leaf for p in core.Adapters(again).parameters())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"head": True}),
        ({}, {"targets": "attention"}),
        ({}, {"last_layers": 1}),
        ({}, {"rank": 2}),
        ({"targets": "mlp"}, {"targets": "mlp", "rank": 1}),  # copy_ would repeat it for every rank
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_adapters_of_another_shape_are_refused(one, other, turned):
    config = {"tie_head": False}
    model, misfit = adapted_gpt(config=config, **one), adapted_gpt(config=config, **other)
    model, misfit = (misfit, model) if turned else (model, misfit)
    for weight in core.Adapters(misfit).parameters():
        nn.init.normal_(weight)
    before = numbers(model)
    with pytest.raises(UserError, match="adapters do not fit"):
        core.Adapters(model).load_state_dict(core.Adapters(misfit).state_dict())
    assert_same(numbers(model), before)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_loss_of_packed_rows_is_the_sum_of_their_own(positions, adapted):
    model = random_gpt(torch.float64, positions=positions)
    if adapted:
        core.add_lora(model, 4, 6)
        randomise(model)
    packs, x, labels = [[7, 9], [4, 5, 7]], ids(2, 16), ids(2, 16, seed=2)
    segments = torch.tensor([[i for i, n in enumerate(pack) for _ in range(n)] for pack in packs])
    labels[0, 7] = core.IGNORE_INDEX
    packed, alone = model(x, labels, segments), 0
    for row, pack in enumerate(packs):
        for start, end in itertools.pairwise([0, *itertools.accumulate(pack)]):
            alone = alone + model(x[row : row + 1, start:end], labels[row : row + 1, start:end])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=0)  # fp64
    assert abs(model(x, labels) - alone) > 1e-6 * alone  # without segments they see each other
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(alone, weights)
    for mine, reference in zip(torch.autograd.grad(packed, weights), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)  # fp64, slopes up to hundreds


def stepped(model, half):
    """Loss and the adapters' slopes of a batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.train()(ids(3, 16), ids(3, 16, seed=2))
    loss.backward()
    return [loss.detach(), *(p.grad for _, p in core.Adapters(model).named_parameters())]


def test_a_base_held_in_bf16_is_what_autocast_makes_of_it_anyway():
    wide, narrow = adapted_gpt(), adapted_gpt()
    core.narrow_base(narrow, "bf16")
    held = {name for name, p in narrow.named_parameters() if p.dtype == torch.bfloat16}
    assert held == {f"{name}.base.weight" for name in ALL}  # not the embeddings, not what trains
    assert all(map(torch.equal, stepped(narrow, True), stepped(wide, True)))


@pytest.mark.parametrize("method", loha_lokr.METHODS)
def test_without_autocast_a_base_held_in_bf16_counts_as_its_rounded_numbers(method):
    models = []
    for _ in range(2):
        model = random_gpt(**LLAMA)
        loha_lokr.add_adapters(model, method, 4, 6)
        torch.manual_seed(5)
        for p in core.Adapters(model).parameters():
            nn.init.normal_(p, std=0.2)
        models.append(model)
    narrow, rounded = models
    core.narrow_base(narrow, "bf16")
    core.narrow_base(rounded, "fp32")
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    with torch.no_grad():
        for layer in core.adapted(rounded).values():
            layer.base.weight.copy_(layer.base.weight.bfloat16())
    before = numbers(narrow)
    for got, expected in zip(stepped(narrow, False), stepped(rounded, False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.isfinite(slope).all() for slope in stepped(narrow, True))
    merged, wide = numbers(core.merge_lora(narrow)), numbers(core.merge_lora(rounded))
    held = {name for name, weight in merged.items() if weight.dtype == torch.bfloat16}
    assert held == {f"{name}.weight" for name in core.adapted(narrow)}
    assert_same(merged, wide | {name: wide[name].bfloat16() for name in held})
    assert_same(numbers(narrow), before)
