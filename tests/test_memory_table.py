"""benchmarks/memory_table.py: what it counts, and how a count becomes a cell."""

import importlib.util

import pytest
import torch
from conftest import PROJECT

import core
from lab.train import loss


@pytest.fixture
def bench():
    path = PROJECT / "benchmarks/memory_table.py"
    spec = importlib.util.spec_from_file_location("memory_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_storages_are_counted_once_and_while_they_are_alive(bench):
    with bench.Storages() as storages:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        c = torch.ones(500)
        assert storages.now == 6000
        del c
        assert storages.now == 4000 and storages.peak == 6000
        del a, b
        assert storages.now == 0
        torch.zeros(100)
    assert (storages.now, storages.peak) == (0, 6000)


def test_a_step_needs_weights_gradients_and_activations_and_adapters_less(bench, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 4, 64, {"vocab_size": 512}))
    with torch.device("meta"):
        weights = core.count_parameters(core.GPT(bench.config_of("tiny")))[0]
    few, state = bench.counted(bench.config_of("tiny"), 1, half=False)
    many, _ = bench.counted(bench.config_of("tiny"), 3, half=False)
    checkpointed, _ = bench.counted(bench.config_of("tiny", True), 3, half=False)
    _, of_adapters = bench.counted(bench.config_of("tiny"), 1, adapters=True, half=False)
    assert state == pytest.approx(8 * weights / 1e9) and of_adapters < 0.6 * state
    a_row = (many - few) / 2
    assert 8 * weights / 1e9 < few and 4 * bench.TOKENS * 64 * 2 * 8 / 1e9 < a_row < few
    assert checkpointed < many


def test_a_step_as_on_a_card_is_counted_by_what_stands_in_for_its_kernels(bench, monkeypatch):
    for module, names in ((loss, ("_head_on_cpu", "_chunks", "_slope")), (bench.gpt, ("require_memory",))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))  # what the call below changes comes back
    bench.as_on_a_card(1 << 20)
    monkeypatch.setitem(
        bench.SHAPES, "grouped", (2, 4, 64, {**bench.LLAMA, "vocab_size": 512, "n_kv_head": 1})
    )
    half, whole = (bench.counted(bench.config_of("grouped"), 3, half=half)[0] for half in (True, False))
    assert 0 < half < whole


def test_the_largest_micro_batch_is_read_off_the_line_between_two_counts(bench, monkeypatch):
    known = {True: ([4.0, 7.0, 15.0], 2.0), False: ([6.0, 12.0, 28.0], 2.0)}
    monkeypatch.setattr(bench, "ROWS", (1, 4, 12))
    monkeypatch.setattr(bench, "peaks", lambda shape, adapters, checkpointing: known[checkpointing])

    def rows(mode, cards, room):
        return bench.most_rows("any", mode, cards, room / 0.92 + 0.6)

    assert [rows("full", 1, room) for room in (7.9, 8.1, 13.9, 14.1, 18.1, 32.1)] == [0, 1, 3, 4, 6, 12]
    assert rows("full --checkpointing", 1, 6.1) == 1
    assert [rows("full --checkpointing --shard optimizer", n, 6.1) for n in (1, 2, 4)] == [1, 2, 2]
    monkeypatch.setattr(bench, "CARDS", [room / 0.92 + 0.6 for room in (8.1, 6.1, 5.1)])
    full, less, shared = (f"{mode}, 1" for mode in list(bench.MODES)[:3])
    several = [full, less, shared]
    assert bench.rows_of("any") == [("1", [full, less, "-"]), ("2", several), ("4", several)]
    monkeypatch.setattr(bench, "CARDS", [8.1 / 0.92 + 0.6])
    assert bench.rows_of("any") == [("1, 2, 4", [full])]
