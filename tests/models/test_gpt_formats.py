"""Weights to transformers' GPT-2 and Llama folders and back: the same logits, or refused by name."""

import dataclasses

import pytest
import torch
from toys.gpt import GPT2_SIZES, LLAMA, ids, on_meta, random_gpt, shape, transformers_model

import core
from core import UserError
from lab.models import gpt_formats


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
