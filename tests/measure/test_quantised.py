"""Figures of an int4 model: of these weights or measured anew, and a speed that is a median."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import everywhere
from toys.mathqa import by_hand

import core
from lab.compare import mathqa_report
from lab.measure import quantised


def write(figures):
    Path("quantised_32").mkdir()
    Path("quantised_32/result.json").write_text(json.dumps(figures))


def test_figures_of_the_same_weights_are_known_and_others_go():
    write({"weights_sha256": "abc", "float": {}})
    assert quantised.known_figures(Path("quantised_32"), "abc") == {"weights_sha256": "abc", "float": {}}
    assert quantised.known_figures(Path("quantised_32"), "xyz") is None
    assert not Path("quantised_32").exists()


CHANGED = '{"weights_sha256": "abc", "float": {"test/loss": 1.5}, "seal": "of another loss"}'


@pytest.mark.parametrize("text", ["{", "", None, "[]", "null", "[" * 9999, CHANGED], ids=range(7))
def test_figures_that_are_not_whole_are_measured_anew(text):
    Path("quantised_32").mkdir()
    if text is not None:
        Path("quantised_32/result.json").write_text(text)
    assert quantised.known_figures(Path("quantised_32"), "abc") is None
    assert not Path("quantised_32").exists()


def test_rates_are_of_five_passes_over_200_rows_and_shown_with_their_range(monkeypatch):
    now, passes = [0.0], iter([9.0, 2.0, 1.0, 4.0, 2.0, 2.0])  # the first one warms up
    seen = []

    def evaluate(model, some, cfg, world, poll):
        seen.append(len(some))
        now[0] += next(passes)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    everywhere(monkeypatch.setattr, quantised, "evaluate", evaluate)
    rows = by_hand(*[([1, 2, 3], [[4]] * 5)] * 300)  # of four tokens read: the last one is only a target
    examples = core.Examples(rows, np.arange(300), 64)
    rates = quantised.tokens_per_second(None, examples, SimpleNamespace(), core.World(), lambda: None)
    assert rates == [400.0, 800.0, 200.0, 400.0, 400.0] and seen == [200] * 6
    run = {"tokens_per_second": 400.0, "tokens_per_second_range": [200.0, 800.0]}
    older = {"tokens_per_second": 900.0}
    assert mathqa_report.rate([run]) == "400 (200 to 800)"
    assert mathqa_report.rate([run, older]) == "650 (200 to 900)"
