"""Adapters in peft's format, both ways; what is more than plain LoRA is refused by name."""

import json
import os
import re

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from toys.lora import (
    adapted_gpt,
    assert_close_logits,
    assert_far,
    assert_same,
    beside_peft,
    logits,
    numbers,
    random_gpt,
)
from transformers import GPT2LMHeadModel

import core
from core import UserError
from lab.models import gpt_formats, lora_peft


@pytest.mark.parametrize(
    ("how", "config"),
    [
        ({}, {}),
        ({"rank": 1}, {}),
        ({"rank": 3, "scaling": "alpha/sqrt(r)"}, {}),
        ({"targets": "attention"}, {}),
        ({"targets": "mlp", "last_layers": 1}, {"activation": "relu", "n_inner": 48}),
        ({"head": True}, {"tie_head": False}),
        ({"head": True, "last_layers": 0, "scaling": "alpha"}, {"tie_head": False}),
        ({"last_layers": 11}, {"n_layer": 12}),  # h.1 and h.11; from 20 names on peft looks for shorter ones
    ],
)
def test_peft_computes_our_logits_and_our_adapters_come_back(tmp_path, how, config):
    model, theirs = beside_peft(tmp_path, config=config, **how)
    assert_close_logits(logits(model), logits(theirs))
    with theirs.disable_adapter():
        assert_far(logits(model), logits(theirs))
    again = random_gpt(**config)
    names = lora_peft.load_peft(again, tmp_path / "adapter", dropout=0.25)
    assert sorted(names) == sorted(core.adapted(again)) == sorted(core.adapted(model))
    assert_same(numbers(again), numbers(model))
    assert core.count_parameters(again) == core.count_parameters(model)
    ours = core.adapted(model)
    for name, layer in core.adapted(again).items():
        # alpha was written for peft's rank and divided by it again: one rounding
        assert layer.multiplier == pytest.approx(ours[name].multiplier, rel=1e-15)
        assert (layer.parts, layer.dropout.p) == (ours[name].parts, 0.25)
    assert_close_logits(logits(again.eval()), logits(model))


def test_an_export_says_its_dropout_and_its_base(tmp_path):
    lora_peft.save_peft(adapted_gpt(dropout=0.125), tmp_path / "adapter", "openai-community/gpt2")
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, peft.LoraConfig) and config.inference_mode
    assert (config.base_model_name_or_path, config.lora_dropout) == ("openai-community/gpt2", 0.125)


@pytest.mark.parametrize("config", [{"bias": False}, {"tie_head": False, "head_bias": True}])
def test_shapes_that_transformers_does_not_know_are_not_exported(tmp_path, config):
    with pytest.raises(UserError, match="transformers has no model of this shape"):
        lora_peft.save_peft(adapted_gpt(config=config), tmp_path / "adapter", "base")
    assert not any(tmp_path.iterdir())


def base_folder(folder, **config):
    core.save_pretrained(random_gpt(**config), None, folder / "base")
    return folder / "base"


def peft_writes(folder, base, config, save_embedding_layers=False):
    """What peft saves after a training; returns its model."""
    torch.manual_seed(7)
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    for weight in theirs.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.2)
    theirs.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return theirs.eval()


def lora_config(**changes):
    usual = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4}
    return peft.LoraConfig(**usual | {"lora_alpha": 7, "fan_in_fan_out": True} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"r": 1},  # less than the parts of c_attn
        {"r": 6},  # a multiple of them
        {"use_rslora": True},
        {"target_modules": ["c_attn"], "layers_to_transform": [1]},
        {"target_modules": ["c_attn", "lm_head"]},
        {"rank_pattern": {"h.0.attn.c_attn": 6, "c_fc": 2}},
        {"alpha_pattern": {"c_proj": 3, "mlp.c_proj": 11, "^transformer.h.1.mlp.c_fc": 20}},
        {
            # not fc: a pattern is the whole of a name's last parts
            "alpha_pattern": {r"h\.\d\.attn\..*": 3, "fc": 40, "c_fc": 2},
            "rank_pattern": {"c_attn": 3},
            "use_rslora": True,
        },
        {"layers_to_transform": [0], "alpha_pattern": {"c_attn": 1}, "lora_dropout": 0.3},
        {"init_lora_weights": "gaussian", "exclude_modules": r".*h\.0\.mlp.*"},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_we_compute_the_logits_of_what_peft_trained(tmp_path, changes):
    untied = {"tie_head": False}
    base = base_folder(tmp_path, **untied)
    theirs = peft_writes(tmp_path / "adapter", base, lora_config(**changes), "auto")  # a head is copied, too
    model = gpt_formats.load_pretrained(str(base)).eval()
    before = numbers(model)
    plain = logits(model)
    names = lora_peft.load_peft(model, tmp_path / "adapter")
    adapted = [re.sub(r"^base_model.model.(transformer.)?|.lora_A$", "", name)
               for name, module in theirs.named_modules() if name.endswith(".lora_A")]  # fmt: skip
    assert sorted(names) == sorted(adapted) == sorted(core.adapted(model))
    assert_close_logits(logits(model), logits(theirs))
    assert_far(logits(model), plain)
    assert_close_logits(logits(core.merge_lora(model)), logits(theirs.merge_and_unload()))
    assert_same(core.base_weights(model), before)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{letter}" for name in names for letter in "AB"}


def test_what_peft_trained_goes_out_again(tmp_path):
    base = base_folder(tmp_path)
    patterns = {"rank_pattern": {"c_attn": 3}, "alpha_pattern": {"mlp.c_proj": 11}}
    theirs = peft_writes(tmp_path / "theirs", base, lora_config(**patterns))
    model = gpt_formats.load_pretrained(str(base)).eval()
    lora_peft.load_peft(model, tmp_path / "theirs")
    lora_peft.save_peft(model, tmp_path / "ours", str(base))
    again = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "ours").eval()
    assert_close_logits(logits(again), logits(theirs))


def edit_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


B_OF_FC = "base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"
DAMAGES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "a broken config": (lambda f: (f / "adapter_config.json").write_text('{"r": 4,'), "Expecting"),
    "a config of no text": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe{"), "decode"),
    "cut tensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"abc"), ""),
}
NONSENSE = {
    "a list for a config": (lambda f: (f / "adapter_config.json").write_text("[]"), ""),
    "no tensor inside": (lambda f: edit_tensors(f, dict.clear), ""),
    "an A without its B": (lambda f: edit_tensors(f, lambda ts: ts.pop(B_OF_FC)), "h.0.mlp.c_fc"),
    "a B of another rank": (lambda f: edit_tensors(f, lambda ts: cut(ts, 2)), "h.0.mlp.c_fc"),
    "A and B of rank 0": (lambda f: edit_tensors(f, no_rank), "by matrices of rank 0"),
    "a B of rank 1": (lambda f: edit_tensors(f, lambda ts: cut(ts, 1)), "h.0.mlp.c_fc"),  # copy_ would repeat
}


def no_rank(tensors):
    tensors |= {
        name: tensor[:0] if ".lora_A" in name else tensor[:, :0].clone() for name, tensor in tensors.items()
    }


def cut(tensors, rank):
    tensors[B_OF_FC] = tensors[B_OF_FC][:, :rank].clone()


def refusal(model, folder) -> str:
    """What load_peft says, in one line that names the folder."""
    with pytest.raises(UserError) as error:
        lora_peft.load_peft(model, folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        assert "no whole adapter of peft" in refusal(random_gpt(), tmp_path / name)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    lora_peft.save_peft(adapted_gpt(), tmp_path / "adapter", "base")
    (tmp_path / "adapter" / name).unlink()
    os.mkfifo(tmp_path / "adapter" / name)
    assert f"{name} is a pipe" in refusal(random_gpt(), tmp_path / "adapter")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused(tmp_path, damage):
    lora_peft.save_peft(adapted_gpt(), tmp_path / "adapter", "base")
    change, word = DAMAGES[damage]
    change(tmp_path / "adapter")
    message = refusal(random_gpt(), tmp_path / "adapter")
    assert "no whole adapter of peft" in message and word in message


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_whole_files_that_do_not_make_an_adapter_are_refused(tmp_path, nonsense):
    lora_peft.save_peft(adapted_gpt(), tmp_path / "adapter", "base")
    change, word = NONSENSE[nonsense]
    change(tmp_path / "adapter")
    assert word in refusal(random_gpt(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora_config(modules_to_save=["ln_f"]), ["modules_to_save"]),
        (lora_config(bias="all"), ["bias all"]),
        (lora_config(bias="lora_only"), ["bias lora_only"]),
        (lora_config(target_modules=["lm_head"], fan_in_fan_out=False, lora_bias=True), ["lora_bias"]),
        (lora_config(target_modules=["c_fc", "wte"]), ["wte", "lora_embedding_A"]),
        (peft.LoHaConfig(target_modules=["lm_head"], r=4), ["hada_w1"]),
        (peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True), ["ia3"]),
        (lora_config(trainable_token_indices={"wte": [1, 2]}), ["token"]),
        (lora_config(alora_invocation_tokens=[1, 2]), ["alora"]),  # for what follows these tokens only
    ],
    ids=["modules_to_save", "bias all", "bias lora_only", "lora_bias", "embedding", "LoHa", "IA3",
         "trainable tokens", "aLoRA"],
)  # fmt: skip
def test_what_is_more_than_plain_lora_is_refused_by_name(tmp_path, config, words):
    base = base_folder(tmp_path, tie_head=False)
    peft_writes(tmp_path / "adapter", base, config)
    message = refusal(random_gpt(tie_head=False), tmp_path / "adapter")
    assert "holds more than plain LoRA" in message and all(word in message for word in words)


@pytest.mark.parametrize("kind", ["LOHA", "PREFIX_TUNING", None])
def test_another_kind_of_adapter_is_refused_by_the_name_of_its_kind(tmp_path, kind):
    lora_peft.save_peft(adapted_gpt(), tmp_path / "adapter", "base")
    edit_config(tmp_path / "adapter", peft_type=kind)
    assert f"({kind})" in refusal(random_gpt(), tmp_path / "adapter")


@pytest.mark.parametrize("changes", [{"target_parameters": ["c_fc.weight"]}, {"use_dora": True}])
def test_a_config_that_says_more_than_its_tensors_is_refused(tmp_path, changes):
    lora_peft.save_peft(adapted_gpt(), tmp_path / "adapter", "base")
    edit_config(tmp_path / "adapter", **changes)
    assert f"({next(iter(changes))}" in refusal(random_gpt(), tmp_path / "adapter")


@pytest.mark.parametrize(("init", "targets"), [("pissa", ["c_attn", "c_fc"]), ("olora", ["lm_head"])])
def test_an_adapter_to_a_base_that_peft_changed_gives_pefts_logits_or_is_refused(tmp_path, init, targets):
    """Both take A and B out of the base's matrices, and peft does it again when it loads them."""
    base, config = base_folder(tmp_path, tie_head=False), lora_config(target_modules=targets)
    config.init_lora_weights = init
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data *= 1.5
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "adapter")
    assert_close_logits(logits(again.eval()), logits(theirs.eval()))
    model = gpt_formats.load_pretrained(str(base)).eval()
    try:
        lora_peft.load_peft(model, tmp_path / "adapter")
    except UserError as error:
        assert init in str(error)
    else:
        assert_close_logits(logits(model), logits(theirs))


def test_adapters_of_another_model_are_refused(tmp_path):
    lora_peft.save_peft(adapted_gpt(config={"n_embd": 64}), tmp_path / "wider", "base")
    message = refusal(random_gpt(), tmp_path / "wider")
    assert "another shape" in message and "h.0.attn.c_attn" in message
    lora_peft.save_peft(adapted_gpt(last_layers=1, config={"n_layer": 3}), tmp_path / "deeper", "base")
    message = refusal(random_gpt(), tmp_path / "deeper")
    assert "adapts h.2." in message and "the model lacks" in message
    fitting = adapted_gpt(targets="mlp", config={"n_inner": 48})
    lora_peft.save_peft(fitting, tmp_path / "slimmer", "base")
    assert "h.0.mlp.c_fc" in refusal(random_gpt(), tmp_path / "slimmer")


def test_an_adapter_of_the_head_needs_a_head(tmp_path):
    model = adapted_gpt(head=True, last_layers=0, config={"tie_head": False})
    lora_peft.save_peft(model, tmp_path / "adapter", "base")
    message = refusal(random_gpt(), tmp_path / "adapter")
    assert "adapts lm_head: the model lacks it" in message and "--no-tie_head" in message
    base = base_folder(tmp_path, tie_head=False)
    peft_writes(tmp_path / "copied", base, lora_config(target_modules=["lm_head"]), "auto")
    assert "another lm_head" in refusal(random_gpt(tie_head=False, seed=1), tmp_path / "copied")


ODD_ALPHAS = [
    *({"lora_alpha": value} for value in (None, "16", float("nan"))),
    *({"alpha_pattern": value} for value in ([1], {"c_attn": None}, {"(": 2})),
]


@pytest.mark.parametrize("changes", ODD_ALPHAS, ids=str)
def test_an_adapter_whose_alpha_is_no_number_is_one_line(tmp_path, changes):
    model = core.GPT(core.GPTConfig(23, 16, 1, 2, 8))
    core.add_lora(model, 2, 4)
    lora_peft.save_peft(model, tmp_path / "adapter", "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(
        core.UserError, match=r"lora_alpha or alpha_pattern is no number|no regular expression"
    ):
        lora_peft.load_peft(core.GPT(core.GPTConfig(23, 16, 1, 2, 8)), tmp_path / "adapter")


def test_an_adapter_config_of_endless_depth_is_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(core.UserError, match="is no whole adapter of peft"):
        lora_peft.load_peft(core.GPT(core.GPTConfig(23, 16, 1, 2, 8)), tmp_path)
