"""Constants, presets, --smoke and flags: which wins, what is refused, what --help says."""

import dataclasses
import importlib
import inspect
import re
import typing
from typing import Literal

import pytest
from conftest import PROJECT
from ranks import SCRIPTS

import core
from core import UserError
from lab.compare import study as studies
from lab.models import encoders
from lab.run import flags


@dataclasses.dataclass(frozen=True)
class Config(core.Constants):
    model: str = "big-bert"  # 100 % of it
    batch: core.Count = 32
    lr: float = 1e-3
    clip: float | None = 1.0
    compile: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    tag: str | None = None


PRESETS = {"fast": {"lr": 1, "model": "roberta-base"}}
SMOKE = {"batch": 4, "model": encoders.tiny}


def parse(*argv, presets=PRESETS, smoke=SMOKE, config=Config):
    return core.parse_config(config, presets, smoke, "doc", list(argv))


def test_defaults_preset_smoke_and_flags_win_in_that_order():
    assert parse() == Config()
    assert parse("--preset", "fast") == Config(lr=1, model="roberta-base", tag="fast")
    assert parse("--preset", "fast", "--smoke").model == "tiny:roberta"  # sizes, not families
    cfg = parse("--preset", "fast", "--smoke", "--batch", "7", "--clip", "none", "--compile", "--tag", "x")
    assert cfg == Config(batch=7, lr=1, model="tiny:roberta", clip=None, compile=True, tag="x")
    assert cfg.typed.flags == {"batch", "clip", "compile", "tag"}
    assert cfg.typed.overrides == {"lr": 1, "model": "tiny:roberta"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.batch = 3


def test_a_tag_that_is_edited_in_config_counts_and_none_is_the_presets_name():
    @dataclasses.dataclass(frozen=True)
    class Edited(Config):
        tag: str | None = "mine"

    fast = ("--preset", "fast")
    assert [parse(*argv, config=Edited).tag for argv in ((), fast, ("--tag", "x"))] == ["mine", "mine", "x"]
    assert [parse(*argv).tag for argv in ((), fast, (*fast, "--tag", "x"))] == [None, "fast", "x"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bacth", "3"], ["unknown flag --bacth", "--batch"]),
        (["--bat", "3"], ["unknown flag --bat"]),
        (["--batch", "2.5"], ["--batch", "2.5", "int"]),
        (["--batch", "0"], ["--batch 0", "use 1 or more"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--dtype", "fp8"], ["fp8", "bf16"]),
        (["--preset", "slow"], ["slow", "fast"]),
        (["--preset", "run_10"], ["--preset run_10 is none of fast", ": it is one of run_lora.py"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("presets", "smoke", "words"),
    [
        ({}, {"bacth": 3}, ["SMOKE names no constant: bacth", "batch"]),
        ({"p": {"epochs": 3}}, {}, ["preset p names no constant: epochs"]),
        ({"p": {"batch": "3"}}, {}, ["preset p", "batch = '3'", "int"]),
        ({}, {"compile": 1}, ["SMOKE", "compile = 1", "bool"]),
        ({}, {"dtype": "fp8"}, ["SMOKE", "fp8"]),
    ],
)
def test_a_wrong_constant_in_smoke_or_a_preset_is_refused_before_anything_runs(presets, smoke, words, capsys):
    with pytest.raises(SystemExit):
        parse(presets=presets, smoke=smoke)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line


def test_only_rank_0_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse("--nonsense")
    assert capsys.readouterr().err == ""


def test_help_shows_each_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "100 % of it [big-bert]" in capsys.readouterr().out


@pytest.mark.parametrize("script", [*SCRIPTS, "eval"])
def test_help_says_of_every_constant_what_it_is(script):
    """In one comment on the constant's own line: one that goes on below would be cut off in --help."""
    config = importlib.import_module(script).Config
    classes = [each for each in config.__mro__ if dataclasses.is_dataclass(each)]
    sources = "".join(map(inspect.getsource, classes))
    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", sources, re.M))
    assert {*core.names_of(config)} == comments.keys() - {"typed"}
    assert [name for name, text in comments.items() if text.rstrip().endswith(",") or len(text) < 4] == []


def flag(config, name) -> list[str]:
    """A constant as it could be typed."""
    hint, default = typing.get_type_hints(config)[name], getattr(config, name)
    if default is None:
        default = {str: "x"}.get(typing.get_args(hint)[0], 1)
    if bool in map(type, typing.get_args(hint)):  # auto is what stands there until something is typed
        default = True
    return studies.as_flags(name, default or ("x",) if isinstance(default, tuple) else default)


def test_a_switch_may_have_a_value_of_its_own(capsys):
    config = importlib.import_module("run_lora").Config
    cases = {"": "auto", "--compile": True, "--no-compile": False, "--compile auto": "auto"}
    for words, value in (cases | {"--compile=false": False, "--compile true": True}).items():
        cfg = core.parsed_config(config, {}, {}, "", words.split())
        assert cfg.compile == value and cfg.typed.flags == ({"compile"} if words else set())
    for words in ("--compile on", "--no-compile auto"):
        with pytest.raises(core.UserError) as error:
            core.parsed_config(config, {}, {}, "", words.split())
        assert str(error.value) == f"{words}: use --compile, --no-compile or --compile auto|true|false"
    with pytest.raises(SystemExit):
        core.parsed_config(config, {}, {}, "", ["--help"])
    assert "--compile [auto|true|false], --no-compile [auto|true|false]" in capsys.readouterr().out
    for wrong in (1, "on"):
        with pytest.raises(core.UserError, match=f"compile = {wrong!r} is none of its values"):
            core.parsed_config(config, {"fast": {"compile": wrong}}, {}, "", [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mode_refuses_each_flag_that_only_other_modes_read(script):
    module = importlib.import_module(script)
    modes = typing.get_args(typing.get_type_hints(module.Config)["mode"])
    names = {*core.names_of(module.Config)}
    for name in sorted(names):
        readers = flags.readers_of(module.Config, name)
        assert readers, f"{name} is read by no mode"
        for mode in set(modes) - set(readers):
            argv = ["--smoke", "--mode", mode, *flag(module.Config, name)]
            with pytest.raises(core.UserError, match=f"--{name} |--resume_|--test_csv|--max_minutes"):
                core.parsed_config(module.Config, module.PRESETS, module.SMOKE, "", argv)
    listed = set().union(*module.Config.READ_BY.values())
    assert listed <= names and set(" ".join(module.Config.READ_BY).split()) <= set(modes)
    assert set(module.Config.NO_TRAINING) <= set(modes)


@pytest.mark.parametrize(
    ("script", "argv", "said"),
    [
        ("gpt_scratch", ["--prompt", "x"], "--prompt is read by --mode generate, not by train"),
        ("gpt_scratch", ["--mode", "generate", "--lr", "1"], "--lr is read by --mode train or find_lr"),
        (
            "run_pretrain_diversity",
            ["--data", "x"],
            "--data is read by --mode train or find_lr, not by study",
        ),
        ("run_lora", ["--run_folder", "x"], "--run_folder is read by --mode ask or export, not by train"),
        ("run_preference", ["--find_from", "1e-9"], "--find_from is read by --mode find_lr, not by train"),
    ],
)
def test_what_a_mode_does_not_read_is_named_with_the_mode_that_does(script, argv, said):
    module = importlib.import_module(script)
    with pytest.raises(core.UserError) as error:
        core.parsed_config(module.Config, module.PRESETS, module.SMOKE, "", argv)
    assert said in str(error.value)


@pytest.mark.parametrize("script", [*SCRIPTS, "eval"])
def test_every_constant_is_read_somewhere(script):
    """As cfg.name, or by its name, in the script or what it calls."""
    module = importlib.import_module(script)
    files = [PROJECT / f"{script}.py", PROJECT / "gpt_scratch.py", *PROJECT.glob("lab/**/*.py")]
    source = "".join(path.read_text() for path in files)
    names = core.names_of(module.Config)
    assert [
        name for name in names if not re.search(rf"""[.]{name}\b|getattr\(\w+, "{name}\"""", source)
    ] == []


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--learning_rate", "did you mean --lr?"),
        ("--learning-rate", "did you mean --lr?"),
        ("--batch-size", "did you mean --batch?"),
        ("--epoch", "did you mean --epochs?"),
        ("--max-steps", "did you mean --max_steps?"),
        ("--lora_ranks", "--help lists them"),  # no flag of this script is like it
        ("--frobnicate", "--help lists them"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_is_meant_or_with_none(word, hint, capfd):
    import gpt_scratch

    with pytest.raises(SystemExit):
        core.parse_config(gpt_scratch.Config, {}, {}, "", [word, "1"])
    assert capfd.readouterr().err.endswith(f"unknown flag {word}: {hint}\n")
    odd = set(flags.USUAL_NAMES) & {*core.names_of(gpt_scratch.Config)}
    assert not odd  # a name that is known is never another's


def test_a_word_that_is_none_of_a_constants_values_is_no_wrong_type():
    @dataclasses.dataclass(frozen=True)
    class Edited(core.Constants):
        schedule: Literal["linear", "cosine"] = "cosin"  # of the rate

    with pytest.raises(
        UserError, match=r"schedule = 'cosin' is none of its values: use 'linear' \| 'cosine'"
    ):
        flags.parsed_config(Edited, {}, {}, "", [])
