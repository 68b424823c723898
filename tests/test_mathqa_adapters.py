"""run_mathqa.py with adapters: trains, loads and merges them; what it refuses."""

import json

import pytest
import ranks
import safetensors.torch
import torch
from toys.adapters import (
    METHODS,
    NOAM,
    OPTIMIZERS,
    a_step,
    assert_near,
    assert_same,
    config,
    moved,
    numbers,
    random_gpt,
)

import core
import run_mathqa as script
from core import UserError, World
from lab.models import loha_lokr

SMALL = [
    *["--smoke", "--mode", "train", "--init_from", "new", "--max_documents", 120],
    *["--pretrain", "noam_wide4,max_documents=60,tokenizer=bpe:1024,block_size=64,n_layer=1,n_embd=32"],
    *["--batch", 8, "--plain_blocks", 0, "--answer_rows", 0, "--out", "out"],
    *["--eval_rows", 8, "--max_steps", 2, "--warmup", 0, "--weight_decay", 0, "--test_weights", "last"],
    *["--no-final_eval", "--lora_rank", 4, "--lr", 1e-2],
]


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adafactor"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_moves_every_adapter_keeps_the_base_and_is_loaded_as_it_ended(method, optimizer):
    base = "bf16" if optimizer == "sgd" else "auto"
    cfg = config(*SMALL, "--method", method, "--optimizer", optimizer, "--base_dtype", base)
    result = script.main(cfg, World())
    folder = ranks.newest()
    assert result["steps"] == 2
    start, trained = script.tuned(cfg, script.open_base(cfg, World())[0], World())
    core.narrow_base(start, base)
    known, model, _ = script.load_model(folder, World())
    assert (known.method, known.lora_rank, known.optimizer, model.training) == (method, 4, optimizer, False)
    after = numbers(core.Adapters(model))
    assert moved(numbers(trained), after) == set(after)
    assert_same(core.base_weights(model), core.base_weights(start))
    stored = safetensors.torch.load_file(folder / "checkpoints" / "step_00000002" / "model.safetensors")
    assert_same(stored, after)
    assert result["trainable_parameters"] == sum(t.numel() for t in stored.values())
    x = torch.randint(model.config.vocab_size, (2, 16))
    with torch.no_grad():
        assert_near(script.merged(model)(x), model(x), 1e-5 if base == "auto" else 2e-2)


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_a_run_of_a_kind_of_lora_is_loaded_as_it_ended(method):
    result = script.main(config(*SMALL, "--method", method, "--lora_plus", 4), World())
    _, model, _ = script.load_model(ranks.newest(), World())
    cfg = config(*SMALL, "--method", method)
    _, start = script.tuned(cfg, script.open_base(cfg, World())[0], World())
    before, after = numbers(start), numbers(core.Adapters(model))
    still = {name for name in after if name.endswith(("A0", "B0"))}
    assert moved(before, after) == after.keys() - still and bool(still) == (method == "pissa")
    assert result["trainable_parameters"] == sum(t.numel() for name, t in after.items() if name not in still)
    x = torch.randint(model.config.vocab_size, (2, 16))
    with torch.no_grad():
        assert_near(script.merged(model)(x), model(x), 1e-5)


def test_a_rate_of_B_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"--lora_plus 4: loha has no B, use 1"):
        script.Config(method="loha", lora_plus=4.0)


def test_a_run_is_not_loaded_onto_another_base():
    script.main(config(*SMALL, "--method", "lokr"), World())
    path = ranks.newest() / "config.json"
    stored = json.loads(path.read_text())
    stored["constants"]["seed"] += 1  # draws another base: init_from is `new`
    del stored["seal"]  # as somebody would who knows what he does
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"is not the model that .* was trained on"):
        script.load_model(path.parent, World())


@pytest.mark.parametrize("arm", script.Config().arms)
def test_every_arm_of_the_study_trains_with_the_scripts_constants(arm):
    cfg = config("--preset", arm, "--weight_decay", 0, "--qat_group", 16)
    model, trained = script.tuned(cfg, random_gpt(**NOAM).train(), World())
    of, before = script.make_optimizer(cfg, model), numbers(trained)
    for _ in range(2):
        a_step(model, of)
    assert moved(before, numbers(trained)) == set(before)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_dropout_of_a_method_without_one_is_refused_in_one_line(method, capsys):
    with pytest.raises(SystemExit) as stop:
        config("--mode", "train", "--method", method, "--lora_dropout", "0.1")
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1
    assert f"--lora_dropout 0.1: {method} has none, use 0" in said[0]
    model = random_gpt()
    before = list(model.named_parameters())
    with pytest.raises(UserError, match=rf"--lora_dropout 0\.1: {method}") as error:
        loha_lokr.add_adapters(model, method, 4, 7, dropout=0.1)
    assert "\n" not in str(error.value)
    assert [name for name, _ in before] == [name for name, _ in model.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_quantised_training_of_adapters_is_refused(method):
    with pytest.raises(UserError, match=f"--method full, not {method}"):
        script.Config(method=method, qat="int4")


def test_a_base_that_is_trained_is_not_held_in_half_precision():
    with pytest.raises(UserError, match="method full trains all weights, none is frozen"):
        script.Config(method="full", base_dtype="bf16")
