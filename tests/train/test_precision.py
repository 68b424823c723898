"""Which dtype a device computes in: auto, TF32, what a run notes and keeps."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from ranks import launch, newest, run

import core
from core import World
from lab.run import resume

CARD, CPU = World(device=torch.device("cuda", 0)), World()


@dataclasses.dataclass(frozen=True)
class Config(core.Constants):
    dtype: core.Dtype = "auto"
    batch: int = 4
    tag: str | None = None


PRESETS = {"half": {"dtype": "bf16"}, "full": {"dtype": "fp32"}}


@pytest.fixture(params=[True, False], ids=["bf16 natively", "fp16 only"])
def native(request, monkeypatch):
    def supported(including_emulation=True):
        return request.param or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    return "bf16" if request.param else "fp16"


def settled(*argv, world=CARD):
    return core.with_dtype(core.parse_config(Config, PRESETS, {}, "doc", list(argv)), world)


@pytest.mark.parametrize(
    ("argv", "on_card", "on_cpu"),
    [
        ([], None, "fp32"),
        (["--dtype", "auto"], None, "fp32"),
        (["--preset", "half"], "bf16", "bf16"),
        (["--preset", "half", "--dtype", "auto"], None, "fp32"),
        (["--preset", "full"], "tf32", "fp32"),
        (["--preset", "full", "--dtype", "fp32"], "fp32", "fp32"),
        (["--dtype", "fp32"], "fp32", "fp32"),
        (["--dtype", "tf32"], "tf32", "fp32"),
        (["--dtype", "fp64"], "fp64", "fp64"),
    ],
)
def test_auto_is_what_the_device_has_and_fp32_is_tf32_unless_typed(argv, on_card, on_cpu, native):
    assert settled(*argv).dtype == (on_card or native)
    assert settled(*argv, world=CPU).dtype == on_cpu


def test_what_was_chosen_is_one_line_and_on_a_cpu_none(native):
    assert f"dtype auto is {native} on this card" in settled().typed.chosen
    assert "dtype fp32 is tf32" in settled("--preset", "full").typed.chosen
    assert settled("--dtype", "bf16").typed.chosen is None
    assert settled(world=CPU).typed.chosen is None
    xpu = World(device=torch.device("xpu", 0))
    assert settled("--dtype", "tf32", world=xpu).typed.chosen == "dtype tf32 is fp32 on this xpu"
    assert settled("--dtype", "tf32", world=CPU).typed.chosen == "dtype tf32 is fp32 on this cpu"


@pytest.mark.parametrize("dtype", ["fp16", "fp64"])
def test_what_needs_fp64_is_refused_on_an_intel_card_without_it(dtype, monkeypatch):
    """torch's loss scaler computes in fp64; on those cards each step would end in an error of the driver."""
    has, xpu = SimpleNamespace(has_fp64=False), World(device=torch.device("xpu", 0))
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: has)
    with pytest.raises(core.UserError, match=f"--dtype {dtype}.* no fp64, use --dtype bf16"):
        settled("--dtype", dtype, world=xpu)
    assert settled("--dtype", "bf16", world=xpu).dtype == settled(world=xpu).dtype == "bf16"
    has.has_fp64 = True  # a data centre's
    assert settled("--dtype", dtype, world=xpu).dtype == dtype


@dataclasses.dataclass(frozen=True)
class Adapted(Config):
    shard: str = "none"
    base_dtype: core.BaseDtype = "auto"
    method: Literal["full", "lora"] = "lora"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_frozen_base_is_held_in_bf16_where_a_card_computes_in_it(method, native):
    def held(*argv, world=CARD):
        argv = ["--method", method, *argv]
        return core.with_dtype(core.parse_config(Adapted, {}, {}, "doc", argv), world)

    narrow = "bf16" if (method, native) == ("lora", "bf16") else "fp32"
    assert held().base_dtype == held("--base_dtype", "auto").base_dtype == narrow
    assert "base_dtype" not in held("--base_dtype", "auto").typed.flags
    assert held("--dtype", "fp32").base_dtype == held("--dtype", "bf16", world=CPU).base_dtype == "fp32"
    assert held("--base_dtype", "fp32").base_dtype == "fp32"
    typed = held("--base_dtype", "bf16", world=CPU)
    assert typed.base_dtype == "bf16" and "base_dtype" in typed.typed.flags


def test_auto_on_the_command_line_asks_a_resumed_run_for_nothing(native):
    cfg = settled("--dtype", "auto", "--batch", "8")
    assert cfg.typed.flags == {"batch"}
    assert resume.contradictions(cfg, {"dtype": "fp32", "batch": 8}) == []
    typed = settled("--dtype", "fp32")
    assert resume.contradictions(typed, {"dtype": "tf32"}) == ["--dtype tf32, not fp32"]


@pytest.mark.parametrize(("dtype", "inside"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "high")])
def test_tf32_is_allowed_for_the_pass_alone(dtype, inside, monkeypatch):
    """Forward and backward; what comes next finds what was set before."""
    switched = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", switched.append)
    precision = core.Precision(dtype, CARD)
    with precision.autocast():
        pass
    assert switched == [inside, torch.get_float32_matmul_precision()]
    core.scaled_backward(torch.ones((), requires_grad=True), CPU, 1, precision)
    assert switched[2:] == switched[:2]


def test_a_cpu_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: pytest.fail("was set"))
    with core.Precision("tf32", CPU).autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_emulated_bf16_is_warned_of(native):
    warned = core.Precision("bf16", CARD).warning()
    if native == "bf16":
        assert warned is None
    else:
        assert "emulates bf16: --dtype fp16" in warned
    assert core.Precision("fp16", CARD).warning() is None


def test_a_precision_is_never_auto(native):
    assert core.Precision("auto", CPU).dtype == "fp32" and core.Precision("auto", CARD).dtype == native


def test_text_is_written_in_half_on_a_card_and_in_fp32_on_a_cpu(monkeypatch):
    entered = []
    monkeypatch.setattr(core.Precision, "autocast", lambda self: entered.append(self.dtype) or nullcontext())
    for device in ("cpu", "xpu"):
        with core.Precision("bf16", World(device=torch.device(device))).generation():
            entered.append(device)
    assert entered == ["cpu", "bf16", "xpu"]


def test_an_encoder_that_overflows_in_half_precision_is_refused_by_name():
    flags = ("--smoke", "--max_documents", 90, "--max_steps", 2, "--out", "out")
    assert launch("run_preference", *flags, "--model", "tiny:deberta", "--dtype", "bf16") == [2]
    assert (
        "tiny:deberta cannot compute in bf16 (deberta-v3 can): use --dtype tf32"
        in Path("out.txt").read_text()
    )
    assert launch("run_preference", *flags, "--preset", "deberta") == [0]  # states fp32


def test_a_resumed_run_keeps_the_dtype_it_began_with():
    flags = ("--smoke", "--max_documents", 90, "--max_steps", 6, "--save_every", 2)
    launch("run_preference", *flags, "--dtype", "fp64", "--out", "out", kill=("step", 4, 0))
    run("run_preference", *flags, "--resume_timestamp", "auto")
    assert core.read_config(newest())["constants"]["dtype"] == "fp64"
    assert "dtype stays fp64 (the script now says fp32)" in Path("out.txt").read_text()


def test_auto_says_which_unfinished_run_it_does_not_go_on_with():
    flags = ("--smoke", "--max_documents", 90, "--max_steps", 6, "--save_every", 2, "--out", "out")
    auto = ("--resume_timestamp", "auto", "--dtype")
    launch("run_preference", *flags, *auto, "fp64", kill=("step", 4, 0))
    begun = newest().name
    assert launch("run_preference", *flags, *auto, "fp32") == [0] and newest().name != begun
    line = f"a new run: {begun} is unfinished, but ran with --dtype fp64, not fp32"
    assert line in Path("out.txt").read_text()
    assert launch("run_preference", *flags, *auto, "fp64") == [0] and len(list(Path("out").iterdir())) == 2
    assert line not in Path("out.txt").read_text()
