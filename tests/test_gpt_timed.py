"""gpt_scratch.py: journal 004's presets, and pretraining that goes on from a run."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import safetensors.torch
import torch
from ranks import everywhere, newest, result
from torch import nn

import core
import gpt_scratch as script
from lab.train import optim

SLIMPAJAMA_004 = {  # the journal's resolved constants; what is not named here is as in Config
    "data": "DKYoon/SlimPajama-6B", "max_documents": None, "max_tokens": None, "tokenizer": "gpt2",
    "val_share": 0.0005, "test_share": 0.0005, "split_seed": 42, "block_size": 512, "model": "new",
    "model_step": None, "n_layer": 10, "n_head": 16, "n_embd": 1024, "n_inner": None, "positions": "rotary",
    "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False, "tie_head": True,
    "head_bias": False, "vocab_multiple": 64, "dropout": 0.0, "batch": 256, "micro_batch": 64, "epochs": None,
    "max_steps": None, "max_minutes": 180.0, "lr": 8e-4, "min_lr": 0.0, "warmup": 0.3,
    "schedule": "one_cycle", "cycle_beta1": True, "optimizer": "adamw", "beta1": 0.9, "beta2": 0.95,
    "eps": 1e-8, "weight_decay": 0.1, "decay_embedding": False, "clip": 1.0, "dtype": "auto",
    "eval_every": 2000, "eval_rows": 1536, "save_every": 500, "test_weights": "last", "compile": True,
}  # fmt: skip
RESOLVED = {
    "noam_wide4": SLIMPAJAMA_004,
    "noam_wide4_effective": SLIMPAJAMA_004 | {"lr": 1e-3},
    "continue_noam": SLIMPAJAMA_004
    | {"model": "newest", "schedule": "cosine", "lr": 8e-5, "min_lr": 8e-6, "warmup": 0.05}
    | {"max_minutes": 45.0},
}
READ = [
    *("--smoke", "--out", "out", "--preset", "noam_wide4", "--max_documents", 60),
    *("--batch", 4, "--max_steps", 20, "--eval_every", 10, "--eval_rows", 8, "--log_every", 1),
    *("--sample_tokens", 0, "--save_every", 10),
]


def parsed(*argv):
    constants = script.Config, script.PRESETS, script.SMOKE
    return core.parsed_config(*constants, "", [str(word) for word in argv])


def here(*argv) -> dict:
    """A run in this process; its result.json."""
    script.main(parsed(*argv), core.World())
    return result()


def preset_of(name, *argv) -> list:
    return [name if word == "noam_wide4" else word for word in [*READ, *argv]]


@pytest.mark.parametrize("preset", RESOLVED)
def test_a_preset_is_the_journals_row(preset):
    cfg, expected = core.constants_of(parsed("--preset", preset)), RESOLVED[preset]
    defaults = core.constants_of(script.Config(tag=preset))
    assert {name: cfg[name] for name in expected} == expected
    assert {name for name in cfg if cfg[name] != defaults[name]} <= expected.keys()


def test_the_preset_builds_the_journals_model():
    tokens = SimpleNamespace(unigram=range(50257))  # only its length matters
    with torch.device("meta"):
        model = script.build_model(parsed("--preset", "noam_wide4"), tokens, core.World())
    assert model.config.vocab_size == 50304 and core.count_parameters(model)[0] == 179_983_360


@pytest.mark.parametrize(("preset", "peak"), [("noam_wide4", 8e-4), ("noam_wide4_effective", 1e-3)])
def test_its_one_cycle_is_torchs_with_the_peak_it_names(preset, peak):
    cfg = parsed("--preset", preset)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=500, pct_start=0.3, cycle_momentum=False
    )
    for step in range(500):
        assert math.isclose(core.lr_at(cfg, step, 500), theirs.get_last_lr()[0], rel_tol=1e-6)
        optimizer.step()
        theirs.step()


def test_what_continues_noam_falls_from_a_tenth_of_its_rate_to_a_hundredth():
    cfg = parsed("--preset", "continue_noam")
    rates = [core.lr_at(cfg, step, 1000) for step in range(1001)]
    assert math.isclose(max(rates), 8e-5) and np.argmax(rates) in (49, 50)
    assert math.isclose(rates[-1], 8e-6) and min(rates[50:]) == rates[-1]
    assert math.isclose(rates[525], 8e-6 + (8e-5 - 8e-6) / 2, rel_tol=0.01)  # the middle in the middle


def weights(folder, step):
    return safetensors.torch.load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["val/loss"] for row in rows if "val/loss" in row]


def run_folders() -> list[Path]:
    return sorted(path.parent for path in Path("out").glob("*/config.json"))


@pytest.mark.slow
def test_a_run_takes_the_rates_it_names_and_others_go_on_with_its_weights(monkeypatch):
    used, original = [], core.optimizer_step

    def watched(optimizer, *args, **kwargs):
        norm = original(optimizer, *args, **kwargs)
        used.append([group["lr"] for group in optimizer.param_groups])
        return norm

    with monkeypatch.context() as patch:
        everywhere(patch.setattr, optim, "optimizer_step", watched)
        first = here(*READ, "--lr", 7e-3)
    folder = newest()
    cfg = parsed(*READ, "--lr", 7e-3)
    assert used == [[core.lr_at(cfg, step, 20)] * 2 for step in range(20)]
    assert math.isclose(max(used)[0], 7e-3)

    time.sleep(1.1)  # folders are told apart by the second
    for _ in range(3):  # once, however often it is asked
        then = here(*preset_of("continue_noam", "--lr", 1e-3, "--resume_timestamp", "auto"))
    assert run_folders() == [folder, newest()]
    constants = json.loads((newest() / "config.json").read_text())["constants"]
    assert constants["model"] == str(folder) and constants["schedule"] == "cosine"
    assert then["test/loss"] < first["test/loss"]  # it has gone on learning
    assert losses(newest())[0] < losses(folder)[-1]  # from where the other was
    before, after = weights(folder, 20), weights(newest(), 20)
    assert before.keys() == after.keys() and all(not torch.equal(before[k], after[k]) for k in before)

    stamp = newest().name[:15]  # a resume keeps its base, whatever is newest then
    here(*preset_of("continue_noam", "--model", "newest", "--resume_timestamp", stamp, "--max_steps", 21))
    assert result()["step"] == 21 and len(run_folders()) == 2
    for step in (10, 20):
        here(*READ, "--model", folder, "--model_step", step, "--max_steps", 0)
        start = weights(newest(), 0)
        assert all(torch.equal(value, start[name]) for name, value in weights(folder, step).items())
    known = run_folders()
    for argv, said in [
        (["--model_step", 3], "has no whole step_00000003; there: step_00000010, step_00000020"),
        (["--block_size", 65], "--block_size 65 is over the 32 of"),
        (["--tokenizer", "chars"], "brings its own tokenizer"),
    ]:
        with pytest.raises(core.UserError, match=said):
            here(*READ, "--model", folder, *argv)
    assert run_folders() == known  # refused before anything is kept


@pytest.mark.slow
def test_the_preset_and_lion_give_the_same_weights_on_any_ranks():
    """fp64, to 1e-9: a padded vocabulary, one_cycle, some validation blocks, and signs of gradients."""
    ends = {}
    for size, micro_batch in ((1, "none"), (2, 1)):
        flags = [*READ, "--optimizer", "lion", "--lr", 3e-4, "--dtype", "fp64", "--micro_batch", micro_batch]
        found = ranks.run("gpt_scratch", *flags, size=size)
        ends[size] = found["test/loss"], losses(newest()), weights(newest(), 20)
        Path("out").rename(f"of_{size}")
    (loss, path, alone), (both_loss, both_path, together) = ends.values()
    assert both_loss == pytest.approx(loss, abs=1e-9) and both_path == pytest.approx(path, abs=1e-9)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-9, msg=name)


def test_continued_pretraining_reads_the_text_in_a_new_order(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        core, "ShardedBatches", lambda *args, seed: seeds.append(seed) or core_batches(*args, seed=seed)
    )
    here(*READ, "--max_steps", 0)
    here(*READ, "--max_steps", 0, "--model", newest())
    assert seeds == [0, 1000]


core_batches = core.ShardedBatches


def test_there_is_nothing_newest_without_a_run():
    with pytest.raises(core.UserError, match=r"no finished run of gpt_scratch.py in out: train one"):
        here(*preset_of("continue_noam"))
    assert not run_folders()


def test_a_run_that_nothing_ends_is_one_line():
    with pytest.raises(core.UserError, match=r"^nothing ends training: use --max_minutes"):
        parsed("--preset", "noam_wide4", "--max_minutes", "none")


def test_the_clock_ends_a_run_of_no_planned_length():
    found = here(*READ, "--max_steps", "none", "--max_minutes", 0.01)
    log = (newest() / "log.txt").read_text()
    assert found["step"] > 0 and found["train_seconds"] >= 0.6 and "max_minutes decides the number" in log


def test_the_embedding_decays_unless_it_is_told_not_to():
    for words, decays in [([], 0.1), (["--no-decay_embedding"], 0.0)]:
        cfg = parsed(*words)
        optimizer = script.make_optimizer(cfg, model := core.GPT(script.shape_of(cfg, 9)))
        (group,) = (g for g in optimizer.param_groups if any(p is model.wte.weight for p in g["params"]))
        assert group["weight_decay"] == decays
