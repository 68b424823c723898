"""Small texts, and a cache that is made in another process."""

import csv
import itertools
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import everywhere

import core
import lab.data.text
import lab.run.files
from core import Corpus, World
from lab.data.text import token_cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))


def opened(data, tokenizer="bytes", **more):
    return core.open_corpus(Corpus(str(data), tokenizer, **more), World())


def table(texts, name="train.jsonl", column="text"):
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    if name.endswith(".csv"):
        with open(name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    else:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def texts_of(n, seed=0, words=12):
    """Documents that differ, of odd characters and lines."""
    rng, pool = (
        random.Random(seed),
        ["the", "of", "naïve\n", "漢字", "\r\n", "x\ty", "'ll", "\U0001f600", "end.\n"],
    )
    return [f"{i} " + " ".join(rng.choices(pool, k=words)) for i in range(n)]


def documents_of(tokens, part):
    """The texts of a stream, read back from its ids: END before and behind each."""
    end, found = tokens.tokenizer.eos_token_id, [[]]
    for token in tokens.parts[part].tolist():
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    assert found[0] == found[-1] == [], "a stream begins and ends with END"
    return [tokens.tokenizer.decode(ids) for ids in found[1:-1]]


def forked(function) -> int:
    """Runs it in a child that then vanishes like a killed process, nothing flushed; its exit status."""
    if (pid := os.fork()) == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def build(spec, tokens, every, at=None):
    """token_cache in pieces of its own, progress saved behind each `every`-th; killed before the `at`-th."""
    calls, encoder, up_to = itertools.count(1), lab.data.text.encoder, lab.data.text.up_to

    def struck(*args):
        encode = encoder(*args)
        return lambda texts: die() if next(calls) == at else encode(texts)

    with pytest.MonkeyPatch.context() as patch:
        ticks = itertools.count(0, 6 / every)
        patch.setattr(lab.data.text, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
        everywhere(patch.setattr, lab.data.text, "PIECE", 6000)
        everywhere(patch.setattr, lab.data.text, "up_to", lambda found, _: up_to(found, 1))
        everywhere(patch.setattr, lab.data.text, "encoder", struck)
        patch.setenv("TOKEN_CACHE", tokens)
        return token_cache(spec)


def files_of(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
