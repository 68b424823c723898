"""gpt_scratch.py: presets as in the journal, bad constants, finder, profiling, export, talk."""

import functools
import inspect
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import test_gpt_timed
import torch
from ranks import everywhere
from toys.gpt import shape

import core
import gpt_scratch as script
from core import UserError, World
from lab.data import text

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
    assert script.PRESETS.keys() == RESOLVED.keys() | test_gpt_timed.RESOLVED.keys()


@pytest.mark.parametrize("preset", RESOLVED)
def test_a_preset_is_its_journals_row(preset):
    cfg, expected = core.constants_of(parsed("--preset", preset)), RESOLVED[preset]
    defaults = core.constants_of(script.Config(tag=preset))
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
    tokens = SimpleNamespace(unigram=range(vocabulary))  # only its length matters
    with torch.device("meta"):
        model = script.build_model(parsed("--preset", preset), tokens, World())
    assert core.count_parameters(model)[0] == expected


@pytest.mark.parametrize("preset", script.PRESETS)
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
        (["--schedule", "one_cycle", "--min_lr", "1"], ["min_lr 1.0", "one_cycle", "use --min_lr 0"]),
        (["--schedule", "gpt3", "--min_lr", "1e-5"], ["min_lr 1e-05", "gpt3", "use --min_lr 0"]),
        (["--val_share", "0.5", "--test_share", "0.5"], ["val_share 0.5 + test_share 0.5", "nothing"]),
        (["--val_share", "0"], ["--val_share 0", "0.0001 to 0.9999"]),
        (["--find_from", "1", "--find_to", "0.1"], ["find_from 1.0", "find_to 0.1"]),
        (["--find_from", "1", "--find_to", "1"], ["find_from 1.0", "find_to 1.0"]),
        (["--find_smoothing", "1"], ["--find_smoothing 1.0", "0 to 0.9999"]),
        (["--mode", "find_lr", "--resume_timestamp", "latest"], ["--resume_timestamp", "not with find_lr"]),
        (["--mode", "generate", "--resume_timestamp", "auto"], ["--resume_timestamp", "not by generate"]),
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
    flags = ["--max_steps", 30, "--sample_tokens", 20, "--test_share", 0]
    sha256, folder = launched(*flags)["weights_sha256"], ranks.newest()
    profiled = [*("--smoke", "--max_documents", 20, "--val_share", 0.2), *flags, *("--profile", 2)]
    profiled += ["--save_every", 10, "--out", "other", "--resume_timestamp", "auto"]
    assert ranks.launch("gpt_scratch", *profiled, kill=("step", 15, 0)) == [-signal.SIGKILL]
    (ranks.newest("other") / "trace.json").unlink()  # the record of steps that are lost
    codes = [
        ranks.launch("gpt_scratch", *profiled),
        ranks.launch("gpt_scratch", "--mode", "export", "--model", folder, "--out", "theirs"),
        ranks.launch("gpt_scratch", "--mode", "generate", "--model", folder, "--prompt", "The ",
                     "--max_new_tokens", 5),
    ]  # fmt: skip
    assert codes == [[0], [0], [0]], Path("out.txt").read_text()
    assert Path("out.txt").read_text().splitlines()[-1].startswith("The ")
    other = ranks.newest("other")
    assert json.loads((other / "result.json").read_text())["weights_sha256"] == sha256
    assert json.loads((other / "trace.json").read_text())["traceEvents"]
    assert (other / "log.txt").read_text().count("profile  2 steps of") == 2  # of each process one
    from transformers import AutoModelForCausalLM

    model, tokenizer = core.open_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained("theirs").eval()
    prompt = torch.tensor([tokenizer("import").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(prompt), theirs(prompt).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*script.PRESETS][::4])
def test_a_preset_learns_in_its_smoke_run(preset):
    got = ranks.run("gpt_scratch", "--preset", preset, "--smoke")
    assert got["test/above_unigram_interval"][1] < 0 and got["test/alarm"] is None
