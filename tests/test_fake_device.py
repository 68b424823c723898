"""Every script on a device that refuses what a card refuses; a ceiling on how often a step waits for it."""

import json
from pathlib import Path

import fake_device
import pytest
from toys import on_device

pytestmark = pytest.mark.skipif(not fake_device.WORKS, reason="this torch has no devices written in Python")

SHORT = ["--smoke", "--batch", 10, "--micro_batch", 4, "--max_steps", 3, "--log_every", 1, "--out", "out"]
GPT = [*SHORT, "--max_documents", 20, "--n_layer", 1, "--eval_batch", 99, "--sample_tokens", 3]
TUNE = [*SHORT, "--max_documents", 60, "--eval_rows", 4, "--sample_tokens", 2, "--answer_rows", 2]
ROWS = [*TUNE, "--max_new_tokens", 2, "--plain_blocks", 1]
FIRST = "noam_wide4,max_documents=20,tokenizer=bpe:300,block_size=64,vocab_multiple=32,n_embd=32,n_layer=1"
MATHS = [*TUNE, "--mode", "train", "--init_from", "new", "--pretrain", FIRST, "--plain_blocks", 1]
MIXED = [
    *SHORT,
    "--mode",
    "train",
    "--max_documents",
    30,
    "--n_layer",
    1,
    "--val_share",
    0.2,
    "--test_share",
    0.2,
]
CASES = [
    ("gpt_scratch", *GPT, "--dtype", "fp16", "--checkpointing", "--dropout", 0.1, "--eval_every", 3),
    ("gpt_scratch", *GPT, "--dtype", "bf16", "--mode", "find_lr", "--find_steps", 4),
    ("run_instruct", *ROWS, "--dtype", "bf16", "--pack"),
    ("run_lora", *ROWS, "--dtype", "bf16"),
    ("run_preference", *SHORT, "--max_documents", 60, "--dtype", "bf16"),
    ("run_mathqa", *MATHS, "--dtype", "bf16", "--qat", "int4", "--optimizer", "lion"),
    ("run_pretrain_diversity", *MIXED, "--held_out_tokens", 600, "--eval_rows", 4, "--dtype", "fp32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", CASES, ids=["-".join(map(str, case[0:1])) + f"-{i}" for i, case in enumerate(CASES)]
)
def test_a_script_runs_whole_and_a_step_of_many_micro_batches_waits_at_most_twice(case):
    """10 rows in micro-batches of 4, a log line at every step; then it evaluates, samples, answers. Only for
    fp16 does the device know fp64: torch's loss scaler computes in it."""
    found = fake_device.run(*case, fp64="fp16" in case)
    assert found.error == "" and found.mixups == {}, Path("out.txt").read_text()
    assert "done" in Path("out.txt").read_text() or "find_lr" in case
    assert len(found.steps) >= 2
    assert max(sum(step.values()) for step in found.steps) <= 2, found.steps


def reported(function):
    found = fake_device.on_device(function)
    assert found.error == "", Path("out.txt").read_text()
    return found, json.loads(Path("report.json").read_text())


@pytest.mark.slow
def test_a_step_of_every_kind_of_model_waits_once_in_every_dtype():
    """Full, LoRA, LoHa, LoKr, int4 (in bf16 evaluated and asked, too, and so is the packed int4 model)."""
    found, steps = reported(on_device.report_steps)
    assert found.mixups == {} and len(steps) == 22 and steps == dict.fromkeys(steps, 1)


def test_planted_mix_ups_are_found_where_they_are_and_every_wait_is_counted():
    _, (waits, mixups) = reported(on_device.report_faults)
    assert waits == {name: int(not name.startswith("nothing")) for name in waits}
    for plant, file in on_device.PLANTS.items():
        assert [text for text in mixups[plant.__name__] if f" at {file}:" in text], (plant, mixups)
