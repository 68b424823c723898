"""Small problems, and models that know or prefer answers."""

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import core
from core import World

END = 99  # the end token of the data made by hand
LETTERS = "abcde"


def cfg_of(data="problems.json", **others):
    known = {"data": str(data), "max_documents": None, "answer_format": "text", "max_length": 256}
    known |= {"split_seed": 42, "loss_on_prompt": False, "eval_batch": 8, "dtype": "fp64"}
    return SimpleNamespace(**known | others)


def spelt(options) -> str:
    return " , ".join(f"{letter} ) {option}" for letter, option in zip(LETTERS, options, strict=True))


def row_of(problem, options, right=0, **others) -> dict:
    return {"Problem": problem, "options": spelt(options), "correct": LETTERS[right]} | others


def made_up(n=60, seed=0, start=0) -> list[dict]:
    """Different problems; options of one to three digits, the right one anywhere."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(start, start + n):
        options = rng.choice(400, len(LETTERS), replace=False).tolist()
        right = int(rng.integers(len(LETTERS)))
        extra = " and 7 spare ones" * int(rng.integers(4))
        problem = f"crate {i} : {options[right] - 3} bolts{extra} , then 3 more . bolts ?"
        rows.append(row_of(problem, options, right))
    return rows


def write(rows, path="problems.json") -> str:
    """A table of the kind that the suffix names."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def letters():
    """One token a byte; its end token is 0, with which batches are padded."""
    return core.make_tokenizer("bytes", lambda: [])


def load(rows, tokenizer, **others) -> core.Problems:
    data = write(rows) if isinstance(rows, list) else rows
    return core.load_problems(cfg_of(data, **others), World(), tokenizer)


def by_hand(*rows, right=None, groups=None, said=None) -> core.Problems:
    """Rows of (problem's ids, ids of five options), or of these and the ids of their list."""
    pieces = [piece for problem, options, *listed in rows for piece in (problem, *(listed or [[]]), *options)]
    tokens = np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.uint16)
    words = [[str(option) for option in options] for _, options, *_ in rows] if said is None else said
    right = np.zeros(len(rows), dtype=int) if right is None else np.array(right)
    return core.Problems(
        texts=[["", "", words[i][r]] for i, r in enumerate(right)], categories=[None] * len(rows),
        numbers=np.arange(1, len(rows) + 1), tokens=tokens, offsets=np.cumsum([0, *map(len, pieces)]),
        groups=np.array([str(i) for i in range(len(rows))] if groups is None else groups),
        tokenizer=SimpleNamespace(eos_token_id=END), fingerprint={}, lines=[],
        options=words, right=right, part=[None] * len(rows),
    )  # fmt: skip


def random_problems(n=20, seed=0, most=12, listed=False) -> core.Problems:
    """Ids below 90, options of one to four tokens; `listed`: behind a list of one to six."""
    rng = np.random.default_rng(seed)
    rows = [
        (rng.integers(1, 90, rng.integers(1, most)).tolist(),
         [rng.integers(1, 90, size).tolist() for size in rng.integers(1, 5, 5)],
         *([rng.integers(1, 90, rng.integers(1, 7)).tolist()] if listed else []))
        for _ in range(n)
    ]  # fmt: skip
    return by_hand(*rows, right=rng.integers(0, 5, n))


def small_gpt(dtype=torch.float64, **shape):
    torch.manual_seed(3)
    sizes = {"vocab_size": 100, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16} | shape
    model = core.GPT(core.GPTConfig(**sizes)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


MODERN = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False}


class Fake(nn.Module):
    """A model whose logits are `scores(ids)`: (T, V) of each row."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def hidden(self, input_ids):
        return torch.stack([self.scores(ids) for ids in input_ids.tolist()])

    def head(self, hidden):
        return [(hidden, torch.eye(hidden.shape[-1], dtype=hidden.dtype))], None


def log_likelihood(model, before, after) -> float:
    """Of the ids `after` behind `before`, from the logits of that row alone."""
    with torch.no_grad():
        log_probs = model(torch.tensor([[*before, *after]]))[0].log_softmax(-1)
    return sum(log_probs[len(before) - 1 + i, token].item() for i, token in enumerate(after))


FIVE = ["1", "2", "3", "4", "5"]


def quiet():
    pass
