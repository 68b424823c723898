"""Small sources, and a Hub that is made of lists."""

import numpy as np
import pytest

import core
from core import Corpus, World


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "tokens"))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def streams(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 60_000, n).astype(np.uint16) for name, n in zip("abcd", sizes, strict=False)
    }


def given(found, name) -> list[int]:
    """The blocks of one source in the order of the run, by their number in that source."""
    source = found.blocks.names.index(name)
    rows = found.rows[found.blocks.source(found.rows) == source]
    return (rows - found.blocks.starts[source]).tolist()


def opened(data, tokenizer="bytes", **more):
    more = {"val_share": 0.2, "test_share": 0.2, "first_trains": False} | more
    return core.open_corpus(Corpus(str(data), tokenizer, **more), World())
