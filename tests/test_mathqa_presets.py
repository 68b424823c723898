"""What run_mathqa.py's presets resolve to, stage by stage, and pretraining that goes on."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from ranks import everywhere, newest
from torch import nn
from toys.quantise import TINY, assert_same, here, metrics, parsed

import core
import run_mathqa
from lab.run.flags import FIND_CONSTANTS
from lab.train import optim

READ = [
    *("--smoke", "--mode", "pretrain", "--text_documents", 60, "--n_embd", 32, "--pretrain_batch", 4),
    *("--pretrain_max_steps", 20, "--pretrain_eval_every", 20, "--eval_rows", 8, "--log_every", 1),
]
UNBOUND = {
    "pretrain": ["--mode", "pretrain", "--text_documents", 60, "--pretrain_max_steps", "none"],
    "finetune": [*TINY[1:], "--max_steps", "none"],
}


@pytest.mark.parametrize("mode", UNBOUND)
def test_a_stage_that_nothing_ends_is_one_line(mode):
    with pytest.raises(core.UserError, match=r"nothing ends (pretraining|fine-tuning)") as error:
        here("--smoke", *UNBOUND[mode])
    assert "\n" not in str(error.value)
    assert ("--pretrain_max_minutes" in str(error.value)) == (mode == "pretrain")
    assert not list(newest_folders())


BOTH = [
    *("--smoke", "--mode", "both", "--max_documents", 300, "--text_documents", 60, "--n_embd", 32),
    *("--pretrain_max_steps", 3, "--pretrain_eval_every", 3, "--plain_blocks", 3),
]


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["--max_steps", "none"], "nothing ends"), (["--qat", "int4", "--qat_group", 48], "--qat_group 48")],
    ids=["unbound", "group"],
)
def test_a_mistake_of_the_second_stage_is_found_before_the_first(argv, word):
    with pytest.raises(core.UserError, match=word):
        here(*BOTH, *argv)
    assert not list(newest_folders())


def newest_folders(out="out"):
    return (path.parent for path in sorted(Path(out).glob("*/config.json")))


DEFAULTS = {
    **{"data": "kinit/math_qa", "max_documents": None, "answer_format": "text", "loss_on_prompt": False},
    **{"max_length": 512, "pack": False, "text": "DKYoon/SlimPajama-6B", "text_column": "text"},
    **{"text_documents": None, "text_tokens": None, "tokenizer": "gpt2", "val_share": 0.0005},
    **{"test_share": 0.0005, "split_seed": 42, "block_size": 512, "n_layer": 10, "n_head": 16},
    **{"n_embd": 1024, "vocab_multiple": 64, "dropout": 0.0, "checkpointing": False, "init_from": None},
    **{"init_step": None, "method": "full", "lora_rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.0},
    **{"qat": "off", "qat_group": 256, "qat_start": 0.25, "pretrain_batch": 256},
    **{"pretrain_micro_batch": 64, "pretrain_max_steps": None, "pretrain_max_minutes": 180.0},
    **{"pretrain_lr": 8e-4, "pretrain_min_lr": 0.0, "pretrain_warmup": 0.3},
    **{"pretrain_schedule": "one_cycle", "pretrain_optimizer": "adamw", "pretrain_weight_decay": 0.1},
    **{"pretrain_eval_every": 2000, "pretrain_save_every": 500, "batch": 128, "micro_batch": None},
    **{"micro_tokens": 16384, "group_lengths": True, "epochs": None, "max_steps": None, "max_minutes": 60.0},
    **{"lr": 5e-5, "min_lr": 0.0, "warmup": 0.05, "schedule": "cosine", "cycle_beta1": True},
    **{"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0},
    **{"skip_spikes": False, "dtype": "auto", "compile": False, "seed": 0, "eval_batch": 64},
    **{"eval_every": 500, "eval_rows": 500, "answer_rows": 200, "sample_tokens": 24, "final_eval": True},
    **{"test_weights": "best"},
    **{"save_every": None, "keep": 2, "log_every": 25, "price_per_hour": None, "note": "", "plain": None},
    **{"plain_blocks": 100, "budgets": ("steps", "time"), "shares": ("0.5", "0.75", "0.9"), "seeds": 3},
    "arms": (
        *("full", "full,optimizer=lion,lr=1e-5,weight_decay=1,beta2=0.99", "lora,lr=5e-4", "loha,lr=5e-4"),
        *("lokr,lr=2e-3", "full,qat=int4"),
    ),
    **{"mode": "both", "run_folder": None, "out": None, "tag": "recommended", "resume_timestamp": None},
    **{"resume_step": None, "backend": "auto"},
    **{"find_from": 1e-6, "find_to": 1.0, "find_steps": 100, "find_smoothing": 0.8},
}
NOAM = DEFAULTS | {
    **{"mode": "pretrain", "test_weights": "last", "eval_rows": 1536, "compile": True},
}
RESOLVED = {
    "recommended": DEFAULTS,
    "noam_wide4": NOAM | {"tag": "noam_wide4"},
    "noam_wide4_effective": NOAM | {"tag": "noam_wide4_effective", "pretrain_lr": 1e-3},
    "continue_noam": NOAM
    | {"tag": "continue_noam", "init_from": "newest", "pretrain_schedule": "cosine", "pretrain_lr": 8e-5}
    | {"pretrain_min_lr": 8e-6, "pretrain_warmup": 0.05, "pretrain_max_minutes": 45.0},
    "second_stage_full": DEFAULTS
    | {"tag": "second_stage_full", "mode": "finetune", "test_weights": "last", "loss_on_prompt": True}
    | {"group_lengths": False, "lr": 5e-6, "min_lr": 5e-7, "eval_rows": 1536, "compile": True},
}


def test_every_preset_is_written_down_here():
    assert run_mathqa.PRESETS.keys() == RESOLVED.keys()
    assert dataclasses.asdict(run_mathqa.Config()) | {"tag": "recommended"} == DEFAULTS


@pytest.mark.parametrize("preset", RESOLVED)
def test_a_preset_resolves_to_these_constants(preset):
    assert dataclasses.asdict(parsed("--preset", preset)) == RESOLVED[preset]


@pytest.mark.parametrize(("preset", "peak"), [("noam_wide4", 8e-4), ("noam_wide4_effective", 1e-3)])
def test_the_first_stage_of_a_preset_is_the_journal_s(preset, peak):
    cfg = run_mathqa.pretraining(parsed("--preset", preset))
    assert (cfg.lr, cfg.schedule, cfg.warmup, cfg.cycle_beta1) == (peak, "one_cycle", 0.3, True)
    assert (cfg.batch, cfg.micro_batch, cfg.batch // cfg.micro_batch, cfg.block_size) == (256, 64, 4, 512)
    assert (cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.max_minutes) == (10, 1024, 16, 180.0)
    assert (cfg.weight_decay, cfg.clip, cfg.beta1, cfg.beta2) == (0.1, 1.0, 0.9, 0.95)
    assert (cfg.optimizer, cfg.max_steps, cfg.epochs, cfg.method, cfg.qat) == (
        "adamw",
        None,
        None,
        "full",
        "off",
    )
    torch_s = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        torch_s, peak, total_steps=500, pct_start=0.3, cycle_momentum=False
    )
    for step in range(500):
        assert math.isclose(core.lr_at(cfg, step, 500), theirs.get_last_lr()[0], rel_tol=1e-6)
        torch_s.step()
        theirs.step()


def test_what_continues_noam_falls_from_a_tenth_of_its_rate_to_a_hundredth():
    first = run_mathqa.pretraining(parsed("--preset", "noam_wide4"))
    cfg = run_mathqa.pretraining(parsed("--preset", "continue_noam"))
    changed = {
        name: value
        for name, value in dataclasses.asdict(cfg).items()
        if value != getattr(first, name) and not name.startswith("pretrain_")
    }
    assert changed == {
        **{"init_from": "newest", "tag": "continue_noam", "schedule": "cosine", "lr": 8e-5, "min_lr": 8e-6},
        **{"warmup": 0.05, "max_minutes": 45.0},
    }
    rates = [core.lr_at(cfg, step, 1000) for step in range(1001)]
    assert math.isclose(max(rates), 8e-5) and np.argmax(rates) in (49, 50)
    assert math.isclose(rates[-1], 8e-6) and min(rates[50:]) == rates[-1]
    halfway = 8e-6 + (8e-5 - 8e-6) / 2
    assert math.isclose(rates[525], halfway, rel_tol=0.01)  # a cosine: the middle in the middle


@pytest.mark.parametrize("first", ["", "pretrain_"])
def test_one_cycle_has_no_lowest_rate(first):
    argv = [f"--{first}schedule", "one_cycle", f"--{first}min_lr"]
    with pytest.raises(core.UserError, match=rf"^--{first}min_lr 1e-05: one_cycle") as error:
        run_mathqa.Config(**{f"{first}schedule": "one_cycle", f"{first}min_lr": 1e-5})
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        parsed(*argv, 1e-5)
    assert getattr(parsed(*argv, 0), f"{first}schedule") == "one_cycle"
    other = parsed(f"--{first}schedule", "cosine", f"--{first}min_lr", 1e-5)
    assert getattr(other, f"{first}min_lr") == 1e-5
    if not first:  # nor has an arm of a study
        with pytest.raises(core.UserError, match="one_cycle"):
            run_mathqa.arm_config(run_mathqa.Config(min_lr=1e-6), "full,schedule=one_cycle")


# Config's fields that are neither pretrain_... nor of one stage alone. A new constant belongs here, or in
# STAGE1_ONLY or STAGE2_ONLY: what is in none of these makes a study pretrain anew where only fine-tuning
# differs.
BOTH_STAGES = {
    # pretraining has its own: these are replaced by pretrain_...
    *("batch", "micro_batch", "max_steps", "max_minutes", "lr", "min_lr", "warmup", "schedule", "optimizer"),
    *("weight_decay", "eval_every", "save_every"),
    # the loop, the model, what is held out
    *("epochs", "micro_tokens", "cycle_beta1", "beta1", "beta2", "clip", "skip_spikes", "dtype", "compile"),
    *("seed", "split_seed", "dropout", "checkpointing", "eval_batch", "eval_rows", "final_eval", "keep"),
    *("test_weights", "log_every", "price_per_hour", "note"),
    # several runs, and the call
    *("arms", "budgets", "shares", "seeds", "mode", "run_folder", "out", "tag", "resume_timestamp"),
    *("resume_step", "backend", *FIND_CONSTANTS),
}


def test_every_constant_is_of_the_text_of_the_rows_or_of_both_stages():
    names = {field.name for field in dataclasses.fields(run_mathqa.Config)}
    first = {name for name in names if name.startswith("pretrain_")}
    kinds = [run_mathqa.STAGE1_ONLY, run_mathqa.STAGE2_ONLY, first, BOTH_STAGES]
    counted = Counter(name for kind in kinds for name in kind)
    assert counted.keys() == names and set(counted.values()) == {1}
    assert {name.removeprefix("pretrain_") for name in first} <= BOTH_STAGES


def matter(mode, **changes):
    """The constants by which a study knows a run again."""
    cfg = run_mathqa.Config(mode="study", **changes)
    one = run_mathqa.pretraining(cfg) if mode == "pretrain" else dataclasses.replace(cfg, mode=mode)
    study = run_mathqa.MathQAStudy(cfg, core.World(), Path(), None, None)
    return core.typed(run_mathqa.as_run(study, one, "x")).flags


def test_a_study_knows_a_pretraining_by_its_text_and_a_tuning_by_its_rows():
    text, rows = matter("pretrain"), matter("finetune")
    assert text & run_mathqa.STAGE2_ONLY == rows & run_mathqa.STAGE1_ONLY == set()
    free = core.MAY_CHANGE | core.CALL_CONSTANTS | run_mathqa.STUDY_CONSTANTS
    assert text == (BOTH_STAGES | run_mathqa.STAGE1_ONLY) - free
    assert rows == (BOTH_STAGES | run_mathqa.STAGE2_ONLY) - free


def test_a_study_from_new_weights_knows_a_tuning_by_its_shape_and_text_too():
    assert matter("finetune", init_from="new") >= run_mathqa.STAGE1_ONLY


def weights(folder, step):
    return safetensors.torch.load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def first_and(more, *argv):
    """(first run's folder and result, folder and result of the one that goes on from it)"""
    first = here(*READ, "--test_weights", "last")
    folder = newest()
    return folder, first, here(*READ, "--test_weights", "last", "--init_from", more or folder, *argv)


@pytest.mark.parametrize("more", [None, "newest"], ids=["named", "newest"])
def test_pretraining_from_a_run_goes_on_with_its_weights(more):
    folder, first, then = first_and(more, "--pretrain_lr", 1e-4, "--pretrain_eval_every", 10)
    assert newest() != folder and first["steps"] == then["steps"] == 20
    losses = [row["val/loss"] for row in metrics() if "val/loss" in row]
    old = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    old = [row["val/loss"] for row in old if "val/loss" in row]
    assert math.isclose(losses[0], old[-1], rel_tol=1e-6) and losses[0] < old[0] - 0.1  # not a new model
    assert then["test/loss"] < first["test/loss"]  # and it has gone on learning
    stored = json.loads((newest() / "config.json").read_text())["constants"]
    assert stored["init_from"] == str(folder) and stored["mode"] == "pretrain"
    before, after = weights(folder, 20), weights(newest(), 20)
    assert before.keys() == after.keys() and all(not torch.equal(before[k], after[k]) for k in before)


def test_pretraining_from_a_run_may_begin_with_an_older_checkpoint():
    first = here(*READ, "--test_weights", "last", "--pretrain_save_every", 10)
    folder = newest()
    for step, same in ((10, False), (20, True)):
        then = here(*READ, "--test_weights", "last", "--init_from", folder, "--init_step", step,
                    "--pretrain_max_steps", 0)  # fmt: skip
        assert (then["weights_sha256"] == first["weights_sha256"]) == same
        assert_same(weights(newest(), 0), weights(folder, step))


def test_pretraining_from_a_run_wants_its_tokenizer_and_context():
    here(*READ)
    folder = newest()
    with pytest.raises(core.UserError, match=r"^--tokenizer bpe:300 is not that of") as error:
        here(*READ, "--init_from", folder, "--tokenizer", "bpe:300")
    assert "\n" not in str(error.value) and str(error.value).endswith(f"use {folder / 'tokenizer'}")
    with pytest.raises(core.UserError, match=r"^--block_size 65 is over the 64 of"):
        here(*READ, "--init_from", folder, "--block_size", 65)
    assert list(newest_folders()) == [folder]  # refused before anything is kept
    found = here(*READ, "--init_from", folder, "--tokenizer", folder / "tokenizer")  # as the line says
    assert found["steps"] == 20


@pytest.mark.parametrize(
    "how",
    [
        ["--preset", "continue_noam"],
        ["--init_from", "newest", "--tag", "more"],
    ],
    ids=["preset", "typed"],
)
def test_going_on_from_the_newest_run_is_done_once_however_often_it_is_asked(how):
    here(*READ, "--pretrain_max_steps", 2)
    for _ in range(3):
        here(*READ, *how, "--pretrain_max_steps", 2, "--resume_timestamp", "auto")
    assert len(list(newest_folders())) == 2


def test_there_is_nothing_newest_without_a_run():
    with pytest.raises(core.UserError, match=r"^--init_from newest: there is no finished pretraining run"):
        here(*READ, "--init_from", "newest")
    assert not list(newest_folders())


def test_the_second_stage_is_the_journal_s():
    cfg = parsed("--preset", "second_stage_full")
    assert (cfg.mode, cfg.method, cfg.schedule, cfg.max_minutes) == ("finetune", "full", "cosine", 60.0)
    assert (cfg.lr, cfg.min_lr, cfg.warmup) == (5e-6, 5e-7, 0.05) and math.isclose(cfg.min_lr, cfg.lr / 10)
    assert core.lr_at(cfg, 50, 1000) == 5e-6 and math.isclose(core.lr_at(cfg, 10**6, 10**6), 5e-7)


@pytest.mark.parametrize(("preset", "peak"), [("noam_wide4", 8e-4), ("noam_wide4_effective", 1e-3)])
@pytest.mark.parametrize("told", [False, True])
def test_the_peak_rate_of_a_pretraining_is_its_constant(preset, peak, told, monkeypatch):
    used, original = [], core.optimizer_step

    def watched(optimizer, *args, **kwargs):
        norm = original(optimizer, *args, **kwargs)
        used.append(tuple(group["lr"] for group in optimizer.param_groups))
        return norm

    everywhere(monkeypatch.setattr, optim, "optimizer_step", watched)
    here(*READ, "--preset", preset, *(["--pretrain_lr", 7e-4] if told else []))
    peak = 7e-4 if told else 5 * peak  # a smoke run learns five times as fast
    rates = [row["lr"] for row in metrics() if "lr" in row]
    assert len(rates) == 20 and math.isclose(max(rates), peak, rel_tol=1e-9) and np.argmax(rates) == 5
    assert used == [(rate,) * len(used[0]) for rate in rates]
    assert math.isclose(rates[0], peak / 25, rel_tol=1e-9) and rates[-1] < 1e-4 * peak
    stored = json.loads((newest() / "config.json").read_text())["constants"]
    assert math.isclose(stored["lr"], peak, rel_tol=1e-9) and stored["schedule"] == "one_cycle"
