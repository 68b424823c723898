"""run_mathqa.py: what presets resolve to, what its stages are known by, mistakes before the first step."""

import dataclasses
import math
from pathlib import Path

import pytest
from toys.quantise import here, parsed

import core
import gpt_scratch
import run_mathqa as script
from lab.compare import study

UNBOUND = {
    "nothing ends training": ["--pretrain", "noam_wide4,max_minutes=none,max_steps=none"],
    "nothing ends fine-tuning": ["--max_steps", "none"],
    "--qat_group 48": ["--qat", "int4", "--qat_group", 48],
}
BOTH = [
    *("--smoke", "--mode", "both", "--max_documents", 300, "--plain_blocks", 3),
    *("--pretrain", "noam_wide4,max_documents=60,tokenizer=bpe:1024,block_size=64,n_embd=32,max_steps=3"),
]


@pytest.mark.parametrize("word", UNBOUND)
def test_a_mistake_of_either_stage_is_found_before_the_first(word):
    with pytest.raises(core.UserError, match=word) as error:
        here(*BOTH, *UNBOUND[word])
    assert "\n" not in str(error.value) and not list(newest_folders())


def newest_folders(out="out"):
    return (path.parent for path in sorted(Path(out).glob("*/config.json")))


DEFAULTS = {
    **{"data": "kinit/math_qa", "max_documents": None, "answer_format": "text", "loss_on_prompt": False},
    **{"max_length": 512, "pack": False, "split_seed": 42, "pretrain": "noam_wide4", "init_from": None},
    **{"init_step": None, "method": "full", "lora_rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.0},
    "lora_plus": 1.0,
    **{"qat": "off", "qat_group": 256, "qat_start": 0.25, "dropout": 0.0, "checkpointing": False},
    **{"batch": 128, "micro_batch": None},
    **{"micro_tokens": 16384, "group_lengths": True, "epochs": None, "max_steps": None, "max_minutes": 60.0},
    **{"lr": 5e-5, "min_lr": 0.0, "warmup": 0.05, "schedule": "cosine", "cycle_beta1": True},
    **{"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0},
    **{"skip_spikes": False, "dtype": "auto", "compile": "auto", "seed": 0, "eval_batch": 64},
    "base_dtype": "auto",
    "shard": "none",
    **{"eval_every": 500, "eval_rows": 500, "answer_rows": 200, "sample_tokens": 24, "final_eval": True},
    **{"test_weights": "best", "profile": None},
    **{"save_every": None, "keep": 2, "log_every": 25, "price_per_hour": None, "note": "", "plain": None},
    **{"plain_blocks": 100, "budgets": ("steps", "time"), "shares": ("0.5", "0.75", "0.9"), "seeds": 3},
    **{"arms": ("full", "lion", "lora", "loha", "lokr", "int4"), "max_hours": None},
    **{"mode": "both", "run_folder": None, "out": None, "tag": "recommended", "resume_timestamp": None},
    **{"resume_step": None, "backend": "auto"},
    **{"wsd_decay": 0.2, "find_from": 1e-6, "find_to": 1.0, "find_steps": 100, "find_smoothing": 0.8},
}
RESOLVED = {
    "recommended": {},
    "second_stage_full": {"mode": "train", "test_weights": "last", "loss_on_prompt": True}
    | {"group_lengths": False, "lr": 5e-6, "min_lr": 5e-7, "eval_rows": 1536, "compile": True},
    "alignment_handbook": {"method": "lora", "lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.05}
    | {"lr": 2e-4},
    "full": {},
    "lion": {"optimizer": "lion", "lr": 1e-5, "weight_decay": 1.0, "beta2": 0.99},
    "lora": {"method": "lora", "lr": 5e-4},
    "loha": {"method": "loha", "lr": 5e-4},
    "lokr": {"method": "lokr", "lr": 2e-3},
    "int4": {"qat": "int4"},
}


def test_every_preset_is_written_down_here():
    assert script.PRESETS.keys() == RESOLVED.keys()
    assert core.constants_of(script.Config()) | {"tag": "recommended"} == DEFAULTS


@pytest.mark.parametrize("preset", RESOLVED)
def test_a_preset_resolves_to_these_constants(preset):
    expected = DEFAULTS | {"tag": preset} | RESOLVED[preset]
    assert core.constants_of(parsed("--preset", preset)) == expected


def test_one_cycle_has_no_lowest_rate():
    with pytest.raises(core.UserError, match=r"^--min_lr 1e-05: one_cycle") as error:
        parsed("--schedule", "one_cycle", "--min_lr", 1e-5)
    assert "\n" not in str(error.value)
    assert parsed("--schedule", "one_cycle", "--min_lr", 0).schedule == "one_cycle"
    with pytest.raises(core.UserError, match="one_cycle"):  # nor has an arm of a study
        stages("--mode", "study", "--min_lr", 1e-6, "--arms", "full,schedule=one_cycle")


def stages(*argv) -> script.Stages:
    """Plans and arms of a study."""
    cfg = parsed(*argv)
    plan = study.Plan(
        cfg, core.World(), script.__file__, script.Config, script.PRESETS, script.SMOKE, script.main,
        script.ARM_MAY, script.OF_A_STUDY,
    )  # fmt: skip
    return script.Stages(*script.first_stage(cfg, core.World()), plan, study.different(plan, cfg.arms), None)


def test_the_first_stage_is_what_its_own_command_would_be():
    argv = ["--mode", "study", "--smoke", "--note", "x", "--lr", 7, "--out", "o", "--arms", "full"]
    given = stages(*argv, "--pretrain", "noam_wide4_effective,max_steps=9,eval_rows=none").pretraining.cfg
    command = ["--preset", "noam_wide4_effective", "--smoke", "--note", "x", "--out", "o", "--max_steps", "9"]
    constants = gpt_scratch.Config, gpt_scratch.PRESETS, gpt_scratch.SMOKE
    alone = core.with_dtype(
        core.parsed_config(*constants, "", [*command, "--eval_rows", "none"]), core.World()
    )
    assert dataclasses.replace(given, tag=alone.tag) == alone


def test_runs_of_both_stages_are_profiled_and_compiled_as_the_call_says():
    both = stages(
        "--mode", "study", "--smoke", "--out", "o", "--arms", "full", "--profile", 4, "--compile", "auto"
    )
    runs = (both.text, both.pretraining), (both.rows, both.arms[0])
    made = []
    for plan, arm in runs:
        assert arm.cfg.profile is None  # it would be another run
        plan = dataclasses.replace(plan, main=lambda cfg, world: made.append((cfg.profile, cfg.compile)))
        with pytest.raises(core.Stop):  # nothing was made
            study.one_run(plan, study.run_config(arm, 0))
    assert made == [(4, "auto"), (4, "auto")]


def tags(*argv) -> list[str]:
    """What the runs of both stages are known by."""
    found = stages("--mode", "study", "--arms", "full", *argv)
    return [arm.cfg.tag for arm in (found.pretraining, *found.arms)]


@pytest.mark.parametrize(
    ("argv", "differ"),
    [
        (["--lr", 1e-3], [False, True]),
        (["--loss_on_prompt"], [False, True]),
        (["--max_steps", 9], [False, True]),
        (["--pretrain", "noam_wide4,lr=1e-3"], [True, False]),  # the base names itself
        (["--pretrain", "noam_wide4,max_minutes=9"], [True, False]),
        (["--pretrain", "noam_wide4,micro_batch=9,log_every=3"], [False, False]),
        (["--budgets", "time", "--seeds", 9, "--price_per_hour", 2], [False, False]),
    ],
    ids=str,
)
def test_a_study_knows_a_pretraining_by_its_constants_and_a_tuning_by_its_own(argv, differ):
    assert [new != old for new, old in zip(tags(*argv), tags(), strict=True)] == differ


def test_the_second_stage_is_the_journal_s():
    cfg = parsed("--preset", "second_stage_full")
    assert (cfg.mode, cfg.method, cfg.schedule, cfg.max_minutes) == ("train", "full", "cosine", 60.0)
    assert (cfg.lr, cfg.min_lr, cfg.warmup) == (5e-6, 5e-7, 0.05) and math.isclose(cfg.min_lr, cfg.lr / 10)
    assert core.lr_at(cfg, 50, 1000) == 5e-6 and math.isclose(core.lr_at(cfg, 10**6, 10**6), 5e-7)
