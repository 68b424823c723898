"""torch.compile of a GPT's blocks: whole graphs, one for all lengths, and none of them lost by generating."""

import pytest
import torch

import core
from lab.models import gpt
from lab.train import cpu

SHAPES = {
    "gpt2": {},
    "llama": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
}


@pytest.fixture
def graphs(monkeypatch):
    """Sizes of the graphs that dynamo hands over; none is made into code."""
    torch.compiler.reset()
    found = []

    def backend(graph, example_inputs):
        found.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: _compile(self, backend, **how))
    yield found
    torch.compiler.reset()


def _compile(module, backend, **how):
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, fullgraph=True, **how)


def compiled(shape, adapted=False):
    torch.manual_seed(0)
    model = core.GPT(core.GPTConfig(50, 32, 2, 2, 16, **SHAPES[shape]))
    if adapted:
        core.add_lora(model, 4, 4)
    for block in model.h:
        block.compile(dynamic=True)
    return model


def train(model, length, rows=3):
    ids = torch.randint(50, (rows, length))
    model(ids, ids).backward()


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_all_lengths_share_a_graph_and_generating_costs_none(shape, adapted, graphs):
    """fullgraph: a break would raise."""
    model = compiled(shape, adapted).train()
    for length in (7, 12, 20, 9):
        train(model, length, rows=length % 4 + 2)
    once = len(graphs)
    assert once <= 2 * len(model.h)  # the first block of a frozen base is handed what needs no gradient
    core.generate(model, [[1, 2, 3]], 5)
    train(model, 11)
    core.generate(model, [[1, 2, 3], [4]], 40)
    train(model, 14)
    assert len(graphs) == once


def test_a_fixed_length_is_at_most_one_graph_a_block(graphs):
    model = compiled("gpt2").train()
    for _ in range(3):
        train(model, 16)
        core.generate(model, [[1, 2, 3]], 5)
    assert 1 <= len(graphs) <= len(model.h)  # blocks of one shape may share theirs


def test_a_compiled_block_computes_what_it_computes_otherwise(graphs):
    model = compiled("llama").eval()
    ids = torch.randint(50, (3, 13))
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids)) and graphs
        with torch.compiler.set_stance("force_eager"):
            plain = model(ids)
        torch.testing.assert_close(model(ids), plain, rtol=0, atol=1e-6)


def test_nothing_is_written_to_a_module_while_generating():
    """A compiled block looks at its module's attributes: one more and it would be compiled anew."""
    model = compiled("gpt2")
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    during = []

    def look():
        during.append({name: set(module.__dict__) for name, module in model.named_modules()})
        assert gpt.SECOND_LAYOUT or not cpu.ONEDNN

    core.generate(model, [[1, 2, 3]], 4, poll=look)
    assert during == [before] * 4 and not gpt.SECOND_LAYOUT


def test_export_takes_any_length():
    model = core.GPT(core.GPTConfig(50, 32, 2, 2, 16)).eval()
    lengths = {"input_ids": {1: torch.export.Dim("length", min=2, max=32)}}
    exported = torch.export.export(model, (torch.ones(1, 5, dtype=torch.long),), dynamic_shapes=lengths)
    for length in (2, 19, 32):
        ids = torch.randint(50, (1, length))
        torch.testing.assert_close(exported.module()(ids), model(ids), rtol=0, atol=1e-6)
