"""Weights to transformers' GPT-2 and Llama folders and back: the same logits, or refused by name."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from toys.gpt import (
    FAMILY,
    GPT2_SIZES,
    GROUPED,
    LLAMA,
    YARN,
    ids,
    on_meta,
    random_gpt,
    shape,
    transformers_model,
)

import core
from core import UserError
from lab.models import decoding, gpt_formats
from lab.models.rotary import rotary_angles

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
MSCALE = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0, "mscale": 0.7}
MSCALE["original_max_position_embeddings"] = 8


def assert_close_logits(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


FORMATS = {  # shape -> (ours, transformers' class)
    "gpt2": ({}, "GPT2LMHeadModel"),
    "relu": ({"activation": "relu", "n_inner": 48, "tie_head": False}, "GPT2LMHeadModel"),
    "llama": (LLAMA, "LlamaForCausalLM"),
    "grouped": (LLAMA | {"n_kv_head": 2, "head_size": 6, "tie_head": False}, "LlamaForCausalLM"),
    "qwen2": (LLAMA | {"qkv_bias": True, "n_kv_head": 1}, "Qwen2ForCausalLM"),
    "qwen3": (LLAMA | {"qk_norm": True, "head_size": 6, "tie_head": False}, "Qwen3ForCausalLM"),
    "smollm3": (LLAMA | {"nope_every": 2, "n_kv_head": 2}, "SmolLM3ForCausalLM"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_transformers_computes_our_logits_from_saved_weights_and_they_come_back(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    config, their_class = FORMATS[kind]
    model = random_gpt(dtype=torch.float32, norm_eps=1e-3, **config)
    core.save_pretrained(model, None, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = gpt_formats.load_pretrained(str(tmp_path / "out"))
    x = ids(3, 16)
    with torch.no_grad():
        assert_close_logits(model(x), theirs(x).logits)
    assert type(theirs).__name__ == their_class
    assert dataclasses.replace(again.config, n_inner=None) == dataclasses.replace(model.config, n_inner=None)
    assert again.config.inner == model.config.inner
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def in_fp64(model):
    """transformers' model with its norms in fp64, too, which it computes in fp32 whatever it is."""
    from torch.nn import RMSNorm

    for name, module in [*model.double().named_modules()]:
        if type(module).__name__.endswith("RMSNorm"):
            norm = RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


@pytest.mark.parametrize("name", FAMILY)
def test_logits_loss_and_gradients_are_those_of_transformers(tmp_path, monkeypatch, name):
    kind, changes = FAMILY[name]
    theirs, x = transformers_model(kind, **changes), ids(3, 16)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")  # several files of weights
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    ours = gpt_formats.load_pretrained(str(tmp_path), dropout=0.25, checkpointing=True).eval()
    options = ours.config.tie_head, ours.config.dropout, ours.config.checkpointing
    assert options == (theirs.config.tie_word_embeddings, 0.25, True)
    with torch.no_grad():
        assert_close_logits(ours(x), theirs(x).logits)
    ours, theirs = ours.double(), in_fp64(theirs)
    if kind != "gpt2":
        ours.angles = rotary_angles(ours.config, torch.float64)
        cos, sin = (torch.cat([half, half], dim=-1)[None] for half in ours.angles)  # test_rotary checks them
        monkeypatch.setattr(theirs.model.rotary_emb, "forward", lambda x, position_ids: (cos, sin))
    double = {n: p.double() for n, p in theirs.state_dict().items()}
    ours.load_state_dict(gpt_formats.from_theirs(double, ours.config, kind))
    labels = torch.cat([x[:, 1:], torch.full((3, 1), core.IGNORE_INDEX)], dim=1)
    logits, loss = theirs(x).logits, ours(x, labels)
    wanted_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours(x), logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=0)
    loss.backward()
    wanted_loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    wanted = gpt_formats.from_theirs(gradients, ours.config, kind)
    assert not gradients  # every one of theirs is one of ours
    for n, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], rtol=1e-10, atol=1e-10 * float(wanted[n].abs().max()))


@pytest.mark.parametrize(("kind", "changes"), [("mistral", {}), ("qwen2", {"use_sliding_window": True})])
def test_a_model_that_looks_back_less_is_read_as_far_as_it_looks(tmp_path, capsys, kind, changes):
    window = {"sliding_window": 8, "max_window_layers": 1} | changes
    theirs = transformers_model(kind, **window)
    theirs.save_pretrained(tmp_path)
    decoding.note.cache_clear()
    ours = gpt_formats.load_pretrained(str(tmp_path)).eval()
    assert ours.config.block_size == 8
    assert "looks back 8 tokens: read as a model of 8 positions, not 16" in capsys.readouterr().err
    with torch.no_grad():
        assert_close_logits(ours(ids(3, 8)), theirs(ids(3, 8)).logits)


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
        (GROUPED, ["llama knows no nope_every 2, qk_norm True"]),
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
        ("llama", {"attention_bias": True}, ["has attention_bias: not supported"]),
        ("llama", {"mlp_bias": True, "hidden_act": "gelu"}, ["has mlp_bias, hidden_act gelu: not"]),
        ("llama", {"rope_parameters": DYNAMIC}, ["has rope_type dynamic: not supported"]),
        ("qwen2", {"rope_parameters": MSCALE}, ["has mscale: not supported"]),
        ("llama", {"num_key_value_heads": 3}, [": n_head 4 is no multiple of n_kv_head 3"]),
        ("qwen2", {"rope_parameters": YARN | {"factor": None}}, ["rope_scaling yarn with factor None"]),
        ("smollm3", {"no_rope_layers": [0, 1]}, ["irregular no_rope_layers"]),
        ("smollm3", {"no_rope_layers": [1, 1], "no_rope_layer_interval": 0}, ["irregular no_rope_layers"]),
        ("gpt2", {"activation_function": "gelu"}, ["gelu", "not GPT-2's"]),  # the one of erf
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scaling of attention"]),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(tmp_path, kind, changes, words):
    transformers_model(kind, **changes).save_pretrained(tmp_path)
    with pytest.raises(gpt_formats.OtherKind) as error:  # so that eval.py takes the model as it is
        gpt_formats.load_pretrained(str(tmp_path))
    assert all(word in str(error.value) for word in [*words, str(tmp_path)])


def test_a_config_that_transformers_reads_and_cannot_compute_is_one_line(tmp_path):
    transformers_model("mistral", sliding_window=0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is damaged, transformers cannot compute it"):
        gpt_formats.load_pretrained(str(tmp_path))


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
    with pytest.raises(UserError, match="is a bert: use a gpt2, llama, qwen2, qwen3, smollm3 or mistral"):
        gpt_formats.load_pretrained(str(tmp_path / "bert"))
