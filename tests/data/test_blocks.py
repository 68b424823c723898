"""Every token but the first is the target of exactly one block."""

import numpy as np
import pytest
import torch
from toys.corpus import own_cache  # noqa: F401 (a fixture)

import core
from lab.data.blocks import Windows


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("block_size", [1, 7, 8, 100])
@pytest.mark.parametrize("length", [2, 8, 9, 50, 57])
def test_every_token_but_the_first_is_the_target_of_exactly_one_block(kind, block_size, length):
    stream = np.random.default_rng(0).integers(0, 60_000, length).astype(kind)
    blocks = core.Blocks(stream, block_size)
    ids, labels = blocks.batch(range(len(blocks)), torch.device("cpu"))
    assert ids.shape == labels.shape == (len(blocks), block_size) and ids.dtype == labels.dtype == torch.int64
    counted = labels != core.IGNORE_INDEX
    assert labels[counted].tolist() == stream[1:].tolist()
    assert ids[counted].tolist() == stream[:-1].tolist()
    assert counted.sum(1).tolist() == blocks.targets(range(len(blocks))).tolist()
    assert ids.min() >= 0 and counted[:-1].all()
    if len(blocks) > 2:
        some = [len(blocks) - 1, 0]
        assert torch.equal(blocks.batch(some, torch.device("cpu"))[1], labels[some])


def test_a_stream_without_a_target_has_no_block():
    assert len(core.Blocks(np.zeros(1, np.uint16), 8)) == 0


@pytest.mark.parametrize(("documents", "wanted"), [(9, [0, 1, 2, 3]), (10, [0, 0, 1, 1])])
def test_an_interval_redraws_documents_or_of_a_few_stretches_of_windows(documents, wanted):
    """By one rule in every script: a document of two windows says the same twice."""
    windows = Windows([np.arange(9)] * documents, 4, 4)
    assert len(windows) == 2 * documents and windows.groups()[:4].tolist() == wanted
