"""Parts of the data."""

from types import SimpleNamespace

import numpy as np
import pytest

import core
from lab.errors import UserError


def test_splits_keep_groups_whole_and_labels_even():
    rng = np.random.default_rng(0)
    groups = rng.zipf(1.6, 3000) % 700  # a few prompts with many rows, many with one
    labels = rng.integers(0, 3, 3000)
    part = core.split_by_group(groups, labels, [8, 1, 1], seed=42)
    assert all(len(set(part[groups == group])) == 1 for group in set(groups))
    np.testing.assert_allclose(np.bincount(part) / 3000, [0.8, 0.1, 0.1], atol=0.01)
    for label in range(3):
        np.testing.assert_allclose(
            np.bincount(part[labels == label]) / (labels == label).sum(), [0.8, 0.1, 0.1], atol=0.03
        )
    order = rng.permutation(3000)  # the file's order does not matter
    assert (core.split_by_group(groups[order], labels[order], [8, 1, 1], 42) == part[order]).all()
    assert (core.split_by_group(groups, labels, [8, 1, 1], 43) != part).any()
    with pytest.raises(UserError, match="2 prompts cannot be split into 3 parts"):
        core.split_by_group([1, 2], [0, 1], [8, 1, 1], 0)


def test_the_final_parts_are_val_and_test_unless_there_is_none():
    for cfg, want in [
        (SimpleNamespace(final_eval=True), ("val", "test")),
        (SimpleNamespace(final_eval=False), ("val",)),
        (SimpleNamespace(final_eval=True, test_share=0.0), ("val",)),
        (SimpleNamespace(final_eval=True, test_share=0.1), ("val", "test")),
    ]:
        assert core.final_parts(cfg) == want
