"""run_instruct.py and run_lora.py as their user meets them: presets, resumes, learning, bad input."""

import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from ranks import everywhere
from toys.chat import chat_tokenizer, turns
from toys.sft import (
    BARE,
    QUIET,
    SCRIPTS,
    adapted,  # noqa: F401 (a fixture)
    config,
    fails,
    go,
    gpt2_folder,  # noqa: F401 (a fixture)
    initial_model,
    loss_of,
    parts_of,
    small_gpt,
    toy_file,
    tuned,  # noqa: F401 (a fixture)
    write_rows,
)

import core
import lab.data.text
import lab.measure.answers
import lab.train.batches
import lab.train.loss
import run_instruct
import run_lora
from core import World
from lab.data import tokenizers
from lab.data.cache import BadRows
from lab.data.text import split_pieces
from lab.measure import tuning
from lab.measure.answers import PROMPTS


@pytest.mark.slow
def test_conversations_are_learnt_to_their_end_token_and_measured_again(capsys):
    tokenizer = chat_tokenizer("chatml")
    core.reseed(0, "init")
    shape = core.GPTConfig(len(tokenizer), block_size=128, n_layer=2, n_head=4, n_embd=64)
    core.save_pretrained(core.GPT(shape), tokenizer, "base")
    rows = [{"messages": turns(f"Say {i}.", "sat", "More?", "The mat.")} for i in range(100)]
    argv = ["--model", "base", "--data", write_rows(rows), "--template", "chat", "--epochs", 7, "--batch", 10]
    argv += ["--plain_blocks", 0, "--max_new_tokens", 9, "--sample_tokens", 9]
    result, folder = go("run_instruct", *argv)
    log, answers = ((folder / each).read_text() for each in ("log.txt", "responses.json"))
    assert "  counted: sat<|im_end|>\n" in log and "  counted: The mat.<|im_end|>\n" in log
    said = [row["model_response"] for row in json.loads(answers)]  # the end token comes in time
    assert len(said) == 10 and {*said} == {"The mat."}
    figures, _ = run_instruct.remeasure(folder, World())
    assert figures["test/loss"] == pytest.approx(result["test/loss"], rel=1e-6)
    asked = config("run_instruct", "--mode", "ask", "--run_folder", folder, "--prompt", "Say 7.")
    run_instruct.main(asked, World())
    assert capsys.readouterr().out.splitlines()[-1] == "sat"


def batches_of(monkeypatch, *argv) -> core.ShardedBatches:
    """Those that run_instruct.train draws."""
    made, original = [], core.ShardedBatches.__init__

    def kept(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(core.ShardedBatches, "__init__", kept)
        go("run_instruct", "--data", toy_file(400), *QUIET, "--batch", 8, "--max_steps", 0, *argv)
    return next(batches for batches in made if batches.seed is not None)


def test_lengths_meet_by_chance_without_group_lengths(monkeypatch):
    grouped, free = batches_of(monkeypatch), batches_of(monkeypatch, "--no-group_lengths")

    def spread(batches):
        """Of lengths within a batch, beside that of all rows."""
        chosen = [batches.lengths[batches.global_batch(step)] for step in range(len(batches))]
        return np.mean([lengths.var(ddof=1) for lengths in chosen]) / batches.lengths.var(ddof=1)

    assert len(grouped) == len(free) > 30
    assert spread(grouped) < 0.2  # the rows of a block of 50 batches, sorted
    assert spread(free) == pytest.approx(1, abs=0.15)  # of some 40 batches of 8


OF_ALL = {
    **{"data": "tatsu-lab/alpaca", "template": "journal", "split": "file_order", "loss_on_prompt": True},
    **{"tie_head": False, "optimizer": "adamw", "weight_decay": 0.1, "test_weights": "last", "pack": False},
    **{
        "max_length": 1024,
        "dropout": 0.0,
        "skip_spikes": False,
        "shard": "none",
        "group_lengths": False,
        "dtype": "auto",
        "max_steps": None,
    },
}
M, L, XL = "gpt2-medium", "gpt2-large", "gpt2-xl"
INSTRUCT = {
    name: {"model": model, "batch": 2, "epochs": 1, "lr": 5e-5, "schedule": schedule, "min_lr": low,
           "warmup": warmup, "clip": clip, "freeze_blocks": 0}
    for name, model, schedule, low, warmup, clip in [
        ("run_1", M, "constant", 0.0, 0.0, None),
        ("run_2", L, "constant", 0.0, 0.0, None),
        ("run_3", XL, "constant", 0.0, 0.0, None),
        ("run_4", L, "cosine", 1e-5, 0.2, 1.0),
        ("run_5", M, "cosine", 1e-5, 0.2, 1.0),
        ("run_6", L, "cosine", 1e-5, 0.2, None),
    ]
}  # fmt: skip
LORA = {
    name: {"model": model, "batch": batch, "epochs": epochs, "lr": lr, "min_lr": 1e-5, "warmup": warmup,
           "lora_rank": rank, "lora_alpha": float(alpha), "lora_scaling": "alpha", "lora_init": "rank",
           "lora_head": True, "lora_targets": "all", "lora_layers": None, "lora_dropout": 0.0,
           "adapter": None, "schedule": "cosine", "clip": 1.0}
    for name, model, batch, epochs, lr, warmup, rank, alpha in [
        ("run_10", M, 2, 1, 5e-5, 0.2, 16, 16),
        ("run_11", L, 2, 1, 5e-5, 0.2, 16, 16),
        ("run_12", M, 4, 1, 5e-5, 0.2, 16, 16),
        ("run_13", M, 2, 1, 5e-5, 0.2, 16, 32),
        ("run_14", M, 2, 1, 5e-5, 0.2, 32, 32),
        ("run_15", M, 4, 1, 5e-5, 0.2, 64, 64),
        ("run_16", M, 4, 1, 2.5e-5, 0.3, 64, 64),
        ("run_17", M, 4, 1, 3e-5, 0.0, 64, 64),
        ("run_18", M, 4, 1, 1e-4, 0.0, 64, 64),
        ("run_19", M, 4, 2, 5e-5, 0.2, 16, 16),
    ]
}  # fmt: skip
TABLE = [("run_instruct", *item) for item in INSTRUCT.items()] + [
    ("run_lora", *item) for item in LORA.items()
]


@pytest.mark.parametrize(("name", "preset", "row"), TABLE, ids=[preset for _, preset, _ in TABLE])
def test_presets_are_the_journals_table(name, preset, row):
    cfg = core.constants_of(config(name, "--preset", preset))
    expected = OF_ALL | row | {"tag": preset}
    assert {constant: cfg[constant] for constant in expected} == expected
    assert 11_990 <= int(0.85 * cfg["max_documents"]) <= 12_010


def test_there_are_the_journals_presets_and_no_others():
    assert list(run_instruct.PRESETS) == ["recommended", *INSTRUCT]
    assert list(run_lora.PRESETS) == ["recommended", *LORA]


DAILY = ("run_18",)
TRIED = [(name, preset) for name, preset, _ in TABLE if preset in DAILY]
TRIED += [(name, preset) for name, preset, _ in TABLE[::3] if preset not in DAILY]
TRIED += [("run_instruct", "recommended"), ("run_lora", "recommended")]


@pytest.mark.parametrize(
    ("name", "preset"),
    [pytest.param(*tried, marks=[] if tried[1] in DAILY else pytest.mark.slow) for tried in TRIED],
)
def test_a_preset_has_a_smoke_run(name, preset):
    argv = ["--max_documents", 240, "--epochs", 1, "--plain_blocks", 0, "--answer_rows", 4]
    result, folder = go(name, "--preset", preset, *argv)
    assert result["status"] == "finished" and folder.name.endswith(f"-{preset}")
    stored = core.read_config(folder)["constants"]
    kept = {k: v for k, v in SCRIPTS[name].PRESETS[preset].items() if k not in SCRIPTS[name].SMOKE}
    assert {k: stored[k] for k in kept if k not in ("epochs", "max_documents")} == {
        k: v for k, v in kept.items() if k not in ("epochs", "max_documents")
    }
    assert (
        math.isfinite(result["test/loss"]) and len(json.loads((folder / "responses.json").read_text())) == 4
    )
    best = stored["test_weights"] == "best"
    assert result["test_checkpoints"][0].startswith("best_step_" if best else "step_")


def test_the_presets_of_the_adapters_keep_their_distance_in_the_smoke_test():
    rates = {p: config("run_lora", "--smoke", "--preset", p).lr for p in ("run_15", "run_16", "run_18")}
    assert rates == pytest.approx({"run_15": 1e-3, "run_16": 5e-4, "run_18": 2e-3}, rel=1e-12)  # one product


@pytest.mark.parametrize(("name", "warmup"), [("run_instruct", 0), ("run_lora", 1)])
def test_runs_with_no_warm_up_and_with_nothing_else(name, warmup):
    argv = ["--data", toy_file(), *BARE, "--log_every", 1, "--warmup", warmup, "--lr", 1e-3, "--min_lr", 1e-4]
    result, folder = go(name, *argv)
    steps = result["step"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
    expected = cosine if warmup == 0 else [1e-3 * (i + 1) / steps for i in range(steps)]
    assert steps == 12 and rates == pytest.approx(expected, rel=1e-12)


def evaluated_steps(folder) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "val/loss" in line]


def samples_of(folder) -> list[tuple[int, int, str]]:
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [(line["step"], line["number"], line["text"]) for line in lines]


STOPPED = [*BARE, "--epochs", 2, "--max_steps", 20, "--eval_every", 8, "--sample_tokens", 3]


def assert_is_the_same_run(resumed, whole):
    (result, folder), (expected, other) = resumed, whole
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert result["test_checkpoints"] == expected["test_checkpoints"]
    assert evaluated_steps(folder) == evaluated_steps(other) == [0, 8, 16, 20]
    assert samples_of(folder) == samples_of(other)
    once = list(itertools.product([0, 8, 16, 20], range(len(PROMPTS))))
    assert [sample[:2] for sample in samples_of(folder)] == once


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("place", "save_every", "repeats"),
    [
        ("amid", 1000, False),
        ("behind", 1000, False),
        ("amid", 8, True),
        pytest.param("behind", 8, True, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_is_repeated_only_if_its_step_was_saved_before_it(
    name, place, save_every, repeats, monkeypatch
):
    """The signal comes amid the evaluation of step 8 or behind it; without a checkpoint it is finished."""
    argv = ["--data", toy_file(), *STOPPED, "--save_every", save_every]
    whole, seen, sent = go(name, *argv, out="a"), [], []

    def strike(step, here):
        if (step, here) == (8, place) and not sent:
            sent.append(here)
            os.kill(os.getpid(), signal.SIGTERM)

    def reported(run, at, *rest, original=tuning.report_validation):
        seen.append(at.step)
        strike(at.step, "amid")
        original(run, at, *rest)

    def sampled(run, cfg, step, *rest, original=lab.measure.answers.sample):
        original(run, cfg, step, *rest)
        strike(step, "behind")

    everywhere(monkeypatch.setattr, tuning, "report_validation", reported)
    everywhere(monkeypatch.setattr, lab.measure.answers, "sample", sampled)
    stopped, _ = go(name, *argv, out="b")
    assert (stopped["status"], stopped["checkpoint"]) == ("stopped", "step_00000008")
    resumed = go(name, *argv, "--resume_timestamp", "auto", out="b")
    assert "from step_00000008" in (resumed[1] / "log.txt").read_text()
    assert seen == [0, 8, 8, 16, 20] if repeats else seen == [0, 8, 16, 20]
    assert_is_the_same_run(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_behind_an_evaluation_does_not_repeat_it_on_any_number_of_ranks(name, size):
    where = {"size": size, "env": {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]}}
    argv = ["--smoke", "--data", toy_file(), *STOPPED, "--save_every", 1000]
    whole = ranks.run(name, *argv, **where), ranks.newest()
    argv = ["--out", "b", *argv]
    ranks.launch(name, *argv, sent=("step", 9, signal.SIGTERM), **where)
    assert ranks.result("b")["checkpoint"] == "step_00000009", Path("out.txt").read_text()
    assert ranks.launch(name, *argv, "--resume_timestamp", "auto", **where) == [0] * size
    assert_is_the_same_run((ranks.result("b"), ranks.newest("b")), whole)


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
def test_other_validation_rows_or_another_plain_text_are_refused_by_a_resume(name, monkeypatch, capfd):
    texts = {f"{i}.txt": f"Document {i} tells of apples. " * 9 for i in range(60)}
    Path("plain").mkdir()
    for file, text in texts.items():
        Path("plain", file).write_text(text)
    pieces = split_pieces(core.Corpus("plain", ""), BadRows())
    held = [text for part, text, _ in pieces if part == "test"]
    argv = ["--data", toy_file(), *BARE, "--max_steps", 2, "--no-final_eval", "--eval_rows", 2]
    argv += ["--plain", "plain", "--plain_blocks", 9]
    _, folder = go(name, *argv)
    assert len(held) > 1 and "plain" in core.read_config(folder)["facts"]
    flags = ["--smoke", "--out", "out", "--resume_timestamp", folder.name[:15], "--max_steps", 4]
    error = fails(name, [*flags, "--eval_rows", 3], monkeypatch, capfd)
    assert f"{folder} ran with --eval_rows 2, not 3: drop these flags, or start a new run" in error
    before = (folder / "log.txt").read_text(), (folder / "result.json").read_text()
    changed = next(file for file, text in texts.items() if text in held)
    Path("plain", changed).write_text(texts[changed] + "Pears, too.")
    assert f"plain is not what {folder} began with" in fails(name, flags, monkeypatch, capfd)
    assert (folder / "log.txt").read_text().startswith(before[0])
    assert (folder / "result.json").read_text() == before[1]
    Path("plain", changed).write_text(texts[changed])
    result, _ = go(name, *argv[:4], *flags[3:])
    assert result["step"] == 4


@pytest.mark.parametrize("head", ["tie_head", "no-tie_head"])
def test_frozen_blocks_stand_still_and_the_others_move(head):
    argv = ["--data", toy_file(), *BARE, "--freeze_blocks", 1, f"--{head}", "--no-final_eval"]
    result, folder = go("run_instruct", *argv, "--test_weights", "last")
    cfg, model, tokenizer = run_instruct.load_model(folder, World())
    after, before = model.state_dict(), initial_model("run_instruct", cfg, tokenizer).state_dict()
    still = {name for name in after if torch.equal(after[name], before[name])}
    frozen = {name for name in after if name.startswith("h.0.")} | {"wpe.weight"}
    frozen |= set() if cfg.tie_head else {"wte.weight"}
    assert still == frozen and len(after) > len(frozen)
    assert result["parameters"] - result["trainable_parameters"] == sum(after[n].numel() for n in frozen)


def test_the_embedding_of_a_model_with_its_own_head_is_frozen_too(gpt2_folder):
    """Its own head may come with the model, not as a copy of the embedding."""
    tokenizer = tokenizers.named_tokenizer(str(gpt2_folder))
    untied = small_gpt(vocab_size=len(tokenizer), tie_head=False)
    core.save_pretrained(untied, tokenizer, "untied")
    argv = ["--model", "untied", "--no-tie_head", "--freeze_blocks", 1, "--max_length", 64]
    cfg = config("run_instruct", *argv)
    model = run_instruct.build_model(cfg, tokenizer, World())
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trains and "wte.weight" not in trains


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["tuned", pytest.param("adapted", marks=pytest.mark.slow)])
def test_a_run_can_be_opened_and_measures_as_it_did(fixture, request):
    result, folder = request.getfixturevalue(fixture)
    name = {"tuned": "run_instruct", "adapted": "run_lora"}[fixture]
    cfg, model, tokenizer = SCRIPTS[name].load_model(folder, World())
    data, parts = parts_of(cfg)
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab() and not model.training
    sums = core.evaluate(model, parts["test"], cfg, World())
    m, _ = tuning.measure("test", sums, parts["test"], parts["train"])
    assert {f"test/{k}": v for k, v in m.items()} == {k: result[k] for k in (f"test/{k}" for k in m)}


@pytest.mark.parametrize("name", [pytest.param("run_instruct", marks=pytest.mark.slow), "run_lora"])
def test_a_run_in_fp64_can_be_opened(name):
    argv = ["--data", toy_file(), *BARE, "--max_steps", 3, "--dtype", "fp64"]
    result, folder = go(name, *argv)
    cfg, model, _ = SCRIPTS[name].load_model(folder, World())
    loss = loss_of(model.double(), parts_of(cfg)[1]["test"], cfg)
    assert loss == pytest.approx(result["test/loss"], rel=1e-5)  # weights may have been rounded to fp32


def training_losses(folder) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_short_smoke_run_of_all_weights_learns(tuned):
    result, folder = tuned
    losses = training_losses(folder)
    assert losses[-1] < losses[0] - 1.0
    assert result["test/first_word"] >= 0.2 and "alarm" not in result  # by guessing 0.05
    assert result["plain/forgotten"] == pytest.approx(
        result["plain/after"] - result["plain/before"], abs=1e-9
    )


def test_a_short_smoke_run_of_adapters_learns(adapted):
    result, folder = adapted
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < losses[0] - 1.0 and losses[-1] == result["val/loss"]
    assert result["test/accuracy"] >= 0.08 and "alarm" not in result  # a sixth of the smoke run


TUNE = [(name, *case) for name in SCRIPTS for case in [
    (["--model", "tiny:foo"], "--model tiny:foo: the tiny ones here are tiny:gpt2 and tiny:llama"),
    (["--data", "absent.json"], "no such file or folder: absent.json"),
    (["--data", "odd.json"], "odd.json lacks column(s) instruction, output; found: question, answer"),
    (["--data", "long.json", "--max_length", 64], "prompts of all 20 rows fill 64 tokens: use a larger"),
    (["--data", "rows.json", "--split", "file_order", "--max_documents", 3], "leaves no test rows of 3: use"),
    (["--data", "rows.json", "--plain", "absent.txt", "--plain_blocks", 2], "--plain: no such file or fold"),
    (["--data", "rows.json", "--batch", 5000], "training rows do not fill a batch of 5000"),
    (["--data", "rows.json", "--max_documents", 2], "cannot be split into 3 parts"),
    (["--data", "rows.json", "--model", "base", "--max_length", 65],
     "64 positions of base"),
]]  # fmt: skip
ERRORS = [
    *TUNE,
    ("run_instruct", ["--freeze_blocks", 99], "--freeze_blocks 99"),
    ("run_lora", ["--lora_head", "--tie_head"], "the output matrix is the embedding: use --no-tie_head"),
    ("run_lora", ["--adapter", "nowhere"], "nowhere is no whole adapter of peft"),
    ("run_lora", ["--lora_layers", 3], "--lora_layers 3 is more than the model's 2 blocks"),
    ("run_lora", ["--lora_layers", 0, "--no-lora_head"], "use more --lora_layers, or --lora_head"),
    ("run_lora", ["--mode", "export", "--run_folder", "nowhere"], "nowhere is no run folder"),
]


@pytest.mark.parametrize(
    ("name", "argv", "line"), ERRORS, ids=[f"{n} {' '.join(map(str, a))}" for n, a, _ in ERRORS]
)
def test_a_mistake_is_one_line_and_leaves_no_folder(name, argv, line, gpt2_folder, monkeypatch, capfd):
    toy_file()
    write_rows([{"question": "a", "answer": "b"}] * 5, "odd.json")
    long = [{"instruction": f"{i} " + "wordy " * 200, "input": "", "output": "x"} for i in range(20)]
    write_rows(long, "long.json")
    Path("base").symlink_to(gpt2_folder)
    quiet = [] if "export" in argv else QUIET  # which export does not read
    error = fails(name, ["--smoke", "--out", "out", *quiet, *argv], monkeypatch, capfd)
    assert line in error
    assert not list(Path("out").glob("*"))


@pytest.mark.parametrize("name", ["run_instruct", pytest.param("run_lora", marks=pytest.mark.slow)])
def test_a_run_with_an_output_matrix_of_its_own_is_no_tied_model(name, monkeypatch, capfd):
    argv = ["--smoke", *QUIET, "--data", toy_file(), "--batch", 4]
    _, base = go("run_instruct", *argv, "--no-tie_head", "--max_steps", 0, "--no-final_eval", out="base")
    argv += ["--out", "out", "--model", base, "--no-lora_head"][: None if name == "run_lora" else 4]
    error = fails(name, [*argv, "--tie_head"], monkeypatch, capfd)
    assert f"{base} has an output matrix of its own: use --no-tie_head" in error
    assert not list(Path("out").glob("*"))
    result, _ = go(name, *argv[1:], "--no-tie_head", "--max_steps", 1, "--no-final_eval")
    assert result["step"] == 1


def test_a_tiny_model_too_has_no_more_positions_than_it_has(monkeypatch, capfd):
    """As for the models with weights: one line, no traceback out of the middle of a step."""
    long = [
        {"instruction": f"Say {i} " + "wordy words " * 300, "input": "", "output": "x"} for i in range(60)
    ]
    argv = ["--smoke", *QUIET, "--data", write_rows(long), "--batch", 4, "--max_length", 1000]
    assert "--max_length 1000" in fails("run_instruct", argv, monkeypatch, capfd)
