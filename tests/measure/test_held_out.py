"""Several held-out texts: measured each, and as one whose documents stay apart."""

from types import SimpleNamespace

import numpy as np
import pytest

import core
from lab.errors import UserError
from lab.measure.held_out import MeasuredText, pooled, require_windows


def measured(groups, seed) -> MeasuredText:
    """Sums of made-up windows of 4 targets each."""
    rng, n = np.random.default_rng(seed), len(groups)
    sums = np.stack([rng.uniform(4, 8, n), rng.integers(0, 5, n), np.full(n, 4)], 1)
    return MeasuredText(sums, np.array(groups), rng.uniform(6, 9, n), np.full(n, 12))


def test_several_texts_are_one_with_sums_over_sums_and_no_document_shared():
    a, b = measured([0, 0, 1], 1), measured([0, 1, 1, 2], 2)
    both = pooled([a, b])
    assert both.groups.tolist() == [0, 0, 1, 2, 3, 3, 4]
    figures = both.figures()
    assert figures["loss"] == pytest.approx((a.sums[:, 0].sum() + b.sums[:, 0].sum()) / 28)
    wanted = core.language_metrics(both.sums, both.groups, both.plain, both.spelt)
    assert figures == wanted and figures != a.figures()


def test_lines_are_those_by_which_runs_are_compared():
    lines = measured([0, 0, 1], 1).lines("test")
    assert [line["row"] for line in lines] == [0, 1, 2] and [line["group"] for line in lines] == [0, 0, 1]
    assert {line["part"] for line in lines} == {"test"} and {line["bytes"] for line in lines} == {12}


def test_a_source_does_not_take_the_place_of_all_together():
    with pytest.raises(
        UserError, match=r"a text is called own: .* name it otherwise by --sources name=where"
    ):
        require_windows(None, SimpleNamespace(tokens={"a": None, "own": None}), ("val", "test"))
