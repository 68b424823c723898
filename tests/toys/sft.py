"""Small instruction rows, runs and configs."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from torch import nn
from toys.once import once

import core
import run_instruct
import run_lora
from core import World
from lab.data import instructions

SCRIPTS = {"run_instruct": run_instruct, "run_lora": run_lora}
END = 99  # the end token of the data made by hand
QUIET = ["--sample_tokens", 0, "--answer_rows", 0, "--plain_blocks", 0]
BARE = ["--batch", 4, "--micro_batch", 4, "--epochs", 1, "--max_length", 64, "--eval_every", "none", *QUIET]


def config(name, *argv):
    s = SCRIPTS[name]
    return core.parse_config(s.Config, s.PRESETS, s.SMOKE, s.__doc__, [str(word) for word in argv])


def go(name, *argv, out="out", smoke=True) -> tuple[dict, Path]:
    """A run in this process: its result.json and its folder."""
    flags = ["--smoke"] if smoke else []
    result = SCRIPTS[name].main(config(name, *flags, "--out", out, *argv), World())
    return result, ranks.newest(out)


def toy_rows(n=60) -> list[dict]:
    words = ["apple", "river", "stone", "cloud", "table", "green", "seven"]
    return [
        {
            "instruction": f"Repeat {words[i % 7]} {i}.",
            "input": f"case {i}" if i % 2 else "",
            "output": f"{words[i % 7]} {words[i % 5]} {i}" + ", again and again" * (i % 4),
        }
        for i in range(n)
    ]


def write_rows(rows, name="rows.json") -> str:
    Path(name).write_text(json.dumps(rows))
    return name


def toy_file(n=60) -> str:
    return write_rows(toy_rows(n))


def by_hand(*rows, groups=None) -> instructions.Instructions:
    """Rows of (prompt ids, answer ids)."""
    pieces = list(itertools.chain.from_iterable(rows))
    offsets = np.cumsum([0, *map(len, pieces)])
    tokens = np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.uint16)
    tokenizer = SimpleNamespace(eos_token_id=END, decode=lambda ids: " ".join(map(str, ids)))
    groups = np.array([str(i) for i in range(len(rows))] if groups is None else groups)
    texts = [["", "", ""]] * len(rows)
    numbers = np.arange(1, len(rows) + 1)
    return instructions.Instructions(
        texts, [None] * len(texts), numbers, groups, tokens, offsets, tokenizer, {}, []
    )


def random_rows(n=24, seed=0, most=14):
    """Ids below END, so that an end token is the one appended."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most, (n, 2)).tolist()
    return by_hand(*[(rng.integers(1, 90, a).tolist(), rng.integers(1, 90, b).tolist()) for a, b in sizes])


def every(data, most=64, loss_on_prompt=False) -> core.Examples:
    return core.Examples(data, np.arange(len(data)), most, loss_on_prompt)


def small_gpt(dtype=torch.float32, **shape):
    torch.manual_seed(3)
    sizes = {"vocab_size": 100, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16} | shape
    model = core.GPT(core.GPTConfig(**sizes)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


def initial_model(name, cfg, tokenizer):
    core.reseed(cfg.seed, "init")
    folder = ["no run"] if name == "run_lora" else []  # whose adapter/ would be taken
    return SCRIPTS[name].build_model(cfg, tokenizer, World(), *folder)


def parts_of(cfg):
    data = core.load_instructions(cfg, World())
    return data, {
        part: core.Examples(data, rows, cfg.max_length, cfg.loss_on_prompt)
        for part, rows in instructions.split(data, cfg)[0].items()
    }


def loss_of(model, examples, cfg) -> float:
    sums = core.evaluate(model, examples, cfg, World())
    return sums[:, 0].sum() / sums[:, 2].sum()


@pytest.fixture(scope="session")
def tuned(cache, tmp_path_factory):
    """The smoke test's run of all weights, with fewer epochs: (result, folder)."""
    return once(_tuned, tmp_path_factory)


@pytest.fixture(scope="session")
def adapted(cache, tmp_path_factory):
    """The smoke test's run of adapters, with fewer epochs."""
    return once(_adapted, tmp_path_factory)


@pytest.fixture(scope="session")
def gpt2_folder(cache, tmp_path_factory):
    """A GPT-2 with a tokenizer, as transformers writes it."""
    return once(_gpt2_folder, tmp_path_factory)


def _tuned(tmp_path_factory):
    argv = ["--epochs", 5, "--batch", 16, "--lr", 6e-3, "--eval_every", "none", "--plain_blocks", 4]
    return go("run_instruct", *argv, "--sample_tokens", 4, out=str(tmp_path_factory.mktemp("tuned")))


def _adapted(tmp_path_factory):
    argv = ["--epochs", 2, "--eval_every", 40, "--sample_tokens", 0, "--plain_blocks", 0, "--answer_rows", 10]
    return go("run_lora", *argv, out=str(tmp_path_factory.mktemp("adapted")))


def _gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    texts = [
        instructions.prompt_text(r["instruction"], r["input"], "alpaca") + r["output"] for r in toy_rows()
    ]
    tokenizer = core.make_tokenizer("bpe:400", lambda: texts)
    core.save_pretrained(small_gpt(vocab_size=len(tokenizer)).eval(), tokenizer, folder)
    return folder


def toy_cfg(*argv, name="run_instruct"):
    return config(name, "--smoke", *argv)


def fails(name, argv, monkeypatch, capfd) -> str:
    """Expects one line on stderr and exit code 2; returns the line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        ranks.main(name)
    lines = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{name}.py: error: ")
    return lines[0]
