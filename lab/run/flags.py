"""Constants become flags: one frozen dataclass, presets, --smoke; what the command line said."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from lab.errors import UserError
from lab.run.files import PROJECT
from lab.run.limits import Amount, Count, Share, Whole, limits_of, within
from lab.run.terminal import outlive_terminal

ALIASES = {"run_folder": "run"}  # torchrun takes --run for its own --run_path: --run_folder works under both
USUAL_NAMES = {  # of constants in other programs
    "learning_rate": "lr",
    "batch_size": "batch",
    "global_batch_size": "batch",
    "per_device_train_batch_size": "micro_batch",
    "micro_batch_size": "micro_batch",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "iterations": "max_steps",
    "max_iters": "max_steps",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "optim": "optimizer",
    "wd": "weight_decay",
    "max_grad_norm": "clip",
    "grad_clip": "clip",
    "precision": "dtype",
    "random_seed": "seed",
    "dataset": "data",
    "train_file": "data",
    "model_name": "model",
    "model_name_or_path": "model",
    "output_dir": "out",
    "output": "out",
    "out_dir": "out",
    "resume": "resume_timestamp",
    "resume_from_checkpoint": "resume_timestamp",
    "rank": "lora_rank",
    "lora_r": "lora_rank",
    "context_length": "block_size",
    "seq_length": "max_length",
    "max_seq_length": "max_length",
    "name": "tag",
    "run_name": "tag",
    "gradient_checkpointing": "checkpointing",
}
FIND_CONSTANTS = {"find_from", "find_to", "find_steps", "find_smoothing"}
STUDY_CONSTANTS = {"arms", "grid", "seeds", "max_hours"}
EVERY_MODE = {"mode", "out", "backend"}
KEEPS_NOTHING = ("find_lr",)  # modes that train, but write no checkpoint


@dataclass(frozen=True)
class Typed:
    """What was typed on the command line, beside the values: it decides what a resume may change."""

    preset: str | None = None
    smoke: bool = False
    flags: frozenset = frozenset()
    overrides: dict = dataclasses.field(default_factory=dict)  # what preset and SMOKE changed
    chosen: str | None = None  # a line: what the device decided
    runs: int = 1  # to be made by the study that makes this one first: its forecast is theirs


@dataclass(frozen=True)
class Constants:
    """Base of every Config. `typed` is no constant: it has no flag and no place in config.json."""

    typed: Typed = field(default=Typed(), kw_only=True, compare=False, repr=False)


@dataclass(frozen=True)
class Bookkeeping(Constants):
    """Constants that every training script has and few experiments are about. A script with another default
    has the constant in its own Config."""

    skip_spikes: bool = False  # no update by a step whose loss or gradient norm leaves its band
    compile: Literal["auto", True, False] = "auto"  # blocks; auto: on a card, from ten minutes of training on
    shard: Literal["none", "optimizer", "full"] = "none"  # ranks share optimizer state; full: weights, too
    final_eval: bool = True  # the test rows, once, at the end
    keep: within(int, 2) = 2  # checkpoints: the newest, and one to fall back to
    log_every: Count = 50  # steps
    price_per_hour: Amount | None = None  # dollars for the whole box
    profile: within(int, 1, 1000) | None = None  # steps to record: trace.json, and ten lines
    note: str = ""  # anything; eval.py --table shows it
    out: str | None = None  # none = runs/<script> below the current folder
    tag: str | None = None  # none = the preset's name
    resume_timestamp: str | None = None  # a timestamp, latest, or auto (resume, skip if finished, else start)
    resume_step: Whole | None = None  # an older checkpoint than the newest
    backend: Literal["auto", "nccl", "xccl", "gloo"] = "auto"  # auto: nccl, xccl, or gloo on CPUs
    wsd_decay: Share = 0.2  # share of all steps, at the end, in which the rate falls with schedule wsd
    find_from: within(float, 1e-30) = 1e-6  # lowest rate of mode find_lr
    find_to: within(float, 1e-30) = 1.0  # highest
    find_steps: Count = 100  # of mode find_lr
    find_smoothing: within(float, 0, 0.9999) = 0.8  # weight of the past in the running mean of the loss

    # A constant that READ_BY names is read by those modes only; any other by all modes but NO_TRAINING.
    NO_TRAINING = ()
    READ_BY: ClassVar = {"find_lr": FIND_CONSTANTS}

    def __post_init__(self):
        if self.find_from >= self.find_to:
            raise UserError(f"find_from {self.find_from} is not below find_to {self.find_to}")
        if self.shard == "full":
            self._refuse_beside_full()
        schedule, min_lr = getattr(self, "schedule", None), getattr(self, "min_lr", 0)
        if schedule in ("one_cycle", "gpt3") and min_lr:
            raise UserError(f"--min_lr {min_lr}: {schedule} sets its last rate itself, use --min_lr 0")
        mode, resumes = getattr(self, "mode", None), self.resume_timestamp or self.resume_step is not None
        if mode in KEEPS_NOTHING and resumes:
            raise UserError(f"--resume_timestamp goes with training, not with {mode}, which keeps nothing")

    def _refuse_beside_full(self):
        """What needs whole weights while it trains, or a scaler that knows of other ranks."""
        clash = {"compile": True, "dtype": "fp16", "mode": "find_lr", "qat": "int4", "base_dtype": "bf16"}
        for name, value in clash.items():
            if getattr(self, name, None) == value:
                flag = f"--{name}" if value is True else f"--{name} {value}"
                raise UserError(f"--shard full does not go with {flag}: use --shard optimizer")


@dataclass(frozen=True)
class Studied(Bookkeeping):
    """Constants of a script whose runs can be the arms of a study (lab/compare/study.py)."""

    arms: tuple[str, ...] = ()  # of mode study: lr=1e-4 lora_rank=64,lora_alpha=64, or presets
    grid: tuple[str, ...] = ()  # of mode study: lr=1e-5,3e-5 lora_rank=8,64, every product an arm
    seeds: Count = 1  # of each arm in a study: seed, seed + 1, ...
    max_hours: Amount | None = None  # ends a study between two steps; the same command continues

    READ_BY: ClassVar = {"find_lr": FIND_CONSTANTS, "study": STUDY_CONSTANTS}

    def __post_init__(self):
        super().__post_init__()
        if getattr(self, "mode", None) == "study" and (self.resume_timestamp or self.resume_step is not None):
            raise UserError("mode study continues by itself: drop --resume_timestamp, --resume_step")


def parse_config(config_class, presets, smoke, doc, argv=None):
    """Reads the constants of a script: defaults < preset < `smoke` < flags. A callable
    in `smoke` maps the value.

    A mistake prints one line to stderr and exits with 2. cfg.typed tells what was on the command line.
    """
    outlive_terminal()
    try:
        return parsed_config(config_class, presets, smoke, doc, argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every process of a launch meets it, one says it
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def parsed_config(config_class, presets, smoke, doc, argv=None):
    """parse_config that raises UserError instead of exiting."""
    hints = hints_of(config_class)
    defaults = {field.name: field.default for field in _own_first(config_class)}
    named = {f"preset {name}": values for name, values in presets.items()}
    for where, values in {"Config": defaults, "SMOKE": smoke, **named}.items():
        for name, value in values.items():
            _check_type(where, name, value, hints)
    if odd := [word for word in (sys.argv[1:] if argv is None else argv) if str(word).endswith("=--")]:
        raise UserError(f"{odd[0]}: -- is no value")  # argparse would make it an empty list
    given = vars(_parser(config_class, defaults, presets, hints, doc).parse_args(argv))
    preset, is_smoke = given.pop("preset", None), given.pop("smoke", False)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    named = preset and "tag" in defaults and defaults["tag"] is None
    changed = ({"tag": preset} if named else {}) | presets.get(preset, {})
    for name, value in smoke.items() if is_smoke else ():
        changed[name] = value(changed.get(name, defaults[name])) if callable(value) else value
    overrides = {name: value for name, value in changed.items() if name not in {"tag", *given}}
    cfg = config_class(**{**changed, **given}, typed=Typed(preset, is_smoke, frozenset(given), overrides))
    _check_limits(cfg)
    if issubclass(config_class, Bookkeeping):
        _check_mode(cfg, given)
    return cfg


def hints_of(config_class) -> dict:
    """constant -> its annotation with its limits taken off."""
    hints = typing.get_type_hints(config_class)
    return {name: hints[name] for name in hints if name in names_of(config_class)}


def names_of(config_class) -> list[str]:
    """The constants, as a script may name them."""
    return [each.name for each in dataclasses.fields(config_class) if each.name != "typed"]


def constants_of(cfg) -> dict:
    """constant -> value, as config.json has it."""
    return {name: getattr(cfg, name) for name in names_of(cfg)}


def _own_first(config_class) -> list[dataclasses.Field]:
    """The constants in the order of the script, the inherited ones last."""
    known = {each.name: each for each in dataclasses.fields(config_class) if each.name != "typed"}
    own = inspect.get_annotations(config_class)
    return [known[name] for name in {**own, **known}]


def counting(cfg, **changes):
    """A copy of `cfg` with changes to what counts as typed: flags, smoke, ..."""
    return dataclasses.replace(cfg, typed=dataclasses.replace(cfg.typed, **changes))


def _parser(config_class, defaults, presets, hints, doc) -> argparse.ArgumentParser:
    flags = ["preset", "smoke", *defaults, *(f"no-{name}" for name in hints if _is_switch(hints[name]))]

    class OneLineParser(argparse.ArgumentParser):
        def error(self, message):
            if unknown := re.search(r"unrecognized arguments: --([\w-]+)", message):
                usual = [name for name in [USUAL_NAMES.get(unknown[1].replace("-", "_"))] if name in flags]
                near = usual or difflib.get_close_matches(
                    unknown[1].replace("-", "_"), flags, n=1, cutoff=0.7
                )
                hint = f"did you mean --{near[0]}?" if near else "--help lists them"
                message = f"unknown flag --{unknown[1]}: {hint}"
            if wrong := re.search(r"argument --preset: invalid choice: '([^']*)'", message):
                message = f"--preset {wrong[1]} is none of {', '.join(presets)}{_scripts_with(wrong[1])}"
            raise UserError(message)

    # absent unless typed: the defaults stay in Config, and a resume knows what was typed
    parser = OneLineParser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                           formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny model, built-in data, seconds")
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a named set of constants")
    comments = _comments(config_class)
    for name, default in defaults.items():
        shown = " ".join(default) or None if isinstance(default, tuple) else default
        text = f"{comments.get(name, '')} [{shown}]".strip().replace("%", "%%")
        names = [f"--{name}", *([f"--{ALIASES[name]}"] if name in ALIASES else [])]
        parser.add_argument(*names, dest=name, help=text, **_flag(hints[name]))
    return parser


def _scripts_with(preset) -> str:
    """Which other script names it, for an error."""
    tables = {
        path: re.search(r"^PRESETS = .*?^}", path.read_text(), re.M | re.S) for path in PROJECT.glob("*.py")
    }
    names = sorted(path.name for path, table in tables.items() if table and f'"{preset}": ' in table[0])
    return f": it is one of {' and '.join(names)}" if names else ""


@functools.cache
def _comments(config_class) -> dict[str, str]:
    """constant -> the comment on its line."""
    classes = [each for each in reversed(config_class.__mro__) if dataclasses.is_dataclass(each)]
    return dict(re.findall(r"^ +(\w+): .*?# (.*)$", "".join(map(inspect.getsource, classes)), re.M))


def _is_switch(hint) -> bool:
    """Whether a constant is typed as --name and --no-name; other values that it has as --name VALUE."""
    return hint is bool or bool in map(type, typing.get_args(hint))


def _flag(hint) -> dict:
    """The arguments of add_argument for a constant with this annotation."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if _is_switch(hint):
        words = {str(value).lower(): value for value in typing.get_args(hint)}
        return {"action": _Switch, "words": words, "metavar": "|".join(words)}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint), "metavar": "|".join(map(str, typing.get_args(hint)))}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "metavar": "NAME", "action": "extend"}
    kinds = typing.get_args(hint) or (hint,)

    def convert(text):
        if types.NoneType in kinds and text == "none":
            return None
        value = kinds[0](text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value

    convert.__name__ = " or ".join(kind.__name__.removesuffix("Type").lower() for kind in kinds)
    return {"type": convert, "metavar": convert.__name__.replace(" or ", "|").upper()}


class _Switch(argparse.BooleanOptionalAction):
    """--name, --no-name, or --name and one of `words` (word -> value)."""

    def __init__(self, *args, words, metavar, **how):
        super().__init__(*args, **how)
        self.words, self.nargs, self.metavar = words, "?", metavar

    def __call__(self, parser, namespace, word, option):
        if word is not None and (word not in self.words or option.startswith("--no-")):
            name = option.replace("--no-", "--")
            parser.error(f"{option} {word}: use {name}, --no-{name[2:]} or {name} {self.metavar}")
        value = not option.startswith("--no-") if word is None else self.words[word]
        setattr(namespace, self.dest, value)


def _check_type(where, name, value, hints):
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        raise UserError(f"{where} names no constant: {name}" + (f", did you mean {near[0]}?" if near else ""))
    literal, allowed = (
        typing.get_origin(hints[name]) is Literal,
        typing.get_args(hints[name]) or (hints[name],),
    )
    if hints[name] == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
            raise UserError(f"{where}: {name} = {value!r} has the wrong type: use a tuple of str")
        return
    if not literal and allowed != (bool,) and not set(allowed) <= {int, float, str, types.NoneType}:
        raise UserError(f"{where}.{name}: use bool, Literal, or int, float, str and these | None")
    fits = type(value) in allowed or (type(value) is int and float in allowed)
    if literal:
        fits = any(value == one and type(value) is type(one) for one in allowed)
    if not fits and not (where == "SMOKE" and callable(value)):
        expected = " | ".join(getattr(kind, "__name__", repr(kind)) for kind in allowed)
        what = "is none of its values" if literal else "has the wrong type"
        raise UserError(f"{where}: {name} = {value!r} {what}: use {expected}")


def _check_limits(cfg):
    if not re.fullmatch(r"[\w.-]*", getattr(cfg, "tag", None) or ""):
        raise UserError(f"--tag {cfg.tag!r} becomes part of a folder's name: use letters, digits, . _ -")
    hints = typing.get_type_hints(type(cfg), include_extras=True)
    for name in names_of(cfg):
        value, limits = getattr(cfg, name), limits_of(hints[name])
        if limits and value is not None and not limits.low <= value <= limits.high:
            raise UserError(f"--{name} {value} is out of range: use {limits}")


def readers_of(config_class, name) -> list[str]:
    """The modes that read a constant. A mode that trains accepts all of training's: its command is the
    training's with --mode added."""
    modes = typing.get_args(typing.get_type_hints(config_class)["mode"])
    if name in EVERY_MODE:
        return list(modes)
    named = {mode for words, names in config_class.READ_BY.items() if name in names for mode in words.split()}
    return [mode for mode in modes if (mode in named if named else mode not in config_class.NO_TRAINING)]


def _check_mode(cfg, given):
    """UserError for a typed flag that the chosen mode does not read."""
    for name in sorted(given):
        readers = readers_of(type(cfg), name)
        if cfg.mode not in readers:
            raise UserError(f"--{name} is read by --mode {' or '.join(readers)}, not by {cfg.mode}")


def override_lines(cfg) -> list[str]:
    """Lines (at most 100 columns) of what preset and --smoke changed."""
    t = cfg.typed
    lines = [" and ".join(filter(None, [t.preset and f"preset {t.preset}", t.smoke and "smoke"])) + " set:"]
    for name, value in t.overrides.items():
        word = f" {name} {value},"
        if len(lines[-1] + word) > 100:
            lines.append(" ")
        lines[-1] += word
    return [*lines[:-1], lines[-1].rstrip(",")] if t.overrides else []
