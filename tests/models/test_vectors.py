"""What a frozen encoder makes of each sequence is computed once, and never of something else."""

import sys
from pathlib import Path

import pytest
import torch
from ranks import newest, run
from safetensors.torch import load_file

import core
import run_preference as script
from core import World
from lab.data.cache import is_whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "dtype", "lr", "atol"),
    [
        ("prompt+responses", "fp64", 2e-3, 1e-9),
        pytest.param("joint", "fp64", 2e-3, 1e-9, marks=pytest.mark.slow),
        pytest.param("prompt+responses", "fp32", 1e-4, 1e-5, marks=pytest.mark.slow),
        pytest.param("joint", "fp32", 1e-4, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_encoder_is_run_once_and_the_head_ends_up_the_same(inputs, dtype, lr, atol, monkeypatch):
    flags = ["--smoke", "--max_documents", 200, "--freeze", "all", "--epochs", 3, "--inputs", inputs]
    flags += ["--encoder_dropout", 0.1, "--test_weights", "last"]  # frozen: in eval mode, no dropout
    flags += ["--dtype", dtype, "--lr", lr]
    weights = []
    for once in ("--encode_once", "--no-encode_once"):
        got = run("run_preference", *flags, once)
        weights.append(load_file(newest() / "checkpoints" / got["checkpoint"] / "model.safetensors"))
    assert len(list(Path("cache").glob("*/vectors_*/vectors.npy"))) == 1
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=atol, msg=name)
    calls, encode = [], core.PairScorer.encode
    monkeypatch.setattr(core.PairScorer, "encode", lambda *args: calls.append(1) or encode(*args))
    monkeypatch.setenv("TOKEN_CACHE", str(Path("cache").absolute()))
    monkeypatch.setattr(sys, "argv", ["run_preference.py"])
    cfg = core.parse_config(script.Config, {}, script.SMOKE, "", [str(flag) for flag in flags])
    script.main(cfg, World())
    assert calls == []  # all of it was in the cache
    (folder,) = Path("cache").glob("*/vectors_*")
    assert is_whole(folder)
    with open(folder / "vectors.npy", "r+b") as file:
        file.seek(-9, 2)
        file.write(b"\xff")
    assert not is_whole(folder) and not folder.exists()  # set aside: the next run encodes again


@pytest.mark.slow
def test_vectors_of_other_inputs_lengths_pooling_or_weights_are_others():
    flags = ["--smoke", "--max_documents", 120, "--freeze", "all", "--epochs", 0]
    others = (["--max_length", 20], ["--pooling", "mean"], ["--inputs", "responses"], ["--seed", 1])
    for more in ([], *others, ["--dtype", "fp64"], []):
        run("run_preference", *flags, *more)
    assert len(list(Path("cache").glob("*/vectors_*"))) == 6


def test_vectors_that_are_not_finite_are_not_kept(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_preference.py"])
    monkeypatch.setenv("TOKEN_CACHE", str(Path("cache").absolute()))
    encode = core.PairScorer.encode
    monkeypatch.setattr(core.PairScorer, "encode", lambda *args: encode(*args) / 0)
    flags = ["--smoke", "--max_documents", "120", "--freeze", "all", "--out", "out"]
    cfg = core.parse_config(script.Config, {}, script.SMOKE, "", flags)
    with pytest.raises(FloatingPointError, match="frozen encoder gives inf or nan in fp32: use --dtype fp32"):
        script.main(cfg, World())
    assert not list(Path("cache").glob("*/vectors_*"))
