"""gpt_scratch.py: the model against transformers, generation, loss, schedules, finder, measures, refusals."""

import copy
import dataclasses
import functools
import inspect
import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from ranks import everywhere
from torch import nn

import core
import gpt_scratch as script
import lab.train.loss
from core import GPT, GPTConfig, UserError, World, generate
from lab.data import text
from lab.measure import lr_finder
from lab.models import gpt, gpt_formats
from lab.models.generate import choose
from lab.run import files
from lab.train.loss import _chunks, linear_cross_entropy, targets_only

GPT2_SIZES = {"S": (12, 12, 768), "M": (24, 16, 1024), "L": (36, 20, 1280), "XL": (48, 25, 1600)}
LLAMA = {
    **{"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    **{"bias": False, "qkv_bias": False},
}
JOURNAL_003 = {"activation": "relu", "qkv_bias": False, "tie_head": False, "head_bias": True}


def shape(layers, heads, width, **more):
    return {"n_layer": layers, "n_head": heads, "n_embd": width, **more}


def on_meta(**config):
    with torch.device("meta"):
        return GPT(GPTConfig(**config))


def random_gpt(std=0.3, dtype=torch.float64, seed=0, **config):
    """Small, with weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(seed)
    small = {"vocab_size": 23, "block_size": 16, **shape(2, 4, 32)}
    model = GPT(GPTConfig(**small | config)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=std)
    return model.eval()


def ids(*size, vocab_size=23, seed=1):
    return torch.randint(vocab_size, size, generator=torch.Generator().manual_seed(seed))


# the model


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


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_for_few_rows_is_the_ordinary_one(rows, bias):
    torch.manual_seed(0)
    layer, x = gpt.Linear(6, 5, bias=bias).double(), torch.randn(rows, 1, 6, dtype=torch.float64)
    expected = x @ layer.weight.t() + (layer.bias if bias else 0)
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-14)  # another order of additions
    assert got.shape == (rows, 1, 5)


# loss


def loss_of(hidden, weight, bias, labels):
    hidden, labels = targets_only(hidden, labels)
    return linear_cross_entropy([(hidden, weight)], bias, labels)


def slices_of(rows):
    return lambda hidden, weight: [slice(start, start + rows) for start in range(0, len(hidden), rows)]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("frozen", [[], [0], [0, 2]], ids=["none", "first", "both"])
def test_the_loss_of_two_terms_is_cross_entropy_of_their_sum(chunk, frozen, monkeypatch):
    """As LoRA's head has it; what is frozen gets no gradient and the others the right one."""
    if chunk:
        everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(chunk))
    torch.manual_seed(0)
    weights = [torch.randn(40, 8).double(), torch.randn(3, 8).double(), torch.randn(40, 3).double()]
    for i, weight in enumerate(weights):
        weight.requires_grad_(i not in frozen)
    hidden, labels = torch.randn(24, 8).double().requires_grad_(), ids(24, 1, vocab_size=40)[:, 0]
    terms = [(hidden, weights[0]), (0.5 * hidden @ weights[1].t(), weights[2])]
    ours = linear_cross_entropy(terms, None, labels)
    theirs = F.cross_entropy(sum(x @ w.t() for x, w in terms), labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    wanted = [hidden, *(w for w in weights if w.requires_grad)]
    for mine, reference in zip(
        torch.autograd.grad(ours, wanted, retain_graph=True), torch.autograd.grad(theirs, wanted), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(terms, None, labels), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100], ids=lambda chunk: f"chunks of {chunk}")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [0, 5, 24])
@pytest.mark.parametrize("size", [1, 1000], ids=["moderate logits", "huge logits"])
def test_the_loss_without_all_logits_is_cross_entropy(chunk, bias, ignored, size, monkeypatch):
    if chunk:
        everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(chunk))
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, "requires_grad": True}
    inputs = [torch.randn(4, 6, 8, **kind), torch.randn(40, 8, **kind)] + [torch.randn(40, **kind)] * bias
    scaled = [inputs[0] * size, *inputs[1:]]
    labels = ids(4, 6, vocab_size=40)
    labels.view(-1)[torch.randperm(24)[:ignored]] = core.IGNORE_INDEX
    b = scaled[2] if bias else None
    ours = loss_of(scaled[0], scaled[1], b, labels)
    logits = F.linear(*scaled).view(-1, 40)
    theirs = F.cross_entropy(logits, labels.view(-1), ignore_index=core.IGNORE_INDEX, reduction="sum")
    got = torch.autograd.grad(0.37 * ours, inputs, retain_graph=True)
    expected = torch.autograd.grad(0.37 * theirs, inputs)
    near = {"rtol": 1e-12, "atol": 1e-12 * size}  # fp64, sums of up to 24 numbers
    torch.testing.assert_close(ours, theirs, **near)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, **near)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(scaled[0], scaled[1], b, labels), theirs, **near)
    if ignored == 24:
        assert ours.item() == 0 and all((slope == 0).all() for slope in got)


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_loss_has_the_gradients_of_its_logits(tied, monkeypatch):
    everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices_of(5))
    model = random_gpt(tie_head=tied, head_bias=not tied)
    x, labels = ids(2, 16), ids(2, 16, seed=2)
    labels[1, 9:] = core.IGNORE_INDEX
    ours = model(x, labels)
    theirs = F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    weights = list(model.parameters())
    expected = torch.autograd.grad(theirs, weights)
    for mine, reference in zip(torch.autograd.grad(ours, weights), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)  # fp64, slopes up to hundreds


@pytest.mark.parametrize("rows", [0, 1, 7, 4096, 100_000])
@pytest.mark.parametrize("vocabulary", [75, 50_257, 1 << 25])
def test_chunks_cover_every_row_once_and_stay_below_64_mb(rows, vocabulary):
    hidden, weight = torch.empty(rows, 1), torch.empty(vocabulary, 0)
    chunks = _chunks(hidden, weight)
    assert [i for chunk in chunks for i in range(*chunk.indices(rows))] == list(range(rows))
    for chunk in chunks:
        n = len(range(*chunk.indices(rows)))
        assert n == 1 or 4 * (n - 1) * vocabulary <= 64 * 2**20  # rows are rounded up


# weights in and out


def assert_close_logits(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


FORMATS = {"gpt2": {}, "gpt2 with relu": {"activation": "relu", "n_inner": 48}, "llama": LLAMA}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", FORMATS)
def test_transformers_computes_our_logits_from_saved_weights_and_they_come_back(tmp_path, kind, tied):
    from transformers import AutoModelForCausalLM

    model = random_gpt(dtype=torch.float32, tie_head=tied, norm_eps=1e-3, **FORMATS[kind])
    core.save_pretrained(model, None, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = gpt_formats.load_pretrained(str(tmp_path / "out"))
    x = ids(3, 16)
    with torch.no_grad():
        assert_close_logits(model(x), theirs(x).logits)
    assert type(theirs).__name__ == ("LlamaForCausalLM" if kind == "llama" else "GPT2LMHeadModel")
    assert dataclasses.replace(again.config, n_inner=None) == dataclasses.replace(model.config, n_inner=None)
    assert again.config.inner == model.config.inner
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def transformers_model(kind, **changes):
    """Random, with every number that a config can hold away from its default."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        size = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-3}
        ends = {"bos_token_id": None, "eos_token_id": None}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=23, **ends, **size | changes))
    else:
        size = {
            "max_position_embeddings": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-3,
        }
        size |= {"num_attention_heads": 4, "intermediate_size": 40}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=23, **size | rope | changes))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_we_compute_the_logits_of_transformers_models(tmp_path, kind, tied):
    theirs = transformers_model(kind, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    model = gpt_formats.load_pretrained(str(tmp_path), dropout=0.25, checkpointing=True).eval()
    assert (model.config.tie_head, model.config.dropout, model.config.checkpointing) == (tied, 0.25, True)
    x = ids(3, 16)
    with torch.no_grad():
        assert_close_logits(model(x), theirs(x).logits)


@pytest.mark.parametrize("size", GPT2_SIZES)
def test_every_gpt2_maps_onto_transformers_names_and_shapes(size):
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width = GPT2_SIZES[size]
    model = on_meta(vocab_size=50257, **shape(layers, heads, width))
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width)).state_dict()
    theirs.pop("lm_head.weight")  # tied
    ours = gpt_formats.to_gpt2(model.state_dict())
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"positions": "rotary"}, ["gpt2 knows no positions rotary", "norm layernorm"]),
        ({"tie_head": False, "head_bias": True}, ["head_bias True"]),
        ({"bias": False}, ["gpt2 knows no bias False"]),
        ({"qkv_bias": False}, ["gpt2 knows no qkv_bias False"]),
        ({**LLAMA, "bias": True}, ["llama knows no bias True"]),
        ({**LLAMA, "activation": "gelu"}, ["llama knows no activation gelu"]),
    ],
)
def test_what_transformers_cannot_express_is_refused_by_name(tmp_path, config, words):
    with pytest.raises(UserError) as error:
        core.save_pretrained(random_gpt(**config), None, tmp_path / "out")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"num_key_value_heads": 2}, ["shares keys between heads (2)"]),
        ("llama", {"attention_bias": True}, ["has biases"]),
        ("llama", {"hidden_act": "gelu"}, ["gelu"]),
        ("llama", {"head_dim": 16}, ["head"]),  # wider heads than n_embd / n_head
        ("gpt2", {"activation_function": "gelu"}, ["gelu", "not GPT-2's"]),  # the one of erf
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scaling of attention"]),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(tmp_path, kind, changes, words):
    transformers_model(kind, **changes).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        gpt_formats.load_pretrained(str(tmp_path))
    assert all(word in str(error.value) for word in [*words, str(tmp_path)])


def test_a_folder_that_lacks_a_weight_or_holds_another_model_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertLMHeadModel

    transformers_model("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, e.g. transformer\.h\.1\.mlp\.c_fc\.weight"):
        gpt_formats.load_pretrained(str(tmp_path))
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(vocab_size=9, is_decoder=True, **tiny)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a bert: use a gpt2 or a llama"):
        gpt_formats.load_pretrained(str(tmp_path / "bert"))


# generation


def written_out(model, prompt, n, pick=lambda logits: int(logits.argmax())):
    """What generate should do for one prompt, without a cache, a batch or padding."""
    size, row, start = model.config.block_size, list(prompt), 0
    for _ in range(n):
        if len(row) - start > size:
            start = len(row) - (size + 1) // 2
        with torch.no_grad():
            row.append(pick(model(torch.tensor([row[start:]]))[0, -1]))
    return row[len(prompt) :]


def lively_gpt(**config):
    """Small random models soon repeat one token for ever; this one, without constants in its stream, not."""
    model = random_gpt(tie_head=False, seed=2, **config)
    with torch.no_grad():
        model.wte.weight *= 3
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(name.endswith("weight"))  # norms 1, biases 0
    return model


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_of_a_greedy_batch_is_the_row_alone(positions, use_cache):
    model = lively_gpt(positions=positions)
    batch = generate(model, PROMPTS, 9, temperature=0, use_cache=use_cache)  # the longest fills block_size
    assert batch == [written_out(model, prompt, 9) for prompt in PROMPTS]
    assert min(len(set(row)) for row in batch) > 2


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("block_size", [15, 16])
@pytest.mark.parametrize("length", [1, 16, 40])
def test_behind_block_size_the_window_slides(positions, block_size, length):
    model = lively_gpt(positions=positions, block_size=block_size)
    prompt = ids(length).tolist()
    assert generate(model, [prompt], 30, temperature=0)[0] == written_out(model, prompt, 30)


def test_a_row_is_the_row_alone_even_when_another_rows_window_slides():
    model = lively_gpt()
    prompts = [ids(15).tolist(), [4, 5]]
    assert generate(model, prompts, 14, temperature=0)[1] == written_out(model, prompts[1], 14)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("choice", [{"temperature": 0}, {}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}],
                         ids=["greedy", "sampled", "top k and p"])  # fmt: skip
def test_the_cache_changes_no_token(positions, choice):
    model = lively_gpt(positions=positions)
    cached = generate(model, PROMPTS, 30, **choice, seed=3)
    assert cached == generate(model, PROMPTS, 30, **choice, seed=3, use_cache=False)
    assert [len(row) for row in cached] == [30] * 3 and min(len(set(row)) for row in cached) > 4


def test_same_seed_same_text_and_equal_prompts_differ_from_row_to_row():
    model = random_gpt(std=0.1)  # flat enough to have a choice
    first = generate(model, [[1, 2]] * 3, 20, seed=7)
    assert generate(model, [[1, 2]] * 3, 20, seed=7) == first
    assert generate(model, [[1, 2]], 20, seed=7) == first[:1]  # row i draws from (seed, i)
    assert all(a != b for a, b in zip(first, generate(model, [[1, 2]] * 3, 20, seed=8), strict=True))
    assert first[0] != first[1] != first[2] != first[0]


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    model = lively_gpt()
    greedy = generate(model, PROMPTS, 20, temperature=0)
    assert generate(model, PROMPTS, 20, top_k=1) == greedy
    assert generate(model, PROMPTS, 20, top_p=1e-6) == greedy
    assert generate(model, PROMPTS, 20) != greedy


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_p": 0.91}, {0, 1, 2, 3}),
        ({"top_p": 0.89}, {0, 1, 3}),
        ({"top_p": 0.76}, {0, 1, 3}),
        ({"top_p": 0.74}, {1, 3}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.49}, {3}),
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_k": 2, "top_p": 0.66}, {3}),  # of the two that top_k leaves, 3 has 2 / 3
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_exactly_the_likeliest_ids_are_drawn_in_their_proportions(choice, kept, temperature):
    probs = torch.tensor([0.15, 0.25, 0.10, 0.50])
    generator, choice = torch.Generator().manual_seed(0), {"top_k": None, "top_p": None, **choice}
    logits = (probs.log() * temperature + 3).expand(1000, 4)  # so that the temperature brings probs back
    drawn = choose(logits, [generator] * 1000, temperature, **choice)
    shares = np.bincount(drawn, minlength=4) / 1000
    expected = np.array([probs[i].item() * (i in kept) for i in range(4)])
    assert set(np.flatnonzero(shares)) == kept
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.063)  # four standard errors of 1,000


def test_ids_beyond_the_vocabulary_are_never_drawn():
    model = random_gpt(tie_head=False, head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[20:] = 1000.0
    assert min(min(row) for row in generate(model, PROMPTS, 5)) >= 20  # a padded matrix, unguarded
    for choice in ({"temperature": 0}, {}, {"top_k": 22}, {"top_p": 0.99}):
        rows = generate(model, PROMPTS, 20, vocab_size=20, **choice)
        assert max(max(row) for row in rows) < 20


def test_a_stop_id_ends_its_row_only_and_is_not_part_of_it():
    model, polled = lively_gpt(), []
    free = generate(model, PROMPTS, 30, temperature=0)
    stop = free[0][4]
    ends = [row.index(stop) if stop in row else 30 for row in free]
    stopped = generate(model, PROMPTS, 30, temperature=0, stop={stop}, poll=lambda: polled.append(1))
    assert stopped == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len(set(ends)) > 1 and len(polled) == min(30, max(ends) + 1)
    everything = generate(model, PROMPTS, 30, stop=range(23), poll=lambda: polled.append(2))
    assert everything == [[], [], []] and polled.count(2) == 1  # nothing left to do


def test_greedy_text_is_that_of_transformers(tmp_path):
    theirs = transformers_model("gpt2", n_positions=64)
    theirs.save_pretrained(tmp_path)
    model = gpt_formats.load_pretrained(str(tmp_path))
    for prompt in PROMPTS:
        x = torch.tensor([prompt])
        out = theirs.generate(x, attention_mask=x >= 0, max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert generate(model, [prompt], 40, temperature=0)[0] == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_generation_is_without_dropout_and_leaves_the_mode_as_it_was(training):
    model = lively_gpt(dropout=0.9).train(training)
    assert generate(model, PROMPTS, 9, temperature=0) == generate(lively_gpt(), PROMPTS, 9, temperature=0)
    assert model.training == training
    assert all(module.training == training for module in model.modules())


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt has no token"):
        generate(random_gpt(), [[1], []], 3)


# schedules


def schedule(kind, lr=1e-3, warmup=0.3, **more):
    return SimpleNamespace(schedule=kind, lr=lr, warmup=warmup, min_lr=0.0, beta1=0.9, **more)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 7, 20, 333])
def test_one_cycle_is_torchs_in_rate_and_beta1(total):
    cfg = schedule("one_cycle", lr=0.02, cycle_beta1=True)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.99))
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=total, pct_start=0.3)
    for step in range(total):
        group = optimizer.param_groups[0]
        assert core.lr_at(cfg, step, total) == pytest.approx(group["lr"], rel=1e-9), step
        assert core.beta1_at(cfg, step, total) == pytest.approx(group["betas"][0], rel=1e-12), step
        optimizer.step()
        if step + 1 < total:
            theirs.step()


@pytest.mark.parametrize(
    ("kind", "cycle"), [("one_cycle", False), ("linear", True), ("cosine", True), ("gpt3", True)]
)
def test_beta1_stays_unless_one_cycle_may_move_it(kind, cycle):
    cfg = schedule(kind, cycle_beta1=cycle)
    assert {core.beta1_at(cfg, step, 50) for step in range(50)} == {0.9}


def test_one_cycle_draws_journal_004s_published_curve():
    cfg = schedule("one_cycle", cycle_beta1=True)
    published = {0: "4.0e-05", 2_999: "1.0e-03", 5_000: "8.1e-04", 8_780: "7.3e-05", 9_999: "4.0e-09"}
    assert {step: f"{core.lr_at(cfg, step, 10_000):.1e}" for step in published} == published
    beta1 = [core.beta1_at(cfg, step, 10_000) for step in (0, 2_999, 9_999)]
    assert beta1 == pytest.approx([0.95, 0.85, 0.95], abs=1e-12)


@pytest.mark.parametrize("total", [300, 3_000, 299])
def test_gpt3_rises_in_a_line_falls_by_cosine_and_stays_at_a_tenth(total):
    cfg = schedule("gpt3", lr=6e-4, warmup=0.1)
    lrs = np.array([core.lr_at(cfg, step, total) for step in range(total)])
    rising, end = round(0.1 * total), 260 / 300 * total
    np.testing.assert_allclose(lrs[:rising], 6e-4 * np.arange(1, rising + 1) / rising, rtol=1e-12)
    steps = np.arange(rising, math.ceil(end))
    cosine = 0.5 * (1 + np.cos(np.pi * (steps - rising) / (end - rising)))
    np.testing.assert_allclose(lrs[rising : len(steps) + rising], 6e-5 + 5.4e-4 * cosine, rtol=1e-12)
    np.testing.assert_allclose(lrs[math.ceil(end) :], 6e-5, rtol=1e-12)
    assert len(lrs[math.ceil(end) :]) == total - math.ceil(end) > 30


def test_the_first_and_last_steps_of_short_schedules_are_finite():
    for kind, total, warmup in itertools.product(("one_cycle", "gpt3", "linear"), (1, 2, 3), (0.0, 0.5, 1.0)):
        lrs = [core.lr_at(schedule(kind, warmup=warmup), step, total) for step in range(total)]
        assert all(0 < lr <= 1e-3 * (1 + 1e-12) for lr in lrs), (kind, total, warmup)


# learning-rate finder


def fp64():
    return core.Precision("fp64", World())


def quadratic(a):
    """A model, its optimizer without momentum, and `take`: a step on a / 2 w^2."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer, precision = torch.optim.SGD(model.parameters(), lr=0.0), fp64()

    def take(step, lr):
        loss = (0.5 * a * model.weight**2).sum()
        loss.backward()
        core.optimizer_step(optimizer, precision, None, lr)
        return loss.item()

    return model, optimizer, precision, take


@pytest.mark.parametrize("a", [0.7, 8.0, 300.0])
def test_on_a_quadratic_the_lowest_loss_lies_at_the_last_rate_that_converges(a):
    model, optimizer, precision, take = quadratic(a)
    lrs = np.geomspace(1e-4, 10, 70)
    curve = lr_finder.sweep(take, lrs, 0.0, model, optimizer, precision)
    last = max(lr for lr in lrs if lr < 2 / a)
    assert curve["smoothed"] == curve["loss"]
    assert curve["lr"][int(np.argmin(curve["loss"]))] == last
    assert lr_finder.suggest(curve["lr"], curve["smoothed"])["minimum/10"] == pytest.approx(
        last / 10, rel=1e-12
    )
    assert len(curve["lr"]) < 70  # it ended when it had diverged
    assert model.weight.item() == 1.0


def sweep_of(losses, smoothing=0.0):
    """The curve of a `take` that returns (or raises) what stands in `losses`, step by step."""

    def take(step, lr):
        if isinstance(losses[step], Exception):
            raise losses[step]
        return losses[step]

    lrs = [10.0**step for step in range(len(losses) - 1)]
    model, optimizer, precision, _ = quadratic(1.0)
    return lr_finder.sweep(take, lrs, smoothing, model, optimizer, precision)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.8, 0.98])
def test_a_constant_loss_is_drawn_flat_and_suggests_nothing(smoothing):
    curve = sweep_of([4.4] * 101, smoothing)
    assert len(curve["smoothed"]) == 100
    np.testing.assert_allclose(curve["smoothed"], 4.4, rtol=0, atol=1e-12)  # journal 003: 2.22 up to 4.35
    assert lr_finder.suggest(curve["lr"], curve["smoothed"]) == dict.fromkeys(
        ["steepest", "valley", "minimum/10"]
    )


def test_smoothing_is_the_weighted_mean_of_all_losses_so_far():
    losses = np.random.default_rng(0).uniform(2, 3, 30)
    curve = sweep_of([9.0, *losses], 0.8)
    for n, got in enumerate(curve["smoothed"], start=1):
        weights = 0.8 ** np.arange(n)[::-1]
        assert got == pytest.approx(np.average(losses[:n], weights=weights), rel=1e-12)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3, 3, 2, 2, 8.1, 9, 9], [3, 2, 2, 8.1]),  # over 4 times the lowest
        ([3, 3, 2, 2, 7.9, 7, 7], [3, 2, 2, 7.9, 7, 7]),
        ([3, 3, 2, math.nan, 1, 1], [3, 2]),
        ([3, 3, 2, math.inf, 1, 1], [3, 2]),
        ([3, 3, 2, FloatingPointError("gradient norm is nan"), 1, 1], [3, 2]),
    ],
)
def test_a_sweep_ends_when_the_loss_diverges_and_a_loss_belongs_to_the_rate_before_it(losses, kept):
    curve = sweep_of(losses)
    assert curve["loss"] == kept and curve["lr"] == [10.0**step for step in range(len(kept))]


def same(a, b):
    """Trees of tensors and values, equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("before", [0, 3], ids=["new optimizer", "optimizer with state"])
@pytest.mark.parametrize("error", [None, core.Stop("enough"), RuntimeError("broken")])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_sweep_puts_back_weights_optimizer_and_scaler_bit_for_bit(before, error, dtype):
    torch.manual_seed(0)
    model, precision = nn.Linear(3, 2), core.Precision(dtype, World())
    optimizer = core.make_optimizer(model, "adamw", 0.1)

    def take(step, lr):
        if error and step == 4:
            model(torch.ones(1, 3)).sum().backward()  # gradients that nobody used
            raise error
        x = torch.full((2, 3), math.inf if dtype == "fp16" and step == 2 else 1.0 + step)  # fp16: overflows
        precision.scaler.scale(model(x).square().sum()).backward()
        core.optimizer_step(optimizer, precision, 1.0, lr, 0.85)
        return 1.0

    def state():
        return copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.scaler.state_dict()))

    for step in range(before):
        take(step + 10, 1e-2)
    kept, seen = state(), []
    run = lambda step, lr: seen.append(take(step, lr)) or 1.0  # noqa: E731
    try:
        lr_finder.sweep(run, [1e-3] * 9, 0.8, model, optimizer, precision)
    except BaseException as raised:
        assert raised is error
    assert len(seen) == (4 if error else 10)
    assert same(state(), kept) and (len(kept[1]["state"]) == 2) == bool(before)
    assert all(weight.grad is None for weight in model.parameters())
    take(20, 1e-2)
    assert not same(state(), kept)  # what it compares does move


def test_the_longest_fall_is_found_through_noise():
    assert lr_finder.longest_fall(np.array([5, 4, 6, 3, 2, 7, 1])) == (0, 6)
    assert lr_finder.longest_fall(np.array([1, 2, 3])) == (0, 0)
    assert lr_finder.longest_fall(np.array([9, 1, 8, 7, 6, 0.5, 9])) == (0, 5)
    assert lr_finder.longest_fall(np.array([3])) == (0, 0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        y = rng.permutation(8)
        subsets = (c for n in range(1, 9) for c in itertools.combinations(range(8), n))
        falls = [c for c in subsets if all(y[i] > y[j] for i, j in itertools.pairwise(c))]
        most = max(map(len, falls))
        assert lr_finder.longest_fall(y) in {(c[0], c[-1]) for c in falls if len(c) == most}


def test_suggestions_on_a_curve_drawn_by_hand():
    lrs = [10.0**k for k in range(-8, 1)]
    y = [5.2, 5.1, 5.0, 4.0, 1.0, 0.5, 0.4, 0.3, 9.0]  # falls most at 1e-5, from 5.0 to 1.0 over two decades
    suggestions = lr_finder.suggest(lrs, y)
    assert suggestions == {"steepest": 1e-5, "valley": lrs[3], "minimum/10": pytest.approx(1e-2)}
    rising = dict.fromkeys(["steepest", "valley", "minimum/10"])
    assert lr_finder.suggest(lrs, sorted(y)) == lr_finder.suggest([], []) == rising
    assert lr_finder.suggest(lrs, [5 - 1e-4 * k for k in range(9)]) == rising  # less than a thousandth


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("span", [(1e-6, 1.0), (3e-8, 7e-8), (1e-10, 10.0)])
def test_the_plot_in_the_terminal_fits_100_columns_and_shows_every_mark(scale, span):
    lrs = np.geomspace(*span, 60).tolist()
    y = [scale * (3 - 2 / (1 + math.exp(-(i - 30) / 4)) + (i > 50) * (i - 50)) for i in range(60)]
    marks = {"steepest": lrs[20], "valley": lrs[40], "minimum/10": None}
    lines = lr_finder.text_plot(lrs, y, marks).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == 12 + 3
    curve, axis = "\n".join(lines[:12]), lines[12]
    assert 20 < curve.count("*") <= 60 and axis.count("S") == axis.count("V") == 1 and "M" not in axis
    assert axis.index("S") < axis.index("V") and lines[14].split("  ")[-2:] == ["S steepest", "V valley"]
    rows = [lines[:12].index(line) for line in lines[:12] if "*" in line]
    assert lines[rows[0]].index("*") < lines[rows[-1]].index("*")  # high on the left, low on the right


def test_a_flat_curve_can_be_drawn():
    lines = lr_finder.text_plot([1e-6, 1e-3, 1.0], [2.0, 2.0, 2.0], {}).splitlines()
    assert sum(line.count("*") for line in lines) == 3 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("losses", [[], [2.0]], ids=["no loss", "one loss"])
def test_a_sweep_that_ended_at_once_is_shown_not_a_crash(tmp_path, losses):
    """--find_steps 1 is legal, and the first update may already diverge."""
    said = []
    run = SimpleNamespace(folder=tmp_path, say=said.append, metrics=lambda *_: None)
    curve = {"lr": [1e-6] * len(losses), "loss": losses, "smoothed": losses}
    lr_finder.show_curve(run, curve, lr_finder.suggest(curve["lr"], curve["smoothed"]))
    assert said and (tmp_path / "lr_finder.json").exists()


# statistics and measures


def test_weights_of_the_bootstrap_equal_repeated_rows():
    rng = np.random.default_rng(0)
    values, groups, weights = rng.normal(size=(60, 2)), rng.integers(0, 12, 60), rng.integers(1, 5, 60)
    weighted = core.bootstrap(values, groups, weights=weights, samples=300)
    repeated = core.bootstrap(np.repeat(values, weights, 0), np.repeat(groups, weights), samples=300)
    np.testing.assert_allclose(weighted, repeated, rtol=0, atol=1e-12)  # the same draws, other roundings
    assert np.abs(weighted - core.bootstrap(values, groups, samples=300)).max() > 1e-3
    even = core.bootstrap(values, groups, weights=np.full(60, 7.0), samples=300)
    np.testing.assert_allclose(even, core.bootstrap(values, groups, samples=300), rtol=0, atol=1e-12)


def measured(model, blocks, unigram=None, eval_batch=3):
    cfg = script.Config(dtype="fp64", eval_batch=eval_batch)
    sums = core.evaluate(model, blocks, cfg, World())
    return sums, core.measure(sums, blocks, np.ones(23) if unigram is None else unigram)


@pytest.mark.parametrize("eval_batch", [1, 3, 64])
@pytest.mark.parametrize("length", [16 * 5 + 1, 16 * 5 + 2, 16 * 6, 9])
def test_the_measured_loss_is_the_mean_cross_entropy_of_the_whole_stream(eval_batch, length):
    model, stream = random_gpt(positions="rotary", std=0.15, dropout=0.5), ids(length, vocab_size=23)
    losses, hits = [], []
    with torch.no_grad():
        for start in range(0, length - 1, 16):
            x, y = stream[start : start + 16], stream[start + 1 : start + 17]
            logits = model(x[None, : len(y)])[0]
            losses += F.cross_entropy(logits, y, reduction="none").tolist()
            hits += (logits.argmax(-1) == y).tolist()
    blocks = core.Blocks(stream.numpy().astype(np.uint16), 16)
    sums, m = measured(model, blocks, eval_batch=eval_batch)
    assert len(losses) == length - 1 == m["targets"] and sums.shape == (len(blocks), 3)
    assert m["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert m["accuracy"] == pytest.approx(np.mean(hits), rel=1e-12)
    assert m["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-12)
    first = [losses[:16], losses[-((length - 2) % 16 + 1) :]]
    assert [sums[0, 0], sums[-1, 0]] == pytest.approx([sum(first[0]), sum(first[1])], rel=1e-12)


def test_the_unigram_loss_is_that_of_the_training_frequencies_plus_one():
    stream, unigram = ids(16 * 5 + 4).numpy(), np.random.default_rng(0).integers(0, 50, 23)
    m = measured(random_gpt(), core.Blocks(stream, 16), unigram)[1]
    share = (unigram + 1) / (unigram.sum() + 23)
    assert m["unigram_loss"] == pytest.approx(-np.log(share[stream[1:]]).mean(), rel=1e-12)


def test_a_model_that_guesses_uniformly_raises_the_alarm_and_one_that_knows_does_not():
    stream = np.random.default_rng(0).geometric(0.3, 16 * 60).clip(1, 22)  # frequencies tell a lot
    unigram, blocks = np.bincount(stream, minlength=23), core.Blocks(stream, 16)
    model = random_gpt()
    with torch.no_grad():
        model.wte.weight.zero_()  # tied: all logits are 0
    sums, m = measured(model, blocks, unigram)
    assert m["loss"] == pytest.approx(math.log(23), rel=1e-12)
    assert m["alarm"].startswith(f"NOT LEARNING: loss {math.log(23):.4f}")
    assert f"{m['unigram_loss']:.4f}" in m["alarm"] and "token frequencies" in m["alarm"]
    sums[:, 0] = (m["unigram_loss"] - 0.8) * sums[:, 2]
    knows = core.measure(sums, blocks, unigram)
    assert knows["alarm"] is None and knows["loss"] == pytest.approx(m["unigram_loss"] - 0.8)
    low, high = knows["above_unigram_interval"]
    assert low < -0.8 < high < 0


def test_the_interval_counts_a_block_as_often_as_it_has_targets():
    blocks = core.Blocks(ids(16 * 30 + 2).numpy(), 16)  # 30 of 16 targets, one of 1
    targets = blocks.targets(range(31))
    sums = np.c_[np.where(targets == 1, 1000.0, 16.0), np.zeros(31), targets]
    m = core.measure(sums, blocks, np.ones(23))
    assert m["loss"] == pytest.approx(1480 / 481) and m["loss_interval"][0] == pytest.approx(1)
    assert m["loss_interval"][1] < 12  # the last one drawn 3 times: 7; were all blocks equal: over 90


# constants

WIKIPEDIA_003 = {  # journal 003's resolved constants; what is not named here is as in Config
    "data": "wikimedia/wikipedia:20231101.en", "max_documents": 75_000, "tokenizer": "ascii",
    "val_share": 0.01, "test_share": 0.01, "model": "new", "n_inner": None, "positions": "learned",
    "norm": "layernorm", "activation": "relu", "bias": True, "qkv_bias": False, "tie_head": False,
    "head_bias": True, "dropout": 0.2, "epochs": 1, "max_steps": None, "max_minutes": None, "lr": 1e-3,
    "min_lr": 0.0, "schedule": "constant", "warmup": 0.0, "cycle_beta1": True, "optimizer": "adamw",
    "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": None, "dtype": "bf16",
    "micro_batch": None, "eval_every": 1000,
}  # fmt: skip
SMALL = {**shape(12, 12, 768), "block_size": 2048, "batch": 2, "lr": 6e-4}
MINI = {**shape(10, 8, 512), "block_size": 256, "batch": 128}
RESOLVED = {
    "cpu": {},
    "baby": WIKIPEDIA_003 | shape(6, 6, 384) | {"block_size": 256, "batch": 64},
    "mini_v0": WIKIPEDIA_003 | MINI,
    "mini_v1": WIKIPEDIA_003 | MINI | {"batch": 180},
    "gpt3_small": WIKIPEDIA_003 | SMALL | {"tokenizer": "gpt2"},
    "gpt3_small_char": WIKIPEDIA_003 | SMALL,
    "gpt3_small_char_one_cycle": WIKIPEDIA_003 | SMALL | {"schedule": "one_cycle", "warmup": 0.3},
    "gpt3_small_large_batch": WIKIPEDIA_003
    | SMALL
    | {"tokenizer": "gpt2", "batch": 128, "micro_batch": 2, "lr": 1e-5},
}


SOURCE = functools.cache(inspect.getsource)  # 0.2 s each time, with all that pytest holds


def parsed(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", SOURCE)  # parse_config takes its help from Config's comments
        return core.parse_config(script.Config, script.PRESETS, script.SMOKE, script.__doc__, list(argv))


def test_no_preset_is_left_out_here():
    assert script.PRESETS.keys() == RESOLVED.keys()


@pytest.mark.parametrize("preset", RESOLVED)
def test_a_preset_is_its_journals_row(preset):
    cfg, expected = dataclasses.asdict(parsed("--preset", preset)), RESOLVED[preset]
    defaults = dataclasses.asdict(script.Config(tag=preset))
    assert {name: cfg[name] for name in expected} == expected
    assert {name for name in cfg if cfg[name] != defaults[name]} <= expected.keys()


@pytest.mark.parametrize(
    ("preset", "vocabulary", "expected"),
    [
        *(("baby", 75, 10_796_619), ("mini_v0", 75, 31_717_451), ("mini_v1", 75, 31_717_451)),
        *(("gpt3_small_char", 75, 86_716_491), ("gpt3_small", 50257, 163_846_225)),
        *(("gpt3_small_char_one_cycle", 75, 86_716_491), ("gpt3_small_large_batch", 50257, 163_846_225)),
    ],
)
def test_a_preset_builds_the_journals_model(preset, vocabulary, expected):
    tokens = SimpleNamespace(tokenizer=range(vocabulary))  # only its length matters
    with torch.device("meta"):
        model = script.build_model(parsed("--preset", preset), tokens, World())
    assert core.count_parameters(model)[0] == expected


@pytest.mark.parametrize("preset", RESOLVED)
def test_every_preset_has_a_smoke_run_without_a_network(preset):
    cfg = parsed("--preset", preset, "--smoke")
    assert cfg.data == "python-docs" and cfg.dtype == "auto" and cfg.dropout == 0
    assert cfg.tokenizer == {"gpt2": "bpe:512"}.get(parsed("--preset", preset).tokenizer, cfg.tokenizer)
    assert cfg.schedule == parsed("--preset", preset).schedule and all(cfg.batch % n == 0 for n in (2, 3, 4))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--blok_size", "3"], ["unknown flag --blok_size: did you mean --block_size?"]),
        (["--block", "3"], ["unknown flag --block"]),
        (["--preset", "mini"], ["mini", "mini_v0"]),
        (["--positions", "alibi"], ["alibi", "rotary"]),
        (["--schedule", "one_cycle", "--min_lr", "1"], ["min_lr 1", "one_cycle", "leave it 0"]),
        (["--schedule", "gpt3", "--min_lr", "1e-5"], ["min_lr 1e-05", "gpt3", "leave it 0"]),
        (["--val_share", "0.5", "--test_share", "0.5"], ["val_share 0.5 + test_share 0.5", "nothing"]),
        (["--val_share", "0"], ["--val_share 0", "0.0001 to 0.9999"]),
        (["--find_from", "1", "--find_to", "0.1"], ["find_from 1.0", "find_to 0.1"]),
        (["--find_from", "1", "--find_to", "1"], ["find_from 1.0", "find_to 1.0"]),
        (["--find_smoothing", "1"], ["--find_smoothing 1.0", "0 to 0.9999"]),
        (["--mode", "find_lr", "--resume_timestamp", "latest"], ["--resume_timestamp", "not with find_lr"]),
        (["--mode", "generate", "--resume_timestamp", "auto"], ["--resume_timestamp", "not with generate"]),
        (["--top_p", "1.5"], ["--top_p 1.5"]),
        (["--dropout", "1.1"], ["--dropout 1.1", "0 to 1"]),
        (["--n_layer", "0"], ["--n_layer 0", "1 or more"]),
    ],
)  # fmt: skip
def test_a_wrong_constant_is_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and all(word in line for word in words), line


@pytest.mark.parametrize("wrong", [{"n_head": 3}, {"head_bias": True}, {"n_embd": 100, "n_head": 20}])
def test_a_shape_that_cannot_be_is_refused_before_the_text_is_tokenised(wrong, monkeypatch):
    """Law 8: nothing expensive starts. Tokenising Wikipedia takes an hour."""
    everywhere(monkeypatch.setattr, text, "open_corpus", lambda *_: pytest.fail("it tokenises first"))
    with pytest.raises(UserError):
        script.set_up(SimpleNamespace(pin=lambda *_: None), script.Config(**wrong), World())


# --no-dirty


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git checkout that stands for the project: `kept` is committed, `ignored` is ignored."""
    everywhere(monkeypatch.setattr, files, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "kept").write_text("1")
    (tmp_path / ".gitignore").write_text("ignored\n")
    git("add", ".")
    git("commit", "-qm", "first")
    return SimpleNamespace(path=tmp_path, git=git)


def test_a_clean_checkout_may_start(project):
    (project.path / "ignored").write_text("1")
    assert core.refuse_dirty() is None


@pytest.mark.parametrize("change", ["unstaged", "staged", "untracked", "untracked and hidden", "deleted"])
def test_any_uncommitted_change_is_refused(project, change):
    if change.startswith("untracked"):
        (project.path / "new").write_text("1")
        project.git("config", "status.showUntrackedFiles", "no" if "hidden" in change else "normal")
    elif change == "deleted":
        (project.path / "kept").unlink()
    else:
        (project.path / "kept").write_text("2")
        if change == "staged":
            project.git("add", "kept")
    with pytest.raises(UserError, match=r"uncommitted changes.*(kept|new)") as error:
        core.refuse_dirty()
    assert "--dirty" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_checkout_with_a_commit_is_refused(tmp_path, monkeypatch):
    everywhere(monkeypatch.setattr, files, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="no git checkout"):
        core.refuse_dirty()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "file").write_text("1")
    with pytest.raises(UserError, match="--no-dirty"):
        core.refuse_dirty()


# the modes and presets as a user starts them


def launched(*argv, size=1):
    return ranks.run("gpt_scratch", "--smoke", "--max_documents", 20, "--val_share", 0.2, *argv, size=size)


@pytest.mark.slow
def test_the_finder_draws_the_same_curve_on_two_ranks_and_leaves_the_weights():
    curves = []
    for size in (1, 2):
        got = launched("--mode", "find_lr", "--find_steps", 30, "--test_share", 0, size=size)
        found = json.loads((ranks.newest() / "lr_finder.json").read_text())
        curves.append((got["weights_sha256"], found["smoothed"], got["lr_finder"]))
        assert (ranks.newest() / "lr_finder.png").stat().st_size > 5000
        launched("--max_steps", 2, "--test_share", 0, "--resume_timestamp", "auto", size=size)
        assert len(list(Path("out").iterdir())) == 2  # a finder's run is not one to go on training with
        shutil.rmtree("out")
    assert curves[0][0] == curves[1][0]  # those of the seed: the sweep was undone
    # rates over 0.1 amplify the rounding between the two
    np.testing.assert_allclose(curves[0][1][:20], curves[1][1][:20], rtol=1e-5)


@pytest.mark.slow
def test_a_run_can_be_profiled_exported_and_talked_to():
    launched("--max_steps", 30, "--sample_tokens", 20, "--test_share", 0)
    folder = ranks.newest()
    codes = [
        ranks.launch("gpt_scratch", "--smoke", "--mode", "profile", "--test_share", 0, "--out", "other"),
        ranks.launch("gpt_scratch", "--mode", "export", "--model", folder, "--out", "theirs"),
        ranks.launch("gpt_scratch", "--mode", "generate", "--model", folder, "--prompt", "The ",
                     "--max_new_tokens", 5),
    ]  # fmt: skip
    assert codes == [[0], [0], [0]], Path("out.txt").read_text()
    assert Path("out.txt").read_text().splitlines()[-1].startswith("The ")
    assert json.loads((ranks.newest("other") / "trace.json").read_text())["traceEvents"]
    from transformers import AutoModelForCausalLM

    model, tokenizer = core.open_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained("theirs").eval()
    prompt = torch.tensor([tokenizer("import").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(prompt), theirs(prompt).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("preset", script.PRESETS)
def test_every_preset_learns_in_its_smoke_run(preset):
    got = ranks.run("gpt_scratch", "--preset", preset, "--smoke")
    assert got["test/above_unigram_interval"][1] < 0 and got["test/alarm"] is None
